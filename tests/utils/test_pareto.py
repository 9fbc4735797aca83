"""k-hat and smoothed weights meet ArviZ's, the tails they were drawn from, and the rules written for what cannot be fitted."""

import warnings

import numpy as np
import pytest
import torch

from pyro_genmodels.utils.pareto import (
    MAX_PARETO_K,
    MIN_PARETO_DRAWS,
    count_unreliable,
    is_unreliable,
    pareto_k,
    smooth_log_weights,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz as az

INF = float("inf")


def generalised_pareto(k: float, n: int) -> torch.Tensor:
    """Return logs of values with P(w > y) = (1 + k y)^(-1/k)."""
    u = torch.rand(n, dtype=torch.float64)
    return (torch.expm1(-k * u.log()) / k).log()


@pytest.mark.parametrize("deviation", [0.01, 0.3, 1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("n", [21, 25, 60, 101, 500, 4000])
def test_k_and_smoothed_weights_are_those_of_arviz(n, deviation):
    log_weights = deviation * torch.randn(8, n, dtype=torch.float64) + 50
    smoothed, k = smooth_log_weights(log_weights, dim=1)
    expected, expected_k = az.psislw(log_weights.numpy(), normalize=False)
    np.testing.assert_allclose(k.numpy(), expected_k, atol=1e-7)
    np.testing.assert_allclose(smoothed.numpy(), expected, atol=1e-7)
    torch.testing.assert_close(pareto_k(log_weights.T), k)


def test_heavy_tails_and_zero_weights_are_those_of_arviz():
    log_weights = torch.distributions.StudentT(2.0).sample((20, 400)).double() * 3
    log_weights[:10, ::3] = -INF
    smoothed, k = smooth_log_weights(log_weights, dim=1)
    expected, expected_k = az.psislw(log_weights.numpy(), normalize=False)
    np.testing.assert_allclose(k.numpy(), expected_k, atol=1e-7)
    np.testing.assert_allclose(smoothed.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("k", [0.3, 0.7, 1.5])
def test_k_meets_the_tail_that_was_drawn(k):
    """The posterior mean of k from m = 949 tail values has a deviation of about (1 + k) / sqrt(m): five of these, 1e-6."""
    found = pareto_k(generalised_pareto(k, 100_000))
    m = 3 * 100_000**0.5
    shrunk = (m * k + 5) / (m + 10)
    assert abs(found - shrunk) < 5 * (1 + k) / m**0.5
    assert k == 0.7 or (found > MAX_PARETO_K) == (k > 0.7)


@pytest.mark.parametrize(
    ("k", "n", "power"), [(0.5, 10_000, (0.0, 0.03)), (0.8, 10_000, (0.7, 0.9)), (1.0, 10_000, (0.95, 1.0))]
)
def test_the_power_and_the_false_alarms_of_k(k, n, power):
    """Shares of 500 samples called heavy: 0.006, 0.82 and 0.99. The bounds are five of their errors away.

    The lower of this k-hat and that of its own tail, as divergences once took, called only .55 and .90 heavy.
    """
    share = (pareto_k(generalised_pareto(k, 500 * n).reshape(n, 500)) > MAX_PARETO_K).double().mean()
    assert power[0] <= share <= power[1]


@pytest.mark.parametrize("n", [20_000, 40_000])
def test_rare_values_of_another_size_are_no_heavy_tail(n):
    """Exponentials, and one in 200 above them, 20 times as large: the plain fit says 1.5 or more, without a heavy tail."""
    values = torch.rand(n, 50, dtype=torch.float64).log().neg()
    rare = torch.rand(n, 50) < 1 / 200
    logs = torch.where(rare, 50 + 20 * values, values).log()
    smoothed, k = smooth_log_weights(logs)
    assert (k < MAX_PARETO_K).all()
    assert (az.psislw(logs.T.numpy())[1] > 1).all()
    assert (pareto_k(generalised_pareto(0.9, n * 50).reshape(n, 50)) > MAX_PARETO_K).sum() >= 35  # of these 49 are expected
    torch.testing.assert_close(smoothed.exp().mean(0), logs.exp().mean(0), rtol=0.03, atol=0)  # less than a standard error


def test_k_does_not_depend_on_scale_order_type_or_place_of_the_draws():
    log_weights = 2 * torch.randn(500, 3, 2, dtype=torch.float64)
    k = pareto_k(log_weights)
    assert k.shape == (3, 2)
    for shift in (-5000.0, 1e4):
        torch.testing.assert_close(pareto_k(log_weights + shift), k, rtol=1e-6, atol=1e-6)
        smoothed = smooth_log_weights(log_weights + shift)[0] - shift
        torch.testing.assert_close(smoothed, smooth_log_weights(log_weights)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pareto_k(log_weights[torch.randperm(500)]), k)
    torch.testing.assert_close(pareto_k(log_weights.movedim(0, 1), dim=1), k)
    torch.testing.assert_close(pareto_k(log_weights.movedim(0, -1), dim=-1), k)
    single = pareto_k(log_weights.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), k, rtol=1e-4, atol=1e-4)


def test_smoothing_keeps_the_body_the_order_and_the_largest_weight():
    log_weights = 3 * torch.randn(1000, dtype=torch.float64)
    smoothed, _ = smooth_log_weights(log_weights)
    order = log_weights.argsort()
    assert torch.equal(smoothed[order[:-95]], log_weights[order[:-95]])
    assert (smoothed[order].diff() >= 0).all()
    assert smoothed.max() <= log_weights.max()


def test_the_smoothed_mean_has_less_variance():
    """Weights of tail index .6: the true mean is 2.5. Over 200 repeats of 500 draws the deviation falls (.44 to .28)."""
    logs = generalised_pareto(0.6, 500 * 200).reshape(500, 200)
    raw, smoothed = logs.exp().mean(0), smooth_log_weights(logs)[0].exp().mean(0)
    assert smoothed.std() < raw.std()
    assert abs(smoothed.mean() - 2.5) < 0.25


ZEROS = torch.full((100,), -INF)


@pytest.mark.parametrize(
    ("log_weights", "k"),
    [
        (torch.zeros(100), -INF),  # all equal
        (torch.full((100,), 1e6), -INF),
        (torch.zeros(100).index_fill(0, torch.arange(60), -1.0), -INF),  # two levels
        (torch.zeros(100).index_fill(0, torch.arange(3), 0.1), -INF),  # three values, a little above
        (torch.zeros(100).index_fill(0, torch.arange(3), 20.0), INF),  # three values that carry all the weight
        (ZEROS.index_fill(0, torch.arange(3), 0.0), INF),  # three weights at all
        (ZEROS, INF),  # no weight at all
        (torch.randn(100).index_fill(0, torch.tensor([7]), INF), INF),
        (torch.full((5,), -INF), INF),
    ],
)
def test_what_cannot_be_fitted_has_a_rule_and_stays_as_it_is(log_weights, k):
    smoothed, found = smooth_log_weights(log_weights)
    assert found == k
    assert torch.equal(smoothed, log_weights)


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_too_few_draws_leave_k_unknown(n):
    smoothed, k = smooth_log_weights(log_weights := torch.randn(n))
    assert k.isnan()
    assert torch.equal(smoothed, log_weights)
    assert pareto_k(torch.randn(MIN_PARETO_DRAWS)).isfinite()


def test_ties_in_the_tail():
    """Each weight of a good set twice: k stays that of the set (ArviZ's value, which takes the same rule for ties)."""
    log_weights = torch.randn(500, dtype=torch.float64).repeat(2)
    assert pareto_k(log_weights).numpy() == pytest.approx(az.psislw(log_weights.numpy())[1], abs=1e-7)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.tensor([0.0] * 30 + [float("nan")]), ValueError, "found NaN in 1 of 31"),
        (torch.arange(30), TypeError, "found torch.int64"),
        ([0.0, 1.0], TypeError, "found list"),
        (torch.tensor(1.0), ValueError, r"found the shape \(\)"),
        (torch.zeros(0), ValueError, r"found the shape \(0,\)"),
    ],
)
def test_bad_values_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        pareto_k(values)


def test_no_rows_give_no_k():
    assert pareto_k(torch.zeros(100, 0)).shape == (0,)


def test_many_rows_are_fitted_block_by_block(monkeypatch):
    log_weights = torch.randn(200, 50, dtype=torch.float64)
    k = pareto_k(log_weights)
    monkeypatch.setattr("pyro_genmodels.utils.pareto.MAX_BLOCK", 1)
    torch.testing.assert_close(pareto_k(log_weights), k)


# Reliability.


@pytest.mark.parametrize(
    ("k", "draws", "count", "unreliable"),
    [
        ([0.71], 1000, 1, True),
        ([0.71], 99, 1, False),
        ([1.5], 25, 1, False),
        ([3.1], 25, 1, True),
        ([0.7], 1000, 0, False),
        ([float("nan")], 1000, 0, False),
        ([INF] + 500 * [0.1], 1000, 1, True),
        (25 * [0.9] + 475 * [0.1], 1000, 25, False),
        (26 * [0.9] + 474 * [0.1], 1000, 26, True),
        ([], 1000, 0, False),
    ],
)
def test_what_is_called_unreliable(k, draws, count, unreliable):
    assert count_unreliable(torch.tensor(k)) == count
    assert is_unreliable(torch.tensor(k), draws) is unreliable


@pytest.mark.parametrize("n", [30, 50, 100, 256, 1000])
def test_good_weights_are_not_called_unreliable(n, float64):
    """Log-normal weights of deviation 1/2 in 1000 rows: above .7 are 3 % of rows (50 draws), .5 % (100), none (1000)."""
    assert not is_unreliable(pareto_k(0.5 * torch.randn(n, 1000)), n)


@pytest.mark.parametrize("n", [30, 100, 1000])
def test_weights_that_no_draw_covers_are_called_unreliable(n, float64):
    """Log-normal weights of deviation 10: one draw carries all."""
    assert is_unreliable(pareto_k(10 * torch.randn(n, 20)), n)
