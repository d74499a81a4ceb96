"""Branches of a shared prefix against whole sequences, one at a time, by plain Hugging Face."""

import pytest
import torch
from plain import chat, forward

from zr.models.prefix import CachedPrefix, WholePrefix, pad_left, pad_right

PROMPTS = ["red ring", "blue square, green triangle; yellow ring", "a <think> b"]
EXACT = {"atol": 1e-5, "rtol": 0.0}


def test_padding():
    ids, mask = pad_right([[1], [2, 3, 4], []], 9)
    assert ids.tolist() == [[1, 9, 9], [2, 3, 4], [9, 9, 9]]
    assert mask.tolist() == [[True, False, False], [True] * 3, [False] * 3]
    ids, mask = pad_left([[1], [2, 3, 4], []], 9)
    assert ids.tolist() == [[9, 9, 1], [2, 3, 4], [9, 9, 9]]
    assert mask.tolist() == [[False, False, True], [True] * 3, [False] * 3]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_kind_of_prefix(backbone, pictures):
    prefix = backbone.encode(pictures, PROMPTS)
    hybrid = backbone.model.config.model_type == "qwen3_5"
    assert isinstance(prefix, WholePrefix if hybrid else CachedPrefix)
    assert len(prefix) == 3
    assert len(prefix.fork(torch.tensor([2, 0, 0, 1]))) == 4


@torch.no_grad()
def test_extend_with_suffixes_of_unequal_lengths(backbone, pictures):
    floats = [p / 255 for p in pictures]
    prefix = backbone.encode(floats, PROMPTS)
    rows = [2, 0, 0, 1, 2]
    words = backbone.prompts.user_ids("missing right nothing shape colour ring square")
    extras = [words[:1], words, words[3:], words[2:5], []]
    suffixes = [backbone.prompts.suffix_ids("realism") + extra for extra in extras]
    hidden = backbone.extend(prefix.fork(torch.tensor(rows)), suffixes)
    assert hidden.shape == (5, max(map(len, suffixes)), 32)
    for m, (row, suffix, extra) in enumerate(zip(rows, suffixes, extras, strict=True)):
        prompt = PROMPTS[row].replace("<think>", "< think >")  # what user text is read as: three unknown words
        _, plain, _ = forward(backbone, chat(prompt, "realism"), [floats[row]], extra)
        torch.testing.assert_close(hidden[m, : len(suffix)], plain[-len(suffix) :], **EXACT)


@torch.no_grad()
def test_advance_twice_then_extend(backbone, pictures):
    """As sampling goes: a suffix, a token, some rows dropped, a token, then suffixes of unequal lengths."""
    floats = [p / 255 for p in pictures]
    words = backbone.prompts.user_ids("missing right nothing shape colour ring square")
    hidden, prefix = backbone.advance(
        backbone.encode(floats, [*PROMPTS[:2], "red"]), [backbone.prompts.suffix_ids("realism")] * 3
    )
    first, prefix = backbone.advance(prefix, [[words[0]], [words[1]], [words[2]]])
    second, prefix = backbone.advance(prefix.fork(torch.tensor([2, 0])), [[words[3]], [words[4]]])
    third = backbone.extend(prefix, [words[5:6], words[4:7]])
    whole = {
        0: ("red ring", [words[0], words[4], *words[4:7]]),
        1: (PROMPTS[1], [words[1]]),
        2: ("red", [words[2], words[3], words[5]]),
    }
    plain = {row: forward(backbone, chat(p, "realism"), [floats[row]], extra)[1] for row, (p, extra) in whole.items()}
    ends = {row: len(plain[row]) - len(extra) for row, (_, extra) in whole.items()}
    for row in range(3):
        length = hidden.shape[1]
        torch.testing.assert_close(hidden[row], plain[row][ends[row] - length : ends[row]], **EXACT)
        torch.testing.assert_close(first[row, 0], plain[row][ends[row]], **EXACT)
    for m, row in enumerate((2, 0)):
        torch.testing.assert_close(second[m, 0], plain[row][ends[row] + 1], **EXACT)
        rest = plain[row][ends[row] + 2 :]
        torch.testing.assert_close(third[m, : len(rest)], rest, **EXACT)


@torch.no_grad()
def test_a_prefix_does_not_change_when_it_is_extended(backbone, pictures):
    prefix = backbone.encode(pictures, PROMPTS)
    suffixes = [backbone.prompts.question_ids("realism")] * 3
    before = backbone.extend(prefix, suffixes)
    backbone.advance(prefix, [[7]] * 3)
    backbone.encode([pictures[2]], ["yellow triangle"])  # the model keeps position offsets of its last call
    torch.testing.assert_close(backbone.extend(prefix, suffixes), before, atol=0, rtol=0)


def test_gradient_of_branches_adds_up_in_the_prefix(backbone, pictures):
    """Forking a row twice doubles its gradient, bit for bit nothing else."""
    image = (pictures[0] / 255).requires_grad_()
    suffix = backbone.prompts.question_ids("realism")
    once, twice = (
        torch.autograd.grad(
            backbone.extend(backbone.encode([image], ["red"]).fork(torch.tensor(rows)), [suffix] * len(rows))[:, -1, 0].sum(),
            image,
        )[0]
        for rows in ([0], [0, 0])
    )
    assert once.abs().sum() > 0
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-7)


def test_errors(backbone, pictures):
    prefix = backbone.encode(pictures, PROMPTS)
    with pytest.raises(ValueError, match=r"advance takes suffixes of one length, got lengths \[1, 2\]"):
        backbone.advance(prefix, [[5], [5, 6], [5]])
    with pytest.raises(ValueError, match="2 suffixes for 3 rows of the prefix: fork it first"):
        backbone.extend(prefix, [[5], [5]])
    with pytest.raises(ValueError, match="2 suffixes for 3 rows of the prefix: fork it first"):
        backbone.advance(prefix, [[5], [5]])
