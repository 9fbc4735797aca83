"""Models without one row of their data, and the density of that row: by draws that are moved, or by a fit anew."""

from __future__ import annotations

__all__ = ["MomentMatching", "Refit", "RowLeftOut", "log_mean_density"]

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.infer.compiled.coordinates import Coordinates
from pyro_genmodels.inference_data import to_arviz
from pyro_genmodels.inference_data.export import log_likelihood_of_data
from pyro_genmodels.inference_data.names import xarray_name
from pyro_genmodels.inference_data.sources import DrawSource
from pyro_genmodels.posteriors.fits import DrawnPosterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.moment_matching import match_moments
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.utils.errors import listed
from pyro_genmodels.utils.parallel import seeded
from pyro_genmodels.utils.rng import forked_rng

BATCH_SIZE = 1000
"""Largest number of draws whose densities are computed in one run."""


def log_mean_density(log_weights: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log of the weighted mean density of each row, (N,), in nats, and its standard error.

    Args:
        log_weights: log weights of each draw, (draws, N) or (draws, 1), which need not be normalised.
        log_p: log densities, (draws, N).
    """
    log_weights = log_weights.log_softmax(0)
    value = (log_weights + log_p).logsumexp(0)
    return value, (log_weights.exp() * torch.expm1(log_p - value)).square().sum(0).sqrt()


class RowLeftOut(Messenger):
    """A model without one row of its data, which is masked.

    Args:
        model: function with Pyro statements.
        args: its positional arguments.
        kwargs: its keyword arguments.
        name: name of the observed site.

    Attributes:
        mask: False for the row that is left out, (batch shape of the site). It may be changed in place.
    """

    def __init__(self, model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        with forked_rng(), handlers.side_effect_free(model):
            site: Any = traces.trace_of(model, args, kwargs).nodes[name]
        self.mask = torch.ones(site["fn"].batch_shape, dtype=torch.bool, device=site["value"].device)

    def leave_out(self, row: int) -> None:
        """Leave out the row with this number, and no other.

        Args:
            row: number of the row among all in the batch shape.
        """
        self.keep_all()
        self.mask.view(-1)[row] = False

    def keep_all(self) -> None:
        """Leave out no row."""
        self.mask.fill_(True)

    def densities(self, coordinates: Coordinates, z: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the log density of each row of the site at points, (n, rows), also of the one that is left out.

        Args:
            coordinates: unconstrained coordinates of the latent variables.
            z: the points, (n, dim).
            args: positional arguments of the model.
            kwargs: its keyword arguments.

        Raises:
            ValueError: if the site has not as many densities as it has rows.
        """
        whole = Problem(self.model, args, kwargs, progress=False, coordinates=coordinates)
        known = DrawnPosterior(whole, None, z[None])
        data = to_arviz(known, groups=("log_likelihood",), batch_size=BATCH_SIZE, progress=False)
        log_p = log_likelihood_of_data(data)[xarray_name(self.name)].double().flatten(0, 1).flatten(1)
        if log_p.shape[1] != self.mask.numel():
            shape = tuple(self.mask.shape)
            raise ValueError(f"{self.name!r} has {log_p.shape[1]} densities, but the batch shape {shape}.")
        return log_p

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            msg["mask"] = self.mask if msg["mask"] is None else msg["mask"] & self.mask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with self:
            return self.model(*args, **kwargs)


class MomentMatching:
    """Moment matching of one row after another, with one captured log density.

    Args:
        model: model without a row.
        source: the fit, with the model and its arguments.
        draws: draws of the latent variables, (chain, draw, ...) by name in ArviZ.
        log_weights: log weights with which they stand for the posterior, (draws,).
        max_pareto_k: largest k-hat that is trusted.

    Raises:
        ValueError: if there are no draws of a continuous latent variable; or as `log_density` does.
    """

    def __init__(
        self, model: RowLeftOut, source: DrawSource, draws: Mapping[str, Tensor], log_weights: Tensor, max_pareto_k: float
    ) -> None:
        self.model, self.args, self.kwargs = model, source.args, source.kwargs
        self.log_weights, self.max_pareto_k = log_weights, max_pareto_k
        with forked_rng():
            self._problem = Problem(model, self.args, self.kwargs, progress=False)
            names = self._problem.density.names
        if missing := [name for name in names if xarray_name(name) not in draws]:
            raise ValueError(f"Moment matching wants draws of {listed(names)}, but the fit has none of {listed(missing)}.")
        flat = {name: draws[xarray_name(name)].flatten(0, 1) for name in names}
        self.z = self._problem.density.unconstrain(flat).double()

    def __call__(self, row: int) -> tuple[float, float, float] | None:
        """Return the log predictive density of a row, in nats, its standard error, and k-hat; None if no map is found."""
        self.model.keep_all()
        found = match_moments(self.z, self.log_weights, self._whole, partial(self._without, row), self.max_pareto_k)
        if found is None:
            return None
        log_p = self.model.densities(self._problem.density, found.z, self.args, self.kwargs)[:, [row]]
        value, error = log_mean_density(found.log_weights[:, None], log_p)
        return float(value), float(error), found.pareto_k

    def _whole(self, z: Tensor) -> Tensor:
        """Return the log density of latent variables and all rows at points, (n, dim)."""
        self.model.keep_all()
        return self._problem.batched(z)[0]

    def _without(self, row: int, z: Tensor) -> Tensor:
        """Return the log density without a row at points, (n, dim)."""
        self.model.leave_out(row)
        return self._problem.batched(z)[0]


class Refit:
    """Refits without rows. All in a process share one captured log density.

    Args:
        model: model without a row.
        source: the fit, with the model and its arguments.
        method: the method.
        num_samples: number of draws of a guide.

    Attributes:
        rows: number of the row that is left out, for each seed.
    """

    def __init__(self, model: RowLeftOut, source: DrawSource, method: Method, num_samples: int) -> None:
        self.model, self.method, self.num_samples = model, method, num_samples
        self.args, self.kwargs = source.args, source.kwargs
        self.rows: dict[int, int] = {}
        self._problem: Problem | None = None

    def __call__(self, seed: int) -> tuple[float, float, float]:
        """Return the log predictive density of a row, in nats, its standard error, and k-hat of the weights of the refit.

        Raises:
            ValueError: if the site has not as many densities as it has rows.
        """
        row = self.rows[seed]
        self.model.leave_out(row)
        if self._problem is None:
            with forked_rng():
                self._problem = Problem(self.model, self.args, self.kwargs, progress=False)
                self._problem.density  # noqa: B018 - runs the model, which draws random numbers
        density = self._problem.density
        with seeded(seed):
            fit: Any = self.method.fit(self._problem)
            weighted = fit.psis(self.num_samples) if hasattr(fit, "psis") else None
            if weighted is not None and not weighted.is_estimate:
                draws, log_weights, k = weighted.draws, weighted.log_weights.cpu(), weighted.pareto_k
            else:
                draws, k = fit.get_samples(), float(getattr(fit, "pareto_k", torch.nan))
                log_weights = torch.zeros(len(next(iter(draws.values()))), dtype=torch.float64)
            log_p = self.model.densities(density, density.unconstrain(draws), self.args, self.kwargs)
        value, error = log_mean_density(log_weights[:, None], log_p[:, [row]])
        return float(value), float(error), k
