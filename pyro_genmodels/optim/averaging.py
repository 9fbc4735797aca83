r"""The parameters of a training run: the current ones, their moving average, and the best so far.

The average after t + 1 steps is

.. math:: \bar\theta_t = d_t\,\bar\theta_{t-1} + (1 - d_t)\,\theta_t, \qquad
    d_t = \min\Bigl(d, \frac{1 + t}{10 + t}\Bigr), \qquad \bar\theta_0 = \theta_0,

so that early on it averages about the last tenth of the steps and forgets the initial parameters. It is computed by torch's
`AveragedModel`. Polyak and Juditsky, *Acceleration of Stochastic Approximation by Averaging* (1992).
"""

from __future__ import annotations

__all__ = ["TrainedWeights", "moving_average"]

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class TrainedWeights:
    """The current, averaged and best parameters of a training run. At first all three are the given ones.

    Args:
        parameters: trained parameters by name.
        modules: modules of the fit. Their buffers are copied with the parameters. Those that a part names in `averaged_buffers`
            are averaged like parameters, since they are learned.
        decay: decay of the average per step, or None for no average.
        excluded: names of parameters that do not belong to the fit, such as a critic's; `best_state` leaves them out.
        extra_modules: modules that do not belong to the fit. Their buffers are copied too, but are not in `best_state`.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        modules: list[nn.Module],
        decay: float | None,
        excluded: Collection[str] = (),
        extra_modules: Sequence[nn.Module] = (),
    ) -> None:
        self.names, self.modules, self.excluded = list(parameters), modules, excluded
        self.live = list(parameters.values())
        learned = [] if decay is None else _learned_buffers(modules)
        self.module = nn.ParameterList([*self.live, *learned])  # shares storage, also with plain tensors
        self.average = None if decay is None else AveragedModel(self.module, multi_avg_fn=moving_average(decay))
        self._num_averaged = len(learned)  # of the buffers, which begin with them
        others = (b for m in (*modules, *extra_modules) for b in m.buffers())
        self.buffers = [*learned, *(b for b in others if all(b is not own for own in learned))]
        self.best = [t.detach().clone() for t in (*self.live, *self.buffers)]

    @property
    def finite(self) -> bool:
        """True if every current parameter is finite."""
        return all(p.isfinite().all() for p in self.live)

    def update(self) -> None:
        """Update the average with the current parameters."""
        if self.average is not None:
            self.average.update_parameters(self.module)

    @property
    def candidate(self) -> list[Tensor]:
        """The parameters to validate and to keep if they are the best: the average if there is one, else the current ones."""
        return [p.detach() for p in (self.live if self.average is None else self.average.module.parameters())]

    def keep_best(self) -> None:
        """Copy the candidate parameters and the buffers as the best so far."""
        self.best = [t.clone() for t in (*self.candidate, *self.buffers[self._num_averaged :])]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the parameters by their average inside a `with` block."""
        with self._swapped([] if self.average is None else self.candidate):
            yield

    @contextmanager
    def _swapped(self, values: list[Tensor]) -> Iterator[None]:
        """Replace the first parameters and buffers by values inside a `with` block."""
        targets = [*(p.data for p in self.live), *self.buffers]
        before = [t.clone() for t in targets[: len(values)]]
        _copy(targets, values)
        try:
            yield
        finally:
            _copy(targets, before)

    def reread(self) -> None:
        """Call `reread` of the modules that cache values of their buffers in Python, after buffers have changed here."""
        for part in (part for module in self.modules for part in module.modules() if hasattr(part, "reread")):
            part.reread()  # type: ignore[operator]

    def best_state(self) -> dict[str, Tensor]:
        """Return the best parameters and buffers, which are not copied: later calls of `keep_best` leave them unchanged.

        Keys are the names in the fit's modules, and names in Pyro's param store for parameters outside of modules. What is
        not trained, such as a frozen parameter, is copied.
        """
        best = {_address(t): value for t, value in zip((*self.live, *self.buffers), self.best, strict=True)}
        owned = {_address(p) for m in self.modules for p in m.parameters()}
        state = {
            name: p
            for name, p in zip(self.names, self.live, strict=True)
            if _address(p) not in owned and name not in self.excluded
        }
        for i, module in enumerate(self.modules):
            prefix = f"{getattr(module, 'name', None) or i}." if len(self.modules) > 1 else ""
            state |= {prefix + name: t for name, t in module.state_dict().items()}
        kept = {name: best.get(_address(t)) for name, t in state.items()}
        return {name: t.detach().clone() if (value := kept[name]) is None else value for name, t in state.items()}

    def restore_best(self) -> None:
        """Replace the current parameters and buffers, and the average, by the best."""
        _copy([*(p.data for p in self.live), *self.buffers], self.best)
        if self.average is not None:
            _copy(list(self.average.module.parameters()), self.best)
        self.reread()


def _learned_buffers(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the buffers that parts of modules name in `averaged_buffers`."""
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    return [part.get_buffer(name) for part in parts for name in getattr(part, "averaged_buffers", ())]


def moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Return the averaging function for `AveragedModel(network, multi_avg_fn=moving_average(0.999))`.

    Args:
        decay: decay of the average per step, d in the equation above.

    Raises:
        ValueError: if the decay is not in [0, 1).

    Example:
        >>> average = [torch.tensor([0.0])]
        >>> moving_average(0.9)(average, [torch.tensor([1.0])], 1)  # second step, decay 2/11
        >>> average
        [tensor([0.8182])]
    """
    if not (isinstance(decay, Real) and 0 <= decay < 1):
        raise ValueError(f"An average of weights wants a decay such as 0.999, at least 0 and less than 1, but found {decay!r}.")

    @torch.no_grad()
    def average(averages: Sequence[Tensor], parameters: Sequence[Tensor], steps: Tensor | int) -> None:
        t = int(steps)
        get_ema_multi_avg_fn(min(decay, (1 + t) / (10 + t)))(averages, parameters, t)

    return average


def _address(t: Tensor) -> tuple[Any, ...]:
    """Return a key that two tensors share only if they are the same numbers in memory."""
    return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype


def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=False):
            target.copy_(value)
