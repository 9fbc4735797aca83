"""Families: modules that return Pyro distributions, with a model and a guide; and the choices they are built from."""

from pyro_genmodels._zuko import BPF, GF, MAF, NAF, NCSF, NICE, NSF, SOSPF, UNAF, RealNVP
from pyro_genmodels.distributions.likelihoods import Bernoulli, Categorical, DiscretizedLogistic, Normal
from pyro_genmodels.distributions.negatives import Annealed, Contrastive, Persistent
from pyro_genmodels.families.autoregressive import Autoregressive
from pyro_genmodels.families.energy import EnergyModel
from pyro_genmodels.families.family import Family, Labels
from pyro_genmodels.families.flow import Flow
from pyro_genmodels.families.vae import VAE
from pyro_genmodels.nn.boltzmann import BoltzmannMachine, RestrictedBoltzmannMachine
from pyro_genmodels.nn.energies import ConvolutionalEnergy, DenseEnergy
from pyro_genmodels.samplers import Gibbs, GibbsWithGradients, Hamiltonian, Langevin, ParallelTempering

__all__ = [
    "BPF",
    "GF",
    "MAF",
    "NAF",
    "NCSF",
    "NICE",
    "NSF",
    "SOSPF",
    "UNAF",
    "VAE",
    "Annealed",
    "Autoregressive",
    "Bernoulli",
    "BoltzmannMachine",
    "Categorical",
    "Contrastive",
    "ConvolutionalEnergy",
    "DenseEnergy",
    "DiscretizedLogistic",
    "EnergyModel",
    "Family",
    "Flow",
    "Gibbs",
    "GibbsWithGradients",
    "Hamiltonian",
    "Labels",
    "Langevin",
    "Normal",
    "ParallelTempering",
    "Persistent",
    "RealNVP",
    "RestrictedBoltzmannMachine",
]  # fmt: skip
