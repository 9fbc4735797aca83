r"""Log-likelihoods of held-out data under any fit, and what kind of number they are.

Without latent variables :math:`\log p(x_n)` is a sum over the sites of row n. Latent variables inside the data's plate are
integrated by importance sampling: k samples from the guide give

.. math:: \log p(x_n) \ge \mathbb{E} \log \frac{1}{k} \sum_{j=1}^{k} \frac{p(x_n, z_j)}{q(z_j \mid x_n)},

a lower bound that rises with k and converges to the truth. The noise of a dequantised density is integrated in the same way.
Burda et al., *Importance Weighted Autoencoders* (arXiv 1509.00519).

The normalising constant of an energy is computed, or estimated by annealed importance sampling. The estimate of log Z is too
low in expectation, so the likelihood is too high. Annealing backwards from the data errs the other way
(`conservative_log_likelihood`).
"""

from __future__ import annotations

__all__ = ["LogLikelihood", "has_likelihood", "log_likelihood", "no_likelihood"]

from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels._pyro import handlers, traces, vectorize
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.distributions.ode import fresh_probes
from pyro_genmodels.evaluation.arguments import RowArguments
from pyro_genmodels.evaluation.importance import LikelihoodKind, RowEstimator, structure_of
from pyro_genmodels.evaluation.log_z import LogPartitions
from pyro_genmodels.utils.distributions import density_of
from pyro_genmodels.utils.errors import check_positive_int


@dataclass(frozen=True, repr=False)
class LogLikelihood:
    """Log-likelihoods (nats), one per datum, and what is known about them.

    Attributes:
        values: log-likelihoods, (N,); NaN if the kind is "none".
        std_error: Monte Carlo standard error of each value, (N,); 0 for values without sampling, NaN for a single sample.
        kind: meaning of the values; "none" for a fit that can be sampled from but has no likelihood.
        num_samples: k, the number of samples behind each value; 1 if nothing was sampled.
        log_partition: log Z that all values share, if they are of one energy; its error is part of each standard error.
        shared_error: standard error of the mean that comes from values of log Z shared by several rows.
        observation_noise: deviation of the Gaussian noise that was added to samples without a density
            (`gaussian_observation_likelihood`); None if none was added.
    """

    values: Tensor
    std_error: Tensor
    kind: LikelihoodKind
    num_samples: int
    log_partition: LogPartition | None = None
    shared_error: float = 0.0
    observation_noise: float | None = None

    @property
    def mean(self) -> float:
        """Mean log-likelihood in nats per datum."""
        return self.values.mean().item()

    @property
    def mean_std_error(self) -> float:
        """Standard error of the mean, with the data as a random sample; NaN for a single datum."""
        if len(self.values) < 2:
            return float("nan")
        return (self.values.var() / len(self.values) + self.shared_error**2).sqrt().item()

    def bits_per_dim(self, dims: int) -> float:
        """Return the negative log-likelihood in bits per dimension, for data of `dims` dimensions."""
        return -self.mean / (dims * log(2))

    def __repr__(self) -> str:
        return f"LogLikelihood({self})"

    def __str__(self) -> str:
        if self.kind == "none":
            return f"- (no likelihood, n={len(self.values)})"
        k = "" if self.kind == "exact" else f", k={self.num_samples}"
        noise = self.observation_noise
        suffix = "" if noise is None else f", with Gaussian observation noise {noise:.3g}"
        return f"{self.mean:.3f} ± {self.mean_std_error:.3f} nats per datum ({self.kind}{k}, n={len(self.values)}{suffix})"


def log_likelihood(
    fit: Any,
    x: Tensor,
    *args: Any,
    num_samples: int = 1000,
    num_steps: int = 1000,
    batch_size: int = 20_000,
    parallel: bool | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> LogLikelihood:
    """Return the log-likelihood (nats) of each row of x.

    The fit's modules run in evaluation mode (no dropout), and their mode is restored afterwards. Scales of plates and of
    `poutine.scale` are ignored; masks are applied. A family of energies keeps the log Z that was found.

    Args:
        fit: family, `SVI`, or pair (model, guide); the data are the first argument of the model.
        x: data, (N, ...), in a plate of N rows.
        args: other arguments of the model; tensors of N rows are cut into batches along with x.
        num_samples: k, the number of samples per row if anything is sampled; also the number of chains behind an estimated
            log Z (per row for a conditional energy).
        num_steps: number of betas of the annealing path on which log Z of an energy is estimated.
        batch_size: largest number of (sample, row) pairs held in memory at once.
        parallel: True to make samples together in one run. The model must allow it (no ``z[0]`` or ``z.sum()``). None tries
            it on a few rows.
        progress: True to show a progress bar, after five seconds and while log Z is estimated.
        kwargs: keyword arguments of the model, treated as args.

    Returns:
        Values, standard errors (delta method) and kind. For energies the kind is "exact" if log Z is exact, "unreliable" if
        its estimate is unreliable, and "estimate" otherwise.

    Raises:
        ValueError: if latent variables lie outside the data's plate; if the guide is a point mass; if an observed site has no
            normalised density.

    Example:
        >>> from pyro_genmodels import Flow, log_likelihood
        >>> log_likelihood(Flow((2,)), torch.randn(50, 2)).kind
        'exact'
    """
    model, guide = traces.as_pair(fit)
    if not isinstance(x, Tensor) or x.dim() < 1 or not len(x):
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"log_likelihood wants a torch.Tensor of one or more rows, but found {found}: see torch.as_tensor.")
    check_positive_int("log_likelihood", num_samples=num_samples, num_steps=num_steps, batch_size=batch_size)
    data = RowArguments((x, *args), kwargs)
    log_partitions = LogPartitions(num_samples, num_steps, progress=progress)
    with handlers.side_effect_free(model, guide), fresh_probes():
        structure = structure_of(model, guide, data.take(slice(0, 1)), log_partitions)
        k = num_samples if structure.is_sampled else 1
        if parallel is None:
            trial = data.take(slice(0, max(1, min(5, batch_size // 3))))
            parallel = k > 1 and vectorize.can_vectorize(model, guide, trial.args, trial.kwargs, structure.nesting)
        estimator = RowEstimator(model, guide, structure, log_partitions, k, batch_size, parallel)
        values, std_error = estimator.estimate(data, progress=progress)
    kind = next((kind for kind in ("unreliable", "estimate") if kind in log_partitions.kinds), structure.kind)
    k = k if structure.is_sampled or kind == "exact" else num_samples
    return LogLikelihood(values, std_error, kind, k, log_partitions.single, log_partitions.shared_error(len(x)))


def has_likelihood(fit: Any, x: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Return True if every site of a fit's model has a density; the model runs once, on the first row of x, (N, ...).

    Torch's random number generator is left as it was.

    Example:
        >>> from pyro_genmodels import Flow
        >>> has_likelihood(Flow((2,)), torch.randn(5, 2))
        True
    """
    model, guide = traces.as_pair(fit)
    first = RowArguments((x, *args), kwargs).take(slice(0, 1))
    with handlers.side_effect_free(model, guide), torch.random.fork_rng(devices=[]):
        trace, _ = traces.run_pair(model, guide, first.args, first.kwargs)
    return all(density_of(site["fn"])[0] != "none" for site in traces.sample_sites(trace).values())


def no_likelihood(num_rows: int) -> LogLikelihood:
    """Return the `LogLikelihood` of a fit without one: NaN for each row, of the kind "none"."""
    values = torch.full((num_rows,), torch.nan)
    return LogLikelihood(values, values, "none", 0)
