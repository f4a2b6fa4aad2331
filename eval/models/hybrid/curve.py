"""Draws the training curve from the log beside the weights.

python -m eval.models.hybrid.curve [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.weights import hybrid_path

PLOT = Path("docs/figures/hybrid_training.png")


def draw(out: Path) -> None:
    """Exact match of training prompts over the minutes of base training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = (hybrid_path() / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for category in task.CATEGORIES:
        told = [line for line in lines if category in line]
        minutes = [line["minutes"] for line in told]
        axis.plot(minutes, [line[category] for line in told], linewidth=1.2, label=category)
    rung = None
    for line in lines:
        if line["rung"] != rung:
            rung = line["rung"]
            axis.axvline(line["minutes"], color="0.8", linewidth=0.8, zorder=0)
            axis.text(line["minutes"], 1.06, rung, fontsize=7, rotation=60)
    axis.set_xlabel("minutes on two shared CPU cores (lines: segments x tokens)")
    axis.set_ylabel("exact match in training")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, default=PLOT)
    draw(parser.parse_args().plot)


if __name__ == "__main__":
    main()
