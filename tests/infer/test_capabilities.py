"""A distribution that only this file knows is trained by every objective whose capability it offers."""

from math import log, pi

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import constraints

from pyro_genmodels import (
    ContrastiveDivergence,
    DenoisingScoreMatching,
    FlowMatching,
    ImplicitScoreMatching,
    MaximumLikelihood,
    MaximumMeanDiscrepancy,
    NoiseContrastive,
    SlicedScoreMatching,
    log_likelihood,
)
from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.capabilities import ContrastiveTerms, ScoreJumps, capabilities
from pyro_genmodels.distributions.dequantized import Dequantized
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.dynamics.processes import VariancePreserving
from pyro_genmodels.evaluation import conservative_log_likelihood
from pyro_genmodels.infer import TrigonometricInterpolant

pytestmark = pytest.mark.usefixtures("float64")

LOC, SCALE = 1.5, 0.5


class Bell(nn.Module):
    """A normal distribution of unknown mean and deviation, whose every form is written by hand."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def model(self, x, make=None):
        pyro.module("bell", self)
        with pyro.plate("data", len(x)):
            pyro.sample("x", (make or BellDistribution)(self), obs=x)


def no_latents(x):
    pass


class BellDistribution(GenerativeDistribution):
    """All capabilities at once. Only the base class is known to the library."""

    has_velocity = True
    has_noise_error = False
    has_negatives = True

    def __init__(self, bell, **options):
        super().__init__((2,), **options)
        self.bell = self.network = bell

    @property
    def scale(self):
        return self.bell.log_scale.exp()

    @property
    def normal(self):
        return dist.Normal(self.bell.loc, self.scale).to_event(1)

    def _log_prob(self, y, context):
        return self.normal.log_prob(y)

    def _draw(self, shape, context):
        return self.normal.expand(shape).sample()

    # The velocity that carries a standard normal to it along straight paths: the conditional mean of the speed.

    @property
    def base(self):
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def velocity(self, x, t, context=None):
        t = t[:, None]
        variance = (1 - t) ** 2 + (t * self.scale) ** 2
        return self.bell.loc + (t * self.scale**2 - (1 - t)) / variance * (x - t * self.bell.loc)

    def contrastive_terms(self, x, *, steps=None, from_data=False):
        negatives = self.sample((8,))

        def squared_energies():
            return self.log_prob(x).square() + self.log_prob(negatives).square().mean(0)

        return ContrastiveTerms(self.log_prob(x), self.log_prob(negatives), squared_energies)


class Denoised(BellDistribution):
    """The same with a denoiser."""

    has_noise_error = True
    process = VariancePreserving()

    def noise_error(self, y, t, context):
        alpha, sigma = self.process.alpha(t)[..., None], self.process.sigma(t)[..., None]
        noise = torch.randn_like(y)
        x = alpha * y + sigma * noise
        mean = alpha * self.bell.loc
        variance = (alpha * self.scale) ** 2 + sigma**2
        return (sigma * (x - mean) / variance - noise).square().sum(-1)


class Unnormalised(BellDistribution):
    """The same up to a constant."""

    intractable = True
    density = "unnormalized"
    advice = "Train it by its negatives."

    def _log_prob(self, y, context):
        return -((y - self.bell.loc) / self.scale).square().sum(-1) / 2


def data(n=4000):
    return LOC + SCALE * torch.randn(n, 2)


def fitted(objective, make=BellDistribution, steps=300, x=None):
    pyro.set_rng_seed(0)
    bell, x = Bell(), data() if x is None else x
    svi = SVI(lambda x: bell.model(x, make), no_latents, pyro.optim.Adam({"lr": 0.03}), objective)
    for _ in range(steps):
        rows = torch.randint(len(x), (500,))
        svi.step(x[rows])
    return bell


def assert_fitted(bell, loc=LOC, scale=SCALE, tolerance=0.1):
    torch.testing.assert_close(bell.loc.detach(), torch.full((2,), loc), atol=tolerance, rtol=0)
    torch.testing.assert_close(bell.log_scale.detach().exp(), torch.full((2,), scale), atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("objective", "make"),
    [
        (MaximumLikelihood, BellDistribution),
        (Trace_ELBO, BellDistribution),
        (FlowMatching, BellDistribution),
        (ImplicitScoreMatching, BellDistribution),
        (SlicedScoreMatching, BellDistribution),
        (ContrastiveDivergence, BellDistribution),
        (lambda: ContrastiveDivergence(regularization=1e-4), BellDistribution),
        (DenoisingScoreMatching, Denoised),
        (lambda: NoiseContrastive(dist.Normal(torch.ones(2), 1.0).to_event(1), ratio=4), Unnormalised),
        (ContrastiveDivergence, Unnormalised),
        (ImplicitScoreMatching, Unnormalised),
    ],
    ids=lambda choice: choice.__name__.strip("<>"),
)
def test_every_objective_trains_a_distribution_that_offers_its_capability(objective, make):
    assert_fitted(fitted(objective(), make))


class KnownConstant(Unnormalised):
    """The same with its log Z."""

    log_z = None

    @property
    def density(self):
        return "unnormalized" if self.log_z is None else "exact"

    @property
    def log_partition(self):
        value = self.bell.log_scale.sum() + log(2 * pi)
        return LogPartition(value, torch.zeros_like(value), "exact")

    def normalized(self, log_partition):
        new = self.expand(self.batch_shape)
        new.log_z = log_partition.value
        return new

    def _log_prob(self, y, context):
        return super()._log_prob(y, context) - (0.0 if self.log_z is None else self.log_z)


def test_a_distribution_that_knows_its_constant_is_validated_and_evaluated():
    bell, x = Bell(), data(50)
    fit = (lambda x: bell.model(x, KnownConstant)), no_latents
    wanted = BellDistribution(bell).log_prob(x).detach()
    assert ContrastiveDivergence().loss(*fit, x) == pytest.approx(-wanted.sum().item(), rel=1e-5)
    found = log_likelihood(fit, x)
    torch.testing.assert_close(found.values, wanted)
    assert found.kind == "exact"


def test_a_constant_that_cannot_be_estimated_is_refused():
    bell, x = Bell(), data(5)
    fit = (lambda x: bell.model(x, Unnormalised)), no_latents
    for evaluate in (lambda: ContrastiveDivergence().loss(*fit, x), lambda: log_likelihood(fit, x)):
        with pytest.raises(TypeError, match=r"log_partition wants the distribution of an energy.*Unnormalised"):
            evaluate()
    with pytest.raises(TypeError, match=r"energy.*Unnormalised"):
        conservative_log_likelihood(fit, x)


def test_one_level_of_denoising_needs_no_capability():
    """The data with noise of deviation 0.1 are learned."""
    assert_fitted(fitted(DenoisingScoreMatching(0.1)), scale=(SCALE**2 + 0.01) ** 0.5)


@pytest.mark.parametrize(
    ("objective", "make"),
    [(MaximumLikelihood, BellDistribution), (FlowMatching, BellDistribution), (DenoisingScoreMatching, Denoised)],
)
def test_capabilities_are_found_behind_dequantisation(objective, make):
    """Integers that are rounded down from N(3, 1): their uniform noise gives them the variance 1 + 1/12 at most."""
    x = (3.0 + torch.randn(4000, 2)).floor().clamp(0, 15).long()
    bell = fitted(objective(), lambda bell: Dequantized(make(bell), 16), 500, x)
    assert_fitted(bell, 3.0, 1.0, 0.25)


def test_a_prior_with_a_denoiser_is_trained_by_its_own_bound():
    """`with_training_bound` of a latent site is what counts there."""
    used = []

    class Prior(Denoised):
        def with_training_bound(self):
            used.append(self)
            return self

    def model(x):
        z = pyro.sample("z", Prior(Bell()))
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    assert torch.isfinite(DenoisingScoreMatching().differentiable_loss(model, guide, torch.tensor(1.0)))
    assert len(used) == 1


def refusals():
    class Still(BellDistribution):
        has_velocity = has_negatives = False
        advice = "Use MaximumLikelihood()."

    class Jumping(BellDistribution):
        score_jumps = ScoreJumps("with a corner", "a rounder one")

    class Straight(BellDistribution):
        only_linear_paths = True

    yield FlowMatching(), Still, r"FlowMatching needs a velocity.*Still.*MaximumLikelihood\(\)"
    yield FlowMatching(path=TrigonometricInterpolant()), Straight, "LinearInterpolant"
    yield ContrastiveDivergence(), Still, "needs an energy.*Still"
    yield SlicedScoreMatching(), Jumping, "Jumping with a corner.*a rounder one"
    yield MaximumLikelihood(), Unnormalised, "'unnormalized'.*Train it by its negatives"
    yield DenoisingScoreMatching([0.1, 1.0]), BellDistribution, "2 levels"
    yield DenoisingScoreMatching(0.1), Denoised, "levels of its own process|levels of.*process"


@pytest.mark.parametrize(("objective", "make", "match"), list(refusals()))
def test_a_missing_capability_is_refused_with_what_to_use(objective, make, match):
    with pytest.raises(ValueError, match=match):
        objective.differentiable_loss(lambda x: Bell().model(x, make), no_latents, data(5))


def test_other_distributions_get_the_default_answers():
    beta = dist.Beta(2.0, 3.0)
    view, x = capabilities(beta), torch.tensor([0.2, 0.7])
    flags = ("has_velocity", "has_noise_error", "has_negatives", "intractable", "is_dequantized", "is_implicit")
    assert not any(getattr(view, flag) for flag in flags)
    assert view.density == "exact"
    assert view.training_form is view
    torch.testing.assert_close(view.training_log_prob(x), beta.log_prob(x))
    log_density, u, event_dim = view.score_coordinates(x)
    torch.testing.assert_close(u, x.logit())
    torch.testing.assert_close(log_density(u), beta.log_prob(x) + x.log() + (1 - x).log())
    assert event_dim == 0
    with pytest.raises(NotImplementedError, match="velocity"):
        view.velocity(x, x)


def test_score_coordinates_are_those_of_the_support_or_the_pretransform():
    bell, x = Bell(), torch.rand(5, 2)
    exponential = dist.transforms.ExpTransform()
    inside = BellDistribution(
        bell, support=constraints.positive, pretransform=dist.transforms.IndependentTransform(exponential.inv, 1)
    )
    log_density, u, event_dim = inside.score_coordinates(x)
    torch.testing.assert_close(u, x.log())
    torch.testing.assert_close(log_density(u), bell_log_prob(bell, x.log()))
    assert event_dim == 1


def bell_log_prob(bell, y):
    return dist.Normal(bell.loc, bell.log_scale.exp()).to_event(1).log_prob(y)


@pytest.mark.parametrize("objective", [FlowMatching(), DenoisingScoreMatching(), ImplicitScoreMatching(), MaximumLikelihood()])
def test_an_expanded_distribution_keeps_its_capabilities(objective):
    bell, x = Bell(), data(6)

    def loss_with(wrap):
        pyro.set_rng_seed(1)
        return objective(lambda x: bell.model(x, lambda bell: wrap(BellDistribution(bell))), no_latents)(x)

    torch.testing.assert_close(loss_with(lambda d: ExpandedDistribution(d, (6,))), loss_with(lambda d: d.expand((6,))))


def test_integers_of_an_expanded_distribution_are_rounded_from_samples_with_a_gradient():
    loc = nn.Parameter(torch.ones(2))

    def model(x):
        with pyro.plate("data", len(x)):
            integers = Dequantized(dist.Normal(loc, 1.0).to_event(1), 4)
            pyro.sample("x", ExpandedDistribution(integers, (len(x),)), obs=x)

    MaximumMeanDiscrepancy()(model, no_latents)(torch.randint(4, (6, 2))).backward()
    assert loc.grad.abs().min() > 0
