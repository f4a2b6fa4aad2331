"""Log-probabilities of a forced answer are those that it was forced against."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linking import TOLERANCE, VOCAB, assemble, fresh_salt, ids_of, model

from sglang_pic.eval import forced
from sglang_pic.eval.oracle import dense
from sglang_pic.eval.serving import Server


@given(
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([0.1, 1.0, 10.0, 30.0]),
    token=st.integers(0, 30),
)
def test_forcing_is_undone(seed: int, scale: float, token: int) -> None:
    spare = 31
    logits = scale * torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    logits[0, spare] = -200.0
    before = logits.log_softmax(-1)[0]
    params: list[dict[str, Any]] = [{"answer": [token], "spare": spare}]
    after = forced.ForceAnswer()(logits.clone(), params).log_softmax(-1)[0]
    assert after.argmax() == token
    step = forced.undo(dict(enumerate(after.tolist())), token, spare)
    assert set(step.listed) == set(range(32)) - {spare}
    for one, value in step.listed.items():
        assert value == pytest.approx(before[one].item(), abs=1e-4)
    assert step.likeliest == pytest.approx(before.max().item(), abs=1e-4)


def test_rows_are_forced_apart() -> None:
    params: list[dict[str, Any]] = [{"answer": [1, 2], "spare": 7}, {"answer": [3, 4], "spare": 7}]
    said = [forced.ForceAnswer()(torch.zeros(2, 8), params).argmax(-1).tolist() for _ in range(3)]
    assert said == [[1, 3], [2, 4], [2, 4]]


@pytest.mark.parametrize(("answer", "wanted"), [([5, 7], [1]), ([5], [1, 7])])
def test_the_spare_token_is_nobodys(answer: list[int], wanted: list[int]) -> None:
    with pytest.raises(ValueError, match="token 7"):
        forced.force(None, {}, answer, wanted, spare=7)  # type: ignore[arg-type]


@pytest.mark.server
def test_a_linked_answer_is_forced_as_an_oracle_is(page1: Server) -> None:
    parts = [("segment", ids_of(1, 40)), ("segment", ids_of(2, 33)), ("text", [1, 2])]
    ids, segments = assemble(parts)
    answer, spare = ids_of(3, 12), VOCAB - 1
    wanted = [one for one in range(VOCAB) if one != spare]
    answer = [one if one != spare else 0 for one in answer]
    pic = {"segments": [{"start": s, "end": e} for s, e in segments], "seam": 4}
    body = {"input_ids": ids, "cache_salt": fresh_salt(), "pic": pic}
    steps, meta = forced.force(page1, body, answer, wanted, spare)
    assert meta["pic"]["tokens_reused"] > 0
    expected = dense.linked_logprobs(
        model(), ids, segments, min_segment=1, n_new=12, forced=answer, seam=4, page=1
    ).full_logprobs
    # The tiny model would say the spare token now and then.
    kept = torch.tensor(wanted)
    expected = expected - expected[:, kept].logsumexp(-1, keepdim=True)
    for step, row in zip(steps, expected, strict=True):
        found = torch.tensor([step.listed[one] for one in wanted])
        assert (found - row[kept]).abs().max() < TOLERANCE
