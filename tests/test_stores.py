"""Stores: a directory and Mooncake keep one contract."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mooncake_client import Client

from sglang_pic.errors import PicConfigError
from sglang_pic.store import mooncake
from sglang_pic.store.address import check_address, open_store, read_key
from sglang_pic.store.base import (
    ABSENT,
    RAISED,
    REFUSED,
    TOO_LARGE,
    UNLISTED,
    Guarded,
    Problem,
    SegmentStore,
)
from sglang_pic.store.directory import STALE_S, SUFFIX, Directory
from sglang_pic.store.workers import Workers
from sglang_pic.store.writing import Writer

NAMES = [f"{i:016x}-{i:032x}" for i in range(9)]


def value_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.fixture(params=["directory", "mooncake", "real mooncake"])
def store(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[SegmentStore]:
    if request.param == "directory":
        yield Guarded(Directory(tmp_path / "made" / "here"))
    elif request.param == "mooncake":
        yield Guarded(mooncake.Mooncake(Client(), 1 << 20))
    else:
        try:
            mooncake.load()
        except PicConfigError as error:
            pytest.skip(str(error))
        with master(tmp_path) as address:
            yield open_store(address)


@contextlib.contextmanager
def master(tmp_path: pathlib.Path) -> Iterator[str]:
    """Address of a Mooncake master on this machine."""
    import mooncake as package

    ports = []
    for _ in range(3):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            ports.append(one.getsockname()[1])
    rpc, http, metrics = ports
    binary = pathlib.Path(package.__file__).parent / "mooncake_master"
    flags = {
        "rpc_address": "127.0.0.1",
        "rpc_port": rpc,
        "enable_http_metadata_server": "true",
        "http_metadata_server_host": "127.0.0.1",
        "http_metadata_server_port": http,
        "metrics_host": "127.0.0.1",
        "metrics_port": metrics,
    }
    line = [str(binary), *(f"--{name}={value}" for name, value in flags.items())]
    with (tmp_path / "master.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log)
    try:
        for port in (rpc, http):
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
        yield (
            f"mooncake://127.0.0.1:{rpc}?metadata=http://127.0.0.1:{http}/metadata"
            "&protocol=tcp&host=127.0.0.1&lent_mib=64&buffer_mib=32"
        )
    finally:
        process.kill()
        process.wait()


def test_a_store_keeps_what_it_is_given(store: SegmentStore) -> None:
    one, other = value_of(1000), value_of(70_000, 1)
    assert store.exist(NAMES[:3]) == [False] * 3
    assert store.get(NAMES[0], 1 << 20) == Problem(ABSENT)
    assert store.size(NAMES[0]) == Problem(ABSENT)
    assert store.put(NAMES[0], one) is None and store.put(NAMES[1], other) is None
    assert store.exist(NAMES[:3]) == [True, True, False]
    assert store.size(NAMES[1]) == 70_000
    found = store.get(NAMES[1], 70_000)
    assert isinstance(found, np.ndarray) and np.array_equal(found, other)
    assert found.flags.writeable
    refused = store.get(NAMES[1], 69_999)
    assert isinstance(refused, Problem) and refused.reason == TOO_LARGE
    assert store.remove(NAMES[0]) is None and store.remove(NAMES[8]) is None
    assert store.exist(NAMES[:2]) == [False, True]
    listed = store.names(NAMES[1][:16])
    assert listed == [NAMES[1]] or (isinstance(listed, Problem) and listed.reason == UNLISTED)


def test_a_master_that_is_gone_is_an_answer() -> None:
    client = Client()
    store = Guarded(mooncake.Mooncake(client, 1 << 20))
    assert store.put(NAMES[0], value_of(10)) is None
    client.gone = True
    for found in (
        store.put(NAMES[1], value_of(10)),
        store.get(NAMES[0], 99),
        store.exist(NAMES[:2]),
        store.remove(NAMES[0]),
    ):
        assert isinstance(found, Problem) and found.reason == REFUSED
    large = store.put(NAMES[0], value_of((1 << 20) + 1))
    assert large is not None and large.reason == TOO_LARGE


def test_whatever_a_client_raises_is_an_answer() -> None:
    class Raises:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def fail(*_: Any) -> Any:
                raise RuntimeError(f"no {name} today")

            return fail

    store: Any = Guarded(Raises())  # type: ignore[arg-type]
    calls = [
        store.put("a", value_of(1)),
        store.get("a", 1),
        store.exist(["a"]),
        store.size("a"),
        store.remove("a"),
        store.names("a"),
    ]
    assert {one.reason for one in calls} == {RAISED}
    assert "no put today" in str(calls[0])


def test_a_directory_keeps_its_budget_by_last_use(tmp_path: pathlib.Path) -> None:
    store = Directory(tmp_path, 10_000)
    for i, name in enumerate(NAMES[:4]):
        assert store.put(name, value_of(2000)) is None
        os.utime(tmp_path / (name + SUFFIX), (i, i))
    stale, young = tmp_path / "a.part", tmp_path / "b.part"
    for part in (stale, young):
        part.write_bytes(b"half")
    os.utime(stale, (0, time.time() - STALE_S - 9))
    # Read: it is the last to go.
    assert isinstance(store.get(NAMES[0], 1 << 20), np.ndarray)
    for name in NAMES[4:6]:
        assert store.put(name, value_of(2000)) is None
    left = {file.stem for file in tmp_path.glob("*" + SUFFIX)}
    assert left == {NAMES[0], *NAMES[3:6]}
    assert not stale.exists() and young.exists()
    too_large = store.put(NAMES[8], value_of(10_001))
    assert too_large is not None and too_large.reason == TOO_LARGE


def test_a_name_that_leads_elsewhere_is_not_listed(tmp_path: pathlib.Path) -> None:
    (tmp_path / f"..{SUFFIX}").write_bytes(b"")
    (tmp_path / f"{NAMES[0]}x{SUFFIX}").write_bytes(b"")
    store = Directory(tmp_path)
    assert store.put(NAMES[0], value_of(3)) is None
    assert store.names("") == [NAMES[0]]


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("s3://bucket", "there is no store s3://"),
        ("file://relative/path", "three slashes"),
        ("file:///tmp/x?mb=3", "knows no 'mb'"),
        ("file:///tmp/x?mib=none", "a number of MiB"),
        ("file:///tmp/x?mib", "name=value"),
        ("mooncake://host?metadata=x", "names its master's port"),
        ("mooncake://host:1", "needs metadata="),
        ("mooncake://host:1?metadata=x&protocol=udp", "protocol is one of"),
        ("mooncake://host:1?metadata=x&size=3", "knows no 'size'"),
        ("mooncake://host:1?metadata=x&lent_mib=much", "a number of MiB"),
        ("mooncake://host:1/path?metadata=x", "has no path"),
    ],
)
def test_a_wrong_address_is_refused(address: str, problem: str) -> None:
    with pytest.raises(PicConfigError, match=problem):
        check_address(address)


def test_what_mooncake_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(PicConfigError, match="sglang-pic\\[store\\]"):
        check_address("mooncake://host:1?metadata=x")


def test_a_key_is_read(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "key"
    assert read_key(None) is None
    with pytest.raises(PicConfigError, match="No such file"):
        read_key(str(file))
    file.write_text("short\n")
    with pytest.raises(PicConfigError, match="too short"):
        read_key(str(file))
    file.write_text("0123456789abcdef\n")
    assert read_key(str(file)) == b"0123456789abcdef"


def test_work_waits_for_few_threads_and_is_bounded() -> None:
    import threading

    go, done = threading.Event(), threading.Semaphore(0)
    workers = Workers("test", 2, 3)

    def work() -> None:
        go.wait(60)
        done.release()
        raise RuntimeError("of no consequence")

    accepted = 0
    for _ in range(50):
        accepted += workers.submit(work)
        time.sleep(0.001)
    assert accepted == 5
    go.set()
    for _ in range(accepted):
        assert done.acquire(timeout=60)


def test_a_writer_holds_few_bytes_and_writes_nothing_twice(tmp_path: pathlib.Path) -> None:
    import threading

    store, go = Directory(tmp_path), threading.Event()
    writer = Writer(Guarded(store), most_bytes=100)

    def encode() -> np.ndarray:
        go.wait(60)
        return value_of(30)

    # What is larger than all of the room goes alone.
    assert writer.write(NAMES[0], encode, 500) and not writer.write(NAMES[1], encode, 1)
    go.set()
    for _ in range(2000):
        if not writer.flying:
            break
        time.sleep(0.002)
    assert writer.write(NAMES[0], lambda: 1 / 0, 40)  # type: ignore[arg-type,return-value]
    assert writer.write(NAMES[2], lambda: 1 / 0, 40)  # type: ignore[arg-type,return-value]
    writer.remove(NAMES[0])
    for _ in range(2000):
        if not writer.flying and store.exist([NAMES[0]]) == [False]:
            break
        time.sleep(0.002)
    counts = writer.counts
    assert (counts.values, counts.present, counts.dropped, writer.flying) == (1, 1, 1, 0)
