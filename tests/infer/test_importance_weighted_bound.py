"""The importance-weighted bound and its gradients, on models whose evidence and posterior are known."""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.testing import assert_close

from pyro_genmodels import VAE, CompiledSVI
from pyro_genmodels.infer import ImportanceWeightedELBO
from pyro_genmodels.infer.compiled import Captured
from pyro_genmodels.infer.importance_weighted_bound import GRADIENTS

X = 1.0
LOG_EVIDENCE = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(X)).item()


def normal_model(rows, x=X):
    """The posterior of each row is Normal(x / 2, sqrt(1/2))."""

    def model():
        shift = pyro.param("shift", torch.zeros(()))
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.as_tensor(x).expand(rows))

    return model


def normal_guide(rows, loc, scale):
    """A guide with parameters of its own for each row, so that one backward pass gives a gradient for each."""

    def guide():
        loc_, scale_ = pyro.param("loc", torch.full((rows,), loc)), pyro.param("scale", torch.full((rows,), scale))
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Normal(loc_, scale_))

    return guide


def gradients(objective, model, guide, seed=0):
    """Return the loss and the gradients by name."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    with pyro.poutine.trace(param_only=True) as capture:
        loss = objective.differentiable_loss(model, guide)
    found = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
    grads = torch.autograd.grad(loss, list(found.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(found, grads, strict=True))


@pytest.mark.parametrize("num_particles", [1, 5])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("vectorize", [False, True])
def test_an_exact_guide_has_the_evidence_and_no_gradient_along_the_draws(num_particles, gradient, vectorize):
    objective = ImportanceWeightedELBO(num_particles, gradient=gradient, vectorize_particles=vectorize)
    loss, grads = gradients(objective, normal_model(3), normal_guide(3, X / 2, 0.5**0.5))
    assert_close(loss, torch.tensor(-3 * LOG_EVIDENCE))
    if gradient != "plain":
        assert_close(grads["loc"], torch.zeros(3), atol=1e-5, rtol=0)
        assert_close(grads["scale"], torch.zeros(3), atol=1e-5, rtol=0)


def test_one_draw_is_the_evidence_lower_bound_of_pyro():
    vae, x = VAE((3,), latent_dim=2, hidden=(8,)), torch.randn(7, 3)
    results = []
    for objective in (Trace_ELBO(), ImportanceWeightedELBO(1, gradient="plain")):
        vae.zero_grad()
        pyro.set_rng_seed(1)
        loss = objective.differentiable_loss(vae.model, vae.guide, x)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in vae.parameters() if p.grad is not None]))
    assert_close(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_bound_rises_with_the_number_of_draws_towards_the_evidence():
    """False-alarm rate of 1e-6: means over 20,000 rows, with five standard errors."""
    rows, bounds = 20_000, []
    for k in (1, 4, 64):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = ImportanceWeightedELBO(k, vectorize_particles=True).loss(normal_model(rows), normal_guide(rows, 0.0, 1.0))
        bounds.append(-loss / rows)
    elbo = LOG_EVIDENCE - torch.distributions.kl_divergence(dist.Normal(0.0, 1.0), dist.Normal(X / 2, 0.5**0.5)).item()
    assert abs(bounds[0] - elbo) < 5 * 1.6 / rows**0.5  # one weight has a deviation of 1.58
    assert bounds[0] < bounds[1] < bounds[2] < LOG_EVIDENCE + 0.001
    assert bounds[2] > LOG_EVIDENCE - 0.02


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_parameters_of_the_model_have_the_same_gradient_by_all(gradient):
    model, guide = normal_model(4), normal_guide(4, 0.1, 0.8)
    _, plain = gradients(ImportanceWeightedELBO(6, gradient="plain"), model, guide)
    _, found = gradients(ImportanceWeightedELBO(6, gradient=gradient), model, guide)
    assert_close(found["shift"], plain["shift"], rtol=1e-4, atol=1e-5)


def two_layers(rows):
    def model():
        with pyro.plate("rows", rows):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b.sin() + a, 0.5), obs=torch.full((rows,), X))

    def guide():
        loc, weight = pyro.param("loc", torch.full((rows,), 0.3)), pyro.param("scale", torch.full((rows,), 0.7))
        with pyro.plate("rows", rows):
            a = pyro.sample("a", dist.Normal(loc, 0.8))
            pyro.sample("b", dist.Normal(weight * a + loc, weight.abs() + 0.5))

    return model, guide


@pytest.mark.parametrize("pair", ["one layer", "two layers"])
def test_the_doubly_reparametrised_gradient_is_unbiased(pair):
    """False-alarm rate of 4e-6: the means over 30,000 rows of it and of the plain one are within five standard errors."""
    rows = 30_000
    model, guide = (normal_model(rows), normal_guide(rows, 0.0, 1.2)) if pair == "one layer" else two_layers(rows)
    _, plain = gradients(ImportanceWeightedELBO(4, gradient="plain", vectorize_particles=True), model, guide)
    _, found = gradients(
        ImportanceWeightedELBO(4, gradient="doubly_reparametrised", vectorize_particles=True), model, guide, seed=1
    )
    for name in ("loc", "scale"):
        error = ((plain[name].var() + found[name].var()) / rows).sqrt()
        assert abs(plain[name].mean() - found[name].mean()) < 5 * error
        assert found[name].std() < plain[name].std()


def test_the_signal_of_the_plain_gradient_falls_with_the_number_of_draws():
    """Ratios of mean to deviation over 20,000 rows have errors of 0.01; they differ by more than ten of these."""
    rows, ratios = 20_000, {}
    for gradient, k in product(("plain", "doubly_reparametrised"), (2, 64)):
        objective = ImportanceWeightedELBO(k, gradient=gradient, vectorize_particles=True)
        _, grads = gradients(objective, normal_model(rows), normal_guide(rows, 0.0, 1.2))
        ratios[gradient, k] = float(grads["loc"].mean().abs() / grads["loc"].std())
    assert ratios["plain", 64] < ratios["plain", 2] - 0.1
    assert ratios["doubly_reparametrised", 64] > ratios["doubly_reparametrised", 2] + 0.1


@pytest.mark.parametrize("k", [1, 3])
def test_discrete_draws_have_the_gradient_of_the_enumerated_bound(k):
    """False-alarm rate of 6e-7: the mean over 40,000 rows is within five standard errors of the sum over all outcomes."""
    rows, prior, likelihood = 40_000, torch.tensor([0.7, 0.3]), torch.tensor([0.2, 0.9])

    def model():
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Bernoulli(prior[1]))
            pyro.sample("x", dist.Bernoulli(likelihood[z.long()]), obs=torch.ones(rows))

    def guide():
        logits = pyro.param("logits", torch.full((rows,), 0.4))
        with pyro.plate("rows", rows):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    _, found = gradients(ImportanceWeightedELBO(k, vectorize_particles=True), model, guide)
    logit = torch.tensor(0.4, requires_grad=True)
    q = torch.stack([-torch.nn.functional.softplus(logit), -torch.nn.functional.softplus(-logit)])
    log_w = (prior * likelihood).log() - q
    loss = -sum(
        q[list(z)].sum().exp() * (log_w[list(z)].logsumexp(0) - torch.tensor(float(k)).log()) for z in product((0, 1), repeat=k)
    )
    (expected,) = torch.autograd.grad(loss, logit)
    assert abs(found["logits"].mean() - expected) < 5 * found["logits"].std() / rows**0.5


@pytest.mark.parametrize("vectorize", [False, True])
def test_rows_of_a_subsampled_plate_are_the_same_for_all_draws_and_scaled(vectorize):
    x = torch.linspace(-3, 3, 12)

    def model():
        with pyro.plate("rows", 12, subsample_size=4) as rows:
            seen.append(rows)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide():
        with pyro.plate("rows", 12, subsample_size=4) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    seen = []
    pyro.set_rng_seed(0)
    loss = ImportanceWeightedELBO(5, vectorize_particles=vectorize, max_plate_nesting=1).loss(model, guide)
    assert all(torch.equal(rows, seen[0]) for rows in seen)
    expected = -3 * dist.Normal(0.0, 2**0.5).log_prob(x[seen[0]]).sum()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_variable_of_all_rows_has_one_bound(vectorize):
    y = torch.tensor([0.5, 1.5, 1.0])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide():
        pyro.sample("z", dist.Normal(y.sum() / 4, 0.5))

    evidence = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + torch.ones(3, 3)).log_prob(y)
    loss = ImportanceWeightedELBO(4, vectorize_particles=vectorize).loss(model, guide)
    assert loss == pytest.approx(-evidence.item(), rel=1e-5)


def test_a_guide_of_pyro_is_trained_to_the_posterior():
    def model():
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Poisson(z), obs=torch.tensor(4.0))

    guide = AutoNormal(model)
    objective = ImportanceWeightedELBO(8)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), objective)
    for _ in range(150):
        svi.step()
    z = torch.linspace(1e-3, 30, 100_000)
    evidence = torch.trapezoid(
        (dist.LogNormal(0.0, 1.0).log_prob(z) + dist.Poisson(z).log_prob(torch.tensor(4.0))).exp(), z
    ).log()
    assert -ImportanceWeightedELBO(100).loss(model, guide) == pytest.approx(evidence.item(), abs=0.1)


@pytest.mark.parametrize("gradient", [pytest.param("plain", marks=pytest.mark.slow), "doubly_reparametrised"])
def test_captured_steps_are_those_of_svi(gradient):
    x, losses = torch.randn(6, 3), []
    for cls, options in ((SVI, {}), (CompiledSVI, {"mode": Captured()})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae = VAE((3,), latent_dim=2, hidden=(8,), name="vae")
        objective = ImportanceWeightedELBO(4, gradient=gradient)
        svi = cls(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), objective, **options)
        losses.append(torch.tensor([svi.step(x) for _ in range(6)]))
    assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="num_particles"):
        ImportanceWeightedELBO(0)
    with pytest.raises(ValueError, match="gradient among plain"):
        ImportanceWeightedELBO(gradient="best")

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    with pytest.raises(ValueError, match="wants reparametrised draws, but those of z are not"):
        ImportanceWeightedELBO(gradient="doubly_reparametrised").differentiable_loss(model, guide)
    with pytest.raises(ValueError, match="has none for z"):
        ImportanceWeightedELBO().loss(model, lambda: None)
