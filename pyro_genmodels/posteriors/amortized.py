r"""Amortised posteriors: a conditional density of the latent variables, trained on simulations, for any observation.

.. math:: \max_\phi \; \mathbb{E}_{z \sim p(z),\, x \sim p(x \mid z)} \log q_\phi(z \mid x) ,

whose maximum is the posterior: neural posterior estimation (Papamakarios and Murray, arXiv 1605.06376; Greenberg et al., arXiv
1905.07488; Cranmer et al., *The Frontier of Simulation-Based Inference*, arXiv 1911.01429). No density of the observations is
needed. The latent variables are in unconstrained coordinates, so that no mass leaves their supports.

For one observation, simulations from the prior are restricted, round by round, to the region that holds all but a share
:math:`\varepsilon = 10^{-4}` of the present posterior. Inside of it they follow the prior, so the loss stays the same:
Deistler, Goncalves and Macke, *Truncated Proposals for Scalable and Hassle-Free Simulation-Based Inference* (arXiv 2210.04815).
"""

from __future__ import annotations

__all__ = ["AmortizedPosterior"]

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_genmodels.families import NSF, Flow
from pyro_genmodels.infer.objective import Loss
from pyro_genmodels.posteriors.approximations import Approximation
from pyro_genmodels.posteriors.conditional import Training, check_builder, default_objective
from pyro_genmodels.posteriors.embeddings import Embedding
from pyro_genmodels.posteriors.fits import NUM_SAMPLES, GuidePosterior
from pyro_genmodels.posteriors.observation_encoder import ObservationEncoder, embeddings_by_name
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.posteriors.simulation_trained import SimulationTrained
from pyro_genmodels.utils.errors import check_positive_int

TRUNCATED_MASS = 1e-4
"""Mass of the posterior outside of the region that the prior is restricted to (arXiv 2210.04815)."""
NUM_THRESHOLD_DRAWS = 10_000
"""Number of draws of the posterior from which the bound of that region is computed."""
MIN_ACCEPTED = 1e-5
"""Smallest share of draws of the prior in that region with which rejection goes on."""
MIN_TRIED = 1_000_000
"""Number of draws of the prior after which that share is looked at."""
BLOCK = 10_000
"""Number of draws of the prior of which those in the region are kept at once."""


def default_flow(event_shape: Sequence[int], *, context: nn.Module) -> Flow:
    """Return the default family: a flow of autoregressive splines, whose density is one pass of its networks."""
    return Flow(event_shape, context=context, transform=NSF(transforms=5, hidden=(64, 64)))


class AmortizedPosterior(SimulationTrained):
    """The posterior of a model's latent variables given any observation, learned from simulations.

    Args:
        model: function with Pyro statements. The sites that are observed may be drawn from distributions, or computed by a
            simulator and named by `pyro.deterministic`.
        args: positional arguments of the model.
        observed: names of the sites that are observed. Data that the arguments give to them are not used.
        family: function of an event shape and a keyword ``context``, a module, that returns a family, such as `Flow`,
            `ODEFlow`, `Diffusion` or ``partial(Flow, transform=MAF())``. By default a flow of five spline transforms.
        embedding: network that summarises the observations: `DenseEmbedding()`, `ConvolutionalEmbedding()`, `SetEmbedding()`
            for independent rows, or a module of your own, from (n, ...) to (n, features), which is given standardised values;
            a dictionary by name if there are several observed sites. By default the numbers are passed on as they are.
        objective: loss that trains the family. By default `FlowMatching` if it has a velocity, `DenoisingScoreMatching` if it
            is a diffusion, and `MaximumLikelihood` otherwise.
        simulations: simulations that were made before, values of the continuous latent variables and of the observed sites,
            (simulation, ...) by name.
        model_kwargs: keyword arguments of the model.

    Attributes:
        simulations: all simulations so far, (simulation, ...) by name. They can be saved, and given to ``simulations=`` later.
        failures: number of simulations that were left out, by the reason.
        family: the trained family, None before.
        history: loss of held-out simulations after each epoch of the last training.

    Raises:
        TypeError: if an option is of the wrong type.
        ValueError: if the model does not have the observed sites, observes others, or has latent variables whose support or
            shape depends on others; or if the table of simulations has other names or shapes.

    Example:
        >>> import pyro
        >>> def model():
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(loc, 0.5))
        >>> amortized = AmortizedPosterior(model, observed=["x"])
        >>> _ = amortized.train(num_simulations=200, max_epochs=2, progress=False)
        >>> fit = amortized.given(x=0.7)
        >>> fit.get_samples(500)["loc"].shape, len(amortized.simulations["x"])
        (torch.Size([500]), 200)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        observed: Sequence[str],
        family: Callable[..., nn.Module] = default_flow,
        embedding: Embedding | nn.Module | Mapping[str, Embedding | nn.Module] | None = None,
        objective: Loss | None = None,
        simulations: Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_builder("AmortizedPosterior", family)
        super().__init__(model, args, model_kwargs or {}, observed, simulations)
        self._build, self.objective = family, objective
        self._embeddings = embeddings_by_name(embedding, self.simulator.observed)
        self._focus: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        names = f"{', '.join(self.simulator.coordinates.names)} given {', '.join(self.simulator.observed)}"
        return f"<AmortizedPosterior of {names}: {len(self._made)} simulations, {'not ' if self.family is None else ''}trained>"

    @property
    def family(self) -> nn.Module | None:
        return self._trained

    def _task(self) -> tuple[nn.Module, Callable[[Any], Any], Tensor, Tensor]:
        z, observations = self._pairs()
        if self.family is None:
            shapes = {name: self.simulator.shapes[name] for name in self.simulator.observed}
            family: Any = self._build((z.shape[1],), context=ObservationEncoder(shapes, self._embeddings, observations))
        else:
            family = deepcopy(self.family).requires_grad_(True)
        context = family.context.flatten(observations)
        objective = default_objective(family(context[:1])) if self.objective is None else self.objective
        return family, objective, z, context

    def given(self, **observations: Any) -> GuidePosterior:
        """Return the posterior given observations: a fit with draws, and with weights if the model has a density.

        Args:
            observations: value of each observed site, by name, in the shape of the simulations. With a `SetEmbedding` that has
                ``min_rows`` there may be fewer rows; with a `DenseEmbedding` that has ``missing`` some may be NaN.

        Raises:
            ValueError: if the posterior has not been trained, a name or shape is wrong, or an observation is not finite.
        """
        self._trained_family()
        if not observations and self._focus is not None:
            observations = dict(self._focus)
        values = {name: x[0] for name, x in self._checked(observations, batch=False).items()}
        if self._focus is not None and any(
            not torch.equal(values[n].nan_to_num(), x.nan_to_num()) for n, x in self._focus.items()
        ):
            raise ValueError(
                "This posterior was refined for one observation, and holds near it only. Call given() without arguments, or "
                "given(...) of the posterior before refine."
            )
        problem = Problem(
            self.simulator.given(values),
            self.simulator.args,
            self.simulator.kwargs,
            coordinates=self.simulator.coordinates,
            has_density=self.simulator.has_density,
        )
        return GuidePosterior(problem, self, self._at(values))

    @torch.no_grad()
    def samples_given(self, num_samples: int = NUM_SAMPLES, **observations: Any) -> dict[str, Tensor]:
        """Return draws given many observations at once, (draw, observation, ...) by name.

        Args:
            num_samples: number of draws for each.
            observations: values of each observed site, (observation, ...) by name.

        Raises:
            ValueError: as `given`.
        """
        check_positive_int("samples_given", num_samples=num_samples)
        family = self._trained_family()
        if self._focus is not None:
            raise ValueError(
                "This posterior was refined for one observation, and holds near it only. Call given() without arguments, or "
                "samples_given(...) of the posterior before refine."
            )
        values = self._checked(observations, batch=True)
        z = family(family.context.flatten(values)).sample((num_samples,))
        return self.simulator.coordinates.constrain(z)

    def refine(
        self,
        *,
        num_rounds: int = 2,
        num_simulations: int = 1000,
        max_epochs: int = 1000,
        batch_size: int = 100,
        step_size: float = 1e-3,
        patience: int = 20,
        n_jobs: int = 1,
        progress: bool = True,
        **observations: Any,
    ) -> AmortizedPosterior:
        """Return a posterior for one observation, trained further on simulations near it; self does not change.

        In each round the prior is restricted to where the present posterior has all but 1e-4 of its mass, by rejection.

        Args:
            num_rounds: number of rounds.
            num_simulations: number of simulations of each round.
            max_epochs: see `train`.
            batch_size: see `train`.
            step_size: see `train`.
            patience: see `train`.
            n_jobs: see `simulate`.
            progress: True for progress bars.
            observations: see `given`.

        Returns:
            A posterior whose ``given()`` is the fit. It cannot be given other observations.

        Raises:
            ValueError: as `given`; or if almost no draw of the prior lies in the region.
        """
        check_positive_int("refine", num_rounds=num_rounds, num_simulations=num_simulations)
        self._trained_family()
        values = {name: x[0] for name, x in self._checked(observations or dict(self._focus or {}), batch=False).items()}
        refined = copy(self)
        refined._focus, start = values, time.perf_counter()
        options = Training(max_epochs, batch_size, step_size, patience, progress)
        for _ in range(num_rounds):
            latents = refined._truncated_prior(values, num_simulations, progress=progress)
            refined._simulate(num_simulations, latents, n_jobs=n_jobs, progress=progress)
            refined._fit(options)
        refined.seconds += time.perf_counter() - start
        return refined

    @torch.no_grad()
    def _truncated_prior(self, values: Mapping[str, Tensor], number: int, *, progress: bool) -> dict[str, Tensor]:
        """Return draws of all latent variables from the prior, in the region of the present posterior, by rejection."""
        posterior = self._at(values).eval()()
        bound = posterior.log_prob(posterior.sample((NUM_THRESHOLD_DRAWS,))).quantile(TRUNCATED_MASS)
        kept: list[dict[str, Tensor]] = []
        accepted = tried = 0
        with tqdm(total=number, desc="truncated prior", unit="draw", disable=not progress, mininterval=0.5) as bar:
            while accepted < number:
                latents = self.simulator.draw_latents(BLOCK)
                z = self.simulator.coordinates.unconstrain(latents).to(torch.get_default_dtype())
                inside = torch.where(z.isfinite().all(1), posterior.log_prob(z.nan_to_num()), -torch.inf) >= bound
                kept.append({name: x[inside] for name, x in latents.items()})
                accepted, tried = accepted + int(inside.sum()), tried + BLOCK
                bar.update(min(int(inside.sum()), number - bar.n))
                if accepted < MIN_ACCEPTED * tried and tried >= MIN_TRIED:
                    raise ValueError(
                        f"Of {tried} draws of the prior {accepted} lie where the posterior is. It is too narrow, or the "
                        "observation too unlike the simulations, for rejection: use NoUTurn if the model has a density, or a "
                        "narrower prior."
                    )
        return {name: torch.cat([part[name] for part in kept])[:number] for name in self.simulator.latents}

    def _at(self, values: Mapping[str, Tensor]) -> Approximation:
        """Return the distribution of the unconstrained coordinates given observations by name."""
        family = self._trained_family()
        context = family.context.flatten({name: x[None] for name, x in values.items()})[0]
        return _Given(family, context, self.simulator.coordinates.dim)

    def _trained_family(self) -> Any:
        if self.family is None:
            raise ValueError("This posterior has not been trained: call its train(num_simulations=...) first.")
        return self.family


class _Given(Approximation):
    """A conditional family given one context.

    Args:
        family: the family.
        context: the context, (numbers,).
        dim: number of coordinates.
    """

    observed: Tensor

    def __init__(self, family: nn.Module, context: Tensor, dim: int) -> None:
        super().__init__(dim)
        self.family = family
        self.register_buffer("observed", context)

    def forward(self) -> dist.TorchDistribution:
        return self.family(self.observed)
