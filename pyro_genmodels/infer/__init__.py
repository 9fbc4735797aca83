"""Objectives: Pyro losses that train a model and its guide."""

from pyro_genmodels.infer.contrastive import ContrastiveDivergence, NoiseContrastive
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.infer.objective import Objective
from pyro_genmodels.infer.score_matching import DenoisingScoreMatching, ImplicitScoreMatching, SlicedScoreMatching

__all__ = [
    "ContrastiveDivergence", "DenoisingScoreMatching", "ImplicitScoreMatching", "MaximumLikelihood", "NoiseContrastive",
    "Objective", "SlicedScoreMatching",
]  # fmt: skip
