"""The report of a prompt whose documents a trained encoder reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sglang_pic.link.policy import ENCODE
from sglang_pic.link.report import EMPTY, ENCODED, MISSING, LinkReport, SegmentReport

if TYPE_CHECKING:
    from sglang_pic.request.base import LinkRequest


@dataclasses.dataclass(frozen=True)
class EncodedReport(LinkReport):
    """``tokens_outside``: of the prompt, in documents: they are not in the row."""

    tokens_outside: int = 0


def make_encoded_report(
    n_tokens: int,
    link: LinkRequest,
    *,
    names: Sequence[str],
    cached: int,
    held: Sequence[bool] | None = None,
) -> EncodedReport:
    """Report one request.

    Args:
        n_tokens: tokens of the prompt, with its documents.
        names: of the segments that are not empty.
        cached: tokens of the row that SGLang had.
        held: which of those segments are held, foretold; all, of an answer.
    """
    left = zip(names, [True] * len(names) if held is None else held, strict=True)
    segments = []
    for span in link.spans:
        name, is_held = next(left) if span.start < span.end else (None, False)
        reason = EMPTY if name is None else ENCODED if is_held else MISSING
        segments.append(SegmentReport(span.start, span.end, name, is_held, reason, 0, 0))
    outside = sum(span.end - span.start for span in link.spans)
    return EncodedReport(
        exactness=ENCODED,
        reason=None,
        policy=link.options.policy,
        seam=link.options.seam,
        mode=ENCODE,
        tokens_reused=cached,
        tokens_computed=n_tokens - outside - cached,
        prefix_tokens=cached,
        turn_tokens=0,
        segments=tuple(segments),
        tokens_outside=outside,
    )
