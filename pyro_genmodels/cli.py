"""The command line: `python -m pyro_genmodels`, or `pyro-genmodels`.

Heavy imports are inside the functions that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

__all__ = ["main"]

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ImportError as _error:
    raise SystemExit("The command line needs typer and rich: pip install 'pyro-genmodels[cli]'.") from _error

if TYPE_CHECKING:
    from pyro_genmodels.evaluation import Comparison
    from pyro_genmodels.recipes import Recipe
    from pyro_genmodels.training import Fit

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)

FAMILIES = ("flow", "vae", "autoregressive")
DATA = ("digits",)


def _version(value: bool) -> None:  # noqa: FBT001 (typer's callback)
    if value:
        from pyro_genmodels import __version__

        typer.echo(f"pyro_genmodels {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,  # noqa: FBT002
) -> None:
    """Deep generative models as Pyro programs."""


@app.command()
def compare(
    data: Annotated[str, typer.Option(help=f"Data set: {', '.join(DATA)}.")] = "digits",
    families: Annotated[str, typer.Option(help="Families to fit, separated by commas.")] = ",".join(FAMILIES),
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures, ArviZ files and checkpoints.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the split, of training and of drawing.")] = 0,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data, at most.")] = 300,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the table alone.")] = False,  # noqa: FBT002
) -> None:
    """Fit families to one data set and judge them on held-out data.

    Example: `python -m pyro_genmodels compare --data digits --families flow,vae --out out`
    """
    names = list(dict.fromkeys(name.strip() for name in families.split(",") if name.strip()))
    for kind, found, known in (("family", names, FAMILIES), ("data set", [data], DATA)):
        for name in found:
            if name not in known:
                _refuse(f"unknown {kind} {name!r}: known are {', '.join(known)}{_nearest(name, known)}.")
    if not names:
        _refuse(f"--families names none: known are {', '.join(FAMILIES)}.")
    if seed < 0:
        _refuse(f"--seed wants 0 or more, but found {seed}.")
    _require("sklearn", "matplotlib", "safetensors", "h5netcdf")
    _check_device(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        _refuse(f"cannot write to {out}: {error.strerror}.")

    from pyro_genmodels.recipes import RECIPES, judge, learn, load, write

    dataset = load(data, seed)
    fits: dict[str, Fit] = {}
    judged = {}
    for name in names:
        recipe: Recipe = RECIPES[data][name]
        fits[name] = learn(recipe, dataset, name, out, seed=seed, device=device, epochs=epochs, progress=not quiet)
        judged[name] = judge(recipe, fits[name], dataset, device=device)
    arguments = {"data": data, "families": names, "seed": seed, "device": device, "epochs": epochs}
    table = write(dataset, fits, judged, out, arguments)
    _print(table, dataset.name, len(dataset.test))
    if not quiet:
        typer.echo(f"tables, pictures, ArviZ files and checkpoints: {out}")


def _print(comparison: Comparison, name: str, rows: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}: held-out log-likelihood of {rows} data", title_justify="left")
    for column in ("family", "kind", "nats ± se", "bits/dim", "Δelpd ± dse", "weight"):
        table.add_column(column, justify="left" if column in ("family", "kind") else "right")
    n = rows
    for family, row in comparison.table.iterrows():
        kind = row.kind if row.num_samples == 1 else f"{row.kind} (k={row.num_samples})"
        table.add_row(
            str(family),
            kind,
            f"{row.nats:.2f} ± {row.se / n:.2f}",
            f"{row.bits_per_dim:.3f}",
            f"{row.elpd_diff:.0f} ± {row.dse:.0f}",
            f"{row.weight:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    if comparison.table["kind"].nunique() > 1:
        console.print("Nats per datum, lower is better. Kinds differ: a lower bound on the likelihood understates its family.")


def _require(*modules: str) -> None:
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        _refuse(f"this command needs {', '.join(missing)}: pip install 'pyro-genmodels[cli]'.")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        _refuse(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}")


def _nearest(name: str, known: tuple[str, ...]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1)
    return f". Did you mean {near[0]}?" if near else ""


def _refuse(message: str) -> Any:
    typer.echo(f"pyro-genmodels: {message}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """The console script."""
    # Before torch is loaded: while its threads wait they otherwise hold the cores (shared cores: three times slower).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    app(prog_name="pyro-genmodels")
