"""What is computed on a GPU is what is computed on the CPU. `pytest -m gpu` runs these tests where there is one.

Elsewhere the same tests run on the CPU, marked slow, so that they stand when a GPU is at hand.
"""

import copy

import cases
import numpy as np
import pytest
import torch
from divergences.test_offsets_and_units import FIGURES, figure
from torch.testing import assert_close

from pyro_genmodels import Flow, log_likelihood, to_arviz, train
from pyro_genmodels.training import Checkpoint, checkpoints
from pyro_genmodels.utils.pareto import pareto_k, smooth_log_weights

CUDA, CPU = pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)
on_devices = pytest.mark.parametrize("device", [CUDA, CPU])
REPEATABLE = [name for name in FIGURES if name not in ("loss: sliced", "loss: spread", "permutation test", "classifier")]
"""Figures whose random numbers, if any, are not those of the device."""


def rows(condition=lambda case: True):
    """Parametrise a test by `case` and `device`: all rows on a GPU, the representative ones on the CPU."""
    chosen = [case for case in cases.CASES if condition(case)]
    on_cpu = [case for case in chosen if case.name in cases.REPRESENTATIVE]
    pairs = [*((case, CUDA) for case in chosen), *((case, CPU) for case in on_cpu)]
    params = [pytest.param(case, *on.values, id=f"{case.name}-{on.values[0]}", marks=on.marks) for case, on in pairs]
    return pytest.mark.parametrize(("case", "device"), params)


def is_exact(case):
    return case.density == "exact" and case.objective is cases.MaximumLikelihood


def moved(tensors, device):
    return tuple(tensor.to(device) for tensor in tensors)


@rows()
@pytest.mark.filterwarnings("ignore:log_likelihood. Pareto k-hat")
def test_a_family_trains_draws_scores_saves_and_resumes(case, device, tmp_path):
    batch = case.batch(40)
    family, context = case.build().to(device), batch[1] if case.conditional else None
    options = {"context": context, "valid": 0.2, "seed": 0, "progress": False}
    train(family, batch[0], epochs=1, checkpoint=tmp_path / "run", **options)
    again = case.build().to(device)
    resumed = train(again, batch[0], epochs=2, checkpoint=Checkpoint(tmp_path / "run", resume=True), **options)
    assert [record["epoch"] for record in resumed.history] == [1, 2]
    for name, tensor in again.state_dict().items():
        assert tensor.device.type == device, name
    draws = again(*moved(batch[1:], device)).sample(() if case.conditional else (5,))
    assert draws.device.type == device
    again.validate(draws)
    loaded = checkpoints.load(checkpoints.save(tmp_path / "family", again))
    assert_close(loaded.state_dict(), {name: tensor.cpu() for name, tensor in again.state_dict().items()})
    if case.density == "none" and case.untrained:
        return  # a GAN has no likelihood
    scores = log_likelihood(again, *moved(batch, device), num_samples=10, num_steps=20)
    assert scores.values.device.type == device
    assert scores.values.shape == (40,)
    assert scores.values.isfinite().all()


@rows(is_exact)
def test_densities_agree_with_those_of_the_cpu(case, device):
    batch = case.batch(40)
    x, context = batch[0], batch[1] if case.conditional else None
    family = case.build()
    family.standardize(x, context)
    cases.perturb(family)
    family.eval()
    on_gpu = copy.deepcopy(family).to(device)
    expected = family(context).log_prob(x)
    found = on_gpu(*moved(batch[1:], device)).log_prob(x.to(device))
    assert found.device.type == device
    assert_close(found.cpu(), expected, rtol=2e-3, atol=2e-3)  # matrix products may be in TF32
    if not case.discrete:
        doubles = on_gpu(*moved(batch[1:], device)).log_prob(x.double().to(device))
        assert_close(doubles.cpu(), found.cpu(), rtol=2e-3, atol=2e-3)


@on_devices
def test_unix_times_and_arrays_on_the_gpu(device):
    x = 1.7e9 + 1000 * torch.randn(500, 1, dtype=torch.float64)
    family = Flow((1,), name="times")
    with pytest.warns(UserWarning, match="far from 0 for their spread"):
        family.standardize(x)
    found = family.to(device)().log_prob(x.to(device))
    assert found.device.type == device
    assert_close(found.cpu(), copy.deepcopy(family).cpu()().log_prob(x.numpy()), rtol=1e-4, atol=1e-4)


@on_devices
@pytest.mark.filterwarnings("ignore:log_likelihood. Pareto k-hat")
def test_a_fit_on_the_gpu_is_evaluated_and_exported(device):
    family, x = cases.VAE((3,), hidden=(16,), latent_dim=2).to(device), torch.randn(30, 3)
    train(family, x, epochs=2, progress=False)
    found = log_likelihood(family, x.to(device), num_samples=100)
    assert found.values.device.type == device
    assert found.pareto_k.device.type == device
    data = to_arviz(family, x.to(device), num_samples=20, progress=False)
    assert data.log_likelihood["x"].dtype == np.float64


@on_devices
@pytest.mark.parametrize("name", REPEATABLE)
def test_figures_of_samples_agree_with_those_of_the_cpu(name, device):
    x, y = (torch.randint(0, 64, (40, 2)) / 16 + 1e4 for _ in range(2))
    assert_close(figure(name, x.to(device), y.to(device)), figure(name, x, y), rtol=1e-5, atol=1e-6)


@on_devices
def test_k_hat_agrees_with_that_of_the_cpu(device):
    log_weights = torch.randn(1000, 7)
    assert_close(pareto_k(log_weights.to(device)).cpu(), pareto_k(log_weights))
    smoothed, k = smooth_log_weights(log_weights.to(device))
    assert smoothed.device.type == device
    assert_close(k.cpu(), pareto_k(log_weights))
