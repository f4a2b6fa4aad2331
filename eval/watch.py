"""What a server holds while it runs, sampled: its processes' memory and its cache."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
import psutil
from scipy import stats

from sglang_pic.eval.serving import Server

EVERY_S = 2.0
# The forest's dump walks every segment.
FOREST_EVERY = 5
BUCKETS = 60


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one process: resident, and of these what it shares with no other."""

    rss: int
    uss: int


@dataclasses.dataclass(frozen=True)
class Sight:
    """One sample: seconds since the start, memory of each process by its name, and bytes
    of the cache by kind, as ``/pic/stats`` has them."""

    s: float
    processes: dict[str, Memory]
    kv: dict[str, int]
    state: dict[str, int]
    pins: int

    def to_json(self) -> dict[str, Any]:
        return {
            "s": round(self.s, 2),
            **{f"{name}_rss_bytes": memory.rss for name, memory in self.processes.items()},
            **{f"{name}_uss_bytes": memory.uss for name, memory in self.processes.items()},
            **{f"kv_{name}_bytes": value for name, value in self.kv.items()},
            **{f"state_{name}_bytes": value for name, value in self.state.items()},
            "pins": self.pins,
        }

    @property
    def resident(self) -> int:
        """Bytes of all processes together; pages that they share are counted by each."""
        return sum(memory.rss for memory in self.processes.values())

    @property
    def over_budget(self) -> str | None:
        """Which budget is exceeded, if one is."""
        for name, held in (("kv", self.kv), ("state", self.state)):
            linked = sum(held.get(kind, 0) for kind in ("segment", "company", "turn"))
            if linked > held["budget"]:
                return f"{name}: {linked} bytes of {held['budget']}"
        return None


def _name_of(process: psutil.Process) -> str:
    line = process.cmdline()
    if line and line[0].startswith("sglang::"):
        return line[0].removeprefix("sglang::")
    if any("resource_tracker" in word for word in line):
        return "resource_tracker"
    return process.name()


def memory_of(pid: int) -> dict[str, Memory]:
    """Of a server's process, as ``front``, and of all its children."""
    front = psutil.Process(pid)
    found: dict[str, Memory] = {}
    for process in (front, *front.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            name = "front" if process is front else _name_of(process)
            if name in found:
                name = f"{name}_{process.pid}"
            memory = process.memory_full_info()
            found[name] = Memory(memory.rss, memory.uss)
    return found


class Watch:
    """Samples a server until it is cancelled.

    Attributes:
        sights: all samples.
        problems: what was wrong with any: a budget, the forest's integrity.
        forests: how often integrity was checked.
    """

    def __init__(self, server: Server):
        self._server = server
        self.sights: list[Sight] = []
        self.problems: list[str] = []
        self.forests = 0

    async def run(self, session: aiohttp.ClientSession) -> None:
        begin = time.monotonic()
        while True:
            await self._look(session, time.monotonic() - begin)
            if len(self.sights) % FOREST_EVERY == 0:
                await self._check_forest(session)
            await asyncio.sleep(EVERY_S)

    async def _look(self, session: aiohttp.ClientSession, at: float) -> None:
        async with session.get(f"{self._server.url}/pic/stats") as response:
            (rank,) = (await response.json())["ranks"]
        memory = memory_of(self._server.pid)
        sight = Sight(at, memory, rank["kv"], rank["state"], rank["pins"])
        self.sights.append(sight)
        if (over := sight.over_budget) is not None:
            self.problems.append(f"after {at:.0f} s over budget: {over}")

    async def _check_forest(self, session: aiohttp.ClientSession) -> None:
        async with session.get(f"{self._server.url}/pic/forest") as response:
            (state,) = await response.json()
        self.forests += 1
        if state["integrity"] != "ok":
            self.problems.append(f"integrity: {state['integrity']}")


@dataclasses.dataclass(frozen=True)
class Growth:
    """Bytes a minute over the last half of a run, and the half-width of the interval
    of 95 %."""

    slope: float
    width: float

    @property
    def low(self) -> float:
        return self.slope - self.width

    @property
    def high(self) -> float:
        return self.slope + self.width


def last_half(sights: Sequence[Sight]) -> Sequence[Sight]:
    return sights[len(sights) // 2 :]


def growth(sights: Sequence[Sight]) -> dict[str, Growth]:
    """Growth of the resident memory of each process that lived through the last half.

    Raises:
        ValueError: fewer than ten samples there.
    """
    last = last_half(sights)
    if len(last) < 10:
        raise ValueError("too few samples")
    lasting = set.intersection(*(set(sight.processes) for sight in last))
    minutes = [sight.s / 60 for sight in last]
    return {
        name: slope_of(minutes, [sight.processes[name].rss for sight in last])
        for name in last[0].processes
        if name in lasting
    }


def slope_of(minutes: Sequence[float], values: Sequence[float]) -> Growth:
    """Least squares over the means of up to sixty stretches, as many of them counted as
    are independent.

    Memory comes in steps, so that even stretches resemble their neighbours. With lag-1
    autocorrelation r of what the line leaves over, n of them tell as much as
    n (1 - r) / (1 + r) would that did not (Santer et al. 2000).
    """
    parts = np.array_split(np.arange(len(values)), min(BUCKETS, len(values) // 2))
    x = np.array([np.mean([minutes[i] for i in part]) for part in parts])
    y = np.array([np.mean([values[i] for i in part]) for part in parts])
    fit = stats.linregress(x, y)
    rest = y - fit.intercept - fit.slope * x
    square = float(rest @ rest)
    alike = max(0.0, float(rest[1:] @ rest[:-1]) / square) if square else 0.0
    count = max(3.0, len(y) * (1 - alike) / (1 + alike))
    spread = float(((x - x.mean()) ** 2).sum())
    error = (square / (count - 2) / spread) ** 0.5
    return Growth(float(fit.slope), float(error * stats.t.ppf(0.975, count - 2)))
