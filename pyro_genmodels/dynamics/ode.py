r"""Ordinary differential equations :math:`\dot x = v(t, x)`, solved along with what happens to volumes on the way.

.. math:: x(b) = x(a) + \int_a^b v\, dt, \qquad
    \log |\det \partial x(b) / \partial x(a)| = \int_a^b \operatorname{tr} \frac{\partial v}{\partial x}\, dt

The trace is exact, by one batched pull-back of the unit vectors; or it is the mean of :math:`\epsilon^\top J \epsilon` over
probes :math:`\epsilon` of mean 0 and covariance I (Hutchinson, 1989). Along with it can be had the kinetic energy
:math:`\int |v|^2 dt` and the size of the Jacobian, :math:`\int |\epsilon^\top J|^2 dt`, on average :math:`\int \|J\|_F^2 dt`.

Chen et al., *Neural Ordinary Differential Equations* (arXiv 1806.07366); Grathwohl et al., *FFJORD* (arXiv 1810.01367); Finlay
et al., *How to train your neural ODE* (arXiv 2002.02798). The solvers are torchdiffeq's.
"""

from __future__ import annotations

__all__ = [
    "RK4", "Dopri5", "Dopri8", "Euler", "Midpoint", "ODESolution", "Solver", "Velocity", "integrate", "integrate_with_divergence",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_genmodels.dynamics.jacobian import pull_back

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(time (), x (N, ...)) -> the shape of x."""

MAX_STEPS = 10_000
"""Of an adaptive solver, after which it gives up."""
FAILURES = ("underflow in dt", "non-finite values in state", "max_num_steps exceeded")
"""What torchdiffeq says when it cannot go on."""


class Solver(ABC):
    """Base of all solvers. Objects without state: what a solver is and how exact."""

    method: ClassVar[str]
    adjoint: bool
    rtol: float = 0.0
    atol: float = 0.0

    @property
    def direct(self) -> Solver:
        """The same without an adjoint."""
        return replace(self, adjoint=False) if self.adjoint else self  # type: ignore[type-var]

    @property
    @abstractmethod
    def coarser(self) -> Solver:
        """The same with larger errors, to tell its own by the difference."""

    @abstractmethod
    def options(self, end: Tensor) -> dict[str, Any]:
        """What torchdiffeq wants to be told to get to that time."""


@dataclass(frozen=True)
class _Adaptive(Solver):
    """Steps as large as the tolerances allow.

    The estimated error of a step, relative to ``atol + rtol |x|``, has a root mean square over all rows and coordinates of 1 at
    most, and so for the integrals along the way.

    Attributes:
        rtol: tolerated error, relative to the state.
        atol: tolerated error, in its units.
        adjoint: whether gradients come from a second ODE, solved backwards, which takes memory for one step only but more time,
            has errors of its own, and cannot be differentiated again; else from the steps taken, exact for them.
    """

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
        return {"max_num_steps": MAX_STEPS, "step_t": end.reshape(1)}  # a step ends there: interpolation is of low order


@dataclass(frozen=True)
class Dopri5(_Adaptive):
    """Dormand and Prince's method of order 5, with adaptive steps."""

    method: ClassVar[str] = "dopri5"


@dataclass(frozen=True)
class Dopri8(_Adaptive):
    """Dormand and Prince's method of order 8, with adaptive steps: for small tolerances, in double precision."""

    method: ClassVar[str] = "dopri8"


@dataclass(frozen=True)
class _Fixed(Solver):
    """Steps of one size.

    Attributes:
        num_steps: how many.
        adjoint: see `Dopri5`.
    """

    num_steps: int
    adjoint: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"{type(self).__name__} wants num_steps of 1 or more, but found {self.num_steps!r}.")

    @property
    def coarser(self) -> Solver:
        return replace(self, num_steps=self.num_steps // 2 or 2)  # of one step, the error is told by two

    def options(self, end: Tensor) -> dict[str, Any]:
        def grid(_: Any, __: Tensor, t: Tensor) -> Tensor:
            return torch.linspace(float(t[0]), float(t[-1]), self.num_steps + 1, dtype=t.dtype, device=t.device)

        return {"grid_constructor": grid}


@dataclass(frozen=True)
class Euler(_Fixed):
    """Euler's method, of order 1: one evaluation a step."""

    method: ClassVar[str] = "euler"


@dataclass(frozen=True)
class Midpoint(_Fixed):
    """The midpoint method, of order 2: two evaluations a step."""

    method: ClassVar[str] = "midpoint"


@dataclass(frozen=True)
class RK4(_Fixed):
    """Kutta's 3/8 rule, of order 4: four evaluations a step."""

    method: ClassVar[str] = "rk4"


@dataclass(frozen=True)
class ODESolution:
    """Where a way along a velocity ended.

    Attributes:
        x: the points there, of the shape they had at its start.
        evaluations: how often the velocity was asked, for all rows at once; not counting the adjoint's way back.
        divergence: integral of the trace of the Jacobian from start to end, (N,): the log volume gained on the way.
        kinetic: integral of the squared speed, (N,), of either direction of time positive.
        jacobian: integral of the squared size of the Jacobian, or of its estimate, (N,); likewise.
    """

    x: Tensor
    evaluations: int
    divergence: Tensor | None = None
    kinetic: Tensor | None = None
    jacobian: Tensor | None = None


def integrate(
    velocity: Velocity, x: Tensor, start: float, end: float, solver: Solver, *, parameters: Sequence[Tensor] = ()
) -> ODESolution:
    """Follows a velocity from one time to another, forwards or backwards.

    Args:
        velocity: (t (), x (N, ...)) -> the shape of x.
        x: points, (N, ...).
        start: time at which they are given.
        end: time at which they are wanted.
        solver: such as ``Dopri5()``.
        parameters: tensors that the velocity depends on and that want gradients, for solvers with an adjoint.

    Returns:
        The points at the end, which carry gradients where these are enabled.

    Raises:
        FloatingPointError: where the solver's steps vanish, are too many, or lead to NaN or infinity.
        NotImplementedError: while a graph is captured.

    Example:
        >>> path = integrate(lambda t, x: -x, torch.ones(1, 2), 0.0, 1.0, RK4(10))
        >>> path.x, path.evaluations
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
    """Follows a velocity, and adds up its divergence on the way.

    Args:
        velocity: see `integrate`; each row's by that row alone.
        x: points, (N, ...).
        start: see `integrate`.
        end: see `integrate`.
        solver: see `integrate`.
        probes: (k, N, ...), the same all along the way, of mean 0 and covariance I; None takes the trace exactly, by as many
            pull-backs as there are coordinates.
        regularize: whether to add up the kinetic energy and the size of the Jacobian too.
        parameters: see `integrate`.

    Returns:
        The end, with `divergence` and, if asked for, `kinetic` and `jacobian`.

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
    vectors = _units(x) if probes is None else probes
    sign = 1.0 if end > start else -1.0

    def rates(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            kept = create_graph and state[0].requires_grad  # the start may be plain data
            at = state[0] if kept else state[0].detach().requires_grad_()
            v = velocity(t, at)
            rows = pull_back(v, at, vectors, create_graph=create_graph)
        if not create_graph:
            v, rows = v.detach(), rows.detach()
        terms = [(rows * vectors).flatten(2).sum(2)]
        if regularize:
            terms.append(sign * rows.square().flatten(2).sum(2))
        of_trace = [term.sum(0) if probes is None else term.mean(0) for term in terms]
        return v, *of_trace, *([sign * v.square().flatten(1).sum(1)] if regularize else [])

    wanted = torch.is_grad_enabled() and any(p.requires_grad for p in (x, *parameters))
    asked = torch.is_grad_enabled() and not wanted
    if asked:  # whether the velocity has parameters that were not told
        wanted = velocity(x.new_tensor(start), x).requires_grad
    zeros = [x.new_zeros(len(x)) for _ in range(3 if regularize else 1)]
    with torch.set_grad_enabled(wanted):
        (x, divergence, *penalties), evaluations = _solve(rates, (x, *zeros), start, end, solver, parameters)
    jacobian, kinetic = penalties or (None, None)
    return ODESolution(x, evaluations + asked, divergence, kinetic, jacobian)


def _units(x: Tensor) -> Tensor:
    """The unit vectors, for each row: (d, N, ...)."""
    d = x.shape[1:].numel()
    return torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:]).expand(d, *x.shape)


def _solve(
    rates: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
    start: float,
    end: float,
    solver: Solver,
    parameters: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], int]:
    """The state at the end, and how often its rates were asked for."""
    name = type(solver).__name__
    if get_proxy_mode() is not None or torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name} solves an ODE by steps that depend on values, and cannot be captured as a graph (make_fx, torch.compile). "
            "Leave this model uncaptured, or capture its velocity, which can be."
        )
    if not (isinstance(solver, Solver) and start != end):
        raise ValueError(f"An ODE wants a solver such as Dopri5() and two times, but found {solver!r}, {start} and {end}.")
    if not state[0].numel():
        return state, 0
    from torchdiffeq import odeint, odeint_adjoint  # which loads scipy

    evaluations, arrived, (low, high) = 0, False, sorted((start, end))

    def counted(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal evaluations
        evaluations += not arrived  # the adjoint goes on from there
        return rates(t.clamp(low, high), state)  # the first step is chosen by a look ahead, however far

    times = torch.tensor([start, end], dtype=torch.float64, device=state[0].device)
    arguments: dict[str, Any] = {"method": solver.method, "rtol": solver.rtol, "atol": solver.atol}
    try:
        if solver.adjoint and torch.is_grad_enabled():
            back = {**solver.options(times[0]), "norm": "seminorm"}  # Kidger et al. (arXiv 2009.09457)
            arguments |= {"adjoint_params": tuple(parameters), "adjoint_options": back}
            found = odeint_adjoint(counted, state, times, options=solver.options(times[1]), **arguments)
        else:
            found = odeint(counted, state, times, options=solver.options(times[1]), **arguments)
    except AssertionError as error:
        if not str(error).startswith(FAILURES):
            raise
        raise _failure(name, start, end, f"gave up ({str(error).splitlines()[0].split(':')[0]})") from error
    arrived = True
    ends = tuple(part[-1] for part in found)
    if not ends[0].isfinite().all():
        raise _failure(name, start, end, "came to NaN or infinite values")
    return ends, evaluations


def _failure(name: str, start: float, end: float, found: str) -> FloatingPointError:
    return FloatingPointError(
        f"{name} {found} on the way from time {start:g} to {end:g}: the velocity is too steep, or not finite. Look for NaN in "
        "its parameters; lower the learning rate; regularise it (kinetic, jacobian); or loosen the tolerances (rtol, atol), "
        "which in single precision should not be below 1e-6."
    )
