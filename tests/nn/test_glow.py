"""Image flows: their volume and inverse against the Jacobian, their start, their errors, and training on images."""

from math import log, pi

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from teachers import Gaussian, perturb
from torch import Size
from torch.testing import assert_close

from pyro_genmodels import NSF, Flow, Labels, train
from pyro_genmodels.families import Glow
from pyro_genmodels.infer.compiled import Captured, CompiledSVI

SHAPE = Size((2, 4, 4))
OPTIONS = {
    "one level": (Glow(levels=1, steps=2, channels=8), 0, False),
    "two levels, context": (Glow(levels=2, steps=2, channels=8), 3, False),
    "splines": (Glow(levels=2, steps=1, channels=8, bins=4), 0, False),
    "given an image and a context": (Glow(levels=2, steps=1, channels=8), 3, True),
}


def built(name):
    """Return a perturbed lazy transform of images (2, 4, 4) in double precision, and the length of its context."""
    choice, context, given_event = OPTIONS[name]
    lazy = choice.build_for(SHAPE, context, given_event=given_event).double()
    return perturb(lazy, 0.1), context + 32 * given_event


@pytest.mark.parametrize("name", OPTIONS)
def test_the_log_determinant_is_that_of_the_jacobian(name):
    lazy, length = built(name)
    x, contexts = torch.randn(2, 32).double(), torch.randn(2, length).double()
    u, ladj = lazy(contexts if length else None).call_and_ladj(x)
    for i in range(2):
        alone = lazy(contexts[i] if length else None)
        assert_close(ladj[i], torch.autograd.functional.jacobian(alone, x[i]).slogdet()[1])
        assert_close(u[i], alone(x[i]))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_inverse_is_exact_for_batches_of_any_shape(name):
    lazy, length = built(name)
    transform = lazy(torch.randn(length).double() if length else None)
    x = torch.randn(3, 1, 2, 32).double()
    u, ladj = transform.call_and_ladj(x)
    assert u.shape == x.shape
    assert ladj.shape == (3, 1, 2)
    assert_close(transform.inv(u), x, atol=1e-10, rtol=0)
    assert_close(transform.inv.log_abs_det_jacobian(u, x), -ladj)


def test_every_coordinate_of_the_context_and_of_the_given_image_counts():
    lazy, length = built("given an image and a context")
    context = torch.randn(length).double().requires_grad_()
    u, ladj = lazy(context).call_and_ladj(torch.randn(32).double())
    assert torch.autograd.grad(u.sum() + ladj, context)[0].all()


def test_a_flow_of_images_starts_as_a_rotation():
    flow, x = Flow((3, 8, 8), transform=Glow(levels=3, steps=4, channels=8)), torch.randn(5, 3, 8, 8)
    normal = -0.5 * x.flatten(1).square().sum(1) - 96 * log(2 * pi)
    assert_close(flow().log_prob(x), normal, atol=1e-2, rtol=0)
    u = flow.transform(None)(x.flatten(1))
    assert not torch.allclose(u, x.flatten(1), atol=0.1)


def test_each_direction_is_one_pass():
    flow, passes = Flow((1, 8, 8), transform=Glow(levels=2, steps=3, channels=8)), []
    for module in flow.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):
            module.register_forward_hook(lambda *_: passes.append(1))
    flow().log_prob(torch.randn(5, 1, 8, 8))
    assert len(passes) == 6
    flow().rsample((5,))
    assert len(passes) == 12


def test_the_gradient_of_a_draw_is_that_of_finite_differences(float64):
    flow = perturb(Flow((4, 4), transform=Glow(levels=2, steps=1, channels=4), context=Labels(2)), 0.1)
    parameters = list(flow.transform.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def total(step):
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p.add_(step * v)
        torch.manual_seed(1)
        return flow(torch.tensor([0, 1])).rsample((3,)).square().sum()

    slope = (total(1e-6) - total(-2e-6)).detach() / 2e-6
    grads = torch.autograd.grad(total(1e-6), parameters)
    assert_close(sum((g * v).sum() for g, v in zip(grads, direction, strict=True)), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (16,), (6, 6), (1, 28, 27), (2, 3, 4, 4)])
def test_events_that_are_no_images_of_that_many_levels_are_refused(shape):
    with pytest.raises(ValueError, match=r"Glow\(levels=2\) wants images .* multiples of 4, but found .*fewer levels, pad"):
        Flow(shape, transform=Glow(levels=2))


@pytest.mark.parametrize("options", [{"levels": 0}, {"steps": 1.5}, {"channels": -1}, {"bins": 1}, {"bins": "8"}])
def test_options_that_are_no_counts_are_refused(options):
    with pytest.raises(ValueError, match=f"Glow wants an integer {next(iter(options))} of"):
        Glow(**options)


def test_a_number_of_coordinates_is_no_shape():
    with pytest.raises(ValueError, match="Glow wants the shape of images, but found 784 coordinates"):
        Glow().build(784, 0)


def test_pixels_are_standardised_jointly_unless_told_otherwise():
    x = torch.randn(50, 4, 4) * torch.arange(1.0, 17.0).reshape(4, 4)
    for options, alike in (({}, True), ({"standardize": True}, False)):
        flow = Flow((4, 4), transform=Glow(steps=1, channels=4), **options)
        flow.standardize(x)
        assert (flow.scale == flow.scale[0, 0]).all() == alike
    flow = Flow((4, 4), transform=NSF(transforms=1))
    flow.standardize(x)
    assert not (flow.scale == flow.scale[0, 0]).all()


def waves(n):
    """Draw images (n, 1, 4, 4) whose pixels have the correlation 0.8^distance, and return them with their Gaussian."""
    place = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    law = Gaussian(torch.zeros(16), 0.8 ** torch.cdist(place, place, p=1))
    return law.distribution().sample((n,)).reshape(n, 1, 4, 4), law


def test_training_finds_how_pixels_depend_on_each_other():
    """Right values: the entropy of the pixels, and their cross-entropy to independent ones. The mean of 4,000 test images has
    a standard error of 0.045 (half a chi-square of 16 degrees): 5.5 of these, a false alarm with a chance of 2e-8.
    """
    x, law = waves(1000)
    flow = Flow((1, 4, 4), transform=Glow(levels=2, steps=3, channels=16))
    train(flow, x, epochs=8, batch_size=50, optim=lambda p: torch.optim.Adam(p, lr=5e-3), progress=False)
    test, _ = waves(4000)
    with torch.no_grad():
        loss = -flow.eval()().log_prob(test).mean()
    independent = law.cross_entropy(Gaussian(torch.zeros(16), torch.eye(16)))
    assert law.entropy() - 0.25 < loss < law.entropy() + 0.1 * (independent - law.entropy())


def test_eight_bit_images_are_taken_as_they_are():
    flow = Flow((1, 4, 4), transform=Glow(levels=1, steps=1, channels=4), levels=256)
    x = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8)
    train(flow, x, epochs=1, batch_size=10, progress=False)
    values = []
    for same in (x, x.long(), x.float()):
        torch.manual_seed(0)
        values.append(flow().log_prob(same))
    assert values[0].equal(values[1])
    assert values[0].equal(values[2])
    draws = flow().sample((50,))
    assert draws.dtype == torch.int64
    assert 0 <= draws.min() <= draws.max() <= 255


@pytest.mark.slow
def test_a_captured_program_draws_and_scores_images():
    """A model whose latent image has a flow as its prior and another as its guide. Right values: those of SVI, seed by seed."""

    def fit(svi, **options):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        prior, guide = (Flow((4, 4), transform=Glow(levels=2, steps=1, channels=4)) for _ in range(2))

        def model(x):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, 0.5).to_event(2), obs=x)

        inference = svi(model, lambda x: pyro.sample("z", guide()), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **options)
        return [inference.step(torch.ones(4, 4)) for _ in range(5)]

    assert fit(CompiledSVI, mode=Captured()) == pytest.approx(fit(SVI), rel=1e-3)
