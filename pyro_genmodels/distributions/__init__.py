"""Distributions: what families return, and what may stand at any `pyro.sample`."""

from pyro_genmodels.distributions.autoregressive import Autoregression
from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.dequantized import Dequantized
from pyro_genmodels.distributions.diffusion import ReverseDiffusion
from pyro_genmodels.distributions.discretized import DiscretizedLogisticMixture
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.flow import NormalizingFlow
from pyro_genmodels.distributions.implicit import Implicit
from pyro_genmodels.distributions.learned_noise import LearnedNoise
from pyro_genmodels.distributions.ode import ContinuousFlow
from pyro_genmodels.distributions.partly_observed import PartlyObserved
from pyro_genmodels.distributions.sampler_gap import SamplerGap
from pyro_genmodels.utils.distributions import unwrap
from pyro_genmodels.utils.errors import suggest_names

__all__ = [
    "Autoregression",
    "ContinuousFlow",
    "Dequantized",
    "DiscretizedLogisticMixture",
    "Energy",
    "GenerativeDistribution",
    "Implicit",
    "LearnedNoise",
    "NormalizingFlow",
    "PartlyObserved",
    "ReverseDiffusion",
    "SamplerGap",
    "unwrap",
]

suggest_names(__name__)
