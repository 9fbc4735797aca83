"""Objectives: Pyro losses that train a model and its guide."""

from pyro_genmodels.infer.adversarial import Adversarial, LostGameError
from pyro_genmodels.infer.adversarial.losses import (
    FGAN,
    WGAN,
    AdversarialLoss,
    Hinge,
    LeastSquares,
    Minimax,
    NonSaturating,
    Relativistic,
)
from pyro_genmodels.infer.adversarial.pairings import (
    AggregatePairing,
    JointPairing,
    ObservationsPairing,
    Pairing,
    PosteriorPairing,
)
from pyro_genmodels.infer.adversarial.penalties import R1, R2, GradientPenalty, Penalty, WeightClipping, spectral_normalized
from pyro_genmodels.infer.autoguide import AutoFamily
from pyro_genmodels.infer.contrastive import ContrastiveDivergence, NoiseContrastive
from pyro_genmodels.infer.denoising import DenoisingScoreMatching, LikelihoodWeighting, LogNormalWeighting, UniformWeighting
from pyro_genmodels.infer.flow_matching import (
    FlowMatching,
    GaussianTargetCoupling,
    IndependentCoupling,
    LinearInterpolant,
    OptimalTransportCoupling,
    TrigonometricInterpolant,
)
from pyro_genmodels.infer.guided_posterior import GuidedDiffusion, TwistedDiffusion, WeightedDraws, diffusion_posterior, inpaint
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.infer.objective import Loss, Objective
from pyro_genmodels.infer.sample_losses import DrawLoss, DrawSets, MaximumMeanDiscrepancy, SlicedWasserstein, SpreadDivergence
from pyro_genmodels.infer.score_matching import ImplicitScoreMatching, SlicedScoreMatching

__all__ = [
    "FGAN",
    "R1",
    "R2",
    "WGAN",
    "Adversarial",
    "AdversarialLoss",
    "AggregatePairing",
    "AutoFamily",
    "ContrastiveDivergence",
    "DenoisingScoreMatching",
    "DrawLoss",
    "DrawSets",
    "FlowMatching",
    "GaussianTargetCoupling",
    "GradientPenalty",
    "GuidedDiffusion",
    "Hinge",
    "ImplicitScoreMatching",
    "IndependentCoupling",
    "JointPairing",
    "LeastSquares",
    "LikelihoodWeighting",
    "LinearInterpolant",
    "LogNormalWeighting",
    "Loss",
    "LostGameError",
    "MaximumLikelihood",
    "MaximumMeanDiscrepancy",
    "Minimax",
    "NoiseContrastive",
    "NonSaturating",
    "Objective",
    "ObservationsPairing",
    "OptimalTransportCoupling",
    "Pairing",
    "Penalty",
    "PosteriorPairing",
    "Relativistic",
    "SlicedScoreMatching",
    "SlicedWasserstein",
    "SpreadDivergence",
    "TrigonometricInterpolant",
    "TwistedDiffusion",
    "UniformWeighting",
    "WeightClipping",
    "WeightedDraws",
    "diffusion_posterior",
    "inpaint",
    "spectral_normalized",
]  # fmt: skip
