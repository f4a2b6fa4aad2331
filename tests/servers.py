"""Start a real server for a test and stop it again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import requests

START_TIMEOUT_S = 600
COMMON_ARGS = (
    "--dtype=float32",
    "--mem-fraction-static=0.3",
    "--sleep-on-idle",
    "--skip-server-warmup",
    "--log-level=warning",
)


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server: its address, its log, and how long it took to start."""

    url: str
    log: pathlib.Path
    start_s: float

    def post(self, path: str, body: Any, *, timeout: float = 300) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=timeout)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=60)

    def generate(self, **body: Any) -> Any:
        """Answer of ``/generate``; fails the test on any status but 200."""
        response = self.post("/generate", body)
        assert response.status_code == 200, response.text
        return response.json()

    def forest(self) -> dict[str, Any]:
        """The forest of the one rank, its integrity checked."""
        state = self.get("/pic/forest").json()[0]
        assert state["integrity"] == "ok", state["integrity"]
        return state


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(
    model: str | os.PathLike[str],
    log: pathlib.Path,
    *args: str,
    module: str = "sglang_pic.launch_server",
    env: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server until the block ends.

    Args:
        model: model directory.
        log: file for its output.
        args: further command line arguments.
        module: what to run; ``sglang.launch_server`` is stock SGLang.
        env: further environment variables.

    Raises:
        RuntimeError: it did not come up; the message ends with its log.
    """
    port = free_port()
    command = [sys.executable, "-m", module, "--model-path", str(model), f"--port={port}"]
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *COMMON_ARGS, *args],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(url + "/health", timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                raise RuntimeError(f"{command} did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield Server(url, log, time.monotonic() - started)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
