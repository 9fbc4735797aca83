r"""What an energy remembers from one call to the next: where its chains are, and log Z of the parameters it had.

Both belong to the family, as buffers: they are saved, moved and copied with it. An estimate of log Z holds for the parameters
it was made with and no others; it is known by their *fingerprint*, a sum over their bits, the same on every device.
"""

from __future__ import annotations

__all__ = ["LogPartition", "Memory", "PartitionKind", "fingerprint"]

from collections.abc import Iterable
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
    """The logarithm of an energy's partition function, and what is known of it.

    Attributes:
        value: log Z (nats), (); or (batch...) of a conditional energy, one for each context.
        std_error: its standard error, of the same shape; 0 where it is exact.
        kind: "exact" (a sum or an integral over all there is); "estimate" (of annealed importance sampling, too low in
            expectation); "unreliable" (an estimate that other signs speak against).
        reverse: where draws of the model itself could be had, the estimate of annealing backwards, too high in expectation.
        reverse_std_error: its standard error.
        effective_sample_size: of the weights; of as many chains as this, had they equal weights.
        num_chains: behind the estimate; 0 where nothing was drawn.
        num_steps: betas of the path; or points of a sum or an integral.
    """

    value: Tensor
    std_error: Tensor
    kind: PartitionKind
    reverse: Tensor | None = None
    reverse_std_error: Tensor | None = None
    effective_sample_size: Tensor | None = None
    num_chains: int = 0
    num_steps: int = 0

    def __str__(self) -> str:
        if self.value.dim():
            return f"log Z of {tuple(self.value.shape)} contexts, {self.value.mean():.3f} in the mean ({self.kind})"
        error = "" if self.kind == "exact" else f" ± {self.std_error:.3f}"
        reverse = "" if self.reverse is None else f", backwards {self.reverse:.3f} ± {self.reverse_std_error:.3f}"
        return f"log Z = {self.value:.3f}{error} nats ({self.kind}{reverse})"


class Memory(nn.Module):
    """Chains and log Z, as buffers.

    Args:
        sampler: that moves the chains, or None.
        like: as many positions as chains are to be kept, (chains, *position).
    """

    chains: Tensor
    begun: Tensor
    step_size: Tensor
    acceptance: Tensor
    log_z: Tensor
    log_z_kind: Tensor
    log_z_of: Tensor

    def __init__(self, sampler: Sampler | None, like: Tensor) -> None:
        super().__init__()
        step_size = torch.ones(()) if sampler is None else sampler.first_step_size(like)
        self.register_buffer("chains", like if sampler is None else sampler.replicate(like))
        self.register_buffer("begun", torch.tensor(False))
        self.register_buffer("step_size", step_size)
        self.register_buffer("acceptance", torch.zeros_like(step_size))
        self.register_buffer("log_z", torch.zeros(5))  # value, error, chains, steps, effective size
        self.register_buffer("log_z_kind", torch.tensor(-1))
        self.register_buffer("log_z_of", torch.tensor(0))
        self.reread()
        self.register_load_state_dict_post_hook(_reread)

    def reread(self) -> None:
        """Reads what Python branches on from the buffers, after others have changed these."""
        self.has_begun, self.kind = bool(self.begun), int(self.log_z_kind)

    def put_chains(self, chains: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """Puts chains at rows of those that are kept."""
        with torch.no_grad():
            self.chains[rows] = chains.to(self.chains)
            self.begun.fill_(True)
        self.has_begun = True

    def put_step_size(self, step_size: Tensor, acceptance: Tensor) -> None:
        """Keeps what the sampler was tuned to, and the share of proposals it accepted."""
        with torch.no_grad():
            self.step_size.copy_(step_size)
            self.acceptance.copy_(acceptance)

    def put_log_partition(self, found: LogPartition, of: Tensor) -> None:
        """Keeps log Z for the parameters of that fingerprint."""
        size = 0.0 if found.effective_sample_size is None else found.effective_sample_size
        with torch.no_grad():
            known = (found.value, found.std_error, found.num_chains, found.num_steps, size)
            self.log_z.copy_(torch.stack([torch.as_tensor(v).to(self.log_z) for v in known]))
            self.log_z_kind.fill_(_KINDS.index(found.kind))
            self.log_z_of.copy_(of)
        self.kind = _KINDS.index(found.kind)

    def log_partition(self, of: Tensor) -> LogPartition | None:
        """What is known of log Z for the parameters of that fingerprint; what was known for others is dropped."""
        if self.kind < 0:
            return None
        if not torch.equal(self.log_z_of, of.to(self.log_z_of)):
            self.log_z_kind.fill_(-1)
            self.kind = -1
            return None
        value, error, chains, steps, size = self.log_z.clone().unbind()
        return LogPartition(
            value,
            error,
            _KINDS[self.kind],
            effective_sample_size=size if size else None,
            num_chains=int(chains),
            num_steps=int(steps),
        )


def _reread(memory: Memory, _: Any) -> None:
    memory.reread()


def fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """A sum over the bits of tensors, each mixed with its place, modulo 2^64."""
    total = torch.tensor(0)
    for i, t in enumerate(tensors):
        bits = t.detach().contiguous().reshape(-1).view(_BITS[t.element_size()]).to(torch.int64)
        places = torch.arange(len(bits), device=bits.device) * 2 + 1
        mixed = (bits ^ (bits >> 29)) * 0x9E3779B97F4A7C1 + places  # or the sign bits of two numbers would cancel
        mixed = (mixed ^ (mixed >> 31)) * places * (2 * i + 1)
        total = total + (mixed ^ (mixed >> 30)).sum().to(total.device)
    return total
