"""Checks that a `lightning.Trainer` can train a fit, with errors that say what it cannot."""

from __future__ import annotations

__all__ = ["check_callbacks", "check_launcher", "check_loss", "check_precision", "check_trainer"]

from typing import Any

from pyro_genmodels.infer.compiled import CaptureError, Mode
from pyro_genmodels.infer.compiled.losses import differentiable_loss
from pyro_genmodels.utils.errors import import_extra, repr_or_class

AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}
"""Names of callbacks of Lightning that average parameters."""


def check_trainer(trainer: Any, mode: Mode | None) -> None:
    """Raise an error unless this is a Trainer that can train a fit by this mode.

    Raises:
        TypeError: if it is no Trainer.
        ValueError: if it starts its processes in a way from which no fit returns, or the mode is a graph.
    """
    if mode is not None and mode.captures:
        raise ValueError(
            f"A Trainer takes eager steps, since a graph does not tell other devices of its gradients, but found mode={mode}: "
            "leave mode= out, or train without a trainer."
        )
    wanted = import_extra("lightning", extra="lightning", by="trainer=").Trainer
    if not isinstance(trainer, wanted):
        hint = ""
        if any(kind.__name__ == "Trainer" for kind in type(trainer).__mro__):
            hint = " Import it from lightning, not from pytorch_lightning."
        raise TypeError(f"train wants a lightning.Trainer(...) as trainer, but found {repr_or_class(trainer)}.{hint}")
    check_launcher(trainer)
    check_precision(trainer)


def check_precision(trainer: Any) -> None:
    """Raise an error if a Trainer makes parameters half precision, in which densities are then computed and summed.

    Raises:
        ValueError: for such a Trainer.
    """
    if (precision := str(trainer.precision)) in ("bf16-true", "16-true"):
        mixed = precision.replace("true", "mixed")
        raise ValueError(
            f"Trainer(precision={precision!r}) rounds parameters, log densities and losses to half precision. Use "
            f"precision={mixed!r}, which computes only networks in it."
        )


def check_launcher(trainer: Any) -> None:
    """Raise an error if a Trainer copies this process, whose fit the copies would train instead.

    Raises:
        ValueError: for such a Trainer.
    """
    launcher = type(trainer.strategy.launcher).__name__
    if "MultiProcessing" in launcher:
        raise ValueError(
            "The Trainer trains in copies of this process, from which no fit returns. Use strategy='ddp' in a script, which "
            "starts the script once for each device, or torchrun."
        )


def check_callbacks(trainer: Any) -> None:
    """Raise an error if a callback of a Trainer averages the parameters.

    Raises:
        ValueError: for such a callback.
    """
    for found in trainer.callbacks:
        if AVERAGING & {kind.__name__ for kind in type(found).__mro__}:
            raise ValueError(
                f"A fit averages its parameters itself: leave {type(found).__name__} out of the callbacks, and pass ema_decay= "
                "to train or to LightningFit."
            )


def check_loss(step: Any, *, is_differentiated: bool) -> None:
    """Raise an error for steps by a graph, and for a loss that is no function to differentiate.

    Args:
        step: the training step.
        is_differentiated: True if Lightning differentiates the loss; False for an adversarial step.

    Raises:
        ValueError: for such a step or loss.
    """
    if step.mode.captures:
        raise ValueError(
            f"A Trainer takes eager steps, since a graph does not tell other devices of its gradients, but the objective has "
            f"mode={step.mode}: build it without mode=, or train without a trainer."
        )
    if not is_differentiated:
        return
    try:
        differentiable_loss(step.objective)
    except CaptureError as error:
        name = type(step.objective).__name__
        raise ValueError(
            f"A Trainer wants a loss that is differentiable by itself, but {name} computes its gradients in another way: "
            "train without a trainer, or use another objective."
        ) from error
