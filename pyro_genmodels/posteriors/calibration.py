r"""`simulation_based_calibration`: posteriors of data that the model makes, and the ranks of the true values among their draws.

.. math:: z^* \sim p(z), \quad y \sim p(y \mid z^*), \quad z_1, \dots, z_L \sim q(z \mid y), \quad
    \mathrm{rank} = \#\{l : z_l < z^*\} .

What follows from the ranks stands in `pyro_genmodels.posteriors.ranks`.
"""

from __future__ import annotations

__all__ = ["simulation_based_calibration"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.inference_data import to_arviz
from pyro_genmodels.inference_data.export import chain_diagnostics, draws_of_data
from pyro_genmodels.posteriors.choose import default_method
from pyro_genmodels.posteriors.conditioned import ConditionedModel
from pyro_genmodels.posteriors.diagnosis import scalars
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.posteriors.ranks import LOG_DENSITY, Calibration
from pyro_genmodels.posteriors.replicated import JointSampler
from pyro_genmodels.posteriors.uniformity import ranks_of
from pyro_genmodels.utils.errors import check_positive_int, listed, type_with_article, warn_caller
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, option_names, runs_models
from pyro_genmodels.utils.parallel import Outcome, run_all, seeded, spawn_seeds
from pyro_genmodels.utils.rng import forked_rng


@runs_models()
def simulation_based_calibration(
    model: Callable[..., Any],
    *args: Any,
    method: Any = None,
    num_simulations: int = 200,
    num_draws: int = 100,
    observed: Sequence[str] | None = None,
    log_density: bool | None = None,
    n_jobs: int = 1,
    seed: int | None = None,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Calibration:
    """Fit data that the model makes, and rank the true values among draws of the posteriors.

    The arguments of the model stay the same in all simulations; the values at its observed sites are drawn. What the model
    computes from its data elsewhere, such as lagged values, stays that of the given data, and is warned of if it is found.

    Args:
        model: function with Pyro statements.
        args: positional arguments of the model.
        method: the way to the posterior, such as ``FlowGuide()``; by default the one that `posterior` takes. Or a function of a
            model, its arguments (a tuple) and its keyword arguments (a dictionary) that returns a fit: anything that `to_arviz`
            takes, such as an `MCMC` run or draws by name, (chain, draw, ...). The data are ``model.data``, by name. Or an
            amortised posterior with a method ``samples_given(num_samples, **data)``, which takes the data of all simulations,
            (simulations, ...) by name, and returns draws, (draw, simulations, ...) by name.
        num_simulations: number of simulations.
        num_draws: number of draws of each posterior. Chains are thinned to as many.
        observed: names of the sites that hold data; by default those that the model observes.
        log_density: True to rank the log density of latent variables and data too, which needs continuous latent variables. By
            default for methods such as ``FlowGuide()`` only.
        n_jobs: number of processes; the extra ``parallel`` runs more than one, by joblib. Ranks do not depend on it.
        seed: seed of all random numbers; None takes one from torch's.
        progress: True for a progress bar.
        model_kwargs: keyword arguments of the model, also one called ``method``.
        kwargs: keyword arguments of the model.

    Raises:
        TypeError: if the method is none.
        ValueError: if a count is not positive, or the model observes nothing or has a `pyro.factor`.
        RuntimeError: if all simulations or fits fail, for instance since they have fewer draws than are asked for.

    Warns:
        RuntimeWarning: with the number of simulations or fits that failed and are left out, of fits that warned, and of fits
            whose chains are worth fewer independent draws than are taken; and if the model uses its data elsewhere than as
            ``obs=``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> def too_narrow(model, args, kwargs):
        ...     mean = model.data["y"].sum() / 4
        ...     return {"loc": mean + 0.2 * torch.randn(1, 100)}  # the right deviation is 0.5
        >>> found = simulation_based_calibration(model, torch.zeros(3), method=too_narrow, seed=1, progress=False)
        >>> found.verdict
        'too narrow in loc (width 0.56 of the right one)'
    """
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_positive_int("simulation_based_calibration", num_draws=num_draws)
    check_positive_int("simulation_based_calibration", least=2, num_simulations=num_simulations)
    in_batch = callable(getattr(method, "samples_given", None))
    if isinstance(method, type) or not (method is None or isinstance(method, Method) or callable(method) or in_batch):
        raise TypeError(
            "simulation_based_calibration wants a method such as FlowGuide(), or a function of (model, args, kwargs), but "
            f"found {type_with_article(method)}."
        )
    check_model_keywords(model, None, args, kwargs)
    sampler = JointSampler(model, args, kwargs, observed)
    if sampler.uses_data_elsewhere():
        warn_caller(
            "The model uses values of its data elsewhere than as obs=. There they stay those of the given data in all "
            "simulations, so that it is calibrated given these."
        )
    ranked = isinstance(method, Method | None) if log_density is None else log_density
    task = _Task(sampler, method, num_draws, log_density=ranked, in_batch=in_batch)
    seeds = spawn_seeds(seed, num_simulations + 1)
    outcomes = run_all(task, seeds[1:], n_jobs=n_jobs, progress=progress, description="calibration")
    _report(outcomes, num_draws)
    runs: list[_Run] = [outcome.value for outcome in outcomes if outcome.error is None]
    with seeded(seeds[0]):
        if in_batch:
            runs = task.fit_in_batch(runs, n_jobs)
        truths, draws = _stacked([run.truth for run in runs]), _stacked([run.draws for run in runs])
        ranks = {name: ranks_of(truths[name], x) for name, x in draws.items()}
    truths = {name: truths[name] for name in draws if name != LOG_DENSITY}
    draws.pop(LOG_DENSITY, None)
    failures = [outcome.error for outcome in outcomes if outcome.error is not None]
    label = repr(method) if isinstance(method, Method) else runs[0].method
    return Calibration(ranks, num_draws, truths, draws, failures, label)


@dataclass(frozen=True)
class _Run:
    """One simulation with draws of its posterior.

    Attributes:
        truth: values that the data were simulated with, by name.
        data: the data, by name.
        draws: draws of the posterior, (draw, ...) by name.
        effective: number of independent draws that those it was thinned from are worth.
        method: what made the posterior.
    """

    truth: dict[str, Tensor]
    data: dict[str, Tensor]
    draws: dict[str, Tensor] = field(default_factory=dict)
    effective: float = inf
    method: str = ""


class _Task:
    """Simulation and fit. All fits in a process share one captured log density, whose data are changed in place.

    Args:
        sampler: what draws true values and data.
        method: a method, a function, or an amortised posterior; None for the default.
        num_draws: number of draws of each posterior.
        log_density: True to add the log density to the draws.
        in_batch: True to simulate only.
    """

    def __init__(self, sampler: JointSampler, method: Any, num_draws: int, *, log_density: bool, in_batch: bool) -> None:
        self.sampler, self.method, self.num_draws = sampler, method, num_draws
        self.log_density, self.in_batch = log_density, in_batch
        self._shared: tuple[ConditionedModel, Problem] | None = None

    def __call__(self, seed: int) -> _Run:
        """Simulate and fit from a seed."""
        seeds = spawn_seeds(seed, 2)
        with seeded(seeds[0]):
            truth, data = self.sampler()
        if self.in_batch:
            return _Run(_on_cpu(truth), data)
        method, model = self.method, self.sampler
        if isinstance(method, Method | None):
            problem = self._problem(data)
            method = default_method(problem.density.dim)[0] if method is None else method
            with seeded(seeds[1]):
                fit = method.fit(problem)
                draws, effective = _independent_draws(fit, problem.args, problem.kwargs, self.num_draws)
        else:
            with seeded(seeds[1]):
                fit = method(ConditionedModel(model.model, data), model.args, dict(model.kwargs))
                draws, effective = _independent_draws(fit, model.args, model.kwargs, self.num_draws)
        label = repr(method) if isinstance(method, Method) else getattr(method, "__name__", type(method).__name__)
        return self._checked(_Run(_on_cpu(truth), data, _on_cpu(draws), effective, label))

    def fit_in_batch(self, runs: list[_Run], n_jobs: int) -> list[_Run]:
        """Return the simulations with draws of the amortised posterior, in several processes if it takes their number."""
        draw = self.method.samples_given
        options = {"n_jobs": n_jobs} if "n_jobs" in option_names(draw) else {}
        draws = _on_cpu(draw(self.num_draws, **options, **_stacked([run.data for run in runs])))
        return [
            self._checked(replace(run, draws={name: x[:, i] for name, x in draws.items()}, method=type(self.method).__name__))
            for i, run in enumerate(runs)
        ]

    def _problem(self, data: Mapping[str, Tensor]) -> Problem:
        """Return the shared problem, with these data."""
        if self._shared is None:
            model = ConditionedModel(self.sampler.model, {name: x.clone() for name, x in data.items()})
            with forked_rng():
                problem = Problem(model, self.sampler.args, self.sampler.kwargs, progress=False)
                problem.density  # noqa: B018 - runs the model, which draws random numbers
            self._shared = model, problem
        model, problem = self._shared
        for name, x in data.items():
            model.data[name].copy_(x)
        return problem

    def _checked(self, run: _Run) -> _Run:
        """Return a run with draws of what it has true values of, and with the log density.

        Raises:
            ValueError: if there are no draws of any variable, or draws of another shape.
            ArithmeticError: if draws are not finite.
        """
        draws = {name: x for name, x in run.draws.items() if name in run.truth}
        if not draws:
            raise ValueError(f"The fit has draws of {listed(run.draws)}, but the model has {listed(run.truth)}.")
        for name, x in draws.items():
            if x.shape != (self.num_draws, *run.truth[name].shape):
                wanted = (self.num_draws, *run.truth[name].shape)
                raise ValueError(f"Draws of {name!r} are wanted as {wanted}, but found {tuple(x.shape)}.")
            if not x.isfinite().all():
                raise ArithmeticError(f"The fit has draws of {name!r} that are not finite.")
        if not self.log_density:
            return replace(run, draws=draws)
        problem = self._problem(run.data)
        values = {name: torch.cat([run.truth[name][None], x]).to(problem.density.device) for name, x in draws.items()}
        log_p = problem.batched(problem.density.unconstrain(values))[0].nan_to_num(nan=-inf).cpu()
        return replace(run, truth=run.truth | {LOG_DENSITY: log_p[0]}, draws=draws | {LOG_DENSITY: log_p[1:]})


def _independent_draws(fit: Any, args: tuple, kwargs: Mapping[str, Any], num_draws: int) -> tuple[dict[str, Tensor], float]:
    """Return draws of a fit, (draw, ...) by name, thinned, and the number of independent ones that all of them are worth.

    Raises:
        ValueError: if there are too few.
    """
    if hasattr(fit, "psis"):
        return fit.get_samples(num_draws), inf
    if isinstance(fit, Mapping):
        chains = {name: torch.as_tensor(x) for name, x in fit.items()}
    elif hasattr(fit, "get_samples"):
        chains = fit.get_samples(group_by_chain=True)
    else:
        data = to_arviz(fit, *args, groups=("posterior",), num_samples=num_draws, progress=False, model_kwargs=dict(kwargs))
        chains = draws_of_data(data)[0]
    found = min((x.shape[:2].numel() for x in chains.values() if x.dim() > 1), default=0)
    if found < num_draws:
        raise ValueError(
            f"{num_draws} draws of each fit are wanted, but there are {found}. Lower num_draws, or raise the fit's."
        )
    effective = inf
    if found > num_draws:
        columns = {name: x for name, x in scalars(chains).items() if x.std() > 0}
        effective = min((row["ess_bulk"] for row in chain_diagnostics(columns).values()), default=0.0) if columns else 0.0
    index = torch.linspace(0, found - 1, num_draws).round().long()
    return {name: x.flatten(0, 1)[index.to(x.device)] for name, x in chains.items()}, effective


def _report(outcomes: list[Outcome], num_draws: int) -> None:
    """Warn of runs that failed, that warned, and that have dependent draws.

    Raises:
        RuntimeError: if none, or only one, came to an end.
    """
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    if len(outcomes) - len(failed) < 2:
        raise RuntimeError(f"Of {len(outcomes)} simulations and fits {len(failed)} failed, the first with {failed[0]}")
    if failed:
        warn_caller(f"{len(failed)} of {len(outcomes)} simulations or fits failed and are left out, the first with {failed[0]}")
    if warned := [outcome.warnings for outcome in outcomes if outcome.warnings]:
        warn_caller(f"{len(warned)} of {len(outcomes)} fits warned, the first: {warned[0][0]}")
    if few := [outcome.value.effective for outcome in outcomes if outcome.value and outcome.value.effective < num_draws]:
        warn_caller(
            f"In {len(few)} of {len(outcomes)} fits the chains are worth fewer than the {num_draws} independent draws that are "
            f"taken, the least {min(few):.0f}, so that ranks lie too near the ends. Lower num_draws, or take longer chains."
        )


def _stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors of the same names, one upon another."""
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _on_cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().cpu() for name, x in values.items()}
