"""Parameters during a run by a `lightning.Trainer`: those that are trained, and those that are frozen, unused or sharded.

Data parallelism waits for a gradient of every parameter that wants one. So parameters that the objective does not train are
frozen for the run, and those that its loss does not use get a gradient of zero.
"""

from __future__ import annotations

__all__ = ["RunParameters"]

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training.arguments import Batch
from pyro_genmodels.training.options import buffers_restored
from pyro_genmodels.training.sharding import Sharding, is_sharded
from pyro_genmodels.utils.ranks import Ranks
from pyro_genmodels.utils.rng import forked_rng


class RunParameters:
    """The parameters of a run.

    Args:
        step: the training step, whose parameters are trained.
        modules: modules of the fit and its objective.
        ranks: the processes of the run.

    Attributes:
        frozen: parameters that are not trained, and do not ask for a gradient until `release`.
        unused: trained parameters that the loss does not use.
    """

    def __init__(self, step: Any, modules: Sequence[nn.Module], ranks: Ranks) -> None:
        self.step, self.modules, self.ranks = step, modules, ranks
        trained = {id(p) for p in step.parameters.values()}
        found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad and id(p) not in trained}
        self.frozen = list(found.values())
        for p in self.frozen:
            p.requires_grad_(False)
        self.unused: list[Tensor] = []
        self._sharding: Sharding | None = None

    def find_unused(self, batch: Batch) -> None:
        """Find the parameters that the loss of some rows does not use, by a run that has no other effect."""
        with forked_rng(), buffers_restored(self.modules):
            loss = self.step.differentiable_loss(batch)
            parameters = list(self.step.parameters.values())
            grads = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else [None] * len(parameters)
        for part in (part for module in self.modules for part in module.modules() if hasattr(part, "reread")):
            part.reread()  # type: ignore[operator]
        self.unused = [p for p, grad in zip(parameters, grads, strict=True) if grad is None]

    def zero(self) -> Tensor | int:
        """Return 0, with a gradient of zero for every unused parameter."""
        return sum(0.0 * p.sum() for p in self.unused)

    def shard(self, min_parameters: int) -> None:
        """Divide large layers among the ranks; see `Sharding`.

        Raises:
            ValueError: if no layer is that large.
        """
        unused = {id(p) for p in self.unused}
        places = [name for name, p in self.step.parameters.items() if id(p) in unused]
        self._sharding = Sharding(self.modules, self.step.parameters, self.ranks, min_parameters)
        self.unused = [p for name in places if not is_sharded(p := self.step.parameters[name])]

    def split(self, optimiser: Any = None, average: Any = None) -> None:
        """Let an optimiser, or torch's `AveragedModel`, take sharded parameters apart from others."""
        if self._sharding is not None:
            if optimiser is not None:
                self._sharding.split_groups(optimiser)
            if average is not None:
                self._sharding.split_average(average)

    def whole(self, weights: TrainedWeights) -> AbstractContextManager[None]:
        """Return a block in which sharded parameters are whole."""
        return nullcontext() if self._sharding is None else self._sharding.whole(weights)

    def release(self, weights: TrainedWeights | None) -> None:
        """End the run: frozen parameters ask for gradients again, and the fit has its own layers.

        Args:
            weights: parameters of the run, whose values are put back afterwards; None if it has not begun.
        """
        if self._sharding is not None:
            self._sharding.end(weights)
        for p in self.frozen:
            p.requires_grad_(True)
