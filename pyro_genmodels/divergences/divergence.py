"""The result of a divergence: its value and standard error, and k-hat, which shows whether these are reliable."""

from __future__ import annotations

__all__ = ["Divergence", "warn_unless_reliable"]

from typing import Any, NamedTuple

from torch import Tensor

from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.pareto import MAX_PARETO_K, count_unreliable, is_unreliable, largest_pareto_k


class _ValueAndError(NamedTuple):
    value: Tensor
    std_error: Tensor


class Divergence(_ValueAndError):  # noqa: N818 (no exception)
    """A pair of a divergence and its standard error, with k-hat of the terms that were averaged.

    Args:
        value: divergence, (batch...); in nats unless its function says otherwise.
        std_error: standard error of the value, (batch...); 0 for a closed form.
        pareto_k: k-hat, the shape of the tail of the terms, (batch...); minus infinity for bounded terms, NaN for too few. The
            terms of a distance between two sets of samples are the contributions of single samples. None for a closed form,
            and for bounded kernels.
        num_samples: number of terms, in the smaller of two sets; 0 if no mean was taken.

    Example:
        >>> import torch
        >>> found = Divergence(torch.tensor(2.0), torch.tensor(0.1), pareto_k=torch.tensor(1.2), num_samples=1000)
        >>> value, std_error = found
        >>> value, found.reliable
        (tensor(2.), False)
    """

    pareto_k: Tensor | None
    num_samples: int

    def __new__(cls, value: Tensor, std_error: Tensor, pareto_k: Tensor | None = None, num_samples: int = 0) -> Divergence:
        if pareto_k is not None and num_samples < 1:
            raise ValueError(f"A Divergence with a k-hat wants num_samples of 1 or more, but found num_samples={num_samples}.")
        made = super().__new__(cls, value, std_error)
        made.pareto_k, made.num_samples = pareto_k, num_samples
        return made

    @property
    def reliable(self) -> bool:
        """True unless k-hat shows that value and error cannot be relied on: see `pyro_genmodels.utils.pareto`."""
        return self.pareto_k is None or not is_unreliable(self.pareto_k, self.num_samples)

    def _replace(self, **changes: Any) -> Divergence:
        """Return a copy with some attributes changed, as named tuples do; `pareto_k` and `num_samples` are kept."""
        return Divergence(**{**self._asdict(), **changes})

    def _asdict(self) -> dict[str, Any]:
        return {**super()._asdict(), **vars(self)}

    def __repr__(self) -> str:
        k = "" if self.reliable else f", pareto_k={self.pareto_k!r}"
        return f"Divergence(value={self.value!r}, std_error={self.std_error!r}{k})"


def warn_unless_reliable(
    found: Divergence, *, by: str, cure: str = "a bounded divergence (js, tv, SquaredHellinger), or exchange p and q"
) -> Divergence:
    """Return a divergence, and warn if it is not reliable.

    Args:
        found: mean of terms.
        by: name of the calling function.
        cure: what to use instead.
    """
    k = found.pareto_k
    if k is None or found.reliable:
        return found
    which = f"{count_unreliable(k)} of its {k.numel()} values are" if k.numel() > 1 else "its value is"
    warn_caller(
        f"{by}: {which} unreliable, and may be infinite: the terms of the mean have a Pareto k-hat of "
        f"{largest_pareto_k(k):.1f}, above {MAX_PARETO_K}, so that a few samples decide it and the standard error means "
        f"nothing. Use {cure}.",
    )
    return found
