r"""Latent variables for which a fit has no draws.

Discrete variables :math:`k` that inference has summed out have none. If they lie in the rows of the one observed variable that
depends on them, its log-likelihood is that of the sum,

.. math:: \log p(x_n \mid z) = \log \sum_{k_n} p(k_n \mid z)\, p(x_n \mid k_n, z).
"""

from __future__ import annotations

__all__ = ["UndrawnLatents", "find_undrawn"]

from collections.abc import Mapping
from dataclasses import dataclass, field

from pyro_genmodels._pyro import sites
from pyro_genmodels.inference_data.replay import Replay
from pyro_genmodels.inference_data.sources import DrawSource


@dataclass(frozen=True)
class UndrawnLatents:
    """Latent variables for which a fit has no draws, and the sites that depend on them.

    Attributes:
        predicted: variables that the model samples, as posterior predictions.
        hidden: discrete variables that inference has summed out.
        summed_out_at: observed site whose log-likelihood sums over the hidden variables, or None.
        skipped: sites without a value in the posterior: hidden variables, and what is computed from them.
        without_prior: sites whose prior density depends on hidden variables that cannot be summed out.
        reports: what cannot be computed, with the reason.
    """

    predicted: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    summed_out_at: str | None = None
    skipped: frozenset[str] = frozenset()
    without_prior: frozenset[str] = frozenset()
    reports: Mapping[str, str] = field(default_factory=dict)

    @property
    def leaves_no_likelihood(self) -> bool:
        """True if hidden variables cannot be summed out, so that there is no log-likelihood and no joint density."""
        return bool(self.hidden) and self.summed_out_at is None


def find_undrawn(replay: Replay, source: DrawSource) -> UndrawnLatents:
    """Find the latent variables without draws.

    Raises:
        ValueError: if there are no draws of a continuous variable.
    """
    layout, given = replay.layout, isinstance(source.guide, Mapping)
    enumerated = [name for name, site in layout.unguided.items() if site["infer"].get("enumerate")]
    discrete = [name for name, site in layout.unguided.items() if site["fn"].has_enumerate_support]
    predicted: list[str] = []
    if not layout.observed and not source.is_family_prior:
        predicted = [name for name in layout.unguided if name not in enumerated]
    elif source.has_all_continuous:
        predicted = [name for name in layout.unguided if name not in discrete]
    hidden = [name for name in layout.unguided if name not in predicted and (name in enumerated or given)]
    if missing := [name for name in hidden if name not in discrete]:
        raise ValueError(
            f"There are no draws of {', '.join(map(repr, missing))}, which the model has. Give draws of all latent variables; "
            "WeighedPredictive returns them if return_sites= names them."
        )
    if not hidden:
        return UndrawnLatents(tuple(predicted))
    return _hidden(replay, tuple(predicted), tuple(hidden))


def _hidden(replay: Replay, predicted: tuple[str, ...], hidden: tuple[str, ...]) -> UndrawnLatents:
    layout, names = replay.layout, ", ".join(map(repr, hidden))
    dependent, is_chain = replay.depends_on(hidden)
    computed = [name for name in dependent if sites.is_computed(layout.sites[name])]
    reports = {f"posterior[{name!r}]": "inference has summed it out: there are no draws of it" for name in hidden}
    reports |= {f"posterior[{name!r}]": f"it depends on {names}, of which there are no draws" for name in computed}
    skipped = frozenset([*hidden, *computed])
    others = [name for name in dependent if name not in computed]
    plates = {frozenset(frame.name for frame in layout.sites[name]["cond_indep_stack"]) for name in (*hidden, *others)}
    if len(others) == 1 and others[0] in layout.observed and len(plates) == 1 and not is_chain:
        return UndrawnLatents(predicted, hidden, others[0], skipped, reports=reports)
    why = f"{names} cannot be summed out row by row, for which one observed variable in the same plates must depend on them"
    reports |= dict.fromkeys(["log_likelihood", "sample_stats.log_p"], why)
    reports |= {f"log_prior[{name!r}]": f"it depends on {names}" for name in others if name not in layout.observed}
    return UndrawnLatents(predicted, hidden, None, skipped, frozenset(others), reports)
