"""Threads that may wait for a store."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Workers:
    """A few threads and the work that waits for them, bounded.

    A store that hangs must not keep the process from ending: they are daemons, and
    started at the first work.

    Args:
        name: of the threads.
        count: of them.
        most: pieces of work that may wait.
    """

    def __init__(self, name: str, count: int, most: int):
        self._name = name
        self._count = count
        self._work: queue.Queue[Callable[[], None]] = queue.Queue(most)
        self._started = 0
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], None]) -> bool:
        """Have it done, on one of them; whether it may wait."""
        try:
            self._work.put_nowait(work)
        except queue.Full:
            return False
        with self._lock:
            start = self._started < self._count
            self._started += start
        if start:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return True

    def _run(self) -> None:
        while True:
            work = self._work.get()
            try:
                work()
            except Exception:
                logger.exception("sglang_pic: work for the store failed")
            del work
