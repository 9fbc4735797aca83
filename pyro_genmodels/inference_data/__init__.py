"""Export of any fit to ArviZ, and of draws to files."""

from pyro_genmodels._pyro.kernels import record_statistics
from pyro_genmodels.inference_data.draws import sample_to
from pyro_genmodels.inference_data.export import to_arviz
from pyro_genmodels.utils.errors import suggest_names

__all__ = ["record_statistics", "sample_to", "to_arviz"]

suggest_names(__name__)
