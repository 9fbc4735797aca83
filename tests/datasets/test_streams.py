"""Rows larger than memory: every row once in each epoch, whoever reads it; exact statistics; faults by file and row."""

import json
import os
from contextlib import closing
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as parquet
import pytest
import torch

from pyro_genmodels.datasets import shards, stream, streams
from pyro_genmodels.datasets.orders import rows_left, shares, step_sizes
from pyro_genmodels.datasets.statistics import ColumnStatistics, merged
from pyro_genmodels.families.input_warnings import DATA
from pyro_genmodels.families.standardization import estimate_of_all

ROWS = 103


def write_parquet(folder, sizes=(50, 0, 13, 40), group=15, **columns):
    """Write files of the columns n, the number of the row, m = 2 n, and label = n % 3."""
    first = 0
    for number, size in enumerate(sizes):
        n = np.arange(first, first + size, dtype=np.float64)
        table = {"n": n, "m": 2 * n, "label": n.astype(np.int64) % 3} | {k: fn(n) for k, fn in columns.items()}
        parquet.write_table(pa.table(table), folder / f"part-{number}.parquet", row_group_size=group)
        first += size
    return folder


def write_npy(folder, sizes=(60, 43), dtype=np.float32):
    first = 0
    for number, size in enumerate(sizes):
        n = np.arange(first, first + size)
        np.save(folder / f"part-{number}.npy", np.stack([n, 2 * n, n % 3], 1).astype(dtype))
        first += size
    return folder


def rows_array():
    n = torch.arange(ROWS)
    return torch.stack([n, 2 * n, n % 3], 1).float()


SOURCES = {
    "parquet": lambda folder, **o: stream(write_parquet(folder), columns=["n", "m", "label"], **o),
    "npy": lambda folder, **o: stream(write_npy(folder), **o),
    "array": lambda folder, **o: stream(rows_array().numpy(), **o),
    "iterable": lambda folder, **o: stream(list(rows_array().split(9)).__iter__, rows=ROWS, **o),
}


def numbers(batches):
    """Return the number of each row of some batches, and check that its other columns are its own."""
    x = torch.cat([batch if isinstance(batch, torch.Tensor) else batch[0] for batch in batches])
    assert torch.equal(x[:, 1], 2 * x[:, 0])
    return x[:, 0].int().tolist()


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    return lambda **options: SOURCES[request.param](tmp_path, **options)


def test_rows_come_in_the_order_of_the_files(source):
    rows = source(buffer_rows=20)
    assert len(rows) == ROWS
    sizes = [len(batch) for batch in rows.batches(10)]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 10
    assert numbers(rows.batches(10)) == list(range(ROWS))


@pytest.mark.parametrize(("ranks", "batch_size", "buffer_rows"), [(1, 10, 20), (2, 7, 5), (3, 50, 16), (4, ROWS, 1000)])
def test_an_epoch_has_every_row_once_over_all_ranks(source, ranks, batch_size, buffer_rows):
    rows = source(buffer_rows=buffer_rows)
    parts = [list(rows.batches(batch_size, epoch=2, seed=1, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    for step in zip(*parts, strict=True):
        sizes = [len(batch) for batch in step]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) <= batch_size
    assert sorted(n for part in parts for n in numbers(part)) == list(range(ROWS))


def test_the_order_is_a_function_of_seed_and_epoch(source):
    rows = source(buffer_rows=20)
    order = {key: numbers(rows.batches(10, epoch=key[0], seed=key[1])) for key in [(1, 0), (2, 0), (1, 1)]}
    assert numbers(rows.batches(33, epoch=1)) == order[1, 0]  # whatever the size of batches
    assert len(set(map(tuple, order.values()))) == 3
    assert list(range(ROWS)) not in order.values()


def test_rows_are_shuffled_beyond_the_buffer_by_shards(tmp_path):
    rows = SOURCES["parquet"](tmp_path, buffer_rows=30)
    first = [numbers(batches) for batches in ([next(rows.batches(30, epoch=epoch))] for epoch in range(1, 6))]
    assert max(max(part) - min(part) for part in first) > 60


@pytest.mark.parametrize("done", [[(1, 0)], [(1, 1)], [(1, 10)], [(1, 11)]])
def test_the_rest_of_an_epoch_is_what_would_have_come(source, done):
    rows = source(buffer_rows=20)
    whole = list(rows.batches(10, epoch=3))
    rest = list(rows.batches(10, epoch=3, done=done))
    assert len(whole) == 11
    assert len(rest) == 11 - done[0][1]
    assert all(map(torch.equal, rest, whole[done[0][1] :]))


@pytest.mark.parametrize("runs", [[(3, 2), (2, 9)], [(1, 4), (4, 7)], [(4, 1), (1, 1), (2, 9)]])
def test_an_epoch_has_every_row_once_when_the_number_of_ranks_changes(source, runs):
    rows, seen, done = source(buffer_rows=20), [], []
    for ranks, steps in runs:
        for rank in range(ranks):
            part = list(rows.batches(10, epoch=1, rank=rank, ranks=ranks, done=done))
            seen += numbers(part[:steps])
        done.append((ranks, steps))
    assert sorted(seen) == list(range(ROWS))


def test_shares_of_any_epoch_are_all_of_it():
    """For many numbers of rows, steps and ranks: no row is lost or given twice, in one run or in several."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        steps, ranks, others = (int(n) for n in rng.integers(1, 9, 3))
        rows = int(rng.integers(steps * max(ranks, others), 300))
        done = [(ranks, int(rng.integers(steps + 1)))]
        unseen, left = rows_left(rows, steps, done)
        assert left == steps - done[0][1]
        made = [list(step_sizes(rows, steps, rank, ranks))[: done[0][1]] for rank in range(ranks)]
        assert sum(b - a for a, b in unseen) == rows - sum(map(sum, made))
        parts = sorted(part for rank in shares(unseen, left, others) for part in rank)
        assert all(a[1] <= b[0] for a, b in pairwise(parts))
        assert sum(b - a for a, b in parts) == (sum(b - a for a, b in unseen) if left else 0)
        if ranks == others:  # each goes on with its own rows
            before = shares([(0, rows)], steps, ranks)
            for rank, mine in enumerate(shares(unseen, left, ranks) if left else []):
                assert mine == [(before[rank][0][0] + sum(made[rank]), before[rank][0][1])]


def test_too_many_ranks_are_refused(source):
    with pytest.raises(ValueError, match="A step of 1 rows cannot be shared by 3 processes"):
        source().batches(2, rank=0, ranks=3)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_what_was_seen_is_not_read_again(kind, tmp_path, monkeypatch):
    rows = SOURCES[kind](tmp_path, buffer_rows=16)
    read = []
    for cls in {type(span.source) for span in rows.spans}:
        original = cls.read

        def watched(self, start, stop, original=original):
            for piece in original(self, start, stop):
                read.append(len(piece[0]))
                yield piece

        monkeypatch.setattr(cls, "read", watched)
    assert len(numbers(rows.batches(8, epoch=1, done=[(1, 11)]))) == ROWS - 11 * 8
    assert sum(read) == ROWS - 80  # from the beginning of the buffer


def test_memory_holds_two_buffers(tmp_path, monkeypatch):
    """The reader is never farther ahead of the batches than the buffer being made and the one that is given out."""
    monkeypatch.setattr(shards, "PIECE_BYTES", 100)
    rows, read = stream(write_npy(tmp_path, sizes=(3000,)), buffer_rows=64), [0]
    cls, original = type(rows.spans[0].source), type(rows.spans[0].source).read

    def counted(self, start, stop):
        for piece in original(self, start, stop):
            read[0] += len(piece[0])
            yield piece

    monkeypatch.setattr(cls, "read", counted)
    given = 0
    for batch in rows.batches(16, epoch=1):
        given += len(batch)
        assert read[0] - given <= 3 * 64 + 8  # what is given out, the next, and one that is begun
    assert (given, read[0]) == (3000, 3000)


def test_a_reader_that_is_left_early_ends_its_thread(tmp_path):
    import threading

    with closing(stream(write_npy(tmp_path), buffer_rows=8).batches(4, epoch=1)) as batches:
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


# Columns.


def test_columns_and_contexts_of_parquet(tmp_path):
    write_parquet(tmp_path)
    x, label = next(stream(tmp_path, columns=["m", "n"], context="label").batches(ROWS))
    assert (x.dtype, label.dtype, label.shape) == (torch.float64, torch.int64, (ROWS,))
    assert torch.equal(x[:, 1], torch.arange(ROWS).double())
    assert torch.equal(label, torch.arange(ROWS) % 3)
    x, context = next(stream(tmp_path, context=["m"]).batches(ROWS))
    assert (x.shape, context.shape) == ((ROWS, 2), (ROWS, 1))  # n and label


def test_columns_and_contexts_of_arrays(tmp_path):
    write_npy(tmp_path)
    x, label = next(stream(tmp_path, context=2).batches(ROWS))
    assert torch.equal(x, rows_array()[:, :2])
    assert torch.equal(label, rows_array()[:, 2])
    x, context = next(stream(tmp_path, columns=[0, 1], context=[-1]).batches(ROWS))
    assert (x.shape, context.shape) == ((ROWS, 2), (ROWS, 1))
    images, labels = np.zeros((5, 2, 2), np.uint8), np.arange(5)
    x, label = next(stream((images, labels)).batches(5))
    assert (x.shape, label.tolist()) == ((5, 2, 2), [0, 1, 2, 3, 4])


def test_files_are_found_in_every_form(tmp_path):
    write_parquet(tmp_path)
    files = sorted(tmp_path.glob("*.parquet"))
    (tmp_path / "_metadata").write_text("not rows")
    for form in (tmp_path, str(tmp_path / "part-*.parquet"), files, pyarrow.dataset.dataset(files)):
        assert numbers(stream(form, columns=["n", "m"]).batches(20)) == list(range(ROWS))
    assert len(stream(files[0])) == 50


def test_arrays_on_disk_are_sliced(tmp_path):
    write_npy(tmp_path)
    mapped = np.load(tmp_path / "part-0.npy", mmap_mode="r")
    assert numbers(stream(mapped, buffer_rows=16).batches(7)) == list(range(60))


def test_missing_values_are_nan(tmp_path):
    parquet.write_table(pa.table({"a": [1.0, None, 3.0], "b": [True, None, False]}), tmp_path / "a.parquet")
    [x] = stream(tmp_path).batches(3)
    assert x.isnan().tolist() == [[False, False], [True, True], [False, False]]
    assert x[2].tolist() == [3.0, 0.0]


# Statistics.


@pytest.mark.parametrize("offset", [0.0, 1e9, -1e12])
def test_statistics_are_those_of_all_rows_at_once(offset, tmp_path):
    """Against numpy in long double precision, to a few roundings of double precision."""
    values = np.random.default_rng(0).normal(size=(500, 3)) * [1.0, 1e-3, 1e3] + offset
    values[:, 2] = values[0, 2]
    np.save(tmp_path / "x.npy", values)
    [found] = stream(tmp_path, buffer_rows=320).statistics()
    exact = values.astype(np.longdouble)
    mean, deviation = exact.mean(0), exact.std(0, ddof=1)
    assert np.allclose(found.mean, mean.astype(float), rtol=1e-15)
    scale = 1e-13 + 1e-16 * abs(offset) / np.array([1.0, 1e-3, 1.0])
    assert (np.abs(found.deviation.numpy() - deviation.astype(float))[:2] <= scale[:2] * deviation.astype(float)[:2]).all()
    assert (found.deviation[2], found.rows, found.low[2]) == (0.0, 500, values[0, 2])


@pytest.mark.parametrize("unit", [2.0**-900, 2.0**900])
def test_statistics_are_exact_in_any_unit(unit):
    """Powers of 2 scale doubles without rounding, so that mean and deviation scale as exactly, though squares would vanish."""
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [[ColumnStatistics.of(rows * size, "x", 0) for rows in x.split(20)] for size in (1.0, unit)]
    plain, scaled = (first + second + third for first, second, third in parts)
    assert torch.equal(scaled.mean, plain.mean * unit)
    torch.testing.assert_close(scaled.deviation, plain.deviation * unit, rtol=1e-15, atol=0.0)
    loc, scale = estimate_of_all(scaled, x[0], kind="jointly", owner="Flow", inputs=DATA)
    wanted = estimate_of_all(plain, x[0], kind="jointly", owner="Flow", inputs=DATA)
    assert torch.equal(loc, wanted[0] * unit)
    torch.testing.assert_close(scale, wanted[1] * unit, rtol=1e-13, atol=0.0)


def test_statistics_do_not_depend_on_how_rows_are_divided():
    x = 1e6 + torch.randn(101, 4, dtype=torch.float64)
    x[7, 1], x[60, 1], x[:, 3] = torch.nan, torch.inf, torch.nan
    whole = ColumnStatistics.of(x, "x", 0)
    for size in (1, 10, 100):
        starts = range(0, 101, size)
        [parts] = merged((ColumnStatistics.of(x[i : i + size], "x", i),) for i in starts)
        assert parts.first_nonfinite == whole.first_nonfinite == "x, row 0"
        assert (parts.nonfinite, parts.count.tolist()) == (101, [101.0, 99.0, 101.0, 0.0])
        assert torch.allclose(parts.mean, whole.mean, rtol=1e-15)
        assert torch.allclose(parts.deviation[:3], whole.deviation[:3], rtol=1e-9)
        assert torch.equal(parts.high, whole.high)


def test_statistics_are_remembered_file_by_file(tmp_path, monkeypatch):
    write_parquet(tmp_path)
    rows = stream(tmp_path, columns=["n", "m"], context="label")
    found = rows.statistics()
    assert [s.rows for s in found] == [ROWS, ROWS]
    measured = []
    original = streams._measured
    monkeypatch.setattr(streams, "_measured", lambda span: measured.append(span.source.name) or original(span))
    again = stream(tmp_path, columns=["n", "m"], context="label").statistics()
    assert not measured
    assert torch.equal(again[0].mean, found[0].mean)
    assert torch.equal(again[0].spread, found[0].spread)
    stream(tmp_path, columns=["n"]).statistics()
    assert len(measured) == len(rows.spans)  # other columns are measured for themselves
    measured.clear()
    table = pa.table({"n": [0.0], "m": [0.0], "label": [1]})
    parquet.write_table(table, tmp_path / "part-2.parquet")
    changed = stream(tmp_path, columns=["n", "m"], context="label").statistics()
    assert len(measured) == 1
    assert changed[0].rows == ROWS - 12
    stream(tmp_path, columns=["n", "m"], context="label", remember=False).statistics()
    assert len(measured) > 1


def test_a_damaged_memory_is_measured_anew(tmp_path):
    write_npy(tmp_path)
    expected = stream(tmp_path, remember=False).statistics()[0].mean
    memory = tmp_path / "memory.json"
    stream(tmp_path, remember=memory).statistics()
    entries = json.loads(memory.read_text())["entries"]
    first = next(iter(entries))
    for text in ("{", "[]", json.dumps({"version": 1, "entries": {first: {"state": entries[first]["state"]}}})):
        memory.write_text(text)
        assert torch.equal(stream(tmp_path, remember=memory).statistics()[0].mean, expected)


@pytest.mark.parametrize("kind", ["npy", "parquet", "array"])
def test_a_share_is_held_out_exactly(kind, tmp_path):
    rows = SOURCES[kind](tmp_path, buffer_rows=32)
    rest, held_out = rows.split(0.2, seed=1)
    assert len(held_out) == round(0.2 * ROWS)
    assert sorted(numbers(rest.batches(9)) + numbers(held_out.batches(9, epoch=1))) == list(range(ROWS))
    assert numbers(rows.split(0.2, seed=2)[1].batches(50)) != numbers(held_out.batches(50))
    assert rest.digest != rows.digest
    with pytest.raises(ValueError, match=r"A share of 0.999 of 103 rows"):
        rows.split(0.999)


def test_a_sample_is_from_all_over_the_data(source):
    rows = source(buffer_rows=16)
    found = rows.sample(20)
    assert 20 <= len(found) <= 40
    assert torch.equal(found, rows.sample(20))
    assert len(rows.sample(1000)) == ROWS
    if not rows.spans[0].source.is_sequential:
        assert found[:, 0].max() - found[:, 0].min() > 50


def test_rows_are_recognised_by_their_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    digests = [stream(write_npy(tmp_path / name)).digest for name in "ab"]
    assert digests[0] == digests[1]  # another folder, another date
    write_npy(tmp_path / "b", sizes=(43, 60))
    assert stream(tmp_path / "b").digest != digests[0]
    assert stream(tmp_path / "a", buffer_rows=7).digest != digests[0]  # another order


# Faults.


def corrupt(path, at):
    data = bytearray(path.read_bytes())
    data[at : at + 40] = b"\xff" * 40
    path.write_bytes(data)


def test_a_damaged_row_group_is_named(tmp_path):
    path = write_parquet(tmp_path, sizes=(100,), group=50) / "part-0.parquet"
    group = parquet.ParquetFile(path).metadata.row_group(1)
    corrupt(path, group.column(0).data_page_offset)
    rows = stream(tmp_path, columns=["n", "m"], buffer_rows=10)
    batches = rows.batches(50)
    assert numbers([next(batches)]) == list(range(50))
    with pytest.raises(ValueError, match=r"part-0.parquet, row group 1 is damaged"):
        next(batches)
    with pytest.raises(ValueError, match=r"part-0.parquet, row group 1 is damaged"):
        list(rows.batches(50, epoch=1))  # read by the thread


def damage_end(path):
    path.write_bytes(path.read_bytes()[:-20])


def drop_column(path):
    parquet.write_table(parquet.read_table(path).drop_columns(["m"]), path)


def change_type(path):
    table = parquet.read_table(path)
    parquet.write_table(table.set_column(1, "m", table["m"].cast("float32")), path)


def write_texts(path):
    parquet.write_table(pa.table({"n": ["a"], "m": ["b"], "label": ["c"]}), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_end, r"part-2.parquet is damaged"),
        (lambda path: path.write_bytes(b""), r"part-2.parquet is damaged"),
        (drop_column, r"part-2.parquet: unknown column 'm'"),
        (change_type, r"part-2.parquet, row group 0 holds the columns n \(double\), m \(float\).* but .*part-0.parquet"),
        (write_texts, r"part-2.parquet: the column 'n' holds string, but a stream wants numbers"),
    ],
)
def test_a_parquet_file_unlike_the_others_is_named(spoil, message, tmp_path):
    spoil(write_parquet(tmp_path) / "part-2.parquet")
    with pytest.raises(ValueError, match=message):
        stream(tmp_path, columns=["n", "m"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_end, r"part-1.npy is cut short or damaged: its header says 43 rows of 12 bytes, but 496 bytes follow"),
        (lambda path: path.write_bytes(b"abc"), r"part-1.npy is damaged: it has no header"),
        (lambda path: np.save(path, np.zeros((4, 2), np.float32)), r"part-1.npy holds rows of float32 of shape \(2,\), but"),
        (lambda path: np.save(path, np.zeros((4, 3))), r"part-1.npy holds rows of float64 of shape \(3,\), but .*float32"),
        (lambda path: np.save(path, np.zeros((4, 3), np.float32).T.copy().T), r"part-1.npy is stored column by column"),
        (lambda path: np.save(path, np.array(["a"])), r"part-1.npy holds <U1 of shape \(1,\), but a stream wants rows of real"),
    ],
)
def test_a_npy_file_unlike_the_others_is_named(spoil, message, tmp_path):
    spoil(write_npy(tmp_path) / "part-1.npy")
    with pytest.raises(ValueError, match=message):
        stream(tmp_path)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_file_that_changes_or_disappears_while_it_is_read_is_named(kind, tmp_path):
    rows = SOURCES[kind](tmp_path, buffer_rows=10)
    path = sorted(tmp_path.glob(f"*.{kind}"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=rf"{path.name} has changed since the stream was opened"):
        list(rows.batches(10))
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match=rf"{path.name} has changed"):
        list(rows.batches(10, epoch=1))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path.name} has disappeared"):
        list(rows.batches(10, epoch=1))


def test_missing_integers_are_named(tmp_path):
    parquet.write_table(pa.table({"a": [1, None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet, row group 0: the column 'a' of int64 has 1 missing values"):
        list(stream(tmp_path).batches(2))


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("nowhere", {}, FileNotFoundError, "nowhere: there is no such file"),
        (".", {}, FileNotFoundError, r"holds no .parquet or .npy files"),
        (3, {}, TypeError, "found int"),
        ([torch.zeros(3).tolist()], {}, TypeError, "a list of paths"),
        (torch.zeros(3, 2), {}, TypeError, "found a Tensor: pass it to train"),
        (pd.DataFrame({"x": [1.0]}), {}, TypeError, "found a DataFrame: pass it to train"),
        ("x.csv", {}, ValueError, r"all .parquet or all .npy, but found .csv"),
        (iter([1]), {}, TypeError, "wants rows="),
        (np.zeros((0, 2)), {}, ValueError, "at least one row"),
        ((np.zeros(3), np.zeros(4)), {}, ValueError, "3 rows and 4 contexts"),
        (np.zeros((3, 2)), {"columns": ["a"]}, ValueError, "chosen by their numbers"),
        (np.zeros((3, 2)), {"buffer_rows": 0}, ValueError, "buffer_rows of 1 or more"),
        (lambda: iter(()), {"rows": 3, "columns": [0]}, ValueError, "leave columns and context out"),
    ],
)
def test_what_is_no_stream_is_refused(source, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.csv").write_text("1,2\n")
    with pytest.raises(error, match=message):
        stream(source, **options)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.zeros(2, 1)], "ended after 2 rows"),
        ([torch.zeros(4, 1)], "more rows than rows=3"),
        ([torch.tensor(0.0)], "batches of rows"),
        ([(torch.zeros(3, 1), torch.zeros(2))], "batches of rows"),
    ],
)
def test_an_iterable_with_other_rows_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        list(stream(lambda: iter(batches), rows=3).batches(3))
