"""Segments computed in company: what is kept of them, for whom, and until when."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from driver import Copies, Driver
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.companies import MAX_OF_SEGMENT, Companies, Company, Variant
from sglang_pic.forest.eviction import LINKABLE
from sglang_pic.forest.keys import namespace, order_key, segment_id
from sglang_pic.manage import segments
from sglang_pic.request.base import OPENING as OPENING_TEXT
from sglang_pic.request.base import TokenSpan
from sglang_pic.request.internal import CompileRequest, compile_hints

OPENING = [900, 901, 902]
A, B, C, D = (list(range(at, at + 24)) for at in (100, 200, 300, 400))


def driver_of(page: int = 4, size: int = 512, **config: Any) -> Driver:
    return Driver(page, size, PicConfig(**{"min_segment": 1, "seam": 4, **config}))


def ask(
    driver: Driver, *parts: list[int], opening: list[int] = OPENING, salt: str | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """Link these parts, read the report, and let the request go."""
    ids, spans = list(opening), []
    for part in parts:
        spans.append((len(ids), len(ids) + len(part)))
        ids += part
    req = driver.link([*ids, 950], spans, salt, **options)
    assert driver.start(req)
    driver.check()
    driver.finish(req)
    return req.customized_info["pic"][0]


def sizes(report: Any) -> list[int]:
    return [one["company"] for one in report["segments"]]


def missing(driver: Driver, *parts: list[int], opening: list[int] = OPENING) -> list[int]:
    ids, spans = list(opening), []
    for part in parts:
        spans.append((len(ids), len(ids) + len(part)))
        ids += part
    found = driver.forest.arrivals.missing(driver.link([*ids, 950], spans))
    return [i for i in found if i != OPENING_TEXT]


def evict_all_but(driver: Driver, part: list[int]) -> None:
    name = segment_id(namespace((), None), None, part)
    variants = driver.forest.companies.variants()
    nodes = [one.node for one in variants if one.segment == name]
    locked = driver.forest.pages.lock(nodes)
    driver.cache.evict(EvictParams(num_tokens=10_000))
    driver.forest.pages.unlock(locked)
    for node in nodes:
        driver.forest.nodes.unlocked(LINKABLE, node)
    driver.check()
    assert [one.segment for one in driver.forest.companies.variants()] == [name]


@pytest.mark.parametrize("page", [1, 4])
def test_a_company_serves_its_segments_in_any_order(page: int) -> None:
    driver = driver_of(page)
    assert driver.company([A, B, C], OPENING)
    driver.check()
    assert missing(driver, C, A, B) == []
    report = ask(driver, C, A, B)
    assert sizes(report) == [3, 3, 3]
    assert report["exactness"] == "composed"
    # Of whole pages nothing is computed.
    assert [one["tokens_reused"] for one in report["segments"]] == [24] * 3


def test_a_seam_in_company_is_as_wide_as_asked() -> None:
    driver = driver_of()
    driver.company([A, B], OPENING)
    report = ask(driver, B, A, company_seam=8)
    assert [one["tokens_reused"] for one in report["segments"]] == [16, 16]


def test_what_a_prompt_does_not_contain_has_no_part_in_it() -> None:
    driver = driver_of()
    driver.company([A, B, C], OPENING)
    for part in (A, B):
        driver.compile(part)
    # ``Driver`` looks at every slot that is reused.
    assert sizes(ask(driver, A, B)) == [0, 0]
    assert sizes(ask(driver, A, B, C, opening=[903])) == [0, 0, 0]
    assert sizes(ask(driver, A, B, C, company="off")) == [0, 0, 0]
    assert sizes(ask(driver, A, B, C, salt="other")) == [0, 0, 0]
    assert sizes(ask(driver, A, B, C, turns=False)) == [3, 3, 3]


def test_a_tenant_may_be_one_trust_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_of(company="tenant")
    driver.company([A, B, C], OPENING)
    monkeypatch.setattr(driver, "_check_touched", lambda req, row: None)
    assert sizes(ask(driver, A, B, company="tenant")) == [3, 3]
    assert sizes(ask(driver, A, B, company="subset")) == [0, 0]
    assert sizes(ask(driver, A, B, company="tenant", salt="other")) == [0, 0]


def test_the_largest_company_goes_first_and_the_rest_alone() -> None:
    driver = driver_of()
    driver.company([A, B], OPENING)
    driver.company([B, C, D], OPENING)
    assert missing(driver, D, A, C, B) == []
    assert sizes(ask(driver, D, A, C, B)) == [3, 2, 3, 3]
    E = list(range(500, 524))
    assert missing(driver, A, B, E) == [2]
    driver.compile(E)
    assert sizes(ask(driver, A, B, E)) == [2, 2, 0]


def test_one_order_alone_serves_nobody() -> None:
    driver = driver_of()
    seen: list[list[int]] = []
    driver.company([A, B], OPENING, between=lambda: seen.append(missing(driver, A, B)))
    assert seen == [[0, 1]] and missing(driver, A, B) == []
    # The first order's pages are gone.
    assert driver.forest.pages.tokens == 48 == driver.forest.companies.tokens


def test_without_its_first_order_a_company_is_refused() -> None:
    driver = driver_of()
    driver.company([A, B], OPENING, between=lambda: driver.cache.evict(EvictParams(num_tokens=500)))
    driver.check()
    assert driver.forest.companies.count == 0 and driver.forest.assembly.refused == 1


def test_a_full_cache_makes_room_for_both_orders() -> None:
    """What was used often goes before the first order of a company that is on its way."""
    driver = driver_of(size=256)
    for i in range(9):
        part = list(range(500 + 24 * i, 524 + 24 * i))
        driver.compile(part, named=True)
        for _ in range(4):
            ask(driver, part, turns=False)
    assert driver.company([A, B], OPENING)
    driver.check()
    assert sizes(ask(driver, B, A)) == [2, 2]


def test_no_more_halves_are_held_than_said() -> None:
    driver = driver_of()
    for i in range(7):
        parts = [list(range(at, at + 12)) for at in (1000 + 50 * i, 1020 + 50 * i)]
        parts.sort(key=order_key)
        ids = [*OPENING, *parts[0], *parts[1]]
        hints = compile_hints((), company=[TokenSpan(3, 15), TokenSpan(15, 27)])
        req = driver.request(ids, namespace((), None), hints)
        assert driver.start(req)
        driver.finish(req)
        driver.check()
    assert driver.forest.pages.tokens == 4 * 24


def test_an_evicted_member_leaves_the_others_whole() -> None:
    driver = driver_of()
    driver.company([A, B], OPENING)
    evict_all_but(driver, B)
    assert missing(driver, A, B) == [0]
    driver.compile(A)
    assert sizes(ask(driver, A, B)) == [0, 2]


def test_a_company_is_made_again_in_the_place_of_what_is_left() -> None:
    driver = driver_of()
    driver.company([A, B], OPENING)
    evict_all_but(driver, B)
    driver.company([B, A], OPENING)
    driver.check()
    assert driver.forest.companies.count == 1 and driver.forest.pages.tokens == 48
    assert sizes(ask(driver, A, B)) == [2, 2]


def test_what_has_seen_a_deleted_segment_goes_with_it() -> None:
    driver = driver_of()
    driver.compile(A, named=True)
    driver.company([A, B], OPENING)
    driver.company([B, C], OPENING)
    segments.delete(driver.forest, segment_id(namespace((), None), None, A), None)
    driver.check()
    assert sizes(ask(driver, B, C)) == [2, 2]
    assert missing(driver, A, B) == [0, 1]


def test_a_flush_takes_a_tenants_companies_alone() -> None:
    driver = driver_of()
    driver.company([A, B], OPENING)
    driver.company([A, B], OPENING, "other")
    segments.flush(driver.forest, None)
    driver.check()
    assert missing(driver, A, B) == [0, 1]
    assert sizes(ask(driver, A, B, salt="other")) == [2, 2]
    driver.cache.reset()
    assert driver.forest.companies.count == 0


def test_a_plan_is_made_anew_when_a_company_has_come() -> None:
    driver = driver_of()
    for part in (A, B):
        driver.compile(part)
    ids = [*OPENING, *A, *B, 950]
    req = driver.link(ids, [(3, 27), (27, 51)])
    req.init_next_round_input(driver.cache)
    assert sizes(req.customized_info["pic"][0]) == [0, 0]
    driver.company([A, B], OPENING)
    assert driver.start(req)
    assert sizes(req.customized_info["pic"][0]) == [2, 2]


def test_a_conversation_goes_on_from_what_it_has_computed() -> None:
    driver = driver_of()
    for part in (A, B):
        driver.compile(part)
    first = driver.link([*OPENING, *A, *B, *range(950, 962)], [(3, 27), (27, 51)])
    assert driver.start(first)
    driver.finish(first)
    driver.company([A, B], OPENING)
    second = driver.link([*OPENING, *A, *B, *range(950, 970)], [(3, 27), (27, 51)])
    assert driver.start(second)
    report = second.customized_info["pic"][0]
    assert report["turn_tokens"] > 0 and sizes(report) == [0, 0]
    assert sizes(ask(driver, B, A)) == [2, 2]


def test_segments_that_begin_alike_keep_pages_of_their_own() -> None:
    driver = driver_of()
    longer = [*A, *range(600, 616)]
    driver.company([A, longer, B], OPENING)
    driver.check()
    assert driver.forest.pages.tokens == 24 + 40 + 24
    assert sizes(ask(driver, B, longer, A)) == [3, 3, 3]


def test_an_order_of_no_meaning_is_contained() -> None:
    driver = driver_of()
    parts = sorted([A, B, C], key=order_key)
    ids = [*parts[1], *parts[0], *parts[2]]
    spans = [TokenSpan(at, at + 24) for at in (0, 24, 48)]
    req = driver.request(ids, namespace((), None), compile_hints((), company=spans))
    assert driver.start(req)
    driver.finish(req)
    driver.check()
    assert driver.forest.companies.count == 0
    with pytest.raises(PicIntegrityError):
        driver.forest.assembly.keep(req, CompileRequest((), False, tuple(spans)))


@pytest.mark.parametrize("step", ["copy", "average"])
def test_a_failed_copy_leaks_nothing(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    driver = driver_of()

    def fail(*args: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Copies, step, fail)
    driver.company([A, B], OPENING)
    driver.check()
    assert driver.forest.companies.count == 0


def test_what_loses_what_it_carries_goes() -> None:
    """As evicted states do: the others of its company stay."""
    driver = driver_of()
    driver.company([A, B], OPENING)
    variant = next(driver.forest.companies.variants())
    driver.forest.kept._on_evict(variant.name)
    driver.check()
    left = [one.segment for one in driver.forest.companies.variants()]
    assert len(left) == 1 and variant.segment not in left
    assert driver.forest.pages.tokens == 24


def test_a_first_order_that_loses_what_it_carries_is_none() -> None:
    driver = driver_of()

    def lose() -> None:
        (half,) = driver.forest.assembly._halves.values()
        driver.forest.kept._on_evict(half.names[1])

    driver.company([A, B], OPENING, between=lose)
    driver.check()
    assert driver.forest.companies.count == 0 == driver.forest.pages.tokens


@pytest.mark.parametrize("guests", [[], [C]], ids=["both orders", "guests"])
@pytest.mark.parametrize("fails", [False, True], ids=["no room", "fault"])
@pytest.mark.parametrize("at", [0, 1])
def test_pages_are_of_no_use_without_what_is_carried(
    monkeypatch: pytest.MonkeyPatch, guests: list[list[int]], fails: bool, at: int
) -> None:
    driver, asked = driver_of(), []

    def keep(*args: Any, **kwargs: Any) -> bool:
        asked.append(kwargs.get("others", ()))
        if len(asked) <= at:
            return True
        if fails:
            raise RuntimeError("no")
        return False

    monkeypatch.setattr(driver.forest.carried, "keep_members", keep, raising=False)
    driver.company([A] if guests else [A, B], OPENING, guests=guests)
    driver.check()
    if len(asked) > at:
        assert driver.forest.companies.count == 0
    assert [len(names) for names in asked] == ([0] if guests else [0, 2][: len(asked)])


def test_what_is_kept_is_the_mean_of_both_orders() -> None:
    driver = driver_of()
    driver.company([A, B], OPENING)
    variant = next(driver.forest.companies.variants())
    slots = driver.forest.pages.slots(variant.node, variant.tokens)
    keys = driver.pool.k_buffer[0][slots, 0]
    # Positions of its own; what the two orders left in the values is told apart by all
    # that each had seen.
    assert torch.equal(keys[:, 1], torch.arange(24.0))
    touched = {driver.touched[slot] for slot in slots.tolist()}
    assert all(mask & (1 << A[0]) and mask & (1 << B[0]) for mask in touched)


# -- the index ------------------------------------------------------------------------


def test_a_segment_among_guests_has_its_ordinary_seam() -> None:
    driver = driver_of()
    assert driver.company([A], OPENING, guests=[C, D])
    driver.check()
    driver.compile(B)
    report = ask(driver, B, A, seam=4)
    assert [(one["company"], one["guests"]) for one in report["segments"]] == [(0, 0), (3, 2)]
    assert [one["tokens_reused"] for one in report["segments"]] == [20, 20]
    assert report["exactness"] == "composed"
    (listed,) = driver.forest.companies.to_json()
    assert listed["guests"] == 2 and len(listed["segments"]) == 1
    assert driver.forest.companies.is_whole(listed["id"])
    # Of the guests nothing is kept.
    assert missing(driver, C, D) == [0, 1]


def test_other_ranks_are_told_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, told = driver_of(), []
    consensus = driver.forest.consensus
    monkeypatch.setattr(consensus, "note", lambda event, name: told.append(event))
    driver.company([A, B], OPENING)
    driver.company([C], OPENING, guests=[A, D])
    assert told == ["kept"] * 3
    driver.company([C, D], OPENING, between=lambda: driver.forest.assembly.clear())
    assert told[3:] == ["kept", "refused"]


def test_company_goes_before_guests() -> None:
    driver = driver_of()
    driver.company([A], OPENING, guests=[C, D])
    driver.company([A, B], OPENING)
    assert [one["guests"] for one in ask(driver, A, B)["segments"]] == [0, 0]
    assert sizes(ask(driver, A)) == [3]


def test_a_tenants_own_guests_serve_where_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_of(company="tenant")
    driver.company([A], OPENING, guests=[C, D], shipped=False)
    driver.compile(A)
    assert sizes(ask(driver, A, company="subset")) == [0]
    driver.compile(C)
    driver.compile(D)
    assert sizes(ask(driver, A, C, D, company="subset", turns=False)) == [3, 0, 0]
    monkeypatch.setattr(driver, "_check_touched", lambda req, row: None)
    assert sizes(ask(driver, A, company="tenant", turns=False)) == [3]
    # It goes with a guest that is deleted.
    name = segment_id(namespace((), None), None, C)
    segments.delete(driver.forest, name, None)
    driver.check()
    assert driver.forest.companies.count == 0


def variant_of(company: str, segment: str) -> Variant:
    return Variant(f"{company}/{segment}", segment, company, 2, 0, "", 16, 0)


def test_a_segment_is_in_no_more_companies_than_said() -> None:
    companies = Companies()
    surplus = []
    for i in range(MAX_OF_SEGMENT + 3):
        members = frozenset(["s", f"other {i}"])
        company = Company(f"c{i}", ("t", ""), array("q"), members, members)
        made = companies.add(company, [variant_of(company.id, name) for name in members])
        surplus += [one.name for one in made]
        for one in made:
            companies.gone(one.name)
        if i == 2:
            companies.use("c0/s")
        companies.check()
    # The least recently used go.
    assert surplus == ["c1/s", "c2/s", "c0/s"]


def test_nothing_is_looked_up_for_a_full_recompute() -> None:
    driver = driver_of()
    driver.company([A, B], OPENING)
    report = ask(driver, A, B, policy="full")
    assert [one["reason"] for one in report["segments"]] == ["policy_full"] * 2
    assert report["tokens_reused"] == 0
