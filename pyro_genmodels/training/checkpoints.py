r"""What training leaves on disk: tensors as safetensors, the record of how they came about as JSON in their header.

A checkpoint holds no code, and reading one runs none: a family is described by the names and arguments of its parts, and built
again from those of `pyro_genmodels.families` alone. The file is written whole or not at all, and a checksum over record and
tensors tells damage from change. The JSON beside it is a copy for human eyes.
"""

from __future__ import annotations

__all__ = ["FORMAT", "describe", "load", "read", "rebuild", "save", "write"]

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels import __version__, families
from pyro_genmodels.families import Family, Labels
from pyro_genmodels.utils.errors import import_extra, unknown_name
from pyro_genmodels.utils.files import atomic_write

FORMAT = 1
"""Of the record. A reader refuses what is newer."""

DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.bool)
}
"""Types of tensors that are told as lists."""

_PARTS = {name: getattr(families, name) for name in families.__all__ if name != "Family"}
_CONSTRAINTS: dict[str, Any] = {
    "real": lambda: constraints.real,
    "boolean": lambda: constraints.boolean,
    "interval": constraints.interval,
    "half_open_interval": constraints.half_open_interval,
    "greater_than": constraints.greater_than,
    "greater_than_eq": constraints.greater_than_eq,
    "less_than": constraints.less_than,
    "integer_interval": constraints.integer_interval,
}


def save(path: str | Path, family: Family, **record: Any) -> Path:
    """Writes a family to ``path.safetensors``.

    Args:
        path: with or without that suffix; its folder is made.
        family: what to save.
        record: what else JSON can say, under names of your own.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the record has names that a checkpoint uses itself.
        ImportError: without safetensors.
        OSError: if it cannot be written; an older file then stays as it was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from pyro_genmodels import Flow, NSF
        >>> from pyro_genmodels.training import checkpoints
        >>> with TemporaryDirectory() as folder:
        ...     path = checkpoints.save(f"{folder}/flow", Flow((2,), transform=NSF(transforms=2)))
        ...     checkpoints.load(path)().sample((5,)).shape
        torch.Size([5, 2])
    """
    if reserved := {"format", "pyro_genmodels", "class", "arguments", "own", "options"} & set(record):
        raise ValueError(f"A record cannot have {', '.join(map(repr, sorted(reserved)))}, which a checkpoint says of itself.")
    return write(path, {name: t.detach().clone() for name, t in family.state_dict().items()}, {**record, **describe(family)})


def load(path: str | Path, family: Family | None = None) -> Family:
    """The family of a checkpoint, of `save` or of ``train(..., checkpoint=...)``, in evaluation mode.

    Args:
        path: with or without its suffix.
        family: to load the parameters into, if it was built with networks of your own, which a checkpoint cannot hold.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, not of this package, of a newer version, of another family, or if it has parts that
            only you can build.
    """
    state, record = read(path)
    if family is None:
        family = rebuild(record, path)
    elif record.get("class") not in (None, type(family).__name__):
        raise ValueError(f"{path} holds a {record['class']}, but was to be loaded into a {type(family).__name__}.")
    own = family.state_dict()
    if set(own) != set(state) or any(own[name].shape != state[name].shape for name in own):
        wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
        raise ValueError(
            f"The parameters in {path} are not those of this {type(family).__name__}: {len(wrong)} differ in name or shape, "
            f"first {wrong[0]!r}. Build the family with the arguments it was saved with."
        )
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        family.to(dtypes.pop())
    family.load_state_dict(state)
    return family.eval()


# Files.


def write(path: str | Path, state: Mapping[str, Tensor], record: Mapping[str, Any], *, readable: bool = True) -> Path:
    """Writes tensors and a record to ``path.safetensors``, and if it is to be readable, the record to ``path.json``.

    Returns:
        The path of the tensors.

    Raises:
        ImportError: without safetensors.
        OSError: if they cannot be written.
    """
    target = tensors_of(path)
    tensors = {name: t.contiguous().cpu() for name, t in state.items()}
    full = {"format": FORMAT, "pyro_genmodels": __version__, **record}
    text = json.dumps(full)
    with atomic_write(target) as part:
        metadata = {"pyro_genmodels": text, "sha256": _digest(tensors, text)}
        try:
            _safetensors(".torch").save_file(tensors, part, metadata=metadata)
        except _safetensors().SafetensorError as error:
            raise OSError(f"{target} cannot be written: {_brief(error)}") from error
    if readable:
        with atomic_write(target.with_suffix(".json")) as part:
            part.write_text(json.dumps(full, indent=1) + "\n")
    return target


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a checkpoint, which is read without running anything in it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no checkpoint of this package, damaged, or of a newer version.
        ImportError: without safetensors.
    """
    _safetensors()
    given, path = Path(path), tensors_of(path)
    if not path.is_file() and given.is_file():
        path = given
    if not path.is_file():
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.safetensors") if ".training" not in p.name)[:5])
        raise FileNotFoundError(f"There is no checkpoint {path}." + (f" Its folder has {near}." if near else ""))
    raw = path.read_bytes()
    try:
        state = _safetensors(".torch").load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        metadata = header.get("__metadata__") or {}
    except _safetensors().SafetensorError as error:
        raise ValueError(
            f"{path} is no checkpoint, or is damaged: it cannot be read as safetensors ({_brief(error)})."
        ) from error
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:  # of types torch does not know
        raise ValueError(f"{path} is damaged: its tensors cannot be read ({_brief(error)}).") from error
    if "pyro_genmodels" not in metadata:
        raise ValueError(
            f"{path} is not a checkpoint of pyro_genmodels: its header has no record. Tensors of others can be read by "
            "safetensors.torch.load_file and given to a family's load_state_dict."
        )
    text = metadata["pyro_genmodels"]
    if metadata.get("sha256") != _digest(state, text):
        raise ValueError(f"{path} is damaged: its checksum is not that of its contents. Take another copy of it.")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its record is no JSON.") from error
    if not isinstance(record, dict) or not isinstance(record.get("format", 0), int):
        raise ValueError(f"{path} is damaged: its record is not one of pyro_genmodels.")
    if record.get("format", 0) > FORMAT:
        raise ValueError(
            f"{path} was written by pyro_genmodels {record.get('pyro_genmodels')} in format {record['format']}, but this "
            f"version, {__version__}, reads up to format {FORMAT}. Update pyro_genmodels."
        )
    return state, record


def tensors_of(path: str | Path) -> Path:
    """The path of a checkpoint's tensors, given with or without a suffix of its own."""
    path = Path(path)
    name = path.name.removesuffix(".safetensors").removesuffix(".json")
    if not name:
        raise ValueError(f"A checkpoint wants the name of a file, but found {str(path)!r}.")
    return path.with_name(name + ".safetensors")


def _safetensors(part: str = "") -> Any:
    return import_extra(f"safetensors{part}", extra="cli", by="A checkpoint")


def _digest(state: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, t in sorted(state.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__


# A family as data.


def describe(family: Any) -> dict[str, Any]:
    """A family's class and, where they can be told as data, its arguments; else what cannot."""
    if not isinstance(family, Family):
        return {"class": type(family).__name__}
    description: dict[str, Any] = {"class": type(family).__name__}
    own: list[str] = []
    arguments = {n: _encode(v, n, own) for n, v in family.arguments.items() if n != "name"}
    if type(family) not in _PARTS.values():
        own.append(f"the class {type(family).__name__}")
    return description | ({"own": own} if own else {"arguments": arguments})


def rebuild(record: Mapping[str, Any], path: str | Path) -> Family:
    """The untrained family that a record describes.

    Raises:
        ValueError: if it cannot be built from parts of this package.
    """
    if "options" in record:
        name = Path(path).name.removesuffix(".safetensors").removesuffix(".training")
        raise ValueError(f"{path} is what training goes on from; the parameters are in {name}.safetensors beside it.")
    kind = str(record.get("class", "model"))
    if own := record.get("own"):
        parts = ", ".join(map(str, own)) if isinstance(own, list) else str(own)
        raise ValueError(
            f"{path} holds a {kind} with parts of your own ({parts}), which only you can build. Build the family as it was and "
            "load by checkpoints.load(path, family)."
        )
    if "arguments" not in record:
        raise ValueError(
            f"{path} holds the parameters of a {kind} that is no family of pyro_genmodels: read them by checkpoints.read and "
            "load_state_dict."
        )
    try:
        family = _decode({"class": kind, "arguments": record["arguments"]})
    except Exception as error:  # whatever the parts say to arguments that are not theirs
        raise ValueError(f"{path} describes a {kind} that this version cannot build: {_brief(error)}.") from error
    if not isinstance(family, Family):
        raise ValueError(f"{path} holds a {kind}, which is no family.")
    return family


def _encode(value: Any, where: str, own: list[str]) -> Any:
    """A value as JSON; what JSON cannot say goes to `own`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Integral, Real)):  # of numpy
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Sequence):
        return [_encode(v, where, own) for v in value]
    if isinstance(value, Tensor) and value.numel() <= 10_000:
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Labels):
        return {"class": "Labels", "arguments": {"num_classes": value.num_classes}}
    if isinstance(value, Family):
        inner = describe(value)
        own.extend(f"{where}: {part}" for part in inner.get("own", ()))
        return inner
    if is_dataclass(value) and type(value) in _PARTS.values():
        arguments = {f.name: _encode(getattr(value, f.name), where, own) for f in fields(value) if f.init}
        return {"class": type(value).__name__, "arguments": arguments}
    if isinstance(value, constraints.Constraint):
        if value is constraints.real:
            return {"constraint": "real"}
        name = type(value).__name__.strip("_").lower()
        for known, snake in ((k, k.replace("_", "")) for k in _CONSTRAINTS):
            bounds = [getattr(value, b) for b in ("lower_bound", "upper_bound") if hasattr(value, b)]
            if snake == name and all(isinstance(b, (int, float)) or b.dim() == 0 for b in bounds):
                return {"constraint": known, "bounds": [float(b) if known != "integer_interval" else int(b) for b in bounds]}
    own.append(f"{where}: {type(value).__name__}")
    return None


def _decode(value: Any) -> Any:
    """The value that JSON says, made of parts of this package."""
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=DTYPES[value["dtype"]])
    if "constraint" in value:
        if value["constraint"] not in _CONSTRAINTS:
            raise unknown_name("constraint", str(value["constraint"]), _CONSTRAINTS)
        return _CONSTRAINTS[value["constraint"]](*value.get("bounds", ()))
    if value.get("class") not in _PARTS:
        raise unknown_name("family or part of one", str(value.get("class")), _PARTS)
    return _PARTS[value["class"]](**{name: _decode(v) for name, v in value["arguments"].items()})
