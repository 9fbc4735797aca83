"""Blocks of code whose random numbers leave torch's random state unchanged."""

from __future__ import annotations

__all__ = ["forked_rng"]

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng(seed: int | None = None) -> Iterator[None]:
    """Restore torch's random state of the CPU and of all accelerators at the end of a block.

    `torch.random.fork_rng` by itself warns if there are several accelerators, and initialises CUDA if nothing else has.

    Args:
        seed: seed of the block; None continues from the present state.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with forked_rng(seed=1):
        ...     inside = torch.rand(())
        >>> bool(torch.rand(()) == inside), torch.initial_seed()
        (False, 0)
    """
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    module = torch.get_device_module(kind)
    is_used = accelerator is not None and getattr(module, "is_initialized", lambda: True)()
    with torch.random.fork_rng(range(module.device_count() if is_used else 0), device_type=kind):
        if seed is not None and is_used:
            torch.manual_seed(seed)
        elif seed is not None:  # `torch.manual_seed` would seed CUDA too, once it is used
            torch.default_generator.manual_seed(seed)
        yield
