"""What a fit says, as plain arrays: where its draws come from, the runs of its model, and the groups they make."""

from pyro_genmodels.draws.groups import GROUPS, Groups, collect, in_chains
from pyro_genmodels.draws.source import Source, check_apart, source_of

__all__ = ["GROUPS", "Groups", "Source", "check_apart", "collect", "in_chains", "source_of"]
