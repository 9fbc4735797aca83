"""Networks of autoregressive models: what each output sees, samples with cached state, orders, completed events, sequences."""

from functools import partial
from itertools import permutations
from math import log

import pyro
import pytest
import torch
from marks import slow_unless
from pyro.infer import SVI
from pyro.optim import Adam
from scipy.stats import chi2
from teachers import assert_means, outcomes, perturb
from torch.testing import assert_close

from pyro_genmodels import (
    Autoregressive,
    BernoulliLikelihood,
    CategoricalLikelihood,
    CompiledSVI,
    DiscretizedLogisticLikelihood,
    Labels,
    MaximumLikelihood,
    Mixed,
    NormalLikelihood,
    train,
)
from pyro_genmodels.distributions.sequences import EndedSequences
from pyro_genmodels.distributions.tempered import Tempered
from pyro_genmodels.families import LogNormalLikelihood, PixelCNN, PoissonLikelihood, Transformer
from pyro_genmodels.infer.compiled import Captured
from pyro_genmodels.nn.transformer import _RotaryPositions, _rotated

pytestmark = pytest.mark.usefixtures("float64")

BITS = BernoulliLikelihood()
NETWORKS = {
    "learned positions": ((6,), Transformer(2, 16, 2)),
    "rotary positions": ((2, 3), Transformer(2, 16, 2, positions="rotary")),
    "PixelCNN": ((2, 3), PixelCNN(2, 8, 3)),
    "PixelCNN, colours": ((3, 2, 1), PixelCNN(2, 9, 5)),
}
WIDE = {
    "transformer": ((3, 4), Transformer(2, 12, 2, positions="rotary")),
    "PixelCNN": ((5, 5), PixelCNN(4, 6, 3)),
    "PixelCNN, colours": ((3, 3, 4), PixelCNN(3, 18, 3)),
}
"""Networks, whose reach is the whole event."""


def model(name, likelihood=BITS, networks=NETWORKS, **options):
    event_shape, network = networks[name]
    family = Autoregressive(event_shape, likelihood=likelihood, network=network, standardize_context=False, **options)
    return perturb(family, 0.2).eval()


def bits(n=6):
    return outcomes(2, n).double()


def any_order(d=3, likelihood=BITS, **options):
    return perturb(Autoregressive((d,), likelihood=likelihood, network=Transformer(1, 16, 2), order="any", **options))


def assert_frequencies(counts, probabilities, alarm=1e-7):
    """Compare counts of outcomes with their probabilities, by a chi-squared test with that rate of false alarms."""
    expected = counts.sum() * probabilities
    rare = expected < 5
    counts, expected = (torch.cat([t[~rare], t[rare].sum()[None]]) for t in (counts, expected))
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    assert statistic < chi2.isf(alarm, max(1, len(counts) - 1))


def cells(x):
    """Return the number of each row of bits among `outcomes(2, d)`."""
    x = x.flatten(-1) if x.dim() == 2 else x.flatten(1)
    return (x.long() * 2 ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)


# Densities.


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_outcomes_sum_to_one(name, context):
    family = model(name, context=context)
    c = torch.randn(3, 1, context) if context else None
    total = family(c).log_prob(bits().reshape(64, *family.event_shape)).logsumexp(-1)
    assert_close(total, torch.zeros(3 if context else ()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WIDE)
def test_an_output_depends_on_all_inputs_before_it_and_on_no_other(name):
    """A plain PixelCNN has a blind spot: pixels above to the right that no output sees."""
    family = model(name, networks=WIDE)
    d = family.event_shape.numel()
    jacobian = torch.autograd.functional.jacobian(lambda x: family.conditionals(x, None, family.order), torch.randn(d, 1))
    jacobian = jacobian[:, 0, :, 0].abs()
    before = torch.ones(d, d).tril(-1).bool()
    assert not jacobian[~before].any()
    assert (jacobian[before] > 0).all()


@pytest.mark.parametrize("name", [*NETWORKS, "masked"])
def test_coordinates_are_nearly_independent_at_the_start(name):
    """Multi-information, exactly: at most 0.03 nats of the 4.2 that six bits have."""
    event_shape, network = NETWORKS.get(name, ((6,), None))
    family = Autoregressive(event_shape, likelihood=BITS, network=network)
    x = bits()
    log_p = family().log_prob(x.reshape(64, *event_shape))
    p = log_p.exp()
    on = (p[:, None] * x).sum(0)
    independent = (x * on.log() + (1 - x) * (1 - on).log()).sum(1)
    if network is not None:
        assert (p * (log_p - independent)).sum() < 0.03


def test_a_gradient_of_the_data_changes_no_value_and_has_a_derivative():
    family = perturb(Autoregressive((4,), network=Transformer(2, 16, 2), standardize=False))
    x = torch.randn(5, 4)
    assert_close(family().log_prob(x.clone().requires_grad_()), family().log_prob(x), rtol=0, atol=1e-12)
    assert_close(torch.vmap(lambda y: family()._log_prob(y, None))(x), family().log_prob(x), rtol=0, atol=1e-12)
    y = x.clone().requires_grad_()
    score = family().score(y)
    (slope,) = torch.autograd.grad(score.sum(), y)
    step = 1e-5 * torch.ones(4)
    assert_close(slope, (family().score(x + step) - family().score(x - step)) / 2e-5, rtol=1e-5, atol=1e-6)


def test_rotary_attention_depends_on_distances_alone():
    positions = _RotaryPositions(torch.Size((5, 6)), 4)
    place = torch.arange(30).reshape(5, 6)
    q, k = torch.randn(2, 1, 1, 1, 9).unbind(0)

    def product(target, source):
        turns = positions.rotations(place[source].reshape(1), place[target].reshape(1))
        return (_rotated(q, turns[0]) * _rotated(k, turns[1])).sum()

    for shift in ((1, 0), (0, 2), (2, 3)):
        moved = [tuple(a + b for a, b in zip(where, shift, strict=True)) for where in ((2, 1), (0, 2))]
        assert_close(product(*moved), product((2, 1), (0, 2)), rtol=1e-5, atol=1e-5)
    assert (product((2, 1), (0, 2)) - product((1, 1), (0, 2))).abs() > 1e-3


# Samples.


def drawn_without_state(d, shape, context=None):
    """Return samples by one pass of the network over all coordinates for each."""
    features, values = d.order.numel(), []
    inputs = torch.zeros(*shape, features, d.likelihood.num_inputs)
    for place in range(features):
        params = d.conditionals(inputs, context, d.order)[..., place, :]
        conditional = d.likelihood.at(d.order[place])(params)
        values.append(conditional.rsample() if conditional.has_rsample else conditional.sample())
        inputs = inputs.clone()
        inputs[..., place, :] = d.likelihood.encode(values[-1])
    return d.unflat(torch.stack(values, -1)[..., d.order.argsort()])


@pytest.mark.parametrize("likelihood", [BITS, CategoricalLikelihood(3)], ids=["bits", "classes"])
@pytest.mark.parametrize("name", NETWORKS)
def test_samples_are_those_of_a_network_without_cached_state(name, likelihood):
    family = model(name, likelihood, context=2)
    c = torch.randn(4, 2)
    pyro.set_rng_seed(1)
    found = family(c).sample((3,))
    pyro.set_rng_seed(1)
    with torch.no_grad():
        assert found.equal(drawn_without_state(family(c), (3, 4), c.expand(3, 4, 2)))


@pytest.mark.parametrize("name", ["rotary positions", "PixelCNN, colours"])
def test_samples_with_gradients_are_those_of_a_network_without_cached_state(name):
    family = model(name, NormalLikelihood(), standardize=False)
    results = []
    for draw in (family().rsample, lambda shape: drawn_without_state(family(), shape)):
        pyro.set_rng_seed(1)
        x = draw((4,))
        results.append([x, *torch.autograd.grad(x.square().sum(), list(family.conditionals.parameters()))])
    assert_close(*results)


@pytest.mark.parametrize("name", slow_unless(["rotary positions", "PixelCNN, colours"], NETWORKS))
def test_frequencies_of_samples_are_the_density(name):
    family = model(name)
    counts = cells(family().sample((8000,))).bincount(minlength=64)
    assert_frequencies(counts, family().log_prob(bits().reshape(64, *family.event_shape)).exp())


def test_samples_with_dropout_are_refused():
    family = Autoregressive((2, 2), likelihood=BITS, network=PixelCNN(1, 4, 3, dropout=0.5))
    with pytest.raises(ValueError, match="cannot be sampled while its dropout is active"):
        family().sample()
    with pytest.raises(ValueError, match="cannot be sampled while its dropout is active"):
        family().complete(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert family.eval()().sample().shape == (2, 2)


# Orders.


def test_each_order_has_a_density_of_its_own():
    family = any_order().eval()
    x = bits(3)
    tables = torch.stack([family().in_order(order).log_prob(x) for order in permutations(range(3))])
    assert_close(tables.logsumexp(1), torch.zeros(6), rtol=0, atol=1e-12)
    assert (tables.std(0) > 1e-3).any()
    assert_close(tables[0], family().log_prob(x))


def test_training_draws_every_order_equally_often():
    """Right value: the mean over all six orders. False-alarm rate 1e-7 for each of four data."""
    family, x = any_order(), bits(3)[[0, 3, 5, 6]]
    exact = torch.stack([family().in_order(order).log_prob(x) for order in permutations(range(3))]).mean(0)
    with torch.no_grad():
        assert_means(family().training_log_prob(x.expand(5000, 4, 3)), exact)
    family.eval()
    assert family().training_log_prob(x).equal(family().log_prob(x))


def test_an_order_of_the_family_is_that_of_the_network_of_any_order():
    order = [2, 0, 1]
    one = Autoregressive((3,), likelihood=BITS, network=Transformer(1, 16, 2), order=order)
    every = any_order()
    one.conditionals = every.conditionals
    assert one().log_prob(bits(3)).equal(every().in_order(order).log_prob(bits(3)))


@pytest.mark.parametrize("known", outcomes(2, 3)[:-1].bool().tolist(), ids=str)
def test_a_completed_event_is_a_sample_given_what_is_known(known):
    """Right frequencies: the table of the density in an order that begins with what is known."""
    known, d = torch.tensor(known), any_order().eval()()
    order = sorted(range(3), key=lambda i: not known[i])
    x, all_x = torch.tensor([1.0, 0.0, 1.0]), bits(3)
    found = d.complete(x.where(known, torch.nan).expand(5000, 3), known)
    assert (found[:, known] == x[known]).all()
    agrees = (all_x[:, known] == x[known]).all(1)
    p = d.in_order(order).log_prob(all_x).exp() * agrees
    assert_frequencies(cells(found).bincount(minlength=8), p / p.sum())


@pytest.mark.parametrize("name", ["learned positions", "PixelCNN", "masked"])
def test_an_event_is_completed_in_the_order_of_the_family(name):
    event_shape, network = NETWORKS.get(name, ((6,), None))
    family = perturb(Autoregressive(event_shape, likelihood=BITS, network=network, context=Labels(2))).eval()
    d, known = family(torch.tensor(1)), torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    found = d.complete(x.expand(5000, 6).reshape(-1, *event_shape), known.reshape(event_shape)).reshape(-1, 6)
    agrees = (bits()[:, :4] == x[:4]).all(1)
    p = d.log_prob(bits().reshape(64, *event_shape)).exp() * agrees
    assert_frequencies(cells(found).bincount(minlength=64), p / p.sum())


def test_rows_are_completed_each_by_its_own_order():
    d = any_order(likelihood=NormalLikelihood(scale=1e-6)).eval()()
    x, known = torch.randn(7, 3), outcomes(2, 3)[1:].bool()
    found = d.complete(x, known)
    assert (found == x).equal(known)
    for row, flags, full in zip(x, known, found, strict=True):  # with so small a scale, a sample is the mean
        assert_close(d.complete(row, flags), full, rtol=0, atol=1e-4)


def test_known_values_stay_as_they_are_in_the_units_of_the_data():
    family = any_order(likelihood=NormalLikelihood(), standardize=True)
    family.standardize(1e6 + 1e3 * torch.randn(50, 3))
    x = torch.tensor([1e6 + 0.1, torch.nan, 1e6 - 0.3])
    found = family.eval()().complete(x, ~x.isnan())
    assert found[[0, 2]].equal(x[[0, 2]])
    assert (found[1] - 1e6).abs() < 1e5


@pytest.mark.parametrize("order", ["any", None])
def test_columns_of_different_kinds_are_completed(order):
    kinds = [NormalLikelihood(), BITS, CategoricalLikelihood(3), LogNormalLikelihood(), PoissonLikelihood()]
    family = Autoregressive((5,), likelihood=Mixed(kinds), network=Transformer(1, 16, 2), order=order).eval()
    known = outcomes(2, 5).bool() if order else torch.ones(6, 5).tril(-1).bool()
    x = torch.tensor([0.5, 1.0, 2.0, 0.1, 7.0]).expand(len(known), 5)
    u = torch.rand(50, 5)
    family.standardize(torch.stack([u[:, 0], u[:, 1].round(), u[:, 2].round(), u[:, 3] + 0.1, (9 * u[:, 4]).round()], 1))
    found = family().complete(x.where(known, torch.nan), known)
    assert ((found == x) | ~known).all()
    assert family().log_prob(found).isfinite().all()


def test_what_cannot_be_completed_is_refused():
    family = Autoregressive((3,), likelihood=BITS, order=[2, 0, 1], hidden=(8,))
    x = torch.zeros(3)
    family().complete(x, torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match=r'samples coordinate 2 .* before coordinate 0, which is\..*order="any"'):
        family().complete(x, torch.tensor([True, False, False]))
    with pytest.raises(
        ValueError, match=r"known wants truth values .* shape \(3,\), but found torch.int64.*known=~x.isnan\(\)"
    ):
        family().complete(x, torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match=r"event shape \(3,\), but found torch.bool of shape \(2,\)"):
        family().complete(x, torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"with 1 NaN or infinite entries"):
        family().complete(torch.tensor([0.0, 0.0, torch.nan]), torch.tensor([False, False, True]))
    with pytest.raises(ValueError, match=r"within the support"):
        family().complete(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([False, False, True]))
    with pytest.raises(ValueError, match=r"wants values whose shape ends with its event shape \(3,\)"):
        family().complete(torch.zeros(4), torch.tensor([True, False, False]))
    with pytest.raises(ValueError, match=r'has one order. Build the family with network=Transformer.*order="any"'):
        family().in_order([0, 1, 2])
    with pytest.raises(ValueError, match=r"in_order wants a permutation of 0 .. 2, but found \[0, 1, 1\]"):
        any_order()().in_order([0, 1, 1])


# A temperature, and the likeliest values.


@pytest.mark.parametrize(
    ("temperature", "top_p", "wanted"),
    [
        (1.0, 1.0, [0.1, 0.5, 0.05, 0.35]),
        (0.5, 1.0, [0.01 / 0.385, 0.25 / 0.385, 0.0025 / 0.385, 0.1225 / 0.385]),
        (1.0, 0.8, [0.0, 0.5 / 0.85, 0.0, 0.35 / 0.85]),
        (1.0, 0.9, [0.1 / 0.95, 0.5 / 0.95, 0.0, 0.35 / 0.95]),
        (1.0, 0.1, [0.0, 1.0, 0.0, 0.0]),
        (1e-3, 1.0, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_a_temperature_and_top_p_by_hand(temperature, top_p, wanted):
    params = torch.tensor([0.1, 0.5, 0.05, 0.35]).log()
    found = Tempered(CategoricalLikelihood(4), temperature, top_p)(params.expand(2, 3, 4))
    assert_close(found.probs, torch.tensor(wanted).expand(2, 3, 4))


def test_without_top_p_the_least_likely_values_are_kept():
    """The masses of the others sum to 1 in single precision, so that a value of probability 1e-13 was dropped."""
    params = torch.tensor([0.0, -1.0, -20.0, -30.0])
    assert_close(Tempered(CategoricalLikelihood(4))(params).logits, params.log_softmax(-1))


def test_a_temperature_of_zeros_and_ones_divides_the_logit():
    found = Tempered(BITS, temperature=0.5)(torch.tensor([[0.7], [-1.3]]))
    assert_close(found.probs[:, 1], torch.tensor([1.4, -2.6]).sigmoid())


@pytest.mark.parametrize(
    ("likelihood", "levels"), [(BITS, 2), (CategoricalLikelihood(3), 3), (DiscretizedLogisticLikelihood(3, 2), 3)], ids=repr
)
def test_a_tempered_density_sums_to_one_and_is_that_of_its_samples(likelihood, levels):
    d = any_order(likelihood=likelihood).eval()().tempered(temperature=0.8, top_p=0.9)
    p = d.log_prob(outcomes(levels, 3).double()).exp()
    assert_close(p.sum(), torch.ones(()))
    draws = d.sample((5000,))
    assert d.support.check(draws).all()
    assert_frequencies((draws.long() * torch.tensor([levels**2, levels, 1])).sum(1).bincount(minlength=levels**3), p)
    completed = d.complete(draws[:5], torch.tensor([True, False, True]))
    assert (completed[:, [0, 2]] == draws[:5, [0, 2]]).all()


def test_a_temperature_of_real_numbers_is_refused():
    made = Autoregressive((2,), hidden=(4,))()
    with pytest.raises(ValueError, match=r"are for classes, zeros and ones, and levels, but found NormalLikelihood"):
        made.tempered(temperature=0.5)
    classes = Autoregressive((2,), likelihood=CategoricalLikelihood(3), hidden=(4,))()
    for wrong in (0.0, -1.0, float("nan"), True, "low"):
        with pytest.raises(ValueError, match="A temperature is a positive number, but found"):
            classes.tempered(temperature=wrong)
    for wrong in (0.0, 1.1, float("nan"), False):
        with pytest.raises(ValueError, match=r"top_p is a number in \(0, 1\], but found"):
            classes.tempered(top_p=wrong)


# Sequences with an end.


def sequences(network=None, length=4, **options):
    network = network or Transformer(1, 16, 2)
    return perturb(Autoregressive((length,), likelihood=CategoricalLikelihood(3), network=network, end=0, **options)).eval()


def test_sequences_of_all_lengths_sum_to_one():
    """With two symbols beside the end, there are 1 + 2 + 4 + 8 that end, and 16 of the largest length."""
    d, x = sequences()(), outcomes(3, 4)
    proper = d.support.check(x)
    assert proper.sum() == 31
    with pyro.validation_enabled(False):
        log_p = sequences()().log_prob(x)
    assert_close(log_p[proper].logsumexp(0), torch.zeros(()), rtol=0, atol=1e-12)
    assert (log_p[~proper] == -torch.inf).all()


def test_samples_of_sequences_end_and_stay_so():
    d = sequences()()
    draws = d.sample((5000,))
    assert d.support.check(draws).all()
    x = outcomes(3, 4)
    proper = d.support.check(x)
    counts = (draws * torch.tensor([27, 9, 3, 1])).sum(1).bincount(minlength=81)[proper]
    assert_frequencies(counts, d.log_prob(x[proper]).exp())


def test_a_sample_takes_no_steps_after_all_sequences_have_ended(monkeypatch):
    family, steps = sequences(length=50), []
    outputs = family.conditionals._outputs
    monkeypatch.setattr(family.conditionals, "_outputs", lambda *args: steps.append(1) or outputs(*args))
    with torch.no_grad():
        family.conditionals.bias[3:, 0] = 100.0
    draws = family().sample((20,))
    assert (draws[:, 3:] == 0).all()
    assert len(steps) <= 4


def test_what_comes_after_the_end_has_no_gradient():
    family = sequences()
    x = torch.tensor([[1, 0, 0, 0]])
    family().log_prob(x).sum().backward()
    assert (family.conditionals.bias.grad != 0).any(1).tolist() == [True, True, False, False]


def test_a_begun_sequence_is_completed():
    d, known = sequences()(), torch.tensor([True, True, False, False])
    found = d.complete(torch.tensor([[2, 0, 1, 1], [2, 1, 1, 1]]), known)
    assert found[0].tolist() == [2, 0, 0, 0]
    assert found[1, :2].tolist() == [2, 1]
    assert d.support.check(found).all()


def test_a_sequence_that_goes_on_after_its_end_is_refused():
    family = sequences()
    with pytest.raises(ValueError, match="other symbols after the end symbol 0 in 1 of 2 rows, the first of them row 1"):
        family.model(torch.tensor([[1, 1, 2, 0], [1, 0, 2, 0]]))
    with pytest.raises(ValueError, match="within the support"):
        family().log_prob(torch.tensor([1, 0, 2, 0]))
    classes = CategoricalLikelihood(3)
    for options in (
        {"event_shape": (2, 2), "likelihood": classes},
        {"event_shape": (4,), "likelihood": NormalLikelihood()},
        {"event_shape": (4,), "likelihood": classes, "order": [1, 0, 2, 3]},
        {"event_shape": (4,), "likelihood": classes, "order": "any", "network": Transformer(1, 8, 2)},
        {"event_shape": (4,), "likelihood": CategoricalLikelihood(2), "end": 2},
    ):
        with pytest.raises(ValueError, match=r"end=. wants sequences \(length,\) in their own order, .*CategoricalLikelihood"):
            Autoregressive(**{"end": 0, **options})


def test_a_set_of_sequences_is_copied_with_its_family():
    family = sequences().float()
    assert isinstance(family.support, EndedSequences)
    assert family().expand((2,)).sample().shape == (2, 4)


# Training.


@pytest.mark.parametrize("name", slow_unless(["transformer"], ["transformer", "transformer of any order", "PixelCNN"]))
def test_what_only_two_bits_together_tell_is_learned(name):
    """Three bits of which the last is the parity of the others have log 4 nats; independent ones have log 8."""
    network = PixelCNN(2, 16, 5) if name == "PixelCNN" else Transformer(1, 32, 2)
    order = "any" if "any" in name else None
    x = torch.randint(2, (256, 1, 3)).double()
    x[..., 2] = (x[..., 0] + x[..., 1]) % 2
    family = Autoregressive((1, 3), likelihood=BITS, network=network, order=order)
    train(family, x, epochs=40, batch_size=128, optim=partial(torch.optim.Adam, lr=1e-2), progress=False)
    even = bits(3)[bits(3).sum(1) % 2 == 0].unsqueeze(1)
    family.eval()
    assert family().log_prob(even).logsumexp(0) > log(0.9)
    if order == "any":
        known = torch.tensor([[False, True, True]])
        right = family().complete(even.expand(50, 4, 1, 3), known) == even
        assert right.double().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("make", [partial(model, "rotary positions"), any_order, partial(model, "PixelCNN, colours")])
def test_a_captured_step_is_that_of_svi(make):
    family = make().train()
    x = torch.randint(2, (8, *family.event_shape)).double()
    losses = []
    for step in (SVI, partial(CompiledSVI, mode=Captured())):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        again = make().train()
        svi = step(again.model, again.guide, Adam({"lr": 0.01}), MaximumLikelihood())
        pyro.set_rng_seed(1)
        losses.append(torch.tensor([float(svi.step(x)) for _ in range(3)]))
    assert_close(*losses, rtol=1e-5, atol=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transformer(width=30, heads=4), "a width that is a multiple of heads=4, but found 30"),
        (lambda: Transformer(layers=0), "an integer layers of 1 or more, but found 0"),
        (lambda: Transformer(positions="sine"), 'positions="learned" or "rotary", but found \'sine\''),
        (lambda: Transformer(dropout=1.0), "dropout as a number of at least 0 and less than 1"),
        (lambda: PixelCNN(kernel=4), "an odd kernel, such as 5, but found 4"),
        (lambda: PixelCNN(kernel=1), "an integer kernel of 3 or more, but found 1"),
        (
            lambda: Autoregressive((4,), network=PixelCNN()),
            r"images \(h, w\) or \(c, h, w\), but found \(4,\). Use Transformer",
        ),
        (lambda: Autoregressive((3, 2, 2), network=PixelCNN(channels=2)), "one channel for each of the 3 colours"),
        (lambda: Autoregressive((1, 3), network=PixelCNN(), order=[1, 0, 2]), "found another order. Leave order out"),
        (lambda: Autoregressive((1, 3), network=PixelCNN(), order="any"), r'"any" with network=Transformer.*PixelCNN'),
        (lambda: Autoregressive((3,), order="random"), r"found 'random' with MaskedNetwork"),
        (lambda: Autoregressive((3,), network=Transformer(), hidden=(8,)), "hidden, dropout and direct are options of"),
        (lambda: Autoregressive((3,), network=Transformer(), dropout=0.1), "hidden, dropout and direct are options of"),
        (lambda: Autoregressive((3,), network=Transformer(), direct=True), "hidden, dropout and direct are options of"),
        (
            lambda: Autoregressive((2, 2, 2), network=Transformer(2, 8, 2, positions="rotary")),
            "want at least 6 numbers per head, but found width=8 and heads=2",
        ),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_class_in_place_of_a_choice_is_refused():
    with pytest.raises(TypeError, match=r"wants a network such as Transformer.*, but found the class Transformer; call it"):
        Autoregressive((3,), network=Transformer)
