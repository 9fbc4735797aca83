"""The border of the command line: what is checked before work begins, and what is said when it ends, well or badly."""

from __future__ import annotations

__all__ = ["plainly", "prepare", "print_table", "require", "say", "terminate", "usable", "verdict", "warn"]

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from pyro_genmodels.datasets import Dataset
    from pyro_genmodels.evaluation import Comparison, LogLikelihood, SampleQuality


def prepare(out: Path, device: str, *modules: str) -> None:
    """Makes the folder that is written to, and refuses what training would fail for in the end."""
    require(*modules)
    usable(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}") from error


def require(*modules: str) -> None:
    """Raises an ImportError with the line that installs them if modules are missing."""
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(f"this command needs {', '.join(missing)}: pip install 'pyro-genmodels[cli]'")


def usable(device: str) -> None:
    """Raises a ValueError if there is no such device."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def plainly(context: typer.Context) -> Iterator[None]:
    """Errors of input and output in a line, and exit code 2; a stopped run in a line, and the code of its signal."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if context.obj:
            raise
        text = str(error).split("\nTrace Shapes:")[0].split("\n  Trace Shapes:")[0].strip()  # Pyro's, for who wrote the model
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        typer.echo(f"pyro-genmodels: {text}" + ("" if text.endswith((".", "?", ")")) else "."), err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as interrupt:
        notes = [note.replace("train(..., resume=True), or ", "") for note in getattr(interrupt, "__notes__", [])]
        typer.echo("\n".join(["", f"pyro-genmodels: stopped by {ended_by(interrupt).name}.", *notes]), err=True)
        raise typer.Exit(128 + ended_by(interrupt)) from interrupt


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def ended_by(interrupt: KeyboardInterrupt) -> signal.Signals:
    return signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT


def terminate(*_: Any) -> None:
    """The handler of SIGTERM."""
    raise _Terminated


def warn(message: Any, *_: Any, **__: Any) -> None:
    """Shows a warning in a line, in the place of `warnings.showwarning`."""
    typer.echo(f"pyro-genmodels: warning: {message}", err=True)


def say(text: str, *, quiet: bool) -> None:
    """Prints a line, unless quiet."""
    if not quiet:
        typer.echo(text)


def verdict(judged: LogLikelihood, levels: int | None, x: Any, sample_quality: Callable[[], SampleQuality]) -> str:
    """A log-likelihood in words; where there is none, what draws are worth."""
    if judged.kind == "none" and len(x) < 4:
        return f"- (no likelihood, n={len(x)})"
    if judged.kind == "none":
        quality = sample_quality()
        return (
            f"- (no likelihood, n={len(x)}); draws off by {quality.sliced_wasserstein:.3f}, {quality.baseline:.3f} between data "
            f"(sliced Wasserstein); MMD p={quality.test.p_value:.3f}"
        )
    kind = judged.kind if judged.kind == "exact" else f"{judged.kind}, k={judged.num_samples}"
    bits = f"; {judged.bits_per_dim(x[0].numel()):.3f} bits per dimension" if levels else ""
    error = f" ± {judged.mean_std_error:.3f}" if len(judged.values) > 1 else ""
    return f"{-judged.mean:.3f}{error} nats per datum, lower is better ({kind}, n={len(x)}){bits}"


def print_table(comparison: Comparison, data: Dataset) -> None:
    """Prints a comparison."""
    from rich.console import Console
    from rich.table import Table

    n, digits, found = len(data.test), 2 if data.levels else 3, comparison.table
    alike = "sliced_wasserstein" in found
    columns = ["family", "kind", "nats ± se", *(["bits/dim"] if data.levels else []), "Δelpd ± dse", "weight"]
    table = Table(title=f"{data.name}: held-out log-likelihood of {n} data", title_justify="left")
    for column in columns + (["draws off", "MMD p"] if alike else []):
        table.add_column(column, justify="left" if column in ("family", "kind") else "right")
    for family, row in found.iterrows():
        own = ["-"] * (len(columns) - 2)
        if row.kind != "none":
            own = [
                f"{row.nats:.{digits}f} ± {row.se / n:.{digits}f}",
                *([f"{row.bits_per_dim:.3f}"] if data.levels else []),
                f"{row.elpd_diff:.0f} ± {row.dse:.0f}",
                f"{row.weight:.2f}",
            ]
        kinds = {"exact": "exact", "none": "- (no likelihood)"}
        kind = kinds.get(row.kind, f"{row.kind} (k={row.num_samples})")
        draws = [f"{row.sliced_wasserstein:.{digits}f}", f"{row.mmd_p:.3f}"] if alike else []
        table.add_row(str(family), kind, *own, *draws)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    if data.density is not None:
        own = data.density.log_prob(data.test)
        console.print(f"The density they were drawn from: {-own.mean():.3f} ± {own.std() / n**0.5:.3f}.", highlight=False)
    if alike:
        console.print(
            "Draws off: the sliced Wasserstein distance of draws from held-out data, "
            f"{comparison.baseline:.{digits}f} between data; MMD p: how often draws of the same law would be as far off.",
            highlight=False,
        )
    if len(set(comparison.table["kind"]) - {"none"}) > 1:
        kinds = "a lower bound on the likelihood understates its family, an estimate (of log Z, of a trace) may overstate it."
        console.print(f"Nats per datum, lower is better. Kinds differ: {kinds}")
