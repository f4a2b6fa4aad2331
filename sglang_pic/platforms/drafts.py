"""What SGLang's speculative decoding lacks on a plain CPU: torch forms of its kernels, with
their signatures and in-place effects, and attention of drafts on ``torch_native``.

SGLang has them for GPUs and for AMX. As its own CPU engine does, this one verifies by the
likeliest token, whatever the temperature.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from sglang_pic.attention.drafts import attend_drafts


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Of trees, bool [batch, n, n] flat: each node's position, its first child and its next
    sibling, -1 where there is none."""
    n = draft_token_num
    above = tree_mask.view(batch_size, n, n).tril(-1)
    positions.copy_((above.sum(-1) + verified_seq_len[:, None]).view(-1))
    retrieve_index.copy_(torch.arange(batch_size * n).view(batch_size, n))
    order = torch.arange(n)
    parent = torch.where(above, order, -1).amax(-1)
    child = torch.where(above, order[:, None], n).amin(-2)
    retrieve_next_token.copy_(torch.where(child < n, child, -1))
    twins = (parent[:, :, None] == parent[:, None, :]).tril(-1) & (parent >= 0)[:, None, :]
    twin = torch.where(twins, order[:, None], n).amin(-2)
    retrieve_next_sibling.copy_(torch.where(twin < n, twin, -1))


def cache_locs(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """int64, slots of each row from one entry to another, row behind row."""
    bounds = zip(start_offset.tolist(), end_offset.tolist(), strict=True)
    rows = zip(req_pool_indices.tolist(), bounds, strict=True)
    return torch.cat([req_to_token[row, start:end] for row, (start, end) in rows]).long()


def assign_req_to_token_pool_func(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write slots into rows from one entry to another."""
    at = 0
    bounds = zip(start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, (start, end) in zip(req_pool_indices.tolist(), bounds, strict=True):
        req_to_token[row, start:end] = out_cache_loc[at : at + end - start].to(req_to_token.dtype)
        at += end - start


def fill_front_out_cache_loc_func(
    num_front: torch.Tensor, out_cache_loc: torch.Tensor, front_out_cache_loc: torch.Tensor
) -> None:
    """The first slots of each row's window, packed."""
    window = out_cache_loc.view(num_front.numel(), -1)
    chosen = window[torch.arange(window.shape[1]) < num_front[:, None]]
    front_out_cache_loc[: chosen.numel()] = chosen


def fill_accept_out_cache_loc_func(
    accept_index: torch.Tensor,
    out_cache_loc: torch.Tensor,
    accept_out_cache_loc: torch.Tensor,
    size: int,
) -> None:
    """Slots of accepted drafts, packed; -1 is none."""
    chosen = out_cache_loc[accept_index[accept_index >= 0].long()]
    accept_out_cache_loc[: chosen.numel()] = chosen


def copy_all_layer_kv_cache_func(
    data_ptrs: torch.Tensor,
    strides: torch.Tensor,
    tgt_loc: torch.Tensor,
    src_loc: torch.Tensor,
    num_locs: int,
    num_locs_upper: int,
    kv_copy_config: dict[str, int],
) -> None:
    """Copy slots within every layer's keys and values, which are given by their addresses
    and the bytes of a slot."""
    target, source = tgt_loc[:num_locs], src_loc[:num_locs]
    slots = int(torch.cat([target, source]).max()) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (slots * stride)).from_address(address)
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(slots, stride)
        rows[target] = rows[source]


def verify_tree_greedy_func(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walk down each tree along the tokens that the model predicts."""
    following, beside = retrieve_next_token.tolist(), retrieve_next_sibling.tolist()
    drafts, predicted = candidates.tolist(), target_predict.tolist()
    for b, row in enumerate(retrieve_index.tolist()):
        node, accepted = 0, [row[0]]
        while len(accepted) < accept_index.shape[1]:
            token, child = predicted[b][node], following[b][node]
            while child != -1 and drafts[b][child] != token:
                child = beside[b][child]
            if child == -1:
                break
            predicts[row[node]] = token
            node = child
            accepted.append(row[node])
        predicts[row[node]] = predicted[b][node]
        accept_index[b, : len(accepted)] = torch.tensor(accepted)
        accept_token_num[b] = len(accepted) - 1
    return predicts, accept_index, accept_token_num


def verify_uses_greedy(
    *,
    is_all_greedy: bool,
    is_cpu: bool,
    is_hip: bool,
    is_xpu: bool,
    use_rejection_sampling: bool,
) -> bool:
    """Always, as on SGLang's own CPU engine."""
    return True


def forward_extend(
    original: Callable[..., Any],
    backend: Any,
    q: Any,
    k: Any,
    v: Any,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
) -> Any:
    """Around ``TorchNativeAttnBackend.forward_extend``, which knows no drafts."""
    if not forward_batch.forward_mode.is_target_verify():
        return original(backend, q, k, v, layer, forward_batch, save_kv_cache)
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    from sglang_pic.attention.rope import window_of

    pool = backend.token_to_kv_pool
    if save_kv_cache and k is not None and v is not None:
        pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
    query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
    out = query.new_empty((*query.shape[:2], layer.v_head_dim))
    keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    attend_drafts(
        query, out, keys, values, backend.req_to_token_pool.req_to_token, forward_batch,
        range(len(forward_batch.seq_lens)), layer.scaling, window_of(layer),
    )  # fmt: skip
    return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)


def bind() -> None:
    """Name the one kernel that SGLang's NGRAM worker imports of ``sgl_kernel``, which does
    not load here."""
    name = "sgl_kernel.speculative"
    if name not in sys.modules:
        module = ModuleType(name)
        module.reconstruct_indices_from_tree_mask = reconstruct_indices_from_tree_mask  # type: ignore[attr-defined]
        sys.modules[name] = module


_OPS = "sglang.kernels.ops.speculative."
KERNELS: dict[str, Callable[..., Any]] = {
    _OPS + "cache_locs.fill_front_out_cache_loc_func": fill_front_out_cache_loc_func,
    _OPS + "eagle.fill_accept_out_cache_loc_func": fill_accept_out_cache_loc_func,
    "sglang.kernels.ops.kvcache.cache_move.copy_all_layer_kv_cache_func": (
        copy_all_layer_kv_cache_func
    ),
    _OPS + "spec_tree.verify_tree_greedy_func": verify_tree_greedy_func,
    "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func": assign_req_to_token_pool_func,
    "sglang.srt.speculative.eagle_utils._verify_uses_greedy": verify_uses_greedy,
}
