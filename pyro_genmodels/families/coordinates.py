r"""The base of families with a likelihood of each coordinate: the units of the data, and their checks.

Coordinates of real numbers are standardised: the networks model :math:`(x - m) / s`. Those whose likelihood has a scale, such
as counts, are left as they are; their m and s are units in which the likelihood reads the outputs of the networks.
"""

from __future__ import annotations

__all__ = ["CoordinateFamily"]

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.distributions import ComposeTransform, Transform, biject_to, constraints

from pyro_genmodels.distributions.likelihoods import Estimate, Likelihood, check_likelihood, inner_value
from pyro_genmodels.families.family import Family
from pyro_genmodels.families.input_warnings import DATA
from pyro_genmodels.families.standardization import Standardization, estimate, mean_and_deviation
from pyro_genmodels.families.validation import check_dtype, check_shape, check_values
from pyro_genmodels.utils.capture import can_be_read
from pyro_genmodels.utils.distributions import is_real
from pyro_genmodels.utils.supports import ByColumn
from pyro_genmodels.utils.tensors import as_tensor


class CoordinateFamily(Family):
    """Base of families with a likelihood of each coordinate.

    Args:
        event_shape: shape of one datum.
        likelihood: likelihood of one coordinate, or `Mixed` with one for each; None for `NormalLikelihood()`.
        support: set in which one coordinate lies; only with likelihoods of real numbers.
        missing: True if coordinates of the data may be missing, which are NaN.
        kwargs: passed to `Family`.

    Raises:
        TypeError: if it is no likelihood.
        ValueError: if events of that shape or support cannot have it, or ``standardize="jointly"`` is wanted for columns of
            different kinds; if coordinates may be missing, but have no one support.
    """

    located: Tensor
    _version = 2
    if_missing = "Drop or impute these rows first."
    """Advice of the error about values that are NaN."""

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        likelihood: Likelihood | None,
        support: constraints.Constraint = constraints.real,
        missing: bool = False,
        **kwargs: Any,
    ) -> None:
        likelihood = check_likelihood(likelihood)
        super().__init__(event_shape, support=likelihood.support_within(support), **kwargs)
        likelihood.check_event(self.event_shape)
        self.likelihood, self.missing = likelihood, missing
        if missing and self._is_mapped and (self.support.event_dim or isinstance(self.support, ByColumn)):
            raise ValueError(
                f"{type(self).__name__} with missing=True wants a support of single coordinates, but found {self.support}. "
                "Leave it out, and give each column a likelihood of its own: likelihood=Mixed.of(x)."
            )
        coordinates = [likelihood.at(i) for i in range(self.event_shape.numel())]
        located = torch.tensor([each.is_located for each in coordinates]).reshape(self.event_shape)
        self.register_buffer("located", located, persistent=False)
        self._all_located, self._any_located = bool(located.all()), bool(located.any())
        standardize = kwargs.get("standardize", False)
        self._standardize = standardize if self._any_located or likelihood.has_scale else False
        if "jointly" in str(self._standardize) and likelihood.is_mixed:
            raise ValueError(
                f"standardize={standardize!r} uses one mean and deviation for all coordinates, but the columns of "
                f'{type(likelihood).__name__} are of different kinds. Use True or "robust".'
            )

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, metadata, *args)
        kinds = [kind for _, kind in self.likelihood.groups(self.event_shape) if kind.has_scale or kind.is_located]
        since = min((kind.units_since for kind in kinds), default=1)
        if (metadata.get("version") or 1) < since and not self.standardized:
            self.standardized.fill_(True)  # parameters that were trained without units want none

    @property
    def measured(self) -> Likelihood:
        """The likelihood in the units of the data."""
        return self.likelihood.in_units(self.loc, self.scale) if self.likelihood.has_scale else self.likelihood

    @property
    def _is_mapped(self) -> bool:
        """True if the likelihood is one of real numbers, onto which a smaller support is mapped."""
        return is_real(self.likelihood.support) and not is_real(self.support)

    @property
    def pretransform(self) -> Transform | None:
        parts = [self._to_reals()] if self._is_mapped else []
        if self._standardize and self._any_located:
            loc, scale = self._location()
            parts.append(Standardization(loc, scale, self._check_of_data(), rounded=self._all_located))
        return ComposeTransform(parts) if len(parts) > 1 else parts[0] if parts else None

    def _location(self) -> tuple[Tensor, Tensor]:
        """Return what standardisation subtracts and divides by: 0 and 1 for coordinates that are left as they are."""
        if self._all_located:
            return self.loc, self.scale
        return torch.where(self.located, self.loc, 0.0), torch.where(self.located, self.scale, 1.0)

    @property
    def elementwise_pretransform(self) -> Transform | None:
        """The pretransform, as a bijection of single coordinates."""
        parts: list[Transform] = [biject_to(self.support).inv] if self._is_mapped else []
        if self._standardize and self._any_located:
            parts.append(Standardization(*self._location(), self._check_of_data(), event_dim=0, rounded=self._all_located))
        return ComposeTransform(parts) if len(parts) > 1 else parts[0] if parts else None

    def _check_of_data(self) -> Callable[[Tensor], None] | None:
        check = super()._check_of_data()
        if check is None or (self._all_located and not self.missing):
            return check
        return partial(self._check_located, check)

    def _check_located(self, check: Callable[..., None], y: Tensor) -> None:
        """Check the standardised coordinates of y (batch..., *event_shape), where they are known, as rows of one number."""
        if can_be_read(y):
            values = y[..., self.located].flatten()
            check(values[~values.isnan()], event_dim=0)

    @property
    def _has_moments(self) -> bool:
        own = type(self.likelihood).units is Likelihood.units and not self.likelihood.is_mixed
        return own and self._all_located and not self.likelihood.support.is_discrete and super()._has_moments

    def _units_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        jointly = "jointly" in str(self._standardize)
        if not (self.missing or self.likelihood.is_mixed or (jointly and self.support.is_discrete)):
            return self.likelihood.units(x, self._estimator(self.likelihood, x, self.loc, DATA.noun))
        if jointly:
            places: list[Any] = [(self.likelihood, x.flatten(), DATA.noun)]
        else:
            columns = zip(x.flatten(1).unbind(1), self.likelihood.labels(self.event_shape), strict=True)
            places = [(self.likelihood.at(i), column, f"{DATA.noun} in {label}") for i, (column, label) in enumerate(columns)]
        units = zip(*(self._units_of_column(*place) for place in places), strict=True)
        loc, scale = (torch.stack(part).expand(self.loc.numel()).reshape(self.event_shape) for part in units)
        return loc, scale

    def _units_of_column(self, likelihood: Likelihood, column: Tensor, noun: str) -> tuple[Tensor, Tensor]:
        """Return the location and scale, () each, of the known values of a column, (N,), called by a noun in messages.

        Raises:
            ValueError: if there are none.
        """
        known = column[~column.isnan()].unsqueeze(1)
        if not len(known):
            raise ValueError(f"{self.name} was given {noun} without any known value. Leave it out.")
        loc, scale = likelihood.units(known, self._estimator(likelihood, known, self.loc.new_zeros(1), noun))
        return loc.squeeze(0), scale.squeeze(0)

    def _estimator(self, likelihood: Likelihood, x: Tensor, like: Tensor, noun: str) -> Estimate:
        """Return the function from data as real numbers, (N, ...), to their location and scale; x is the data as they are."""
        if likelihood.support.is_discrete:  # probabilities are bounded, so that equal values are no fault
            return partial(mean_and_deviation, robust="robust" in str(self._standardize))

        def of(y: Tensor) -> tuple[Tensor, Tensor]:
            return estimate(
                x,
                biject_to(self.support).inv(y) if self._is_mapped else y,
                like,
                kind=self._standardize,
                owner=self.name,
                inputs=replace(DATA, noun=noun),
                has_density=self._trains_by_density,
            )

        return of

    def arranged(self, x: Any) -> Any:
        """Return data with the columns of a data frame in the order of this family, if its likelihood has names for them.

        Raises:
            ValueError: if the frame has other columns.
        """
        return self.likelihood.arranged(x, self.name)

    def _as_tensors(self, x: Any, context: Any) -> tuple[Any, Any]:
        return super()._as_tensors(self.arranged(x), context)

    def validate(self, x: Tensor) -> None:
        x = as_tensor(self.arranged(x), self.name)
        check_shape(self.name, x, self.event_shape)
        if is_validation_enabled():
            check_dtype(self.name, x, self.data_support)
            for places, likelihood in self.likelihood.groups(self.event_shape):
                self._check_values(x, list(places), likelihood)

    def _check_values(self, x: Tensor, places: list[int], likelihood: Likelihood) -> None:
        """Check the values of columns of x with one likelihood; if some are wrong, the error names the first such column."""
        support = self.support if self._is_mapped else likelihood.support
        some = x[:, places] if self.likelihood.is_mixed else x
        if self.missing:
            some = torch.where(some.isnan(), inner_value(support), some)
        label = f", in {self.likelihood.labels(self.event_shape)[places[0]]}," if self.likelihood.is_mixed else ""
        dtype = None if self._standardize and likelihood.is_located else self.loc.dtype
        try:
            check_values(
                f"{self.name}{label}",
                some,
                support,
                dtype=dtype,
                mapped=not is_real(support),
                if_missing="What is missing is NaN: replace these values by NaN." if self.missing else self.if_missing,
                if_outside="" if self._is_mapped else likelihood.if_outside,
            )
        except ValueError:
            for place in places if len(places) > 1 and self.likelihood.is_mixed else ():
                self._check_values(x, [place], likelihood)
            raise
