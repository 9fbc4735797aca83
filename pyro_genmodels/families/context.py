"""Contexts: modules that turn what a distribution is conditioned on into the vector that its networks read.

A context module has an attribute ``out_features``, the length of its output, and maps a batch of contexts to
(batch..., out_features). `Labels` does so for integer classes and `VectorContext` for float vectors, which it standardises.
"""

from __future__ import annotations

__all__ = [
    "Context",
    "Labels",
    "StandardizeContext",
    "VectorContext",
    "as_context_module",
    "output_length",
]

from numbers import Integral
from typing import Any, Literal

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_genmodels.datasets.statistics import ColumnStatistics
from pyro_genmodels.families.input_warnings import CONTEXTS, InputCheck
from pyro_genmodels.families.standardization import estimate, estimate_of_all
from pyro_genmodels.utils.capture import can_be_read
from pyro_genmodels.utils.errors import check_positive_int, warn_caller
from pyro_genmodels.utils.tensors import all_finite, as_tensor

Context = int | nn.Module
StandardizeContext = bool | Literal["robust"]

MAX_EXTRAPOLATION = 100.0
"""Distance of a context from the mean of those of training, in deviations, that passes without a warning."""


class Labels(nn.Module):
    """Integer classes as a context, one-hot encoded.

    Args:
        num_classes: number of classes; labels run from 0 to num_classes - 1.

    Raises:
        ValueError: for fewer than one class, and when called with labels that are not integers from 0 to num_classes - 1.
        TypeError: when called with anything but numbers.

    Example:
        >>> from pyro_genmodels import Flow, Labels
        >>> Flow((2,), context=Labels(10))(torch.tensor([3, 7])).batch_shape
        torch.Size([2])
    """

    one: Tensor
    event_dim = 0
    """Number of dimensions of one context: a label is a number."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        check_positive_int("Labels", num_classes=num_classes)
        self.num_classes = self.out_features = num_classes
        self.register_buffer("one", torch.ones(()), persistent=False)  # knows the device and the precision

    def forward(self, labels: Tensor) -> Tensor:
        """Return the one-hot vectors (..., num_classes) of integer or boolean labels (...)."""
        labels = self.as_tensor(labels)
        self.check(labels)
        zeros = self.one.new_zeros((*labels.shape, self.num_classes))
        return zeros.scatter(-1, labels.long().unsqueeze(-1), 1.0)

    def check(self, labels: Tensor) -> None:
        """Raise a ValueError for labels that are not integers or booleans from 0 to num_classes - 1."""
        if labels.is_floating_point():
            raise ValueError(f"Labels wants integers, but found {labels.dtype}. Convert the labels with .long().")
        if is_validation_enabled() and labels.numel() and (labels.min() < 0 or labels.max() >= self.num_classes):
            raise ValueError(
                f"Labels({self.num_classes}) wants labels from 0 to {self.num_classes - 1}, but found "
                f"{int(labels.min())} to {int(labels.max())}. Renumber them, or build the family with a larger Labels(k)."
            )

    def as_tensor(self, labels: Any) -> Tensor:
        """Return labels as a tensor on the device of this module; a tensor stays on its device."""
        tensor = as_tensor(labels, "Labels")
        return tensor if isinstance(labels, Tensor) else tensor.to(self.one.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore pickled labels. Versions before 0.2 held all one-hot vectors."""
        super().__setstate__(state)
        if (all_of_them := self._buffers.pop("one_hot", None)) is not None:
            self.register_buffer("one", torch.ones_like(all_of_them[0, 0]), persistent=False)


class VectorContext(nn.Module):
    """A float vector as a context, standardised once its mean and deviation are known.

    Args:
        size: length of the vector.
        standardize: True to standardise by mean and deviation, "robust" by median and interquartile range, False not to.

    Attributes:
        loc: mean that standardisation subtracts, (size,).
        scale: deviation that standardisation divides by, (size,).
        standardized: True once both are set.

    Raises:
        ValueError: when called with integers, with vectors of another length, or with NaN or infinite entries.
        TypeError: when called with anything but numbers.
    """

    loc: Tensor
    scale: Tensor
    standardized: Tensor
    event_dim = 1
    """Number of dimensions of one context: a vector has one."""

    def __init__(self, size: int, *, standardize: StandardizeContext = True) -> None:
        super().__init__()
        if not (isinstance(standardize, bool) or standardize == "robust"):
            raise ValueError(f'standardize_context wants True, False or "robust", but found {standardize!r}.')
        self.out_features = size
        self.kind = standardize
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("standardized", torch.tensor(False))
        self._due = bool(standardize)
        self._input_check, self._has_extrapolated = InputCheck(CONTEXTS), False
        self.register_load_state_dict_pre_hook(_complete_loaded)
        self.register_load_state_dict_post_hook(_read_standardized)

    @property
    def due(self) -> bool:
        """True if contexts are to be standardised, and mean and deviation are not known yet."""
        return self._due

    def standardize(self, context: Tensor, owner: str) -> None:
        """Set mean and deviation to those of contexts (N, size), in a family called `owner`."""
        if not self.kind:
            return
        self.check(context)
        self._set_units(*estimate(context, context, self.loc, kind=self.kind, owner=owner, inputs=CONTEXTS, has_density=False))

    def standardize_by(self, found: ColumnStatistics, owner: str) -> None:
        """Set mean and deviation to those of all contexts, of which `standardize` was given a sample; but not robust ones."""
        if self.kind is True:
            self._set_units(*estimate_of_all(found, self.loc, kind=True, owner=owner, inputs=CONTEXTS))

    def _set_units(self, loc: Tensor, scale: Tensor) -> None:
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        self.standardized.fill_(True)
        self._due = False

    def forward(self, context: Tensor) -> Tensor:
        """Return the context (..., size), standardised in its own precision, in the precision of the networks."""
        context = self.as_tensor(context)
        self.check(context)
        return ((context - self.loc) / self.scale).to(self.loc.dtype)

    def as_tensor(self, context: Any) -> Tensor:
        """Return contexts as a tensor on the device of this module; a tensor is returned as it is."""
        if isinstance(context, Tensor):
            return context
        return as_tensor(context, "A family with a context").to(self.loc.device)

    def check(self, context: Tensor) -> None:
        """Raise a ValueError for contexts that are not floats, of another length, or with NaN or infinite entries."""
        if not context.is_floating_point() or context.dim() < 1 or context.shape[-1] != self.out_features:
            raise ValueError(
                f"This family wants a context of floats, (..., {self.out_features}), but found {context.dtype} of shape "
                f"{tuple(context.shape)}. For one number per row pass context[:, None]; convert other numbers by "
                ".float() (data frames by .astype(float)); for integer classes build the family with context=Labels(k)."
            )
        if is_validation_enabled() and not all_finite(context):
            raise ValueError(f"The context, of shape {tuple(context.shape)}, has NaN or infinite entries. Impute them first.")

    def warn_if_far(self, embedded: Tensor, owner: str, *, in_training: bool) -> None:
        """Warn once, in training, of contexts from which networks cannot learn; else of those far outside those of training.

        Args:
            embedded: contexts as networks see them, (..., size).
            owner: name of the family.
            in_training: True if the family is being trained.
        """
        if not in_training:
            self._warn_of_extrapolation(embedded, owner)
        elif self.kind:
            self._input_check(embedded, owner=owner, event_dim=1, standardized=not self.due)

    def _warn_of_extrapolation(self, embedded: Tensor, owner: str) -> None:
        """Warn once of contexts many deviations from the mean. An interquartile range says nothing of the range of values."""
        if self._has_extrapolated or self.due or self.kind is not True or not embedded.numel() or not can_be_read(embedded):
            return
        largest = embedded.detach().abs().reshape(-1, self.out_features).amax(0)
        if not bool((largest > MAX_EXTRAPOLATION).any()):
            return
        self._has_extrapolated = True
        if bool((self.loc != 0).any() or (self.scale != 1).any()):  # else they were not standardised, before 0.2
            i = int(largest.argmax())
            warn_caller(
                f"{owner}: a context is far outside those of training: its coordinate {i} is {float(largest[i]):.3g} "
                "deviations from their mean. The distribution given it is an extrapolation.",
                UserWarning,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled context. Versions before 0.2 did not standardise contexts, and so this one stays."""
        if "kind" not in state:
            VectorContext.__init__(self, state["out_features"])
            self.standardized.fill_(True)
            self._due, self.training = False, state["training"]
            return
        super().__setstate__(state)

    def complete_state(self, state: dict[str, Any], prefix: str) -> None:
        """Add to a `state_dict` of a version before 0.2 what it lacks: its contexts were not standardised."""
        if not any(prefix + name in state for name in ("loc", "scale", "standardized")):
            state[prefix + "loc"] = torch.zeros_like(self.loc, device="cpu")
            state[prefix + "scale"] = torch.ones_like(self.scale, device="cpu")
            state[prefix + "standardized"] = torch.tensor(True)


def _complete_loaded(module: VectorContext, state: dict[str, Any], prefix: str, *_: Any) -> None:
    module.complete_state(state, prefix)


def _read_standardized(module: VectorContext, _: Any) -> None:
    module._due = bool(module.kind) and not bool(module.standardized)


def as_context_module(context: Context, *, standardize: StandardizeContext = True) -> nn.Module | None:
    """Return the module that embeds a context.

    Args:
        context: length of a float vector, 0 for no context, or a module with an attribute `out_features`.
        standardize: see `VectorContext`.

    Returns:
        A module, or None if there is no context.

    Raises:
        ValueError: if it is neither a length nor a module whose output length is known.
    """
    if isinstance(context, nn.Module):
        output_length(context)
        return context
    if isinstance(context, bool) or not isinstance(context, Integral) or context < 0:
        raise ValueError(f"context wants a vector length (0 or more), Labels(k) or a module, but found {context!r}.")
    vectors = VectorContext(int(context), standardize=standardize)  # checks `standardize` without a context too
    return vectors if context else None


def output_length(module: nn.Module) -> int:
    """Return the length of a context module's output vector.

    Raises:
        ValueError: if neither the module nor a layer in it has an attribute `out_features` or `embedding_dim`.
    """
    for part in (module, *reversed(list(module.modules()))):  # the module itself, then its layers from the last to the first
        size = getattr(part, "out_features", getattr(part, "embedding_dim", None))
        if isinstance(size, int):
            return size
    raise ValueError(
        f"The output length of the context module {type(module).__name__} is not known. Give it an attribute out_features."
    )
