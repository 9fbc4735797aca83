r"""A family as the guide of any model: one joint distribution of all its latent variables.

.. math:: u \sim q_\phi, \qquad z_i = T_i(u_i),

where :math:`T_i` maps the real numbers to the support of latent variable i, and its Jacobian is part of the density. A flow
gives a guide with a density, for `pyro.infer.Trace_ELBO`. A GAN gives a guide without one, for `Adversarial` with
`PosteriorPairing` (Mescheder et al., *Adversarial Variational Bayes*, arXiv 1701.04722).
"""

from __future__ import annotations

__all__ = ["AutoFamily"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_genmodels._pyro.params import register_name, unused_name
from pyro_genmodels.utils.errors import type_with_article

NUM_QUANTILE_DRAWS = 10_000
"""Number of draws from which medians and quantiles are computed."""


class AutoFamily(AutoContinuous):
    """A guide whose latent variables, unconstrained and concatenated, follow a family's distribution.

    It has the methods of Pyro's guides of continuous variables. `median` and `quantiles` are those of 10,000 draws.

    If the model's arguments are given, the guide is built at once, and can be moved, saved and loaded as a module. Otherwise it
    is built at its first run, as Pyro's guides are. Each guide has a name of its own in Pyro's param store.

    Args:
        model: model with continuous latent variables of fixed shapes.
        build: function of the number of coordinates that returns a family over as many, such as ``lambda n: GAN((n,))``. Any
            module will do whose call without arguments returns a distribution, if it has an ``event_shape`` and a ``context``
            that is None.
        args: positional arguments of the model.
        init_loc_fn: strategy of Pyro's for the values at which the model is run for the shapes of its variables.
        kwargs: keyword arguments of the model.

    Raises:
        ValueError: when it is built, if the family is over events of another shape, or has a context; or if a plate around
            latent variables is subsampled, because the guide has the same coordinates for whatever rows are chosen.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels import GAN
        >>> guide = AutoFamily(lambda: pyro.sample("scale", dist.LogNormal(0.0, 1.0)), lambda n: GAN((n,)))
        >>> guide()["scale"] > 0
        tensor(True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        build: Callable[[int], nn.Module],
        *args: Any,
        init_loc_fn: Callable[[Any], Any] = init_to_median,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, init_loc_fn)
        self.build = build
        register_name(self, unused_name(self))
        if args or kwargs:
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        like = self._init_loc()  # has the dtype and device of the latent variables
        prototype, self.prototype_trace = self.prototype_trace, None  # after an error, the next run checks again
        self._check_plates()
        family: Any = self.build(self.latent_dim).to(like)
        shape = tuple(family.event_shape)
        if shape != (self.latent_dim,) or family.context is not None:
            raise ValueError(
                f"{type(self).__name__} wants a family over ({self.latent_dim},), all latent variables of the model, without a "
                f"context, but build({self.latent_dim}) returned {type_with_article(family)} over {shape}."
            )
        self.family, self.prototype_trace = family, prototype

    def _check_plates(self) -> None:
        for name, frames in self._cond_indep_stacks.items():
            for frame in frames:
                if frame.full_size not in (None, frame.size):
                    raise ValueError(
                        f"{type(self).__name__} has one joint distribution of all latent variables, but the model takes "
                        f"{frame.size} of {frame.full_size} rows of plate {frame.name!r}, in which {name!r} lies: it would "
                        "hold the same latent variables for any rows. Write a guide that is conditioned on each row, such as "
                        f"pyro.sample({name!r}, family(x[rows])), or run the model on all rows, without subsampling."
                    )

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Return the distribution of the unconstrained latent variables."""
        return self.family()

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each latent variable, coordinate by coordinate, by name.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each latent variable, coordinate by coordinate, (quantiles, ...) by name.

        They are those of the unconstrained coordinates, mapped to the supports.

        Args:
            quantiles: probabilities.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        latent = self.get_posterior(*args, **kwargs).sample((NUM_QUANTILE_DRAWS,))
        wanted = torch.as_tensor(quantiles, dtype=latent.dtype, device=latent.device)
        values = latent.quantile(wanted, dim=0)
        columns = [self._constrained(row) for row in values]
        return {name: torch.stack([column[name] for column in columns]) for name in columns[0]}

    def _constrained(self, latent: Tensor) -> dict[str, Tensor]:
        """Return the values of the latent variables at unconstrained coordinates, (latent_dim,), by name."""
        return {site["name"]: biject_to(site["fn"].support)(value) for site, value in self._unpack_latent(latent)}
