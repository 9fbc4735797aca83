"""The log of a mean of weights, its error and its k-hat, against closed forms and rules for odd weights."""

from math import inf, nan

import numpy as np
import pytest
import torch

from pyro_genmodels.utils.log_mean import log_mean_weight
from pyro_genmodels.utils.pareto import MAX_PARETO_K


def test_the_mean_of_single_precision_weights_is_that_of_doubles():
    """One weight of 1, and a million of e^-13."""
    log_weights = torch.full((2**20,), -13.0)
    log_weights[0] = 0.0
    found = log_mean_weight(log_weights)
    wanted = np.log(np.exp(log_weights.double().numpy()).mean())
    assert found.value.dtype == torch.float32
    assert found.value.item() == pytest.approx(wanted, abs=1e-6)


def test_the_mean_and_its_error_meet_the_lognormal(float64):
    """Weights exp(z) have the mean exp(1/2): within six standard errors, a false alarm in 1e7."""
    found = log_mean_weight(torch.randn(2000, 40))
    assert ((found.value - 0.5).abs() < 6 * found.std_error).all()
    assert ((found.smoothed - 0.5).abs() < 6 * found.std_error).all()
    torch.testing.assert_close(found.std_error.mean(), torch.tensor(((np.e - 1) / 2000) ** 0.5), rtol=0.1, atol=0)
    assert (found.pareto_k < MAX_PARETO_K).all()


@pytest.mark.parametrize(
    ("log_weights", "value", "std_error", "k"),
    [
        (torch.full((100,), -inf), -inf, inf, inf),
        (torch.zeros(1), 0.0, nan, nan),
        (torch.zeros(100), 0.0, 0.0, -inf),
        (torch.zeros(100).index_fill(0, torch.tensor([3]), inf), inf, inf, inf),
        (torch.zeros(100).index_fill(0, torch.tensor([3]), nan), *[nan] * 3),
    ],
)
def test_means_of_odd_weights(log_weights, value, std_error, k):
    found = log_mean_weight(log_weights)
    np.testing.assert_array_equal([found.value, found.std_error, found.pareto_k], np.float32([value, std_error, k]))
    np.testing.assert_array_equal(found.smoothed, np.float32(value))
