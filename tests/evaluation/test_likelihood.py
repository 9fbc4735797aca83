"""Held-out log-likelihood: its values, errors and kinds, the modules and parameters it leaves unchanged, and its errors."""

import copy
import importlib
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
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
def test_batch_size_bounds_the_pairs_of_sample_and_row_in_memory(k, batch_size):
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


def test_families_pairs_svi_and_fits_give_equal_values():
    flow, x = small_flow(), torch.randn(20, 2)
    fit = train(flow, x, epochs=1, progress=False)
    wanted = flow().log_prob(x).detach()
    svi = SVI(flow.model, flow.guide, Adam({}), loss=MaximumLikelihood())
    for judged in (flow, fit, svi, (flow.model, flow.guide), (flow.model, no_latents)):
        torch.testing.assert_close(log_likelihood(judged, x).values, wanted)


def test_a_fit_of_a_pair_is_evaluated():
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


@pytest.mark.parametrize("x", [torch.empty(0, 2), torch.tensor(1.0), [], 1.0], ids=["empty", "scalar", "list", "number"])
def test_no_rows_are_refused(x):
    with pytest.raises(ValueError, match="rows"):
        log_likelihood(small_flow(), x)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"batch_size": 0}])
def test_counts_below_one_are_refused(options):
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
    assert (found.nats, str(found)) == (3.0, "3.000 ± 1.528 nats per datum, lower is better (exact, n=3)")
    assert "lower bound, k=50, n=3" in str(LogLikelihood(found.values, found.values, "lower bound", 50))


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


def test_progress_is_shown(capsys, monkeypatch):
    module = importlib.import_module("pyro_genmodels.evaluation.importance")
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
