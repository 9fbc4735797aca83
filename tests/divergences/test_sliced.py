"""The sliced Wasserstein distance of draws: closed forms, error, gradient, floor, and what is refused.

A comparison at six standard errors has a false-alarm rate of 2e-9.
"""

import sys
from math import gamma, pi

import pyro.distributions as dist
import pytest
import torch
from marks import slow_unless
from scipy.stats import wasserstein_distance

from pyro_genmodels.divergences import sliced_wasserstein
from pyro_genmodels.divergences.sliced import directions

pytestmark = pytest.mark.usefixtures("float64")


def quantiles(loc, scale, n):
    return loc + scale * dist.Normal(0.0, 1.0).icdf((torch.arange(n) + 0.5) / n)


# Values.


def test_in_one_dimension_it_is_the_distance_of_gaussians():
    """By their quantiles, without chance: the square is that of the means and of the deviations."""
    value, error = sliced_wasserstein(quantiles(0.3, 1.0, 20_000), quantiles(-0.5, 2.5, 15_000))
    torch.testing.assert_close(value.square(), torch.tensor(0.8**2 + 1.5**2), rtol=1e-3, atol=0)
    assert error == 0
    value, _ = sliced_wasserstein(quantiles(0.0, 1.0, 20_000), quantiles(0.0, 2.0, 20_000), p=1)
    torch.testing.assert_close(value, torch.tensor((2 / pi) ** 0.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dims", slow_unless([5], [2, 5]))
def test_isotropic_gaussians_meet_the_closed_form(dims):
    """The square is |v|^2 / d and that of the deviations' difference; 50 pairs of sets, with a bias of at most 10 / n."""
    shift, n = torch.arange(1.0, dims + 1), 500
    squares = torch.stack([
        sliced_wasserstein(torch.randn(n, dims), shift + 2 * torch.randn(n, dims), num_projections=200).value.square()
        for _ in range(50)
    ])  # fmt: skip
    truth = shift.square().sum() / dims + 1
    assert abs(squares.mean() - truth) < 6 * squares.std() / 50**0.5 + 10 / n


@pytest.mark.parametrize("dims", [2, 3, 10])
def test_a_shift_is_as_far_as_its_length_over_the_root_of_the_dimension(dims):
    """And for p = 1 the mean length of a projection."""
    x, shift = torch.randn(10, dims), torch.arange(1.0, dims + 1)
    value, error = sliced_wasserstein(x, x + shift, num_projections=20_000)
    assert 0 < error < 0.02 * value
    assert abs(value - shift.norm() / dims**0.5) < 6 * error
    value, error = sliced_wasserstein(x, x + shift, num_projections=20_000, p=1)
    assert abs(value - shift.norm() * gamma(dims / 2) / (pi**0.5 * gamma((dims + 1) / 2))) < 6 * error


def test_disjoint_supports_have_a_finite_distance_that_grows_with_the_shift():
    x, y = torch.rand(200, 2), torch.rand(200, 2)
    values = [sliced_wasserstein(x, y + shift, seed=1) for shift in (2.0, 4.0, 8.0)]
    for shift, (value, error) in zip((2.0, 4.0, 8.0), values, strict=True):
        assert abs(value - shift) < 6 * error + 0.1  # the shift is (1, 1) * shift; the sets themselves differ a little


def test_along_each_line_it_is_the_distance_that_scipy_finds():
    x, y = torch.randn(17, 3), torch.randn(40, 3).exp()
    lines = directions(20, 3, seed=4)
    truth = sum(wasserstein_distance(x @ line, y @ line) for line in lines) / 20
    assert abs(sliced_wasserstein(x, y, num_projections=20, p=1, seed=4).value - truth) < 1e-12


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_it_is_a_distance_of_sets(p):
    """Zero for equal ones, symmetric, in whatever order and however often all are repeated; below the sum by a third."""
    x, y, z = torch.randn(10, 3), torch.randn(14, 3) + 1, torch.randn(7, 3).exp()

    def distance(*sets):
        return sliced_wasserstein(*sets, num_projections=50, p=p, seed=1).value

    assert distance(x, x) == 0
    assert distance(x, x[torch.randperm(10)]) < 1e-12  # rows are projected in groups, and rounded so
    for same in (distance(y, x), distance(x.flip(0), y.roll(5, 0)), distance(x.repeat(3, 1), y)):
        torch.testing.assert_close(distance(x, y), same)
    assert distance(x, y) < distance(x, z) + distance(z, y)


def test_it_is_in_the_units_of_the_data_and_knows_no_origin():
    x, y = torch.randn(10, 3), torch.randn(14, 3)
    value, error = sliced_wasserstein(x, y, seed=1)
    scaled = sliced_wasserstein(5 - 100 * x, 5 - 100 * y, seed=1)
    torch.testing.assert_close(scaled.value, 100 * value)
    torch.testing.assert_close(scaled.std_error, 100 * error)


def test_the_standard_error_is_that_over_directions():
    """500 sets of 100 directions for the same draws; a deviation of so many is known to a sixth at five of its errors."""
    x, y = torch.randn(20, 3), torch.randn(20, 3) * torch.tensor([1.0, 2.0, 3.0]) + 1
    values, errors = torch.tensor([sliced_wasserstein(x, y, num_projections=100) for _ in range(500)]).T
    truth, error = sliced_wasserstein(x, y, num_projections=20_000)
    assert abs(values.mean() - truth) < 6 * (values.var() / 500 + error**2) ** 0.5 + 1e-3 * truth  # the root is bent
    torch.testing.assert_close(errors.mean(), values.std(), rtol=1 / 6, atol=0)


def test_the_baseline_falls_with_the_root_of_the_size():
    """40 pairs of sets of each size; their mean is known to 3 %."""
    floors = [
        torch.stack([sliced_wasserstein(torch.randn(n, 3), torch.randn(n, 3), num_projections=100).value for _ in range(40)])
        for n in (50, 200, 800)
    ]
    means, errors = (torch.stack([f.mean() for f in floors]), torch.stack([f.std() / 40**0.5 for f in floors]))
    assert (means > 6 * errors).all()
    assert ((means[:-1] / means[1:] > 1.6) & (means[:-1] / means[1:] < 2.4)).all()


# Gradients.


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
def test_the_gradient_is_that_of_finite_differences(p, shape):
    x, y = torch.randn(6, *shape, requires_grad=True), torch.randn(9, *shape, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: sliced_wasserstein(x, y, num_projections=20, p=p, seed=1).value, (x, y))
    assert not sliced_wasserstein(x, y, seed=1).std_error.requires_grad


@pytest.mark.parametrize("p", [1, 2])
def test_where_the_distance_is_zero_the_gradient_is_too(p):
    x = torch.randn(6, 3, requires_grad=True)
    sliced_wasserstein(x, x.detach(), p=p).value.backward()
    assert (x.grad == 0).all()


def test_samples_can_be_moved_to_the_data_by_its_gradient():
    """Every step draws its own directions."""
    target = torch.randn(50, 2) * torch.tensor([0.5, 2.0]) + 3
    x = torch.randn(50, 2).requires_grad_()
    optim = torch.optim.Adam([x], lr=0.1)
    for _ in range(200):
        optim.zero_grad()
        sliced_wasserstein(x, target, num_projections=20).value.backward()
        optim.step()
    assert sliced_wasserstein(x, target, seed=1).value < 0.1


# Directions.


def test_a_seed_fixes_the_directions_whatever_the_dtype_and_the_sets_and_leaves_torchs_alone():
    x, y = torch.randn(30, 3), torch.randn(41, 3)
    before = torch.random.get_rng_state()
    value, error = sliced_wasserstein(x, y, seed=3)
    assert sliced_wasserstein(x, y, seed=3) == (value, error)
    assert sliced_wasserstein(x, y, seed=4).value != value
    assert torch.equal(torch.random.get_rng_state(), before)
    single = sliced_wasserstein(x.float(), y.float(), seed=3)
    assert single.value.dtype == single.std_error.dtype == torch.float32
    torch.testing.assert_close(single.value.double(), value, rtol=1e-5, atol=0)
    assert sliced_wasserstein(x, y).value != sliced_wasserstein(x, y).value
    torch.manual_seed(5)
    first = sliced_wasserstein(x, y)
    torch.manual_seed(5)
    assert sliced_wasserstein(x, y) == first


def test_directions_are_unit_vectors_without_preference():
    lines = directions(20_000, 3, seed=0)
    torch.testing.assert_close(lines.norm(dim=1), torch.ones(20_000))
    assert (lines.mean(0).abs() < 6 / (3 * 20_000) ** 0.5).all()
    assert ((lines.T @ lines / 20_000 - torch.eye(3) / 3).abs() < 6 * 0.3 / 20_000**0.5).all()


def test_cutting_the_directions_into_blocks_changes_nothing(monkeypatch):
    x, y = torch.randn(30, 3), torch.randn(41, 3)
    whole = sliced_wasserstein(x, y, seed=3)
    monkeypatch.setattr("pyro_genmodels.divergences.sliced._MAX_BLOCK_SIZE", 1000)
    torch.testing.assert_close(sliced_wasserstein(x, y, seed=3), whole)


# What goes in.


def test_events_are_flattened_and_numbers_need_no_dimension():
    x, y = torch.randn(10, 2, 3), torch.randn(12, 2, 3)
    assert sliced_wasserstein(x, y, seed=1) == sliced_wasserstein(x.reshape(10, 6), y.reshape(12, 6), seed=1)
    x, y = x[:, 0, 0], y[:, 0, 0]
    assert sliced_wasserstein(x, y) == sliced_wasserstein(x[:, None], y[:, None])


def test_the_wider_dtype_is_kept_and_integers_are_taken_as_numbers():
    x = torch.randint(5, (10, 2))
    assert sliced_wasserstein(x.float(), x.double()).value.dtype == torch.float64
    assert sliced_wasserstein(x.half(), x.half()).value.dtype == torch.float32
    assert sliced_wasserstein(x, x + 1, seed=1) == sliced_wasserstein(x.double(), x + 1.0, seed=1)


TEN = torch.zeros(10, 2)
HOLED = torch.zeros(10, 2).index_fill(0, torch.tensor([3, 7]), torch.nan)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (TEN, torch.zeros(10, 3), r"x has shape \(10, 2\) and y \(10, 3\)"),
        (TEN[:, 0], TEN[:, :1], r"x has shape \(10,\) and y \(10, 1\)"),
        (TEN, torch.zeros(10, 2, 1), r"y \(10, 2, 1\)"),
        (TEN[:, :0], TEN[:, :0], r"\(10, 0\)"),
        (TEN[:1], TEN, r"at least 2 samples in each set.*x has shape \(1, 2\)"),
        (TEN, TEN[:0], r"at least 2 samples in each set.*y has shape \(0, 2\)"),
        (torch.tensor(1.0), TEN, r"x has shape \(\)"),
        (TEN, HOLED, "2 of the 10 samples of y hold NaN or infinity, the first at 3"),
        (TEN.log(), TEN, "10 of the 10 samples of x hold"),
        (TEN.to(torch.complex64), TEN, "real numbers, but x has dtype torch.complex64"),
        (TEN, TEN.to("meta"), "x is on cpu and y on meta"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(x, y, match):
    with pytest.raises(ValueError, match=f"sliced_wasserstein wants.*{match}"):
        sliced_wasserstein(x, y)


def test_arrays_are_taken_as_tensors():
    x, y = torch.randn(10, 2), torch.randn(12, 2)
    assert sliced_wasserstein(x, y.numpy(), seed=1) == sliced_wasserstein(x, y, seed=1)


@pytest.mark.parametrize(
    "choice", [{"num_projections": 1}, {"num_projections": 0}, {"p": 0.5}, {"p": torch.inf}, {"p": torch.nan}], ids=str
)
def test_invalid_options_are_refused(choice):
    with pytest.raises(ValueError, match=f"sliced_wasserstein wants at least 2 directions|order p.*{choice.get('p')}"):
        sliced_wasserstein(TEN, TEN, **choice)


def test_without_pot_the_line_that_installs_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"sliced_wasserstein needs POT: pip install 'pyro-genmodels\[eval\]'"):
        sliced_wasserstein(TEN, TEN)


@pytest.mark.gpu
def test_results_are_on_the_device_of_the_samples():
    x, y = torch.randn(30, 3), torch.randn(41, 3)
    on_cpu, on_gpu = sliced_wasserstein(x, y, seed=3), sliced_wasserstein(x.cuda(), y.cuda(), seed=3)
    assert on_gpu.value.is_cuda
    assert on_gpu.std_error.is_cuda
    torch.testing.assert_close(on_gpu.value.cpu(), on_cpu.value)
