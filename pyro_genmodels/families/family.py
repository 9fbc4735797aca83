r"""The base of all families: a module that returns a Pyro distribution given a context, with a model and a guide to train it.

.. math:: x_n \sim p_\theta(x \mid c_n), \quad n = 1, \dots, N, \text{ independently.}

When a model is trained on a minibatch of B rows out of N, the plate scales each row's term by N / B, so that the gradient is an
unbiased estimate of the gradient over all data.
"""

from __future__ import annotations

__all__ = ["Family", "Standardize", "StandardizeContext"]

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from torch import Size, Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform, biject_to, constraints

from pyro_genmodels._pyro import params
from pyro_genmodels.datasets.statistics import ColumnStatistics
from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.families.context import (
    Context,
    Labels,
    StandardizeContext,
    VectorContext,
    as_context_module,
    output_length,
)
from pyro_genmodels.families.input_warnings import DATA, InputCheck
from pyro_genmodels.families.standardization import Standardization, Standardize, estimate, estimate_of_all
from pyro_genmodels.families.validation import (
    check_constructor,
    check_dtype,
    check_one_per_row,
    check_shape,
    check_values,
)
from pyro_genmodels.utils.distributions import is_real, map_tensors, over_events
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.tensors import as_tensor

_OWN = ("event_shape", "context", "support", "loc", "scale", "standardized")
"""Attributes that `Family.__init__` sets."""


class Family(PyroModule):
    """Base of all families.

    In a model of your own, ``pyro.sample("x", family(), obs=x)``, the family's parameters are trained with the rest of the
    model. To keep a family fixed, such as a prior that was learned before, call ``family.requires_grad_(False)``. With Pyro's
    own losses pass a context by position, ``svi.step(x, context)``, because Pyro's handlers have a keyword argument `context`.

    The initial weights are drawn here, when the family is built: for reproducible ones call ``pyro.set_rng_seed(0)`` before.

    Data and contexts may be tensors, numpy arrays, data frames or lists. They may be in float64 in a family of lower precision:
    the mean is subtracted in float64, and networks, draws and log densities have the precision of the family.

    Args:
        event_shape: shape of one datum.
        context: what the distribution is conditioned on: 0 for nothing, the length of a float vector, `Labels`, or a module
            whose output (..., out_features) is passed to the networks.
        support: set in which one coordinate of the data lies. An interval is mapped to the real line and the map is counted in
            the density; values at the ends of the interval, which would map to infinity, are refused. Integers are not mapped.
            ``constraints.stack([...], dim=-1)`` has one set for each column.
        standardize: True for networks that see data of mean 0 and standard deviation 1 in each coordinate (after the map
            above). "jointly" uses one mean and one deviation for all coordinates, which suits coordinates of one kind, such as
            the pixels of an image. "robust" uses the median and the interquartile range (divided by 1.349, that of a normal
            distribution), which a few far rows do not move; where more than half of the values are one number, the median
            distance of the others from it (divided by .674). "jointly robust" uses those of all coordinates together.
            `train` computes them from all its data, and `model` from the first data it is given in training. In a model of your
            own, ``pyro.sample("x", family(), obs=x)``, call ``family.standardize(x)`` first. They are saved with the parameters
            and counted in the density. A coordinate that is constant is divided by its size, with a warning: a density can
            become arbitrarily high there, so that log densities mean nothing.
        standardize_context: True for networks that see float contexts of mean 0 and deviation 1 too, "robust" for median and
            interquartile range, False to leave contexts unchanged. Only contexts given by their length are standardised; a
            module of your own is given the contexts unchanged. Mean and deviation are computed together with those of the data,
            in a model of your own by ``family.standardize(x, context)``, and saved in ``family.context``.
        name: unique name under which Pyro stores the parameters; by default the class name and a free number. If another family
            has the name already, that family gets a new one. Save a family by its `state_dict`, not by Pyro's param store.

    Attributes:
        arguments: arguments of the constructor by name, from which a checkpoint rebuilds the family.
        loc: mean that standardisation subtracts, (*event_shape).
        scale: standard deviation that standardisation divides by, (*event_shape).
    """

    arguments: dict[str, Any]
    _trains_by_density = True  # with which the loss falls for ever where data are constant
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the constructor's arguments, which `__new__` would hide from `help` and `inspect`."""
        super().__init_subclass__(**kwargs)
        cls.__signature__ = _constructor_signature(cls)

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
        standardize_context: StandardizeContext = True,
        name: str | None = None,
    ) -> None:
        if not (name is None or isinstance(name, str)):
            raise TypeError(f"{type(self).__name__} wants a string as its name, but found {name!r}.")
        super().__init__(name or params.unused_name(self))
        support = check_constructor(type(self).__name__, event_shape, support)
        self.event_shape = Size(event_shape)
        if not (isinstance(standardize, bool) or standardize in ("jointly", "robust", "jointly robust")):
            raise ValueError(
                f'standardize wants True, False, "jointly", "robust" or "jointly robust", but found {standardize!r}.'
            )
        self.context = as_context_module(context, standardize=standardize_context)
        self.support = support
        self._standardize: Standardize = False if support.is_discrete else standardize
        self._standardized = False
        self._data_check = InputCheck(DATA)
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

    def __getattr__(self, name: str) -> Any:
        if "_modules" in self.__dict__:  # else not built yet
            if name in self._buffers:
                return self._buffers[name]
            if params.is_stored(self, name):
                return self._modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(GenerativeDistribution, name):
                raise
        call = "family()" if self.__dict__.get("_modules", {}).get("context") is None else "family(context)"
        raise AttributeError(
            f"{type(self).__name__} is a module that returns a distribution, and {name} belongs to the distribution: call the "
            f"family first, as in {call}.{name}."
        )

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
                raise self._superfluous(context)
            return None
        if context is None:
            raise ValueError(f"{self.name} wants a context, but was given none. Pass context=...")
        embedded: Tensor = self.context(context).to(self.loc.dtype)
        if isinstance(self.context, VectorContext):
            self.context.warn_if_far(embedded, self.name, in_training=self._in_training)
        return embedded

    def _superfluous(self, context: Any) -> ValueError:
        """Build the error for a context, or data in its place, that a family without a context was given."""
        shape, floats = tuple(getattr(context, "shape", ())), isinstance(context, Tensor) and context.is_floating_point()
        wanted = str(shape[-1]) if len(shape) > (0 if floats else 1) else "Labels(k)"
        convert = "" if floats or wanted == "Labels(k)" else " and pass it as floats"
        log_prob = "family().log_prob(x)" if getattr(self(), "density", "exact") == "exact" else "log_likelihood(family, x)"
        return ValueError(
            f"{self.name} was built without a context, but was given {shape}. Build it with {type(self).__name__}(..., "
            f"context={wanted}){convert}. If you passed data, use {log_prob}."
        )

    @property
    def _in_training(self) -> bool:
        """True in training mode while gradients are recorded."""
        return self.training and torch.is_grad_enabled()

    @property
    def pretransform(self) -> Transform | None:
        """Bijection from the data to what the networks model: first onto the reals, then to mean 0 and deviation 1."""
        parts = []
        if not (is_real(self.support) or self.support.is_discrete):
            parts.append(self._to_reals())
        if self._standardize:
            parts.append(Standardization(self.loc, self.scale, self._check_of_data()))
        return ComposeTransform(parts) if len(parts) > 1 else parts[0] if parts else None

    def _to_reals(self) -> Transform:
        return over_events(biject_to(self.support).inv, len(self.event_shape))

    def _check_of_data(self) -> Callable[[Tensor], None] | None:
        """Return the check of the first values that networks see in training, or None if it was made."""
        if not (self._data_check.due and self._in_training):
            return None
        return partial(
            self._data_check,
            owner=self.name,
            event_dim=len(self.event_shape),
            standardized=self._standardized,
            jointly="jointly" in str(self._standardize),
        )

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set mean and deviation to those of data and contexts, also if they were set before.

        A family that was built with ``standardize=False`` keeps those of the data, and likewise for contexts.

        Args:
            x: rows of data, (N, *event_shape).
            context: contexts of these rows, (N, ...). With None, theirs are set by the first contexts that `model` is given in
                training.

        Raises:
            TypeError: if x holds no numbers.
            ValueError: if x is not data of this family, or the precision of the family cannot hold mean and deviation.
        """
        x, context = self._as_tensors(x, context)
        self.validate(x)
        if context is not None and self.context is None:
            self.embed(context)  # raises
        check_one_per_row(self.context, context, len(x))
        if self._standardize:
            self._standardize_data(x)
        if context is not None:
            self._standardize_contexts(context)

    def prepare(self, x: Tensor, context: Tensor | None = None, *, statistics: Sequence[ColumnStatistics] = ()) -> None:
        """Standardise by the data x, (N, *event_shape), and their contexts, (N, ...), unless that has been done.

        `train` calls this with all data before the first step, and `model` with the first data it is given in training.

        Args:
            x: rows of data.
            context: contexts of these rows, or None.
            statistics: statistics of all data, and of all contexts, if the given rows are but a sample. Mean and deviation are
                then those of all data. What is not a mean or a deviation, such as the median of robust standardisation, is that
                of the sample.
        """
        if self._standardize and not self._standardized:
            self._standardize_data(x)
            if statistics and self._has_moments:
                self._set_units(*self._units_of_all(statistics[0]))
        if context is not None:
            due = self._due_contexts()
            self._standardize_contexts(context, again=False)
            for module in due if len(statistics) > 1 else ():
                module.standardize_by(statistics[1], self.name)

    @property
    def is_prepared(self) -> bool:
        """True if `prepare` has nothing to do."""
        return not (self._standardize and not self._standardized) and not self._due_contexts()

    @property
    def _has_moments(self) -> bool:
        """True if location and scale are mean and deviation of the data themselves."""
        return is_real(self.support) and "robust" not in str(self._standardize)

    def _units_of_all(self, found: ColumnStatistics) -> tuple[Tensor, Tensor]:
        """Return the location and scale of data by the statistics of all rows, like `_units_of`."""
        return estimate_of_all(found, self.loc, kind=self._standardize, owner=self.name, inputs=DATA)

    def _set_units(self, loc: Tensor, scale: Tensor) -> None:
        self.loc.copy_(loc)
        self.scale.copy_(scale)

    def _standardize_data(self, x: Tensor) -> None:
        with torch.no_grad():
            x = self._as_reals(x.to("cpu" if self.loc.device.type == "mps" else self.loc.device))  # mps has no float64
            self._set_units(*self._units_of(x))
            self.standardized.fill_(True)
        self._standardized = True

    def _units_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the location and scale of data, (*event_shape) each, in double precision."""
        return estimate(
            x,
            x if is_real(self.support) else self._to_reals()(x),
            self.loc,
            kind=self._standardize,
            owner=self.name,
            inputs=DATA,
            has_density=self._trains_by_density,
        )

    def _standardize_contexts(self, context: Tensor, *, again: bool = True) -> None:
        """Standardise float contexts. Unless `again`, those of modules that have a mean and a deviation keep these."""
        for module in self._context_modules():
            if isinstance(module, VectorContext) and (again or module.due):
                module.standardize(context, self.name)

    def _due_contexts(self) -> list[VectorContext]:
        """Return the contexts whose mean and deviation are not known yet."""
        return [module for module in self._context_modules() if isinstance(module, VectorContext) and module.due]

    def _context_modules(self) -> list[nn.Module | None]:
        """Return the modules that are given the contexts. A family with further ones adds them."""
        return [self.context]

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
        x, context = self._accept(x, context)
        plate, distribution = self._plate(x, context, size), self(context)  # random weights are drawn outside the plate
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
        return self._plate(x, context, size)

    def _plate(self, x: Tensor | None, context: Tensor | None, size: int | None) -> pyro.plate:
        rows = len(x) if x is not None else size if size is not None else None if context is None else len(context)
        if rows is None:
            raise ValueError(f"{self.name}.model wants data x, a context or size=, the number of rows to draw.")
        check_one_per_row(self.context, context, rows)
        if size is not None:
            check_positive_int(f"{self.name}.model", size=size)
        if size is None or size == rows:
            return pyro.plate("data", rows, device=self.loc.device)
        if size < rows:
            raise ValueError(f"size={size} is the number of data in all, but x alone has {rows} rows.")
        return pyro.plate("data", size, subsample=torch.arange(rows, device=self.loc.device))

    # Checks of the data.

    def _as_tensors(self, x: Any, context: Any) -> tuple[Any, Any]:
        """Return data and contexts as tensors. Contexts for a module of your own are left unchanged."""
        if x is not None:
            tensor = as_tensor(x, self.name)
            x = tensor if isinstance(x, Tensor) else tensor.to(self.loc.device)
        if isinstance(self.context, (Labels, VectorContext)) and context is not None:
            context = self.context.as_tensor(context)
        return x, context

    def _accept(self, x: Any, context: Any) -> tuple[Any, Any]:
        """Check data and contexts that a model or guide is given, and return them as tensors.

        In training, the family is standardised by them first.
        """
        x, context = self._as_tensors(x, context)
        if x is not None:
            self.validate(x)
            if self._in_training:
                check_one_per_row(self.context, context, len(x))
                self.prepare(x, context)
            if x.is_floating_point() and not self._standardize:
                x = x.to(self.loc.dtype)
        return x, context

    def validate(self, x: Tensor) -> None:
        """Check that x is data of this family. Nothing is changed.

        Args:
            x: rows of data, (N, *event_shape).

        Raises:
            TypeError: if x holds no numbers.
            ValueError: if its shape, dtype or values are not those of this family's data. Values are checked only while Pyro's
                validation is on.
        """
        x = as_tensor(x, self.name)
        check_shape(self.name, x, self.event_shape)
        if is_validation_enabled():
            check_dtype(self.name, x, self.data_support)
            largest = None if self._standardize else self.loc.dtype
            check_values(self.name, x, self.data_support, dtype=largest, mapped=self.pretransform is not None)

    @property
    def data_support(self) -> constraints.Constraint:
        """Set in which one coordinate of the data lies: `support`, or the integers that a family with levels models."""
        return self.support

    # Saving, copying and moving.

    def upgrade_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a `state_dict` completed by tensors that versions before 0.2 did not save, as `load_state_dict` does."""
        state = dict(state)
        for prefix, module in self.named_modules():
            if hasattr(module, "complete_state"):
                module.complete_state(state, f"{prefix}.")
        return state

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
        if "_data_check" not in state:  # pickled by a version before 0.2
            self._data_check = InputCheck(DATA)
            for module in self._context_modules():
                if isinstance(module, VectorContext):
                    module.to(self.loc)
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


def _constructor_signature(cls: Any) -> inspect.Signature:
    return inspect.Signature(list(inspect.signature(cls.__init__).parameters.values())[1:])


Family.__signature__ = _constructor_signature(Family)


def _read_standardized(family: Family, _: Any) -> None:
    family._standardized = bool(family.standardized)
