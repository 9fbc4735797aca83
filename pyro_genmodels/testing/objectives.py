"""Contract of an objective: Pyro's entry points agree, and scale, mask and particles act on the loss as they should."""

from __future__ import annotations

__all__ = ["check_objective"]

from collections.abc import Callable, Collection
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor
from torch.testing import assert_close

from pyro_genmodels.infer.objective import Loss
from pyro_genmodels.testing.clauses import clause, require, run_clauses, seed, seeded
from pyro_genmodels.testing.families import FamilySubject


def check_objective(
    objective: Callable[..., ELBO],
    build: Callable[[], Any],
    data: Callable[[int], Tensor],
    *,
    context: Callable[[int], Tensor] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Check the contract of an objective that sums a loss over the data, on a family that it trains.

    Args:
        objective: function that makes the loss; takes the keyword num_particles, as `pyro.infer.ELBO` does.
        build: function that builds a family.
        data: function n -> n valid data, (n, *event_shape).
        context: function n -> n contexts, (n, c) or (n,) labels; None if the family has no context.
        skip: names of clauses to leave out, such as "mask" for a loss that is no sum over the data.

    Raises:
        AssertionError: if a clause does not hold. The message names the clause.
        ValueError: if `skip` has an unknown name.

    Example:
        >>> from pyro_genmodels import Autoregressive, MaximumLikelihood
        >>> check_objective(MaximumLikelihood, lambda: Autoregressive((2,), hidden=(8,)), lambda n: torch.randn(n, 2))
    """
    run_clauses("objective", FamilySubject(build, data, context, objective), skip)


def _prepared(subject: FamilySubject, **options: Any) -> tuple[Any, tuple[Tensor, ...], Any]:
    """Return a family, 6 rows and the loss, the same at every call: a loss may move chains that its family keeps."""
    with seed(0):
        family, batch = subject.build(), subject.batch(6)
        family.standardize(*batch)
        return family, batch, subject.objective(**options)


def _loss(
    subject: FamilySubject,
    *,
    mask: Any = None,
    scale: float | None = None,
    num_particles: int = 1,
    repeats: int = 1,
    **kwargs: Any,
) -> Tensor:
    """Return the loss under a fixed seed, with model and guide masked and scaled; or the mean of repeated losses."""
    family, batch, loss = _prepared(subject, num_particles=num_particles)
    model, guide = family.model, family.guide
    if mask is not None:
        model, guide = poutine.mask(model, mask=mask), poutine.mask(guide, mask=mask)
    if scale is not None:
        model, guide = poutine.scale(model, scale=scale), poutine.scale(guide, scale=scale)
    with seed(1):
        losses = [loss.differentiable_loss(model, guide, *batch, **kwargs).detach() for _ in range(repeats)]
    return torch.stack(losses).mean()


def _require_close(found: Tensor, wanted: Tensor) -> None:
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@clause("objective")
def _objective_entry_points(subject: FamilySubject) -> None:
    """Check that `differentiable_loss`, `loss` and `loss_and_grads` agree, and gradients are added to those that are there."""
    family, batch, loss = _prepared(subject)
    value = seeded(lambda: loss.differentiable_loss(family.model, family.guide, *batch))
    require(value.shape == (), f"differentiable_loss has shape {tuple(value.shape)}")
    gradients = torch.autograd.grad(value, list(family.parameters()), allow_unused=True)
    require(any(g is not None for g in gradients), "the loss has no gradient in the family's parameters")

    family, batch, loss = _prepared(subject)
    for p in family.parameters():
        p.grad = torch.ones_like(p)
    number = seeded(lambda: loss.loss_and_grads(family.model, family.guide, *batch))
    require(isinstance(number, float), f"loss_and_grads returns a {type(number).__name__}")
    _require_close(torch.tensor(number), value.detach())
    for p, gradient in zip(family.parameters(), gradients, strict=True):
        _require_close(p.grad, 1 + (0 if gradient is None else gradient) + torch.zeros_like(p))

    family, batch, loss = _prepared(subject)
    number = seeded(lambda: loss.loss(family.model, family.guide, *batch))
    require(isinstance(number, float), f"loss returns a {type(number).__name__}")
    require(all(p.grad is None for p in family.parameters()), "loss() leaves gradients behind")


@clause("objective")
def _objective_module(subject: FamilySubject) -> None:
    """Check that the loss as a module returns the loss and has the parameters of the family."""
    family, batch, loss = _prepared(subject)
    if not isinstance(loss, Loss):
        return
    module = loss(family.model, family.guide)
    missing = {id(p) for p in family.parameters()} - {id(p) for p in module.parameters()}
    require(not missing, f"the module lacks {len(missing)} of the family's parameters")
    _require_close(seeded(module, *batch).detach(), _loss(subject))


@clause("objective")
def _objective_size(subject: FamilySubject) -> None:
    """Check that the loss of a minibatch is scaled by size / len(x)."""
    _require_close(_loss(subject, size=30), 5 * _loss(subject))


@clause("objective")
def _objective_scale(subject: FamilySubject) -> None:
    """Check that `poutine.scale` scales the loss."""
    _require_close(_loss(subject, scale=0.5), 0.5 * _loss(subject))


@clause("objective")
def _objective_mask(subject: FamilySubject) -> None:
    """Check that the losses under a mask and under its complement add up to the loss."""
    mask = torch.tensor([True, False, True, True, False, False])
    _require_close(_loss(subject, mask=mask) + _loss(subject, mask=~mask), _loss(subject))


@clause("objective")
def _objective_particles(subject: FamilySubject) -> None:
    """Check that the loss of two particles is the mean of two losses."""
    _require_close(_loss(subject, num_particles=2), _loss(subject, repeats=2))


@clause("objective")
def _objective_svi(subject: FamilySubject) -> None:
    """Check that `SVI` trains a family by it: losses are finite and parameters move."""
    family, batch = subject.build(), subject.batch(6)
    before = subject.trainable(family)
    losses = subject.train(family, batch)
    require(losses.isfinite().all(), f"losses are {losses.tolist()}")
    moved = [name for name, p in subject.trainable(family).items() if not p.equal(before[name])]
    require(moved, "no parameter moves")
