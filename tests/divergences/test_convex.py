"""The convex functions of f-divergences: conjugates, derivatives, limits and critics, against grids and differences."""

from math import inf, log

import pytest
import torch

from pyro_genmodels.divergences import (
    Alpha,
    Convex,
    Jeffreys,
    JensenShannon,
    KullbackLeibler,
    NeymanChiSquared,
    PearsonChiSquared,
    ReverseKullbackLeibler,
    SquaredHellinger,
    TotalVariation,
)

pytestmark = pytest.mark.usefixtures("float64")


def softened(u):
    """Triangular discrimination, (u - 1)^2 / (u + 1)."""
    return (u - 1) ** 2 / (u + 1)


OWN = Convex(softened, at_zero=1.0, slope_at_infinity=1.0)
OWN_STEEP = Convex(lambda u: (u**3 - 1 - 3 * (u - 1)) / 6, at_zero=1 / 3, slope_at_infinity=inf)
OWN_JAGGED = Convex(lambda u: (u - 1).abs() / 2, at_zero=0.5, slope_at_infinity=0.5)
OWN_LOG = Convex(
    lambda u: u * u.log() + u - 1, at_zero=-1.0, slope_at_infinity=inf
)  # with a linear term, which changes nothing
OWN_BACK = Convex(lambda u: -u.log(), at_zero=inf, slope_at_infinity=0.0)
NAMED = [
    KullbackLeibler(), ReverseKullbackLeibler(), Jeffreys(), JensenShannon(), TotalVariation(), SquaredHellinger(),
    PearsonChiSquared(), NeymanChiSquared(), Alpha(2.0), Alpha(3.5), Alpha(0.5), Alpha(-1.0), Alpha(-2.5),
]  # fmt: skip
ALL = [*NAMED, OWN, OWN_STEEP, OWN_JAGGED, OWN_LOG, OWN_BACK]
every = pytest.mark.parametrize(
    "f", ALL, ids=lambda f: f"Alpha {f.alpha}" if isinstance(f, Alpha) else f"{type(f).__name__}{ALL.index(f)}"
)


def below(f, least=-5.0, most=3.0, n=41):
    """Numbers of the domain of the conjugate."""
    return torch.linspace(least, min(most, f.slope_at_infinity - 0.02), n)


@every
def test_f_is_convex_and_zero_at_one(f):
    assert f(torch.tensor(1.0)) == 0
    u = torch.linspace(-4, 4, 401).exp()
    assert ((f(u).diff() / u.diff()).diff() > -1e-10).all()


@every
def test_the_conjugate_is_the_supremum_over_a_grid(f):
    t, u = below(f), torch.linspace(-25, 12, 200_001).exp()
    u = torch.cat([u, torch.ones(1)])  # where some have their kink
    on_grid = torch.stack([(u * s - f(u)).max() for s in t])
    assert (f.conjugate(t) >= on_grid - 1e-9).all()
    torch.testing.assert_close(f.conjugate(t), on_grid, rtol=1e-6, atol=1e-6)


@every
def test_the_conjugate_is_infinite_outside_of_its_domain_only(f):
    low, high = f.domain
    assert low == -inf
    assert high == f.slope_at_infinity
    assert f.conjugate(torch.tensor([-1e3, -10.0, high - 1e-3 if high < inf else 20.0])).isfinite().all()
    if high < inf:
        assert f.conjugate(torch.tensor([high + 1e-6, high + 5.0])).tolist() == [inf, inf]


@every
def test_the_conjugate_of_the_conjugate_is_f(f):
    """The supremum over t, on the slopes of f and, where there are gaps, in between."""
    u = torch.tensor([0.05, 0.3, 0.9, 1.0, 1.3, 4.0])
    t = torch.cat([f.derivative(torch.linspace(-6, 4, 20_001).exp()), below(f, n=201)])
    twice = (u[:, None] * t - f.conjugate(t)).max(1).values
    torch.testing.assert_close(twice, f(u), rtol=1e-5, atol=1e-5)


@every
def test_fenchel_and_young(f):
    """f(u) + f*(t) is never below ut, and equal to it at t = f'(u)."""
    u = torch.linspace(-4, 4, 81).exp()
    t = below(f)
    assert (f(u)[:, None] + f.conjugate(t) - u[:, None] * t > -1e-9).all()
    slope = f.derivative(u)
    torch.testing.assert_close(f(u) + f.conjugate(slope), u * slope, rtol=1e-6, atol=1e-6)


@every
def test_derivatives_are_those_of_finite_differences(f):
    u, step = torch.tensor([0.05, 0.3, 0.9, 1.3, 4.0]), 1e-6
    torch.testing.assert_close(f.derivative(u), (f(u + step) - f(u - step)) / (2 * step), rtol=1e-5, atol=1e-6)
    t = torch.tensor([-4.9, -0.9, -0.1, min(f.slope_at_infinity, 2.5) - 0.1]).requires_grad_()
    (slope,) = torch.autograd.grad(f.conjugate(t).sum(), t)
    with torch.no_grad():
        torch.testing.assert_close(slope, (f.conjugate(t + step) - f.conjugate(t - step)) / (2 * step), rtol=1e-4, atol=1e-6)


@every
def test_the_stated_limits_are_those_of_f(f):
    for u, least, limit in ((torch.tensor(1e-9), f.at_zero, f(torch.tensor(1e-9))), (None, f.slope_at_infinity, None)):
        value = limit if u is not None else f.derivative(torch.tensor(1e9))
        assert value > 15 if least == inf else abs(value - least) < 1e-3


@every
def test_the_critic_stays_in_the_domain_and_is_best_at_the_log_ratio(f):
    v = torch.linspace(-20, 20, 81)
    assert (f.critic(v) <= f.domain[1]).all()
    torch.testing.assert_close(f.conjugate_of_critic(v), f.conjugate(f.critic(v)), rtol=1e-5, atol=1e-6)
    if isinstance(f, TotalVariation):
        return
    v = torch.linspace(-1.5, 1.5, 13).requires_grad_()
    ratio = f.log_ratio(v).exp()
    # of E_p T - E_q f*(T) at q = 1, p = ratio: no slope there
    slope = torch.autograd.grad((ratio.detach() * f.critic(v) - f.conjugate_of_critic(v)).sum(), v)[0]
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
    if f is not OWN_JAGGED:
        torch.testing.assert_close((ratio * f.critic(v) - f.conjugate_of_critic(v)), f(ratio))


@every
def test_the_critic_is_stable_far_out_and_in_single_precision(f):
    v = torch.tensor([-20.0, -5.0, 0.0, 5.0, 20.0], dtype=torch.float32).requires_grad_()
    for value in (f.critic(v), f.conjugate_of_critic(v)):
        (slope,) = torch.autograd.grad(value.sum(), v)
        assert value.dtype == torch.float32
        assert (value.isfinite() & slope.isfinite()).all()


@every
def test_the_mean_term_is_that_of_its_definition_and_right_at_the_ends(f):
    r = torch.linspace(-6, 6, 25)
    torch.testing.assert_close(f.mean_term(r), 2 * f(r.exp()) / (1 + r.exp()), rtol=1e-6, atol=1e-9)
    ends = torch.tensor([-inf, inf]).requires_grad_()
    assert f.mean_term(ends).tolist() == [2 * f.at_zero, 2 * f.slope_at_infinity]
    assert torch.autograd.grad(f.mean_term(ends).sum(), ends)[0].tolist() == [0, 0]
    assert f.mean_term(torch.tensor([torch.nan])).isnan()
    assert not f.mean_term(torch.tensor([-90.0, -300.0, 90.0, 300.0], dtype=torch.float32)).isnan().any()


def test_the_critic_of_total_variation_gives_no_ratio():
    with pytest.raises(ValueError, match=r"sign of p - q.*Use JensenShannon"):
        TotalVariation().log_ratio(torch.zeros(3))


def test_the_family_of_powers_has_the_named_as_members():
    u = torch.linspace(-3, 3, 25).exp()
    for member, named, linear in (
        (Alpha(2.0), lambda u: PearsonChiSquared()(u) / 2, 0),
        (Alpha(-1.0), lambda u: NeymanChiSquared()(u) / 2, 0),
        (Alpha(0.5), lambda u: 4 * SquaredHellinger()(u), 0),
        (Alpha(1 + 1e-7), KullbackLeibler(), -1),
        (Alpha(1e-7), ReverseKullbackLeibler(), 1),
    ):
        torch.testing.assert_close(member(u), named(u) + linear * (u - 1), rtol=1e-4, atol=1e-5)


def test_bounds_are_reached_by_disjoint_distributions():
    assert JensenShannon().at_zero + JensenShannon().slope_at_infinity == log(2)
    for f in (TotalVariation(), SquaredHellinger()):
        assert f.at_zero + f.slope_at_infinity == 1


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Alpha(1), r"alpha other than 0 and 1, but found 1\. Use KullbackLeibler"),
        (lambda: Alpha(0.0), r"found 0\.0\. Use ReverseKullbackLeibler"),
        (lambda: Alpha(inf), "found inf"),
        (lambda: Convex(lambda u: u, at_zero=0.0, slope_at_infinity=1.0), r"f\(1\) = 0, but found 1"),
        (lambda: Convex(torch.log, at_zero=-inf, slope_at_infinity=0.0), "slope never falls, but it falls at u = .*sign"),
        (lambda: Convex(lambda u: (3 * (u - 1)).sin(), at_zero=0.0, slope_at_infinity=1.0), "slope never falls"),
        (lambda: Convex(lambda u: (u - 1).sum(), at_zero=0.0, slope_at_infinity=1.0), "shape \\(\\)"),
        (lambda: Convex(lambda u: (u - 0.5).log(), at_zero=0.0, slope_at_infinity=1.0), "f\\(1\\) = 0"),
        (lambda: Convex(lambda u: (2 - u).log().neg(), at_zero=0.0, slope_at_infinity=1.0), "finite number for each"),
        (lambda: Convex(softened, at_zero=0.5, slope_at_infinity=1.0), "at_zero to be a limit, but found 0.5"),
        (lambda: Convex(softened, at_zero=1.0, slope_at_infinity=0.9), "slope_at_infinity to be a limit, but found 0.9"),
    ],
)
def test_functions_that_define_no_divergence_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()
