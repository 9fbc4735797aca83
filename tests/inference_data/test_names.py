"""No value is lost to a name: of a variable, a dimension, a label, or a keyword."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from readings import affine_flow, mean_guide, mean_model

from pyro_genmodels import to_arviz


def fit(latent="w", computed=None, plate="data"):
    def model(y):
        w = pyro.sample(latent, dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if computed:
            pyro.deterministic(computed, w.sum(-1))
        with pyro.plate(plate, len(y)):
            pyro.sample("y", dist.Normal(w.sum(-1), 1.0), obs=y)

    def guide(y):
        pyro.sample(latent, dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return model, guide


CLASHES = {
    "dims call a dimension as the variable": ({}, {"dims": {"w": ["w"]}}, "dims gives 'w' a dimension 'w', which is the name"),
    "dims call a dimension as that of draws": ({}, {"dims": {"w": ["chain"]}}, "'chain', which is a dimension of draws"),
    "dims name two alike": ({}, {"dims": {"w": ["a", "a"]}}, "'a', which is the name of another of its dimensions"),
    "dims name another variable": ({"computed": "u"}, {"dims": {"w": ["u"]}}, "'u' has the name of a dimension of 'w'"),
    "dims name a plate of another length": ({}, {"dims": {"w": ["data"]}}, "'data' has 3 entries in 'plate data' and 2 in 'w'"),
    "a default name is a variable": ({"computed": "w_dim_0"}, {}, r"'w_dim_0' has the name .* dims=\{'w': \[...\]\}"),
    "a latent variable is a dimension of draws": (
        {"latent": "chain"},
        {},
        "called 'chain', which in ArviZ is a dimension of draws",
    ),
    "a computed variable is a dimension of draws": ({"computed": "draw"}, {}, "called 'draw', which in ArviZ is a dimension"),
    "a plate is a dimension of draws": ({"plate": "chain"}, {}, "plate is called 'chain'"),
    "a plate is a variable": ({"plate": "w"}, {}, "Multiple sample sites named 'w'"),
    "names differ in a slash": ({"latent": "a/b", "computed": "a.b"}, {}, "'a/b' and 'a.b' have one name in ArviZ"),
    "too few labels": ({}, {"coords": {"data": [1]}}, "a list of 3 labels for the dimension 'data', but found 1"),
    "labels of draws": ({}, {"coords": {"draw": range(3)}}, "a list of 5 labels for the dimension 'draw', but found 3"),
    "labels are a number": ({}, {"coords": {"data": 3}}, "a list of 3 labels for the dimension 'data', but found 3"),
    "labels are a word": ({}, {"coords": {"data": "abc"}}, "a list of 3 labels for the dimension 'data', but found 'abc'"),
    "labels are a table": ({}, {"coords": {"data": torch.zeros(3, 2)}}, "a list of 3 labels for the dimension 'data'"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_names_that_clash_are_refused_by_name(case):
    names, options, message = CLASHES[case]
    with pytest.raises((ValueError, RuntimeError), match=message):
        to_arviz(fit(**names), torch.randn(3), num_samples=5, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {"w": "side"}}, r"dims\['w'\] as a list of names such as \['side'\], but found 'side'"),
        ({"dims": [("w", ["side"])]}, "dims as a dictionary"),
        ({"dims": {"w": [1]}}, "list of names"),
        ({"coords": [1, 2]}, "coords as a dictionary"),
    ],
)
def test_options_of_another_type_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        to_arviz(fit(), torch.randn(3), num_samples=5, **options)


def test_groups_are_a_list():
    with pytest.raises(ValueError, match="Unknown groups 'posterior': choose a list from posterior"):
        to_arviz(fit(), torch.randn(3), groups="posterior")


def test_constants_survive_a_plate_with_the_name_of_one():
    """The argument `data` is as long as the plate `data`, and so is `weight`."""

    def model(data, weight):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("y", dist.Normal(mu * weight, 1.0), obs=data.log())

    def guide(data, weight):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    found = to_arviz((model, guide), torch.arange(1.0, 4), torch.ones(3), num_samples=2)["constant_data"]
    assert set(found.data_vars) == {"data", "weight"}
    assert found["data"].to_numpy().tolist() == [1.0, 2.0, 3.0]


# Keywords.

OPTIONS = {
    "batch_size": 8,
    "num_samples": 3,
    "groups": ["posterior"],
    "parallel": True,
    "coords": {},
    "dims": {},
    "progress": False,
}


def mean_with(option):
    """Return a fit whose model has a keyword of this name, and records what it was run with."""
    seen = []

    def model(y, *args, **options):
        seen.append(options.get(option, *args))
        mean_model(y)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("y", kind), inspect.Parameter(option, kind, default=None)]
    model.__signature__ = inspect.Signature(parameters)
    return (model, lambda y, *args, **options: mean_guide(y)), seen


@pytest.mark.parametrize("option", OPTIONS)
def test_a_keyword_of_the_model_is_not_swallowed(option):
    pair, seen = mean_with(option)
    y = torch.randn(4)
    with pytest.raises(ValueError, match=rf"{option}= is a keyword of to_arviz and of the model.*model_kwargs=\{{'{option}'"):
        to_arviz(pair, y, **{option: OPTIONS[option]})
    assert not seen
    to_arviz(
        pair,
        y,
        model_kwargs={option: 17},
        **{option: OPTIONS[option]},
        **({} if option == "num_samples" else {"num_samples": 2}),
    )
    assert set(seen) == {17}


def test_the_default_batch_size_given_by_name_is_refused_too():
    pair, seen = mean_with("batch_size")
    with pytest.raises(ValueError, match="batch_size= is a keyword"):
        to_arviz(pair, torch.randn(4), batch_size=100)
    pair, seen = mean_with("progress")
    to_arviz(pair, torch.randn(4), num_samples=2)  # nothing is ambiguous
    with pytest.raises(ValueError, match="progress= is a keyword"):
        to_arviz(pair, torch.randn(4), num_samples=2, progress=True)
    pair, seen = mean_with("batch_size")
    to_arviz(pair, torch.randn(4), num_samples=2)
    assert set(seen) == {None}
    to_arviz(pair, torch.randn(4), 5, num_samples=2, batch_size=1)  # given by position
    assert set(seen) == {None, 5}


def test_the_model_of_draws_has_its_keywords_too():
    (model, _), seen = mean_with("dims")
    with pytest.raises(ValueError, match="dims= is a keyword"):
        to_arviz({"mu": torch.zeros(1, 3)}, torch.randn(4), model=model, dims={})
    to_arviz({"mu": torch.zeros(1, 3)}, torch.randn(4), model=model, dims={}, model_kwargs={"dims": 2})
    assert set(seen) == {2}


def test_a_family_has_no_keyword_of_to_arviz():
    data = to_arviz(affine_flow(context=1), num_samples=2, batch_size=1, model_kwargs={"context": torch.zeros(3, 1)})
    assert data["posterior_predictive"]["x"].shape == (1, 2, 3, 2)
