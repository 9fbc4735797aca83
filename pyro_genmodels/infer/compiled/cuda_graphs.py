"""Calls of compiled code as CUDA graphs: all kernels of a call are launched at once, without Python in between."""

from __future__ import annotations

__all__ = ["can_be_recorded", "recorded"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_genmodels.infer.compiled.graph import Graph

WARM_UPS = 3
"""Number of calls before the recording, in which libraries set up what they need."""


def can_be_recorded(tensors: Sequence[Tensor]) -> bool:
    """Return True if all tensors are on one CUDA device: a CUDA graph would keep numbers of the CPU as they are."""
    return bool(tensors) and all(x.is_cuda and x.device == tensors[0].device for x in tensors)


def recorded(run: Callable[..., Sequence[Tensor]], graph: Graph, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Return compiled code as a CUDA graph, with the same arguments and results. Random numbers differ from call to call.

    Tensors that the graph reads are read where they are in memory. If one of them is moved, as by ``p.data = ...``, the code is
    run without the CUDA graph.

    Args:
        run: compiled code, a function of the inputs and of the tensors that the graph reads.
        graph: the graph.
        inputs: inputs like those of later calls.
    """
    fixed = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with graph.put_back(), torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run(*fixed, *graph.read)
        stream.synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        results = run(*fixed, *graph.read)
    addresses = [x.data_ptr() for x in graph.read]

    def call(*tensors: Tensor) -> Sequence[Tensor]:
        given, read = tensors[: len(fixed)], tensors[len(fixed) :]
        if [x.data_ptr() for x in read] != addresses:
            return run(*tensors)
        for x, value in zip(fixed, given, strict=True):
            x.copy_(value)
        recording.replay()
        return [x.clone() if isinstance(x, Tensor) else x for x in results]

    return call
