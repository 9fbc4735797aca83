"""Normal approximations along paths of an optimiser, where variables are strongly correlated."""

import pyro
import pyro.distributions as dist
import torch

from pyro_genmodels import log_density
from pyro_genmodels.infer.compiled import Captured
from pyro_genmodels.infer.compiled.batched import BatchedDensity
from pyro_genmodels.posteriors.pathfinder import climb, find_start, history_length

DIM = 20


def covariance():
    """Return a covariance with variances from 1e-4 to 1 in directions that mix all coordinates, (20, 20)."""
    vectors, _ = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return vectors * torch.logspace(-4, 0, DIM, dtype=torch.float64) @ vectors.T


def correlated():
    """Return the density of a normal distribution with that covariance."""
    matrix = covariance()

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.ones(DIM, dtype=matrix.dtype), matrix))

    return BatchedDensity(log_density(model, mode=Captured(script=False)))


def test_a_path_over_strong_correlations_is_short_and_finds_them():
    """The mode of a quadratic function of 20 coordinates is found in a few times as many steps, whatever its condition number.

    The bound of a normal approximation is minus its divergence from the posterior. It is computed here in closed form. A start
    with a divergence of half a nat is one whose draws serve as those of the posterior do.
    """
    pyro.set_rng_seed(0)
    density = correlated()
    for start in density.density.initial_points(2):
        path = climb(density, start, 1000)
        assert len(path.points) < 8 * DIM
        assert (path.points[-1] - 1).abs().max() < 0.01
    start = find_start(density)
    posterior = dist.MultivariateNormal(torch.ones(DIM, dtype=torch.float64), covariance())
    found = dist.MultivariateNormal(start.loc, start.covariance())
    assert torch.distributions.kl_divergence(found, posterior) < 0.5


def test_the_history_is_bounded():
    assert [history_length(dim) for dim in (1, 3, 10, 25, 1000)] == [6, 6, 20, 50, 50]
