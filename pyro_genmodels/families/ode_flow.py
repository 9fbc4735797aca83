r"""Continuous flows as a family: a network says where points move, from a base distribution at time 0 to the data at time 1.

.. math:: \dot x = v(x, t, c), \qquad
    \log p(x \mid c) = \log p_0(x(0)) - \int_0^1 \operatorname{tr} \frac{\partial v}{\partial x}\, dt

Trained by `MaximumLikelihood`, which solves the ODE at each step, or by `FlowMatching`, which does not. Chen et al. (arXiv
1806.07366); Grathwohl et al. (arXiv 1810.01367); Lipman et al. (arXiv 2210.02747).
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
from pyro_genmodels.families.family import Family, Standardize
from pyro_genmodels.nn.fields import DenseField, UNet
from pyro_genmodels.utils.distributions import density_of, is_real, without_validation
from pyro_genmodels.utils.errors import check_choice


class ODEFlow(ContinuousFamily):
    """A flow by an ordinary differential equation.

    ``family.evaluations.last`` says how often the network was asked in the last solution, and ``.total`` in all.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        network: the velocity: a choice, `DenseField()` or `UNet()`; or a module of your own, called as
            ``network(x, t, context)`` with x (n, *event_shape) of deviation 1, the time t (n,) and the embedded context (n, c)
            or None. It should be smooth: SiLU or tanh, not ReLU.
        solver: of the ODE: `Dopri5`, `Dopri8`, `Euler`, `Midpoint` or `RK4`, each with its accuracy and, where memory is short,
            ``adjoint=True``.
        trace: of the Jacobian in densities: `ExactTrace` or `Hutchinson`, whose density is an estimate; by default exact up to
            16 coordinates.
        base: of the start: a Pyro distribution over one datum, or a family without a context, which is trained along by
            `MaximumLikelihood` unless frozen; over all reals, in units of the standardised data. Standard normal by default.
        kinetic: weight of the kinetic energy, which keeps ways straight and the ODE easy, in training by `MaximumLikelihood`:
            nats per datum, unit of squared speed and time. Not in `log_prob`, nor in evaluation mode.
        jacobian: weight of the squared size of the Jacobian; likewise.
        support: where one coordinate lies; see `Family`.
        levels: with K given, data are integers 0 .. K - 1, and the flow is a `Dequantized` density.
        standardize: see `Family`; by default jointly for a `UNet`, and in each coordinate else.
        name: see `Family`.

    Raises:
        ValueError: on options that do not go together.
        TypeError: for a choice that is none.

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
        network: DenseField | UNet | nn.Module | None = None,
        solver: Solver | None = None,
        trace: Trace | None = None,
        base: Distribution | Family | None = None,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        support: constraints.Constraint = constraints.real,
        levels: int | None = None,
        standardize: Standardize | None = None,
        name: str | None = None,
    ) -> None:
        if not (0 <= kinetic < inf and 0 <= jacobian < inf):
            raise ValueError(f"ODEFlow wants weights of 0 or more, but found kinetic={kinetic}, jacobian={jacobian}.")
        standardize = ("jointly" if isinstance(network, UNet) else True) if standardize is None else standardize
        super().__init__(event_shape, context=context, support=support, levels=levels, standardize=standardize, name=name)
        network = check_choice("ODEFlow", "network", network, DenseField(), DenseField | UNet | nn.Module)
        self.network = network if isinstance(network, nn.Module) else network.build(self.event_shape, self.context_size)
        self.solver = check_choice("ODEFlow", "solver", solver, Dopri5(), Solver)
        self.trace = None if trace is None else check_choice("ODEFlow", "trace", trace, Hutchinson(), Trace)
        self.base = _checked_base(base, self.event_shape)
        self.kinetic, self.jacobian = kinetic, jacobian
        self.evaluations = Evaluations()

    def forward(self, context: Tensor | None = None) -> GenerativeDistribution:
        flow = ContinuousFlow(
            self.network,
            self._start(),
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
        return self._of_data(flow)

    def _start(self) -> Distribution:
        if self.base is None:
            zero, one = torch.zeros_like(self.loc), torch.ones_like(self.loc)
            return dist.Normal(zero, one, validate_args=False).to_event(self.loc.dim())
        return without_validation(self.base() if isinstance(self.base, Family) else self.base)


def _checked_base(base: Any, event_shape: torch.Size) -> Any:
    if base is None:
        return None
    if not isinstance(base, (Distribution, Family)):
        given = f"the class {base.__name__}; call it" if isinstance(base, type) else repr(base)
        raise TypeError(f"ODEFlow wants a Pyro distribution or a family as its base, but found {given}.")
    if isinstance(base, Family) and base.context is not None:
        raise ValueError("ODEFlow wants a base without a context: what depends on the context is for the velocity to say.")
    law: Any = base() if isinstance(base, Family) else base
    if law.batch_shape or law.event_shape != event_shape:
        raise ValueError(
            f"ODEFlow wants a base over events {tuple(event_shape)}, but found batch shape {tuple(law.batch_shape)} and event "
            f"shape {tuple(law.event_shape)}. See base.expand({tuple(event_shape)}).to_event({len(event_shape)})."
        )
    support = law.support
    while hasattr(support, "base_constraint"):  # of mixtures too
        support = support.base_constraint
    if not is_real(support):
        raise ValueError(f"ODEFlow wants a base over all reals, but this one has the support {law.support}.")
    density, advice = density_of(law)
    if density != "exact":
        raise ValueError(f"ODEFlow starts from an exact density, but that of the base is: {density}. {advice}")
    return base
