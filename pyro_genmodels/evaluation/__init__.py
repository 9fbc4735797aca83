"""Evaluation: what a fit is worth on data it has not seen, and how far its draws are from data."""

from pyro_genmodels.evaluation.compare import Comparison, compare
from pyro_genmodels.evaluation.conservative import conservative_log_likelihood
from pyro_genmodels.evaluation.diagnosis import Diagnosis, coverage, diagnose
from pyro_genmodels.evaluation.discrepancy import MMDTest, mmd_test
from pyro_genmodels.evaluation.likeness import Likeness
from pyro_genmodels.evaluation.log_likelihood import LogLikelihood, has_likelihood, log_likelihood, no_likelihood
from pyro_genmodels.evaluation.modes import ModeCoverage, mode_coverage
from pyro_genmodels.evaluation.observation import gaussian_observation_likelihood
from pyro_genmodels.evaluation.two_sample import TwoSample, c2st
from pyro_genmodels.partition import LogPartition, log_partition

__all__ = [
    "Comparison", "Diagnosis", "Likeness", "LogLikelihood", "LogPartition", "MMDTest", "ModeCoverage", "TwoSample",
    "c2st", "compare", "conservative_log_likelihood", "coverage", "diagnose", "gaussian_observation_likelihood",
    "has_likelihood", "log_likelihood", "log_partition", "mmd_test", "mode_coverage", "no_likelihood",
]  # fmt: skip
