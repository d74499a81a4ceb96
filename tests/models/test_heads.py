"""Heads against rows of the full logits, and against loops."""

from types import SimpleNamespace

import pytest
import torch
from plain import chat, forward

from zr.data import shapes
from zr.models import Head, LinearHead, RewardModel, ScoreTokenHead
from zr.rubric import Rubric, Scale, Wording

NAMES = list(shapes.DIMENSIONS)


@torch.no_grad()
def test_score_tokens_are_rows_of_the_full_logits(backbone, pictures):
    floats = [p / 255 for p in pictures]
    prompts = ["red ring", "blue square, red ring", "ring"]
    model = RewardModel(backbone, ScoreTokenHead(backbone, off_scale=True), backbone.rubric)
    scores = model(images=floats, prompts=prompts)
    labels = backbone.processor.tokenizer.convert_tokens_to_ids(list("ABCDEFGHI"))
    for i, prompt in enumerate(prompts):
        for d, name in enumerate(NAMES):
            logits = forward(backbone, chat(prompt, name) + " score", [floats[i]])[2][-1]
            torch.testing.assert_close(scores.logits[i, d], logits[labels].log_softmax(-1), atol=1e-5, rtol=0)
            torch.testing.assert_close(scores.off_scale[i, d], 1 - logits.softmax(-1)[labels].sum(), atol=1e-6, rtol=1e-4)
            mean = sum(p * (1 + k / 2) for k, p in enumerate(logits[labels].softmax(-1).tolist()))
            assert abs(scores.mean[i, d].item() - mean) < 1e-5


def test_off_scale_only_when_asked(backbone):
    model = RewardModel(backbone, ScoreTokenHead(backbone), backbone.rubric)
    with pytest.raises(ValueError, match=r"off_scale=True \(ScoreTokenHead\)"):
        _ = model(images=None, prompts=["red"]).off_scale
    assert ScoreTokenHead(backbone, off_scale=True).config() == {"off_scale": True}


@torch.no_grad()
def test_score_tokens_in_half_precision_and_with_a_bias():
    """Nine rows in float32, whatever the weights' type: no rounding of the logits themselves."""
    generator = torch.Generator().manual_seed(0)
    output = torch.nn.Linear(8, 20, dtype=torch.bfloat16)
    output.weight.copy_(10 * torch.randn(20, 8, generator=generator))
    output.bias.copy_(torch.randn(20, generator=generator))
    head = ScoreTokenHead(SimpleNamespace(output=output, prompts=SimpleNamespace(label_ids=[3, 19, 4])))
    features = torch.randn(2, 1, 8, generator=generator, dtype=torch.float32).bfloat16()
    logits = head(features, torch.tensor([0]))
    assert logits.dtype == torch.float32
    for b in range(2):
        for k, row in enumerate((3, 19, 4)):
            weight, bias = output.weight[row].double(), output.bias[row].double()
            assert abs(logits[b, 0, k].item() - (features[b, 0].double() @ weight + bias).item()) < 1e-4


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [3, 1], [2], [1, 3, 0]])
def test_linear_head_against_a_loop(index):
    head = LinearHead(SimpleNamespace(hidden_size=6, rubric=Rubric.load("zr:direct")))
    torch.nn.init.normal_(head.bias)
    features = torch.randn(3, len(index), 6)
    logits = head(features, torch.tensor(index))
    assert logits.shape == (3, len(index), 9)
    for b in range(3):
        for place, d in enumerate(index):
            for k in range(9):
                expected = (
                    sum(features[b, place, h].item() * head.weight[d, k, h].item() for h in range(6)) + head.bias[d, k].item()
                )
                assert abs(logits[b, place, k].item() - expected) < 1e-5


def test_linear_head_of_other_scales_starts_at_the_scale_of_its_input():
    rubric = Rubric.load("zr:direct").select(["realism", "alignment"])
    head = LinearHead(SimpleNamespace(hidden_size=400, rubric=rubric))
    assert head.weight.shape == (2, 9, 400)
    assert abs(head.weight.std().item() - 0.05) < 0.005
    assert not head.bias.any()


@pytest.mark.parametrize("head", [ScoreTokenHead, LinearHead])
@pytest.mark.parametrize("names", [["plausibility"], ["realism", "alignment"], NAMES[::-1]])
def test_subsets_and_orders_are_columns(backbone, pictures, head, names):
    torch.manual_seed(0)
    model = RewardModel(backbone, head(backbone), backbone.rubric)
    prompts = ["red ring", "blue square, red ring", "ring"]
    with torch.no_grad():
        every, some = model(images=pictures, prompts=prompts), model(images=pictures, prompts=prompts, dimensions=names)
    assert some.batch_shape == (3, len(names))
    torch.testing.assert_close(some.logits, every.logits[:, [NAMES.index(n) for n in names]], atol=1e-5, rtol=0)


def test_a_head_must_say_what_it_computes():
    with pytest.raises(TypeError, match=r"Head must define forward\(features, dimension_index\)"):
        Head()(torch.zeros(1, 1, 2), torch.tensor([0]))
    assert Head().off_scale(torch.zeros(1, 1, 2)) is None
    assert Head().config() == {}


def test_one_rubric_for_backbone_and_model(backbone):
    wording = Wording("", dict.fromkeys(NAMES, ""), ("A", "B"))
    other = Rubric(Scale((1.0, 2.0), {name: {} for name in NAMES}), wording)
    with pytest.raises(
        ValueError, match=r"the backbone was built for dimensions .* the rubric has .* \(1\.0, 2\.0\): use one rubric"
    ):
        RewardModel(backbone, ScoreTokenHead(backbone), other)
