"""Contrastive divergence and noise-contrastive estimation, against systems whose log Z is a sum or an integral.

Where an estimate is compared with the truth at six standard errors, the false-alarm rate is 2e-9 for each number compared.
"""

import copy
import pickle
import re
from functools import partial
from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from marks import slow_unless
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import SGD
from teachers import grid, outcomes, perturb
from torch import nn
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_genmodels import (
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    ContrastiveDivergence,
    DenseEnergy,
    EnergyModel,
    Flow,
    Labels,
    MaximumLikelihood,
    NoiseContrastive,
    Persistent,
    RestrictedBoltzmannMachine,
    train,
)
from pyro_genmodels.evaluation import log_partition
from pyro_genmodels.families import Annealed, BoltzmannMachine
from pyro_genmodels.samplers import Sampler
from pyro_genmodels.samplers.kernel import State
from pyro_genmodels.training import Checkpoint, checkpoints

pytestmark = pytest.mark.usefixtures("float64")

THIRDS = constraints.integer_interval(0, 2)


def no_latents(*args, **kwargs):
    pass


def gradients(loss, parameters):
    found = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def loss_of(objective, model, *args, seed=None, **kwargs):
    if seed is not None:
        pyro.set_rng_seed(seed)
    return objective.differentiable_loss(model, no_latents, *args, **kwargs)


# Systems small enough to know everything about.


def system(event_shape=(3,), energy=None, support=constraints.boolean, **options):
    return perturb(
        EnergyModel(event_shape, energy=energy or BoltzmannMachine(), support=support, standardize=False, **options), 0.7
    )


SYSTEMS = {
    "machine": system,
    "machine with a hidden unit": partial(system, energy=BoltzmannMachine(1)),
    "restricted machine": partial(system, (2, 2), RestrictedBoltzmannMachine(2)),
    "dense": partial(system, energy=DenseEnergy((8,))),
    "classes": partial(system, (2,), support=THIRDS),
    "restricted machine of classes": partial(system, (2,), RestrictedBoltzmannMachine(2), support=THIRDS),
    "line": partial(system, (1,), DenseEnergy((8,)), constraints.real),
    "interval": partial(system, (1,), DenseEnergy((8,)), constraints.interval(-1.0, 3.0)),
}


def everything(family):
    """All data there are, and the measure of each."""
    if family.support.is_discrete:
        levels = 3 if family.support is THIRDS else 2
        x = outcomes(levels, family.event_shape.numel()).reshape(-1, *family.event_shape)
        return x if levels == 3 else x.double(), 1.0
    low, high = (-1.0, 3.0) if family.support is not constraints.real else (-10.0, 10.0)
    return grid(low, high, 400)


def log_z(family, *context):
    x, volume = everything(family)
    return family(*context).unnormalized_log_prob(x).logsumexp(0) + log(volume)


def exact_loss(family, x, *context):
    return -(family(*context).unnormalized_log_prob(x) - log_z(family, *context)).sum()


def slopes(family, x, *context):
    """The gradient of each datum's unnormalised log density, (n, parameters)."""
    log_f = family(*context).unnormalized_log_prob(x)
    return torch.stack([gradients(each, family.parameters()) for each in log_f])


def deviation(family, *context):
    """Under the model, the standard deviation of the gradients of the log density, (parameters,)."""
    x, _ = everything(family)
    with torch.no_grad():
        p = (family(*context).unnormalized_log_prob(x).log_softmax(0)).exp()
    g = slopes(family, x, *context)
    return (p @ g.square() - (p @ g).square()).clamp(min=0).sqrt()


def data(family, n):
    x, _ = everything(family)
    return x[torch.randint(len(x), (n,))]


# Contrastive divergence.


@pytest.mark.parametrize("name", slow_unless(["machine", "restricted machine of classes", "line"], SYSTEMS))
def test_with_chains_in_equilibrium_the_gradient_is_that_of_the_negative_log_likelihood(name):
    """By 10,000 independent chains."""
    family = SYSTEMS[name](negatives=Persistent(10_000, steps=20))
    x = data(family, 10)
    for _ in range(2):
        loss = loss_of(ContrastiveDivergence(), family.model, x)
    found, wanted = (gradients(each, family.parameters()) for each in (loss, exact_loss(family, x)))
    assert ((found - wanted).abs() <= 6 * len(x) * deviation(family) / 10_000**0.5 + 1e-9).all()


@pytest.mark.parametrize("build", [lambda: 1, lambda: Labels(3)], ids=["vector", "labels"])
@pytest.mark.parametrize("negatives", ["annealed", "long chains from the data"])
def test_given_a_context_it_is_that_of_the_conditional_likelihood(build, negatives):
    """3000 rows of each of three contexts, with a chain each."""
    family, n = system(energy=RestrictedBoltzmannMachine(2), context=build()), 3000
    objective = ContrastiveDivergence() if negatives == "annealed" else ContrastiveDivergence(persistent=False, steps=40)
    contexts = torch.tensor([[0.3], [-1.0], [2.0]]) if family.context_size == 1 else torch.tensor([0, 2, 1])
    x = data(family, 3)
    loss = loss_of(objective, family.model, x.repeat(n, 1), contexts.repeat(n, *(1,) * (contexts.dim() - 1))) / n
    exact = sum(exact_loss(family, row, c) for row, c in zip(x, contexts, strict=True))
    found, wanted = (gradients(each, family.parameters()) for each in (loss, exact))
    error = sum(deviation(family, c).square() / n for c in contexts).sqrt()
    assert ((found - wanted).abs() <= 6 * error + 1e-9).all()


class Ahead(Sampler):
    """Moves every chain by one, to show where it began and for how long it went on."""

    def init(self, x, target, beta=1.0):
        return State(x)

    def step(self, state, target, step_size, beta=1.0):
        return State(state.x + 1), torch.ones(state.x.shape[: state.x.dim() - target.event_dim])


def smooth(event_shape=(2,), **options):
    return perturb(
        EnergyModel(event_shape, **{"energy": DenseEnergy((8,)), "standardize": False, "sampler": Ahead(), **options})
    )


def log_f(family, x):
    return family().unnormalized_log_prob(x)


@pytest.mark.parametrize("steps", [None, 1, 4])
def test_chains_from_the_data_begin_there_and_take_as_many_steps_as_told(steps):
    family, x = smooth(), torch.randn(5, 2)
    loss = loss_of(ContrastiveDivergence(persistent=False, steps=steps), family.model, x)
    wanted = log_f(family, x + (steps or 1)).sum() - log_f(family, x).sum()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, family.parameters()), gradients(wanted, family.parameters()))
    assert not family.replay_buffer.is_started


@pytest.mark.parametrize("steps", [None, 1, 4])
def test_chains_of_the_energys_own_go_on_by_as_many_steps_as_told(steps):
    family, x = smooth(negatives=Persistent(7, steps=3)), torch.randn(5, 2)
    loss_of(ContrastiveDivergence(), family.model, x)
    before = family.replay_buffer.chains.clone()
    loss = loss_of(ContrastiveDivergence(steps=steps), family.model, x)
    torch.testing.assert_close(family.replay_buffer.chains, before + (steps or 3))
    torch.testing.assert_close(loss, 5 * log_f(family, family.replay_buffer.chains).mean() - log_f(family, x).sum())


def test_steps_of_annealed_negatives_are_those_of_the_path():
    family, x = smooth(negatives=Annealed(50)), torch.randn(2, 2)
    short, long = (loss_of(ContrastiveDivergence(steps=k), family.model, x, seed=1) for k in (1, 3))
    pyro.set_rng_seed(1)
    start = torch.randn(50, 2)
    torch.testing.assert_close(long - short, 2 * (log_f(family, start + 3) - log_f(family, start + 1)).mean())


def test_regularization_adds_the_squares_of_energies():
    family, x = smooth(), torch.randn(5, 2)
    plain, more = (loss_of(ContrastiveDivergence(persistent=False, regularization=a), family.model, x) for a in (0.0, 0.3))
    wanted = 0.3 * (family.energy(x).square() + family.energy(x + 1).square()).sum()
    torch.testing.assert_close(more - plain, wanted)
    torch.testing.assert_close(gradients(more - plain, family.parameters()), gradients(wanted, family.parameters()))


@pytest.mark.parametrize("persistent", [True, False])
def test_scales_masks_and_minibatches_of_contrastive_divergence(persistent):
    family, x, present = smooth(negatives=Persistent(7)), torch.randn(5, 2), torch.tensor([True, False, True, True, False])
    x[~present] = 100.0  # nobody knows what stands there
    model = poutine.mask(poutine.scale(family.model, scale=0.5), mask=present)
    loss = loss_of(ContrastiveDivergence(persistent=persistent), model, x, size=20)
    negatives = family.replay_buffer.chains if persistent else x[present] + 1
    wanted = 0.5 * 4 * 3 * (log_f(family, negatives).mean() - log_f(family, x[present]).mean())
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, family.parameters()), gradients(wanted, family.parameters()))


@pytest.mark.parametrize("name", slow_unless(["machine", "restricted machine of classes", "line"], SYSTEMS))
def test_without_gradients_it_is_the_likelihood_in_nats_and_moves_no_chain(name):
    family = SYSTEMS[name](negatives=Persistent(10))
    x, exact_z = data(family, 10), log_z(family).item()
    loss_of(ContrastiveDivergence(), family.model, x)
    kept = {n: t.clone() for n, t in family.replay_buffer.state_dict().items() if not n.startswith("log_z")}
    svi = SVI(family.model, family.guide, SGD({"lr": 1e-3}), ContrastiveDivergence(steps=3))
    value = svi.evaluate_loss(x)
    assert ContrastiveDivergence(persistent=False, regularization=1.0).loss(family.model, family.guide, x) == value
    known = family().log_partition
    assert known.kind == "estimate"
    assert 0 <= known.std_error < 0.2
    assert abs(known.value - exact_z) <= 6 * known.std_error + 1e-9
    torch.testing.assert_close(value, (len(x) * known.value - log_f(family, x).sum()).item())
    assert all(torch.equal(family.replay_buffer.state_dict()[n], t) for n, t in kept.items())


def test_without_gradients_it_is_the_conditional_likelihood_in_nats():
    """200 labels, each with a log Z estimated by itself, against their sums."""
    family = system(energy=RestrictedBoltzmannMachine(2), context=Labels(200))
    x, labels = data(family, 200), torch.arange(200)
    found = ContrastiveDivergence().loss(family.model, family.guide, x, labels)
    with torch.no_grad():
        d = family(labels)
        exact = d.unnormalized_log_prob(everything(family)[0][:, None]).logsumexp(0)
        errors = log_partition(d, num_chains=8, num_steps=100, exact=False).std_error
        assert abs(found - (exact - d.unnormalized_log_prob(x)).sum()) < 6 * errors.square().sum().sqrt()


def test_a_short_estimate_displaces_none_that_is_better_and_keeps_what_it_said():
    family = system()
    x = data(family, 5)
    ContrastiveDivergence().loss(family.model, family.guide, x)
    known = family().log_partition
    error = known.std_error.item()
    assert log_partition(family).kind == "exact"
    assert ContrastiveDivergence().loss(family.model, family.guide, x) == pytest.approx(exact_loss(family, x).item())
    assert family().log_partition.kind == "exact"
    assert known.std_error == error > 0


# Noise-contrastive estimation.


NOISE = {
    "reals": lambda d: dist.Normal(torch.zeros(d), 2.0).to_event(1),
    "bits": lambda d: dist.Bernoulli(torch.full((d,), 0.4)).to_event(1),
}


def standard(d=2):
    return NoiseContrastive(NOISE["reals"](d))


def by_hand(objective, family, x, *context, seed):
    """The losses of each datum, with the noise that the seed gives."""
    pyro.set_rng_seed(seed)
    noise, q = objective.noise.sample((objective.ratio, len(x))), objective.noise
    log_p = family(*context).unnormalized_log_prob
    odds, against = (log_p(y) - objective.log_partition - q.log_prob(y) - log(objective.ratio) for y in (x, noise))
    return -F.logsigmoid(odds) - F.logsigmoid(-against).sum(0)


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("context", [0, 1])
def test_it_is_the_loss_of_a_classifier_under_scales_masks_and_minibatches(ratio, context):
    family, x, c = smooth(context=context), torch.randn(5, 2), [torch.randn(5, 1)] * context
    objective, present = NoiseContrastive(NOISE["reals"](2), ratio=ratio), torch.tensor([True, False, True, True, False])
    objective.log_partition.data.fill_(0.7)
    parameters = [*family.parameters(), objective.log_partition]
    model = poutine.mask(poutine.scale(family.model, scale=0.5), mask=present)
    loss = loss_of(objective, model, x, *c, size=20, seed=4)
    wanted = 2 * by_hand(objective, family, x, *c, seed=4)[present].sum()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, parameters), gradients(wanted, parameters))

    def subsampled(x, *c):
        with pyro.plate("all", 10, subsample=torch.arange(5)):
            pyro.sample("x", family(*c).mask(present), obs=x)

    loss = loss_of(objective, subsampled, x, *c, seed=4)
    torch.testing.assert_close(loss, 2 * by_hand(objective, family, x, *c, seed=4)[present].sum())


class Table(nn.Module):
    """Any energy of three bits."""

    def __init__(self, energies):
        super().__init__()
        self.energies = nn.Parameter(energies.clone())

    def forward(self, x):
        return self.energies[(x.long() @ torch.tensor([4, 2, 1]))]


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("off", slow_unless([1.0], [0.0, 1.0]))
def test_the_optimum_is_where_the_log_odds_are_right(off, ratio):
    """In expectation over 400 times 200 data and their noise; 9 gradients and a value."""
    log_p, constant, x = torch.randn(8).log_softmax(0), 2.5, outcomes(2, 3).double()
    family = EnergyModel((3,), energy=Table(constant - log_p), support=constraints.boolean, standardize=False, sampler=None)
    objective = NoiseContrastive(NOISE["bits"](3), ratio=ratio)
    objective.log_partition.data.fill_(off - constant)
    parameters = [family.energy.energies, objective.log_partition]
    log_q = objective.noise.log_prob(x)
    odds = family().unnormalized_log_prob(x) - objective.log_partition - log_q - log(ratio)
    expected = -(log_p.exp() * F.logsigmoid(odds) + ratio * log_q.exp() * F.logsigmoid(-odds)).sum()
    exact = torch.cat([expected.reshape(1), gradients(expected, parameters)]).detach()
    assert (exact[1:].abs().max() < 1e-12) == (off == 0)
    found = []
    for _ in range(400):
        loss = loss_of(objective, family.model, x[torch.multinomial(log_p.exp(), 200, replacement=True)]) / 200
        found.append(torch.cat([loss.reshape(1), gradients(loss, parameters)]).detach())
    found = torch.stack(found)
    assert ((found.mean(0) - exact).abs() <= 6 * found.std(0) / 20).all()


class Gauss(nn.Module):
    """E(x) = (x - m)^2 / (2 v) on the line."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_variance = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (x - self.loc).square().sum(-1) / (2 * self.log_variance.exp())


class Fields(nn.Module):
    """E(x) = -b'x - w x_1 x_2, of three bits."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return -(torch.cat([x, x[:, :1] * x[:, 1:2]], -1) @ self.weights)


LEARNED = {
    "bits": (lambda: system(energy=Fields(), sampler=None), NOISE["bits"](3)),
    "line": (lambda: system((1,), Gauss(), constraints.real, sampler=None), NOISE["reals"](1)),
}


def error_of_log_z(family, noise, ratio, n):
    """By Gutmann and Hyvarinen (2012): of log Z that is learned, less log Z of the energy that is learned with it."""
    x, volume = everything(family)
    log_p = (family().unnormalized_log_prob(x) - log_z(family)).detach()
    g = torch.cat([slopes(family, x), -torch.ones(len(x), 1)], -1)
    p, posterior = log_p.exp() * volume, (log(ratio) + noise.log_prob(x) - log_p).sigmoid()
    inverse = torch.linalg.inv(g.T @ (g * (p * posterior)[:, None]))
    mean = inverse @ (g.T @ (p * posterior))
    contrast = g.T @ p  # the gradient of log Z, and -1
    return ((contrast @ inverse @ contrast - (1 + 1 / ratio) * (contrast @ mean) ** 2) / n).sqrt()


@pytest.mark.parametrize("ratio", [1, 5])
@pytest.mark.parametrize("name", LEARNED)
def test_log_z_is_learned_along(name, ratio):
    """From 5000 data, to the optimum for one set of noise."""
    build, noise = LEARNED[name]
    truth, family, n = build(), build(), 5000
    objective = NoiseContrastive(noise, ratio=ratio)
    x, _ = everything(truth)
    with torch.no_grad():
        x = x[torch.multinomial(truth().unnormalized_log_prob(x).softmax(0), n, replacement=True)]
    loss = objective(family)
    optimiser = torch.optim.LBFGS(loss.parameters(), max_iter=100, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        pyro.set_rng_seed(1)
        value = loss(x) / n
        value.backward()
        return value

    optimiser.step(closure)
    error = error_of_log_z(truth, noise, ratio, n)
    assert 0 < error < 0.1
    assert abs(objective.log_partition - log_partition(family).value) < 6 * error
    assert abs(objective.log_partition) > 20 * error


def test_svi_and_torchs_optimisers_train_log_z_along():
    family, objective, x = smooth(sampler=None), standard(), torch.randn(6, 2)
    everything = [*family.parameters(), objective.log_partition]
    wanted, before = (
        gradients(loss_of(objective, family.model, x, seed=3), everything),
        [p.detach().clone() for p in everything],
    )
    module = objective(family)
    assert {id(p) for p in module.parameters()} == {id(p) for p in everything}
    pyro.set_rng_seed(3)
    torch.testing.assert_close(gradients(module(x), everything), wanted)
    pyro.set_rng_seed(3)
    SVI(family.model, family.guide, SGD({"lr": 1e-2}), objective).step(x)
    assert objective.log_partition != 0
    torch.testing.assert_close(torch.cat([(b - p).flatten() for b, p in zip(before, everything, strict=True)]), 1e-2 * wanted)


@pytest.mark.parametrize(
    "make",
    [lambda objective: standard(), copy.deepcopy, copy.copy, lambda objective: pickle.loads(pickle.dumps(objective))],
    ids=["another", "a deep copy", "a copy", "unpickled"],
)
def test_two_objectives_in_one_param_store_have_a_log_z_each(make):
    family, objective, x = smooth(sampler=None), standard(), torch.randn(6, 2)
    loss_of(objective, family.model, x)
    other = make(objective)
    loss_of(other, family.model, x).backward()
    assert other.log_partition.grad is not None
    assert objective.log_partition.grad is None


def test_two_energies_in_one_model_have_a_log_z_each_or_are_refused():
    families, objective, x = [smooth(sampler=None), smooth(sampler=None)], standard(), torch.randn(6, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            for i, family in enumerate(families):
                pyro.sample(f"x_{i}", family(), obs=x)

    try:
        loss_of(objective, model, x)
    except ValueError as error:
        assert "x_1" in str(error)  # noqa: PT017 (either will do)
        return
    assert len(objective.own) == 2


def test_without_gradients_the_family_is_told_log_z_until_its_parameters_change():
    family, objective, x = smooth(sampler=None), standard(), torch.randn(6, 2)
    objective.log_partition.data.fill_(0.7)
    svi = SVI(family.model, family.guide, SGD({"lr": 1e-3}), objective)
    svi.evaluate_loss(x)
    assert family().density == "unnormalized"  # nothing has been learned yet
    loss_of(objective, family.model, x)
    pyro.set_rng_seed(3)
    value = svi.evaluate_loss(x)
    assert value == pytest.approx(loss_of(objective, family.model, x, seed=3).item())
    assert family().density == "estimate"
    assert family().log_partition.std_error.isnan()
    with torch.no_grad():
        torch.testing.assert_close(family().log_prob(x), family().unnormalized_log_prob(x) - 0.7)
    svi.step(x)
    assert family().density == "unnormalized"


def test_a_family_as_noise_is_not_trained_and_nothing_is_drawn_from_the_energy():
    flow, family, x = perturb(Flow((2,))), smooth(sampler=None), torch.randn(6, 2)
    before = copy.deepcopy(flow.state_dict())
    objective = NoiseContrastive(flow)
    with poutine.trace(param_only=True) as capture:
        objective.loss_and_grads(family.model, family.guide, x)
    assert not any(name.startswith(flow.name) for name in capture.trace.nodes)
    assert all(p.grad is None for p in flow.parameters())
    assert all(torch.equal(t, before[name]) for name, t in flow.state_dict().items())
    assert not {id(p) for p in objective(family).parameters()} & {id(p) for p in flow.parameters()}


@pytest.mark.parametrize(
    ("noise", "error", "match"),
    [
        (dist.Normal, TypeError, "the class Normal"),
        (Flow, TypeError, "the class Flow"),
        (3.0, TypeError, "found 3.0"),
        (dist.Normal(torch.zeros(2), 1.0), ValueError, r"batch shape \(2,\).*to_event\(1\)"),
        (lambda: EnergyModel((2,))(), ValueError, "exact.*unnormalized.*ContrastiveDivergence"),
        (lambda: VAE((2,), latent_dim=1)(), ValueError, "exact.*no density.*Trace_ELBO"),
        (lambda: Flow((2,), context=1), ValueError, "wants a context"),
    ],
    ids=["class", "family's class", "number", "batch", "energy", "VAE", "conditional"],
)
def test_what_cannot_be_noise_is_refused(noise, error, match):
    with pytest.raises(error, match=match):
        NoiseContrastive(noise() if isinstance(noise, type(lambda: 0)) else noise)


def test_noise_over_other_events_is_refused():
    with pytest.raises(ValueError, match=r"'x' is over events \(2,\), but the noise over \(3,\)"):
        loss_of(standard(3), smooth().model, torch.randn(4, 2))


@pytest.mark.parametrize("name", ["interval", "machine", "classes"])
def test_noise_of_another_support_is_refused(name):
    """Of its draws nothing is known where the energy is not."""
    family = SYSTEMS[name](sampler=None)
    with pytest.raises(ValueError, match="support"):
        loss_of(standard(family.event_shape.numel()), family.model, data(family, 4))


# Both.


@pytest.mark.parametrize("objective", [ContrastiveDivergence, standard], ids=["contrastive divergence", "noise"])
@pytest.mark.parametrize(
    ("build", "cure"),
    [
        (lambda: Flow((2,)), "MaximumLikelihood"),
        (lambda: Autoregressive((2,), likelihood=BernoulliLikelihood()), "MaximumLikelihood"),
        (lambda: VAE((2,), latent_dim=1), "Trace_ELBO"),
    ],
    ids=["flow", "autoregressive", "VAE"],
)
@pytest.mark.parametrize("as_site", [True, False])
def test_what_is_no_energy_is_refused_and_the_objective_is_named(objective, build, cure, as_site):
    family, x = build(), torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", family(), obs=x)

    with pytest.raises(ValueError, match=re.compile(f"needs an energy, but site 'x' holds.*{cure}", re.S)):
        objective().differentiable_loss(*((model, no_latents) if as_site else (family.model, family.guide)), x)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ContrastiveDivergence(steps=0),
        lambda: ContrastiveDivergence(regularization=-1.0),
        lambda: ContrastiveDivergence(regularization=float("inf")),
        lambda: NoiseContrastive(NOISE["reals"](2), ratio=0),
    ],
    ids=["steps", "regularization", "infinite", "ratio"],
)
def test_options_that_make_no_sense_are_refused(build):
    with pytest.raises(ValueError, match=r"(steps|regularization|ratio) of [01] or more, but found"):
        build()


@pytest.mark.parametrize("known", [False, True])
def test_maximum_likelihood_refuses_energies_and_names_the_objectives(known):
    family = system()
    if known:
        log_partition(family)
    wanted = r"ContrastiveDivergence\(\), NoiseContrastive\(noise=\.\.\.\) or score matching"
    with pytest.raises(
        ValueError, match=re.compile(f"'x' holds Energy, which has a density of kind .unnormalized..*{wanted}", re.S)
    ):
        loss_of(MaximumLikelihood(), family.model, data(family, 3))


@pytest.mark.parametrize("objective", [ContrastiveDivergence, standard], ids=["contrastive divergence", "noise"])
def test_a_loss_and_its_gradient_are_captured_as_one_graph(objective):
    family, objective = smooth(sampler="default", negatives=Persistent(6, steps=2)), objective()
    x, fresh = torch.randn(2, 5, 2)
    loss_of(objective, family.model, x)  # chains begin
    family.eval()

    def step(x):
        loss = loss_of(objective, family.model, x)
        return loss.detach(), gradients(loss, family.parameters())

    with pyro.validation_enabled(False):
        graph, before = make_fx(step)(x), copy.deepcopy(family.state_dict())
        with torch.no_grad():
            pyro.set_rng_seed(6)
            found = [*graph(fresh), family.replay_buffer.chains.clone()]
        family.load_state_dict(before)
        pyro.set_rng_seed(6)
        torch.testing.assert_close(found, [*step(fresh), family.replay_buffer.chains])


# Training.


def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 300, 2, generator=generator) @ torch.tensor([[1.0, 0.5], [0.0, 0.7]]) + 1.0


def trained(objective, *, start=0, **options):
    pyro.set_rng_seed(start)
    family, (x, held_out) = EnergyModel((2,), energy=DenseEnergy((16,)), negatives=Persistent(32, steps=3)), rows()
    options = {"optim": partial(torch.optim.Adam, lr=1e-2), **options}
    return train(family, x, objective=objective, valid=held_out, seed=7, progress=False, **options)


def test_train_moves_log_z_and_its_checkpoint_is_of_the_family(tmp_path):
    objective, (_, x) = standard(), rows()
    fit = trained(objective, epochs=4, checkpoint=tmp_path / "fit")
    assert objective.log_partition != 0
    loaded = checkpoints.load(tmp_path / "fit")
    assert loaded.state_dict().keys() == fit.family.state_dict().keys()
    assert loaded().log_partition.value == fit.family().log_partition.value == objective.log_partition
    torch.testing.assert_close(loaded().log_prob(x), fit.family().log_prob(x))


@pytest.mark.slow
@pytest.mark.parametrize("make", [standard, ContrastiveDivergence], ids=["noise", "contrastive divergence"])
def test_a_resumed_run_ends_as_if_it_had_never_stopped(make, tmp_path):
    first, last = make(), make()
    whole = trained(first, epochs=3)
    trained(make(), epochs=1, checkpoint=tmp_path / "parts")
    fit = trained(last, epochs=3, checkpoint=Checkpoint(tmp_path / "parts", resume=True), start=1)
    assert [r["valid"] for r in fit.history] == [r["valid"] for r in whole.history]
    torch.testing.assert_close(fit.family.state_dict(), whole.family.state_dict(), rtol=0, atol=0, equal_nan=True)
    if make is standard:
        assert last.log_partition == first.log_partition != 0


@pytest.mark.slow
def test_train_takes_contrastive_divergence_for_an_energy_and_stops_early_by_nats():
    fit, (_, x) = trained(None, epochs=8), rows()
    known = fit.family().log_partition
    assert known.kind == "estimate"
    error, unnormalized = known.std_error.clone(), fit.family().unnormalized_log_prob(x).mean()
    assert abs(fit.best["valid"] - (log_partition(fit.family).value - unnormalized)) < 6 * error
    assert fit.best["valid"] < fit.history[0]["valid"]
    still = trained(None, epochs=8, patience=2, optim=partial(torch.optim.SGD, lr=1e-30))
    assert still.stopped == "no better validation loss in 2 epochs"


# Beside others.


def test_other_sites_count_by_their_density_and_train_chooses_it_for_them():
    energy = EnergyModel((1,), negatives=Persistent(16, steps=1))

    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", energy(), obs=x)
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0), obs=x[:, 0])

    def guide(x):
        pass

    x = torch.randn(20, 1)
    with torch.no_grad():
        both, alone = (ContrastiveDivergence().loss(m, guide, x) for m in (model, energy.model))
    # log Z is estimated in the one and remembered in the other
    assert both - alone == pytest.approx(-dist.Normal(0.0, 1.0).log_prob(x).sum().item(), rel=1e-4)
    assert len(train((model, guide), x, epochs=1, progress=False).history) == 1


def test_its_value_does_not_hang_on_the_units_of_the_data():
    losses = []
    for scale in (1.0, 1000.0):
        pyro.set_rng_seed(0)
        energy, x = EnergyModel((2,), energy=DenseEnergy((8,)), negatives=Annealed(64, steps=5)), scale * torch.randn(50, 2)
        energy.standardize(x)
        losses.append(ContrastiveDivergence()(energy)(x).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_noise_contrastive_refuses_a_machine_that_cannot_learn_log_z_of_each_context():
    energy = EnergyModel((2,), context=Labels(2), support=constraints.boolean, energy=BoltzmannMachine())
    objective = NoiseContrastive(dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
    with pytest.raises(ValueError, match=r"Boltzmann machine .* has no term .* Use ContrastiveDivergence"):
        objective(energy)(torch.ones(3, 2), torch.tensor([0, 1, 0]))


def test_noise_contrastive_does_not_overwrite_what_is_exact_or_speak_before_it_has_learned():
    energy, x = EnergyModel((1,), energy=DenseEnergy((8,))), torch.randn(20, 1)
    energy.standardize(x)
    objective = NoiseContrastive(dist.Normal(torch.zeros(1), 2.0).to_event(1))
    objective.loss(energy.model, energy.guide, x)
    assert energy().log_partition is None
    log_partition(energy)
    objective(energy)(x)
    objective.loss(energy.model, energy.guide, x)
    assert energy().log_partition.kind == "exact"
