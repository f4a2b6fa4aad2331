"""Draws the text hybrid's training curve from the log beside the weights.

python -m eval.models.text_hybrid.curve [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sglang_pic.eval.command import new_figure, save
from sglang_pic.eval.models.text_hybrid.weights import text_hybrid_path

PLOT = Path("docs/figures/text_hybrid_training.png")
NAMES = {"held": "held out", "held_first": "its first eighth", "held_last": "its last eighth"}


def draw(out: Path) -> None:
    """Nats a token over millions of tokens."""
    text = (text_hybrid_path() / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    figure, (axis,) = new_figure(width=7)
    series = {"loss": "training, running mean", **NAMES}
    for name, label in series.items():
        told = [line for line in lines if name in line]
        at = [line["tokens"] / 1e6 for line in told]
        axis.plot(at, [line[name] for line in told], linewidth=1.2, label=label)
    axis.set(xlabel="tokens, millions", ylabel="nats a token")
    axis.legend(fontsize="small")
    save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, default=PLOT)
    draw(parser.parse_args().plot)


if __name__ == "__main__":
    main()
