"""A watch over the operations of a run: what they would change is put back, and what a graph cannot hold is refused."""

from __future__ import annotations

__all__ = ["CaptureError", "Recorder", "put_back"]

import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pyro_genmodels.utils.rng import forked_rng

aten = torch.ops.aten

INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
"""Operations whose result has a shape that depends on values only if an index is a mask."""

LIBRARIES = tuple(f"{sysconfig.get_paths()[name]}/" for name in ("purelib", "platlib", "stdlib"))


BATCH_NORMS = (aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default)
"""Operations that change the running statistics among their arguments, though their schemas do not say so."""


class CaptureError(RuntimeError):
    """Error of a program that cannot be captured as one graph. Its message names the cause, the site and the line."""


class Recorder(TorchDispatchMode):
    """A dispatch mode around one run of a function.

    Tensors are called constant here if they are made inside of the run from no input and no random number, such as
    ``torch.ones(3).tril()``. Their values may be read.

    Args:
        refuse: True to raise a `CaptureError` at operations whose result has a shape, or a number, that depends on values.
    """

    def __init__(self, *, refuse: bool) -> None:
        super().__init__()
        self.refuse = refuse
        self.sites = _LastSite()
        self._made: set[int] = set()
        self._constant: dict[int, Tensor] = {}
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        constant = self._is_constant(func, tensors)
        if self.refuse:
            if constant and torch.Tag.data_dependent_output in func.tags:
                with disable_proxy_modes_tracing():
                    return func(*args, **kwargs)
            args = self._without_masks(func, args)
            depends = torch.Tag.dynamic_output_shape in func.tags and func.overloadpacket not in INDEXING
            if depends and not constant:
                raise self.error(f"the shape of the result of {_name(func)} depends on values")
            if torch.Tag.data_dependent_output in func.tags:
                raise self.error("Python code reads the value of a tensor, as by `if x > 0`, int(x) or x.item()")
        written = self._written(func, args, kwargs)
        for x in written:
            self._keep(x)
        result = func(*args, **kwargs)
        inputs = set(map(_storage, tensors))
        for x in tree_iter(result):
            if isinstance(x, Tensor) and _storage(x) not in inputs:
                self._made.add(_storage(x))
                if constant:
                    self._constant[_storage(x)] = x
        if not constant:
            for x in written:
                self._constant.pop(_storage(x), None)
        return result

    def is_constant(self, x: Tensor) -> bool:
        """Return True if the values of a tensor are the same in every run."""
        return _storage(x) in self._constant

    def _is_constant(self, func: Any, tensors: list[Tensor]) -> bool:
        """Return True if the result of an operation is the same in every run."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        fresh = func in (aten.lift_fresh.default, aten.lift_fresh_copy.default)  # torch.tensor(...) of Python numbers
        return fresh or all(_storage(x) in self._constant for x in tensors)

    def _written(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the tensors that an operation writes to."""
        if func in BATCH_NORMS:
            return [x for x in args[3:5] if isinstance(x, Tensor) and args[5]]
        if not func._schema.is_mutable:
            return []
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        written = [named.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return [x for x in tree_iter(written) if isinstance(x, Tensor)]

    def _keep(self, x: Tensor) -> None:
        """Remember the value of a tensor that was not made inside of the run, before it is written to for the first time."""
        key = _storage(x)
        if key not in self._made and key not in self._originals:
            with disable_proxy_modes_tracing():
                whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
                self._originals[key] = whole, whole.clone()

    @property
    def written(self) -> tuple[Tensor, ...]:
        """Tensors, flat, that the run has changed and not made."""
        return tuple(whole for whole, _ in self._originals.values())

    def restore(self) -> None:
        """Put back the values of all tensors that the run has changed and not made."""
        with torch.no_grad():
            for whole, original in self._originals.values():
                whole.copy_(original)

    def _without_masks(self, func: Any, args: Any) -> Any:
        """Return arguments in which masks that are constant are replaced by integer indices, and refuse other masks."""
        if func.overloadpacket not in INDEXING:
            return args
        indices: list[Any] = []
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                if func.overloadpacket is not aten.index and args[2].numel() == 1:
                    indices.append(index)  # x[mask] = number: the shape does not depend on the mask
                    continue
                if _storage(index) not in self._constant:
                    raise self.error("a mask selects entries, so that their number depends on values")
                with disable_proxy_modes_tracing():
                    indices += index.nonzero().unbind(1)
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    def error(self, cause: str) -> CaptureError:
        """Return an error with the site and the line of the program that runs now."""
        return CaptureError(f"{cause}{self.where(traceback.extract_stack())}")

    def where(self, stack: Any) -> str:
        """Return a text about the site that was sampled last and the line of the user's code."""
        frames = [f for f in stack if not f.filename.startswith((*LIBRARIES, "<")) and "/pyro_genmodels/" not in f.filename]
        line = f', in line {frames[-1].lineno} of {frames[-1].filename}: "{frames[-1].line}"' if frames else ""
        return f" (after the site {self.sites.name!r}{line})" if self.sites.name else f" (before any site{line})"


class RefusedReads(TorchFunctionMode):
    """A mode that refuses reads of values past torch's operations, such as `x.numpy()`, unless the tensor is constant.

    Args:
        recorder: recorder of the run.
    """

    READS = (Tensor.numpy, Tensor.__array__, Tensor.tolist)

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS and not self.recorder.is_constant(args[0]):
            raise self.recorder.error("Python code reads the values of a tensor, as by x.numpy() or x.tolist()")
        return func(*args, **(kwargs or {}))


class _LastSite(Messenger):
    """Handler that remembers the name of the last sample site."""

    name: str | None = None

    def _pyro_post_sample(self, msg: Any) -> None:
        self.name = msg["name"]


@contextmanager
def put_back(*, refuse: bool = False) -> Iterator[Recorder]:
    """Run code without a lasting effect on tensors that exist already, or on the random number generators.

    Args:
        refuse: see `Recorder`.
    """
    recorder = Recorder(refuse=refuse)
    with forked_rng():
        try:
            with recorder:
                yield recorder
        finally:
            recorder.restore()


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _name(func: Callable[..., Any]) -> str:
    return str(func).removeprefix("aten.").split(".")[0]
