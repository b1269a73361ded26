"""Rows of packed groups and their visibility, against a slow definition written token by token."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silkie.batch.packing import (
    PromptAndResponses,
    Segment,
    Tree,
    lineage,
    pack,
    stems,
    subtree_ends,
    token_uses,
    visible,
)

SIZES = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 4), min_size=1, max_size=4)), min_size=1, max_size=4
)
MANY = settings(max_examples=60, deadline=None)


def build(sizes, channels=3):
    """Token ids are unique numbers, so that every place can be named."""
    out, next_id = [], 1
    for prompt, responses in sizes:

        def take(n):
            nonlocal next_id
            next_id += n
            return torch.arange(next_id - n, next_id)

        positions = (
            torch.arange(prompt).expand(channels, -1) // 2
        )  # as after an image: the largest position is below the length
        out.append(
            PromptAndResponses(
                prompt_ids=take(prompt),
                prompt_positions=positions,
                token_inputs={"mm_token_type_ids": torch.zeros(prompt, dtype=torch.long)},
                responses=[take(n) for n in responses],
            )
        )
    return out


@MANY
@given(SIZES, st.sampled_from([1, 2, None]), st.sampled_from(["packed", "rows"]))
def test_every_scored_token_is_predicted_by_the_token_before_it(sizes, per_row, layout):
    groups = build(sizes)
    batch = pack(groups, layout, pad_id=0, groups_per_row=per_row)
    flat, expected = batch.input_ids.flatten(), []
    for group in groups:
        for response in group.responses:
            expected += list(zip([int(group.prompt_ids[-1]), *response[:-1].tolist()], response.tolist(), strict=True))
    assert list(zip(flat[batch.gather].tolist(), batch.target.tolist(), strict=True)) == expected
    owners = [r for r, n in enumerate(len(r) for g in groups for r in g.responses) for _ in range(n)]
    assert batch.owner.tolist() == owners


@MANY
@given(SIZES, st.sampled_from([1, 2, None]))
def test_positions_restart_after_the_prompt(sizes, per_row):
    groups = build(sizes)
    batch = pack(groups, "packed", pad_id=0, groups_per_row=per_row)
    for group in groups:
        restart = int(group.prompt_positions.max()) + 1
        for response in group.responses:
            for step, token in enumerate(response.tolist()):
                place = batch.input_ids == token
                assert batch.position_ids[:, place].flatten().tolist() == [restart + step] * 3
                assert batch.logical_positions[place].item() == len(group.prompt_ids) + step


@MANY
@given(SIZES, st.sampled_from([1, None]), st.sampled_from([None, 2, 3]))
def test_a_token_sees_its_prompt_and_the_earlier_of_its_own_response(sizes, per_row, window):
    groups = build(sizes)
    batch = pack(groups, "packed", pad_id=0, groups_per_row=per_row)
    mask = visible(batch.segment_index, batch.subtree_end, batch.logical_positions, window=window)[:, 0]
    sequences = [[*g.prompt_ids.tolist(), *r.tolist()] for g in groups for r in g.responses]
    for b, row in enumerate(batch.input_ids.tolist()):
        for q, query in enumerate(row):
            seen = {row[k] for k in range(len(row)) if mask[b, q, k]}
            if query == 0:
                assert mask[b, q].nonzero().flatten().tolist() == [q]  # padding sees itself
                continue
            sequence = next(s for s in sequences if query in s)
            at = sequence.index(query)
            assert seen == set(sequence[max(0, at - window + 1) if window else 0 : at + 1])


def test_image_blocks_see_both_ways_within_their_segment_and_window():
    batch = pack(build([(4, [2]), (3, [1])]), "packed", pad_id=0, groups_per_row=None)
    blocks = torch.tensor(
        [[-1, 0, 0, 0, -1, -1, 0, -1, -1, -1]]
    )  # the number 0 again in the second group: other segments stay hidden
    mask = visible(batch.segment_index, batch.subtree_end, batch.logical_positions, bidirectional=blocks)[0, 0]
    assert mask[1, 3] and mask[3, 1] and not mask[1, 6] and not mask[0, 1]
    narrow = visible(batch.segment_index, batch.subtree_end, batch.logical_positions, bidirectional=blocks, window=2)[
        0, 0
    ]
    assert (
        narrow[1, 3] and narrow[3, 2] and not narrow[3, 1]
    )  # the window ends what lies behind; ahead the block decides


# one image, two questions about it, two and one responses; then a group of depth two, and the padding of the row
TREE = [(4, None), (2, 0), (3, 1), (1, 1), (3, 0), (2, 4), (5, None), (2, 6), (2, None)]


def tree(padded=True):
    """The segments of one row of 24 tokens, and the tensors that the masks read."""
    found, at = [], 0
    for length, parent in TREE:
        found.append(Segment(0, at, at + length, parent, padding=padded and at == 22))
        at += length
    index, end, logical = (torch.zeros(1, at, dtype=torch.long) for _ in range(3))
    for n, (s, subtree) in enumerate(zip(found, subtree_ends(found), strict=True)):
        before = sum(a.length for a in lineage(found, n)[:-1])
        index[0, s.start : s.end], end[0, s.start : s.end] = n, subtree
        logical[0, s.start : s.end] = 0 if s.padding else torch.arange(before, before + s.length)
    return found, index, end, logical


def test_a_segment_sees_its_ancestors_whatever_their_depth():
    found, index, end, logical = tree()
    assert subtree_ends(found) == [6, 4, 3, 4, 6, 6, 8, 8, 0]
    mask = visible(index, end, logical)[0, 0]
    for n, own in enumerate(found):
        ancestors = [t for a in lineage(found, n)[:-1] for t in range(a.start, a.end)]
        for query in range(own.start, own.end):
            expected = [query] if own.padding else [*ancestors, *range(own.start, query + 1)]
            assert mask[query].nonzero().flatten().tolist() == expected


def test_rows_hold_each_response_once_not_once_per_pair():
    batch = pack(build([(3, [1, 2, 2, 1])]), "rows", pad_id=0)
    assert batch.input_ids.shape == (4, 5) and batch.row_trees == [[0]] * 4


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="'packed' or 'rows', not 'dense'"):
        pack(build([(1, [1])]), "dense", pad_id=0)


def along(batch, token):
    """Ids, positions and logical positions of all that a token sees, itself included, in the order of its sequence."""
    row, at = (batch.input_ids == token).nonzero()[0].tolist()
    seen = visible(batch.segment_index, batch.subtree_end, batch.logical_positions)[row, 0, at].nonzero().flatten()
    seen = seen[batch.logical_positions[row, seen].argsort()]
    logical, ids = batch.logical_positions[row, seen], batch.input_ids[row, seen]
    return ids.tolist(), batch.position_ids[:, row, seen].tolist(), logical.tolist()


@MANY
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3)), min_size=1, max_size=4),
    st.sampled_from([1, None]),
    st.integers(0, 100),
)
def test_a_tree_shows_every_token_what_its_own_row_does(stem, sizes, per_row, order):
    """Two trees, their groups interleaved, and one group alone."""
    twice = build([(stem + prompt, responses) for prompt, responses in [*sizes, *sizes, (3, [2])]])
    members = (range(len(sizes)), range(len(sizes), 2 * len(sizes)))
    for groups in members:
        for g in groups:
            twice[g].prompt_ids[:stem] = twice[groups[0]].prompt_ids[:stem]
    places = torch.randperm(len(twice), generator=torch.Generator().manual_seed(order)).tolist()
    groups = [twice[g] for g in places]
    trees = [Tree(tuple(places.index(g) for g in own), stem if len(own) > 1 else 0) for own in members]
    trees.append(Tree((places.index(len(twice) - 1),)))
    found = pack(groups, "packed", pad_id=0, trees=trees, groups_per_row=per_row)
    alone = pack(groups, "packed", pad_id=0, groups_per_row=per_row)
    for name in ("target", "owner", "offset"):
        assert torch.equal(getattr(found, name), getattr(alone, name))
    assert torch.equal(found.input_ids.flatten()[found.gather], alone.input_ids.flatten()[alone.gather])
    for group in groups:
        for token in [*group.prompt_ids[stem:].tolist(), *(t for r in group.responses for t in r.tolist())]:
            assert along(found, token) == along(alone, token)
    real = sum(s.length for s in found.segments if not s.padding)
    saved = stem * 2 * (len(sizes) - 1)
    assert real == sum(s.length for s in alone.segments if not s.padding) - saved
    assert [s.length for s in stems(found.segments)] == ([stem, stem] if len(sizes) > 1 else [])


def test_rows_share_no_stem():
    with pytest.raises(ValueError, match="shares no stems"):
        pack(build([(3, [1]), (3, [1])]), "rows", pad_id=0, trees=[Tree((0, 1), 1)])


@MANY
@given(SIZES, st.sampled_from([1, 2, None]), st.sampled_from(["packed", "rows"]), st.data())
def test_token_uses_count_the_rows_that_every_use_of_a_response_would_make(sizes, per_row, layout, data):
    """Token ids are unique: counted over rows of prompt and response, written out."""
    groups = build(sizes)
    batch = pack(groups, layout, pad_id=0, groups_per_row=per_row)
    flat = [(group, response) for group in groups for response in group.responses]
    uses = data.draw(st.lists(st.integers(0, 3), min_size=len(flat), max_size=len(flat)).filter(any))
    expected = Counter()
    for times, (group, response) in zip(uses, flat, strict=True):
        for token in (*group.prompt_ids.tolist(), *response.tolist()):
            expected[token] += times
    counted = token_uses(batch, torch.tensor(uses, dtype=torch.float32))
    found = Counter()
    for token, n in zip(batch.input_ids.flatten().tolist(), counted.flatten().tolist(), strict=True):
        found[token] += int(n)
    assert +found == +expected and found[0] == 0
    unused = token_uses(batch, torch.zeros(len(flat)))
    assert torch.equal(unused, (batch.segment_ids >= 0).float())


def test_a_stem_is_used_by_every_response_behind_it():
    groups = build([(4, [2, 1]), (5, [3])])
    for group in groups:
        group.prompt_ids[:2] = torch.tensor([90, 91])
    batch = pack(groups, "packed", pad_id=0, trees=[Tree((0, 1), stem=2)])
    counted = token_uses(batch, torch.tensor([1.0, 2.0, 4.0]))
    assert counted[0].tolist() == [7] * 2 + [3] * 2 + [1] * 2 + [2] + [4] * 3 + [4] * 3


@pytest.mark.parametrize(("multiple", "length"), [(1, 9), (4, 12), (9, 9), (64, 64)])
def test_rows_are_padded_to_a_multiple(multiple, length):
    batch = pack(build([(4, [2, 3]), (2, [1])]), "packed", pad_id=0, multiple=multiple)
    assert batch.input_ids.shape == (2, length) and int((batch.segment_ids >= 0).sum()) == 9 + 3
