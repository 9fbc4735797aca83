"""Kernels of samples: their formulas, the median bandwidth and the checks of their options."""

import pytest
import torch

from pyro_genmodels.divergences import EnergyKernel, GaussianKernel, LaplaceKernel, RationalQuadraticKernel, mmd
from pyro_genmodels.divergences.kernels import median_distance, squares_in_bandwidths

pytestmark = pytest.mark.usefixtures("float64")


def test_the_kernels_are_their_formulas():
    x, y = torch.randn(4, 3), torch.randn(6, 3)
    r = (x[:, None] - y).norm(dim=-1)
    torch.testing.assert_close(GaussianKernel(2.0)(x, y), torch.exp(-r.square() / 8))
    torch.testing.assert_close(LaplaceKernel(2.0)(x, y), torch.exp(-r / 2))
    torch.testing.assert_close(EnergyKernel()(x, y), -r)
    quadratics = ((1 + r.square() / 8) ** -1 + (1 + r.square() / 2) ** -0.25) / 2
    torch.testing.assert_close(RationalQuadraticKernel(2.0, alphas=(1.0, 0.25))(x, y), quadratics)


@pytest.mark.parametrize("dims", [1, 2, 16, 17])
@pytest.mark.parametrize("kernel", [GaussianKernel(1.5), RationalQuadraticKernel(1.5)], ids=["gaussian", "rational"])
def test_kernels_of_squares_have_second_derivatives(kernel, dims):
    """Distances by cdist had none, in up to 16 dimensions."""
    x, y = torch.randn(3, dims, requires_grad=True), torch.randn(4, dims)
    assert torch.autograd.gradgradcheck(lambda x: kernel(x, y), (x,))
    laplacian = torch.autograd.functional.hessian(lambda a: GaussianKernel(1.0)(a[None], torch.zeros(1, dims)).sum(), y[0] * 0)
    torch.testing.assert_close(laplacian, -torch.eye(dims))  # where both are equal


@pytest.mark.parametrize("dims", [1, 2, 16, 17])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_one_far_sample_costs_the_others_no_precision(dims, offset):
    x = torch.randn(20, dims) + offset
    x[0] += 1e9
    y = torch.randn(30, dims) + offset
    wanted = ((x[:, None] - y) / 0.5).square().sum(-1)
    torch.testing.assert_close(squares_in_bandwidths(x, y, 0.5), wanted, rtol=1e-9, atol=1e-9)


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
