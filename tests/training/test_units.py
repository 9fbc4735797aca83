"""Losses say what they measure: in the history, the progress bar, the record of a checkpoint, and the plot."""

import json
from functools import partial
from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO

from pyro_genmodels import (
    GAN,
    MAF,
    VAE,
    Autoregressive,
    DenoisingScoreMatching,
    Diffusion,
    EnergyModel,
    Flow,
    FlowMatching,
    ImplicitScoreMatching,
    MaximumLikelihood,
    MaximumMeanDiscrepancy,
    NoiseContrastive,
    NormalLikelihood,
    ODEFlow,
    SlicedScoreMatching,
    SlicedWasserstein,
    SpreadDivergence,
    train,
)
from pyro_genmodels.divergences import EnergyKernel
from pyro_genmodels.evaluation import plots
from pyro_genmodels.infer.adversarial import WGAN
from pyro_genmodels.training import Checkpoint, checkpoints
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.training.steps import make_step

train = partial(train, progress=False)
X = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))


def flow(**kwargs):
    return Flow((2,), transform=MAF(transforms=1, hidden=(8,)), **kwargs)


ode_flow = partial(ODEFlow, (2,))


def latent_diffusion():
    return VAE((2,), latent_dim=2, prior=Diffusion((2,)), hidden=(8,))


NOISE = dist.Normal(torch.zeros(2), 2.0).to_event(1)
UNITS = {
    "flow": (flow, None, "nats"),
    "vae": (partial(VAE, (2,), latent_dim=1, hidden=(8,)), None, "nats"),
    "renyi": (partial(VAE, (2,), latent_dim=1, hidden=(8,)), RenyiELBO(alpha=0.0), "nats"),
    "maximum likelihood": (flow, MaximumLikelihood(), "nats"),
    "contrastive": (partial(EnergyModel, (2,)), None, "difference of energies, nats"),
    "noise-contrastive": (partial(EnergyModel, (2,)), NoiseContrastive(NOISE), "noise-contrastive loss"),
    "implicit": (partial(EnergyModel, (2,)), ImplicitScoreMatching(), "score-matching loss"),
    "sliced": (partial(EnergyModel, (2,)), SlicedScoreMatching(), "score-matching loss"),
    "denoising energy": (partial(EnergyModel, (2,)), DenoisingScoreMatching(), "score-matching loss"),
    "diffusion": (partial(Diffusion, (2,)), None, "denoising error"),
    "prior diffusion": (latent_diffusion, None, "nats"),
    "flow matching": (ode_flow, FlowMatching(), "flow-matching error"),
    "mmd": (flow, MaximumMeanDiscrepancy(), "squared mean discrepancy"),
    "energy distance": (flow, MaximumMeanDiscrepancy(kernel=EnergyKernel()), "squared energy distance"),
    "sliced wasserstein": (flow, SlicedWasserstein(), "sliced Wasserstein distance to the power 2"),
    "sliced wasserstein 1": (flow, SlicedWasserstein(p=1), "sliced Wasserstein distance"),
    "spread": (flow, SpreadDivergence(), "spread divergence"),
    "gan": (partial(GAN, (2,)), None, "adversarial loss, adversarial loss, squared energy distance"),
    "wgan": (partial(GAN, (2,)), WGAN(), "adversarial loss, adversarial loss, squared energy distance"),
}


@pytest.mark.parametrize(("make", "objective", "units"), UNITS.values(), ids=UNITS)
def test_every_loss_says_its_unit(make, objective, units):
    fit = train(make(), X, valid=X, objective=objective, epochs=1)
    assert set(fit.units) == set(fit.history[0]) - {"epoch", "seconds"}
    assert list(fit.units.values()) == (units.split(", ") if ", " in units else [units, units])
    assert f"units={fit.units}" in repr(fit)


def test_the_unit_follows_what_the_objective_meets():
    """One `DenoisingScoreMatching` for a diffusion, then for an energy."""
    objective = DenoisingScoreMatching()
    assert train(Diffusion((2,)), X, objective=objective, epochs=1).units == {"train": "denoising error"}
    assert train(EnergyModel((2,)), X, objective=objective, epochs=1).units == {"train": "score-matching loss"}


def test_the_unit_of_a_training_is_that_of_its_own_model():
    """What another model made of the same objective in between was taken for it."""
    objective, energy = DenoisingScoreMatching(), EnergyModel((2,))
    step = make_step(Diffusion((2,)), objective, None, Batches(X, None, 10, X), None)
    objective.loss(energy.model, energy.guide, X)
    assert step.units == {"train": "denoising error", "valid": "denoising error"}


def test_the_progress_bar_says_the_unit(capfd):
    train(flow(), X, valid=X, epochs=1, progress=True)
    assert " nats" in (first := capfd.readouterr().err)
    assert first.count("nats") == first.count("valid=")  # once for both
    train(GAN((2,)), X, valid=X, epochs=1, progress=True)
    words = capfd.readouterr().err
    assert "adversarial loss" in words
    assert "squared energy distance" in words
    assert "nats" not in words


def test_a_checkpoint_holds_the_units(tmp_path):
    fit = train(Diffusion((2,)), X, valid=X, epochs=1, checkpoint=tmp_path / "c")
    assert json.loads((tmp_path / "c.json").read_text())["units"] == fit.units
    more = train(Diffusion((2,)), X, valid=X, epochs=2, checkpoint=Checkpoint(tmp_path / "c", resume=True))
    assert more.units == fit.units == {"train": "denoising error", "valid": "denoising error"}
    tensors, record = checkpoints.read(tmp_path / "c")
    del record["units"]
    checkpoints.write(tmp_path / "old", tensors, {k: v for k, v in record.items() if k not in ("format", "pyro_genmodels")})
    assert checkpoints.load(tmp_path / "old")().sample((2,)).shape == (2, 2)


def test_the_plot_has_a_panel_for_each_unit():
    def history(*losses):
        return [{"epoch": i, "train": loss, "valid": loss + 1} for i, loss in enumerate(losses, 1)]

    histories = {"flow": history(5.0, 3.0, 2.0), "diffusion": history(0.6, 0.5), "energy": history(0.1, float("nan"))}
    histories["gan"] = [{"epoch": 1, "train": 0.7}]
    nats = {"train": "nats", "valid": "nats"}
    units = {
        "flow": nats,
        "diffusion": dict.fromkeys(nats, "denoising error"),
        "energy": {"train": "difference of energies", "valid": "nats"},
        "gan": {"train": "adversarial loss"},
    }
    figure = plots.loss_curves(histories, units)
    found = {ax.get_ylabel(): [text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes}
    assert found == {
        "nats per datum (dotted: training)": ["flow", "energy"],
        "denoising error (dotted: training)": ["diffusion"],
        "difference of energies (dotted: training)": ["energy"],
        "adversarial loss (dotted: training)": ["gan"],
    }
    assert [len(ax.lines) for ax in figure.axes] == [3, 2, 1, 1]
    (ax,) = plots.loss_curves({"a": [{"epoch": 1, "train": 1e-9}]}).axes  # in any unit the curve is seen
    assert ax.get_ylim()[1] < 1e-8
    assert ax.get_ylabel() == "loss (dotted: training)"


# In other units of the data the losses of a standardised fit are the same, up to the change of a density.

FAMILIES = {
    "flow": flow,
    "ode_flow": ode_flow,
    "vae": partial(VAE, (2,), latent_dim=1, hidden=(8,)),
    "autoregressive": partial(Autoregressive, (2,), likelihood=NormalLikelihood(), hidden=(8,)),
    "energy": partial(EnergyModel, (2,)),
    "diffusion": partial(Diffusion, (2,)),
    "gan": partial(GAN, (2,)),
}
OBJECTIVES = {
    "energy by noise": (partial(EnergyModel, (2,)), DenoisingScoreMatching()),
    "energy by parts": (partial(EnergyModel, (2,)), ImplicitScoreMatching()),
    "energy by slices": (partial(EnergyModel, (2,)), SlicedScoreMatching()),
    "flow matching": (ode_flow, FlowMatching()),
    **{name: (make, None) for name, make in FAMILIES.items()},
}


@pytest.mark.filterwarnings("ignore:.*far from 0 for their spread.*:UserWarning")  # draws are rounded, losses are not
@pytest.mark.parametrize(("size", "offset"), [(1e3, 2.0**30), (1e-9, 2.0**-10), (1e20, 0.0)])
@pytest.mark.parametrize(("make", "objective"), OBJECTIVES.values(), ids=OBJECTIVES)
def test_losses_do_not_depend_on_the_units_of_the_data(make, objective, size, offset):
    """From doubles into a family in single precision: seconds since 1970, nanometres above a millimetre, sizes of galaxies.

    The mean of these data is a number in single precision; another one is rounded, which moves the data a little.
    """
    x, year = (X - X.mean(0)).double(), torch.linspace(-1, 1, 16, dtype=torch.float64)[:, None]

    def fitted(x, context):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return train(make(context=1), x, context=context, objective=objective, epochs=1, seed=1)

    usual, other = fitted(x, year), fitted(size * x + offset, 2005 + 9 * year)
    shift = 2 * log(size) if usual.units["train"] == "nats" else 0.0
    assert other.best["train"] - shift == pytest.approx(usual.best["train"], abs=2e-3)
