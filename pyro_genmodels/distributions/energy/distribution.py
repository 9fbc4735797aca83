r"""Energies: :math:`p(x \mid c) = p_0(x)\, e^{-E(x, c)} / Z(c)`. The constant is unknown; its gradient is a mean.

.. math:: \nabla_\theta \log Z = -\mathbb{E}_{x \sim p}[\nabla_\theta E(x)], \qquad
    \nabla_x \log p(x) = \nabla_x \log p_0(x) - \nabla_x E(x).

:math:`p_0` is a flat measure, or a density that is *tilted*. `log_prob` carries the gradient of log Z by *negatives*, draws
from the energy as it stands; the score knows nothing of Z. LeCun et al., *A Tutorial on Energy-Based Learning* (2006); Song
and Kingma, *How to Train Your Energy-Based Models* (arXiv 2101.03288).
"""

from __future__ import annotations

__all__ = ["Energy"]

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log10
from types import EllipsisType
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, biject_to, constraints

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.capabilities import ContrastiveTerms, ScoreJumps
from pyro_genmodels.distributions.energy.negatives import Annealed, Contrastive, Negatives, Persistent
from pyro_genmodels.distributions.energy.noise import Noisy
from pyro_genmodels.distributions.energy.path import AnnealingPath, kind_of, start_of
from pyro_genmodels.distributions.energy.state import LogPartition, Memory, fingerprint
from pyro_genmodels.samplers import GibbsWithGradients, Langevin, Sampler, Target, anneal, annealed_langevin, run
from pyro_genmodels.samplers.annealing import schedule
from pyro_genmodels.samplers.target import value_and_score
from pyro_genmodels.utils.distributions import (
    Density,
    has_active_dropout,
    is_real,
    map_tensors,
    modules_and_tensors,
    over_events,
)

MAX_LOG_DENSITY = 1e6
"""Log densities (nats) beyond this are taken for an explosion: in single precision they are no longer told apart."""

LAYERS_WITH_KINKS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.Hardswish, nn.MaxPool2d,
)  # fmt: skip
"""Layers whose gradient is discontinuous."""


class Energy(GenerativeDistribution):
    """The distribution of an energy.

    Args:
        energy: (x, context) -> energies (n,) in nats, with x (n, ...) as `features` says; called without context where there is
            none. It may offer ``tempered(x, context, beta)``, a path of its own, and ``gibbs(x, context, beta, natural)``, a
            sweep (see `RestrictedBoltzmannMachine`).
        event_shape: shape of one datum.
        context: (batch..., c) or None.
        base: density of the data that is tilted; None is a flat measure, or with `tilted` the start.
        support: where one coordinate lies: the reals, an interval or another set that the reals can be mapped to, `boolean`,
            or integers 0 .. K - 1.
        coordinates: bijection from positions of chains to data, over whole events; by default what the support asks for. Of
            discrete data there is none: positions are zeros and ones, or one-hot in a last dimension.
        features: positions -> what the energy is given; by default the data, or of discrete data the positions.
        start: distribution of positions that paths start with; by default standard normal, uniform over the data of an
            interval, even over discrete data.
        tilted: whether without a base the start is tilted.
        sampler: that moves chains; by default `Langevin` or `GibbsWithGradients`. None draws nothing.
        negatives: where they come from; by default chains that go on, or with a context annealed ones.
        memory: where chains go on and log Z is kept; None remembers nothing.
        num_steps: of the sampler to a draw.
        noise: lowest and highest level of noise that the energy is told, as the logarithm at the end of its context; it is then
            the energy of the data with the lowest, unless `at_noise` says otherwise.
        weighs: names of latent variables that log Z of each context may weigh, as far as is known where this was made.
        validate_args: as everywhere in torch.

    Raises:
        ValueError: on drawing, or on a gradient of log Z, without a sampler; on energies of another shape than (n,).
        FloatingPointError: by `log_prob`, if chains run away or energies explode, saying what to change.

    Example:
        >>> double_well = Energy(lambda x: (x**2 - 1).square().sum(-1), (1,))
        >>> double_well.density, double_well.unnormalized_log_prob(torch.ones(1)), double_well.sample((20,)).shape
        ('unnormalized', tensor(-0.), torch.Size([20, 1]))
    """

    has_rsample = False
    has_negatives = True
    intractable = True
    advice = (
        "Train it by ContrastiveDivergence(), NoiseContrastive(noise=...) or score matching, or in a model by Pyro's losses; "
        "log_likelihood(fit, x) estimates log Z, and so does log_partition(energy())."
    )

    def __init__(
        self,
        energy: Callable[..., Tensor],
        event_shape: Sequence[int],
        *,
        context: Tensor | None = None,
        base: Distribution | None = None,
        support: constraints.Constraint = constraints.real,
        coordinates: Transform | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        start: Distribution | None = None,
        tilted: bool = False,
        sampler: Sampler | EllipsisType | None = ...,
        negatives: Negatives | None = None,
        memory: Memory | None = None,
        num_steps: int = 500,
        noise: tuple[float, float] | None = None,
        weighs: Sequence[str] = (),
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(event_shape, context=context, support=support, validate_args=validate_args)
        if not (sampler is None or sampler is ... or isinstance(sampler, Sampler)):
            raise TypeError(f"Energy wants a sampler such as Langevin(), but found {sampler!r}.")
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"Energy wants num_steps of 1 or more to a draw, but found {num_steps!r}.")
        if base is not None and (base.batch_shape or base.event_shape != self.event_shape):
            raise ValueError(
                f"An energy tilts a density of one datum, of event shape {tuple(self.event_shape)}, but the base has batch "
                f"shape {tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}."
            )
        kind, classes = kind_of(support)
        if kind == "real" and coordinates is None and not is_real(support):
            coordinates = over_events(biject_to(support), len(self.event_shape))
        if start is None:
            modules, tensors = modules_and_tensors((energy, context))
            tensors += [t for module in modules for t in (*module.parameters(), *module.buffers())]
            start = start_of(support, self.event_shape)
            if like := [t for t in tensors if t.is_floating_point()]:
                start = map_tensors(start, lambda t: t.to(like[0]))
        self.network = energy
        if noise is not None:
            energy = Noisy(energy, noise[0], scaled=tilted and base is None)
        self.path = AnnealingPath(energy, self.event_shape, kind, classes, start, base, tilted, coordinates, features)
        self.sampler = (Langevin() if kind == "real" else GibbsWithGradients()) if sampler is ... else sampler
        self.negatives = negatives or (Persistent() if context is None else Annealed())
        self.memory, self.num_steps, self.noise, self.weighs = memory, num_steps, noise, weighs
        self._log_z: LogPartition | None = None
        if self.sampler is not None:
            self.sampler.check(self.path.target())

    # Densities.

    @property
    def density(self) -> Density:
        known = self.log_partition
        return "unnormalized" if known is None else "exact" if known.kind == "exact" else "estimate"

    @property
    def log_partition(self) -> LogPartition | None:
        """What is known of log Z with the parameters as they are; None where nothing is."""
        if self._log_z is not None or self.memory is None or self.context is not None or self.memory.kind < 0:
            return self._log_z
        return self.memory.log_partition(self.fingerprint())

    def normalized(self, log_partition: LogPartition) -> Energy:
        """The same distribution with log Z given, () or of its batch shape, and kept whatever becomes of the parameters."""
        return self.replace(_log_z=log_partition)

    def remember_log_partition(self, log_partition: LogPartition) -> None:
        """Has the family, where there is one and no context, remember the best log Z until its parameters change."""
        known = self.log_partition
        worse = known is not None and known.kind != "unreliable" and log_partition.kind != "exact"
        if worse and (known.kind == "exact" or known.std_error <= log_partition.std_error):  # type: ignore[union-attr]
            return
        if self.memory is not None and self.context is None:
            self.memory.put_log_partition(log_partition, self.fingerprint())

    def fingerprint(self) -> Tensor:
        """Of all that log Z depends on."""
        path = self.path
        modules, tensors = modules_and_tensors((path.energy, path.base, path.start if path.tilted else None, path.coordinates))
        return fingerprint([t for module in modules for t in (*module.parameters(), *module.buffers())] + tensors)

    def unnormalized_log_prob(self, value: Tensor) -> Tensor:
        """The log density (nats) up to log Z, without negatives: (sample..., *batch_shape)."""
        return self.path.log_density(*self.aligned(value)[:2])

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        log_p, known = self.path.log_density(y, context), self.log_partition
        if known is None and self.weighs and torch.is_grad_enabled():
            raise ValueError(
                f"The variable {self.weighs[0]!r}, drawn without a gradient, would be weighed by the energy of each of its "
                "values without log Z of each, which is not known. Draw it after the energy's site if it is not in the "
                "context; else relax it, or take a family with an exact density, such as Flow."
            )
        if known is not None:
            log_p = log_p - known.value.to(log_p)
        if self.wants_negatives:
            log_f = self.checked(self.path.log_f(self.negatives.draw(self, y, context), context)).mean(0)
            log_p = log_p - (log_f - log_f.detach())
        return log_p

    def checked(self, log_f: Tensor) -> Tensor:
        """Log densities of negatives as they are.

        Raises:
            FloatingPointError: if energies explode, where arguments are validated.
        """
        if self._validate_args and not (log_f.abs() < MAX_LOG_DENSITY).all():
            raise FloatingPointError(
                f"energies explode: a negative has a log density of {log_f.flatten()[log_f.abs().argmax()]:.3g} nats. Lower "
                "the learning rate, use ContrastiveDivergence(regularization=0.1), more steps of negatives, or a base to tilt"
            )
        return log_f

    @property
    def wants_negatives(self) -> bool:
        """Whether a gradient of log Z is asked for: where gradients are, of parameters or of the context."""
        if not torch.is_grad_enabled():
            return False
        modules, tensors = modules_and_tensors((self.context, self.path.energy, self.path.base))
        if any(t.requires_grad for t in [p for module in modules for p in module.parameters()] + tensors):
            return True
        if isinstance(self.path.energy, nn.Module):
            return False
        with torch.random.fork_rng():  # of a plain function nobody knows the parameters: one datum shows them
            u, context = self.path.begin((1,)), self.context
            one = None if context is None else context.reshape(-1, context.shape[-1])[:1].detach()
            return self.path.energies(u, one).requires_grad

    # Capabilities.

    @property
    def score_jumps(self) -> ScoreJumps | None:
        """The reason why the score is discontinuous, as far as the layers of the network tell."""
        layers = self.network.modules() if isinstance(self.network, nn.Module) else ()
        has_kinks = any(isinstance(layer, LAYERS_WITH_KINKS) for layer in layers)
        return ScoreJumps("with ReLU in its network", "smooth units such as SiLU") if has_kinks else None

    def score_coordinates(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, int]:
        """Return the log density of positions of chains, the positions of the data, and their number of event dimensions."""
        y, context, _ = self.aligned(x)
        return lambda u: self.path.log_f(u, context), self.path.encode(y), len(self.event_shape)

    def contrastive_terms(self, x: Tensor, *, steps: int | None = None, from_data: bool = False) -> ContrastiveTerms:
        """Return the log densities of data and negatives in the coordinates of the chains.

        Raises:
            ValueError: if there is no sampler, or `steps` is given and the negatives have no steps to set.
            FloatingPointError: if chains run away or energies explode.
        """
        y, context, _ = self.aligned(x)
        negatives: Any = Contrastive(steps or 1) if from_data else self.negatives
        if steps is not None and not from_data:
            if not hasattr(negatives, "steps"):
                raise ValueError(f"{type(negatives).__name__} has no steps to set, but found steps={steps}. Leave steps out.")
            negatives = replace(negatives, steps=steps)
        data, others = self.path.encode(y), negatives.draw(self, y, context)

        def squared_energies() -> Tensor:
            return self.path.energies(data, context).square() + self.path.energies(others, context).square().mean(0)

        log_f = self.checked(self.path.log_f(others, context))
        return ContrastiveTerms(self.path.log_f(data, context), log_f, squared_energies)

    # Draws.

    def draw_negatives(self, value: Tensor) -> Tensor:
        """Positions of negatives for data, (m, *position); where each datum has its own, (m, batch..., *position)."""
        return self.negatives.draw(self, *self.aligned(value)[:2])

    def chains(self, what: str) -> Sampler:
        """The sampler.

        Raises:
            ValueError: if there is none, or if the energy drops units at random.
        """
        if self.sampler is None:
            raise ValueError(
                f"This energy has no sampler, and so no {what}. Build it with one such as Langevin(), or train it by "
                "NoiseContrastive(noise=...), SlicedScoreMatching() or DenoisingScoreMatching(), which draw nothing from it."
            )
        if has_active_dropout(self.network, self.path.base):
            raise ValueError(
                f"An energy whose dropout is active has no {what}, for it has no density. Build it without dropout."
            )
        return self.sampler

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        sampler, memory, n = self.chains("draws"), self.memory, shape.numel()
        if self.noise is not None:
            return self._denoised_draw(shape)
        target = self.path.target(None if context is None else context.reshape(-1, context.shape[-1]))
        step_size = None if memory is None else memory.step_size
        if context is None and memory is not None and memory.has_begun:
            u = memory.chains[torch.randint(len(memory.chains), (n,), device=memory.chains.device)]
        else:
            u = self.path.begin((n,))
            u = sampler.replicate(anneal(target, sampler.base_kernel, u, schedule(self.num_steps, u), rate=0.1)[0])
        u = sampler.cold(run(sampler, target, u, self.num_steps, step_size=step_size, rate=0.1).x)
        u = self.path.decode(self.sound(u))
        return u.reshape(shape + self.event_shape)

    def target(self) -> Target:
        """The path to the density, as samplers want it; with a context, of one chain for each row."""
        context = None if self.context is None else self.context.reshape(-1, self.context.shape[-1])
        return replace(self.path.target(context), support=self.support, chains=None if context is None else len(context))

    def _denoised_draw(self, shape: Size) -> Tensor:
        """Draws led down the levels of noise."""
        low, high = self.noise
        whole = self.expand(shape)

        def score(u: Tensor, sigma: Tensor) -> Tensor:
            at = whole.at_noise(sigma.expand(shape))
            target = Target(lambda u, _: at.path.log_f(u, at.context), len(self.path.position_shape))
            return value_and_score(target, u, 1.0)[1]

        u = self.path.begin(shape)
        levels = torch.logspace(log10(high), log10(low), 20, dtype=u.dtype, device=u.device)
        u = u + high * torch.randn_like(u)
        return self.path.decode(self.sound(annealed_langevin(score, u, levels, steps=max(self.num_steps // 20, 1))))

    def sound(self, u: Tensor) -> Tensor:
        """Positions of draws as they are.

        Raises:
            FloatingPointError: if a chain ran away, where arguments are validated.
        """
        lost = ~u.reshape(-1, self.path.position_shape.numel()).isfinite().all(1)
        if self._validate_args and lost.any():
            raise FloatingPointError(
                f"{int(lost.sum())} of {len(lost)} chains ran away to infinity: the energy does not rise far from the data, or "
                "steps are too large. Use Langevin(adjusted=True), a smaller step_size, or a base to be tilted"
            )
        return u

    def at_noise(self, sigma: Tensor) -> Energy:
        """The distribution of the data with noise of deviation sigma (batch...) added, in the coordinates of chains.

        Raises:
            ValueError: if the energy is not told the level of noise.
        """
        if not isinstance(self.path.energy, Noisy):
            raise ValueError("This energy is not told the level of noise. Build it with EnergyModel(..., noise=(low, high)).")
        shape = torch.broadcast_shapes(sigma.shape, self.batch_shape)
        level = sigma.log().expand(shape)[..., None]
        own = None if self.context is None else self.context.expand(*shape, self.context.shape[-1])
        context = level if own is None else torch.cat([own, level], -1)
        path = replace(self.path, energy=replace(self.path.energy, told=True))
        return self.replace(path=path, context=context, noise=None, _batch_shape=shape, negatives=Annealed(), _log_z=None)

    def replace(self, **changes: Any) -> Energy:
        """The same distribution with other attributes; nothing is copied."""
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self.__dict__, **changes)
        return new
