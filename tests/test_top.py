"""``sglang-pic top`` against an imagined server, and the command that leads to it."""

from __future__ import annotations

import dataclasses
import http.server
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stats import rank_stats, report

from sglang_pic import cli, launch_server, top
from sglang_pic.client import PicClient
from sglang_pic.eval.serving import free_port
from sglang_pic.metrics.front import Counts

KEY = "a key"
CARD = {
    "id": "5e6b2f0d7a914c38b0cf4d1e92a7c653",
    "tokens": 1234,
    "held": 1200,
    "hits": 7,
    "compiled": 1,
    "last_use": 80,
    "kv_bytes": 3 << 20,
    "state_bytes": 0,
    "pinned": True,
    "value": 0.25,
    "ranks": 1,
}


class FakeServer:
    """Says what ``answers`` has for a path; 404 elsewhere, 401 without the key."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.counts.observe(report())
        self.counts.observe_compile([60], [True], 0.5, 1)
        self.ranks = [rank_stats()]
        self.segments = [{**CARD, "id": "0" * 32, "hits": 1, "pinned": False}, CARD]
        self.raw: bytes | None = None
        self.key: str | None = None
        self.asked: list[str] = []

    def answer(self, path: str, key: str | None) -> tuple[int, bytes]:
        self.asked.append(path)
        if self.raw is not None:
            return 200, self.raw
        if self.key is not None and key != f"Bearer {self.key}":
            return 401, b'{"error":"Unauthorized"}'
        answers: dict[str, Any] = {
            "/pic/stats": {"front": self.counts.to_json(), "ranks": self.ranks},
            "/pic/segments": {"segments": self.segments},
        }
        found = answers.get(path.split("?")[0])
        return (404, b"Not Found") if found is None else (200, json.dumps(found).encode())


@pytest.fixture
def fake() -> Iterator[tuple[FakeServer, str]]:
    """An imagined server, and where it listens."""
    server = FakeServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = server.answer(self.path, self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield server, f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def recorder(width: int = 160, **options: Any) -> Console:
    return Console(record=True, width=width, height=60, file=io.StringIO(), **options)


def drawn(now: top.Poll, before: top.Poll | None = None, width: int = 160) -> str:
    console = recorder(width)
    console.print(top.frame(now, before))
    return console.export_text()


def row(text: str, name: str) -> list[str]:
    """Cells of the row of a table that begins with ``name``."""
    (cells,) = re.findall(
        rf"(?:^ |  ){re.escape(name)} +([\d,]+) +(-|[\d,.]+)(?:  | $)", text, re.M
    )
    return list(cells)


def test_documents_are_shown_where_there_is_an_encoder(fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.counts.observe_encode([60, 40])
    assert "document" not in drawn(top.poll(PicClient(url)))
    (stats,) = server.ranks
    stats["encoded"] = {**stats["encoded"], "encoder": {"digest": "d"}, "bytes": 3 << 20}
    text = drawn(top.poll(PicClient(url)))
    assert row(text, "encoded") == ["2", "-"]
    assert row(text, "tokens encoded") == ["100", "-"]
    assert row(text, "no room") == ["1", "-"]
    assert "document 3.0 MiB" in text


def test_a_frame_shows_every_number(fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.counts.observe(report(exactness="exact", reason="require_exact", segments=[]))
    text = drawn(top.poll(PicClient(url)))
    assert "reuse 42%" in text
    assert row(text, "linked") == ["80", "-"]
    assert row(text, "compiled") == ["60", "-"]
    assert row(text, "hit") == ["1", "-"]
    assert row(text, "not_compiled") == ["1", "-"]
    assert row(text, "not linked: require_exact") == ["1", "-"]
    assert row(text, "admission") == ["6", "-"]
    assert row(text, "state") == ["5", "-"]
    assert "segment 40.0 MiB" in text and "pinned 8.0 MiB" in text
    assert "budget 75.0 MiB of 100.0 MiB" in text
    # What is neither held nor free is in use.
    assert "running 15.0 MiB" in text
    assert "budget 64.0 MiB" in text
    assert text.index(CARD["id"]) < text.index("0" * 32)
    assert "saved about 0.2 s" in text


def test_the_rules_that_pay_come_first(fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    assert "found by rule" not in drawn(top.poll(PicClient(url)))
    server.counts.observe_chunks({"tool": 40, "paragraph": 9000}, {"tool": 30})
    server.counts.observe_found_compile("tool")
    server.counts.observe_found("tool", 1234)
    text = drawn(top.poll(PicClient(url)))
    assert text.index("found by rule") < text.index("tool ") < text.index("paragraph ")
    assert re.search(r"tool +40 +30 +1 +1 +1\.2k", text)
    assert re.search(r"paragraph +9\.0k +0 +0 +0 +0", text)


def test_a_bar_is_as_full_as_the_pool() -> None:
    held = {"pinned": 10, "segment": 30, "turn": 0, "prefix": 20, "free": 50}
    bar, words = top._bar("KV", held, 100, "a limit")
    assert len(re.findall("[█░]", bar.plain)) == top.BAR_CELLS
    console = recorder()
    console.print(words)
    assert "segment 30 B" in console.export_text()
    assert bar.plain.count("█") == pytest.approx(0.5 * top.BAR_CELLS, abs=2)


def test_eighty_columns_are_enough(fake: tuple[FakeServer, str]) -> None:
    """No heading, number or id is cut, and no line of a bar is broken."""
    server, url = fake
    server.counts.observe(report(exactness="exact", reason="require_exact", segments=[]))
    great = {"hits": 10**6, "tokens": 123_456, "held": 99_949, "kv_bytes": 1023 << 20,
             "state_bytes": 219 << 20, "value": 1.2e-7, "last_use": 9_999_999}  # fmt: skip
    server.segments.append({**CARD, **great})
    for field in ("capacity", "budget"):
        server.ranks[0]["kv"][field] = 1000 << 20
    text = drawn(top.poll(PicClient(url)), width=80)
    assert "…" not in text
    assert "budget 1000.0 MiB of 1000.0 MiB" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["id", "hits", "tokens", "held", "KV", "state", "value", "used"] in lines
    cells = ["1.0M", "123k", "100k", "1.0G", "219M", "1e-07", "10M", "pinned"]
    assert [CARD["id"], *cells] in lines
    assert ["0" * 32, "1", "1.2k", "1.2k", "3.0M", "0", "0.25", "80"] in lines
    for name in ("prompt tokens", "segments named", "answers", "evicted tokens, states", "refused"):
        assert name in text
    assert [line.count("a second") for line in text.splitlines() if "a second" in line] == [2, 2, 1]


def test_rates_are_what_grew_between_two_polls(fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    before = top.poll(PicClient(url))
    server.counts.observe(report())
    server.ranks[0]["evicted"]["state"] += 8
    now = top.poll(PicClient(url))
    text = drawn(dataclasses.replace(now, at=before.at + 4), before)
    assert row(text, "linked") == ["80", "10.0"]
    assert row(text, "state") == ["13", "2.0"]
    # The server has started anew.
    assert row(drawn(before, now), "linked") == ["40", "0.0"]


def test_a_server_that_does_not_link_says_so(fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.ranks.append(rank_stats(refusal="speculative decoding is not supported"))
    server.ranks[0]["state"] = {"budget": 0, "segment": 0, "turn": 0, "pinned": 0}
    server.counts.linking_off = "audit_failed"
    text = drawn(top.poll(PicClient(url)))
    assert "rank 1 does not link: speculative decoding is not supported" in text
    assert "linking is switched off: audit_failed" in text
    assert "KV 1" in text
    assert "state 0" not in text


def run(*words: str) -> None:
    cli.main(["top", *words])


def test_once_prints_one_frame(fake: tuple[FakeServer, str], capsys: Any, tmp_path: Path) -> None:
    server, url = fake
    server.key = KEY
    for _ in range(2):
        run("--url", url, "--once", "--api-key", KEY, "--cache-salt", "ours", "--json",
            str(tmp_path / "polls"))  # fmt: skip
    assert "hottest segments" in capsys.readouterr().out
    assert "/pic/segments?cache_salt=ours" in server.asked
    lines = [json.loads(line) for line in (tmp_path / "polls").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["front"] == server.counts.to_json()
    assert lines[0]["ranks"] == server.ranks
    assert lines[0]["segments"] == server.segments


@pytest.mark.parametrize(
    ("raw", "key", "said"),
    [
        (None, "another", "the server at URL refuses: --api-key: 401"),
        (b"<html>", None, "no server of ours at URL: "),
        (b"{}", None, "no server of ours at URL: "),
        (b"[]", None, "no server of ours at URL: "),
    ],
)
def test_what_is_wrong_is_said(
    fake: tuple[FakeServer, str], raw: bytes | None, key: str | None, said: str, capsys: Any
) -> None:
    server, url = fake
    server.raw, server.key = raw, key
    with pytest.raises(SystemExit) as ended:
        run("--url", url, "--once")
    assert ended.value.code == 1
    assert said.replace("URL", url) in capsys.readouterr().err


def test_another_server_and_no_server(fake: tuple[FakeServer, str], capsys: Any) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    for url, said in (
        (fake[1] + "/elsewhere", "a server at URL, but none of ours: 404"),
        (nobody, "no server answers at URL: [Errno 111] Connection refused"),
        ("localhost:30000", "no server answers at URL: No connection adapters"),
        ("no address", "no server answers at URL: Failed to parse"),
    ):
        with pytest.raises(SystemExit):
            run("--url", url, "--once")
        assert said.replace("URL", url) in capsys.readouterr().err

    # One that accepts and says nothing; and what is seen of that without --once.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        console = recorder(80, force_terminal=True)
        next(top.watch(PicClient(url, timeout_s=0.2), console, None))
    assert f"no server answers at {url}: timed out" in console.export_text()


def test_a_server_that_goes_and_comes_back(fake: tuple[FakeServer, str], tmp_path: Path) -> None:
    server, url = fake
    console = recorder(force_terminal=True)
    frames = top.watch(PicClient(url), console, tmp_path / "polls")
    seen = []
    for raw in (None, b"gone", None):
        server.raw = raw
        next(frames)
        seen.append(console.export_text())
    frames.close()
    assert ["no new numbers" in text for text in seen] == [False, True, False]
    assert all("hottest segments" in text for text in seen)
    assert len((tmp_path / "polls").read_text().splitlines()) == 2


def test_an_interval_of_nothing_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run("--interval", "0")
    assert "--interval" in capsys.readouterr().err


def test_the_command_dispatches(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    served: list[list[str]] = []
    monkeypatch.setattr(launch_server, "main", served.append)
    cli.main(["serve", "--model-path", "m", "--port", "1"])
    cli.main(["--model-path", "m", "--port", "1"])
    assert served == [["--model-path", "m", "--port", "1"]] * 2
    cli.main([])
    out = capsys.readouterr().out
    assert "sglang-pic serve" in out and "sglang-pic top" in out
    for word, said in (("tpo", "tpo, did you mean top?"), ("xyz", "there is no command xyz\n")):
        with pytest.raises(SystemExit) as ended:
            cli.main([word, "--url", "x"])
        assert ended.value.code == 2 and said in capsys.readouterr().err
