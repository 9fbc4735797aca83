r"""Losses between what a model draws and data: for any Pyro model, with a density or without.

The model is run without its observations, and its draws are compared with these as two sets of rows,

.. math:: L(\theta) = N\, D\bigl(\{\tilde x_n \sim p_\theta(x \mid c_n)\}, \{x_n\}\bigr) .

Gradients pass through reparametrised draws. Where a draw z has none, of row n or shared by all rows, an unbiased loss adds

.. math:: \mathbb{E}\bigl[R_n\, \nabla \log p_\theta(z_n)\bigr], \qquad R_n \text{ what of the loss depends on row } n .

Of the squared maximum mean discrepancy that is twice a draw's witness, from which what row n has no part in is subtracted.
Dziugaite et al. (arXiv 1505.03906) and Li et al., *Generative Moment Matching Networks* (arXiv 1502.02761); Zhang et al.,
*Spread Divergence* (arXiv 1811.08968); Deshpande et al., *Generative Modeling using the Sliced Wasserstein Distance* (arXiv
1803.11188).
"""

from __future__ import annotations

__all__ = ["DrawLoss", "DrawSets", "MaximumMeanDiscrepancy", "SlicedWasserstein", "SpreadDivergence"]

from abc import abstractmethod
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.predictive import ReplicatedData, conditions, replicated_data, replicating, scores
from pyro_genmodels.divergences import ConvexFunction, KullbackLeibler, sliced_wasserstein
from pyro_genmodels.divergences.kernels import GaussianKernel, Kernel, check_kernel, median_distance
from pyro_genmodels.infer.objective import Loss
from pyro_genmodels.utils.distributions import density_of, unwrap


@dataclass(frozen=True)
class DrawSets:
    """What a loss compares.

    Attributes:
        draws: (n, d), n = particles * rows, those of a particle side by side.
        data: (rows, d).
        paired: whether a draw and the datum of its row are conditioned on the same.
    """

    draws: Tensor
    data: Tensor
    paired: bool

    @property
    def same_row(self) -> Tensor:
        """Which draws (n,) are of which row (rows,): (n, rows) of zeros and ones."""
        rows = len(self.data)
        return torch.eye(rows).to(self.data).repeat(len(self.draws) // rows, 1)


class DrawLoss(Loss):
    """Base of the losses between draws and data.

    The guide is not run: draws are from the model, its latent variables from their priors. All observed sites of a row are
    joined; a family's context is joined to both sides, so that what is compared is the law of the pair. A model of your own
    names what it is conditioned on as a site, ``pyro.sample("c", dist.Delta(c, event_dim=1), obs=c)``, or only the laws of x
    alone are compared. Values are compared as they are: bring coordinates to one scale first; but integers rounded from
    draws with gradients (`Dequantized`) before they are, and the data with uniform noise. A batch of one row says nothing, and
    has the loss 0.

    `num_particles` are the draws of the model for each row, all in one set; what lies outside of the data's plate is drawn
    once for each particle. Draws are made as often as the data are read, so that a loss costs a run of the model and the
    comparison of two sets.
    """

    score_function: ClassVar[bool] = False
    """Whether draws without gradient are weighed by what depends on them."""

    @abstractmethod
    def between(self, sets: DrawSets) -> Tensor:
        """The loss of one row, a scalar with gradients to the draws."""

    def rewards(self, sets: DrawSets) -> Tensor:
        """What of the loss depends on each draw, (n,), less what has no part in it; without graph."""
        raise NotImplementedError

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one row times the rows of all data; the guide is not run."""
        rows = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else None
        drawn = replicating(model)
        runs = [pair[0] for pair in self._get_traces(drawn, traces.no_latents, args, kwargs)]
        given = conditions(model, args, kwargs)
        found = [replicated_data(run, rows, given, rounded=False) for run in runs]
        data, total = found[0].data, len(found[0].data) * found[0].weight
        if len(data) < 2:
            return 0.0 * found[0].draws.sum()
        sets = DrawSets(torch.cat([part.draws.flatten(0, 1) for part in found]), data, given is not None)
        loss = self.between(sets)
        if torch.is_grad_enabled():
            parts = [self._scores(run, part) for run, part in zip(runs, found, strict=True)]
            surrogate = self._surrogate(sets, loss, parts)
            if surrogate is not None:
                loss = loss + surrogate - surrogate.detach()
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        return total * loss

    def _surrogate(self, sets: DrawSets, loss: Tensor, found: list[tuple[Tensor | None, Tensor | None]]) -> Tensor | None:
        """What has the score function's part of the gradient as its own."""
        own, shared = ([part for part in parts if part is not None] for parts in zip(*found, strict=True))
        terms = [] if not own else [(self.rewards(sets) * torch.cat([log_p.flatten() for log_p in own])).sum()]
        terms += [loss.detach() * log_p.sum() for log_p in shared]
        return torch.stack(terms).sum() if terms else None

    def _scores(self, run: Trace, rows: ReplicatedData) -> tuple[Tensor | None, Tensor | None]:
        """Log densities of a run's draws that carry no gradient, where these depend on parameters.

        They are those of single rows, (particles, rows), and of what rows share, (particles,).
        """
        return scores(run, rows.plate, rows.dim, rows.draws.shape[:2], self._log_prob)

    def _log_prob(self, name: str, fn: Any, value: Tensor) -> Tensor:
        """Of a site that is drawn without gradient, unmasked, as it is drawn."""
        density, advice = density_of(fn)
        if density in ("none", "lower bound"):
            raise ValueError(
                f"{type(self).__name__} wants draws that carry gradients, or densities, but site {name!r} holds "
                f"{type(unwrap(fn)).__name__}, whose density is: {density}, and whose draws carry none. Build it of "
                f"reparametrised parts. {advice}"
            )
        log_p = fn.log_prob(value)
        if log_p.requires_grad and not self.score_function:
            raise ValueError(
                f"{type(self).__name__} wants draws that carry gradients, but site {name!r} holds {type(unwrap(fn)).__name__}, "
                "which has no reparametrised draws, so that its parameters would not be trained. Use MaximumMeanDiscrepancy, "
                "which weighs such draws, or Adversarial."
            )
        return log_p


class MaximumMeanDiscrepancy(DrawLoss):
    """The squared maximum mean discrepancy between draws and data, without bias, and so at times negative; times the rows.

    `train` reports the squared discrepancy itself. Draws without gradient (discrete latent variables, mixtures, counts) are
    weighed by their witnesses: the gradient is unbiased. With a context, pairs of one row are left out, for they are not
    independent.

    Args:
        kernel: of pairs of rows, see `pyro_genmodels.divergences`; a bandwidth of None is the median distance of the batch's
            data. `RationalQuadraticKernel` and `EnergyKernel` have gradients also where the model is still far off.
        kwargs: passed to `Loss`, among them num_particles.

    Raises:
        ValueError: for a site that is drawn without gradient and has no density of its own; for a model without a plate around
            its observed sites, or with a `pyro.factor`.

    Example:
        >>> from pyro_genmodels import Flow, MaximumMeanDiscrepancy
        >>> flow, x = Flow((2,)), torch.randn(100, 2)
        >>> loss = MaximumMeanDiscrepancy()(flow)
        >>> optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
        >>> loss(x).backward(); optimiser.step()
    """

    score_function = True

    def __init__(self, *, kernel: Kernel = GaussianKernel(), **kwargs: Any) -> None:  # noqa: B008 (immutable)
        super().__init__(**kwargs)
        self.kernel = check_kernel(kernel, by="MaximumMeanDiscrepancy")

    def between(self, sets: DrawSets) -> Tensor:
        within, across, beyond = self._likeness(sets)
        return within.mean() - 2 * across.mean() + beyond

    def rewards(self, sets: DrawSets) -> Tensor:
        """Twice the witness of a draw, less the mean of the other rows' as they would be without it."""
        with torch.no_grad():
            within, across, _ = self._likeness(sets)
            n, others = len(sets.draws), self._others(sets)
            if others < 2:
                return 2 * (within - across) / n
            sums = within * others
            mine = self._of_my_row(sets, torch.stack([sums, across], 1))
            total = torch.stack([sums.sum(), across.sum()]) - mine
            without = ((total[:, 0] - sums) / (others - 1) - total[:, 1]) / others
            return 2 * (within - across - without) / n

    def _others(self, sets: DrawSets) -> int:
        """How many draws each is compared with."""
        n = len(sets.draws)
        return n - n // len(sets.data) if sets.paired else n - 1

    def _of_my_row(self, sets: DrawSets, values: Tensor) -> Tensor:
        """Values (n, k), summed over the draws that each is not compared with."""
        if not sets.paired:
            return values
        by_row = values.reshape(-1, len(sets.data), values.shape[1])
        return by_row.sum(0).repeat(len(by_row), 1)

    def _likeness(self, sets: DrawSets) -> tuple[Tensor, Tensor, Tensor]:
        """How like each draw is to others, (n,), and to data, (n,); and data to each other, a scalar: means over pairs."""
        kernel = self.kernel.fitted(sets.data)
        x, y = sets.draws, sets.data
        rows, same = len(y), sets.same_row
        apart = 1 - (same @ same.T if sets.paired else torch.eye(len(x)).to(x))
        across = kernel(x, y)
        across = (across * (1 - same)).sum(1) / (rows - 1) if sets.paired else across.mean(1)
        with torch.no_grad():
            k = kernel(y, y)
            beyond = (k.sum() - k.diagonal().sum()) / (rows * (rows - 1))
        return (kernel(x, x) * apart).sum(1) / self._others(sets), across, beyond


class SlicedWasserstein(DrawLoss):
    """The sliced Wasserstein distance between draws and data, to the power p, times the rows.

    Directions are new each time. `train` reports that power, in the units of the data to the power p. It is too high in small
    batches, whose draws differ from their data by chance, and its minimum a little too narrow for that.

    Args:
        p: the order, at least 1.
        num_projections: directions, at least 2.
        kwargs: passed to `Loss`, among them num_particles.

    Raises:
        ValueError: for draws without gradient, in a model whose parameters these depend on, naming what to use.

    Example:
        >>> from pyro_genmodels import Flow, SlicedWasserstein
        >>> flow, x = Flow((2,)), torch.randn(100, 2)
        >>> SlicedWasserstein()(flow)(x).backward()
    """

    def __init__(self, *, p: float = 2.0, num_projections: int = 100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= p < float("inf") or num_projections < 2:
            raise ValueError(
                f"SlicedWasserstein wants an order p of at least 1 and 2 or more directions, got {p=} and {num_projections=}."
            )
        self.p, self.num_projections = p, num_projections

    def between(self, sets: DrawSets) -> Tensor:
        return sliced_wasserstein(sets.draws, sets.data, num_projections=self.num_projections, p=self.p).value.pow(self.p)


class SpreadDivergence(DrawLoss):
    r"""An f-divergence between data and draws, both blurred by one Gaussian; times the rows.

    Blurred, the two sets are mixtures of Gaussians, whose densities are known, whatever the model is:

    .. math:: D_f\bigl(\tfrac1N \textstyle\sum_n N(x_n, h^2) \,\big\|\, \tfrac1M \sum_m N(\tilde x_m, h^2)\bigr)
        = \mathbb{E}_{\frac12 (p + q)}\, \frac{2 q f(p / q)}{p + q},

    estimated without bias by blurred draws of both, with gradients through them. It is zero where the two laws are the same
    (Zhang et al., arXiv 1811.08968); of finite sets it is too high. `train` reports the divergence itself, in nats.

    Args:
        f: of the ratio p / q of data to draws: `KullbackLeibler` covers the data, `ReverseKullbackLeibler` keeps to some of it.
            Where data have a heavy tail, the first is drawn to it in small batches; `JensenShannon` is not.
        bandwidth: h, in the units of the data; None is half the median distance of the batch's data. The smaller, the finer
            what is seen, and the more rows it takes.
        num_samples: blurred copies of each row, on both sides.
        kwargs: passed to `Loss`, among them num_particles.

    Raises:
        ValueError: for draws without gradient, in a model whose parameters these depend on, naming what to use.

    Example:
        >>> from pyro_genmodels import Flow, SpreadDivergence
        >>> from pyro_genmodels.divergences import JensenShannon
        >>> flow, x = Flow((2,)), torch.randn(100, 2)
        >>> SpreadDivergence(f=JensenShannon())(flow)(x).backward()
    """

    def __init__(
        self,
        *,
        f: ConvexFunction = KullbackLeibler(),  # noqa: B008 (immutable)
        bandwidth: float | None = None,
        num_samples: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(f, ConvexFunction):
            found = f"the class {f.__name__}" if isinstance(f, type) else repr(f)
            raise TypeError(f"SpreadDivergence wants a convex function such as KullbackLeibler() as f, but found {found}.")
        if num_samples < 1 or not (bandwidth is None or 0 < bandwidth < float("inf")):
            raise ValueError(
                f"SpreadDivergence wants a positive bandwidth, or None, and num_samples of 1 or more, got {bandwidth=} and "
                f"{num_samples=}."
            )
        self.f, self.bandwidth, self.num_samples = f, bandwidth, num_samples

    def between(self, sets: DrawSets) -> Tensor:
        h = median_distance(sets.data) / 2 if self.bandwidth is None else self.bandwidth
        means = []
        for centres in (sets.data, sets.draws):
            centres = centres.repeat(self.num_samples, 1)
            z = centres + h * torch.randn_like(centres)
            log_ratio = _log_mixture(z, sets.data, h) - _log_mixture(z, sets.draws, h)
            means.append(self.f.mean_term(log_ratio).mean())
        return (means[0] + means[1]) / 2


def _log_mixture(z: Tensor, centres: Tensor, h: Any) -> Tensor:
    """The log density of an equal mixture of Gaussians at z (k, d), (k,), but for what all such mixtures share."""
    middle = centres.detach().mean(0)
    z, centres = z - middle, centres - middle
    squares = z.square().sum(1)[:, None] + centres.square().sum(1) - 2 * z @ centres.T
    return (squares / (-2 * h**2)).logsumexp(1) - log(len(centres))
