"""What has to be compiled before a request can link."""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.config import PicConfig
from sglang_pic.forest.keys import namespace
from sglang_pic.link.policy import ENCODE
from sglang_pic.request.base import OPENING, LinkRequest
from sglang_pic.server.companions import Kind
from sglang_pic.server.compiler import Caller
from sglang_pic.server.items import CompileItem
from sglang_pic.server.placing import rank_of


class Wanted:
    """Names what to compile, with one server's settings.

    Args:
        context: of every compile, cut to whole pages.
        config: the server's settings.
    """

    def __init__(self, context: tuple[int, ...], config: PicConfig):
        self.context = context
        self._config = config

    def links(self, link: LinkRequest) -> bool:
        """Whether it would use compiled segments."""
        options = link.options
        linked = options.link and options.mode != ENCODE
        return linked and not link.is_exact and options.policy != "full"

    def items(
        self, obj: GenerateReqInput, ids: list[int], link: LinkRequest, missing: Sequence[int]
    ) -> list[CompileItem]:
        """What is missing of a request with one prompt, in the given order: segments by
        index, ``OPENING`` for the text in front of them."""
        options = link.options
        seam = 0 if options.policy == "none" else options.seam
        rank = rank_of(obj)
        items = []
        for i in missing:
            if i == OPENING:
                opening = tuple(ids[: link.spans[0].start])
                salt, extra_key, lora = obj.cache_salt, obj.extra_key, obj.lora_path
                items.append(CompileItem(opening, salt, extra_key, lora, segment=False, rank=rank))
                continue
            segment = ids[link.spans[i].start : link.spans[i].end]
            owner = (obj.cache_salt, obj.extra_key, obj.lora_path)
            items.append(self.segment(segment, *owner, seam=seam, rank=rank))
        return items

    def kind(self, obj: GenerateReqInput, ids: Sequence[int], link: LinkRequest) -> Kind:
        """What a prompt's segments have in common with others that may be computed in
        company with them."""
        opening = ids[: link.spans[0].start] if link.spans else ids
        return self.kind_of(
            opening, obj.cache_salt, obj.extra_key, obj.lora_path, rank=rank_of(obj)
        )

    def kind_of(
        self,
        opening: Sequence[int],
        salt: str | None,
        extra_key: str | None,
        lora: str | None = None,
        *,
        rank: int | None = None,
    ) -> Kind:
        """The kind of prompts of one tenant that begin so."""
        return Kind(self.space(salt), extra_key, lora, rank, tuple(opening))

    def space(self, salt: str | None) -> str:
        """The namespace of a tenant's segments."""
        return namespace(self.context, salt)

    def segment(
        self,
        ids: Sequence[int],
        salt: str | None,
        extra_key: str | None,
        lora: str | None = None,
        *,
        seam: int | None = None,
        named: bool = False,
        rank: int | None = None,
        here: bool = False,
    ) -> CompileItem:
        """The internal request that compiles one segment for one tenant, in a
        hybrid for links of one seam width: the server's own by default."""
        path, space = (*self.context, *ids), self.space(salt)
        return CompileItem(
            path,
            space,
            extra_key,
            lora,
            seams=(self._config.seam if seam is None else seam,),
            named=named,
            rank=rank,
            here=here,
        )


def caller_of(obj: GenerateReqInput) -> Caller:
    """For whom a request with one prompt has segments compiled."""
    return Caller(obj.cache_salt or None, obj.priority, obj.routing_key, obj.no_logs)
