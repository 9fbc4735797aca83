r"""Classifier two-sample test (C2ST): the accuracy with which a network tells two sets of samples apart.

A network is trained to classify samples by the set they come from, and its accuracy is measured on held-out samples. With as
many samples from p as from q,

.. math:: \mathbb{E}[\text{accuracy}] \le \tfrac12 \bigl(1 + \mathrm{TV}(p, q)\bigr), \qquad
    \mathrm{TV}(p, q) = \tfrac12 \int |p - q|,

with equality for the best classifier: 0.5 for equal distributions, 1 for disjoint ones. Differences that the network does not
learn are not counted. Lopez-Paz and Oquab, *Revisiting Classifier Two-Sample Tests* (arXiv 1610.06545); the protocol is that of
Lueckmann et al., *Benchmarking Simulation-Based Inference* (arXiv 2101.04653).
"""

from __future__ import annotations

__all__ = ["ClassifierTest", "c2st"]

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.divergences.samples import Samples, as_matrices
from pyro_genmodels.utils.errors import import_extra, listed, warn_caller

FAR_SHARE = 0.01
"""Largest share of rows, those farthest from the median of a coordinate, that must not decide its deviation."""
MAX_FAR_EFFECT = 10.0
"""Largest factor by which these rows may raise the deviation: beyond, the network sees all others as nearly one value."""


@dataclass(frozen=True)
class ClassifierTest:
    """Cross-validated accuracy of a classifier of two sets of samples.

    Attributes:
        values: accuracy on the held-out samples of each fold, (folds,); 0.5 is chance.
        num_samples: number of samples in each set.
    """

    values: Tensor
    num_samples: int

    @property
    def value(self) -> float:
        """Mean accuracy over the folds."""
        return self.values.mean().item()

    @property
    def std_error(self) -> float:
        """Standard deviation of the folds' accuracies, divided by the root of their number.

        It covers the random choice of held-out samples, and of training. With few folds it is itself uncertain (by a third for
        5), and since folds share training samples it may be too small. For equal distributions the standard deviation of the
        value is about ``0.5 / (2 * num_samples) ** 0.5``.
        """
        return (self.values.std() / len(self.values) ** 0.5).item()

    def __str__(self) -> str:
        return (
            f"accuracy {self.value:.3f} ± {self.std_error:.3f} (0.5 is chance, {len(self.values)} folds, n={self.num_samples})"
        )


def c2st(
    x: Samples,
    y: Samples,
    *,
    folds: int = 5,
    seed: int = 1,
    hidden: Sequence[int] | None = None,
    progress: bool = False,
) -> ClassifierTest:
    """Return the cross-validated accuracy with which a network tells samples of x from samples of y.

    Published values use 10,000 samples per set and the defaults of this function. Both sets are standardised by the mean and
    the standard deviation of x, the reference, coordinate by coordinate. A coordinate that is constant in x is scaled by the
    standard deviation of both sets together; one that is constant in both is ignored. The network is scikit-learn's
    ``MLPClassifier`` with ReLU, trained by Adam until its loss stops falling. Rows are assigned to folds at random, independent
    of their set.

    Args:
        x: reference samples, (n, ...). The dimensions after the first are the event, which is flattened to d numbers.
        y: samples to compare with them, as many, of events of the same shape.
        folds: number of folds, at least 2; each is held out once.
        seed: seed of the folds and the networks; the same samples and seed give the same accuracies.
        hidden: widths of the hidden layers; None, the protocol, is two of 10 d, which is slow beyond some 50 numbers.
        progress: True to show a progress bar of folds.

    Returns:
        Accuracy of each fold, mean and standard error.

    Raises:
        ValueError: for events of different shapes, two devices, samples with NaN or infinity, different numbers of samples,
            fewer than 2 folds, or fewer than 10 samples per set and fold.
        ImportError: if scikit-learn, of the extra ``eval``, is missing.

    Warns:
        RuntimeWarning: if a few far rows of x decide its standard deviation, so that the network cannot tell the others apart.

    Example:
        >>> answer = c2st(torch.randn(100, 1), torch.randn(100, 1) + 100)
        >>> answer.value, len(answer.values)
        (1.0, 5)
    """
    if folds < 2:
        raise ValueError(f"c2st wants at least 2 folds, but found {folds=}.")
    x, y, _ = as_matrices(x, y, by="c2st", least=10 * folds)
    if len(x) != len(y):
        n, larger = (len(y), "x") if len(x) > len(y) else (len(x), "y")
        raise ValueError(
            f"c2st wants two sets of the same size, so that 0.5 is chance, but found {len(x)} and {len(y)} samples. "
            f"Take {n} of the larger set: {larger}[torch.randperm(len({larger}))[:{n}]]."
        )
    networks = import_extra("sklearn.neural_network", extra="eval", by="c2st")
    selection = import_extra("sklearn.model_selection", extra="eval", by="c2st")
    _warn_of_far_rows(x.detach())
    rows = standardised(x.detach(), y.detach()).cpu().numpy()
    labels = torch.arange(2).repeat_interleave(len(x)).numpy()
    widths = (10 * x.shape[1],) * 2 if hidden is None else tuple(hidden)
    accuracies = []
    parts = selection.KFold(folds, shuffle=True, random_state=seed).split(rows)
    for train, test in tqdm(parts, total=folds, desc="folds", disable=not progress, leave=False):
        network = networks.MLPClassifier(widths, max_iter=10_000, random_state=seed).fit(rows[train], labels[train])
        accuracies.append(network.score(rows[test], labels[test]))
    return ClassifierTest(torch.tensor(accuracies, dtype=torch.float64), len(x))


def standardised(x: Tensor, y: Tensor) -> Tensor:
    """Return both sets, concatenated, (2n, d), and standardised by x.

    A column is standardised by the mean and standard deviation of x; the standard deviation of both sets is used if the column
    is constant in x.
    """
    both = torch.cat([x, y])
    scale = torch.where((x == x[0]).all(0), both.std(0), x.std(0))
    return (both - x.mean(0)) / torch.where((both == both[0]).all(0), 1.0, scale)


def _warn_of_far_rows(x: Tensor) -> None:
    """Warn if the standard deviation of a coordinate comes mostly from the farthest hundredth of the reference samples."""
    few = max(1, int(FAR_SHARE * len(x)))
    nearest = (x - x.median(0).values).abs().argsort(0)[: len(x) - few]
    rest = x.gather(0, nearest).std(0)
    if (far := (rest > 0) & (x.std(0) > MAX_FAR_EFFECT * rest)).any():
        coordinates = listed(map(str, far.nonzero()[:, 0].tolist()))
        warn_caller(
            f"c2st: a few far rows of x decide its standard deviation in coordinate {coordinates}, so that the network sees "
            "all others as nearly one value and the accuracy is too low. Leave them out of both sets by one rule, or compare "
            "logarithms or ranks."
        )
