"""Statistics of Markov chains: what `record_statistics` keeps is what the kernel did."""

import pickle

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS, RandomWalkKernel
from readings import ARVIZ_1, draws, mean_model, stat, variables

from pyro_genmodels import to_arviz
from pyro_genmodels.inference_data import record_statistics

y = torch.randn(6)


def normals(size=50):
    pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def run(kernel, *args, num_samples=30, **kwargs):
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=20, disable_progbar=True, **kwargs)
    mcmc.run(*args)
    return mcmc


def test_a_run_remembers_its_arguments():
    mcmc = run(NUTS(mean_model), y)
    data = to_arviz(mcmc)
    np.testing.assert_array_equal(data["observed_data"]["y"], y)
    again = to_arviz(mcmc, y)
    np.testing.assert_array_equal(data["log_likelihood"]["y"], again["log_likelihood"]["y"])


def test_a_run_that_is_still_to_come_is_refused():
    with pytest.raises(ValueError, match="MCMC has not been run"):
        to_arviz(MCMC(NUTS(mean_model), num_samples=3, warmup_steps=3), y)


def test_lp_is_the_density_that_the_chain_saw(float64):
    data = to_arviz(run(record_statistics(NUTS(mean_model)), y.double()))
    torch.testing.assert_close(stat(data, "lp"), stat(data, "log_p"))


def test_energy_is_kept_along_a_transition(float64):
    """The energy of a transition is at least -lp at its start, and conserved: -lp at its end is below it but for the error."""
    data = to_arviz(run(record_statistics(NUTS(normals, target_accept_prob=0.99)), num_samples=50))
    energy, potential = stat(data, "energy"), -stat(data, "lp")
    assert (energy[1:] > potential[:-1]).all()
    assert (energy > potential - 0.5).all()


def test_kinetic_energies_are_half_chi_squares():
    """50 coordinates, 200 transitions: mean 25 with standard error (25 / 200)^(1/2) = .35; 5 of them: 6e-7."""
    data = to_arviz(run(record_statistics(HMC(normals, step_size=0.3, num_steps=3)), num_samples=201))
    kinetic = stat(data, "energy")[1:] + stat(data, "lp")[:-1]
    assert abs(kinetic.mean() - 25) < 5 * 0.36


def test_the_rate_of_acceptance_and_the_step_are_the_kernels():
    kernel = record_statistics(NUTS(mean_model, max_tree_depth=3))
    mcmc = MCMC(kernel, num_samples=25, warmup_steps=20, disable_progbar=True, hook_fn=lambda k, *_: seen.append(k.step_size))
    seen = []
    mcmc.run(y)
    data = to_arviz(mcmc)
    found = stat(data, "acceptance_rate")
    assert ((found >= -1e-6) & (found <= 1 + 1e-6)).all()
    torch.testing.assert_close(stat(data, "step_size"), torch.tensor(seen[-25:]).float())
    depth = draws(data, "tree_depth", "sample_stats")
    assert depth.dtype == torch.int64
    assert ((depth >= 1) & (depth <= 3)).all()


@pytest.mark.filterwarnings("ignore:num_chains=2 is more than available_cpu:UserWarning")
def test_each_chain_has_its_own():
    mcmc = run(record_statistics(NUTS(mean_model)), y, num_chains=2, mp_context="fork")
    data = to_arviz(mcmc)
    assert data["sample_stats"]["energy"].shape == (2, 30)
    for chain in (0, 1):
        close = torch.testing.assert_close
        close(stat(data, "lp", chain), stat(data, "log_p", chain), rtol=1e-4, atol=1e-4)


def test_a_kernel_can_be_sent_to_another_process():
    kernel = pickle.loads(pickle.dumps(record_statistics(NUTS(mean_model))))
    assert to_arviz(run(kernel, y))["sample_stats"]["energy"].shape == (1, 30)


def test_a_plain_kernel_says_what_it_does_not_keep():
    data = to_arviz(run(NUTS(mean_model), y))
    assert variables(data, "sample_stats") == {"diverging", "log_p"}
    assert "energy" in data["sample_stats"].attrs["left_out"]
    assert "record_statistics" in data["sample_stats"].attrs["left_out"]
    assert "left_out" not in to_arviz(run(record_statistics(NUTS(mean_model)), y))["sample_stats"].attrs


def test_only_hamiltonian_kernels_are_recorded():
    with pytest.raises(TypeError, match="NUTS or HMC, but found RandomWalkKernel"):
        record_statistics(RandomWalkKernel(mean_model))


@pytest.mark.skipif(ARVIZ_1, reason="ArviZ 1.x returns data, and subtracts one from its count")
def test_arviz_reads_the_energy():
    data = to_arviz(run(record_statistics(NUTS(mean_model)), y, num_samples=100))
    found = float(np.asarray(az.bfmi(data)).squeeze())
    energy = stat(data, "energy")
    assert found == pytest.approx(float(energy.diff().square().mean() / energy.var(correction=0)), rel=0.05)
