"""Saved segments: what comes back is what was saved, or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import TINY, serve
from driver import Driver
from linking import body, check_linked, ids_of
from safetensors.torch import load_file
from test_forest import _config, _name, _tokens

from sglang_pic.errors import PicRefused
from sglang_pic.forest import files
from sglang_pic.manage import segments
from sglang_pic.manage.store import Store


def _runner(driver: Driver, seed: int = 0) -> Any:
    """What ``Store`` reads of SGLang's model runner."""
    torch.manual_seed(seed)
    return types.SimpleNamespace(
        token_to_kv_pool=driver.pool,
        attn_backend=types.SimpleNamespace(ropes={0: None}),
        model=torch.nn.Linear(3, 3),
        model_config=types.SimpleNamespace(hf_config=types.SimpleNamespace(to_dict=dict)),
    )


def _store(driver: Driver, directory: pathlib.Path, seed: int = 0) -> Store:
    return Store(driver.forest, _runner(driver, seed), directory)


class Together:
    """Two ranks, each in a thread of its own, that exchange values."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._values: list[Any] = [None, None]

    def gather_of(self, rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            told = list(self._values)
            self._barrier.wait()
            return told

        return gather

    def run(self, what: Any) -> list[Any]:
        """What each rank gets of ``what(rank)``."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(what, range(2)))


def test_ranks_load_a_segment_all_or_none(tmp_path: pathlib.Path) -> None:
    together = Together()
    documents = [_tokens(i, 40) for i in range(3)]

    def stores() -> tuple[list[Driver], list[Store]]:
        drivers = [Driver(4, 1024, _config()) for _ in range(2)]
        made = []
        for rank, driver in enumerate(drivers):
            group: Any = types.SimpleNamespace(rank=rank, size=2, gather=together.gather_of(rank))
            # The parts of the weights that they hold differ.
            made.append(Store(driver.forest, _runner(driver, rank), tmp_path, group))
        return drivers, made

    drivers, saving = stores()
    for driver in drivers:
        for document in documents:
            assert driver.compile(document, named=True)
    one, other = together.run(lambda rank: saving[rank].save(None, None))
    assert one == other and one["segments"] == 3
    assert one["bytes"] == sum(file.stat().st_size for file in tmp_path.rglob("*.segment"))

    first, second = (files.listed(tmp_path / f"rank{rank}of2") for rank in range(2))
    assert [file.name for file in first] == [file.name for file in second]
    first[0].unlink()
    _flip(second[1], second[1].stat().st_size // 2)
    drivers, loading = stores()
    one, other = together.run(lambda rank: loading[rank].restore(everyone=True))
    assert one == other
    assert one["segments"] == 1
    assert [refused["file"] for refused in one["refused"]] == [file.name for file in second[:2]]
    held = [[r.id for r in driver.forest.segments.records(None)] for driver in drivers]
    assert held[0] == held[1] == [first[2].stem]
    for driver in drivers:
        driver.check()
    # One disk is full, or gone.
    shutil.rmtree(tmp_path / "rank1of2")
    (tmp_path / "rank1of2").write_text("a file")

    def save(rank: int) -> int:
        with pytest.raises(PicRefused, match="rank1of2") as refused:
            loading[rank].save(None, None)
        return refused.value.status

    assert together.run(save) == [507, 507]


def _saved(tmp_path: pathlib.Path, page: int = 1) -> list[list[int]]:
    """Two segments that begin alike and one of another tenant, saved."""
    driver = Driver(page, 1024, _config(compile_context=(1, 2, 3, 4)))
    documents = [_tokens(0, 50), [*_tokens(0, 50), *_tokens(1, 20)]]
    for document in documents:
        assert driver.compile(document, named=True)
    assert driver.compile(documents[0], "a", named=True)
    store = _store(driver, tmp_path)
    assert store.save(None, None)["segments"] == 2
    assert store.save("a", [_name(driver, documents[0], "a")])["segments"] == 1
    for unknown in ("0" * 32, _name(driver, documents[0], "a")):
        with pytest.raises(PicRefused) as refused:
            store.save(None, [unknown])
        assert refused.value.status == 404
    return documents


@pytest.mark.parametrize("page", [1, 4])
def test_what_comes_back_is_what_was_saved(tmp_path: pathlib.Path, page: int) -> None:
    documents = _saved(tmp_path, page)
    driver = Driver(page, 1024, _config(compile_context=(1, 2, 3, 4)))
    # Something of it is there already, in other pages.
    assert driver.compile([*_tokens(0, 20), *_tokens(9, 5)])
    store = _store(driver, tmp_path)
    assert store.restore() == {"segments": 2, "present": 0, "refused": []}
    driver.check()
    assert store.restore() == {"segments": 0, "present": 2, "refused": []}
    assert segments.list_all(driver.forest, "a") == []
    assert store.restore("a")["segments"] == 1
    for document in documents:
        req = driver.link([*document, 7], [(0, len(document))])
        assert driver.forest.arrivals.missing(req) == []
        assert driver.start(req)
        assert req.customized_info["pic"][0]["segments"][0]["hit"]
        driver.check()  # reads every slot
        driver.finish(req, abort=True)
    driver.check()


def _flip(file: pathlib.Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0x10
    file.write_bytes(bytes(content))


def test_a_damaged_file_is_refused_whole(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path)
    driver = Driver(1, 1024, _config(compile_context=(1, 2, 3, 4)))
    store = _store(driver, tmp_path)
    whole = files.listed(tmp_path)[0]
    size = whole.stat().st_size
    draw = random.Random(0)
    for case in range(60):
        copy = tmp_path / "copy"
        shutil.copy(whole, copy)
        if case % 3 == 0:
            os.truncate(whole, draw.randrange(size))
        else:
            _flip(whole, draw.randrange(size))
        found = store.restore(everyone=True)
        assert [refused["file"] for refused in found["refused"]] == [whole.name], case
        assert found["segments"] == (2 if case == 0 else 0)
        shutil.copy(copy, whole)
    driver.check()
    assert store.restore(everyone=True)["segments"] == 1


def test_a_foreign_file_is_refused_with_the_reason(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path)

    def reasons(driver: Driver, seed: int = 0) -> set[str]:
        found = _store(driver, tmp_path, seed).restore(everyone=True)
        assert found["segments"] == 0 and driver.forest.total_tokens == 0
        return {refused["reason"].split(",")[0].rpartition(" ")[0] for refused in found["refused"]}

    context = {"compile_context": (1, 2, 3, 4)}
    assert reasons(Driver(1, 1024, _config(**context)), seed=1) == {"made for weights"}
    assert reasons(Driver(4, 1024, _config(**context))) == {"made for page_size"}
    other = Driver(1, 1024, _config(compile_context=(1, 2, 3, 5)))
    assert all(reason.startswith("made for compile_context") for reason in reasons(other))
    # A file under another's name, and things that are no such files at all.
    driver = Driver(1, 1024, _config(**context))
    first, second, _ = files.listed(tmp_path)
    shutil.copy(first, second)
    (tmp_path / ("e" * 32 + files.SUFFIX)).write_text("hello")
    (tmp_path / ("d" * 32 + files.SUFFIX)).write_bytes(b"")
    (tmp_path / "half.part").write_bytes(first.read_bytes()[:100])
    found = _store(driver, tmp_path).restore(everyone=True)
    assert found["segments"] == 2 and len(found["refused"]) == 3
    driver.check()


def test_restoring_evicts_nothing(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path)
    driver = Driver(1, 200, _config(compile_context=(1, 2, 3, 4)))
    documents = [_tokens(50 + i, 50) for i in range(3)]
    for document in documents:
        assert driver.compile(document)
    found = _store(driver, tmp_path).restore(everyone=True)
    assert found["segments"] == 0
    assert {refused["reason"] for refused in found["refused"]} == {
        "it does not fit into what is free of the budgets"
    }
    assert all(segments.held(driver.forest, [_name(driver, d) for d in documents], None))
    driver.check()


def test_a_disk_that_refuses_is_said(tmp_path: pathlib.Path) -> None:
    driver = Driver(1, 256, _config())
    assert driver.compile(_tokens(0, 40), named=True)
    directory = tmp_path / "store"
    directory.write_text("a file where a folder should be")
    with pytest.raises(PicRefused, match="cannot write") as refused:
        _store(driver, directory).save(None, None)
    assert refused.value.status == 507
    driver.check()


@pytest.mark.server
@pytest.mark.long
def test_a_killed_server_starts_warm_from_what_was_complete(
    tiny_path: pathlib.Path, logs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    documents = [ids_of(70 + i, 200) for i in range(24)]
    args = (*TINY, f"--pic-store={tmp_path}")
    with serve(tiny_path, logs / "store1.log", *args) as server:
        compiled = server.post("/pic/compile", {"input_ids": documents}).json()["segments"]
        pids = [int(p) for p in _children_of(server.url)]

        def save() -> None:
            with contextlib.suppress(Exception):
                while True:
                    server.post("/pic/save", {})

        threading.Thread(target=save, daemon=True).start()
        while not any(tmp_path.iterdir()):
            time.sleep(0.001)
        time.sleep(0.02)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    left = list(tmp_path.iterdir())
    whole = [file for file in left if file.suffix == files.SUFFIX]
    assert whole
    for file in whole:
        assert load_file(file)
    # One more, damaged.
    _flip(whole[0], whole[0].stat().st_size // 2)
    with serve(tiny_path, logs / "store2.log", *args) as server:
        held = {segment["id"] for segment in server.forest()["segments"]}
        assert held == {file.stem for file in whole[1:]}
        restored = server.post("/pic/restore", {}).json()
        assert restored["present"] == len(whole) - 1 and restored["segments"] == 0
        assert [refused["file"] for refused in restored["refused"]] == [whole[0].name]
        index = next(i for i, s in enumerate(compiled) if s["id"] in held)
        ids = [*ids_of(1, 20), *documents[index], *ids_of(2, 9)]
        answer = server.generate(**body(ids, [(20, 220)], 4, ""))
        # The text in front of it, and nothing else.
        assert answer["meta_info"]["pic"]["tokens_compiled"] == 20
        check_linked(answer, ids, [(20, 220)], seam=16, page=1, n_new=4)
        (state,) = json.loads(server.get("/pic/forest").text)
        assert state["integrity"] == "ok"


def _children_of(url: str) -> list[str]:
    """Process ids of a server, by the port it listens on."""
    import psutil

    port = int(url.rpartition(":")[2])
    main = next(
        p for p in psutil.process_iter(["cmdline"]) if f"--port={port}" in (p.info["cmdline"] or [])
    )
    return [str(p.pid) for p in (main, *main.children(recursive=True))]
