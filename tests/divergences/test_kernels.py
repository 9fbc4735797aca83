"""Kernels of samples: their formulas, the median bandwidth and the checks of their options."""

import pytest
import torch

from pyro_genmodels.divergences import EnergyKernel, GaussianKernel, LaplaceKernel, RationalQuadraticKernel, mmd
from pyro_genmodels.divergences.kernels import median_distance

pytestmark = pytest.mark.usefixtures("float64")


def test_the_kernels_are_their_formulas():
    x, y = torch.randn(4, 3), torch.randn(6, 3)
    r = (x[:, None] - y).norm(dim=-1)
    torch.testing.assert_close(GaussianKernel(2.0)(x, y), torch.exp(-r.square() / 8))
    torch.testing.assert_close(LaplaceKernel(2.0)(x, y), torch.exp(-r / 2))
    torch.testing.assert_close(EnergyKernel()(x, y), -r)
    quadratics = ((1 + r.square() / 8) ** -1 + (1 + r.square() / 2) ** -0.25) / 2
    torch.testing.assert_close(RationalQuadraticKernel(2.0, alphas=(1.0, 0.25))(x, y), quadratics)


def test_the_median_distance_of_mostly_equal_samples():
    x = torch.zeros(10, 2)
    assert median_distance(x) == 1
    x[0] = 3
    assert median_distance(x) == pytest.approx(18**0.5 / 5)
    assert mmd(x, x).value.isfinite()
    assert median_distance(torch.arange(5000.0)[:, None]) == pytest.approx(5000 * (1 - 0.5**0.5), rel=1e-2)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("inf"), float("nan"), True])
def test_a_bandwidth_is_positive(bandwidth):
    with pytest.raises(ValueError, match="LaplaceKernel wants a positive bandwidth"):
        LaplaceKernel(bandwidth)


def test_other_options_of_kernels_are_checked():
    with pytest.raises(ValueError, match="positive alphas"):
        RationalQuadraticKernel(alphas=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"no bandwidth yet.*fitted"):
        GaussianKernel()(torch.zeros(2, 1), torch.zeros(2, 1))
