"""One rank of the table "devices" of `benchmarks/scaling.py`, which starts several on the CPU by torch.distributed.run.

Each process trains the same family by `train(..., trainer=Trainer(strategy="ddp"))` and counts the bytes of its gradients that
are averaged over the ranks, and of the other tensors that it sends. Rank 0 prints the counts of a step.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
import torch.distributed as distributed
from lightning import Callback, Trainer
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from pyro_genmodels import VAE, train

COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce")
BATCH, COLUMNS, BATCHES = 256, 16, 8


class Counts(Callback):
    """Counts of an epoch: of gradients by a hook of DistributedDataParallel, of other tensors by wrapped functions."""

    def __init__(self) -> None:
        self.gradients = self.buckets = self.others = self.calls = self.steps = 0
        self.seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        wrapped: Any = trainer.strategy.model
        if hasattr(wrapped, "register_comm_hook"):
            wrapped.register_comm_hook(None, self._hook)

    def _hook(self, state, bucket):  # type: ignore[no-untyped-def]  # torch refuses annotations that are strings
        self.gradients += bucket.buffer().nbytes
        self.buckets += 1
        return allreduce_hook(state, bucket)

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds += time.process_time() - self._start
        self.steps += 1

    def watched(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """Return a collective that notes the bytes of its tensors."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.others += sum(arg.nbytes for arg in args if isinstance(arg, torch.Tensor))
            return collective(*args, **kwargs)

        return call


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ranks, width = int(os.environ["WORLD_SIZE"]), int(sys.argv[1])
    counts = Counts()
    for name in COLLECTIVES:
        setattr(distributed, name, counts.watched(getattr(distributed, name)))
    pyro.set_rng_seed(0)
    family, x = VAE((COLUMNS,), hidden=(width, width)), torch.randn(BATCH * BATCHES, COLUMNS)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=ranks, strategy="ddp", callbacks=[counts], **options)
    train(family, x, epochs=3, batch_size=BATCH, trainer=trainer, seed=0, progress=False)
    if os.environ["RANK"] == "0":
        size, n = sum(p.nbytes for p in family.parameters()), counts.steps
        others, calls = counts.others - counts.gradients, counts.calls - counts.buckets  # the hook calls all_reduce too
        print("counts", size, *(value / n for value in (counts.gradients, counts.buckets, others, calls, counts.seconds)))


if __name__ == "__main__":
    main()
