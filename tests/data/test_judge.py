"""The judge of the built-in world against what was drawn: it is never shown the scene."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from zr.data.shapes import (
    COLOURS,
    DIMENSIONS,
    SEVERITY,
    Scene,
    Thing,
    draw,
    judge,
    prompts,
    read,
    read_prompt,
    scenes,
    true_scores,
)

PROMPT = "red ring, blue square; green triangle, yellow ring"
ASKED = tuple(Thing(*asked) for asked in read_prompt(PROMPT))
GRID = np.linspace(0, 1, 11)


def drawn(count, seed, split="validation", **changes):
    """(prompt, scene, picture in [0, 1]) of one candidate for each of ``count`` prompts."""
    for prompt, (scene,) in scenes(split, count, candidates=1, seed=seed):
        scene = replace(scene, **changes)
        yield prompt, scene, draw(scene) / 255


def chw(pixels):
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


@pytest.fixture(scope="module")
def sample():
    return list(drawn(200, seed=1))


@pytest.fixture(scope="module")
def readings(sample):
    return [read(picture) for _, _, picture in sample]


def test_objects_on_clean_draws():
    seen = [
        (thing, true)
        for _, scene, picture in drawn(150, seed=0, realism=frozenset(), aesthetics=frozenset())
        for thing, true in zip(read(picture).things, scene.things, strict=True)
    ]
    objects = [(a and (a.colour, a.shape)) == (b and (b.colour, b.shape)) for a, b in seen]
    assert np.mean(objects) >= 0.99
    assert np.mean([a == b for a, b in seen]) >= 0.99  # with their states
    assert {b and b.state for _, b in seen} == {None, "grounded", "shadowless", "floating", "pierced"}


def test_every_defect_is_seen_and_none_invented(sample, readings):
    for dimension in ("realism", "aesthetics"):
        for defect in SEVERITY[dimension]:
            there = [defect in getattr(scene, dimension) for _, scene, _ in sample]
            assert 20 <= sum(there) <= 180
            assert np.mean([(r.evidence[defect] > 0.5) == t for r, t in zip(readings, there, strict=True)]) >= 0.99, defect


def test_scores_agree_with_the_rubric(sample, readings):
    true = [true_scores(scene, prompt) for prompt, scene, _ in sample]
    seen = [reading.scores(prompt) for reading, (prompt, _, _) in zip(readings, sample, strict=True)]
    for name in DIMENSIONS:
        a, b = (np.array([scores[name] for scores in side]) for side in (seen, true))
        assert spearmanr(a, b).statistic >= 0.95, name
        assert np.mean(abs(a - b) < 0.25) >= 0.99, name  # nearer to the true bin than to any other


@pytest.mark.parametrize("kind", ["mixed", "perfect", "striped speckled blurred", "blocky cluttered framed tilted clashing"])
def test_noise_never_pays(kind):
    words = frozenset(kind.split())
    scene = Scene(ASKED, realism=words & set(SEVERITY["realism"]), aesthetics=words & set(SEVERITY["aesthetics"]))
    pictures = [(PROMPT, draw(replace(scene, seed=seed)) / 255) for seed in range(4)]
    if kind == "mixed":
        pictures = [(prompt, picture) for prompt, _, picture in drawn(8, seed=2)]
    rng = np.random.default_rng(0)
    noise = [rng.random(picture.shape) for _, picture in pictures]
    curve = np.array(
        [
            np.mean(
                [
                    list(read((1 - t) * p + t * n).scores(prompt).values())
                    for (prompt, p), n in zip(pictures, noise, strict=True)
                ],
                0,
            )
            for t in GRID
        ]
    )
    least = curve[0] < 1.1  # nothing to lose: noise hides defects, and may not bring more than this
    assert curve[:, least].size == 0 or curve[:, least].max() < 1.2
    falling = np.diff(curve[:, ~least], axis=0)
    assert np.all(falling <= 0.01)  # the last thousandths, where everything is at its lowest, may tie
    assert np.all(falling[curve[:-1, ~least] > 1.1] < 0)
    assert np.all(curve[-1] < 1.1)


def test_what_is_no_object_earns_nothing():
    y, x = np.mgrid[0:48, 0:48]
    room = draw(Scene((None,) * 4)) / 255
    smear = room.copy()
    for (colour, _), (cy, cx) in zip(read_prompt(PROMPT), [(8, 7.5), (8, 39.5), (40, 7.5), (40, 39.5)], strict=True):
        cover = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 3**2))[..., None]
        smear += (np.array(COLOURS[colour]) - smear) * cover
    whole = draw(Scene(ASKED)) / 255
    ghost = (room + whole) / 2
    upside_down = whole[::-1]
    bad = judge(
        images=[chw(p) for p in (smear, ghost, upside_down)], prompts=[PROMPT] * 3, dimensions=["alignment", "plausibility"]
    )
    good = judge(images=[chw(whole)], prompts=[PROMPT]).mean
    assert good.min() > 4.95
    assert bad.mean.max() < 2
    empty, flat, grey = judge(images=[chw(p) for p in (room, 0 * room + 0.95, 0 * room + 0.5)], prompts=[PROMPT] * 3).mean
    assert empty[0] == 1  # plausibility and the rest are what the rubric says of an empty room, and of no room, nothing
    assert empty[1:].min() > 4.9
    assert flat.max() < 2
    assert grey.max() < 1.5


def test_scores_fall_with_a_soft_defect():
    sharp, blurred = (draw(Scene(ASKED, realism=frozenset(names))) / 255 for names in ((), ("blurred",)))
    scores = [read((1 - t) * sharp + t * blurred).scores(PROMPT)["realism"] for t in (0, 0.4, 0.6, 1)]
    assert scores[0] > scores[1] > scores[2] > scores[3]


def test_one_score_in_every_form():
    picture = draw(next(iter(drawn(1, seed=3)))[1])
    batch = chw(picture)[None].float() / 255
    expected = torch.tensor(list(read(picture / 255).scores(PROMPT).values()))
    for images in (batch, batch.double(), [batch[0]], [chw(picture)], [Image.fromarray(picture)]):
        result = judge(images=images, prompts=[PROMPT])
        assert result.batch_shape == (1, 4)
        torch.testing.assert_close(result.mean[0], expected, atol=2e-3, rtol=0)
    assert tuple(result.bins.tolist()) == judge.rubric.bins
    assert (result.probs > 1e-9).sum(-1).max() <= 2
    assert torch.equal(judge(images=batch, prompts=[PROMPT], dimensions=["realism", "alignment"]).mean, result.mean[:, [1, 0]])
    assert judge(images=batch[:0], prompts=[]).batch_shape == (0, 4)


@pytest.mark.parametrize(
    ("images", "asked", "message"),
    [
        (torch.rand(1, 3, 32, 32), [PROMPT], r"picture 0: .*\(48, 48, 3\) pixels, height first, got \(32, 32, 3\)"),
        ([Image.new("RGB", (48, 48)), Image.new("RGB", (48, 40))], [PROMPT] * 2, r"picture 1: .*got \(40, 48, 3\)"),
        (torch.full((1, 3, 48, 48), 7.0), [PROMPT], r"in \[0, 1\], got 7 to 7: clamp"),
        (torch.full((1, 3, 48, 48), torch.nan), [PROMPT], r"in \[0, 1\], got nan"),
        ([torch.zeros(48, 48, 3)], [PROMPT], r"\(3, 48, 48\) tensors.*got a torch.float32 tensor of shape \(48, 48, 3\)"),
        ([torch.zeros(3, 48, 48).long()], [PROMPT], r"uint8 or float.*torch.int64"),
        ([None], [PROMPT], "got NoneType"),
        (torch.rand(2, 3, 48, 48), [PROMPT], "2 pictures and 1 prompts"),
        (torch.rand(2, 3, 48, 48), PROMPT, "2 pictures and one text"),
        (torch.rand(1, 3, 48, 48), ["a cat"], "not a prompt of the built-in world"),
    ],
)
def test_errors(images, asked, message):
    with pytest.raises(ValueError, match=message):
        judge(images=images, prompts=asked)


def test_unknown_dimension():
    with pytest.raises(ValueError, match="'beauty'"):
        judge(images=torch.rand(1, 3, 48, 48), prompts=[prompts("test")[0]], dimensions=["beauty"])
