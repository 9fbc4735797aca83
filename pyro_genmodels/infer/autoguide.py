r"""A family of distributions as the guide of any model: one law of all its latent variables together.

.. math:: u \sim q_\phi, \qquad z_i = T_i(u_i),

with :math:`T_i` from the real numbers to the support of latent variable i, whose volume is counted. A flow gives a guide with a
density, for `pyro.infer.Trace_ELBO`; a GAN one without, for `Adversarial` with `Posterior` (Mescheder et al., *Adversarial
Variational Bayes*, arXiv 1701.04722).
"""

from __future__ import annotations

__all__ = ["AutoFamily"]

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoContinuous
from torch import nn


class AutoFamily(AutoContinuous):
    """A guide whose latent variables, unconstrained and joined, follow a family's distribution.

    Args:
        model: with continuous latent variables of fixed shapes.
        build: the number of coordinates -> a family over that many, such as ``lambda n: GAN((n,))`` or ``lambda n:
            Flow((n,))``; called at the guide's first run.

    Raises:
        ValueError: by that run, if the family is over events of another shape, or has a context.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels import Flow, MAF
        >>> guide = AutoFamily(lambda: pyro.sample("scale", dist.LogNormal(0.0, 1.0)), lambda n: Flow((n,), transform=MAF()))
        >>> guide()["scale"] > 0
        tensor(True)
    """

    def __init__(self, model: Callable[..., Any], build: Callable[[int], nn.Module]) -> None:
        super().__init__(model)
        self.build = build

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        like = self._init_loc()  # of the latent variables' dtype and device
        self.family = self.build(self.latent_dim).to(like)
        shape: Any = self.family.event_shape
        if tuple(shape) != (self.latent_dim,) or self.family.context is not None:
            raise ValueError(
                f"AutoFamily wants a family over ({self.latent_dim},), the model's latent variables together, without a "
                f"context, but build({self.latent_dim}) made a {type(self.family).__name__} over {tuple(shape)}."
            )

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The family's distribution, of the unconstrained latent variables together."""
        return self.family()
