r"""Vector-Jacobian products: :math:`v_i^\top \partial y / \partial x` for many vectors :math:`v_i`.

One batched backward pass computes them all. If torch cannot batch the backward pass of a layer, such as that of GroupNorm when
it is differentiated twice, each vector has a pass of its own.

The trace of a Jacobian J is :math:`\sum_i e_i^\top J e_i` over the unit vectors, or the mean of
:math:`\epsilon^\top J \epsilon` over probes of mean 0 and covariance I (Hutchinson, 1989).
"""

from __future__ import annotations

__all__ = ["pull_back", "unit_vectors"]

from functools import partial

import torch
from torch import Tensor


def pull_back(y: Tensor, x: Tensor, vectors: Tensor, *, create_graph: bool) -> Tensor:
    """Return the vectors times the Jacobian of y with respect to x: (k, *shape of x).

    Args:
        y: tensor that was computed from x.
        x: tensor that requires a gradient.
        vectors: (k, *shape of y).
        create_graph: True if the products are to be differentiated.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> pull_back(x.square(), x, torch.eye(2), create_graph=False)
        tensor([[2., 0.],
                [0., 4.]])
    """
    if not y.requires_grad:  # y does not depend on x
        return vectors.new_zeros(len(vectors), *x.shape)
    products = partial(
        torch.autograd.grad, y, x, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    if len(vectors) > 1:
        try:
            return products(vectors, is_grads_batched=True)[0]
        except RuntimeError:  # a layer without a batching rule; any other error is raised again below
            pass
    return torch.stack([products(vector)[0] for vector in vectors])


def unit_vectors(x: Tensor) -> Tensor:
    """Return the unit vectors of each row of x (N, ...), as (d, N, ...) for rows of d coordinates.

    Example:
        >>> unit_vectors(torch.zeros(1, 2)).tolist()
        [[[1.0, 0.0]], [[0.0, 1.0]]]
    """
    d = x.shape[1:].numel()
    return torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)
