r"""What a critic is to tell apart: the two sides that a model, and its guide, put before it.

=============  ==========================================  =====================================================
choice         the critic sees                             the model and its guide are led by
=============  ==========================================  =====================================================
`ObservationsPairing` x of the data, x of the model               the game
`JointPairing`        (x, z of the guide), (x, z of the model)    the game: ALI, BiGAN
`AggregatePairing`    z of the prior, z of the guide              the game, and :math:`-\log p(x \mid z)`: AAE
`PosteriorPairing`    (x, z of the guide), (x, z of a reference)  the ELBO, the critic standing for the log ratio: AVB
=============  ==========================================  =====================================================

The model runs without its observations, so that any program with `pyro.sample` statements is a model. Where a draw carries no
gradient, the score function does instead, :math:`\nabla \mathbb{E}_q[\ell(x)] = \mathbb{E}_q[\ell(x) \nabla \log q(x)]`.

Dumoulin et al., *Adversarially Learned Inference* (arXiv 1606.00704); Donahue et al. (arXiv 1605.09782); Makhzani et al.,
*Adversarial Autoencoders* (arXiv 1511.05644); Mescheder et al., *Adversarial Variational Bayes* (arXiv 1701.04722).
"""

from __future__ import annotations

__all__ = ["AggregatePairing", "JointPairing", "ObservationsPairing", "Pairing", "PosteriorPairing", "RealAndFake"]

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.predictive import both_of, is_rounded, masked, observed_sites, plate_of, replicating, scores
from pyro_genmodels.infer.adversarial.losses import AdversarialLoss
from pyro_genmodels.utils.distributions import density_of, unwrap
from pyro_genmodels.utils.errors import listed


@dataclass(frozen=True)
class RealAndFake:
    """What one run puts before the critic.

    Attributes:
        real: what it sees of one side, (rows, ...) each: the one that stands for p in the game.
        fake: likewise of the other, q.
        context: what it is told beside either, (rows, ...) each.
        log_q: log probability (nats) of what was drawn without gradient on that other side, of each row, (rows,), and of what
            rows share, (); None where nothing was.
        rest: what the model and its guide minimise besides (nats per row).
        size: rows of all data, of which these are a part.
    """

    real: tuple[Tensor, ...]
    fake: tuple[Tensor, ...]
    context: tuple[Tensor, ...] = ()
    log_q: tuple[Tensor | None, Tensor | None] = (None, None)
    rest: Tensor | float = 0.0
    size: int = 1


@dataclass(frozen=True)
class Pairing(ABC):
    """Base of the choices; those without options are equal where their class is."""

    @abstractmethod
    def sides(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> RealAndFake:
        """One run."""

    def loss(self, game: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
        """What model and guide minimise of the critic's outputs, (rows,)."""
        return game.model_loss(real, fake)


class ObservationsPairing(Pairing):
    """What the model observes, against what it draws in its place: the pairing of a GAN.

    Several observed sites are flattened and joined. The model's other arguments with a row for each datum, such as a context or
    covariates, are shown to the critic beside them, one by one. Our own distributions show themselves as their networks see
    them: standardised where they standardise, and integers with noise (`Dequantized`).
    """

    def sides(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> RealAndFake:
        trace, plate, real, fake, context = _observations(model, args, kwargs)
        return RealAndFake((real,), (fake,), context, _score(trace, plate), size=_size(plate))


class JointPairing(Pairing):
    """Data with the guide's latent variables against the model's draws with theirs: bidirectional GANs.

    The guide needs reparametrised draws, but no density. The critic is called as ``critic(x, z)``, or with a context as
    a third.
    """

    def sides(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> RealAndFake:
        trace, plate, real, fake, context = _observations(model, args, kwargs)
        guided = _guided(traces.trace_of(guide, args, kwargs), plate, "Joint")
        z_real, z_fake = _latents(guided, plate), _latents(_counterparts(guided, trace), plate)
        return RealAndFake((real, z_real), (fake, z_fake), context, _score(trace, plate), size=_size(plate))


class AggregatePairing(Pairing):
    """The guide's latent variables over all data against the prior's, beside the model's reconstruction of the data.

    The guide needs reparametrised draws, but no density. The critic is called as ``critic(z)``.
    """

    def sides(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> RealAndFake:
        model_trace, guide_trace = traces.run_pair(model, guide, args, kwargs)
        observed = _observed(model_trace)
        plate = plate_of(observed, _rows(args))
        guided = _guided(guide_trace, plate, "Aggregate")
        prior_trace = traces.trace_of(replicating(model), args, kwargs)
        prior = _counterparts(guided, prior_trace)
        if not all(site["fn"].has_rsample for site in prior.values()):
            raise ValueError(
                "Aggregate wants a prior whose draws carry gradients, so that it is trained along. Use JointPairing()."
            )
        log_p = sum(
            traces.sum_to_dims(scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"]), (plate.dim,))
            for site in observed.values()
        )
        rest = -torch.as_tensor(log_p).mean()
        return RealAndFake((_latents(prior, plate),), (_latents(guided, plate),), rest=rest, size=_size(plate))


@dataclass(frozen=True)
class PosteriorPairing(Pairing):
    r"""An implicit guide by the ELBO: the critic stands for the log ratio of guide and reference, for the lack of a density.

    .. math:: \mathrm{ELBO} = \mathbb{E}_{q(z \mid x)}\Bigl[\log p(x, z) - \log r(z) - v(x, z)\Bigr], \qquad
        v \to \log \frac{q(z \mid x)}{r(z)} .

    The reference r is a normal distribution with the mean and covariance of the guide's draws, moved to mean 0 and covariance 1
    before the critic sees them (adaptive contrast, section 3.3 of the paper), so that the critic learns only what is not normal
    about the guide. The game's critic must estimate a log ratio. A guide inside the data's plate is judged beside its x,
    ``critic(x, z)``; one of latent variables that all data share by its draws alone, ``critic(z)``.

    Args:
        num_particles: draws from the guide in a step, for each row if it is inside the data's plate.

    Raises:
        ValueError: for a number of particles that is not positive.
    """

    num_particles: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.num_particles, bool) or not isinstance(self.num_particles, int) or self.num_particles < 1:
            raise ValueError(f"Posterior wants num_particles as a positive integer, but found {self.num_particles!r}.")

    def sides(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> RealAndFake:
        nesting = traces.max_plate_nesting(model, guide, args, kwargs)
        model_trace, guide_trace = traces.run_pair(model, guide, args, kwargs, traces.particles(self.num_particles, nesting))
        implicit = {
            name: site for name, site in traces.sample_sites(guide_trace).items() if density_of(site["fn"])[0] == "none"
        }
        if not implicit:
            raise ValueError(
                "Posterior is for a guide without a density, but every site of this one has one. Use SVI with Trace_ELBO."
            )
        for name in traces.latents(guide_trace):
            fn = traces.sample_sites(guide_trace)[name]["fn"]
            if not fn.has_rsample:
                raise ValueError(
                    f"Posterior wants a guide whose draws carry gradients, but site {name!r} holds {type(unwrap(fn)).__name__}."
                )
        plates = [{f.name for f in site["cond_indep_stack"]} - {traces.PARTICLES} for site in implicit.values()]
        frame = plate_of(_observed(model_trace), _rows(args)) if any(plates) and traces.observed(model_trace) else None
        within = [frame is not None and frame.name in names for names in plates]
        local = all(within)
        if any(within) and not local:
            raise ValueError(
                "Posterior wants all sites of the guide without a density inside the data's plate, or none, but found both "
                f"among {listed(implicit)}. Join them, or give some a density."
            )
        dims = (-nesting - 1, frame.dim) if frame is not None and local else (-nesting - 1,)
        u = torch.cat([_cells(site, dims) for site in implicit.values()], -1)
        if len(u) <= u.shape[1]:
            raise ValueError(
                f"Posterior wants more draws from the guide than its {u.shape[1]} coordinates, for their covariance, but found "
                f"{len(u)}. Raise num_particles."
            )
        for name in implicit:
            guide_trace.remove_node(name)
        log_p, log_q = (traces.log_prob(t, (-nesting - 1,), scaled=True).mean() for t in (model_trace, guide_trace))
        reference = _normal_of(u)
        y = torch.linalg.solve_triangular(reference.scale_tril, (u - reference.loc).T, upper=False).T
        size = _size(frame) if local else 1
        rest = (log_q - log_p) / size + reference.log_prob(u).mean()
        seen = (args[0].expand(self.num_particles, *args[0].shape).flatten(0, 1),) if local else ()
        return RealAndFake((*seen, y), (*seen, torch.randn_like(y)), rest=rest, size=size)

    def loss(self, game: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
        return game.log_ratio(real)


# What is read from traces.


def _observations(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
) -> tuple[Trace, Any, Tensor, Tensor, tuple[Tensor, ...]]:
    """A run that draws what it observes: its trace, the data's plate, what was observed and drawn, rows first, and the told."""
    trace = traces.trace_of(replicating(model), args, kwargs)
    sites = observed_sites(trace)
    plate = plate_of(sites, _rows(args))
    real, fake = (
        _joined([(value, site["fn"].event_dim) for value, site in zip(side, sites.values(), strict=True)], plate)
        for side in zip(*map(_both, sites.values()), strict=True)
    )
    return trace, plate, real, fake, _context(args, kwargs, sites, len(real))


def _joined(values: list[tuple[Tensor, int]], plate: Any) -> Tensor:
    """Values (batch..., *event_shape) with their event dimensions, rows first; several are flattened and joined."""
    parts = [value.movedim(plate.dim - event_dim, 0) for value, event_dim in values]
    return parts[0] if len(parts) == 1 else torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def _size(plate: Any) -> int:
    return plate.full_size or plate.size


def _rows(args: tuple) -> int | None:
    return len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else None


def _both(site: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """What was observed and what was drawn, as a network sees them: of one dtype, and 0 where it is masked."""
    fn: Any = unwrap(site["fn"])
    real, fake = both_of(site)
    dtype = torch.promote_types(real.dtype, fake.dtype)
    pretransform = getattr(fn.base if is_rounded(site) else fn, "pretransform", None)
    both = (value.to(fake.device, dtype).expand(fake.shape) for value in (real, fake))
    return masked(site, *(both if pretransform is None else map(pretransform, both)))


def _context(args: tuple, kwargs: Mapping[str, Any], sites: Mapping[str, Any], rows: int) -> tuple[Tensor, ...]:
    """What the model is told of each row: arguments with a row for each, but for those that it observes.

    Where what it observes is none of them as it came, the first is taken for the data.
    """
    found = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() and len(a) == rows]
    observed = [a for a in found if any(a is site["infer"]["obs"] for site in sites.values())] or found[:1]
    return tuple(a for a in found if not any(a is data for data in observed))


def _score(trace: Trace, plate: Any) -> tuple[Tensor | None, Tensor | None]:
    """Log probability of all that was drawn without a gradient: of each row, (rows,), and of what they share, ()."""

    def log_prob(name: str, fn: Any, value: Tensor) -> Tensor:
        density, advice = density_of(fn)
        if density != "exact":
            raise ValueError(
                f"Adversarial trains by draws with gradients, or by the score function of a density, but site {name!r} holds "
                f"{type(unwrap(fn)).__name__}, which has neither. {advice}"
            )
        return fn.log_prob(value)

    own, shared = scores(trace, plate.name, plate.dim, (1, plate.size), log_prob)
    return None if own is None else own[0], None if shared is None else shared[0]


def _guided(guide_trace: Trace, plate: Any, by: str) -> dict[str, Any]:
    """The guide's sites, once it is known that each is of single rows and drawn with gradients."""
    found = {name: site for name, site in traces.sample_sites(guide_trace).items() if not site["is_observed"]}
    if not found:
        raise ValueError(f"{by} wants a guide that draws latent variables, but this one draws none. Pass guide=.")
    for name, site in found.items():
        if all(f.name != plate.name for f in site["cond_indep_stack"]):
            raise ValueError(
                f"{by} matches latent variables of single rows, but {name!r} lies outside the data's plate. Use PosteriorPairing()."
            )
        if not site["fn"].has_rsample:
            raise ValueError(
                f"{by} wants a guide whose draws carry gradients, but site {name!r} holds a "
                f"{type(unwrap(site['fn'])).__name__}."
            )
    return found


def _observed(trace: Trace) -> dict[str, Any]:
    return {name: traces.sample_sites(trace)[name] for name in traces.observed(trace)}


def _counterparts(guided: Mapping[str, Any], trace: Trace) -> dict[str, Any]:
    """The model's sites of the guide's names."""
    sites = traces.sample_sites(trace)
    if missing := [name for name in guided if name not in sites]:
        raise ValueError(f"The guide draws {listed(missing)}, which the model does not have.")
    return {name: sites[name] for name in guided}


def _latents(sites: Mapping[str, Any], plate: Any) -> Tensor:
    """Their values, rows first; of several, flattened and joined."""
    return _joined([(site["value"], site["fn"].event_dim) for site in sites.values()], plate)


def _cells(site: Mapping[str, Any], dims: tuple[int, ...]) -> Tensor:
    """A value as a matrix, a row for each cell of the given batch dimensions, the first of which is the outermost."""
    value, event_dim = site["value"], site["fn"].event_dim
    value = value.reshape((1,) * (event_dim - dims[0] - value.dim()) + value.shape)
    return value.movedim([d - event_dim for d in dims], list(range(len(dims)))).flatten(len(dims)).flatten(0, len(dims) - 1)


@torch.no_grad()
def _normal_of(u: Tensor) -> dist.MultivariateNormal:
    """The normal distribution with mean and covariance of draws, (n, d); of what hardly varies it is not singular."""
    covariance = torch.cov(u.T).reshape(u.shape[1], u.shape[1])
    covariance = covariance + 1e-6 * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance)).to(u)
    return dist.MultivariateNormal(u.mean(0), covariance)
