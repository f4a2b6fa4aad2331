"""Segments that no request names: what recurs in a tenant's prompts (``--pic-find``).

A chunk that is seen for the first time is only remembered. One that recurs is compiled when
there is nothing else to do, or ahead of a link where that pays at once; what is compiled is
linked. Token ids are never changed: where nothing is linked the request goes on as it came.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from cachetools import LRUCache
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.config import PicConfig
from sglang_pic.find.base import CONTENT, MARKED, OFF, Cut
from sglang_pic.find.cutting import Cutter
from sglang_pic.find.finder import Finder, Looked
from sglang_pic.find.own import rules_with
from sglang_pic.find.rendered import chat_cuts, regions_of
from sglang_pic.find.spans import beside
from sglang_pic.link.policy import LinkOptions
from sglang_pic.link.report import HIT
from sglang_pic.metrics.front import counts
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.fields import MAX_SEGMENTS, PicFields, parse_fields
from sglang_pic.request.tokenize import Encoded, Offsets
from sglang_pic.server.chunks import Chunk, IdleCompiles
from sglang_pic.server.compiler import Compiler
from sglang_pic.server.exchange import Exchange
from sglang_pic.server.placing import rank_of
from sglang_pic.server.resolve import Resolver
from sglang_pic.server.searched import Owner, Searched, names_none, prompts_of
from sglang_pic.server.texts import Piece
from sglang_pic.server.wanted import Wanted, caller_of

# Tenants whose prompts are remembered, 1.4 MB each.
MAX_TENANTS = 64


@dataclasses.dataclass(frozen=True)
class Read:
    """A prompt as it came.

    Attributes:
        ids: its tokens.
        named: its segments that the request names.
        cuts: in tokens, where others may be.
    """

    ids: list[int]
    named: Sequence[TokenSpan]
    cuts: Sequence[Cut]


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found in a prompt.

    Attributes:
        ids, options: of the prompt.
        named: its segments that the request names.
        looked: all cuts beside them, and which are linked.
        finder: the tenant's.
    """

    ids: list[int]
    options: LinkOptions
    named: Sequence[TokenSpan]
    looked: Looked
    finder: Finder

    @functools.cached_property
    def segments(self) -> list[tuple[TokenSpan, int | None]]:
        """All that are linked, in order, each with the index of its cut if it was found."""
        cuts = self.looked.cuts
        segments: list[tuple[TokenSpan, int | None]] = [(span, None) for span in self.named]
        segments += [(TokenSpan(cuts[i].start, cuts[i].end), i) for i in self.looked.linked]
        return sorted(segments, key=lambda one: (one[0].start, one[0].end))

    @property
    def how(self) -> list[str]:
        """How each of them came to be one."""
        cuts = self.looked.cuts
        return [MARKED if i is None else cuts[i].found for _, i in self.segments]

    @property
    def prompt(self) -> tuple[list[int], LinkRequest]:
        """Token ids and link."""
        return self.ids, LinkRequest(tuple(span for span, _ in self.segments), self.options)

    def see(self, report: Mapping[str, Any]) -> None:
        """The report of an answer to it: what it has linked is compiled."""
        hits = []
        for (_, i), one in zip(self.segments, report["segments"], strict=True):
            if i is not None and one["reason"] == HIT:
                hits.append(i)
                counts.observe_found(self.looked.cuts[i].rule, one["tokens_reused"])
        self.finder.compiled(self.looked.names.chunks[hits])


class Finding:
    """Finds segments for one tokenizer manager.

    Args:
        is_idle: whether the server has nothing to do.
        is_linking: whether anything is linked now.
    """

    def __init__(
        self,
        config: PicConfig,
        resolver: Resolver,
        wanted: Wanted,
        compiler: Compiler,
        is_idle: Callable[[], bool],
        is_linking: Callable[[], bool],
    ):
        self._config = config
        self._defaults = config.link_defaults
        self._resolver = resolver
        self._wanted = wanted
        self._is_linking = is_linking
        self._idle = IdleCompiles(compiler, is_idle)
        self._finders: LRUCache[Any, Finder] = LRUCache(MAX_TENANTS)
        self.cutter = Cutter(config.min_segment, rules_with(config.find_rules))

    def is_asked(self, pic: Any) -> bool:
        """Whether segments are looked for in a request.

        Raises:
            PicRequestError: its ``pic`` object is malformed.
        """
        return self._mode(self._fields(pic)) != OFF

    def cut_chat(
        self,
        pieces: Sequence[Piece],
        made: Sequence[Encoded],
        messages: Sequence[Any],
        tools: Sequence[str],
    ) -> list[Cut]:
        """A chat prompt's cuts by structure, in tokens.

        Args:
            pieces, made: the texts that SGLang encodes one by one, and their tokens.
            messages, tools: of the request: decoded JSON, and names.
        """
        cuts: list[Cut] = []
        at = 0
        for piece, one in zip(pieces, made, strict=True):
            given = chat_cuts(piece.text, messages, tools, self.cutter.shortest)
            found = self.cutter.of_text(piece.text, given, regions_of(given))
            for cut in self.cutter.of_tokens(one.offsets, found):
                cuts.append(Cut(cut.start + at, cut.end + at, cut.rule))
            at += len(one.ids)
        return cuts

    def search(
        self,
        obj: GenerateReqInput,
        exchange: Exchange | None,
        pic: Any,
        *,
        remember: bool = True,
    ) -> list[Found] | None:
        """Find segments in a request, in each of its prompts by itself, beside those that it
        names; ``None`` where none are looked for.

        Args:
            pic: its own object, if it has one; of a batch a list of them.
            remember: and have compiled what recurs.

        Raises:
            PicRequestError: a ``pic`` object is malformed.
        """
        prompts = prompts_of(obj, pic)
        if prompts is None:
            return None
        asked = [self._fields(prompt.pic) for prompt in prompts]
        modes = [self._mode(fields) for fields in asked]
        if all(mode == OFF for mode in modes):
            return None
        found = []
        for prompt, fields, mode in zip(prompts, asked, modes, strict=True):
            read = self._read(prompt, fields, exchange, mode)
            if read is None:
                return None
            found.append(self._find(obj, prompt.owner, fields.options, read, remember=remember))
        return found

    def _fields(self, pic: Any) -> PicFields:
        return parse_fields(pic or {}, self._defaults)

    def _mode(self, fields: PicFields) -> str:
        linked = self._is_linking() and self._wanted.links(LinkRequest((), fields.options))
        return (fields.find or self._config.find) if linked else OFF

    def _read(
        self, prompt: Searched, fields: PicFields, exchange: Exchange | None, mode: str
    ) -> Read | None:
        """A prompt, with its cuts if any are looked for."""
        is_chat = exchange is not None and exchange.ids == prompt.prompt
        if exchange is not None and exchange.marks is not None and not is_chat:
            return None  # it was changed behind its template, and is refused
        read: Read | None
        if exchange is not None and is_chat:
            read = Read(list(exchange.ids or ()), exchange.spans, exchange.cuts)
        elif names_none(prompt.pic):
            read = self._read_plain(prompt.prompt, mode)
        else:
            read = self._read_named(prompt, fields.text, mode)
        if read is None or mode != CONTENT:
            return read
        return dataclasses.replace(read, cuts=self.cutter.by_content(read.ids, read.cuts))

    def _read_plain(self, prompt: str | list[int], mode: str) -> Read | None:
        if not isinstance(prompt, str):
            return Read(prompt, (), ())
        made = self._resolver.plain(Piece(prompt, special=True, bos=True))
        return None if made is None else Read(made.ids, (), self._cuts(prompt, made.offsets, mode))

    def _read_named(self, prompt: Searched, parts: str | None, mode: str) -> Read:
        given = prompt.prompt
        text, ids = (given, None) if isinstance(given, str) else (None, given)
        made, link, offsets = self._resolver.read(text, ids, prompt.pic, placed=mode != OFF)
        whole = text if parts is None else parts
        return Read(made, link.spans, () if whole is None else self._cuts(whole, offsets, mode))

    def _cuts(self, text: str, offsets: Offsets, mode: str) -> list[Cut]:
        if mode == OFF:
            return []
        return self.cutter.of_tokens(offsets, self.cutter.of_text(text, (), [(0, len(text))]))

    def _find(
        self,
        obj: GenerateReqInput,
        owner: Owner,
        options: LinkOptions,
        read: Read,
        *,
        remember: bool,
    ) -> Found:
        salt, *rest = owner
        cuts = beside(read.cuts, [(span.start, span.end) for span in read.named])
        remember = remember and bool(cuts)
        finder = self._finder(salt, remember)
        looked = finder.look(
            read.ids,
            cuts,
            seam=0 if options.policy == "none" else options.seam,
            most=MAX_SEGMENTS - len(read.named),
            owner=hashlib.blake2b(repr(rest).encode(), digest_size=16).digest(),
        )
        found = Found(read.ids, options, read.named, looked, finder)
        if remember:
            self._remember(obj, owner, found)
        return found

    def _finder(self, salt: str | None, remember: bool) -> Finder:
        """The one of a tenant; a new one is kept only to be remembered by."""
        space = self._wanted.space(salt)
        finder = self._finders.get(space) or Finder()
        if remember:
            self._finders[space] = finder
        return finder

    def _remember(self, obj: GenerateReqInput, owner: Owner, found: Found) -> None:
        looked, finder = found.looked, found.finder
        finder.came(looked, ordinary=not found.segments)
        rules = [cut.rule for cut in looked.cuts]
        recurring = [rules[i] for i in np.flatnonzero(looked.times).tolist()]
        counts.observe_chunks(collections.Counter(rules), collections.Counter(recurring))
        caller = dataclasses.replace(caller_of(obj), tenant=owner[0] or None)
        seam = 0 if found.options.policy == "none" else found.options.seam
        chunks = []
        for i in looked.wanted:
            cut = looked.cuts[i]
            item = self._wanted.segment(
                found.ids[cut.start : cut.end], *owner, seam=seam, rank=rank_of(obj)
            )
            name = int(looked.names.chunks[i])
            chunks.append(Chunk(item, cut.rule, caller, name, finder.compiled))
        self._idle.want(chunks)
