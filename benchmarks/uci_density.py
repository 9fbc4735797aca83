"""Densities of small tables: python benchmarks/published.py uci winequality-red --data-dir DIR

The protocol of Uria et al., *RNADE* (arXiv 1306.0186): discrete columns are left out, and of two columns with a correlation
above 0.98 the second one. Each of ten folds is the test part once. The others give the mean and deviation of the columns, in
whose units the densities are, and a tenth of their rows is the validation part. A normal distribution of full covariance is
fitted to the same rows: its published value shows if the protocol is the published one.

A model is a mixture, of equal weights, of masked networks (MADE) whose conditionals are mixtures of normals. Each has its own
order of the columns. An interrupted run resumes from the checkpoints of the members.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from binary_data import DataDir
from masked_mixtures import mean_of, mixture_log_prob, train_member
from torch import Tensor

from pyro_genmodels import Autoregressive, NormalLikelihood

FOLDS = 10
DISCRETE_VALUES = 10
"""Largest number of different values of a column that counts as discrete."""
MAX_CORRELATION = 0.98


@dataclass(frozen=True)
class Setting:
    """Options of the members of a mixture for one data set.

    Attributes:
        published: words on the published values.
        hidden: width of the hidden layer.
        components: number of normals of each conditional.
        dropout: rate at which hidden units are dropped in training.
        batch_size: number of rows of a step.
        patience: number of epochs without a better validation loss.
        members: number of members.
    """

    published: str
    hidden: int = 200
    components: int = 10
    dropout: float = 0.3
    batch_size: int = 200
    patience: int = 10
    members: int = 2

    @property
    def words(self) -> str:
        """Words for the table."""
        return f"{self.hidden} units, {self.components} normals, dropout {self.dropout:g}"


SETTINGS = {
    "winequality-red": Setting("-13.18, -9.36, -8.76"),
    "winequality-white": Setting("-13.20, -10.23, -9.67", members=1),
    "ionosphere": Setting("-41.24, -2.50, -", dropout=0.5, batch_size=50, patience=40, members=1),
}


def main(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(SETTINGS)}")],
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("out/published"),
    seed: int = 0,
    folds: Annotated[int, typer.Option(help="Number of the ten folds to take, fewer for a trial.")] = FOLDS,
    members: Annotated[int | None, typer.Option(help="Number of members; None is that of the table.")] = None,
    max_seconds: Annotated[float, typer.Option(help="Time to train one member; the last epoch is finished.")] = 600.0,
    test: Annotated[bool, typer.Option(help="Read the test rows.")] = True,  # noqa: FBT002 (an option)
    threads: int = 2,
) -> None:
    """Train mixtures of masked networks on the folds of a table, and print their row."""
    if name not in SETTINGS:
        raise typer.BadParameter(f"no data set {name!r}: it is one of {', '.join(SETTINGS)}")
    torch.set_num_threads(threads)
    setting, x = SETTINGS[name], table(data_dir, name)
    members, start = members or setting.members, time.perf_counter()
    seconds, normal, valid, single, mixture = 0.0, [], [], [], []
    for fold, (training, validation, held_out) in enumerate(parts(x, seed)[:folds]):
        fits = []
        for member in range(members):
            file = out / f"uci-{name}-{seed}-{fold}-{member}"
            fits.append(fit_member(setting, training, validation, 1000 * seed + 100 * fold + member, file, max_seconds))
        families = [fit.family for fit in fits]
        seconds += sum(fit.history[-1]["seconds"] for fit in fits)
        valid.append(mixture_log_prob(families, validation))
        found = ", ".join(f"{-fit.best['valid']:.3f} (epoch {fit.best['epoch']})" for fit in fits)
        print(f"fold {fold}: validation rows, members {found}, mixture {valid[-1].mean():.3f}", flush=True)
        if test:
            normal.append(fitted_normal(torch.cat([training, validation])).log_prob(held_out))
            single.append(mixture_log_prob(families[:1], held_out))
            mixture.append(mixture_log_prob(families, held_out))
    print(f"validation rows: mixture {mean_of(torch.cat(valid))}")
    if test:
        values = " | ".join(mean_of(torch.cat(each)) for each in (normal, single, mixture))
        print(
            f"| {name}, {x.shape[1]} columns | {members} MADE of {setting.words} | {values} | {setting.published} "
            f"| training {seconds / 60:.0f} min, this call {(time.perf_counter() - start) / 60:.1f} |"
        )


def table(data_dir: Path | None, name: str) -> Tensor:
    """Return the columns of a data set that the protocol keeps, (N, d), in doubles."""
    path = Path() if data_dir is None else data_dir / "uci_small.npz"
    if not path.is_file():
        typer.echo(f"skipped: the file {path} does not exist; set --data-dir or PYRO_GENMODELS_DATA", err=True)
        raise typer.Exit
    x = torch.from_numpy(np.load(path)[f"density.{name}"]).double()
    x = x[:, [column for column in range(x.shape[1]) if len(x[:, column].unique()) > DISCRETE_VALUES]]
    repeated = (x.T.corrcoef().abs() > MAX_CORRELATION).triu(1).any(0)
    return x[:, ~repeated]


def parts(x: Tensor, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return training, validation and test rows of each fold, in units of the mean and deviation of the first two."""
    folds = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).tensor_split(FOLDS)
    found = []
    for fold, held_out in enumerate(folds):
        rest = x[torch.cat([rows for other, rows in enumerate(folds) if other != fold])]
        loc, scale = rest.mean(0), rest.std(0, correction=0)
        rest, test = ((rows - loc) / scale for rows in (rest, x[held_out]))
        count = len(rest) // FOLDS
        found.append((rest[count:].float(), rest[:count].float(), test.float()))
    return found


def fitted_normal(x: Tensor) -> torch.distributions.MultivariateNormal:
    """Return the normal distribution with the mean and covariance of the rows."""
    return torch.distributions.MultivariateNormal(x.double().mean(0), x.double().T.cov(correction=0))


def fit_member(setting: Setting, x: Tensor, validation: Tensor, seed: int, file: Path, max_seconds: float) -> Any:
    """Return a masked network in an order of its own, trained with early stopping; resume it from its checkpoint."""
    torch.manual_seed(seed)
    made = Autoregressive(
        x.shape[1:],
        likelihood=NormalLikelihood(components=setting.components),
        hidden=(setting.hidden,),
        dropout=setting.dropout,
        order=torch.randperm(x.shape[1]),
        standardize=False,
        name="member",
    )
    optim = partial(torch.optim.Adam, lr=5e-3)
    options = {"batch_size": setting.batch_size, "patience": setting.patience, "ema_decay": 0.99}
    return train_member(made, x, validation, file, optim, seed=seed, max_seconds=max_seconds, **options)
