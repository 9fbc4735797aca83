"""No keyword of a call is taken by a function in place of its model."""

import functools

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import nn

from pyro_genmodels import VAE, Flow, compare, log_likelihood, to_arviz, train
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, keyword_names, runs_models


def model(x, y=None, *, batch_size=None): ...


@runs_models()
def fit(model, *args, guide=None, num_samples=100, batch_size=100, progress=True, filled=(), model_kwargs=None, **kwargs):
    """A function that runs a model."""
    check_model_keywords(model, guide, args, joined_keywords(kwargs, model_kwargs), filled)


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
        fit(WRAPPED[name], 1, progress=False, batch_size=100)


def test_modules_and_families():
    assert keyword_names(Module(), (1,)) == ["dims"] == keyword_names(poutine.block(Module()), (1,))
    assert keyword_names(Flow((2,)).model, (1,)) == ["context", "size"]


def test_what_is_filled_is_no_clash():
    fit(lambda x, progress=None: None, 1, 2, progress=False)
    fit(model, 1, batch_size=8, model_kwargs={"batch_size": None})
    fit(model, 1, batch_size=8, filled=["batch_size"])
    fit(model, 1, num_samples=8)
    fit(lambda *args, **kwargs: None, 1, batch_size=8)


@pytest.mark.parametrize("found", [[1], "ab", {1: 2}])
def test_model_kwargs_are_a_dictionary_of_names(found):
    with pytest.raises(TypeError, match="fit wants model_kwargs as a dictionary"):
        fit(model, 1, model_kwargs=found)


def test_nothing_is_given_twice():
    join = runs_models()(lambda kwargs, model_kwargs: joined_keywords(kwargs, model_kwargs))
    assert join({"y": 1}, None) == {"y": 1}
    assert join({"y": 1}, {"z": 2}) == {"y": 1, "z": 2}
    with pytest.raises(ValueError, match=r"fit was given y= and model_kwargs=\{'y': ...\}"):
        fit(model, 1, y=1, model_kwargs={"y": 2})


# Keywords that nobody knows.


def wrapper(*args, **kwargs):
    return model(*args, **kwargs)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_misspelt_keyword_is_named_with_the_nearest_that_is_known(name):
    fit(WRAPPED[name], 1, model_kwargs={"y": 1, "batch_size": 2})
    with pytest.raises(TypeError, match=r"^fit and the model know no keyword num_sample. Did you mean num_samples\?$"):
        fit(WRAPPED[name], 1, num_sample=1)
    with pytest.raises(TypeError, match=r"no keyword batch_sizes. Did you mean batch_size\?"):
        fit(WRAPPED[name], 1, batch_sizes=1)
    with pytest.raises(TypeError, match=r"no keyword other.$"):
        fit(WRAPPED[name], 1, other=1)


def test_a_guide_takes_the_keywords_of_its_model():
    with pytest.raises(TypeError, match=r"The model has a keyword y, but the guide has none. fit calls both alike"):
        fit(model, 1, guide=lambda x: None, y=1)
    fit(model, 1, guide=lambda x, **kwargs: None, y=1)


@pytest.mark.parametrize("fn", [wrapper, functools.partial(wrapper, 1, len), poutine.mask(wrapper, mask=True), dict])
def test_what_a_wrapper_takes_is_unknown(fn):
    fit(fn, anything=1)


def test_a_wrapper_takes_its_own_keywords_and_those_of_what_it_wraps():
    @functools.wraps(model)
    def scaled(*args, scale=1.0, **kwargs): ...

    fit(scaled, scale=2.0, y=1)
    with pytest.raises(TypeError, match="no keyword other"):
        fit(scaled, other=2.0)


def test_arguments_of_a_partial_are_not_taken_for_a_handler():
    def with_network(network, activation, x, y=None): ...

    bound = functools.partial(with_network, nn.Linear(1, 1), nn.ReLU())
    assert keyword_names(bound, (1,)) == ["y"]
    fit(poutine.scale(bound, scale=2.0), y=1)


@pytest.mark.parametrize("function", [log_likelihood, to_arviz, lambda fit, x, **kw: compare({"fit": fit}, x, **kw)])
@pytest.mark.parametrize("family", [Flow, VAE])
def test_functions_and_families_name_an_unknown_keyword(function, family):
    with pytest.raises(TypeError, match=r"^(log_likelihood|to_arviz|compare) and the model know no .* mean num_samples\?$"):
        function(family((2,)), torch.randn(3, 2), num_sample=10)


def test_train_names_an_unknown_keyword_of_the_model():
    with pytest.raises(TypeError, match=r"^train and the model know no keyword sizes. Did you mean size\?$"):
        train(Flow((2,)), torch.randn(5, 2), model_kwargs={"sizes": 5}, progress=False)
