"""Samplers against teachers who know the answer: closed forms, small tables, exact transition matrices, kernels on a grid.

False alarms. `assert_means` and `assert_counts` reject what is true with probability 1e-7 (Student's t over independent chains
with Bonferroni's correction, or a chi-square); the skewness of means over thousands of chains can raise that several times. No
test calls them more than ten times, so that each stays below 1e-5. Where a test does otherwise it says so.
"""

import dataclasses
import math
import pickle
from dataclasses import dataclass
from math import log, pi, sqrt

import pytest
import torch
import torch.nn.functional as F
from marks import slow_unless
from pyro.infer import MCMC, NUTS
from scipy import stats
from teachers import Gaussian, Mixture, grid, outcomes, perturb
from torch import nn
from torch.distributions import constraints

from pyro_genmodels.distributions import Energy
from pyro_genmodels.families import BoltzmannMachine, EnergyModel, RestrictedBoltzmannMachine
from pyro_genmodels.samplers import (
    Binary,
    Chains,
    Gibbs,
    GibbsWithGradients,
    Hamiltonian,
    Langevin,
    OneHot,
    ParallelTempering,
    Target,
    anneal,
    annealed_langevin,
    langevin_step,
    potential,
    run,
    sample_chains,
)
from pyro_genmodels.samplers.annealing import schedule, tune
from pyro_genmodels.samplers.chains import _is_lost
from pyro_genmodels.samplers.hamiltonian import leapfrog
from pyro_genmodels.samplers.kernel import DualAveraging, State
from pyro_genmodels.samplers.tempering import swap

pytestmark = pytest.mark.usefixtures("float64")

ALARM = 1e-7
MODES = Mixture(*torch.tensor([[0.3, 0.7], [-2.0, 1.5], [0.6, 0.9]]).double())
CORRELATED = Gaussian(torch.tensor([1.0, -2.0]).double(), torch.tensor([[0.09, 0.36], [0.36, 4.0]]).double())
NORMAL = Gaussian(torch.zeros(1).double(), torch.eye(1).double())


# What is compared.


def assert_means(values, truth):
    """Independent rows (n, ...) have these means."""
    values = values.reshape(len(values), -1)
    truth = torch.as_tensor(truth, dtype=values.dtype).expand(values.shape[1:])
    error = values.std(0) / sqrt(len(values))
    t = ((values.mean(0) - truth) / error).abs()
    bound = stats.t.isf(ALARM / 2 / t.numel(), len(values) - 1)
    assert (t < bound).all(), f"off by {t.tolist()} standard errors: {values.mean(0).tolist()} for {truth.tolist()}"


def assert_counts(index, probabilities):
    """Independent outcomes (n,) of a table follow its probabilities; rare cells are put together until ten are expected."""
    counts = torch.bincount(index.flatten(), minlength=len(probabilities)).double()
    assert (counts[probabilities <= 0] == 0).all(), "an outcome of probability zero"
    expected = probabilities.double().clamp(min=0) / probabilities.double().sum() * counts.sum()
    cells = []
    for k in expected.argsort().tolist():
        if cells and cells[-1][0] < 10:
            cells[-1] = [cells[-1][0] + expected[k].item(), cells[-1][1] + counts[k].item()]
        else:
            cells.append([expected[k].item(), counts[k].item()])
    distance = sum((found - wanted) ** 2 / wanted for wanted, found in cells)
    assert stats.chi2.sf(distance, len(cells) - 1) > ALARM, f"chi-square {distance} of {len(cells)} cells"


def normal_cdf(x, loc=0.0, scale=1.0):
    return torch.special.ndtr((x - loc) / scale)


def normal_log_prob(x, loc=0.0, scale=1.0):
    return -0.5 * ((x - loc) / scale) ** 2 - log(scale) - 0.5 * log(2 * pi)


# Laws whose means are known.


@dataclass(frozen=True)
class Law:
    """log_prob up to a constant, n -> where chains begin, statistics of draws (..., *event) -> (..., m), and their means."""

    log_prob: object
    begin: object
    statistics: object
    means: torch.Tensor

    def target(self, event_dim=1):
        return Target(lambda x, beta: beta * self.log_prob(x), event_dim)


def gaussian(teacher, shape):
    """Means, second moments, three quantiles of each coordinate, and the median of the distance from the centre."""
    d, precision, scale = len(teacher.loc), teacher.cov.inverse(), teacher.cov.diagonal().sqrt()
    pairs = torch.tril_indices(d, d)
    levels = torch.tensor([0.25, 0.5, 0.75])
    quantiles = teacher.loc[:, None] + scale[:, None] * torch.special.ndtri(levels)
    median = stats.chi2.ppf(0.5, d)

    def distance(x):
        return ((x - teacher.loc) @ precision * (x - teacher.loc)).sum(-1)

    def statistics(x):
        x = x.flatten(-len(shape))
        z = x - teacher.loc
        below = (x[..., None] < quantiles).flatten(-2).to(x)
        return torch.cat([x, z[..., pairs[0]] * z[..., pairs[1]], below, (distance(x) < median)[..., None].to(x)], -1)

    means = torch.cat([teacher.loc, teacher.cov[pairs[0], pairs[1]], levels.repeat(d), torch.tensor([0.5])])
    return Law(lambda x: 3 - 0.5 * distance(x.flatten(-len(shape))), lambda n: 2 * torch.randn(n, *shape), statistics, means)


def modes():
    points = torch.tensor([-2.5, -2.0, -1.0, 0.5, 1.5, 2.5])

    def statistics(x):
        return torch.cat([x, x**2, (x < points).to(x)], -1)

    below = (normal_cdf(points[:, None], MODES.loc, MODES.scale) * MODES.weights).sum(-1)
    means = torch.cat([MODES.mean[None], (MODES.variance + MODES.mean**2)[None], below])
    return Law(lambda x: MODES.log_prob(x.squeeze(-1)) - 5, lambda n: 2 * torch.randn(n, 1), statistics, means)


def box():
    """Exponentials of rates 2 and -1 cut to the unit square, begun on its diagonal."""
    rates, points = torch.tensor([2.0, -1.0]), torch.tensor([0.1, 0.25, 0.5, 0.75])

    def log_prob(x):
        inside = ((x > 0) & (x < 1)).all(-1)
        return torch.where(inside, -(x * rates).sum(-1), -torch.inf)

    def statistics(x):
        return torch.cat([x, (x[..., None] < points).flatten(-2).to(x)], -1)

    below = torch.expm1(-rates[:, None] * points) / torch.expm1(-rates[:, None])
    mean = 1 / rates - torch.exp(-rates) / (-torch.expm1(-rates))
    return Law(log_prob, lambda n: torch.rand(n, 1).expand(n, 2).clone(), statistics, torch.cat([mean, below.flatten()]))


def image():
    """A chain of six pixels, each bound to the next."""
    bonds = torch.diag(torch.ones(5), 1)
    return gaussian(Gaussian(torch.linspace(-1, 1, 6), (2 * torch.eye(6) - bonds - bonds.T).inverse()), (2, 3))


def correlated():
    return gaussian(CORRELATED, (2,))


LAWS = {"a correlated Gaussian, scales apart": correlated, "an image": image, "two modes": modes, "a box": box}
MOVES = {
    "Langevin": Langevin(),
    "Hamiltonian": Hamiltonian(num_leapfrog=4),
    "tempered Langevin": ParallelTempering(Langevin(), temperatures=2, hottest=0.3, steps=1),
}


def by_name(table, kept=None):
    """Run a test once for each name in the table, all but the kept ones marked slow."""
    values = table if kept is None else slow_unless(kept, list(table))
    return pytest.mark.parametrize("case", values, ids=[name.replace(" ", "_") for name in table])


@by_name(LAWS)
@pytest.mark.parametrize(
    "move",
    slow_unless([name for name in MOVES if name != "tempered Langevin"], MOVES),
    ids=[name.replace(" ", "_") for name in MOVES],
)
def test_draws_have_the_means_the_second_moments_and_the_quantiles_of_the_law(case, move):
    law = LAWS[case]()
    chains = sample_chains(law.log_prob, law.begin(1000), sampler=MOVES[move], num_samples=25, warmup=500, progress=False)
    assert_means(law.statistics(chains.draws).mean(1), law.means)


@pytest.mark.slow
def test_hamiltonian_chains_can_be_tempered():
    sampler, law = ParallelTempering(Hamiltonian(num_leapfrog=2), temperatures=2, hottest=0.3, steps=1), modes()
    draws = sample_chains(law.log_prob, law.begin(1500), sampler=sampler, num_samples=25, warmup=400, progress=False).draws
    assert_means(law.statistics(draws).mean(1), law.means)


@pytest.mark.slow
def test_one_chain_alone_says_the_same():
    """Means over 100 blocks of 200 draws, long against the time to forget."""
    law = modes()
    chain = sample_chains(law.log_prob, torch.zeros(1, 1), sampler=Langevin(), num_samples=20_000, warmup=500, progress=False)
    assert_means(law.statistics(chain.draws[0]).unflatten(0, (100, 200)).mean(1), law.means)


def test_annealing_tells_of_energies_that_are_nan():
    """Their chains had a weight of zero, in silence."""

    def log_prob(x, beta):
        return torch.where(x[..., 0] > 1, torch.nan, -x.square().sum(-1) / 2)

    x = torch.tensor([[0.0], [2.0], [0.5]])
    with pytest.warns(RuntimeWarning, match="NaN on the path of 1 of 3 chains"):
        _, log_w = anneal(Target(log_prob, 1), Langevin(1e-3), x, torch.linspace(0, 1, 4))
    assert log_w.isneginf().tolist() == [False, True, False]


def test_a_nan_density_is_as_good_as_none():
    def cut(x):
        return torch.where(x < 1, -0.5 * x**2, torch.nan).squeeze(-1)

    for sampler in (Langevin(), Hamiltonian(num_leapfrog=3), ParallelTempering(temperatures=2, hottest=0.5)):
        draws = sample_chains(cut, torch.zeros(2000, 1), sampler=sampler, num_samples=10, warmup=200, progress=False).draws
        assert draws.max() < 1
        below = (draws < torch.tensor([-1.0, 0.0, 0.5])).double().mean(1)
        assert_means(below, normal_cdf(torch.tensor([-1.0, 0.0, 0.5])) / normal_cdf(torch.tensor(1.0)))


def test_a_copy_at_temperature_infinity_without_an_integral_is_refused():
    with pytest.raises(ValueError, match=r"the power 0 has no integral.*hottest=0\.05"):
        sample_chains(correlated().log_prob, torch.zeros(5, 2), sampler=ParallelTempering(), progress=False)


# Langevin without adjustment: x' = (1 - eps / s^2) x + sqrt(2 eps) xi is autoregressive, of variance s^2 / (1 - eps / (2 s^2)).


def stationary_variance(variance, eps):
    return variance / (1 - eps / (2 * variance))


@pytest.mark.parametrize(("eps", "steps"), [(1.2, 60), (0.3, 60), (0.02, 600)])
def test_unadjusted_langevin_has_the_variance_of_its_step_size(eps, steps):
    variance = 1.5
    target = Target(lambda x, beta: -0.5 * beta * (x**2).sum(-1) / variance, 1)
    x = run(Langevin(eps, adjusted=False), target, torch.zeros(40_000, 1), steps).x
    wanted = stationary_variance(variance, eps) * (1 - (1 - eps / variance) ** (2 * steps))
    assert_means(x**2, wanted)
    assert_counts((normal_cdf(x, scale=sqrt(wanted)) * 10).long(), torch.ones(10))


def test_the_bias_of_unadjusted_langevin_vanishes_with_the_step_size():
    bias = [stationary_variance(1.5, eps) - 1.5 for eps in (0.1, 0.01, 0.001)]
    assert bias[0] / bias[1] == pytest.approx(10, rel=0.05)
    assert bias[2] < 0.001


def test_one_langevin_step_is_normal_about_the_drift():
    x = langevin_step(torch.full((40_000, 1), 2.0), torch.full((40_000, 1), -3.0), 0.1)
    assert_means(torch.cat([x, (x - 1.7) ** 2], -1), [1.7, 0.2])
    assert_counts((normal_cdf(x, 1.7, sqrt(0.2)) * 10).long(), torch.ones(10))


@pytest.mark.parametrize("step_size", [1e-9, torch.tensor(1e-9), torch.full((40_000, 1), 1e-9)])
def test_the_noise_of_a_step_below_half_precision_is_kept(step_size):
    x = torch.zeros(40_000, 1, dtype=torch.float16)
    moved = langevin_step(x, x, step_size)
    assert moved.dtype == torch.float16
    assert moved.float().square().mean() == pytest.approx(2e-9, rel=0.05)  # 7 standard errors
    double = torch.ones(1, dtype=torch.float64)
    torch.manual_seed(0)
    noise = torch.randn_like(double)
    torch.manual_seed(0)
    assert (langevin_step(double, -double, 0.1) - (0.9 + 0.2**0.5 * noise)).abs() < 1e-15


# Reversal: from exact draws, the way there is as likely as the way back.


def antisymmetric(a, b):
    """Means of g(a) h(b) - g(b) h(a), zero where (a, b) and (b, a) have one law, (n, m)."""
    both = [torch.cat([x, x**2, (x > 0.5).to(x), x.sin(), x.cos()], -1) for x in (a, b)]
    outer = both[0][:, :, None] * both[1][:, None, :]
    i, j = torch.triu_indices(both[0].shape[-1], both[0].shape[-1], 1)
    return torch.cat([both[0] - both[1], (outer - outer.mT)[:, i, j]], -1)


def step_from_exact_draws(sampler, n=40_000):
    x = MODES.distribution().sample((n, 1))
    target = modes().target()
    state, accept = sampler.step(sampler.init(x, target), target, sampler.first_step_size(x))
    return x, state.x, accept


METROPOLIS = [Langevin(0.1), Langevin(1.0), Langevin(4.0), Hamiltonian(0.3, 3), Hamiltonian(1.2, 2)]


@pytest.mark.parametrize("sampler", METROPOLIS, ids=str)
def test_an_adjusted_step_is_its_own_reversal(sampler):
    before, after, _ = step_from_exact_draws(sampler)
    assert_means(antisymmetric(before, after), 0.0)


def test_that_test_sees_a_step_that_is_not():
    before, after, _ = step_from_exact_draws(Langevin(1.0, adjusted=False))
    with pytest.raises(AssertionError, match="standard errors"):
        assert_means(antisymmetric(before, after), 0.0)


@pytest.mark.parametrize("sampler", METROPOLIS, ids=str)
def test_the_acceptance_told_is_the_share_that_moves(sampler):
    before, after, accept = step_from_exact_draws(sampler)
    assert torch.equal(accept, accept.clamp(0, 1))
    assert_means((before != after).double().squeeze(-1) - accept, 0.0)


def test_the_acceptance_of_langevin_is_that_of_metropolis_and_hastings():
    """Of whole steps, and of the quarter of steps that are smaller by a log-uniform factor up to 100."""

    def log_q(b, a, eps):  # of the proposal b from a, for N(0, 1)
        return normal_log_prob(b, a - eps * a, sqrt(2 * eps))

    def acceptance(eps):
        ratio = normal_log_prob(ends) - normal_log_prob(x) + log_q(x, ends, eps) - log_q(ends, x, eps)
        return (log_q(ends, x, eps).exp() * ratio.clamp(max=0).exp()).sum(0) * width

    x, eps = torch.tensor([0.3, -1.0, 2.0]), 0.7
    sampler, target = Langevin(eps), Target(lambda x, beta: -0.5 * beta * (x**2).sum(-1), 1)
    _, accept = sampler.step(sampler.init(x.repeat(20_000)[:, None], target), target, torch.tensor(eps))
    ends, width = grid(-12.0, 12.0, 4000)
    small = torch.stack([acceptance(eps * 0.01**share) for share in ((torch.arange(40) + 0.5) / 40).tolist()]).mean(0)
    assert_means(accept.reshape(20_000, 3), 0.75 * acceptance(eps) + 0.25 * small)


# Leapfrog.


def quartic(x):
    return -(x**4).sum(-1) / 4 - 0.5 * (x[..., 0] - x[..., 1]) ** 2


def follow(x, v, log_prob, step_size, steps):
    def both(x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            value = log_prob(x)
            return value, torch.autograd.grad(value.sum(), x, create_graph=True)[0]

    return leapfrog(x, v, State(x, *both(x)), both, step_size, steps)


def test_the_leapfrog_runs_back_the_way_it_came():
    x, v = torch.randn(50, 2), torch.randn(50, 2)
    end, w = follow(x, v, quartic, 0.1, 20)
    assert (end.x - x).abs().max() > 0.5
    start, u = follow(end.x.detach(), -w.detach(), quartic, 0.1, 20)
    torch.testing.assert_close(start.x, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(-u, v, rtol=0, atol=1e-10)


def test_the_leapfrog_preserves_volume():
    def flow(z):
        end, w = follow(z[None, :2], z[None, 2:], quartic, 0.3, 5)
        return torch.cat([end.x, w], -1)[0]

    for _ in range(5):
        jacobian = torch.autograd.functional.jacobian(flow, torch.randn(4))
        assert (jacobian - torch.eye(4)).abs().max() > 0.1
        assert jacobian.det().item() == pytest.approx(1.0, abs=1e-9)


def test_the_leapfrogs_error_in_the_energy_is_of_second_order():
    x, v = torch.randn(200, 2), torch.randn(200, 2)

    def error(steps):
        end, w = follow(x, v, quartic, 1.0 / steps, steps)
        return (quartic(x) - 0.5 * v.square().sum(-1) - end.log_prob + 0.5 * w.square().sum(-1)).abs().mean().item()

    orders = [math.log2(error(n) / error(2 * n)) for n in (20, 40, 80)]
    assert orders == pytest.approx([2, 2, 2], abs=0.05)


def test_the_leapfrog_keeps_the_oscillators_shadow_energy():
    x, v, h = torch.randn(50, 1), torch.randn(50, 1), 0.8
    end, w = follow(x, v, lambda x: -0.5 * (x**2).sum(-1), h, 37)
    torch.testing.assert_close(w**2 + end.x**2 * (1 - h**2 / 4), v**2 + x**2 * (1 - h**2 / 4), rtol=1e-9, atol=1e-9)


def test_a_leapfrog_of_many_small_steps_is_always_accepted():
    target = modes().target()
    assert run(Hamiltonian(0.001, 50), target, torch.randn(500, 1), 1).acceptance > 0.99999


# Discrete data: the exact transition matrix of gibbs with gradients, from its equation.


@dataclass(frozen=True)
class Table:
    """log f = b . x + x J x / 2 of `sites` zeros and ones (levels 0) or classes, on a path from the uniform law.

    Attributes:
        states: as positions, (S, *event).
    """

    sites: int
    levels: int
    b: torch.Tensor
    J: torch.Tensor

    @property
    def states(self):
        values = outcomes(self.levels or 2, self.sites)
        return F.one_hot(values, self.levels).double() if self.levels else values.double()

    @property
    def event_dim(self):
        return 2 if self.levels else 1

    def log_prob(self, x, beta):
        x = x.flatten(-self.event_dim)
        return beta * (x @ self.b + 0.5 * (x @ self.J * x).sum(-1)) - (1 - beta) * self.sites * log(self.levels or 2)

    def target(self):
        return Target(self.log_prob, self.event_dim, OneHot(self.levels) if self.levels else Binary(), start=self.start)

    def start(self, shape):
        return self.states[torch.randint(len(self.states), tuple(shape))]

    def law(self, beta=1.0):
        return self.log_prob(self.states, beta).softmax(0)

    def index(self, x):
        """Of positions (..., *event) among the states."""
        values = x.argmax(-1) if self.levels else x.long()
        assert torch.equal(values, values.clamp(0, (self.levels or 2) - 1))
        return (values * (self.levels or 2) ** torch.arange(self.sites - 1, -1, -1)).sum(-1)

    def matrix(self, beta=1.0):
        """Of one step, (S, S): a neighbour in proportion to exp(grad . (x' - x) / 2), accepted at 0.95 of Metropolis' rate."""
        x = self.states.flatten(1)
        score = beta * (self.b + x @ self.J)
        promise = 0.5 * (score @ x.T - (score * x).sum(-1, keepdim=True))
        apart = (x[:, None] - x).abs().sum(-1)
        q = promise.masked_fill(apart != (2 if self.levels else 1), -torch.inf).softmax(-1)
        f = self.law(beta)
        forth = f[:, None] * q
        p = 0.95 * q * (forth.T / forth).nan_to_num(0).clamp(max=1)
        return p + torch.diag((1 - p.sum(-1)).clamp(min=0))


def table(levels):
    generator = torch.Generator().manual_seed(levels)
    sites, n = (2, 2 * levels) if levels else (4, 4)
    b, J = torch.randn(n, generator=generator).double(), torch.randn(n, n, generator=generator).double()
    return Table(sites, levels, b, J + J.T)


LEVELS = pytest.mark.parametrize("levels", [0, 2, 3], ids=["binary", "two_classes", "three_classes"])


@LEVELS
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_a_step_of_gibbs_with_gradients_has_the_transition_matrix_of_its_equation(levels, beta):
    teacher, n = table(levels), 200_000
    matrix, law, target = teacher.matrix(beta), teacher.law(beta), teacher.target()
    torch.testing.assert_close(law[:, None] * matrix, (law[:, None] * matrix).T)  # detailed balance of the equation itself
    sampler = GibbsWithGradients()
    begin = torch.randint(len(law), (n,))
    x = teacher.states[begin]
    state, accept = sampler.step(sampler.init(x, target, beta), target, torch.tensor(1.0), beta)
    end = teacher.index(state.x)
    joint = matrix / len(law)
    assert (torch.bincount(begin * len(law) + end, minlength=len(law) ** 2).reshape(joint.shape)[joint == 0] == 0).all()
    assert_counts(begin * len(law) + end, joint.flatten())
    assert_means((begin != end).double() - accept, 0.0)


def fill(teacher, **options):
    """The states of many chains after a hundred steps, by which the exact matrix has forgotten where they began."""
    begin = teacher.start((10_000,))
    law = torch.full((len(teacher.states),), 1 / len(teacher.states)) @ torch.linalg.matrix_power(teacher.matrix(), 101)
    torch.testing.assert_close(law, teacher.law(), rtol=0, atol=1e-5)
    chains = sample_chains(teacher.target(), begin, num_samples=1, warmup=100, progress=False, **options)
    return teacher.index(chains.draws[:, -1])


@LEVELS
def test_many_chains_of_gibbs_with_gradients_fill_the_table(levels):
    assert_counts(fill(table(levels), sampler=GibbsWithGradients()), table(levels).law())


def test_gibbs_with_gradients_is_what_discrete_data_are_drawn_by():
    assert_counts(fill(table(3)), table(3).law())


@pytest.mark.slow
def test_tempered_gibbs_with_gradients_crosses_where_the_plain_chain_cannot():
    d = 6
    coupling = 4 * (torch.ones(d, d) - torch.eye(d))
    teacher = Table(d, 0, 0.2 - coupling.sum(0) / 2, coupling)  # all zeros or all ones, and e^-18 between
    zeros = torch.zeros(600, d)
    plain = sample_chains(teacher.target(), zeros, num_samples=1, warmup=200, progress=False).draws[:, -1]
    assert plain.sum(-1).max() < d / 2
    tempered = ParallelTempering(GibbsWithGradients(), temperatures=8, steps=2)
    draws = sample_chains(teacher.target(), zeros, sampler=tempered, num_samples=40, warmup=150, progress=False).draws
    more = teacher.states.sum(-1) > d / 2
    assert_means((draws.sum(-1) > d / 2).double().mean(1), teacher.law()[more].sum())


# Boltzmann machines: exp(target.log_prob) summed over all states is the teacher.

BINARY, CLASSES = constraints.boolean, constraints.integer_interval(0, 2)
MACHINES = {
    "restricted, zeros and ones": (RestrictedBoltzmannMachine(2), BINARY, (3,)),
    "restricted, an image": (RestrictedBoltzmannMachine(3), BINARY, (2, 2)),
    "restricted, classes": (RestrictedBoltzmannMachine(2), CLASSES, (2,)),
    "general without hidden units": (BoltzmannMachine(), BINARY, (3,)),
    "general, zeros and ones": (BoltzmannMachine(2), BINARY, (3,)),
    "general, classes": (BoltzmannMachine(1), CLASSES, (2,)),
}
BETAS = pytest.mark.parametrize("beta", [1.0, 0.4, 0.0])


def machine(name):
    """A distribution away from its initialisation, whose start is not even, with all outcomes (S, *event)."""
    energy, support, shape = MACHINES[name]
    levels = 2 if support is BINARY else 3
    x = outcomes(levels, math.prod(shape)).reshape(-1, *shape)
    model = EnergyModel(shape, energy=energy, support=support)
    model.standardize(x[torch.randint(len(x), (7,))].to(torch.get_default_dtype() if support is BINARY else torch.long))
    return perturb(model, 0.8)(), x if support is CLASSES else x.double()


def law_of(target, x, beta):
    with torch.no_grad():
        return target.log_prob(target.encode(x), torch.tensor(beta)).softmax(0)


def index_among(u, states):
    """Of positions u (n, *position) among all of them (S, *position)."""
    same = (u.flatten(1)[:, None] == states.flatten(1)).all(-1)
    assert (same.sum(-1) == 1).all()
    return same.long().argmax(-1)


@by_name(MACHINES)
@BETAS
def test_a_sweep_leaves_the_law_as_it_is(case, beta):
    dist, x = machine(case)
    target = dist.target()
    law = law_of(target, x, beta)
    u = target.encode(x)[torch.multinomial(law, 50_000, replacement=True)]
    swept = target.gibbs(u, beta)
    assert swept.dtype == u.dtype
    assert_counts(index_among(swept, target.encode(x)), law)


@by_name(MACHINES, kept=["restricted, an image", "general, zeros and ones", "general, classes"])
@pytest.mark.parametrize("beta", slow_unless([0.4], [1.0, 0.4]))
def test_a_sweep_is_its_own_reversal(case, beta):
    """Over calls, which share what chance they have beside that of chains: the order in which sites are visited."""
    dist, x = machine(case)
    target, calls, chains = dist.target(), 250, 400
    law, states = law_of(target, x, beta), target.encode(x)
    before = torch.multinomial(law, calls * chains, replacement=True).reshape(calls, chains)
    after = torch.stack([index_among(target.gibbs(states[i], beta), states) for i in before])
    n = len(states)
    flow = F.one_hot(before * n + after, n * n).double().mean(1).reshape(calls, n, n)
    i, j = torch.triu_indices(n, n, 1)
    seen = (flow + flow.mT).mean(0)[i, j] * calls * chains > 400  # where a mean over calls is close to normal
    assert seen.any()
    assert_means((flow - flow.mT)[:, i[seen], j[seen]], 0.0)


@by_name(MACHINES)
def test_sweeps_from_anywhere_come_to_the_law(case):
    dist, x = machine(case)
    begin = x[:1].expand(10_000, *x.shape[1:])
    chains = sample_chains(dist, begin, sampler=Gibbs(), num_samples=1, warmup=60, progress=False)
    assert chains.draws.shape == (10_000, 1, *x.shape[1:])
    assert_counts(index_among(chains.draws[:, 0], x), law_of(dist.target(), x, 1.0))


def test_sweeps_know_the_beta_of_each_chain():
    dist, x = machine("restricted, zeros and ones")
    target, betas = dist.target(), torch.tensor([0.0, 0.3, 1.0])
    u = torch.stack([x[torch.multinomial(law_of(target, x, b.item()), 20_000, replacement=True)] for b in betas])
    swept = target.gibbs(u, betas[:, None])
    for b, rows in zip(betas, swept, strict=True):
        assert_counts(index_among(rows, x), law_of(target, x, b.item()))


@by_name(MACHINES)
def test_at_beta_zero_a_machine_is_its_start(case):
    dist, x = machine(case)
    target = dist.target()
    assert target.log_prob(target.encode(x), torch.tensor(0.0)).logsumexp(0).abs() < 1e-9
    assert_counts(index_among(target.start((50_000,)), target.encode(x)), law_of(target, x, 0.0))


def test_at_beta_one_as_a_number_and_as_a_tensor_it_is_the_same():
    for name in MACHINES:
        dist, x = machine(name)
        u = dist.target().encode(x)
        torch.testing.assert_close(dist.target().log_prob(u, 1.0), dist.target().log_prob(u, torch.tensor(1.0)))


@pytest.mark.slow
def test_gibbs_with_gradients_draws_from_machines_too():
    for name in ("restricted, zeros and ones", "general, classes"):
        dist, x = machine(name)
        begin = x[torch.randint(len(x), (5000,))]
        chains = sample_chains(dist, begin, sampler=GibbsWithGradients(), num_samples=1, warmup=100, progress=False)
        assert_counts(index_among(chains.draws[:, 0], x), law_of(dist.target(), x, 1.0))


def test_tempered_gibbs_draws_from_machines():
    dist, x = machine("restricted, classes")
    sampler = ParallelTempering(Gibbs(), temperatures=3, steps=1)
    chains = sample_chains(dist, x[:1].expand(10_000, -1), sampler=sampler, num_samples=1, warmup=40, progress=False)
    assert_counts(index_among(chains.draws[:, 0], x), law_of(dist.target(), x, 1.0))


def joints(energy):
    """b, c, W and a constant k for hidden zeros and ones: E(v) = k - b . v - sum log(1 + exp(c + W^T v))."""
    with torch.no_grad():
        c = energy.hidden - energy.centre @ energy.weight
        b = energy.visible - energy.weight.sum(-1) / 2
        return b, c, energy.weight.detach(), energy.visible @ energy.centre + c.sum() / 2


@dataclass(frozen=True)
class RealMachine:
    """v | h ~ N(beta (b + W h), I) as a mixture over the states of h, of weights exp(beta c . h + |beta (b + W h)|^2 / 2)."""

    b: torch.Tensor
    c: torch.Tensor
    weight: torch.Tensor
    constant: torch.Tensor

    def parts(self, beta):
        h = outcomes(2, len(self.c)).to(self.c)
        loc = beta * (self.b + h @ self.weight.T)
        return beta * h @ self.c + 0.5 * loc.square().sum(-1), loc

    def log_prob(self, v, beta):
        """Log f_beta, whose integral is 1 at beta = 0."""
        log_w, loc = self.parts(beta)
        of_parts = normal_log_prob(v[:, None], loc).sum(-1)
        return (log_w + of_parts).logsumexp(-1) - (1 - beta) * len(self.c) * log(2) - beta * self.constant

    def sample(self, n, beta):
        log_w, loc = self.parts(beta)
        chosen = loc[torch.multinomial(log_w.softmax(0), n, replacement=True)]
        return chosen + torch.randn_like(chosen)


def real_machine():
    model = perturb(EnergyModel((2,), energy=RestrictedBoltzmannMachine(2)), 0.8)
    return model(), RealMachine(*joints(model.energy))


@BETAS
def test_real_units_have_the_density_of_a_mixture(beta):
    dist, teacher = real_machine()
    v = 2 * torch.randn(50, 2)
    torch.testing.assert_close(dist.target().log_prob(v, torch.tensor(beta)).detach(), teacher.log_prob(v, beta))


@BETAS
def test_a_sweep_of_real_units_leaves_their_law_and_is_its_own_reversal(beta):
    dist, teacher = real_machine()
    v = teacher.sample(40_000, beta)
    swept = dist.target().gibbs(v, beta)
    assert_means(antisymmetric(v, swept), 0.0)


def test_real_units_are_drawn_from_anywhere():
    dist, teacher = real_machine()
    v = sample_chains(dist, torch.zeros(20_000, 2), sampler=Gibbs(), num_samples=1, warmup=60, progress=False).draws[:, 0]
    log_w, loc = teacher.parts(1.0)
    weights = log_w.softmax(0)
    second = torch.eye(2) + torch.einsum("k,ki,kj->ij", weights, loc, loc)
    found = torch.cat([v, (v[:, :, None] * v[:, None]).flatten(1)], -1)
    assert_means(found, torch.cat([weights @ loc, second.flatten()]))


@pytest.mark.parametrize("support", [constraints.interval(0.0, 1.0), constraints.positive], ids=["interval", "positive"])
def test_a_machine_over_part_of_the_line_is_drawn_from_its_density(support):
    model = perturb(EnergyModel((1,), energy=RestrictedBoltzmannMachine(2), support=support), 1.5)
    dist, target = model(), model().target()
    x = torch.full((5000, 1), 0.5)
    u = target.encode(sample_chains(dist, x, sampler=model.sampler, num_samples=1, warmup=300, progress=False).draws[:, 0])
    cells, _ = grid(-15.0, 15.0, 6000)
    law = target.log_prob(cells, 1.0).detach().softmax(0)
    cut = law.cumsum(0)
    place = torch.searchsorted(cells.squeeze(-1) + 0.0025, u.squeeze(-1)).clamp(max=5999)
    tenth = (cut * 10).clamp(max=9.999).long()
    assert_counts(tenth[place], torch.zeros(10).index_add(0, tenth, law))


# Parallel tempering.


def test_the_cold_chain_follows_the_target_where_a_plain_chain_cannot_cross():
    far = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([-6.0, 6.0]), torch.tensor([0.5, 0.5]))
    log_prob = lambda x: far.log_prob(x.squeeze(-1))  # noqa: E731
    begin = torch.full((600, 1), -6.0)
    plain = sample_chains(log_prob, begin, num_samples=20, warmup=200, progress=False).draws
    assert plain.max() < 0
    tempered = ParallelTempering(temperatures=10, hottest=0.01, steps=3)
    draws = sample_chains(log_prob, begin, sampler=tempered, num_samples=100, warmup=250, progress=False).draws
    found = torch.cat([draws.mean(1), (draws > 0).double().mean(1), (draws.abs() - 6).square().mean(1)], -1)
    assert_means(found, [far.mean, 0.7, 0.25])


SCORES = torch.tensor([0.0, 1.0, -0.7]).double()


def scored(x, beta):
    return beta * SCORES[x.long()]


@pytest.mark.parametrize("temperatures", [2, 3, 4])
def test_trades_leave_the_joint_law_as_it_is(temperatures):
    betas = torch.linspace(1, -1, temperatures)
    laws = [(b * SCORES).softmax(0) for b in betas]
    x = torch.stack([torch.multinomial(law, 100_000, replacement=True) for law in laws], -1).double()
    traded = swap(x, Target(scored, 0), betas)
    joint = laws[0]
    for law in laws[1:]:
        joint = joint[..., None] * law
    place = 3 ** torch.arange(temperatures - 1, -1, -1)
    assert_counts((traded.long() * place).sum(-1), joint.flatten())
    assert torch.equal(traded.sort(-1).values, x.sort(-1).values)
    assert not torch.equal(traded, x)


def test_neighbours_trade_as_often_as_metropolis_says():
    betas, n = torch.tensor([1.0, -0.5]), 100_000
    cold, hot = ((b * SCORES).softmax(0) for b in betas)
    x = torch.stack([torch.multinomial(law, n, replacement=True) for law in (cold, hot)], -1).double()
    traded = swap(x, Target(scored, 0), betas)
    gain = SCORES - SCORES[:, None]  # [i, j]: of j in place of i
    share = (cold[:, None] * hot * ((betas[0] - betas[1]) * gain).exp().clamp(max=1))[gain != 0].sum()
    assert_means((traded != x).any(-1).double(), share)


def test_trades_move_whole_positions():
    x = torch.randn(50, 4, 2, 3)
    traded = swap(x, Target(lambda x, beta: -beta * x.square().sum((-1, -2)), 2), torch.linspace(1, 0.1, 4))
    rows = {tuple(row.tolist()) for row in x.flatten(0, 1).flatten(1)}
    assert {tuple(row.tolist()) for row in traded.flatten(0, 1).flatten(1)} == rows
    assert not torch.equal(traded, x)


def test_every_temperature_has_a_step_size_of_its_own():
    """Powers of a Gaussian are Gaussians of variance 1 / beta: the same acceptance is had at a step size c / beta."""
    tempered = ParallelTempering(temperatures=4, hottest=0.1, steps=2)
    law = gaussian(NORMAL, (1,))
    chains = sample_chains(law.log_prob, torch.randn(1000, 1), sampler=tempered, num_samples=50, warmup=600, progress=False)
    assert chains.step_size.shape == (4,)
    assert chains.stats["acceptance_rate"].shape == chains.draws.shape[:2] == (1000, 50)
    scaled = chains.step_size * torch.logspace(0, -1, 4)
    assert scaled.max() / scaled.min() < 1.2
    x = tempered.replicate(torch.randn(1000, 1))
    ended = run(tempered, law.target(), x, 50, step_size=chains.step_size)
    assert ended.acceptance.shape == (4,)
    assert (ended.acceptance - Langevin().target_acceptance).abs().max() < 0.05


# Annealing.

CONSTANT = 2.5
LOG_Z = log(CONSTANT) + log(0.7) + 0.5 * log(2 * pi)


def between_gaussians(x, beta):
    """From N(0, 1) to CONSTANT exp(-(x - 1)^2 / (2 0.7^2))."""
    x = x.squeeze(-1)
    return (1 - beta) * normal_log_prob(x) + beta * (log(CONSTANT) - 0.5 * ((x - 1) / 0.7) ** 2)


PATH = Target(between_gaussians, 1, start=lambda shape: torch.randn(*shape, 1))
KERNELS = [Langevin(0.2), Hamiltonian(0.4, 2)]


def forwards(sampler, n=50_000, steps=5, **options):
    return anneal(PATH, sampler, torch.randn(n, 1), torch.linspace(0, 1, steps + 1), **options)


def backwards(sampler, n=50_000, steps=5, **options):
    return anneal(PATH, sampler, 1 + 0.7 * torch.randn(n, 1), torch.linspace(1, 0, steps + 1), **options)


@pytest.mark.parametrize("sampler", KERNELS, ids=str)
@pytest.mark.parametrize("steps", [1, 5])
def test_the_mean_weight_is_z_however_few_the_steps(sampler, steps):
    _, log_w = forwards(sampler, steps=steps)
    assert_means((log_w - LOG_Z).exp(), 1.0)


@pytest.mark.parametrize("sampler", KERNELS, ids=str)
def test_weighed_ends_follow_the_target(sampler):
    x, log_w = forwards(sampler)
    w = (log_w - LOG_Z).exp()[:, None]
    assert_means(w * torch.cat([x, x**2, (x < 1).to(x)], -1), [1.0, 1.49, 0.5])


@pytest.mark.parametrize("sampler", KERNELS, ids=str)
def test_backwards_from_exact_draws_the_mean_weight_is_one_over_z(sampler):
    _, log_w = backwards(sampler)
    assert_means((log_w + LOG_Z).exp(), 1.0)


def test_the_log_of_a_mean_weight_is_too_low_forwards_and_too_high_backwards():
    """One-sided, and by more than the false alarms of `assert_means` would allow: the truth lies five errors away."""
    for log_w, sign in ((forwards(KERNELS[0])[1], 1), (backwards(KERNELS[0])[1], -1)):
        found = sign * (log_w.reshape(-1, 5).logsumexp(-1) - log(5)) - LOG_Z
        assert sign * found.mean() < -5 * found.std() / sqrt(len(found))


def test_more_steps_make_weights_even():
    spreads = [forwards(Langevin(0.2), n=5000, steps=steps)[1].std().item() for steps in (2, 10, 50)]
    assert spreads[0] > 1.3 * spreads[1]
    assert spreads[1] > 1.3 * spreads[2]


def test_weights_from_part_of_the_path_are_ratios_of_constants():
    betas = torch.tensor([0.3, 0.5, 0.8])
    precision = (1 - betas) + betas / 0.49
    loc = betas / 0.49 / precision
    log_z = log(CONSTANT) * betas - 0.5 * log(2 * pi) * (1 - betas) + 0.5 * (2 * pi / precision).log()
    log_z = log_z + 0.5 * precision * loc**2 - 0.5 * betas / 0.49
    x = loc[0] + torch.randn(50_000, 1) / precision[0].sqrt()
    _, log_w = anneal(PATH, Langevin(0.2), x, betas)
    assert_means((log_w - log_z[2] + log_z[0]).exp(), 1.0)


def test_step_sizes_of_each_beta_are_used_at_that_beta():
    seen = []

    class Watched(Langevin):
        def step(self, state, target, step_size, beta=1.0):
            seen.append((round(float(beta), 3), round(float(step_size), 3)))
            return super().step(state, target, step_size, beta)

    betas, sizes = torch.linspace(0, 1, 5), torch.linspace(0.5, 0.1, 5)
    anneal(PATH, Watched(), torch.randn(3, 1), betas, step_sizes=sizes)
    anneal(PATH, Watched(), torch.randn(3, 1), betas.flip(0), step_sizes=sizes.flip(0))
    there = [(0.25, 0.4), (0.5, 0.3), (0.75, 0.2), (1.0, 0.1)]
    assert seen == there + there[::-1]


@pytest.mark.parametrize("sampler", [Langevin(), Hamiltonian(0.4, 2)], ids=str)
def test_tuned_step_sizes_leave_the_mean_weight_at_z(sampler):
    betas = schedule(6, torch.zeros(1))
    sizes = tune(PATH, sampler, torch.randn(500, 1), betas)
    assert sizes.shape == betas.shape
    assert_means((anneal(PATH, sampler, torch.randn(50_000, 1), betas, step_sizes=sizes)[1] - LOG_Z).exp(), 1.0)
    back = anneal(PATH, sampler, 1 + 0.7 * torch.randn(50_000, 1), betas.flip(0), step_sizes=sizes.flip(0))[1]
    assert_means((back + LOG_Z).exp(), 1.0)


def test_step_sizes_are_tuned_to_each_beta():
    """Along a path that narrows to a twentieth, every size accepts what Langevin wants, to 0.2."""
    narrow = Target(lambda x, beta: -0.5 * (1 - beta + 400 * beta) * (x**2).sum(-1), 1)
    betas = schedule(100, torch.zeros(1))
    sizes = tune(narrow, Langevin(), torch.randn(1000, 1), betas)
    assert sizes[0] > 100 * sizes[-1]
    for k in (0, 25, 50, 75, 100):
        x = torch.randn(2000, 1) / (1 - betas[k] + 400 * betas[k]).sqrt()
        found = run(Langevin(), narrow, x, 5, beta=betas[k], step_size=sizes[k]).acceptance
        assert found == pytest.approx(Langevin().target_acceptance, abs=0.2)


def test_nothing_is_tuned_where_there_is_no_step_size():
    teacher = table(0)
    for sampler in (GibbsWithGradients(), Gibbs()):
        assert tune(teacher.target(), sampler, teacher.start((10,)), torch.linspace(0, 1, 3)) is None
    assert tune(PATH, Langevin(adjusted=False), torch.randn(10, 1), torch.linspace(0, 1, 3)) is None


def test_the_schedule_rises_from_zero_to_one_and_is_denser_at_both_ends():
    for dtype in (torch.float32, torch.float64):
        betas = schedule(50, torch.zeros(1, dtype=dtype))
        assert betas.dtype == dtype
        assert betas.shape == (51,)
        assert (betas[0], betas[-1]) == (0, 1)
        steps = betas.diff()
        assert (steps > 0).all()
        assert steps[0] < steps[25] / 3
        torch.testing.assert_close(steps, steps.flip(0), rtol=1e-3, atol=1e-6)


def test_weights_keep_the_shape_of_chains():
    x, log_w = anneal(PATH, Langevin(0.2), torch.randn(100, 200, 1), torch.linspace(0, 1, 6))
    assert x.shape == (100, 200, 1)
    assert log_w.shape == (100, 200)
    assert_means((log_w.flatten() - LOG_Z).exp(), 1.0)


def test_chains_outside_the_support_weigh_nothing():
    """From N(0, 1) to an exponential on the positive half line: the first step leaves half of the chains without a weight."""

    def log_prob(x, beta):
        x, beta = x.squeeze(-1), torch.as_tensor(beta)
        inside = (1 - beta) * normal_log_prob(x) - beta * x
        return torch.where(x > 0, inside, torch.where(beta == 0, normal_log_prob(x), -torch.inf))

    _, log_w = anneal(Target(log_prob, 1), Langevin(0.2), torch.randn(50_000, 1), torch.linspace(0, 1, 6))
    assert not log_w.isnan().any()
    assert_means((log_w == -torch.inf).double(), 0.5)
    assert_means(log_w.exp(), 1.0)


# Annealing where every path can be summed: the end of the forward run is start . P_1 ... P_K.


def gwg_ladder(betas):
    teacher = table(3)
    law = torch.full((len(teacher.states),), 1 / len(teacher.states))
    for beta in betas[1:]:
        law = law @ teacher.matrix(beta)
    return teacher.target(), GibbsWithGradients(), teacher.states, law


def sweeps_matrix(dist, x, beta):
    """Of one sweep of a restricted machine over zeros and ones, (S, S): the sum over h of p(v' | h) p(h | v)."""
    b, c, weight, _ = joints(dist.path.energy)
    h = outcomes(2, len(c)).double()
    up = (beta * (c + x @ weight)).sigmoid()
    down = (dist.path.start.logits + beta * (b + h @ weight.T)).sigmoid()
    of_h = (up[:, None] * h + (1 - up[:, None]) * (1 - h)).prod(-1)
    of_v = (down[:, None] * x + (1 - down[:, None]) * (1 - x)).prod(-1)
    return of_h @ of_v


def gibbs_ladder(betas):
    dist, x = machine("restricted, zeros and ones")
    target = dist.target()
    law = law_of(target, x, 0.0)
    for beta in betas[1:]:
        law = law @ sweeps_matrix(dist, x, beta)
    return target, Gibbs(), x, law


LADDERS = pytest.mark.parametrize("ladder", [gwg_ladder, gibbs_ladder], ids=["gibbs_with_gradients", "gibbs"])
FEW = [0.0, 0.4, 0.8, 1.0]


@LADDERS
def test_the_forward_run_ends_where_its_matrices_lead(ladder):
    target, sampler, states, law = ladder(FEW)
    x, log_w = anneal(target, sampler, target.start((50_000,)), torch.tensor(FEW))
    assert_counts(index_among(x, states), law)
    with torch.no_grad():
        total = target.log_prob(states, 1.0).logsumexp(0)
    assert_means((log_w.detach() - total).exp(), 1.0)


@LADDERS
def test_backwards_from_any_state_the_mean_weight_is_how_likely_the_forward_run_ends_there(ladder):
    target, sampler, states, law = ladder(FEW)
    n = 20_000
    start = states.repeat(n, *(1 for _ in states.shape[1:]))
    _, log_w = anneal(target, sampler, start, torch.tensor(FEW).flip(0))
    with torch.no_grad():
        bound = target.log_prob(states, 1.0) + log_w.reshape(n, len(states))
    assert_means((bound - law.log()).exp(), 1.0)
    error = bound.std(0) / sqrt(n)  # and in the mean of logarithms it is a lower bound; one-sided
    assert (bound.mean(0) < law.log() + 6 * error).all()
    assert bound.mean() < law.log().mean()


@pytest.mark.parametrize("ladder", slow_unless([gibbs_ladder], [gwg_ladder, gibbs_ladder]))
def test_that_bound_closes_on_the_log_density_as_steps_are_added(ladder):
    """The gap is of the order of one over the steps; one-sided, its means are eight standard errors and more apart."""
    target, sampler, states, _ = ladder([0.0])
    gaps = {}
    for steps, n in ((2, 10_000), (200, 500)):
        begin = states.repeat(n, *(1 for _ in states.shape[1:]))
        _, log_w = anneal(target, sampler, begin, torch.linspace(1, 0, steps + 1))
        with torch.no_grad():
            log_f = target.log_prob(states, 1.0)
            gap = (log_f.log_softmax(0) - log_f - log_w.reshape(n, -1)).mean(-1)
        gaps[steps] = gap.mean(), gap.std() / sqrt(n)
    assert gaps[2][0] > gaps[200][0] + 5 * (gaps[2][1] ** 2 + gaps[200][1] ** 2).sqrt()
    assert gaps[200][0] > -5 * gaps[200][1]
    assert gaps[200][0] < 0.005 + 5 * gaps[200][1]


# Tuning.


def test_dual_averaging_settles_where_the_acceptance_is_as_wanted():
    scale = torch.tensor([1.0, 100.0])
    tuning = DualAveraging(torch.tensor([0.01, 0.01]), 0.6)
    for _ in range(1000):
        tuning.update((-tuning.step_size / scale).exp())
    torch.testing.assert_close((-tuning.final_step_size / scale).exp(), torch.tensor([0.6, 0.6]), rtol=0, atol=0.01)


def test_dual_averaging_settles_under_noise_as_well():
    """Acceptances of single chains, zeros and ones, 4000 of them: the settled step accepts as wanted to 0.05."""
    tuning = DualAveraging(torch.tensor(0.01), 0.6)
    for _ in range(4000):
        tuning.update((torch.rand(()) < (-tuning.step_size).exp()).double())
    assert (-tuning.final_step_size).exp() == pytest.approx(0.6, abs=0.05)


def test_the_step_size_after_the_warmup_is_a_mean_over_many_tries():
    """Of two chains, whose last try may be far off: over runs its logarithm varies by 0.03, that of the last try by 0.5."""
    options = {"sampler": Langevin(), "num_samples": 20, "warmup": 300, "progress": False}
    sizes = [sample_chains(gaussian(NORMAL, (1,)).log_prob, torch.randn(2, 1), **options).step_size for _ in range(6)]
    assert torch.stack(sizes).log().std() < 0.15


def test_before_any_step_the_step_size_is_that_given():
    tuning = DualAveraging(torch.tensor(0.3), 0.6)
    assert tuning.step_size == pytest.approx(0.3)
    assert tuning.final_step_size == pytest.approx(0.3)


FIRST = [1e-5, 1e-2, 10.0]


@pytest.mark.parametrize(
    "sampler",
    slow_unless(
        [Langevin(1e-5), Langevin(10.0), Hamiltonian(1e-2, 3)],
        [*map(Langevin, FIRST), *(Hamiltonian(first, 3) for first in FIRST)],
    ),
    ids=str,
)
def test_the_warmup_finds_the_wanted_acceptance_from_wherever_it_begins(sampler):
    begin = CORRELATED.distribution().sample((500,))
    chains = sample_chains(correlated().log_prob, begin, sampler=sampler, num_samples=50, warmup=500, progress=False)
    assert chains.acceptance_rate == pytest.approx(sampler.target_acceptance, abs=0.08)
    assert chains.step_size.shape == ()


@pytest.mark.parametrize("sampler", [Langevin(5.0), Langevin(1e-4), Hamiltonian(3.0, 4)], ids=str)
def test_a_run_with_a_rate_tunes_as_well(sampler):
    ended = run(sampler, gaussian(NORMAL, (1,)).target(), torch.randn(1000, 1), 400, rate=0.1)
    after = run(sampler, gaussian(NORMAL, (1,)).target(), torch.randn(1000, 1), 50, step_size=ended.step_size)
    assert after.acceptance == pytest.approx(sampler.target_acceptance, abs=0.05)


def test_a_run_without_a_rate_leaves_the_step_size():
    ended = run(Langevin(0.3), gaussian(NORMAL, (1,)).target(), torch.randn(10, 1), 5)
    assert ended.step_size == pytest.approx(0.3)
    assert ended.acceptance.shape == ()


def test_a_trajectory_as_long_as_the_period_does_not_stand_still():
    """Of ten steps of 2 sin(pi / 10), each turns the oscillator by a tenth; draws ten trajectories apart should know little of
    each other (Neal, section 5.4.2.2, has the step size vary for this)."""
    periodic, law = Hamiltonian(2 * math.sin(pi / 10), 10), gaussian(NORMAL, (1,))
    draws = sample_chains(law.log_prob, torch.randn(500, 1), sampler=periodic, num_samples=21, warmup=0, progress=False).draws
    assert (draws[:, 10] * draws[:, 20]).mean() < 0.5


# Step sizes too small and too large.

TOO_SMALL = [Langevin(1e-9), Hamiltonian(1e-6, 2), ParallelTempering(Langevin(1e-9), temperatures=2, hottest=0.5)]
TOO_LARGE = [Langevin(1e4), Hamiltonian(1e3, 2), ParallelTempering(Langevin(1e4), temperatures=2, hottest=0.5)]


@pytest.mark.parametrize("sampler", TOO_SMALL, ids=str)
def test_tiny_steps_are_all_accepted_and_a_warning_says_raise(sampler):
    with pytest.warns(RuntimeWarning, match="raise the step size, or warm up"):
        chains = sample_chains(
            gaussian(NORMAL, (1,)).log_prob, torch.randn(50, 1), sampler=sampler, num_samples=20, warmup=0, progress=False
        )
    assert chains.acceptance_rate > 0.999


@pytest.mark.parametrize("sampler", TOO_LARGE, ids=str)
def test_huge_steps_are_all_refused_and_a_warning_says_lower(sampler):
    with pytest.warns(RuntimeWarning, match=f"lower the step size, or warm up.*{type(sampler).__name__}"):
        chains = sample_chains(
            gaussian(NORMAL, (1,)).log_prob, torch.randn(50, 1), sampler=sampler, num_samples=20, warmup=0, progress=False
        )
    assert chains.acceptance_rate < 0.01


def test_unadjusted_chains_that_run_away_are_told():
    with pytest.warns(RuntimeWarning, match="5 of 5 chains left the real numbers. Lower the step size, or adjust"):
        sample_chains(
            lambda x: -(x**4).sum(-1),
            torch.ones(5, 1),
            sampler=Langevin(10.0, adjusted=False),
            num_samples=20,
            warmup=0,
            progress=False,
        )


def test_where_nothing_is_accepted_or_refused_there_is_no_warning():
    sample_chains(machine("general, classes")[0], torch.zeros(5, 2).long(), sampler=Gibbs(), num_samples=5, progress=False)
    sample_chains(
        gaussian(NORMAL, (1,)).log_prob, torch.zeros(5, 1), sampler=Langevin(0.1, adjusted=False), num_samples=5, progress=False
    )


# Many chains at once.


def test_chains_alone_and_together_have_one_law():
    """Kolmogorov and Smirnov's test of 300 chains run one by one against 20 000 at once, at 1e-7."""
    target, sampler = modes().target(), Langevin(0.3)
    alone = torch.cat([run(sampler, target, torch.zeros(1, 1), 8).x for _ in range(300)])
    together = run(sampler, target, torch.zeros(20_000, 1), 8).x
    assert stats.ks_2samp(alone.flatten().numpy(), together.flatten().numpy()).pvalue > ALARM


INDEPENDENT = {"Langevin": Langevin(0.3), "Hamiltonian": Hamiltonian(0.4, 3), "tempered": MOVES["tempered Langevin"]}


@by_name(INDEPENDENT)
def test_chains_know_nothing_of_each_other(case):
    sampler, law = INDEPENDENT[case], gaussian(NORMAL, (1,))
    begin = sampler.replicate(torch.zeros(20_000, 1))
    x = sampler.cold(run(sampler, law.target(), begin, 10).x)
    a, b = x[0::2], x[1::2]
    assert_means(torch.cat([a * b, (a**2 - (a**2).mean()) * (b**2 - (b**2).mean())], -1), 0.0)


def test_discrete_chains_know_nothing_of_each_other():
    teacher = table(0)
    x = run(GibbsWithGradients(), teacher.target(), teacher.start((20_000,)), 5).x
    x = x - x.mean(0)
    assert_means(x[0::2] * x[1::2], 0.0)


@pytest.mark.parametrize("sampler", KERNELS, ids=str)
def test_each_chain_may_have_a_beta_of_its_own(sampler):
    betas = torch.tensor([0.25, 1.0, 4.0])
    target = Target(lambda x, beta: -0.5 * beta * (x**2).sum(-1), 1)
    begin = torch.randn(20_000, 3, 1) / betas[:, None].sqrt()
    x = run(sampler, target, begin, 10, beta=betas).x
    assert x.shape == (20_000, 3, 1)
    assert_means(x.squeeze(-1) ** 2, 1 / betas)


def test_each_discrete_chain_may_have_a_beta_of_its_own():
    teacher, betas, steps = table(3), torch.tensor([0.0, 0.5, 1.0]), 20
    x = run(GibbsWithGradients(), teacher.target(), teacher.start((20_000, 3)), steps, beta=betas).x
    even = torch.full((len(teacher.states),), 1 / len(teacher.states))
    for k, beta in enumerate(betas.tolist()):
        assert_counts(teacher.index(x[:, k]), even @ torch.linalg.matrix_power(teacher.matrix(beta), steps))


REAL_SAMPLERS = [
    Langevin(),
    Langevin(adjusted=False),
    Hamiltonian(num_leapfrog=2),
    ParallelTempering(temperatures=2, hottest=0.5),
]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("sampler", REAL_SAMPLERS, ids=str)
def test_draws_have_the_shape_of_events(sampler, shape):
    log_prob = lambda x: -0.5 * x.reshape(len(x), -1).square().sum(-1)  # noqa: E731
    target = Target(lambda x, beta: -0.5 * beta * x.square().sum(tuple(range(-len(shape), 0)) or torch.Size()), len(shape))
    if not shape:
        target = Target(lambda x, beta: -0.5 * beta * x.square(), 0)
        log_prob = lambda x: -0.5 * x.square()  # noqa: E731
    for density in (target, log_prob) if not isinstance(sampler, ParallelTempering) else (target,):
        chains = sample_chains(density, torch.randn(4, *shape), sampler=sampler, num_samples=5, warmup=20, progress=False)
        assert chains.draws.shape == (4, 5, *shape)
        assert chains.stats["lp"].shape == chains.stats["acceptance_rate"].shape == (4, 5)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("support", [BINARY, CLASSES], ids=["binary", "classes"])
@pytest.mark.parametrize("sampler", [Gibbs(), GibbsWithGradients(), ParallelTempering(Gibbs(), temperatures=2)], ids=str)
def test_discrete_draws_have_the_shape_of_events(sampler, support, shape):
    dist = EnergyModel(shape, energy=RestrictedBoltzmannMachine(2), support=support)()
    x = torch.randint(2, (4, *shape))
    chains = sample_chains(
        dist, x if support is CLASSES else x.double(), sampler=sampler, num_samples=3, warmup=5, progress=False
    )
    assert chains.draws.shape == (4, 3, *shape)
    assert dist.support.check(chains.draws).all()


def test_classes_come_back_as_they_were_given():
    dist = EnergyModel((3,), energy=RestrictedBoltzmannMachine(2), support=CLASSES)()
    chains = sample_chains(dist, torch.randint(3, (4, 3)), num_samples=3, warmup=5, progress=False)
    assert chains.draws.dtype == torch.long


def test_bounded_data_come_back_within_their_bounds_and_follow_the_energy():
    """exp(-E) = exp(-3 x) on [0, 2]: chains move on the line, and the bijection is counted."""
    dist = Energy(lambda x: 3 * x.squeeze(-1), (1,), support=constraints.interval(0.0, 2.0))
    draws = sample_chains(dist, 2 * torch.rand(3000, 1), num_samples=20, warmup=300, progress=False).draws
    assert (draws > 0).all()
    assert (draws < 2).all()
    points = torch.tensor([0.1, 0.25, 0.5, 1.0])
    assert_means((draws < points).double().mean(1), torch.expm1(-3 * points) / math.expm1(-6))


# Along the path of an energy: from its start, which is normalised, to exp(-E).


def test_copies_of_a_chain_are_tempered_along_the_path_of_an_energy():
    """Two Gaussians of unequal weights far apart; the path begins at a standard normal."""
    far = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([-5.0, 5.0]), torch.tensor([0.5, 0.5]))
    dist = Energy(lambda x: -far.log_prob(x.squeeze(-1)), (1,))
    tempered = ParallelTempering(temperatures=10, steps=2)
    draws = sample_chains(dist, torch.full((600, 1), -5.0), sampler=tempered, num_samples=80, warmup=250, progress=False).draws
    assert_means(torch.cat([draws.mean(1), (draws > 0).double().mean(1)], -1), [far.mean, 0.7])


def test_annealing_an_energy_over_an_interval_finds_its_constant():
    """The integral of exp(-3 x) over [0, 2], also backwards and from a point."""
    dist = Energy(lambda x: 3 * x.squeeze(-1), (1,), support=constraints.interval(0.0, 2.0))
    target, betas, z = dist.target(), torch.linspace(0, 1, 5), -math.expm1(-6) / 3
    _, log_w = anneal(target, Langevin(0.3), target.start((50_000,)), betas)
    assert_means(log_w.exp() / z, 1.0)
    x = target.encode(-torch.log1p(torch.rand(50_000, 1) * math.expm1(-6)) / 3)
    _, log_w = anneal(target, Langevin(0.3), x, betas.flip(0))
    assert_means(log_w.exp() * z, 1.0)


@pytest.mark.parametrize("sampler", [Langevin(), ParallelTempering(temperatures=3, steps=1)], ids=["plain", "tempered"])
def test_each_chain_may_have_a_context_of_its_own(sampler):
    context = torch.linspace(-3, 3, 2000)[:, None]
    dist = Energy(lambda x, c: 0.5 * (x - c).square().sum(-1), (1,), context=context)
    draws = sample_chains(dist, torch.zeros(2000, 1), sampler=sampler, num_samples=10, warmup=200, progress=False).draws
    z = draws.squeeze(-1) - context
    assert_means(torch.stack([z.mean(1), (z**2).mean(1), (z * context).mean(1), (z < 0.5).double().mean(1)], -1),
                 [0.0, 1.0, 0.0, normal_cdf(torch.tensor(0.5)).item()])  # fmt: skip


# What is left alone.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return -0.5 * (x * self.scale).square().sum(-1)


def everything_drawn(net, initial):
    """Results of every door, by name."""
    target = Target(lambda x, beta: beta * net(x), 1)
    tempered = ParallelTempering(temperatures=2, hottest=0.5)
    quick = {"num_samples": 3, "warmup": 30, "progress": False}
    results = {}
    for sampler in (Langevin(0.5), Langevin(0.1, adjusted=False), Hamiltonian(1.0, 2)):
        ended = run(sampler, target, initial, 3, rate=0.1)
        chains = sample_chains(net, initial, sampler=sampler, **quick)
        results[f"run {sampler}"], results[f"step size {sampler}"] = ended.x, ended.step_size
        results[f"chains {sampler}"], results[f"lp {sampler}"] = chains.draws, chains.stats["lp"]
    results["tempered"] = sample_chains(net, initial, sampler=tempered, **quick).draws
    results["annealed"], results["weights"] = anneal(target, Langevin(0.5), initial, torch.linspace(0.5, 1, 3).to(initial))
    results["tuned"] = tune(target, Langevin(), initial, torch.linspace(0, 1, 3).to(initial))
    results["led down"] = annealed_langevin(lambda x, sigma: -x / (net.scale**2 + sigma**2), initial, [1.0, 0.1], steps=2)
    return results


@pytest.mark.parametrize("tracked", [False, True], ids=["plain", "requires_grad"])
def test_results_carry_no_gradients_and_parameters_get_none(tracked):
    net = Net()
    net.scale.grad = torch.full((2,), 7.0)
    for name, value in everything_drawn(net, torch.randn(8, 2, requires_grad=tracked)).items():
        assert not value.requires_grad, name
    assert net.scale.requires_grad
    assert torch.equal(net.scale.grad, torch.full((2,), 7.0))


def test_starting_points_are_not_changed():
    initial = torch.randn(8, 2)
    kept = initial.clone()
    everything_drawn(Net(), initial)
    assert torch.equal(initial, kept)
    for name in MACHINES:
        dist, x = machine(name)
        u = dist.target().encode(x)
        kept = u.clone()
        run(Gibbs(), dist.target(), u, 3)
        run(GibbsWithGradients(), dist.target(), u, 3)
        assert torch.equal(u, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_precision_of_starting_points_is_kept(dtype, default):
    torch.set_default_dtype(default)
    net = Net().to(dtype)
    for name, value in everything_drawn(net, torch.randn(8, 2, dtype=dtype)).items():
        assert value.dtype == dtype, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_precision_of_discrete_positions_is_kept(dtype):
    for name in MACHINES:
        energy, support, shape = MACHINES[name]
        target = EnergyModel(shape, energy=energy, support=support).to(dtype)().target()
        u = target.start((4,)).to(dtype)
        for sampler in (Gibbs(), GibbsWithGradients()):
            assert run(sampler, target, u, 2, beta=0.5).x.dtype == dtype
        _, log_w = anneal(target, Gibbs(), u, schedule(2, u))
        assert log_w.dtype == dtype


def test_the_same_seed_draws_the_same():
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(everything_drawn(Net(), torch.ones(8, 2)))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    assert not torch.equal(results[0]["tempered"], results[2]["tempered"])


def test_gradients_that_are_switched_off_are_switched_off_for_the_caller_only():
    with torch.no_grad():
        results = everything_drawn(Net(), torch.randn(8, 2))
        assert not torch.is_grad_enabled()
    assert all(value.isfinite().all() for value in results.values())


def test_inference_mode_is_refused_by_name():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode.*Use torch\.no_grad"):
        sample_chains(lambda x: -x.square().sum(-1), torch.randn(8, 2), progress=False)


def test_a_flat_density_is_drawn_uniformly():
    """Nothing of x is left for a gradient to go through."""
    square = lambda x: torch.where((x.abs() < 1).all(-1), 0.0, -torch.inf)  # noqa: E731
    draws = sample_chains(square, torch.zeros(3000, 2), sampler=Langevin(0.3), num_samples=20, warmup=300, progress=False).draws
    assert_means((draws < torch.tensor([-0.5, 0.5])).double().mean(1), [0.25, 0.75])


def test_samplers_are_immutable_records():
    for sampler in (*MOVES.values(), Gibbs(), GibbsWithGradients()):
        assert pickle.loads(pickle.dumps(sampler)) == sampler
        assert hash(sampler) == hash(dataclasses.replace(sampler))
        with pytest.raises(dataclasses.FrozenInstanceError):
            sampler.step_size = 3.0


# Chains as a user has them.


def some_chains(**options):
    options = {"num_samples": 12, "warmup": 20, "progress": False} | options
    return sample_chains(modes().log_prob, torch.zeros(4, 1), **options)


def test_samples_are_had_by_name_and_by_chain():
    chains = some_chains(name="height")
    assert isinstance(chains, Chains)
    assert set(chains.get_samples()) == {"height"}
    assert torch.equal(chains.get_samples()["height"], chains.draws)
    flat = chains.get_samples(group_by_chain=False)["height"]
    assert flat.shape == (48, 1)
    assert torch.equal(flat[12:24], chains.draws[1])


def test_statistics_are_of_the_draws():
    chains = some_chains()
    assert set(chains.stats) == {"acceptance_rate", "lp"}
    torch.testing.assert_close(chains.stats["lp"], modes().log_prob(chains.draws))
    assert chains.acceptance_rate == pytest.approx(chains.stats["acceptance_rate"].mean().item())
    stayed = (chains.draws[:, 1:] == chains.draws[:, :-1]).squeeze(-1)
    assert (chains.stats["acceptance_rate"][:, 1:][stayed] < 1).all()


def test_statistics_of_tempered_chains_are_of_the_cold_one():
    chains = some_chains(sampler=ParallelTempering(temperatures=3, hottest=0.1, steps=2))
    torch.testing.assert_close(chains.stats["lp"], modes().log_prob(chains.draws))


def test_gibbs_sweeps_know_no_log_density():
    chains = sample_chains(
        machine("general, classes")[0], torch.zeros(5, 2).long(), sampler=Gibbs(), num_samples=5, progress=False
    )
    assert set(chains.stats) == {"acceptance_rate"}
    assert (chains.stats["acceptance_rate"] == 1).all()


def test_thinning_takes_every_third_draw():
    torch.manual_seed(5)
    every = some_chains(num_samples=12)
    torch.manual_seed(5)
    third = some_chains(num_samples=4, thin=3)
    assert torch.equal(third.draws, every.draws[:, 2::3])
    assert torch.equal(third.stats["lp"], every.stats["lp"][:, 2::3])


def test_after_the_warmup_nothing_is_tuned():
    torch.manual_seed(5)
    short = some_chains(num_samples=2)
    torch.manual_seed(5)
    long = some_chains(num_samples=12)
    assert torch.equal(short.step_size, long.step_size)
    assert torch.equal(short.draws, long.draws[:, :2])


def test_without_a_warmup_the_step_size_is_the_samplers():
    chains = some_chains(sampler=Langevin(0.7), warmup=0)
    assert chains.step_size == pytest.approx(0.7)


def test_progress_is_shown_where_it_is_wanted(capsys):
    some_chains(progress=False)
    assert capsys.readouterr().err == ""
    some_chains(progress=True)
    assert "chains" in capsys.readouterr().err


def test_chains_go_to_arviz():
    from pyro_genmodels import to_arviz

    chains = some_chains(name="height")
    data = to_arviz(chains)
    assert data.posterior["height"].dims[:2] == ("chain", "draw")
    torch.testing.assert_close(torch.as_tensor(data.posterior["height"].values.copy()), chains.draws)


# Errors name the cure.


def wrong_sampler(kind, sampler):
    if kind == "real":
        target, x = gaussian(NORMAL, (1,)).target(), torch.zeros(3, 1)
    else:
        teacher = table(0 if kind == "binary" else 3)
        target, x = teacher.target(), teacher.start((3,))
    return lambda: sample_chains(target, x, sampler=sampler, progress=False)


@pytest.mark.parametrize(
    ("kind", "sampler", "message"),
    [
        ("binary", Langevin(), r"Langevin cannot move zeros and ones\. Use GibbsWithGradients\(\)"),
        ("categorical", Hamiltonian(), r"Hamiltonian cannot move classes\. Use GibbsWithGradients\(\)"),
        ("binary", ParallelTempering(), r"Langevin cannot move zeros and ones\. Use GibbsWithGradients\(\)"),
        ("real", GibbsWithGradients(), r"GibbsWithGradients cannot move real numbers\. Use Langevin\(\) or Hamiltonian\(\)"),
        ("real", Gibbs(), r"Gibbs wants .* Use Langevin\(\)"),
        ("binary", Gibbs(), r"Gibbs wants .* Use GibbsWithGradients\(\)"),
        ("categorical", ParallelTempering(Gibbs()), r"Gibbs wants .* Use GibbsWithGradients\(\)"),
    ],
    ids=str,
)
def test_a_sampler_that_cannot_move_the_data_names_one_that_can(kind, sampler, message):
    with pytest.raises(ValueError, match=message):
        wrong_sampler(kind, sampler)()


def test_nuts_is_for_real_numbers():
    with pytest.raises(ValueError, match=r"zeros and ones\. Use GibbsWithGradients\(\)"):
        potential(table(0).target())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_starting_points_without_a_density_are_refused(value):
    log_prob = lambda x: torch.where(x.sum(-1) > 1, value, -x.square().sum(-1))  # noqa: E731
    with pytest.raises(ValueError, match=r"1 of 3 starting points have no finite log density or score\. Begin within"):
        sample_chains(log_prob, torch.tensor([[0.0], [2.0], [0.5]]), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "an integer num_samples of 1 or more, but found 0"),
        ({"thin": 0}, "an integer thin of 1 or more, but found 0"),
        ({"warmup": -1}, "an integer warmup of 0 or more, but found -1"),
    ],
    ids=str,
)
def test_counts_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        some_chains(**options)


@pytest.mark.parametrize("initial", [torch.zeros(0, 2), torch.tensor(1.0), [0.0, 1.0]], ids=["none", "number", "list"])
def test_starting_points_are_a_tensor_of_chains(initial):
    with pytest.raises(ValueError, match=r"initial wants a tensor of starting points, \(chains, ...\), but found"):
        sample_chains(modes().log_prob, initial, progress=False)


def test_a_target_is_a_function():
    with pytest.raises(TypeError, match=r"wants an unnormalised log density.* but found Tensor"):
        sample_chains(torch.zeros(3), torch.zeros(3, 1), progress=False)


COUPLED = [Langevin(0.3), Hamiltonian(0.5, 3), ParallelTempering(Langevin(0.3), temperatures=2, hottest=0.5)]


@pytest.mark.parametrize("sampler", COUPLED, ids=str)
def test_a_log_density_of_all_chains_together_is_refused(sampler):
    with pytest.raises(ValueError, match=r"log density.*shape|shape.*log density"):
        sample_chains(lambda x: correlated().log_prob(x).sum(), torch.randn(10, 2), sampler=sampler, num_samples=5, warmup=5)


@pytest.mark.parametrize("sampler", COUPLED, ids=str)
def test_a_log_density_that_keeps_a_dimension_is_refused_or_understood(sampler):
    """(chains, 1), as networks return it, must not be taken for densities of coordinates, each accepted by itself."""
    x = CORRELATED.distribution().sample((500,))
    column = lambda x: correlated().log_prob(x)[..., None]  # noqa: E731
    try:
        chains = sample_chains(column, x, sampler=sampler, num_samples=1, warmup=0, progress=False)
    except ValueError:
        return
    moved = chains.draws[:, 0] != x
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert chains.stats["acceptance_rate"].shape == (500, 1)


@pytest.mark.parametrize("kind", ["real", "binary"])
def test_whole_numbers_as_starting_points_are_taken_or_refused_by_name(kind):
    target = gaussian(NORMAL, (1,)).target() if kind == "real" else table(0).target()
    initial = torch.zeros(3, 1 if kind == "real" else 4, dtype=torch.long)
    try:
        draws = sample_chains(target, initial, num_samples=2, warmup=2, progress=False).draws
    except (TypeError, ValueError):
        return
    assert draws.shape == (3, 2, *initial.shape[1:])


def test_positions_that_are_not_zeros_and_ones_are_refused():
    with pytest.raises(ValueError, match="zeros and ones"):
        sample_chains(table(0).target(), torch.rand(3, 4), num_samples=2, warmup=2, progress=False)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Langevin(0.0),
        lambda: Langevin(-1.0),
        lambda: Langevin(math.inf),
        lambda: Langevin(math.nan),
        lambda: Langevin("fast"),
        lambda: Hamiltonian(0.0),
        lambda: Hamiltonian(num_leapfrog=0),
        lambda: Hamiltonian(num_leapfrog=2.5),
        lambda: ParallelTempering(temperatures=1),
        lambda: ParallelTempering(temperatures=2.5),
        lambda: ParallelTempering(hottest=1.0),
        lambda: ParallelTempering(hottest=-0.1),
        lambda: ParallelTempering(steps=0),
        lambda: ParallelTempering(steps=1.5),
    ],
)
def test_options_that_make_no_sense_are_refused(build):
    with pytest.raises(ValueError, match="wants"):
        build()


# Langevin annealed over levels of noise: the law of its end is had on a grid, by the kernel of each step.

NARROW = Mixture(*torch.tensor([[0.3, 0.7], [-2.0, 1.5], [0.4, 0.6]]).double())
NOISE = torch.logspace(0.5, -0.7, 7, dtype=torch.float64)
EDGES = torch.cat([torch.tensor([-math.inf]), torch.linspace(-4, 4, 17), torch.tensor([math.inf])]).double()


def noised_score(x, sigma):
    """Of the mixture with noise added, x (..., 1)."""
    variance = NARROW.scale**2 + sigma**2
    log_w = NARROW.weights.log() - 0.5 * variance.log() - 0.5 * (x - NARROW.loc) ** 2 / variance
    return (log_w.softmax(-1) * (NARROW.loc - x) / variance).sum(-1, keepdim=True)


def law_of_the_end(steps, step_size):
    """Probabilities of the cells between EDGES, begun at N(0, 3^2)."""
    x, width = grid(-30.0, 30.0, 1200)
    law = normal_log_prob(x.squeeze(-1), scale=3.0).exp() * width
    for sigma in NOISE:
        eps = step_size * sigma**2
        mean, scale = x + eps * noised_score(x, sigma), (2 * eps).sqrt().item()
        kernel = normal_log_prob(x.T, mean, scale).exp() * width
        for _ in range(steps):
            before, law = law, law @ kernel
    return before @ normal_cdf(EDGES, mean, scale).diff(dim=-1)  # the last step, exactly


@pytest.mark.parametrize(("steps", "step_size"), [(3, 0.5), (25, 0.1)])
def test_annealed_langevin_ends_where_its_kernels_lead(steps, step_size):
    law = law_of_the_end(steps, step_size)
    assert law.sum() == pytest.approx(1, abs=1e-6)
    draws = annealed_langevin(noised_score, 3 * torch.randn(20_000, 1), NOISE, steps=steps, step_size=step_size, denoise=False)
    assert_counts(torch.bucketize(draws.flatten(), EDGES) - 1, law)


def test_as_steps_are_added_that_is_the_mixture_at_the_last_level_of_noise():
    """In total variation over the cells; what is left is the bias of a finite step."""
    scale = (NARROW.scale**2 + NOISE[-1] ** 2).sqrt()
    truth = (normal_cdf(EDGES[:, None], NARROW.loc, scale) * NARROW.weights).sum(-1).diff()
    distance = [(law_of_the_end(steps, 0.1) - truth).abs().sum() / 2 for steps in (2, 20, 200)]
    assert distance[0] > 2 * distance[1] > 4 * distance[2]
    assert distance[2] < 0.01


def test_the_last_step_goes_to_the_mean_of_the_data():
    ends = []
    for denoise in (False, True):
        torch.manual_seed(3)
        ends.append(annealed_langevin(noised_score, torch.randn(100, 1), NOISE, steps=2, denoise=denoise))
    last = NOISE[-1]
    torch.testing.assert_close(ends[1], ends[0] + last**2 * noised_score(ends[0], last))


def test_annealed_langevin_takes_any_shape_of_events():
    score = lambda x, sigma: -x / (1 + sigma**2)  # noqa: E731
    for shape in ((), (3,), (2, 3)):
        assert annealed_langevin(score, torch.randn(4, *shape), [1.0, 0.5], steps=2).shape == (4, *shape)


@pytest.mark.parametrize("noise", [[0.1, 1.0], [1.0, 0.0], [], [1.0, -0.5], [1.0, math.nan]], ids=str)
def test_levels_of_noise_fall(noise):
    with pytest.raises(ValueError, match="noise wants positive standard deviations, the largest first"):
        annealed_langevin(noised_score, torch.zeros(3, 1), noise)


# Pyro's NUTS.


def test_the_potential_is_minus_the_log_density():
    law = gaussian(CORRELATED, (2,))
    x = torch.randn(2, requires_grad=True)
    energy = potential(law.log_prob, name="height")({"height": x})
    assert energy.shape == ()
    assert energy == -law.log_prob(x[None])[0]
    (slope,) = torch.autograd.grad(energy, x)
    torch.testing.assert_close(slope, CORRELATED.cov.inverse() @ (x.detach() - CORRELATED.loc))


def test_the_potential_of_an_energy_is_over_positions():
    dist = Energy(lambda x: 3 * x.squeeze(-1), (1,), support=constraints.interval(0.0, 2.0))
    u = torch.randn(1)
    assert potential(dist)({"x": u}) == pytest.approx(-dist.target().log_prob(u[None], 1.0).item())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2,), (2, 3)], ids=str)
def test_nuts_draws_from_it(shape):
    """Means over 40 blocks of a hundred draws, long against the time to forget."""
    law = correlated() if shape == (2,) else image()
    kernel = NUTS(potential_fn=potential(law.target(len(shape))))
    mcmc = MCMC(kernel, 4000, 500, initial_params={"x": torch.zeros(shape)}, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["x"]
    assert draws.shape == (4000, *shape)
    assert_means(law.statistics(draws).unflatten(0, (40, 100)).mean(1), law.means)


# What goes wrong is told.


def test_chains_that_run_away_are_told():
    quartic = Energy(lambda x: x.pow(4).sum(-1), (1,), sampler=Langevin(1.0, adjusted=False))
    with pytest.raises(FloatingPointError, match=r"chains ran away to infinity.* Use Langevin\(adjusted=True\)"):
        quartic.sample((3,))
    with pytest.warns(RuntimeWarning, match="chains ran away, to log densities of .* Lower the step size"):
        sample_chains(
            lambda x: -x.square().sum(-1) / 2, torch.randn(5, 1), sampler=Langevin(2.1, adjusted=False), progress=False
        )


def test_a_chain_that_accepts_nothing_among_others_that_do_is_told():
    """One begins on a spike so high that it never leaves it."""

    def spike(x):
        return torch.where((x - 5).abs().sum(-1) < 1e-6, 1e3 - 0 * x.sum(-1), -x.square().sum(-1) / 2)

    initial = torch.cat([torch.zeros(9, 1), torch.full((1, 1), 5.0)])
    with pytest.warns(RuntimeWarning, match="1 of 10 chains accepted nearly nothing"):
        sample_chains(spike, initial, num_samples=200, warmup=50, progress=False)


@pytest.mark.parametrize(
    ("options", "error", "found"),
    [
        ({"sampler": Langevin}, TypeError, "but found the class Langevin"),
        ({"sampler": "langevin"}, TypeError, "wants a sampler such as"),
        ({"num_samples": 10.5}, ValueError, "an integer num_samples of 1 or more, but found 10.5"),
        ({"target": lambda x: 0.0}, TypeError, "must be a tensor with one number per chain, but is float"),
        (
            {"target": Energy(lambda x, c: x.square().sum(-1), (1,), context=torch.zeros(5, 2))},
            ValueError,
            "each of 5 contexts",
        ),
        ({"target": Energy(lambda x: x.sum(-1), (1,), support=constraints.interval(0.0, 0.5))}, ValueError, "within .*outside"),
        ({"target": Energy(lambda x: x.sum(-1), (1,), support=constraints.integer_interval(0, 1))}, ValueError, "outside"),
    ],
)
def test_what_chains_cannot_use_is_refused(options, error, found):
    options = {"target": lambda x: -x.square().sum(-1), "num_samples": 3, "warmup": 0} | options
    with pytest.raises(error, match=found):
        sample_chains(options.pop("target"), torch.full((4, 1), 2.0), progress=False, **options)


def test_tempering_wants_a_plain_sampler():
    for sampler in ("x", ParallelTempering(Langevin())):
        with pytest.raises(TypeError, match="wants a plain sampler"):
            ParallelTempering(sampler)


def test_nuts_wants_the_energy_of_one_context():
    energy = Energy(lambda x, c: x.square().sum(-1), (1,), context=torch.zeros(5, 2))
    with pytest.raises(ValueError, match="energy of one context, but found 5"):
        potential(energy)


@pytest.mark.parametrize("options", [{"steps": 0}, {"step_size": -1.0}])
def test_annealed_langevin_refuses_steps_that_make_no_sense(options):
    with pytest.raises(ValueError, match="steps wants 1 or more and step_size a positive number"):
        annealed_langevin(lambda x, sigma: -x, torch.zeros(3, 1), [1.0, 0.1], **options)


# NaN and infinite densities.


def test_a_density_that_is_nan_counts_as_lost_in_the_warning():
    """Every comparison with NaN is false, so no chain was lost if the best density was NaN."""
    assert _is_lost(torch.tensor([0.0, -1.0, torch.nan, -2e6, torch.inf])).tolist() == [False, False, True, True, True]
    assert _is_lost(torch.full((2,), torch.nan)).all()


@pytest.mark.parametrize("sampler", [Langevin(0.5), Hamiltonian(0.3, 3)], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_no_position_of_an_undefined_density_is_accepted(sampler, bad):
    half = Target(lambda x, beta: torch.where(x[..., 0] > 0, -beta * x[..., 0] ** 2, x[..., 0] * 0 + bad), 1)
    found = run(sampler, half, torch.rand(500, 1) + 0.1, 30)
    assert (found.x > 0).all()
    assert 0.1 < found.acceptance < 0.99


def test_gibbs_with_gradients_rejects_where_the_density_is_nan():
    """The proposal of a chain whose gradient is NaN was an error of torch.multinomial."""
    broken = Target(lambda x, beta: torch.where(x.sum(-1) > 2, x.sum(-1) * torch.nan, x.sum(-1)), 1, Binary())
    start = torch.zeros(50, 4)
    start[0] = 1.0
    found = run(GibbsWithGradients(), broken, start, 40).x
    assert (found[1:].sum(-1) <= 2).all()
    assert (found[0] == 1).all()


def test_steps_are_tuned_in_any_unit():
    """Right values: step sizes in the square of the unit, and draws of its size."""
    for unit in (1e-8, 1.0, 1e8):
        start = unit * torch.randn(200, 1)
        chains = sample_chains(lambda x, unit=unit: -0.5 * (x / unit).square().sum(-1), start, num_samples=50, progress=False)
        assert (chains.step_size / unit**2).item() == pytest.approx(1.7, rel=0.3)
        assert (chains.draws / unit).square().mean().item() == pytest.approx(1.0, abs=0.15)
