r"""Tables with columns of different kinds: one likelihood for each column.

.. math:: p(x \mid \theta) = \prod_j p_j(x_j \mid \theta_j)

Networks return parameters (..., d, k) for the largest number k that a column takes, and see as many features; a column with
fewer uses the first ones. The distribution of each kind is computed for all columns at once, and taken where it belongs.
"""

from __future__ import annotations

__all__ = ["Mixed", "Selected"]

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from pyro_genmodels.distributions.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    Likelihood,
    NormalLikelihood,
)
from pyro_genmodels.distributions.scaled_likelihoods import BetaLikelihood, LogNormalLikelihood, NegativeBinomialLikelihood
from pyro_genmodels.utils.distributions import is_real
from pyro_genmodels.utils.errors import listed, unknown_name
from pyro_genmodels.utils.supports import ByColumn
from pyro_genmodels.utils.tensors import as_tensor, with_columns

MAX_CLASSES = 20
"""Largest number of different whole numbers in a column that is taken for classes."""
MIN_RATIO = 10.0
"""Smallest ratio of largest to smallest value of a column of positive numbers that is modelled by factors."""
MIN_DISPERSION = 0.5
"""Smallest ratio of variance to mean of a column that is taken for counts."""


class Selected(dist.TorchDistribution):
    """Univariate distributions, each of one of several kinds.

    Args:
        parts: distribution of each kind, all of one batch shape.
        likelihoods: likelihood of each kind.
        kind: number of the kind of each element, broadcast to the batch shape.
        dtype: data type of samples and log densities.
        support: set of the values, or None if it is not known.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        parts: Sequence[Distribution],
        likelihoods: Sequence[Likelihood],
        kind: Tensor,
        dtype: torch.dtype,
        support: constraints.Constraint | None,
    ) -> None:
        self.parts, self.likelihoods, self.kind, self.dtype, self._support = tuple(parts), likelihoods, kind, dtype, support
        super().__init__(self.parts[0].batch_shape, Size(), validate_args=False)

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint:
        if self._support is None:
            raise NotImplementedError("The support of these elements is not known.")
        return self._support

    @property
    def has_rsample(self) -> bool:
        return all(part.has_rsample for part in self.parts)

    @property
    def mean(self) -> Tensor:
        return self._select(lambda k: self.parts[k].mean)

    @property
    def variance(self) -> Tensor:
        return self._select(lambda k: self.parts[k].variance)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Selected:
        parts = [part.expand(Size(batch_shape)) for part in self.parts]
        return Selected(parts, self.likelihoods, self.kind, self.dtype, self._support)

    def log_prob(self, value: Tensor) -> Tensor:
        def of_kind(k: int) -> Tensor:
            own = self.likelihoods[k].fill(value, self.kind == k)
            return self.parts[k].log_prob(self.likelihoods[k].cast(own, self.dtype))

        return self._select(of_kind)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._select(lambda k: self.parts[k].sample(Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._select(lambda k: self.parts[k].rsample(Size(sample_shape)))

    def _select(self, of_kind: Callable[[int], Tensor]) -> Tensor:
        """Return for each element the value that a function of its kind gives it."""
        return _selected(self.kind, len(self.parts), lambda k: of_kind(k).to(self.dtype))


def _selected(kind: Tensor, kinds: int, of_kind: Callable[[int], Tensor]) -> Tensor:
    """Return for each element the value that a function of its kind gives it."""
    chosen = of_kind(0)
    for k in range(1, kinds):
        chosen = torch.where(kind == k, of_kind(k), chosen)
    return chosen


@dataclass(frozen=True)
class Mixed(Likelihood):
    """One likelihood for each column of a table, for events of shape (d,).

    Args:
        likelihoods: likelihood of each column: any but another `Mixed`.
        names: names of the columns, for error messages; by default their numbers. A data frame has its columns matched by name.

    Raises:
        TypeError: if one of them is no likelihood.
        ValueError: if there are none, or not as many different names.

    Example:
        >>> from pyro_genmodels import VAE, Mixed, NormalLikelihood, CategoricalLikelihood
        >>> from pyro_genmodels.families import PoissonLikelihood
        >>> kinds = [NormalLikelihood(), PoissonLikelihood(), CategoricalLikelihood(3)]
        >>> vae = VAE((3,), likelihood=Mixed(kinds, names=["age", "visits", "ward"]))
        >>> vae().sample((5,)).shape
        torch.Size([5, 3])
    """

    likelihoods: Sequence[Likelihood]
    names: Sequence[str] | None = None
    loc: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    scale: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    places: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = [each for each in self.likelihoods if not isinstance(each, Likelihood) or each.is_mixed]
        if found:
            raise TypeError(f"Mixed wants a likelihood such as NormalLikelihood() for each column, but found {found[0]!r}.")
        object.__setattr__(self, "likelihoods", tuple(self.likelihoods))
        if not self.likelihoods:
            raise ValueError("Mixed wants at least one column.")
        if self.names is None:
            return
        names = tuple(map(str, self.names))
        if len(set(names)) != len(self.likelihoods):
            raise ValueError(
                f"Mixed wants {len(self.likelihoods)} different names, one for each likelihood, but found {listed(names)}."
            )
        object.__setattr__(self, "names", names)

    @classmethod
    def of(cls, x: Any, *, names: Sequence[str] | None = None, kinds: Mapping[Any, Likelihood] | None = None) -> Mixed:
        """Return a likelihood for each column of a table, by what the columns hold.

        - zeros and ones: `BernoulliLikelihood`;
        - whole numbers from 0 of at most 20 different values, all of them up to the largest: `CategoricalLikelihood`;
        - other whole numbers from 0 whose variance is at least half of their mean: `NegativeBinomialLikelihood`;
        - numbers strictly between 0 and 1: `BetaLikelihood`;
        - other positive numbers of which the largest is at least 10 times the smallest: `LogNormalLikelihood`;
        - all others: `NormalLikelihood`.

        Numbers do not tell all: name the columns that you know better by `kinds`.

        Args:
            x: table of numbers (N, d), such as ``read_table(path).x``, with NaN for missing values.
            names: names of the columns, such as ``read_table(path).columns``; by default those of a data frame. Those of a
                frame in another order set the order of the likelihoods.
            kinds: likelihoods of some columns, by their names, or by their numbers in a table without names.

        Raises:
            TypeError: if x holds no numbers; the message names the column.
            ValueError: if x has another shape or a column without any value, or `kinds` names none of the columns.

        Example:
            >>> import pandas
            >>> frame = pandas.DataFrame({"age": [31.5, 40.25, 28.0], "smokes": [0, 1, 1], "visits": [0, 250, 12]})
            >>> from pyro_genmodels.families import PoissonLikelihood
            >>> Mixed.of(frame, kinds={"visits": PoissonLikelihood()}).likelihoods[1:]
            (BernoulliLikelihood(), PoissonLikelihood())
        """
        if hasattr(x, "columns"):
            own = [str(name) for name in x.columns]
            names = own if names is None else [str(name) for name in names]
            x = with_columns(x, names, "Mixed.of") if sorted(own) == sorted(names) else x
        table = as_tensor(x, "Mixed.of")
        if table.dim() != 2 or not table.numel():
            raise ValueError(f"Mixed.of wants a table of shape (rows, columns), but found {tuple(table.shape)}.")
        keys: Sequence[Any] = range(table.shape[1]) if names is None else [str(name) for name in names]
        kinds = {key if names is None else str(key): kind for key, kind in (kinds or {}).items()}  # frames may name by numbers
        for key in kinds:
            if key not in keys:
                raise unknown_name("column", str(key), map(str, keys))
        if len(keys) != table.shape[1]:
            raise ValueError(f"Mixed.of wants a name for each of {table.shape[1]} columns, but found {len(keys)}.")
        found = [kinds.get(key) or _likelihood_of(key, column) for key, column in zip(keys, table.unbind(1), strict=True)]
        return cls(found, names)

    is_mixed = True

    @property
    def num_outputs(self) -> int:
        """Largest number of raw parameters of a column."""
        return max(each.num_outputs for each in self.likelihoods)

    @property
    def num_inputs(self) -> int:
        """Largest number of features of a column."""
        return max(each.num_inputs for each in self.likelihoods)

    @property
    def has_rsample(self) -> bool:
        """True if samples of all columns carry gradients."""
        return all(each.has_rsample for each in self.likelihoods)

    @property
    def has_scale(self) -> bool:
        """True if one of the columns has a scale."""
        return any(each.has_scale for each in self.likelihoods)

    @property
    def is_located(self) -> bool:
        """True if values of one of the columns are standardised."""
        return any(each.is_located for each in self.likelihoods)

    @property
    def support(self) -> constraints.Constraint:
        if all(is_real(each.support) for each in self.likelihoods):
            return constraints.real
        return ByColumn([each.support for each in self.likelihoods])

    def support_within(self, support: constraints.Constraint) -> constraints.Constraint:
        if not is_real(support):
            raise ValueError(
                f"Mixed has a support for each column, but found support={support}. Leave it out, and choose for such a column "
                "LogNormalLikelihood(), GammaLikelihood() or BetaLikelihood()."
            )
        return self.support

    def check_event(self, event_shape: Sequence[int]) -> None:
        if tuple(event_shape) != (len(self.likelihoods),):
            raise ValueError(
                f"Mixed has {len(self.likelihoods)} likelihoods, for events of shape ({len(self.likelihoods)},), but found "
                f"event_shape={tuple(event_shape)}."
            )

    def labels(self, event_shape: Sequence[int]) -> list[str]:
        names = self.names or range(len(self.likelihoods))
        return [f"column {name!r}" for name in names]

    def arranged(self, x: Any, owner: str) -> Any:
        return x if self.names is None else with_columns(x, self.names, owner)

    def in_units(self, loc: Tensor, scale: Tensor) -> Mixed:
        return self._with(loc=loc, scale=scale)

    def at(self, place: int | Tensor) -> Likelihood:
        if isinstance(place, Tensor):
            return self._with(places=place)
        one = self.likelihoods[place]
        return one if self.loc is None or self.scale is None else one.in_units(self.loc[place], self.scale[place])

    def groups(self, event_shape: Sequence[int]) -> list[tuple[tuple[int, ...], Likelihood]]:
        kinds, of_column = self._kinds()
        return [(tuple(i for i, k in enumerate(of_column) if k == number), kind) for number, kind in enumerate(kinds)]

    def map(self, function: Callable[[Likelihood], Likelihood]) -> Mixed:
        return self._with(likelihoods=tuple(function(each) for each in self.likelihoods))

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x unchanged; each column is cast by its own likelihood."""
        return x

    def fill(self, x: Tensor, seen: Tensor) -> Tensor:
        kind, kinds = self._kind_of_element(x.device)
        return _selected(kind, len(kinds), lambda k: kinds[k].fill(x, seen))

    def encode(self, x: Tensor) -> Tensor:
        kind, kinds = self._kind_of_element(x.device)
        units, dtype = self._units_of_element(), x.dtype if x.is_floating_point() else torch.get_default_dtype()

        def of_kind(k: int) -> Tensor:
            own = kind == k
            likelihood = _masked_units(kinds[k], units, own)
            features = likelihood.encode(likelihood.cast(likelihood.fill(x, own), dtype)).to(dtype)
            return F.pad(features, (0, self.num_inputs - features.shape[-1]))

        return _selected(kind.unsqueeze(-1), len(kinds), of_kind)

    def __call__(self, params: Tensor) -> Selected:
        kind, kinds = self._kind_of_element(params.device)
        units = self._units_of_element()

        def of_kind(k: int) -> Distribution:  # elements of other kinds get outputs of 0, so that no gradient is infinite
            own = kind == k
            outputs = params[..., : kinds[k].num_outputs].where(own.unsqueeze(-1), 0.0)
            return _masked_units(kinds[k], units, own)(outputs)

        support = self.support if self.places is None else None
        return Selected([of_kind(k) for k in range(len(kinds))], kinds, kind, params.dtype, support)

    def _with(self, **changes: Any) -> Mixed:
        new = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(new, name, value)
        return new

    def _kinds(self) -> tuple[list[Likelihood], list[int]]:
        """Return the different likelihoods, and the number of that of each column among them."""
        kinds: list[Likelihood] = []
        for likelihood in self.likelihoods:
            if likelihood not in kinds:
                kinds.append(likelihood)
        return kinds, [kinds.index(likelihood) for likelihood in self.likelihoods]

    def _kind_of_element(self, device: torch.device) -> tuple[Tensor, list[Likelihood]]:
        """Return the number of the kind of each element, (d,) or of the shape of `places`, and the kinds."""
        kinds, of_column = self._kinds()
        kind = torch.tensor(of_column, device=device)
        return kind if self.places is None else kind[self.places], kinds

    def _units_of_element(self) -> tuple[Tensor, Tensor] | None:
        """Return location and scale of each element, if they are known."""
        if self.loc is None or self.scale is None:
            return None
        return (self.loc, self.scale) if self.places is None else (self.loc[self.places], self.scale[self.places])


def _masked_units(likelihood: Likelihood, units: tuple[Tensor, Tensor] | None, own: Tensor) -> Likelihood:
    """Return a likelihood in the units of the elements that are its own, and in units of 1 for others."""
    if units is None or not likelihood.has_scale:
        return likelihood
    return likelihood.in_units(units[0].where(own, 0.0), units[1].where(own, 1.0))


def _likelihood_of(name: Any, column: Tensor) -> Likelihood:
    """Return a likelihood that suits the values of a column, (N,)."""
    values = column[~column.isnan()].double()
    if not len(values):
        raise ValueError(f"Mixed.of found no value in the column {name!r}. Drop it.")
    low, high = float(values.min()), float(values.max())
    if low >= 0 and bool((values % 1 == 0).all()):
        if high <= 1:
            return BernoulliLikelihood()
        classes = len(values.unique())
        if classes <= MAX_CLASSES and classes == high + 1:
            return CategoricalLikelihood(classes)
        if values.var(correction=0) >= MIN_DISPERSION * values.mean():
            return NegativeBinomialLikelihood()
    if low > 0 and high < 1:
        return BetaLikelihood()
    return LogNormalLikelihood() if low > 0 and high >= MIN_RATIO * low else NormalLikelihood()
