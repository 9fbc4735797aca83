r"""Adversarial training: a model and a critic who tells its draws from data, in turn.

.. math:: \theta \leftarrow \theta - \eta\, \nabla_\theta L_{\text{model}}(v_\phi), \qquad
    \phi \leftarrow \phi - \eta'\, \nabla_\phi \bigl(L_{\text{critic}}(v_\phi) + R(v_\phi)\bigr)

Gradients flow to nothing but the player whose turn it is. Which losses: `games`; what the critic sees: `pairing`; what keeps
it smooth: `penalties`. Goodfellow et al. (arXiv 1406.2661); packing: Lin et al., *PacGAN* (arXiv 1712.04086).
"""

from __future__ import annotations

__all__ = ["Adversarial", "LostGameError"]

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from math import isfinite
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.divergences import Divergence
from pyro_genmodels.infer.adversarial.losses import AdversarialLoss, Relativistic
from pyro_genmodels.infer.adversarial.pairings import JointPairing, ObservationsPairing, Pairing, PosteriorPairing, RealAndFake
from pyro_genmodels.infer.adversarial.penalties import R1, Penalty
from pyro_genmodels.optim.adapters import Optim, make_optimizer
from pyro_genmodels.optim.averaging import TrainedWeights, moving_average
from pyro_genmodels.utils.errors import check_choice, listed

KEEP_EVERY = 100
"""Steps between two copies of the last good state."""
LOST_GAME_RATIO = 1e-3
"""The share of an indifferent critic's loss below which a game is lost, if it stays there for `KEEP_EVERY` steps."""


class LostGameError(FloatingPointError):
    """A game that exploded, or that the critic has won for good. The players are back in their last good state."""


class Adversarial:
    """Trains a Pyro model, and a guide, against a critic. Its verbs are those of `SVI`.

    Args:
        model: any model that observes data in a `pyro.plate`, called as ``model(x)`` or ``model(x, context)``. It is run
            without its observations; where its draws carry no gradient, the score function does.
        critic: a module (rows, ...) -> (rows,) of what it is shown, by default ``critic(x)`` or ``critic(x, context)``; such as
            a `GAN`'s ``.critic``.
        objective: the game, by default `Relativistic` with its penalties (R3GAN).
        optim: parameters -> torch optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-4)``, or one of Pyro's; or a
            pair of these, for the model and for the critic. By default Adam at a step of 1e-3 without momentum (betas 0 and
            0.99).
        guide: of the model's latent variables; see `JointPairing`, `AggregatePairing` and `PosteriorPairing`.
        pairing: what the critic is to tell apart: `ObservationsPairing`, or with a guide and nothing beside by default `JointPairing`.
        penalties: on the critic; by default the game's own.
        num_critic_steps: steps of the critic for one of the model, on the same data and fresh draws.
        pack: rows that the critic sees at once, as (rows / pack, pack, ...); by default what the critic's attribute `pack`
            says, or 1.
        beside: another Pyro loss of model and guide, which the game is added to, in nats per row: the ELBO makes a VAE-GAN.
        weight: of the game beside it.
        ema_decay: decay per step of a moving average of model and guide, for `averaged`; None keeps none.

    Raises:
        TypeError: for a choice that is none.
        ValueError: for numbers that are not positive.

    Example:
        >>> from pyro_genmodels import GAN, Adversarial
        >>> gan, x = GAN((2,)), torch.randn(64, 2)
        >>> game = Adversarial(gan.model, gan.critic)
        >>> sorted(game.step(x))
        ['critic', 'generator']
    """

    def __init__(
        self,
        model: Callable[..., Any],
        critic: nn.Module,
        objective: AdversarialLoss | None = None,
        optim: Optim | tuple[Optim, Optim] = None,
        *,
        guide: Callable[..., Any] | None = None,
        pairing: Pairing | None = None,
        penalties: Sequence[Penalty] | None = None,
        num_critic_steps: int = 1,
        pack: int | None = None,
        beside: ELBO | None = None,
        weight: float = 1.0,
        ema_decay: float | None = None,
    ) -> None:
        if not callable(model) or hasattr(model, "event_shape"):  # a family is no model, but has one
            raise TypeError(f"Adversarial wants a model, such as gan.model, but found {type(model).__name__}.")
        if not isinstance(critic, nn.Module):
            raise TypeError(f"Adversarial wants a critic that is a torch.nn.Module, such as gan.critic, but found {critic!r}.")
        default = JointPairing() if guide is not None and beside is None else ObservationsPairing()
        self.model, self.guide, self.critic = model, guide or traces.no_latents, critic
        self.objective: AdversarialLoss = check_choice("Adversarial", "objective", objective, Relativistic(), AdversarialLoss)
        self.pairing: Pairing = check_choice("Adversarial", "pairing", pairing, default, Pairing)
        if guide is not None and beside is None and isinstance(self.pairing, ObservationsPairing):
            raise ValueError(
                "ObservationsPairing() has no use for a guide: pass beside=Trace_ELBO(), or pairing=JointPairing()."
            )
        penalties = self.objective.penalties if penalties is None else penalties
        self.penalties = (penalties,) if isinstance(penalties, Penalty) else tuple(penalties)
        for penalty in self.penalties:
            check_choice("Adversarial", "penalty", penalty, R1(), Penalty)
        if not (beside is None or isinstance(beside, ELBO)):
            raise TypeError(f"Adversarial wants a Pyro loss beside the game, such as Trace_ELBO(), but found {beside!r}.")
        self.beside: Any = beside
        self.pack = getattr(critic, "pack", 1) if pack is None else pack
        for name, value in (("num_critic_steps", num_critic_steps), ("pack", self.pack)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Adversarial wants {name} as a positive integer, but found {value!r}.")
        if isinstance(self.pairing, PosteriorPairing) and not self.objective.estimates_ratio:
            raise ValueError(
                f"Posterior wants a critic that estimates a log ratio, but that of {type(self.objective).__name__} does not. "
                "Use NonSaturating()."
            )
        if self.pack > 1 and isinstance(self.pairing, PosteriorPairing):
            raise ValueError("Posterior wants the critic's log ratio of single rows, but this critic sees packs. Use pack=1.")
        if ema_decay is not None:
            moving_average(ema_decay)  # checks it
        if isinstance(optim, list | tuple) and len(optim) != 2:
            raise ValueError(f"Adversarial wants one optimiser for both players, or a pair, but found {len(optim)}.")
        if weight != 1.0 and beside is None:
            raise ValueError(f"weight={weight} is that of the game beside another loss: pass beside=, or leave it out.")
        if not (isfinite(weight) and weight > 0):
            raise ValueError(f"Adversarial wants a positive weight of the game, but found {weight!r}.")
        self.num_critic_steps, self.weight, self.ema_decay = num_critic_steps, weight, ema_decay
        self.optims = tuple(optim) if isinstance(optim, list | tuple) else (optim, optim)
        self.steps, self._lost = 0, 0
        self._ready = False

    # SVI's verbs.

    def step(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """One step of each player, as many of the critic as were asked for.

        Args:
            args: of the model and guide; the first is a batch of data.
            kwargs: likewise.

        Returns:
            What each player lost by the game before its step, per row; of the model with what stands beside.

        Raises:
            GameOverError: if a loss or gradient is not finite, or the critic's loss has been as good as zero for 100 steps.
        """
        self.prepare(*args, **kwargs)
        for _ in range(self.num_critic_steps - 1):
            with torch.no_grad():
                sides = self.pairing.sides(self.model, self.guide, args, kwargs)
            self._critic_step(sides)
        sides = self.pairing.sides(self.model, self.guide, args, kwargs)
        critic = self._critic_step(sides)
        loss = self._model_loss(sides, args, kwargs)
        self._update("generator", loss)
        self.weights.update()
        self.steps += 1
        self._watch(critic)
        return {"generator": loss.item(), "critic": critic}

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What `step` would say, without a step; both players look on, in evaluation mode."""
        with handlers.side_effect_free():
            sides = self.pairing.sides(self.model, self.guide, args, kwargs)
            real, fake = self._outputs(sides)
            loss = self._model_loss(sides, args, kwargs)
            return {"generator": loss.item(), "critic": self.objective.critic_loss(real, fake).mean().item()}

    # What is known of the game.

    def play(self, *args: Any, **kwargs: Any) -> tuple[RealAndFake, tuple[Tensor, Tensor]]:
        """What is put before the critic of data and fresh draws, and what it says of both, (rows,) each; nobody learns."""
        with handlers.side_effect_free():
            sides = self.pairing.sides(self.model, self.guide, args, kwargs)
            return sides, self._outputs(sides)

    def divergence(self, *args: Any, **kwargs: Any) -> Divergence:
        """The lower bound of the game's divergence that the critic proves on data, best held out, and as many fresh draws.

        Raises:
            ValueError: in a game that bounds none, and of a critic that sees packs, whose bound is of the laws of packs.
        """
        if self.pack > 1:
            raise ValueError(f"This critic sees {self.pack} rows at once, and bounds the divergence of packs. Use pack=1.")
        return self.objective.divergence(*self.play(*args, **kwargs)[1])

    def averaged(self) -> AbstractContextManager[None]:
        """The moving average in the place of the parameters of model and guide.

        Raises:
            ValueError: if none is kept.
        """
        if self.ema_decay is None or not self._ready:
            raise ValueError("Adversarial keeps no moving average yet: build it with ema_decay=0.999, and take a step.")
        return self.weights.averaged()

    # Coming and going.

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Finds what there is to train, by a run without a step; `step` calls it."""
        if self._ready:
            return
        with poutine.trace(param_only=True) as capture:
            sides = self.pairing.sides(self.model, self.guide, args, kwargs)
            loss = self._model_loss(sides, args, kwargs)
        own = {id(p) for p in self.critic.parameters()}
        values: dict[str, Any] = {name: site["value"] for name, site in capture.trace.nodes.items()}
        found = {name: v.unconstrained() if hasattr(v, "unconstrained") else v for name, v in values.items()}
        found = {name: p for name, p in found.items() if p.requires_grad and id(p) not in own}
        critic = {name: p for name, p in self.critic.named_parameters() if p.requires_grad}
        for player, parameters in (("generator", found), ("critic", critic)):
            if not parameters:
                raise ValueError(f"The {player} has nothing to train: no parameter that requires a gradient was met in a step.")
        met = loss.requires_grad and any(
            g is not None for g in torch.autograd.grad(loss, list(found.values()), allow_unused=True)
        )
        if not met:
            raise ValueError(
                f"No gradient reaches the generator's parameters {listed(found)}: a draw is cut off by .detach(), or Pyro's "
                "store holds parameters of these names from before; see pyro.clear_param_store()."
            )
        self.players = {"generator": found, "critic": critic}
        self.optimisers: dict[str, Optimizer] = {
            player: make_optimizer(optim, list(self.players[player].values()), betas=(0.0, 0.99))
            for player, optim in zip(self.players, self.optims, strict=True)
        }
        modules = traces.modules_of(self.model, self.guide)
        self.weights = TrainedWeights(found, modules, self.ema_decay)
        self._modules = [*modules, self.critic]
        self._ready = True
        self._good = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Copies of both players, with their modules' buffers, of their optimisers, the average and torch's random state.

        That is all that going on takes.

        Raises:
            ValueError: before `prepare`.
        """
        if not self._ready:
            raise ValueError("Adversarial has no state before its first step. See prepare.")
        average = self.weights.average
        device = next(iter(self.players["critic"].values())).device
        return copy.deepcopy(
            {
                "players": {player: [p.detach() for p in found.values()] for player, found in self.players.items()},
                "buffers": [b.detach() for b in self._buffers()],
                "optimisers": {player: optimiser.state_dict() for player, optimiser in self.optimisers.items()},
                "average": None if average is None else average.state_dict(),
                "steps": self.steps,
                "random": torch.get_rng_state(),
                "random.cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; `prepare` must have been called.

        Raises:
            ValueError: before `prepare`, and if it is of another game.
        """
        if not self._ready:
            raise ValueError("Adversarial must know its players first: call prepare(x) with a batch of data.")
        for player, found in self.players.items():
            shapes, saved = ([tuple(p.shape) for p in ps] for ps in (found.values(), state["players"][player]))
            if shapes != saved:
                raise ValueError(
                    f"The saved {player} has {len(saved)} parameters, or of other shapes than the {len(shapes)} here."
                )
        self._put_back(state)
        torch.set_rng_state(state["random"])
        if state["random.cuda"] is not None:
            torch.cuda.set_rng_state(state["random.cuda"])
        self._good = self.state_dict()

    def _put_back(self, state: Mapping[str, Any]) -> None:
        """All of a state but the random numbers."""
        state = copy.deepcopy(dict(state))
        with torch.no_grad():
            for player, found in self.players.items():
                for p, value in zip(found.values(), state["players"][player], strict=True):
                    p.copy_(value)
                self.optimisers[player].load_state_dict(state["optimisers"][player])
            for buffer, value in zip(self._buffers(), state["buffers"], strict=True):
                buffer.copy_(value)
        self.weights.reread()
        if self.weights.average is not None and state["average"] is not None:
            self.weights.average.load_state_dict(state["average"])
        self.steps, self._lost = state["steps"], 0

    def _buffers(self) -> list[Tensor]:
        return [buffer for module in self._modules for buffer in module.buffers()]

    # The players' losses.

    def _critic_step(self, sides: RealAndFake) -> float:
        seen = (sides.real, sides.fake, sides.context)
        real, fake, context = (tuple(self._packed(t.detach()) for t in side) for side in seen)
        if self.penalties:
            real, fake = (tuple(t.requires_grad_(t.is_floating_point()) for t in side) for side in (real, fake))
        said: dict[tuple[int, ...], tuple[tuple[Tensor, ...], Tensor]] = {}  # of both sides, for penalties ask again

        def critic(*seen: Tensor) -> Tensor:
            key = tuple(map(id, seen))
            if key not in said:
                said[key] = seen, self._says(*seen, *context)  # held, so that no other tensor takes its place
            return said[key][1]

        loss = self.objective.critic_loss(critic(*real), critic(*fake)).mean()
        restraint = sum(penalty(critic, real, fake) for penalty in self.penalties)
        self._update("critic", loss + restraint)
        for penalty in self.penalties:
            penalty.constrain(self.players["critic"].values())
        return loss.item()

    def _model_loss(self, sides: RealAndFake, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        real, fake = self._outputs(sides)
        values = self.pairing.loss(self.objective, real, fake)
        loss = values.mean()
        own, shared = sides.log_q
        if own is not None:
            log_q = self._packed(own).reshape(len(values), -1).sum(1)
            others = (values.detach().sum() - values.detach()) / max(len(values) - 1, 1)  # a baseline that a row has no part in
            surrogate = ((values.detach() - others) * log_q).mean()
            loss = loss + surrogate - surrogate.detach()
        if shared is not None:
            surrogate = values.detach().mean() * shared
            loss = loss + surrogate - surrogate.detach()
        loss = loss + sides.rest
        if self.beside is None:
            return loss
        return self.weight * loss + self.beside.differentiable_loss(self.model, self.guide, *args, **kwargs) / sides.size

    def _outputs(self, sides: RealAndFake) -> tuple[Tensor, Tensor]:
        real, fake = (self._says(*map(self._packed, (*side, *sides.context))) for side in (sides.real, sides.fake))
        return real, fake

    def _says(self, *seen: Tensor) -> Tensor:
        values = self.critic(*seen)
        rows = len(seen[0])
        if values.shape not in ((rows,), (rows, 1)):
            raise ValueError(f"The critic should return {(rows,)}, a number for each row, but returned {tuple(values.shape)}.")
        return values.reshape(rows)

    def _packed(self, seen: Tensor) -> Tensor:
        if self.pack == 1:
            return seen
        if len(seen) < self.pack:
            raise ValueError(f"The critic sees {self.pack} rows at once, but there are {len(seen)}. Pass larger batches.")
        return seen[: len(seen) // self.pack * self.pack].unflatten(0, (-1, self.pack))

    # What ends a game.

    def _update(self, player: str, loss: Tensor) -> None:
        parameters = list(self.players[player].values())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = [grad for grad in grads if grad is not None]
        size = torch.stack(torch._foreach_norm(found)).sum() if found else torch.zeros(())
        if not (loss + size).isfinite():
            self._end(
                f"the {player}'s loss is {loss.item():g} and the norm of its gradient {size.item():g} at step {self.steps + 1}"
            )
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        self.optimisers[player].step()
        for p in parameters:
            p.grad = None

    def _watch(self, critic: float) -> None:
        zero = torch.zeros(1)
        lost = self.objective.decided and critic < LOST_GAME_RATIO * self.objective.critic_loss(zero, zero).item()
        self._lost = self._lost + 1 if lost else 0
        if self._lost >= KEEP_EVERY:
            self._end(f"the critic's loss has been below {critic:.1e} for {self._lost} steps, at step {self.steps}: it has won")
        if self.steps % KEEP_EVERY == 0 and not self._lost and self._finite():
            self._good = self.state_dict()

    def _finite(self) -> bool:
        return all(bool(p.isfinite().all()) for found in self.players.values() for p in found.values())

    def _end(self, why: str) -> None:
        self._put_back(self._good)
        raise LostGameError(
            f"{why}. Players and optimisers are back as they were at step {self.steps}. Lower the critic's learning rate, or "
            "restrain it: penalties=(R1(1.0), R2(1.0)), spectral_normalized(critic), or noise on the data."
        )
