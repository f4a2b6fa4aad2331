"""Who needs which documents: prompts on their way, requests and locks. What one of them needs
stays until it needs it no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.kept import Kept

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

# A prompt whose documents are kept has come by then, or has them encoded again.
LEASE_S = 30.0


class Users:
    """Of the documents of one scheduler, by their names.

    Args:
        kept: where they are kept.
    """

    def __init__(self, kept: Kept):
        self._kept = kept
        # How many need each.
        self._needed: Counter[str] = Counter()
        # What is kept for prompts on their way, and until when.
        self._leases: dict[str, tuple[float, list[str]]] = {}
        # What is kept for requests that have not ended. Several may have one name, which clients
        # choose, where there are several tokenizer workers: they end together.
        self._taken: dict[CacheRequestHandle, tuple[str, ...]] = {}
        self._locked: set[str] = set()
        # The latest that any front has said.
        self._now = 0.0

    def __contains__(self, name: str) -> bool:
        return name in self._needed

    @property
    def count(self) -> int:
        """Documents that are in use."""
        return sum(map(self.is_in_use, self._needed))

    def is_in_use(self, name: str) -> bool:
        """Whether a request sees it, or is on its way to."""
        return self._needed[name] > (name in self._locked)

    def _keep(self, name: str) -> None:
        self._needed[name] += 1
        self._kept.pin(name)

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            self._needed[name] -= 1
            if self._needed[name] <= 0:
                del self._needed[name]
                self._kept.unpin(name)

    # -- prompts on their way

    def tick(self, now: float) -> None:
        """What is kept for prompts that have not come by now is kept no longer.

        Args:
            now: seconds, monotonic, of a front's machine.
        """
        self._now = now = max(self._now, now)
        for lease in [lease for lease, (until, _) in self._leases.items() if until <= now]:
            self.end_lease(lease)

    def lease(self, lease: str) -> list[str]:
        """A prompt is on its way, for so long from now; what is kept for it already."""
        _, names = self._leases.get(lease, (0.0, []))
        self._leases[lease] = self._now + LEASE_S, names
        return list(names)

    def keep(self, lease: str, name: str) -> None:
        """Keep a held one for a prompt that is on its way."""
        self._keep(name)
        self._leases[lease][1].append(name)

    def end_lease(self, lease: str) -> None:
        """It has come, or nothing is kept for it any longer."""
        _, names = self._leases.pop(lease, (0.0, []))
        self._release(names)

    # -- requests

    def take(self, handle: CacheRequestHandle, names: Sequence[str]) -> None:
        """Keep held ones for a request."""
        for name in names:
            self._keep(name)
        self._taken[handle] = (*self._taken.get(handle, ()), *names)

    def let_go(self, handle: CacheRequestHandle) -> None:
        """Keep nothing for a request any longer."""
        self._release(self._taken.pop(handle, ()))

    # -- locks

    def lock(self, name: str) -> Callable[[], None]:
        """Keep a held one whatever happens, once.

        Returns:
            What lets it go again.
        """
        self._locked.add(name)
        self._keep(name)
        return lambda: self._unlock(name)

    def _unlock(self, name: str) -> None:
        if name in self._locked:
            self._locked.remove(name)
            self._release([name])

    def check(self) -> None:
        """Raise ``PicIntegrityError`` unless it adds up. O(n)."""
        needed = Counter(name for names in self._taken.values() for name in names)
        needed.update(name for _, names in self._leases.values() for name in names)
        needed.update(self._locked)
        if needed != self._needed:
            raise PicIntegrityError("which documents requests see does not add up")

    def clear(self) -> None:
        """Nobody needs any."""
        for lease in list(self._leases):
            self.end_lease(lease)
        for handle in list(self._taken):
            self.let_go(handle)
        for name in list(self._locked):
            self._unlock(name)
