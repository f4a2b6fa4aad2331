"""What our front says of each request, read once."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from sglang_pic.request.internal import NOTHING, Internal, read_internal

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Asked:
    """``read_internal`` of the requests of one scheduler."""

    def __init__(self) -> None:
        self._read: weakref.WeakKeyDictionary[Req, Internal] = weakref.WeakKeyDictionary()

    def of(self, req: Req) -> Internal:
        """What our front says of a request; nothing of one that SGLang has ended
        before it arrived, whose prompt is no longer its own.

        Raises:
            PicActionError: as ``read_internal``, the first time it is asked, at the
                request's arrival; it says nothing from then on.
        """
        if req.kv_hints is None and not req.cache_salt:
            return NOTHING
        if req not in self._read:
            self._read[req] = NOTHING
            ended = req.finished() or req.to_finish is not None
            tokens = None if ended else len(req.origin_input_ids)
            found = read_internal(req.kv_hints, salt=req.cache_salt, tokens=tokens)
            if not ended:
                self._read[req] = found
        return self._read[req]
