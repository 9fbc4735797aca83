"""Figures of samples are the same at any offset and in any unit, up to the unit itself.

The teacher is each figure of the same samples in double precision, near zero and of size one.
"""

import pytest
import torch

from pyro_genmodels import MaximumMeanDiscrepancy, SlicedWasserstein, SpreadDivergence
from pyro_genmodels.divergences import (
    EnergyKernel,
    GaussianKernel,
    LaplaceKernel,
    RationalQuadraticKernel,
    mmd,
    sliced_wasserstein,
    wasserstein,
)
from pyro_genmodels.evaluation import c2st, coverage, mmd_test, mode_coverage
from pyro_genmodels.infer.sample_losses import SampleSets


def _loss(loss):
    def between(x, y, unit):
        torch.manual_seed(1)
        return loss(unit).between(SampleSets(x, y, paired=False))

    return between


def _mode_coverage(x, y, unit):
    found = mode_coverage(x, y[:5], 0.2 * unit)
    return torch.tensor([*found.counts.tolist(), found.high_quality, found.reverse_kl])


FIGURES = {  # name -> (figure of x, y and the unit; its power of the unit)
    "mmd": (lambda x, y, unit: mmd(x, y), 0),
    "mmd, 20 dimensions": (lambda x, y, unit: mmd(x.repeat(1, 10), y.repeat(1, 10)), 0),
    "mmd, Laplace": (lambda x, y, unit: mmd(x, y, kernel=LaplaceKernel()), 0),
    "mmd, bandwidth": (lambda x, y, unit: mmd(x, y, kernel=GaussianKernel(0.3 * unit)), 0),
    "mmd, quadratics": (lambda x, y, unit: mmd(x, y, kernel=RationalQuadraticKernel()), 0),
    "energy distance": (lambda x, y, unit: mmd(x, y, kernel=EnergyKernel()), 1),
    "wasserstein": (lambda x, y, unit: wasserstein(x, y), 1),
    "wasserstein, p=1": (lambda x, y, unit: wasserstein(x, y, p=1), 1),
    "wasserstein, p=6": (lambda x, y, unit: wasserstein(x, y, p=6), 1),
    "wasserstein, a line": (lambda x, y, unit: wasserstein(x[:, 0], y[:, 0], p=3), 1),
    "Sinkhorn": (lambda x, y, unit: wasserstein(x, y, p=1, regularization=0.5 * unit), 1),
    "sliced": (lambda x, y, unit: sliced_wasserstein(x, y, num_projections=20, seed=1), 1),
    "sliced, p=6": (lambda x, y, unit: sliced_wasserstein(x, y, num_projections=20, p=6, seed=1), 1),
    "coverage": (lambda x, y, unit: coverage(x, y), 0),
    "mode coverage": (_mode_coverage, 0),
    "permutation test": (lambda x, y, unit: vars(mmd_test(x, y, num_permutations=50)).values(), 0),
    "classifier": (lambda x, y, unit: c2st(x, y, folds=2, hidden=(2,)).value, 0),
    "loss: mmd": (_loss(lambda unit: MaximumMeanDiscrepancy()), 0),
    "loss: energy distance": (_loss(lambda unit: MaximumMeanDiscrepancy(kernel=EnergyKernel())), 1),
    "loss: sliced": (_loss(lambda unit: SlicedWasserstein(num_projections=20, p=1)), 1),
    "loss: spread": (_loss(lambda unit: SpreadDivergence()), 0),
}
every = pytest.mark.parametrize("name", FIGURES)


def figure(name, x, y, unit=1.0):
    fn, power = FIGURES[name]
    found = fn(x, y, unit)
    numbers = [float(v) for v in ([found] if isinstance(found, float) or not getattr(found, "shape", (1,)) else found)]
    return torch.tensor(numbers, dtype=torch.float64) / unit**power


@pytest.fixture(scope="module")
def sets():
    """Multiples of 1/16, which single precision keeps up to an offset of 1e6."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(0, 64, (40, 2), generator=generator) / 16 for _ in range(2))
    return x, 0.5 * y + 1


@every
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_common_offset_changes_nothing(name, offset, sets):
    x, y = (16 * s for s in sets)
    truth = figure(name, x.double(), y.double(), 16.0)
    torch.testing.assert_close(figure(name, x + offset, y + offset, 16.0), truth, rtol=1e-5, atol=1e-6)


@every
@pytest.mark.parametrize("unit", [1e-25, 1e-10, 1e10, 1e20])
def test_a_common_unit_changes_only_the_unit(name, unit, sets):
    x, y = sets
    truth = figure(name, x.double(), y.double())
    torch.testing.assert_close(figure(name, x * unit, y * unit, unit), truth, rtol=1e-5, atol=1e-6)


# Values known otherwise.


def test_an_exploded_model_is_far_away():
    x, y = torch.randn(200, 2), torch.randn(200, 2)
    exact = sliced_wasserstein(0 * y, y, seed=1).value * 1e20  # seen from there x is a point
    torch.testing.assert_close(sliced_wasserstein(x, 1e20 * y, seed=1).value, exact, rtol=1e-5, atol=0)


def test_one_far_row_does_not_blur_the_others():
    """The kernel of two rows is 0 for the far one, and 1 for it with itself, which is left out."""
    x, y = torch.randn(100, 2), torch.randn(100, 2)
    x[0] = 1e6
    kernel = GaussianKernel(1.0)
    k = torch.exp(-torch.cat([x, y]).double()[:, None].sub(torch.cat([x, y]).double()).square().sum(-1) / 2)
    k = k - torch.eye(200, dtype=torch.float64)
    truth = k[:100, :100].sum() / 9900 + k[100:, 100:].sum() / 9900 - 2 * k[:100, 100:].mean()
    torch.testing.assert_close(mmd(x, y, kernel=kernel).value.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dims", [1, 20])
@pytest.mark.parametrize("far", [1e4, 1e6])
def test_modes_far_apart_are_compared_each_on_its_own(dims, far):
    """Two modes at +-far: within a mode the kernel is that of the mode alone, between modes it is zero."""
    x, y = torch.randint(0, 5, (20, dims)).float(), torch.randint(0, 5, (20, dims)).float() / 2
    sign = far * torch.tensor([1.0, -1.0]).repeat_interleave(10)[:, None]
    kernel = RationalQuadraticKernel(2.0, alphas=(2.0,))
    blocks = [kernel(part.double(), other.double()) for part, other in zip(x.split(10), y.split(10), strict=True)]
    found = kernel(x + sign, y + sign)
    for block, part in zip(blocks, (found[:10, :10], found[10:, 10:]), strict=True):
        torch.testing.assert_close(part.double(), block, rtol=1e-3 if (dims, far) == (20, 1e6) else 1e-6, atol=0)
    assert found[:10, 10:].max() < 1e-12


def test_a_collapsed_model_covers_nothing_at_an_offset():
    x = torch.randint(0, 1024, (500, 2)) / 1024  # exact at 1e4
    few = x[:1].expand(500, 2)
    truth = coverage(x.double(), few.double())
    assert truth < 0.05
    assert coverage(1e4 + x, 1e4 + few) == truth


def test_the_density_ratio_of_a_spread_divergence_is_right_between_far_modes():
    """With modes at +-1e4 of the same shape, the divergence is that of one mode."""
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randint(0, 16, (50, 2), generator=generator) / 4 for _ in range(2))
    y = y + 1
    near, far = (
        _loss(lambda unit: SpreadDivergence(bandwidth=0.5, num_samples=100))(
            torch.cat([x + o, x - o]), torch.cat([y + o, y - o]), 1
        )
        for o in (1e3, 1e4)
    )
    alone = _loss(lambda unit: SpreadDivergence(bandwidth=0.5, num_samples=100))(x, y, 1)
    torch.testing.assert_close(near, far, rtol=1e-5, atol=0)
    torch.testing.assert_close(far, alone, rtol=0.1, atol=0)


# Exploded models as losses: the trainer must see them.


@pytest.mark.parametrize("name", ["loss: mmd", "loss: energy distance", "loss: sliced", "loss: spread"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_samples_reaches_the_loss(name, value):
    x, y = torch.randn(20, 2), torch.randn(20, 2)
    x[3] = value
    loss = FIGURES[name][0](x, y, 1.0)
    assert not loss.isfinite()


def test_huge_samples_are_no_good_samples():
    x, y = torch.randn(20, 2), torch.randn(20, 2)
    for name in ("loss: energy distance", "loss: sliced", "loss: spread"):
        assert FIGURES[name][0](x * 1e20, y, 1.0) > 1e3
    assert SlicedWasserstein(p=2).between(SampleSets(x * 1e30, y, paired=False)).isinf()
