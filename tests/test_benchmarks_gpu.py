"""The script for a GPU: its loops in plain PyTorch compute what `train` does, and it runs from end to end on a CPU."""

import copy
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from teachers import perturb
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `benchmarks` is
from benchmarks import gpu
from benchmarks.gpu_loops import works
from pyro_genmodels import Adversarial, ContrastiveDivergence, MaximumLikelihood
from pyro_genmodels.families import GAN, VAE, EnergyModel


def default_objective(family):
    if isinstance(family, VAE):
        return Trace_ELBO()
    return ContrastiveDivergence() if isinstance(family, EnergyModel) else MaximumLikelihood()


@pytest.mark.parametrize("work", works(quick=True), ids=lambda work: work.name.split()[0].rstrip(","))
def test_a_loop_by_hand_takes_the_steps_of_train(work, float64):
    family, x = work.build(), work.data(16).double()
    family.standardize(x)
    perturb(family, 0.1)
    objective = work.objective() or default_objective(family)
    trainer = Adversarial(family.model, family.critic) if isinstance(family, GAN) else None
    if trainer is not None:
        trainer.prepare(x)
    if isinstance(family, EnergyModel):
        objective.loss_and_grads(family.model, family.guide, x)  # starts the chains
    twin = copy.deepcopy(family)
    loop = work.by_hand(twin)
    pyro.set_rng_seed(1)
    found = loop.step(x)
    pyro.set_rng_seed(1)
    if trainer is not None:
        expected = trainer.step(x)["generator"]
    else:
        parameters = list(family.parameters())
        for p in parameters:
            p.grad = None
        expected = objective.loss_and_grads(family.model, family.guide, x) / len(x)
        for p in parameters:
            p.grad = None if p.grad is None else p.grad / len(x)
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        torch.optim.Adam(parameters, lr=1e-3).step()
    assert found == pytest.approx(expected, rel=1e-9)
    ours, theirs = dict(family.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        assert_close(theirs[name], p, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(capsys):
    gpu.main(["--device", "cpu", "--quick"])
    printed = capsys.readouterr().out
    assert "failed" not in printed, printed
    for work in works(quick=True):
        assert sum(line.startswith(f"| {work.name}") for line in printed.splitlines()) >= 2, printed
