"""Linked generation of hybrid models on real servers, against the oracle."""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import start_log
import torch
from conftest import CHECKS, TINY, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linking import TOLERANCE, assemble, body, distributions, fresh_salt, ids_of
from tiny_models import tiny_hybrid, tiny_hybrid_model
from traffic import check_no_leak

from sglang_pic.eval.oracle import dense, hybrid
from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

KINDS = {1: "qwen3_5", 16: "qwen3_next"}
SEEDS = {1: 3, 16: 0}


@functools.cache
def model(page: int) -> Any:
    """The model of a server, in transformers."""
    return tiny_hybrid_model(KINDS[page], SEEDS[page])


@pytest.fixture(scope="module")
def hybrid1(tmp_path_factory: pytest.TempPathFactory, logs: pathlib.Path) -> Iterator[Server]:
    """Qwen3.5, page size 1, SGLang's states at the end of sequences, the state
    policy of requests that name none chosen by calibration."""
    path = tiny_hybrid(tmp_path_factory.mktemp("hybrid"), "qwen3_5", SEEDS[1])
    plain = ("--page-size=1", "--mamba-radix-cache-strategy=no_buffer", "--pic-state=auto")
    args = (*TINY, *plain, "--disable-overlap-schedule")
    with serve(path, logs / "hybrid1.log", *args, env=CHECKS) as server:
        yield server


@pytest.fixture(scope="module")
def hybrid16(tmp_path_factory: pytest.TempPathFactory, logs: pathlib.Path) -> Iterator[Server]:
    """Qwen3-Next, page size 16, short chunks, mixed chunks, overlap scheduling,
    SGLang's states on its grid of 64 tokens, requests retracted by force."""
    path = tiny_hybrid(tmp_path_factory.mktemp("hybrid"), "qwen3_next")
    hard = ("--page-size=16", "--chunked-prefill-size=64", "--enable-mixed-chunk")
    env = {**CHECKS, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    with serve(path, logs / "hybrid16.log", *TINY, *hard, env=env) as server:
        yield server


@pytest.fixture(params=[1, 16])
def paged(request: pytest.FixtureRequest) -> tuple[Server, int]:
    """Each server with its page size."""
    return request.getfixturevalue(f"hybrid{request.param}"), request.param


def test_a_healthy_start_says_nothing_alarming(paged: tuple[Server, int]) -> None:
    assert start_log.unexpected(paged[0].log) == []


def check_linked(
    answer: dict[str, Any],
    ids: list[int],
    segments: Sequence[tuple[int, int]],
    *,
    seam: int,
    page: int,
    policy: str = "seam",
    state: str = "compose",
) -> None:
    """The answer is the oracle's, and exactly the tokens of the formula were reused."""
    planned = dense.layout(
        len(ids), segments, seam=seam, page=page, policy=policy, whole=True, prompt_ids=ids
    )
    report = answer["meta_info"]["pic"]
    reused = report["tokens_reused"] - report["prefix_tokens"] - report["turn_tokens"]
    assert reused == planned.n_reused, report
    chosen = answer["output_ids"]
    expected = hybrid.linked_logprobs(
        model(page),
        ids,
        segments,
        seam=seam,
        page=page,
        policy=policy,
        state=state,
        forced=chosen,
    )
    worst = (distributions(answer) - expected).abs().max().item()
    assert worst < TOLERANCE, f"log-probabilities differ by {worst}"
    regret = expected.max(-1).values - expected[range(len(chosen)), chosen]
    assert regret.max() < TOLERANCE


def check_exact(answer: dict[str, Any], ids: list[int], page: int) -> None:
    """The answer is the plain model's."""
    expected = dense.full_logprobs(
        model(page),
        ids,
        len(answer["output_ids"]),
        forced=answer["output_ids"],
    )
    assert (distributions(answer) - expected.full_logprobs).abs().max() < TOLERANCE


lengths = st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 90]))
part = st.tuples(st.sampled_from(["segment", "segment", "text"]), st.integers(0, 3), lengths)
layouts = st.lists(part, min_size=1, max_size=6)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    parts=layouts,
    seam=st.sampled_from([0, 1, 3, 4, 16]),
    policy=st.sampled_from(["seam", "seam", "seam", "none", "full"]),
    state=st.sampled_from(["compose", "compose", "last"]),
)
def test_any_layout_matches_the_oracle(
    paged: tuple[Server, int],
    parts: list[tuple[str, int, int]],
    seam: int,
    policy: str,
    state: str,
) -> None:
    server, page = paged
    ids, segments = assemble([(kind, ids_of(seed, n)) for kind, seed, n in parts])
    salt = fresh_salt()
    pic = {"seam": seam, "policy": policy, "state": state}
    cold = server.generate(**body(ids, segments, 3, salt, **pic))
    warm = server.generate(**body(ids, segments, 3, salt, **pic))
    planned = dense.layout(
        len(ids), segments, seam=seam, page=page, policy=policy, whole=True, prompt_ids=ids
    )
    for answer in (cold, warm):
        if planned.n_reused:
            check_linked(answer, ids, segments, page=page, **pic)
        else:
            assert answer["meta_info"]["pic"]["exactness"] == "exact"
            check_exact(answer, ids, page)


@pytest.mark.parametrize("behind", [1, 90])
def test_an_answer_behind_segments_is_scored(paged: tuple[Server, int], behind: int) -> None:
    """Log-probabilities of prompt tokens behind the last segment, in short chunks too: the
    oracle's along that continuation."""
    server, page = paged
    parts = [("segment", ids_of(11, 90)), ("text", [7]), ("segment", ids_of(12, 97))]
    ids, segments = assemble([*parts, ("text", ids_of(13, behind))])
    answer = ids_of(14, 33)
    asked = body(ids + answer, segments, 2, fresh_salt(), seam=4, state="compose")
    scored = server.generate(**{**asked, "logprob_start_len": len(ids) - 1})["meta_info"]
    assert scored["pic"]["exactness"] == "composed"
    # The first stands for the token before ``logprob_start_len``.
    rows = scored["input_token_ids_logprobs"][1:]
    told = torch.tensor([[value for value, *_ in row] for row in rows])
    where = {"seam": 4, "page": page, "policy": "seam", "state": "compose"}
    expected = hybrid.linked_logprobs(model(page), ids, segments, forced=answer, **where)
    assert told.shape == expected.shape
    assert (told - expected).abs().max() < TOLERANCE


def test_concurrent_requests_of_every_kind(paged: tuple[Server, int]) -> None:
    """Linked, compiling, relocated, unlinked and ordinary rows share batches."""
    server, page = paged
    documents = [ids_of(20 + i, 40 + 19 * i) for i in range(4)]
    salt = fresh_salt()
    jobs = []
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        parts = [("segment", documents[i]) for i in order]
        ids, segments = assemble([*parts, ("text", ids_of(sum(order) + order[0], 7))])
        compose = {"state": "compose"}
        for pic in (compose, {**compose, "mode": "relocate"}, {"state": "last"}):
            jobs.append((ids, segments, pic, salt))
        jobs.append((ids, segments, {"link": False}, f"{salt}-unlinked"))
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda job: server.generate(**body(job[0], job[1], 12, job[3], seam=5, **job[2])),
                jobs,
            )
        )
    for (ids, segments, pic, _), answer in zip(jobs, answers, strict=True):
        if pic.get("link") is False:
            check_exact(answer, ids, page)
        else:
            check_linked(answer, ids, segments, seam=5, page=page, state=pic["state"])
    if page == 16:
        assert any(answer["meta_info"]["num_retractions"] for answer in answers)


def four_documents(page: int, seed: int) -> tuple[list[int], list[tuple[int, int]]]:
    documents = [("segment", ids_of(seed + i, 64)) for i in range(4)]
    return assemble([("text", ids_of(seed + 8, 6)), *documents, ("text", ids_of(seed + 9, 10))])


@pytest.mark.parametrize(
    "broken",
    [
        {"state": "last"},
        {"ablation": "identity_operator"},
        {"ablation": "no_conv_tail"},
        {"policy": "none"},
        {"ablation": "float16_pairs"},
    ],
    ids=str,
)
def test_every_part_of_a_state_shows(paged: tuple[Server, int], broken: dict[str, str]) -> None:
    """A link that lacks a part differs by far more than the tolerance: the other
    tests would notice. Rounding alone stays near it."""
    server, page = paged
    ids, segments = four_documents(page, 200)
    salt = fresh_salt()
    whole, lacking = (
        server.generate(**body(ids, segments, 1, salt, seam=4, **pic))
        for pic in ({"state": "compose"}, {"state": "compose", **broken})
    )
    apart = (distributions(whole) - distributions(lacking)).abs().max().item()
    if broken.get("ablation") == "float16_pairs":
        assert 0 < apart < 0.01
    else:
        assert apart > 50 * TOLERANCE


def test_calibration_chooses_the_better_policy(hybrid1: Server) -> None:
    """The first linked requests decide; the choice agrees with the oracle's."""
    kl: dict[str, list[float]] = {"compose": [], "last": []}
    salt = fresh_salt()
    for seed in range(300, 304):
        ids, segments = four_documents(1, 10 * seed)
        answer = hybrid1.generate(**body(ids, segments, 1, salt, seam=4))
        full = dense.full_logprobs(model(1), ids, 1)
        p = full.full_logprobs
        for state, found in kl.items():
            where = {"seam": 4, "page": 1, "state": state, "forced": full.tokens}
            q = hybrid.linked_logprobs(model(1), ids, segments, **where)
            found.append((p.exp() * (p - q)).sum().item())
        assert answer["meta_info"]["pic"]["exactness"] == "composed"
    better = min(kl, key=lambda state: sum(kl[state]))
    for _ in range(100):
        calibration = hybrid1.get("/pic/info").json()["state_calibration"]
        if calibration["calibrated"]:
            break
        time.sleep(0.2)
    assert calibration["calibrated"] and calibration["policy"] == better
    assert calibration["kl"][better] < calibration["kl"][next(s for s in kl if s != better)]
    print(calibration, {state: sum(found) / 4 for state, found in kl.items()})


def test_a_company_answers_as_its_oracle(paged: tuple[Server, int]) -> None:
    """Of its linear layers it has what links of the server's own width need: nothing but the
    convolution's three tokens is computed again."""
    server, page = paged
    salt, opening = fresh_salt(), ids_of(30, 21)
    documents = [ids_of(31 + i, 65 + 20 * i) for i in range(3)]
    sent = {"input_ids": documents, "cache_salt": salt, "opening": opening, "company": True}
    made = server.post("/pic/compile", sent)
    assert made.status_code == 200, made.text
    assert [one["guests"] for one in made.json()["companies"]] == [0]
    parts = [("segment", one) for one in documents[::-1]]
    ids, segments = assemble([("text", opening), *parts, ("text", ids_of(39, 9))])
    before = forest_state(server)
    for wide, size in ((0, 3), (3, 3), (20, 0)):
        where = {"state": "compose", "company_seam": wide, "seam": 16}
        answer = server.generate(**body(ids, segments, 4, salt, **where))
        segments_of = answer["meta_info"]["pic"]["segments"]
        assert [one["company"] for one in segments_of] == [size] * 3
        expected = hybrid.linked_logprobs(
            model(page),
            ids,
            segments,
            seam=3 if size else 16,
            page=page,
            companies=[range(3)] if size else [],
            forced=answer["output_ids"],
        )
        worst = (distributions(answer) - expected).abs().max().item()
        assert worst < TOLERANCE, f"log-probabilities differ by {worst}"
    assert before["integrity"] == "ok"
    server.post("/pic/flush", {"cache_salt": salt}).raise_for_status()
    after = forest_state(server)
    assert after["companies"] == [] and after["state_bytes"] < before["state_bytes"]


def forest_state(server: Server) -> dict[str, Any]:
    (forest,) = server.get("/pic/forest").json()
    return forest


def test_state_memory_is_reported_and_bounded(paged: tuple[Server, int]) -> None:
    server, page = paged
    server.post("/flush_cache", {}).raise_for_status()
    ids, segments = four_documents(page, 400)
    server.generate(**body(ids, segments, 1, fresh_salt(), seam=4, state="compose"))
    (forest,) = server.get("/pic/forest").json()
    assert forest["integrity"] == "ok"
    last = forest["segments"][-1]
    # Two layers of four heads: an operator and two states of 16 x 16, float32,
    # three inputs of 128 channels, and which operators are kept.
    assert last["state_bytes"] == 2 * (4 * 3 * 16 * 16 + 3 * 128) * 4 + 2 * 4 * 8
    assert 0 < forest["state_bytes"] <= forest["state_budget"]
    held = server.get("/pic/stats").json()["ranks"][0]["state"]
    assert held["segment"] == sum(s["state_bytes"] for s in forest["segments"])
    assert forest["state_bytes"] == held["segment"] + held["turn"] + held["checkpoint"]


def test_another_seam_width_compiles_its_own_pair(paged: tuple[Server, int]) -> None:
    server, page = paged
    ids, segments = four_documents(page, 500)
    salt = fresh_salt()
    for seam in (4, 20):
        answer = server.generate(**body(ids, segments, 2, salt, seam=seam, state="compose"))
        check_linked(answer, ids, segments, seam=seam, page=page)
    explicit = server.post(
        "/pic/compile", {"input_ids": [ids_of(600, 80)], "cache_salt": salt}
    ).json()
    assert explicit["segments"][0]["tokens_computed"] == 80


def test_what_is_compiled_is_not_computed_again(paged: tuple[Server, int]) -> None:
    """By name or for samples, unless the pair is of another seam width."""
    server, _ = paged
    salt, segment = fresh_salt(), ids_of(46, 96)
    named = {"input_ids": segment, "cache_salt": salt}
    (first,), (again,) = (server.post("/pic/compile", named).json()["segments"] for _ in range(2))
    assert (first["tokens_computed"], again["tokens_computed"]) == (96, 0)
    ids, segments = assemble([("text", [1, 2]), ("segment", segment), ("text", [3])])
    seam = server.get("/pic/info").json()["config"]["seam"]
    for width, compiled in ((seam, False), (seam + 16, True), (seam + 16, False)):
        sent = body(ids, segments, 1, salt, seam=width)
        sent["sampling_params"] = {**sent["sampling_params"], "n": 2, "temperature": 1}
        samples = server.generate(**sent)
        reports = [sample["meta_info"]["pic"] for sample in samples]
        for report in reports:
            assert (0 in [one["segment"] for one in report["waited_for"]]) == compiled
            assert (report["tokens_compiled"] >= 96) == compiled
            assert report["segments"][0]["reason"] == "hit"


def test_requests_of_every_fate_leak_nothing(hybrid16: Server) -> None:
    """Pages and state slots: SGLang checks both whenever it is idle."""
    check_no_leak(hybrid16, 300)


def checkpoints(server: Server) -> dict[str, int]:
    (forest,) = server.get("/pic/forest").json()
    assert forest["integrity"] == "ok"
    return dict(forest["checkpoints"])


def test_ordinary_prompts_go_on_from_checkpoints(paged: tuple[Server, int]) -> None:
    """Questions about documents, at once and unmarked, are answered by the plain model, and
    computed from where a state was kept."""
    server, page = paged
    before = checkpoints(server)
    documents = [ids_of(700 + i, 200 + 130 * i) for i in range(3)]
    prompts = [documents[(7 * i) % 3] + ids_of(720 + i, 3 + (11 * i) % 40) for i in range(18)]
    salt = fresh_salt()

    def ask(ids: list[int]) -> dict[str, Any]:
        asked = body(ids, [], 3, salt)
        del asked["pic"]
        return server.generate(**asked)

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, prompts))
    for ids, answer in zip(prompts, answers, strict=True):
        check_exact(answer, ids, page)
    after = checkpoints(server)
    cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
    if page == 1:
        # SGLang holds the ends of sequences alone: nobody goes on from there.
        assert sum(cached[9:]) >= 0.7 * sum(len(ids) // 64 * 64 for ids in prompts[9:])
        assert after["tokens_resumed"] - before["tokens_resumed"] >= sum(cached[9:])
        assert 3 <= after["placed"] - before["placed"] <= 9
        asked = {"input_ids": documents[2] + [1, 2, 3], "cache_salt": salt, "pic": {}}
        told = server.post("/pic/explain", asked).json()
        assert told["prefix_tokens"] == 460 // 64 * 64


CONTEXT = ids_of(99, 8)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, logs: pathlib.Path) -> Iterator[Server]:
    """Qwen3.5, page size 4, behind a compile context; pages and states run short."""
    path = tiny_hybrid(tmp_path_factory.mktemp("hybrid"), "qwen3_5")
    config = {"compile_context": CONTEXT, "min_segment": 1, "state_mib": 1, "cold": "link"}
    config["company_when"] = "asked"
    args = [arg for arg in TINY if not arg.startswith(("--pic", "--max-total"))]
    args += ["--radix-cache-backend=pic", "--page-size=4", "--max-total-tokens=2048"]
    env = {**CHECKS, "SGLANG_PIC_CONFIG": json.dumps(config)}
    with serve(path, logs / "hybrid4.log", *args, module="sglang.launch_server", env=env) as server:
        yield server


def check_behind_context(
    answer: dict[str, Any], ids: list[int], segments: Sequence[tuple[int, int]], seam: int
) -> None:
    chosen = answer["output_ids"]
    expected = hybrid.linked_logprobs(
        tiny_hybrid_model("qwen3_5"),
        ids,
        segments,
        seam=seam,
        page=4,
        context=CONTEXT,
        forced=chosen,
    )
    assert (distributions(answer) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("seam", [0, 3, 9])
@pytest.mark.parametrize("opening", [[], [5, 6], CONTEXT, ids_of(501, 33)], ids=len)
def test_linking_behind_a_context(small: Server, seam: int, opening: list[int]) -> None:
    ids, segments = assemble(
        [
            ("text", opening),
            ("segment", ids_of(502, 45)),
            ("text", [8]),
            ("segment", ids_of(503, 30)),
            ("text", [9]),
        ]
    )
    for _ in range(2):
        answer = small.generate(**body(ids, segments, 4, fresh_salt(), seam=seam))
        assert answer["meta_info"]["pic"]["tokens_reused"] > 40
        check_behind_context(answer, ids, segments, seam)


def test_segments_give_way_with_their_states_and_come_back(small: Server) -> None:
    """More segments than pages and states can hold: budgets hold, evicted ones are
    compiled anew, answers stay right."""
    salt = fresh_salt()
    prompts = []
    for i in range(40):
        parts = [("segment", ids_of(700 + i, 70)), ("segment", ids_of(700 + (i * 7) % 40, 70))]
        prompts.append(assemble([*parts, ("text", ids_of(i, 5))]))
    for ids, segments in prompts:
        small.generate(**body(ids, segments, 1, salt, seam=4))
        (forest,) = small.get("/pic/forest").json()
        assert forest["integrity"] == "ok"
        assert forest["state_bytes"] <= forest["state_budget"] == 1 << 20
    held = [segment for segment in forest["segments"] if segment["held"] == 68]
    assert 0 < len(held) < 40
    for ids, segments in (prompts[0], prompts[-1]):
        answer = small.generate(**body(ids, segments, 2, salt, seam=4))
        assert [s["hit"] for s in answer["meta_info"]["pic"]["segments"]] == [True, True]
        check_behind_context(answer, ids, segments, 4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("state", ["compose", "last"])
def test_the_next_turn_goes_on_from_the_states_of_the_last(
    hybrid1: Server, seed: int, state: str
) -> None:
    salt = fresh_salt()
    parts = [("text", ids_of(seed, 7 * seed)), ("segment", ids_of(801, 40)), ("text", [5] * seed)]
    ids, segments = assemble([*parts, ("segment", ids_of(802, 50)), ("text", ids_of(803, 11))])
    third = ids_of(804, 45)
    options = {"seam": 4, "state": state, "turns": True}
    found = []
    for turn in range(4):
        answer = hybrid1.generate(**body(ids, segments, 5, salt, **options))
        check_linked(answer, ids, segments, seam=4, page=1, state=state)
        found.append(answer["meta_info"]["pic"]["turn_tokens"])
        ids = [*ids, *answer["output_ids"], *ids_of(830 + turn, 9)]
        if turn == 1:
            segments = [*segments, (len(ids), len(ids) + len(third))]
            ids = [*ids, *third, *ids_of(840, 9)]
    assert found[0] == 0 and found[0] < found[1] < found[2] < found[3], found


def test_without_an_exact_state_no_turn_is_kept(hybrid16: Server) -> None:
    salt = fresh_salt()
    ids, segments = assemble(
        [("segment", ids_of(1, 64)), ("segment", ids_of(2, 64)), ("text", [7])]
    )
    for _ in range(2):
        answer = hybrid16.generate(**body(ids, segments, 2, salt, turns=True))
        assert answer["meta_info"]["pic"]["turn_tokens"] == 0
        check_linked(answer, ids, segments, seam=16, page=16)


def test_a_growing_segment_goes_on_from_the_shorter_one(paged: tuple[Server, int]) -> None:
    """Compiling what was appended alone gives the states of compiling all of it."""
    server, page = paged
    salt = fresh_salt()
    grown: list[int] = []
    for step, n in enumerate((90, 1, 70, 33)):
        grown = grown + ids_of(860 + step, n)
        made = server.post("/pic/compile", {"input_ids": grown, "cache_salt": salt}).json()
        computed = made["segments"][0]["tokens_computed"]
        if step and n > page:
            assert computed < n + 2 * page, (step, computed)
    parts = [("text", ids_of(1, 20)), ("segment", grown), ("segment", ids_of(2, 64))]
    ids, segments = assemble([*parts, ("text", ids_of(3, 5))])
    answer = server.generate(**body(ids, segments, 3, salt, state="compose"))
    assert answer["meta_info"]["pic"]["segments"][0]["hit"]
    check_linked(answer, ids, segments, seam=16, page=page)
    # The shorter ones are still there, as what they were.
    ids, segments = assemble([("text", ids_of(4, 20)), ("segment", grown[:90]), ("text", [9])])
    answer = server.generate(**body(ids, segments, 3, salt, state="compose"))
    check_linked(answer, ids, segments, seam=16, page=page)
    # Opening the prompt, it is exact.
    ids, segments = assemble([("segment", grown), ("text", ids_of(5, 5))])
    answer = server.generate(**body(ids, segments, 2, salt))
    assert answer["meta_info"]["pic"]["exactness"] == "exact"
    check_exact(answer, ids, page)


def test_a_turn_may_end_right_before_a_core(hybrid1: Server) -> None:
    salt = fresh_salt()
    options = {"seam": 4, "policy": "none", "state": "compose", "turns": True}
    ids, segments = assemble([("segment", ids_of(801, 40)), ("text", ids_of(803, 20))])
    answer = hybrid1.generate(**body(ids, segments, 5, salt, **options))
    # The last token generated was never computed; without it nothing stands between.
    ids = [*ids, *answer["output_ids"][:-1]]
    segments = [*segments, (len(ids), len(ids) + 45)]
    ids = [*ids, *ids_of(804, 45), *ids_of(805, 3)]
    answer = hybrid1.generate(**body(ids, segments, 3, salt, **options))
    check_linked(answer, ids, segments, seam=4, page=1, policy="none")


def test_a_longer_prefix_is_not_taken_for_an_earlier_turns(hybrid1: Server) -> None:
    salt = fresh_salt()
    options = {"seam": 4, "turns": True}
    lead, document = ids_of(811, 5), ids_of(812, 90)
    parts = [("text", lead), ("segment", document)]
    ids, segments = assemble([*parts, ("text", ids_of(813, 9))])
    hybrid1.generate(**body(ids, segments, 3, salt, **options))
    hybrid1.generate(**body(ids[:60], [], 3, salt))
    ids, segments = assemble([*parts, ("text", ids_of(814, 9))])
    answer = hybrid1.generate(**body(ids, segments, 3, salt, **options))
    expected = hybrid1.generate(**body(ids, segments, 3, salt, turns=False, seam=4))
    assert (distributions(answer) - distributions(expected)).abs().max() < TOLERANCE


def test_what_is_flushed_keeps_no_state(hybrid1: Server) -> None:
    hybrid1.post("/flush_cache", {}).raise_for_status()
    salt = fresh_salt()

    def state_bytes() -> int:
        return hybrid1.get("/pic/stats").json()["ranks"][0]["state"]["segment"]

    before = state_bytes()
    documents = [ids_of(820 + i, 50) for i in range(3)]
    hybrid1.post("/pic/compile", {"input_ids": documents, "cache_salt": salt})
    ids, segments = assemble([("segment", ids_of(825, 50)), ("text", [7])])
    hybrid1.generate(**body(ids, segments, 1, salt))
    assert state_bytes() > before
    hybrid1.post("/pic/flush", {"cache_salt": salt})
    assert state_bytes() == before
