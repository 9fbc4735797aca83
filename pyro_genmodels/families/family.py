r"""The base of all families: a module that returns a Pyro distribution given a context, with a model and a guide to train it.

.. math:: x_n \sim p_\theta(x \mid c_n), \quad n = 1, \dots, N, \text{ independently.}

When a model is trained on a minibatch of B rows out of N, the plate scales each row's term by N / B, so that the gradient is an
unbiased estimate of the gradient over all data.
"""

from __future__ import annotations

__all__ = ["Family", "Standardize"]

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from torch import Size, Tensor, nn
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    Transform,
    biject_to,
    constraints,
)

from pyro_genmodels._pyro import params
from pyro_genmodels.families.context import Context, as_context_module, check_one_per_row, output_length
from pyro_genmodels.utils.distributions import is_real, map_tensors, over_events

Standardize = bool | Literal["jointly"]

_OWN = ("event_shape", "context", "support", "loc", "scale", "standardized")
"""Attributes that `Family.__init__` sets."""


class Family(PyroModule):
    """Base of all families.

    In a model of your own, ``pyro.sample("x", family(), obs=x)``, the family's parameters are trained with the rest of the
    model. To keep a family fixed, such as a prior that was learned before, call ``family.requires_grad_(False)``. With Pyro's
    own losses pass a context by position, ``svi.step(x, context)``, because Pyro's handlers have a keyword argument `context`.

    Args:
        event_shape: shape of one datum.
        context: what the distribution is conditioned on: 0 for nothing, the length of a float vector, `Labels`, or a module
            whose output (..., out_features) is passed to the networks.
        support: set in which one coordinate of the data lies. An interval is mapped to the real line and the map is counted in
            the density; values at the ends of the interval, which would map to infinity, are refused. Integers are not mapped.
        standardize: True for networks that see data of mean 0 and standard deviation 1 in each coordinate (after the map
            above). "jointly" uses one mean and one deviation for all coordinates, which suits coordinates of one kind, such as
            the pixels of an image. `train` computes them from all its data, and `model` from the first data it is given in
            training. In a model of your own, ``pyro.sample("x", family(), obs=x)``, call ``family.standardize(x)`` first. They
            are saved with the parameters and counted in the density.
        name: unique name under which Pyro stores the parameters; by default the class name and a free number. If another family
            has the name already, that family gets a new one. Save a family by its `state_dict`, not by Pyro's param store.

    Attributes:
        arguments: arguments of the constructor by name, from which a checkpoint rebuilds the family.
        loc: mean that standardisation subtracts, (*event_shape).
        scale: standard deviation that standardisation divides by, (*event_shape).
    """

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Family:
        """Create the family and record the constructor's arguments in `arguments`."""
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = {n: list(v) if isinstance(v, list) else v for n, v in bound.arguments.items()}
        except TypeError:  # wrong arguments: __init__ raises the error
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
        super().__init__(name or params.unused_name(self))
        if not isinstance(support, constraints.Constraint):
            raise TypeError(f"support wants a constraint such as constraints.interval(0.0, 1.0), but found {support!r}.")
        lengths = event_shape if isinstance(event_shape, Sequence) else (0,)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in lengths):
            raise ValueError(
                f"{type(self).__name__} wants an event_shape of positive integers like (3,), but found {event_shape!r}."
            )
        self.event_shape = Size(event_shape)
        if not (support.is_discrete or _keeps_shape(support, self.event_shape)):
            raise ValueError(
                f"{type(self).__name__} cannot map the support {support} of events {tuple(self.event_shape)} to as many real "
                "numbers. Use an interval, or transform the data beforehand."
            )
        if not (isinstance(standardize, bool) or standardize == "jointly"):
            raise ValueError(f'standardize wants True, False or "jointly", but found {standardize!r}.')
        self.context = as_context_module(context)
        self.support = support
        self._standardize, self._standardized = bool(standardize) and not support.is_discrete, False
        self._jointly = standardize == "jointly"
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))
        self.register_buffer("standardized", torch.tensor(False))
        self.register_load_state_dict_post_hook(_read_standardized)
        self.name = self.name

    def __setattr__(self, name: str, value: Any) -> None:
        taken = hasattr(Family, name) or (name in _OWN and hasattr(self, name))
        if taken and isinstance(value, (nn.Parameter, nn.Module, PyroParam, PyroSample)):
            raise AttributeError(
                f"{type(self).__name__} cannot store a parameter or module as {name}, which is an attribute of every family. "
                f"Give it another name, such as own_{name}."
            )
        super().__setattr__(name, value)

    @abstractmethod
    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """Return the distribution of one datum given its context.

        Args:
            context: vectors (batch..., c), labels (batch...), or None for a family without a context.

        Returns:
            A distribution of batch shape (batch...) and event shape `event_shape`.
        """

    # Building blocks for subclasses.

    @property
    def context_size(self) -> int:
        """Length of the embedded context that the networks are given; 0 without a context."""
        return 0 if self.context is None else output_length(self.context)

    def embed(self, context: Tensor | None) -> Tensor | None:
        """Check the context and return the vector (batch..., context_size) for the networks, or None without a context.

        Raises:
            ValueError: if a context is missing, superfluous or of the wrong kind.
        """
        if self.context is None:
            if context is not None:
                floats = isinstance(context, Tensor) and context.is_floating_point() and context.dim() > 0
                cure = context.shape[-1] if floats else "Labels(k)"
                raise ValueError(
                    f"{self.name} was built without a context, but was given {tuple(getattr(context, 'shape', ()))}. Build it "
                    f"with {type(self).__name__}(..., context={cure}). If you passed data, use family().log_prob(x)."
                )
            return None
        if context is None:
            raise ValueError(f"{self.name} wants a context, but was given none. Pass context=...")
        return self.context(context)

    @property
    def pretransform(self) -> Transform | None:
        """Bijection from the data to what the networks model: first onto the reals, then to mean 0 and deviation 1."""
        parts = []
        if not (is_real(self.support) or self.support.is_discrete):
            parts.append(self._to_reals())
        if self._standardize:
            parts.append(AffineTransform(self.loc, self.scale, event_dim=len(self.event_shape)).inv)
        return ComposeTransform(parts) if parts else None

    def _to_reals(self) -> Transform:
        return over_events(biject_to(self.support).inv, len(self.event_shape))

    def standardize(self, x: Tensor) -> None:
        """Set mean and standard deviation to those of the data x, (N, *event_shape).

        A family that was built with ``standardize=False`` is left as it is.
        """
        if not self._standardize:
            return
        with torch.no_grad():
            y = self._as_reals(x.to(self.loc.device)).to(self.loc.dtype)
            if not is_real(self.support):
                y = self._to_reals()(y)
            self.loc.copy_(y.mean() if self._jointly else y.mean(0))
            if len(y) > 1:
                scale = (y.std() if self._jointly else y.std(0)).expand_as(self.scale)
                self.scale.copy_(torch.where(scale > 1e-6 * (1 + self.loc.abs()), scale, torch.ones_like(scale)))
            self.standardized.fill_(True)
        self._standardized = True

    def prepare(self, x: Tensor) -> None:
        """Standardise by the data x, (N, *event_shape), unless mean and standard deviation are set already.

        `train` calls this with all data before the first step, and `model` with the first data it is given in training.
        """
        if self._standardize and not self._standardized:
            self.standardize(x)

    def _as_reals(self, x: Tensor) -> Tensor:
        """Return the data as real numbers; families over integers add noise here."""
        return x

    # The family in Pyro.

    @property
    def name(self) -> str:
        """Name under which Pyro stores the parameters. It can be set, and no two families have the same."""
        return params.pyro_name(self)

    @name.setter
    def name(self, name: str) -> None:
        former = params.register_name(self, name)
        if isinstance(former, Family) and former.name == name:
            former.name = params.unused_name(former)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        params.remove_foreign_parameters(self)
        return super().__call__(*args, **kwargs)

    @pyro_method
    def model(self, x: Tensor | None = None, context: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the Pyro model of N independent data: the site ``x`` in the plate ``data``.

        Args:
            x: observed data, (N, *event_shape); None draws them.
            context: one per row, vectors (N, c) or labels (N,).
            size: number of data in all, of which x is a minibatch; or the number of data to draw.

        Returns:
            x, or the draws.
        """
        self._accept(x)
        plate, distribution = self.plate(x, context, size), self(context)  # random weights are drawn outside the plate
        with plate:
            return pyro.sample("x", distribution, obs=x)

    @pyro_method
    def guide(self, x: Tensor | None = None, context: Tensor | None = None, *, size: int | None = None) -> None:
        """Run the guide of `model`, which is empty unless the family has latent variables."""

    def plate(self, x: Tensor | None, context: Tensor | None, size: int | None) -> pyro.plate:
        """Return the plate "data" over the rows of x, which scales log densities by size / len(x).

        Raises:
            ValueError: if the number of rows is not known, or context or size do not agree with x.
        """
        params.remove_foreign_parameters(self)
        rows = len(x) if x is not None else size if size is not None else None if context is None else len(context)
        if rows is None:
            raise ValueError(f"{self.name}.model wants data x, a context or size=, the number of rows to draw.")
        check_one_per_row(self.context, context, rows)
        if size is None or size == rows:
            return pyro.plate("data", rows, device=self.loc.device)
        if size < rows:
            raise ValueError(f"size={size} is the number of data in all, but x alone has {rows} rows.")
        return pyro.plate("data", size, subsample=torch.arange(rows, device=self.loc.device))

    # Checks of the data.

    def _accept(self, x: Tensor | None) -> None:
        """Validate data that a model or guide is given, and prepare the family by them if it is being trained."""
        if x is not None:
            self.validate(x)
            if self.training and torch.is_grad_enabled():
                self.prepare(x)

    def validate(self, x: Tensor) -> None:
        """Check that x is data of this family. Nothing is changed.

        Args:
            x: rows of data, (N, *event_shape).

        Raises:
            TypeError: if x is not a tensor.
            ValueError: if its shape, dtype or values are not those of this family's data. Values are checked only while Pyro's
                validation is on.
        """
        wanted = f"{self.name} wants data of shape (N, {', '.join(map(str, self.event_shape))})"
        if not isinstance(x, Tensor):
            raise TypeError(f"{wanted} as a torch.Tensor, but found {type(x).__name__}. Wrap it in torch.as_tensor(...).")
        if x.dim() != 1 + len(self.event_shape) or x.shape[1:] != self.event_shape:
            raise ValueError(f"{wanted}, but found {tuple(x.shape)}. Reshape the data or change the family's event_shape.")
        if not len(x):
            raise ValueError(f"{wanted}, but found no rows at all.")
        if is_validation_enabled():
            self._validate_dtype(x)
            self._validate_values(x)

    def _validate_dtype(self, x: Tensor) -> None:
        if not x.is_floating_point() and not self.data_support.is_discrete:
            raise ValueError(
                f"{self.name} models real numbers, but was given data of {x.dtype}. Convert with .float(), or model integers: "
                "levels=K for Flow, ODEFlow and Diffusion, a discrete likelihood, or EnergyModel(..., "
                "support=integer_interval(0, K - 1))."
            )
        if x.is_floating_point() and x.dtype != self.loc.dtype:
            raise ValueError(
                f"{self.name} computes in {self.loc.dtype}, but the data are {x.dtype}. Convert one of them: "
                f"x.to({self.loc.dtype}) or the family's .to({x.dtype})."
            )

    def _validate_values(self, x: Tensor) -> None:
        if x.is_floating_point() and not x.isfinite().all():
            rows = (~x.isfinite()).reshape(len(x), -1).any(1)
            raise ValueError(
                f"{self.name} was given data with NaN or infinite values in {int(rows.sum())} of {len(x)} rows, the "
                f"first of them row {int(rows.nonzero()[0])}. Drop or impute these rows first."
            )
        support = self.data_support
        ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
        at_end = [x == end for end in ends if end is not None and not support.is_discrete and not is_real(support)]
        if any(hit.any() for hit in at_end) and self.pretransform is not None:
            raise ValueError(
                f"{self.name} was given {sum(int(hit.sum()) for hit in at_end)} values at an end of its support {support}, "
                "which map to infinity. Squeeze the data into the interior, or model integers: Flow(..., levels=K)."
            )
        inside = support.check(x)
        if not inside.all():
            outside = x[~inside] if inside.shape == x.shape else x
            raise ValueError(
                f"{self.name} was given data outside its support {support}: values from {outside.min():g} to "
                f"{outside.max():g} in {int((~inside).sum())} places. Rescale the data or widen the support."
            )

    @property
    def data_support(self) -> constraints.Constraint:
        """Set in which one coordinate of the data lies: `support`, or the integers that a family with levels models."""
        return self.support

    # Copying and moving.

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        """Return a copy with a name of its own, so that both can be trained independently."""
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        params.clear_name(new)
        new.name = params.unused_name(new)
        return new

    def __copy__(self) -> Family:
        """Return a deep copy, because two families with different names cannot share their parameters."""
        return copy.deepcopy(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled family under its old name, or under a new one if that is taken."""
        super().__setstate__(state)
        name = params.pyro_name(self)
        params.clear_name(self)
        self.name = params.unused_name(self) if params.is_registered(name) else name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Family:  # noqa: FBT001, FBT002
        """Move parameters, as torch does, and the tensors of the constraints and distributions that the family holds."""
        super()._apply(fn, recurse)
        for name, value in list(vars(self).items()):
            if isinstance(value, (constraints.Constraint, Distribution)):
                setattr(self, name, map_tensors(value, fn))
        return self


def _keeps_shape(support: constraints.Constraint, event_shape: Size) -> bool:
    return support.event_dim <= len(event_shape) and biject_to(support).forward_shape(event_shape) == event_shape


def _read_standardized(family: Family, _: Any) -> None:
    family._standardized = bool(family.standardized)
