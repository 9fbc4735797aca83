r"""Guides of all latent variables of a model by normalizing flows.

Agrawal and Domke, *Disentangling Impact of Capacity, Objective, Batchsize, Estimators, and Step-size on Flow VI* (arXiv
2412.08824), for which flows: affine coupling layers.
"""

from __future__ import annotations

__all__ = ["AutoFlow", "default_transform"]

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide.initialization import init_to_median
from torch import nn

from pyro_genmodels.families import NSF, Flow, RealNVP
from pyro_genmodels.infer.autoguide import AutoFamily


def default_transform(num_coordinates: int) -> Any:
    """Return the layers of a flow over this many coordinates: affine couplings, or a spline for one coordinate."""
    return NSF() if num_coordinates == 1 else RealNVP(transforms=8, hidden=(32, 32))


class AutoFlow(AutoFamily):
    """A guide whose latent variables, unconstrained and concatenated, follow a normalizing flow.

    See `AutoFamily`. Train it by `SVI` or `CompiledSVI` with `Trace_ELBO`; or let ``posterior(model, *args,
    method=FlowGuide())`` do so, with a start, many draws and a step size that suit most models.

    Args:
        model: model with continuous latent variables of fixed shapes.
        args: positional arguments of the model, to build the guide at once.
        transform: layers of the flow, such as ``RealNVP(transforms=6)``; by default eight affine coupling layers, which
            are drawn from and have a density in one pass of their networks. One coordinate has a spline.
        init_loc_fn: see `AutoFamily`.
        kwargs: keyword arguments of the model.

    Raises:
        ValueError: as `AutoFamily`.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> y = torch.randn(20)
        >>> guide = AutoFlow(model, y)
        >>> guide.latent_dim, guide(y)["scale"] > 0
        (1, tensor(True))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        transform: Any = None,
        init_loc_fn: Callable[[Any], Any] = init_to_median,
        **kwargs: Any,
    ) -> None:
        def build(n: int) -> nn.Module:
            return Flow((n,), transform=default_transform(n) if transform is None else transform, standardize=False)

        super().__init__(model, build, *args, init_loc_fn=init_loc_fn, **kwargs)
