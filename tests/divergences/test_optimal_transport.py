"""The Wasserstein distance of draws: plans by brute force, error, gradient, regularisation, and what is refused."""

import sys
from itertools import permutations

import pytest
import torch
from marks import slow_unless

from pyro_genmodels.divergences import wasserstein
from pyro_genmodels.divergences.optimal_transport import sorted_potentials

pytestmark = pytest.mark.usefixtures("float64")
TEN = torch.zeros(10, 2)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("dims", [1, 3])
def test_it_is_the_best_of_all_matchings(p, dims):
    x, y = torch.randn(6, dims), torch.randn(6, dims) + 0.5
    costs = torch.cdist(x, y) ** p
    best = min(costs[torch.arange(6), list(order)].mean() for order in permutations(range(6)))
    assert abs(wasserstein(x, y, p=p).value - best ** (1 / p)) < 1e-12


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize(("n", "m"), [(7, 7), (6, 9), (5, 8)])
def test_sorting_is_the_linear_programme_and_its_potentials_prove_it(p, n, m):
    x, y = torch.randn(n), torch.randn(m) + 1
    value = wasserstein(x, y, p=p).value
    flat = torch.zeros(n), torch.zeros(m)
    assert abs(value - wasserstein(torch.stack([x, flat[0]], 1), torch.stack([y, flat[1]], 1), p=p).value) < 1e-12
    u, v = sorted_potentials(x, y, p)
    slack = (x.sort().values[:, None] - y.sort().values).abs() ** p - u[:, None] - v
    assert abs(u.mean() + v.mean() + slack.min() - value**p) < 1e-12


@pytest.mark.parametrize("regularization", slow_unless([None], [None, 0.5]))
@pytest.mark.parametrize(("dims", "p"), [(1, 2), (2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_the_standard_error_is_that_of_repeated_draws(dims, p, regularization):
    """30 (regularised) or 200 pairs of sets, whose deviation is known to 13 or 5 %: five of these, 6e-7."""
    repeats = 30 if regularization else 200
    n = 40 if regularization else 150
    pairs = [(torch.randn(n, dims), 1.5 * torch.randn(n + 30, dims) + 2) for _ in range(repeats)]
    found = [wasserstein(x, y, p=p, regularization=regularization) for x, y in pairs]
    values, errors = torch.tensor(found).T
    assert abs(errors.mean() / values.std() - 1) < 5 / (2 * repeats) ** 0.5 + 0.05


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
def test_the_gradient_is_that_of_finite_differences(p, shape):
    x, y = torch.randn(6, *shape, requires_grad=True), torch.randn(9, *shape, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: wasserstein(x, y, p=p).value, (x, y))
    assert not wasserstein(x, y).std_error.requires_grad


def test_the_gradient_of_the_regularised_is_that_of_finite_differences():
    x, y = torch.randn(4, 2, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    of_both = (lambda x, y: wasserstein(x, y, regularization=1.0).value, (x, y))
    assert torch.autograd.gradcheck(*of_both, eps=1e-4, atol=1e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_where_the_distance_is_zero_it_has_no_gradient_and_no_error(p):
    x = torch.randn(6, 3, requires_grad=True)
    value, error = wasserstein(x, x.detach(), p=p)
    value.backward()
    assert value == error == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("dims", [1, 2])
def test_the_regularised_nears_the_exact_and_is_zero_between_equals(dims):
    x, y = torch.randn(20, dims), torch.randn(25, dims) + 1
    exact = wasserstein(x, y).value
    off = [abs(wasserstein(x, y, regularization=r).value - exact) for r in (1.0, 0.1, 0.02)]
    assert off[0] > off[1] > off[2]
    assert off[2] < 0.02 * exact
    assert wasserstein(x, x, regularization=0.5).value < 1e-3


@pytest.mark.parametrize("regularization", [None, 0.2, 1.0, 100.0, 1e6])
@pytest.mark.parametrize(("dims", "shift"), [(1, 1e-3), (2, 1e-3), (2, 30.0)])
def test_the_standard_error_of_a_shift_is_that_of_the_mean_along_it(dims, shift, regularization):
    """The distance of order 2 is |s|, with the potentials 2 s x of a Gaussian shift: an error of sd(s x) / |s| in both sets."""
    x = torch.randn(60, dims)
    value, error = wasserstein(x, x + shift, regularization=regularization)
    torch.testing.assert_close(value, torch.tensor(shift * dims**0.5), rtol=1e-4, atol=0)
    truth = (2 * (x.sum(1) / dims**0.5).var() / 60) ** 0.5
    torch.testing.assert_close(error, truth, rtol=2e-3, atol=0)


@pytest.mark.parametrize(("n", "m"), [(30, 30), (30, 40), (20, 37)])
def test_the_potentials_of_the_linear_programme_are_optimal(n, m):
    """Their means sum to the cost, and no pair costs less than their sum."""
    x, y = torch.randn(n, 2), torch.randn(m, 2) + 0.3
    module = sys.modules["pyro_genmodels.divergences.optimal_transport"]
    costs = module._costs(x, y, 2.0)
    cost, (u, v) = module._linear_programme(pytest.importorskip("ot"), costs)
    torch.testing.assert_close(u.mean() + v.mean(), cost)
    assert (costs - u[:, None] - v).min() > -1e-12


def test_a_large_regularization_leaves_the_distance_of_the_means():
    """And its error, for order 2; for order 1 it leaves half the energy distance."""
    x, y = torch.randn(50, 2), 2 * torch.randn(70, 2) + 1
    value, error = wasserstein(x, y, regularization=1e6)
    between = y.mean(0) - x.mean(0)
    along = [part @ between / between.norm() for part in (x, y)]
    torch.testing.assert_close(value, between.norm(), rtol=1e-4, atol=0)
    torch.testing.assert_close(error, sum(a.var() / len(a) for a in along).sqrt(), rtol=1e-3, atol=0)
    value, _ = wasserstein(x, y, p=1, regularization=1e6)
    means = [torch.cdist(a, b).mean() for a, b in ((x, y), (x, x), (y, y))]
    torch.testing.assert_close(value, means[0] - means[1] / 2 - means[2] / 2, rtol=1e-4, atol=0)


def test_events_are_flattened_and_the_wider_dtype_is_kept():
    x, y = torch.randn(10, 2, 3), torch.randn(12, 2, 3)
    assert wasserstein(x, y) == wasserstein(x.reshape(10, 6), y.reshape(12, 6))
    assert wasserstein(x.float(), y).value.dtype == torch.float64
    value, error = wasserstein(x.float(), y.half())
    assert value.dtype == error.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"p": 0.5}, "order p of at least 1, and finite, but found p=0.5"),
        ({"p": torch.inf}, "order p"),
        ({"regularization": 0.0}, r"above 0.*regularization=0\.0\. Use None"),
        ({"regularization": 1.0, "p": 3.0}, "at most 2 with a regularization"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(options, match):
    with pytest.raises(ValueError, match=f"wasserstein wants.*{match}"):
        wasserstein(TEN, TEN, **options)


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"wasserstein wants.*x has shape \(10, 2\) and y \(10, 3\)"):
        wasserstein(TEN, torch.zeros(10, 3))


def test_a_solver_that_does_not_end_is_an_error(monkeypatch):
    x, y = torch.randn(40, 2), torch.randn(40, 2) + 1
    module = sys.modules["pyro_genmodels.divergences.optimal_transport"]
    monkeypatch.setattr(module, "_MAX_PIVOTS", 3)
    monkeypatch.setattr(module, "_MAX_STEPS", 2)
    with pytest.raises(ValueError, match=r"could not solve the linear programme of 40 x 40 samples: .*Use fewer samples"):
        wasserstein(x, y)
    with pytest.raises(ValueError, match=r"iteration did not converge. After 2 steps.*Use a larger regularization"):
        wasserstein(x, y, regularization=0.01)


def test_without_pot_the_line_that_installs_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"wasserstein needs POT: pip install 'pyro-genmodels\[eval\]'"):
        wasserstein(TEN, TEN)
