"""Contract of a distribution: what Pyro may ask of it works, or is refused by an error that names the way out."""

from __future__ import annotations

__all__ = ["check_distribution"]

import copy
import pickle
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.testing import assert_close

from pyro_genmodels.testing.clauses import clause, require, require_error, run_clauses, seed, seeded


def check_distribution(
    make: Callable[..., Distribution],
    data: Callable[[int], Tensor],
    *,
    context: Callable[[int], Tensor] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Check the contract of a distribution that derives from `GenerativeDistribution`.

    Args:
        make: function that returns the distribution, of batch shape (); with a context (n, ...), of batch shape (n,).
        data: function n -> n valid values, (n, *event_shape).
        context: function n -> n contexts, (n, c) or (n,) labels; None if `make` takes no argument.
        skip: names of clauses to leave out, such as "nuts" for a density that is slow to evaluate.

    Raises:
        AssertionError: if a clause does not hold. The message names the clause.
        ValueError: if `skip` has an unknown name.

    Example:
        >>> from pyro_genmodels import Autoregressive
        >>> def make():
        ...     return Autoregressive((2,), hidden=(8,))()
        >>> check_distribution(make, lambda n: torch.randn(n, 2), skip=["nuts"])
        >>> check_distribution(make, lambda n: torch.full((n, 2), torch.inf), skip=["nuts"])
        Traceback (most recent call last):
        AssertionError: the distribution contract is broken, clause "log_prob": Autoregression was given a value ...
    """
    run_clauses("distribution", DistributionSubject(make, data, context), skip)


@dataclass(frozen=True)
class DistributionSubject:
    make: Callable[..., Any]
    data: Callable[[int], Tensor]
    context: Callable[[int], Tensor] | None

    def given(self, context: Tensor | None) -> Any:
        """Return the distribution given a context; two calls build the same networks."""
        with seed(0):
            return self.make() if context is None else self.make(context)

    def contexts(self, n: int) -> Tensor | None:
        return None if self.context is None else self.context(n)

    def single(self) -> Any:
        """Return the distribution of one datum, of batch shape ()."""
        return self.given(None if self.context is None else self.context(1)[0])

    def batch(self, *shape: int) -> tuple[Any, Tensor]:
        """Return a distribution of that batch shape and a value of it."""
        n = torch.Size(shape).numel()
        contexts, x = self.contexts(n), self.data(n)
        if contexts is not None:
            contexts = contexts.reshape(*shape, *contexts.shape[1:])
        return self.given(contexts).expand(shape), x.reshape(*shape, *x.shape[1:])


def _has_density(d: Any) -> bool:
    return d.density != "none"


def _has_score(d: Any) -> bool:
    return d.density == "exact" and not d.support.is_discrete


def _modules(value: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield (place, module) for the modules that a distribution holds."""
    for name, part in vars(value).items():
        if isinstance(part, nn.Module):
            yield name, part
        elif isinstance(part, Distribution) or is_dataclass(part):
            yield from ((f"{name}.{inner}", module) for inner, module in _modules(part))


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield the tensors inside distributions, transforms and tuples, but not inside modules."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part, seen)
    elif isinstance(value, (Distribution, Transform)) and id(value) not in seen:
        seen.add(id(value))
        yield from _tensors(list(vars(value).values()), seen)


@clause("distribution")
def _distribution_sample(subject: DistributionSubject) -> None:
    """Check that draws have shape (*sample_shape, *batch_shape, *event_shape), carry no gradient and lie in the support."""
    for d in (subject.single(), subject.batch(4)[0], subject.batch(3, 2)[0]):
        for sample_shape in ((), (2, 1)):
            x = d.sample(sample_shape)
            require(x.shape == sample_shape + d.batch_shape + d.event_shape, f"draws have shape {tuple(x.shape)}")
            require(not x.requires_grad, "draws of sample() carry a gradient")
            require(x.is_floating_point() or d.support.is_discrete, f"draws of real numbers have dtype {x.dtype}")
            require(d.support.check(x).all(), "draws lie outside the support")


@clause("distribution")
def _distribution_support(subject: DistributionSubject) -> None:
    """Check that the support is over whole events and holds the data, and that arguments satisfy their constraints."""
    d = subject.single()
    require(d.support.event_dim == d.event_dim == len(d.event_shape), f"support has event_dim {d.support.event_dim}")
    inside = d.support.check(subject.data(50))
    require(inside.shape == (50,), f"support.check of 50 values has shape {tuple(inside.shape)}")
    require(inside.all(), "data lie outside the support")
    for name, constraint in d.arg_constraints.items():
        require(constraint.check(getattr(d, name)).all(), f"argument {name} breaks its constraint {constraint}")


@clause("distribution")
def _distribution_rsample(subject: DistributionSubject) -> None:
    """Check that draws of rsample() carry gradients, or that rsample() raises an error that names sample()."""
    d, _ = subject.batch(4)
    if d.has_rsample:
        x = d.rsample((2,))
        require(x.shape == (2, 4, *d.event_shape), f"draws have shape {tuple(x.shape)}")
        parameters = [p for _, module in _modules(d) for p in module.parameters() if p.requires_grad]
        if parameters:
            require(x.requires_grad, "draws of rsample() carry no gradient")
            gradients = torch.autograd.grad(x.sum(), parameters, allow_unused=True)
            require(any(g is not None and g.any() for g in gradients), "draws of rsample() have no gradient in the parameters")
    else:
        message = require_error(NotImplementedError, "rsample()", d.rsample)
        require("sample()" in message, f"the error of rsample() does not name sample(): {message}")


@clause("distribution")
def _distribution_log_prob(subject: DistributionSubject) -> None:
    """Check that log_prob has sample and batch shape and is finite on data, or raises an error if there is no density."""
    d, x = subject.batch(4)
    if not _has_density(d):
        require_error(NotImplementedError, "log_prob", d.log_prob, d.sample())
        return
    require(d.log_prob(x).isfinite().all(), "log_prob of data is not finite")
    for sample_shape in ((), (2, 1)):
        shape = d.log_prob(d.sample(sample_shape)).shape
        require(shape == (*sample_shape, 4), f"log_prob has shape {tuple(shape)}, not {(*sample_shape, 4)}")
    if d.density == "exact":
        single = subject.single()
        each = torch.stack([single.log_prob(value) for value in x])
        assert_close(single.expand((3, 1)).log_prob(x), each.expand(3, 4), rtol=1e-4, atol=1e-4)


@clause("distribution")
def _distribution_context(subject: DistributionSubject) -> None:
    """Check that the batch shape of a context broadcasts against the value, and log_prob agrees with a loop over both."""
    if subject.context is None or not _has_density(subject.single()):
        return
    x, contexts = subject.data(4), subject.context(4)
    for context in (contexts[0], contexts, subject.context(3).unsqueeze(1)):
        d, trailing = subject.given(context), contexts.shape[1:]
        batch_shape = context.shape[: context.dim() - len(trailing)]
        require(d.batch_shape == batch_shape, f"a context {tuple(context.shape)} gives batch shape {tuple(d.batch_shape)}")
        log_p, wanted = seeded(d.log_prob, x), torch.broadcast_shapes(batch_shape, (4,))
        require(log_p.shape == wanted, f"log_prob has shape {tuple(log_p.shape)}, not {tuple(wanted)}")
        if d.density in ("exact", "unnormalized"):
            wide = context.expand(wanted + trailing)
            for index in torch.cartesian_prod(*[torch.arange(n) for n in wanted]).reshape(-1, len(wanted)).tolist():
                one = subject.given(wide[tuple(index)]).log_prob(x[index[-1]])
                assert_close(log_p[tuple(index)], one, rtol=1e-4, atol=1e-4)


@clause("distribution")
def _distribution_moments(subject: DistributionSubject) -> None:
    """Check that `mean` and `variance` have batch and event shape, or raise an error that names the moment and sample()."""
    d = subject.single()
    for moment in ("mean", "variance"):
        try:
            shape = getattr(d, moment).shape
            require(shape == d.batch_shape + d.event_shape, f"{moment} has shape {tuple(shape)}")
        except NotImplementedError as error:
            require(moment in str(error) and "sample" in str(error), f"the error of {moment} gives no way out: {error}")


@clause("distribution")
def _distribution_expand(subject: DistributionSubject) -> None:
    """Check that `expand` keeps the type and the values, and refuses a batch shape that does not broadcast."""
    d, _ = subject.batch(4)
    e, x = d.expand((2, 4)), subject.batch(2, 4)[1]
    require(type(e) is type(d), f"expand returns a {type(e).__name__}")
    require((d.batch_shape, e.batch_shape, e.event_shape) == ((4,), (2, 4), d.event_shape), "shapes after expand are wrong")
    require(e.sample((3,)).shape == (3, 2, 4, *d.event_shape), "draws after expand have the wrong shape")
    if d.density == "exact":
        assert_close(e.log_prob(x), d.log_prob(x), rtol=1e-4, atol=1e-4)
    for shape in ((3,), (4, 2), (), (1,)):
        require_error(ValueError, f"expand from (4,) to {shape}", d.expand, shape)


@clause("distribution")
def _distribution_wrappers(subject: DistributionSubject) -> None:
    """Check that `to_event` sums log_prob over batch dimensions, and `mask` drops rows from it."""
    d = subject.single().expand((2, 4))
    if not _has_density(d):
        return
    x = subject.batch(2, 4)[1]
    e, log_p = d.to_event(1), seeded(d.log_prob, x)
    require((e.batch_shape, e.event_shape) == ((2,), (4, *d.event_shape)), "shapes after to_event are wrong")
    require(e.sample().shape == x.shape, "draws after to_event have the wrong shape")
    assert_close(seeded(e.log_prob, x), log_p.sum(-1))
    mask = torch.tensor([True, False, True, False])
    assert_close(seeded(d.mask(mask).log_prob, x), torch.where(mask, log_p, torch.zeros(())))


@clause("distribution")
def _distribution_errors(subject: DistributionSubject) -> None:
    """Check that log_prob refuses a wrong event shape, NaN, integers for reals, and values outside a discrete support."""
    d, x = subject.single(), subject.data(4)
    if not _has_density(d):
        return
    if d.event_shape:
        require_error(ValueError, "a value of the wrong event shape", d.log_prob, torch.cat([x, x], -1))
    if d.support.is_discrete:
        require_error(ValueError, "a value outside the support", d.log_prob, x - 1000)
        return
    require_error(ValueError, "a value of integers", d.log_prob, torch.zeros(4, *d.event_shape, dtype=torch.long))
    x[1] = torch.nan
    require_error(ValueError, "a value with NaN", d.log_prob, x)


@clause("distribution")
def _distribution_plates(subject: DistributionSubject) -> None:
    """Check shapes in nested plates, and the scale that a subsampled plate gives to log_prob."""
    d, _ = subject.batch(4)

    def nested(x: Tensor | None = None) -> Tensor:
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            return pyro.sample("x", d, obs=x)

    x = nested()
    require(x.shape == (3, 4, *d.event_shape), f"draws in two plates have shape {tuple(x.shape)}")
    if not _has_density(d):
        return
    trace = poutine.trace(nested).get_trace(x)
    trace.compute_log_prob()
    shape = trace.nodes["x"]["log_prob"].shape
    require(shape == (3, 4), f"log_prob in two plates has shape {tuple(shape)}")

    data, contexts = subject.data(8), subject.contexts(8)

    def subsampled() -> None:
        with pyro.plate("data", 8, subsample_size=2) as index:
            pyro.sample("x", subject.given(None if contexts is None else contexts[index]), obs=data[index])

    trace = poutine.trace(subsampled).get_trace()
    seeded(trace.compute_log_prob)
    site: Any = trace.nodes["x"]
    assert_close(site["log_prob_sum"], 4 * seeded(site["fn"].log_prob, site["value"]).sum())


@clause("distribution")
def _distribution_predictive(subject: DistributionSubject) -> None:
    """Check that `Predictive` draws from it, sequentially and in parallel."""
    d, _ = subject.batch(5)

    def model() -> Tensor:
        with pyro.plate("data", 5):
            return pyro.sample("x", d)

    for parallel in (False, True):
        x = Predictive(model, num_samples=4, parallel=parallel)()["x"]
        require(x.shape == (4, 5, *d.event_shape), f"draws have shape {tuple(x.shape)}")
        require((x[0] != x[1]).any() or d.support.is_discrete, "two draws are equal")


def _latent_model(d: Any) -> Callable[[Tensor], None]:
    """Return a model of data y (*batch_shape, *event_shape): a latent variable z ~ d, plus normal noise."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", d)
        pyro.sample("y", dist.Normal(z, 0.5).to_event(len(d.event_shape)), obs=y)

    return model


@clause("distribution")
def _distribution_autonormal(subject: DistributionSubject) -> None:
    """Check that `AutoNormal` fits a posterior with it as the prior, if it has an exact density over the reals."""
    d, y = subject.single(), subject.data(1)[0]
    if _has_score(d):
        guide = AutoNormal(_latent_model(d))
        svi = SVI(_latent_model(d), guide, PyroOptim(torch.optim.Adam, {"lr": 0.01}), Trace_ELBO())
        losses = torch.tensor([svi.step(y) for _ in range(2)])
        require(losses.isfinite().all(), f"losses are {losses.tolist()}")
        require(d.support.check(guide.median()["z"]), "the median lies outside the support")


@clause("distribution")
def _distribution_nuts(subject: DistributionSubject) -> None:
    """Check that `NUTS` samples a posterior with it as the prior, if it has an exact density over the reals."""
    d, y = subject.single(), subject.data(1)[0]
    if _has_score(d):
        mcmc = MCMC(NUTS(_latent_model(d), max_tree_depth=2), num_samples=4, warmup_steps=4, disable_progbar=True)
        mcmc.run(y)
        z = mcmc.get_samples()["z"]
        require(z.shape == (4, *d.event_shape), f"draws have shape {tuple(z.shape)}")
        require(d.support.check(z).all(), "draws lie outside the support")


def _require_same(found: Any, wanted: Any, x: Tensor) -> None:
    """Require that two distributions have one type and batch shape and, under one seed, equal draws and log_prob."""
    require(type(found) is type(wanted), f"its type is {type(found).__name__}")
    require(found.batch_shape == wanted.batch_shape, f"its batch shape is {tuple(found.batch_shape)}")
    assert_close(seeded(found.sample, (2,)), seeded(wanted.sample, (2,)))
    if _has_density(wanted):
        assert_close(seeded(found.log_prob, x), seeded(wanted.log_prob, x))


def _on_graph(context: Tensor | None) -> Tensor | None:
    """Return a context of floats as the output of a computation with gradients, or the context as it is."""
    return context.requires_grad_() * 2 if context is not None and context.is_floating_point() else context


@clause("distribution")
def _distribution_deepcopy(subject: DistributionSubject) -> None:
    """Check that a deep copy shares the modules, and has its own tensors, detached from the graph."""
    d = subject.given(_on_graph(subject.contexts(4)))
    copied = copy.deepcopy(d)
    own, shared = dict(_modules(copied)), dict(_modules(d))
    require(own.keys() == shared.keys() and all(own[name] is shared[name] for name in own), "it copies modules")
    require(all(not t.requires_grad and t.grad_fn is None for t in _tensors(copied)), "its tensors are on the graph")
    require(not {id(t) for t in _tensors(copied)} & {id(t) for t in _tensors(d)}, "it shares tensors with the original")
    _require_same(copied, d, subject.data(4))


@clause("distribution")
def _distribution_pickle(subject: DistributionSubject) -> None:
    """Check that a pickled distribution draws and scores as the original, and so does a copy of its copy."""
    d, x = subject.given(_on_graph(subject.contexts(4))), subject.data(4)
    loaded = pickle.loads(pickle.dumps(d))
    _require_same(loaded, d, x)
    _require_same(pickle.loads(pickle.dumps(copy.deepcopy(loaded))), d, x)


@clause("distribution")
def _distribution_score(subject: DistributionSubject) -> None:
    """Check that the score has the shape of the broadcast value, or that there is an error if there is no score."""
    d, x = subject.single(), subject.data(4)
    if _has_score(d):
        with torch.no_grad():
            score = d.expand((3, 1)).score(x)
        require(score.shape == (3, 4, *d.event_shape), f"the score has shape {tuple(score.shape)}")
        require(not score.requires_grad, "the score carries a gradient under torch.no_grad()")
        require(d.score(x).requires_grad, "the score carries no gradient")
    elif d.support.is_discrete or not _has_density(d):
        require_error((NotImplementedError, ValueError), "score", d.score, x)


@clause("distribution")
def _distribution_weights(subject: DistributionSubject) -> None:
    """Check that log_prob follows the parameters of the networks: nothing computed from them is kept."""
    d, x = subject.given(subject.contexts(4)), subject.data(4)
    parameters = [p for _, module in _modules(d) for p in module.parameters()]
    if not _has_density(d) or not parameters:
        return
    before, values = seeded(d.log_prob, x).detach(), [p.detach().clone() for p in parameters]
    with torch.no_grad():
        try:
            for p in parameters:
                p.add_(0.1)
            moved = seeded(d.log_prob, x)
        finally:
            for p, value in zip(parameters, values, strict=True):
                p.copy_(value)
    require((moved - before).abs().max() > 1e-3, "log_prob stays the same")
    assert_close(seeded(d.log_prob, x), before)


@clause("distribution")
def _distribution_cache(subject: DistributionSubject) -> None:
    """Check that no call leaves a cached tensor or attribute behind."""
    d, x = subject.given(subject.contexts(4)), subject.data(4)
    before, held = {name: id(value) for name, value in vars(d).items()}, len(list(_tensors(d)))
    d.sample((2,))
    if d.has_rsample:
        d.rsample((2,))
    if _has_density(d):
        d.log_prob(x)
    require({name: id(value) for name, value in vars(d).items()} == before, "a call changes its attributes")
    require(len(list(_tensors(d))) == held, "a call leaves tensors behind")
