"""What is worth keeping is copied to the host piece by piece, and written behind.

A copy is begun when a segment is used a second time, named or pinned, and goes on between
forward passes while its pages are held; where they go first, it is given up. Nothing is
locked for it: what a rank evicts must not depend on how fast its store is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

from sglang_pic.forest.forest import Forest
from sglang_pic.forest.segments import SegmentRecord
from sglang_pic.manage.known import Known
from sglang_pic.manage.kv import KvPages
from sglang_pic.request.commands import WRITING
from sglang_pic.store.value import Codec, SavedSegment
from sglang_pic.store.writing import Writer

# Copied between two forward passes.
STEP_BYTES = 64 << 20
# What may wait to be copied.
MOST_PENDING = 4096


def by_head(tensors: dict[str, torch.Tensor]) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    """What a segment carries, once for each core: a value has the states of one. In models
    without, once."""
    heads = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("pair.")})
    return [
        (
            (head,),
            {
                name: one
                for name, one in tensors.items()
                if not name.startswith("pair.") or name.startswith(f"pair.{head}.")
            },
        )
        for head in heads
    ] or [((), tensors)]


@dataclasses.dataclass
class _Copy:
    """One segment's K and V on their way to the host: ``done`` tokens of those held."""

    record: SegmentRecord
    slots: torch.Tensor
    tensors: dict[str, torch.Tensor]
    done: int = 0


class HostCopies:
    """Copies of rows of a device's tensors, made on a stream of their own where the device
    has streams: what runs on the current one goes on.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._is_cuda else None

    def empty(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        """On the host, for ``rows`` rows of such a tensor."""
        shape = (rows, *like.shape[1:])
        return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=self._is_cuda)

    def copy(self, target: torch.Tensor, source: torch.Tensor, slots: torch.Tensor) -> None:
        """Begin to write rows of ``source`` into ``target``."""
        # Gathered in order with whatever wrote them, or will overwrite them.
        self.send(target, source[slots])

    def send(self, target: torch.Tensor, rows: torch.Tensor) -> None:
        """Begin to write what nobody changes any more into ``target``, contiguous both."""
        with self._beside():
            target.copy_(rows, non_blocking=True)
            if self._side is not None:
                rows.record_stream(self._side)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def wait(self) -> None:
        """Until all that was begun is done. On any thread."""
        if self._side is not None:
            self._side.synchronize()


class Outgoing:
    """Segments of one scheduler on their way into the store.

    Args:
        kv: their pages.
        known: what need not be written.
    """

    def __init__(self, forest: Forest, kv: KvPages, codec: Codec, writer: Writer, known: Known):
        self._forest = forest
        self._kv = kv
        self._codec = codec
        self._writer = writer
        self._known = known
        self._copies = HostCopies(next(kv.buffers())[1].device)
        # In the order in which they are copied.
        self._pending: OrderedDict[str, _Copy | None] = OrderedDict()

    @property
    def pending(self) -> int:
        """Segments that are not copied yet."""
        return len(self._pending)

    def names(self, record: SegmentRecord) -> list[str]:
        """Of the values that a held segment is written as."""
        tensors = self._forest.carried.tensors(record.id)
        return [self._codec.name(record.salt, record.path, head) for head, _ in by_head(tensors)]

    def offer(self, record: SegmentRecord) -> None:
        """A held segment is worth keeping. Those of an adapter are not, whose weights the
        fingerprint does not know."""
        if record.extra_key or record.node is None or record.id in self._pending:
            return
        # A hash of its tokens at every link is more than looking it up by its id.
        key = f"{record.id} {record.compiled}"
        if key in self._known or len(self._pending) >= MOST_PENDING:
            return
        self._known.add(key)
        self._pending[record.id] = None

    def publish(self, record: SegmentRecord) -> None:
        """Have a held segment written whatever it is worth."""
        self._known.publish(record.id, self.names(record))
        if record.id in self._pending or len(self._pending) < MOST_PENDING:
            self._pending.setdefault(record.id, None)

    def published(self, segment: str) -> tuple[str, str | None]:
        """As ``Known.published``, of one that may still have to be copied."""
        return (WRITING, None) if segment in self._pending else self._known.published(segment)

    def step(self, most: int = STEP_BYTES) -> None:
        """Copy a piece of what waits."""
        while self._pending and most > 0:
            # Taken out: what fails is not tried again.
            name, copy = self._pending.popitem(last=False)
            record = self._forest.segments.find_held(name)
            if record is None:
                continue
            if copy is None or copy.record is not record:
                copy = self._begun(record)
            if copy is not None:
                most -= self._advance(copy, most)
                if copy.done == len(copy.slots):
                    self._finish(copy)
                    continue
            self._pending[name] = copy
            self._pending.move_to_end(name, last=False)
            if copy is None:
                return

    def _begun(self, record: SegmentRecord) -> _Copy | None:
        """A copy of a segment, or nothing: it need not be written, or there is no room
        for it now."""
        if not self._writer.has_room(len(record.path) * self._forest.cost.kv_bytes):
            return None
        slots = self._forest.holder.slots(record)
        if all(name in self._known for name in self.names(record)):
            slots = slots[:0]
        empty = self._copies.empty
        return _Copy(record, slots, {k: empty(one, len(slots)) for k, one in self._kv.buffers()})

    def _advance(self, copy: _Copy, most: int) -> int:
        """Copy some of its tokens; the bytes of them."""
        each = max(1, self._forest.cost.kv_bytes)
        first = copy.done
        copy.done = min(len(copy.slots), first + max(1, most // each))
        for name, buffer in self._kv.buffers():
            part = copy.tensors[name][first : copy.done]
            self._copies.copy(part, buffer, copy.slots[first : copy.done])
        return (copy.done - first) * each

    def _finish(self, copy: _Copy) -> None:
        record, forest = copy.record, self._forest
        carried = forest.carried.tensors(record.id)
        core_end = forest.carried.core_end(record.id, record.owner)
        for head, of_head in by_head(carried):
            name = self._codec.name(record.salt, record.path, head)
            if name in self._known:
                continue
            saved = SavedSegment(
                record.path,
                record.extra_key,
                record.salt,
                record.hits,
                {**copy.tensors, **of_head},
                core_end,
                head,
            )

            def encode(name: str = name, saved: SavedSegment = saved) -> Any:
                self._copies.wait()
                on_host = {key: one.detach().cpu() for key, one in saved.tensors.items()}
                return self._codec.encode(name, dataclasses.replace(saved, tensors=on_host))

            if self._writer.write(name, encode, saved.nbytes):
                self._known.add(name)

    def clear(self) -> None:
        """Everything was flushed: what is half copied is given up."""
        self._pending.clear()
