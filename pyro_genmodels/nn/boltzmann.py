r"""Boltzmann machines: coupled units, :math:`E(s) = -b^\top s - \tfrac12 s^\top J s`, some of them hidden and summed out.

In a *restricted* machine hidden units :math:`h \in \{0, 1\}^H` are coupled to visible ones only, so that

.. math:: E(v) = -b^\top (v - \mu) - \sum_j \log\bigl(2 \cosh \tfrac{a_j}{2}\bigr), \qquad a = c + W^\top (v - \mu),

and each side is independent given the other: a sweep draws all of h, then all of v. Centring visible units at the mean
:math:`\mu` of the data and hidden units at 1/2 only changes b and c, but speeds up learning: Montavon and Müller, *Deep
Boltzmann Machines and the Centering Trick* (2012). The annealing path
:math:`E_\beta(v) = -\beta\, b^\top (v - \mu) - \sum_j [\log(2 \cosh \tfrac{\beta a_j}{2}) - (1 - \beta) \log 2]`
has sweeps of the same form.

Visible units are zeros and ones; classes, one-hot; or real numbers, normal with variance 1 given the rest. Ackley, Hinton and
Sejnowski, *A Learning Algorithm for Boltzmann Machines* (1985); Smolensky (1986); for other units, Welling et al., *Exponential
Family Harmoniums* (2004).
"""

from __future__ import annotations

__all__ = ["BoltzmannMachine", "RestrictedBoltzmannMachine"]

from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from pyro_genmodels.nn.checks import check_count
from pyro_genmodels.nn.energies import EnergyChoice, Units
from pyro_genmodels.nn.precision import full_precision


@dataclass(frozen=True)
class RestrictedBoltzmannMachine(EnergyChoice):
    """A machine whose hidden units are coupled to the visible units only. Biases are linear in the context.

    Args:
        num_hidden: number of hidden units H.

    Raises:
        ValueError: if num_hidden is not positive.
    """

    num_hidden: int = 64

    def __post_init__(self) -> None:
        check_count("RestrictedBoltzmannMachine", num_hidden=self.num_hidden)

    def build(self, event_shape: Size, space: Units, context: int) -> nn.Module:
        return _Restricted(event_shape, space, context, self.num_hidden)


@dataclass(frozen=True)
class BoltzmannMachine(EnergyChoice):
    """A machine in which all units are coupled. Biases of the visible units are linear in the context.

    Args:
        num_hidden: number of hidden units H, at most 16: each energy is a sum over their 2^H states.

    Raises:
        ValueError: for another number of hidden units; by `build`, for data over real numbers.
    """

    num_hidden: int = 0

    def __post_init__(self) -> None:
        check_count("BoltzmannMachine", num_hidden=self.num_hidden, least=0)
        if self.num_hidden > 16:
            raise ValueError(
                f"BoltzmannMachine wants num_hidden from 0 to 16, because it sums over 2^num_hidden states, but found "
                f"{self.num_hidden}. RestrictedBoltzmannMachine(num_hidden=...) has no such limit."
            )

    def build(self, event_shape: Size, space: Units, context: int) -> nn.Module:
        if not space.is_discrete:
            raise ValueError(
                "BoltzmannMachine wants zeros and ones or classes, because over real numbers it is a Gaussian. Use "
                "RestrictedBoltzmannMachine or DenseEnergy, or give a discrete support."
            )
        return _General(event_shape, space, context, self.num_hidden)


class _Visible(nn.Module):
    """The visible units of a machine: their space and their biases, linear in the context."""

    def __init__(self, event_shape: Size, space: Units, context: int) -> None:
        super().__init__()
        self.space, self.num_units = space, space.position_shape(event_shape).numel()
        self.visible = nn.Parameter(torch.zeros(self.num_units))
        self.visible_context = nn.Linear(context, self.num_units, bias=False) if context else None

    def bias(self, context: Tensor | None) -> Tensor:
        """Return the biases b, (units,) or (n, units)."""
        return self.visible if self.visible_context is None else self.visible + self.visible_context(context)


class _Restricted(_Visible):
    centre: Tensor

    def __init__(self, event_shape: Size, space: Units, context: int, num_hidden: int) -> None:
        super().__init__(event_shape, space, context)
        self.num_hidden = num_hidden
        self.weight = nn.Parameter(torch.randn(self.num_units, num_hidden) * 0.01)
        self.hidden = nn.Parameter(torch.zeros(num_hidden))
        self.hidden_context = nn.Linear(context, num_hidden, bias=False) if context else None
        self.register_buffer("centre", torch.zeros(self.num_units))

    def _terms(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return b . (v - mu), (n,), and a, (n, H)."""
        v = x.reshape(len(x), -1) - self.centre
        a = torch.addmm(self.hidden, v, self.weight)
        return (v * self.bias(context)).sum(-1), a if self.hidden_context is None else a + self.hidden_context(context)

    @full_precision
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        linear, a = self._terms(x, context)
        return -linear - _log_cosh(a).sum(-1)

    @full_precision
    def tempered(self, x: Tensor, context: Tensor | None = None, *, beta: Tensor) -> Tensor:
        """Return E_beta, (..., n), for beta (..., n)."""
        linear, a = self._terms(x, context)
        return -beta * linear - _log_cosh(beta[..., None] * a).sum(-1) + (1 - beta) * self.num_hidden * log(2)

    @full_precision
    def gibbs(self, v: Tensor, context: Tensor | None, beta: Tensor, natural: Tensor) -> Tensor:
        """Return v (n, units) after one sweep at beta.

        Args:
            v: visible units, (n, units).
            context: (n, c) or None.
            beta: position on the annealing path, (n, 1).
            natural: natural parameters of the tilted start, (units,).
        """
        a = beta * self._terms(v, context)[1]
        h = (torch.rand_like(a) < a.sigmoid()).to(v)
        return self.space.draw(natural + beta * self._visible_field(h, context))

    def _visible_field(self, h: Tensor, context: Tensor | None) -> Tensor:
        """Return the natural parameters of v given h (n, H), without those of the start, (n, units)."""
        return self.bias(context) + (h - 0.5) @ self.weight.T

    @full_precision
    def log_sum_visible(self, h: Tensor, context: Tensor | None, natural: Tensor) -> Tensor:
        """Return the log of the sum over v of exp(natural . v) times the joint weight of v and h.

        Args:
            h: hidden states, (n, H).
            context: (n, c) or None.
            natural: natural parameters of the start, (units,). Over real v the sum is the mean under a standard normal.

        Returns:
            (n,).
        """
        field = self._visible_field(h, context)
        bias = self.hidden if self.hidden_context is None else self.hidden + self.hidden_context(context)
        return ((h - 0.5) * bias).sum(-1) - (field * self.centre).sum(-1) + self.space.log_sum(natural + field)


def _log_cosh(a: Tensor) -> Tensor:
    """Return log(2 cosh(a / 2)), the log of the sum of exp(a h) over h = -1/2 and 1/2."""
    return F.softplus(a) - a / 2


class _General(_Visible):
    states: Tensor
    coupled: Tensor

    def __init__(self, event_shape: Size, space: Units, context: int, num_hidden: int) -> None:
        super().__init__(event_shape, space, context)
        self.num_hidden = num_hidden
        total = self.num_units + num_hidden
        site = torch.arange(total)
        site[: self.num_units] //= self.space.width
        site[self.num_units :] += total  # hidden units are sites of their own
        self.couplings = nn.Parameter(torch.randn(total, total) * 0.01)
        self.hidden = nn.Parameter(torch.zeros(num_hidden)) if num_hidden else None
        self.register_buffer("coupled", (site[:, None] < site).to(torch.get_default_dtype()), persistent=False)
        states = torch.cartesian_prod(*[torch.arange(2)] * num_hidden) if num_hidden else torch.zeros(1, 0)
        self.register_buffer("states", states.reshape(2**num_hidden, num_hidden).to(self.coupled), persistent=False)

    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return J among visible units, between visible and hidden ones, and among hidden ones."""
        upper = self.couplings * self.coupled
        full, n = upper + upper.T, self.num_units
        return full[:n, :n], full[:n, n:], full[n:, n:]

    def _terms(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the terms of -E in v alone, (n,), and those in v and each state of the hidden units, (n, 2^H)."""
        visible, between, among = self.blocks()
        linear = (v * (self.bias(context) + 0.5 * v @ visible)).sum(-1)
        if self.hidden is None:
            return linear, v.new_zeros(len(v), 1)
        hidden_terms = self.states @ self.hidden + 0.5 * ((self.states @ among) * self.states).sum(-1)
        return linear, v @ between @ self.states.T + hidden_terms

    @full_precision
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        linear, joint = self._terms(x.reshape(len(x), -1), context)
        return -linear - joint.logsumexp(-1)

    @full_precision
    def tempered(self, x: Tensor, context: Tensor | None = None, *, beta: Tensor) -> Tensor:
        """Return E_beta, (..., n), for beta (..., n)."""
        linear, joint = self._terms(x.reshape(len(x), -1), context)
        return -beta * linear - (beta[..., None] * joint).logsumexp(-1) + (1 - beta) * self.num_hidden * log(2)

    @full_precision
    def gibbs(self, v: Tensor, context: Tensor | None, beta: Tensor, natural: Tensor) -> Tensor:
        """Return v after one sweep, as `_Restricted.gibbs`: hidden units at once, then visible sites in a random order."""
        visible, between, _ = self.blocks()
        field = self.bias(context)
        if self.hidden is not None:
            state = torch.multinomial((beta * self._terms(v, context)[1]).softmax(-1), 1).squeeze(-1)
            field = field + self.states[state] @ between.T
        v = v.clone()
        natural = natural + beta * field
        for i in torch.randperm(self.num_units // self.space.width).tolist():
            at = slice(i * self.space.width, (i + 1) * self.space.width)
            v[:, at] = self.space.draw(natural[:, at] + beta * (v @ visible[:, at]))
        return v
