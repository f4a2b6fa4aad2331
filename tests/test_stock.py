"""Off means off: what stock SGLang answers, our plug-in answers too."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import TINY, serve
from linking import assemble, body, distributions, fresh_salt, ids_of

from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

# Token-identical is asserted where stock's two best tokens lie further apart.
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def stock(tiny_path: pathlib.Path, logs: pathlib.Path) -> Iterator[Server]:
    """Stock SGLang; the plug-in is installed, and not asked for."""
    args = [arg for arg in TINY if not arg.startswith("--pic")]
    with serve(tiny_path, logs / "stock.log", *args, module="sglang.launch_server") as server:
        yield server


def prompts() -> list[Any]:
    made = []
    for i in range(6):
        parts = [("segment", ids_of(200 + i + j, 20 + 13 * j + i)) for j in range(3)]
        made.append(assemble([("text", ids_of(i, i)), *parts, ("text", ids_of(300 + i, 5))]))
    return made


def same(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    """Token-identical up to a near-tie of stock's own, which is reported."""
    expected = distributions(stock)
    for i, (a, b) in enumerate(zip(ours["output_ids"], stock["output_ids"], strict=True)):
        if a != b:
            best = expected[i].topk(2).values
            margin = (best[0] - best[1]).item()
            assert margin < NEAR_TIE, f"token {i} differs, margin {margin}"
            print(f"near-tie at token {i}, margin {margin}")
            return
    assert (distributions(ours) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "pic", [{"policy": "full"}, {"require_exact": True}, {"link": False}, None],
    ids=["full", "require_exact", "unlinked", "ordinary"],
)  # fmt: skip
def test_same_tokens_as_stock(page1: Server, stock: Server, pic: dict[str, Any] | None) -> None:
    for ids, segments in prompts():
        request = body(ids, segments, 16, fresh_salt(), **(pic or {}))
        if pic is None:
            del request["pic"]
        plain = {key: value for key, value in request.items() if key != "pic"}
        for _ in range(2):  # the second time from the prefix cache
            ours, theirs = page1.generate(**request), stock.generate(**plain)
            same(ours, theirs)
            if pic is None:
                assert ours["output_ids"] == theirs["output_ids"]
                assert (distributions(ours) == distributions(theirs)).all()
            if pic != {"policy": "full"}:
                cached = [answer["meta_info"]["cached_tokens"] for answer in (ours, theirs)]
                assert cached[0] == cached[1]


def test_ordinary_requests_beside_linked_ones(page1: Server, stock: Server) -> None:
    """In one batch with linked rows, an ordinary row is what it is on stock."""
    linked = [body(ids, segments, 24, fresh_salt()) for ids, segments in prompts()]
    plain = [body(ids_of(400 + i, 30 + i), [], 24, fresh_salt()) for i in range(6)]
    for request in plain:
        del request["pic"]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda request: page1.generate(**request), [*linked, *plain]))
    for request, answer in zip(plain, answers[6:], strict=True):
        same(answer, stock.generate(**request))


def test_stock_ignores_pic_fields(stock: Server) -> None:
    """With the plug-in installed and PIC not enabled, the field changes nothing."""
    ids, segments = prompts()[0]
    with_pic, without = body(ids, segments, 4, "x"), body(ids, segments, 4, "y")
    del without["pic"]
    answers = stock.generate(**with_pic), stock.generate(**without)
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert "pic" not in answers[0]["meta_info"]
    assert stock.get("/pic/info").status_code == 404


def test_which_of_our_parts_stock_runs_on(page1: Server, stock: Server) -> None:
    """So that a comparison says what it leaves out."""
    assert stock.parts == ["platform", "hooks", "linear kernels"]
    assert page1.parts == [*stock.parts, "cache", "attention", "front"]
