"""The built-in timer: own times, everything put back, and what a server shows."""

from __future__ import annotations

import sys
import time
import types

import pytest
import torch
from linking import fresh_salt, ids_of

from sglang_pic.eval.serving import Server
from sglang_pic.timer import ENGINE_STAGES, FRONT_STAGES, HOOKS, LOGITS, Stage, Timer


class Outer:
    def inherited(self) -> None:
        time.sleep(0.01)


class Inner(Outer):
    def run(self) -> str:
        time.sleep(0.02)
        self.inherited()
        return "done"

    def fail(self) -> None:
        raise ValueError("on purpose")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    made = types.ModuleType("timed_module")
    made.Inner = Inner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timed_module", made)
    return "timed_module.Inner."


def test_own_time_leaves_out_what_is_counted_elsewhere(module: str) -> None:
    timer = Timer((Stage("run", module + "run"), Stage("inherited", module + "inherited")))
    timer.start()
    begin = time.perf_counter()
    assert Inner().run() == "done" and timer.is_on
    spent = time.perf_counter() - begin
    timer.stop()
    (calls, run), (inner_calls, inherited) = timer.totals["run"], timer.totals["inherited"]
    assert calls == inner_calls == 1
    assert run >= 0.02 and inherited >= 0.01
    assert run + inherited <= spent
    whole = Timer((Stage("run", module + "run"),))
    whole.start()
    Inner().run()
    whole.stop()
    assert whole.totals["run"][1] >= 0.03


def test_stopping_puts_the_very_functions_back(module: str) -> None:
    before = dict(vars(Inner))
    timer = Timer((Stage("run", module + "run"), Stage("inherited", module + "inherited")))
    for _ in range(2):
        timer.start()
        timer.start()
        assert Inner.run is not before["run"] and "inherited" in vars(Inner)
        timer.stop()
        timer.stop()
        assert dict(vars(Inner)) == before
    timer.start()
    assert timer.totals == {}
    timer.stop()


def test_a_stage_that_raises_is_counted_and_leaves_the_rest_right(module: str) -> None:
    timer = Timer((Stage("fail", module + "fail"), Stage("run", module + "run")))
    timer.start()
    with pytest.raises(ValueError, match="on purpose"):
        Inner().fail()
    Inner().run()
    timer.stop()
    assert timer.to_json()["stages"]["fail"]["calls"] == 1
    assert timer.totals["run"][1] >= 0.03


def test_the_parts_of_decoder_layers_are_watched() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn, self.mlp = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(self.self_attn(x))

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Layer(), Layer()])
    model.logits_processor = torch.nn.Identity()
    timer = Timer(())
    timer.start(model)
    x = torch.zeros(1, 2)
    for layer in model.layers:
        x = layer(x)
    model.logits_processor(x)
    timer.stop()
    assert {name: total[0] for name, total in timer.totals.items()} == {
        "attention layers": 2,
        "mlp": 2,
        LOGITS: 1,
    }
    assert not model.layers[0].mlp._forward_hooks and not model.layers[0].mlp._forward_pre_hooks


@pytest.mark.server
def test_a_server_says_where_the_time_went(page1: Server) -> None:
    ids = ids_of(7, 100)
    body = {
        "input_ids": ids,
        "pic": {"segments": [{"start": 0, "end": 40}, {"start": 40, "end": 90}]},
        "sampling_params": {"max_new_tokens": 2, "temperature": 0},
        "cache_salt": fresh_salt(),
    }
    untimed = page1.generate(**body)
    shown = page1.post("/pic/timer", {"on": True}).json()
    assert shown["front"] == {"on": True, "stages": {}} and shown["ranks"][0]["on"]
    assert page1.generate(**body)["output_ids"] == untimed["output_ids"]
    shown = page1.post("/pic/timer", {"on": False}).json()
    stages = shown["ranks"][0]["stages"]
    for name in (HOOKS, "match", "plan", "arrange", "attention layers", "mlp", LOGITS, "sample"):
        assert stages[name]["calls"] > 0 and stages[name]["seconds"] > 0, name
    assert stages["plan"]["calls"] == 1
    assert shown["front"]["stages"][HOOKS]["calls"] >= 2
    page1.generate(**body)
    again = page1.get("/pic/timer").json()
    assert not again["front"]["on"] and again["ranks"][0]["stages"] == stages
    wrongs = (({}, "on"), ({"on": 1}, "on"), ({"on": True, "off": False}, "off"), ([True], "body"))
    for wrong, named in wrongs:
        refused = page1.post("/pic/timer", wrong)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == named


def test_every_stage_is_there() -> None:
    timer = Timer((*FRONT_STAGES, *ENGINE_STAGES))
    timer.start()
    timer.stop()
