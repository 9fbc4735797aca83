"""Fits, chains and simulations in several processes or on a cluster are those of one process, bit for bit."""

from contextlib import nullcontext

import joblib
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_genmodels import EnergyModel, RestrictedBoltzmannMachine, log_likelihood
from pyro_genmodels.evaluation import conservative_log_likelihood, log_partition
from pyro_genmodels.infer.compiled import Captured
from pyro_genmodels.posteriors import (
    AmortizedLikelihood,
    AmortizedPosterior,
    Laplace,
    NoUTurn,
    Pathfinder,
    Restarts,
    posterior,
    reloo,
    simulation_based_calibration,
)
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.utils.parallel import seeded, spawn_seeds

Y = torch.tensor([0.3, -0.4, 1.1, 0.6, 8.0])


def model(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def simulator():
    pyro.deterministic("x", pyro.sample("z", dist.Normal(0.0, 1.0)) + torch.randn(()))


def fitted(method):
    return posterior(model, Y, method=method, progress=False)


def machine():
    torch.manual_seed(5)
    made = EnergyModel((8,), energy=RestrictedBoltzmannMachine(3), support=constraints.boolean)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return made


def restarted(n_jobs):
    fit = fitted(Restarts(Laplace(num_starts=2), n=3, num_samples=50, n_jobs=n_jobs))
    return {"z": fit.z, "gradients": fit.num_gradients}


def walked(n_jobs):
    method = NoUTurn(num_chains=3, num_warmup=50, num_samples=20, init=Pathfinder(num_paths=2, num_samples=100), n_jobs=n_jobs)
    fit = fitted(method)
    return {"z": fit.z, **fit.stats}


def walked_in_a_mode(n_jobs):
    fit = fitted(NoUTurn(num_chains=2, num_warmup=20, num_samples=10, mode=Captured(), n_jobs=n_jobs))
    return {"z": fit.z, **fit.stats}


def simulated(n_jobs):
    return (
        AmortizedPosterior(simulator, observed=["x"]).simulate(120, parallel=False, n_jobs=n_jobs, progress=False).simulations
    )


def calibrated(n_jobs):
    found = simulation_based_calibration(
        model, Y, method=Laplace(), num_simulations=5, num_draws=20, n_jobs=n_jobs, progress=False
    )
    return found.draws


def left_out(n_jobs):
    fit = fitted(Laplace())
    options = {"max_pareto_k": 0.1, "num_samples": 200, "n_jobs": n_jobs, "progress": False}
    with torch.random.fork_rng():
        found = reloo(fit, moment_matching=True, **options)
    return {"values": found.pointwise, "matched": found.matched, "refitted": found.refitted}


def annealed(n_jobs):
    found = log_partition(machine()(), exact=False, num_chains=600, num_steps=20, n_jobs=n_jobs)
    return {"value": found.value, "k": found.pareto_k}


def annealed_backwards(n_jobs):
    fn = machine()()
    found = log_partition(fn, exact=False, draws=exact_draws(fn, 600), num_chains=600, num_steps=20, n_jobs=n_jobs)
    return {"value": found.value, "reverse": found.reverse}


def annealed_for_contexts(n_jobs):
    torch.manual_seed(5)
    conditional = EnergyModel((2,), context=1)
    return {
        "value": log_partition(conditional(torch.randn(4, 1)), exact=False, num_chains=100, num_steps=20, n_jobs=n_jobs).value
    }


def bounded(n_jobs):
    x = torch.randint(2, (300, 8)).float()
    return {"values": conservative_log_likelihood(machine(), x, num_samples=2, num_steps=20, n_jobs=n_jobs).values}


def evaluated(n_jobs):
    torch.manual_seed(5)
    energy = EnergyModel((3,))
    return {"values": log_likelihood(energy, torch.randn(20, 3), num_samples=300, num_steps=20, n_jobs=n_jobs).values}


def surrogate_draws(n_jobs):
    learned = AmortizedLikelihood(simulator, observed=["x"]).train(200, max_epochs=2, progress=False)
    chain = NoUTurn(num_chains=1, num_warmup=20, num_samples=20, mode=Captured())  # compiling takes half a minute
    return learned.samples_given(20, method=chain, n_jobs=n_jobs, x=torch.tensor([0.5, -1.0]))


CASES = {
    function.__name__: function
    for function in (
        restarted,
        walked,
        walked_in_a_mode,
        simulated,
        calibrated,
        left_out,
        annealed,
        annealed_backwards,
        annealed_for_contexts,
        bounded,
        evaluated,
        surrogate_draws,
    )
}


def exact_draws(fn, number):
    states = torch.cartesian_prod(*[torch.arange(2.0)] * 8)
    return states[torch.distributions.Categorical(logits=fn.log_prob(states).detach()).sample((number,))]


def same(case, n_jobs, engine):
    """Return True if a case has the same numbers for one process and another number, from the same seed."""
    found = []
    for jobs, backend in ((1, nullcontext()), (n_jobs, engine)):
        pyro.set_rng_seed(3)
        with backend:
            found.append(CASES[case](jobs))
    one, other = found
    assert one.keys() == other.keys()
    return all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one)


of_few_chains = pytest.mark.filterwarnings("ignore:The estimate of log Z is unreliable:RuntimeWarning")


@pytest.mark.slow
@of_few_chains
@pytest.mark.parametrize("case", CASES)
def test_numbers_do_not_depend_on_the_number_of_processes(case):
    assert same(case, 2, nullcontext())


@pytest.mark.slow
@of_few_chains
@pytest.mark.parametrize("case", ["restarted", "walked", "calibrated", "annealed", "simulated"])
def test_numbers_on_a_cluster_are_those_of_one_process(case, dask_client):
    assert same(case, -1, joblib.parallel_config(backend="dask"))


def test_each_restart_is_a_fit_from_its_own_seed():
    problem, method = Problem(model, (Y,), progress=False), Laplace(num_starts=1)
    problem.batched  # noqa: B018 - runs the model, which draws random numbers
    with seeded(3):
        seeds = spawn_seeds(None, 2)
    with seeded(3):
        restarts = Restarts(method, n=2, num_samples=10).fit(problem)
    for chain, seed in zip(restarts.z, seeds, strict=True):
        with seeded(seed):
            assert problem.coordinates.unconstrain(method.fit(problem).get_samples(10)).equal(chain)


def test_blocks_of_chains_estimate_log_z_as_all_chains_do(float64):
    """Three blocks of 200 chains. An error of 7 standard errors has probability 3e-12 for normal weights."""
    fn = machine()()
    exact = log_partition(fn)
    found = log_partition(fn, exact=False, num_chains=600, num_steps=50, n_jobs=1)
    assert exact.kind == "exact"
    assert found.kind == "estimate"
    assert 250 < found.effective_sample_size <= 600
    assert 0 < found.std_error < 0.1
    assert abs(found.value - exact.value) < 7 * found.std_error


def test_bounds_of_blocks_lie_below_the_density_in_the_mean(float64):
    """The mean of 600 bounds is above by seven standard errors with probability 1e-12."""
    family = machine()
    x = exact_draws(family(), 600)
    exact = log_likelihood(family, x).values
    bounds = conservative_log_likelihood(family, x, num_steps=30, n_jobs=1).values
    gap = exact - bounds
    assert gap.mean() > -7 * gap.std() / 600**0.5
    assert gap.mean() < 1


def test_wrong_numbers_of_processes_are_refused_before_anything_runs():
    for call in (
        lambda: Restarts(n_jobs=0),
        lambda: NoUTurn(n_jobs=0),
        lambda: log_partition(machine()(), n_jobs=0),
        lambda: log_likelihood(machine(), torch.zeros(2, 8), n_jobs=0),
        lambda: conservative_log_likelihood(machine(), torch.zeros(2, 8), n_jobs=0),
    ):
        with pytest.raises(ValueError, match="wants n_jobs as a number of processes"):
            call()
