"""With SGLang's host tier (HiCache) ordinary prefixes go to the host and come back, while
segments stay on the device."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import CHECKS, TINY, serve
from driver import Driver
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from linking import assemble, body, check_exact, check_linked, fresh_salt, ids_of
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from test_forest import Machine as Forest
from test_forest import _config, _tokens

from sglang_pic.eval.serving import Server
from sglang_pic.forest.keys import is_reserved
from sglang_pic.manage import segments

POLICIES = ["write_through", "write_back", "write_through_selective"]


def _watched(driver: Driver) -> Driver:
    """Fails where what goes to the host, or comes from there, has pages of segments."""
    controller = driver.cache.cache_controller
    written, loaded = controller.write, controller.load

    def check(slots: Any) -> None:
        ours = set(driver.forest.pages.all_slots().tolist())
        assert ours.isdisjoint(slots.tolist())

    def write(device_indices: Any, *args: Any, **kwargs: Any) -> Any:
        check(device_indices)
        return written(device_indices, *args, **kwargs)

    def load(*args: Any, **kwargs: Any) -> Any:
        slots = loaded(*args, **kwargs)
        if slots is not None:
            check(slots)
        return slots

    controller.write, controller.load = write, load
    return driver


class Machine(Forest):
    """As without a tier; copies to and from the host end some time after they began."""

    @initialize(
        page=st.sampled_from([1, 4]),
        context=st.sampled_from([0, 4]),
        policy=st.sampled_from(POLICIES),
    )
    def begin(self, page: int, context: int, policy: str) -> None:
        config = _config(compile_context=tuple(range(2000, 2000 + context)))
        self.driver = _watched(Driver(page, 256, config, tier=policy))
        self.known, self.pinned, self.links, self.turns = {}, set(), {}, []

    @rule()
    def events(self) -> None:
        self.driver.events()

    @rule(n=st.integers(1, 512))
    def host_shortage(self, n: int) -> None:
        self.driver.cache.evict_host(n)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestHostTier = Machine.TestCase


def _asked(driver: Driver, ids: list[int], salt: str | None = None) -> int:
    """One ordinary request from start to end; the length of its prefix."""
    req = driver.request(ids, salt)
    assert driver.start(req)
    held = req.prefix_len
    driver.check()
    driver.finish(req)
    driver.events()
    driver.check()
    return held


def _in_turn(driver: Driver, prompts: list[list[int]]) -> list[int]:
    return [_asked(driver, ids) for ids in prompts]


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("policy", POLICIES[:2])
def test_prefixes_come_back_beside_segments_that_stay(page: int, policy: str) -> None:
    driver = _watched(Driver(page, 512, _config(), tier=policy))
    documents = [_tokens(i, 60) for i in range(3)]
    for document in documents:
        assert driver.compile(document)
    prompts = [_tokens(10 + i, 100) for i in range(5)]
    assert _in_turn(driver, prompts) == [0] * 5
    # More than the device has room for, and every one is found.
    whole = 99 // page * page
    assert _in_turn(driver, prompts * 2) == [whole] * 10
    assert driver.loaded > 4 * whole
    assert driver.forest.nodes.evicted["segment"] == 0
    ids = [*documents[2], *documents[0], *documents[1], *_tokens(50, 5)]
    req = driver.link(ids, [(0, 60), (60, 120), (120, 180)])
    assert driver.start(req)
    assert req.prefix_len > 100
    driver.check()
    driver.finish(req)


def test_segments_go_where_no_prefix_is_left_to_go() -> None:
    driver = _watched(Driver(1, 512, _config(), tier="write_through"))
    for i in range(4):
        assert driver.compile(_tokens(i, 60))
    running = driver.request(_tokens(20, 200))
    assert driver.start(running)
    # 240 tokens of segments, 200 in use: no prefix could go.
    assert _asked(driver, _tokens(21, 250)) == 0
    assert driver.forest.nodes.evicted["segment"] > 0
    driver.finish(running)
    driver.check()


def test_what_is_compiled_sends_prefixes_to_the_host() -> None:
    driver = _watched(Driver(1, 512, _config(), tier="write_through"))
    prompts = [_tokens(10 + i, 100) for i in range(4)]
    assert _in_turn(driver, prompts) == [0] * 4
    for i in range(3):
        assert driver.compile(_tokens(i, 80))
        driver.check()
    driver.events()
    assert driver.forest.nodes.evicted["segment"] == 0
    assert _in_turn(driver, prompts) == [99] * 4
    assert driver.loaded > 0


def test_segments_hold_no_more_than_half() -> None:
    driver = Driver(1, 512, _config(), tier="write_through")
    for i in range(10):
        assert driver.compile(_tokens(i, 60))
        driver.check()
    assert 128 < driver.forest.pages.tokens <= 256


def test_a_waiting_request_is_not_promised_what_has_left_the_host() -> None:
    """Its plan is kept, and names a node of SGLang's."""
    driver = Driver(1, 512, _config(), tier="write_through")
    ids = _tokens(1, 100)
    _asked(driver, ids)
    driver.cache.evict(EvictParams(num_tokens=512))
    req = driver.link([*ids, *_tokens(2, 5)], [(10, 60)], link=False)
    req.init_next_round_input(driver.cache)
    assert req.host_hit_length == 100
    driver.cache.evict_host(512)
    assert driver.start(req)
    assert req.prefix_len == 0
    driver.check()


def test_what_is_on_its_way_is_not_copied() -> None:
    """The load of a prefix starts with the batch, after its requests were chosen."""
    driver = Driver(1, 512, _config(), tier="write_through")
    opening, document, other = _tokens(1, 50), _tokens(2, 60), _tokens(5, 60)
    _asked(driver, opening)
    assert driver.compile(document) and driver.compile(other)
    driver.cache.evict_as_sglang(EvictParams(num_tokens=512))
    loading = driver.request([*opening, *_tokens(3, 5)])
    loading.init_next_round_input(driver.cache)
    driver._load_back(loading)
    loading.lock = driver.cache.lock(loading.last_node)
    assert loading.prefix_len == 50
    ids = [*opening, *document, *_tokens(4, 5)]
    req = driver.link(ids, [(50, 110)], mode="relocate")
    assert driver.start(req)
    report = req.customized_info["pic"][0]
    assert (report["reason"], req.prefix_len) == ("prefix_on_its_way", 0)
    driver.check()
    driver.finish(req)
    driver.events()
    driver.cache.unlock(loading.lock)
    req = driver.link([*opening, *other, *_tokens(4, 5)], [(50, 110)], mode="relocate")
    assert driver.start(req)
    report = req.customized_info["pic"][0]
    # The sixteen behind the boundary are computed.
    assert (report["reason"], req.prefix_len) == (None, 50 + 60 - 16)
    driver.check()
    driver.finish(req)
    driver.check()


def test_a_tenants_prefixes_leave_the_host_too() -> None:
    driver = Driver(1, 512, _config(), tier="write_through")
    ids = _tokens(1, 100)
    assert [_asked(driver, ids, "a"), _asked(driver, ids, "a")] == [0, 99]
    segments.flush(driver.forest, "a")
    driver.check()
    assert driver.cache.host_pool_group.available_size() >= 1024
    assert _asked(driver, ids, "a") == 0


def test_no_segment_is_in_the_tree_that_has_a_tier() -> None:
    driver = Driver(1, 512, _config(), tier="write_through")
    document = _tokens(1, 60)
    assert driver.compile(document)
    _asked(driver, document)
    assert {is_reserved(node.salt) for node in driver.forest.nodes._nodes.values()} == {True, False}
    assert driver.forest.pages.tree.cache_controller is None
    assert driver.cache.host_pool_group.available_size() < 1024


# -- on a server ----------------------------------------------------------------------

PROMPT, POOL, SEAM, PAGE = 150, 1024, 4, 4
MODES: tuple[dict[str, str], ...] = ({}, {"mode": "relocate"})


@pytest.fixture(scope="module")
def tiered(tiny_path: pathlib.Path, logs: pathlib.Path) -> Iterator[Server]:
    flags = (
        *(f"--max-total-tokens={POOL}", f"--page-size={PAGE}", "--chunked-prefill-size=128"),
        *("--enable-hierarchical-cache", "--hicache-ratio=4"),
    )
    with serve(tiny_path, logs / "tiered.log", *TINY, *flags, env=CHECKS) as server:
        yield server


@pytest.mark.server
def test_prefixes_and_links_on_a_server_with_a_tier(tiered: Server) -> None:
    assert tiered.forest()["refusal"] is None
    salt = fresh_salt()
    prompts = [ids_of(600 + i, PROMPT) for i in range(10)]
    documents = [ids_of(700 + i, 60) for i in range(4)]

    def ordinary(i: int) -> dict[str, Any]:
        request = body(prompts[i % 10], [], 3, salt)
        del request["pic"]
        return tiered.generate(**request)

    def linked(i: int) -> Any:
        order = [documents[(i + j * (1 + i % 2)) % 4] for j in range(2)]
        parts = [("segment", document) for document in order]
        ids, spans = assemble([("text", ids_of(1, 6)), *parts, ("text", ids_of(800 + i, 7))])
        answer = tiered.generate(**body(ids, spans, 3, salt, seam=SEAM, **MODES[i % 2]))
        return answer, ids, spans

    # Alone, so that every round evicts what the one before it computed.
    for i in range(10):
        check_exact(ordinary(i), prompts[i], 3)
    for i in range(10):
        answer = ordinary(i)
        check_exact(answer, prompts[i], 3)
        assert answer["meta_info"]["cached_tokens"] == (PROMPT - 1) // PAGE * PAGE
    # Together: whoever comes, something else must go, or come back.
    with ThreadPoolExecutor(6) as pool:
        asked = pool.map(ordinary, range(40))
        made = pool.map(linked, range(24))
        for i, answer in enumerate(asked):
            check_exact(answer, prompts[i % 10], 3)
        for answer, ids, spans in made:
            check_linked(answer, ids, spans, seam=SEAM, page=PAGE, n_new=3)
    state = tiered.forest()
    assert state["segment_tokens"] > 0 and state["prefix_tokens"] > 0
    log = tiered.log.read_text()
    assert "Traceback" not in log and "leak" not in log
