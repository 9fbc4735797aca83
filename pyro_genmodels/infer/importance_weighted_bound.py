r"""The importance-weighted bound of K draws for each datum, with three gradients for continuous variables and one for discrete.

.. math:: L_K(x) = \mathbb{E}\Bigl[\log \tfrac1K \sum_{k=1}^K w_k\Bigr] \le \log p(x), \qquad
    w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q, \quad \tilde w_k = \frac{w_k}{\sum_j w_j} .

The bound rises with K. Its plain gradient, in the parameters of the guide, has less and less signal in its noise as K grows
(Rainforth et al., arXiv 1802.04537). It is a sum of a part along the draws and a part by the guide's own density, whose mean is
another sum along the draws. For reparametrised draws :math:`z_k = T_\phi(\epsilon_k)` the gradients "plain", "sticking the
landing" and "doubly reparametrised" are

.. math:: \sum_k \tilde w_k \nabla_\phi \log w_k, \qquad
    \sum_k \tilde w_k \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}, \qquad
    \sum_k \tilde w_k^2 \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi} .

The first and the last are unbiased; the second is for K = 1 alone, where it is the last. All have the same gradient in the
parameters of the model. Draws of discrete variables have the score function of the guide as gradient, with the bound of the
other draws as a baseline for each (VIMCO).

Burda, Grosse and Salakhutdinov (arXiv 1509.00519); Roeder, Wu and Duvenaud (arXiv 1703.09194); Tucker et al. (arXiv
1810.04152); Mnih and Rezende, *Variational Inference for Monte Carlo Objectives* (arXiv 1602.06725).
"""

from __future__ import annotations

__all__ = ["ImportanceWeightedELBO"]

from collections.abc import Callable, Iterable, Mapping
from math import log, prod
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import is_identically_zero
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.messages import without_trace_shapes
from pyro_genmodels._pyro.sites import PARTICLES, innermost, is_computed
from pyro_genmodels._pyro.subsampling import SameRows
from pyro_genmodels.infer.objective import Loss
from pyro_genmodels.utils.errors import check_positive_int, listed

Gradient = Literal["plain", "sticking_the_landing", "doubly_reparametrised"]
GRADIENTS: tuple[Gradient, ...] = ("plain", "sticking_the_landing", "doubly_reparametrised")


class ImportanceWeightedELBO(Loss):
    """Minus the importance-weighted bound (nats), summed over the data: that of an importance-weighted autoencoder (IWAE).

    The draws of each row are weighted against each other, for the rows of those plates that all sites share. Without such a
    plate, as where a latent variable belongs to all rows, there is one bound for all rows together. Scales of subsampled plates
    multiply the bound; those of other handlers, and masks, are a part of the weights.

    Args:
        num_particles: number K of draws.
        gradient: "plain", "sticking_the_landing" or "doubly_reparametrised". By default the last where all draws are
            reparametrised, and otherwise "plain", which takes the score function with VIMCO's baselines for the others.
            "sticking_the_landing" is biased for more than one draw.
        vectorize_particles: True for one run of model and guide with all draws in an outermost plate; by default for the
            models of this package's families.
        max_plate_nesting: number of dimensions that plates take. By default a run of the model finds it.

    Raises:
        ValueError: if `num_particles` is not a positive integer, or an option not one of these; when it is used, if the
            guide lacks a latent variable of the model, or has one whose draws are not reparametrised although the
            gradient wants that.

    Example:
        >>> import pyro
        >>> from pyro_genmodels import VAE
        >>> vae, x = VAE((4,), latent_dim=2), torch.randn(50, 4)
        >>> svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), ImportanceWeightedELBO(num_particles=5))
        >>> losses = [svi.step(x) for _ in range(3)]
    """

    def __init__(
        self,
        num_particles: int = 8,
        *,
        gradient: Gradient | None = None,
        vectorize_particles: bool | None = None,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        check_positive_int("ImportanceWeightedELBO", num_particles=num_particles)
        if gradient is not None and gradient not in GRADIENTS:
            raise ValueError(f"ImportanceWeightedELBO wants a gradient among {listed(GRADIENTS)}, but found {gradient!r}.")
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting)
        self.gradient, self.is_vectorized = gradient, vectorize_particles

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        with without_trace_shapes():
            loss = self._loss(model, guide, args, kwargs)
        if is_validation_enabled():
            warn_if_nan(loss, "loss")
        return loss

    def _loss(self, model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        runs = _Runs(self, model, guide, args, kwargs)
        if self.gradient == "plain" or not torch.is_grad_enabled():
            return _plain(runs.weights())
        drawn = runs.draws()
        if names := sorted({name for draws in drawn for name in draws.others}):
            if self.gradient is not None:
                raise ValueError(
                    f"gradient={self.gradient!r} wants reparametrised draws, but those of {listed(names)} are not. Take "
                    'gradient="plain", or leave gradient out.'
                )
            return _plain(runs.weights())
        if not any(draws.values for draws in drawn):  # point masses alone
            return _plain(runs.weights())
        leaves = [{name: z.detach().requires_grad_() for name, z in draws.values.items()} for draws in drawn]
        return self._along_the_draws(runs.weights(leaves), [draws.values for draws in drawn], leaves)

    def _along_the_draws(
        self, weights: _Weights, drawn: Iterable[Mapping[str, Tensor]], leaves: Iterable[Mapping[str, Tensor]]
    ) -> Tensor:
        """Return the loss whose gradient in the guide's parameters is that along the draws alone.

        Args:
            weights: log weights at the leaves.
            drawn: reparametrised draws by name, for each run.
            leaves: the same values, from which the weights were computed.
        """
        log_w = weights.log_p - weights.log_q
        share = log_w.detach().softmax(0)
        factor = share if self.gradient == "sticking_the_landing" else share.square()
        places = [z for values in leaves for z in values.values()]
        slopes = torch.autograd.grad(
            (weights.scale * factor * log_w).sum(), places, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        sources = [z for values in drawn for z in values.values()]
        surrogate = (weights.scale * share * weights.log_p).sum()
        for z, slope in zip(sources, slopes, strict=True):
            surrogate = surrogate + (z * slope.detach()).sum()
        return _bound(log_w, weights.scale).neg().detach() - (surrogate - surrogate.detach())


class _Draws(NamedTuple):
    """Draws of a guide, by one run.

    Attributes:
        values: reparametrised draws, with their graph, by name.
        others: names of other draws.
    """

    values: dict[str, Tensor]
    others: list[str]


class _Weights(NamedTuple):
    """Log weights of K draws, (K, rows...).

    Attributes:
        log_p: log densities of the model in nats.
        log_q: log densities of the guide.
        score: log densities of those draws of the guide that are not reparametrised, or None.
        scale: factor of each row's bound: the scale of the plates that all sites share.
    """

    log_p: Tensor
    log_q: Tensor
    score: Tensor | None
    scale: float


class _Runs:
    """Runs of a model and its guide that give K weights: one in a plate of particles, or K, with the same rows."""

    def __init__(
        self, objective: ImportanceWeightedELBO, model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any]
    ) -> None:
        rows = SameRows()
        self.model, self.guide, self.args, self.kwargs = rows(model), rows(guide), args, kwargs
        vectorized = traces.is_family(model) if objective.is_vectorized is None else objective.is_vectorized
        self.plates: list[Any] = [None] * objective.num_particles
        if vectorized and objective.num_particles > 1:
            if objective.max_plate_nesting == float("inf"):
                objective.max_plate_nesting = traces.max_plate_nesting(model, guide, args, kwargs)
            self.plates = [traces.particles(objective.num_particles, int(objective.max_plate_nesting))]

    def draws(self) -> list[_Draws]:
        """Run the guide, and return its draws."""
        found = []
        for plate in self.plates:
            draws = _Draws({}, [])
            trace = traces.proposal(traces.trace_of(_inside(plate, self.guide), self.args, self.kwargs))
            for name in traces.latents(trace):
                site: Any = trace.nodes[name]
                if isinstance(innermost(site["fn"]), Delta):  # computed from other draws, or a parameter
                    continue
                if site["fn"].has_rsample:
                    draws.values[name] = site["value"]
                else:
                    draws.others.append(name)
            found.append(draws)
        return found

    def weights(self, held: Iterable[Mapping[str, Tensor]] | None = None) -> _Weights:
        """Run guide and model, and return the weights.

        Args:
            held: values of the guide's sites by name, for each run; by default they are drawn.
        """
        pairs = []
        for plate, values in zip(self.plates, held or [{}] * len(self.plates), strict=True):
            guide = poutine.replay(self.guide, trace=traces.holding(values))
            pair = traces.run_pair(self.model, guide, self.args, self.kwargs, plate)
            pairs.append((pair[0], traces.proposal(pair[1])))
        frames = _shared_plates(pairs[0])
        dims = tuple(sorted(frame.dim for frame in frames))
        scale = prod((frame.full_size or frame.size) / frame.size for frame in frames)
        if (plate := self.plates[0]) is not None:
            parts = _densities(*pairs[0], (plate.dim, *dims))
            shape = torch.broadcast_shapes((plate.size, *(1 for _ in dims)), *(x.shape for x in parts if x is not None))
            log_p, log_q, score = (None if x is None else x.expand(shape) for x in parts)
        else:
            columns = zip(*(_densities(*pair, dims) for pair in pairs), strict=True)
            log_p, log_q, score = (
                None if column[0] is None else torch.stack(torch.broadcast_tensors(*column)) for column in columns
            )
        return _Weights(log_p / scale, log_q / scale, score, scale)


def _inside(plate: Any, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is run in a plate, if there is one."""
    return fn if plate is None else plate(lambda *args, **kwargs: fn(*args, **kwargs))


def _shared_plates(pair: tuple[Trace, Trace]) -> list[Any]:
    """Return the frames of the plates that all sites of a model and its guide share."""
    sites = [site for trace in pair for site in traces.sample_sites(trace).values() if not is_computed(site)]
    stacks = [{frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized} for site in sites]
    return [
        frame
        for name, frame in (stacks[0].items() if stacks else ())
        if name != PARTICLES and all(name in stack for stack in stacks)
    ]


def _densities(model_trace: Trace, guide_trace: Trace, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log p and log q of a run, and log q of the draws that are not reparametrised, summed to batch dimensions.

    Raises:
        ValueError: if the guide lacks a latent variable of the model, or has a draw that is reparametrised in part.
    """
    missing = [name for name in traces.latents(model_trace) if name not in guide_trace.nodes]
    if missing:
        raise ValueError(
            f"ImportanceWeightedELBO wants a guide for every latent variable, but the guide has none for {listed(missing)}. "
            "Add them to the guide; discrete ones may be summed out by TraceEnum_ELBO instead."
        )
    guide_trace.compute_score_parts()
    score: Tensor | None = None
    for name, site in traces.sample_sites(guide_trace).items():
        _, score_function, entropy = site["score_parts"]
        if is_identically_zero(score_function):
            continue
        if not is_identically_zero(entropy):
            raise ValueError(
                f"ImportanceWeightedELBO has no gradient for draws that are reparametrised in part, as those of {name!r}. Take "
                "another distribution, or Trace_ELBO."
            )
        term = traces.sum_to_dims(score_function, dims)
        score = term if score is None else score + term
    log_p, log_q = (traces.log_prob(trace, dims, scaled=True) for trace in (model_trace, guide_trace))
    return log_p, log_q, score


def _bound(log_w: Tensor, scale: float) -> Tensor:
    """Return the bound of all rows in nats, ()."""
    return scale * (log_w.logsumexp(0) - log(len(log_w))).sum()


def _plain(weights: _Weights) -> Tensor:
    """Return minus the bound, (), with the plain gradient; draws that are not reparametrised have the score function's."""
    log_w = weights.log_p - weights.log_q
    bound = _bound(log_w, weights.scale)
    if weights.score is None:
        return -bound
    surrogate = weights.scale * (_signals(log_w.detach()) * weights.score).sum()
    return -bound - (surrogate - surrogate.detach())


def _signals(log_w: Tensor) -> Tensor:
    r"""Return by how much each draw raises the bound, (K, rows...): the bound, minus that without the draw.

    In the latter the weight of the draw is replaced by the geometric mean of the others (arXiv 1602.06725).
    """
    k = len(log_w)
    bound = log_w.logsumexp(0) - log(k)
    if k == 1:
        return bound[None]
    itself = torch.eye(k, dtype=torch.bool, device=log_w.device).reshape(k, k, *(1 for _ in log_w.shape[1:]))
    mean = torch.where(itself, 0.0, log_w[None]).sum(1) / (k - 1)
    others = torch.where(itself, mean[:, None], log_w[None])
    return bound - (others.logsumexp(1) - log(k))
