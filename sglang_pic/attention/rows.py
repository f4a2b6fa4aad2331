"""Rows of a forward pass, and the requests they belong to.

The two are not the same. A beam has several rows, behind those of all requests; a
graph pads its batch; a pass may be a part of the scheduler's batch, or none of it (a
warm-up). So what a request has is handed over under its id, and read by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def by_row(rids: Sequence[str], values: Sequence[T | None], batch: Any) -> list[T | None]:
    """One value a row.

    Args:
        rids: ids of requests, each once.
        values: one a request.
        batch: SGLang's ``ForwardBatch``.

    Returns:
        ``None`` for rows of no request among ``rids``.
    """
    rows = len(batch.seq_lens)
    named = dict(zip(rids, values, strict=True))
    found = [named.get(rid) for rid in (batch.rids or ())[:rows]]
    return found + [None] * (rows - len(found))


def can_tell(batch: Any) -> bool:
    """Whether every request of a batch has a row, and one alone has its id."""
    rids = batch.rids
    lengths = [len(batch.seq_lens)]
    if batch.forward_mode.is_extend_without_speculative():
        lengths += [len(batch.extend_prefix_lens_cpu), len(batch.extend_seq_lens_cpu)]
    return len(set(rids)) == len(rids) <= min(lengths)
