"""Marked messages through every chat template: a segment of exactly its text, or a
refusal that says whose, and no sign of a mark where a tokenizer could see it."""

from __future__ import annotations

import copy
import itertools
import json
import pathlib
from typing import Any

import pytest
from chats import Chat
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.parser.conversation import chat_templates
from sglang.srt.parser.python_chat_template import GLM53, GLM53_FLASH
from transformers import AutoTokenizer
from transformers.models.llama4 import processing_llama4
from transformers.models.qwen2_audio.processing_qwen2_audio import Qwen2AudioProcessor
from transformers.models.smolvlm import processing_smolvlm

from sglang_pic.errors import PicRequestError
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.serving import Server
from sglang_pic.request.base import TokenSpan
from sglang_pic.server.marks import Mark, Marks, mark_messages
from sglang_pic.server.texts import Piece
from sglang_pic.server.tools import MarkedTool, add_tools


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pathlib.Path(ensure_model()))


# -- templates ------------------------------------------------------------------------


def _mistral(version: TokenizerVersion, spm: bool) -> str:
    return generate_chat_template(
        spm=spm,
        tokenizer_version=version,
        image_support=False,
        audio_support=False,
        thinking_support=False,
        default_system_prompt=None,
        plain_thinking_support=False,
        use_special_token_variables=True,
        model_settings_fields=None,
        reasoning_effort_values=("none", "high") if version >= TokenizerVersion.v15 else None,
        reasoning_effort_default="none" if version >= TokenizerVersion.v15 else None,
    )


# Every template in Jinja that comes with a package here, and that of our model.
SHIPPED = {
    "llama4": processing_llama4.chat_template,
    "smolvlm": processing_smolvlm.DEFAULT_CHAT_TEMPLATE,
    "qwen2_audio": Qwen2AudioProcessor.default_chat_template.fget(None),
    # SentencePiece is of the versions before 11.
    **{f"mistral_{v.value}": _mistral(v, v < TokenizerVersion.v11) for v in TokenizerVersion},
    "smollm2": None,
}


WORDS = st.sampled_from(
    [
        "tower",
        "Veldra",
        "<b>",
        '"quoted"',
        "a\nb",
        "{{ x }}",
        "</think>",
        "PICOPEN" + "0" * 32,
        "PICCLOSE" + "f" * 36,
        "31",
        "\n",
        "  ",
        "<|im_end|>",
        "tall.",
        "'",
        "\\n",
        "&amp;",
    ]
)
CONTENT = st.lists(WORDS, max_size=6).map(" ".join)


@st.composite
def _content(draw: st.DrawFn) -> dict[str, Any]:
    if draw(st.booleans()):
        flag = {"pic_segment": True} if draw(st.booleans()) else {}
        return {"content": draw(CONTENT), **flag}
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        flag = {"pic_segment": True} if draw(st.booleans()) else {}
        parts.append({"type": "text", "text": draw(CONTENT), **flag})
    return {"content": parts}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A chat request, some of whose texts are marked."""
    roles = draw(st.sampled_from([["user"], ["system", "user"], ["user", "assistant", "user"]]))
    if draw(st.booleans()):
        roles = [*roles, "assistant"]
    messages = [{"role": role, **draw(_content())} for role in roles]
    body: dict[str, Any] = {"messages": messages}
    if draw(st.booleans()):
        body["continue_final_message"] = True
    if draw(st.booleans()):
        function = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
        body["tools"] = [{"type": "function", "function": function}]
    return body


def check(chat: Chat, body: dict[str, Any], pic: dict[str, Any]) -> bool:
    """Whether a request is taken; what becomes of its marks is asserted."""
    marks = mark_messages(copy.deepcopy(body["messages"]), [])
    if marks is None:
        return False
    try:
        stock = chat.stock(copy.deepcopy(body))
    except Exception:
        stock = None  # the template takes no such conversation
    try:
        exchange = chat.marked(copy.deepcopy(body), pic)
    except PicRequestError as error:
        assert stock is not None
        assert error.field in {mark.field for mark in marks.all}
        assert "template" in error.problem
        return False
    except Exception:
        assert stock is None
        return False
    finally:
        assert not any(chat.marks.nonce in text for text in chat.tokenizer.given)
    assert stock is not None
    ids, decode = exchange.ids, chat.tokenizer.decode
    assert decode(ids) == decode(stock)
    cores = [mark.core for mark in marks.all]
    assert len(exchange.spans) >= len(cores)
    assert all(a.end <= b.start for a, b in itertools.pairwise(exchange.spans))
    if pic.get("tokenize") == "whole":
        assert ids == stock
    else:
        texts = [decode(ids[span.start : span.end]) for span in exchange.spans]
        assert set(texts) == set(cores)
    return True


PICS = st.sampled_from([{}, {"tokenize": "whole"}, {"require_exact": True, "tokenize": "pieces"}])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates(tokenizer, name: str) -> None:
    chat = Chat(tokenizer, SHIPPED[name] or tokenizer.chat_template)
    taken = []

    @settings(max_examples=60)
    @given(bodies(), PICS)
    @example(_plain(), {})
    def run(body: dict[str, Any], pic: dict[str, Any]) -> None:
        taken.append(check(chat, body, pic))

    run()
    assert any(taken)


def _plain() -> dict[str, Any]:
    """What every template takes."""
    document = {"type": "text", "text": "The tower of Veldra.", "pic_segment": True}
    return {"messages": [{"role": "user", "content": [document]}]}


@pytest.mark.parametrize("name", sorted(chat_templates))
def test_conversations_of_sglang(tokenizer, name: str) -> None:
    chat = Chat(tokenizer, conversation=name)
    taken = []

    @settings(max_examples=15)
    @given(bodies(), PICS)
    @example(_plain(), {})
    def run(body: dict[str, Any], pic: dict[str, Any]) -> None:
        taken.append(check(chat, body, pic))

    run()
    assert any(taken)


@pytest.mark.parametrize("python", [GLM53, GLM53_FLASH], ids=lambda python: python.name)
def test_templates_in_python(tokenizer, python) -> None:
    chat = Chat(tokenizer, "", python=python)
    taken = []

    @settings(max_examples=60)
    @given(bodies(), PICS)
    @example(_plain(), {})
    def run(body: dict[str, Any], pic: dict[str, Any]) -> None:
        taken.append(check(chat, body, pic))

    run()
    assert any(taken)


@settings(max_examples=60)
@given(body=bodies(), pic=PICS)
def test_deepseek_encoding(tokenizer, body, pic) -> None:
    check(Chat(tokenizer, spec="dsv32"), body, pic)


# What a template may do to a text, and to the messages.
FILTERS = st.lists(
    st.sampled_from(
        [
            "|trim",
            "|upper",
            "|lower",
            "|title",
            "|capitalize",
            "|reverse",
            "|tojson",
            "|escape",
            "|urlencode",
            "|replace('a', 'o')",
            "|replace('\\n', ' ')",
            "|truncate(20)",
            "|indent",
            "|wordwrap(7)",
            "|length|string",
            "[:9]",
            "[5:]",
            "[:70]",
            "[::-1]",
            ".strip('.')",
            ".split()|join(' ')",
            ".split('</think>')[-1]",
            "~''",
        ]
    ),
    max_size=2,
).map("".join)
LISTS = st.sampled_from(
    [
        "messages",
        "messages|reverse",
        "messages[1:]",
        "messages[:-1]",
        "messages[-1:]",
        "messages + messages",
        "messages|sort(attribute='role')",
        "messages|selectattr('role', 'equalto', 'user')",
    ]
)
CONDITIONS = st.sampled_from(
    [
        "true",
        "text|length > 12",
        "text|length < 60",
        "'a' in text",
        "text.startswith('tower')",
        "not text.startswith('P')",
        "text == text|trim",
        "loop.first or loop.last",
        "text in seen.of",
    ]
)


@st.composite
def templates(draw: st.DrawFn) -> str:
    filters, condition = draw(FILTERS), draw(CONDITIONS)
    say = f"{{% if {condition} %}}{{{{ text{filters} }}}}{{% else %}}{{{{ '.' }}}}{{% endif %}}"
    keep = "{% set seen.of = seen.of + [text] %}"
    parts = (
        "{% if message.content is string %}{% set text = message.content %}"
        + say
        + keep
        + "{% else %}{% for part in message.content %}{% set text = part.text %}"
        + say
        + keep
        + "{% endfor %}{% endif %}"
    )
    whole = "{% set text = message.content %}" + say + keep
    body = draw(st.sampled_from([parts, whole]))
    return (
        "{% set seen = namespace(of=[]) %}{% for message in "
        + draw(LISTS)
        + " %}<{{ message.role }}>"
        + body
        + "\n{% endfor %}{{ seen.of|length }}<assistant>"
    )


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f'Looks for {name} in {{braces}}, "quotes" and ümlauts.',
            "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
        },
    }
    for name in ("tower", "ferry", "bell")
]
_LINES = "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
QWEN = (
    f"{{% if tools %}}<tools>{_LINES}</tools>{{% endif %}}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
)
# How models' templates write tools: a line each, all as one list, indented, functions alone.
WITH_TOOLS = {
    "lines": QWEN,
    "list": QWEN.replace(_LINES, "{{ tools | tojson }}"),
    "indented": QWEN.replace("tool | tojson", "tool | tojson(indent=4)"),
    "functions": QWEN.replace("tool | tojson", "tool.function | tojson"),
    **{name: text for name, text in SHIPPED.items() if text and "tools" in text},
}


def _with_tools(tools: list[Any], **marks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Which tower?"}], "tools": tools, **marks}


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_marked_tool_is_its_own_rendered_text(tokenizer, name: str) -> None:
    chat = Chat(tokenizer, WITH_TOOLS[name])
    found = {}
    for order in itertools.permutations(range(3)):
        tools = [{**copy.deepcopy(TOOLS[i]), "pic_segment": i != 1} for i in order]
        exchange = chat.marked(_with_tools(tools), {"tokenize": "whole"})
        assert exchange.ids == chat.stock(_with_tools([TOOLS[i] for i in order]))
        exchange = chat.marked(
            _with_tools(
                [{**tool, "pic_segment": i != 1} for i, tool in zip(order, tools, strict=True)]
            )
        )
        assert exchange.ids is not None
        texts = [chat.tokenizer.decode(exchange.ids[s.start : s.end]) for s in exchange.spans]
        for text, i in zip(texts, [i for i in order if i != 1], strict=True):
            tool = json.loads(text)
            assert tool.get("function", tool)["name"] == TOOLS[i]["function"]["name"]  # type: ignore
            assert found.setdefault(i, text) == text


def test_marked_tools_stand_beside_marked_texts(tokenizer) -> None:
    """Also where a marked text holds the very words of the tool."""
    template = "{% for message in messages %}{{ message.content }}|{% endfor %}{{ tools|tojson }}"
    chat = Chat(tokenizer, template)
    said = json.dumps(TOOLS[0])
    body = {
        "messages": [{"role": "user", "content": said, "pic_segment": True}],
        "tools": [{**TOOLS[0], "pic_segment": True}],
    }
    exchange = chat.marked(body)
    assert exchange.ids is not None and len(exchange.spans) == 2
    prompt = chat.tokenizer.decode(exchange.ids)
    assert exchange.spans[1].start > len(chat.tokenizer.decode(exchange.ids[:3])) and said in prompt


def test_a_tool_that_is_not_offered_is_no_segment(tokenizer) -> None:
    chat = Chat(tokenizer, QWEN)
    body = _with_tools([{**copy.deepcopy(TOOLS[0]), "pic_segment": True}])
    request = ChatCompletionRequest(model="x", messages=body["messages"])
    ranges = add_tools((MarkedTool(0, "tower"),), [], [Piece("x", special=False)], [[]])
    assert ranges == [[]] and request.tools is None and chat.stock(body)


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", QWEN.replace("| tojson", "")])
def test_a_template_that_writes_no_json_cannot_carry_a_marked_tool(
    tokenizer, template: str
) -> None:
    body = _with_tools([TOOLS[1], {**TOOLS[0], "pic_segment": True}])
    with pytest.raises(PicRequestError, match="does not write this tool") as refused:
        Chat(tokenizer, template).marked(body)
    assert refused.value.field == "tools[1]"


@pytest.mark.parametrize("flag", [1, "yes", [], {}])
def test_bad_marks_on_tools_are_refused_by_name(flag: Any) -> None:
    with pytest.raises(PicRequestError) as refused:
        mark_messages([], [], [TOOLS[0], {**TOOLS[1], "pic_segment": flag}])
    assert refused.value.field == "tools[1].pic_segment"
    assert mark_messages([], [], [{**TOOLS[0], "pic_segment": None}, 3, "x"]) is None
    assert mark_messages([], [], "tools") is None


def test_generated_templates(tokenizer) -> None:
    taken = []

    @settings(max_examples=300)
    @given(templates(), bodies(), PICS)
    def run(template: str, body: dict[str, Any], pic: dict[str, Any]) -> None:
        taken.append(check(Chat(tokenizer, template), body, pic))

    run()
    assert sum(taken) > 10


@pytest.mark.parametrize(
    "content",
    ["message.content", "message.content|trim", "message.content ~ message.content"],
)
@pytest.mark.parametrize("messages", ["messages", "messages|reverse", "messages + messages"])
def test_what_leaves_a_text_as_it_is_is_taken(tokenizer, content: str, messages: str) -> None:
    template = f"{{% for message in {messages} %}}<s>{{{{ {content} }}}}{{% endfor %}}"
    chat = Chat(tokenizer, template)
    texts = ["The tower.", "\n The ferry. ", "Who?"]
    marked = [{"role": "user", "content": text, "pic_segment": True} for text in texts]
    times = (1 + ("~" in content)) * (1 + ("+" in messages))
    exchange = chat.marked({"messages": marked})
    assert exchange.ids is not None
    found = [chat.tokenizer.decode(exchange.ids[s.start : s.end]) for s in exchange.spans]
    assert sorted(found) == sorted(times * [text.strip() for text in texts])


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("message.content|upper", "reads, alters"),
        ("message.content[:30]", "reads, alters"),
        ("message.content|length", "reads, alters"),
        ("message.content if message.content.startswith('The') else '-'", "reads, alters"),
        ("message.content|escape", "alters"),
        ("message.content|tojson", "alters"),
        ("message.content.split()|join('_')", "alters"),
        ("'' if message.role == 'assistant' else message.content", "leaves this text out"),
    ],
)
def test_refusals_say_which_and_why(tokenizer, expression: str, why: str) -> None:
    """Only the text at fault is named, though others are marked."""
    template = (
        "{% for message in messages %}{% if loop.index == 2 %}{{ "
        + expression
        + " }}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    texts = ["One.", 'The "tower" & the ferry are what this text is about.', "Three?"]
    roles = ["user", "assistant", "user"]
    marked = [
        {"role": role, "content": text, "pic_segment": True}
        for role, text in zip(roles, texts, strict=True)
    ]
    with pytest.raises(PicRequestError, match=why) as caught:
        Chat(tokenizer, template).marked({"messages": marked})
    assert caught.value.field == "messages[1].content"


SIMPLE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("other", [False, True])
def test_a_continued_answer_may_be_marked(tokenizer, other: bool) -> None:
    """SGLang takes it from the messages and puts it behind the prompt."""
    body = {
        "messages": [
            {"role": "user", "content": "The ferry of Orrin.", "pic_segment": other},
            {"role": "assistant", "content": "It leaves at seven", "pic_segment": True},
        ],
        "continue_final_message": True,
    }
    chat = Chat(tokenizer, SIMPLE)
    stock = chat.stock(copy.deepcopy(body))
    exchange = chat.marked(copy.deepcopy(body))
    texts = [chat.tokenizer.decode(exchange.ids[s.start : s.end]) for s in exchange.spans]
    assert texts == ["The ferry of Orrin."] * other + ["It leaves at seven"]
    assert chat.tokenizer.decode(exchange.ids) == chat.tokenizer.decode(stock)
    assert exchange.ids[exchange.spans[-1].start :] == tokenizer.encode("It leaves at seven")


def test_asking_for_exactness_gives_stocks_prompt(tokenizer) -> None:
    texts = ["the tower of Veldra", "is tall", "Who built it"]
    body = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": t, "pic_segment": True}]}
            for t in texts
        ]
    }
    template = "{% for message in messages %}Read {{ message.content }} now{% endfor %}"
    chat = Chat(tokenizer, template)
    stock = chat.stock(copy.deepcopy(body))
    assert chat.marked(copy.deepcopy(body)).ids != stock
    assert chat.marked(copy.deepcopy(body), {"require_exact": True}).ids == stock
    named = {"require_exact": True, "tokenize": "pieces"}
    assert chat.marked(copy.deepcopy(body), named).ids != stock


def test_empty_texts_are_empty_segments(tokenizer) -> None:
    """Each stands where the one marked before it ends."""
    texts = ["", "The tower.", " \n", "", "The ferry.", ""]
    parts = [{"type": "text", "text": text, "pic_segment": True} for text in texts]
    chat = Chat(tokenizer, _EACH_PART)
    exchange = chat.marked({"messages": [{"role": "user", "content": parts}]})
    found = [chat.tokenizer.decode(exchange.ids[s.start : s.end]) for s in exchange.spans]
    assert found == ["", "The tower.", "", "", "The ferry.", ""]
    assert exchange.spans[0].start == exchange.spans[1].start
    assert exchange.spans[3].end == exchange.spans[1].end
    alone = {"messages": [{"role": "user", "content": " ", "pic_segment": True}]}
    assert Chat(tokenizer, SIMPLE).marked(alone).spans == (TokenSpan(0, 0),)


_EACH_PART = (
    "{% for message in messages %}{% for part in message.content %}{{ part.text }}{% endfor %}"
    "{% endfor %}?"
)


def test_models_that_take_images(tokenizer) -> None:
    """Text goes as ever, and what SGLang remembers of prompts holds no stand-in."""
    chat = Chat(tokenizer, _EACH_PART, multimodal=True)
    body = _plain()
    stock = chat.stock(copy.deepcopy(body))
    for _ in range(2):
        assert chat.marked(copy.deepcopy(body), {"tokenize": "whole"}).ids == stock
        assert chat.stock(copy.deepcopy(body)) == stock
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    body["messages"][0]["content"].append(url)
    with pytest.raises(PicRequestError, match="images"):
        chat.marked(body)


@pytest.mark.parametrize("spec", ["dsv4", "dsv41", "kimi_k3", "inkling"])
def test_encodings_without_a_text_are_refused(tokenizer, spec: str) -> None:
    with pytest.raises(PicRequestError, match="makes tokens without a text"):
        Chat(tokenizer, SIMPLE, spec=spec).marked(_plain())


# -- marks ------------------------------------------------------------------------------


def test_signs_are_pairs() -> None:
    marks = Marks([Mark(("a",), " b "), Mark(("c",), "D.")])
    written = marks.written({"a": " b ", "c": "D.", "e": "f"})
    assert written["e"] == "f"
    assert written["a"].startswith(" PICOPEN") and written["a"].endswith(" ")
    found = [(0, TokenSpan(1, 2)), (1, TokenSpan(3, 5))]
    assert marks.cut(written["a"] + written["c"]) == (" b D.", found)
    opening, closing = written["c"].split("D.")
    for broken in (closing + "D." + opening, opening + "D.", opening * 2 + "D." + closing * 2):
        assert marks.cut(broken) is None
    assert marks.cut(opening + "D." + written["a"].strip()[-len(closing) :]) is None
    assert Marks(marks.all).cut(written["a"]) == (written["a"], [])
    assert marks.written({"a": " b ", "c": "D."}, 1) == {"a": written["a"], "c": "D."}
    with pytest.raises(PicRequestError, match=r"^c: was changed"):
        marks.written({"a": " b ", "c": "d"})


# -- a server -----------------------------------------------------------------------------

FERRY = "The ferry across Lake Orrin leaves from the stone pier at seven. " * 3
TOWER = "The tower of Veldra is thirty-one metres tall and shows a green light. " * 3


def ask(server: Server, body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A chat answer: its report, its prompt's tokens, its text, or its error."""
    options = {"model": "default", "max_tokens": 6, "temperature": 0}
    asked = {**options, "return_prompt_token_ids": True, **copy.deepcopy(body), **fields}
    answer = server.post("/v1/chat/completions", asked)
    if answer.status_code != 200:
        return {"status": answer.status_code, **answer.json()}
    content = answer.json()
    assert "PICOPEN0" not in str(content["choices"])
    return {
        "report": content["usage"].get("pic"),
        "ids": content["choices"][0].get("prompt_token_ids") or content["prompt_token_ids"],
        "text": content["choices"][0]["message"]["content"],
        "prompt_tokens": content["usage"]["prompt_tokens"],
    }


def unmarked(body: dict[str, Any]) -> dict[str, Any]:
    bare = copy.deepcopy(body)
    mark_messages(bare["messages"], [])
    return bare


@pytest.mark.server
@pytest.mark.parametrize("other", [False, True])
def test_a_server_continues_a_marked_answer(smollm: Server, tokenizer, other: bool) -> None:
    body = {
        "messages": [
            {"role": "user", "content": FERRY, "pic_segment": other},
            {"role": "assistant", "content": TOWER, "pic_segment": True},
        ],
        "continue_final_message": True,
        "cache_salt": f"continued {other}",
    }
    stock = ask(smollm, unmarked(body))
    found = ask(smollm, body)
    assert [one["hit"] for one in found["report"]["segments"]] == [True] * (1 + other)
    assert tokenizer.decode(found["ids"]) == tokenizer.decode(stock["ids"])
    exact = ask(smollm, body, pic={"require_exact": True})
    assert (exact["ids"], exact["text"]) == (stock["ids"], stock["text"])
    assert exact["report"]["exactness"] == "exact"


@pytest.mark.server
def test_a_server_takes_a_text_that_looks_like_a_mark(smollm: Server, tokenizer) -> None:
    sign = "PICOPEN" + "ab" * 16 + " PICCLOSE" + "0" * 36
    parts = [
        {"type": "text", "text": sign},
        {"type": "text", "text": f"{TOWER}{sign}", "pic_segment": True},
    ]
    body = {"messages": [{"role": "user", "content": parts}]}
    found, stock = ask(smollm, body), ask(smollm, unmarked(body))
    assert found["report"]["segments"][0]["hit"]
    assert tokenizer.decode(found["ids"]) == tokenizer.decode(stock["ids"])


@pytest.mark.server
def test_a_server_reports_empty_texts(smollm: Server) -> None:
    texts = ["", TOWER, " \n", FERRY]
    parts = [{"type": "text", "text": text, "pic_segment": True} for text in texts]
    reports = [
        ask(smollm, {"messages": [{"role": "user", "content": parts}]}, pic=options)["report"]
        for options in ({}, {}, {"require_exact": True})
    ]
    at, ranges = 0, []
    for text in texts:
        ranges.append({"start": at, "end": at + len(text.strip())})
        at += len(text.strip())
    asked = [
        {"pic": {"parts": [*({"segment": text.strip()} for text in texts), "Why?"]}},
        {"pic": {"segments": ranges}, "text": TOWER.strip() + FERRY.strip() + "Why?"},
        {"pic": {"segments": [*ranges[:1], {"start": 2, "end": 2}]}, "input_ids": [7, 8, 9]},
    ]
    for body in asked:
        answer = smollm.generate(sampling_params={"max_new_tokens": 1}, **body)
        reports.append(answer["meta_info"]["pic"])
    assert [s["reason"] for s in reports.pop()["segments"]] == ["empty", "empty"]
    for report in reports:
        reasons = [segment["reason"] for segment in report["segments"]]
        assert [reason == "empty" for reason in reasons] == [True, False, True, False]
        for empty in report["segments"][::2]:
            assert empty["start"] == empty["end"] and empty["id"] is None and not empty["hit"]
    assert [s["hit"] for s in reports[1]["segments"]] == [False, True, False, True]


@pytest.mark.server
def test_a_server_explains_chat_as_it_answers(smollm: Server) -> None:
    function = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": TOWER, "pic_segment": True},
            {"role": "user", "content": FERRY + "When?"},
        ],
        "tools": [{"type": "function", "function": function}],
        "chat_template_kwargs": {"any": 1},
        "cache_salt": "explained",
        "pic": {"seam": 4},
        "max_tokens": 2,
    }

    def explain(**fields: Any) -> dict[str, Any]:
        answer = smollm.post("/pic/explain", {**copy.deepcopy(body), **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    told = explain()
    (segment,) = told["segments"]
    assert segment["reason"] == "not_compiled" and told["seam"] == 4
    assert told["tokens_to_compile"] == segment["end"] - segment["start"]
    found = ask(smollm, body)
    assert found["prompt_tokens"] == told["tokens_reused"] + told["tokens_computed"]
    assert [s["start"] for s in found["report"]["segments"]] == [segment["start"]]
    assert explain()["segments"][0]["id"] == found["report"]["segments"][0]["id"]
    assert explain()["segments"][0]["hit"]
    bare = unmarked(body)
    assert explain(messages=bare["messages"])["segments"] == []
    for fields, param in (
        ({"messages": []}, "messages"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "pic_segment": 3}]}, "messages[0]"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "messages"),
    ):
        refused = smollm.post("/pic/explain", {**copy.deepcopy(body), **fields})
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"].startswith(param)
    pic = {"segments": [{"start": 0, "end": len(TOWER)}]}
    prompts = [TOWER + "Why?", [TOWER + "Why?"]]
    told = [smollm.post("/pic/explain", {"prompt": p, "pic": pic}).json() for p in prompts]
    assert told[0] == told[1] and len(told[0]["segments"]) == 1


@pytest.mark.server
def test_a_server_says_how_it_tokenises(smollm: Server) -> None:
    assert smollm.get("/pic/info").json()["tokenize"]["rule"] == "pieces"
