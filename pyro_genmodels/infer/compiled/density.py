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
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_genmodels._pyro.inductor import DirectCall
from pyro_genmodels._pyro.plates import plates_around
from pyro_genmodels.infer.compiled.coordinates import Coordinates
from pyro_genmodels.infer.compiled.graph import Graph
from pyro_genmodels.infer.compiled.initial import as_strategy, never_without
from pyro_genmodels.infer.compiled.modes import Mode, default_mode
from pyro_genmodels.infer.compiled.native import NativeDensity, native_density
from pyro_genmodels.infer.compiled.program import Program
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

    Args:
        model: function with Pyro statements.
        args: positional arguments of the model.
        mode: how the model is captured, such as `Compiled` or `Captured`; `Eager` runs it anew at each call. None chooses.
        model_kwargs: keyword arguments of the model, also one called ``mode``.
        kwargs: keyword arguments of the model.

    Raises:
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

    Args:
        model: function with Pyro statements.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        mode: how the model is captured; None chooses.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple = (), kwargs: Mapping[str, Any] | None = None, mode: Mode | None = None
    ) -> None:
        self.model, self.args, self.kwargs, self.mode = model, tuple(args), dict(kwargs or {}), mode
        prototype = first_runs(self._run)
        super().__init__(prototype.transforms, prototype.values)
        self._potential, self._enumerated = prototype.potential, prototype.enumerated
        self._example = self.unconstrain(prototype.values)
        self._captured: dict[torch.dtype, _Captured] = {}

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density in nats, (), and its gradient, (dim,), both in the dtype of z and without a graph of autograd.

        Both are NaN where a decomposition of a matrix fails.

        The first call captures the model as a graph, and so does the first one after something that the model uses was
        replaced by another object.

        Args:
            z: unconstrained coordinates, (dim,), of any dtype of floats. Each variable is converted to its own dtype.

        Raises:
            ValueError: if z has another shape, or is no tensor of floats.
            CaptureError: if the model cannot be captured as a graph.
        """
        if not isinstance(z, Tensor) or z.shape != (self.dim,) or not z.is_floating_point():
            raise ValueError(
                f"A log density of {self.dim} coordinates wants a tensor of floats, ({self.dim},), but found {_described(z)}."
            )
        captured = self._captured.get(z.dtype)
        if captured is None or captured.changed():
            captured = self._captured[z.dtype] = self.capture(self._example.to(z.dtype))
        value, gradient = captured(z)
        return value, gradient

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without captured graphs."""
        return vars(self) | {"_captured": {}}

    def capture(self, z: Tensor) -> _Captured:
        """Return a function from coordinates like z to the log density and its gradient, captured now.

        Args:
            z: coordinates at which the model can run, (dim,).

        Raises:
            CaptureError: if the model cannot be captured as a graph.
        """
        return _Captured(self, z, self.mode or default_mode())

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
            return -self._potential(self.unflatten(z)).to(z.dtype)

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
                        "size. The model draws random numbers, or uses what changes from run to run, such as a counter, or a "
                        "number of Python that was changed since the capture."
                    )

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
            ValueError: if no such point is found among 100 times as many. The message names the variables without a finite
                density.
        """
        check_positive_int("initial_points", num_points=num_points)
        model = InitMessenger(never_without(as_strategy(init, self.args, self.kwargs)))(self._enumerated)
        points: list[Tensor] = []
        cause: Exception | None = None
        for _ in range(MAX_TRIES * num_points):
            try:
                z = self._initial_point(model)
            except (ValueError, torch.linalg.LinAlgError) as error:  # not allowed values
                cause = error
                continue
            points.append(z)
            if len(points) == num_points:
                return torch.stack(points)
        reason = one_line(str(cause).rstrip("."))
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
            trace.compute_log_prob()
            z = self.unconstrain({name: trace.nodes[name]["value"] for name in self.names})
        value, gradient = self.evaluate(z)
        if value.isfinite() and gradient.isfinite().all():
            return z
        sites = [
            name for name, site in trace.nodes.items() if site["type"] == "sample" and not site["log_prob"].isfinite().all()
        ]
        raise ValueError(f"the density of {listed(sites)} is not finite." if sites else "a gradient is not finite.")

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


class _Captured:
    """A log density and its gradient as a function of the coordinates, captured as a graph.

    Args:
        density: the log density.
        z: coordinates at which the model can run, (dim,).
        mode: how it is captured.
    """

    def __init__(self, density: LogDensity, z: Tensor, mode: Mode) -> None:
        self.program: Program | None = None
        self.run: Callable[[Tensor], Sequence[Tensor]] = density.evaluate
        self._built: Callable[..., Sequence[Any]] | None = None
        if mode.captures:
            with poutine.block():
                self.program = _Program(density, z)
            graph = self.program.graph
            self._built = mode.build(graph, [z])
            self.run = partial(_run_graph, self._built, graph)

    def changed(self) -> str | None:
        """Return the name of something that the model uses and that was replaced since the capture, or None."""
        return None if self.program is None else self.program.changed()

    def native(self, z: Tensor) -> NativeDensity | None:
        """Return the function as code that needs no Python, or None if it is not compiled or does too much for that.

        Args:
            z: coordinates at which the model can run, (dim,).
        """
        if self.program is None or not isinstance(self._built, DirectCall):
            return None
        return native_density(self._built, z, self.program.graph.read)

    def __call__(self, z: Tensor) -> Sequence[Tensor]:
        """Return the log density and its gradient, NaN where a matrix has no decomposition, such as no Cholesky factor."""
        try:
            return self.run(z.contiguous())  # compiled code takes this order in memory for granted
        except torch.linalg.LinAlgError:
            return z.new_full((), torch.nan), torch.full_like(z, torch.nan)


class _Program(Program):
    """A log density and its gradient in the place of a loss and the gradients of parameters, for the watch and the graph."""

    def __init__(self, density: LogDensity, z: Tensor) -> None:
        self._evaluate = density.evaluate
        roots = (density.model, density.args, density.kwargs)
        super().__init__(density.value, (z,), {}, roots, gradients=True)

    def outputs(self, *inputs: Tensor) -> list[Tensor | None]:
        return list(self._evaluate(*inputs))

    def _hooked(self) -> str | None:
        return None  # parameters are constants here


def _run_graph(built: Callable[..., Sequence[Any]], graph: Graph, z: Tensor) -> Sequence[Tensor]:
    """Return the results of a graph, without further ones that stand after them."""
    with torch.no_grad():
        return built(z, *graph.read)[: graph.num_outputs]


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
