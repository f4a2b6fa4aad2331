"""Does a composed state equal the one of a single pass, where it must?

What enters the first linear layer are a token's embedding and, through the
convolution, its neighbours'. Behind a head as wide as that a segment's core acts
on this layer's state as it would anywhere.
"""

from __future__ import annotations

import torch

from sglang_pic.attention.selfcheck import relative
from sglang_pic.checks import Check
from sglang_pic.kernels.operators.pair import Pair, apply
from sglang_pic.kernels.rotate import LayerRope
from sglang_pic.linear.state import CoreState
from sglang_pic.linear.step import turned

# A single pass and a segment are cut into chunks at other tokens, and inputs and
# stored states are rounded: by so many units in the last place.
STATE_ULPS = 8
STATE_BOUND = 1e-3


def first_layer_check(
    core: CoreState,
    before: torch.Tensor,
    behind: torch.Tensor,
    *,
    inputs: torch.dtype,
    rope: LayerRope | None = None,
    offset: int = 0,
) -> Check:
    """Compose the first linear layer's state over one core.

    Args:
        core: as a link would use it; its pair belongs to a segment compiled alone.
        before: [layers, heads, dk, dv], state in front of the core in a single pass.
        behind: the same behind it.
        inputs: dtype of the model's activations.
        rope: what turns the layer's keys, if anything does.
        offset: by how much the core stands behind where it was compiled.
    """
    assert core.pair is not None
    pair = core.pair.unpack()
    state = pair.B if rope is None else turned(pair.B, rope, offset)
    composed = apply(Pair(pair.A[0], state[0]), before[0].float())
    eps = max(torch.finfo(dtype).eps for dtype in (inputs, before.dtype))
    return Check(relative(composed, behind[0]), max(STATE_BOUND, STATE_ULPS * eps))
