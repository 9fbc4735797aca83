r"""Learned likelihoods of simulators, from which Markov chains draw the posterior.

.. math:: p(z \mid x_1, \dots, x_n) \propto p(z) \prod_i q_\phi(x_i \mid z), \qquad
          \max_\phi \; \mathbb{E}_{z \sim p(z),\, x \sim p(x \mid z)} \log q_\phi(x \mid z) .

Papamakarios et al., *Sequential Neural Likelihood* (arXiv 1805.07226).
"""

from __future__ import annotations

__all__ = ["AmortizedLikelihood"]

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_genmodels.distributions.likelihoods import BernoulliLikelihood, CategoricalLikelihood
from pyro_genmodels.families import Autoregressive, Family
from pyro_genmodels.infer.objective import Loss
from pyro_genmodels.posteriors.amortized import default_flow
from pyro_genmodels.posteriors.conditional import check_builder, default_objective
from pyro_genmodels.posteriors.observation_encoder import ObservationEncoder
from pyro_genmodels.posteriors.surrogates import Surrogate
from pyro_genmodels.utils.errors import warn_caller

MAX_CLASSES = 16
"""Largest number of values of an observed number for which each has a probability of its own by default."""
MAX_ATOM = 0.05
"""Largest share of the simulations with one value, which is no whole number, that is not warned of."""


class AmortizedLikelihood(Surrogate):
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
