"""What of a prompt has to be compiled first: the scheduler is asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.request.base import LinkRequest
from sglang_pic.server.answers import handed_back, samples_of
from sglang_pic.server.commands import command
from sglang_pic.server.send import set_link
from sglang_pic.server.wanted import Wanted, rank_of

Generate = Callable[..., AsyncGenerator[Any, None]]


class Asking:
    """Asks for the prompts of one tokenizer manager."""

    def __init__(self, manager: Any, wanted: Wanted):
        self._manager = manager
        self._wanted = wanted

    async def ask(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        ids: list[int],
        link: LinkRequest,
    ) -> tuple[AsyncGenerator[Any, None], Sequence[int]]:
        """Outputs of a prompt, or what has to be compiled first.

        A strict link is the question, and where nothing is missing already runs. Of
        several samples each would come back: there a command asks.

        Args:
            generate: SGLang's ``generate_request``.
            request: whose client may leave, or ``None``.
        """
        if samples_of(obj) == 1:
            set_link(obj, ids, link, strict=True)
            return await handed_back(generate(self._manager, obj, request))
        missing = await self._missing(obj, ids, link) if self._wanted.links(link) else []
        set_link(obj, ids, link, strict=False)
        return generate(self._manager, obj, request), missing

    async def _missing(
        self, obj: GenerateReqInput, ids: list[int], link: LinkRequest
    ) -> Sequence[int]:
        """What the rank that the request names does not hold; without a name, what none
        of them does."""
        ranks = await command(
            self._manager,
            "missing",
            ids=ids,
            link=link,
            cache_salt=obj.cache_salt,
            extra_key=obj.extra_key,
            lora_path=obj.lora_path,
            rank=rank_of(obj),
        )
        return [i for i in ranks[0]["missing"] if all(i in rank["missing"] for rank in ranks)]
