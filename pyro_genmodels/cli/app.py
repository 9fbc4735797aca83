"""The commands of `pyro-genmodels`, or `python -m pyro_genmodels`.

Heavy modules are imported inside the functions that need them, so that ``--help`` is fast.
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

from pyro_genmodels.cli.console import (
    check_device,
    check_modules,
    describe,
    prepare,
    print_table,
    report_errors,
    say,
    terminate,
    warn,
)
from pyro_genmodels.cli.options import (
    FAMILIES,
    MAX_SIZE,
    SPLITS,
    CheckpointPath,
    Columns,
    Compile,
    Data,
    Device,
    Epochs,
    Force,
    LabelColumn,
    Levels,
    MaxSize,
    Overwrite,
    Quiet,
    Seed,
    Threads,
    bytes_of,
    check_data,
    check_names,
    check_no_file,
    check_unused,
    complete_names,
    files_of_runs,
    is_given,
    split_names,
)

if TYPE_CHECKING:
    from pyro_genmodels.training import Fit

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def _version(value: bool) -> None:  # noqa: FBT001 (typer's callback)
    if value:
        from pyro_genmodels import __version__

        typer.echo(f"pyro_genmodels {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,  # noqa: FBT002
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,  # noqa: FBT002
) -> None:
    """Deep generative models as Pyro programs: fit them to data, sample from them, evaluate and compare them."""
    context.obj = traceback


@app.command()
def compare(
    context: typer.Context,
    data: Data = None,
    families: Annotated[
        str, typer.Option(help="Families to fit, separated by commas.", autocompletion=complete_names(FAMILIES))
    ] = ",".join(FAMILIES),
    out: Annotated[Path, typer.Option(help="Folder for tables, plots, ArviZ files and checkpoints.")] = Path("out"),
    columns: Columns = None,
    labels: LabelColumn = None,
    levels: Levels = None,
    seed: Seed = 0,
    device: Device = "cpu",
    epochs: Epochs = None,
    threads: Threads = None,
    max_size: MaxSize = MAX_SIZE,
    force: Force = False,  # noqa: FBT002
    quiet: Quiet = False,  # noqa: FBT002
) -> None:
    """Fit families to one data set and compare them on held-out data.

    For example:

    `pyro-genmodels compare --data digits --families flow,vae --out out`

    `pyro-genmodels compare --data measurements.csv --columns height,weight --out out`
    """
    names = list(dict.fromkeys(name.strip() for name in families.split(",") if name.strip()))
    with report_errors(context):
        check_names("family", names or [""], FAMILIES)
        data = check_data(data)
        from pyro_genmodels.cli.notes import source_of

        source = source_of(data, columns, labels, levels, seed)
        check_unused([out / "run.json", *files_of_runs(out, names)], force=force)
        prepare(context, out, device, "matplotlib", "safetensors", "h5netcdf", "h5py", "ot")
        dataset = source.load(bytes_of(max_size))
        from pyro_genmodels.cli import recipes, reports

        fits: dict[str, Fit] = {}
        for name in names:
            try:
                fits[name] = recipes.fit(
                    name, source, dataset, out / name, device=device, epochs=epochs, threads=threads, progress=not quiet
                )
            except FloatingPointError as error:  # the other families are still fitted
                warn(f"{name} could not be trained: {error}.")
        if not fits:
            raise FloatingPointError("none of the families could be trained")
        recipes.set_threads(threads, *(fit.family for fit in fits.values()))
        test_labels = dataset.test_labels if labels else None
        found = {name: recipes.evaluate(fit, dataset.test, test_labels, progress=not quiet) for name, fit in fits.items()}
        arguments = {"data": data, "columns": columns, "labels": labels, "levels": levels, "families": names}
        arguments |= {"seed": seed, "device": device, "epochs": epochs}
        table = reports.write(fits, found, dataset, out, arguments, conditional=bool(labels))
        print_table(table, dataset)
        say(f"tables, plots, ArviZ files and checkpoints: {out}", quiet=quiet)


@app.command()
def fit(
    context: typer.Context,
    data: Data = None,
    family: Annotated[
        str, typer.Option(help=f"Family to fit: {', '.join(FAMILIES)}.", autocompletion=complete_names(FAMILIES))
    ] = "flow",
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and plots.")] = Path("out"),
    columns: Columns = None,
    labels: LabelColumn = None,
    levels: Levels = None,
    seed: Seed = 0,
    device: Device = "cpu",
    epochs: Epochs = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows per step. Each family has its own default, 32 to 256.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of Adam. Each family has its own default.")] = None,
    patience: Annotated[
        int, typer.Option(min=1, help="Epochs without a better validation loss after which training stops.")
    ] = 25,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue from this checkpoint, with its data and settings. --epochs and --patience may change. Its test rows "
            "are no part of the run, and are read anew."
        ),
    ] = None,
    compiled: Compile = False,  # noqa: FBT002
    threads: Threads = None,
    max_size: MaxSize = MAX_SIZE,
    force: Force = False,  # noqa: FBT002
    quiet: Quiet = False,  # noqa: FBT002
) -> None:
    """Fit one family to one data set. Ctrl-C keeps the state reached so far.

    For example:

    `pyro-genmodels fit --data moons --family flow --out out`

    `pyro-genmodels fit --data measurements.csv --columns height,weight --labels species --family vae`

    `pyro-genmodels fit --resume out/flow.safetensors --epochs 600`
    """
    with report_errors(context):
        if learning_rate is not None and not 0 < learning_rate < float("inf"):
            raise ValueError(f"--learning-rate wants a positive number, but found {learning_rate}")
        settings: dict[str, Any] = {"epochs": epochs, "patience": patience}
        settings |= {"batch_size": batch_size, "learning_rate": learning_rate}
        done = 0
        if resume is None:
            check_names("family", [family], FAMILIES)
            data = check_data(data)
            from pyro_genmodels.cli.notes import source_of

            source, path = source_of(data, columns, labels, levels, seed), out / family
            check_unused(files_of_runs(out, [family]), force=force)
        else:
            check_modules("safetensors")
            given = [
                name
                for name in ("family", "out", "columns", "labels", "levels", "seed", "force", "batch_size", "learning_rate")
                if is_given(context, name)
            ]
            if given:
                options = ", ".join("--" + name.replace("_", "-") for name in given)
                raise ValueError(f"--resume continues with the settings of the checkpoint: leave {options} out")
            from pyro_genmodels.cli.notes import saved_run

            family, source, saved, path, done = saved_run(resume, data)
            settings = saved | {name: settings[name] for name in ("epochs", "patience") if is_given(context, name)}
            out = path.parent
        prepare(context, out, device, "matplotlib", "safetensors")
        dataset = source.load(bytes_of(max_size))
        import pyro

        from pyro_genmodels.cli import recipes, reports

        fitted = recipes.fit(
            family,
            source,
            dataset,
            path,
            device=device,
            compiled=compiled,
            threads=threads,
            progress=not quiet,
            resume=resume is not None,
            **settings,
        )
        if resume is not None and len(fitted.history) == done:
            warn(
                f"nothing was trained: the run already has {done} epochs, and ends at epoch {settings['epochs']}, or after "
                f"{settings['patience']} epochs without a better validation loss. To go on, raise --epochs or --patience."
            )
        recipes.set_threads(threads, fitted.family)
        reports.plot_fits(
            {family: fitted}, dataset, out, conditional=bool(source.labels), seed=source.seed, suffix=f"_{family}"
        )
        pyro.set_rng_seed(source.seed)
        test_labels = dataset.test_labels if source.labels else None
        found = recipes.evaluate(fitted, dataset.test, test_labels, progress=not quiet)
        words = describe(
            found, dataset.levels, dataset.test, lambda: recipes.sample_quality_of(fitted, dataset.test, test_labels)
        )
        say(f"{family} on {dataset.name} (test): {words}", quiet=False)
        say(
            f"training ended at {fitted.stopped}, best epoch {fitted.best['epoch']}; checkpoint: {path}.safetensors",
            quiet=quiet,
        )


@app.command()
def sample(
    context: typer.Context,
    checkpoint: CheckpointPath,
    out: Annotated[
        Path,
        typer.Option(
            help="File for the samples: .npy, .npz, .csv or .parquet. More than a million go to a folder of .parquet files. "
            "That, and a .zarr folder, take bounded memory."
        ),
    ] = Path("samples.npz"),
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1, help="Number of samples.")] = 1000,
    label: Annotated[int | None, typer.Option(min=0, help="Class to sample from. By default all classes in turn.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Plot of the samples (.png), for images and points in the plane.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the samples.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a folder that an interrupted run has begun.")] = False,  # noqa: FBT002
    device: Device = "cpu",
    threads: Threads = None,
    max_size: MaxSize = MAX_SIZE,
    force: Overwrite = False,  # noqa: FBT002
    quiet: Quiet = False,  # noqa: FBT002
) -> None:
    """Sample from a fitted family.

    For example:

    `pyro-genmodels sample out/flow.safetensors --num-samples 10000 --out samples.csv`

    `pyro-genmodels sample out/vae.safetensors --label 3 --out threes.npz --picture threes.png`
    """
    with report_errors(context):
        check_modules("safetensors", *(["matplotlib"] if picture else []))
        check_device(device)
        import pyro
        import torch

        from pyro_genmodels.cli import folders, recipes, reports
        from pyro_genmodels.evaluation import Output, plots
        from pyro_genmodels.families import Labels

        in_folder = folders.is_folder(out, num_samples)
        if in_folder and picture is not None:
            raise ValueError("--picture plots samples in memory: leave it out, or draw fewer into a file")
        if resume and not in_folder:
            raise ValueError("--resume goes on with a folder: .zarr, or .parquet of more than a million samples")
        if in_folder:
            folders.check_folder(out, resume=resume, force=force)
        else:
            reports.check_rows(out)
            check_no_file(out, picture, force=force)
        family, notes = recipes.load_family(checkpoint, device=device, max_bytes=bytes_of(max_size))
        recipes.set_threads(threads, family)
        if picture is not None:
            reports.check_picture(family, picture)
        pyro.set_rng_seed(seed)
        labels = None
        if isinstance(family.context, Labels):
            classes = family.context.num_classes
            if label is not None and label >= classes:
                raise ValueError(f"--label wants 0 to {classes - 1}, but found {label}")
            turns = torch.arange(classes) if label is None else torch.tensor([label])
            labels = turns if in_folder else turns[torch.arange(num_samples) % len(turns)]
        elif family.context is not None:
            raise ValueError(
                f"{checkpoint} wants a context of vectors, which the command line cannot pass: use checkpoints.load"
            )
        elif label is not None:
            raise ValueError(f"{checkpoint} was not fitted with labels: leave --label out")
        if in_folder:
            coarse = folders.draw_to_folder(
                family, num_samples, labels, Output(out, resume=resume, seed=seed), notes, progress=not quiet
            )
            if coarse:
                warn(f"samples are in single precision, which has seven digits: {coarse}.")
            say(f"{num_samples} samples: {out}", quiet=quiet)
            return
        samples = recipes.draw(family, num_samples, labels)
        reports.save_rows(out, samples, labels, notes)
        if coarse := reports.coarse_columns(samples, notes):
            warn(f"samples are in single precision, which has seven digits: {coarse}.")
        if picture is not None:
            name = notes.family
            figure = plots.image_grids({name: samples[:100]}) if samples.dim() == 3 else plots.scatters({name: samples})
            reports.save_figure(figure, picture)
        say(f"{num_samples} samples: {out}" + (f"; plot: {picture}" if picture else ""), quiet=quiet)


@app.command()
def evaluate(
    context: typer.Context,
    checkpoint: CheckpointPath,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows to evaluate. By default the test rows of the data that the family was fitted to. A folder of .parquet "
            "or .npy files is read batch by batch.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help=f"Part of the data: {', '.join(SPLITS)}. By default test, and all for another file.",
            show_default=False,
            autocompletion=complete_names(SPLITS),
        ),
    ] = None,
    columns: Columns = None,
    labels: LabelColumn = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            "--num-samples", "-n", min=1, help="k, samples per row for a bound or an estimate. By default 512, or 8 for ODEs."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File (.csv) for the log-likelihood of each row. Its column `row` is the number of the row in the file of "
            "data, from 0, without the header. Or a .parquet folder, for rows that are read batch by batch."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a folder that an interrupted run has begun.")] = False,  # noqa: FBT002
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the samples for a bound.")] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    max_size: MaxSize = MAX_SIZE,
    force: Overwrite = False,  # noqa: FBT002
) -> None:
    """Evaluate a fitted family by the log-likelihood of data.

    For example:

    `pyro-genmodels evaluate out/flow.safetensors`

    `pyro-genmodels evaluate out/flow.safetensors --data new.csv --out values.csv`
    """
    with report_errors(context):
        if split is not None:
            check_names("split", [split], SPLITS)
        if out is not None and out.suffix not in (".csv", ".parquet"):
            raise ValueError(f"--out wants a .csv file or a .parquet folder, but found {out}")
        in_folder = out is not None and out.suffix == ".parquet"
        as_stream = in_folder or (data is not None and Path(data).is_dir())
        if as_stream and out is not None and not in_folder:
            raise ValueError(f"rows that are read batch by batch have their values in a .parquet folder, but found --out {out}")
        if resume and not in_folder:
            raise ValueError("--resume goes on with a .parquet folder: pass it as --out")
        if not in_folder:
            check_no_file(out, force=force)
        if data is not None:
            check_data(data)
        check_modules("safetensors")
        check_device(device)
        import pandas as pd
        import pyro

        from pyro_genmodels.cli import recipes
        from pyro_genmodels.cli.notes import rows_of
        from pyro_genmodels.utils.files import atomic_write

        family, notes = recipes.load_family(checkpoint, device=device, max_bytes=bytes_of(max_size))
        recipes.set_threads(threads, family)
        if as_stream:
            from pyro_genmodels.cli import folders
            from pyro_genmodels.evaluation import Output

            if out is not None:
                folders.check_folder(out, resume=resume, force=force)
            pyro.set_rng_seed(seed)
            target = None if out is None else Output(out, resume=resume, seed=seed)
            options: dict[str, Any] = {"columns": split_names(columns), "labels": labels, "split": split, "out": target}
            words = folders.evaluate_stream(family, notes, data, num_samples=num_samples or 512, **options)
            say(f"{notes.family} on {data}: {words}", quiet=False)
            return
        rows = rows_of(notes, data=data, columns=split_names(columns), labels=labels, split=split, max_bytes=bytes_of(max_size))
        pyro.set_rng_seed(seed)
        found = recipes.evaluate(family, rows.x, rows.labels, num_samples=num_samples)
        if out is not None:
            table = pd.DataFrame(
                {"log_likelihood": found.values.cpu(), "std_error": found.std_error.cpu()}, index=rows.numbers.numpy()
            )
            if found.pareto_k is not None:
                table["pareto_k"] = found.pareto_k.cpu()
            table.index.name = "row"
            with atomic_write(out) as part:
                table.sort_index().to_csv(part)
        words = describe(found, notes.levels, rows.x, lambda: recipes.sample_quality_of(family, rows.x, rows.labels))
        say(f"{notes.family} on {rows.name}: {words}", quiet=False)


def main() -> None:
    """Run the command line."""
    # Before torch is loaded: its waiting threads would otherwise keep the cores busy (three times slower on shared cores).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    signal.signal(signal.SIGTERM, terminate)
    warnings.showwarning = warn
    app(prog_name="pyro-genmodels")
