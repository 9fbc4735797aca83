r"""Adversarial training: alternate steps of a model, and of a critic that discriminates between its samples and data.

.. math:: \theta \leftarrow \theta - \eta\, \nabla_\theta L_{\text{model}}(v_\phi), \qquad
    \phi \leftarrow \phi - \eta'\, \nabla_\phi \bigl(L_{\text{critic}}(v_\phi) + R(v_\phi)\bigr)

Each step changes the parameters of one of the two only. The losses are in `losses`, the inputs of the critic in `pairings`, and
the penalties R on the critic in `penalties`. Goodfellow et al. (arXiv 1406.2661); packing: Lin et al., *PacGAN* (arXiv
1712.04086).
"""

from __future__ import annotations

__all__ = ["Adversarial", "LostGameError"]

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from math import isfinite
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels._pyro.capturing import has_handlers
from pyro_genmodels.divergences import Divergence
from pyro_genmodels.infer.adversarial.captured import CapturedGame
from pyro_genmodels.infer.adversarial.context import check_critic_takes, check_names, warning_of_inputs
from pyro_genmodels.infer.adversarial.game import Game
from pyro_genmodels.infer.adversarial.losses import AdversarialLoss, Relativistic
from pyro_genmodels.infer.adversarial.networks import CRITIC, GENERATOR, TrainedNetworks
from pyro_genmodels.infer.adversarial.pairings import JointPairing, ObservationsPairing, Pairing, RealAndFake
from pyro_genmodels.infer.adversarial.penalties import R1, Penalty
from pyro_genmodels.infer.compiled import Eager, Mode
from pyro_genmodels.optim.adapters import Optim
from pyro_genmodels.optim.averaging import moving_average
from pyro_genmodels.utils.errors import check_choice, check_positive_int, listed
from pyro_genmodels.utils.ranks import current_ranks

STEPS_BETWEEN_COPIES = 100
"""Number of steps between two copies of the last good state."""
LOST_GAME_RATIO = 1e-3
"""Ratio to the loss of a constant critic below which a critic's loss, for `STEPS_BETWEEN_COPIES` steps, ends training."""


class LostGameError(FloatingPointError):
    """Failure of adversarial training: a loss that is not finite, or a critic from which the model no longer learns.

    Parameters and optimisers are back in their last good state.
    """


class Adversarial:
    """Training of a Pyro model, and a guide, against a critic, with the methods of `SVI`.

    Args:
        model: model that observes data in a `pyro.plate`, called as ``model(x)`` or ``model(x, context)``. Its observed sites
            are sampled. Samples without a gradient are trained by the score function.
        critic: module (rows, ...) -> (rows,), called as ``critic(x)`` or ``critic(x, context)``, or as the pairing says; such
            as a `GAN`'s ``.critic``.
        loss: adversarial loss; by default `Relativistic` with its penalties (R3GAN).
        optim: function from parameters to a torch optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-4)``, or an
            optimiser of Pyro; or a pair of these, for the model and for the critic. By default Adam with a learning rate of
            1e-3 and without momentum (betas 0 and 0.99).
        guide: guide for the model's latent variables; see `JointPairing`, `AggregatePairing` and `PosteriorPairing`.
        critic_context: names of the model's arguments that the critic sees beside the data, in this order; () for none. By
            default it sees all arguments with one row per datum, such as a context or covariates.
        pairing: real and fake inputs of the critic. The default is `JointPairing` for a guide without an extra loss, and
            `ObservationsPairing` otherwise.
        penalties: penalties on the critic; by default those of the loss.
        num_critic_steps: number of steps of the critic for one step of the model, on the same data and new samples.
        pack: number of rows that the critic sees together, as (rows / pack, pack, ...); by default the critic's attribute
            `pack`, or 1.
        extra_loss: Pyro loss of model and guide that is added to the adversarial loss, in nats per row. With an ELBO, a VAE
            becomes a VAE-GAN.
        weight: weight of the adversarial loss in this sum.
        ema_decay: decay per step of a moving average of model and guide, for `averaged`; None keeps no average.
        mode: how steps are computed: `Eager()`, or after the first step by a graph that holds samples, losses, gradients and
            optimisers, `Captured()` or `Compiled()`. The numbers are those of eager steps to rounding.

    Raises:
        CaptureError: at a step, if the model, the critic or an optimiser cannot be captured as a graph.
        TypeError: if a choice is of the wrong class.
        ValueError: if a number is not positive, or arguments do not go together.

    Example:
        >>> from pyro_genmodels import GAN, Adversarial
        >>> gan, x = GAN((2,)), torch.randn(64, 2)
        >>> trainer = Adversarial(gan.model, gan.critic)
        >>> sorted(trainer.step(x))
        ['critic', 'generator']
    """

    def __init__(
        self,
        model: Callable[..., Any],
        critic: nn.Module,
        loss: AdversarialLoss | None = None,
        optim: Optim | tuple[Optim, Optim] = None,
        *,
        guide: Callable[..., Any] | None = None,
        critic_context: Sequence[str] | None = None,
        pairing: Pairing | None = None,
        penalties: Sequence[Penalty] | None = None,
        num_critic_steps: int = 1,
        pack: int | None = None,
        extra_loss: ELBO | None = None,
        weight: float = 1.0,
        ema_decay: float | None = None,
        mode: Mode | None = None,
    ) -> None:
        if not callable(model) or hasattr(model, "event_shape"):  # a family has a model, but is none
            raise TypeError(f"Adversarial wants a model, such as gan.model, but found {type(model).__name__}.")
        if not isinstance(critic, nn.Module):
            raise TypeError(f"Adversarial wants a critic that is a torch.nn.Module, such as gan.critic, but found {critic!r}.")
        if not (extra_loss is None or isinstance(extra_loss, ELBO)):
            raise TypeError(f"Adversarial wants a Pyro loss such as Trace_ELBO() as extra_loss, but found {extra_loss!r}.")
        default = JointPairing() if guide is not None and extra_loss is None else ObservationsPairing()
        self.model, self.guide, self.critic = model, guide or traces.no_latents, critic
        self.loss: AdversarialLoss = check_choice("Adversarial", "loss", loss, Relativistic(), AdversarialLoss)
        self.pairing: Pairing = check_choice("Adversarial", "pairing", pairing, default, Pairing)
        penalties = self.loss.penalties if penalties is None else penalties
        self.penalties = (penalties,) if isinstance(penalties, Penalty) else tuple(penalties)
        for penalty in self.penalties:
            check_choice("Adversarial", "penalty", penalty, R1(), Penalty)
        self.pack = getattr(critic, "pack", 1) if pack is None else pack
        check_positive_int("Adversarial", num_critic_steps=num_critic_steps, pack=self.pack)
        self.pairing.check(self.loss, pack=self.pack, has_guide=guide is not None, has_extra_loss=extra_loss is not None)
        self.critic_context = None if critic_context is None else check_names(model, critic_context, self.pairing)
        if ema_decay is not None:
            moving_average(ema_decay)  # raises an error for a bad decay
        if isinstance(optim, list | tuple) and len(optim) != 2:
            raise ValueError(f"Adversarial wants one optimiser for both networks, or a pair, but found {len(optim)}.")
        if weight != 1.0 and extra_loss is None:
            raise ValueError(f"weight={weight} is relative to another loss: pass extra_loss=, or leave it out.")
        if not (isfinite(weight) and weight > 0):
            raise ValueError(f"Adversarial wants a positive weight of the adversarial loss, but found {weight!r}.")
        self.extra_loss: Any = extra_loss
        self.num_critic_steps, self.weight, self.ema_decay = num_critic_steps, weight, ema_decay
        self.optims = tuple(optim) if isinstance(optim, list | tuple) else (optim, optim)
        self.mode: Mode = check_choice("Adversarial", "mode", mode, Eager(), Mode)
        self.steps, self._steps_lost = 0, 0
        self._networks: TrainedNetworks | None = None
        self._captured: CapturedGame | None = None
        self._has_played = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the graph, which is captured anew."""
        return self.__dict__ | {"_captured": None}

    # Methods of SVI.

    @handlers.exclusive("Adversarial.step")
    def step(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Take the steps of the critic, and one step of the model.

        Args:
            args: arguments of the model and the guide. The first is a batch of data.
            kwargs: keyword arguments of the model and the guide.

        Returns:
            The losses per row before the last step: "critic" without penalties, and "generator" with the extra loss.

        Raises:
            LostGameError: if a loss or gradient is not finite, or the critic's loss has been nearly 0 for 100 steps.
            RuntimeError: if another thread trains or evaluates a model.
        """
        self.prepare(*args, **kwargs)
        if self._is_captured:
            loss, critic_loss = self._captured_round(args, kwargs)
        else:
            losses = self.game.play(self._update, args, kwargs)
            loss, critic_loss = (x.item() for x in current_ranks().mean(losses))
        self._has_played = True
        self._trained.weights.update()
        self.steps += 1
        self._check_critic(critic_loss)
        return {GENERATOR: loss, CRITIC: critic_loss}

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the losses that `step` returns, in evaluation mode and without a step."""
        with handlers.side_effect_free(self.model, self.guide, self.critic, self.pairing):
            inputs = self.game.critic_inputs(args, kwargs)
            loss = self.game.model_loss(inputs, args, kwargs)
            return {GENERATOR: loss.item(), CRITIC: self.loss.critic_loss(*self.game.outputs(inputs)).mean().item()}

    # Results.

    def critic_outputs(self, *args: Any, **kwargs: Any) -> tuple[RealAndFake, tuple[Tensor, Tensor]]:
        """Return the critic's inputs for data and new samples, and its outputs on both, (rows,) each.

        Everything runs in evaluation mode, and nothing is trained.
        """
        with handlers.side_effect_free(self.model, self.guide, self.critic, self.pairing):
            inputs = self.game.critic_inputs(args, kwargs)
            return inputs, self.game.outputs(inputs)

    def divergence(self, *args: Any, **kwargs: Any) -> Divergence:
        """Return the critic's lower bound of the divergence between data, best held out, and as many new samples.

        Raises:
            ValueError: if the loss bounds no divergence, or the critic sees packs.
        """
        if self.pack > 1:
            raise ValueError(f"This critic sees {self.pack} rows together, and bounds the divergence of packs. Use pack=1.")
        return self.loss.divergence(*self.critic_outputs(*args, **kwargs)[1])

    def averaged(self) -> AbstractContextManager[None]:
        """Replace the parameters of model and guide by their moving average inside a `with` block.

        Raises:
            ValueError: if there is no average.
        """
        if self.ema_decay is None or self._networks is None:
            raise ValueError("Adversarial has no moving average yet: build it with ema_decay=0.999, and take a step.")
        return self._networks.weights.averaged()

    @property
    def game(self) -> Game:
        """The losses of both networks, for the present attributes."""
        return Game(**{field.name: getattr(self, field.name) for field in fields(Game)})

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Trained parameters by name, under "generator" and "critic"; see `prepare`."""
        return self._trained.parameters

    @property
    def optimisers(self) -> dict[str, Optimizer]:
        """Torch optimisers under "generator" and "critic"; see `prepare`."""
        return self._trained.optimisers

    # State.

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Find the parameters to train by a run without a step, and build the optimisers. `step` calls it.

        Raises:
            ValueError: if there is nothing to train, or no gradient reaches the model.
        """
        if self._networks is not None:
            return
        with poutine.trace(param_only=True) as capture:
            inputs = self.game.critic_inputs(args, kwargs)
            check_critic_takes(self.critic, inputs, self.model, args, kwargs)
            with warning_of_inputs(self.critic):
                loss = self.game.model_loss(inputs, args, kwargs)
        own = {id(p) for p in self.critic.parameters()}
        values: dict[str, Any] = {name: site["value"] for name, site in capture.trace.nodes.items()}
        leaves = {name: v.unconstrained() if hasattr(v, "unconstrained") else v for name, v in values.items()}
        generator = {name: p for name, p in leaves.items() if p.requires_grad and id(p) not in own}
        critic = {name: p for name, p in self.critic.named_parameters() if p.requires_grad}
        for name, parameters in ((GENERATOR, generator), (CRITIC, critic)):
            if not parameters:
                raise ValueError(f"The {name} has nothing to train: a run has no parameter that requires a gradient.")
        grads = torch.autograd.grad(loss, list(generator.values()), allow_unused=True) if loss.requires_grad else ()
        if all(grad is None for grad in grads):
            raise ValueError(
                f"No gradient reaches the generator's parameters {listed(generator)}: a sample is cut off by .detach(), or "
                "Pyro's store holds parameters of these names from before; see pyro.clear_param_store()."
            )
        modules = traces.modules_of(self.model, self.guide)
        self._networks = TrainedNetworks(generator, critic, modules, self.critic, self.optims, self.ema_decay)
        self._last_good = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of parameters, buffers, optimisers, average and random state: all that resuming needs.

        Raises:
            ValueError: before `prepare`.
        """
        return {**self._trained.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`, after `prepare`.

        Raises:
            ValueError: before `prepare`, or if the state has other parameters.
        """
        self._trained.load_state_dict(state)
        self.steps, self._steps_lost = state["steps"], 0
        self._last_good = self.state_dict()

    @property
    def _trained(self) -> TrainedNetworks:
        if self._networks is None:
            raise ValueError("Adversarial does not know its parameters before its first step: call prepare(x) with a batch.")
        return self._networks

    # Captured rounds.

    @property
    def _is_captured(self) -> bool:
        """True if the next round is played by a graph. The first one makes the state of the optimisers."""
        return self.mode.captures and self._has_played and not has_handlers()

    def _captured_round(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[float, float]:
        """Play a round by a graph, and return the losses of model and critic."""
        game = self.game
        if self._captured is None or (self._captured.game, self._captured.mode) != (game, self.mode):
            self._captured = CapturedGame(game, self._trained, self.mode)
        loss, critic_loss, problem = self._captured.play(args, kwargs)
        if problem:
            self._fail(f"{problem} at step {self.steps + 1}")
        return loss, critic_loss

    # Failures.

    def _update(self, name: str, loss: Tensor) -> None:
        if problem := self._trained.update(name, loss):
            self._fail(f"{problem} at step {self.steps + 1}")

    def _check_critic(self, critic_loss: float) -> None:
        """Fail if the critic has won for many steps; keep copies of good states."""
        zero = torch.zeros(1)
        lost = self.loss.zero_when_won and critic_loss < LOST_GAME_RATIO * self.loss.critic_loss(zero, zero).item()
        self._steps_lost = self._steps_lost + 1 if lost else 0
        if self._steps_lost >= STEPS_BETWEEN_COPIES:
            self._fail(
                f"the critic's loss has been below {critic_loss:.1e} for {self._steps_lost} steps, at step {self.steps}: the "
                "critic has won, and the model no longer learns"
            )
        if self.steps % STEPS_BETWEEN_COPIES == 0 and not self._steps_lost and self._trained.finite:
            self._last_good = self.state_dict()

    def _fail(self, problem: str) -> None:
        self._trained.load_state_dict(self._last_good, random=False)
        self.steps, self._steps_lost = self._last_good["steps"], 0
        raise LostGameError(
            f"{problem}. Parameters and optimisers are back as they were at step {self.steps}. Lower the critic's learning "
            "rate, or restrain it: penalties=(R1(1.0), R2(1.0)), spectral_normalized(critic), or noise on the data."
        )
