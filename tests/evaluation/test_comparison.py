"""Comparison of fits: the table, stacking weights, fits without a likelihood, and the quality of samples."""

import importlib
from itertools import pairwise

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from matplotlib.axes import Axes

from pyro_genmodels import MAF, VAE, Flow, Labels, compare, log_likelihood
from pyro_genmodels.distributions import Implicit
from pyro_genmodels.evaluation import LogLikelihood
from pyro_genmodels.evaluation.comparison_table import stacking_weights
from pyro_genmodels.families.family import Family

SMALL = {"transforms": 2, "hidden": (8,)}
A, B, C = [-1.0, -3.0, -2.5, -0.5], [-2.0, -2.5, -2.0, -3.0], [-4.0, -4.0, -1.0, -4.0]


def small_flow(**options):
    return Flow((2,), transform=MAF(**SMALL), **options)


def state(family):
    return {name: t.clone() for name, t in family.state_dict().items()}


def assert_unchanged(family, before):
    assert all(t.equal(before[name]) for name, t in family.state_dict().items())


def known(values, kind="exact", k=1):
    values = torch.as_tensor(values, dtype=torch.float64)
    return LogLikelihood(values, torch.zeros_like(values), kind, k)


class Ring(Family):
    """Draws on a circle, with no density."""

    def __init__(self, radius=1.0, context=0):
        super().__init__((2,), context=context)
        self.radius = torch.nn.Parameter(torch.tensor(radius))

    def forward(self, context=None):
        def likelihood(z, c):
            return dist.Delta(self.radius * torch.nn.functional.normalize(z, dim=-1), event_dim=1)

        return Implicit(dist.Normal(torch.zeros(2), 1.0).to_event(1), likelihood, (2,), context=self.embed(context))


def test_the_table_by_hand():
    table = compare({"b": known(B), "a": known(A, "lower bound", 50), "c": known(C)}).table
    assert list(table.columns) == [
        "rank", "elpd", "se", "elpd_diff", "dse", "weight", "kind", "num_samples", "nats", "bits_per_dim"
    ]  # fmt: skip
    assert list(table.index) == ["a", "b", "c"]
    assert list(table["rank"]) == [0, 1, 2]
    assert list(table["elpd"]) == pytest.approx([-7.0, -9.5, -13.0])
    assert list(table["se"]) == pytest.approx([2 * np.std(v, ddof=1) for v in (A, B, C)])
    assert list(table["elpd_diff"]) == pytest.approx([0.0, 2.5, 6.0])
    assert list(table["dse"]) == pytest.approx([2 * np.std(np.subtract(A, v), ddof=1) for v in (A, B, C)])
    assert list(table["nats"]) == pytest.approx([7 / 4, 9.5 / 4, 13 / 4])
    assert list(table["kind"]) == ["lower bound", "exact", "exact"]
    assert list(table["num_samples"]) == [50, 1, 1]
    assert table["weight"].sum() == pytest.approx(1)
    assert all(dtype.kind in "if" for name, dtype in table.dtypes.items() if name != "kind")


def test_stacking_weights_are_the_best_mixture():
    values = np.array([A, B, C])
    n = 400
    simplex = np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]) / n
    score = np.log(simplex @ np.exp(values)).sum(1)
    weights = compare(dict(zip("abc", map(known, values), strict=True))).table["weight"].to_numpy()
    assert np.log(weights @ np.exp(values)).sum() >= score.max() - 1e-9
    np.testing.assert_allclose(weights, simplex[score.argmax()], atol=2 / n)


def test_stacking_weights_of_very_small_densities_are_the_same():
    table = compare({"a": known(A), "b": known(B), "c": known(C)}).table
    shifted = compare({name: known(np.array(v) - 1000) for name, v in {"a": A, "b": B, "c": C}.items()}).table
    np.testing.assert_allclose(shifted["weight"], table["weight"], atol=1e-9)
    far = compare({"a": known(np.full(4, -1000.0)), "b": known(np.full(4, -2000.0))}).table
    np.testing.assert_allclose(far["weight"], [1, 0], atol=1e-9)


def test_stacking_weights_are_computed_once(monkeypatch):
    calls = []
    module = importlib.import_module("pyro_genmodels.evaluation.comparison_table")
    monkeypatch.setattr(module, "stacking_weights", lambda values: calls.append(1) or stacking_weights(values))
    comparison = compare({"a": known(A), "b": known(B)})
    pd.testing.assert_frame_equal(comparison.table, comparison.table)
    comparison.plot()
    assert str(comparison) == str(comparison)
    assert len(calls) == 1
    assert comparison.table is not comparison.table  # a change of one does not show in the other


def test_equal_fits_share_the_weight():
    table = compare({"a": known(A), "b": known(A)}).table
    assert list(table["weight"]) == pytest.approx([0.5, 0.5])
    assert list(table["dse"]) == [0, 0]


def test_fits_are_evaluated_on_the_given_data():
    x, labels = torch.randn(30, 2), torch.randint(3, (30,))
    fits = {"flow": small_flow(context=Labels(3)), "vae": VAE((2,), latent_dim=1, hidden=(4,), context=Labels(3))}
    fits["again"] = fits["flow"]
    comparison = compare(fits, x, labels, num_samples=20)
    table = comparison.table
    assert table.loc["flow", "elpd"] == pytest.approx(fits["flow"](labels).log_prob(x).sum().item(), rel=1e-5)
    assert table.loc["flow", "elpd"] == pytest.approx(table.loc["again", "elpd"])
    assert table.loc["vae", "num_samples"] == 20
    assert table.loc["flow", "bits_per_dim"] == pytest.approx(table.loc["flow", "nats"] / (2 * np.log(2)))
    assert comparison.log_likelihoods["vae"].kind == "lower bound"


def test_computed_and_uncomputed_fits_stand_side_by_side():
    flow, x = small_flow(), torch.randn(10, 2)
    table = compare({"new": flow, "known": log_likelihood(flow, x)}, x).table
    assert table["elpd"].iloc[0] == pytest.approx(table["elpd"].iloc[1])


def test_the_printed_table_says_held_out_and_warns_of_mixed_kinds():
    mixed = str(compare({"a": known(A), "b": known(B, "lower bound", 9)}))
    assert "held-out" in mixed
    assert "loo" not in mixed.lower()
    assert "kinds differ (exact, lower bound)" in mixed
    assert "kinds differ" not in str(compare({"a": known(A), "b": known(B)}))


def test_the_plot_is_an_axes_with_every_fit():
    import matplotlib.pyplot as plt

    comparison = compare({"a": known(A), "b": known(B), "c": known(C, "lower bound")})
    axes = comparison.plot()
    assert isinstance(axes, Axes)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a\n(exact)", "b\n(exact)", "c\n(lower bound)"]
    _, own = plt.subplots()
    assert comparison.plot(own) is own
    axes = compare({"a large value with a long name": known([-1e4, -1e4]), "b": known([-8e3, -8e3])}).plot()
    axes.figure.draw_without_rendering()
    low, high = axes.get_xlim()
    boxes = [t.get_window_extent() for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    assert isinstance(compare({"alone": known(A)}).plot(), Axes)
    plt.close("all")


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="at least one fit"):
        compare({}, torch.randn(3, 2))


def test_a_fit_without_data_is_refused():
    with pytest.raises(ValueError, match=r"'flow'.*no data"):
        compare({"flow": small_flow()})


def test_different_rows_are_refused():
    with pytest.raises(ValueError, match=r"'a': 4.*'b': 3"):
        compare({"a": known(A), "b": known(B[:3])})


def test_stacking_passes_over_what_every_fit_rules_out():
    values = torch.tensor([[-1.0, -torch.inf, -1.0], [-3.0, -torch.inf, -2.0]])
    torch.testing.assert_close(stacking_weights(values), torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0)


def test_a_fit_without_a_likelihood_is_a_row_of_dashes_ranked_last():
    x = torch.randn(30, 2)
    comparison = compare({"ring": Ring(), "flow": small_flow(), "vae": VAE((2,), latent_dim=1, hidden=(4,))}, x, num_samples=5)
    table = comparison.table
    assert list(table.index)[-1] == "ring"
    row = table.loc["ring"]
    assert (row["kind"], row["num_samples"], row["rank"]) == ("none", 0, 2)
    assert row[["elpd", "se", "elpd_diff", "dse", "weight", "nats", "bits_per_dim"]].isna().all()
    assert table["weight"].sum() == pytest.approx(1)
    others = compare({name: comparison.log_likelihoods[name] for name in ("flow", "vae")}, x).table
    pd.testing.assert_frame_equal(table.drop(index="ring"), others)
    line = next(line for line in str(comparison).splitlines() if line.startswith("ring"))
    assert line.split().count("-") == 7
    assert "without a likelihood: ring." in str(comparison)
    assert "no likelihood" in str(comparison.log_likelihoods["ring"])
    ax = comparison.plot()
    assert len(ax.get_yticks()) == 2
    assert "no likelihood: ring" in ax.get_xlabel()


def test_fits_without_any_likelihood_have_a_table_and_no_plot():
    comparison = compare({"a": Ring(), "b": Ring(2.0)}, torch.randn(10, 2))
    assert comparison.table["elpd"].isna().all()
    assert list(comparison.table["rank"]) == [0, 1]
    with pytest.raises(ValueError, match="No fit has a likelihood"):
        comparison.plot()


def test_samples_of_every_fit_are_compared_with_data():
    """The true ring is within chance (its p-value below 0.001 with a rate of 1e-3, for this seed not), the wide one is not."""
    x = torch.nn.functional.normalize(torch.randn(400, 2), dim=-1)
    fits = {"wide": Ring(1.5), "true": Ring(), "flow": small_flow(), "known": known(torch.zeros(400))}
    before = state(fits["wide"])
    comparison = compare(fits, x, quality_samples=1000)
    table = comparison.table
    assert_unchanged(fits["wide"], before)
    assert table.loc["wide", "mmd_p"] == pytest.approx(1 / 1001)
    assert table.loc["flow", "mmd_p"] == pytest.approx(1 / 1001)
    assert table.loc["true", "mmd_p"] > 1e-3
    assert table.loc["true", "mmd"] < 0.02 < table.loc["wide", "mmd"]
    assert table.loc["known", ["mmd", "mmd_p", "sliced_wasserstein"]].isna().all()
    assert 0 < comparison.baseline < 0.2
    assert abs(table.loc["wide", "sliced_wasserstein"] - 0.5 / 2**0.5) < 0.1
    assert table.loc["true", "sliced_wasserstein"] < 0.2
    assert f"(baseline): {comparison.baseline:.3f}" in str(comparison)


def test_samples_are_made_for_the_context_of_their_rows():
    labels = torch.randint(2, (200,))
    x = torch.nn.functional.normalize(torch.randn(200, 2), dim=-1)
    table = compare({"ring": Ring(context=Labels(2))}, x, context=labels, quality_samples=50, num_samples=3).table
    assert table.loc["ring", "sliced_wasserstein"] < 0.5


def test_comparing_samples_needs_data():
    with pytest.raises(ValueError, match="no data x"):
        compare({"a": known(A)}, quality_samples=10)
    with pytest.raises(ValueError, match="2 or more samples"):
        compare({"a": small_flow()}, torch.randn(3, 2), quality_samples=10)
