"""A fit as a checksum of its parameters and buffers, by which a run that is resumed knows it again."""

from __future__ import annotations

__all__ = ["fit_digest"]

from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from typing import Any

from pyro import poutine
from torch import Tensor, nn

from pyro_genmodels._pyro.modules import reachable_modules
from pyro_genmodels.utils.checksums import tensor_digest


def fit_digest(parts: Iterable[Any], run: Callable[[], Any] | None = None, tensors: Iterable[Tensor] = ()) -> str:
    """Return a checksum of the parameters and buffers of a fit, whatever their names and order.

    Buffers that a module names in `changing_buffers` are left out: log Z of an energy, for example, is put into one when it is
    first estimated. What a fit is made of beside tensors, such as the solver of an ODE, is not compared.

    Args:
        parts: model, guide and the like, whose modules are searched for.
        run: function that runs them, to find the parameters of Pyro's store that they read.
        tensors: other tensors that the fit consists of, such as draws.

    Example:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> fit_digest([a]) == fit_digest([a]), fit_digest([a]) == fit_digest([b])
        (True, False)
    """
    found = {id(t): t.detach() for module in reachable_modules(*parts) for t in _own_tensors(module)}
    if run is not None:
        with poutine.trace(param_only=True) as capture:
            run()
        values: list[Any] = [site["value"] for site in capture.trace.nodes.values() if site["type"] == "param"]
        found |= {id(value): value.detach() for value in values}
    digests = {tensor_digest(t) for t in (*found.values(), *tensors)}
    return sha256("".join(sorted(digests)).encode()).hexdigest()


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a module, and its buffers that do not change when it is used; not those of its parts."""
    yield from module.parameters(recurse=False)
    changing = getattr(module, "changing_buffers", ())
    yield from (buffer for name, buffer in module.named_buffers(recurse=False) if name not in changing)
