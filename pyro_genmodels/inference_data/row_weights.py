r"""Importance weights of the latent variables of single rows, given those that all rows share.

.. math:: w_i = \frac{p(x_i, l_i \mid g)}{q(l_i \mid g, x_i)}, \qquad g, l \sim q .

They are sums of terms that the runs of `to_arviz` compute anyway, so that they take no run of their own.
"""

from __future__ import annotations

__all__ = ["RowWeights"]

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_genmodels.inference_data.arrays import BlockValues
from pyro_genmodels.utils.pareto import pareto_k
from pyro_genmodels.utils.precision import in_doubles


class RowWeights:
    """Log weights of the rows of plates, summed up block by block.

    Args:
        num_samples: number of draws.
        plates: names of the plates, the outermost first, by the name of the weights.

    Example:
        >>> from pyro_genmodels.inference_data.arrays import PlateRows
        >>> weights = RowWeights(100, {"rows": ["rows"]})
        >>> normal = torch.distributions.Normal(0.0, torch.tensor([1.0, 0.5]))
        >>> z = normal.sample((100,))
        >>> for sign, log_p in ((1, torch.distributions.Normal(0.0, 1.0).log_prob(z)), (-1, normal.log_prob(z))):
        ...     weights.add(BlockValues(log_p, slice(0, 100), [PlateRows("rows", 2, slice(None))]), sign)
        >>> weights.pareto_k()["rows"].isnan()  # weights that are all 1 say nothing
        tensor([ True, False])
    """

    def __init__(self, num_samples: int, plates: Mapping[str, Sequence[str]]) -> None:
        self.plates = dict(plates)
        self._num_samples = num_samples
        self._log_weights: dict[str, Tensor] = {}

    def add(self, log_p: BlockValues, sign: int) -> None:
        """Add the log density of a site for a block, with a sign, to the weights of the plates that it lies in.

        Variables of inner plates count for their outer row.

        Args:
            log_p: log densities, (draws, plates, event).
            sign: 1 for the model, -1 for the guide.
        """
        for name, plates in self.plates.items():
            axes = {plate.name: axis for axis, plate in enumerate(log_p.plates, 1)}
            if not axes.keys() >= set(plates):
                continue
            kept = [axes[plate] for plate in plates]
            others = [axis for axis in range(1, log_p.values.dim()) if axis not in kept]
            values = in_doubles(log_p.values.detach()).cpu().permute(0, *kept, *others)
            values = values.sum(tuple(range(1 + len(kept), values.dim()))) if others else values
            rows = [log_p.plates[axis - 1] for axis in kept]
            if name not in self._log_weights:
                shape = (self._num_samples, *(plate.size for plate in rows))
                self._log_weights[name] = torch.zeros(shape, dtype=torch.float64)
            self._log_weights[name][(log_p.draws, *(plate.rows for plate in rows))] += sign * values

    def pareto_k(self) -> dict[str, Tensor]:
        """Return k-hat of each row, (rows...) by name; NaN for rows whose weights are all 1, as those that a mask excludes."""
        found = {}
        for name in self.plates.keys() & self._log_weights.keys():
            weights = self._log_weights[name].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            found[name] = pareto_k(weights).masked_fill((weights == 0).all(0), torch.nan)
        return found
