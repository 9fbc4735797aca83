r"""Training of a conditional family on pairs of latent variables and observations.

Some pairs are held out, and training stops when their loss does not fall any more. The parameters that are kept are averages
over the last steps, which vary less than those of one step: Polyak and Juditsky (1992).
"""

from __future__ import annotations

__all__ = ["Training", "check_builder", "default_objective", "train_conditional"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.infer.denoising import DenoisingScoreMatching
from pyro_genmodels.infer.flow_matching import FlowMatching
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.infer.objective import Loss
from pyro_genmodels.utils.errors import type_with_article
from pyro_genmodels.utils.rng import forked_rng

HELD_OUT = 0.1
"""Share of the pairs that early stopping looks at."""
AVERAGE_DECAY = {False: 0.99, True: 0.999}
"""Decay per step of the average of the parameters: larger for velocities and scores, whose losses draw noise and times."""


@dataclass(frozen=True)
class Training:
    """Options of training.

    Attributes:
        max_epochs: largest number of passes through the pairs.
        batch_size: number of pairs per step.
        step_size: step size of Adam.
        patience: number of epochs without a smaller loss of held-out pairs after which training stops.
        progress: True for a progress bar.
    """

    max_epochs: int
    batch_size: int
    step_size: float
    patience: int
    progress: bool


def check_builder(owner: str, family: Any) -> None:
    """Check that an option is a class or function that builds a family.

    Raises:
        TypeError: if it is not, or is a family already.
    """
    if isinstance(family, nn.Module) or not callable(family):
        raise TypeError(
            f"{owner} builds the family itself: pass a class or a function, such as family=Flow, but found "
            f"{type_with_article(family)}."
        )


def default_objective(distribution: Any) -> Loss:
    """Return the loss that suits a distribution."""
    found = capabilities(distribution)
    if found.has_noise_error:
        return DenoisingScoreMatching()
    return FlowMatching() if found.has_velocity else MaximumLikelihood()


def train_conditional(
    family: Any, objective: Callable[[Any], Any], z: Tensor, context: Tensor, options: Training, history: list[float]
) -> None:
    """Train a family in place. Its parameters are then those of the best epoch, also if training is interrupted.

    Args:
        family: family with an `ObservationEncoder` as its context.
        objective: loss: given the family, it returns a function of rows of z and context, whose value is a sum over rows.
        z: unconstrained coordinates, (n, dim).
        context: observations, (n, numbers).
        options: options.
        history: list to which the loss of held-out rows is added after each epoch, per row.

    Raises:
        ValueError: if the loss is not finite after any epoch.
    """
    held, rest = _parts(len(z))
    family.train().prepare(z[rest], context[rest])
    loss = objective(family)
    parameters = [p for p in family.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=options.step_size)
    average = [p.detach().clone() for p in parameters]
    decay = AVERAGE_DECAY[getattr(objective, "wants_average", False)]
    encoder, best, since, steps = family.context, float("inf"), 0, 0
    kept = [p.clone() for p in average]
    z_held, context_held = z[held], encoder.hide(context[held])
    bar = tqdm(range(options.max_epochs), desc="training", unit="epoch", disable=not options.progress, mininterval=0.5)
    try:
        for _ in bar:
            family.train()
            for rows in rest[torch.randperm(len(rest))].split(options.batch_size):
                optimizer.zero_grad()
                value = loss(z[rows], encoder.hide(context[rows])) / len(rows)
                value.backward()
                nn.utils.clip_grad_norm_(parameters, 5.0)
                optimizer.step()
                steps += 1
                weight = 1 - min(decay, steps / (steps + 10))
                for mean, p in zip(average, parameters, strict=True):
                    mean.lerp_(p.detach(), weight)
            history.append(_held_out_loss(family, loss, parameters, average, z_held, context_held))
            if isfinite(history[-1]) and history[-1] < best:
                best, since, kept = history[-1], 0, [p.clone() for p in average]
            else:
                since += 1
            bar.set_postfix_str(f"held-out loss {history[-1]:.4f}, best {best:.4f}", refresh=False)
            if since >= options.patience:
                break
    finally:  # also if it is interrupted
        bar.close()
        with torch.no_grad():
            for p, x in zip(parameters, kept, strict=True):
                p.copy_(x)
    if best == float("inf"):
        raise ValueError(
            f"The loss of held-out simulations was not finite in any of {len(history)} epochs. Look for extreme values among "
            "the simulations, or train with a smaller step_size."
        )


def _parts(number: int) -> tuple[Tensor, Tensor]:
    """Return indices of rows that are held out and of the others, which are the same for each row if rows are added later.

    Training that goes on after more rows were made would otherwise hold out rows that it has been trained on. Their loss is too
    small, so that no later one falls below it, and training stops at once.
    """
    held = torch.from_numpy(np.random.default_rng(0).random(number) < HELD_OUT)
    return held.nonzero()[:, 0], (~held).nonzero()[:, 0]


@torch.no_grad()
def _held_out_loss(
    family: Any, loss: Any, parameters: Sequence[Tensor], average: Sequence[Tensor], z: Tensor, context: Tensor
) -> float:
    """Return the loss per row of held-out rows with averaged parameters, by the same random numbers at each call."""
    family.eval()
    current = [p.clone() for p in parameters]
    for p, x in zip(parameters, average, strict=True):
        p.copy_(x)
    with forked_rng(0):
        value = float(loss(z, context)) / len(z)
    for p, x in zip(parameters, current, strict=True):
        p.copy_(x)
    return value
