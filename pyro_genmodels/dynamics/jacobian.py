r"""Vector-Jacobian products: :math:`v_i^\top \partial y / \partial x` for many vectors :math:`v_i`.

One batched backward pass computes them all. Where torch cannot batch the backward pass of a layer, as that of GroupNorm when it
is differentiated twice, each vector has a pass of its own.
"""

from __future__ import annotations

__all__ = ["pull_back"]

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
