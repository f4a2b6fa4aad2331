"""Build the tree cache for one scheduler, and decide whether it may link."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.runtime_context import get_parallel, mamba_checkpoint_grid

from sglang_pic.attention.relocate import Relocator
from sglang_pic.attention.rope import has_windows
from sglang_pic.config import PicConfig
from sglang_pic.errors import PicConfigError
from sglang_pic.forest.adapter import PicCache
from sglang_pic.forest.arrivals import Arrivals
from sglang_pic.forest.asked import Asked
from sglang_pic.forest.assembly import Assembly, BothOrders, NoAssembly
from sglang_pic.forest.budget import KV_SHARE, TIER_SHARE, Budgets, Need
from sglang_pic.forest.carried import Carried, Nothing
from sglang_pic.forest.checkpoints import Checkpoints, NoCheckpoints
from sglang_pic.forest.companies import Companies
from sglang_pic.forest.consensus import ALONE, AllRanks, Consensus, Group, OneRank
from sglang_pic.forest.containment import Containment
from sglang_pic.forest.conversations import Conversations
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.encoded import Encoded
from sglang_pic.forest.eviction import LINKABLE, AsSglang, BehindTier, Eviction, InOrder
from sglang_pic.forest.forest import Forest
from sglang_pic.forest.holder import Holder
from sglang_pic.forest.kept import Kept
from sglang_pic.forest.links import Links
from sglang_pic.forest.lookups import Lookups
from sglang_pic.forest.nodes import NodeIndex
from sglang_pic.forest.pages import NoPages, Pages
from sglang_pic.forest.pins import Pins
from sglang_pic.forest.planning import Ordinary, Planning
from sglang_pic.forest.relocation import Relocation
from sglang_pic.forest.segments import Segments
from sglang_pic.forest.tier import HostTier, NoTier, Tier
from sglang_pic.kernels.rotate import LayerRope
from sglang_pic.linear.carried import LinearStates
from sglang_pic.linear.checkpoints import SparseCheckpoints
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.step import turning
from sglang_pic.link.policy import AUTO, floor_to
from sglang_pic.manage.store import Store
from sglang_pic.request.seal import ENV_NAME, is_made_here
from sglang_pic.store.address import open_store, read_key

logger = logging.getLogger(__name__)

# Types of a KV cache whose numbers stand for themselves.
PLAIN = (
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
# Of the KV budget: segments of links still on their way.
FRESH_SHARE = 0.5


def _refusal(ctx: Any, runner: Any, unhooked: str | None) -> str | None:
    """Why this server must not link, or ``None``."""
    args, backend = ctx.server_args, runner.attn_backend
    links = hasattr(backend, "set_rows" if ctx.is_hybrid_ssm else "set_plans")
    verifies = (
        getattr(backend, "verifies", False)
        and not runner.use_mla_backend
        and not has_windows(runner.model)
    )
    reasons = {
        "the radix cache is disabled": args.disable_radix_cache,
        "sliding windows with a KV pool of their own are not supported: "
        "--disable-hybrid-swa-memory": ctx.is_hybrid_swa,
        f"speculative decoding ({args.speculative_algorithm}) is not supported here": (
            args.speculative_algorithm is not None and (ctx.is_hybrid_ssm or not verifies)
        ),
        "pipeline parallelism is not supported": args.pp_size > 1,
        "a hierarchical cache of a model with linear layers is not supported": (
            args.enable_hierarchical_cache and ctx.is_hybrid_ssm
        ),
        "a hierarchical cache that only buffers is not supported": (
            args.enable_hierarchical_cache and args.hicache_host_memory_mode == "buffer_only"
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
        "a KV cache of blocks with scales is not supported": runner.kv_cache_dtype not in PLAIN,
        f"latent attention (MLA) on {type(backend).__name__} is not supported": (
            runner.use_mla_backend and not links
        ),
        f"attention backend {type(backend).__name__} cannot link": not links,
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
    cache = create_unified_radix_cache(ctx, cache_class=PicCache)
    assert isinstance(cache, PicCache)
    config = PicConfig.from_env()
    runner = ctx.tp_worker.model_runner
    backend = runner.attn_backend
    refusal = _refusal(ctx, runner, unhooked)
    model = ctx.model_config
    if any(not 0 <= token < model.vocab_size for token in config.compile_context):
        raise PicConfigError("the compile context holds a token outside the vocabulary")
    cost = PrefillCost.of_model(
        runner.model,
        runner.token_to_kv_pool,
        kv_itemsize=runner.kv_cache_dtype.itemsize,
        kv_heads=1 if runner.use_mla_backend else model.get_total_num_kv_heads(),
        heads=model.num_attention_heads,
    )
    ranks = Group(ctx.tp_rank, ctx.tp_size, ctx.tp_group.cpu_group if ctx.tp_size > 1 else None)
    # What is evicted first must not depend on how many weights a rank has.
    cost = ranks.gather(cost)[0]
    # A rank that linked beside one that does not would wait for it for ever.
    refusal = next((why for why in ranks.gather(refusal) if why is not None), None)
    if refusal is not None:
        if config.encoder is not None:
            raise PicConfigError(f"--pic-encoder: {refusal}")
        plant(cache, config, cost, refusal=refusal)
        logger.warning("sglang_pic does not link, every request is exact: %s", refusal)
        return cache
    shape = backend.shape if ctx.is_hybrid_ssm else None
    copies = Relocator(runner.token_to_kv_pool, backend.ropes)
    rope = backend.linear_rope if ctx.is_hybrid_ssm else None
    plant(cache, config, cost, shape=shape, rope=rope, copies=copies, ranks=ranks)
    if config.encoder is not None:
        cache.forest.encoded = _encoded(ctx, runner, cache.forest)
    logger.info("sglang_pic links: %s", config)
    if config.store is not None:
        args = ctx.server_args
        server = f"{socket.gethostname()} {args.host}:{args.port} {get_parallel().dp_rank or 0}"
        store = Store(
            cache.forest,
            runner,
            open_store(config.store),
            key=read_key(config.store_key_file),
            server=server,
            ranks=ranks,
        )
        cache.forest.store = store
        logger.info("sglang_pic pinned again: %s", store.start())
    return cache


def _encoded(ctx: Any, runner: Any, forest: Forest) -> Encoded:
    """What a server with an encoder holds of documents.

    Raises:
        PicConfigError: such a server can't have one.
    """
    args = ctx.server_args
    reasons = {
        f"{type(runner.model).__name__} is not wired": not hasattr(runner.model, "pic"),
        "--enable-layernorm-sp is not supported": args.enable_layernorm_sp,
        "--moe-dense-tp-size 1 is not supported": args.moe_dense_tp_size == 1 < args.tp_size,
        "data parallelism is not supported": args.dp_size > 1,
        "speculative decoding is not supported": args.speculative_algorithm is not None,
        "latent attention (MLA) is not supported": runner.use_mla_backend,
        "--enable-torch-compile is not supported": args.enable_torch_compile,
    }
    for reason, holds in reasons.items():
        if holds:
            raise PicConfigError(f"--pic-encoder: {reason}")
    layers = ctx.model_config.num_hidden_layers
    return Encoded(runner.model.pic, forest.kept, forest.cost, layers, forest.consensus)


def plant(
    cache: PicCache,
    config: PicConfig,
    cost: PrefillCost,
    *,
    refusal: str | None = None,
    shape: LinearShape | None = None,
    rope: LayerRope | None = None,
    copies: Relocator | None = None,
    ranks: Group = ALONE,
) -> Forest:
    """Put the parts together and give them to their cache.

    Args:
        config: the server's settings; its compile context is cut to whole pages.
        cost: of the model.
        refusal: why this server must not link at all, or ``None``.
        shape: of a hybrid's linear layers; ``None`` in models without.
        rope: what turns the linear layers' keys, if anything does.
        copies: of pages; without it nothing is relocated, and no company is kept.
        ranks: of tensor parallelism.
    """
    allocator, rows = cache.token_to_kv_pool_allocator, cache.req_to_token_pool
    pool = allocator.size * cost.kv_bytes
    tier: Tier = NoTier() if cache.cache_controller is None else HostTier(cache)
    share = KV_SHARE if cache.cache_controller is None else TIER_SHARE
    kv = int(pool * share) if config.kv_mib is None else min(pool, config.kv_mib << 20)
    limit = kv // cost.kv_bytes
    context = config.compile_context[: floor_to(len(config.compile_context), cache.page_size)]

    def lost(name: str) -> None:
        """What was kept beside pages went for want of memory."""
        consensus.note("lost", name)
        carried.lost(name)
        holder.remove(name)
        conversations.remove(name)
        assembly.lost(name)
        checkpoints.lost(name)

    def gone(names: Collection[str]) -> None:
        """Pages that these ended with went for want of memory."""
        for name in names:
            consensus.note("evicted", name)
            holder.evicted(name)
            companies.gone(name)
            conversations.evicted(name)
            checkpoints.gone(name)

    contained = Containment(lambda: forest.check(), refusal)
    consensus: Consensus = OneRank()
    if ranks.size > 1:
        consensus = AllRanks(ranks.gather, contained.distrust)
    pages = Pages(cache.params) if refusal is None else NoPages(cache.params)
    trees = (cache, pages.tree) if refusal is None else (cache,)
    nodes = NodeIndex(trees, cost, gone)
    segments = Segments(
        context, cache.page_size, int(limit * FRESH_SHARE), lambda record: holder.release(record)
    )
    kept = Kept(config.state_mib << 20, lost, lambda: release_all())
    carried: Carried = Nothing()
    checkpoints: Checkpoints = NoCheckpoints()
    if shape is not None and refusal is None:
        carried = states = LinearStates(
            config,
            context=len(context),
            page=cache.page_size,
            shape=shape,
            cost=cost,
            rows=rows,
            device=allocator.device,
            # SGLang runs no step ahead, and pages cut nothing off.
            is_exact=cache.page_size == 1 and not cache.enable_mamba_extra_buffer,
            kept=kept,
            by_shape=ranks.size > 1,
            ending=lambda node, until: tuple(nodes.ends_on_path(LINKABLE, node, until)),
            turn=turning(rope),
        )
        if config.checkpoints == AUTO:
            checkpoints = SparseCheckpoints(
                cache, cache.match_as_sglang, nodes, states.states, shape, cost,
                mamba_checkpoint_grid(cache.page_size), states.begin_row, contained, consensus,
            )  # fmt: skip

    def release_all() -> None:
        segments.release_all()
        assembly.release()

    in_order = InOrder(cache, pages, nodes, limit, contained, release_all)
    eviction: Eviction = AsSglang()
    if refusal is None:
        eviction = in_order if cache.cache_controller is None else BehindTier(in_order)
    # Encoded documents are carried in models of any kind.
    state = carried.budget if config.encoder is None else config.state_mib << 20
    budgets = Budgets(Need(kv, state), config.pin_share)
    table = rows.req_to_token

    def evict(tokens: int) -> None:
        cache.evict(EvictParams(num_tokens=tokens))

    holder = Holder(
        segments, pages, carried, nodes, in_order, cost, table, allocator, evict, consensus
    )
    companies = Companies()
    assembly: Assembly = NoAssembly()
    if copies is not None and config.company != "off":
        assembly = BothOrders(
            companies, pages, carried, nodes, in_order, copies, table, allocator, evict, consensus,
        )  # fmt: skip
    conversations = Conversations(segments, pages, carried, nodes, in_order, table)
    lookups = Lookups(segments, companies, pages, carried, config.min_segment)
    asked = Asked()
    ordinary = Ordinary(
        match=cache.match_as_sglang,
        slots=lambda node, count: cache.path_device_indices(node)[:count].to(torch.int64),
        root=cache.root_node_handle,
        free=allocator.free,
        grid=(
            mamba_checkpoint_grid(cache.page_size)
            if cache.enable_mamba_extra_buffer
            else cache.page_size
        ),
    )
    planning = Planning(ordinary, segments, companies, pages, lookups, conversations)
    links = Links(
        asked,
        ordinary,
        planning,
        segments,
        companies,
        assembly,
        pages,
        carried,
        conversations,
        holder,
        checkpoints,
        contained,
    )
    shortest, page = config.min_segment, cache.page_size
    arrivals = Arrivals(links, ordinary, planning, holder, checkpoints, shortest, page)
    forest = Forest(
        cache=cache,
        config=config,
        cost=cost,
        budgets=budgets,
        contained=contained,
        consensus=consensus,
        asked=asked,
        segments=segments,
        companies=companies,
        assembly=assembly,
        pages=pages,
        kept=kept,
        carried=carried,
        checkpoints=checkpoints,
        nodes=nodes,
        eviction=eviction,
        pins=Pins(budgets),
        lookups=lookups,
        holder=holder,
        conversations=conversations,
        links=links,
        arrivals=arrivals,
        relocation=Relocation(cache, links, contained, copies, tier),
        tier=tier,
    )
    cache.forest = forest
    return forest
