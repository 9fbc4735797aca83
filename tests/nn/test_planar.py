"""Planar and radial layers: their inverses, volumes and gradients."""

import pytest
import torch
from pyro.distributions import transforms as pyro_transforms
from torch.testing import assert_close

from pyro_genmodels import Flow
from pyro_genmodels.families import Planar, Radial
from pyro_genmodels.nn.planar import MARGIN, PlanarTransform, RadialTransform

CHOICES = [Planar(3), Radial(3)]


def lazy(choice, context=0, spread=1.0):
    """Return the lazy transform in float64, with parameters spread widely."""
    module = choice.build(3, context).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(spread * torch.randn_like(p))
    return module


@pytest.mark.parametrize("choice", CHOICES, ids=["planar", "radial"])
@pytest.mark.parametrize("context", [0, 2])
def test_layers_return_to_their_start_with_the_volume_of_the_jacobian(choice, context):
    c = torch.randn(2, dtype=torch.float64) if context else None
    f = lazy(choice, context, spread=3.0)(c)
    x = 3 * torch.randn(20, 3, dtype=torch.float64)
    u = f(x)
    assert_close(f.inv(u), x, rtol=1e-9, atol=1e-9)
    for row in range(5):
        jacobian = torch.autograd.functional.jacobian(f, x[row])
        found = f.log_abs_det_jacobian(x[row], f(x[row]))
        assert_close(found, jacobian.det().abs().log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("choice", CHOICES, ids=["planar", "radial"])
def test_gradients_of_densities_are_those_of_finite_differences(choice):
    module = lazy(choice)
    x, weights = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)

    def value():
        f = module(None)
        u = f(x)
        return (weights * u).sum() + f.log_abs_det_jacobian(x, u).sum()

    (slope,) = torch.autograd.grad(value(), [module.start])
    step = torch.randn_like(slope)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            module.start.add_(sign * 1e-6 * step)
            ends.append(value())
            module.start.sub_(sign * 1e-6 * step)
    assert ((ends[0] - ends[1]) / 2e-6).item() == pytest.approx((slope * step).sum().item(), rel=1e-6)


@pytest.mark.parametrize("choice", CHOICES, ids=["planar", "radial"])
def test_second_derivatives_of_densities_are_those_of_finite_differences(choice):
    f = lazy(choice)(None)

    def value(x):
        u = f(x)
        return f.log_abs_det_jacobian(x, u) - u.square().sum(-1) / 2

    def score(x):
        return torch.autograd.functional.jacobian(value, x)

    x, step = torch.randn(3, dtype=torch.float64), 1e-5 * torch.eye(3, dtype=torch.float64)
    slopes = torch.stack([(score(x + h) - score(x - h)) / 2e-5 for h in step])
    assert_close(torch.autograd.functional.hessian(value, x), slopes, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_radial_layer_are_finite_far_out():
    parameters = [torch.zeros(2), torch.tensor(-20.0), torch.tensor(0.0)]
    leaves = [p.requires_grad_() for p in parameters]
    RadialTransform(*leaves)(torch.tensor([1e5, 0.0])).sum().backward()
    assert all(p.grad.isfinite().all() for p in leaves)


def test_a_planar_layer_is_pyros():
    """Pyro's has the same constraint without a margin, and no inverse."""
    theirs = pyro_transforms.Planar(3)
    u, w = theirs.u.detach(), theirs.w.detach()
    ours = PlanarTransform(u, w, theirs.bias.detach()[0])
    z = torch.randn(10, 3)
    assert_close(ours.inv(z), theirs(z), atol=10 * MARGIN, rtol=0)
    assert_close(ours(theirs(z)), z, atol=10 * MARGIN, rtol=0)


@pytest.mark.parametrize("choice", CHOICES, ids=["planar", "radial"])
def test_a_radial_or_planar_flow_draws_and_scores_with_a_context(choice):
    flow = Flow((3,), context=2, transform=choice)
    c = torch.randn(5, 2)
    x = flow(c).rsample()
    assert x.shape == (5, 3)
    assert flow(c).log_prob(x).requires_grad
    with pytest.raises(ValueError, match="transforms"):
        type(choice)(0)
