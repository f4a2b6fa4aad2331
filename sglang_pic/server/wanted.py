"""What has to be compiled before a request can link."""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.config import PicConfig
from sglang_pic.forest.keys import namespace
from sglang_pic.request.base import OPENING, LinkRequest
from sglang_pic.server.compiler import CompileItem


class Wanted:
    """Names what to compile, with one server's settings.

    Args:
        context: of every compile, cut to whole pages.
        config: the server's settings.
    """

    def __init__(self, context: tuple[int, ...], config: PicConfig):
        self.context = context
        self._config = config

    def items(
        self,
        obj: GenerateReqInput,
        ids: list[int],
        link: LinkRequest,
        *,
        only: Sequence[int] | None,
        index: int = 0,
    ) -> list[CompileItem]:
        """Segments (and the opening text) of the request's prompt number
        ``index``, or those of them in ``only``."""
        options = link.options
        if not options.link or link.is_exact or options.policy == "full":
            return []
        salt, extra_key, lora = (
            value[index] if isinstance(value, list) else value
            for value in (obj.cache_salt, obj.extra_key, obj.lora_path)
        )
        items = []
        opening = link.spans[0].start if link.spans else 0
        if OPENING in only if only is not None else opening >= self._config.min_segment:
            items.append(CompileItem(tuple(ids[:opening]), salt, extra_key, lora, segment=False))
        for i, span in enumerate(link.spans):
            short = span.end - span.start < self._config.min_segment
            if i in only if only is not None else not short:
                segment = ids[span.start : span.end]
                seam = 0 if options.policy == "none" else options.seam
                items.append(self.segment(segment, salt, extra_key, lora, seam=seam))
        return items

    def segment(
        self,
        ids: Sequence[int],
        salt: str | None,
        extra_key: str | None,
        lora: str | None = None,
        *,
        seam: int | None = None,
        named: bool = False,
    ) -> CompileItem:
        """The internal request that compiles one segment for one tenant, in a
        hybrid for links of one seam width: the server's own by default."""
        space = namespace(self.context, salt)
        seams = (self._config.seam if seam is None else seam,)
        return CompileItem((*self.context, *ids), space, extra_key, lora, seams=seams, named=named)
