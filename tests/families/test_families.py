"""Families: the contract over the table of cases, standardisation, networks of one's own, names, and error messages."""

import copy
import inspect
import pickle
import pydoc
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from cases import CASES, CLASSES, LEVELS, SMALL, UNIT, labels, latent, real, rows
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.inspect import get_model_relations
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_genmodels import (
    GAN,
    MAF,
    NCSF,
    NSF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    CategoricalLikelihood,
    ConvolutionalCritic,
    ConvolutionalEnergy,
    ConvolutionalGenerator,
    DenseCritic,
    DenseEnergy,
    DenseField,
    DenseGenerator,
    Diffusion,
    DiscretizedLogisticLikelihood,
    EnergyModel,
    Family,
    Flow,
    Labels,
    MaximumLikelihood,
    NormalLikelihood,
    ODEFlow,
    RealNVP,
    RestrictedBoltzmannMachine,
    UNet,
)
from pyro_genmodels.families import BPF, GF, NAF, NICE, SOSPF, BoltzmannMachine
from pyro_genmodels.testing import check_family

BY_NAME = {case.name: case for case in CASES}


def train(case, family, batch, steps=2):
    svi = SVI(family.model, family.guide, Adam({"lr": 0.01}), case.objective())
    return [svi.step(*batch) for _ in range(steps)]


def trainable(family):
    """Return copies of the trainable parameters, by name."""
    return {name: p.detach().clone() for name, p in family.named_parameters() if p.requires_grad}


def moved(before, family):
    now = trainable(family)
    return {name for name, p in before.items() if not p.equal(now[name])}


@rows()
def test_contract(case):
    check_family(
        case.build,
        case.data,
        context=case.context if case.conditional else None,
        objective=case.objective,
        untrained=case.untrained,
    )


@pytest.mark.parametrize("name", ["loc", "scale", "context", "model", "parameters"])
@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(2)), nn.Linear(2, 2), PyroParam(torch.ones(2))])
def test_a_parameter_does_not_replace_an_attribute_of_every_family(name, value):
    with pytest.raises(AttributeError, match=f"as {name}, .* such as own_{name}"):
        setattr(Flow((2,), transform=MAF(**SMALL)), name, value)


def test_the_name_is_settable_and_stands_before_every_parameter():
    flow = Flow((2,), transform=MAF(**SMALL), name="prior of effects")
    train(BY_NAME["MAF"], flow, (torch.randn(8, 2),))
    assert all(key.startswith("prior of effects") for key in pyro.get_param_store())


def test_families_inside_a_users_module_do_not_meet():
    from pyro.nn import PyroModule

    class Pair(PyroModule):
        def __init__(self):
            super().__init__("pair")
            self.one, self.two = Flow((2,), transform=MAF(**SMALL)), Flow((2,), transform=MAF(**SMALL))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("one", self.one(), obs=x)
                pyro.sample("two", self.two(), obs=x + 1)

    pair = Pair()
    before = trainable(pair)
    svi = SVI(pair, lambda x: None, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(torch.randn(8, 2))
    assert moved(before, pair) == before.keys()


# The constructor, questions that belong to the distribution, and Pyro's pictures.

FAMILIES = [Flow, ODEFlow, Diffusion, GAN, Autoregressive, VAE, EnergyModel]


@pytest.mark.parametrize("family", [*FAMILIES, Family], ids=lambda family: family.__name__)
def test_the_signature_is_that_of_the_constructor(family):
    parameters = inspect.signature(family).parameters
    assert next(iter(parameters)) == "event_shape"
    assert {"context", "standardize", "standardize_context", "name"} < set(parameters)
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "event_shape")
    shown = pydoc.render_doc(family, renderer=pydoc.plaintext).splitlines()
    assert any(line.startswith(f"class {family.__name__}") for line in shown)
    assert not any("(*args: 'Any', **kwargs: 'Any') -> 'Family'" in line for line in shown[:5])


def test_a_familys_own_subclass_shows_its_own_constructor():
    class Wide(Flow):
        def __init__(self, event_shape, *, width=8):
            super().__init__(event_shape, transform=MAF(hidden=(width,)))

    assert list(inspect.signature(Wide).parameters) == ["event_shape", "width"]
    assert Wide((2,), width=4).arguments == {"event_shape": (2,), "width": 4}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize(
    "name", ["log_prob", "sample", "rsample", "mean", "variance", "entropy", "score", "expand", "batch_shape"]
)
def test_what_belongs_to_the_distribution_says_to_call_the_family_first(family, name):
    with pytest.raises(AttributeError, match=rf"{family.__name__} is a module.*call the family first, as in family\(\).{name}"):
        getattr(family((2,)), name)
    with pytest.raises(AttributeError, match=rf"as in family\(context\).{name}"):
        getattr(family((2,), context=1), name)
    with pytest.raises(AttributeError, match="has no attribute 'log_prop'"):
        family((2,)).log_prop  # noqa: B018
    assert not hasattr(family((2,)), name)


@rows()
def test_pyro_can_draw_the_model(case):
    family = case.build()
    for args, kwargs in ((case.batch(5), {}), ((None, *case.batch(5)[1:]), {"size": 5})):
        relations = get_model_relations(family.model, args, kwargs)
        assert relations["plate_sample"]["data"][-1] == "x"
        assert ("x" in relations["observed"]) == (args[0] is not None)


@rows(lambda case: case.conditional and not case.labelled)
def test_pyro_sees_that_data_depend_on_a_latent_context(case):
    family, x = case.build().eval(), case.data(4)
    for value in (None, x):

        def model(value=value):
            with pyro.plate("data", 4):
                c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", family(c), obs=value)

        assert get_model_relations(model)["sample_sample"]["x"] == ["c"]


# Standardisation and state_dict.


def standard(family):
    """Return what a family estimates from the data: their mean, or log frequencies of discrete data."""
    return family.marginals if getattr(family, "marginals", torch.empty(0)).numel() else family.loc


@rows()
def test_standardisation_is_of_the_first_data_and_stays(case):
    family, batch = case.build(), case.batch(51)  # so that no share of ones is a half
    if not family._standardize:
        return
    family.eval().model(*batch)
    assert not family.standardized
    family.train().model(*batch)
    assert family.standardized
    loc = standard(family).clone()
    assert loc.abs().sum() > 0
    if not (case.discrete or getattr(getattr(family, "likelihood", None), "has_scale", False)):
        y = family.pretransform(batch[0])
        y = y.flatten() if str(family._standardize).startswith("jointly") else y
        if (angles := getattr(family, "angles", None)) is not None:
            y = y[:, ~angles]
        assert_close(y.mean(0), torch.zeros(y.shape[1:]), atol=1e-5, rtol=0)
        assert_close(y.std(0), torch.ones(y.shape[1:]), atol=1e-5, rtol=0)
    family.model(*case.batch(51))
    assert standard(family).equal(loc)


@pytest.mark.parametrize("choice", [NICE, RealNVP, MAF, NSF, NCSF], ids=lambda choice: choice.__name__)
def test_a_state_dict_carries_random_permutations(choice):
    build = lambda: Flow((5,), transform=choice(**SMALL, randperm=True))  # noqa: E731
    family, fresh, x = build(), build(), torch.rand(10, 5)
    fresh.load_state_dict(family.state_dict())
    assert_close(fresh().log_prob(x), family().log_prob(x))
    y = torch.rand(10, 5)
    transform = fresh().transform(None)
    assert_close(transform.inv(transform(y)), y, atol=1e-4, rtol=0)


def test_a_state_dict_carries_the_order():
    one, two = (Autoregressive((3,), order=order, hidden=(16,)) for order in ([2, 0, 1], [0, 1, 2]))
    two.load_state_dict(one.state_dict())
    x = torch.randn(5, 3)
    assert_close(two().log_prob(x), one().log_prob(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Flow((2,), levels=4, transform=MAF(**SMALL), standardize=False),
        lambda: Flow((2,), levels=4, transform=NSF(**SMALL), support=constraints.interval(0.0, 4.0)),
    ],
    ids=["as they stand", "on an interval"],
)
def test_dequantized_integers_go_with_a_float64_flow(build):
    family = build().to(torch.float64)
    log_p = family().log_prob(torch.randint(4, (5, 2)))
    assert log_p.dtype == torch.float64
    assert log_p.isfinite().all()


# Drawing and scaling.


@pytest.mark.parametrize(
    "build",
    [
        lambda context: Flow((2,), transform=MAF(**SMALL), context=context),
        lambda context: Autoregressive((2,), hidden=(16, 16), context=context),
        lambda context: VAE((2,), latent_dim=2, hidden=(16, 16), context=context),
    ],
    ids=["Flow", "Autoregressive", "VAE"],
)
def test_a_trained_family_draws_what_its_label_says(build):
    family, y = build(Labels(2)), torch.arange(100) % 2
    x = 0.3 * torch.randn(100, 2) + (6.0 * y - 3).unsqueeze(1)
    objective = Trace_ELBO() if isinstance(family, VAE) else MaximumLikelihood()
    svi = SVI(family.model, family.guide, Adam({"lr": 0.02}), objective)
    for _ in range(150):
        svi.step(x, y)
    draws = family.eval()(torch.tensor([0, 1])).sample((200,))
    assert (draws.mean((0, 2)) - torch.tensor([-3.0, 3.0])).abs().max() < 0.5


def test_a_module_of_the_users_own_embeds_the_context():
    family = Flow((2,), transform=MAF(**SMALL), context=nn.Embedding(4, 3))
    y = torch.tensor([0, 3, 1])
    assert family.context_size == 3
    assert family(y).sample().shape == (3, 2)
    before = trainable(family)
    train(BY_NAME["MAF"], family, (torch.randn(3, 2), y))
    assert "context.weight" in moved(before, family)


# Networks of the user's own.


class Encoder(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, features))

    def forward(self, x):
        assert x.shape[1:] == (1, 8, 8)
        return self.net(x)


class Decoder(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs
        self.net = nn.Sequential(
            nn.Linear(2, 64), nn.ReLU(), nn.Unflatten(-1, (4, 4, 4)), nn.ConvTranspose2d(4, outputs, 4, stride=2, padding=1)
        )

    def forward(self, z):
        out = self.net(z)
        return out if self.outputs == 1 else out.unsqueeze(-1).transpose(1, -1)


IMAGES = {
    "Bernoulli": (BernoulliLikelihood(), lambda: torch.randint(2, (6, 1, 8, 8)).float()),
    "DiscretizedLogistic": (DiscretizedLogisticLikelihood(17, components=2), lambda: torch.randint(17, (6, 1, 8, 8))),
    "Normal": (NormalLikelihood(), lambda: torch.randn(6, 1, 8, 8)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_convolutional_networks_train_with_vectorised_particles(name):
    likelihood, data = IMAGES[name]
    x = data()
    vae = VAE((1, 8, 8), latent_dim=2, likelihood=likelihood, encoder=Encoder(4), decoder=Decoder(likelihood.num_outputs))
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.01}), Trace_ELBO(num_particles=3, vectorize_particles=True))
    svi.step(x)
    before = trainable(vae)
    svi.step(x)
    assert moved(before, vae) == before.keys()
    assert vae().sample((2, 3)).shape == (2, 3, 1, 8, 8)


@rows(latent)
def test_vectorised_particles_estimate_the_same_elbo(case):
    family, batch = case.build(), case.batch(8)
    family.standardize(batch[0])
    one_run = Trace_ELBO(num_particles=200, vectorize_particles=True).loss(family.model, family.guide, *batch)
    runs = torch.tensor([Trace_ELBO().loss(family.model, family.guide, *batch) for _ in range(200)])
    # the difference of two means of 200 within 5.5 standard errors: 4e-8
    assert abs(one_run - runs.mean()) < 5.5 * (2 / 200) ** 0.5 * runs.std() + 1e-4


def test_an_encoder_may_return_location_and_scale():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x):
            loc, raw = self.linear(x).chunk(2, -1)
            return loc, raw.exp()

    vae, x = VAE((3,), latent_dim=2, encoder=Pair()), torch.randn(5, 3)
    assert vae.posterior(x).event_shape == (2,)
    before = trainable(vae)
    train(BY_NAME["VAE, Normal"], vae, (x,))
    assert "encoder.linear.weight" in moved(before, vae)


def test_own_networks_see_the_context():
    class Both(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.linear = nn.Linear(inputs + CLASSES, outputs)

        def forward(self, x, context):
            return self.linear(torch.cat([x, context], -1))

    decoder = Reshape(Both(2, 6), (3, 2))
    vae = VAE((3,), latent_dim=2, context=Labels(CLASSES), encoder=Both(3, 4), decoder=decoder)
    losses = train(BY_NAME["VAE, labels"], vae, (torch.randn(5, 3), labels(5)))
    assert torch.tensor(losses).isfinite().all()


class Reshape(nn.Module):
    def __init__(self, net, shape):
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, *args):
        return self.net(*args).unflatten(-1, self.shape)


@pytest.mark.parametrize(
    "prior",
    [
        lambda: dist.Normal(torch.zeros(2), 2.0).to_event(1),
        lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        lambda: dist.Normal(torch.zeros(2, 2), 1.0).to_event(2),
        lambda: Flow((2,), transform=NSF(**SMALL)),
        lambda: Flow((2, 2), transform=MAF(**SMALL)),
        lambda: Autoregressive((2,), hidden=(8,)),
        lambda: copy.deepcopy(Flow((2,), transform=MAF(**SMALL))),
        lambda: pickle.loads(pickle.dumps(Flow((2,), transform=MAF(**SMALL)))),
    ],
    ids=[
        "Normal",
        "MultivariateNormal",
        "2-d",
        "Flow",
        "Flow, 2-d",
        "Autoregressive",
        "copied",
        "pickled",
    ],
)
def test_any_prior_over_the_reals_will_do(prior):
    vae, x = VAE((3,), prior=prior(), hidden=(16,)), torch.randn(8, 3)
    assert vae().sample((4,)).shape == (4, 3)
    assert torch.tensor(train(BY_NAME["VAE, Normal"], vae, (x,))).isfinite().all()
    vae.to(torch.float64)
    assert torch.tensor(train(BY_NAME["VAE, Normal"], vae, (x.double(),))).isfinite().all()
    assert vae().sample().dtype == torch.float64


def test_a_conditional_prior_is_given_the_context():
    prior = Flow((2,), transform=MAF(**SMALL), context=Labels(CLASSES))
    vae = VAE((3,), prior=prior, context=Labels(CLASSES), hidden=(16,))
    assert vae(labels(5)).sample((2,)).shape == (2, 5, 3)
    before = trainable(vae)
    train(BY_NAME["VAE, labels"], vae, (torch.randn(8, 3), labels(8)), steps=3)
    assert moved(before, vae) == before.keys()


def test_validate_changes_nothing_and_prepare_standardises_once():
    flow, x = Flow((2,), transform=MAF(**SMALL)), 5 + 3 * torch.randn(50, 2)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.train().validate(x)
    assert all(value.equal(before[name]) for name, value in flow.state_dict().items())
    flow.eval().prepare(x)
    assert_close(flow.loc, x.mean(0))
    flow.prepare(x + 1)
    assert_close(flow.loc, x.mean(0))
    flow.standardize(x + 1)
    assert_close(flow.loc, x.mean(0) + 1)


def test_constraints_and_distributions_move_with_the_family():
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    flow = ODEFlow((2,), base=base, support=constraints.greater_than(torch.tensor(0.5))).double()
    assert flow.support.lower_bound.dtype == flow.base.base_dist.loc.dtype == torch.float64


# Bad input at the border.


def refused(kind, *words):
    return pytest.raises(kind, match="(?s)" + ".*".join(words))


@rows(lambda case: not case.discrete)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinite_data_are_refused(case, bad):
    family, (x, *rest) = case.build(), case.batch(4)
    x[2] = bad
    for part in (family.model, family.guide) if latent(case) else (family.model,):
        with refused(ValueError, "NaN or infinite" if bad != bad else "infinite", "1 of 4 rows", "row 2", "Drop or impute"):
            part(x, *rest)


@rows(lambda case: case.discrete and case.data(1).is_floating_point())
def test_nan_among_zeros_and_ones_is_refused(case):
    family, (x, *rest) = case.build(), case.batch(4)
    x[1] = torch.nan
    with refused(ValueError, "NaN or infinite"):
        family.model(x, *rest)


@rows(lambda case: case.event_shape)
def test_data_of_another_shape_are_refused(case):
    family, (x, *rest) = case.build(), case.batch(4)
    for bad in (x[0], x.flatten(), torch.cat([x, x], -1), x.unsqueeze(0)):
        with refused(ValueError, "wants data of shape", "but found", "Reshape"):
            family.model(bad, *rest)


@rows()
def test_no_data_are_refused(case):
    family, (x, *rest) = case.build(), case.batch(4)
    with refused(ValueError, "found no rows at all"):
        family.model(x[:0], *(part[:0] for part in rest))


@rows(lambda case: not case.discrete)
def test_integers_into_a_continuous_family_are_refused(case):
    family, (x, *rest) = case.build(), case.batch(4)
    with refused(ValueError, "models real numbers", "int64", r"\.float\(\)", "levels=K"):
        family.model(x.long(), *rest)


@rows(lambda case: case.discrete)
def test_values_off_the_levels_are_refused(case):
    family, (x, *rest) = case.build(), case.batch(4)
    is_bounded = not isinstance(family.data_support, type(constraints.nonnegative_integer))
    for bad in (x - 100, x + 0.5, *([x + LEVELS] if is_bounded else [])):
        with refused(ValueError, "outside its support"):
            family.model(bad, *rest)


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (lambda: Flow((2,), support=UNIT, transform=MAF(**SMALL)), torch.tensor([[0.5, 1.5]])),
        (lambda: Flow((2,), support=constraints.positive, transform=MAF(**SMALL)), torch.tensor([[0.5, -1.5]])),
        (lambda: Flow((2,), transform=NCSF(**SMALL)), torch.tensor([[0.5, 3.5]])),
        (lambda: Autoregressive((2,), support=UNIT), torch.tensor([[0.5, 1.5]])),
        (lambda: VAE((2,), support=UNIT), torch.tensor([[0.5, 1.5]])),
    ],
    ids=["interval", "positive", "angles", "Autoregressive", "VAE"],
)
def test_values_outside_the_support_are_refused(build, x):
    with refused(ValueError, "outside its support", "in 1 places", "Rescale|Bring angles into the range"):
        build().model(x)


def test_what_holds_no_numbers_is_refused():
    for wrong in ("data", None, {"x": 1}, [["a"], ["b"]]):
        with refused(TypeError, "Flow.* wants numbers"):
            Flow((1,)).standardize(wrong)


@rows(lambda case: case.labelled)
def test_labels_out_of_range_or_not_integers_are_refused(case):
    family, (x, y) = case.build(), case.batch(4)
    for bad in (y + CLASSES, y - CLASSES):
        with refused(ValueError, r"Labels\(3\)", "from 0 to 2", "but found", "Renumber"):
            family.model(x, bad)
    with refused(ValueError, "wants integers", r"\.long\(\)"):
        family(y.float())


@rows(lambda case: case.conditional)
def test_a_missing_context_is_refused(case):
    family, x = case.build(), case.data(4)
    with refused(ValueError, "wants a context", "none", "context="):
        family()
    with refused(ValueError, "wants a context", "none", "context="):
        family.model(x)


@rows(lambda case: not case.conditional)
def test_a_superfluous_context_is_refused(case):
    family, x = case.build(), case.data(4)
    with refused(ValueError, "built without a context", r"context=2"):
        family(torch.randn(4, 2))
    with refused(ValueError, "built without a context"):
        family.model(x, torch.randn(4, 2))


@rows(lambda case: case.conditional)
def test_contexts_in_another_number_than_the_rows_are_refused(case):
    family = case.build()
    with refused(ValueError, "4 rows of x", "3 of context", "one context per row"):
        family.model(case.data(4), case.context(3))


@rows(lambda case: case.conditional and not case.labelled)
def test_contexts_of_another_length_or_kind_are_refused(case):
    family, x = case.build(), case.data(4)
    for bad in (torch.randn(4, 3), torch.zeros(4, 2, dtype=torch.long)):
        with refused(ValueError, "context of floats", "but found", r"Labels\(k\)"):
            family.model(x, bad)
    with refused(ValueError, "context", "NaN or infinite"):
        family.model(x, torch.full((4, 2), torch.nan))


@pytest.mark.parametrize("build", [Flow, Autoregressive, VAE])
@pytest.mark.parametrize("bad", [3, (0,), (-2,), (2.5,), ("3",), (3, 0), (True,), None])
def test_bad_event_shapes_are_refused(build, bad):
    with refused(ValueError, "event_shape", "positive integers", r"\(3,\)"):
        build(bad)


@pytest.mark.parametrize("bad", [-1, 2.0, "labels", True])
def test_bad_contexts_are_refused(bad):
    with refused(ValueError, "context", "Labels"):
        Flow((2,), context=bad)


def test_a_context_module_of_unknown_length_is_refused():
    with refused(ValueError, "context module", "out_features"):
        Flow((2,), context=nn.ReLU())


def test_a_size_less_than_the_rows_or_no_size_is_refused():
    flow = Flow((2,), transform=MAF(**SMALL))
    with refused(ValueError, "size=3", "4 rows"):
        flow.model(torch.randn(4, 2), size=3)
    with refused(ValueError, "size="):
        flow.model()


def test_gaussianization_flows_are_refused_with_the_reason():
    with refused(ValueError, "does not invert", "NSF"):
        Flow((2,), transform=GF())


@pytest.mark.parametrize("bad", [NSF, "NSF", 3])
def test_what_is_no_transform_is_refused(bad):
    with refused(TypeError, "NSF", *(["call it"] if bad is NSF else [])):
        Flow((2,), transform=bad)


@pytest.mark.parametrize("options", [{"support": UNIT}, {"levels": 4}])
def test_angles_go_with_neither_support_nor_levels(options):
    with refused(ValueError, "NCSF has the support", "leave out support and levels"):
        Flow((2,), transform=NCSF(), **options)


CHOICES = {
    "an integer transforms of 1 or more": [lambda v: NSF(transforms=v), [0, -1, 2.5, True, "3", None]],
    "an integer passes of 1 or more": [lambda v: MAF(passes=v), [0, -1, 1.5, True]],
    "an integer bins of 2 or more": [lambda v: NSF(bins=v), [0, 1, 1.5, True]],
    "an integer signal of 1 or more": [lambda v: NAF(signal=v), [0, 1.5]],
    "an integer degree of 1 or more": [lambda v: (BPF if v else SOSPF)(degree=v), [0, 1.5]],
    "an integer polynomials of 1 or more": [lambda v: SOSPF(polynomials=v), [0, "a"]],
    "an integer width of 1 or more": [lambda v: DenseField(width=v), [0, 2.5]],
    "an integer blocks of 0 or more": [lambda v: DenseField(blocks=v), [-1, True]],
    "DenseField wants an integer octaves of 0 or more": [lambda v: DenseField(octaves=v), [-1, 1.5]],
    "DenseGenerator wants an integer octaves of 0 or more": [lambda v: DenseGenerator(octaves=v), [-1, 1.5]],
    "DenseCritic wants an integer octaves of 0 or more": [lambda v: DenseCritic(octaves=v), [-1, 1.5]],
    "RestrictedBoltzmannMachine wants an integer num_hidden": [RestrictedBoltzmannMachine, [0, 1.5, "a", True]],
    "BoltzmannMachine wants": [BoltzmannMachine, [-1, 17, 2.5, True]],
    "NSF wants dropout as a number": [lambda v: NSF(dropout=v), [-0.1, 1.0, float("nan"), "a", True]],
    "DenseField wants dropout as a number": [lambda v: DenseField(dropout=v), [-0.1, 1.0, "a"]],
    "UNet wants dropout as a number": [lambda v: UNet(dropout=v), [-0.1, 1.0]],
    "A dense network wants dropout as a number": [lambda v: VAE((2,), dropout=v), [-0.1, 3, float("nan")]],
    "A masked network wants dropout as a number": [lambda v: Autoregressive((2,), dropout=v), [-0.1, 3, float("nan")]],
    "NSF wants hidden as a sequence": [lambda v: NSF(hidden=v), [3, (0,), [0], "ab", (2.5,), (True,), None]],
    "DenseEnergy wants hidden as a sequence": [lambda v: DenseEnergy(v), [3, (0,), "ab", None]],
    "DenseGenerator wants hidden as a sequence": [lambda v: DenseGenerator(v), [3, (0,)]],
    "DenseCritic wants hidden as a sequence": [lambda v: DenseCritic(v), [3, (0,)]],
    "ConvolutionalEnergy wants channels as a sequence": [lambda v: ConvolutionalEnergy(v), [8, (), (0,)]],
    "ConvolutionalGenerator wants channels as a sequence": [lambda v: ConvolutionalGenerator(v), [8, (), (0,)]],
    "ConvolutionalCritic wants channels as a sequence": [lambda v: ConvolutionalCritic(v), [8, (), (0,)]],
    "UNet wants channels": [lambda v: UNet(v), [8, (), (0,), (12,)]],
    "randperm as True or False": [lambda v: NSF(randperm=v), [3, "yes"]],
    "an integer levels of 2 or more": [lambda v: Flow((2,), levels=v), [1, 2.5, True]],
    "an integer num_classes of 2 or more": [CategoricalLikelihood, [1, "3", True]],
    "DiscretizedLogisticLikelihood wants": [DiscretizedLogisticLikelihood, [1, 4.5, "a", True]],
    "an integer components": [lambda v: DiscretizedLogisticLikelihood(4, components=v), [0, 1.5]],
    'scale="learned" or a positive number': [lambda v: NormalLikelihood(v), [-1.0, "fixed", float("nan"), float("inf"), True]],
    "a positive number as min_scale": [lambda v: NormalLikelihood(min_scale=v), [-1, 0, "a", float("nan")]],
    "kinetic as a number of 0 or more": [lambda v: ODEFlow((2,), kinetic=v), [-1, "a", True, float("nan")]],
    "drop_context as a number": [lambda v: Diffusion((2,), context=1, drop_context=v), [-1, 1, "a"]],
    "and no context": [lambda v: Diffusion((2,), drop_context=v), [0.5]],
    "noise as .lowest, highest.": [lambda v: EnergyModel((2,), noise=v), [("a", "b"), (float("nan"), 1), 3, (2, 1)]],
    "a string as its name": [lambda v: Flow((2,), name=v), [3]],
    "an integer size of 1 or more": [lambda v: Flow((2,)).model(size=v), [0, -1, 2.5, "a"]],
    "order wants": [lambda v: Autoregressive((2,), order=v), ["ab", [0, 0]]],
    "one context per row": [lambda v: Flow((2,), context=Labels(4)).model(torch.randn(2, 2), v), [3, [1]]],
}


@pytest.mark.parametrize(("words", "bad"), [(words, bad) for words, (_, many) in CHOICES.items() for bad in many])
def test_choices_that_make_no_sense_are_refused(words, bad):
    with pytest.raises((ValueError, TypeError), match=words):
        CHOICES[words][0](bad)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float16(0.5), np.int8(2)])
def test_numbers_may_be_those_of_numpy(number):
    assert ODEFlow((2,), kinetic=number, jacobian=number).kinetic == number
    assert Diffusion((2,), context=1, drop_context=0.1, guidance=number).guidance == number
    assert EnergyModel((2,), noise=(number, 2 * number)).noise == (number, 2 * number)


@pytest.mark.parametrize("bad", [0, -1, True, 2.5, "3", None])
def test_counts_that_are_no_positive_integers_are_refused(bad):
    with refused(ValueError, "Labels wants an integer num_classes of 1 or more", "found"):
        Labels(bad)
    with refused(ValueError, "VAE wants an integer latent_dim of 1 or more", "found"):
        VAE((2,), latent_dim=bad)


@pytest.mark.parametrize("build", [Autoregressive, VAE])
@pytest.mark.parametrize("bad", [3, (0,), (True,), ("3",)])
def test_widths_that_are_no_sequence_of_positive_integers_are_refused(build, bad):
    with refused(TypeError, "hidden as a sequence of positive integers", "found"):
        build((2,), hidden=bad)


@pytest.mark.parametrize("bad", [[0, 1], [0, 1, 1], [1, 2, 3], [0.0, 1.5, 2.0], [[0, 1, 2]]])
def test_an_order_that_is_no_permutation_is_refused(bad):
    with refused(ValueError, "order", r"permutation of 0 \.\. 2"):
        Autoregressive((3,), order=bad)


@pytest.mark.parametrize("build", [Autoregressive, VAE])
def test_integers_have_no_other_support(build):
    with refused(ValueError, "Categorical", "support", "Leave it out"):
        build((3,), likelihood=CategoricalLikelihood(4), support=UNIT)


@pytest.mark.parametrize("family", [Flow, ODEFlow, Diffusion, GAN, Autoregressive, VAE])
@pytest.mark.parametrize("support", [constraints.boolean, constraints.integer_interval(0, 3)])
def test_densities_over_the_reals_have_no_discrete_support(family, support):
    with refused(ValueError, "real numbers", "found", "leave support out"):
        family((2,), support=support)


def test_an_encoder_of_another_shape_is_refused():
    with refused(ValueError, "encoder should return", r"\(5, 4\)", r"\(5, 3\)"):
        VAE((3,), latent_dim=2, encoder=nn.Linear(3, 3)).guide(torch.randn(5, 3))


def test_an_encoders_pair_of_another_shape_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x.exp()

    with refused(ValueError, "encoder should return"):
        VAE((3,), latent_dim=2, encoder=Pair()).guide(torch.randn(5, 3))


def test_a_decoder_of_another_shape_is_refused():
    vae = VAE((3,), latent_dim=2, decoder=nn.Linear(2, 3))
    with refused(ValueError, "decoder should return", r"\(5, 3, 2\)", r"\(5, 3\)"):
        vae.model(torch.randn(5, 3))
    with refused(ValueError, "decoder should return"):
        vae().sample()


@pytest.mark.parametrize(
    "prior",
    [
        lambda: dist.Uniform(torch.zeros(2), 1.0).to_event(1),
        lambda: dist.Gamma(torch.ones(2), 1.0).to_event(1),
        lambda: dist.Bernoulli(torch.full((2,), 0.5)).to_event(1),
        lambda: dist.Dirichlet(torch.ones(2)),
        lambda: Flow((2,), support=UNIT, transform=MAF(**SMALL)),
        lambda: Flow((2,), transform=NCSF(**SMALL)),
        lambda: Flow((2,), transform=MAF(**SMALL), levels=4),
        lambda: Autoregressive((2,), likelihood=BernoulliLikelihood()),
    ],
    ids=["Uniform", "Gamma", "Bernoulli", "Dirichlet", "interval", "angles", "levels", "Autoregressive"],
)
def test_a_prior_that_does_not_cover_the_reals_is_refused(prior):
    with refused(ValueError, "prior must cover the reals", "support"):
        VAE((3,), prior=prior())


def test_a_prior_over_batches_of_scalars_is_refused():
    with refused(ValueError, "prior", "to_event"):
        VAE((3,), prior=dist.Normal(torch.zeros(2), 1.0))


def test_maximum_likelihood_refuses_a_vae_and_names_the_objective():
    vae = VAE((3,), hidden=(8,))
    with refused(ValueError, "latent variables", "'z'", "Trace_ELBO"):
        MaximumLikelihood().loss(vae.model, vae.guide, real(3)(5))


@pytest.mark.parametrize("levels", [5, 256, 2**16])
def test_a_discretised_logistic_can_be_one_level_for_sure(levels):
    """With 65,536 levels the smallest scale was 7.5 levels."""
    logistic = DiscretizedLogisticLikelihood(levels, components=1)(torch.tensor([0.0, 2 / (levels - 1) - 0.5, -50.0]))
    assert logistic.loc.item() == pytest.approx(1, abs=0.01)
    assert logistic.log_prob(torch.tensor(1)).exp().item() > 0.999


@rows(lambda case: case.density != "none")
def test_float64_values_have_log_densities_in_the_precision_of_the_family(case):
    family, batch = case.build().eval(), case.batch(4)
    double = [part.double() if part.is_floating_point() else part for part in batch]
    with torch.no_grad():
        assert family(*double[1:]).log_prob(double[0]).dtype == torch.float32
        assert family.double()(*batch[1:]).log_prob(batch[0]).dtype == torch.float64


# Constant and degenerate data.


def test_standardising_jointly_keeps_what_pixels_are_to_each_other(float64):
    """One mean and deviation of all coordinates; by default of U-Nets, whose filters see every pixel alike."""
    x = 3 + torch.arange(1.0, 17.0) * torch.randn(100, 16)
    family = Flow((4, 4), transform=MAF(**SMALL), standardize="jointly").double()
    family.standardize(x.reshape(-1, 4, 4))
    assert_close(family.loc, x.mean().expand(4, 4))
    assert_close(family.scale, x.std().expand(4, 4))
    for build in (Diffusion, ODEFlow):
        assert "jointly" in str(build((4, 4), network=UNet((8, 8)))._standardize)
        assert "jointly" not in str(build((4, 4), network=UNet((8, 8)), standardize=True)._standardize)
        assert "jointly" not in str(build((4, 4), network=DenseField(8, 1))._standardize)
        assert not build((4, 4), network=UNet((8, 8)), standardize=False)._standardize
    with pytest.raises(ValueError, match=r"or .jointly robust., but found 'each'"):
        Flow((2,), standardize="each")


@rows(lambda case: not case.discrete)
@pytest.mark.parametrize("n", [1, 6])
def test_constant_coordinates_and_single_rows_do_not_break_standardisation(case, n):
    family, (x, *rest) = case.build(), case.batch(1)
    batch = (x.expand(n, *case.event_shape), *(part.expand(n, *part.shape[1:]) for part in rest))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        family.model(*batch)
        assert torch.tensor(case.objective().loss(family.model, family.guide, *batch)).isfinite()
    told = {str(w.message) for w in caught if str(w.message).startswith(f"{family.name} ")}  # not of a base with its own units
    columns = len(family.loc) if getattr(getattr(family, "likelihood", None), "is_mixed", False) else 1
    wanted = columns if family._standardize else 0
    assert sum("constant in" in message and "data" in message for message in told) == wanted
    if case.conditional and not case.labelled:
        assert sum("constant in" in message and "contexts" in message for message in told) == 1
    assert torch.isfinite(family.scale).all()
    assert (family.scale > 0).all()


def test_importing_the_families_leaves_argument_validation_on():
    code = (
        "import torch; import pyro_genmodels.families; from torch.distributions import Distribution; "
        "assert Distribution._validate_args is True; torch.distributions.Normal(0.0, 1.0)\n"
        "try: torch.distributions.Normal(0.0, -1.0)\nexcept ValueError: pass\nelse: raise SystemExit('validation is off')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prior_without_its_family_is_refused():
    with pytest.raises(ValueError, match="the family that made this NormalizingFlow"):
        VAE((3,), prior=Flow((2,), transform=MAF(**SMALL))())


def test_a_name_is_one_familys_at_a_time():
    first = Flow((2,), transform=MAF(**SMALL), name="mine")
    second = Flow((2,), transform=MAF(**SMALL), name="mine")
    assert second.name == "mine"
    assert first.name.startswith("Flow_")


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.flow = Flow((2,), transform=MAF(**SMALL))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.flow(), obs=x)


def test_two_modules_with_a_family_of_one_name_both_train():
    x = torch.randn(20, 2)
    for net in (Net(), Net(), copy.deepcopy(Net())):
        before = [p.detach().clone() for p in net.parameters()]
        SVI(net, lambda x: None, pyro.optim.Adam({"lr": 0.1}), MaximumLikelihood()).step(x)
        assert all(not p.equal(q) for p, q in zip(net.parameters(), before, strict=True))


def test_the_store_of_others_is_left_alone():
    pyro.param("prior.temperature", torch.tensor(1.0))
    flow = Flow((2,), transform=MAF(**SMALL), name="prior").double()
    flow()
    assert "prior.temperature" in pyro.get_param_store()


def test_a_bayesian_decoder_draws_its_weights_once_outside_the_data():
    decoder = PyroModule[nn.Linear](2, 6)
    decoder.weight = PyroSample(dist.Normal(0.0, 1.0).expand([6, 2]).to_event(2))
    vae = VAE((3,), latent_dim=2, decoder=PyroModule[nn.Sequential](decoder, nn.Unflatten(1, (3, 2))), hidden=(4,))
    trace = pyro.poutine.trace(vae.model).get_trace(torch.randn(5, 3))
    (weight,) = [site for name, site in trace.nodes.items() if site["type"] == "sample" and name.endswith("weight")]
    assert weight["value"].shape == (6, 2)
    assert not weight["cond_indep_stack"]


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_data_at_an_end_of_an_interval_are_refused(end):
    flow, x = Flow((2,), transform=MAF(**SMALL), support=constraints.unit_interval), torch.rand(9, 2)
    x[3, 1] = end
    with pytest.raises(ValueError, match=r"1 values at an end of its support.*levels=K"):
        flow.model(x)


def test_a_support_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="cannot map the support"):
        Flow((3,), support=constraints.simplex)


def test_a_support_moves_along():
    flow = Flow((2,), transform=MAF(**SMALL), support=constraints.interval(torch.zeros(2), 2 * torch.ones(2)))
    assert flow.double().support.upper_bound.dtype == torch.float64
    assert flow().sample((5,)).dtype == torch.float64


def test_a_zuko_flow_of_ones_own_is_judged_as_ours_are():
    with pytest.raises(ValueError, match="GF"):
        Flow((3,), transform=zuko.flows.GF(3, 0, transforms=2))
    assert Flow((2,), transform=zuko.flows.NAF(2, 0, transforms=1))().numerical_inverse
    assert not Flow((2,), transform=zuko.flows.MAF(2, 0, transforms=1))().numerical_inverse


def test_a_new_family_takes_nothing_from_an_earlier_one_of_its_name():
    x = torch.randn(20, 2)
    for _ in range(2):
        flow = Flow((2,), transform=MAF(**SMALL), name="again")
        before = [p.detach().clone() for p in flow.parameters()]
        SVI(flow.model, flow.guide, pyro.optim.Adam({"lr": 0.1}), MaximumLikelihood()).step(x)
        assert all(not p.equal(q) for p, q in zip(flow.parameters(), before, strict=True))
        del flow


def test_a_pickled_family_is_renamed_only_where_its_name_is_taken():
    flow = VAE((2,), prior=Flow((2,), transform=MAF(**SMALL)), hidden=(4,))
    SVI(flow.model, flow.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(torch.randn(5, 2))
    pickled, name = pickle.dumps(flow), flow.name
    twin = pickle.loads(pickled)
    assert twin.name != name
    assert twin.prior.name == f"{twin.name}.prior"
    del flow, twin
    assert pickle.loads(pickled).name == name


@pytest.mark.parametrize("context", [0, 2, Labels(2)], ids=["alone", "vectors", "labels"])
def test_the_model_of_a_gan_has_the_parameters_of_its_generator_alone(context):
    """Or the generator's optimiser would train the critic too."""
    gan = GAN((2,), context=context)
    given = () if context == 0 else (torch.arange(5) % 2,) if isinstance(context, Labels) else (torch.randn(5, 2),)
    for _ in range(2):  # the first run standardises
        trace = pyro.poutine.trace(gan.model, param_only=True).get_trace(torch.randn(5, 2), *given)
        assert trace.param_nodes
        assert not [name for name in trace.param_nodes if "critic" in name]


# Messages about contexts.


@pytest.mark.parametrize(
    ("build", "given", "words"),
    [
        (partial(VAE, (2,), latent_dim=1), torch.zeros(5, 2), r"VAE\(\.\.\., context=2\)\. .* use log_likelihood\(family, x\)"),
        (partial(GAN, (2,)), torch.zeros(5, 2), r"use log_likelihood\(family, x\)"),
        (partial(Flow, (2,)), torch.zeros(5, 2), r"use family\(\)\.log_prob\(x\)"),
        (partial(Flow, (2,)), torch.zeros(5, 2).long(), r"context=2\) and pass it as floats\."),
        (partial(Flow, (2,)), torch.zeros(5).long(), r"context=Labels\(k\)\)\."),
    ],
    ids=["VAE", "GAN", "flow", "integer vectors", "classes"],
)
def test_a_superfluous_context_is_told_with_what_fits(build, given, words):
    with pytest.raises(ValueError, match=words):
        build()(given)


def test_labels_may_be_booleans():
    labels = torch.tensor([True, False])
    assert torch.equal(Labels(2)(labels), Labels(2)(labels.long()))
    with pytest.raises(ValueError, match="found 0 to 1"):
        Labels(1)(labels)


def test_a_context_far_outside_those_of_training_is_warned_of_once():
    """Draws for the year 3024 were those of all years."""
    years = 2023 + 3 * torch.rand(300, 1)
    flow = Flow((1,), context=1)
    flow.standardize(years - 2024, years)
    flow.eval()
    flow(years + 50)
    with pytest.warns(UserWarning, match=r"its coordinate 0 is 1\.1\de\+03 deviations from their mean") as caught:
        flow(years + 1000)
    assert caught[0].filename == __file__
    flow(years + 1000)
    for kind in ("robust", False):
        other = Flow((1,), context=1, standardize_context=kind)
        other.standardize(years - 2024, years)
        other.eval()(years + 1000)
    old = Flow((1,), context=1)  # of before 0.2: contexts were not standardised
    old.load_state_dict({n: v for n, v in old.state_dict().items() if not n.startswith("context.")})
    old.eval()(years)
