"""Pairs of distributions for which torch, or its precision, has another answer than the right one.

A mean over samples is within six of its errors, with a rate of false alarms of 2e-9.
"""

from math import exp, inf, log

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineTransform
from torch import tensor
from torch.distributions import AbsTransform

from pyro_genmodels.divergences import PearsonChiSquared, SquaredHellinger, f_divergence, fisher, js, kl, tv
from pyro_genmodels.divergences.log_probabilities import log_prob_of


def within(found, truth):
    return abs(found.value.item() - truth) <= 6 * found.std_error.item() + 1e-6 * abs(truth)


def integral(log_p, log_q, low, high, n=400_001):
    """KL by the rule of midpoints, in doubles."""
    x = torch.linspace(low, high, n, dtype=torch.float64)
    x = (x[1:] + x[:-1]) / 2
    return float((log_p(x).exp() * (log_p(x) - log_q(x))).mean() * (high - low))


def folded(loc):
    normal = dist.Normal(tensor(loc).double(), 1.0)
    return lambda x: torch.logaddexp(normal.log_prob(x), normal.log_prob(-x))


# Transforms that are not one to one, and other errors of closed forms.


def test_folded_normals_are_not_their_bases():
    """KL of |N(3, 1)| and |N(-3, 1)|, which are the same, was 18 "in closed form", and of |N(1, 1)| and |N(0, 1)| 0.5."""
    fold = dist.FoldedDistribution
    assert within(kl(fold(dist.Normal(3.0, 1.0)), fold(dist.Normal(-3.0, 1.0))), 0)
    truth = integral(folded(1.0), folded(0.0), 0.0, 12.0)
    assert truth == pytest.approx(0.1632, abs=1e-4)
    one = fold(dist.Normal(1.0, 1.0))
    assert within(kl(one, dist.HalfNormal(1.0)), truth)
    moved = [dist.TransformedDistribution(base, [AffineTransform(1.0, 2.0)]) for base in (one, fold(dist.Normal(0.0, 1.0)))]
    assert within(kl(*moved), truth)
    assert kl(dist.HalfCauchy(1.0), dist.HalfCauchy(2.0)) == kl(dist.Cauchy(0.0, 1.0), dist.Cauchy(0.0, 2.0))
    with pytest.raises(
        ValueError, match=r"p is or holds a TransformedDistribution .* not one to one.*Use dist.FoldedDistribution"
    ):
        kl(dist.TransformedDistribution(dist.Normal(1.0, 1.0), [AbsTransform()]), one)


def test_continuous_bernoullis_and_uniforms():
    """Both were infinite."""
    p, q = dist.ContinuousBernoulli(tensor(0.3).double()), dist.Uniform(tensor(0.0).double(), 1.0)
    assert kl(p, q).value == pytest.approx(integral(p.log_prob, q.log_prob, 0, 1), rel=1e-6)
    assert kl(q, p).value == pytest.approx(integral(q.log_prob, p.log_prob, 0, 1), rel=1e-6)
    part, wide = dist.Uniform(0.2, 0.4), dist.Uniform(-1.0, 3.0)
    assert kl(part, p).value == pytest.approx(-log(0.2) - p.log_prob(tensor(0.3)).item())
    assert kl(p, wide).value == pytest.approx(kl(p, q).value.item() + log(4))
    assert kl(p, part).value == kl(wide, p).value == inf


def test_a_poisson_without_events():
    assert kl(dist.Poisson(0.0), dist.Poisson(2.0)).value == 2
    assert kl(dist.Poisson(2.0), dist.Poisson(0.0)).value == inf


def test_categoricals_of_different_numbers_of_outcomes():
    """A RuntimeError of torch."""
    p, q = dist.Categorical(tensor([0.5, 0.5])), dist.Categorical(tensor([0.5, 0.3, 0.2]))
    assert kl(p, q).value == pytest.approx(0.5 * log(0.5 / 0.3))
    assert kl(q, p).value == inf
    assert kl(q, dist.Categorical(tensor([0.5, 0.5, 0.0]))).value == inf
    assert tv(p, q).value == pytest.approx(0.2)
    assert tv(q, p).value == pytest.approx(0.2)
    few, more = dist.Binomial(2, 0.5), dist.Binomial(3, 0.5)
    weights = ((1, 1 / 8), (2, 3 / 8), (1, 3 / 8))
    assert kl(few, more).value == pytest.approx(sum(n / 4 * log(n / 4 / share) for n, share in weights))
    assert kl(p.expand((3,)), q).value.shape == (3,)


# Impossible outcomes.

MULTI = dist.Multinomial(5, tensor([0.5, 0.5]))
IMPOSSIBLE = {
    "multinomials": (MULTI, dist.Multinomial(5, tensor([1.0, 0.0]))),
    "logits": (MULTI, dist.Multinomial(5, logits=tensor([0.0, -inf]))),
    "of a Dirichlet": (dist.DirichletMultinomial(tensor([1.0, 1.0]), 5), dist.Multinomial(5, tensor([1.0, 0.0]))),
    "a mixture": (MULTI, dist.MixtureSameFamily(dist.Categorical(tensor([0.5, 0.5])),
                                                dist.Multinomial(5, tensor([[1.0, 0.0], [1.0, 0.0]])))),
    "negative binomials": (dist.NegativeBinomial(3, probs=0.5), dist.NegativeBinomial(3, probs=0.0)),
    "its logits": (dist.NegativeBinomial(3, probs=0.5), dist.NegativeBinomial(3, logits=tensor(-inf))),
}  # fmt: skip


@pytest.mark.parametrize("pair", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_outcomes_are_impossible(pair):
    """KL was 36.6 and 43.7, and Pearson's 3.9e31."""
    p, q = pair
    assert kl(p, q) == (inf, 0)
    assert f_divergence(p, q, PearsonChiSquared()) == (inf, 0)
    assert js(q, q).value == 0
    assert js(p, q).value < log(2)


def test_possible_outcomes_have_the_probabilities_of_torch():
    odds = {"probs": tensor(0.3)}, {"logits": tensor(0.3)}
    pairs = (fn for how in odds for fn in (dist.NegativeBinomial(2.5, **how), dist.Binomial(5, **how)))
    for fn in (MULTI, dist.Multinomial(5, logits=tensor([0.3, -1.0, 2.0])), *pairs):
        x = fn.sample((50,))
        torch.testing.assert_close(log_prob_of(fn, x), fn.log_prob(x))


# Units and precision.


@pytest.mark.parametrize("unit", [1e-25, 1e-22, 1e25])
def test_units_make_no_difference(unit):
    """Squared Hellinger was -inf at 1e-25 and 0.0358 at 1e-22; Jensen-Shannon and Fisher blamed the parameters."""
    s = tensor(unit)
    p, q = dist.Normal(0.0, s), dist.Normal(0.5 * s, 1.2 * s)
    hellinger = 1 - (2.4 / 2.44) ** 0.5 * exp(-0.25 / (4 * 2.44))
    assert f_divergence(p, q, SquaredHellinger()).value == pytest.approx(hellinger, rel=1e-5)
    assert f_divergence(p, q, PearsonChiSquared()).value == pytest.approx(0.1996, abs=1e-4)
    assert within(js(p, q), js(dist.Normal(0.0, 1.0), dist.Normal(0.5, 1.2), num_samples=1_000_000).value.item())
    one, other = (
        dist.MultivariateNormal(m * s * torch.ones(2), scale_tril=w * s * torch.eye(2)) for m, w in ((0, 1), (0.5, 1.2))
    )
    found = f_divergence(one, other, SquaredHellinger()).value
    assert found == pytest.approx(1 - (1 - hellinger) ** 2, rel=1e-5)
    with pytest.raises(ValueError, match=r"fisher returns inverse squared units.*torch.float32 does not hold \d"):
        fisher(p, q)
    truth = (1 - 1 / 1.44) ** 2 + (0.5 / 1.44) ** 2
    s = s.double()
    doubles = fisher(dist.Normal(0.0 * s, s), dist.Normal(0.5 * s, 1.2 * s))
    assert abs(doubles.value * s**2 - truth) < 6 * doubles.std_error * s**2


def test_draws_at_the_end_of_a_support():
    """Those of Gamma(0.02) were rounded in single precision: 1319 +- 14. Of others they are also in doubles."""
    p = dist.Gamma(0.02, 1.0)
    x = torch.linspace(-3000, 6, 2_000_001, dtype=torch.float64)
    mean_square = 50**2 * 1.0 + 2.0  # rough: log x is nearly minus an exponential of mean 50
    found = kl(p, dist.LogNormal(0.0, 1.0))
    gamma = 0.02 * x - x.exp() - torch.lgamma(tensor(0.02).double())  # the density of log x
    terms = gamma.exp() * (gamma + x.square() / 2 + log(2 * torch.pi) / 2)
    truth = float(terms.mean() * 3006)
    assert truth == pytest.approx(mean_square, rel=0.05)
    assert within(found, truth)
    for a, b in ((dist.Beta(0.1, 0.1), dist.Beta(0.1, 0.2)), (dist.Gamma(0.001, 1.0), dist.Gamma(0.002, 1.0)),
                 (dist.Dirichlet(torch.full((3,), 1e-4)), dist.Dirichlet(torch.ones(3)))):  # fmt: skip
        with pytest.raises(
            ValueError, match=r"f_divergence wants draws inside .* \d+.\d% of those of \w+ are rounded to its end"
        ):
            js(a, b)
    assert js(dist.Beta(0.3, 0.3), dist.Beta(0.5, 0.3)).reliable


@pytest.mark.parametrize("validate", [True, False])
def test_supports_of_transformed_distributions(validate):
    """KL of these exponentials was -5 "exactly"; JS of these uniforms raised torch's error."""

    def moved(base, *by):
        return dist.TransformedDistribution(base, [AffineTransform(*by)], validate_args=validate)

    one = dist.Exponential(1.0, validate_args=validate)
    assert kl(one, moved(one, 5.0, 1.0)) == (inf, 0)
    assert within(kl(moved(one, 5.0, 1.0), one), 5)
    unit = dist.Uniform(0.0, 1.0, validate_args=validate)
    assert within(js(unit, moved(unit, 0.5, 1.0)), log(2) / 2)
    pairs = [fn.expand((2,)).to_event(1) for fn in (unit, moved(unit, 0.5, 1.0))]
    assert within(tv(*pairs), 0.75)
    assert fisher(one, moved(one, 5.0, 1.0)).value == inf
    point = dist.Delta(tensor(4.0))
    assert kl(point, moved(dist.Poisson(1.0, validate_args=validate), 5.0, 1.0)).value == inf


def test_rounding_raises_no_alarm():
    """Two forms of one normal far from zero: 4e-10 was called unreliable, with a k-hat of inf."""
    for seed in range(5):
        torch.manual_seed(seed)
        p, q = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [AffineTransform(1e6, 2.0)]), dist.Normal(1e6, 2.0)
        for found in (kl(p, q), f_divergence(p, q, PearsonChiSquared())):
            assert found.reliable
            assert abs(found.value) < 1e-9
