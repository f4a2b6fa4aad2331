"""The linked forward, differentiable, over a transformers model built like Llama.

A segment is computed by itself or in company, and kept with positions of its own; a
prompt's computed tokens then run over what is kept, K turned to where it stands. Pages
are of one token here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from sglang_pic.adapt.data import AdaptError, Ids, Prompt
from sglang_pic.forest.keys import order_key
from sglang_pic.link.policy import Core, Outline, RecomputePolicy

# By layer, keys and values [1, key-value heads, n, head dim].
Layers = list[tuple[Tensor, Tensor]]
TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Way:
    """How a prompt's segments are compiled.

    Attributes:
        groups: indices of those computed in each other's company; of one, by itself.
        guests: texts in front of each that is by itself.
    """

    groups: tuple[tuple[int, ...], ...]
    guests: tuple[Ids, ...] = ()

    @property
    def company(self) -> bool:
        return any(len(group) > 1 for group in self.groups)


class Rows(NamedTuple):
    """Tokens to compute, int64 [n] each.

    branch: 0 is seen by all that stands behind it, another number by that branch alone.
    """

    tokens: Tensor
    position: Tensor
    branch: Tensor


def rows_of(tokens: Sequence[int], position: Sequence[int], branch: int = 0) -> Rows:
    ids = torch.tensor(tokens, dtype=torch.int64)
    return Rows(ids, torch.tensor(position, dtype=torch.int64), torch.full_like(ids, branch))


def joined(parts: Sequence[Rows]) -> Rows:
    return Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def cores_of(prompt: Prompt, policy: RecomputePolicy, company: bool) -> list[Core]:
    """What a policy reuses of each segment, relative to it."""
    outlines = [
        Outline(len(segment), opening=start == 0, in_company=company)
        for segment, start in zip(prompt.segments, prompt.starts, strict=True)
    ]
    return [(min(a, b), b) for a, b in policy.cores(outlines, page=1)]


def turned(model: Any, keys: Tensor, by: int) -> Tensor:
    """Keys [1, heads, n, head dim] as they are ``by`` positions further on."""
    inner = model.model
    exact = keys.float()
    cos, sin = inner.rotary_emb(exact, torch.tensor([[by]], device=keys.device))
    # What scales a rotation has scaled these already.
    scaling = getattr(inner.rotary_emb, "attention_scaling", 1.0)
    rotate = sys.modules[type(model).__module__].apply_rotary_pos_emb
    return rotate(exact, exact, cos / scaling, sin / scaling)[1].to(keys.dtype)


def check(model: Any) -> None:
    """Raises:
    AdaptError: this module does not know how to link such a model.
    """
    name, ids = type(model).__name__, [1, 2, 3, 4]
    try:
        if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
            raise AdaptError(f"{name} has sliding windows")
        with torch.no_grad():
            # Of the first layer, whose inputs are the same wherever they stand.
            there = prefill(model, ids, [7, 8, 9, 10])[0][0]
            here = turned(model, prefill(model, ids, range(4))[0][0], 7)
            far = float((here - there).abs().max() / there.abs().max())
    except (AttributeError, TypeError, RuntimeError) as error:
        raise AdaptError(f"{name} is not built like Llama: {error}") from error
    if far > TOLERANCE:
        raise AdaptError(f"the keys of {name} do not turn with their position")


def prefill(
    model: Any, ids: Sequence[int], position: Sequence[int], past: Layers | None = None
) -> Layers:
    """K and V of tokens, each of which sees those before it and all of ``past``."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(past or []):
        cache.update(keys, values, layer)
    device = model.device
    model.model(
        input_ids=torch.tensor([list(ids)], device=device),
        position_ids=torch.tensor([list(position)], device=device),
        past_key_values=cache,
        use_cache=True,
    )
    n = len(ids)
    return [(one.keys[:, :, -n:], one.values[:, :, -n:]) for one in cache.layers]


def local(model: Any, layers: Layers, start: int, end: int, place: int) -> Layers:
    """Some tokens' K and V, as of a segment that starts at 0; ``place`` is where it stood."""
    return [
        (turned(model, keys[:, :, start:end], -place), values[:, :, start:end])
        for keys, values in layers
    ]


def _mean(one: Layers, other: Layers) -> Layers:
    def half(x: Tensor, y: Tensor) -> Tensor:
        return ((x.float() + y.float()) / 2).to(x.dtype)

    return [(half(*keys), half(*values)) for keys, values in map(zip, one, other)]


def _order(model: Any, opening: Ids, order: Sequence[Ids]) -> list[Layers]:
    """One prefill of opening and segments: what each segment keeps of it."""
    ids = [*opening, *(token for segment in order for token in segment)]
    layers = prefill(model, ids, range(len(ids)))
    made, at = [], len(opening)
    for segment in order:
        made.append(local(model, layers, at, at + len(segment), at))
        at += len(segment)
    return made


def compile_segments(model: Any, prompt: Prompt, way: Way) -> list[Layers]:
    """What is kept of each of a prompt's segments, positions from 0."""
    texts = prompt.segments
    made: dict[int, Layers] = {}
    front = [*prompt.opening, *(t for one in sorted(way.guests, key=order_key) for t in one)]
    past = prefill(model, front, range(len(front))) if way.guests else None
    for group in way.groups:
        if len(group) > 1:
            order = sorted(group, key=lambda i: order_key(texts[i]))
            forth = _order(model, prompt.opening, [texts[i] for i in order])
            back = _order(model, prompt.opening, [texts[i] for i in order[::-1]])
            for i, one, other in zip(order, forth, back[::-1], strict=True):
                made[i] = _mean(one, other)
        else:
            (i,) = group
            at, n = len(front) if way.guests else 0, len(texts[i])
            layers = prefill(model, texts[i], range(at, at + n), past)
            made[i] = local(model, layers, 0, n, at)
    return [made[i] for i in range(len(texts))]


class Walk:
    """A prompt under computation: what its rows may see so far."""

    def __init__(self, model: Any):
        self._model = model
        self._cache = DynamicCache()
        self._seen = rows_of([], [])

    def hold(self, layers: Layers, position: Sequence[int]) -> None:
        """Reused tokens, K as of positions in the prompt."""
        for layer, (keys, values) in enumerate(layers):
            self._cache.update(keys, values, layer)
        self._seen = joined([self._seen, rows_of([0] * len(position), position)])

    def compute(self, rows: Rows, wanted: Tensor) -> Tensor:
        """Compute rows; logits float32 [wanted, vocab] of some of them, by index."""
        model = self._model
        self._seen = seen = joined([self._seen, rows])
        visible = seen.position[None] <= rows.position[:, None]
        visible &= (seen.branch[None] == 0) | (seen.branch[None] == rows.branch[:, None])
        mask = torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, float("-inf"))
        out = model(
            input_ids=rows.tokens[None].to(model.device),
            position_ids=rows.position[None].to(model.device),
            attention_mask=mask[None, None].to(model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=wanted.to(model.device),
        )
        found: Tensor = out.logits[0].float()
        return found


def begin(model: Any, prompt: Prompt, kept: Sequence[Layers], cores: Sequence[Core]) -> Walk:
    """A prompt up to its questions: cores are held, all else is computed.

    Args:
        kept: of each segment, as ``compile_segments`` makes it; unused where a core is empty.
        cores: as of ``cores_of``.
    """
    walk = Walk(model)
    computed = [rows_of(prompt.opening, range(len(prompt.opening)))]
    held: list[Layers] = []
    places: list[int] = []
    for i, (segment, start, (a, b)) in enumerate(
        zip(prompt.segments, prompt.starts, cores, strict=True)
    ):
        if a < b:
            held.append([(turned(model, k[:, :, a:b], start), v[:, :, a:b]) for k, v in kept[i]])
            places += range(start + a, start + b)
        live = [*range(a), *range(max(a, b), len(segment))]
        computed.append(rows_of([segment[t] for t in live], [start + t for t in live]))
        end = start + len(segment)
        computed.append(rows_of(prompt.gap, range(end, end + len(prompt.gap))))
    if held:
        layers = [
            (torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2))
            for parts in zip(*held, strict=True)
        ]
        walk.hold(layers, places)
    rows = joined(computed)
    if len(rows.tokens):
        walk.compute(rows, torch.empty(0, dtype=torch.int64))
    return walk
