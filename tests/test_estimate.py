"""What segments would save of recorded requests, told without a server."""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from sglang_pic import cli, estimate
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.passages import load_passages
from sglang_pic.find.base import CONTENT, Cut
from sglang_pic.find.cutting import Cutter
from sglang_pic.find.log import OfModel, Plain, bodies, flat, prompt_of
from sglang_pic.find.replay import MARKED, PREFIX, Prompt, Replay

PASSAGES = [passage.document for passage in load_passages()]
DRAW = random.Random(0)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"ask_{i}",
            "description": text,
            "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
        },
    }
    for i, text in enumerate(PASSAGES[:8])
]


def stuffed(order: list[int], marked: bool = False) -> dict[str, Any]:
    """Documents in one string, as a chain that stuffs them has it; or marked parts."""
    question = f"What of {DRAW.random()}?"
    system = {"role": "system", "content": f"It is {DRAW.random()}. Answer from the documents."}
    content: Any = "\n\n".join([*(PASSAGES[i] for i in order), question])
    if marked:
        content = [{"type": "text", "text": PASSAGES[i], "pic_segment": True} for i in order]
        content.append({"type": "text", "text": question})
    return {"model": "m", "messages": [system, {"role": "user", "content": content}]}


def asked_with_tools(order: list[int], marked: bool = False) -> dict[str, Any]:
    tools = [{**TOOLS[i], **({"pic_segment": True} if marked else {})} for i in order]
    messages = [{"role": "user", "content": f"What of {DRAW.random()}?"}]
    return {"model": "m", "messages": messages, "tools": tools}


def logged(
    path: pathlib.Path, make: Callable[..., dict[str, Any]], count: int = 12, **options: Any
) -> pathlib.Path:
    draw = random.Random(1)
    lines = (json.dumps(make(draw.sample(range(8), 5), **options)) for _ in range(count))
    path.write_text("\n".join(lines) + "\n")
    return path


def rows(path: pathlib.Path, *flags: str) -> dict[str, dict[str, Any]]:
    out = path.with_suffix(".rows")
    cli.main(["estimate", str(path), "--json", str(out), *flags])
    return {row["method"]: row for row in json.loads(out.read_text())["rows"]}


MODEL = ("--model", str(ensure_model()))


@pytest.mark.parametrize("flags", [MODEL, ()], ids=["model", "words"])
def test_structure_saves_what_marks_would(tmp_path: pathlib.Path, flags: tuple[str, ...]) -> None:
    """In one string, without a mark, within a tenth of what marked parts would save."""
    marked = rows(logged(tmp_path / "marked", stuffed, 60, marked=True), *flags)
    plain = rows(logged(tmp_path / "plain", stuffed, 60), *flags)
    assert plain["marked"]["linked"] == 0 and plain["prefix"]["saved"] < 0.1 * 60 * 5 * 100
    assert plain["structure"]["linked"] > 0.9 * marked["marked"]["linked"] > 0
    assert plain["structure"]["linked_by_rule"].keys() == {"paragraph"}


def test_tools_in_another_order(tmp_path: pathlib.Path) -> None:
    marked = rows(logged(tmp_path / "marked", asked_with_tools, 30, marked=True))
    plain = rows(logged(tmp_path / "plain", asked_with_tools, 30))
    assert plain["structure"]["linked_by_rule"].keys() == {"tool"}
    assert plain["structure"]["linked"] > 0.8 * marked["marked"]["linked"] > 0


def test_a_long_text_that_is_edited(tmp_path: pathlib.Path) -> None:
    """Without any structure content still finds what was not touched."""
    draw = random.Random(2)
    words = " ".join(PASSAGES * 2).split()
    log = tmp_path / "log.jsonl"
    with log.open("w") as file:
        for _ in range(20):
            words.insert(draw.randrange(len(words)), "edited")
            text = f"It is {draw.random()}. " + " ".join(words)
            file.write(json.dumps({"prompt": text}) + "\n")
    found = rows(log, *MODEL)
    assert found["structure"]["linked"] < 0.1 * found["content"]["linked"]
    assert found["content"]["linked"] > 0.5 * found["content"]["tokens"]
    assert found["content"]["work_of_prefix_cache"] < 0.6
    assert set(found["content"]["linked_by_rule"]) == {CONTENT}


def test_nothing_recurs_nothing_is_compiled(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log.jsonl"
    draw = random.Random(3)
    words = " ".join(PASSAGES).split()
    log.write_text(
        "".join(json.dumps({"text": " ".join(draw.choices(words, k=300))}) + "\n" for _ in range(9))
    )
    for row in rows(log).values():
        assert row["linked"] == row["compiled"] == 0 and row["work_of_prefix_cache"] == 1


def test_what_only_grows_is_left_to_the_prefix_cache(tmp_path: pathlib.Path) -> None:
    messages: list[dict[str, Any]] = []
    lines = []
    for text in PASSAGES[:8]:
        messages.append({"role": "user", "content": text})
        lines.append(json.dumps({"body": {"messages": messages}}))
        messages.append({"role": "assistant", "content": "Yes."})
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines))
    found = rows(log, *MODEL)
    assert found["prefix"]["saved"] > 0.5 * found["prefix"]["tokens"]
    assert found["content"]["linked"] == found["content"]["compiled"] == 0


def test_tenants_are_apart(tmp_path: pathlib.Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [
        {"prompt": f"{i} {PASSAGES[0]}\n\n{PASSAGES[1]}", "cache_salt": f"t{i}"} for i in range(6)
    ]
    log.write_text("\n".join(map(json.dumps, lines)))
    assert rows(log)["content"]["linked"] == 0
    log.write_text("\n".join(json.dumps({**line, "cache_salt": "t"}) for line in lines))
    assert rows(log)["content"]["linked"] > 0


def test_times_memory_rules_and_a_plot(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logged(tmp_path / "log", stuffed)
    own = tmp_path / "rules.json"
    own.write_text(json.dumps({"whole": "(?s).*"}))
    image = tmp_path / "plot.png"
    found = rows(log, *MODEL, "--speed", "1000", "--plot", str(image), "--rules", str(own))
    assert image.stat().st_size > 10_000
    prefix = found[PREFIX]
    # A model's own: 2 x 30 layers x 3 groups x 64 numbers of two bytes.
    assert prefix["held_bytes"] == 23040 * prefix["held_tokens"]
    assert prefix["seconds"] > prefix["tokens"] / 1000 * 0.9
    assert found["content"]["seconds"] < prefix["seconds"]
    out = capsys.readouterr().out
    assert "and structure" in out and "paragraph" in out and "12 requests" in out


def test_what_is_no_log_is_said(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"messages": 3}\n[1]\nnothing\n{"prompt": [1, "x"]}\n')
    rules = tmp_path / "rules.json"
    rules.write_text('{"paragraph": "x"}')
    for line, word in (
        ([str(log)], "no request with a prompt"),
        ([str(tmp_path / "gone")], "gone"),
        ([str(log), "--model", str(tmp_path)], "--model"),
        ([str(log), "--rules", str(rules)], "name of its own"),
        ([str(log), "--rules", str(log)], "log.jsonl"),
        ([str(log), "--seam", "-1"], "--seam"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["estimate", *line])
        assert left.value.code == 2 and word in capsys.readouterr().err


def test_every_form_of_a_request_is_read(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "log"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps([{"prompt": "a b"}, {"text": "a b c"}], indent=1))
    (folder / "b.jsonl").write_text('{"input_ids": [[1, 2], [3]]}\nx\n\n{"body": {"prompt": []}}')
    (folder / "c.jsonl").write_text(
        json.dumps({"prompt": "", "pic": {"parts": ["a ", {"segment": "b c"}]}})
    )
    cutter = Cutter(1)
    made = [None if body is None else prompt_of(body, Plain(), cutter) for body in bodies(folder)]
    lengths = [None if one is None else len(one.ids) for one in made]
    assert lengths == [2, 3, 2, None, None, 3]
    # The space is the word's, so that stands across the edge.
    assert made[-1] is not None and made[-1].cuts[MARKED] == [Cut(2, 3, MARKED)]


def test_marks_in_all_their_forms() -> None:
    parts = [{"type": "text", "text": PASSAGES[0]}, {"type": "text", "text": PASSAGES[1]}]
    body: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": PASSAGES[2], "pic_segment": True},
            {"role": "user", "content": parts},
        ],
        "tools": [TOOLS[0], {**TOOLS[1], "pic_segment": True}],
        "pic": {"segments": [{"message": 1, "part": 1}]},
    }
    for rendering in (Plain(), OfModel(estimate.model_of(ensure_model())[0]._tokenizer)):  # type: ignore[attr-defined]
        prompt = prompt_of(body, rendering, Cutter(1))
        assert prompt is not None
        # SmolLM2's template shows no tools.
        assert len(prompt.cuts[MARKED]) == (3 if isinstance(rendering, Plain) else 2)
        # In the order of the prompt, which is not that of the body.
        assert prompt.cuts[MARKED] == sorted(prompt.cuts[MARKED])
    assert flat([{"text": "a"}, {"text": 3}, 4, {"text": "b"}]) == "a b" and flat(None) == ""


def test_a_segments_seam_is_computed_and_its_prefix_is_not_counted_twice() -> None:
    replay = Replay(seam=4)
    document = list(range(100, 164))
    for before in ([1] * 8, [2] * 8, [3] * 8):
        ids = [*before, *document, 7]
        replay.play(Prompt(ids, {MARKED: [Cut(8, 72, MARKED)]}))
    tally = replay.tallies[MARKED]
    assert (tally.tokens, tally.linked, tally.compiled) == (219, 2 * 60, 64)
    replay.play(Prompt([*[3] * 8, *document, 9], {MARKED: [Cut(8, 72, MARKED)]}))
    # All of it stands behind the same prefix, 64 tokens in steps of 16.
    assert tally.saved == 2 * 60 + 64 + 8 and tally.linked == 2 * 60 + 8
