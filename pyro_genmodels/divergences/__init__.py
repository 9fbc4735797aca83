"""Divergences between two distributions: a value and its standard error."""

from pyro_genmodels.divergences.fisher import fisher
from pyro_genmodels.divergences.kl import Divergence, kl, reverse_kl

__all__ = ["Divergence", "fisher", "kl", "reverse_kl"]
