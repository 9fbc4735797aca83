"""What is computed on a GPU is what is computed on the CPU. `pytest -m gpu` runs these tests where there is one."""

import copy

import cases
import numpy as np
import pytest
import torch
from divergences.test_offsets_and_units import FIGURES, figure
from torch.testing import assert_close

from pyro_genmodels import Flow, log_likelihood, to_arviz, train
from pyro_genmodels.training import checkpoints
from pyro_genmodels.utils.pareto import pareto_k, smooth_log_weights

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
REPEATABLE = [name for name in FIGURES if name not in ("loss: sliced", "loss: spread", "permutation test", "classifier")]
"""Figures whose random numbers, if any, are not those of the device."""
EXACT = cases.rows(lambda case: case.density == "exact" and case.objective is cases.MaximumLikelihood)


@cases.rows()
def test_a_family_trains_and_draws_on_the_gpu(case, tmp_path):
    family, batch = case.build().to(DEVICE), case.batch(40)
    context = batch[1] if case.conditional else None
    train(family, batch[0], context=context, valid=0.2, epochs=1, progress=False)
    assert {p.device.type for p in [*family.parameters(), *family.buffers()]} == {DEVICE.type}
    draws = family(None if context is None else context.to(DEVICE)).sample(() if case.conditional else (5,))
    assert draws.device.type == DEVICE.type
    family.validate(draws)
    path = checkpoints.save(tmp_path / "family", family)
    loaded = checkpoints.load(path)
    assert_close(loaded.state_dict(), {name: tensor.cpu() for name, tensor in family.state_dict().items()})


@EXACT
def test_densities_agree_with_those_of_the_cpu(case):
    batch = case.batch(40)
    x, context = batch[0], batch[1] if case.conditional else None
    family = case.build()
    family.standardize(x, context)
    cases.perturb(family)
    family.eval()
    on_gpu = copy.deepcopy(family).to(DEVICE)
    expected = family(context).log_prob(x)
    found = on_gpu(None if context is None else context.to(DEVICE)).log_prob(x.to(DEVICE))
    assert found.device.type == DEVICE.type
    assert_close(found.cpu(), expected, rtol=2e-3, atol=2e-3)  # matrix products may be in TF32
    if not case.discrete:
        doubles = on_gpu(None if context is None else context.to(DEVICE)).log_prob(x.double().to(DEVICE))
        assert_close(doubles.cpu(), found.cpu(), rtol=2e-3, atol=2e-3)


def test_unix_times_and_arrays_on_the_gpu():
    x = 1.7e9 + 1000 * torch.randn(500, 1, dtype=torch.float64)
    family = Flow((1,), name="times")
    with pytest.warns(UserWarning, match="far from 0 for their spread"):
        family.standardize(x)
    found = family.to(DEVICE)().log_prob(x.to(DEVICE))
    assert found.device.type == DEVICE.type
    assert_close(found.cpu(), copy.deepcopy(family).cpu()().log_prob(x.numpy()), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:log_likelihood. Pareto k-hat")
def test_a_fit_on_the_gpu_is_evaluated_and_exported():
    family, x = cases.VAE((3,), hidden=(16,), latent_dim=2).to(DEVICE), torch.randn(30, 3)
    train(family, x, epochs=2, progress=False)
    found = log_likelihood(family, x.to(DEVICE), num_samples=100)
    assert found.values.device.type == DEVICE.type
    assert found.pareto_k.device.type == DEVICE.type
    data = to_arviz(family, x.to(DEVICE), num_samples=20, progress=False)
    assert data.log_likelihood["x"].dtype == np.float64


@pytest.mark.parametrize("name", REPEATABLE)
def test_figures_of_samples_agree_with_those_of_the_cpu(name):
    x, y = (torch.randint(0, 64, (40, 2)) / 16 + 1e4 for _ in range(2))
    assert_close(figure(name, x.to(DEVICE), y.to(DEVICE)), figure(name, x, y), rtol=1e-5, atol=1e-6)


def test_k_hat_agrees_with_that_of_the_cpu():
    log_weights = torch.randn(1000, 7)
    assert_close(pareto_k(log_weights.to(DEVICE)).cpu(), pareto_k(log_weights))
    smoothed, k = smooth_log_weights(log_weights.to(DEVICE))
    assert smoothed.device.type == DEVICE.type
    assert_close(k.cpu(), pareto_k(log_weights))
