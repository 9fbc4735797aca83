"""Distances are right at any offset and in any unit."""

import pytest
import torch

from pyro_genmodels.utils.distances import distances

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_offset_changes_no_distance(dtype, offset):
    x, y = torch.randint(0, 8, (20, 3)).to(dtype), torch.randint(0, 8, (30, 3)).to(dtype)  # exact at every offset
    truth = (x[:, None] - y).square().sum(-1)
    torch.testing.assert_close(distances(x + offset, y + offset), truth.sqrt())


@pytest.mark.parametrize("unit", [1e-25, 1e-10, 1e10, 1e20, 1e30])
def test_distances_neither_overflow_nor_vanish(unit):
    x, y = torch.randn(20, 3), torch.randn(30, 3)
    truth = (x.double()[:, None] - y.double()).square().sum(-1).sqrt() * unit
    torch.testing.assert_close(distances(x * unit, y * unit).double(), truth, rtol=1e-6, atol=0.0)


def test_gradient_is_zero_at_zero_distance_and_nan_is_kept():
    x = torch.zeros(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(distances(x, torch.zeros(4, 3)).sum() + distances(x, torch.ones(1, 3)).square().sum(), x)
    torch.testing.assert_close(grad, -2 * torch.ones(2, 3))
    found = distances(torch.tensor([[torch.nan, 0.0], [0.0, 0.0]]), torch.zeros(1, 2))
    assert found[0].isnan().all()
    assert found[1] == 0


def test_integers_count_as_torch_default_dtype():
    found = distances(torch.tensor([[0], [3]]), torch.tensor([[False]]))
    assert torch.equal(found, torch.tensor([[0.0], [3.0]]))
    assert found.dtype == torch.get_default_dtype()
    assert distances(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("shapes", [((2,), (3, 1)), ((2, 3), (2, 2)), ((2, 2, 2), (2, 2))])
def test_rows_of_different_lengths_are_refused(shapes):
    with pytest.raises(ValueError, match="rows of one length"):
        distances(*map(torch.zeros, shapes))
