"""Plots at any scale of the data, and of values that are not finite."""

import pytest
import torch

from pyro_genmodels.evaluation import plots

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_limits_have_a_margin_of_a_tenth_at_any_scale(scale, shift):
    """At a scale of 1e-9 the points were one dot in a plot of 2e-4."""
    points = (torch.rand(100, 2, dtype=torch.float64) + shift) * scale
    low, high = (torch.tensor(corner) for corner in plots.plot_limits(points))
    span = (points.max(0).values - points.min(0).values).float()
    torch.testing.assert_close((high - low) / span, torch.full((2,), 1.2))


def test_limits_of_one_point_and_of_points_that_are_not_finite():
    assert plots.plot_limits(torch.tensor([[0.0, 200.0]] * 3)) == ([-0.1, 180.0], [0.1, 220.0])
    assert plots.plot_limits(torch.tensor([[0.0, 0.0], [1.0, 1.0], [NAN, 5.0], [INF, -9.0]]))[1] == pytest.approx([1.1, 1.1])
    with pytest.raises(ValueError, match="none is finite"):
        plots.plot_limits(torch.full((3, 2), NAN))


def test_points_that_are_not_finite_are_counted_in_the_title():
    figure = plots.scatters({"data": torch.randn(9, 2), "model": torch.tensor([[0.0, 0.0], [NAN, 0.0], [INF, 1.0]])})
    assert [ax.get_title() for ax in figure.axes] == ["data", "model\n(2 points not finite)"]


def test_densities_and_energies_that_are_not_finite_leave_the_scale_as_it_is():
    grid = plots.lattice([0.0, 0.0], [1.0, 1.0], 4)
    log_p = -grid.square().sum(1)
    odd = log_p.clone()
    odd[:3] = torch.tensor([NAN, -INF, INF])
    figure = plots.densities({"a": log_p, "b": odd}, [0.0, 0.0], [1.0, 1.0])
    assert figure.axes[0].images[0].get_clim() == pytest.approx((-10, 0))
    assert figure.axes[-1].get_ylabel() == "log density (nats)"
    figure = plots.surfaces({"b": odd}, [0.0, 0.0], [1.0, 1.0])
    assert figure.axes[-1].get_ylabel() == "energy above the lowest (nats)"
    plots.densities({"all": torch.full((16,), NAN)}, [0.0, 0.0], [1.0, 1.0])
