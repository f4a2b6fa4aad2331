"""What the front is told of a link before it runs: what to compile first, what it would
get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_pic.forest.checkpoints import Checkpoints
from sglang_pic.forest.holder import Holder
from sglang_pic.forest.links import Links
from sglang_pic.forest.planning import Ordinary, Planning
from sglang_pic.forest.state import unlinkable
from sglang_pic.link.plan import unlinked_plan
from sglang_pic.link.policy import floor_to
from sglang_pic.link.report import Found, make_report
from sglang_pic.request.base import OPENING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Arrivals:
    """Questions about links.

    Args:
        shortest: tokens of the shortest opening that is compiled.
        page: tokens per page.
    """

    def __init__(
        self,
        links: Links,
        ordinary: Ordinary,
        planning: Planning,
        holder: Holder,
        checkpoints: Checkpoints,
        shortest: int,
        page: int,
    ):
        self._links = links
        self._ordinary = ordinary
        self._planning = planning
        self._holder = holder
        self._checkpoints = checkpoints
        self._shortest = shortest
        self._page = page

    def missing(self, req: Req) -> list[int]:
        """Indices of the segments that would have to be compiled before linking;
        ``OPENING`` stands for the plain text before the first one."""
        link = self._links.of(req)
        if link is None or self._links.refusal(link) is not None or unlinkable(req, link.request):
            return []
        options = link.request.options
        if not options.link or options.policy == "full":
            return []
        found = self._planning.found(req, link)
        missing = [
            i
            for i, lookup in enumerate(found)
            if lookup is not None and lookup.miss and lookup.core[0] < lookup.core[1]
        ]
        opening = link.request.spans[0].start if link.request.spans else 0
        if opening >= self._shortest:
            held = self._ordinary.held(req.origin_input_ids[:opening], req).device_prefix_len
            if held < floor_to(opening, self._ordinary.grid):
                missing.append(OPENING)
        return [] if missing and self._is_prefix(req) else missing

    def _is_prefix(self, req: Req) -> bool:
        """Whether SGLang holds all of the prompt but its last tokens, computed as such."""
        ids = req.origin_input_ids[:-1]
        held = self._ordinary.held(ids, req).device_prefix_len
        return held > 0 and held >= floor_to(len(ids), self._page)

    def send_back(self, req: Req) -> list[int]:
        """``missing``, of a link that will come again when those are compiled; what is
        there is held back from eviction until then."""
        missing = self.missing(req)
        link = self._links.of(req)
        if missing and link is not None:
            found = link.found or ()
            self._holder.expect([one.copy for one in found if one is not None and one.miss is None])
        return missing

    def cached(self, req: Req) -> int:
        """Tokens of a prompt without a link that SGLang would not compute."""
        prefix = self._ordinary.held(req.origin_input_ids[:-1], req)
        return self._checkpoints.found(req, prefix).device_prefix_len

    def explain(self, req: Req) -> dict[str, Any]:
        """What a link would do, without doing it: the report it would get now, and
        ``tokens_to_compile``, of segments that would be compiled first."""
        link = self._links.of(req)
        assert link is not None
        options = link.request.options
        ids = req.origin_input_ids
        prefix = self._ordinary.held(ids[:-1], req)
        if not link.request.spans:
            prefix = self._checkpoints.found(req, prefix)
        reason = self._links.refusal(link) or unlinkable(req, link.request)
        seen = [Found(span.start, span.end) for span in link.request.spans]
        plan, prefix_tokens = None, prefix.device_prefix_len
        if reason is None and not options.link:
            plan = unlinked_plan(len(ids))
        elif reason is None:
            made = self._planning.arrange(req, link, ids, prefix, len(ids) - 1)
            seen = made.seen
            if made.cores:
                plan, prefix_tokens = made.plan, made.prefix
        report = make_report(
            len(ids),
            options,
            segments=seen,
            prefix_tokens=prefix_tokens,
            plan=plan,
            reason=reason,
        )
        spans = link.request.spans
        absent = [spans[i] for i in self.missing(req) if i != OPENING]
        return {
            **report.to_json(),
            "tokens_to_compile": sum(span.end - span.start for span in absent),
        }
