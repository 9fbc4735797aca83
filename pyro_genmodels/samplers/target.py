r"""What samplers are given: an unnormalised density as functions, on a path from one that is easily drawn.

.. math:: f_\beta(x), \quad 0 \le \beta \le 1, \qquad f_1 \propto p, \qquad \textstyle\int f_0 = 1 .

A path is what annealing and tempering go along. Where none is given it is :math:`f_\beta = f^\beta`.
"""

from __future__ import annotations

__all__ = ["Beta", "Kind", "Target", "check_target", "value_and_score"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["real", "binary", "categorical"]
Beta = float | Tensor


@dataclass(frozen=True)
class Target:
    """An unnormalised density of chain positions.

    Attributes:
        log_prob: (x, beta) -> log f_beta(x) in nats; x (chains..., *event_shape) and beta that broadcasts with (chains...),
            also with further dimensions on its left, which the answer then has.
        event_dim: dimensions of one position.
        kind: what a position is made of: real numbers; zeros and ones; or classes, one-hot in the last dimension.
        gibbs: (x, beta) -> x after one sweep that leaves f_beta invariant and is its own reversal, or None.
        start: chain shape -> draws (*chains, *event_shape) from f_0, which is then normalised; or None.
        encode: data -> positions, which differ where data are bounded or classes.
        decode: positions -> data.
        event_shape: of one datum, where it is known.
        support: of data, where it is known.
        chains: how many it is of, where each has a context of its own.
    """

    log_prob: Callable[[Tensor, Beta], Tensor]
    event_dim: int
    kind: Kind = "real"
    gibbs: Callable[[Tensor, Beta], Tensor] | None = None
    start: Callable[[Sequence[int]], Tensor] | None = None
    encode: Callable[[Tensor], Tensor] = field(default=lambda x: x, repr=False)
    decode: Callable[[Tensor], Tensor] = field(default=lambda x: x, repr=False)
    event_shape: Sequence[int] | None = None
    support: Any = None
    chains: int | None = None


def check_target(target: Any, event_dim: int) -> Target:
    """The target itself; what offers one; or that of a plain function x -> log density (chains,), on the path of its powers."""
    if isinstance(target, Target):
        return target
    if callable(getattr(target, "target", None)):
        return target.target()
    if not callable(target):
        raise TypeError(
            "A sampler wants an unnormalised log density, x (chains, ...) -> (chains,), an energy's distribution or a Target, "
            f"but found {type(target).__name__}."
        )
    return Target(lambda x, beta: beta * target(x), event_dim)


def value_and_score(target: Target, x: Tensor, beta: Beta) -> tuple[Tensor, Tensor]:
    """Log density (chains...) and its gradient in x, both without graph.

    Raises:
        ValueError: in `torch.inference_mode`, which knows no gradients.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("Samplers follow gradients, which torch.inference_mode() rules out. Use torch.no_grad().")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_prob = target.log_prob(x, beta)
        if not log_prob.requires_grad:  # flat
            return log_prob, torch.zeros_like(x)
        (score,) = torch.autograd.grad(log_prob.sum(), x)
    return log_prob.detach(), score
