r"""From a fit to ArviZ: the only file that imports arviz.

Draw :math:`s` of the posterior carries :math:`\log p(x, z_s)`, :math:`\log q(z_s)` and their difference, the log weight that
Pareto-smoothed importance sampling starts from (Yao et al., *Yes, but Did It Work?*, arXiv 1802.02538), and with
:math:`\log p(x_n \mid z_s)` of every row what leave-one-out cross-validation needs (Vehtari et al., arXiv 1507.04544).
"""

from __future__ import annotations

__all__ = ["to_arviz"]

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro

from pyro_genmodels._pyro import handlers, params, traces
from pyro_genmodels.inference_data.groups import GROUPS, Groups, collect, in_chains
from pyro_genmodels.inference_data.sources import check_apart, source_of

if TYPE_CHECKING:
    import arviz


def to_arviz(
    fit: Any,
    *args: Any,
    num_samples: int | None = None,
    batch_size: int = 100,
    groups: Collection[str] = GROUPS,
    model: Callable[..., Any] | None = None,
    parallel: bool | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> arviz.InferenceData:
    """What a fit says, as ArviZ data.

    Groups, each where it has something to say:

    - ``posterior``: draws of the latent variables, and of `pyro.deterministic`;
    - ``posterior_predictive``: draws of what the model observes;
    - ``prior``, ``prior_predictive``: draws of the model without guide and data;
    - ``log_likelihood``: of each observed value under each draw, in nats, without any scale; a masked value has 0. Where the
      density is itself a lower bound (`Dequantized`), the attribute ``kind`` of the variable says so. A model without latent
      variables has none: its parameters have seen the data, and the leave-one-out of ArviZ would not know; see
      `log_likelihood`;
    - ``log_prior``: of each latent variable;
    - ``sample_stats``: of each draw ``log_p``, the joint density of latent variables and data, and (unless the guide is a
      point mass) ``log_q`` and ``log_weight`` = log_p - log_q, in nats; of MCMC ``diverging``;
    - ``observed_data``; ``constant_data``, the tensors among the model's arguments that it does not observe.

    Dimensions are (chain, draw), then plates by their names, then the event's. Plates that the model subsamples are walked
    through: all rows appear, and log_p and log_q are those of all rows. In a minibatch of a family (``size=``) they are scaled
    estimates.

    Args:
        fit: a family, an `SVI` or a pair (model, guide); an `MCMC` run; a run of `Importance` or the result of
            `WeighedPredictive`, whose draws stand with their weights, not resampled; `Chains`; `WeightedDraws`, whose weights
            are in ``sample_stats``; draws by name, (chain, draw, ...); or a list of these, whose chains are put together. The
            fits of a list must have parameters of their own; that their chains agree says little unless they started apart
            (`init_to_sample`).
        args: the model's own arguments. A family called without data gives draws of x, and of its latent variables
            from their prior, as ``posterior_predictive`` and ``posterior``.
        num_samples: draws, 1000 by default; of a run that has its own draws, all of them.
        batch_size: draws made at once, which bounds memory.
        groups: those wanted.
        model: of draws that do not bring one (plain draws, `WeighedPredictive`); without it these have a ``posterior`` only.
        parallel: whether draws are made together in one run, which a model must allow (no ``z[0]`` or ``z.sum()``); None tries
            out whether it does.
        coords: labels of dimensions.
        dims: names of the event dimensions of a variable, by its name.
        progress: whether a progress bar is shown after two seconds.
        kwargs: the model's own keyword arguments.

    Raises:
        ValueError: on counts that are not positive, unknown groups, fits that share parameters, and draws of shapes that do not
            go together.

    Warns:
        UserWarning: naming each group and variable that cannot be computed, and why.

    Example:
        >>> from pyro_genmodels import Flow
        >>> to_arviz(Flow((2,)), num_samples=50).posterior_predictive.sizes["draw"]
        50
    """
    if (num_samples is not None and num_samples < 1) or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be positive, got {num_samples} and {batch_size}.")
    if unknown := [group for group in groups if group not in GROUPS]:
        raise ValueError(f"Unknown groups {', '.join(map(repr, unknown))}: known are {', '.join(GROUPS)}.")
    options = {"batch_size": batch_size, "wanted": set(groups), "parallel": parallel, "dims": dims or {}, "progress": progress}
    fits = fit if isinstance(fit, list) else [fit]
    if not fits:
        raise ValueError("to_arviz wants at least one fit, but found an empty list.")
    sources = [source_of(one, args, kwargs, num_samples, model) for one in fits]
    if len(sources) > 1:
        check_apart(sources)
    reports: dict[str, str] = {}
    parts = []
    for source in sources:
        modules = traces.modules_of(source.model, source.guide)
        with handlers.side_effect_free(), params.isolated_param_store(modules) if len(sources) > 1 else nullcontext():
            parts.append(collect(source, reports, **options))
    if reports:
        left = "; ".join(f"{what} ({why})" for what, why in reports.items())
        warnings.warn(f"to_arviz leaves out: {left}.", UserWarning, stacklevel=2)
    return _inference_data(in_chains(parts), coords or {})


def _inference_data(groups: Groups, coords: Mapping[str, Sequence[Any]]) -> arviz.InferenceData:
    import arviz as az
    import xarray as xr

    attrs = {
        "created_at": datetime.now(UTC).isoformat(),
        "inference_library": "pyro-ppl",
        "inference_library_version": pyro.__version__,
        "creation_library": "pyro_genmodels",
        "creation_library_version": version("pyro-genmodels"),
    }
    labels = {**groups.coords, **coords}
    datasets: dict[str, Any] = {}
    for group in (group for group in GROUPS if group in groups.variables):
        variables = {}
        for name, (array, names) in groups.variables[group].items():
            kind = {"kind": groups.kinds[name]} if group == "log_likelihood" and name in groups.kinds else {}
            name, names = name.replace("/", "."), [dim.replace("/", ".") for dim in names]  # xarray's trees have paths
            own = {dim: labels.get(dim, np.arange(size)) for dim, size in zip(names, array.shape, strict=True)}
            variables[name] = xr.DataArray(array, own, names, attrs=kind)
        datasets[group] = xr.Dataset(variables, attrs=attrs)
    if int(az.__version__.split(".")[0]) == 0:
        return az.InferenceData(**datasets)
    return xr.DataTree.from_dict(datasets)  # type: ignore[return-value]
