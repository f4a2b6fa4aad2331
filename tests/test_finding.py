"""Segments that the front finds: only what recurs, each tenant's by itself, and never
another prompt than SGLang's."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import pathlib
import random
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
from chats import Chat
from compiling import Compiler
from conftest import CHECKS, serve
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.managers.io_struct import GenerateReqInput
from test_chat import SHIPPED, TOOLS, WITH_TOOLS
from transformers import AutoTokenizer

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicConfigError, PicRequestError
from sglang_pic.eval.found_chats import TEMPLATE
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.passages import load_passages
from sglang_pic.eval.serving import Server
from sglang_pic.find.own import rules_with
from sglang_pic.metrics import front
from sglang_pic.metrics.front import Counts
from sglang_pic.request.base import LinkRequest
from sglang_pic.server import answers as answers_module
from sglang_pic.server import chat as chat_module
from sglang_pic.server import chunks as chunks_module
from sglang_pic.server import finding as module
from sglang_pic.server.answers import as_found, tidy
from sglang_pic.server.chunks import MAX_WAITING, Chunk
from sglang_pic.server.compiler import FAILED, Caller, CompileItem
from sglang_pic.server.exchange import Exchange, carry
from sglang_pic.server.finding import MAX_TENANTS, Finding, Found
from sglang_pic.server.reading import take
from sglang_pic.server.resolve import Resolver
from sglang_pic.server.searched import names_none
from sglang_pic.server.waited import NOTHING
from sglang_pic.server.wanted import Wanted

PASSAGES = [passage.document for passage in load_passages()]


def inner(text: str) -> str:
    """What of it has the same tokens anywhere."""
    return text[text.index(" ") : text.rindex(" ")]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pathlib.Path(ensure_model()))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    fresh = Counts()
    for one in (front, module, chunks_module):
        monkeypatch.setattr(one, "counts", fresh)
    return fresh


class Front:
    """A front that gets prompts of one text."""

    def __init__(self, tokenizer: Any, **settings: Any) -> None:
        self.config = PicConfig(**{"find": "structure", **settings})
        model = types.SimpleNamespace(context_len=1 << 20)
        manager = types.SimpleNamespace(tokenizer=tokenizer, model_config=model)
        self.compiler = Compiler()
        self.is_idle = self.is_linking = True
        compiler: Any = self.compiler
        self.resolver = Resolver(manager, self.config.link_defaults)
        self.finding = Finding(
            self.config,
            self.resolver,
            Wanted((), self.config),
            compiler,
            lambda: self.is_idle,
            lambda: self.is_linking,
        )

    async def ask(
        self, prompt: Any, pic: Any = None, exchange: Exchange | None = None, **fields: Any
    ) -> list[str]:
        """The texts that are linked of a prompt; what it has compiled is done by then."""
        found = await self.ask_all(prompt, pic, exchange, **fields)
        assert len(found) < 2
        return found[0] if found else []

    async def ask_all(
        self, prompts: Any, pic: Any = None, exchange: Exchange | None = None, **fields: Any
    ) -> list[list[str]]:
        """The same of each prompt of a batch; nothing where none is searched."""
        is_text = isinstance(prompts, str) or isinstance(prompts[0], str)
        obj = GenerateReqInput(**{"text" if is_text else "input_ids": prompts}, **fields)
        found = self.finding.search(obj, exchange, pic)
        for _ in range(20):
            await asyncio.sleep(0)
        decode = self.resolver._manager.tokenizer.decode
        return [
            [decode(one.ids[span.start : span.end]) for span in one.prompt[1].spans]
            for one in found or ()
        ]


def stuffed(*numbers: int, question: str = "") -> str:
    return "\n\n".join([question or f"Read {random.random()}.", *(PASSAGES[i] for i in numbers)])


def run(go: Callable[[], Any]) -> None:
    asyncio.run(go())


# -- what recurs --------------------------------------------------------------------------


def test_what_recurs_is_compiled_and_then_linked(tokenizer, counts: Counts) -> None:
    async def go() -> None:
        front = Front(tokenizer)
        assert await front.ask(stuffed(0, 1, 2)) == [] and not front.compiler.items
        assert await front.ask(stuffed(3, 1, 4)) == []
        (item,) = front.compiler.items
        assert tokenizer.decode(item.ids) == inner(PASSAGES[1])
        assert await front.ask(stuffed(5, 6, 1)) == [inner(PASSAGES[1])]
        assert len(front.compiler.items) == 1

    run(go)
    assert set(counts.chunks_seen) == {"paragraph"}
    assert counts.chunks_recurring == {"paragraph": 2}
    assert counts.chunks_compiled == {"paragraph": 1}


def test_what_stands_behind_the_same_prefix_is_left_to_the_cache(tokenizer) -> None:
    async def go() -> None:
        front = Front(tokenizer, find="content")
        for _ in range(4):
            assert await front.ask(stuffed(0, 1, 2, question="Read.")) == []
        assert await front.ask(stuffed(0, 1, 2, 3, question="Read.")) == []
        assert not front.compiler.items

    run(go)


def test_what_pays_at_once_is_linked_without_waiting(tokenizer) -> None:
    """Seen often enough while the server has never been idle."""

    async def go() -> None:
        front = Front(tokenizer)
        front.is_idle = False
        linked = [await front.ask(stuffed(1, i)) for i in range(2, 5)]
        assert linked == [[], [], [inner(PASSAGES[1])]] and not front.compiler.items

    run(go)


def test_tenants_and_adapters_are_apart(tokenizer) -> None:
    async def go() -> None:
        front = Front(tokenizer)
        for owner in ({"cache_salt": "a"}, {"cache_salt": "b"}, {"extra_key": "k"}, {}):
            for _ in range(2):
                assert await front.ask(stuffed(1), **owner) == []
        # Of each its own, under its own name.
        assert len({(one.salt, one.extra_key) for one in front.compiler.items}) == 4
        assert len(front.compiler.items) == 4
        front.compiler.items.clear()
        assert await front.ask(stuffed(1), cache_salt="c") == []
        assert not front.compiler.items

    run(go)


def test_a_tenants_many_keys_do_not_push_another_out(tokenizer) -> None:
    """One memory a tenant, whatever keys it makes up; under each its own text recurs."""

    async def go() -> None:
        front = Front(tokenizer)
        await front.ask(stuffed(1), cache_salt="b")
        for i in range(MAX_TENANTS + 9):
            assert await front.ask(stuffed(1), cache_salt="a", extra_key=f"{i}") == []
        assert len(front.finding._finders) == 2 and not front.compiler.items
        await front.ask(stuffed(1), cache_salt="b")
        assert [one.ids for one in front.compiler.items] and len(front.compiler.items) == 1

    run(go)


@pytest.mark.parametrize("mode", ["structure", "content"])
def test_each_prompt_of_a_batch_is_searched(tokenizer, mode: str) -> None:
    async def go() -> None:
        front = Front(tokenizer, find=mode)
        one, other = inner(PASSAGES[1]), inner(PASSAGES[2])
        salts = ["a", "b", "a"]
        pics = [None, None, {"find": "off"}]
        for _ in range(2):
            asked = [stuffed(1), stuffed(1, 2), stuffed(1)]
            assert await front.ask_all(asked, pics, cache_salt=salts) == [[], [], []]
        assert len(front.compiler.items) == 3
        asked = [stuffed(2, 1), stuffed(2, 3), stuffed(1)]
        linked = await front.ask_all(asked, pics, cache_salt=salts)
        assert linked == [[one], [other], []]
        # By itself each is found the same, and a list of one is one.
        assert await front.ask(stuffed(2, 1), cache_salt="a") == [one]
        assert await front.ask_all([stuffed(2, 3)], [None], cache_salt="b") == [[other]]
        assert await front.ask_all([stuffed(1)], cache_salt="c") == [[]]

    run(go)


@pytest.mark.parametrize("rule", ["whole", "pieces"])
@pytest.mark.parametrize("mode", ["structure", "content"])
def test_beside_what_a_request_names_more_is_found(tokenizer, mode: str, rule: str) -> None:
    """Nothing of it overlaps what is named, which stays as it is; and the tokens of what is
    found are those that it has anywhere."""

    def prompt(*numbers: int, named: int) -> tuple[str, dict[str, Any]]:
        text = stuffed(*numbers)
        start = text.index(PASSAGES[named])
        span = {"start": start, "end": start + len(PASSAGES[named])}
        return text, {"segments": [span], "tokenize": rule}

    async def go() -> None:
        front = Front(tokenizer, find=mode)
        one = [inner(PASSAGES[1])]
        for i in range(2):
            # Unmarked, and beside a mark.
            text, pic = prompt(2, 1, named=2)
            linked = await (front.ask(text, pic) if i else front.ask(stuffed(3, 1)))
            assert linked == [PASSAGES[2]] * i
        assert [tokenizer.decode(x.ids) for x in front.compiler.items] == one
        for numbers, named in (((4, 1, 5), 5), ((1, 4), 4), ((1, 4), 1)):
            text, pic = prompt(*numbers, named=named)
            obj = GenerateReqInput(text=text)
            (found,) = front.finding.search(obj, None, pic) or ()
            ids, link = found.prompt
            assert (ids, LinkRequest(tuple(found.named), link.options)) == front.resolver.one(
                text, None, pic
            )
            told = {tokenizer.decode(ids[s.start : s.end]): how
                    for s, how in zip(link.spans, found.how, strict=True)}  # fmt: skip
            expected = {one[0]: "structure"} if named != 1 else {}
            assert told == {PASSAGES[named]: "marked", **expected}
            report = {"segments": [{"reason": "hit", "tokens_reused": 1} for _ in link.spans]}
            found.see(report)
        # A request may have its marks alone; and a batch of both.
        text, pic = prompt(4, 1, named=4)
        assert (
            front.finding.search(GenerateReqInput(text=text), None, {**pic, "find": "off"}) is None
        )
        both = GenerateReqInput(text=[text, stuffed(6, 1), text])
        pics = [pic, None, {**pic, "find": "off"}]
        hows = [one.how for one in front.finding.search(both, None, pics) or ()]
        assert hows == [["marked", "structure"], ["structure"], ["marked"]]

    run(go)


def test_what_is_wrong_with_a_batch_is_told(tokenizer) -> None:
    front = Front(tokenizer)
    both = GenerateReqInput(text=["a", "b"])
    for obj, pic in ((both, [None]), (both, {}), (GenerateReqInput(text="a"), [None])):
        with pytest.raises(PicRequestError, match=r"^pic: must be"):
            front.finding.search(obj, None, pic)
    # SGLang says what is wrong with these.
    for fields in (
        {"text": ["a", 3]},
        {"text": ["a", "b"], "cache_salt": ["s"]},
        {"text": "a", "cache_salt": ["s"]},
        {"input_ids": [[1], []]},
    ):
        assert front.finding.search(GenerateReqInput(**fields), None, None) is None


def test_whoever_has_the_most_gives_up_what_came_last(
    tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant that fills the queue takes no room from one that has less."""
    monkeypatch.setattr(chunks_module, "MAX_TOKENS", 1000)
    monkeypatch.setattr(chunks_module, "MAX_TENANTS", 3)

    def chunks(salt: str, many: int, tokens: int = 50) -> list[Chunk]:
        caller = Caller(salt)
        items = [CompileItem((i,) * tokens, salt, None, None) for i in range(many)]
        return [Chunk(item, "part", caller, i, lambda _: None) for i, item in enumerate(items)]

    async def go() -> None:
        front = Front(tokenizer)
        front.is_idle = False
        idle = front.finding._idle
        left = lambda: {salt: len(waiting) for salt, waiting in idle._waiting.items()}  # noqa: E731
        idle.want(chunks("a", 30))
        assert left() == {"a": 20}
        idle.want(chunks("b", 4))
        assert left() == {"a": 16, "b": 4}
        assert [item.ids[0] for item in idle._waiting["a"]] == list(range(16))
        idle.want(chunks("b", 30))
        assert left() == {"a": 10, "b": 10}
        idle.want(chunks("c", 1, 2000))
        assert left() == {"a": 10, "b": 10}
        idle.want(chunks("c", 2))
        idle.want(chunks("d", 2))
        assert sorted(left()) == ["a", "b", "c"] and sum(left().values()) == 20
        assert len(idle._queue) == len(idle._chunks) == 20
        front.is_idle = True
        for _ in range(200):
            await asyncio.sleep(0.002)
        # In turn, and nothing is left behind.
        order = [one.salt for one in front.compiler.items]
        assert sorted(order[:3]) == ["a", "b", "c"] and len(order) == 20
        assert not idle._chunks and not idle._waiting and not idle._tokens

    run(go)


def test_one_tenants_flood_does_not_take_anothers_place(tokenizer) -> None:
    async def go() -> None:
        front = Front(tokenizer)
        front.is_idle = False
        ids = list(range(1000, 1000 + 40))
        for salt, many in (("a", MAX_WAITING + 40), ("b", 1)):
            for i in range(many):
                text = [i + 2, *ids]
                for before in ([7, 7], [8, 8]):
                    exchange = Exchange(ids=[*before, *text], cuts=[module.Cut(2, 43, "part")])
                    await front.ask([*before, *text], None, exchange, cache_salt=salt)
        waiting = front.finding._idle._queue
        assert len(waiting) <= MAX_WAITING + 1
        first = [waiting.take()]
        waiting.done(
            None if first[0] is None else front.finding._idle._chunks[first[0]].caller.tenant
        )
        assert len({waiting.take(), *first}) == 2

    run(go)


def test_what_is_remembered_is_bounded(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        front = Front(tokenizer)
        front.is_idle = False
        monkeypatch.setattr(chunks_module, "MAX_TOKENS", 200)
        for _ in range(2):
            await front.ask(stuffed(0, 1, 2, 3, 4))
        waiting = front.finding._idle
        tokens = sum(len(item.ids) for item in waiting._chunks)
        assert 0 < tokens == waiting._tokens.total() <= 200 and 0 < len(waiting._chunks) < 5
        for i in range(MAX_TENANTS + 9):
            await front.ask(stuffed(1), cache_salt=f"{i}")
        assert len(front.finding._finders) == MAX_TENANTS
        foretold = GenerateReqInput(text=stuffed(1), cache_salt="new")
        front.finding.search(foretold, None, None, remember=False)
        assert len(front.finding._finders) == MAX_TENANTS
        assert not any("new" in one for one in front.finding._finders)
        assert sum(one.nbytes for one in front.finding._finders.values()) < 100 << 20

    run(go)


def test_what_could_not_be_compiled_is_not_linked(tokenizer) -> None:
    async def go() -> None:
        front = Front(tokenizer)
        front.compiler.outcome = FAILED
        for _ in range(2):
            assert await front.ask(stuffed(1)) == []
        assert len(front.compiler.items) == 1
        finder = front.finding._finder(None, remember=True)
        assert not finder._ready._names.any()

    run(go)


# -- which requests -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pic", "fields"),
    [
        ({"find": "off"}, {}),
        ({"require_exact": True, "find": "content"}, {}),
        ({"link": False}, {}),
        ({"policy": "full"}, {}),
        (None, {"image_data": ["x"]}),
    ],
)
def test_what_is_not_searched(tokenizer, pic: Any, fields: dict[str, Any]) -> None:
    async def go() -> None:
        front = Front(tokenizer)
        for _ in range(3):
            assert await front.ask(stuffed(1), pic, **fields) == []
        assert not front.compiler.items and not front.finding._finders

    run(go)


def test_off_is_off_and_a_request_may_ask(tokenizer) -> None:
    async def go() -> None:
        front = Front(tokenizer, find="off")
        for _ in range(3):
            assert await front.ask(stuffed(1)) == []
        assert not front.finding._finders and not front.finding.is_asked(None)
        for _ in range(3):
            linked = await front.ask(stuffed(1), {"find": "structure"})
        assert linked == [inner(PASSAGES[1])] and front.finding.is_asked({"find": "content"})
        front.is_linking = False
        assert await front.ask(stuffed(1), {"find": "structure"}) == []
        with pytest.raises(PicRequestError, match=r"pic\.find"):
            front.finding.is_asked({"find": "everything"})

    run(go)


def test_token_ids_are_cut_by_content_alone(tokenizer) -> None:
    async def go() -> None:
        ids = tokenizer(" ".join(PASSAGES[:8]))["input_ids"]
        for mode, expected in (("structure", False), ("content", True)):
            front = Front(tokenizer, find=mode)
            for i in range(3):
                linked = await front.ask([i + 5, *ids])
            assert bool(linked) == expected
            both = await front.ask_all([[9, *ids], [8, *ids]])
            assert all(map(bool, both)) if expected else both == [[], []]

    run(go)


@pytest.mark.parametrize(
    ("pic", "none"),
    [
        (None, True),
        ({}, True),
        ({"find": "content", "segments": []}, True),
        ({"segments": [{"start": 0, "end": 1}]}, False),
        ({"parts": ["a"]}, False),
        ([None, {"find": "content"}], True),
        ([None, {"parts": ["a"]}], False),
        (["x"], False),
    ],
)
def test_which_requests_name_no_segment(pic: Any, none: bool) -> None:
    assert names_none(pic) == none


def test_an_operators_own_rules_come_first(tokenizer, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"chapter": r"(?s)^Chapter\..*?^End\."}))

    async def go() -> None:
        front = Front(tokenizer, find_rules=str(path))
        text = f"Chapter.\n{PASSAGES[0]}\n\n{PASSAGES[1]}\nEnd."
        for i in range(3):
            linked = await front.ask(f"{i}\n{text}")
        assert linked == [inner(text)]

    run(go)
    path.write_text("[]")
    for bad in (path, tmp_path / "gone"):
        with pytest.raises(PicConfigError):
            rules_with(str(bad))
    with pytest.raises(PicConfigError, match="find"):
        PicConfig(find="all")


# -- what is told -------------------------------------------------------------------------


def test_a_report_says_how_each_segment_was_found(tokenizer, counts: Counts) -> None:
    async def go() -> Found:
        front = Front(tokenizer)
        for _ in range(2):
            await front.ask(stuffed(1, 2))
        found = front.finding.search(GenerateReqInput(text=stuffed(1, 2)), None, None)
        assert found is not None
        return found[0]

    found = asyncio.run(go())
    segments: Any = [
        {"reason": "hit", "tokens_reused": 70, "found": "marked"},
        {"reason": "evicted", "tokens_reused": 0, "found": "marked"},
    ]
    report = {"segments": segments}
    told = as_found(report, found.how)
    assert [one["found"] for one in told["segments"]] == ["structure", "structure"]
    assert segments[0]["found"] == "marked"
    found.see(told)
    assert counts.chunks_linked == {"paragraph": 1} and counts.tokens_found == {"paragraph": 70}


def test_each_report_of_a_batch_goes_to_its_own_prompt() -> None:
    """Two prompts with two samples each, whole and as a stream."""

    class Told:
        def __init__(self, how: list[str]) -> None:
            self.how = how
            self.seen: list[Any] = []

        def see(self, report: Any) -> None:
            self.seen.append([one["found"] for one in report["segments"]])

    def out(i: int) -> dict[str, Any]:
        report = {"segments": [{"found": "marked"}] * (1 if i < 2 else 2), "exactness": "composed"}
        return {"index": i, "meta_info": {"pic": [report], "id": f"{i}"}}

    whole = [out(i) for i in range(4)]
    for outs in ([whole], [out(i) for i in (2, 0, 3, 1)]):
        told = [Told(["structure"]), Told(["content", "structure"])]
        counted: set[int] = set()
        with mock.patch.object(answers_module, "counts"):
            for one in outs:
                tidy(one, None, counted, [NOTHING] * 2, 2, told)
        assert [one.seen for one in told] == [[one.how] * 2 for one in told]


def test_a_body_without_our_fields_stays_as_it_is() -> None:
    raw = b'{"messages": [], "stream_options": {"include_usage" : true}}'
    body, exchange = take("/v1/chat/completions", raw, PicConfig().link_defaults)
    assert body is raw and exchange.usage_chunk and exchange.pic is exchange.find is None
    said = json.dumps({"messages": [{"content": '"include_usage": true'}]}).encode()
    assert not take("/v1/chat/completions", said, PicConfig().link_defaults)[1].usage_chunk
    asked = b'{"messages": [], "pic": {"find": "content", "seam": 8}}'
    _, exchange = take("/v1/chat/completions", asked, PicConfig().link_defaults)
    assert exchange.pic is None and exchange.find == {"find": "content", "seam": 8}
    with pytest.raises(PicRequestError, match=r"pic\.find"):
        take("/v1/chat/completions", b'{"pic": {"find": 3}}', PicConfig().link_defaults)


# -- chats --------------------------------------------------------------------------------


def cut(front: Front, chat: Chat, body: dict[str, Any]) -> tuple[list[int], dict[str, set[str]]]:
    """A chat's prompt, and the texts of its cuts by rule."""
    exchange = Exchange()
    funnel = types.SimpleNamespace(finding=front.finding, resolver=front.resolver)
    request = ChatCompletionRequest(model="x", **copy.deepcopy(body))
    with (
        mock.patch.object(chat_module, "funnel_of", lambda manager: funnel),
        mock.patch.object(chat_module, "is_enabled", lambda: True),
        carry(exchange),
    ):
        result = chat._apply(request, chat_module.build)
    found: dict[str, set[str]] = {}
    for one in exchange.cuts:
        text = chat.tokenizer.decode(result.prompt_ids[one.start : one.end])
        found.setdefault(one.rule, set()).add(text)
    return result.prompt_ids, found


def orders(front: Front, chat: Chat, make: Callable[..., Any], rules: Sequence[str]) -> None:
    """What ``make`` gives of three things in any order is cut alike by these rules, and the
    prompt is SGLang's own."""
    before: dict[str, set[str]] = {}
    for order in itertools.permutations(range(3)):
        body = make(order)
        ids, found = cut(front, chat, body)
        assert ids == chat.stock(copy.deepcopy(body))
        before = before or found
        for rule in rules:
            assert found[rule] == before[rule] and len(found[rule]) >= 3


PAIRS = [f"{PASSAGES[i]}\n\n{PASSAGES[i + 3]}" for i in range(3)]


@pytest.mark.parametrize("name", SHIPPED)
def test_structure_survives_another_order_in_every_template(tokenizer, name: str) -> None:
    chat = Chat(tokenizer, SHIPPED[name] or tokenizer.chat_template)
    front = Front(chat.tokenizer, min_segment=8)

    def parts(order: Sequence[int]) -> dict[str, Any]:
        content = [{"type": "text", "text": PAIRS[i]} for i in order]
        return {"messages": [{"role": "user", "content": content}]}

    def turns(order: Sequence[int]) -> dict[str, Any]:
        roles = ("user", "assistant", "user")
        made = zip(roles, order, strict=True)
        # In parts: a template for images shows no other text.
        content = ([{"type": "text", "text": PAIRS[i]}] for _, i in made)
        return {
            "messages": [{"role": r, "content": c} for r, c in zip(roles, content, strict=True)]
        }

    orders(front, chat, parts, ("part", "paragraph"))
    orders(front, chat, turns, ("part", "paragraph"))


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_survive_another_order_in_every_template(tokenizer, name: str) -> None:
    chat = Chat(tokenizer, WITH_TOOLS[name])
    front = Front(chat.tokenizer, min_segment=8)

    def tools(order: Sequence[int]) -> dict[str, Any]:
        messages = [{"role": "user", "content": PASSAGES[0]}]
        return {"messages": messages, "tools": [TOOLS[i] for i in order]}

    orders(front, chat, tools, ("tool",))
    assert cut(front, chat, tools(range(3)))[1]["message"] == {inner(PASSAGES[0])}


def test_a_prompt_without_a_text_is_left_to_sglang(tokenizer) -> None:
    chat = Chat(tokenizer, SHIPPED["llama4"])
    front = Front(chat.tokenizer)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": PASSAGES[0]}]}
    slow = types.SimpleNamespace(is_fast=False)
    with mock.patch.object(front.resolver._manager, "tokenizer", slow):
        ids, found = cut(front, chat, body)
    assert ids == chat.stock(body) and not found
    off = Front(chat.tokenizer, find="off")
    assert cut(off, chat, body) == (ids, {})


# -- a real server ------------------------------------------------------------------------

BRIEF = {"max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def finding(tmp_path_factory: pytest.TempPathFactory, logs: pathlib.Path) -> Iterator[Server]:
    """Finds by content and structure in whatever comes; its template writes tools."""
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    template.write_text(TEMPLATE)
    flags = ("--max-total-tokens=16384", "--pic-find=content", "--pic-company-when=asked")
    path = f"--chat-template={template}"
    with serve(ensure_model(), logs / "finding.log", *flags, path, env=CHECKS) as server:
        yield server


def settled(server: Server, compiled: int = 0) -> dict[str, Any]:
    """The front's counters, once so many chunks have been compiled in idle time, and nothing
    is any more."""
    for _ in range(300):
        time.sleep(0.2)
        counters = server.get("/pic/stats").json()["front"]
        done = sum(counters["chunks_compiled"].values())
        if not counters["compiling"] and done >= compiled:
            return counters
    raise AssertionError("still compiling")


def chat_of(numbers: Sequence[int], salt: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": stuffed(*numbers)}]
    return {"model": "m", "messages": messages, "cache_salt": salt, **BRIEF, **fields}


def told(server: Server, path: str, body: dict[str, Any]) -> Any:
    """Its report, or ``None``."""
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return (usage or {}).get("pic")


@pytest.mark.server
def test_a_plain_client_is_linked(finding: Server) -> None:
    path = "/v1/chat/completions"
    assert told(finding, path, chat_of((0, 1, 2), "a")) is None
    settled(finding)
    assert told(finding, path, chat_of((1, 0, 3), "a")) is None
    before = settled(finding, 2)
    # Of another tenant nothing is known, nor that it was ever seen.
    assert told(finding, path, chat_of((1, 0), "b")) is None
    report = told(finding, path, chat_of((4, 1, 0), "a"))
    assert report["exactness"] == "composed"
    # No segment was waited for, only the text in front of them.
    assert [one["segment"] for one in report["waited_for"]] == [None]
    assert [one["found"] for one in report["segments"]] == 2 * ["structure"]
    assert [one["reason"] for one in report["segments"]] == 2 * ["hit"]
    after = settled(finding)
    linked = after["chunks_linked"].get("paragraph", 0) - before["chunks_linked"].get(
        "paragraph", 0
    )
    assert linked == 2 and after["tokens_found"]["paragraph"] > 100
    # Told to be exact, it is.
    assert told(finding, path, chat_of((0, 1), "a", pic={"require_exact": True})) is None
    assert told(finding, path, chat_of((0, 1), "a", pic={"find": "off"})) is None
    bad = finding.post(path, chat_of((0, 1), "a", pic={"find": "all"}))
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "pic.find")


@pytest.mark.server
def test_every_route_is_searched(finding: Server) -> None:
    """Streams too: each tells its report where its kind of answer has one."""
    salt = "routes"
    for _ in range(2):
        assert told(finding, "/v1/chat/completions", chat_of((5, 6), salt)) is None
        settled(finding)
    text = {"prompt": stuffed(6, 5), "cache_salt": salt, "model": "m", **BRIEF}
    assert len(told(finding, "/v1/completions", text)["segments"]) == 2
    sampling = {"max_new_tokens": 4, "temperature": 0}
    out = finding.generate(text=stuffed(5, 6), cache_salt=salt, sampling_params=sampling)
    assert len(out["meta_info"]["pic"]["segments"]) == 2
    for usage in ({}, {"stream_options": {"include_usage": True}}):
        streamed = finding.post(
            "/v1/chat/completions", chat_of((6, 5), salt, stream=True, **usage)
        ).text
        chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line[:7] == "data: {"]
        reports = [chunk.get("pic") or (chunk.get("usage") or {}).get("pic") for chunk in chunks]
        assert sum(report is not None for report in reports) == 1 and reports[-1] is not None
    batch = [stuffed(5, 6), stuffed(6, 9)]
    answers = finding.generate(text=batch, cache_salt=[salt, salt], sampling_params=sampling)
    found = [[one["found"] for one in a["meta_info"]["pic"]["segments"]] for a in answers]
    assert found == [2 * ["structure"], ["structure"]]
    prompts = {**text, "prompt": [stuffed(5, 6), stuffed(10)], "n": 2}
    reports = told(finding, "/v1/completions", prompts)
    assert [len(one["segments"]) for one in reports] == [2, 2, 0, 0]
    # Where nothing of it is linked a batch goes on as it came.
    nothing = [stuffed(10), stuffed(11)]
    answers = finding.generate(text=nothing, cache_salt="none", sampling_params=sampling)
    assert not any("pic" in one["meta_info"] for one in answers)


def _of_messages(turn: int) -> dict[str, Any]:
    parts = [{"type": "text", "text": text} for text in (f"Look {turn}.", PASSAGES[7])]
    call = {"type": "tool_use", "id": "c", "name": "look", "input": {"x": 1}}
    result = {"type": "tool_result", "tool_use_id": "c", "content": PASSAGES[8]}
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    return {"max_tokens": 4, "system": f"Turn {turn}.", "messages": messages}


def _of_responses(turn: int) -> dict[str, Any]:
    parts = [{"type": "input_text", "text": text} for text in (f"Look {turn}.", PASSAGES[9])]
    given = [
        {"role": "user", "content": parts},
        {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": PASSAGES[10]},
    ]
    return {"max_output_tokens": 4, "store": False, "instructions": f"Turn {turn}.", "input": given}


@pytest.mark.server
@pytest.mark.parametrize(
    ("path", "body_of"), [("/v1/messages", _of_messages), ("/v1/responses", _of_responses)]
)
def test_parts_and_tool_results_of_other_apis_are_found(
    finding: Server, path: str, body_of: Callable[[int], dict[str, Any]]
) -> None:
    model = finding.get("/v1/models").json()["data"][0]["id"]
    for turn in range(3):
        report = told(finding, path, {**body_of(turn), "model": model})
        settled(finding)
    assert len(report["segments"]) >= 2
    assert {one["reason"] for one in report["segments"]} == {"hit"}
    # More than one of the two texts.
    assert report["tokens_reused"] > 110 and report["segments"][0]["found"] == "structure"
    streamed = finding.post(path, {**body_of(3), "model": model, "stream": True}).text
    assert streamed.count('"reason":"hit"') >= 2


@pytest.mark.server
def test_beside_marks_more_is_found(finding: Server) -> None:
    for turn in range(3):
        parts = [f"Turn {turn}.", PASSAGES[11], "And:", PASSAGES[0]]
        content: Any = [{"type": "text", "text": text} for text in parts]
        content[1]["pic_segment"] = True
        messages = [{"role": "user", "content": content}]
        body = chat_of((), "beside", messages=messages, pic={"find": "structure"})
        report = told(finding, "/v1/chat/completions", body)
        settled(finding)
    assert [one["found"] for one in report["segments"]] == ["marked", "structure"]
    assert {one["reason"] for one in report["segments"]} == {"hit"}
    explained = finding.post("/pic/explain", body).json()
    assert [one["found"] for one in explained["segments"]] == ["marked", "structure"]
    assert sum(cut["linked"] for cut in explained["cuts"]) == 1
    report = told(finding, "/v1/chat/completions", {**body, "pic": {"find": "off"}})
    assert [one["found"] for one in report["segments"]] == ["marked"]


@pytest.mark.server
def test_tools_in_another_order_are_linked(finding: Server) -> None:
    body = chat_of((), "tools")
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        body["messages"] = [{"role": "user", "content": f"Order {order}?"}]
        body["tools"] = [TOOLS[i] for i in order]
        report = told(finding, "/v1/chat/completions", body)
        settled(finding)
    explained = finding.post("/pic/explain", body).json()
    cuts = [cut for cut in explained["cuts"] if cut["rule"] == "tool"]
    assert len(cuts) == 3 and all(set(cut) >= {"start", "end", "times", "linked"} for cut in cuts)
    assert {one["found"] for one in report["segments"]} == {"structure"}
    assert len(report["segments"]) >= 2
    # Marked ones are the client's.
    body["tools"] = [{**tool, "pic_segment": True} for tool in body["tools"]]
    report = told(finding, "/v1/chat/completions", body)
    assert [one["found"] for one in report["segments"]] == 3 * ["marked"]


@pytest.mark.server
def test_where_nothing_recurs_an_answer_is_stocks(finding: Server) -> None:
    """The same tokens go in, and the very same come out as with nothing looked for."""
    seeds = random.Random(3)
    words = " ".join(PASSAGES).split()
    for i in range(6):
        text = "\n\n".join(" ".join(seeds.choices(words, k=60)) for _ in range(3))
        made = {}
        for mode in ("content", "off"):
            body = {
                "text": text,
                "pic": {"find": mode} if mode == "off" else None,
                "cache_salt": f"same-{mode}-{i}",
                "sampling_params": {"max_new_tokens": 6, "temperature": 0},
                "return_logprob": True,
            }
            out = finding.generate(**{name: one for name, one in body.items() if one is not None})
            meta = out["meta_info"]
            logprobs = [token for _, token, *_ in meta["output_token_logprobs"]]
            made[mode] = (out["text"], meta["prompt_tokens"], logprobs)
        assert made["content"] == made["off"]
    assert finding.forest()["integrity"] == "ok"
