"""The scheduler's part of the canary: what is cached against what a single pass makes.

The front has compiled two segments, one behind the other as a third, and of the
third all up to the core of the second (``server.canary``).
"""

from __future__ import annotations

from typing import Any

from sglang_pic.attention.selfcheck import first_layer_checks, rotary_check
from sglang_pic.errors import PicRefused
from sglang_pic.forest.forest import Forest
from sglang_pic.forest.keys import owner_of, segment_id
from sglang_pic.linear.carried import LinearStates
from sglang_pic.linear.selfcheck import first_layer_check
from sglang_pic.link.policy import Outline, Seam


def selfcheck(scheduler: Any, req: Any, *, at: int, seam: int) -> dict[str, Any]:
    """Check rotation, first layer and, of a hybrid, first state.

    Args:
        req: its prompt is the third segment, its salt the canary's own.
        at: where the second segment begins, a multiple of the page size.
        seam: the head's width in tokens.

    Returns:
        Checks by name.

    Raises:
        PicRefused: 404 where a segment, or its state, is not held.
    """
    forest, runner = scheduler.tree_cache.forest, scheduler.tp_worker.model_runner
    ropes = runner.attn_backend.ropes
    whole = req.origin_input_ids
    alone = _slots(forest, req, whole[at:])
    behind = _slots(forest, req, whole)
    checks = first_layer_checks(runner.token_to_kv_pool, ropes, alone, behind)
    rotary = rotary_check(runner.model, ropes)
    if rotary is not None:
        checks["rotation"] = rotary
    if isinstance(forest.carried, LinearStates):
        length = len(whole) - at
        first, last = Seam(seam).core(Outline(length), page=forest.pages.page_size)
        core = _states(forest, forest.carried, req, whole[at:]).core(first, last, opening=False)
        if core is None:
            raise PicRefused(404, "no state for this seam", "seam")
        checks["first_layer_state"] = first_layer_check(
            core,
            _states(forest, forest.carried, req, whole[: at + first]).end,
            _states(forest, forest.carried, req, whole).end,
            inputs=runner.dtype,
            rope=runner.attn_backend.linear_rope,
            offset=at,
        )
    return {name: check.to_json() for name, check in checks.items()}


def _slots(forest: Forest, req: Any, ids: Any) -> Any:
    lookup = forest.lookups.find(ids, req.extra_key, req.cache_salt)
    if lookup.miss is not None:
        raise PicRefused(404, "a segment of the canary is not held", "ids")
    return forest.lookups.slots(lookup)


def _states(forest: Forest, carried: LinearStates, req: Any, ids: Any) -> Any:
    space = forest.segments.namespace(req.cache_salt)
    name = segment_id(space, req.extra_key, ids)
    held = carried.states.find(name, owner_of(space, req.extra_key))
    if held is None:
        raise PicRefused(404, "a state of the canary is not held", "ids")
    return held
