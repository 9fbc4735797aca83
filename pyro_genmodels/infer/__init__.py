"""Objectives: Pyro losses that train a model and its guide."""

from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.infer.objective import Objective

__all__ = ["MaximumLikelihood", "Objective"]
