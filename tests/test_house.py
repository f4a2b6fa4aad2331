"""The shape of the house: one adapter, parts that call nobody above them, no circle."""

from __future__ import annotations

import ast
import importlib
import pathlib
import pkgutil
from collections.abc import Iterator

import pytest
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache

import sglang_pic
from sglang_pic.forest.adapter import PicCache

ROOT = pathlib.Path(sglang_pic.__file__).parent
MODULES = sorted(
    path.relative_to(ROOT.parent).with_suffix("")
    for path in ROOT.rglob("*.py")
    if not {"eval", "kernels"} & set(path.relative_to(ROOT).parts)
)
FOREST = [path for path in MODULES if path.parts[1] == "forest" and path.stem != "__init__"]
# Who puts the parts together, or is given them whole.
ABOVE = {"sglang_pic.forest.adapter", "sglang_pic.forest.build", "sglang_pic.forest.forest"}


def name_of(path: pathlib.PurePath) -> str:
    return ".".join(path.parts).removesuffix(".__init__")


def imports_of(path: pathlib.PurePath) -> Iterator[str]:
    """Modules of ours that are imported with this one; not what only types need, and
    not within functions."""
    tree = ast.parse((ROOT.parent / path).with_suffix(".py").read_text())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang_pic"):
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in NAMES else node.module


NAMES = {name_of(path) for path in MODULES}
GRAPH = {name_of(path): {one for one in imports_of(path) if one in NAMES} for path in MODULES}


def test_one_class_is_sglangs_tree_cache() -> None:
    for module in pkgutil.iter_modules(importlib.import_module("sglang_pic.forest").__path__):
        importlib.import_module(f"sglang_pic.forest.{module.name}")
    importlib.import_module("sglang_pic.linear.carried")
    found, todo = set(), [BasePrefixCache]
    while todo:
        for one in todo.pop().__subclasses__():
            todo.append(one)
            if one.__module__.startswith("sglang_pic"):
                found.add(one)
    assert found == {PicCache}


def test_nothing_imports_in_a_circle() -> None:
    left = {name: set(others) for name, others in GRAPH.items()}
    while True:
        done = {name for name, others in left.items() if not others}
        if not done:
            break
        left = {name: others - done for name, others in left.items() if name not in done}
    assert not left, f"a circle, or behind one: {sorted(left)}"


@pytest.mark.parametrize("path", FOREST, ids=lambda path: path.stem)
def test_a_part_knows_nobody_above_it(path: pathlib.PurePath) -> None:
    name = name_of(path)
    if name not in ABOVE:
        assert not GRAPH[name] & ABOVE
    assert not any(".server" in one or one.endswith("hooks") for one in GRAPH[name])


@pytest.mark.parametrize("stem", ["segments", "keys", "order", "asked"])
def test_what_knows_no_tensor_imports_none(stem: str) -> None:
    tree = ast.parse((ROOT / "forest" / f"{stem}.py").read_text())
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert "torch" not in imported
