"""Export of any fit to ArviZ."""

from pyro_genmodels.inference_data.export import to_arviz

__all__ = ["to_arviz"]
