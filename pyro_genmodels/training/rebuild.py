"""Families as data: their classes and arguments as JSON, and back, built from the classes of `pyro_genmodels.families` alone.

A description may come from anywhere. A family that is built from it may take little more memory than the tensors beside it.
"""

from __future__ import annotations

__all__ = ["brief", "decode_tensor", "describe", "encode_tensor", "rebuild"]

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels import families
from pyro_genmodels.families import Family, Labels, circular
from pyro_genmodels.training.allocation import LimitError, limited
from pyro_genmodels.utils.errors import one_line, unknown_name

DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.bool)
}
"""Data types of tensors that a record may hold as lists."""
MAX_RECORD_TENSOR_SIZE = 10_000
"""Largest number of elements of a tensor that a record may hold as a list."""
MAX_INTEGER = 2**20
"""Largest size of an integer in the arguments of a family that is rebuilt, unless the file has as many numbers."""
REBUILD_BYTES = 2**20, 64
"""Bytes that the constructor of a family may take: in any case, and for each byte of its tensors. Families take 2 to 6."""
REBUILD_OPERATIONS = 1000, 100
"""Calls of torch's functions that it may make: in any case, and for each of its tensors. Families make 2 to 10."""

_PARTS = {name: getattr(families, name) for name in families.__all__ if name not in ("Family", "circular")}
_CONSTRAINTS: dict[str, Any] = {
    "real": lambda: constraints.real,
    "circular": lambda: circular,
    "boolean": lambda: constraints.boolean,
    "interval": constraints.interval,
    "half_open_interval": constraints.half_open_interval,
    "greater_than": constraints.greater_than,
    "greater_than_eq": constraints.greater_than_eq,
    "less_than": constraints.less_than,
    "integer_interval": constraints.integer_interval,
}


def describe(family: Any) -> dict[str, Any]:
    """Return a family's class and arguments as JSON, or its class and the arguments that JSON cannot express."""
    if not isinstance(family, Family):
        return {"class": type(family).__name__}
    description: dict[str, Any] = {"class": type(family).__name__}
    own: list[str] = []
    arguments = {n: _encode(v, n, own) for n, v in family.arguments.items() if n != "name"}
    if type(family) not in _PARTS.values():
        own.append(f"the class {type(family).__name__}")
    return description | ({"own": own} if own else {"arguments": arguments})


def rebuild(record: Mapping[str, Any], path: str | Path, state: Mapping[str, Tensor]) -> Family:
    """Return the untrained family that a record describes.

    Args:
        record: the record.
        path: path of the file, for messages.
        state: the tensors in the file, which limit what building may take.

    Raises:
        ValueError: if it cannot be built from parts of this package, or is far larger than the tensors.
    """
    if "options" in record:
        name = Path(path).name.removesuffix(".safetensors").removesuffix(".training")
        raise ValueError(f"{path} is a run to resume training from. The parameters are in {name}.safetensors beside it.")
    kind = one_line(record.get("class", "model"), 50)
    if own := record.get("own"):
        parts = one_line(", ".join(own))
        raise ValueError(
            f"{path} holds a {kind} with parts of your own ({parts}), which a checkpoint cannot rebuild. Build the family with "
            "the same arguments and load it by checkpoints.load(path, family)."
        )
    if "arguments" not in record:
        raise ValueError(
            f"{path} holds the parameters of a {kind} that is no family of pyro_genmodels: read them by checkpoints.read and "
            "pass them to load_state_dict."
        )
    held = sum(t.nbytes for t in state.values())
    (least_bytes, per_byte), (least, per_tensor) = REBUILD_BYTES, REBUILD_OPERATIONS
    largest = max(MAX_INTEGER, sum(t.numel() for t in state.values()))
    try:
        with limited(max_bytes=least_bytes + per_byte * held, max_operations=least + per_tensor * len(state)):
            family = _decode({"class": record.get("class"), "arguments": record["arguments"]}, largest)
    except LimitError as error:
        raise ValueError(
            f"{path} describes a {kind} far larger than its {len(state)} tensors of {held:,} bytes: {error} to build. If you "
            "trust it, build the family yourself and load it by checkpoints.load(path, family)."
        ) from error
    except Exception as error:  # any error that wrong arguments may cause
        raise ValueError(f"{path} describes a {kind} that this version cannot build: {brief(error)}.") from error
    if not isinstance(family, Family):
        raise ValueError(f"{path} holds a {kind}, which is no family.")
    return family


def _encode(value: Any, where: str, own: list[str]) -> Any:
    """Return an argument as JSON. If that is impossible, append its name to `own`.

    Args:
        value: the argument.
        where: its name.
        own: names of the arguments that JSON cannot express.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Integral, Real)):  # numbers of numpy
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Sequence):
        return [_encode(v, where, own) for v in value]
    if isinstance(value, Tensor) and value.numel() <= MAX_RECORD_TENSOR_SIZE:
        return encode_tensor(value)
    if isinstance(value, Labels):
        return {"class": "Labels", "arguments": {"num_classes": value.num_classes}}
    if isinstance(value, Family):
        inner = describe(value)
        own.extend(f"{where}: {part}" for part in inner.get("own", ()))
        return inner
    if is_dataclass(value) and type(value) in _PARTS.values():
        arguments = {
            f.name: _encode(getattr(value, f.name), where, own)
            for f in fields(value)
            if f.init and f.metadata.get("saved", True)
        }
        return {"class": type(value).__name__, "arguments": arguments}
    if isinstance(value, constraints.Constraint):
        if value is constraints.real or isinstance(value, type(circular)):
            return {"constraint": "real" if value is constraints.real else "circular"}
        if isinstance(value, (constraints.stack, constraints.cat)):
            lengths = {"lengths": list(value.lengths)} if isinstance(value, constraints.cat) else {}
            return {"parts": [_encode(part, where, own) for part in value.cseq], "dim": value.dim, **lengths}
        name = type(value).__name__.strip("_").lower()
        for known, snake in ((k, k.replace("_", "")) for k in _CONSTRAINTS):
            bounds = [getattr(value, b) for b in ("lower_bound", "upper_bound") if hasattr(value, b)]
            if snake == name and all(isinstance(b, (int, float)) or b.dim() == 0 for b in bounds):
                return {"constraint": known, "bounds": [float(b) if known != "integer_interval" else int(b) for b in bounds]}
    own.append(f"{where}: {type(value).__name__}")
    return None


def _decode(value: Any, largest: int) -> Any:
    """Return the value that `_encode` encoded, built from classes of this package. Integers may be as large as `largest`."""
    if isinstance(value, list):
        return [_decode(v, largest) for v in value]
    if isinstance(value, int) and abs(value) > largest:
        raise LimitError(f"it takes the number {one_line(value, 30)}")
    if not isinstance(value, Mapping):
        return value
    if "tensor" in value:
        return decode_tensor(value)
    if "parts" in value:
        join = constraints.cat if "lengths" in value else constraints.stack
        parts = [_decode(part, largest) for part in value["parts"]]
        return join(parts, **{name: _decode(v, largest) for name, v in value.items() if name in ("dim", "lengths")})
    if "constraint" in value:
        if value["constraint"] not in _CONSTRAINTS:
            raise unknown_name("constraint", str(value["constraint"]), _CONSTRAINTS)
        return _CONSTRAINTS[value["constraint"]](*value.get("bounds", ()))
    if value.get("class") not in _PARTS:
        raise unknown_name("family or part of one", str(value.get("class")), _PARTS)
    return _PARTS[value["class"]](**{name: _decode(v, largest) for name, v in value["arguments"].items()})


def encode_tensor(value: Tensor) -> dict[str, Any]:
    """Return a small tensor as JSON."""
    return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}


def decode_tensor(value: Mapping[str, Any]) -> Tensor:
    """Return the tensor that `encode_tensor` encoded."""
    return torch.tensor(value["tensor"], dtype=DTYPES[value["dtype"]])


def brief(error: Exception) -> str:
    """Return the first line of an error's message, shortened."""
    return one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, 100)
