r"""Markov chains over a captured log density: the score in every step comes from a graph instead of a run of Python.

With few or small chains most of a step's time is the Python of the energy and of its gradient, and a graph makes the step twice
as fast. With many chains it is arithmetic and memory: in blocks of some thousand chains intermediate results stay in the cache.
"""

from __future__ import annotations

__all__ = ["captured_target"]

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.infer.compiled.functions import CapturedFunction, capture
from pyro_genmodels.infer.compiled.modes import Mode, check_mode
from pyro_genmodels.samplers.target import Beta, Target, check_target, value_and_score
from pyro_genmodels.utils.errors import check_positive_int

MAX_GRAPHS = 16
"""Number of graphs, one for each shape of the chains, that a target keeps."""


def captured_target(target: Any, initial: Tensor, *, block: int | None = None, mode: Mode | None = None) -> Target:
    """Return a target for `sample_chains` or `run` whose log density and score are computed by captured graphs.

    Parameters that are changed in place (trained, loaded) are seen at the next step. If tensors or modules that the log density
    reads are replaced by others, make the target anew.

    Args:
        target: log density (nats), x (chains, *event_shape) -> (chains,); an energy's distribution; or a `Target`.
        initial: starting points, (chains, *event_shape).
        block: number of chains that are computed at once; None computes all at once. The log density must then treat every
            chain alike: give no block if it holds one context per chain.
        mode: `Compiled()` or `Captured()`; by default compiled where there is a C++ compiler.

    Raises:
        TypeError: if the target, or the mode, is not one.
        ValueError: if `block` is not a positive integer, or the target has one context per chain.
        CaptureError: when chains begin, if the log density cannot be captured.

    Example:
        >>> from pyro_genmodels.infer.compiled import Captured
        >>> from pyro_genmodels.samplers import sample_chains
        >>> x = torch.randn(100, 2)
        >>> ring = captured_target(lambda x: -50 * (x.norm(dim=-1) - 1) ** 2, x, mode=Captured())
        >>> chains = sample_chains(ring, x, num_samples=100, warmup=100, progress=False)
        >>> 0.8 < chains.draws.norm(dim=-1).mean() < 1.2
        tensor(True)
    """
    check_mode("captured_target", mode)
    target = check_target(target, initial.dim() - 1)
    if block is not None:
        check_positive_int("captured_target", block=block)
        if target.data is not None and target.data.num_contexts is not None:
            raise ValueError("This target has a context for each chain, and cannot be computed in blocks: leave block out.")
    return replace(target, scored=_Scored(target, block, mode))


class _Scored:
    """The log density and score of a target, (x, beta) -> (chains...) and (chains..., *event_shape), by graphs."""

    def __init__(self, target: Target, block: int | None, mode: Mode | None) -> None:
        self.target, self.block, self.mode = target, block, mode
        self.graphs: dict[tuple[Any, ...], CapturedFunction] = {}

    def __call__(self, x: Tensor, beta: Beta) -> tuple[Tensor, Tensor]:
        beta = torch.as_tensor(beta, dtype=x.dtype, device=x.device)
        if self.block is None or beta.dim() or len(x) <= self.block:
            return self._at_once(x, beta)
        parts = [self._at_once(part, beta) for part in x.split(self.block)]
        return torch.cat([log_prob for log_prob, _ in parts]), torch.cat([score for _, score in parts])

    def _at_once(self, x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        key = (x.shape, x.dtype, x.device, beta.shape)
        if key not in self.graphs:
            if len(self.graphs) >= MAX_GRAPHS:
                self.graphs.pop(next(iter(self.graphs)))
            self.graphs[key] = capture(partial(value_and_score, self.target), x, beta, mode=self.mode)
        log_prob, score = self.graphs[key](x, beta)
        return log_prob, score
