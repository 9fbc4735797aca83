"""The result of a divergence: its value, the error of the value, and if that error can be trusted."""

from __future__ import annotations

__all__ = ["Divergence", "warn_unless_reliable"]

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.utils.pareto import MAX_PARETO_K


class _ValueAndError(NamedTuple):
    value: Tensor
    std_error: Tensor


class Divergence(_ValueAndError):  # noqa: N818 (no exception)
    """A pair of a divergence and its standard error, with the shape of the tail of the terms that were averaged.

    Args:
        value: divergence, (batch...); in nats unless its function says otherwise.
        std_error: standard error of the value, (batch...); 0 for a closed form.
        pareto_k: k-hat, the shape of the tail of the terms, (batch...); minus infinity for terms that are bounded, NaN for too
            few. None if no mean over samples was taken: for a closed form, and for distances of two sets of samples.

    Example:
        >>> import torch
        >>> found = Divergence(torch.tensor(2.0), torch.tensor(0.1), pareto_k=torch.tensor(1.2))
        >>> value, std_error = found
        >>> value, found.reliable
        (tensor(2.), False)
    """

    pareto_k: Tensor | None

    def __new__(cls, value: Tensor, std_error: Tensor, pareto_k: Tensor | None = None) -> Divergence:
        made = super().__new__(cls, value, std_error)
        made.pareto_k = pareto_k
        return made

    @property
    def reliable(self) -> bool:
        """True if no k-hat is above 0.7; above, neither the value nor its error means anything (arXiv 1507.02646)."""
        return self.pareto_k is None or not (self.pareto_k > MAX_PARETO_K).any()

    def __repr__(self) -> str:
        k = "" if self.reliable else f", pareto_k={self.pareto_k!r}"
        return f"Divergence(value={self.value!r}, std_error={self.std_error!r}{k})"


def warn_unless_reliable(found: Divergence, num_samples: int, *, by: str) -> Divergence:
    """Return a divergence, and warn if a k-hat is above 0.7 by more than twice its own error.

    Args:
        found: mean of terms.
        num_samples: number of terms. k-hat comes from the m = min(n / 5, 3 n^(1/2)) largest; its error is (1 + k) / m^(1/2).
        by: name of the calling function.
    """
    k = found.pareto_k
    if k is None or found.reliable:
        return found
    error = (1 + k) / min(num_samples / 5, 3 * num_samples**0.5) ** 0.5
    clear = k - torch.where(k.isinf(), 0.0, 2 * error) > MAX_PARETO_K
    if clear.any():
        which = f"{int(clear.sum())} of its {k.numel()} values are" if k.numel() > 1 else "its value is"
        warnings.warn(
            f"{by}: {which} unreliable, and may be infinite: the terms of the mean have a Pareto k-hat of "
            f"{float(k.max()):.1f}, above {MAX_PARETO_K}, so that a few samples decide it and the standard error means "
            "nothing. Use a bounded divergence (js, tv, SquaredHellinger), or exchange p and q.",
            RuntimeWarning,
            stacklevel=3,
        )
    return found
