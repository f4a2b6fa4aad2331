"""Marking a stretch of a frontend program's text as a segment.

The mark is a variable of the program's state that holds where the segment
starts. It rides along wherever SGLang carries variables, through roles, loops
and ``fork``, and never enters the text: to a backend that knows nothing of it,
a segment is ordinary text.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

from sglang.lang.ir import SglConstantText, SglExpr, SglExprList, SglVarScopeBegin

_PREFIX = "__pic_segment"
_serial = itertools.count()  # next() on it is atomic


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class _Mark(SglVarScopeBegin):
    """Stores the text's length so far under a name that says what comes next.

    Every reading of the name gives a new one, so that an expression that is
    appended twice, or to every branch of a fork, marks each of its places.
    """

    def __init__(self, text: str):
        SglExpr.__init__(self)
        self._content = f"{len(text)}:{_digest(text)}"

    @property
    def name(self) -> str:
        return f"{_PREFIX}:{next(_serial)}:{self._content}"


def pic_segment(text: str) -> SglExprList:
    """An expression that appends ``text`` and marks it as one segment.

    Use it wherever a string may stand: ``s += pic_segment(document)``,
    ``sgl.user("Read this: " + pic_segment(document))``. The expression may be
    kept and appended any number of times.

    SGLang's tracer (``program.trace``) has no rule for the variable that holds
    the mark. The tracing that precedes ``run_batch`` copes: it warms up the
    text in front of the first segment.

    Raises:
        TypeError: ``text`` is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"a segment is a string, got {type(text).__name__}")
    return SglExprList([_Mark(text), SglConstantText(text)])


def segment_ranges(state: Any) -> list[tuple[int, int]]:
    """Where the segments of a state lie in its text.

    A range whose characters are no longer those that were marked is left out:
    SGLang rewrites text behind an answer that ``separate_reasoning`` has
    stripped. Text that ``join("concate_and_append")`` brings from a branch
    comes without marks; it is ordinary text of the parent.

    Args:
        state: a ``ProgramState``, whose pending expressions are waited for, or
            a ``StreamExecutor``, which is read as it is.

    Returns:
        Half-open ranges [start, end) in characters (Unicode code points) of
        ``text_``, sorted and disjoint; of an empty segment, empty.
    """
    executor = getattr(state, "stream_executor", None)
    if executor is None:
        executor = state
    else:
        executor.sync()
    text = executor.text_
    found = set()
    for name, start in list(executor.variables.items()):
        # A join turns the branches' variables into lists: places in other texts.
        if not (isinstance(name, str) and name.startswith(_PREFIX) and isinstance(start, int)):
            continue
        _, _, length, digest = name.split(":")
        end = start + int(length)
        if end <= len(text) and _digest(text[start:end]) == digest:
            found.add((start, end))
    ranges: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if not ranges or start >= ranges[-1][1]:
            ranges.append((start, end))
    return ranges
