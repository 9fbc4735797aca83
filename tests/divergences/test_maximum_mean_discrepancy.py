"""The maximum mean discrepancy: closed forms, no bias, standard error and gradient.

A comparison at six standard errors has a false-alarm rate of 2e-9.
"""

import sys

import pytest
import torch

from pyro_genmodels.divergences import EnergyKernel, GaussianKernel, Kernel, LaplaceKernel, RationalQuadraticKernel, mmd

pytestmark = pytest.mark.usefixtures("float64")

FITTED = [GaussianKernel(0.7), LaplaceKernel(0.7), RationalQuadraticKernel(0.7), EnergyKernel()]
KERNELS = [GaussianKernel(), GaussianKernel(0.7), LaplaceKernel(), RationalQuadraticKernel(), EnergyKernel()]


def closed_form(shift, scale, dims, h):
    """The squared discrepancy of N(0, I) and N(shift, scale^2 I) by a Gaussian kernel, whose means are Gaussian functions."""

    def similarity(variance, distance):
        return (h**2 / (h**2 + variance)) ** (dims / 2) * torch.exp(-0.5 * distance**2 / (h**2 + variance))

    zero, away = torch.tensor(0.0), shift * torch.tensor(dims).sqrt()
    return similarity(2, zero) + similarity(2 * scale**2, zero) - 2 * similarity(1 + scale**2, away)


@pytest.mark.parametrize(("shift", "scale", "dims"), [(1.0, 1.0, 1), (0.5, 2.0, 3), (0.0, 1.5, 2)])
def test_gaussians_meet_the_closed_form_and_the_error_is_calibrated(shift, scale, dims):
    """200 pairs of sets of 60 and 90 draws: their mean is without bias, and their deviation what is reported, to a third."""
    found = [mmd(torch.randn(60, dims), shift + scale * torch.randn(90, dims), kernel=GaussianKernel(1.3)) for _ in range(200)]
    values, errors = (torch.stack(part) for part in zip(*found, strict=True))
    assert abs(values.mean() - closed_form(shift, scale, dims, 1.3)) < 6 * values.std() / 200**0.5
    assert 2 / 3 < errors.mean() / values.std() < 4 / 3


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_mean_for_equal_distributions_is_zero(kernel):
    values = torch.stack([mmd(torch.randn(20, 2), torch.randn(30, 2), kernel=kernel).value for _ in range(300)])
    assert abs(values.mean()) < 6 * values.std() / 300**0.5
    assert (values < 0).any()


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_it_is_the_sum_over_pairs_of_different_draws(kernel):
    x, y = torch.randn(7, 2, 2), torch.randn(5, 2, 2) + 1
    a, b = x.flatten(1), y.flatten(1)
    made = kernel.fitted(a, b)
    k = [[made(u[None], v[None]).item() for v in torch.cat([a, b])] for u in torch.cat([a, b])]
    k = torch.tensor(k).fill_diagonal_(0)
    truth = k[:7, :7].sum() / 42 + k[7:, 7:].sum() / 20 - 2 * k[:7, 7:].mean()
    torch.testing.assert_close(mmd(x, y, kernel=kernel).value, truth)


def test_the_energy_distance_is_in_the_units_of_the_data():
    x, y = torch.randn(50, 3), torch.randn(40, 3)
    value, _ = mmd(x, y, kernel=EnergyKernel())
    torch.testing.assert_close(mmd(100 * x - 5, 100 * y - 5, kernel=EnergyKernel()).value, 100 * value)


@pytest.mark.parametrize("kernel", [GaussianKernel(), LaplaceKernel(), RationalQuadraticKernel()], ids=str)
def test_by_the_median_distance_units_and_origin_make_no_difference(kernel):
    x, y = torch.randn(50, 3), torch.randn(40, 3)
    torch.testing.assert_close(mmd(100 * x + 1e4, 100 * y + 1e4, kernel=kernel).value, mmd(x, y, kernel=kernel).value)


# Gradients and blocks.


@pytest.mark.parametrize("kernel", FITTED, ids=str)
@pytest.mark.parametrize("shape", [(), (2, 2)], ids=str)
def test_the_gradient_is_that_of_finite_differences_in_blocks_too(kernel, shape, monkeypatch):
    x, y = torch.randn(6, *shape, requires_grad=True), torch.randn(9, *shape, requires_grad=True)
    whole = mmd(x, y, kernel=kernel)
    assert torch.autograd.gradcheck(lambda x, y: mmd(x, y, kernel=kernel).value, (x, y))
    assert not whole.std_error.requires_grad
    wanted = torch.autograd.grad(whole.value, (x, y))
    monkeypatch.setattr(sys.modules["pyro_genmodels.divergences.maximum_mean_discrepancy"], "_MAX_BLOCK_SIZE", 20)
    blocks = mmd(x, y, kernel=kernel)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(blocks.value, (x, y)), wanted)


def test_equal_draws_have_a_finite_gradient():
    x = torch.zeros(4, 2, requires_grad=True)
    for kernel in KERNELS:
        (slope,) = torch.autograd.grad(mmd(x, torch.zeros(3, 2), kernel=kernel).value, x)
        assert slope.isfinite().all()


def test_custom_kernels_are_accepted():
    class Product(Kernel):
        def __call__(self, x, y):
            return x @ y.T

    x, y = torch.randn(2000, 2), torch.randn(2000, 2) + 1
    value, std_error = mmd(x, y, kernel=Product())
    assert abs(value - 2) < 6 * std_error  # the squared distance of the means


def test_sets_that_cannot_be_compared_are_refused():
    x = torch.zeros(10, 2)
    with pytest.raises(ValueError, match="one event shape"):
        mmd(x, torch.zeros(10, 3))
    with pytest.raises(TypeError, match=r"mmd wants a kernel such as.*the class GaussianKernel"):
        mmd(x, x, kernel=GaussianKernel)
