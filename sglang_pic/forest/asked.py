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
        """What our front says of a request.

        Raises:
            PicActionError: as ``read_internal``. Such a request is ended at its
                arrival.
        """
        if req.kv_hints is None and not req.cache_salt:
            return NOTHING
        found = self._read.get(req)
        if found is None:
            found = self._read[req] = read_internal(
                req.kv_hints, salt=req.cache_salt, tokens=len(req.origin_input_ids)
            )
        return found
