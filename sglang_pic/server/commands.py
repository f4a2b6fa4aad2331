"""Send commands to the schedulers' caches (``manage.commands``) and read the results."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.runtime_context import get_parallel

from sglang_pic.errors import PicRefused
from sglang_pic.request.base import LinkRequest
from sglang_pic.request.commands import Command
from sglang_pic.request.hints import DONE
from sglang_pic.request.internal import command_hints, link_hints


async def command(
    manager: Any,
    do: str,
    *,
    ids: Sequence[int] = (0,),
    link: LinkRequest | None = None,
    cache_salt: str | None = None,
    extra_key: str | None = None,
    lora_path: str | None = None,
    rank: int | None = None,
    **fields: Any,
) -> list[Any]:
    """Have every data-parallel rank carry out a command.

    Args:
        manager: SGLang's tokenizer manager.
        do: name of the command.
        ids, link, cache_salt, extra_key, lora_path: the request that the command is about.
        rank: the one rank to ask, instead of all.
        fields: further fields of the command, JSON.

    Returns:
        One result a rank, of those that know the segment if it is about one.

    Raises:
        PicRefused: no rank knows it, or one refuses for another reason.
        ValueError: SGLang refuses such a request.
    """
    made = command_hints(msgspec.convert({"do": do, **fields}, Command))
    if link is not None:
        made.actions.extend(link_hints(link).actions)
    ranks = get_parallel().dp_size
    results = await asyncio.gather(
        *(
            _send(
                manager,
                GenerateReqInput(
                    input_ids=list(ids),
                    sampling_params={"max_new_tokens": 0},
                    cache_salt=cache_salt,
                    extra_key=extra_key,
                    lora_path=lora_path,
                    # Its tokens are of prompts that may not be logged.
                    no_logs=True,
                    kv_hints=made,
                    routed_dp_rank=one if ranks > 1 else None,
                ),
            )
            for one in (range(ranks) if rank is None else [rank])
        )
    )
    answers = [result for result in results if not _is_refusal(result)]
    refusals = [result["refused"] for result in results if _is_refusal(result)]
    # A segment may be on some of the ranks only: the others' 404 is no refusal.
    graver = [refusal for refusal in refusals if refusal["status"] != 404]
    if graver or not answers:
        raise PicRefused(**(graver or refusals)[0])
    return answers


def _is_refusal(result: Any) -> bool:
    # Statistics count refusals under the same name, among others.
    return isinstance(result, dict) and result.keys() == {"refused"}


async def _send(manager: Any, obj: GenerateReqInput) -> Any:
    unhooked = type(manager).generate_request.__wrapped__
    try:
        out = await anext(unhooked(manager, obj))
        message = out["meta_info"]["finish_reason"]["message"]
    except ValueError as error:
        message = str(error)
        if not message.startswith(DONE):
            raise
    if not message.startswith(DONE):
        raise RuntimeError(f"the scheduler did not carry out a command: {message}")
    return orjson.loads(message.removeprefix(DONE))
