"""A server's start: SGLang's last steps, and what the log says."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import logging
import pathlib
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import start_log
from sglang.srt.entrypoints import http_server
from sglang.srt.server_args import ServerArgs

from sglang_pic.eval.serving import free_port
from sglang_pic.server import startup


def test_sglang_calls_its_own_server_when_that_listens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang's thread, without a warm-up, before a server that listens late."""
    args = ServerArgs(model_path="dummy", host="127.0.0.1", port=free_port())
    model = SimpleNamespace(
        checkpoint_engine_wait_weights_before_ready=False, delete_ckpt_after_loading=False
    )
    serving = SimpleNamespace(skip_server_warmup=True, admin_api_key=None, api_key="key")
    for name, value in {
        "get_model": model,
        "get_serving": serving,
        "get_exec": SimpleNamespace(moe=SimpleNamespace(is_ep_scale_joiner=False)),
        "get_observability": SimpleNamespace(debug_tensor_dump_input_file=None),
    }.items():
        monkeypatch.setattr(http_server, name, lambda value=value: value)
    state = SimpleNamespace(tokenizer_manager=SimpleNamespace(server_status=None))
    monkeypatch.setattr(http_server, "_global_state", state)

    async def settle() -> None:
        settled.append(True)

    settled: list[bool] = []
    guards = SimpleNamespace(canary=SimpleNamespace(settle=settle))
    front = SimpleNamespace(guards=guards, documents=SimpleNamespace(settle=settle))
    monkeypatch.setattr(startup, "get_global_state", lambda: state)
    monkeypatch.setattr(startup, "get_model", lambda: model)
    monkeypatch.setattr(startup, "funnel_of", lambda manager: front)

    ready: list[bool] = []
    asked: list[str] = []
    app = SimpleNamespace(
        is_single_tokenizer_mode=True,
        server_args=args,
        warmup_thread_kwargs={"server_args": args, "launch_callback": lambda: ready.append(True)},
    )

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    @contextlib.asynccontextmanager
    async def sglangs(app: Any) -> AsyncIterator[None]:
        thread = threading.Thread(
            target=http_server._wait_and_warmup, kwargs=app.warmup_thread_kwargs
        )
        thread.start()
        yield
        await asyncio.to_thread(thread.join, 30)
        assert not thread.is_alive()

    async def start() -> None:
        async with startup.canary_first(sglangs)(app):
            assert settled == [True, True]
            await asyncio.sleep(0.5)
            assert not ready
            listening = http.server.ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
            threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        listening.shutdown()
        listening.server_close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(start())
    assert asked == ["/freeze_gc"] and ready == [True]
    assert not caplog.records


def test_one_that_never_listens_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "LISTEN_TIMEOUT_S", 0.3)
    startup.wait_until_it_listens(f"http://127.0.0.1:{free_port()}")


def test_an_unexpected_line_is_found(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "/x/site-packages/sglang/a.py:1: UserWarning: no GPU\n  warnings.warn(\n"
        "shards:   0% Completed | 0/1\rshards: 100% Completed | 1/1\n"
        "[now] Cannot detect CUDA architecture.\n"
        "[now] post-warmup freeze_gc failed\nTraceback (most recent call last):\n"
    )
    start_log.keep(log)
    assert start_log.unexpected(log) == [
        "[now] post-warmup freeze_gc failed",
        "Traceback (most recent call last):",
    ]


@pytest.mark.server
@pytest.mark.parametrize("name", ["page1", "page16", "smollm"])
def test_a_healthy_start_says_nothing_alarming(name: str, request: pytest.FixtureRequest) -> None:
    assert start_log.unexpected(request.getfixturevalue(name).log) == []
