"""k-hat of importance weights against a teacher whose evidence and tail index are known; rows that are not finite; tables."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_genmodels import MAF, VAE, EnergyModel, Flow, RestrictedBoltzmannMachine, compare, log_likelihood
from pyro_genmodels.distributions import Energy, Implicit
from pyro_genmodels.distributions.energy.state import LogPartition, PartitionCache
from pyro_genmodels.evaluation import (
    LogLikelihood,
    conservative_log_likelihood,
    gaussian_observation_likelihood,
    log_partition,
)

INF, NAN = float("inf"), float("nan")
EVIDENCE = dist.Normal(torch.zeros((), dtype=torch.float64), 2**0.5)


def gaussian(width, dims=1):
    """z ~ N(0, 1), x ~ N(z, 1), and a guide as wide as the posterior times `width`."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(dims), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, width * 0.5**0.5).to_event(1))

    return model, guide


@pytest.mark.parametrize("width", [0.2, 0.3, 0.4])
def test_a_guide_that_is_too_narrow_is_called_unreliable(width, float64):
    """The tail index of the weights is 1 - width^2 (T26): k-hat of m = 425 values is within 5 (1 + k) / sqrt(m) of it."""
    x = EVIDENCE.sample((5, 1))
    with pytest.warns(RuntimeWarning, match=r"k-hat is above 0\.7 in [3-5] of 5 rows") as caught:
        found = log_likelihood(gaussian(width), x, num_samples=20_000, batch_size=100_000)
    assert len(caught) == 1
    assert found.kind == "unreliable"
    assert found.pareto_k.shape == (5,)
    k = 1 - width**2
    assert ((found.pareto_k - k).abs() < 5 * (1 + k) / 425**0.5).all()
    assert "Pareto k-hat is above 0.7" in str(found)


@pytest.mark.parametrize("width", [0.9, 1.0, 1.5])
def test_a_good_guide_is_not(width, float64):
    """Values and smoothed values are right within six standard errors: a false alarm in 1e8 for each of 40."""
    x = EVIDENCE.sample((40, 1))
    found = log_likelihood(gaussian(width), x, num_samples=2000)
    assert found.kind == "lower bound"
    assert (found.pareto_k < 0.5).all()
    for values in (found.values, found.smoothed):
        assert ((values - EVIDENCE.log_prob(x[:, 0])).abs() < 6 * found.std_error + 1e-9).all()
    assert "k-hat" not in str(found)


def test_smoothed_values_are_nearer_to_the_evidence_where_the_tail_is_heavy(float64):
    """A guide of .55 times the width (k = .70) and 500 draws, in 400 rows: the spread falls from .050 to .033."""
    x = EVIDENCE.sample((400, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = log_likelihood(gaussian(0.55), x, num_samples=500, batch_size=200_000)
    raw, smoothed = (values - EVIDENCE.log_prob(x[:, 0]) for values in (found.values, found.smoothed))
    assert raw.mean() < 0  # a lower bound
    assert smoothed.square().mean() < raw.square().mean()


def test_one_bad_row_is_named_but_chance_is_not():
    x = torch.tensor([[0.0]] * 30 + [[40.0]])
    model, _ = gaussian(1.0)

    def guide(x):  # as wide as the posterior, but never farther out than 5
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x / 2).clamp(max=5.0), 0.5**0.5).to_event(1))

    with pytest.warns(RuntimeWarning, match="1 of 31 rows"):
        found = log_likelihood((model, guide), x, num_samples=1000)
    assert (found.pareto_k > 0.7).tolist() == [False] * 30 + [True]


def test_nothing_sampled_has_no_k_and_few_samples_an_unknown_one():
    flow, x = Flow((2,), transform=MAF(transforms=1, hidden=(8,))), torch.randn(5, 2)
    assert log_likelihood(flow, x).pareto_k is None
    assert log_likelihood(flow, x).smoothed is None
    assert log_likelihood(gaussian(1.0), x[:, :1], num_samples=20).pareto_k.isnan().all()


def test_the_lower_tail_counts_where_log_weights_are_averaged():
    class Noisy(dist.Normal):
        """A density whose log is a random estimate; its noise has a tail of shape k = 2."""

        density, mean_inside_log = "lower bound", False

        def log_prob(self, value):
            log_p = super().log_prob(value)
            return log_p - dist.StudentT(0.5).sample(log_p.shape).abs()

        def expand(self, batch_shape, _instance=None):
            return Noisy(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Noisy(torch.tensor(0.0), torch.tensor(1.0)), obs=x)

    with pytest.warns(RuntimeWarning, match="k-hat"):
        found = log_likelihood((model, lambda x: None), torch.randn(4), num_samples=1000)
    assert found.kind == "unreliable"
    assert found.smoothed is None
    assert (found.pareto_k > 0.7).all()


def test_equal_terms_of_a_mean_have_no_tail():
    class Halved(dist.Normal):
        """A density whose log is called random, and is not."""

        density, mean_inside_log = "lower bound", False

        def expand(self, batch_shape, _instance=None):
            return Halved(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Halved(torch.tensor(0.0), torch.tensor(1.0)), obs=x)

    found = log_likelihood((model, lambda x: None), torch.randn(4), num_samples=100)
    assert found.kind == "lower bound"
    assert (found.pareto_k == -torch.inf).all()


# Log Z.


def test_log_z_by_one_step_is_unreliable_and_by_many_is_not(float64):
    """The start N(0, 1) against N(0, 16): by one step the weights have a tail index of 15/16. Log Z is log sqrt(32 pi)."""
    wide = Energy(lambda x: x.square().sum(-1) / 32, (1,))
    with pytest.warns(RuntimeWarning, match="heavy tail .Pareto k-hat"):
        short = log_partition(wide, exact=False, num_chains=5000, num_steps=1)
    assert short.kind == "unreliable"
    assert abs(short.pareto_k - 15 / 16) < 0.22
    assert "Pareto k-hat" in str(short)
    long = log_partition(wide, exact=False, num_chains=500, num_steps=100)
    assert long.kind == "estimate"
    assert long.pareto_k < 0.5
    assert abs(long.value - np.log(32 * np.pi) / 2) < 6 * long.std_error  # false alarms: 2e-9
    assert log_partition(wide).pareto_k is None


@pytest.mark.parametrize("chains", [200, 5])
def test_the_k_of_log_z_is_kept_with_it(chains):
    family = EnergyModel((30,), energy=RestrictedBoltzmannMachine(25), support=constraints.boolean)
    found = log_partition(family, num_chains=chains, num_steps=50)
    assert found.pareto_k.isnan() == (chains == 5)
    torch.testing.assert_close(family().log_partition.pareto_k, found.pareto_k, rtol=0, atol=0, equal_nan=True)
    old = {name: value for name, value in family.state_dict().items() if not name.endswith("pareto_k")}  # as of version 0.1
    assert old["partition_cache.values"].shape == (5,)
    assert set(family.upgrade_state(old)) == set(family.state_dict())
    family.load_state_dict(old)
    assert family().log_partition.value == found.value
    assert family().log_partition.pareto_k.isnan()
    state = family.partition_cache.__getstate__()
    state["_buffers"] = {name: value for name, value in state["_buffers"].items() if name != "pareto_k"}
    pickled = PartitionCache.__new__(PartitionCache)
    pickled.__setstate__(state)
    assert pickled.pareto_k.isnan()


def test_the_k_of_an_exact_log_z_is_none_and_a_k_of_zero_is_zero():
    cache, parameters = PartitionCache(), [torch.zeros(2)]
    for k, chains in ((None, 0), (torch.tensor(0.0), 100), (torch.tensor(torch.inf), 100)):
        cache.put(LogPartition(torch.tensor(1.0), torch.tensor(0.0), "exact", num_chains=chains, pareto_k=k), parameters)
        assert cache.get(parameters).pareto_k == k


@pytest.mark.parametrize("value", [NAN, -INF])
def test_a_sum_over_odd_energies_is_not_exact(value):
    """Log Z was NaN or infinite, and "exact"."""
    odd = Energy(lambda x: torch.where(x[..., 0] == 1, value, 0.0), (3,), support=constraints.boolean)
    with pytest.warns(RuntimeWarning, match=r"log Z is unreliable: it is (nan|inf)"):
        found = log_partition(odd)
    assert found.kind == "unreliable"


def test_a_sum_of_many_terms_is_added_in_doubles():
    """2^20 equal terms: log Z is 20 log 2 - 0.3 to the rounding of single precision."""
    flat = Energy(lambda x: 0.3 + 0 * x.sum(-1), (20,), support=constraints.boolean)
    found = log_partition(flat)
    assert found.value.dtype == torch.float32
    assert found.value.item() == pytest.approx(20 * np.log(2) - 0.3, abs=2e-6)


def test_bounds_by_annealing_backwards_carry_k():
    family = EnergyModel((10,), energy=RestrictedBoltzmannMachine(5), support=constraints.boolean)
    x = torch.randint(2, (4, 10)).float()
    found = conservative_log_likelihood(family, x.numpy(), num_steps=50, num_samples=100)
    assert found.pareto_k.shape == found.smoothed.shape == (4,)
    assert found.kind == "lower bound"


def test_noisy_samples_carry_k():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Implicit(dist.Normal(0.0, 1.0), lambda z, c: dist.Delta(2 * z), ()), obs=x)

    x = torch.randn(3)
    found = gaussian_observation_likelihood((model, lambda x: None), x.numpy(), sigma=1.0, num_steps=30, num_chains=100)
    assert (found.pareto_k < 0.7).all()
    assert not found.notes
    few = gaussian_observation_likelihood((model, lambda x: None), x, sigma=1.0, num_steps=10)  # of 16 chains
    assert few.notes == ["Pareto k-hat is unknown, with fewer than 21 samples, in 3 of 3 rows"]
    assert ((found.values - dist.Normal(0.0, 5**0.5).log_prob(x)).abs() < 6 * found.std_error + 0.05).all()
    with pytest.raises(ValueError, match="x has 1 of 3 rows with values that are NaN"):
        gaussian_observation_likelihood((model, lambda x: None), torch.tensor([0.0, NAN, 1.0]), sigma=1.0)
    with pytest.raises(ValueError, match="valid has 1 of 2 rows with values that are NaN"):
        gaussian_observation_likelihood((model, lambda x: None), x, valid=torch.tensor([0.0, NAN]))


# Numbers that single precision loses.


def test_weights_that_spread_over_hundreds_of_nats_are_summed(float64):
    """y = 300 is 90,000 nats from the guide: single precision gives the same mean as double, to its rounding."""
    y = torch.tensor([0.0, 1.0, 2.0, 300.0])

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
            pyro.sample("y", dist.Normal(z, torch.ones((), dtype=y.dtype)), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.ones((), dtype=y.dtype), 0.7))

    def values(dtype):
        pyro.set_rng_seed(1)
        torch.set_default_dtype(dtype)
        with pytest.warns(RuntimeWarning, match="k-hat"):
            return log_likelihood((model, guide), y.to(dtype), num_samples=1000, parallel=True)

    single, double = values(torch.float32), values(torch.float64)
    torch.set_default_dtype(torch.float64)
    assert single.values.isfinite().all()
    assert single.std_error.isfinite().all()
    assert (single.pareto_k > 0.7).tolist() == (double.pareto_k > 0.7).tolist() == [False, False, False, True]


def test_means_of_many_rows_are_taken_in_doubles():
    """4e6 rows of -0.1: a running sum in single precision is .0997."""
    values = torch.full((4_000_000,), -0.1)
    found = LogLikelihood(values, torch.zeros(()).expand(4_000_000), "exact", 1)
    assert found.mean == pytest.approx(values[0].double().item(), abs=1e-12)
    assert found.mean_std_error == pytest.approx(0, abs=1e-12)


# Rows without a finite value.


def uniform(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        noise = dist.Uniform(-1.0, 1.0, validate_args=False)
        pyro.sample("x", noise.expand(z.shape), obs=x)


def uniform_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_a_row_that_no_sample_explains_is_minus_infinity_with_an_infinite_error():
    with pytest.warns(RuntimeWarning, match=r"1 of 3 rows \(largest inf\)"):
        found = log_likelihood((uniform, uniform_guide), torch.tensor([0.0, 0.5, 3.0]), num_samples=200)
    assert found.values.tolist() == pytest.approx([-np.log(2), -np.log(2), -INF], rel=1e-5)
    assert found.std_error.tolist() == pytest.approx([0, 0, INF], abs=1e-6)
    assert "the value is infinite in 1 of 3 rows" in str(found)


def test_a_row_that_is_nan_stays_nan_and_is_named():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    message = "the value is nan in 1 of 3 rows, the first of them row 1, so that their mean says nothing"
    with pyro.validation_enabled(False), pytest.warns(RuntimeWarning, match=message):
        found = log_likelihood((model, uniform_guide), torch.tensor([0.0, NAN, 1.0]), num_samples=200, parallel=True)
    assert found.kind == "unreliable"
    for part in (found.values, found.std_error, found.pareto_k, found.smoothed):
        assert part.isnan().tolist() == [False, True, False]
    assert "the value is NaN in 1 of 3 rows" in str(found)


@pytest.mark.parametrize("factor", [1e200, 1e30])
def test_values_that_overflow_are_unreliable(factor):
    """They were called exact, without a warning."""
    x = torch.randn(10, 2, dtype=torch.float64)
    x[3] = factor
    with pytest.warns(RuntimeWarning, match="log_likelihood: the value is -inf in 1 of 10 rows, the first of them row 3"):
        values = log_likelihood(Flow((2,)), x)
    assert "(unreliable, n=10; the value is " in str(values)
    with pytest.warns(RuntimeWarning, match="the value is -inf in 1 of 10 rows"):
        assert compare({"flow": Flow((2,))}, x).table["kind"].item() == "unreliable"


def test_minus_infinity_is_right_for_an_impossible_datum_and_plus_infinity_has_no_mean():
    def model(x, prior):
        with pyro.plate("data", len(x)):
            pyro.sample("x", prior, obs=x)

    def nothing(x, **kwargs): ...

    with pyro.validation_enabled(False):
        found = log_likelihood((model, nothing), torch.tensor([0.5, 2.0]), prior=dist.Uniform(-1.0, 1.0))
        assert (found.kind, found.values.tolist()) == ("exact", [pytest.approx(-np.log(2)), -INF])
        pole = dist.Beta(0.5, 0.5)
        with pytest.warns(RuntimeWarning, match="the value is inf in 1 of 2 rows"):
            found = log_likelihood((model, nothing), torch.tensor([0.0, 0.5]), prior=pole)
    assert found.kind == "unreliable"


def test_an_unreliable_bound_is_still_called_a_bound():
    x = torch.zeros(5, 1)
    with pytest.warns(RuntimeWarning, match="a guide closer to the posterior: this one may be too narrow or too wide"):
        found = log_likelihood(gaussian(0.05), x)
    assert (found.kind, found.label, found.is_bound) == ("unreliable", "unreliable lower bound", True)
    assert "(unreliable lower bound, k=1000, n=5" in str(found)
    assert "unreliable lower bound" in str(compare({"narrow": found}))
    assert compare({"narrow": found}).table["kind"].item() == "unreliable"
    assert known([0.0], "unreliable", 100).label == "unreliable"  # as of an estimate of log Z


# Comparisons.


def known(values, kind="exact", k=1, **rest):
    values = torch.tensor(values)
    return LogLikelihood(values, torch.zeros_like(values), kind, k, **rest)


def test_a_fit_with_nan_is_ranked_behind_the_others_and_has_no_weight():
    fits = {"nan": known([0.0, NAN, 0.0]), "bad": known([-5.0, -6.0, -7.0]), "good": known([-1.0, -1.5, -1.0])}
    comparison = compare(fits)
    table = comparison.table
    assert list(table.index) == ["good", "bad", "nan"]
    assert table["weight"][:2].tolist() == pytest.approx([1, 0], abs=1e-3)
    assert table.loc["nan", ["elpd", "elpd_diff", "weight", "nats"]].isna().all()
    assert "nan: the value is NaN in 1 of 3 rows." in str(comparison)
    ax = comparison.plot()
    assert "elpd not finite: nan" in ax.get_xlabel()
    assert len(ax.get_yticks()) == 2


def test_a_fit_that_rules_a_row_out_is_infinitely_worse():
    comparison = compare({"ruled out": known([-1.0, -INF, 0.0]), "good": known([-1.0, -1.5, -1.0])})
    table = comparison.table
    assert list(table.index) == ["good", "ruled out"]
    assert table.loc["ruled out", ["elpd", "elpd_diff", "nats"]].tolist() == [-INF, INF, INF]
    assert table.loc["good", ["elpd_diff", "dse"]].tolist() == [0, 0]
    assert "ruled out: the value is infinite in 1 of 3 rows." in str(comparison)
    assert 0 < table.loc["ruled out", "weight"] < 1  # it is better in the last row
    both = compare({"a": known([-1.0, -INF, 0.0]), "b": known([-1.0, -INF, -1.0])}).table
    assert both["elpd_diff"].tolist() == [0, 1]  # the row that both rule out does not tell them apart
    assert both["dse"].isna().sum() == 0
    with pytest.raises(ValueError, match="No fit has a finite elpd to plot: a: the value is infinite"):
        compare({"a": known([-INF, -INF])}).plot()
    assert compare({"a": known([-INF, -INF]), "b": known([-INF, -INF])}).table["weight"].tolist() == [0.5, 0.5]


def test_the_table_has_k_where_it_is_known():
    assert "pareto_k" not in compare({"a": known([-1.0, -2.0])}).table
    some = {"pareto_k": torch.tensor([0.2, 0.9])}
    comparison = compare({"a": known([-1.0, -2.0]), "b": known([-3.0, -2.0], "unreliable", 1000, **some)})
    assert comparison.table["unreliable"].tolist() == pytest.approx([NAN, 0.5], nan_ok=True)
    assert comparison.table["pareto_k"].tolist() == pytest.approx([NAN, 0.9], nan_ok=True)
    text = str(comparison)
    assert "b: Pareto k-hat is above 0.7 (largest 0.90) in 1 of 2 rows." in text
    assert "nats, bits_per_dim: negative and per datum, lower is better" in text


def test_every_figure_says_its_sign():
    found, table = known([-1.0, -3.0]), compare({"a": known([-1.0, -3.0])}).table
    assert (found.mean, found.nats) == (-2.0, 2.0)
    assert table.loc["a", ["elpd", "nats"]].tolist() == [-4.0, 2.0]
    assert str(found).startswith("2.000 ± 1.000 nats per datum, lower is better")


def test_a_vae_in_a_comparison_has_k():
    torch.manual_seed(1)
    vae, x = VAE((2,), latent_dim=1, hidden=(4,)), torch.randn(10, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        table = compare({"vae": vae}, x, num_samples=100).table
    assert table["pareto_k"].notna().all()
