r"""One round of adversarial training: the steps of the critic, and a step of the model, by an update that is given.

.. math:: \phi \leftarrow \mathrm{update}_\phi\bigl(L_{\text{critic}}(v_\phi) + R(v_\phi)\bigr), \qquad
    \theta \leftarrow \mathrm{update}_\theta\, L_{\text{model}}(v_\phi)

The losses are in `losses`, the inputs of the critic in `pairings`, the penalties R in `penalties`. No code here reads the value
of a tensor, so that a round can be captured as one graph.
"""

from __future__ import annotations

__all__ = ["Game", "Update"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_genmodels.infer.adversarial.context import chosen_arguments
from pyro_genmodels.infer.adversarial.losses import AdversarialLoss
from pyro_genmodels.infer.adversarial.networks import CRITIC, GENERATOR
from pyro_genmodels.infer.adversarial.pairings import Pairing, RealAndFake
from pyro_genmodels.infer.adversarial.penalties import Penalty

Update = Callable[[str, Tensor], None]
"""Function of "generator" or "critic" and its loss (), which takes a step down the gradient."""


@dataclass(frozen=True)
class Game:
    """The losses and models of an adversarial training. Its attributes are the arguments of `Adversarial`."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    critic: nn.Module
    loss: AdversarialLoss
    pairing: Pairing
    penalties: tuple[Penalty, ...]
    critic_context: Sequence[str] | None
    num_critic_steps: int
    pack: int
    extra_loss: Any
    weight: float

    def play(self, update: Update, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Play a round, and return the losses of model and critic before their last step, () each.

        Args:
            update: function that takes a step of one network.
            args: arguments of the model and the guide.
            kwargs: keyword arguments of the model and the guide.
        """
        for _ in range(self.num_critic_steps - 1):
            with torch.no_grad():
                inputs = self.critic_inputs(args, kwargs)
            self._critic_step(inputs, update)
        inputs = self.critic_inputs(args, kwargs)
        critic_loss = self._critic_step(inputs, update)
        loss = self.model_loss(inputs, args, kwargs)
        update(GENERATOR, loss)
        return loss.detach(), critic_loss

    def critic_inputs(self, args: tuple, kwargs: Mapping[str, Any]) -> RealAndFake:
        """Run the model, and return the inputs of the critic."""
        inputs = self.pairing.critic_inputs(self.model, self.guide, args, kwargs)
        if self.critic_context is None:
            return inputs
        context = chosen_arguments(self.model, self.critic_context, args, kwargs, len(inputs.real[0]))
        return replace(inputs, context=context)

    def _critic_step(self, inputs: RealAndFake, update: Update) -> Tensor:
        groups = (inputs.real, inputs.fake, inputs.context)
        real, fake, context = (tuple(self._packed(t.detach()) for t in group) for group in groups)
        if self.penalties:
            real, fake = (tuple(t.requires_grad_(t.is_floating_point()) for t in group) for group in (real, fake))
        outputs: dict[tuple[int, ...], tuple[tuple[Tensor, ...], Tensor]] = {}  # penalties ask for the same outputs again

        def critic(*tensors: Tensor) -> Tensor:
            key = tuple(map(id, tensors))
            if key not in outputs:
                outputs[key] = tensors, self._call_critic(*tensors, *context)  # keeps the tensors, so that ids stay unique
            return outputs[key][1]

        loss = self.loss.critic_loss(critic(*real), critic(*fake)).mean()
        penalty_sum = sum(penalty(critic, real, fake) for penalty in self.penalties)
        update(CRITIC, loss + penalty_sum)
        for penalty in self.penalties:
            penalty.constrain(p for p in self.critic.parameters() if p.requires_grad)
        return loss.detach()

    def model_loss(self, inputs: RealAndFake, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the loss of the model and its guide per row, ()."""
        values = self.pairing.model_loss(self.loss, *self.outputs(inputs))
        loss = values.mean()
        for surrogate in self._surrogates(values.detach(), *inputs.log_q):
            loss = loss + surrogate - surrogate.detach()
        loss = loss + inputs.other_loss
        if self.extra_loss is None:
            return loss
        return self.weight * loss + self.extra_loss.differentiable_loss(self.model, self.guide, *args, **kwargs) / inputs.size

    def _surrogates(self, values: Tensor, per_row: Tensor | None, shared: Tensor | None) -> list[Tensor]:
        """Return terms whose gradient is that of the score function, for losses (rows,) and log probabilities of samples."""
        surrogates = []
        if per_row is not None:
            log_q = self._packed(per_row).reshape(len(values), -1).sum(1)
            baseline = (values.sum() - values) / max(len(values) - 1, 1)  # mean of the other rows
            surrogates.append(((values - baseline) * log_q).mean())
        if shared is not None:
            surrogates.append(values.mean() * shared)
        return surrogates

    def outputs(self, inputs: RealAndFake) -> tuple[Tensor, Tensor]:
        """Return the critic's outputs on real and on fake inputs, (rows,) each."""
        real, fake = (self._call_critic(*map(self._packed, (*group, *inputs.context))) for group in (inputs.real, inputs.fake))
        return real, fake

    def _call_critic(self, *tensors: Tensor) -> Tensor:
        rows = len(tensors[0])
        try:
            outputs = self.critic(*tensors)
        except RuntimeError as error:
            if tensors[0].ndim > 1:
                raise
            raise ValueError(
                f"The critic was given numbers, (rows,) = {(rows,)}, and failed: {error}. A network wants columns: put "
                "torch.nn.Unflatten(0, (-1, 1)) first, or give the model events of shape (1,)."
            ) from error
        if outputs.shape not in ((rows,), (rows, 1)):
            raise ValueError(f"The critic should return {(rows,)}, a number for each row, but returned {tuple(outputs.shape)}.")
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32)).reshape(rows)  # autocast may have rounded them

    def _packed(self, rows: Tensor) -> Tensor:
        """Return rows (rows, ...) in packs, (rows / pack, pack, ...), without incomplete ones."""
        if self.pack == 1:
            return rows
        if len(rows) < self.pack:
            raise ValueError(f"The critic sees {self.pack} rows together, but there are {len(rows)}. Pass larger batches.")
        return rows[: len(rows) // self.pack * self.pack].unflatten(0, (-1, self.pack))
