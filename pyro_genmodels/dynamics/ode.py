r"""Ordinary differential equations :math:`\dot x = v(t, x)`, with the change of volume along their solutions.

.. math:: x(b) = x(a) + \int_a^b v\, dt, \qquad
    \log |\det \partial x(b) / \partial x(a)| = \int_a^b \operatorname{tr} \frac{\partial v}{\partial x}\, dt

The trace is exact or Hutchinson's estimate, see `pyro_genmodels.dynamics.jacobian`. Two penalties can be integrated along with
it: the kinetic energy :math:`\int |v|^2 dt`, and the size of the Jacobian :math:`\int |\epsilon^\top J|^2 dt`, whose mean is
:math:`\int \|J\|_F^2 dt`.

Under `torch.autocast`, adaptive solvers and adjoints evaluate the velocity in full precision: otherwise the steps would follow
its rounding, which is larger than the tolerances.

Chen et al., *Neural Ordinary Differential Equations* (arXiv 1806.07366); Grathwohl et al., *FFJORD* (arXiv 1810.01367); Finlay
et al., *How to train your neural ODE* (arXiv 2002.02798). The solvers are torchdiffeq's.
"""

from __future__ import annotations

__all__ = [
    "RK4", "Dopri5", "Dopri8", "Euler", "Midpoint", "ODESolution", "Solver", "Velocity", "integrate",
    "integrate_with_divergence",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode  # public: listed in its module's __all__

from pyro_genmodels.dynamics.jacobian import pull_back, unit_vectors
from pyro_genmodels.dynamics.spacing import check_num_steps

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(time (), x (N, ...)) -> the shape of x."""

MAX_STEPS = 10_000
"""Number of steps after which an adaptive solver gives up."""
FAILURE_MESSAGES = ("underflow in dt", "non-finite values in state", "max_num_steps exceeded")
"""Beginnings of the messages with which torchdiffeq gives up."""


class Solver(ABC):
    """Base class of ODE solvers. Solvers are values without state.

    Attributes:
        method: name of the method in torchdiffeq.
        is_adaptive: True if the size of steps follows from estimates of their errors.
        adjoint: True if gradients come from the adjoint equation.
        rtol: relative tolerance, of adaptive solvers.
        atol: absolute tolerance, of adaptive solvers.
    """

    method: ClassVar[str]
    is_adaptive: ClassVar[bool] = False
    adjoint: bool
    rtol: float = 0.0
    atol: float = 0.0

    @property
    def direct(self) -> Solver:
        """Copy of the solver without the adjoint equation."""
        return replace(self, adjoint=False) if self.adjoint else self  # type: ignore[type-var]

    @property
    @abstractmethod
    def coarser(self) -> Solver:
        """Copy of the solver with larger errors. The difference of the two estimates the error."""

    @abstractmethod
    def options(self, end: Tensor) -> dict[str, Any]:
        """Return torchdiffeq's options for a solution up to time `end`, ()."""


@dataclass(frozen=True)
class _Adaptive(Solver):
    """Base class of solvers with adaptive steps, as large as the tolerances allow.

    The estimated error of a step, divided by ``atol + rtol |x|``, has a root mean square of at most 1 over the coordinates of
    each row, and is at most 1 for each of its integrals. A row therefore meets the tolerances whatever rows stand beside it.

    Attributes:
        rtol: tolerated error, relative to the state.
        atol: tolerated error, in the units of the state.
        adjoint: True if gradients come from a second ODE that is solved backwards. It needs memory for one step only, but takes
            more time, has an error of its own, and cannot be differentiated again. False differentiates the steps themselves.
    """

    is_adaptive: ClassVar[bool] = True
    rtol: float = 1e-5
    atol: float = 1e-5
    adjoint: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.rtol < inf and 0 < self.atol < inf):
            raise ValueError(
                f"{type(self).__name__} wants tolerances such as 1e-5, but found rtol={self.rtol}, atol={self.atol}."
            )

    @property
    def coarser(self) -> Solver:
        return replace(self, rtol=10 * self.rtol, atol=10 * self.atol)

    def options(self, end: Tensor) -> dict[str, Any]:
        # a step ends at `end`, since interpolation has low order
        return {"max_num_steps": MAX_STEPS, "step_t": end.reshape(1), "norm": _largest_row_norm}


@dataclass(frozen=True)
class Dopri5(_Adaptive):
    """The method of Dormand and Prince of order 5, with adaptive steps."""

    method: ClassVar[str] = "dopri5"


@dataclass(frozen=True)
class Dopri8(_Adaptive):
    """The method of Dormand and Prince of order 8, with adaptive steps: for small tolerances in double precision."""

    method: ClassVar[str] = "dopri8"


@dataclass(frozen=True)
class _Fixed(Solver):
    """Base class of solvers with steps of equal size.

    Attributes:
        num_steps: number of steps.
        adjoint: True if gradients come from a second ODE; see `Dopri5`.
    """

    num_steps: int
    adjoint: bool = False

    def __post_init__(self) -> None:
        check_num_steps(self, self.num_steps)

    @property
    def coarser(self) -> Solver:
        return replace(self, num_steps=self.num_steps // 2 or 2)  # the error of one step is estimated by two

    def options(self, end: Tensor) -> dict[str, Any]:
        def grid(_: Any, __: Tensor, t: Tensor) -> Tensor:
            return torch.linspace(float(t[0]), float(t[-1]), self.num_steps + 1, dtype=t.dtype, device=t.device)

        return {"grid_constructor": grid}


@dataclass(frozen=True)
class Euler(_Fixed):
    """The Euler method, of order 1: one evaluation per step."""

    method: ClassVar[str] = "euler"


@dataclass(frozen=True)
class Midpoint(_Fixed):
    """The midpoint method, of order 2: two evaluations per step."""

    method: ClassVar[str] = "midpoint"


@dataclass(frozen=True)
class RK4(_Fixed):
    """The 3/8 rule of Kutta, of order 4: four evaluations per step."""

    method: ClassVar[str] = "rk4"


@dataclass(frozen=True)
class ODESolution:
    """The solution of an ODE at its end.

    Attributes:
        x: points at the end, of the shape of the initial points.
        evaluations: number of calls of the velocity, each for all rows at once, without those of the adjoint equation.
        divergence: integral of the trace of the Jacobian from start to end, (N,): the gain of log volume.
        kinetic: integral of the squared speed, (N,), positive in either direction of time.
        jacobian: integral of the squared Frobenius norm of the Jacobian, or of its estimate, (N,), positive likewise.
    """

    x: Tensor
    evaluations: int
    divergence: Tensor | None = None
    kinetic: Tensor | None = None
    jacobian: Tensor | None = None


def integrate(
    velocity: Velocity, x: Tensor, start: float, end: float, solver: Solver, *, parameters: Sequence[Tensor] = ()
) -> ODESolution:
    """Solve an ODE from one time to another, forwards or backwards.

    Args:
        velocity: (t (), x (N, ...)) -> the shape of x.
        x: initial points, (N, ...).
        start: time of the initial points.
        end: time of the solution.
        solver: solver such as ``Dopri5()``.
        parameters: tensors that the velocity depends on and that require gradients. Only solvers with an adjoint need them.

    Returns:
        The points at the end, with gradients if these are enabled.

    Raises:
        FloatingPointError: if the solver's steps become too small or too many, or the solution is NaN or infinite.
        NotImplementedError: if a graph is being captured.

    Example:
        >>> solution = integrate(lambda t, x: -x, torch.ones(1, 2), 0.0, 1.0, RK4(10))
        >>> solution.x, solution.evaluations
        (tensor([[0.3679, 0.3679]]), 40)
    """
    (x,), evaluations = _solve(lambda t, state: (velocity(t, state[0]),), (x,), start, end, solver, parameters)
    return ODESolution(x, evaluations)


def integrate_with_divergence(
    velocity: Velocity,
    x: Tensor,
    start: float,
    end: float,
    solver: Solver,
    *,
    probes: Tensor | None = None,
    regularize: bool = False,
    parameters: Sequence[Tensor] = (),
) -> ODESolution:
    """Solve an ODE together with the integral of its divergence.

    Args:
        velocity: see `integrate`. The velocity of a row depends on that row alone.
        x: initial points, (N, ...).
        start: see `integrate`.
        end: see `integrate`.
        solver: see `integrate`.
        probes: probes of mean 0 and covariance I for the trace, (k, N, ...), the same at all times. None computes the exact
            trace, by one vector-Jacobian product per coordinate.
        regularize: True if the kinetic energy and the size of the Jacobian are integrated too.
        parameters: see `integrate`.

    Returns:
        The solution, with `divergence` and, if asked for, `kinetic` and `jacobian`.

    Raises:
        FloatingPointError: see `integrate`.
        NotImplementedError: see `integrate`.
        ValueError: if the probes do not have the shape of x.

    Example:
        >>> integrate_with_divergence(lambda t, x: -x, torch.ones(1, 2), 0.0, 1.0, RK4(10)).divergence
        tensor([-2.0000])
    """
    if probes is not None and probes.shape[1:] != x.shape:
        raise ValueError(
            f"Probes of points {tuple(x.shape)} should be (k, {', '.join(map(str, x.shape))}), not {tuple(probes.shape)}."
        )
    vectors = unit_vectors(x) if probes is None else probes
    sign = 1.0 if end > start else -1.0

    def rates(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            connected = create_graph and state[0].requires_grad  # the initial points may be plain data
            at = state[0] if connected else state[0].detach().requires_grad_()
            v = velocity(t, at)
            products = pull_back(v, at, vectors, create_graph=create_graph)
        if not create_graph:
            v, products = v.detach(), products.detach()
        terms = [(products * vectors).flatten(2).sum(2)]
        if regularize:
            terms.append(sign * products.square().flatten(2).sum(2))
        traces = [term.sum(0) if probes is None else term.mean(0) for term in terms]
        return v, *traces, *([sign * v.square().flatten(1).sum(1)] if regularize else [])

    needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in (x, *parameters))
    tried = torch.is_grad_enabled() and not needs_grad
    if tried:  # the velocity may have parameters that were not passed
        needs_grad = velocity(x.new_tensor(start), x).requires_grad
    zeros = [x.new_zeros(len(x)) for _ in range(3 if regularize else 1)]
    with torch.set_grad_enabled(needs_grad):
        (x, divergence, *penalties), evaluations = _solve(rates, (x, *zeros), start, end, solver, parameters)
    jacobian, kinetic = penalties or (None, None)
    return ODESolution(x, evaluations + tried, divergence, kinetic, jacobian)


def _solve(
    rates: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
    start: float,
    end: float,
    solver: Solver,
    parameters: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], int]:
    """Return the state at the end, and the number of calls of `rates`."""
    name = type(solver).__name__
    if get_proxy_mode() is not None or torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} solves an ODE by steps that depend on values, and cannot be captured as a graph (make_fx, torch.compile). "
            "Do not capture this model, or capture its velocity only."
        )
    if not (isinstance(solver, Solver) and start != end):
        raise ValueError(f"An ODE wants a solver such as Dopri5() and two times, but found {solver!r}, {start} and {end}.")
    if not state[0].numel():
        return state, 0
    from torchdiffeq import odeint, odeint_adjoint  # slow to import: loads scipy

    evaluations, finished, (low, high) = 0, False, sorted((start, end))

    def counted(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal evaluations
        evaluations += not finished  # calls of the adjoint equation come later
        with unrounded:
            return rates(t.clamp(low, high), state)  # torchdiffeq may look ahead of the end to choose its first step

    kind = state[0].device.type
    exact = (solver.is_adaptive or solver.adjoint) and torch.is_autocast_enabled(kind)
    unrounded = torch.autocast(kind, enabled=False) if exact else nullcontext()
    times = torch.tensor([start, end], dtype=torch.float64, device=state[0].device)
    arguments: dict[str, Any] = {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol}
    try:
        if solver.adjoint and torch.is_grad_enabled():
            backward = {**solver.options(times[0]), "norm": "seminorm"}  # of the states; Kidger et al. (arXiv 2009.09457)
            arguments |= {"adjoint_params": tuple(parameters), "adjoint_options": backward}
            states = odeint_adjoint(counted, state, times, options=solver.options(times[1]), **arguments)
        else:
            states = odeint(counted, state, times, options=solver.options(times[1]), **arguments)
    except AssertionError as error:
        if not str(error).startswith(FAILURE_MESSAGES):
            raise
        raise _failure(name, start, end, f"gave up ({str(error).splitlines()[0].split(':')[0]})") from error
    finished = True
    ends = tuple(part[-1] for part in states)
    if not all(part.isfinite().all() for part in ends):
        raise _failure(name, start, end, "reached NaN or infinite values")
    return ends, evaluations


def _largest_row_norm(state: tuple[Tensor, ...]) -> Tensor:
    """Return the largest root mean square of a row, over the rows of all parts (N, ...) of a state."""
    return torch.cat([part.reshape(len(part), -1).square().mean(1) for part in state]).max().sqrt()


def _failure(name: str, start: float, end: float, problem: str) -> FloatingPointError:
    return FloatingPointError(
        f"{name} {problem} between time {start:g} and {end:g}: the velocity is too steep, or not finite. Look for NaN in its "
        "parameters; lower the learning rate; regularise the velocity (kinetic, jacobian); or loosen the tolerances (rtol, "
        "atol), which in single precision should not be below 1e-6."
    )
