"""The named data sets are split exactly as they say, and what is drawn of them is a picture."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pyro_genmodels import plots
from pyro_genmodels.datasets import DATASETS, digits

SIZES = [1437, 180, 180]


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
    assert (data.name, data.levels) == ("digits", 17)
    assert x.unique().tolist() == list(range(17))
    assert labels.unique().tolist() == list(range(10))


def test_another_seed_splits_otherwise():
    assert not torch.equal(digits(0).test, digits(1).test)


def test_a_data_set_is_known_by_its_own_name():
    assert all(load(0).name == name for name, load in DATASETS.items())


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
