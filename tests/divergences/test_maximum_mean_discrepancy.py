"""The maximum mean discrepancy and its test: closed forms, no bias, error, gradient, level and power, and what is refused.

A comparison at six standard errors has a false-alarm rate of 2e-9.
"""

import sys

import pytest
import torch
from scipy.stats import binom

from pyro_genmodels.divergences import EnergyKernel, GaussianKernel, Kernel, LaplaceKernel, RationalQuadraticKernel, mmd
from pyro_genmodels.divergences.kernels import median_distance
from pyro_genmodels.evaluation import MMDTest, mmd_test

pytestmark = pytest.mark.usefixtures("float64")

FITTED = [GaussianKernel(0.7), LaplaceKernel(0.7), RationalQuadraticKernel(0.7), EnergyKernel()]
KERNELS = [GaussianKernel(), GaussianKernel(0.7), LaplaceKernel(), RationalQuadraticKernel(), EnergyKernel()]


def of_gaussians(shift, scale, dims, h):
    """Of N(0, I) and N(shift, scale^2 I) by a Gaussian kernel, whose means are Gaussian in the shift."""

    def likeness(variance, distance):
        return (h**2 / (h**2 + variance)) ** (dims / 2) * torch.exp(-0.5 * distance**2 / (h**2 + variance))

    zero, away = torch.tensor(0.0), shift * torch.tensor(dims).sqrt()
    return likeness(2, zero) + likeness(2 * scale**2, zero) - 2 * likeness(1 + scale**2, away)


@pytest.mark.parametrize(("shift", "scale", "dims"), [(1.0, 1.0, 1), (0.5, 2.0, 3), (0.0, 1.5, 2)])
def test_of_gaussians_it_is_the_closed_form_and_its_error_is_what_it_says(shift, scale, dims):
    """200 pairs of sets of 60 and 90 draws: their mean is without bias, and their deviation what is reported, to a third."""
    found = [mmd(torch.randn(60, dims), shift + scale * torch.randn(90, dims), kernel=GaussianKernel(1.3)) for _ in range(200)]
    values, errors = (torch.stack(part) for part in zip(*found, strict=True))
    assert abs(values.mean() - of_gaussians(shift, scale, dims, 1.3)) < 6 * values.std() / 200**0.5
    assert 2 / 3 < errors.mean() / values.std() < 4 / 3


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_of_one_law_it_is_zero_on_average(kernel):
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
    assert mmd_test(x, y, kernel=kernel, num_permutations=1).value == pytest.approx(truth.item())


def test_the_kernels_are_their_formulas():
    x, y = torch.randn(4, 3), torch.randn(6, 3)
    r = (x[:, None] - y).norm(dim=-1)
    torch.testing.assert_close(GaussianKernel(2.0)(x, y), torch.exp(-r.square() / 8))
    torch.testing.assert_close(LaplaceKernel(2.0)(x, y), torch.exp(-r / 2))
    torch.testing.assert_close(EnergyKernel()(x, y), -r)
    quadratics = ((1 + r.square() / 8) ** -1 + (1 + r.square() / 2) ** -0.25) / 2
    torch.testing.assert_close(RationalQuadraticKernel(2.0, alphas=(1.0, 0.25))(x, y), quadratics)


def test_the_energy_distance_is_in_the_units_of_the_data():
    x, y = torch.randn(50, 3), torch.randn(40, 3)
    value, _ = mmd(x, y, kernel=EnergyKernel())
    torch.testing.assert_close(mmd(100 * x - 5, 100 * y - 5, kernel=EnergyKernel()).value, 100 * value)


@pytest.mark.parametrize("kernel", [GaussianKernel(), LaplaceKernel(), RationalQuadraticKernel()], ids=str)
def test_by_the_median_distance_units_and_origin_make_no_difference(kernel):
    x, y = torch.randn(50, 3), torch.randn(40, 3)
    torch.testing.assert_close(mmd(100 * x + 1e4, 100 * y + 1e4, kernel=kernel).value, mmd(x, y, kernel=kernel).value)


def test_the_median_distance_of_draws_that_are_mostly_or_all_the_same():
    x = torch.zeros(10, 2)
    assert median_distance(x) == 1
    x[0] = 3
    assert median_distance(x) == pytest.approx(18**0.5 / 5)
    assert mmd(x, x).value.isfinite()
    assert median_distance(torch.arange(5000.0)[:, None]) == pytest.approx(5000 * (1 - 0.5**0.5), rel=1e-2)


# Gradients and blocks.


@pytest.mark.parametrize("kernel", FITTED, ids=str)
@pytest.mark.parametrize("shape", [(), (2, 2)], ids=str)
def test_the_gradient_is_that_of_finite_differences_in_blocks_too(kernel, shape, monkeypatch):
    x, y = torch.randn(6, *shape, requires_grad=True), torch.randn(9, *shape, requires_grad=True)
    whole = mmd(x, y, kernel=kernel)
    assert torch.autograd.gradcheck(lambda x, y: mmd(x, y, kernel=kernel).value, (x, y))
    assert not whole.std_error.requires_grad
    wanted = torch.autograd.grad(whole.value, (x, y))
    monkeypatch.setattr(sys.modules["pyro_genmodels.divergences.mmd"], "_BLOCK", 20)
    blocks = mmd(x, y, kernel=kernel)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(blocks.value, (x, y)), wanted)


def test_equal_draws_have_a_finite_gradient():
    x = torch.zeros(4, 2, requires_grad=True)
    for kernel in KERNELS:
        (slope,) = torch.autograd.grad(mmd(x, torch.zeros(3, 2), kernel=kernel).value, x)
        assert slope.isfinite().all()


# The test.


def test_it_raises_false_alarms_as_often_as_it_says():
    """Of 300 pairs of sets of one law at most as many are found different at 5 % as chance allows with a rate of 1e-7, and of
    a test that is not too timid not many fewer."""
    alarms = sum(
        mmd_test(torch.randn(20, 2), torch.randn(30, 2), num_permutations=99, seed=seed).p_value <= 0.05 for seed in range(300)
    )
    low, high = binom.interval(1 - 1e-7, 300, 0.05)
    assert low <= alarms <= high


def test_p_values_of_one_law_are_uniform():
    """Their mean of 200 is within six of its errors."""
    values = torch.tensor([mmd_test(torch.randn(15), torch.randn(15), num_permutations=50, seed=s).p_value for s in range(200)])
    assert abs(values.mean() - 0.5) < 6 * (1 / 12 / 200) ** 0.5 + 0.02


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_it_finds_what_differs_in_the_mean_and_in_the_spread(kernel):
    x = torch.randn(200, 2)
    assert mmd_test(x, torch.randn(200, 2) + 0.7, kernel=kernel).p_value == 1 / 1001
    assert mmd_test(x, torch.randn(200, 2) * 2.5, kernel=kernel).p_value == 1 / 1001


def test_the_value_is_mmds_and_a_seed_fixes_the_answer():
    x, y = torch.randn(40, 3).float(), torch.randn(50, 3).float() * 1.1
    before = torch.random.get_rng_state()
    found = mmd_test(x, y, num_permutations=200)
    assert mmd_test(x, y, num_permutations=200) == found
    assert mmd_test(x, y, num_permutations=200, seed=2).p_value != found.p_value
    assert torch.equal(torch.random.get_rng_state(), before)
    value, std_error = mmd(x, y)
    assert found.value == pytest.approx(value.item(), abs=1e-5)
    assert found.std_error == pytest.approx(std_error.item(), rel=1e-3)


def test_the_same_sets_dealt_again_count_as_being_as_far():
    """Of two draws a side there are six dealings; every third is the same."""
    p = mmd_test(torch.tensor([0.0, 0.1]), torch.tensor([5.0, 5.1]), num_permutations=3000).p_value
    assert p == pytest.approx(1 / 3, abs=6 * (2 / 9 / 3000) ** 0.5)


def test_the_answer_in_a_line():
    assert str(MMDTest(0.0123, 0.004, 0.25, 99)) == "squared MMD 0.0123 ± 0.004 (p = 0.25, 99 permutations)"
    assert "p ≤ 0.01" in str(MMDTest(0.0123, 0.004, 0.01, 99))


# What is refused.


def test_what_cannot_be_judged_is_refused(monkeypatch):
    x = torch.zeros(10, 2)
    with pytest.raises(ValueError, match="one event shape"):
        mmd(x, torch.zeros(10, 3))
    with pytest.raises(ValueError, match="at least 2 draws"):
        mmd_test(x, x[:1])
    with pytest.raises(ValueError, match="one permutation, got num_permutations=0"):
        mmd_test(x, x, num_permutations=0)
    monkeypatch.setattr("pyro_genmodels.evaluation.permutation_test.MOST", 12)
    with pytest.raises(ValueError, match=r"at most 12 draws, but found 10 and 10.*randperm\(len\(x\)\)\[:6\]"):
        mmd_test(x, x)
    for by in (mmd, mmd_test):
        with pytest.raises(TypeError, match=r"wants a kernel such as.*the class GaussianKernel"):
            by(x, x, kernel=GaussianKernel)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("inf"), float("nan"), True])
def test_a_bandwidth_is_positive(bandwidth):
    with pytest.raises(ValueError, match="LaplaceKernel wants a positive bandwidth"):
        LaplaceKernel(bandwidth)


def test_other_options_of_kernels_are_checked():
    with pytest.raises(ValueError, match="positive alphas"):
        RationalQuadraticKernel(alphas=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"no bandwidth yet.*fitted"):
        GaussianKernel()(torch.zeros(2, 1), torch.zeros(2, 1))


def test_a_kernel_of_ones_own_is_taken():
    class Product(Kernel):
        def __call__(self, x, y):
            return x @ y.T

    x, y = torch.randn(2000, 2), torch.randn(2000, 2) + 1
    value, std_error = mmd(x, y, kernel=Product())
    assert abs(value - 2) < 6 * std_error  # the squared distance of the means
