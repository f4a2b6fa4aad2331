"""Learn an adapter for linked requests.

    python -m sglang_pic.adapt --model-path MODEL --data FILE --out DIR

FILE holds prompts, one a line of JSON (``sglang_pic.adapt.data``):

    {"opening": "...", "segments": ["...", "..."], "gap": "...", "question": "..."}

DIR gets the adapter in PEFT's format, a checkpoint, from which the same command goes on,
and curve.jsonl, a line a step. For models built like Llama, with LoRA on all linear layers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_pic.adapt.data import AdaptError, read_prompts
from sglang_pic.adapt.learning import Learning, Settings
from sglang_pic.adapt.linked import check
from sglang_pic.adapt.lora import Adapter, Shape

GUESTS = pathlib.Path(__file__).parents[1] / "server" / "guests.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(path: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A frozen model; its logits are computed in float32, whatever it computes in.

    Raises:
        AdaptError: it can't be linked here.
        OSError, ValueError: there is none.
    """
    # On a CPU the backward pass of torch's own attention takes longer.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    model = model.to(device).eval().requires_grad_(False)
    check(model)
    head = model.lm_head
    # Logits of some twenty are off by 0.06 in bfloat16.
    model.lm_head = torch.nn.Linear(head.in_features, head.out_features, bias=False, device=device)
    model.lm_head.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    return model


def parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    settings, shape = Settings(), Shape()
    made = argparse.ArgumentParser(
        prog="python -m sglang_pic.adapt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model-path", required=True, metavar="MODEL", help="directory or name")
    made.add_argument("--data", required=True, type=pathlib.Path, metavar="FILE", help="prompts")
    made.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
    made.add_argument("--steps", type=int, default=settings.steps, help="(%(default)s)")
    made.add_argument("--minutes", type=float, default=60, help="at most (%(default)s)")
    made.add_argument("--rank", type=int, default=shape.rank, help="of the LoRA (%(default)s)")
    made.add_argument("--alpha", type=int, default=shape.alpha, help="of the LoRA (%(default)s)")
    made.add_argument("--rate", type=float, default=settings.rate, help="(%(default)s)")
    made.add_argument(
        "--answer", type=int, default=settings.answer, help="tokens of an answer (%(default)s)"
    )
    made.add_argument("--seed", type=int, default=settings.seed, help="(%(default)s)")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(%(default)s)")
    made.add_argument("--device", default="cpu", help="(%(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Learn, as far as it goes."""
    args = parser().parse_args(argv)
    try:
        for name in ("steps", "rank", "alpha", "rate", "answer"):
            if getattr(args, name) <= 0:
                raise AdaptError(f"--{name} must be above 0")
        tokenizer = AutoTokenizer.from_pretrained(args.model_path)
        model = load_model(args.model_path, DTYPES[args.dtype], args.device)
        longest = model.config.max_position_embeddings - args.answer
        prompts = read_prompts(args.data, tokenizer, longest)
        texts = json.loads(GUESTS.read_text(encoding="utf-8"))["encyclopaedia"]
        guests = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        adapter = Adapter(model, Shape(args.rank, args.alpha), args.seed)
        settings = Settings(steps=args.steps, rate=args.rate, answer=args.answer, seed=args.seed)
        learning = Learning(
            model, adapter, prompts, settings, args.out, base=args.model_path, guests=guests
        )
    except (AdaptError, OSError, ValueError) as error:
        sys.exit(f"adapt: {error}")
    learning.run(args.minutes)
    print(f"{learning.step} of {args.steps} steps: {args.out}")


if __name__ == "__main__":
    main()
