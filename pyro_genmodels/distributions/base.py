r"""The base of all distributions of the library.

A generative distribution :math:`p(x \mid c)` consists of a network and a context. The network is shared and never copied. The
context carries the batch shape. A *pretransform* :math:`y = g(x)` maps the data to the space that the network models:

.. math:: \log p(x) = \log p_y(g(x)) + \log |\det \partial g / \partial x| .

A subclass defines the density and the samples in that space, for values and contexts of one common batch shape. The base
broadcasts both before it applies any transform.

A value may have any type of real numbers. The pretransform is computed in the more precise of its type and the value's, so that
a large offset is subtracted before anything is rounded; the network gets its own type. Samples lie strictly inside of the
support: where a float is rounded to an end, it is moved to the float beside it.
"""

from __future__ import annotations

__all__ = ["GenerativeDistribution"]

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance, track_provenance
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints

from pyro_genmodels.distributions.capabilities import Capabilities
from pyro_genmodels.utils.distributions import has_active_dropout, interior, is_real, map_tensors, modules_and_tensors
from pyro_genmodels.utils.tensors import all_finite, as_tensor


class GenerativeDistribution(Capabilities, TorchDistribution):
    """Base of the library's distributions.

    Args:
        event_shape: shape of one datum.
        context: conditioning input of the network, (batch..., c), or None.
        batch_shape: batch shape; by default that of the context, or () without one.
        support: support of one coordinate, or of the whole event.
        pretransform: bijection from data to the space that the network models, over whole events. None is the identity.
        validate_args: True checks values; None is torch's default.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    network: Any = None
    """Callable that a sample evaluates more than once, if any."""

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Tensor | None = None,
        batch_shape: Sequence[int] | None = None,
        support: constraints.Constraint = constraints.real,
        pretransform: Transform | None = None,
        validate_args: bool | None = None,
    ) -> None:
        event_shape = Size(event_shape)
        if batch_shape is None:
            batch_shape = () if context is None else context.shape[:-1]
        self.context = context
        self.pretransform = pretransform
        missing = len(event_shape) - support.event_dim
        self._support = constraints.independent(support, missing) if missing else support
        super().__init__(Size(batch_shape), event_shape, validate_args=validate_args)

    @abstractmethod
    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the log density of y (batch..., *event_shape), given context (batch..., c) or None: (batch...)."""

    @abstractmethod
    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        """Return samples of y, (*shape, *event_shape), given context (*shape, c) or None."""

    @property
    def owner(self) -> str:
        """Name for error messages: that of the class, or of the family that the user has called."""
        return type(self).__name__

    @property
    def support(self) -> constraints.Constraint:
        return self._support

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density (nats) of value (sample..., *batch_shape, *event_shape): (sample..., *batch_shape).

        The attribute `density` says if it is exact, a bound, an estimate or unnormalised. Numbers, lists, NumPy arrays and
        pandas frames are values too.

        Raises:
            TypeError: if the value does not consist of numbers.
            ValueError: if the value holds integers and the support is real numbers. If arguments are validated, also if the
                value has another event shape, is not finite or lies outside of the support.
        """
        if isinstance(value, ProvenanceTensor) or isinstance(self.context, ProvenanceTensor):
            return self._tracked_log_prob(value)
        if torch.is_inference_mode_enabled():
            return self._outside_inference_mode("log_prob", value)
        y, context, log_det = self.aligned(value)
        return self._log_prob(y, context) + log_det

    def _outside_inference_mode(self, method: str, value: Any) -> Tensor:
        """Call a method outside of `torch.inference_mode`, which forbids the gradients it needs; its result has no graph."""
        with torch.inference_mode(mode=False), torch.no_grad():
            return getattr(map_tensors(self, torch.clone), method)(self._on_device(value).clone())

    def _tracked_log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, or zeros if there is none, with the provenance that `pyro.render_model` reads."""
        plain, x = map_tensors(self, detach_provenance), detach_provenance(value)
        shape = self._common_batch_shape(x)
        log_p = torch.zeros(shape, device=x.device) if self.density == "none" else plain.log_prob(x)
        tracked: Tensor = track_provenance(log_p, get_provenance([value, *modules_and_tensors(self)[1]]))
        return tracked

    def unnormalized_log_prob(self, value: Tensor) -> Tensor:
        """Return the log density (nats) up to a constant, which is cheaper than `log_prob` for some distributions."""
        return self.log_prob(value)

    def aligned(self, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """Return the value in the network's space and type, the context in the same batch shape, and the log determinant."""
        value = self._as_value(value)
        if self._validate_args:
            self._validate_sample(value)
        shape = self._common_batch_shape(value)
        y = value.expand(shape + self.event_shape)
        log_det: Tensor | float = 0.0
        if self.pretransform is not None:
            x, y = y, self.pretransform(y)
            log_det = self.pretransform.log_abs_det_jacobian(x, y)
        y = self._rounded(y)
        if isinstance(log_det, Tensor):
            log_det = log_det.to(self._network_dtype or y.dtype)
        return y, self._context_at(shape), log_det

    def _rounded(self, y: Tensor) -> Tensor:
        """Return a value in the network's space, if it holds floats, in the type of the network."""
        return y if (dtype := self._network_dtype) is None or not y.is_floating_point() else y.to(dtype)

    def _common_batch_shape(self, value: Tensor) -> Size:
        """Return the batch shape of a value (batch..., *event_shape), broadcast with that of the distribution."""
        shape = value.shape[: value.dim() - self.event_dim]
        return shape if shape == self.batch_shape or not self.batch_shape else torch.broadcast_shapes(shape, self.batch_shape)

    def _as_value(self, value: Any) -> Tensor:
        """Return a value as a tensor of numbers and events of the right kind."""
        value = self._on_device(value)
        if not (value.is_floating_point() or self.support.is_discrete):
            raise ValueError(
                f"{self.owner} has a density over real numbers, but the value holds {value.dtype}. Convert it "
                "with .float(), or model integers with Flow(..., levels=K) or Dequantized(flow, levels=K)."
            )
        if value.shape[max(value.dim() - self.event_dim, 0) :] != self.event_shape:
            raise ValueError(
                f"{self.owner} wants values whose shape ends with its event shape {tuple(self.event_shape)}, but found "
                f"{tuple(value.shape)}."
            )
        return value

    def _on_device(self, value: Any) -> Tensor:
        """Return a value as a tensor, which is on the device of the distribution unless it was a tensor before."""
        if isinstance(value, Tensor):
            return as_tensor(value, self.owner)
        floats = torch.get_default_dtype() if self._network_dtype is None else torch.float64  # rounded after the pretransform
        return as_tensor(value, self.owner, floats=floats).to(self._like().device)

    def _like(self) -> Tensor:
        """Return a tensor with the dtype and device of the network."""
        modules, tensors = modules_and_tensors(self)
        return next((t for t in (*(p for module in modules for p in module.parameters()), *tensors)), torch.empty(0))

    @property
    def _network_dtype(self) -> torch.dtype | None:
        """Type of the network's parameters, to which values are converted; None leaves them as they are."""
        parameters = self.network.parameters() if isinstance(self.network, nn.Module) else ()
        return next((p.dtype for p in parameters if p.is_floating_point()), None)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return samples without gradient, (*sample_shape, *batch_shape, *event_shape)."""
        with torch.no_grad():
            return self._transformed_draw(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return samples with the gradient of the parameters, (*sample_shape, *batch_shape, *event_shape)."""
        if not self.has_rsample:
            raise NotImplementedError(
                f"{self.owner} has no reparametrised samples (rsample). Use sample(), or SVI, which then uses the "
                "score function."
            )
        return self._transformed_draw(sample_shape)

    def _check_draws(self) -> None:
        if has_active_dropout(self.network):
            raise ValueError(
                f"{self.owner} cannot be sampled while its dropout is active: each pass would use another network. "
                "Call .eval() on the family first, or build it with dropout=0."
            )

    def _transformed_draw(self, sample_shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return samples; `dtype` is that in which the pretransform is inverted, by default that of the network."""
        self._check_draws()
        shape = Size(sample_shape) + self.batch_shape
        y = self._draw(shape, self._context_at(shape))
        return self.to_data(y if dtype is None else y.to(dtype))

    def to_data(self, y: Tensor) -> Tensor:
        """Return data from values in the space of the network, strictly inside of the support."""
        return interior(y if self.pretransform is None else self.pretransform.inv(y), self.support)

    def score(self, value: Tensor) -> Tensor:
        r"""Return the score :math:`\nabla_x \log p(x)`, of the shape of the value broadcast with the batch shape.

        Raises:
            ValueError: if the distribution is over integers.
        """
        if self.support.is_discrete:
            raise ValueError(f"{self.owner} is a distribution over integers, which has no score.")
        if torch.is_inference_mode_enabled():
            return self._outside_inference_mode("score", value)
        value = self._as_value(value)
        shape = self._common_batch_shape(value)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = value.expand(shape + self.event_shape)
            x = x if x.requires_grad else x.detach().clone().requires_grad_()
            (score,) = torch.autograd.grad(self.unnormalized_log_prob(x).sum(), x, create_graph=create_graph)
        return score

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> GenerativeDistribution:
        """Return the same distribution with a larger batch shape. Nothing is copied."""
        batch_shape = Size(batch_shape)
        own = (1,) * (len(batch_shape) - len(self.batch_shape)) + tuple(self.batch_shape)
        if len(own) != len(batch_shape) or any(a not in (1, b) for a, b in zip(own, batch_shape, strict=True)):
            raise ValueError(
                f"{self.owner} of batch shape {tuple(self.batch_shape)} cannot be expanded to "
                f"{tuple(batch_shape)}: trailing sizes must be equal or 1."
            )
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self.__dict__, _batch_shape=batch_shape)
        return new

    # Quantities without a closed form.

    @property
    def mean(self) -> Tensor:
        raise self._no_closed_form("mean", "dist.sample((10_000,)).mean(0)")

    @property
    def variance(self) -> Tensor:
        raise self._no_closed_form("variance", "dist.sample((10_000,)).var(0)")

    @property
    def mode(self) -> Tensor:
        raise self._no_closed_form("mode", "the one of dist.sample((10_000,)) with the highest dist.log_prob", density=True)

    def entropy(self) -> Tensor:
        raise self._no_closed_form("entropy", "-dist.log_prob(dist.sample((10_000,))).mean(0)", density=True)

    def cdf(self, value: Tensor) -> Tensor:
        raise self._no_closed_form("cdf", "(dist.sample((10_000,)) <= value).double().mean(0)")

    def icdf(self, value: Tensor) -> Tensor:
        raise self._no_closed_form("icdf", "dist.sample((10_000,)).quantile(value, 0)")

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002 (torch's signature)
        kind = "integers in each coordinate" if self.support.is_discrete else "real numbers"
        raise NotImplementedError(f"{self.owner} cannot enumerate its support, {kind}. Draw samples: dist.sample((10_000,)).")

    def _no_closed_form(self, name: str, estimate: str, *, density: bool = False) -> NotImplementedError:
        """Return the error for a quantity without a closed form; `density` is True if its estimate needs a density."""
        cure = f"Estimate it by {estimate}."
        if density and self.density in ("none", "unnormalized"):
            cure = f"An estimate needs a density, which is not known here. {self.advice}"
        return NotImplementedError(f"{self.owner} has no closed-form {name}. {cure}".rstrip())

    def flat(self, y: Tensor) -> Tensor:
        """Return y (batch..., *event_shape) as vectors, (batch..., number of coordinates)."""
        return y.reshape(*y.shape[: y.dim() - self.event_dim], self.event_shape.numel())

    def unflat(self, y: Tensor) -> Tensor:
        """Return vectors (batch..., number of coordinates) as events, (batch..., *event_shape)."""
        return y.reshape(y.shape[:-1] + self.event_shape)

    def _context_at(self, shape: Size) -> Tensor | None:
        return None if self.context is None else self.context.expand(shape + self.context.shape[-1:])

    def _validate_sample(self, value: Tensor) -> None:
        if value.is_floating_point() and not all_finite(value):
            raise ValueError(
                f"{self.owner} was given a value of shape {tuple(value.shape)} with "
                f"{int((~value.isfinite()).sum())} NaN or infinite entries. Drop or impute these first, or fill them and mask "
                "their rows with dist.mask(...)."
            )
        own = self.batch_shape + self.event_shape
        if not (is_real(self.support) and value.shape[value.dim() - len(own) :] == own):  # else nothing is left to check
            super()._validate_sample(value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> GenerativeDistribution:
        """Return a copy with its own detached tensors, and the same modules."""
        memo[id(self)] = new = map_tensors(self, _detached_copy)
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling, without the weak references that Pyro sets on parameters."""
        return vars(map_tensors(self, _detached_copy, modules=copy.deepcopy))


def _detached_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
