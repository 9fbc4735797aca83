r"""Boltzmann machines: units in pairs, :math:`E(s) = -b^\top s - \tfrac12 s^\top J s`, some of them hidden and summed out.

In a *restricted* machine hidden units :math:`h \in \{0, 1\}^H` are joined to visible ones only, so that

.. math:: E(v) = -b^\top (v - \mu) - \sum_j \log\bigl(2 \cosh \tfrac{a_j}{2}\bigr), \qquad a = c + W^\top (v - \mu),

and each side is independent given the other: a sweep draws all of h, then all of v. With :math:`\mu` the mean of the data and
hidden units about 1/2 (a change of b and c, and no other machine) it learns far better: Montavon and Müller, *Deep Boltzmann
Machines and the Centering Trick* (2012). On the path to it
:math:`E_\beta(v) = -\beta\, b^\top (v - \mu) - \sum_j [\log(2 \cosh \tfrac{\beta a_j}{2}) - (1 - \beta) \log 2]`, whose
sweeps are as easy.

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

from pyro_genmodels.nn.energies import EnergyChoice


@dataclass(frozen=True)
class RestrictedBoltzmannMachine(EnergyChoice):
    """Hidden zeros and ones, joined to the visible units and not to each other; biases are linear in the context.

    Args:
        num_hidden: H.

    Raises:
        ValueError: if it is not positive.
    """

    num_hidden: int = 64

    def __post_init__(self) -> None:
        if self.num_hidden < 1:
            raise ValueError(f"RestrictedBoltzmannMachine wants hidden units, but found num_hidden={self.num_hidden}.")

    def build(self, shape: Size, kind: str, context: int) -> nn.Module:
        return _Restricted(shape, kind, context, self.num_hidden)


@dataclass(frozen=True)
class BoltzmannMachine(EnergyChoice):
    """Visible units joined to each other, and hidden ones joined to all; biases of the visible are linear in the context.

    Args:
        num_hidden: hidden units, over whose 2^H states each energy is a sum: at most 16.

    Raises:
        ValueError: on more hidden units; by `build`, over real numbers.
    """

    num_hidden: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.num_hidden <= 16:
            raise ValueError(
                f"BoltzmannMachine sums over the states of its hidden units, of which there can be 0 to 16, but found "
                f"{self.num_hidden}. RestrictedBoltzmannMachine(num_hidden=...) has as many as you like."
            )

    def build(self, shape: Size, kind: str, context: int) -> nn.Module:
        if kind == "real":
            raise ValueError(
                "BoltzmannMachine is of zeros and ones or of classes: over real numbers it is a Gaussian. Use "
                "RestrictedBoltzmannMachine or DenseEnergy, or give a discrete support."
            )
        return _General(shape, kind, context, self.num_hidden)


class _Visible(nn.Module):
    """What both kinds of machine say of visible units: their biases, and how they are drawn from natural parameters."""

    def __init__(self, shape: Size, kind: str, context: int) -> None:
        super().__init__()
        self.kind, self.units = kind, shape.numel()
        self.classes = shape[-1] if kind == "categorical" else 1
        self.visible = nn.Parameter(torch.zeros(self.units))
        self.visible_context = nn.Linear(context, self.units, bias=False) if context else None

    def bias(self, context: Tensor | None) -> Tensor:
        """b, (units,) or (n, units)."""
        return self.visible if self.visible_context is None else self.visible + self.visible_context(context)

    def draw(self, natural: Tensor) -> Tensor:
        """Units (n, units) given natural parameters (n, units): log odds, logits or means."""
        if self.kind == "binary":
            return (torch.rand_like(natural) < natural.sigmoid()).to(natural)
        if self.kind == "real":
            return natural + torch.randn_like(natural)
        logits = natural.unflatten(-1, (-1, self.classes))
        gumbel = -torch.empty_like(logits).exponential_().log()
        return F.one_hot((logits + gumbel).argmax(-1), self.classes).to(natural).flatten(-2)


class _Restricted(_Visible):
    centre: Tensor

    def __init__(self, shape: Size, kind: str, context: int, num_hidden: int) -> None:
        super().__init__(shape, kind, context)
        self.num_hidden = num_hidden
        self.weight = nn.Parameter(torch.randn(self.units, num_hidden) * 0.01)
        self.hidden = nn.Parameter(torch.zeros(num_hidden))
        self.hidden_context = nn.Linear(context, num_hidden, bias=False) if context else None
        self.register_buffer("centre", torch.zeros(self.units))

    def _terms(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """What v says by itself, (n,), and a, (n, H)."""
        v = x.reshape(len(x), -1) - self.centre
        a = torch.addmm(self.hidden, v, self.weight)
        return (v * self.bias(context)).sum(-1), a if self.hidden_context is None else a + self.hidden_context(context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        own, a = self._terms(x, context)
        return -own - _log_cosh(a).sum(-1)

    def tempered(self, x: Tensor, context: Tensor | None = None, *, beta: Tensor) -> Tensor:
        """E_beta, (..., n), for beta (..., n)."""
        own, a = self._terms(x, context)
        return -beta * own - _log_cosh(beta[..., None] * a).sum(-1) + (1 - beta) * self.num_hidden * log(2)

    def gibbs(self, v: Tensor, context: Tensor | None, beta: Tensor, natural: Tensor | float) -> Tensor:
        """V (n, units) after a sweep at beta (n, 1), where the tilted start has the given natural parameters."""
        a = beta * self._terms(v, context)[1]
        h = (torch.rand_like(a) < a.sigmoid()).to(v)
        return self.draw(natural + beta * self._given(h, context))

    def _given(self, h: Tensor, context: Tensor | None) -> Tensor:
        """What h (n, H) adds to the natural parameters of v, (n, units)."""
        return self.bias(context) + (h - 0.5) @ self.weight.T

    def log_sum_visible(self, h: Tensor, context: Tensor | None, natural: Tensor | float) -> Tensor:
        """Log of the sum over v of exp(natural . v) times the joint weight of v and h, (n,) for h (n, H).

        Over real v it is the mean under a standard normal.
        """
        field = self._given(h, context)
        logits = natural + field
        if self.kind == "real":
            visible = 0.5 * logits.square()
        elif self.kind == "binary":
            visible = F.softplus(logits)
        else:
            visible = logits.unflatten(-1, (-1, self.classes)).logsumexp(-1)
        bias = self.hidden if self.hidden_context is None else self.hidden + self.hidden_context(context)
        return ((h - 0.5) * bias).sum(-1) - (field * self.centre).sum(-1) + visible.sum(-1)


def _log_cosh(a: Tensor) -> Tensor:
    """log(2 cosh(a / 2)): of exp(a h) summed over h = -1/2 and 1/2."""
    return F.softplus(a) - a / 2


class _General(_Visible):
    states: Tensor
    joined: Tensor

    def __init__(self, shape: Size, kind: str, context: int, num_hidden: int) -> None:
        super().__init__(shape, kind, context)
        self.num_hidden = num_hidden
        total = self.units + num_hidden
        site = torch.arange(total)
        site[: self.units] //= self.classes
        site[self.units :] += total  # hidden units are sites of their own
        self.pairs = nn.Parameter(torch.randn(total, total) * 0.01)
        self.hidden = nn.Parameter(torch.zeros(num_hidden)) if num_hidden else None
        self.register_buffer("joined", (site[:, None] < site).to(torch.get_default_dtype()), persistent=False)
        states = torch.cartesian_prod(*[torch.arange(2)] * num_hidden) if num_hidden else torch.zeros(1, 0)
        self.register_buffer("states", states.reshape(2**num_hidden, num_hidden).to(self.joined), persistent=False)

    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """J among visible units, between visible and hidden ones, and among hidden ones."""
        upper = self.pairs * self.joined
        full, n = upper + upper.T, self.units
        return full[:n, :n], full[:n, n:], full[n:, n:]

    def _terms(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """What v says by itself, (n,), and with each state of the hidden units, (n, 2^H)."""
        visible, between, among = self.blocks()
        own = (v * (self.bias(context) + 0.5 * v @ visible)).sum(-1)
        if self.hidden is None:
            return own, v.new_zeros(len(v), 1)
        of_states = self.states @ self.hidden + 0.5 * ((self.states @ among) * self.states).sum(-1)
        return own, v @ between @ self.states.T + of_states

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        own, joint = self._terms(x.reshape(len(x), -1), context)
        return -own - joint.logsumexp(-1)

    def tempered(self, x: Tensor, context: Tensor | None = None, *, beta: Tensor) -> Tensor:
        """E_beta, (..., n), for beta (..., n)."""
        own, joint = self._terms(x.reshape(len(x), -1), context)
        return -beta * own - (beta[..., None] * joint).logsumexp(-1) + (1 - beta) * self.num_hidden * log(2)

    def gibbs(self, v: Tensor, context: Tensor | None, beta: Tensor, natural: Tensor | float) -> Tensor:
        """As `_Restricted.gibbs`: all hidden units at once, then the visible sites one by one in a random order."""
        visible, between, _ = self.blocks()
        field = self.bias(context)
        if self.hidden is not None:
            chosen = torch.multinomial((beta * self._terms(v, context)[1]).softmax(-1), 1).squeeze(-1)
            field = field + self.states[chosen] @ between.T
        v = v.clone()
        natural = natural + beta * field
        for i in torch.randperm(self.units // self.classes).tolist():
            at = slice(i * self.classes, (i + 1) * self.classes)
            v[:, at] = self.draw(natural[:, at] + beta * (v @ visible[:, at]))
        return v
