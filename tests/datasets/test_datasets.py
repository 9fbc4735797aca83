"""The named data sets follow the laws they name and files are split by a seed; and what is drawn of them is a picture."""

import sys
import warnings
from math import log, pi

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import binom, ks_2samp, kstest, norm, rice
from sklearn.datasets import load_digits, make_moons

from pyro_genmodels.datasets import DATASETS, checkerboard, digits, load, load_rows
from pyro_genmodels.evaluation import plots
from pyro_genmodels.utils.errors import ArgumentError

SIZES = [1437, 180, 180]
PLANE = {"moons": 2, "ring": 8, "grid": 25, "pinwheel": 5, "checkerboard": 8}
PARTS = {"train": 10_000, "valid": 2_000, "test": 10_000}
ALARM = 1e-7  # of each comparison; no test makes more than 100


@pytest.mark.parametrize("seed", [0, 7])
def test_digits_are_split_by_the_permutation_of_the_seed(seed):
    bunch, order = load_digits(), np.random.default_rng(seed).permutation(1797)
    images, labels = (torch.as_tensor(a[order]).long().split(SIZES) for a in (bunch.images, bunch.target))
    data = digits(seed)
    for part, x, y in zip(("train", "valid", "test"), images, labels, strict=True):
        assert torch.equal(getattr(data, part), x)
        assert torch.equal(getattr(data, f"{part}_labels"), y)


def test_no_digit_is_in_two_parts():
    order = np.random.default_rng(0).permutation(1797)
    parts = [set(part) for part in np.split(order, np.cumsum(SIZES)[:-1])]
    assert [len(part) for part in parts] == SIZES
    assert len(set.union(*parts)) == 1797


def test_digits_have_17_levels_and_ten_labels():
    data = digits()
    x = torch.cat([data.train, data.valid, data.test])
    labels = torch.cat([data.train_labels, data.valid_labels, data.test_labels])
    assert x.shape == (1797, 8, 8)
    assert x.dtype == labels.dtype == torch.int64
    assert (data.name, data.levels, data.num_classes) == ("digits", 17, 10)
    assert (data.columns, data.density) == (None, None)
    assert x.unique().tolist() == list(range(17))
    assert labels.unique().tolist() == list(range(10))


def test_another_seed_splits_otherwise():
    assert not torch.equal(digits(0).test, digits(1).test)


def test_a_data_set_is_known_by_its_own_name():
    assert list(DATASETS) == ["digits", "moons", "ring", "grid", "pinwheel", "checkerboard"]
    assert all(load(name).name == name for name in DATASETS)


def test_digits_without_scikit_learn_name_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-genmodels\[eval\]'"):
        digits()


# laws in the plane


def pooled(name):
    """All rows of all parts, with their labels."""
    data = load(name, seed=5)
    return torch.cat([data.train, data.valid, data.test]), torch.cat([data.train_labels, data.valid_labels, data.test_labels])


@pytest.mark.parametrize("name", PLANE)
def test_the_parts_have_their_sizes_and_types(name):
    data = load(name)
    for part, n in PARTS.items():
        x, y = getattr(data, part), getattr(data, f"{part}_labels")
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((n, 2), torch.float32, (n,), torch.int64)
        assert x.isfinite().all()
        assert y.unique().tolist() == list(range(PLANE[name]))
    assert (data.levels, data.num_classes, data.columns) == (None, PLANE[name], None)
    assert (data.density is None) == (name in ("moons", "pinwheel"))


@pytest.mark.parametrize("name", PLANE)
def test_draws_depend_on_the_seed_alone(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    data = load(name, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_default_dtype(torch.float64)
    try:
        torch.randn(7)
        with torch.device("meta"):
            again = load(name, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    other = load(name, seed=4)
    for part in PARTS:
        assert torch.equal(getattr(data, part), getattr(again, part))
        assert torch.equal(getattr(data, f"{part}_labels"), getattr(again, f"{part}_labels"))
        assert not (getattr(data, part) == getattr(other, part)).all(1).any()
    if data.density is not None:
        assert torch.equal(data.density.log_prob(data.valid), again.density.log_prob(again.valid))


@pytest.mark.parametrize("name", PLANE)
def test_the_parts_differ_and_none_is_drawn_by_the_numbers_of_training(name):
    data = load(name, seed=0)
    for a, b in ((data.train, data.valid), (data.train, data.test), (data.test, data.valid)):
        assert not (a[:2000] == b[:2000]).all(1).any()
    noise = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    assert abs(np.corrcoef(noise[:, 0], data.train[:, 0])[0, 1]) < norm.isf(ALARM / 2) / 100
    if name == "ring":
        others = [load(other, seed=0) for other in ("ring", "grid")]
        residuals = [(d.train - d.density.component_distribution.mean[d.train_labels]).flatten() for d in others]
        assert abs(np.corrcoef(*residuals)[0, 1]) < norm.isf(ALARM / 2) / 20_000**0.5


@pytest.mark.parametrize("name", PLANE)
def test_components_are_equally_likely(name):
    data = load(name, seed=1)
    for part, n in PARTS.items():
        counts, law = getattr(data, f"{part}_labels").bincount().numpy(), binom(n, 1 / PLANE[name])
        assert min(law.cdf(counts).min(), law.sf(counts - 1).min()) > ALARM / 2


CENTRES = {
    "ring": ([(np.cos(2 * pi * k / 8), np.sin(2 * pi * k / 8)) for k in range(8)], 0.01),
    "grid": ([(a, b) for a in (-4, -2, 0, 2, 4) for b in (-4, -2, 0, 2, 4)], 0.05),
}


@pytest.mark.parametrize("name", CENTRES)
def test_gaussians_have_their_centres_and_spread(name):
    centres, scale = np.array(CENTRES[name][0]), CENTRES[name][1]
    x, k = (t.numpy() for t in pooled(name))
    z = (x - centres[k]) / scale
    assert abs(np.corrcoef(z.T)[0, 1]) < norm.isf(ALARM / 2) / len(z) ** 0.5
    for i in range(len(centres)):
        assert kstest(z[k == i].ravel(), "norm").pvalue > ALARM


@pytest.mark.parametrize("name", CENTRES)
def test_the_density_of_gaussians_is_the_mixtures(name):
    centres, scale = np.array(CENTRES[name][0]), CENTRES[name][1]
    data = load(name)
    x = np.concatenate([data.test[:500].numpy(), 0.7 * data.test[:500].numpy()]).astype(np.float64)
    exact = logsumexp(norm(centres, scale).logpdf(x[:, None]).sum(-1), axis=1) - log(len(centres))
    found = data.density.log_prob(torch.as_tensor(x, dtype=torch.float32))
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=2e-3)
    # the components hardly overlap: -E log p = log K + log(2 pi e scale^2), and log p is a constant less Exp(1)
    entropy = log(len(centres)) + log(2 * pi * scale**2) + 1
    assert abs(data.density.log_prob(data.test).mean() + entropy) < norm.isf(ALARM / 2) / 100


@pytest.mark.parametrize("name", ["ring", "grid", "checkerboard"])
def test_the_density_integrates_to_one(name):
    low, high, n = (-1.1, 1.1, 1100) if name == "ring" else (-4.5, 4.5, 900)
    step = (high - low) / n
    line = low + step * (torch.arange(n) + 0.5)  # the middle of every cell
    density = load(name).density.log_prob(torch.cartesian_prod(line, line)).double().exp()
    assert float(density.sum() * step**2) == pytest.approx(1, abs=1e-4)


def test_the_checkerboard_is_uniform_on_its_dark_squares():
    x, k = (t.numpy() for t in pooled("checkerboard"))
    square = np.floor((x + 4) / 2).astype(int)
    assert (square.min(), square.max()) == (0, 3)
    assert (square.sum(1) % 2 == 0).all()
    order = sorted({tuple(map(int, s)) for s in square})
    assert order == [(0, 0), (0, 2), (1, 1), (1, 3), (2, 0), (2, 2), (3, 1), (3, 3)]
    np.testing.assert_array_equal(np.array(order)[k], square)
    inside = (x + 4) / 2 - square
    for i in range(8):
        assert kstest(inside[k == i].ravel(), "uniform").pvalue > ALARM


def test_the_density_of_the_checkerboard_is_flat_inside_and_none_outside():
    density = checkerboard().density
    for part in PARTS:
        np.testing.assert_allclose(density.log_prob(getattr(checkerboard(), part)), -log(32), rtol=1e-6)
    outside = torch.tensor([[-3.0, -1.0], [9.0, 0.0], [-4.1, -3.0], [1e30, 1e30]])
    assert density.log_prob(outside).tolist() == [-torch.inf] * 4
    assert density.log_prob(density.sample((1000,))).isfinite().all()


def test_moons_follow_scikit_learns_law():
    x, k = (t.numpy() for t in pooled("moons"))
    theirs, label = make_moons(20_000, noise=0.1, random_state=0)
    for i, centre in enumerate([(0.0, 0.0), (1.0, 0.5)]):
        mine = x[k == i] - centre
        # at the distance 1 from the centre, give or take noise: the radius is Rice's
        assert kstest(np.linalg.norm(mine, axis=1), rice(1 / 0.1, scale=0.1).cdf).pvalue > ALARM
        for axis in (0, 1):
            assert ks_2samp(x[k == i, axis], theirs[label == i, axis]).pvalue > ALARM
        # a half circle: the mean height is 2 / pi above or below, of which no draw is more than about 1 away
        assert abs(mine[:, 1].mean() - (2 / pi, -2 / pi)[i]) < norm.isf(ALARM / 2) * mine[:, 1].std() / len(mine) ** 0.5


def test_the_pinwheel_follows_the_papers_law():
    rng, n = np.random.default_rng(0), 20_000
    x, k = (t.numpy() for t in pooled("pinwheel"))
    for arm in range(5):
        features = rng.normal(size=(n, 2)) * [0.3, 0.1] + [1, 0]
        angles = 2 * pi * arm / 5 + 0.25 * np.exp(features[:, 0])
        turns = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
        theirs, mine = 2 * np.einsum("ti,ijt->tj", features, turns), x[k == arm]
        for statistic in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x @ [1, 2], lambda x: np.linalg.norm(x, axis=1)):
            assert ks_2samp(statistic(mine), statistic(theirs)).pvalue > ALARM


@pytest.mark.parametrize("name", PLANE)
def test_a_label_tells_where_its_rows_lie(name):
    """The two halves of the rows of a label agree, and those of two labels do not."""
    x, k = pooled(name)
    means = torch.stack([x[k == i].mean(0) for i in range(PLANE[name])])
    apart = torch.pdist(means).min()
    assert apart > 0.5
    assert (torch.stack([x[k == i][::2].mean(0) for i in range(PLANE[name])]) - means).norm(dim=1).max() < apart / 4


# files


def save(path, **arrays):
    """A .npz of the arrays, or a .npy of the only one."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        np.save(path, *arrays.values())
    return path


@pytest.mark.parametrize(("n", "sizes"), [(10, (8, 1, 1)), (19, (17, 1, 1)), (20, (16, 2, 2)), (1797, (1439, 179, 179))])
def test_a_file_is_split_by_the_permutation_of_the_seed(n, sizes, tmp_path):
    x, y = np.random.default_rng(0).normal(size=(n, 3)), np.arange(n) % 4
    data = load(save(tmp_path / "x.npz", x=x, y=y), seed=7, labels="y")
    order = np.random.default_rng(7).permutation(n)
    parts = [getattr(data, part) for part in PARTS]
    assert tuple(map(len, parts)) == sizes
    np.testing.assert_array_equal(torch.cat(parts), x[order].astype(np.float32))
    assert torch.cat([getattr(data, f"{part}_labels") for part in PARTS]).tolist() == y[order].tolist()
    assert (data.name, data.num_classes, data.levels, data.density) == ("x.npz", 4, None, None)
    assert data.train_labels.dtype == torch.int64
    assert torch.equal(load(str(tmp_path / "x.npz"), seed=7).train, data.train)
    assert not torch.equal(load(tmp_path / "x.npz", seed=8).train, data.train)
    assert load(tmp_path / "x.npz").test_labels is None


def test_the_columns_of_a_file_are_kept(tmp_path):
    (tmp_path / "x.csv").write_text("a,name,b,k\n" + "".join(f"{i}.5,Ada,{i},{i % 2}\n" for i in range(10)))
    data = load(tmp_path / "x.csv", columns=["b", "a"], labels="k")
    assert (data.columns, data.num_classes, data.name) == (("b", "a"), 2, "x.csv")
    assert data.train.shape == (8, 2)
    assert load(tmp_path / "x.csv", columns="b").levels == 10
    assert load(tmp_path / "x.csv", columns="b", levels=0).train.dtype == torch.float32


LINE = np.arange(20)


@pytest.mark.parametrize(
    ("x", "levels", "wanted"),
    [
        (LINE / 1.0, None, None),
        (LINE / 2.0, None, None),
        (LINE.astype("f2"), None, None),
        (LINE / 1.0, 20, 20),
        (LINE / 1.0, 99, 99),
        (LINE, None, 20),
        (LINE.reshape(10, 2, 1), None, 20),
        (LINE.astype(np.int8), None, 20),
        (LINE.astype(">u2"), None, 20),
        (LINE.astype(np.uint64), None, 20),
        (LINE + 236, None, 256),
        (0 * LINE, None, 2),
        (LINE, 0, None),
        (LINE, 21, 21),
        (LINE * 1000, 20_000, 20_000),
        (LINE - 5, 0, None),
        (LINE.astype(np.uint8), None, 256),
        (LINE.astype(np.uint8), 20, 20),
        (LINE.astype(np.uint8), 0, None),
        (LINE > 3, None, 2),
        (LINE > 3, 2, 2),
        (LINE > 3, 0, None),
    ],
)
def test_integers_are_levels_and_floats_are_real_numbers(x, levels, wanted, tmp_path):
    path = save(tmp_path / "x.npy", x=x)
    data = load(path, levels=levels)
    dtype = torch.float32 if wanted is None else torch.int64
    assert (data.levels, data.train.dtype) == (wanted, dtype)
    assert data.train.shape[1:] == x.shape[1:]
    whole, none = load_rows(path, levels=data.levels)
    assert none is None
    assert whole.dtype == dtype
    np.testing.assert_array_equal(whole, x.astype(np.float32 if wanted is None else np.int64))
    assert sorted(torch.cat([data.train, data.valid, data.test]).flatten().tolist()) == sorted(whole.flatten().tolist())


@pytest.mark.parametrize(
    ("x", "levels", "message"),
    [
        (LINE - 1, None, r"integers from -1 to 18, but levels run from 0 to 255\. Give the number of levels, or 0"),
        (LINE + 237, None, "integers from 237 to 256"),
        (LINE, 19, "19 levels are whole numbers from 0 to 18, but row 20 holds 19"),
        (LINE - 1, 20, "but row 1 holds -1"),
        (LINE / 2, 20, "whole numbers from 0 to 19, but row 2 holds 0.5"),
        (np.stack([LINE, LINE[::-1]], axis=1), 19, "row 1 holds 19"),
        (LINE * 1e38, None, r"float32 holds numbers up to 3.4e38, but row 5 holds 4e\+38"),
        (LINE, 1, "levels wants 2 or more, or 0 for real numbers, but found 1"),
        (LINE, -2, "but found -2"),
        (LINE[:9], None, "x.npy: found 9 rows, but the split 8 : 1 : 1 needs at least 10"),
    ],
)
def test_other_values_are_refused(x, levels, message, tmp_path):
    path = save(tmp_path / "x.npy", x=x)
    with pytest.raises(ValueError, match=message):
        load(path, levels=levels)


@pytest.mark.parametrize(("x", "levels"), [(LINE, 19), (LINE - 1, 20), (LINE / 2, 20), (LINE * 1e38, None), (LINE, 1)])
def test_rows_that_do_not_fit_a_model_are_refused(x, levels, tmp_path):
    with pytest.raises(ValueError, match=r"but row|but found"):
        load_rows(save(tmp_path / "x.npy", x=x), levels=levels)


def test_rows_are_all_of_a_file_as_they_stand(tmp_path):
    path = save(tmp_path / "x.npz", a=LINE[:3], b=LINE[:3] / 2, k=LINE[:3])
    x, labels = load_rows(str(path), columns="b", labels="k")
    assert (x.tolist(), x.dtype, labels.tolist(), labels.dtype) == ([0, 0.5, 1], torch.float32, [0, 1, 2], torch.int64)
    x, labels = load_rows(path, columns="a", levels=256)
    assert (x.tolist(), x.dtype, labels) == ([0, 1, 2], torch.int64, None)


def test_labels_beyond_the_number_of_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.npz: the labels run to 20, but there are 20 rows"):
        load(save(tmp_path / "x.npz", x=LINE, y=np.where(LINE > 0, LINE + 1, 0)), labels="y")


def test_a_column_of_numbers_is_not_taken_for_labels(tmp_path):
    path = save(tmp_path / "x.npz", x=LINE, date=1_700_000_000 + 86_400 * np.arange(len(LINE)))
    with pytest.raises(ValueError, match="date is no column of classes: 20 rows hold 20 different values, up to 1701641600"):
        load(path, labels="date")


def test_labels_of_one_class_are_warned_of(tmp_path):
    path = save(tmp_path / "x.npz", x=LINE, y=np.zeros(len(LINE), int))
    with pytest.warns(UserWarning, match="all rows have the same label, 0, which tells a model nothing"):
        load(path, labels="y")


def test_levels_of_0_say_nothing_of_the_columns_that_did_not_need_them(tmp_path):
    """Integers beyond 255 are read by levels=0 only. It hid that another column holds two classes."""
    wide = 1_700_000_000 + 86_400 * RNG.permutation(200)
    pd.DataFrame({"date": wide, "flag": np.arange(200) % 2}).to_csv(tmp_path / "x.csv", index=False)
    with pytest.warns(UserWarning, match=r"flag \(2 values\).* as levels\.$") as caught:
        load(tmp_path / "x.csv", levels=0)
    assert "date" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "x.csv", columns="flag", levels=0)  # by choice
        load(tmp_path / "x.csv", columns="date", levels=0)


def test_labels_that_do_not_count_from_0_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.npz: the labels run from 1 to 3, .* Subtract 1"):
        load(save(tmp_path / "x.npz", x=LINE, y=LINE % 3 + 1), labels="y")


def test_a_column_of_one_value_is_refused_for_real_numbers(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n" + "".join(f"{i}.5,2.5\n" for i in range(20)))
    with pytest.raises(ValueError, match=r"x\.csv: .* the same value in all rows: b\."):
        load(tmp_path / "x.csv")
    assert load(tmp_path / "x.csv", columns="a").train.shape == (16, 1)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("mons", ValueError, "unknown data set 'mons': choose from digits, .*Did you mean moons?"),
        ("Ring", ValueError, "Did you mean ring?"),
        ("", OSError, "folder"),
        ("none.csv", FileNotFoundError, "none.csv: there is no such file"),
        ("none.txt", ValueError, "none.txt: its suffix '.txt' is not one of .npy"),
        (".", OSError, "folder"),
    ],
)
def test_an_unknown_source_is_named(source, error, message):
    with pytest.raises(error, match=message):
        load(source)


@pytest.mark.parametrize("option", [{"columns": ["a"]}, {"levels": 2}, {"labels": "k"}])
def test_a_named_data_set_has_its_own_columns_labels_and_levels(option):
    with pytest.raises(ValueError, match=r"'ring' has its own columns, labels and levels\. Leave these arguments out"):
        load("ring", **option)


# pictures


@pytest.mark.parametrize("n", [1, 10, 23])
def test_image_grids_hold_every_image_once(n, tmp_path):
    panels = {"data": torch.rand(n, 8, 8) + 1, "draws": torch.rand(4, 5, 6)}
    figure = plots.image_grids(panels, columns=10)
    assert [ax.get_title() for ax in figure.axes] == list(panels)
    for ax, images in zip(figure.axes, panels.values(), strict=True):
        shown, (n, height, width) = ax.images[0].get_array(), images.shape
        assert shown.shape == ((height + 2) * -(-n // 10), 10 * (width + 2))
        for i in range(n):
            top, left = (height + 2) * (i // 10) + 1, (width + 2) * (i % 10) + 1
            np.testing.assert_array_equal(shown[top : top + height, left : left + width], images[i])
    figure.savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0


@pytest.mark.parametrize("images", [torch.zeros(4, 8, 8), torch.randint(0, 17, (4, 5, 9))], ids=["constant", "integers"])
def test_image_grids_take_constant_and_integer_images(images, tmp_path):
    plots.image_grids({"images": images}, columns=2).savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0


def _history(*valid):
    return [{"epoch": i, "train": v - 1.0, "valid": v, "seconds": float(i)} for i, v in enumerate(valid, 1)]


def _without_valid(history):
    return [{k: v for k, v in record.items() if k != "valid"} for record in history]


@pytest.mark.parametrize(
    "histories",
    [
        {"a": _history(5.0, 3.0, 2.0), "b": _history(4.0, 3.5)},
        {"one epoch": _history(5.0)},
        {"no held-out data": _without_valid(_history(5.0, 4.0))},
        {"negative": _history(-1.0, -4.0)},
        {"getting worse": _history(1.0, 9.0)},
        {"around zero": _history(1.5, 1.0)},
    ],
    ids=lambda histories: next(iter(histories)),
)
def test_loss_curves_are_drawn_and_named(histories, tmp_path):
    figure = plots.loss_curves(histories)
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(histories)
    low, high = ax.get_ylim()
    assert low < min(record["train"] for history in histories.values() for record in history) < high
    figure.savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0


# what real numbers are


RNG = np.random.default_rng(0)
REALS = RNG.normal(size=200)


@pytest.mark.parametrize(
    ("column", "found"),
    [
        (np.arange(200) % 3, "a (3 values)"),
        (np.arange(200) % 2 == 0, "a (2 values)"),
        (np.arange(200) % 3 / 2, "a (3 values)"),
        (RNG.integers(20, 70, 200), None),
        (np.round(REALS), None),
        (RNG.integers(0, 10**6, 200), ""),
        (np.round(REALS, 2), ""),
        (np.where(REALS > 0, REALS, 0), None),
        (np.where(REALS > 2.5, REALS, -REALS), ""),
    ],
    ids=["classes", "booleans", "three floats", "ages", "rounded", "large integers", "hundredths", "an atom", "reals"],
)
def test_columns_that_are_hardly_real_are_named(column, found, tmp_path):
    path = tmp_path / "x.csv"
    pd.DataFrame({"a": column, "b": REALS}).to_csv(path, index=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load(path)
    assert data.levels is None
    if found == "":
        assert not caught
        return
    [warning] = caught
    text = str(warning.message)
    assert (found or f"a ({len(np.unique(column))} values)") in text
    assert "b (" not in text
    assert "levels=0" in text
    assert text.isprintable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load(path, levels=0).train, data.train)
        load(path, columns="b")
        load_rows(path)


def test_coordinates_without_names_are_counted(tmp_path):
    x = RNG.normal(size=(100, 3, 2))
    x[:, 0] = x[:, 0] > 0
    with pytest.warns(UserWarning, match="2 of 6 coordinates"):
        load(save(tmp_path / "x.npy", x=x))


@pytest.mark.parametrize("offset", [1.7e9, -1.7e9, 1e15])
def test_values_that_single_precision_cannot_tell_apart_are_float64(offset, tmp_path):
    """Times in seconds, 1.7e9 + 200 of them: float32 has steps of 128 there, so that 13 values would be left."""
    path = tmp_path / "x.csv"
    times = offset + 10 * REALS
    pd.DataFrame({"t": times, "b": REALS}).to_csv(path, index=False)
    data = load(path, levels=0)
    assert data.train.dtype == data.valid.dtype == data.test.dtype == torch.float64
    assert np.array_equal(torch.cat([data.train, data.valid, data.test])[data.order.argsort()][:, 0].numpy(), times)
    assert np.array_equal(load_rows(path)[0][:, 0].numpy(), times)
    pd.DataFrame({"t": times[:1]}).to_csv(path, index=False)  # of one row nothing says which digits count
    assert load_rows(path)[0].item() == times[0]
    pd.DataFrame({"t": 10 * REALS, "b": 1e-30 * REALS}).to_csv(path, index=False)
    assert load(path).train.unique().numel() == 320
    assert load(path).train.dtype == load_rows(path)[0].dtype == torch.float32


def test_the_order_leads_back_to_the_rows_of_the_file(tmp_path):
    x = RNG.normal(size=(50, 2)).astype(np.float32)
    data = load(save(tmp_path / "x.npy", x=x), seed=3)
    np.testing.assert_array_equal(x[data.order.numpy()], torch.cat([data.train, data.valid, data.test]))
    assert sorted(data.order.tolist()) == list(range(50))
    images = torch.from_numpy(load_digits().images).long()
    digits = load("digits", seed=5)
    assert torch.equal(images[digits.order], torch.cat([digits.train, digits.valid, digits.test]))
    assert load("ring").order is None


def test_the_largest_size_reaches_the_reader(tmp_path):
    path = save(tmp_path / "x.npz", x=RNG.normal(size=(50, 2)))
    for read in (load, load_rows):
        with pytest.raises(ArgumentError, match="raise max_bytes"):
            read(path, max_bytes=500)
        read(path, max_bytes=2000)
