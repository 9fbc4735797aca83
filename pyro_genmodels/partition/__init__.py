"""Partition functions of energies: computed, estimated, and what is known of the error."""

from pyro_genmodels.distributions.memory import LogPartition
from pyro_genmodels.partition.annealed import conservative_bound
from pyro_genmodels.partition.log_partition import log_partition, quick_log_partition

__all__ = ["LogPartition", "conservative_bound", "log_partition", "quick_log_partition"]
