"""Objectives: Pyro losses that train a model and its guide."""

from pyro_genmodels.infer.contrastive import ContrastiveDivergence, NoiseContrastive
from pyro_genmodels.infer.denoising import (
    DenoisingScoreMatching,
    LikelihoodWeighting,
    LogNormalWeighting,
    UniformWeighting,
)
from pyro_genmodels.infer.diffusion_posterior import (
    GuidedDiffusion,
    TwistedDiffusion,
    WeightedDraws,
    diffusion_posterior,
    inpaint,
)
from pyro_genmodels.infer.draws import DrawLoss, DrawSets, MaximumMeanDiscrepancy, SlicedWasserstein, SpreadDivergence
from pyro_genmodels.infer.flow_matching import FlowMatching, Independent, OptimalTransport, Straight, Target, Trigonometric
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.infer.objective import Loss, Objective
from pyro_genmodels.infer.score_matching import ImplicitScoreMatching, SlicedScoreMatching

__all__ = [
    "ContrastiveDivergence", "DenoisingScoreMatching", "DrawLoss", "DrawSets", "FlowMatching", "GuidedDiffusion",
    "ImplicitScoreMatching", "Independent", "LikelihoodWeighting", "LogNormalWeighting", "Loss", "MaximumLikelihood",
    "MaximumMeanDiscrepancy", "NoiseContrastive", "Objective", "OptimalTransport", "SlicedScoreMatching", "SlicedWasserstein",
    "SpreadDivergence", "Straight", "Target", "Trigonometric", "TwistedDiffusion", "UniformWeighting", "WeightedDraws",
    "diffusion_posterior", "inpaint",
]  # fmt: skip
