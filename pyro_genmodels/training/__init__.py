"""Training: one loop for every fit, and what it leaves on disk."""

from pyro_genmodels.training.loop import Fit, train

__all__ = ["Fit", "train"]
