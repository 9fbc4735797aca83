r"""Objectives: Pyro losses that are defined for one datum.

An objective runs the guide, runs the model conditioned on the guide's samples, and adds up over the sites

.. math:: L = \sum_{x \text{ observed}} s_x\, m_x\, \ell(p_x, x) - \sum_z s_z\, m_z\, (\log p_z - \log q_z),

where :math:`s` is the scale and :math:`m` the mask that plates and handlers give a site. A subclass defines :math:`\ell`
(`per_datum`). With :math:`\ell = -\log p` the sum is the negative ELBO. The gradient uses reparametrised samples where there
are any, and otherwise the score function, Rao-Blackwellised over plates. No code branches on a tensor's value, so a loss can
be captured as one graph (with Pyro's validation switched off).

Wingate and Weber (arXiv 1301.1299); Ranganath et al., *Black Box Variational Inference* (arXiv 1401.0118).
"""

from __future__ import annotations

__all__ = ["Loss", "Objective"]

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import is_validation_enabled, torch_item
from pyro.poutine import Trace
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.messages import without_trace_shapes
from pyro_genmodels._pyro.wrappers import through_wrappers


class Loss(ELBO):
    """Base of all losses, for use with `SVI` or as a differentiable function.

    Args:
        num_particles: number of runs of guide and model that are averaged.
        vectorize_particles: True for a single run of all particles, in an outermost plate.
        max_plate_nesting: number of dimensions that plates take. By default a run of the model finds it.

    Further arguments are those of `pyro.infer.ELBO`.
    """

    unit: str = "nats"
    """Unit of the loss, for tables and plots: "nats" only for a negative log-likelihood or a bound of it."""

    training_unit: str | None = None
    """Unit of the loss while gradients are enabled, if it is another one; otherwise None."""

    wants_average: bool = False
    """True for a loss that draws noise and times: averages of the parameters over many steps are then better than the last."""

    own_parameters: Mapping[str, nn.Parameter] = MappingProxyType({})
    """Parameters of the objective itself, by their names in Pyro's param store."""

    own_modules: Sequence[nn.Module] = ()
    """Modules of the objective itself, whose buffers a run of training saves and restores."""

    @abstractmethod
    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss, summed over the data, (). Its gradient is the gradient estimate."""

    def __call__(self, model: Any, guide: Any = None) -> ELBOModule:
        """Return a module whose call is the loss, with the parameters of the model and the guide.

        Args:
            model: module, bound method of a module, function, or (without a guide) family.
            guide: module, bound method or function. None is the family's own guide, or an empty one.
        """
        if guide is None:
            try:
                model, guide = traces.as_pair(model)
            except TypeError:
                guide = traces.no_latents
        return _ObjectiveModule(model, guide, self)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number, computed without gradients."""
        with torch.no_grad():
            return torch_item(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the loss as a number, and add its gradients to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return torch_item(loss)

    def _get_traces(self, model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[Trace, Trace]]:
        if self.vectorize_particles and self.num_particles > 1:
            nesting = self.max_plate_nesting - 1  # pyro.infer.ELBO has added the plate of the particles
            if nesting == float("inf"):
                nesting = traces.max_plate_nesting(model, guide, args, kwargs)
                self.max_plate_nesting = nesting + 1
            yield traces.run_pair(model, guide, args, kwargs, traces.particles(self.num_particles, nesting))
        else:
            for _ in range(self.num_particles):
                yield self._get_trace(model, guide, args, kwargs)

    def _get_trace(self, model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Trace, Trace]:
        return traces.run_pair(model, guide, args, kwargs)


class Objective(Loss):
    """Base of all losses that are defined for one datum. See `Loss` for the arguments."""

    @abstractmethod
    def per_datum(self, dist: Distribution, x: Tensor) -> Tensor:
        """Return the loss (nats) of each datum at an observed site, (batch...).

        Args:
            dist: distribution at the site, without Pyro's wrappers.
            x: observed value, (batch..., *event_shape).
        """

    def check(self, name: str, dist: Distribution) -> None:
        """Raise a ValueError if the distribution at the observed site `name` cannot be used; the error says what to use."""

    def check_latents(self, names: list[str]) -> None:
        """Raise a ValueError if the objective does not allow latent variables; the error says what to use."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        with without_trace_shapes():
            losses = [self._particle(*pair) for pair in self._get_traces(model, guide, args, kwargs)]
        loss = sum(losses) / len(losses)
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        return loss

    def _particle(self, model_trace: Trace, guide_trace: Trace) -> Any:
        """Return the loss of one run, averaged over vectorised particles, with the gradient estimate as its gradient."""
        self._score(model_trace, guide_trace)
        loss, log_q, surrogate = 0.0, 0.0, 0.0
        for site in traces.sample_sites(model_trace).values():
            loss = loss - site["log_prob_sum"]
        log_r = None
        for site in traces.sample_sites(guide_trace).values():
            log_q = log_q + site["log_prob_sum"].detach()
            _, score_function, entropy = site["score_parts"]
            if not is_identically_zero(entropy):
                surrogate = surrogate + entropy.sum()
            if not is_identically_zero(score_function):
                log_r = log_r or traces.downstream_log_ratio(model_trace, guide_trace)
                surrogate = surrogate - (log_r.sum_to(site["cond_indep_stack"]) * score_function).sum()
        if isinstance(surrogate, Tensor):
            surrogate = surrogate - surrogate.detach()
        return (loss + log_q + surrogate) / (self.num_particles if self.vectorize_particles else 1)

    def _score(self, model_trace: Trace, guide_trace: Trace) -> None:
        """Store in the traces the terms that Pyro's estimators read, with the objective's loss at observed sites."""
        latents = traces.latents(model_trace) or traces.reparametrised(model_trace)
        if latents:
            self.check_latents(latents)
        for name in traces.observed(model_trace):
            site = model_trace.nodes[name]
            if "log_prob_sum" not in site:
                self._score_observed(name, site)
        model_trace.compute_log_prob(site_filter=lambda _, site: "log_prob_sum" not in site)
        guide_trace.compute_score_parts()
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
            for trace in (model_trace, guide_trace):
                for site in traces.sample_sites(trace).values():
                    check_site_shape(site, self.max_plate_nesting)

    def _score_observed(self, name: str, site: Any) -> None:
        def term(dist: Distribution) -> Tensor:
            self.check(name, dist)
            return -self.per_datum(dist, site["value"])

        site["unscaled_log_prob"] = through_wrappers(site["fn"], term)
        site["log_prob"] = scale_and_mask(site["unscaled_log_prob"], site["scale"], site["mask"])
        site["log_prob_sum"] = site["log_prob"].sum()


class _ObjectiveModule(ELBOModule):
    """Pyro's module of a loss, which also holds the modules behind bound methods."""

    def __init__(self, model: Any, guide: Any, elbo: ELBO) -> None:
        super().__init__(model, guide, elbo)
        self.owners = nn.ModuleList(traces.modules_of(model, guide))
        self.own = nn.ParameterList(getattr(elbo, "own_parameters", {}).values())
