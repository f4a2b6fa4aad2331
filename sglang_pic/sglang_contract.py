"""What this plug-in relies on of SGLang beside its registries, and the check of its shape.

Each entry names a function and the parameters it must begin with. They are checked at
start-up, in the processes that run the engine: another release is refused rather than
called blindly. What is hooked is ``sglang_hooks``.
"""

from __future__ import annotations

import inspect
import pkgutil
from typing import Any

from sglang_pic.errors import PicConfigError

SGLANG_VERSION = "0.5.23"
_SRT = "sglang.srt."
_OPS = "sglang.kernels.ops."
_CORE = _SRT + "mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface."

_ATTEND = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")

# What we call or override without a hook.
RELIED_ON = {
    # A request that waits in the front is in SGLang's table, and answered by SGLang.
    _SRT + "managers.tokenizer_manager.TokenizerManager._init_req_state": ("self", "obj"),
    _SRT + "managers.tokenizer_manager.TokenizerManager._wait_one_response": ("self", "obj"),
    _SRT + "managers.tokenizer_manager.TokenizerManager._handle_abort_req": ("self", "recv_obj"),
    _SRT + "managers.tokenizer_manager.TokenizerManager._collect_batch_responses": (
        "self",
        "generators",
    ),
    _SRT
    + "layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_extend": (
        "self",
        "query",
        "output",
        "k_cache",
        "v_cache",
        "req_to_token",
        "req_pool_indices",
        "seq_lens",
        "extend_prefix_lens",
        "extend_seq_lens",
    ),
    _SRT
    + "layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_decode": (
        "self",
        "query",
        "output",
        "k_cache",
        "v_cache",
        "req_to_token",
        "req_pool_indices",
        "seq_lens",
    ),
    **{
        _SRT + f"layers.attention.{backend}.{name}": parameters
        for backend in (
            "triton_backend.TritonAttnBackend",
            "flashinfer_backend.FlashInferAttnBackend",
        )
        for name, parameters in {
            "init_forward_metadata": ("self", "forward_batch"),
            "init_forward_metadata_out_graph": ("self", "forward_batch", "in_capture"),
            "init_cuda_graph_state": ("self", "max_bs", "max_num_tokens"),
            "forward_extend": _ATTEND,
            "forward_decode": _ATTEND,
        }.items()
    },
    # Where a tokenizer worker finds the server's arguments.
    _SRT + "managers.multi_tokenizer_mixin.get_main_process_id": (),
    _SRT + "managers.multi_tokenizer_mixin.read_from_shared_memory": ("name",),
    # What is freed while results are processed.
    **{
        _SRT + f"mem_cache.allocator.base.BaseTokenToKVPoolAllocator.free_group_{name}": ("self",)
        for name in ("begin", "end")
    },
    # Where a pass has read SGLang's table of rows for the last time.
    _SRT + "layers.attention.base_attn_backend.AttentionBackend.shared_read_ends": ("self", "fm"),
    _SRT + "layers.attention.base_attn_backend.AttentionBackend.resolve_prefill_shared_read_ends": (
        "self",
        "forward_batch",
    ),
    _SRT + "layers.attention.flashinfer_backend.FlashInferAttnBackend._kv_write_scales": (
        "self",
        "layer",
    ),
    _SRT + "layers.attention.flashinfer_backend.FlashInferAttnBackend._check_kv_attention_access": (
        "self",
        "phase",
        "access",
    ),
    _SRT + "model_executor.runner_utils.capture_mode.get_capture_attention_variant": (),
    _SRT + "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner._pad_to_bucket": (
        "raw_size",
        "buckets",
    ),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.match_prefix": ("self", "params"),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.lock": ("self", "node_id"),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.unlock": ("self", "lock"),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.on_release": (
        "self",
        "req",
        "checkpointed",
    ),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.init_load_back": ("self", "params"),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.prefix_device_indices": ("self", "req"),
    # Hybrids: the cache, the backends in front of SGLang's, the kernels they call.
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.claim_kv_row": ("self", "req"),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree": (
        "self",
        "req",
        "up_to",
    ),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.insert": ("self", "params"),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache._evict": (
        "self",
        "params",
        "available_size_targets",
        "allocation_reclaim_satisfied",
    ),
    # The eviction order: SGLang's tree still evicts, and says what it holds.
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache._evict_device_leaf": (
        "self",
        "node_id",
        "tracker",
    ),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.evict_host": ("self", "num_tokens"),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache._component_available_size": (
        "self",
        "component_type",
    ),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.path_device_indices": ("self", "node"),
    # How far a match goes, with and without a state, and the node where it ends.
    _SRT + "mem_cache.base_prefix_cache.MatchResult": (
        "device_prefix_len",
        "last_device_node",
        "last_host_node",
        "best_match_node",
        "host_hit_length",
        "swa_host_hit_length",
        "swa_branching_seqlen",
        "mamba_host_hit_length",
        "mamba_branching_seqlen",
        "cache_protected_len",
        "full_kv_hit_length",
        "cache_actions",
        "last_visited_node_id",
    ),
    _CORE + "collect_path_info": ("self", "end_node_ids"),
    _CORE + "match_full_device_prefix": ("self", "key"),
    _CORE + "collect_full_device_indices": ("self", "from_node_id", "until_node_id"),
    _CORE + "is_full_device_evicted": ("self", "node_id"),
    _CORE + "inc_full_pin": ("self", "node_id"),
    _CORE + "dec_full_pin": ("self", "node_id"),
    _CORE + "full_evictable_size": ("self",),
    # Rows that end: what they owned, and a hybrid's state of their last token.
    _SRT + "managers.schedule_batch.Req.owned_kv_len": ("self",),
    _SRT + "mem_cache.memory_pool.HybridReqToTokenPool.translate_mamba_indices": (
        "self",
        "mamba_indices",
    ),
    _SRT + "layers.attention.hybrid_linear_attn_backend.HybridLinearAttnBackend": (
        "full_attn_backend",
        "linear_attn_backend",
        "full_attn_layers",
    ),
    _SRT + "layers.attention.hybrid_linear_attn_backend.Mamba2AttnBackend.forward": (
        "self",
        "mixer",
        "hidden_states",
        "output",
        "layer_id",
        "forward_batch",
    ),
    _SRT + "layers.attention.linear.gdn_backend.GDNAttnBackend.forward_extend": (
        "self",
        "layer",
        "forward_batch",
        "mixed_qkv",
        "a",
        "b",
    ),
    _SRT + "models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register": (
        "cls",
        "backend_name",
        "handler_func",
    ),
    _SRT
    + "models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.get_handler": (
        "cls",
        "backend_name",
    ),
    # A linked row must not be computed in a form that sees all of its prefix.
    _SRT + "models.deepseek_common.attention_backend_handler.handle_attention_triton": (
        "attn",
        "forward_batch",
    ),
    _SRT + "models.deepseek_common.attention_forward_methods.forward_mha.resolve_attn_backend": (
        "forward_batch",
    ),
    _SRT + "layers.attention.linear.kda_backend.KDAAttnBackend.forward_extend": (
        "self",
        "layer",
        "forward_batch",
        "mixed_qkv",
        "a",
        "b",
    ),
    _OPS + "attention.fla.kda.chunk_kda": (
        "q",
        "k",
        "v",
        "g",
        "beta",
        "scale",
        "initial_state",
        "initial_state_indices",
        "use_qk_l2norm_in_kernel",
        "cu_seqlens",
        "A_log",
        "dt_bias",
        "lower_bound",
    ),
    _SRT + "layers.attention.linear.lightning_backend.LightningAttentionBackend.forward_extend": (
        "self",
        "q",
        "k",
        "v",
        "layer",
        "forward_batch",
        "save_kv_cache",
    ),
    _OPS + "attention.linear.seg_la.SegLaMeta": (
        "batch_size",
        "max_q_length",
        "q_offsets",
        "s_offsets",
        "q_lengths",
        "s_scales",
    ),
    _OPS + "attention.linear.seg_la.seg_la_fwd": ("q", "k", "v", "s", "decay_scales", "meta"),
    _OPS + "attention.fla.chunk.chunk_gated_delta_rule": (
        "q",
        "k",
        "v",
        "g",
        "beta",
        "scale",
        "initial_state",
        "initial_state_indices",
        "cu_seqlens",
    ),
    # On a GPU: what of it does not depend on the state.
    _OPS + "attention.fla.chunk.prepare_chunk_indices": ("cu_seqlens", "chunk_size"),
    _OPS + "attention.fla.chunk.l2norm_fwd": ("x",),
    _OPS + "attention.fla.chunk.chunk_local_cumsum": ("g", "chunk_size"),
    _OPS + "attention.fla.chunk.chunk_gated_delta_rule_fwd_intra": (
        "k",
        "v",
        "g",
        "beta",
        "cu_seqlens",
        "chunk_size",
        "chunk_indices",
    ),
    _OPS + "attention.linear.fused_gdn_gating.fused_gdn_gating": ("A_log", "a", "b", "dt_bias"),
    _OPS + "mamba.causal_conv1d_triton.causal_conv1d_fn": (
        "x",
        "weight",
        "bias",
        "conv_states",
        "query_start_loc",
        "seq_lens_cpu",
    ),
    # An encoder beside the model: where it is told that a request ended in the queue, the sum
    # over ranks, and what its cross blocks add to.
    _SRT + "managers.scheduler.Scheduler._release_aborted_request": ("self", "req"),
    _SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.finish": (
        "self",
        "handle",
        "outcome",
    ),
    _SRT + "distributed.communication_op.tensor_model_parallel_all_reduce": ("input_",),
    **{
        _SRT + f"layers.layer_boundary.residual.batch.{name}": ("hidden_states", "forward_batch")
        for name in ("complete_output", "snapshot")
    },
    _SRT + "managers.scheduler._make_abort_req": ("req", "finished_reason"),
    _SRT + "managers.scheduler.Scheduler.send_abort_output": ("self", "abort_req", "req"),
}


def check_shape(target: str, parameters: tuple[str, ...]) -> None:
    """Raise ``PicConfigError`` unless ``target`` exists and begins with these parameters."""
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise PicConfigError(f"SGLang has no {target}: {error}") from error
    names = tuple(inspect.signature(inspect.unwrap(found)).parameters)
    if inspect.ismethod(found):
        names = ("cls", *names) if names[:1] != ("cls",) else names
    if names[: len(parameters)] != parameters:
        raise PicConfigError(f"{target} takes {names}, expected {parameters} first")


def check_value(module: Any, name: str, kind: type) -> None:
    """Raise ``PicConfigError`` unless a module of SGLang has a value of this kind."""
    found = getattr(module, name, None)
    if not isinstance(found, kind):
        where = f"{module.__name__}.{name}"
        raise PicConfigError(f"SGLang's {where} is {found!r:.80}, expected {kind.__name__}")


def check_contract() -> None:
    """Raise ``PicConfigError`` unless all that is relied on is there."""
    for target, parameters in RELIED_ON.items():
        check_shape(target, parameters)
