r"""The posterior under a diffusion as prior, :math:`p(x \mid y) \propto p(x)\, p(y \mid x)`, by guided reverse diffusion.

The likelihood is the density of all that the model observes given x, and must be differentiable in x. The prior needs a
denoiser and nothing else. See `pyro_genmodels.dynamics.guided` for the two methods.

Chung et al., *Diffusion Posterior Sampling* (arXiv 2209.14687); Wu et al., *Practical and Asymptotically Exact Conditional
Sampling in Diffusion Models* (arXiv 2306.17775).
"""

from __future__ import annotations

__all__ = ["GuidedDiffusion", "TwistedDiffusion", "WeightedDraws", "diffusion_posterior", "inpaint"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_genmodels._pyro import traces
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.dynamics.guided import Particles, sample_guided, sample_twisted
from pyro_genmodels.dynamics.resampling import effective_size
from pyro_genmodels.utils.distributions import unwrap
from pyro_genmodels.utils.errors import check_choice, check_positive_int, type_with_article
from pyro_genmodels.utils.keywords import signature_of
from pyro_genmodels.utils.pareto import is_unreliable, pareto_k
from pyro_genmodels.utils.tensors import as_tensor


@dataclass(frozen=True)
class TwistedDiffusion:
    """Sequential Monte Carlo with weighted particles: exact in the limit of many particles and steps (arXiv 2306.17775).

    Attributes:
        num_steps: number of ancestral steps.
        resample_below: effective sample size, as a fraction of all particles, below which they are resampled.
    """

    num_steps: int = 500
    resample_below: float = 0.5

    def __post_init__(self) -> None:
        check_positive_int("TwistedDiffusion", num_steps=self.num_steps)
        if not 0 <= self.resample_below <= 1:
            raise ValueError(f"TwistedDiffusion wants resample_below from 0 to 1, but found {self.resample_below}.")

    def __call__(self, *args: Any, progress: bool | None) -> Particles:
        """Return weighted particles: see `pyro_genmodels.dynamics.guided.sample_twisted`."""
        return sample_twisted(*args, num_steps=self.num_steps, resample_below=self.resample_below, progress=progress)


@dataclass(frozen=True)
class GuidedDiffusion:
    """Diffusion posterior sampling (DPS) with a guided score, biased by an unknown amount (arXiv 2209.14687).

    For example, under a standard normal prior and one observation at 1.5 with noise of deviation 0.4, the posterior has mean
    1.29 and variance 0.14. The draws have mean 1.48 and variance 0.08 with 500 steps, and 1.50 and 0.08 in the limit of many
    steps. The bias is large with few steps, and for likelihoods that are steep but not curved.

    Attributes:
        num_steps: number of ancestral steps.
        scale: factor of the guidance.
    """

    num_steps: int = 500
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive_int("GuidedDiffusion", num_steps=self.num_steps)
        if not self.scale >= 0:
            raise ValueError(f"GuidedDiffusion wants a scale of 0 or more, but found {self.scale}.")

    def __call__(self, *args: Any, progress: bool | None) -> Particles:
        """Return particles of equal weight: see `pyro_genmodels.dynamics.guided.sample_guided`."""
        return sample_guided(*args, num_steps=self.num_steps, scale=self.scale, progress=progress)


@dataclass(frozen=True, repr=False)
class WeightedDraws:
    """Weighted draws from a posterior. They can be exported by ``to_arviz(draws, *args, model=model)``.

    In ArviZ, the group ``posterior`` holds the draws and ``sample_stats.log_weight`` their weights. ArviZ's summaries
    ignore the weights, so they describe the posterior only if all weights are equal. `resampled` returns draws of equal weight.

    Attributes:
        name: name of the variable.
        draws: draws, (n, *event_shape).
        log_weight: log weights, (n,). The mean weight is 1.
        log_evidence: estimate of log p(y) in nats, (); NaN if the method gives none.
        effective_sizes: effective sample size after each step, before any resampling, (steps,). If its minimum is small, all
            draws descend from few particles, however even the final weights are.
        evaluations: number of calls of the network, each for all draws at once.
        pareto_k: k-hat of the weights, (): above 0.7 a few draws carry the posterior, and its means cannot be relied on.
        evidence_pareto_k: largest k-hat of the means of weights that make up the evidence, one for each resampling, (); NaN if
            there is no evidence, or a mean of fewer than 21 draws.
    """

    name: str
    draws: Tensor
    log_weight: Tensor
    log_evidence: Tensor
    effective_sizes: Tensor
    evaluations: int
    pareto_k: Tensor
    evidence_pareto_k: Tensor

    @property
    def effective_sample_size(self) -> float:
        """Effective sample size of the final weights. See `effective_sizes` for those of earlier steps."""
        return effective_size(self.log_weight).item()

    @property
    def stats(self) -> Mapping[str, Tensor]:
        """Log weights by name, (chain, draw), for ArviZ's group ``sample_stats``."""
        return {"log_weight": self.log_weight[None]}

    def __repr__(self) -> str:
        evidence = "not computed" if self.log_evidence.isnan() else f"{self.log_evidence:.3f}"
        means = {"the weights": self.pareto_k, "the evidence": self.evidence_pareto_k}
        heavy = {name: k for name, k in means.items() if is_unreliable(k, len(self.draws))}
        notes = "".join(f"; {name} unreliable, Pareto k-hat {k:.2f}" for name, k in heavy.items())
        return (
            f"WeightedDraws({self.name!r}, {len(self.draws)} draws, effective sample size {self.effective_sample_size:.1f}, "
            f"log evidence {evidence}{notes})"
        )

    def get_samples(self, *, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Return the draws by name, without their weights, as `pyro.infer.MCMC.get_samples` does."""
        return {self.name: self.draws[None] if group_by_chain else self.draws}

    def resampled(self, num_samples: int) -> Tensor:
        """Return draws of equal weight, with repetitions, (num_samples, *event_shape)."""
        return self.draws[torch.multinomial(self.log_weight.softmax(0), num_samples, replacement=True)]


def diffusion_posterior(
    model: Callable[..., Any],
    *args: Any,
    method: TwistedDiffusion | GuidedDiffusion | None = None,
    num_samples: int = 1000,
    progress: bool | None = None,
    **kwargs: Any,
) -> WeightedDraws:
    """Draw from the posterior of a model with one latent variable, whose prior is a diffusion.

    The model is run for all draws at once, by `torch.vmap`. It must not branch on values, nor draw random numbers other than by
    `pyro.sample`.

    Args:
        model: model with one latent site ``pyro.sample("x", diffusion())``, outside of plates, and observed sites.
        args: arguments of the model.
        method: `TwistedDiffusion`, the default, or `GuidedDiffusion`.
        num_samples: number of draws. The network evaluates all of them together.
        progress: True shows a progress bar, False does not; None shows it if sampling takes more than five seconds.
        kwargs: keyword arguments of the model.

    Returns:
        Weighted draws. `GuidedDiffusion` gives equal weights, and the draws are biased.

    Raises:
        ValueError: if the model is not of this kind; the error says what to use instead.
        TypeError: if `method` is not one of the two methods, `model` is not a function, or it does not take the arguments.
        FloatingPointError: if no particle has a finite likelihood, or a guided draw becomes infinite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels import Diffusion
        >>> diffusion = Diffusion((2,)).eval()
        >>> def model(y):
        ...     x = pyro.sample("x", diffusion())
        ...     pyro.sample("y", dist.Normal(x.sum(), 0.5), obs=y)
        >>> posterior = diffusion_posterior(model, torch.tensor(1.0), method=TwistedDiffusion(50), num_samples=100)
        >>> posterior.draws.shape, 1 <= posterior.effective_sample_size <= 100
        (torch.Size([100, 2]), True)
    """
    check_positive_int("diffusion_posterior", num_samples=num_samples)
    method = check_choice("diffusion_posterior", "method", method, TwistedDiffusion(), TwistedDiffusion | GuidedDiffusion)
    _check_arguments(model, args, kwargs)
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    name, prior = _prior(trace)

    def log_likelihood(y: Tensor) -> Tensor:
        try:
            with pyro.validation_enabled(is_validate=False):
                return torch.vmap(log_likelihood_of_one)(prior.to_data(y))
        except RuntimeError as error:
            if "vmap" not in str(error) and "storage" not in str(error):  # .numpy() says "storage"
                raise
            raise ValueError(
                "diffusion_posterior runs the model for all draws at once, by torch.vmap, which this model does not allow: "
                f"{str(error).splitlines()[0]} Use torch.where instead of if, and draw random numbers by pyro.sample only; or "
                "use NUTS."
            ) from error

    def log_likelihood_of_one(x: Tensor) -> Tensor:
        trace = poutine.trace(poutine.condition(model, {name: x})).get_trace(*args, **kwargs)
        trace.remove_node(name)
        log_p: Any = trace.log_prob_sum()
        return log_p

    noise = prior.base.sample((num_samples,))
    context = None if prior.context is None else prior.context.expand(num_samples, -1)
    with torch.no_grad():
        denoiser = prior.denoiser
        particles = method(lambda x, t: denoiser(x, t, context), denoiser.process, log_likelihood, noise, progress=progress)
    averaged = particles.averaged_log_weights
    return WeightedDraws(
        name,
        prior.to_data(particles.x),
        particles.log_weights,
        particles.log_evidence,
        particles.effective_sizes,
        particles.evaluations,
        pareto_k(particles.log_weights),
        pareto_k(averaged, dim=1).max() if len(averaged) else particles.log_evidence.new_tensor(torch.nan),
    )


def _check_arguments(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise an error unless the model is a function that takes the arguments."""
    kind = ""
    if isinstance(model, Distribution):
        kind = "distribution"
    elif hasattr(model, "model") and hasattr(model, "guide"):
        kind = "family"
    elif not callable(model):
        kind = "value"
    if kind:
        raise TypeError(
            "diffusion_posterior wants a model, a function that draws x = pyro.sample('x', diffusion()) and observes what "
            f"depends on it, but found a {kind} of type {type(model).__name__}. For observed coordinates of x itself use "
            "inpaint(diffusion(), values, known)."
        )
    try:
        signature = signature_of(model)
    except ValueError:  # of a function that is not written in Python
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            "diffusion_posterior passes its arguments to the model, except method, num_samples and progress, but the model "
            f"takes {signature}: {error}."
        ) from error


def inpaint(
    diffusion: TorchDistribution,
    values: Any,
    known: Any,
    *,
    tolerance: float | None = None,
    **kwargs: Any,
) -> WeightedDraws:
    """Draw from a diffusion with some coordinates given.

    Args:
        diffusion: distribution with a denoiser over one event, ``family()`` or ``family(context)``.
        values: values of the coordinates, (*event_shape): tensor, numpy array or list. Unknown ones are ignored.
        known: boolean mask of the known coordinates, (*event_shape).
        tolerance: standard deviation with which the known coordinates are observed, in the units of the data. None is 0.02
            standard deviations of the data that the diffusion was standardised by.
        kwargs: further arguments of `diffusion_posterior`.

    Raises:
        ValueError: if a shape or the mask's type is wrong.
        TypeError: if `diffusion` has no denoiser, for instance because it is a family that was not called.

    Example:
        >>> from pyro_genmodels import Diffusion
        >>> known = torch.tensor([True, False])
        >>> inpaint(Diffusion((2,)).eval()(), torch.ones(2), known, method=TwistedDiffusion(50), num_samples=20).draws.shape
        torch.Size([20, 2])
    """
    if not isinstance(diffusion, Distribution) or capabilities(diffusion).denoiser is None:
        raise TypeError(
            f"inpaint wants the distribution of a diffusion over reals, family(), but found {type_with_article(diffusion)}. "
            "For images of integers, fit a Diffusion without levels to x.float(), and round the draws."
        )
    values, known = as_tensor(values, "inpaint", floats=torch.get_default_dtype()), as_tensor(known, "inpaint")
    if values.shape != diffusion.event_shape or known.shape != diffusion.event_shape or known.dtype != torch.bool:
        raise ValueError(
            f"inpaint wants values and a boolean mask of shape {tuple(diffusion.event_shape)}, but found "
            f"{tuple(values.shape)} and {tuple(known.shape)} of {known.dtype}."
        )
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise ValueError(f"inpaint wants a positive tolerance, or None, but found {tolerance!r}.")
    deviation = _deviations(diffusion, values)[known] * 0.02 if tolerance is None else torch.tensor(tolerance).to(values)

    def model() -> None:
        x = pyro.sample("x", diffusion)
        noise = dist.Normal(torch.zeros_like(deviation), 1.0).expand(x[known].shape).to_event(1)
        in_deviations = dist.transforms.AffineTransform(x[known], deviation, event_dim=1)  # Normal squares the deviation
        pyro.sample("known", dist.TransformedDistribution(noise, [in_deviations]), obs=values[known])

    return diffusion_posterior(model, **kwargs)


def _deviations(diffusion: Any, values: Tensor) -> Tensor:
    """Return the change of data at these values (*event_shape) per standard deviation in the network's space."""
    pretransform = capabilities(unwrap(diffusion)).pretransform
    if pretransform is None:
        return torch.ones_like(values)
    y = pretransform(values.double())
    return ((pretransform.inv(y + 1e-3) - pretransform.inv(y - 1e-3)) / 2e-3).abs().to(values.dtype)


def _prior(trace: Trace) -> tuple[str, Any]:
    """Return the name of the latent site, and its distribution, after all checks of the model."""
    for plate, site in trace.nodes.items():
        rows: Any = site["fn"] if site_is_subsample(site) else None
        subsample: Any = site.get("value")
        if rows is not None and len(subsample) < rows.size:
            raise ValueError(
                f"diffusion_posterior wants all the data, but plate {plate!r} takes {len(subsample)} of {rows.size} rows. "
                "Leave the subsample out."
            )
    trace = prune_subsample_sites(trace)
    latents, observed = traces.latents(trace), traces.observed(trace)
    if len(latents) != 1 or not observed:
        raise ValueError(
            "diffusion_posterior wants a model with one latent variable and at least one observed variable, but found latent "
            f"{', '.join(map(repr, latents)) or 'none'} and observed {', '.join(map(repr, observed)) or 'none'}. For other "
            "models use SVI or NUTS."
        )
    fn: Any = trace.nodes[latents[0]]["fn"]
    prior: Any = unwrap(fn)
    if capabilities(prior).denoiser is None or prior.batch_shape:
        raise ValueError(
            f"diffusion_posterior wants a diffusion over one event at site {latents[0]!r}, outside of plates, but found "
            f"{prior!r}. For integers, fit a Diffusion without levels to floats; with another prior use NUTS or SVI."
        )
    site = trace.nodes[latents[0]]
    masked = site["mask"] is not None or isinstance(fn, MaskedDistribution)
    if masked or not (isinstance(site["scale"], (int, float)) and site["scale"] == 1):
        raise ValueError(
            f"diffusion_posterior needs the unscaled prior, but site {latents[0]!r} is masked or scaled. Mask and scale "
            "observed sites only."
        )
    return latents[0], prior
