r"""Energies: :math:`p(x \mid c) = p_0(x)\, e^{-E(x, c)} / Z(c)`. The constant is unknown; its gradient is an expectation.

.. math:: \nabla_\theta \log Z = -\mathbb{E}_{x \sim p}[\nabla_\theta E(x)], \qquad
    \nabla_x \log p(x) = \nabla_x \log p_0(x) - \nabla_x E(x).

The density is relative to :math:`p_0`, a flat measure or a density that is *tilted*. `log_prob` estimates the gradient of log Z
from *negatives*, samples of the present energy; the score does not depend on Z.

LeCun et al., *A Tutorial on Energy-Based Learning* (2006); Song and Kingma, *How to Train Your Energy-Based Models* (arXiv
2101.03288).
"""

from __future__ import annotations

__all__ = ["Energy"]

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log10
from typing import Any, Literal

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, biject_to, constraints

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.capabilities import ContrastiveTerms, ScoreJumps
from pyro_genmodels.distributions.energy.chains import DRAWS_TUNING_RATE, EnergyChains
from pyro_genmodels.distributions.energy.negatives import Annealed, Contrastive, Negatives, Persistent
from pyro_genmodels.distributions.energy.noise import NoiseConditionalEnergy
from pyro_genmodels.distributions.energy.path import AnnealingPath, PathOptions, space_of
from pyro_genmodels.distributions.energy.state import LogPartition, PartitionCache, ReplayBuffer
from pyro_genmodels.samplers import Langevin, Sampler, Target, default_sampler, run
from pyro_genmodels.utils.distributions import (
    Density,
    check_exact_density,
    is_real,
    map_tensors,
    modules_and_tensors,
    over_events,
)
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.rng import forked_rng

MAX_LOG_DENSITY = 1e6
"""Absolute log density (nats) above which an energy counts as exploded: single precision no longer resolves differences."""
NUM_NOISE_LEVELS = 20
"""Noise levels of annealed Langevin sampling, from the highest to the lowest."""

LAYERS_WITH_KINKS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.Hardswish, nn.MaxPool2d,
)  # fmt: skip
"""Layers whose gradient is discontinuous."""


class Energy(GenerativeDistribution):
    """The distribution of an energy.

    Args:
        energy: (x, context) -> energies (n,) in nats, for features x (n, ...); called as energy(x) without a context. It may
            have the methods ``tempered(x, context, beta)``, an annealing path of its own, and ``gibbs(x, context, beta,
            natural)``, a Gibbs sweep (see `RestrictedBoltzmannMachine`).
        event_shape: shape of one datum.
        context: (batch..., c) or None.
        base: density of the data that is tilted; None is a flat measure, or the start if the path options say so.
        support: support of one coordinate: the reals, an interval or another set with a bijection from the reals, `boolean`, or
            integers 0 .. K - 1.
        path: coordinates, features and start of the annealing path; None takes the defaults of `PathOptions`.
        sampler: Markov kernel of the chains. "default" is `Langevin` over real numbers and `GibbsWithGradients` over discrete
            data; None has no chains.
        negatives: source of negatives; None is `Persistent`, or `Annealed` with a context.
        num_steps: steps of the sampler per draw.
        noise: lowest and highest noise level of a noise-conditional energy, whose context ends with the logarithm of the level.
            The distribution is that at the lowest level; see `at_noise`.
        replay_buffer: chains that continue from call to call; None keeps none.
        partition_cache: log Z and the parameters it holds for; None keeps none.
        validate_args: see `torch.distributions.Distribution`.

    Raises:
        TypeError: if the sampler is not one.
        ValueError: for a base over other events, or a sampler that cannot move the data; by draws and gradients of log Z,
            without a sampler; by all densities, for energies of another shape than (n,).
        FloatingPointError: by `log_prob`, if chains reach infinity or energies explode, with advice.

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
    latents_without_gradient: Sequence[str] = ()
    """Names of latent variables that were drawn without a gradient, and whose values `log_prob` may therefore weight."""

    def __init__(
        self,
        energy: Callable[..., Tensor],
        event_shape: Sequence[int],
        *,
        context: Tensor | None = None,
        base: Distribution | None = None,
        support: constraints.Constraint = constraints.real,
        path: PathOptions | None = None,
        sampler: Sampler | Literal["default"] | None = "default",
        negatives: Negatives | None = None,
        num_steps: int = 500,
        noise: tuple[float, float] | None = None,
        replay_buffer: ReplayBuffer | None = None,
        partition_cache: PartitionCache | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(event_shape, context=context, support=support, validate_args=validate_args)
        check_positive_int("Energy", num_steps=num_steps)
        if base is not None:
            check_exact_density("Energy", "base", base, self.event_shape)
        self.network, self.noise = energy, noise
        self.path = self._built_path(energy, base, support, path or PathOptions())
        self.sampler = default_sampler(self.path.space) if sampler == "default" else sampler
        if self.sampler is not None:
            if not isinstance(self.sampler, Sampler):
                raise TypeError(f"Energy wants a sampler such as Langevin(), but found {sampler!r}.")
            self.sampler.check(self.path.target())
        self.negatives = negatives or (Persistent() if context is None else Annealed())
        self.num_steps, self.replay_buffer, self.partition_cache = num_steps, replay_buffer, partition_cache
        self._given_log_partition: LogPartition | None = None

    def _built_path(
        self,
        energy: Callable[..., Tensor],
        base: Distribution | None,
        support: constraints.Constraint,
        options: PathOptions,
    ) -> AnnealingPath:
        coordinates, start = options.coordinates, options.start
        if coordinates is None and not (support.is_discrete or is_real(support)):
            coordinates = over_events(biject_to(support), len(self.event_shape))
        space = space_of(support, coordinates)
        if start is None:
            start = space.start(torch.zeros(space.position_shape(self.event_shape)))
            if like := [t for t in _tensors_of((energy, self.context)) if t.is_floating_point()]:
                start = map_tensors(start, lambda t: t.to(like[0]))
        tilts_start = options.tilt_start and base is None
        if self.noise is not None:
            energy = NoiseConditionalEnergy(energy, self.noise[0], tilts_normal=tilts_start)
        return AnnealingPath(energy, self.event_shape, space, start, base, options.tilt_start, options.features)

    @property
    def chains(self) -> EnergyChains:
        """The path, sampler and replay buffer that move chains."""
        return EnergyChains(self.path, self.sampler, self.replay_buffer, self.num_steps, validate=self._validate_args)

    # Densities.

    @property
    def density(self) -> Density:
        known = self.log_partition
        return "unnormalized" if known is None else "exact" if known.kind == "exact" else "estimate"

    @property
    def log_partition(self) -> LogPartition | None:
        """The value of log Z for the present parameters, or None if it is not known."""
        given, cache = self._given_log_partition, self.partition_cache
        if given is not None or self.context is not None or cache is None or cache.is_empty:
            return given
        return cache.get(self._dependencies())

    def normalized(self, log_partition: LogPartition) -> Energy:
        """Return the same distribution with the given log Z, () or of its batch shape, even if parameters change."""
        return self.replace(_given_log_partition=log_partition)

    def remember_log_partition(self, log_partition: LogPartition) -> None:
        """Store log Z in the family's cache until its parameters change, unless a better value is stored already."""
        if self.partition_cache is None or self.context is not None:
            return
        known = self.log_partition
        replaces = known is None or known.kind == "unreliable" or log_partition.kind == "exact"
        if replaces or (known.kind != "exact" and not known.std_error <= log_partition.std_error):  # type: ignore[union-attr]
            self.partition_cache.put(log_partition, self._dependencies())

    def _dependencies(self) -> list[Tensor]:
        """Return all tensors that log Z depends on."""
        path = self.path
        return _tensors_of((path.energy, path.base, path.start if path.tilted else None, path.space))

    def unnormalized_log_prob(self, value: Tensor) -> Tensor:
        """Return the log density (nats) without log Z, (sample..., *batch_shape).

        It draws no negatives. Its gradient in the parameters therefore lacks that of log Z, which `log_prob` estimates.

        Args:
            value: data, (sample..., *batch_shape, *event_shape).
        """
        return self.path.log_density(*self.aligned(value)[:2])

    @property
    def _network_dtype(self) -> None:
        """None, since values are converted to positions before their type changes: see `AnnealingPath.encode`."""

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        log_p, known = self.path.log_density(y, context), self.log_partition
        if known is None and self.latents_without_gradient and torch.is_grad_enabled():
            raise ValueError(
                f"The variable {self.latents_without_gradient[0]!r}, drawn without a gradient, would be weighed by energies "
                "without log Z of each of its values, which is not known. Draw it after the energy's site if it is not in the "
                "context; else relax it, or use a family with an exact density, such as Flow."
            )
        if known is not None:
            log_p = log_p - known.value.to(log_p)
        if self.needs_negatives:
            log_f = self._checked(self.path.log_f(self.negatives.draw(self.chains, y, context), context)).mean(0)
            log_p = log_p - (log_f - log_f.detach())
        return log_p

    def _checked(self, log_f: Tensor) -> Tensor:
        """Return the log densities of negatives as they are, or raise a FloatingPointError if energies explode."""
        if self._validate_args and not (log_f.abs() < MAX_LOG_DENSITY).all():
            raise FloatingPointError(
                f"energies explode: a negative has a log density of {log_f.flatten()[log_f.abs().argmax()]:.3g} nats. Lower "
                "the learning rate, use ContrastiveDivergence(regularization=0.1), more steps of negatives, or a base to tilt"
            )
        return log_f

    @property
    def needs_negatives(self) -> bool:
        """True if gradients are enabled and log Z depends on a parameter, or on a context, that requires one."""
        if not torch.is_grad_enabled():
            return False
        modules, tensors = modules_and_tensors((self.context, self.path.energy, self.path.base))
        if any(t.requires_grad for t in [p for module in modules for p in module.parameters()] + tensors):
            return True
        if isinstance(self.path.energy, nn.Module):
            return False
        with forked_rng():  # a plain function may hold parameters: evaluating it at one position shows them
            u, context = self.path.begin((1,)), self.context
            row = None if context is None else context.reshape(-1, context.shape[-1])[:1].detach()
            return self.path.energies(u, row).requires_grad

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
        data, others = self.path.encode(y), negatives.draw(self.chains, y, context)

        def squared_energies() -> Tensor:
            return self.path.energies(data, context).square() + self.path.energies(others, context).square().mean(0)

        log_f = self._checked(self.path.log_f(others, context))
        return ContrastiveTerms(self.path.log_f(data, context), log_f, squared_energies)

    # Draws.

    def draw_negatives(self, value: Tensor) -> Tensor:
        """Draw positions of negatives, (m, *position); or (m, batch..., *position), if each datum has its own."""
        return self.negatives.draw(self.chains, *self.aligned(value)[:2])

    def target(self) -> Target:
        """Return the density as a target of samplers; with a context, it has one chain per row."""
        return self.path.target(self._context_rows(self.context), self.support)

    def _context_rows(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else context.reshape(-1, context.shape[-1])

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        if self.noise is not None:
            return self._draw_by_noise(shape)
        u = self.chains.draw(shape.numel(), self._context_rows(context))
        return self.path.decode(u).reshape(shape + self.event_shape)

    def _draw_by_noise(self, shape: Size) -> Tensor:
        """Draw by adjusted Langevin dynamics at each noise level, from the highest down to the lowest.

        The draws follow the density at the lowest level. Step sizes are tuned in units of the variance of the noise.
        """
        self.chains.required_sampler("draws")
        low, high = self.noise
        expanded = self.expand(shape)

        def target(sigma: Tensor) -> Target:
            noisy = expanded.at_noise(sigma.expand(shape))
            return Target(lambda u, _: noisy.path.log_f(u, noisy.context), len(self.path.position_shape))

        u = self.path.begin(shape)
        levels = torch.logspace(log10(high), log10(low), NUM_NOISE_LEVELS, dtype=u.dtype, device=u.device)
        u, size = u + high * torch.randn_like(u), u.new_tensor(0.5)
        steps = max(self.num_steps // NUM_NOISE_LEVELS, 1)
        for sigma in levels:
            variance = sigma.square()
            u, tuned, _ = run(Langevin(), target(sigma), u, steps, step_size=size * variance, rate=DRAWS_TUNING_RATE)
            size = tuned / variance
        return self.path.decode(self.chains.check_finite(u))

    def at_noise(self, sigma: Tensor) -> Energy:
        """Return the distribution of the data with noise of deviation sigma (batch...) added, in the coordinates of chains.

        Raises:
            ValueError: if the energy is not noise-conditional.
        """
        energy = self.path.energy
        if not isinstance(energy, NoiseConditionalEnergy):
            raise ValueError("This energy has no noise levels. Build it with EnergyModel(..., noise=(low, high)).")
        shape = torch.broadcast_shapes(sigma.shape, self.batch_shape)
        level = sigma.log().expand(shape)[..., None]
        own = None if self.context is None else self.context.expand(*shape, self.context.shape[-1])
        return self.replace(
            path=replace(self.path, energy=replace(energy, level_in_context=True)),
            context=level if own is None else torch.cat([own, level], -1),
            noise=None,
            negatives=Annealed(),
            _batch_shape=shape,
            _given_log_partition=None,
        )

    def replace(self, **changes: Any) -> Energy:
        """Return the same distribution with other attributes; nothing is copied."""
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self.__dict__, **changes)
        return new


def _tensors_of(parts: Any) -> list[Tensor]:
    """Return the parameters and buffers of all modules in the parts, and all other tensors."""
    modules, tensors = modules_and_tensors(parts)
    return [t for module in modules for t in (*module.parameters(), *module.buffers())] + tensors
