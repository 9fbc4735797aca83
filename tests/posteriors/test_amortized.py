"""Amortised posteriors against closed forms; simulators that fail; tables of simulations; clear errors."""

from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive

from pyro_genmodels import MAF, Autoregressive, Diffusion, Flow, ODEFlow, to_arviz
from pyro_genmodels.families import DenseField
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.posteriors import (
    AmortizedPosterior,
    ConvolutionalEmbedding,
    DenseEmbedding,
    SequenceEmbedding,
    SetEmbedding,
    diagnose_posterior,
    simulation_based_calibration,
)
from pyro_genmodels.posteriors.conditional import _parts
from pyro_genmodels.posteriors.simulations import SimulatedModel, Simulations

NOISE = 0.5
SMALL = partial(Flow, transform=MAF(transforms=1, hidden=(32,)))


def conjugate():
    """A normal mean with a standard normal prior and two observed coordinates: its posterior is normal."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(loc, NOISE).to_event(1))


def exact(x):
    """Return means, (..., 2), and the deviation of the posterior of `conjugate`."""
    return x / (1 + NOISE**2), (1 + NOISE**-2) ** -0.5


@cache
def trained():
    """Return an amortised posterior of `conjugate`, trained once."""
    pyro.set_rng_seed(0)
    amortized = AmortizedPosterior(conjugate, observed=["x"], family=SMALL)
    return amortized.train(4000, step_size=3e-3, max_epochs=40, progress=False)


@pytest.mark.parametrize("x", [[0.0, 0.0], [1.0, -1.5], [-0.7, 2.0]])
def test_means_and_deviations_are_those_of_the_closed_form(x):
    """Within 0.2 deviations and 15 per cent, what 4000 draws of the exact posterior miss once in 10^30 seeds."""
    draws = trained().given(x=x).get_samples(4000)["loc"]
    mean, deviation = exact(torch.tensor(x))
    assert ((draws.mean(0) - mean) / deviation).abs().max() < 0.2
    assert (draws.std(0) / deviation - 1).abs().max() < 0.15


def test_coverage_is_nominal_at_every_level():
    """The true value is inside of the central interval of draws as often as the level says.

    Of 1000 independent simulations the share is within 4.5 deviations of a binomial, false alarms below 1e-5, and 3 per cent.
    """
    pyro.set_rng_seed(1)
    new = AmortizedPosterior(conjugate, observed=["x"]).simulate(1000, progress=False).simulations
    draws = trained().samples_given(500, x=new["x"])["loc"]
    assert draws.shape == (500, 1000, 2)
    ranks = (draws < new["loc"]).double().mean(0)
    for level in (0.5, 0.8, 0.95):
        inside = ((ranks - 0.5).abs() < level / 2).double().mean(0)
        assert (inside - level).abs().max() < 4.5 * (level * (1 - level) / 1000) ** 0.5 + 0.03


def test_calibration_takes_all_simulations_in_one_batch():
    """Ranks of 200 simulations among 50 draws have the mean of uniform ones within 6 deviations and 0.1."""
    calibration = simulation_based_calibration(
        conjugate, method=trained(), observed=["x"], num_simulations=200, num_draws=50, seed=1, progress=False
    )
    ranks = calibration.ranks["loc"].double() / 50
    assert ranks.shape == (200, 2)
    assert (ranks.mean(0) - 0.5).abs().max() < 6 * (200 * 12) ** -0.5 + 0.1


def test_a_fit_is_one_like_any_other():
    x = torch.tensor([1.0, -1.0])
    fit = trained().given(x=x)
    weighted = fit.psis(2000)
    marginal = torch.distributions.Normal(torch.zeros(2), (1 + NOISE**2) ** 0.5)
    found = weighted.log_evidence
    assert weighted.is_reliable
    assert abs(found.value - marginal.log_prob(x).sum()) < 6 * found.std_error + 1e-3
    data = to_arviz(fit, num_samples=20, progress=False)
    assert {"posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data"} <= set(data.groups())
    assert torch.tensor(data.observed_data["x"].values).equal(x)
    assert Predictive(conjugate, posterior_samples=fit.get_samples(7))()["x"].shape == (7, 2)
    assert fit.guide()["loc"].shape == (2,)


def test_fits_and_refined_posteriors_are_snapshots():
    pyro.set_rng_seed(2)
    amortized = AmortizedPosterior(conjugate, observed=["x"], family=SMALL).train(200, max_epochs=2, progress=False)
    x = torch.tensor([1.0, -1.0])
    fit, number = amortized.given(x=x), len(amortized.simulations["x"])
    before = fit.approximation().log_prob(torch.zeros(2))
    near = amortized.refine(x=x, num_rounds=1, num_simulations=100, max_epochs=2, progress=False)
    amortized.train(250, max_epochs=2, progress=False)
    assert fit.approximation().log_prob(torch.zeros(2)) == before
    assert not any(p.requires_grad for p in amortized.family.parameters())
    assert (number, len(near.simulations["x"]), len(amortized.simulations["x"])) == (200, 300, 250)
    assert near.given().get_samples(3)["loc"].shape == (3, 2)
    with pytest.raises(ValueError, match="refined for one observation"):
        near.given(x=torch.zeros(2))
    with pytest.raises(ValueError, match="refined for one observation"):
        near.samples_given(x=torch.zeros(5, 2))


def test_a_row_that_is_held_out_stays_so_when_rows_are_added():
    """Rows that were trained on would have too small a loss, and training that goes on would stop at once."""
    held, rest = _parts(500)
    more, _ = _parts(2000)
    assert torch.equal(more[more < 500], held)
    assert torch.equal(torch.cat([held, rest]).sort().values, torch.arange(500))
    assert 0.08 < len(more) / 2000 < 0.12
    assert len(_parts(20)[0]) > 0


def test_simulations_that_were_made_before_an_interruption_are_kept():
    runs = []

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        runs.append(loc)
        if len(runs) == 38:
            raise KeyboardInterrupt
        pyro.deterministic("x", loc + torch.randn(2), event_dim=1)

    amortized = AmortizedPosterior(model, observed=["x"], family=SMALL)
    runs.clear()
    with pytest.raises(KeyboardInterrupt, match="30 of 50 are kept"):
        amortized.train(50, parallel=False, max_epochs=1, progress=False)
    assert len(amortized.simulations["x"]) == 30
    amortized.train(50, parallel=False, max_epochs=1, progress=False)
    assert len(amortized.simulations["x"]) == 50
    assert len(runs) == 38 + 20


@pytest.mark.parametrize("last", [1, 40])
def test_parameters_of_an_interrupted_training_are_those_of_its_best_epoch(last):
    """Training that is interrupted in its fifth epoch has those of training of four, and none before the first ends."""

    class Interrupted:
        def __init__(self, family):
            self.loss, self.calls = MaximumLikelihood()(family), 0

        def __call__(self, *rows):
            self.calls += 1
            if self.calls == last:
                raise KeyboardInterrupt
            return self.loss(*rows)

    pyro.set_rng_seed(0)
    simulations = AmortizedPosterior(conjugate, observed=["x"]).simulate(800, progress=False).simulations
    found = []
    for objective, epochs in ((Interrupted, 10), (None, 4)):
        pyro.set_rng_seed(1)
        amortized = AmortizedPosterior(conjugate, observed=["x"], family=SMALL, objective=objective, simulations=simulations)
        if objective is None:
            amortized.train(800, max_epochs=epochs, progress=False)
        else:
            with pytest.raises(KeyboardInterrupt, match="Training was interrupted"):
                amortized.train(800, max_epochs=epochs, progress=False)
        found.append(amortized)
    interrupted, ended = found
    if last == 1:
        assert interrupted.family is None
        assert interrupted.history == []
        return
    assert interrupted.history == ended.history
    for p, x in zip(interrupted.family.parameters(), ended.family.parameters(), strict=True):
        assert p.equal(x)
    assert interrupted.given(x=torch.zeros(2)).get_samples(3)["loc"].shape == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.5, 0.1])
def test_refined_posteriors_have_the_means_and_deviations_of_the_closed_form(noise):
    """Three seeds, three times 500 simulations: root mean square errors of means and deviations below 0.15 and 0.1."""

    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(loc, noise).to_event(1))

    x, options = torch.tensor([1.0, -1.5]), {"max_epochs": 60, "step_size": 3e-3, "batch_size": 50, "progress": False}
    mean, deviation = x / (1 + noise**2), (1 + noise**-2) ** -0.5
    means, deviations = [], []
    for seed in range(3):
        pyro.set_rng_seed(seed)
        amortized = AmortizedPosterior(model, observed=["x"], family=SMALL).train(500, **options)
        draws = amortized.refine(x=x, num_rounds=2, num_simulations=500, **options).given().get_samples(4000)["loc"]
        means.append((draws.mean(0) - mean) / deviation)
        deviations.append(draws.std(0) / deviation - 1)
    assert torch.cat(means).square().mean().sqrt() < 0.15
    assert torch.cat(deviations).square().mean().sqrt() < 0.1


@pytest.mark.slow
def test_a_refined_posterior_of_a_rare_observation_is_nearer_to_the_closed_form():
    """At two deviations out in both coordinates: its KL divergence from the exact posterior falls, to less than 0.1 nats."""
    pyro.set_rng_seed(9)
    x = torch.tensor([2.2, -2.2])
    amortized = AmortizedPosterior(conjugate, observed=["x"], family=SMALL)
    amortized.train(300, batch_size=50, step_size=3e-3, max_epochs=60, progress=False)
    near = amortized.refine(
        x=x, num_rounds=2, num_simulations=2000, batch_size=50, step_size=3e-3, max_epochs=60, progress=False
    )
    truth = torch.distributions.Independent(torch.distributions.Normal(*exact(x)), 1)
    z = truth.sample((4000,))
    before, after = (
        (truth.log_prob(z) - fit.approximation().log_prob(z)).mean() for fit in (amortized.given(x=x), near.given())
    )
    assert after < before
    assert after < 0.1


def test_truncated_proposals_are_the_prior_inside_of_a_region():
    """They are normal draws conditioned on being where the posterior is: near the observation."""
    values = {"x": torch.tensor([1.0, -1.0])}
    amortized = trained()
    latents = amortized._truncated_prior(values, 2000, progress=False)["loc"]
    density = amortized.given(**values).approximation()
    prior = torch.randn(20_000, 2)
    lowest = density.log_prob(latents).min()
    inside = prior[density.log_prob(prior) > lowest]
    error = (inside.var(0) * (1 / len(inside) + 1 / len(latents))).sqrt()
    assert ((latents.mean(0) - inside.mean(0)) / error).abs().max() < 6
    assert 0.05 < len(inside) / len(prior) < 0.95


def test_simulations_that_fail_or_are_nan_are_counted_and_left_out():
    def simulator():
        share = pyro.sample("share", dist.Uniform(0.0, 1.0))
        if share > 0.9:
            raise ZeroDivisionError("diverged")
        x = torch.randn(3) + share
        pyro.deterministic("x", x if share > 0.2 else x * torch.nan)

    pyro.set_rng_seed(3)
    amortized = AmortizedPosterior(simulator, observed=["x"], family=SMALL)
    with pytest.warns(RuntimeWarning, match=r"of 300 simulations were left out: .* NaN or infinite values, .*diverged"):
        amortized.simulate(300, progress=False)
    share = amortized.simulations["share"]
    assert len(share) + amortized.failures.total() == 300
    assert share.min() > 0.2
    assert share.max() < 0.9
    fit = amortized.train(100, max_epochs=1, progress=False).given(x=torch.zeros(3))
    assert fit.get_samples(10)["share"].shape == (10,)
    with pytest.raises(NotImplementedError, match="is computed by a simulator, so there are draws"):
        fit.psis()
    assert diagnose_posterior(fit, num_samples=400).table["mean"]["share"] == pytest.approx(0.5, abs=0.4)
    with pytest.raises(ValueError, match="All 5 simulations failed: 5 with RuntimeError: no"):
        AmortizedPosterior(_failing(), observed=["x"]).simulate(5, progress=False)


def test_a_simulator_with_its_own_random_numbers_is_refined_and_calibrated():
    """One that runs alone draws its latent variables without the simulation; `parallel=True` is remembered."""
    runs = []

    def simulator():
        share = pyro.sample("share", dist.Uniform(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        runs.append(share.shape)
        pyro.deterministic("x", share[..., None] + scale[..., None] * torch.randn(*share.shape, 3), event_dim=1)

    pyro.set_rng_seed(4)
    amortized = AmortizedPosterior(simulator, observed=["x"], family=SMALL)
    assert {name: x.shape for name, x in amortized.simulator.draw_latents(3).items()} == {"share": (3,), "scale": (3,)}
    runs.clear()
    amortized.train(200, max_epochs=1, parallel=True, progress=False)
    amortized.refine(x=torch.zeros(3), num_rounds=1, num_simulations=20, max_epochs=1, progress=False)
    assert () not in runs
    found = simulation_based_calibration(simulator, method=amortized, num_simulations=20, observed=["x"], progress=False)
    assert found.num_simulations == 20
    assert set(found.ranks) == {"share", "scale"}


def _failing():
    """Return a simulator that fails after the two runs by which its variables are found."""
    runs = []

    def simulator():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        runs.append(z)
        if len(runs) > 2:
            raise RuntimeError("no")
        pyro.deterministic("x", z)

    return simulator


def test_a_table_of_simulations_is_trained_on():
    pyro.set_rng_seed(4)
    loc = torch.randn(200, 2)
    x = loc + NOISE * torch.randn(200, 2)
    x[0] = torch.nan
    with pytest.warns(RuntimeWarning, match="1 of 200 simulations were left out: 1 with NaN"):
        amortized = AmortizedPosterior(conjugate, observed=["x"], family=SMALL, simulations={"loc": loc.numpy(), "x": x})
    assert amortized.simulations["x"].equal(x[1:])
    amortized.train(199, max_epochs=1, progress=False)
    assert len(amortized.simulations["x"]) == 199
    for table, message in [
        ({"loc": loc}, "wants the values of loc, x.* but found loc: x differs"),
        ({"loc": loc, "x": x[:10]}, "as many rows each"),
        ({"loc": loc, "x": x[:, :1]}, r"'x': '\(n, 2\)'"),
    ]:
        with pytest.raises(ValueError, match=message):
            AmortizedPosterior(conjugate, observed=["x"], simulations=table)

    def bounded():
        pyro.sample("x", dist.Normal(pyro.sample("share", dist.Uniform(0.0, 1.0)), 1.0))

    with pytest.raises(ValueError, match="'share' outside of its support"):
        AmortizedPosterior(bounded, observed=["x"], simulations={"share": torch.tensor([0.5, 2.0]), "x": torch.zeros(2)})


def test_runs_of_many_simulations_and_single_ones_have_one_law():
    """Means of 2000 simulations agree within 6 standard errors, with discrete variables and plates in the model."""

    def model(n=3):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        sign = pyro.sample("sign", dist.Bernoulli(0.3))
        with pyro.plate("rows", n):
            pyro.sample("x", dist.Normal(4 * sign, scale))

    simulator = SimulatedModel(model, (), {}, ["x"])
    assert simulator.coordinates.names == ["scale"]
    assert simulator.latents == ["scale", "sign"]
    assert simulator._can_run_together()
    together = Simulations.joined(list(simulator.simulate(2000, parallel=True, progress=False))).values
    alone = Simulations.joined(list(simulator.simulate(500, parallel=False, progress=False))).values
    assert together["x"].shape == (2000, 3)
    assert alone["sign"].shape == (500,)
    for name in ("scale", "sign", "x"):
        a, b = (values[name].reshape(len(values[name]), -1).mean(1) for values in (together, alone))
        assert (a.mean() - b.mean()).abs() < 6 * (a.var() / len(a) + b.var() / len(b)).sqrt()
    for parallel in (True, False):  # given latent variables are kept
        latents = simulator.draw_latents(4)
        values = Simulations.joined(list(simulator.simulate(4, latents, parallel=parallel, progress=False))).values
        assert values["scale"].equal(latents["scale"])
        assert values["sign"].equal(latents["sign"])


@pytest.mark.slow
def test_simulations_follow_from_the_seed_whatever_the_number_of_processes():
    def simulator():
        pyro.deterministic("x", pyro.sample("z", dist.Normal(0.0, 1.0)) + torch.randn(()))

    found = []
    for n_jobs in (1, 2):
        pyro.set_rng_seed(5)
        found.append(AmortizedPosterior(simulator, observed=["x"]).simulate(120, n_jobs=n_jobs, progress=False).simulations)
    assert found[0]["x"].equal(found[1]["x"])
    assert found[0]["x"].unique().numel() == 120


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(Autoregressive, marks=pytest.mark.slow),
        partial(ODEFlow, network=DenseField(32, 1)),
        pytest.param(partial(Diffusion, network=DenseField(32, 1)), marks=pytest.mark.slow),
    ],
    ids=["Autoregressive", "ODEFlow", "Diffusion"],
)
def test_any_conditional_family_is_trained_by_its_own_objective(family):
    pyro.set_rng_seed(6)
    amortized = AmortizedPosterior(conjugate, observed=["x"], family=family)
    amortized.train(1000, max_epochs=25, batch_size=50, step_size=5e-3, progress=False)
    x = torch.tensor([1.0, -1.5])
    draws = amortized.given(x=x).get_samples(500)["loc"]
    mean, deviation = exact(x)
    assert ((draws.mean(0) - mean) / deviation).abs().max() < 0.6  # a prior has an error of 1.8 in units of this
    assert amortized.history[-1] < amortized.history[0]


def rows(n=8):
    """Independent rows around one mean."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", n):
        pyro.sample("x", dist.Normal(loc, 1.0))


@pytest.mark.slow
def test_sets_of_any_size_and_order():
    """The posterior of n rows has the deviation (1 + n)^-1/2; within 25 per cent."""
    pyro.set_rng_seed(7)
    embedding = SetEmbedding(8, hidden=(32,), min_rows=1)
    amortized = AmortizedPosterior(rows, observed=["x"], family=SMALL, embedding=embedding)
    amortized.train(3000, max_epochs=25, step_size=3e-3, progress=False)
    x = torch.tensor([1.0, 0.2, -0.3, 0.9, 1.4, 0.1, 0.5, 0.6])
    for n in (1, 8):
        fit = amortized.given(x=x[:n])
        draws = fit.get_samples(2000)["loc"]
        assert abs(draws.mean() - x[:n].sum() / (n + 1)) < 0.4 * (n + 1) ** -0.5
        assert abs(draws.std() * (n + 1) ** 0.5 - 1) < 0.25
        weighted = fit.psis(2000).mean(lambda loc: loc)  # the density is that of the rows that are there
        assert abs(weighted - x[:n].sum() / (n + 1)) < 0.2 * (n + 1) ** -0.5
    log_prob = [amortized.given(x=y).approximation().log_prob(torch.zeros(1)) for y in (x, x.flip(0))]
    torch.testing.assert_close(*log_prob)
    with pytest.raises(ValueError, match="in the shape of the simulations"):
        amortized.given(x=torch.zeros(9))


def test_embeddings():
    x = {"a": torch.randn(5, 12), "b": torch.randn(5, 12, 2), "c": torch.randn(5, 1, 8, 8)}
    for embedding, name in [(DenseEmbedding(4), "b"), *((ConvolutionalEmbedding(4), name) for name in x)]:
        network = embedding.build(x[name].shape[1:])
        assert network(x[name]).shape == (5, 4)
    with pytest.raises(ValueError, match="several rows"):
        SetEmbedding().build(torch.Size([]))
    hidden = DenseEmbedding(missing=0.5).hide(x["b"])
    assert 0 < hidden.isnan().double().mean() < 0.5


def test_sequences_of_varying_length_through_attention():
    """Values and gradients are those without padding, whatever the padding; the order of rows matters."""
    x = torch.randn(3, 10, 2)
    network = SequenceEmbedding(4, width=16).build(x.shape[1:])
    padded = x.clone()
    padded[:, 6:] = torch.nan
    for training in (True, False):  # torch computes attention in another way in evaluation mode
        network.train(training)
        short = SequenceEmbedding(4, width=16).build(torch.Size([6, 2])).train(training)
        short.load_state_dict({k: v[:6] if k == "positions" else v for k, v in network.state_dict().items()})
        torch.testing.assert_close(network(padded), short(x[:, :6]), atol=1e-5, rtol=1e-5)
        assert network(x).shape == (3, 4)
        assert (network(x) - network(x.flip(1))).abs().max() > 1e-3
        assert (network(x) - network(padded)).abs().max() > 1e-3
        assert network(torch.full_like(x, torch.nan)).isfinite().all()
    network.train()(padded).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.first.weight.grad.abs().max() > 0
    choice = SequenceEmbedding(min_rows=4)
    number = (~choice.hide(torch.zeros(500, 10)).isnan()).sum(1)
    assert number.unique().tolist() == [4, 5, 6, 7, 8, 9, 10]  # a number is missing once in 10^32 seeds
    assert choice.completed(torch.zeros(4), torch.Size([10])).isnan().sum() == 6
    assert choice.completed(torch.zeros(3), torch.Size([10])).shape == (3,)
    with pytest.raises(ValueError, match="several rows"):
        choice.build(torch.Size([]))
    with pytest.raises(ValueError, match="even width that num_heads divides"):
        SequenceEmbedding(width=30)
    assert SequenceEmbedding(width=4, num_heads=4).build(torch.Size([10]))(torch.zeros(2, 10)).shape == (2, 32)


@pytest.mark.slow
def test_a_missing_coordinate_has_the_posterior_of_the_closed_form():
    """Two correlated latent variables, one observed: means within 0.3 deviations and deviations within 20 per cent."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])

    def model():
        loc = pyro.sample("loc", dist.MultivariateNormal(torch.zeros(2), covariance))
        pyro.sample("x", dist.Normal(loc, NOISE).to_event(1))

    pyro.set_rng_seed(10)
    embedding = DenseEmbedding(8, hidden=(32,), missing=0.8)
    amortized = AmortizedPosterior(model, observed=["x"], family=SMALL, embedding=embedding)
    amortized.train(4000, max_epochs=60, step_size=3e-3, progress=False)
    for x in (torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, -1.5]), torch.tensor([1.0, -0.5])):
        there = ~x.isnan()
        cross = covariance[:, there]
        gain = cross @ torch.linalg.inv(covariance[there][:, there] + NOISE**2 * torch.eye(int(there.sum())))
        mean, deviation = gain @ x[there], (covariance - gain @ cross.T).diagonal().sqrt()
        draws = amortized.given(x=x).get_samples(4000)["loc"]
        assert ((draws.mean(0) - mean) / deviation).abs().max() < 0.3
        assert (draws.std(0) / deviation - 1).abs().max() < 0.2


def test_missing_numbers_are_told_to_the_network():
    pyro.set_rng_seed(8)
    embedding = DenseEmbedding(4, hidden=(16,), missing=0.5)
    amortized = AmortizedPosterior(rows, observed=["x"], family=SMALL, embedding=embedding)
    amortized.train(100, max_epochs=1, progress=False)
    x = torch.tensor([1.0, torch.nan, *[0.0] * 6])
    fit = amortized.given(x=x)
    log_p = fit.problem.batched(torch.zeros(1, 1))[0]
    assert log_p.item() == pytest.approx(-8 * 0.9189385 - 0.5, abs=1e-5)  # of the prior and 7 rows
    assert fit.psis(100).log_p.isfinite().all()


def test_wrong_names_shapes_and_kinds_are_refused():
    def data(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def dependent():
        top = pyro.sample("top", dist.Uniform(1.0, 2.0))
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Uniform(0.0, top)), 1.0))

    for error, message, call in [
        (TypeError, r'such as observed=\["x"\]', lambda: AmortizedPosterior(conjugate, observed="x")),
        (ValueError, "no site 'y' to observe; its sites are loc, x", lambda: AmortizedPosterior(conjugate, observed=["y"])),
        (ValueError, "observes y, but observed= has x only", lambda: AmortizedPosterior(data, torch.zeros(()), observed=["x"])),
        (ValueError, "support of 'z' depends on other", lambda: AmortizedPosterior(dependent, observed=["x"])),
        (ValueError, "no continuous latent", lambda: AmortizedPosterior(conjugate, observed=["loc", "x"])),
        (
            TypeError,
            "such as family=Flow, but found a Flow",
            lambda: AmortizedPosterior(conjugate, observed=["x"], family=Flow((2,))),
        ),
        (TypeError, "such as SetEmbedding", lambda: AmortizedPosterior(conjugate, observed=["x"], embedding=3)),
        (
            ValueError,
            "not among the observed",
            lambda: AmortizedPosterior(conjugate, observed=["x"], embedding={"y": SetEmbedding()}),
        ),
        (ValueError, "has not been trained", lambda: AmortizedPosterior(conjugate, observed=["x"]).given(x=torch.zeros(2))),
        (ValueError, "integer num_simulations", lambda: AmortizedPosterior(conjugate, observed=["x"]).train(0)),
        (
            ValueError,
            "wants 20 simulations or more",
            lambda: AmortizedPosterior(conjugate, observed=["x"]).train(5, progress=False),
        ),
        (
            ValueError,
            "wants the observations x by name, but found y",
            lambda: trained().given(y=torch.zeros(2)),
        ),
        (ValueError, r"\(2,\), but found \(3,\)", lambda: trained().given(x=torch.zeros(3))),
        (ValueError, "NaN or infinite", lambda: trained().given(x=[0.0, torch.nan])),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_observations_unlike_the_simulations_are_told():
    def counts():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("count", dist.Poisson(rate.unsqueeze(-1).expand(*rate.shape, 2)).to_event(1))

    amortized = AmortizedPosterior(counts, observed=["count"]).train(200, max_epochs=1, progress=False)
    amortized.given(count=[1, 3])
    for count in ([-3, 2], [1, 1000]):
        with pytest.warns(RuntimeWarning, match="1 of 1 observations of 'count' are outside of the range of the 200 sim"):
            amortized.given(count=count)
    with pytest.raises(ValueError, match="whole numbers, but observations are not"):
        amortized.given(count=[1.5, 2.0])
