"""Rows come in minibatches: every row once, in batches of nearly one size, each with its context."""

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_genmodels.training.batches import Batches, pair_of

LIKE = torch.empty(0)


def batches(n, size, context=False):
    x = torch.arange(n).float()[:, None].expand(n, 3)
    return Batches(x, x[:, :1] if context else None, size, LIKE)


@pytest.mark.parametrize(
    ("n", "size", "sizes"), [(10, 4, [4, 3, 3]), (9, 3, [3] * 3), (5, 8, [5]), (1, 1, [1]), (7, 6, [4, 3])]
)
def test_every_row_comes_once_in_batches_of_nearly_one_size(n, size, sizes):
    for order in ("in_order", "shuffled"):
        parts = [x for x, _ in getattr(batches(n, size), order)()]
        assert [len(x) for x in parts] == sizes
        assert sorted(torch.cat(parts)[:, 0].tolist()) == list(range(n))


def test_the_order_is_kept_or_drawn():
    data = batches(100, 10)
    assert torch.cat([x for x, _ in data.in_order()])[:, 0].tolist() == list(range(100))
    assert torch.cat([x for x, _ in data.shuffled()])[:, 0].tolist() != list(range(100))
    assert data.first()[0][:, 0].tolist() == list(range(10))
    assert len(data.head(3)) == 100


def test_each_row_has_its_own_context():
    for x, context in batches(23, 5, context=True).shuffled():
        assert torch.equal(x[:, :1], context)


def test_a_loader_keeps_its_own_batches():
    x = torch.arange(10.0)[:, None]
    data = Batches(DataLoader(TensorDataset(x, 2 * x), batch_size=4), None, 99, LIKE)
    assert data.rows == 10
    assert [(len(x), torch.equal(c, 2 * x)) for x, c in data.in_order()] == [(4, True), (4, True), (2, True)]
    assert len(data.head(5)) == 8


def test_floats_take_the_precision_wanted_and_integers_stay():
    like = torch.empty(0, dtype=torch.float64)
    x, labels = Batches(torch.zeros(4, 2), torch.arange(4), 4, like).first()
    assert (x.dtype, labels.dtype) == (torch.float64, torch.int64)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(2)])


@pytest.mark.parametrize(
    ("data", "context", "error", "message"),
    [
        (torch.zeros(0, 2), None, ValueError, "at least one row"),
        (torch.tensor(1.0), None, ValueError, "at least one row.* the single number 1"),
        (pd.DataFrame({"a": [1.0]}), None, TypeError, r"found DataFrame.*to_numpy\(\)"),
        (torch.zeros(3, 2), torch.zeros(2, 1), ValueError, "3 rows of data but 2 of context"),
        (DataLoader(torch.zeros(3, 2)), torch.zeros(3), ValueError, "leave context out"),
        (DataLoader(Endless()), None, TypeError, "a length, but Endless has none"),
    ],
)
def test_what_cannot_be_batched_is_refused(data, context, error, message):
    with pytest.raises(error, match=message):
        Batches(data, context, 2, LIKE)


def test_a_batch_is_x_alone_or_with_its_context():
    x, c = torch.zeros(2), torch.ones(2)
    assert pair_of(x) == (x, None)
    assert pair_of([x]) == (x, None)
    assert pair_of((x, c)) == (x, c)
    with pytest.raises(ValueError, match="found 3 parts"):
        pair_of([x, c, c])
