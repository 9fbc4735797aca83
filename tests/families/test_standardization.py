"""Standardisation of data and contexts in any unit and precision; constants, outliers, lost spreads; a forgotten one."""

import copy
import pickle
import warnings
from math import log, pi, sqrt

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import SMALL, rows
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from teachers import perturb
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from pyro_genmodels import (
    GAN,
    MAF,
    NSF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    Diffusion,
    EnergyModel,
    Flow,
    Labels,
    MaximumLikelihood,
    ODEFlow,
    train,
)

SINGLE = torch.float32


def normal(event_shape=(1,), **options):
    """Return a flow whose weights are zero: the normal distribution with mean and deviation of the data."""
    flow = Flow(event_shape, transform=MAF(**SMALL), **options)
    with torch.no_grad():
        for p in flow.parameters():
            p.zero_()
    return flow


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*args)


# Units and offsets.

UNITS = {
    "nanometres": (5e-7, 1e-8, SINGLE),
    "years": (2005.0, 9.0, SINGLE),
    "years in float64": (2005.0, 9.0, torch.float64),
    "far below 1": (0.0, 1e-30, SINGLE),
    "far above 1": (0.0, 1e30, SINGLE),
    "whose squares overflow": (3e25, 1e25, SINGLE),
    "whose squares vanish": (3e-25, 1e-25, torch.float64),
    "half precision": (1.0, 0.5, torch.float16),
}


@pytest.mark.parametrize("name", UNITS)
def test_data_in_any_unit_have_the_density_and_draws_of_their_law(name):
    """Mean and deviation are compared with those in float64; draws within 5.5 standard errors: 1e-7 for each of two."""
    loc, scale, dtype = UNITS[name]
    x = (loc + scale * torch.randn(1000, 1, dtype=torch.float64)).to(dtype)
    flow = normal()
    flow.standardize(x)
    mean, deviation = x.double().mean(), x.double().std()
    log_p = flow().log_prob(x)
    wanted = -0.5 * ((x.double() - mean) / deviation).square() - deviation.log() - 0.5 * log(2 * pi)
    assert log_p.dtype == SINGLE
    assert_close(log_p, wanted.float().squeeze(1), rtol=2e-5, atol=2e-3)
    draws = (flow().sample((2000,)).double() - mean) / deviation
    assert draws.dtype == torch.float64
    assert abs(draws.mean()) < 5.5 / sqrt(2000)
    assert abs(draws.var() - 1) < 5.5 * sqrt(2 / 2000)


def test_unix_times_in_float64_have_their_density_in_a_family_of_float32_and_it_says_that_draws_are_coarse():
    """It was -494,332 nats."""
    x = 1.7e9 + 1000 * torch.randn(1000, 1, dtype=torch.float64)
    flow = normal()
    with pytest.warns(UserWarning, match=r"numbers of torch.float32 are 1.3e\+02 apart, but the deviation is.*family.double"):
        flow.standardize(x)
    assert flow().log_prob(x).mean().item() == pytest.approx(-log(1000) - 0.5 * log(2 * pi * np.e), abs=0.1)  # -8.33
    double = normal().double()
    double.standardize(x)
    assert_close(double().log_prob(x).mean(), -x.std().log() - 0.5 * log(2 * pi) - 0.5 * 0.999)
    assert_close(double.loc, x.mean(0))


@rows(lambda case: case.density in ("exact", "unnormalized") and not case.discrete)
def test_the_unit_and_precision_of_the_data_count_as_they_should(case):
    """Log densities in another unit differ by the logarithm of the unit, once for each coordinate."""
    family, batch = perturb(case.build(), 0.1).eval(), case.batch(20)
    if case.event_shape == () or not isinstance(family.support, type(constraints.real)) or not family._standardize:
        return
    x, contexts = batch[0], batch[1:]
    twin = copy.deepcopy(family)
    family.standardize(x)
    twin.standardize(4 + 1e-2 * x.double())
    with torch.no_grad():
        pyro.set_rng_seed(0)
        wanted = family(*contexts).log_prob(x) - x[0].numel() * log(1e-2)
        pyro.set_rng_seed(0)
        found = twin(*contexts).log_prob(4 + 1e-2 * x.double())
    assert found.dtype == SINGLE
    assert_close(found, wanted, atol=2e-2, rtol=2e-3)


def test_what_the_precision_cannot_hold_is_refused():
    for scale, dtype in ((1e-40, SINGLE), (1e-100, torch.float64), (1e100, torch.float64)):
        with pytest.raises(ValueError, match=r"computes in torch.float32.*but was given data with mean.*Use another unit"):
            Flow((1,)).standardize(scale * torch.randn(50, 1, dtype=dtype))
    double = normal().double()
    x = 1e200 * torch.randn(50, 1, dtype=torch.float64)
    double.standardize(x)
    assert double().log_prob(x).isfinite().all()
    with pytest.raises(ValueError, match=r"numbers up to 3.4e\+38, but was given data of torch.float64 up to"):
        Flow((1,), standardize=False).model(x)


def test_wrong_data_are_refused_before_they_set_anything():
    for wrong, words in (
        (torch.tensor([[0.0], [torch.nan]]), "NaN"),
        (torch.zeros(3, 2), "shape"),
        (torch.zeros(0, 1), "no rows"),
    ):
        flow = Flow((1,))
        with pytest.raises(ValueError, match=words):
            flow.standardize(wrong)
        assert not flow.standardized
        assert flow.loc.equal(torch.zeros(1))


def test_contexts_that_do_not_go_with_the_family_or_the_rows_are_refused():
    x = torch.randn(5, 1)
    for family, contexts, words in (
        (Flow((1,)), torch.randn(5, 1), "built without a context"),
        (Flow((1,), context=1), torch.randn(4, 1), "5 rows of x but 4 of context"),
        (Flow((1,), context=1), torch.full((5, 1), torch.nan), "NaN or infinite"),
        (Flow((1,), context=1), torch.ones(5, 1, dtype=torch.long), r"context of floats.*\.float\(\)"),
    ):
        with pytest.raises(ValueError, match=words):
            family.standardize(x, contexts)


# Constant coordinates.

CONSTANT = r"of which the coordinate 1 is constant in all 50 rows.*Drop them, add noise, or model integers"


@pytest.mark.parametrize("constant", [0.0, 0.1, 3e-7, 2e9], ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, torch.float64])
def test_a_constant_coordinate_is_named_and_divided_by_its_size(constant, dtype):
    """Also if it differs by rounding errors, as sums in another order do."""
    x = torch.randn(50, 2, dtype=dtype)
    x[:, 1] = constant * (1 + torch.finfo(dtype).eps * torch.randint(2, (50,)))
    flow = Flow((2,), transform=MAF(**SMALL))
    with pytest.warns(UserWarning, match=CONSTANT):
        flow.standardize(x)
    assert flow.scale[1].item() == pytest.approx(constant or 1.0)
    assert flow.pretransform(x)[:, 1].abs().max() < 1e-6


@pytest.mark.parametrize("share", [1e-6, 1e-3])
def test_a_coordinate_that_varies_little_is_not_constant(share):
    x = 1 + share * torch.randn(50, 1)
    flow = Flow((1,), transform=MAF(**SMALL))
    quietly(flow.standardize, x)
    assert_close(flow.scale, x.double().std(0).float(), rtol=1e-5, atol=0)


def test_train_and_the_model_tell_of_a_constant_coordinate_once():
    x = torch.randn(50, 2)
    x[:, 1] = 3.0
    flow = Flow((2,), transform=MAF(**SMALL))
    with pytest.warns(UserWarning, match=CONSTANT) as told:
        train(flow, x, epochs=2, progress=False)
    assert len(told) == 1
    flow = Flow((2,), transform=MAF(**SMALL))
    svi = SVI(flow.model, flow.guide, Adam({"lr": 0.01}), MaximumLikelihood())
    with pytest.warns(UserWarning, match=CONSTANT):
        svi.step(x)
    svi.step(x)


def test_jointly_standardised_constants_are_told_where_a_density_is_trained():
    x = torch.rand(50, 2, 2)
    x[:, 0] = 0.0
    with pytest.warns(UserWarning, match=r"the coordinates \(0, 0\), \(0, 1\) are constant"):
        Flow((2, 2), transform=MAF(**SMALL), standardize="jointly").standardize(x)
    for build in (Diffusion, GAN):
        build((2, 2), standardize="jointly").standardize(x)  # their losses do not fall for ever
        with pytest.warns(UserWarning, match="constant"):
            build((2, 2), standardize="jointly").standardize(x * 0)
    Flow((2, 2), levels=5).standardize(torch.zeros(50, 2, 2, dtype=torch.long))  # noise is added to levels


# Outliers, and robust standardisation.


def degenerate(n=300):
    x = torch.randn(n, 3)
    return {
        "copy": (torch.cat([x, x[:, :1]], 1), "coordinates 0, 3 are combinations"),
        "sum": (1e4 * torch.cat([x[:, :1], x, x[:, :1] + x[:, 1:2]], 1)[:, 1:], "coordinates 0, 1, 3 are combinations"),
        "shares": (100 * x.softmax(1), "data that are combinations"),
        "mostly 0": (torch.where(torch.rand(n, 3) < 0.93, 0.0, x), "one value in many rows, such as 0 in 9.% of them"),
        "0 and 1": (torch.cat([x, (x[:, :1] > 0).float()], 1), "coordinate 3 is one value in many rows"),
    }


@pytest.mark.parametrize("name", degenerate())
def test_atoms_and_combinations_are_told_where_a_density_is_trained(name):
    """The loss of 60 epochs of a RealNVP fell for ever in silence: with a copy from 3.11 to -.61."""
    x, words = degenerate()[name]
    with pytest.warns(UserWarning, match=f"{words}.*the loss falls for ever") as told:
        Flow(x.shape[1:], transform=MAF(**SMALL)).standardize(x)
    assert len(told) == 1
    Flow(x.shape[1:], transform=MAF(**SMALL), standardize="jointly").standardize(x)
    GAN(x.shape[1:]).standardize(x)
    Diffusion(x.shape[1:]).standardize(x)
    Flow((1,), context=x.shape[1], transform=MAF(**SMALL)).standardize(torch.randn(len(x), 1), x)


def test_correlated_rounded_and_few_data_are_no_combinations():
    x = torch.randn(300, 3)
    near = x[:, :1] + 1e-4 * torch.randn(300, 1)
    for data in (torch.cat([x, near], 1), (10 * x).round() / 10, x[:5, [0, 1, 0]], x * torch.tensor([1e-20, 1.0, 1e20])):
        Flow(data.shape[1:], transform=MAF(**SMALL)).standardize(data)
    Flow((3,), levels=2, transform=MAF(**SMALL)).standardize(torch.randint(2, (300, 3)))


def with_outlier(size=1e4, n=2000):
    x = torch.randn(n, 1)
    x[7] = size
    return x


def test_one_far_row_is_told_and_robust_standardisation_ignores_it():
    """The deviation is 224 because of it, where that of the others is 1."""
    x, flow = with_outlier(), Flow((1,), transform=MAF(**SMALL))
    with pytest.warns(UserWarning, match=r'spread by a few far rows: without 20 of 2000 rows.*standardize="robust"'):
        flow.standardize(x)
    assert flow.scale.item() == pytest.approx(224, abs=1)
    robust = Flow((1,), transform=MAF(**SMALL), standardize="robust")
    robust.standardize(x)
    assert robust.loc.item() == pytest.approx(x.median().item(), abs=2e-3)
    assert robust.scale.item() == pytest.approx(1, abs=0.15)  # 5.5 standard errors of .024
    assert robust.scale.item() == pytest.approx(float(np.subtract(*np.quantile(x.numpy(), [0.75, 0.25]))) / 1.3489795, rel=1e-5)


@pytest.mark.parametrize("kind", ["jointly", "jointly robust"])
def test_jointly_a_far_row_is_told_and_robust_ignores_it(kind):
    x = torch.randn(500, 3, 2)
    x[3] *= 1e4
    family = Flow((3, 2), transform=MAF(**SMALL), standardize=kind)
    if "robust" not in kind:
        with pytest.warns(UserWarning, match="data that are spread by a few far rows.*jointly robust"):
            family.standardize(x)
        return
    family.standardize(x)
    assert family.loc.unique().numel() == family.scale.unique().numel() == 1
    assert family.scale[0, 0].item() == pytest.approx(1, abs=0.15)
    assert family.loc[0, 0].item() == pytest.approx(x.flatten().double().quantile(0.5).item(), abs=1e-6)


SPREADS = {
    "normal": lambda: torch.randn(5000, 1),
    "exponential": lambda: dist.Exponential(1.0).sample((5000, 1)),
    "two far modes": lambda: torch.cat([torch.randn(950, 1), 1e4 + torch.randn(50, 1)]),
    "zeros and ones": lambda: (torch.rand(2000, 1) < 0.002).float(),
    "log-normal": lambda: torch.randn(2000, 1).exp(),
    "few rows": lambda: torch.tensor([[0.0], [1e-3], [5.0], [1e9]]),
}


@pytest.mark.filterwarnings("ignore:.*one value in many rows")
@pytest.mark.parametrize("name", SPREADS)
def test_spreads_without_outliers_raise_no_warning(name):
    Flow((1,), transform=MAF(**SMALL)).standardize(SPREADS[name]())


@pytest.mark.filterwarnings("ignore:.*one value in many rows")
def test_robust_standardisation_of_a_column_with_an_atom_takes_the_distance_of_the_others():
    x = torch.where(torch.rand(5000, 1) < 0.7, 2.0, 2.0 + 5 * torch.randn(5000, 1))
    flow = Flow((1,), transform=MAF(**SMALL), standardize="robust")
    flow.standardize(x)
    assert flow.loc.item() == 2.0
    assert flow.scale.item() == pytest.approx(5, abs=1)  # 5.5 standard errors of .15


# Contexts.


@rows(lambda case: case.conditional and not case.labelled)
def test_networks_see_the_same_whatever_the_unit_of_the_contexts(case):
    family = perturb(case.build(), 0.1).eval()
    x, years = case.data(40), torch.randint(1990, 2021, (40, 2)).double()
    twin = copy.deepcopy(family)
    family.standardize(x, (years - 2005) / 9)
    twin.standardize(x, years)
    assert_close(family.context((years - 2005) / 9), twin.context(years), atol=1e-5, rtol=0)
    assert twin.context(years).std(0).allclose(torch.ones(2), atol=1e-4)
    results = []
    for one, contexts in ((family, (years - 2005) / 9), (twin, years)):
        pyro.set_rng_seed(0)
        with torch.no_grad():
            d = one(contexts)
            results.append(d.sample() if case.density == "none" else d.log_prob(x))
    assert results[0].dtype == SINGLE
    assert_close(*results, atol=1e-3, rtol=1e-3)


def test_the_critic_of_a_gan_sees_scaled_contexts():
    gan, contexts = GAN((1,), context=1), 2005 + 9 * torch.randn(100, 1)
    gan.standardize(torch.randn(100, 1), contexts)
    assert_close(gan.critic.context(contexts), gan.context(contexts))
    assert_close(gan.critic.context(contexts).std(), torch.tensor(1.0))


def test_a_prior_with_a_context_sees_scaled_contexts_and_keeps_those_it_learned():
    vae = VAE((1,), context=1, prior=Flow((2,), context=1, transform=MAF(**SMALL)), hidden=(4,))
    contexts = 2005 + 9 * torch.randn(100, 1)
    vae.standardize(torch.randn(100, 1), contexts)
    assert_close(vae.prior.context.loc, contexts.double().mean(0).float())
    vae.standardize(torch.randn(100, 1), contexts + 5)
    assert_close(vae.prior.context.loc, contexts.double().mean(0).float())


def test_a_flow_given_the_year_learns_as_from_a_scaled_year():
    """The log density was -7e8 per row; given (year - 2005) / 9 it is -.42 -+ .04 after such a training, and the truth -.22."""
    year = torch.randint(1990, 2021, (400, 1)).float()
    x = 0.5 * (year - 2005) / 9 + 0.3 * torch.randn(400, 1)
    flow = Autoregressive((1,), context=1, hidden=(32,))
    train(flow, x, context=year, epochs=25, progress=False, optim=lambda p: torch.optim.Adam(p, lr=1e-2))
    with torch.no_grad():
        assert flow(year).log_prob(x).mean() > -0.5
        assert flow(torch.tensor([2014.0])).sample((500,)).mean().item() == pytest.approx(0.5, abs=0.25)


def test_contexts_are_left_alone_on_request_and_where_they_are_labels_or_a_module_of_ones_own():
    x, contexts = torch.randn(30, 2), 5 + torch.randn(30, 1)
    flow = Flow((2,), context=1, transform=MAF(**SMALL), standardize_context=False)
    flow.standardize(x, contexts)
    assert flow.context(contexts).equal(contexts)
    own = Flow((2,), context=torch.nn.Linear(1, 3), transform=MAF(**SMALL))
    own.standardize(x, contexts)
    Flow((2,), context=Labels(3), transform=MAF(**SMALL)).standardize(x, torch.randint(3, (30,)))
    robust = Flow((2,), context=1, transform=MAF(**SMALL), standardize_context="robust")
    contexts[0] = 1e9
    robust.standardize(x, contexts)
    assert robust.context.scale.item() == pytest.approx(1, abs=0.7)
    with pytest.raises(ValueError, match='standardize_context wants True, False or "robust", but found 3'):
        Flow((2,), standardize_context=3)


def test_constant_and_far_contexts_are_told():
    x, contexts = torch.randn(200, 1), torch.randn(200, 2)
    contexts[:, 0] = 2020.0
    with pytest.warns(UserWarning, match=r"given contexts of which the coordinate 0 is constant in all 200 rows"):
        Flow((1,), context=2, transform=MAF(**SMALL)).standardize(x, contexts)
    with pytest.warns(UserWarning, match=r"given contexts that are spread by a few far rows.*standardize_context=.robust"):
        Flow((1,), context=1, transform=MAF(**SMALL)).standardize(torch.randn(2000, 1), with_outlier())


def test_contexts_are_standardised_by_the_first_that_the_model_is_given_in_training():
    flow, x, contexts = Flow((1,), context=1, transform=MAF(**SMALL)), torch.randn(30, 1), 5 + torch.randn(30, 1)
    flow.eval().model(x, contexts)
    assert flow.context.loc.item() == 0
    flow.train().model(x, contexts)
    assert_close(flow.context.loc, contexts.double().mean(0).float())
    flow.model(x, contexts + 1)
    assert_close(flow.context.loc, contexts.double().mean(0).float())


@rows(lambda case: case.conditional and not case.labelled)
def test_a_state_of_before_contexts_were_standardised_loads_as_it_was(case):
    family = perturb(case.build())
    old = {name: value for name, value in family.state_dict().items() if ".context.loc" not in f".{name}"}
    old = {name: value for name, value in old.items() if not f".{name}".endswith((".context.scale", ".context.standardized"))}
    fresh, x, contexts = case.build(), case.data(5), 1000 + torch.randn(5, 2)
    assert set(fresh.upgrade_state(old)) == set(fresh.state_dict())
    fresh.load_state_dict(old)
    assert fresh.context(contexts).equal(contexts)
    fresh.train()
    fresh.prepare(x, contexts)
    assert fresh.context(contexts).equal(contexts)  # its network knows them as they are


def test_standardised_contexts_are_saved_copied_and_moved():
    flow, contexts = Flow((1,), context=1, transform=MAF(**SMALL)), 2005 + 9 * torch.randn(30, 1)
    flow.standardize(torch.randn(30, 1), contexts)
    loaded = Flow((1,), context=1, transform=MAF(**SMALL))
    loaded.load_state_dict(flow.state_dict())
    for twin in (loaded, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert twin.context(contexts).equal(flow.context(contexts))
        assert not twin.context.due
        assert twin.double().context(contexts).dtype == torch.float64


# A forgotten standardisation.


def own_model(family, *contexts):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", family(*contexts), obs=x)

    return model


def steps(model, x, loss, guide=lambda x: None):
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss)
    return [svi.step(x) for _ in range(2)]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Flow((2,), transform=NSF(**SMALL)),
        lambda: ODEFlow((2,)),
        lambda: Diffusion((2,)),
        lambda: EnergyModel((2,), sampler=None),
        lambda: Autoregressive((2,), hidden=(8,)),
    ],
    ids=["Flow", "ODEFlow", "Diffusion", "EnergyModel", "Autoregressive"],
)
def test_a_forgotten_standardisation_in_a_model_of_ones_own_is_told_once(build):
    """The loss was 1,009,124 nats a row in silence."""
    family, x = build(), 1000 + 3 * torch.randn(6, 2)
    with pytest.warns(UserWarning, match=r"networks see data of size (1e\+03|99\d).*family.standardize\(x\)"):
        family().unnormalized_log_prob(x)
    family().unnormalized_log_prob(x)
    family = build()
    family.standardize(x)
    family().unnormalized_log_prob(x)


def test_far_contexts_in_a_model_of_ones_own_are_told():
    family, x, contexts = Flow((2,), context=1, transform=MAF(**SMALL)), torch.randn(20, 2), 2005 + 9 * torch.randn(20, 1)
    with pytest.warns(UserWarning, match=r"networks see contexts of size 2e\+03.*family.standardize\(x, context\)") as told:
        steps(own_model(family, contexts), x, MaximumLikelihood())
    assert len(told) == 1
    family = Flow((2,), context=1, transform=MAF(**SMALL))
    family.standardize(x, contexts)
    steps(own_model(family, contexts), x, MaximumLikelihood())


@pytest.mark.parametrize(
    ("size", "offset", "message"),
    [
        (0.01, 13.4, r"of size 13.4 that deviate by 0.01"),  # 190 nats a row in silence, in units of .01
        (1e-6, 0.0, r"that deviate by [\d.]+e-0[67]"),
        (1e-30, 0.0, r"that deviate by [\d.]+e-3[01]"),
        (1e-3, 1.0, r"of size 1 that deviate by 0.001"),
    ],
)
def test_inputs_of_networks_that_are_nearly_one_value_are_told(size, offset, message):
    x, narrow = torch.randn(40, 2), offset + size * torch.linspace(-1.7, 1.7, 40)[:, None]
    flow = Flow((1,), transform=MAF(**SMALL))
    with pytest.warns(UserWarning, match=f"networks see data {message}.*family.standardize\\(x\\)"):
        flow().log_prob(narrow)
    given = Flow((2,), context=1, transform=MAF(**SMALL))
    with pytest.warns(UserWarning, match=f"networks see contexts {message}.*family.standardize\\(x, context\\)"):
        given(narrow).log_prob(x)
    given.standardize(x, narrow)
    given(narrow).log_prob(x)


def test_sparse_sorted_and_standardised_inputs_are_where_they_should_be():
    rare = torch.eye(2)[[0] * 5000 + [1]]  # one-hot classes, of which one is rare
    Flow((1,), context=2, transform=MAF(**SMALL))(rare).log_prob(torch.randn(5001, 1))
    years = torch.linspace(0, 1, 3200)[:, None]
    flow = Flow((1,), context=1, transform=MAF(**SMALL))
    flow.standardize(years, years)
    flow(years[-32:]).log_prob(years[-32:])  # the first batch of sorted data deviates by .01
    pixels = 0.5 + torch.cat([0.3 * torch.randn(40, 1, 3), 1e-4 * torch.randn(40, 1, 1)], -1)  # a corner is hardly ever bright
    Flow((1, 4), transform=MAF(**SMALL), standardize="jointly")().log_prob(pixels)


def test_data_that_the_precision_cannot_centre_are_not_told_to_be_standardised():
    x = 1.7e18 + 1e3 * torch.randn(40, 1, dtype=torch.float64)
    flow = Flow((1,), transform=MAF(**SMALL))
    with pytest.warns(UserWarning, match="Draws are rounded"):
        flow.standardize(x)
    with pytest.warns(UserWarning, match="networks see data of size .*float32 cannot hold their mean") as told:
        flow().log_prob(x)
    assert "Call family.standardize" not in str(told[0].message)


def test_far_contexts_are_shifted_and_not_drawn():
    flow, contexts = Flow((1,), context=1, transform=MAF(**SMALL)), 1.7e9 + 100 * torch.randn(40, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="contexts.* apart, but the deviation is .*Networks see them shifted") as told:
        flow.standardize(torch.randn(40, 1), contexts)
    assert "Draws" not in str(told[0].message)


def test_nothing_is_told_where_networks_see_what_they_should():
    images = torch.randint(2, (20, 4)).float()
    vae = VAE((4,), likelihood=BernoulliLikelihood(), hidden=(8,))
    steps(vae.model, images, Trace_ELBO(), vae.guide)
    steps(own_model(Flow((2,), transform=MAF(**SMALL))), torch.randn(20, 2), MaximumLikelihood())
    steps(own_model(Flow((2,), transform=MAF(**SMALL), standardize=False)), 1000 + torch.randn(20, 2), MaximumLikelihood())
    evaluated = Flow((2,), transform=MAF(**SMALL)).eval()
    evaluated().log_prob(torch.full((1, 2), 1e4))  # a question about a far point


@pytest.mark.parametrize("transformed", [make_fx, torch.vmap, torch.func.grad], ids=["make_fx", "vmap", "grad"])
def test_the_check_leaves_captured_and_transformed_functions_alone(transformed):
    flow = Flow((2,), transform=MAF(**SMALL))
    x, d = 1000 + torch.randn(5, 2), flow()
    with pyro.validation_enabled(False):
        graph = transformed(lambda x: d.log_prob(x))(x[0] if transformed is torch.func.grad else x)
    if transformed is make_fx:
        assert not any("median" in str(node.target) or "_local_scalar" in str(node.target) for node in graph.graph.nodes)
    with pytest.warns(UserWarning, match="networks see data"):
        flow().log_prob(x)


def test_a_distribution_made_in_training_can_be_copied_and_pickled():
    flow, x = Flow((2,), transform=MAF(**SMALL)), torch.randn(5, 2)
    for twin in (copy.deepcopy(flow()), pickle.loads(pickle.dumps(flow()))):
        assert_close(twin.log_prob(x), flow().log_prob(x))


# Arrays and data frames.


@pytest.mark.parametrize(
    "build", [lambda: Flow((2,), context=1, transform=MAF(**SMALL)), lambda: VAE((2,), context=1, hidden=(4,))]
)
@pytest.mark.parametrize("convert", [np.asarray, lambda a: pd.DataFrame(a, index=range(4, 4 + len(a))), lambda a: a.tolist()])
def test_arrays_data_frames_and_lists_are_taken_alike(build, convert):
    x, contexts = np.random.default_rng(0).normal(5, 2, (30, 2)), np.random.default_rng(1).normal(2005, 9, (30, 1))
    family = build()
    family.standardize(convert(x), convert(contexts))
    assert_close(family.loc, torch.tensor(x.mean(0)).float())
    assert_close(family.context.loc, torch.tensor(contexts.mean(0)).float())
    assert family(convert(contexts)).batch_shape == (30,)
    assert steps_of(family, convert(x), convert(contexts)).isfinite()


def steps_of(family, x, contexts):
    svi = SVI(family.model, family.guide, Adam({"lr": 0.01}), Trace_ELBO())
    return torch.tensor(svi.step(x, contexts))


def test_labels_are_taken_as_arrays_and_lists_too():
    flow = Flow((2,), context=Labels(3), transform=MAF(**SMALL))
    for labels in (np.array([0, 2]), pd.Series([0, 2]), [0, 2]):
        assert flow(labels).batch_shape == (2,)
        flow.model(np.random.default_rng(0).normal(size=(2, 2)), labels)
    for wrong in (np.array([0.0, 2.0]), pd.Series(["a", "b"]), "ab", [0, 3]):
        with pytest.raises((TypeError, ValueError), match="Labels"):
            flow(wrong)
