r"""Learned likelihoods and likelihood ratios of simulators, from which Markov chains draw the posterior.

The posterior is the prior times the likelihood, of which a constant factor does not matter:

.. math:: p(z \mid x_1, \dots, x_n) \propto p(z) \prod_i p(x_i \mid z) \propto p(z) \prod_i \frac{p(x_i \mid z)}{p(x_i)}.

A conditional density learns the likelihood: Papamakarios et al., *Sequential Neural Likelihood* (arXiv 1805.07226). A
classifier learns the ratio, the log odds that x was simulated from z, and not from another draw of the prior: Hermans et al.,
*Likelihood-free MCMC with Amortized Approximate Ratio Estimators* (arXiv 1903.04057). Here it chooses from K draws of the
prior, or says that x comes from none: NRE-C of Miller et al., *Contrastive Neural Ratio Estimation* (arXiv 2210.06170), with
the loss

.. math:: -\frac{1}{1+\gamma} \log \frac{K}{K + \gamma \sum_{k=1}^{K} r(z_k', x)}
          -\frac{\gamma}{1+\gamma} \log \frac{\gamma\, r(z, x)}{K + \gamma\, r(z, x) + \gamma \sum_{k=1}^{K-1} r(z_k', x)} ,

where z belongs to x and the z' do not. For K = 1 and :math:`\gamma = 1` this is the classifier of two classes.
"""

from __future__ import annotations

__all__ = ["AmortizedLikelihood", "AmortizedRatio"]

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_genmodels.distributions.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from pyro_genmodels.families import Autoregressive, Family
from pyro_genmodels.infer.objective import Loss
from pyro_genmodels.posteriors.amortized import default_flow
from pyro_genmodels.posteriors.choose import posterior
from pyro_genmodels.posteriors.conditional import check_builder, default_objective
from pyro_genmodels.posteriors.embedding_networks import dense
from pyro_genmodels.posteriors.embeddings import Embedding
from pyro_genmodels.posteriors.fits import NUM_SAMPLES, Posterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.observation_encoder import ObservationEncoder, embeddings_by_name
from pyro_genmodels.posteriors.simulation_trained import SimulationTrained
from pyro_genmodels.utils.errors import check_positive_int, warn_caller

MAX_CLASSES = 16
"""Largest number of values of an observed number for which each has a probability of its own by default."""
MAX_ATOM = 0.05
"""Largest share of the simulations with one value, which is no whole number, that is not warned of."""


class _Surrogate(SimulationTrained):
    """Base class of a learned function of latent variables and observations that takes the place of the likelihood."""

    def __repr__(self) -> str:
        """Return the names, the number of simulations, and if it has been trained."""
        names = f"{', '.join(self.simulator.observed)} given {', '.join(self.simulator.coordinates.names)}"
        state = f"{len(self._made)} simulations, {'not ' if self._trained is None else ''}trained"
        return f"<{type(self).__name__} of {names}: {state}>"

    def given(self, *, method: Method | None = None, progress: bool = True, **observations: Any) -> Posterior:
        """Return the posterior given observations: a fit, by Markov chains if no other method is named.

        Args:
            method: how the posterior is drawn from the prior and what was learned; None chooses as `posterior` does, which is
                `NoUTurn` where the extra ``nuts`` is installed. A learned density is hundreds of operations, which take half a
                minute to compile, and then a tenth of the time; torch keeps the compiled code on disk for other observations.
            progress: True for progress bars.
            observations: value of each observed site, by name, in the shape of the simulations; or several independent ones of
                the same latent variables, (observation, ...).

        Raises:
            ValueError: if nothing has been trained, a name or shape is wrong, or an observation is not finite.
        """
        if self._trained is None:
            raise ValueError(f"This {type(self).__name__} has not been trained: call its train(num_simulations=...) first.")
        with torch.no_grad():
            prepared = self._prepared(self._trained, self._checked(observations, batch=None))
        model = _SurrogateModel(self, self._trained, prepared)
        return posterior(model, method=method, progress=progress)

    def samples_given(
        self, num_samples: int = NUM_SAMPLES, *, method: Method | None = None, **observations: Any
    ) -> dict[str, Tensor]:
        """Return draws given each of many observations, one fit after another, (draw, observation, ...) by name.

        Args:
            num_samples: number of draws for each.
            method: see `given`.
            observations: values of each observed site, (observation, ...) by name.

        Raises:
            ValueError: as `given`.
        """
        check_positive_int("samples_given", num_samples=num_samples)
        rows = self._checked(observations, batch=True)
        draws = []
        for i in range(len(next(iter(rows.values())))):
            fit = self.given(method=method, progress=False, **{name: x[i] for name, x in rows.items()})
            draws.append(fit.get_samples(num_samples))
        return {name: torch.stack([part[name] for part in draws], 1) for name in self.simulator.coordinates.names}

    @abstractmethod
    def _prepared(self, trained: Any, values: Mapping[str, Tensor]) -> Tensor:
        """Return what `_observe` needs of observations, (n, ...) by name, as vectors, (n, numbers)."""

    @abstractmethod
    def _observe(self, trained: Any, z: Tensor, prepared: Tensor) -> None:
        """Make the statements of Pyro by which coordinates z, (..., dim), explain observations.

        Args:
            trained: the learned function.
            z: the coordinates.
            prepared: what `_prepared` made of the observations, (n, numbers).
        """


class AmortizedLikelihood(_Surrogate):
    r"""The likelihood of a simulator, a conditional density of its observations that is learned from simulations.

    It takes any number of independent observations of the same latent variables: their log densities are added.

    The default family follows the values of the simulations. Where all are integers from 0 to 15 at most, such as classes and
    zeros and ones, it is an `Autoregressive` model with a probability for each value. Otherwise it is a flow, to which whole
    numbers, such as counts, are real ones with uniform noise on [0, 1) (dequantisation; Uria et al., *RNADE*, arXiv 1306.0186).
    It is trained with this noise, and :math:`P(x \mid z)` is its density at x + 1/2, which is also what `to_arviz` shows as
    observed. Other values that occur in many simulations, such as zeros of a censored quantity, are warned of.

    Args:
        model: function with Pyro statements, as for `AmortizedPosterior`. Discrete latent variables are averaged over.
        args: positional arguments of the model.
        observed: names of the sites that are observed.
        family: function of an event shape and a keyword ``context``, a module, that returns a family with a density; None
            chooses one. Whole numbers are dequantised if it models real numbers.
        objective: loss that trains the family; None chooses by the family.
        simulations: simulations that were made before, (simulation, ...) by name.
        model_kwargs: keyword arguments of the model.

    Attributes:
        simulations: all simulations so far, (simulation, ...) by name.
        failures: number of simulations that were left out, by the reason.
        history: loss of held-out simulations after each epoch of the last training.
        family: the trained family over the numbers of one observation, None before.

    Raises:
        TypeError: if an option is of the wrong type.
        ValueError: as `AmortizedPosterior`.

    Warns:
        RuntimeWarning: in training, if one value that is no whole number is that of many simulations.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from functools import partial
        >>> from pyro_genmodels import MAF, Flow
        >>> from pyro_genmodels.infer.compiled import Captured
        >>> from pyro_genmodels.posteriors import NoUTurn
        >>> def model():
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(loc, 0.5))
        >>> learned = AmortizedLikelihood(model, observed=["x"], family=partial(Flow, transform=MAF(transforms=1)))
        >>> _ = learned.train(num_simulations=200, max_epochs=2, progress=False)
        >>> chain = NoUTurn(num_chains=1, num_warmup=20, num_samples=20, mode=Captured())
        >>> fit = learned.given(x=[0.7, 0.4], method=chain, progress=False)  # two observations
        >>> fit.get_samples()["loc"].shape
        torch.Size([20])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        observed: Sequence[str],
        family: Callable[..., nn.Module] | None = None,
        objective: Loss | None = None,
        simulations: Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if family is not None:
            check_builder("AmortizedLikelihood", family)
        super().__init__(model, args, model_kwargs or {}, observed, simulations)
        self._build, self.objective = family, objective
        self._is_whole = torch.tensor(False)

    @property
    def family(self) -> nn.Module | None:
        return self._trained

    def _task(self) -> tuple[nn.Module, Callable[[Any], Any], Tensor, Tensor]:
        z, observations = self._pairs()
        x = _flat(observations)
        family: Any = self._trained
        if family is None or (self._build is None and not _covers(family, x)):
            encoder = ObservationEncoder({"z": z.shape[1:]}, {}, {"z": z})
            family = (_suitable_family(x) if self._build is None else self._build)((x.shape[1],), context=encoder)
            self._is_whole = (x == x.round()).all(0) & (not family(z[:1]).support.is_discrete)
        else:
            family = deepcopy(family).requires_grad_(True)
        if not family(z[:1]).support.is_discrete:
            _warn_of_atoms(x[:, ~self._is_whole])
        objective = default_objective(family(z[:1])) if self.objective is None else self.objective
        return family, objective, x + self._is_whole * torch.rand_like(x), z

    def _prepared(self, trained: Any, values: Mapping[str, Tensor]) -> Tensor:
        x = _flat(values)
        if not _covers(trained, x):
            raise ValueError(
                f"The observation has values from {float(x.min()):g} to {float(x.max()):g}, but the family was trained on "
                f"{trained.data_support} and knows of no others. Call train(num_simulations=...) with more simulations, name a "
                "family= with more levels, or use AmortizedRatio."
            )
        return x + self._is_whole / 2

    def _observe(self, trained: Any, z: Tensor, prepared: Tensor) -> None:
        x, name = prepared, "_".join(self.simulator.observed)
        if len(x) == 1:
            pyro.sample(name, trained(z), obs=x[0])
            return
        with pyro.plate(f"{name}_rows", len(x)):
            pyro.sample(name, trained(z[..., None, :].expand(*z.shape[:-1], len(x), z.shape[-1])), obs=x)


class AmortizedRatio(_Surrogate):
    """The ratio of likelihood to evidence of a simulator, by a classifier that is trained on simulations.

    It takes any number of independent observations of the same latent variables: their log ratios are added.

    Args:
        model: function with Pyro statements, as for `AmortizedPosterior`. Discrete latent variables are averaged over.
        args: positional arguments of the model.
        observed: names of the sites that are observed.
        embedding: network that summarises the observations, as for `AmortizedPosterior`.
        hidden: widths of the hidden layers of the classifier.
        num_contrastive: number K of other draws that the classifier chooses from.
        gamma: odds that an observation comes from one of the draws it is shown with.
        simulations: simulations that were made before, (simulation, ...) by name.
        model_kwargs: keyword arguments of the model.

    Attributes:
        simulations: all simulations so far, (simulation, ...) by name.
        failures: number of simulations that were left out, by the reason.
        history: loss of held-out simulations after each epoch of the last training.
        critic: the trained classifier, from coordinates (..., dim) and vectors of observations (..., numbers) to log ratios in
            nats, (...); None before.

    Raises:
        TypeError: if an option is of the wrong type.
        ValueError: as `AmortizedPosterior`, or if gamma is not positive.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels.infer.compiled import Captured
        >>> from pyro_genmodels.posteriors import NoUTurn
        >>> def model():
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(loc, 0.5))
        >>> learned = AmortizedRatio(model, observed=["x"])
        >>> _ = learned.train(num_simulations=200, max_epochs=2, progress=False)
        >>> chain = NoUTurn(num_chains=1, num_warmup=20, num_samples=20, mode=Captured())
        >>> learned.given(x=0.7, method=chain, progress=False).get_samples()["loc"].shape
        torch.Size([20])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        observed: Sequence[str],
        embedding: Embedding | nn.Module | Mapping[str, Embedding | nn.Module] | None = None,
        hidden: Sequence[int] = (64, 64, 64),
        num_contrastive: int = 5,
        gamma: float = 1.0,
        simulations: Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_positive_int("AmortizedRatio", num_contrastive=num_contrastive)
        if not 0 < gamma < float("inf"):
            raise ValueError(f"AmortizedRatio wants a positive gamma, but found {gamma!r}.")
        super().__init__(model, args, model_kwargs or {}, observed, simulations)
        self._embeddings, self._hidden = embeddings_by_name(embedding, self.simulator.observed), tuple(hidden)
        self._loss = _Contrastive(num_contrastive, gamma)

    @property
    def critic(self) -> nn.Module | None:
        return self._trained

    def _task(self) -> tuple[nn.Module, Callable[[Any], Any], Tensor, Tensor]:
        z, observations = self._pairs()
        if self._trained is None:
            shapes = {name: self.simulator.shapes[name] for name in self.simulator.observed}
            critic: Any = _Critic(z, ObservationEncoder(shapes, self._embeddings, observations), self._hidden)
        else:
            critic = deepcopy(self._trained).requires_grad_(True)
        return critic, self._loss, z, critic.context.flatten(observations)

    def _prepared(self, trained: Any, values: Mapping[str, Tensor]) -> Tensor:
        return trained.context(trained.context.flatten(values))

    def _observe(self, trained: Any, z: Tensor, prepared: Tensor) -> None:
        pyro.factor("log_ratio", trained.log_ratio(z[..., None, :], prepared).sum(-1))


class _SurrogateModel:
    """The prior of a simulator with a learned function in place of its likelihood, as a model.

    Args:
        surrogate: what makes the statements about the observations.
        trained: the learned function.
        prepared: what the surrogate needs of the observations, (n, numbers).
    """

    def __init__(self, surrogate: _Surrogate, trained: nn.Module, prepared: Tensor) -> None:
        self.surrogate, self.trained, self.prepared = surrogate, trained, prepared

    def __call__(self) -> None:
        simulator = self.surrogate.simulator
        z = simulator.coordinates.unconstrain(poutine.block(simulator.run_latents, hide=simulator.observed)())
        self.surrogate._observe(self.trained, z.to(torch.get_default_dtype()), self.prepared)


class _Critic(nn.Module):
    """A dense network of standardised coordinates and embedded observations, to one number.

    Args:
        z: coordinates, (n, dim), whose mean and deviation standardise all others.
        context: encoder of observations.
        hidden: widths of the hidden layers.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, z: Tensor, context: ObservationEncoder, hidden: Sequence[int]) -> None:
        super().__init__()
        self.context, self.network = context, dense(z.shape[1] + context.out_features, hidden, 1)
        deviation = z.std(0, correction=0)
        self.register_buffer("loc", z.mean(0))
        self.register_buffer("scale", torch.where(deviation > 0, deviation, 1.0))

    def prepare(self, z: Tensor, context: Tensor) -> None:
        """Leave the standardisation as it is, which was made at the start."""

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """Return log ratios in nats of coordinates, (..., dim), and observations, (..., numbers), whose batches are broadcast.

        An observation that stands beside many coordinates is embedded once.
        """
        return self.log_ratio(z, self.context(context))

    def log_ratio(self, z: Tensor, features: Tensor) -> Tensor:
        """Return log ratios in nats of coordinates, (..., dim), and embedded observations, (..., features)."""
        parts = (z - self.loc) / self.scale, features
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return self.network(torch.cat([part.expand(*batch, -1) for part in parts], -1))[..., 0]


class _Contrastive:
    """The loss of NRE-C, as an objective: it is given a critic, and returns a function of pairs.

    Args:
        num_contrastive: number K of draws to choose from.
        gamma: odds that an observation comes from one of them.
    """

    def __init__(self, num_contrastive: int, gamma: float) -> None:
        self.num_contrastive, self.gamma = num_contrastive, gamma

    def __call__(self, critic: _Critic) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(z: Tensor, context: Tensor) -> Tensor:
            number = min(self.num_contrastive, len(z) - 1)
            shifts = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(max(len(z) - 1, 0))[:number] + 1])
            index = (torch.arange(len(z)) + shifts[:, None]) % len(z)
            joint, *marginal = critic(z[index], context)
            if not marginal:  # one pair has no others
                return 0 * joint.sum()
            rest = torch.full_like(joint, number / self.gamma).log()
            none = torch.stack([rest, *marginal]).logsumexp(0) - rest
            one = torch.stack([rest, joint, *marginal[1:]]).logsumexp(0) - joint
            return ((none + self.gamma * one) / (1 + self.gamma)).sum()

        return loss


def _suitable_family(x: Tensor) -> Callable[..., nn.Module]:
    """Return a builder of a family for observations (n, numbers): of probabilities if these are a few integers, or a flow."""
    number = int(x.max()) + 1
    if not ((x == x.round()) & (x >= 0)).all() or number > MAX_CLASSES:
        return default_flow
    likelihood = CategoricalLikelihood(number) if number > 2 else BernoulliLikelihood()
    return partial(Autoregressive, likelihood=likelihood, hidden=(64, 64))


def _covers(family: Any, x: Tensor) -> bool:
    """Return True if a family models all values of observations (n, numbers)."""
    return bool(family.data_support.check(x).all()) if isinstance(family, Family) else True


def _warn_of_atoms(x: Tensor) -> None:
    """Warn of columns of observations (n, numbers) in which many rows have exactly one value."""
    values = x.mode(0).values
    share = (x == values).double().mean(0)
    if (share > MAX_ATOM).any():
        i = int(share.argmax())
        warn_caller(
            f"In {float(share[i]):.0%} of the simulations a number that is observed is {float(values[i]):g}. A density can "
            "rise without end there, and then tells little of other values. Name a family= that has a probability for this "
            "value, or use AmortizedRatio, which needs no density."
        )


def _flat(observations: Mapping[str, Tensor]) -> Tensor:
    """Return observations, (n, ...) by name, as vectors, (n, numbers)."""
    return torch.cat([x.reshape(len(x), -1).to(torch.get_default_dtype()) for x in observations.values()], -1)
