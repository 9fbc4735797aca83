r"""Energy-based models: :math:`p(x \mid c) \propto p_0(x)\, e^{-E(x, c)}`. The constant is unknown; the score is not.

LeCun et al., *A Tutorial on Energy-Based Learning* (2006). They are trained by `ContrastiveDivergence`, `NoiseContrastive`,
score matching, or in a model by Pyro's own losses, and sampled by the Markov chains of `pyro_genmodels.samplers`.
"""

from __future__ import annotations

__all__ = ["EnergyModel"]

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from pyro_genmodels._pyro import handlers, params
from pyro_genmodels.datasets.statistics import ColumnStatistics
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.energy.negatives import Annealed, Negatives, Persistent
from pyro_genmodels.distributions.energy.path import PathOptions, positions, space_of
from pyro_genmodels.distributions.energy.state import PartitionCache, ReplayBuffer
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.family import Family, Standardize, StandardizeContext
from pyro_genmodels.nn.checks import is_number
from pyro_genmodels.nn.energies import DenseEnergy, EnergyChoice
from pyro_genmodels.samplers import Gibbs, Langevin, Sampler, Space, default_sampler
from pyro_genmodels.utils.distributions import check_exact_density, coordinate_support, without_validation
from pyro_genmodels.utils.errors import check_choice, check_positive_int

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class EnergyModel(Family):
    r"""An energy-based model.

    Under any of Pyro's losses, its `log_prob` carries the gradient of log Z, estimated from negatives. The value of `log_prob`
    lacks log Z until that is known; the distribution's `density` says whether it is. Where the value is used as a weight (NUTS
    over the context, enumeration, the score function), the energy must have no context, or be frozen.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        energy: choice such as ``DenseEnergy((128, 128))``, the default, ``ConvolutionalEnergy()``,
            ``RestrictedBoltzmannMachine(64)`` or ``BoltzmannMachine()``; or a module called as ``energy(x)`` or
            ``energy(x, context)`` with one batch dimension, which returns energies (n,) in nats. Its input is the standardised
            data; on an interval, data scaled to [-1, 1]; for classes, one-hot vectors.
        base: density that is tilted: a Pyro distribution over one datum, or a family without a context, which is trained along
            unless frozen. With None, an energy that is a choice tilts a standard normal of the standardised data (without which
            exp(-E) need have no integral), on an interval a uniform distribution, and over discrete data their frequencies,
            coordinate by coordinate; an energy that is a module has a flat measure.
        support: support of one coordinate: the reals, an interval, `constraints.boolean`, or
            ``constraints.integer_interval(0, K - 1)``, whose order the energy does not know.
        sampler: Markov kernel: `Langevin`, `Hamiltonian`, `GibbsWithGradients`, `Gibbs` (Boltzmann machines only) or
            `ParallelTempering`. "default" is `Gibbs` where the energy has sweeps, `Langevin` over real numbers and
            `GibbsWithGradients` over discrete data. With None it has no samples; only objectives that need none can
            train it.
        negatives: source of negatives: `Persistent` (the default), `Contrastive`, or `Annealed` (the default with a context).
        num_steps: steps of the sampler per draw.
        noise: lowest and highest noise level, in units of the standardised data, for `DenoisingScoreMatching` at many levels.
            The context of the energy then ends with the logarithm of the level. The distribution is that at the lowest level,
            and draws are annealed from the highest.
        standardize: see `Family`. Without it, the input of a module is the unchanged data.
        standardize_context: see `Family`.
        name: see `Family`.

    Attributes:
        replay_buffer: chains of `Persistent` negatives and the tuned step size.
        partition_cache: log Z and the parameters it holds for.
        marginals: natural parameters of the frequencies of discrete data, of the shape of a position; else (0,).

    Raises:
        TypeError: for an energy, base, sampler or negatives of another type.
        ValueError: for a sampler, support and energy that cannot be combined.

    Example:
        >>> from pyro_genmodels import EnergyModel
        >>> model = EnergyModel((2,))
        >>> model().log_prob(torch.zeros(5, 2)).shape, model().density
        (torch.Size([5]), 'unnormalized')
    """

    marginals: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        energy: EnergyChoice | nn.Module | None = None,
        base: Distribution | Family | None = None,
        support: constraints.Constraint = constraints.real,
        sampler: Sampler | Literal["default"] | None = "default",
        negatives: Negatives | None = None,
        num_steps: int = 500,
        noise: tuple[float, float] | None = None,
        standardize: Standardize = True,
        standardize_context: StandardizeContext = True,
        name: str | None = None,
    ) -> None:
        super().__init__(
            event_shape,
            context=context,
            support=support,
            standardize=standardize,
            standardize_context=standardize_context,
            name=name,
        )
        space = self.space
        self._standardize = False if space.bounded else standardize  # of discrete data too, whose frequencies it sets
        energy = DenseEnergy() if energy is None else energy
        self.tilted, self.noise = isinstance(energy, EnergyChoice), _checked_noise(noise, space)
        if isinstance(energy, EnergyChoice):
            self.energy = energy.build(self.event_shape, space, self.context_size + (noise is not None))
        else:
            self.energy = _checked_energy(energy)
        self.base = _checked_base(base, self.event_shape, support)
        self.register_buffer("marginals", torch.zeros(self.position_shape if space.is_discrete else (0,)))
        sees_data = not self.tilted and not standardize
        self.features = None if sees_data else _unit_interval if space.bounded else positions
        check_positive_int("EnergyModel", num_steps=num_steps)
        self.num_steps = num_steps
        self.sampler = self._checked_sampler(sampler)
        default = Persistent() if self.context is None else Annealed()
        self.negatives = check_choice("EnergyModel", "source of negatives", negatives, default, Negatives)
        if self.context is not None and isinstance(self.negatives, Persistent):
            raise ValueError(
                "Persistent chains cannot go on where every row has a context of its own. Use negatives=Annealed() or "
                "Contrastive()."
            )
        capacity = self.negatives.capacity if isinstance(self.negatives, Persistent) and self.sampler is not None else 0
        self.replay_buffer = ReplayBuffer(self.sampler, torch.zeros(capacity, *self.position_shape))
        self.partition_cache = PartitionCache()
        self._distribution(None)  # raises errors about parts that cannot be combined

    def _checked_sampler(self, sampler: Any) -> Sampler | None:
        if sampler is None:
            return None
        if sampler == "default":
            has_sweeps = self.tilted and self.base is None and self.noise is None and hasattr(self.energy, "gibbs")
            return Gibbs() if has_sweeps and not self.space.bounded else default_sampler(self.space)
        sampler = check_choice("EnergyModel", "sampler", sampler, Langevin(), Sampler)
        if self.noise is not None and sampler != Langevin():
            raise ValueError(
                f"EnergyModel with noise levels is sampled by annealed Langevin dynamics, but found sampler={sampler}. Leave "
                "the sampler out, or the noise."
            )
        return sampler

    def forward(self, context: Tensor | None = None) -> Energy:
        base = self.base() if isinstance(self.base, Family) else self.base
        embedded = self.embed(context)
        if embedded is not None and handlers.has_enumerated_dims(embedded.dim() - 1):
            raise ValueError(
                f"{self.name} has a context that is enumerated, but the weight of each value depends on its log Z, which is "
                "not known. Sample it in the guide, or use a family with an exact density, such as Flow."
            )
        return self._distribution(base, embedded)

    def _distribution(self, base: Distribution | None, context: Tensor | None = None) -> Energy:
        energy = Energy(
            self.energy,
            self.event_shape,
            context=context,
            base=None if base is None else without_validation(base),
            support=self.support,
            path=PathOptions(
                coordinates=None if self.pretransform is None else self.pretransform.inv,
                features=self.features,
                start=self._start(),
                tilt_start=self.tilted and self.base is None,
            ),
            sampler=self.sampler,
            negatives=self.negatives,
            num_steps=self.num_steps,
            noise=self.noise,
            replay_buffer=self.replay_buffer,
            partition_cache=self.partition_cache,
        )
        return energy if context is None else energy.replace(latents_without_gradient=handlers.latents_without_gradient())

    def _start(self) -> Distribution:
        """Return the start of the path: frequencies of discrete data, uniform on an interval, or a standard normal."""
        return self.space.start(self.marginals if self.space.is_discrete else torch.zeros_like(self.loc))

    @property
    def space(self) -> Space:
        """Space of the chain positions."""
        return space_of(self.support)

    @property
    def position_shape(self) -> Size:
        """Shape of one chain's position."""
        return self.space.position_shape(self.event_shape)

    @property
    def pretransform(self) -> Transform | None:
        """Bijection from data to positions; None on an interval and for discrete data, which need no standardisation."""
        return None if self.space.bounded or self.space.is_discrete else super().pretransform

    def standardize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set mean and deviation to those of the data, or the frequencies of discrete data; see `Family.standardize`."""
        super().standardize(x, context)
        if isinstance(self.base, Family):
            self.base.prepare(x)

    def prepare(self, x: Tensor, context: Tensor | None = None, *, statistics: Sequence[ColumnStatistics] = ()) -> None:
        """Standardise by the data x unless that has been done, and a base that is a family too."""
        super().prepare(x, context, statistics=statistics)
        if isinstance(self.base, Family):
            self.base.prepare(x, statistics=statistics[:1])

    @property
    def _has_moments(self) -> bool:
        return not self.space.is_discrete and super()._has_moments

    def _standardize_data(self, x: Tensor) -> None:
        if not self.space.is_discrete:
            super()._standardize_data(x)
            return
        with torch.no_grad():
            self.marginals.copy_(self.space.frequencies(x.to(self.marginals.device)))
            if isinstance(centre := getattr(self.energy, "centre", None), Tensor):
                centre.copy_(self._start().mean.reshape(-1))
            self.standardized.fill_(True)
        self._standardized = True


def _unit_interval(u: Tensor) -> Tensor:
    """Return the data at positions u, scaled from their interval to [-1, 1]."""
    return (u / 2).tanh()


def _checked_energy(energy: Any) -> nn.Module:
    if not isinstance(energy, nn.Module):
        found = f"the class {energy.__name__}" if isinstance(energy, type) else type(energy).__name__
        raise TypeError(
            f"EnergyModel wants a choice such as DenseEnergy() or a torch.nn.Module as its energy, but found {found}. For a "
            "plain function use pyro_genmodels.distributions.Energy."
        )
    if any(params.random_parameters(energy)):
        raise ValueError(
            f"The weights of {type(energy).__name__} are random (PyroSample), and log Z depends on each draw of them. Use "
            "weights that are parameters."
        )
    if any(isinstance(part, BATCH_NORMS) for part in energy.modules()):
        raise ValueError(
            f"{type(energy).__name__} has BatchNorm, so that the energy of one datum depends on others. Use GroupNorm or "
            "LayerNorm."
        )
    return energy


def _checked_noise(noise: Any, space: Space) -> tuple[float, float] | None:
    if noise is None:
        return None
    if space.is_discrete:
        raise ValueError("Noise is added to real numbers: leave noise out, or give a support of real numbers.")
    is_pair = isinstance(noise, Sequence) and len(noise) == 2 and all(map(is_number, noise))
    low, high = map(float, noise) if is_pair else (0.0, 0.0)
    if not 0 < low < high < float("inf"):
        raise ValueError(f"EnergyModel wants noise as (lowest, highest), both positive, but found {noise!r}.")
    return low, high


def _checked_base(base: Any, event_shape: Size, support: constraints.Constraint) -> Any:
    if base is None:
        return None
    if isinstance(base, Family) and base.context is not None:
        raise ValueError("EnergyModel wants a base without a context: only the energy may depend on the context.")
    density = check_exact_density("EnergyModel", "base", base, event_shape)
    found = base.data_support if isinstance(base, Family) else density.support
    if found is None or _coordinate_range(found) != _coordinate_range(support):
        raise ValueError(f"EnergyModel wants a base over {support}, its support, but found one over {found}. Make them equal.")
    return base


def _coordinate_range(support: Any) -> tuple[Any, ...]:
    """Return (is discrete, lower bound, upper bound) of the coordinates of a support."""
    support = coordinate_support(support)
    if isinstance(support, type(constraints.boolean)):
        return True, 0.0, 1.0
    ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    return support.is_discrete, *(None if end is None else float(end) for end in ends)
