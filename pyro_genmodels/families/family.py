r"""What every family is: a module that, given a context, returns a Pyro distribution, and a model and guide that train it.

.. math:: x_n \sim p_\theta(x \mid c_n), \quad n = 1, \dots, N, \text{ independently.}

Trained on a minibatch of B rows out of N, the plate scales each row's term by N / B, so that the gradient is an unbiased
estimate of the whole data's.
"""

from __future__ import annotations

__all__ = ["Context", "Family", "Labels", "Standardize"]

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroModule, pyro_method
from torch import Size, Tensor, nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Transform,
    biject_to,
    constraints,
)

from pyro_genmodels._pyro import params
from pyro_genmodels.utils.distributions import is_real, map_tensors, over_events

Context = int | nn.Module
Standardize = bool | Literal["jointly"]


class Labels(nn.Module):
    """Integer classes as a context, one-hot inside.

    Args:
        num_classes: labels run from 0 to num_classes - 1.

    Example:
        >>> from pyro_genmodels import Flow, Labels
        >>> Flow((2,), context=Labels(10))(torch.tensor([3, 7])).batch_shape
        torch.Size([2])
    """

    one_hot: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"Labels needs at least one class, got {num_classes}.")
        self.num_classes = self.out_features = num_classes
        self.register_buffer("one_hot", torch.eye(num_classes), persistent=False)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels (...), integers -> (..., num_classes)."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"Labels wants a tensor of integers, but found {type(labels).__name__}: see torch.tensor.")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"Labels wants integers, but found {labels.dtype}. Convert the labels with .long().")
        if is_validation_enabled() and labels.numel() and (labels.min() < 0 or labels.max() >= self.num_classes):
            raise ValueError(
                f"Labels({self.num_classes}) wants labels from 0 to {self.num_classes - 1}, but found "
                f"{int(labels.min())} to {int(labels.max())}. Renumber them, or build the family with a larger Labels(k)."
            )
        return self.one_hot[labels.long()]


class _Vector(nn.Module):
    """A float vector as a context, as it is."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.out_features = size

    def forward(self, context: Tensor) -> Tensor:
        if not isinstance(context, Tensor):
            raise TypeError(f"A context is wanted as a tensor of floats, but found {type(context).__name__}: see torch.tensor.")
        if not context.is_floating_point() or context.dim() < 1 or context.shape[-1] != self.out_features:
            raise ValueError(
                f"This family wants a context of floats, (..., {self.out_features}), but found {context.dtype} of shape "
                f"{tuple(context.shape)}. A number per row wants context[:, None]; integer classes want context=Labels(k)."
            )
        if is_validation_enabled() and not context.isfinite().all():
            raise ValueError(f"The context, of shape {tuple(context.shape)}, has NaN or infinite entries. Impute them first.")
        return context


class Family(PyroModule):
    """Base of all families.

    In a model of your own, ``pyro.sample("x", family(), obs=x)``, its parameters train along with the rest, also where it is a
    prior that was learned before: freeze it with ``family.requires_grad_(False)``. Under Pyro's own losses pass a context by
    position, ``svi.step(x, context)``: Pyro's handlers have a keyword of that name.

    Args:
        event_shape: shape of one datum.
        context: what the distribution depends on: 0 for nothing, the length of a float vector, `Labels`, or a module whose
            output (..., out_features) the networks are given.
        support: where one coordinate of the data lies. An interval is mapped to the real line, the map counted in the density,
            so that values at its ends, which would be infinite, are refused; of integers nothing is mapped.
        standardize: whether the networks see data of mean 0 and standard deviation 1 in each coordinate (after the map
            above); "jointly" takes one mean and deviation of all coordinates, as is best where they are of one kind, such as
            pixels that a convolution sees. `train` sets them by all its data and `model` by the first data it sees in
            training; in a model of your own, ``pyro.sample("x", family(), obs=x)``, call ``family.standardize(x)`` first. They
            are saved with the parameters and counted in the density.
        name: the name under which Pyro knows the parameters; by default the class and a number no other has. A family that had
            it before gets a new one. Save a family by its `state_dict`: nothing is read from Pyro's param store.
    """

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Family:
        """Keeps the arguments, by which a checkpoint describes the family."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = {n: list(v) if isinstance(v, list) else v for n, v in bound.arguments.items()}
        except TypeError:  # __init__ will say so
            arguments = {}
        arguments.pop("self", None)
        object.__setattr__(self, "arguments", arguments)
        return self

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        support: constraints.Constraint = constraints.real,
        standardize: Standardize = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name or params.fresh_name(self))
        if not isinstance(support, constraints.Constraint):
            raise TypeError(f"support wants a constraint such as constraints.interval(0.0, 1.0), but found {support!r}.")
        if isinstance(event_shape, int) or not all(isinstance(n, int) and n > 0 for n in event_shape):
            raise ValueError(f"{type(self).__name__} wants an event_shape of positive integers like (3,), got {event_shape!r}.")
        self.event_shape = Size(event_shape)
        if not (support.is_discrete or _keeps_shape(support, self.event_shape)):
            raise ValueError(
                f"{type(self).__name__} cannot map the support {support} of events {tuple(self.event_shape)} to as many real "
                "numbers. Use an interval, or transform the data beforehand."
            )
        if not (isinstance(standardize, bool) or standardize == "jointly"):
            raise ValueError(f'standardize wants True, False or "jointly", but found {standardize!r}.')
        self.context = _context_module(context)
        self.support = support
        self._standardize, self._standardized = bool(standardize) and not support.is_discrete, False
        self._jointly = standardize == "jointly"
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))
        self.register_buffer("standardized", torch.tensor(False))
        self.register_load_state_dict_post_hook(_read_standardized)
        self.name = self.name

    @abstractmethod
    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution of one datum, or of a batch of them: context (batch..., c) or labels (batch...)."""

    # What a family is made of.

    @property
    def context_size(self) -> int:
        """Length of the vector that the networks are given of the context."""
        return 0 if self.context is None else _out_features(self.context)

    def embed(self, context: Tensor | None) -> Tensor | None:
        """The vector (batch..., context_size) that the networks are given."""
        if self.context is None:
            if context is not None:
                floats = isinstance(context, Tensor) and context.is_floating_point() and context.dim() > 0
                cure = context.shape[-1] if floats else "Labels(k)"
                raise ValueError(
                    f"{self.name} was built without a context, but was given {tuple(getattr(context, 'shape', ()))}. Build it "
                    f"with {type(self).__name__}(..., context={cure}). If these were data: see family().log_prob(x)."
                )
            return None
        if context is None:
            raise ValueError(f"{self.name} wants a context, and was given none. Pass context=...")
        return self.context(context)

    @property
    def pretransform(self) -> Transform | None:
        """The bijection from data to what the networks model, onto the reals, then to mean 0 and deviation 1."""
        parts = []
        if not (is_real(self.support) or self.support.is_discrete):
            parts.append(self._to_reals())
        if self._standardize:
            parts.append(AffineTransform(self.loc, self.scale, event_dim=len(self.event_shape)).inv)
        return ComposeTransform(parts) if parts else None

    def _to_reals(self) -> Transform:
        return over_events(biject_to(self.support).inv, len(self.event_shape))

    def standardize(self, x: Tensor) -> None:
        """Takes mean and standard deviation from data, (N, *event_shape), where the family standardises at all."""
        if not self._standardize:
            return
        with torch.no_grad():
            y = self._continuous(x.to(self.loc.device)).to(self.loc.dtype)
            if not is_real(self.support):
                y = self._to_reals()(y)
            self.loc.copy_(y.mean() if self._jointly else y.mean(0))
            if len(y) > 1:
                scale = (y.std() if self._jointly else y.std(0)).expand_as(self.scale)
                self.scale.copy_(torch.where(scale > 1e-6 * (1 + self.loc.abs()), scale, torch.ones_like(scale)))
            self.standardized.fill_(True)
        self._standardized = True

    def _continuous(self, x: Tensor) -> Tensor:
        return x

    # What a family does in Pyro.

    @property
    def name(self) -> str:
        """The name under which Pyro knows the parameters; it can be set."""
        return self._pyro_name

    @name.setter
    def name(self, name: str) -> None:
        former = params.claim(self, name)
        self._pyro_context.used = False  # or Pyro refuses to rename what is inside
        self._pyro_set_supermodule(name, self._pyro_context)
        if isinstance(former, Family) and former.name == name:
            former.name = params.fresh_name(former)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        params.take_over(self)
        return super().__call__(*args, **kwargs)

    @pyro_method
    def model(self, x: Tensor | None = None, context: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """N independent data.

        Args:
            x: the data that are present, (N, *event_shape); None draws.
            context: one per row, (N, c) or (N,) labels.
            size: how many data there are in all, of which x is a minibatch; or how many to draw.

        Returns:
            x, or the draws.
        """
        x = self.check(x)
        plate, distribution = self.plate(x, context, size), self(context)  # random weights are drawn outside the plate
        with plate:
            return pyro.sample("x", distribution, obs=x)

    @pyro_method
    def guide(self, x: Tensor | None = None, context: Tensor | None = None, *, size: int | None = None) -> None:
        """The guide of `model`, which has no latent variables unless a family says so."""

    def plate(self, x: Tensor | None, context: Tensor | None, size: int | None) -> pyro.plate:
        """The plate "data" over the rows, whose scale is size / len(x)."""
        params.take_over(self)
        rows = len(x) if x is not None else size if size is not None else None if context is None else len(context)
        if rows is None:
            raise ValueError(f"{self.name}.model wants data x, a context or size=, the number of rows to draw.")
        if context is not None and len(context) != rows:
            raise ValueError(f"There are {rows} rows of x but {len(context)} of context. Pass one context per row.")
        if isinstance(self.context, Labels) and context is not None and context.dim() != 1:
            raise ValueError(f"Labels are wanted as (N,), one per row, but found {tuple(context.shape)}. See .squeeze(-1).")
        if size is None or size == rows:
            return pyro.plate("data", rows, device=self.loc.device)
        if size < rows:
            raise ValueError(f"size={size} is the number of data in all, and x has {rows} rows already.")
        return pyro.plate("data", size, subsample=torch.arange(rows, device=self.loc.device))

    def check(self, x: Tensor | None) -> Tensor | None:
        """x, once it is known to be data of this family; sets mean and deviation on the first call in training."""
        if x is None:
            return None
        wanted = f"{self.name} wants data of shape (N, {', '.join(map(str, self.event_shape))})"
        if not isinstance(x, Tensor):
            raise TypeError(f"{wanted} as a torch.Tensor, but found {type(x).__name__}. Wrap it in torch.as_tensor(...).")
        if x.dim() != 1 + len(self.event_shape) or x.shape[1:] != self.event_shape:
            raise ValueError(f"{wanted}, but found {tuple(x.shape)}. Reshape the data or the family's event_shape.")
        if not len(x):
            raise ValueError(f"{wanted}, but found no rows at all.")
        if is_validation_enabled():
            self._check_values(x)
        if self._standardize and self.training and torch.is_grad_enabled() and not self._standardized:
            self.standardize(x)
        return x

    def _check_values(self, x: Tensor) -> None:
        if x.is_floating_point() and not x.isfinite().all():
            rows = (~x.isfinite()).reshape(len(x), -1).any(1)
            raise ValueError(
                f"{self.name} was given data with NaN or infinite values in {int(rows.sum())} of {len(x)} rows, the "
                f"first of them row {int(rows.nonzero()[0])}. Drop or impute these rows first."
            )
        if x.is_floating_point() and x.dtype != self.loc.dtype:
            raise ValueError(
                f"{self.name} computes in {self.loc.dtype}, but the data are {x.dtype}. Convert one: x.to({self.loc.dtype}) or "
                f"the family's .to({x.dtype})."
            )
        support = self.data_support
        if not support.is_discrete and not x.is_floating_point():
            raise ValueError(
                f"{self.name} models real numbers, but was given {x.dtype}. Convert with .float(), or model integers: "
                "levels=K for Flow, ODEFlow and Diffusion, a discrete likelihood, or EnergyModel(..., "
                "support=integer_interval(0, K - 1))."
            )
        ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
        at_end = [x == end for end in ends if end is not None and not support.is_discrete and not is_real(support)]
        if any(hit.any() for hit in at_end) and self.pretransform is not None:
            raise ValueError(
                f"{self.name} was given {sum(int(hit.sum()) for hit in at_end)} values at an end of its support {support}, "
                "which map to infinity. Squeeze the data into the interior, or model integers: Flow(..., levels=K)."
            )
        inside = support.check(x)
        if not inside.all():
            bad = x[~inside] if inside.shape == x.shape else x
            raise ValueError(
                f"{self.name} was given data outside its support {support}: values from {bad.min():g} to "
                f"{bad.max():g} in {int((~inside).sum())} places. Rescale the data or widen the support."
            )

    @property
    def data_support(self) -> constraints.Constraint:
        """Where one coordinate of the data may lie, if that is not what the networks model."""
        return self.support

    # How a family moves and is copied.

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        """A copy under a name of its own, so that the two can be trained apart."""
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo), _pyro_name="")
        new.name = params.fresh_name(new)
        return new

    def __copy__(self) -> Family:
        """As deepcopy: two families cannot share their parameters and be known by different names."""
        return copy.deepcopy(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A family from a pickle keeps its name, unless a family that is here has it."""
        super().__setstate__(state)
        name, self._pyro_name = self._pyro_name, ""
        self.name = params.fresh_name(self) if params.is_taken(name) else name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Family:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)
        self.support = map_tensors(self.support, fn)
        return self


def _keeps_shape(support: constraints.Constraint, event_shape: Size) -> bool:
    return support.event_dim <= len(event_shape) and biject_to(support).forward_shape(event_shape) == event_shape


def _read_standardized(family: Family, _: Any) -> None:
    family._standardized = bool(family.standardized)


def _context_module(context: Context) -> nn.Module | None:
    if isinstance(context, nn.Module):
        _out_features(context)
        return context
    if isinstance(context, bool) or not isinstance(context, int) or context < 0:
        raise ValueError(f"context wants a vector length (0 or more), Labels(k) or a module, got {context!r}.")
    return _Vector(context) if context else None


def _out_features(module: nn.Module) -> int:
    for part in (module, *reversed(list(module.modules()))):  # of a stack of layers, the last that says
        size = getattr(part, "out_features", getattr(part, "embedding_dim", None))
        if isinstance(size, int):
            return size
    raise ValueError(
        f"The context module {type(module).__name__} does not say how long its output is. Give it an attribute out_features."
    )
