"""Times on a GPU, and the two floors that they are held against."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch

# Written between runs, so that no run finds its data in the cache.
_FLUSH_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Floors:
    """Measured in the same run: bytes a second of a copy, read and write counted, and
    FLOP a second of a large bfloat16 matrix product."""

    copy: float
    matmul: float


def time_s(call: Callable[[], Any], *, repeat: int = 20, warm: int = 3) -> float:
    """Median seconds of a call on the device, by CUDA events, on a cold cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeat):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def graph_s(call: Callable[[], Any], *, repeat: int = 20) -> float:
    """As ``time_s``, the call captured in a CUDA graph: without the time that the host
    takes to launch it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return time_s(graph.replay, repeat=repeat)


def floors() -> Floors:
    """Of this device."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / time_s(lambda: target.copy_(source))
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return Floors(copied, 2 * n**3 / time_s(lambda: a @ b))
