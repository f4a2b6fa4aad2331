"""Where the time of a request goes: a timer that costs nothing when off.

Started, it puts a wrapper around each stage's function and forward hooks on the
parts of every decoder layer; stopped, it takes them off again, so that a server
whose timer is off runs the very functions it was started with. Times are *own*
times: what a stage calls that is a stage too is not counted twice. They are wall
times of this process; on a device that runs behind the host they are times of
launching.
"""

from __future__ import annotations

import dataclasses
import functools
import pkgutil
import threading
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stage:
    """A function whose time is counted under ``name``."""

    name: str
    target: str


# What this project adds to every request, linked or not, as far as it is functions of
# its own; the wrappers that SGLang puts around hooks, and the middleware's waiting for
# the body, are not in it.
HOOKS = "hooks"

FRONT_STAGES = (
    Stage(HOOKS, "sglang_pic.server.middleware.take"),
    Stage(HOOKS, "sglang_pic.server.funnel.generate_request"),
    Stage("request", "sglang_pic.server.resolve.Resolver.resolve"),
    Stage("request", "sglang_pic.server.funnel.tidy"),
    Stage("tokenise", "sglang_pic.server.resolve.encode"),
    Stage("find", "sglang_pic.server.finding.Finding.cut_chat"),
    Stage("find", "sglang_pic.server.finding.Finding.search"),
)
ENGINE_STAGES = (
    Stage(HOOKS, "sglang_pic.manage.arrival.answer"),
    Stage(HOOKS, "sglang_pic.sglang_hooks.write_positions"),
    Stage("match", "sglang_pic.forest.arrivals.Arrivals.missing"),
    Stage("match", "sglang_pic.forest.links.Links.match"),
    Stage("match", "sglang_pic.forest.lookups.Lookups.of"),
    Stage("checkpoints", "sglang_pic.linear.checkpoints.SparseCheckpoints.resume"),
    Stage("checkpoints", "sglang_pic.linear.checkpoints.SparseCheckpoints.hand_over"),
    Stage("checkpoints", "sglang_pic.linear.checkpoints.SparseCheckpoints.inserted"),
    Stage(
        "SGLang's tree", "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.match_prefix"
    ),
    Stage("plan", "sglang_pic.forest.planning.arrange"),
    Stage(
        "forward, other",
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
        ".init_forward_metadata",
    ),
    Stage(
        "arrange", "sglang_pic.attention.torch_native.PicTorchNativeBackend.init_forward_metadata"
    ),
    Stage(
        "attention over spans", "sglang_pic.attention.torch_native.PicTorchNativeBackend._forward"
    ),
    Stage("forward, other", "sglang.srt.model_executor.model_runner.ModelRunner.forward"),
    Stage("sample", "sglang.srt.model_executor.model_runner.ModelRunner.sample"),
)
# By the names that SGLang's models give the parts of a decoder layer.
LAYER_PARTS = {
    "self_attn": "attention layers",
    "linear_attn": "linear layers",
    "mamba": "linear layers",
    "mlp": "mlp",
    "feed_forward": "mlp",
    "block_sparse_moe": "mlp",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
}
LOGITS = "logits"


class Timer:
    """Counts calls and own seconds by stage, while it is on."""

    def __init__(self, stages: tuple[Stage, ...]):
        self._stages = stages
        self._undo: list[Callable[[], None]] = []
        self._running = threading.local()
        self.totals: dict[str, list[float]] = {}

    @property
    def is_on(self) -> bool:
        return bool(self._undo)

    def start(self, model: Any = None) -> None:
        """Begin from zero.

        Args:
            model: a ``torch.nn.Module`` whose decoder layers are timed part by part.
        """
        self.stop()
        self.totals = {}
        try:
            for stage in self._stages:
                self._wrap(stage)
            if model is not None:
                self._watch(model)
        except Exception:
            self.stop()
            raise

    def stop(self) -> None:
        """Put every function back; the totals stay, without what is running now."""
        while self._undo:
            self._undo.pop()()
        self._running = threading.local()

    def to_json(self) -> dict[str, Any]:
        """``{"on": bool, "stages": {name: {"calls": int, "seconds": float}}}``."""
        stages = {
            name: {"calls": int(calls), "seconds": seconds}
            for name, (calls, seconds) in self.totals.items()
        }
        return {"on": self.is_on, "stages": stages}

    # -- one stage ------------------------------------------------------------------

    def _enter(self) -> None:
        stack = self._running.__dict__.setdefault("stack", [])
        stack.append([time.perf_counter(), 0.0])

    def _leave(self, name: str) -> None:
        stack = self._running.__dict__.get("stack")
        if not stack:
            return  # began before the timer was stopped
        began, inside = stack.pop()
        spent = time.perf_counter() - began
        total = self.totals.setdefault(name, [0, 0.0])
        total[0] += 1
        total[1] += spent - inside
        if stack:
            stack[-1][1] += spent

    def _wrap(self, stage: Stage) -> None:
        holder, _, attribute = stage.target.rpartition(".")
        owner = pkgutil.resolve_name(holder)
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter()
            try:
                return function(*args, **kwargs)
            finally:
                self._leave(stage.name)

        # What a class inherits is set on it and taken off again.
        own = attribute in vars(owner)
        setattr(owner, attribute, timed)
        put_back = functools.partial(setattr, owner, attribute, function)
        self._undo.append(put_back if own else functools.partial(delattr, owner, attribute))

    def _watch(self, model: Any) -> None:
        for name, module in model.named_modules():
            *path, last = name.split(".")
            in_layer = len(path) >= 2 and path[-1].isdigit() and path[-2] == "layers"
            part = LAYER_PARTS.get(last) if in_layer else None
            if last == "logits_processor":
                part = LOGITS
            if part is None:
                continue
            before = module.register_forward_pre_hook(lambda *_: self._enter())
            after = module.register_forward_hook(
                lambda *_, part=part: self._leave(part), always_call=True
            )
            self._undo += [before.remove, after.remove]


# One a process: it wraps what the whole process runs.
front = Timer(FRONT_STAGES)
engine = Timer(ENGINE_STAGES)
