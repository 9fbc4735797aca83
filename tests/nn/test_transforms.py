"""Splines and layers that replace zuko's: the same functions of the same parameters, with the same gradients."""

import pytest
import torch
import zuko
from torch.testing import assert_close
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform

from pyro_genmodels import MAF, NSF, Flow, RealNVP
from pyro_genmodels.families import BPF, NAF, NICE, SOSPF, UNAF
from pyro_genmodels.nn.affine import BoundedAffine
from pyro_genmodels.nn.splines import RationalQuadraticSpline
from pyro_genmodels.nn.zuko_layers import lazy_transform

BINS = 8


def parameters(*shape, scale=1.0, dtype=torch.float64):
    phi = (scale * torch.randn(*shape, 3 * BINS - 1, dtype=dtype)).requires_grad_()
    return phi, phi.split([BINS, BINS, BINS - 1], -1)


def gradients(outputs, inputs):
    weights = [torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).reshape(out.shape) for out in outputs]
    return torch.autograd.grad(outputs, inputs, weights)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("bound", [3.0, 5.0])
def test_a_spline_is_zukos_with_its_gradients(scale, bound):
    phi, parts = parameters(200, 3, scale=scale)
    x = (1.5 * bound * torch.linspace(-1.0, 1.0, 600, dtype=torch.float64).reshape(200, 3)).requires_grad_()
    ours = RationalQuadraticSpline(*parts, bound=bound).call_and_ladj(x)
    theirs = MonotonicRQSTransform(*parts, bound=bound).call_and_ladj(x)
    torch.testing.assert_close(ours, theirs)
    for found, wanted in zip(gradients(ours, (phi, x)), gradients(theirs, (phi, x)), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_spline_broadcasts_with_its_values():
    _, parts = parameters(3)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    ours, theirs = RationalQuadraticSpline(*parts), MonotonicRQSTransform(*parts)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.inv(x), theirs.inv(x))


def test_a_spline_of_one_value_has_no_batch():
    _, parts = parameters()
    y, ladj = RationalQuadraticSpline(*parts).call_and_ladj(torch.tensor(0.5, dtype=torch.float64))
    assert y.shape == ladj.shape == ()


def test_the_derivative_and_the_inverse_are_those_of_the_spline():
    _, parts = parameters(100)
    spline = RationalQuadraticSpline(*parts)
    x = torch.linspace(-6.0, 6.0, 100, dtype=torch.float64).requires_grad_()
    y, ladj = spline.call_and_ladj(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.log(), ladj)
    torch.testing.assert_close(spline.inv(y), x)


def test_a_spline_is_the_identity_from_its_ends_on_however_far():
    phi, parts = parameters(6, dtype=torch.float32)
    spline = RationalQuadraticSpline(*parts)
    x = torch.tensor([-torch.inf, -1e38, -5.0, 5.0, 1e38, torch.inf]).requires_grad_()
    y, ladj = spline.call_and_ladj(x)
    assert y.equal(x)
    assert spline.inv(x).equal(x)
    assert ladj.equal(torch.zeros(6))
    (gradient,) = torch.autograd.grad(ladj.sum(), phi, allow_unused=True)
    assert gradient.equal(torch.zeros_like(phi))


def test_a_spline_of_nan_is_nan():
    _, parts = parameters(1)
    assert RationalQuadraticSpline(*parts)(torch.full((1,), torch.nan, dtype=torch.float64)).isnan()


FLOWS = {
    "NSF": lambda n, c: zuko.flows.NSF(n, c, transforms=2, hidden_features=(8, 8)),
    "NCSF": lambda n, c: zuko.flows.NCSF(n, c, transforms=2, hidden_features=(8, 8)),
    "coupling": lambda n, c: zuko.flows.NSF(n, c, transforms=2, passes=2, hidden_features=(8,), randperm=True),
    "MAF": lambda n, c: zuko.flows.MAF(n, c, transforms=2, hidden_features=(8, 8)),
    "RealNVP": lambda n, c: zuko.flows.RealNVP(n, c, transforms=2, hidden_features=(8,)),
    "NICE": lambda n, c: zuko.flows.NICE(n, c, transforms=2, hidden_features=(8,)),
    "SOSPF": lambda n, c: zuko.flows.SOSPF(n, c, transforms=2, hidden_features=(8,)),
    "UNAF": lambda n, c: zuko.flows.UNAF(n, c, transforms=1, hidden_features=(8,), signal=4),
    "BPF": lambda n, c: zuko.flows.BPF(n, c, transforms=2, hidden_features=(8,)),
}


CASES = [(name, features, context) for name in FLOWS for features in (1, 3) for context in (0, 2)]


@pytest.mark.parametrize(("name", "features", "context"), [case for case in CASES if case[:2] != ("coupling", 1)])
def test_a_zuko_flow_keeps_its_function_and_gradients(name, features, context):
    flow = FLOWS[name](features, context).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, c = (torch.randn(20, n, dtype=torch.float64) if n else None for n in (features, context))
    wanted = flow.transform(c).call_and_ladj(x)
    trained = list(flow.transform.parameters())
    slopes = torch.autograd.grad([out.sum() for out in wanted], trained, allow_unused=True)
    state = flow.state_dict()
    family = Flow((features,), context=context, transform=flow)
    assert flow.state_dict().keys() == state.keys()
    found = family.transform(c).call_and_ladj(x)
    torch.testing.assert_close(found, wanted)
    for new, old in zip(torch.autograd.grad([o.sum() for o in found], trained, allow_unused=True), slopes, strict=True):
        torch.testing.assert_close(new, old)


def test_the_parts_of_a_zuko_flow_are_replaced():
    family = Flow((3,), transform=zuko.flows.NSF(3, transforms=1, hidden_features=(8,)))
    layer = family.transform.transforms[0]
    assert layer.univariate.func is RationalQuadraticSpline
    assert type(layer) is not zuko.flows.autoregressive.MaskedAutoregressiveTransform
    assert isinstance(layer, zuko.flows.autoregressive.MaskedAutoregressiveTransform)
    masked = [m for m in layer.modules() if isinstance(m, zuko.nn.MaskedLinear)]
    assert masked
    assert all(type(m).forward is not zuko.nn.MaskedLinear.forward for m in masked)
    affine = Flow((3,), transform=zuko.flows.MAF(3, transforms=1, hidden_features=(8,))).transform.transforms[0]
    assert affine.univariate.func is BoundedAffine


def test_an_affine_function_is_zukos_both_ways_and_broadcasts():
    shift, scale = (5 * torch.randn(3, dtype=torch.float64) for _ in range(2))
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    ours, theirs = BoundedAffine(shift, scale, slope=0.01), MonotonicAffineTransform(shift, scale, slope=0.01)
    torch.testing.assert_close(ours.call_and_ladj(x), theirs.call_and_ladj(x))
    torch.testing.assert_close(ours.inv(x), theirs.inv(x))


def test_the_base_is_a_standard_normal():
    base = MAF.base(torch.zeros((), dtype=torch.float64)).expand((4, 3))
    x = 10 * torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(base.log_prob(x), torch.distributions.Normal(0.0, 1.0).log_prob(x))
    assert base.sample().shape == (4, 3)


@pytest.mark.parametrize("choice", [NICE, RealNVP, MAF, NSF, SOSPF])
@pytest.mark.parametrize("hidden", [(8, 8), (8, 5)])
def test_residual_blocks_leave_a_bijection(choice, hidden):
    """Right values: the start of a round trip, and the determinant of the Jacobian."""
    lazy = lazy_transform(choice(transforms=2, hidden=hidden, residual=True).build(3, 2)).double()
    assert any(isinstance(m, zuko.nn.Residual) for m in lazy.modules())
    with torch.no_grad():
        for p in lazy.parameters():
            p.add_(0.2 * torch.randn_like(p))
    f = lazy(torch.randn(2, dtype=torch.float64))
    x = torch.randn(3, dtype=torch.float64)
    u, log_det = f.call_and_ladj(x)
    torch.testing.assert_close(f.inv(u), x, rtol=1e-6, atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(log_det, jacobian.det().abs().log(), rtol=1e-6, atol=1e-6)


def test_residual_blocks_want_hidden_layers():
    with pytest.raises(ValueError, match="wants hidden layers"):
        MAF(hidden=(), residual=True)
    with pytest.raises(TypeError, match="residual as True or False"):
        RealNVP(residual=2)


@pytest.mark.parametrize("choice", [NAF, SOSPF, BPF, pytest.param(UNAF, marks=pytest.mark.slow)])
def test_an_inverse_that_is_searched_for_has_its_derivatives_up_to_the_third(choice):
    """Right values: a bijection after its inverse is the identity, whose higher derivatives are 0, for any parameters."""
    module = lazy_transform(choice(transforms=1, hidden=(8,)).build(2, 1)).double()
    f = module(torch.randn(1, dtype=torch.float64))
    u = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    x = f.inv(u)
    (again,) = torch.autograd.grad(x[1], u, create_graph=True)
    assert again[0] != 0  # the second coordinate depends on the first
    for k, one in enumerate(torch.eye(2, dtype=torch.float64)):
        (first,) = torch.autograd.grad(f(f.inv(u))[k], u, create_graph=True)
        assert_close(first, one)
        (second,) = torch.autograd.grad((first * torch.tensor([1.0, 2.0])).sum(), u, create_graph=True)
        assert_close(second, torch.zeros_like(u), atol=1e-6, rtol=0)
        (third,) = torch.autograd.grad((second * torch.tensor([1.0, 3.0])).sum(), u, retain_graph=True)
        assert_close(third, torch.zeros_like(u), atol=1e-5, rtol=0)
        for slope in torch.autograd.grad(first.sum(), list(module.parameters()), allow_unused=True):
            assert slope is None or slope.abs().max() < 1e-6
    (curvature,) = torch.autograd.grad(again.sum(), u)
    assert curvature.abs().max() > 1e-4  # of the inverse itself, which was lost
