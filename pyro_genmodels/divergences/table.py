"""A table of all divergences that can be computed between two distributions or sets of samples."""

from __future__ import annotations

__all__ = ["divergence_table"]

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

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
from pyro_genmodels.divergences.densities import check_densities, check_events
from pyro_genmodels.divergences.divergence import Divergence
from pyro_genmodels.divergences.exact import in_closed_form
from pyro_genmodels.divergences.f import f_divergence
from pyro_genmodels.divergences.fisher_divergence import fisher
from pyro_genmodels.divergences.kullback_leibler import kl, reverse_kl
from pyro_genmodels.divergences.maximum_mean_discrepancy import mmd
from pyro_genmodels.divergences.measures import check_measures
from pyro_genmodels.divergences.optimal_transport import wasserstein
from pyro_genmodels.divergences.samples import Samples, as_matrices, as_samples
from pyro_genmodels.divergences.sliced import sliced_wasserstein
from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.pareto import MAX_PARETO_K
from pyro_genmodels.utils.rng import forked_rng

if TYPE_CHECKING:
    import pandas as pd

_MAX_COSTS = 25_000_000  # largest number of costs in the linear programme

DistributionOrSamples: TypeAlias = "Distribution | Samples"
COLUMNS = ["value", "std_error", "pareto_k", "reliable", "kind", "method"]

DENSITY_DIVERGENCES: dict[str, ConvexFunction] = {
    "kl": KullbackLeibler(),
    "reverse_kl": ReverseKullbackLeibler(),
    "jeffreys": Jeffreys(),
    "js": JensenShannon(),
    "tv": TotalVariation(),
    "squared_hellinger": SquaredHellinger(),
    "pearson_chi_squared": PearsonChiSquared(),
    "neyman_chi_squared": NeymanChiSquared(),
}
SAMPLE_DISTANCES: dict[str, tuple[Callable[[Tensor, Tensor], Divergence], str]] = {
    "wasserstein": (wasserstein, "optimal plan, order 2"),
    "sliced_wasserstein": (sliced_wasserstein, "random directions, order 2"),
    "mmd": (mmd, "Gaussian kernel"),
}


def divergence_table(
    p: DistributionOrSamples,
    q: DistributionOrSamples,
    *,
    num_samples: int = 10_000,
    set_size: int = 1000,
    seed: int | None = None,
) -> pd.DataFrame:
    """Return a table of all divergences between two distributions or sets of samples.

    Densities are compared if both are known, scores likewise, and samples always. The values have different units (nats,
    probabilities, those of the data), and the standard errors cover different things (for samples not the bias): see the
    functions.

    Args:
        p: distribution of empty batch shape, or set of samples (n, ...): a tensor, array or frame.
        q: other distribution or set, of the same event shape.
        num_samples: number of samples for divergences of densities and scores.
        set_size: number of samples to take from a distribution where sets of samples are compared.
        seed: seed of all samples; torch's random state is then unchanged. None uses torch's generator.

    Returns:
        One row per divergence, by its name, with columns ``value``, ``std_error``, ``pareto_k`` (NaN where there is none),
        ``reliable`` (see `Divergence`), ``kind`` ("densities", "scores" or "samples") and ``method`` ("closed form", "exact
        sum", "Monte Carlo", ...). If a value is not reliable there is one RuntimeWarning. ``table.attrs["left_out"]`` is a dict
        from the names of the missing divergences to the reasons.

    Raises:
        TypeError: for anything but a distribution or a set of samples, such as a family that was not called.
        ValueError: for different event shapes, for distributions with a batch shape, and for samples with NaN or infinity.

    Example:
        >>> import pyro.distributions as dist
        >>> table = divergence_table(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0), seed=0)
        >>> float(table.value["kl"]), table.method["kl"]
        (0.5, 'closed form')
        >>> divergence_table(torch.randn(50), dist.Normal(0.0, 1.0)).attrs["left_out"]["js"]
        'It needs two densities, but p is a set of samples.'
    """
    for name, dist in (("p", p), ("q", q)):
        if isinstance(dist, Distribution) and dist.batch_shape:
            raise ValueError(
                f"divergence_table wants distributions without a batch, but {name} has batch shape {tuple(dist.batch_shape)}. "
                "Compare its elements one by one, or use .to_event() if they are parts of one event."
            )
    p, q = (
        side if isinstance(side, Distribution) else as_samples(side, name, by="divergence_table")
        for name, side in (("p", p), ("q", q))
    )
    if isinstance(p, Distribution) and isinstance(q, Distribution):
        check_events(p, q, by="divergence_table")
    rows: dict[str, dict[str, float | bool | str]] = {}
    left_out: dict[str, str] = {}
    unreliable: list[str] = []

    def add(name: str, kind: str, method: str, divergence: Callable[[], Divergence]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*Pareto k-hat", category=RuntimeWarning)  # one warning below
                found = divergence()
            k = float("nan") if found.pareto_k is None else float(found.pareto_k)
            if not found.reliable:
                unreliable.append(f"{name} (k = {k:.1f})")
            numbers = float(found.value), float(found.std_error), k
            rows[name] = dict(zip(COLUMNS, (*numbers, found.reliable, kind, method), strict=True))
        except (ValueError, NotImplementedError, ImportError) as error:
            left_out[name] = str(error)

    with torch.no_grad(), nullcontext() if seed is None else forked_rng(seed):
        _add_densities(add, p, q, num_samples, left_out)
        x, y = (side.sample((set_size,)) if isinstance(side, Distribution) else side for side in (p, q))
        if isinstance(p, Tensor) or isinstance(q, Tensor):
            as_matrices(x, y, by="divergence_table", names=("p", "q"))  # raises
        _add_samples(add, x, y)
    if unreliable:
        warn_caller(
            f"divergence_table: {', '.join(unreliable)} may be infinite: the terms of their means have such heavy tails (a "
            f"Pareto k-hat above {MAX_PARETO_K}) that neither value nor error can be relied on. Use the bounded ones: js, tv, "
            "squared_hellinger, mmd.",
        )
    import pandas as pd  # pandas is slow to import

    table = pd.DataFrame.from_dict(rows, orient="index", columns=COLUMNS)
    table.index.name, table.attrs["left_out"] = "divergence", left_out
    return table


def _add_densities(
    add: Callable[..., None], p: DistributionOrSamples, q: DistributionOrSamples, num_samples: int, left_out: dict[str, str]
) -> None:
    """Add the divergences of densities and scores, or the reasons why they cannot be computed."""
    if not (isinstance(p, Distribution) and isinstance(q, Distribution)):
        sets = [name for name, side in (("p", p), ("q", q)) if not isinstance(side, Distribution)]
        reason = f"{' and '.join(sets)} {'are sets' if len(sets) > 1 else 'is a set'} of samples."
        for name in DENSITY_DIVERGENCES:
            left_out[name] = f"It needs two densities, but {reason}"
        for name in ("fisher", "reverse_fisher"):
            left_out[name] = f"It needs two scores, but {reason}"
        return
    of_one_sample = {"kl": kl, "reverse_kl": reverse_kl}
    try:
        check_densities(p, q, by="divergence_table")
        check_measures(p, q, by="divergence_table")
    except ValueError as error:
        left_out.update(dict.fromkeys(DENSITY_DIVERGENCES, str(error)))
    for name, f in DENSITY_DIVERGENCES.items() if not left_out else ():
        known = in_closed_form(p, q, f, by=name)
        if known is not None:
            add(name, "densities", known[1], lambda known=known: Divergence(known[0], torch.zeros(())))
        else:
            estimate = of_one_sample.get(name, partial(f_divergence, f=f))
            add(name, "densities", "Monte Carlo", partial(estimate, p, q, num_samples=num_samples))
    add("fisher", "scores", "Monte Carlo", lambda: fisher(p, q, num_samples=num_samples))
    add("reverse_fisher", "scores", "Monte Carlo", lambda: fisher(q, p, num_samples=num_samples))


def _add_samples(add: Callable[..., None], x: Tensor, y: Tensor) -> None:
    """Add the distances between two sets of samples."""
    for name, (divergence, method) in SAMPLE_DISTANCES.items():
        add(name, "samples", method, lambda name=name, divergence=divergence: _checked(name, divergence, x, y))


def _checked(name: str, divergence: Callable[[Tensor, Tensor], Divergence], x: Tensor, y: Tensor) -> Divergence:
    """Return a distance between two sets of samples; raise a ValueError if it would be too large, or the same as another."""
    if name == "sliced_wasserstein" and x[0].numel() == 1:
        raise ValueError("In one dimension it is the wasserstein distance.")
    if name == "wasserstein" and x[0].numel() > 1 and len(x) * len(y) > _MAX_COSTS:
        raise ValueError(
            f"Its linear programme of {len(x)} x {len(y)} samples would hold more than {_MAX_COSTS:,} costs. Use fewer samples."
        )
    return divergence(x, y)
