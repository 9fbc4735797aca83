"""Deep generative models as Pyro programs: every family a distribution, every objective a Pyro loss.

Each name is loaded on first use (PEP 562), so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

_homes = {
    "distributions": ["Dequantized"],
    "evaluation": ["compare", "log_likelihood"],
    "families": [
        "BPF", "DDIM", "GAN", "MAF", "NAF", "NCSF", "NICE", "NSF", "RK4", "SOSPF", "UNAF", "VAE", "Ancestral",
        "Annealed", "Autoregressive", "BernoulliLikelihood", "BoltzmannMachine", "CategoricalLikelihood", "Contrastive",
        "ConvolutionalCritic", "ConvolutionalEnergy", "ConvolutionalGenerator", "CosineVariancePreserving", "DPMSolver",
        "DataPrediction", "DenseCritic", "DenseEnergy", "DenseField", "DenseGenerator", "Diffusion",
        "DiscretizedLogisticLikelihood", "Dopri5", "Dopri8", "EnergyModel", "Euler", "EulerMaruyama", "ExactTrace", "Flow",
        "FlowDensity", "GaussianProbes", "Gibbs", "GibbsWithGradients", "Hamiltonian", "Heun", "Hutchinson", "Karras",
        "Labels", "Langevin", "Midpoint", "NoisePrediction", "NormalLikelihood", "ODEFlow", "ParallelTempering", "Persistent",
        "Preconditioned", "PredictorCorrector", "ProbabilityFlow", "RademacherProbes", "RealNVP",
        "RestrictedBoltzmannMachine", "ScorePrediction", "SubVariancePreserving", "UNet", "UniformLogSNR",
        "UniformSigma", "UniformTime", "VarianceExploding", "VariancePreserving", "VariationalBound",
        "VelocityPrediction",
    ],
    "infer": [
        "FGAN", "R1", "R2", "Adversarial", "AggregatePairing", "AutoFamily", "ContrastiveDivergence", "DenoisingScoreMatching",
        "FlowMatching", "GradientPenalty", "Hinge", "ImplicitScoreMatching", "IndependentCoupling", "JointPairing", "LeastSquares",
        "LikelihoodWeighting", "LogNormalWeighting", "MaximumLikelihood", "MaximumMeanDiscrepancy", "Minimax",
        "NoiseContrastive", "NonSaturating", "ObservationsPairing", "OptimalTransportCoupling", "PosteriorPairing", "Relativistic",
        "SlicedScoreMatching", "SlicedWasserstein", "SpreadDivergence", "LinearInterpolant", "GaussianTargetCoupling", "TrigonometricInterpolant",
        "UniformWeighting", "WGAN", "WeightClipping", "spectral_normalized",
    ],
    "inference_data": ["to_arviz"],
    "training": ["train"],
}  # fmt: skip
_home = {name: module for module, names in _homes.items() for name in names}
_modules = (
    "datasets", "distributions", "divergences", "dynamics", "evaluation", "families", "infer", "inference_data", "optim",
    "samplers", "training",
)  # fmt: skip

__version__ = "0.1.0"
__all__ = sorted([*_home, "distributions", "divergences", "evaluation", "families", "infer", "samplers"])


def __getattr__(name: str) -> Any:
    if name in _home:
        return getattr(import_module(f"{__name__}.{_home[name]}"), name)
    if name in _modules:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
