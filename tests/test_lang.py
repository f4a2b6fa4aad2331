"""Segments in the frontend language, against a server that keeps what it is sent."""

from __future__ import annotations

import contextlib
import http.server
import json
import runpy
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.chat_template import get_chat_template
from sglang.lang.interpreter import ProgramState

import sglang_pic
from sglang_pic.lang import PicRuntimeEndpoint, pic_segment, report_of, segment_ranges

ANSWER = [" forty", "-two", "."]


class FakeServer(http.server.ThreadingHTTPServer):
    """Answers like SGLang's ``/generate``; ``links`` makes it one of ours."""

    daemon_threads = True

    def __init__(self, links: bool):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.links = links
        self.bodies: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def marked(self) -> list[list[str]]:
        """For every body of one prompt, the texts of its segments."""
        return [
            [body["text"][s["start"] : s["end"]] for s in body.get("pic", {}).get("segments", [])]
            for body in self.bodies
            if not isinstance(body.get("pic"), list)
        ]

    def meta_info(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        meta: dict[str, Any] = {"prompt_tokens": len(text.split())}
        if body.get("return_logprob"):
            # The choice "blue" is the likely one.
            score = -0.1 if text.endswith("blue") else -3.0
            meta["input_token_logprobs"] = [[score, 1, "is"], [score, 2, text.split()[-1]]]
            meta["output_token_logprobs"] = []
        if self.links and "pic" in body:
            pic = body["pic"][0] if isinstance(body["pic"], list) else body["pic"]
            spans = pic.get("segments", [])
            reused = sum(span["end"] - span["start"] for span in spans)
            meta["pic"] = {"tokens_reused": reused, "tokens_computed": len(text) - reused}
            meta["pic"]["exactness"] = "composed"
        return meta


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/get_model_info":
            self._send(200, {"model_path": "fake"})
        elif self.path == "/pic/info" and self.server.links:
            self._send(200, {"version": "1"})
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.path == "/pic/compile":
            companies = [{"segments": ["id"] * len(body["text"]), "tokens_computed": 7}]
            self._send(200, {"segments": [], "companies": companies})
        elif "refuse" in str(body.get("text")):
            self._send(400, {"error": {"message": "pic.segments: refused"}})
        elif body.get("stream"):
            self._stream(body)
        elif "input_ids" in body:
            # As SGLang does: nothing is known of a prompt's first token.
            rows = [
                [[None, one, ""], *([-2.0, i, ""] for i in ids)] for one, *ids in body["input_ids"]
            ]
            metas = [{"input_token_logprobs": row} for row in rows]
            self._send(200, [{"text": "", "meta_info": meta} for meta in metas])
        elif isinstance(body["text"], list):
            self._send(200, [self._answer(body, text, "") for text in body["text"]])
        else:
            self._send(200, self._answer(body, body["text"], "".join(ANSWER)))

    def _answer(self, body: dict[str, Any], text: str, answer: str) -> dict[str, Any]:
        return {"text": answer, "meta_info": self.server.meta_info(body, text)}

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        for i in range(len(ANSWER)):
            event = self._answer(body, body["text"], "".join(ANSWER[: i + 1]))
            if i == 2:
                event["meta_info"].pop("pic", None)
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, content: Any) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextlib.contextmanager
def serving(links: bool) -> Iterator[FakeServer]:
    with FakeServer(links) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(links=True) as server:
        yield server


@pytest.fixture
def plain_server() -> Iterator[FakeServer]:
    with serving(links=False) as server:
        yield server


def endpoint(server: FakeServer, **options: Any) -> PicRuntimeEndpoint:
    return PicRuntimeEndpoint(server.url, chat_template_name="chatml", **options)


class Echo(BaseBackend):
    """Some backend that has never heard of segments."""

    def __init__(self) -> None:
        super().__init__()
        self.chat_template = get_chat_template("chatml")
        self.texts: list[str] = []

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        self.texts.append(s.text_)
        return "".join(ANSWER), {}


def run(program: Any, backend: Any, **arguments: Any) -> ProgramState:
    """Run to the end; a frontend program keeps its errors to itself."""
    state = program.run(backend=backend, **arguments)
    state.sync()
    if state.error() is not None:
        raise state.error()
    return state


def marked(state: ProgramState) -> list[str]:
    return [state.text()[start:end] for start, end in segment_ranges(state)]


@sgl.function
def roles(s, documents, question):
    s += sgl.system("Be brief. " + pic_segment("TOOLS ä𝄞"))
    with s.user():
        for document in documents:
            s += pic_segment(document) + "\n"
        s += question
    s += sgl.assistant(sgl.gen("answer", max_tokens=5))


# -- marks --------------------------------------------------------------------------


def test_roles_and_loops(server):
    state = run(roles, endpoint(server), documents=["one", "two", "one"], question="Why one?")
    assert server.marked() == [["TOOLS ä𝄞", "one", "two", "one"]]
    body = server.bodies[0]
    assert body["text"] == (
        "<|im_start|>system\nBe brief. TOOLS ä𝄞<|im_end|>\n"
        "<|im_start|>user\none\ntwo\none\nWhy one?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert body["sampling_params"]["max_new_tokens"] == 5
    assert set(body["pic"]) == {"segments"}
    assert "cache_salt" not in body
    assert marked(state) == ["TOOLS ä𝄞", "one", "two", "one"]
    assert state["answer"] == "".join(ANSWER)


def test_later_turns_keep_earlier_segments(server):
    @sgl.function
    def turns(s):
        for turn in range(3):
            s += sgl.user(pic_segment(f"document {turn}") + "?")
            s += sgl.assistant(sgl.gen(f"answer {turn}"))

    run(turns, endpoint(server))
    documents = [f"document {turn}" for turn in range(3)]
    assert server.marked() == [documents[: turn + 1] for turn in range(3)]


def test_one_expression_in_many_places(server):
    """Kept expressions mark every place, also inside a longer kept expression."""
    skill = pic_segment("SKILL")
    task = "Use: " + skill + "."

    @sgl.function
    def program(s):
        s += skill
        s += skill
        for _ in range(2):
            s += task
        s += sgl.gen("answer")

    run(program, endpoint(server))
    assert server.bodies[0]["text"] == "SKILLSKILLUse: SKILL.Use: SKILL."
    assert server.marked() == [["SKILL"] * 4]


def test_equal_text_outside_a_mark_is_no_segment(server):
    @sgl.function
    def program(s):
        s += "same " + pic_segment("same ") + "same " + sgl.gen("answer")

    run(program, endpoint(server))
    assert server.bodies[0]["pic"]["segments"] == [{"start": 5, "end": 10}]


def test_without_segments_the_request_is_stock(server):
    @sgl.function
    def program(s):
        s += "Hello" + sgl.gen("answer", max_tokens=3)

    ours = run(program, endpoint(server, seam=4))
    stock = run(program, RuntimeEndpoint(server.url, chat_template_name="chatml"))
    assert server.bodies[0] == server.bodies[1]
    assert ours.text() == stock.text()
    assert report_of(ours, "answer") is None


@pytest.mark.parametrize("text", [None, 7])
def test_bad_segments(text):
    with pytest.raises(TypeError):
        pic_segment(text)


def test_empty_segments(server):
    @sgl.function
    def program(s):
        s += "Read: " + pic_segment("") + pic_segment("one") + pic_segment("") + sgl.gen("answer")

    run(program, endpoint(server))
    places = [(one["start"], one["end"]) for one in server.bodies[0]["pic"]["segments"]]
    assert places == [(6, 6), (6, 9), (9, 9)]


def test_top_level_import():
    assert sglang_pic.pic_segment is pic_segment


def test_rewritten_text_loses_its_marks():
    """``separate_reasoning`` cuts the text back and writes the bare answer."""
    state = ProgramState(_executor())
    state += pic_segment("kept") + " and " + pic_segment("rewritten") + "."
    state.sync()
    assert marked(state) == ["kept", "rewritten"]
    state.stream_executor.text_ = "kept and written anew."
    assert marked(state) == ["kept"]
    state.stream_executor.text_ = "kept and rew"
    assert marked(state) == ["kept"]
    state.stream_executor.end()


def _executor() -> Any:
    from sglang.lang.interpreter import StreamExecutor
    from sglang.lang.ir import SglSamplingParams

    return StreamExecutor(Echo(), {}, SglSamplingParams(), None, False)


def test_marks_of_many_threads():
    """One expression appended by many threads at once, to states of their own."""
    shared = pic_segment("shared")

    def append(i: int) -> list[str]:
        state = ProgramState(_executor())
        for turn in range(20):
            state += f"{i}.{turn} " + shared
            state += pic_segment(f"own {i}")
        texts = marked(state)
        state.stream_executor.end()
        return texts

    with ThreadPoolExecutor(16) as pool:
        for i, texts in enumerate(pool.map(append, range(48))):
            assert texts == ["shared", f"own {i}"] * 20


# -- control flow ---------------------------------------------------------------------


def test_fork_and_join(server):
    @sgl.function
    def program(s):
        s += "Read " + pic_segment("common") + ". "
        s.sync()  # fork() commits only the text that has already been executed
        branches = s.fork(2)
        branches += lambda i: pic_segment(f"branch {i}") + pic_segment("both") + sgl.gen("part")
        branches.join()
        s += "So: " + branches[0]["part"] + pic_segment("last") + sgl.gen("answer")

    state = run(program, endpoint(server))
    warm, *parts, last = server.bodies
    assert warm["sampling_params"]["max_new_tokens"] == 0
    assert server.marked()[0] == ["common"]
    assert sorted(server.marked()[1:3]) == [["common", f"branch {i}", "both"] for i in range(2)]
    assert len(parts) == 2
    assert server.marked()[3] == ["common", "last"]
    assert last["text"].startswith("Read common. So:")
    assert state["part"] == ["".join(ANSWER)] * 2


def test_join_that_appends_text(server):
    @sgl.function
    def program(s):
        s += pic_segment("common")
        branches = s.fork(2)
        branches += lambda i: pic_segment(f"branch {i}")
        branches.join("concate_and_append")
        s += pic_segment("last") + sgl.gen("answer")

    run(program, endpoint(server))
    assert server.bodies[-1]["text"] == "commonbranch 0branch 1last"
    assert server.marked()[-1] == ["common", "last"]


def test_streaming(server):
    backend = endpoint(server)
    state = roles.run(documents=["one", "two"], question="?", backend=backend, stream=True)
    assert "".join(state.text_iter("answer")) == "".join(ANSWER)
    state.sync()
    assert server.marked() == [["TOOLS ä𝄞", "one", "two"]]
    assert server.bodies[0]["stream"] is True
    report = report_of(state, "answer")
    assert report is not None
    assert report["tokens_reused"] == len("TOOLS ä𝄞onetwo")
    assert backend.last_report == report


def test_run_batch(server):
    backend = endpoint(server, cache_salt="tenant")
    questions = [{"documents": [f"d{i}", "shared"], "question": f"q{i}?"} for i in range(24)]
    states = roles.run_batch(questions, backend=backend, num_threads=8)
    for i, state in enumerate(states):
        assert marked(state) == ["TOOLS ä𝄞", f"d{i}", "shared"]
        report = report_of(state, "answer")
        assert report is not None
        assert report["tokens_reused"] == sum(map(len, marked(state)))
    assert all(body["cache_salt"] == "tenant" for body in server.bodies)
    sent = [body["text"] for body in server.bodies]
    assert len(sent) == len(set(sent)) == 24


def test_run_batch_warms_up_the_text_before_the_first_segment(server):
    opening = "A long opening that every run of this program begins with, word for word. "

    @sgl.function
    def program(s, document):
        s += opening
        s += pic_segment(document) + sgl.gen("answer")

    batch = [{"document": "a"}, {"document": "b"}]
    program.run_batch(batch, backend=endpoint(server, cache_salt="t"), num_threads=1)
    assert server.bodies[0]["text"] == opening
    assert server.bodies[0]["sampling_params"] == {"max_new_tokens": 0}
    assert server.bodies[0]["cache_salt"] == "t"
    assert server.marked() == [[], ["a"], ["b"]]


# -- the wire ---------------------------------------------------------------------------


def test_options_and_salt(server):
    backend = endpoint(server, seam=8, policy="seam", require_exact=True, cache_salt="tenant")
    run(roles, backend, documents=["one"], question="?")
    pic = server.bodies[0]["pic"]
    assert (pic["seam"], pic["policy"], pic["require_exact"]) == (8, "seam", True)
    assert server.bodies[0]["cache_salt"] == "tenant"
    assert endpoint(server, seam=0)._options == {"seam": 0}


@pytest.mark.parametrize(("opening", "posts"), [("", 2), ("Read. ", 3)])
def test_documents_alone_are_nothing_to_compute_ahead(server, opening, posts):
    @sgl.function
    def program(s):
        s += opening
        s += pic_segment("a document")
        # What is appended is there in a moment; a fork that sees no text yet asks for nothing.
        s.sync()
        forks = s.fork(2)
        for fork in forks:
            fork += "Why?" + sgl.gen("answer", max_tokens=3)
        forks.join()

    run(program, endpoint(server, mode="encode"))
    assert len(server.bodies) == posts
    assert all(body["pic"]["mode"] == "encode" for body in server.bodies)


def test_select_scores_choices_behind_segments(server):
    @sgl.function
    def program(s):
        s += "Sky: " + pic_segment("The sky is blue at noon.") + " It is "
        s += sgl.select(
            "colour",
            ["red", "blue", "green"],
            choices_method=sgl.unconditional_likelihood_normalized,
        )
        s += sgl.gen("more")

    backend = endpoint(server, cache_salt="tenant", seam=3)
    state = run(program, backend)
    assert state["colour"] == "blue"
    opening, scoring, bare, last = server.bodies
    assert all(body["cache_salt"] == "tenant" for body in server.bodies)
    assert opening["pic"]["seam"] == 3 and last["pic"]["seam"] == 3
    assert scoring["text"] == [opening["text"] + c for c in ("red", "blue", "green")]
    assert scoring["pic"] == [opening["pic"]] * 3
    assert scoring["return_logprob"] is True
    assert "pic" not in bare and len(bare["input_ids"]) == 3
    assert server.marked()[0] == server.marked()[-1] == ["The sky is blue at noon."]
    assert report_of(state, "colour") is None
    assert backend.last_report["exactness"] == "composed"

    before = len(server.bodies)
    stock = RuntimeEndpoint(server.url, chat_template_name="chatml")
    assert run(program, stock)["colour"] == "blue"
    for ours, theirs in zip([opening, scoring, bare, last], server.bodies[before:], strict=True):
        ours.pop("cache_salt")
        ours.pop("pic", None)
        assert ours == theirs


def test_select_finds_segments_in_every_choice(server):
    @sgl.function
    def program(s):
        s += "The sky is blue at noon. It is "
        s += sgl.select("colour", ["red", "blue"])

    run(program, endpoint(server, find="structure"))
    assert [body["pic"] for body in server.bodies] == [
        {"find": "structure"},
        [{"find": "structure"}] * 2,
    ]


def test_reports(server):
    backend = endpoint(server)
    assert backend.last_report is None
    state = run(roles, backend, documents=["one"], question="?")
    report = report_of(state, "answer")
    assert report == backend.last_report
    assert report["exactness"] == "composed"
    assert backend.pic_info() == {"version": "1"}


def test_plain_server(plain_server):
    backend = endpoint(plain_server)
    assert backend.pic_info() is None
    state = run(roles, backend, documents=["one"], question="?")
    assert state["answer"] == "".join(ANSWER)
    assert report_of(state, "answer") is None
    assert backend.last_report is None


def test_a_text_without_segments_may_be_searched(server):
    program = sgl.function(lambda s: s.__iadd__("text" + sgl.gen("a", max_tokens=1)))
    program.run(backend=endpoint(server, find="content", seam=8))["a"]
    assert server.bodies[-1]["pic"] == {"seam": 8, "find": "content"}
    program.run(backend=endpoint(server, seam=8))["a"]
    assert "pic" not in server.bodies[-1]
    # What is to be exact is searched for nothing.
    endpoint(server, find="content").cache_prefix("text")
    assert "pic" not in server.bodies[-1]
    marked = sgl.function(lambda s: s.__iadd__(pic_segment("one") + sgl.gen("a", max_tokens=1)))
    marked.run(backend=endpoint(server, find="content"))["a"]
    assert "find" not in server.bodies[-1]["pic"]


def test_a_states_segments_are_compiled_in_company(server):
    @sgl.function
    def program(s):
        s += sgl.user("Read. " + pic_segment("one") + pic_segment("") + pic_segment("two") + "!")
        s += sgl.assistant(sgl.gen("answer"))

    backend = endpoint(server, cache_salt="us", company="subset")
    state = program.run(backend=backend)
    state.sync()
    assert server.bodies[-1]["pic"]["company"] == "subset"
    assert backend.compile_company(state) == [{"segments": ["id"] * 2, "tokens_computed": 7}]
    opening = state.text()[: state.text().index("one")]
    assert opening.endswith("Read. ")
    assert server.bodies[-1] == {
        "text": ["one", "two"], "opening": opening, "company": True, "cache_salt": "us"
    }  # fmt: skip
    with pytest.raises(ValueError, match="without segments"):
        backend.compile_company(sgl.function(lambda s: s.__iadd__("text")).run(backend=backend))


def test_any_backend_sees_plain_text():
    backend = Echo()
    state = run(roles, backend, documents=["one", "two"], question="?")

    @sgl.function
    def unmarked(s):
        s += sgl.system("Be brief. TOOLS ä𝄞")
        s += sgl.user("one\ntwo\n?")
        s += sgl.assistant(sgl.gen("answer"))

    assert run(unmarked, backend).text() == state.text()
    assert backend.texts[0] == backend.texts[1]


def test_errors_reach_the_program(server):
    with pytest.warns(UserWarning, match="refused"), pytest.raises(RuntimeError, match="refused"):
        run(roles, endpoint(server), documents=["refuse"], question="?")


def test_images_are_refused(server, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"not really")

    @sgl.function
    def program(s, document):
        s += sgl.user(sgl.image(str(picture)) + "Look." + document)
        s += sgl.assistant(sgl.gen("answer"))

    run(program, endpoint(server), document="plain")
    assert "image_data" in server.bodies[0]
    with pytest.warns(UserWarning, match="images"), pytest.raises(ValueError, match="images"):
        run(program, endpoint(server), document=pic_segment("marked"))


# -- the example programs -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["rag", "multi_agent"])
@pytest.mark.parametrize("links", [True, False])
def test_examples(name, links, monkeypatch, capsys):
    with serving(links) as fake:
        monkeypatch.setattr(sys, "argv", [name, "--url", fake.url])
        runpy.run_module(f"sglang_pic.eval.examples.{name}", run_name="__main__")
        marks = [texts for texts in fake.marked() if texts]
    out = capsys.readouterr().out
    assert "forty-two." in out
    assert ("reused" in out) is links
    assert ("plain SGLang" in out) is not links
    assert len(marks) >= 3
    assert all(len(text.split()) >= 60 for texts in marks for text in texts)
    # Shared texts in different orders.
    assert len({tuple(texts) for texts in marks}) >= 3
    assert len({text for texts in marks for text in texts}) < sum(map(len, marks))
