"""What ends stock SGLang's scheduler is refused, and is still in stock SGLang."""

from __future__ import annotations

import copy
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from linking import VOCAB, fresh_salt
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from sglang_pic.errors import PicRequestError
from sglang_pic.eval.serving import Server
from sglang_pic.server import bounds

LOGPROBS = {"return_logprob": True}


def sampling(**params: Any) -> dict[str, Any]:
    return {"sampling_params": {"max_new_tokens": 2, **params}}


# One case or more for each bound, with the field that the refusal names.
OUTSIDE: list[tuple[str, dict[str, Any]]] = [
    ("input_ids", {"input_ids": [1, VOCAB, 2]}),
    ("input_ids", {"input_ids": [1, -1]}),
    ("logprob_start_len", {**LOGPROBS, "logprob_start_len": -5}),
    ("top_logprobs_num", {**LOGPROBS, "top_logprobs_num": 100_000}),
    ("top_logprobs_num", {**LOGPROBS, "top_logprobs_num": -2}),
    ("sampling_params.stop_token_ids", sampling(stop_token_ids=[VOCAB + 7])),
    ("sampling_params.logit_bias", sampling(logit_bias={"1": 1e300}, temperature=1)),
    ("sampling_params.repetition_penalty", sampling(repetition_penalty=1e-40, temperature=1)),
    ("sampling_params.top_k", sampling(top_k=2**31, temperature=1)),
]
NOTHING_NEW = sampling(max_new_tokens=0)
OUTSIDE += [
    (name, {name: [place], **NOTHING_NEW})
    for name in ("multi_item_delimiter_indices", "token_indices_to_pool")
    for place in (3, -1)
]
DEEP = "(" * 100_000 + "a" + ")" * 100_000
OUTSIDE += [
    (f"sampling_params.{name}", sampling(**{name: grammar}))
    for name, grammar in {
        "json_schema": json.dumps({"type": "string", "pattern": DEEP}),
        "regex": DEEP,
        "ebnf": f"root ::= {DEEP}",
        "structural_tag": json.dumps({"type": "structural_tag", "format": {"pattern": DEEP}}),
    }.items()
]
# Of a single prompt SGLang's front looks.
EMPTY = [("input_ids", {"input_ids": [[], [1, 2]]})]
# Only where there is a tokenizer.
OF_TEXT: list[tuple[str, dict[str, Any]]] = [
    ("sampling_params.stop_regex", sampling(stop_regex=pattern))
    for pattern in ("(.+)+Q", ["x", "(?:(a*)b?)*Q"], "(.*?(?=b))+", "((a|b+)c){2,}")
]
# What the scheduler's decoder does not take for what the field is.
UNREADABLE: list[tuple[str, dict[str, Any]]] = [
    (f"sampling_params.{name}", sampling(**{name: value}))
    for name, value in {
        "top_k": 1.5,
        "max_new_tokens": 1.5,
        "stream_interval": "x",
        "regex": 5,
        "json_schema": {"type": "object"},
        "ignore_eos": "yes",
        "skip_special_tokens": 2,
        "custom_params": {"a": {"b": {}}},
        "logit_bias": {"1": None},
        "temperature": True,
        "sampling_seed": False,
        "no_stop_trim": [],
    }.items()
]
# Refused before SGLang makes requests of it.
BEFORE: list[tuple[str, dict[str, Any]]] = [
    ("sampling_params.n", sampling(n=10**9)),
    ("sampling_params.is_normalized", sampling(is_normalized=True, temperature=0)),
    ("sampling_params.stop_str_max_len", sampling(stop_str_max_len=-1)),
]
INSIDE: list[dict[str, Any]] = [
    {},
    {"input_ids": [0, VOCAB - 1]},
    {**LOGPROBS, "logprob_start_len": 0, "top_logprobs_num": VOCAB},
    {"token_indices_to_pool": [0, 2], **NOTHING_NEW},
    sampling(top_k=2**31 - 1, sampling_seed=2**63 - 1),
    sampling(stop_regex=["a+b*", "(ab+){3}", "(foo|ba{2})+", r"\d+\.\d*"]),
    sampling(json_schema='{"pattern": "^(a|(b)(c))(\\\\(){3}$"}'),
    sampling(regex="(a)" * 5000),
    sampling(
        stop_token_ids=[0, VOCAB - 1, None],
        logit_bias={"0": -100, str(VOCAB - 1): 1e30},
        repetition_penalty=0.01,
        custom_params={"a": [1, "x"], "b": {"c": None}},
        max_new_tokens=None,
        temperature=None,
    ),
]


def front() -> Any:
    """As much of SGLang's front as makes a prompt ready to be sent."""
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))
    manager = object.__new__(TokenizerManager)
    stats = SimpleNamespace(set_tokenize_finish_time=lambda: None)
    manager.rid_to_state = defaultdict(lambda: SimpleNamespace(time_stats=stats))
    manager.preferred_sampling_params = None
    manager.tokenizer = SimpleNamespace(encode=lambda *_, **__: [])
    manager.sampling_params_class = SamplingParams
    manager.tokenized_generate_req_type = io_struct.TokenizedGenerateReqInput
    manager.model_config = SimpleNamespace(vocab_size=VOCAB)
    return manager


def stock(request: dict[str, Any]) -> Any:
    """What stock's front sends to its scheduler."""
    obj = GenerateReqInput(**{"input_ids": [1, 2, 3], "rid": "r", **copy.deepcopy(request)})
    obj.normalize_batch_and_arguments()
    one = obj if obj.is_single else obj[0]
    return front()._create_tokenized_object(one, None, one.input_ids)


def ids(cases: list[tuple[str, Any]]) -> list[str]:
    return [f"{i}-{field}" for i, (field, _) in enumerate(cases)]


ALL = OUTSIDE + EMPTY + OF_TEXT + UNREADABLE


@pytest.mark.parametrize(("field", "request_"), ALL, ids=ids(ALL))
def test_stock_lets_it_through_and_we_do_not(field: str, request_: dict[str, Any]) -> None:
    """The first half fails when SGLang mends it; then the entry goes."""
    sent = stock(request_)
    with pytest.raises(PicRequestError) as refused:
        bounds.check_sent(sent, VOCAB)
    assert refused.value.field == field


@pytest.mark.parametrize(("field", "request_"), UNREADABLE, ids=ids(UNREADABLE))
def test_its_scheduler_cannot_read_it(field: str, request_: dict[str, Any]) -> None:
    sent = stock(request_)
    sent.time_stats = None
    with pytest.raises(msgspec.ValidationError):
        io_struct.msgpack_decode(io_struct.msgpack_encode(sent))


def test_what_the_scheduler_would_compute() -> None:
    """The flaws behind the bounds, as SGLang's own parts have them."""
    with pytest.raises(IndexError):
        torch.nn.functional.embedding(torch.tensor([VOCAB]), torch.zeros(VOCAB, 2))
    with pytest.raises(RuntimeError):
        torch.zeros(VOCAB).topk(VOCAB + 1)
    assert math.isinf(torch.tensor([1e300]).item())
    with pytest.raises(RuntimeError):
        torch.tensor([2**31], dtype=torch.int32)
    with pytest.raises(IndexError):
        torch.zeros(3, 2)[torch.tensor([3])]
    with pytest.raises(RuntimeError):
        torch.zeros(0, 16).view(0, -1, 16)
    began = time.perf_counter()
    assert re.search("(.+)+Q", "a" * 12) is None
    short = time.perf_counter() - began
    assert re.search("(.+)+Q", "a" * 20) is None
    assert time.perf_counter() - began > 30 * short
    logits = torch.tensor([[30.0, 20.0]]) / torch.tensor(1e-40)
    with pytest.raises(RuntimeError):
        torch.multinomial(logits.softmax(-1), 1)


def test_a_deep_pattern_ends_the_process_that_parses_it() -> None:
    program = "import sys, xgrammar; xgrammar.Grammar.from_json_schema(sys.stdin.read())"
    schema = json.dumps({"type": "string", "pattern": DEEP})
    made = subprocess.run(
        [sys.executable, "-c", program], input=schema, capture_output=True, text=True, timeout=600
    )
    assert made.returncode == -signal.SIGSEGV, made.stderr[-2000:]


@pytest.mark.parametrize("request_", INSIDE)
def test_the_rest_is_sent(request_: dict[str, Any]) -> None:
    bounds.check_sent(stock(request_), VOCAB)
    bounds.check_samples(GenerateReqInput(input_ids=[1], **{"sampling_params": {}, **{
        k: v for k, v in request_.items() if k == "sampling_params"
    }}))  # fmt: skip


@pytest.mark.parametrize(("field", "request_"), BEFORE, ids=ids(BEFORE))
def test_what_is_refused_before_anything_is_made_of_it(field: str, request_: Any) -> None:
    obj = GenerateReqInput(input_ids=[1], **request_)
    for params in (obj.sampling_params, [{}, obj.sampling_params]):
        obj.sampling_params = params
        with pytest.raises(PicRequestError) as refused:
            bounds.check_samples(obj)
        assert refused.value.field == field


def test_every_bound_has_a_case() -> None:
    assert {field for field, _ in OUTSIDE + OF_TEXT} == {bound.field for bound in bounds.BOUNDS}
    assert all(bound.reason for bound in bounds.BOUNDS)


# -- on a server --------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.parametrize(
    ("field", "request_"), OUTSIDE + UNREADABLE + BEFORE, ids=ids(OUTSIDE + UNREADABLE + BEFORE)
)
def test_a_server_refuses_it_and_goes_on(
    page1: Server, field: str, request_: dict[str, Any]
) -> None:
    one = {"input_ids": [1, 2, 3], **sampling(), **request_}
    marked = {**one, "pic": {"segments": [{"start": 0, "end": 1}]}, "cache_salt": fresh_salt()}
    batch = {**one, "input_ids": [[4, 5], one["input_ids"]]}
    if isinstance(one.get(field), list) and field != "input_ids":
        batch[field] = [[0], one[field]]  # one list a prompt
    for sent in (one, marked, batch):
        response = page1.post("/generate", sent)
        assert response.status_code == 400, (sent, response.text)
        # A body's own parameters SGLang reads by type, in words of its own.
        own = any(words in response.text for words in ("invalid type", "unknown field"))
        assert own or field in response.text
        assert page1.generate(input_ids=[1, 2], **sampling())


@pytest.mark.server
@pytest.mark.parametrize("prompts", [[[]], [[1, 2], []], []])
def test_an_empty_prompt_ends_its_request_alone(page1: Server, prompts: list[Any]) -> None:
    response = page1.post("/generate", {"input_ids": prompts, **sampling()})
    assert response.status_code == 400 and "empty" in response.text, response.text
    assert page1.generate(input_ids=[1, 2], **sampling())


@pytest.mark.server
def test_prompts_of_token_ids_on_the_openai_routes(smollm: Server) -> None:
    for prompt in ([1, 10**6], [[1, 2], [3, -1]]):
        response = smollm.post("/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 1})
        assert response.status_code == 400, response.text
        assert "input_ids" in response.text
    chat = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    for field, sent in (
        ("top_logprobs_num", {"logprobs": True, "top_logprobs": 10**6}),
        ("sampling_params.logit_bias", {"logit_bias": {"1": 1e300}}),
        ("sampling_params.stop_regex", {"stop_regex": "(.+)+Q"}),
        ("sampling_params.custom_params", {"custom_params": {"a": {"b": {}}}}),
    ):
        response = smollm.post("/v1/chat/completions", {**chat, **sent})
        assert response.status_code == 400 and field in response.text, response.text
    assert smollm.post("/v1/chat/completions", chat).status_code == 200
