"""Buffers that modules learn from batches, such as running means, made equal on all ranks of a run."""

from __future__ import annotations

__all__ = ["JointBuffers"]

from collections.abc import Sequence

import torch
from torch import nn

from pyro_genmodels.utils.ranks import Ranks


class JointBuffers:
    """The buffers of modules that agree on all ranks. A module names those that do not in `rank_buffers`, such as chains.

    Args:
        ranks: the processes of the run.
        modules: modules of the fit and its objective.
    """

    def __init__(self, ranks: Ranks, modules: Sequence[nn.Module]) -> None:
        parts = list({id(part): part for module in modules for part in module.modules()}.values())
        own = {id(part.get_buffer(name)) for part in parts for name in getattr(part, "rank_buffers", ())}
        self.ranks, self.parts = ranks, [part for part in parts if hasattr(part, "reread")]
        found = {id(b): b for part in parts for b in part.buffers(recurse=False) if ranks.size > 1 and id(b) not in own}
        self.buffers = list(found.values())
        self._before = [b.clone() for b in self.buffers]

    @torch.no_grad()
    def agree(self) -> None:
        """Replace the buffers that have changed on any rank by their means over all ranks, and integers by those of rank 0."""
        if not self.buffers:
            return
        changes = self.ranks.sum(*(float(not torch.equal(b, v)) for b, v in zip(self.buffers, self._before, strict=True)))
        places = [i for i, number in enumerate(changes) if number]
        if not places:
            return
        floats = [i for i in places if self.buffers[i].is_floating_point()]
        for i, mean in zip(floats, self.ranks.mean([self.buffers[i] for i in floats]) if floats else [], strict=True):
            self.buffers[i].copy_(mean)
        for i in places:
            if i not in floats:
                self.buffers[i].copy_(self.ranks.first(self.buffers[i]))
            self._before[i] = self.buffers[i].clone()
        for part in self.parts:
            part.reread()  # type: ignore[operator]
