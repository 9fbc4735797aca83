"""Calibration: laws of ranks in closed form, and exact, narrow, biased and blind posteriors of a conjugate model."""

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from scipy import stats

from pyro_genmodels.posteriors import Laplace, NoUTurn, Pathfinder, expected_coverage, simulation_based_calibration
from pyro_genmodels.posteriors.uniformity import adjusted_p_values, ecdf_band, ecdf_p_value, normal_scores, ranks_of

NUM_ROWS, PRIOR = 4, 2.0
Y = torch.zeros(NUM_ROWS)


def model(y):
    """Two means with unit noise, whose posterior is normal."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), PRIOR).to_event(1))
    with pyro.plate("rows", NUM_ROWS):
        pyro.sample("y", dist.Normal(loc.sum(-1) / 2, 1.0), obs=y)
        pyro.sample("x", dist.Normal(loc[..., 0], 1.0), obs=y)


def exact(data):
    """Return the mean and the covariance of the posterior given data, (..., rows) by name."""
    design = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    precision = NUM_ROWS * design.T @ design + torch.eye(2) / PRIOR**2
    sums = torch.stack([data["y"].sum(-1), data["x"].sum(-1)], -1)
    covariance = precision.inverse()
    return sums @ design @ covariance, covariance


class Gaussian:
    """An amortised posterior in closed form, with errors of its deviations, of its means, or without data at all."""

    def __init__(self, width=1.0, shift=0.0, blind=False):
        self.width, self.shift, self.blind = width, shift, blind

    def samples_given(self, num_samples, **data):
        loc, covariance = exact(data)
        if self.blind:
            loc, covariance = torch.zeros_like(loc), PRIOR**2 * torch.eye(2)
        deviation = covariance.diagonal().sqrt()
        noise = torch.randn(num_samples, *loc.shape) @ torch.linalg.cholesky(covariance).T
        return {"loc": loc + self.shift * deviation + self.width * noise}


def calibrated(method, num_simulations=200, **options):
    options = {"num_draws": 100, "seed": 1, "progress": False, **options}
    return simulation_based_calibration(model, Y, method=method, num_simulations=num_simulations, **options)


# The verdicts below are false with probability 0.01 for an exact posterior by their definition; the seeds are fixed, and the
# tests of rates further down have the stated rate of 1e-5.


@pytest.mark.parametrize(
    ("method", "verdict"),
    [
        (Gaussian(), "no fault found"),
        (Gaussian(width=0.7), "too narrow in loc"),
        (Gaussian(width=1.4), "too wide in loc"),
        (Gaussian(shift=0.5), "biased upwards in loc"),
        (Gaussian(shift=-0.5), "biased downwards in loc"),
    ],
)
def test_the_verdict_names_the_fault_and_passes_the_exact_posterior(method, verdict):
    found = calibrated(method)
    assert found.verdict.startswith(verdict)
    assert found.num_simulations == 200
    assert found.ranks["loc"].shape == (200, 2)
    table = found.table
    assert list(table.index) == ["loc[0]", "loc[1]"]
    assert (table["bias"] - method.shift).abs().max() < 0.25  # 3.5 standard errors of 200 scores
    assert (table["width"] - method.width).abs().max() < 0.25
    assert found.coverage().spread_p_value < 1e-4 or method.width == 1.0


def test_an_exact_posterior_is_passed_at_the_stated_rate():
    """The number of faulty verdicts at rate 0.2 of 30 is at most binomial: 18 or more have probability 2e-6."""
    faults = [bool(calibrated(Gaussian(), 25, seed=seed).faults(0.2)) for seed in range(30)]
    assert stats.binom.sf(17, 30, 0.2) < 1e-5
    assert 0 < sum(faults) < 18


def test_a_posterior_that_ignores_its_data_is_told_by_the_log_density():
    blind, exactly = (calibrated(Gaussian(blind=blind), 60, log_density=True) for blind in (True, False))
    assert "blind to the data" in blind.verdict
    assert blind.table.drop(index="log p(y, z)")[["p_ranks", "p_bias", "p_width"]].min().min() > 1e-4
    assert exactly.verdict == "no fault found"
    assert blind.coverage().p_value > 1e-4  # reference points that do not depend on the data do not see it either


@pytest.mark.parametrize("method", [Laplace(), pytest.param(Pathfinder(num_paths=1), marks=pytest.mark.slow)], ids=repr)
def test_a_method_that_is_exact_here_passes(method):
    """Fits share one captured density, whose data change in place."""
    found = calibrated(method, 30)
    assert found.verdict == "no fault found"
    assert set(found.ranks) == {"loc", "log p(y, z)"}
    assert found.method == repr(method)
    draws = found.draws["loc"].double()
    assert draws.shape == (30, 100, 2)
    assert draws.mean(1).std(0).min() > 0.5  # posteriors of different data differ


@pytest.mark.slow
def test_ranks_do_not_depend_on_the_number_of_processes():
    first, second = (calibrated(Laplace(), 6, n_jobs=n_jobs) for n_jobs in (1, 2))
    assert all(torch.equal(first.ranks[name], second.ranks[name]) for name in first.ranks)
    torch.testing.assert_close(first.draws, second.draws, rtol=0, atol=0)
    other = calibrated(Laplace(), 6, seed=2)
    assert not torch.equal(first.truths["loc"], other.truths["loc"])


@pytest.mark.slow
def test_shared_captures_change_nothing():
    """A fit of data that were put into a captured density is that of a new density with the same data."""
    found = calibrated(Laplace(), 5, log_density=True)
    mean, covariance = exact(found_data(5))
    error = (found.draws["loc"].mean(1) - mean) / (covariance.diagonal() / 100).sqrt()
    assert error.abs().max() < 6  # standard errors: a false alarm has probability 2e-8


def found_data(number):
    """Return the data of the first simulations of `calibrated`, (number, rows) by name, drawn anew from the same seeds."""
    kept = []

    def keep(conditioned, args, kwargs):
        kept.append(conditioned.data)
        return {"loc": torch.randn(1, 100, 2)}

    calibrated(keep, number)
    return {name: torch.stack([data[name] for data in kept]) for name in ("y", "x")}


def test_any_function_that_returns_a_fit_is_a_method():
    def chains(conditioned, args, kwargs):
        mcmc = MCMC(NUTS(conditioned), num_samples=30, warmup_steps=30, disable_progbar=True)
        mcmc.run(*args, **kwargs)
        return mcmc

    found = calibrated(chains, 2, num_draws=30, log_density=True)
    assert found.method == "chains"
    assert set(found.ranks) == {"loc", "log p(y, z)"}

    def guide_pair(conditioned, args, kwargs):
        mean, covariance = exact(conditioned.data)
        return conditioned, lambda y: pyro.sample("loc", dist.MultivariateNormal(mean, covariance))

    assert calibrated(guide_pair, 20).verdict == "no fault found"


@pytest.mark.slow
def test_chains_are_thinned_and_pass():
    found = calibrated(NoUTurn(num_chains=2, num_warmup=200, num_samples=500), 60)
    assert found.verdict == "no fault found"


def test_dependent_chains_are_warned_of():
    def sticky(conditioned, args, kwargs):
        steps = torch.randn(1, 1000, 2).cumsum(1)
        return {"loc": steps}

    with pytest.warns(RuntimeWarning, match=r"In \d+ of 10 fits the chains are worth fewer than the 100 independent draws"):
        calibrated(sticky, 10)


def test_failures_are_counted_and_left_out():
    calls = []

    def fails(conditioned, args, kwargs):
        calls.append(conditioned)
        if len(calls) % 4 == 0:
            raise RuntimeError("no convergence")
        draws = torch.randn(1, 100, 2)
        return {"loc": draws if len(calls) % 4 != 1 else draws / 0}

    with pytest.warns(RuntimeWarning, match=r"10 of 20 simulations or fits failed and are left out, the first with Arithmetic"):
        found = calibrated(fails, 20)
    assert found.num_simulations == 10
    assert sorted({failure.split(":")[0] for failure in found.failures}) == ["ArithmeticError", "RuntimeError"]
    with pytest.raises(RuntimeError, match="Of 3 simulations and fits 3 failed, the first with ValueError: 100 draws of each"):
        calibrated(lambda model, args, kwargs: {"loc": torch.zeros(2, 20, 2)}, 3)
    with pytest.raises(RuntimeError, match=r"has draws of other, but the model has loc"):
        calibrated(lambda model, args, kwargs: {"other": torch.zeros(2, 50, 2)}, 3)


def test_errors_of_the_program_are_raised():
    with pytest.raises(TypeError):
        calibrated(lambda model, args: None, 3)
    with pytest.raises(TypeError, match="the class Laplace"):
        calibrated(Laplace, 3)
    with pytest.raises(ValueError, match="num_simulations of 2 or more"):
        calibrated(Gaussian(), 1)
    with pytest.raises(ValueError, match=r"add pyro\.sample"):
        simulation_based_calibration(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), method=Gaussian())


def test_sites_that_hold_data_can_be_named():
    def unobserved(size, y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", size):
            return pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    options = {"method": Laplace(), "num_simulations": 5, "seed": 0, "progress": False, "num_draws": 20}
    found = simulation_based_calibration(unobserved, 3, observed=["y"], **options)
    assert set(found.truths) == {"loc"}
    with pytest.raises(ValueError, match="no site 'w' to hold data, but loc, y"):
        simulation_based_calibration(unobserved, 3, observed=["w"], **options)


def test_data_that_are_used_elsewhere_are_warned_of():
    def lagged(y):
        phi = pyro.sample("phi", dist.Normal(0.0, 0.5))
        with pyro.plate("time", len(y) - 1):
            pyro.sample("y", dist.Normal(phi * y[:-1], 1.0), obs=y[1:])

    def exactly(conditioned, args, kwargs):
        x, y = args[0][:-1], conditioned.data["y"]
        precision = (x * x).sum() + 4
        return {"phi": (x @ y) / precision + torch.randn(1, 100) / precision.sqrt()}

    with pytest.warns(RuntimeWarning, match="uses values of its data elsewhere than as obs="):
        found = simulation_based_calibration(lagged, torch.randn(20), method=exactly, seed=1, progress=False)
    assert found.verdict == "no fault found"  # given the lagged values, which stay


# Laws of ranks in closed form.


def test_the_probability_of_a_band_is_that_of_all_rank_vectors():
    """All 6^4 vectors of four ranks among five draws are equally likely."""
    vectors = torch.tensor(list(product(range(6), repeat=4)))
    sets, members = torch.unique(vectors.sort(1).values, dim=0, return_counts=True)
    p_values = torch.tensor([ecdf_p_value(ranks, 5) for ranks in sets], dtype=torch.float64)
    for p in p_values.unique():
        share = float(members[p_values <= p + 1e-12].sum()) / len(vectors)
        assert share == pytest.approx(float(p), abs=1e-12)


def test_the_band_holds_uniform_ranks_at_its_rate():
    """Of 2000 sets of ranks the number inside is binomial; 5 deviations are missed with probability 6e-7."""
    x, lower, upper = ecdf_band(80, 20, 0.9)
    ranks = torch.randint(0, 21, (2000, 80))
    counts = (ranks[:, :, None] < torch.arange(1, 21)).sum(1).double() / 80
    inside = ((counts >= torch.as_tensor(lower) - 1e-9) & (counts <= torch.as_tensor(upper) + 1e-9)).all(1).double().mean()
    outside = (np.array([ecdf_p_value(r, 20) for r in ranks[:200]]) < 0.1).mean()
    assert x[0] == pytest.approx(1 / 21)
    assert 0.9 - 5 * (0.09 / 2000) ** 0.5 < inside < 0.96
    assert outside < 0.1 + 5 * (0.09 / 200) ** 0.5


def test_ranks_of_normal_posteriors_have_their_law():
    """Of a posterior that is s times too narrow the scores have deviation 1 / s; of one shifted by d the mean -d."""
    n, draws = 4000, 1000
    truth = torch.randn(n, 2, dtype=torch.float64)
    z = torch.randn(n, draws, 2, dtype=torch.float64) * torch.tensor([0.8, 1.0]) + torch.tensor([0.0, 0.3])
    pit = (ranks_of(truth, z) + 0.5) / (draws + 1)
    narrow, shifted = normal_scores(pit[:, 0]), normal_scores(pit[:, 1])
    assert narrow.deviation == pytest.approx(1.25, abs=0.07)  # 5 standard errors
    assert narrow.deviation_p < 1e-20
    assert narrow.mean_p > 1e-5
    assert shifted.mean == pytest.approx(-0.3, abs=0.08)
    assert shifted.mean_p < 1e-20
    assert shifted.deviation_p > 1e-5


def test_ties_are_broken_at_random():
    ranks = ranks_of(torch.zeros(5000), torch.zeros(5000, 4))
    counts = ranks.bincount(minlength=5).double()
    assert stats.chisquare(counts.numpy()).pvalue > 1e-5


def test_adjusted_p_values_are_those_of_holm():
    assert adjusted_p_values([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


# Coverage.


@pytest.mark.parametrize(("width", "sign"), [(1.0, 0), (0.6, -1), (1.6, 1)])
def test_coverage_is_nominal_for_an_exact_posterior(width, sign):
    """Coverage of each level is binomial: 5 deviations are missed with probability 6e-7 at one level."""
    n = 1000
    truth = PRIOR * torch.randn(n, 2)
    noise = torch.randn(n, 2)
    shrink = PRIOR**2 / (1 + PRIOR**2)
    z = (truth + noise)[:, None] * shrink + width * shrink**0.5 * torch.randn(n, 100, 2)
    found = expected_coverage({"z": z}, {"z": truth}, references=truth + noise)
    at = found.values[90] - 0.9  # balls around the mean are regions of highest density
    if sign:
        assert float(at) * sign > 0.02
        assert found.p_value < 1e-6
    else:
        assert (found.values - found.levels).abs().max() < 5 * (0.25 / n) ** 0.5
        assert found.p_value > 1e-5
    assert (found.lower <= found.upper).all()
    assert expected_coverage(z, truth).ranks.shape == (n,)


def test_wrong_draws_of_coverage_are_refused():
    z, truth = torch.zeros(5, 10, 2), torch.zeros(5, 2)
    with pytest.raises(ValueError, match=r"'draws' as \(5, 10, 2\) and \(4, 2\)"):
        expected_coverage(z, truth[:4])
    with pytest.raises(ValueError, match="only one has b"):
        expected_coverage({"a": z}, {"a": truth, "b": truth})
    with pytest.raises(TypeError, match="both as tensors"):
        expected_coverage({"a": z}, truth)
    with pytest.raises(ValueError, match="finite"):
        expected_coverage(z / 0, truth)
    with pytest.raises(ValueError, match=r"references as \(5, 2\)"):
        expected_coverage(z, truth, references=torch.zeros(2))


def test_plots_and_arviz_take_the_ranks():
    found = calibrated(Gaussian(), 30)
    figure = found.plot()
    assert [axes.get_title() for axes in figure.axes] == ["loc[0]", "loc[1]"]
    assert found.coverage().plot().axes
    plt.close("all")
    with pytest.raises(ValueError, match=r"no scalar 'loc' to plot, but loc\[0\], loc\[1\]"):
        found.plot(["loc"])
    with pytest.raises(ValueError, match=r"no draws of 'z', but of loc"):
        found.coverage(["z"])
    data = found.to_dataset()
    assert data["loc"].dims == ("chain", "draw", "loc_dim_0")
    assert 0 < data["loc"].min() < data["loc"].max() < 1
