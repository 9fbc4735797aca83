r"""Objectives that tell data from other draws: from the model's own, or from noise.

*Contrastive divergence* follows :math:`-\nabla \log p(x) = \nabla E(x) - \mathbb{E}_{x' \sim p}[\nabla E(x')]`, the mean
taken over negatives: chains begun at the data, which bias it, or chains that go on from step to step. Hinton, *Training
Products of Experts by Minimizing Contrastive Divergence* (2002); Tieleman (2008).

*Noise-contrastive estimation* has the energy tell data from draws of a known density q, as a classifier with log odds

.. math:: G(x) = \log p_0(x) - E(x) - \log Z - \log q(x) - \log \nu, \qquad
    \ell(x) = -\log \sigma(G(x)) - \sum_{i=1}^{\nu} \log \sigma(-G(x_i)), \quad x_i \sim q,

in which log Z is one more parameter. Gutmann and Hyvärinen (2010; JMLR 2012).
"""

from __future__ import annotations

__all__ = ["ContrastiveDivergence", "NoiseContrastive"]

from dataclasses import replace
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
from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.energy.negatives import Contrastive
from pyro_genmodels.distributions.energy.partition import quick_log_partition
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.infer.objective import Objective
from pyro_genmodels.utils.distributions import density_of, unwrap


class ContrastiveDivergence(Objective):
    r"""Contrastive divergence of the energies at the observed sites; other observed sites count by their density.

    Its gradient is that of the negative log-likelihood, as far as the negatives follow the model. Its value under gradients is
    the difference of the mean log densities of negatives and data, in the coordinates of the chains; without gradients
    (`evaluate_loss`, validation) it is the negative log-likelihood in nats, with log Z by a short run of annealed importance
    sampling, and no chain is moved.

    Args:
        steps: of the sampler, each time; by default as the energy's own negatives say, or 1 from the data.
        persistent: whether negatives are the energy's own, by default chains that go on; else chains begin at the data (CD-k).
        regularization: :math:`\alpha` of the penalty :math:`\alpha (E(x)^2 + \mathbb{E}_{x'} E(x')^2)`, which keeps energies
            from running away (Du and Mordatch, arXiv 1903.08689).
        kwargs: see `Objective`.

    Raises:
        ValueError: for a model without an energy, or a site without a density, naming the objective to use.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro_genmodels import ContrastiveDivergence, EnergyModel
        >>> model, x = EnergyModel((2,)), torch.randn(100, 2)
        >>> svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 1e-3}), ContrastiveDivergence())
        >>> loss = svi.step(x)
    """

    def __init__(
        self, *, steps: int | None = None, persistent: bool = True, regularization: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if steps is not None and not (isinstance(steps, int) and steps >= 1):
            raise ValueError(f"ContrastiveDivergence wants steps of 1 or more, but found {steps!r}.")
        if not 0 <= regularization < float("inf"):
            raise ValueError(f"ContrastiveDivergence wants a regularization of 0 or more, but found {regularization}.")
        self.steps, self.persistent, self.regularization = steps, persistent, regularization

    def check(self, name: str, dist: Distribution) -> None:
        if density_of(dist)[0] not in ("exact", "lower bound"):
            check_energy(type(self).__name__, name, dist)

    def _score(self, model_trace: Trace, guide_trace: Trace) -> None:
        found = {name: unwrap(site["fn"]) for name, site in traces.sample_sites(model_trace).items() if site["is_observed"]}
        if found and not any(isinstance(dist, Energy) for dist in found.values()):
            check_energy(type(self).__name__, *next(iter(found.items())))
        super()._score(model_trace, guide_trace)

    def per_datum(self, dist: Any, x: Tensor) -> Tensor:
        if not isinstance(dist, Energy):
            return -dist.log_prob(x)
        if not torch.is_grad_enabled():
            return -dist.normalized(quick_log_partition(dist)).log_prob(x)
        negatives: Any = dist.negatives if self.persistent else Contrastive(self.steps or 1)
        if self.persistent and self.steps is not None:
            if not hasattr(negatives, "steps"):
                raise ValueError(f"ContrastiveDivergence(steps={self.steps}): {type(negatives).__name__} has no steps to set.")
            negatives = replace(negatives, steps=self.steps)
        path, (y, context, _) = dist.path, dist.aligned(x)
        u = negatives.draw(dist, y, context)
        log_f = dist.checked(path.log_f(u, context))
        loss = log_f.mean(0) - path.log_f(path.encode(y), context)
        if self.regularization:
            energies = path.energies(path.encode(y), context).square() + path.energies(u, context).square().mean(0)
            loss = loss + self.regularization * energies
        return loss


_numbers = count(1)


class NoiseContrastive(Objective):
    """Noise-contrastive estimation of the energies at the observed sites, which learns log Z along.

    Args:
        noise: density that can be drawn from, over one datum: a Pyro distribution or a family without a context, near the data
            if possible, and nowhere zero where they lie. It is not trained.
        ratio: draws of noise for each datum.
        kwargs: see `Objective`.

    Attributes:
        log_partition: the parameter log Z, (); of a conditional energy the part that does not depend on the context: the rest
            is for the energy itself to learn, which a network of both can and a Boltzmann machine cannot. Without gradients
            (`evaluate_loss`, validation) the family is told of it, and its densities count it until its parameters change.

    Raises:
        TypeError: if the noise is no distribution.
        ValueError: for a site that is not an energy, or a Boltzmann machine with a context, or noise over other events.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_genmodels import EnergyModel, NoiseContrastive
        >>> model, x = EnergyModel((2,)), torch.randn(100, 2)
        >>> objective = NoiseContrastive(dist.Normal(torch.zeros(2), 2.0).to_event(1))
        >>> loss = objective(model)
        >>> optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
        >>> loss(x).backward(); optimiser.step()
    """

    def __init__(self, noise: Any, *, ratio: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(noise, Distribution) and callable(noise) and not isinstance(noise, type):
            noise = noise()
        if not isinstance(noise, Distribution):
            found = f"the class {noise.__name__}" if isinstance(noise, type) else type(noise).__name__
            raise TypeError(f"NoiseContrastive wants a Pyro distribution or a family as its noise, but found {found}.")
        if noise.batch_shape:
            raise ValueError(
                f"NoiseContrastive wants noise over one datum, but found a batch of shape {tuple(noise.batch_shape)}. Use "
                f".to_event({len(noise.batch_shape)})."
            )
        density, advice = density_of(noise)
        if density != "exact":
            raise ValueError(f"NoiseContrastive wants noise whose density is exact, but this one's is: {density}. {advice}")
        if ratio < 1:
            raise ValueError(f"NoiseContrastive wants a ratio of 1 or more, but found {ratio}.")
        self.noise, self.ratio = noise, ratio
        self.log_partition = nn.Parameter(torch.zeros(()))
        self.network: Any = None
        self.learning = False  # before it has begun log Z is anyone's guess
        self._name()

    def _name(self) -> None:
        self.own = {f"NoiseContrastive_{next(_numbers)}.log_partition": self.log_partition}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy learns a log Z of its own, under a name of its own."""
        self.__dict__.update(state, network=None)
        self._name()

    def check(self, name: str, dist: Any) -> None:
        check_energy(type(self).__name__, name, dist)
        if self.network is not None and dist.network is not self.network:
            raise ValueError(
                f"NoiseContrastive learns the log Z of one energy, but site {name!r} holds another. Take an objective for each "
                "fit; two energies in one model are trained by ContrastiveDivergence()."
            )
        if dist.event_shape != self.noise.event_shape:
            raise ValueError(
                f"Site {name!r} is over events {tuple(dist.event_shape)}, but the noise over {tuple(self.noise.event_shape)}."
            )
        if self.network is None and not self._inside(dist.support):
            raise ValueError(
                f"Site {name!r} is over {dist.support}, but draws of the noise, {type(self.noise).__name__}, lie outside. Take "
                "noise over the support of the energy."
            )
        if dist.context is not None and hasattr(dist.network, "gibbs"):
            raise ValueError(
                f"NoiseContrastive cannot learn log Z of every context, and no term of the Boltzmann machine at site {name!r} "
                "depends on its context alone to do so. Use ContrastiveDivergence()."
            )
        self.network = dist.network

    def _inside(self, support: Any) -> bool:
        """Whether noise lies in a support, as far as some draws tell, for which no random number is used up."""
        with torch.random.fork_rng():
            return bool(support.check(self.noise.sample((100,))).all())

    def per_datum(self, dist: Any, x: Tensor) -> Tensor:
        ((name, parameter),) = self.own.items()
        log_z = pyro.param(name, parameter).to(x.device)
        path, (y, context, _) = dist.path, dist.aligned(x)
        support: Any = self.noise.support
        if is_validation_enabled() and not support.check(y).all():
            raise ValueError(f"NoiseContrastive wants noise wherever data are, but some lie outside its support {support}.")
        with torch.no_grad():
            noise = self.noise.sample((self.ratio, *y.shape[: y.dim() - dist.event_dim]))
            log_q, log_q_noise = self.noise.log_prob(y), self.noise.log_prob(noise)
        self.learning = self.learning or torch.is_grad_enabled()
        if not torch.is_grad_enabled() and self.learning and dist.density != "exact":
            dist.keep(LogPartition(log_z.detach(), torch.full_like(log_z, torch.nan), "estimate"))
        odds = path.log_density(y, context) - log_z - log_q - log(self.ratio)
        odds_of_noise = path.log_density(noise, context) - log_z - log_q_noise - log(self.ratio)
        return -F.logsigmoid(odds) - F.logsigmoid(-odds_of_noise).sum(0)


def check_energy(objective: str, name: str, dist: Distribution) -> None:
    """Raises a ValueError if the distribution at a site is not an energy."""
    if not isinstance(dist, Energy):
        density = density_of(dist)[0]
        cure = "MaximumLikelihood(), or " if density in ("exact", "lower bound") else ""
        cure = f"Use {cure}Trace_ELBO with a guide where there are latent variables."
        advice = dist.advice if isinstance(dist, GenerativeDistribution) and dist.advice else cure
        raise ValueError(f"{objective} needs an energy, but site {name!r} holds {type(dist).__name__}. {advice}")
