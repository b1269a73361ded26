"""How a batch's visibility rule reaches the model's attention layers: one small interface, five backends.

    sdpa, eager   a dense [B, 1, T, T] mask (boolean or float); any device; one group per row, as a mask over several is
                  mostly empty
    segments      sdpa segment by segment, without the scores that nothing sees; any device, the default on the CPU
    flex          FlexAttention with a BlockMask; CUDA; many groups per row
    varlen        flash attention over segments, each with its prompt's and its own keys; CUDA; many groups per row

"segments", "flex" and "varlen" are registered under names of their own through transformers' `AttentionInterface` (some
model classes refuse its stock "flex_attention"). Given a plain mask instead of a packed batch's, they run sdpa:
generation and the `rows` layout work whatever is set.
"""

from silkie.model.attention.api import (
    BACKENDS,
    IMPLEMENTATIONS,
    ONE_GROUP_PER_ROW,
    Attention,
    Backend,
    why_not_available,
)

__all__ = ["BACKENDS", "IMPLEMENTATIONS", "ONE_GROUP_PER_ROW", "Attention", "Backend", "why_not_available"]
