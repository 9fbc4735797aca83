"""Activations of a layer that are computed again in the backward pass instead of held in memory.

A backward pass needs the inputs of every operation. With this option only the inputs of whole layers are held, and each layer
is run once more when its gradient is wanted: about a third more time, for memory that no longer grows by what is inside of
layers. Dropout draws the same units again. Chen et al., *Training Deep Nets with Sublinear Memory Cost* (arXiv 1604.06174).
"""

from __future__ import annotations

__all__ = ["NOT_SAVED", "check_recompute", "run"]

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode  # public: listed in its module's __all__
from torch.utils.checkpoint import checkpoint

NOT_SAVED: Mapping[str, bool] = {"saved": False}
"""Metadata of a choice's field that says how to compute, not what: files of families leave it out."""


def check_recompute(owner: str, recompute: Any) -> None:
    """Raise a TypeError unless the option is True or False.

    Example:
        >>> check_recompute("UNet", 1)
        Traceback (most recent call last):
        TypeError: UNet wants recompute as True or False, but found 1.
    """
    if not isinstance(recompute, bool):
        raise TypeError(f"{owner} wants recompute as True or False, but found {recompute!r}.")


def run(layer: Callable[..., Any], *inputs: Any, recompute: bool, **options: Any) -> Any:
    """Return the output of a layer, whose activations are computed again in the backward pass if `recompute` is True.

    Transforms of `torch.func` hold them in any case.

    Args:
        layer: the layer, called as layer(*inputs, **options).
        inputs: tensors and other values.
        recompute: True to compute activations again.
        options: keyword arguments of the layer.

    Raises:
        NotImplementedError: if activations are to be computed again and a graph is being captured, which has no hooks to do so.
    """
    if not recompute or not torch.is_grad_enabled() or any(_is_transformed(x) for x in inputs):
        return layer(*inputs, **options)
    if get_proxy_mode() is not None:
        raise NotImplementedError(
            "A network with recompute=True cannot be captured as a graph, which would hold all activations: run it eagerly, by "
            "mode=Eager() or SVI, or build it with recompute=False."
        )
    return checkpoint(layer, *inputs, use_reentrant=False, **options)


def _is_transformed(x: Any) -> bool:
    """Return True for a tensor under a transform of `torch.func`."""
    return isinstance(x, Tensor) and torch.func.debug_unwrap(x) is not x
