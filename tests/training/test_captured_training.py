"""`train` by captured programs: the numbers of an eager run, and the choice of what takes less time."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import rows
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_genmodels import (
    GAN,
    MAF,
    VAE,
    DenseCritic,
    DenseGenerator,
    EnergyModel,
    Flow,
    FlowMatching,
    MaximumLikelihood,
    ODEFlow,
    train,
)
from pyro_genmodels.infer.compiled import Captured, CaptureError, Compiled, Eager
from pyro_genmodels.training import Checkpoint, gradients

train = partial(train, progress=False)
CAPTURED = Captured(script=False)
SOLVED = "by steps that depend on values"
"""What the refusal of a solver with adaptive steps says."""


def small_flow():
    return Flow((2,), transform=MAF(transforms=1, hidden=(8,)))


def small_vae():
    return VAE((2,), latent_dim=1, hidden=(8,))


def run(build, data, **options):
    """Return the losses of all epochs, and the fit."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    fit = train(build(), data, **({"epochs": 2, "batch_size": 10, "seed": 1} | options))
    return [{name: value for name, value in record.items() if name != "seconds"} for record in fit.history], fit


def assert_same_losses(found, wanted):
    assert [record.keys() for record in found] == [record.keys() for record in wanted]
    for record, other in zip(found, wanted, strict=True):
        assert record == pytest.approx(other, rel=1e-4, abs=1e-5)


def assert_same_runs(build, data, mode=CAPTURED, **options):
    wanted, eager = run(build, data, mode=Eager(), **options)
    found, captured = run(build, data, mode=mode, **options)
    assert eager.mode == Eager()
    assert captured.mode == mode
    assert_same_losses(found, wanted)
    for p, q in zip(captured.family.parameters(), eager.family.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    return found


@pytest.fixture
def soon(monkeypatch):
    """Make the automatic choice capture a program for any number of steps."""
    monkeypatch.setattr(gradients, "CAPTURED_STEPS", 1)


# The numbers.


@rows(lambda case: case.objective is not None, also_slow=("Energy, classes", "VAE, diffusion prior", "SOSPF", "GAN, labels"))
def test_a_captured_run_has_the_losses_of_an_eager_run(case):
    """23 rows in batches of 8, 8 and 7."""
    data = case.batch(23)
    try:
        assert_same_runs(case.build, data, objective=case.objective(), valid=data, batch_size=8)
    except NotImplementedError as error:
        assert SOLVED in str(error)  # noqa: PT017 - an adaptive solver is the one thing that is refused


def test_the_objective_of_a_continuous_flow_without_its_solver():
    assert_same_runs(partial(ODEFlow, (2,)), torch.randn(23, 2), objective=FlowMatching())


def test_renyis_bound():
    assert_same_runs(small_vae, torch.randn(20, 2), objective=RenyiELBO(alpha=0.5, num_particles=2))


@pytest.mark.slow
def test_an_energy_with_validation_is_captured_once(monkeypatch):
    """Validation stores log Z in the family, which holds for one set of parameters."""
    seen = []

    class Noted(gradients.CapturedLoss):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self)

    monkeypatch.setattr(gradients, "CapturedLoss", Noted)
    x = torch.randn(20, 2)
    assert_same_runs(partial(EnergyModel, (2,), num_steps=3), x, valid=x)
    assert [finding.kind for loss in seen for finding in loss.findings if finding.kind != "audit"] == ["capture"]


def test_a_loader_with_a_ragged_last_batch():
    x = torch.randn(23, 2)
    assert_same_runs(small_flow, DataLoader(TensorDataset(x), batch_size=10))


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_run():
    assert_same_runs(small_vae, torch.randn(20, 2), mode=Compiled())


def test_a_run_of_one_batch_is_captured(monkeypatch):
    calls = []
    original = gradients.CapturedLoss.__call__
    monkeypatch.setattr(
        gradients.CapturedLoss, "__call__", lambda self, *args, **kw: calls.append(1) or original(self, *args, **kw)
    )
    assert_same_runs(small_vae, torch.randn(20, 2), batch_size=20, epochs=4)
    assert len(calls) == 3


def test_other_seeds_give_other_losses():
    x = torch.randn(20, 2)
    first, _ = run(small_vae, x, mode=CAPTURED)
    again, _ = run(small_vae, x, mode=CAPTURED)
    other, _ = run(small_vae, x, mode=CAPTURED, seed=2)
    assert first == again
    assert first[-1]["train"] != other[-1]["train"]


@pytest.mark.parametrize("modes", [(CAPTURED, CAPTURED), (Eager(), CAPTURED), (CAPTURED, Eager())], ids=str)
def test_a_resumed_run_goes_on_with_the_same_numbers(modes, tmp_path):
    x = torch.randn(23, 2)
    wanted, _ = run(small_vae, x, epochs=4, valid=0.2, ema_decay=0.9)
    run(small_vae, x, valid=0.2, ema_decay=0.9, mode=modes[0], checkpoint=tmp_path / "run")
    resumed = {"mode": modes[1], "checkpoint": Checkpoint(tmp_path / "run", resume=True)}
    found, _ = run(small_vae, x, epochs=4, valid=0.2, ema_decay=0.9, **resumed)
    assert_same_losses(found, wanted)


def test_equal_gradients_are_scaled_one_by_one():
    """The gradients of both parameters are one tensor in the graph, and clipping changes gradients in place."""

    def model(x):
        loc = pyro.param("a", torch.tensor(3.0)) + pyro.param("b", torch.tensor(4.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def fitted(mode):
        pyro.clear_param_store()
        train(
            (model, lambda x: None), torch.zeros(20), epochs=3, mode=mode, clip_norm=0.1, optim=partial(torch.optim.SGD, lr=1.0)
        )
        return [pyro.param(name).item() for name in "ab"]

    assert fitted(Captured()) == pytest.approx(fitted(Eager()))
    assert fitted(Eager())[0] < 3.0


# The choice.


def test_a_short_run_is_eager():
    assert run(small_flow, torch.randn(20, 2))[1].mode == Eager()


def test_a_long_run_is_captured_after_its_first_epoch(soon):
    x = torch.randn(20, 2)
    wanted, _ = run(small_vae, x, mode=Eager())
    found, fit = run(small_vae, x)
    assert fit.mode == Captured()
    assert_same_losses(found, wanted)
    assert run(small_vae, x, epochs=1)[1].mode == Eager()


@pytest.mark.parametrize(
    ("num_steps", "mode"), [(1, Eager()), (1_999, Eager()), (2_000, Captured()), (49_999, Captured()), (50_000, Compiled())]
)
def test_the_choice_by_the_number_of_steps(num_steps, mode, monkeypatch):
    monkeypatch.setattr(gradients, "missing_compiler", lambda: None)
    assert gradients.automatic_mode(num_steps) == mode


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(gradients, "missing_compiler", lambda: "no g++")
    assert gradients.automatic_mode(10**6) == Captured()


def test_the_steps_that_are_certain_end_with_patience(monkeypatch):
    seen = []
    monkeypatch.setattr(gradients, "automatic_mode", lambda num_steps: seen.append(num_steps) or Eager())
    x = torch.randn(20, 2)
    run(small_flow, x, epochs=9, patience=4, valid=x)
    assert all(steps <= 2 * 4 for steps in seen)
    seen.clear()
    run(small_flow, x, epochs=9, patience=4)
    assert seen == [2 * epochs for epochs in range(8, 0, -1)]  # the first epoch is eager


def test_a_long_adversarial_run_is_captured_after_its_first_epoch(soon):
    x = torch.randn(20, 2)
    build = partial(GAN, (2,), generator=DenseGenerator((8,)), critic=DenseCritic((8,)))
    wanted, _ = run(build, x, mode=Eager())
    found, fit = run(build, x)
    assert fit.mode == Captured()
    assert_same_losses(found, wanted)


def test_an_adversarial_run_by_another_optimiser_stays_eager(soon):
    build = partial(GAN, (2,), generator=DenseGenerator((8,)), critic=DenseCritic((8,)))
    with warnings.catch_warnings(action="error"):
        fit = run(build, torch.randn(20, 2), optim=partial(torch.optim.Rprop, lr=1e-3))[1]
    assert fit.mode == Eager()


def test_a_graph_that_is_slower_is_given_up(soon, monkeypatch):
    monkeypatch.setattr(gradients, "TIMED_STEPS", 2)
    monkeypatch.setattr(gradients, "median", lambda seconds: -sum(seconds))  # what is slower seems faster
    x = torch.randn(60, 2)
    wanted, _ = run(small_vae, x, mode=Eager())
    found, fit = run(small_vae, x)
    assert fit.mode == Eager()
    assert_same_losses(found, wanted)


def test_a_model_of_your_own_is_eager_unless_it_is_asked_for(soon):
    family = small_flow()

    def model(x, size=None):
        return family.model(x, size=size)

    for mode, wanted in ((None, Eager()), (Captured(), Captured())):
        fit = train((model, lambda x, size=None: None), torch.randn(20, 2), epochs=2, objective=MaximumLikelihood(), mode=mode)
        assert fit.mode == wanted


# What cannot be captured.


class Branching(nn.Module):
    """A network that reads values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x).squeeze(-1) if x.sum() > 0 else self.layer(-x).squeeze(-1)


def branching():
    return EnergyModel((2,), energy=Branching(), num_steps=2)


def test_what_cannot_be_captured_stays_eager_by_itself(soon):
    x = torch.randn(20, 2)
    wanted, _ = run(branching, x, mode=Eager())
    with warnings.catch_warnings(action="error"):
        found, fit = run(branching, x)
    assert fit.mode == Eager()
    assert found == wanted


def test_what_cannot_be_captured_is_refused_if_asked_for():
    with pytest.raises(CaptureError, match="reads the value of a tensor"):
        run(branching, torch.randn(20, 2), mode=Captured())


def test_a_loss_without_a_differentiable_form():
    x = torch.randn(20, 2)
    with pytest.raises(CaptureError, match="TraceGraph_ELBO has no differentiable loss"):
        run(small_vae, x, mode=Captured(), objective=TraceGraph_ELBO())
    assert run(small_vae, x, objective=TraceGraph_ELBO())[1].mode == Eager()


def test_a_loss_without_a_differentiable_form_stays_eager_by_itself(soon):
    assert run(small_vae, torch.randn(20, 2), objective=TraceGraph_ELBO())[1].mode == Eager()


class Counting(nn.Module):
    """A network that counts its calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.weights = nn.Linear(2, 1), [1.0]

    def forward(self, x):
        self.weights[0] *= 1.01
        return self.layer(x).squeeze(-1) * self.weights[0]


def test_a_program_that_changes_at_each_step_goes_back_to_eager_steps(soon):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it may be noticed by the audit as well
        fit = run(lambda: EnergyModel((2,), energy=Counting(), num_steps=2), torch.randn(60, 2))[1]
    assert fit.mode == Eager()


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("mode", [Eager(), Captured()], ids=str)
def test_values_that_are_not_finite_end_a_run(mode):
    x = torch.randn(20, 2)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        run(small_flow, x, mode=mode, optim=partial(torch.optim.SGD, lr=1e30), epochs=5)


@pytest.mark.parametrize("mode", ["captured", Captured, True])
def test_a_mode_is_an_object(mode):
    with pytest.raises(TypeError, match=r"Captured\(\) .*as mode"):
        run(small_flow, torch.randn(20, 2), mode=mode)


def test_the_progress_bar_says_that_a_graph_is_built(monkeypatch):
    said = []
    monkeypatch.setattr("pyro_genmodels.training.loop.tqdm.set_postfix_str", lambda bar, text, refresh=True: said.append(text))
    run(small_flow, torch.randn(20, 2), mode=Captured())
    assert said[0] == "capturing"
    assert said.count("capturing") == 1


def test_a_likelihood_needs_no_latent_variables():
    assert_same_runs(small_flow, torch.randn(20, 2), objective=Trace_ELBO())
