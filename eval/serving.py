"""Start a real server for a measurement or a test, talk to it, stop it again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
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
    """A running server: its address, its log, how long it took to start, the process
    that the others are children of, and SGLang's list of plug-ins to load, if it has one."""

    url: str
    log: pathlib.Path
    start_s: float
    pid: int = 0
    plugins: str | None = None

    def post(self, path: str, body: Any, *, timeout: float = 300) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=timeout)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=60)

    def generate(self, **body: Any) -> Any:
        """Answer of ``/generate``.

        Raises:
            RuntimeError: any status but 200.
        """
        response = self.post("/generate", body)
        if response.status_code != 200:
            raise RuntimeError(f"{self.url}: {response.status_code} {response.text[:500]}")
        return response.json()

    def first_token(self, **body: Any) -> tuple[float, dict[str, Any]]:
        """Stream ``/generate``; seconds until the first token, and its chunk.

        Raises:
            RuntimeError: the server refused the request or ended the stream early.
        """
        seconds, first, _ = self.streamed(**body)
        return seconds, first

    def streamed(self, **body: Any) -> tuple[float, dict[str, Any], dict[str, Any]]:
        """As ``first_token``, with the last chunk besides."""
        start = time.perf_counter()
        with requests.post(
            self.url + "/generate", json={**body, "stream": True}, stream=True, timeout=600
        ) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{self.url}: {response.status_code} {response.text[:500]}")
            first: tuple[float, dict[str, Any]] | None = None
            last = b""
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    last = line[6:]
                    if first is None:
                        first = time.perf_counter() - start, json.loads(last)
        if first is None or "error" in first[1]:
            raise RuntimeError(f"{self.url}: no token came: {first}")
        return *first, json.loads(last)

    @functools.cached_property
    def parts(self) -> list[str]:
        """Which parts of ours run in it; to be asked first while it runs.

        Stock SGLang starts on a plain CPU on our platform, and a comparison with it
        can't show what that does.
        """
        info = self.get("/server_info").json()
        listed = None if self.plugins is None else self.plugins.split(",")
        on_cpu = info["device"] == "cpu" and os.environ.get("SGLANG_USE_CPU_ENGINE") != "1"
        platform = on_cpu and (listed is None or "sglang_pic_cpu" in listed)
        plugin = listed is None or "sglang_pic" in listed
        links = plugin and info["radix_cache_backend"] == "pic"
        found = {
            "platform": platform,
            "hooks": plugin,
            "linear kernels": plugin and platform,
            "cache": links,
            "attention": links,
            "front": links,
        }
        return [name for name, runs in found.items() if runs]

    def forest(self) -> dict[str, Any]:
        """The forest of the one rank.

        Raises:
            RuntimeError: its integrity check found something.
        """
        state = self.get("/pic/forest").json()[0]
        if state["integrity"] != "ok":
            raise RuntimeError(state["integrity"])
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
    command: Sequence[str] | None = None,
    env: dict[str, str] | None = None,
    port: int | None = None,
) -> Iterator[Server]:
    """Run a server until the block ends.

    Args:
        model: model directory.
        log: file for its output.
        args: further command line arguments.
        module: what to run; ``sglang.launch_server`` is stock SGLang.
        command: what to run instead of a module of this Python.
        env: further environment variables.
        port: to listen on; a free one by default.

    Raises:
        RuntimeError: it did not come up; the message ends with its log.
    """
    port = free_port() if port is None else port
    launcher = command or (sys.executable, "-m", module)
    line = [*launcher, "--model-path", str(model), f"--port={port}", *COMMON_ARGS, *args]
    started = time.monotonic()
    # A test's interpreted kernels are its own.
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own.update(env or {})
    with log.open("wb") as out:
        process = subprocess.Popen(
            line,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=own,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(url + "/health", timeout=5).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                raise RuntimeError(f"{line} did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        start_s = time.monotonic() - started
        yield Server(url, log, start_s, process.pid, own.get("SGLANG_PLUGINS"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
