"""All cuts of a prompt: by structure where there is a text, by content where asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sglang_pic.find.base import CONTENT, Cut
from sglang_pic.find.content import chunks
from sglang_pic.find.spans import settled, token_cuts
from sglang_pic.find.structure import RULES, Range, Rule, structure

# Cuts of a prompt; those that come first are kept.
MAX_CUTS = 4096


@dataclasses.dataclass(frozen=True)
class Cutter:
    """Cuts prompts.

    Attributes:
        shortest: tokens of the shortest cut that is kept; a text of fewer characters is
            taken to have fewer tokens.
        rules: of structure, in their order.
    """

    shortest: int
    rules: Sequence[Rule] = RULES

    def of_text(self, text: str, given: Sequence[Cut], regions: Sequence[Range]) -> list[Cut]:
        """Cuts of a text, in characters, without what may have other tokens elsewhere.

        Args:
            given: those that are known.
            regions: what is cut further.
        """
        cuts = [*given, *structure(text, regions, self.rules, self.shortest)]
        return [settled(text, cut) for cut in cuts]

    def of_tokens(self, offsets: Sequence[tuple[int, int]], cuts: Sequence[Cut]) -> list[Cut]:
        """Cuts in characters as cuts in tokens, without those that are too short or there
        twice."""
        return self._kept(token_cuts(offsets, cuts))

    def by_content(self, ids: Sequence[int], cuts: Sequence[Cut]) -> list[Cut]:
        """The same, and chunks by content."""
        return self._kept([*cuts, *(Cut(a, b, CONTENT) for a, b in chunks(ids))])

    def _kept(self, cuts: Sequence[Cut]) -> list[Cut]:
        """Of those in the same place the one that was found first."""
        places: dict[tuple[int, int], Cut] = {}
        for cut in cuts:
            if cut.end - cut.start >= self.shortest:
                places.setdefault((cut.start, cut.end), cut)
        return sorted(places.values(), key=lambda cut: (cut.start, -cut.end))[:MAX_CUTS]
