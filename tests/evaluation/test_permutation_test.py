"""The permutation test of the maximum mean discrepancy: level, power, reproducibility, and what is refused."""

import pytest
import torch
from scipy.stats import binom

from pyro_genmodels.divergences import EnergyKernel, GaussianKernel, LaplaceKernel, RationalQuadraticKernel, mmd
from pyro_genmodels.evaluation import MMDTest, mmd_test

pytestmark = pytest.mark.usefixtures("float64")

KERNELS = [GaussianKernel(), GaussianKernel(0.7), LaplaceKernel(), RationalQuadraticKernel(), EnergyKernel()]


def test_the_rate_of_false_alarms_is_the_level():
    """Rejections at 5 % among 300 pairs of sets from one distribution lie within their binomial interval (1e-7)."""
    alarms = sum(
        mmd_test(torch.randn(20, 2), torch.randn(30, 2), num_permutations=99, seed=seed).p_value <= 0.05 for seed in range(300)
    )
    low, high = binom.interval(1 - 1e-7, 300, 0.05)
    assert low <= alarms <= high


def test_p_values_of_equal_distributions_are_uniform():
    """Their mean of 200 is within six of its errors."""
    values = torch.tensor([mmd_test(torch.randn(15), torch.randn(15), num_permutations=50, seed=s).p_value for s in range(200)])
    assert abs(values.mean() - 0.5) < 6 * (1 / 12 / 200) ** 0.5 + 0.02


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_differences_in_the_mean_and_in_the_scale_are_found(kernel):
    x = torch.randn(200, 2)
    assert mmd_test(x, torch.randn(200, 2) + 0.7, kernel=kernel).p_value == 1 / 1001
    assert mmd_test(x, torch.randn(200, 2) * 2.5, kernel=kernel).p_value == 1 / 1001


def test_the_value_is_that_of_mmd_in_single_precision_and_a_seed_fixes_the_result():
    x, y = torch.randn(40, 3).float(), torch.randn(50, 3).float() * 1.1
    before = torch.random.get_rng_state()
    found = mmd_test(x, y, num_permutations=200)
    assert mmd_test(x, y, num_permutations=200) == found
    assert mmd_test(x, y, num_permutations=200, seed=2).p_value != found.p_value
    assert torch.equal(torch.random.get_rng_state(), before)
    value, std_error = mmd(x, y)
    assert found.value == pytest.approx(value.item(), abs=1e-5)
    assert found.std_error == pytest.approx(std_error.item(), rel=1e-3)


def test_permutations_that_give_the_same_sets_count():
    """Four samples have six partitions into ordered pairs; two of them give the observed discrepancy."""
    p = mmd_test(torch.tensor([0.0, 0.1]), torch.tensor([5.0, 5.1]), num_permutations=3000).p_value
    assert p == pytest.approx(1 / 3, abs=6 * (2 / 9 / 3000) ** 0.5)


def test_summary_of_the_result_in_a_line():
    assert str(MMDTest(0.0123, 0.004, 0.25, 99)) == "squared MMD 0.0123 ± 0.004 (p = 0.25, 99 permutations)"
    assert "p ≤ 0.01" in str(MMDTest(0.0123, 0.004, 0.01, 99))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_value_is_that_of_mmd(kernel):
    x, y = torch.randn(7, 2, 2), torch.randn(5, 2, 2) + 1
    found = mmd_test(x, y, kernel=kernel, num_permutations=1)
    value, std_error = mmd(x, y, kernel=kernel)
    assert found.value == pytest.approx(value.item())
    assert found.std_error == pytest.approx(std_error.item())


def test_sets_that_cannot_be_tested_are_refused(monkeypatch):
    x = torch.zeros(10, 2)
    with pytest.raises(ValueError, match="at least 2 samples"):
        mmd_test(x, x[:1])
    with pytest.raises(ValueError, match="num_permutations of 1 or more, but found 0"):
        mmd_test(x, x, num_permutations=0)
    with pytest.raises(TypeError, match=r"mmd_test wants a kernel such as.*the class GaussianKernel"):
        mmd_test(x, x, kernel=GaussianKernel)
    monkeypatch.setattr("pyro_genmodels.evaluation.permutation_test.MAX_SAMPLES", 12)
    with pytest.raises(ValueError, match=r"at most 12 samples, but found 10 and 10.*randperm\(len\(x\)\)\[:6\]"):
        mmd_test(x, x)
