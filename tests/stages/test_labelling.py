"""Labels against the plain forward on each whole sequence, whatever they were made beside."""

import lightning as L
import pytest
import torch
from plain import build, chat, forward
from scipy.special import rel_entr

from zr.data import Index, LabelData, LabelledFolder, ScoreData, read_shards, shapes, write_shards
from zr.data.record import decode
from zr.models import LinearHead, Policy, ReasoningReward, RewardModel, SamplingRule, ScoreTokenHead, Temperature, compose
from zr.scores import ScoreDistribution
from zr.stages import Labelling, WriteLabels
from zr.stages.labelling import trace_seed

NAMES = list(shapes.DIMENSIONS)
RULE = SamplingRule(length=7, suppressed=tuple(range(16, 53)))  # words left out, so that random weights end some traces
KEYS = ["p0.a", "p0.b", "p1.a"]
PROMPTS = ["red ring", "red ring", "blue square, green triangle"]


def teacher_of(family, off_scale=False, **options):
    backbone = build(family, shapes.rubric(reasoning=True))
    return ReasoningReward(Policy(backbone, off_scale=off_scale), **({"traces": 3, "rule": RULE} | options)).eval()


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_5"])
def teacher(request):
    return teacher_of(request.param, off_scale=True)


@pytest.fixture(scope="module")
def direct():
    torch.manual_seed(0)
    return compose(build("qwen3_vl"), LinearHead).eval()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in ((48, 48), (64, 48), (48, 48))
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three tars of two prompts with two and three images, of the world; nobody annotated them."""
    folder = tmp_path_factory.mktemp("source")
    several = [record for count in (2, 3) for record in shapes.records("unlabelled", count=6, candidates=count, seed=count)]
    records = [record for i, record in enumerate(several) if i in (0, 1, 2, 9, 10, 11)]
    return write_shards(records, folder, shapes.rubric().scale, split="train", per_shard=2)


@torch.no_grad()
def labels_of(scorer, images, prompts=PROMPTS, keys=KEYS, **options):
    return Labelling(scorer, **options)(images, prompts, keys)


def into_shards(source, out, scorer, batch_size=4, labeller="teacher", **options):
    stage = Labelling(scorer, **options)
    target = LabelledFolder(out, source, shapes.rubric().scale, labeller, stage.dimensions, stage.settings)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=out, callbacks=[WriteLabels(target)], **quiet)
    with target.begin():
        trainer.predict(stage, datamodule=LabelData(target, batch_size=batch_size), return_predictions=False)
        return target.finish()


class Plain:
    """The teacher's model by the plain forward alone, one trace at a time."""

    def __init__(self, teacher):
        self.backbone = teacher.backbone
        self.rubric = teacher.rubric
        self.ids = self.backbone.processor.tokenizer.convert_tokens_to_ids

    @torch.no_grad()
    def after(self, prompt, dimension, image, trace):
        """Probabilities of the labels after a trace, and the mass outside them."""
        end = self.ids("</think>")
        closed = trace if trace[-1:] == [end] else [*trace, end]
        text = chat(prompt, self.rubric.wording.instructions[dimension], thinking=True)
        logits = forward(self.backbone, text, [image], [*closed, self.ids("score")])[2][-1].double()
        labels = self.ids(list("ABCDEFGHI"))
        return logits[labels].softmax(-1).tolist(), 1 - logits.softmax(-1)[labels].sum().item()


def check(label, plain, prompt, dimension, image):
    """Everything in a label from its traces' ids; gives the number of forced ones."""
    how = label.reasoning
    assert len(how.ids) == len(how.probs) == len(label.traces) == how.traces == 3
    found = [plain.after(prompt, dimension, image, list(ids)) for ids in how.ids]
    each, outside = torch.tensor([probs for probs, _ in found]), [mass for _, mass in found]
    torch.testing.assert_close(torch.tensor(how.probs), each, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(label.probs), each.mean(0), atol=1e-5, rtol=0)
    assert how.spread == pytest.approx(rel_entr(each.numpy(), each.mean(0).numpy()).sum(-1).mean(), abs=1e-5)
    assert label.off_scale == pytest.approx(sum(outside) / 3, abs=1e-5)
    assert how.tokens == sum(map(len, how.ids))
    assert how.forced == sum(ids[-1] != plain.ids("</think>") for ids in how.ids)
    for text, ids in zip(label.traces, how.ids, strict=True):
        words = plain.backbone.processor.tokenizer.convert_ids_to_tokens(list(ids))
        assert text.split() == [word for word in words if word != "</think>"]
    return how.forced


def test_a_stored_label_is_the_teacher_s_distribution_after_the_stored_trace(teacher, source, tmp_path):
    summaries = into_shards(source, tmp_path / "out", teacher, keep_traces=True, dimensions=["plausibility", "alignment"])
    plain, forced, count, spreads = Plain(teacher), 0, 0, []
    for record in read_shards(tmp_path / "out"):
        for candidate in record.candidates:
            image = decode(candidate, record.key) / 255
            for dimension in ("plausibility", "alignment"):
                label = record.distributions[dimension][candidate.id]["teacher"]
                forced += check(label, plain, record.prompt, dimension, image)
                spreads.append(label.reasoning.spread)
                count += 1
    assert 0 < forced < 3 * count == 90  # else the test shows little
    assert max(spreads) > 1e-3
    overall = summaries["train"]["overall"]
    assert (overall["labels"], overall["forced"]) == (30, pytest.approx(forced / 90))
    assert overall["spread"] == pytest.approx(sum(spreads) / 30)


def test_neighbours_and_order_change_nothing(teacher, images):
    every = labels_of(teacher, images, keep_traces=True)
    back = labels_of(teacher, images[::-1], PROMPTS[::-1], KEYS[::-1], keep_traces=True)[::-1]
    alone = [labels_of(teacher, [images[i]], [PROMPTS[i]], [KEYS[i]], keep_traces=True)[0] for i in range(3)]
    few = labels_of(teacher, images, keep_traces=True, dimensions=["aesthetics"])
    more = labels_of(teacher, images, keep_traces=True, traces=5)
    for i in range(3):
        for name in NAMES:
            one = every[i][name].reasoning
            assert back[i][name].reasoning.ids == alone[i][name].reasoning.ids == one.ids == more[i][name].reasoning.ids[:3]
            assert alone[i][name].probs == pytest.approx(every[i][name].probs, abs=1e-5)
        assert few[i]["aesthetics"].reasoning.ids == every[i]["aesthetics"].reasoning.ids


def test_a_trace_has_its_own_luck(teacher, images):
    """By key, dimension, number and seed, and by nothing else: one image under several names."""
    same = labels_of(teacher, [images[0]] * 3, ["red ring"] * 3, ["p0.a", "p0.b", "p0.a"], keep_traces=True)
    other = labels_of(teacher, [images[0]], ["red ring"], ["p0.a"], keep_traces=True, seed=1)
    traces = [tuple(label[name].reasoning.ids for name in NAMES) for label in (*same, *other)]
    assert traces[0] == traces[2]
    assert len(set(traces)) == 3
    assert len({ids for of_name in traces[0] for ids in of_name}) > 6
    arguments = [(0, "p0.a", "realism", 0), (1, "p0.a", "realism", 0), (0, "p0.b", "realism", 0), (0, "p0.a", "realism", 1)]
    seeds = {trace_seed(*given) for given in [*arguments, (0, "p0.a", "alignment", 0)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_is_not_asked_for_is_not_kept(images):
    teacher = teacher_of("qwen3_vl")
    [label] = labels_of(teacher, images[:1], PROMPTS[:1], KEYS[:1])
    kept = labels_of(teacher, images[:1], PROMPTS[:1], KEYS[:1], keep_traces=True)[0]
    for name in NAMES:
        how = label[name].reasoning
        assert (label[name].traces, how.probs, how.ids, label[name].off_scale) == ((), (), (), None)
        assert label[name].probs == kept[name].probs
        assert (how.traces, how.tokens, how.spread) == (3, kept[name].reasoning.tokens, kept[name].reasoning.spread)
    [one] = labels_of(teacher, images[:1], PROMPTS[:1], KEYS[:1], traces=1)
    assert {one[name].reasoning.spread for name in NAMES} == {0.0}


def test_the_seed_of_a_label_and_the_mixture_are_the_scorer_s_own_kind(images):
    """K traces, each drawn by itself, averaged: what the scorer does with the seeds of its own."""
    teacher = teacher_of("qwen3_vl", traces=4)
    teacher._seed = lambda prompt, dimension, trace: trace_seed(5, "p0.a", dimension, trace)
    expected = teacher(images=images[:1], prompts=PROMPTS[:1])
    [label] = labels_of(teacher, images[:1], PROMPTS[:1], KEYS[:1], seed=5)
    for d, name in enumerate(NAMES):
        assert label[name].probs == pytest.approx(expected.probs[0, d].tolist(), abs=1e-6)


def test_a_direct_model_labels_in_one_answer(direct, images):
    every = direct(images=images, prompts=PROMPTS)
    labels = labels_of(direct, images)
    for i in range(3):
        assert list(labels[i]) == NAMES
        for d, name in enumerate(NAMES):
            assert labels[i][name].probs == pytest.approx(every.probs[i, d].tolist(), abs=1e-6)
            assert (labels[i][name].reasoning, labels[i][name].off_scale, labels[i][name].traces) == (None, None, ())
    backbone = build("qwen3_vl")
    telling = RewardModel(backbone, ScoreTokenHead(backbone, off_scale=True), backbone.rubric).eval()
    expected = telling(images=images, prompts=PROMPTS).off_scale
    found = [[label[name].off_scale for name in NAMES] for label in labels_of(telling, images)]
    torch.testing.assert_close(torch.tensor(found), expected)
    assert expected.min() > 0.1


class Judge:
    """A scorer that is no model: it likes dark images, and refuses prompts that say so."""

    rubric = shapes.rubric()

    def __call__(self, images, prompts, dimensions=None):
        for i, prompt in enumerate(prompts):
            if "refuse" in prompt:
                raise ValueError(f"sample {i}: the prompt is refused: leave it out")
        bright = torch.stack([image.float().mean() / 255 for image in images])
        logits = -bright[:, None, None] * torch.arange(9.0) * 20
        return ScoreDistribution(logits.expand(-1, len(dimensions or NAMES), -1), self.rubric.bins)


def test_any_scorer_and_small_probabilities(images):
    labels = labels_of(Judge(), images)
    for label, image in zip(labels, images, strict=True):
        bright = image.double().mean() / 255
        expected = (-bright * torch.arange(9) * 20).softmax(-1)
        assert label["realism"].probs == pytest.approx(expected.tolist(), rel=1e-4)
        assert label["realism"].probs[-1] > 0  # a student's reverse KL would be infinite


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_batch_size_changes_nothing_but_rounding(source, tmp_path, size):
    teacher = teacher_of("qwen3_vl")
    into_shards(source, tmp_path / "a", teacher, batch_size=7, keep_traces=True)
    into_shards(source, tmp_path / "b", teacher, batch_size=size, keep_traces=True)
    for one, other in zip(*(read_shards(tmp_path / name) for name in "ab"), strict=True):
        assert (one.key, one.candidates) == (other.key, other.candidates)
        for name in NAMES:
            for candidate in one.candidates:
                first, second = (r.distributions[name][candidate.id]["teacher"] for r in (one, other))
                assert first.reasoning.ids == second.reasoning.ids
                assert first.probs == pytest.approx(second.probs, abs=1e-5)


def test_training_reads_the_labels(source, direct, tmp_path):
    into_shards(source, tmp_path / "out", direct, labeller="big", dimensions=["realism", "aesthetics"])
    data = ScoreData(tmp_path / "out", shapes.rubric(), batch_size=6, test="train", labeller="big")
    [batch] = data.test_dataloader()
    expected = direct(images=batch.images, prompts=batch.prompts).probs
    torch.testing.assert_close(batch.teacher[:, [1, 2]], expected[:, [1, 2]], atol=1e-5, rtol=0)
    assert not batch.teacher[:, [0, 3]].any()
    assert len(batch.keys) == 15


def test_settings_say_what_decides(direct, source):
    reasoned = Labelling(teacher_of("qwen3_vl"), seed=3).settings
    rule = {"temperature": 1.0, "length": 7, "suppressed": RULE.suppressed}
    assert reasoned == {"traces": 3, "seed": 3, "keep_traces": False, "rule": rule}
    assert Labelling(direct, seed=3).settings == {}


def test_a_calibrated_scorer_labels_as_it_answers(direct, images):
    rubric = shapes.rubric()
    flatter = Temperature(rubric.scale_id, rubric.dimensions, (2.0, 1.0, 3.0, 0.5))
    teacher = teacher_of("qwen3_vl")
    [own], answered = labels_of(teacher, images[:1], PROMPTS[:1], KEYS[:1]), dict(zip(NAMES, flatter.temperature, strict=True))
    teacher.calibration = flatter
    [label] = labels_of(teacher, images[:1], PROMPTS[:1], KEYS[:1], dimensions=["aesthetics", "alignment"])
    for name, found in label.items():
        powers = [p ** (1 / answered[name]) for p in own[name].probs]
        assert found.probs == pytest.approx([power / sum(powers) for power in powers], abs=1e-6)
        assert found.reasoning.spread == pytest.approx(own[name].reasoning.spread, abs=1e-9)
    assert Labelling(teacher).settings["calibration"]["temperature"] == flatter.temperature
    calibrated = RewardModel(direct.backbone, direct.head, direct.rubric, calibration=flatter)
    assert list(Labelling(calibrated).settings) == ["calibration"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"traces": 2}, "RewardModel answers without reasoning: leave traces and keep_traces out"),
        ({"keep_traces": True}, "answers without reasoning"),
        ({"dimensions": ["beauty"]}, r"different names among \['alignment', .*\], got \['beauty'\]"),
        ({"dimensions": []}, "different names"),
    ],
)
def test_wrong_arguments(direct, options, words):
    with pytest.raises(ValueError, match=words):
        Labelling(direct, **options)
    with pytest.raises(ValueError, match="traces must be at least 1, got 0"):
        Labelling(teacher_of("qwen3_vl"), traces=0)


def test_an_image_that_is_refused_is_named_and_nothing_is_half_written(tmp_path):
    records = list(shapes.records("unlabelled", count=6, candidates=2))
    records[4] = type(records[4])("p4", "refuse me", records[4].candidates)
    source = write_shards(records, tmp_path / "in", shapes.rubric().scale, per_shard=2)
    words = r"in/train-000002\.tar, p4\.0 cannot be labelled: the prompt is refused: leave it out$"
    first = records[4].candidates[0].id
    with pytest.raises(ValueError, match=words.replace("p4\\.0", f"p4\\.{first}")):
        into_shards(source, tmp_path / "out", Judge(), batch_size=3)
    there = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert there == {"train-000000.tar", "train-000001.tar"}
    with pytest.raises(ValueError, match="cannot be labelled"):
        into_shards(Index.load(tmp_path / "in"), tmp_path / "out", Judge(), batch_size=3)


def test_broken_weights_are_named(source, tmp_path):
    teacher = teacher_of("qwen3_vl")
    next(teacher.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"train-000000\.tar, \S+ cannot be labelled: .*NaN"):
        into_shards(source, tmp_path / "out", teacher)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_batch_that_does_not_fit(source, tmp_path, direct, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(direct, "forward", full)
    with pytest.raises(ValueError, match="a batch of 4 images, 1 times 4 questions each, does not fit into memory: run"):
        into_shards(source, tmp_path / "out", direct)
