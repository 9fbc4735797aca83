r"""State of an energy between calls: chains in a replay buffer, and log Z of the parameters it was estimated for.

Both belong to the family, as buffers of a module: they are saved, moved and copied with it. An estimate of log Z holds for one
set of parameters. The cache recognises these by a copy of them, which it compares bit by bit, and after saving, copying or
moving by a *fingerprint*: a sum over their bits that is the same on every device.
"""

from __future__ import annotations

__all__ = ["LogPartition", "PartitionCache", "PartitionKind", "ReplayBuffer", "fingerprint"]

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_genmodels.samplers import Sampler

PartitionKind = Literal["exact", "estimate", "unreliable"]
_KINDS: tuple[PartitionKind, ...] = ("exact", "estimate", "unreliable")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LogPartition:
    """The logarithm of an energy's partition function, and what is known of its error.

    Attributes:
        value: log Z (nats), (), or (batch...) for a conditional energy, one per context.
        std_error: standard error of the value, of the same shape; 0 if it is exact.
        kind: "exact" (a sum or an integral), "estimate" (by annealed importance sampling, too low in expectation), or
            "unreliable" (an estimate that its diagnostics contradict).
        reverse: estimate by annealing backwards from exact samples, too high in expectation; None without such samples.
        reverse_std_error: standard error of `reverse`.
        effective_sample_size: effective sample size of the importance weights.
        num_chains: number of chains; 0 if nothing was sampled.
        num_steps: number of betas of the annealing path, or of terms of a sum or an integral.
        pareto_k: k-hat of the importance weights; above .7 the kind is "unreliable". None if nothing was sampled.
    """

    value: Tensor
    std_error: Tensor
    kind: PartitionKind
    reverse: Tensor | None = None
    reverse_std_error: Tensor | None = None
    effective_sample_size: Tensor | None = None
    num_chains: int = 0
    num_steps: int = 0
    pareto_k: Tensor | None = None

    def __str__(self) -> str:
        k = None if self.pareto_k is None else self.pareto_k[~self.pareto_k.isnan()]
        tail = "" if k is None or not k.numel() else f", Pareto k-hat {k.max():.2f}"
        if self.value.dim():
            mean = f"{self.value.mean():.3f} nats in the mean"
            return f"log Z of {tuple(self.value.shape)} contexts, {mean} ({self.kind}{tail})"
        error = "" if self.kind == "exact" else f" ± {self.std_error:.3f}"
        reverse = "" if self.reverse is None else f", backwards {self.reverse:.3f} ± {self.reverse_std_error:.3f}"
        return f"log Z = {self.value:.3f}{error} nats ({self.kind}{reverse}{tail})"


class ReplayBuffer(nn.Module):
    """Chains that continue from call to call, and the step size that their sampler was tuned to.

    Args:
        sampler: sampler that moves the chains, or None.
        positions: first content, (chains, *position).

    Attributes:
        chains: (chains, *position), or (chains, temperatures, *position).
        is_started: True once chains have been stored.
        step_size: tuned step size.
        acceptance: mean acceptance at that step size.
    """

    rank_buffers = ("chains",)
    """Buffers that differ by rank when many devices train a fit, so that there are as many times more chains."""
    changing_buffers = ("chains", "started", "step_size", "acceptance")
    """Buffers that change when samples are drawn, so that the fit is the same with others."""

    chains: Tensor
    started: Tensor
    step_size: Tensor
    acceptance: Tensor

    def __init__(self, sampler: Sampler | None, positions: Tensor) -> None:
        super().__init__()
        step_size = torch.ones(()) if sampler is None else sampler.first_step_size(positions)
        self.register_buffer("chains", positions if sampler is None else sampler.replicate(positions))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("step_size", step_size)
        self.register_buffer("acceptance", torch.zeros_like(step_size))
        self.reread()
        self.register_load_state_dict_post_hook(_reread)

    def reread(self) -> None:
        """Update the Python attributes after the buffers have changed."""
        self.is_started = bool(self.started)

    def put(self, chains: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Store chains at the given rows."""
        with torch.no_grad():
            self.chains[rows] = chains.to(self.chains)
            self.started.fill_(True)
        self.is_started = True

    def put_step_size(self, step_size: Tensor, acceptance: Tensor) -> None:
        """Store a tuned step size and its acceptance."""
        with torch.no_grad():
            self.step_size.copy_(step_size)
            self.acceptance.copy_(acceptance)

    def random(self, n: int) -> Tensor:
        """Return n random chains, with replacement."""
        return self.chains[torch.randint(len(self.chains), (n,), device=self.chains.device)]


class PartitionCache(nn.Module):
    """Log Z, and the parameters it holds for.

    `get` never returns a value for other parameters, however these were changed (in place, through ``.data``, by loading or by
    conversion): it compares all their bits with a copy made when they were last seen. Without a copy (after loading, copying or
    moving to another device) it compares fingerprints, which are slow to compute.
    """

    changing_buffers = ("values", "pareto_k", "kind_index", "fingerprint")
    """Buffers that change when log Z is estimated, so that the fit is the same with others."""

    values: Tensor
    pareto_k: Tensor
    kind_index: Tensor
    fingerprint: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(5))  # value, standard error, chains, steps, effective sample size
        self.register_buffer("pareto_k", torch.tensor(0.0))
        self.register_buffer("kind_index", torch.tensor(-1))
        self.register_buffer("fingerprint", torch.tensor(0))
        self.reread()
        self.register_load_state_dict_pre_hook(_complete_loaded)
        self.register_load_state_dict_post_hook(_reread)

    def complete_state(self, state: dict[str, Any], prefix: str) -> None:
        """Add to a `state_dict` of a version before 0.2 what it lacks: the k-hat of its log Z is not known."""
        if prefix + "values" in state and prefix + "pareto_k" not in state:
            state[prefix + "pareto_k"] = state[prefix + "values"].new_tensor(torch.nan)

    def reread(self) -> None:
        """Update the Python attributes after the buffers have changed."""
        self._kind = int(self.kind_index)
        self._snapshot: list[Tensor] | None = None

    @property
    def is_empty(self) -> bool:
        """True if no log Z is stored."""
        return self._kind < 0

    def put(self, log_partition: LogPartition, tensors: Sequence[Tensor]) -> None:
        """Store log Z for the present values of the tensors that it depends on."""
        size, k = log_partition.effective_sample_size, log_partition.pareto_k
        values = (
            log_partition.value,
            log_partition.std_error,
            log_partition.num_chains,
            log_partition.num_steps,
            0.0 if size is None else size,
        )
        with torch.no_grad():
            self.values.copy_(torch.stack([torch.as_tensor(v).to(self.values) for v in values]))
            self.pareto_k.copy_(torch.as_tensor(0.0 if k is None else k))
            self.fingerprint.copy_(fingerprint(tensors))
            self._set_kind(_KINDS.index(log_partition.kind))
        self._snapshot = _copies(tensors)

    def get(self, tensors: Sequence[Tensor]) -> LogPartition | None:
        """Return log Z if it holds for the present values of these tensors; otherwise clear the cache and return None."""
        if self.is_empty:
            return None
        if not self._matches(tensors):
            self._set_kind(-1)
            self._snapshot = None
            return None
        value, error, chains, steps, size = self.values.clone().unbind()
        return LogPartition(
            value,
            error,
            _KINDS[self._kind],
            effective_sample_size=size if size else None,
            num_chains=int(chains),
            num_steps=int(steps),
            pareto_k=self.pareto_k.clone() if chains else None,
        )

    def _set_kind(self, index: int) -> None:
        with torch.no_grad():
            self.kind_index.fill_(index)
        self._kind = index

    def _matches(self, tensors: Sequence[Tensor]) -> bool:
        if self._snapshot is not None and list(map(_form, self._snapshot)) == list(map(_form, tensors)):
            return all(torch.equal(_bits(a), _bits(b)) for a, b in zip(self._snapshot, tensors, strict=True))
        matches = torch.equal(self.fingerprint, fingerprint(tensors).to(self.fingerprint))
        if matches:
            self._snapshot = _copies(tensors)
        return matches

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copying and pickling, without the copy of the parameters."""
        return {**self.__dict__, "_snapshot": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled cache; one of a version before 0.2 has no k-hat."""
        super().__setstate__(state)
        if "pareto_k" not in self._buffers:
            self.register_buffer("pareto_k", self.values.new_tensor(torch.nan))


def _complete_loaded(module: PartitionCache, state: dict[str, Any], prefix: str, *_: Any) -> None:
    module.complete_state(state, prefix)


def _reread(module: ReplayBuffer | PartitionCache, _: Any) -> None:
    module.reread()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(_BITS[tensor.element_size()])


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """Return a sum over the bits of tensors, each mixed with its place, modulo 2^64."""
    total = torch.tensor(0)
    for i, t in enumerate(tensors):
        bits = _bits(t.contiguous().reshape(-1)).to(torch.int64)
        places = torch.arange(len(bits), device=bits.device) * 2 + 1
        mixed = (bits ^ (bits >> 29)) * 0x9E3779B97F4A7C1 + places  # otherwise the sign bits of two numbers would cancel
        mixed = (mixed ^ (mixed >> 31)) * places * (2 * i + 1)
        total = total + (mixed ^ (mixed >> 30)).sum().to(total.device)
    return total
