"""The states held on the paths of a tree, each behind the next shallower one of its path.

What dropping one costs is known from its neighbours: the requests that would go on from it
and not from a deeper one go on from the one in front of it instead,

    (W(c_k) - W(c_{k-1})) (Q(c_k) - Q(c_{k+1})),

in a tree less all that goes on deeper on any branch (see ``placement``).
"""

from __future__ import annotations

import dataclasses
import itertools

# States behind a dropped one that are valued anew at once; the rest when next passed.
MENDED = 64


@dataclasses.dataclass
class Step:
    """One state.

    Attributes:
        depth: tokens in front of it.
        work: of computing them.
        passes: requests expected that share them.
        before: node of the next shallower state of its path.
        behind: nodes of the next deeper ones.
        passes_behind: sum of their ``passes``.
    """

    depth: int
    work: float
    passes: float
    before: int | None
    behind: dict[int, None] = dataclasses.field(default_factory=dict)
    passes_behind: float = 0.0


class Steps:
    """By the node of the tree that they end with."""

    def __init__(self) -> None:
        self._steps: dict[int, Step] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, node: int) -> bool:
        return node in self._steps

    def put(
        self, node: int, depth: int, work: float, passes: float, before: int | None
    ) -> list[int]:
        """A state that is new, or has been passed again.

        Returns:
            The nodes whose states dropping costs something else now, itself among them.
        """
        step = self._steps.get(node)
        if step is None:
            step = self._steps[node] = Step(depth, work, passes, None)
        else:
            self._leave(node, step)
            step.passes, step.before = passes, None
        front = self._steps.get(before) if before is not None else None
        if front is None or before is None:
            return [node]
        self._follow(node, before, front)
        return [before, node]

    def drop(self, node: int) -> list[int]:
        """A state is gone.

        Returns:
            The nodes whose states dropping costs something else now.
        """
        step = self._steps.pop(node)
        self._leave(node, step)
        front = self._steps.get(step.before) if step.before is not None else None
        mended = list(itertools.islice(step.behind, MENDED))
        for one in mended:
            self._steps[one].before = None
            if front is not None and step.before is not None:
                self._follow(one, step.before, front)
        return mended if front is None or step.before is None else [step.before, *mended]

    def cost(self, node: int) -> float:
        """Work that dropping it would cost the requests expected."""
        step = self._steps[node]
        front = self._steps.get(step.before) if step.before is not None else None
        spared = step.work - (front.work if front is not None else 0.0)
        return spared * max(0.0, step.passes - step.passes_behind)

    def clear(self) -> None:
        self._steps.clear()

    def _leave(self, node: int, step: Step) -> None:
        front = self._steps.get(step.before) if step.before is not None else None
        if front is not None and node in front.behind:
            del front.behind[node]
            front.passes_behind -= step.passes

    def _follow(self, node: int, before: int, front: Step) -> None:
        step = self._steps[node]
        step.before = before
        front.behind[node] = None
        front.passes_behind += step.passes
