"""A model conditioned on other data than those in its arguments, and handlers that free its observed sites.

Only the values at observed sites are replaced, so nothing need be known of which argument holds the data. What a model computes
from its data elsewhere, such as lagged values, stays that of the arguments.
"""

from __future__ import annotations

__all__ = ["ConditionedModel", "FreeSites", "Simulated"]

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor

from pyro_genmodels._pyro.handlers import draw_observed
from pyro_genmodels._pyro.sites import is_deterministic
from pyro_genmodels.distributions.base import GenerativeDistribution


class ConditionedModel:
    """A model whose data are replaced by others. Missing ones, which are NaN, are masked.

    Args:
        model: function with Pyro statements.
        data: values of its observed sites, by name. They may be changed in place, but for which are missing.

    Attributes:
        model: the model.
        data: the values, 0 for missing ones.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> ConditionedModel(model, {"y": torch.tensor(3.0)})(torch.tensor(1.0))
        tensor(3.)
    """

    def __init__(self, model: Callable[..., Any], data: Mapping[str, Tensor]) -> None:
        self.model = model
        self._missing = {name: x.isnan() for name, x in data.items() if bool(x.isnan().any())}
        self.data = {name: x.nan_to_num() if name in self._missing else x for name, x in data.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        drawn = draw_observed(self.model)
        free = FreeSites(list(self.data))(lambda: drawn(*args, **kwargs))  # handlers have a keyword `context`
        return poutine.condition(_MaskedSites(self._missing)(free), data=self.data)()


class FreeSites(Messenger):
    """Handler that draws at observed sites in place of observing. A computed value becomes a draw without a density.

    Args:
        names: names of the observed sites.
        draws: False to leave computed values as they are.
    """

    def __init__(self, names: Sequence[str], *, draws: bool = True) -> None:
        super().__init__()
        self.names, self.draws = frozenset(names), draws

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.names:
            return
        if is_deterministic(msg):
            if not self.draws:
                return
            msg["fn"] = Simulated(msg["value"], msg["fn"].event_dim, msg["name"])
            msg["infer"] = {}
        msg["value"], msg["is_observed"] = None, False


class _MaskedSites(Messenger):
    """Handler that leaves missing values of observed sites out of the density.

    Args:
        missing: True where a value is missing, by name.
    """

    def __init__(self, missing: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.missing = dict(missing)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.missing:
            return
        missing, dims = self.missing[msg["name"]], msg["fn"].event_dim
        flat = missing.flatten(missing.dim() - dims) if dims else missing[..., None]
        if bool((flat.any(-1) != flat.all(-1)).any()):
            raise ValueError(
                f"Some coordinates of one event of {msg['name']!r} are missing. The model has a density of whole events only, "
                "so there are draws of this posterior, but no weights and no log-likelihood."
            )
        msg["mask"] = ~flat.all(-1) if msg["mask"] is None else msg["mask"] & ~flat.all(-1)


class Simulated(GenerativeDistribution):
    """The distribution of what a simulator returns, of which one draw is known and no density.

    Args:
        value: the draw.
        event_dim: number of dimensions of one event.
        name: name of the site.
    """

    density = "none"
    has_rsample = False

    def __init__(self, value: Tensor, event_dim: int, name: str) -> None:
        batch = value.dim() - event_dim
        super().__init__(value.shape[batch:], batch_shape=value.shape[:batch], validate_args=False)
        self.value, self.name = value, name
        self.advice = f"The site {name!r} is computed by a simulator, so there are draws, and no weights or log-likelihood."

    @property
    def owner(self) -> str:
        return f"The simulator of {self.name!r}"

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError(f"{self.owner} has no density. {self.advice}")

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self.log_prob(y)

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        return self.value.expand(shape + self.event_shape)
