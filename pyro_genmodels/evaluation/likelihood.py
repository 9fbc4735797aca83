r"""The log-likelihood of held-out data under any fit, and what is known about it.

Without latent variables :math:`\log p(x_n)` is a sum over the sites of row n. With latent variables inside the data's plate it
is bounded from below, in expectation, by k draws from the guide,

.. math:: \log p(x_n) \ge \mathbb{E} \log \frac{1}{k} \sum_{j=1}^{k} \frac{p(x_n, z_j)}{q(z_j \mid x_n)},

a bound that rises with k and meets the truth as k grows. The same holds for the noise of a dequantised density. Burda et al.,
*Importance Weighted Autoencoders* (arXiv 1509.00519).

Of an energy log Z is computed, or estimated by annealed importance sampling: too low in expectation, so that the likelihood
seems too high. Annealing backwards from the data errs the other way (`conservative_log_likelihood`).
"""

from __future__ import annotations

__all__ = ["LogLikelihood", "has_likelihood", "log_likelihood", "no_likelihood"]

from dataclasses import dataclass
from math import log
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro import handlers, traces, vectorize
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.distributions.ode import fresh_probes
from pyro_genmodels.dynamics.reverse import PROGRESS_DELAY
from pyro_genmodels.evaluation.log_z import LogPartitions
from pyro_genmodels.utils.distributions import density_of, mean_inside_log, unwrap

LikelihoodKind = Literal["exact", "lower bound", "estimate", "unreliable", "none"]


@dataclass(frozen=True, repr=False)
class LogLikelihood:
    """Log-likelihoods (nats), one per datum, with what is known of them.

    Attributes:
        values: (N,); NaN of the kind "none".
        std_error: standard error of each value from drawing, (N,); 0 where nothing was drawn, NaN where one draw cannot tell.
        kind: what the values are; "none" of a fit that can be drawn from and has no likelihood.
        num_samples: k, the draws behind each value; 1 where nothing was drawn.
        log_partition: log Z that all values share, where they are of an energy; its error is in that of each.
        shared_error: standard error that the mean has of log Z, shared by all values or by those of one context.
        observation: deviation of the Gaussian noise through which draws without a density are seen
            (`gaussian_observation_likelihood`); None where there is no such noise.
    """

    values: Tensor
    std_error: Tensor
    kind: LikelihoodKind
    num_samples: int
    log_partition: LogPartition | None = None
    shared_error: float = 0.0
    observation: float | None = None

    @property
    def mean(self) -> float:
        """Nats per datum."""
        return self.values.mean().item()

    @property
    def mean_std_error(self) -> float:
        """Standard error of the mean over data of which these are a sample."""
        if len(self.values) < 2:
            return float("nan")
        return (self.values.var() / len(self.values) + self.shared_error**2).sqrt().item()

    def bits_per_dim(self, dims: int) -> float:
        """Negative log-likelihood in bits per dimension, for data of that many dimensions."""
        return -self.mean / (dims * log(2))

    def __repr__(self) -> str:
        return f"LogLikelihood({self})"

    def __str__(self) -> str:
        if self.kind == "none":
            return f"- (no likelihood, n={len(self.values)})"
        k = "" if self.kind == "exact" else f", k={self.num_samples}"
        noise = "" if self.observation is None else f", with Gaussian observation noise {self.observation:.3g}"
        return f"{self.mean:.3f} ± {self.mean_std_error:.3f} nats per datum ({self.kind}{k}, n={len(self.values)}{noise})"


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
    """Log-likelihood (nats) of each row of x.

    Modules of the fit are put in evaluation mode (no dropout) and put back. Plates' scales and `poutine.scale` do not count;
    masks do. A family of energies remembers the log Z that was found.

    Args:
        fit: a family, an `SVI`, or a pair (model, guide), whose first argument is the data.
        x: data, (N, ...), in a plate of N rows.
        args: the model's other arguments; tensors of N rows are cut into batches along with x.
        num_samples: k, the draws per row where anything is drawn; chains behind log Z of an energy (of a conditional one, for
            each row).
        num_steps: betas of the path on which log Z of an energy is estimated, where it cannot be computed.
        batch_size: how many (draw, row) pairs to hold at once.
        parallel: whether draws are made together in one run, which a model must allow (no ``z[0]`` or ``z.sum()``); None tries
            out whether it does.
        progress: whether to show a progress bar, after five seconds and while log Z is estimated.
        kwargs: the model's keyword arguments, treated as args.

    Returns:
        Values, standard errors (delta method) and kind. Of energies it is "exact" where log Z is, "unreliable" where its
        estimate is, else "estimate".

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
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be positive, got {num_samples} and {batch_size}.")
    with handlers.side_effect_free(), fresh_probes():
        first = _rows(slice(0, 1), len(x), (x, *args), kwargs)
        constants = LogPartitions(num_samples, num_steps, progress=progress)
        kind, drawn, tighter, plates, nesting = _kind(model, guide, *first, constants)
        k = num_samples if drawn else 1
        if parallel is None:
            trial = _rows(slice(0, max(1, min(5, batch_size // 3))), len(x), (x, *args), kwargs)
            parallel = k > 1 and vectorize.can_vectorize(model, guide, *trial, nesting)
        rows = max(1, batch_size // k) if parallel else batch_size
        parts = []
        with tqdm(
            total=len(x) * k, desc="log-likelihood", unit="draw", delay=PROGRESS_DELAY, disable=not progress, leave=False
        ) as bar:
            for start in range(0, len(x), rows):
                stop = min(start + rows, len(x))
                call = _rows(slice(start, stop), len(x), (x, *args), kwargs)
                at_once = max(1, batch_size // (stop - start)) if parallel else None
                found = _weigh(model, guide, *call, stop - start, plates, nesting, k, at_once, drawn, tighter, constants, bar)
                parts.append(found)
    values, std_error = (torch.cat(part) for part in zip(*parts, strict=True))
    kind = "unreliable" if "unreliable" in constants.kinds else "estimate" if "estimate" in constants.kinds else kind
    k = k if drawn or kind == "exact" else num_samples
    return LogLikelihood(values, std_error, kind, k, constants.single, constants.shared_error(len(x)))


def has_likelihood(fit: Any, x: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether all sites of a fit's model have a density, by a run on the first row of x, (N, ...).

    Example:
        >>> from pyro_genmodels import Flow
        >>> has_likelihood(Flow((2,)), torch.randn(5, 2))
        True
    """
    model, guide = traces.as_pair(fit)
    with (
        handlers.side_effect_free(),
        torch.random.fork_rng(devices=[]),
    ):  # what is drawn afterwards is as if this had not been asked
        first_args, first_kwargs = _rows(slice(0, 1), len(x), (x, *args), kwargs)
        trace, _ = traces.run_pair(model, guide, first_args, first_kwargs)
    return all(density_of(site["fn"])[0] != "none" for site in traces.sample_sites(trace).values())


def no_likelihood(rows: int) -> LogLikelihood:
    """What there is to say of so many rows where there is no likelihood."""
    values = torch.full((rows,), torch.nan)
    return LogLikelihood(values, values, "none", 0)


def _kind(
    model: Any, guide: Any, args: tuple, kwargs: dict[str, Any], constants: LogPartitions
) -> tuple[LikelihoodKind, bool, bool, list[str], int]:
    """What a run on one row can say.

    It is the kind of values, whether each is from draws, and whether more draws tighten it; the data's plate, and the nesting.
    """
    model_trace, guide_trace = traces.run_pair(model, guide, args, kwargs)
    for role, trace in (("model", model_trace), ("guide", guide_trace)):
        constants.put(trace, role)
    unguided = [n for n in traces.latents(model_trace) if n not in guide_trace.nodes]
    if unguided:
        raise ValueError(
            f"log_likelihood wants a guide for every latent variable, but the guide has none for "
            f"{', '.join(map(repr, unguided))}. Add them to the guide, or make an autoguide of the model."
        )
    if traces.is_point_mass(guide_trace):
        raise ValueError(
            "log_likelihood averages over draws from the guide, but this guide is a point mass (AutoDelta, MAP), under which "
            "no bound holds. Use a guide with a density, such as AutoNormal."
        )
    plates = list(traces.data_plates(model_trace, 1))
    sites = traces.sample_sites(model_trace)
    outside = [n for n in traces.latents(model_trace) if all(f.name not in plates for f in sites[n]["cond_indep_stack"])]
    if outside:
        raise ValueError(
            f"log_likelihood integrates over latent variables of single rows, but {', '.join(map(repr, outside))} lie outside "
            f"the plate {plates[0]!r} and are shared by all rows. Use to_arviz(fit, ...) and az.loo for such a posterior."
        )
    densities = set()
    for site_name, site in sites.items():
        density, advice = density_of(site["fn"])
        if density in ("none", "unnormalized"):
            raise ValueError(
                f"log_likelihood needs a density, but site {site_name!r} holds {type(unwrap(site['fn'])).__name__}, whose "
                f"density is: {density}. {advice}"
            )
        densities.add(density)
    tighter = all(mean_inside_log(site["fn"]) for site in sites.values())
    drawn = bool(traces.latents(model_trace)) or "lower bound" in densities or not tighter
    kind: LikelihoodKind = "estimate" if "estimate" in densities else "lower bound" if drawn else "exact"
    return kind, drawn, tighter, plates, traces.max_plate_nesting(model, guide, args, kwargs)


def _weigh(
    model: Any,
    guide: Any,
    args: tuple,
    kwargs: dict[str, Any],
    rows: int,
    plates: list[str],
    nesting: int,
    k: int,
    at_once: int | None,
    drawn: bool,  # noqa: FBT001
    tighter: bool,  # noqa: FBT001
    constants: LogPartitions,
    bar: tqdm,
) -> tuple[Tensor, Tensor]:
    """Log mean weight of each row and its standard error, from k draws, so many at once or each in a run of its own.

    Where the log weights are themselves drawn, only their mean is a bound.
    """
    log_w, variances = [], []
    for start in range(0, k, at_once or 1):
        draws = min(at_once or 1, k - start)
        plate = traces.particles(draws, nesting) if at_once else None
        pair = traces.run_pair(model, guide, args, kwargs, plate)
        places = constants.put(pair[0], "model") + constants.put(pair[1], "guide")
        dim = next(dim for name, dim in traces.data_plates(pair[0], rows).items() if name in plates)
        log_p, log_q = (traces.log_prob(trace, (-nesting - 1, dim), scaled=False) for trace in pair)
        log_w.append((log_p - log_q.to(log_p)).expand(draws, rows))
        variances.append(constants.variance(places, nesting, dim, draws / k))
        bar.update(draws * rows)
    log_w = torch.cat(log_w)
    values = log_w.logsumexp(0) - log(k) if tighter else log_w.mean(0)
    variance = torch.stack(variances).mean(0).to(values).expand_as(values)
    if not drawn:
        return values, variance.sqrt()
    if k == 1:
        return values, torch.full_like(values, float("nan"))
    spread = (log_w - values).exp() if tighter else log_w
    return values, (spread.var(0) / k + variance).sqrt()


def _rows(rows: slice, n: int, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    cut = lambda a: a[rows] if isinstance(a, Tensor) and a.dim() and len(a) == n else a  # noqa: E731
    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}
