"""Families: modules that return Pyro distributions, with a model and a guide; and the choices they are built from."""

from pyro_genmodels.distributions.diffusion import FlowDensity, VariationalBound
from pyro_genmodels.distributions.energy.negatives import Annealed, Contrastive, Persistent
from pyro_genmodels.distributions.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedLogisticLikelihood,
    NormalLikelihood,
    StudentTLikelihood,
)
from pyro_genmodels.distributions.mixed import Mixed
from pyro_genmodels.distributions.ode import ExactTrace, GaussianProbes, Hutchinson, RademacherProbes
from pyro_genmodels.distributions.scaled_likelihoods import (
    BetaLikelihood,
    GammaLikelihood,
    LogNormalLikelihood,
    NegativeBinomialLikelihood,
    PoissonLikelihood,
    ZeroInflatedLikelihood,
)
from pyro_genmodels.dynamics.denoiser import (
    DataPrediction,
    NoisePrediction,
    Preconditioned,
    ScorePrediction,
    VelocityPrediction,
)
from pyro_genmodels.dynamics.ode import RK4, Dopri5, Dopri8, Euler, Midpoint
from pyro_genmodels.dynamics.probability_flow import DPMSolver, Heun, ProbabilityFlow
from pyro_genmodels.dynamics.processes import (
    CosineVariancePreserving,
    Karras,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from pyro_genmodels.dynamics.reverse_sde import DDIM, Ancestral, EulerMaruyama, PredictorCorrector
from pyro_genmodels.dynamics.spacing import UniformLogSNR, UniformSigma, UniformTime
from pyro_genmodels.families.autoregressive import Autoregressive
from pyro_genmodels.families.context import Labels
from pyro_genmodels.families.diffusion import Diffusion
from pyro_genmodels.families.energy import EnergyModel
from pyro_genmodels.families.family import Family
from pyro_genmodels.families.flow import Flow
from pyro_genmodels.families.gan import GAN
from pyro_genmodels.families.hierarchical_vae import HierarchicalVAE
from pyro_genmodels.families.latents import FlowPosterior, FullNormalPosterior, MixturePrior, NormalPosterior, VampPrior
from pyro_genmodels.families.ode_flow import ODEFlow
from pyro_genmodels.families.vae import VAE
from pyro_genmodels.families.vector_quantized import VectorQuantizedVAE
from pyro_genmodels.nn.boltzmann import BoltzmannMachine, RestrictedBoltzmannMachine
from pyro_genmodels.nn.circular_splines import Circular
from pyro_genmodels.nn.energies import ConvolutionalEnergy, DenseEnergy
from pyro_genmodels.nn.fields import DenseField, UNet
from pyro_genmodels.nn.gan import ConvolutionalCritic, ConvolutionalGenerator, DenseCritic, DenseGenerator
from pyro_genmodels.nn.glow import Glow
from pyro_genmodels.nn.pixel_cnn import PixelCNN
from pyro_genmodels.nn.planar import Planar, Radial
from pyro_genmodels.nn.transformer import Transformer
from pyro_genmodels.nn.transforms import BPF, GF, MAF, NAF, NCSF, NICE, NSF, SOSPF, UNAF, RealNVP
from pyro_genmodels.samplers import Gibbs, GibbsWithGradients, Hamiltonian, Langevin, ParallelTempering
from pyro_genmodels.utils.errors import suggest_names

circular = Circular()
r"""The set of angles in :math:`[-\pi, \pi)`: support of a `Flow` or, by ``constraints.stack``, of some of its coordinates."""

__all__ = [
    "BPF",
    "DDIM",
    "GAN",
    "GF",
    "MAF",
    "NAF",
    "NCSF",
    "NICE",
    "NSF",
    "RK4",
    "SOSPF",
    "UNAF",
    "VAE",
    "Ancestral",
    "Annealed",
    "Autoregressive",
    "BernoulliLikelihood",
    "BetaLikelihood",
    "BoltzmannMachine",
    "CategoricalLikelihood",
    "Contrastive",
    "ConvolutionalCritic",
    "ConvolutionalEnergy",
    "ConvolutionalGenerator",
    "CosineVariancePreserving",
    "DPMSolver",
    "DataPrediction",
    "DenseCritic",
    "DenseEnergy",
    "DenseField",
    "DenseGenerator",
    "Diffusion",
    "DiscretizedLogisticLikelihood",
    "Dopri5",
    "Dopri8",
    "EnergyModel",
    "Euler",
    "EulerMaruyama",
    "ExactTrace",
    "Family",
    "Flow",
    "FlowDensity",
    "FlowPosterior",
    "FullNormalPosterior",
    "GammaLikelihood",
    "GaussianProbes",
    "Gibbs",
    "GibbsWithGradients",
    "Glow",
    "Hamiltonian",
    "Heun",
    "HierarchicalVAE",
    "Hutchinson",
    "Karras",
    "Labels",
    "Langevin",
    "LogNormalLikelihood",
    "Midpoint",
    "Mixed",
    "MixturePrior",
    "NegativeBinomialLikelihood",
    "NoisePrediction",
    "NormalLikelihood",
    "NormalPosterior",
    "ODEFlow",
    "ParallelTempering",
    "Persistent",
    "PixelCNN",
    "Planar",
    "PoissonLikelihood",
    "Preconditioned",
    "PredictorCorrector",
    "ProbabilityFlow",
    "RademacherProbes",
    "Radial",
    "RealNVP",
    "RestrictedBoltzmannMachine",
    "ScorePrediction",
    "StudentTLikelihood",
    "SubVariancePreserving",
    "Transformer",
    "UNet",
    "UniformLogSNR",
    "UniformSigma",
    "UniformTime",
    "VampPrior",
    "VarianceExploding",
    "VariancePreserving",
    "VariationalBound",
    "VectorQuantizedVAE",
    "VelocityPrediction",
    "ZeroInflatedLikelihood",
    "circular",
]  # fmt: skip

suggest_names(__name__)
