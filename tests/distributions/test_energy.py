"""What only energies have: gradients of log Z by negatives, chains that go on, and constants that are known for a while.

False alarms. Wherever a mean over independent calls is held against the truth it is by `assert_means`, which errs with
probability 1e-7 (Student's t, with Bonferroni's correction); no test calls it more than ten times. Where a test does
otherwise it says so.
"""

import copy
import math
import pickle
from dataclasses import dataclass, field
from functools import partial
from math import log, pi

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_unless
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.nn import PyroModule, PyroSample
from teachers import Mixture, assert_means, energy_of_machine, grid, integral, outcomes, perturb
from torch import nn
from torch.distributions import constraints

from pyro_genmodels import (
    VAE,
    Autoregressive,
    ContrastiveDivergence,
    ConvolutionalEnergy,
    DenseEnergy,
    EnergyModel,
    Flow,
    Labels,
    Langevin,
    MaximumLikelihood,
    Persistent,
    RealNVP,
    RestrictedBoltzmannMachine,
    train,
)
from pyro_genmodels.distributions import Energy
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.evaluation import log_partition
from pyro_genmodels.families import (
    Annealed,
    BoltzmannMachine,
    Contrastive,
    Gibbs,
    GibbsWithGradients,
    Hamiltonian,
    ParallelTempering,
)
from pyro_genmodels.samplers import Reals, Sampler
from pyro_genmodels.samplers.kernel import State
from pyro_genmodels.training import checkpoints

pytestmark = pytest.mark.usefixtures("float64")

BINARY, CLASSES = constraints.boolean, constraints.integer_interval(0, 2)
UNIT = constraints.interval(0.0, 2.0)


# Small systems, whose Z is a sum over all states or an integral by the midpoint rule.


def system(energy, support=constraints.real, **options):
    """A family away from its initialisation that has seen data, all its states (S, *event), and the volume of each."""
    if support in (BINARY, CLASSES):
        states, volume = outcomes(2 if support is BINARY else 3, 3), 1.0
        states = states.double() if support is BINARY else states
        data = states[torch.randint(len(states), (7,))]
    else:
        low, high = {constraints.real: (-12.0, 14.0), UNIT: (0.0, 2.0), constraints.positive: (0.0, 60.0)}[support]
        states, volume = grid(low, high, 6000)
        data = 0.3 + 1.5 * torch.rand(20, 1).square()
    family = EnergyModel(states.shape[1:], energy=energy, support=support, **options)
    family.standardize(data)
    return perturb(family, 0.5).eval(), states, volume


def fixed(family, scale):
    """The family with parameters of about that size, which do not depend on the seed, and an even start."""
    with torch.no_grad():
        for p in family.parameters():
            p.copy_(scale * (1.7 * torch.arange(1.0, p.numel() + 1)).cos().reshape(p.shape))
        for start in (family.marginals, getattr(family.energy, "centre", family.marginals)):
            start.zero_()
    return family


def log_z(fn, states, volume=1.0):
    """Of each context, with its graph."""
    return fn.unnormalized_log_prob(states[:, None] if fn.batch_shape else states).logsumexp(0) + log(volume)


def exact_log_prob(fn, x, states, volume=1.0):
    return fn.unnormalized_log_prob(x) - log_z(fn, states, volume)


def exact_draws(fn, states, n):
    with torch.no_grad():
        return states[torch.multinomial(fn.unnormalized_log_prob(states).softmax(0), n, replacement=True)]


def equilibrate(family, states):
    """Puts exact draws in the place of the chains that go on."""
    fn, chains = family(), family.replay_buffer.chains
    family.replay_buffer.put(fn.path.encode(exact_draws(fn, states, len(chains))))


def gradient(loss, wanted):
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def by_name(table, kept=None):
    """Run a test once for each name in the table, all but the kept ones marked slow."""
    values = table if kept is None else slow_unless(kept, list(table))
    return pytest.mark.parametrize("name", values, ids=[name.replace(" ", "_") for name in table])


SYSTEMS = {
    "restricted, zeros and ones": lambda **o: system(RestrictedBoltzmannMachine(2), BINARY, **o),
    "restricted, classes": lambda **o: system(RestrictedBoltzmannMachine(2), CLASSES, **o),
    "general, zeros and ones": lambda **o: system(BoltzmannMachine(2), BINARY, **o),
    "general, classes": lambda **o: system(BoltzmannMachine(), CLASSES, **o),
    "dense, zeros and ones": lambda **o: system(DenseEnergy((6,)), BINARY, **o),
    "dense, classes": lambda **o: system(DenseEnergy((6,)), CLASSES, **o),
    "dense, the line": lambda **o: system(DenseEnergy((6,)), **o),
    "restricted, the line": lambda **o: system(RestrictedBoltzmannMachine(2), **o),
    "restricted, an interval": lambda **o: system(RestrictedBoltzmannMachine(2), UNIT, **o),
    "dense, an interval": lambda **o: system(DenseEnergy((6,)), UNIT, **o),
    "dense, the half-line": lambda **o: system(DenseEnergy((6,)), constraints.positive, **o),
    "dense, a base that trains": lambda **o: system(DenseEnergy((6,)), base=Autoregressive((1,), hidden=(4,)), **o),
}


# The gradient of log Z.


@by_name(SYSTEMS)
def test_chains_that_follow_the_model_carry_the_exact_gradient(name):
    family, states, volume = SYSTEMS[name](negatives=Persistent(500, steps=2))
    x, parameters, found = states[torch.randint(len(states), (5,))], list(family.parameters()), []
    for _ in range(40):
        equilibrate(family, states)
        found.append(gradient(family().log_prob(x).sum(), parameters))
    assert_means(torch.stack(found), gradient(exact_log_prob(family(), x, states, volume).sum(), parameters))


def moments(u):
    """Of positions (n, *position): coordinates, their products, and how far each is beyond five points of the line."""
    u = u.flatten(1)
    beyond = (2 * (u[..., None] - torch.linspace(-2.0, 2.0, 5))).tanh().flatten(1)
    return torch.cat([u, (u[:, :, None] * u[:, None]).flatten(1), beyond], 1)


ELSEWHERE = {
    "annealed": {"negatives": Annealed(5000, steps=100)},
    "from the data": {"negatives": Contrastive(steps=50)},
    "persistent, at first": {"negatives": Persistent(5000, steps=5)},
    "persistent, begun anew": {"negatives": Persistent(5000, steps=50, restart=1.0)},
}


@by_name(ELSEWHERE)
@pytest.mark.parametrize(
    "of",
    slow_unless(
        ["restricted, zeros and ones", "dense, the line"],
        ["restricted, zeros and ones", "dense, classes", "dense, the line", "restricted, the line"],
    ),
)
def test_chains_from_elsewhere_come_to_follow_the_model(of, name):
    """All data are one point, so that chains from the data have a long way to go."""
    family, states, _ = SYSTEMS[of](sampler=Hamiltonian(0.3) if of == "dense, the line" else "default", **ELSEWHERE[name])
    fn = family()
    u = fn.draw_negatives(states[len(states) // 2].expand(5000, -1)).reshape(-1, *fn.path.position_shape)
    with torch.no_grad():
        law = fn.unnormalized_log_prob(states).softmax(0)
    assert_means(moments(u), law @ moments(fn.path.encode(states)))


@by_name(["restricted, zeros and ones", "dense, the line"])
def test_draws_and_tempered_negatives_follow_the_model(name):
    sampler = ParallelTempering(
        Hamiltonian(0.3, num_leapfrog=3) if name == "dense, the line" else Gibbs(), temperatures=3, steps=2
    )
    family, states, _ = SYSTEMS[name](sampler=sampler, negatives=Persistent(2000, steps=30), num_steps=60)
    fn = family()
    with torch.no_grad():
        law = fn.unnormalized_log_prob(states).softmax(0)
    assert_means(moments(fn.path.encode(fn.sample((2000,)))), law @ moments(fn.path.encode(states)))
    assert_means(moments(fn.draw_negatives(states)), law @ moments(fn.path.encode(states)))
    assert family.replay_buffer.chains.shape == (2000, 3, *states.shape[1:])


def sweeps(family, states):
    """The matrix of a sweep of a restricted machine from state to state (S, S): over h, p(h | v) p(v' | h)."""
    e, h = family.energy, outcomes(2, 2).double()
    on = ((states - e.centre) @ e.weight + e.hidden).sigmoid()
    of_h = (h * on[:, None] + (1 - h) * (1 - on[:, None])).prod(-1)
    on = (family.marginals + e.visible + (h - 0.5) @ e.weight.T).sigmoid()
    return of_h @ (states * on[:, None] + (1 - states) * (1 - on[:, None])).prod(-1)


def test_the_bias_of_contrastive_divergence_is_as_computed_and_shrinks_with_its_steps():
    """Of a machine with two modes, of which the data have one too often: a fifth of the gradient at first."""
    family, states, _ = SYSTEMS["restricted, zeros and ones"]()
    fixed(family, 0.3).energy.weight.data.add_(2.0)
    family.energy.centre.fill_(0.5)
    data = torch.tensor([0, 0, 3, 7])
    x, parameters = states[data].repeat(250, 1), list(family.parameters())
    exact, matrix, bias = gradient(exact_log_prob(family(), x, states).mean(), parameters), sweeps(family, states).detach(), {}
    for steps in (1, 4, 16):
        family.negatives = Contrastive(steps)
        law = torch.linalg.matrix_power(matrix, steps)[data].mean(0)
        log_f = family().unnormalized_log_prob
        wanted = gradient(log_f(x).mean() - law @ log_f(states), parameters)
        assert_means(torch.stack([gradient(family().log_prob(x).mean(), parameters) for _ in range(40)]), wanted)
        bias[steps] = ((wanted - exact).norm() / exact.norm()).item()
    assert bias == pytest.approx({1: 0.2247, 4: 0.0796, 16: 0.0012}, abs=1e-4)


CONDITIONAL = {
    "restricted, zeros and ones": lambda **o: system(RestrictedBoltzmannMachine(2), BINARY, context=2, **o),
    "general, classes": lambda **o: system(BoltzmannMachine(1), CLASSES, context=2, **o),
    "dense, the line": lambda **o: system(DenseEnergy((6,)), context=2, sampler=Hamiltonian(0.3, num_leapfrog=3), **o),
    "a context that is embedded": lambda **o: system(DenseEnergy((6,)), BINARY, context=nn.Linear(2, 3), **o),
    "a base that trains": lambda **o: system(
        DenseEnergy((6,)), base=Autoregressive((1,), hidden=(4,)), context=2, sampler=Hamiltonian(0.3, num_leapfrog=3), **o
    ),
}


@by_name(
    [*CONDITIONAL, "dense, the line, annealed", "dense, the line, frozen"],
    kept=["restricted, zeros and ones", "dense, the line", "dense, the line, annealed"],
)
def test_the_gradient_in_the_context_is_exact_as_in_the_parameters(name):
    """Of a batch of three contexts, each of which has hundreds of data or chains."""
    annealed, of = name.endswith("annealed"), ", ".join(name.split(", ")[:2])
    family, states, volume = CONDITIONAL[of](negatives=Annealed(300, steps=25) if annealed else Contrastive(20))
    family.requires_grad_(not name.endswith("frozen"))
    context = torch.randn(3, 2, requires_grad=True)
    x = states[len(states) // 2].expand(1 if annealed else 200, 3, -1)
    wanted = [p for p in [context, *family.parameters()] if p.requires_grad]
    exact = gradient(exact_log_prob(family(context), x, states, volume).mean(), wanted)
    found = [gradient(family(context).log_prob(x).mean(), wanted) for _ in range(20)]
    assert_means(torch.stack(found), exact)


# The same under Pyro's own losses.


def rows(x, fn):
    with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
        pyro.sample("x", fn, obs=x)


def a_part(x, fn):
    with pyro.plate("rows", 4, subsample=torch.arange(2), dim=-2), pyro.plate("columns", 6, subsample_size=3, dim=-1):
        pyro.sample("x", fn, obs=x)


def an_event(x, fn):
    pyro.sample("x", fn.expand([2, 3]).to_event(2), obs=x)


SOME = torch.tensor([[True, False, True], [False, False, True]])
LOSSES = {  # model, the weight of each datum, options of the loss
    "nested plates": (rows, 1.0, {}),
    "subsampled": (a_part, 4.0, {}),
    "one event": (an_event, 1.0, {}),
    "scaled": (poutine.scale(rows, 2.5), 2.5, {}),
    "masked from outside": (poutine.mask(rows, SOME), SOME, {}),
    "masked": (lambda x, fn: rows(x, fn.mask(SOME)), SOME, {}),
    "masked and scaled": (poutine.scale(poutine.mask(rows, SOME), 3.0), 3.0 * SOME, {}),
    "particles": (rows, 1.0, {"num_particles": 3}),
    "particles at once": (rows, 1.0, {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2}),
}


@by_name(LOSSES, kept=["nested plates", "subsampled", "masked and scaled", "particles at once"])
@pytest.mark.parametrize("of", ["a family", "a conditional family"])
def test_pyros_loss_has_the_exact_gradient(name, of):
    model, weight, options = LOSSES[name]
    x = torch.randint(2, (2, 3, 3)).double()
    if of == "a family":
        family, states, _ = SYSTEMS["restricted, zeros and ones"](negatives=Persistent(500, steps=2))
        made, wanted = family, list(family.parameters())
    else:
        family, states, _ = CONDITIONAL["restricted, zeros and ones"](negatives=Annealed(50, steps=8))
        context = torch.randn(2, 3, 2, requires_grad=True)
        made, wanted = lambda: family(context), [context, *family.parameters()]
    with torch.no_grad():
        fn = made()
    fn, found = made(), []
    states_of = states[:, None, None] if fn.batch_shape else states
    log_p = fn.unnormalized_log_prob(x) - fn.unnormalized_log_prob(states_of).logsumexp(0)
    exact = gradient(-(weight * log_p).sum(), wanted)
    elbo = Trace_ELBO(**options)
    for _ in range(25):
        if of == "a family":
            equilibrate(family, states)
        found.append(gradient(elbo.differentiable_loss(lambda: model(x, made()), lambda: None), wanted))
    assert_means(torch.stack(found), exact)


def latent(family, y):
    with pyro.plate("data", 2):
        z = pyro.sample("z", family())
        pyro.sample("y", dist.Normal(z, 0.7).to_event(1), obs=y)


def test_as_a_prior_it_has_the_exact_gradient_of_the_elbo_in_all_parameters():
    family, z, volume = SYSTEMS["dense, the line"](negatives=Persistent(500, steps=2))
    loc, log_scale, y = torch.tensor([[0.5], [-1.0]]), torch.tensor([[-0.3], [0.2]]), torch.tensor([[1.0], [2.0]])
    wanted = [loc.requires_grad_(), log_scale.requires_grad_(), *family.parameters()]

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    log_q = dist.Normal(loc.T, log_scale.exp().T).log_prob(z)  # (S, 2)
    log_p = exact_log_prob(family(), z, z, volume)[:, None] + dist.Normal(y.T, 0.7).log_prob(z)
    exact = gradient(-(log_q.exp() * (log_p - log_q)).sum() * volume, wanted)
    elbo, found = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1), []
    for _ in range(40):
        equilibrate(family, z)
        found.append(gradient(elbo.differentiable_loss(lambda: latent(family, y), guide), wanted))
    assert_means(torch.stack(found), exact)


def test_as_the_prior_of_a_vae_it_has_the_exact_gradient_in_its_parameters():
    prior, z, volume = SYSTEMS["dense, the line"](negatives=Persistent(500, steps=2))
    vae, x, found = VAE((2,), prior=prior, hidden=(4,), standardize=False), torch.randn(3, 2), []
    vae.eval()
    wanted = list(prior.parameters())
    with torch.no_grad():
        q = vae.posterior(x).log_prob(z[:, None]).exp() * volume
    exact = gradient(-(q.sum(-1) * exact_log_prob(prior(), z, z, volume)).sum(), wanted)
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    for _ in range(40):
        equilibrate(prior, z)
        found.append(gradient(elbo.differentiable_loss(vae.model, vae.guide, x), wanted))
    assert_means(torch.stack(found), exact)


# Negatives are drawn where gradients need them, and nowhere else.


@dataclass(frozen=True)
class Shift(Sampler):
    """Moves every coordinate of every chain by one, and counts how often it is asked to."""

    steps: list = field(default_factory=list, compare=False)

    def init(self, x, target, beta=1.0):
        return State(x)

    def step(self, state, target, step_size, beta=1.0):
        self.steps.append(len(state.x))
        return State(state.x + 1), state.x.new_ones(len(state.x))


def shifting(chains=4, steps=3, **options):
    """A family over the line whose chains begin at their own numbers, in tens."""
    kept = options.pop("kept", {})
    family = EnergyModel(
        (1,),
        energy=DenseEnergy((4,)),
        sampler=Shift(),
        negatives=Persistent(chains, steps=steps, **kept),
        num_steps=1,
        **options,
    )
    family.replay_buffer.put(10.0 * torch.arange(1, len(family.replay_buffer.chains) + 1)[:, None])
    return family.eval()


def frozen(family):
    return family.requires_grad_(False)


X = torch.zeros(5, 1).double()
QUIET = {
    "no_grad": lambda f: torch.no_grad()(f().log_prob)(X),
    "inference mode": lambda f: torch.inference_mode()(f().log_prob)(X),
    "unnormalized": lambda f: f().unnormalized_log_prob(X.clone().requires_grad_()),
    "score": lambda f: f().score(X),
    "frozen": lambda f: frozen(f)().log_prob(X.clone().requires_grad_()),
    "frozen, in a model": lambda f: Trace_ELBO().differentiable_loss(frozen(f).model, f.guide, X),
    "frozen, its base too": lambda f: frozen(shifting_base(f))().log_prob(X),
    "evaluate_loss": lambda f: SVI(f.model, f.guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).evaluate_loss(X),
}


def shifting_base(family):
    family.base = Autoregressive((1,), hidden=(4,)).eval()
    return family


@by_name(QUIET)
def test_no_negatives_are_drawn_where_nobody_needs_them(name):
    family = shifting()
    before = family.replay_buffer.chains.clone()
    QUIET[name](family)
    assert family.sampler.steps == []
    assert torch.equal(family.replay_buffer.chains, before)


LOUD = {
    "parameters": lambda f: f().log_prob(X),
    "one parameter": lambda f: next(frozen(f).parameters()).requires_grad_() is None or f().log_prob(X),
    "a base": lambda f: (frozen(f), shifting_base(f)().log_prob(X)),
    "a step": lambda f: SVI(f.model, f.guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO()).step(X),
    "contrastive divergence": lambda f: ContrastiveDivergence().loss_and_grads(f.model, f.guide, X),
}


@by_name(LOUD)
def test_negatives_are_drawn_once_a_call_where_a_gradient_needs_them(name):
    family = shifting()
    LOUD[name](family)
    assert family.sampler.steps == [4, 4, 4]
    torch.testing.assert_close(family.replay_buffer.chains, 10.0 * torch.arange(1, 5)[:, None] + 3)


def test_frozen_parameters_draw_negatives_for_a_context_that_needs_them_and_for_no_other():
    family = frozen(EnergyModel((1,), context=2, sampler=Shift(), negatives=Annealed(2, steps=5))).eval()
    family(torch.randn(3, 2)).log_prob(torch.zeros(3, 1))
    assert family.sampler.steps == []
    family(torch.randn(3, 2, requires_grad=True)).log_prob(torch.zeros(3, 1))
    assert family.sampler.steps == [6] * 5


@pytest.mark.parametrize("needed", [False, True])
def test_a_plain_function_needs_negatives_if_what_it_holds_does(needed):
    sampler, scale = Shift(), torch.ones((), requires_grad=needed)
    fn = Energy(lambda x: scale * x.square().sum(-1), (1,), sampler=sampler, negatives=Contrastive(2))
    before = torch.random.get_rng_state()
    fn.log_prob(X)
    assert len(sampler.steps) == 2 * needed
    assert needed or torch.equal(torch.random.get_rng_state(), before)


def test_draws_and_predictive_leave_the_chains_where_they_are():
    family = shifting()
    before = copy.deepcopy(family.state_dict())
    assert family().sample((6,)).shape == (6, 1)
    assert Predictive(family.model, num_samples=3, parallel=True)(size=2)["x"].shape == (3, 2, 1)
    with torch.no_grad():
        family.model(size=2)
    for key, value in family.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_frozen_energy_says_the_same_each_time():
    family = frozen(EnergyModel((2,))).eval()
    x = torch.randn(5, 2)
    assert torch.equal(family().log_prob(x), family().log_prob(x))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [NUTS, partial(HMC, trajectory_length=1.5)], ids=["NUTS", "HMC"])
def test_a_frozen_energy_is_a_prior_under(kernel):
    """Of 200 variables with the same posterior; the means of each over its draws are as good as independent."""
    family, z, _ = SYSTEMS["dense, the line"]()
    frozen(family)

    def model():
        with pyro.plate("data", 200):
            latent = pyro.sample("z", family())
            pyro.sample("y", dist.Normal(latent, 0.7).to_event(1), obs=torch.full((200, 1), 2.0))

    mcmc = MCMC(kernel(model), 150, 150, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["z"].squeeze(-1)
    weights = (family().unnormalized_log_prob(z) + dist.Normal(2.0, 0.7).log_prob(z).squeeze(-1)).softmax(0)
    found = torch.stack([draws.mean(0), draws.square().mean(0)], -1)
    assert_means(found, torch.cat([weights @ z, weights @ z.square()]))


# Without a sampler.


def test_without_a_sampler_what_draws_is_refused_by_name_and_the_rest_works():
    family, x = EnergyModel((2,), energy=DenseEnergy((4,)), sampler=None), torch.randn(5, 2)
    loss = lambda: ContrastiveDivergence().loss_and_grads(family.model, family.guide, x)  # noqa: E731
    for ask in (family().sample, lambda: family().log_prob(x), loss):
        with pytest.raises(
            ValueError, match=r"NoiseContrastive\(noise=...\), SlicedScoreMatching\(\) or DenoisingScoreMatching"
        ):
            ask()
    assert family().score(x).shape == x.shape
    assert family().unnormalized_log_prob(x).shape == (5,)
    with torch.no_grad():
        assert torch.equal(family().log_prob(x), family().unnormalized_log_prob(x))
    assert log_partition(family).kind == "exact"
    with pytest.raises(ValueError, match="no sampler, and so no estimate of log Z"):
        log_partition(EnergyModel((3,), sampler=None))


# Chains that go on.


def reloaded(family, path):
    fresh = shifting()
    fresh.load_state_dict(family.state_dict())
    return fresh


def from_checkpoint(family, path):
    checkpoints.save(path / "fit", family)
    return checkpoints.load(path / "fit", shifting())


COPIES = {
    "state_dict": reloaded,
    "deepcopy": lambda family, path: copy.deepcopy(family),
    "pickle": lambda family, path: pickle.loads(pickle.dumps(family)),
    "a checkpoint": from_checkpoint,
    "float and double": lambda family, path: copy.deepcopy(family).float().double(),
}


@by_name(COPIES)
def test_chains_are_buffers_that_go_along(name, tmp_path):
    family = shifting()
    family.replay_buffer.put_step_size(torch.tensor(0.375), torch.tensor(0.5))
    family().log_prob(X)
    new = COPIES[name](family, tmp_path)
    assert new.replay_buffer.is_started
    assert torch.equal(new.replay_buffer.chains, family.replay_buffer.chains)
    assert torch.equal(new.replay_buffer.step_size, family.replay_buffer.step_size)
    before = family.replay_buffer.chains.clone()
    new().log_prob(X)
    assert torch.equal(new.replay_buffer.chains, before + 3)
    assert torch.equal(family.replay_buffer.chains, before)


def test_chains_move_with_the_family_to_single_precision():
    family = EnergyModel((3,), negatives=Persistent(8, steps=2)).float()
    family().log_prob(torch.randn(4, 3).float()).sum().backward()
    assert family.replay_buffer.chains.dtype == torch.float32


def test_chains_go_on_from_call_to_call():
    family = shifting()
    for call in range(1, 4):
        u = family().draw_negatives(X)
        assert torch.equal(u, 10.0 * torch.arange(1, 5)[:, None] + 3 * call)


def test_of_a_larger_buffer_as_many_as_are_moved_change_and_all_have_their_turn():
    """One of ten is left out of 60 calls with probability 0.6^60 < 1e-12."""
    family = shifting(kept={"buffer_size": 10})
    start = family.replay_buffer.chains.clone()
    for _ in range(60):
        before = family.replay_buffer.chains.clone()
        u = family().draw_negatives(X)
        moved = (family.replay_buffer.chains - before).squeeze(-1)
        assert sorted(moved.tolist()) == [0.0] * 6 + [3.0] * 4
        assert torch.equal(u.sort(0).values, family.replay_buffer.chains[moved > 0].sort(0).values)
    assert (family.replay_buffer.chains > start).all()


@pytest.mark.parametrize("restart", [0.0, 0.25, 1.0])
def test_chains_begin_anew_with_the_probability_that_is_asked_for(restart):
    """A tenth off with probability below 1e-6: of 1000 chains the share has a standard error of 0.014."""
    family = shifting(1000, kept={"restart": restart})
    family.replay_buffer.put(torch.full((1000, 1), 30.0))
    anew = family().draw_negatives(X) < 20.0
    assert abs(anew.double().mean() - restart) <= (0.0 if restart in (0, 1) else 0.07)


def test_a_distribution_by_itself_keeps_no_chains():
    fn = Energy(DenseEnergy((4,)).build(torch.Size([2]), Reals(), 0), (2,), negatives=Persistent(7, steps=1))
    assert fn.replay_buffer is None
    assert fn.draw_negatives(torch.zeros(3, 2)).shape == (7, 2)


def test_chains_cannot_go_on_where_every_row_has_a_context():
    with pytest.raises(ValueError, match=r"Use negatives=Annealed\(\) or Contrastive"):
        EnergyModel((1,), context=2, negatives=Persistent(4))
    energy = Energy(Bowl(), (1,), context=torch.zeros(3, 2), negatives=Persistent(4))
    with pytest.raises(ValueError, match=r"Use negatives=Annealed\(\) or Contrastive"):
        energy.log_prob(torch.zeros(3, 1))


class Bowl(nn.Module):
    """A normal density whose height, but not its shape, depends on the context."""

    def __init__(self):
        super().__init__()
        self.rise = nn.Parameter(torch.ones(()))

    def forward(self, x, context=None):
        square = x.square().sum(-1) / 2
        return square if context is None else square - self.rise * context[:, 0]


def labelled(energy, how=None, *, energy_first=False):
    """A label in the context of an energy, and a guide for it, weighed by what is observed."""

    def model(x):
        z = None if energy_first else pyro.sample("z", dist.Categorical(torch.ones(2)))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", energy(torch.zeros(len(x)).long() if z is None else z.expand(len(x))), obs=x)
        if energy_first:
            pyro.sample("z", dist.Categorical(torch.ones(2)))

    def guide(x):
        pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.zeros(2))), infer={"enumerate": how})

    return model, guide


@pytest.mark.parametrize(("elbo", "how"), [(Trace_ELBO, None), (TraceEnum_ELBO, "sequential")])
def test_what_would_be_weighed_without_log_z_of_each_context_is_refused(elbo, how):
    energy, x = EnergyModel((1,), context=Labels(2), energy=Bowl(), negatives=Annealed(4, steps=5)), torch.randn(4, 1)
    svi = SVI(*labelled(energy, how), pyro.optim.Adam({"lr": 1e-2}), elbo(max_plate_nesting=1))
    with pytest.raises(ValueError, match=r"'z', drawn without a gradient, would be weighed .* Draw it after"):
        svi.step(x)
    svi = SVI(*labelled(energy, how, energy_first=True), pyro.optim.Adam({"lr": 1e-2}), elbo(max_plate_nesting=1))
    assert math.isfinite(svi.step(x))
    assert Predictive(labelled(energy)[0], num_samples=3)(x)["z"].shape[0] == 3  # draws are not weighed


def test_an_energy_trains_where_pyro_tracks_what_depends_on_what():
    energy = EnergyModel((2,), negatives=Persistent(8, steps=2))

    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("z", energy()).sum(), 1.0), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), TraceGraph_ELBO()).step(torch.tensor(0.3)))


class Scaled(nn.Module):
    """An energy that a buffer outside of the state dict takes part in."""

    def __init__(self):
        super().__init__()
        self.register_buffer("t", torch.ones(()), persistent=False)

    def forward(self, x):
        return self.t * x.square().sum(-1) / 2


def test_log_z_is_dropped_with_a_change_of_any_buffer():
    family = EnergyModel((1,), energy=Scaled(), standardize=False)
    log_partition(family)
    assert family().density == "exact"
    family.energy.t.fill_(100.0)
    assert family().density == "unnormalized"


def test_another_level_of_noise_has_another_log_z():
    d = EnergyModel((1,), noise=(0.1, 1.0))()
    known = d.normalized(LogPartition(torch.tensor(7.0), torch.tensor(0.0), "exact"))
    assert known.at_noise(torch.tensor(0.5)).density == "unnormalized"


def test_a_family_that_is_tilted_is_standardised_with_the_energy():
    x = 100 + 10 * torch.randn(200, 2)
    energy = EnergyModel((2,), base=Flow((2,), transform=RealNVP()), negatives=Persistent(8, steps=1))
    energy.standardize(x)
    assert torch.allclose(energy.base.loc, x.mean(0))
    assert torch.allclose(energy.base.scale, x.std(0))
    learned = Flow((2,), transform=RealNVP())
    learned.standardize(torch.randn(50, 2))
    before = learned.loc.clone()
    EnergyModel((2,), base=learned).standardize(x)
    assert torch.equal(learned.loc, before)


def test_energies_that_are_no_function_of_one_datum_are_refused():
    with pytest.raises(ValueError, match="BatchNorm, so that the energy of one datum depends on others"):
        EnergyModel((2,), energy=nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    random = PyroModule[nn.Linear](2, 1)
    random.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
    with pytest.raises(ValueError, match="weights of PyroLinear are random"):
        EnergyModel((2,), energy=random)
    dropping = EnergyModel((2, 2), energy=nn.Sequential(nn.Dropout1d(0.5), nn.Flatten(), nn.Linear(4, 1)))
    with pytest.raises(ValueError, match="dropout is active"):
        dropping().sample()


def test_samplers_that_noise_would_ignore_are_refused():
    with pytest.raises(ValueError, match="sampled by annealed Langevin dynamics, but found sampler=Hamiltonian"):
        EnergyModel((2,), noise=(0.1, 1.0), sampler=Hamiltonian())


def test_a_plain_energy_checks_its_options_and_draws_in_its_own_precision():
    with pytest.raises(TypeError, match="wants a sampler such as"):
        Energy(Bowl(), (1,), sampler=Langevin)
    with pytest.raises(ValueError, match="num_steps of 1 or more"):
        Energy(Bowl(), (1,), num_steps=0)
    d = Energy(nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 1)).double(), (2,), num_steps=3)
    assert d.sample((4,)).dtype == torch.float64


# What is tilted, in the units of the data.


class Cosine(nn.Module):
    """An energy of the user's own, which remembers what it was asked about."""

    def __init__(self):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        self.seen = x.detach()
        return self.size * x.cos().sum(-1)


DATA = 3.0 + 2.0 * torch.arange(5.0).double()[:, None]  # mean 7, standard deviation 10 ** 0.5
BASES = {
    "a Pyro distribution": lambda: dist.Normal(torch.full((1,), 5.0), 3.0).to_event(1),
    "a mixture": lambda: Mixture(torch.tensor([0.3, 0.7]), torch.tensor([2.0, 8.0]), torch.tensor([1.0, 2.0])).distribution()
    .expand([1]).to_event(1),
    "a family": lambda: perturb(Autoregressive((1,), hidden=(4,), standardize=False)),
    "a frozen family": lambda: frozen(perturb(Autoregressive((1,), hidden=(4,), standardize=False))).eval(),
}  # fmt: skip


@by_name(BASES)
def test_a_base_is_tilted_in_the_units_of_the_data(name):
    family = EnergyModel((1,), energy=Cosine(), base=BASES[name]()).eval()
    family.standardize(DATA)
    base, x = family.base() if isinstance(family.base, nn.Module) else family.base, torch.linspace(-3.0, 9.0, 7)[:, None]
    with torch.no_grad():
        wanted = base.log_prob(x) - 1.3 * ((x - 7) / 10**0.5).cos().squeeze(-1)
        torch.testing.assert_close(family().unnormalized_log_prob(x), wanted)
        log_partition(family)
        torch.testing.assert_close(
            integral(lambda x: family().log_prob(x).exp(), -40.0, 50.0), torch.ones(()), rtol=1e-4, atol=0
        )


FLAT = {  # support, standardise, data, what the energy is given, log density of a flat or own measure; each of the data
    "the line": (constraints.real, True, lambda x: (x - 7) / 10**0.5),
    "the line, as it is": (constraints.real, False, lambda x: x),
    "an interval": (UNIT, True, lambda x: x - 1),
    "an interval, as it is": (UNIT, False, lambda x: x),
    "the half-line": (constraints.positive, True, lambda x: (x.log() - DATA.log().mean()) / DATA.log().std()),
    "the half-line, as it is": (constraints.positive, False, lambda x: x),
}


@by_name(FLAT)
def test_an_energy_of_ones_own_has_a_flat_measure_and_sees_what_is_promised(name):
    support, standardize, seen = FLAT[name]
    family = EnergyModel((1,), energy=Cosine(), support=support, standardize=standardize, sampler=None)
    family.standardize(DATA / 6 if support is UNIT else DATA)
    x = torch.tensor([[0.0], [0.3], [1.0], [1.7], [2.0]])[1 if support is constraints.positive else 0 :]
    with torch.no_grad():
        found = family().unnormalized_log_prob(x)
    torch.testing.assert_close(family.energy.seen, seen(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, -1.3 * seen(x).cos().squeeze(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("event", [(1,), (2, 2), ()])
def test_a_choice_tilts_a_normal_of_standardised_data(event):
    family, data = EnergyModel(event).eval(), 4.0 + 3.0 * torch.randn(50, *event)
    family.standardize(data)
    x, loc, scale = torch.randn(6, *event), data.mean(0), data.std(0)
    normal = dist.Normal(loc, scale).log_prob(x).reshape(6, -1).sum(-1)
    torch.testing.assert_close(family().unnormalized_log_prob(x), normal - family.energy((x - loc) / scale))


def test_a_choice_tilts_the_uniform_law_of_an_interval_also_at_its_ends():
    family = EnergyModel((2,), energy=DenseEnergy((4,)), support=UNIT)
    x = torch.tensor([[0.0, 2.0], [0.0, 0.3], [2.0, 2.0], [1.0, 0.2]])
    wanted = -2 * log(2) - family.energy(x - 1)
    torch.testing.assert_close(family().unnormalized_log_prob(x), wanted, rtol=1e-6, atol=1e-6)
    assert family().score(x).isfinite().all()
    log_partition(family)
    total = integral(lambda x: family().log_prob(x).exp().detach(), 0.0, 2.0, n=200, dims=2)
    torch.testing.assert_close(total, torch.ones(()), rtol=1e-4, atol=0)


def test_a_choice_tilts_a_normal_of_the_logarithms_on_a_half_line():
    family, data = (
        EnergyModel((1,), energy=DenseEnergy((8,)), support=constraints.positive).eval(),
        (0.5 * torch.randn(50, 1)).exp(),
    )
    family.standardize(data)
    x, loc, scale = torch.rand(6, 1) + 0.1, data.log().mean(0), data.log().std(0)
    wanted = dist.LogNormal(loc, scale).log_prob(x).squeeze(-1) - family.energy((x.log() - loc) / scale)
    torch.testing.assert_close(family().unnormalized_log_prob(x), wanted)
    log_partition(family)
    total = integral(lambda x: family().log_prob(x).exp().detach(), 0.0, 80.0, n=40_000)
    torch.testing.assert_close(total, torch.ones(()), rtol=1e-4, atol=0)


# Discrete data and Boltzmann machines.


@pytest.mark.parametrize("energy", [RestrictedBoltzmannMachine(2), BoltzmannMachine(1), DenseEnergy((4,))])
def test_the_frequencies_of_discrete_data_are_the_start(energy):
    """Each with half a count added, as the only energy is zero."""
    x = torch.tensor([[0, 1, 2], [0, 0, 2], [1, 1, 2], [0, 2, 2]])
    for support, data, levels in ((CLASSES, x, 3), (BINARY, (x > 0).double(), 2)):
        family = EnergyModel((3,), energy=energy, support=support)
        family.standardize(data)
        for p in family.parameters():
            p.data.zero_()
        log_partition(family)
        share = (nn.functional.one_hot(data.long(), levels).sum(0) + 0.5) / (4 + levels / 2)
        states = outcomes(levels, 3)
        wanted = share[torch.arange(3), states].prod(-1)
        with torch.no_grad():
            torch.testing.assert_close(family().log_prob(states.to(data.dtype)).exp(), wanted)


@by_name(["restricted, zeros and ones", "restricted, classes", "general, zeros and ones", "general, classes"])
def test_the_energy_of_a_machine_is_a_sum_over_its_hidden_units(name):
    family, states, _ = SYSTEMS[name]()
    e, v = family.energy, family().path.encode(states).flatten(1)
    n, hidden = v.shape[1], torch.zeros(0) if e.hidden is None else e.hidden
    pairs, visible, constant = torch.zeros(n + len(hidden), n + len(hidden)), e.visible, 0.0
    if "restricted" in name:
        pairs[:n, n:] = e.weight
        visible = visible - e.weight.sum(-1) / 2
        hidden = hidden - e.centre @ e.weight
        constant = (visible + e.weight.sum(-1) / 2) @ e.centre + hidden.sum() / 2
    else:
        pairs = e.couplings.triu(1)
        if support_classes := e.space.width > 1:
            site = torch.arange(n) // e.space.width
            pairs[:n, :n] = pairs[:n, :n] * (site[:, None] != site)
        assert support_classes == ("classes" in name)
    with torch.no_grad():
        torch.testing.assert_close(e(v), energy_of_machine(v, visible, hidden, pairs + pairs.T) + constant)


@pytest.mark.parametrize("support", [BINARY, CLASSES, constraints.real], ids=["binary", "classes", "real"])
def test_centring_leaves_the_distributions_of_restricted_machines_as_they_are(support):
    options = {"energy": RestrictedBoltzmannMachine(3), "support": support}
    centred, plain = (perturb(EnergyModel((2,), **options), 1.0).eval() for _ in range(2))
    plain.load_state_dict(centred.state_dict())
    mean = torch.rand_like(centred.energy.centre)
    centred.energy.centre.copy_(mean)
    plain.energy.hidden.data.sub_(mean @ plain.energy.weight)
    x = (
        torch.randn(9, 2)
        if support is constraints.real
        else outcomes(2, 2).to(torch.long if support is CLASSES else mean.dtype)
    )
    for family in (centred, plain):
        log_partition(family)
    with torch.no_grad():
        torch.testing.assert_close(centred().log_prob(x), plain().log_prob(x), rtol=1e-5, atol=1e-5)


# Levels of noise.


class Smoothed(nn.Module):
    """Minus the log density of two normals with noise added, whose level ends the context."""

    def forward(self, u, context):
        variance = 0.3**2 + (2 * context[:, -1]).exp()
        return -Mixture(torch.tensor([0.3, 0.7]), torch.tensor([-2.0, 1.5]), variance.sqrt()[:, None]).log_prob(u.squeeze(-1))


@pytest.mark.parametrize("context", [0, 2])
def test_at_a_level_of_noise_the_density_is_the_wider_normal_tilted(context):
    family = perturb(EnergyModel((2,), context=context, energy=DenseEnergy((6,)), noise=(0.1, 3.0)))
    family.standardize(torch.tensor([[1.0, 2.0], [3.0, 8.0], [2.0, -4.0]]))
    sigma, x, c = torch.tensor([0.1, 0.5, 3.0]), torch.randn(3, 2), torch.randn(3, context) if context else None
    told = sigma.log()[:, None] if c is None else torch.cat([c, sigma.log()[:, None]], -1)
    u, wide = (x - family.loc) / family.scale, (1 + sigma**2).sqrt()[:, None]
    f = family.energy(u / wide, told) / sigma
    normal = -0.5 * (u / wide).square().sum(-1) - log(2 * pi) - family.scale.log().sum()
    torch.testing.assert_close(family(c).at_noise(sigma).unnormalized_log_prob(x), normal - f)
    torch.testing.assert_close(family(c).unnormalized_log_prob(x)[0], (normal - f)[0])


def test_without_an_energy_the_noised_normal_is_the_wider_one():
    family = EnergyModel((1,), energy=DenseEnergy((4,)), noise=(0.1, 3.0))
    for p in family.parameters():
        p.data.zero_()
    found = log_partition(family().at_noise(torch.tensor([0.1, 0.5, 2.0])))
    torch.testing.assert_close(found.value, 0.5 * (1 + torch.tensor([0.1, 0.5, 2.0]) ** 2).log(), rtol=1e-4, atol=1e-5)


def test_draws_are_led_down_the_levels_of_noise():
    """Bounds are six standard errors, and what few levels leave."""
    x = EnergyModel((1,), energy=Smoothed(), standardize=False, noise=(0.05, 4.0)).eval()().sample((3000,)).squeeze(-1)
    left, right = x[x < 0], x[x >= 0]
    assert len(left) / 3000 == pytest.approx(0.3, abs=0.05)
    assert left.mean() == pytest.approx(-2.0, abs=0.08)
    assert right.mean() == pytest.approx(1.5, abs=0.05)
    assert left.std() == pytest.approx(0.3, rel=0.2)


def test_a_restricted_machine_may_be_told_the_level_of_noise():
    family = EnergyModel((2,), energy=RestrictedBoltzmannMachine(2), noise=(0.1, 1.0))
    assert family().at_noise(torch.ones(3)).unnormalized_log_prob(torch.randn(3, 2)).shape == (3,)


def test_only_an_energy_that_is_told_has_levels_of_noise():
    with pytest.raises(ValueError, match=r"EnergyModel\(..., noise=\(low, high\)\)"):
        EnergyModel((1,))().at_noise(torch.ones(()))


# What does not go together.


def built(**options):
    return lambda: EnergyModel(options.pop("event", (3,)), **options)


NORMAL = dist.Normal(torch.zeros(3), 1.0).to_event(1)


REFUSED = {
    "a general machine of real numbers": (built(energy=BoltzmannMachine()), "RestrictedBoltzmannMachine or DenseEnergy"),
    "images without rows": (built(energy=ConvolutionalEnergy()), "Use DenseEnergy, or fewer stages"),
    "images that are too small": (built(event=(3, 3), energy=ConvolutionalEnergy()), "at least 4 rows"),
    "noise on discrete data": (built(support=BINARY, noise=(0.1, 1.0)), "leave noise out"),
    "noise that falls": (built(noise=(1.0, 0.1)), "lowest, highest"),
    "noise of zero": (built(noise=(0.0, 0.1)), "lowest, highest"),
    "one level of noise": (built(noise=0.1), "lowest, highest"),
    "Gibbs without conditionals": (built(sampler=Gibbs()), r"Use Langevin\(\)"),
    "Gibbs with a base": (
        built(energy=RestrictedBoltzmannMachine(2), sampler=Gibbs(), base=NORMAL),
        r"Use Langevin\(\)",
    ),
    "gradients over real numbers": (built(sampler=GibbsWithGradients()), r"Langevin\(\) or Hamiltonian"),
    "Langevin over zeros and ones": (built(support=BINARY, sampler=Langevin()), "GibbsWithGradients"),
    "tempered Langevin over classes": (built(support=CLASSES, sampler=ParallelTempering()), "GibbsWithGradients"),
    "a sampler by its name": (built(sampler="Langevin"), "ampler"),
    "negatives that are none": (built(negatives=3), "egatives"),
    "no steps": (built(num_steps=0), "num_steps"),
    "counts without an end": (built(support=constraints.nonnegative_integer), "integer_interval"),
    "a base over other events": (built(base=dist.Normal(torch.zeros(2), 1.0).to_event(1)), r"base over one event of shape"),
    "a base over batches": (built(base=dist.Normal(torch.zeros(3), 1.0)), r"Use .to_event\(1\)"),
    "a base that is a class": (built(base=dist.Normal), "found the class Normal"),
    "a base over counts": (built(base=dist.Poisson(torch.ones(3)).to_event(1)), "base"),
    "a base over real numbers for zeros and ones": (built(support=BINARY, base=NORMAL), "base"),
    "a base over real numbers for an interval": (built(support=UNIT, base=NORMAL), "base"),
    "a base without a density": (built(base=VAE((3,))), "base"),
    "a base with a constant of its own": (built(base=EnergyModel((3,))), "base"),
    "an energy that is a class": (built(energy=DenseEnergy), "found the class DenseEnergy"),
    "an energy that is a function": (built(energy=lambda x: x.sum(-1)), "distributions.Energy"),
    "too many hidden units": (lambda: BoltzmannMachine(17), r"RestrictedBoltzmannMachine\(num_hidden=...\)"),
    "no hidden units": (lambda: RestrictedBoltzmannMachine(0), "num_hidden of 1 or more"),
    "a small buffer": (lambda: Persistent(10, buffer_size=5), "at least 10"),
    "an unlikely restart": (lambda: Persistent(restart=1.5), "probability"),
    "no chains": (lambda: Annealed(0), "num_chains"),
    "no steps from the data": (lambda: Contrastive(0), "steps"),
}  # fmt: skip


@by_name(REFUSED)
def test_what_does_not_go_together_is_refused_by_name(name):
    build, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        build()


@pytest.mark.parametrize("energy", [partial(nn.Linear, 3, 3), partial(nn.Flatten, 0)], ids=["three numbers", "no rows"])
def test_energies_of_another_shape_are_refused(energy):
    with pytest.raises(ValueError, match="one number a row"):
        EnergyModel((3,), energy=energy())().unnormalized_log_prob(torch.zeros(2, 3))


def test_a_column_of_energies_will_do():
    assert EnergyModel((3,), energy=nn.Linear(3, 1))().unnormalized_log_prob(torch.zeros(4, 2, 3)).shape == (4, 2)


def test_an_enumerated_context_is_refused_by_name():
    family, logits = EnergyModel((1,), context=Labels(3), negatives=Annealed(2, steps=2)), torch.zeros(3, requires_grad=True)

    def model():
        with pyro.plate("data", 4):
            label = pyro.sample("label", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("x", family(label), obs=torch.zeros(4, 1))

    with pytest.raises(ValueError, match=r"enumerated.*Flow"):
        TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda: None)


def test_maximum_likelihood_is_refused_even_if_log_z_is_known():
    family = EnergyModel((1,))
    log_partition(family)
    with pytest.raises(ValueError, match="ContrastiveDivergence"):
        MaximumLikelihood().differentiable_loss(family.model, family.guide, DATA)


# What goes wrong in training.


class Falling(nn.Module):
    """An energy that falls without end."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return -self.slope * x.pow(4).sum(-1)


def test_chains_that_run_away_are_told_with_what_to_change():
    family = EnergyModel((2,), energy=Falling(), sampler=Langevin(0.1, adjusted=False))
    told = pytest.warns(RuntimeWarning, match=r"Annealing: the log density is NaN on the path of \d+ of 256 chains")
    with told, pytest.raises(FloatingPointError, match=r"Langevin\(adjusted=True\).*lower learning rate"):
        family().log_prob(torch.ones(4, 2))


def test_energies_that_explode_are_told_with_what_to_change():
    family = EnergyModel((2,), energy=DenseEnergy((4,)))
    for p in family.parameters():
        p.data.mul_(1e5)
    with pytest.raises(FloatingPointError, match=r"Lower the learning rate.*regularization=0.1"):
        family().log_prob(torch.ones(4, 2))


class Exploding(nn.Module):
    """An energy that explodes in training once it has been validated."""

    def __init__(self):
        super().__init__()
        self.loc, self.validated = nn.Parameter(torch.zeros(2)), False

    def forward(self, x):
        self.validated |= not self.training
        return 0.5 * (x - self.loc).square().sum(-1) * (1e9 if self.training and self.validated else 1.0)


def test_training_keeps_the_best_state_when_energies_explode():
    family, x = EnergyModel((2,), energy=Exploding(), negatives=Persistent(16, steps=1)), torch.randn(64, 2)
    with pytest.warns(RuntimeWarning, match="Training stopped: energies explode.*the state of epoch 1 is kept"):
        fit = train(family, x, valid=x, epochs=5, progress=False)
    assert [record["epoch"] for record in fit.history] == [1]
    assert 0 < family.energy.loc.abs().max() < 0.01
    assert family.replay_buffer.chains.isfinite().all()
