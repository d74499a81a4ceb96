"""Features and their gradients against the plain Hugging Face forward on whole sequences."""

import itertools
from functools import partial

import pytest
import torch
from PIL import Image
from plain import FAMILIES, build, chat, forward
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.functional import to_pil_image

from zr.data import shapes

NAMES = ["realism", "alignment", "plausibility"]
PROMPTS = ["red ring", "blue square, green triangle; yellow ring, red square", ""]
EXACT = {"atol": 1e-5, "rtol": 0.0}


def plain_features(backbone, samples, prompts, names):
    """``(B, D, H)`` by one plain forward each."""
    rows = []
    for images, prompt in zip(samples, prompts, strict=True):
        texts = [chat(prompt, name, len(images)) + " score" for name in names]
        rows.append(torch.stack([forward(backbone, text, images)[1][-1] for text in texts]))
    return torch.stack(rows)


@pytest.fixture
def floats(pictures):
    return [p / 255 for p in pictures]


@torch.no_grad()
def test_batch_of_unequal_images_and_prompts(backbone, floats):
    features = backbone.features(floats, PROMPTS, NAMES)
    torch.testing.assert_close(features, plain_features(backbone, [[x] for x in floats], PROMPTS, NAMES), **EXACT)


@torch.no_grad()
def test_alone_after_others(backbone, floats):
    """Whatever stands beside a sample, or was scored before it, the answer is that of the sample alone."""
    together = backbone.features(floats, PROMPTS, NAMES)
    for order in ([2, 0, 1], [1], [0], [2]):
        again = backbone.features([floats[i] for i in order], [PROMPTS[i] for i in order], NAMES)
        torch.testing.assert_close(again, together[order], **EXACT)
    for i in range(3):
        backbone.features([floats[2 - i]], ["yellow triangle " * (i + 1)], ["aesthetics"])
        torch.testing.assert_close(backbone.features([floats[i]], [PROMPTS[i]], NAMES)[0], together[i], **EXACT)


@torch.no_grad()
def test_text_only(backbone):
    expected = plain_features(backbone, [[], [], []], PROMPTS, NAMES)
    torch.testing.assert_close(backbone.features(None, PROMPTS, NAMES), expected, **EXACT)
    torch.testing.assert_close(backbone.features([[], [], []], PROMPTS, NAMES), expected, **EXACT)
    torch.testing.assert_close(backbone.features(None, PROMPTS[:1], NAMES), expected[:1], **EXACT)


@torch.no_grad()
def test_several_images_and_none_in_one_batch(backbone, floats):
    samples = [[floats[0], floats[1]], [], [floats[2]], [floats[1], floats[0]]]
    prompts = [*PROMPTS, "red ring"]
    expected = plain_features(backbone, samples, prompts, NAMES)
    torch.testing.assert_close(backbone.features(samples, prompts, NAMES), expected, **EXACT)
    for sample, prompt, row in zip(samples, prompts, expected, strict=True):
        torch.testing.assert_close(backbone.features([sample], [prompt], NAMES)[0], row, **EXACT)
    assert (expected[0] - expected[3]).abs().max() > 1e-3  # the order of images matters


@torch.no_grad()
def test_dimensions_in_any_order(backbone, floats):
    every = backbone.features(floats, PROMPTS, list(shapes.DIMENSIONS))
    for names in itertools.permutations(shapes.DIMENSIONS, 2):
        columns = [shapes.DIMENSIONS.index(name) for name in names]
        torch.testing.assert_close(backbone.features(floats, PROMPTS, names), every[:, columns], **EXACT)


@torch.no_grad()
def test_reasoning_wording(thinker, floats):
    suffixes = [thinker.prompts.suffix_ids(name) for name in NAMES]
    hidden = thinker.extend(thinker.encode(floats, PROMPTS), suffixes)
    for i, name in enumerate(NAMES):
        plain = forward(thinker, chat(PROMPTS[i], name, thinking=True), [floats[i]])[1]
        torch.testing.assert_close(hidden[i, -1], plain[-1], **EXACT)


@torch.no_grad()
def test_every_form_of_image(backbone, pictures):
    """uint8, float and PIL are one picture; the family's processor gives the same patches of the PIL image by its own path."""
    pils = [to_pil_image(p) for p in pictures]
    by_pil = backbone.features(pils, PROMPTS, NAMES)
    for images in (pictures, [p / 255 for p in pictures], [[pil] for pil in pils], [p.double() / 255 for p in pictures]):
        torch.testing.assert_close(backbone.features(images, PROMPTS, NAMES), by_pil, **EXACT)
    stack = torch.stack([pictures[0]] * 2)
    for batch in (stack, stack / 255):
        torch.testing.assert_close(backbone.features(batch, PROMPTS[:2], NAMES)[0], by_pil[0], **EXACT)
    transparent = pils[0].convert("RGBA")
    torch.testing.assert_close(backbone.features([transparent], PROMPTS[:1], NAMES), by_pil[:1], **EXACT)
    inputs = backbone.processor(text=[chat(PROMPTS[0], NAMES[0]) + " score"], images=[pils[0]], return_tensors="pt")
    stock = backbone.model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(by_pil[0, 0], stock, **EXACT)


@torch.no_grad()
def test_sizes_off_the_grid_of_patches(backbone):
    """A size that the patches do not divide is resized as the family's processor does: to one grey level of its PIL path."""
    smooth = torch.linspace(0, 1, 50)[None, :, None] * torch.linspace(0.2, 1, 70) * torch.tensor([1.0, 0.5, 0.8])[:, None, None]
    pil = to_pil_image((smooth * 255).round().to(torch.uint8))
    inputs = backbone.processor(text=[chat("red", "realism") + " score"], images=[pil], return_tensors="pt")
    stock = backbone.model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(backbone.features([pil], ["red"], ["realism"])[0, 0], stock, atol=2e-2, rtol=0)


def test_gradients(backbone, floats):
    """Of a random projection: to the pixels of every image and to every parameter."""
    samples = [[floats[0]], [floats[1], floats[2]], []]
    samples = [[x.clone().requires_grad_() for x in sample] for sample in samples]
    pixels = [x for sample in samples for x in sample]
    named = dict(backbone.model.named_parameters())
    projection = torch.randn(3, len(NAMES), 32, generator=torch.Generator().manual_seed(0))

    def gradients(features):
        found = torch.autograd.grad((features * projection).sum(), [*pixels, *named.values()], allow_unused=True)
        return dict(zip([*range(len(pixels)), *named], found, strict=True))

    ours = gradients(backbone.features(samples, PROMPTS, NAMES))
    plain = gradients(plain_features(backbone, samples, PROMPTS, NAMES))
    for name, expected in plain.items():
        if expected is None:
            assert ours[name] is None, name
            continue
        error = (ours[name] - expected).norm()
        assert error <= 1e-4 * expected.norm() + 1e-6, (name, float(error), float(expected.norm()))
    assert all(ours[i].abs().sum() > 0 for i in range(len(pixels)))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_activation_checkpointing(family, floats):
    """Layers that recompute their activations keep no cache: the prefix must not be left without one."""
    backbone = build(family).train()
    expected = gradient_of(backbone, floats)
    for module in backbone.model.modules():  # as transformers' own switch does, whose name changes between versions
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    torch.testing.assert_close(gradient_of(backbone, floats), expected, rtol=1e-4, atol=1e-6)


def gradient_of(backbone, floats):
    image = floats[1].clone().requires_grad_()
    backbone.features([image, floats[0]], PROMPTS[:2], NAMES)[:, :, 0].sum().backward()
    return image.grad


def test_float_batch_keeps_its_gradient(backbone, floats):
    images = torch.stack([floats[0]] * 2).requires_grad_()
    backbone.features(images, PROMPTS[:2], NAMES).sum().backward()
    assert images.grad.shape == (2, 3, 48, 48)
    assert bool((images.grad.abs().amax(1) > 0).all())  # every pixel is seen


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        ([torch.zeros(3, 48, 48)], ["a", "b"], "1 images for 2 prompts: give one image, or one list of images, per prompt"),
        (torch.zeros(3, 48, 48), ["a"], "3 images for 1 prompts"),
        (Image.new("RGB", (48, 48)), ["a"], "images is one PIL image: give a list"),
        ([torch.zeros(3, 48, 48), torch.zeros(1, 48, 48)], ["a", "b"], r"image 1: .* got \(1, 48, 48\)"),
        (["cat.png"], ["a"], "image 0: a tensor .* or a PIL image is needed, got str"),
        ([torch.zeros(3, 48, 48, dtype=torch.int64)], ["a"], r"image 0: uint8 .* or float .* needed, got torch\.int64"),
        ([torch.full((3, 48, 48), 200.0)], ["a"], r"image 0: float pixels must lie in \[0, 1\], got 200 to 200"),
        ([torch.full((3, 48, 48), -1.0)], ["a"], r"map \[-1, 1\] by \(x \+ 1\) / 2"),
        ([torch.full((3, 48, 48), torch.nan)], ["a"], r"image 0: float pixels must lie in \[0, 1\], got nan"),
        (None, "a cat", "prompts must be a list of at least one text, got 'a cat'"),
        ([], [], r"prompts must be a list of at least one text, got \[\]"),
    ],
)
def test_errors(backbone, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        backbone.features(images, prompts, NAMES)


def test_another_scale_is_no_other_wording(backbone):
    with pytest.raises(ValueError, match="another wording must keep the scale"):
        backbone.reworded(shapes.rubric(["realism"]))
