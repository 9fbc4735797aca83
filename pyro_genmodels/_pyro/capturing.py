"""Parts of Pyro and torch that are replaced while a program is captured as a graph, since they read the values of tensors.

Each replacement computes the same number. Checks of values cannot stand in a graph: they run before, in an eager run.
"""

from __future__ import annotations

__all__ = ["capturable", "copy_pair", "find_parameters", "has_handlers", "has_hooks"]

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from unittest import mock

import pyro
import torch
from pyro import poutine
from pyro.infer import util
from pyro.infer.autoguide import AutoGuide
from pyro.ops import packed
from pyro.ops.einsum.adjoint import require_backward
from pyro.ops.rings import MarginalRing
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional

from pyro_genmodels._pyro.handlers import exclusive

ONE_HOT = functional.one_hot


def has_handlers() -> bool:
    """Return True if a handler of Pyro, or autocast, is active around the call, which could change what a program means."""
    return bool(_PYRO_STACK) or torch._C._is_any_autocast_enabled()


def has_hooks(x: Tensor) -> bool:
    """Return True if a function is called with the gradient of a tensor, by `register_hook` and the like."""
    return bool(x._backward_hooks) or bool(x._post_accumulate_grad_hooks)


def find_parameters(run: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the unconstrained parameters that a run asks for, by their names in Pyro's param store, as `SVI` finds them."""
    with poutine.trace(param_only=True) as trace:
        run()
    sites: dict[str, Any] = trace.trace.nodes
    return {name: site["value"].unconstrained() for name, site in sites.items()}


def copy_pair(model: Any, guide: Any) -> tuple[Any, Any]:
    """Return copies of a model and a guide. Pyro's guides lose their model when they are copied, which is put back here."""
    memo: dict[int, Any] = {}
    guides = [part for part in guide.modules() if isinstance(part, AutoGuide)] if isinstance(guide, nn.Module) else []
    models = [part._model for part in guides]
    try:
        copies = deepcopy((model, guide), memo)
    finally:
        for part, of_part in zip(guides, models, strict=True):
            part._model = of_part
    for part, of_part in zip(guides, models, strict=True):
        memo[id(part)]._model = deepcopy(of_part, memo)
    return copies


@contextmanager
def capturable() -> Iterator[None]:
    """Replace the parts of Pyro and torch that read values, in one thread at a time.

    Replaced are the conversion of losses to numbers, the checks for NaN, the checks of values and arguments of distributions,
    the one-hot code of integers, which checks them, and the expectation of enumerated costs, which selects rows by a mask.

    Raises:
        RuntimeError: if another thread runs a model; see `exclusive`.
    """
    with exclusive("the capture of a model"), ExitStack() as stack:
        modules = [
            module for name, module in list(sys.modules.items()) if name.startswith(("pyro.infer", "pyro_genmodels.infer"))
        ]
        for module in modules:
            for name, replacement in (("torch_item", _detach), ("warn_if_nan", _return)):
                if callable(vars(module).get(name)):
                    stack.enter_context(mock.patch.object(module, name, replacement))
        for cls in {Distribution, *_overriding(Distribution, "_validate_sample")}:
            stack.enter_context(mock.patch.object(cls, "_validate_sample", _skip))
        stack.enter_context(mock.patch.object(util.Dice, "compute_expectation", _compute_expectation))
        stack.enter_context(mock.patch.object(functional, "one_hot", _one_hot))
        stack.enter_context(pyro.validation_enabled(is_validate=False))
        yield


def _overriding(cls: type, name: str) -> Iterator[type]:
    """Yield the subclasses that define an attribute anew."""
    child: type
    for child in cls.__subclasses__():
        if name in vars(child):
            yield child
        yield from _overriding(child, name)


def _detach(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _return(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _skip(*args: Any, **kwargs: Any) -> None:
    pass


def _one_hot(x: Tensor, num_classes: int = -1) -> Tensor:
    """Return the one-hot code of integers, (*shape, num_classes); without a number of classes, as torch does."""
    if num_classes < 0:
        return ONE_HOT(x, num_classes)
    return (x.unsqueeze(-1) == torch.arange(num_classes, device=x.device)).long()


def _compute_expectation(dice: Any, costs: dict[Any, list[Any]]) -> Any:
    """Return the expected cost under enumerated variables, like ``Dice.compute_expectation``.

    A cost at a probability of 0 counts 0. Pyro leaves it out of the sum by a mask, whose size depends on values; here it is
    replaced by 0, which has the same value and gradient.
    """
    expected: Any = 0.0
    with util.shared_intermediates() as cache:
        ring = MarginalRing(cache=cache)
        for ordinal, terms in costs.items():
            factors = dice._get_log_factors(ordinal)
            scale = math.exp(sum(factor for factor in factors if not isinstance(factor, Tensor)))
            tensors: list[Any] = [factor for factor in factors if isinstance(factor, Tensor)]
            queries: dict[Any, Any] = {}
            for cost in terms:
                dims = frozenset(cost._pyro_dims)
                if dims not in queries:
                    queries[dims] = next((factor for factor in tensors if frozenset(factor._pyro_dims) == dims), None)
                    if queries[dims] is None:
                        queries[dims] = torch.zeros_like(cost)
                        queries[dims]._pyro_dims = cost._pyro_dims
                        tensors.append(queries[dims])
            for query in queries.values():
                require_backward(query)
            every_dim = set().union(*(factor._pyro_dims for factor in tensors))
            ring.sumproduct(tensors, every_dim - ordinal)._pyro_backward()
            for cost in terms:
                query = queries[frozenset(cost._pyro_dims)]
                probability = query._pyro_backward_result.exp()
                probability._pyro_dims = query._pyro_dims
                value, probability = packed.broadcast_all(cost, probability)
                value = torch.where(probability > 0, value, torch.zeros_like(value))
                expected = expected + scale * (probability * value).sum()
    return expected
