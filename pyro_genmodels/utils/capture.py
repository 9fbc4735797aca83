"""A check that the values of a tensor can be read by Python code: that no graph is captured and no function transformed."""

from __future__ import annotations

__all__ = ["can_be_read"]

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def can_be_read(values: Tensor) -> bool:
    """Return True if Python code may branch on the values of a tensor.

    False while a graph is captured (by `torch.compile`, `torch.export`, `torch.jit.trace`, a CUDA graph), under the transforms
    of `torch.func`, and for subclasses of `Tensor`.

    Example:
        >>> can_be_read(torch.ones(2)), torch.vmap(lambda x: x + can_be_read(x))(torch.zeros(2))
        (True, tensor([0., 0.]))
    """
    traced = torch.compiler.is_compiling() or get_proxy_mode() is not None or torch.jit.is_tracing()
    plain = type(values) in (Tensor, nn.Parameter) and torch.func.debug_unwrap(values) is values
    return plain and not traced and not (values.is_cuda and torch.cuda.is_current_stream_capturing())
