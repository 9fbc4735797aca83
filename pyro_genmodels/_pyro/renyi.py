r"""Renyi's bound as a differentiable loss. Pyro's `RenyiELBO` has a value and gradients, but no such loss.

With the log weights :math:`\log w_k = \log p(x, z_k) - \log q(z_k)` of K particles, the bound of order :math:`\alpha` is

.. math:: L_\alpha = \frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha}, \qquad
    \nabla L_\alpha = \sum_k \frac{w_k^{1 - \alpha}}{\sum_j w_j^{1 - \alpha}} \nabla s_k ,

for each element of those plates that all sites share, and summed over them. The surrogate :math:`s_k` is :math:`\log w_k` with
a derivative along reparametrised samples; a site that is not reparametrised counts
:math:`\frac{\alpha}{1 - \alpha} \log q(z_k)` instead of :math:`-\log q(z_k)`.

Li and Turner, *Renyi Divergence Variational Inference* (arXiv 1602.02311).
"""

from __future__ import annotations

__all__ = ["renyi_loss"]

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer import RenyiELBO
from pyro.infer.util import get_dependent_plate_dims, torch_sum
from pyro.poutine import Trace
from torch import Tensor

from pyro_genmodels._pyro.traces import sample_sites


def renyi_loss(elbo: RenyiELBO, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Return the loss (nats, summed over the data), (), of Pyro's `RenyiELBO`; its gradient is that of `loss_and_grads`.

    Args:
        elbo: order and particles.
        model: function with Pyro statements.
        guide: function with Pyro statements.
        args: positional arguments of both.
        kwargs: keyword arguments of both.

    Raises:
        NotImplementedError: if a site is reparametrised in part, which Pyro refuses as well.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        >>> renyi_loss(RenyiELBO(alpha=0.5, num_particles=10), model, guide)
        tensor(0., grad_fn=<SubBackward0>)
    """
    particles = [_particle(elbo.alpha, *pair) for pair in elbo._get_traces(model, guide, args, kwargs)]
    is_in_one_run = elbo.vectorize_particles and elbo.num_particles > 1
    log_weights, surrogates = (
        parts[0] if is_in_one_run else torch.stack(torch.broadcast_tensors(*parts)) for parts in zip(*particles, strict=True)
    )
    exponents = (1 - elbo.alpha) * log_weights.detach()
    bound = (exponents.logsumexp(0) - math.log(elbo.num_particles)).sum() / (1 - elbo.alpha)
    surrogate = (exponents.softmax(0) * surrogates).sum()
    return surrogate.detach() - surrogate - bound


def _particle(alpha: float, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """Return the log weights of a run, and what has the derivative of the surrogates, with the dimensions of shared plates."""
    dims = get_dependent_plate_dims(model_trace.nodes.values())
    log_weight = surrogate = torch.zeros(())
    for site in sample_sites(model_trace).values():
        log_p = torch_sum(site["log_prob"], dims)
        log_weight, surrogate = log_weight + log_p, surrogate + log_p
    for name, site in sample_sites(guide_trace).items():
        log_q = torch_sum(site["log_prob"], dims)
        log_weight = log_weight - log_q
        _, score_function, entropy = site["score_parts"]
        is_scored = not is_identically_zero(score_function)
        if is_scored and not is_identically_zero(entropy):
            raise NotImplementedError(
                f"RenyiELBO has no gradient for site {name!r}, whose samples are reparametrised in part. Use Trace_ELBO."
            )
        if is_scored:
            surrogate = surrogate + alpha / (1 - alpha) * log_q
        elif not is_identically_zero(entropy):
            surrogate = surrogate - log_q
    return log_weight, surrogate
