"""Rows come in minibatches: every row once, in batches of nearly one size, each with its context."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pyro_genmodels.datasets import load
from pyro_genmodels.training.batches import Batches

LIKE = torch.empty(0)


def batches(n, size, context=False):
    x = torch.arange(n).float()[:, None].expand(n, 3)
    return Batches(x, x[:, :1] if context else None, size, LIKE)


@pytest.mark.parametrize(
    ("n", "size", "sizes"), [(10, 4, [4, 3, 3]), (9, 3, [3] * 3), (5, 8, [5]), (1, 1, [1]), (7, 6, [4, 3])]
)
def test_every_row_comes_once_in_batches_of_nearly_one_size(n, size, sizes):
    for order in ("in_order", "shuffled"):
        parts = [batch.x for batch in getattr(batches(n, size), order)()]
        assert [len(x) for x in parts] == sizes
        assert sorted(torch.cat(parts)[:, 0].tolist()) == list(range(n))


def test_the_order_is_kept_or_drawn():
    data = batches(100, 10)
    assert torch.cat([batch.x for batch in data.in_order()])[:, 0].tolist() == list(range(100))
    assert torch.cat([batch.x for batch in data.shuffled()])[:, 0].tolist() != list(range(100))
    assert data.first().x[:, 0].tolist() == list(range(10))
    assert data.head(3).rows == 100


def test_each_row_has_its_own_context():
    for batch in batches(23, 5, context=True).shuffled():
        assert torch.equal(batch.x[:, :1], batch.context)


def test_a_loader_keeps_its_own_batches():
    x = torch.arange(10.0)[:, None]
    data = Batches(DataLoader(TensorDataset(x, 2 * x), batch_size=4), None, 99, LIKE)
    assert data.rows == 10
    assert [(b.rows, torch.equal(b.context, 2 * b.x)) for b in data.in_order()] == [(4, True), (4, True), (2, True)]
    assert data.head(5).rows == 8


def test_floats_take_the_precision_wanted_and_integers_stay():
    like = torch.empty(0, dtype=torch.float64)
    x, labels = Batches(torch.zeros(4, 2), torch.arange(4), 4, like).first().args
    assert (x.dtype, labels.dtype) == (torch.float64, torch.int64)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(2)])


class ListOf(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@pytest.mark.parametrize(
    ("data", "context", "error", "message"),
    [
        (torch.zeros(0, 2), None, ValueError, "at least one row"),
        (torch.tensor(1.0), None, ValueError, "at least one row.* the single number 1"),
        (pd.DataFrame({"a": [1.0], "b": ["u"]}), None, TypeError, "the column 'b' holds str"),
        (torch.zeros(3, 2), torch.zeros(2, 1), ValueError, "3 rows of data but 2 of context"),
        (DataLoader(torch.zeros(3, 2)), torch.zeros(3), ValueError, "leave context out"),
        (TensorDataset(torch.zeros(3, 2), torch.zeros(3)), torch.zeros(3), ValueError, "leave context= out"),
        (DataLoader(Endless()), None, TypeError, "a length, but Endless has none"),
        (Endless(), None, TypeError, "a length, but Endless has none"),
        ((torch.zeros(3), [torch.zeros(3), torch.zeros(4)]), None, ValueError, r"3 rows of data but 4 of argument 2\[1\]"),
        ({"x": torch.zeros(3), "c": torch.zeros(2)}, None, ValueError, "2 of argument c.*model_kwargs"),
        ({"x": torch.zeros(3), "size": torch.zeros(3)}, None, ValueError, "'size', which is the number of all rows"),
        ([[1.0, 2.0], [3.0]], None, TypeError, "rows differ in shape"),
        ("moons", None, TypeError, "data frames, a Dataset or a DataLoader, but found str"),
        (load("moons"), None, TypeError, "but found Dataset. Pass its rows, such as data.train"),
        ([torch.zeros(3, 2, dtype=torch.float64) + 1e39], None, ValueError, r"torch.float32 cannot hold data of 1e\+39"),
    ],
)
def test_what_cannot_be_batched_is_refused(data, context, error, message):
    with pytest.raises(error, match=message):
        Batches(data, context, 2, LIKE)


X, C = torch.arange(12.0).reshape(6, 2), torch.arange(6.0)
SAME = {
    "list of numbers": X.tolist(),
    "array": X.numpy(),
    "frame": pd.DataFrame(X.numpy(), columns=["a", "b"]),
    "frame of several types": pd.DataFrame({"a": X[:, 0].int().numpy(), "b": X[:, 1].double().numpy()}),
    "dataset": TensorDataset(X),
    "subset": Subset(TensorDataset(X), range(6)),
    "list of rows": ListOf(list(X)),
    "loader": DataLoader(TensorDataset(X), batch_size=3),
    "loader of dictionaries": DataLoader([{"x": row} for row in X], batch_size=3),
    "dictionary": {"x": X},
}


@pytest.mark.parametrize("data", SAME.values(), ids=SAME)
def test_rows_are_the_same_in_every_form(data):
    """In batches of 3 rows, in order, shuffled, and at once; as a family gets them, and as a model gets them."""
    for family in ("Flow", None):
        found = Batches(data, None, 3, LIKE, family=family)
        assert (found.rows, found.count) == (6, 2)
        assert [batch.rows for batch in found.in_order()] == [3, 3]
        assert torch.equal(torch.cat([batch.x for batch in found.in_order()]), X)
        assert torch.equal(found.head(6).x, X)
        assert sorted(torch.cat([batch.x for batch in found.shuffled()])[:, 0].tolist()) == X[:, 0].tolist()
    assert (found.digest is None) == (not isinstance(data, (list, dict, np.ndarray, pd.DataFrame, TensorDataset)))


def test_arguments_in_lists_and_dictionaries_are_cut_alike():
    data = (X, [C, {"d": C.numpy()}], {"e": (C, None)}, 3.0, "word")
    for batch in Batches(data, None, 2, LIKE).shuffled():
        x, (c, inner), outer, number, word = batch.args
        assert all(torch.equal(t, x[:, 0] / 2) for t in (c, inner["d"], outer["e"][0]))
        assert (outer["e"][1], number, word, batch.kwargs) == (None, 3.0, "word", {})
    design = torch.ones(9, 9)
    for batch in Batches({"x": X, "c": C}, None, 2, LIKE, model_kwargs={"design": design}).shuffled():
        assert torch.equal(batch.kwargs["c"], batch.kwargs["x"][:, 0] / 2)
        assert batch.kwargs["design"] is design
        assert batch.args == ()
    assert Batches(ListOf([{"x": row} for row in X]), None, 2, LIKE, model_kwargs={"design": design}).head(4).x.shape == (4, 2)


def test_a_family_takes_x_and_its_context():
    for data in ((X, C), [X, C], {"context": C, "x": X}):
        batch = Batches(data, None, 6, LIKE, family="Flow").first()
        assert (batch.args[0] is not None, len(batch.args), batch.kwargs) == (True, 2, {})
        assert torch.equal(batch.x, X)
        assert torch.equal(batch.context, C)
    for data, message in (([X, C, C], "found 3 parts"), ({"x": X, "c": C}, "the keys 'x' and 'context', but found x, c")):
        with pytest.raises(ValueError, match=message):
            Batches(data, None, 6, LIKE, family="Flow")


def test_a_share_is_drawn_by_the_seed_alone():
    data, before = batches(10, 4, context=True), torch.get_rng_state()
    kept, held_out, rows = data.split(0.3, 1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(held_out.head(9).x[:, 0], rows.float())
    assert sorted([*held_out.head(9).x[:, 0].tolist(), *kept.head(9).x[:, 0].tolist()]) == list(range(10))
    assert torch.equal(kept.head(9).context, kept.head(9).x[:, :1])
    assert (kept.rows, kept.count, held_out.rows) == (7, 2, 3)
    assert torch.equal(rows, data.split(0.3, 1)[2])
    assert not torch.equal(rows, data.split(0.3, 2)[2])
    _, part, rows = Batches(ListOf(list(X)), None, 3, LIKE).split(0.5, 0)
    assert torch.equal(part.head(9).x, X[rows])
    assert len(batches(2, 1).split(0.01, 0)[2]) == 1
    with pytest.raises(ValueError, match=r"share of 0\.9 of 1 rows"):
        batches(1, 1).split(0.9, 0)
    with pytest.raises(TypeError, match="random_split"):
        Batches(DataLoader(X), None, 3, LIKE).split(0.5, 0)


def test_rows_that_lose_their_digits_are_warned_of():
    seconds = 1.7e9 + 1000 * torch.randn(50, 2, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"In torch.float32 the data change by \d% of their range in column \d"):
        Batches(seconds, None, 9, LIKE)
    constant = torch.stack([torch.full((50,), 0.1, dtype=torch.float64), torch.randn(50, dtype=torch.float64)], 1)
    Batches(constant, None, 9, LIKE)  # rounded, but nothing is lost
    Batches(seconds - 1.7e9, None, 9, LIKE)
    Batches(seconds, None, 9, torch.empty(0, dtype=torch.float64))
