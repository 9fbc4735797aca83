"""Likelihoods of binary data sets: python benchmarks/published.py binary plants --data-dir DIR

A model is a mixture of masked networks (MADE) of equal weights. Each has its own order of the coordinates and its own first
parameters, and stops where the loss of the validation rows is lowest. The density of a mixture is exact. The test rows are read
once, at the end. An interrupted run resumes from the checkpoints of its members.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from binary_data import DataDir, binary
from masked_mixtures import mean_of, mixture_log_prob, train_member
from torch import Tensor

from pyro_genmodels import Autoregressive, BernoulliLikelihood, CategoricalLikelihood, log_likelihood


@dataclass(frozen=True)
class Setting:
    """Options of the members of a mixture for one data set.

    Attributes:
        published: words on the published values.
        file: name of the file.
        hidden: widths of the hidden layers.
        direct: True for direct connections of inputs to outputs.
        dropout: rate at which hidden units are dropped in training.
        weight_decay: decay of the weights, which does not apply to biases.
        learning_rate: step size of Adam.
        ema_decay: decay of the averaged parameters.
        patience: number of epochs without a better validation loss.
        symbols: number of bits that code a symbol, of which at most one is set; 1 models the bits themselves.
        members: number of members.
    """

    published: str
    file: str = "debd.npz"
    hidden: Sequence[int] = (500,)
    direct: bool = False
    dropout: float = 0.5
    weight_decay: float = 0.0
    learning_rate: float = 2e-3
    ema_decay: float = 0.99
    patience: int = 10
    symbols: int = 1
    members: int = 1

    @property
    def words(self) -> str:
        """Words for the table."""
        coded = f", symbols of {self.symbols} bits" if self.symbols > 1 else ""
        layers = " x ".join(map(str, self.hidden))
        direct = ", direct connections" if self.direct else ""
        return f"{layers} units{direct}, dropout {self.dropout:g}, weight decay {self.weight_decay:g}{coded}"


SETTINGS = {
    "mnist": Setting(
        "88.40 (MADE, 1 x 8000), 88.04 (of 32 masks), 88.33 (NADE)",
        file="binarized_mnist.npz",
        hidden=(2000,),
        direct=True,
        dropout=0.1,
        learning_rate=1e-3,
        ema_decay=0.999,
        patience=2,
        members=4,
    ),
    "nltcs": Setting("-6.00 (HCLT circuit)", hidden=(256, 256), dropout=0.2, ema_decay=0.999, members=2),
    "plants": Setting("-12.68 (HCLT circuit)", dropout=0.2, ema_decay=0.999),
    "jester": Setting("-52.82 (HCLT circuit)", dropout=0.3, ema_decay=0.999),
    "accidents": Setting("-26.55 (HCLT circuit)", dropout=0.2, ema_decay=0.999),
    "mushrooms": Setting("-9.68 (MADE), -9.69 (EoNADE)", dropout=0.3, learning_rate=3e-3, members=4),
    "dna_made": Setting("-79.66 (MADE of masks), -82.31 (EoNADE)", weight_decay=3.0, symbols=3, members=6),
    "nips": Setting("-272.39 (EoNADE), -277.28 (MADE of masks)", weight_decay=3.0, members=32),
}


def main(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(SETTINGS)}")],
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("out/published"),
    seed: int = 0,
    members: Annotated[int | None, typer.Option(help="Number of members; None is that of the table.")] = None,
    max_seconds: Annotated[float, typer.Option(help="Time to train one member; the last epoch is finished.")] = 600.0,
    test: Annotated[bool, typer.Option(help="Read the test rows.")] = True,  # noqa: FBT002 (an option)
    threads: int = 2,
) -> None:
    """Train a mixture of masked networks on a binary data set, and print its row."""
    if name not in SETTINGS:
        raise typer.BadParameter(f"no data set {name!r}: it is one of {', '.join(SETTINGS)}")
    torch.set_num_threads(threads)
    setting = SETTINGS[name]
    members = members or setting.members
    prefix = "" if name == "mnist" else f"{name}."
    parts = {part: as_symbols(x, setting.symbols) for part, x in binary(data_dir, setting.file, prefix).items()}
    fits = []
    for member in range(members):
        fits.append(fit_member(setting, parts, 1000 * seed + member, out / f"binary-{name}-{seed}-{member}", max_seconds))
        best = fits[-1].best
        print(f"member {member}: validation {-best['valid']:.3f}, epoch {best['epoch']}, {fits[-1].stopped}", flush=True)
    training = sum(fit.history[-1]["seconds"] for fit in fits)
    families = [fit.family for fit in fits]
    valid = mixture_log_prob(families, parts["valid"])
    one = torch.tensor([-fit.best["valid"] for fit in fits]).mean()
    print(f"validation: members {one:.3f}, mixture {valid.mean():.3f}")
    if not test:
        return
    start = time.perf_counter()
    single, value = log_likelihood(families[0], parts["test"]).values, mixture_log_prob(families, parts["test"])
    print(
        f"| {name} | {members} MADE of {setting.words} | {valid.mean():.3f} | {mean_of(single)} | {mean_of(value)} "
        f"| {setting.published} | training {training / 60:.1f} min, evaluation {(time.perf_counter() - start) / 60:.1f} |"
    )


def fit_member(setting: Setting, parts: dict[str, Tensor], seed: int, file: Path, max_seconds: float) -> Any:
    """Return a masked network in an order of its own, trained with early stopping; resume it from its checkpoint."""
    x = parts["train"]
    torch.manual_seed(seed)
    order = torch.randperm(x.shape[1])
    likelihood = BernoulliLikelihood() if setting.symbols == 1 else CategoricalLikelihood(setting.symbols + 1)
    made = Autoregressive(
        x.shape[1:],
        likelihood=likelihood,
        hidden=setting.hidden,
        direct=setting.direct,
        dropout=setting.dropout,
        order=order,
        name="member",
    )
    if setting.symbols > 1:
        start_at_frequencies(made, x)
    optim = partial(adam, lr=setting.learning_rate, weight_decay=setting.weight_decay)
    options = {"batch_size": 100, "patience": setting.patience, "ema_decay": setting.ema_decay}
    return train_member(made, x, parts["valid"], file, optim, seed=seed, max_seconds=max_seconds, **options)


def as_symbols(x: Tensor, bits: int) -> Tensor:
    """Return symbols 0 .. bits for rows of groups of bits with at most one set: the place of that bit, or 0.

    Rows and symbols determine each other, so that both have the same probability.

    Raises:
        ValueError: if a group has two bits set.
    """
    if bits == 1:
        return x
    groups = x.unflatten(1, (-1, bits))
    if (groups.sum(-1) > 1).any():
        raise ValueError(f"The rows are not groups of {bits} bits with at most one set.")
    return groups @ torch.arange(1.0, bits + 1)


def start_at_frequencies(made: Autoregressive, x: Tensor) -> None:
    """Set the output biases of a masked network of classes to independent coordinates with the frequencies of the rows."""
    counts = torch.nn.functional.one_hot(x.long()).sum(0)[made.order] + 0.5
    with torch.no_grad():
        made.conditionals.output.bias.copy_(counts.log().flatten())


def adam(parameters: Iterable[torch.nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return Adam with a decay of weights, but not of biases."""
    parameters = list(parameters)
    weights, biases = ([p for p in parameters if (p.dim() > 1) == wanted] for wanted in (True, False))
    return torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=lr, weight_decay=weight_decay)
