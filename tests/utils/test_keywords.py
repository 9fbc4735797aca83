"""No keyword of a call is taken by a function in place of its model."""

import functools

import pyro
import pytest
from pyro import poutine
from pyro.infer import config_enumerate
from torch import nn

from pyro_genmodels import Flow
from pyro_genmodels.utils.keywords import check_keywords, joined_keywords, keyword_names


def model(x, y=None, *, batch_size=None): ...


class Module(nn.Module):
    def forward(self, x, dims=2): ...


WRAPPED = {
    "function": model,
    "partial": functools.partial(model, y=2),
    "handlers": poutine.scale(poutine.mask(model, mask=True), scale=2.0),
    "condition": poutine.condition(model, data={}),
    "enumerated": config_enumerate(model),
    "reparametrised": poutine.reparam(model, config={}),
    "in a plate": pyro.plate("data", 3)(model),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_names_of_a_model_are_found_behind_handlers(name):
    assert keyword_names(WRAPPED[name], (1,)) == ["y", "batch_size"]
    with pytest.raises(ValueError, match=r"batch_size= is a keyword of fit and of the model.*model_kwargs={'batch_size': ...}"):
        check_keywords("fit", WRAPPED[name], ["progress", "batch_size"], (1,))


def test_modules_and_families():
    assert keyword_names(Module(), (1,)) == ["dims"] == keyword_names(poutine.block(Module()), (1,))
    assert keyword_names(Flow((2,)).model, (1,)) == ["context", "size"]


def test_what_is_filled_is_no_clash():
    check_keywords("fit", model, ["y"], (1, 2))
    check_keywords("fit", model, ["batch_size"], (1,), {"batch_size": None})
    check_keywords("fit", model, ["num_samples"], (1,))
    check_keywords("fit", lambda *args, **kwargs: None, ["batch_size"], (1,))
    check_keywords("fit", None, ["batch_size"])


@pytest.mark.parametrize("found", [[1], "ab", {1: 2}])
def test_model_kwargs_are_a_dictionary_of_names(found):
    with pytest.raises(TypeError, match="fit wants model_kwargs as a dictionary"):
        joined_keywords("fit", {}, found)


def test_nothing_is_given_twice():
    assert joined_keywords("fit", {"y": 1}, None) == {"y": 1}
    assert joined_keywords("fit", {"y": 1}, {"z": 2}) == {"y": 1, "z": 2}
    with pytest.raises(ValueError, match=r"fit was given y= and model_kwargs=\{'y': ...\}"):
        joined_keywords("fit", {"y": 1}, {"y": 2})
