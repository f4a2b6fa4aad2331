"""A client for ``/pic/*``: compile ahead, look at what is cached, pin it, let it go.

And ``through_gateway``, for chat requests whose fields a gateway would drop.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import requests

# -- errors -------------------------------------------------------------------------


class PicServerError(RuntimeError):
    """The server did not do what was asked.

    Attributes:
        status: the HTTP status.
        field: the field at fault, for example ``pic.segments[3].end``; ``None`` if the
            answer names none.
    """

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.field = field


class BadRequestError(PicServerError):
    """400: a field is missing, unknown or out of range."""


class UnauthorizedError(PicServerError):
    """401: the API key is missing or wrong."""


class NotFoundError(PicServerError):
    """404: this tenant has no such segment, or the server is not ours."""


class ConflictError(PicServerError):
    """409: the segment is in use, or pinned, or only partly held."""


class NoRoomError(PicServerError):
    """507: it does not fit the budget."""


_ERRORS: dict[int, type[PicServerError]] = {
    400: BadRequestError,
    401: UnauthorizedError,
    404: NotFoundError,
    409: ConflictError,
    507: NoRoomError,
}


# -- results ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled segment; ``tokens_computed`` is 0 if it was there already."""

    id: str
    tokens: int
    tokens_computed: int


@dataclasses.dataclass(frozen=True)
class Segment:
    """A segment of this tenant.

    Attributes:
        tokens, held: its length, and how many tokens are still cached.
        hits: links that found pages of it.
        compiled, last_use: readings of the server's logical clock.
        kv_bytes, state_bytes: what it takes.
        pinned: whether it is kept from eviction.
        value: the lowest is evicted first.
        ranks: data-parallel ranks that hold it.
    """

    id: str
    tokens: int
    held: int
    hits: int
    compiled: int
    last_use: int
    kv_bytes: int
    state_bytes: int
    pinned: bool
    value: float
    ranks: int


@dataclasses.dataclass(frozen=True)
class Document:
    """A segment of this tenant that the server's encoder has read.

    Attributes:
        hits: requests that have seen it.
        last_use: reading of a clock that such requests advance.
        pinned: whether it is kept from eviction.
        in_use: whether a request sees it now.
    """

    id: str
    tokens: int
    bytes: int
    hits: int
    last_use: int
    pinned: bool
    in_use: bool


@dataclasses.dataclass(frozen=True)
class Flushed:
    """How many segments and encoded documents, and tokens of segments and prefixes, were
    forgotten."""

    segments: int
    freed_tokens: int
    documents: int = 0


@dataclasses.dataclass(frozen=True)
class Saved:
    """How many segments and encoded documents were written, and the bytes of their files."""

    segments: int
    bytes: int
    documents: int = 0


@dataclasses.dataclass(frozen=True)
class Restored:
    """How many segments and encoded documents were loaded and how many were held already;
    files that were refused, each ``{"file", "reason"}``."""

    segments: int
    present: int
    refused: list[dict[str, str]]
    documents: int = 0


@dataclasses.dataclass(frozen=True)
class ExplainedSegment:
    """What would become of one segment; the fields are the report's."""

    start: int
    end: int
    id: str | None
    hit: bool
    reason: str
    tokens_reused: int
    tokens_computed: int
    company: int
    guests: int
    found: str


@dataclasses.dataclass(frozen=True)
class ExplainedCut:
    """Where a prompt may be cut beside what it names: tokens, the rule, how often what
    stands there has come again behind other tokens, and whether it would be linked."""

    start: int
    end: int
    rule: str
    times: int
    linked: bool


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The report that a request would get now; ``tokens_to_compile`` are those of
    missing segments, compiled first; ``cuts`` of a prompt in which segments are looked for."""

    exactness: str
    reason: str | None
    policy: str
    seam: int
    mode: str
    tokens_reused: int
    tokens_computed: int
    prefix_tokens: int
    turn_tokens: int
    tokens_to_compile: int
    segments: list[ExplainedSegment]
    cuts: list[ExplainedCut]


_Result = TypeVar("_Result")


def _made(result: type[_Result], values: dict[str, Any]) -> _Result:
    """A result; what a newer server adds to it is left out."""
    names = [field.name for field in dataclasses.fields(result)]  # type: ignore[arg-type]
    return result(**{name: values[name] for name in names})


def _card(values: dict[str, Any]) -> Segment | Document:
    return _made(Document, values) if "in_use" in values else _made(Segment, values)


# -- chat behind a gateway ----------------------------------------------------------


def through_gateway(body: dict[str, Any]) -> dict[str, Any]:
    """A chat request as gateways let it through: ``pic``, marks and ``cache_salt`` are in
    its ``metadata``.

    Args:
        body: with ``pic_segment`` on messages and content parts, ``pic`` and
            ``cache_salt`` where a server takes them; left as it is.
    """
    marked: list[dict[str, int]] = []
    messages = []
    for i, message in enumerate(body["messages"]):
        message = dict(message)
        if message.pop("pic_segment", False):
            marked.append({"message": i})
        if isinstance(message.get("content"), list):
            parts = [dict(part) for part in message["content"]]
            marked += [
                {"message": i, "part": j}
                for j, part in enumerate(parts)
                if part.pop("pic_segment", False)
            ]
            message["content"] = parts
        messages.append(message)
    pic = dict(body.get("pic") or {})
    if marked:
        pic["segments"] = [*pic.get("segments", []), *marked]
    metadata = dict(body.get("metadata") or {})
    if pic:
        metadata["pic"] = json.dumps(pic)
    if body.get("cache_salt") is not None:
        metadata["pic_salt"] = body["cache_salt"]
    kept = {key: value for key, value in body.items() if key not in ("pic", "cache_salt")}
    return {**kept, "messages": messages, "metadata": metadata}


# -- the client ---------------------------------------------------------------------


class PicClient:
    """Manages the segments of one tenant, compiled and encoded.

    Args:
        url: of the server, for example ``http://127.0.0.1:30000``.
        api_key: the server's admin API key, or its API key if it has no other.
        cache_salt: the tenant, as in the requests that link its segments.
        timeout_s: how long to wait for an answer.

    Attributes:
        url: of the server.

    Raises:
        PicServerError: from any call, one of its subclasses where there is one.
        requests.RequestException: from any call, if the server does not answer.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        cache_salt: str | None = None,
        *,
        timeout_s: float = 600,
    ):
        self.url = url.rstrip("/")
        self._tenant = {} if cache_salt is None else {"cache_salt": cache_salt}
        self._timeout_s = timeout_s
        self._session = requests.Session()
        if api_key is not None:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def compile(
        self,
        text: str | Sequence[str] | None = None,
        *,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        extra_key: str | None = None,
        lora_path: str | None = None,
        company: bool = False,
        opening: str | Sequence[int] | None = None,
        mode: str | None = None,
    ) -> list[Compiled]:
        """Compile one segment, or a list of them, ahead of their first use.

        Args:
            company: and in each other's company, for prompts that begin with ``opening``
                and name all of them.
            mode: ``encode``: for requests of that mode.
        """
        body = {
            "text": text,
            "input_ids": input_ids,
            "extra_key": extra_key,
            "lora_path": lora_path,
            "company": company,
            "opening": opening,
            "mode": mode,
        }
        answer = self._post("compile", body)
        return [_made(Compiled, segment) for segment in answer["segments"]]

    def segments(self) -> list[Segment]:
        """All segments, the one used last first."""
        return [_made(Segment, card) for card in self._get("segments")["segments"]]

    def documents(self) -> list[Document]:
        """All encoded documents, the one used last first."""
        return [_made(Document, card) for card in self._get("segments")["documents"]]

    def get(self, id: str) -> Segment | Document:
        return _card(self._get(f"segments/{id}"))

    def pin(self, id: str, ttl_s: float | None = None) -> Segment | Document:
        """Keep a segment from eviction, until unpinned or for ``ttl_s`` seconds."""
        return _card(self._post(f"segments/{id}/pin", {"ttl_s": ttl_s}))

    def unpin(self, id: str) -> Segment | Document:
        return _card(self._post(f"segments/{id}/unpin", {}))

    def delete(self, id: str) -> int:
        """Forget a segment; returns the tokens freed."""
        return self._send("DELETE", f"segments/{id}", params=self._tenant)["freed_tokens"]

    def flush(self) -> Flushed:
        """Forget every segment and prefix of the tenant that is neither pinned nor in use."""
        return _made(Flushed, self._post("flush", {}))

    def save(self, ids: Sequence[str] | None = None) -> Saved:
        """Write segments to the server's ``--pic-store``: these, or all of the tenant's."""
        return _made(Saved, self._post("save", {"ids": None if ids is None else list(ids)}))

    def restore(self) -> Restored:
        """Load what was saved of this tenant, as far as it fits."""
        return _made(Restored, self._post("restore", {}))

    def explain(
        self,
        text: str | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        messages: Sequence[dict[str, Any]] | None = None,
        pic: dict[str, Any] | None = None,
        extra_key: str | None = None,
        lora_path: str | None = None,
        **fields: Any,
    ) -> Explanation:
        """Foretell the report of a request, changing nothing.

        Args:
            text, input_ids, messages: its prompt, if ``pic.parts`` does not give it.
            pic, extra_key, lora_path: as in the request.
            fields: more of it that decides the prompt, such as ``tools``.
        """
        body = {
            "text": text,
            "input_ids": input_ids,
            "messages": messages,
            "pic": pic,
            "extra_key": extra_key,
            "lora_path": lora_path,
            **fields,
        }
        answer = self._post("explain", body)
        segments = [_made(ExplainedSegment, one) for one in answer["segments"]]
        cuts = [_made(ExplainedCut, one) for one in answer["cuts"]]
        return _made(Explanation, {**answer, "segments": segments, "cuts": cuts})

    def report(self, id: str) -> dict[str, Any]:
        """The report of one of the last answers, by its id."""
        return self._get(f"report/{quote(id, safe='')}")["pic"]

    def budgets(self) -> list[dict[str, Any]]:
        """Of each data-parallel rank: what may be held, and who holds how much of it."""
        return self._get("budgets", {})["ranks"]

    def stats(self) -> dict[str, Any]:
        """Counters and sizes: ``front``, and ``ranks``, one a data-parallel rank."""
        return self._get("stats", {})

    def forest(self) -> list[dict[str, Any]]:
        """Of each data-parallel rank: all tenants' segments, page by page."""
        return self._get("forest", {})

    def _get(self, path: str, params: dict[str, str] | None = None) -> Any:
        return self._send("GET", path, params=self._tenant if params is None else params)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._send("POST", path, json={**self._tenant, **body})

    def _send(self, method: str, path: str, **content: Any) -> Any:
        response = self._session.request(
            method, f"{self.url}/pic/{path}", timeout=self._timeout_s, **content
        )
        if response.ok:
            return response.json()
        raise _error_of(response)


def _error_of(response: requests.Response) -> PicServerError:
    message, field = response.text, None
    try:
        error = response.json()["error"]
        message, field = error["message"], error["param"]
    except (requests.JSONDecodeError, KeyError, TypeError):
        pass  # not an answer of ours
    kind = _ERRORS.get(response.status_code, PicServerError)
    return kind(response.status_code, message, field)
