"""Rows are not requests, and a linked row is not in order: what asks for either is
answered as stock would."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driver import Driver
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.mem_cache.base_prefix_cache import MatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_pic import sglang_hooks
from sglang_pic.attention.rows import by_row, can_tell
from sglang_pic.config import PicConfig
from sglang_pic.forest import state
from sglang_pic.forest.kept import Kept
from sglang_pic.forest.state import unlinkable
from sglang_pic.linear.checkpoints import SparseCheckpoints
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.states import PackedStates
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest, TokenSpan

# Flags of a request that the scheduler never sees, or that change only how the front
# writes down what came back.
OF_FRONT = {
    "return_text_in_logprobs",
    "return_flat_raw_output_top_logprobs",
    "return_flat_raw_top_logprobs_b64",
    "return_prompt_token_ids",  # as they were sent
    # Of image generation, and of nothing.
    "return_bytes",
    "return_entropy",
}


def flags(names: Any) -> set[str]:
    return {name for name in names if name.startswith("return_")}


def test_every_output_that_a_request_can_ask_for_is_classified() -> None:
    """A flag that SGLang adds is exact at once if the scheduler's request has it; here
    somebody looks at it."""
    asked = flags(field.name for field in dataclasses.fields(GenerateReqInput))
    of_req = flags(inspect.signature(Req).parameters)
    assert asked - of_req == OF_FRONT
    assert set(state.ordered_flags()) == {
        "return_hidden_states",
        "return_routed_experts",
        "return_indexer_topk",
        "return_pooled_hidden_states",
    }
    assert of_req - set(state.ordered_flags()) == state.ORDERLESS
    # What a request says by place, too: no other parameter is a list of numbers.
    lists = {
        name
        for name, parameter in inspect.signature(Req).parameters.items()
        if "List[int]" in str(parameter.annotation)
    }
    assert lists == {*state.PLACES, "token_ids_logprob", "token_type_ids"}


def driver() -> Driver:
    return Driver(1, 1024, PicConfig(min_segment=1))


LINK = LinkRequest((TokenSpan(1, 21), TokenSpan(21, 41)), LinkOptions())


def linked(cache: Driver, **fields: Any) -> Req:
    """A link of two segments that are held, with these fields of SGLang's request."""
    a, b = list(range(20)), list(range(30, 50))
    for segment in (a, b):
        assert cache.compile(segment)
    req = cache.link([7, *a, *b, 9], [(1, 21), (21, 41)])
    for name, value in fields.items():
        assert hasattr(req, name), name
        setattr(req, name, value)
    return req


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"return_hidden_states": True}, "hidden_states"),
        ({"return_hidden_states": "last"}, "hidden_states"),
        ({"return_routed_experts": True}, "routed_experts"),
        ({"return_indexer_topk": True}, "indexer_topk"),
        ({"return_pooled_hidden_states": True}, "pooled_hidden_states"),
        ({"return_logprob": True, "logprob_start_len": 0}, "input_logprobs"),
        ({"return_logprob": True, "logprob_start_len": 40}, "input_logprobs"),
        ({"multi_item_delimiter_indices": [3]}, "multi_item_delimiter_indices"),
        ({"token_indices_to_pool": [3]}, "token_indices_to_pool"),
        ({"decision_layout": [3]}, "decision_layout"),
        ({"beam_group": object()}, "beam_search"),
        ({"return_logprob": True, "logprob_start_len": 41}, None),
        ({"return_logprob": True, "logprob_start_len": 42}, None),
        ({"return_logprob": True, "logprob_start_len": -1, "token_ids_logprob": [1]}, None),
        ({"return_sampling_mask": True}, None),
        ({}, None),
    ],
)
def test_outputs_in_row_order_are_not_linked(fields: dict[str, Any], reason: str | None) -> None:
    cache = driver()
    req = linked(cache, **{k: v for k, v in fields.items() if k != "token_ids_logprob"})
    assert unlinkable(req, LINK) == reason
    assert cache.start(req)
    (report,) = req.customized_info["pic"]
    assert report["reason"] == reason
    assert (report["tokens_reused"] > 0) == (reason is None)


def test_what_sglang_forbids_to_cache_stays_forbidden() -> None:
    """A beam leader's row, and one whose embeddings are overridden, are no prefix; a
    link that is not made says nothing about that."""
    cache = driver()
    req = linked(cache, beam_group=object(), skip_radix_cache_insert=True)
    for _ in range(2):
        req.init_next_round_input(cache.cache)
        assert req.skip_radix_cache_insert


def a_pass(rids: list[str], rows: int, *, extend: bool = False) -> Any:
    mode = ForwardMode.EXTEND if extend else ForwardMode.DECODE
    return SimpleNamespace(
        rids=rids,
        seq_lens=torch.full((rows,), 9),
        forward_mode=mode,
        extend_prefix_lens_cpu=[0] * rows,
        extend_seq_lens_cpu=[9] * rows,
        positions=torch.arange(9 * rows),
        mrope_positions=None,
    )


def test_each_row_has_its_own_request() -> None:
    rids, values = ["a", "b"], [1, 2]
    assert by_row(rids, values, a_pass(["a", "b"], 2)) == [1, 2]
    # Members of a beam, or of a graph that pads, stand behind all requests.
    assert by_row(rids, values, a_pass(["a", "b"], 5)) == [1, 2, None, None, None]
    # Part of a batch, and one that nobody planned.
    assert by_row(rids, values, a_pass(["b"], 1)) == [2]
    assert by_row(rids, values, a_pass(["c", "d"], 2)) == [None, None]
    assert by_row(rids, values, a_pass([], 2)) == [None, None]
    assert can_tell(a_pass(["a", "b"], 5)) and can_tell(a_pass(["a"], 1, extend=True))
    assert not can_tell(a_pass(["a", "b"], 1))
    assert not can_tell(a_pass(["a", "a"], 2))


@pytest.mark.parametrize("extend", [False, True])
def test_rows_that_cannot_be_told_apart_end_their_links_alone(extend: bool) -> None:
    cache = driver()
    req = linked(cache)
    assert cache.start(req)
    ordinary = cache.request([1, 2, 3])
    handed: list[Any] = []
    backend = SimpleNamespace(set_plans=lambda rids, plans: handed.append(plans))
    runner = SimpleNamespace(attn_backend=backend)
    batch = SimpleNamespace(tree_cache=cache.cache, reqs=[req, ordinary])
    rids = [req.rid, ordinary.rid]
    sglang_hooks.set_positions(a_pass(rids, 3), None, batch, runner)
    assert [plan is not None for plan in handed.pop()] == [True, False]
    assert req.to_finish is None
    wrong = a_pass([req.rid] * 2, 2, extend=True) if extend else a_pass(rids, 1)
    sglang_hooks.set_positions(wrong, None, batch, runner)
    assert isinstance(req.to_finish, FINISH_ABORT) and req.to_finish.status_code == 500
    assert ordinary.to_finish is None
    # Nothing is left of an earlier batch, whose rows it might have.
    assert all(plan is None for plan in handed.pop())


@pytest.mark.parametrize("can_be_told", [True, False])
def test_a_row_that_goes_on_from_a_checkpoint_is_told_apart_or_ends(can_be_told: bool) -> None:
    """It would else run from another row's state, and leave that as a prefix."""
    cache = driver()
    shape = LinearShape(1, 1, 2, 2, 2, 1, False)
    states = PackedStates(PicConfig(), Kept(1 << 20))
    tail, end = torch.zeros(1, 2, 1), torch.zeros(1, 1, 2, 2)
    states.add("checkpoint:7", ("", ""), core_end=64, conv_tail=tail, end=end, pairs={})
    node = SimpleNamespace(node_id=7, path_end=64)
    core = SimpleNamespace(collect_path_info=lambda nodes: [[node]])
    parts: Any = SimpleNamespace(tree_core=core)
    forest = cache.forest
    made = SparseCheckpoints(
        parts, parts, forest.nodes, states, shape, forest.cost, 64,
        lambda req: None, forest.contained, forest.consensus,
    )  # fmt: skip
    made._steps.put(7, 64, 1.0, 1.0, None)
    forest.links._checkpoints = made
    req, other = cache.request(list(range(200))), cache.request([1, 2, 3])
    matched = MatchResult(0, 0, 0, 0, full_kv_hit_length=128, last_visited_node_id=7)
    result = made.resume(req, matched)
    req.prefix_len = result.device_prefix_len
    assert (result.device_prefix_len, result.last_device_node) == (64, 7)
    handed: list[Any] = []
    backend = SimpleNamespace(
        set_plans=lambda rids, plans: handed.clear(),
        set_checkpoints=lambda resumed, captures: handed.extend(resumed),
    )
    runner = SimpleNamespace(attn_backend=backend)
    batch = SimpleNamespace(tree_cache=cache.cache, reqs=[req, other])
    rids = [req.rid, other.rid] if can_be_told else [req.rid] * 2
    sglang_hooks.set_positions(a_pass(rids, 2, extend=True), None, batch, runner)
    assert other.to_finish is None and not other.skip_radix_cache_insert
    if can_be_told:
        assert [one is not None for one in handed] == [True, False]
        assert req.to_finish is None
    else:
        assert isinstance(req.to_finish, FINISH_ABORT) and req.skip_radix_cache_insert
        assert handed == []
    # From its first token on its slot has its own state.
    req.output_ids.append(1)
    made.inserted(req)
    assert not made.concern([req])
