"""Text to train on: documentation that installed packages and the system ship.

    python -m eval.models.text_hybrid.corpus OUT [--root DIR ...]

Documents (md, rst, txt, METADATA), licences and the docstrings of Python files, one
document a file, paragraphs that stood in an earlier file left out. OUT gets
``tokenizer.json`` (byte-level BPE, ``VOCABULARY`` tokens) and ``train.npz`` and
``held.npz``: all tokens as uint16 and where each document starts. Every 40th file, by
the hash of its name, is held out; its text is nowhere in training.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import site
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
SEPARATOR, END = "<sep>", "<end>"  # in front of a passage; behind a document
END_ID, SEPARATOR_ID = 0, 1
HELD_OUT = 40
LARGEST = 300_000  # characters of a file that are read
SHORTEST = 1500  # characters of a document that is kept
OF_A_PACKAGE = 3_000_000  # characters
REPEATED = 60  # characters from which a paragraph counts as a repetition
DOCSTRING = re.compile(
    r'^[ \t]*(?:async def|def|class) (\w+)[^"\']{0,600}?[ru]?"""(.*?)"""', re.S | re.M
)
DATA = re.compile(
    r"CHANGELOG|changelog|imagenet|synset|allkeys|top_level|entry_points|RECORD|SOURCES"
)
ENDINGS = (".md", ".rst", ".txt")
LICENCES = ("LICENSE", "COPYING", "copyright", "NOTICE")


def files(roots: list[Path]) -> Iterator[tuple[Path, str]]:
    """Every file to read and the package it belongs to, in the order of names."""
    for root in roots:
        for path in sorted(root.rglob("*")):
            name = path.name
            wanted = (
                name.endswith((*ENDINGS, ".py")) or name == "METADATA" or name.startswith(LICENCES)
            )
            if wanted and not DATA.search(str(path)) and path.is_file() and not path.is_symlink():
                yield path, path.relative_to(root).parts[0]


def text_of(path: Path) -> str:
    """The prose of a file; of a Python file its docstrings, each behind its name."""
    raw = path.read_bytes()[: 4 * LARGEST].decode("utf-8", "ignore").replace("\r\n", "\n")
    if path.suffix == ".py":
        found = (f"{name}: {_dedent(doc)}" for name, doc in DOCSTRING.findall(raw) if len(doc) > 80)
        raw = "\n\n".join(found)
    return re.sub(r"[ \t]+\n", "\n", raw[:LARGEST])


def _dedent(text: str) -> str:
    lines = text.strip().split("\n")
    margin = min((len(x) - len(x.lstrip()) for x in lines[1:] if x.strip()), default=0)
    return "\n".join([lines[0], *(line[margin:] for line in lines[1:])])


def documents(roots: list[Path]) -> Iterator[tuple[str, str]]:
    """Name and text of every document, without paragraphs that were there before."""
    seen: set[bytes] = set()
    of_package: Counter[str] = Counter()
    for path, package in files(roots):
        if of_package[package] > OF_A_PACKAGE:
            continue
        kept = []
        for paragraph in text_of(path).split("\n\n"):
            key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()
            if len(paragraph) < REPEATED or key not in seen:
                kept.append(paragraph)
            seen.add(key)
        text = re.sub(r"\n{3,}", "\n\n", "\n\n".join(kept)).strip()
        letters = sum(c.isalpha() or c == " " for c in text[:4000])
        if len(text) >= SHORTEST and letters > 0.7 * min(len(text), 4000):
            of_package[package] += len(text)
            yield str(path), text


def is_held_out(name: str) -> bool:
    return (
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") % HELD_OUT
        == 0
    )


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    default = [Path(site.getsitepackages()[0]), Path("/usr/share"), Path("/usr/lib/python3")]
    parser.add_argument("--root", type=Path, nargs="+", default=default)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = list(documents([root for root in options.root if root.exists()]))
    print(f"{len(found)} documents, {sum(len(t) for _, t in found) / 1e6:.1f} MB", flush=True)
    training = [text for name, text in found if not is_held_out(name)]
    tokenizer = train_tokenizer(training[::8])
    tokenizer.save(str(options.out / "tokenizer.json"))
    for part in ("train", "held"):
        texts = [text for name, text in found if is_held_out(name) == (part == "held")]
        rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        starts = np.cumsum([0, *map(len, rows)])
        ids = np.concatenate([np.array(row, np.uint16) for row in rows])
        np.savez(options.out / f"{part}.npz", ids=ids, starts=starts)
        print(part, len(rows), "documents", len(ids), "tokens", flush=True)


if __name__ == "__main__":
    main()
