"""Held-out log-likelihood: what its values, errors and kinds say, what it leaves alone, and the table that compares fits."""

import copy
import importlib
import re

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.axes import Axes
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from teachers import orthogonal_linear_gaussian
from torch.distributions import constraints

from pyro_genmodels import (
    MAF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    CategoricalLikelihood,
    DenseField,
    Dequantized,
    Diffusion,
    Flow,
    FlowDensity,
    Labels,
    MaximumLikelihood,
    NormalLikelihood,
    ODEFlow,
    compare,
    log_likelihood,
    train,
)
from pyro_genmodels.distributions import Implicit
from pyro_genmodels.evaluation import LogLikelihood, has_likelihood
from pyro_genmodels.evaluation.comparison import stacking_weights
from pyro_genmodels.families.family import Family

SMALL = {"transforms": 2, "hidden": (8,)}


def no_latents(*args, **kwargs):
    pass


def small_flow(**options):
    return Flow((2,), transform=MAF(**SMALL), **options)


def linear_vae(**guide):
    teacher = orthogonal_linear_gaussian()
    return VAE(
        (3,),
        latent_dim=2,
        likelihood=NormalLikelihood(scale=teacher.scale),
        encoder=teacher.encoder(**guide),
        decoder=teacher.decoder(),
        standardize=False,
    )


def state(family):
    return {name: t.clone() for name, t in family.state_dict().items()}


def assert_unchanged(family, before):
    assert all(t.equal(before[name]) for name, t in family.state_dict().items())


# What the values are.


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", ["flow", "autoregressive"])
def test_a_density_is_read_exactly(name, context):
    made = {
        "flow": lambda: (small_flow(context=context), torch.randn(7, 2)),
        "autoregressive": lambda: (
            Autoregressive((4,), likelihood=CategoricalLikelihood(3), context=context, hidden=(8,)),
            torch.randint(3, (7, 4)),
        ),
    }
    family, x = made[name]()
    args = (torch.randn(7, context),) if context else ()
    found = log_likelihood(family, x, *args)
    torch.testing.assert_close(found.values, family(*args).log_prob(x).detach())
    assert found.kind == "exact"
    assert found.num_samples == 1
    assert not found.std_error.any()
    assert not found.values.requires_grad


def test_a_vae_is_bounded_and_a_dequantised_flow_too():
    found = log_likelihood(VAE((2,), latent_dim=2, hidden=(8,)), torch.randn(5, 2), num_samples=10)
    assert (found.kind, found.num_samples, found.values.shape) == ("lower bound", 10, (5,))
    assert (found.std_error > 0).all()
    bound = log_likelihood(small_flow(levels=4), torch.randint(4, (5, 2)), num_samples=10)
    assert (bound.kind, bound.num_samples) == ("lower bound", 10)
    assert (bound.std_error > 0).all()


def test_the_bound_of_a_dequantised_density_meets_its_closed_form(float64):
    """P(x) of independent logistic-free Gaussians is a difference of their distribution functions; five errors: 5.7e-7."""
    base = dist.Normal(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 0.7])).to_event(1)
    x = torch.tensor([[0, 2], [1, 3], [3, 1]])

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Dequantized(base, levels=4), obs=x)

    found = log_likelihood((model, no_latents), x, num_samples=100_000, batch_size=400_000)
    cdf = base.base_dist.cdf
    assert ((found.values - (cdf(x + 1.0) - cdf(x * 1.0)).log().sum(-1)).abs() < 5 * found.std_error).all()


def test_the_bound_of_a_vae_meets_the_closed_form(float64):
    """Five standard errors for each of 10 values: a false-alarm rate of 6e-6."""
    exact = orthogonal_linear_gaussian().marginal()
    x = exact.distribution().sample((10,))
    found = log_likelihood(linear_vae(shift=0.3, spread=1.5), x, num_samples=40_000, batch_size=100_000)
    assert found.std_error.max() < 0.02
    assert ((found.values - exact.log_prob(x)).abs() < 5 * found.std_error).all()


def test_the_standard_error_is_calibrated(float64):
    """3000 independent estimates of one value: the deviation is what is reported, within six of its own errors (2e-9)."""
    exact = orthogonal_linear_gaussian().marginal()
    x = exact.distribution().sample((1,))
    found = log_likelihood(linear_vae(spread=1.3), x.expand(3000, 3), num_samples=400, batch_size=300_000)
    ratio = found.values.std() / found.std_error.mean()
    assert abs(ratio - 1) < 6 / (2 * 3000) ** 0.5
    z = (found.values - exact.log_prob(x)) / found.std_error
    assert abs(z.mean()) < 0.15
    assert abs(z.std() - 1) < 0.1


def test_one_draw_does_not_tell_its_own_error():
    found = log_likelihood(VAE((2,), latent_dim=2, hidden=(8,)), torch.randn(5, 2), num_samples=1)
    assert found.kind == "lower bound"
    assert found.std_error.isnan().all()


def test_a_discrete_latent_is_integrated(float64):
    """A mixture of two, with the exact posterior as guide: every weight is log p(x)."""
    weights, locs = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 2.0])
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=weights.log() + dist.Normal(locs, 1.0).log_prob(x[:, None])))

    x = torch.randn(6)
    found = log_likelihood((model, guide), x, num_samples=5)
    torch.testing.assert_close(found.values, mixture.log_prob(x))
    assert found.std_error.max() < 1e-12


def test_the_sum_over_other_plates_and_sites():
    x, y = torch.randn(5, 3), torch.randn(5)

    def model(x, y):
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y.unsqueeze(-1))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(1.0, 2.0), obs=x)

    wanted = dist.Normal(0.0, 1.0).log_prob(y) + dist.Normal(1.0, 2.0).log_prob(x).sum(1)
    found = log_likelihood((model, no_latents), x, y)
    torch.testing.assert_close(found.values, wanted)
    assert found.kind == "exact"


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("inner", ["rows", "columns"])
def test_the_plate_of_the_data_is_not_mistaken_for_another_of_its_size(rows, columns, inner):
    x = torch.randn(rows, columns)

    def model(x):
        dims = (-1, -2) if inner == "rows" else (-2, -1)
        with pyro.plate("rows", len(x), dim=dims[0]), pyro.plate("columns", columns, dim=dims[1]):
            pyro.sample("x", dist.Normal(1.0, 2.0), obs=x.T if inner == "rows" else x)

    found = log_likelihood((model, no_latents), x)
    torch.testing.assert_close(found.values, dist.Normal(1.0, 2.0).log_prob(x).sum(1))


# What counts.


def test_the_size_of_the_whole_data_does_not_count():
    flow, x = small_flow(), torch.randn(4, 2)
    torch.testing.assert_close(log_likelihood(flow, x, size=100).values, flow().log_prob(x).detach())


def test_scales_do_not_count():
    flow, x = small_flow(), torch.randn(4, 2)
    scaled = (poutine.scale(flow.model, scale=0.1), flow.guide)
    torch.testing.assert_close(log_likelihood(scaled, x).values, flow().log_prob(x).detach())


@pytest.mark.parametrize("how", ["dist", "poutine"])
def test_masks_count(how):
    flow, x = small_flow(), torch.randn(4, 2)
    present = torch.tensor([True, False, True, False])

    def model(x, present):
        with pyro.plate("data", len(x)), poutine.mask(mask=present if how == "poutine" else torch.ones_like(present)):
            pyro.sample("x", flow().expand((len(x),)).mask(present) if how == "dist" else flow(), obs=x)

    found = log_likelihood((model, no_latents), x, present)
    torch.testing.assert_close(found.values, flow().log_prob(x).detach() * present)


# Batches.


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_do_not_change_exact_values_and_cut_the_context(batch_size):
    flow, x, labels = small_flow(context=Labels(3)), torch.randn(7, 2), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    found = log_likelihood(flow, x, labels, batch_size=batch_size)
    torch.testing.assert_close(found.values, flow(labels).log_prob(x).detach())


def test_the_context_may_be_named():
    flow, x, labels = small_flow(context=Labels(3)), torch.randn(4, 2), torch.tensor([0, 1, 2, 2])
    found = log_likelihood(flow, x, context=labels, batch_size=3)
    torch.testing.assert_close(found.values, flow(labels).log_prob(x).detach())


@pytest.mark.parametrize(("k", "batch_size"), [(1, 5), (10, 4), (10, 10), (7, 3), (100, 33)])
def test_batch_size_bounds_the_pairs_of_draw_and_row_held_at_once(k, batch_size):
    held, rows = [], []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            held.append(z.numel())
            rows.append(len(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(6)
    found = log_likelihood((model, guide), x, num_samples=k, batch_size=batch_size)
    assert max(held) <= batch_size
    assert sum(held) >= 6 * k
    torch.testing.assert_close(found.values, dist.Normal(0.0, 2**0.5).log_prob(x))


def test_arguments_that_are_no_rows_are_left_as_they_are():
    flow, x, shared = small_flow(context=2), torch.randn(5, 2), torch.tensor([0.5, -1.0])

    def model(x, shared, factor):
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow(factor * shared), obs=x)

    found = log_likelihood((model, no_latents), x, shared, factor=2.0, batch_size=2)
    torch.testing.assert_close(found.values, flow(2 * shared).log_prob(x).detach())


# What is left alone.


class Counting(torch.nn.Module):
    """Notes the mode it is called in."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.modes = layer, []

    def forward(self, *args):
        self.modes.append(self.training)
        return self.layer(*args)


@pytest.mark.parametrize("fit", ["family", "pair", "SVI"])
def test_dropout_is_off_and_the_mode_is_put_back(fit):
    made = Autoregressive((3,), likelihood=BernoulliLikelihood(), hidden=(32,), dropout=0.9)
    made.conditionals.layers[0].eval()
    x = torch.randint(2, (6, 3)).float()
    fits = {
        "family": made,
        "pair": (made.model, made.guide),
        "SVI": SVI(made.model, made.guide, Adam({}), loss=MaximumLikelihood()),
    }
    before = {name: m.training for name, m in made.named_modules()}
    a, b = log_likelihood(fits[fit], x).values, log_likelihood(fits[fit], x).values
    assert {name: m.training for name, m in made.named_modules()} == before
    assert made.training
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, made.eval()().log_prob(x).detach())


def wrapped(made):
    return poutine.scale(made.model, scale=0.5)


def closure(made):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", made(), obs=x)

    return model


@pytest.mark.parametrize("hide", [wrapped, closure])
def test_dropout_is_off_and_nothing_learned_behind_a_function_too(hide):
    made, x = Autoregressive((3,), hidden=(32,), dropout=0.9), 5 + 3 * torch.randn(6, 3)
    fit = (hide(made), no_latents)
    before = state(made)
    a, b = log_likelihood(fit, x).values, log_likelihood(fit, x).values
    assert_unchanged(made, before)
    assert made.training
    torch.testing.assert_close(a, b)


FAMILIES_WITH_DROPOUT = {
    "autoregressive": lambda: Autoregressive((2,), hidden=(8,), dropout=0.9),
    "flow": lambda: Flow((2,), transform=MAF(transforms=1, hidden=(8,), dropout=0.9)),
    "ode flow": lambda: ODEFlow((2,), network=DenseField(8, 1, dropout=0.9)),
    "diffusion": lambda: Diffusion((2,), network=DenseField(8, 1, dropout=0.9), likelihood=FlowDensity()),
    "vae": lambda: VAE((2,), latent_dim=1, hidden=(8,), dropout=0.9),
}


@pytest.mark.parametrize("name", FAMILIES_WITH_DROPOUT)
def test_families_with_dropout_in_training_mode_run_in_evaluation_mode_and_are_put_back(name):
    made, x = FAMILIES_WITH_DROPOUT[name](), torch.randn(12, 2)
    made.prepare(x)
    with torch.no_grad():
        for parameter in made.parameters():  # output layers may start at zero, and hide what is dropped
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = {part: m.training for part, m in made.named_modules()}
    options = {"num_samples": 3, "quality_samples": 6}
    assert has_likelihood(made, x)
    pyro.set_rng_seed(1)
    found = compare({"fit": made}, x, **options)
    assert {part: m.training for part, m in made.named_modules()} == before
    assert any(before.values())
    made.eval()
    pyro.set_rng_seed(1)
    wanted = compare({"fit": made}, x, **options)
    torch.testing.assert_close(found.log_likelihoods["fit"].values, wanted.log_likelihoods["fit"].values)
    assert found.sample_quality == wanted.sample_quality


def test_the_mode_is_put_back_after_an_error_too():
    vae = VAE((2,), latent_dim=1, hidden=(4,))
    vae.encoder = Counting(vae.encoder)
    with pytest.raises(ValueError, match="shape"):
        log_likelihood(vae, torch.randn(3, 5))
    assert vae.training
    log_likelihood(vae, torch.randn(3, 2), num_samples=2)
    assert vae.encoder.modes
    assert not any(vae.encoder.modes)
    assert vae.training


@pytest.mark.parametrize("trained", [False, True])
def test_the_param_store_is_untouched(trained):
    vae, x = VAE((2,), latent_dim=1, hidden=(4,)), torch.randn(4, 2)
    if trained:
        SVI(vae.model, vae.guide, Adam({"lr": 1e-3}), loss=Trace_ELBO()).step(x)
    before = copy.copy(pyro.get_param_store().get_state()["params"])
    log_likelihood(vae, x, num_samples=2)
    after = pyro.get_param_store().get_state()["params"]
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_nothing_is_recorded_by_handlers_outside():
    flow, x = small_flow(), torch.randn(4, 2)
    with poutine.trace() as outside:
        log_likelihood(flow, x)
    assert not [name for name, site in outside.trace.nodes.items() if site["type"] == "sample"]


@pytest.mark.parametrize("family", [small_flow, lambda: VAE((2,), latent_dim=1, hidden=(4,))])
def test_a_family_in_training_takes_no_mean_and_deviation_from_held_out_data(family):
    family = family()
    before = state(family)
    log_likelihood(family, 5 + 3 * torch.randn(10, 2), num_samples=2)
    assert_unchanged(family, before)
    assert family.training
    assert not family.standardized
    family.model(torch.randn(10, 2))
    assert family.standardized


# What is a fit.


def test_families_pairs_svi_and_fits_are_judged_alike():
    flow, x = small_flow(), torch.randn(20, 2)
    fit = train(flow, x, epochs=1, progress=False)
    wanted = flow().log_prob(x).detach()
    svi = SVI(flow.model, flow.guide, Adam({}), loss=MaximumLikelihood())
    for judged in (flow, fit, svi, (flow.model, flow.guide), (flow.model, no_latents)):
        torch.testing.assert_close(log_likelihood(judged, x).values, wanted)


def test_a_fit_of_a_pair_is_judged():
    loc = torch.nn.Linear(1, 1, bias=False)
    x = torch.randn(20)

    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = loc

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc.weight.squeeze(), 1.0), obs=x)

    fit = train((Model(), no_latents), x, epochs=1, progress=False)
    torch.testing.assert_close(log_likelihood(fit, x).values, dist.Normal(loc.weight.item(), 1.0).log_prob(x))


def test_what_offers_no_model_and_guide_is_no_fit():
    with pytest.raises(TypeError, match="Linear"):
        log_likelihood(torch.nn.Linear(2, 2), torch.randn(3, 2))


# Errors.


def test_latents_shared_by_all_rows_are_refused():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=re.compile(r"'loc'.*to_arviz.*loo", re.S | re.I)):
        log_likelihood((model, guide), torch.randn(4))


def test_a_missing_plate_is_refused():
    def model(x):
        pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"pyro\.plate"):
        log_likelihood((model, no_latents), torch.randn(4))


def test_a_plate_subsampled_inside_the_model_is_refused():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=min(2, len(x))) as rows:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[rows])

    with pytest.raises(ValueError, match="without subsampling"):
        log_likelihood((model, no_latents), torch.randn(4))


def test_an_implicit_likelihood_is_refused():
    vae = VAE((2,), latent_dim=1, hidden=(4,))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("image", vae(), obs=x)

    with pytest.raises(ValueError, match=re.compile(r"'image'.*Implicit.*log_likelihood\(vae", re.S)):
        log_likelihood((model, no_latents), torch.randn(4, 2))


def test_a_latent_without_a_guide_is_refused():
    vae = VAE((2,), latent_dim=1, hidden=(4,))
    with pytest.raises(ValueError, match="'z'"):
        log_likelihood((vae.model, no_latents), torch.randn(4, 2))


@pytest.mark.parametrize("x", [torch.empty(0, 2), torch.tensor(1.0), [[1.0, 2.0]]], ids=["empty", "scalar", "list"])
def test_no_rows_are_refused(x):
    with pytest.raises(ValueError, match="rows"):
        log_likelihood(small_flow(), x)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"batch_size": 0}])
def test_no_draws_are_refused(options):
    with pytest.raises(ValueError, match="of 1 or more"):
        log_likelihood(small_flow(), torch.randn(3, 2), **options)


def test_rows_of_context_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="context"):
        log_likelihood(small_flow(context=2), torch.randn(5, 2), torch.randn(4, 2))


def test_data_outside_the_support_are_refused():
    flow = small_flow(support=constraints.interval(0.0, 1.0))
    with pytest.raises(ValueError, match="support"):
        log_likelihood(flow, torch.tensor([[0.5, 0.5], [0.5, 1.5]]), batch_size=1)


# Summaries.


def test_the_mean_and_its_error():
    found = LogLikelihood(torch.tensor([-1.0, -2.0, -6.0]), torch.zeros(3), "exact", 1)
    assert found.mean == pytest.approx(-3)
    assert found.mean_std_error == pytest.approx(7**0.5 / 3**0.5)
    assert found.bits_per_dim(4) == pytest.approx(3 / (4 * np.log(2)))
    assert str(found) == "-3.000 ± 1.528 nats per datum (exact, n=3)"
    assert "lower bound, k=50, n=3" in str(LogLikelihood(found.values, found.values, "lower bound", 50))


# The table.


def judged(values, kind="exact", k=1):
    values = torch.as_tensor(values, dtype=torch.float64)
    return LogLikelihood(values, torch.zeros_like(values), kind, k)


A, B, C = [-1.0, -3.0, -2.5, -0.5], [-2.0, -2.5, -2.0, -3.0], [-4.0, -4.0, -1.0, -4.0]


def test_the_table_by_hand():
    table = compare({"b": judged(B), "a": judged(A, "lower bound", 50), "c": judged(C)}).table
    assert list(table.columns) == [
        "rank", "elpd", "se", "elpd_diff", "dse", "weight", "kind", "num_samples", "nats", "bits_per_dim"
    ]  # fmt: skip
    assert list(table.index) == ["a", "b", "c"]
    assert list(table["rank"]) == [0, 1, 2]
    assert list(table["elpd"]) == pytest.approx([-7.0, -9.5, -13.0])
    assert list(table["se"]) == pytest.approx([2 * np.std(v, ddof=1) for v in (A, B, C)])
    assert list(table["elpd_diff"]) == pytest.approx([0.0, 2.5, 6.0])
    assert list(table["dse"]) == pytest.approx([2 * np.std(np.subtract(A, v), ddof=1) for v in (A, B, C)])
    assert list(table["nats"]) == pytest.approx([7 / 4, 9.5 / 4, 13 / 4])
    assert list(table["kind"]) == ["lower bound", "exact", "exact"]
    assert list(table["num_samples"]) == [50, 1, 1]
    assert table["weight"].sum() == pytest.approx(1)
    assert all(dtype.kind in "if" for name, dtype in table.dtypes.items() if name != "kind")


def test_stacking_weights_are_the_best_mixture():
    values = np.array([A, B, C])
    n = 400
    simplex = np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]) / n
    score = np.log(simplex @ np.exp(values)).sum(1)
    weights = compare(dict(zip("abc", map(judged, values), strict=True))).table["weight"].to_numpy()
    assert np.log(weights @ np.exp(values)).sum() >= score.max() - 1e-9
    np.testing.assert_allclose(weights, simplex[score.argmax()], atol=2 / n)


def test_stacking_weights_of_very_small_densities_are_the_same():
    table = compare({"a": judged(A), "b": judged(B), "c": judged(C)}).table
    shifted = compare({name: judged(np.array(v) - 1000) for name, v in {"a": A, "b": B, "c": C}.items()}).table
    np.testing.assert_allclose(shifted["weight"], table["weight"], atol=1e-9)
    far = compare({"a": judged(np.full(4, -1000.0)), "b": judged(np.full(4, -2000.0))}).table
    np.testing.assert_allclose(far["weight"], [1, 0], atol=1e-9)


def test_stacking_weights_are_computed_once(monkeypatch):
    calls = []
    module = importlib.import_module("pyro_genmodels.evaluation.comparison")
    monkeypatch.setattr(module, "stacking_weights", lambda values: calls.append(1) or stacking_weights(values))
    comparison = compare({"a": judged(A), "b": judged(B)})
    pd.testing.assert_frame_equal(comparison.table, comparison.table)
    comparison.plot()
    assert str(comparison) == str(comparison)
    assert len(calls) == 1
    assert comparison.table is not comparison.table  # a change of one does not show in the other


def test_equal_fits_share_the_weight():
    table = compare({"a": judged(A), "b": judged(A)}).table
    assert list(table["weight"]) == pytest.approx([0.5, 0.5])
    assert list(table["dse"]) == [0, 0]


def test_fits_are_judged_on_the_data_given():
    x, labels = torch.randn(30, 2), torch.randint(3, (30,))
    fits = {"flow": small_flow(context=Labels(3)), "vae": VAE((2,), latent_dim=1, hidden=(4,), context=Labels(3))}
    fits["again"] = fits["flow"]
    comparison = compare(fits, x, labels, num_samples=20)
    table = comparison.table
    assert table.loc["flow", "elpd"] == pytest.approx(fits["flow"](labels).log_prob(x).sum().item(), rel=1e-5)
    assert table.loc["flow", "elpd"] == pytest.approx(table.loc["again", "elpd"])
    assert table.loc["vae", "num_samples"] == 20
    assert table.loc["flow", "bits_per_dim"] == pytest.approx(table.loc["flow", "nats"] / (2 * np.log(2)))
    assert comparison.log_likelihoods["vae"].kind == "lower bound"


def test_computed_and_uncomputed_fits_stand_side_by_side():
    flow, x = small_flow(), torch.randn(10, 2)
    table = compare({"new": flow, "known": log_likelihood(flow, x)}, x).table
    assert table["elpd"].iloc[0] == pytest.approx(table["elpd"].iloc[1])


def test_the_printed_table_says_held_out_and_warns_of_mixed_kinds():
    mixed = str(compare({"a": judged(A), "b": judged(B, "lower bound", 9)}))
    assert "held-out" in mixed
    assert "loo" not in mixed.lower()
    assert "kinds differ (exact, lower bound)" in mixed
    assert "kinds differ" not in str(compare({"a": judged(A), "b": judged(B)}))


def test_the_plot_is_an_axes_with_every_fit():
    import matplotlib.pyplot as plt

    comparison = compare({"a": judged(A), "b": judged(B), "c": judged(C, "lower bound")})
    axes = comparison.plot()
    assert isinstance(axes, Axes)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a\n(exact)", "b\n(exact)", "c\n(lower bound)"]
    _, own = plt.subplots()
    assert comparison.plot(own) is own
    assert isinstance(compare({"alone": judged(A)}).plot(), Axes)
    plt.close("all")


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="at least one fit"):
        compare({}, torch.randn(3, 2))


def test_a_fit_without_data_is_refused():
    with pytest.raises(ValueError, match=r"'flow'.*no data"):
        compare({"flow": small_flow()})


def test_different_rows_are_refused():
    with pytest.raises(ValueError, match=r"'a': 4.*'b': 3"):
        compare({"a": judged(A), "b": judged(B[:3])})


def test_a_guide_without_a_density_bounds_nothing():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x / 2))

    with pytest.raises(ValueError, match="point mass"):
        log_likelihood((model, guide), torch.randn(4))


def test_the_kind_is_that_of_the_weakest_part():
    flow = Flow((2,), levels=4, transform=MAF(transforms=1, hidden=(8,)))

    def model(x):
        weights = dist.Categorical(torch.ones(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(weights, flow().expand((2,))), obs=x)

    assert log_likelihood((model, lambda x: None), torch.randint(0, 4, (5, 2)), num_samples=4).kind == "lower bound"


def test_stacking_passes_over_what_every_fit_rules_out():
    values = torch.tensor([[-1.0, -torch.inf, -1.0], [-3.0, -torch.inf, -2.0]])
    torch.testing.assert_close(stacking_weights(values), torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [2, 5])
def test_a_model_that_does_not_vectorise_is_weighed_draw_by_draw(rows):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.stack([x / 2, torch.zeros_like(x)], -1)
            pyro.sample("z", dist.Normal(loc, torch.tensor([0.5**0.5, 1.0])).to_event(1))

    x = torch.randn(rows)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    torch.testing.assert_close(log_likelihood((model, guide), x, num_samples=20).values, exact, rtol=1e-4, atol=1e-4)


def test_long_judgements_show_their_progress(capsys, monkeypatch):
    module = importlib.import_module("pyro_genmodels.evaluation.likelihood")
    monkeypatch.setattr(module, "PROGRESS_DELAY", 0.0)
    vae, x = linear_vae().eval(), torch.randn(6, 3)
    log_likelihood(vae, x, num_samples=7)
    assert capsys.readouterr().err == ""
    log_likelihood(vae, x, num_samples=7, progress=True, batch_size=4)
    assert "log-likelihood:" in (shown := capsys.readouterr().err)
    assert "/42" in shown


# Fits without a likelihood, and draws.


class Ring(Family):
    """Draws on a circle, with no density."""

    def __init__(self, radius=1.0, context=0):
        super().__init__((2,), context=context)
        self.radius = torch.nn.Parameter(torch.tensor(radius))

    def forward(self, context=None):
        def likelihood(z, c):
            return dist.Delta(self.radius * torch.nn.functional.normalize(z, dim=-1), event_dim=1)

        return Implicit(dist.Normal(torch.zeros(2), 1.0).to_event(1), likelihood, (2,), context=self.embed(context))


def test_what_has_no_likelihood_is_known_by_its_sites():
    x = torch.randn(5, 2)
    assert not has_likelihood(Ring(), x)
    assert not has_likelihood(Ring(context=Labels(2)), x, torch.zeros(5, dtype=torch.long))
    assert has_likelihood(small_flow(), x)
    assert has_likelihood(VAE((2,), latent_dim=1, hidden=(4,)), x)  # by its model and guide
    with pytest.raises(ValueError, match="density is: none"):
        log_likelihood(Ring(), x)


def test_a_fit_without_a_likelihood_is_a_row_of_dashes_ranked_last():
    x = torch.randn(30, 2)
    comparison = compare({"ring": Ring(), "flow": small_flow(), "vae": VAE((2,), latent_dim=1, hidden=(4,))}, x, num_samples=5)
    table = comparison.table
    assert list(table.index)[-1] == "ring"
    row = table.loc["ring"]
    assert (row["kind"], row["num_samples"], row["rank"]) == ("none", 0, 2)
    assert row[["elpd", "se", "elpd_diff", "dse", "weight", "nats", "bits_per_dim"]].isna().all()
    assert table["weight"].sum() == pytest.approx(1)
    others = compare({name: comparison.log_likelihoods[name] for name in ("flow", "vae")}, x).table
    pd.testing.assert_frame_equal(table.drop(index="ring"), others)
    line = next(line for line in str(comparison).splitlines() if line.startswith("ring"))
    assert line.split().count("-") == 7
    assert "without a likelihood: ring." in str(comparison)
    assert "no likelihood" in str(comparison.log_likelihoods["ring"])
    ax = comparison.plot()
    assert len(ax.get_yticks()) == 2
    assert "no likelihood: ring" in ax.get_xlabel()


def test_of_fits_without_a_likelihood_alone_there_is_a_table_and_no_picture():
    comparison = compare({"a": Ring(), "b": Ring(2.0)}, torch.randn(10, 2))
    assert comparison.table["elpd"].isna().all()
    assert list(comparison.table["rank"]) == [0, 1]
    with pytest.raises(ValueError, match="No fit has a likelihood"):
        comparison.plot()


def test_draws_of_every_fit_are_compared_with_data():
    """The true ring is within chance (its p-value below 0.001 with a rate of 1e-3, for this seed not), the wide one is not."""
    x = torch.nn.functional.normalize(torch.randn(400, 2), dim=-1)
    fits = {"wide": Ring(1.5), "true": Ring(), "flow": small_flow(), "known": judged(torch.zeros(400))}
    before = state(fits["wide"])
    comparison = compare(fits, x, quality_samples=1000)
    table = comparison.table
    assert_unchanged(fits["wide"], before)
    assert table.loc["wide", "mmd_p"] == pytest.approx(1 / 1001)
    assert table.loc["flow", "mmd_p"] == pytest.approx(1 / 1001)
    assert table.loc["true", "mmd_p"] > 1e-3
    assert table.loc["true", "mmd"] < 0.02 < table.loc["wide", "mmd"]
    assert table.loc["known", ["mmd", "mmd_p", "sliced_wasserstein"]].isna().all()
    assert 0 < comparison.baseline < 0.2
    assert abs(table.loc["wide", "sliced_wasserstein"] - 0.5 / 2**0.5) < 0.1
    assert table.loc["true", "sliced_wasserstein"] < 0.2
    assert f"(baseline): {comparison.baseline:.3f}" in str(comparison)


def test_draws_are_given_the_context_of_their_rows():
    labels = torch.randint(2, (200,))
    x = torch.nn.functional.normalize(torch.randn(200, 2), dim=-1)
    table = compare({"ring": Ring(context=Labels(2))}, x, context=labels, quality_samples=50, num_samples=3).table
    assert table.loc["ring", "sliced_wasserstein"] < 0.5


def test_draws_want_data():
    with pytest.raises(ValueError, match="no data x"):
        compare({"a": judged(A)}, quality_samples=10)
    with pytest.raises(ValueError, match="2 or more samples"):
        compare({"a": small_flow()}, torch.randn(3, 2), quality_samples=10)
