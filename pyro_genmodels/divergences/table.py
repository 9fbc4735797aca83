"""Every divergence that can be had of two distributions or sets of draws, in one table."""

from __future__ import annotations

__all__ = ["divergence_table"]

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_genmodels.divergences.convex import (
    ConvexFunction,
    Jeffreys,
    JensenShannon,
    KullbackLeibler,
    NeymanChiSquared,
    PearsonChiSquared,
    ReverseKullbackLeibler,
    SquaredHellinger,
    TotalVariation,
)
from pyro_genmodels.divergences.densities import check_events
from pyro_genmodels.divergences.f import f_divergence, in_closed_form
from pyro_genmodels.divergences.fisher_divergence import fisher
from pyro_genmodels.divergences.kullback_leibler import Divergence, kl, reverse_kl
from pyro_genmodels.divergences.maximum_mean_discrepancy import mmd
from pyro_genmodels.divergences.optimal_transport import wasserstein
from pyro_genmodels.divergences.sliced import sliced_wasserstein

if TYPE_CHECKING:
    import pandas as pd

_COSTS = 25_000_000  # that a linear programme may hold

Sets = Distribution | Tensor

OF_DENSITIES: dict[str, ConvexFunction] = {
    "kl": KullbackLeibler(),
    "reverse_kl": ReverseKullbackLeibler(),
    "jeffreys": Jeffreys(),
    "js": JensenShannon(),
    "tv": TotalVariation(),
    "squared_hellinger": SquaredHellinger(),
    "pearson_chi_squared": PearsonChiSquared(),
    "neyman_chi_squared": NeymanChiSquared(),
}
OF_DRAWS: dict[str, tuple[Callable[[Tensor, Tensor], Divergence], str]] = {
    "wasserstein": (wasserstein, "optimal plan"),
    "sliced_wasserstein": (sliced_wasserstein, "random lines"),
    "mmd": (mmd, "Gaussian kernel"),
}


def divergence_table(
    p: Sets, q: Sets, *, num_samples: int = 10_000, num_draws: int = 1000, seed: int | None = None
) -> pd.DataFrame:
    """What every divergence says of two distributions, or sets of draws, that it can be asked of.

    Densities are compared if both are known, scores likewise, and draws always. Values differ in their units (nats,
    probabilities, those of the data), and standard errors in what they cover, for draws not the bias: see each function.

    Args:
        p: a distribution of empty batch shape, or draws (n, ...).
        q: the other, of the same event shape.
        num_samples: draws for the rows of densities and scores.
        num_draws: of a distribution, to compare as draws.
        seed: of all the draws, which leaves torch's generator as it is; None goes on from that.

    Returns:
        A row for each divergence, by its name, with columns ``value``, ``std_error``, ``kind`` ("densities", "scores" or
        "draws") and ``how`` ("closed form", "exact sum", "Monte Carlo", ...). Why others are not there is said by
        ``table.attrs["left_out"]``, a dict from name to reason.

    Raises:
        ValueError: on different event shapes and on batches.

    Example:
        >>> import pyro.distributions as dist
        >>> table = divergence_table(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0), seed=0)
        >>> float(table.value["kl"]), table.how["kl"]
        (0.5, 'closed form')
        >>> divergence_table(torch.randn(50), dist.Normal(0.0, 1.0)).attrs["left_out"]["js"]
        'it takes two densities, and p is a set of draws.'
    """
    for name, one in (("p", p), ("q", q)):
        if isinstance(one, Distribution) and one.batch_shape:
            raise ValueError(
                f"divergence_table wants one distribution on each side, but {name} has batch shape {tuple(one.batch_shape)}. "
                "Take its elements one by one, or .to_event() if they are parts of one event."
            )
    if isinstance(p, Distribution) and isinstance(q, Distribution):
        check_events(p, q, by="divergence_table")
    rows: dict[str, dict[str, float | str]] = {}
    left_out: dict[str, str] = {}

    def add(name: str, kind: str, how: str, divergence: Callable[[], Divergence]) -> None:
        try:
            value, std_error = divergence()
            rows[name] = {"value": float(value), "std_error": float(std_error), "kind": kind, "how": how}
        except (ValueError, NotImplementedError, ImportError) as error:
            left_out[name] = str(error)

    with torch.no_grad(), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        _add_densities(add, p, q, num_samples, left_out)
        _add_draws(add, *(one.sample((num_draws,)) if isinstance(one, Distribution) else one for one in (p, q)))
    import pandas as pd  # slow to import

    table = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "std_error", "kind", "how"])
    table.index.name, table.attrs["left_out"] = "divergence", left_out
    return table


def _add_densities(add: Callable[..., None], p: Sets, q: Sets, num_samples: int, left_out: dict[str, str]) -> None:
    if not (isinstance(p, Distribution) and isinstance(q, Distribution)):
        which = " and ".join(name for name, one in (("p", p), ("q", q)) if not isinstance(one, Distribution))
        are = "are sets" if " " in which else "is a set"
        for name in OF_DENSITIES:
            left_out[name] = f"it takes two densities, and {which} {are} of draws."
        for name in ("fisher", "reverse_fisher"):
            left_out[name] = f"it takes two scores, and {which} {are} of draws."
        return
    by_name = {"kl": kl, "reverse_kl": reverse_kl}
    for name, f in OF_DENSITIES.items():
        known = in_closed_form(p, q, f)
        if known is not None:
            add(name, "densities", known[1], lambda known=known: Divergence(known[0], torch.zeros(())))
        elif name in by_name:
            add(name, "densities", "Monte Carlo", lambda name=name: by_name[name](p, q, num_samples=num_samples))
        else:
            add(name, "densities", "Monte Carlo", lambda f=f: f_divergence(p, q, f, num_samples=num_samples))
    add("fisher", "scores", "Monte Carlo", lambda: fisher(p, q, num_samples=num_samples))
    add("reverse_fisher", "scores", "Monte Carlo", lambda: fisher(q, p, num_samples=num_samples))


def _add_draws(add: Callable[..., None], x: Tensor, y: Tensor) -> None:
    for name, (divergence, how) in OF_DRAWS.items():
        add(name, "draws", how, lambda name=name, divergence=divergence: _checked(name, divergence, x, y))


def _checked(name: str, divergence: Callable[[Tensor, Tensor], Divergence], x: Tensor, y: Tensor) -> Divergence:
    if name == "wasserstein" and x[0].numel() > 1 and len(x) * len(y) > _COSTS:
        raise ValueError(
            f"of {len(x)} x {len(y)} draws, its linear programme would hold more than {_COSTS:,} costs. Give fewer."
        )
    return divergence(x, y)
