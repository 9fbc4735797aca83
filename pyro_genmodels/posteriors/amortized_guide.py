r"""A guide of latent variables that are shared, g, and of those of each row of data, l.

.. math:: q(g) \prod_i q(l_i \mid g,\, e(x_i))

A normalizing flow is the distribution of the shared variables, and a conditional flow that of each row's, given the shared ones
and the row's data, which an encoder e reads. All rows have the same networks, so that the guide holds for rows that it has not
seen, and the posterior of a row is its own whatever rows a subsampled plate chooses. Given g and the data the rows are
independent in such a model, so that with flows and an encoder that are flexible enough the guide can be exact.

Kingma and Welling (arXiv 1312.6114) for the encoder; Agrawal and Domke, *Amortized Variational Inference for Simple
Hierarchical Models* (arXiv 2111.03144), for shared and local variables.
"""

from __future__ import annotations

__all__ = ["AmortizedGuide"]

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_genmodels._pyro import params, traces
from pyro_genmodels._pyro.subsampling import GivenRows, fixed_rows, row_blocks
from pyro_genmodels._pyro.vectorize import can_vectorize
from pyro_genmodels.infer.autoguide import NamedGuide, check_supports, drawn_if_discrete, takes_no_arguments
from pyro_genmodels.posteriors.row_data import rows_of
from pyro_genmodels.posteriors.row_distributions import RowDistribution
from pyro_genmodels.posteriors.row_layouts import Layout, find_layouts, label
from pyro_genmodels.utils.errors import check_positive_int, listed
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, runs_models
from pyro_genmodels.utils.nested import leaves
from pyro_genmodels.utils.pareto import pareto_k

MAX_VALUES = 2**17
"""Largest number of draws times rows that are computed at once for k-hat."""


class AmortizedGuide(NamedGuide):
    """A guide with a flow over shared latent variables and a conditional flow over those of each row, given the row's data.

    Train it by `SVI` or `CompiledSVI` with `Trace_ELBO`. It is right under plates that subsample, also if the model is given
    minibatches. Shared variables take thousands of steps, with a step size that falls: with 200 groups the deviation of a mean
    was a third too small after 300 steps of `ClippedAdam`, and right after 3000, in which it fell from 0.01 to 0.0005.

    Latent variables are local if they lie in a plate that has observed sites too, and the data of its rows are known. These are
    the tensors among the arguments of the model, at any depth, whose first dimension is the number of rows of the plate, or of
    those that it chooses; in nested plates the first dimensions, in the order of the plates. The features of a row are its
    values in all of them, side by side, standardised by mean and deviation over the rows that the guide is built with. A
    missing value, NaN, becomes 0, with an indicator if its column had missing values when the guide was built. If there are no
    such arguments, the observed values of the first run are taken, in plates that do not subsample. All other latent variables
    are shared, and have one joint distribution.

    Variables of one plate have one conditional distribution; those of an inner plate are conditioned on those of the outer one
    too. Rows that a mask excludes, such as ``obs_mask``, which must be an argument of the model, are excluded in the guide too.

    Args:
        model: model with continuous latent variables, some of them in a plate with data.
        args: positional arguments of the model, to build the guide at once.
        encoder: module from the features of rows, (..., features), to what the flow is given of them, (..., any length). By
            default a network with one hidden layer of 64, plus a linear map, to 16 outputs. With several plates a dictionary by
            plate, such as ``{"schools": ..., "schools/pupils": ...}``.
        features: function of the model's arguments that returns the features, (rows, ...), instead of those above; or a tensor
            of all rows. With several plates a dictionary by plate.
        transform: layers of the flow over shared variables; see `AutoFlow`.
        local_transform: layers of the conditional flow; by default one spline for one coordinate, else four affine couplings.
            A location and a scale follow them, from a linear map plus a network.
        init_loc_fn: strategy of Pyro's for the values at which the guide starts.
        init_scale: deviation of the unconstrained variables at the start.
        model_kwargs: keyword arguments of the model, also those with the name of an option above, such as ``features``.
        kwargs: keyword arguments of the model, with any other name.

    Attributes:
        plates_with_data: names of the plates whose variables are local, the outermost first, by these names with slashes
            between, as in ``{"schools": ["schools"], "schools/pupils": ["schools", "pupils"]}``.

    Raises:
        TypeError: if neither the guide nor the model knows a keyword.
        ValueError: if a keyword can be meant for the guide or for the model; when it is built, if no latent variable is local;
            naming a plate that subsamples without known data; naming a variable that is masked by what is no argument; or as
            `AutoFamily`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y), subsample_size=10) as rows:
        ...         z = pyro.sample("z", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])
        >>> guide = AmortizedGuide(model, torch.randn(60))
        >>> guide(torch.randn(60))["z"].shape
        torch.Size([10])
        >>> guide.local_pareto_k(torch.randn(60), num_samples=100)["rows"].shape  # of each row
        torch.Size([60])
    """

    @runs_models()
    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        encoder: nn.Module | Mapping[str, nn.Module] | None = None,
        features: Any = None,
        transform: Any = None,
        local_transform: Any = None,
        init_loc_fn: Callable[[Any], Any] = init_to_median,
        init_scale: float = 0.1,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model)
        kwargs = joined_keywords(kwargs, model_kwargs)
        check_model_keywords(model, None, args, kwargs)
        if not 0 < init_scale < float("inf"):
            raise ValueError(f"AmortizedGuide wants a positive init_scale, but found {init_scale!r}.")
        self.init_loc_fn, self.init_scale = init_loc_fn, init_scale
        self.transforms = (transform, local_transform)
        self._features, self._encoders = features, (encoder,)  # a tuple, so that the encoder is not registered twice
        self._signature = inspect.signature(model)
        params.register_name(self, params.unused_name(self))
        if args or kwargs or takes_no_arguments(model):
            self._setup_prototype(*args, **kwargs)

    @property
    def plates_with_data(self) -> dict[str, list[str]]:
        """Names of the plates whose variables are local, by these names with slashes between."""
        return {label(layout.plates): [plate.name for plate in layout.plates] for layout in self._layouts if layout.plates}

    @property
    def plates_given_in_part(self) -> set[str]:
        """Names of the plates that choose rows, of which the guide is given the data of these rows only."""
        plates = [plate for layout in self._layouts for plate in layout.plates]
        return {plate.name for plate in plates if plate.chooses and plate.size < plate.full_size and not plate.has_all}

    # Building.

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        model = InitMessenger(drawn_if_discrete(self.init_loc_fn))(self.model)
        with poutine.block(), torch.no_grad(), GivenRows() as given:
            trace = poutine.trace(lambda: model(*args, **kwargs)).get_trace()
        prototype = trace.copy()
        for name in trace.nodes:
            if self._prototype_hide_fn(trace.nodes[name]):
                prototype.remove_node(name)
        check_supports(type(self).__name__, lambda: model(*args, **kwargs), prototype)
        arguments = self._leaves(args, kwargs)
        self._layouts = find_layouts(trace, prototype, given.rows, arguments, self._features, (args, kwargs))
        sites: dict[str, Any] = dict(prototype.iter_stochastic_nodes())
        first = next(iter(sites.values()))
        like = biject_to(first["fn"].support).inv(first["value"]).new_zeros(())
        for i, layout in enumerate(self._layouts):
            num_parents = sum(self._layouts[j].size for j in layout.parents)
            parts = self._parts(layout, args, kwargs, arguments)
            start = torch.cat([site.row_mean(sites[site.name]["value"]) for site in layout.sites])
            encoder = self._encoders[0]
            encoder = encoder.get(label(layout.plates)) if isinstance(encoder, Mapping) else encoder
            transform = self.transforms[bool(layout.plates)]
            block = RowDistribution(layout, parts, num_parents, start, self.init_scale, encoder, transform, like)
            setattr(self, f"block_{i}", block)
        self.prototype_trace = prototype

    def _leaves(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[tuple, Any]:
        """Return the arguments of the model, at any depth, by the names and keys that lead to them."""
        return dict(leaves(dict(self._signature.bind(*args, **kwargs).arguments)))

    def _parts(self, layout: Layout, args: tuple, kwargs: Mapping[str, Any], arguments: Mapping[tuple, Any]) -> list[Tensor]:
        """Return the tensors that hold the features of the rows of a layout."""
        if callable(layout.features):
            return [layout.features(*args, **kwargs)]
        if isinstance(layout.features, tuple):  # of paths
            return [arguments[path] for path in layout.features]
        return list(layout.features)

    # Sampling.

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the latent variables and return them by name.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        arguments = self._leaves(args, kwargs)
        parts = [self._parts(layout, args, kwargs, arguments) for layout in self._layouts]
        plates = self._plates(parts, arguments)
        result: dict[str, Tensor] = {}
        coordinates: list[Tensor] = []
        for i, layout in enumerate(self._layouts):
            block = getattr(self, f"block_{i}")
            with ExitStack() as stack:
                indices: list[Any] = [stack.enter_context(plates[plate.name]) for plate in layout.plates]
                rows = [rows_of(part, layout.plates, indices) for part in parts[i]]
                mask: Any = layout.mask_of(arguments, indices)
                if mask is not None:
                    stack.enter_context(poutine.mask(mask=mask))
                distribution = block(rows, [coordinates[j] for j in layout.parents])
                name = f"_{params.pyro_name(self)}_{label(layout.plates) or 'shared'}_{i}"
                z = pyro.sample(name, distribution, infer={"is_auxiliary": True})
                coordinates.append(block.standardized(z))
                for site, u in zip(layout.sites, z.split([site.size for site in layout.sites], -1), strict=True):
                    with ExitStack() as inner:
                        for other in site.others:
                            inner.enter_context(plates[other.name])
                        result[site.name] = pyro.sample(site.name, site.delta(u))
        return result

    def _plates(self, parts: Sequence[Sequence[Tensor]], arguments: Mapping[tuple, Any]) -> dict[str, pyro.plate]:
        """Return the plates by name, with as many rows as the features have.

        Raises:
            ValueError: if features of one plate have different numbers of rows.
        """
        plates: dict[str, pyro.plate] = {}
        for layout, tensors in zip(self._layouts, parts, strict=True):
            for axis, plate in enumerate(layout.plates):
                numbers = {part.shape[axis] if part.dim() > axis else 0 for part in tensors}
                if len(numbers) > 1 and not plate.chooses and plate.given is None:
                    raise ValueError(f"The features of plate {plate.name!r} have different numbers of rows, {sorted(numbers)}.")
                if plate.name not in plates:
                    plates[plate.name] = plate.build(max(numbers), arguments)
        for layout in self._layouts:
            for site in layout.sites:
                for other in site.others:
                    if other.name not in plates:
                        plates[other.name] = pyro.plate(other.name, other.size, dim=other.dim)
        return plates

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return draws of the latent variables, (num_samples, ...) by name, of the rows that one run sees.

        Args:
            num_samples: number of draws.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        check_positive_int("sample_posterior", num_samples=num_samples)
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        sites = [site for layout in self._layouts for site in layout.sites]
        nesting = max([0, *(len(site.batch_shape) for site in sites)])
        with poutine.block(), traces.particles(num_samples, nesting):
            values = self(*args, **kwargs)
        depths = {site.name: len(site.batch_shape) + site.event_dim for site in sites}
        return {
            name: x.expand(num_samples, *x.shape[1:]).reshape(num_samples, *x.shape[x.dim() - depths[name] :])
            for name, x in values.items()
        }

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of 1000 draws of each latent variable, coordinate by coordinate, (quantiles, ...) by name.

        Args:
            quantiles: probabilities.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        draws = self.sample_posterior(1000, *args, **kwargs)
        return {name: x.quantile(torch.as_tensor(quantiles).to(x), dim=0) for name, x in draws.items()}

    @runs_models()
    @torch.no_grad()
    def local_pareto_k(
        self, *args: Any, num_samples: int = 1000, model_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        r"""Return k-hat of each row: how well the guide fits the row's latent variables, given the shared ones.

        It is that of the weights :math:`p(x_i, l_i \mid g) / q(l_i \mid g, x_i)` with g and l from the guide. Variables
        of inner plates count for their outer row. Below 0.7, weights of draws can correct for the guide. Plates that subsample
        are walked through, so that all rows have one.

        Args:
            args: positional arguments of the model.
            num_samples: number of draws.
            model_kwargs: keyword arguments of the model, also one called ``num_samples``.
            kwargs: keyword arguments of the model, with any other name.

        Returns:
            k-hat, (rows...), by the keys of `plates_with_data`; NaN for rows that a mask excludes.

        Raises:
            ValueError: if the model has latent variables that the guide lacks, such as enumerated ones.
        """
        check_positive_int("local_pareto_k", num_samples=num_samples)
        kwargs = joined_keywords(kwargs, model_kwargs)
        check_model_keywords(self.model, None, args, kwargs)
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        nesting = traces.max_plate_nesting(self.model, self, args, kwargs)
        local = {label(layout.plates): layout.plates for layout in self._layouts if layout.plates}
        found: dict[str, Tensor] = {}
        together: bool | None = None
        for indices in self._row_blocks():
            with poutine.block(), fixed_rows(indices):
                if together is None:
                    together = can_vectorize(self.model, self, args, kwargs, nesting)
                log_weights = self._log_weights(args, kwargs, num_samples, nesting, together=together)
            for name, plates in local.items():
                k = pareto_k(log_weights[name]).masked_fill((log_weights[name] == 0).all(0), torch.nan)
                rows = [indices.get(plate.name, torch.arange(n)) for plate, n in zip(plates, k.shape, strict=True)]
                sizes = [p.full_size if p.name in indices else n for p, n in zip(plates, k.shape, strict=True)]
                found.setdefault(name, k.new_full(sizes, torch.nan))[torch.meshgrid(*rows, indexing="ij")] = k
        return found

    def _row_blocks(self) -> Iterator[dict[str, Tensor]]:
        """Yield blocks of rows of the plates that choose rows among all, {name: indices}, which together are all rows."""
        chosen = {plate.name: plate for layout in self._layouts for plate in layout.plates if plate.has_all}
        blocks = [[block.indices for block in row_blocks(plate.full_size, plate.size)] for plate in chosen.values()]
        for indices in product(*blocks):
            yield dict(zip(chosen, indices, strict=True))

    def _log_weights(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        num_samples: int,
        nesting: int,
        together: bool,  # noqa: FBT001
    ) -> dict[str, Tensor]:
        """Return log weights of the rows that a run sees, (draw, rows...), by the names of the plates."""
        parts: list[dict[str, Tensor]] = []
        number, done = 1, 0
        while done < num_samples:
            plate = traces.particles(number, nesting) if together else None
            parts.append(self._weights_of(traces.run_pair(self.model, self, args, kwargs, plate), nesting, number))
            done += number
            if together:
                at_once = max(1, MAX_VALUES // max(x.numel() // len(x) for x in parts[0].values()))
                number = min(at_once, num_samples - done)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _weights_of(self, pair: tuple[Trace, Trace], nesting: int, number: int) -> dict[str, Tensor]:
        """Return log weights, (draw, rows...), of the traces of model and guide."""
        missing = [name for name in traces.latents(pair[0]) if name not in pair[1].nodes]
        if missing:
            raise ValueError(
                f"local_pareto_k wants a guide of all latent variables, but it lacks {listed(missing)}. Sum these out in the "
                "model, as dist.MixtureSameFamily does, to have weights."
            )
        found = {}
        for layout in self._layouts:
            if not layout.plates:
                continue
            names = {plate.name for plate in layout.plates}
            dims = (-nesting - 1, *(plate.dim for plate in layout.plates))
            totals = []
            for trace in pair:
                total: Any = 0.0
                for site in traces.sample_sites(trace).values():
                    if names <= {frame.name for frame in site["cond_indep_stack"]}:
                        log_p = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
                        total = total + traces.sum_to_dims(log_p, dims)
                totals.append(total)
            weights = (totals[0] - totals[1]).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            found[label(layout.plates)] = weights.expand(number, *weights.shape[1:])
        return found
