"""Arguments in lists, tuples and dictionaries are walked in one way."""

from collections import namedtuple

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_genmodels import log_likelihood, to_arviz, train
from pyro_genmodels.utils.nested import leaves, map_nested

Pair = namedtuple("Pair", "first second")


def test_containers_keep_their_types_and_those_without_a_change_are_returned():
    values = {"a": Pair(1, [2]), "b": ("x", [])}
    found = map_nested(lambda v: v + 1 if isinstance(v, int) else v, values)
    assert found == {"a": Pair(2, [3]), "b": ("x", [])}
    assert type(found["a"]) is Pair
    assert found["b"] is values["b"]
    assert map_nested(lambda v: v, values) is values


def test_leaves_are_found_with_their_keys():
    values = {"a": Pair(1, [2, 3]), "b": ("x", [])}
    assert list(leaves(values)) == [(("a", 0), 1), (("a", 1, 0), 2), (("a", 1, 1), 3), (("b", 0), "x")]
    assert list(leaves(values, lambda v: v == [2, 3])) == [(("a", 0), 1), (("a", 1), [2, 3]), (("b", 0), "x")]
    assert list(leaves(5)) == [((), 5)]
    assert map_nested(len, [[1], [2, 3]], lambda v: v != [[1], [2, 3]]) == [1, 2]


class Module(nn.Module):
    """Model with a named tuple as argument, and the number of all data."""

    def __init__(self):
        super().__init__()
        self.loc, self.seen = nn.Parameter(torch.zeros(())), []

    def forward(self, x, pair=None, size=None):
        self.seen.append((type(pair), size))
        pyro.module("m", self)
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(self.loc + pair.first, 1.0), obs=x)


def no_guide(*args, **kwargs):
    """Sample nothing."""


@pytest.mark.parametrize("wrapped", [lambda m: m, lambda m: poutine.scale(m, scale=1.0)], ids=["alone", "in a handler"])
def test_a_named_tuple_and_the_number_of_data_reach_every_model(wrapped):
    module = Module()
    x, pair = torch.randn(10), Pair(torch.zeros(10), np.arange(10.0))
    train((wrapped(module), no_guide), {"x": x, "pair": pair}, epochs=1, batch_size=4, progress=False)
    assert set(module.seen) == {(Pair, 10)}
    module.seen.clear()
    log_likelihood((wrapped(module), no_guide), x, pair=pair, batch_size=4)
    assert {kind for kind, _ in module.seen} == {Pair}


@pytest.mark.parametrize("wrapped", [lambda m: m, lambda m: poutine.scale(m, scale=1.0)], ids=["alone", "in a handler"])
def test_nested_arguments_are_constants_by_the_name_of_the_argument(wrapped):
    def model(x, extra):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, extra):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    extra = {"a": [1.0, 2.0], "b": Pair(torch.ones(3), pd.DataFrame({"c": [1], "d": [2]})), "e": "text"}
    found = to_arviz((wrapped(model), guide), torch.randn(4), extra, num_samples=2, progress=False)["constant_data"]
    assert set(found.data_vars) == {"extra_a", "extra_b_0", "extra_b_1_c", "extra_b_1_d"}
