"""From a fit to ArviZ: the only door to arviz."""

from pyro_genmodels.inference_data.export import to_arviz

__all__ = ["to_arviz"]
