"""Contract of a family: it trains, copies, moves, draws, and refuses wrong input."""

from __future__ import annotations

__all__ = ["FamilySubject", "check_family"]

import copy
import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.contrib.autoname import scope
from pyro.infer import ELBO, SVI, Predictive
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.testing import assert_close

from pyro_genmodels.families.context import VectorContext
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.testing.clauses import clause, require, require_error, run_clauses, seed, seeded
from pyro_genmodels.utils.distributions import density_of, is_real
from pyro_genmodels.utils.errors import listed


def check_family(
    build: Callable[[], Any],
    data: Callable[[int], Tensor],
    *,
    context: Callable[[int], Tensor] | None = None,
    objective: Callable[[], ELBO] = MaximumLikelihood,
    untrained: tuple[str, ...] = (),
    skip: Collection[str] = (),
) -> None:
    """Check the contract of a `Family`: it trains, copies, moves, draws, and refuses wrong input.

    Args:
        build: function that builds an untrained family.
        data: function n -> n valid data, (n, *event_shape).
        context: function n -> n contexts, (n, c) or (n,) labels; None if the family has no context.
        objective: function that makes the loss the family is trained with.
        untrained: prefixes of the names of parameters that this loss does not train, such as "critic.".
        skip: names of clauses to leave out.

    Raises:
        AssertionError: if a clause does not hold. The message names the clause.
        TypeError: if `build` is a family.
        ValueError: if `skip` has an unknown name.

    Example:
        >>> from pyro_genmodels import Autoregressive
        >>> check_family(lambda: Autoregressive((2,), hidden=(8,)), lambda n: torch.randn(n, 2))
    """
    if isinstance(build, nn.Module):
        raise TypeError(
            f"build wants a function that returns a family, such as lambda: {type(build).__name__}(...), but found a family."
        )
    run_clauses("family", FamilySubject(build, data, context, objective, untrained), skip)


@dataclass(frozen=True)
class FamilySubject:
    """A family under test, with its data and its loss; see `check_family` for the attributes."""

    build: Callable[[], Any]
    data: Callable[[int], Tensor]
    context: Callable[[int], Tensor] | None
    objective: Callable[..., Any]
    untrained: tuple[str, ...] = ()

    def batch(self, n: int) -> tuple[Tensor, ...]:
        """Return the arguments of the family's model: n data, and n contexts if there are any."""
        return (self.data(n),) if self.context is None else (self.data(n), self.context(n))

    def train(self, family: Any, batch: tuple[Tensor, ...], steps: int = 2) -> Tensor:
        svi = SVI(family.model, family.guide, PyroOptim(torch.optim.Adam, {"lr": 0.01}), self.objective())
        return torch.tensor([svi.step(*batch) for _ in range(steps)])

    def trainable(self, family: Any) -> dict[str, Tensor]:
        """Return copies of the parameters that the loss trains, by name."""
        named = family.named_parameters()
        return {n: p.detach().clone() for n, p in named if p.requires_grad and not n.startswith(self.untrained)}

    def require_all_moved(self, before: dict[str, Tensor], family: Any) -> None:
        still = [name for name, p in self.trainable(family).items() if p.equal(before[name])]
        require(before, "the family has no parameters to train")
        require(not still, f"training does not move {listed(still)}")

    def require_none_moved(self, before: dict[str, Tensor], family: Any) -> None:
        moved = [name for name, p in self.trainable(family).items() if not p.equal(before[name])]
        require(not moved, f"training another family moves {listed(moved)}")

    def value(self, family: Any, batch: tuple[Tensor, ...]) -> Tensor:
        """Return log densities of the batch, or its loss if there is no density: equal weights give equal values."""
        with torch.no_grad(), seed(1):
            d = family(*batch[1:])
            if density_of(d)[0] != "none":
                return d.log_prob(batch[0])
            return torch.tensor(self.objective().loss(family.model, family.guide, *batch))


@clause("family")
def _family_svi(subject: FamilySubject) -> None:
    """Check that `SVI` moves every trainable parameter, and losses are finite."""
    family, batch = subject.build(), subject.batch(16)
    subject.train(family, batch, steps=1)
    before = subject.trainable(family)
    losses = subject.train(family, batch, steps=3)
    require(losses.isfinite().all(), f"losses are {losses.tolist()}")
    subject.require_all_moved(before, family)


@clause("family")
def _family_module(subject: FamilySubject) -> None:
    """Check that the loss as a module moves every trainable parameter under a torch optimiser."""
    family, batch, loss = subject.build(), subject.batch(16), subject.objective()
    module = loss(family) if density_of(family(*batch[1:]))[0] != "none" else loss(family.model, family.guide)
    module(*batch)
    before = subject.trainable(family)
    optimiser = torch.optim.Adam(family.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        module(*batch).backward()
        optimiser.step()
    subject.require_all_moved(before, family)


@clause("family")
def _family_two_in_one_model(subject: FamilySubject) -> None:
    """Check that two families in one model both train, apart from each other."""
    families, batch = (subject.build(), subject.build()), subject.batch(8)
    require(families[0].name != families[1].name, f"two families have the name {families[0].name}")

    def both(part: str) -> Callable[..., None]:
        def run(*args: Any) -> None:
            for prefix, family in zip(("one", "two"), families, strict=True):
                with scope(prefix=prefix):
                    getattr(family, part)(*args)

        return run

    svi = SVI(both("model"), both("guide"), PyroOptim(torch.optim.Adam, {"lr": 0.01}), subject.objective())
    svi.step(*batch)
    before = [subject.trainable(family) for family in families]
    for _ in range(2):
        svi.step(*batch)
    for family, values in zip(families, before, strict=True):
        subject.require_all_moved(values, family)


@clause("family")
def _family_two_fits(subject: FamilySubject) -> None:
    """Check that two families trained one after the other in one param store do not share parameters."""
    one, two, batch = subject.build(), subject.build(), subject.batch(8)
    subject.train(one, batch)
    trained, untrained = subject.trainable(one), subject.trainable(two)
    subject.train(two, batch)
    subject.require_none_moved(trained, one)
    subject.require_all_moved(untrained, two)
    stored = {id(p) for _, p in pyro.get_param_store().named_parameters()}
    named = [*one.named_parameters(), *two.named_parameters()]
    missing = [name for name, p in named if id(p) not in stored and not name.startswith(subject.untrained)]
    require(not missing, f"the param store lacks {listed(missing)}")


def _require_apart(subject: FamilySubject, family: Any, twin: Any, batch: tuple[Tensor, ...]) -> None:
    """Require that a copy has the values of its original under another name, and that each trains alone."""
    require(type(twin) is type(family), f"its type is {type(twin).__name__}")
    require(twin.name != family.name, f"both have the name {family.name}")
    assert_close(subject.value(twin, batch), subject.value(family, batch))
    original, copied = subject.trainable(family), subject.trainable(twin)
    subject.train(twin, batch)
    subject.require_none_moved(original, family)
    subject.require_all_moved(copied, twin)
    copied = subject.trainable(twin)
    subject.train(family, batch)
    subject.require_none_moved(copied, twin)


@clause("family")
def _family_deepcopy(subject: FamilySubject) -> None:
    """Check that a deep copy has a name of its own and trains apart from the original."""
    family, batch = subject.build(), subject.batch(8)
    subject.train(family, batch)
    _require_apart(subject, family, copy.deepcopy(family), batch)


@clause("family")
def _family_pickle(subject: FamilySubject) -> None:
    """Check that a pickled family has the same values and trains apart from the original."""
    family, batch = subject.build(), subject.batch(8)
    subject.train(family, batch)
    _require_apart(subject, family, pickle.loads(pickle.dumps(family)), batch)


@clause("family")
def _family_state_dict(subject: FamilySubject) -> None:
    """Check that a `state_dict` loads into a fresh family, which then has the same values and standardisation."""
    family, batch = subject.build(), subject.batch(16)
    subject.train(family, batch)
    fresh = subject.build()
    fresh.load_state_dict(family.state_dict())
    assert_close(subject.value(fresh, batch), subject.value(family, batch))
    loc, scale = fresh.loc.clone(), fresh.scale.clone()
    fresh.train().model(*subject.batch(5))
    require(fresh.loc.equal(loc) and fresh.scale.equal(scale), "the next data change its standardisation")


@clause("family")
def _family_float64(subject: FamilySubject) -> None:
    """Check that a family moves to float64, before or after training, and trains and draws there."""
    for steps in (0, 2):
        family, batch = subject.build(), subject.batch(16)
        subject.train(family, batch, steps)
        single = subject.value(family, batch)
        family.to(torch.float64)
        batch = tuple(part.double() if part.is_floating_point() else part for part in batch)
        d = family(*batch[1:])
        density, _ = density_of(d)
        if density != "none":
            log_p = d.log_prob(batch[0])
            require(log_p.dtype == torch.float64, f"log_prob has dtype {log_p.dtype}")
            if density == "exact" or (density == "unnormalized" and not d.support.is_discrete):
                assert_close(log_p, single.double(), atol=1e-3, rtol=1e-3)
        for draws in (d.sample(), family.model(None, *batch[1:], size=16)):
            require(draws.dtype == torch.float64 or d.support.is_discrete, f"draws have dtype {draws.dtype}")
        before = subject.trainable(family)
        losses = subject.train(family, batch)
        require(losses.isfinite().all(), f"losses are {losses.tolist()}")
        subject.require_all_moved(before, family)
        stored = {name: p.dtype for name, p in pyro.get_param_store().items() if name.startswith(family.name)}
        require(stored and set(stored.values()) == {torch.float64}, f"the param store holds {stored}")


@clause("family")
def _family_draws(subject: FamilySubject) -> None:
    """Check that the model draws without data, also under `Predictive`, and draws lie in the support."""
    family, contexts = subject.build(), None if subject.context is None else subject.context(5)
    x = family.model(None, contexts, size=5)
    require(x.shape == (5, *family.event_shape), f"draws have shape {tuple(x.shape)}")
    support = family(contexts).support
    require(support.check(x).all(), "draws lie outside the support")
    same = (is_real(support), support.is_discrete) == (is_real(family.data_support), family.data_support.is_discrete)
    require(same, f"the distribution has the support {support}, but the family has {family.data_support}")
    if contexts is not None:
        require(family(contexts).batch_shape == (5,), f"5 contexts give batch shape {tuple(family(contexts).batch_shape)}")
        require(len(family.model(context=contexts)) == 5, "the model does not draw one row per context")
    for parallel in (False, True):
        draws = Predictive(family.model, num_samples=3, parallel=parallel)(None, contexts, size=5)["x"]
        require(draws.shape == (3, 5, *family.event_shape), f"draws have shape {tuple(draws.shape)}")


@clause("family")
def _family_standardize(subject: FamilySubject) -> None:
    """Check that draws follow mean and deviation if the family standardises: its distribution counts `pretransform`."""
    family, (x, *contexts) = subject.build(), subject.batch(4)

    def transformed() -> Tensor:
        return x if family.pretransform is None else family.pretransform(x)

    before, draws = transformed(), seeded(family(*contexts).sample)
    family.loc.add_(1.0)
    if not transformed().equal(before):
        unchanged = seeded(family(*contexts).sample).equal(draws)
        require(not unchanged, "the mean of the data does not change the draws. Pass pretransform on to the distribution")


@clause("family")
def _family_unit_of_contexts(subject: FamilySubject) -> None:
    """Check that networks are given standardised contexts, so that the unit of float contexts does not matter."""
    family, (x, *contexts) = subject.build().eval(), subject.batch(16)
    if not (contexts and isinstance(family.context, VectorContext) and family.context.kind):
        return
    twin, others = copy.deepcopy(family), (2005 + 9 * contexts[0],)
    seeded(lambda: family.standardize(x, *contexts))  # integers are standardised with noise
    seeded(lambda: twin.standardize(x, *others))
    one, other = subject.value(family, (x, *contexts)), subject.value(twin, (x, *others))
    require(
        torch.allclose(one, other, rtol=1e-2, atol=1e-2),
        "contexts in another unit change it. Give networks self.embed(context)",
    )


@clause("family")
def _family_minibatch(subject: FamilySubject) -> None:
    """Check that the loss of a minibatch is scaled by size / len(x)."""
    family, batch, loss = subject.build(), subject.batch(4), subject.objective()
    family.standardize(*batch)
    alone = seeded(lambda: loss.loss(family.model, family.guide, *batch))
    scaled = seeded(lambda: loss.loss(family.model, family.guide, *batch, size=20))
    assert_close(torch.tensor(scaled), torch.tensor(5 * alone), rtol=1e-4, atol=1e-6)


@clause("family")
def _family_validate(subject: FamilySubject) -> None:
    """Check that `validate` changes no state."""
    family, x = subject.build(), subject.data(8)
    before = {name: value.clone() for name, value in family.state_dict().items()}
    family.train().validate(x)
    changed = [name for name, value in family.state_dict().items() if not value.equal(before[name])]
    require(not changed, f"validate changes {listed(changed)}")


@clause("family")
def _family_errors(subject: FamilySubject) -> None:
    """Check that the model refuses data of a wrong shape or dtype, empty data, NaN, and a missing or superfluous context."""
    family, (x, *contexts) = subject.build(), subject.batch(4)
    model = family.model
    if family.event_shape:
        for wrong in (x[0], x.flatten(), torch.cat([x, x], -1), x.unsqueeze(0)):
            message = require_error(ValueError, f"data of shape {tuple(wrong.shape)}", model, wrong, *contexts)
            require("shape" in message, f"the error does not speak of the shape: {message}")
    require_error(ValueError, "a batch without rows", model, x[:0], *(part[:0] for part in contexts))
    if x.is_floating_point():
        wrong = x.clone()
        wrong[2] = torch.nan
        message = require_error(ValueError, "a row of NaN", model, wrong, *contexts)
        require("nan" in message, f"the error does not name NaN: {message}")
    if not family(*contexts).support.is_discrete:
        message = require_error(ValueError, "integers in a family of real numbers", model, x.long(), *contexts)
        require(".float()" in message, f"the error gives no way out: {message}")
    if subject.context is None:
        require_error(ValueError, "a context that was not built for", model, x, torch.randn(4, 2))
    else:
        require_error(ValueError, "a missing context", model, x)
        require_error(ValueError, "3 contexts for 4 rows", model, x, subject.context(3))
