"""Energies: the distribution, its path and negatives, and log Z."""

from pyro_genmodels.distributions.energy.distribution import Energy

__all__ = ["Energy"]
