"""Rows of arguments: plates that choose rows, rows in another dimension, lists, dicts, arrays and frames; keywords; errors."""

import inspect
from collections import namedtuple

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

from pyro_genmodels import MAF, Flow, Labels, compare, log_likelihood, to_arviz
from pyro_genmodels.evaluation import conservative_log_likelihood, has_likelihood
from pyro_genmodels.evaluation.arguments import RowArguments, row_arguments

EVIDENCE = dist.Normal(0.0, 2**0.5)


def none(*args, **kwargs):
    """Sample nothing."""


def small_flow(**options):
    return Flow((2,), transform=MAF(transforms=1, hidden=(8,)), **options)


# Plates that choose their rows.


@pytest.mark.parametrize(("rows", "count"), [(20, 5), (23, 5), (7, 6), (4, 1)])
def test_a_model_that_subsamples_is_given_every_row_once(rows, count):
    flow, x = small_flow(), torch.randn(rows, 2)

    def model(x):
        with pyro.plate("data", rows, subsample_size=count) as i:
            pyro.sample("x", flow(), obs=x[i])

    def by_pyro(x):
        with pyro.plate("data", rows, subsample_size=count):
            pyro.sample("x", flow(), obs=pyro.subsample(x, event_dim=1))

    wanted = flow().log_prob(x).detach()
    for fit in ((model, none), (by_pyro, none)):
        found = log_likelihood(fit, x)
        torch.testing.assert_close(found.values, wanted)
        assert (found.kind, found.num_samples) == ("exact", 1)
        assert has_likelihood(fit, x)
        assert compare({"fit": fit}, x).table["elpd"].item() == pytest.approx(wanted.sum().item(), rel=1e-5)


@pytest.mark.parametrize("parallel", [None, False])
@pytest.mark.parametrize("where", ["both", "guide"])
def test_latent_variables_in_a_subsampled_plate_are_integrated(where, parallel):
    """The guide is the exact posterior, so that every weight is the evidence."""
    x = torch.randn(11)

    def model(x):
        with pyro.plate("data", 11, subsample_size=4 if where == "both" else None) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        with pyro.plate("data", 11, subsample_size=4) as i:
            pyro.sample("z", dist.Normal(x[i] / 2, 0.5**0.5))

    found = log_likelihood((model, guide), x, num_samples=30, parallel=parallel)
    torch.testing.assert_close(found.values, EVIDENCE.log_prob(x))


@pytest.mark.parametrize("count", [lambda n: 4, lambda n: min(4, n)])
def test_a_guide_alone_may_choose_rows_of_what_it_is_given(count):
    """The second guide chooses none of one row: the error called it an autoguide of another size."""
    x = torch.randn(11)

    def model(x):
        with pyro.plate("data", len(x)) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=count(len(x))) as i:
            pyro.sample("z", dist.Normal(x[i] / 2, 0.5**0.5))

    assert has_likelihood((model, guide), x)
    torch.testing.assert_close(log_likelihood((model, guide), x, num_samples=30).values, EVIDENCE.log_prob(x))


def test_a_guide_encodes_no_more_rows_at_once_than_a_batch_has():
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            seen.append(len(x))
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    log_likelihood((model, guide), torch.randn(20), num_samples=2, batch_size=10)
    assert max(seen) == 5


def test_an_autoguide_of_a_subsampled_model_scores_each_row_by_its_own_latent():
    x = torch.randn(12)

    def model(x):
        with pyro.plate("data", 12, subsample_size=5) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    guide = AutoNormal(model)
    SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
    with torch.no_grad():
        guide.locs.z.copy_(x / 2)
        guide.scales.z = torch.full((12,), 0.5**0.5)
    found = log_likelihood((model, guide), x, num_samples=30)
    torch.testing.assert_close(found.values, EVIDENCE.log_prob(x), rtol=1e-4, atol=1e-4)


def test_other_plates_that_choose_rows_are_refused():
    """3 of 10 columns at random were scored, and called exact."""

    def columns(x):
        with pyro.plate("columns", 10, subsample_size=3, dim=-2) as j, pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, j].T)

    def trained_on_500(x):
        with pyro.plate("data", 500, subsample_size=100) as i:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[i])

    for model, found in ((columns, "'columns' \\(3 of 10 rows\\)"), (trained_on_500, "'data' \\(100 of 500 rows\\)")):
        with pytest.raises(ValueError, match=f"20 rows of x.*found {found}.*without subsample_size"):
            log_likelihood((model, none), torch.randn(20, 10)[:, 0] if model is trained_on_500 else torch.randn(20, 10))


def test_samples_of_a_model_that_chooses_rows_are_not_compared():
    def model(x):
        with pyro.plate("data", 20, subsample_size=5) as i:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[i])

    with pytest.raises(ValueError, match=r"samples of 'fit'.*plate 'data' with subsample_size=5.*Leave quality_samples out"):
        compare({"fit": (model, none)}, torch.randn(20), quality_samples=5)


def test_an_error_of_the_model_is_not_hidden_by_the_search_for_plates():
    def model(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        log_likelihood((model, none), torch.randn(4))


# Rows in another dimension.


def columns_are_rows(x, length=None):
    """x is (T, N), with one latent variable for each of its N columns."""
    with pyro.plate("rows", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("times", x.shape[0], dim=-2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def columns_guide(x, length=None):
    with pyro.plate("rows", x.shape[1], dim=-1):
        n = x.shape[0]
        pyro.sample("z", dist.Normal(x.sum(0) / (n + 1), (n + 1) ** -0.5))


@pytest.mark.parametrize("row_dim", [1, -1])
def test_rows_may_be_another_dimension(row_dim):
    x, length = torch.randn(3, 8), torch.arange(8)
    wanted = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x.T)
    found = log_likelihood((columns_are_rows, columns_guide), x, length, num_samples=20, row_dim=row_dim, batch_size=60)
    torch.testing.assert_close(found.values, wanted, rtol=1e-4, atol=1e-4)
    table = compare({"fit": (columns_are_rows, columns_guide)}, x, length, num_samples=20, row_dim=row_dim).table
    assert table.loc["fit", "bits_per_dim"] == pytest.approx(-wanted.mean().item() / (3 * np.log(2)), rel=1e-4)


def test_the_error_names_the_dimension_that_a_plate_has():
    with pytest.raises(ValueError, match=r"rows of x are its dimension 1, in plate 'rows': row_dim=1"):
        log_likelihood((columns_are_rows, columns_guide), torch.randn(3, 8))


# What holds rows.

Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "pack",
    [
        lambda a, b: [a, b],
        lambda a, b: (a, b),
        lambda a, b: {"a": a, "b": b},
        lambda a, b: Pair(a, b),
        lambda a, b: {"a": [a], "b": (b, "name")},
        lambda a, b: [a.numpy(), pd.Series(b.numpy())],
        lambda a, b: pd.DataFrame({"a": a.numpy(), "b": b.numpy()}),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_covariates_in_lists_dicts_arrays_and_frames_are_cut_with_the_rows(pack, by_name):
    x, a, b = torch.randn(7), torch.randn(7), torch.randn(7)

    def model(x, covariates):
        if isinstance(covariates, torch.Tensor):
            first, second = covariates.T
        else:
            first, second = covariates.values() if isinstance(covariates, dict) else covariates
        first, second = (c[0] if isinstance(c, (list, tuple)) else c for c in (first, second))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(first - second, 1.0), obs=x)

    covariates = pack(a, b)
    found = (
        log_likelihood((model, none), x, covariates=covariates, batch_size=3)
        if by_name
        else log_likelihood((model, none), x, covariates, batch_size=3)
    )
    torch.testing.assert_close(found.values.float(), dist.Normal(a - b, 1.0).log_prob(x))


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, lambda x: pd.DataFrame(x.numpy()), torch.Tensor.tolist])
def test_data_may_be_arrays_frames_and_lists(convert):
    flow, x, labels = small_flow(context=Labels(3)), torch.randn(7, 2), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    found = log_likelihood(flow, convert(x), labels.numpy(), batch_size=3)
    torch.testing.assert_close(found.values.float(), flow(labels).log_prob(x).detach())
    table = compare({"flow": flow}, convert(x), labels.numpy()).table
    assert table["elpd"].item() == pytest.approx(found.values.sum().item(), rel=1e-5)


def test_containers_without_rows_are_passed_as_they_are():
    settings, numbers = {"deep": {"a": 1}}, [1, 2, 3]
    cut = RowArguments((torch.zeros(3), settings, numbers), {"name": "a"}).take(slice(0, 1))
    assert cut.args[1] is settings
    assert cut.args[2] is numbers


# Keywords.


def with_options(x, batch_size=None, num_samples=None):
    assert batch_size == 8
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@pytest.mark.parametrize("call", [log_likelihood, lambda fit, x, **kw: compare({"fit": fit}, x, **kw)])
def test_a_keyword_of_the_model_is_not_swallowed(call):
    x = torch.randn(5)
    with pytest.raises(ValueError, match=r"batch_size= is a keyword .* and of the model.*model_kwargs=\{'batch_size'"):
        call((with_options, none), x, batch_size=8)
    assert call((with_options, none), x, model_kwargs={"batch_size": 8}) is not None
    assert call((with_options, none), x, batch_size=3, model_kwargs={"batch_size": 8}) is not None
    with pytest.raises(TypeError, match="wants model_kwargs as a dictionary"):
        call((with_options, none), x, model_kwargs=[8])


@pytest.mark.parametrize("option", ["batch_size", "num_samples", "progress", "row_dim"])
def test_a_keyword_of_the_model_is_not_swallowed_if_it_is_the_default(option):
    def model(x, batch_size=None, num_samples=None, progress=None, row_dim=None):
        with_options(x, 8)

    default = inspect.signature(log_likelihood).parameters[option].default
    with pytest.raises(ValueError, match=f"{option}= is a keyword of log_likelihood and of the model"):
        log_likelihood((model, none), torch.randn(5), **{option: default})
    if option != "progress":
        return
    assert log_likelihood((model, none), torch.randn(5)).kind == "exact"  # nothing is ambiguous
    with pytest.raises(ValueError, match="row_dim= is a keyword of has_likelihood"):
        has_likelihood((model, none), torch.randn(5), row_dim=0)
    assert compare({"a": (model, none)}, torch.randn(5)).log_likelihoods["a"].kind == "exact"


def test_a_keyword_of_the_model_is_not_swallowed_by_the_conservative_bound():
    with pytest.raises(ValueError, match="num_samples= is a keyword of conservative_log_likelihood and of the model"):
        conservative_log_likelihood((with_options, none), torch.randn(5), num_samples=3)


# Errors.


def normal(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ("a.csv", {}, TypeError, "log_likelihood wants numbers.* found str"),
        (None, {}, TypeError, "found NoneType"),
        ({"x": torch.zeros(3)}, {}, TypeError, "found dict"),
        (pd.DataFrame({"name": ["a", "b"]}), {}, TypeError, "the column 'name' holds str"),
        ([[1.0, 2.0], [3.0]], {}, TypeError, "rows differ in shape"),
        (torch.tensor(1.0), {}, ValueError, r"row|found x of the shape \(\)"),
        (torch.zeros(0, 2), {}, ValueError, r"one or more rows.* \(0, 2\)"),
        (torch.zeros(3), {"row_dim": 1}, ValueError, r"row_dim as a dimension of x, of the shape \(3,\), but found 1"),
        (torch.zeros(3), {"row_dim": "rows"}, TypeError, "row_dim as an integer"),
        (torch.zeros(3), {"num_samples": 0}, ValueError, "num_samples of 1 or more"),
        (torch.zeros(3), {"batch_size": 1.5}, ValueError, "batch_size of 1 or more"),
        (torch.tensor([0.0, float("nan")]), {}, ValueError, "support"),
    ],
)
def test_bad_inputs_say_what_was_found_and_wanted(x, options, error, message):
    with pytest.raises(error, match=message):
        log_likelihood((normal, none), x, **options)


def test_one_row_and_integers():
    assert log_likelihood((normal, none), torch.zeros(1)).values.tolist() == pytest.approx([-0.9189385])
    assert str(log_likelihood((normal, none), torch.zeros(1))).startswith("0.919 ± nan nats per datum")
    assert log_likelihood((normal, none), np.array([0, 1])).values.tolist() == pytest.approx([-0.9189385, -1.4189385])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 3), r"wants data of shape \(N, 2\), but found \(1, 3\)"),
        (torch.zeros(5), r"wants data of shape \(N, 2\), but found \(1,\)"),
        (torch.zeros(5, 2, dtype=torch.long), "models real numbers, but was given data of torch.int64"),
        (torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]), "NaN or infinite values in 1 of 2 rows, the first of them row 1"),
    ],
)
def test_the_errors_of_a_family_are_not_wrapped(x, message):
    with pytest.raises(ValueError, match=message) as caught:
        log_likelihood(small_flow(), x)
    assert "log_likelihood" not in str(caught.value)


@pytest.mark.parametrize("samples", ["a", 2.5, True])
def test_a_number_of_quality_samples_that_is_none_is_refused(samples):
    with pytest.raises(TypeError, match="quality_samples as a number of samples or None"):
        compare({"flow": small_flow()}, torch.randn(10, 2), quality_samples=samples)


def test_contexts_may_be_lists_with_a_number_or_a_list_for_each_row():
    x, labels, c = torch.randn(7, 2), [0, 1, 2, 2, 1, 0, 0], torch.randn(7, 3)
    flow = small_flow(context=Labels(3))
    expected = flow(torch.tensor(labels)).log_prob(x).detach()
    torch.testing.assert_close(log_likelihood(flow, x, labels, batch_size=3).values.float(), expected)
    torch.testing.assert_close(log_likelihood(flow, x, context=labels, batch_size=3).values.float(), expected)
    assert compare({"flow": flow}, x, labels).table["elpd"].item() == pytest.approx(expected.sum().item(), rel=1e-5)
    flow = small_flow(context=3)
    found = log_likelihood(flow, x, context=c.tolist(), batch_size=3)
    torch.testing.assert_close(found.values.float(), flow(c).log_prob(x).detach())


@pytest.mark.parametrize("settings", [[1, 2], ["a", "b", "c"], [{"a": 1}] * 3, (1, 2, 3), [torch.zeros(1)] * 3])
def test_lists_of_other_things_reach_the_model_as_they_are(settings):
    given = row_arguments("f", torch.zeros(3), (settings,), {"settings": settings})
    assert given.args[1] is settings
    assert given.kwargs["settings"] is settings


def test_an_error_of_a_model_that_is_given_a_frame_says_how():
    """Evaluation gives tensors, and to_arviz frames."""
    frame = pd.DataFrame({"a": [0.5, 1.0, 2.0]}, dtype="float32")

    def model_of(column):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("a", dist.Normal(z, 1.0), obs=torch.as_tensor(column(x)))

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        return model, guide

    by_name, by_place = model_of(lambda x: x["a"].to_numpy(copy=True)), model_of(lambda x: x[:, 0])
    with pytest.raises(Exception, match="give a model its data frames as tensors: it reads a column by its place"):
        log_likelihood(by_name, frame)
    with pytest.raises(Exception, match=r"passes data frames to the model unchanged.*pass torch.tensor\(frame.to_numpy\(\)\)"):
        to_arviz(by_place, frame, num_samples=3)
    assert log_likelihood(by_place, frame, num_samples=3).values.shape == (3,)
    assert to_arviz(by_name, frame, num_samples=3).log_likelihood["a"].shape == (1, 3, 3)
