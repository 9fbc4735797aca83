"""Checksums of tensors and of arguments, by which a run that is resumed knows them again."""

from __future__ import annotations

__all__ = ["arguments_digest", "raw_bytes", "tensor_digest"]

from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.utils.nested import leaves


def raw_bytes(x: Tensor) -> memoryview:
    """Return the bytes of a tensor's numbers in their order.

    Example:
        >>> bytes(raw_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T))
        b'\\x01\\x03\\x02\\x04'
    """
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def tensor_digest(x: Tensor) -> str:
    """Return a checksum of a tensor's shape, data type and numbers."""
    digest = sha256(f"{tuple(x.shape)} {x.dtype}".encode())
    digest.update(raw_bytes(x))
    return digest.hexdigest()


def arguments_digest(arguments: Any) -> str:
    """Return a checksum of arguments: of the values of tensors, arrays and frames, and of numbers and texts.

    Other objects, such as functions, count by their type.

    Args:
        arguments: what a function is given, in lists, tuples and dictionaries at any depth.

    Example:
        >>> a, b = {"y": np.zeros(2), "n": 3}, {"y": np.zeros(2), "n": 4}
        >>> arguments_digest(a) == arguments_digest(a), arguments_digest(a) == arguments_digest(b)
        (True, False)
    """
    digest = sha256()
    for keys, value in leaves(arguments):
        digest.update(f"{keys} {_leaf_digest(value)};".encode())
    return digest.hexdigest()


def _leaf_digest(value: Any) -> str:
    """Return a checksum, or a text, for one value."""
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        names = list(map(str, value.columns)) if hasattr(value, "columns") else ""
        held = repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()
        return f"{array.shape} {array.dtype} {names} {sha256(held).hexdigest()}"
    known = value is None or isinstance(value, (bool, int, float, complex, str, bytes))
    return repr(value) if known else type(value).__qualname__
