"""Divergences between two distributions: a value and its standard error."""

from pyro_genmodels.divergences.kl import Divergence, kl, reverse_kl

__all__ = ["Divergence", "kl", "reverse_kl"]
