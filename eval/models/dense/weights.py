"""The shipped weights of the dense decoder as a Hugging Face directory.

    python -m eval.models.dense.weights TRAINING_DIR OUT

writes such a directory from a training, as ``eval.models.hybrid.weights`` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sglang_pic.eval.models.dense.model import DENSE
from sglang_pic.eval.models.hybrid.weights import export


def dense_path() -> Path:
    """Directory of the shipped weights."""
    return Path(__file__).parent / "weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    export(options.training, options.out, DENSE)


if __name__ == "__main__":
    main()
