"""Losses between samples and data: recovered parameters, ways of use, unbiased gradients, and errors.

A comparison at six standard errors has a false-alarm rate of 2e-9.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_unless
from pyro import poutine
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch.distributions import constraints

from pyro_genmodels import MAF, VAE, Flow, Labels, MaximumMeanDiscrepancy, SlicedWasserstein, SpreadDivergence, train
from pyro_genmodels.distributions import Dequantized, Implicit
from pyro_genmodels.divergences import (
    EnergyKernel,
    GaussianKernel,
    KullbackLeibler,
    ReverseKullbackLeibler,
    mmd,
    sliced_wasserstein,
)

LOSSES = {
    "mmd": lambda **options: MaximumMeanDiscrepancy(**options),
    "energy": lambda **options: MaximumMeanDiscrepancy(kernel=EnergyKernel(), **options),
    "spread": lambda **options: SpreadDivergence(**options),
    "reverse": lambda **options: SpreadDivergence(f=ReverseKullbackLeibler(), bandwidth=0.5, num_samples=2, **options),
    "wasserstein": lambda **options: SlicedWasserstein(num_projections=10, **options),
}


class Gaussian(PyroModule):
    """A normal model with a location and a scale."""

    def __init__(self, dims=2):
        super().__init__()
        self.loc = PyroParam(torch.zeros(dims))
        self.scale = PyroParam(torch.ones(dims), constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("x", dist.Normal(self.loc, self.scale).to_event(1), obs=x)


def one_row(loss, model, *args):
    return loss.differentiable_loss(model, None, *args) / len(args[0])


# Recovery of parameters.


@pytest.mark.parametrize("name", slow_unless(["mmd", "spread", "wasserstein"], LOSSES))
def test_location_and_scale_are_recovered_by_svi(name):
    """Of 2000 data, whose own mean and deviation are known; the rest is of the last steps."""
    x = torch.tensor([2.0, -1.0]) + torch.tensor([0.5, 1.5]) * torch.randn(2000, 2)
    model = Gaussian()
    svi = SVI(model, lambda x: None, Adam({"lr": 0.05}), loss=LOSSES[name]())
    for _ in range(200):
        svi.step(x[torch.randint(2000, (200,))])
    torch.testing.assert_close(model.loc.detach(), x.mean(0), atol=0.25, rtol=0)
    torch.testing.assert_close(model.scale.detach(), x.std(0), atol=0, rtol=0.25)


@pytest.mark.parametrize("name", slow_unless(["energy", "reverse"], LOSSES))
def test_a_family_is_trained_and_the_reported_loss_is_per_row(name):
    x = 3 + torch.randn(600, 2)
    flow = Flow((2,), transform=MAF(transforms=1, hidden=(8,)))
    fit = train(flow, x[:400], valid=x[400:], objective=LOSSES[name](), epochs=20, batch_size=100, progress=False)
    first, last = fit.history[0], fit.history[-1]
    assert last["train"] < first["train"]
    assert last["valid"] < first["valid"]
    if name in ("spread", "reverse"):
        return
    torch.manual_seed(0)
    drawn = flow().sample((200,))
    truth = {
        "mmd": lambda: mmd(drawn, x[400:]).value,
        "energy": lambda: mmd(drawn, x[400:], kernel=EnergyKernel()).value,
        "spread": lambda **options: SpreadDivergence(**options),
        "reverse": lambda **options: SpreadDivergence(f=ReverseKullbackLeibler(), bandwidth=0.5, num_samples=2, **options),
        "wasserstein": lambda: sliced_wasserstein(drawn, x[400:]).value.square(),
    }[name]()
    assert abs(fit.best["valid"] - truth) < 0.1 * first["valid"] + 0.05


def test_the_weights_of_a_mixture_are_recovered_through_a_discrete_latent():
    """The weight of 4000 data is known to 0.007."""
    x = torch.where(torch.rand(4000) < 0.8, 2.0, -2.0) + 0.5 * torch.randn(4000)

    def model(x):
        logit = pyro.param("logit", torch.tensor(0.0))
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=logit))
            pyro.sample("x", dist.Normal(locs[z.long()], 0.5), obs=x)

    svi = SVI(model, lambda x: None, Adam({"lr": 0.05}), loss=MaximumMeanDiscrepancy())
    for _ in range(250):
        svi.step(x[torch.randint(4000, (200,))])
    assert abs(pyro.param("logit").sigmoid().item() - 0.8) < 0.08
    torch.testing.assert_close(pyro.param("locs").detach(), torch.tensor([-2.0, 2.0]), atol=0.2, rtol=0)


def test_a_simulator_of_ones_own_with_several_sites_and_plates():
    """A walk of three steps that is seen with noise, and a count of its own: no density of what is seen is ever computed."""

    def simulator(seen, count):
        drift = pyro.param("drift", torch.tensor(0.0))
        rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(seen), dim=-2):
            pyro.sample("count", dist.Poisson(rate), obs=count)
            with pyro.plate("steps", 3, dim=-1):
                move = pyro.sample("move", dist.Normal(drift, 0.5))
                pyro.sample("seen", dist.Normal(move.cumsum(-1), 0.1), obs=seen)

    seen, count = (0.7 + 0.5 * torch.randn(500, 3)).cumsum(-1), torch.poisson(torch.full((500, 1), 3.0))
    svi = SVI(simulator, lambda seen, count: None, Adam({"lr": 0.03}), loss=MaximumMeanDiscrepancy(kernel=EnergyKernel()))
    for _ in range(300):
        rows = torch.randint(500, (150,))
        svi.step(seen[rows], count[rows])
    assert abs(pyro.param("drift").item() - 0.7) < 0.1
    assert abs(pyro.param("rate").item() - 3) < 0.5


def test_a_context_is_compared_along_with_the_data():
    """Without it the means of the two labels could be exchanged."""
    labels = torch.randint(2, (600,))
    x = torch.where(labels == 1, 2.0, -2.0)[:, None] + 0.3 * torch.randn(600, 2)
    flow = Flow((2,), transform=MAF(transforms=1, hidden=(8,)), context=Labels(2))
    loss = MaximumMeanDiscrepancy(kernel=EnergyKernel())
    optim = torch.optim.Adam(loss(flow).parameters(), lr=0.02)
    for _ in range(150):
        optim.zero_grad()
        loss(flow)(x[:200], labels[:200]).backward()
        optim.step()
    means = torch.stack([flow(torch.full((500,), k)).sample().mean(0) for k in (0, 1)]).detach()
    torch.testing.assert_close(means, torch.tensor([[-2.0, -2.0], [2.0, 2.0]]), atol=0.5, rtol=0)


# Values and doors.


@pytest.mark.parametrize("vectorize", [False, True])
def test_all_ways_of_use_give_the_same_loss(vectorize):
    model, x = Gaussian(), torch.randn(20, 2)
    kernel = GaussianKernel(1.0)
    loss = MaximumMeanDiscrepancy(kernel=kernel, num_particles=3, vectorize_particles=vectorize)
    loss.loss(model, None, x)  # finds the plates, once
    torch.manual_seed(1)
    first = loss.loss(model, None, x)
    torch.manual_seed(1)
    drawn = torch.cat([model.loc + model.scale * dist.Normal(torch.zeros(20, 2), 1.0).sample() for _ in range(3)])
    assert first == pytest.approx(20 * mmd(drawn, x, kernel=kernel).value.item(), rel=1e-3) or vectorize
    for door in (lambda: loss.loss_and_grads(model, None, x), lambda: loss(model)(x).item()):
        torch.manual_seed(1)
        assert door() == pytest.approx(first, rel=1e-4)


def test_the_plate_of_more_rows_and_a_scale_count():
    flow, x = Flow((2,), transform=MAF(transforms=1, hidden=(4,))), torch.randn(20, 2)
    loss = MaximumMeanDiscrepancy()
    values = []
    for model, size in ((flow.model, None), (flow.model, 60), (poutine.scale(flow.model, scale=3.0), None)):
        torch.manual_seed(1)
        values.append(loss.loss(model, flow.guide, x, size=size))
    assert values[1:] == pytest.approx([3 * values[0]] * 2, rel=1e-4)


@pytest.mark.parametrize("how", ["dist", "poutine"])
def test_masked_values_do_not_matter(how):
    def model(x, present):
        with pyro.plate("data", len(x)), poutine.mask(mask=present if how == "poutine" else torch.ones_like(present)):
            law = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            pyro.sample("x", law.expand([len(x)]).mask(present) if how == "dist" else law, obs=x)

    x, present = torch.randn(30, 2), torch.rand(30) < 0.5
    values = []
    for other in (0.0, 1e3):
        torch.manual_seed(1)
        values.append(
            MaximumMeanDiscrepancy(kernel=GaussianKernel(1.0)).loss(
                model, None, torch.where(present[:, None], x, other), present
            )
        )
    assert values[0] == values[1]


def test_a_vae_is_trained_without_its_guide():
    vae = VAE((2,), latent_dim=1, hidden=(4,))
    loss = MaximumMeanDiscrepancy()(vae)
    loss(torch.randn(20, 2)).backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert all(p.grad is not None for p in vae.decoder.parameters())


def test_one_row_has_loss_zero():
    for made in LOSSES.values():
        assert one_row(made(), Gaussian(), torch.randn(1, 2)) == 0


@pytest.mark.parametrize(("f", "signs"), [(KullbackLeibler(), (1, -1)), (ReverseKullbackLeibler(), (-1, 1))], ids=str)
def test_a_spread_divergence_is_that_of_the_two_mixtures(f, signs, float64):
    """Against the integral over a line; data are p, draws q."""
    x, y, h = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.0, 1.0, 1.5]), 0.8
    z = torch.linspace(-8, 9, 4001)
    p, q = (dist.Normal(c, h).log_prob(z[:, None]).exp().mean(1) for c in (x, y))
    truth = torch.trapezoid((p if signs[0] > 0 else q) * signs[0] * (p / q).log(), z)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Delta(y), obs=x)

    values = torch.stack([one_row(SpreadDivergence(f=f, bandwidth=h, num_samples=1000), model, x) for _ in range(50)])
    assert abs(values.mean() - truth) < 6 * values.std() / 50**0.5


# Gradients.


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_through_samples_is_that_of_finite_differences(name, float64):
    x, loss = torch.randn(12, 2), LOSSES[name](num_particles=2)
    x = x - x.median(0).values
    x = x / (x.norm(dim=1).median() / 2**0.5)  # the gradient is that of the loss in units of this deviation

    def value(loc, scale):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

        torch.manual_seed(5)
        return loss.differentiable_loss(model, None, x)

    assert torch.autograd.gradcheck(
        value, (torch.randn(2, requires_grad=True), torch.rand(2, requires_grad=True)), check_undefined_grad=False
    )


@pytest.mark.parametrize("particles", slow_unless([2], [1, 2]))
@pytest.mark.parametrize("shared", slow_unless([True], [False, True]))
def test_the_score_function_gradient_is_unbiased(particles, shared, float64):
    """Of Bernoulli draws, on their own or by a coin that all rows share, against the closed form; 700 gradients."""
    x, kernel = (torch.rand(6) < 0.3).double()[:, None], GaussianKernel(1.0)
    logit = torch.tensor(0.4, requires_grad=True)

    def model(x):
        coin = pyro.sample("coin", dist.Bernoulli(logits=logit)) if shared else None
        with pyro.plate("data", len(x)):
            law = dist.Bernoulli(logits=logit) if coin is None else dist.Bernoulli(0.2 + 0.5 * coin)
            pyro.sample("x", law.expand([1]).to_event(1), obs=x)

    k = kernel(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]]))

    def likeness(p, q):
        return torch.stack([1 - p, p]) @ k @ torch.stack([1 - q, q])

    weight, chance = logit.sigmoid(), x.mean()
    if not shared:
        truth = likeness(weight, weight) - 2 * likeness(weight, chance)
    else:  # of the pairs some share a coin
        pairs = 1.0 if particles == 1 else 5 / 11
        low, high, mean = torch.tensor(0.2), torch.tensor(0.7), 0.2 + 0.5 * weight
        alike = (1 - weight) * likeness(low, low) + weight * likeness(high, high)
        truth = pairs * alike + (1 - pairs) * likeness(mean, mean) - 2 * likeness(mean, chance)
    (wanted,) = torch.autograd.grad(truth, logit)
    loss = MaximumMeanDiscrepancy(kernel=kernel, num_particles=particles)
    found = torch.stack([torch.autograd.grad(one_row(loss, model, x), logit)[0] for _ in range(700)])
    assert abs(found.mean() - wanted) < 6 * found.std() / 700**0.5


# What is refused.


def by(law, x, loss):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law(), obs=x)

    return one_row(loss, model, x)


@pytest.mark.parametrize("name", ["wasserstein", "spread"])
def test_samples_without_gradient_are_refused(name):
    rate = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"'x' holds Poisson.*MaximumMeanDiscrepancy.*Adversarial"):
        by(lambda: dist.Poisson(rate), torch.ones(5), LOSSES[name]())
    by(lambda: dist.Poisson(torch.tensor(2.0)), torch.ones(5), LOSSES[name]())  # depends on nothing
    with torch.no_grad():
        by(lambda: dist.Poisson(rate), torch.ones(5), LOSSES[name]())


@pytest.mark.parametrize("name", LOSSES)
def test_samples_without_gradient_and_density_are_refused(name):
    def law():
        return Implicit(dist.Normal(0.0, 1.0), lambda z, c: dist.Normal(z, 1.0), ())

    with pytest.raises(ValueError, match=r"'x' holds Implicit.*whose density is: none.*reparametrised"):
        by(law, torch.ones(5), LOSSES[name]())


def test_a_model_without_rows_is_refused():
    x = torch.randn(5)

    def bare(x):
        pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1), obs=x)

    def weighed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.factor("prior", torch.zeros(5))

    def blind(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    for model, found in (
        (bare, r"pyro\.plate"),
        (weighed, "'prior' is a pyro.factor"),
        (blind, "must be sampled, but it has none"),
    ):
        with pytest.raises(ValueError, match=found):
            one_row(MaximumMeanDiscrepancy(), model, x)


def test_options_are_checked():
    with pytest.raises(TypeError, match="wants a kernel"):
        MaximumMeanDiscrepancy(kernel="gaussian")
    with pytest.raises(ValueError, match="order p"):
        SlicedWasserstein(p=0.5)
    with pytest.raises(TypeError, match=r"convex function such as.*the class KullbackLeibler"):
        SpreadDivergence(f=KullbackLeibler)
    with pytest.raises(ValueError, match="bandwidth=0"):
        SpreadDivergence(bandwidth=0.0)


def test_rounded_integers_are_compared_before_rounding():
    """Integers 3 of 5 by a normal before rounding, whose location a gradient must reach; within the noise of 300 steps."""
    loc = torch.tensor(0.5, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Dequantized(dist.Normal(loc, 0.5), levels=5), obs=x)

    loss, optimiser, x = MaximumMeanDiscrepancy(), torch.optim.Adam([loc], lr=0.05), torch.full((64,), 3)
    for _ in range(300):
        optimiser.zero_grad()
        loss.differentiable_loss(model, lambda x: None, x).backward()
        optimiser.step()
    assert loc.item() == pytest.approx(3.5, abs=0.2)


@pytest.mark.parametrize("unit", [1e-20, 1e-6, 1e12])
@pytest.mark.parametrize(
    ("build", "power", "discrete"),
    [
        (SlicedWasserstein, 2, False),
        (lambda: SlicedWasserstein(p=1.5), 1.5, False),
        (lambda: MaximumMeanDiscrepancy(kernel=EnergyKernel()), 1, True),
        (MaximumMeanDiscrepancy, 0, True),
    ],
    ids=["sliced", "sliced, 1.5", "energy", "Gaussian"],
)
def test_the_unit_of_the_data_changes_the_stated_loss_and_not_its_gradient(build, power, discrete, unit):
    """In units of 1e-6 a flow stood still in silence, since Adam adds 1e-8 to gradients; at 1e12 the gradient was inf."""

    def run(size):
        torch.manual_seed(0)
        parameters, x = torch.zeros(2, requires_grad=True), 3 + torch.randn(40, 2) * torch.tensor([1.0, 2.0])

        def model(x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Bernoulli(logits=parameters[0])) if discrete else parameters[0].expand(40)
                base = dist.Normal(0.0, parameters[1].exp()).expand([40, 2]).to_event(1)
                to_unit = dist.transforms.AffineTransform(k[:, None] * size, size, event_dim=1)
                pyro.sample("x", dist.TransformedDistribution(base, [to_unit]), obs=x)

        loss = build().differentiable_loss(model, lambda x: None, x * size)
        return loss.item() / size**power, torch.autograd.grad(loss, parameters)[0]

    (value, gradient), (wanted, wanted_gradient) = run(unit), run(1.0)
    assert value == pytest.approx(wanted, rel=1e-4)
    assert wanted_gradient.abs().min() > 0.01
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-4)
