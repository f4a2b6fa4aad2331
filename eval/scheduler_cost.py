"""What the cache costs on the scheduler's thread, ours beside stock's radix cache.

    python -m eval.scheduler_cost [--quick] [--json FILE] [--plot FILE]

Pools and caches in this process, no model and no server: SGLang's own scheduler policy
asks, on one thread of torch. Every row is the median of a few repetitions, in
milliseconds of that thread's time, which what runs beside it does not lengthen.
``ours`` serves links, or ordinary requests where a row says so; ``stock`` serves
ordinary requests of the same tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import sys
import textwrap
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import evict_from_tree_cache, release_kv_cache
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from sglang_pic.config import PicConfig
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.tables import Table
from sglang_pic.forest.adapter import PicCache
from sglang_pic.forest.build import plant
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.keys import namespace
from sglang_pic.forest.overlaps import RECENT, End, Overlaps, Prompt
from sglang_pic.forest.placement import Held, places, worth_keeping
from sglang_pic.linear.checkpoints import MAX_ENDS
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.internal import compile_hints, link_hints

OURS, STOCK = "ours", "stock"
LONGEST = 1 << 17
VOCABULARY = 30_000
GRID = 64
PREFIX_TOKENS, COMPILED_TOKENS = 16, 256
REPEATS = 7
COMPILE, ROUND, ORDINARY, FIRST, AGAIN, MANY, PLAN = (
    "a compile where the budget is full, beside so many ordinary prefixes",
    "a round of SGLang's `lpm` over so many waiting requests of 16 x 512 tokens",
    "a match of an ordinary request of so many tokens, held",
    "the first match of one request of so many tokens, in segments of 1024",
    "the next match of the same",
    "one request of so many segments of 32 tokens: arrival, match, lock, unlock",
    "a plan of a hybrid's checkpoints for a path of so many nodes (stock makes none)",
)
NODES, QUICK_NODES = (1024, 4096, 16384, 65536), (1024, 4096)
WAITING, TOKENS, SEGMENTS = (16, 32, 64), (16384, 32768, 65536), (128, 256, 512)
PATHS = (8, 32, MAX_ENDS)

_rids = itertools.count()


class Scheduler:
    """As much of one as asks a cache: pools, the cache, and requests.

    Args:
        method: whose cache.
        size: tokens in the pool.
        limit: tokens that segments may take; all by default.
    """

    def __init__(self, method: str, size: int, limit: int | None = None):
        set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", page_size=1))
        self.pool = MHATokenToKVPool(
            size=size, page_size=1, dtype=torch.float32, head_num=1, head_dim=2,
            layer_num=1, device="cpu", enable_memory_saver=False,
        )  # fmt: skip
        self.allocator = TokenToKVPoolAllocator(
            size, dtype=torch.float32, device="cpu", kvcache=self.pool, need_sort=False
        )
        self.rows = ReqToTokenPool(4, LONGEST, "cpu", False)
        params = CacheInitParams(
            False, self.rows, self.allocator, 1, tree_components=(ComponentType.FULL,)
        )
        self.is_ours = method == OURS
        self.cache: Any = (PicCache if self.is_ours else UnifiedRadixCache)(params)
        if self.is_ours:
            each = 1 << 20  # a token's bytes, in which SGLang's flag for the budget counts
            config = PicConfig() if limit is None else PicConfig(kv_mib=limit)
            plant(self.cache, config, PrefillCost(1e6, 10.0, each))

    def request(self, ids: array, *, hints: Any = None, salt: str | None = None) -> Req:
        req = Req(
            rid=str(next(_rids)),
            origin_input_text="",
            origin_input_ids=ids,
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
            cache_salt=salt,
        )
        req.kv_hints = hints
        return req

    def prefix(self, ids: array) -> None:
        """Hold an ordinary prefix."""
        evict_from_tree_cache(self.cache, len(ids))
        slots = self._alloc(len(ids))
        self.cache.insert(InsertParams(key=RadixKey(ids), value=slots, priority=0))

    def _alloc(self, count: int) -> torch.Tensor:
        slots = self.allocator.alloc(count)
        assert slots is not None
        return slots.to(torch.int64)

    def run(self, req: Req) -> float:
        """Match, lock, allocate and finish a request; seconds of making room for it and
        of its finish."""
        req.init_next_round_input(self.cache)
        req.lock = self.cache.lock(req.last_node)
        prefix = self.cache.prefix_device_indices(req)
        total = len(req.full_untruncated_fill_ids)
        wanted = total - req.prefix_len
        begun = time.thread_time()
        evict_from_tree_cache(self.cache, wanted)
        spent = time.thread_time() - begun
        slots = self._alloc(wanted)
        self.rows.alloc([req])
        row = torch.cat([prefix[: req.prefix_len].to(torch.int64), slots])
        self.rows.write((req.kv.req_pool_idx, slice(0, total)), row)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = req.extend_end = total
        req.finished_reason = FINISH_LENGTH(0)
        begun = time.thread_time()
        release_kv_cache(req, self.cache, checkpoint=True)
        return spent + time.thread_time() - begun

    def compile(self, ids: array) -> float:
        """Run a compile; seconds of its finish."""
        hints = compile_hints([16], named=True)
        return self.run(self.request(ids, hints=hints, salt=namespace((), None)))

    def link(self, parts: Sequence[array]) -> Req:
        """A request of these segments and one token more."""
        ids, spans = array("q"), []
        for part in parts:
            spans.append(TokenSpan(len(ids), len(ids) + len(part)))
            ids += part
        ids.append(1)
        return self.request(ids, hints=link_hints(LinkRequest(tuple(spans), LinkOptions())))

    def asking(self, parts: Sequence[array]) -> Req:
        """The same prompt, marked where the cache is ours."""
        if self.is_ours:
            return self.link(parts)
        ids = array("q", [token for part in parts for token in part])
        ids.append(1)
        return self.request(ids)


class Draw:
    """Random tokens; two requests share none by chance."""

    def __init__(self, seed: int = 0):
        self._rng = random.Random(seed)

    def __call__(self, count: int) -> array:
        return array("q", self._rng.choices(range(VOCABULARY), k=count))


def _median_ms(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


def _timed(function: Callable[..., Any], *args: Any) -> float:
    begun = time.thread_time()
    function(*args)
    return time.thread_time() - begun


def compile_beside(method: str, prefixes: int) -> float:
    """What keeps ``COMPILED_TOKENS`` when as many have to go for them."""
    draw = Draw()
    room = 8 * COMPILED_TOKENS
    # Stock has no budget for it but the pool.
    spare = 4 * room if method == OURS else 0
    scheduler = Scheduler(method, prefixes * PREFIX_TOKENS + spare, limit=room)
    for _ in range(prefixes // 2):
        # Two that begin alike: the tree splits a node of which nobody is told.
        begin = draw(PREFIX_TOKENS // 2)
        for _ in range(2):
            scheduler.prefix(begin + draw(PREFIX_TOKENS // 2))
    spent = []
    for _ in range(8 + REPEATS):
        ids = draw(COMPILED_TOKENS)
        # One more that begins as another does: a node is split in between.
        scheduler.prefix(begin[: PREFIX_TOKENS // 4] + draw(PREFIX_TOKENS))
        req = scheduler.request(ids)
        spent.append(scheduler.compile(ids) if method == OURS else scheduler.run(req))
    return _median_ms(spent[8:])


def round_of(method: str, waiting: int) -> float:
    """Every round but the first, in which nothing has changed."""
    draw = Draw()
    scheduler = Scheduler(method, 1 << 18)
    parts = [draw(512) for _ in range(64)]
    if method == OURS:
        for part in parts:
            scheduler.compile(part)
    rng = random.Random(1)
    queue = [scheduler.asking([rng.choice(parts) for _ in range(16)]) for _ in range(waiting)]
    policy = SchedulePolicy("lpm", scheduler.cache, False, False, False)
    policy.calc_priority(queue)
    return _median_ms([_timed(policy.calc_priority, queue) for _ in range(REPEATS)])


def ordinary_match(method: str, tokens: int) -> float:
    """A hundred of them are one repetition."""
    draw = Draw()
    scheduler = Scheduler(method, 1 << 18)
    ids = draw(tokens)
    scheduler.prefix(ids)
    req = scheduler.request(ids + draw(1))
    spent = [
        _timed(lambda: [req.init_next_round_input(scheduler.cache) for _ in range(100)])
        for _ in range(REPEATS)
    ]
    return _median_ms(spent) / 100


def matches_of(method: str, tokens: int) -> tuple[float, float]:
    """The first match of a request, and the next."""
    draw = Draw()
    scheduler = Scheduler(method, 1 << 18)
    parts = [draw(1024) for _ in range(tokens // 1024)]
    if method == OURS:
        for part in parts:
            scheduler.compile(part)
    else:
        scheduler.prefix(array("q", [token for part in parts for token in part]))
    first, again = [], []
    for _ in range(REPEATS):
        req = scheduler.asking(parts)
        first.append(_timed(req.init_next_round_input, scheduler.cache))
        again.append(_timed(req.init_next_round_input, scheduler.cache))
    return _median_ms(first), _median_ms(again)


def many_segments(method: str, segments: int) -> float:
    """All that happens to it before and after its forward passes."""
    draw = Draw()
    scheduler = Scheduler(method, 1 << 18)
    parts = [draw(32) for _ in range(segments)]
    if method == OURS:
        for part in parts:
            scheduler.compile(part)
    else:
        scheduler.prefix(array("q", [token for part in parts for token in part]))

    def life(req: Req) -> None:
        if method == OURS:
            assert not scheduler.cache.forest.arrivals.send_back(req)
        req.init_next_round_input(scheduler.cache)
        lock = scheduler.cache.lock(req.last_node)
        scheduler.cache.prefix_device_indices(req)
        scheduler.cache.unlock(lock)

    asked = [scheduler.asking(parts) for _ in range(REPEATS)]
    return _median_ms([_timed(life, req) for req in asked])


def plan_of(nodes: int) -> float:
    """Count a request that leaves a path, and find what is worth keeping of it, where a
    tenant's last requests are all remembered."""
    draw = random.Random(0)
    overlaps = Overlaps(GRID)
    path = [End(i, GRID * (i + 1)) for i in range(nodes)]
    tenant = ("", "")
    for i in range(RECENT):
        part = path[: draw.randrange(nodes + 1)]
        overlaps.note(tenant, part, Prompt(GRID * (nodes + 1) + i), has_left=bool(part))
    held = Held({end.depth for end in path[::8]}, 0, 1.0)

    ids = array("q", [0, *[1] * (GRID - 1)]) * (nodes + 4)

    def plan() -> None:
        prompt = Prompt.of(ids, {0})
        overlaps.note(tenant, path, prompt, has_left=True)
        expected = overlaps.expected(tenant, path, prompt)
        worth_keeping(places(expected, held, GRID, float))

    return _median_ms([_timed(plan) for _ in range(REPEATS)])


@dataclasses.dataclass(frozen=True)
class Cost:
    """One row: what, of which size, whose cache, milliseconds."""

    what: str
    size: int
    method: str
    ms: float


def measure(*, quick: bool) -> list[Cost]:
    """All rows."""
    rows = []
    for method in (STOCK, OURS):
        for size in QUICK_NODES if quick else NODES:
            rows.append(Cost(COMPILE, size, method, compile_beside(method, size)))
        for size in WAITING:
            rows.append(Cost(ROUND, size, method, round_of(method, size)))
        for size in TOKENS:
            rows.append(Cost(ORDINARY, size, method, ordinary_match(method, size)))
            first, again = matches_of(method, size)
            rows += [Cost(FIRST, size, method, first), Cost(AGAIN, size, method, again)]
        for size in SEGMENTS:
            rows.append(Cost(MANY, size, method, many_segments(method, size)))
    return [*rows, *(Cost(PLAN, size, OURS, plan_of(size)) for size in PATHS)]


def tables(rows: Sequence[Cost]) -> list[Table]:
    """One a kind of work, growth from left to right."""
    made = []
    for what in (COMPILE, ROUND, ORDINARY, FIRST, AGAIN, MANY, PLAN):
        found = {(row.size, row.method): row.ms for row in rows if row.what == what}
        sizes = sorted({size for size, _ in found})
        methods = [OURS] if what == PLAN else [OURS, STOCK]
        cells = [(method, *(f"{found[size, method]:.3g}" for size in sizes)) for method in methods]
        if what != PLAN:
            ratios = (f"{found[size, OURS] / found[size, STOCK]:.2f}" for size in sizes)
            cells.append(("ours / stock", *ratios))
        made.append(Table(f"ms: {what}", ("", *map(str, sizes)), cells))
    return made


def figure(rows: Sequence[Cost]) -> Any:
    """Milliseconds by size, a panel a kind of work."""
    kinds = (COMPILE, ROUND, FIRST, AGAIN, MANY)
    made, axes = new_figure(len(kinds), width=4)
    for axis, what in zip(axes, kinds, strict=True):
        for method in (OURS, STOCK):
            found = sorted((r.size, r.ms) for r in rows if (r.what, r.method) == (what, method))
            axis.plot(*zip(*found, strict=True), marker="o", label=method)
        axis.set(xscale="log", yscale="log", xlabel="size", ylabel="ms")
        axis.set_title(textwrap.fill(what, 44), fontsize=7)
        axis.legend()
    return made


def run(*, quick: bool = False) -> Outcome:
    """Measure, and lay out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = measure(quick=quick)
    finally:
        torch.set_num_threads(threads)
    config = {"repeats": REPEATS, "page_size": 1, "compiled_tokens": COMPILED_TOKENS}
    return Outcome(config, [dataclasses.asdict(row) for row in rows], tables(rows), figure(rows))


def main() -> int:
    args = parser_of(__doc__ or "", "fewer prefixes held").parse_args()
    deliver(run(quick=args.quick), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
