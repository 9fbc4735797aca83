r"""Diffusion models: a process turns data into noise, and a network that removes noise leads from noise back to data.

.. math:: x_t = \alpha(t)\, x_0 + \sigma(t)\, \varepsilon, \qquad D(x_t, t, c) \approx \mathbb{E}[x_0 \mid x_t, c]

Trained by `DenoisingScoreMatching`. Song et al., *Score-Based Generative Modeling through SDEs* (arXiv 2011.13456); Ho et al.
(arXiv 2006.11239); Karras et al. (arXiv 2206.00364).
"""

from __future__ import annotations

__all__ = ["Diffusion"]

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.dequantized_diffusion import DequantizedDiffusion
from pyro_genmodels.distributions.diffusion import DiffusionLikelihood, FlowDensity, ReverseDiffusion
from pyro_genmodels.distributions.sampler_gap import default_reverse_sampler
from pyro_genmodels.dynamics.denoiser import Denoiser, Prediction, VelocityPrediction
from pyro_genmodels.dynamics.processes import Process, VariancePreserving
from pyro_genmodels.dynamics.reverse import ReverseSampler
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.continuous import ContinuousFamily
from pyro_genmodels.families.family import Standardize, StandardizeContext
from pyro_genmodels.nn.checks import check_rate, is_number
from pyro_genmodels.nn.fields import DenseField, FieldChoice
from pyro_genmodels.utils.errors import check_choice


class Diffusion(ContinuousFamily):
    """A diffusion model.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        network: denoising network: a choice, `DenseField()`, the default (with five octaves of sines for up to four
            coordinates), or `UNet()`; or your own module, called as ``network(x, t, context)`` with x (n, *event_shape) of
            deviation 1, the time t (n,) of the process and the embedded context (n, c) or None.
        process: process that turns data into noise: `VariancePreserving`, the default, `CosineVariancePreserving`,
            `SubVariancePreserving`, `VarianceExploding` or `Karras`.
        prediction: meaning of the network's output: `VelocityPrediction`, the default, `NoisePrediction`, `DataPrediction`,
            `ScorePrediction`, or `Preconditioned` as in EDM.
        sampler: reverse sampler: `DPMSolver`, the default, `DDIM`, `Ancestral`, `EulerMaruyama`, `Heun`, `PredictorCorrector`
            or `ProbabilityFlow`. The default takes 50 sqrt(d) steps for up to 16 coordinates d, with which draws follow the
            density to 0.03 nats, and 20 for more; ``diffusion().sampler_gap()`` measures it, and
            ``diffusion().with_sampler(...)`` changes it. Draws that carry gradients, which Pyro asks for while the family is
            not frozen, are made by the ODE of the likelihood instead.
        likelihood: method of `log_prob`: `FlowDensity`, the default, or `VariationalBound`.
            ``diffusion().with_likelihood(...)`` changes it.
        drop_context: rate at which the context is dropped in training, so that the network also learns the distribution
            without a context, which guidance needs.
        guidance: weight of the context in draws and their density: 1 for the distribution given the context, above 1 to
            exaggerate the context, 0 to ignore it. Training uses no guidance. The attribute can be set, and
            ``diffusion(context).guided(...)`` changes it for one distribution.
        support: set in which one coordinate lies; see `Family`.
        levels: number K of levels, for data that are integers 0 .. K - 1. The distribution is then `Dequantized`, over a
            diffusion on (0, K).
        standardize: see `Family`; by default "jointly" for a `UNet` and True otherwise.
        standardize_context: see `Family`.
        name: see `Family`.

    Raises:
        ValueError: if options do not go together.
        TypeError: if an argument is not one of its choices.

    Example:
        >>> from pyro_genmodels import Diffusion
        >>> Diffusion((2,))().sample((5,)).shape
        torch.Size([5, 2])
    """

    _trains_by_density = False

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        network: FieldChoice | nn.Module | None = None,
        process: Process | None = None,
        prediction: Prediction | None = None,
        sampler: ReverseSampler | None = None,
        likelihood: DiffusionLikelihood | None = None,
        drop_context: float = 0.0,
        guidance: float = 1.0,
        support: constraints.Constraint = constraints.real,
        levels: int | None = None,
        standardize: Standardize | None = None,
        standardize_context: StandardizeContext = True,
        name: str | None = None,
    ) -> None:
        if standardize is None:
            standardize = network.standardize if isinstance(network, FieldChoice) else True
        super().__init__(
            event_shape,
            context=context,
            support=support,
            levels=levels,
            standardize=standardize,
            standardize_context=standardize_context,
            name=name,
        )
        default = DenseField(octaves=5 if self.event_shape.numel() <= 4 else 0)
        network = check_choice("Diffusion", "network", network, default, FieldChoice | nn.Module)
        own = isinstance(network, nn.Module)
        self.clock = not own
        self.network = network if own else network.build(self.event_shape, self.context_size)
        self.process = check_choice("Diffusion", "process", process, VariancePreserving(), Process)
        self.prediction = check_choice("Diffusion", "prediction", prediction, VelocityPrediction(), Prediction)
        default_sampler = default_reverse_sampler(self.event_shape)
        self.sampler = check_choice("Diffusion", "sampler", sampler, default_sampler, ReverseSampler)
        self.likelihood = check_choice("Diffusion", "likelihood", likelihood, FlowDensity(), DiffusionLikelihood)
        check_rate("Diffusion", drop_context=drop_context)
        if drop_context and not self.context_size:
            raise ValueError(
                f"Diffusion can drop its context only if it has one, but found drop_context={drop_context} and no context. "
                "Pass context=..., or leave drop_context out."
            )
        self.drop_context = drop_context
        self.null = nn.Parameter(torch.zeros(self.context_size)) if drop_context else None
        if not is_number(guidance) or not isfinite(guidance):
            raise ValueError(f"Diffusion wants guidance as a number, 1 for none, but found {guidance!r}.")
        self.guidance = guidance
        with torch.no_grad():
            self._denoiser()  # raises here if options do not go together

    def forward(self, context: Tensor | None = None) -> GenerativeDistribution:
        diffusion = ReverseDiffusion(
            self._denoiser(),
            self.event_shape,
            context=self.embed(context),
            sampler=self.sampler,
            likelihood=self.likelihood,
            drop_context=self.drop_context,
            support=self.support,
            pretransform=self.pretransform,
        )
        return diffusion if self.levels is None else DequantizedDiffusion(diffusion, self.levels, dtype=self.loc.dtype)

    def _denoiser(self) -> Denoiser:
        denoiser = Denoiser(self.network, self.process, self.prediction, self.clock, self.null)
        return denoiser if self._in_training or self.guidance == 1.0 else denoiser.guided(self.guidance)
