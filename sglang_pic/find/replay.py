"""Play recorded prompts, in order, through imagined servers that never evict: what each
would reuse.

A prefix cache alone; and one with segments on top of it: those that are marked, those that
structure finds, and those that content finds too.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from sglang_pic.find.base import CONTENT, MARKED, STRUCTURE, Cut
from sglang_pic.find.finder import Finder
from sglang_pic.find.seen import named

PREFIX = "prefix"
METHODS = (PREFIX, MARKED, STRUCTURE, CONTENT)
# Prefixes are told apart by so many tokens.
STEP = 16
MAX_SEGMENTS = 512

Flops = Callable[[int, int], float]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A recorded prompt.

    Attributes:
        ids: its tokens.
        cuts: in tokens, by method.
        tenant: whose it is.
    """

    ids: Sequence[int]
    cuts: dict[str, Sequence[Cut]]
    tenant: str | None = None


@dataclasses.dataclass
class Tally:
    """What one method did.

    Attributes:
        tokens, saved: of prompts, and of these not computed.
        linked: those of ``saved`` that no prefix has saved.
        compiled: computed once for segments.
        held: tokens of memory at the end.
        work: of prompts and compiles, in FLOPs or tokens.
        rules: of ``linked``, by the rule that found the segment.
        curve: after each prompt the share of tokens saved by then.
    """

    tokens: int = 0
    saved: int = 0
    linked: int = 0
    compiled: int = 0
    held: int = 0
    work: float = 0.0
    rules: Counter[str] = dataclasses.field(default_factory=Counter)
    curve: list[float] = dataclasses.field(default_factory=list)


class Linking(Protocol):
    """Which segments of one tenant's prompts are linked."""

    def of(self, ids: Sequence[int], cuts: Sequence[Cut]) -> tuple[list[Cut], list[Cut]]:
        """A prompt's segments that are compiled, and those that are from now on."""
        ...


class _NoSegments:
    def of(self, ids: Sequence[int], cuts: Sequence[Cut]) -> tuple[list[Cut], list[Cut]]:
        return [], []


class _Marked:
    """All that are named, from the second time on."""

    def __init__(self) -> None:
        self._compiled: set[int] = set()

    def of(self, ids: Sequence[int], cuts: Sequence[Cut]) -> tuple[list[Cut], list[Cut]]:
        names = named(ids, cuts).chunks.tolist()
        linked = [cut for cut, name in zip(cuts, names, strict=True) if name in self._compiled]
        new = {
            name: cut for cut, name in zip(cuts, names, strict=True) if name not in self._compiled
        }
        self._compiled.update(new)
        return linked, list(new.values())


class _Found:
    """What recurs; the server is taken to be idle between two prompts."""

    def __init__(self, seam: int) -> None:
        self._seam = seam
        self._finder = Finder()

    def of(self, ids: Sequence[int], cuts: Sequence[Cut]) -> tuple[list[Cut], list[Cut]]:
        looked = self._finder.look(ids, cuts, seam=self._seam, most=MAX_SEGMENTS)
        ready = [i for i in looked.linked if self._finder.is_ready(looked, i)]
        new = [i for i in [*looked.linked, *looked.wanted] if i not in set(ready)]
        self._finder.came(looked, ordinary=not ready)
        self._finder.compiled(looked.names.chunks[[*ready, *new]])
        return [looked.cuts[i] for i in ready], [looked.cuts[i] for i in new]


class _Prefixes:
    """All prefixes of one tenant's prompts, in steps."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()

    def longest(self, ids: Sequence[int]) -> int:
        """Tokens of the longest known prefix of a prompt, whose last token is always
        computed; its own prefixes are known from then on."""
        raw = np.asarray(ids, dtype=np.int32).tobytes()
        digest = hashlib.blake2b(digest_size=8)
        found = at = 0
        for end in range(STEP, len(ids), STEP):
            digest.update(raw[4 * at : 4 * end])
            at = end
            name = digest.copy().digest()
            if name in self._known:
                found = end
            else:
                self._known.add(name)
        return found


class Replay:
    """Plays prompts.

    Args:
        seam: tokens of a segment's head that every link computes.
        flops: of computing positions ``[start, end)``; by default the tokens.
    """

    def __init__(self, seam: int, flops: Flops = lambda start, end: float(end - start)):
        self.tallies = {method: Tally() for method in METHODS}
        self._seam = seam
        self._flops = flops
        self._prefixes: dict[str | None, _Prefixes] = {}
        self._linking: dict[tuple[str | None, str], Linking] = {}

    def play(self, prompt: Prompt) -> None:
        """One more prompt."""
        prefix = self._prefixes.setdefault(prompt.tenant, _Prefixes()).longest(prompt.ids)
        for method, tally in self.tallies.items():
            linking = self._linking.get((prompt.tenant, method))
            if linking is None:
                linking = self._linking[prompt.tenant, method] = self._new(method)
            cuts = prompt.cuts.get(method, ())
            self._tell(tally, prompt, prefix, *linking.of(prompt.ids, cuts))

    def _new(self, method: str) -> Linking:
        if method == PREFIX:
            return _NoSegments()
        return _Marked() if method == MARKED else _Found(self._seam)

    def _tell(
        self,
        tally: Tally,
        prompt: Prompt,
        prefix: int,
        linked: Sequence[Cut],
        compiled: Sequence[Cut],
    ) -> None:
        n = len(prompt.ids)
        at = prefix
        saved = 0
        for cut in linked:
            start = max(at, min(cut.start + self._seam, cut.end))
            # The last token is computed, or there would be no answer.
            end = max(start, min(cut.end, n - 1))
            if end > start:
                tally.work += self._flops(at, start)
                tally.rules[cut.rule] += end - start
                saved += end - start
                at = end
        tally.work += self._flops(at, n)
        for cut in compiled:
            tally.compiled += cut.end - cut.start
            tally.work += self._flops(0, cut.end - cut.start)
        tally.tokens += n
        tally.saved += prefix + saved
        tally.linked += saved
        tally.held += n - prefix - saved + sum(cut.end - cut.start for cut in compiled)
        tally.curve.append(tally.saved / tally.tokens if tally.tokens else 0.0)
