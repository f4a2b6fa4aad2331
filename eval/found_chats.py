"""Chats as clients send them that know nothing of segments, made from real text that is
here: passages of facts, and the functions and files of this project.

Each comes in two forms: plain, and with the marks that a client would put who knows.
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from sglang_pic.eval.passages import load_passages
from sglang_pic.find import cutting, finder, rendered, seen, sketch, spans, structure, worth

Body = dict[str, Any]

# SmolLM2's own format, and tools as most templates write them: a line of JSON each.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nYou may call:\n<tools>\n"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODULES = (cutting, finder, rendered, seen, sketch, spans, structure, worth)
# Passages that recur, and how many of them a question gets.
CORPUS, DOCUMENTS = 12, 5
TOOLS, FILE_LINES = 12, 60


@dataclasses.dataclass(frozen=True)
class Chat:
    """One request: as it is sent plain, and with marks."""

    plain: Body
    marked: Body


def stuffed(rng: random.Random) -> Iterator[Chat]:
    """Retrieved documents in shuffled order in one string, as LangChain's chain that stuffs
    them renders them."""
    passages = load_passages()[:CORPUS]
    while True:
        chosen = rng.sample(passages, DOCUMENTS)
        question = rng.choice(rng.choice(chosen).questions).text
        ask = (
            "Use the following pieces of context to answer the question at the end. If you don't "
            "know the answer, just say that you don't know, don't try to make up an answer."
        )
        texts = [passage.document for passage in chosen]
        end = f"Question: {question}\nHelpful Answer:"
        parts = [
            {"type": "text", "text": ask},
            *({"type": "text", "text": text, "pic_segment": True} for text in texts),
            {"type": "text", "text": end},
        ]
        yield Chat(_user("\n\n".join([ask, *texts, end])), _user(parts))


def _user(content: Any) -> Body:
    return {"messages": [{"role": "user", "content": content}]}


def tools_of() -> list[Body]:
    """Schemas of functions of this project, from their signatures and docstrings."""
    made = []
    for module in MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and function.__doc__ and name[0] != "_":
                names = list(inspect.signature(function).parameters)
                properties = {one: {"type": "string", "description": one} for one in names}
                described = {
                    "name": name,
                    "description": inspect.cleandoc(function.__doc__),
                    "parameters": {"type": "object", "properties": properties, "required": names},
                }
                made.append({"type": "function", "function": described})
    return made


def agent(rng: random.Random) -> Iterator[Chat]:
    """An agent: twelve tools in another order each turn, one of them edited, and results of
    tools that recur."""
    tools = tools_of()[:TOOLS]
    passages = load_passages()
    turn = 0
    while True:
        turn += 1
        order = rng.sample(tools, TOOLS)
        function = order[0]["function"]
        edited = {**function, "description": f"{function['description']} (Version {turn}.)"}
        order[0] = {"type": "function", "function": edited}
        found = [passage.document for passage in rng.sample(passages[:6], 2)]
        messages = [
            {"role": "user", "content": f"Turn {turn}: look up what you need."},
            *({"role": "tool", "tool_call_id": f"{i}", "content": t} for i, t in enumerate(found)),
            {"role": "user", "content": "Now answer."},
        ]
        marked = [
            {**message, **({"pic_segment": True} if message["role"] == "tool" else {})}
            for message in messages
        ]
        yield Chat(
            {"messages": messages, "tools": order},
            {
                "messages": marked,
                "tools": [order[0], *({**tool, "pic_segment": True} for tool in order[1:])],
            },
        )


def coding(rng: random.Random) -> Iterator[Chat]:
    """A coding agent that reads files again, one of which has been edited since."""
    files = {
        module.__name__: pathlib.Path(str(module.__file__)).read_text().splitlines()[:FILE_LINES]
        for module in MODULES[:4]
    }
    turn = 0
    while True:
        turn += 1
        chosen = rng.sample(sorted(files), 2)
        lines = files[rng.choice(chosen)]
        lines[rng.randrange(len(lines))] += f"  # seen in turn {turn}"
        messages = [
            {"role": "user", "content": f"Turn {turn}: what is wrong in {chosen[0]}?"},
            *(
                {"role": "tool", "tool_call_id": name, "content": "\n".join(files[name])}
                for name in chosen
            ),
            {"role": "user", "content": "Say it in one word."},
        ]
        marked = [
            {**message, **({"pic_segment": True} if message["role"] == "tool" else {})}
            for message in messages
        ]
        yield Chat({"messages": messages}, {"messages": marked})


def nothing(rng: random.Random) -> Iterator[Chat]:
    """Texts of which nothing recurs."""
    words = " ".join(passage.text for passage in load_passages()).split()
    while True:
        paragraphs = (" ".join(rng.choices(words, k=70)) for _ in range(DOCUMENTS))
        body = _user("\n\n".join(paragraphs))
        yield Chat(body, body)


WORKLOADS: dict[str, Callable[[random.Random], Iterator[Chat]]] = {
    "stuffed": stuffed,
    "agent": agent,
    "coding": coding,
}
