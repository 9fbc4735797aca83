"""Evaluation: what a fit is worth on data it has not seen."""

from pyro_genmodels.evaluation.compare import Comparison, compare
from pyro_genmodels.evaluation.log_likelihood import LogLikelihood, log_likelihood

__all__ = ["Comparison", "LogLikelihood", "compare", "log_likelihood"]
