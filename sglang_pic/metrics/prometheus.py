"""Our metrics in SGLang's own ``/metrics``, where it runs with ``--enable-metrics``.

One task of the front process reads the front's counts, asks the schedulers for
theirs, and sets what Prometheus shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from sglang.srt.entrypoints.http_server import get_global_state
from sglang.srt.runtime_context import get_observability, get_serving

from sglang_pic.metrics.front import counts
from sglang_pic.metrics.samples import FRONT_METRICS, METRICS, RANK_METRICS, Metric
from sglang_pic.server.commands import command

logger = logging.getLogger(__name__)

POLL_S = 5.0
TIMEOUT_S = 60.0


class Exporter:
    """All metrics as objects of ``prometheus_client``.

    Make it when ``PROMETHEUS_MULTIPROC_DIR`` is set: importing ``prometheus_client``
    decides where values are kept.

    Args:
        labels: of every metric, as SGLang's own have them.
    """

    def __init__(self, labels: Mapping[str, str]):
        from prometheus_client import Counter, Gauge

        self._labels = dict(labels)
        self._seen: dict[tuple[str, ...], float] = {}
        self._shown: dict[str, Any] = {}
        for metric in METRICS:
            names = [*self._labels, *(["dp_rank"] if metric in RANK_METRICS else [])]
            names += [metric.label] if metric.label is not None else []
            if metric.is_counter:
                self._shown[metric.name] = Counter(metric.name, metric.meaning, names)
            else:
                # One process sets them. As SGLang's: the last of a restarted server's.
                self._shown[metric.name] = Gauge(
                    metric.name, metric.meaning, names, multiprocess_mode="mostrecent"
                )

    def show_front(self, front: dict[str, Any]) -> None:
        """Show what ``Counts.to_json`` says."""
        self._show(FRONT_METRICS, front, {})

    def show_ranks(self, ranks: Sequence[dict[str, Any]]) -> None:
        """Show each rank's answer to the command ``stats``."""
        for rank, numbers in enumerate(ranks):
            self._show(RANK_METRICS, numbers, {"dp_rank": str(rank)})

    def _show(
        self, metrics: Sequence[Metric], numbers: dict[str, Any], labels: dict[str, str]
    ) -> None:
        for metric in metrics:
            for own, value in metric.samples(numbers):
                named = {**self._labels, **labels, **own}
                shown = self._shown[metric.name].labels(**named)
                if metric.is_counter:
                    key = (metric.name, *named.values())
                    before = self._seen.get(key, 0.0)
                    # Less than before: it was reset, and counts from zero.
                    shown.inc(value - before if value >= before else value)
                    self._seen[key] = value
                else:
                    shown.set(value)


async def poll(manager: Any, exporter: Exporter) -> None:
    """Show what front and schedulers say, for ever; they may fail to say it."""
    failing = False
    while True:
        try:
            exporter.show_front(counts.to_json())
            exporter.show_ranks(await asyncio.wait_for(command(manager, "stats"), TIMEOUT_S))
            failing = False
        except Exception as error:
            counts.poll_failures += 1
            if not failing:
                logger.warning("sglang_pic: no new numbers for /metrics: %r", error)
            failing = True
        await asyncio.sleep(POLL_S)


async def _run() -> None:
    # Nothing that takes time before the server listens: SGLang calls itself then.
    await asyncio.sleep(POLL_S)
    labels = {"model_name": get_serving().served_model_name}
    exporter = Exporter({**labels, **(get_observability().extra_metric_labels or {})})
    await poll(get_global_state().tokenizer_manager, exporter)


@contextlib.asynccontextmanager
async def _polling(app: Any) -> AsyncIterator[None]:
    """Poll while the application runs; not where metrics are off."""
    if not get_observability().enable_metrics:
        yield
        return
    task = asyncio.create_task(_run())
    yield
    task.cancel()


# No routes: FastAPI runs its lifespan within the application's.
router = APIRouter(lifespan=_polling)
