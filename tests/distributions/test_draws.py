"""Samples that follow the density of `log_prob`: by numerical inverses, near the ends of a support, and of integers."""

from functools import partial
from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from torch import Tensor, nn
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from pyro_genmodels import DenseEnergy, DenseField, Diffusion, DPMSolver, EnergyModel, Flow, Langevin, ODEFlow, RealNVP
from pyro_genmodels.distributions import Energy
from pyro_genmodels.distributions.dequantized import Dequantized
from pyro_genmodels.distributions.flow import NormalizingFlow
from pyro_genmodels.families import BPF, NAF, RK4, SOSPF, UNAF
from pyro_genmodels.samplers import sample_chains
from pyro_genmodels.utils.distributions import interior

WIDE = {
    "NAF": partial(NAF, hidden=(8,)),
    "UNAF": partial(UNAF, hidden=(8,)),
    "SOSPF": partial(SOSPF, hidden=(8,)),
    "BPF": partial(BPF, hidden=(8,)),
}
"""Transforms whose inverse is searched for."""


def stretched(name: str) -> Flow:
    """Return a flow of one layer whose samples are tens of units wide, so that most lie outside of [-10, 10]."""
    flow = Flow((2,), transform=WIDE[name](transforms=1))
    with torch.no_grad():
        for part in flow.modules():
            if name == "UNAF" and hasattr(part, "integrand"):
                part.integrand[-1].bias.sub_(5.0)  # a slope of 0.05
            if name == "NAF" and hasattr(part, "network"):
                part.network[-1].weight.mul_(0.02)
                part.network[-1].bias.zero_()
    return flow.eval()


@pytest.mark.parametrize("name", ["NAF", "UNAF"])
def test_samples_far_out_are_found_by_the_numerical_inverse(name):
    """Right values: the base's samples. With a search in [-10, 10], 58 % of the samples of this UNAF were -10 or 10."""
    d = stretched(name)()
    torch.manual_seed(1)
    x = d.sample((100,))
    torch.manual_seed(1)
    base = d.base.expand((100, 2)).sample()
    assert (x.abs() > 10).float().mean() > 0.2
    with torch.no_grad():
        u = d.transform(None)(x)
    torch.testing.assert_close(u, base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_a_numerical_inverse_returns_to_its_start(name, dtype, tolerance):
    """Right values: the points themselves, near 0 and a thousand away."""
    tolerance = max(tolerance, 1e-6) if name == "BPF" else tolerance  # zuko's own search, which cannot leave [-5, 5]
    d = stretched(name).to(dtype)()
    x = torch.tensor([[1e-3, -0.5], [3.0, 2.0], [40.0, -70.0], [-1000.0, 300.0]], dtype=dtype)
    with torch.no_grad():
        transform = d.transform(None)
        found = transform.inv(transform(x))
    torch.testing.assert_close(found, x, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", [*WIDE, "user's NAF"])
@pytest.mark.parametrize("context", [0, 2])
def test_gradients_of_samples_by_a_numerical_inverse_are_those_of_the_implicit_function(name, context):
    """Right value: 0, the derivative of the base's sample u = f(x(u)) in the parameters and the context."""
    make = WIDE.get(name)
    transform = zuko.flows.NAF(3, context, transforms=2, hidden_features=(8,)) if make is None else make(transforms=2)
    flow = Flow((3,), context=context, transform=transform).double().eval()
    with torch.no_grad():
        for p in flow.transform.parameters():
            p.add_(0.1 * torch.randn_like(p))
    c = torch.randn(2, dtype=torch.float64, requires_grad=True) if context else None
    f = flow.transform(c)
    u = torch.randn(20, 3, dtype=torch.float64) / 2
    weights = torch.randn(20, 3, dtype=torch.float64)
    x = f.inv(u)
    parameters = [*flow.transform.parameters(), *([] if c is None else [c])]
    total = torch.autograd.grad((weights * f(x)).sum(), parameters, retain_graph=True, allow_unused=True)
    part = torch.autograd.grad((weights * f(x.detach())).sum(), parameters, allow_unused=True)
    sizes = [p.norm() for p in part if p is not None]
    assert min(sizes) > 0
    for whole, size in zip([t for t in total if t is not None], sizes, strict=True):
        assert whole.norm() < 1e-6 * max(sizes), (whole.norm(), size)


class Squeeze(nn.Module):
    """The bijection tanh between the reals and (-1, 1), which takes three sevenths of a normal's mass for the whole."""

    def forward(self, context: Tensor | None) -> torch.distributions.Transform:
        return torch.distributions.IndependentTransform(torch.distributions.TanhTransform(), 1)


def test_samples_of_the_base_without_an_inverse_are_drawn_anew_with_a_warning():
    flow = NormalizingFlow(Squeeze(), dist.Normal(0.0, 1.0), (1,), numerical_inverse=True)
    with pytest.warns(RuntimeWarning, match=r"of 1000 samples of the base have no inverse and were drawn anew"):
        x = flow.sample((1000,))
    u = x.tanh()
    assert x.isfinite().all()
    # the variance of a normal that is truncated to [-1, 1]; five standard errors
    assert (u.square().mean() - 0.2911).abs() < 0.045


@pytest.mark.parametrize("name", ["bijection", *(pytest.param(name, marks=pytest.mark.slow) for name in WIDE)])
def test_samples_by_a_numerical_inverse_are_captured_as_a_graph(name):
    """The check of each draw reads values, and was in the way."""
    if name == "bijection":
        affine = torch.distributions.AffineTransform(1.0, 2.0, event_dim=1)
        flow = NormalizingFlow(lambda context: affine, dist.Normal(0.0, 1.0), (2,), numerical_inverse=True)
    else:
        with pyro.validation_enabled(False):  # zuko's bases validate values
            flow = Flow((2,), transform=WIDE[name](transforms=1)).eval()()
    assert flow.numerical_inverse
    with pyro.validation_enabled(False):
        graph = make_fx(lambda: flow.sample((5,)))()
    pyro.set_rng_seed(1)
    wanted = flow.sample((5,))
    pyro.set_rng_seed(1)
    torch.testing.assert_close(graph(), wanted)


def test_a_context_stays_with_its_row_where_samples_are_drawn_anew():
    def transform(context: Tensor | None) -> torch.distributions.Transform:
        shift = torch.distributions.AffineTransform(context, 1.0)
        squeeze = torch.distributions.ComposeTransform([shift.inv, torch.distributions.TanhTransform()])
        return torch.distributions.IndependentTransform(squeeze, 1)

    flow = NormalizingFlow(
        transform, dist.Normal(0.0, 1.0), (1,), numerical_inverse=True, context=torch.tensor([[0.0], [1000.0]])
    )
    with pytest.warns(RuntimeWarning, match="drawn anew"):
        x = flow.sample((200,))
    assert (x[:, 0] < 500).all()
    assert (x[:, 1] > 500).all()


def test_a_flow_whose_samples_are_never_found_is_an_error():
    nowhere = torch.distributions.IndependentTransform(_Unreachable(), 1)
    flow = NormalizingFlow(lambda context: nowhere, dist.Normal(0.0, 1.0), (1,), numerical_inverse=True)
    with pytest.raises(FloatingPointError, match=r"50 of 50 samples of the base have no inverse.*NSF"):
        flow.sample((50,))


class _Unreachable(torch.distributions.AffineTransform):
    """A shift whose inverse is wrong."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)

    def _inverse(self, y: Tensor) -> Tensor:
        return y + 5.0


# The ends of a support.


SUPPORTS = {
    "positive": (constraints.positive, 1.0),
    "greater_than(100)": (constraints.greater_than(100.0), 1e-5),
    "greater_than(1e6)": (constraints.greater_than(1e6), 0.1),
    "less_than(-100)": (constraints.less_than(-100.0), 1e-5),
    "unit_interval": (constraints.unit_interval, 1.0),
    "interval(1000, 1001)": (constraints.interval(1000.0, 1001.0), 1.0),
    "half_open_interval(1000, 1001)": (constraints.half_open_interval(1000.0, 1001.0), 1.0),
    "interval(0.1, 0.3)": (constraints.interval(0.1, 0.3), 0.2),
}
"""Supports, and the distance from their end at which half of the data lie."""
BOUNDED = {
    "flow": lambda support: Flow((2,), transform=RealNVP(2, (8,)), support=support),
    "ode_flow": lambda support: ODEFlow((2,), network=DenseField(8, 1), solver=RK4(2), support=support),
    "diffusion": lambda support: Diffusion((2,), network=DenseField(8, 1), sampler=DPMSolver(3), support=support),
    "energy": lambda support: EnergyModel((2,), energy=DenseEnergy((8,)), num_steps=2, support=support),
}


@pytest.mark.parametrize("where", SUPPORTS)
@pytest.mark.parametrize("name", BOUNDED)
def test_samples_lie_inside_of_a_support_where_their_density_is_finite(name, where):
    """As floats, 13 to 18 % of these samples on rays were the end itself, and 12 % of those on intervals above 1000."""
    support, width = SUPPORTS[where]
    family = BOUNDED[name](support).eval()
    if hasattr(support, "lower_bound") and hasattr(support, "upper_bound"):
        family.scale.fill_(6.0)  # much of the mass lies at the ends
    else:
        family.loc.fill_(log(width))
    d = family()
    with torch.no_grad():
        x = d.sample((100_000 if name == "flow" else 2_000,))
        assert d.support.check(x).all()
        density = d.unnormalized_log_prob if name == "energy" else d.log_prob
        assert density(x[:20_000]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("where", SUPPORTS)
def test_only_values_at_an_end_are_moved_and_by_one_float(where, dtype):
    support, _ = SUPPORTS[where]
    ends = [getattr(support, name) for name in ("lower_bound", "upper_bound") if hasattr(support, name)]
    if dtype == torch.float16 and ends[0] == 1e6:
        return  # infinite in half precision
    at = torch.tensor(ends, dtype=dtype)
    moved = interior(at, support)
    assert support.check(moved).all()
    assert (moved != at).all()
    assert (
        ((moved - at).abs() <= torch.finfo(dtype).eps * at.abs().clamp(min=torch.finfo(dtype).tiny)).logical_or(at == 0).all()
    )
    inside = interior(moved, support)
    assert (inside == moved).all()
    assert interior(torch.tensor([-3.0, 3.0]), constraints.real).tolist() == [-3.0, 3.0]


def test_each_coordinate_of_a_stack_has_ends_of_its_own():
    support = constraints.stack([constraints.greater_than(1e6), constraints.real, constraints.interval(0.0, 1.0)], -1)
    x = torch.tensor([[1e6, 1e6, 1.0], [2e6, -1.0, 0.5]])
    assert interior(x, support).tolist() == [[1e6 + 0.0625, 1e6, 1 - 2**-24], [2e6, -1.0, 0.5]]


def test_a_sample_that_is_nan_stays_so():
    assert interior(torch.tensor([torch.nan]), constraints.positive).isnan().all()


def test_chains_and_trajectories_lie_inside_of_their_support():
    near = constraints.greater_than(1e6)
    energy = Energy(lambda x: (x.log() - 1).square().sum(-1) * 0.01, (1,), support=near, sampler=Langevin(1.0))
    draws = sample_chains(energy, torch.full((200, 1), 1e6 + 1), num_samples=100, warmup=20, progress=False).draws
    assert near.check(draws).all()
    diffusion = Diffusion((1,), network=DenseField(8, 1), sampler=DPMSolver(3), support=near).eval()
    assert near.check(diffusion().trajectory((5000,), num_frames=2).x).all()
    flow = ODEFlow((1,), network=DenseField(8, 1), solver=RK4(1), support=near).eval()
    assert near.check(flow().trajectory((5000,), num_frames=2).x).all()


# Integers.


@pytest.mark.parametrize("levels", [2, 256, 2**12 + 1, 2**16, 2**20, 2**24])
def test_noise_keeps_every_level_and_its_density(levels):
    """Right values: a uniform density, 1 / levels. With 2^16 levels, one value in 500 was rounded up to the next level."""
    d = Dequantized(dist.Uniform(torch.zeros(()), float(levels)), levels)
    x = torch.full((100_000,), levels - 1)
    _, y = d.dequantize(x)
    assert (d.quantize(y) == x).all()
    assert (y < levels).all()
    assert_close(d.log_prob(x).double(), torch.full((100_000,), 1 / levels).double().log(), rtol=1e-6, atol=0.0)
    u = (y - x).double()
    # a uniform number: mean 1/2, with a distance of five standard errors (6e-7)
    assert abs(u.mean() - 0.5) < 5 * 12**-0.5 / 100_000**0.5 + 2**-12


def test_a_flow_of_many_levels_draws_all_of_them():
    """Right values: in single precision no odd number above 2^23 could be drawn from a flow over 2^24 levels."""
    flow = Flow((1,), transform=RealNVP(1, (8,)), levels=2**24).eval()
    flow.standardize(torch.randint(2**24, (1000, 1)))
    x = flow().sample((100_000,))
    top = x[x > 2**23]
    assert len(top) > 5000
    assert (top % 2 == 1).float().mean().sub(0.5).abs() < 0.035  # five standard errors of 5000
    assert flow().log_prob(x).isfinite().all()


def test_more_levels_than_the_type_tells_apart_are_refused():
    base = dist.Uniform(torch.zeros(()), 1.0)
    with pytest.raises(ValueError, match=r"16777216 levels apart in torch.float32, but found 33554432.*float64"):
        Dequantized(base, 2**25)
    assert Dequantized(base, 2**25, dtype=torch.float64).levels == 2**25
