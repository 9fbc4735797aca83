"""Supports of coordinates: one for each column, and circles, whose ends are one point."""

from functools import partial
from math import log, pi

import pyro
import pyro.distributions as dist
import pytest
import torch
from teachers import perturb
from torch.distributions import biject_to, constraints
from torch.testing import assert_close

from pyro_genmodels import (
    MAF,
    NCSF,
    NSF,
    VAE,
    Autoregressive,
    DenseField,
    Diffusion,
    EnergyModel,
    Flow,
    FlowDensity,
    ODEFlow,
    log_likelihood,
    to_arviz,
    train,
)
from pyro_genmodels.families import GAN, RK4, Glow, circular
from pyro_genmodels.nn.circular_splines import CircularSpline, wrapped
from pyro_genmodels.training import checkpoints
from pyro_genmodels.utils.supports import ByColumn, support_by_column

REAL, POSITIVE, UNIT = constraints.real, constraints.positive, constraints.interval(0.0, 1.0)
SMALL = {"transforms": 2, "hidden": (16,)}


def by_column(*supports):
    return constraints.stack(list(supports), dim=-1)


def flow(*supports, size=0.3, transform=None, **options):
    """Return a flow of double precision, far from its initial parameters."""
    made = Flow((len(supports),), support=by_column(*supports), transform=transform or NSF(**SMALL), **options).double()
    return perturb(made, size).eval()


def identity(*supports, **options):
    """Return a flow whose layers are the identity."""
    made = flow(*supports, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    return made


def refused(*words, kind=ValueError):
    return pytest.raises(kind, match="(?s)" + ".*".join(words))


# Densities.

STANDARD = {
    REAL: dist.Normal(0.0, 1.0),
    POSITIVE: dist.LogNormal(0.0, 1.0),
    constraints.greater_than(2.0): dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(2.0, 1.0)]
    ),
    constraints.less_than(-1.0): dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(-1.0, -1.0)]
    ),
    constraints.interval(-1.0, 3.0): dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform(), dist.transforms.AffineTransform(-1.0, 4.0)]
    ),
    circular: dist.Uniform(-pi, pi),
}
"""The distribution that the base is mapped to on each support."""


def test_layers_that_are_the_identity_leave_the_density_of_each_support_in_closed_form():
    supports = [*STANDARD, circular, REAL]
    d = identity(*supports)()
    x = d.sample((50,))
    assert_close(d.log_prob(x), sum(STANDARD[s].log_prob(part) for s, part in zip(supports, x.unbind(-1), strict=True)))


def test_the_base_has_the_moments_of_its_distributions():
    """False alarm rate 1e-6: five standard errors, three numbers."""
    x = identity(circular, REAL)().sample((10_000,))
    for found, wanted, deviation in (
        (x[:, 0].cos().mean(), 0.0, 0.5**0.5),
        (x[:, 0].square().mean(), pi**2 / 3, pi**2 * (4 / 45) ** 0.5),
        (x[:, 1].square().mean(), 1.0, 2**0.5),
    ):
        assert abs(found - wanted) < 5 * deviation / 100


def side(support, n):
    """Return the points of the midpoint rule on a support, and their lengths."""
    half = pi if support is circular else 15.0
    u = half * ((2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1)
    length = torch.full_like(u, 2 * half / n)
    return (u.sigmoid(), length * u.sigmoid() * (-u).sigmoid()) if support is UNIT else (u, length)


def integral(d, *supports, n=300, of=None):
    """Return the integral of a density of two coordinates, times a function of them."""
    (x, dx), (y, dy) = (side(support, n) for support in supports)
    points = torch.cartesian_prod(x, y)
    with torch.no_grad():
        p = d.log_prob(points).exp() * (dx[:, None] * dy).flatten()
        return (p if of is None else p * of(points)).sum()


@pytest.mark.parametrize("supports", [(circular, UNIT), (circular, REAL), (REAL, circular), (circular, circular)], ids=str)
def test_a_density_integrates_to_one(supports):
    d = flow(*supports, context=2, size=0.1)(torch.randn(2, dtype=torch.float64))
    assert abs(integral(d, *supports) - 1) < 1e-3  # the error of the rule


def ends(d, place):
    """Return points that agree but for one coordinate, which is the end of the circle or, nearly, the other end."""
    low, high = d.sample((100,)), torch.empty(0)
    low[:, place] = -pi
    high = low.clone()
    high[:, place] = torch.nextafter(torch.tensor(pi, dtype=low.dtype), torch.tensor(0.0, dtype=low.dtype))
    return low, high


@pytest.mark.parametrize("transform", [NSF(**SMALL), NSF(passes=2, **SMALL), NSF(randperm=True, residual=True, **SMALL)])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_density_is_continuous_where_the_ends_of_a_circle_meet(transform, place):
    """Other coordinates depend on the angle by networks that read it."""
    d = flow(circular, circular, REAL, circular, UNIT, transform=transform, size=0.5)()
    low, high = ends(d, place)
    assert_close(d.log_prob(low), d.log_prob(high), rtol=0, atol=1e-10)
    far = low.clone()
    far[:, place] = 0.0
    assert (d.log_prob(low) - d.log_prob(far)).abs().median() > 0.05  # it does depend on the angle


def test_a_slope_is_continuous_in_one_dimension():
    d = flow(circular, transform=NCSF(**SMALL))()
    low, high = ends(d, 0)
    assert_close(d.log_prob(low), d.log_prob(high))
    assert d.log_prob(low[0]) != d.base.log_prob(low[0])  # the slope at the ends is not 1


@pytest.mark.parametrize("passes", [None, 2])
def test_the_log_determinant_is_that_of_the_jacobian_and_the_inverse_leads_back(passes):
    d = flow(circular, REAL, circular, POSITIVE, transform=NSF(passes=passes, **SMALL))()
    x = d.sample((6,))
    to_base = lambda v: d.transform(None)(d.pretransform(v))  # noqa: E731
    for row in x:
        log_det = torch.autograd.functional.jacobian(to_base, row).slogdet().logabsdet
        assert_close(d.log_prob(row), d.base.log_prob(to_base(row)).sum() + log_det)
    back = d.pretransform.inv(d.transform(None).inv(to_base(x)))
    assert_close(back, x)


def test_samples_follow_the_density():
    """False alarm rate 1e-5: 4.5 standard errors of a mean that is known by quadrature."""
    d = flow(circular, REAL)()
    with torch.no_grad():
        values = d.sample((20_000,)).sum(-1).cos()
    wanted = integral(d, circular, REAL, of=lambda x: x.sum(-1).cos())
    assert abs(values.mean() - wanted) < 4.5 * values.std() / 20_000**0.5 + 1e-3


def test_angles_beyond_the_circle_are_refused_or_wrapped():
    d = flow(circular, REAL)()
    x = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    beyond = x + torch.tensor([2 * pi, 0.0], dtype=torch.float64)
    with pyro.validation_enabled(False):
        unchecked = flow(circular, REAL)
        assert_close(unchecked().log_prob(x), unchecked().log_prob(beyond))
    with refused("within the support"):
        d.log_prob(beyond)


# Data, units and errors.


def dependent(n):
    """Return an angle, a share and a positive number that depend on one another, and their log densities.

    The angle is von Mises around 3, near the ends of the circle; the parameters of the others are functions on the circle.
    """
    angle = dist.VonMises(torch.tensor(3.0).double(), torch.tensor(2.0).double())
    a = angle.sample((n,))
    share = dist.Beta(3 + 1.5 * a.cos(), 3 - 1.5 * a.sin())
    b = share.sample()
    size = dist.LogNormal(8 + a.sin() + b, 0.4)
    c = size.sample()
    return torch.stack([a, b, c], -1), angle.log_prob(a) + share.log_prob(b) + size.log_prob(c)


MIXED = by_column(circular, UNIT, POSITIVE)


@pytest.mark.slow
def test_a_fit_reaches_the_exact_entropy():
    """The mean difference of log densities on new data is the divergence of the flow from the truth, and is positive.

    It is about 0.02 nats, of an entropy of 10.0. False alarm rate 1e-5: 4.5 standard errors.
    """
    flow = Flow((3,), support=MIXED, transform=NSF(transforms=2, hidden=(32, 32)))
    x, _ = dependent(40_000)
    train(flow, x.float(), optim=partial(torch.optim.Adam, lr=2e-3), epochs=8, batch_size=250, progress=False)
    new, exact = dependent(20_000)
    gap = exact - log_likelihood(flow, new).values
    error = 4.5 * gap.std() / len(gap) ** 0.5
    assert -error < gap.mean() < 0.03 - error


def test_angles_are_left_alone_and_other_coordinates_standardised():
    x, _ = dependent(500)
    family = Flow((3,), support=MIXED)
    family.standardize(x)
    z = family.pretransform(x)
    assert z[:, 0].equal(x[:, 0].float())
    assert_close(z[:, 1:].mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    assert_close(z[:, 1:].std(0), torch.ones(2))
    assert_close(z[:, 2].std() * x[:, 2].log().std(), x[:, 2].log().std(), check_dtype=False)


def test_angles_on_both_sides_of_the_seam_are_no_outliers():
    """Of angles near the seam a few lie on its other side: far away as numbers, and near on the circle."""
    angle = torch.full((1000,), 3.13) + 0.003 * torch.randn(1000)
    angle = torch.remainder(angle + pi, 2 * pi) - pi
    assert 0 < (angle < 0).sum() < 10
    family = Flow((2,), support=by_column(circular, REAL))
    family.standardize(torch.stack([angle, torch.randn(1000)], -1))
    assert family.loc[0] == 0
    assert family.scale[0] == 1


def test_a_constant_angle_is_warned_of_by_its_number():
    x = torch.stack([torch.randn(100), torch.full((100,), 3.1)], 1)
    with pytest.warns(UserWarning, match="the coordinate 1 is constant in all 100 rows"):
        Flow((2,), support=by_column(REAL, circular)).standardize(x)


def test_other_units_give_the_same_flow():
    """The density in the units of the data is that in the other ones, times the ratio of the units."""
    x = dependent(200)[0]
    units = torch.tensor([1.0, 60.0, 1e-6], dtype=torch.float64)
    log_p = []
    for scale, support in ((torch.ones(3), MIXED), (units, by_column(circular, constraints.interval(0.0, 60.0), POSITIVE))):
        torch.manual_seed(1)
        family = Flow((3,), support=support, transform=NSF(**SMALL))
        family.standardize(x * scale)
        log_p.append(family().log_prob(x * scale) + scale.log().sum())
    assert_close(*log_p, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        (0, 3.2, ["in column 0", "outside its support circular", r"torch\.remainder\(angle \+ pi, 2 \* pi\) - pi"]),
        (1, 1.5, ["in column 1", "outside its support Interval.*upper_bound=1.0"]),
        (1, 1.0, ["in column 1", "1 values at an end of its support Interval"]),
        (2, -1.0, ["in column 2", "outside its support GreaterThan.*lower_bound=0.0"]),
    ],
)
def test_a_value_outside_is_refused_by_its_column_and_bound(column, value, words):
    x = torch.tensor([[0.5, 0.5, 0.5]])
    x[0, column] = value
    with refused(*words):
        Flow((3,), support=MIXED).model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_of_a_circle_are_one_angle(dtype):
    """The upper end is what `atan2` returns for a negative number."""
    end = torch.atan2(torch.zeros((), dtype=dtype), -torch.ones((), dtype=dtype))
    low, high = (torch.stack([a, a.new_tensor(0.5), a.new_tensor(0.5)])[None] for a in (-end, end))
    family = perturb(Flow((3,), support=MIXED, transform=NSF(**SMALL)).to(dtype), 0.3).eval()
    family.validate(high)
    assert_close(family().log_prob(high), family().log_prob(low), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [ODEFlow, Diffusion, EnergyModel, GAN, VAE, Autoregressive])
def test_families_without_circles_say_so(family):
    with refused(f"{family.__name__} has no coordinates on a circle", "Use Flow"):
        family((2,), support=by_column(circular, REAL))


@pytest.mark.parametrize("transform", [MAF(), Glow()])
def test_layers_without_circles_say_so(transform):
    with refused(f"{type(transform).__name__} has no circular layers", r"Use NSF\(\)"):
        Flow((2,), support=circular, transform=transform)


@pytest.mark.parametrize(
    ("support", "words"),
    [
        (by_column(REAL, POSITIVE, UNIT), ["sets for 3 columns", "last dimension of an event has 2"]),
        (constraints.cat([REAL, POSITIVE], dim=-1, lengths=[2, 1]), ["sets for 3 columns", "last dimension of an event has 2"]),
        (constraints.stack([REAL, POSITIVE]), ["along the last dimension, but found dim=0", r"stack\(\[...\], dim=-1\)"]),
        (by_column(REAL, constraints.simplex), ["one number in each row", "Simplex"]),
        (by_column(REAL, constraints.interval(torch.zeros(2), torch.ones(2))), ["one number in each row", "Interval"]),
        (by_column(REAL, constraints.boolean), ["Flow has a density over real numbers", "ByColumn"]),
    ],
)
def test_what_is_no_set_for_each_column_is_refused(support, words):
    with refused(*words):
        Flow((2,), support=support)


def test_one_number_has_no_columns():
    with refused("sets for 1 columns", "has 0"):
        Flow((), support=by_column(REAL))
    assert Flow((), support=circular)().sample().shape == ()


@pytest.mark.parametrize("options", [{"levels": 4}, {"standardize": "jointly"}])
def test_what_does_not_go_with_angles_is_refused(options):
    with refused("leave out|Use True"):
        Flow((2,), support=by_column(circular, REAL), **options)


def test_torchs_joined_supports_are_one_for_each_column():
    joined = constraints.cat([constraints.cat([REAL, POSITIVE], dim=-1), UNIT, circular], dim=-1, lengths=[2, 3, 1])
    support = support_by_column(constraints.independent(joined, 1), (6,))
    assert [str(each) for each in support.cseq] == [str(s) for s in (REAL, POSITIVE, UNIT, UNIT, UNIT, circular)]
    assert support_by_column(by_column(POSITIVE, constraints.greater_than(0.0)), (2,)) is POSITIVE
    assert support_by_column(by_column(REAL, REAL), (4, 2)) is REAL
    assert support_by_column(UNIT, (3,)) is UNIT


def test_neighbouring_columns_of_one_set_are_checked_together():
    support = ByColumn([POSITIVE, constraints.greater_than(0.0), REAL, UNIT, UNIT, POSITIVE])
    wanted = [(POSITIVE, 2), (REAL, 1), (UNIT, 2), (POSITIVE, 1)]
    assert [(str(each), n) for each, n in support.runs] == [(str(each), n) for each, n in wanted]
    x = torch.tensor([[1.0, -1.0, -1.0, 0.5, 2.0, 3.0]])
    assert support.check(x).tolist() == [[True, False, True, True, False, True]]


def test_columns_are_mapped_like_each_of_them():
    """Right values: torch's map of each column alone."""
    support = ByColumn([POSITIVE, UNIT, UNIT, REAL, circular])
    u = torch.randn(4, 2, 5, dtype=torch.float64)
    transform = biject_to(support)
    x = transform(u)
    assert support.check(x).all()
    for i, each in enumerate(support.cseq):
        alone = biject_to(each)
        assert_close(x[..., i], alone(u[..., i]))
        assert_close(transform.inv(x)[..., i], u[..., i])
        assert_close(transform.log_abs_det_jacobian(u, x)[..., i], alone.log_abs_det_jacobian(u[..., i], x[..., i]))


@pytest.mark.parametrize("family", [Flow, ODEFlow, Diffusion])
def test_a_density_of_levels_is_on_their_interval(family):
    """Mass outside would be that of no integer: probabilities of all outcomes would sum to less than 1."""
    for support in (by_column(REAL, UNIT), by_column(REAL, POSITIVE), POSITIVE, UNIT, constraints.interval(0.0, 4.0)):
        with refused(r"levels=5 by a density on \(0, 5\), but found support=", "Leave support out"):
            family((2,), support=support, levels=5)
    for support in (REAL, constraints.interval(0.0, 5.0)):
        found = family((2,), support=support, levels=5).support
        assert (found.lower_bound, found.upper_bound) == (0, 5)


# Other families, files, samplers and exports.

LINES = by_column(REAL, POSITIVE, UNIT)


def lines(n):
    return torch.cat([torch.randn(n, 1), torch.randn(n, 1).exp(), torch.rand(n, 1)], -1)


@pytest.mark.parametrize(
    "build",
    [
        lambda **kwargs: Flow((3,), transform=NSF(**SMALL), **kwargs),
        lambda **kwargs: ODEFlow((3,), network=DenseField(16, blocks=1), solver=RK4(2), **kwargs),
        lambda **kwargs: Diffusion((3,), network=DenseField(16, blocks=1), likelihood=FlowDensity(RK4(2)), **kwargs),
        lambda **kwargs: Autoregressive((3,), **kwargs),
        lambda **kwargs: EnergyModel((3,), **kwargs),
    ],
    ids=["Flow", "ODEFlow", "Diffusion", "Autoregressive", "EnergyModel"],
)
def test_a_set_for_each_column_is_mapped_by_any_family(build):
    """Right values: the density of the same family of real numbers, times the slopes of the maps."""
    x = lines(20).double()
    x[:, 1:] = x[:, 1:].clamp(1e-3, 1 - 1e-3)
    z = torch.stack([x[:, 0], x[:, 1].log(), x[:, 2].logit()], -1)
    slopes = -x[:, 1].log() - x[:, 2].log() - (1 - x[:, 2]).log()
    log_p = []
    for support in (LINES, REAL):
        torch.manual_seed(1)
        d = build(support=support, standardize=False).double().eval()()
        log_p.append(d.unnormalized_log_prob(z if support is REAL else x))
    assert_close(log_p[0], log_p[1] + slopes)


@pytest.mark.parametrize("family", [GAN, VAE])
def test_samples_lie_in_the_set_of_each_column(family):
    made = family((3,), support=LINES)
    x = made().sample((200,))
    assert LINES.check(x).all()


def test_missing_values_want_a_likelihood_for_each_column():
    with refused("missing=True wants a support of single coordinates", r"Mixed.of\(x\)"):
        VAE((3,), support=LINES, missing=True)


@pytest.mark.parametrize("family", [VAE, Autoregressive])
def test_columns_of_integers_want_a_likelihood_of_their_own(family):
    with refused("is a likelihood of real numbers", r"Mixed\(\[...\]\) for columns of different kinds, and leave support out"):
        family((2,), support=by_column(REAL, constraints.boolean))


@pytest.mark.parametrize(
    "support",
    [
        MIXED,
        constraints.cat([circular, constraints.stack([UNIT, POSITIVE], dim=-1)], dim=-1, lengths=[1, 2]),
        circular,
    ],
    ids=["stack", "cat", "circle"],
)
def test_a_family_is_rebuilt_from_its_file(tmp_path, support):
    x, _ = dependent(40)
    family = Flow((3,), support=support, transform=NSF(randperm=True, **SMALL))
    x = x.float() if support is not circular else torch.remainder(x.float(), 3)
    family.standardize(x)
    path = tmp_path / "flow.safetensors"
    checkpoints.save(path, family)
    again = checkpoints.load(path)
    assert str(again.data_support) == str(family.data_support)
    assert again().log_prob(x).equal(family().log_prob(x))


def test_a_trained_flow_is_evaluated_and_exported():
    x, _ = dependent(60)
    family = Flow((3,), support=MIXED, transform=NSF(transforms=1, hidden=(8,)))
    train(family, x.float(), epochs=1, batch_size=30, progress=False)
    assert log_likelihood(family, x).values.shape == (60,)
    data = to_arviz(family, x.float(), num_samples=2, progress=False)
    drawn = torch.as_tensor(data.posterior_predictive["x"].to_numpy())
    assert drawn.shape == (1, 2, 60, 3)
    assert family.data_support.check(drawn).all()


def test_a_users_module_of_angles_has_the_uniform_base():
    """Right value: a rotation leaves the uniform density."""
    import zuko

    family = Flow((2,), support=circular, transform=zuko.flows.NCSF(2, transforms=1, hidden_features=(8,)))
    with torch.no_grad():
        for p in family.parameters():
            p.zero_()
    assert_close(family().log_prob(torch.rand(5, 2)), torch.full((5,), -2 * log(2 * pi)))


def test_a_spline_of_an_angle_has_one_slope_on_both_sides_of_its_cut():
    """The cut of a layer is where the rotated angle jumps from pi to -pi."""
    widths, heights, derivatives = torch.randn(3, 4, 8, dtype=torch.float64)
    rotation, angles = torch.randn(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    bound = torch.full((4,), pi, dtype=torch.float64)
    spline = CircularSpline(widths, heights, derivatives, rotation, angles, bound)
    x = wrapped(pi - rotation)
    (low, slope_low), (high, slope_high) = (spline.call_and_ladj(x + step) for step in (-1e-9, 1e-9))
    assert_close(low - high, torch.full_like(x, 2 * pi))
    assert_close(slope_low, slope_high)
    assert_close(slope_low, derivatives[:, 0] / (1 + derivatives[:, 0].abs() / abs(log(1e-3))))
    assert_close(wrapped(spline.inv(low) - x), torch.full_like(x, -1e-9), atol=1e-12, rtol=0)


def test_layers_in_which_no_coordinate_reads_another_are_circles_and_lines():
    """Right value: without dependence, the density is the product of those of the coordinates."""
    d = flow(circular, REAL, transform=NSF(passes=1, **SMALL))()
    a, b = d.sample((2, 5))
    swapped = torch.stack([a[:, 0], b[:, 1]], -1), torch.stack([b[:, 0], a[:, 1]], -1)
    assert_close(d.log_prob(a) + d.log_prob(b), sum(d.log_prob(part) for part in swapped))
