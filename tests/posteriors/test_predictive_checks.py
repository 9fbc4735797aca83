"""`predictive_check`: p-values in closed form, models that cannot make their data, and entries that are masked or missing."""

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_genmodels import to_arviz
from pyro_genmodels.posteriors import Laplace, PredictiveCheck, posterior, predictive_check

NUM_ROWS, PRIOR = 20, 3.0
VARIANCE = 1 / (NUM_ROWS + 1 / PRIOR**2)


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, PRIOR))
    with pyro.plate("rows", NUM_ROWS):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


class Exact:
    """The posterior of `model` in closed form, as a fit."""

    model = staticmethod(model)

    def guide(self, y):
        pyro.sample("loc", dist.Normal(VARIANCE * y.sum(), VARIANCE**0.5))


def check(y, **options):
    return predictive_check(Exact(), y, progress=False, **options)


def test_p_values_are_those_of_closed_forms():
    """The replicated mean is normal, the least value has the law of a minimum given loc, and the discrepancy is chi-squared.

    Within 5 standard errors of 4000 independent draws: a false alarm has probability 6e-7 each.
    """
    y = torch.randn(NUM_ROWS) + 1.0
    statistics = {
        "mean": torch.mean,
        "min": torch.min,
        "distance": lambda y, z: (y - z["loc"]).square().sum(),
    }
    table = check(y, num_samples=4000, statistics=statistics).table
    loc = VARIANCE * y.sum()
    mean = stats.norm.sf(float(y.mean() - loc), scale=(VARIANCE + 1 / NUM_ROWS) ** 0.5)
    grid = torch.linspace(-6, 6, 2001).double()
    weights = (-(grid**2) / 2).softmax(0)
    points = (loc + VARIANCE**0.5 * grid)[:, None]
    least = weights @ torch.as_tensor(stats.norm.sf(float(y.min()) - points[:, 0].numpy()) ** NUM_ROWS)
    distance = weights @ torch.as_tensor(stats.chi2.sf((y - points).square().sum(1).numpy(), NUM_ROWS))
    assert list(table.index) == ["mean(y)", "min(y)", "distance(y)"]
    for p, error, exact in zip(table["p_value"], table["p_error"], (mean, least, distance), strict=True):
        assert 0.001 < error < 0.01
        assert abs(p - float(exact)) < 5 * error
    assert table["observed"]["mean(y)"] == pytest.approx(float(y.mean()), abs=1e-6)
    assert table["replicated_sd"]["mean(y)"] == pytest.approx((VARIANCE + 1 / NUM_ROWS) ** 0.5, rel=0.1)


def test_a_right_model_has_no_fault_and_leave_one_out_values_are_exact():
    """Errors of the probabilities by weighted draws are below 0.08 for k-hat below 0.5 and 4000 draws."""
    y = torch.randn(NUM_ROWS) + 1.0
    found = check(y, num_samples=4000)
    assert found.verdict == "no fault found"
    assert list(found.table.index) == [f"{name}(y)" for name in ("mean", "sd", "min", "max", "skewness")]
    left = 1 / (NUM_ROWS - 1 + 1 / PRIOR**2)
    exact = stats.norm.cdf(y.double(), (left * (y.sum() - y)).double(), (1 + left) ** 0.5)
    assert (found.loo_pit["y"] - torch.as_tensor(exact)).abs().max() < 0.05
    assert found.loo_pareto_k["y"].max() < 0.7
    assert not found.excluded


def test_p_values_of_replicated_data_are_nearer_to_one_half_than_uniform_ones():
    """Over data of the model the variance of those of the distance is below 1/12 and the mean 1/2: 5 errors of 40 values."""
    values = []
    for seed in range(40):
        torch.manual_seed(seed)
        y = PRIOR * torch.randn(()) + torch.randn(NUM_ROWS)
        table = check(y, num_samples=200, statistics={"distance": lambda y, z: (y - z["loc"]).square().sum()}).table
        values.append(table["p_value"]["distance(y)"])
    values = torch.tensor(values)
    assert abs(values.mean() - 0.5) < 5 * (1 / 12 / 40) ** 0.5
    assert values.var() < 1 / 12 * 1.5


def direct_check(num_samples, scale=1.0):
    """Return the check of data of the given deviation, by replicated data and exact leave-one-out values without a model."""
    y = torch.randn(()) * PRIOR + scale * torch.randn(NUM_ROWS).double()
    loc = VARIANCE * y.sum() + VARIANCE**0.5 * torch.randn(num_samples, 1).double()
    y_rep = loc + torch.randn(num_samples, NUM_ROWS).double()
    functions = {"mean": lambda x: x.mean(-1), "sd": lambda x: x.std(-1), "max": lambda x: x.amax(-1)}
    left = 1 / (NUM_ROWS - 1 + 1 / PRIOR**2)
    pit = torch.special.ndtr((y - left * (y.sum() - y)) / (1 + left) ** 0.5).clamp(1e-6, 1 - 1e-6)
    return PredictiveCheck(
        observed={name: f(y).expand(num_samples) for name, f in functions.items()},
        replicated={name: f(y_rep) for name, f in functions.items()},
        weights=torch.full((num_samples,), 1 / num_samples, dtype=torch.float64),
        num_chains=0,
        loo_pit={"y": pit},
        loo_pareto_k={"y": torch.zeros(NUM_ROWS)},
        kept={"y": torch.ones(NUM_ROWS, dtype=torch.bool)},
        data=None,
    )


@pytest.mark.parametrize(("num_samples", "rate"), [(20, 0.5), (100, 0.1), (1500, 0.01)])
def test_a_true_model_has_a_fault_at_the_stated_rate_for_any_number_of_draws(num_samples, rate):
    """Of 80 true data sets no more have a fault than the binomial law of the stated rate allows with probability 1 - 1e-5."""
    checks = [direct_check(num_samples) for _ in range(80)]
    number = sum(bool(found.faults(rate)) for found in checks)
    assert number <= stats.binom.isf(1e-5, len(checks), rate)


def test_estimates_of_zero_by_few_draws_are_no_fault_and_said():
    """An estimate of 0 from 50 draws has a two-sided p-value of 2 / 51, times 3 tests. Leave-one-out values need no draws."""
    found = direct_check(50, scale=6.0)
    assert found.table["p_value"]["sd"] == 0.0
    assert found.table["adjusted"]["sd"] == pytest.approx(3 * 2 / 51)
    assert found.verdict.startswith("predictions are too narrow for y: leave-one-out probabilities are not uniform (p ")
    found.loo_pit["y"][:11] = torch.nan
    few = PredictiveCheck(**{name: getattr(found, name) for name in found.__dataclass_fields__})
    assert not few.loo_p_values
    assert few.verdict.startswith(
        "no fault found, but to find one takes 599 draws, and these are worth 50: the data lie beyond all of them in sd, max"
    )
    assert direct_check(600, scale=6.0).faults()[0].endswith("p below 0.002)")


def test_leave_one_out_values_find_what_the_statistics_miss():
    """A normal model of data at -1 and 1, whose mean is right."""
    y = torch.tensor([-1.0, 1.0]).repeat(40) * torch.linspace(0.9, 1.1, 80)

    def normal(y):
        loc = pyro.sample("loc", dist.Normal(0.0, PRIOR))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    fit = Drawn(normal, (y,), {"loc": y.mean() + torch.randn(1, 1000) / 80**0.5})
    found = predictive_check(fit, statistics={"mean": torch.mean}, progress=False)
    assert found.table["adjusted"]["mean(y)"] > 0.1
    assert found.verdict.startswith("predictions have another shape than y: leave-one-out probabilities are not uniform (p ")


def poisson(y):
    rate = pyro.sample("rate", dist.Gamma(1.0, 0.1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def poisson_draws(y, num_samples=2000):
    return {"rate": dist.Gamma(1.0 + y.sum(), 0.1 + len(y)).sample((1, num_samples))}


class Drawn:
    """Draws of a posterior with its model, as chains."""

    stats, kwargs = {}, {}

    def __init__(self, model, args, draws):
        self.model, self.args, self.draws = model, args, draws

    def get_samples(self, group_by_chain=False):
        return self.draws


def test_overdispersed_counts_are_found_and_poisson_ones_are_not():
    rate = dist.Gamma(1.0, 0.2).sample((50,))
    overdispersed, right = torch.poisson(rate), torch.poisson(torch.full((50,), 5.0))
    found = predictive_check(Drawn(poisson, (overdispersed,), poisson_draws(overdispersed)), progress=False)
    assert found.table["p_value"]["sd(y)"] < 0.001
    assert found.verdict.startswith("sd(y) of the data is larger than the model makes it (")
    assert "sd(y) of the data is larger" in str(found)
    fine = predictive_check(Drawn(poisson, (right,), poisson_draws(right)), progress=False)
    assert fine.verdict == "no fault found"
    pit = fine.loo_pit["y"]  # randomised, so that counts have uniform values too: their mean within 5 errors, and 0.02
    assert abs(float(pit.mean()) - 0.5) < 5 * (1 / 12 / 50) ** 0.5 + 0.02


def test_dependent_chains_have_a_larger_error():
    y = torch.randn(NUM_ROWS)
    scale = VARIANCE**0.5
    walk = torch.zeros(2, 1000)
    for s in range(1, 1000):
        walk[:, s] = 0.99 * walk[:, s - 1] + (1 - 0.99**2) ** 0.5 * torch.randn(2)
    total, centre = y.double().sum(), VARIANCE * y.sum()
    statistics = {"loc": lambda y, z: (z["loc"] - centre) * (y.sum() == total)}  # 0 for replicated data
    sticky, independent = (
        predictive_check(Drawn(model, (y,), {"loc": centre + scale * x}), statistics=statistics, progress=False)
        for x in (walk, torch.randn(2, 1000))
    )
    assert sticky.table["p_error"].iloc[0] > 3 * independent.table["p_error"].iloc[0]


def test_masked_entries_are_excluded_and_named():
    y = torch.randn(NUM_ROWS)
    y[:3] = 1000.0
    mask = torch.arange(NUM_ROWS) > 2

    def masked(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", NUM_ROWS), pyro.poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    draws = {"loc": y[3:].mean() + torch.randn(1, 500) / 17**0.5}
    found = predictive_check(Drawn(masked, (y,), draws), progress=False)
    assert found.table["observed"]["max(y)"] == pytest.approx(float(y[3:].max()))
    assert found.excluded == ["3 of the 20 entries of y are masked or missing"]
    assert found.excluded[0] in str(found)
    assert found.loo_pit["y"].isnan().tolist() == [True] * 3 + [False] * 17
    found.plot()
    plt.close("all")

    def partly(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", NUM_ROWS):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y, obs_mask=mask)

    draws["y_unobserved"] = torch.zeros(1, 500, NUM_ROWS)
    found = predictive_check(Drawn(partly, (y,), draws), progress=False)
    assert list(found.kept) == ["y_observed"]
    assert int(found.kept["y_observed"].sum()) == 17


def test_all_rows_of_a_subsampled_plate_are_replicated():
    y = torch.randn(NUM_ROWS)

    def subsampled(y):
        loc = pyro.sample("loc", dist.Normal(0.0, PRIOR))
        with pyro.plate("rows", NUM_ROWS, subsample_size=4) as rows:
            pyro.sample("y", dist.Normal(loc, 1.0).mask(y[rows] != y[0]), obs=y[rows])

    draws = {"loc": VARIANCE * y.sum() + VARIANCE**0.5 * torch.randn(1, 300)}
    found = predictive_check(Drawn(subsampled, (y,), draws), progress=False)
    assert found.kept["y"].tolist() == [False] + [True] * (NUM_ROWS - 1)
    assert found.table["observed"]["mean(y)"] == pytest.approx(float(y[1:].mean()), abs=1e-6)
    assert "no fault" in found.verdict


def test_weights_of_draws_count():
    """Draws of the prior with importance weights have the p-value of the posterior, within 5 of their errors."""
    y = torch.randn(NUM_ROWS) + 1.0
    loc = PRIOR * torch.randn(5000)
    log_likelihood = dist.Normal(loc[:, None], 1.0).log_prob(y).sum(1)
    fit = Drawn(model, (y,), {"loc": loc[None]})
    fit.stats = {"log_weight": log_likelihood[None]}
    row = predictive_check(fit, statistics={"mean": torch.mean}, progress=False).table.loc["mean(y)"]
    exact = stats.norm.sf(float(y.mean() - VARIANCE * y.sum()), scale=(VARIANCE + 1 / NUM_ROWS) ** 0.5)
    assert abs(row["p_value"] - exact) < 5 * row["p_error"]
    assert 0.01 < row["p_error"] < 0.1
    assert row["replicated"] == pytest.approx(float(VARIANCE * y.sum()), abs=0.2)


def test_several_sites_and_events_and_the_plot():
    def two(y, x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal(loc, 1.0).expand([5, 3]).to_event(1), obs=y)

    fit = Drawn(two, (torch.randn(5, 3), torch.tensor(0.5)), {"loc": torch.randn(2, 100)})
    found = predictive_check(fit, progress=False)
    assert len(found.table) == 10
    assert repr(found) == f"<predictive check of x, y by 200 draws: {found.verdict}>"
    assert list(found.loo_pit) == ["x"]  # there is one density for three numbers
    assert list(predictive_check(fit, var_names=["y"], statistics={"max": torch.max}, progress=False).table.index) == ["max(y)"]
    assert found.plot() is not None
    plt.close("all")
    assert "posterior_predictive" in found.data
    with pytest.raises(ValueError, match="no observed site 'loc' to check, but x, y"):
        predictive_check(fit, var_names=["loc"], progress=False)


def test_wrong_calls_are_refused():
    y = torch.randn(NUM_ROWS)
    with pytest.raises(TypeError, match="statistics as functions by name, but found a list"):
        check(y, statistics=[torch.mean])
    with pytest.raises(ValueError, match=r"statistic range\(y\) has to be one number, but found the shape \(2,\)"):
        check(y, statistics={"range": lambda y: torch.stack([y.min(), y.max()])}, num_samples=20)
    with pytest.raises(ValueError, match=r"statistic log\(y\) is not finite for \d+ of 20 draws"):
        check(y, statistics={"log": lambda y: y.log().sum()}, num_samples=20)
    with pytest.raises(ValueError, match="num_samples of 10 or more"):
        check(y, num_samples=1)
    with pytest.raises(ValueError, match="these are draws only"):
        predictive_check({"loc": torch.zeros(1, 100)})

    def silent():
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    with (
        pytest.warns(UserWarning, match="observes nothing"),
        pytest.raises(ValueError, match="model that observes data, but found none"),
    ):
        predictive_check((silent, silent), num_samples=20, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [100, 1500])
def test_whole_checks_of_a_true_model_have_a_fault_at_the_stated_rate(num_samples):
    """Of 60 data sets, with 5 statistics and leave-one-out values, at a rate of 0.1: false alarm 1e-5."""
    found = [check(torch.randn(()) * PRIOR + torch.randn(NUM_ROWS), num_samples=num_samples) for _ in range(60)]
    assert sum(bool(one.faults(0.1)) for one in found) <= stats.binom.isf(1e-5, 60, 0.1)
    assert sum(bool(one.faults()) for one in found) <= stats.binom.isf(1e-5, 60, 0.01)


@pytest.mark.slow
def test_a_fit_by_posterior_is_checked_without_arguments():
    y = torch.randn(NUM_ROWS) + 1.0
    fit = posterior(model, y, method=Laplace(), progress=False)
    assert predictive_check(fit, progress=False).verdict == "no fault found"
    assert "posterior_predictive" in to_arviz(fit, num_samples=20, progress=False)
