r"""The evidence lower bound whose KL divergences have a weight and a floor: beta-VAE, annealing and free bits.

.. math:: L_\beta(x) = \mathbb{E}_{q(z \mid x)}[\log p(x \mid z)]
    - \beta \sum_j \max\Bigl(\lambda, \tfrac1N \sum_n \mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j))\Bigr)

A weight :math:`\beta > 1` asks for independent coordinates of z. One that rises from 0 in training keeps coordinates in use,
which the divergence would switch off before the decoder has learned to read them. A floor :math:`\lambda` in nats for the mean
of each coordinate does so too: below it the divergence has no gradient.

Higgins et al., *beta-VAE* (ICLR 2017); Bowman et al. (arXiv 1511.06349); Fu et al., *Cyclical Annealing Schedule* (arXiv
1903.10145); Kingma et al. (arXiv 1606.04934, appendix C.8, free bits).
"""

from __future__ import annotations

__all__ = ["CyclicalAnnealing", "KLWeightedELBO", "LinearAnnealing"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_genmodels._pyro import sites, traces
from pyro_genmodels._pyro.site_pairs import in_one_order, site_divergence
from pyro_genmodels.infer.likelihood import check_density
from pyro_genmodels.infer.objective import Objective
from pyro_genmodels.utils.errors import check_positive_int, listed, type_with_article

NO_SCORE: Any = (0, 0, 0)
"""Parts of the score of a site whose divergence is a term of its own: log density, score function and entropy."""


@dataclass(frozen=True)
class LinearAnnealing:
    """A weight that changes linearly with the number of steps, and then stays.

    Args:
        num_steps: number of steps until the weight is `end`.
        start: weight of the first step.
        end: weight at last.

    Raises:
        ValueError: if `num_steps` is not a positive integer, or a weight is negative or not finite.

    Example:
        >>> import torch
        >>> LinearAnnealing(100)(torch.tensor([0, 50, 200]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    num_steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_positive_int("LinearAnnealing", num_steps=self.num_steps)
        _check_weights("LinearAnnealing", start=self.start, end=self.end)

    def __call__(self, step: Tensor) -> Tensor:
        """Return the weights of steps, which are counted from 0."""
        return self.start + (self.end - self.start) * (step / self.num_steps).clamp(max=1)


@dataclass(frozen=True)
class CyclicalAnnealing:
    """A weight that rises again and again, and then stays.

    Args:
        num_steps: number of steps of all cycles.
        cycles: number of cycles.
        rising: share of a cycle in which the weight rises.
        start: weight at the beginning of each cycle.
        end: weight at the end of each cycle.

    Raises:
        ValueError: if a number of steps or cycles is not a positive integer, `rising` is not in (0, 1], or a weight is
            negative or not finite.

    Example:
        >>> import torch
        >>> CyclicalAnnealing(100, cycles=2, rising=0.5)(torch.tensor([0, 10, 25, 49, 50, 60, 100]))
        tensor([0.0000, 0.4000, 1.0000, 1.0000, 0.0000, 0.4000, 1.0000])
    """

    num_steps: int
    cycles: int = 4
    rising: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_positive_int("CyclicalAnnealing", num_steps=self.num_steps, cycles=self.cycles)
        _check_weights("CyclicalAnnealing", start=self.start, end=self.end)
        if not 0 < self.rising <= 1:
            raise ValueError(f"CyclicalAnnealing wants rising in (0, 1], the share of a cycle, but found {self.rising!r}.")

    def __call__(self, step: Tensor) -> Tensor:
        """Return the weights of steps, which are counted from 0."""
        place = (step * self.cycles / self.num_steps) % 1
        place = torch.where(step >= self.num_steps, 1.0, place)
        return self.start + (self.end - self.start) * (place / self.rising).clamp(max=1)


class KLWeightedELBO(Objective):
    """Minus the evidence lower bound (nats) with a weight of the KL divergences, which may depend on the step, and free bits.

    Steps are counted by evaluations of the loss with gradients. Without gradients (`evaluate_loss`, validation) the loss is the
    negative bound itself, so that early stopping and tables compare bounds.

    Where all latent variables are reparametrised, and the guide samples them in the order of the model, the divergence of a
    latent variable is exact if torch knows it. Otherwise it is the log ratio of a draw. Its scale is that of the guide's site,
    so handlers of scale belong around both model and guide.

    Args:
        kl_weight: the weight, or a function of the number of steps so far, (), that returns it: `LinearAnnealing(1000)` or
            `CyclicalAnnealing(10_000)`.
        free_bits: nats of each coordinate of a latent variable, as the mean over the data, that are free: below it the
            divergence is replaced by this constant. Where coordinates are not independent in guide and model, it holds for the
            latent variable as a whole.
        kwargs: further arguments of `Objective`.

    Attributes:
        num_steps: number of steps so far, ().

    Raises:
        TypeError: if the weight is neither a number nor a function.
        ValueError: if a number is negative or not finite; when it is used, if an observed site has no density, or with
            free_bits if a latent variable is discrete or the guide names latent variables that the model lacks.

    Example:
        >>> import pyro, torch
        >>> from pyro_genmodels import VAE
        >>> vae, x = VAE((4,), latent_dim=2), torch.randn(50, 4)
        >>> objective = KLWeightedELBO(LinearAnnealing(100), free_bits=0.05)
        >>> svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), objective)
        >>> losses = [svi.step(x) for _ in range(3)]
        >>> objective.kl_weight_now
        tensor(0.0300)
    """

    training_unit = "weighted bound"

    def __init__(self, kl_weight: float | Callable[[Tensor], Tensor] = 1.0, *, free_bits: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(kl_weight, Real):
            _check_weights("KLWeightedELBO", kl_weight=kl_weight)
        elif not callable(kl_weight):
            raise TypeError(
                "KLWeightedELBO wants kl_weight as a number or a function of the step, such as LinearAnnealing(1000), but "
                f"found {type_with_article(kl_weight)}."
            )
        _check_weights("KLWeightedELBO", free_bits=free_bits)
        self.kl_weight, self.free_bits = kl_weight, float(free_bits)
        self._counter = _Counter()

    @property
    def num_steps(self) -> Tensor:
        return self._counter.num_steps

    @property
    def kl_weight_now(self) -> Tensor:
        """The weight of the next step, ()."""
        weight = self.kl_weight(self.num_steps) if callable(self.kl_weight) else self.kl_weight
        return torch.as_tensor(weight, device=self.num_steps.device)

    @property
    def own_modules(self) -> Sequence[nn.Module]:
        return (self._counter,)

    def check(self, name: str, dist: Distribution) -> None:
        check_density("KLWeightedELBO", name, dist)

    def per_datum(self, dist: Any, x: Tensor) -> Tensor:
        return -dist.log_prob(x)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if torch.is_grad_enabled():
            if self.num_steps.device != loss.device:
                self._counter.to(loss.device)
            self.num_steps.add_(1)
        return loss

    def _score(self, model_trace: Trace, guide_trace: Trace) -> None:
        if not torch.is_grad_enabled():
            super()._score(model_trace, guide_trace)
            return
        names, weight = _paired(model_trace, guide_trace), self.kl_weight_now
        if names is None:
            if self.free_bits:
                raise ValueError(
                    "free_bits wants a guide that samples each latent variable of the model by its name, reparametrised, but "
                    f"found {listed(traces.latents(guide_trace))}. Leave free_bits out; kl_weight works with any guide."
                )
            for trace in (model_trace, guide_trace):
                for name in traces.latents(trace):
                    trace.nodes[name]["scale"] = trace.nodes[name]["scale"] * weight
        super()._score(model_trace, guide_trace)
        is_ordered = in_one_order(model_trace, guide_trace)
        for name in names or ():
            divergence = _Divergence.of(model_trace.nodes[name], guide_trace.nodes[name], may_be_exact=is_ordered)
            total = divergence.total(self.free_bits)
            model_trace.nodes[name]["log_prob_sum"] = -weight * total
            guide_trace.nodes[name]["log_prob_sum"] = torch.zeros_like(total)
            guide_trace.nodes[name]["score_parts"] = NO_SCORE


def _paired(model_trace: Trace, guide_trace: Trace) -> list[str] | None:
    """Return the names of the latent variables, in the model's order, if the guide samples the same, all reparametrised."""
    names = traces.latents(model_trace)
    if sorted(names) != sorted(traces.latents(guide_trace)):
        return None
    drawn: list[Any] = [guide_trace.nodes[name]["fn"] for name in names]
    return names if all(fn.has_rsample and not isinstance(sites.innermost(fn), Delta) for fn in drawn) else None


class _Divergence(NamedTuple):
    """The divergence of one latent variable, for each datum and each coordinate that is independent of the others.

    Attributes:
        values: nats, (batch..., coordinates...).
        weights: scale of each datum, and 0 where it is masked, (batch...).
    """

    values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, model_site: Any, guide_site: Any, *, may_be_exact: bool) -> _Divergence:
        """Return the divergence of a pair of sites.

        Args:
            model_site: site of the model.
            guide_site: site of the guide, with the same value.
            may_be_exact: see `in_one_order`.
        """
        z = guide_site["value"]
        values = site_divergence(model_site, guide_site, may_be_exact=may_be_exact)
        batch = z.shape[: z.dim() - guide_site["fn"].event_dim]
        weights = z.new_ones(batch)
        for site in (guide_site, model_site):
            mask = sites.mask_of(site)
            weights = weights if mask is None else weights * mask
        return cls(values, weights * guide_site["scale"])

    def total(self, floor: float) -> Tensor:
        """Return the divergence, summed over the data (nats), (), with a floor for the mean of each coordinate."""
        batch_dims = tuple(range(self.weights.dim()))
        weights = self.weights.reshape(self.weights.shape + (1,) * (self.values.dim() - self.weights.dim()))
        values = torch.where(weights == 0, 0.0, self.values)  # a value that is masked may be NaN
        sums = (weights * values).sum(batch_dims) if batch_dims else weights * values
        return (sums.clamp(min=floor * self.weights.sum()) if floor else sums).sum()


def _check_weights(owner: str, **weights: Any) -> None:
    for name, value in weights.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{owner} wants {name} as a number, but found {type_with_article(value)}.")
        if not 0 <= float(value) < inf:
            raise ValueError(f"{owner} wants {name} of 0 or more, but found {value!r}.")


class _Counter(nn.Module):
    """The number of steps so far."""

    num_steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
