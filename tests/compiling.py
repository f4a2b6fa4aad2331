"""A stand-in for the front's compiler."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sglang_pic.server.compiler import COMPILED, Made
from sglang_pic.server.items import CompileItem


class Compiler:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.items: list[CompileItem] = []
        self.outcome = COMPILED

    async def compile(self, items: Sequence[CompileItem], caller: Any = None) -> list[Made]:
        self.items += items
        await asyncio.sleep(0)
        return [Made(self.outcome, len(item.ids)) for item in items]
