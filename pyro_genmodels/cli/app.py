"""The command line: `python -m pyro_genmodels`, or `pyro-genmodels`.

Heavy imports are inside the functions that need them, so that ``--help`` answers at once.
"""

from __future__ import annotations

__all__ = ["main"]

import os
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ImportError as _error:
    raise SystemExit("The command line needs typer and rich: pip install 'pyro-genmodels[cli]'.") from _error

from pyro_genmodels.cli.console import plainly, prepare, print_table, require, say, terminate, usable, verdict, warn

if TYPE_CHECKING:
    from pyro_genmodels.cli.recipes import DataSource
    from pyro_genmodels.training import Fit

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)

FAMILIES = ("flow", "vae", "autoregressive", "energy", "ode_flow", "diffusion", "gan")
DATA = ("digits", "moons", "ring", "grid", "pinwheel", "checkerboard")
SPLITS = ("train", "valid", "test", "all")


def _completion(names: tuple[str, ...]) -> Any:
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


Data = Annotated[
    str,
    typer.Option(
        help=f"A data set ({', '.join(DATA)}), or a .npy, .npz, .csv or .parquet file of rows.",
        autocompletion=_completion(DATA),
    ),
]
Columns = Annotated[
    str | None, typer.Option(help="Columns of a file to model, separated by commas; of .npz the name of its array.")
]
LabelColumn = Annotated[
    str | None,
    typer.Option("--labels", help="Condition on classes 0, 1, ...: a column (.npz: array) of a file; `label` of a data set."),
]
Levels = Annotated[int | None, typer.Option(help="Of a file of integers: K, for values 0 to K - 1; 0 takes them for reals.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the split, of training and of drawing.")]
Device = Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Passes over the data, at most; by default the family's own.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar, and no words about files.")]
Checkpoint = Annotated[Path, typer.Argument(help="What `fit` or `compare` wrote: a .safetensors file.", show_default=False)]


def _version(value: bool) -> None:  # noqa: FBT001 (typer's callback)
    if value:
        from pyro_genmodels import __version__

        typer.echo(f"pyro_genmodels {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,  # noqa: FBT002
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,  # noqa: FBT002
) -> None:
    """Deep generative models as Pyro programs: fit them to data, draw from them, judge and compare them."""
    context.obj = traceback


@app.command()
def compare(
    context: typer.Context,
    data: Data = "digits",
    families: Annotated[
        str, typer.Option(help="Families to fit, separated by commas.", autocompletion=_completion(FAMILIES))
    ] = ",".join(FAMILIES),
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures, ArviZ files and checkpoints.")] = Path("out"),
    columns: Columns = None,
    labels: LabelColumn = None,
    levels: Levels = None,
    seed: Seed = 0,
    device: Device = "cpu",
    epochs: Epochs = None,
    quiet: Quiet = False,  # noqa: FBT002
) -> None:
    """Fit families to one data set and judge them on held-out data.

    For example:

    `pyro-genmodels compare --data digits --families flow,vae --out out`

    `pyro-genmodels compare --data measurements.csv --columns height,weight --out out`
    """
    names = list(dict.fromkeys(name.strip() for name in families.split(",") if name.strip()))
    with plainly(context):
        _known("family", names or [""], FAMILIES)
        source = _source(data, columns, labels, levels, seed)
        prepare(out, device, "matplotlib", "safetensors", "h5netcdf", "h5py", "ot")
        dataset = source.load()
        from pyro_genmodels.cli import recipes, reports

        fits: dict[str, Fit] = {}
        for name in names:
            try:
                fits[name] = recipes.fit(name, source, dataset, out / name, device=device, epochs=epochs, progress=not quiet)
            except FloatingPointError as error:  # nothing to keep; the others go on
                warn(f"{name} could not be trained: {error}.")
        if not fits:
            raise FloatingPointError("none of the families could be trained")
        test_labels = dataset.test_labels if labels else None
        judged = {name: recipes.evaluate(fit, dataset.test, test_labels, progress=not quiet) for name, fit in fits.items()}
        arguments = {"data": data, "columns": columns, "labels": labels, "levels": levels, "families": names}
        arguments |= {"seed": seed, "device": device, "epochs": epochs}
        table = reports.write(fits, judged, dataset, out, arguments, conditional=bool(labels))
        print_table(table, dataset)
        say(f"tables, pictures, ArviZ files and checkpoints: {out}", quiet=quiet)


@app.command()
def fit(
    context: typer.Context,
    data: Data = "digits",
    family: Annotated[
        str, typer.Option(help=f"Family to fit: {', '.join(FAMILIES)}.", autocompletion=_completion(FAMILIES))
    ] = "flow",
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and pictures.")] = Path("out"),
    columns: Columns = None,
    labels: LabelColumn = None,
    levels: Levels = None,
    seed: Seed = 0,
    device: Device = "cpu",
    epochs: Epochs = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows per step; by default the family's own, 64 to 256.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's; by default the family's own.")] = None,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better validation loss before training stops.")] = 25,
    resume: Annotated[
        Path | None, typer.Option(help="Go on from this checkpoint, with its data and settings; --epochs may be higher.")
    ] = None,
    quiet: Quiet = False,  # noqa: FBT002
) -> None:
    """Fit one family to one data set. Ctrl-C keeps what was reached.

    For example:

    `pyro-genmodels fit --data moons --family flow --out out`

    `pyro-genmodels fit --data measurements.csv --columns height,weight --labels species --family vae`

    `pyro-genmodels fit --resume out/flow.safetensors --epochs 600`
    """
    with plainly(context):
        if learning_rate is not None and not 0 < learning_rate < float("inf"):
            raise ValueError(f"--learning-rate wants a positive number, but found {learning_rate}")
        settings: dict[str, Any] = {"batch_size": batch_size, "learning_rate": learning_rate, "patience": patience}
        if resume is None:
            _known("family", [family], FAMILIES)
            source, path = _source(data, columns, labels, levels, seed), out / family
        else:
            require("safetensors")
            given = [
                name for name in ("family", "out", "columns", "labels", "levels", "seed", *settings) if _is_given(context, name)
            ]
            if given:
                options = ", ".join("--" + name.replace("_", "-") for name in given)
                raise ValueError(f"--resume goes on with the checkpoint's own settings: leave {options} out")
            family, source, settings, path = _run_of(resume, data if _is_given(context, "data") else None)
            out, reached = path.parent, settings.pop("epochs")
            epochs = epochs if _is_given(context, "epochs") else reached
        prepare(out, device, "matplotlib", "safetensors")
        dataset = source.load()
        import pyro

        from pyro_genmodels.cli import recipes, reports

        fitted = recipes.fit(
            family,
            source,
            dataset,
            path,
            device=device,
            epochs=epochs,
            progress=not quiet,
            resume=resume is not None,
            **settings,
        )
        reports.pictures({family: fitted}, dataset, out, conditional=bool(source.labels), seed=source.seed, mark=f"_{family}")
        pyro.set_rng_seed(source.seed)
        test_labels = dataset.test_labels if source.labels else None
        judged = recipes.evaluate(fitted, dataset.test, test_labels, progress=not quiet)
        said = verdict(
            judged, dataset.levels, dataset.test, lambda: recipes.sample_quality_of(fitted, dataset.test, test_labels)
        )
        typer.echo(f"{family} on {dataset.name} (test): {said}")
        say(
            f"training ended at {fitted.stopped}, best epoch {fitted.best['epoch']}; checkpoint: {path}.safetensors",
            quiet=quiet,
        )


@app.command()
def sample(
    context: typer.Context,
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="File for the draws: .npy, .npz, .csv or .parquet.")] = Path("draws.npz"),
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1, help="Draws.")] = 1000,
    label: Annotated[int | None, typer.Option(min=0, help="The class to draw; by default all in turn.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Picture of the draws (.png), of images or points in the plane.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draws.")] = 0,
    device: Device = "cpu",
    quiet: Quiet = False,  # noqa: FBT002
) -> None:
    """Draw from a fitted family.

    For example:

    `pyro-genmodels sample out/flow.safetensors --num-samples 10000 --out draws.csv`

    `pyro-genmodels sample out/vae.safetensors --label 3 --out threes.npz --picture threes.png`
    """
    with plainly(context):
        require("safetensors", *(["matplotlib"] if picture else []))
        usable(device)
        import pyro
        import torch

        from pyro_genmodels.cli import recipes, reports
        from pyro_genmodels.evaluation import plots
        from pyro_genmodels.families import Labels

        reports.check_rows(out)
        family, notes = recipes.restored(checkpoint, device=device)
        if picture is not None:
            reports.check_picture(family, picture)
        pyro.set_rng_seed(seed)
        labels = None
        if isinstance(family.context, Labels):
            classes = family.context.num_classes
            if label is not None and label >= classes:
                raise ValueError(f"--label wants 0 to {classes - 1}, but found {label}")
            labels = torch.arange(num_samples) % classes if label is None else torch.full((num_samples,), label)
        elif family.context is not None:
            raise ValueError(f"{checkpoint} wants a context of vectors, which only Python can give: checkpoints.load it")
        elif label is not None:
            raise ValueError(f"{checkpoint} was not fitted with labels: leave --label out")
        draws = recipes.draw(family, num_samples, labels)
        reports.save_rows(out, draws, labels, notes)
        if picture is not None:
            name = notes.family
            figure = plots.image_grids({name: draws[:100]}) if draws.dim() == 3 else plots.scatters({name: draws})
            reports.save_figure(figure, picture)
        say(f"{num_samples} draws: {out}" + (f"; picture: {picture}" if picture else ""), quiet=quiet)


@app.command()
def evaluate(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Option(help="Rows to judge by, by default the test rows of the data it was fitted to.", show_default=False),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help=f"Which rows: {', '.join(SPLITS)}; of another file by default all.",
            show_default=False,
            autocompletion=_completion(SPLITS),
        ),
    ] = None,
    columns: Columns = None,
    labels: LabelColumn = None,
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", "-n", min=1, help="k, draws per row behind a bound: 512, or 8 of estimates by an ODE."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File (.csv) for the log-likelihood of each row.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draws behind a bound.")] = 0,
    device: Device = "cpu",
) -> None:
    """Judge a fitted family by the log-likelihood of data.

    For example:

    `pyro-genmodels evaluate out/flow.safetensors`

    `pyro-genmodels evaluate out/flow.safetensors --data new.csv --out values.csv`
    """
    with plainly(context):
        if split is not None:
            _known("split", [split], SPLITS)
        if out is not None and out.suffix != ".csv":
            raise ValueError(f"--out wants a .csv file, but found {out}")
        if data is not None:
            _check_data(data)
        require("safetensors")
        usable(device)
        import pandas as pd
        import pyro

        from pyro_genmodels.cli import recipes
        from pyro_genmodels.utils.files import atomic_write

        family, notes = recipes.restored(checkpoint, device=device)
        x, y, name = recipes.rows_of(notes, data=data, columns=_split(columns), labels=labels, split=split)
        pyro.set_rng_seed(seed)
        judged = recipes.evaluate(family, x, y, num_samples=num_samples)
        if out is not None:
            table = pd.DataFrame({"log_likelihood": judged.values.cpu(), "std_error": judged.std_error.cpu()})
            table.index.name = "row"
            with atomic_write(out) as part:
                table.to_csv(part)
        said = verdict(judged, notes.levels, x, lambda: recipes.sample_quality_of(family, x, y))
        typer.echo(f"{notes.family} on {name}: {said}")


# What is checked before work begins.


def _source(data: str, columns: str | None, labels: str | None, levels: int | None, seed: int) -> DataSource:
    """Where data come from; a name that nobody knows is refused before anything heavy is imported."""
    _check_data(data)
    from pyro_genmodels.cli.recipes import DataSource

    data = data if data in DATA else str(Path(data).resolve())  # so that a checkpoint finds it from anywhere
    return DataSource(data, _split(columns), labels, levels, seed)


def _check_data(data: str) -> None:
    if data not in DATA and not Path(data).suffix and not Path(data).exists():
        _known("data set", [data], DATA)


def _split(columns: str | None) -> list[str] | None:
    return None if columns is None else [name.strip() for name in columns.split(",") if name.strip()]


def _known(kind: str, found: list[str], known: tuple[str, ...]) -> None:
    from pyro_genmodels.utils.errors import unknown_name

    for name in found:
        if name not in known:
            raise unknown_name(kind, name, known)


def _run_of(checkpoint: Path, data: str | None) -> tuple[str, DataSource, dict[str, Any], Path]:
    """Family, source and settings of the run to go on with, and its path without suffix."""
    from dataclasses import replace

    from pyro_genmodels.cli.recipes import notes_of
    from pyro_genmodels.training import checkpoints

    path = checkpoints.tensors_of(checkpoint)
    path = path.with_name(path.name.removesuffix(".training.safetensors").removesuffix(".safetensors") + ".safetensors")
    notes = notes_of(checkpoints.read(path)[1])
    if notes is None or notes.source is None:
        raise ValueError(f"{path} is not of the command line: go on in Python, by train(..., checkpoint=..., resume=True)")
    settings = {name: getattr(notes, name) for name in ("batch_size", "learning_rate", "patience", "epochs")}
    source = notes.source if data is None else replace(notes.source, data=data)
    return notes.family, source, settings, path.with_suffix("")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def main() -> None:
    """The console script."""
    # Before torch is loaded: while its threads wait they otherwise hold the cores (shared cores: three times slower).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    signal.signal(signal.SIGTERM, terminate)
    warnings.showwarning = warn
    app(prog_name="pyro-genmodels")
