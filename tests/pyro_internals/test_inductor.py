"""What Inductor gets wrong by itself: digits of expm1 on the CPU, and the elements that random numbers go to."""

import warnings

import pytest
import torch

from pyro_genmodels._pyro.inductor import compile_graph
from pyro_genmodels.infer.compiled.graph import trace


def compiled(function, x):
    graph = trace(lambda x: (function(x),), x)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        return compile_graph(graph.module, [x, *graph.read])(x, *graph.read)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_expm1_has_all_digits(dtype):
    x = torch.logspace(-30, 2, 65).to(dtype)
    x = torch.cat([x, -x, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)])
    # Three roundings of values and one each of exp and log, each of at most one unit: ten units are enough.
    torch.testing.assert_close(
        compiled(torch.expm1, x), torch.expm1(x), rtol=10 * torch.finfo(dtype).eps, atol=0, equal_nan=True
    )


@pytest.mark.slow
def test_compiled_dropout_of_memory_that_is_not_contiguous_drops_what_eager_dropout_drops():
    layer = torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    x = torch.randn(4, 3, 4)
    torch.manual_seed(0)
    found = compiled(layer, x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, layer(x).detach(), rtol=1e-4, atol=1e-5)


RANDOM = [
    lambda y: torch._standard_gamma(y.exp()),
    lambda y: torch._standard_gamma(y.exp().contiguous()),
    lambda y: torch.poisson(y.exp()),
    lambda y: torch.normal(y, y.exp()),
    lambda y: torch.normal(1.0, y.exp()),
    lambda y: torch.bernoulli(y, 0.3),
    lambda y: torch.bernoulli(y.sigmoid()),
    lambda y: torch.rand_like(y),
    lambda y: torch.binomial(torch.full_like(y, 9.0), y.sigmoid()),
    lambda y: torch._sample_dirichlet(y.exp()),
    lambda y: (y * 2).contiguous().normal_(),
    lambda y: torch.zeros(8, 6, 4)[::2, ::2].random_(100),
]


@pytest.mark.slow
def test_compiled_random_numbers_go_to_the_elements_that_eager_ones_go_to():
    weight = torch.randn(4, 4) * 0.5
    x = torch.rand(12, 4)

    def draw(x):
        y = (x @ weight).view(4, 3, 4).permute(2, 0, 1)  # not contiguous, and of a layout that a compiler may change
        return torch.cat([part for random in RANDOM for r in [random(y)] for part in (r.sum(-1).flatten(), r.flatten())])

    torch.manual_seed(0)
    found = compiled(draw, x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, draw(x), rtol=1e-4, atol=1e-4)
