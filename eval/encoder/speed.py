"""Time to first token over encoded documents, beside all that ``eval.ttft`` measures.

    python -m eval.encoder.speed [--quick] [--model M] [--json FILE] [--plot FILE]

The encoder is untrained: what it says means nothing, what it takes is what a trained one of
its size takes. It has a layer for every fourth of the decoder's, as the paper's. In each
repetition, after the methods of ``eval.ttft``, on documents of the same lengths:

    encoding   documents never seen: they are encoded first
    encoded    the same documents in another order, another question

``kv_bytes``: of the documents of one prompt in float32, keys and values of the decoder or of
the encoder.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from sglang_pic.encoder.config import EncoderConfig, evenly
from sglang_pic.encoder.weights import EncoderModules, save
from sglang_pic.eval import ttft
from sglang_pic.eval.bench import Bench, bench, model_path
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.encoder import initial
from sglang_pic.eval.encoder.quality import ITEM, decoder_bytes
from sglang_pic.eval.tables import Table
from sglang_pic.eval.workloads import QUESTION_TOKENS, Prompt

LENGTH = 256
DOCUMENTS, QUICK_DOCUMENTS = (2, 4, 8, 16), (4, 8)
REPEATS, QUICK_REPEATS = 5, 3
# Decoder layers a cross block, as in the paper.
EVERY = 4
# By method what it is called.
SHOWN = {
    "unlinked": "as text",
    "unlinked_prefix": "prefix cached",
    "linked": "linked, seam 16",
    "in_company": "in company",
    "encoding": "encoded first",
    "encoded": "encoded",
}


def untrained(model: Any, directory: Path, seed: int = 0) -> EncoderConfig:
    """Write an encoder of random weights with open gates for a model of transformers."""
    layers = model.config.num_hidden_layers
    config = initial.sizes_beside(model, evenly(layers, max(1, layers // EVERY)))
    torch.manual_seed(seed)
    modules = EncoderModules(config)
    initial.fresh(modules, gate=0.1)
    save(modules, directory)
    return config


def ask(pair: Bench, rng: random.Random, documents: Sequence[list[int]], salt: str) -> float:
    """Seconds to the first token of a new question over encoded documents.

    Raises:
        RuntimeError: a document is in the row.
    """
    prompt = Prompt(list(documents), pair.tokens(rng, QUESTION_TOKENS))
    seconds, first = pair.ours.first_token(
        input_ids=prompt.ids,
        sampling_params={"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
        cache_salt=salt,
        pic={"mode": "encode", "segments": prompt.ranges},
    )
    computed = first["meta_info"]["pic"]["tokens_computed"]
    if computed > QUESTION_TOKENS:
        raise RuntimeError(f"{computed} tokens were computed of a question of {QUESTION_TOKENS}")
    return seconds


def repetition(pair: Bench, rng: random.Random, documents: int, page: int) -> dict[str, float]:
    """Seconds to the first token by method."""
    narrow = ttft.narrowest(pair)
    found = ttft.measure(pair, rng, documents, LENGTH, ttft.SEAM, narrow=narrow, page=page)
    seconds = {method: one[0] for method, one in found.items()}
    drawn = [pair.tokens(rng, LENGTH) for _ in range(documents)]
    salt = f"speed-{uuid.uuid4()}"
    seconds["encoding"] = ask(pair, rng, drawn, salt)
    seconds["encoded"] = ask(pair, rng, rng.sample(drawn, documents), salt)
    return seconds


def run(pair: Bench, token: int, encoded: int, *, quick: bool, seed: int = 0) -> Outcome:
    """Every method at every number of documents.

    Args:
        token, encoded: bytes of a document's token in the decoder, and by the encoder.
    """
    rng, page = random.Random(seed), pair.ours.get("/server_info").json()["page_size"]
    sizes = QUICK_DOCUMENTS if quick else DOCUMENTS
    repeats = QUICK_REPEATS if quick else REPEATS
    repetition(pair, rng, 2, page)  # first calls pay for lazy set-up
    rows = []
    with tqdm(total=len(sizes) * repeats, desc="speed", unit="rep") as progress:
        for documents in sizes:
            found = []
            for _ in range(repeats):
                found.append(repetition(pair, rng, documents, page))
                progress.update()
            for method in SHOWN:
                seconds = [one[method] for one in found]
                each = encoded if method in ("encoding", "encoded") else token
                rows.append(
                    {
                        "method": method,
                        "documents": documents,
                        "document_tokens": LENGTH,
                        "ttft_s": statistics.median(seconds),
                        "ttft_s_min": min(seconds),
                        "ttft_s_max": max(seconds),
                        "kv_bytes": documents * LENGTH * each,
                    }
                )
    config = {**pair.config, "question_tokens": QUESTION_TOKENS, "repeats": repeats, "seed": seed}
    return Outcome(config, rows, [table_of(rows)], plot(rows))


def _by_size(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["documents"], {})[row["method"]] = row
    return found


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    lines = []
    for documents, of in _by_size(rows).items():
        full, encoded = of["unlinked"], of["encoded"]
        lines.append(
            (
                f"{documents} x {LENGTH}",
                *(f"{of[method]['ttft_s']:.2f}" for method in SHOWN),
                f"{full['ttft_s'] / encoded['ttft_s']:.1f}x",
                f"{full['kv_bytes'] / 2**20:.0f} / {encoded['kv_bytes'] / 2**20:.0f} MiB",
            )
        )
    return Table(
        "Seconds to first token, documents read by an untrained encoder, median",
        (
            "documents x tokens",
            *SHOWN.values(),
            "as text / encoded",
            "KV as text / encoded",
        ),
        lines,
        "Random documents; linked, in company and encoded in a new order. What an untrained "
        "encoder says means nothing: this is time and memory alone.",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Seconds over the number of documents, one line a method."""
    figure, (axis,) = new_figure(width=7)
    sizes = sorted(_by_size(rows))
    for method, label in SHOWN.items():
        line = [row["ttft_s"] for row in rows if row["method"] == method]
        (drawn,) = axis.plot(sizes, line, marker="o")
        axis.annotate(
            label, (sizes[-1], line[-1]), textcoords="offset points", xytext=(8, 0), va="center",
            color=drawn.get_color(),
        )  # fmt: skip
    ttft.over_documents(axis, sizes, f"documents of {LENGTH} tokens")
    return figure


def measure(*, quick: bool, model: str = "smollm2") -> Outcome:
    """Make an encoder, start both servers and run."""
    decoder = AutoModelForCausalLM.from_pretrained(model_path(model))
    with tempfile.TemporaryDirectory() as directory:
        config = untrained(decoder, Path(directory))
        token = decoder_bytes(decoder)
        del decoder
        pool = ttft.pool_of([(max(QUICK_DOCUMENTS if quick else DOCUMENTS), LENGTH)])
        with bench(model, ours=(f"--pic-encoder={directory}",), pool=pool) as pair:
            return run(pair, token, config.bytes_per_token(ITEM), quick=quick)


def main() -> None:
    parser = parser_of(__doc__, "4 and 8 documents, three repetitions")
    parser.add_argument("--model", default="smollm2", help="model directory (SmolLM2-135M)")
    args = parser.parse_args()
    deliver(measure(quick=args.quick, model=args.model), args)


if __name__ == "__main__":
    main()
