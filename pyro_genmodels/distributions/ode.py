r"""Continuous flows: :math:`x = x(1)`, where :math:`\dot x = v(x, t, c)` from a sample :math:`x(0)` of a base distribution.

.. math:: \log p(x \mid c) = \log p_0(x(0)) - \int_0^1 \operatorname{tr} \frac{\partial v}{\partial x}\, dt,

along the trajectory back from the data at time 1. The trace is exact, or Hutchinson's estimate, with which `log_prob` is an
unbiased estimate. Probes are redrawn in training and fixed otherwise, so that `log_prob` is deterministic (NUTS needs this).
`fresh_probes` redraws them everywhere.

Chen et al. (arXiv 1806.07366); Grathwohl et al., *FFJORD* (arXiv 1810.01367); Finlay et al. (arXiv 2002.02798).
"""

from __future__ import annotations

__all__ = [
    "ContinuousFlow", "Evaluations", "ExactTrace", "GaussianProbes", "Hutchinson", "LogProbWithError", "RademacherProbes",
    "Trace", "fresh_probes",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Generator, Size, Tensor
from torch.distributions import Distribution

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.dynamics.ode import Dopri5, ODESolution, Solver, integrate, integrate_with_divergence
from pyro_genmodels.dynamics.reverse import Trajectory
from pyro_genmodels.utils.distributions import Density, has_active_dropout, modules_and_tensors
from pyro_genmodels.utils.errors import check_choice, check_positive_int

MAX_EXACT_TRACE_DIMS = 16
"""Number of coordinates up to which the trace is exact by default."""


_FRESH_PROBES = ContextVar("fresh_probes", default=False)


@contextmanager
def fresh_probes() -> Iterator[None]:
    """Redraw the probes at every estimate of a trace, so that the mean over calls has a smaller error."""
    token = _FRESH_PROBES.set(True)
    try:
        yield
    finally:
        _FRESH_PROBES.reset(token)


class Trace(ABC):
    """A choice of how the trace of a Jacobian is computed."""

    is_exact: ClassVar[bool] = False
    """True if the trace has no error, and `probes` returns None."""

    @abstractmethod
    def probes(self, x: Tensor, *, fresh: bool) -> Tensor | None:
        """Return probes (k, *shape of x) of mean 0 and covariance I, or None for the exact trace.

        Args:
            x: points, (N, d).
            fresh: True for new probes, False for the same ones at every call.
        """

    def single(self) -> Trace:
        """Return the same trace with as few probes as possible, for an estimate of its error from many calls."""
        return self


@dataclass(frozen=True)
class ExactTrace(Trace):
    """The exact trace, by one backward pass per coordinate."""

    is_exact: ClassVar[bool] = True

    def probes(self, x: Tensor, *, fresh: bool) -> Tensor | None:
        return None


@dataclass(frozen=True)
class RademacherProbes:
    """Random signs. They have the smallest variance of all probes, and none if the Jacobian is diagonal."""

    def __call__(self, shape: Sequence[int], generator: Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randint(2, shape, generator=generator, device=device).to(dtype) * 2 - 1


@dataclass(frozen=True)
class GaussianProbes:
    """Standard normal probes."""

    def __call__(self, shape: Sequence[int], generator: Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)


@dataclass(frozen=True)
class Hutchinson(Trace):
    """An unbiased estimate of the trace by random probes.

    Attributes:
        num_probes: number of probes for each row. They are the same along its whole trajectory.
        distribution: distribution of the probes: `RademacherProbes` or `GaussianProbes`.
        seed: seed of the fixed probes outside of training.
    """

    num_probes: int = 1
    distribution: RademacherProbes | GaussianProbes = field(default_factory=RademacherProbes)
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive_int("Hutchinson", num_probes=self.num_probes)
        check_choice("Hutchinson", "distribution", self.distribution, RademacherProbes(), RademacherProbes | GaussianProbes)

    def probes(self, x: Tensor, *, fresh: bool) -> Tensor | None:
        generator = None if fresh else Generator(x.device).manual_seed(self.seed)
        return self.distribution((self.num_probes, *x.shape), generator, x.device, x.dtype)

    def single(self) -> Hutchinson:
        return replace(self, num_probes=1)


@dataclass
class Evaluations:
    """A count of evaluations of a velocity, each for all rows at once.

    Attributes:
        last: evaluations in the last solution of the ODE.
        total: evaluations in all solutions.
    """

    last: int = 0
    total: int = 0

    def add(self, count: int) -> None:
        """Count the evaluations of one more solution."""
        self.last, self.total = count, self.total + count


@dataclass(frozen=True)
class LogProbWithError:
    """Log densities with estimates of their errors.

    Attributes:
        values: log densities (nats), (batch...).
        probe_error: standard error due to the probes of the trace, (batch...); 0 if the trace is exact.
        solver_error: difference to a solution with ten times the tolerances, or half the steps, (batch...). The error itself is
            smaller if the velocity is smooth over a step.
        evaluations: evaluations of the velocity in both solutions, each for all rows at once.
    """

    values: Tensor
    probe_error: Tensor
    solver_error: Tensor
    evaluations: int


class ContinuousFlow(GenerativeDistribution):
    """The distribution of a base's samples after a velocity has moved them from time 0 to time 1.

    Args:
        velocity: function (x (N, *event_shape), t (N,), context (N, c) or None) -> velocities, of the shape of x.
        base: distribution of x at time 0, over one event. Its density should be positive everywhere.
        event_shape: shape of one datum.
        solver: solver of the ODE; by default `Dopri5`.
        trace: trace of the Jacobian: `ExactTrace` or `Hutchinson`. The default is exact up to 16 coordinates.
        network: module behind a velocity that is a plain function. Its parameters get gradients, and its mode says whether
            probes are redrawn.
        kinetic: weight of the integrated squared speed in `training_log_prob`.
        jacobian: weight of the integrated squared norm of the Jacobian in `training_log_prob`.
        evaluations: counter of the evaluations of the velocity.
        kwargs: further arguments of `GenerativeDistribution`.

    Raises:
        ValueError: if the base is not over one event of this shape, or if the flow is used while dropout is active.
        FloatingPointError: if the ODE cannot be solved.

    Example:
        >>> import pyro.distributions as dist
        >>> doubling = lambda x, t, context: x * torch.tensor(2.0).log()
        >>> ContinuousFlow(doubling, dist.Normal(torch.zeros(3), 1.0).to_event(1), (3,)).log_prob(torch.zeros(3))
        tensor(-4.8363)
    """

    is_unbiased = True
    has_velocity = True

    def __init__(
        self,
        velocity: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        base: Distribution,
        event_shape: Sequence[int],
        *,
        solver: Solver | None = None,
        trace: Trace | None = None,
        network: Any = None,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        evaluations: Evaluations | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(event_shape, **kwargs)
        if base.batch_shape or base.event_shape != self.event_shape:
            raise ValueError(
                f"ContinuousFlow wants a base over one event of shape {tuple(self.event_shape)}, but found batch shape "
                f"{tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}. Use base.expand(...).to_event(n)."
            )
        self.field, self.base = velocity, base
        self.network = velocity if network is None else network
        self.solver = Dopri5() if solver is None else solver
        exact = self.event_shape.numel() <= MAX_EXACT_TRACE_DIMS
        self.trace = trace if trace is not None else ExactTrace() if exact else Hutchinson()
        self.kinetic, self.jacobian = kinetic, jacobian
        self.evaluations = Evaluations() if evaluations is None else evaluations

    @property
    def density(self) -> Density:
        """Kind of density: exact with an exact trace, else an estimate."""
        return "exact" if self.trace.is_exact else "estimate"

    @property
    def mean_inside_log(self) -> bool:
        """True with an exact trace; the mean of exp(log_prob) of an estimate is biased."""
        return self.trace.is_exact

    @property
    def has_rsample(self) -> bool:
        """True if samples carry the gradients of all parameters, including those of the base."""
        modules, tensors = modules_and_tensors(self.base)
        learned = any(p.requires_grad for p in (*tensors, *(p for module in modules for p in module.parameters())))
        return self.base.has_rsample or not learned

    def velocity(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocities of points in the space of the network, (N, *event_shape) per unit of time.

        Args:
            x: points, (N, *event_shape).
            t: times in [0, 1], (N,).
            context: context of each point, (N, c), or None.

        Raises:
            ValueError: if the function that was given returns another shape.
        """
        v = self.field(x, t, context)
        if v.shape != x.shape:
            raise ValueError(f"A velocity should have the shape of its points, {tuple(x.shape)}, but found {tuple(v.shape)}.")
        return v.to(torch.promote_types(v.dtype, x.dtype))  # which `torch.autocast` may have rounded

    # Densities.

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self._back(y, context, self.solver, self.trace)[0]

    def training_log_prob(self, value: Tensor) -> Tensor:
        r"""Return `log_prob` minus the regularisers of arXiv 2002.02798, (sample..., *batch_shape).

        .. math:: \log p(x) - \lambda_K \int |v|^2 dt - \lambda_J \int \|\partial v / \partial x\|_F^2 dt
        """
        if not (self.kinetic or self.jacobian):
            return self.log_prob(value)
        y, context, log_det = self.aligned(value)
        log_prob, path = self._back(y, context, self.solver, self.trace, regularize=True)
        penalty: Any = self.kinetic * path.kinetic + self.jacobian * path.jacobian  # type: ignore[operator]
        return log_prob + log_det - penalty.reshape(log_prob.shape)

    def score(self, value: Tensor) -> Tensor:
        """Return the score: see `GenerativeDistribution.score`. No adjoint is used, since it cannot be differentiated twice."""
        if not self.solver.adjoint:
            return super().score(value)
        new: Any = self.expand(self.batch_shape)
        new.solver = self.solver.direct
        return new.score(value)

    def log_prob_with_error(self, value: Tensor, *, num_probes: int = 8) -> LogProbWithError:
        """Return `log_prob` with estimates of its error.

        Args:
            value: data, (sample..., *batch_shape, *event_shape).
            num_probes: number of probes whose spread gives the standard error, at least 2. An exact trace ignores it.

        Raises:
            ValueError: if there are fewer than 2 probes.
        """
        exact = self.trace.is_exact
        if not exact and num_probes < 2:
            raise ValueError(f"log_prob_with_error wants num_probes of 2 or more, but found {num_probes}.")
        with torch.no_grad():
            y, context, log_det = self.aligned(value)
            k = 1 if exact else num_probes
            y, context = y.expand(k, *y.shape), None if context is None else context.expand(k, *context.shape)
            trace = self.trace.single()
            values, path = self._back(y, context, self.solver, trace)
            coarse, coarse_solution = self._back(y, context, self.solver.coarser, trace)
        probe_error = torch.zeros_like(values[0]) if exact else values.std(0) / sqrt(k)
        error = (values - coarse).mean(0).abs()
        return LogProbWithError(values.mean(0) + log_det, probe_error, error, path.evaluations + coarse_solution.evaluations)

    def _back(
        self, y: Tensor, context: Tensor | None, solver: Solver, trace: Trace, *, regularize: bool = False
    ) -> tuple[Tensor, ODESolution]:
        """Return log densities in the space of the network, and the solution of the ODE back to the base."""
        rows, velocity, parameters = self._start(y, context)
        training = torch.is_grad_enabled() and getattr(self.network, "training", True)
        fresh = _FRESH_PROBES.get() or (training and any(p.requires_grad for p in parameters))
        probes = trace.probes(rows, fresh=fresh)
        path = integrate_with_divergence(
            velocity, rows, 1.0, 0.0, solver, probes=probes, regularize=regularize, parameters=parameters
        )
        self.evaluations.add(path.evaluations)
        batch = y.shape[: y.dim() - self.event_dim]
        return self.base.log_prob(path.x.reshape(y.shape)) + path.divergence.reshape(batch), path  # type: ignore[union-attr]

    # Draws.

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        y = self.base.rsample(shape) if self.base.has_rsample else self.base.sample(shape)
        rows, velocity, parameters = self._start(y, context)
        path = integrate(velocity, rows, 0.0, 1.0, self.solver, parameters=parameters)
        self.evaluations.add(path.evaluations)
        return path.x.reshape(y.shape)

    def trajectory(self, sample_shape: Sequence[int] = (), *, num_frames: int = 20) -> Trajectory:
        """Return samples with their trajectories.

        Args:
            sample_shape: shape of the samples.
            num_frames: number of positions to keep, including the start and the end, at least 2. The solver restarts at each
                of these evenly spaced times.

        Returns:
            Trajectory with x (*sample_shape, *batch_shape, *event_shape), the evaluations of the velocity, and frames in the
            space of the network, of standardised data: (frames, *sample_shape, *batch_shape, *event_shape).

        Raises:
            ValueError: if there are fewer than 2 frames, or if dropout is active.
        """
        if num_frames < 2:
            raise ValueError(f"A trajectory wants num_frames of 2 or more, for its start and its end, but found {num_frames}.")
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            start = self.base.sample(shape)
            rows, velocity, _ = self._start(start, self._context_at(shape))
            times, frames, evaluations = torch.linspace(0.0, 1.0, num_frames).to(rows), [rows], 0
            for begin, end in pairwise(times.tolist()):
                path = integrate(velocity, frames[-1], begin, end, self.solver)
                frames.append(path.x)
                evaluations += path.evaluations
        self.evaluations.add(evaluations)
        positions = torch.stack(frames).reshape(num_frames, *start.shape)
        return Trajectory(self.to_data(positions[-1]), evaluations, times, positions)

    def _start(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor], list[Tensor]]:
        """Return points as rows (N, d), the velocity of rows, and the tensors on which it depends."""
        if has_active_dropout(self.network):
            raise ValueError(
                f"The ODE of {type(self).__name__} cannot be solved while its dropout is active: each evaluation would use "
                "another network. Call .eval() on the family first, train it by FlowMatching(), or build it with dropout=0."
            )
        rows = y.reshape(-1, self.event_shape.numel())
        contexts = None if context is None else context.reshape(len(rows), context.shape[-1])

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return self.velocity(x.reshape(-1, *self.event_shape), t.expand(len(x)), contexts).reshape(x.shape)

        modules, tensors = modules_and_tensors((self.network, self.field))
        parts = (*(p for module in modules for p in module.parameters()), *tensors, *([] if contexts is None else [contexts]))
        return rows, velocity, list({id(p): p for p in parts}.values())
