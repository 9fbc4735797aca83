r"""Objectives that contrast the data with other samples: those of the model, or noise.

*Contrastive divergence* follows :math:`-\nabla \log p(x) = \nabla E(x) - \mathbb{E}_{x' \sim p}[\nabla E(x')]`. The mean is
taken over negatives, which are chains that begin at the data (this biases the mean), or chains that continue from step to step.
Hinton, *Training Products of Experts by Minimizing Contrastive Divergence* (2002); Tieleman (2008).

*Noise-contrastive estimation* trains the energy as a classifier between data and samples of a known density q, with log odds

.. math:: G(x) = \log p_0(x) - E(x) - \log Z - \log q(x) - \log \nu, \qquad
    \ell(x) = -\log \sigma(G(x)) - \sum_{i=1}^{\nu} \log \sigma(-G(x_i)), \quad x_i \sim q,

where log Z is one more parameter. Gutmann and Hyvärinen (2010; JMLR 2012).
"""

from __future__ import annotations

__all__ = ["ContrastiveDivergence", "NoiseContrastive"]

from itertools import count
from math import log
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_genmodels._pyro import traces
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.distributions.energy.partition import quick_log_partition
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.infer.objective import Objective
from pyro_genmodels.utils.distributions import check_exact_density, density_of, unwrap
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.rng import forked_rng


class ContrastiveDivergence(Objective):
    r"""Contrastive divergence of the energies at the observed sites; other observed sites contribute their log density.

    If the negatives follow the model, the gradient is that of the negative log-likelihood. The value of the loss while
    gradients are enabled is the difference between the mean log densities of negatives and data, in the coordinates of the
    chains. Without gradients (`evaluate_loss`, validation) it is the negative log-likelihood in nats, with log Z from a short
    run of annealed importance sampling, and no chain moves.

    Args:
        steps: steps of the sampler at each call. The default is that of the energy's negatives, or 1 from the data.
        persistent: True uses the energy's own negatives, by default chains that continue from call to call. False starts
            chains at the data (CD-k).
        regularization: weight :math:`\alpha` of the penalty :math:`\alpha (E(x)^2 + \mathbb{E}_{x'} E(x')^2)`, which keeps
            energies from diverging (Du and Mordatch, arXiv 1903.08689).
        kwargs: further arguments of `Objective`.

    Raises:
        ValueError: if the model has no energy, or a site has no density; the error says which objective to use.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro_genmodels import ContrastiveDivergence, EnergyModel
        >>> model, x = EnergyModel((2,)), torch.randn(100, 2)
        >>> svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-3}), ContrastiveDivergence())
        >>> loss = svi.step(x)
    """

    training_unit = "difference of energies"

    def __init__(
        self, *, steps: int | None = None, persistent: bool = True, regularization: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if steps is not None:
            check_positive_int("ContrastiveDivergence", steps=steps)
        if not 0 <= regularization < float("inf"):
            raise ValueError(f"ContrastiveDivergence wants a regularization of 0 or more, but found {regularization}.")
        self.steps, self.persistent, self.regularization = steps, persistent, regularization

    def check(self, name: str, dist: Distribution) -> None:
        if density_of(dist)[0] not in ("exact", "lower bound"):
            check_energy(type(self).__name__, name, dist)

    def _score(self, model_trace: Trace, guide_trace: Trace) -> None:
        sites = traces.sample_sites(model_trace)
        observed = {name: unwrap(sites[name]["fn"]) for name in traces.observed(model_trace)}
        if observed and not any(capabilities(dist).has_negatives for dist in observed.values()):
            check_energy(type(self).__name__, *next(iter(observed.items())))
        super()._score(model_trace, guide_trace)

    def per_datum(self, dist: Any, x: Tensor) -> Tensor:
        dist = capabilities(dist)
        if not dist.has_negatives:
            return -dist.log_prob(x)
        if not torch.is_grad_enabled():
            if dist.intractable:
                log_z = quick_log_partition(dist)
                dist = dist.normalized(log_z)
            return -dist.log_prob(x)
        terms = dist.contrastive_terms(x, steps=self.steps, from_data=not self.persistent)
        loss = terms.negatives.mean(0) - terms.data
        return loss + self.regularization * terms.squared_energies() if self.regularization else loss


_numbers = count(1)


class NoiseContrastive(Objective):
    """Noise-contrastive estimation of the energies at the observed sites, with log Z as a parameter.

    Args:
        noise: distribution over one event with an exact density, or a family without a context. It should be close to the data,
            and its density positive wherever data can be. It is not trained.
        ratio: samples of noise for each datum.
        kwargs: further arguments of `Objective`.

    Attributes:
        log_partition: parameter log Z, (). For a conditional energy it is the part that does not depend on the context. The
            energy must learn the rest, which a network of data and context can and a Boltzmann machine cannot. Without
            gradients (`evaluate_loss`, validation) the family stores it, and its densities contain it until its parameters
            change.

    Raises:
        TypeError: if the noise is not a distribution.
        ValueError: if a site is not an energy, or is a Boltzmann machine with a context, or if the noise is over other events.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_genmodels import EnergyModel, NoiseContrastive
        >>> model, x = EnergyModel((2,)), torch.randn(100, 2)
        >>> objective = NoiseContrastive(dist.Normal(torch.zeros(2), 2.0).to_event(1))
        >>> loss = objective(model)
        >>> optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
        >>> loss(x).backward(); optimiser.step()
    """

    unit = "noise-contrastive loss"

    def __init__(self, noise: Any, *, ratio: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        noise = check_exact_density("NoiseContrastive", "noise", noise)
        check_positive_int("NoiseContrastive", ratio=ratio)
        self.noise, self.ratio = noise, ratio
        self.log_partition = nn.Parameter(torch.zeros(()))
        self.network: Any = None
        self.has_started = False  # before the first training step log Z is arbitrary
        self._name_parameter()

    def _name_parameter(self) -> None:
        self.own_parameters = {f"NoiseContrastive_{next(_numbers)}.log_partition": self.log_partition}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copying and pickling, without the weak reference that Pyro sets on the parameter."""
        log_partition = nn.Parameter(self.log_partition.detach().clone(), self.log_partition.requires_grad)
        return {**vars(self), "log_partition": log_partition, "own_parameters": {}, "network": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy its own log Z, under a new name."""
        self.__dict__.update(state)
        self._name_parameter()

    def check(self, name: str, dist: Any) -> None:
        check_energy(type(self).__name__, name, dist)
        if self.network is not None and dist.network is not self.network:
            raise ValueError(
                f"NoiseContrastive learns the log Z of one energy, but site {name!r} holds another. Use an objective for each "
                "fit; for two energies in one model use ContrastiveDivergence()."
            )
        if dist.event_shape != self.noise.event_shape:
            raise ValueError(
                f"Site {name!r} is over events {tuple(dist.event_shape)}, but the noise over {tuple(self.noise.event_shape)}."
            )
        if self.network is None and not self._inside(dist.support):
            raise ValueError(
                f"Site {name!r} is over {dist.support}, but samples of the noise, {type(self.noise).__name__}, lie outside. "
                "Use noise over the support of the energy."
            )
        if dist.context is not None and hasattr(dist.network, "gibbs"):
            raise ValueError(
                f"NoiseContrastive cannot learn log Z of every context, and the Boltzmann machine at site {name!r} has no term "
                "that depends on the context alone. Use ContrastiveDivergence()."
            )
        self.network = dist.network

    def _inside(self, support: Any) -> bool:
        """Return True if 100 samples of the noise lie in the support, without advancing the random number generator."""
        with forked_rng():
            return bool(support.check(self.noise.sample((100,))).all())

    def per_datum(self, dist: Any, x: Tensor) -> Tensor:
        ((name, parameter),) = self.own_parameters.items()
        log_z = pyro.param(name, parameter).to(x.device)
        y = x.expand(torch.broadcast_shapes(x.shape[: x.dim() - dist.event_dim], dist.batch_shape) + dist.event_shape)
        support: Any = self.noise.support
        if is_validation_enabled() and not support.check(y).all():
            raise ValueError(f"NoiseContrastive wants noise with the data in its support, but some lie outside of {support}.")
        with torch.no_grad():
            noise = self.noise.sample((self.ratio, *y.shape[: y.dim() - dist.event_dim]))
            log_q, log_q_noise = self.noise.log_prob(y), self.noise.log_prob(noise)
        self.has_started = self.has_started or torch.is_grad_enabled()
        if not torch.is_grad_enabled() and self.has_started and dist.density != "exact":
            dist.remember_log_partition(LogPartition(log_z.detach(), torch.full_like(log_z, torch.nan), "estimate"))
        odds = dist.unnormalized_log_prob(y) - log_z - log_q - log(self.ratio)
        odds_of_noise = dist.unnormalized_log_prob(noise) - log_z - log_q_noise - log(self.ratio)
        return -F.logsigmoid(odds) - F.logsigmoid(-odds_of_noise).sum(0)


def check_energy(objective: str, name: str, dist: Distribution) -> None:
    """Raise an error unless the distribution at a site is an energy, with a constant out of reach or with negatives.

    Raises:
        ValueError: naming the objective to use.
    """
    found = capabilities(dist)
    if not (found.intractable or found.has_negatives):
        is_normalized = density_of(dist)[0] in ("exact", "lower bound")
        choice = "MaximumLikelihood(), or " if is_normalized else ""
        advice = found.advice or f"Use {choice}Trace_ELBO with a guide where there are latent variables."
        raise ValueError(f"{objective} needs an energy, but site {name!r} holds {type(dist).__name__}. {advice}")
