"""The bound with a weight of the divergence, against Pyro's own bounds, closed forms and enumeration."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch.distributions import kl_divergence
from torch.testing import assert_close

from pyro_genmodels import VAE, CompiledSVI, EnergyModel, Flow, train
from pyro_genmodels.infer import CyclicalAnnealing, KLWeightedELBO, LinearAnnealing
from pyro_genmodels.infer.compiled import Captured
from pyro_genmodels.training import Checkpoint


@pytest.fixture(name="vae")
def _vae():
    return VAE((4,), latent_dim=3, hidden=(8,))


def loss_and_gradients(objective, model, guide, *args, seed=0, **kwargs):
    """Return the loss, and all gradients as one vector."""
    pyro.set_rng_seed(seed)
    with poutine.trace(param_only=True) as capture:
        loss = objective.differentiable_loss(model, guide, *args, **kwargs)
    parameters = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([g.flatten() for g in grads])


def test_weight_one_is_pyros_bound_with_exact_divergences(vae):
    x = torch.randn(6, 4)
    found = loss_and_gradients(KLWeightedELBO(), vae.model, vae.guide, x, size=30)
    assert_close(found, loss_and_gradients(TraceMeanField_ELBO(), vae.model, vae.guide, x, size=30))


def test_weight_one_is_pyros_bound_where_the_divergence_is_not_known():
    vae = VAE((4,), prior=Flow((2,)), hidden=(8,))
    x = torch.randn(6, 4)
    found = loss_and_gradients(KLWeightedELBO(), vae.model, vae.guide, x)
    assert_close(found, loss_and_gradients(Trace_ELBO(), vae.model, vae.guide, x))


@pytest.mark.parametrize("vectorize", [False, True])
def test_weight_multiplies_the_divergence(vae, vectorize):
    x = torch.randn(6, 4)
    options = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    values = [loss_and_gradients(KLWeightedELBO(w, **options), vae.model, vae.guide, x)[0] for w in (0.0, 1.0, 4.0)]
    with torch.no_grad():
        q = vae.posterior(x).base_dist
        divergence = kl_divergence(q, dist.Normal(torch.zeros(3), 1.0)).sum()
    assert_close(values[1] - values[0], divergence)
    assert_close(values[2] - values[0], 4 * divergence)


def masked(vae):
    mask = torch.tensor([True, False, True, True, False, True])
    return poutine.mask(vae.model, mask), poutine.mask(vae.guide, mask)


def test_masked_rows_do_not_count(vae):
    x = torch.randn(6, 4)
    model, guide = masked(vae)
    found, expected = (loss_and_gradients(o, model, guide, x) for o in (KLWeightedELBO(), TraceMeanField_ELBO()))
    assert_close(found, expected)
    free = loss_and_gradients(KLWeightedELBO(free_bits=100.0), model, guide, x)[0]
    assert_close(free, loss_and_gradients(KLWeightedELBO(0.0), model, guide, x)[0] + 100.0 * 3 * 4)  # coordinates, rows


def two_sites(reverse):
    """A model of z1 and z2 given z1, and a guide that samples them in this order or the reverse one."""

    def model():
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
        pyro.sample("x", dist.Normal(z1 + z2, 0.5), obs=torch.tensor(1.0))

    def guide():
        a, b = pyro.param("a", torch.tensor(0.3)), pyro.param("b", torch.tensor(0.2))
        first, second = ("z2", "z1") if reverse else ("z1", "z2")
        z = pyro.sample(first, dist.Normal(a, 0.5))
        pyro.sample(second, dist.Normal(b * z, 0.7))

    return model, guide


def test_divergence_is_a_draw_where_the_guide_has_another_order():
    model, guide = two_sites(reverse=True)
    assert_close(loss_and_gradients(KLWeightedELBO(), model, guide), loss_and_gradients(Trace_ELBO(), model, guide))
    model, guide = two_sites(reverse=False)
    found = loss_and_gradients(KLWeightedELBO(), model, guide)
    assert_close(found, loss_and_gradients(TraceMeanField_ELBO(), model, guide))


def test_discrete_latent_variables_have_the_gradient_of_the_enumerated_bound():
    """The means of 1,000 runs lie within 5 standard errors: a false alarm in 1e-6 of the seeds."""
    weight, x = 3.0, torch.tensor(0.7)
    prior, locs = torch.tensor(0.4), torch.tensor([-1.0, 1.0])

    def model():
        z = pyro.sample("z", dist.Bernoulli(prior))
        pyro.sample("x", dist.Normal(locs[z.long()], 1.0), obs=x)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.2))))

    runs = [loss_and_gradients(KLWeightedELBO(weight), model, guide, seed=i) for i in range(1000)]
    logit = torch.tensor(0.2, requires_grad=True)
    q = torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)])
    log_p = torch.stack([(1 - prior).log(), prior.log()])
    exact = (q * (weight * (q.log() - log_p) - dist.Normal(locs, 1.0).log_prob(x))).sum()
    (slope,) = torch.autograd.grad(exact, [logit])
    for found, expected in zip(zip(*runs, strict=True), (exact.detach(), slope[None]), strict=True):
        values = torch.stack(found)
        error = 5 * values.std(0) / len(values) ** 0.5
        assert ((values.mean(0) - expected).abs() < error).all()


def test_guide_with_one_joint_variable_takes_a_weight(vae):
    del vae
    model, _ = two_sites(reverse=False)
    guide = AutoMultivariateNormal(model)
    guide()
    values = [loss_and_gradients(KLWeightedELBO(w), model, guide)[0] for w in (0.0, 1.0)]
    assert_close(values[1], loss_and_gradients(Trace_ELBO(), model, guide)[0])
    assert values[0] != values[1]
    with pytest.raises(ValueError, match="free_bits wants a guide that samples each latent variable"):
        loss_and_gradients(KLWeightedELBO(free_bits=0.1), model, guide)


def test_coordinates_below_their_free_bits_have_no_divergence():
    x = torch.tensor([[0.5, -0.2]])
    loc = torch.tensor([2.0, 0.1]).requires_grad_()

    def model():
        with pyro.plate("rows", 1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.detach(), 1.0).to_event(1), obs=x)

    def guide():
        with pyro.plate("rows", 1):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    losses = []
    for free_bits in (0.0, 0.5):
        pyro.set_rng_seed(0)
        losses.append(KLWeightedELBO(free_bits=free_bits).differentiable_loss(model, guide))
    (slope,) = torch.autograd.grad(losses[1], [loc])
    assert_close(slope, torch.tensor([2.0, 0.0]))  # of loc ** 2 / 2
    assert_close((losses[1] - losses[0]).detach(), torch.tensor(0.5 - 0.1**2 / 2))


def test_loss_without_gradients_is_the_bound(vae):
    x, values = torch.randn(6, 4), []
    objective = KLWeightedELBO(LinearAnnealing(10), free_bits=3.0)
    for loss in (objective, Trace_ELBO()):
        pyro.set_rng_seed(1)
        values.append(SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.1}), loss).evaluate_loss(x))
    assert values[0] == pytest.approx(values[1])
    assert objective.num_steps == 0


@pytest.mark.parametrize("schedule", [LinearAnnealing(15), CyclicalAnnealing(40, cycles=2, start=0.1, end=2.0)])
def test_captured_steps_follow_the_schedule(schedule):
    x, losses, counts = torch.randn(20, 4), [], []
    for capture in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        vae, objective, adam = VAE((4,), latent_dim=3, hidden=(8,)), KLWeightedELBO(schedule), pyro.optim.Adam({"lr": 0.01})
        make = (lambda *a: CompiledSVI(*a, mode=Captured())) if capture else SVI
        svi = make(vae.model, vae.guide, adam, objective)
        losses.append([svi.step(x) for _ in range(30)])
        counts.append(int(objective.num_steps))
    assert counts == [30, 30]
    assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]))


def test_training_counts_its_steps_and_resumes_the_schedule(tmp_path):
    x, counts, last = torch.randn(40, 4), [], []

    def objective():
        return KLWeightedELBO(LinearAnnealing(100))

    for epochs in ((4,), (2, 4)):
        pyro.clear_param_store()
        for n in epochs:
            pyro.set_rng_seed(0)
            vae, loss = VAE((4,), latent_dim=3, hidden=(8,)), objective()
            path = Checkpoint(tmp_path / str(len(epochs)), resume=n == 4 and len(epochs) == 2)
            fit = train(vae, x, objective=loss, epochs=n, batch_size=10, seed=3, checkpoint=path, progress=False)
        counts.append(int(loss.num_steps))
        last.append([record["train"] for record in fit.history])
    assert counts == [16, 16]
    assert last[0] == pytest.approx(last[1])


def test_draws_and_weights_of_schedules():
    steps = torch.arange(0, 120, 10)
    assert_close(LinearAnnealing(50, start=1.0, end=0.0)(steps), 1 - (steps / 50).clamp(max=1))
    assert CyclicalAnnealing(100, cycles=5, rising=1.0)(steps).max() == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KLWeightedELBO("linear"), TypeError, "number or a function of the step"),
        (lambda: KLWeightedELBO(-1.0), ValueError, "kl_weight of 0 or more"),
        (lambda: KLWeightedELBO(free_bits=float("nan")), ValueError, "free_bits of 0 or more"),
        (lambda: LinearAnnealing(0), ValueError, "num_steps"),
        (lambda: LinearAnnealing(10, end=-1.0), ValueError, "end of 0 or more"),
        (lambda: CyclicalAnnealing(10, rising=0.0), ValueError, "rising in"),
    ],
)
def test_wrong_options_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_energies_are_refused():
    energy = EnergyModel((2,))
    with pytest.raises(ValueError, match=r"KLWeightedELBO needs a density"):
        KLWeightedELBO().differentiable_loss(energy.model, energy.guide, torch.randn(3, 2))
