r"""Targets of samplers: an unnormalised density as functions, on a path from one that is easy to sample.

.. math:: f_\beta(x), \quad 0 \le \beta \le 1, \qquad f_1 \propto p, \qquad \textstyle\int f_0 = 1 .

Annealing and tempering follow the path. A plain function f has the path :math:`f_\beta = f^\beta`.
"""

from __future__ import annotations

__all__ = ["Beta", "Target", "TargetData", "check_target", "value_and_score"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.samplers.spaces import Reals, Space

Beta = float | Tensor


@dataclass(frozen=True)
class TargetData:
    """The data that chain positions stand for.

    Attributes:
        event_shape: shape of one datum.
        support: support of the data, or None if it is not known.
        dtype: type of positions. None is torch's default for discrete positions, and the type of the data over real numbers.
        num_contexts: number of chains, if each has a context of its own; else None.
        inside: function that moves data from the ends of the support, where rounding may put them, to its interior.
    """

    event_shape: Sequence[int]
    support: Any = None
    dtype: torch.dtype | None = None
    num_contexts: int | None = None
    inside: Callable[[Tensor], Tensor] = lambda x: x

    def check(self, initial: Tensor) -> None:
        """Raise a ValueError if starting points have another shape or lie outside of the support."""
        if tuple(initial.shape[1:]) != tuple(self.event_shape):
            raise ValueError(f"initial wants (chains, *{tuple(self.event_shape)}), but found {tuple(initial.shape)}.")
        if self.num_contexts not in (None, len(initial)):
            raise ValueError(
                f"initial wants a starting point for each of {self.num_contexts} contexts, but found {len(initial)}."
            )
        if self.support is not None and not self.support.check(initial).all():
            raise ValueError(f"initial wants starting points within {self.support}, but some lie outside.")


@dataclass(frozen=True)
class Target:
    """An unnormalised density of chain positions.

    Attributes:
        log_prob: (x, beta) -> log f_beta(x) in nats; x (chains..., *event_shape) and beta broadcasts with (chains...). Further
            dimensions of beta on the left are dimensions of the result.
        event_dim: number of dimensions of one position.
        space: space of the positions, such as `Reals()` or `Binary()`.
        gibbs: (x, beta) -> x after one sweep that leaves f_beta invariant and is its own reversal; or None.
        start: chain shape -> samples (*chains, *event_shape) of f_0, which is then normalised; or None.
        data: data that positions stand for; None if positions are the data.
        scored: (x, beta) -> log f_beta(x) and its gradient in x, without a graph; None computes the gradient by autograd.
    """

    log_prob: Callable[[Tensor, Beta], Tensor]
    event_dim: int
    space: Space = field(default_factory=Reals)
    gibbs: Callable[[Tensor, Beta], Tensor] | None = None
    start: Callable[[Sequence[int]], Tensor] | None = None
    data: TargetData | None = None
    scored: Callable[[Tensor, Beta], tuple[Tensor, Tensor]] | None = None

    def encode(self, x: Tensor) -> Tensor:
        """Return the chain positions that stand for data x (chains..., *event_shape), or x itself if `data` is None."""
        return x if self.data is None else self.space.encode(x, self.data.dtype)

    def decode(self, u: Tensor) -> Tensor:
        """Return the data that chain positions u stand for, or u itself if `data` is None."""
        return u if self.data is None else self.data.inside(self.space.decode(u))


def check_target(target: Any, event_dim: int) -> Target:
    """Return a target as it is, that of an object with a method ``target()``, or the path of powers of a plain function.

    Args:
        target: a `Target`, an energy's distribution, or a log density x (chains, ...) -> (chains,).
        event_dim: number of dimensions of one position, used for plain functions.

    Raises:
        TypeError: for any other argument.
    """
    if isinstance(target, Target):
        return target
    if callable(getattr(target, "target", None)):
        return target.target()
    if not callable(target):
        raise TypeError(
            "A sampler wants an unnormalised log density, x (chains, ...) -> (chains,), an energy's distribution or a Target, "
            f"but found {type(target).__name__}."
        )
    return Target(lambda x, beta: target(x) if isinstance(beta, float) and beta == 1.0 else beta * target(x), event_dim)


def value_and_score(target: Target, x: Tensor, beta: Beta) -> tuple[Tensor, Tensor]:
    """Return the log density (chains...) and its gradient in x, both without a graph.

    Raises:
        ValueError: inside `torch.inference_mode`, which has no gradients.
    """
    if target.scored is not None:
        return target.scored(x, beta)
    if torch.is_inference_mode_enabled():
        raise ValueError("Samplers follow gradients, which torch.inference_mode() rules out. Use torch.no_grad().")
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_prob = target.log_prob(x, beta)
        if not log_prob.requires_grad:  # a constant density
            return log_prob, torch.zeros_like(x)
        (score,) = torch.autograd.grad(log_prob, x, torch.ones_like(log_prob))  # each chain has a log density of its own
    return log_prob.detach(), score
