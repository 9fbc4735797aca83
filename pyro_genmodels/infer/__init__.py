"""Objectives: Pyro losses that train a model and its guide."""

from pyro_genmodels.infer.adversarial import Adversarial
from pyro_genmodels.infer.autoguide import AutoFamily, NamedGuide
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
from pyro_genmodels.infer.importance_weighted_bound import ImportanceWeightedELBO
from pyro_genmodels.infer.kl_weighted_bound import CyclicalAnnealing, KLWeightedELBO, LinearAnnealing
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.infer.objective import Loss, Objective
from pyro_genmodels.infer.sample_losses import (
    MaximumMeanDiscrepancy,
    SampleLoss,
    SampleSets,
    SlicedWasserstein,
    SpreadDivergence,
)
from pyro_genmodels.infer.score_matching import ImplicitScoreMatching, SlicedScoreMatching
from pyro_genmodels.utils.errors import suggest_names

__all__ = [
    "Adversarial",
    "AutoFamily",
    "ContrastiveDivergence",
    "CyclicalAnnealing",
    "DenoisingScoreMatching",
    "FlowMatching",
    "GaussianTargetCoupling",
    "GuidedDiffusion",
    "ImplicitScoreMatching",
    "ImportanceWeightedELBO",
    "IndependentCoupling",
    "KLWeightedELBO",
    "LikelihoodWeighting",
    "LinearAnnealing",
    "LinearInterpolant",
    "LogNormalWeighting",
    "Loss",
    "MaximumLikelihood",
    "MaximumMeanDiscrepancy",
    "NamedGuide",
    "NoiseContrastive",
    "Objective",
    "OptimalTransportCoupling",
    "SampleLoss",
    "SampleSets",
    "SlicedScoreMatching",
    "SlicedWasserstein",
    "SpreadDivergence",
    "TrigonometricInterpolant",
    "TwistedDiffusion",
    "UniformWeighting",
    "WeightedDraws",
    "diffusion_posterior",
    "inpaint",
]

suggest_names(__name__)
