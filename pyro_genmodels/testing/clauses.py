"""Clauses of contracts: how they are registered, run and reported."""

from __future__ import annotations

__all__ = ["CLAUSES", "clause", "require", "require_error", "run_clauses", "seed", "seeded"]

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pyro

from pyro_genmodels.utils.errors import listed
from pyro_genmodels.utils.rng import forked_rng

CLAUSES: dict[str, dict[str, Callable[[Any], None]]] = {"distribution": {}, "family": {}, "objective": {}}
"""Clauses of each contract, by name. The docstring of a clause states it."""


def clause(contract: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function as a clause of a contract, under its name without the name of the contract."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        CLAUSES[contract][function.__name__.removeprefix(f"_{contract}_")] = function
        return function

    return register


def run_clauses(contract: str, subject: Any, skip: Collection[str]) -> None:
    """Run the clauses of a contract on a subject.

    Args:
        contract: key of `CLAUSES`.
        subject: argument of each clause.
        skip: names of clauses to leave out.

    Raises:
        AssertionError: if a clause raises any error.
        ValueError: if `skip` has an unknown name.
    """
    clauses = CLAUSES[contract]
    if unknown := [name for name in skip if name not in clauses]:
        raise ValueError(f"skip wants names of clauses, among {listed(clauses)}, but found {listed(unknown)}.")
    for name, check in clauses.items():
        if name not in skip:
            try:
                with seed(0), pyro.get_param_store().scope():
                    check(subject)
            except Exception as error:
                raise AssertionError(f'the {contract} contract is broken, clause "{name}": {error}') from error


@contextmanager
def seed(value: int) -> Iterator[None]:
    """Seed torch, and restore its random state afterwards."""
    with forked_rng(value):
        yield


def seeded(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function under a fixed seed, so that two calls draw the same noise."""
    with seed(1):
        return function(*args)


def require(condition: Any, message: str) -> None:
    """Raise an AssertionError with the message unless the condition holds."""
    if not condition:
        raise AssertionError(message)


def require_error(
    kind: type[Exception] | tuple[type[Exception], ...], what: str, function: Callable[..., Any], *args: Any
) -> str:
    """Require that a call raises an error of a kind with a message; return the message in lower case."""
    try:
        function(*args)
    except kind as error:
        require(str(error), f"{what} raises {type(error).__name__} without a message")
        return str(error).lower()
    raise AssertionError(f"{what} is accepted, and should be refused")
