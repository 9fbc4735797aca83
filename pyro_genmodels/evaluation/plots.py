"""Pictures of what was learned."""

from __future__ import annotations

__all__ = [
    "VelocityPanel",
    "densities",
    "frame",
    "image_grids",
    "lattice",
    "loss_curves",
    "scatters",
    "surfaces",
    "velocity_fields",
]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_genmodels.utils.errors import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_grids(panels: Mapping[str, Tensor], *, columns: int = 10) -> Figure:
    """Images in rows, dark on light, a panel for each title, four side by side.

    Args:
        panels: title -> images, (N, height, width), N at least 1.
        columns: images in a row of a panel.
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
    """Images side by side in one, (rows * (height + 2), columns * (width + 2))."""
    n, height, width = images.shape
    rows = ceil(n / columns)
    padded = images.new_full((rows * columns, height + 2, width + 2), images.min().item())
    padded[:n, 1:-1, 1:-1] = images
    return padded.unflatten(0, (rows, columns)).transpose(1, 2).reshape(rows * (height + 2), columns * (width + 2))


def scatters(panels: Mapping[str, Tensor]) -> Figure:
    """Points in the plane, a panel for each title, all on the axes of the first.

    Args:
        panels: title -> points, (N, 2).
    """
    figure = _figure(figsize=(3 * len(panels), 3.2))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    low, high = frame(next(iter(panels.values())))
    for ax, (title, points) in zip(axes, panels.items(), strict=True):
        x, y = points.cpu().T.numpy()
        ax.scatter(x, y, s=1, alpha=0.5, linewidths=0)
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title=title)
    return figure


def densities(panels: Mapping[str, Tensor], low: Sequence[float], high: Sequence[float]) -> Figure:
    """Densities in the plane, a panel for each title, on one scale of colours.

    Args:
        panels: title -> log density (nats) at `lattice(low, high, n)`, (n * n,).
        low: corner of the picture.
        high: the other corner.
    """
    figure = _figure(figsize=(3 * len(panels), 3.2))
    top = max(log_p.max().item() for log_p in panels.values())
    for ax, (title, log_p) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        n = round(len(log_p) ** 0.5)
        image = log_p.reshape(n, n).clamp(min=top - 10).cpu().numpy()
        extent = (low[0], high[0], low[1], high[1])
        drawn = ax.imshow(image, origin="lower", extent=extent, vmin=top - 10, vmax=top, aspect="auto", cmap="magma")
        ax.set_title(title)
    figure.colorbar(drawn, ax=figure.axes, label="log density (nats)")
    return figure


def surfaces(panels: Mapping[str, Tensor], low: Sequence[float], high: Sequence[float]) -> Figure:
    """Energies in the plane, a panel for each title, with level lines: the lowest is 0, and 20 nats above it all is white.

    Args:
        panels: title -> energies (nats) at `lattice(low, high, n)`, (n * n,).
        low: corner of the picture.
        high: the other corner.
    """
    figure = _figure(figsize=(3.4 * len(panels), 3.2))
    for ax, (title, energies) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        n = round(len(energies) ** 0.5)
        surface = (energies - energies.min()).reshape(n, n).clamp(max=20).cpu().numpy()
        x, y = (torch.linspace(a, b, n).numpy() for a, b in zip(low, high, strict=True))
        drawn = ax.contourf(x, y, surface, levels=20, cmap="magma")
        ax.contour(x, y, surface, levels=10, colors="white", linewidths=0.4)
        ax.set_title(title)
    figure.colorbar(drawn, ax=figure.axes, label="energy above the lowest (nats)")
    return figure


@dataclass(frozen=True)
class VelocityPanel:
    """How points in the plane come from noise to data.

    Attributes:
        times: of the frames, from 0 to 1, (T,).
        frames: points at these times, (T, N, 2).
        velocity: (points (m, 2), times (m,)) -> the learned velocity there.
    """

    times: Tensor
    frames: Tensor
    velocity: Callable[[Tensor, Tensor], Tensor]


def velocity_fields(panels: Mapping[str, VelocityPanel], *, arrows: int = 15) -> Figure:
    """Ways from noise to data in the plane, a row for each title: points on the way, and arrows of the velocity at that time.

    The arrows of a row are of one scale, its longest as long as two lie apart.

    Args:
        panels: title -> way, all of as many frames.
        arrows: along each side of a panel.
    """
    columns = len(next(iter(panels.values())).times)
    figure = _figure(figsize=(2.4 * columns, 2.6 * len(panels)))
    for axes, (title, way) in zip(figure.subplots(len(panels), columns, squeeze=False), panels.items(), strict=True):
        low, high = frame(way.frames.flatten(0, 1))
        points = lattice(low, high, arrows).to(way.frames)
        moves = torch.stack([way.velocity(points, t.expand(len(points))) for t in way.times])
        fastest = moves.norm(dim=-1).max().item() or 1.0
        scale = {"angles": "xy", "scale_units": "xy", "scale": arrows / 2 * fastest / (high[0] - low[0])}  # two fields long
        for ax, t, there, move in zip(axes, way.times, way.frames, moves, strict=True):
            ax.quiver(*points.cpu().T.numpy(), *move.cpu().T.numpy(), color="0.6", width=0.004, **scale)
            ax.scatter(*there.cpu().T.numpy(), s=2, alpha=0.5, linewidths=0)
            ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[], title=f"t = {t:.2f}")
        axes[0].set_ylabel(title)
    return figure


def frame(points: Tensor) -> tuple[list[float], list[float]]:
    """The corners of a picture of points, (N, 2), with a margin."""
    low, high = points.min(0).values, points.max(0).values
    margin = 0.1 * torch.maximum(high - low, 1e-3 * (1 + low.abs()))
    return (low - margin).tolist(), (high + margin).tolist()


def lattice(low: Sequence[float], high: Sequence[float], n: int) -> Tensor:
    """The points (n * n, 2) of a picture of n rows and columns, the first coordinate running fastest."""
    x, y = (torch.linspace(a, b, n) for a, b in zip(low, high, strict=True))
    return torch.stack([x.repeat(n), y.repeat_interleave(n)], 1)


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Training loss (dotted) and validation loss (solid) of each fit, in nats per datum over epochs."""
    figure = _figure(figsize=(7, 4.5))
    ax = figure.subplots()
    for i, (name, history) in enumerate(histories.items()):
        epochs = [record["epoch"] for record in history]
        marker = "." if len(history) < 5 else ""
        ax.plot(epochs, [record["train"] for record in history], ":", color=f"C{i}", linewidth=1, marker=marker)
        ax.plot(epochs, [record.get("valid", float("nan")) for record in history], color=f"C{i}", label=name, marker=marker)
    values = sorted(r[key] for history in histories.values() for r in history for key in ("train", "valid") if key in r)
    best, usual = values[0], values[int(0.9 * (len(values) - 1))]
    margin = 0.1 * (usual - best) or 1.0
    ax.set_ylim(best - margin, usual + 3 * margin)  # the first epochs may leave the picture
    ax.set_xlabel("epoch")
    ax.set_ylabel("nats per datum (dotted: training)")
    ax.legend()
    return figure


def _figure(*, figsize: tuple[float, float]) -> Any:
    return import_extra("matplotlib.figure", extra="eval", by="A picture").Figure(figsize=figsize, layout="constrained")
