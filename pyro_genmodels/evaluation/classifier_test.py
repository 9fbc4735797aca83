r"""A classifier's two-sample test: two sets of draws are as alike as a network finds it hard to tell them apart.

A network is trained to say which set a draw is from, and judged on draws it has not seen. With as many draws from p as from q,

.. math:: \mathbb{E}[\text{accuracy}] \le \tfrac12 \bigl(1 + \mathrm{TV}(p, q)\bigr), \qquad
    \mathrm{TV}(p, q) = \tfrac12 \int |p - q|,

with equality for the best of classifiers; so 0.5 is perfect, 1 is nowhere alike, and what the network does not see does not
count. Lopez-Paz and Oquab, *Revisiting Classifier Two-Sample Tests* (arXiv 1610.06545); the protocol is that of Lueckmann et
al., *Benchmarking Simulation-Based Inference* (arXiv 2101.04653).
"""

from __future__ import annotations

__all__ = ["TwoSample", "c2st"]

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.divergences.samples import as_matrices
from pyro_genmodels.utils.errors import import_extra


@dataclass(frozen=True)
class TwoSample:
    """How well two sets of draws were told apart.

    Attributes:
        values: accuracy on the draws held out by each fold, (folds,); 0.5 is chance.
        num_draws: draws on each side.
    """

    values: Tensor
    num_draws: int

    @property
    def value(self) -> float:
        """Mean accuracy over the folds."""
        return self.values.mean().item()

    @property
    def std_error(self) -> float:
        """Deviation of the folds' accuracies over the root of their number.

        It covers the chance of which draws were held out, and of training; from few folds it is itself uncertain (by a third
        for 5), and folds share draws they train on, so that it may be too small. For two sets from one law the deviation of the
        value is about ``0.5 / (2 * num_draws) ** 0.5``.
        """
        return (self.values.std() / len(self.values) ** 0.5).item()

    def __str__(self) -> str:
        return (
            f"{self.value:.3f} ± {self.std_error:.3f} told apart (0.5 is chance, {len(self.values)} folds, n={self.num_draws})"
        )


def c2st(
    x: Tensor,
    y: Tensor,
    *,
    folds: int = 5,
    seed: int = 1,
    hidden: Sequence[int] | None = None,
    progress: bool = False,
) -> TwoSample:
    """Accuracy with which a network tells draws of x from draws of y, cross-validated.

    Published figures are of 10,000 draws a side and of what is set here when nothing is said. Both sets are standardised by
    mean and deviation of x, the reference, number by number; where x does not vary, by the deviation of both sets together,
    and what varies in neither tells nothing. The network is scikit-learn's ``MLPClassifier`` with ReLU, trained by Adam until
    its loss stands still; rows are dealt to the folds at random, whichever set they are from.

    Args:
        x: the reference draws, (n, ...). The first dimension counts them, all others are the event, flattened to d numbers.
        y: the draws that are judged, as many, of events of the same shape.
        folds: parts, each of which is held out once, at least 2.
        seed: of the folds and of the networks: the same draws give the same answer.
        hidden: widths of the hidden layers; None, the protocol, is two of 10 d, which is slow beyond some 50 numbers.
        progress: whether to show a progress bar of folds.

    Returns:
        Accuracy of each fold, mean and standard error.

    Raises:
        ValueError: for events of different shapes, two devices, draws with NaN or infinity, different numbers of draws, and
            fewer than 2 folds or 10 draws a side for each.
        ImportError: without scikit-learn, of the extra ``eval``.

    Example:
        >>> answer = c2st(torch.randn(100, 1), torch.randn(100, 1) + 100)
        >>> answer.value, len(answer.values)
        (1.0, 5)
    """
    if folds < 2:
        raise ValueError(f"c2st wants at least 2 folds, got {folds=}.")
    x, y = as_matrices(x, y, by="c2st", least=10 * folds)
    if len(x) != len(y):
        n, larger = (len(y), "x") if len(x) > len(y) else (len(x), "y")
        raise ValueError(
            f"c2st wants as many draws on each side, for 0.5 to be chance, but found {len(x)} and {len(y)}. "
            f"Take {n} of the larger: {larger}[torch.randperm(len({larger}))[:{n}]]."
        )
    networks = import_extra("sklearn.neural_network", extra="eval", by="c2st")
    selection = import_extra("sklearn.model_selection", extra="eval", by="c2st")
    rows = standardised(x.detach(), y.detach()).cpu().numpy()
    sides = torch.arange(2).repeat_interleave(len(x)).numpy()
    widths = (10 * x.shape[1],) * 2 if hidden is None else tuple(hidden)
    accuracies = []
    parts = selection.KFold(folds, shuffle=True, random_state=seed).split(rows)
    for train, test in tqdm(parts, total=folds, desc="folds", disable=not progress, leave=False):
        network = networks.MLPClassifier(widths, max_iter=10_000, random_state=seed).fit(rows[train], sides[train])
        accuracies.append(network.score(rows[test], sides[test]))
    return TwoSample(torch.tensor(accuracies, dtype=torch.float64), len(x))


def standardised(x: Tensor, y: Tensor) -> Tensor:
    """Both sets, one below the other, (2n, d), each column by mean and deviation of x, or of both where x is constant."""
    both = torch.cat([x, y])
    scale = torch.where((x == x[0]).all(0), both.std(0), x.std(0))
    return (both - x.mean(0)) / torch.where((both == both[0]).all(0), 1.0, scale)
