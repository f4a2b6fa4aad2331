"""Validation of the ``pic`` object that a request may carry.

    "pic": {
        "segments": [{"start": 12, "end": 140}, ...],
        "parts": ["text", {"segment": "a document"}, "question"],
        "tokenize": "pieces" | "whole",
        "policy": "seam" | "graded" | "none" | "full",
        "seam": 16,
        "company": "off" | "subset" | "tenant",
        "company_seam": 0,
        "share": 0.15,
        "find": "off" | "structure" | "content",
        "mode": "share" | "relocate" | "encode",
        "state": "compose" | "last" | "auto",
        "require_exact": false,
        "link": true,
        "turns": true
    }

A field that is ``null`` is absent. ``segments`` counts tokens where the prompt is
given as token ids, characters (Unicode code points) where it is given as text.
``parts`` replaces the text: the prompt is their concatenation, the marked ones are
its segments. With ``mode`` ``encode`` they are read by a trained encoder, and taken out of
the prompt. ``ablation``
(``link.policy.ABLATIONS``) breaks a link on purpose, for evaluation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang_pic.errors import PicRequestError
from sglang_pic.find.base import FIND
from sglang_pic.link.policy import (
    ABLATIONS,
    AUTO,
    COMPANIES,
    ENCODE,
    MODES,
    POLICIES,
    STATE_POLICIES,
    LinkOptions,
)
from sglang_pic.request.base import TokenSpan

# Each costs the scheduler some 50 us before its request runs (``eval.scheduler_cost``).
MAX_SEGMENTS = 512
MAX_SEAM = 1 << 20
TOKENIZE_RULES = ("pieces", "whole")
# No tokenizer in use packs more characters into a token of ordinary text.
MAX_CHARS_PER_TOKEN = 64
_KNOWN = {
    "segments",
    "parts",
    "tokenize",
    "policy",
    "seam",
    "company",
    "company_seam",
    "share",
    "find",
    "mode",
    "state",
    "ablation",
    "require_exact",
    "link",
    "turns",
}

# With documents that are not in the prompt nothing is linked.
_OF_ENCODE = {"segments", "parts", "tokenize", "mode"}


@dataclasses.dataclass(frozen=True)
class PicFields:
    """A validated ``pic`` object.

    ``ranges`` are in the unit of the prompt (tokens or characters); they are
    sorted and disjoint, but not yet checked against its length.
    ``tokenize`` and ``find`` are ``None`` where the request does not say. ``text`` is
    the prompt when it was given as ``parts``.
    """

    ranges: tuple[TokenSpan, ...]
    options: LinkOptions
    tokenize: str | None = None
    text: str | None = None
    find: str | None = None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ranges(segments: Any) -> tuple[TokenSpan, ...]:
    if not isinstance(segments, list):
        raise PicRequestError("pic.segments", "must be a list of {start, end}")
    if len(segments) > MAX_SEGMENTS:
        raise PicRequestError(
            "pic.segments", f"at most {MAX_SEGMENTS} segments a request, got {len(segments)}"
        )
    ranges: list[TokenSpan] = []
    for i, item in enumerate(segments):
        field = f"pic.segments[{i}]"
        if not isinstance(item, dict) or set(item) != {"start", "end"}:
            raise PicRequestError(field, "must be an object with exactly 'start' and 'end'")
        for name in ("start", "end"):
            if not _is_int(item[name]):
                raise PicRequestError(
                    f"{field}.{name}", f"must be an integer, got {item[name]!r:.80}"
                )
        start, end = item["start"], item["end"]
        if start < 0:
            raise PicRequestError(f"{field}.start", f"must be at least 0, got {start}")
        if end < start:
            raise PicRequestError(f"{field}.end", f"the segment is reversed: [{start}, {end})")
        if ranges and start < ranges[-1].end:
            raise PicRequestError(
                f"{field}.start",
                f"{start} lies before the end {ranges[-1].end} of the preceding segment: "
                "segments must be sorted and disjoint",
            )
        ranges.append(TokenSpan(start, end))
    return tuple(ranges)


def join_parts(parts: Any) -> tuple[str, tuple[TokenSpan, ...]]:
    """Concatenate ``parts`` and return the text and the marked character ranges.

    Raises:
        PicRequestError: naming the part that is malformed.
    """
    if not isinstance(parts, list) or not parts:
        raise PicRequestError("pic.parts", "must be a non-empty list")
    pieces: list[str] = []
    segments: list[dict[str, int]] = []
    length = 0
    for i, part in enumerate(parts):
        marked = isinstance(part, dict)
        if marked and set(part) != {"segment"}:
            raise PicRequestError(f"pic.parts[{i}]", "must be a string or {'segment': string}")
        text = part["segment"] if marked else part
        if not isinstance(text, str):
            raise PicRequestError(
                f"pic.parts[{i}]", f"must be a string or {{'segment': string}}, got {part!r:.80}"
            )
        if marked:
            segments.append({"start": length, "end": length + len(text)})
        pieces.append(text)
        length += len(text)
    return "".join(pieces), _ranges(segments)


def _choice(value: Any, name: str, choices: Any) -> str:
    if value not in tuple(choices):
        raise PicRequestError(f"pic.{name}", f"must be one of {sorted(choices)}, got {value!r:.80}")
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise PicRequestError(f"pic.{name}", f"must be true or false, got {value!r:.80}")
    return value


def _width(value: Any, name: str) -> int:
    if not _is_int(value) or not 0 <= value <= MAX_SEAM:
        raise PicRequestError(
            f"pic.{name}", f"must be an integer from 0 to {MAX_SEAM}, got {value!r:.80}"
        )
    return int(value)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise PicRequestError("pic.share", f"must be a number from 0 to 1, got {value!r:.80}")
    return float(value)


def _company(value: Any, widest: str) -> str:
    """A request may be more careful than the server, never less."""
    company = _choice(value, "company", COMPANIES)
    if COMPANIES.index(company) > COMPANIES.index(widest):
        raise PicRequestError("pic.company", f"this server allows {widest!r} at most")
    return company


def parse_fields(pic: Any, defaults: LinkOptions) -> PicFields:
    """Validate a ``pic`` object.

    Args:
        pic: the decoded JSON value.
        defaults: options of the server, for what the request leaves out.

    Raises:
        PicRequestError: naming the field that is unknown, of the wrong type or
            out of range.
    """
    if not isinstance(pic, dict):
        raise PicRequestError("pic", f"must be an object, got {pic!r:.80}")
    unknown = set(pic) - _KNOWN
    if unknown:
        raise PicRequestError(f"pic.{min(unknown)}", f"unknown field; known are {sorted(_KNOWN)}")
    pic = {name: value for name, value in pic.items() if value is not None}
    if pic.get("mode") == ENCODE:
        stray = set(pic) - _OF_ENCODE
        if stray:
            raise PicRequestError(f"pic.{min(stray)}", f"means nothing with mode {ENCODE!r}")
    if "parts" in pic and "segments" in pic:
        raise PicRequestError("pic.parts", "give either 'parts' or 'segments', not both")
    text = None
    if "parts" in pic:
        text, ranges = join_parts(pic["parts"])
    else:
        ranges = _ranges(pic.get("segments", []))
    return PicFields(
        ranges=ranges,
        options=LinkOptions(
            policy=_choice(pic.get("policy", defaults.policy), "policy", POLICIES),
            seam=_width(pic.get("seam", defaults.seam), "seam"),
            company=_company(pic.get("company", defaults.company), defaults.company),
            company_seam=_width(pic.get("company_seam", defaults.company_seam), "company_seam"),
            share=_share(pic.get("share", defaults.share)),
            mode=_choice(pic.get("mode", defaults.mode), "mode", (*MODES, ENCODE)),
            require_exact=_flag(pic.get("require_exact", defaults.require_exact), "require_exact"),
            link=_flag(pic.get("link", defaults.link), "link"),
            state=_choice(pic.get("state", defaults.state), "state", (*STATE_POLICIES, AUTO)),
            turns=_flag(pic.get("turns", defaults.turns), "turns"),
            ablation=_choice(pic["ablation"], "ablation", ABLATIONS) if "ablation" in pic else None,
        ),
        tokenize=None
        if pic.get("tokenize") is None
        else _choice(pic["tokenize"], "tokenize", TOKENIZE_RULES),
        text=text,
        find=None if pic.get("find") is None else _choice(pic["find"], "find", FIND),
    )


def check_inside(ranges: tuple[TokenSpan, ...], length: int, unit: str) -> None:
    """Raise ``PicRequestError`` unless every range lies within the prompt."""
    for i, span in enumerate(ranges):
        if span.end > length:
            raise PicRequestError(
                f"pic.segments[{i}].end", f"{span.end} lies outside the prompt of {length} {unit}"
            )


def check_length(text: str, context_len: int, field: str) -> None:
    """Raise ``PicRequestError`` for a text that cannot fit the model's context,
    before the time is spent to tokenise it."""
    if len(text) > context_len * MAX_CHARS_PER_TOKEN:
        raise PicRequestError(
            field, f"{len(text)} characters cannot fit a context of {context_len} tokens"
        )
