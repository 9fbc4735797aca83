"""A watch over the operations of a run: what they would change is put back, and what a graph cannot hold is refused."""

from __future__ import annotations

__all__ = ["CaptureError", "FixedTensor", "Recorder", "StaleGraphError", "put_back"]

import ctypes
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_genmodels._pyro.tracing import TorchDispatchMode, disable_proxy_modes_tracing, tree_iter
from pyro_genmodels.utils.rng import forked_rng

aten = torch.ops.aten

LIFTS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
"""Operations by which `torch.tensor(...)` makes a tensor of numbers, or of an array of numpy."""

MAX_BYTES = 8_000
"""Number of bytes up to which the values of fixed tensors are compared: 1,000 numbers in float64."""

INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
"""Operations whose result has a shape that depends on values only if an index is a mask."""

LIBRARIES = (
    *(f"{sysconfig.get_paths()[name]}/" for name in ("purelib", "platlib", "stdlib")),
    f"{Path(__file__).parents[2]}/",  # this package
)
"""Folders of code that is not the user's."""


BATCH_NORMS = (aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default)
"""Operations that change the running statistics among their arguments, though their schemas do not say so."""


PLATE = str(Path("pyro", "poutine", "indep_messenger.py"))
"""File of Pyro in which a loop over a plate runs."""

WAY_OUT = "The mode Eager() runs the program as it is, without a graph."
"""Advice at the end of errors."""


class CaptureError(RuntimeError):
    """Error of a program that cannot be captured as one graph. Its message names the cause, the site and the line."""


class StaleGraphError(RuntimeError):
    """Error of a graph that no longer computes what the program computes."""


@dataclass(frozen=True)
class FixedTensor:
    """A tensor whose values Python code has read during a capture, such as lengths of sequences: they must stay what they were.

    Attributes:
        tensor: the tensor.
        version: number of times that it had been written to.
        address: address of its values.
        values: bytes of its memory, if there are few; of others only the version is known, which numpy does not advance.
    """

    tensor: Tensor
    version: int
    address: int
    values: bytes | None

    @classmethod
    def of(cls, x: Tensor) -> FixedTensor:
        return cls(x, x._version, x.data_ptr(), _bytes(x))

    def has_changed(self) -> bool:
        """Return True if the tensor has other values, or was given other memory, since."""
        if self.tensor.data_ptr() != self.address:
            return True
        return self.tensor._version != self.version if self.values is None else _bytes(self.tensor) != self.values


class Recorder(TorchDispatchMode):
    """A dispatch mode around one run of a function.

    Python code may read the values of tensors that are fixed: data, buffers and masks that were made before the run, and what
    is computed from them and from numbers alone, such as ``torch.ones(3).tril()``. Inputs, parameters, what the run writes to
    and random numbers vary from call to call, and so does all that is computed from them.

    Args:
        refuse: True to raise a `CaptureError` at operations whose result has a shape, or a number, that depends on values that
            vary.
        varying: tensors that vary, besides those that require gradients.

    Attributes:
        fixed: tensors made before the run whose values were read, so that the run would be another one with other values.
    """

    def __init__(self, *, refuse: bool, varying: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.refuse = refuse
        self.sites = _LastSite()
        self.fixed: dict[int, FixedTensor] = {}
        self._made: set[int] = set()
        self._varying = {_storage(x) for x in varying}
        self._sources: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = list(tree_iter((args, kwargs)))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if self.refuse and any(isinstance(x, torch.Generator) for x in leaves):
            raise self.error("random numbers are drawn from a generator of the program's own (generator=...)")
        if any(x.layout != torch.strided for x in tensors):
            raise self.error("a sparse tensor is used, which a graph does not hold; x.to_dense() is possible")
        sources = self._sources_of_result(func, tensors) if self.refuse else None
        if self.refuse:
            args = self._without_masks(func, args)
            reads = torch.Tag.data_dependent_output in func.tags
            has_shape = torch.Tag.dynamic_output_shape in func.tags and func.overloadpacket not in INDEXING
            if (reads or has_shape) and sources is not None:
                self._read(sources)
                with disable_proxy_modes_tracing():
                    result = func(*args, **kwargs)
                self._remember(result, tensors, sources)
                return result
            if has_shape:
                raise self.error(f"the shape of the result of {_name(func)} depends on values")
            if reads:
                raise self.error(
                    "Python code reads the value of a tensor, as by `if x > 0`, `assert x > 0`, int(x) or x.item()"
                )
        written = self._written(func, args, kwargs)
        for x in written:
            self._keep(x)
        result = func(*args, **kwargs)
        self._remember(result, tensors, sources)
        for x in written:
            self._remember_written(x, sources)
        return result

    def read(self, x: Tensor) -> bool:
        """Return True if Python code may read the values of a tensor, and remember those that must stay what they are."""
        sources = self._sources_of(x)
        self._read(sources or {})
        return sources is not None

    def _read(self, sources: dict[int, Tensor]) -> None:
        self.fixed |= {key: FixedTensor.of(x) for key, x in sources.items() if key not in self.fixed}

    def _sources_of(self, x: Tensor) -> dict[int, Tensor] | None:
        """Return the tensors, made before the run, from which a tensor was computed, by their storage; None if it varies."""
        key = _storage(x)
        if key in self._sources:
            return self._sources[key][1]
        if x.requires_grad:
            self._varying.add(key)
        if key in self._made or key in self._varying or x.is_inference():
            return None
        return {key: x}

    def _sources_of_result(self, func: Any, tensors: list[Tensor]) -> dict[int, Tensor] | None:
        """Return the tensors, made before the run, from which an operation computes its result; None if that varies."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None
        if func in LIFTS and not is_memory_of_others(tensors[0]):  # torch.tensor(...) of Python numbers
            return {}
        sources: dict[int, Tensor] = {}
        varies = False
        for x in tensors:
            found = self._sources_of(x)
            varies = varies or found is None
            sources |= found or {}
        return None if varies else sources

    def _remember(self, result: Any, tensors: list[Tensor], sources: dict[int, Tensor] | None) -> None:
        """Remember the tensors that an operation has made, and from what."""
        inputs = set(map(_storage, tensors))
        for x in tree_iter(result):
            if isinstance(x, Tensor) and _storage(x) not in inputs:
                self._made.add(_storage(x))
                self._sources.pop(_storage(x), None)  # of an earlier tensor at this address
                if sources is not None:
                    self._sources[_storage(x)] = x, sources

    def _remember_written(self, x: Tensor, sources: dict[int, Tensor] | None) -> None:
        if _storage(x) not in self._made:
            self._varying.add(_storage(x))
        self._sources.pop(_storage(x), None)
        if sources is not None and _storage(x) in self._made:
            self._sources[_storage(x)] = x, sources

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
        """Return arguments in which masks that are fixed are replaced by integer indices, and refuse other masks."""
        if func.overloadpacket not in INDEXING:
            return args
        indices: list[Any] = []
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                if func.overloadpacket is not aten.index and args[2].numel() == 1:
                    indices.append(index)  # x[mask] = number: the shape does not depend on the mask
                    continue
                if not self.read(index):
                    raise self.error("a mask selects entries, so that their number depends on values")
                with disable_proxy_modes_tracing():
                    indices += index.nonzero().unbind(1)
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    def error(self, cause: str) -> CaptureError:
        """Return an error with the site and the line of the program that runs now."""
        stack = traceback.extract_stack()
        is_loop = any(f.name == "__iter__" and f.filename.endswith(PLATE) for f in stack)
        hint = "A loop over a plate that subsamples has other sites at each run: write `with pyro.plate(...) as i`. "
        return CaptureError(f"{cause}{self.where(stack)}. {hint if is_loop else ''}{WAY_OUT}")

    def where(self, stack: Any) -> str:
        """Return a text about the site that was sampled last, and the lines of the user's code and of Pyro that run now."""
        site = f"after the site {self.sites.name!r}" if self.sites.name else "before any site"
        users = [i for i, f in enumerate(stack) if not f.filename.startswith((*LIBRARIES, "<"))]
        pyros = [i for i, f in enumerate(stack) if "/pyro/distributions/" in f.filename or "/pyro/nn/" in f.filename]
        chosen = [*users[-1:], *(i for i in pyros[-1:] if not users or i > users[-1])]
        lines = [f', in line {stack[i].lineno} of {stack[i].filename}: "{stack[i].line}"' for i in chosen]
        return f" ({site}{''.join(lines)})"


class RefusedReads(TorchFunctionMode):
    """A mode that refuses reads of values past torch's operations, such as `x.numpy()`, unless the tensor is fixed.

    Args:
        recorder: recorder of the run.
    """

    READS = (Tensor.numpy, Tensor.__array__, Tensor.tolist)
    SPLITS = (torch.tensor_split, Tensor.tensor_split)

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READS and not self.recorder.read(args[0]):
            raise self.recorder.error("Python code reads the values of a tensor, as by x.numpy() or x.tolist()")
        if func in self.SPLITS:
            others = (*args[1:], *(x for name, x in (kwargs or {}).items() if name != "input"))
            if not all(self.recorder.read(x) for x in others if isinstance(x, Tensor)):
                raise self.recorder.error("the shapes of the results of tensor_split depend on values")
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


def _bytes(x: Tensor) -> bytes | None:
    """Return the bytes of all of a tensor's memory, or None if they are many, or not the CPU's. No operation is recorded."""
    storage = x.untyped_storage()
    if x.device.type != "cpu" or storage.nbytes() > MAX_BYTES:
        return None
    return ctypes.string_at(storage.data_ptr(), storage.nbytes())


def is_memory_of_others(x: Tensor) -> bool:
    """Return True for a tensor whose memory is not torch's, such as that of an array of numpy."""
    return not x.untyped_storage().resizable()


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _name(func: Callable[..., Any]) -> str:
    return str(func).removeprefix("aten.").split(".")[0]
