"""The shipped text hybrid as a Hugging Face directory.

    python -m eval.models.text_hybrid.weights CORPUS_DIR TRAINING_DIR OUT

writes such a directory from a training: model, configuration, tokenizer. It leaves OUT's
model card alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerFast

from sglang_pic.eval.models.text_hybrid.corpus import END, END_ID
from sglang_pic.eval.models.text_hybrid.train import load_checkpoint


def text_hybrid_path() -> Path:
    """Directory of the shipped weights."""
    return Path(__file__).parent / "weights"


def export(corpus: Path, training: Path, out: Path) -> None:
    """Write a training's last checkpoint as a Hugging Face directory."""
    out.mkdir(parents=True, exist_ok=True)
    model = load_checkpoint(training)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=END_ID, pad_token_id=END_ID, bos_token_id=END_ID
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    PreTrainedTokenizerFast(
        tokenizer_file=str(corpus / "tokenizer.json"),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(out)
    settings = out / "tokenizer_config.json"
    fields = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(fields, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("training", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    export(options.corpus, options.training, options.out)


if __name__ == "__main__":
    main()
