r"""A family as the guide of any model: one joint distribution of all its latent variables.

.. math:: u \sim q_\phi, \qquad z_i = T_i(u_i),

where :math:`T_i` maps the real numbers to the support of latent variable i, and its Jacobian is part of the density. A flow
gives a guide with a density, for `pyro.infer.Trace_ELBO`. A GAN gives a guide without one, for `Adversarial` with
`PosteriorPairing` (Mescheder et al., *Adversarial Variational Bayes*, arXiv 1701.04722).
"""

from __future__ import annotations

__all__ = ["AutoFamily", "NamedGuide", "drawn_if_discrete"]

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

from pyro_genmodels._pyro import params, traces
from pyro_genmodels.infer.compiled.coordinates import check_same_support
from pyro_genmodels.utils.errors import check_positive_int, type_with_article
from pyro_genmodels.utils.keywords import signature_of

NUM_QUANTILE_DRAWS = 10_000
"""Number of draws from which medians and quantiles are computed."""
SHIFT = 0.3
"""Distance, in unconstrained coordinates, of values at which a support is looked at again."""


class NamedGuide(AutoGuide):
    """Base class of guides whose parameters no other guide shares.

    Each has a name of its own in Pyro's param store, also a copy and an unpickled guide. A copy keeps the model. A pickled
    guide is without its model, as in Pyro, and can be run if it was built before.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        params.remove_foreign_parameters(self)
        return super().__call__(*args, **kwargs)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each latent variable, coordinate by coordinate, by name.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        return {name: values[0] for name, values in self.quantiles([0.5], *args, **kwargs).items()}

    @staticmethod
    def _prototype_hide_fn(site: Any) -> bool:
        """Return True for a site that the guide does not sample.

        Raises:
            ValueError: naming a discrete latent variable that is not enumerated.
        """
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            return True
        if not site["fn"].support.is_discrete:
            return False
        if site["infer"].get("enumerate"):
            return True
        raise ValueError(
            f"The latent variable {site['name']!r} is discrete, and this guide is one of continuous variables. Mark it by "
            "pyro.infer.config_enumerate and train by TraceEnum_ELBO, which sums it out; or hide it from the guide, as in "
            f"poutine.block(model, hide=[{site['name']!r}]), and write a guide for it."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> NamedGuide:
        """Return a copy with parameters and a name of its own, for the same model."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(deepcopy(self.__getstate__(), memo))
        new._model = self._model
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None, "master": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a guide under its old name, or under a new one if that is taken."""
        super().__setstate__(state)
        name = params.pyro_name(self)
        params.clear_name(self)
        params.register_name(self, params.unused_name(self) if params.is_registered(name) else name)


def drawn_if_discrete(init_loc_fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a strategy for initial values that draws discrete variables, of which most of Pyro's strategies know nothing."""

    def init(site: Any) -> Any:
        return site["fn"].sample() if site["fn"].support.is_discrete else init_loc_fn(site)

    return init


def takes_no_arguments(model: Callable[..., Any]) -> bool:
    """Return True if a function has no parameters, so that there are no arguments to wait for."""
    return not signature_of(model).parameters


def check_supports(owner: str, model: Callable[[], Any], trace: Trace) -> None:
    """Run a model once more, at other values, and check that its variables have the same shapes and supports.

    Args:
        owner: name of the guide's class.
        model: model without arguments.
        trace: trace of its first run, with the latent variables of the guide only.

    Raises:
        ValueError: naming the first variable that differs, or whose support has no map from the real numbers.
    """
    sites: dict[str, Any] = dict(trace.iter_stochastic_nodes())
    shifted = {}
    for name, site in sites.items():
        try:
            transform = biject_to(site["fn"].support)
        except NotImplementedError as error:
            raise ValueError(
                f"{owner} maps real numbers to the support of each latent variable, but knows no such map for {name!r}, "
                f"{site['fn']}. Sample other variables and compute this one from them: a covariance matrix, for instance, from "
                "a Cholesky factor of dist.LKJCholesky and scales."
            ) from error
        shifted[name] = transform(transform.inv(site["value"]) + SHIFT)
    with poutine.block(), torch.no_grad(), pyro.validation_enabled(is_validate=False):
        again = poutine.trace(poutine.replay(model, trace=traces.holding(shifted))).get_trace()
    for name, site in sites.items():
        other: Any = again.nodes.get(name)
        if other is None or other["fn"].shape() != site["fn"].shape():
            found = "is missing" if other is None else f"has the shape {tuple(other['fn'].shape())}"
            raise ValueError(
                f"{owner} wants the same latent variables in every run, but {name!r}, of shape {tuple(site['fn'].shape())}, "
                f"{found} if others have other values. Sample it always, in one shape, and use a part of it."
            )
        transform = biject_to(site["fn"].support)
        check_same_support(name, transform, other["fn"].support, transform.inv(site["value"]))


class AutoFamily(NamedGuide, AutoContinuous):
    """A guide whose latent variables, unconstrained and concatenated, follow a family's distribution.

    It has the methods of Pyro's guides of continuous variables. `median` and `quantiles` are those of 10,000 draws. Pyro's
    `NeuTraReparam` takes it if its distribution is a base distribution after a transform, as that of a flow is.

    If the model's arguments are given, or it has none, the guide is built at once, and can be moved, saved and loaded as a
    module. Otherwise it is built at its first run, as Pyro's guides are. Each guide has a name of its own in Pyro's param
    store, also a copy. Discrete latent variables that are marked for enumeration are left to `TraceEnum_ELBO`.

    Args:
        model: model with continuous latent variables of fixed shapes.
        build: function of the number of coordinates that returns a family over as many, such as ``lambda n: GAN((n,))``. Any
            module will do whose call without arguments returns a distribution, if it has an ``event_shape`` and a ``context``
            that is None.
        args: positional arguments of the model.
        init_loc_fn: strategy of Pyro's for the values at which the model is run for the shapes of its variables.
        kwargs: keyword arguments of the model.

    Raises:
        ValueError: when it is built, if the family is over events of another shape, or has a context; if a plate around
            latent variables is subsampled, because the guide has the same coordinates for whatever rows are chosen; or naming a
            latent variable that is discrete and not enumerated, or whose support has no map from the real numbers or depends on
            other variables.

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
        super().__init__(model, drawn_if_discrete(init_loc_fn))
        self.build = build
        params.register_name(self, params.unused_name(self))
        if args or kwargs or takes_no_arguments(model):
            self._setup_prototype(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the function that builds the family, which most often cannot be pickled."""
        return super().__getstate__() | ({} if self.prototype_trace is None else {"build": None})

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        AutoGuide._setup_prototype(self, *args, **kwargs)
        prototype: Any = self.prototype_trace
        self.prototype_trace = None  # after an error, the next run checks again
        check_supports(type(self).__name__, lambda: self.model(*args, **kwargs), prototype)
        super()._setup_prototype(*args, **kwargs)
        like = self._init_loc()  # has the dtype and device of the latent variables
        prototype, self.prototype_trace = self.prototype_trace, None
        self._check_plates()
        family: Any = self.build(self.latent_dim).to(like)
        shape = tuple(family.event_shape)
        if shape != (self.latent_dim,) or family.context is not None:
            raise ValueError(
                f"{type(self).__name__} wants a family over ({self.latent_dim},), all latent variables of the model, without a "
                f"context, but build({self.latent_dim}) returned {type_with_article(family)} over {shape}."
            )
        self.family, self.prototype_trace = family, prototype
        with poutine.block():
            self._create_plates(*args, **kwargs)  # NeuTraReparam reads them

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

    def get_base_dist(self) -> Any:
        """Return the base distribution of the unconstrained latent variables, for `NeuTraReparam`.

        Raises:
            NotImplementedError: if their distribution is not a base distribution after a transform.
        """
        return _transformed(self.family())[0]

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Return the transform from the base distribution to the unconstrained latent variables, for `NeuTraReparam`.

        Args:
            args: positional arguments of the model, which make no difference.
            kwargs: keyword arguments of the model, which make no difference.

        Raises:
            NotImplementedError: if their distribution is not a base distribution after a transform.
        """
        return torch.distributions.ComposeTransform(_transformed(self.family())[1])

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return draws of the latent variables, (num_samples, ...) by name.

        Args:
            num_samples: number of draws.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        check_positive_int("sample_posterior", num_samples=num_samples)
        return self._constrained(self._draws(num_samples, *args, **kwargs))

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of each latent variable, coordinate by coordinate, (quantiles, ...) by name.

        They are those of the unconstrained coordinates, mapped to the supports.

        Args:
            quantiles: probabilities.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        latent = self._draws(NUM_QUANTILE_DRAWS, *args, **kwargs)
        wanted = torch.as_tensor(quantiles, dtype=latent.dtype, device=latent.device)
        return self._constrained(latent.quantile(wanted, dim=0))

    def _draws(self, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
        """Return draws of the unconstrained coordinates, (num_samples, latent_dim)."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self.get_posterior(*args, **kwargs).sample((num_samples,))

    def _constrained(self, latent: Tensor) -> dict[str, Tensor]:
        """Return the values of the latent variables at unconstrained coordinates, (n, latent_dim), by name: (n, ...)."""
        sizes = [shape.numel() for shape in self._unconstrained_shapes.values()]
        parts = zip(self._unconstrained_shapes.items(), latent.split(sizes, dim=1), strict=True)
        values = {name: part.reshape(len(latent), *shape) for (name, shape), part in parts}
        sites: Any = self.prototype_trace.nodes  # type: ignore[union-attr]
        return {name: biject_to(sites[name]["fn"].support)(u) for name, u in values.items()}


def _transformed(distribution: Any) -> tuple[Any, list[Transform]]:
    """Return the base of a distribution of transformed samples, and the transforms.

    Raises:
        NotImplementedError: if it is none.
    """
    if isinstance(distribution, torch.distributions.TransformedDistribution):
        base, before = distribution.base_dist, distribution.transforms
        try:
            inner, first = _transformed(base)
        except NotImplementedError:  # the innermost distribution
            return base, before
        return inner, [*first, *before]
    if not hasattr(distribution, "base_and_transform"):
        raise NotImplementedError(f"{type(distribution).__name__} is not a base distribution after a transform.")
    base, transform = distribution.base_and_transform()
    return base, [transform]
