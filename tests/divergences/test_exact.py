"""Divergences that are known exactly: impossible outcomes, point masses, singular distributions and normal ones.

Values are computed from probabilities, by quadrature, or are 0, log 2, 1 and infinity.
"""

from math import e, exp, inf, log

import pyro.distributions as dist
import pytest
import torch
from convex_functions import NAMED, TRIANGULAR
from teachers import integral
from torch.distributions import constraints

from pyro_genmodels.divergences import (
    Alpha,
    NeymanChiSquared,
    PearsonChiSquared,
    SquaredHellinger,
    f_divergence,
    fisher,
    js,
    kl,
    tv,
)
from pyro_genmodels.divergences.exact import in_closed_form

FUNCTIONS = [*NAMED, Alpha(3.0), Alpha(-2.0)]
every_f = pytest.mark.parametrize("f", [*FUNCTIONS, TRIANGULAR], ids=lambda f: f"{type(f).__name__}{getattr(f, 'alpha', '')}")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def number(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype)


def by_hand(f, p, q):
    """The sum over outcomes, in doubles, with the limits where a probability is zero."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if b > 0:
            total += b * (float(f(number(a / b, torch.float64))) if a > 0 else f.at_zero)
        elif a > 0:
            total += a * f.slope_at_infinity
    return total


# Impossible and almost impossible outcomes.


PROBS = [([0.5, 0.5], [1.0, 0.0]), ([1.0, 0.0], [0.5, 0.5]), ([1.0, 0.0], [0.0, 1.0]), ([0.5, 0.5], [1 - 1e-10, 1e-10])]


@every_f
@every_dtype
@pytest.mark.parametrize(("p", "q"), PROBS)
def test_impossible_outcomes_contribute_the_limits(f, dtype, p, q):
    truth = by_hand(f, p, q)
    forms = [lambda probs: dist.Categorical(number(probs, dtype)), lambda probs: dist.Bernoulli(number(probs[1], dtype)),
             lambda probs: dist.Binomial(1, number(probs[1], dtype))]  # fmt: skip
    for one in forms:
        for other in forms:
            value, error = f_divergence(one(p), other(q), f)
            assert value.item() == truth or value.item() == pytest.approx(truth, rel=1e-4)
            assert error == 0


@every_f
def test_impossible_vectors_contribute_the_limits_to_means(f):
    """Half of the outcomes of p are impossible under q, and none the other way round: quarters of the square."""
    p, q = (dist.Bernoulli(torch.tensor(probs)).to_event(1) for probs in ([0.5, 0.5], [1.0, 0.5]))
    truth = by_hand(f, [0.25] * 4, [0.0, 0.0, 0.5, 0.5])
    value, error = f_divergence(p, q, f)
    assert value == truth == inf or abs(value - truth) <= 6 * error + 1e-6
    one, other = dist.OneHotCategorical(torch.tensor([0.5, 0.5])), dist.OneHotCategorical(torch.tensor([1.0, 0.0]))
    value, error = f_divergence(one, other, f)
    truth = by_hand(f, [0.5, 0.5], [1.0, 0.0])
    assert value == truth == inf or abs(value - truth) <= 6 * error + 1e-6


def test_a_component_without_weight_has_no_mass():
    ends = torch.tensor([[0.0, 5.0], [1.0, 6.0]])
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.tensor([1.0, 0.0])), dist.Uniform(*ends))
    assert tv(mixture, dist.Uniform(5.0, 6.0)) == (1, 0)
    assert kl(dist.Uniform(5.0, 6.0), mixture) == (inf, 0)
    assert kl(mixture, dist.Uniform(0.0, 1.0)) == (0, 0)


def test_kl_across_kinds_of_distribution():
    """Crashed before; it is a sum over the outcomes of both, infinite if mass is missing."""
    p, q = dist.Categorical(torch.tensor([0.5, 0.5])), dist.Bernoulli(torch.tensor(0.2))
    torch.testing.assert_close(kl(p, q).value, torch.tensor(0.5 * log(0.5 / 0.8) + 0.5 * log(0.5 / 0.2)))
    torch.testing.assert_close(kl(q, p).value, torch.tensor(0.8 * log(0.8 / 0.5) + 0.2 * log(0.2 / 0.5)))
    assert kl(dist.Categorical(torch.tensor([0.5, 0.3, 0.2])), q) == (inf, 0)
    value, error = kl(q, dist.Categorical(torch.tensor([0.4, 0.4, 0.2])))
    assert value == pytest.approx(0.8 * log(2) + 0.2 * log(0.5))
    assert error == 0
    value, error = js(dist.Normal(0.0, 1.0), dist.Laplace(torch.zeros((), dtype=torch.float64), 1.0))
    assert value.dtype == torch.float64
    assert value > 6 * error


# Point masses.


POINT = dist.Delta(torch.tensor(1.0))
SINGULAR = {
    "a density": (POINT, dist.Normal(0.0, 1.0)),
    "vectors": (dist.Delta(torch.zeros(2)).to_event(1), dist.Normal(torch.zeros(2), 1.0).to_event(1)),
    "one event": (dist.Delta(torch.zeros(2), event_dim=1), dist.MultivariateNormal(torch.zeros(2), torch.eye(2))),
    "another point": (POINT, dist.Delta(torch.tensor(2.0))),
    "no value of a count": (dist.Delta(torch.tensor(1.5)), dist.Poisson(1.0)),
    "points": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Delta(torch.tensor([0.0, 1.0]))), dist.Normal(0.0, 1.0)
    ),
    "a moved point": (
        dist.TransformedDistribution(POINT, [dist.transforms.ExpTransform()]), dist.LogNormal(0.0, 1.0)
    ),
    "a simplex": (dist.Dirichlet(torch.ones(3)), dist.Normal(torch.zeros(3), 1.0).to_event(1)),
    "a sphere": (dist.ProjectedNormal(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0).to_event(1)),
}  # fmt: skip


@every_f
@pytest.mark.parametrize("name", SINGULAR)
def test_singular_distributions_are_as_far_apart_as_can_be(f, name):
    p, q = SINGULAR[name]
    for pair in ((p, q), (q, p)):
        value, error = f_divergence(*pair, f)
        assert value.item() == pytest.approx(f.at_zero + f.slope_at_infinity)
        assert error == 0


def test_known_distances_of_a_point_mass_from_a_density():
    p, q = dist.Delta(torch.tensor(0.0)), dist.Normal(0.0, 1.0)
    assert kl(p, q) == kl(q, p) == (inf, 0)
    assert js(p, q).value.item() == pytest.approx(log(2))
    assert tv(p, q) == (1, 0)
    assert kl(p.expand((3,)), q).value.tolist() == [inf] * 3


@every_f
def test_a_point_mass_against_counts(f):
    """Poisson(1) has e^-1 at 1; the rest is elsewhere."""
    rest, q = 1 - exp(-1), dist.Poisson(torch.tensor(1.0))
    at_point = float(f(number(e, torch.float64))) / e
    assert f_divergence(POINT, q, f).value.item() == pytest.approx(at_point + rest * f.at_zero, rel=1e-5)
    at_point = float(f(number(1 / e, torch.float64)))
    assert f_divergence(q, POINT, f).value.item() == pytest.approx(at_point + rest * f.slope_at_infinity, rel=1e-5)
    assert f_divergence(POINT, POINT, f) == (0, 0)
    assert f_divergence(POINT, dist.Categorical(torch.tensor([0.0, 1.0])), f) == (0, 0)


def test_zero_inflated_counts_are_counts():
    value, error = kl(dist.ZeroInflatedPoisson(torch.tensor(1.0), gate=torch.tensor(0.3)), dist.Poisson(1.0))
    zero = 0.3 + 0.7 * exp(-1)
    truth = zero * log(zero / exp(-1)) + (1 - zero) * log(0.7)
    assert abs(value - truth) < 6 * error


# Normal distributions.


@pytest.mark.parametrize("scales", [(0.9, 1.1), (1.0, 0.9)])
@pytest.mark.parametrize("f", [SquaredHellinger(), PearsonChiSquared(), NeymanChiSquared(), Alpha(0.3), Alpha(1.5)], ids=repr)
def test_powers_of_normals_meet_quadrature(f, scales):
    p, q = dist.Normal(number(0.3, torch.float64), scales[0]), dist.Normal(number(-0.2, torch.float64), scales[1])

    def term(x):
        log_p, log_q = p.log_prob(x[:, 0]), q.log_prob(x[:, 0])
        return log_q.exp() * f((log_p - log_q).exp())

    value, error = f_divergence(p, q, f)
    assert error == 0
    torch.testing.assert_close(value, integral(term, -14, 14), rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize("f", [SquaredHellinger(), PearsonChiSquared(), NeymanChiSquared(), Alpha(-0.5)], ids=repr)
def test_normal_vectors_are_those_of_a_covariance(f):
    loc, scale = torch.tensor([0.3, -0.2]).double(), torch.tensor([0.8, 1.1]).double()
    p, q = dist.Normal(loc, scale).to_event(1), dist.Normal(-loc, 1.0).to_event(1)
    full_p, full_q = (dist.MultivariateNormal(d.mean, d.variance.diag_embed()) for d in (p, q))
    value = f_divergence(p, q, f).value
    for pair in ((full_p, full_q), (p, full_q), (full_p, q)):
        torch.testing.assert_close(f_divergence(*pair, f).value, value)
    turned = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0]
    pair = (dist.MultivariateNormal(turned @ d.mean, turned @ d.covariance_matrix @ turned.T) for d in (full_p, full_q))
    torch.testing.assert_close(f_divergence(*pair, f).value, value)


def test_chi_squared_divergences_of_normals_are_infinite_beyond_a_ratio_of_variances():
    """The integral of q^2 / p is infinite unless 2 / s_q^2 > 1 / s_p^2."""
    narrow, wide = dist.Normal(torch.tensor(0.0), 1.0), dist.Normal(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.4]))
    value, error = f_divergence(narrow, wide, NeymanChiSquared())
    assert value.isinf().tolist() == [True, False]
    assert (error == 0).all()
    torch.testing.assert_close(f_divergence(wide, narrow, PearsonChiSquared()).value, value)
    full = dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), dist.MultivariateNormal(torch.zeros(2), 4 * torch.eye(2))
    assert f_divergence(*full, NeymanChiSquared()) == (inf, 0)


def test_the_closed_forms_carry_gradients():
    loc, scale = (
        torch.tensor(0.3, dtype=torch.float64).requires_grad_(),
        torch.tensor(0.9, dtype=torch.float64).requires_grad_(),
    )

    def of(f):
        return lambda loc, scale: f_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0), f).value

    for f in (SquaredHellinger(), PearsonChiSquared(), Alpha(1.5)):
        assert torch.autograd.gradcheck(of(f), (loc, scale))


# What is no probability.


NORMAL = dist.Normal(0.0, 1.0)
PAIR = dist.Normal(torch.zeros(2), 1.0)
REFUSED = {
    "masked": (dist.Normal(5.0, 1.0).mask(False), "holds a masked Normal, whose log_prob is 0 where it is masked"),
    "masked, moved": (
        dist.TransformedDistribution(NORMAL.mask(False), [dist.transforms.AffineTransform(0.0, 2.0)]), "masked Normal"
    ),
    "improper": (dist.ImproperUniform(constraints.real, (), ()), "ImproperUniform, which has no normalised density"),
    "weighted point": (dist.Delta(torch.tensor(0.0), log_density=1.0), "Delta with a weight|but . is a Delta over"),
    "mixed": (dist.ZeroInflatedDistribution(NORMAL, gate=torch.tensor(0.3)), "ZeroInflatedDistribution that mixes both"),
    "mixture": (dist.MaskedMixture(torch.tensor(True), NORMAL, dist.Delta(torch.tensor(0.0))), "MaskedMixture that mixes both"),
    "table of values": (dist.Empirical(torch.arange(3.0), torch.zeros(3)), "takes one value|is an Empirical over"),
    "another event": (PAIR.to_event(1), r"one event shape, but .*\(2,\)"),
    "a number": (1.0, "wants distributions, but . is a float"),
}  # fmt: skip


@pytest.mark.parametrize("divergence", [kl, js, tv, fisher])
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_normalised_density_is_refused(divergence, name):
    other, match = REFUSED[name]
    for pair in ((NORMAL, other), (other, NORMAL)):
        with pytest.raises((ValueError, TypeError), match=match):
            divergence(*pair)


@pytest.mark.parametrize("divergence", [kl, js, fisher])
def test_partly_masked_vectors_and_other_batches_are_refused(divergence):
    masked = PAIR.mask(torch.tensor([True, False])).to_event(1)
    with pytest.raises(ValueError, match="masked Normal"):
        divergence(masked, PAIR.to_event(1))
    with pytest.raises(ValueError, match=r"batch shapes that broadcast, but p has \(2,\) and q \(3,\)"):
        divergence(PAIR, NORMAL.expand((3,)))


def test_a_point_mass_has_no_score():
    with pytest.raises(ValueError, match=r"fisher wants two densities over real numbers, but p is a Delta"):
        fisher(POINT, NORMAL)


def test_a_density_that_is_nan_is_refused():
    broken = dist.Normal(torch.tensor(torch.nan), torch.tensor(1.0), validate_args=False)
    with pytest.raises(
        ValueError, match="kl wants densities, but log_prob of Normal is NaN at 10 of the 10 samples of StudentT"
    ):
        kl(dist.StudentT(3.0), broken, num_samples=10)
    with pytest.raises(ValueError, match="kl wants densities, but 1 of 1 divergences of Laplace and Normal are NaN"):
        kl(dist.Laplace(0.0, 1.0), broken)
    with pytest.raises(ValueError, match="f_divergence wants densities, but 1 of 1 divergences of Normal and Normal are NaN"):
        f_divergence(broken, NORMAL, PearsonChiSquared())


NEAR = {
    "normals": lambda a, d: (dist.Normal(a(0.0), a(1.0)), dist.Normal(a(d), a(1 + d))),
    "vectors": lambda a, d: (dist.Normal(a([0.0, 1.0]), a([1.0, 2.0])).to_event(1),
                             dist.Normal(a([d, 1.0]), a([1 + d, 2.0])).to_event(1)),
    "matrices": lambda a, d: (dist.MultivariateNormal(a([0.0, 1.0]), scale_tril=a([[1.0, 0.0], [0.5, 1.0]])),
                              dist.MultivariateNormal(a([0.0, 1.0]), scale_tril=a([[1 + d, 0.0], [0.5, 1.0]]))),
    "Bernoullis": lambda a, d: (dist.Bernoulli(a(0.4)), dist.Bernoulli(a(0.4 + d))),
    "counts": lambda a, d: (dist.Binomial(5, a(0.4)), dist.Binomial(5, a(0.4 + d))),
}  # fmt: skip


@pytest.mark.parametrize("f", FUNCTIONS, ids=str)
@pytest.mark.parametrize("pair", NEAR.values(), ids=NEAR)
def test_single_precision_costs_a_closed_form_no_digits(pair, f):
    """Two that differ by 3e-4: the value is of order 1e-7, and of squared Hellinger was 5.2e-8 instead of 2.25e-8."""
    p, q = pair(lambda value: torch.tensor(value), 3e-4)
    p64, q64 = pair(lambda value: torch.tensor(value).double(), 3e-4)
    if in_closed_form(p, q, f, by="test") is None:
        pytest.skip("known for sums over outcomes alone")
    found, wanted = f_divergence(p, q, f), f_divergence(p64, q64, f)
    assert found.value.dtype == found.std_error.dtype == torch.float32
    torch.testing.assert_close(found.value.double(), wanted.value, rtol=1e-6, atol=0)
    if isinstance(f, SquaredHellinger) and isinstance(p, dist.Normal):
        s = p64.scale.square() + q64.scale.square()
        log_affinity = (2 * p64.scale * q64.scale / s).log() / 2 - (q64.loc - p64.loc) ** 2 / (4 * s)
        torch.testing.assert_close(wanted.value, -log_affinity.expm1(), rtol=1e-7, atol=0)


def test_closed_forms_keep_gradients_and_far_scales():
    scale = torch.tensor(1.0003, requires_grad=True)
    (slope,) = torch.autograd.grad(
        f_divergence(dist.Normal(0.0, 1.0), dist.Normal(0.0, scale), SquaredHellinger()).value, scale
    )
    assert slope.item() == pytest.approx((scale.item() - 1) / 2, rel=1e-3)  # the value is (scale - 1)^2 / 4 nearby
    far = f_divergence(dist.Normal(0.0, 1.0), dist.Normal(0.0, 1e-20), SquaredHellinger()).value
    assert far == 1
    assert f_divergence(dist.Normal(0.0, 1e-20), dist.Normal(0.0, 1.0), SquaredHellinger()).value == 1
