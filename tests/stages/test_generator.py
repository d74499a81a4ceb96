"""The SFT generator: its loss against one worked out from what the transformer was shown, resuming, and what it learns."""

import re

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from plain import unannotated
from torch.optim import SGD, AdamW

from zr.data import shapes
from zr.models.generators import FlowGenerator, FlowSize, tiny_flow
from zr.scores import ScoreDistribution
from zr.stages import FlowMatching, KeepGenerator

SIZE = FlowSize(patch=16, width=16, layers=1, heads=2)


def small(seed=0):
    return tiny_flow(shapes.vocabulary, SIZE, steps=2, seed=seed)


def pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (count, 3, 48, 48), dtype=torch.uint8, generator=generator))


class Shown(torch.nn.Module):
    """Stands in for the transformer: remembers what it is shown and answers 0.25."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.25))
        self.calls = []

    def forward(self, latents, time, words):
        self.calls.append((latents, time, words))
        return self.weight.expand_as(latents)


class Mean:
    """A scorer: the mean of a picture, once as a score and once as its mirror image; remembers what it was given."""

    rubric = shapes.rubric(["alignment", "realism"])

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts, dimensions=None):
        assert not images.requires_grad
        self.calls.append((images.clone(), list(prompts)))
        bins = torch.tensor(self.rubric.bins)
        mean = 1 + 4 * images.mean((1, 2, 3))
        score = torch.stack([mean, 6 - mean], 1)[..., None]
        return ScoreDistribution((1 - (score - bins).abs() / 0.5).clamp_min(0).log(), self.rubric.bins)


class Given:
    """A loader of one batch."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 1

    def __iter__(self):
        yield self.batch


def stage(generator=None, **options):
    return FlowMatching(generator or small(), **options)


def logged(module):
    """Collects what a stage logs outside a trainer."""
    found = {}
    module.log = lambda name, value, **_: found.setdefault(name, []).append(float(value))
    return found


def test_the_loss_is_worked_out_from_what_the_transformer_was_shown():
    images, prompts = pictures(6), list(shapes.prompts("train")[:6])
    module = stage()
    module.generator.transformer = Shown()
    found = logged(module)
    loss = module.training_step(unannotated(images, prompts))
    ((latents, time, words),) = module.generator.transformer.calls
    assert words.shape == (6, 12)
    assert bool(((time > 0) & (time < 1)).all())
    expected = []
    for i in range(6):
        clean = images[i].double() / 127.5 - 1
        noise = (latents[i].double() - time[i].double() * clean) / (1 - time[i].double())
        assert abs(float(noise.mean())) < 0.05
        assert float(noise.std()) == pytest.approx(1, abs=0.05)
        expected.append(float((0.25 - (clean - noise)).square().mean()))
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4) == found["train/loss"][0]


def test_times_are_log_odds_normal_and_prompts_are_dropped():
    count = 600
    images, prompts = pictures(1) * count, [shapes.prompts("train")[0]] * count
    module = stage(location=-0.5, spread=0.8, drop_prompts=0.25)
    module.generator.transformer = Shown()
    logged(module)
    module.training_step(unannotated(images, prompts))
    module.training_step(unannotated(images, prompts))
    (_, first, words), (_, second, _) = module.generator.transformer.calls
    odds = torch.cat([first, second]).logit()
    assert float(odds.mean()) == pytest.approx(-0.5, abs=4 * 0.8 / 1200**0.5)
    assert float(odds.std()) == pytest.approx(0.8, abs=4 * 0.8 / 2400**0.5)
    assert not torch.equal(first, second), "each batch has noise of its own"
    dropped = (words == 0).all(1)
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / count) ** 0.5)
    assert torch.equal(words[~dropped], module.generator.condition(prompts[:1]).expand(int((~dropped).sum()), -1))


def test_validation_is_repeatable_and_scores_one_picture_for_each_prompt(data, trainer):
    scorer = Mean()
    module = stage(scorer=scorer)
    first = trainer().validate(module, data(), verbose=False)[0]
    with torch.no_grad():
        module.generator.transformer.output.bias.add_(0.5)
    changed = trainer().validate(module, data(), verbose=False)[0]
    with torch.no_grad():
        module.generator.transformer.output.bias.sub_(0.5)
    assert trainer().validate(module, data(), verbose=False)[0] == pytest.approx(first)
    assert set(first) == {"val/loss", "val/score/alignment", "val/score/realism"}
    assert changed["val/score/alignment"] > first["val/score/alignment"] + 0.2
    records = [b.prompts[::3] for b in data().val_dataloader()]
    assert [prompts for _, prompts in scorer.calls] == 3 * records
    images = torch.cat([images for images, _ in scorer.calls[: len(records)]])
    mean = 1 + 4 * float(images.mean())
    assert first["val/score/alignment"] == pytest.approx(mean, abs=1e-4)
    assert first["val/score/realism"] == pytest.approx(6 - mean, abs=1e-4)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the resumed run has a folder of its own
def test_a_resumed_run_equals_the_uninterrupted_one_and_the_generator_is_kept(data, trainer, tmp_path):
    options = {"limit_val_batches": 0, "max_epochs": 1}
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
    whole = stage(optimizer=AdamW, seed=7)
    trainer(KeepGenerator(), every, run="whole", **options).fit(whole, data())
    assert any(not torch.equal(a, b) for a, b in zip(small().parameters(), whole.generator.parameters(), strict=True))
    resumed = stage(small(seed=5), optimizer=AdamW, seed=7)
    every = ModelCheckpoint(tmp_path / "others", every_n_train_steps=2)
    trainer(every, run="resumed", **options).fit(resumed, data(), ckpt_path=str(tmp_path / "step=2.ckpt"), weights_only=True)
    assert int(resumed.batches) == int(whole.batches) == 3
    for one, other in zip(whole.generator.parameters(), resumed.generator.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    kept = FlowGenerator.from_pretrained(tmp_path / "whole")
    prompts = list(shapes.prompts("test")[:1])
    images = [g.sample(prompts, torch.Generator().manual_seed(0)) for g in (kept, whole.generator)]
    assert torch.equal(*images)
    with pytest.raises(FileExistsError, match="holds the generator of another run: choose another run folder"):
        trainer(KeepGenerator(), run="whole", **options).fit(stage(), data())


def test_it_learns_what_a_prompt_asks_for(trainer):
    """Red and blue pictures: after some steps the pictures of a prompt have its colour."""
    torch.manual_seed(0)
    generator = FlowGenerator(["red", "blue"], FlowSize(image=8, patch=4, width=16, layers=1, heads=2, words=1), steps=4)
    colours = {"red": (200, 40, 40), "blue": (40, 40, 200)}
    images = [torch.tensor(colours[p], dtype=torch.uint8)[:, None, None].expand(3, 8, 8) for p in ("red", "blue") * 16]
    given = unannotated(images, ["red", "blue"] * 16)
    module = stage(generator, optimizer=lambda p: AdamW(p, lr=0.01), warmup=0.0, decay=0.3)
    trainer(max_steps=150, max_epochs=-1, limit_val_batches=0, enable_checkpointing=False).fit(
        module, Given(given), Given(given)
    )
    pictures = generator.sample(["red", "blue"], torch.Generator().manual_seed(3))
    for picture, name in zip(pictures, ("red", "blue"), strict=True):
        wanted = torch.tensor(colours[name]) / 255
        torch.testing.assert_close(picture.mean((1, 2)), wanted, rtol=0, atol=0.12)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(data, trainer):
    module = stage(optimizer=lambda p: SGD(p, lr=0.1))
    with torch.no_grad():
        module.generator.transformer.output.bias.fill_(torch.inf)
    before = [p.clone() for p in module.generator.parameters()]
    with pytest.raises(ValueError, match=r"the loss of the batch of train-\d+\.c0 is inf: lower the learning rate, or clip"):
        trainer(enable_checkpointing=False).fit(module, data())
    assert all(map(torch.equal, before, module.generator.parameters()))


def test_wrong_inputs(data, trainer, tmp_path):
    for options in ({"drop_prompts": 1.5}, {"spread": 0.0}):
        with pytest.raises(ValueError, match="drop_prompts is a share in"):
            stage(**options)
    wide = unannotated([torch.zeros(3, 48, 64, dtype=torch.uint8)], [shapes.prompts("train")[0]])
    with pytest.raises(ValueError, match="image 0 is 64 x 48, the generator makes 48 x 48: resize it"):
        stage().training_step(wide)
    with pytest.raises(ValueError, match=re.escape("prompt 0: 'circle' is none of the generator's")):
        stage().training_step(unannotated(pictures(1), ["red circle"]))
