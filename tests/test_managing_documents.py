"""Encoded documents by name: listed, pinned, deleted, asked for ahead, foretold."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
from driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st
from test_documents import EACH, asked, clock, held_by, ids, wanted

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicRefused
from sglang_pic.forest.budget import Budgets, Need
from sglang_pic.forest.documents import Wanted
from sglang_pic.forest.encoded import Encoded
from sglang_pic.forest.keys import document_id
from sglang_pic.forest.pins import Pins
from sglang_pic.forest.users import LEASE_S
from sglang_pic.manage import documents, segments
from sglang_pic.manage.commands import obey
from sglang_pic.request import commands


class Scheduler:
    """With an encoder, and room for so many tokens of documents."""

    def __init__(self, tokens: int = 100, share: float = 0.5, driver: Driver | None = None):
        self.driver = driver or Driver(1, 256, PicConfig(min_segment=1))
        self.encoded, self.beside, self.store = held_by(tokens)
        self.forest = self.driver.forest
        self.forest.encoded = self.encoded
        self.forest.pins = Pins(Budgets(Need(0, tokens * EACH), share))

    def obey(self, command: commands.Command, tenant: str | None = None, row: Any = (1,)) -> Any:
        req = self.driver.request(list(row), tenant)
        scheduler = types.SimpleNamespace(
            tree_cache=self.driver.cache,
            schedule_stream=types.SimpleNamespace(wait_stream=lambda other: None),
            forward_stream=None,
        )
        return json.loads(obey(scheduler, req, command))

    def refused(self, command: commands.Command, tenant: str | None = None) -> int:
        told = self.obey(command, tenant)
        assert told.keys() == {"refused"}, told
        return int(told["refused"]["status"])

    def hold(self, *sizes: int, tenant: str | None = None, first: int = 1) -> list[str]:
        """Documents that no prompt waits for; their names."""
        made = [ids(first + i, size) for i, size in enumerate(sizes)]
        prompt = wanted(*made, tenant=tenant)._replace(named=True)
        assert self.encoded.encode([prompt]) == [True]
        return [document_id(tenant, one) for one in made]

    def see(self, name: str, tenant: str | None = None) -> Any:
        """A running request that sees one."""
        req = self.driver.request([1, 2, 3], tenant)
        prompt = Wanted(f"of-{name}", tenant, [name], [])
        assert self.encoded.take(req, asked(prompt)) == []
        return req


@pytest.fixture(scope="module")
def driver() -> Driver:
    return Driver(1, 256, PicConfig(min_segment=1))


def test_a_tenant_lists_its_own() -> None:
    scheduler = Scheduler()
    first, second = scheduler.hold(10, 20, tenant="a")
    (theirs,) = scheduler.hold(5, tenant="b")
    req = scheduler.see(first, "a")
    listed = scheduler.obey(commands.List(), "a")
    assert listed["segments"] == []
    assert listed["documents"] == [
        {"id": first, "tokens": 10, "bytes": 10 * EACH, "hits": 1, "last_use": 1,
         "pinned": False, "in_use": True},
        {"id": second, "tokens": 20, "bytes": 20 * EACH, "hits": 0, "last_use": 0,
         "pinned": False, "in_use": False},
    ]  # fmt: skip
    assert [one["id"] for one in scheduler.obey(commands.List(), "b")["documents"]] == [theirs]
    assert scheduler.obey(commands.List())["documents"] == []
    scheduler.encoded.end(req)
    assert not scheduler.obey(commands.Get(first), "a")["in_use"]


@pytest.mark.parametrize("kind", [commands.Get, commands.Pin, commands.Unpin, commands.Delete])
def test_what_is_anothers_does_not_exist(kind: Any) -> None:
    scheduler = Scheduler()
    (name,) = scheduler.hold(10, tenant="a")
    for tenant in ("b", None):
        assert scheduler.refused(kind(name), tenant) == 404
        assert scheduler.obey(commands.Held([name]), tenant) == {"held": [False]}
        assert scheduler.obey(commands.Name([name], 0), tenant) == {"held": [False]}
        told = scheduler.obey(commands.Foretell([name]), tenant)
        assert told == {"held": [False], "cached": 0}
        scheduler.obey(commands.Flush(), tenant)
    assert scheduler.obey(commands.Held([name]), "a") == {"held": [True]}
    assert not scheduler.obey(commands.Get(name), "a")["pinned"]


def test_a_pin_outlasts_what_else_needs_the_room() -> None:
    scheduler = Scheduler(30)
    first, second = scheduler.hold(10, 10)
    assert scheduler.obey(commands.Pin(first))["pinned"]
    scheduler.encoded.check()
    assert scheduler.obey(commands.Get(first)) | {"in_use": False} == scheduler.obey(
        commands.Pin(first)
    )
    assert scheduler.encoded.to_json()["in_use"] == 0
    scheduler.hold(20, first=5)
    assert scheduler.obey(commands.Held([first, second])) == {"held": [True, False]}
    assert scheduler.refused(commands.Delete(first)) == 409
    assert scheduler.obey(commands.Flush())["documents"] == 1
    assert scheduler.obey(commands.Held([first])) == {"held": [True]}
    # What a request sees stays when its pin ends.
    req = scheduler.see(first)
    assert not scheduler.obey(commands.Unpin(first))["pinned"]
    assert scheduler.refused(commands.Delete(first)) == 409
    scheduler.encoded.check()
    scheduler.encoded.end(req)
    assert scheduler.obey(commands.Delete(first)) == {"id": first, "freed_tokens": 10}
    assert scheduler.refused(commands.Get(first)) == 404
    assert scheduler.store.nbytes == 0
    scheduler.encoded.check()


def test_pins_are_within_a_tenants_share() -> None:
    scheduler = Scheduler(100, share=0.25)
    one, two = scheduler.hold(20, 10, tenant="a")
    (theirs,) = scheduler.hold(20, tenant="b")
    assert scheduler.obey(commands.Pin(one), "a")["pinned"]
    assert scheduler.refused(commands.Pin(two), "a") == 507
    assert scheduler.obey(commands.Pin(theirs), "b")["pinned"]
    assert scheduler.forest.pins.held().state == 40 * EACH
    scheduler.obey(commands.Unpin(one), "a")
    assert scheduler.obey(commands.Pin(two), "a")["pinned"]
    assert segments.stats(scheduler.forest)["pins"] == 2
    # SGLang's own flush takes pins with it.
    scheduler.forest.reset()
    assert scheduler.store.nbytes == scheduler.store.pinned_bytes == 0
    scheduler.encoded.check()


def test_what_is_asked_for_by_name_waits_for_no_prompt() -> None:
    scheduler = Scheduler(30)
    (name,) = scheduler.hold(20)
    assert scheduler.encoded.to_json()["in_use"] == 0
    document = scheduler.encoded.find(name, None)
    assert document is not None and document.named
    # It goes when it is worth least, whatever it was asked for by.
    assert scheduler.encoded.encode([wanted(ids(2, 20))]) == [True]
    assert scheduler.encoded.find(name, None) is None
    # What is there counts as named from then on.
    other = document_id(None, ids(2, 20))
    assert scheduler.obey(commands.Name([other, name], 0)) == {"held": [True, False]}
    document = scheduler.encoded.find(other, None)
    assert document is not None and document.named
    # What requests see leaves no room.
    lease = commands.Lease("x", None, [], [20], named=True)
    told = scheduler.obey(commands.Encode([lease], 0.0), row=ids(3, 20))
    assert told == {"kept": [False]}
    scheduler.encoded.check()


def test_uses_are_remembered_of_what_has_gone() -> None:
    scheduler = Scheduler(30)
    name, other = document_id(None, ids(1, 20)), document_id(None, ids(2, 20))

    def seen(seed: int) -> int:
        """A request comes and goes; the uses that its document has then."""
        prompt = wanted(ids(seed, 20))
        assert scheduler.encoded.encode([prompt]) == [True]
        req = scheduler.driver.request([1, 2, 3])
        assert scheduler.encoded.take(req, asked(prompt)) == []
        scheduler.encoded.end(req)
        document = scheduler.encoded.find(document_id(None, ids(seed, 20)), None)
        assert document is not None and document.is_worth_keeping == (document.uses > 1)
        return document.uses

    for uses in (1, 2, 3):
        assert (seen(1), scheduler.encoded.find(other, None)) == (uses, None)
        assert (seen(2), scheduler.encoded.find(name, None)) == (uses, None)
    assert seen(1) == 4
    # What its tenant deletes is forgotten.
    scheduler.obey(commands.Delete(name))
    assert seen(1) == 1


def test_a_prompt_is_foretold_with_its_row() -> None:
    scheduler = Scheduler()
    row = list(range(50, 70))
    (name,) = scheduler.hold(10)
    absent = document_id(None, ids(7, 10))
    assert scheduler.obey(commands.Foretell([name, absent]), row=row) == {
        "held": [True, False], "cached": 0,
    }  # fmt: skip
    driver = scheduler.driver
    req = driver.request(row)
    req.extra_key = scheduler.encoded.key_of(None, [name])
    assert driver.start(req)
    driver.finish(req)
    told = scheduler.obey(commands.Foretell([name]), row=row)
    assert told == {"held": [True], "cached": len(row) - 1}
    # Nothing of it behind other documents, or none.
    for names in ([], [name, name], [absent]):
        assert scheduler.obey(commands.Foretell(names), row=row)["cached"] == 0
    driver.check()


def test_without_an_encoder_nothing_is_there() -> None:
    driver = Driver(1, 256, PicConfig(min_segment=1))
    assert isinstance(driver.forest.encoded, Encoded) is False
    name = document_id(None, ids(1, 10))
    assert documents.held(driver.forest, [name], None) == [False]
    assert documents.list_all(driver.forest, None) == []
    assert documents.flush(driver.forest, None) == 0
    with pytest.raises(PicRefused, match="no encoder"):
        documents.foretell(driver.forest, driver.request([1, 2]), [name])


ACTIONS = ["encode", "name", "see", "end", "pin", "unpin", "delete", "flush", "adopt", "wait"]
actions = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(1, 6), st.sampled_from(["a", "b"])),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(actions=actions, room=st.integers(10, 60))
def test_whatever_a_tenant_does_the_sums_hold(
    driver: Driver, actions: list[tuple[str, int, str]], room: int
) -> None:
    """What is pinned or seen stays, what is another tenant's is not touched."""
    scheduler = Scheduler(room, driver=driver)
    encoded = scheduler.encoded
    running: list[tuple[Any, str, str]] = []
    pinned: set[tuple[str, str]] = set()
    for action, seed, tenant in actions:
        made = ids(seed, 3 * seed)
        name = document_id(tenant, made)
        others = {one.name for one in encoded.of_tenant("b" if tenant == "a" else "a")}
        is_held = encoded.find(name, tenant) is not None
        is_seen = any(one == name for _, one, _ in running)
        if action in ("encode", "name"):
            prompt = wanted(made, tenant=tenant)._replace(named=action == "name")
            encoded.encode([prompt])
        elif action == "see" and is_held:
            running.append((scheduler.see(name, tenant), name, tenant))
        elif action == "end" and running:
            encoded.end(running.pop(seed % len(running))[0])
        elif action == "pin":
            told = scheduler.obey(commands.Pin(name), tenant)
            assert is_held or told["refused"]["status"] == 404
            if told.get("pinned"):
                pinned.add((name, tenant))
        elif action == "unpin" and scheduler.obey(commands.Unpin(name), tenant).get("id"):
            pinned.discard((name, tenant))
        elif action == "delete":
            told = scheduler.obey(commands.Delete(name), tenant)
            may_go = is_held and not is_seen and (name, tenant) not in pinned
            # Or a prompt that is on its way waits for it.
            assert told.keys() == {"refused"} or may_go
            assert (encoded.find(name, tenant) is None) == ("id" in told or not is_held)
        elif action == "flush":
            scheduler.obey(commands.Flush(), tenant)
        elif action == "adopt" and not is_held:
            (kv,) = scheduler.beside.encode([made])
            where = (tenant, made, kv)
            kept = encoded.adopt(*where, uses=seed, named=False, evict=bool(seed % 2))
            assert kept == (encoded.find(name, tenant) is not None)
        else:
            clock.now += LEASE_S + 1
            encoded.encode([])
        if action in ("delete", "flush", "pin", "unpin", "see", "end"):
            assert others == {one.name for one in encoded.of_tenant("b" if tenant == "a" else "a")}
        for one, whose in [*pinned, *((one, whose) for _, one, whose in running)]:
            assert encoded.find(one, whose) is not None
        encoded.check()
        assert scheduler.store.nbytes <= scheduler.store.budget
        assert len(scheduler.forest.pins) == len(pinned)
    for req, _, _ in running:
        encoded.end(req)
    for one, whose in pinned:
        scheduler.obey(commands.Unpin(one), whose)
    clock.now += LEASE_S + 1
    encoded.encode([])
    assert encoded.to_json()["in_use"] == 0
    for tenant in ("a", "b"):
        scheduler.obey(commands.Flush(), tenant)
    assert scheduler.store.nbytes == scheduler.store.pinned_bytes == 0
