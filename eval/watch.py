"""What a server holds while it runs, sampled: its processes' memory and its cache."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from typing import Any

import aiohttp
import numpy as np
import psutil
from scipy import stats

from sglang_pic.eval.serving import Server

EVERY_S = 2.0
# The forest's dump walks every segment.
FOREST_EVERY = 5
BUCKETS = 20


@dataclasses.dataclass(frozen=True)
class Sight:
    """One sample: seconds since the start, bytes of all processes together, and bytes
    of the cache by kind, as ``/pic/stats`` has them."""

    s: float
    rss: int
    kv: dict[str, int]
    state: dict[str, int]
    pins: int

    def to_json(self) -> dict[str, Any]:
        return {
            "s": round(self.s, 2),
            "rss_bytes": self.rss,
            **{f"kv_{name}_bytes": value for name, value in self.kv.items()},
            **{f"state_{name}_bytes": value for name, value in self.state.items()},
            "pins": self.pins,
        }

    @property
    def over_budget(self) -> str | None:
        """Which budget is exceeded, if one is."""
        for name, held in (("kv", self.kv), ("state", self.state)):
            if held["segment"] + held["turn"] > held["budget"]:
                return f"{name}: {held['segment']} + {held['turn']} bytes of {held['budget']}"
        return None


def resident(pid: int) -> int:
    """Bytes of memory of a process and all its children."""
    total = 0
    parent = psutil.Process(pid)
    for process in (parent, *parent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


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
        sight = Sight(at, resident(self._server.pid), rank["kv"], rank["state"], rank["pins"])
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


def growth(sights: list[Sight]) -> Growth:
    """Least squares over the means of up to twenty stretches: single samples depend on
    their neighbours, and their interval would be too narrow.

    Raises:
        ValueError: fewer than six samples in the last half.
    """
    last = sights[len(sights) // 2 :]
    if len(last) < 6:
        raise ValueError("too few samples")
    parts = np.array_split(np.arange(len(last)), min(BUCKETS, len(last) // 2))
    minutes = [float(np.mean([last[i].s for i in part])) / 60 for part in parts]
    means = [float(np.mean([last[i].rss for i in part])) for part in parts]
    fit = stats.linregress(minutes, means)
    return Growth(float(fit.slope), float(fit.stderr * stats.t.ppf(0.975, len(parts) - 2)))
