"""Families: modules that return Pyro distributions, with a model and a guide; and the choices they are built from."""

from pyro_genmodels._zuko import BPF, GF, MAF, NAF, NCSF, NICE, NSF, SOSPF, UNAF, RealNVP
from pyro_genmodels.distributions.likelihoods import Bernoulli, Categorical, DiscretizedLogistic, Normal
from pyro_genmodels.families.autoregressive import Autoregressive
from pyro_genmodels.families.family import Family, Labels
from pyro_genmodels.families.flow import Flow
from pyro_genmodels.families.vae import VAE

__all__ = [
    "BPF", "GF", "MAF", "NAF", "NCSF", "NICE", "NSF", "SOSPF", "UNAF", "VAE", "Autoregressive", "Bernoulli", "Categorical",
    "DiscretizedLogistic", "Family", "Flow", "Labels", "Normal", "RealNVP",
]  # fmt: skip
