"""What nflows, normflows and torchebm do in `benchmarks/speed`: with the same networks and the same lengths of chains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers import data
from benchmarks.peers.data import FLOW_BATCH, FLOW_BINS, FLOW_FEATURES, FLOW_HIDDEN, FLOW_TRANSFORMS

MADE = {"features": FLOW_FEATURES, "hidden_features": FLOW_HIDDEN, "num_blocks": 1, "use_residual_blocks": False}
"""A network of two hidden layers, as zuko's."""


def loss_and_gradient(modules: nn.ModuleList, log_prob: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    """Return a function that computes the loss and its gradient of a batch."""
    x, parameters = torch.randn(FLOW_BATCH, FLOW_FEATURES), list(modules.parameters())
    return lambda: torch.autograd.grad(-log_prob(x).sum(), parameters)


def nflows(name: str) -> Callable[[], object]:
    """Return a function that computes the loss and its gradient of a flow of nflows."""
    from nflows import transforms

    def layer() -> nn.Module:
        if name == "MAF":
            return transforms.MaskedAffineAutoregressiveTransform(**MADE)
        spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        return spline(**MADE, num_bins=FLOW_BINS, tails="linear", tail_bound=5.0)

    flips = [transforms.ReversePermutation(FLOW_FEATURES) for _ in range(FLOW_TRANSFORMS)]
    modules = nn.ModuleList([module for flip in flips for module in (layer(), flip)])
    transform = transforms.CompositeTransform(modules)

    def log_prob(x: Tensor) -> Tensor:
        z, log_det = transform(x)
        return torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) + log_det

    return loss_and_gradient(modules, log_prob)


def normflows(name: str) -> Callable[[], object]:
    """Return a function that computes the loss and its gradient of a flow of normflows."""
    import normflows as nf
    from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive

    def layer() -> nn.Module:
        if name == "MAF":
            return nf.flows.MaskedAffineAutoregressive(**MADE)
        return MaskedPiecewiseRationalQuadraticAutoregressive(**MADE, num_bins=FLOW_BINS, tails="linear", tail_bound=5.0)

    flips = [nf.flows.Permute(FLOW_FEATURES, mode="swap") for _ in range(FLOW_TRANSFORMS)]
    modules = nn.ModuleList([module for flip in flips for module in (layer(), flip)])
    base = nf.distributions.DiagGaussian(FLOW_FEATURES, trainable=False)

    def log_prob(x: Tensor) -> Tensor:
        log_det = x.new_zeros(len(x))
        for module in modules:  # the autoregressive direction is fast from data to base, which nflows' transforms call forward
            x, change = module(x)
            log_det = log_det + change
        return base.log_prob(x) + log_det

    return loss_and_gradient(modules, log_prob)


def torchebm(name: str) -> Callable[[], object]:
    """Return a function that runs Langevin chains of torchebm on an energy of two layers."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    chains, dims, steps = data.LANGEVIN[name]

    class Energy(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            width = data.LANGEVIN_HIDDEN
            layers = [nn.Linear(dims, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
            self.net = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).squeeze(-1)

    sampler, x = LangevinDynamics(Energy(), step_size=data.LANGEVIN_STEP_SIZE), torch.randn(chains, dims)
    return lambda: sampler.sample(x=x.clone(), n_steps=steps)
