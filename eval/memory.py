"""Memory of running requests: bytes of KV and of linear state over concurrency.

    python -m eval.memory [--quick] [--hybrid] [--json FILE] [--plot FILE]

1 to 32 requests run at once, each over the same eight documents in an order of its
own. Read from both servers while all of them decode:

    stock             stock SGLang: what its running requests lock or own
    pic               linked: the same
    copy_per_request  arithmetic: every request with its own copy of all its tokens,
                      as caches do that move or copy a segment into place

``kv_bytes``: tokens in use, as the servers say, times bytes a token. ``state_bytes``
(hybrids) is arithmetic: the state slots that SGLang gives each running request, and,
linked, the operators and end states of the documents as our server reports them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import aiohttp
from sglang.srt.mem_cache.allocation_sizing import get_mamba_tracking_slots
from tqdm import tqdm
from transformers import AutoConfig

from sglang_pic.eval.bench import Bench, bench, linear_layers
from sglang_pic.eval.command import Outcome, add_speed_flags, deliver, new_figure, parser_of
from sglang_pic.eval.serving import Server
from sglang_pic.eval.tables import Table
from sglang_pic.eval.workloads import Prompt

METHODS = ("stock", "pic", "copy_per_request")
CONCURRENCY, QUICK_CONCURRENCY = (1, 2, 4, 8, 16, 32), (1, 8, 32)
DOCUMENTS = 8
DOCUMENT_TOKENS = 64
QUESTION_TOKENS = 16
ANSWER_TOKENS = 12
SEAM = 16
MIB = 1 << 20
# State slots of a running request under SGLang's defaults: its own, and two to keep
# states for the prefix cache.
SLOTS = 1 + get_mamba_tracking_slots(extra_buffer=True, overlap=True)


def slot_bytes(config: Any) -> int:
    """Bytes of one state slot in SGLang's pool: float32 states and the histories of
    the convolutions; 0 for a model without linear layers."""
    layers = linear_layers(config)
    if not layers:
        return 0
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    history = (2 * keys + values) * (config.linear_conv_kernel_dim - 1)
    return 4 * layers * (values * config.linear_key_head_dim + history)


async def _while_running(server: Server, bodies: Sequence[dict[str, Any]]) -> int:
    """Most tokens in use while all requests run.

    Raises:
        RuntimeError: a request failed, or they never all ran at once.
    """
    timeout = aiohttp.ClientTimeout(total=900)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def ask(body: dict[str, Any]) -> None:
            async with session.post(f"{server.url}/generate", json=body) as response:
                text = await response.text()
                if response.status != 200:
                    raise RuntimeError(f"{server.url}: {response.status} {text[:500]}")

        asks = asyncio.gather(*(ask(body) for body in bodies))
        most, seen = 0, 0
        while not asks.done():
            async with session.get(f"{server.url}/v1/loads?include=core") as response:
                (load,) = (await response.json())["loads"]
            seen = max(seen, load["num_running_reqs"])
            if load["num_running_reqs"] == len(bodies):
                most = max(most, load["num_used_tokens"])
            await asyncio.sleep(0.02)
        await asks
    if not most:
        raise RuntimeError(f"at most {seen} of {len(bodies)} requests were seen to run at once")
    return most


def run(pair: Bench, *, quick: bool, seam: int = SEAM, seed: int = 0) -> Outcome:
    """All levels of concurrency; one row a level and method."""
    rng = random.Random(seed)
    documents = [pair.tokens(rng, DOCUMENT_TOKENS) for _ in range(DOCUMENTS)]
    slot = SLOTS * slot_bytes(AutoConfig.from_pretrained(pair.model))
    pair.flush()
    per_token = pair.ours.forest()["bytes_per_token"]
    rows = []
    for count in tqdm(QUICK_CONCURRENCY if quick else CONCURRENCY, desc="memory", unit="level"):
        prompts = [
            Prompt(rng.sample(documents, DOCUMENTS), pair.tokens(rng, QUESTION_TOKENS))
            for _ in range(count)
        ]
        tokens = {"copy_per_request": sum(len(prompt.ids) + ANSWER_TOKENS for prompt in prompts)}
        for method, server in (("stock", pair.stock), ("pic", pair.ours)):
            tokens[method] = asyncio.run(_while_running(server, _bodies(prompts, method, seam)))
        held = pair.ours.forest()
        segments = len(held["segments"])
        for method in METHODS:
            state = count * slot + (held.get("state_bytes", 0) if method == "pic" else 0)
            rows.append(
                {
                    "concurrency": count,
                    "method": method,
                    "tokens": tokens[method],
                    "kv_bytes": tokens[method] * per_token,
                    "state_bytes": state,
                    "bytes_per_request": (tokens[method] * per_token + state) / count,
                    "kv_bytes_per_segment": DOCUMENT_TOKENS * per_token,
                    "state_bytes_per_segment": (
                        held.get("state_bytes", 0) / segments if method == "pic" else 0
                    ),
                }
            )
    config = {
        **pair.config,
        "documents": DOCUMENTS,
        "document_tokens": DOCUMENT_TOKENS,
        "question_tokens": QUESTION_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "bytes_per_token": per_token,
        "state_bytes_per_request": slot,
        "seam": seam,
        "seed": seed,
    }
    return Outcome(config, rows, [table_of(rows, config)], plot(rows))


def _bodies(prompts: Sequence[Prompt], method: str, seam: int) -> list[dict[str, Any]]:
    sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    bodies: list[dict[str, Any]] = [
        {"input_ids": prompt.ids, "sampling_params": sampling, "cache_salt": method}
        for prompt in prompts
    ]
    if method == "pic":
        for body, prompt in zip(bodies, prompts, strict=True):
            body["pic"] = {"segments": prompt.ranges, "seam": seam}
    return bodies


def table_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Table:
    """One line a level: KV by method, state, and what linking saves."""
    lines = []
    for count in dict.fromkeys(row["concurrency"] for row in rows):
        found = {row["method"]: row for row in rows if row["concurrency"] == count}
        kv = {method: found[method]["kv_bytes"] / MIB for method in METHODS}
        state = {method: found[method]["state_bytes"] / MIB for method in METHODS}
        whole = {method: kv[method] + state[method] for method in METHODS}
        lines.append(
            (
                str(count),
                *(f"{kv[method]:.1f}" for method in METHODS),
                f"{state['stock']:.1f}",
                f"{state['pic']:.1f}",
                f"{whole['stock'] / whole['pic']:.1f}x",
                f"{whole['copy_per_request'] / whole['pic']:.1f}x",
            )
        )
    one = next(row for row in rows if row["method"] == "pic")
    return Table(
        f"{DOCUMENTS} documents of {DOCUMENT_TOKENS} tokens in orders of their own "
        f"({config['model']}), MiB in use",
        (
            "requests at once",
            "KV, stock",
            "KV, linked",
            "KV, copies",
            "state, stock",
            "state, linked",
            "stock / linked",
            "copies / linked",
        ),
        lines,
        f"A segment: {one['kv_bytes_per_segment'] / 1024:.0f} KiB of KV, "
        f"{one['state_bytes_per_segment'] / 1024:.0f} KiB of operators and states, once for all "
        f"requests; a request: {config['state_bytes_per_request'] / 1024:.0f} KiB of state. "
        "The ratios are of KV and state together.",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """MiB over concurrency."""
    figure, (axis,) = new_figure()
    for method in METHODS:
        found = [row for row in rows if row["method"] == method]
        whole = [(row["kv_bytes"] + row["state_bytes"]) / MIB for row in found]
        axis.plot([row["concurrency"] for row in found], whole, marker="o", label=method)
    axis.set(
        xlabel="requests at once", ylabel="KV and state in use, MiB", xscale="log", yscale="log"
    )
    axis.legend()
    return figure


def main() -> None:
    parser = parser_of(__doc__, "three levels of concurrency")
    add_speed_flags(parser, SEAM)
    args = parser.parse_args()
    with bench("hybrid" if args.hybrid else "smollm2") as pair:
        outcome = run(pair, quick=args.quick, seam=args.seam, seed=args.seed)
    deliver(outcome, args)


if __name__ == "__main__":
    main()
