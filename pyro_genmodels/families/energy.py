r"""Energy-based models: :math:`p(x \mid c) \propto p_0(x)\, e^{-E(x, c)}`. The constant is unknown; the score is not.

LeCun et al., *A Tutorial on Energy-Based Learning* (2006). Trained by `ContrastiveDivergence`, `NoiseContrastive`, score
matching, or within a model by Pyro's own losses; drawn by the samplers of `pyro_genmodels.samplers`.
"""

from __future__ import annotations

__all__ = ["EnergyModel"]

from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_genmodels._pyro import handlers
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.energy.negatives import Annealed, Negatives, Persistent
from pyro_genmodels.distributions.energy.path import kind_of, positions
from pyro_genmodels.distributions.energy.state import Memory
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.family import Family, Standardize
from pyro_genmodels.nn.energies import DenseEnergy, EnergyChoice
from pyro_genmodels.samplers import Gibbs, GibbsWithGradients, Langevin, Sampler
from pyro_genmodels.utils.distributions import density_of, without_validation


class EnergyModel(Family):
    r"""An energy-based model.

    In a model of your own, under any of Pyro's losses, its `log_prob` carries the gradient of log Z by negatives from its
    sampler; its value lacks log Z until that is known (`density` of the distribution says whether it is). So it may stand where
    gradients matter alone. What weighs by its value (NUTS over the context, enumeration, the score function) wants an energy
    without a context, or one that is frozen.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        energy: a choice such as ``DenseEnergy((128, 128))``, the default, ``ConvolutionalEnergy()``,
            ``RestrictedBoltzmannMachine(64)`` or ``BoltzmannMachine()``; or a module of your own, called as ``energy(x)`` or
            ``energy(x, context)`` with one batch dimension, -> energies (n,) in nats. It sees the standardised data; on an
            interval, [-1, 1]; of classes, one-hot vectors.
        base: what is tilted: a Pyro distribution over one datum, or a family without a context, which is trained along unless
            frozen. None is:
            under the choices above a standard normal of the standardised data, without which exp(-E) need have no integral, on
            an interval the uniform law, over discrete data their frequencies, coordinate by coordinate; under a module of your
            own a flat measure.
        support: where one coordinate lies: the reals, an interval, `constraints.boolean`, or
            ``constraints.integer_interval(0, K - 1)``, whose order the energy does not know.
        sampler: that moves chains: `Langevin` (the default over reals), `Hamiltonian`, `GibbsWithGradients` (the default over
            discrete data), `Gibbs` (of Boltzmann machines), `ParallelTempering`. None: nothing can be drawn, and the objectives
            that draw nothing remain.
        negatives: where they come from: `Persistent` (the default), `Contrastive`, or `Annealed` (the default with a context).
        num_steps: of the sampler to a draw.
        noise: lowest and highest level of noise, in units of the standardised data, that the energy is told as the logarithm at
            the end of its context, for `DenoisingScoreMatching` at many levels. It is then the energy of the data with the
            lowest, and draws are led down from the highest.
        standardize: see `Family`. Off, an energy of your own sees the data as they are.
        name: see `Family`.

    Raises:
        ValueError: on a sampler, support and energy that do not go together.

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
        sampler: Sampler | EllipsisType | None = ...,
        negatives: Negatives | None = None,
        num_steps: int = 500,
        noise: tuple[float, float] | None = None,
        standardize: Standardize = True,
        name: str | None = None,
    ) -> None:
        super().__init__(event_shape, context=context, support=support, standardize=standardize, name=name)
        bounded = self._bounded and not support.is_discrete
        self._standardize = bool(standardize) and not bounded  # discrete data too: their frequencies
        kind, classes = kind_of(support)
        position = torch.Size((*self.event_shape, classes)) if kind == "categorical" else self.event_shape
        energy = DenseEnergy() if energy is None else energy
        self.tilted, self.noise = isinstance(energy, EnergyChoice), _checked_noise(noise, kind)
        size = self.context_size + (noise is not None)
        self.energy = energy.build(position, kind, size) if isinstance(energy, EnergyChoice) else _checked_energy(energy)
        self.base = _checked_base(base, self.event_shape, support)
        self.register_buffer("marginals", torch.zeros(position if kind != "real" else (0,)))
        if sampler is ...:
            gibbs = base is None and noise is None and hasattr(self.energy, "gibbs") and self.tilted and not bounded
            sampler = Gibbs() if gibbs else Langevin() if kind == "real" else GibbsWithGradients()
        for role, found, wanted in (("sampler", sampler, Sampler), ("negatives", negatives, Negatives)):
            if not (found is None or isinstance(found, wanted)):
                found = f"the class {found.__name__}" if isinstance(found, type) else repr(found)
                example = "Langevin()" if role == "sampler" else "Persistent()"
                raise TypeError(f"EnergyModel wants {role} such as {example}, but found {found}.")
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"EnergyModel wants num_steps of 1 or more to a draw, but found {num_steps!r}.")
        self.sampler, self.num_steps = sampler, num_steps
        plain = not self.tilted and not standardize  # an energy of the user's own, of the data as they are
        self.features = None if plain else _to_unit if bounded else positions
        self.arguments["sampler"] = sampler
        self.negatives = (Persistent() if self.context is None else Annealed()) if negatives is None else negatives
        if self.context is not None and isinstance(self.negatives, Persistent):
            raise ValueError(
                "Persistent chains cannot go on where every row has a context of its own. Use negatives=Annealed() or "
                "Contrastive()."
            )
        if noise is not None and sampler not in (None, Langevin()):
            raise ValueError(
                f"Draws of an energy at several levels of noise are led down by annealed Langevin, not by {sampler}. Leave the "
                "sampler out, or the noise."
            )
        kept = self.negatives.kept if isinstance(self.negatives, Persistent) and sampler is not None else 0
        like = torch.zeros(kept, *position)
        self.memory = Memory(sampler, like)
        self._energy(None)  # so that what does not go together is told here

    def forward(self, context: Tensor | None = None) -> Energy:
        base = self.base() if isinstance(self.base, Family) else self.base
        embedded = self.embed(context)
        if embedded is not None and handlers.is_enumerated(embedded.dim() - 1):
            raise ValueError(
                f"{self.name} is given a variable that is enumerated, whose values are weighed by log Z of each, which is not "
                "known. Draw it in the guide, or take a family with an exact density, such as Flow."
            )
        return self._energy(base, embedded)

    def _energy(self, base: Distribution | None, context: Tensor | None = None) -> Energy:
        return Energy(
            self.energy,
            self.event_shape,
            context=context,
            base=None if base is None else without_validation(base),
            support=self.support,
            coordinates=None if self.pretransform is None else self.pretransform.inv,
            features=self.features,
            start=self._start(),
            tilted=self.tilted and self.base is None,
            sampler=self.sampler,
            negatives=self.negatives,
            memory=self.memory,
            num_steps=self.num_steps,
            noise=self.noise,
            weighs=() if context is None else handlers.drawn_without_gradient(),
        )

    def _start(self) -> Distribution:
        """Of positions: the frequencies of discrete data, uniform on an interval, else standard normal."""
        if self.support.is_discrete:
            law = dist.Bernoulli if kind_of(self.support)[0] == "binary" else dist.OneHotCategorical
            return law(logits=self.marginals, validate_args=False)
        zero, one = torch.zeros_like(self.loc), torch.ones_like(self.loc)
        return (dist.Logistic if self._bounded else dist.Normal)(zero, one, validate_args=False)

    @property
    def _bounded(self) -> bool:
        """Whether the data lie on an interval, with two ends."""
        return all(hasattr(self.support, name) for name in ("lower_bound", "upper_bound"))

    @property
    def pretransform(self) -> Transform | None:
        """To the positions of chains; on an interval and of discrete data nothing, for these need no standardisation."""
        return None if self._bounded or self.support.is_discrete else super().pretransform

    def standardize(self, x: Tensor) -> None:
        """Takes mean and standard deviation from data, (N, *event_shape), or of discrete data their frequencies."""
        if isinstance(self.base, Family):
            self.base.prepare(x)
        if not self.support.is_discrete:
            return super().standardize(x)
        if self._standardize:
            with torch.no_grad():
                x = x.to(self.marginals.device)
                if kind_of(self.support)[0] == "binary":
                    count = x.to(self.marginals.dtype).sum(0) + 0.5
                    self.marginals.copy_((count / (len(x) + 1 - count)).log())
                else:
                    one_hot = torch.nn.functional.one_hot(x.long(), self.marginals.shape[-1])
                    self.marginals.copy_(((one_hot.sum(0) + 0.5) / (len(x) + 0.5 * one_hot.shape[-1])).log())
                if isinstance(centre := getattr(self.energy, "centre", None), Tensor):
                    centre.copy_(self._start().mean.reshape(-1))
                self.standardized.fill_(True)
            self._standardized = True
        return None


def _to_unit(u: Tensor) -> Tensor:
    """Positions of data on an interval -> the data, its ends at -1 and 1."""
    return (u / 2).tanh()


def _checked_energy(energy: Any) -> nn.Module:
    if not isinstance(energy, nn.Module):
        found = f"the class {energy.__name__}" if isinstance(energy, type) else type(energy).__name__
        raise TypeError(
            f"EnergyModel wants a choice such as DenseEnergy() or a torch.nn.Module as its energy, but found {found}. A plain "
            "function can be an energy of pyro_genmodels.distributions.Energy."
        )
    if any(getattr(part, "_pyro_samples", ()) for part in energy.modules()):
        raise ValueError(
            f"The weights of {type(energy).__name__} are random (PyroSample), and log Z of every draw of them is out of reach. "
            "Give it weights that are parameters."
        )
    if any(isinstance(part, _BatchNorm) for part in energy.modules()):
        raise ValueError(
            f"{type(energy).__name__} has BatchNorm, by which the energy of one datum depends on others. Use GroupNorm or "
            "LayerNorm."
        )
    return energy


def _checked_noise(noise: Any, kind: str) -> tuple[float, float] | None:
    if noise is None:
        return None
    if kind != "real":
        raise ValueError("Noise is added to real numbers: leave noise out, or give a support of real numbers.")
    low, high = map(float, noise) if isinstance(noise, Sequence) and len(noise) == 2 else (0.0, 0.0)
    if not 0 < low < high < float("inf"):
        raise ValueError(f"EnergyModel wants noise as (lowest, highest), both positive, but found {noise!r}.")
    return low, high


def _checked_base(base: Any, event_shape: torch.Size, support: constraints.Constraint) -> Any:
    if base is None:
        return None
    if not isinstance(base, (Distribution, Family)):
        found = f"the class {base.__name__}" if isinstance(base, type) else type(base).__name__
        raise TypeError(
            f"EnergyModel wants a Pyro distribution or a family as its base, such as Flow((8,)), but found {found}."
        )
    if isinstance(base, Distribution) and base.batch_shape:
        raise ValueError(
            f"EnergyModel wants a base over one datum, but found a batch of shape {tuple(base.batch_shape)}. Use "
            f"base.to_event({len(base.batch_shape)})."
        )
    if isinstance(base, Family) and base.context is not None:
        raise ValueError("EnergyModel wants a base without a context: what depends on the context is for the energy to say.")
    if base.event_shape != event_shape:
        raise ValueError(f"The base is over events {tuple(base.event_shape)}, but the energy over {tuple(event_shape)}.")
    found = base.data_support if isinstance(base, Family) else base.support
    if found is None or _ends(found) != _ends(support):
        raise ValueError(f"The base has the support {found}, but the energy {support}. Give the energy that of the base.")
    density, advice = density_of(base() if isinstance(base, Family) else base)
    if density != "exact":
        raise ValueError(f"EnergyModel tilts an exact density, but that of the base is: {density}. {advice}")
    return base


def _ends(support: Any) -> tuple[Any, ...]:
    """Of what kind coordinates are, and where they end."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    if isinstance(support, type(constraints.boolean)):
        return True, 0.0, 1.0
    return support.is_discrete, *(None if end is None else float(end) for end in ends)
