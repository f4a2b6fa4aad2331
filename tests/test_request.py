"""``pic`` fields, tokenisation at segment edges, and chat marks."""

from __future__ import annotations

import itertools
import pathlib
import string
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sglang_pic.errors import PicRequestError
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import TokenSpan
from sglang_pic.request.fields import MAX_SEGMENTS, check_inside, parse_fields
from sglang_pic.request.hints import find_action, pic_hints
from sglang_pic.request.tokenize import encode_marked, usual_rule
from sglang_pic.server.marks import mark_messages
from sglang_pic.server.resolve import Resolver

DEFAULTS = LinkOptions()
# What this model's vocabulary spells: it has no token for most control characters.
ALPHABET = string.ascii_letters + string.digits + string.punctuation + " \n\té漢"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pathlib.Path(ensure_model()))


def segments(*pairs: tuple) -> dict:
    return {"segments": [{"start": a, "end": b} for a, b in pairs]}


BAD = [
    (17, "pic"),
    ([], "pic"),
    ({"segment": []}, "pic.segment"),
    ({"segments": 3}, "pic.segments"),
    ({"segments": [[0, 3]]}, "pic.segments[0]"),
    ({"segments": [{"start": 0}]}, "pic.segments[0]"),
    ({"segments": [{"start": 0, "end": 3, "id": 1}]}, "pic.segments[0]"),
    (segments(("0", 3)), "pic.segments[0].start"),
    (segments((0, 3.5)), "pic.segments[0].end"),
    (segments((True, 3)), "pic.segments[0].start"),
    (segments((-1, 3)), "pic.segments[0].start"),
    (segments((5, 3)), "pic.segments[0].end"),
    (segments((0, 3), (2, 5)), "pic.segments[1].start"),
    (segments((4, 5), (0, 3)), "pic.segments[1].start"),
    (segments(*((i, i + 1) for i in range(10_000))), "pic.segments"),
    ({"seam": -1}, "pic.seam"),
    ({"seam": True}, "pic.seam"),
    ({"seam": "16"}, "pic.seam"),
    ({"seam": 10**30}, "pic.seam"),
    ({"policy": "lucky"}, "pic.policy"),
    ({"policy": ["seam"]}, "pic.policy"),
    ({"mode": 3}, "pic.mode"),
    ({"require_exact": 1}, "pic.require_exact"),
    ({"link": "no"}, "pic.link"),
    ({"tokenize": "bytes"}, "pic.tokenize"),
    ({"parts": []}, "pic.parts"),
    ({"parts": "text"}, "pic.parts"),
    ({"parts": [3]}, "pic.parts[0]"),
    ({"parts": [{"text": "x"}]}, "pic.parts[0]"),
    ({"parts": [{"segment": 3}]}, "pic.parts[0]"),
    ({"parts": ["x"], "segments": []}, "pic.parts"),
]


@pytest.mark.parametrize(("pic", "field"), BAD, ids=lambda value: str(value)[:60])
def test_bad_fields_are_named(pic, field: str) -> None:
    with pytest.raises(PicRequestError) as caught:
        parse_fields(pic, DEFAULTS)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "segments",
                    "start",
                    "end",
                    "parts",
                    "segment",
                    "seam",
                    "policy",
                    "mode",
                    "link",
                    "x",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_parsed_or_refused(pic) -> None:
    try:
        fields = parse_fields(pic, DEFAULTS)
    except PicRequestError:
        return
    assert len(fields.ranges) <= MAX_SEGMENTS
    assert all(a.end <= b.start for a, b in zip(fields.ranges, fields.ranges[1:], strict=False))


def test_ranges_outside_the_prompt() -> None:
    with pytest.raises(PicRequestError, match=r"pic.segments\[1\].end: 8 lies outside .* 7 tokens"):
        check_inside((TokenSpan(0, 2), TokenSpan(3, 8)), 7, "tokens")


def test_public_hints_round_trip() -> None:
    assert find_action(pic_hints(seam=3), "pic") == {"seam": 3}


def test_pieces_never_depend_on_their_neighbours(tokenizer) -> None:
    document = "The tower of Hanoi has three rods.\n"
    ids = []
    for before, behind in [("", ""), ("See: ", " And?"), ("x", "x"), ("\n\n", "1")]:
        text = before + document + behind
        chars = (TokenSpan(len(before), len(before) + len(document)),)
        tokens, (span,) = encode_marked(tokenizer, text, chars, rule="pieces")
        ids.append(tokens[span.start : span.end])
        assert tokenizer.decode(tokens) == text
    assert all(one == ids[0] for one in ids)


def test_whole_is_stocks_prompt(tokenizer) -> None:
    text = "Look: the tower of Hanoi has three rods, hasn't it?"
    chars = (TokenSpan(6, 39),)
    tokens, (span,) = encode_marked(tokenizer, text, chars, rule="whole")
    assert tokens == tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens[span.start : span.end]) in text[6:39]


def test_the_rules_differ_where_a_token_straddles_an_edge(tokenizer) -> None:
    """'the tower' behind 'x ' : the space belongs to the word's token."""
    text = "x the tower stands"
    chars = (TokenSpan(2, 11),)
    pieces, _ = encode_marked(tokenizer, text, chars, rule="pieces")
    whole, (span,) = encode_marked(tokenizer, text, chars, rule="whole")
    assert pieces != whole
    assert tokenizer.decode(whole[span.start : span.end]) == " tower"


def test_a_segment_without_a_token_of_its_own_is_empty(tokenizer) -> None:
    tokens, (span,) = encode_marked(tokenizer, "international", (TokenSpan(2, 4),), rule="whole")
    assert tokens == tokenizer("international")["input_ids"]
    assert span.start == span.end


@settings(deadline=None)
@given(parts=st.lists(st.tuples(st.booleans(), st.text(ALPHABET, max_size=12)), max_size=6))
@pytest.mark.parametrize("rule", ["pieces", "whole"])
def test_tokens_always_spell_the_text(tokenizer, rule: str, parts) -> None:
    text, chars = "", []
    for marked, part in parts:
        if marked:
            chars.append(TokenSpan(len(text), len(text) + len(part)))
        text += part
    tokens, spans = encode_marked(tokenizer, text, tuple(chars), rule=rule)
    assert tokenizer.decode(tokens).encode(errors="ignore") == text.encode(errors="ignore")
    assert len(spans) == len(chars)
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))


def spaced(prepend: str):
    """A tokenizer of characters that writes spaces as SentencePiece does."""
    letters = "\u2581" + string.ascii_letters + string.digits + string.punctuation + "\n"
    made = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = Metaspace(prepend_scheme=prepend, split=False)
    made.decoder = MetaspaceDecoder(prepend_scheme=prepend)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def resolver_of(tokenizer) -> Resolver:
    model = types.SimpleNamespace(context_len=1000)
    return Resolver(types.SimpleNamespace(tokenizer=tokenizer, model_config=model), DEFAULTS)


def test_parts_of_a_program_are_its_prompt(tokenizer) -> None:
    """``pic_hints(parts=...)`` of ``sgl.Engine``, whose own prompt is left empty."""
    resolver = resolver_of(tokenizer)
    parts = {"parts": ["See: ", {"segment": "a document\n"}, "And?"]}
    ids, link = resolver.one("", None, parts)
    assert tokenizer.decode(ids) == "See: a document\nAnd?"
    (span,) = link.spans
    assert tokenizer.decode(ids[span.start : span.end]) == "a document\n"
    assert resolver.one(None, [], parts) == (ids, link)
    for prompt in (("text", None), (None, [1, 2])):
        with pytest.raises(PicRequestError, match=r"pic\.parts"):
            resolver.one(*prompt, parts)


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_a_tokenizer_that_adds_spaces_reads_prompts_whole(prepend: str) -> None:
    tokenizer = spaced(prepend)
    resolver = resolver_of(tokenizer)
    rule = "pieces" if prepend == "never" else "whole"
    assert resolver.usual.rule == rule
    document = "the tower stands"
    for before, behind in (("Read:\n", "\nWhy?"), ("\n", ""), ("See:\n\n", "x")):
        text = before + document + behind
        chars = segments((len(before), len(before) + len(document)))
        ids, link = resolver.one(text, None, chars)
        (span,) = link.spans
        assert tokenizer.decode(ids) == text
        assert ids[span.start : span.end] == resolver.segment(document)
        assert ids == tokenizer(text)["input_ids"]
        named = {**chars, "tokenize": "pieces"}
        if rule == "pieces":
            assert resolver.one(text, None, named)[0] == ids
        else:
            with pytest.raises(PicRequestError, match=r"pic\.tokenize: .* use 'whole'"):
                resolver.one(text, None, named)


def test_usual_rules(tokenizer) -> None:
    assert usual_rule(tokenizer).rule == usual_rule(None).rule == "pieces"
    assert "no tokenizer" in usual_rule(None).why


def test_exact_prompts_are_stocks(tokenizer) -> None:
    text = "x the tower stands"
    chars = segments((2, 11))
    stock = tokenizer(text)["input_ids"]
    resolver = resolver_of(tokenizer)
    assert resolver.one(text, None, chars)[0] != stock
    ids, link = resolver.one(text, None, {**chars, "require_exact": True})
    assert ids == stock and len(link.spans) == 1
    assert (
        resolver.one(text, None, {**chars, "require_exact": True, "tokenize": "pieces"})[0]
        == resolver.one(text, None, chars)[0]
    )
    # A slow tokenizer cannot say where its tokens lie; nothing is linked anyway.
    slow = resolver_of(_Framing())
    ids, link = slow.one("abcd", None, {**segments((0, 2)), "require_exact": True})
    assert (ids, link.spans) == ([1, 97, 98, 99, 100, 2], ())
    with pytest.raises(PicRequestError, match="fast tokenizer"):
        slow.one("abcd", None, {**segments((0, 2)), "tokenize": "whole"})


def test_empty_ranges_cut_no_text(tokenizer) -> None:
    text = "the tower stands"
    ids, spans = encode_marked(tokenizer, text, (TokenSpan(3, 3), TokenSpan(6, 6)), rule="pieces")
    assert ids == tokenizer(text)["input_ids"] and spans == (TokenSpan(0, 0),) * 2
    ranges = (TokenSpan(0, 0), TokenSpan(4, 9), TokenSpan(12, 12))
    some, spans = encode_marked(tokenizer, text, ranges, rule="pieces")
    assert some == encode_marked(tokenizer, text, ranges[1:2], rule="pieces")[0]
    assert spans[0] == TokenSpan(spans[1].start, spans[1].start)
    assert spans[2] == TokenSpan(spans[1].end, spans[1].end)
    fields = parse_fields({"parts": ["a", {"segment": ""}, {"segment": "b"}]}, DEFAULTS)
    assert fields.ranges == (TokenSpan(1, 1), TokenSpan(1, 2))


class _Framing:
    """A slow tokenizer that frames every text with BOS and EOS."""

    is_fast = False

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        ids = [ord(c) for c in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_special_tokens_stay_outside_segments() -> None:
    ids, spans = encode_marked(_Framing(), "abcd", (TokenSpan(0, 2),), rule="pieces")
    assert ids == [1, 97, 98, 99, 100, 2]
    assert spans == (TokenSpan(1, 3),)


def test_marks_are_places() -> None:
    messages = [
        {"role": "system", "content": "S", "pic_segment": True},
        {
            "role": "user",
            "pic_segment": None,
            "content": [
                {"type": "text", "text": "D", "pic_segment": True},
                {"type": "text", "text": "E", "pic_segment": False},
                {"type": "text", "text": "F"},
            ],
        },
    ]
    marks = mark_messages(messages, [{"message": 1, "part": 2}])
    assert marks is not None
    assert [(mark.field, mark.text) for mark in marks.all] == [
        ("messages[0].content", "S"),
        ("messages[1].content[0].text", "D"),
        ("messages[1].content[2].text", "F"),
    ]
    assert "pic_segment" not in str(messages)
    assert mark_messages([{"role": "user", "content": "x"}], []) is None


@pytest.mark.parametrize(
    ("messages", "named", "field"),
    [
        ([{"content": "x", "pic_segment": 1}], [], "messages[0].pic_segment"),
        ([{"content": None, "pic_segment": True}], [], "messages[0].content"),
        ([{"content": [{"text": "x"}], "pic_segment": True}], [], "messages[0].content"),
        (
            [{"content": "x", "pic_segment": True} for _ in range(MAX_SEGMENTS + 1)],
            [],
            f"messages[{MAX_SEGMENTS}].content",
        ),
        ([{"content": [{"text": 3, "pic_segment": True}]}], [], "messages[0].content[0].text"),
        ([{"content": "x"}], [{"message": 4}], "pic.segments"),
        ([{"content": "x"}], [{"start": 0, "end": 1}], "pic.segments[0]"),
        ([{"content": "x"}], [{"message": "0"}], "pic.segments[0]"),
        ([{"content": "x"}], {"message": 0}, "pic.segments"),
    ],
)
def test_bad_marks_are_named(messages, named, field: str) -> None:
    with pytest.raises(PicRequestError) as caught:
        mark_messages(messages, named)
    assert caught.value.field == field
