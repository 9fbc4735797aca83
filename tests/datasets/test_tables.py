"""Rows of numbers are read from a file as they were written, or refused by name: never guessed at, never unpickled."""

import cProfile
import gzip
import importlib.util
import io
import os
import pickle
import random
import stat
import sys
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pyro_genmodels.datasets.tables import read_table
from pyro_genmodels.utils.errors import ArgumentError

X = np.random.default_rng(0).normal(size=(8, 3))
Y = np.arange(8) % 3


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def npy(x, **options):
    np.save(file := io.BytesIO(), x, **options)
    return file.getvalue()


def npz(save=np.savez, **arrays):
    save(file := io.BytesIO(), **arrays)
    return file.getvalue()


def parquet(frame, **options):
    pytest.importorskip("pyarrow")
    frame.to_parquet(file := io.BytesIO(), **options)
    return file.getvalue()


def refusal(path, **options):
    """The message of the refusal, in one short line that names the file."""
    with pytest.raises((ValueError, OSError)) as caught:
        read_table(path, **options)
    message = str(caught.value)
    assert type(caught.value) is not UnicodeDecodeError
    assert str(path) in message
    assert message.replace(str(path), "").isprintable()
    assert len(message.replace(str(path), "")) < 400
    return message


# arrays


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (1, 8, 8), (4, 2, 3, 2)])
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", ">i4", "int64", "uint64", "float16", "float32", ">f8", "longdouble"]
)
def test_arrays_of_numbers_are_read_as_written(shape, dtype, tmp_path):
    x = (10 * np.random.default_rng(0).random(shape)).astype(dtype)
    for content in (x, np.asfortranarray(x), x[::-1][::-1]):
        table = read_table(write(tmp_path / "x.NPY", npy(content)))
        np.testing.assert_array_equal(table.x, x)
        assert table.x.dtype == ("float64" if dtype == "longdouble" else x.dtype.newbyteorder("="))
        assert table.x.flags.c_contiguous
        assert table.x.flags.writeable
        assert (table.labels, table.columns) == (None, None)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format_is_read(version, tmp_path):
    np.lib.format.write_array(file := io.BytesIO(), X, version=version)
    np.testing.assert_array_equal(read_table(write(tmp_path / "x.npy", file.getvalue())).x, X)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("names", "options", "x", "labels"),
    [
        (["a"], {}, "a", None),
        (["a", "y"], {"labels": "y"}, "a", "y"),
        (["x", "b", "y"], {}, "x", None),
        (["x", "b", "y"], {"labels": "y"}, "x", "y"),
        (["x", "b", "y"], {"columns": "b"}, "b", None),
        (["x", "b", "y"], {"columns": ["b"], "labels": "y"}, "b", "y"),
        (["x", "b"], {"columns": "b", "labels": "x"}, "b", "x"),
    ],
)
def test_an_archives_arrays_are_chosen_by_name(save, names, options, x, labels, tmp_path):
    arrays = {name: np.arange(5) + 10 * i for i, name in enumerate(names)}
    table = read_table(write(tmp_path / "x.npz", npz(save, **arrays)), **options)
    np.testing.assert_array_equal(table.x, arrays[x])
    assert (table.labels is None) == (labels is None)
    assert labels is None or table.labels.tolist() == arrays[labels].tolist()


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a", "b"], {}, "not known which array is x.*a, b"),
        (["a", "b", "y"], {"labels": "y"}, "the arrays are a, b"),
        (["y"], {"labels": "y"}, "the arrays are none"),
        (["images", "b"], {"columns": "image"}, "unknown array 'image'.*Did you mean images"),
        (["a", "kind"], {"labels": "king"}, "not known which array"),
        (["x", "kind"], {"labels": "king"}, "unknown array 'king'.*Did you mean kind"),
        (["a", "b"], {"columns": ["a", "b"]}, "x is one array, but columns names 2"),
    ],
)
def test_an_archive_without_the_array_says_what_it_has(names, options, message, tmp_path):
    path = write(tmp_path / "x.npz", npz(**dict.fromkeys(names, Y)))
    with pytest.raises(ValueError, match=message):
        read_table(path, **options)


def test_an_array_has_no_columns_to_choose(tmp_path):
    path = write(tmp_path / "x.npy", npy(X))
    assert "use .npz" in refusal(path, columns="0")
    assert "use .npz" in refusal(path, labels="0")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.array([{}, 1], dtype=object), "Python objects, a pickle, which can run code and is never read"),
        (np.array([Bomb()], dtype=object), "never read"),
        (X + 0j, "holds complex128, not real numbers"),
        (np.array(["a"]), "holds <U1"),
        (np.array([b"a"]), r"holds \|S1"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "holds datetime64"),
        (np.zeros(3, dtype=[("a", float), ("b", int)]), "not real numbers"),
        (np.float64(3), r"an array of shape \(\) holds no rows of numbers"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros((3, 0)), r"shape \(3, 0\)"),
        (np.array([1, np.nan, 2, np.inf]), "2 of 4 rows hold missing or infinite values, first row 2"),
        (np.stack([np.eye(2), np.eye(2) / 0.5, np.full((2, 2), np.nan)]), "1 of 3 rows .* first row 3"),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else "",
)
def test_arrays_of_anything_else_are_refused(x, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (write(tmp_path / "x.npy", npy(x)), write(tmp_path / "x.npz", npz(x=x))):
        with pytest.raises(ValueError, match=message):
            read_table(path)
        refusal(path)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".parquet"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_in_disguise_is_not_opened(suffix, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(write(tmp_path / f"x{suffix}", pickle.dumps([Bomb()], protocol)))
    assert "this is a pickle, which can run code and is never read" in message or protocol < 2
    assert not Path("unpickled").exists()


def test_a_damaged_array_says_so(tmp_path):
    good = npy(X)
    for damaged in (good[:-1], good + b"\0", good + good, good[:100], good[:8], good.replace(b"<f8", b"<f4")):
        assert "damaged" in refusal(write(tmp_path / "x.npy", damaged))
    good = npz(x=X)
    for damaged in (good[:-1], good[:100], good[:4], good.replace(X.tobytes()[:8], b"12345678")):
        assert "damaged" in refusal(write(tmp_path / "x.npz", damaged))


@pytest.mark.parametrize("shape", [(10**12,), (10**6, 10**6), (10**30,), (3, -8), (-1,), (-8, -3), (8, 3, True, 2)])
def test_a_header_that_claims_more_than_there_is_takes_no_memory(shape, tmp_path):
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file := io.BytesIO(), header)
    content = file.getvalue() + X.tobytes()
    with zipfile.ZipFile(archive := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x.npy", content)
    paths = write(tmp_path / "x.npy", content), write(tmp_path / "x.npz", archive.getvalue())
    tracemalloc.start()
    try:
        assert all("damaged" in refusal(path) for path in paths)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# text


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2.5\n3,4\n",
        "a,b\r\n1,2.5\r\n3,4\r\n",
        "a,b\r1,2.5\r3,4",
        "\ufeffa,b\n1,2.5\n3,4",
        '"a","b"\n"1",2.5\n3,"4"\n',
        "a, b\n1, 2.5\n3 ,4\n",
        '\n\n a ,"b"\n\n1,2.5\n \n3,4\n\n\n',
        "a,b\n1e0,+2.5\n3.000,4.\n",
    ],
)
def test_text_is_read_as_written(text, tmp_path):
    table = read_table(write(tmp_path / "x.csv", text))
    assert table.columns == ("a", "b")
    np.testing.assert_array_equal(table.x, [[1, 2.5], [3, 4]])
    assert table.labels is None


def test_a_first_row_of_numbers_is_data(tmp_path):
    path = write(tmp_path / "x.csv", '1,2.5,-1e3\n"3",4,0\n')
    table = read_table(path)
    assert table.columns == ("0", "1", "2")
    np.testing.assert_array_equal(table.x, [[1, 2.5, -1000], [3, 4, 0]])
    assert read_table(path, columns=["1"]).x.tolist() == [[2.5], [4]]
    assert read_table(write(path, "7\n")).x.tolist() == [[7]]
    assert read_table(write(path, "a,1,2\n0,1,2\n")).columns == ("a", "1", "2")
    assert read_table(write(path, "1_0,1\n0,1\n")).columns == ("1_0", "1")


def test_columns_make_x_in_the_order_they_are_named(tmp_path):
    path = write(tmp_path / "x.csv", "a,b,name,k\n1,2,Ada,0\n3,4,Bob,2.0\n5,6,Eve,1\n")
    table = read_table(path, columns=["b", "a"], labels="k")
    assert table.columns == ("b", "a")
    assert table.x.tolist() == [[2, 1], [4, 3], [6, 5]]
    assert table.labels.tolist() == [0, 2, 1]
    assert table.labels.dtype == np.int64
    table = read_table(path, columns="k")
    assert (table.columns, table.x.tolist()) == (("k",), [[0], [2], [1]])
    table = read_table(write(path, "k,a\n0,1\n1,2\n"), labels="k")
    assert (table.columns, table.x.tolist()) == (("a",), [[1], [2]])


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("1\n2", "int64"), ("1\n2.0", "float64"), ("True\nFalse", "bool"), ("1e3\n1", "float64"), ("-1\n300", "int64")],
)
def test_whole_numbers_stay_whole(text, dtype, tmp_path):
    assert read_table(write(tmp_path / "x.csv", f"a\n{text}\n")).x.dtype == dtype


def test_numbers_make_the_round_trip(tmp_path):
    x = np.random.default_rng(0).normal(size=(1000, 4)) * 10.0 ** np.arange(-200, 200, 100)
    pd.DataFrame(x, columns=list("abcd")).to_csv(tmp_path / "x.csv", index=False)
    np.testing.assert_allclose(read_table(tmp_path / "x.csv").x, x, rtol=1e-15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        ("\ufeff", "the file is empty"),
        ("a,b\n", "there are 0 rows of 2 columns"),
        ("a,b\n1,2\n3\n", "line 3 has 1 fields, but line 1 has 2"),
        ("a,b\n1,2\n3,4\n5,6,7\n", "line 4 has 3 fields, but line 1 has 2"),
        ("1,2\n3\n", "line 2 has 1 fields, but line 1 has 2"),
        ("a,b\n1,2,\n", "line 2 has 3 fields"),
        ("\n\na,b\n\n1\n", "line 5 has 1 fields, but line 3 has 2"),
        ('a,b\n"1\n2",3,4\n', "line 3 has 3 fields"),
        ("a;b\n1;2\n", "its fields are separated by ';'. Save it with commas"),
        ("a;b\n1,5;2\n", "its fields are separated by ';'"),
        ("a\tb\n1\t2\n", r"its fields are separated by '\\t'"),
        ("a,b,a\n1,2,3\n", "several columns have the same name: a. Rename them"),
        ("a, a\n1,2\n", "several columns have the same name: a"),
        (",a\n0,1\n", r"a column has no name \(an index\?\).*choose columns among '', a"),
        ("a,b\n1,\n2,3\n", "1 of 2 rows hold missing or infinite values, first row 1, column b"),
        ("a,b\n1,2\n,\nNA,nan\n", "2 of 3 rows hold missing or infinite values, first row 2, column a"),
        ("a,b\n1,2\n3,inf\n", "first row 2, column b"),
        ("a,b\n1,2\n3,1e999\n", "first row 2, column b"),
        ("a,s,t\n1,Ada,x\n2,Bob,y\n", r"not numeric: s, t \(row 1 of s is 'Ada'\)\. .*those that are: a\."),
        ("a,b\n1,2\n2,3\n3,4x\n", r"not numeric: b \(row 3 of b is '4x'\)"),
        ("a,b\n1,\n2,?\n", r"row 2 of b is '\?'"),
        ('a,b\n1,"1,5"\n', "row 1 of b is '1,5'"),
        ("# comment\n1\n", None),
        ('a,b\n"1,2\n', "line 2 cannot be read .*quotation mark"),
        ('a,b\n"1"x,2\n', "line 2 cannot be read"),
        ("a,b\n1,\0\n", "not UTF-8 text: some of its bytes are zero"),
        ("größe\n1\n".encode("latin1"), "not UTF-8 text .* Save it as CSV in UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "not UTF-8 text"),
        ("x" * 200_000 + "\n1\n", "line 1 cannot be read"),
    ],
)
def test_text_that_is_no_table_says_where(text, message, tmp_path):
    path = write(tmp_path / "x.csv", text)
    if message is None:
        assert read_table(path).columns == ("# comment",)
        return
    with pytest.raises(ValueError, match=message):
        read_table(path)
    refusal(path)


def test_a_hundred_thousand_rows_are_read(tmp_path):
    x = np.arange(1_000_000).reshape(100_000, 10)
    pd.DataFrame(x, columns=list("abcdefghij")).to_csv(tmp_path / "x.csv", index=False)
    np.testing.assert_array_equal(read_table(tmp_path / "x.csv").x, x)


BAD_TEXT = {
    "a thousand with a comma": ('a,b\n1,"1,234"\n', r"row 1 of b is '1,234', whose numbers want a decimal point and no other"),
    "a thousand with a blank": ("a,b\n1,1 234\n", "row 1 of b is '1 234', whose numbers want"),
    "a thousand with a quote": ("a,b\n1,1'234.5\n", "whose numbers want"),
    "a decimal comma": ('a,b\n1,2\n2,"1,5"\n', "row 2 of b is '1,5', whose numbers want"),
    "a currency": ("a,b\n1,$5\n", r"row 1 of b is '\$5'\)"),
    "per cent": ("a,b\n1,5%\n", r"row 1 of b is '5%'\)"),
    "hexadecimal": ("a,b\n1,0x1F\n", "row 1 of b is '0x1F'"),
    "a date": ("a,b\n1,2020-01-02\n", "row 1 of b is '2020-01-02'"),
    "a boolean that is missing": ("a,b\n1,True\n2,\n", r"not numeric: b \(b holds True, False and missing values\)"),
    "yes and no": ("a,b\n1,yes\n2,no\n", "row 1 of b is 'yes'"),
    "a number and a boolean": ("a,b\n1,True\n2,3\n", "row 1 of b is 'True'"),
    "an integer beyond 64 bits": (
        "a,b\n1,123456789012345678901234567890\n",
        "a whole number beyond 64 bits; write it with a decimal point",
    ),
    "infinity": ("a,b\n1,Infinity\n", "first row 1, column b"),
    "minus infinity": ("a,b\n1,-inf\n", "first row 1, column b"),
    "names of blanks": ("a, \n1,2\n", "a column has no name"),
    "a name twice, but for blanks": ("a, a \n1,2\n", "several columns have the same name: a"),
    "a line for a spreadsheet": ("sep=;\na;b\n1;2\n", "its fields are separated by ';'"),
    "semicolons after a mark": ("\ufeffa;b\n1;2\n", "its fields are separated by ';'"),
    "tabulators and commas": ("a\tb\n1,5\t2,5\n", "its fields are separated by"),
    "a control character": ("a,b\n1,\x1b[31mred\n", r"row 1 of b is '\\x1b\[31mred'"),
    "a name of a control character": ("a,\x1b[2J\n1,x\n", r"not numeric: '\\x1b\[2J'"),
    "JSON": ('{"a": [1, 2]}\n', "there are 0 rows of 2 columns"),
    "a page": ("<html><body>\n<p>404</p>\n", "not numeric"),
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_bad_text_is_refused_in_clear_words(kind, tmp_path):
    text, message = BAD_TEXT[kind]
    path = write(tmp_path / "x.csv", text)
    with pytest.raises(ValueError, match=message):
        read_table(path)
    refusal(path)


@pytest.mark.parametrize("suffix", [".csv.gz", ".csv.bz2", ".npy.xz", ".zip", ".csv.zst"])
def test_a_compressed_file_is_to_be_unpacked(suffix, tmp_path):
    assert "It is compressed: unpack it first" in refusal(write(tmp_path / f"x{suffix}", b"1"))
    for name in ("x.csv", "x.npy", "x.parquet"):
        assert "compressed by gzip; unpack it first" in refusal(write(tmp_path / name, gzip.compress(b"a\n1\n")))


@pytest.mark.parametrize("suffix", [".xlsx", ".json", ".txt", ".tsv", ".h5", ""])
def test_a_format_that_is_not_read_says_which_are(suffix, tmp_path):
    assert ".npy, .npz, .csv, .parquet. Save the rows in one of these" in refusal(write(tmp_path / f"x{suffix}", b"1"))


def test_columns_of_different_kinds_become_numbers_that_hold_them_all(tmp_path):
    path = write(tmp_path / "x.csv", "a,b,c\n1,True,0.5\n2,False,1.5\n")
    assert read_table(path).x.tolist() == [[1, 1, 0.5], [2, 0, 1.5]]
    table = read_table(path, columns=["b", "a"])
    assert (table.x.tolist(), table.x.dtype) == ([[1, 1], [0, 2]], np.int64)
    if importlib.util.find_spec("pyarrow"):
        table = read_table(write(tmp_path / "x.parquet", parquet(pd.read_csv(path))), columns=["b", "a"])
        assert (table.x.tolist(), table.x.dtype) == ([[1, 1], [0, 2]], np.int64)


# sizes


@contextmanager
def little_memory(most=2**22):
    """Check that the block takes little memory, however much a file claims or holds."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".parquet"])
def test_a_large_file_is_refused_by_its_size_alone(suffix, tmp_path):
    starts = {".npy": b"\x93NUMPY", ".npz": b"PK\x03\x04", ".csv": b"a,b\n", ".parquet": b"PAR1"}
    path = write(tmp_path / f"x{suffix}", starts[suffix])
    os.truncate(path, 3_000_000_000)  # a hole: it takes no room on the disk
    with little_memory():
        message = refusal(path)
    assert "takes 3,000,000,000 bytes, but at most 1,000,000,000 are read. If you trust it, raise max_bytes" in message
    with pytest.raises(ArgumentError) as caught:
        read_table(path)
    assert (caught.value.argument, caught.value.example) == ("max_bytes", "3000000000")


def test_a_small_archive_that_unpacks_to_much_is_refused_before_it_is_unpacked(tmp_path):
    path = write(tmp_path / "x.npz", npz(np.savez_compressed, x=np.zeros((1000, 1000)), small=Y, k=np.zeros(1000, int)))
    assert path.stat().st_size < 20_000
    with little_memory():
        assert "the array x, once unpacked, takes 8,000,128 bytes, but at most 8,000,000 are read" in refusal(
            path, columns="x", max_bytes=8_000_000
        )
    assert read_table(path, columns="small", max_bytes=20_000).x.shape == (8,)
    assert read_table(path, columns="x", labels="k", max_bytes=8_000_128).x.shape == (1000, 1000)
    larger = write(tmp_path / "y.npz", npz(np.savez_compressed, x=X, k=np.zeros(10_000, int)))
    assert "the array k, once unpacked" in refusal(larger, labels="k", max_bytes=20_000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", npy(X))
    assert "packed in another way" in refusal(path)


def test_a_small_parquet_file_that_unpacks_to_much_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    frame = pd.DataFrame({"a": np.zeros(1_000_000), "b": np.zeros(1_000_000), "text": "a"})
    path = write(tmp_path / "x.parquet", parquet(frame))
    assert path.stat().st_size < 20_000
    assert len(read_table(path, columns="a", max_bytes=8_000_000).x) == 1_000_000
    import pyarrow.parquet

    class Metadata(pyarrow.parquet.ParquetFile):
        def read(self, *args, **kwargs):
            pytest.fail("it was read")

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", Metadata)
    assert "takes 16,000,000 bytes" in refusal(path, columns=["a", "b"], max_bytes=15_999_999)
    assert "takes 8,000,000 bytes" in refusal(path, columns="a", max_bytes=7_999_999)
    assert "not numeric: text (text holds" in refusal(path)
    assert "unknown column" in refusal(path, columns="c")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1," * 2**20, "more than 1,048,576 bytes in a line"),
        ("a\n" + "1" * 2**21 + "\n2\n", "more than 1,048,576 bytes in a line"),
        ("1\n" * 2_200_000, "more than 2,097,152 lines"),
        ("1\r" * 2_200_000, "more than 2,097,152 lines"),
        (" \n" * 2_200_000, "more than 2,097,152 lines"),
        ("\n" * 100_000, "more than 65,536 blank lines"),
        ("a\n" + "\n" * 100_000 + "1\n", "more than 65,536 blank lines"),
        ("\r" * 100_000, "more than 65,536 blank lines"),
        ("a,b\r\n" + "\r\n" * 100_000, "more than 65,536 blank lines"),
        ("a,b,c,d,e,f,g,h,i,j\n" + "0,0,0,0,0,0,0,0,0,0\n" * 900_000, "the table, 8 bytes a number, takes 72,000,000 bytes"),
    ],
    ids=["line", "field", "lines", "old lines", "blanks", "blank", "blank inside", "old blank", "blank of two", "numbers"],
)
def test_text_without_end_is_refused_by_count(text, message, tmp_path):
    path = write(tmp_path / "x.csv", text)
    assert message in refusal(path, max_bytes=2**26)


def test_the_limits_of_text_grow_with_the_limit_of_bytes(tmp_path):
    path = write(tmp_path / "x.csv", "a\n" + "\n" * 1000 + "1\n" * 100)
    assert "blank lines" in refusal(path, max_bytes=500_000)
    assert read_table(path, max_bytes=2**23).x.shape == (100, 1)
    width = 30_000
    wide = write(tmp_path / "y.csv", ",".join(["123"] * width) + "\n" + "1" * 10**5 + ",2" * (width - 1))
    assert "bytes in a line" in refusal(wide, max_bytes=2**20)
    assert read_table(wide, max_bytes=2**24, columns=["1", "2"]).x.tolist() == [[123, 123], [2, 2]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_wide_tables_take_few_calls_for_each_column(suffix, tmp_path):
    """Calls of Python functions, which do not depend on the machine: hardly more than pandas makes."""

    def calls(function, *args, **kwargs):
        profile = cProfile.Profile()
        profile.runcall(function, *args, **kwargs)
        return sum(entry.callcount for entry in profile.getstats())

    counts, width = [], 1000
    for columns in (width, 2 * width):
        frame = pd.DataFrame(np.ones((4, columns)) / 3, columns=[f"c{i}" for i in range(columns)])
        path = tmp_path / f"x{suffix}"
        frame.to_csv(path, index=False) if suffix == ".csv" else write(path, parquet(frame))
        alone = calls(pd.read_csv if suffix == ".csv" else pd.read_parquet, path)
        counts.append([calls(read_table, path), calls(read_table, path, columns=list(frame.columns)[:-1]), alone])
    more = [(b - a) / width for a, b in zip(*counts, strict=True)]  # of one more column
    assert max(more[:2]) < more[2] + 30, more


# parquet


@pytest.mark.parametrize("compression", ["snappy", "gzip", None])
def test_parquet_is_read_as_written(compression, tmp_path):
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1].astype("f4"), "name": "Ada", "k": Y.astype("i2")})
    path = write(tmp_path / "x.parquet", parquet(frame, compression=compression))
    table = read_table(path, columns=["b", "a"], labels="k")
    np.testing.assert_array_equal(table.x, frame[["b", "a"]].to_numpy())
    assert (table.columns, table.labels.tolist()) == (("b", "a"), Y.tolist())
    assert "not numeric: name" in refusal(path)
    assert "Did you mean name" in refusal(path, columns=["nam"])


@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool", "Int64", "boolean", "Float32", "float32"])
def test_parquet_keeps_its_types(dtype, tmp_path):
    frame = pd.DataFrame({"a": pd.array([1, 0], dtype=dtype), "b": pd.array([0, 1], dtype=dtype)})
    path = write(tmp_path / "x.parquet", parquet(frame))
    table = read_table(path)
    assert table.x.dtype == dtype.lower().replace("boolean", "bool")
    assert table.x.tolist() == [[1, 0], [0, 1]]
    if dtype[0].isupper() or dtype == "boolean":
        frame.loc[1, "b"] = None
        assert "first row 2, column b" in refusal(write(path, parquet(frame)))


def test_parquet_that_is_no_table_of_numbers_is_refused(tmp_path):
    good = parquet(pd.DataFrame({"a": X[:, 0]}))
    path = tmp_path / "x.parquet"
    assert "damaged" in refusal(write(path, good[:-20]))
    assert "damaged" in refusal(write(path, good[:50]))
    assert "0 rows" in refusal(write(path, parquet(pd.DataFrame({"a": X[:0, 0]}))))
    assert "0 columns" in refusal(write(path, parquet(pd.DataFrame(index=range(3)))))
    for bad in (pd.to_datetime(["2020", "2021"]), ["x", "y"], [[1], [2]], pd.to_timedelta([1, 2])):
        assert "not numeric: a" in refusal(write(path, parquet(pd.DataFrame({"a": bad}))))


def test_parquet_without_pyarrow_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install .*\[parquet\]"):
        read_table(write(tmp_path / "x.parquet", b"PAR1"))


# labels and columns of every format


def tables(x, y, tmp_path):
    """The same rows in every format that has labels."""
    frame = pd.DataFrame(x, columns=["a", "b"]).assign(k=y)
    yield write(tmp_path / "x.npz", npz(x=x, k=np.asarray(y)))
    yield write(tmp_path / "x.csv", frame.to_csv(index=False))
    try:
        yield write(tmp_path / "x.parquet", parquet(frame))
    except pytest.skip.Exception:
        return


@pytest.mark.parametrize("y", [[0, 1, 2, 1], [0.0, 1.0, 2.0, 1.0], [5, 0, 0, 0], [True, False, True, True]])
def test_labels_are_whole_numbers_from_zero(y, tmp_path):
    for path in tables(X[:4, :2], y, tmp_path):
        table = read_table(path, labels="k")
        assert table.labels.dtype == np.int64
        assert table.labels.tolist() == [int(v) for v in y]
        np.testing.assert_allclose(table.x, X[:4, :2], rtol=1e-15)


@pytest.mark.parametrize(
    ("y", "found"),
    [
        ([0, 1, -1, 2], "row 3 is -1"),
        ([0, 0.5, 1, 2], "row 2 is 0.5"),
        ([np.nan, 0, 1, 2], "row 1 is nan"),
        ([0, 0, 0, np.inf], "row 4 is inf"),
        ([1e300, 0, 0, 1], r"row 1 is 1e\+300"),
        ([0, 0, 2**40, 1], f"row 3 is {2**40}"),
    ],
)
def test_other_labels_are_refused(y, found, tmp_path):
    for path in tables(X[:4, :2], y, tmp_path):
        with pytest.raises(ValueError, match=f"labels should be 0, 1, 2, .*{found}"):
            read_table(path, labels="k")


def test_labels_that_are_words_or_do_not_match_are_refused(tmp_path):
    path = write(tmp_path / "x.csv", "a,kind\n1,setosa\n2,virginica\n")
    assert "row 1 of kind is 'setosa'). Number the classes from 0." in refusal(path, labels="kind")
    for y in (Y[:5], Y[:, None], np.int64(1)):
        assert "labels have the shape" in refusal(write(tmp_path / "x.npz", npz(x=X, y=y)), labels="y")


def test_columns_that_cannot_be_meant_are_refused(tmp_path):
    for path in tables(X[:4, :2], [0, 1, 2, 0], tmp_path):
        for columns in ([], ["a", "a"], ["a", "k"]):
            assert "columns wants different names" in refusal(path, columns=columns, labels="k")
    path = write(tmp_path / "x.csv", "height,width,k\n1,2,0\n")
    assert "unknown column 'hieght': choose from height, width, k. Did you mean height?" in refusal(path, columns=["hieght"])
    assert "Did you mean k?" in refusal(path, labels="K")
    assert "1 rows of 0 columns" in refusal(write(path, "k\n1\n"), labels="k")


# files


def test_a_missing_file_a_folder_and_an_unknown_suffix_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv: there is no such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name in (".", "folder.csv", "pipe.csv"):
        with pytest.raises(OSError, match="it is a folder or a device, not a file"):
            read_table(tmp_path / name)
    for name in ("x.txt", "x", "x.csv.gz"):
        assert "is not one of .npy, .npz, .csv, .parquet." in refusal(write(tmp_path / name, "1"))
    assert "the file is empty" in refusal(write(tmp_path / "x.npy", ""))


def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = write(tmp_path / "x.csv", "1\n")
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=r"x\.csv cannot be read: Permission denied"):
            read_table(path)
    finally:
        if root:
            os.seteuid(0)
        path.chmod(stat.S_IRUSR)


def test_a_file_under_another_name_is_told_what_it_is(tmp_path):
    contents = {".npy": npy(X), ".npz": npz(x=X), ".parquet": b"PAR1" + bytes(10), ".csv": b"a,b\n1,2\n"}
    for kind, content in contents.items():
        for suffix in contents:
            if suffix != kind:
                message = refusal(write(tmp_path / f"x{suffix}", content))
                assert f"its first bytes are not those of {suffix}" in message
                assert f"it is {kind}" in message or kind == ".csv"


def seeds(suffix):
    """Small files that are read."""
    frame = pd.DataFrame(X, columns=list("abc")).assign(k=Y)
    return {
        ".npy": lambda: [npy(X), npy(X.astype("f2")), npy(Y.astype(bool))],
        ".npz": lambda: [npz(x=X, k=Y), npz(np.savez_compressed, x=X, k=Y)],
        ".csv": lambda: [frame.to_csv(index=False).encode(), b'"a",k\n"1",0\n2.5,"1"\n', b"1,2\n3,4\n"],
        ".parquet": lambda: [parquet(frame, compression=c) for c in ("snappy", "gzip", "zstd", None)],
    }[suffix]()


def mutate(raw, other, rng):
    """Bytes flipped, cut off, put in, left out, or taken from another file."""
    raw = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5])):
        i, j, k = rng.randrange(len(raw) + 1), *sorted(rng.choices(range(len(other) + 1), k=2))
        match rng.randrange(6):
            case 0:
                raw[i : i + 1] = rng.randbytes(1)
            case 1:
                raw[i : i + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in raw[i : i + 1])
            case 2:
                del raw[i:]
            case 3:
                raw[i:i] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                raw[i:i] = other[j:k]
            case 5:
                del raw[i : i + rng.randrange(1, 9)]
    return bytes(raw)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".parquet"])
def test_of_500_damaged_files_each_is_read_or_refused_by_name(suffix, tmp_path):
    rng, good, path = random.Random(suffix), seeds(suffix), tmp_path / f"x{suffix}"
    labels = None if suffix == ".npy" else "k"
    others = [npy(X), npz(x=X), b"a,b\n1,2\n", *good]
    refusals = []
    for content in good:
        read_table(write(path, content))
    for _ in range(500):
        write(path, mutate(rng.choice(good), rng.choice(others), rng))
        tracemalloc.start()
        try:
            table = read_table(path, labels=rng.choice([None, labels]))
            assert np.isfinite(table.x).all()
            assert table.x.size
        except (ValueError, OSError) as error:
            refusals.append(str(error))
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2**23
    assert 250 < len(refusals) < 500
    for message in refusals:
        assert str(path) in message
        assert len(message.replace(str(path), "")) < 400
        assert "\n" not in message
    if suffix == ".parquet":
        assert pytest.importorskip("pyarrow").default_memory_pool().max_memory() < 2**26
