"""Log-likelihoods and comparisons of rows that are read batch by batch: those of rows in memory, whatever interrupts them."""

import errno
import json
import re

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro.distributions import Normal
from torch.utils.data import DataLoader, TensorDataset

from pyro_genmodels import GAN, MAF, VAE, Flow, Labels, compare, log_likelihood
from pyro_genmodels.datasets import stream
from pyro_genmodels.evaluation import LogLikelihood, Output, StreamedComparison, StreamedLogLikelihood
from pyro_genmodels.evaluation.importance import RowEstimator
from pyro_genmodels.evaluation.row_counts import RowCounts, RowTotals
from pyro_genmodels.utils import parts
from pyro_genmodels.utils.moments import Moments
from pyro_genmodels.utils.rng import forked_rng


@pytest.fixture
def flow():
    return Flow((2,), transform=MAF(transforms=1, hidden=(8,)))


@pytest.fixture
def x():
    return torch.randn(1000, 2)


def loader(*tensors, size=128):
    return DataLoader(TensorDataset(*tensors), batch_size=size)


def values_in(path):
    return pd.read_parquet(path)["log_likelihood"].to_numpy()


@pytest.mark.parametrize(
    ("rows", "shown"), [(100, "3.000 ± 0.101 nats"), (4_000_000, "3.0000 ± 0.0005 nats"), (1, "2.000 ± nan")]
)
def test_standard_errors_of_many_rows_are_shown(rows, shown):
    values = -3 + (-1.0) ** torch.arange(rows)  # the error of their mean is 1 / sqrt(rows - 1)
    assert str(LogLikelihood(values, torch.zeros(rows), "exact", 1)).startswith(shown)


def test_moments_of_parts_are_those_of_all_rows(float64):
    x = 1e9 + torch.randn(1000, 3)
    merged = Moments.of(x[:1]) + Moments.of(x[1:700]) + Moments.of(x[700:])
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-15, atol=0)
    torch.testing.assert_close(merged.variance, x.var(0), rtol=1e-6, atol=0)  # 1e9 in doubles: seven digits of a deviation
    assert Moments.of(x[:1]).variance.isnan().all()


def test_totals_survive_json_and_count_across_parts():
    values, k = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]), torch.tensor([0.1, torch.nan, 0.9, torch.nan])
    whole = RowTotals.of(values, k)
    merged = RowTotals.of(values[:1], k[:1]) + RowTotals.of(values[1:], k[1:])
    again = RowTotals.from_record(json.loads(json.dumps(merged.as_record())))
    assert str(again.counts) == str(merged.counts) == str(whole.counts)
    assert str(whole.counts) == str(RowCounts(4, 1, 2, 2, 1, torch.nan, 1, 0, whole.counts.largest_k))


def test_values_are_those_of_rows_in_memory(flow, x, tmp_path):
    expected = log_likelihood(flow, x)
    found = log_likelihood(flow, x, out=Output(tmp_path / "a.parquet", rows=300))
    assert isinstance(found, StreamedLogLikelihood)
    np.testing.assert_array_equal(values_in(found.path), expected.values)
    assert len(list(found.path.glob("part-*.parquet"))) == 4
    assert str(found) == str(expected)
    assert found.mean == pytest.approx(expected.mean, rel=1e-14)
    assert found.mean_std_error == pytest.approx(expected.mean_std_error, rel=1e-12)
    assert found.bits_per_dim(2) == pytest.approx(expected.bits_per_dim(2), rel=1e-14)
    manifest = json.loads((found.path / "_manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["rows"] == 1000


def test_streams_of_all_kinds_give_the_same(flow, x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    pd.DataFrame(x.numpy(), columns=["a", "b"]).to_parquet(tmp_path / "x.parquet")
    expected = log_likelihood(flow, x)
    for rows in (
        loader(x),
        stream(tmp_path / "x.npy"),
        stream(tmp_path / "x.parquet"),
        iter(x.split(77)),
        iter([{"x": x[:500]}, {"x": x[:0]}, {"x": x[500:]}]),
    ):
        found = log_likelihood(flow, rows)
        assert found.num_rows == 1000
        assert found.path is None
        assert found.mean == pytest.approx(expected.mean, rel=1e-6)
        assert found.mean_std_error == pytest.approx(expected.mean_std_error, rel=1e-5)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = log_likelihood(flow, mapped, out=tmp_path / "a.parquet")
    np.testing.assert_allclose(values_in(found.path), expected.values, rtol=1e-5)


def test_batches_hold_contexts_too(x):
    flow, labels = Flow((2,), transform=MAF(transforms=1, hidden=(8,)), context=Labels(3)), torch.arange(1000) % 3
    expected = log_likelihood(flow, x, labels).mean
    assert log_likelihood(flow, loader(x, labels)).mean == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="Let its batches hold all that has a value for each row"):
        log_likelihood(flow, loader(x), labels)


def test_what_is_given_by_keyword_beside_a_stream_is_not_cut(x):
    def model(x, scale):
        with pyro.plate("rows", len(x)):
            assert len(scale) == 2
            pyro.sample("x", Normal(0.0, scale).expand([len(x), 2]).to_event(1), obs=x)

    scale = torch.tensor([1.0, 2.0])  # as long as the batches, in which tensors of rows are cut
    found = log_likelihood((model, lambda x, scale: None), loader(x[:20], size=2), scale=scale)
    expected = Normal(0.0, scale).log_prob(x[:20]).sum(1).double()
    assert found.mean == pytest.approx(expected.mean().item(), rel=1e-6)


def test_bounds_depend_on_the_seed_and_not_on_interruptions(x, tmp_path, monkeypatch):
    vae, rows = VAE((2,), hidden=(8,), latent_dim=1), 300
    options = {"num_samples": 30, "batch_size": 3000}
    whole = log_likelihood(vae, x, out=Output(tmp_path / "whole.parquet", rows=rows), **options)
    estimate, calls = RowEstimator.estimate, []

    def interrupted(self, data, bar):
        calls.append(data)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return estimate(self, data, bar)

    monkeypatch.setattr(RowEstimator, "estimate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        log_likelihood(vae, x, out=Output(tmp_path / "b.parquet", rows=rows), **options)
    assert sorted(p.name for p in (tmp_path / "b.parquet").iterdir()) == [
        "_manifest.json", "part-00000.parquet", "part-00001.parquet"
    ]  # fmt: skip
    torch.rand(5)  # the state of torch's random numbers is no part of it
    found = log_likelihood(vae, x, out=Output(tmp_path / "b.parquet", rows=rows, resume=True), **options)
    assert len(calls) == 5  # two parts, the interruption, and the two that were left
    pd.testing.assert_frame_equal(pd.read_parquet(found.path), pd.read_parquet(whole.path))
    assert list(pd.read_parquet(found.path)) == ["log_likelihood", "std_error", "pareto_k", "smoothed"]
    assert str(found) == str(whole)
    other = log_likelihood(vae, x, out=Output(tmp_path / "c.parquet", rows=rows, seed=1), **options)
    assert not np.array_equal(values_in(other.path), values_in(whole.path))


def test_a_part_is_what_memory_gives_from_its_seed(x, tmp_path):
    vae = VAE((2,), hidden=(8,), latent_dim=1)
    found = log_likelihood(vae, x[:100], num_samples=30, out=Output(tmp_path / "a.parquet", rows=60, seed=3), parallel=True)
    with forked_rng(parts.part_seed(3, 1, 0)):
        expected = log_likelihood(vae, x[60:100], num_samples=30, parallel=True)
    assert expected.kind == "lower bound"
    _, path = sorted(found.path.glob("part-*"))
    assert path.name == "part-00001.parquet"
    assert len(values_in(path)) == 40


def test_a_run_is_resumed_by_the_same_fit_data_and_settings_only(flow, x, tmp_path):
    path = tmp_path / "a.parquet"
    log_likelihood(flow, x, out=path)
    with pytest.raises(FileExistsError, match="To go on with an interrupted run pass Output"):
        log_likelihood(flow, x, out=path)
    resumed = Output(path, resume=True)
    assert log_likelihood(flow, x, out=resumed).num_rows == 1000
    other = Flow((2,), transform=MAF(transforms=1, hidden=(8,)))
    for name, call in {
        "fit": lambda: log_likelihood(other, x, out=resumed),
        "data": lambda: log_likelihood(flow, x + 1, out=resumed),
        "number of rows (1000, and now 1001)": lambda: log_likelihood(flow, torch.cat([x, x[:1]]), out=resumed),
        "seed (0, and now 5)": lambda: log_likelihood(flow, x, out=Output(path, resume=True, seed=5)),
        "num samples (1000, and now 10)": lambda: log_likelihood(flow, x, num_samples=10, out=resumed),
        "rows of a part (100000, and now 7)": lambda: log_likelihood(flow, x, out=Output(path, resume=True, rows=7)),
    }.items():
        with pytest.raises(ValueError, match=re.escape(f"holds a run with different {name}")):
            call()


def test_a_stream_that_has_grown_is_refused(flow, x, tmp_path):
    out = Output(tmp_path / "a.parquet", resume=True, rows=300)
    log_likelihood(flow, iter(x[:700].split(100)), out=out)
    with pytest.raises(ValueError, match="Part 2 of the rows has 300 rows, but 100 were evaluated before"):
        log_likelihood(flow, iter(x.split(100)), out=out)


def test_a_damaged_part_is_named_and_made_again(flow, x, tmp_path):
    out = Output(tmp_path / "a.parquet", resume=True, rows=300)
    expected = values_in(log_likelihood(flow, x, out=out).path)
    part = tmp_path / "a.parquet" / "part-00001.parquet"
    content = bytearray(part.read_bytes())
    content[50] ^= 255
    for damaged in (bytes(content), content[:100], b""):
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"part-00001.parquet is damaged .* Delete this one file and resume"):
            log_likelihood(flow, x, out=out)
    part.unlink()
    np.testing.assert_array_equal(values_in(log_likelihood(flow, x, out=out).path), expected)


def test_a_full_disk_ends_a_run_and_loses_nothing(flow, x, tmp_path, monkeypatch):
    import pyarrow.parquet as parquet

    out, write, calls = Output(tmp_path / "a.parquet", resume=True, rows=300), parquet.write_table, []

    def full(table, where, **options):
        calls.append(where)
        write(table, where, **options)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(where))

    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(OSError, match=r"No space left on device: .*part-00001.parquet"):
        log_likelihood(flow, x, out=out)
    assert sorted(p.name for p in (tmp_path / "a.parquet").iterdir()) == ["_manifest.json", "part-00000.parquet"]
    np.testing.assert_array_equal(values_in(log_likelihood(flow, x, out=out).path), log_likelihood(flow, x).values)


def test_unreliable_values_are_told_with_the_number_of_the_row(flow, x, tmp_path):
    x[700] = 1e30
    with pytest.warns(RuntimeWarning, match="the value is -inf in 1 of 1000 rows, the first of them row 700"):
        found = log_likelihood(flow, loader(x))
    assert found.kind == "unreliable"
    assert found.notes == ["the value is infinite in 1 of 1000 rows"]


def test_an_error_names_the_rows_of_the_stream(flow, x):
    x[700] = torch.nan
    with pytest.raises(ValueError, match="1 of 128 rows, the first of them row 60") as error:
        log_likelihood(flow, loader(x))
    assert error.value.__notes__ == ["These are the rows 640 to 767 of the stream."]


def test_what_cannot_be_streamed_is_refused(flow, x, tmp_path):
    with pytest.raises(ValueError, match=r"log_likelihood writes a folder called 'name.parquet', but found out='a.csv'"):
        log_likelihood(flow, x, out="a.csv")
    with pytest.raises(TypeError, match="wants out as a path"):
        log_likelihood(flow, x, out=3)
    with pytest.raises(ValueError, match="The stream has no rows"):
        log_likelihood(flow, iter([]))
    with pytest.raises(ValueError, match="found row_dim=1"):
        log_likelihood(flow, loader(x), row_dim=1)
    (tmp_path / "b.parquet").mkdir()
    with pytest.raises(ValueError, match=r"it has no _manifest\.json that this version reads"):
        log_likelihood(flow, x, out=Output(tmp_path / "b.parquet", resume=True))

    def model(x):
        with pyro.plate("rows", 100, subsample_size=10) as i:
            pyro.sample("x", Normal(0.0, 1.0).expand([len(i), 2]).to_event(1), obs=x[i])

    with pytest.raises(ValueError, match="'rows' of the model chooses some by subsample_size"):
        log_likelihood((model, lambda x: None), loader(x, size=100))


def test_comparison_of_a_stream_is_that_of_rows_in_memory(flow, x):
    fits = {"gan": GAN((2,)), "flow": flow, "other": Flow((2,), transform=MAF(transforms=1, hidden=(8,)))}
    expected, found = compare(fits, x), compare(fits, loader(x, size=300))
    assert isinstance(found, StreamedComparison)
    pd.testing.assert_frame_equal(found.table, expected.table, rtol=1e-6)
    assert str(found) == str(expected)


def test_comparison_of_values_in_folders(flow, x, tmp_path):
    fits = {"a": flow, "b": Flow((2,), transform=MAF(transforms=1, hidden=(8,)))}
    scores = {
        name: log_likelihood(fit, x, out=Output(tmp_path / f"{name}.parquet", rows=rows))
        for (name, fit), rows in zip(fits.items(), (300, 450), strict=True)
    }
    expected = compare(fits, x).table.drop(columns="bits_per_dim")
    pd.testing.assert_frame_equal(compare(scores).table.drop(columns="bits_per_dim"), expected, rtol=1e-10)
    mixed = compare({"a": scores["a"], "b": fits["b"]}, loader(x, size=77)).table.drop(columns="bits_per_dim")
    pd.testing.assert_frame_equal(mixed, expected, rtol=1e-6)
    pd.testing.assert_frame_equal(
        compare({"a": scores["a"], "b": log_likelihood(fits["b"], x)}).table.drop(columns="bits_per_dim"), expected, rtol=1e-10
    )
    with pytest.raises(ValueError, match="compare wants the same data for all fits"):
        compare({"a": scores["a"], "b": fits["b"]}, loader(x[:900]))
    with pytest.raises(ValueError, match="log-likelihoods of a stream were not written"):
        compare({"a": scores["a"], "b": log_likelihood(fits["b"], loader(x))})
    with pytest.raises(ValueError, match="compare writes no values"):
        compare(fits, x, out="c.parquet")
    with pytest.raises(ValueError, match="which quality_samples do not go with"):
        compare(fits, loader(x), quality_samples=10)


def test_stacking_weights_of_many_rows_are_found_on_some(flow, x, monkeypatch):
    import importlib

    module = importlib.import_module("pyro_genmodels.evaluation.streamed_comparison")
    fits = {"a": flow, "b": Flow((2,), transform=MAF(transforms=1, hidden=(8,)))}
    monkeypatch.setattr(module, "ROWS_FOR_WEIGHTS", 400)
    found = compare(fits, loader(x, size=300))
    assert found.some_values.shape == (2, 400)
    assert found.table["weight"].sum() == pytest.approx(1)
    monkeypatch.setattr(module, "ROWS_FOR_WEIGHTS", 1000)
    pd.testing.assert_frame_equal(compare(fits, loader(x, size=300)).table, compare(fits, x).table, rtol=1e-6)
