r"""Continuous flows: :math:`x = x(1)`, where :math:`\dot x = v(x, t, c)` from a draw :math:`x(0)` of a base distribution.

.. math:: \log p(x \mid c) = \log p_0(x(0)) - \int_0^1 \operatorname{tr} \frac{\partial v}{\partial x}\, dt,

along the way back from the data at time 1. The trace is exact, or Hutchinson's estimate, and then `log_prob` is an unbiased
estimate, whose probes are fresh in training and the same at every other call, so that it is a function one can walk on; but
for `fresh_probes`.

Chen et al. (arXiv 1806.07366); Grathwohl et al., *FFJORD* (arXiv 1810.01367); Finlay et al. (arXiv 2002.02798).
"""

from __future__ import annotations

__all__ = [
    "Assessed", "ContinuousFlow", "Evaluations", "ExactTrace", "GaussianProbes", "Hutchinson", "RademacherProbes", "Trace",
    "fresh_probes",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import sqrt
from typing import Any

import torch
from torch import Generator, Size, Tensor
from torch.distributions import Distribution

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.dynamics.ode import Dopri5, ODESolution, Solver, integrate, integrate_with_divergence
from pyro_genmodels.dynamics.reverse import Trajectory
from pyro_genmodels.utils.distributions import Density, has_active_dropout, modules_and_tensors

MAX_EXACT_TRACE_DIMS = 16
"""Coordinates, up to which the trace is exact unless asked otherwise."""


_FRESH = ContextVar("fresh", default=False)


@contextmanager
def fresh_probes() -> Iterator[None]:
    """Has every estimate of a trace draw probes of its own, so that a mean over calls comes nearer."""
    token = _FRESH.set(True)
    try:
        yield
    finally:
        _FRESH.reset(token)


class Trace(ABC):
    """How the trace of a Jacobian is found."""

    @abstractmethod
    def probes(self, x: Tensor, *, fresh: bool) -> Tensor | None:
        """Vectors (k, *shape of x), of mean 0 and covariance I, drawn anew or the same at every call; None is exact."""


@dataclass(frozen=True)
class ExactTrace(Trace):
    """The trace itself: as many backward passes as coordinates, in one."""

    def probes(self, x: Tensor, *, fresh: bool) -> Tensor | None:
        return None


@dataclass(frozen=True)
class RademacherProbes:
    """Signs: of all probes those of the least variance, and without any where the Jacobian is diagonal."""

    def __call__(self, shape: Sequence[int], generator: Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randint(2, shape, generator=generator, device=device).to(dtype) * 2 - 1


@dataclass(frozen=True)
class GaussianProbes:
    """Standard normal."""

    def __call__(self, shape: Sequence[int], generator: Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)


@dataclass(frozen=True)
class Hutchinson(Trace):
    """The trace by random probes, unbiased.

    Attributes:
        num_probes: for each row, the same all along its way.
        law: of the probes: `RademacherProbes` or `GaussianProbes`.
        seed: of the probes outside of training.
    """

    num_probes: int = 1
    law: RademacherProbes | GaussianProbes = field(default_factory=RademacherProbes)
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.num_probes, bool) or not isinstance(self.num_probes, int) or self.num_probes < 1:
            raise ValueError(f"Hutchinson wants num_probes of 1 or more, but found {self.num_probes!r}.")
        if not isinstance(self.law, (RademacherProbes, GaussianProbes)):
            raise TypeError(f"Hutchinson wants RademacherProbes() or GaussianProbes() as its law, but found {self.law!r}.")

    def probes(self, x: Tensor, *, fresh: bool) -> Tensor | None:
        generator = None if fresh else Generator(x.device).manual_seed(self.seed)
        return self.law((self.num_probes, *x.shape), generator, x.device, x.dtype)


@dataclass
class Evaluations:
    """How often a velocity was asked, for all rows at once.

    Attributes:
        last: in the last solution of its ODE.
        total: in all of them.
    """

    last: int = 0
    total: int = 0

    def add(self, count: int) -> None:
        """One more solution."""
        self.last, self.total = count, self.total + count


@dataclass(frozen=True)
class Assessed:
    """Log densities, and what they may be off by.

    Attributes:
        values: nats, (batch...).
        probe_error: standard error by the probes of the trace, 0 where it is exact.
        solver_error: difference to a solution with ten times the tolerances, or half the steps. The error itself is less, where
            steps are small enough for the velocity to look smooth.
        evaluations: of the velocity, for all rows at once, in both.
    """

    values: Tensor
    probe_error: Tensor
    solver_error: Tensor
    evaluations: int


class ContinuousFlow(GenerativeDistribution):
    """The distribution of where a velocity carries draws from a base: from time 0 to time 1.

    Args:
        velocity: called as velocity(x, t, context), with x (N, *event_shape), t (N,) and context (N, c) or None; -> the shape
            of x.
        base: of x at time 0, over one datum; not 0 anywhere, or the density of what comes from there is 0.
        event_shape: shape of one datum.
        solver: of the ODE.
        trace: of the Jacobian: `ExactTrace` or `Hutchinson`; by default exact up to 16 coordinates.
        network: the module behind a velocity that is a function: whose parameters want gradients, and whose mode says whether
            this is training.
        kinetic: weight of the squared speed along the way in `training_log_prob`.
        jacobian: weight of the squared size of the Jacobian there.
        evaluations: where evaluations of the velocity are counted.
        kwargs: passed to `GenerativeDistribution`.

    Raises:
        ValueError: if the base is not over one such event; on use while the network drops units at random.
        FloatingPointError: where the ODE cannot be solved.

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
                f"ContinuousFlow over events {tuple(self.event_shape)} wants a base over one of them, but found batch shape "
                f"{tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}. See base.expand(...).to_event(n)."
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
        """What `log_prob` returns."""
        return "exact" if isinstance(self.trace, ExactTrace) else "estimate"

    @property
    def mean_inside_log(self) -> bool:
        """Only the mean of estimates of a logarithm is one."""
        return isinstance(self.trace, ExactTrace)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry all gradients: those of the base too, where it has any."""
        modules, tensors = modules_and_tensors(self.base)
        learned = any(p.requires_grad for p in (*tensors, *(p for module in modules for p in module.parameters())))
        return self.base.has_rsample or not learned

    def velocity(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Where points of the space of the network move.

        Args:
            x: points, (N, *event_shape).
            t: times in [0, 1], (N,).
            context: (N, c) or None.

        Returns:
            Of the shape of x, per unit of time.

        Raises:
            ValueError: if the velocity has another shape.
        """
        v = self.field(x, t, context)
        if v.shape != x.shape:
            raise ValueError(f"The velocity should return {tuple(x.shape)}, as it was given, not {tuple(v.shape)}.")
        return v

    # Densities.

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self._back(y, context, self.solver, self.trace)[0]

    def training_log_prob(self, value: Tensor) -> Tensor:
        r"""`log_prob` less the regularisers of arXiv 2002.02798, for training.

        .. math:: \log p(x) - \lambda_K \int |v|^2 dt - \lambda_J \int \|\partial v / \partial x\|_F^2 dt
        """
        if not (self.kinetic or self.jacobian):
            return self.log_prob(value)
        y, context, log_det = self.aligned(value)
        log_prob, path = self._back(y, context, self.solver, self.trace, regularize=True)
        penalty: Any = self.kinetic * path.kinetic + self.jacobian * path.jacobian  # type: ignore[operator]
        return log_prob + log_det - penalty.reshape(log_prob.shape)

    def score(self, value: Tensor) -> Tensor:
        """See `GenerativeDistribution.score`; without an adjoint, whose gradient has none."""
        if not self.solver.adjoint:
            return super().score(value)
        new: Any = self.expand(self.batch_shape)
        new.solver = self.solver.direct
        return new.score(value)

    def log_prob_with_error(self, value: Tensor, *, num_probes: int = 8) -> Assessed:
        """`log_prob`, and how exact it is.

        Args:
            value: (sample..., *batch_shape, *event_shape).
            num_probes: over whose spread the trace is judged, unless it is exact; at least 2.

        Raises:
            ValueError: for fewer probes.
        """
        exact = isinstance(self.trace, ExactTrace)
        if not exact and num_probes < 2:
            raise ValueError(f"The spread over probes wants num_probes of 2 or more, but found {num_probes}.")
        with torch.no_grad():
            y, context, log_det = self.aligned(value)
            k = 1 if exact else num_probes
            y, context = y.expand(k, *y.shape), None if context is None else context.expand(k, *context.shape)
            trace = replace(self.trace, num_probes=1) if isinstance(self.trace, Hutchinson) else self.trace
            values, path = self._back(y, context, self.solver, trace)
            rough, rougher = self._back(y, context, self.solver.coarser, trace)
        probe_error = torch.zeros_like(values[0]) if exact else values.std(0) / sqrt(k)
        error = (values - rough).mean(0).abs()
        return Assessed(values.mean(0) + log_det, probe_error, error, path.evaluations + rougher.evaluations)

    def _back(
        self, y: Tensor, context: Tensor | None, solver: Solver, trace: Trace, *, regularize: bool = False
    ) -> tuple[Tensor, ODESolution]:
        """Log densities in the space of the network, and the way to the base."""
        rows, velocity, parameters = self._start(y, context)
        training = torch.is_grad_enabled() and getattr(self.network, "training", True)
        fresh = _FRESH.get() or (training and any(p.requires_grad for p in parameters))
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
        """Draws, with what happened on the way.

        Args:
            sample_shape: of the draws.
            num_frames: positions to keep, at even times from 0 to 1, at least 2; the solver starts anew at each.

        Returns:
            x (*sample_shape, *batch_shape, *event_shape), the evaluations of the velocity, and frames in the space of the
            network, of standardised data: (frames, *sample_shape, *batch_shape, *event_shape).

        Raises:
            ValueError: for fewer frames.
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
        x = positions[-1] if self.pretransform is None else self.pretransform.inv(positions[-1])
        return Trajectory(x, evaluations, times, positions)

    def _start(self, y: Tensor, context: Tensor | None) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor], list[Tensor]]:
        """Points as rows (N, d), the velocity of rows, and what it depends on."""
        if has_active_dropout(self.network):
            raise ValueError(
                f"The ODE of {type(self).__name__} has no solution while its dropout is active, each evaluation being of "
                "another velocity. Call .eval() on the family first, train it by FlowMatching(), or build it with dropout=0."
            )
        rows = y.reshape(-1, self.event_shape.numel())
        told = None if context is None else context.reshape(len(rows), context.shape[-1])

        def velocity(t: Tensor, x: Tensor) -> Tensor:
            return self.velocity(x.reshape(-1, *self.event_shape), t.expand(len(x)), told).reshape(x.shape)

        modules, tensors = modules_and_tensors((self.network, self.field))
        found = (*(p for module in modules for p in module.parameters()), *tensors, *([] if told is None else [told]))
        return rows, velocity, list({id(p): p for p in found}.values())
