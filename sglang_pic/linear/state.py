"""What the linear layers keep of a compiled segment, and where.

All layers in one tensor, the family's own order of dimensions: operators
[layers, heads, dk, dk] or, where they are scalars, [layers, heads]; states
[layers, heads, dk, dv], histories of the convolution [layers, channels,
width - 1]. SGLang's pools hold states transposed, [heads, dv, dk], but Lightning's.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.nodes import SEGMENT
from sglang_pic.forest.order import EvictionOrder
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.kernels.operators.storage import PackedPair, copied_in_columns, pack, pack_state
from sglang_pic.store.value import OTHER_SHAPE, BadValue

logger = logging.getLogger(__name__)

# Bytes of a number that is not narrowed.
WIDEST = 4


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """Sizes of a model's linear layers, and the kind of their operators.

    While a kernel runs over a stretch of tokens, its pair is one *running state*
    in SGLang's layout: [..., heads, dv + n, dk], B over A, both transposed. A
    matrix takes n = dk rows, a scalar one row that repeats it. Where ``tokens_first``,
    SGLang's pool has histories [width - 1, channels]; where ``keys_first``, states
    [heads, dk, dv].
    """

    layers: int
    heads: int
    dk: int
    dv: int
    channels: int
    history: int
    scalar: bool
    tokens_first: bool = False
    keys_first: bool = False

    @classmethod
    def of_pool(
        cls,
        mamba_pool: Any,
        *,
        scalar: bool,
        tokens_first: bool = False,
        keys_first: bool = False,
    ) -> LinearShape:
        """Read off SGLang's state pool."""
        layers, _, heads, dv, dk = mamba_pool.mamba_cache.temporal.shape
        channels, history = mamba_pool.mamba_cache.conv[0].shape[2:]
        if tokens_first:
            channels, history = history, channels
        if keys_first:
            dk, dv = dv, dk
        return cls(layers, heads, dk, dv, channels, history, scalar, tokens_first, keys_first)

    def histories(self, conv: torch.Tensor) -> torch.Tensor:
        """[..., channels, width - 1], a view of SGLang's pool of histories."""
        return conv.transpose(-1, -2) if self.tokens_first else conv

    def states(self, temporal: torch.Tensor) -> torch.Tensor:
        """[..., heads, dk, dv], a view of SGLang's pool of states."""
        return temporal if self.keys_first else temporal.transpose(-1, -2)

    @property
    def operator(self) -> tuple[int, ...]:
        """Shape of an operator of all layers."""
        return (self.layers, self.heads, *(() if self.scalar else (self.dk, self.dk)))

    def state_nbytes(self, pairs: int, itemsize: int) -> int:
        """Upper bound of the bytes a segment's states take with this many pairs."""
        state = self.layers * self.heads * self.dk * self.dv * itemsize
        operators = math.prod(self.operator)
        operator = operators * 4 if self.scalar else operators * itemsize
        kept = 0 if self.scalar else self.layers * self.heads * 8
        conv_tail = self.layers * self.channels * self.history * 4
        return pairs * (operator + kept + state) + state + conv_tail

    def check_tensors(self, tensors: dict[str, torch.Tensor], heads: Sequence[int]) -> None:
        """Raise ``BadValue`` unless these are the states of a segment, with the pairs of
        cores that begin at ``heads``, in shapes and types that ``adopt`` takes."""
        state = (self.layers, self.heads, self.dk, self.dv)
        floats = (torch.float32, torch.float16)
        expected: dict[str, tuple[tuple[int, ...], Any]] = {"end": (state, floats)}
        expected["conv_tail"] = ((self.layers, self.channels, self.history), None)
        for first in heads:
            expected[f"pair.{first}.state"] = (state, floats)
            if self.scalar:
                expected[f"pair.{first}.operator"] = (self.operator, (torch.float32,))
                continue
            kept = tensors.get(f"pair.{first}.kept", torch.empty(0))
            of_all = self.layers * self.heads
            if kept.dtype != torch.int64 or kept.dim() != 1 or kept.unique().numel() != len(kept):
                raise BadValue(OTHER_SHAPE, "no list of operators")
            if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < of_all:
                raise BadValue(OTHER_SHAPE, "operators of no head")
            expected[f"pair.{first}.kept"] = ((len(kept),), (torch.int64,))
            expected[f"pair.{first}.operator"] = ((len(kept), self.dk, self.dk), floats)
        if expected.keys() != tensors.keys():
            raise BadValue(OTHER_SHAPE, f"it holds {sorted({*expected} ^ {*tensors})[:4]}")
        for name, (shape, dtypes) in expected.items():
            one = tensors[name]
            if tuple(one.shape) != shape or not (
                one.dtype.is_floating_point if dtypes is None else one.dtype in dtypes
            ):
                raise BadValue(OTHER_SHAPE, f"{name} is {tuple(one.shape)} of {one.dtype}")

    def begun(self, count: int, device: torch.device) -> torch.Tensor:
        """float32 [count, heads, dv + n, dk], running states of no tokens."""
        return _begun(self, count, device).clone()

    def running(self, pair: Pair) -> torch.Tensor:
        """float32 [..., heads, dv + n, dk], what ``pair`` reads it from."""
        operator = pair.A.float()
        if self.scalar:
            operator = operator[..., None, None].expand(*operator.shape, self.dk, 1)
        return torch.cat([pair.B.float(), operator], -1).transpose(-1, -2).contiguous()

    def pair(self, running: torch.Tensor) -> Pair:
        """``A`` and ``B`` [..., heads, dk, dv] of a running state."""
        state = running.transpose(-1, -2)
        operator = state[..., 0, self.dv] if self.scalar else state[..., self.dv :]
        return Pair(operator, state[..., : self.dv])


@functools.lru_cache(maxsize=4)
def _begun(shape: LinearShape, count: int, device: torch.device) -> torch.Tensor:
    """The same tensor for all layers; not to be written."""
    ones, eye = torch.ones(1, shape.dk, device=device), torch.eye(shape.dk, device=device)
    operator = ones if shape.scalar else eye
    rows = shape.dv + len(operator)
    begun = torch.zeros(count, shape.heads, rows, shape.dk, device=device)
    begun[:, :, shape.dv :] = operator
    return begun


@dataclasses.dataclass(frozen=True)
class CoreState:
    """What one core does to the linear layers: ``S <- A S + B``.

    Attributes:
        pair: operator and end state of the core alone; ``None`` for an opening
            core.
        end: float [layers, heads, dk, dv], state at the core's end with all that
            precedes it, for a core that opens the prompt: ``S <- end``.
        conv_tail: float [layers, channels, width - 1], the convolution's inputs
            before the core's end.
    """

    pair: PackedPair | None
    end: torch.Tensor | None
    conv_tail: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Resumed:
    """The state that an ordinary row goes on from, behind so many tokens."""

    state: CoreState
    depth: int


@dataclasses.dataclass
class SegmentState:
    """What the linear layers keep of one compiled segment.

    Attributes:
        owner: whose it is (``forest.keys.owner_of``).
        core_end: where its cores end, in tokens of the segment.
        conv_tail: as in ``CoreState``; the same for every core.
        end: as in ``CoreState``, for links that the segment opens.
        pairs: by the core's first token: a pair holds for one seam width.
    """

    owner: tuple[str, ...]
    core_end: int
    conv_tail: torch.Tensor
    end: torch.Tensor
    pairs: dict[int, PackedPair]

    @property
    def nbytes(self) -> int:
        plain = (self.conv_tail, self.end)
        return sum(t.numel() * t.element_size() for t in plain) + sum(
            pair.nbytes for pair in self.pairs.values()
        )

    def core(self, first: int, last: int, *, opening: bool) -> CoreState | None:
        """State of the core [first, last), or ``None`` if it is not held."""
        if last != self.core_end:
            return None
        if opening:
            return CoreState(None, self.end, self.conv_tail)
        pair = self.pairs.get(first)
        return CoreState(pair, None, self.conv_tail) if pair is not None else None


class Sized(Protocol):
    """Anything that the store keeps: whose it is, and the bytes that it takes."""

    @property
    def owner(self) -> tuple[str, ...]: ...

    @property
    def nbytes(self) -> int: ...


class StateStore:
    """What is carried beside pages by name, within a budget of bytes: states of compiled
    segments by segment id, and what an encoder has made of documents (``forest.encoded``).

    Evicts in the same order as pages are (``forest.order``), by what a segment
    saves for the bytes of its state. A link holds the states of its segments
    itself, so that nothing in use disappears; the budget counts what the store
    holds.

    Args:
        config: the server's settings.
        on_evict: told a segment whose state had to go.
        on_shortage: asked to ``release`` what was held back.
        by_shape: of the linear layers, if what is kept is to count by its shape alone,
            as if nothing were narrowed or dropped: on several tensor-parallel ranks each
            packs the values of its own heads, and all must evict alike.
    """

    def __init__(
        self,
        config: PicConfig,
        on_evict: Callable[[str], None] = lambda _: None,
        on_shortage: Callable[[], None] = lambda: None,
        by_shape: LinearShape | None = None,
    ):
        self.by_shape = by_shape
        self._dtype = getattr(torch, config.state_dtype)
        self.itemsize = self._dtype.itemsize
        self._threshold = config.operator_threshold
        self._on_evict = on_evict
        self._on_shortage = on_shortage
        self._states: dict[str, Any] = {}
        self._order: EvictionOrder[str] = EvictionOrder()
        self._pinned: set[str] = set()
        # What each group holds; kept, since clients pin, and all of it is read at every step.
        self._groups: dict[str, dict[str, None]] = {}
        self._bytes_of_group: Counter[str] = Counter()
        self.budget = config.state_mib << 20
        self.nbytes = 0
        self.pinned_bytes = 0
        self.evicted = 0

    def find(self, segment: str, owner: tuple[str, ...]) -> SegmentState | None:
        """States of a segment, if they are this owner's."""
        held: SegmentState | None = self.held(segment, owner)
        return held

    def held(self, name: str, owner: tuple[str, ...]) -> Any:
        """What is kept under a name, if it is this owner's; else ``None``."""
        held = self._states.get(name)
        return held if held is not None and held.owner == owner else None

    def put(self, name: str, value: Sized, *, cost: float, group: str, uses: int = 1) -> bool:
        """Keep something else than states; whether it fits. It may go at once.

        Args:
            cost: FLOPs that one use of it saves.
            group: its kind of thing.
            uses: as of ``add``.
        """
        return self._put(name, value, cost, uses, group)

    def names(self, group: str) -> list[str]:
        """Of all of a group."""
        return list(self._groups.get(group, ()))

    def count(self, group: str) -> int:
        """How many a group holds."""
        return len(self._groups.get(group, ()))

    def use(self, segment: str) -> None:
        """One link uses it."""
        if segment in self._states:
            self._order.use(segment)

    def add(
        self,
        segment: str,
        owner: tuple[str, ...],
        *,
        core_end: int,
        conv_tail: torch.Tensor,
        end: torch.Tensor,
        pairs: dict[int, Pair],
        cost: float = 0.0,
        uses: int = 1,
        group: str = SEGMENT,
        offer: bool = True,
        is_exact: bool = False,
    ) -> bool:
        """Keep what a compile captured, beside the pairs of other seam widths.

        Args:
            cost: FLOPs that one use of the segment saves.
            uses, group: as in ``EvictionOrder.add``.
            offer: it may go at once, or from ``release`` on.
            is_exact: nothing is narrowed.

        Returns:
            Whether it fits; if not, what was held of this segment stays as it was.
        """
        packed = {
            first: pack(pair, dtype=self._dtype, threshold=self._threshold)
            for first, pair in pairs.items()
        }
        held = self.find(segment, owner)
        if held is not None and held.core_end == core_end:
            packed = {**held.pairs, **packed}
        # Copies, all of them: what was captured is a view of a whole step's tensor.
        tail = conv_tail.clone(memory_format=torch.contiguous_format)
        kept = pack_state(end, torch.float32 if is_exact else self._dtype)
        state = SegmentState(owner, core_end, tail, kept, packed)
        return self._put(segment, state, cost, uses, group, offer)

    def _put(
        self,
        segment: str,
        state: Sized,
        cost: float,
        uses: int,
        group: str = SEGMENT,
        offer: bool = True,
    ) -> bool:
        pinned = segment in self._pinned
        held = self._states.get(segment)
        if held is not None:
            # What it replaces must not go to make room for it, and stays if none is.
            self._pin(segment, on=True)
        nbytes = self._counted(state)
        fits = self._make_room(nbytes - (self._counted(held) if held is not None else 0))
        if not pinned:
            self._pin(segment, on=False)
        if not fits:
            logger.warning(
                "sglang_pic: a segment's state of %d bytes does not fit and is not kept",
                nbytes,
            )
            if held is not None and not pinned:
                self._order.offer(segment)
            return False
        self.drop(segment)
        self._states[segment] = state
        self.nbytes += nbytes
        self._groups.setdefault(group, {})[segment] = None
        self._bytes_of_group[group] += nbytes
        self._order.add(segment, group, cost=cost, nbytes=nbytes, uses=uses)
        if pinned:
            self._pin(segment, on=True)
        elif offer:
            self._order.offer(segment)
        return True

    def hold_back(self, segment: str) -> None:
        """It may go from ``release`` on."""
        self._order.withdraw(segment)

    def release(self, segment: str) -> None:
        """What was held back may go."""
        self._order.offer(segment)

    def tensors(self, segment: str) -> dict[str, torch.Tensor]:
        """All that is kept of a segment, by name, for ``adopt``; empty if nothing is."""
        state = self._states.get(segment)
        if state is None:
            return {}
        found = {"conv_tail": state.conv_tail, "end": state.end}
        for first, pair in state.pairs.items():
            found[f"pair.{first}.operator"] = pair.operator
            found[f"pair.{first}.state"] = pair.state
            if pair.kept is not None:
                found[f"pair.{first}.kept"] = pair.kept
        return found

    def adopt(
        self,
        segment: str,
        owner: tuple[str, ...],
        core_end: int,
        tensors: dict[str, torch.Tensor],
        *,
        device: Any,
        cost: float,
        uses: int,
        offer: bool,
        evict: bool,
    ) -> bool:
        """Keep copies of what ``tensors`` gave of a segment, as it is, beside the pairs of
        other seam widths.

        Args:
            uses, offer: as of ``add``.
            evict: others may go for it.

        Returns:
            Whether it fits.
        """
        heads = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("pair.")})

        def of(name: str, *, matrices: bool = True) -> torch.Tensor:
            if matrices:
                return copied_in_columns(tensors[name].to(device))
            return tensors[name].to(device, copy=True)

        pairs = {}
        for first in heads:
            kept = tensors.get(f"pair.{first}.kept")
            kept = kept.clone() if kept is not None else None
            operator = of(f"pair.{first}.operator", matrices=kept is not None)
            pairs[first] = PackedPair(operator, kept, of(f"pair.{first}.state"))
        held = self.find(segment, owner)
        if held is not None and held.core_end == core_end:
            pairs = {**held.pairs, **pairs}
        state = SegmentState(owner, core_end, of("conv_tail", matrices=False), of("end"), pairs)
        more = self._counted(state) - (self._counted(held) if held is not None else 0)
        if not evict and self.nbytes + more > self.budget:
            return False
        return self._put(segment, state, cost, uses, offer=offer)

    def _counted(self, state: Sized) -> int:
        """Bytes that a state counts for."""
        if self.by_shape is None or not isinstance(state, SegmentState):
            return state.nbytes
        return self.by_shape.state_nbytes(len(state.pairs), WIDEST)

    def _make_room(self, nbytes: int) -> bool:
        if nbytes > self.budget - self.pinned_bytes:
            return False
        while self.nbytes + nbytes > self.budget:
            victim = self._order.park()
            if victim is None:
                self._on_shortage()
                victim = self._order.park()
            if victim is None:
                return False
            if victim in self._pinned:
                continue
            self._forget(victim)
            self._order.evicted(victim)
            self.evicted += 1
            self._on_evict(victim)
        return True

    def appraise(self, segment: str, cost: float) -> None:
        """It is known what all uses to come of it save, in FLOPs."""
        if segment in self._states:
            self._order.appraise(segment, cost)

    def price(self, nbytes: int) -> float:
        """FLOPs that making room for so much costs: what goes for it would have saved."""
        if self.nbytes + nbytes <= self.budget:
            return 0.0
        return self._order.least() * nbytes

    def pin(self, segment: str) -> None:
        """Keep a segment's state, if it has one, until ``unpin``."""
        if segment in self._states:
            self._pin(segment, on=True)

    def unpin(self, segment: str) -> None:
        """It may go again."""
        self._pin(segment, on=False)
        self._order.offer(segment)

    def _pin(self, segment: str, *, on: bool) -> None:
        if on and segment not in self._pinned:
            self._pinned.add(segment)
            self.pinned_bytes += self.nbytes_of(segment)
        elif not on and segment in self._pinned:
            self._pinned.remove(segment)
            self.pinned_bytes -= self.nbytes_of(segment)

    def drop(self, segment: str) -> None:
        """Forget a segment, whose pages are gone."""
        if segment in self._states:
            self._forget(segment)
            self._order.remove(segment)

    def _forget(self, segment: str) -> None:
        self._pin(segment, on=False)
        nbytes = self._counted(self._states.pop(segment))
        self.nbytes -= nbytes
        entry = self._order.get(segment)
        assert entry is not None
        del self._groups[entry.group][segment]
        self._bytes_of_group[entry.group] -= nbytes

    def clear(self) -> None:
        self._states.clear()
        self._order.clear()
        self._pinned.clear()
        self._groups.clear()
        self._bytes_of_group.clear()
        self.nbytes = self.pinned_bytes = 0

    def nbytes_of(self, segment: str) -> int:
        """Bytes that what is held of a segment counts for."""
        state = self._states.get(segment)
        return self._counted(state) if state is not None else 0

    def bytes_of_group(self, group: str) -> int:
        """Bytes held for all of a group."""
        return self._bytes_of_group[group]

    @property
    def packed_bytes(self) -> int:
        """Bytes that all of it takes, at most ``nbytes``. O(n)."""
        return sum(state.nbytes for state in self._states.values())

    def check(self) -> None:
        """Raise ``PicIntegrityError`` unless sums, order and budget hold."""
        if set(self._order) != set(self._states) or not self._pinned <= set(self._states):
            raise PicIntegrityError("the states and their eviction order differ")
        if self.nbytes != sum(map(self._counted, self._states.values())):
            raise PicIntegrityError("the bytes of states do not add up")
        if self.pinned_bytes != sum(map(self.nbytes_of, self._pinned)):
            raise PicIntegrityError("the bytes of pinned states do not add up")
        if sorted(self._states) != sorted(name for one in self._groups.values() for name in one):
            raise PicIntegrityError("the states and their groups differ")
        for group, names in self._groups.items():
            if self._bytes_of_group[group] != sum(map(self.nbytes_of, names)):
                raise PicIntegrityError(f"the bytes of {group} do not add up")
        if self.nbytes > self.budget:
            raise PicIntegrityError(f"states of {self.nbytes} bytes exceed {self.budget}")
