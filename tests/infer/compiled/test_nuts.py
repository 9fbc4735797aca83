"""`CompiledNUTS` against conjugate posteriors and Pyro's own NUTS, and as a run of `MCMC` wherever one is taken."""

import gc
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pyro_examples as examples
import pytest
import torch
from marks import slow_unless
from pyro.infer import MCMC, NUTS, Predictive
from pyro.ops.stats import effective_sample_size

from pyro_genmodels import to_arviz
from pyro_genmodels.infer.compiled import processes
from pyro_genmodels.infer.compiled.density import LogDensity
from pyro_genmodels.infer.compiled.modes import Captured, Compiled, Eager
from pyro_genmodels.infer.compiled.nuts import CompiledNUTS
from pyro_genmodels.infer.compiled.recorder import CaptureError, StaleGraphError

THRESHOLD = 6.0
"""Standard errors. A false alarm has probability 2e-9, and 7e-6 if the effective sample size is 1.8 times too large."""


def sampled(model, *args, num_chains=2, num_warmup=200, num_samples=800, mode=None, seed=1, **options):
    nuts = CompiledNUTS(
        model,
        num_chains=num_chains,
        num_warmup=num_warmup,
        num_samples=num_samples,
        mode=mode or Captured(),
        progress=False,
        **options,
    )
    pyro.set_rng_seed(seed)
    nuts.run(*args)
    return nuts


def mean_and_error(x):
    """Return the mean of draws, (chain, draw, ...), and its standard error."""
    x = x.double()
    return x.mean((0, 1)), (x.flatten(0, 1).var(0) / effective_sample_size(x)).sqrt()


def assert_moments(draws, mean, variance):
    """Compare mean and variance of draws, (chain, draw, ...), with exact ones by z-tests."""
    for found, exact in ((draws, mean), ((draws - mean).square(), variance)):
        average, error = mean_and_error(found)
        z = (average - exact) / error
        assert z.abs().max() < THRESHOLD, z


# Conjugate posteriors.


@dataclass
class Conjugate:
    """A model with one latent variable z, whose posterior is known."""

    model: object
    posterior: object
    options: dict


def normal():
    y = torch.tensor([0.5, 1.5, 3.0])

    def model():
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(z, 1.5), obs=y)

    precision = 1 / 4 + 3 / 2.25
    return Conjugate(model, dist.Normal((1 / 4 + y.sum() / 2.25) / precision, precision**-0.5), {})


def counts():
    y = torch.tensor([2.0, 0.0, 1.0])

    def model():
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Poisson(z).expand([3]).to_event(1), obs=y)

    return Conjugate(model, dist.Gamma(2 + y.sum(), 4.0), {})


def successes():
    y, total = torch.tensor([3.0, 9.0]), 10

    def model():
        with pyro.plate("coins", 2):
            z = pyro.sample("z", dist.Beta(2.0, 3.0))
            pyro.sample("y", dist.Binomial(total, z), obs=y)

    return Conjugate(model, dist.Beta(2 + y, 3 + total - y), {})


def classes():
    y = torch.tensor([3.0, 1.0, 0.0])

    def model():
        z = pyro.sample("z", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        pyro.sample("y", dist.Multinomial(4, z), obs=y)

    return Conjugate(model, dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0]) + y), {})


def regression():
    """Correlated coefficients, with the mass matrix that knows correlations."""
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    y = torch.tensor([0.3, 0.9, 2.5, 2.8])

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(x @ z, 0.7), obs=y)

    covariance = (torch.eye(2) / 9 + x.T @ x / 0.49).inverse()
    return Conjugate(model, dist.MultivariateNormal(covariance @ x.T @ y / 0.49, covariance), {"low_rank": True})


def mixture():
    """A discrete variable, summed out."""
    y = torch.tensor(1.7)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z + 3 * k, 1.0), obs=y)

    shift = torch.tensor([0.0, 3.0])
    weights = torch.tensor([0.7, 0.3]) * dist.Normal(shift, 2**0.5).log_prob(y).exp()
    components = dist.Normal((y - shift) / 2, 0.5**0.5)
    return Conjugate(model, dist.MixtureSameFamily(dist.Categorical(weights / weights.sum()), components), {})


@pytest.mark.parametrize(
    "make", slow_unless([normal, counts, mixture], [normal, counts, successes, classes, regression, mixture])
)
def test_moments_of_conjugate_posteriors(make):
    case = make()
    nuts = sampled(case.model, **case.options)
    z = nuts.get_samples(group_by_chain=True)["z"]
    assert z.dtype == torch.get_default_dtype()
    assert_moments(z, case.posterior.mean, case.posterior.variance)
    assert nuts.statistics["diverging"].sum() == 0


@pytest.mark.usefixtures("float64")
def test_moments_in_doubles():
    test_moments_of_conjugate_posteriors(normal)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Eager(), Compiled()])
def test_moments_in_other_modes(mode):
    case = normal()
    z = sampled(case.model, mode=mode).get_samples(group_by_chain=True)["z"]
    assert_moments(z, case.posterior.mean, case.posterior.variance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eight_schools", "guide_list"])
def test_agreement_with_pyros_nuts(name):
    fit, args = getattr(examples, name)()
    pyro.set_rng_seed(0)
    stock = MCMC(NUTS(fit.model), num_samples=200, warmup_steps=200, disable_progbar=True)
    stock.run(*args)
    ours = sampled(fit.model, *args).get_samples(group_by_chain=True)
    theirs = stock.get_samples(group_by_chain=True)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        unbounded = torch.log if name in ("tau", "scale") else torch.nn.Identity()
        (mean, error), (other_mean, other_error) = (mean_and_error(unbounded(draws)) for draws in (x, theirs[name]))
        z = (mean - other_mean) / (error**2 + other_error**2).sqrt()
        assert z.abs().max() < THRESHOLD, (name, z)


# A run like those of MCMC.


def rows(x, y=None):
    """A model with plates, a deterministic site and a discrete variable for each row."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.Exponential(1.0))
    with pyro.plate("data", len(x)):
        mean = pyro.deterministic("mean", slope * x)
        return pyro.sample("y", dist.Normal(mean, scale), obs=y)


X, Y = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.1, 0.8, 2.1, 2.7])


@pytest.fixture(scope="module")
def run():
    pyro.set_rng_seed(0)
    nuts = CompiledNUTS(rows, num_chains=2, num_warmup=50, num_samples=40, mode=Captured(), progress=False)
    nuts.run(X, y=Y)
    return nuts


def test_draws_have_the_shapes_of_mcmc(run):
    grouped, flat = run.get_samples(group_by_chain=True), run.get_samples()
    assert {name: tuple(x.shape) for name, x in grouped.items()} == {"slope": (2, 40), "scale": (2, 40)}
    assert torch.equal(grouped["scale"].flatten(), flat["scale"])
    assert (flat["scale"] > 0).all()
    assert run.get_samples(num_samples=7)["slope"].shape == (7,)


def test_warmup_is_kept_apart(run):
    assert run.warmup_samples["scale"].shape == (2, 50)
    assert (run.warmup_samples["scale"] > 0).all()
    assert {x.shape for x in run.warmup_statistics.values()} == {(2, 50)}
    step_size = run.warmup_statistics["step_size"]
    assert (step_size.std(1) > 0).all()


def test_statistics_describe_each_draw(run):
    names = {"energy", "lp", "acceptance_rate", "step_size", "tree_depth", "n_steps", "diverging"}
    assert run.statistics.keys() == names
    assert {x.shape for x in run.statistics.values()} == {(2, 40)}
    samples = run.get_samples()
    expected = dist.Normal(0.0, 1.0).log_prob(samples["slope"]) - samples["scale"] + samples["scale"].log()
    expected = expected + dist.Normal(samples["slope"][:, None] * X, samples["scale"][:, None]).log_prob(Y).sum(-1)
    np.testing.assert_allclose(run.statistics["lp"].reshape(-1), expected, rtol=1e-4, atol=1e-4)
    assert (run.statistics["energy"] >= -run.statistics["lp"]).all()  # kinetic energy is positive
    assert (run.statistics["n_steps"] < 2 ** (run.statistics["tree_depth"] + 1)).all()


def test_diagnostics_and_summary(run, capsys):
    found = run.diagnostics()
    assert found["slope"].keys() == {"n_eff", "r_hat"}
    assert found["divergences"].keys() == {"chain 0", "chain 1"}
    assert 0.5 < found["acceptance rate"]["chain 1"] <= 1
    run.summary()
    printed = capsys.readouterr().out
    assert "slope" in printed
    assert f"Number of divergences: {run.statistics['diverging'].sum()}" in printed


def test_export_to_arviz_has_plates_and_statistics(run):
    data = to_arviz(run, progress=False)
    assert data["posterior"]["mean"].dims == ("chain", "draw", "data")
    assert data["log_likelihood"]["y"].shape == (2, 40, 4)
    stats = data["sample_stats"]
    for name, values in run.statistics.items():
        np.testing.assert_array_equal(stats[name].values, values)
    samples = run.get_samples(group_by_chain=True)
    np.testing.assert_array_equal(data["posterior"]["slope"].values, samples["slope"])


def test_arviz_itself_takes_the_run(run):
    import arviz

    data = arviz.from_pyro(run)
    assert data["posterior"]["slope"].shape == (2, 40)


def test_predictive_takes_the_draws(run):
    found = Predictive(rows, run.get_samples())(X)
    assert found["y"].shape == (80, 4)


def test_discrete_variables_have_no_draws():
    nuts = sampled(mixture().model, num_samples=20, num_warmup=50)
    assert nuts.get_samples().keys() == {"z"}
    with pytest.warns(UserWarning, match="inference has summed it out"):
        data = to_arviz(nuts, progress=False)
    assert data["posterior"]["z"].shape == (2, 20)


# Seeds, processes, new data.


def short(model=rows, args=(X, Y), **options):
    nuts = sampled(model, *args, num_warmup=20, num_samples=10, **options)
    return torch.cat([x.flatten() for x in nuts.get_samples().values()])


def test_draws_follow_the_seed_and_not_the_number_of_processes():
    first = short(num_processes=1)
    assert torch.equal(first, short(num_processes=1))
    assert torch.equal(first, short(num_processes=2, num_chains=2))
    assert not torch.equal(first, short(num_processes=1, seed=2))
    three = sampled(rows, X, Y, num_warmup=20, num_samples=10, num_chains=3, num_processes=2).get_samples(group_by_chain=True)
    slopes = three["slope"]
    assert len({tuple(chain) for chain in slopes.tolist()}) == 3


def test_a_second_run_goes_on_in_the_stream_of_random_numbers():
    nuts = sampled(rows, X, Y, num_warmup=20, num_samples=10)
    first = nuts.get_samples()["slope"]
    nuts.run(X, Y)
    assert not torch.equal(first, nuts.get_samples()["slope"])


def test_a_second_run_takes_new_data():
    scale = 1.0

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 100.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, scale), obs=y)

    nuts = sampled(model, torch.full((3,), 5.0), num_warmup=100, num_samples=200)
    assert nuts.get_samples()["z"].mean() == pytest.approx(5.0, abs=0.6)
    scale = 0.01
    nuts.run(torch.full((5,), -7.0))
    assert nuts.get_samples()["z"].mean() == pytest.approx(-7.0, abs=0.1)
    assert nuts.get_samples()["z"].std() < 0.01


def test_a_second_run_over_a_density_sees_data_changed_in_place_and_captures_nothing(monkeypatch):
    y, captures = torch.tensor([0.0, 1.0]), []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    capture = LogDensity.capture
    monkeypatch.setattr(LogDensity, "capture", lambda self, z: captures.append(z) or capture(self, z))
    nuts = CompiledNUTS(model, num_chains=2, num_warmup=200, num_samples=800, mode=Captured(), progress=False)
    density = LogDensity(model, mode=Captured())
    pyro.set_rng_seed(1)
    for total in (1.0, 19.0):
        y[1] = total
        nuts.run_on(density)
        assert_moments(nuts.get_samples(group_by_chain=True)["z"], total / 3, 1 / 3)
    assert len(captures) == 1


def test_initial_values_are_those_of_a_fit():
    """Without a warm-up to speak of, chains stay near their start."""
    fit, args = examples.radon()
    start = {"mu_a": torch.tensor(30.0), "b": torch.tensor(40.0)}
    nuts = sampled(fit.model, *args, num_warmup=1, num_samples=1, init=start)
    assert nuts.warmup_samples["mu_a"].flatten().tolist() == pytest.approx([30.0, 30.0], abs=8.0)
    sampled(fit.model, *args, num_warmup=1, num_samples=1, init=fit)
    sampled(fit.model, *args, num_warmup=1, num_samples=1, init=nuts)


def test_handlers_outside_see_nothing():
    with pyro.poutine.trace() as outer:
        short()
    assert not outer.trace.nodes.keys() - {"_INPUT", "_RETURN"}


@pytest.mark.parametrize("mode", [Eager(), Captured(script=False)])
def test_handlers_outside_have_no_effect_as_around_pyros_mcmc(mode):
    """A slope fixed by a handler is sampled, and a scaled likelihood is not."""
    draws = []
    for handlers in (False, True):
        with ExitStack() as stack:
            if handlers:
                stack.enter_context(pyro.condition(data={"slope": torch.zeros(())}))
                stack.enter_context(pyro.poutine.scale(scale=100.0))
            draws.append(short(mode=mode, num_processes=1))
            pyro.set_rng_seed(1)
            mcmc = MCMC(NUTS(rows), num_samples=2, warmup_steps=2, disable_progbar=True)
            mcmc.run(X, Y)
            draws.append(torch.cat([x.flatten() for x in mcmc.get_samples().values()]))
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    with pyro.plate("outer", 2), pytest.raises(ValueError, match="plate 'outer' is around the call"):
        short(mode=mode, num_processes=1)


@pytest.mark.skipif(not processes.can_fork(), reason="processes cannot be forked here")
def test_steps_made_during_a_report_are_reported_later():
    def task(step):
        for _ in range(50):
            step(1)
            time.sleep(0.01)

    reports = []

    def report(steps):
        reports.append(steps)
        time.sleep(0.2)

    processes.run_forked([task], 1, report)
    assert sum(reports) == 50


@pytest.mark.slow
def test_processes_work_after_threads_were_used():
    """In a process of its own, since a deadlock would hang the tests."""
    code = """
import torch, pyro, pyro.distributions as dist
from pyro_genmodels.infer.compiled.modes import Captured
from pyro_genmodels.infer.compiled.nuts import CompiledNUTS
torch.set_num_threads(2)
x = torch.randn(50_000, 4)
x.exp().sum()
def model():
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=(x[:, 0] > 0).float())
nuts = CompiledNUTS(model, num_chains=2, num_processes=2, num_warmup=3, num_samples=2, max_tree_depth=2, mode=Captured())
nuts.run()
assert torch.get_num_threads() == 2
print(nuts.get_samples()["w"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([4, 4])" in done.stdout
    assert "NUTS: 100%" in done.stderr  # the progress bar


# What goes wrong.


@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_error_of_the_model_in_a_chain_reaches_the_user(num_processes):
    calls = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        calls.append(1)
        if len(calls) > 60:
            raise KeyError("mine")
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(KeyError, match="mine"):
        sampled(model, mode=Eager(), num_processes=num_processes)


def test_a_killed_process_is_reported():
    with pytest.raises(RuntimeError, match="exit code -9"):
        processes.run_forked([lambda step: 1, lambda step: os.kill(os.getpid(), signal.SIGKILL)], 2, lambda steps: None)


def test_an_error_that_does_not_pickle_is_reported_by_its_text():
    class LocalError(Exception):
        pass

    def fail(step):
        raise LocalError("here")

    with pytest.raises(RuntimeError, match="LocalError: here"):
        processes.run_forked([fail], 1, lambda steps: None)


def test_tasks_report_their_steps():
    def task(step):
        for _ in range(5):
            step(1)
        return os.getpid()

    reports = []
    pids = processes.run_forked([task] * 3, 2, reports.append)
    assert sum(reports) == 15
    assert len({*pids, os.getpid()}) == 4


def test_garbage_of_the_parent_is_not_collected_in_a_process():
    """An object that owns threads, such as a sampler, would wait for them forever: they do not exist in a fork."""
    parent = os.getpid()

    class Owner:
        def __init__(self):
            self.itself = self

        def __del__(self):
            if os.getpid() != parent:
                os._exit(1)

    gc.disable()
    try:
        Owner()
        assert processes.run_forked([lambda step: gc.collect() >= 0], 1, lambda steps: None) == [True]
    finally:
        gc.enable()


def counting_model():
    runs = []

    def model():
        runs.append(None)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(float(len(runs))))

    return model


def test_random_numbers_in_the_model_are_found_out():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.randn(()))

    with pytest.raises(ValueError, match="random numbers that are not those of a sample site"):
        sampled(model)
    with pytest.raises(StaleGraphError, match="changes from run to run"):
        sampled(counting_model())


def test_a_program_that_cannot_be_captured_says_so():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(CaptureError, match="if z > 0"):
        sampled(model)


def test_models_without_continuous_variables_are_refused():
    with pytest.raises(ValueError, match="no continuous latent variable"):
        sampled(lambda: pyro.sample("k", dist.Bernoulli(0.5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains of 1 or more"),
        ({"num_warmup": 0}, "num_warmup of 1 or more"),
        ({"num_samples": 0}, "num_samples of 1 or more"),
        ({"max_tree_depth": 0}, "max_tree_depth of 1 or more"),
        ({"num_processes": 0}, "num_processes of 1 or more"),
        ({"target_accept_prob": 1.0}, "target_accept_prob between 0 and 1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CompiledNUTS(rows, **options)


def test_processes_that_cannot_be_forked_are_refused_or_not_used(monkeypatch):
    monkeypatch.setattr("pyro_genmodels.infer.compiled.nuts.can_fork", lambda: False)
    monkeypatch.setattr("pyro_genmodels.infer.compiled.nuts.run_forked", None)
    with pytest.raises(ValueError, match="cannot fork 2 processes"):
        short(num_processes=2)
    assert len(short()) == 2 * 2 * 10


def test_results_before_a_run_are_refused():
    nuts = CompiledNUTS(rows)
    for ask in (nuts.get_samples, nuts.summary, nuts.diagnostics, lambda: nuts.warmup_samples, lambda: to_arviz(nuts)):
        with pytest.raises(ValueError, match="has not been run"):
            ask()
    assert nuts.statistics == {}


def test_without_nutpie_the_error_has_two_ways_out(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "nutpie"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nutpie", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-genmodels\[nuts\]'.*NUTS\(potential_fn="):
        short()


def missing(likelihood):
    """Return a model with missing data, by a distribution of a mean and of rows of a plate."""
    y, is_known = torch.tensor([1.0, 2.0, 0.5, 1.5]), torch.tensor([True, True, False, True])

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4):
            pyro.sample("y", likelihood(a), obs=y, obs_mask=is_known)

    return model


def test_missing_data_leave_the_posterior_as_it_is_and_are_drawn_from_their_own():
    """The mean has the conjugate posterior of three rows. Coordinates without a distribution are standard normal."""
    draws = sampled(missing(lambda a: dist.Normal(a, 1.0)), num_warmup=100, num_samples=400).get_samples(group_by_chain=True)
    assert_moments(draws["a"], torch.tensor(4.5 / 4), torch.tensor(1 / 4))
    moments = torch.tensor([0.0, 0.0, 4.5 / 4, 0.0]), torch.tensor([1.0, 1.0, 1.25, 1.0])
    assert_moments(draws["y_unobserved"], *moments)


def test_missing_positive_data_stay_finite():
    """Where they were observed their coordinates, logarithms, are standard normal."""
    nuts = sampled(missing(lambda a: dist.Exponential(a.exp())), num_warmup=100, num_samples=400)
    draws = nuts.get_samples(group_by_chain=True)["y_unobserved"].log()
    assert_moments(draws[..., [0, 1, 3]], torch.zeros(3), torch.ones(3))
    assert nuts.statistics["diverging"].sum() == 0


def test_chains_come_to_a_mean_that_is_far_from_where_they_start():
    """At 10,000 deviations the log density is rounded by 500 nats in float32, and chains that start at 0 stay there.

    The exact mean is that in float64, which the data in float32 have to a hundredth of the posterior's deviation.
    """
    y = (1e4 + torch.linspace(-1.5, 1.5, 100, dtype=torch.float64)).float()

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1e6))
        with pyro.plate("rows", 100):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    draws = sampled(model, y).get_samples(group_by_chain=True)["loc"].double()
    assert_moments(draws, y.double().mean(), 1 / 100)


def test_chains_start_at_a_mode():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    draws = sampled(model, init={"z": torch.zeros(2)}).get_samples(group_by_chain=True)["z"]
    assert_moments(draws, torch.zeros(2), torch.ones(2))


def test_a_density_that_is_flat_around_the_start_only_is_refused():
    def model():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.factor("wall", -torch.relu(z.abs() - 5.0).square())

    with pytest.raises(ValueError, match=r"0 at a start and around it, in coordinates of z,"):
        sampled(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 3}, "no option 'warmup_steps': write num_warmup in its place"),
        ({"draws": 3}, "no option 'draws'"),
        ({"mode": Captured}, "found the class Captured; call it"),
    ],
)
def test_wrong_options_are_refused_with_the_right_ones(options, message):
    with pytest.raises(TypeError, match=message):
        CompiledNUTS(rows, **options)


def test_a_kernel_of_pyro_is_no_model():
    for kernel in (NUTS(rows), MCMC(NUTS(rows), num_samples=1)):
        with pytest.raises(TypeError, match=r"wants the model itself, but found .*: write CompiledNUTS\(model"):
            CompiledNUTS(kernel)


def test_repr_says_what_has_run(run):
    assert repr(CompiledNUTS(rows)) == "CompiledNUTS(rows: 4 chains of 500 + 1000 draws, not run)"
    assert repr(run).startswith("CompiledNUTS(rows: 2 chains of 50 + 40 draws, run over 2 coordinates, with ")
