"""Objectives: Pyro losses that train a model and its guide."""

from pyro_genmodels.infer.adversarial import Adversarial, GameOverError
from pyro_genmodels.infer.adversarial.losses import (
    FGAN,
    Game,
    Hinge,
    LeastSquares,
    Minimax,
    NonSaturating,
    Relativistic,
    Wasserstein,
)
from pyro_genmodels.infer.adversarial.pairings import Aggregate, Joint, Matching, Observations, Posterior
from pyro_genmodels.infer.adversarial.penalties import R1, R2, GradientPenalty, Penalty, WeightClipping, spectral_normalized
from pyro_genmodels.infer.autoguide import AutoFamily
from pyro_genmodels.infer.contrastive import ContrastiveDivergence, NoiseContrastive
from pyro_genmodels.infer.denoising import DenoisingScoreMatching, LikelihoodWeighting, LogNormalWeighting, UniformWeighting
from pyro_genmodels.infer.flow_matching import FlowMatching, Independent, OptimalTransport, Straight, Target, Trigonometric
from pyro_genmodels.infer.guided_posterior import GuidedDiffusion, TwistedDiffusion, WeightedDraws, diffusion_posterior, inpaint
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.infer.objective import Loss, Objective
from pyro_genmodels.infer.sample_losses import DrawLoss, DrawSets, MaximumMeanDiscrepancy, SlicedWasserstein, SpreadDivergence
from pyro_genmodels.infer.score_matching import ImplicitScoreMatching, SlicedScoreMatching

__all__ = [
    "FGAN", "R1", "R2", "Adversarial", "Aggregate", "AutoFamily", "ContrastiveDivergence", "DenoisingScoreMatching",
    "DrawLoss", "DrawSets", "FlowMatching", "Game", "GameOverError", "GradientPenalty", "GuidedDiffusion", "Hinge",
    "ImplicitScoreMatching", "Independent", "Joint", "LeastSquares", "LikelihoodWeighting", "LogNormalWeighting",
    "Loss", "Matching", "MaximumLikelihood", "MaximumMeanDiscrepancy", "Minimax", "NoiseContrastive", "NonSaturating",
    "Objective", "Observations", "OptimalTransport", "Penalty", "Posterior", "Relativistic", "SlicedScoreMatching",
    "SlicedWasserstein", "SpreadDivergence", "Straight", "Target", "Trigonometric", "TwistedDiffusion",
    "UniformWeighting", "Wasserstein", "WeightClipping", "WeightedDraws", "diffusion_posterior", "inpaint",
    "spectral_normalized",
]  # fmt: skip
