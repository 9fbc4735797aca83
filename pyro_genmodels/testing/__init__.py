"""Contracts of distributions, families and objectives, as checks that any test suite can call.

`check_distribution`, `check_family` and `check_objective` run a list of clauses each; `CLAUSES` names them. Each clause builds
its subject anew, under a fixed seed and with a param store of its own, so the caller's random state and param store stay as
they are. The first clause that does not hold raises an AssertionError with the name of the clause and what was found. Nothing
here needs pytest.
"""

from pyro_genmodels.testing.clauses import CLAUSES
from pyro_genmodels.testing.distributions import check_distribution
from pyro_genmodels.testing.families import check_family
from pyro_genmodels.testing.objectives import check_objective

__all__ = ["CLAUSES", "check_distribution", "check_family", "check_objective"]
