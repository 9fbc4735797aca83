"""Places of a model's latent variables in vectors: shared ones, and those of rows of data."""

from __future__ import annotations

__all__ = ["Layout", "find_layouts", "label"]

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.sites import is_deterministic
from pyro_genmodels.posteriors.row_data import RowPlate, placed, rows_of
from pyro_genmodels.utils.errors import listed


class OtherPlate(NamedTuple):
    """A plate of a variable that is not one over rows of data: its rows are coordinates of one vector."""

    name: str
    dim: int
    size: int


class LocalPlace(NamedTuple):
    """The place of a latent variable in the vector of its block.

    Attributes:
        name: name of the variable.
        transform: map from unconstrained coordinates to its support.
        batch_shape: its batch shape.
        others: plates whose rows are coordinates of the vector, the outermost first.
        unconstrained_shape: shape of one event in unconstrained coordinates.
        event_dim: number of dimensions of one event.
    """

    name: str
    transform: Any
    batch_shape: torch.Size
    others: tuple[OtherPlate, ...]
    unconstrained_shape: torch.Size
    event_dim: int

    @property
    def size(self) -> int:
        """Number of coordinates in the vector."""
        return self.unconstrained_shape.numel() * torch.Size([other.size for other in self.others]).numel()

    def row_mean(self, value: Tensor) -> Tensor:
        """Return the mean over rows of the unconstrained coordinates of a value, (size,)."""
        u, n = self.transform.inv(value), len(self.batch_shape)
        axes = [n + other.dim for other in self.others]
        return u.movedim(axes, list(range(n - len(axes), n))).reshape(-1, self.size).mean(0)

    def delta(self, u: Tensor) -> dist.Delta:
        """Return the distribution of the variable given its coordinates, (batch..., size), with the change of volume."""
        u = u.reshape((*u.shape[:-1], *[other.size for other in self.others], *self.unconstrained_shape))
        for i, other in enumerate(self.others):
            event = len(self.others) - i + len(self.unconstrained_shape)
            batch = u.dim() - event
            if batch < -other.dim:
                u = u.reshape(*[1] * (-other.dim - batch), *u.shape)
                batch = -other.dim
            u = u.movedim(batch, batch + other.dim).squeeze(batch + other.dim + 1)
        value = self.transform(u)
        log_density = self.transform.inv.log_abs_det_jacobian(value, u)
        log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + self.event_dim)
        return dist.Delta(value, log_density=log_density, event_dim=self.event_dim)


class Layout(NamedTuple):
    """Latent variables with one joint distribution, given the features of their rows and earlier variables.

    Attributes:
        plates: plates over rows of data, the outermost first; none for shared variables.
        sites: the variables.
        features: paths to arguments, a function of the arguments, or a list of one tensor.
        mask: path to the argument that masks them, or None.
        inverted: True if the mask is the opposite of that argument.
        parents: positions of the earlier layouts that they depend on.
    """

    plates: tuple[RowPlate, ...]
    sites: tuple[LocalPlace, ...]
    features: Any
    mask: tuple | None
    inverted: bool
    parents: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return sum(site.size for site in self.sites)

    def mask_of(self, arguments: Mapping[tuple, Any], indices: Sequence[Tensor]) -> Tensor | None:
        """Return the mask of the chosen rows in their batch dimensions, or None."""
        if self.mask is None:
            return None
        mask = placed(rows_of(arguments[self.mask], self.plates, indices), self.plates)
        return ~mask if self.inverted else mask


def label(plates: Sequence[Any]) -> str:
    """Return the names of plates, with slashes between."""
    return "/".join(plate.name for plate in plates)


def find_layouts(
    trace: Trace, prototype: Trace, given: Mapping[str, Any], arguments: Mapping[tuple, Any], features: Any, call: tuple
) -> list[Layout]:
    """Return the layouts of a model's latent variables: first the shared ones, then those in fewer plates.

    Args:
        trace: trace of the model, with observed and subsample sites.
        prototype: trace of the latent variables of the guide.
        given: indices that are given to plates, by name.
        arguments: arguments of the model by their paths.
        features: see `AmortizedGuide`.
        call: positional and keyword arguments of the model.

    Raises:
        ValueError: see `AmortizedGuide`.
    """
    finder = _Finder(trace, given, arguments, features, call)
    groups: dict[tuple, list[LocalPlace]] = {}
    sites: dict[str, Any] = dict(prototype.iter_stochastic_nodes())
    plates_of = {name: finder.plates(name, site) for name, site in sites.items()}
    if not any(plates_of.values()) and features is None:
        finder.use_observed = True
        plates_of = {name: finder.plates(name, site) for name, site in sites.items()}
    if not any(plates_of.values()):
        raise ValueError(
            "AmortizedGuide wants latent variables in a plate with data, but no argument of the model has one row for each row "
            f"of a plate around {listed(list(sites)) if sites else 'latent variables, of which there are none'}. Give it "
            "features=..., or take AutoFlow, which needs no data."
        )
    for name, site in sites.items():
        plates = plates_of[name]
        mask = finder.mask(name, site, plates)
        groups.setdefault((plates, mask), []).append(finder.site(name, site, plates))
    order = sorted(groups, key=lambda key: (len(key[0]), key[1] is not None))
    layouts = []
    for i, (plates, mask) in enumerate(order):
        names = {plate.name for plate in plates}
        parents = tuple(j for j, (other, _) in enumerate(order[:i]) if {plate.name for plate in other} <= names)
        path, inverted = mask or (None, False)
        found = finder.features_of(plates) if plates else ()
        layouts.append(Layout(plates, tuple(groups[plates, mask]), found, path, inverted, parents))
    return layouts


class _Finder:
    """The plates of a model and their data, as its first run shows them. See `find_layouts`."""

    def __init__(
        self, trace: Trace, given: Mapping[str, Any], arguments: Mapping[tuple, Any], features: Any, call: tuple
    ) -> None:
        self.sites: Any = traces.sample_sites(trace)
        self.given, self.arguments, self.features, self.call = given, arguments, features, call
        self.use_observed = False
        self.tensors = {path: x for path, x in arguments.items() if isinstance(x, Tensor)}
        self.observed = {
            name: site
            for name, site in self.sites.items()
            if site["is_observed"] and not site_is_subsample(site) and not is_deterministic(site)
        }
        self.with_data = {frame.name for site in self.observed.values() for frame in site["cond_indep_stack"]}

    def plates(self, name: str, site: Any) -> tuple[RowPlate, ...]:
        """Return the plates over rows of data around a variable, the outermost first; none if it is shared."""
        frames = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim if frame.vectorized else 0)
        for frame in frames:
            if not frame.vectorized or frame.size < 0:
                kind = "sequential, a loop over its rows" if not frame.vectorized else "one without a size"
                raise ValueError(f"The plate {frame.name!r} around {name!r} is {kind}. Use pyro.plate(name, size) in a with.")
        explicit = isinstance(self.features, Mapping) and label(frames) in self.features
        kept = frames if explicit else [frame for frame in frames if frame.name in self.with_data]
        plates = tuple(self._plate(frame) for frame in kept)
        found = self.features_of(plates) if plates else ()
        if not found:
            for frame in frames:
                if frame.full_size not in (None, frame.size):
                    raise ValueError(
                        f"The model takes {frame.size} of {frame.full_size} rows of plate {frame.name!r}, in which {name!r} "
                        "lies, and no argument of it has one row for each of them, so the data of the chosen rows are not "
                        f"known. Make them an argument, or give features={{{label(kept or frames)!r}: function of the "
                        "arguments}."
                    )
            return ()
        subsampled = [frame.name for frame in frames if frame not in kept and frame.full_size not in (None, frame.size)]
        if subsampled:
            raise ValueError(f"The plate {subsampled[0]!r} around {name!r} subsamples its rows, but has no data in it.")
        parts = self._parts_of(found)
        return tuple(
            plate._replace(
                has_all=plate.chooses
                and plate.size < plate.full_size
                and any(part.shape[axis] == plate.full_size for part in parts)
            )
            for axis, plate in enumerate(plates)
        )

    def _plate(self, frame: Any) -> RowPlate:
        fn = self.sites[frame.name]["fn"]
        path = None
        if frame.name in self.given:
            rows = self.given[frame.name]
            path = next((path for path, x in self.tensors.items() if x is rows), None)
            if path is None:
                raise ValueError(
                    f"The plate {frame.name!r} is given its rows, subsample=..., by a tensor that is no argument of the model, "
                    "so that the guide cannot choose the same rows. Make it an argument."
                )
        return RowPlate(frame.name, frame.dim, frame.full_size, frame.size, fn.subsample_size is not None, path)

    def features_of(self, plates: Sequence[RowPlate]) -> Any:
        """Return where the features of rows are: paths, a function or a list of a tensor; or () if they are not known.

        Raises:
            ValueError: if those that the user gave have other rows.
        """
        plates = [plate._replace(has_all=False) for plate in plates]
        key = label(plates)
        if self.features is not None and not isinstance(self.features, Mapping):
            labels = {tuple(f.name for f in site["cond_indep_stack"] if f.name in self.with_data) for site in self._latents()}
            if len(labels - {()}) > 1:
                raise ValueError(
                    "There are latent variables in several plates with data, so features= must be a dictionary by plate, as "
                    f"{{{key!r}: ...}}."
                )
        own = self.features.get(key) if isinstance(self.features, Mapping) else self.features
        if own is not None:
            found = own if callable(own) else [own]
            for part in self._parts_of(found):
                if not isinstance(part, Tensor) or not self._has_rows(part, plates):
                    shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                    sizes = ", ".join(f"{p.full_size} or {p.size}" if p.size != p.full_size else str(p.size) for p in plates)
                    raise ValueError(f"The features of plate {key!r} must be a tensor ({sizes}, ...), but found {shape}.")
            return found
        if self.use_observed:
            return self._observed_values(plates)
        given = {plate.given for plate in plates}
        return tuple(path for path, x in self.tensors.items() if path not in given and self._has_rows(x, plates))

    def _latents(self) -> list[Any]:
        return [site for site in self.sites.values() if not site["is_observed"] and not site_is_subsample(site)]

    def _parts_of(self, found: Any) -> list[Tensor]:
        if callable(found):
            return [found(*self.call[0], **self.call[1])]
        return [self.arguments[path] for path in found] if isinstance(found, tuple) else found

    @staticmethod
    def _has_rows(x: Tensor, plates: Sequence[RowPlate]) -> bool:
        """Return True if the first dimensions of a tensor are the rows of plates, all of them or those chosen."""
        return x.dim() >= len(plates) and all(
            x.shape[axis] in (plate.full_size, plate.size) for axis, plate in enumerate(plates)
        )

    def _observed_values(self, plates: Sequence[RowPlate]) -> Any:
        """Return the observed values in plates that do not subsample, (rows..., columns), in a list; () if there are none."""
        if any(plate.size != plate.full_size for plate in plates):
            return ()
        names, columns = {plate.name for plate in plates}, []
        for site in self.observed.values():
            if names <= {frame.name for frame in site["cond_indep_stack"]}:
                value = site["value"]
                batch = value.dim() - site["fn"].event_dim
                value = value.movedim([batch + plate.dim for plate in plates], list(range(len(plates))))
                columns.append(value.reshape(*[plate.size for plate in plates], -1))
        return [torch.cat(columns, -1)] if columns else ()

    def mask(self, name: str, site: Any, plates: Sequence[RowPlate]) -> tuple[tuple, bool] | None:
        """Return the path to the argument that masks a variable and True if it is inverted; or None without a mask.

        Raises:
            ValueError: naming the variable, if that argument is not found, or there are several.
        """
        mask = site["mask"]
        if mask is None or mask is True:
            return None
        found = []
        if isinstance(mask, Tensor):
            indices = [self.sites[plate.name]["value"] for plate in plates]
            for path, x in self.tensors.items():
                if x.dtype == torch.bool and x.dim() == len(plates) and plates and self._has_rows(x, plates):
                    rows = placed(rows_of(x, plates, indices), plates)
                    found += [(path, inverted) for inverted in (False, True) if _same(~rows if inverted else rows, mask)]
        if len(found) == 1:
            return found[0]
        problem = (
            "but not by an argument of the model with one entry for each row"
            if not found
            else f"and several arguments may be the mask: {listed(['.'.join(map(str, path)) for path, _ in found])}"
        )
        raise ValueError(
            f"The latent variable {name!r} is masked, {problem}. The guide must exclude the same rows: make the mask one "
            "argument of booleans, or mask the observed sites only."
        )

    def site(self, name: str, site: Any, plates: Sequence[RowPlate]) -> LocalPlace:
        """Return the place of a variable."""
        fn, transform = site["fn"], biject_to(site["fn"].support)
        rows = {plate.name for plate in plates}
        frames = sorted((f for f in site["cond_indep_stack"] if f.name not in rows), key=lambda f: f.dim)
        others = tuple(OtherPlate(frame.name, frame.dim, frame.size) for frame in frames)
        shape = transform.inv(site["value"]).shape[len(fn.batch_shape) :]
        return LocalPlace(name, transform, fn.batch_shape, others, shape, fn.event_dim)


def _same(x: Tensor, y: Tensor) -> bool:
    """Return True if two masks are equal wherever they are broadcast."""
    try:
        return bool((x == y).all()) and torch.broadcast_shapes(x.shape, y.shape) == x.shape
    except RuntimeError:  # shapes that do not broadcast
        return False
