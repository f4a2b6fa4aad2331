"""What is compiled, one item, one internal request; and what an encoder reads."""

from __future__ import annotations

import dataclasses

from sglang_pic.request.base import TokenSpan


@dataclasses.dataclass(frozen=True)
class CompileItem:
    """One path to compute: token ids, and the namespace to keep it in.

    ``segment`` is false for the plain text that opens a prompt: it is computed
    and cached as SGLang's ordinary prefix. ``seams`` and ``named`` as in
    ``compile_hints``. ``rank``: the data-parallel rank it is wanted on, if on one.
    ``company``: where the segments of a company stand in it, of which it is one order;
    ``guests`` and ``shipped`` as in ``CompileRequest``. ``here``: no peer is to compile it,
    since one has asked for it.
    """

    ids: tuple[int, ...]
    salt: str | None
    extra_key: str | None
    lora_path: str | None
    segment: bool = True
    seams: tuple[int, ...] = ()
    named: bool = False
    rank: int | None = None
    company: tuple[TokenSpan, ...] = ()
    guests: int = 0
    shipped: bool = False
    here: bool = False


@dataclasses.dataclass(frozen=True)
class DocumentItem:
    """A document's token ids, and whose it is; ``named``: no prompt waits for it."""

    ids: tuple[int, ...]
    tenant: str | None
    named: bool = False
