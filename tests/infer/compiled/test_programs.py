"""Every program of the table, captured: loss, gradients, random numbers, buffers and fits are those of stock Pyro."""

from collections.abc import Collection

import pyro
import pytest
import torch
from eager_steps import Step, assert_same_step, assert_same_tensors, buffers, eager, losses_of, parameters
from programs import CAPTURED, SHOWN, Program, Run, fresh
from pyro.infer import SVI
from pyro.optim import SGD, Adam
from scipy import stats

from pyro_genmodels.infer.compiled import Captured, CapturedLoss, Compiled, CompiledSVI, Eager

SEEDS = (1, 2, 1)
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""Tolerances of a graph that runs the same operations in another order."""

FUSED = {"rtol": 1e-3, "atol": 1e-4}
"""Tolerances of a graph whose operations are fused, so that sums are taken in another order."""


FITTED = {
    "schools, AutoNormal",
    "schools, reparametrised",
    "Bayesian network, PyroModule, PyroSample, PyroParam",
    "VAE, BatchNorm",
    "word embeddings of integers, dict argument",
    "example: lda",
}
"""Rows whose fits are compared by default."""


def rows(shown: Collection[str] = frozenset(CAPTURED)) -> pytest.MarkDecorator:
    """Parametrise a test by `row`, all that can be captured; rows that are not shown are slow."""
    slow = pytest.mark.slow
    cases = [pytest.param(row, id=name, marks=() if name in shown else slow) for name, row in CAPTURED.items()]
    return pytest.mark.parametrize("row", cases)


def captured_step(loss: CapturedLoss, run: Run) -> Step:
    value, gradients = loss(*run.args, **run.kwargs)
    return Step(float(value), {name: g.clone() for name, g in gradients.items()})


def check_against_eager(row: Program, mode, **tolerance) -> None:
    """Check loss, gradients, random numbers and buffers of captured calls against eager ones, call by call."""
    run, wanted = fresh(row.build), []
    eager(run)  # makes what is made at the first run
    for seed in SEEDS:
        pyro.set_rng_seed(seed)
        wanted.append((eager(run), torch.get_rng_state()))
    wanted_buffers = buffers(run)

    run = fresh(row.build)
    eager(run)
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=mode)
    found = []
    for seed in SEEDS:
        pyro.set_rng_seed(seed)
        found.append((captured_step(loss, run), torch.get_rng_state()))
    for (step, state), (wanted_step, wanted_state) in zip(found, wanted, strict=True):
        assert_same_step(step, wanted_step, **tolerance)
        assert torch.equal(state, wanted_state), "the graph leaves the random number generator in another state"
    for b, wanted_b in zip(buffers(run), wanted_buffers, strict=True):
        torch.testing.assert_close(b, wanted_b, **tolerance)
    if not row.deterministic:
        assert found[0][0].loss != found[1][0].loss, "two seeds give the same loss"
    if not wanted_buffers:
        assert found[0][0].loss == found[2][0].loss, "the same seed gives another loss"
    assert [finding.kind for finding in loss.findings if finding.kind != "audit"] == ["capture"], "captured again"


@rows(SHOWN)
def test_captured_program_equals_eager(row):
    check_against_eager(row, Captured(), **ROUNDING)


@pytest.mark.slow
@rows()
def test_program_captured_as_python_code_equals_eager(row):
    check_against_eager(row, Captured(script=False), **ROUNDING)


@pytest.mark.slow
@rows()
def test_compiled_program_equals_eager(row):
    check_against_eager(row, Compiled(), **FUSED)


def check_fit(row: Program, mode, num_steps: int, **tolerance) -> None:
    """Check losses and parameters after some steps of CompiledSVI against those of SVI, from the first step on.

    A gradient that is zero, as of a bias before BatchNorm or of the keys of attention, is rounding: about 1e-6 in float32. With
    a large `eps` Adam makes a step of at most 0.01 * 1e-6 / 1e-3 = 1e-5 of it, instead of 0.01 in any direction.
    """
    fits = []
    for cls, options in ((SVI, {}), (CompiledSVI, {"mode": mode})):
        run = fresh(row.build)
        svi = cls(run.model, run.guide, Adam({"lr": 0.01, "eps": 1e-3}), run.loss, **options)
        fits.append((losses_of(svi, run, range(num_steps)), parameters()))
    (wanted, wanted_parameters), (found, found_parameters) = fits
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), **tolerance)
    assert_same_tensors(found_parameters, wanted_parameters, **tolerance)


@pytest.mark.slow
@rows(FITTED)
def test_fitted_parameters_are_those_of_svi(row):
    check_fit(row, Captured(), 6, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in CAPTURED.items() if row.representative])
def test_fitted_parameters_compiled_are_those_of_svi(row):
    check_fit(row, Compiled(), 6, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["schools, AutoNormal", "mixture, Categorical guide, score function", "VAE, BatchNorm"])
def test_eager_mode_is_the_program_itself(name):
    check_fit(CAPTURED[name], Eager(), 3, rtol=0, atol=0)


# Over many draws, where the random numbers are not those of an eager run.

ALARM = 1e-6
"""Chance of a false alarm of each comparison of two means."""


def assert_same_mean(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Two samples, (n,), have one mean: Welch's test with a false alarm at the chance of ALARM."""
    result = stats.ttest_ind(found.double(), wanted.double(), equal_var=False)
    assert result.pvalue > ALARM, f"means {found.mean():.4f} and {wanted.mean():.4f}, p = {result.pvalue:.1e}"
    ratio = float(found.double().var() / wanted.double().var())
    assert 0.5 < ratio < 2, f"ratio of the variances {ratio:.2f}"  # 400 draws: beyond 8 standard errors for normal draws


@pytest.mark.parametrize(
    "name",
    [
        "mixture, Categorical guide, score function",
        pytest.param("schools, AutoNormal", marks=pytest.mark.slow),
        pytest.param("Gamma, Beta and Dirichlet guide, constrained parameters", marks=pytest.mark.slow),
        pytest.param("varying slopes, LKJ, subsampled plate", marks=pytest.mark.slow),
        pytest.param("VAE, Dropout", marks=pytest.mark.slow),
    ],
)
def test_several_steps_in_one_graph_have_the_law_of_eager_steps(name):
    """A run whose steps share a graph draws random numbers in another order: the mean loss stays."""
    row, num_steps = CAPTURED[name], 400
    run = fresh(row.build)
    still = SGD({"lr": 0.0})
    wanted = torch.tensor(losses_of(SVI(run.model, run.guide, still, run.loss), run, range(num_steps)))
    pyro.set_rng_seed(num_steps)
    svi = CompiledSVI(run.model, run.guide, still, run.loss, mode=Captured())
    found = svi.run(num_steps, *run.args, unroll=4, progress=False, **run.kwargs)
    assert len(set(found.tolist())) > 0.6 * len(set(wanted.tolist())), "draws repeat"  # some losses have few values
    assert_same_mean(found, wanted)
