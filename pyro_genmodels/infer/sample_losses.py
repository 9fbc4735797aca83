r"""Losses that compare samples of a model with data: for any Pyro model, with or without a density.

The model runs with its observed sites sampled, and the samples are compared with the data as two sets of rows,

.. math:: L(\theta) = N\, D\bigl(\{\tilde x_n \sim p_\theta(x \mid c_n)\}, \{x_n\}\bigr) .

Gradients pass through reparametrised samples. For a sample z without a gradient, of row n or shared by all rows, the gradient
has a term of the score function,

.. math:: \mathbb{E}\bigl[R_n\, \nabla \log p_\theta(z_n)\bigr], \qquad R_n \text{ what depends on row } n \text{ in the loss} .

For the squared maximum mean discrepancy R is twice the witness function at the sample, minus a baseline of the other rows.

Dziugaite et al. (arXiv 1505.03906) and Li et al., *Generative Moment Matching Networks* (arXiv 1502.02761); Zhang et al.,
*Spread Divergence* (arXiv 1811.08968); Deshpande et al., *Generative Modeling using the Sliced Wasserstein Distance* (arXiv
1803.11188).
"""

from __future__ import annotations

__all__ = ["MaximumMeanDiscrepancy", "SampleLoss", "SampleSets", "SlicedWasserstein", "SpreadDivergence"]

from abc import abstractmethod
from dataclasses import dataclass, replace
from math import log
from typing import Any, ClassVar

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.predictive import (
    ReplicatedData,
    draw_replicates,
    embedded_context,
    log_probs_without_gradient,
    replicated_data,
)
from pyro_genmodels.divergences import ConvexFunction, KullbackLeibler
from pyro_genmodels.divergences.kernels import (
    EnergyKernel,
    GaussianKernel,
    Kernel,
    check_kernel,
    median_distance,
    squares_in_bandwidths,
)
from pyro_genmodels.divergences.sliced import sliced_costs
from pyro_genmodels.infer.objective import Loss
from pyro_genmodels.utils.distributions import density_of, unwrap
from pyro_genmodels.utils.precision import in_doubles


@dataclass(frozen=True)
class SampleSets:
    """Samples of a model and data, as two sets of rows.

    Attributes:
        samples: samples, (n, d), with n = particles * rows. The rows of one particle are adjacent.
        data: data, (rows, d).
        paired: True if a sample and the datum of its row have the same context.
    """

    samples: Tensor
    data: Tensor
    paired: bool

    @property
    def same_row(self) -> Tensor:
        """Matrix (n, rows) with 1 where a sample belongs to a row, and 0 elsewhere."""
        rows = len(self.data)
        return torch.eye(rows).to(self.data).repeat(len(self.samples) // rows, 1)


class SampleLoss(Loss):
    """Base class of losses between samples and data.

    The guide is not run: latent variables of the model are sampled from their priors. All observed sites of a row are joined.
    A family's context is appended on both sides, so that the joint distributions are compared. In your own model, add the
    context as a site, ``pyro.sample("c", dist.Delta(c, event_dim=1), obs=c)``; otherwise only the distributions of x are
    compared. Values are compared without scaling, so bring coordinates to one scale first. The unit of all of them does not
    matter: the loss is stated in the units of the data, but its gradient is that of the loss in units of the median deviation
    of the batch's data. If integers are rounded from samples with gradients (`Dequantized`), the samples before rounding are
    compared with data to which uniform noise is added.
    The loss of a batch of one row is 0.

    `num_particles` is the number of samples of the model for each row, all in one set. Variables outside the data's plate are
    sampled once per particle.
    """

    score_function: ClassVar[bool] = False
    """True if samples without a gradient are trained by the score function."""
    power_of_unit: float = 0.0
    """Power of the data's unit that the loss has: 2 for squared distances, 0 if the loss does not depend on the unit."""

    @abstractmethod
    def between(self, sets: SampleSets) -> Tensor:
        """Return the loss per row, (), with gradients to the samples."""

    def rewards(self, sets: SampleSets) -> Tensor:
        """Return the part of the loss that depends on each sample, minus a baseline, (n,), without gradients.

        Needed if `score_function` is True.

        Raises:
            NotImplementedError: if the loss has no such part.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say what single samples contribute. Define rewards(sets), or set "
            "score_function to False."
        )

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss per row times the number of rows of all data, (). The guide is not run."""
        rows = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else None
        replicated_model = draw_replicates(model)
        runs = [model_trace for model_trace, _ in self._get_traces(replicated_model, traces.no_latents, args, kwargs)]
        context = embedded_context(model, args, kwargs)
        replicates = [replicated_data(run, rows, context, rounded=False) for run in runs]
        data, total = replicates[0].data, len(replicates[0].data) * replicates[0].weight
        if len(data) < 2:
            return 0.0 * replicates[0].draws.sum()
        sets = SampleSets(torch.cat([part.draws.flatten(0, 1) for part in replicates]), data, context is not None)
        scale: Tensor | float = 1.0
        if self.power_of_unit:
            deviation = _median_deviation(data)
            sets = replace(sets, samples=in_doubles(sets.samples) / deviation, data=in_doubles(data) / deviation)
            scale = deviation**self.power_of_unit
        loss = self.between(sets)
        value = loss.detach() * scale
        if torch.is_grad_enabled():
            log_ps = [self._log_ps_without_gradient(run, part) for run, part in zip(runs, replicates, strict=True)]
            surrogate = self._surrogate(sets, loss, log_ps)
            loss = loss if surrogate is None else loss + surrogate
            value = value + (loss - loss.detach())  # exactly 0, and the gradient in the unit of the batch
        if is_validation_enabled():
            warn_if_nan(value, "loss")
        return total * value

    def _surrogate(self, sets: SampleSets, loss: Tensor, log_ps: list[tuple[Tensor | None, Tensor | None]]) -> Tensor | None:
        """Return a term whose gradient is that of the score function, or None if there are no samples without gradient."""
        per_row, shared = ([log_p for log_p in parts if log_p is not None] for parts in zip(*log_ps, strict=True))
        terms = [] if not per_row else [(self.rewards(sets) * torch.cat([log_p.flatten() for log_p in per_row])).sum()]
        terms += [loss.detach() * log_p.sum() for log_p in shared]
        return torch.stack(terms).sum() if terms else None

    def _log_ps_without_gradient(self, run: Trace, rows: ReplicatedData) -> tuple[Tensor | None, Tensor | None]:
        """Return the log densities of samples without gradient, as far as they depend on parameters.

        The first are those of single rows, (particles, rows), the second those shared by rows, (particles,).
        """
        return log_probs_without_gradient(run, rows.plate, rows.dim, rows.draws.shape[:2], self._log_prob)

    def _log_prob(self, name: str, fn: Any, value: Tensor) -> Tensor:
        """Return the log density of the value of a site without a reparametrised sample."""
        density, advice = density_of(fn)
        if density in ("none", "lower bound"):
            raise ValueError(
                f"{type(self).__name__} wants samples with gradients, or exact densities, but site {name!r} holds "
                f"{type(unwrap(fn)).__name__}, whose samples have no gradient and whose density is: {density}. Build it of "
                f"reparametrised parts. {advice}"
            )
        log_p = fn.log_prob(value)
        if log_p.requires_grad and not self.score_function:
            raise ValueError(
                f"{type(self).__name__} wants samples with gradients, but site {name!r} holds {type(unwrap(fn)).__name__}, "
                "which has no reparametrised samples: its parameters would not be trained. Use MaximumMeanDiscrepancy or "
                "Adversarial, which train it by the score function."
            )
        return log_p


def _median_deviation(data: Tensor) -> Tensor:
    """Return the median distance of rows (n, d) from their median, per root of d, in doubles; 1 if all rows are equal."""
    rows = in_doubles(data.detach())
    lengths = (rows - rows.median(0).values).norm(dim=1) / data.shape[1] ** 0.5
    middle, mean = lengths.median(), lengths.mean()
    return torch.where(middle > 0, middle, torch.where(mean > 0, mean, 1.0))


class MaximumMeanDiscrepancy(SampleLoss):
    """The squared maximum mean discrepancy between samples and data, times the number of rows.

    The estimate is unbiased, so it can be negative. `train` reports the squared discrepancy itself. Samples without a gradient
    (discrete latent variables, mixtures, counts) are trained by the score function; the gradient is unbiased. With a context,
    pairs within one row are left out, since they are not independent.

    Args:
        kernel: kernel of pairs of rows, see `pyro_genmodels.divergences`. A bandwidth of None is the median distance of the
            batch's data. `RationalQuadraticKernel` and `EnergyKernel` have large gradients also for a model far from the data.
        kwargs: passed to `Loss`, among them num_particles.

    Raises:
        ValueError: if a site has neither reparametrised samples nor a density, or the model has a `pyro.factor` or no plate
            around its observed sites.

    Example:
        >>> from pyro_genmodels import Flow, MaximumMeanDiscrepancy
        >>> flow, x = Flow((2,)), torch.randn(100, 2)
        >>> loss = MaximumMeanDiscrepancy()(flow)
        >>> optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
        >>> loss(x).backward(); optimiser.step()
        >>> loss(x).shape
        torch.Size([])
    """

    score_function = True

    def __init__(self, *, kernel: Kernel = GaussianKernel(), **kwargs: Any) -> None:  # noqa: B008 (immutable)
        super().__init__(**kwargs)
        self.kernel = check_kernel(kernel, by="MaximumMeanDiscrepancy")
        energy = isinstance(kernel, EnergyKernel)
        self.unit, self.power_of_unit = ("squared energy distance", 1.0) if energy else ("squared mean discrepancy", 0.0)

    def between(self, sets: SampleSets) -> Tensor:
        among_samples, with_data, among_data = self._mean_kernels(sets)
        return (among_samples.mean() - 2 * with_data.mean() + among_data).to(sets.samples.dtype)

    def rewards(self, sets: SampleSets) -> Tensor:
        """Return twice the witness function at each sample, minus the mean of the other rows' witnesses without it, (n,)."""
        with torch.no_grad():
            among_samples, with_data, _ = self._mean_kernels(sets)
            n, others = len(sets.samples), self._num_others(sets)
            if others < 2:
                return (2 * (among_samples - with_data) / n).to(sets.samples.dtype)
            sums = among_samples * others
            own_row = self._sum_own_row(sets, torch.stack([sums, with_data], 1))
            total = torch.stack([sums.sum(), with_data.sum()]) - own_row
            baseline = ((total[:, 0] - sums) / (others - 1) - total[:, 1]) / others
            return (2 * (among_samples - with_data - baseline) / n).to(sets.samples.dtype)

    def _num_others(self, sets: SampleSets) -> int:
        """Return the number of samples with which each sample is compared."""
        n = len(sets.samples)
        return n - n // len(sets.data) if sets.paired else n - 1

    def _sum_own_row(self, sets: SampleSets, values: Tensor) -> Tensor:
        """Return the sum of values (n, k) over the samples with which each sample is not compared, (n, k)."""
        if not sets.paired:
            return values
        by_row = values.reshape(-1, len(sets.data), values.shape[1])
        return by_row.sum(0).repeat(len(by_row), 1)

    def _mean_kernels(self, sets: SampleSets) -> tuple[Tensor, Tensor, Tensor]:
        """Return each sample's mean kernel with other samples, (n,), and with data, (n,), and the mean among data, ()."""
        x, y = in_doubles(sets.samples), in_doubles(sets.data)
        kernel = self.kernel.fitted(y)
        rows, same = len(y), sets.same_row
        different = 1 - (same @ same.T if sets.paired else torch.eye(len(x)).to(x))
        with_data = kernel(x, y)
        with_data = (with_data * (1 - same)).sum(1) / (rows - 1) if sets.paired else with_data.mean(1)
        with torch.no_grad():
            k = kernel(y, y)
            among_data = (k.sum() - k.diagonal().sum()) / (rows * (rows - 1))
        return (kernel(x, x) * different).sum(1) / self._num_others(sets), with_data, among_data


class SlicedWasserstein(SampleLoss):
    """The sliced Wasserstein distance between samples and data, to the power p, times the number of rows.

    Each evaluation draws new directions. `train` reports the distance to the power p, in the units of the data to the power p.
    In small batches it is biased upwards, since samples differ from data by chance, and its minimum is slightly too narrow.

    Args:
        p: order of the distance, at least 1.
        num_projections: number of directions, at least 2.
        kwargs: passed to `Loss`, among them num_particles.

    Raises:
        ValueError: for samples without a gradient whose distribution depends on parameters.

    Example:
        >>> from pyro_genmodels import Flow, SlicedWasserstein
        >>> flow, x = Flow((2,)), torch.randn(100, 2)
        >>> SlicedWasserstein()(flow)(x).shape
        torch.Size([])
    """

    def __init__(self, *, p: float = 2.0, num_projections: int = 100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 1 <= p < float("inf") or num_projections < 2:
            raise ValueError(
                f"SlicedWasserstein wants an order p of at least 1 and num_projections of 2 or more, but found {p=} and "
                f"{num_projections=}."
            )
        self.p, self.num_projections, self.power_of_unit = p, num_projections, p
        self.unit = "sliced Wasserstein distance" + ("" if p == 1 else f" to the power {p:g}")

    def between(self, sets: SampleSets) -> Tensor:
        centre = in_doubles(sets.data).mean(0)
        x, y = in_doubles(sets.samples) - centre, in_doubles(sets.data) - centre
        return sliced_costs(x, y, num_projections=self.num_projections, p=self.p).mean().to(sets.samples.dtype)


class SpreadDivergence(SampleLoss):
    r"""An f-divergence between data and samples, both with Gaussian noise of the same scale, times the number of rows.

    With noise the two sets are mixtures of Gaussians. Their densities are known for any model:

    .. math:: D_f\bigl(\tfrac1N \sum_n N(x_n, h^2) \,\|\, \tfrac1M \sum_m N(\tilde x_m, h^2)\bigr)
        = \mathbb{E}_{\frac12 (p + q)}\, \frac{2 q f(p / q)}{p + q},

    The estimate, from noisy samples of both with gradients through them, is unbiased. The divergence is zero if the two
    distributions are equal (Zhang et al., arXiv 1811.08968); between finite sets it is biased upwards. `train` reports the
    divergence itself, in nats.

    Args:
        f: convex function of the ratio p / q of data to samples. `KullbackLeibler` covers all data,
            `ReverseKullbackLeibler` concentrates on a part of them. In small batches of heavy-tailed data the former follows
            the tail; `JensenShannon` does not.
        bandwidth: standard deviation h of the noise, in the units of the data; None is half the median distance of the batch's
            data. A smaller bandwidth resolves finer detail, and needs more rows.
        num_samples: number of noisy copies of each row, of both samples and data.
        kwargs: passed to `Loss`, among them num_particles.

    Raises:
        TypeError: if `f` is no convex function.
        ValueError: for samples without a gradient whose distribution depends on parameters.

    Example:
        >>> from pyro_genmodels import Flow, SpreadDivergence
        >>> from pyro_genmodels.divergences import JensenShannon
        >>> flow, x = Flow((2,)), torch.randn(100, 2)
        >>> SpreadDivergence(f=JensenShannon())(flow)(x).shape
        torch.Size([])
    """

    unit = "spread divergence"

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
                f"SpreadDivergence wants a positive bandwidth, or None, and num_samples of 1 or more, but found {bandwidth=} "
                f"and {num_samples=}."
            )
        self.f, self.bandwidth, self.num_samples = f, bandwidth, num_samples

    def between(self, sets: SampleSets) -> Tensor:
        data, samples = in_doubles(sets.data), in_doubles(sets.samples)
        h = median_distance(data) / 2 if self.bandwidth is None else self.bandwidth
        means = []
        for centres in (data, samples):
            centres = centres.repeat(self.num_samples, 1)
            z = centres + h * torch.randn_like(centres)
            log_ratio = _log_mixture(z, data, h) - _log_mixture(z, samples, h)
            means.append(self.f.mean_term(log_ratio).mean())
        return ((means[0] + means[1]) / 2).to(sets.samples.dtype)


def _log_mixture(z: Tensor, centres: Tensor, h: Any) -> Tensor:
    """Return the log density at z (k, d) of a mixture of Gaussians with equal weights, (k,), up to a common constant."""
    return (squares_in_bandwidths(z, centres, h) / -2).logsumexp(1) - log(len(centres))
