"""Every place where the plug-in reaches into SGLang, and why.

SGLang offers registries for the tree cache and for attention backends; the
rest are entries of its ``HookRegistry``. Each names the parameters it expects
to find, checked at start-up, as what is called without a hook is
(``sglang_contract``): another release of SGLang is refused rather than patched
blindly. SGLang only logs a plug-in that fails to load, so a tree cache that finds
a hook missing plans no link.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import multiprocessing
import pkgutil
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_pic.errors import PicConfigError, PicIntegrityError
from sglang_pic.request.seal import ensure_secret
from sglang_pic.sglang_contract import SGLANG_VERSION, check_contract, check_shape

CACHE_BACKEND = "pic"
_SRT = "sglang.srt."
_CHAT = _SRT + "entrypoints.openai.serving_chat.OpenAIServingChat."

# -- what the hooks do ------------------------------------------------------------


def set_positions(batch: Any, cls: Any, schedule_batch: Any, model_runner: Any, **_: Any) -> None:
    """After ``ForwardBatch.init_new``: true positions for permuted rows, the batch's plans
    for the attention backend, and which of its rows see documents."""
    from sglang_pic.forest.adapter import PicCache

    cache = schedule_batch.tree_cache
    # A cache that has never linked makes no plans, and its backend may take none.
    if not isinstance(cache, PicCache) or not cache.forest.may_link:
        return
    with cache.forest.contained("store"):
        cache.forest.store.step()
    try:
        write_positions(cache.forest.links, batch, schedule_batch, model_runner)
    except Exception:
        _end_linked(cache.forest.links, batch, schedule_batch.reqs, model_runner)
    documents = cache.forest.encoded
    try:
        documents.hand_over(batch, schedule_batch.reqs)
    except Exception:
        _end(documents.give_up(schedule_batch.reqs), "the server failed to show it its documents")


def write_positions(links: Any, batch: Any, schedule_batch: Any, model_runner: Any) -> None:
    """Ours of ``set_positions``, by itself so that the timer can find it."""
    from sglang_pic.attention.rows import by_row, can_tell
    from sglang_pic.attention.ship import to_device

    plans = links.plans_of(schedule_batch.reqs)
    # Drafts to verify are positioned by their tree, behind the row.
    extends = batch.forward_mode.is_extend_without_speculative()
    links.hand_over(model_runner.attn_backend, batch.rids, schedule_batch.reqs, extends=extends)
    if links.by_row(schedule_batch.reqs) and not can_tell(batch):
        raise PicIntegrityError("which rows of the batch are linked cannot be told")
    if not extends:
        return
    at = 0
    prefixes, extends = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
    plans = by_row(batch.rids, plans, batch)
    for plan, prefix, extend in zip(plans, prefixes, extends, strict=True):
        if plan is not None:
            # Tokens generated since the plan was made keep position = row index.
            order = plan.order[int(prefix) : int(prefix) + int(extend)]
            order = to_device(order.to(batch.positions.dtype), batch.positions.device)
            batch.positions[at : at + len(order)] = order
            if batch.mrope_positions is not None:
                # On text all three axes of MRoPE count tokens.
                batch.mrope_positions[:, at : at + len(order)] = order
        at += int(extend)


def _end_linked(links: Any, batch: Any, reqs: Any, model_runner: Any) -> None:
    """The rows of a batch could not be told apart: it runs as if none were linked, and
    those that are, whose result is wrong so, end with an error. Nothing that they
    computed is kept."""
    from sglang_pic.faults import faults

    _end(links.give_up(reqs), "the server failed to link this request")
    try:
        links.hand_over(
            model_runner.attn_backend,
            batch.rids,
            reqs,
            extends=batch.forward_mode.is_extend_without_speculative(),
        )
    except Exception:
        # The backend takes no row for linked that was not handed over for this batch.
        faults.note("hand over", batch.rids)


def _end(reqs: Any, why: str) -> None:
    """End requests whose rows in the batch that runs now are wrong."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    from sglang_pic.faults import faults

    faults.note("positions", [req.rid for req in reqs])
    for req in reqs:
        req.to_finish = FINISH_ABORT(why, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")


def answer_at_once(
    original: Callable[..., None], scheduler: Any, req: Any, is_retracted: bool = False
) -> None:
    """Around ``Scheduler._add_request_to_queue``: commands to the cache, and strict
    links whose segments are not in the forest, go back to the front unqueued; so does
    what our front has not sent."""
    from sglang_pic.manage.arrival import answer

    found = answer(scheduler, req, is_retracted)
    if found is None:
        original(scheduler, req, is_retracted)
        return
    from sglang.srt.managers.scheduler import _make_abort_req

    scheduler.send_abort_output(_make_abort_req(req, finished_reason=found.to_json()), req)


def guard_graphs(original: Callable[..., Any], runner: Any, forward_batch: Any) -> Any:
    """Around ``can_run_graph``."""
    from sglang_pic.attention import graphs

    return graphs.can_run_graph(original, runner, forward_batch)


def graph_variants(original: Callable[..., Any], hf_config: Any) -> Any:
    """Around ``create_attention_graph_variants``: a set of graphs for linked rows."""
    found = original(hf_config)
    from sglang.srt.runtime_context import get_memory

    from sglang_pic.config import PicConfig

    if found is not None or get_memory().radix_cache_backend != CACHE_BACKEND:
        return found
    if not PicConfig.from_env().decode_graphs:
        return None
    from sglang_pic.attention.graphs import LinkedVariants

    return LinkedVariants()


def generate_request(original: Any, manager: Any, obj: Any, request: Any = None) -> Any:
    """Around ``TokenizerManager.generate_request``: the funnel."""
    from sglang_pic.server import funnel

    return funnel.generate_request(original, manager, obj, request)


def abort_waiting(result: Any, manager: Any, rid: str = "", abort_all: bool = False) -> None:
    """After ``TokenizerManager.abort_request``."""
    from sglang_pic.server import funnel

    funnel.abort_request(manager, rid, abort_all)


def check_sent(sent: Any, manager: Any, *_: Any, **__: Any) -> None:
    """After ``TokenizerManager._create_tokenized_object``: refuse what ends a scheduler."""
    from sglang_pic.server import bounds, funnel

    if funnel.is_enabled():
        bounds.check_sent(sent, manager.model_config.vocab_size)


def convert_chat(original: Any, serving: Any, request: Any, raw_request: Any = None) -> Any:
    """Around ``OpenAIServingChat._convert_to_internal_request``."""
    from sglang_pic.server import chat

    return chat.convert(original, serving, request, raw_request)


def build_chat(original: Any, serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Around what makes a prompt of chat messages."""
    from sglang_pic.server import chat

    return chat.build(original, serving, request, *args, **kwargs)


def install_http(server_args: Any, *_: Any, **__: Any) -> None:
    """Before ``_setup_and_run_http_server``: the application, here or in the processes of
    several tokenizer workers, which import it by this name."""
    install_app(server_args)
    if server_args.radix_cache_backend == CACHE_BACKEND:
        from sglang.srt.environ import envs

        if not envs.SGLANG_HTTP_SERVER_APP_PATH.is_set():
            envs.SGLANG_HTTP_SERVER_APP_PATH.set("sglang_pic.server.workers:app")


def install_app(server_args: Any) -> None:
    """Middleware, ``/pic`` routes, metrics, canary."""
    from sglang_pic.config import PicConfig

    tenants = PicConfig.from_env().tenants
    if server_args.radix_cache_backend != CACHE_BACKEND:
        if tenants is not None:
            raise PicConfigError(f"--pic-tenants needs --radix-cache-backend {CACHE_BACKEND}")
        return
    from sglang.srt.entrypoints.http_server import app
    from starlette.middleware import Middleware

    from sglang_pic.metrics import prometheus
    from sglang_pic.server.access import warn_of_unknown
    from sglang_pic.server.middleware import PicMiddleware
    from sglang_pic.server.redact import RedactMiddleware, Secrets
    from sglang_pic.server.routes import install as install_routes
    from sglang_pic.server.startup import canary_first
    from sglang_pic.server.tenants import TenantMiddleware, Tenants, read_salts

    # Innermost: keys are checked and bodies decompressed before it reads one.
    app.user_middleware.append(Middleware(PicMiddleware))
    hidden = () if tenants is None else (tenants, *read_salts(tenants))
    secrets = Secrets.of(server_args.resolved_dict(), hidden)
    app.add_middleware(RedactMiddleware, secrets=secrets)
    if tenants is not None:
        app.add_middleware(TenantMiddleware, tenants=Tenants.read(tenants, server_args))
        app.router.lifespan_context = warn_of_unknown(app.router.lifespan_context)
    install_routes(app)
    app.include_router(prometheus.router)
    app.router.lifespan_context = canary_first(app.router.lifespan_context)


def is_request_level(original: Callable[..., bool], streamer: Any, key: str) -> bool:
    """Around ``is_request_level_customized_info_key``: a report is one of the request."""
    return key == "pic" or original(streamer, key)


def hide_secrets(info: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
    """After ``build_server_info``: for gRPC, where no middleware of ours stands."""
    from sglang_pic.server.redact import Secrets

    shown: dict[str, Any] = Secrets.of(info).hide(info)
    return shown


def wrap_hybrid(original: Callable[..., Any], runner: Any, full_attn_backend: Any) -> Any:
    """Around ``attn_backend_wrapper``: a hybrid's linear layers compose."""
    backend = original(runner, full_attn_backend)
    from sglang.srt.runtime_context import get_memory

    if get_memory().radix_cache_backend != CACHE_BACKEND:
        return backend
    from sglang_pic.linear.wiring import wire

    return wire(runner, backend)


def sample(original: Callable[..., Any], probs: Any, *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's torch samplers."""
    from sglang_pic import sampling

    return sampling.sample(original, probs, *args, **kwargs)


# -- the list ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hook:
    """One hook: where, how, the parameters the target must have, and why."""

    target: str
    type: HookType
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    reason: str


ENGINE_HOOKS = (
    Hook(
        _SRT + "model_executor.forward_batch_info.ForwardBatch.init_new",
        HookType.AFTER,
        set_positions,
        ("cls", "batch", "model_runner"),
        "positions are derived from lengths here, far from the scheduler's plan; and a layer "
        "is given this batch, by which its cross block knows whose documents to read",
    ),
    Hook(
        _SRT + "managers.scheduler.Scheduler._add_request_to_queue",
        HookType.AROUND,
        answer_at_once,
        ("self", "req", "is_retracted"),
        "only the scheduler knows what the forest holds, only the front can compile; and "
        "SGLang's own channel to a running scheduler carries numbers only",
    ),
    Hook(
        _SRT + "layers.attention.attention_registry.attn_backend_wrapper",
        HookType.AROUND,
        wrap_hybrid,
        ("runner", "full_attn_backend"),
        "SGLang picks a hybrid's linear backend here by model, without a registry",
    ),
    Hook(
        _SRT + "managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
        ".is_request_level_customized_info_key",
        HookType.AROUND,
        is_request_level,
        ("self", "key"),
        "what comes with an output's tokens never comes where there are none; SGLang asks "
        "here, of a subclass that only a subclass of the scheduler could name",
    ),
    *(
        Hook(
            _SRT + f"model_executor.runner.{module}.can_run_graph",
            HookType.AROUND,
            guard_graphs,
            ("self", "forward_batch"),
            "a captured graph replays stock attention, in which a linked row sees the future",
        )
        for module in (
            "decode_cuda_graph_runner.DecodeCudaGraphRunner",
            "prefill_cuda_graph_runner.PrefillCudaGraphRunner",
        )
    ),
    *(
        Hook(
            _SRT + f"layers.sampler.{name}",
            HookType.AROUND,
            sample,
            ("probs", *parameters),
            "a row that its grammar leaves no token ends the scheduler here",
        )
        for name, parameters in (
            ("sampling_from_probs_torch", ("sampling_seed", "positions")),
            ("top_k_top_p_min_p_sampling_from_probs_torch", ("top_ks", "top_ps", "min_ps")),
        )
    ),
    Hook(
        _SRT + "layers.attention.graph_variants.create_attention_graph_variants",
        HookType.AROUND,
        graph_variants,
        ("hf_config",),
        "which sets of graphs are captured is decided here by model, without a registry",
    ),
)

FRONT_HOOKS = (
    Hook(
        _SRT + "managers.tokenizer_manager.TokenizerManager.generate_request",
        HookType.AROUND,
        generate_request,
        ("self", "obj", "request"),
        "the one place that every endpoint and Engine call passes",
    ),
    Hook(
        _SRT + "managers.tokenizer_manager.TokenizerManager.abort_request",
        HookType.AFTER,
        abort_waiting,
        ("self", "rid", "abort_all"),
        "while its segments compile a request is not with the scheduler, which would end it",
    ),
    Hook(
        _SRT + "managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        HookType.AFTER,
        check_sent,
        ("self", "obj", "input_text", "input_ids"),
        "every prompt of every endpoint passes here, complete as the scheduler will get it",
    ),
    Hook(
        _CHAT + "_convert_to_internal_request",
        HookType.AROUND,
        convert_chat,
        ("self", "request", "raw_request"),
        "SGLang makes chat prompts in a worker thread, without the request's context",
    ),
    *(
        Hook(
            _CHAT + name,
            HookType.AROUND,
            build_chat,
            ("self", "request", *parameters, "is_multimodal"),
            "the text of a chat prompt exists only here, between messages and tokenizer",
        )
        for name, parameters in (
            ("_apply_jinja_template", ("tools",)),
            ("_apply_conversation_template", ()),
        )
    ),
    Hook(
        _SRT + "entrypoints.http_server._setup_and_run_http_server",
        HookType.BEFORE,
        install_http,
        ("server_args", "tokenizer_manager"),
        "routes and middleware must be added before the application starts",
    ),
    Hook(
        _SRT + "utils.common.build_server_info",
        HookType.AFTER,
        hide_secrets,
        ("server_args", "scheduler_info"),
        "SGLang shows its flags, keys among them, in answers over HTTP and gRPC",
    ),
)


def roles() -> tuple[bool, bool]:
    """Whether this process serves requests (front), and whether it runs the engine.

    Hooked modules are imported by the process that hooks them, so each process
    hooks only what it runs.
    """
    main = multiprocessing.parent_process() is None
    front = main or "sglang.srt.entrypoints.engine" in sys.modules
    return front, "sglang.srt.managers.scheduler" in sys.modules


def install() -> None:
    """Register cache, backends and hooks for this process.

    Raises:
        PicConfigError: this is not the SGLang release the plug-in was made for.
    """
    import sglang

    if sglang.__version__ != SGLANG_VERSION:
        raise PicConfigError(f"needs SGLang {SGLANG_VERSION}, found {sglang.__version__}")
    front, engine = roles()
    hooks = (FRONT_HOOKS if front else ()) + (ENGINE_HOOKS if engine else ())
    for hook in hooks:
        check_shape(hook.target, hook.parameters)
    ensure_secret()
    if engine:
        check_contract()
        _register_backends()
        _install_cpu_kernels()
        _register_models()
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, hook.type)


def _install_cpu_kernels() -> None:
    """Torch forms of kernels that linear layers and seeds need, on the plain CPU only."""
    from sglang.srt.platforms import current_platform

    from sglang_pic.platforms.cpu import PlainCpuPlatform

    if not isinstance(current_platform, PlainCpuPlatform):
        return
    from sglang_pic.platforms import (
        drafts,
        host_tier,
        latent_attention,
        lightning_kernels,
        linear_kernels,
        mamba2_kernels,
        sampling_kernels,
    )

    mamba2_kernels.bind()
    host_tier.bind()
    drafts.bind()
    latent_attention.register()
    kernels = (
        linear_kernels.KERNELS
        | lightning_kernels.KERNELS
        | mamba2_kernels.KERNELS
        | sampling_kernels.KERNELS
        | latent_attention.KERNELS
        | drafts.KERNELS
    )
    for target, function in kernels.items():
        names = list(inspect.signature(function).parameters.values())
        named = tuple(p.name for p in names if p.kind is not inspect.Parameter.VAR_KEYWORD)
        check_shape(target, named)
        HookRegistry.register(target, function, HookType.REPLACE)
    target = _SRT + "layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend"
    check_shape(target, ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"))
    HookRegistry.register(target, drafts.forward_extend, HookType.AROUND)


# By the name of what each stands in front of; those of them that link latent attention.
_BACKENDS = {
    "torch_native": "sglang_pic.attention.torch_native:PicTorchNativeBackend",
    "triton": "sglang_pic.attention.triton:PicTritonBackend",
    "flashinfer": "sglang_pic.attention.flashinfer:PicFlashInferBackend",
}
_LATENT = {"torch_native", "triton"}
# Those that verify drafts, and whose drafts they are.
_VERIFIES = {"torch_native"}


def _verifies(name: str, algorithm: Any) -> bool:
    """Whether the drafts of this algorithm, if it is one, can be verified."""
    return bool(algorithm.is_none() or (algorithm.is_ngram() and name in _VERIFIES))


def _in_front(name: str, stock: Callable[[Any], Any], ours: str) -> Callable[[Any], Any]:
    """SGLang's attention backend, or ours where the cache is ours and may link."""

    @functools.wraps(stock)
    def create(runner: Any) -> Any:
        from sglang.srt.runtime_context import get_memory

        if (
            get_memory().radix_cache_backend != CACHE_BACKEND
            or (runner.use_mla_backend and name not in _LATENT)
            or runner.model_config.is_encoder_decoder
            or not _verifies(name, runner.spec_algorithm)
        ):
            return stock(runner)
        if runner.use_mla_backend:
            _absorb_linked(name)
        return pkgutil.resolve_name(ours)(runner)

    return create


def _absorb_linked(name: str) -> None:
    """The form of latent attention is chosen by the backend's name, model by model and batch
    by batch."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
    )

    from sglang_pic.attention.latent import absorbed_where_linked

    choose = AttentionBackendRegistry.get_handler(name)
    AttentionBackendRegistry.register(name, absorbed_where_linked(choose))


def _register_backends() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.mem_cache.registry import (
        get_radix_cache_factory,
        register_radix_cache_backend,
    )

    from sglang_pic.forest.build import build_cache

    if get_radix_cache_factory(CACHE_BACKEND) is None:
        register_radix_cache_backend(
            CACHE_BACKEND, lambda ctx: build_cache(ctx, unhooked=engine_refusal())
        )
        for name, ours in _BACKENDS.items():
            ATTENTION_BACKENDS[name] = _in_front(name, ATTENTION_BACKENDS[name], ours)


def _register_models() -> None:
    """Models with cross blocks, where the server has an encoder."""
    from sglang_pic.config import PicConfig

    if PicConfig.from_env().encoder is None:
        return
    # Not with the contract: the registry imports every model, and some need the CPU's kernels.
    check_shape(
        _SRT + "models.registry._ModelRegistry.register",
        ("self", "package_name", "overwrite", "strict"),
    )
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.register("sglang_pic.encoder.models", overwrite=True, strict=True)


def engine_refusal() -> str | None:
    """Name a hook that is not in place in this process, or ``None``."""
    for hook in ENGINE_HOOKS:
        found = pkgutil.resolve_name(hook.target)
        if not hasattr(found, "__wrapped__"):
            return f"the hook on {hook.target} is not in place"
    return None
