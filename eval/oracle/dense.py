"""What a linked request must answer, computed without the code under test.

One dense float32 forward in transformers over three groups of rows

    [isolated copy of a segment behind the compile context] * reused segments
    | live tokens of the prompt
    | generated tokens

each row with an explicit position, under an explicit mask. An isolated copy
sits where its segment stands in the prompt, its context in front of it, so its
keys carry their true positions; RoPE being relative, the copy computes what it
would compute alone at positions 0, 1, ... A context that would reach below
position 0 shifts all positions up.

Nothing here imports the code under test: positions, visibility and the choice
of reused tokens follow from segments, seam width, page size and compile context
by this file's own rules, stated token by token.

A layer that sees a window of W tokens sees, of what is visible, the positions less than
W before its own: in the prompt, and so in a copy, wherever the rows lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

Segment = tuple[int, int]
LIVE = -1  # in ``Rows.copy``: the row belongs to no isolated copy


@dataclass(frozen=True)
class Layout:
    """Which tokens of a prompt are reused.

    Attributes:
        cores: per segment, in the given order, the prompt indices of its
            reused tokens; empty where nothing is reused.
    """

    cores: tuple[frozenset[int], ...]

    @property
    def reused(self) -> frozenset[int]:
        """Prompt indices of all reused tokens."""
        return frozenset().union(*self.cores)

    @property
    def n_reused(self) -> int:
        return len(self.reused)


class Rows(NamedTuple):
    """The dense forward's input: n rows.

    tokens, position: int64 [n]. copy: int64 [n], the segment whose isolated
    copy a row belongs to, or ``LIVE``. visible: bool [n, n], row i sees row j.
    """

    tokens: Tensor
    position: Tensor
    copy: Tensor
    visible: Tensor


class Inner(NamedTuple):
    """What stands at each of a prompt's n tokens, in each of l layers, float32.

    hidden [l, n, hidden size]: behind the layer. keys, values [l, n, key-value
    heads * head dim]: as projected, keys before their rotation. attention
    [l, n, n], mean over heads: row i is what token i pays to tokens 0 to i; what
    an isolated copy pays to its compile context is left out.
    """

    hidden: Tensor
    keys: Tensor
    values: Tensor
    attention: Tensor


class Generation(NamedTuple):
    """n_new continuations: the tokens, their log-probabilities, and the whole
    distributions, float32 [n_new, vocab]."""

    tokens: list[int]
    logprobs: list[float]
    full_logprobs: Tensor


def layout(
    n_tokens: int,
    segments: Sequence[Segment],
    *,
    seam: int,
    page: int,
    policy: str = "seam",
    context: Sequence[int] = (),
    min_segment: int = 1,
    whole: bool = False,
    prompt_ids: Sequence[int],
) -> Layout:
    """Decide token by token what a link reuses.

    A token is reused if its page, counted from its segment's first token, lies
    wholly behind the seam, wholly within the segment, and wholly in front of the
    prompt's last token.

    Args:
        n_tokens: tokens of the prompt.
        segments: prompt index ranges [start, end), sorted and disjoint.
        seam: seam width in tokens; 0 for policy ``none`` and for a segment
            that opens the prompt as it opened its compile.
        page: page size in tokens.
        policy: ``seam``, ``none`` or ``full``.
        context: token ids that each segment is compiled behind, a multiple of
            the page.
        min_segment: shorter segments are not reused.
        whole: of a segment that reaches to the prompt's last token nothing is reused, as
            in a hybrid, whose states cannot be cut.
        prompt_ids: the prompt, of ``n_tokens`` tokens.

    Raises:
        ValueError: segments are empty, unsorted, overlapping or outside the
            prompt, the context is not whole pages, or the policy is unknown.
    """
    bounds = [0, *(i for segment in segments for i in segment), n_tokens]
    if bounds != sorted(bounds) or any(start == end for start, end in segments):
        raise ValueError(f"segments {segments} do not divide {n_tokens} tokens")
    if policy not in ("seam", "none", "full"):
        raise ValueError(f"unknown policy {policy!r}")
    if len(context) % page or n_tokens != len(prompt_ids):
        raise ValueError("the context must be whole pages, and n_tokens the prompt's length")
    cores = []
    for start, end in segments:
        opening = list(prompt_ids[:start]) == list(context)
        seam_here = 0 if opening or policy == "none" else seam
        length = end - start
        core = set()
        if policy != "full" and length >= min_segment:
            for i in range(length):
                page_start = i // page * page
                if page_start >= seam_here and page_start + page <= length:
                    core.add(start + i)
        last = max(core, default=-1)
        if last == n_tokens - 1:
            last_page = start + (last - start) // page * page
            core = set() if whole else {i for i in core if i < last_page}
        cores.append(frozenset(core))
    return Layout(tuple(cores))


def arrange(
    prompt_ids: Sequence[int],
    segments: Sequence[Segment],
    cores: Sequence[frozenset[int]],
    *,
    context: Sequence[int] = (),
) -> Rows:
    """Lay out the dense forward of a linked prompt; its last row is its last token.

    A copy is cut behind its core, which, being causal, does not change the core.
    """
    rows: list[tuple[int, int, int, bool]] = []  # token, position, copy, seen by live rows
    for k, ((start, _), core) in enumerate(zip(segments, cores, strict=True)):
        if core:
            isolated = [*context, *prompt_ids[start : max(core) + 1]]
            first = start - len(context)
            rows += [(t, first + i, k, first + i in core) for i, t in enumerate(isolated)]
    reused = frozenset().union(*cores)
    rows += [(t, i, LIVE, True) for i, t in enumerate(prompt_ids) if i not in reused]
    tokens, position, copy, seen = (torch.tensor(column) for column in zip(*rows, strict=True))
    not_after = position[None, :] <= position[:, None]
    own_copy = copy[None, :] == copy[:, None]
    live_query = (copy == LIVE)[:, None]
    visible = not_after & torch.where(live_query, seen[None, :], own_copy)
    return Rows(tokens, position - position.min().clamp(max=0), copy, visible)


def sources(rows: Rows, cores: Sequence[frozenset[int]]) -> Tensor:
    """int64 [tokens]: the row whose computation stands at each prompt position."""
    n = int((rows.copy == LIVE).sum()) + sum(len(core) for core in cores)
    shift = int(rows.position[-1]) - (n - 1)
    source = torch.empty(n, dtype=torch.int64)
    for row in range(len(rows.tokens)):
        position, copy = int(rows.position[row]) - shift, int(rows.copy[row])
        if copy == LIVE or position in cores[copy]:
            source[position] = row
    return source


def _generation(
    steps: Iterator[Tensor], n_new: int, forced: Sequence[int] | None, chosen: list[int]
) -> Generation:
    """Run ``steps`` (float32 logits [vocab]), which read each new token from ``chosen``."""
    distributions = []
    for i in range(n_new):
        distributions.append(torch.log_softmax(next(steps), -1))
        chosen.append(int(distributions[i].argmax()) if forced is None else forced[i])
    full = torch.stack(distributions)
    return Generation(chosen, [float(full[i, t]) for i, t in enumerate(chosen)], full)


def masks(model: Any, visible: Tensor, ago: Tensor) -> Any:
    """What to add to the scores: one tensor, or one for each kind of layer.

    Args:
        visible: bool [n, m], of rows n among all rows m.
        ago: int64 [n, m], how many positions before the row's own.
    """

    def mask(seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]

    if "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
        return mask(visible)
    inside = ago < model.config.sliding_window
    return {"full_attention": mask(visible), "sliding_attention": mask(visible & inside)}


def _linked_steps(model: Any, rows: Rows, chosen: Sequence[int]) -> Iterator[Tensor]:
    """Dense forward, then one row a token: it sees what the last row saw, and itself."""
    tokens, position, visible = rows.tokens, rows.position, rows.visible
    places = position
    # Keeps every row: one made for the model drops those outside a window, by row.
    cache = DynamicCache()
    while True:
        out = model(
            input_ids=tokens[None],
            position_ids=position[None],
            attention_mask=masks(model, visible, position[:, None] - places[None, :]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        yield out.logits[0, -1].float()
        tokens, position = torch.tensor(chosen[-1:]), position[-1:] + 1
        places = torch.cat([places, position])
        visible = torch.cat([visible[-1:], torch.ones(1, 1, dtype=torch.bool)], 1)


def _plain_steps(model: Any, ids: Sequence[int], chosen: Sequence[int]) -> Iterator[Tensor]:
    """The model's own positions, causal mask and cache."""
    out = model(input_ids=torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
    while True:
        yield out.logits[0, -1].float()
        out = model(
            input_ids=torch.tensor([chosen[-1:]]),
            past_key_values=out.past_key_values,
            use_cache=True,
        )


@torch.no_grad()
def linked_logprobs(
    model: Any,
    prompt_ids: Sequence[int],
    segments: Sequence[Segment],
    *,
    seam: int,
    page: int,
    policy: str = "seam",
    context: Sequence[int] = (),
    min_segment: int = 1,
    n_new: int,
    forced: Sequence[int] | None = None,
) -> Generation:
    """Continue a linked prompt, greedily or along ``forced``.

    Args:
        model: a transformers causal LM, float32, ``attn_implementation="eager"``.
        n_new: how many tokens to continue, at least 1.
        forced: the continuation to score, at least ``n_new`` tokens; greedy
            without it.
        The others: see ``layout``.
    """
    chosen = layout(
        len(prompt_ids),
        segments,
        seam=seam,
        page=page,
        policy=policy,
        context=context,
        min_segment=min_segment,
        prompt_ids=prompt_ids,
    )
    rows = arrange(prompt_ids, segments, chosen.cores, context=context)
    tokens: list[int] = []
    return _generation(_linked_steps(model, rows, tokens), n_new, forced, tokens)


@torch.no_grad()
def full_logprobs(
    model: Any, prompt_ids: Sequence[int], n_new: int, *, forced: Sequence[int] | None = None
) -> Generation:
    """Continue a prompt by the plain model; arguments as in ``linked_logprobs``."""
    tokens: list[int] = []
    return _generation(_plain_steps(model, prompt_ids, tokens), n_new, forced, tokens)


@torch.no_grad()
def linked_inner(
    model: Any, prompt_ids: Sequence[int], segments: Sequence[Segment], **rule: Any
) -> Inner:
    """What stands at each token of a linked prompt; policy ``full`` is full recompute.

    Args:
        model: as in ``linked_logprobs``, built like Llama.
        rule: see ``layout``.
    """
    cores = layout(len(prompt_ids), segments, prompt_ids=prompt_ids, **rule).cores
    rows = arrange(prompt_ids, segments, cores, context=rule.get("context", ()))
    source = sources(rows, cores)
    place = rows.position - (rows.position[-1] - (len(prompt_ids) - 1))
    first = torch.tensor([start for start, _ in segments] + [0])[rows.copy]  # LIVE is -1
    own = place >= first  # not of a compile context

    def in_prompt(weights: Tensor) -> Tensor:
        """Attention of all rows, to all rows -> of all tokens, to all tokens."""
        n = len(prompt_ids)
        return torch.zeros(n, n).index_add(1, place[own], weights[source][:, own])

    kept: dict[str, list[Tensor]] = {name: [] for name in Inner._fields}
    hooks = []

    def keep(name: str, module: Any, pick: Callable[[Any], Tensor]) -> None:
        hooks.append(module.register_forward_hook(lambda _, __, out: kept[name].append(pick(out))))

    for layer in model.model.layers:
        keep("hidden", layer, lambda out: out[0][source])
        keep("keys", layer.self_attn.k_proj, lambda out: out[0][source])
        keep("values", layer.self_attn.v_proj, lambda out: out[0][source])
        keep("attention", layer.self_attn, lambda out: in_prompt(out[1][0].mean(0)))
    try:
        next(_linked_steps(model, rows, []))
    finally:
        for hook in hooks:
            hook.remove()
    return Inner(**{name: torch.stack(found) for name, found in kept.items()})
