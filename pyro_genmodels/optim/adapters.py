"""Torch optimisers, built from a function of the parameters or from an optimiser of Pyro."""

from __future__ import annotations

__all__ = ["Optim", "make_optimizer"]

from collections.abc import Callable, Iterable
from typing import Any

from pyro.optim import PyroLRScheduler, PyroOptim
from torch import nn
from torch.optim import Adam, Optimizer

Optim = Callable[[Iterable[nn.Parameter]], Optimizer] | PyroOptim | None
"""Function from parameters to a torch optimiser, an optimiser of Pyro, or None for Adam."""


def make_optimizer(optim: Any, parameters: list[nn.Parameter], *, betas: tuple[float, float] = (0.9, 0.999)) -> Optimizer:
    """Return a torch optimiser of the parameters.

    Args:
        optim: function from parameters to a torch optimiser, or an optimiser of Pyro. None is Adam(lr=1e-3).
        parameters: parameters to train.
        betas: betas of that default Adam.

    Raises:
        TypeError: if `optim` is or returns anything else, or is an optimiser of Pyro with a schedule, clipping, or options per
            parameter.

    Example:
        >>> make_optimizer(None, list(nn.Linear(2, 1).parameters())).defaults["lr"]
        0.001
    """
    if optim is None:
        return Adam(parameters, lr=1e-3, betas=betas)
    if isinstance(optim, PyroOptim):
        if isinstance(optim, PyroLRScheduler) or callable(optim.pt_optim_args) or optim.pt_clip_args:
            raise TypeError(
                "optim wants an optimiser of Pyro with one set of options, without a schedule or clipping. Use SVI with this "
                "one, or pass a function of the parameters."
            )
        return optim.pt_optim_constructor(parameters, **optim.pt_optim_args)  # type: ignore[operator]
    if not callable(optim) or isinstance(optim, Optimizer):
        raise TypeError(
            f"optim wants a function of the parameters, such as functools.partial(torch.optim.Adam, lr=1e-3), but found a "
            f"{type(optim).__name__}."
        )
    optimiser = optim(parameters)
    if not isinstance(optimiser, Optimizer):
        raise TypeError(f"optim wants a function that returns a torch optimiser, but it returned {type(optimiser).__name__}.")
    return optimiser
