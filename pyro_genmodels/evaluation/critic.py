r"""Diagnosis of adversarial training: calibration of the critic, the divergence it proves, and coverage of the data.

The optimal critic outputs :math:`D(x) = \sigma(\log p/q)`, the probability that x is real rather than generated. Of the rows
with output 0.7, seven of ten are then real, and the *calibration error* over bins b of equally many rows,

.. math:: \sum_b \frac{n_b}{n} \bigl|\overline{D}_b - \text{share of real rows}_b\bigr|,

is zero up to sampling noise. *Coverage* is the share of data points with a sample within the distance of their k-th nearest
neighbour among the data: about :math:`1 - 2^{-k}` for as many samples of the same distribution, and low if modes are missing.
Guo et al., *On Calibration of Modern Neural Networks* (arXiv 1706.04599); Naeem et al., *Reliable Fidelity and Diversity
Metrics for Generative Models* (arXiv 2002.09797).
"""

from __future__ import annotations

__all__ = ["Diagnosis", "coverage", "diagnose"]

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.divergences import Divergence
from pyro_genmodels.divergences.samples import Samples, as_matrices
from pyro_genmodels.utils.distances import distances
from pyro_genmodels.utils.errors import check_positive_int, warn_caller

NUM_NEIGHBOURS = 5
"""k in the definition of coverage."""
MIN_ROWS_PER_BIN = 5
"""Smallest number of rows in a bin of the calibration error."""


@dataclass(frozen=True)
class Diagnosis:
    """Diagnosis of adversarial training.

    Attributes:
        calibration_error: calibration error of the critic, from 0 to 1; NaN if the critic does not estimate a density ratio.
        distance: mean absolute difference of D from the optimal critic over real and generated rows; NaN if log_ratio is not
            given.
        divergence: lower bound of the divergence that the critic proves; None if the loss bounds no divergence, or if the
            critic sees packs.
        coverage: coverage of the data by as many samples.
        expected_coverage: coverage by samples of the same distribution as the data.
    """

    calibration_error: float
    distance: float
    divergence: Divergence | None
    coverage: float
    expected_coverage: float

    @property
    def collapsed(self) -> bool:
        """True if coverage is less than half of the expected coverage."""
        return self.coverage < self.expected_coverage / 2

    def __str__(self) -> str:
        bound = ""
        if self.divergence is not None:
            trusted = "" if self.divergence.reliable else f", unreliable (k = {self.divergence.pareto_k:.1f})"
            bound = f", divergence at least {self.divergence.value:.3f} ± {self.divergence.std_error:.3f}{trusted}"
        distance = "" if isnan(self.distance) else f", distance from the optimal critic {self.distance:.3f}"
        return (
            f"critic: calibration error {self.calibration_error:.3f}{distance}{bound}; samples cover {self.coverage:.0%} of "
            f"the data ({self.expected_coverage:.0%} expected){': COLLAPSED' if self.collapsed else ''}"
        )


def diagnose(
    adversarial: Any, x: Tensor, *args: Any, log_ratio: Callable[..., Tensor] | None = None, bins: int = 10
) -> Diagnosis:
    """Diagnose adversarial training on data, preferably held out, and as many new samples.

    Model and critic run in evaluation mode, and their mode is restored afterwards.

    Args:
        adversarial: `Adversarial` that compares data with samples.
        x: data, some hundreds of rows or more.
        args: other arguments of the model.
        log_ratio: function of the critic's inputs that returns the true log p/q, if both densities are known.
        bins: number of bins of the calibration error.

    Returns:
        The diagnosis. A RuntimeWarning is issued if the samples have collapsed.

    Raises:
        TypeError: if adversarial is no `Adversarial`.
        ValueError: for fewer than 5 rows per bin, outputs of the critic with NaN or infinity, and a log_ratio of another shape
            or with NaN.

    Example:
        >>> from pyro_genmodels import GAN, NSF, Adversarial, Flow
        >>> flow, x = Flow((2,), transform=NSF(transforms=1)), torch.randn(200, 2)
        >>> diagnose(Adversarial(flow.model, GAN((2,)).critic), x).coverage > 0.5
        True
    """
    if not hasattr(adversarial, "critic_outputs"):
        raise TypeError(
            f"diagnose wants the Adversarial that trains the model, but found {type(adversarial).__name__}. For samples alone "
            "see coverage(x, samples)."
        )
    if bins < 1 or len(x) < MIN_ROWS_PER_BIN * bins:
        raise ValueError(f"diagnose wants at least {MIN_ROWS_PER_BIN} rows for each of {bins} bins, but found {len(x)} rows.")
    if log_ratio is not None and adversarial.pack > 1:
        raise ValueError(
            f"log_ratio takes single rows, but this critic sees {adversarial.pack} rows at once. Leave it out, or use pack=1."
        )
    inputs, (real, fake) = adversarial.critic_outputs(x, *args)
    for name, values in (("real", real), ("generated", fake)):
        if not values.isfinite().all():
            raise ValueError(
                f"diagnose wants a critic with finite outputs, but found NaN or infinity on {int((~values.isfinite()).sum())} "
                f"of {len(values)} {name} rows. Look for NaN in the data and in the samples, or train with a smaller rate."
            )
    loss = adversarial.loss
    calibration_error = distance = float("nan")
    if loss.estimates_ratio:
        probability = loss.log_ratio(torch.cat([real, fake])).sigmoid()
        calibration_error = _calibration_error(probability, len(real), bins)
        if log_ratio is not None:
            ratios = torch.cat([log_ratio(*part) for part in (inputs.real, inputs.fake)])
            if ratios.shape != probability.shape or ratios.isnan().any():
                raise ValueError(
                    f"diagnose wants a log_ratio that returns a number for each row, {tuple(probability.shape)} in all, but "
                    f"found shape {tuple(ratios.shape)} with {int(ratios.isnan().sum())} NaN."
                )
            optimum = ratios.sigmoid()
            distance = (probability - optimum).abs().mean().item()
    rows = [torch.cat([value.reshape(len(value), -1) for value in part], 1) for part in (inputs.real, inputs.fake)]
    diagnosis = Diagnosis(
        calibration_error,
        distance,
        loss.divergence(real, fake) if loss.bounds_divergence and adversarial.pack == 1 else None,
        coverage(*rows),
        1 - 0.5**NUM_NEIGHBOURS,
    )
    if diagnosis.collapsed:
        warn_caller(
            f"The samples cover {diagnosis.coverage:.0%} of the data, and samples of the same distribution would cover "
            f"{diagnosis.expected_coverage:.0%}: the model has collapsed, or is far from the data. Try R1 and R2, packing "
            "(pack=4), or a smaller learning rate.",
        )
    return diagnosis


def _calibration_error(probability: Tensor, num_real: int, bins: int) -> float:
    """Return the calibration error, from 0 to 1, over bins of equally many rows.

    Rows of equal probability are put in random order, so the result varies between calls if there are any.

    Args:
        probability: predicted probability that each row is real, (n,).
        num_real: number of rows that are real. They are the first ones.
        bins: number of bins.
    """
    is_real = (torch.arange(len(probability), device=probability.device) < num_real).to(probability)
    shuffled = torch.randperm(len(probability), device=probability.device)  # ties must not list real rows first
    parts = shuffled[probability[shuffled].argsort()].tensor_split(bins)
    errors = [(probability[part].mean() - is_real[part].mean()).abs().item() * len(part) for part in parts]
    return sum(errors) / len(probability)


def coverage(x: Samples, samples: Samples, *, num_neighbours: int = NUM_NEIGHBOURS) -> float:
    """Return the share of data points that have a sample within the distance of their k-th nearest neighbour in the data.

    Args:
        x: data, (n, ...).
        samples: as many samples, of events of the same shape, (n, ...).
        num_neighbours: k.

    Raises:
        TypeError: for anything but tensors, arrays and frames of numbers.
        ValueError: for events of different shapes, different numbers of samples and data, too few data, or NaN or infinity in
            either.

    Example:
        >>> x = torch.arange(20.0)
        >>> coverage(x, x), coverage(x, torch.zeros(20))
        (1.0, 0.2)
    """
    check_positive_int("coverage", num_neighbours=num_neighbours)
    x, samples, _ = as_matrices(x, samples, by="coverage", least=num_neighbours + 1, names=("x", "samples"))
    if len(x) != len(samples):
        raise ValueError(f"coverage wants as many samples as data, but found {len(samples)} samples and {len(x)} data.")
    with torch.no_grad():
        radius = distances(x, x).kthvalue(num_neighbours + 1, dim=1).values  # the nearest is the datum itself
        return (distances(x, samples).min(1).values <= radius).double().mean().item()
