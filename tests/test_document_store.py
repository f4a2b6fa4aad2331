"""Encoded documents in a store: what comes back is what was encoded, of the same tenant and
encoder, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import random
import time
import types
from array import array
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import pytest
import torch
from driver import Driver
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sglang.srt.managers.io_struct import GenerateReqInput
from test_documents import EACH, Beside, Noted, Told, asked, ids, wanted
from test_store import NOTHING, Faulty, Together, _flip, _listed, _runner, _settled, _store

from sglang_pic.config import PicConfig
from sglang_pic.encoder.config import DecoderShape, EncoderConfig
from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.errors import PicRefused, PicRequestError
from sglang_pic.forest.budget import Budgets, Need
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.documents import Document, Wanted
from sglang_pic.forest.kept import Kept
from sglang_pic.forest.keys import document_id
from sglang_pic.forest.pins import Pins
from sglang_pic.link.policy import LinkOptions
from sglang_pic.manage import coming, segments
from sglang_pic.manage.coming import COMING, GONE, HERE, LOOKING
from sglang_pic.manage.commands import obey
from sglang_pic.manage.store import Store
from sglang_pic.request import commands
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.commands import UNWRITTEN, WRITING, WRITTEN
from sglang_pic.request.hints import MISSING, NO_LONGER
from sglang_pic.server import encoded_life, stored
from sglang_pic.server.encoding import Job
from sglang_pic.server.fetching import FromStore
from sglang_pic.server.items import DocumentItem
from sglang_pic.server.queue import FairQueue
from sglang_pic.server.sources import COMPUTED, IN_STORE, LATE, STORE, Source
from sglang_pic.server.waited import NOTHING as NO_WAIT
from sglang_pic.server.with_encoder import WithEncoder
from sglang_pic.store import value as values
from sglang_pic.store.base import Guarded
from sglang_pic.store.directory import SUFFIX, Directory
from sglang_pic.store.document import DocumentCodec, SavedDocument
from sglang_pic.store.value import BadValue, Codec, SavedSegment

KEY = b"0123456789abcdef"


# -- values -----------------------------------------------------------------------------


def codec_of(encoder: str = "e", key: bytes | None = None) -> DocumentCodec:
    return DocumentCodec(Codec({"encoder": encoder}, key))


def saved_of(tokens: Sequence[int], salt: str = "us", dtype: Any = torch.float32) -> SavedDocument:
    torch.manual_seed(len(tokens))
    one = (torch.rand(2, len(tokens), 1, 2) * 99).to(dtype)
    return SavedDocument(array("q", tokens), salt, 3, {"k": one, "v": one + 1})


@given(
    tokens=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    key=st.sampled_from([None, KEY]),
)
def test_what_is_read_is_what_was_written(tokens: list[int], dtype: Any, key: Any) -> None:
    codec, saved = codec_of(key=key), saved_of(tokens, dtype=dtype)
    name = codec.name("us", saved.ids)
    found = codec.decode(codec.encode(name, saved).tobytes(), name, salt="us", path=tokens)
    assert (found.ids, found.salt, found.hits) == (saved.ids, "us", 3)
    assert found.tensors.keys() == saved.tensors.keys()
    for key_, one in found.tensors.items():
        assert one.dtype == dtype and torch.equal(one, saved.tensors[key_])


def reason_of(codec: DocumentCodec, value: Any, name: str, **where: Any) -> str:
    with pytest.raises(BadValue) as refused:
        codec.decode(value, name, **{"salt": "us", "path": range(7), **where})
    return refused.value.reason


def test_what_is_damaged_is_refused() -> None:
    codec, saved, draw = codec_of(), saved_of(range(7)), random.Random(0)
    name = codec.name("us", saved.ids)
    value = codec.encode(name, saved).tobytes()
    for at in range(len(value)):
        changed = bytearray(value)
        changed[at] ^= 1 << draw.randrange(8)
        assert reason_of(codec, changed, name) in (
            values.DAMAGED, values.FOREIGN, values.OTHER_NAME,
        )  # fmt: skip
    assert reason_of(codec, value[:-1], name) == values.DAMAGED


def test_what_is_of_others_is_refused() -> None:
    codec, saved = codec_of(), saved_of(range(7))
    name = codec.name("us", saved.ids)
    value = codec.encode(name, saved)
    # Another encoder, another tenant, other tokens: other names, and no value of theirs.
    other = codec_of("another")
    theirs, unlike = codec.name("them", saved.ids), codec.name("us", range(8))
    assert len({name, theirs, unlike, other.name("us", saved.ids)}) == 4
    assert reason_of(other, value, name) == values.FOREIGN
    assert reason_of(codec, value, theirs, salt="them") == values.OTHER_NAME
    assert reason_of(codec, codec.encode(unlike, saved), unlike) == values.OTHER_NAME
    assert reason_of(codec, value, name, path=range(8)) == values.OTHER_TOKENS
    # Planted by who may sign: what it holds is another tenant's.
    planted = codec.encode(theirs, saved)
    assert codec.decode(planted, theirs, salt="them").ids == saved.ids
    assert reason_of(codec, planted, theirs) == values.OTHER_NAME
    signed = codec_of(key=KEY)
    assert reason_of(signed, value, name) == values.UNSIGNED
    assert reason_of(codec_of(key=KEY + b"x"), signed.encode(name, saved), name) == (
        values.SIGNATURE
    )


def test_a_segment_is_no_document_and_no_document_a_segment() -> None:
    one = Codec({"encoder": "e"})
    codec, saved = DocumentCodec(one), saved_of(range(7))
    name = codec.name("us", saved.ids)
    segment = SavedSegment(saved.ids, None, "us", 3, saved.tensors)
    assert reason_of(codec, one.encode(name, segment), name) == values.DAMAGED
    with pytest.raises(BadValue):
        one.decode(codec.encode(name, saved), name, salt="us")


# -- one scheduler ------------------------------------------------------------------------


class Roomy(Beside):
    """Tells where a document may be filled in."""

    def __init__(self, digest: str = "digest"):
        super().__init__()
        self.digest = digest

    def room(self, tokens: int, device: str | None = None) -> EncoderKV:
        return EncoderKV(*(torch.empty((1, tokens, 1, 2), device=device) for _ in "kv"))


class Scheduler:
    """With an encoder and a store, and room for so many tokens of documents."""

    def __init__(self, path: pathlib.Path, tokens: int = 1000, digest: str = "d", **options: Any):
        self.driver = Driver(1, 256, PicConfig(min_segment=1))
        self.forest = self.driver.forest
        self.kept = Kept(tokens * EACH)
        self.beside = Roomy(digest)
        cost = PrefillCost(1e6, 10.0, 16)
        self.encoded = Told(self.beside, self.kept, cost, 4, Noted())  # type: ignore[arg-type]
        self.forest.encoded = self.encoded
        self.forest.pins = Pins(Budgets(Need(0, tokens * EACH), 0.5))
        self.store = _store(self.driver, path, **options)
        self.documents: Any = self.store.documents

    def obey(self, command: commands.Command, tenant: str | None = None, row: Any = (1,)) -> Any:
        req = self.driver.request(list(row), tenant)
        scheduler = types.SimpleNamespace(tree_cache=self.driver.cache)
        return json.loads(obey(scheduler, req, command))

    def hold(self, *made: array, tenant: str | None = None, named: bool = True) -> list[Document]:
        """Documents, encoded, for which no prompt waits."""
        prompt = wanted(*made, tenant=tenant)._replace(named=named)
        assert self.encoded.encode([prompt]) == [True]
        if not named:
            self.encoded.end(self._seen(prompt))
        return [self.find(one, tenant) for one in made]

    def find(self, tokens: array, tenant: str | None = None) -> Document:
        found = self.encoded.find(document_id(tenant, tokens), tenant)
        assert found is not None
        return found

    def see(self, tokens: array) -> None:
        """A request sees one, and ends."""
        name = document_id(None, tokens)
        self.encoded.end(self._seen(Wanted(f"of-{name}", None, [name], [])))

    def _seen(self, prompt: Wanted) -> Any:
        req = self.driver.request([1, 2, 3], prompt.tenant)
        assert self.encoded.take(req, asked(prompt)) == []
        return req

    def is_right(self, tokens: array, tenant: str | None = None) -> bool:
        """Whether what is held is what its encoder would make of it."""
        (expected,) = Roomy().encode([tokens])
        return all(map(torch.equal, self.find(tokens, tenant).kv, expected))

    def fetch(self, *made: array, tenant: str | None = None) -> list[tuple[str, str | None]]:
        """What becomes of these, as the front would ask."""
        row = [token for one in made for token in one]
        begin = commands.FetchDocuments([len(one) for one in made], named=False)
        assert self.obey(begin, tenant, row) == {}
        names = [document_id(tenant, one) for one in made]
        found: dict[str, tuple[str, str | None]] = {}
        for _ in range(2000):
            left = [name for name in names if name not in found]
            if not left:
                break
            told = self.obey(commands.Fetched(left, documents=True), tenant)["segments"]
            for name, one in zip(left, told, strict=True):
                if one["state"] in (HERE, GONE):
                    found[name] = (one["state"], one["reason"])
            time.sleep(0.002)
        assert len(self.documents._incoming) == 0
        return [found[name] for name in names]


def test_what_is_worth_keeping_is_written_once(tmp_path: pathlib.Path) -> None:
    scheduler = Scheduler(tmp_path)
    one = ids(1, 10)
    scheduler.hold(one, named=False)
    for _ in range(10):
        scheduler.store.step()
    assert scheduler.documents._outgoing.pending == 0 and not _listed(tmp_path)
    for _ in range(3):
        scheduler.see(one)
        _settled(scheduler.store, 1)
    scheduler.hold(ids(2, 10))
    _settled(scheduler.store, 2)
    stats = scheduler.store.stats()
    assert (stats["written"], stats["present"]) == (2, 0) and len(_listed(tmp_path)) == 2
    found = [load_file(file) for file in _listed(tmp_path)]
    assert sorted(value["k"][0, :, 0, 0].tolist() for value in found) == [
        [float(token) for token in ids(seed, 10)] for seed in (1, 2)
    ]
    # Of each tenant its own, which has nothing of the other's in its name or its words.
    scheduler.hold(one, tenant="somebody")
    _settled(scheduler.store, 3)
    assert len({file.stem.partition("-")[0] for file in _listed(tmp_path)}) == 2
    assert not any(b"somebody" in file.read_bytes() for file in _listed(tmp_path))


@pytest.mark.parametrize("how", ["deleted", "evicted", "flushed"])
def test_a_copy_is_made_in_pieces_and_given_up_where_its_document_goes(
    tmp_path: pathlib.Path, how: str
) -> None:
    scheduler = Scheduler(tmp_path, 60)
    (document,) = scheduler.hold(ids(1, 50))
    outgoing = scheduler.documents._outgoing
    copied = []
    for _ in range(4):
        outgoing.step(8 * EACH)
        copied.append(outgoing._copy.done)
    # Two numbers a token of each.
    assert copied == [16, 32, 48, 64] and outgoing.pending == 1
    if how == "deleted":
        scheduler.obey(commands.Delete(document.name))
    elif how == "evicted":
        scheduler.hold(ids(2, 20), named=False)
        assert not scheduler.encoded.holds(document.name)
    else:
        scheduler.forest.reset()
    outgoing.step(8 * EACH)
    assert outgoing.pending == 0 and not _listed(tmp_path)
    # It comes back, and is written whole.
    scheduler.hold(ids(1, 50))
    _settled(scheduler.store, 1)
    (file,) = _listed(tmp_path)
    assert load_file(file)["v"][0, :, 0, 1].tolist() == [float(token) for token in ids(1, 50)]


def test_a_copy_that_fails_is_not_tried_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(tmp_path)
    outgoing = scheduler.documents._outgoing

    def fail(copy: Any, most: int) -> int:
        raise RuntimeError("no room on the host")

    monkeypatch.setattr(outgoing, "_advance", fail)
    (document,) = scheduler.hold(ids(1, 10), named=False)
    (state,) = scheduler.store.publish([document.name], None, begin=True)
    assert state["state"] == WRITING
    with pytest.raises(RuntimeError):
        scheduler.store.step()
    (state,) = scheduler.store.publish([document.name], None, begin=False)
    assert state["state"] == UNWRITTEN and outgoing.pending == 0


def test_what_is_published_is_there_whatever_was_before(tmp_path: pathlib.Path) -> None:
    scheduler = Scheduler(tmp_path)
    (document,) = scheduler.hold(ids(1, 10), tenant="us", named=False)

    def published(tenant: str | None) -> tuple[str, str | None]:
        begin = True
        for _ in range(2000):
            (one,) = scheduler.store.publish([document.name], tenant, begin=begin)
            begin = False
            if one["state"] != WRITING:
                break
            scheduler.store.step()
            time.sleep(0.002)
        return one["state"], one["reason"]

    assert published("them") == (UNWRITTEN, "not_held")
    for _ in range(2):
        assert published("us") == (WRITTEN, None)
        (file,) = _listed(tmp_path)
        # What the store has evicted is written again.
        file.unlink()


def test_what_comes_back_is_what_was_saved(tmp_path: pathlib.Path) -> None:
    scheduler = Scheduler(tmp_path)
    one, two = scheduler.hold(ids(1, 10), ids(2, 20), named=False)
    (theirs,) = scheduler.hold(ids(1, 10), tenant="them", named=False)
    assert scheduler.driver.compile(list(range(40)), named=True)
    saved = scheduler.store.save(None, None)
    assert (saved["segments"], saved["documents"]) == (1, 2)
    assert saved["bytes"] == sum(file.stat().st_size for file in _listed(tmp_path))
    assert scheduler.store.save("them", [theirs.name])["documents"] == 1
    for unknown in ("0" * 32, theirs.name):
        with pytest.raises(PicRefused) as refused:
            scheduler.store.save(None, [one.name, unknown])
        assert refused.value.status == 404
    fresh = Scheduler(tmp_path)
    assert fresh.store.restore(None) == NOTHING | {"segments": 1, "documents": 2}
    assert fresh.store.restore(None) == NOTHING | {"present": 3}
    assert fresh.is_right(ids(1, 10)) and fresh.is_right(ids(2, 20))
    assert fresh.find(ids(1, 10)).uses == 1
    assert fresh.obey(commands.List(), "them")["documents"] == []
    assert fresh.store.restore("them")["documents"] == 1
    fresh.encoded.check()
    # What was read is not written again.
    for _ in range(20):
        fresh.store.step()
    assert fresh.store.stats()["written"] == fresh.store.stats()["present"] == 0
    assert two.tokens == 20


def test_another_encoder_finds_nothing(tmp_path: pathlib.Path) -> None:
    scheduler = Scheduler(tmp_path)
    scheduler.hold(ids(1, 10))
    _settled(scheduler.store, 1)
    other = Scheduler(tmp_path, digest="another")
    assert other.store.restore(None) == NOTHING
    assert other.fetch(ids(1, 10)) == [(GONE, "not_in_store")]
    # Nor beside another model, whatever its encoder is called.
    beside = Scheduler(tmp_path, seed=1)
    assert beside.fetch(ids(1, 10)) == [(GONE, "not_in_store")]
    # Planted under the name that it would have there.
    (file,) = _listed(tmp_path)
    name = other.documents._codec.name("", ids(1, 10))
    (tmp_path / (name + SUFFIX)).write_bytes(file.read_bytes())
    assert other.fetch(ids(1, 10)) == [(GONE, "foreign")]
    (refused,) = other.store.restore(None)["refused"]
    assert refused["reason"].startswith("made for encoder d")
    assert other.kept.nbytes == 0
    assert Scheduler(tmp_path).fetch(ids(1, 10)) == [(HERE, None)]


def test_restoring_evicts_nothing(tmp_path: pathlib.Path) -> None:
    scheduler = Scheduler(tmp_path)
    scheduler.hold(ids(1, 10), ids(2, 20))
    _settled(scheduler.store, 2)
    small = Scheduler(tmp_path, 25)
    small.hold(ids(3, 12))
    found = small.store.restore(None)
    assert found["documents"] == 1 and len(found["refused"]) == 1
    assert small.is_right(ids(3, 12)) and small.is_right(ids(1, 10))
    small.encoded.check()


def test_a_pin_outlives_its_server(tmp_path: pathlib.Path) -> None:
    scheduler = Scheduler(tmp_path, server="one")
    lasting, ended, timed = scheduler.hold(ids(1, 10), ids(2, 10), ids(3, 10), tenant="us")
    for document in (lasting, ended):
        assert scheduler.obey(commands.Pin(document.name), "us")["pinned"]
    scheduler.obey(commands.Pin(timed.name, lasting=False), "us")
    scheduler.obey(commands.Unpin(ended.name), "us")
    # Of each change of them one list, beside the values.
    _settled(scheduler.store, 6)
    assert Scheduler(tmp_path, server="two").store.start() == NOTHING
    fresh = Scheduler(tmp_path, server="one")
    assert fresh.store.start() == NOTHING | {"documents": 1}
    (listed,) = fresh.obey(commands.List(), "us")["documents"]
    assert (listed["id"], listed["pinned"]) == (lasting.name, True)
    assert fresh.forest.pins.held().state == 10 * EACH
    # And that one's end.
    again = Scheduler(tmp_path, server="one")
    assert again.store.start()["documents"] == 1
    assert again.obey(commands.Get(lasting.name))["refused"]["status"] == 404


def test_what_a_tenant_deletes_goes_from_the_store(tmp_path: pathlib.Path) -> None:
    scheduler = Scheduler(tmp_path)
    one, _ = scheduler.hold(ids(1, 10), ids(2, 20))
    scheduler.hold(ids(1, 10), tenant="them")
    _settled(scheduler.store, 3)
    scheduler.obey(commands.Delete(one.name))
    assert segments.flush(scheduler.forest, None)["documents"] == 1
    for _ in range(2000):
        if len(_listed(tmp_path)) == 1:
            break
        time.sleep(0.002)
    assert scheduler.fetch(ids(1, 10), ids(2, 20)) == [(GONE, "not_in_store")] * 2
    assert Scheduler(tmp_path).fetch(ids(1, 10), tenant="them") == [(HERE, None)]


def test_ranks_load_a_document_all_or_none(tmp_path: pathlib.Path) -> None:
    together = Together()
    made = [ids(i, 10) for i in range(3)]

    def pair() -> list[Scheduler]:
        groups: list[Any] = [
            types.SimpleNamespace(rank=rank, size=2, gather=together.gather_of(rank))
            for rank in range(2)
        ]
        # The parts of the weights that they hold differ.
        return [Scheduler(tmp_path, seed=rank, ranks=groups[rank]) for rank in range(2)]

    saving = pair()
    for scheduler in saving:
        scheduler.hold(*made, named=False)
    one, other = together.run(lambda rank: saving[rank].store.save(None, None))
    assert one == other and one["documents"] == 3
    of_rank = [
        [file for file in _listed(tmp_path) if file.stem.startswith(group)]
        for group in (scheduler.documents._codec.group("") for scheduler in saving)
    ]
    first, second = of_rank
    assert [file.stem[17:] for file in first] == [file.stem[17:] for file in second]
    first[0].unlink()
    _flip(second[1], second[1].stat().st_size // 2)
    loading = pair()
    one, other = together.run(lambda rank: loading[rank].store.restore(None))
    assert one["documents"] == other["documents"] == 1
    assert len(one["refused"]) == len(other["refused"]) == 2
    held = [{d.name for d in scheduler.encoded.of_tenant(None)} for scheduler in loading]
    assert held[0] == held[1] and len(held[0]) == 1
    loading = pair()
    told = together.run(lambda rank: loading[rank].fetch(*made))
    states = [[state for state, _ in one] for one in told]
    assert states[0] == states[1] and sorted(states[0]) == [GONE, GONE, HERE]
    held = [{d.name for d in scheduler.encoded.of_tenant(None)} for scheduler in loading]
    assert held[0] == held[1] and len(held[0]) == 1


# -- read ahead ---------------------------------------------------------------------------


def written(path: pathlib.Path, *made: array, **options: Any) -> None:
    """A server that has them in the store."""
    scheduler = Scheduler(path, **options)
    scheduler.hold(*made)
    _settled(scheduler.store, len(made))


def test_what_a_prompt_lacks_is_read_ahead_of_it(tmp_path: pathlib.Path) -> None:
    made = [ids(1, 10), ids(2, 30)]
    written(tmp_path, *made)
    scheduler = Scheduler(tmp_path)
    assert scheduler.fetch(*made, ids(3, 5)) == [(HERE, None)] * 2 + [(GONE, "not_in_store")]
    assert scheduler.beside.read == [] and all(map(scheduler.is_right, made))
    scheduler.see(made[0])
    assert scheduler.fetch(made[0]) == [(HERE, "came_meanwhile")]
    # Another tenant's prompt finds nothing of it.
    assert scheduler.fetch(made[0], tenant="them") == [(GONE, "not_in_store")]
    assert scheduler.obey(commands.List(), "them")["documents"] == []
    for _ in range(20):
        scheduler.store.step()
    stats = scheduler.store.stats()
    assert stats["written"] == stats["present"] == stats["reading_bytes"] == 0
    scheduler.encoded.check()


def test_so_many_bytes_are_filled_in_at_a_command(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [ids(1, 30), ids(2, 30)]
    written(tmp_path, *made)
    monkeypatch.setattr(coming, "FILL_BYTES", 8 * EACH)
    scheduler = Scheduler(tmp_path)
    row = [*made[0], *made[1]]
    scheduler.obey(commands.FetchDocuments([30, 30], named=True), row=row)
    names = [document_id(None, one) for one in made]
    while scheduler.documents._reader.flying == 0:
        time.sleep(0.001)
    for _ in range(2000):
        if all(read.done for read in scheduler.documents._reader._reads.values()):
            break
        time.sleep(0.002)
    seen = []
    for _ in range(8):
        told = scheduler.obey(commands.Fetched(names, documents=True))["segments"]
        seen.append([one["state"] for one in told])
        if seen[-1] == [HERE, HERE]:
            break
        # What is half there is found by nobody.
        assert scheduler.encoded.holds(names[1]) is False
        names_left = [n for n, one in zip(names, told, strict=True) if one["state"] != HERE]
        assert names[1] in names_left
    # 30 tokens are four times eight; what is left of the fourth goes to the next one.
    assert [one[0] for one in seen[:4]] == [COMING, COMING, COMING, HERE]
    assert seen[-1] == [HERE, HERE] and len(seen) == 8
    assert all(map(scheduler.is_right, made))


def test_what_nobody_waits_for_any_more_leaves_nothing(tmp_path: pathlib.Path) -> None:
    made = ids(1, 30)
    written(tmp_path, made)
    scheduler = Scheduler(tmp_path)
    name = document_id(None, made)
    scheduler.obey(commands.FetchDocuments([30], named=False), row=made)
    scheduler.obey(commands.Fetched([name], drop=True, documents=True))
    for _ in range(2000):
        if not scheduler.store.stats()["reading_bytes"]:
            break
        time.sleep(0.002)
    assert scheduler.store.stats()["reading_bytes"] == scheduler.kept.nbytes == 0
    assert not scheduler.encoded.holds(name)
    told = scheduler.obey(commands.Fetched([name], documents=True))["segments"]
    assert (told[0]["state"], told[0]["reason"]) == (GONE, "not_asked_for")


def test_what_has_no_room_is_not_filled_in(tmp_path: pathlib.Path) -> None:
    made = [ids(1, 20), ids(2, 10)]
    written(tmp_path, *made)
    scheduler = Scheduler(tmp_path, 30)
    (pinned,) = scheduler.hold(ids(9, 15))
    assert scheduler.obey(commands.Pin(pinned.name))["pinned"]
    assert scheduler.fetch(*made) == [(GONE, "no_room"), (HERE, None)]
    # Others go for it, what is pinned does not.
    scheduler.obey(commands.Unpin(pinned.name))
    assert scheduler.fetch(made[0]) == [(HERE, None)]
    assert scheduler.kept.nbytes <= 30 * EACH
    scheduler.encoded.check()


@pytest.mark.parametrize("fault", ["slow", "hangs", "raises"])
def test_a_store_that_is_slow_or_gone_holds_nothing_up(tmp_path: pathlib.Path, fault: str) -> None:
    made = ids(1, 30)
    written(tmp_path, made)
    scheduler = Scheduler(tmp_path)
    faulty: Any = Faulty(tmp_path, fault)
    store = Store(scheduler.forest, _runner(scheduler.driver), Guarded(faulty))
    scheduler.forest.store, scheduler.documents = store, store.documents
    if fault == "raises":
        assert scheduler.fetch(made) == [(GONE, "store_failed")]
        return
    name = document_id(None, made)
    scheduler.obey(commands.FetchDocuments([30], named=False), row=made)
    told = scheduler.obey(commands.Fetched([name], documents=True))["segments"]
    assert told[0]["state"] in (LOOKING, COMING)
    # Meanwhile it is encoded.
    scheduler.hold(made)
    scheduler.obey(commands.Fetched([name], drop=True, documents=True))
    faulty.go.set()
    assert scheduler.is_right(made)


def test_a_value_of_another_shape_is_refused(tmp_path: pathlib.Path) -> None:
    """As somebody would write it who may sign."""
    scheduler = Scheduler(tmp_path)
    codec, made = scheduler.documents._codec, ids(1, 20)
    name, good = codec.name("", made), torch.zeros(1, 20, 1, 2)
    for bad in (
        {"k": good},
        {"k": good, "v": torch.zeros(1, 19, 1, 2)},
        {"k": good, "v": torch.zeros(2, 20, 1, 2)},
        {"k": good, "v": good.double()},
        {"k": good, "v": good, "w": good},
    ):
        Directory(tmp_path).put(name, codec.encode(name, SavedDocument(made, "", 0, bad)))
        assert scheduler.fetch(made) == [(GONE, "other_shape")]
    long = ids(1, 101)
    one = torch.zeros(1, 101, 1, 2)
    saved = SavedDocument(long, "", 0, {"k": one, "v": one})
    name = codec.name("", long)
    Directory(tmp_path).put(name, codec.encode(name, saved))
    assert scheduler.fetch(long) == [(GONE, "other_shape")]


def test_commands_for_documents_need_an_encoder_and_a_store(tmp_path: pathlib.Path) -> None:
    driver = Driver(1, 256, PicConfig(min_segment=1))
    scheduler = types.SimpleNamespace(tree_cache=driver.cache)

    def status(command: commands.Command, row: Sequence[int] = (1, 2, 3)) -> int:
        return json.loads(obey(scheduler, driver.request(row), command))["refused"]["status"]

    both = (commands.FetchDocuments([3], named=False), commands.Fetched(["a"], documents=True))
    assert [status(one) for one in both] == [409, 409]
    driver.forest.store = Store(driver.forest, _runner(driver), Guarded(Directory(tmp_path)))
    assert [status(one) for one in both] == [409, 409]
    encoding = Scheduler(tmp_path)
    for lengths in ([], [2], [4], [0, 3], [1] * 300):
        told = encoding.obey(commands.FetchDocuments(lengths, named=False), row=(1, 2, 3))
        assert told["refused"]["status"] == 400


# -- the front ------------------------------------------------------------------------------


def test_the_front_asks_for_documents_by_their_names(tmp_path: pathlib.Path) -> None:
    made = [ids(1, 10), ids(2, 20), ids(3, 5)]
    written(tmp_path, *made[:2])
    scheduler = Scheduler(tmp_path)
    scheduler.hold(made[0], tenant="us")
    sent: list[str] = []

    async def command(do: str, **fields: Any) -> list[Any]:
        await asyncio.sleep(0)
        sent.append(do)
        row, tenant = fields.pop("ids", [1]), fields.pop("cache_salt")
        kinds = {"fetch_documents": commands.FetchDocuments, "fetched": commands.Fetched}
        return [scheduler.obey(kinds[do](**fields), tenant, row)]

    async def run() -> None:
        fetching: FromStore[DocumentItem] = FromStore(
            command, stored.Documents(), lambda: 1000, 5.0, always=True
        )
        items = [DocumentItem(tuple(one), None) for one in made]
        sources = await asyncio.gather(*map(fetching.fetch, items))
        assert [(one.kind, one.reason) for one in sources] == [
            (STORE, IN_STORE), (STORE, IN_STORE), (COMPUTED, "not_in_store"),
        ]  # fmt: skip
        assert sent.count("fetch_documents") == 1
        # What another tenant has is nothing to this one.
        (source,) = await asyncio.gather(fetching.fetch(DocumentItem(tuple(made[1]), "us")))
        assert (source.kind, source.reason) == (COMPUTED, "not_in_store")
        late: FromStore[DocumentItem] = FromStore(
            command, stored.Documents(), lambda: 1000, 0.0, always=True
        )
        source = await late.fetch(DocumentItem(tuple(made[2]), None))
        assert (source.kind, source.reason) == (COMPUTED, LATE)

    asyncio.run(run())
    assert len(scheduler.documents._incoming) == 0
    scheduler.encoded.check()


class Nobody:
    """As ``Waiting`` of requests that nobody ends."""

    @contextlib.contextmanager
    def stay(self, obj: Any) -> Iterator[None]:
        yield

    async def until(self, stay: Any, obj: Any, request: Any, work: Any) -> Any:
        return await work

    async def refuse(self, stay: Any, message: str) -> None:
        raise AssertionError(message)


class FromBoth:
    """Has the documents that begin with these tokens in a store; what it was asked for."""

    has_store = True

    def __init__(self, *first: int):
        self._first = first
        self.asked: list[int] = []

    async def fetch(self, item: DocumentItem) -> Source:
        self.asked.append(item.ids[0])
        return Source(STORE, IN_STORE) if item.ids[0] in self._first else Source(COMPUTED, LATE)

    def computed(self, tokens: int, seconds: float) -> None:
        pass


def lived(
    path: pathlib.Path,
    fetching: FromBoth,
    missing: list[list[int]],
    kept: list[bool],
    refused: PicRefused | None = None,
    *,
    most_waiting: int = 64,
    limit_s: float = 300.0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a prompt of three documents, which begin with 1, 2 and 3, waited for, and the
    leases that were sent for it.

    Args:
        missing: what the scheduler lacks, one time after another.
        kept: whether there is room, one time after another.
        refused: what the scheduler says instead.
        most_waiting: documents of one tenant.
        limit_s: seconds that the prompt waits.
    """
    shape = DecoderShape(8, 2, 1, 1, 8, 64, "f")
    EncoderConfig(shape, (0,), intermediate_size=8).save(path)
    model = types.SimpleNamespace(vocab_size=64, dtype=torch.float32)
    manager = types.SimpleNamespace(max_req_input_len=1000, model_config=model)
    leases: list[dict[str, Any]] = []

    async def send(do: str, **fields: Any) -> list[Any]:
        leases.extend(fields["leases"])
        if refused is not None:
            raise refused
        return [{"kept": [kept.pop(0) for _ in fields["leases"]]}]

    async def generate(manager: Any, obj: Any, request: Any) -> AsyncGenerator[Any, None]:
        lacks = missing.pop(0)
        reason = {"type": "abort", "message": MISSING + json.dumps(lacks)} if lacks else None
        yield {"meta_info": {"finish_reason": reason, "cached_tokens": 0}}

    async def run() -> dict[str, Any]:
        queue: FairQueue[Job] = FairQueue(64, 64, most_waiting)
        times = {"compile_timeout_s": limit_s, "compile_limit_s": limit_s}
        config = PicConfig(encoder=str(path), **times)
        waiting: Any = Nobody()
        guards: Any = types.SimpleNamespace(generate=None, flush=None)
        front = WithEncoder(manager, config, waiting, lambda _: 0, queue, send, fetching, guards)
        spans = tuple(TokenSpan(4 * i, 4 * i + 4) for i in range(3))
        prompt = ([1] * 4 + [2] * 4 + [3] * 4 + [9], LinkRequest(spans, LinkOptions()))
        obj = GenerateReqInput(input_ids=prompt[0], sampling_params={"max_new_tokens": 1})
        waited = [NO_WAIT]
        async for _ in front.live(generate, obj, None, prompt, waited, 0):
            pass
        return waited[0].to_json()

    return asyncio.run(run()), leases


def test_a_prompt_reads_what_it_can_and_has_the_rest_encoded(tmp_path: pathlib.Path) -> None:
    fetching = FromBoth(1, 2)
    told, leases = lived(tmp_path, fetching, [[0, 1, 2], []], [True])
    assert fetching.asked == [1, 2, 3]
    assert {(one["segment"], one["outcome"], one["source"]) for one in told["waited_for"]} == {
        (0, "fetched", "store"), (1, "fetched", "store"), (2, "compiled", "computed"),
    }  # fmt: skip
    assert told["tokens_compiled"] == 4
    # What has come is kept with what is encoded.
    (lease,) = leases
    assert (lease["lengths"], len(lease["held"])) == ([4], 2)
    told, leases = lived(tmp_path, FromBoth(1, 2, 3), [[0, 2], []], [])
    assert [one["outcome"] for one in told["waited_for"]] == ["fetched"] * 2 and not leases


def test_what_has_come_and_gone_is_encoded(tmp_path: pathlib.Path) -> None:
    """Not read again and again, by prompts that take each other's room."""
    fetching = FromBoth(1, 2, 3)
    told, leases = lived(tmp_path, fetching, [[0, 1, 2], [1], []], [True])
    assert fetching.asked == [1, 2, 3]
    (lease,) = leases
    assert (lease["lengths"], len(lease["held"])) == ([4], 2)
    outcomes = {one["segment"]: (one["outcome"], one["source"]) for one in told["waited_for"]}
    assert outcomes[1] == ("compiled", "computed") and outcomes[0] == ("fetched", "store")


def test_a_prompt_without_room_asks_what_it_lacks_by_then(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was held may have gone: it would wait for that until its limit."""
    monkeypatch.setattr(encoded_life, "PAUSE_S", 0.0)
    told, leases = lived(tmp_path, FromBoth(), [[0], [0, 1], [0, 1], []], [False, False, True])
    assert [lease["lengths"] for lease in leases] == [[4], [4, 4], [4, 4]]
    assert [len(lease["held"]) for lease in leases] == [2, 1, 1]
    assert [one["segment"] for one in told["waited_for"]] == [0, 1]
    # What another prompt brought meanwhile is not waited for.
    _, leases = lived(tmp_path, FromBoth(), [[0], []], [False])
    assert len(leases) == 1


@pytest.mark.parametrize(
    ("status", "error"), [(503, AssertionError), (400, PicRequestError), (409, PicRequestError)]
)
def test_what_the_scheduler_refuses_ends_the_prompt(
    status: int, error: type[Exception], tmp_path: pathlib.Path
) -> None:
    """With 503, as ``Nobody`` says, where it is no fault of the prompt's."""
    refused = PicRefused(status, "ranks differ", "pic.mode")
    with pytest.raises(error, match="ranks differ"):
        lived(tmp_path, FromBoth(), [[0]], [], refused)


@pytest.mark.parametrize("why", [{"most_waiting": 0}, {"limit_s": 1e-9}])
def test_a_prompt_does_not_wait_for_ever(why: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """Not where too many documents of its tenant wait, and not beyond its limit."""
    with pytest.raises(AssertionError, match=NO_LONGER):
        lived(tmp_path, FromBoth(), [[0]], [False], **why)
