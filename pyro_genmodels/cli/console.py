"""Checks before a command runs, and the words for its results, warnings and errors."""

from __future__ import annotations

__all__ = [
    "check_device",
    "check_modules",
    "describe",
    "prepare",
    "print_table",
    "report_errors",
    "say",
    "terminate",
    "warn",
]

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import typer

from pyro_genmodels.utils.errors import one_line

if TYPE_CHECKING:
    from pyro_genmodels.datasets import Dataset
    from pyro_genmodels.evaluation import Comparison, LogLikelihood, SampleQuality


MAX_MESSAGE = 1000
"""Largest number of characters of a message, which may hold texts from files."""


def prepare(context: typer.Context, out: Path, device: str, *modules: str) -> None:
    """Make the output folder, and raise an error for anything that would make the command fail after training.

    Args:
        context: the command. Folders that it made and left empty, since it failed, are removed when it ends.
        out: the output folder.
        device: torch device.
        modules: names of modules that the command imports.
    """
    check_modules(*modules)
    check_device(device)
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    context.call_on_close(lambda: _remove_empty(missing))
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}") from error


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that are empty, the inner ones first."""
    for folder in folders:
        with suppress(OSError):  # it holds files, or could not be made
            folder.rmdir()


def check_modules(*modules: str) -> None:
    """Raise an ImportError with the command that installs them if modules are missing."""
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(f"this command needs {', '.join(missing)}: pip install 'pyro-genmodels[cli]'")


def check_device(device: str) -> None:
    """Raise a ValueError if torch cannot use the device."""
    import torch

    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def report_errors(context: typer.Context) -> Iterator[None]:
    """Print errors of input and output in one line and exit with code 2, or with the code of a signal that stopped the run."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if context.obj:
            raise
        typer.echo(f"pyro-genmodels: {_one_line(error)}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as interrupt:
        number = _signal_of(interrupt)
        typer.echo(f"\npyro-genmodels: stopped by {number.name}.", err=True)
        path, epoch = getattr(interrupt, "path", None), getattr(interrupt, "epoch", 0)
        if path is not None:
            resume = f"pyro-genmodels fit --resume {path}"
            typer.echo(f"The state after epoch {epoch} is in {path}. To continue: {resume}", err=True)
        raise typer.Exit(128 + number) from interrupt


def _one_line(error: Exception) -> str:
    """Return the message of an error, in terms of the command line."""
    text = re.split(r"\n\s*Trace Shapes:", str(error))[0].strip()  # Pyro adds shapes for model authors
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = one_line(text, MAX_MESSAGE)
    if argument := getattr(error, "argument", None):  # of `utils.errors.ArgumentError`
        example = str(getattr(error, "example", ""))
        if argument == "max_bytes":
            argument, example = "max-size", f"{ceil(int(example) / 1e7) / 100:g}"
        text += f" On the command line: --{argument} {example}"
    return text if text.endswith((".", "?", ")")) else text + "."


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does."""


def _signal_of(interrupt: KeyboardInterrupt) -> signal.Signals:
    """Return the signal that stopped a run. Training raises an interrupt of its own from the first one."""
    return signal.SIGTERM if isinstance(interrupt.__cause__ or interrupt, _Terminated) else signal.SIGINT


def terminate(*_: Any) -> None:
    """Stop the run: the handler of SIGTERM."""
    raise _Terminated


def warn(message: Any, *_: Any, **__: Any) -> None:
    """Print a warning in one line. It replaces `warnings.showwarning`."""
    typer.echo(f"pyro-genmodels: warning: {one_line(message, MAX_MESSAGE)}", err=True)


def say(text: str, *, quiet: bool) -> None:
    """Print a line, unless quiet."""
    if not quiet:
        typer.echo(one_line(text, MAX_MESSAGE))


def describe(found: LogLikelihood, levels: int | None, x: Any, sample_quality: Callable[[], SampleQuality]) -> str:
    """Return a log-likelihood in words, or the quality of samples if there is no likelihood.

    Args:
        found: log-likelihood of the rows.
        levels: number of integer levels of the data; None for real numbers.
        x: the rows.
        sample_quality: function that compares samples with the rows. It is called only where it is needed.
    """
    if found.kind == "none" and len(x) < 4:
        return f"- (no likelihood, n={len(x)})"
    if found.kind == "none":
        quality = sample_quality()
        return (
            f"- (no likelihood, n={len(x)}); sliced Wasserstein distance of samples "
            f"{quality.sliced_wasserstein:.3f}, baseline {quality.baseline:.3f}; MMD p={quality.test.p_value:.3f}"
        )
    kind = found.kind if found.kind == "exact" else f"{found.label}, k={found.num_samples}"
    bits = f"; {found.bits_per_dim(x[0].numel()):.3f} bits per dimension" if levels else ""
    error = f" ± {found.mean_std_error:.{found.digits}f}" if len(found.values) > 1 else ""
    notes = "".join(f"; {note}" for note in found.notes)
    return f"{-found.mean:.{found.digits}f}{error} nats per datum, lower is better ({kind}, n={len(x)}){bits}{notes}"


def print_table(comparison: Comparison, data: Dataset) -> None:
    """Print a comparison, with an explanation of its columns."""
    from rich.console import Console
    from rich.table import Table

    rows, digits = comparison.table, 2 if data.levels else 3
    has_samples = "sliced_wasserstein" in rows
    columns = ["family", "kind", "nats ± se", *(["bits/dim"] if data.levels else []), "Δelpd ± dse", "weight"]
    table = Table(title=f"{data.name}: held-out log-likelihood of {len(data.test)} rows", title_justify="left")
    for column in columns + (["SW distance", "MMD p"] if has_samples else []):
        table.add_column(column, justify="left" if column in ("family", "kind") else "right")
    for family, row in rows.iterrows():
        table.add_row(str(family), *_likelihood_cells(row, data, digits), *_sample_cells(row, digits))
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    if data.density is not None:
        truth = data.density.log_prob(data.test)
        error = truth.std() / len(data.test) ** 0.5
        console.print(f"The true density has {-truth.mean():.3f} ± {error:.3f} nats.", highlight=False)
    if has_samples:
        console.print(
            "SW distance: sliced Wasserstein distance of samples from held-out data; the baseline is "
            f"{comparison.baseline:.{digits}f}, between two sets of data. MMD p: p-value of a two-sample test of samples "
            "against data.",
            highlight=False,
        )
    if len(set(rows["kind"]) - {"none"}) > 1:
        console.print(
            "Nats per datum, lower is better. The kinds differ: a lower bound understates its family, an estimate (of log Z or "
            "of a trace) may overstate it."
        )
    for family, found in comparison.log_likelihoods.items():
        for note in found.notes:
            console.print(f"{family}: {note}", highlight=False)


def _likelihood_cells(row: Any, data: Dataset, digits: int) -> list[str]:
    """Return the cells of a table row that say how likely the data are, from the kind to the weight."""
    if row.kind == "none":
        return ["- (no likelihood)", "-", *(["-"] if data.levels else []), "-", "-"]
    return [
        "exact" if row.kind == "exact" else f"{row.kind} (k={row.num_samples})",
        f"{row.nats:.{digits}f} ± {row.se / len(data.test):.{digits}f}",
        *([f"{row.bits_per_dim:.3f}"] if data.levels else []),
        f"{row.elpd_diff:.0f} ± {row.dse:.0f}",
        f"{row.weight:.2f}",
    ]


def _sample_cells(row: Any, digits: int) -> list[str]:
    """Return the cells of a table row that compare samples with data, if they were compared."""
    return [f"{row.sliced_wasserstein:.{digits}f}", f"{row.mmd_p:.3f}"] if "sliced_wasserstein" in row else []
