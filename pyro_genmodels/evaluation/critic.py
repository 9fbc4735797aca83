r"""What an adversarial game has come to: whether its critic is a good judge, what it proves, and what the draws miss.

Where the critic is at its best, :math:`D(x) = \sigma(\log p/q)` is the share of data among data and draws at x. So among rows
of which it says .7, seven of ten are data, and the *calibration error* over bins b of as many rows,

.. math:: \sum_b \frac{n_b}{n} \bigl|\overline{D}_b - \text{share of data}_b\bigr|,

is zero but for chance. *Coverage* is the share of data with a draw no farther than their k-th nearest neighbour among data:
about :math:`1 - 2^{-k}` for as many draws of the same law, and little where modes are missed. Guo et al., *On Calibration of
Modern Neural Networks* (arXiv 1706.04599); Naeem et al., *Reliable Fidelity and Diversity Metrics for Generative Models* (arXiv
2002.09797).
"""

from __future__ import annotations

__all__ = ["Diagnosis", "coverage", "diagnose"]

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.divergences import Divergence
from pyro_genmodels.divergences.samples import as_matrices

NEIGHBOURS = 5


@dataclass(frozen=True)
class Diagnosis:
    """What is known of a game.

    Attributes:
        calibration_error: of the critic, from 0 to 1; NaN in a game whose critic estimates no ratio.
        distance: mean distance of D from the optimum over data and draws, where that is known; else NaN.
        divergence: the lower bound that the critic proves, of the divergence its game is about; None in a game about
            none, and of packs.
        coverage: of the data by as many draws.
        expected: coverage by draws of the same law.
    """

    calibration_error: float
    distance: float
    divergence: Divergence | None
    coverage: float
    expected: float

    @property
    def collapsed(self) -> bool:
        """Whether draws miss more than half of what draws of the same law would cover."""
        return self.coverage < self.expected / 2

    def __str__(self) -> str:
        bound = (
            ""
            if self.divergence is None
            else f", divergence at least {self.divergence.value:.3f} ± {self.divergence.std_error:.3f}"
        )
        known = "" if self.distance != self.distance else f", {self.distance:.3f} from the optimum"
        return (
            f"critic off by {self.calibration_error:.3f}{known}{bound}; draws cover {self.coverage:.0%} of the data "
            f"({self.expected:.0%} by the same law){': COLLAPSED' if self.collapsed else ''}"
        )


def diagnose(game: Any, x: Tensor, *args: Any, log_ratio: Callable[..., Tensor] | None = None, bins: int = 10) -> Diagnosis:
    """How a game stands on data, best held out, and as many fresh draws.

    Args:
        game: an `Adversarial` that tells data from draws.
        x: data, some hundreds of rows at least.
        args: the model's other arguments.
        log_ratio: where both laws are known, log p/q at what the critic sees.
        bins: of the calibration error.

    Returns:
        What is known; with a RuntimeWarning if the draws have collapsed.

    Raises:
        ValueError: for fewer than 5 rows in a bin.

    Example:
        >>> from pyro_genmodels import GAN, NSF, Adversarial, Flow
        >>> flow, x = Flow((2,), transform=NSF(transforms=1)), torch.randn(200, 2)
        >>> diagnose(Adversarial(flow.model, GAN((2,)).critic), x).coverage > 0.5
        True
    """
    if not hasattr(game, "play"):
        raise TypeError(f"diagnose wants the Adversarial that trains, but found {type(game).__name__}. See coverage(x, draws).")
    if bins < 1 or len(x) < 5 * bins:
        raise ValueError(f"diagnose wants at least 5 rows for each of {bins} bins, but found {len(x)}.")
    if log_ratio is not None and game.pack > 1:
        raise ValueError(f"log_ratio is of single rows, but this critic sees {game.pack} at once. Leave it out, or use pack=1.")
    sides, (real, fake) = game.play(x, *args)
    calibration = distance = float("nan")
    objective = game.objective
    if objective.estimates_ratio:
        says = objective.log_ratio(torch.cat([real, fake])).sigmoid()
        side = torch.cat([torch.ones_like(real), torch.zeros_like(fake)])
        mixed = torch.randperm(len(says), device=says.device)  # so that rows of which it says the same are not data first
        parts = mixed[says[mixed].argsort()].tensor_split(bins)
        calibration = sum(abs(says[part].mean() - side[part].mean()).item() * len(part) for part in parts) / len(says)
        if log_ratio is not None:
            best = torch.cat([log_ratio(*side) for side in (sides.real, sides.fake)]).sigmoid()
            distance = (says - best).abs().mean().item()
    seen = [torch.cat([part.reshape(len(part), -1) for part in side], 1) for side in (sides.real, sides.fake)]
    found = Diagnosis(
        calibration,
        distance,
        objective.divergence(real, fake) if objective.bounds and game.pack == 1 else None,
        coverage(*seen),
        1 - 0.5**NEIGHBOURS,
    )
    if found.collapsed:
        warnings.warn(
            f"The draws cover {found.coverage:.0%} of the data, where draws of the same law would {found.expected:.0%}: the "
            "model has collapsed, or is far from the data. Try R1 and R2, packing (pack=4), or a smaller step.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def coverage(x: Tensor, draws: Tensor, *, neighbours: int = NEIGHBOURS) -> float:
    """The share of data that have a draw within the distance of their so-many-th nearest neighbour among the data.

    Args:
        x: data, (n, ...).
        draws: as many, of events of the same shape, (n, ...).
        neighbours: k.

    Raises:
        ValueError: for events of different shapes, and for other numbers of draws or too few data.

    Example:
        >>> x = torch.arange(20.0)
        >>> coverage(x, x), coverage(x, torch.zeros(20))
        (1.0, 0.2)
    """
    x, draws = as_matrices(x, draws, by="coverage", least=neighbours + 1)
    if len(x) != len(draws):
        raise ValueError(f"coverage wants as many draws as data, but found {len(draws)} and {len(x)}.")
    radius = torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values  # the nearest is the datum itself
    return (torch.cdist(x, draws).min(1).values <= radius).double().mean().item()
