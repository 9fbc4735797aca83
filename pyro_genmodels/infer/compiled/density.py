r"""The log density of a model's continuous latent variables as a function of one unconstrained vector, with its gradient.

Each latent variable x is the image of unconstrained numbers u under a smooth bijection T onto its support. All of them, one
after another, are the vector u. Its density is

.. math:: \log \pi(u) = \log p(y, T(u)) + \log \left|\det \frac{\partial T(u)}{\partial u}\right|,

with discrete latent variables summed out. This is minus the potential energy of Pyro's HMC and NUTS. Running the model costs
far more than this arithmetic, so the function is captured as a graph once.

Carpenter et al., *Stan: A Probabilistic Programming Language* (2017), section 5, for the change of variables.
"""

from __future__ import annotations

__all__ = ["LogDensity", "log_density"]

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_genmodels._pyro.messages import is_own, text_of
from pyro_genmodels._pyro.plates import plates_around
from pyro_genmodels._pyro.sites import is_deterministic
from pyro_genmodels.infer.compiled.captured_density import CapturedDensity
from pyro_genmodels.infer.compiled.coordinates import Coordinates
from pyro_genmodels.infer.compiled.initial import (
    as_strategy,
    as_values,
    flat_coordinates,
    never_without,
    off_modes,
    within_precision,
)
from pyro_genmodels.infer.compiled.modes import Mode, check_mode, default_mode
from pyro_genmodels.infer.compiled.prototypes import first_runs
from pyro_genmodels.infer.compiled.recorder import StaleGraphError
from pyro_genmodels.utils.errors import check_positive_int, listed, one_line, type_with_article
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, runs_models

MAX_TRIES = 100
"""Largest number of initial points tried for each one wanted, as in Pyro."""


@runs_models()
def log_density(
    model: Callable[..., Any],
    *args: Any,
    mode: Mode | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> LogDensity:
    """Return the log density of a model's latent variables, given its data, as a function of one unconstrained vector.

    It can be given to Pyro's `NUTS` and `HMC` as ``potential_fn``, and to any other sampler or optimiser. `CompiledNUTS`
    samples from it.

    Discrete latent variables are summed out, as Pyro's NUTS does. Parameters of the model are constants. Handlers around a call
    have no effect, as around Pyro's `MCMC`, and plates are refused. Put them around the model.

    Tensors, as of data and parameters, are read at each call, so a change in place counts. A tensor or a number that is bound
    anew to a name in the model is seen too, and the model is captured again. Other changes are not seen: a number that the
    model computes by Python, such as ``float(array[0])``, is the one of the capture. Build the log density again after such a
    change. A call is not compared with the model; `LogDensity.audit` does that, and `CompiledNUTS` asks it at the start and
    the last draw of each chain.

    The model computes in its own dtype: coordinates in float64 of a model in float32 have the precision of float32. Optimisers
    such as L-BFGS want more. Call ``torch.set_default_dtype(torch.float64)`` before the model and its data are made.

    Args:
        model: function with Pyro statements.
        args: positional arguments of the model.
        mode: how the model is captured, such as `Compiled()`; `Eager()` runs it anew at each call. None chooses.
        model_kwargs: keyword arguments of the model, also one called ``mode``.
        kwargs: keyword arguments of the model.

    Raises:
        TypeError: if the mode is not one.
        ValueError: naming a plate that subsamples, a discrete variable that cannot be enumerated, or a variable whose support
            or shape depends on other variables; or a plate around the call.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.Exponential(1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> from pyro_genmodels.infer.compiled.modes import Eager
        >>> density = log_density(model, torch.tensor([0.5, -1.0]), mode=Eager())
        >>> value, gradient = density(torch.zeros(1))
        >>> print(f"{value:.4f} {gradient.item():.4f}")
        -3.4629 -0.7500
        >>> density.constrain(torch.zeros(1))
        {'scale': tensor(1.)}

    Pyro's own sampler, over the captured graph:
        >>> from pyro.infer import MCMC, NUTS
        >>> kernel = NUTS(potential_fn=density.potential_fn, transforms=density.transforms)
        >>> initial_params = density.unflatten(density.initial_points()[0])
        >>> mcmc = MCMC(kernel, num_samples=3, warmup_steps=3, initial_params=initial_params, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["scale"].shape
        torch.Size([3])
    """
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_model_keywords(model, None, args, kwargs)
    return LogDensity(model, args, kwargs, mode)


class LogDensity(Coordinates):
    """A log density over one unconstrained vector, with its gradient and the maps from and to a model's variables.

    See `Coordinates` for the maps and for further attributes.

    Attributes:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        observed: for each observed site, a `pyro.factor` too, how far apart numbers of the variables' dtype are near its data,
            in standard errors of their mean. If it is empty, this is the density of the prior.

    Args:
        model: function with Pyro statements.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        mode: how the model is captured; None chooses.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple = (), kwargs: Mapping[str, Any] | None = None, mode: Mode | None = None
    ) -> None:
        check_mode("log_density", mode)
        self.model, self.args, self.kwargs, self.mode = model, tuple(args), dict(kwargs or {}), mode
        prototype = first_runs(self._run)
        super().__init__(prototype.transforms, prototype.values)
        self._potential, self._enumerated = prototype.potential, prototype.enumerated
        self._supports, self._others = prototype.supports, prototype.others
        self.observed = dict(prototype.observed)
        self._event_shapes = {name: value.shape for name, value in prototype.values.items()}
        self._flat: Tensor | None = None  # 1 for each coordinate that the model says nothing about
        self._slope: Tensor | None = None  # its gradient there
        self._example = self.unconstrain(prototype.values)
        self._captured: dict[tuple[torch.dtype, int], CapturedDensity] = {}

    def __repr__(self) -> str:
        """Return the number of coordinates and the name and shape of each variable."""
        return f"LogDensity of {self.dim} coordinates: {listed(f'{name} {tuple(x)}' for name, x in self.shapes.items())}"

    def __call__(self, z: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the log density in nats, (), and its gradient, (dim,), both in the dtype of z and without a graph of autograd.

        Both are NaN where a decomposition of a matrix fails.

        The first call captures the model as a graph, and so does the first one after something that the model uses was
        replaced by another object.

        Args:
            z: unconstrained coordinates, (dim,), of any dtype of floats; an array of numpy counts as a tensor. Each variable is
                converted to its own dtype, whose precision the results then have.

        Raises:
            ValueError: if z has another shape, or is no tensor of floats.
            CaptureError: if the model cannot be captured as a graph.
        """
        z = torch.from_numpy(z) if isinstance(z, np.ndarray) and z.dtype.kind == "f" else z
        if not isinstance(z, Tensor) or z.shape != (self.dim,) or not z.is_floating_point():
            raise ValueError(
                f"A log density of {self.dim} coordinates wants a tensor of floats, ({self.dim},), but found {_described(z)}."
            )
        value, gradient = self.captured(self._example.to(z.dtype))(z)
        return value, gradient

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without captured graphs."""
        return vars(self) | {"_captured": {}}

    def captured(self, z: Tensor) -> CapturedDensity:
        """Return the function that `capture` returned before for coordinates of this dtype, or does now.

        It is captured again if something that the model uses was replaced by another object, or if torch uses another number of
        threads, which is fixed in compiled code.

        Args:
            z: coordinates at which the model can run, (dim,).

        Raises:
            CaptureError: if the model cannot be captured as a graph.
        """
        key = z.dtype, torch.get_num_threads()
        found = self._captured.get(key)
        if found is None or found.changed():
            found = self._captured[key] = self.capture(z)
        return found

    def capture(self, z: Tensor) -> CapturedDensity:
        """Return a function from coordinates like z to the log density and its gradient, captured now.

        Args:
            z: coordinates at which the model can run, (dim,).

        Raises:
            CaptureError: if the model cannot be captured as a graph.
        """
        return CapturedDensity(self, z, self.mode or default_mode())

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density and its gradient as a call does, by running the model."""
        with poutine.block(), torch.inference_mode(False), torch.enable_grad():
            z = (z.clone() if z.is_inference() else z.detach()).requires_grad_()
            value = self.value(z)
            if not value.requires_grad:  # no variable has a density
                return value, torch.zeros_like(z)
            (gradient,) = torch.autograd.grad(value, z, materialize_grads=True)
        return value.detach(), gradient

    def value(self, z: Tensor) -> Tensor:
        """Return the log density at z, (), by running the model. It is differentiable."""
        with pyro.validation_enabled(is_validate=False):
            value = -self._potential(self.unflatten(z)).to(z.dtype)
        if self._flat is None or self._slope is None:
            return value
        return value - (self._slope.to(z.dtype) * z + 0.5 * self._flat.to(z.dtype) * z.square()).sum()

    def audit(self, function: Callable[[Tensor], Sequence[Tensor]], points: Tensor) -> None:
        """Compare a captured function with the model.

        Args:
            function: see `capture`.
            points: coordinates, (n, dim).

        Raises:
            StaleGraphError: if value or gradient differ by more than rounding.
        """
        tolerance = max(torch.finfo(dtype).eps for dtype in {*self._dtypes.values(), points.dtype}) ** 0.5
        for z in points:
            for name, found, wanted in zip(("value", "gradient"), function(z), self.evaluate(z), strict=True):
                difference = (found - wanted).abs().max() / (1 + wanted.abs().max())
                if difference > tolerance or bool(difference.isnan()):
                    raise StaleGraphError(
                        f"The {name} of the captured log density differs from the model's by {difference:.2g}, relative to its "
                        "size. The model uses what changes from run to run, such as random numbers of Python, a counter, or a "
                        "number of Python that was changed since the capture."
                    )

    def prepare_starts(self, starts: Tensor) -> Tensor:
        """Return starts of chains, (n, dim), at which no gradient is exactly 0, as samplers want it.

        A start so far from the posterior that the log density is rounded by more than a nat, as at 10 million nats in float32,
        is moved uphill, since a sampler could not tell its points apart. A coordinate that starts at a mode is moved a little.

        A coordinate that the model says nothing about, such as a missing value at the place of one that was observed, has no
        distribution. It gets a standard normal one here, which changes no other. `check_flat` says later whether that was
        right.

        Args:
            starts: points with a finite gradient, (n, dim).

        Raises:
            ValueError: naming the variables whose gradient is 0 around a start, while it is not elsewhere.
        """
        if self._flat is not None:  # of other data
            self._flat, self._slope, self._captured = None, None, {}
        starts = within_precision(self.evaluate, starts, max(torch.finfo(dtype).eps for dtype in self._dtypes.values()))
        flat = flat_coordinates(self.evaluate, starts)
        if flat.any():
            slope = self.evaluate(starts[0])[1] * flat
            self._flat, self._slope, self._captured = flat.to(self.dtype), slope, {}
        starts = off_modes(self.evaluate, starts)
        if still := self._variables(torch.stack([self.evaluate(z)[1] for z in starts]).eq(0).any(0)):
            raise ValueError(
                f"The gradient of the log density is 0 at a start and around it, in coordinates of {listed(still)}, so that "
                "NUTS cannot find a scale for them. Give other values by init=, or a prior that is not flat."
            )
        return starts

    def check_flat(self, points: Tensor) -> None:
        """Check that the model says nothing about the coordinates that `prepare_starts` has given a normal distribution.

        Args:
            points: coordinates, (n, dim).

        Raises:
            ValueError: naming the variables on which it depends.
        """
        if self._flat is None or self._slope is None:
            return
        flat, self._flat = self._flat, None
        try:
            slopes = torch.stack([self.evaluate(z)[1] for z in points])
        finally:
            self._flat = flat
        if depends := self._variables((slopes != self._slope).any(0) & flat.bool()):
            raise ValueError(
                f"The log density does not depend on some coordinates of {listed(depends)} at the start, but does at later "
                "draws, so that the draws are wrong. Give other values by init=, or a prior that is not flat."
            )

    def _variables(self, mask: Tensor) -> list[str]:
        """Return the names of the variables of which a mask, (dim,), has coordinates."""
        parts = mask.split([shape.numel() for shape in self.shapes.values()])
        return [name for name, part in zip(self.shapes, parts, strict=True) if part.any()]

    def potential_fn(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return minus the log density, (), which can be differentiated once: the ``potential_fn`` of Pyro's `NUTS` and `HMC`.

        Args:
            params: unconstrained value of each variable.
        """
        return _Potential.apply(self, self.flatten(params))

    def initial_points(self, num_points: int = 1, *, init: Any = init_to_uniform) -> Tensor:
        """Return points from which a chain can start: log density and gradient are finite there.

        Args:
            num_points: number of points.
            init: a strategy of Pyro's, such as `init_to_median`; values by name; or a fit: an `SVI` or a pair (model, guide),
                whose guide is sampled, or an `MCMC` or `CompiledNUTS` run, of whose draws some are chosen at random.

        Returns:
            Unconstrained coordinates, (num_points, dim), in `dtype`.

        Raises:
            ValueError: if no such point is found among 100 times as many, naming the variables without a finite density; at
                once if data are NaN; or if a value by name belongs to no variable, or has another shape, or lies outside of
                the variable's support.
            TypeError: if the initial values are none of these.
        """
        check_positive_int("initial_points", num_points=num_points)
        if isinstance(init, Mapping):
            self._check_init(as_values(init))
        model = InitMessenger(never_without(as_strategy(init, self.args, self.kwargs)))(self._enumerated)
        points: list[Tensor] = []
        cause: Exception | None = None
        for _ in range(MAX_TRIES * num_points):
            try:
                z = self._initial_point(model)
            except _DataError:
                raise
            except (ValueError, torch.linalg.LinAlgError) as error:  # not allowed values
                cause = error
                continue
            points.append(z)
            if len(points) == num_points:
                return torch.stack(points)
        reason = one_line(text_of(cause), 500) if cause else "unknown"
        if cause is not None and not is_own(cause) and (names := self.not_finite(model)):
            reason += f" (the density of {listed(names)} is not finite)"
        raise ValueError(
            f"{num_points} initial points are wanted, but of {MAX_TRIES * num_points} only {len(points)} have a finite density "
            f"and gradient. The last failed because: {reason}. Change the model, or init=, to init_to_median say."
        ) from cause

    def _initial_point(self, model: Callable[[], Any]) -> Tensor:
        """Return coordinates of the initial values of one run, (dim,).

        Args:
            model: the model without arguments, with initial values at its sites.

        Raises:
            ValueError: if the log density or its gradient is not finite, or a distribution rejects its parameters or value.
        """
        with poutine.block(), torch.no_grad():
            trace = poutine.trace(model).get_trace()
            try:
                trace.compute_log_prob()
            except ValueError:  # by validation
                _check_data(trace)
                raise
            z = self.unconstrain({name: trace.nodes[name]["value"] for name in self.names})
        value, gradient = self.evaluate(z)
        if value.isfinite() and gradient.isfinite().all():
            return z
        _check_data(trace)
        sites = [
            name for name, site in trace.nodes.items() if site["type"] == "sample" and not site["log_prob"].isfinite().all()
        ]
        raise ValueError(f"the density of {listed(sites)} is not finite." if sites else "a gradient is not finite.")

    def not_finite(self, model: Callable[[], Any] | None = None) -> dict[str, float]:
        """Return the log density of each site at which it is not finite, by name, in one run without Pyro's checks.

        Args:
            model: the model without arguments, with initial values at its sites; by default they are drawn from the prior.
        """
        with poutine.block(), torch.no_grad(), pyro.validation_enabled(is_validate=False):
            try:
                trace = poutine.trace(model or self._run).get_trace()
                trace.compute_log_prob()
            except (ValueError, RuntimeError):  # no draw or no density without those checks
                return {}
        sites: Any = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        return {name: float(site["log_prob"].sum()) for name, site in sites.items() if not site["log_prob"].isfinite().all()}

    def _check_init(self, values: Mapping[str, Tensor]) -> None:
        """Check initial values by name.

        Raises:
            ValueError: naming the first value that belongs to no variable, or has another shape, or is not in the support.
        """
        for name, value in values.items():
            if name in self._others:
                continue
            if name not in self.names:
                raise ValueError(f"init has no variable {name!r}: the model has {listed(self.names)}.")
            if value.shape != self._event_shapes[name]:
                wanted = tuple(self._event_shapes[name])
                raise ValueError(f"init wants a value of {name!r} of shape {wanted}, but found {tuple(value.shape)}.")
            if not self._supports[name].check(value).all():
                raise ValueError(
                    f"init has a value of {name!r} outside of the variable's support, {self._supports[name]}: "
                    f"{one_line(value.tolist())}."
                )

    def _run(self) -> Any:
        """Run the model; handlers of Pyro have a keyword ``context`` of their own, which a model's must not meet.

        Raises:
            ValueError: if there is a plate around the call: the model's plates would get other dimensions.
        """
        if names := plates_around():
            raise ValueError(
                f"The plate {names[0]!r} is around the call, so that the plates of the model would lie in other dimensions. "
                "Call outside of it, or put the plate into the model."
            )
        return self.model(*self.args, **self.kwargs)


class _DataError(ValueError):
    """An error of data that no initial value can mend."""


def _check_data(trace: Any) -> None:
    """Check that no data of a model are NaN, after its density was found not to be finite.

    Raises:
        ValueError: naming the first site whose data are.
    """
    for name, site in trace.nodes.items():
        is_data = site["type"] == "sample" and site["is_observed"] and not is_deterministic(site)
        if is_data and isinstance(site["value"], Tensor) and bool(site["value"].isnan().any()):
            raise _DataError(
                f"The data of site {name!r} hold NaN, so that no density or gradient is finite. Leave these rows out, or give "
                "obs_mask= with other numbers in their place."
            )


class _Potential(torch.autograd.Function):
    """Minus a log density, as a differentiable function of the coordinates."""

    @staticmethod
    def forward(ctx: Any, density: LogDensity, z: Tensor) -> Tensor:
        value, gradient = density(z.detach())
        ctx.save_for_backward(gradient)
        return -value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, -grad_output * gradient


def _described(value: Any) -> str:
    """Return the kind of a value, for a message: for a tensor, its dtype and shape."""
    return f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else type_with_article(value)
