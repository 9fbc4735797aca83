"""Distributions: the contract over the table of cases, error messages, gradients, and distributions used directly."""

import copy
import pickle
from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, CLASSES, continuous, exact, implicit, latent, rows, scored
from pyro.distributions.transforms import AffineTransform
from pyro.infer import TraceEnum_ELBO
from torch.testing import assert_close

from pyro_genmodels import DiscretizedLogisticLikelihood
from pyro_genmodels.distributions import (
    Dequantized,
    DiscretizedLogisticMixture,
    GenerativeDistribution,
    Implicit,
    NormalizingFlow,
)
from pyro_genmodels.testing import check_distribution
from pyro_genmodels.utils.distributions import unwrap

BY_NAME = {case.name: case for case in CASES}


def family_of(case):
    """Return a fresh family that has seen data, so that standardisation counts."""
    family = case.build()
    family.standardize(case.data(64))
    return family.eval()


def one(case):
    """Return the distribution of one datum, of batch shape ()."""
    context = case.context(1)
    return family_of(case)(None if context is None else context[0])


def seeded(function, *args, seed=1):
    """Return the result under a fixed seed, so that dequantisation noise is the same twice."""
    pyro.set_rng_seed(seed)
    return function(*args)


@rows()
def test_contract(case):
    check_distribution(
        lambda context=None: family_of(case)(context), case.data, context=case.context if case.conditional else None
    )


@rows()
def test_flags_of_the_row_hold(case):
    d = one(case)
    assert isinstance(d, GenerativeDistribution)
    assert d.event_shape == case.event_shape
    assert d.density == case.density
    assert d.has_rsample == case.has_rsample
    assert d.support.is_discrete == case.discrete
    assert type(d).__name__ in repr(d)


# Errors say what is missing and what to use.


@rows(lambda case: not case.has_rsample)
def test_rows_without_rsample_say_so(case):
    d = one(case)
    assert not d.has_rsample
    with pytest.raises(NotImplementedError, match=r"reparametrised samples .*sample\(\)"):
        d.rsample()


@rows(implicit)
def test_implicit_rows_have_no_log_prob_and_say_what_to_use(case):
    d = one(case)
    assert d.density == "none"
    advice = r"no density.*vae\.model.*log_likelihood" if latent(case) else "no density.*Adversarial.*mmd_test"
    with pytest.raises(NotImplementedError, match=advice):
        d.log_prob(d.sample())


@rows()
@pytest.mark.parametrize("moment", ["mean", "variance"])
def test_moments_without_closed_form_are_refused_by_name(case, moment):
    with pytest.raises(NotImplementedError, match=f"no closed-form {moment}.*sample"):
        getattr(one(case), moment)


@rows()
def test_ours_is_found_inside_every_wrapper(case):
    d = one(case).expand((4,))
    wrapped = d.mask(torch.ones(4, dtype=torch.bool)).to_event(1).mask(False)
    assert unwrap(wrapped) is d
    assert unwrap(unwrap(wrapped)) is d
    assert unwrap(dist.Normal(torch.zeros(3), 1.0).to_event(1).expand((2,))).event_shape == ()
    assert isinstance(unwrap(wrapped.expand((2,))), type(d))


@rows(continuous)
def test_integers_and_nan_are_refused_by_a_density_over_the_reals(case):
    d, x = one(case), case.data(4)
    with pytest.raises(ValueError, match=r"real numbers.*int64.*float"):
        d.log_prob(torch.zeros(4, *case.event_shape, dtype=torch.long))
    x[1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        d.log_prob(x)


# In a Pyro model.


@rows(lambda case: case.labelled and exact(case))
@pytest.mark.parametrize("local", [True, False])
def test_labels_may_be_enumerated_upstream(case, local):
    family, x = family_of(case), case.data(5)
    weights = torch.tensor([0.2, 0.5, 0.3])

    def model():
        if not local:
            y = pyro.sample("y", dist.Categorical(weights), infer={"enumerate": "parallel"})
        with pyro.plate("data", 5):
            if local:
                y = pyro.sample("y", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", family(y), obs=x)

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)
    joint = family(torch.arange(CLASSES).unsqueeze(1)).log_prob(x)
    summed = joint if local else joint.sum(1, keepdim=True)
    exact_sum = (weights.log().unsqueeze(1) + summed).logsumexp(0).sum()
    assert loss == pytest.approx(-exact_sum.item(), rel=1e-4)


# The density and its gradients.


@rows(lambda case: continuous(case) and not case.learned_score)
def test_score_is_the_gradient_by_finite_differences(case, float64):
    d, x = family_of(case)(case.context(3)), case.data(3)
    score = d.score(x)
    assert score.shape == x.shape
    flat = x.reshape(3, -1)
    for i in range(flat.shape[1]):
        step = torch.zeros_like(flat)
        step[:, i] = 1e-6
        up, down = ((flat + s).reshape(x.shape) for s in (step, -step))
        slope = (d.log_prob(up) - d.log_prob(down)) / 2e-6
        assert_close(score.reshape(3, -1)[:, i], slope, rtol=1e-4, atol=1e-5)


@rows(lambda case: case.discrete or implicit(case))
def test_score_where_there_is_none_is_refused_by_name(case):
    with pytest.raises((NotImplementedError, ValueError), match=r"over integers, which has no score|no density"):
        one(case).score(case.data(2))


@rows(lambda case: scored(case) and case.smooth)
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_log_prob_in_the_parameters_by_finite_differences(case, training, float64):
    family, x, context = family_of(case).train(training), case.data(4), case.context(4)
    parameters = list(family.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def at(step):
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p.add_(step * v)
        return seeded(family(context).unnormalized_log_prob, x).sum()

    slope = (at(1e-6) - at(-2e-6)).detach() / 2e-6
    grads = torch.autograd.grad(at(1e-6), parameters, allow_unused=True)
    assert_close(
        sum((g * v).sum() for g, v in zip(grads, direction, strict=True) if g is not None), slope, rtol=1e-4, atol=1e-4
    )


def flow_of(d):
    return d.base if isinstance(d, Dequantized) else d


@rows(lambda case: case.tolerance is not None)
def test_a_flow_inverts_within_its_tolerance(case):
    family, context, n = family_of(case), case.context(200), 200
    whole, x = family(context), case.data(n)
    d, x = flow_of(whole), whole.dequantize(x)[1] if isinstance(whole, Dequantized) else x  # integers alone are never given
    y = x if d.pretransform is None else d.pretransform(x.to(torch.get_default_dtype()))
    with torch.no_grad():
        transform = d.transform(d.context)
        y = y.flatten(1)
        error = (transform.inv(transform(y)) - y).abs().max()
    assert error < case.tolerance


@rows(lambda case: case.tolerance is not None and case.has_rsample)
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_a_draw_keeps_its_base_coordinates_fixed(case, training, float64):
    family = family_of(case).train(training)
    d = family(None if case.context(1) is None else case.context(1)[0])
    parameters = [p for p in family.transform.parameters() if p.requires_grad]

    def gradient(x):
        y = x if d.pretransform is None else d.pretransform(x)
        u = d.transform(d.context if d.context is None else d.context.expand(20, -1))(y.flatten(1))
        grads = torch.autograd.grad((u * weight).sum(), parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    weight = torch.randn(20, d.event_shape.numel())
    x = d.rsample((20,))
    total, partial = gradient(x), gradient(x.detach())
    assert total.norm() < (3e-2 if case.bisection else 1e-6) * partial.norm()


# Used directly.


def test_dequantized_draws_fresh_noise_at_every_call():
    case = BY_NAME["Flow, dequantized"]
    d, x = one(case), case.data(4)
    assert (d.log_prob(x) != d.log_prob(x)).all()


def test_dequantized_log_prob_bounds_the_mass_from_below():
    base = dist.Normal(torch.tensor([1.0, 2.5]), torch.tensor([0.8, 1.3])).to_event(1)
    d = Dequantized(base, levels=4)
    x = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    cdf = dist.Normal(torch.tensor([1.0, 2.5]), torch.tensor([0.8, 1.3])).cdf
    mass = (cdf(x + 1.0) - cdf(x.float())).prod(-1)
    draws = d.log_prob(x.expand(20_000, 16, 2))
    error = draws.std(0) / 20_000**0.5
    assert (draws.mean(0) < mass.log() + 5 * error).all()
    # 16 two-sided tests at 5.5 standard errors: 6e-7
    spread = draws.exp().std(0) / 20_000**0.5
    assert ((draws.exp().mean(0) - mass).abs() < 5.5 * spread).all()


def test_dequantized_uniform_is_exact():
    d = Dequantized(dist.Uniform(torch.zeros(2), 4.0).to_event(1), levels=4)
    x = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    assert_close(d.log_prob(x), torch.full((16,), -2 * log(4)))
    draws = d.sample((4000,))
    assert draws.dtype == torch.long
    # 8 counts of Binomial(4000, 1/4), each within 5.5 standard deviations: 8 * 4e-8
    counts = torch.stack([(draws == level).sum(0) for level in range(4)]).double()
    assert ((counts - 1000).abs() < 5.5 * 750**0.5).all()


def test_dequantized_accepts_a_batched_base_and_float_levels():
    d = Dequantized(dist.Normal(torch.zeros(5, 2), 3.0).to_event(1), levels=4)
    assert d.batch_shape == (5,)
    assert d.sample((3,)).shape == (3, 5, 2)
    assert d.expand((2, 5)).sample((3,)).shape == (3, 2, 5, 2)
    x = torch.randint(4, (5, 2))
    assert_close(seeded(d.log_prob, x), seeded(d.log_prob, x.float()))


@pytest.mark.parametrize("bad", [1, True, 2.5, "4", None])
def test_dequantized_wants_two_levels_of_a_distribution(bad):
    with pytest.raises(ValueError, match="an integer levels of 2 or more, but found"):
        Dequantized(dist.Normal(torch.zeros(2), 1.0).to_event(1), levels=bad)
    with pytest.raises(TypeError, match="wants a distribution as its base, but found 3"):
        Dequantized(3, levels=4)


def mixture(levels=7, batch=(), components=3):
    return DiscretizedLogisticMixture(
        torch.randn(*batch, components),
        levels * torch.rand(*batch, components),
        torch.rand(*batch, components) + 0.1,
        levels,
    )


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_discretized_masses_sum_to_one(levels, float64):
    d = mixture(levels, (6,))
    assert_close(d.log_prob(torch.arange(levels).unsqueeze(1)).logsumexp(0), torch.zeros(6), atol=1e-12, rtol=0)


@pytest.mark.parametrize("loc", [-1e4, -60.0, 3.0, 70.0, 1e4])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_discretized_tails_are_finite_with_finite_gradients_and_sum_to_one(loc, scale):
    parameters = [torch.zeros(2), torch.tensor([loc, loc + 1]), torch.tensor([scale, 2 * scale])]
    for parameter in parameters:
        parameter.requires_grad_()
    log_p = DiscretizedLogisticMixture(*parameters, levels=8).log_prob(torch.arange(8))
    assert log_p.isfinite().all()
    assert log_p.logsumexp(0).item() == pytest.approx(0, abs=1e-5)
    for row in log_p:
        grads = torch.autograd.grad(row, parameters, retain_graph=True)
        assert all(g.isfinite().all() for g in grads)


def test_discretized_log_prob_is_the_difference_of_the_cdf(float64):
    d = mixture(7)
    edges = torch.arange(8).unsqueeze(1) - 0.5
    cdf = ((edges - d.loc) / d.scale).sigmoid()
    cdf[0], cdf[-1] = 0, 1
    mass = (cdf.diff(dim=0) * d.logits.softmax(-1)).sum(-1)
    assert_close(d.log_prob(torch.arange(7)).exp(), mass)


def test_discretized_moments_meet_enumeration(float64):
    d = mixture(7, (4,))
    values = d.enumerate_support()
    assert values.shape == (7, 4)
    assert d.enumerate_support(expand=False).shape == (7, 1)
    p = d.log_prob(values).exp()
    mean = (p * values).sum(0)
    assert_close(d.mean, mean)
    assert_close(d.variance, (p * values**2).sum(0) - mean**2)


def test_discretized_draws_have_the_stated_frequencies():
    d, n = mixture(5), 20_000
    draws = d.sample((n,))
    assert draws.dtype == torch.long
    p = d.log_prob(torch.arange(5)).exp()
    counts = torch.bincount(draws, minlength=5)
    # 5 counts, each within 5.5 standard deviations (and 2 for the discreteness): 5 * 4e-8
    assert ((counts - n * p).abs() < 5.5 * (n * p * (1 - p)).sqrt() + 2).all()


def test_discretized_draws_and_expands_over_batches():
    d = mixture(5, (4,))
    e = d.expand((3, 4))
    assert type(e) is type(d)
    assert e.sample((2,)).shape == (2, 3, 4)
    assert e.support.check(e.sample((100,))).all()
    x = torch.randint(5, (3, 4))
    assert_close(e.log_prob(x), d.log_prob(x))
    assert_close(pickle.loads(pickle.dumps(d)).log_prob(x), d.log_prob(x))
    assert_close(copy.deepcopy(d).log_prob(x), d.log_prob(x))


def test_discretized_refuses_what_is_no_level_and_no_scale():
    d = mixture(5)
    for bad in (torch.tensor(5), torch.tensor(-1), torch.tensor(1.5)):
        with pytest.raises(ValueError, match="support"):
            d.log_prob(bad)
    with pytest.raises(ValueError, match="scale"):
        DiscretizedLogisticMixture(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, -1.0]), 5)
    with pytest.raises(ValueError, match="an integer levels of 2 or more"):
        mixture(1)


def test_discretized_is_enumerated_by_pyro():
    d = mixture(4)

    def model():
        k = pyro.sample("k", d, infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(k.float(), 1.0), obs=torch.tensor(1.3))

    k = torch.arange(4)
    evidence = (d.log_prob(k) + dist.Normal(k.float(), 1.0).log_prob(torch.tensor(1.3))).logsumexp(0)
    assert TraceEnum_ELBO(max_plate_nesting=0).loss(model, lambda: None) == pytest.approx(-evidence.item(), rel=1e-5)


def test_the_likelihood_choice_keeps_the_extremes_finite():
    likelihood = DiscretizedLogisticLikelihood(256)
    params = torch.tensor([-1e3, -10.0, 0.0, 10.0, 1e3]).unsqueeze(1).expand(5, likelihood.num_outputs).clone().requires_grad_()
    log_p = likelihood(params).log_prob(torch.tensor([[0], [128], [255]]))
    log_p.sum().backward()
    assert log_p.isfinite().all()
    assert params.grad.isfinite().all()


def test_a_flow_over_a_plain_affine_transform_is_a_normal():
    d = NormalizingFlow(lambda context: AffineTransform(-1.0, 0.5, event_dim=1), dist.Normal(0.0, 1.0), (3,))
    x = torch.randn(5, 3)
    assert_close(d.log_prob(x), dist.Normal(2.0, 2.0).log_prob(x).sum(-1))
    draws = d.sample((4000,))
    # 3 means and 3 deviations, each within 5.5 standard errors: 2.4e-7
    assert ((draws.mean(0) - 2).abs() < 5.5 * 2 / 4000**0.5).all()
    assert ((draws.std(0) - 2).abs() < 5.5 * 2 / 8000**0.5).all()


def test_a_flow_in_context_shifts_each_row():
    def shift(context):
        return AffineTransform(-context, 1.0, event_dim=1)

    context = torch.randn(4, 1, 2)
    d = NormalizingFlow(shift, dist.Normal(torch.zeros(2), torch.ones(2)), (2,), context=context)
    x = torch.randn(3, 2)
    assert_close(d.log_prob(x), dist.Normal(context, 1.0).to_event(1).log_prob(x))


def test_a_draw_of_a_flow_carries_the_gradient_of_its_base():
    loc = torch.zeros(3, requires_grad=True)
    d = NormalizingFlow(lambda context: AffineTransform(0.0, 0.5, event_dim=1), dist.Normal(loc, 1.0), (3,))
    d.rsample((4,)).sum().backward()
    assert_close(loc.grad, torch.full((3,), 8.0))


def test_implicit_draws_through_its_latent():
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    d = Implicit(prior, lambda z, c: dist.Normal(z + c, 1e-3).to_event(1), (2,), context=torch.ones(4, 2), reparametrised=True)
    assert d.batch_shape == (4,)
    x = d.sample((1000,))
    assert x.shape == (1000, 4, 2)
    # 8 means within 5.5 standard errors: 3.2e-7
    assert ((x.mean(0) - 1).abs() < 5.5 / 1000**0.5).all()
    assert d.has_rsample
    with pytest.raises(NotImplementedError, match="samples but no density"):
        d.log_prob(x)


def test_implicit_without_gradients_refuses_rsample():
    d = Implicit(dist.Normal(0.0, 1.0), lambda z, c: dist.Poisson(z.exp()), ())
    assert not d.has_rsample
    with pytest.raises(NotImplementedError, match="rsample"):
        d.rsample()
