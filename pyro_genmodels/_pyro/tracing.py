"""Private parts of torch that trace functions and watch operations."""

from __future__ import annotations

__all__ = ["TorchDispatchMode", "disable_proxy_modes_tracing", "make_fx", "tree_flatten", "tree_iter", "tree_unflatten"]

from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
