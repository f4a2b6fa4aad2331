"""Documentation as text to ask about: what Python's standard library says of itself.

It is on every machine that runs this, of one Python version the same, and a question about
one name needs one passage.
"""

from __future__ import annotations

import ast
import pathlib
import random
import sysconfig
from collections.abc import Iterator

from sglang_pic.eval.passages import Passage

# Of Python itself, not of what it is tested or built with, nor of its consoles.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}


def _described(tree: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Dotted names with their docstrings."""
    described = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(tree, described) and (text := ast.get_docstring(tree)):
        yield name, text
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(child, f"{name}.{child.name}")


def load_docstrings(words: int) -> list[Passage]:
    """The first ``words`` words of every docstring that has as many, by name."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            name = ".".join(part for part in parts if part != "__init__")
            tree = ast.parse(path.read_bytes())
            found.update((one, text) for one, text in _described(tree, name))
    return [
        Passage(name, " ".join(text.split()[:words]), ())
        for name, text in sorted(found.items())
        if len(text.split()) >= words
    ]


def questions(words: int, documents: int) -> list[tuple[tuple[Passage, ...], str]]:
    """For every docstring a question, with ``documents`` - 1 others beside it, in one
    order that depends on nothing.

    Raises:
        ValueError: so few are that long that a question cannot have its documents.
    """
    passages = load_docstrings(words)
    if len(passages) < documents:
        raise ValueError(f"only {len(passages)} docstrings have {words} words")
    rng = random.Random(0)
    rng.shuffle(passages)
    return [
        (
            (one, *rng.sample([other for other in passages if other is not one], documents - 1)),
            f"What is {one.title} for, and how is it used?",
        )
        for one in passages
    ]
