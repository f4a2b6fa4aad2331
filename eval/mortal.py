"""A peer that is killed again and again, and starts anew."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections.abc import Iterator

from sglang_pic.eval.serving import serve

LIFE_S = 120.0


class Mortal:
    """A server at one port, in a thread of its own.

    Args:
        flags: of the server.
        log: file for its output, of its last life.
        life_s: from its start until it is killed.

    Attributes:
        deaths: times that it was killed.
        failure: why it did not start, if it did not.
    """

    def __init__(
        self,
        model: pathlib.Path,
        log: pathlib.Path,
        port: int,
        *flags: str,
        life_s: float = LIFE_S,
    ):
        self._model = model
        self._log = log
        self._port = port
        self._flags = flags
        self._life_s = life_s
        self._over = threading.Event()
        self._up = threading.Event()
        self.deaths = 0
        self.failure: str | None = None

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """From its first start to its last end."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        self._up.wait()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                with serve(self._model, self._log, *self._flags, port=self._port):
                    self._up.set()
                    self._over.wait(self._life_s)
                # By SIGKILL, whatever it had under way.
                self.deaths += not self._over.is_set()
        except RuntimeError as error:
            self.failure = str(error)
        finally:
            self._up.set()
