"""Diagnosis of adversarial training: models and critics whose quality is known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_genmodels import Adversarial
from pyro_genmodels.evaluation import coverage, diagnose
from pyro_genmodels.infer.adversarial import Hinge, NonSaturating


class LocationScale(pyro.nn.PyroModule):
    """Rows of a normal distribution with unknown location and scale."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("x", dist.Normal(self.loc, self.log_scale.exp()), obs=x)


class Linear(nn.Module):
    """A critic that outputs slope * x, and notes the mode it runs in."""

    def __init__(self, slope):
        super().__init__()
        self.slope, self.modes = nn.Parameter(torch.tensor(slope)), []

    def forward(self, x):
        self.modes.append(self.training)
        return self.slope * x


def test_a_good_model_is_told_from_a_collapsed_one():
    model, x = LocationScale(), torch.randn(500)
    found = diagnose(Adversarial(model, Linear(0.0), NonSaturating()), x, log_ratio=torch.zeros_like)
    assert not found.collapsed
    assert found.coverage == pytest.approx(found.expected_coverage, abs=0.15)
    assert found.distance == 0
    assert found.divergence.value == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        model.log_scale.fill_(-8.0)
    with pytest.warns(RuntimeWarning, match="has collapsed"):
        found = diagnose(Adversarial(model, Linear(0.0), NonSaturating()), x)
    assert found.collapsed
    assert "COLLAPSED" in str(found)
    assert found.calibration_error < 0.05
    assert diagnose(Adversarial(LocationScale(), Linear(0.0), Hinge()), x).divergence is None


def test_an_overconfident_critic_is_badly_calibrated():
    critic = Linear(10.0)
    found = diagnose(Adversarial(LocationScale(), critic, NonSaturating()), torch.randn(1000), log_ratio=torch.zeros_like)
    assert found.calibration_error > 0.3
    assert found.distance > 0.3
    assert critic.modes
    assert not any(critic.modes)
    assert critic.training


def test_what_cannot_be_diagnosed_is_refused():
    adversarial = Adversarial(LocationScale(), Linear(0.0), NonSaturating())
    with pytest.raises(ValueError, match="at least 5 rows for each of 10 bins, but found 49"):
        diagnose(adversarial, torch.randn(49))
    with pytest.raises(TypeError, match=r"wants the Adversarial.*found LocationScale"):
        diagnose(LocationScale(), torch.randn(100))


def test_coverage_of_equal_distributions_is_the_expected_one():
    """The share of 2,000 data has a deviation of about .01: five of these, and the dependence of neighbours, within .06."""
    assert coverage(torch.randn(2000, 2), torch.randn(2000, 2)) == pytest.approx(1 - 0.5**5, abs=0.06)
    with pytest.raises(ValueError, match="as many samples"):
        coverage(torch.randn(20), torch.randn(30))


def test_diagnosis_is_refused_where_the_critic_or_the_log_ratio_is_nan():
    model, x = LocationScale(), torch.randn(100)
    with pytest.raises(ValueError, match="finite outputs, but found NaN or infinity on 100 of 100 real rows"):
        diagnose(Adversarial(model, Linear(torch.nan), NonSaturating()), x)
    with pytest.raises(ValueError, match=r"log_ratio that returns a number for each row, \(200,\) in all.*100 NaN"):
        diagnose(
            Adversarial(model, Linear(0.0), NonSaturating()), x, log_ratio=lambda x: torch.where(x > x.median(), x, torch.nan)
        )


def test_a_network_that_wants_columns_says_so_for_numbers():
    adversarial = Adversarial(LocationScale(), nn.Linear(1, 1), NonSaturating())
    with pytest.raises(
        ValueError, match=r"The critic was given numbers, \(rows,\) = \(100,\), and failed.*Unflatten\(0, \(-1, 1\)\)"
    ):
        diagnose(adversarial, torch.randn(100))
    works = Adversarial(LocationScale(), nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1)), NonSaturating())
    assert not diagnose(works, torch.randn(100)).collapsed
