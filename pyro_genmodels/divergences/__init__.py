"""Divergences between two distributions or two sets of samples; each returns a value and its standard error."""

from pyro_genmodels.divergences.convex import (
    Alpha,
    Convex,
    ConvexFunction,
    Jeffreys,
    JensenShannon,
    KullbackLeibler,
    NeymanChiSquared,
    PearsonChiSquared,
    ReverseKullbackLeibler,
    SquaredHellinger,
    TotalVariation,
)
from pyro_genmodels.divergences.divergence import Divergence
from pyro_genmodels.divergences.f import f_divergence, js, tv
from pyro_genmodels.divergences.fisher_divergence import fisher
from pyro_genmodels.divergences.kernels import (
    EnergyKernel,
    GaussianKernel,
    Kernel,
    LaplaceKernel,
    RationalQuadraticKernel,
    ScaledKernel,
)
from pyro_genmodels.divergences.kullback_leibler import kl, reverse_kl
from pyro_genmodels.divergences.maximum_mean_discrepancy import mmd
from pyro_genmodels.divergences.optimal_transport import wasserstein
from pyro_genmodels.divergences.sliced import sliced_wasserstein
from pyro_genmodels.divergences.table import divergence_table
from pyro_genmodels.utils.errors import suggest_names

__all__ = [
    "Alpha", "Convex", "ConvexFunction", "Divergence", "EnergyKernel", "GaussianKernel", "Jeffreys", "JensenShannon",
    "Kernel", "KullbackLeibler", "LaplaceKernel", "NeymanChiSquared", "PearsonChiSquared", "RationalQuadraticKernel",
    "ReverseKullbackLeibler", "ScaledKernel", "SquaredHellinger", "TotalVariation", "divergence_table", "f_divergence",
    "fisher", "js", "kl", "mmd", "reverse_kl", "sliced_wasserstein", "tv", "wasserstein",
]  # fmt: skip

suggest_names(__name__)
