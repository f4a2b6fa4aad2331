"""Who may ask which route, where API keys stand for tenants (``--pic-tenants``).

One table decides. It is looked up by the route that the application itself finds for
a request, so that no way to write a path leads around it; a route that is not in it,
SGLang's or anyone's, is refused.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from fastapi.routing import iter_route_contexts
from starlette.routing import Match, WebSocketRoute

logger = logging.getLogger(__name__)

Row = tuple[str, str]
"""A method, and a path as the application writes it."""

WEBSOCKET = "WEBSOCKET"


class Who(enum.Enum):
    """Who may ask a route; the operator may ask all of them."""

    ANYONE = "anyone"
    TENANT = "a tenant"
    OPERATOR = "the operator"


def _rows(who: Who, lines: str) -> dict[Row, Who]:
    """From lines of methods and a path."""
    pairs = (line.split() for line in lines.strip().splitlines())
    return {(method, path): who for *methods, path in pairs for method in methods}


_PROMPTS = _rows(
    Who.TENANT,
    """
    POST PUT   /generate
    POST PUT   /encode
    POST PUT   /classify
    POST       /v1/completions
    POST       /v1/chat/completions
    POST       /v1/responses
    POST       /v1/messages
    POST       /v1/messages/count_tokens
    POST       /v1/embeddings
    POST       /v1/classify
    POST       /v1/score
    POST       /v1/decisions
    POST       /v1/systemone
    POST PUT   /v1/rerank
    POST       /v1/audio/transcriptions
    WEBSOCKET  /v1/realtime
    POST       /api/chat
    POST       /api/generate
    POST       /invocations
    POST       /vertex_generate
    POST       /tokenize
    POST       /v1/tokenize
    POST       /detokenize
    POST       /v1/detokenize
    POST       /parse_function_call
    POST       /separate_reasoning
    """,
)

TABLE: dict[Row, Who] = {
    **_rows(
        Who.ANYONE,
        """
        GET  /health
        GET  /health_generate
        GET  /ready
        GET  /ping
        """,
    ),
    **_PROMPTS,
    **_rows(
        Who.TENANT,
        """
        GET HEAD  /
        GET       /v1/models
        GET       /v1/models/{model:path}
        GET       /model_info
        GET       /get_model_info
        GET       /api/tags
        POST      /api/show
        GET HEAD  /openapi.json
        GET HEAD  /docs
        GET HEAD  /docs/oauth2-redirect
        GET HEAD  /redoc
        GET       /pic/info
        GET       /pic/report/{id}
        """,
    ),
    **_rows(
        Who.OPERATOR,
        """
        GET            /server_info
        GET            /get_server_info
        GET            /v1/loads
        GET            /metrics
        POST PUT       /set_internal_state
        POST           /dumper/{method}
        GET POST       /flush_cache
        POST           /add_external_corpus
        POST           /remove_external_corpus
        GET            /list_external_corpora
        POST           /hicache/storage-backend/clear
        GET PUT DELETE /hicache/storage-backend
        GET            /get_hicache_l3_cache_layout
        GET POST       /start_profile
        GET POST       /stop_profile
        GET POST       /set_trace_level
        GET POST       /freeze_gc
        GET POST       /start_expert_distribution_record
        GET POST       /stop_expert_distribution_record
        GET POST       /dump_expert_distribution_record
        POST           /update_weights_from_disk
        POST           /init_weights_send_group_for_remote_instance
        POST           /send_weights_to_remote_instance
        GET            /get_remote_instance_transfer_engine_info
        GET            /remote_instance_transfer_engine_info
        POST           /init_weights_update_group
        POST           /destroy_weights_update_group
        POST           /update_weights_from_tensor
        POST           /begin_weight_update
        POST           /end_weight_update
        POST           /update_weights_from_distributed
        POST           /update_weights_from_ipc
        POST           /update_weight_version
        GET POST       /get_weights_by_name
        GET POST       /release_memory_occupation
        GET POST       /resume_memory_occupation
        GET POST       /weights_checker
        GET POST       /slow_down
        POST           /pd_role_switch
        POST           /scale_elastic_ep
        GET            /is_scaling_elastic_ep
        POST           /load_lora_adapter
        POST           /load_lora_adapter_from_tensors
        POST           /unload_lora_adapter
        GET POST       /open_session
        GET POST       /close_session
        GET POST       /configure_logging
        POST           /abort_request
        POST           /pause_generation
        POST           /continue_generation
        GET            /v1/responses/{response_id}
        POST           /v1/responses/{response_id}/cancel
        GET            /pic/forest
        GET            /pic/budgets
        GET            /pic/stats
        GET            /pic/load
        GET POST       /pic/timer
        POST           /pic/compile
        POST           /pic/explain
        GET            /pic/segments
        GET DELETE     /pic/segments/{id}
        POST           /pic/segments/{id}/pin
        POST           /pic/segments/{id}/unpin
        POST           /pic/flush
        POST           /pic/linking
        POST           /pic/save
        POST           /pic/restore
        """,
    ),
}

_REASONS = {
    "/open_session": "a session belongs to whoever knows its id, not to a tenant",
    "/close_session": "a session belongs to whoever knows its id, not to a tenant",
    "/abort_request": "a request is aborted by whoever knows how its id begins",
    "/v1/responses/{response_id}": "a stored response belongs to whoever knows its id",
    "/v1/responses/{response_id}/cancel": "a stored response belongs to whoever knows its id",
}


def carries_prompt(scope: Any) -> bool:
    """Whether a request asks a model, and is no question about the server."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return (scope["method"], path) in _PROMPTS


def find(routes: Sequence[Any], scope: Any) -> Row | None:
    """The row of the route that the application will take for a request, if any."""
    for route in iter_route_contexts(routes):
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return scope.get("method", WEBSOCKET), str(route.path)
    return None


def refusal(routes: Sequence[Any], scope: Any, *, known: bool, operator: bool) -> Any:
    """Status and reason, or ``None`` for what may be asked.

    Args:
        routes: the application's.
        known: whether the request has a key.
        operator: whether it is the operator's.
    """
    if _is_preflight(scope):
        return None
    row = find(routes, scope)
    who = TABLE.get(row) if row is not None else None
    if who is Who.ANYONE:
        return None
    if not known:
        return 401, "Unauthorized"
    if who is None:
        return 404, "with --pic-tenants only routes of its table are served, and this is none"
    if who is Who.OPERATOR and not operator:
        assert row is not None
        reason = _REASONS.get(row[1])
        return 403, "only with the operator's key" + (f": {reason}" if reason else "")
    return None


def _is_preflight(scope: Any) -> bool:
    """Whether a browser asks what it may ask: without a key, and answered before any route."""
    names = {name for name, _ in scope["headers"]}
    return scope.get("method") == "OPTIONS" and (
        {b"origin", b"access-control-request-method"} <= names
    )


def rows_of(routes: Sequence[Any]) -> Iterable[Row]:
    """What an application can be asked."""
    for route in iter_route_contexts(routes):
        usual = {WEBSOCKET} if isinstance(route.original_route, WebSocketRoute) else {"GET"}
        for method in sorted(route.methods or usual):
            yield method, str(route.path)


def warn_of_unknown(lifespan: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An application's lifespan that logs, once all routes are there, which are refused."""

    @contextlib.asynccontextmanager
    async def warning(app: Any) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            for method, path in rows_of(app.router.routes):
                if (method, path) not in TABLE:
                    logger.warning("sglang_pic: --pic-tenants refuses %s %s", method, path)
            yield state

    return warning
