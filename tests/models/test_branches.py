"""Rows written on in place against whole sequences, one at a time, by plain Hugging Face."""

from itertools import pairwise

import pytest
import torch
from plain import chat, forward

from zr.models import branches as module
from zr.models.branches import CachedBranches, WholeBranches, branch
from zr.models.prefix import WholePrefix

PROMPTS = ["red ring", "blue square, green triangle; yellow ring", "red"]
EXACT = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture
def floats(pictures):
    return [p / 255 for p in pictures]


@pytest.fixture(params=["states", "whole sequences"])
def encode(request, backbone):
    """``encode`` of a family, and of the same family as if it could keep no states."""
    return backbone.encode if request.param == "states" else backbone._read


def words(backbone):
    return backbone.prompts.user_ids("missing right nothing shape colour ring square")


def test_places_of_those_that_go_on():
    """Each that leaves changes places with the last one, worked by hand."""
    rows = branch(WholePrefix([[10 * i] for i in range(3)], [{}] * 3), torch.tensor([2, 0, 1, 2, 0]), 9)
    assert isinstance(rows, WholeBranches)
    assert (len(rows), rows.going) == (5, [0, 1, 2, 3, 4])
    rows.write([[i] for i in rows.going])
    assert rows.leave([1, 3]) == [0, 4, 2]
    assert (len(rows), rows.going, rows.order) == (3, [0, 4, 2], [0, 4, 2, 1, 3])
    assert rows.rows.ids == [[20, 0], [0, 4], [10, 2]]
    rows.write([[7], [8], [9]])
    assert rows.leave([0]) == [2, 1]
    assert rows.leave([1, 0]) == []
    assert (len(rows), rows.order) == (0, [2, 4, 0, 1, 3])
    rows.gather()
    assert rows.going == rows.order
    assert rows.rows.ids == [[10, 2, 9], [0, 4, 8], [20, 0, 7], [0, 1], [20, 3]]


@pytest.mark.parametrize("room", [1, 3, 128])
@torch.no_grad()
def test_rows_that_leave_at_different_times(backbone, encode, floats, monkeypatch, room):
    """Every state of every row is that of its own whole sequence, while buffers grow, and after all are called again."""
    monkeypatch.setattr(module, "ROOM", room)
    index, extra = [2, 0, 0, 1, 2, 1], words(backbone)
    question = backbone.prompts.suffix_ids("realism")
    rows = branch(encode(floats, PROMPTS), torch.tensor(index), len(question) + 11)
    assert isinstance(rows, CachedBranches) == (encode == backbone.encode)
    found = [[] for _ in index]
    written = [[] for _ in index]

    def grow(suffixes):
        hidden = backbone.grow(rows, suffixes)
        for i, states, suffix in zip(rows.going, hidden, suffixes, strict=True):
            found[i].append(states[: len(suffix)])
            written[i] += suffix

    grow([question] * 6)
    for step, ended in enumerate([[], [5], [0, 3], [], [0, 1], []]):
        grow([[extra[(i + step) % 7]] for i in rows.going])
        rows.leave(ended)
    assert len(rows) == 1
    rows.leave([0])
    assert len(rows) == 0
    rows.gather()
    assert sorted(rows.order) == list(range(6))
    assert rows.order != list(range(6))
    grow([extra[: 1 + i % 3] for i in rows.order])
    assert [len(ids) - len(question) for ids in written] == [3 + 1, 5 + 2, 6 + 3, 3 + 1, 5 + 2, 2 + 3]
    for i, row in enumerate(index):
        text = chat(PROMPTS[row], "realism")
        _, plain, _ = forward(backbone, text, [floats[row]], written[i][len(question) :])
        torch.testing.assert_close(torch.cat(found[i]), plain[-len(written[i]) :], **EXACT)


@torch.no_grad()
def test_the_prefix_stays_what_it_is(backbone, floats):
    """Bit for bit, whoever grows from it, also in another branch that was taken before."""
    prefix = backbone.encode(floats, PROMPTS)
    states = [tensor for layer in prefix.layers for tensor in layer] + [prefix.mask, prefix.position]
    before = [tensor.clone() for tensor in states]
    index, word = torch.tensor([0, 1, 2]), words(backbone)[0]
    first, second = branch(prefix, index, 9), branch(prefix, index, 9)
    expected = backbone.extend(prefix, [[word] * 2] * 3)
    for _ in range(2):
        backbone.grow(first, [[5]] * len(first))
        first.leave([0])
    first.gather()
    backbone.grow(first, [[5, 6], [5], [6]])
    assert all(map(torch.equal, states, before))
    torch.testing.assert_close(backbone.grow(second, [[word] * 2] * 3), expected, atol=0, rtol=0)


@torch.no_grad()
def test_keys_and_values_are_written_in_place(backbone, floats, monkeypatch):
    """Room for 2 tokens, then 4, then all 7: the same memory until it is used up."""
    monkeypatch.setattr(module, "ROOM", 2)
    prefix = backbone.encode(floats, PROMPTS)
    length = prefix.mask.shape[1]
    rows = branch(prefix, torch.tensor([0, 0, 1, 2]), 7)
    seen = []
    for _ in range(7):
        backbone.grow(rows, [[5]] * 4)
        layer = rows.cache.layers[prefix.linear.index(False)]
        seen.append((layer.keys.shape[-2] - length, layer.keys.data_ptr(), layer.values.data_ptr()))
    capacities, *places = zip(*seen, strict=True)
    assert capacities == (2, 2, 4, 4, 7, 7, 7)
    for place in places:
        assert [a == b for a, b in pairwise(place)] == [True, False, True, False, True, True]


def test_nothing_to_differentiate(backbone, floats):
    prefix = backbone.encode([image.requires_grad_() for image in floats], PROMPTS)
    assert prefix.layers[-1][0].requires_grad
    rows = branch(prefix, torch.tensor([0, 1, 2]), 3)
    assert not backbone.grow(rows, [[5]] * 3).requires_grad
    assert not any(buffer.requires_grad for layer in rows.cache.layers[-1:] for buffer in (layer.keys, layer.values))


@torch.no_grad()
def test_with_activations_recomputed(backbone, floats):
    """Layers that checkpoint keep the cache."""
    model, expected = backbone.model, None
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    for recompute in (False, True):
        if recompute:
            enable({"use_reentrant": False})
            model.train()
        try:
            rows = branch(backbone.encode(floats, PROMPTS), torch.tensor([0, 1, 2]), 3)
            hidden = torch.cat([backbone.grow(rows, [[word]] * 3) for word in words(backbone)[:3]], dim=1)
        finally:
            disable()
            model.eval()
        expected = hidden if expected is None else expected
    assert torch.equal(hidden, expected)


def test_errors(backbone, encode, floats):
    rows = branch(encode(floats, PROMPTS), torch.tensor([0, 1, 2]), 9)
    with pytest.raises(ValueError, match="2 suffixes for 3 branches that go on: one each"):
        backbone.grow(rows, [[5], [5]])
    with pytest.raises(
        ValueError, match=r"grow takes suffixes of one length until the branches are gathered, got lengths \[1, 2\]"
    ):
        backbone.grow(rows, [[5], [5, 6], [5]])
    rows.leave([1])
    with pytest.raises(ValueError, match="3 suffixes for 2 branches that go on: one each"):
        backbone.grow(rows, [[5], [5], [5]])
