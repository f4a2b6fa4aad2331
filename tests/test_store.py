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
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import TINY, serve
from driver import Driver
from linking import body, check_linked, ids_of
from mooncake_client import Client
from safetensors.torch import load_file
from test_forest import _config, _name, _tokens
from test_stores import master

from sglang_pic.errors import PicConfigError, PicRefused
from sglang_pic.forest.keys import segment_id
from sglang_pic.manage import coming, segments
from sglang_pic.manage.arrival import answer
from sglang_pic.manage.coming import COMING, GONE, HERE, LOOKING
from sglang_pic.manage.store import Store
from sglang_pic.request.commands import UNWRITTEN, WRITING, WRITTEN
from sglang_pic.store import mooncake
from sglang_pic.store.address import open_store
from sglang_pic.store.base import Guarded
from sglang_pic.store.directory import SUFFIX, Directory
from sglang_pic.store.value import SavedSegment

# Loaded.
NOTHING: dict[str, Any] = {"segments": 0, "documents": 0, "present": 0, "refused": []}


def _runner(driver: Driver, seed: int = 0) -> Any:
    """What ``Store`` reads of SGLang's model runner."""
    torch.manual_seed(seed)
    return types.SimpleNamespace(
        token_to_kv_pool=driver.pool,
        attn_backend=types.SimpleNamespace(ropes={0: None}),
        model=torch.nn.Linear(3, 3),
        model_config=types.SimpleNamespace(hf_config=types.SimpleNamespace(to_dict=dict)),
    )


def _store(driver: Driver, directory: pathlib.Path, seed: int = 0, **options: Any) -> Store:
    kept = Guarded(Directory(directory))
    store = Store(driver.forest, _runner(driver, seed), kept, **options)
    driver.forest.store = store
    return store


def _listed(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(directory.glob("*" + SUFFIX))


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
            made.append(_store(driver, tmp_path, rank, ranks=group))
        return drivers, made

    drivers, saving = stores()
    for driver in drivers:
        for document in documents:
            assert driver.compile(document, named=True)
    one, other = together.run(lambda rank: saving[rank].save(None, None))
    assert one == other and one["segments"] == 3
    assert one["bytes"] == sum(file.stat().st_size for file in tmp_path.rglob("*.segment"))

    of_rank = [[f for f in _listed(tmp_path) if f.stem.startswith(g)] for g in _groups(saving)]
    first, second = of_rank
    assert len(first) == len(second) == 3
    assert [f.stem[17:] for f in first] == [f.stem[17:] for f in second]
    first[0].unlink()
    _flip(second[1], second[1].stat().st_size // 2)
    drivers, loading = stores()
    one, other = together.run(lambda rank: loading[rank].restore(None))
    assert one["segments"] == other["segments"] == 1
    assert len(one["refused"]) == len(other["refused"]) == 2
    held = [[r.id for r in driver.forest.segments.records(None)] for driver in drivers]
    assert held[0] == held[1] and len(held[0]) == 1
    for driver in drivers:
        driver.check()
    # Read ahead, by one rank what the other lacks: it comes to all, or to none.
    for driver in drivers:
        (record,) = driver.forest.segments.records(None)
        driver.forest.holder.delete(record.id)
    paths = [array("q", document) for document in documents]
    for store in loading:
        store.begin(driver.forest.segments.namespace(None), paths, seam=16, named=True)
    names = [_name(drivers[0], document) for document in documents]
    told = together.run(lambda rank: _fetched(loading[rank], names))
    assert [one["state"] for one in told[0]] == [one["state"] for one in told[1]]
    assert sorted(one["state"] for one in told[0]) == ["gone", "gone", "here"]
    held = [[r.id for r in driver.forest.segments.records(None)] for driver in drivers]
    assert held[0] == held[1] and len(held[0]) == 1
    for driver in drivers:
        driver.check()
    # One disk is full, or gone.
    shutil.rmtree(tmp_path)
    tmp_path.write_text("a file")

    def save(rank: int) -> int:
        with pytest.raises(PicRefused, match="cannot write") as refused:
            loading[rank].save(None, None)
        return refused.value.status

    assert together.run(save) == [507, 507]


def _groups(stores: list[Store]) -> list[str]:
    return [store._codec.group(store._forest.segments.namespace(None)) for store in stores]


def _fetched(store: Store, names: list[str]) -> list[dict[str, Any]]:
    """What has become of segments in the end, as the front would ask."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(2000):
        left = [name for name in names if name not in found]
        if not left:
            break
        for name, one in zip(left, store.incoming.look(left), strict=True):
            if one["state"] in (HERE, GONE):
                found[name] = one
        time.sleep(0.002)
    return [found[name] for name in names]


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
    assert store.restore(None) == NOTHING | {"segments": 2}
    driver.check()
    assert store.restore(None) == NOTHING | {"present": 2}
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
    store_names = store._codec.group(driver.forest.segments.namespace(None))
    whole = next(file for file in _listed(tmp_path) if file.stem.startswith(store_names))
    size = whole.stat().st_size
    draw = random.Random(0)
    for case in range(60):
        copy = tmp_path / "copy"
        shutil.copy(whole, copy)
        if case % 3 == 0:
            os.truncate(whole, draw.randrange(size))
        else:
            _flip(whole, draw.randrange(size))
        found = store.restore(None)
        assert [refused["file"] for refused in found["refused"]] == [whole.stem], case
        assert found["segments"] == (1 if case == 0 else 0)
        shutil.copy(copy, whole)
    driver.check()
    assert store.restore(None)["segments"] == 1


def test_a_foreign_value_is_refused_with_the_reason(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path)
    context = {"compile_context": (1, 2, 3, 4)}
    first, second, third = _listed(tmp_path)
    content = [file.read_bytes() for file in (first, second, third)]

    def reason(driver: Driver, seed: int = 0, **options: Any) -> str:
        """Why a value is refused that lies where this server would look for its own."""
        store = _store(driver, tmp_path, seed, **options)
        assert store.restore(None) == NOTHING
        group = store._codec.group(driver.forest.segments.namespace(None))
        planted = tmp_path / f"{group}-{'0' * 32}{SUFFIX}"
        planted.write_bytes(content[0])
        (refused,) = store.restore(None)["refused"]
        planted.unlink()
        assert driver.forest.total_tokens == 0 and refused["file"] == planted.stem
        return refused["reason"].split(",")[0].rpartition(" ")[0]

    assert reason(Driver(1, 1024, _config(**context)), seed=1) == "made for weights"
    assert reason(Driver(4, 1024, _config(**context))) == "made for page_size"
    other = Driver(1, 1024, _config(compile_context=(1, 2, 3, 5)))
    assert reason(other).startswith("made for compile_context")
    # Values under others' names, a tenant's under another's among them, and things that
    # are no values at all.
    driver = Driver(1, 1024, _config(**context))
    store = _store(driver, tmp_path)
    group = store._codec.group(driver.forest.segments.namespace(None))
    mine = [file for file in (first, second, third) if file.stem.startswith(group)]
    theirs = next(file for file in (first, second, third) if file not in mine)
    shutil.copy(mine[0], mine[1])
    shutil.copy(theirs, tmp_path / f"{group}-{theirs.stem[17:]}{SUFFIX}")
    (tmp_path / f"{group}-{'e' * 32}{SUFFIX}").write_text("hello")
    (tmp_path / f"{group}-{'d' * 32}{SUFFIX}").write_bytes(b"")
    (tmp_path / "half.part").write_bytes(content[0][:100])
    found = store.restore(None)
    assert found["segments"] == 1 and len(found["refused"]) == 4
    driver.check()


def test_restoring_evicts_nothing(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path)
    driver = Driver(1, 200, _config(compile_context=(1, 2, 3, 4)))
    documents = [_tokens(50 + i, 50) for i in range(3)]
    for document in documents:
        assert driver.compile(document)
    found = _store(driver, tmp_path).restore(None)
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


# -- written behind, and read ahead ---------------------------------------------------------


def _worth(driver: Driver, store: Store, documents: list[list[int]]) -> None:
    """Have segments compiled by name, and wait until they are written."""
    before = store.stats()["written"]
    for document in documents:
        assert driver.compile(document, named=True)
    _settled(store, before + len(documents))


def _settled(store: Store, count: int) -> None:
    for _ in range(2000):
        store.step()
        if store.stats()["written"] + store.stats()["present"] >= count:
            break
        time.sleep(0.002)
    assert store.stats()["waiting_bytes"] == 0 or store.stats()["written"] >= count


def _ahead(
    store: Store, documents: list[list[int]], *, named: bool = False, seam: int = 16
) -> list[dict[str, Any]]:
    """What becomes of segments that a link lacks."""
    forest = store._forest
    space, context = forest.segments.namespace(None), forest.segments.context
    paths = [context + array("q", document) for document in documents]
    store.begin(space, paths, seam=seam, named=named)
    names = [segment_id(space, None, array("q", document)) for document in documents]
    found = _fetched(store, names)
    assert len(store.incoming) == 0 and store._reader._reads == {}
    return found


def _states(found: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    return [(one["state"], one["reason"]) for one in found]


def test_what_is_used_twice_is_written_once(tmp_path: pathlib.Path) -> None:
    driver = Driver(4, 1024, _config())
    store = _store(driver, tmp_path)
    document = _tokens(0, 50)
    assert driver.compile(document)
    for uses in range(4):
        for _ in range(20):
            store.step()
        assert len(_listed(tmp_path)) == (uses >= 2)
        req = driver.link([*document, 7], [(0, len(document))], policy="none")
        assert driver.start(req)
        driver.finish(req, abort=True)
        if uses >= 1:
            _settled(store, 1)
    assert store.stats()["written"] == 1 and store.stats()["present"] == 0
    driver.check()


@pytest.mark.parametrize("page", [1, 4])
def test_what_a_link_lacks_is_read_ahead_of_it(
    tmp_path: pathlib.Path, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = {"compile_context": (1, 2, 3, 4)}
    documents = [_tokens(0, 50), [*_tokens(0, 50), *_tokens(1, 20)], _tokens(2, 3), _tokens(3, 90)]
    driver = Driver(page, 1024, _config(**context))
    _worth(driver, _store(driver, tmp_path), documents[:3] if page == 1 else documents[:2])
    # So few bytes a time that others run between.
    monkeypatch.setattr(coming, "FILL_BYTES", 16 * 7)
    driver = Driver(page, 1024, _config(**context))
    store = _store(driver, tmp_path)
    assert driver.compile(_tokens(0, 20))
    states = _states(_ahead(store, documents))
    held = 3 if page == 1 else 2
    assert states == [(HERE, None)] * held + [(GONE, "not_in_store")] * (4 - held)
    driver.check()
    for document in documents[:held]:
        req = driver.link([*document, 7], [(0, len(document))])
        assert driver.forest.arrivals.missing(req) == []
        assert driver.start(req)
        driver.check()  # reads every slot
        driver.finish(req, abort=True)
    driver.check()
    # Nor read again.
    assert _states(_ahead(store, documents[:1])) == [(HERE, "came_meanwhile")]
    # What was read is not written again.
    for _ in range(20):
        store.step()
    stats = store.stats()
    assert stats["written"] == stats["present"] == stats["waiting_bytes"] == 0


@pytest.mark.parametrize("real", [False, True])
def test_two_schedulers_share_a_mooncake_pool(tmp_path: pathlib.Path, real: bool) -> None:
    documents = [_tokens(i, 60) for i in range(3)]
    with contextlib.ExitStack() as stack:
        if real:
            try:
                mooncake.load()
            except PicConfigError as error:
                pytest.skip(str(error))
            address = stack.enter_context(master(tmp_path))
            pools = [open_store(address) for _ in range(2)]
        else:
            client = Client()
            pools = [Guarded(mooncake.Mooncake(client, 1 << 20)) for _ in range(2)]
        drivers = [Driver(4, 1024, _config()) for _ in range(2)]
        one, other = (
            Store(driver.forest, _runner(driver), pool)
            for driver, pool in zip(drivers, pools, strict=True)
        )
        drivers[0].forest.store, drivers[1].forest.store = one, other
        _worth(drivers[0], one, documents[:2])
        states = _states(_ahead(other, documents))
        assert states == [(HERE, None)] * 2 + [(GONE, "not_in_store")]
        drivers[1].check()
        req = drivers[1].link([*documents[0], 7], [(0, 60)])
        assert drivers[1].start(req)
        drivers[1].finish(req, abort=True)
        with pytest.raises(PicRefused, match="Mooncake lists no names"):
            other.restore(None)


def test_what_is_read_takes_the_place_of_what_is_worth_less(tmp_path: pathlib.Path) -> None:
    documents = [*(_tokens(i, 60) for i in range(6)), _tokens(9, 200)]
    driver = Driver(1, 1024, _config())
    _worth(driver, _store(driver, tmp_path), documents)
    driver = Driver(1, 256, _config())
    store = _store(driver, tmp_path)
    for i in range(3):
        assert driver.compile(_tokens(50 + i, 60), named=True)
    assert _states(_ahead(store, documents[:2], named=True)) == [(HERE, None)] * 2
    driver.check()
    # One of the two lies where another segment's tokens were.
    req = driver.link([*documents[1], *documents[0], 7], [(0, 60), (60, 120)])
    assert driver.start(req)
    driver.finish(req, abort=True)
    # More than there is room for, beside what is in use.
    req = driver.link([*documents[0], 7], [(0, 60)])
    assert driver.start(req)
    assert _states(_ahead(store, [documents[2], documents[6], documents[3]])) == [
        (HERE, None),
        (GONE, "no_room"),
        (HERE, None),
    ]
    driver.check()
    driver.finish(req, abort=True)
    assert _states(_ahead(store, [_tokens(99, 300)])) == [(GONE, "not_in_store")]
    driver.check()


def test_reserved_pages_are_given_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [_tokens(0, 60), _tokens(1, 60)]
    driver = Driver(4, 512, _config())
    _worth(driver, _store(driver, tmp_path), documents)
    driver = Driver(4, 512, _config())
    store = _store(driver, tmp_path)
    free = driver.allocator.available_size()
    monkeypatch.setattr(coming, "FILL_BYTES", 16 * 8)
    space = driver.forest.segments.namespace(None)
    names = [segment_id(space, None, array("q", document)) for document in documents]

    def half() -> None:
        store.begin(space, [array("q", one) for one in documents], seam=16, named=True)
        for _ in range(2000):
            store.incoming.look(names)
            if driver.forest.pages.reserved:
                break
            time.sleep(0.002)
        assert driver.forest.pages.reserved == 60
        driver.check()

    half()
    # Meanwhile a request cannot find what is half there, and other work goes on.
    req = driver.link([*documents[0], 7], [(0, 60)])
    assert driver.forest.arrivals.missing(req) == [0]
    assert driver.compile(documents[0])
    for name in names:
        store.incoming.drop(name)
    assert driver.forest.pages.reserved == 0
    driver.check()
    driver.forest.holder.delete(names[0])
    assert driver.allocator.available_size() == free
    half()
    driver.forest.reset()
    assert driver.forest.pages.reserved == 0 and len(store.incoming) == 0


class Faulty:
    """A directory whose answers are late, or wrong. ``go``: from then on they come."""

    def __init__(self, directory: pathlib.Path, fault: str):
        self._store = Directory(directory)
        self._fault = fault
        self.go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, name: str, most: int) -> Any:
        if self._fault == "slow":
            self.go.wait(60)
        if self._fault == "raises":
            raise OSError("no such host")
        return self._store.get(name, most)

    def exist(self, names: Any) -> Any:
        if self._fault == "hangs":
            self.go.wait(60)
        if self._fault == "blind":
            raise OSError("no such host")
        return self._store.exist(names)


@pytest.mark.parametrize(
    ("fault", "reason"), [("raises", "store_failed"), ("blind", "store_failed")]
)
def test_a_store_that_raises_gives_a_reason(
    tmp_path: pathlib.Path, fault: str, reason: str
) -> None:
    document = _tokens(0, 60)
    driver = Driver(4, 512, _config())
    _worth(driver, _store(driver, tmp_path), [document])
    driver = Driver(4, 512, _config())
    faulty: Any = Faulty(tmp_path, fault)
    store = Store(driver.forest, _runner(driver), Guarded(faulty))
    driver.forest.store = store
    assert _states(_ahead(store, [document])) == [(GONE, reason)]
    assert store.stats()["reading_bytes"] == 0
    driver.check()


@pytest.mark.parametrize("fault", ["slow", "hangs"])
def test_a_slow_store_holds_nothing_up_and_leaves_nothing(
    tmp_path: pathlib.Path, fault: str
) -> None:
    documents = [_tokens(i, 60) for i in range(9)]
    driver = Driver(4, 1024, _config())
    _worth(driver, _store(driver, tmp_path), documents)
    driver = Driver(4, 1024, _config())
    faulty: Any = Faulty(tmp_path, fault)
    store = Store(driver.forest, _runner(driver), Guarded(faulty))
    driver.forest.store = store
    space = driver.forest.segments.namespace(None)
    names = [segment_id(space, None, array("q", document)) for document in documents]
    paths = [array("q", document) for document in documents]
    store.begin(space, paths, seam=16, named=False)
    states = {one["state"] for one in store.incoming.look(names)}
    assert states <= {LOOKING, COMING}
    assert store.stats()["reading_bytes"] > 0
    for name in names:
        store.incoming.drop(name)
    assert driver.compile(documents[0])
    faulty.go.set()
    for _ in range(2000):
        if not store.stats()["reading_bytes"]:
            break
        time.sleep(0.002)
    assert store.stats()["reading_bytes"] == 0
    assert _states(_ahead(store, documents[1:])) == [(HERE, None)] * 8
    driver.check()


def test_so_many_bytes_are_on_their_way_and_no_more(tmp_path: pathlib.Path) -> None:
    documents = [_tokens(i, 60) for i in range(4)]
    driver = Driver(4, 1024, _config())
    _worth(driver, _store(driver, tmp_path), documents)
    store = _store(driver, tmp_path)
    for document in documents:
        driver.forest.holder.delete(_name(driver, document))
    store._reader._most = 2 * store._places.most(60)
    states = _states(_ahead(store, documents))
    assert states == [(HERE, None)] * 2 + [(GONE, "store_busy")] * 2
    assert store.stats()["reading_bytes"] == 0


def test_a_value_of_another_hand_is_refused_by_the_readers(tmp_path: pathlib.Path) -> None:
    documents = [_tokens(i, 60) for i in range(5)]
    key = b"0123456789abcdef"
    driver = Driver(4, 1024, _config())
    store = _store(driver, tmp_path, key=key)
    _worth(driver, store, documents)
    space, codec = driver.forest.segments.namespace(None), store._codec
    files = [tmp_path / (codec.name(space, d, ()) + SUFFIX) for d in documents]
    content = [file.read_bytes() for file in files]
    files[0].write_bytes(content[0][:-40])
    _flip(files[1], len(content[1]) - 9)
    files[2].write_bytes(content[3])
    for seed, options in ((0, {"key": b"another key of 16"}), (0, {}), (1, {"key": key})):
        other = Driver(4, 1024, _config())
        theirs = _store(other, tmp_path / f"other{seed}{len(options)}", seed, **options)
        _worth(other, theirs, [documents[4]])
        (file,) = _listed(tmp_path / f"other{seed}{len(options)}")
        files[4].write_bytes(file.read_bytes())
        driver = Driver(4, 1024, _config())
        states = _states(_ahead(_store(driver, tmp_path, key=key), documents))
        assert states == [
            (GONE, "damaged"),
            (GONE, "damaged"),
            (GONE, "other_name"),
            (HERE, None),
            (GONE, "foreign" if seed else "other_signature" if options else "unsigned"),
        ]
        driver.check()


def test_a_value_of_another_shape_is_refused(tmp_path: pathlib.Path) -> None:
    """As somebody would write it who may sign."""
    document = array("q", _tokens(0, 60))
    driver = Driver(4, 512, _config())
    store = _store(driver, tmp_path)
    space, codec = driver.forest.segments.namespace(None), store._codec
    name = codec.name(space, document, ())
    good = {"k.0": torch.zeros(60, 1, 2), "v.0": torch.zeros(60, 1, 2)}
    for bad in (
        {"k.0": good["k.0"]},
        {**good, "v.0": torch.zeros(56, 1, 2)},
        {**good, "v.0": torch.zeros(60, 1, 2, dtype=torch.float64)},
        {**good, "k.1": torch.zeros(60, 1, 2)},
    ):
        saved = SavedSegment(document, None, space, 0, bad)
        Directory(tmp_path).put(name, codec.encode(name, saved))
        assert _states(_ahead(store, [list(document)])) == [(GONE, "other_shape")]
    driver.check()


def test_a_copy_that_fails_is_not_tried_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each of them would count as a fault, and link no more."""
    driver = Driver(4, 512, _config())
    store = _store(driver, tmp_path)
    advance = store._outgoing._advance

    def fail(copy: Any, most: int) -> int:
        if copy.record.path[-1] == _tokens(0, 40)[-1]:
            raise RuntimeError("no room on the host")
        return advance(copy, most)

    monkeypatch.setattr(store._outgoing, "_advance", fail)
    for i in range(2):
        assert driver.compile(_tokens(i, 40), named=True)
    with pytest.raises(RuntimeError):
        store.step()
    _settled(store, 1)
    assert store._outgoing.pending == 0 and len(_listed(tmp_path)) == 1
    driver.check()


def _published(store: Store, names: list[str]) -> list[tuple[str, str | None]]:
    """What has become of these once it is settled."""
    found = store.publish(names, "us", begin=True)
    for _ in range(400):
        if all(one["state"] != WRITING for one in found):
            break
        store.step()
        time.sleep(0.01)
        found = store.publish(names, "us", begin=False)
    return [(one["state"], one["reason"]) for one in found]


def test_what_is_published_is_there_whatever_was_before(tmp_path: pathlib.Path) -> None:
    driver = Driver(4, 512, _config())
    store = _store(driver, tmp_path)
    assert driver.compile(_tokens(0, 40), "us") and driver.compile(_tokens(1, 40), "us")
    names = [record.id for record in driver.forest.segments.records("us")]
    assert len(names) == 2 and not _listed(tmp_path)
    assert _published(store, [*names, "unknown"]) == [(WRITTEN, None)] * 2 + [
        (UNWRITTEN, "not_held")
    ]
    assert store.publish(names, "them", begin=True)[0]["state"] == UNWRITTEN
    # What the store has evicted meanwhile is written again.
    for file in _listed(tmp_path):
        file.unlink()
    assert _published(store, names) == [(WRITTEN, None)] * 2 and len(_listed(tmp_path)) == 2
    # What it did not take once it may take now.
    for file in _listed(tmp_path):
        file.unlink()
    inner = store._writer._store
    store._writer._store = Guarded(Faulty(tmp_path, "blind"))  # type: ignore[arg-type]
    assert {state for state, _ in _published(store, names)} == {UNWRITTEN}
    store._writer._store = inner
    assert _published(store, names) == [(WRITTEN, None)] * 2 and len(_listed(tmp_path)) == 2
    driver.check()


def test_a_copy_that_fails_is_not_published(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(4, 512, _config())
    store = _store(driver, tmp_path)
    assert driver.compile(_tokens(0, 40), "us")
    (record,) = driver.forest.segments.records("us")

    def fail(copy: Any, most: int) -> int:
        raise RuntimeError("no room on the host")

    monkeypatch.setattr(store._outgoing, "_advance", fail)
    assert store.publish([record.id], "us", begin=True)[0]["state"] == WRITING
    with pytest.raises(RuntimeError):
        store.step()
    assert store.publish([record.id], "us", begin=False)[0]["state"] == UNWRITTEN


def test_a_fault_of_the_store_ends_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(4, 512, _config())
    assert driver.compile(_tokens(0, 50))
    req = driver.link([*_tokens(0, 50), 7], [(0, 50)], policy="none")

    def fail() -> None:
        raise RuntimeError("the store")

    monkeypatch.setattr(driver.forest.store, "step", fail)
    scheduler = types.SimpleNamespace(tree_cache=driver.cache)
    assert answer(scheduler, req, is_retracted=False) is None
    assert driver.start(req)


def test_a_copy_is_given_up_where_its_pages_go_first(tmp_path: pathlib.Path) -> None:
    driver = Driver(1, 256, _config())
    store = _store(driver, tmp_path)
    document = _tokens(0, 60)
    assert driver.compile(document, named=True)
    store._outgoing.step(16 * 20)
    assert store._outgoing.pending == 1
    driver.forest.holder.delete(_name(driver, document))
    # Others take its pages, and it comes back.
    for i in range(1, 5):
        assert driver.compile(_tokens(i, 60))
    assert driver.compile(document, named=True)
    _settled(store, 1)
    (file,) = _listed(tmp_path)
    value = load_file(file)
    assert value["k.0"][:, 0, 0].tolist() == [float(token) for token in document]
    driver.check()


def test_a_pin_outlives_its_server(tmp_path: pathlib.Path) -> None:
    documents = [_tokens(i, 60) for i in range(3)]
    driver = Driver(4, 2048, _config())
    store = _store(driver, tmp_path, server="one")
    _worth(driver, store, documents)
    for document in documents[:2]:
        segments.pin(driver.forest, _name(driver, document), None, lasting=True)
    segments.pin(driver.forest, _name(driver, documents[2]), None, lasting=False)
    segments.unpin(driver.forest, _name(driver, documents[1]), None)
    _settled(store, 6)
    for server, held in (("two", []), ("one", [_name(driver, documents[0])])):
        fresh = Driver(4, 2048, _config())
        found = _store(fresh, tmp_path, server=server).start()
        assert found == NOTHING | {"segments": len(held)}
        assert [record.id for record in fresh.forest.segments.records(None)] == held
        assert len(fresh.forest.pins) == len(held)
        fresh.check()


def test_other_weights_have_other_names(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = _tokens(0, 60)
    driver = Driver(4, 512, _config())
    store = _store(driver, tmp_path)
    _worth(driver, store, [document])
    monkeypatch.setattr(coming, "FILL_BYTES", 16 * 8)
    driver.forest.holder.delete(_name(driver, document))
    space = driver.forest.segments.namespace(None)
    store.begin(space, [array("q", document)], seam=16, named=True)
    for _ in range(2000):
        store.incoming.look([_name(driver, document)])
        if driver.forest.pages.reserved:
            break
        time.sleep(0.002)
    torch.nn.init.zeros_(store._runner.model.weight)
    assert store.restore(None)["segments"] == 0
    # What was on its way is of the old ones.
    assert driver.forest.pages.reserved == 0 and len(store.incoming) == 0
    assert _states(_ahead(store, [document])) == [(GONE, "not_in_store")]
    _worth(driver, store, [document])
    assert len(_listed(tmp_path)) == 2
    driver.check()


def test_what_a_tenant_deletes_goes_from_the_store(tmp_path: pathlib.Path) -> None:
    documents = [_tokens(i, 60) for i in range(2)]
    driver = Driver(4, 512, _config())
    store = _store(driver, tmp_path)
    _worth(driver, store, documents)
    assert len(_listed(tmp_path)) == 2
    segments.delete(driver.forest, _name(driver, documents[0]), None)
    segments.flush(driver.forest, None)
    for _ in range(2000):
        if not _listed(tmp_path):
            break
        time.sleep(0.002)
    assert _listed(tmp_path) == []
    # Compiled again, it is written again.
    _worth(driver, store, documents[:1])
    assert len(_listed(tmp_path)) == 1


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
    whole = [file for file in left if file.suffix == SUFFIX]
    assert whole
    for file in whole:
        assert load_file(file)
    # One more, damaged.
    _flip(whole[0], whole[0].stat().st_size // 2)
    with serve(tiny_path, logs / "store2.log", *args) as server:
        # Nothing is loaded before it is asked for.
        assert server.forest()["segments"] == []
        restored = server.post("/pic/restore", {}).json()
        assert restored["present"] == 0 and restored["segments"] == len(whole) - 1
        assert [refused["file"] for refused in restored["refused"]] == [whole[0].stem]
        held = {segment["id"] for segment in server.forest()["segments"]}
        assert len(held) == len(whole) - 1
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
