"""Checkpoints: tensors as safetensors, with a record of the family and its training as JSON in the header.

A checkpoint holds no code, and reading one runs none: a family is described by the names and arguments of its parts, and is
rebuilt from the classes of `pyro_genmodels.families` alone. A file is written completely or not at all. A checksum of record
and tensors reveals damage. The JSON file beside it is a copy for people to read.

A file may come from anywhere. Its size and its header are checked before its tensors are read. The entries of the record are
checked against a schema (see `records`). A family that is rebuilt may take little more memory than the tensors in the file.
"""

from __future__ import annotations

__all__ = [
    "FORMAT",
    "load",
    "load_state",
    "read",
    "read_record",
    "save",
    "tensors_of",
    "write",
]

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pyro_genmodels import __version__
from pyro_genmodels._pyro.modules import with_versions
from pyro_genmodels.families import Family
from pyro_genmodels.training.rebuild import brief, describe, rebuild
from pyro_genmodels.training.records import ENTRIES, check_record
from pyro_genmodels.utils.checksums import raw_bytes
from pyro_genmodels.utils.errors import import_extra, one_line, type_with_article
from pyro_genmodels.utils.files import MAX_BYTES, atomic_write, check_size

FORMAT = 2
"""Version of the format. Files of a newer one are refused. In version 1 the logits of zeros and ones are not measured."""

RESERVED = frozenset({"format", *ENTRIES}) - {"history"}
"""Names of entries that checkpoints write themselves. A history of your own training may be saved."""

MAX_HEADER_BYTES = 2**24
"""Largest size of a header, which holds the record."""


def save(path: str | Path, family: Family, **record: Any) -> Path:
    """Write a family to ``path.safetensors``.

    Args:
        path: path with or without suffix; its folder is made.
        family: the family.
        record: further entries of the record, of types that JSON has.

    Returns:
        The path of the file.

    Raises:
        TypeError: if `family` is not a family, such as the result of `train`.
        ValueError: if an entry has a name that checkpoints use themselves.
        ImportError: if safetensors is not installed.
        OSError: if the file cannot be written. An older file then stays as it was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from pyro_genmodels import Flow, NSF
        >>> from pyro_genmodels.training import checkpoints
        >>> with TemporaryDirectory() as folder:
        ...     path = checkpoints.save(f"{folder}/flow", Flow((2,), transform=NSF(transforms=2)))
        ...     checkpoints.load(path)().sample((5,)).shape
        torch.Size([5, 2])
    """
    if not isinstance(family, Family):
        raise TypeError(f"A checkpoint wants a family, but found {type(family).__name__}. Of a trained fit pass fit.family.")
    if reserved := RESERVED & set(record):
        raise ValueError(
            f"The record cannot have entries named {', '.join(map(repr, sorted(reserved)))}, which checkpoints use themselves. "
            f"Give them other names, such as {f'my_{min(reserved)}'!r}."
        )
    return write(path, family.state_dict(), {**record, **describe(family)})


def load(path: str | Path, family: Family | None = None, *, max_bytes: int = MAX_BYTES) -> Family:
    """Return the family of a checkpoint in evaluation mode, as written by `save` or ``train(..., checkpoint=...)``.

    Args:
        path: path with or without suffix.
        family: family to load the parameters into. It is needed for networks of your own, which a checkpoint cannot hold.
        max_bytes: largest size of the file; by default 1 GB.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, too large, not of this package, or of a newer format; if it holds another family
            than the given one, or tensors of other shapes or data types; or if no family is given, and it describes parts of
            your own or a family far larger than its tensors.

    Example:
        >>> load("flow")
        Traceback (most recent call last):
        FileNotFoundError: There is no checkpoint flow.safetensors.
    """
    return load_state(*read(path, max_bytes=max_bytes), path, family)


def load_state(
    state: Mapping[str, Tensor], record: Mapping[str, Any], path: str | Path, family: Family | None = None
) -> Family:
    """Return the family of a checkpoint that was read by `read`; see `load`.

    Args:
        state: its tensors.
        record: its record.
        path: its path, for messages.
        family: family to load the parameters into.
    """
    if family is None:
        family = rebuild(record, path, state)
    elif record.get("class") not in (None, type(family).__name__):
        raise ValueError(f"{path} holds a {record['class']}, which cannot be loaded into {type_with_article(family)}.")
    state = family.upgrade_state(state)
    if record.get("format", 1) == FORMAT:
        state = with_versions(state, family)
    found, own = _forms(state), _forms(family.state_dict())
    dtypes = {dtype for _, dtype in found.values() if dtype.is_floating_point}
    if len(dtypes) == 1:
        [precision] = dtypes
        own = {name: (shape, precision if dtype.is_floating_point else dtype) for name, (shape, dtype) in own.items()}
    if found != own:
        wrong = sorted(name for name in {*own, *found} if own.get(name) != found.get(name))
        raise ValueError(
            f"The parameters in {path} do not fit this {type(family).__name__}: {len(wrong)} differ in name, shape or data "
            f"type, first {one_line(wrong[0], 100)!r}. Build the family with the arguments it was saved with."
        )
    if len(dtypes) == 1:
        family.to(precision)
    family.load_state_dict(state)
    return family.eval()


def _forms(state: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and data type of each tensor."""
    return {name: (tuple(t.shape), t.dtype) for name, t in state.items()}


# Files.


def write(path: str | Path, state: Mapping[str, Tensor], record: Mapping[str, Any], *, readable: bool = True) -> Path:
    """Write tensors and a record to ``path.safetensors``.

    Args:
        path: path with or without suffix.
        state: tensors by name.
        record: entries of the record, of types that JSON has.
        readable: True to write the record to ``path.json`` too.

    Returns:
        The path of the tensors.

    Raises:
        ValueError: if an entry of the record that checkpoints use has another type than theirs.
        ImportError: if safetensors is not installed.
        OSError: if a file cannot be written.
    """
    target = tensors_of(path)
    tensors = _apart({name: t.detach().contiguous().cpu() for name, t in state.items()})
    full = {"format": FORMAT, "pyro_genmodels": __version__, **record}
    text = json.dumps(full)
    check_record(json.loads(text), "The checkpoint cannot be written")
    with atomic_write(target) as part:
        metadata = {"pyro_genmodels": text, "sha256": _digest(tensors, text)}
        try:
            _safetensors(".torch").save_file(tensors, part, metadata=metadata)
        except _safetensors().SafetensorError as error:
            raise OSError(brief(error)) from error  # `atomic_write` adds the name
    if readable:
        with atomic_write(target.with_suffix(".json")) as part:
            part.write_text(json.dumps(full, indent=1) + "\n")
    return target


def read(path: str | Path, *, max_bytes: int = MAX_BYTES) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record of a checkpoint. Nothing in it is executed.

    Args:
        path: path with or without suffix.
        max_bytes: largest size of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint of this package, is damaged or too large, or is of a newer format.
        ImportError: if safetensors is not installed.
    """
    path = _existing(path)
    with path.open("rb") as file:
        text, checksum = _read_header(file, path)
        check_size(str(path), os.fstat(file.fileno()).st_size, max_bytes)
        file.seek(0)
        raw = file.read()
    try:
        state = _safetensors(".torch").load(raw)
    except _safetensors().SafetensorError as error:
        raise ValueError(f"{path} is no checkpoint, or is damaged: it is not a safetensors file ({brief(error)}).") from error
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:  # data types that torch does not have
        raise ValueError(f"{path} is damaged: its tensors cannot be read ({brief(error)}).") from error
    if checksum != _digest(state, text):
        raise ValueError(f"{path} is damaged: its checksum does not match its contents. Use another copy of the file.")
    return state, _parse_record(text, path)


def read_record(path: str | Path) -> dict[str, Any]:
    """Return the record of a checkpoint, from its header alone. The tensors are not read, nor is the checksum compared.

    Args:
        path: path with or without suffix.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint of this package, or is of a newer format.
        ImportError: if safetensors is not installed.
    """
    path = _existing(path)
    with path.open("rb") as file:
        return _parse_record(_read_header(file, path)[0], path)


def _existing(path: str | Path) -> Path:
    """Return the path of a checkpoint's tensors that exists, for a path with or without suffix."""
    _safetensors()
    given, path = Path(path), tensors_of(path)
    if not path.is_file() and given.is_file():
        path = given
    if not path.is_file():
        folder = path.with_name(path.name.removesuffix(".safetensors"))
        if folder.is_dir() and (
            inside := sorted(folder.glob("*.safetensors"), key=lambda file: (".training." in file.name, file.name))
        ):
            checkpoint = inside[0].with_name(inside[0].name.replace(".training.", "."))
            raise FileNotFoundError(f"{folder} is a folder, not a checkpoint: pass a file in it, such as {checkpoint}.")
        if path.with_name(f"{folder.name}.training.safetensors").is_file():
            raise FileNotFoundError(
                f"There is no checkpoint {path}, but a training run of that name. To continue it: "
                f"train(..., checkpoint=Checkpoint({str(folder)!r}, resume=True)), which then writes the checkpoint."
            )
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.safetensors") if ".training" not in p.name)[:5])
        raise FileNotFoundError(f"There is no checkpoint {path}." + (f" Its folder has {near}." if near else ""))
    return path


def _read_header(file: BinaryIO, path: Path) -> tuple[str, Any]:
    """Return the record as text and the checksum, from the header of an open safetensors file."""
    length = int.from_bytes(file.read(8), "little")
    rest = os.fstat(file.fileno()).st_size - 8
    if not 0 < length <= rest:
        raise ValueError(f"{path} is no checkpoint, or is damaged: it is not a safetensors file.")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{path} is no checkpoint: its header takes {length:,} bytes, of at most {MAX_HEADER_BYTES:,}.")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no checkpoint, or is damaged: it is not a safetensors file.") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    metadata = metadata if isinstance(metadata, dict) else {}
    text = metadata.get("pyro_genmodels")
    if not isinstance(text, str):
        raise ValueError(
            f"{path} is not a checkpoint of pyro_genmodels: its header has no record. Read other safetensors files by "
            "safetensors.torch.load_file, and pass the tensors to a family's load_state_dict."
        )
    return text, metadata.get("sha256")


def _parse_record(text: str, path: Path) -> dict[str, Any]:
    """Return a record, once its entries are known to be of the right types."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its record is not JSON.") from error
    if not isinstance(record, dict) or not isinstance(record.get("format", 0), int):
        raise ValueError(f"{path} is damaged: its record is not one of pyro_genmodels.")
    if record.get("format", 0) > FORMAT:
        raise ValueError(
            f"{path} was written by pyro_genmodels {one_line(record.get('pyro_genmodels'), 50)} in format {record['format']}, "
            f"but this version, {__version__}, reads up to format {FORMAT}. Update pyro_genmodels."
        )
    check_record(record, f"{path} is damaged")
    return record


def tensors_of(path: str | Path) -> Path:
    """Return the path of a checkpoint's tensors, for a path with or without suffix."""
    path = Path(path)
    name = path.name.removesuffix(".safetensors").removesuffix(".json")
    if not name:
        raise ValueError(f"A checkpoint wants a path that ends in a file name, but found {str(path)!r}.")
    return path.with_name(name + ".safetensors")


def _safetensors(part: str = "") -> Any:
    return import_extra(f"safetensors{part}", extra="cli", by="A checkpoint")


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with copies of those that share memory with an earlier one, which safetensors refuses."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, t in tensors.items():
        memory = t.untyped_storage().data_ptr()
        apart[name] = t.clone() if memory in seen else t
        seen.add(memory)
    return apart


def _digest(state: Mapping[str, Tensor], text: str) -> str:
    """Return the checksum of tensors and record."""
    digest = hashlib.sha256(text.encode())
    for name, t in sorted(state.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(raw_bytes(t))
    return digest.hexdigest()
