r"""Pairings: the real and the fake inputs between which a critic discriminates.

=====================  ==========================================  =====================================================
pairing                inputs of the critic                        loss of the model and its guide
=====================  ==========================================  =====================================================
`ObservationsPairing`  x of the data, x of the model               adversarial loss: GAN
`JointPairing`         (x, z of the guide), (x, z of the model)    adversarial loss: ALI, BiGAN
`AggregatePairing`     z of the prior, z of the guide              adversarial loss and :math:`-\log p(x \mid z)`: AAE
`PosteriorPairing`     (x, z of the guide), (x, z of a reference)  the ELBO, with the critic as the log ratio: AVB
=====================  ==========================================  =====================================================

The model runs with its observed sites sampled, so any program with `pyro.sample` statements can be the model. Samples without
a gradient are trained by the score function, :math:`\nabla \mathbb{E}_q[\ell(x)] = \mathbb{E}_q[\ell(x) \nabla \log q(x)]`.

Dumoulin et al., *Adversarially Learned Inference* (arXiv 1606.00704); Donahue et al. (arXiv 1605.09782); Makhzani et al.,
*Adversarial Autoencoders* (arXiv 1511.05644); Mescheder et al., *Adversarial Variational Bayes* (arXiv 1701.04722).
"""

from __future__ import annotations

__all__ = ["AggregatePairing", "JointPairing", "ObservationsPairing", "Pairing", "PosteriorPairing", "RealAndFake"]

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.predictive import data_plate, draw_replicates
from pyro_genmodels._pyro.sites import PARTICLES
from pyro_genmodels.infer.adversarial import inputs
from pyro_genmodels.infer.adversarial.losses import AdversarialLoss
from pyro_genmodels.utils.distributions import density_of, unwrap
from pyro_genmodels.utils.errors import check_positive_int, listed
from pyro_genmodels.utils.precision import in_doubles


@dataclass(frozen=True)
class RealAndFake:
    """The critic's inputs from one run of a model and its guide.

    Attributes:
        real: real inputs, of distribution p in the adversarial loss, (rows, ...) each.
        fake: fake inputs, of distribution q, (rows, ...) each.
        context: inputs that go with both, (rows, ...) each.
        log_q: log probability (nats) of the samples without gradient in the fake inputs: of each row, (rows,), and of what rows
            share, (); None if there are none.
        other_loss: further loss of the model and its guide (nats per row).
        size: number of rows of all data.
    """

    real: tuple[Tensor, ...]
    fake: tuple[Tensor, ...]
    context: tuple[Tensor, ...] = ()
    log_q: tuple[Tensor | None, Tensor | None] = (None, None)
    other_loss: Tensor | float = 0.0
    size: int = 1


@dataclass(frozen=True)
class Pairing(ABC):
    """Base class of pairings. Pairings without options are equal if their classes are."""

    compares_data: ClassVar[bool] = False
    """True if the first inputs are data and samples of the data from the model."""

    @abstractmethod
    def critic_inputs(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> RealAndFake:
        """Run the model and its guide, and return the inputs of the critic."""

    def model_loss(self, loss: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
        """Return the loss of the model and its guide from the critic's outputs on real and fake inputs, (rows,)."""
        return loss.model_loss(real, fake)

    def check(self, loss: AdversarialLoss, *, pack: int, has_guide: bool, has_extra_loss: bool) -> None:  # noqa: B027
        """Raise a ValueError if the pairing does not go with the other arguments of `Adversarial`."""


class ObservationsPairing(Pairing):
    """Observed data and samples of the model in their place: the pairing of a GAN.

    Several observed sites are flattened and joined. Other arguments of the model with one row per datum, such as a context or
    covariates, are further arguments of the critic. Values of the distributions of this package are given to the critic as
    their networks see them: standardised, and integers with noise (`Dequantized`).
    """

    compares_data = True

    def critic_inputs(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> RealAndFake:
        run = inputs.draw_observations(model, args, kwargs)
        log_q = inputs.log_q_without_gradient(run.trace, run.plate)
        return RealAndFake((run.real,), (run.fake,), run.context, log_q, size=inputs.plate_size(run.plate))

    def check(self, loss: AdversarialLoss, *, pack: int, has_guide: bool, has_extra_loss: bool) -> None:
        if has_guide and not has_extra_loss:
            raise ValueError(
                "ObservationsPairing() does not use a guide: pass extra_loss=Trace_ELBO(), or pairing=JointPairing()."
            )


class JointPairing(Pairing):
    """Data with the guide's latent variables, and samples of the model with theirs: bidirectional GANs.

    The guide needs reparametrised samples, but no density. The critic is called as ``critic(x, z)``, or with a context as a
    third argument.
    """

    compares_data = True

    def critic_inputs(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> RealAndFake:
        run = inputs.draw_observations(model, args, kwargs)
        guided = inputs.guide_sites(traces.trace_of(guide, args, kwargs), run.plate, "JointPairing")
        z_real = inputs.joined_latents(guided, run.plate)
        z_fake = inputs.joined_latents(inputs.matching_sites(guided, run.trace), run.plate)
        log_q = inputs.log_q_without_gradient(run.trace, run.plate)
        return RealAndFake((run.real, z_real), (run.fake, z_fake), run.context, log_q, size=inputs.plate_size(run.plate))


class AggregatePairing(Pairing):
    """Latent variables of the prior and those of the guide over all data, with the model's reconstruction of the data.

    The guide needs reparametrised samples, but no density. The critic is called as ``critic(z)``.
    """

    def critic_inputs(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> RealAndFake:
        model_trace, guide_trace = traces.run_pair(model, guide, args, kwargs)
        observed = inputs.observed(model_trace)
        plate = data_plate(observed, inputs.num_rows(args))
        guided = inputs.guide_sites(guide_trace, plate, "AggregatePairing")
        prior = inputs.matching_sites(guided, traces.trace_of(draw_replicates(model), args, kwargs))
        if not all(site["fn"].has_rsample for site in prior.values()):
            raise ValueError(
                "AggregatePairing wants a prior whose samples carry gradients, so that it is trained too. Use JointPairing()."
            )
        log_p = sum(
            traces.sum_to_dims(scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"]), (plate.dim,))
            for site in observed.values()
        )
        return RealAndFake(
            (inputs.joined_latents(prior, plate),),
            (inputs.joined_latents(guided, plate),),
            other_loss=-torch.as_tensor(log_p).mean(),
            size=inputs.plate_size(plate),
        )


@dataclass(frozen=True)
class PosteriorPairing(Pairing):
    r"""The ELBO for a guide without a density: the critic estimates the log ratio of the guide to a reference.

    .. math:: \mathrm{ELBO} = \mathbb{E}_{q(z \mid x)}\Bigl[\log p(x, z) - \log r(z) - v(x, z)\Bigr], \qquad
        v \to \log \frac{q(z \mid x)}{r(z)} .

    The reference r is a normal distribution with the mean and covariance of the guide's samples. The critic sees samples that
    are transformed to mean 0 and covariance 1 (adaptive contrast, section 3.3 of the paper), so that it learns only how the
    guide differs from a normal distribution. The critic of the adversarial loss must estimate a log ratio. For a guide inside
    the data's plate the critic is called as ``critic(x, z)``; for latent variables that all data share, as ``critic(z)``.

    Args:
        num_particles: number of samples from the guide in a step, for each row if the guide is inside the data's plate.

    Raises:
        ValueError: if `num_particles` is no positive integer.
    """

    num_particles: int = 1

    def __post_init__(self) -> None:
        check_positive_int("PosteriorPairing", num_particles=self.num_particles)

    def check(self, loss: AdversarialLoss, *, pack: int, has_guide: bool, has_extra_loss: bool) -> None:
        if not loss.estimates_ratio:
            raise ValueError(
                f"PosteriorPairing wants a critic that estimates a log ratio, but that of {type(loss).__name__} does not. Use "
                "NonSaturating()."
            )
        if pack > 1:
            raise ValueError(
                f"PosteriorPairing wants the log ratio of single rows, but this critic sees packs of {pack}. Use pack=1."
            )

    def critic_inputs(
        self, model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
    ) -> RealAndFake:
        nesting = traces.max_plate_nesting(model, guide, args, kwargs)
        model_trace, guide_trace = traces.run_pair(model, guide, args, kwargs, traces.particles(self.num_particles, nesting))
        implicit = _implicit_sites(guide_trace)
        plate = _plate_around(implicit, model_trace, args)
        dims = (-nesting - 1,) if plate is None else (-nesting - 1, plate.dim)
        z = torch.cat([inputs.rows_of_batch(site, dims) for site in implicit.values()], -1)
        if len(z) <= z.shape[1]:
            raise ValueError(
                f"PosteriorPairing wants more samples of the guide than its {z.shape[1]} coordinates, for their covariance, "
                f"but found {len(z)}. Raise num_particles."
            )
        for name in implicit:
            guide_trace.remove_node(name)
        log_p, log_q = (traces.log_prob(t, (-nesting - 1,), scaled=True).mean() for t in (model_trace, guide_trace))
        reference = _normal_fit(z)
        whitened = torch.linalg.solve_triangular(reference.scale_tril, (z - reference.loc).T, upper=False).T
        size = 1 if plate is None else inputs.plate_size(plate)
        other_loss = (log_q - log_p) / size + reference.log_prob(z).mean()
        x = () if plate is None else (args[0].expand(self.num_particles, *args[0].shape).flatten(0, 1),)
        return RealAndFake((*x, whitened), (*x, torch.randn_like(whitened)), other_loss=other_loss, size=size)

    def model_loss(self, loss: AdversarialLoss, real: Tensor, fake: Tensor) -> Tensor:
        return loss.log_ratio(real)


def _implicit_sites(guide_trace: Trace) -> dict[str, Any]:
    """Return the guide's sites without a density by name. All its latent variables must carry gradients."""
    sites = traces.sample_sites(guide_trace)
    implicit = {name: site for name, site in sites.items() if density_of(site["fn"])[0] == "none"}
    if not implicit:
        raise ValueError(
            "PosteriorPairing wants a guide without a density, but every site of this one has one. Use SVI with Trace_ELBO."
        )
    for name in traces.latents(guide_trace):
        if not sites[name]["fn"].has_rsample:
            raise ValueError(
                f"PosteriorPairing wants a guide whose samples carry gradients, but site {name!r} holds "
                f"{type(unwrap(sites[name]['fn'])).__name__}."
            )
    return implicit


def _plate_around(implicit: Mapping[str, Any], model_trace: Trace, args: tuple) -> Any:
    """Return the frame of the data's plate if all implicit sites are inside it, and None if none of them is.

    Args:
        implicit: the guide's sites without a density, by name.
        model_trace: trace of the model. The data's plate is around all its observed sites; without any the result is None.
        args: positional arguments of the model, which give the number of rows of the data.

    Raises:
        ValueError: if only some of the implicit sites are inside it; or if any is inside a plate, and the observed sites share
            none.
    """
    plates = [{f.name for f in site["cond_indep_stack"]} - {PARTICLES} for site in implicit.values()]
    if not (any(plates) and traces.observed(model_trace)):
        return None
    plate = data_plate(inputs.observed(model_trace), inputs.num_rows(args))
    inside = [plate.name in names for names in plates]
    if any(inside) and not all(inside):
        raise ValueError(
            "PosteriorPairing wants all sites of the guide without a density inside the data's plate, or none, but found both "
            f"among {listed(implicit)}. Join them, or give some a density."
        )
    return plate if all(inside) else None


@torch.no_grad()
def _normal_fit(z: Tensor) -> dist.MultivariateNormal:
    """Return the normal distribution with the mean and covariance of samples (n, d), regularised so that it is not singular.

    Each variance is raised by a millionth of itself, and of the square of the rounding of its coordinate, in whatever unit.
    """
    wide = in_doubles(z)
    covariance = torch.cov(wide.T).reshape(z.shape[1], z.shape[1])
    rounding = torch.finfo(z.dtype).eps * wide.abs().max(0).values
    variances = torch.maximum(covariance.diagonal(), torch.where(rounding == 0, 1.0, rounding.square()))
    return dist.MultivariateNormal(wide.mean(0).to(z), (covariance + 1e-6 * variances.diag()).to(z))
