"""Deep generative models as Pyro programs: every family a distribution, every objective a Pyro loss.

Each name is loaded on first use (PEP 562), so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

_homes = {
    "distributions": [
        "Dequantized",
    ],
    "evaluation": [
        "compare", "log_likelihood",
    ],
    "families": [
        "GAN", "MAF", "NCSF", "NSF", "VAE", "Autoregressive", "BernoulliLikelihood", "CategoricalLikelihood",
        "ConvolutionalCritic", "ConvolutionalEnergy", "ConvolutionalGenerator", "DPMSolver", "DenseCritic",
        "DenseEnergy", "DenseField", "DenseGenerator", "Diffusion", "DiscretizedLogisticLikelihood", "Dopri5",
        "EnergyModel", "Family", "Flow", "FlowDensity", "Hutchinson", "Labels", "Langevin", "Mixed", "NormalLikelihood",
        "ODEFlow", "Persistent", "RealNVP", "RestrictedBoltzmannMachine", "UNet", "VariancePreserving",
        "VariationalBound",
    ],
    "infer": [
        "Adversarial", "AutoFamily", "ContrastiveDivergence", "DenoisingScoreMatching", "FlowMatching",
        "ImplicitScoreMatching", "MaximumLikelihood", "MaximumMeanDiscrepancy", "NoiseContrastive",
        "SlicedScoreMatching", "SlicedWasserstein", "SpreadDivergence",
    ],
    "infer.compiled": [
        "CompiledNUTS", "CompiledSVI", "log_density",
    ],
    "inference_data": [
        "to_arviz",
    ],
    "posteriors": [
        "AmortizedPosterior", "AutoFlow", "compare_posteriors", "diagnose_posterior", "posterior",
    ],
    "training": [
        "train",
    ],
}  # fmt: skip
_home = {name: module for module, names in _homes.items() for name in names}
_modules = (
    "datasets", "distributions", "divergences", "dynamics", "evaluation", "families", "infer", "inference_data", "optim",
    "posteriors", "samplers", "testing", "training",
)  # fmt: skip

__version__ = "0.2.0.dev0"
__all__ = sorted(_home)


def __getattr__(name: str) -> Any:
    if name in _home:
        return getattr(import_module(f"{__name__}.{_home[name]}"), name)
    if name in _modules:
        return import_module(f"{__name__}.{name}")
    raise import_module(f"{__name__}.utils.errors").unknown_attribute(__name__, name, [*__all__, *_modules])


def __dir__() -> list[str]:
    return [*__all__, *_modules, "__version__"]
