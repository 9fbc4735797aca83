r"""Games between a model and a critic: what each minimises, given what the critic says of data and of the model's draws.

With v(x) the critic's output on data of law p and on draws of law q, a game is a pair of losses, in expectation

.. math:: L_{\text{critic}}(v_p, v_q), \qquad L_{\text{model}}(v_p, v_q),

both small where their player wins. Where the critic is at its best, v stands for the log density ratio :math:`\log p/q`
(`Game.log_ratio`) and the critic's loss for a divergence between p and q (`Game.divergence`), of which any critic gives a lower
bound. Both losses count both sides, data and draws: what a model minimises says something of data only where a guide draws
beside them.

Goodfellow et al., *Generative Adversarial Nets* (arXiv 1406.2661); Nowozin et al., *f-GAN* (arXiv 1606.00709).
"""

from __future__ import annotations

__all__ = ["FGAN", "WGAN", "AdversarialLoss", "Hinge", "LeastSquares", "Minimax", "NonSaturating", "Relativistic"]

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_genmodels.divergences import ConvexFunction, Divergence, JensenShannon
from pyro_genmodels.infer.adversarial.penalties import R1, R2, GradientPenalty, Penalty


@dataclass(frozen=True)
class AdversarialLoss(ABC):
    """Base of games. Of the critic's outputs `real`, on data, and `fake`, on draws, (rows,) each, row i is of a pair."""

    penalties: ClassVar[tuple[Penalty, ...]] = ()
    """What keeps the critic smooth, unless `Adversarial` is told otherwise."""
    decided: ClassVar[bool] = True
    """Whether a critic that has won for good shows in a loss of zero."""

    @property
    def estimates_ratio(self) -> bool:
        """Whether `log_ratio` has an answer."""
        return type(self).log_ratio is not AdversarialLoss.log_ratio

    @property
    def bounds(self) -> bool:
        """Whether `divergence` has an answer."""
        return type(self).divergence is not AdversarialLoss.divergence

    @abstractmethod
    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the critic minimises, one value for each row, (rows,)."""

    def model_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """What the model minimises, (rows,); by default the critic's loss with the sides swapped, so that its slope stays."""
        return self.critic_loss(fake, real)

    def log_ratio(self, v: Tensor) -> Tensor:
        """The log of the density ratio p/q that the output v of the best critic stands for.

        Raises:
            ValueError: in a game whose best critic is none.
        """
        raise ValueError(
            f"The critic of {type(self).__name__} does not estimate a density ratio. Use NonSaturating(), or FGAN with an f "
            "whose critic does, such as KullbackLeibler()."
        )

    def divergence(self, real: Tensor, fake: Tensor) -> Divergence:
        """The lower bound of a divergence between p and q that a critic's outputs on fresh data and draws prove, by its name.

        Raises:
            ValueError: in a game that bounds none.
        """
        raise ValueError(
            f"The critic of {type(self).__name__} bounds no divergence. Train one by FGAN(f), Minimax() or WGAN()."
        )


class _Logistic(AdversarialLoss):
    """A critic that is a classifier: its output is the log odds of data."""

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real) + F.softplus(fake)

    def log_ratio(self, v: Tensor) -> Tensor:
        return v

    def divergence(self, real: Tensor, fake: Tensor) -> Divergence:
        """Jensen-Shannon (nats)."""
        return FGAN(JensenShannon()).divergence(real, fake)


class Minimax(_Logistic):
    r"""The first game: :math:`\max_D \mathbb{E}_p \log D + \mathbb{E}_q \log(1 - D)`, :math:`D = \sigma(v)`, which the model
    minimises.

    At the best critic, :math:`D = p / (p + q)`, it is :math:`2\,\mathrm{JS}(p, q) - \log 4`. A model far from the data gets
    hardly any slope: `NonSaturating` is what one trains by.
    """

    def model_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return -self.critic_loss(real, fake)


class NonSaturating(_Logistic):
    r"""The critic of `Minimax`, and a model that maximises :math:`\mathbb{E}_q \log D` (Goodfellow et al., section 3)."""


class LeastSquares(AdversarialLoss):
    r"""Squared distances to 1 for data and 0 for draws. Mao et al., *Least Squares GANs* (arXiv 1611.04076).

    The best critic is p / (p + q) itself, cut here to within 1e-6 of its ends for `log_ratio`.
    """

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return ((real - 1).square() + fake.square()) / 2

    def log_ratio(self, v: Tensor) -> Tensor:
        return torch.logit(v, eps=1e-6)


class Hinge(AdversarialLoss):
    r"""Margins of 1: :math:`\max(0, 1 - v_p) + \max(0, 1 + v_q)`, against :math:`-v_q`.

    Lim and Ye, *Geometric GAN* (arXiv 1705.02894); with spectral normalisation Miyato et al. (arXiv 1802.05957).
    """

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def model_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return real - fake


class WGAN(AdversarialLoss):
    r"""The dual of optimal transport: :math:`W_1(p, q) = \sup_{|v|_L \le 1} \mathbb{E}_p v - \mathbb{E}_q v`.

    The critic must be kept to slopes of at most 1, by `GradientPenalty`, the default, or, up to a constant, `WeightClipping`.
    Arjovsky et al., *Wasserstein GAN* (arXiv 1701.07875).
    """

    penalties: ClassVar[tuple[Penalty, ...]] = (GradientPenalty(10.0),)
    decided: ClassVar[bool] = False

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real

    def divergence(self, real: Tensor, fake: Tensor) -> Divergence:
        """Wasserstein-1, in the units the critic sees, as far as the critic's slopes keep to 1.

        `GradientPenalty` sees to that but about; `WeightClipping` leaves the scale open, and the value says nothing.
        """
        return difference(real, fake)


@dataclass(frozen=True)
class FGAN(AdversarialLoss):
    r"""The variational bound of any f-divergence, with T = f.critic(v):

    .. math:: D_f(p \| q) \ge \mathbb{E}_p[T(x)] - \mathbb{E}_q[f^*(T(x))] .

    Args:
        f: the convex function, such as ``KullbackLeibler()``.
        saturating: whether the model minimises that bound itself; else it maximises :math:`\mathbb{E}_q[T]`, as Nowozin et al.
            do in practice (section 3.2).
    """

    f: ConvexFunction
    saturating: bool = True
    decided: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.f, ConvexFunction):
            raise TypeError(f"FGAN wants the f of an f-divergence, such as KullbackLeibler(), but found {self.f!r}.")

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.f.conjugate_of_critic(fake) - self.f.critic(real)

    def model_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        if self.saturating:
            return -self.critic_loss(real, fake)
        return self.f.critic(real) - self.f.critic(fake)

    @property
    def estimates_ratio(self) -> bool:
        try:
            self.f.log_ratio(torch.zeros(1))
        except ValueError:  # its critic tells none
            return False
        return True

    def log_ratio(self, v: Tensor) -> Tensor:
        return self.f.log_ratio(v)

    def divergence(self, real: Tensor, fake: Tensor) -> Divergence:
        """The f-divergence."""
        return difference(self.f.critic(real), self.f.conjugate_of_critic(fake))


class Relativistic(AdversarialLoss):
    r"""Pairs: :math:`\mathrm{softplus}(-(v_p - v_q))` for the critic, who wants each datum above a draw, and its mirror image.

    With the penalties `R1` and `R2`, its default, training converges locally: Huang et al., *The GAN is dead; long live the
    GAN!* (R3GAN, arXiv 2501.05441); Jolicoeur-Martineau (arXiv 1807.00734).
    """

    penalties: ClassVar[tuple[Penalty, ...]] = (R1(0.1), R2(0.1))

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real)


def difference(real: Tensor, fake: Tensor) -> Divergence:
    """E[real] - E[fake] from independent values, with its standard error."""
    error = (real.detach().var() / len(real) + fake.detach().var() / len(fake)).sqrt()
    return Divergence(real.mean() - fake.mean(), error)
