"""Segments that servers share through a store, against the oracle."""

from __future__ import annotations

import pathlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import CHECKS, TINY, serve
from linking import assemble, body, check_linked, fresh_salt, ids_of
from test_hybrid import SEEDS
from test_hybrid import check_linked as check_hybrid
from tiny_models import tiny_hybrid

from sglang_pic.eval.serving import Server, free_port
from sglang_pic.store.directory import SUFFIX

pytestmark = pytest.mark.server

# A tiny model computes a segment sooner than anything reads it, on a busy machine too late.
ALWAYS = ("--pic-store-when=always", "--pic-store-timeout=60")
PARTS = [("segment", ids_of(300 + i, 80)) for i in range(4)]


def ask(server: Server, prompt: Any, salt: str) -> dict[str, Any]:
    return server.generate(**body(*prompt, 3, salt))


def waits(answer: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Of each segment that was missing its outcome, source and why."""
    missing = [
        one for one in answer["meta_info"]["pic"]["waited_for"] if one["segment"] is not None
    ]
    return [(one["outcome"], one["source"], one["why"]) for one in missing]


def written(server: Server, count: int) -> dict[str, Any]:
    """The store's numbers, once it has so many values of this server."""
    for _ in range(200):
        store = server.get("/pic/stats").json()["ranks"][0]["store"]
        if store["written"] >= count:
            return store
        time.sleep(0.05)
    raise AssertionError(store)


def test_what_one_server_compiles_another_links(
    tiny_path: pathlib.Path, logs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    store = tmp_path / "store"
    args = (*TINY, *ALWAYS, f"--pic-store={store}", f"--pic-store-key-file={key}")
    salt, other = fresh_salt(), fresh_salt()
    prompt = assemble([("text", ids_of(1, 9)), *PARTS, ("text", ids_of(2, 7))])
    turned = assemble([("text", ids_of(3, 9)), *PARTS[::-1], ("text", ids_of(4, 7))])
    with serve(tiny_path, logs / "share1.log", *args, env=CHECKS) as first:
        assert waits(ask(first, prompt, salt)) == [("compiled", "computed", "not_in_store")] * 4
        # Used once, nothing is written; a pin and a second use are worth it.
        assert list(store.glob("*" + SUFFIX)) == []
        ask(first, turned, salt)
        counts = written(first, 4)
        assert counts["failed"] == {} and counts["dropped"] == 0
        ids = [one["id"] for one in first.forest()["segments"]]
        pinned = first.post(f"/pic/segments/{ids[0]}/pin", {"cache_salt": salt})
        assert pinned.status_code == 200
        assert first.post("/pic/compile", {"input_ids": ids_of(9, 40), "cache_salt": other}).ok
        written(first, 6)
        port = int(first.url.rpartition(":")[2])
    files = sorted(store.glob("*" + SUFFIX))
    assert len(files) == 6  # the list of pins among them
    with serve(tiny_path, logs / "share2.log", *args, env=CHECKS, port=port) as second:
        held = second.forest()["segments"]
        assert [one["id"] for one in held] == [ids[0]]
        assert second.get(f"/pic/segments/{ids[0]}?cache_salt={salt}").json()["pinned"]
        answer = ask(second, turned, salt)
        assert waits(answer) == [("fetched", "store", "in_store")] * 3
        assert answer["meta_info"]["pic"]["tokens_compiled"] == 9
        assert all(one["bytes"] for one in answer["meta_info"]["pic"]["waited_for"][:3])
        check_linked(answer, *turned, seam=16, page=1, n_new=3)
        # Another tenant's are not seen, though they are there.
        answer = ask(second, prompt, other)
        assert waits(answer) == [("compiled", "computed", "not_in_store")] * 4
        check_linked(answer, *prompt, seam=16, page=1, n_new=3)
        # Damaged, and signed by somebody else.
        assert second.post("/flush_cache", {}).status_code == 200
        for file in files:
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        answer = ask(second, prompt, salt)
        assert waits(answer) == [("compiled", "computed", "damaged")] * 4
        check_linked(answer, *prompt, seam=16, page=1, n_new=3)
        assert second.forest()["integrity"] == "ok"
        front = second.get("/pic/stats").json()["front"]
        assert front["sources"] == {"store": 3, "computed": 8}
        assert front["store_misses"] == {"not_in_store": 4, "damaged": 4}


# In CI the matrix' cells ask a hybrid's store.
@pytest.mark.long
def test_a_hybrids_segments_come_back_with_their_states(
    logs: pathlib.Path, tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_hybrid(tmp_path_factory.mktemp("hybrid"), "qwen3_next", SEEDS[16])
    args = (*TINY, *ALWAYS, "--page-size=16", f"--pic-store=file://{tmp_path}?mib=64")
    salt = fresh_salt()
    prompt = assemble([("text", ids_of(5, 20)), *PARTS, ("text", ids_of(6, 7))])
    with serve(path, logs / "share_hybrid.log", *args, env=CHECKS) as server:
        for seam in (16, 32):
            for _ in range(2):
                server.generate(**body(*prompt, 2, salt, seam=seam))
        # A value has the state of one seam.
        written(server, 8)
        assert server.post("/flush_cache", {}).status_code == 200
        for seam in (32, 16):
            answer = server.generate(**body(*prompt, 3, salt, seam=seam))
            assert waits(answer) == [("fetched", "store", "in_store")] * 4
            check_hybrid(answer, *prompt, seam=seam, page=16)
        assert server.forest()["integrity"] == "ok"
        # Gone, and a store that is no directory any more.
        assert server.post("/flush_cache", {}).status_code == 200
        for file in tmp_path.iterdir():
            file.unlink()
        answer = server.generate(**body(*prompt, 3, salt))
        assert waits(answer) == [("compiled", "computed", "not_in_store")] * 4
        check_hybrid(answer, *prompt, seam=16, page=16)


def fresh(seed: int) -> Any:
    """A prompt over four documents that nobody has."""
    parts = [("segment", ids_of(1000 * seed + i, 80 + 8 * i)) for i in range(4)]
    return assemble([("text", ids_of(seed, 9)), *parts, ("text", ids_of(seed + 1, 7))])


def test_a_cold_prompt_is_compiled_by_peers(
    tiny_path: pathlib.Path, logs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    ports = [free_port() for _ in range(2)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    args = (*TINY, *ALWAYS, f"--pic-store={tmp_path}", f"--pic-peers={','.join(urls)}")
    one, there = ("compiled", "computed", "not_in_store"), ("fetched", "peer", "compiled_there")
    salt = fresh_salt()
    with serve(tiny_path, logs / "peer1.log", *args, env=CHECKS, port=ports[0]) as a:
        with serve(tiny_path, logs / "peer2.log", *args, env=CHECKS, port=ports[1]) as b:
            # Half of it here and half of it there, and so linked the first time.
            answer = ask(a, prompt := fresh(1), salt)
            assert sorted(waits(answer)) == sorted([one, one, there, there])
            check_linked(answer, *prompt, seam=16, page=1, n_new=3)
            assert b.get("/pic/stats").json()["front"]["lent"] == 2
            front = a.get("/pic/stats").json()["front"]
            assert front["sources"] == {"computed": 2, "peer": 2}
            assert front["peer_segments"] == {urls[1]: 2}
            # Of another tenant nothing is there; of this one all that B compiled.
            assert there in waits(ask(a, prompt, fresh_salt()))
            answer = ask(b, prompt, salt)
            assert {source for _, source, _ in waits(answer)} <= {"store", "computed", "peer"}
            check_linked(answer, *prompt, seam=16, page=1, n_new=3)
            # Both ask each other for the same.
            for seed in (2, 3, 4):
                prompt = fresh(seed)
                with ThreadPoolExecutor(2) as pool:
                    for answer in pool.map(ask, (a, b), (prompt, prompt), (salt, salt)):
                        check_linked(answer, *prompt, seam=16, page=1, n_new=3)
            for server in (a, b):
                assert server.forest()["integrity"] == "ok"
        # B is gone.
        for seed in (5, 6):
            answer = ask(a, prompt := fresh(seed), salt)
            assert {one[1] for one in waits(answer)} <= {"computed"}
            ask(a, prompt, salt)
            check_linked(ask(a, prompt, salt), *prompt, seam=16, page=1, n_new=3)
        # What stands there now has other pages, so other values.
        other = (*args, "--page-size=16")
        with serve(tiny_path, logs / "peer3.log", *other, port=ports[1]):
            time.sleep(6)
            answer = ask(a, prompt := fresh(7), salt)
            assert ("compiled", "computed", "peer_wrote_another_value") in waits(answer)
            check_linked(answer, *prompt, seam=16, page=1, n_new=3)
        assert a.forest()["integrity"] == "ok"
