"""What every objective keeps: Pyro's two doors, scales, masks, particles, latent variables, errors and capture."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import SGD
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_genmodels import (
    MAF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    Dequantized,
    DiscretizedLogisticLikelihood,
    Flow,
    Labels,
    MaximumLikelihood,
    RealNVP,
)
from pyro_genmodels.infer import Objective

SMALL = {"transforms": 2, "hidden": (8,)}


def no_latents(*args, **kwargs):
    pass


def small_flow(**options):
    return Flow((2,), transform=MAF(**SMALL), standardize=False, **options)


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), allow_unused=True)


def assert_same(found, wanted, **tolerance):
    assert len(found) == len(wanted)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, **tolerance)


class NegativeELBO(Objective):
    """The objective that says what Pyro says."""

    def per_datum(self, dist, x):
        return -dist.log_prob(x)


# The doors.


FAMILIES = {
    "flow": (small_flow, lambda: torch.randn(6, 2)),
    "autoregressive": (
        lambda: Autoregressive((3,), likelihood=BernoulliLikelihood(), hidden=(8,), standardize=False),
        lambda: torch.randint(2, (6, 3)).float(),
    ),
}


@pytest.fixture(params=FAMILIES)
def family_and_data(request):
    family, data = FAMILIES[request.param]
    return family(), data()


def test_differentiable_loss_is_the_negative_log_likelihood(family_and_data):
    family, x = family_and_data
    loss = MaximumLikelihood().differentiable_loss(family.model, family.guide, x)
    wanted = -family().log_prob(x).sum()
    torch.testing.assert_close(loss, wanted)
    assert_same(gradients(loss, family.parameters()), gradients(wanted, family.parameters()))


def test_loss_is_the_number(family_and_data):
    family, x = family_and_data
    loss = MaximumLikelihood().loss(family.model, family.guide, x)
    assert isinstance(loss, float)
    assert loss == pytest.approx(-family().log_prob(x).sum().item())
    assert all(p.grad is None for p in family.parameters())


def test_loss_and_grads_adds_to_the_gradients(family_and_data):
    family, x = family_and_data
    wanted = gradients(-family().log_prob(x).sum(), family.parameters())
    for times in (1, 2):
        loss = MaximumLikelihood().loss_and_grads(family.model, family.guide, x)
        assert loss == pytest.approx(-family().log_prob(x).sum().item())
        assert_same([p.grad for p in family.parameters()], [times * w for w in wanted])


@pytest.mark.parametrize("call", [lambda f: (f,), lambda f: (f.model, f.guide), lambda f: (f.model, no_latents)])
def test_the_module_has_the_loss_and_the_parameters(family_and_data, call):
    family, x = family_and_data
    loss = MaximumLikelihood()(*call(family))
    assert {id(p) for p in loss.parameters()} == {id(p) for p in family.parameters()}
    before = [p.detach().clone() for p in family.parameters()]
    wanted = gradients(-family().log_prob(x).sum(), family.parameters())
    optimiser = torch.optim.SGD(loss.parameters(), lr=1e-2)
    value = loss(x)
    assert value.item() == pytest.approx(-family().log_prob(x).sum().item())
    value.backward()
    optimiser.step()
    assert_same(list(family.parameters()), [b - 1e-2 * w for b, w in zip(before, wanted, strict=True)])


def test_a_step_of_svi_follows_the_same_gradient(family_and_data):
    family, x = family_and_data
    before = [p.detach().clone() for p in family.parameters()]
    wanted = gradients(-family().log_prob(x).sum(), family.parameters())
    value = -family().log_prob(x).sum().item()
    svi = SVI(family.model, family.guide, SGD({"lr": 1e-2}), loss=MaximumLikelihood())
    assert svi.evaluate_loss(x) == pytest.approx(value)
    assert svi.step(x) == pytest.approx(value)
    assert_same(list(family.parameters()), [b - 1e-2 * w for b, w in zip(before, wanted, strict=True)])


def test_a_function_alone_is_a_model():
    x = torch.randn(4)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    torch.testing.assert_close(MaximumLikelihood()(model)(x), -dist.Normal(0.0, 1.0).log_prob(x).sum())


def test_parameters_of_models_that_hold_families_are_found():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = small_flow()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", self.flow(), obs=x)

    model = Model()
    loss = MaximumLikelihood()(model, no_latents)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in model.flow.parameters()}
    loss(torch.randn(3, 2)).backward()
    assert all(p.grad is not None for p in model.flow.parameters())


def test_parameters_behind_handlers_are_found():
    flow, x = small_flow(), torch.randn(4, 2)
    loss = MaximumLikelihood()(poutine.scale(flow.model, scale=0.5))
    assert {id(p) for p in loss.parameters()} == {id(p) for p in flow.parameters()}
    torch.testing.assert_close(loss(x), -0.5 * flow().log_prob(x).sum())


def test_a_context_may_be_named():
    flow, x, c = small_flow(context=1), torch.randn(4, 2), torch.randn(4, 1)
    torch.testing.assert_close(MaximumLikelihood()(flow)(x, context=c), -flow(c).log_prob(x).sum())
    svi = SVI(flow.model, flow.guide, SGD({"lr": 1e-3}), loss=MaximumLikelihood())
    assert svi.step(x, context=c) > 0


def test_one_objective_serves_many_models():
    objective, a, b, x = MaximumLikelihood(), small_flow(), small_flow(context=1), torch.randn(3, 2)
    torch.testing.assert_close(objective(a)(x), -a().log_prob(x).sum())
    c = torch.randn(3, 1)
    torch.testing.assert_close(objective(b)(x, c), -b(c).log_prob(x).sum())


# Scales and masks.


def ml(model, *args, **options):
    call = options.pop("call", {})
    return MaximumLikelihood(**options).differentiable_loss(model, no_latents, *args, **call)


def test_size_scales_a_minibatch():
    flow, x = small_flow(), torch.randn(4, 2)
    torch.testing.assert_close(ml(flow.model, x, call={"size": 20}), -5 * flow().log_prob(x).sum())


def test_a_subsampled_plate_is_scaled():
    flow, x = small_flow(), torch.randn(6, 2)
    rows_seen = []

    def model(x):
        with pyro.plate("data", 6, subsample_size=2) as rows:
            rows_seen.append(rows)
            pyro.sample("x", flow(), obs=x[rows])

    torch.testing.assert_close(ml(model, x), -3 * flow().log_prob(x[rows_seen[-1]]).sum())


@pytest.mark.parametrize("how", ["dist.mask", "poutine.mask", "both"])
def test_masked_rows_do_not_count(how):
    flow, x = small_flow(), torch.randn(5, 2)
    present = torch.tensor([True, False, True, True, False])

    def model(x):
        d = flow().expand((5,))
        with pyro.plate("data", 5), poutine.mask(mask=present if how != "dist.mask" else torch.ones(5).bool()):
            pyro.sample("x", d if how == "poutine.mask" else d.mask(present), obs=x)

    loss = ml(model, x)
    wanted = -flow().log_prob(x[present]).sum()
    torch.testing.assert_close(loss, wanted)
    assert_same(gradients(loss, flow.parameters()), gradients(wanted, flow.parameters()))


def test_a_site_masked_as_a_whole_adds_nothing():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", small_flow()().mask(False), obs=x)

    assert ml(model, torch.randn(3, 2)) == 0


def test_masks_inside_and_outside_of_to_event():
    x, present = torch.randn(4, 3), torch.tensor([[True, False, True]]).expand(4, 3)

    def model(x):
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(torch.zeros(4, 3), 1.0).mask(present).to_event(1), obs=x)

    torch.testing.assert_close(ml(model, x), -dist.Normal(0.0, 1.0).log_prob(x[present]).sum())


def test_poutine_scale_multiplies():
    flow, x = small_flow(), torch.randn(4, 2)
    torch.testing.assert_close(ml(poutine.scale(flow.model, scale=0.25), x), -0.25 * flow().log_prob(x).sum())
    each = torch.rand(4)
    torch.testing.assert_close(ml(poutine.scale(flow.model, scale=each), x), -(each * flow().log_prob(x)).sum())


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_are_averaged(vectorize):
    flow, x = small_flow(context=1), torch.randn(4, 2)
    c = torch.randn(4, 1)
    loss = ml(flow.model, x, c, num_particles=3, vectorize_particles=vectorize)
    wanted = -flow(c).log_prob(x).sum()
    torch.testing.assert_close(loss, wanted)
    assert_same(gradients(loss, flow.parameters()), gradients(wanted, flow.parameters()))


@pytest.mark.parametrize("vectorize", [False, True])
def test_nested_plates_and_ordinary_distributions(vectorize):
    x, y = torch.randn(3, 4, 2), torch.randn(3, 4)

    def model(x, y):
        with pyro.plate("outer", 6, subsample=torch.arange(3), dim=-2), pyro.plate("inner", 4, dim=-1):
            pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1), obs=x)
            with poutine.scale(scale=0.5):
                pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)

    wanted = -2 * (dist.Normal(0.0, 2.0).log_prob(x).sum() + 0.5 * dist.Normal(x.sum(-1), 1.0).log_prob(y).sum())
    torch.testing.assert_close(ml(model, x, y, num_particles=2, vectorize_particles=vectorize), wanted)


def test_sequential_plates_are_scaled():
    x = torch.randn(6)

    def model(x):
        for i in pyro.plate("data", 6, subsample=torch.arange(2)):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0), obs=x[i])

    torch.testing.assert_close(ml(model, x), -3 * dist.Normal(0.0, 1.0).log_prob(x[:2]).sum())


def test_a_context_over_two_plates_and_a_flow_declared_an_event():
    flow, x, c = small_flow(context=1), torch.randn(3, 4, 2), torch.randn(3, 4, 1)

    def model(x, c):
        with pyro.plate("data", 3):
            pyro.sample("x", flow(c).to_event(1), obs=x)

    torch.testing.assert_close(ml(model, x, c), -flow(c).log_prob(x).sum())


def test_families_and_ordinary_likelihoods_mix():
    flow, labels = small_flow(context=Labels(3)), Autoregressive((1,), likelihood=BernoulliLikelihood(), context=2, hidden=(4,))
    x, y, k = torch.randn(5, 2), torch.randint(2, (5, 1)).float(), torch.tensor([0, 2, 1, 1, 0])

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow, self.labels = flow, labels
            self.logits = torch.nn.Parameter(torch.zeros(3))

        def forward(self, x, y, k):
            with pyro.plate("data", len(x)):
                pyro.sample("k", dist.Categorical(logits=self.logits), obs=k)
                pyro.sample("x", self.flow(k), obs=x)
                pyro.sample("y", self.labels(x), obs=y)

    model = Model()
    loss = MaximumLikelihood()(model)
    wanted = -(dist.Categorical(logits=model.logits).log_prob(k) + flow(k).log_prob(x) + labels(x).log_prob(y)).sum()
    torch.testing.assert_close(loss(x, y, k), wanted)
    assert_same(gradients(loss(x, y, k), loss.parameters()), gradients(wanted, loss.parameters()))
    assert len(list(loss.parameters())) == len([*flow.parameters(), *labels.parameters()]) + 1


def test_factors_and_deterministic_sites_do_not_disturb():
    x = torch.randn(4)

    def model(x):
        pyro.factor("prior", torch.tensor(-1.5))
        with pyro.plate("data", 4):
            pyro.deterministic("twice", 2 * x)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    torch.testing.assert_close(ml(model, x), 1.5 - dist.Normal(0.0, 1.0).log_prob(x).sum())


def test_a_lower_bound_can_be_maximised():
    base = small_flow()
    x = torch.randint(4, (5, 2))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Dequantized(base(), levels=4), obs=x)

    loss = ml(model, x)
    assert loss.isfinite()
    assert all(g is not None for g in gradients(loss, base.parameters()))


def test_per_datum_is_given_our_distribution_out_of_its_wrappers():
    seen = []

    class Watching(Objective):
        def per_datum(self, dist, x):
            seen.append(dist)
            return dist.log_prob(x)

    flow, x = small_flow(context=1), torch.randn(3, 4, 2)

    def model(x):
        with pyro.plate("data", 3):
            pyro.sample("x", flow(torch.zeros(3, 4, 1)).to_event(1).mask(torch.tensor([True, False, True])), obs=x)

    loss = Watching().differentiable_loss(model, no_latents, x)
    assert type(seen[0]) is type(flow(torch.zeros(1)))
    torch.testing.assert_close(loss, flow(torch.zeros(1)).log_prob(x)[[0, 2]].sum())


# Errors.


def test_latent_variables_are_refused_and_trace_elbo_is_named():
    vae = VAE((2,), latent_dim=1, hidden=(4,))
    with pytest.raises(ValueError, match=r"'z'.*Trace_ELBO"):
        MaximumLikelihood().loss(vae.model, vae.guide, torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"'z'.*Trace_ELBO"):
        MaximumLikelihood()(vae)(torch.randn(3, 2))


def test_a_vae_as_likelihood_is_refused_and_trace_elbo_is_named():
    vae = VAE((2,), latent_dim=1, hidden=(4,))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("image", vae(), obs=x)

    with pytest.raises(ValueError, match=re.compile(r"'image'.*Implicit.*no density.*Trace_ELBO", re.S)):
        MaximumLikelihood().loss(model, no_latents, torch.randn(3, 2))


def test_a_vae_as_likelihood_is_refused_inside_wrappers_too():
    vae = VAE((2,), latent_dim=1, hidden=(4,))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("image", vae().expand((3,)).mask(torch.ones(3).bool()), obs=x)

    with pytest.raises(ValueError, match="Trace_ELBO"):
        MaximumLikelihood().loss(model, no_latents, torch.randn(3, 2))


def test_a_missing_plate_is_noticed():
    def model(x):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="x"):
        MaximumLikelihood().loss(model, no_latents, torch.randn(3))


# Latent variables: the same as Trace_ELBO.


class Regression(PyroModule):
    """Global and local latent variables, reparametrised."""

    def __init__(self):
        super().__init__()
        self.slope = PyroSample(dist.Normal(0.0, 1.0))
        self.noise = torch.nn.Parameter(torch.tensor(0.3))
        self.loc, self.scale = torch.nn.Parameter(torch.tensor(0.2)), torch.nn.Parameter(torch.tensor(-0.5))
        self.shift = torch.nn.Parameter(torch.zeros(()))

    @pyro.nn.pyro_method
    def model(self, x, y):
        slope = self.slope
        with pyro.plate("data", 8, subsample=torch.arange(4)):
            with poutine.mask(mask=torch.tensor([True, True, False, True])):
                local = pyro.sample("local", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.scale(scale=0.7):
                pyro.sample("y", dist.Normal(slope * x + local.sum(-1), self.noise.exp()), obs=y)

    @pyro.nn.pyro_method
    def guide(self, x, y):
        pyro.sample("slope", dist.Normal(self.loc, self.scale.exp()))
        with pyro.plate("data", 8, subsample=torch.arange(4)):
            pyro.sample("local", dist.Normal((self.shift * y).unsqueeze(-1).expand(4, 2), self.scale.exp()).to_event(1))


def same_as_trace_elbo(model, guide, parameters, args, **options):
    found = []
    for elbo in (Trace_ELBO(**options), NegativeELBO(**options)):
        pyro.set_rng_seed(7)
        loss = elbo.differentiable_loss(model, guide, *args)
        found.append((loss.detach(), gradients(loss, parameters)))
        pyro.set_rng_seed(7)
        assert elbo.loss(model, guide, *args) == pytest.approx(loss.item(), rel=1e-5)
        pyro.set_rng_seed(7)
        assert elbo.loss_and_grads(model, guide, *args) == pytest.approx(loss.item(), rel=1e-5)
        for p, g in zip(parameters, found[-1][1], strict=True):
            torch.testing.assert_close(p.grad, g)
            p.grad = None
    torch.testing.assert_close(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])


PARTICLES = {
    "one": {},
    "three": {"num_particles": 3},
    "vectorised": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1},
}


@pytest.mark.parametrize("options", PARTICLES.values(), ids=PARTICLES)
def test_latents_with_a_reparametrised_guide(options):
    pair = Regression()
    same_as_trace_elbo(pair.model, pair.guide, list(pair.parameters()), (torch.randn(4), torch.randn(4)), **options)


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("options", PARTICLES.values(), ids=PARTICLES)
def test_latents_with_an_autoguide(autoguide, options):
    flow, x = small_flow(context=1), torch.randn(4, 2)

    def model(x):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Normal(slope, 1.0).to_event(1))
            pyro.sample("x", flow(c), obs=x)

    guide = autoguide(model)
    guide(x)
    same_as_trace_elbo(model, guide, [*flow.parameters(), *guide.parameters()], (x,), **options)


@pytest.mark.parametrize("options", PARTICLES.values(), ids=PARTICLES)
def test_latents_of_a_vae(options):
    vae = VAE((3,), latent_dim=2, likelihood=BernoulliLikelihood(), prior=small_flow(), hidden=(8,))
    x = torch.randint(2, (5, 3)).float()
    same_as_trace_elbo(vae.model, vae.guide, list(vae.parameters()), (x,), **options)


class Switch(PyroModule):
    """A Bernoulli latent for every row, with a guide that cannot be reparametrised."""

    def __init__(self):
        super().__init__()
        self.prior, self.locs = torch.nn.Parameter(torch.tensor(0.4)), torch.nn.Parameter(torch.tensor([-1.0, 0.5]))
        self.weight, self.bias = torch.nn.Parameter(torch.tensor(0.7)), torch.nn.Parameter(torch.tensor(-0.2))

    def terms(self, x, z):
        return (
            dist.Bernoulli(logits=self.prior).log_prob(z) + dist.Normal(self.locs[z.long()], 1.0).log_prob(x),
            dist.Bernoulli(logits=self.weight * x + self.bias).log_prob(z),
        )

    def exact_loss(self, x):
        both = [self.terms(x, torch.full_like(x, z)) for z in (0.0, 1.0)]
        return -sum((log_q.exp() * (log_p - log_q)).sum() for log_p, log_q in both)

    @pyro.nn.pyro_method
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior))
            pyro.sample("x", dist.Normal(self.locs[z.long()], 1.0), obs=x)

    @pyro.nn.pyro_method
    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.weight * x + self.bias))


@pytest.mark.parametrize("options", PARTICLES.values(), ids=PARTICLES)
def test_latents_with_a_guide_that_is_not_reparametrised(options):
    pair = Switch()
    same_as_trace_elbo(pair.model, pair.guide, list(pair.parameters()), (torch.randn(4),), **options)


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_score_function_gradient_is_that_of_the_exact_sum(vectorize):
    """100 estimates; six standard errors, two-sided, for each of 6 numbers: a false-alarm rate below 1e-6."""
    pair, x = Switch(), torch.tensor([-1.0, 0.3, 1.2])
    exact = pair.exact_loss(x)
    wanted = torch.cat([exact.detach().reshape(1), *(g.reshape(-1) for g in gradients(exact, pair.parameters()))])
    options = {"num_particles": 20, "vectorize_particles": True} if vectorize else {"num_particles": 2}
    objective, found = NegativeELBO(**options), []
    for _ in range(100):
        loss = objective.differentiable_loss(pair.model, pair.guide, x)
        found.append(torch.cat([loss.detach().reshape(1), *(g.reshape(-1) for g in gradients(loss, pair.parameters()))]))
    found = torch.stack(found)
    assert ((found.mean(0) - wanted).abs() < 6 * found.std(0) / 10).all()


def test_another_word_for_the_data_leaves_the_latent_terms_alone():
    class Doubled(Objective):
        def per_datum(self, dist, x):
            return -2 * dist.log_prob(x)

    vae = VAE((3,), latent_dim=2, likelihood=BernoulliLikelihood(), hidden=(8,), standardize=False)
    x = torch.randint(2, (5, 3)).float()
    pyro.set_rng_seed(3)
    once = NegativeELBO().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(3)
    twice = Doubled().loss(vae.model, vae.guide, x)
    pyro.set_rng_seed(3)
    guide = poutine.trace(vae.guide).get_trace(x)
    trace = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    trace.compute_log_prob()
    assert twice - once == pytest.approx(-trace.nodes["x"]["log_prob_sum"].item(), rel=1e-5)


def test_training_leaves_nothing_of_a_loss_behind():
    flow, x = small_flow(), torch.randn(4, 2)
    objective = MaximumLikelihood(num_particles=2, vectorize_particles=True)
    first = objective.loss(flow.model, flow.guide, x)
    assert objective.loss(flow.model, flow.guide, x) == first


# One graph.


CAPTURED = {
    "coupling flow": (lambda: Flow((2,), transform=RealNVP(**SMALL)), lambda: torch.randn(6, 2)),
    "autoregressive flow": (lambda: Flow((2,), transform=MAF(**SMALL)), lambda: torch.randn(6, 2)),
    "Bernoulli": FAMILIES["autoregressive"],
    "logistic": (
        lambda: Autoregressive((3,), likelihood=DiscretizedLogisticLikelihood(5, components=2), hidden=(8,)),
        lambda: torch.randint(5, (6, 3)),
    ),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_loss_and_its_gradient_are_captured_as_one_graph(name):
    make, data = CAPTURED[name]
    family, x, fresh = make(), data(), data()
    family.model(x)
    family.eval()
    parameters = list(family.parameters())

    def step(x):
        loss = MaximumLikelihood().differentiable_loss(family.model, family.guide, x)
        return loss, *torch.autograd.grad(loss, parameters)

    with pyro.validation_enabled(False):
        graph = make_fx(step)(x)
        for rows in (x, fresh):
            assert_same(graph(rows), step(rows))
        with torch.no_grad():
            for p in parameters:
                p.add_(0.1 * torch.randn_like(p))
        assert_same(graph(fresh), step(fresh))
    truth = -family().log_prob(fresh).sum()
    assert_same(graph(fresh), [truth, *gradients(truth, parameters)])


def test_a_captured_loss_with_scales_masks_and_particles():
    flow, x = small_flow(), torch.randn(4, 2)
    present = torch.tensor([True, True, False, True])

    def step(x):
        model = poutine.mask(poutine.scale(flow.model, scale=0.5), mask=present)
        objective = MaximumLikelihood(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        return objective.differentiable_loss(model, flow.guide, x, size=8)

    with pyro.validation_enabled(False):
        graph = make_fx(step)(x)
    fresh = torch.randn(4, 2)
    torch.testing.assert_close(graph(fresh), -flow().log_prob(fresh)[present].sum())


def test_a_loss_with_latents_is_captured_with_its_random_numbers():
    vae = VAE((3,), latent_dim=2, likelihood=BernoulliLikelihood(), hidden=(8,))
    x = torch.randint(2, (5, 3)).float()

    def step(x):
        return NegativeELBO().differentiable_loss(vae.model, vae.guide, x)

    with pyro.validation_enabled(False):
        graph = make_fx(step)(x)
        pyro.set_rng_seed(5)
        wanted = step(x)
        pyro.set_rng_seed(5)
        torch.testing.assert_close(graph(x), wanted)


def test_what_the_model_rules_out_costs_infinitely_much():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(0.0, 1.0, validate_args=False), obs=x)

    assert MaximumLikelihood().loss(model, lambda x: None, torch.tensor([2.0])) == float("inf")
