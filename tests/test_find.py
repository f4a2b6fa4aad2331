"""Where prompts are cut, and what of them recurs: the same text is cut at the same places
wherever it stands, and nothing recurs that is the prefix cache's."""

from __future__ import annotations

import ast
import itertools
import json
import pathlib
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sglang_pic.find
from sglang_pic.errors import PicConfigError
from sglang_pic.eval.passages import load_passages
from sglang_pic.find.base import CONTENT, STRUCTURE, Cut
from sglang_pic.find.content import LENGTHS, Lengths, chunks
from sglang_pic.find.cutting import MAX_CUTS, Cutter
from sglang_pic.find.rendered import chat_cuts, regions_of, tools_in
from sglang_pic.find.seen import Named, Seen, named
from sglang_pic.find.sketch import HALF_LIFE, MOST, Sketch
from sglang_pic.find.spans import beside, settled, token_cuts
from sglang_pic.find.structure import MESSAGE, PART, RULES, TOOL, own_rules, structure
from sglang_pic.find.worth import apart, worth

PASSAGES = [passage.text for passage in load_passages()]
WORDS = " ".join(PASSAGES).split()


def texts_of(text: str, rule: str | None = None, **kwargs: object) -> list[str]:
    cuts = structure(text, [(0, len(text))], **kwargs)  # type: ignore[arg-type]
    return [text[cut.start : cut.end] for cut in cuts if rule in (None, cut.rule)]


# -- structure ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "text", "blocks"),
    [
        ("element", "<doc>A b.</doc>\n<doc id=3>C</doc>", ["A b.", "C"]),
        ("element", "<documents>\n<document>A</document>\n</documents>", 2 * ["A"]),
        ("element", "a <Context>B</context> </context> <context>", ["B"]),
        ("heading", "Intro.\n# One\nA.\n## Two\nB.", ["Intro.", "# One\nA.", "## Two\nB."]),
        ("heading", "#hash and # none", []),
        ("rule", "A\n---\nB\n\n* * *\n====\nC", ["A", "B\n\n* * *", "C"]),
        ("list", "Read.\nDocument 1: A\nmore\nDocument [2] B", ["A\nmore", "B"]),
        ("list", "[1] A\n[2]: B\n", ["A", "B"]),
        ("list", "1. A\n2) B", ["A", "B"]),
        ("list", "In 1990. he\n3.5 m", []),
        ("json", 'x = [{"a": [1, {}]} , {"b": "}"}]; [3]', ['{"a": [1, {}]}', '{"b": "}"}']),
        ("json", '[{"a": ', []),
        ("paragraph", "A\nb\n\n \nC\r\n\r\nD", ["A\nb", "C", "D"]),
    ],
)
def test_rules(rule: str, text: str, blocks: list[str]) -> None:
    (one,) = (one for one in RULES if one.name == rule)
    made = texts_of(text, rules=[one])
    if "documents" in text:
        blocks = ["A", "<document>A</document>"]
    assert made == blocks


def test_a_block_is_cut_within_what_holds_it() -> None:
    text = "<doc># A\none\n\ntwo</doc>\n\n<doc>three</doc>"
    assert texts_of(text, "element") == ["# A\none\n\ntwo", "three"]
    assert texts_of(text, "paragraph", shortest=6) == ["# A\none", *2 * ["</doc>"]]
    assert texts_of("<doc>A</doc>\nWhy so?", "paragraph", shortest=6) == ["</doc>\nWhy so?"]


def test_what_names_a_block_by_its_place_is_outside() -> None:
    """Documents in another order, under other numbers, are the same blocks."""

    def prompt(order: list[int]) -> str:
        listed = (f"Document {i}: {PASSAGES[n]}" for i, n in enumerate(order, 1))
        return "Answer from these.\n\n" + "\n\n".join(listed)

    one, other = (texts_of(prompt(order), "list") for order in ([0, 1, 2], [2, 0, 1]))
    assert sorted(one) == sorted(other) == sorted(PASSAGES[:3])


def pieces() -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(PASSAGES), min_size=2, max_size=6, unique=True)


RENDERINGS = {
    "element": lambda texts: "".join(f'<document id="{i}">\n{t}\n</document>' for i, t in texts),
    "heading": lambda texts: "\n".join(f"# {t}" for _, t in texts),
    "rule": lambda texts: "".join(f"\n---\n{t}" for _, t in texts),
    "list": lambda texts: "\n".join(f"[{i}] {t}" for i, t in texts),
    "json": lambda texts: json.dumps([{"text": t} for _, t in texts]),
    "paragraph": lambda texts: "\n\n".join(t for _, t in texts),
}


@pytest.mark.parametrize("rule", RENDERINGS)
@given(texts=pieces(), seed=st.integers(0, 99), before=st.sampled_from(["", "Read.\n\n"]))
def test_structure_survives_another_order(
    rule: str, texts: list[str], seed: int, before: str
) -> None:
    other = random.Random(seed).sample(texts, len(texts))
    cut, again = (
        set(texts_of(before + RENDERINGS[rule](enumerate(order, 1)), rule))
        for order in (texts, other)
    )
    assert len(cut) >= len(texts) and cut ^ again <= {"Read."}


SOUP = st.lists(
    st.sampled_from(
        [
            "<doc>",
            "</doc>",
            "<context a=b>",
            "</context>",
            "# H",
            "\n",
            "\n\n",
            "---",
            " ",
            "a b",
            "Document 3:",
            "[2] ",
            '[{"a": 1}, ',
            "{",
            "}",
            "]",
            "word",
            '"',
            "\t",
            "é🜂",
        ]
    ),
    max_size=60,
).map("".join)


@given(SOUP, st.integers(0, 30), st.integers(0, 60))
def test_cuts_are_nested_or_apart_and_without_white_space(text: str, a: int, b: int) -> None:
    regions = sorted({(0, min(a, len(text))), (min(a, len(text)), min(a + b, len(text)))})
    regions = [(start, end) for start, end in regions if start < end]
    cuts = structure(text, regions)
    for cut in cuts:
        block = text[cut.start : cut.end]
        assert block and block == block.strip()
        assert any(start <= cut.start and cut.end <= end for start, end in regions)
        for other in cuts:
            inside = cut.start <= other.start and other.end <= cut.end
            around = other.start <= cut.start and cut.end <= other.end
            assert inside or around or other.end <= cut.start or cut.end <= other.start


@pytest.mark.parametrize(
    "text",
    ["<doc>", "<doc ", "</doc>", '[{"a":', "[" + " " * 50, "[ {", "\n\n", "# a\n", "Document 1:\n"],
)
def test_no_text_takes_long(text: str) -> None:
    """Every rule is linear, also of what looks like its blocks and is none."""
    start = time.process_time()
    long = text * (400_000 // len(text))
    assert len(structure(long, [(0, len(long))])) <= MAX_CUTS * len(RULES)
    tools_in(long, ["a"])
    assert time.process_time() - start < 4


def test_an_operators_own_rules() -> None:
    rules = own_rules({"ticket": r"^TICKET \d+\n(?P<block>(?s:.*?))^END$", "quote": "> .*"})
    text = "TICKET 3\n> a\nb\nEND\n"
    assert texts_of(text, rules=rules) == ["> a\nb", "> a"]
    for patterns, word in (
        ({"list": "x"}, "of its own"),
        ({"My rule": "x"}, "of its own"),
        ({CONTENT: "x"}, "of its own"),
        ({"x": "("}, "rule x"),
        ({"x": 3}, "rule x"),
    ):
        with pytest.raises(PicConfigError, match=word):
            own_rules(patterns)  # type: ignore[arg-type]


# -- chats ----------------------------------------------------------------------------

TOOLS = [
    {"type": "function", "function": {"name": f"look_{i}", "description": text[:80] + '"{'}}
    for i, text in enumerate(PASSAGES[:5])
]
NAMES = [tool["function"]["name"] for tool in TOOLS]  # type: ignore[index]


@pytest.mark.parametrize(
    "render",
    [
        lambda tools: "<tools>\n" + "\n".join(map(json.dumps, tools)) + "\n</tools>",
        lambda tools: f"[AVAILABLE_TOOLS] {json.dumps(tools)}[/AVAILABLE_TOOLS]",
        lambda tools: json.dumps({"format": {"name": "x"}, "tools": tools}, indent=4),
        lambda tools: "\n\n".join(json.dumps(tool["function"], indent=2) for tool in tools),
    ],
)
@given(order=st.permutations(range(5)))
def test_a_tool_is_found_however_it_is_written(render, order: list[int]) -> None:
    text = f'Use {{"name": function name}}.\n{render([TOOLS[i] for i in order])} Ask "look_1".'
    found = tools_in(text, NAMES)
    assert [name for name, _ in found] == [NAMES[i] for i in order]
    for name, (start, end) in found:
        tool = json.loads(text[start:end])
        assert tool.get("function", tool)["name"] == name
    first = dict(found)["look_0"]
    alone = render([TOOLS[0]])
    # The same text wherever it stands.
    if "format" not in alone:
        assert text[slice(*first)] in alone


def test_a_tool_is_told_once_for_each_of_its_name() -> None:
    text = json.dumps(TOOLS[:1] * 3)
    assert len(tools_in(text, ["look_0"])) == 1
    assert len(tools_in(text, ["look_0", "look_0"])) == 2
    assert tools_in(text, ["other"]) == tools_in("{" * 100, ["a"]) == []
    assert tools_in("[" * 5000 + '{"name": "a"}', ["a"])


def test_texts_of_a_chat_are_found_where_they_stand() -> None:
    a, b, c = PASSAGES[:3]
    messages = [
        {"role": "system", "content": a + "\n"},
        {"role": "user", "content": [{"type": "text", "text": b}, {"type": "text", "text": c}]},
        {"role": "user", "content": [{"type": "image_url"}, 3, "x"]},
        "no message",
        {"role": "assistant", "content": None},
    ]
    text = f"<s>{a}</s><u>{b} {c}</u>{json.dumps(TOOLS[0])}"
    cuts = chat_cuts(text, messages, NAMES[:1], 3)
    told = [(cut.rule, text[cut.start : cut.end]) for cut in cuts]
    assert told == [
        (TOOL, json.dumps(TOOLS[0])),
        *((MESSAGE, a), (PART, b), (PART, c), (MESSAGE, f"{b} {c}")),
    ]
    regions = [text[start:end] for start, end in regions_of(cuts)]
    assert regions == [a, b, c]


# -- content --------------------------------------------------------------------------


def tokens_of(seed: int, n: int) -> list[int]:
    """Like text: some tokens are frequent."""
    return (np.random.default_rng(seed).zipf(1.3, n) % 50000).tolist()


def kept(before: list[int], after: list[int], touched: list[tuple[int, int]]) -> float:
    """The share of the chunks of untouched text that are chunks of the new one too."""
    there = {tuple(after[a:b]) for a, b in chunks(after)}
    whole = [
        tuple(before[a:b])
        for a, b in chunks(before)
        if all(b <= start or end <= a for start, end in touched)
    ]
    return sum(one in there for one in whole) / len(whole)


# Long enough that the few chunks behind each seam, until the cuts meet again, are few.
N = 48000
places = st.integers(0, N - 1)
edits = st.lists(
    st.tuples(st.sampled_from(["insert", "delete", "move", "duplicate"]), places, places),
    min_size=1,
    max_size=2,
)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), edits=edits, length=st.integers(1, 2000))
def test_chunks_of_untouched_text_keep_their_identity(
    seed: int, edits: list[tuple[str, int, int]], length: int
) -> None:
    before = tokens_of(seed, N)
    # Tokens with the places that they came from.
    after: list[tuple[int, int]] = list(zip(before, range(N), strict=True))
    for kind, at, to in edits:
        piece = after[at : at + length]
        if kind in ("delete", "move"):
            del after[at : at + length]
        if kind == "insert":
            piece = [(token, -1) for token in tokens_of(seed + at + 1, length)]
        if kind != "delete":
            after[to:to] = piece
    # A seam lies between two tokens that did not stand side by side; what is gone is touched.
    came = [place for _, place in after]
    beside = set(itertools.pairwise(came))
    touched = [(i, i + 2) for i in range(N - 1) if (i, i + 1) not in beside]
    assert kept(before, [token for token, _ in after], touched) >= 0.9


@given(st.lists(st.integers(0, 60000), max_size=3000), st.integers(1, 3))
def test_chunks_cover_and_keep_to_their_lengths(ids: list[int], factor: int) -> None:
    lengths = Lengths(16 * factor, 64, 256)
    cut = chunks(ids, lengths)
    assert [b for _, b in cut[:-1]] == [a for a, _ in cut[1:]]
    assert sum(b - a for a, b in cut) == len(ids)
    assert all(lengths.least <= b - a <= lengths.most for a, b in cut[:-1])


def test_chunks_are_of_about_the_average() -> None:
    cut = chunks(tokens_of(0, 200_000))
    assert LENGTHS.average * 0.7 < 200_000 / len(cut) < LENGTHS.average * 1.4
    # Normalised: few are cut short or forced.
    lengths = np.array([b - a for a, b in cut])
    assert (lengths >= LENGTHS.most).mean() < 0.02
    for bad in (Lengths, lambda *a: Lengths(8, 64, 128)):
        with pytest.raises(ValueError):
            bad(64, 100, 512)


def test_a_text_is_cut_alike_whatever_stands_before_it() -> None:
    text = tokens_of(1, 4000)
    alone = {tuple(text[a:b]) for a, b in chunks(text)}
    for shift in (1, 7, 333):
        moved = tokens_of(2, shift) + text
        again = {tuple(moved[a:b]) for a, b in chunks(moved)}
        assert len(alone & again) >= 0.9 * (len(alone) - 1)


# -- spans ----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_tokens_across_an_edge_belong_to_none(lengths: list[int], data: st.DataObject) -> None:
    ends = np.cumsum(lengths)
    offsets = np.stack([ends - lengths, ends], axis=1)
    offsets[np.array(lengths) == 0] = 0
    total = int(ends[-1])
    start = data.draw(st.integers(0, total))
    end = data.draw(st.integers(start, total))
    (cut,) = token_cuts(offsets, [Cut(start, end, "x")])
    inside = [i for i, (a, b) in enumerate(offsets.tolist()) if start <= a < b <= end]
    if inside:
        assert (cut.start, cut.end) == (inside[0], inside[-1] + 1)
    else:
        assert cut.start == cut.end


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The tower of Veldra stands.", " tower of Veldra"),
        ("one two", " two"),
        ("word", "word"),
        ("", ""),
        ('{\n    "a": 1,\n    "b": [2 ]\n}', ' "a": 1,\n    "b": [2'),
        ("x" * 60 + " y " + "z" * 60, "x" * 60 + " y " + "z" * 60),
    ],
)
def test_what_has_the_same_tokens_anywhere(text: str, kept: str) -> None:
    around = f"({text})"
    cut = settled(around, Cut(1, 1 + len(text), "x"))
    assert around[cut.start : cut.end] == kept


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=9),
    st.lists(st.integers(0, 5), max_size=6),
)
def test_what_is_beside_overlaps_nothing(drawn: list[tuple[int, int]], steps: list[int]) -> None:
    edges = list(itertools.accumulate(steps))
    taken = list(itertools.pairwise(edges))[::2]
    cuts = [Cut(at, at + length, "x") for at, length in drawn]
    apart = [c for c in cuts if not any(c.start < end and start < c.end for start, end in taken)]
    assert list(beside(cuts, taken)) == apart


def test_no_cut_of_no_tokens() -> None:
    assert token_cuts([], [Cut(0, 3, "x")]) == [Cut(0, 0, "x")]
    assert token_cuts([(0, 0), (0, 1)], []) == []


# -- what recurs ----------------------------------------------------------------------


def names(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint64)


@given(st.lists(st.lists(st.integers(1, 30), max_size=8), max_size=30))
def test_a_sketch_counts_what_it_has_room_for(rounds: list[list[int]]) -> None:
    sketch, counts = Sketch(256), dict.fromkeys(range(1, 31), 0)
    for one in rounds:
        sketch.add(names(*one))
        for name in one:
            counts[name] = min(MOST, counts[name] + 1)
    assert sketch.times(names(*counts)).tolist() == list(counts.values())


def test_a_sketch_is_bounded_and_forgets() -> None:
    sketch = Sketch(256)
    size = sketch.nbytes
    for _ in range(5):
        sketch.add(names(7))
    sketch.add(names(8))
    for i in range(40):
        sketch.add(np.arange(1000 * i + 1000, 1000 * i + 1100, dtype=np.uint64))
    # What was seen often outlives a stream of what is seen once.
    assert sketch.times(names(7, 8)).tolist() == [5, 0] and sketch.nbytes == size
    for _ in range(HALF_LIFE):
        sketch.add(names())
    assert sketch.times(names(7)).tolist() == [2]
    for _ in range(2 * HALF_LIFE):
        sketch.add(names())
    assert sketch.times(names(7)).tolist() == [0]


def recurred(seen: Seen, ids: list[int], *cuts: Cut, ordinary: bool = True) -> list[int]:
    name = named(ids, cuts)
    times = seen.recurred(name).tolist()
    seen.saw(name, ordinary=ordinary)
    return times


def test_a_chunk_recurs_behind_another_prefix() -> None:
    seen = Seen()
    document = list(range(100, 150))
    here, there = Cut(2, 52, "x"), Cut(4, 54, "x")
    assert recurred(seen, [1, 2, *document], here) == [0]
    # The prefix cache's.
    assert recurred(seen, [1, 2, *document, 9], here) == [0]
    assert recurred(seen, [1, 2, 3, 4, *document], there) == [1]
    assert recurred(seen, [3, 3, *document], here, ordinary=False) == [2]
    # Linked it was kept as no prefix.
    assert recurred(seen, [3, 3, *document], here) == [3]
    assert recurred(seen, [3, 3, *document], here) == [0]
    assert recurred(Seen(), [5, *document], Cut(1, 51, "x")) == [0]


def test_a_chunk_that_stands_twice_in_a_prompt_recurs() -> None:
    seen = Seen()
    document = list(range(50))
    assert recurred(seen, [*document, *document], Cut(0, 50, "x"), Cut(50, 100, "x")) == [0, 0]
    assert recurred(seen, [7, *document], Cut(1, 51, "x")) == [2]


def test_what_is_remembered_is_of_a_fixed_size() -> None:
    seen, draw = Seen(), np.random.default_rng(0)
    size = seen.nbytes
    for _ in range(20):
        drawn = draw.integers(1, 1 << 63, 4000, dtype=np.uint64)
        seen.saw(Named(drawn, drawn), ordinary=True)
    assert seen.nbytes == size < 1 << 20


# -- what is taken --------------------------------------------------------------------


def test_what_is_worth_it() -> None:
    times, tokens = np.array([0, 1, 1, 1, 3]), np.array([500, 32, 31, 100, 20])
    assert worth(times, tokens, 16, 0.5).tolist() == [False, True, False, True, True]
    assert worth(times, tokens, 16, 1.0).tolist() == [False, False, False, False, False]
    assert worth(times + 1, tokens, 16, 1.0).tolist() == [False, True, False, True, False]
    assert not worth(np.array([1]), np.array([40]), 64, 0.5)[0]


ranges = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=12)


@given(ranges)
def test_cuts_that_are_taken_are_apart_and_save_the_most(drawn: list[tuple[int, int]]) -> None:
    cuts = [Cut(at, at + length, "x") for at, length in drawn]
    eligible = np.array([i % 4 != 3 and length > 2 for i, (_, length) in enumerate(drawn)], bool)
    taken = apart(cuts, eligible, 2, 100)
    chosen = [cuts[i] for i in taken]
    assert all(eligible[i] for i in taken)
    assert all(a.end <= b.start for a, b in itertools.pairwise(chosen))

    def best(left: list[Cut], at: int) -> int:
        rest = [cut for cut in left if cut.start >= at]
        if not rest:
            return 0
        first = min(rest)
        without = [cut for cut in rest if cut is not first]
        return max(best(without, at), first.end - first.start - 2 + best(without, first.end))

    assert sum(cut.end - cut.start - 2 for cut in chosen) == best(
        [cut for cut, good in zip(cuts, eligible, strict=True) if good], 0
    )
    few = [cuts[i] for i in apart(cuts, eligible, 2, 2)]
    longest = sorted((cut.end - cut.start for cut in chosen), reverse=True)[:2]
    assert sorted((cut.end - cut.start for cut in few), reverse=True) == longest


def test_a_prompts_cuts() -> None:
    cutter = Cutter(shortest=3)
    text = "-".join(["one two three four\n\nfive-six\n\none two three four"])
    cuts = cutter.of_text(text, [Cut(0, len(text), PART)], [(0, len(text))])
    offsets = [(i, i + 1) for i in range(len(text))]
    made = cutter.of_tokens(offsets, cuts)
    assert [cut.rule for cut in made] == [PART, *3 * ["paragraph"]]
    assert {cut.found for cut in made} == {STRUCTURE}
    ids = tokens_of(3, 3000)
    all_of_them = cutter.by_content(ids, [Cut(0, 3000, PART), Cut(*chunks(ids)[1], "list")])
    assert [cut.rule for cut in all_of_them].count(CONTENT) == len(chunks(ids)) - 1
    assert len(cutter.by_content(tokens_of(4, 2000), [Cut(i, i + 9, "x") for i in range(1991)]))


def test_it_imports_neither_torch_nor_sglang() -> None:
    for path in pathlib.Path(sglang_pic.find.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in ("torch", "sglang")
                if name.startswith("sglang_pic."):
                    assert name.startswith(("sglang_pic.find.", "sglang_pic.errors"))
