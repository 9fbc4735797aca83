"""A fit as a checksum of its parameters, by which a run that is resumed knows it again."""

from __future__ import annotations

__all__ = ["fit_digest"]

from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_genmodels._pyro.modules import reachable_modules


def fit_digest(parts: Iterable[Any], run: Callable[[], Any] | None = None, tensors: Iterable[Tensor] = ()) -> str:
    """Return a checksum of the parameters of a fit, whatever their names and order.

    Buffers are left out: log Z of an energy, for example, is put into one when it is first estimated.

    Args:
        parts: model, guide and the like, whose modules are searched for.
        run: function that runs them, to find the parameters of Pyro's store that they read.
        tensors: other tensors that the fit consists of, such as draws.

    Example:
        >>> a, b = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> fit_digest([a]) == fit_digest([a]), fit_digest([a]) == fit_digest([b])
        (True, False)
    """
    found = {id(p): p.detach() for module in reachable_modules(*parts) for p in module.parameters(recurse=False)}
    if run is not None:
        with poutine.trace(param_only=True) as capture:
            run()
        values: list[Any] = [site["value"] for site in capture.trace.nodes.values() if site["type"] == "param"]
        found |= {id(value): value.detach() for value in values}
    digests = {_digest(t) for t in found.values()} | {_digest(t) for t in tensors}
    return sha256("".join(sorted(digests)).encode()).hexdigest()


def _digest(t: Tensor) -> str:
    """Return a checksum of a tensor's shape, data type and values."""
    raw = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return sha256(f"{tuple(t.shape)} {t.dtype}".encode() + raw.tobytes()).hexdigest()
