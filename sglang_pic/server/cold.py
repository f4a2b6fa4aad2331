"""The first request over documents that nobody has asked about: computed in one piece.

Compiling them first would take as long as the prompt itself, and the answer would be a
composed one. So it is answered exactly, and its segments are compiled when it is done. Who
asks about the same documents meanwhile has them compiled at once, and links.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sglang_pic.request.base import OPENING, LinkRequest
from sglang_pic.server.answers import is_complete
from sglang_pic.server.compiler import Caller, Compiler
from sglang_pic.server.items import CompileItem

# Why such a request is answered exactly.
FIRST_TIME = "first_time"


class Cold:
    """Decides for one tokenizer manager.

    Args:
        busiest: of items of so many tokens, the tokens that whoever compiles most would.
        allowed: whether anything is answered so.
    """

    def __init__(
        self, compiler: Compiler, busiest: Callable[[Sequence[int]], int] = sum, *, allowed: bool
    ):
        self._compiler = compiler
        self._busiest = busiest
        self._allowed = allowed
        # What will be compiled behind requests that run now.
        self._coming: Counter[CompileItem] = Counter()
        self._tasks: set[asyncio.Task[object]] = set()

    def is_cheaper(
        self,
        ids: Sequence[int],
        link: LinkRequest,
        missing: Sequence[int],
        items: Sequence[CompileItem],
    ) -> bool:
        """Whether a prompt is sooner computed in one piece than compiled and linked, and
        nobody has what it lacks compiled already.

        Args:
            missing, items: what it lacks, and what compiles that.
        """
        if not self._allowed or any(
            item in self._coming or self._compiler.is_under_way(item) for item in items
        ):
            return False
        seam = 0 if link.options.policy == "none" else link.options.seam
        compiled = self._busiest([len(item.ids) for item in items])
        # The text in front of the segments is cached when it comes to linking.
        opening = link.spans[0].start if link.spans else 0
        named = sum(span.end - span.start for span in link.spans)
        linked = len(ids) - opening - named + seam * len(link.spans)
        whole = len(ids) if OPENING in missing else len(ids) - opening
        return compiled + linked >= whole

    @contextlib.contextmanager
    def answered(
        self, items: Sequence[CompileItem], caller: Caller
    ) -> Iterator[Callable[[Any], None]]:
        """Around the answer to such a request, whose outputs are to be shown to what this
        yields before they are handed on, since nobody asks a generator for more than it
        needs. Behind the last what it lacks is compiled; who leaves before has nothing
        compiled."""
        is_coming = True
        self._coming.update(items)

        def comes_no_more() -> bool:
            nonlocal is_coming
            was, is_coming = is_coming, False
            if was:
                self._coming.subtract(items)
                self._coming += Counter()
            return was

        def see(out: Any) -> None:
            if is_complete(out) and comes_no_more():
                work = self._compiler.compile(items, caller)
                task: asyncio.Task[object] = asyncio.get_running_loop().create_task(work)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        try:
            yield see
        finally:
            comes_no_more()
