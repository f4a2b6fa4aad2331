"""What a prompt must answer whose segments were computed in company.

A member's key and value at a token are the mean of two ordinary forwards of its whole
company behind the opening, in one order and in the reverse; behind guests they are those
of one forward. Each is run with positions shifted so that the member stands where it
stands in the prompt: RoPE being relative, that is what it computes at positions of its
own, turned. Computed tokens then attend to the reused ones in front of them and to each
other, token by token.

Nothing here imports the code under test.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sglang_pic.eval.oracle.dense import Generation, Segment, _generation, layout, masks

Layers = list[tuple[Tensor, Tensor]]


def first_order(members: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The order of a company's first prefill: by a hash of the tokens."""

    def key(tokens: Sequence[int]) -> bytes:
        return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=16).digest()

    return sorted(members, key=key)


def _slice(
    model: Any, opening: Sequence[int], members: Sequence[Sequence[int]], which: int, place: int
) -> Layers:
    """K and V by layer, [1, heads, n, dim], of one member that stands at ``place``."""
    ids = [*opening, *(token for member in members for token in member)]
    start = len(opening) + sum(map(len, members[:which]))
    position = torch.arange(len(ids)) - start + place
    out = model(
        input_ids=torch.tensor([ids]),
        position_ids=position[None],
        # One made for the model drops what is outside a window.
        past_key_values=DynamicCache(),
        use_cache=True,
    )
    until = start + len(members[which])
    layers = out.past_key_values.layers
    return [(one.keys[:, :, start:until], one.values[:, :, start:until]) for one in layers]


def in_company(
    model: Any,
    opening: Sequence[int],
    members: Sequence[Sequence[int]],
    member: Sequence[int],
    place: int,
    guests: Sequence[Sequence[int]] = (),
) -> Layers:
    """The mean of both orders, of a member that stands at ``place`` in its prompt."""
    order = [*first_order(guests), *first_order(members)]
    which = order.index(member)
    forth = _slice(model, opening, order, which, place)
    if guests:
        return forth
    back = _slice(model, opening, order[::-1], len(order) - 1 - which, place)
    return [
        ((k + other_k) / 2, (v + other_v) / 2)
        for (k, v), (other_k, other_v) in zip(forth, back, strict=True)
    ]


def steps(
    model: Any,
    ids: Sequence[int],
    reused: Tensor,
    held: Layers,
    chosen: Sequence[int],
    cache: DynamicCache | None = None,
) -> Iterator[Tensor]:
    """The computed tokens over the reused ones' K and V; then one token at a time.

    Args:
        cache: what keeps those of computed tokens, empty; a ``DynamicCache`` by default.
    """
    cache = DynamicCache() if cache is None else cache
    for layer, (keys, values) in enumerate(held):
        DynamicCache.update(cache, keys, values, layer)
    live = torch.tensor(sorted(set(range(len(ids))) - set(reused.tolist())))
    tokens, position = torch.tensor(ids)[live], live
    seen = reused
    while True:
        seen = torch.cat([seen, position])
        ago = position[:, None] - seen[None, :]
        out = model(
            input_ids=tokens[None],
            position_ids=position[None],
            attention_mask=masks(model, ago >= 0, ago),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        yield out.logits[0, -1].float()
        tokens, position, cache = torch.tensor(chosen[-1:]), position[-1:] + 1, out.past_key_values


@torch.no_grad()
def company_logprobs(
    model: Any,
    prompt_ids: Sequence[int],
    segments: Sequence[Segment],
    companies: Sequence[Sequence[int]],
    *,
    seam: int,
    page: int,
    n_new: int,
    forced: Sequence[int] | None = None,
    guests: Sequence[Sequence[int]] = (),
) -> Generation:
    """Continue a prompt all of whose segments were computed in company.

    Args:
        model: a transformers causal LM, float32, ``attn_implementation="eager"``.
        companies: indices of the segments of each company; one in several is taken from
            the first.
        guests: token ids of those of all companies.
        The others: see ``dense.layout`` and ``dense.linked_logprobs``.
    """
    cores = layout(len(prompt_ids), segments, seam=seam, page=page, prompt_ids=prompt_ids).cores
    opening = list(prompt_ids[: segments[0][0]])
    texts = [list(prompt_ids[start:end]) for start, end in segments]
    positions: list[int] = []
    held: Layers = []
    for i, ((start, _), core) in enumerate(zip(segments, cores, strict=True)):
        company = next(one for one in companies if i in one)
        members = [texts[j] for j in company]
        made = in_company(model, opening, members, texts[i], start, guests)
        at = torch.tensor(sorted(core), dtype=torch.int64) - start
        part = [(k[:, :, at], v[:, :, at]) for k, v in made]
        held = (
            [
                (torch.cat([k, more_k], 2), torch.cat([v, more_v], 2))
                for (k, v), (more_k, more_v) in zip(held, part, strict=True)
            ]
            if held
            else part
        )
        positions += sorted(core)
    tokens: list[int] = []
    walked = steps(model, prompt_ids, torch.tensor(positions), held, tokens)
    return _generation(walked, n_new, forced, tokens)
