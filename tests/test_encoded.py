"""Documents that an encoder has read, on real servers, held to the oracle."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import CHECKS, TINY, serve
from encoders import MAX_TOKENS, save_encoder
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from linking import (
    TOLERANCE,
    assemble,
    body,
    check_exact,
    check_linked,
    distributions,
    fresh_salt,
    ids_of,
    model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sglang_pic.client import ConflictError, NoRoomError, NotFoundError, PicClient
from sglang_pic.encoder.weights import FILE
from sglang_pic.eval.bench import Bench
from sglang_pic.eval.encoder import served
from sglang_pic.eval.encoder.quality import ENCODER, held_out
from sglang_pic.eval.models.dense.weights import dense_path
from sglang_pic.eval.oracle.encoder import encoded_logprobs
from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

Parts = Sequence[tuple[str, list[int]]]
HARD = ("--page-size=16", "--chunked-prefill-size=64", "--enable-mixed-chunk")
# SGLang keeps a hybrid's states at the end of sequences, or on a grid of 64 tokens.
STATES = {
    1: ("--mamba-radix-cache-strategy=no_buffer", "--disable-overlap-schedule"),
    16: ("--mamba-radix-cache-strategy=extra_buffer",),
}
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
# One core each; SGLang refuses more ranks than memory nodes otherwise. It compares what its
# ranks decided, and stops where they differ.
RANKS = {
    1: {},
    2: {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"},
}


@pytest.fixture(scope="module")
def encoder(tiny_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"), tiny_path, model().config)


@pytest.fixture(
    scope="module",
    params=[
        (16, 1),
        pytest.param((1, 1), marks=pytest.mark.long),
        pytest.param((16, 2), marks=pytest.mark.long),
    ],
    ids=["page16", "page1", "two_ranks"],
)
def server(
    request: pytest.FixtureRequest,
    tiny_path: pathlib.Path,
    encoder: pathlib.Path,
    logs: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Page size 16 with short chunks, mixed, and requests retracted by force; page size 1."""
    page, ranks = request.param
    hard, env = (HARD, CHECKS | RETRACT) if page == 16 else ((), CHECKS)
    flags = (*TINY, f"--pic-encoder={encoder}", "--pic-state-mib=1", f"--tp-size={ranks}", *hard)
    flags += (f"--pic-store={tmp_path_factory.mktemp('store')}", "--pic-store-when=always")
    log = logs / f"encoded{page}_{ranks}.log"
    with serve(tiny_path, log, *flags, env=env | RANKS[ranks]) as made:
        yield made


def page_of(server: Server) -> int:
    return int(server.get("/server_info").json()["page_size"])


def ranks_of(server: Server) -> int:
    return int(server.get("/server_info").json()["tp_size"])


def split(parts: Parts) -> tuple[list[int], list[list[int]]]:
    """The row, and the documents."""
    row = [token for kind, ids in parts if kind == "text" for token in ids]
    return row, [ids for kind, ids in parts if kind == "segment"]


def encoded_body(parts: Parts, n_new: int, salt: str) -> dict[str, Any]:
    made = body(*assemble(parts), n_new, salt, mode="encode")
    del made["pic"]["turns"]
    return made


def expected(encoder: pathlib.Path, parts: Parts, forced: Sequence[int]) -> torch.Tensor:
    row, documents = split(parts)
    return encoded_logprobs(model(), encoder, row, documents, forced=forced)


def check(answer: dict[str, Any], encoder: pathlib.Path, parts: Parts) -> None:
    """The answer is the oracle's, and no document was in the row."""
    row, documents = split(parts)
    meta = answer["meta_info"]
    assert meta["prompt_tokens"] == len(row)
    report = meta["pic"]
    assert report["exactness"] == "encoded"
    assert report["tokens_outside"] == sum(map(len, documents))
    assert report["tokens_reused"] + report["tokens_computed"] == len(row)
    worst = (distributions(answer) - expected(encoder, parts, answer["output_ids"])).abs().max()
    assert worst < TOLERANCE, f"log-probabilities differ by {worst}"


def test_a_document_is_read_beside_the_row(server: Server, encoder: pathlib.Path) -> None:
    parts = [("text", ids_of(1, 9)), ("segment", ids_of(2, 40)), ("text", ids_of(3, 7))]
    salt = fresh_salt()
    first = server.generate(**encoded_body(parts, 4, salt))
    check(first, encoder, parts)
    waited = first["meta_info"]["pic"]["waited_for"]
    assert [one["outcome"] for one in waited] == ["compiled"]
    again = server.generate(**encoded_body(parts, 4, salt))
    check(again, encoder, parts)
    assert again["meta_info"]["pic"]["waited_for"] == []
    row, _ = split(parts)
    plain = server.generate(**body(row, [], 4, salt))
    check_exact(plain, row, 4)
    assert (distributions(plain) - distributions(first)).abs().max() > 0.1


lengths = st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17, 31, 33, 64, 90, 150]))
part = st.tuples(st.sampled_from(["segment", "segment", "text"]), st.integers(0, 3), lengths)


def test_any_layout_matches_the_oracle(server: Server, encoder: pathlib.Path) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(parts=st.lists(part, min_size=1, max_size=6), question=st.integers(1, 30))
    def holds(parts: list[tuple[str, int, int]], question: int) -> None:
        made = [(kind, ids_of(seed, n)) for kind, seed, n in parts]
        made.append(("text", ids_of(9, question)))
        check(server.generate(**encoded_body(made, 3, "layouts")), encoder, made)

    holds()


def test_the_order_of_documents_is_nothing(server: Server, encoder: pathlib.Path) -> None:
    documents = [("segment", ids_of(30 + i, 20 + 13 * i)) for i in range(4)]
    question = ("text", ids_of(34, 11))
    answers = []
    for seed in range(3):
        order = random.Random(seed).sample(documents, 4)
        answer = server.generate(**encoded_body([*order, question], 4, "orders"))
        check(answer, encoder, [*order, question])
        answers.append(answer)
    first = answers[0]
    for other in answers[1:]:
        assert other["output_ids"] == first["output_ids"]
        assert (distributions(other) - distributions(first)).abs().max() < 1e-5


def test_rows_of_every_kind_share_batches(server: Server, encoder: pathlib.Path) -> None:
    page, salt = page_of(server), fresh_salt()
    documents = [ids_of(40 + i, 40 + 19 * i) for i in range(4)]
    question = ids_of(44, 9)
    encoded = []
    for seed in range(6):
        order = random.Random(seed).sample(documents, 1 + seed % 4)
        encoded.append([*(("segment", ids) for ids in order), ("text", ids_of(50 + seed, 9))])
    linked = [
        assemble([*(("segment", ids) for ids in order), ("text", question)])
        for order in (documents[:2], documents[1:])
    ]
    with ThreadPoolExecutor(12) as pool:
        plain = [
            pool.submit(lambda i=i: server.generate(**body(documents[i], [], 12, f"{salt}-{i}")))
            for i in range(4)
        ]
        links = [
            pool.submit(lambda one=one: server.generate(**body(*one, 12, salt, seam=4)))
            for one in linked
        ]
        reads = [
            pool.submit(lambda one=one: server.generate(**encoded_body(one, 12, salt)))
            for one in encoded
        ]
        for one, future in zip(encoded, reads, strict=True):
            check(future.result(), encoder, one)
        for (ids, segments), future in zip(linked, links, strict=True):
            check_linked(future.result(), ids, segments, seam=4, page=page, n_new=12)
        for ids, future in zip(documents, plain, strict=True):
            check_exact(future.result(), ids, 12)
    assert server.forest()["encoded"]["in_use"] == 0


def test_a_row_is_a_prefix_under_the_same_documents_alone(
    server: Server, encoder: pathlib.Path
) -> None:
    row, salt = ids_of(60, 70), fresh_salt()
    one, two = ids_of(61, 30), ids_of(62, 30)
    seen = []
    for documents, text in (
        ((one, two), row),
        ((one, two), row),
        ((two, one), row),
        ((one,), row),
        ((), row),
        ((one, two), [*row, *ids_of(63, 5)]),
    ):
        parts = [*(("segment", ids) for ids in documents), ("text", text)]
        answer = server.generate(**encoded_body(parts, 2, salt))
        check(answer, encoder, parts)
        seen.append(answer["meta_info"]["cached_tokens"])
    page = page_of(server)
    assert seen == [0, 69 // page * page, 0, 0, 0, 70 // page * page]


def test_a_tenant_has_documents_of_its_own(server: Server, encoder: pathlib.Path) -> None:
    parts = [("segment", ids_of(70, 33)), ("text", ids_of(71, 8))]
    for _ in range(2):
        answer = server.generate(**encoded_body(parts, 2, fresh_salt()))
        check(answer, encoder, parts)
        assert len(answer["meta_info"]["pic"]["waited_for"]) == 1


def test_samples_and_batches(server: Server, encoder: pathlib.Path) -> None:
    parts = [("segment", ids_of(80, 33)), ("text", ids_of(81, 8))]
    one = encoded_body(parts, 2, fresh_salt())
    one["sampling_params"] = [{**one["sampling_params"], "n": 3}][0]
    answers = server.generate(**one)
    assert len(answers) == 3
    for answer in answers:
        check(answer, encoder, parts)
    other = [("text", ids_of(82, 8)), ("segment", ids_of(83, 60)), ("text", ids_of(84, 3))]
    bodies = [encoded_body(made, 2, "batch") for made in (parts, other)]
    row = ids_of(85, 20)
    both = {
        **bodies[0],
        "input_ids": [*(made["input_ids"] for made in bodies), row],
        "pic": [*(made["pic"] for made in bodies), None],
        "token_ids_logprob": [bodies[0]["token_ids_logprob"]] * 3,
        "return_logprob": [True] * 3,
        "cache_salt": ["batch"] * 3,
    }
    first, second, plain = server.generate(**both)
    check(first, encoder, parts)
    check(second, encoder, other)
    check_exact(plain, row, 2)


def test_more_documents_than_there_is_room_for_come_and_go(
    server: Server, encoder: pathlib.Path
) -> None:
    """A budget of 1 MiB: 2048 tokens a rank."""
    held, ranks = server.forest()["encoded"], ranks_of(server)
    assert held["encoder"]["bytes_per_token"] == 512 // ranks
    room = held["budget"] // (512 // ranks)
    with ThreadPoolExecutor(8) as pool:
        asked = [
            [("segment", ids_of(100 + i, 280)), ("segment", ids_of(200 + i, 200)),
             ("text", ids_of(300 + i, 5))]
            for i in range(8 * ranks)
        ]  # fmt: skip
        answers = pool.map(lambda one: server.generate(**encoded_body(one, 6, "room")), asked)
        for answer, parts in zip(answers, asked, strict=True):
            check(answer, encoder, parts)
    held = server.forest()["encoded"]
    assert held["bytes"] <= held["budget"]
    many = [("segment", ids_of(400 + i, 290)) for i in range(room // 290 + 1)]
    refused = server.post("/generate", encoded_body([*many, ("text", [1])], 2, "room"))
    assert refused.status_code == 400
    assert "--pic-state-mib" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("parts", "pic", "says"),
    [
        ([("segment", ids_of(1, MAX_TOKENS + 1)), ("text", [1])], {}, "too long for the encoder"),
        ([("segment", [1, 2])], {}, "text beside its documents"),
        ([("segment", [1, 2]), ("text", [1])], {"seam": 4}, "pic.seam"),
        ([("segment", [1, 2]), ("text", [1])], {"require_exact": True}, "pic.require_exact"),
        ([("segment", [1, 512]), ("text", [1])], {}, "0 to 511"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    server: Server, parts: Parts, pic: dict[str, Any], says: str
) -> None:
    made = encoded_body(parts, 2, fresh_salt())
    made["pic"] |= pic
    answer = server.post("/generate", made)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


def test_a_stream_is_refused_as_any_other_request_is(server: Server) -> None:
    made = encoded_body([("segment", [1, 2])], 2, fresh_salt())
    answer = server.post("/generate", {**made, "stream": True})
    assert "text beside its documents" in answer.text


def client_of(server: Server, salt: str) -> PicClient:
    return PicClient(server.url, cache_salt=salt)


def test_documents_are_encoded_ahead(server: Server, encoder: pathlib.Path) -> None:
    salt = fresh_salt()
    client = client_of(server, salt)
    documents = [ids_of(500 + i, 30 + i) for i in range(3)]
    parts = [*(("segment", ids) for ids in documents), ("text", ids_of(510, 8))]
    prompt = encoded_body(parts, 3, salt)
    told = client.explain(input_ids=prompt["input_ids"], pic=prompt["pic"])
    assert [one.reason for one in told.segments] == ["not_compiled"] * 3
    assert (told.exactness, told.tokens_to_compile) == ("encoded", 30 + 31 + 32)
    made = client.compile(input_ids=documents[:2], mode="encode")
    assert [(one.tokens, one.tokens_computed) for one in made] == [(30, 30), (31, 31)]
    made = client.compile(input_ids=documents, mode="encode")
    assert [one.tokens_computed for one in made] == [0, 0, 32]
    told = client.explain(input_ids=prompt["input_ids"], pic=prompt["pic"])
    assert [(one.id, one.hit) for one in told.segments] == [(one.id, True) for one in made]
    assert (told.tokens_to_compile, told.tokens_reused) == (0, 0)
    answer = server.generate(**prompt)
    check(answer, encoder, parts)
    report = answer["meta_info"]["pic"]
    assert report["waited_for"] == []
    assert [one["id"] for one in report["segments"]] == [one.id for one in made]
    again = client.explain(input_ids=prompt["input_ids"], pic=prompt["pic"])
    assert again.tokens_reused == 7 // page_of(server) * page_of(server)


def test_documents_are_managed_as_segments_are(server: Server) -> None:
    salt = fresh_salt()
    client, other = client_of(server, salt), client_of(server, fresh_salt())
    one, two = client.compile(input_ids=[ids_of(520, 40), ids_of(521, 50)], mode="encode")
    listed = client.documents()
    each = server.forest()["encoded"]["encoder"]["bytes_per_token"]
    assert {(card.id, card.tokens, card.bytes) for card in listed} == {
        (one.id, 40, 40 * each),
        (two.id, 50, 50 * each),
    }
    assert client.segments() == [] and other.documents() == []
    assert client.pin(one.id).pinned and client.get(one.id).pinned
    for call in (other.get, other.pin, other.unpin, other.delete):
        with pytest.raises(NotFoundError):
            call(one.id)
    with pytest.raises(ConflictError, match="pinned"):
        client.delete(one.id)
    # A tenant may pin a quarter of 1 MiB.
    count = 1024 // each
    large = client.compile(input_ids=[ids_of(522 + i, 290) for i in range(count)], mode="encode")
    for some in large[:-1]:
        client.pin(some.id)
    with pytest.raises(NoRoomError):
        client.pin(large[-1].id)
    pinned = [one.id, *(some.id for some in large[:-1])]
    unpinned = len(client.documents()) - len(pinned)
    assert client.flush().documents == unpinned
    assert {card.id for card in client.documents()} == {*pinned}
    for name in pinned:
        client.unpin(name)
        client.delete(name)
    assert client.documents() == []
    assert server.forest()["integrity"] == "ok"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"input_ids": ids_of(1, MAX_TOKENS + 1)}, "input_ids[0]"),
        ({"input_ids": [[1, 2], [1, 512]]}, "input_ids[1]"),
        ({"input_ids": [[1, 2], []]}, "input_ids[1]"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [ids_of(i, 290) for i in range(16)]}, "input_ids"),
        ({"input_ids": [1, 2], "seam": 4}, "seam"),
        ({"input_ids": [1, 2], "company": True}, "company"),
        ({"input_ids": [1, 2], "opening": [1]}, "opening"),
        ({"input_ids": [1, 2], "extra_key": "x"}, "extra_key"),
        ({"input_ids": [1, 2], "lora_path": "x"}, "lora_path"),
        ({}, "text"),
    ],
)
def test_what_cannot_be_encoded_ahead_is_refused(
    server: Server, fields: dict[str, Any], field: str
) -> None:
    answer = server.post("/pic/compile", {**fields, "mode": "encode"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_it_says_what_it_holds(server: Server) -> None:
    info = server.get("/pic/info").json()
    canary = info["encoder"].pop("canary")
    assert info["encoder"] == {"max_tokens": MAX_TOKENS, "cross_layers": [0, 1]}
    assert canary["result"] == "passed", canary
    assert all(check["found"] < 1e-6 for check in canary["checks"].values())
    salt = fresh_salt()
    server.generate(**encoded_body([("segment", ids_of(540, 40)), ("text", [1, 2])], 1, salt))
    stats = server.get("/pic/stats").json()
    assert stats["front"]["documents_encoded"] >= stats["ranks"][0]["encoded"]["documents"] > 0
    assert stats["front"]["tokens_outside"] > 0
    # Nothing of it in the pool of pages.
    flushed = server.post("/pic/flush", {"cache_salt": salt})
    assert flushed.status_code == 200, flushed.text
    assert server.forest()["encoded"]["bytes"] < stats["ranks"][0]["encoded"]["bytes"]


def forgotten(server: Server, client: PicClient) -> None:
    """All that the server held is in its store at most."""
    flushed = server.post("/flush_cache", {})
    assert flushed.status_code == 200, flushed.text
    assert client.documents() == []


def test_what_is_saved_and_restored_is_the_same(server: Server, encoder: pathlib.Path) -> None:
    salt = fresh_salt()
    client, other = client_of(server, salt), client_of(server, fresh_salt())
    parts = [("segment", ids_of(600, 33)), ("segment", ids_of(601, 70)), ("text", ids_of(602, 9))]
    prompt = encoded_body(parts, 3, salt)
    first = server.generate(**prompt)
    check(first, encoder, parts)
    names = [one["id"] for one in first["meta_info"]["pic"]["segments"]]
    with pytest.raises(NotFoundError):
        other.save(names)
    saved = client.save(names)
    assert (saved.segments, saved.documents) == (0, 2) and saved.bytes > (33 + 70) * 512
    forgotten(server, client)
    assert other.restore().documents == 0
    restored = client.restore()
    assert (restored.documents, restored.present, restored.refused) == (2, 0, [])
    assert {one.id for one in client.documents()} == {*names} and other.documents() == []
    again = server.generate(**prompt)
    check(again, encoder, parts)
    assert again["meta_info"]["pic"]["waited_for"] == []
    assert (distributions(again) - distributions(first)).abs().max() < TOLERANCE
    # A tenant's own flush takes them out of the store, too.
    assert client.flush().documents == 2
    assert client.restore().documents == 0


def test_what_the_store_has_is_not_encoded(server: Server, encoder: pathlib.Path) -> None:
    salt = fresh_salt()
    client = client_of(server, salt)
    documents = [ids_of(610 + i, 40 + i) for i in range(3)]
    parts = [*(("segment", ids) for ids in documents), ("text", ids_of(620, 8))]
    published = {"input_ids": documents[:2], "mode": "encode", "publish": True}
    answer = server.post("/pic/compile", {**published, "cache_salt": salt})
    assert answer.status_code == 200, answer.text
    forgotten(server, client)
    answer = server.generate(**encoded_body(parts, 3, salt))
    check(answer, encoder, parts)
    report = answer["meta_info"]["pic"]
    told = [(one["outcome"], one["source"], one["why"]) for one in report["waited_for"]]
    assert sorted(told) == [
        ("compiled", "computed", "not_in_store"),
        *[("fetched", "store", "in_store")] * 2,
    ]
    assert report["tokens_compiled"] == 42
    # Another tenant's prompt gets nothing of it.
    theirs = server.generate(**encoded_body(parts, 3, fresh_salt()))
    check(theirs, encoder, parts)
    waited = theirs["meta_info"]["pic"]["waited_for"]
    assert {(one["outcome"], one["why"]) for one in waited} == {("compiled", "not_in_store")}
    # Several samples, and one that was asked for by name.
    forgotten(server, client)
    assert [
        one.tokens_computed for one in client.compile(input_ids=documents[0], mode="encode")
    ] == [0]
    several = encoded_body(parts, 2, salt)
    several["sampling_params"] = {**several["sampling_params"], "n": 2}
    for one in server.generate(**several):
        check(one, encoder, parts)
    assert server.forest()["integrity"] == "ok"


# -- other servers ------------------------------------------------------------------------


@pytest.mark.long
def test_an_encoder_of_no_numbers_is_not_served(
    tiny_path: pathlib.Path, tmp_path: pathlib.Path, logs: pathlib.Path
) -> None:
    broken = save_encoder(tmp_path, tiny_path, model().config)
    weights = load_file(broken / FILE)
    weights["encoder.layers.0.v_proj.weight"].fill_(torch.nan)
    save_file(weights, broken / FILE)
    with serve(tiny_path, logs / "nan.log", *TINY, f"--pic-encoder={broken}", env=CHECKS) as server:
        info = server.get("/pic/info").json()
        assert info["canary"]["result"] == "passed" and info["linking"]["on"]
        assert info["encoder"]["canary"]["result"] == "failed"
        parts = [("segment", ids_of(2, 40)), ("text", ids_of(3, 7))]
        made = encoded_body(parts, 2, fresh_salt())
        refused = server.post("/generate", made)
        assert refused.status_code == 503, refused.text
        assert "failed its canary" in refused.text
        assert "failed its canary" in server.post("/generate", {**made, "stream": True}).text
        ahead = server.post("/pic/compile", {"input_ids": ids_of(2, 40), "mode": "encode"})
        assert ahead.status_code == 503 and "failed its canary" in ahead.text
        ids, segments = assemble([*parts[::-1], ("text", ids_of(4, 20))])
        linked = server.generate(**body(ids, segments, 2, fresh_salt(), turns=False))
        assert linked["meta_info"]["pic"]["exactness"] == "composed"
        assert server.forest()["encoded"]["documents"] == 0


@pytest.mark.long
def test_closed_gates_change_no_token(
    tiny_path: pathlib.Path, tmp_path: pathlib.Path, logs: pathlib.Path
) -> None:
    closed = save_encoder(tmp_path, tiny_path, model().config, gate=0.0)
    flags = (*TINY, f"--pic-encoder={closed}")
    with serve(tiny_path, logs / "closed.log", *flags, env=CHECKS) as server:
        for seed in range(4):
            row = ids_of(seed, 30 + 7 * seed)
            parts = [("segment", ids_of(90 + seed, 60)), ("text", row)]
            seeing = server.generate(**encoded_body(parts, 8, fresh_salt()))
            plain = server.generate(**body(row, [], 8, fresh_salt()))
            assert seeing["meta_info"]["pic"]["exactness"] == "encoded"
            assert seeing["output_ids"] == plain["output_ids"]
            assert torch.equal(distributions(seeing), distributions(plain))


@pytest.mark.long
@pytest.mark.parametrize(("page", "ranks"), [(1, 1), (16, 1), (16, 2)])
def test_a_hybrid_reads_documents(
    page: int, ranks: int, tmp_path: pathlib.Path, logs: pathlib.Path
) -> None:
    family = FAMILIES["qwen3_5"]
    path = family.save(tmp_path)
    encoder = save_encoder(tmp_path / "encoder", path, family.model().config, cross_layers=(1, 2))
    sizes = (f"--page-size={page}", f"--tp-size={ranks}")
    flags = (*TINY, f"--pic-encoder={encoder}", *sizes, *STATES[page])
    log = logs / f"encoded_hybrid{page}_{ranks}.log"
    with serve(path, log, *flags, env=CHECKS | RANKS[ranks]) as server:
        assert server.forest()["refusal"] is None
        documents = [ids_of(40 + i, 40 + 19 * i) for i in range(3)]
        salt, linked = (
            fresh_salt(),
            assemble(
                [("segment", documents[0]), ("segment", documents[1]), ("text", ids_of(50, 9))]
            ),
        )
        prompts = [
            [*(("segment", ids) for ids in documents[: i + 1]), ("text", ids_of(60 + i, 20))]
            for i in range(3)
        ]

        def holds(answer: dict[str, Any], parts: Parts) -> None:
            row, seen = split(parts)
            forced = answer["output_ids"]
            found = encoded_logprobs(family.model(), encoder, row, seen, forced=forced)
            assert (distributions(answer) - found).abs().max() < TOLERANCE

        for _ in range(2):
            with ThreadPoolExecutor(6) as pool:
                seeing = [
                    pool.submit(lambda one=one: server.generate(**encoded_body(one, 6, salt)))
                    for one in prompts
                ]
                link = pool.submit(
                    lambda: server.generate(**body(*linked, 6, f"{salt}-link", seam=4))
                )
                plain = pool.submit(
                    lambda: server.generate(**body(documents[2], [], 6, f"{salt}-plain"))
                )
                for one, future in zip(prompts, seeing, strict=True):
                    holds(future.result(), one)
                forced = link.result()["output_ids"]
                found = family.linked(*linked, page=page, seam=4, state="compose", forced=forced)
                assert (distributions(link.result()) - found).abs().max() < TOLERANCE
                found = family.plain(documents[2], plain.result()["output_ids"])
                assert (distributions(plain.result()) - found).abs().max() < TOLERANCE
        assert server.forest()["encoded"]["documents"] == 3


@pytest.fixture(scope="module")
def shipped(logs: pathlib.Path) -> Iterator[Server]:
    log = logs / "shipped-encoder.log"
    with serve(dense_path(), log, "--max-total-tokens=8192", f"--pic-encoder={ENCODER}") as made:
        yield made


@pytest.mark.long
def test_the_shipped_encoder_answers_on_a_server(shipped: Server) -> None:
    """As full text does, with no token of a document in the row. Ours stands in for stock
    SGLang, which it is for a request without ``pic``."""
    pair = Bench(dense_path(), "dense", shipped, shipped, range(8, 200), 1024, 8192)
    rows = {row["method"]: row for row in served.run(pair, ENCODER, ("2x32",), 4).rows}
    assert rows["encoded"]["questions"] >= 20
    assert min(row["exact_match"] for row in rows.values()) > 0.85
    full, linked, encoded = (rows[name] for name in ("full", "linked", "encoded"))
    assert encoded["tokens_of_a_row"] < linked["tokens_of_a_row"] < full["tokens_of_a_row"]
    assert encoded["kv_bytes"] < linked["kv_bytes"] < full["kv_bytes"]


@pytest.mark.long
def test_documents_are_named_in_texts_too(shipped: Server) -> None:
    """By ranges of characters, in parts, and on OpenAI's route: the answer of token ids."""
    tokenizer = AutoTokenizer.from_pretrained(dense_path())
    (row,) = held_out(2, 32, 1)
    before, asked = tokenizer.decode(row.before) + " ", tokenizer.decode(row.asked[0].prompt)
    documents = [tokenizer.decode(document) + " " for document in row.documents]
    # What the tokenizer makes of a text alone is what it was.
    assert [tokenizer.encode(one) for one in documents] == row.documents
    ids = served.body_of(row, row.asked[0], (0, 1), {"mode": "encode"}, "ids")
    expected = shipped.generate(**ids)["output_ids"]
    sampling = ids["sampling_params"]
    parts = [before, *({"segment": one} for one in documents), asked]
    told = shipped.generate(pic={"mode": "encode", "parts": parts}, sampling_params=sampling)
    text, segments = before, []
    for document in documents:
        segments.append({"start": len(text), "end": len(text) + len(document)})
        text += document
    pic = {"mode": "encode", "segments": segments}
    ranged = shipped.generate(text=text + asked, pic=pic, sampling_params=sampling)
    assert told["output_ids"] == ranged["output_ids"] == expected
    assert {one["meta_info"]["pic"]["tokens_outside"] for one in (told, ranged)} == {
        sum(map(len, row.documents))
    }
    body = {"model": "default", "prompt": text + asked, "pic": pic, "temperature": 0}
    body |= {"max_tokens": sampling["max_new_tokens"], "ignore_eos": True}
    answer = shipped.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == told["text"]
    assert answer["usage"]["pic"]["exactness"] == "encoded"
