"""Plots of samples, densities, energies, velocity fields and training curves."""

from __future__ import annotations

__all__ = [
    "VelocityPanel",
    "densities",
    "image_grids",
    "lattice",
    "loss_curves",
    "plot_limits",
    "scatters",
    "surfaces",
    "velocity_fields",
]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_genmodels.utils.errors import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_grids(panels: Mapping[str, Tensor], *, columns: int = 10) -> Figure:
    """Plot grids of images, dark on light, with one panel per title and up to four panels side by side.

    Args:
        panels: title -> images, (N, height, width), N at least 1.
        columns: number of images in a row of a panel.
    """
    grids = [_tile(images, columns) for images in panels.values()]
    inches = 0.06 * max(grid.shape[1] for grid in grids), 0.06 * max(grid.shape[0] for grid in grids) + 0.4
    across = min(4, len(grids))
    down = ceil(len(grids) / across)
    figure = _figure(figsize=(inches[0] * across, inches[1] * down))
    figure.get_layout_engine().set(wspace=0.06)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, title, grid in zip(axes, panels, grids, strict=False):
        ax.imshow(grid.cpu().numpy(), cmap="gray_r", interpolation="nearest")
        ax.set_title(title)
    return figure


def _tile(images: Tensor, columns: int) -> Tensor:
    """Return images (N, height, width) tiled into one, (rows * (height + 2), columns * (width + 2))."""
    n, height, width = images.shape
    rows = ceil(n / columns)
    padded = images.new_full((rows * columns, height + 2, width + 2), images.min().item())
    padded[:n, 1:-1, 1:-1] = images
    return padded.unflatten(0, (rows, columns)).transpose(1, 2).reshape(rows * (height + 2), columns * (width + 2))


def scatters(panels: Mapping[str, Tensor]) -> Figure:
    """Plot points in the plane, with one panel per title and the limits of the first panel in all of them.

    Points that are not finite are left out, and the title says how many.

    Args:
        panels: title -> points, (N, 2), in the units of the data.
    """
    figure = _figure(figsize=(3 * len(panels), 3.2))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    low, high = plot_limits(next(iter(panels.values())))
    for ax, (title, points) in zip(axes, panels.items(), strict=True):
        finite = points.isfinite().all(1)
        x, y = points[finite].cpu().T.numpy()
        ax.scatter(x, y, s=1, alpha=0.5, linewidths=0)
        note = "" if finite.all() else f"\n({int((~finite).sum())} points not finite)"
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title=f"{title}{note}")
    return figure


def densities(panels: Mapping[str, Tensor], low: Sequence[float], high: Sequence[float]) -> Figure:
    """Plot log densities in the plane, with one panel per title and one colour scale, cut 10 nats below the highest.

    Args:
        panels: title -> log densities (nats) at `lattice(low, high, n)`, (n * n,).
        low: lower left corner of a panel.
        high: upper right corner of a panel.
    """
    figure = _figure(figsize=(3 * len(panels), 3.2))
    top = max(_finite(log_p).max().item() for log_p in panels.values())
    for ax, (title, log_p) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        n = round(len(log_p) ** 0.5)
        image = log_p.reshape(n, n).clamp(min=top - 10).cpu().numpy()
        extent = (low[0], high[0], low[1], high[1])
        mappable = ax.imshow(image, origin="lower", extent=extent, vmin=top - 10, vmax=top, aspect="auto", cmap="magma")
        ax.set_title(title)
    figure.colorbar(mappable, ax=figure.axes, label="log density (nats)")
    return figure


def surfaces(panels: Mapping[str, Tensor], low: Sequence[float], high: Sequence[float]) -> Figure:
    """Plot energies in the plane with contour lines, with one panel per title, relative to the lowest and cut at 20 nats.

    Args:
        panels: title -> energies (nats) at `lattice(low, high, n)`, (n * n,).
        low: lower left corner of a panel.
        high: upper right corner of a panel.
    """
    figure = _figure(figsize=(3.4 * len(panels), 3.2))
    for ax, (title, energies) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        n = round(len(energies) ** 0.5)
        surface = (energies - _finite(energies).min()).reshape(n, n).clamp(0, 20).cpu().numpy()
        x, y = (torch.linspace(a, b, n).numpy() for a, b in zip(low, high, strict=True))
        mappable = ax.contourf(x, y, surface, levels=20, cmap="magma")
        ax.contour(x, y, surface, levels=10, colors="white", linewidths=0.4)
        ax.set_title(title)
    figure.colorbar(mappable, ax=figure.axes, label="energy above the lowest (nats)")
    return figure


@dataclass(frozen=True)
class VelocityPanel:
    """Trajectories of points in the plane from noise to data.

    Attributes:
        times: times of the frames, from 0 to 1, (T,).
        frames: points at these times, (T, N, 2).
        velocity: function of points (m, 2) and times (m,) that returns the learned velocity, (m, 2).
    """

    times: Tensor
    frames: Tensor
    velocity: Callable[[Tensor, Tensor], Tensor]


def velocity_fields(panels: Mapping[str, VelocityPanel], *, arrows: int = 15) -> Figure:
    """Plot trajectories from noise to data in the plane, with one row per title: points, and arrows of the velocity.

    The arrows of a row share one scale; the longest spans two spacings of the arrows.

    Args:
        panels: title -> trajectories, all with the same number of frames.
        arrows: number of arrows along each side of a panel.
    """
    columns = len(next(iter(panels.values())).times)
    figure = _figure(figsize=(2.4 * columns, 2.6 * len(panels)))
    for axes, (title, panel) in zip(figure.subplots(len(panels), columns, squeeze=False), panels.items(), strict=True):
        low, high = plot_limits(panel.frames.flatten(0, 1))
        points = lattice(low, high, arrows).to(panel.frames)
        velocities = torch.stack([panel.velocity(points, t.expand(len(points))) for t in panel.times])
        fastest = _finite(velocities.norm(dim=-1)).max().item() or 1.0
        scale = {"angles": "xy", "scale_units": "xy", "scale": arrows / 2 * fastest / (high[0] - low[0])}
        for ax, t, points_then, velocity in zip(axes, panel.times, panel.frames, velocities, strict=True):
            ax.quiver(*points.cpu().T.numpy(), *velocity.cpu().T.numpy(), color="0.6", width=0.004, **scale)
            ax.scatter(*points_then.cpu().T.numpy(), s=2, alpha=0.5, linewidths=0)
            ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[], title=f"t = {t:.2f}")
        axes[0].set_ylabel(title)
    return figure


def plot_limits(points: Tensor) -> tuple[list[float], list[float]]:
    """Return the lower left and upper right corner of a plot of points, (N, 2), with a margin.

    Points that are not finite do not count. The margin is a tenth of the range, in any unit, and where the points are all the
    same, a tenth of their size.

    Raises:
        ValueError: if no point is finite.

    Example:
        >>> plot_limits(torch.tensor([[0.0, 4.0], [10.0, 4.0], [float("nan"), 0.0]]))
        ([-1.0, 3.6], [11.0, 4.4])
    """
    points = points[points.isfinite().all(1)].double()
    if not len(points):
        raise ValueError("A plot wants points, but none is finite.")
    low, high = points.min(0).values, points.max(0).values
    size = torch.maximum(low.abs(), high.abs())
    is_one_value = high - low <= 1e-7 * size  # about the rounding of single precision
    margin = 0.1 * torch.where(is_one_value, torch.where(size > 0, size, 1.0), high - low)
    return (low - margin).tolist(), (high + margin).tolist()


def _finite(values: Tensor) -> Tensor:
    """Return the values that are finite, or a zero if none is."""
    found = values[values.isfinite()]
    return found if len(found) else values.new_zeros(1)


def lattice(low: Sequence[float], high: Sequence[float], n: int) -> Tensor:
    """Return the points of an n by n grid between two corners, (n * n, 2); the first coordinate varies fastest."""
    x, y = (torch.linspace(a, b, n) for a, b in zip(low, high, strict=True))
    return torch.stack([x.repeat(n), y.repeat_interleave(n)], 1)


def loss_curves(
    histories: Mapping[str, Sequence[Mapping[str, float]]], units: Mapping[str, Mapping[str, str]] | None = None
) -> Figure:
    """Plot the training loss (dotted) and validation loss (solid) of each fit over epochs, with one panel for each unit.

    Up to four panels stand side by side.

    Args:
        histories: title -> history of a fit, one record per epoch with the keys "epoch", "train" and, if known, "valid".
        units: title -> what the losses measure, {"train": "nats", "valid": "nats"}, as in `Fit.units`.
    """
    columns = [(name, key) for name, history in histories.items() for key in ("train", "valid") if key in history[0]]
    unit_of = {(name, key): (units or {}).get(name, {}).get(key, "loss") for name, key in columns}
    panels = list(dict.fromkeys(unit_of.values()))
    across, down = min(4, len(panels)), ceil(len(panels) / 4)
    figure = _figure(figsize=(7 if len(panels) == 1 else 5 * across, 4.5 * down))
    places = figure.subplots(down, across, squeeze=False).ravel()
    for ax in places[len(panels) :]:
        ax.set_axis_off()
    axes = dict(zip(panels, places, strict=False))
    values: dict[str, list[float]] = {unit: [] for unit in panels}
    for (name, key), unit in unit_of.items():
        history, color = histories[name], f"C{list(histories).index(name)}"
        losses = [record.get(key, float("nan")) for record in history]
        values[unit] += [loss for loss in losses if isfinite(loss)]
        has_label = key == "valid" or unit_of.get((name, "valid")) != unit
        axes[unit].plot(
            [record["epoch"] for record in history],
            losses,
            ":" if key == "train" else "-",
            color=color,
            linewidth=1 if key == "train" else None,
            marker="." if len(history) < 5 else "",
            label=name if has_label else None,
        )
    for unit, ax in axes.items():
        found = sorted(values[unit]) or [0.0]
        best, usual = found[0], found[int(0.9 * (len(found) - 1))]
        margin = 0.1 * (usual - best) or abs(best) or 1.0
        ax.set_ylim(best - margin, usual + 3 * margin)  # the first epochs may leave the picture
        ax.set(xlabel="epoch", ylabel=f"{'nats per datum' if unit == 'nats' else unit} (dotted: training)")
        ax.legend()
    return figure


def _figure(*, figsize: tuple[float, float]) -> Any:
    return import_extra("matplotlib.figure", extra="eval", by="A picture").Figure(figsize=figsize, layout="constrained")
