"""Spaces of chain positions: conversions, neighbours, and exponential families against sums over all positions."""

import pytest
import torch
from teachers import outcomes
from torch.distributions import AffineTransform

from pyro_genmodels.samplers import Binary, OneHot, Reals

pytestmark = pytest.mark.usefixtures("float64")
DISCRETE = pytest.mark.parametrize("space", [Binary(), OneHot(2), OneHot(3)], ids=repr)


def data_and_positions(space):
    """Return all data of two coordinates, and their positions."""
    x = outcomes(space.num_levels, 2)
    return x, space.encode(x)


@DISCRETE
def test_discrete_data_are_encoded_and_decoded(space):
    x, u = data_and_positions(space)
    assert u.shape[1:] == space.position_shape((2,))
    assert u.dtype == torch.float64
    assert space.encode(x, torch.float32).dtype == torch.float32
    assert space.contains(u)
    torch.testing.assert_close(space.decode(u).long(), x)


def test_real_data_are_mapped_by_their_coordinates():
    space = Reals(AffineTransform(1.0, 2.0))
    u = torch.randn(4, 3)
    torch.testing.assert_close(space.encode(1.0 + 2.0 * u), u)
    torch.testing.assert_close(space.decode(u), 1.0 + 2.0 * u)
    torch.testing.assert_close(space.log_det(u), torch.full((4, 3), 2.0).log())


@DISCRETE
def test_the_log_sum_runs_over_all_positions(space):
    u = data_and_positions(space)[1].flatten(1)
    natural = torch.randn(5, u.shape[1])
    torch.testing.assert_close(space.log_sum(natural), (natural @ u.T).logsumexp(-1))


def test_the_log_sum_over_real_numbers_is_a_mean_under_a_standard_normal():
    natural, u = torch.tensor([[0.7], [-1.3]]), torch.linspace(-12, 12, 4001)
    density = torch.exp(-0.5 * u**2) / (2 * torch.pi) ** 0.5
    mean = ((natural * u).exp() * density).sum(-1) * (u[1] - u[0])
    torch.testing.assert_close(Reals().log_sum(natural), mean.log())


@DISCRETE
def test_the_start_has_its_natural_parameters_up_to_a_constant(space):
    u = data_and_positions(space)[1]
    natural = torch.randn(space.position_shape((2,)))
    start = space.start(natural)
    log_p = start.log_prob(u).sum(-1)
    torch.testing.assert_close(log_p, u.flatten(1) @ natural.flatten() - space.log_sum(natural.flatten()))
    torch.testing.assert_close(log_p, u.flatten(1) @ space.natural(start) - space.log_sum(space.natural(start)))


@DISCRETE
def test_a_neighbour_differs_in_one_coordinate_and_has_a_way_back(space):
    u = data_and_positions(space)[1]
    score = torch.randn(len(u), *u.shape[1:])
    changes = space.changes(u, score).flatten(1)
    for neighbour in range(changes.shape[1]):
        allowed = changes[:, neighbour].isfinite()
        index = torch.full((len(u), 1), neighbour)
        moved, back = space.move(u, index, 1)
        assert ((space.decode(moved) != space.decode(u)).sum(-1) == allowed.long()).all()
        first_order = 0.5 * (score * (moved - u)).flatten(1).sum(-1)
        torch.testing.assert_close(changes[allowed, neighbour], first_order[allowed])
        assert torch.equal(space.move(moved, back, 1)[0][allowed], u[allowed])
