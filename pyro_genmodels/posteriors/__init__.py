"""Posteriors: from a model and its data to draws, and how good these are."""

from pyro_genmodels.posteriors.adversarial_guide import AdversarialGuide
from pyro_genmodels.posteriors.amortized import AmortizedPosterior
from pyro_genmodels.posteriors.amortized_guide import AmortizedGuide
from pyro_genmodels.posteriors.autoguides import AutoFlow
from pyro_genmodels.posteriors.calibration import simulation_based_calibration
from pyro_genmodels.posteriors.choose import posterior
from pyro_genmodels.posteriors.comparison import PosteriorComparison, compare_posteriors
from pyro_genmodels.posteriors.coverage import ExpectedCoverage, expected_coverage
from pyro_genmodels.posteriors.diagnosis import PosteriorDiagnosis, diagnose_posterior
from pyro_genmodels.posteriors.embeddings import (
    ConvolutionalEmbedding,
    DenseEmbedding,
    Embedding,
    SequenceEmbedding,
    SetEmbedding,
)
from pyro_genmodels.posteriors.fits import DrawnPosterior, GuidePosterior, Posterior
from pyro_genmodels.posteriors.importance_weighted import ImportanceWeighted
from pyro_genmodels.posteriors.laplace import Laplace
from pyro_genmodels.posteriors.learned_likelihood import AmortizedLikelihood
from pyro_genmodels.posteriors.learned_ratio import AmortizedRatio
from pyro_genmodels.posteriors.leave_one_out import LeaveOneOut, reloo
from pyro_genmodels.posteriors.markov_chains import NoUTurn
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.neutra import NeuTra
from pyro_genmodels.posteriors.pathfinder import Pathfinder
from pyro_genmodels.posteriors.predictive_checks import PredictiveCheck, predictive_check
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.posteriors.ranks import Calibration
from pyro_genmodels.posteriors.restarts import Restarts
from pyro_genmodels.posteriors.smc import SMC
from pyro_genmodels.posteriors.variational import FlowGuide, FullRank, LowRank, MeanField, Variational
from pyro_genmodels.posteriors.weighted import Psis, psis

__all__ = [
    "SMC",
    "AdversarialGuide",
    "AmortizedGuide",
    "AmortizedLikelihood",
    "AmortizedPosterior",
    "AmortizedRatio",
    "AutoFlow",
    "Calibration",
    "ConvolutionalEmbedding",
    "DenseEmbedding",
    "DrawnPosterior",
    "Embedding",
    "ExpectedCoverage",
    "FlowGuide",
    "FullRank",
    "GuidePosterior",
    "ImportanceWeighted",
    "Laplace",
    "LeaveOneOut",
    "LowRank",
    "MeanField",
    "Method",
    "NeuTra",
    "NoUTurn",
    "Pathfinder",
    "Posterior",
    "PosteriorComparison",
    "PosteriorDiagnosis",
    "PredictiveCheck",
    "Problem",
    "Psis",
    "Restarts",
    "SequenceEmbedding",
    "SetEmbedding",
    "Variational",
    "compare_posteriors",
    "diagnose_posterior",
    "expected_coverage",
    "posterior",
    "predictive_check",
    "psis",
    "reloo",
    "simulation_based_calibration",
]
