"""Under `torch.autocast` networks compute in half precision, and nothing else does."""

import sys
from contextlib import nullcontext

import pyro
import pytest
import torch
from cases import exact, rows, scored
from teachers import perturb
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_genmodels import (
    GAN,
    VAE,
    ContrastiveDivergence,
    DenseCritic,
    DenseField,
    DenseGenerator,
    Dopri5,
    EnergyModel,
    Flow,
    ODEFlow,
    RestrictedBoltzmannMachine,
    log_likelihood,
    train,
)
from pyro_genmodels.families import MAF, RK4, BoltzmannMachine, FullNormalPosterior

HALF = (torch.bfloat16, torch.float16)
NETWORK_FILES = (
    "nn/mlp.py", "nn/masked.py", "nn/transformer.py", "nn/pixel_cnn.py", "nn/fields.py", "nn/gan.py", "nn/residual.py",
    "nn/padding.py", "families/context.py", "zuko/nn.py", "torch/nn/modules/linear.py",
)  # fmt: skip
NETWORK_CODE = (
    "FlatNetwork.", "_MaskedLinear.", "_Network.", "_Shallow.", "_Dense.", "_Convolutional.", "_Layers.forward",
    "_Conditioned.meta", "CircularLayer.splines", "_output", "HierarchicalVAE._bottom_up",
)  # fmt: skip
"""Functions that call the layers of a network."""
FOLDERS = ("/pyro_genmodels/", "/zuko/", "/autograd/", "torch/distributions/", "torch/optim/")
OF_SAMPLES = {"MaximumMeanDiscrepancy._mean_kernels"}
"""Functions that multiply matrices of zeros and ones, which are exact in half precision."""


def low(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype)


class OutsideNetworks(TorchDispatchMode):
    """Operations with results in half precision in the library's code outside of networks."""

    def __init__(self):
        super().__init__()
        self.found, self.num_rounded = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(t, torch.Tensor) and t.dtype in HALF for t in tree_leaves(out)):
            self.num_rounded += 1
            frame = sys._getframe(1)
            while not any(folder in (file := frame.f_code.co_filename) for folder in FOLDERS):
                frame = frame.f_back
            code = frame.f_code.co_qualname
            network = file.endswith(NETWORK_FILES) or code.startswith(NETWORK_CODE) or code in OF_SAMPLES
            views = ("aten.alias", "aten.detach", "aten._to_copy")  # of what a network has returned
            if not (network or "/autograd/" in file or str(func).startswith(views)):
                self.found.add(f"{func} in {code} ({file}:{frame.f_lineno})")
        return out


def built(case, n=8):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    family = perturb(case.build(), 0.1)
    batch = case.batch(n)
    family.prepare(*batch)
    return family, batch


def loss_and_gradient(case, *, autocast, rounded=False):
    family, batch = built(case, 64)
    if rounded:
        round_weights(family)
    pyro.set_rng_seed(1)
    with low() if autocast else nullcontext():
        loss = case.objective().differentiable_loss(family.model, family.guide, *batch)
    parameters = [p for p in family.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach() / 64, torch.cat([g.flatten() for g in gradients if g is not None])


def round_weights(family):
    with torch.no_grad():
        for p in family.parameters():
            p.copy_(p.bfloat16())


SLOW = ("Energy", "Energy, classes", "VAE, diffusion prior", "SOSPF", "Flow, dequantized", "Flow, on an interval")


@rows(also_slow=SLOW[:2])
def test_nothing_but_networks_is_rounded(case):
    family, (x, *context) = built(case)
    with low(), OutsideNetworks() as seen:
        loss = case.objective().differentiable_loss(family.model, family.guide, x, *context)
        family.eval()
        with torch.no_grad():
            distribution = family(*context)
            sample = distribution.sample()
            log_p = distribution.log_prob(x) if case.density != "none" else loss
    assert not seen.found
    assert loss.dtype == log_p.dtype == torch.float32
    assert sample.dtype in (torch.float32, torch.int64)


@rows(scored, also_slow=SLOW)
def test_log_densities_are_as_near_as_rounded_weights_allow(case):
    family, (x, *context) = built(case, 32)
    family.eval()

    def log_prob(family, *, autocast=False, precise=False):
        pyro.set_rng_seed(2)
        arguments = [t.double() if precise and t.is_floating_point() else t for t in (x, *context)]
        with low() if autocast else nullcontext():
            return family(*arguments[1:]).log_prob(arguments[0]).detach().double()

    found = log_prob(family, autocast=True)
    if exact(case) or case.density == "unnormalized":  # no random numbers
        family.double()
        truth = log_prob(family, precise=True)
        family.float()
    else:
        truth = log_prob(family)
    round_weights(family)
    rounded = log_prob(family)
    error, allowed = ((values - truth).square().mean().sqrt() for values in (found, rounded))
    assert error <= 8 * allowed + 1e-4


@rows(lambda case: case.objective is not ContrastiveDivergence, also_slow=SLOW)
def test_gradients_of_losses_are_as_near_as_rounded_weights_allow(case):
    truth, found, rounded = (
        loss_and_gradient(case, autocast=autocast, rounded=rounded)
        for autocast, rounded in ((False, False), (True, False), (False, True))
    )
    assert found[1].dtype == torch.float32
    error, allowed = ((values[1] - truth[1]).norm() / truth[1].norm() for values in (found, rounded))
    assert error <= 8 * allowed + 0.02  # a few of few units may cross the kink of a ReLU
    assert (found[0] - truth[0]).abs() <= 8 * (rounded[0] - truth[0]).abs() + 0.02


def test_energies_of_a_module_without_products_are_not_rounded():
    model = EnergyModel((2,), energy=torch.nn.Sequential(torch.nn.Flatten(), Offset()), sampler=None)
    x = torch.randn(16, 2)
    with low():
        values = model().unnormalized_log_prob(x)
    assert torch.equal(values, -(1000 + x.sum(1)))


class Offset(torch.nn.Module):
    def forward(self, x):
        return 1000 + x.sum(1)


@pytest.mark.parametrize("energy", [RestrictedBoltzmannMachine(4), BoltzmannMachine(2)], ids=["restricted", "general"])
def test_boltzmann_machines_are_densities_and_not_rounded(energy):
    model = EnergyModel((6,), energy=energy, support=constraints.boolean, num_steps=5)
    perturb(model, 0.5)
    x = torch.randint(2, (50, 6)).float()
    truth = model().unnormalized_log_prob(x)
    pyro.set_rng_seed(0)
    drawn = model().sample((20,))
    pyro.set_rng_seed(0)
    with low():
        assert torch.equal(model().unnormalized_log_prob(x), truth)
        assert torch.equal(model().sample((20,)), drawn)


@pytest.mark.parametrize("solver", [Dopri5(), RK4(2, adjoint=True)], ids=["adaptive", "adjoint"])
def test_solvers_that_cannot_bear_a_rounded_velocity_are_not_given_one(solver):
    flow = perturb(ODEFlow((2,), network=DenseField(8, blocks=1), solver=solver), 0.1)
    x = torch.randn(4, 2)
    results = []
    for context in (nullcontext(), low()):
        with context:
            log_p = flow().log_prob(x)
        results.append((log_p, flow.evaluations.last, *torch.autograd.grad(log_p.sum(), list(flow.parameters()))))
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*results, strict=True))


def test_draws_of_a_posterior_with_a_covariance_are_not_rounded():
    vae = perturb(VAE((3,), posterior=FullNormalPosterior(), latent_dim=4, hidden=(8,)))
    posterior = vae.posterior(torch.randn(5, 3))
    pyro.set_rng_seed(0)
    z = posterior.rsample((2,))
    pyro.set_rng_seed(0)
    with low():
        assert torch.equal(posterior.rsample((2,)), z)
        assert posterior.expand((2, 5)).rsample().dtype == torch.float32
        log_p = posterior.log_prob(z)
    assert torch.equal(log_p, posterior.log_prob(z))


def test_likelihoods_under_autocast():
    vae, flow = VAE((3,), hidden=(16,), latent_dim=2).eval(), Flow((3,), transform=MAF(1, (8,))).eval()
    x = torch.randn(20, 3)
    for family in (vae, flow):
        found = []
        for context in (nullcontext(), low()):
            pyro.set_rng_seed(0)
            with context:
                found.append(log_likelihood(family, x).values)
        assert found[1].dtype == found[0].dtype
        torch.testing.assert_close(found[1], found[0], atol=0.05, rtol=0)


def test_an_adversarial_step_compares_outputs_of_the_critic_in_full_precision():
    gan = GAN((2,), generator=DenseGenerator((8,)), critic=DenseCritic((8,)), latent_dim=2)
    with low(), OutsideNetworks() as seen:
        train(gan, torch.randn(32, 2), epochs=1, progress=False)
    assert seen.num_rounded
    assert not seen.found


def test_float16_is_refused_where_no_loss_is_scaled():
    flow = Flow((2,), transform=MAF(1, (8,)))
    with low(torch.float16), pytest.raises(ValueError, match=r"float16.*bfloat16"):
        train(flow, torch.randn(16, 2), epochs=1, progress=False)
