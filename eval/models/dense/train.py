"""Trains the dense decoder, as ``eval.models.hybrid.train`` does the hybrid.

python -m eval.models.dense.train --out DIR --minutes 30 [--highest 3]
"""

from __future__ import annotations

import torch

from sglang_pic.eval.models.dense.model import DENSE
from sglang_pic.eval.models.hybrid.train import Training, parse


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    Training(options, DENSE).run()


if __name__ == "__main__":
    main()
