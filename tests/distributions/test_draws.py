"""Samples are samples of the density that `log_prob` states: of numerical inverses, and near the ends of a support."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_genmodels import Flow
from pyro_genmodels.distributions.flow import NormalizingFlow
from pyro_genmodels.families import BPF, NAF, SOSPF, UNAF

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


def test_a_context_stays_with_its_row_where_samples_are_drawn_anew():
    def transform(context: Tensor | None) -> torch.distributions.Transform:
        shift = torch.distributions.AffineTransform(context, 1.0)
        parts = [torch.distributions.ComposeTransform([shift.inv, torch.distributions.TanhTransform()])]
        return torch.distributions.IndependentTransform(parts[0], 1)

    flow = NormalizingFlow(
        transform, dist.Normal(0.0, 1.0), (1,), numerical_inverse=True, context=torch.tensor([[0.0], [1000.0]])
    )
    with pytest.warns(RuntimeWarning, match="drawn anew"):
        x = flow.sample((200,))
    assert (x[:, 0] < 500).all()
    assert (x[:, 1] > 500).all()


def test_a_flow_whose_samples_are_never_found_is_an_error():
    nowhere = torch.distributions.IndependentTransform(torch.distributions.ComposeTransform([_Unreachable()]), 1)
    flow = NormalizingFlow(lambda context: nowhere, dist.Normal(0.0, 1.0), (1,), numerical_inverse=True)
    with pytest.raises(FloatingPointError, match="50 of 50 samples of the base have no inverse.*NSF"):
        flow.sample((50,))


class _Unreachable(torch.distributions.AffineTransform):
    """A shift whose inverse is wrong."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)

    def _inverse(self, y: Tensor) -> Tensor:
        return y + 5.0
