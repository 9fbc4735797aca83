"""Partition functions: exact ones against closed forms, estimates against exact ones, and the likelihoods made of them.

False alarms. Means over independent estimates are held against the truth by `assert_means`, which errs with probability 1e-7;
no test calls it more than ten times. Where a test does otherwise it says so.
"""

import copy
import re
from importlib import import_module
from math import log, pi

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_unless
from pyro import poutine
from scipy import stats
from teachers import Gaussian, Mixture, assert_means, integral, outcomes, perturb
from test_energy import (
    BINARY,
    CLASSES,
    CONDITIONAL,
    COPIES,
    SYSTEMS,
    UNIT,
    by_name,
    exact_draws,
    exact_log_prob,
    fixed,
    latent,
    log_z,
    shifting,
    system,
)  # fmt: skip
from torch import nn
from torch.distributions import constraints

from pyro_genmodels import (
    VAE,
    Autoregressive,
    DenseEnergy,
    EnergyModel,
    Flow,
    Labels,
    Langevin,
    NormalLikelihood,
    Persistent,
    RestrictedBoltzmannMachine,
    compare,
    log_likelihood,
)
from pyro_genmodels.distributions import Energy
from pyro_genmodels.distributions.energy.path import PathOptions
from pyro_genmodels.distributions.energy.state import LogPartition, fingerprint
from pyro_genmodels.evaluation import conservative_log_likelihood, log_partition
from pyro_genmodels.families import Hamiltonian, ParallelTempering

pytestmark = pytest.mark.usefixtures("float64")
of_few_chains = pytest.mark.filterwarnings("ignore:The estimate of log Z is unreliable:RuntimeWarning")


# Exactly.


MACHINES = {
    "zeros and ones": (BINARY, (4,), False),
    "an image": (BINARY, (2, 2), False),
    "classes": (CLASSES, (3,), False),
    "zeros and ones, labelled": (BINARY, (4,), True),
}


@by_name(MACHINES)
def test_a_sum_over_hidden_units_is_that_over_all_outcomes(name, monkeypatch):
    support, shape, labelled = MACHINES[name]
    options = {"context": Labels(3)} if labelled else {}
    family = perturb(EnergyModel(shape, energy=RestrictedBoltzmannMachine(3), support=support, **options), 1.5)
    family.marginals.normal_()
    family.energy.centre.uniform_()
    fn = family(torch.tensor([2, 0, 1])) if labelled else family()
    over_outcomes = log_partition(fn)
    monkeypatch.setattr("pyro_genmodels.distributions.energy.exact.MAX_STATES", 1)
    over_hidden = log_partition(fn)
    assert (over_outcomes.num_steps, over_hidden.num_steps) == (27 if support is CLASSES else 16, 8)
    assert over_outcomes.kind == over_hidden.kind == "exact"
    torch.testing.assert_close(over_hidden.value, over_outcomes.value)
    levels = 3 if support is CLASSES else 2
    x = outcomes(levels, 4 if levels == 2 else 3).reshape(-1, *shape).to(torch.long if levels == 3 else torch.float64)
    torch.testing.assert_close(over_outcomes.value, log_z(fn, x).detach())


@pytest.mark.parametrize("support", [constraints.real, UNIT, constraints.positive], ids=["line", "interval", "half-line"])
def test_a_restricted_machine_over_numbers_is_summed_over_its_hidden_units(support):
    family, states, volume = system(RestrictedBoltzmannMachine(2), support)
    perturb(family, 1.0)
    found = log_partition(family)
    assert found.kind == "exact"
    torch.testing.assert_close(found.value, log_z(family(), states, volume).detach(), rtol=0, atol=1e-3)


def test_a_machine_of_many_units_is_summed_over_its_few_hidden_ones():
    """Weights are zero but to one unit, so that Z is that of two units, times those of the others."""
    family = EnergyModel((40,), energy=RestrictedBoltzmannMachine(2), support=BINARY)
    family.marginals.normal_()
    with torch.no_grad():
        for p in family.energy.parameters():
            p.normal_()
        family.energy.weight[1:] = 0.0
        odds, bias = family.marginals, family.energy.visible
        alone = ((odds + bias)[1:].exp() + 1).log().sum() - (odds.exp() + 1).log()[1:].sum()
        v = torch.tensor([0.0, 1.0])
        a = family.energy.hidden + v[:, None] * family.energy.weight[0]
        joined = (v * (odds + bias)[0] + (2 * (a / 2).cosh()).log().sum(-1)).logsumexp(0) - (odds[0].exp() + 1).log()
    found = log_partition(family)
    assert (found.kind, found.num_steps) == ("exact", 4)
    torch.testing.assert_close(found.value, alone + joined)


def flat(energy, dims=1, **options):
    return Energy(energy, (dims,), **options)


def mixture(weights, loc, scale):
    law = Mixture(*map(torch.tensor, (weights, loc, scale)))
    return flat(lambda x: -law.log_prob(x.squeeze(-1)))


def gaussian(loc, cov):
    law = Gaussian(torch.tensor(loc), torch.tensor(cov))
    return flat(lambda x: -law.log_prob(x), len(loc))


INTEGRALS = {  # what makes the energy, and the logarithm of its integral
    "a normal": (lambda: gaussian([0.3], [[0.7]]), 0.0),
    "far away": (lambda: gaussian([100.0], [[1.0]]), 0.0),
    "narrow": (lambda: gaussian([0.3], [[1e-5]]), 0.0),
    "wide": (lambda: gaussian([-3.0], [[1e5]]), 0.0),
    "two modes": (lambda: mixture([0.3, 0.7], [-2.0, 6.0], [0.1, 1.5]), 0.0),
    "two modes, one far away": (lambda: mixture([0.5, 0.5], [0.0, 30.0], [1.0, 1.0]), 0.0),
    "a needle in a haystack": (lambda: mixture([0.5, 0.5], [0.0, 0.1234], [1.0, 1e-4]), 0.0),
    "the plane": (lambda: gaussian([1.0, -2.0], [[0.09, 0.36], [0.36, 4.0]]), 0.0),
    "the plane, far away": (lambda: gaussian([30.0, -20.0], [[1.0, 0.0], [0.0, 1.0]]), 0.0),
    "an interval": (lambda: flat(lambda x: 0 * x.sum(-1), support=UNIT), log(2)),
    "a square": (lambda: flat(lambda x: 0 * x.sum(-1), 2, support=UNIT), 2 * log(2)),
    "a beta density": (lambda: flat(lambda x: -(x**1.5 * (2 - x) ** 0.5).log().sum(-1), support=UNIT), log(pi / 2)),
    "a gamma density": (lambda: flat(lambda x: (x - 2 * x.log()).sum(-1), support=constraints.positive), log(2)),
}


@by_name(INTEGRALS)
def test_an_integral_is_its_closed_form_where_it_is_said_to_be_exact(name):
    build, truth = INTEGRALS[name]
    found = log_partition(build())
    assert found.kind == "exact"
    assert found.std_error == 0
    assert found.value.item() == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("exact", [True, False, None])
def test_active_dropout_has_no_log_z_to_remember(exact):
    network = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 1), nn.Flatten(0))
    model = EnergyModel((1,), energy=network, base=dist.Normal(torch.zeros(1), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"dropout is active has no log Z.*\.eval\(\)"):
        log_partition(model, exact=exact)
    assert model.eval()().density == "unnormalized"


def test_what_cannot_be_had_exactly_is_refused_with_what_could_be():
    with pytest.raises(ValueError, match=r"1048576 outcomes, 20 hidden units of a Boltzmann machine, or two real dimensions"):
        log_partition(EnergyModel((3,)), exact=True)
    with pytest.raises(ValueError, match="cannot be computed exactly"):  # its tails are too heavy
        log_partition(flat(lambda x: x.square().log1p().sum(-1)), exact=True)


@pytest.mark.parametrize(
    "options",
    [{"num_chains": 1}, {"num_chains": True}, {"num_steps": 0}, {"num_steps": True}, {"batch_size": 0}, {"exact": "yes"}],
)
def test_counts_that_make_no_sense_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"log_partition wants .*{name}.* found {value!r}"):
        log_partition(EnergyModel((3,)), **options)


@pytest.mark.parametrize("fn", [Flow((2,)), dist.Normal(0.0, 1.0), 3.0, lambda: 3.0])
def test_what_is_no_energy_is_refused(fn):
    with pytest.raises(TypeError, match="wants the distribution of an energy"):
        log_partition(fn)


def test_wrappers_of_pyro_are_looked_through():
    family, states, _ = SYSTEMS["restricted, zeros and ones"]()
    truth = log_z(family(), states).detach()
    for fn in (family().mask(False), family().expand([4]), family().expand([4]).to_event(1)):
        torch.testing.assert_close(log_partition(fn).value, truth)


# By annealing.


def assert_covers(found, truth):
    """As many lie within one and two standard errors of the truth as of normal ones: binomial bounds, 1e-6 each side."""
    z = ((found.value - truth) / found.std_error).abs()
    for within, rate in ((1.0, 0.6827), (2.0, 0.9545)):
        low, high = stats.binom.ppf([1e-6, 1 - 1e-6], z.numel(), rate)
        assert low <= int((z < within).sum()) <= high, f"{int((z < within).sum())} of {z.numel()} within {within}"


def shifted(sampler):
    """Of the line: N(c, 1/4), times sqrt(pi / 2), from a start at N(0, 1)."""
    context = torch.linspace(-1.5, 1.5, 200)[:, None]
    fn = Energy(lambda x, c: 2 * (x - c).square().sum(-1), (1,), context=context, sampler=sampler)
    return fn, torch.tensor(0.5 * log(pi / 2)).expand(200)


def of_contexts(name, scale=None):
    family, states, volume = CONDITIONAL[name]()
    fn = (family if scale is None else fixed(family, scale))(torch.randn(200, 2))
    return fn, log_z(fn, states, volume).detach()


ESTIMATED = {
    "Gibbs": lambda: of_contexts("restricted, zeros and ones"),
    "Gibbs, classes": lambda: of_contexts("general, classes"),
    "Gibbs with gradients": lambda: of_contexts("a context that is embedded"),
    "Langevin": lambda: shifted(Langevin()),
    "Hamiltonian": lambda: shifted(Hamiltonian(num_leapfrog=3)),
    "tempered": lambda: shifted(ParallelTempering(temperatures=3)),
    "a base": lambda: of_contexts("a base that trains"),
}


@by_name(ESTIMATED, kept=["Gibbs", "Langevin", "Gibbs with gradients"])
def test_of_200_estimates_as_many_cover_the_truth_as_their_errors_promise(name):
    """One for each of as many contexts, whose chains have nothing to do with one another."""
    fn, truth = ESTIMATED[name]()
    found = log_partition(fn, exact=False, num_chains=100, num_steps=25)
    assert found.kind == "estimate"
    assert found.value.shape == found.std_error.shape == found.effective_sample_size.shape == (200,)
    assert_covers(found, truth)


@by_name(["restricted, zeros and ones", "dense, classes"], kept=["restricted, zeros and ones"])
def test_of_50_seeds_as_many_cover_the_truth_as_their_errors_promise(name):
    family, states, volume = SYSTEMS[name]()
    found = [log_partition(family, exact=False, num_chains=100, num_steps=15) for _ in range(50)]
    value, error = (torch.stack([getattr(f, part) for f in found]) for part in ("value", "std_error"))
    assert_covers(LogPartition(value, error, "estimate"), log_z(family(), states, volume).detach())


@of_few_chains
@pytest.mark.parametrize(
    "of", [lambda: of_contexts("restricted, zeros and ones", 2.0), ESTIMATED["Langevin"]], ids=["Gibbs", "Langevin"]
)
def test_the_mean_weight_is_z_and_its_logarithm_too_low(of):
    """One-sided, by six standard errors: a false alarm in 1e9."""
    fn, truth = of()
    off = torch.cat([log_partition(fn, exact=False, num_chains=4, num_steps=2).value - truth for _ in range(20)])
    assert_means(off.exp(), 1.0)
    assert off.mean() < -6 * off.std() / len(off) ** 0.5


def backwards(family, states, n, **options):
    return log_partition(family, exact=False, draws=exact_draws(family(), states, n), num_chains=n, **options)


@of_few_chains
def test_backwards_from_exact_draws_the_mean_weight_is_one_over_z_and_the_estimate_too_high():
    """One-sided, by six standard errors: a false alarm in 1e9."""
    family, states, _ = SYSTEMS["restricted, zeros and ones"]()
    fixed(family, 2.0)
    truth = log_z(family(), states).detach()
    found = [backwards(family, states, 4, num_steps=2) for _ in range(500)]
    off = torch.stack([f.reverse for f in found]) - truth
    assert_means((-off).exp(), 1.0)
    assert off.mean() > 6 * off.std() / len(off) ** 0.5


STARTS = {
    "a normal": lambda: dist.Normal(torch.full((2,), 0.5), 1.5).to_event(1),
    "a mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 1.0).to_event(1)
    ),
    "a family": lambda: perturb(Autoregressive((2,), hidden=(4,), standardize=False)),
}


@by_name(STARTS)
@pytest.mark.parametrize(
    "of", slow_unless(["a flat measure", "a machine"], ["a flat measure", "a family", "a machine", "a base"])
)
def test_a_path_may_begin_with_a_density_of_ones_own(of, name):
    """Within six standard errors: a false alarm in 1e8."""
    if of == "a flat measure":
        fn, truth = gaussian([1.0, 0.5], [[0.5, 0.3], [0.3, 0.5]]), torch.zeros(())
    else:
        options = {"base": dist.Normal(torch.zeros(2), 2.0).to_event(1)} if of == "a base" else {}
        energy = RestrictedBoltzmannMachine(2) if of == "a machine" else DenseEnergy((6,))
        family = perturb(EnergyModel((2,), energy=energy, **options)).eval()
        family.standardize(torch.randn(50, 2) + 1.0)
        fn, truth = family(), log_partition(family, exact=True).value
    found = log_partition(fn, start=STARTS[name](), exact=False, num_chains=400, num_steps=40)
    assert found.kind == "estimate"
    assert found.std_error > 0
    assert (found.value - truth).abs() < 6 * found.std_error


def test_a_path_over_discrete_data_may_begin_with_a_density_of_ones_own():
    """Within six standard errors: a false alarm in 1e8."""
    family, states, _ = SYSTEMS["restricted, zeros and ones"]()
    start = dist.Bernoulli(torch.tensor([0.2, 0.5, 0.7])).to_event(1)
    found = log_partition(family, start=start, exact=False, num_chains=400, num_steps=40)
    assert (found.value - log_z(family(), states)).abs() < 6 * found.std_error


@pytest.mark.parametrize(
    "start",
    [dist.Normal(torch.zeros(3), 1.0), dist.Normal(0.0, 1.0), dist.Normal, 3.0, VAE((3,)), EnergyModel((3,))],
    ids=["a batch", "another event", "a class", "a number", "no density", "an energy"],
)
def test_a_start_that_has_no_density_over_one_event_is_refused(start):
    with pytest.raises((TypeError, ValueError), match=r"log_partition wants .*its start|as its start"):
        log_partition(EnergyModel((3,)), start=start)


@by_name(["restricted, classes", "dense, the line", "dense, the half-line"])
def test_forwards_and_backwards_agree_where_the_path_is_long(name):
    """Within five standard errors each: a false alarm below 1e-5."""
    family, states, volume = SYSTEMS[name]()
    truth, found = log_z(family(), states, volume).detach(), backwards(family, states, 500, num_steps=100)
    assert found.kind == family().log_partition.kind == "estimate"
    assert (found.value - truth).abs() < 5 * found.std_error
    assert (found.reverse - truth).abs() < 5 * found.reverse_std_error
    assert re.fullmatch(r"log Z = .* ± .* nats \(estimate, backwards .* ± .*, Pareto k-hat .*\)", str(found))


def test_a_heavy_tail_of_the_backward_run_is_told():
    """From N(0, 1) to N(0, 1/4) by one step the weights are bounded, and backwards their tail index is 3/4 or more."""
    narrow = Energy(lambda x: 4 * x.square().sum(-1) / 2, (1,))
    draws = 0.5 * torch.randn(5000, 1)
    with pytest.warns(RuntimeWarning, match="weights of the backward run have a heavy tail"):
        found = log_partition(narrow, draws=draws, exact=False, num_chains=5000, num_steps=1)
    assert found.kind == "unreliable"
    assert found.pareto_k < 0.7


def test_forwards_and_backwards_that_disagree_are_told():
    fn = mixture([0.1, 0.9], [0.0, 15.0], [1.0, 1.0])
    draws = 15.0 * (torch.rand(500, 1) < 0.9) + torch.randn(500, 1)
    with pytest.warns(RuntimeWarning, match=r"forwards it is -2.* backwards .* Raise num_steps \(50\) or num_chains \(200\)"):
        found = log_partition(fn, exact=False, draws=draws, num_chains=200, num_steps=50)
    assert found.kind == "unreliable"
    assert found.reverse > found.value + 1


def test_an_estimate_from_few_effective_chains_is_unreliable():
    fn = flat(lambda x: 500 * (x - 1).square().sum(-1), 10)
    with pytest.warns(RuntimeWarning, match="few chains carry all the weight"):
        found = log_partition(fn, num_chains=100, num_steps=1)
    assert found.kind == "unreliable"
    assert found.effective_sample_size < 5


@pytest.mark.parametrize("num_chains", [2, 4, 100])
def test_chains_that_all_carry_weight_are_as_many_as_there_are(num_chains):
    family = EnergyModel((3,))
    for p in family.parameters():
        p.data.zero_()
    found = log_partition(family, num_chains=num_chains, num_steps=3)
    assert found.kind == "estimate"
    torch.testing.assert_close(found.effective_sample_size, torch.tensor(float(num_chains)))
    torch.testing.assert_close(torch.stack([found.value, found.std_error]), torch.zeros(2))


def test_draws_to_anneal_back_from_are_refused_with_a_context():
    family = CONDITIONAL["restricted, zeros and ones"]()[0]
    with pytest.raises(ValueError, match="leave draws out"):
        log_partition(family(torch.randn(2, 2)), exact=False, draws=torch.zeros(5, 3))


# Of conditional energies.


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "estimate"])
@by_name(CONDITIONAL)
def test_every_context_has_a_log_z_of_its_own(name, exact):
    """Estimates within six standard errors: a false alarm in 1e8."""
    family, states, volume = CONDITIONAL[name]()
    context = torch.randn(3, 2)[torch.tensor([[0, 1], [2, 0]])]
    found = log_partition(family(context), exact=exact, num_chains=200, num_steps=30)
    fn = family(context)
    truth = fn.unnormalized_log_prob(states[:, None, None]).logsumexp(0).detach() + log(volume)
    assert found.value.shape == found.std_error.shape == (2, 2)
    assert found.kind == ("exact" if exact else "estimate")
    assert found.value[0, 0] == found.value[1, 1]
    assert ((found.value - truth).abs() <= 6 * found.std_error + 1e-4).all()
    assert family(context).density == "unnormalized"


def test_a_base_that_has_a_context_is_refused():
    with pytest.raises(ValueError, match="a base without a context"):
        EnergyModel((1,), base=Autoregressive((1,), context=2, hidden=(4,)), context=2)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "estimate"])
def test_a_base_over_part_of_the_line_is_integrated_over_that_part(exact):
    """Estimates within six standard errors: a false alarm in 1e8."""
    base = dist.Beta(torch.tensor([2.0]), torch.tensor([3.0])).to_event(1)
    family = perturb(EnergyModel((1,), energy=DenseEnergy((6,)), base=base, support=constraints.interval(0.0, 1.0)))
    found = log_partition(family, exact=exact, num_chains=200, num_steps=30)
    truth = integral(lambda x: family().unnormalized_log_prob(x).exp().detach(), 0.0, 1.0).log()
    assert (found.value - truth).abs() <= 6 * found.std_error + 1e-4


# What is known of log Z.


@by_name(SYSTEMS)
def test_a_density_is_unnormalized_until_log_z_is_known_and_then_sums_to_one(name):
    family, states, volume = SYSTEMS[name]()
    assert family().density == "unnormalized"
    assert family().log_partition is None
    found = log_partition(family)
    assert found.kind == family().density == "exact"
    with torch.no_grad():
        torch.testing.assert_close(family().log_prob(states).exp().sum() * volume, torch.ones(()), rtol=1e-4, atol=0)
        assert log_partition(family, exact=False, num_chains=200, num_steps=20).kind == "estimate"
        fn = family()
        assert fn.density == "exact"  # what is better known is kept
        torch.testing.assert_close(fn.log_prob(states), fn.unnormalized_log_prob(states) - fn.log_partition.value)


def step(family):
    optimiser = torch.optim.SGD(family.parameters(), lr=1e-3)
    family().log_prob(torch.zeros(3, 1)).sum().backward()
    optimiser.step()


def first(family):
    """Four weights of the first layer."""
    return next(family.energy.parameters()).data.view(-1)


def reassign(family, times):
    """Give a parameter new storage, twice to where the first may have been."""
    for _ in range(times):
        parameter = next(family.energy.parameters())
        parameter.data = parameter.data * 1.01


def in_place(family):
    with torch.no_grad():
        next(family.energy.parameters()).mul_(1.001)


def from_a_vector(family):
    parameters = list(family.energy.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters).detach() + 1e-3, parameters)


CHANGES = {
    "data of a parameter": lambda f: first(f).mul_(1 + 1e-6),
    "one element": lambda f: first(f)[3:].mul_(1.001),
    "two weights trade places": lambda f: first(f)[:2].copy_(first(f)[:2].flip(0)),
    "a sign": lambda f: first(f)[:1].neg_(),
    "two signs": lambda f: first(f)[:2].neg_(),
    "a step of an optimiser": step,
    "in place": in_place,
    "another storage": lambda f: reassign(f, 1),
    "another storage, twice": lambda f: reassign(f, 2),
    "a vector of parameters": from_a_vector,
    "another state_dict": lambda f: f.load_state_dict(perturb(copy.deepcopy(f)).state_dict()),
    "another state_dict, without log Z": lambda f: f.load_state_dict(
        {k: v + 0.1 for k, v in f.state_dict().items() if k.startswith("energy.")}, strict=False
    ),
    "a parameter of the base": lambda f: next(f.base.parameters()).data.add_(0.1),
    "standardisation": lambda f: f.standardize(torch.randn(9, 1)),
    "standardisation of the base": lambda f: f.base.standardize(torch.randn(9, 1)),
    "another base": lambda f: setattr(f, "base", Autoregressive((1,), hidden=(4,))),
}


@by_name(CHANGES)
@pytest.mark.parametrize("dtype", slow_unless([torch.float32], [torch.float32, torch.float64]))
def test_log_z_is_forgotten_when_what_it_depends_on_changes(name, dtype):
    base = Autoregressive((1,), hidden=(4,), standardize=True)
    family = EnergyModel((1,), energy=DenseEnergy((4,)), base=base, negatives=Persistent(4, steps=1)).to(dtype).eval()
    torch.set_default_dtype(dtype)
    log_partition(family)
    assert family().density == "exact"
    CHANGES[name](family)
    assert family().density == "unnormalized"


def test_log_z_is_forgotten_with_another_precision():
    family = EnergyModel((1,), energy=DenseEnergy((4,)), sampler=None).float()
    log_partition(family)
    family.double()
    assert family().density == "unnormalized"


@by_name(COPIES)
@pytest.mark.parametrize("change", ["data of a parameter", "in place", "another storage"])
def test_a_copy_forgets_log_z_by_itself(name, change, tmp_path):
    family = shifting()
    log_partition(family)
    new = COPIES[name](family, tmp_path)
    CHANGES[change](new)
    assert new().density == "unnormalized"
    assert family().density == "exact"
    CHANGES[change](family)
    assert family().density == "unnormalized"


def test_fingerprints_are_computed_once_after_a_copy_and_not_at_every_density(monkeypatch):
    family, calls = shifting(), []
    count = lambda tensors: calls.append(1) or fingerprint(tensors)  # noqa: E731
    monkeypatch.setattr(import_module("pyro_genmodels.distributions.energy.state"), "fingerprint", count)
    log_partition(family)
    assert len(calls) == 1
    for fn in (family, copy.deepcopy(family)):
        for _ in range(3):
            assert fn().density == "exact"
            fn().unnormalized_log_prob(torch.zeros(2, 1))
    assert len(calls) == 2


@by_name({"frequencies": None, "the centre": None})
def test_log_z_of_discrete_data_is_forgotten_with(name):
    family, states, _ = SYSTEMS["restricted, zeros and ones"]()
    log_partition(family)
    family.standardize(states[4:]) if name == "frequencies" else family.energy.centre.add_(0.1)
    assert family().density == "unnormalized"


def test_log_z_is_kept_by_a_fixed_base_distribution_and_forgotten_with_it():
    family = EnergyModel((1,), base=dist.Normal(torch.zeros(1), 1.0).to_event(1))
    log_partition(family)
    assert family().density == "exact"
    family.base = dist.Normal(torch.zeros(1), 2.0).to_event(1)
    assert family().density == "unnormalized"


@by_name({k: v for k, v in COPIES.items() if k != "float and double"})
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "estimate"])
def test_log_z_is_kept_with_the_parameters(name, exact, tmp_path):
    family = shifting()
    found = log_partition(family) if exact else LogPartition(torch.tensor(1.5), torch.tensor(0.25), "estimate", num_chains=9)
    family().remember_log_partition(found)
    known = COPIES[name](family, tmp_path)().log_partition
    assert (known.value, known.std_error, known.kind, known.num_chains) == (
        found.value, found.std_error, found.kind, found.num_chains,
    )  # fmt: skip


def test_log_z_that_is_given_stays_whatever_becomes_of_the_parameters():
    family, states, _ = CONDITIONAL["restricted, zeros and ones"]()
    context = torch.randn(4, 2)
    fn = family(context)
    known = fn.normalized(log_partition(fn))
    assert (fn.density, known.density, family(context).density) == ("unnormalized", "exact", "unnormalized")
    with torch.no_grad():
        torch.testing.assert_close(known.log_prob(states[:, None]).exp().sum(0), torch.ones(4))
    perturb(family)
    assert known.density == "exact"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_fingerprint_sees_order_sign_and_tensor(dtype):
    a, b = torch.randn(2, 6, dtype=dtype)
    others = [[b, a], [a.flip(0), b], [-a, b], [-a, -b], [a.roll(1), b], [torch.cat([-a[:2], a[2:]]), b], [a, b, a]]
    found = [fingerprint(tensors).item() for tensors in [[a, b], *others]]
    assert len(set(found)) == len(found)
    assert fingerprint([a.clone(), b.clone()]).item() == found[0]


# From below, by annealing backwards from the data.


def machine():
    family, states, _ = SYSTEMS["restricted, zeros and ones"]()
    fn = fixed(family, 2.0)()
    return fn, exact_draws(fn, states, 3000), lambda x: exact_log_prob(fn, x, states)


def of_classes():
    family, states, _ = SYSTEMS["dense, classes"]()
    fn = fixed(family, 2.0)()
    return fn, exact_draws(fn, states, 3000), lambda x: exact_log_prob(fn, x, states)


def normal():
    """Of the line, in units other than those of chains: N(5, 0.01), from a start at N(5.1, 0.04)."""
    coordinates = torch.distributions.AffineTransform(torch.tensor([5.1]), torch.tensor([0.2]), event_dim=1)
    exact = dist.Normal(torch.tensor([5.0]), 0.1).to_event(1)
    fn = flat(lambda x: 50 * (x - 5.0).square().sum(-1), path=PathOptions(coordinates=coordinates), sampler=Langevin(0.1))
    return fn, exact.sample((3000,)), exact.log_prob


BELOW = {"a machine": machine, "classes": of_classes, "a normal": normal}


def gaps(of, steps, n, num_samples=1):
    """Of n data from the model: by how much the bound lies below their exact log densities."""
    fn, x, exact = of()
    found = conservative_log_likelihood(observing(fn), x[:n], num_samples=num_samples, num_steps=steps)
    assert found.kind == "lower bound"
    assert found.values.shape == found.std_error.shape == (n,)
    assert bool(found.std_error.isnan().all()) == (num_samples == 1)
    return exact(x[:n]).detach() - found.values


def observing(fn):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", fn, obs=x)

    return model, lambda x: None


@by_name(BELOW)
def test_the_conservative_bound_lies_below_in_the_mean_and_closes_as_steps_are_added(name):
    """One-sided, by six standard errors: a false alarm in 1e9."""
    short, long = gaps(BELOW[name], 3, 3000), gaps(BELOW[name], 300, 300)
    assert short.mean() > 6 * short.std() / len(short) ** 0.5
    assert abs(long.mean()) < 0.02 + 6 * long.std() / len(long) ** 0.5
    assert long.mean() + 6 * long.std() / len(long) ** 0.5 < short.mean()


@by_name(BELOW)
def test_the_conservative_bound_closes_as_draws_are_averaged(name):
    """By six standard errors of the difference: a false alarm in 1e9."""
    one, many = gaps(BELOW[name], 3, 3000), gaps(BELOW[name], 3, 3000, num_samples=10)
    assert one.mean() - many.mean() > 6 * ((one.var() + many.var()) / 3000) ** 0.5
    assert many.mean() > -6 * many.std() / 3000**0.5


def test_the_conservative_bound_of_a_conditional_energy_is_that_of_each_row():
    """Within six standard errors of the log density, which so long a path comes near to: a false alarm in 1e8."""
    family, states, _ = CONDITIONAL["restricted, zeros and ones"]()
    context, x = torch.randn(5, 2), states[torch.randint(len(states), (5,))]
    found = conservative_log_likelihood(family, x, context, num_samples=300, num_steps=100, batch_size=700)
    with torch.no_grad():
        exact = exact_log_prob(family(context), x, states)
    assert ((found.values - exact).abs() < 6 * found.std_error + 0.02).all()


def two_sites(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", EnergyModel((1,))(), obs=x)
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=x.squeeze(-1))


@pytest.mark.parametrize(
    ("fit", "options"),
    [
        (lambda: Flow((1,)), {}),
        (lambda: VAE((1,), prior=EnergyModel((1,))), {}),
        (lambda: (two_sites, lambda x: None), {}),
        (lambda: EnergyModel((1,)), {"num_samples": 0}),
        (lambda: EnergyModel((1,)), {"num_steps": 0}),
        (lambda: EnergyModel((1,)), {"batch_size": 0}),
        (lambda: EnergyModel((1,), sampler=None), {}),
    ],
    ids=["no energy", "a latent variable", "two sites", "no samples", "no steps", "no batch", "no sampler"],
)
def test_what_has_no_conservative_bound_is_refused(fit, options):
    with pytest.raises(ValueError, match=r"Use log_likelihood|of 1 or more|no sampler"):
        conservative_log_likelihood(fit(), torch.zeros(3, 1), **options)


# Likelihoods.


@by_name(SYSTEMS)
def test_the_likelihood_is_exact_where_log_z_is(name):
    family, states, volume = SYSTEMS[name]()
    x = exact_draws(family(), states, 7)
    found = log_likelihood(family, x)
    assert (found.kind, found.num_samples, found.log_partition.kind) == ("exact", 1, "exact")
    assert (found.std_error == 0).all()
    torch.testing.assert_close(found.values, exact_log_prob(family(), x, states, volume).detach(), rtol=0, atol=1e-3)
    assert family().density == "exact"


def test_the_likelihood_is_an_estimate_where_log_z_is_and_its_error_counts_once():
    family, x = perturb(EnergyModel((4,), energy=DenseEnergy((6,)))), torch.randn(9, 4)
    found = log_likelihood(family, x, num_samples=50, num_steps=20)
    log_p, known = family().unnormalized_log_prob(x).detach(), found.log_partition
    assert (found.kind, found.num_samples, known.num_chains, known.num_steps) == ("estimate", 50, 50, 20)
    torch.testing.assert_close(found.values, log_p - known.value)
    torch.testing.assert_close(found.std_error, known.std_error.expand(9))
    assert found.mean_std_error == pytest.approx((log_p.var() / 9 + known.std_error**2).sqrt().item())
    assert family().log_partition.value == known.value


def test_the_likelihood_is_unreliable_where_log_z_is():
    family = EnergyModel((10,), energy=DenseEnergy((6,)))
    for p in family.parameters():
        p.data.mul_(100)
    with pytest.warns(RuntimeWarning, match="few chains carry"):
        assert log_likelihood(family, torch.randn(3, 10), num_samples=100, num_steps=1).kind == "unreliable"


@by_name(["restricted, zeros and ones", "dense, the line"])
def test_the_likelihood_of_a_conditional_energy_is_that_of_each_row(name):
    """Estimates within six standard errors: a false alarm in 1e8."""
    family, states, volume = CONDITIONAL[name]()
    context, x = torch.randn(6, 2), states[torch.randint(len(states), (6,))]
    with torch.no_grad():
        exact = exact_log_prob(family(context), x, states, volume)
    found = log_likelihood(family, x, context, batch_size=4)
    assert found.kind == "exact"
    torch.testing.assert_close(found.values, exact, rtol=0, atol=1e-3)


def test_the_likelihood_of_a_conditional_energy_has_an_error_for_each_row():
    """Within six standard errors: a false alarm in 1e8."""
    fn = lambda context: Energy(lambda x, c: 2 * (x - c).square().sum(-1), (3,), context=context, sampler=Langevin())  # noqa: E731

    def model(x, context):
        with pyro.plate("data", len(x)):
            pyro.sample("x", fn(context), obs=x)

    context, x = torch.randn(6, 3), torch.randn(6, 3)
    found = log_likelihood((model, lambda x, context: None), x, context, num_samples=300, num_steps=60, batch_size=4)
    exact = dist.Normal(context, 0.5).to_event(1).log_prob(x)
    assert (found.kind, found.log_partition) == ("estimate", None)
    assert len(set(found.std_error.tolist())) > 1
    assert ((found.values - exact).abs() < 6 * found.std_error).all()


def test_what_is_called_exact_is_exact_for_many_contexts_too():
    family, states, _ = CONDITIONAL["restricted, zeros and ones"]()
    context, x = torch.randn(150, 2), states[torch.randint(len(states), (150,))]
    found = log_likelihood(family, x, context, num_samples=20, num_steps=5)
    exact = exact_log_prob(family(context), x, states).detach()
    assert found.kind == "estimate" or torch.allclose(found.values, exact)


def test_the_error_of_log_z_counts_beside_that_of_latent_variables():
    """With the exact posterior as the guide there is no other. Within six standard errors: a false alarm in 1e8."""

    def model(x, context):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Energy(lambda z, c: 2 * (z - c).square().sum(-1), (3,), context=context, sampler=Langevin()))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x, context):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + context) / 2, 0.5 / 2**0.5).to_event(1))

    context, x = torch.randn(6, 3), torch.randn(6, 3)
    found = log_likelihood((model, guide), x, context, num_samples=400, num_steps=20)
    exact = dist.Normal(context, 0.5**0.5).to_event(1).log_prob(x)
    assert found.kind == "estimate"
    assert ((found.values - exact).abs() < 6 * found.std_error).all()


def test_masks_count_in_the_likelihood_and_scales_do_not():
    family, states, _ = SYSTEMS["restricted, zeros and ones"]()
    x, keep = states[:4], torch.tensor([True, False, True, True])

    def model(x, keep):
        with pyro.plate("data", len(x)), poutine.scale(scale=3.0), poutine.mask(mask=keep):
            pyro.sample("x", family(), obs=x)

    found = log_likelihood((model, lambda x, keep: None), x, keep)
    torch.testing.assert_close(found.values, keep * exact_log_prob(family(), x, states).detach())


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "estimate"])
def test_as_the_prior_of_a_latent_variable_its_log_z_is_in_the_likelihood(exact, monkeypatch):
    """Within six standard errors: a false alarm in 1e8."""
    family, z, volume = SYSTEMS["dense, the line"]()
    y = torch.tensor([[1.0], [-0.5]])

    def guide(family, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 1.0).to_event(1))

    if not exact:
        module = import_module("pyro_genmodels.distributions.energy.partition")
        monkeypatch.setattr(module, "exact_log_partition", lambda *_, **__: None)
    found = log_likelihood((lambda y: latent(family, y), lambda y: guide(family, y)), y, num_samples=4000, num_steps=50)
    with torch.no_grad():
        joint = exact_log_prob(family(), z, z, volume)[:, None] + dist.Normal(y.T, 0.7).log_prob(z)
    assert found.kind == ("lower bound" if exact else "estimate")
    assert ((found.values - joint.logsumexp(0) - log(volume)).abs() < 6 * found.std_error).all()


def test_as_the_prior_of_a_vae_its_log_z_is_in_the_likelihood():
    """Within six standard errors: a false alarm in 1e8."""
    prior, z, volume = SYSTEMS["dense, the line"]()
    vae = VAE(
        (2,), prior=prior, decoder=nn.Linear(1, 2), likelihood=NormalLikelihood(scale=0.8), hidden=(4,), standardize=False
    ).eval()
    x = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
    found = log_likelihood(vae, x, num_samples=5000)
    with torch.no_grad():
        of_x = dist.Normal(vae.decoder(z)[:, None], 0.8).to_event(1).log_prob(x)
        exact = (exact_log_prob(prior(), z, z, volume)[:, None] + of_x).logsumexp(0) + log(volume)
    assert found.kind == "lower bound"
    assert ((found.values - exact).abs() < 6 * found.std_error).all()


@of_few_chains
def test_compare_takes_energies_and_says_of_which_kind_they_are():
    family, states, _ = SYSTEMS["restricted, zeros and ones"]()
    x = exact_draws(family(), states, 30)
    other = EnergyModel((3,), support=BINARY, energy=DenseEnergy((4,)))
    table = compare({"machine": family, "below": conservative_log_likelihood(family, x, num_steps=20), "dense": other}, x).table
    assert dict(table["kind"]) == {"machine": "exact", "below": "lower bound", "dense": "exact"}
    wanted = exact_log_prob(family(), x, states).sum().item()
    assert table["elpd"]["machine"] == pytest.approx(wanted, abs=1e-6)


# What an estimate is made by, and what it is made of.


def test_uncorrected_langevin_is_corrected_where_weights_rest_on_it():
    d = Energy(lambda x: 12.5 * x.square().sum(-1), (5,), sampler=Langevin(0.05, adjusted=False))
    truth = 2.5 * log(2 * pi / 25)
    estimates = [log_partition(d, exact=False, num_chains=200, num_steps=200) for _ in range(4)]
    assert all(abs(z.value - truth) < 6 * z.std_error for z in estimates)  # false alarms: 1e-8
    x = torch.randn(400, 5) / 5
    below = conservative_log_likelihood(observing(d), x, num_steps=200).values
    gap = below - dist.Normal(0.0, 0.2).log_prob(x).sum(-1)
    assert gap.mean() < 5 * gap.std() / 20  # false alarms: 3e-7


def test_directions_that_say_nothing_do_not_agree():
    d = Energy(lambda x: 0.5 * x.square().sum(-1), (3,))
    start = dist.Uniform(-torch.ones(3), torch.ones(3)).to_event(1)
    with pytest.warns(RuntimeWarning, match="backwards"):
        found = log_partition(d, start=start, draws=torch.randn(100, 3), num_steps=50)
    assert found.kind == "unreliable"
    for draws in (torch.randn(1, 3), [[0.0, 0.0, 0.0]]):
        with pytest.raises(ValueError, match="two or more exact draws"):
            log_partition(d, draws=draws)


def test_walls_weigh_nothing_from_whatever_start():
    box = Energy(lambda x: torch.where(x.abs().amax(-1) > 1, torch.inf, 0.0), (3,))
    start = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    found = log_partition(box, start=start, num_chains=2000, num_steps=100)
    assert abs(found.value - 3 * log(2)) < 6 * found.std_error  # false alarms: 2e-9


def test_a_start_does_not_stand_in_the_way_of_a_sum():
    machine = perturb(EnergyModel((30,), energy=RestrictedBoltzmannMachine(3), support=BINARY))
    start = dist.Bernoulli(torch.full((30,), 0.5)).to_event(1)
    assert log_partition(machine, start=start).kind == "exact"


def test_an_integral_that_does_not_stand_still_is_an_estimate_with_its_difference_as_error():
    step = Energy(lambda x: torch.where(x.abs().amax(-1) > 0.7654, torch.inf, 0.0), (2,))
    found = log_partition(step, exact=True)
    assert found.kind == "estimate"
    assert 0 < found.std_error < 0.1
    assert abs(found.value - 2 * log(2 * 0.7654)) < 3 * found.std_error


# Errors of log Z in likelihoods.


def four(**options):
    """A family over four numbers, whose log Z is out of reach."""
    return perturb(EnergyModel((4,), energy=DenseEnergy((4,)), **options))


def test_a_careful_estimate_is_used_and_not_displaced():
    family = four()
    careful = log_partition(family, exact=False, num_chains=64, num_steps=50)
    found = log_likelihood(family, torch.randn(5, 4), num_samples=10, num_steps=10)
    assert found.log_partition.value == careful.value
    log_partition(family, exact=False, num_chains=4, num_steps=5)
    assert family().log_partition.value == careful.value


@of_few_chains
def test_a_row_in_which_an_energy_stands_often_has_its_error_as_often():
    family, times = four(), 10

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("times", times, dim=-1):
            pyro.sample("x", family(), obs=x)

    found = log_likelihood((model, lambda x: None), torch.randn(6, times, 4), num_samples=8, num_steps=20)
    error = times * found.log_partition.std_error
    torch.testing.assert_close(found.std_error, error.expand(6))
    assert found.shared_error == pytest.approx(error.item())


@of_few_chains
def test_rows_of_one_label_share_its_error_and_each_label_is_estimated_once(monkeypatch):
    family = four(context=Labels(2))
    calls = []
    module = import_module("pyro_genmodels.evaluation.log_z")
    monkeypatch.setattr(module, "log_partition", lambda d, **kw: calls.append(len(d.context)) or log_partition(d, **kw))
    labels = (torch.arange(40) >= 30).long()
    found = log_likelihood(family, torch.randn(40, 4), labels, num_samples=8, num_steps=20, batch_size=7)
    assert sum(calls) == 2
    zero, one = found.std_error[0], found.std_error[-1]
    torch.testing.assert_close(found.std_error, torch.where(labels == 0, zero, one))
    assert found.shared_error == pytest.approx(((0.75 * zero).square() + (0.25 * one).square()).sqrt().item())


@of_few_chains
def test_two_energies_have_both_errors():
    a, b = four(), four()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", a(), obs=x)
            pyro.sample("y", b(), obs=x)

    found = log_likelihood((model, lambda x: None), torch.randn(6, 4), num_samples=8, num_steps=20)
    both = (a().log_partition.std_error.square() + b().log_partition.std_error.square()).sqrt()
    assert found.log_partition is None
    assert found.shared_error == pytest.approx(both.item())
    torch.testing.assert_close(found.std_error, both.expand(6))


def test_an_energy_in_the_guide_has_a_constant_of_its_own():
    prior, posterior = (EnergyModel((1,), energy=Square(scale), standardize=False) for scale in (1.0, 3.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior())

    x = torch.tensor([[0.1], [0.4]])
    found = log_likelihood((model, guide), x, num_samples=1000)
    truth = dist.Normal(0.0, 2**0.5).log_prob(x[:, 0])
    assert ((found.values - truth).abs() < 6 * found.std_error + 1e-3).all()  # false alarms: 4e-9


class Square(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return 0.5 * self.scale * x.square().sum(-1)
