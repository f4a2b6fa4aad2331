"""What the scheduler answers at a request's arrival, before it is queued."""

from __future__ import annotations

import dataclasses
from http import HTTPStatus
from typing import Any

from sglang_pic.errors import PicActionError, PicRefused
from sglang_pic.faults import faults
from sglang_pic.forest.adapter import PicCache
from sglang_pic.manage.commands import check_trusted, obey
from sglang_pic.request.hints import DONE, MISSING, NO_LONGER
from sglang_pic.request.internal import NOTHING


@dataclasses.dataclass(frozen=True)
class Answer:
    """Ends a request, unqueued."""

    message: str
    status: int = HTTPStatus.BAD_REQUEST

    def to_json(self) -> dict[str, Any]:
        """The reason that SGLang's abort carries."""
        return {"type": "abort", "status_code": int(self.status), "message": self.message}


def answer(scheduler: Any, req: Any, is_retracted: bool) -> Answer | None:
    """Carry out a command; hand a strict link back whose segments are not compiled, and
    a request whose documents are not encoded; refuse what our front has not sent. Raises nothing.

    Returns:
        What ends the request, or ``None`` for one that is to run.
    """
    cache = scheduler.tree_cache
    if not isinstance(cache, PicCache) or is_retracted or req.output_ids:
        return None
    try:
        asked = cache.forest.asked.of(req)
        if asked is not NOTHING:
            cache.forest.consensus.arrived()
            with cache.forest.contained("store"):
                cache.forest.store.step()
        if asked.command is not None:
            return Answer(DONE + obey(scheduler, req, asked.command))
        if asked.encoded is not None:
            check_trusted(cache.forest)
            missing = cache.forest.encoded.take(req, asked.encoded)
            if missing and not asked.encoded.strict:
                return Answer(NO_LONGER, HTTPStatus.SERVICE_UNAVAILABLE)
            return Answer(f"{MISSING}{missing}") if missing else None
        if asked.link is not None and asked.link.strict:
            missing = cache.forest.arrivals.send_back(req)
            return Answer(f"{MISSING}{missing}") if missing else None
    except PicActionError as error:
        return Answer(str(error), error.status)
    except PicRefused as refused:
        return Answer(f"{refused.field}: {refused.message}", refused.status)
    except Exception:
        faults.note("arrival", [req.rid])
        return Answer("the server failed to read this request", HTTPStatus.INTERNAL_SERVER_ERROR)
    return None
