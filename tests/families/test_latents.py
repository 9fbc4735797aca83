"""Guides and priors of a VAE, against the linear Gaussian one, whose posterior and evidence are known."""

import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.testing import assert_close

from pyro_genmodels import MAF, VAE, BernoulliLikelihood, RealNVP, log_likelihood, train
from pyro_genmodels.families import FlowPosterior, FullNormalPosterior, MixturePrior, NormalPosterior, Planar, VampPrior
from pyro_genmodels.infer import KLWeightedELBO
from pyro_genmodels.infer.compiled import Captured, CapturedLoss
from pyro_genmodels.training import checkpoints

POSTERIORS = {
    "normal": NormalPosterior(),
    "full": FullNormalPosterior(),
    "flow": FlowPosterior(num_features=4),
    "MAF": FlowPosterior(MAF(transforms=1, hidden=(8,)), num_features=4),
    "planar": FlowPosterior(Planar(2), num_features=4),
}
PRIORS = {"mixture": MixturePrior(3), "vamp": VampPrior(4)}
CHOICES = {name: {"posterior": each} for name, each in POSTERIORS.items()}
CHOICES |= {name: {"prior": each} for name, each in PRIORS.items()}
SLOW = ("flow", "MAF")  # to be captured
TASKS = [pytest.param(choice, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, choice in CHOICES.items()]


@pytest.mark.parametrize("options", TASKS)
@pytest.mark.parametrize("context", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_choice_trains_scores_draws_and_is_captured(options, context):
    vae = VAE((2, 3), context=context, latent_dim=3, likelihood=BernoulliLikelihood(), hidden=(8,), **options)
    x = torch.randint(2, (20, 2, 3)).float()
    args = (x, torch.randn(20, 2)) if context else (x,)
    assert vae(*args[1:]).sample((4,) if context else (4, 20)).shape == (4, 20, 2, 3)
    assert vae.posterior(*args).rsample((5,)).shape == (5, 20, 3)
    assert log_likelihood(vae, *args, num_samples=5).values.isfinite().all()
    losses = []
    for run in (CapturedLoss(vae.model, vae.guide, Trace_ELBO(), mode=Captured()), None):
        pyro.set_rng_seed(0)
        if run is None:
            losses.append(Trace_ELBO().differentiable_loss(vae.model, vae.guide, *args).detach())
        else:
            run(*args)  # the capture
            pyro.set_rng_seed(0)
            losses.append(run(*args)[0])
    assert_close(losses[0], losses[1])
    loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, *args)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("options", TASKS)
def test_every_choice_is_pickled_and_rebuilt_from_a_checkpoint(options, tmp_path):
    vae, x = VAE((3,), latent_dim=2, hidden=(8,), **options), torch.randn(10, 3)
    vae.prepare(x)
    checkpoints.save(tmp_path / "vae", vae)
    for again in (pickle.loads(pickle.dumps(vae)), checkpoints.load(tmp_path / "vae")):
        losses = []
        for family in (vae, again):
            pyro.set_rng_seed(1)
            losses.append(Trace_ELBO().loss(family.model, family.guide, x))
        assert losses[0] == pytest.approx(losses[1])


class Linear(nn.Module):
    """The decoder of a linear Gaussian VAE: a location A z, and the unconstrained deviation 1/2 in each coordinate."""

    def __init__(self, a, raw):
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("raw", raw)

    def forward(self, z):
        loc = z @ self.a.T
        return torch.stack([loc, self.raw.expand_as(loc)], -1)


def linear_vae(**options):
    """Return a VAE whose posterior is normal with correlated coordinates, the distribution of its data, and its posterior."""
    pyro.set_rng_seed(3)
    a = torch.tensor([[1.0, 0.9], [0.5, 0.6]])
    vae = VAE((2,), latent_dim=2, hidden=(32,), standardize=False, **options)
    vae.decoder = Linear(a, torch.zeros(()))
    scale = _deviation(vae)
    covariance = torch.linalg.inv(torch.eye(2) + a.T @ a / scale**2)
    evidence = dist.MultivariateNormal(torch.zeros(2), a @ a.T + scale**2 * torch.eye(2))
    return vae, evidence, lambda x: dist.MultivariateNormal(x @ a @ covariance / scale**2, covariance)


def _deviation(vae):
    """Return the deviation that the likelihood makes of an unconstrained 0, from its density at its location."""
    params = torch.zeros(1, 2, vae.likelihood.num_outputs)
    log_p = vae.likelihood(params).to_event(1).log_prob(torch.zeros(1, 2)) / 2
    return (-log_p).exp() / (2 * torch.pi) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "flow"])
def test_guides_with_a_covariance_find_the_posterior_that_the_mean_field_misses(name):
    gaps = {}
    for key in ("normal", name):
        vae, evidence, posterior = linear_vae(posterior=POSTERIORS[key])
        x = evidence.sample((2000,))
        train(vae, x, epochs=60, batch_size=100, seed=0, progress=False)
        with torch.no_grad():
            z = vae.posterior(x).sample((50,))
            gaps[key] = (vae.posterior(x).log_prob(z) - posterior(x).log_prob(z)).mean().item()  # KL(q || posterior)
    assert gaps["normal"] > 0.15  # of the correlation
    assert gaps[name] < 0.03


def test_full_normal_posterior_has_the_covariance_that_its_outputs_say():
    choice = FullNormalPosterior()
    out = torch.randn(5, choice.num_outputs(3), dtype=torch.float64)
    q = choice.build(torch.Size([3]))(out)
    scale = torch.nn.functional.softplus(out[:, 3:6] + torch.tensor(torch.e - 1).log()) + 1e-5
    factor = torch.zeros(5, 3, 3, dtype=torch.float64)
    factor[:, range(3), range(3)] = scale
    factor[:, 1, 0], factor[:, 2, 0], factor[:, 2, 1] = (out[:, 6 + i] * scale[:, (1, 2, 2)[i]] for i in range(3))
    assert_close(q.covariance_matrix, factor @ factor.mT)
    assert_close(q.mean, out[:, :3])


@pytest.mark.parametrize("name", ["flow", "MAF"])
def test_density_of_a_flow_posterior_is_that_of_its_draws(name):
    """Right value: the density of the base over the volume of the map, by its Jacobian."""
    choice = POSTERIORS[name]
    module = choice.build(torch.Size([2])).double()
    out = torch.randn(choice.num_outputs(2), dtype=torch.float64)
    q, z = module(out), torch.randn(2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(q.transform(q.context), z)
    u = q.transform(q.context)(z)
    assert_close(q.log_prob(z), dist.Normal(0.0, 1.0).log_prob(u).sum() + jacobian.det().abs().log())
    start = choice.build(torch.Size([2])).double()
    for p in start.parameters():
        torch.nn.init.zeros_(p)
    outputs = torch.cat([torch.tensor([3.0, -2.0, 0.0, 0.0], dtype=torch.float64), torch.zeros(4, dtype=torch.float64)])
    assert_close(start(outputs).log_prob(z), dist.Normal(outputs[:2], 1.00001).log_prob(z).sum())


def test_vamp_prior_is_the_average_of_guides_of_its_inputs():
    vae = VAE((3,), latent_dim=2, hidden=(8,), prior=VampPrior(4), standardize=False)
    with torch.no_grad():
        vae.prior.logits.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    z = torch.randn(5, 2)
    guides = vae.posterior(vae.prior.inputs)
    expected = (torch.tensor([0.1, 0.2, 0.3, 0.4]).log() + guides.log_prob(z[:, None])).logsumexp(-1)
    assert_close(vae._prior(None).log_prob(z), expected)


def test_prior_of_a_context_is_the_average_of_guides_given_this_context():
    vae = VAE((3,), context=2, latent_dim=2, hidden=(8,), prior=VampPrior(4), standardize=False, standardize_context=False)
    c, z = torch.randn(5, 2), torch.randn(5, 2)
    rows = [vae.posterior(vae.prior.inputs, c[i].expand(4, 2)).log_prob(z[i]).logsumexp(0) for i in range(5)]
    assert_close(vae._prior(c).log_prob(z), torch.stack(rows) - torch.tensor(4.0).log())


@pytest.mark.parametrize("posterior", [NormalPosterior(), FullNormalPosterior(), FlowPosterior(num_features=4)])
def test_weighted_bounds_take_every_posterior(posterior):
    vae, x = VAE((3,), latent_dim=2, hidden=(8,), posterior=posterior), torch.randn(10, 3)
    losses = []
    for objective in (KLWeightedELBO(), KLWeightedELBO(free_bits=10.0)):
        pyro.set_rng_seed(0)
        losses.append(objective.differentiable_loss(vae.model, vae.guide, x).item())
    assert losses[1] > losses[0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (partial(VAE, (3,), posterior="full"), TypeError, "VAE wants a posterior such as NormalPosterior"),
        (partial(VAE, (3,), posterior=FullNormalPosterior), TypeError, "call it"),
        (partial(VAE, (3,), prior=MixturePrior), TypeError, "as its prior"),
        (lambda: MixturePrior(0), ValueError, "components"),
        (lambda: VampPrior(2.5), (TypeError, ValueError), "components"),
        (lambda: FlowPosterior(RealNVP), TypeError, "call it"),
        (lambda: FlowPosterior(num_features=0), ValueError, "num_features"),
        (
            lambda: VAE((3,), latent_dim=2, posterior=FullNormalPosterior(), encoder=nn.Linear(3, 4)).posterior(
                torch.randn(5, 3)
            ),
            ValueError,
            r"shape \(5, 5\), but it returned",
        ),
    ],
)
def test_wrong_choices_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
