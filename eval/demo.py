"""The same questions over the same documents, linked and on plain SGLang.

    python -m eval.demo [--json FILE]

Starts our server and stock SGLang and asks both through the OpenAI client:
once with the documents in one order, nothing cached, then twice with the
documents in another order and another question. A prefix cache finds nothing
but the opening again; linking finds every document. By the third request they
have come together twice and are linked as computed in each other's company.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import random
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import openai
from rich.console import Console
from rich.table import Table

from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.passages import OPENING, Passage, chat_messages, find, load_passages
from sglang_pic.eval.results import write_json
from sglang_pic.eval.serving import Server, serve

DOCUMENTS = 8
ANSWER_TOKENS = 24
SEAM = 16
POOL_TOKENS = 12000
WARM_UP, WARM_UP_WORDS = 2, 400
# The title of the passage that is asked about, and which of its questions. The
# first is asked with the documents in the order of the file.
ASKED = (("Venice", 1), ("Penicillin", 0), ("Kilimanjaro", 1))


@dataclasses.dataclass(frozen=True)
class Answer:
    """One streamed answer: seconds to its first token, and the prompt's tokens."""

    text: str
    ttft_s: float
    tokens_reused: int
    tokens_computed: int
    in_company: bool


def say(line: str) -> None:
    print(f"demo: {line}", flush=True)


def ask(server: Server, messages: Any) -> Answer:
    """Stream one answer from the chat endpoint.

    Raises:
        RuntimeError: the stream ended without a token or without its usage.
    """
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, ttft, usage = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        delta = chunk.choices[0].delta.content if chunk.choices else None
        if delta:
            if ttft is None:
                ttft = time.perf_counter() - start
            text += delta
    if ttft is None or usage is None:
        raise RuntimeError(f"{server.url}: the stream ended early")
    report = (usage.model_extra or {}).get("pic")
    if report is not None:  # ours
        reused, computed = report["tokens_reused"], report["tokens_computed"]
        in_company = any(one["company"] > 1 for one in report["segments"])
    else:
        details = usage.prompt_tokens_details
        reused = (details.cached_tokens if details else None) or 0
        computed, in_company = usage.prompt_tokens - reused, False
    return Answer(text.strip(), ttft, reused, computed, in_company)


def make_tasks(passages: Sequence[Passage]) -> list[tuple[list[Passage], str]]:
    """Documents and question of each request; only the order of documents differs."""
    asked = [find(passages, title) for title, _ in ASKED]
    others = [passage for passage in passages if passage not in asked]
    first = [*asked, *others][:DOCUMENTS]
    first.sort(key=passages.index)
    rng = random.Random(1)
    orders = [first, *(rng.sample(first, DOCUMENTS) for _ in ASKED[1:])]
    return [
        (order, passage.questions[i].text)
        for order, passage, (_, i) in zip(orders, asked, ASKED, strict=True)
    ]


def run(ours: Server, stock: Server) -> list[dict[str, Any]]:
    """Ask everything on both servers; returns flat rows, one a request and server."""
    # A server's first prompts take up to twice the time of later ones.
    for server in (ours, stock):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
        for number in range(WARM_UP):
            client.chat.completions.create(
                model="default",
                messages=[{"role": "user", "content": f"{number} " * WARM_UP_WORDS}],
                max_tokens=2,
            )
    rows = []
    for number, (documents, question) in enumerate(make_tasks(load_passages())):
        _wait_for_idle_work(ours)
        for method, server in (("linked", ours), ("stock", stock)):
            answer = ask(server, chat_messages(documents, question, mark=server is ours))
            rows.append(
                {
                    "request": number,
                    "method": "cold" if number == 0 and server is ours else method,
                    "question": question,
                    "answer": answer.text,
                    "seam": SEAM,
                    "ttft_s": answer.ttft_s,
                    "tokens_reused": answer.tokens_reused,
                    "tokens_computed": answer.tokens_computed,
                    "in_company": answer.in_company,
                }
            )
    return rows


def _wait_for_idle_work(ours: Server) -> None:
    """A reader takes longer over an answer than the server over the documents behind it."""
    while True:
        front = ours.get("/pic/stats").json()["front"]
        if not front["compiling"] and not front["companies_waiting"]:
            return
        time.sleep(0.1)


def _how(ours: dict[str, Any]) -> str:
    if ours["method"] == "cold":
        return "in order"
    return "shuffled, in company" if ours["in_company"] else "shuffled"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print one line a request, then the answers side by side."""
    times = Table(
        title=f"{DOCUMENTS} documents: tokens of the prompt, seconds to the first token",
        caption="cold: answered in full, and every document compiled behind it; then reused, "
        "and once they have come together twice, as computed together",
    )
    times.add_column("request")
    for name in ("reused", "computed", "cold", "linked", "plain SGLang", "ratio"):
        times.add_column(name, justify="right")
    answers = Table(title="answers")
    for name in ("question", "ours", "plain SGLang"):
        answers.add_column(name)
    for ours, stock in zip(rows[::2], rows[1::2], strict=True):
        cold = ours["method"] == "cold"
        seconds = f"{ours['ttft_s']:.2f}"
        times.add_row(
            f"{ours['request'] + 1} {_how(ours)}",
            str(ours["tokens_reused"]),
            str(ours["tokens_computed"]),
            seconds if cold else "",
            "" if cold else seconds,
            f"{stock['ttft_s']:.2f}",
            f"{stock['ttft_s'] / ours['ttft_s']:.1f}x",
        )
        answers.add_row(ours["question"], ours["answer"], stock["answer"])
    console = Console()
    console.print(times)
    console.print(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    args = parser.parse_args()
    say("making SmolLM2-135M-Instruct, unless it is in the cache")
    model = ensure_model()
    # Overlap scheduling hides a GPU's launches; on a CPU it holds each token
    # back until the next step has run. Off on both sides.
    common = (f"--max-total-tokens={POOL_TOKENS}", "--disable-overlap-schedule")
    with contextlib.ExitStack() as stack:
        logs = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("starting our server; it compiles documents behind the prompts' fixed opening")
        flags = (*common, f"--pic-seam={SEAM}", "--pic-compile-context", OPENING)
        ours = stack.enter_context(serve(model, logs / "ours.log", *flags))
        say(f"up after {ours.start_s:.0f} s; starting stock SGLang beside it")
        module = "sglang.launch_server"
        stock = stack.enter_context(
            serve(model, logs / "stock.log", *common, "--enable-cache-report", module=module)
        )
        say(f"up after {stock.start_s:.0f} s, with our {', '.join(stock.parts)}")
        say(f"asking {len(ASKED)} questions on both; ours has {', '.join(ours.parts)}")
        rows = run(ours, stock)
    show(rows)
    if args.json:
        config = {
            "model": str(model),
            "dtype": "float32",
            "documents": DOCUMENTS,
            "compile_context": OPENING,
            "start_s": {"ours": ours.start_s, "stock": stock.start_s},
            "parts_of_ours": {"ours": ours.parts, "stock": stock.parts},
        }
        write_json(args.json, config, rows)


if __name__ == "__main__":
    main()
