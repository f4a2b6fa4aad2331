"""What the front does for prompts whose documents a trained encoder reads.

On a server with an encoder: ``server.with_encoder``. On any other they are refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.errors import PicRequestError
from sglang_pic.server.asking import Generate
from sglang_pic.server.compiler import Caller
from sglang_pic.server.life import Prompt
from sglang_pic.server.waited import Waited

NO_ENCODER = "this server has no encoder: --pic-encoder"


class Documents(Protocol):
    """Prompts with encoded documents of one tokenizer manager."""

    async def settle(self) -> None:
        """Wait until it is known whether the encoder may be served."""
        ...

    def check(self, prompt: Prompt) -> None:
        """Raise ``PicRequestError`` for one that cannot be answered."""
        ...

    def check_documents(self, documents: Mapping[str, Sequence[int]], field: str) -> None:
        """Raise ``PicRequestError`` for documents that cannot be held at once.

        Args:
            documents: token ids, not empty, by the fields that they came in.
            field: that all of them came in.
        """
        ...

    async def make(self, documents: Sequence[tuple[int, ...]], caller: Caller) -> list[int] | None:
        """Have documents ahead of prompts, as asked for by name, as far as there is room.

        Returns:
            Tokens that were encoded for each; ``None`` where too many of the tenant wait.

        Raises:
            PicRefused: 503, the encoder must not be served; else as the command does.
        """
        ...

    def live(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        prompt: Prompt,
        waited: list[Waited],
        index: int,
    ) -> AsyncGenerator[Any, None]:
        """As ``Lives.live``."""
        ...

    def to_json(self) -> dict[str, Any] | None:
        """For clients; ``None`` without an encoder."""
        ...


class NoDocuments:
    """Of a server without an encoder."""

    async def settle(self) -> None:
        pass

    def check(self, prompt: Prompt) -> None:
        raise PicRequestError("pic.mode", NO_ENCODER)

    def check_documents(self, documents: Mapping[str, Sequence[int]], field: str) -> None:
        raise PicRequestError("mode", NO_ENCODER)

    async def make(self, documents: Sequence[tuple[int, ...]], caller: Caller) -> list[int] | None:
        raise PicRequestError("mode", NO_ENCODER)

    async def live(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        prompt: Prompt,
        waited: list[Waited],
        index: int,
    ) -> AsyncGenerator[Any, None]:
        self.check(prompt)
        yield None

    def to_json(self) -> None:
        return None
