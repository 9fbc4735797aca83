r"""Continuous flows: a network gives the velocity of points, which move from a base distribution at time 0 to data at time 1.

.. math:: \dot x = v(x, t, c), \qquad
    \log p(x \mid c) = \log p_0(x(0)) - \int_0^1 \operatorname{tr} \frac{\partial v}{\partial x}\, dt

Trained by `MaximumLikelihood`, which solves the ODE at each training step, or by `FlowMatching`, which does not. Chen et al.
(arXiv 1806.07366); Grathwohl et al. (arXiv 1810.01367); Lipman et al. (arXiv 2210.02747).
"""

from __future__ import annotations

__all__ = ["ODEFlow"]

from collections.abc import Sequence
from math import inf
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.ode import ContinuousFlow, Evaluations, Hutchinson, Trace
from pyro_genmodels.dynamics.ode import Dopri5, Solver
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.continuous import ContinuousFamily
from pyro_genmodels.families.family import Family, Standardize, StandardizeContext
from pyro_genmodels.nn.checks import is_number
from pyro_genmodels.nn.fields import DenseField, FieldChoice
from pyro_genmodels.utils.distributions import check_exact_density, is_real, without_validation
from pyro_genmodels.utils.errors import check_choice


class ODEFlow(ContinuousFamily):
    """A flow along the solutions of an ordinary differential equation.

    ``family.evaluations.last`` is the number of network evaluations in the last solution, ``family.evaluations.total`` the
    number in all solutions so far.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        network: velocity field: a choice, `DenseField()`, the default, or `UNet()`; or your own module, called as
            ``network(x, t, context)`` with x (n, *event_shape) of deviation 1, the time t (n,) and the embedded context (n, c)
            or None. It should be smooth: SiLU or tanh, not ReLU.
        solver: solver of the ODE: `Dopri5`, the default, `Dopri8`, `Euler`, `Midpoint` or `RK4`, each with an accuracy and with
            ``adjoint=True`` to save memory.
        trace: method for the trace of the Jacobian in densities: `ExactTrace`, or `Hutchinson`, with which the density is an
            estimate. By default the trace is exact for up to 16 coordinates.
        base: distribution at time 0: a Pyro distribution over one datum, or a family without a context, which
            `MaximumLikelihood` trains too unless it is frozen. It is over all real numbers, in units of the standardised data.
            Standard normal by default.
        kinetic: weight of the kinetic energy, a penalty in training by `MaximumLikelihood`, in nats per datum and unit of
            squared speed and time. It keeps trajectories straight and the ODE easy to solve. `log_prob` does not include it.
        jacobian: weight of the squared Frobenius norm of the Jacobian, used as `kinetic` is.
        support: set in which one coordinate lies; see `Family`.
        levels: number K of levels, for data that are integers 0 .. K - 1. The distribution is then `Dequantized`, over a
            flow on (0, K).
        standardize: see `Family`; by default "jointly" for a `UNet` and True otherwise.
        standardize_context: see `Family`.
        name: see `Family`.

    Raises:
        ValueError: if options do not go together.
        TypeError: if an argument is not one of its choices.

    Example:
        >>> from pyro_genmodels import ODEFlow
        >>> from pyro_genmodels.families import RK4
        >>> ODEFlow((2,), solver=RK4(8))().sample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        network: FieldChoice | nn.Module | None = None,
        solver: Solver | None = None,
        trace: Trace | None = None,
        base: Distribution | Family | None = None,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        support: constraints.Constraint = constraints.real,
        levels: int | None = None,
        standardize: Standardize | None = None,
        standardize_context: StandardizeContext = True,
        name: str | None = None,
    ) -> None:
        for weight, value in (("kinetic", kinetic), ("jacobian", jacobian)):
            if not is_number(value) or not 0 <= value < inf:
                raise ValueError(f"ODEFlow wants {weight} as a number of 0 or more, but found {value!r}.")
        network = check_choice("ODEFlow", "network", network, DenseField(), FieldChoice | nn.Module)
        if standardize is None:
            standardize = network.standardize if isinstance(network, FieldChoice) else True
        super().__init__(
            event_shape,
            context=context,
            support=support,
            levels=levels,
            standardize=standardize,
            standardize_context=standardize_context,
            name=name,
        )
        own = isinstance(network, nn.Module)
        self.network = network if own else network.build(self.event_shape, self.context_size)
        self.solver = check_choice("ODEFlow", "solver", solver, Dopri5(), Solver)
        self.trace = None if trace is None else check_choice("ODEFlow", "trace", trace, Hutchinson(), Trace)
        self.base = _checked_base(base, self.event_shape)
        self.kinetic, self.jacobian = kinetic, jacobian
        self.evaluations = Evaluations()

    def forward(self, context: Tensor | None = None) -> GenerativeDistribution:
        flow = ContinuousFlow(
            self.network,
            self._base_distribution(),
            self.event_shape,
            solver=self.solver,
            trace=self.trace,
            kinetic=self.kinetic if self.training else 0.0,
            jacobian=self.jacobian if self.training else 0.0,
            evaluations=self.evaluations,
            context=self.embed(context),
            support=self.support,
            pretransform=self.pretransform,
        )
        return self._over_data(flow)

    def _base_distribution(self) -> Distribution:
        if self.base is None:
            zero, one = torch.zeros_like(self.loc), torch.ones_like(self.loc)
            return dist.Normal(zero, one, validate_args=False).to_event(self.loc.dim())
        return without_validation(self.base if isinstance(self.base, Distribution) else self.base())


def _checked_base(base: Any, event_shape: torch.Size) -> Any:
    """Return the base if it is an exact density over events of real numbers that depends on no context."""
    if base is None:
        return None
    if isinstance(base, Family) and base.context is not None:
        raise ValueError("ODEFlow wants a base without a context. Give the context to the flow: its network is passed it.")
    distribution = check_exact_density("ODEFlow", "base", base, event_shape)
    support: Any = distribution.support
    while hasattr(support, "base_constraint"):  # of `independent`, and of mixtures
        support = support.base_constraint
    if not is_real(support):
        raise ValueError(
            f"ODEFlow wants a base over all real numbers, but found the support {distribution.support}. Transform the base, or "
            "leave it out for a standard normal."
        )
    return base
