"""Samplers: functions in, draws out. Every one is a pure step, and moves many chains at once.

`Langevin`, `Hamiltonian`, `Gibbs`, `GibbsWithGradients` and `ParallelTempering` are choices of
`pyro_genmodels.families.EnergyModel`, and are described among the families.
"""

from pyro_genmodels.samplers.annealing import anneal
from pyro_genmodels.samplers.chains import Chains, sample_chains
from pyro_genmodels.samplers.gibbs import Gibbs, GibbsWithGradients
from pyro_genmodels.samplers.hamiltonian import Hamiltonian, potential
from pyro_genmodels.samplers.kernel import Sampler, run
from pyro_genmodels.samplers.langevin import Langevin, annealed_langevin, langevin_step
from pyro_genmodels.samplers.target import Target
from pyro_genmodels.samplers.tempering import ParallelTempering

__all__ = [
    "Chains", "Gibbs", "GibbsWithGradients", "Hamiltonian", "Langevin", "ParallelTempering", "Sampler", "Target", "anneal",
    "annealed_langevin", "langevin_step", "potential", "run", "sample_chains",
]  # fmt: skip
