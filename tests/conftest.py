"""Servers that several test modules share, started once a session."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Generator, Iterator
from typing import Any

# Before anything imports Triton: it decides then. Servers do not inherit it.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import start_log
from hypothesis import HealthCheck, settings

from sglang_pic.eval import serving
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.models.tiny import tiny_llama
from sglang_pic.eval.serving import Server

# How fast an example runs says more about the machine than about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

CHECKS = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
TINY = (
    "--skip-tokenizer-init",
    "--pic-min-segment=1",
    "--max-total-tokens=8192",
    "--max-running-requests=16",
    # What one test makes recur must not be made for another.
    "--pic-company-when=asked",
    # A test asks once.
    "--pic-cold=link",
)


# With ``-n``, modules that share servers are one worker's, in turn; any other is some worker's.
SHARED = re.compile(r'\b(page1|page16|smollm)(: Server|")')


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler.loadscope import LoadScopeScheduling

    @functools.cache
    def group_of(module: str) -> str:
        text = (config.rootpath / module).read_text(encoding="utf-8")
        return "shared servers" if SHARED.search(text) else module

    class ByServers(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid.partition("::")[0])

    return ByServers(config, log)


# SGLang's kits that stock has failed in this session, by kit and test.
_failed: set[tuple[str, str]] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """What stock does not pass on this machine is not asked of ours."""
    report = yield
    kit = getattr(item, "cls", None)
    run = getattr(kit, "which", None)
    if kit is not None and run is not None and report.when == "call" and report.failed:
        which = (kit.__name__.removeprefix(f"Test_{run}_"), item.name)
        if run == "stock":
            _failed.add(which)
        if which in _failed:
            report.outcome, report.wasxfail = "skipped", "stock does not pass it here"
    return report


_started: dict[str, float] = {}


@contextlib.contextmanager
def serve(model: Any, log: pathlib.Path, *args: str, **options: Any) -> Iterator[Server]:
    """``eval.serving.serve``, its start-up time noted under the log's name."""
    with serving.serve(model, log, *args, **options) as server:
        _started[log.stem] = server.start_s
        start_log.keep(log)
        yield server


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker's go to the process that has the terminal."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["started"] = _started


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _started.update(getattr(node, "workeroutput", {}).get("started", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _started:
        times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in _started.items())
        terminalreporter.write_line(f"server start-up: {times}")


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random two-layer Llama."""
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def page1(tiny_path: pathlib.Path, logs: pathlib.Path) -> Iterator[Server]:
    """Page size 1, overlap scheduling."""
    with serve(tiny_path, logs / "page1.log", *TINY, env=CHECKS) as server:
        yield server


@pytest.fixture(scope="session")
def page16(tiny_path: pathlib.Path, logs: pathlib.Path) -> Iterator[Server]:
    """Page size 16, short chunks, mixed chunks, requests retracted by force."""
    hard = ("--page-size=16", "--chunked-prefill-size=64", "--enable-mixed-chunk")
    env = {**CHECKS, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    with serve(tiny_path, logs / "page16.log", *TINY, *hard, env=env) as server:
        yield server


@pytest.fixture(scope="session")
def smollm(logs: pathlib.Path) -> Iterator[Server]:
    """SmolLM2-135M with its tokenizer and chat template; companies when asked for,
    documents linked the first time, answers forced on demand."""
    flags = ("--max-total-tokens=16384", "--pic-company-when=asked", "--pic-cold=link")
    with serve(ensure_model(), logs / "smollm.log", *flags) as server:
        yield server
