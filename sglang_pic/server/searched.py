"""The prompts of a request, one by one, as far as segments are looked for in them."""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.errors import PicRequestError

Owner = tuple[str | None, str | None, str | None]


@dataclasses.dataclass(frozen=True)
class Searched:
    """One prompt.

    Attributes:
        prompt: a text, or token ids.
        pic: its object, or ``None``.
        owner: its salt, extra key and adapter.
    """

    prompt: str | list[int]
    pic: Any
    owner: Owner


def names_none(pic: Any) -> bool:
    """Whether a request's ``pic`` object, a list of them, or the lack of one, names no
    segment."""
    if isinstance(pic, list):
        return all(one is None or isinstance(one, dict) for one in pic) and all(
            map(names_none, pic)
        )
    return pic is None or (
        isinstance(pic, dict) and not pic.get("segments") and pic.get("parts") is None
    )


def prompts_of(obj: GenerateReqInput, pic: Any) -> list[Searched] | None:
    """The prompts of a request; ``None`` if they are not of text alone, or SGLang is to say
    what is wrong with them.

    Args:
        pic: its object, or of a batch a list of them, one a prompt.

    Raises:
        PicRequestError: there are not as many.
    """
    media = (obj.image_data, obj.video_data, obj.audio_data, obj.input_embeds)
    if any(one for one in media if one is not None) or obj.session_params is not None:
        return None
    given: Any = obj.text if obj.text is not None else obj.input_ids
    if _is_prompt(given):
        if isinstance(pic, list):
            raise PicRequestError("pic", "must be one object, the request has one prompt")
        owner = (obj.cache_salt, obj.extra_key, obj.lora_path)
        return (
            None if any(isinstance(one, list) for one in owner) else [Searched(given, pic, owner)]
        )
    if not isinstance(given, list) or not all(map(_is_prompt, given)):
        return None
    n = len(given)
    pics = [None] * n if pic is None else pic
    if not isinstance(pics, list) or len(pics) != n:
        raise PicRequestError("pic", f"must be a list of {n} objects, one a prompt")
    each = [
        one if isinstance(one, list) else [one] * n
        for one in (obj.cache_salt, obj.extra_key, obj.lora_path)
    ]
    if any(len(one) != n for one in each):
        return None
    return [Searched(*one) for one in zip(given, pics, zip(*each, strict=True), strict=True)]


def _is_prompt(given: Any) -> bool:
    if isinstance(given, list):
        return bool(given) and isinstance(given[0], int)
    return isinstance(given, str)
