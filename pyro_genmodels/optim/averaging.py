r"""The weights of a training run: as they are, averaged, and the best so far.

The average after t + 1 steps is

.. math:: \bar\theta_t = d_t\,\bar\theta_{t-1} + (1 - d_t)\,\theta_t, \qquad
    d_t = \min\Bigl(d, \frac{1 + t}{10 + t}\Bigr), \qquad \bar\theta_0 = \theta_0,

so that early on it is of the last tenth of the steps, and does not hold on to the beginning. It is kept by torch's
`AveragedModel`. Polyak and Juditsky, *Acceleration of Stochastic Approximation by Averaging* (1992).
"""

from __future__ import annotations

__all__ = ["TrainedWeights", "moving_average"]

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class TrainedWeights:
    """The parameters under training, their moving average, and the best seen; at first, those it is given.

    Args:
        parameters: by name.
        modules: whose buffers are kept along.
        decay: of the average per step, or None for no average.
        aside: names of parameters that are not the fit's, and are not told as its state.
        others: modules that are not the fit's, whose buffers are kept along and not told either.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        modules: list[nn.Module],
        decay: float | None,
        aside: Collection[str] = (),
        others: Sequence[nn.Module] = (),
    ) -> None:
        self.names, self.modules, self.aside = list(parameters), modules, aside
        self.live = list(parameters.values())
        self.module = nn.ParameterList(self.live)  # of the same storage, also where a parameter is a plain tensor
        self.average = None if decay is None else AveragedModel(self.module, multi_avg_fn=moving_average(decay))
        self.buffers = [b for m in (*modules, *others) for b in m.buffers()]
        self.best = [t.detach().clone() for t in (*self.live, *self.buffers)]

    @property
    def finite(self) -> bool:
        """Whether every parameter is."""
        return all(p.isfinite().all() for p in self.live)

    def update(self) -> None:
        """Takes the parameters of this step into the average."""
        if self.average is not None:
            self.average.update_parameters(self.module)

    @property
    def kept(self) -> list[Tensor]:
        """What is validated and kept: the average, or the parameters."""
        return [p.detach() for p in (self.live if self.average is None else self.average.module.parameters())]

    def keep(self) -> None:
        """Makes these the best."""
        self.best = [t.clone() for t in (*self.kept, *self.buffers)]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in the place of the parameters."""
        with self._as([] if self.average is None else self.kept):
            yield

    @contextmanager
    def _as(self, values: list[Tensor]) -> Iterator[None]:
        targets = [*(p.data for p in self.live), *self.buffers]
        before = [t.clone() for t in targets[: len(values)]]
        _copy(targets, values)
        try:
            yield
        finally:
            _copy(targets, before)

    def reread(self) -> None:
        """Has modules that keep in Python what their buffers say read it again, after buffers have been changed here."""
        for part in (part for module in self.modules for part in module.modules() if hasattr(part, "reread")):
            part.reread()  # type: ignore[operator]

    def best_state(self) -> dict[str, Tensor]:
        """The best parameters and buffers, by their names in the fit's modules, or else in Pyro's param store."""
        with self._as(self.best):
            owned = {id(p) for m in self.modules for p in m.parameters()}
            state = {
                name: p for name, p in zip(self.names, self.live, strict=True) if id(p) not in owned and name not in self.aside
            }
            for i, module in enumerate(self.modules):
                prefix = f"{getattr(module, 'name', None) or i}." if len(self.modules) > 1 else ""
                state |= {prefix + name: t for name, t in module.state_dict().items()}
            return {name: t.detach().clone().contiguous() for name, t in state.items()}

    def restore(self) -> None:
        """Puts the best in the place of the parameters."""
        _copy([*(p.data for p in self.live), *self.buffers], self.best)
        self.reread()


def moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """How `AveragedModel(network, multi_avg_fn=moving_average(0.999))` averages, from the first step on.

    Args:
        decay: of the average per step, once it is under way.

    Raises:
        ValueError: for a decay that is not at least 0 and less than 1.

    Example:
        >>> average = [torch.tensor([0.0])]
        >>> moving_average(0.9)(average, [torch.tensor([1.0])], 1)  # the second step: 2/11 of the old
        >>> average
        [tensor([0.8182])]
    """
    if not 0 <= decay < 1:
        raise ValueError(f"An average of weights wants a decay such as 0.999, at least 0 and less than 1, but found {decay!r}.")

    @torch.no_grad()
    def average(averages: Sequence[Tensor], parameters: Sequence[Tensor], steps: Tensor | int) -> None:
        t = int(steps)
        torch._foreach_lerp_(list(averages), list(parameters), 1 - min(decay, (1 + t) / (10 + t)))

    return average


def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=False):
            target.copy_(value)
