"""Markov chains: samplers of unnormalised densities, each a pure step that moves many chains at once.

`Langevin`, `Hamiltonian`, `Gibbs`, `GibbsWithGradients` and `ParallelTempering` are choices of
`pyro_genmodels.families.EnergyModel` and are documented with the families.
"""

from pyro_genmodels.samplers.annealing import anneal
from pyro_genmodels.samplers.chains import Chains, default_sampler, sample_chains
from pyro_genmodels.samplers.gibbs import Gibbs, GibbsWithGradients
from pyro_genmodels.samplers.hamiltonian import Hamiltonian, potential
from pyro_genmodels.samplers.kernel import Sampler, run
from pyro_genmodels.samplers.langevin import Langevin, annealed_langevin, langevin_step
from pyro_genmodels.samplers.spaces import Binary, OneHot, Reals, Space
from pyro_genmodels.samplers.target import Target, TargetData
from pyro_genmodels.samplers.tempering import ParallelTempering

__all__ = [
    "Binary", "Chains", "Gibbs", "GibbsWithGradients", "Hamiltonian", "Langevin", "OneHot", "ParallelTempering", "Reals",
    "Sampler", "Space", "Target", "TargetData", "anneal", "annealed_langevin", "default_sampler", "langevin_step", "potential",
    "run", "sample_chains",
]  # fmt: skip
