"""Answers about two images against the plain Hugging Face forward on both, sequence by sequence."""

import pytest
import torch
from PIL import Image
from plain import FAMILIES, build, chat, forward
from torchvision.transforms.functional import to_pil_image

import zr
from zr.data import shapes
from zr.models import ComparisonReward, LinearHead, ScoreTokenHead, comparing, compose, tiny_clip

NAMES = ("alignment", "realism")
PROMPTS = ["red ring", "blue square, green triangle; yellow ring, red square", "ring"]
EXACT = {"atol": 1e-5, "rtol": 0.0}


def asking(names=NAMES, bins=(0, 1), labels=("A", "I")):
    """In words that the world's tokenizer knows: I for yes, A for no."""
    wording = {"system": "judge", "instructions": {name: name for name in names}, "labels": list(labels), "marker": " score"}
    return zr.Rubric.from_dict({"scale": {"bins": list(bins), "anchors": {name: {} for name in names}}, "wording": wording})


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return comparing(compose(build(request.param), ScoreTokenHead), asking()).eval()


@pytest.fixture
def sides(pictures):
    """First and second images of three pairs, of unequal sizes."""
    generator = torch.Generator().manual_seed(4)
    other = [torch.rand(3, 48, 48, generator=generator), torch.rand(3, 48, 64, generator=generator), pictures[0] / 255]
    return [p / 255 for p in pictures], other


def yes(model, prompt, name, images):
    """P(yes): the share of the label I beside A in the plain forward's last logits."""
    tokens = model.backbone.processor.tokenizer.convert_tokens_to_ids(["A", "I"])
    logits = forward(model.backbone, chat(prompt, name, images=2) + " score", images)[2]
    return logits[-1, tokens].softmax(-1)[1]


def plain(model, first, second):
    rows = zip(PROMPTS, first, second, strict=True)
    return torch.stack([torch.stack([yes(model, p, name, [a, b]) for name in NAMES]) for p, a, b in rows])


@torch.no_grad()
def test_yes_to_pairs(model, sides):
    first, second = sides
    answer = model(images=[list(pair) for pair in zip(first, second, strict=True)], prompts=PROMPTS)
    expected = plain(model, first, second)
    assert expected.min() < 0.48 or expected.max() > 0.52
    torch.testing.assert_close(answer.mean, expected, **EXACT)
    torch.testing.assert_close(answer.probs[..., 1], expected, **EXACT)


@torch.no_grad()
def test_both_orders_and_their_mean(model, sides):
    first, second = sides
    there, back = plain(model, first, second), plain(model, second, first)
    assert (there - back).abs().min() > 1e-4  # the order matters to a model that was not taught
    torch.testing.assert_close(model.both_orders(first, second, PROMPTS), torch.stack([there, 1 - back]), **EXACT)
    preference = model.preference(first, second, PROMPTS)
    torch.testing.assert_close(preference, (there + 1 - back) / 2, **EXACT)
    torch.testing.assert_close(model.preference(second, first, PROMPTS), 1 - preference, **EXACT)
    one = model.preference(first[1:2], second[1:2], PROMPTS[1:2], dimensions=["realism"])
    torch.testing.assert_close(one, preference[1:2, 1:], **EXACT)


@torch.no_grad()
def test_pil_images_and_passes_of_a_budget(model, sides):
    first, second = ([to_pil_image(image) for image in side] for side in sides)
    assert all(isinstance(image, Image.Image) for image in first)
    expected = model.preference(*sides, PROMPTS)
    torch.testing.assert_close(model.preference(first, second, PROMPTS), expected, atol=5e-3, rtol=0)
    small = comparing(model, model.rubric, budget=60).eval()
    torch.testing.assert_close(small.preference(*sides, PROMPTS), expected, **EXACT)


def test_gradients_reach_both_images(model, sides):
    first, second = ([image.clone().requires_grad_() for image in side] for side in sides)
    model.preference(first, second, PROMPTS).sum().backward()
    assert all(image.grad.abs().max() > 1e-6 for image in [*first, *second])


@torch.no_grad()
def test_saved_and_loaded(model, sides, tmp_path):
    model.save_pretrained(tmp_path)
    again = zr.load(tmp_path)
    assert type(again) is ComparisonReward
    assert torch.equal(again.preference(*sides, PROMPTS), model.preference(*sides, PROMPTS))
    assert "model.preference([image], [other]" in (tmp_path / "README.md").read_text()
    assert zr.load(tmp_path, budget=60).budget == 60


def test_the_weights_are_shared():
    scorer = compose(build("qwen3_vl"), ScoreTokenHead)
    model = comparing(scorer, asking(names=("realism",)))
    assert model.backbone.model is scorer.backbone.model
    assert (model.rubric.dimensions, scorer.rubric.dimensions) == (("realism",), shapes.DIMENSIONS)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (lambda a: [a, a], "sample 0 has 1 images: a comparison takes two"),
        (lambda a: torch.stack([a, a]), "sample 0 has 1 images: a comparison takes two"),
        (lambda a: [[a, a], [a, a, a]], "sample 1 has 3 images: a comparison takes two"),
        (lambda a: None, "sample 0 has 0 images: a comparison takes two"),
        (lambda a: [[a, a]], "1 images for 2 prompts"),
        (lambda a: [[a, a], [a, a * 255]], r"image 1: float pixels must lie in \[0, 1\]"),
    ],
)
def test_what_is_no_pair(model, images, message):
    with pytest.raises(ValueError, match=message):
        model(images=images(torch.rand(3, 48, 48)), prompts=PROMPTS[:2])


def test_errors(model):
    image = torch.rand(3, 48, 48)
    with pytest.raises(ValueError, match="2 first and 1 second images for 2 prompts: one each"):
        model.preference([image, image], [image], PROMPTS[:2])
    scorer = compose(build("qwen3_vl"), ScoreTokenHead)
    with pytest.raises(ValueError, match=r"the bins must be 0 and 1 .see zr:yes_token., got \(1.0, 2.0\)"):
        comparing(scorer, asking(bins=(1, 2)))
    with pytest.raises(ValueError, match="CLIPBackbone reads one image"):
        comparing(compose(tiny_clip(shapes.rubric(), shapes.vocabulary), LinearHead), asking())


def test_the_packaged_wording():
    rubric = zr.Rubric.load("zr:yes_token")
    assert rubric.dimensions == zr.Rubric.load("zr:direct").dimensions
    assert (rubric.bins, rubric.wording.labels) == ((0.0, 1.0), ("no", "yes"))
    assert all("first" in text and "second" in text for text in rubric.wording.instructions.values())
