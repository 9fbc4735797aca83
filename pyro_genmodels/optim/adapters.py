"""Optimisers, however they are named: by a function of the parameters, or by one of Pyro's."""

from __future__ import annotations

__all__ = ["Optim", "make_optimizer"]

from collections.abc import Callable, Iterable
from typing import Any

from pyro.optim import PyroLRScheduler, PyroOptim
from torch import nn
from torch.optim import Adam, Optimizer

Optim = Callable[[Iterable[nn.Parameter]], Optimizer] | PyroOptim | None


def make_optimizer(optim: Any, parameters: list[nn.Parameter], *, betas: tuple[float, float] = (0.9, 0.999)) -> Optimizer:
    """A torch optimiser of the parameters.

    Args:
        optim: parameters -> optimiser; or one of Pyro's; None is Adam at a step of 1e-3.
        parameters: to train.
        betas: of that Adam.

    Raises:
        TypeError: for anything else, and for those of Pyro's that cannot be one torch optimiser.
    """
    if optim is None:
        return Adam(parameters, lr=1e-3, betas=betas)
    if isinstance(optim, PyroOptim):
        if isinstance(optim, PyroLRScheduler) or callable(optim.pt_optim_args) or optim.pt_clip_args:
            raise TypeError(
                "Of Pyro's optimisers those with one set of options are taken, without schedule or clipping. "
                "Use SVI with this one, or pass a function of the parameters."
            )
        return optim.pt_optim_constructor(parameters, **optim.pt_optim_args)  # type: ignore[operator]
    if not callable(optim) or isinstance(optim, Optimizer):
        raise TypeError(
            f"optim wants a function of the parameters, such as functools.partial(torch.optim.Adam, lr=1e-3), but found a "
            f"{type(optim).__name__}."
        )
    return optim(parameters)
