r"""Adversarial losses: a pair of losses for a model and a critic, as functions of the critic's outputs.

With the critic's output v(x) on real inputs of distribution p and on fake inputs of distribution q, an adversarial loss is

.. math:: L_{\text{critic}}(v_p, v_q), \qquad L_{\text{model}}(v_p, v_q)

in expectation. At the optimal critic, v determines the log density ratio :math:`\log p/q` (`AdversarialLoss.log_ratio`), and
the critic's loss determines a divergence of p and q (`AdversarialLoss.divergence`), for which any critic gives a lower bound.
Both losses have a term for real and a term for fake inputs. The model's term for real inputs matters only if they depend on a
guide.

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
from pyro_genmodels.utils.pareto import pareto_k
from pyro_genmodels.utils.precision import in_doubles


@dataclass(frozen=True)
class AdversarialLoss(ABC):
    """Base class of adversarial losses.

    The critic's outputs `real` and `fake`, on real and fake inputs, have shape (rows,). Row i of both is a pair.
    """

    penalties: ClassVar[tuple[Penalty, ...]] = ()
    """Penalties on the critic, if `Adversarial` is given none."""
    zero_when_won: ClassVar[bool] = True
    """True if the loss of a critic that separates real and fake inputs completely is 0."""

    @property
    def estimates_ratio(self) -> bool:
        """True if `log_ratio` is available."""
        return type(self).log_ratio is not AdversarialLoss.log_ratio

    @property
    def bounds_divergence(self) -> bool:
        """True if `divergence` is available."""
        return type(self).divergence is not AdversarialLoss.divergence

    @abstractmethod
    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the loss of the critic for each row, (rows,)."""

    def model_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the loss of the model for each row, (rows,).

        By default it is the critic's loss with real and fake swapped, whose gradient does not vanish.
        """
        return self.critic_loss(fake, real)

    def log_ratio(self, v: Tensor) -> Tensor:
        """Return the log density ratio log p/q (nats) for outputs v of the optimal critic.

        Raises:
            ValueError: if the optimal critic does not determine the ratio.
        """
        raise ValueError(
            f"The critic of {type(self).__name__} does not estimate a density ratio. Use NonSaturating(), or FGAN with an f "
            "whose critic does, such as KullbackLeibler()."
        )

    def divergence(self, real: Tensor, fake: Tensor) -> Divergence:
        """Return a lower bound of a divergence between p and q, from a critic's outputs on held-out data and new samples.

        Raises:
            ValueError: if the loss bounds no divergence.
        """
        raise ValueError(
            f"The critic of {type(self).__name__} bounds no divergence. Train one by FGAN(f), Minimax() or WGAN()."
        )


class _Logistic(AdversarialLoss):
    """Base class of losses whose critic is a classifier: its output is the log odds that an input is real."""

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real) + F.softplus(fake)

    def log_ratio(self, v: Tensor) -> Tensor:
        return v

    def divergence(self, real: Tensor, fake: Tensor) -> Divergence:
        """Return a lower bound of the Jensen-Shannon divergence (nats)."""
        return FGAN(JensenShannon()).divergence(real, fake)


class Minimax(_Logistic):
    r"""The original loss: :math:`\min_q \max_D \mathbb{E}_p \log D + \mathbb{E}_q \log(1 - D)`, with :math:`D = \sigma(v)`.

    At the optimal critic, :math:`D = p / (p + q)`, it is :math:`2\,\mathrm{JS}(p, q) - \log 4`. Its gradient vanishes for a
    model far from the data; `NonSaturating` is better for training.
    """

    def model_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return -self.critic_loss(real, fake)


class NonSaturating(_Logistic):
    r"""The critic's loss of `Minimax`; the model maximises :math:`\mathbb{E}_q \log D` (Goodfellow et al., section 3)."""


class LeastSquares(AdversarialLoss):
    r"""Squared distances to 1 for real and to 0 for fake inputs. Mao et al., *Least Squares GANs* (arXiv 1611.04076).

    The optimal critic is p / (p + q). `log_ratio` clips it to [1e-6, 1 - 1e-6].
    """

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return ((real - 1).square() + fake.square()) / 2

    def log_ratio(self, v: Tensor) -> Tensor:
        return torch.logit(v, eps=1e-6)


class Hinge(AdversarialLoss):
    r"""Hinge loss :math:`\max(0, 1 - v_p) + \max(0, 1 + v_q)` of the critic, and :math:`-v_q` of the model.

    Lim and Ye, *Geometric GAN* (arXiv 1705.02894); with spectral normalisation Miyato et al. (arXiv 1802.05957).
    """

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real) + F.relu(1 + fake)

    def model_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return real - fake


class WGAN(AdversarialLoss):
    r"""The dual of optimal transport: :math:`W_1(p, q) = \sup_{|v|_L \le 1} \mathbb{E}_p v - \mathbb{E}_q v`.

    The critic must have a Lipschitz constant of at most 1: by `GradientPenalty`, the default, or up to a factor by
    `WeightClipping`.
    Arjovsky et al., *Wasserstein GAN* (arXiv 1701.07875).
    """

    penalties: ClassVar[tuple[Penalty, ...]] = (GradientPenalty(10.0),)
    zero_when_won: ClassVar[bool] = False

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real

    def divergence(self, real: Tensor, fake: Tensor) -> Divergence:
        """Return a lower bound of the Wasserstein-1 distance, in the units of the critic's inputs.

        It is valid as far as the critic's gradient is at most 1. With `GradientPenalty` that holds approximately; with
        `WeightClipping` the scale is arbitrary, and the value has no meaning.
        """
        return difference(real, fake)


@dataclass(frozen=True)
class FGAN(AdversarialLoss):
    r"""The variational bound of any f-divergence, with T = f.critic(v):

    .. math:: D_f(p \| q) \ge \mathbb{E}_p[T(x)] - \mathbb{E}_q[f^*(T(x))] .

    Args:
        f: convex function, such as ``KullbackLeibler()``.
        saturating: True if the model minimises the bound itself. Otherwise it maximises :math:`\mathbb{E}_q[T]`, as Nowozin et
            al. do in practice (section 3.2).
    """

    f: ConvexFunction
    saturating: bool = True
    zero_when_won: ClassVar[bool] = False

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
        except ValueError:
            return False
        return True

    def log_ratio(self, v: Tensor) -> Tensor:
        return self.f.log_ratio(v)

    def divergence(self, real: Tensor, fake: Tensor) -> Divergence:
        """Return a lower bound of the f-divergence."""
        return difference(self.f.critic(real), self.f.conjugate_of_critic(fake))


class Relativistic(AdversarialLoss):
    r"""Loss of pairs: :math:`\mathrm{softplus}(-(v_p - v_q))` for the critic, and with real and fake swapped for the model.

    With the penalties `R1` and `R2`, the default, training converges locally: Huang et al., *The GAN is dead; long live the
    GAN!* (R3GAN, arXiv 2501.05441); Jolicoeur-Martineau (arXiv 1807.00734).
    """

    penalties: ClassVar[tuple[Penalty, ...]] = (R1(0.1), R2(0.1))

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real)


def difference(real: Tensor, fake: Tensor) -> Divergence:
    """Return the estimate of E[real] - E[fake] from independent values, with its standard error and k-hat of both tails.

    Raises:
        ValueError: for fewer than 2 values, and for values with NaN or infinity.
    """
    for name, values in (("real", real), ("fake", fake)):
        if len(values) < 2 or not values.detach().isfinite().all():
            raise ValueError(
                f"A divergence wants 2 or more finite outputs of a critic, but found {int((~values.isfinite()).sum())} with "
                f"NaN or infinity among the {len(values)} on {name} inputs."
            )
    value = in_doubles(real).mean() - in_doubles(fake).mean()
    error = torch.stack([in_doubles(values.detach()).var() / len(values) for values in (real, fake)]).sum().sqrt()
    k = torch.stack([pareto_k(values.detach().abs().log()) for values in (real, fake)]).max()
    return Divergence(value.to(real.dtype), error.to(real), k, min(len(real), len(fake)))
