"""Segments of requests that name none: what recurs in a tenant's prompts (``--pic-find``).

A chunk that is seen for the first time is only remembered. One that recurs is compiled when
there is nothing else to do, or ahead of a link where that pays at once; what is compiled is
linked. Token ids are never changed: where nothing is linked the request goes on as it came.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from cachetools import LRUCache
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.config import PicConfig
from sglang_pic.find.base import CONTENT, OFF, Cut
from sglang_pic.find.cutting import Cutter
from sglang_pic.find.finder import Finder, Looked
from sglang_pic.find.own import rules_with
from sglang_pic.find.rendered import chat_cuts, regions_of
from sglang_pic.link.policy import LinkOptions
from sglang_pic.link.report import HIT
from sglang_pic.metrics.front import counts
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.fields import MAX_SEGMENTS, PicFields, parse_fields
from sglang_pic.server.chunks import Chunk, IdleCompiles
from sglang_pic.server.compiler import Compiler
from sglang_pic.server.exchange import Exchange
from sglang_pic.server.placing import rank_of
from sglang_pic.server.resolve import Resolver
from sglang_pic.server.searched import Owner, prompts_of
from sglang_pic.server.texts import Piece
from sglang_pic.server.wanted import Wanted, caller_of

# Tenants whose prompts are remembered, 1.4 MB each.
MAX_TENANTS = 64


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found in a prompt.

    Attributes:
        ids, options: of the prompt.
        looked: all its cuts, and which are linked.
        finder: the tenant's.
    """

    ids: list[int]
    options: LinkOptions
    looked: Looked
    finder: Finder

    @property
    def cuts(self) -> list[Cut]:
        """Those that are linked."""
        return [self.looked.cuts[i] for i in self.looked.linked]

    @property
    def how(self) -> list[str]:
        """How each of them was found."""
        return [cut.found for cut in self.cuts]

    @property
    def prompt(self) -> tuple[list[int], LinkRequest]:
        """Token ids and link."""
        spans = tuple(TokenSpan(cut.start, cut.end) for cut in self.cuts)
        return self.ids, LinkRequest(spans, self.options)

    def see(self, report: Mapping[str, Any]) -> None:
        """The report of an answer to it: what it has linked is compiled."""
        hits = []
        for i, one in zip(self.looked.linked, report["segments"], strict=True):
            if one["reason"] == HIT:
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
        """Whether segments are looked for in a request that names none.

        Raises:
            PicRequestError: its ``pic`` object is malformed.
        """
        return self._mode(self._fields(pic)) != OFF

    def cut_chat(
        self, pieces: Sequence[Piece], messages: Sequence[Any], tools: Sequence[str]
    ) -> tuple[list[int], list[Cut]] | None:
        """A chat prompt's token ids, as stock has them, and its cuts by structure, in tokens;
        ``None`` where the tokenizer does not tell where its tokens lie.

        Args:
            pieces: the texts that SGLang encodes one by one.
            messages, tools: of the request: decoded JSON, and names.
        """
        ids: list[int] = []
        cuts: list[Cut] = []
        for piece in pieces:
            made = self._resolver.with_offsets(piece)
            if made is None:
                return None
            given = chat_cuts(piece.text, messages, tools, self.cutter.shortest)
            found = self.cutter.of_text(piece.text, given, regions_of(given))
            for cut in self.cutter.of_tokens(made[1], found):
                cuts.append(Cut(cut.start + len(ids), cut.end + len(ids), cut.rule))
            ids += made[0]
        return ids, cuts

    def search(
        self,
        obj: GenerateReqInput,
        exchange: Exchange | None,
        pic: Any,
        *,
        remember: bool = True,
    ) -> list[Found] | None:
        """Find segments in a request that names none, in each of its prompts by itself;
        ``None`` where none are looked for.

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
            read = self._read(prompt.prompt, exchange, mode)
            if read is None:
                return None
            found.append(self._find(obj, prompt.owner, fields.options, *read, remember=remember))
        return found

    def _fields(self, pic: Any) -> PicFields:
        return parse_fields(pic or {}, self._defaults)

    def _mode(self, fields: PicFields) -> str:
        linked = self._is_linking() and self._wanted.links(LinkRequest((), fields.options))
        return (fields.find or self._config.find) if linked else OFF

    def _read(
        self, prompt: str | list[int], exchange: Exchange | None, mode: str
    ) -> tuple[list[int], Sequence[Cut]] | None:
        """Token ids and cuts of a prompt."""
        ids: list[int]
        cuts: Sequence[Cut] = ()
        if isinstance(prompt, str):
            made = self._resolver.with_offsets(Piece(prompt, special=True, bos=True))
            if made is None:
                return None
            ids = made[0]
            if mode != OFF:
                found = self.cutter.of_text(prompt, (), [(0, len(prompt))])
                cuts = self.cutter.of_tokens(made[1], found)
        else:
            ids = prompt
            if exchange is not None and exchange.ids == ids:
                cuts = exchange.cuts
        return ids, self.cutter.by_content(ids, cuts) if mode == CONTENT else cuts

    def _find(
        self,
        obj: GenerateReqInput,
        owner: Owner,
        options: LinkOptions,
        ids: list[int],
        cuts: Sequence[Cut],
        *,
        remember: bool,
    ) -> Found:
        salt, *rest = owner
        remember = remember and bool(cuts)
        finder = self._finder(salt, remember)
        seam = 0 if options.policy == "none" else options.seam
        of = hashlib.blake2b(repr(rest).encode(), digest_size=16).digest()
        looked = finder.look(ids, cuts, seam=seam, most=MAX_SEGMENTS, owner=of)
        if remember:
            self._remember(obj, owner, ids, looked, finder, seam)
        return Found(ids, options, looked, finder)

    def _finder(self, salt: str | None, remember: bool) -> Finder:
        """The one of a tenant; a new one is kept only to be remembered by."""
        space = self._wanted.space(salt)
        finder = self._finders.get(space) or Finder()
        if remember:
            self._finders[space] = finder
        return finder

    def _remember(
        self,
        obj: GenerateReqInput,
        owner: Owner,
        ids: list[int],
        looked: Looked,
        finder: Finder,
        seam: int,
    ) -> None:
        finder.came(looked, ordinary=not looked.linked)
        rules = [cut.rule for cut in looked.cuts]
        recurring = [rules[i] for i in np.flatnonzero(looked.times).tolist()]
        counts.observe_chunks(collections.Counter(rules), collections.Counter(recurring))
        caller = dataclasses.replace(caller_of(obj), tenant=owner[0] or None)
        chunks = []
        for i in looked.wanted:
            cut = looked.cuts[i]
            item = self._wanted.segment(
                ids[cut.start : cut.end], *owner, seam=seam, rank=rank_of(obj)
            )
            name = int(looked.names.chunks[i])
            chunks.append(Chunk(item, cut.rule, caller, name, finder.compiled))
        self._idle.want(chunks)
