"""The table of divergences: what is in it, what is left out and why, and where its numbers come from."""

import pandas as pd
import pyro.distributions as dist
import pytest
import torch

from pyro_genmodels import VAE, Autoregressive, BernoulliLikelihood, Flow
from pyro_genmodels.distributions import Energy
from pyro_genmodels.divergences import divergence_table, js, kl
from pyro_genmodels.divergences.table import DENSITY_DIVERGENCES, SAMPLE_DISTANCES

DENSITIES, SCORES, DRAWS = list(DENSITY_DIVERGENCES), ["fisher", "reverse_fisher"], list(SAMPLE_DISTANCES)
P, Q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0)


def test_two_densities_have_every_row_by_the_best_method():
    table = divergence_table(P, Q, num_samples=2000, set_size=200, seed=1)
    assert list(table.index) == DENSITIES + SCORES + ["wasserstein", "mmd"]
    assert list(table.columns) == ["value", "std_error", "pareto_k", "reliable", "kind", "method"]
    assert table.attrs["left_out"] == {"sliced_wasserstein": "In one dimension it is the wasserstein distance."}
    assert table.kind.tolist() == ["densities"] * 8 + ["scores"] * 2 + ["samples"] * 2
    assert table.std_error.dtype == table.pareto_k.dtype == "float64"
    assert table.reliable.all()
    assert table.method["wasserstein"] == "optimal plan, order 2"
    assert (table.method[["kl", "reverse_kl", "jeffreys"]] == "closed form").all()
    assert table.method["js"] == "Monte Carlo"
    assert table.value["kl"] == pytest.approx(kl(P, Q).value.item())
    assert abs(table.value["js"] - js(P, Q).value.item()) < 6 * 2 * table.std_error["js"]  # 2e-9, by two errors
    assert table.drop(columns="pareto_k").notna().all(axis=None)


def test_a_seed_fixes_it_and_leaves_torchs_generator_alone():
    before = torch.random.get_rng_state()
    first, again, other = (divergence_table(P, Q, num_samples=100, set_size=50, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.equals(again)
    assert not first.equals(other)


def test_sets_of_samples_leave_other_rows_out_with_reasons():
    x = torch.randn(60, 2)
    for p, q, which in ((x, x + 1, "p and q are sets"), (Flow((2,))(), x, "q is a set"), (x, Flow((2,))(), "p is a set")):
        table = divergence_table(p, q, set_size=60)
        assert list(table.index) == DRAWS
        assert list(table.attrs["left_out"]) == DENSITIES + SCORES
        assert all(which in reason for reason in table.attrs["left_out"].values())


def test_distributions_without_a_density_are_compared_by_scores_or_samples():
    energy = Energy(lambda x: x.square().sum(-1), (2,), num_steps=20)
    table = divergence_table(energy, Flow((2,))(), num_samples=50, set_size=50)
    assert list(table.index) == SCORES + DRAWS
    assert "density is: unnormalized" in table.attrs["left_out"]["js"]
    table = divergence_table(VAE((2,), latent_dim=1)(), Flow((2,))(), num_samples=50, set_size=50)
    assert list(table.index) == DRAWS
    bits = Autoregressive((2,), likelihood=BernoulliLikelihood())()
    table = divergence_table(bits, bits, num_samples=50, set_size=50)
    assert list(table.index) == DENSITIES + DRAWS
    assert "over real numbers" in table.attrs["left_out"]["fisher"]


def test_the_method_names_exact_sums():
    table = divergence_table(dist.Bernoulli(0.2), dist.Bernoulli(0.5), num_samples=50, set_size=50)
    assert table.method["tv"] == "exact sum"
    assert table.std_error["tv"] == 0


def test_too_large_linear_programmes_are_left_out(monkeypatch):
    monkeypatch.setattr("pyro_genmodels.divergences.table._MAX_COSTS", 1000)
    table = divergence_table(torch.randn(60, 2), torch.randn(60, 2))
    assert list(table.index) == ["sliced_wasserstein", "mmd"]
    assert "60 x 60 samples" in table.attrs["left_out"]["wasserstein"]


def test_batches_and_different_events_are_refused():
    with pytest.raises(ValueError, match=r"divergence_table wants distributions without a batch.*q has batch shape \(3,\)"):
        divergence_table(P, Q.expand((3,)))
    with pytest.raises(ValueError, match="one event shape"):
        divergence_table(P, Flow((2,))())


def test_arrays_and_frames_are_sets_and_a_family_is_called():
    """A numpy array raised "no attribute numel", a family "not subscriptable"."""
    x = torch.randn(50, 2)
    truth = divergence_table(x, x + 1, seed=0)
    for form in (lambda t: t.numpy(), lambda t: pd.DataFrame(t.numpy()), lambda t: t.tolist()):
        found = divergence_table(form(x), form(x + 1), seed=0)
        pd.testing.assert_frame_equal(found, truth, rtol=1e-6)
    assert list(divergence_table(x[:, 0].numpy(), P, set_size=50).index) == ["wasserstein", "mmd"]
    for p, q, name in ((Flow((2,)), x, "p"), (x, Flow((2,)), "q")):
        with pytest.raises(TypeError, match=rf"divergence_table: {name} is a Flow; call it: {name}\(\)"):
            divergence_table(p, q)
    with pytest.raises(TypeError, match=r"kl wants distributions, but p is a Flow. Call it: p\(\)."):
        kl(Flow((2,)), Flow((2,))())
