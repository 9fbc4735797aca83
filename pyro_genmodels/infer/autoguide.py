r"""A family as the guide of any model: one joint distribution of all its latent variables.

.. math:: u \sim q_\phi, \qquad z_i = T_i(u_i),

where :math:`T_i` maps the real numbers to the support of latent variable i, and its Jacobian is part of the density. A flow
gives a guide with a density, for `pyro.infer.Trace_ELBO`. A GAN gives a guide without one, for `Adversarial` with
`PosteriorPairing` (Mescheder et al., *Adversarial Variational Bayes*, arXiv 1701.04722).
"""

from __future__ import annotations

__all__ = ["AutoFamily"]

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoContinuous
from torch import nn

from pyro_genmodels.utils.errors import type_with_article


class AutoFamily(AutoContinuous):
    """A guide whose latent variables, unconstrained and concatenated, follow a family's distribution.

    Args:
        model: model with continuous latent variables of fixed shapes.
        build: function of the number of coordinates that returns a family over as many, such as ``lambda n: GAN((n,))`` or
            ``lambda n: Flow((n,))``. The guide's first run calls it.

    Raises:
        ValueError: at the first run, if the family is over events of another shape, or has a context; or if a plate around
            latent variables is subsampled, because the guide has the same coordinates for whatever rows are chosen.

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
        like = self._init_loc()  # has the dtype and device of the latent variables
        prototype, self.prototype_trace = self.prototype_trace, None  # after an error, the next run checks again
        self._check_plates()
        family: Any = self.build(self.latent_dim).to(like)
        shape = tuple(family.event_shape)
        if shape != (self.latent_dim,) or family.context is not None:
            raise ValueError(
                f"AutoFamily wants a family over ({self.latent_dim},), all latent variables of the model, without a context, "
                f"but build({self.latent_dim}) returned {type_with_article(family)} over {shape}."
            )
        self.family, self.prototype_trace = family, prototype

    def _check_plates(self) -> None:
        for name, frames in self._cond_indep_stacks.items():
            for frame in frames:
                if frame.full_size not in (None, frame.size):
                    raise ValueError(
                        f"AutoFamily has one joint distribution of all latent variables, but the model takes {frame.size} of "
                        f"{frame.full_size} rows of plate {frame.name!r}, in which {name!r} lies: it would hold the same "
                        "latent variables for any rows. Write a guide that is conditioned on each row, such as "
                        f"pyro.sample({name!r}, family(x[rows])), or run the model on all rows, without subsampling."
                    )

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Return the distribution of the unconstrained latent variables."""
        return self.family()
