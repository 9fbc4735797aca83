"""No keyword of a call is taken by a function in place of its model."""

import functools

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import nn

from pyro_genmodels import VAE, Flow, compare, log_likelihood, to_arviz, train
from pyro_genmodels.utils.keywords import check_keywords, check_known_keywords, joined_keywords, keyword_names


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


# Keywords that nobody knows.


def wrapper(*args, **kwargs):
    return model(*args, **kwargs)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_misspelt_keyword_is_named_with_the_nearest_that_is_known(name):
    check_known_keywords("fit", ["num_samples"], {"y": 1, "batch_size": 2}, WRAPPED[name])
    with pytest.raises(TypeError, match=r"^fit and the model know no keyword num_sample. Did you mean num_samples\?$"):
        check_known_keywords("fit", ["num_samples"], {"num_sample": 1}, WRAPPED[name])
    with pytest.raises(TypeError, match=r"no keyword batch_sizes. Did you mean batch_size\?"):
        check_known_keywords("fit", [], {"batch_sizes": 1}, WRAPPED[name])
    with pytest.raises(TypeError, match=r"no keyword other.$"):
        check_known_keywords("fit", ["num_samples"], {"other": 1}, WRAPPED[name])


def test_a_guide_takes_the_keywords_of_its_model():
    with pytest.raises(TypeError, match=r"The model has a keyword y, but the guide has none. fit calls both alike"):
        check_known_keywords("fit", [], {"y": 1}, model, lambda x: None)
    check_known_keywords("fit", [], {"y": 1}, model, lambda x, **kwargs: None)


@pytest.mark.parametrize("fn", [wrapper, functools.partial(wrapper, 1, len), poutine.mask(wrapper, mask=True), dict])
def test_what_a_wrapper_takes_is_unknown(fn):
    check_known_keywords("fit", [], {"anything": 1}, fn)


def test_a_wrapper_takes_its_own_keywords_and_those_of_what_it_wraps():
    @functools.wraps(model)
    def scaled(*args, scale=1.0, **kwargs): ...

    check_known_keywords("fit", [], {"scale": 2.0, "y": 1}, scaled)
    with pytest.raises(TypeError, match="no keyword other"):
        check_known_keywords("fit", [], {"other": 2.0}, scaled)


def test_arguments_of_a_partial_are_not_taken_for_a_handler():
    def with_network(network, activation, x, y=None): ...

    bound = functools.partial(with_network, nn.Linear(1, 1), nn.ReLU())
    assert keyword_names(bound, (1,)) == ["y"]
    check_known_keywords("fit", [], {"y": 1}, poutine.scale(bound, scale=2.0))


@pytest.mark.parametrize("function", [log_likelihood, to_arviz, lambda fit, x, **kw: compare({"fit": fit}, x, **kw)])
@pytest.mark.parametrize("family", [Flow, VAE])
def test_functions_and_families_name_an_unknown_keyword(function, family):
    with pytest.raises(TypeError, match=r"^(log_likelihood|to_arviz|compare) and the model know no .* mean num_samples\?$"):
        function(family((2,)), torch.randn(3, 2), num_sample=10)


def test_train_names_an_unknown_keyword_of_the_model():
    with pytest.raises(TypeError, match=r"^train and the model know no keyword sizes. Did you mean size\?$"):
        train(Flow((2,)), torch.randn(5, 2), model_kwargs={"sizes": 5}, progress=False)
