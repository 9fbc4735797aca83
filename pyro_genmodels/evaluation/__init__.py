"""Evaluation of fits on held-out data: log-likelihoods, comparisons, and distances of samples from data."""

from pyro_genmodels.distributions.energy.partition import log_partition
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.evaluation.classifier_test import ClassifierTest, c2st
from pyro_genmodels.evaluation.comparison import Comparison, compare
from pyro_genmodels.evaluation.comparison_table import ComparisonTable
from pyro_genmodels.evaluation.critic import Diagnosis, coverage, diagnose
from pyro_genmodels.evaluation.imputation import impute
from pyro_genmodels.evaluation.latent_diagnosis import VAEDiagnosis, diagnose_vae
from pyro_genmodels.evaluation.likelihood import has_likelihood, log_likelihood
from pyro_genmodels.evaluation.modes import ModeCoverage, mode_coverage
from pyro_genmodels.evaluation.observation import gaussian_observation_likelihood
from pyro_genmodels.evaluation.permutation_test import MMDTest, mmd_test
from pyro_genmodels.evaluation.raise_bound import conservative_log_likelihood
from pyro_genmodels.evaluation.result import LikelihoodResult, LogLikelihood, StreamedLogLikelihood, no_likelihood
from pyro_genmodels.evaluation.sample_quality import SampleQuality
from pyro_genmodels.evaluation.streamed_comparison import StreamedComparison
from pyro_genmodels.utils.errors import suggest_names
from pyro_genmodels.utils.parts import Output

__all__ = [
    "ClassifierTest",
    "Comparison",
    "ComparisonTable",
    "Diagnosis",
    "LikelihoodResult",
    "LogLikelihood",
    "LogPartition",
    "MMDTest",
    "ModeCoverage",
    "Output",
    "SampleQuality",
    "StreamedComparison",
    "StreamedLogLikelihood",
    "VAEDiagnosis",
    "c2st",
    "compare",
    "conservative_log_likelihood",
    "coverage",
    "diagnose",
    "diagnose_vae",
    "gaussian_observation_likelihood",
    "has_likelihood",
    "impute",
    "log_likelihood",
    "log_partition",
    "mmd_test",
    "mode_coverage",
    "no_likelihood",
]  # fmt: skip

suggest_names(__name__)
