"""SGLang's own classes by their own names, an encoder beside each.

``ModelRegistry`` finds them here where the server has an encoder.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.models.qwen3_5_text import Qwen3_5ForCausalLM
from sglang.srt.runtime_context import get_parallel, get_server_args

from sglang_pic.config import PicConfig
from sglang_pic.encoder.beside import BesideModel
from sglang_pic.encoder.ranks import Rank


def crossed(stock: type[Any]) -> type[Any]:
    """A model class that has, as ``pic``, the encoder that the server was started with."""

    class Crossed(stock):
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            directory = PicConfig.from_env().encoder
            assert directory is not None
            parallel = get_parallel()
            rank = Rank(parallel.tp_rank, parallel.tp_size, tensor_model_parallel_all_reduce)
            self.pic = BesideModel(self, config, directory, get_server_args().model_path, rank)

    Crossed.__name__ = Crossed.__qualname__ = stock.__name__
    return Crossed


EntryClass = [
    crossed(one)
    for one in (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3_5ForCausalLM)
]
