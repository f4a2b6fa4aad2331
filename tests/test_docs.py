"""The site builds without a warning, its tables are the code's, its snippets run."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sybil.document import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.example import Example
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.region import Region

from sglang_pic import sglang_hooks
from sglang_pic.config import PicConfig
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.serving import Server
from sglang_pic.flags import pic_parser, read_config
from sglang_pic.forest import build
from sglang_pic.forest import state as forest_state
from sglang_pic.forest.kept import Kept
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.linear.states import PackedStates
from sglang_pic.link import report
from sglang_pic.request.fields import MAX_SEGMENTS
from sglang_pic.server import gate
from sglang_pic.server.roster import check_peers
from sglang_pic.server.routes import router
from sglang_pic.server.tenants import Tenants, check_key

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
USING = DOCS / "using"
GENERATED = DOCS / "results.md"  # by `make report`
PAGES = [ROOT / "README.md", *(page for page in sorted(DOCS.rglob("*.md")) if page != GENERATED)]
ADDRESS = "http://127.0.0.1:30000"  # what every page takes the server's to be


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# -- the site -------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; any warning, such as of a dead link or anchor, is a failure."""
    target = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    return target


def test_every_page_is_built(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        html = (site / page.relative_to(DOCS).with_suffix(".html")).read_text()
        assert "<h1" in html
        # Mathematics and diagrams were understood, not passed on as text.
        assert html.count('class="arithmatex"') == html.count(r"\(") + html.count(r"\[")
        assert html.count('class="mermaid"') == page.read_text().count("```mermaid")
        assert "$$" not in html


def test_the_readme_links_into_the_site(site: Path) -> None:
    links = re.findall(r"\]\((docs/[^)#]+)(?:#([^)]+))?\)", (ROOT / "README.md").read_text())
    assert links
    for path, anchor in links:
        assert (ROOT / path).is_file(), path
        if anchor:
            html = (site / Path(path).relative_to("docs").with_suffix(".html")).read_text()
            assert f'id="{anchor}"' in html, f"{path}#{anchor}"


def places_of(path: str) -> Iterator[Path]:
    """Where a path may lie; it may end in names within a module."""
    while path:
        for root in (ROOT, ROOT / "sglang_pic"):
            yield root / path
            yield root / f"{path}.py"
        folder, _, last = path.rpartition("/")
        last, dot, _ = last.rpartition(".")
        path = f"{folder}/{last}" if dot else ""


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent != ROOT], ids=name_of)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Files and folders of the repository, and commands that are modules."""
    text = page.read_text()
    for path in re.findall(r"`([a-z_]+/[\w./-]*|sglang_hooks\.py)`", text):
        assert any(place.exists() for place in places_of(path)), path
    for module in re.findall(r"python -m (eval\.[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


# -- tables ---------------------------------------------------------------------


def rows_of(page: Path) -> list[list[str]]:
    """Cells of every row of every table."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(cell: str) -> list[str]:
    """What stands in code font."""
    return re.findall(r"`([^`]+)`", cell)


def flags() -> dict[str, argparse.Action]:
    return {
        option: action
        for action in pic_parser()._actions
        for option in action.option_strings
        if option.startswith("--pic-")
    }


def test_the_table_of_flags_is_the_parsers() -> None:
    rows = {
        flag[0].split()[0]: (flag[0], default, meaning)
        for first, default, meaning in (
            row for row in rows_of(USING / "server.md") if len(row) == 3
        )
        if (flag := named(first))
    }
    assert set(rows) == set(flags())
    for option, action in flags().items():
        written, default, meaning = rows[option]
        assert default == ("none" if action.default is None else f"`{action.default}`"), option
        if action.choices:
            assert set(map(str, action.choices)) <= set(named(meaning)), option
        elif action.metavar:
            assert written == f"{option} {action.metavar}"


def test_no_page_names_an_unknown_flag() -> None:
    for page in PAGES:
        found = set(re.findall(r"--pic-[a-z-]*[a-z]", page.read_text()))
        assert found <= set(flags()), name_of(page)


def test_the_examples_of_several_servers_start_ours() -> None:
    """Compose and Kubernetes: flags of ours, and peers that are servers of the example."""
    services = yaml.safe_load((USING / "compose.yaml").read_text())["services"]
    lines = [shlex.split(one["command"]) for one in services.values()]
    names = {f"http://{name}:30000" for name in services}
    for one in yaml.safe_load_all((USING / "kubernetes.yaml").read_text()):
        if one["kind"] == "Service":
            continue
        spec, meta = one["spec"], one["metadata"]
        container = spec["template"]["spec"]["containers"][0]
        lines.append([*container["command"], *container["args"]])
        names |= {
            f"http://{meta['name']}-{i}.{meta['name']}:30000" for i in range(spec["replicas"])
        }
    servers = [line for line in lines if "sglang_pic.launch_server" in line]
    assert len(servers) == 4
    for line in servers:
        args, rest = pic_parser().parse_known_args(line[3:])
        assert not [word for word in rest if word.startswith("--pic")]
        check_peers(args.pic_peers)
        assert set(args.pic_peers.split(",")) <= names


def test_every_reason_is_explained() -> None:
    constants = {
        value for name, value in vars(report).items() if name.isupper() and isinstance(value, str)
    }
    whole = {
        node.value.value
        for function in (
            forest_state.unlinkable,
            forest_state.asked_for_more,
            forest_state.asked_of_prompt,
        )
        for node in ast.walk(ast.parse(inspect.getsource(function)))
        if isinstance(node, ast.Return)
        and isinstance(node.value, ast.Constant)
        and node.value.value
    }
    whole |= {name.removeprefix("return_") for name in forest_state.ordered_flags()}
    whole |= set(forest_state.PLACES)
    whole |= {gate.CANARY_FAILED, gate.AUDIT_FAILED, gate.SWITCHED_OFF}
    whole |= {
        value
        for name, value in vars(forest_state).items()
        if name.isupper() and isinstance(value, str)
    }
    assert {"require_exact", "link_off", "input_logprobs"} <= whole
    explained = {name for row in rows_of(USING / "report.md") for name in named(row[0])}
    told = {name for row in rows_of(USING / "report.md") for cell in row for name in named(cell)}
    assert constants <= told, constants - told
    assert whole <= explained, whole - explained
    segment = constants - {report.EXACT, report.COMPOSED}
    assert segment <= explained
    helped = {name for row in rows_of(DOCS / "operating.md") for name in named(row[0])}
    assert segment <= helped, segment - helped


def test_every_refusal_is_explained() -> None:
    page = (DOCS / "operating.md").read_text()
    dicts = [
        node
        for function in (build._refusal, build._encoded)
        for node in ast.walk(ast.parse(inspect.getsource(function)))
        if isinstance(node, ast.Dict)
    ]
    for node in dicts:
        for key in node.keys:
            parts = key.values if isinstance(key, ast.JoinedStr) else [key]
            for part in parts:
                if isinstance(part, ast.Constant):
                    assert part.value.strip() in page, part.value


def test_every_field_of_an_answer_is_explained() -> None:
    """The examples in JSON are held against a server's answers below."""
    for page in (USING / "report.md", USING / "compile.md", USING / "manage.md"):
        text = page.read_text()
        fields = set(re.findall(r'"(\w+)":', "".join(re.findall(r"```json.*?```", text, re.S))))
        assert fields
        explained = {name for row in rows_of(page) for name in named(row[0])}
        explained |= {field.name for field in dataclasses.fields(PicConfig)}
        prose = set(named(re.sub(r"```.*?```", "", text, flags=re.S)))
        assert fields <= explained | prose, fields - explained - prose


def test_every_hook_is_listed() -> None:
    listed = [name for row in rows_of(DOCS / "architecture.md") for name in named(row[0])]
    listed = [name for name in listed if not name.endswith("/")]
    targets = [hook.target for hook in (*sglang_hooks.ENGINE_HOOKS, *sglang_hooks.FRONT_HOOKS)]
    assert len(listed) == len(targets)
    for target in targets:
        assert any(target.endswith(f".{name}") for name in listed), target


def test_every_route_is_explained() -> None:
    pages = "".join((USING / name).read_text() for name in ("compile.md", "manage.md", "audit.md"))
    for route in router.routes:
        assert route.path in pages, route.path


# -- snippets -------------------------------------------------------------------

FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<language>\w*) ?(?P<title>[^\n]*)\n"))
PROGRAM = 'if __name__ == "__main__":'
SHOWN = {"mermaid", "text"}  # not run


def run_bash(example: Example) -> None:
    """Launch commands must parse, all others succeed."""
    source = example.parsed
    if "sglang_pic.launch_server" in source:
        words = [word for word in shlex.split(source) if word != "\n"]
        assert words[:3] == ["python", "-m", "sglang_pic.launch_server"]
        check_launch(words[3:])
        return
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", source], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{source}\n{done.stdout}{done.stderr}"


def check_launch(words: list[str]) -> None:
    from sglang.srt.server_args import ServerArgs

    ours, rest = pic_parser().parse_known_args(words)
    ours.pic_compile_context = None  # would need the model's tokenizer
    read_config(ours)
    stock = argparse.ArgumentParser()
    ServerArgs.add_cli_args(stock)
    stock.parse_args(["--model-path", ours.model_path, *rest])


def check_json(example: Example) -> None:
    """Every JSON block says in its title what it is, and has just those fields."""
    value = json.loads(example.parsed)
    title = example.region.lexemes["title"].removeprefix("title=").strip('"')
    if title == "SGLANG_PIC_CONFIG":
        PicConfig(**value)
    elif title == "tenants.json":
        for key, salt in value.items():
            check_key(key)
            found = Tenants(value, "root").of(
                {"headers": [(b"authorization", b"Bearer " + key.encode())]}
            )
            assert found is not None and found.salt == salt
    elif title == "meta_info.pic":
        prompt = {"input_ids": list(range(99)), "pic": {"segments": [{"start": 0, "end": 64}]}}
        answer = example.namespace["server"].generate(**prompt, sampling_params=ONE_TOKEN)
        assert shape(value) == shape(answer["meta_info"]["pic"])
    else:
        method, path = title.split()
        assert method == "GET"
        assert shape(value) == shape(example.namespace["server"].get(path).json())


def shape(value: Any) -> Any:
    """Keys, and those of a list's first item."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value and value[0] else None


def refuse(example: Example) -> str:
    """A block that says nothing of its language would be a block that is not tested."""
    return f"language must be one of {sorted({*EVALUATORS, *SHOWN})}"


ONE_TOKEN = {"max_new_tokens": 1}
EVALUATORS = {"bash": run_bash, "json": check_json, "python": PythonEvaluator()}


def parse(page: Path, url: str = ADDRESS) -> Document:
    """A page with its fenced blocks as examples; ``url`` stands for the address
    that the page writes."""

    def examples(document: Document) -> Iterator[Region]:
        for region in FENCES(document):
            language = region.lexemes["language"]
            if language in SHOWN or (page.parent == ROOT and language != "python"):
                continue
            region.parsed = region.lexemes["source"]
            region.evaluator = EVALUATORS.get(language, refuse)
            if not (language == "python" and PROGRAM in region.parsed):
                yield region

    document = Document(page.read_text(encoding="utf-8").replace(ADDRESS, url), str(page))
    for region in examples(document):
        document.add(region)
    return document


@pytest.mark.server
@pytest.mark.parametrize("page", [p for p in PAGES if parse(p).regions], ids=name_of)
def test_snippets(page: Path, smollm: Server) -> None:
    """All of a page's blocks in a row, in one namespace."""
    document = parse(page, smollm.url)
    document.namespace["server"] = smollm
    for example in document:
        example.evaluate()
    forest = smollm.forest()
    if page.name == "operating.md":
        check_sizes(document.namespace, forest)


def check_sizes(formulas: dict[str, Any], forest: dict[str, Any]) -> None:
    """What the page computes is what the server reports."""
    config = json.loads((ensure_model() / "config.json").read_text())
    per_token = formulas["kv_bytes_per_token"](config, bytes_a_number=4)
    assert forest["bytes_per_token"] == per_token


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("matrix", [True, False])
def test_the_size_of_linear_states(matrix: bool, dtype: str) -> None:
    (source,) = (
        region.lexemes["source"]
        for region in FENCES(Document((DOCS / "operating.md").read_text(), "operating.md"))
        if "def state_bytes" in region.lexemes["source"]
    )
    formulas: dict[str, Any] = {}
    exec(source, formulas)
    layers, heads, dk, dv, channels, width = 2, 3, 4, 8, 40, 4
    operator = (layers, heads, dk, dk) if matrix else (layers, heads)
    kept = Kept(1 << 20)
    PackedStates(PicConfig(state_dtype=dtype), kept).add(
        "a segment",
        ("tenant", ""),
        core_end=10,
        conv_tail=torch.randn(layers, channels, width - 1),
        end=torch.randn(layers, heads, dk, dv),
        pairs={4: Pair(torch.randn(operator), torch.randn(layers, heads, dk, dv))},
    )
    size = {"float32": 4, "float16": 2}[dtype]
    assert kept.nbytes == formulas["state_bytes"](
        layers, heads, dk, dv, channels, width, matrix=matrix, bytes_a_number=size
    )


@pytest.mark.server
def test_programs(tmp_path: Path) -> None:
    """Blocks that are programs, which start an engine of their own."""
    programs = [
        region.lexemes["source"]
        for page in PAGES
        for region in FENCES(Document(page.read_text(), str(page)))
        if region.lexemes["language"] == "python" and PROGRAM in region.lexemes["source"]
    ]
    assert programs
    for i, source in enumerate(programs):
        program = tmp_path / f"program{i}.py"
        program.write_text(source.replace('"MODEL"', repr(str(ensure_model()))))
        done = subprocess.run(
            [sys.executable, program], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_the_bound_on_segments_is_that_of_the_code() -> None:
    (row,) = [row for row in rows_of(USING / "generate.md") if row[0].strip() == "`segments`"]
    assert f"at most {MAX_SEGMENTS}" in row[-1]
