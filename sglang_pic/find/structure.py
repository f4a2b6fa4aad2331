"""Blocks that prompts are built of, by a table of rules over the rendered text.

Rules are asked in the table's order, each within what the ones before it have left whole:
a paragraph lies within one section, that within one document. So the cuts of a prompt are
nested or apart. What names a block by its place (``Document 3:``) stands outside it, or it
would be another block wherever it stands. Every rule takes time linear in the text.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from sglang_pic.errors import PicConfigError
from sglang_pic.find.base import CONTENT, Cut

Range = tuple[int, int]
# Ranges of a text; they may hold white space at their ends.
Blocks = Callable[[str], Iterable[Range]]

# Cuts of one rule in a prompt; objects of JSON that turn out to be none, of a text.
MAX_CUTS, MAX_FAILURES = 4096, 8
_JSON = json.JSONDecoder()


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way to tell blocks.

    Attributes:
        name: as reports and metrics have it.
        blocks: the ranges of a text that are blocks, nested or apart.
    """

    name: str
    blocks: Blocks


def elements(*tags: str) -> Blocks:
    """What stands between a tag of these names and its end, case ignored."""
    tag = re.compile(rf"<(/?)({'|'.join(tags)})\b[^<>]*>", re.IGNORECASE)

    def blocks(text: str) -> Iterator[Range]:
        opened: list[tuple[str, int]] = []
        waiting: Counter[str] = Counter()
        for match in tag.finditer(text):
            closes, name = match[1], match[2].lower()
            if not closes:
                opened.append((name, match.end()))
                waiting[name] += 1
            elif waiting[name]:
                # One that was never closed ends with what it stands in.
                while opened[-1][0] != name:
                    waiting[opened.pop()[0]] -= 1
                waiting[name] -= 1
                yield opened.pop()[1], match.start()

    return blocks


def between(pattern: str, *, alone: bool = False) -> Blocks:
    """What stands before, between and behind matches.

    Args:
        alone: a text without a match is a block as well.
    """
    gap = re.compile(pattern, re.MULTILINE)

    def blocks(text: str) -> Iterator[Range]:
        at = 0
        for match in gap.finditer(text):
            yield at, match.start()
            at = match.end()
        if at or alone:
            yield at, len(text)

    return blocks


def behind(pattern: str) -> Blocks:
    """What stands behind a match, up to the next."""
    label = re.compile(pattern, re.MULTILINE)

    def blocks(text: str) -> Iterator[Range]:
        at: int | None = None
        for match in label.finditer(text):
            if at is not None:
                yield at, match.start()
            at = match.end()
        if at is not None:
            yield at, len(text)

    return blocks


def opened_by(pattern: str) -> Blocks:
    """From a match up to the next; what stands before the first is a block too."""
    head = re.compile(pattern, re.MULTILINE)

    def blocks(text: str) -> Iterator[Range]:
        at = 0
        for match in head.finditer(text):
            yield at, match.start()
            at = match.start()
        if at:
            yield at, len(text)

    return blocks


def matched_by(pattern: str) -> Blocks:
    """Every match; its group ``block``, if it has one.

    Raises:
        re.error: it is no regular expression.
    """
    wanted = re.compile(pattern, re.MULTILINE)
    group: str | int = "block" if "block" in wanted.groupindex else 0

    def blocks(text: str) -> Iterator[Range]:
        return (match.span(group) for match in wanted.finditer(text))

    return blocks


def objects(text: str) -> Iterator[Range]:
    """Each object of the arrays of objects in JSON, whatever stands around them."""
    at = failures = 0
    array = re.compile(r"\[\s*(?={)")
    comma = re.compile(r"\s*,\s*(?={)")
    while failures < MAX_FAILURES and (match := array.search(text, at)):
        at = match.end()
        while (end := end_of_object(text, at)) is not None:
            yield at, end
            at = end
            more = comma.match(text, at)
            if more is None:
                break
            at = more.end()
        else:
            failures += 1


def end_of_object(text: str, start: int) -> int | None:
    """Where the JSON value ends that begins here; ``None`` if it is none."""
    try:
        return _JSON.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


_NAMES = "document|doc|passage|source|context|chunk|result|snippet|article|excerpt|example|page"
RULES: tuple[Rule, ...] = (
    Rule(
        "element",
        elements(
            *("document", "documents", "document_content", "doc", "context", "passage", "source"),
            *("chunk", "result", "snippet", "article", "excerpt", "example", "file", "page"),
            *("tool", "function", "tool_response", "text", "content", "instructions", "skill"),
        ),
    ),
    Rule("heading", opened_by(r"^#{1,6}[ \t]+\S")),
    Rule("rule", between(r"^[ \t]*(?:-{3,}|\*{3,}|_{3,}|={3,})[ \t]*$")),
    Rule(
        "list",
        behind(
            rf"^[ \t]*(?:(?i:{_NAMES})[ \t]*(?:no\.[ \t]*)?[\[(#]?\d+[\])]?[ \t]*[:.\-]?|\[\d+\]:?"
            r"|\(\d+\)|\d+[.)][ \t])"
        ),
    ),
    Rule("json", objects),
    Rule("paragraph", between(r"\n[ \t\r]*\n", alone=True)),
)
# Of the chat rendering (``find.rendered``).
PART, MESSAGE, TOOL = "part", "message", "tool"
_TAKEN = {*(rule.name for rule in RULES), PART, MESSAGE, TOOL, CONTENT}


def own_rules(patterns: Mapping[str, str]) -> tuple[Rule, ...]:
    """An operator's rules: regular expressions by name, asked before the table's.

    Each match is a block, or its group ``block``.

    Raises:
        PicConfigError: a name is taken or no word, or a pattern is no regular expression.
    """
    rules = []
    for name, pattern in patterns.items():
        if not re.fullmatch("[a-z][a-z0-9_]{0,31}", name) or name in _TAKEN:
            raise PicConfigError(f"a rule must have a lower-case name of its own, got {name!r:.80}")
        if not isinstance(pattern, str):
            raise PicConfigError(f"rule {name}: must be a regular expression, got {pattern!r:.80}")
        try:
            rules.append(Rule(name, matched_by(pattern)))
        except re.error as error:
            raise PicConfigError(f"rule {name}: {error}") from error
    return tuple(rules)


def structure(
    text: str, regions: Sequence[Range], rules: Sequence[Rule] = RULES, shortest: int = 1
) -> list[Cut]:
    """Cut regions of a text by all rules.

    Args:
        text: a prompt as the model sees it.
        regions: character ranges, sorted and apart, such as its content parts.
        shortest: characters of the shortest block that is told.

    Returns:
        Cuts in characters, without white space at their ends, nested or apart; each once,
        and none of them a region.
    """
    cuts: list[Cut] = []
    told = set(regions)
    whole = list(regions)
    for rule in rules:
        found = list(itertools.islice(_blocks(text, whole, rule), MAX_CUTS))
        for block in found:
            if block not in told and block[1] - block[0] >= shortest:
                told.add(block)
                cuts.append(Cut(*block, rule.name))
        whole = _split(whole, found)
    return cuts


def _blocks(text: str, regions: Sequence[Range], rule: Rule) -> Iterator[Range]:
    for start, end in regions:
        for at, to in rule.blocks(text[start:end]):
            block = stripped(text, start + at, start + to)
            if block[0] < block[1]:
                yield block


def stripped(text: str, start: int, end: int) -> Range:
    """The range without white space at its ends, which chat templates trim."""
    block = text[start:end]
    return start + len(block) - len(block.lstrip()), end - len(block) + len(block.rstrip())


def _split(regions: Sequence[Range], blocks: Sequence[Range]) -> list[Range]:
    """The regions in pieces that no block begins or ends within."""
    edges = sorted({edge for block in blocks for edge in block})
    pieces = []
    i = 0
    for start, end in regions:
        at = start
        while i < len(edges) and edges[i] <= end:
            if edges[i] > at:
                pieces.append((at, edges[i]))
                at = edges[i]
            i += 1
        if at < end:
            pieces.append((at, end))
    return pieces
