r"""Diagnosis of the latent variables of a variational autoencoder: rate, distortion, information and coordinates in use.

.. math:: -\mathrm{ELBO} = \underbrace{\mathbb{E}[-\log p(x \mid z)]}_\text{distortion}
    + \underbrace{\mathbb{E}\,\mathrm{KL}(q(z \mid x) \| p(z))}_\text{rate}, \qquad
    \text{rate} = I(x; z) + \mathrm{KL}(q(z) \| p(z)), \quad q(z) = \frac1N \sum_n q(z \mid x_n) .

A coordinate that the decoder does not read is pulled to the prior: its divergence is 0 and its mean is the same for all data
(posterior collapse). It is called active if the variance of its mean over the data is above 0.01.

Burda et al. (arXiv 1509.00519, active units); Hoffman and Johnson, *ELBO Surgery* (2016); Alemi et al., *Fixing a Broken ELBO*
(arXiv 1711.00464).
"""

from __future__ import annotations

__all__ = ["VAEDiagnosis", "diagnose_vae"]

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels._pyro.site_pairs import in_one_order, site_divergence
from pyro_genmodels.evaluation.arguments import RowArguments, row_arguments
from pyro_genmodels.utils.errors import check_positive_int, import_extra, listed
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, runs_models
from pyro_genmodels.utils.rng import forked_rng

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_ACTIVITY = 0.01
"""Variance of the mean of a coordinate over the data from which it is called active."""
MAX_INFORMED_ROWS = 2_000
"""Number of rows among which the mutual information is estimated, since its cost grows with their square."""
SHOWN = 8
"""Number of rows that are reconstructed, and of coordinates that are traversed."""
STEPS = 9
"""Number of values of a coordinate in a traversal."""


@dataclass(frozen=True, repr=False)
class VAEDiagnosis:
    """Rate, distortion, information and activity of the latent variables of a fit.

    Attributes:
        kl: mean divergence of each coordinate over the data, in nats, by the name of the variable: of the variable's shape, or
            () where coordinates are not independent in guide and model.
        activity: variance over the data of the mean of each coordinate, by name, of the variable's shape; of codes that are
            integers the variance of their numbers, which is 0 if a coordinate has one code for all data.
        activity_error: its standard error by the choice of draws, by name, 0 where means are exact.
        rate: divergence of all variables, in nats per datum.
        distortion: mean of -log p(x | z), in nats per datum.
        mutual_information: information in nats that z has about which of the first N rows was encoded, at most log N, for an N
            of at most 2,000; None if there are several latent variables.
        num_rows: number of rows.
        data: the first rows, (rows, ...).
        reconstructions: means of p(x | z) for a draw of z of each of them; of 100 draws of x where p knows no mean.
        traversals: means of p(x | z) where one coordinate of the first row's z goes through the values it has in the data, from
            3 standard deviations below the mean to 3 above, (coordinates, values, ...), for the coordinates of the largest
            divergence; None if the fit has no `decode`, or several latent variables, or its latent variables are integers.
    """

    kl: Mapping[str, Tensor]
    activity: Mapping[str, Tensor]
    activity_error: Mapping[str, Tensor]
    rate: float
    distortion: float
    mutual_information: float | None
    num_rows: int
    data: Tensor
    reconstructions: Tensor
    traversals: Tensor | None

    @property
    def elbo(self) -> float:
        """The evidence lower bound in nats per datum."""
        return -self.rate - self.distortion

    @property
    def active(self) -> dict[str, Tensor]:
        """True for each coordinate whose activity is above 0.01 by more than three standard errors, by the variable's name."""
        return {name: v > MIN_ACTIVITY + 3 * self.activity_error[name] for name, v in self.activity.items()}

    @property
    def inactive(self) -> dict[str, list[int]]:
        """Indices of the coordinates (flattened) that are not active, by the name of the variable."""
        return {name: (~is_active).flatten().nonzero()[:, 0].tolist() for name, is_active in self.active.items()}

    def __repr__(self) -> str:
        return f"<{'; '.join(str(self).splitlines())}>"

    def __str__(self) -> str:
        lines = [
            f"bound {self.elbo:.2f} nats per datum: distortion {self.distortion:.2f}, rate {self.rate:.2f} (n={self.num_rows})"
        ]
        if self.mutual_information is not None:
            rest = self.rate - self.mutual_information
            lines.append(f"of the rate, {self.mutual_information:.2f} are information, and {rest:.2f} distance from the prior")
        for name, is_active in self.active.items():
            dead = self.inactive[name]
            which = f"; inactive: {', '.join(map(str, dead[:20]))}{', ...' if len(dead) > 20 else ''}" if dead else ""
            lines.append(f"{name}: {int(is_active.sum())} of {is_active.numel()} coordinates active{which}")
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Plot the divergence of each coordinate and, of images, reconstructions and traversals.

        Raises:
            ImportError: if matplotlib, of the extra ``eval``, is missing.
        """
        plt = import_extra("matplotlib.pyplot", extra="eval", by="VAEDiagnosis.plot")
        images = _as_images(self.data) is not None
        grids = {"data, and their reconstructions": torch.cat([self.data, self.reconstructions])} if images else {}
        if images and self.traversals is not None:
            grids["a coordinate in each row, from low to high"] = self.traversals.flatten(0, 1)
        size = (4 * (1 + len(grids)), 3.6)
        figure, axes = plt.subplots(1, 1 + len(grids), squeeze=False, figsize=size, layout="constrained")
        axes = axes[0]
        values = torch.cat([kl.flatten() for kl in self.kl.values()]).sort(descending=True).values
        axes[0].bar(range(len(values)), values.cpu().numpy())
        axes[0].set(xlabel="coordinate, by rank", ylabel="divergence (nats)", title=f"rate {self.rate:.1f} nats")
        for ax, (title, panel), columns in zip(axes[1:], grids.items(), (len(self.data), STEPS), strict=False):
            tiles: Any = _as_images(panel)
            rows = tiles.unflatten(0, (-1, columns)).transpose(1, 2)
            ax.imshow(rows.flatten(2).flatten(0, 1).cpu().numpy(), cmap="gray_r", interpolation="nearest")
            ax.set_title(title)
            ax.set_axis_off()
        return figure


def _as_images(x: Tensor) -> Tensor | None:
    """Return events of two dimensions, or of three with a first one of 1, as images (n, height, width), and None for others."""
    if x.dim() == 4 and x.shape[1] == 1:
        return x[:, 0]
    return x if x.dim() == 3 else None


@runs_models()
def diagnose_vae(
    fit: Any,
    x: Any,
    *args: Any,
    num_samples: int = 16,
    batch_size: int = 2_000,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> VAEDiagnosis:
    """Diagnose the latent variables of a variational autoencoder, or of any fit with latent variables of rows.

    The fit's modules run in evaluation mode, and their mode is restored afterwards.

    Args:
        fit: family, `SVI`, or pair (model, guide), with latent variables in the plate of the rows.
        x: rows, (N, *event_shape).
        args: other arguments of the model; those with N rows are cut along with x.
        num_samples: number of draws of the latent variables for each row.
        batch_size: largest number of rows in one run.
        model_kwargs: keyword arguments of the model whose names are also options of this function.
        kwargs: other keyword arguments of the model.

    Raises:
        ValueError: if a latent variable is not in the plate of the rows, or there is none.

    Example:
        >>> from pyro_genmodels import VAE
        >>> from pyro_genmodels.evaluation import diagnose_vae
        >>> diagnosis = diagnose_vae(VAE((4,), latent_dim=3), torch.randn(50, 4))
        >>> diagnosis.kl["z"].shape, diagnosis.active["z"].shape, diagnosis.reconstructions.shape
        (torch.Size([3]), torch.Size([3]), torch.Size([8, 4]))
    """
    model, guide = traces.as_pair(fit)
    check_positive_int("diagnose_vae", num_samples=num_samples, batch_size=batch_size)
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_model_keywords(model, guide, (x, *args), kwargs)
    data = row_arguments("diagnose_vae", x, args, kwargs, model=model)
    with torch.no_grad(), handlers.side_effect_free(model, guide):
        runs = [_RowsDiagnosis.of(model, guide, rows, num_samples) for rows in data.batches(batch_size)]
        whole = _RowsDiagnosis.joined(runs)
        information = _mutual_information(model, guide, data.first(MAX_INFORMED_ROWS), whole)
        first = data.first(SHOWN)
        with forked_rng(0):  # two calls show the same, also of distributions that know no mean
            traversals = _traversals(fit, first.first(1), whole) if hasattr(fit, "decode") and len(whole.kl) == 1 else None
            reconstructions = _reconstructions(model, guide, first)
    kl = {name: values.mean(0) for name, values in whole.kl.items()}
    return VAEDiagnosis(
        kl=kl,
        activity=whole.activity(),
        activity_error={name: (2 / max(data.num_rows - 1, 1)) ** 0.5 * error.mean(0) for name, error in whole.error.items()},
        rate=sum(float(values.sum()) for values in kl.values()),
        distortion=float(whole.distortion.mean()),
        mutual_information=information,
        num_rows=data.num_rows,
        data=first.args[0],
        reconstructions=reconstructions,
        traversals=traversals,
    )


@dataclass(frozen=True)
class _RowsDiagnosis:
    """Means over draws, for each row.

    Attributes:
        kl: divergences, (rows, coordinates...) or (rows), by name.
        mean: means of the guide, (rows, ...), by name.
        error: variances of these means by the choice of draws, of their shape, 0 where they are exact.
        distortion: -log p(x | z), (rows).
    """

    kl: dict[str, Tensor]
    mean: dict[str, Tensor]
    error: dict[str, Tensor]
    distortion: Tensor

    @classmethod
    def of(cls, model: Any, guide: Any, rows: RowArguments, num_samples: int) -> _RowsDiagnosis:
        """Run guide and model on rows, and return the means over runs."""
        runs: list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]] = []
        for _ in range(num_samples):
            model_trace, guide_trace = _run(model, guide, rows)
            names, ordered = traces.latents(model_trace), in_one_order(model_trace, guide_trace)
            sites = [(name, model_trace.nodes[name], guide_trace.nodes[name]) for name in names]
            kl = {name: site_divergence(p, q, may_be_exact=ordered) for name, p, q in sites}
            means = {name: _mean_of(q) for name, _, q in sites}
            seen = model_trace.copy()
            for name in names:
                seen.remove_node(name)
            dims = tuple(traces.data_plates(model_trace, rows.num_rows).values())
            runs.append((kl, means, -traces.log_prob(seen, dims, scaled=False).flatten()))
        names = list(runs[0][0])
        means = {name: torch.stack([run[1][name] for run in runs]) for name in names}
        error = {name: (m.var(0) / len(m) if len(m) > 1 else torch.zeros_like(m[0])) for name, m in means.items()}
        return cls(
            {name: torch.stack([run[0][name] for run in runs]).mean(0) for name in names},
            {name: m.mean(0) for name, m in means.items()},
            error,
            torch.stack([run[2] for run in runs]).mean(0),
        )

    @classmethod
    def joined(cls, parts: list[_RowsDiagnosis]) -> _RowsDiagnosis:
        """Return the means of the rows of all parts."""
        kl, mean, error = (
            {name: torch.cat([getattr(part, field)[name] for part in parts]) for name in parts[0].kl}
            for field in ("kl", "mean", "error")
        )
        return cls(kl, mean, error, torch.cat([part.distortion for part in parts]))

    def activity(self) -> dict[str, Tensor]:
        """Return the variance over rows of the mean of each coordinate, less what the choice of draws adds to it."""
        return {
            name: (m.var(0) - self.error[name].mean(0)).clamp(min=0) if len(m) > 1 else torch.zeros_like(m[0])
            for name, m in self.mean.items()
        }


def _run(model: Any, guide: Any, rows: RowArguments) -> tuple[Any, Any]:
    """Return the traces of model and guide on rows.

    Raises:
        ValueError: if a latent variable is not in the plate of the rows, or there is none.
    """
    model_trace, guide_trace = traces.run_pair(model, guide, rows.args, rows.kwargs)
    names = traces.latents(model_trace)
    if missing := [name for name in names if name not in guide_trace.nodes]:
        raise ValueError(f"diagnose_vae wants a guide for every latent variable, but the guide has none for {listed(missing)}.")
    plates = traces.data_plates(model_trace, rows.num_rows)
    outside = [
        name for name in names if not set(plates) <= {frame.name for frame in model_trace.nodes[name]["cond_indep_stack"]}
    ]
    if outside or not names or len(plates) != 1:
        raise ValueError(
            "diagnose_vae wants latent variables in the plate of the rows, as those of a VAE, but found "
            f"{listed(outside) if outside else listed(names) or 'none'} in {'another one' if names else 'the model'}. Use "
            "diagnose_posterior for variables that all rows share."
        )
    return model_trace, guide_trace


def _mean_of(site: Any) -> Tensor:
    """Return the mean of a guide's distribution, or its draw if it knows none."""
    mean = _known_mean(site["fn"])
    mean = site["value"] if mean is None else mean
    mean = mean if mean.is_floating_point() else mean.to(torch.get_default_dtype())  # codes are integers
    return mean.expand(site["value"].shape)


def _known_mean(fn: Any) -> Any:
    """Return the mean of a distribution, or None if it knows none."""
    try:
        return fn.mean
    except (NotImplementedError, AttributeError):
        return None


def _mutual_information(model: Any, guide: Any, rows: RowArguments, whole: _RowsDiagnosis) -> float | None:
    """Return the mean of log q(z | x) - log q(z), with q(z) the average over the rows, if there is one latent variable."""
    if len(whole.kl) != 1:
        return None
    (name,) = whole.kl
    _, guide_trace = _run(model, guide, rows)
    site: Any = guide_trace.nodes[name]
    fn, z, n = site["fn"], site["value"], rows.num_rows
    own = fn.log_prob(z)
    average = torch.cat([fn.log_prob(part.unsqueeze(1)).logsumexp(1) - log(n) for part in z.split(100)])
    return float((own - average).mean())


def _reconstructions(model: Any, guide: Any, rows: RowArguments) -> Tensor:
    """Return means of p(x | z), (rows, ...), for a draw of z of each row."""
    model_trace, _ = _run(model, guide, rows)
    x = rows.args[0]
    sites: Any = traces.sample_sites(model_trace)
    found = [name for name in traces.observed(model_trace) if sites[name]["value"].shape == x.shape]
    return _expected(sites[found[0]]["fn"]) if found else x.new_zeros((len(x), 0))


def _expected(fn: Any, num_samples: int = 100) -> Tensor:
    """Return the mean of a distribution, or that of draws where it knows none: torch has NaN as the mean of classes."""
    mean = _known_mean(fn)
    if mean is not None and not mean.isnan().any():
        return mean
    drawn = fn.sample((num_samples,)).to(torch.get_default_dtype()).mean(0)
    return drawn if mean is None else torch.where(mean.isnan(), drawn, mean)


def _traversals(fit: Any, row: RowArguments, whole: _RowsDiagnosis) -> Tensor | None:
    """Return means of p(x | z) for values of one coordinate of the first row's z at a time, (coordinates, values, ...).

    Integers have no values in between: for them the result is None.
    """
    (name,) = list(whole.mean)[:1]
    guided: Any = _run(fit.model, fit.guide, row)[1].nodes[name]
    if not guided["value"].is_floating_point():
        return None
    means, shape = whole.mean[name].flatten(1), whole.mean[name].shape[1:]
    order = means.var(0) if whole.kl[name].dim() == 1 else whole.kl[name].mean(0).flatten()
    deviations = torch.linspace(-3, 3, STEPS, dtype=means.dtype, device=means.device)
    rows = []
    for j in order.argsort(descending=True)[:SHOWN]:
        z = means[0].expand(STEPS, -1).clone()
        z[:, j] = means[:, j].mean() + deviations * means[:, j].std()
        context = [c.expand(STEPS, *c.shape[1:]) for c in (*row.args[1:], row.kwargs.get("context")) if isinstance(c, Tensor)]
        rows.append(_expected(fit.decode(z.reshape(STEPS, *shape), *context)))
    return torch.stack(rows)
