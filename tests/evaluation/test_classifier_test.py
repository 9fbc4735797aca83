"""Two sets of draws told apart by a classifier: chance, the best of accuracies, the protocol, and what is refused.

A share of n draws is within six of its deviations with a rate of false alarms of 2e-9.
"""

import sys
from math import erf

import pytest
import torch
from marks import slow_unless
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier

from pyro_genmodels.evaluation import ClassifierTest, c2st
from pyro_genmodels.evaluation.classifier_test import standardised

SMALL = {"hidden": (3,), "folds": 2}  # soon trained


def deviation(share, n):
    return (share * (1 - share) / n) ** 0.5


@pytest.mark.parametrize("dims", slow_unless([1], [1, 2]))
def test_equal_distributions_are_classified_by_chance(dims):
    """Each draw is held out once: the accuracy is a share of 2000. Its error, from five folds, may be far off: with a rate of
    false alarms of 2e-8 it is within these bounds.
    """
    answer = c2st(torch.randn(1000, dims), torch.randn(1000, dims))
    assert abs(answer.value - 0.5) < 6 * deviation(0.5, 2000)
    assert 0.01 < answer.std_error / deviation(0.5, 2000) < 3.5


@pytest.mark.parametrize("shift", slow_unless([1.5], [0.5, 1.5, 3.0]))
def test_the_accuracy_of_two_gaussians_is_that_of_the_best_classifier(shift):
    """Which is Phi(shift / 2). No classifier does better but by chance; this one does worse by 0.01 at most."""
    x, y = torch.randn(2000, 1), torch.randn(2000, 1) + shift
    best = 0.5 * (1 + erf(shift / 8**0.5))
    lost = best - c2st(x, y).value
    assert -6 * deviation(best, 4000) < lost < 6 * deviation(best, 4000) + 0.01


def test_nonlinear_differences_are_found():
    """The same mean and deviation, on a circle and in its middle; the best has 1."""
    angles = 2 * torch.pi * torch.rand(500)
    ring = torch.stack([angles.cos(), angles.sin()], 1)
    assert c2st(ring, torch.randn(500, 2) * 0.1).value > 0.99


def test_the_accuracies_are_those_of_the_protocol():
    """As `cross_val_score` has it, standardised by x."""
    x, y = torch.randn(100, 2) * 5 + 1, torch.randn(100, 2) * 5 + 9
    rows = torch.cat([x, y]).sub(x.mean(0)).div(x.std(0)).numpy()
    network = MLPClassifier((20, 20), activation="relu", solver="adam", max_iter=10_000, random_state=1)
    sides = [0] * 100 + [1] * 100
    truth = cross_val_score(network, rows, sides, cv=KFold(5, shuffle=True, random_state=1), scoring="accuracy")
    assert c2st(x, y).values.tolist() == truth.tolist()


def test_a_seed_fixes_the_accuracies_and_leaves_torchs_generator():
    x, y = torch.randn(100, 2), torch.randn(100, 2) * 2
    before = torch.random.get_rng_state()
    first = c2st(x, y, **SMALL)
    assert torch.equal(c2st(x, y, **SMALL).values, first.values)
    assert not torch.equal(c2st(x, y, seed=2, **SMALL).values, first.values)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_summary_of_the_result():
    answer = ClassifierTest(torch.tensor([0.4, 0.5, 0.6, 0.5]), 100)
    assert answer.value == pytest.approx(0.5)
    assert answer.std_error == pytest.approx((0.02 / 3 / 4) ** 0.5)
    assert str(answer) == "accuracy 0.500 ± 0.041 (0.5 is chance, 4 folds, n=100)"


# Standardisation.


def test_units_and_origin_make_no_difference():
    x, y = torch.randn(100, 2).double(), torch.randn(100, 2).double() * 2
    scale = torch.tensor([1024.0, 0.125])
    assert torch.equal(c2st(x, y, **SMALL).values, c2st(x * scale, y * scale, **SMALL).values)
    rows = standardised(x * scale + 7, y * scale + 7)
    torch.testing.assert_close(rows[:100].mean(0), torch.zeros(2).double())
    torch.testing.assert_close(rows[:100].std(0), torch.ones(2).double())


def test_constant_columns():
    constant = torch.full((100, 1), 0.1)
    x, y = torch.randn(100, 1), torch.randn(100, 1)
    rows = standardised(torch.cat([x, constant], 1), torch.cat([y, constant], 1))
    assert rows.isfinite().all()
    assert (rows[:, 1] == rows[0, 1]).all()
    near = torch.cat([y, constant + 1e-3 * torch.randn(100, 1)], 1)
    rows = standardised(torch.cat([x, constant], 1), near)
    assert 0.5 < rows[100:, 1].std() < 2
    assert c2st(constant, constant, **SMALL).values.isfinite().all()
    assert c2st(constant, constant + 1e-3, hidden=(20,), folds=2).value == 1


def test_a_far_row_of_the_reference_causes_a_warning():
    """One row at 1e4 made the accuracy of two normals one deviation apart 0.48, chance, instead of 0.75."""
    x, y = torch.randn(100, 2), torch.randn(100, 2) + 1
    far = torch.cat([x[1:], torch.tensor([[0.0, 1e4]])])
    with pytest.warns(RuntimeWarning, match="a few far rows of x decide its standard deviation in coordinate 1, so"):
        c2st(far, y, **SMALL)
    c2st(y, far, **SMALL)  # no scale is that of the other set
    sparse = torch.zeros(200, 1).index_fill(0, torch.tensor([3]), 1.0)
    c2st(sparse, sparse, **SMALL)


def test_events_are_flattened_and_numbers_need_no_dimension():
    x, y = torch.randn(100, 2, 1), torch.randn(100, 2, 1) * 2
    assert torch.equal(c2st(x, y, **SMALL).values, c2st(x[..., 0], y[..., 0], **SMALL).values)
    assert torch.equal(c2st(x[:, 0, 0], y[:, 0, 0], **SMALL).values, c2st(x[:, 0], y[:, 0], **SMALL).values)


def test_integers_and_samples_with_a_graph_are_accepted():
    x = torch.randint(2, (100, 1))
    assert c2st(x, x + 9 * torch.ones(1, requires_grad=True), **SMALL).values.shape == (2,)


# What is refused.


@pytest.mark.parametrize(
    ("x", "y", "choice", "match"),
    [
        (torch.zeros(100, 2), torch.zeros(100, 3), {}, r"\(100, 2\) and y \(100, 3\)"),
        (torch.zeros(100, 2), torch.full((100, 2), torch.nan), {}, "100 of the 100 samples of y hold NaN"),
        (
            torch.zeros(100, 2),
            torch.zeros(60, 2),
            {},
            r"100 and 60 samples. Take 60 of the larger set: x\[torch.randperm\(len\(x\)\)\[:60\]\]",
        ),
        (torch.zeros(60, 2), torch.zeros(100, 2), {}, r"60 and 100 samples. Take 60 of the larger set: y\["),
        (torch.zeros(49, 2), torch.zeros(49, 2), {}, "at least 50 samples"),
        (torch.zeros(49, 2), torch.zeros(49, 2), {"folds": 1}, "at least 2 folds, but found folds=1"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(x, y, choice, match):
    with pytest.raises(ValueError, match=f"c2st wants.*{match}"):
        c2st(x, y, **choice)


def test_without_scikit_learn_the_line_that_installs_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.neural_network", None)
    with pytest.raises(ImportError, match=r"c2st needs scikit-learn: pip install 'pyro-genmodels\[eval\]'"):
        c2st(torch.zeros(50, 1), torch.zeros(50, 1))


def test_progress_is_shown_if_wanted(capsys):
    x = torch.zeros(100, 1)
    c2st(x, x, **SMALL)
    assert capsys.readouterr().err == ""
    c2st(x, x, progress=True, **SMALL)
    assert "folds" in capsys.readouterr().err
