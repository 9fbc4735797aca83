"""Activations computed again: the same loss and gradients from fewer saved tensors."""

import pyro
import pytest
import torch

from pyro_genmodels import (
    Autoregressive,
    BernoulliLikelihood,
    CompiledSVI,
    DenoisingScoreMatching,
    Diffusion,
    MaximumLikelihood,
    UNet,
    VariationalBound,
    train,
)
from pyro_genmodels.families import PixelCNN, Transformer
from pyro_genmodels.infer.compiled import Captured, Eager
from pyro_genmodels.training import checkpoints

SHAPE = (4, 4)
SEVERAL = {"Transformer": 0.5, "PixelCNN": 0.7, "UNet": 0.6}
"""Largest share of the saved bytes that remains."""


def choice(name, **options):
    return {
        "Transformer": lambda: Transformer(4, 16, 2, dropout=0.1, **options),
        "PixelCNN": lambda: PixelCNN(4, 8, 3, dropout=0.1, **options),
        "UNet": lambda: UNet((8, 8), dropout=0.1, **options),
    }[name]()


def family(name, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    network = choice(name, **options)
    if name == "UNet":
        made = Diffusion(SHAPE, context=2, network=network, likelihood=VariationalBound(2), standardize=False)
    else:
        made = Autoregressive(SHAPE, context=2, network=network, likelihood=BernoulliLikelihood())
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def objective(name):
    return DenoisingScoreMatching() if name == "UNet" else MaximumLikelihood()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, (8, *SHAPE), generator=generator).float(), torch.randn(8, 2, generator=generator)


def loss_gradients_and_bytes(name, context=None, **options):
    """Return the loss, the gradients, and the bytes of tensors that are held for the backward pass and are no parameters."""
    made, held = family(name, **options), {}
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    pyro.set_rng_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = objective(name).differentiable_loss(made.model, made.guide, *data())
    parameters = [p for p in made.parameters() if p.requires_grad]
    return loss, torch.autograd.grad(loss, parameters), sum(held.values())


@pytest.mark.parametrize("name", SEVERAL)
def test_loss_and_gradients_are_the_same_from_fewer_saved_bytes(name):
    """Also with dropout, whose draws are repeated."""
    loss, gradients, held = loss_gradients_and_bytes(name)
    again, same, fewer = loss_gradients_and_bytes(name, recompute=True)
    assert torch.equal(loss, again)
    torch.testing.assert_close(gradients, same, rtol=1e-5, atol=1e-6)
    assert fewer < SEVERAL[name] * held


@pytest.mark.parametrize("name", SEVERAL)
def test_under_autocast_layers_are_computed_again_in_half_precision(name):
    results = []
    for recompute in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = family(name, recompute=recompute)
            pyro.set_rng_seed(2)
            loss = objective(name).differentiable_loss(made.model, made.guide, *data())
        results.append((loss, *torch.autograd.grad(loss, list(made.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_what_is_held_hardly_grows_with_the_number_of_layers():
    def held(layers):
        network = Transformer(layers, 64, 2, recompute=True)
        made, total = Autoregressive((16,), network=network, likelihood=BernoulliLikelihood()), []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t)
        x = torch.zeros(32, 16)
        with hooks:
            made().log_prob(x)
        return sum(total)

    per_layer = (held(6) - held(2)) / 4
    assert per_layer <= 1.5 * 32 * 16 * 64 * 4  # the tokens that enter a layer, and little else


@pytest.mark.parametrize("name", SEVERAL)
def test_second_derivatives_and_transforms_of_functions(name):
    x, context = data()
    results = []
    for recompute in (False, True):
        made = family(name, recompute=recompute).eval()
        if name == "UNet":
            features, rest, network = x, (torch.full((8,), 0.5), context), made.network
        else:
            features, rest, network = x.reshape(8, 16, 1), (context,), made.conditionals
        features.requires_grad_()
        out = network(features, *rest)
        (slope,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
        second = torch.autograd.grad(slope.square().sum(), list(network.parameters()), allow_unused=True)
        mapped = torch.func.vjp(lambda y, rest=rest, network=network: network(y, *rest), features.detach())[1](slope.detach())
        results.append((out, slope, mapped[0], *(torch.zeros(()) if g is None else g for g in second)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_samples_are_the_same():
    draws = []
    for recompute in (False, True):
        made = family("Transformer", recompute=recompute).eval()
        pyro.set_rng_seed(3)
        draws.append(made(data()[1]).sample())
    assert torch.equal(*draws)


def test_a_capture_is_refused_by_name():
    made = family("PixelCNN", recompute=True).eval()
    svi = CompiledSVI(made.model, made.guide, pyro.optim.Adam({"lr": 1e-3}), MaximumLikelihood(), mode=Captured())
    svi.step(*data())
    with pytest.raises(NotImplementedError, match="recompute=True cannot be captured"):
        svi.step(*data())


@pytest.mark.slow
def test_train_runs_eagerly():
    fit = train(family("PixelCNN", recompute=True), data(), epochs=30, progress=False)
    assert isinstance(fit.mode, Eager)


def test_the_option_is_not_saved(tmp_path):
    path = tmp_path / "family.safetensors"
    made = family("Transformer", recompute=True)
    checkpoints.save(path, made)
    loaded = checkpoints.load(path)
    assert not loaded.arguments["network"].recompute
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), loaded.parameters(), strict=True))


def test_bad_options():
    for choice_of in (Transformer, PixelCNN, UNet):
        with pytest.raises(TypeError, match="wants recompute as True or False, but found 2"):
            choice_of(recompute=2)
