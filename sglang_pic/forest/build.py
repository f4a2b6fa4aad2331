"""Build the tree cache for one scheduler, and decide whether it may link."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

from sglang.srt.mem_cache.registry import create_unified_radix_cache

from sglang_pic.attention.relocate import Relocator
from sglang_pic.config import PicConfig
from sglang_pic.errors import PicConfigError
from sglang_pic.forest.cache import PicCache
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.hybrid import PicHybridCache
from sglang_pic.manage.store import Store
from sglang_pic.request.seal import ENV_NAME, is_made_here

logger = logging.getLogger(__name__)


def _refusal(ctx: Any, runner: Any, unhooked: str | None) -> str | None:
    """Why this server must not link, or ``None``."""
    args, backend = ctx.server_args, runner.attn_backend
    reasons = {
        "the radix cache is disabled": args.disable_radix_cache,
        "sliding-window models are not supported": ctx.is_hybrid_swa,
        "speculative decoding is not supported": args.speculative_algorithm is not None,
        "pipeline parallelism is not supported": args.pp_size > 1,
        "a hierarchical cache is not supported": args.enable_hierarchical_cache,
        "hybrids on several tensor-parallel ranks are not supported": (
            ctx.is_hybrid_ssm and args.tp_size > 1
        ),
        f"schedulers on several machines need one {ENV_NAME} on all of them": (
            args.nnodes > 1 and is_made_here()
        ),
        "prefill/decode disaggregation is not supported": args.disaggregation_mode != "null",
        "context parallelism is not supported": args.dcp_size > 1 or args.attn_cp_size > 1,
        "data-parallel attention is not supported": args.enable_dp_attention,
        "two-batch overlap is not supported": args.enable_two_batch_overlap,
        "deterministic inference is not supported": args.enable_deterministic_inference,
        "diffusion models are not supported": args.dllm_algorithm is not None,
        "a KV cache of another type than the model's is not supported": (
            runner.kv_cache_dtype != runner.dtype
        ),
        f"attention backend {type(backend).__name__} cannot link": not hasattr(
            backend, "set_rows" if ctx.is_hybrid_ssm else "set_plans"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    return unhooked or backend.refusal


def build_cache(ctx: Any, *, unhooked: str | None) -> PicCache:
    """Factory for ``--radix-cache-backend pic``.

    Args:
        ctx: SGLang's ``TreeCacheBuildContext``.
        unhooked: which hook is not in place, or ``None``.
    """
    cache_class = PicHybridCache if ctx.is_hybrid_ssm else PicCache
    cache = create_unified_radix_cache(ctx, cache_class=cache_class)
    assert isinstance(cache, PicCache)
    config = PicConfig.from_env()
    runner = ctx.tp_worker.model_runner
    backend = runner.attn_backend
    refusal = _refusal(ctx, runner, unhooked)
    vocabulary = ctx.model_config.vocab_size
    if any(not 0 <= token < vocabulary for token in config.compile_context):
        raise PicConfigError("the compile context holds a token outside the vocabulary")
    model = ctx.model_config
    cost = PrefillCost.of_model(
        runner.model,
        runner.token_to_kv_pool,
        kv_itemsize=runner.kv_cache_dtype.itemsize,
        kv_heads=model.get_total_num_kv_heads(),
        heads=model.num_attention_heads,
    )
    cache.configure(config, refusal, cost)
    if refusal is None:
        cache.relocate = Relocator(runner.token_to_kv_pool, backend.ropes)
        if isinstance(cache, PicHybridCache):
            cache.shape = backend.shape
        logger.info("sglang_pic links: %s", config)
        if config.store is not None and ctx.server_args.tp_size > 1:
            raise PicConfigError("--pic-store works on one tensor-parallel rank only")
        if config.store is not None:
            cache.store = Store(cache, runner, pathlib.Path(config.store))
            logger.warning("sglang_pic restored: %s", cache.store.restore(everyone=True))
    else:
        logger.warning("sglang_pic does not link, every request is exact: %s", refusal)
    return cache
