"""The shipped weights as Hugging Face directories.

    python -m eval.models.hybrid.weights TRAINING_DIR OUT

writes such a directory from a training: model, configuration, tokenizer. It
leaves OUT's model card alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast

from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.train import HYBRID, Family, load_checkpoint

UNKNOWN = "<unk>"


def hybrid_path() -> Path:
    """Directory of the shipped weights."""
    return Path(__file__).parent / "weights"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, words parted by blanks; segments tokenise as the whole does."""
    words = {**task.IDS, UNKNOWN: task.VOCABULARY}
    backend = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def export(training: Path, out: Path, family: Family = HYBRID) -> None:
    """Write a training's last checkpoint as a Hugging Face directory."""
    out.mkdir(parents=True, exist_ok=True)
    model = load_checkpoint(training, family)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=task.END, pad_token_id=task.PAD, bos_token_id=task.BOS
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer().save_pretrained(out)
    settings = out / "tokenizer_config.json"
    fields = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(fields, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    export(options.training, options.out)


if __name__ == "__main__":
    main()
