"""Compile Triton kernels for a GPU that is not there, as they would be launched.

Triton asks its driver which device to compile for. Here a driver that has none answers
for a Hopper, and whatever launches a kernel compiles it instead, from the very arguments
of the launch. For a process that does nothing else with Triton: the driver stays, and
where kernels are interpreted there is none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
# What a block may take of a Hopper's shared memory.
SHARED_LIMIT = 227 << 10


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the assembler says of one kernel.

    Attributes:
        registers: of a thread.
        shared: bytes of a block.
        spilled: bytes of local memory of a thread.
        warps: of a block.
        seconds: that compiling took.
    """

    kernel: str
    registers: int
    shared: int
    spilled: int
    warps: int
    seconds: float


class _Absent:
    """A driver of a device that is not there."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass


@contextlib.contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Within it launches compile; yields what was compiled, in order, each kernel once
    for each of its specialisations."""
    found: list[Compiled] = []
    seen: set[str] = set()
    launch = JITFunction.__getitem__

    def compile_only(kernel: Any, grid: Any) -> Any:
        def warm(*args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            made = kernel.warmup(*args, grid=grid, **kwargs)
            if made.hash not in seen:
                seen.add(made.hash)
                found.append(_read(made, time.perf_counter() - started))

        return warm

    driver.set_active(_Absent())
    JITFunction.__getitem__ = compile_only
    try:
        yield found
    finally:
        JITFunction.__getitem__ = launch


def _read(made: Any, seconds: float) -> Compiled:
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        listed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", listed)}
    return Compiled(
        made.metadata.name.lstrip("_"),
        usage["REG"],
        made.metadata.shared,
        max(usage.get("STACK", 0), usage.get("LOCAL", 0)),
        made.metadata.num_warps,
        seconds,
    )
