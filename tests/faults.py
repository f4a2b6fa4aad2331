"""Faults for servers of tests: a plug-in of SGLang, beside ours, that breaks something.

``environment`` gives a server's process the plug-in; production code knows nothing
of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FAULT = "PIC_TEST_FAULT"
_HERE = Path(__file__).parent


def environment(folder: Path, fault: str) -> dict[str, str]:
    """Environment of a server with one of ``FAULTS``; ``folder`` is written to."""
    made = folder / "pic_faults-0.dist-info"
    made.mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: pic-faults\nVersion: 0\n")
    (made / "entry_points.txt").write_text("[sglang.srt.plugins]\npic_faults = faults:register\n")
    known = os.environ.get("PYTHONPATH")
    paths = [str(folder), str(_HERE), *([known] if known else [])]
    return {"PYTHONPATH": os.pathsep.join(paths), FAULT: fault}


def register() -> None:
    """Called by SGLang in each of its processes; what breaks is the scheduler's, or the
    front's."""
    from sglang_pic.sglang_hooks import roles

    front, engine = roles()
    name = os.environ[FAULT]
    if front if name in OF_FRONT else engine:
        FAULTS[name]()


def _unrotated(x: Any, cos: Any, sin: Any, *, neox: bool, first: int = 0) -> Any:
    return x


def _turned_back(x: Any, cos: Any, sin: Any, *, neox: bool, first: int = 0) -> Any:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    cos, sin = cos[:, None], -sin[:, None]
    a, b = turned.chunk(2, dim=-1)
    out = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([out.to(x.dtype), rest], dim=-1)


def _rotate_as(function: Callable[..., Any]) -> Callable[[], None]:
    def break_it() -> None:
        from sglang_pic.kernels.rotate import rotate

        # Whoever has imported it already has this one, too.
        rotate.__code__ = function.__code__  # type: ignore[attr-defined]

    return break_it


def _pairs_without_operator() -> None:
    """Every core is taken for one that changes nothing of what stands before."""
    from sglang_pic.kernels.operators.pair import Pair, identity_like
    from sglang_pic.kernels.operators.storage import PackedPair

    unpack = PackedPair.unpack

    def unpack_broken(self: Any) -> Pair:
        pair = unpack(self)
        return Pair(identity_like(pair).A, pair.B)

    PackedPair.unpack = unpack_broken  # type: ignore[method-assign]


def _corrupt_what_is_looked_at() -> None:
    """``GET /pic/segments/ID`` turns the values of the segment's pages, or of a
    hybrid its pair's end states, around and makes them ten times as large."""
    from sglang_pic.forest.keys import owner_of
    from sglang_pic.manage import commands
    from sglang_pic.request.commands import Get

    get = commands.COMMANDS[Get]

    def corrupt(scheduler: Any, req: Any, command: Get) -> Any:
        forest = scheduler.tree_cache.forest
        record = forest.segments.record(command.id, commands.tenant_of(req))
        slots = forest.holder.slots(record)
        pool = scheduler.tp_worker.model_runner.token_to_kv_pool
        states = getattr(forest.carried, "store", None)
        if states is None:
            for layer in scheduler.tp_worker.model_runner.attn_backend.ropes:
                pool.get_value_buffer(layer)[slots] *= -10
        else:
            owner = owner_of(record.salt, record.extra_key)
            for pair in states.find(record.id, owner).pairs.values():
                pair.state.mul_(-10)
        return get(scheduler, req, command)

    commands.COMMANDS[Get] = corrupt


def _ranks_differ() -> None:
    """The second tensor-parallel rank has counted something else."""
    from sglang_pic.forest.consensus import Group

    gather = Group.gather

    def gather_wrong(self: Any, value: Any) -> Any:
        return gather(self, value ^ self.rank if type(value) is int else value)

    Group.gather = gather_wrong  # type: ignore[method-assign]


def _one_rank_refuses() -> None:
    from sglang_pic.forest import build

    refusal = build._refusal

    def refuse(ctx: Any, *args: Any) -> str | None:
        return "the second rank cannot link" if ctx.tp_rank == 1 else refusal(ctx, *args)

    build._refusal = refuse


# First tokens of segments that never, or not for so many seconds, compile.
NEVER, LATE = 501, 502
LATE_S = 6.0


def _some_compiles_fail_or_are_late() -> None:
    import asyncio

    from sglang_pic.server.compiler import Compiler

    init = Compiler.__init__

    def break_it(self: Any, generate: Any, *args: Any) -> None:
        async def broken(sent: Any) -> Any:
            if sent.input_ids[0] == NEVER:
                raise RuntimeError("this segment never compiles")
            if sent.input_ids[0] == LATE:
                await asyncio.sleep(LATE_S)
            async for out in generate(sent):
                yield out

        init(self, broken, *args)

    Compiler.__init__ = break_it  # type: ignore[method-assign]


OF_FRONT = ("compiles_fail_or_are_late",)
FAULTS: dict[str, Callable[[], None]] = {
    "unrotated": _rotate_as(_unrotated),
    "turned_back": _rotate_as(_turned_back),
    "no_operator": _pairs_without_operator,
    "compiles_fail_or_are_late": _some_compiles_fail_or_are_late,
    "corrupt_on_get": _corrupt_what_is_looked_at,
    "ranks_differ": _ranks_differ,
    "one_rank_refuses": _one_rank_refuses,
}
