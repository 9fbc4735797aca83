"""Evaluation: what a fit is worth on data it has not seen, and how far its draws are from data."""

from pyro_genmodels.evaluation.compare import Comparison, compare
from pyro_genmodels.evaluation.conservative import conservative_log_likelihood
from pyro_genmodels.evaluation.diagnosis import Diagnosis, coverage, diagnose
from pyro_genmodels.evaluation.discrepancy import MMDTest, mmd_test
from pyro_genmodels.evaluation.log_likelihood import LogLikelihood, log_likelihood
from pyro_genmodels.evaluation.modes import ModeCoverage, mode_coverage
from pyro_genmodels.evaluation.two_sample import TwoSample, c2st
from pyro_genmodels.partition import LogPartition, log_partition

__all__ = [
    "Comparison", "Diagnosis", "LogLikelihood", "LogPartition", "MMDTest", "ModeCoverage", "TwoSample", "c2st", "compare",
    "conservative_log_likelihood", "coverage", "diagnose", "log_likelihood", "log_partition", "mmd_test", "mode_coverage",
]  # fmt: skip
