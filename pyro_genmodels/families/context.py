"""Contexts: modules that turn what a distribution is conditioned on into the vector that its networks read.

A context module has an attribute ``out_features``, the length of its output, and maps a batch of contexts to
(batch..., out_features). `Labels` does so for integer classes and `VectorContext` for float vectors.
"""

from __future__ import annotations

__all__ = ["Context", "Labels", "VectorContext", "as_context_module", "check_one_per_row", "output_length"]

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyro_genmodels.utils.errors import check_positive_int

Context = int | nn.Module


class Labels(nn.Module):
    """Integer classes as a context, one-hot encoded.

    Args:
        num_classes: number of classes; labels run from 0 to num_classes - 1.

    Raises:
        ValueError: for fewer than one class, and when called with labels that are not integers from 0 to num_classes - 1.
        TypeError: when called with anything but a tensor.

    Example:
        >>> from pyro_genmodels import Flow, Labels
        >>> Flow((2,), context=Labels(10))(torch.tensor([3, 7])).batch_shape
        torch.Size([2])
    """

    one_hot: Tensor
    event_dim = 0
    """Number of dimensions of one context: a label is a number."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        check_positive_int("Labels", num_classes=num_classes)
        self.num_classes = self.out_features = num_classes
        self.register_buffer("one_hot", torch.eye(num_classes), persistent=False)

    def forward(self, labels: Tensor) -> Tensor:
        """Return the one-hot vectors (..., num_classes) of integer labels (...)."""
        if not isinstance(labels, Tensor):
            raise TypeError(f"Labels wants a tensor of integers, but found {type(labels).__name__}. Use torch.tensor(labels).")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"Labels wants integers, but found {labels.dtype}. Convert the labels with .long().")
        if is_validation_enabled() and labels.numel() and (labels.min() < 0 or labels.max() >= self.num_classes):
            raise ValueError(
                f"Labels({self.num_classes}) wants labels from 0 to {self.num_classes - 1}, but found "
                f"{int(labels.min())} to {int(labels.max())}. Renumber them, or build the family with a larger Labels(k)."
            )
        return self.one_hot[labels.long()]


class VectorContext(nn.Module):
    """A float vector as a context, passed on unchanged.

    Args:
        size: length of the vector.

    Raises:
        ValueError: when called with integers, with vectors of another length, or with NaN or infinite entries.
        TypeError: when called with anything but a tensor.
    """

    event_dim = 1
    """Number of dimensions of one context: a vector has one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.out_features = size

    def forward(self, context: Tensor) -> Tensor:
        """Return the context (..., size) itself, once it is known to be one."""
        if not isinstance(context, Tensor):
            raise TypeError(
                f"This family wants its context as a tensor of floats, but found {type(context).__name__}. Use "
                "torch.as_tensor(context)."
            )
        if not context.is_floating_point() or context.dim() < 1 or context.shape[-1] != self.out_features:
            raise ValueError(
                f"This family wants a context of floats, (..., {self.out_features}), but found {context.dtype} of shape "
                f"{tuple(context.shape)}. For one number per row pass context[:, None]; for integer classes build the family "
                "with context=Labels(k)."
            )
        if is_validation_enabled() and not context.isfinite().all():
            raise ValueError(f"The context, of shape {tuple(context.shape)}, has NaN or infinite entries. Impute them first.")
        return context


def as_context_module(context: Context) -> nn.Module | None:
    """Return the module that embeds a context.

    Args:
        context: length of a float vector, 0 for no context, or a module with an attribute `out_features`.

    Returns:
        A module, or None if there is no context.

    Raises:
        ValueError: if it is neither a length nor a module whose output length is known.
    """
    if isinstance(context, nn.Module):
        output_length(context)
        return context
    if isinstance(context, bool) or not isinstance(context, int) or context < 0:
        raise ValueError(f"context wants a vector length (0 or more), Labels(k) or a module, but found {context!r}.")
    return VectorContext(context) if context else None


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


def check_one_per_row(module: nn.Module | None, context: Tensor | None, rows: int) -> None:
    """Check that there is one context per row of data.

    Args:
        module: the family's context module; its `event_dim`, if it has one, is the number of dimensions of one context.
        context: (rows, ...), or None.
        rows: number of rows of data.

    Raises:
        ValueError: if the number of contexts or their number of dimensions is another.
    """
    if context is None:
        return
    if len(context) != rows:
        raise ValueError(f"There are {rows} rows of x but {len(context)} of context. Pass one context per row.")
    event_dim = getattr(module, "event_dim", None)
    if event_dim is not None and context.dim() > 1 + event_dim:
        wanted = "labels as (N,)" if event_dim == 0 else f"contexts with {1 + event_dim} dimensions"
        raise ValueError(
            f"The model wants {wanted}, one per row, but found {tuple(context.shape)}. Use .squeeze(-1) or .reshape(N, ...)."
        )
