"""A watch over what a program reads from Python: closures, globals, attributes, entries of lists and dictionaries.

A captured graph holds the tensors of its program by identity, so that a change of their values is seen. It does not see that a
name was bound to another object, or that a number changed. The watch remembers the objects and finds such changes.
"""

from __future__ import annotations

__all__ = ["Watch"]

import operator
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

LIBRARIES = ("torch", "pyro", "numpy", "zuko", "pyro_genmodels", "functools", "scipy", "pandas", "torchdiffeq")
"""Packages whose functions are not searched for globals."""

PATHS = tuple(f"{sysconfig.get_paths()[name]}/" for name in ("purelib", "platlib", "stdlib"))
MAX_LENGTH = 1000
"""Largest length of a list or dictionary whose entries are watched one by one."""

MISSING = object()
CONTENTS = operator.attrgetter("cell_contents")
CODE, DEFAULTS = operator.attrgetter("__code__"), operator.attrgetter("__defaults__")
LEAVES = (Tensor, np.ndarray, bool, int, float, complex, str, bytes, type(None), types.ModuleType, type)
PROTOTYPES = frozenset({"prototype_trace", "_prototype_trace"})  # of Pyro's guides, which read shapes of it
HIDDEN = PROTOTYPES | {name for name in vars(nn.Module()) if name not in ("training", "_parameters", "_buffers", "_modules")}
"""Attributes that are not watched: hooks of modules, and the runs by which Pyro's guides are set up."""


class Watch:
    """The objects behind a program's names, and whether they are still the same.

    Args:
        roots: functions, modules and other objects of which the program consists.

    Attributes:
        num_entries: number of names that are watched.
    """

    def __init__(self, *roots: Any) -> None:
        self._entries: list[_Entry] = []
        self._reads: tuple[list[Callable[[Any], Any]], list[Any]] = ([], [])
        self._values: list[Any] = []
        self._seen: set[int] = set()
        self._kept: list[Any] = []
        for root in roots:
            self._visit(root, getattr(root, "__name__", type(root).__name__))

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    def add(self, mapping: Mapping[Any, Any], key: Any, name: str) -> None:
        """Watch one entry of a mapping."""
        missing_is_none = mapping.get(key) is not None
        self._add(mapping.get if missing_is_none else partial(_get, mapping), key, name)

    def _add(self, read: Callable[[Any], Any], argument: Any, name: str) -> None:
        """Watch what a function returns for an argument."""
        self._entries.append(_Entry(name, read, argument, read(argument)))
        self._reads = ([], [])

    def changed(self) -> str | None:
        """Return the name of something that was rebound since the watch began, or None."""
        entry = self._changed_entry()
        return None if entry is None else entry.name

    def _changed_entry(self) -> _Entry | None:
        if not self._reads[0]:
            self._reads = ([entry.read for entry in self._entries], [entry.argument for entry in self._entries])
            self._values = [entry.value for entry in self._entries]
        try:
            found = list(map(operator.call, *self._reads))
        except (AttributeError, IndexError, ValueError):  # a list that is shorter now, or a name that was deleted
            return self._first_that_fails()
        if all(map(operator.is_, found, self._values)):
            return None
        for entry, now in zip(self._entries, found, strict=True):
            if now is not entry.value and not _same(now, entry.value):
                return entry
        return None

    def _first_that_fails(self) -> _Entry | None:
        for entry in self._entries:
            try:
                entry.read(entry.argument)
            except (AttributeError, IndexError, ValueError):
                return entry
        return None

    def forget_changed(self) -> list[str]:
        """Forget what has changed since the watch began, such as caches that every run fills; return the names."""
        names = []
        while (changed := self._changed_entry()) is not None:
            names.append(changed.name)
            self._entries = [entry for entry in self._entries if entry is not changed]
            self._reads = ([], [])
        return names

    def _visit(self, value: Any, name: str) -> None:
        """Watch what a value consists of."""
        if isinstance(value, LEAVES) and not (isinstance(value, type) and not _is_of_library(value)):
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        self._kept.append(value)
        for part, part_name in self._parts(value, name):
            self._visit(part, part_name)

    def _parts(self, value: Any, name: str) -> Iterator[tuple[Any, str]]:
        """Watch the entries of a value, and yield them."""
        if isinstance(value, types.FunctionType):
            yield from self._parts_of_function(value, name)
        elif isinstance(value, types.MethodType):
            yield value.__self__, name
            yield value.__func__, name
        elif isinstance(value, partial):
            yield from ((part, name) for part in (value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, property):
            yield value.fget, name
        elif isinstance(value, type):
            yield from self._parts_of_mapping(vars(value), name, skip=lambda key: key.startswith("__"))
        elif isinstance(value, dict):
            yield from self._parts_of_mapping(value, name)
        elif isinstance(value, list | tuple | set | frozenset):
            if isinstance(value, list | set):
                self._add(len, value, name)
            if isinstance(value, list) and len(value) <= MAX_LENGTH:
                for i, part in enumerate(value):
                    self._add(value.__getitem__, i, f"{name}[{i}]")
                    yield part, f"{name}[{i}]"
            elif isinstance(value, tuple):
                yield from ((part, f"{name}[{i}]") for i, part in enumerate(value))
            elif not isinstance(value, list):
                yield from ((part, name) for part in value)
        elif hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
            hidden = HIDDEN if isinstance(value, nn.Module) else PROTOTYPES
            yield from self._parts_of_mapping(vars(value), name, skip=lambda key: key in hidden, attributes=True)
            self._add(len, vars(value), f"an attribute of {name}")
            if isinstance(value, nn.Module):
                for hooks in (value._forward_hooks, value._forward_pre_hooks):
                    self._add(len, hooks, f"a hook of {name}")
        if not isinstance(value, types.FunctionType | types.MethodType) and not _is_of_library(type(value)):
            for cls in type(value).__mro__:
                if not _is_of_library(cls):
                    yield cls, cls.__name__
                    yield from self._parts_of_slots(value, cls, name)

    def _parts_of_mapping(
        self,
        mapping: Mapping[Any, Any],
        name: str,
        *,
        skip: Callable[[Any], bool] = lambda key: False,
        attributes: bool = False,
    ) -> Iterator[tuple[Any, str]]:
        if not attributes and isinstance(mapping, dict):
            self._add(len, mapping, name)
            if len(mapping) > MAX_LENGTH:
                return
        for key, part in list(mapping.items()):
            if isinstance(key, str) and skip(key):
                continue
            inner = f"{name}.{key}" if attributes or not isinstance(mapping, dict) else f"{name}[{key!r}]"
            self.add(mapping, key, inner)
            yield part, inner

    def _parts_of_slots(self, value: Any, cls: type, name: str) -> Iterator[tuple[Any, str]]:
        """Watch the attributes for which a class has slots."""
        slots = vars(cls).get("__slots__", ())
        for key in (slots,) if isinstance(slots, str) else slots:
            if not key.startswith("__") and hasattr(value, key):
                self._add(operator.attrgetter(key), value, f"{name}.{key}")
                yield getattr(value, key), f"{name}.{key}"

    def _parts_of_function(self, function: types.FunctionType, name: str) -> Iterator[tuple[Any, str]]:
        for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not yet bound
                continue
            self._add(CONTENTS, cell, f"{key} of {name}")
            yield value, key
        for value in function.__defaults__ or ():
            yield value, name
        defaults: Mapping[str, Any] = function.__kwdefaults__ or {}
        for key, value in defaults.items():
            self.add(defaults, key, f"the default {key} of {name}")
            yield value, key
        if _is_of_library(function):
            return
        self._add(CODE, function, f"the code of {name}")
        if function.__defaults__ or function.__kwdefaults__:
            self._add(DEFAULTS, function, f"a default of {name}")
        for key in _names(function.__code__):
            if key in function.__globals__:
                self.add(function.__globals__, key, f"the global {key}")
                yield from self._parts_of_name(function.__globals__[key], key, set(_names(function.__code__)))

    def _parts_of_name(self, value: Any, name: str, names: set[str]) -> Iterator[tuple[Any, str]]:
        """Yield what a name stands for; of a user's module, watch those attributes that the function also names."""
        if not isinstance(value, types.ModuleType):
            yield value, name
        elif not _is_library(value.__name__, getattr(value, "__file__", None)):
            for key in names & vars(value).keys():
                self.add(vars(value), key, f"{name}.{key}")
                yield from self._parts_of_name(vars(value)[key], f"{name}.{key}", names - {key})


@dataclass(frozen=True)
class _Entry:
    """One thing that is watched: a function that reads it, the function's argument, and what it returned at first."""

    name: str
    read: Callable[[Any], Any]
    argument: Any
    value: Any


def _get(mapping: Mapping[Any, Any], key: Any) -> Any:
    return mapping.get(key, MISSING)


def _same(found: Any, expected: Any) -> bool:
    """Return True for equal numbers and texts, and for bound methods of one object."""
    if isinstance(found, types.MethodType) and isinstance(expected, types.MethodType):
        return found.__self__ is expected.__self__ and found.__func__ is expected.__func__
    return type(found) is type(expected) and isinstance(found, bool | int | float | complex | str) and found == expected


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code looks up, also those of functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_of_library(value: Any) -> bool:
    code = getattr(value, "__code__", None)
    path = code.co_filename if isinstance(code, types.CodeType) else None
    module = getattr(value, "__module__", None)
    return _is_library(module if isinstance(module, str) else "", path)


def _is_library(module: str, path: str | None) -> bool:
    return module.split(".")[0] in LIBRARIES or module in ("builtins", "typing") or bool(path and path.startswith(PATHS))
