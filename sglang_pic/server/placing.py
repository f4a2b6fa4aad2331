"""Placing: on which data-parallel rank a prompt with segments runs.

Each rank has a cache of its own. SGLang spreads requests evenly; a prompt of ours, and
what is compiled for it, goes where least is left to compute: what the rank has under way,
and what of the prompt it does not hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from cachetools import LRUCache
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.forest.keys import segment_id
from sglang_pic.request.base import LinkRequest

# Segments of which it is remembered where they were wanted; 130 bytes each.
MAX_KNOWN = 65536


def rank_of(obj: GenerateReqInput) -> int | None:
    """The data-parallel rank that a request names."""
    return obj.routed_dp_rank if obj.routed_dp_rank is not None else obj.data_parallel_rank


class Placing(Protocol):
    """Chooses ranks."""

    def placed(
        self, obj: GenerateReqInput, space: str, ids: Sequence[int], link: LinkRequest
    ) -> AbstractContextManager[None]:
        """Around the life of a request with one prompt, which gets a rank unless it names
        one itself.

        Args:
            space: namespace of its segments.
        """
        ...


class OneRank:
    """There is nothing to choose."""

    def placed(
        self, obj: GenerateReqInput, space: str, ids: Sequence[int], link: LinkRequest
    ) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


class LeastWork:
    """The rank with the fewest tokens to compute.

    Args:
        ranks: how many there are.
    """

    def __init__(self, ranks: int):
        self._under_way = [0] * ranks
        # Of a segment the ranks it was wanted on, as bits.
        self._wanted: LRUCache[str, int] = LRUCache(MAX_KNOWN)
        self._last = -1

    @contextlib.contextmanager
    def placed(
        self, obj: GenerateReqInput, space: str, ids: Sequence[int], link: LinkRequest
    ) -> Iterator[None]:
        owner = f"{obj.extra_key or ''}\x1f{obj.lora_path or ''}"
        lengths = {
            segment_id(space, owner, ids[span.start : span.end]): span.end - span.start
            for span in link.spans
        }
        rank = rank_of(obj)
        if rank is None:
            obj.routed_dp_rank = rank = self._least(lengths)
        for name in lengths:
            self._wanted[name] = self._wanted.get(name, 0) | 1 << rank
        # A rank that there is not is SGLang's to refuse.
        known = 0 <= rank < len(self._under_way)
        if known:
            self._under_way[rank] += len(ids)
        try:
            yield
        finally:
            if known:
                self._under_way[rank] -= len(ids)

    def _least(self, lengths: dict[str, int]) -> int:
        count = len(self._under_way)
        work = list(self._under_way)
        for name, length in lengths.items():
            wanted = self._wanted.get(name, 0)
            for rank in range(count):
                work[rank] += 0 if wanted >> rank & 1 else length
        # Of equals the next in turn.
        turn = self._last + 1
        self._last = min(range(count), key=lambda rank: (work[rank], (rank - turn) % count))
        return self._last
