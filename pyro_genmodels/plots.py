"""Pictures of what was learned."""

from __future__ import annotations

__all__ = ["image_grids", "loss_curves"]

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_grids(panels: Mapping[str, Tensor], *, columns: int = 10) -> Figure:
    """Images in rows, dark on light, a panel for each title.

    Args:
        panels: title -> images, (N, height, width), N at least 1.
        columns: images in a row of a panel.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    grids = [_tile(images, columns) for images in panels.values()]
    inches = 0.06 * max(grid.shape[1] for grid in grids), 0.06 * max(grid.shape[0] for grid in grids) + 0.4
    figure = Figure(figsize=(inches[0] * len(grids), inches[1]), layout=ConstrainedLayoutEngine(wspace=0.06))
    for ax, title, grid in zip(figure.subplots(1, len(grids), squeeze=False)[0], panels, grids, strict=True):
        ax.imshow(grid.cpu().numpy(), cmap="gray_r", interpolation="nearest")
        ax.set_axis_off()
        ax.set_title(title)
    return figure


def _tile(images: Tensor, columns: int) -> Tensor:
    """Images side by side in one, (rows * (height + 2), columns * (width + 2))."""
    n, height, width = images.shape
    rows = ceil(n / columns)
    padded = images.new_full((rows * columns, height + 2, width + 2), images.min().item())
    padded[:n, 1:-1, 1:-1] = images
    return padded.unflatten(0, (rows, columns)).transpose(1, 2).reshape(rows * (height + 2), columns * (width + 2))


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Training loss (dotted) and validation loss (solid) of each fit, in nats per datum over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
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
