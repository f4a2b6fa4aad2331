"""What our front tells the scheduler beside a prompt, sealed and read back.

It travels in ``kv_hints``, which any client may fill. So each action's payload is a
JSON text and the code that only the front can give it (``seal``); ``read_internal``
is the one place where it is read, and either accepts it whole or raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from sglang.srt.managers.kv_hints import KvHintAction, KvHintsEnvelope

from sglang_pic.errors import PicActionError
from sglang_pic.forest.keys import is_reserved
from sglang_pic.link.policy import ABLATIONS, COMPANIES, MODES, POLICIES, STATE_POLICIES
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.commands import Command
from sglang_pic.request.fields import MAX_SEAM, MAX_SEGMENTS
from sglang_pic.request.seal import is_sealed, seal

# Every action type that begins so is ours, and internal.
FAMILY = "pic."
LINK = "pic.link"
ENCODED = "pic.encoded"
COMPILE = "pic.compile"
COMMAND = "pic.command"
# Of one compile: a link names one.
MAX_SEAMS = 16
# Of one company: its segments, and the tokens of its prefill, which are copied in one go.
MAX_MEMBERS = 10
MAX_COMPANY_TOKENS = 8192

_VERSION = "1"


@dataclasses.dataclass(frozen=True)
class CompileRequest:
    """The request is the compilation of one segment.

    Attributes:
        seams: the widths in tokens for which links want its linear states (0: no head).
        named: it was asked for by name, no link waits for it.
        company: where the segments of a company stand in it, which it is the prefill of;
            empty of one segment's.
        guests: the first of those, of which nothing is kept.
        shipped: those are passages of this project's, of no tenant.
    """

    seams: tuple[int, ...]
    named: bool
    company: tuple[TokenSpan, ...] = ()
    guests: int = 0
    shipped: bool = False


@dataclasses.dataclass(frozen=True)
class EncodedRequest:
    """The request sees encoded documents.

    Attributes:
        documents: their names (``forest.keys.document_id``), in the prompt's order.
        lease: under which they are kept for it (``commands.Lease``).
        strict: it is to come back, unstarted, when one is not held; else it ends, and is one
            of several.
    """

    documents: tuple[str, ...]
    lease: str = ""
    strict: bool = True


@dataclasses.dataclass(frozen=True)
class Internal:
    """All that our front says of one request; nothing, of an ordinary one."""

    link: LinkRequest | None = None
    encoded: EncodedRequest | None = None
    compile: CompileRequest | None = None
    command: Command | None = None


NOTHING = Internal()


# -- the front's side ---------------------------------------------------------------


def _envelope(action: str, content: Any) -> KvHintsEnvelope:
    body = msgspec.json.encode(content).decode()
    payload = {"body": body, "seal": seal(action, body)}
    return KvHintsEnvelope(
        protocol_version=_VERSION,
        message_id=action,
        actions=[
            KvHintAction(
                action_id="0", action_type=action, action_version=_VERSION, payload=payload
            )
        ],
    )


def link_hints(request: LinkRequest) -> KvHintsEnvelope:
    """Have the request linked."""
    return _envelope(LINK, request)


def encoded_hints(request: EncodedRequest) -> KvHintsEnvelope:
    """Have the request see documents."""
    return _envelope(ENCODED, request)


def compile_hints(
    seams: Sequence[int],
    *,
    named: bool = False,
    company: Sequence[TokenSpan] = (),
    guests: int = 0,
    shipped: bool = False,
) -> KvHintsEnvelope:
    """Mark the request as a ``CompileRequest``."""
    asked = CompileRequest(tuple(seams), named, tuple(company), guests, shipped)
    return _envelope(COMPILE, asked)


def command_hints(command: Command) -> KvHintsEnvelope:
    """Have the cache carry a command out."""
    return _envelope(COMMAND, command)


# -- the scheduler's side -----------------------------------------------------------


def read_internal(
    hints: KvHintsEnvelope | None, *, salt: str | None = None, tokens: int | None = None
) -> Internal:
    """Read what the front says of a request.

    Args:
        hints: the request's ``kv_hints``; actions of other families are not ours.
        salt: its cache salt.
        tokens: length of its prompt; ``None`` leaves spans unchecked against it.

    Raises:
        PicActionError: 403, an action is not of this server's front, or the salt is
            reserved and this is no compile; 400, its body is malformed.
    """
    found: dict[str, Any] = {}
    for i, action in enumerate(hints.actions if hints is not None else ()):
        kind = action.action_type
        if not kind.startswith(FAMILY):
            continue
        field = f"kv_hints.actions[{i}]"
        if kind not in _TYPES:
            raise PicActionError(HTTPStatus.FORBIDDEN, f"{field}.action_type", "is internal")
        body, code = action.payload.get("body"), action.payload.get("seal")
        sealed = isinstance(body, str) and isinstance(code, str) and is_sealed(kind, body, code)
        if not sealed:
            raise PicActionError(
                HTTPStatus.FORBIDDEN, f"{field}.payload", f"{kind} is the server's own to send"
            )
        if kind in found:
            raise PicActionError(HTTPStatus.BAD_REQUEST, field, f"a second {kind}")
        found[kind] = _decode(body, _TYPES[kind], f"{field}.payload")
        if kind == LINK:
            _check_link(found[kind], tokens, f"{field}.payload")
    made = Internal(*map(found.get, (LINK, ENCODED, COMPILE, COMMAND)))
    if is_reserved(salt) != (made.compile is not None):
        raise PicActionError(
            HTTPStatus.FORBIDDEN, "cache_salt", "compiled segments have salts of their own"
        )
    if made.encoded is not None:
        _check_encoded(made)
    if made.compile is not None:
        seams = made.compile.seams
        if len(seams) > MAX_SEAMS or not all(0 <= seam <= MAX_SEAM for seam in seams):
            raise PicActionError(HTTPStatus.BAD_REQUEST, "kv_hints", f"seams of {seams!r:.80}")
        _check_company(made.compile, tokens)
    return made


_TYPES: dict[str, Any] = {
    LINK: LinkRequest,
    ENCODED: EncodedRequest,
    COMPILE: CompileRequest,
    COMMAND: Command,
}

T = TypeVar("T")


def _decode(body: str, kind: type[T], field: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        # ``Expected `int`, got `str` - at `$.spans[0].start```
        problem, _, path = str(error).partition(" - at `$")
        place = f"{field}{path.removesuffix('`')}"
        raise PicActionError(HTTPStatus.BAD_REQUEST, place, problem) from error


def _check_link(link: LinkRequest, tokens: int | None, field: str) -> None:
    options = link.options
    choices = {
        "policy": (options.policy, POLICIES),
        "mode": (options.mode, MODES),
        "company": (options.company, COMPANIES),
        "state": (options.state, STATE_POLICIES),
        "ablation": (options.ablation, (None, *ABLATIONS)),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise PicActionError(
                HTTPStatus.BAD_REQUEST, f"{field}.options.{name}", f"unknown: {value!r:.80}"
            )
    for name, width in (("seam", options.seam), ("company_seam", options.company_seam)):
        if not 0 <= width <= MAX_SEAM:
            raise PicActionError(HTTPStatus.BAD_REQUEST, f"{field}.options.{name}", "out of range")
    if not 0 <= options.share <= 1:
        raise PicActionError(HTTPStatus.BAD_REQUEST, f"{field}.options.share", "out of range")
    if len(link.spans) > MAX_SEGMENTS:
        raise PicActionError(HTTPStatus.BAD_REQUEST, f"{field}.spans", "too many")
    _check_spans(link.spans, tokens, f"{field}.spans")


def _check_encoded(made: Internal) -> None:
    assert made.encoded is not None
    if len(made.encoded.documents) > MAX_SEGMENTS or made.link is not None:
        problem = f"of {len(made.encoded.documents)} documents"
        raise PicActionError(HTTPStatus.BAD_REQUEST, "kv_hints", problem)


def _check_company(compiled: CompileRequest, tokens: int | None) -> None:
    spans, guests = compiled.company, compiled.guests
    if not spans and not guests:
        return
    field = "kv_hints.company"
    if not 2 <= len(spans) <= MAX_MEMBERS or not 0 <= guests < len(spans):
        problem = f"of {len(spans)} segments, {guests} of them guests"
        raise PicActionError(HTTPStatus.BAD_REQUEST, field, problem)
    _check_spans(spans, tokens, field)
    if spans[-1].end > MAX_COMPANY_TOKENS:
        raise PicActionError(HTTPStatus.BAD_REQUEST, field, f"of {spans[-1].end} tokens")


def _check_spans(spans: Sequence[TokenSpan], tokens: int | None, field: str) -> None:
    at = 0
    for i, span in enumerate(spans):
        if not at <= span.start <= span.end:
            raise PicActionError(
                HTTPStatus.BAD_REQUEST, f"{field}[{i}]", "spans must be sorted and disjoint"
            )
        at = span.end
    if tokens is not None and at > tokens:
        raise PicActionError(HTTPStatus.BAD_REQUEST, field, f"{at} lies outside {tokens} tokens")
