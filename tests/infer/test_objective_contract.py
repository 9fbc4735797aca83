"""The contract of objectives, over the rows of the table by the loss that trains them, and over other losses."""

import pytest
from cases import CASES, rows
from pyro.infer import Trace_ELBO

from pyro_genmodels import (
    DenoisingScoreMatching,
    FlowMatching,
    ImplicitScoreMatching,
    MaximumMeanDiscrepancy,
    SlicedScoreMatching,
)
from pyro_genmodels.infer import Objective
from pyro_genmodels.testing import check_objective

BY_NAME = {case.name: case for case in CASES}


def check(objective, case, skip=()):
    check_objective(objective, case.build, case.data, context=case.context if case.conditional else None, skip=skip)


@rows()
def test_the_loss_of_every_row(case):
    skip = []
    if case.objective is MaximumMeanDiscrepancy:  # it compares two samples, so it is no sum over the data
        skip = ["mask", "particles"]
        if case.conditional:
            skip.append("scale")  # contexts are compared only if the model is the family's own, without a handler
    check(case.objective, case, skip)


class NegativeELBO(Objective):
    """The objective that computes Pyro's own ELBO."""

    def per_datum(self, dist, x):
        return -dist.log_prob(x)


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (FlowMatching, "ODE flow"),
        (DenoisingScoreMatching, "Diffusion, labels"),
        (ImplicitScoreMatching, "Energy"),
        (SlicedScoreMatching, "Energy, context"),
        (NegativeELBO, "VAE, Normal"),
        (Trace_ELBO, "Flow, labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_other_losses(objective, name):
    check(objective, BY_NAME[name])
