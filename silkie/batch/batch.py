"""The tensors of one micro-batch, from `GroupCollator` to the losses.

Legend: G groups, R responses (flat over groups), P pairs, N scored tokens, B rows, T tokens of a row, A rating aspects,
C position channels (3 for Qwen's temporal, height and width; 1 elsewhere).
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from torch import Tensor

from silkie.batch.packing import Segment


class Batch(TypedDict):
    """One micro-batch. A plain dict at run time, so that data workers, pinned memory and transformers can move it.

    Rows of the forward pass:
        input_ids, segment_ids, segment_index, subtree_end, logical_positions: [B, T], see `silkie.batch.packing`.
        token_inputs: [B, T] each, further inputs of the model per token (`mm_token_type_ids`, ...), by name.
        position_ids: [C, B, T] rotary positions.
        vision: the processor's image tensors.
        row_trees, segments, response_segments: trees of groups that a row holds, the segments of all rows, and which
            of them each response is, as plain numbers.
        image_tokens: image tokens of each tree, in the order of the rows and of `vision`.
        image_keys: hashes of the encoded images of each tree; only where features are kept on disk.
        vision_sizes: image tensor -> its part of each tree, along the dimension where trees are joined.
        corrupted: `vision` of the corrupted images, for mDPO's second pass only, and whatever else of the above is
            another there.
        prompt_lengths: [G] tokens of each prompt, images expanded.
        as_rows: the same groups in the rows layout, for `predict` and `compute_metrics` only.
        token_uses: [B, T], see `silkie.batch.packing.token_uses`; only for the load balancing loss of packed routers.

    Scored tokens:
        gather: [N] flat position (b * T + t) of the hidden state that predicts a token.
        target: [N] its id.
        owner: [N] its response, in [0, R), never decreasing.
        offset: [N] its place within the response.
        lengths: [R] scored tokens of each response.
        longest: the largest of `lengths`.

    Preferences:
        group: [R] group of each response.
        pairs: [P, 2] (chosen, rejected) indices into R.
        pair_weights: fp32 [P].
        ratings: [R], aspect_ratings: [R, A], NaN where there is none. Only where the data has ratings.

    Labels, only for the losses that take no pairs (U labelled responses, M responses of other groups):
        examples: [U] index into R; desirable: [U] bool; example_weights: fp32 [U].
        mismatched: [M] indices into R of responses that belong to another group; mismatched_weights: fp32 [M].

    For people and caches:
        names: name of each group, for error messages.
        rows: row of each group in the dataset.
        window: of a stream, see `silkie.batch.streaming.Window`.
    """

    input_ids: Tensor
    segment_ids: Tensor
    segment_index: Tensor
    subtree_end: Tensor
    logical_positions: Tensor
    token_inputs: dict[str, Tensor]
    position_ids: Tensor
    vision: dict[str, Tensor]
    corrupted: NotRequired[dict[str, Any]]
    row_trees: list[list[int]]
    segments: list[Segment]
    response_segments: list[int]
    token_uses: NotRequired[Tensor]
    image_tokens: list[int]
    image_keys: NotRequired[list[list[str]]]
    vision_sizes: dict[str, list[int]]
    prompt_lengths: Tensor
    as_rows: NotRequired[Batch]

    gather: Tensor
    target: Tensor
    owner: Tensor
    offset: Tensor
    lengths: Tensor
    longest: int

    group: Tensor
    pairs: Tensor
    pair_weights: Tensor
    ratings: NotRequired[Tensor]
    aspect_ratings: NotRequired[Tensor]

    examples: NotRequired[Tensor]
    desirable: NotRequired[Tensor]
    example_weights: NotRequired[Tensor]
    mismatched: NotRequired[Tensor]
    mismatched_weights: NotRequired[Tensor]

    names: list[str]
    rows: list[Any]
    window: NotRequired[list[int]]

    _forks: NotRequired[Any]  # the plan of the recurrent layers, kept in the same way
    _attention_inputs: NotRequired[dict[Any, Any]]  # masks that `silkie.model.attention` keeps for the reference pass
