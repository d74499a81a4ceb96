"""Every packaged recipe runs, its checkpoint reloads, and what it leaves loads with `zr.load`."""

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zr
from zr.commands.configs import _names, packaged
from zr.commands.training import TrainingCLI, run
from zr.data import LabelledDistribution, Record, ScoreData, shapes, write_shards

RUBRIC = shapes.rubric()
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data folder, whose training split is labelled, an untrained model to start from, and one that reasons."""
    from zr.models import SamplingRule, ScoreTokenHead, compose, reasoning, tiny_qwen3_vl

    folder = tmp_path_factory.mktemp("world")
    for split in ("base", "train", "unlabelled", "curated", "validation", "test"):
        records = map(labelled if split == "train" else copy, shapes.records(split, 3, candidates=2))
        write_shards(records, folder / "data", RUBRIC.scale, split=split)
    for seed, name in enumerate(("start", "teacher")):
        model = compose(tiny_qwen3_vl(RUBRIC, shapes.vocabulary, seed=seed), ScoreTokenHead)
        if name == "teacher":
            model = reasoning(model, shapes.rubric(reasoning=True), rule=SamplingRule(length=6))
        model.save_pretrained(folder / name)
    return folder


def labelled(record: Record) -> Record:
    """With a distribution for each image and dimension."""
    label = {"teacher": LabelledDistribution((0.2, *[0.1] * 8), (), RUBRIC.scale.scale_id)}
    return replace(record, distributions={d: {c.id: label for c in record.candidates} for d in RUBRIC.dimensions})


def test_there_are_recipes() -> None:
    main = {
        "look",
        "base",
        "supervised",
        "teacher_small",
        "teacher",
        "student_small",
        "student",
        "on_policy_small",
        "zero_shot",
        "generator",
        "text_to_image_small",
        "text_to_image",
    }
    assert {f"zr:{name}" for name in main} <= set(_names())


def command(name: str) -> list[str]:
    """What a recipe opens with: a verb, and one recipe, or one and a second that changes it."""
    first = packaged(name).read_text().splitlines()[0]
    found = re.fullmatch(r"# .*  zr ((?:fit|test)(?: --config zr:\w+){1,2})", first)
    assert found, first
    words = found[1].split()
    assert words[-1] == name
    return words


def losses(made) -> dict[str, tuple[str, float]]:
    return {name: (type(term.loss).__name__, term.weight) for name, term in made.terms.items() if term.weight}


GDSO = {"pointwise": ("InterpolatedCrossEntropy", 0.5), "pairwise": ("GapLoss", 0.5)}
LOSSES = {
    "zr:sft": {"score": ("InterpolatedCrossEntropy", 1)},
    "zr:deqa": {"label": ("TiltedGaussianCrossEntropy", 1), "order": ("FidelityLoss", 1)},
    "zr:bradley_terry": {"order": ("BradleyTerryLoss", 1)},
    "zr:teacher_small": GDSO,
    "zr:grpo": {},
    "zr:exact": {"pointwise": ("AbsoluteExpectationLoss", 1), "pairwise": ("GapLoss", 1)},
    "zr:direct_terms": GDSO,
    "zr:parsed": GDSO,
    "zr:centred": GDSO,
    "zr:student_small": {"kl": ("ForwardKL", 1)},
    "zr:student_clip": {"kl": ("ForwardKL", 1)},
    "zr:on_policy_small": {"score": ("ReverseKL", 1)},
}
BIG = ("zr:teacher", "zr:student", "zr:student_full", "zr:text_to_image")
GENERATORS = ("zr:generator", "zr:text_to_image_small")
ANSWERS = {"zr:reward_dance": ["ScoreThenReason"], "zr:rationale": ["ReasonThenScore"]}


def check_parts(name: str, made) -> None:
    """That a baseline has the parts by which it is known."""
    if name in LOSSES:
        assert losses(made) == LOSSES[name]
    if name in ANSWERS:
        assert [type(answer).__name__ for answer in made.answers.values()] == ANSWERS[name]
    if name == "zr:direct_terms":
        assert made.policy_term is None
    if name in ("zr:teacher_small", "zr:grpo", "zr:exact", "zr:parsed", "zr:centred"):
        kinds = [type(part).__name__ for part in (made.policy_term.advantage, made.policy_term.decoding)]
        exact, parsed = name == "zr:exact", name == "zr:parsed"
        advantage = {"zr:exact": "LeaveOneOutAdvantage", "zr:centred": "CentredAdvantage"}.get(name, "GroupAdvantage")
        assert kinds == [advantage, "ParsedScore" if parsed else "ExpectedScore"]
        assert (made.policy_term.reward.pointwise, made.policy_term.reward.pairwise) == (1, 2 if exact else 1)


@pytest.mark.parametrize("name", [n for n in _names() if command(n)[0] == "fit" and n not in (*BIG, *GENERATORS)])
def test_recipe_runs_and_what_it_leaves_reloads(name: str, world: Path, tmp_path: Path) -> None:
    recipe = command(name)[1:]
    places = ["--folder", str(world / "data"), "--start", str(world / "start"), "--run", str(tmp_path)]
    short = [
        "--trainer.max_steps=2",
        "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=1",
    ]
    if "Teacher" in packaged(recipe[1]).read_text():
        short += ["--model.model.rule.length=6", "--model.group_size=2", "--data.pairs_per_batch=2"]
    if name == "zr:on_policy_small":
        short += ["--data.batch_size=1", "--model.teacher.source", str(world / "teacher")]
    if name in ("zr:rationale", "zr:on_policy_small"):
        short += ["--model.model.rule.length=6"]
    if name == "zr:yes_token":
        short += ["--data.pairs_per_batch=4"]
    run(["fit", *recipe, *places, *short, *QUIET, "--trainer.enable_checkpointing=true"])
    model = zr.load(tmp_path)
    compares = name == "zr:yes_token"
    assert model.rubric.dimensions == RUBRIC.dimensions
    assert model.rubric.bins == ((0, 1) if compares else RUBRIC.bins)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    kinds = "Supervised|Language|Teacher|Comparison|Student|OnPolicy"
    stage_class = getattr(zr.stages, re.findall(rf"class_path: zr\.stages\.({kinds})", packaged(recipe[1]).read_text())[0])
    stage = stage_class.load_from_checkpoint(checkpoint, weights_only=True).eval()
    check_parts(name, stage)
    images, prompts = torch.rand(2, 3, 48, 48), [shapes.prompts("test")[0]] * 2
    images = [[*images], [*images]] if compares else images
    with torch.no_grad():
        same = torch.equal(stage.model(images, prompts).mean, model(images, prompts).mean)
    assert same, "the checkpoint and the kept model must be one: both are of the last step"


def test_the_generators_recipe_runs_and_what_it_leaves_reloads(world: Path, tmp_path: Path) -> None:
    from zr.models.generators import FlowGenerator
    from zr.stages import FlowMatching

    recipe = command("zr:generator")[1:]
    places = ["--folder", str(world / "data"), "--run", str(tmp_path)]
    short = ["--trainer.max_epochs=1", "--data.batch_size=2", "--trainer.enable_checkpointing=true"]
    run(["fit", *recipe, *places, *short, *QUIET])
    generator = FlowGenerator.from_pretrained(tmp_path)
    (file,) = tmp_path.rglob("*.ckpt")
    stage = FlowMatching.load_from_checkpoint(file, weights_only=True)
    images = [g.sample(shapes.prompts("test")[:1], torch.Generator().manual_seed(0)) for g in (generator, stage.generator)]
    assert torch.equal(*images)
    assert images[0].shape == (1, 3, 48, 48)
    (log,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(log.read_text().splitlines()))
    assert [bool(row["train/loss"]) for row in rows].count(True) == 2
    (row,) = (row for row in rows if row["val/loss"])
    scores = [float(row[f"val/score/{name}"]) for name in RUBRIC.dimensions]
    assert all(1 <= score <= 5 for score in scores)


def test_text_to_image_runs_and_what_it_leaves_reloads(world: Path, tmp_path: Path) -> None:
    from zr.models.generators import FlowGenerator, FlowSize, tiny_flow
    from zr.stages import TextToImage

    start = tiny_flow(shapes.vocabulary, FlowSize(width=16, layers=1, heads=2), steps=4)
    start.save_pretrained(tmp_path / "start")
    scorers = [f"--model.{place}.scorer.source={world / 'start'}" for place in ("rewards.student", "held_out")]
    places = ["--folder", str(world / "data"), "--start", str(tmp_path / "start"), "--run", str(tmp_path / "run")]
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=1", "--trainer.enable_checkpointing=true"]
    path = ["--model.path=zr.stages.RandomTruncation", "--model.path.most=3", "--model.rewards.student.ceiling=5"]
    run(["fit", *command("zr:text_to_image_small")[1:], *places, *scorers, *short, *path, *QUIET])
    generator = FlowGenerator.from_pretrained(tmp_path / "run")
    (file,) = tmp_path.rglob("*.ckpt")
    made = TextToImage.load_from_checkpoint(file, weights_only=True)
    assert (made.path.most, made.rewards["student"].ceiling, made.velocity_distance) == (3, 5.0, 10.0)
    found = [g.sample(shapes.prompts("test")[:1], torch.Generator().manual_seed(0)) for g in (generator, made.generator, start)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    (log,) = tmp_path.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(log.read_text().splitlines()) if row["val/gap"]]
    assert len(rows) == 2
    for name in ("student", "held_out"):
        assert all(1 <= float(row[f"val/{name}/{dimension}"]) <= 5 for row in rows for dimension in RUBRIC.dimensions)


def stage(world: Path, *recipes: str, options: tuple[str, ...] = ()):
    """The stage that recipes and options build."""
    files = [word for name in recipes for word in ("--config", str(packaged(name)))]
    places = ["--folder", str(world / "data"), "--start", str(world / "start"), "--run", "nowhere"]
    return TrainingCLI("fit", [*files, *places, *options]).model


def test_baselines_of_the_teacher_that_need_one_thing_more(world: Path) -> None:
    parsed = stage(world, "zr:teacher_small", "zr:grpo", "zr:parsed")
    assert (type(parsed.policy_term.decoding).__name__, losses(parsed)) == ("ParsedScore", {})
    options = ("--model.policy.decoding.step=2.0", "--model.policy.decoding.label_weight=8")  # as the cells of zr:ablations
    coarse = stage(world, "zr:teacher_small", "zr:grpo", "zr:parsed", options=options).policy_term.decoding
    assert (coarse.step, coarse.label_weight) == (2.0, 8.0)
    order = stage(world, "zr:teacher_small", options=("--model.terms.pairwise.loss=zr.losses.BradleyTerryLoss",))
    assert losses(order) == GDSO | {"pairwise": ("BradleyTerryLoss", 0.5)}
    assert order.policy.head.with_off_scale


def test_zero_shot_is_measured_and_left_as_it_is(world: Path, tmp_path: Path) -> None:
    from zr.stages import ScoreMetrics

    assert command("zr:zero_shot") == ["test", "--config", "zr:zero_shot"]
    places = ["--folder", str(world / "data"), "--start", str(world / "start"), "--run", str(tmp_path)]
    run(["test", "--config", "zr:zero_shot", *places, "--trainer.enable_progress_bar=false"])
    (file,) = tmp_path.rglob("metrics.csv")
    (logged,) = csv.DictReader(file.read_text().splitlines())
    model, wanted = zr.load(world / "start"), ScoreMetrics(RUBRIC)
    for batch in ScoreData(world / "data", RUBRIC, batch_size=1).test_dataloader():
        with torch.no_grad():
            wanted.update(model(images=batch.images, prompts=batch.prompts), batch)
    assert float(logged["test/srcc"]) == pytest.approx(float(wanted.compute()["srcc"]), abs=1e-5)
    assert not list(tmp_path.rglob("*.safetensors"))


def of_lora(test):
    # jsonargparse makes a LoftQConfig of the default, an empty dict, and peft says that it takes no notice of it
    return pytest.mark.filterwarnings("ignore:`loftq_config` specified but will be ignored:UserWarning")(test)


@of_lora
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_the_big_recipe_takes_a_step_at_a_small_size(world: Path, tmp_path: Path) -> None:
    from zr.models import tiny_qwen3_5

    made = tiny_qwen3_5(zr.Rubric.load("zr:reasoning"), shapes.vocabulary, hidden_size=32, vision_size=16, vision_layers=1)
    made.save_pretrained(tmp_path / "released")
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    places = ["--folder", str(world / "data"), "--start", str(tmp_path / "released"), "--run", str(tmp_path / "run")]
    small = ["--model.model.rule.length=4", "--model.group_size=2", "--data.num_workers=0", "--model.coupling=0"]
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu", *QUIET]
    run(["fit", "--config", "zr:teacher", *places, *small, *short])
    after = zr.load(tmp_path / "run").backbone.model
    state = dict(after.named_parameters())
    changed = {name for name, p in state.items() if "lora_B" in name and p.count_nonzero()}
    assert len(changed) == len([name for name in state if "lora_B" in name]) > 8
    assert not any("visual" in name or "lm_head" in name for name in changed)
    for name, p in before.items():
        found = state[name] if name in state else state[name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(found.float(), p.bfloat16().float()), name


@of_lora
def test_the_big_recipe_at_its_size_on_the_meta_device(world: Path, tmp_path: Path, monkeypatch) -> None:
    """The sizes published for Qwen3.5-27B; what the recipe's comments say of them, worked by hand."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    from zr.models import tiny_qwen3_5
    from zr.models.backbones import vlm

    text = {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "vocab_size": 248320}
    text |= {"num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 262144}
    text |= {f"linear_num_{kind}_heads": count for kind, count in (("key", 16), ("value", 48))}
    text |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 5120}
    vision |= {"patch_size": 16, "num_position_embeddings": 2304}
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False)

    class Published:
        @staticmethod
        def from_pretrained(source, dtype, **_):
            assert dtype == "bfloat16"
            with torch.device("meta"):
                return Qwen3_5ForConditionalGeneration(config).bfloat16(), {"missing_keys": []}

    tiny_qwen3_5(zr.Rubric.load("zr:reasoning"), shapes.vocabulary).save_pretrained(tmp_path / "released")
    monkeypatch.setattr(vlm, "AutoModelForImageTextToText", Published)
    made = stage(world, "zr:teacher", options=("--start", str(tmp_path / "released"), "--trainer.accelerator=cpu"))
    model = made.policy.backbone.model
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert sum(p.numel() for p in frozen.values()) == 27_356_728_560
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    mlp = 3 * (5120 + 17408)
    linear = (5120 + 10240) + (5120 + 6144) + 2 * (5120 + 48) + (6144 + 5120)
    full = (5120 + 12288) + 2 * (5120 + 1024) + (6144 + 5120)
    trained = [p for p in made.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 16 * (64 * mlp + 48 * linear + 16 * full) == 116_727_808
    assert {(p.dtype, p.device.type) for p in trained} == {(torch.float32, "meta")}
    layers = model.model.language_model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    states = [layer.linear_attn for layer in layers if hasattr(layer, "linear_attn")]
    assert sum(s.num_v_heads * s.head_k_dim * s.head_v_dim * 4 for s in states) == pytest.approx(151e6, rel=0.01)
    assert (made.group_size, made.micro_batch, made.policy_term.loss.length, made.model.rule.length) == (8, 2, 1024, 1024)


STUDENT = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "vocab_size": 248320}
STUDENT |= {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 262144}
STUDENT |= {f"linear_num_{kind}_heads": count for kind, count in (("key", 16), ("value", 32))}
STUDENT |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}


@of_lora
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "all weights"])
def test_the_big_student_at_its_size_on_the_meta_device(world: Path, tmp_path: Path, monkeypatch, whole: bool) -> None:
    """The sizes published for Qwen3.5-9B; what the recipe's comments say of them, worked by hand."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    from zr.models import tiny_qwen3_5
    from zr.models.backbones import vlm

    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096}
    vision |= {"patch_size": 16, "num_position_embeddings": 2304}
    config = Qwen3_5Config(text_config=STUDENT, vision_config=vision, tie_word_embeddings=False)

    class Published:
        @staticmethod
        def from_pretrained(source, dtype, **_):
            with torch.device("meta"):
                return Qwen3_5ForConditionalGeneration(config).to(getattr(torch, dtype)), {"missing_keys": []}

    tiny_qwen3_5(zr.Rubric.load("zr:direct"), shapes.vocabulary).save_pretrained(tmp_path / "released")
    monkeypatch.setattr(vlm, "AutoModelForImageTextToText", Published)
    recipes = ["zr:student", *(["zr:student_full"] if whole else [])]
    made = stage(world, *recipes, options=("--start", str(tmp_path / "released"), "--trainer.accelerator=cpu"))
    assert losses(made) == {"kl": ("ForwardKL", 1)}
    layers = made.model.backbone.model.model.language_model.layers
    weights = [p for name, p in made.named_parameters() if "lora_" not in name]
    trained = [p for p in made.parameters() if p.requires_grad]
    assert sum(p.numel() for p in weights) == pytest.approx(9.41e9, rel=1e-3)
    inner = sum(p.numel() for name, p in layers.named_parameters() if "lora_" not in name)
    assert inner == pytest.approx(6.92e9, rel=1e-3)
    if whole:
        assert {(p.dtype, p.requires_grad) for p in made.parameters()} == {(torch.float32, True)}
        assert 16 * sum(p.numel() for p in trained) == pytest.approx(151e9, rel=0.01)
    else:
        mlp, linear, full = 3 * (4096 + 12288), 2 * (4096 + 32) + 12288 + 2 * 8192, 2 * (4096 + 1024) + 12288 + 8192
        assert {p.dtype for p in weights} == {torch.bfloat16}
        assert {p.dtype for p in trained} == {torch.float32}
        assert sum(p.numel() for p in trained) == 32 * (32 * mlp + 24 * linear + 8 * full) == 86_556_672
    assert all(layer.gradient_checkpointing for layer in layers)
    states = [layer.linear_attn for layer in layers if hasattr(layer, "linear_attn")]
    assert sum(s.num_v_heads * s.head_k_dim * s.head_v_dim * 4 for s in states) == pytest.approx(50e6, rel=0.01)


@of_lora
def test_the_big_student_takes_a_step_at_a_small_size(world: Path, tmp_path: Path) -> None:
    from zr.models import tiny_qwen3_5

    rubric = zr.Rubric.load("zr:direct")
    made = tiny_qwen3_5(rubric, shapes.vocabulary, hidden_size=32, vision_size=16, vision_layers=1)
    made.save_pretrained(tmp_path / "released")
    places = ["--folder", str(world / "data"), "--start", str(tmp_path / "released"), "--run", str(tmp_path / "run")]
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=1", "--data.num_workers=0"]
    run(["fit", "--config", "zr:student", *places, *short, "--trainer.accelerator=cpu", *QUIET])
    state = dict(zr.load(tmp_path / "run").backbone.model.named_parameters())
    assert len([name for name, p in state.items() if "lora_B" in name and p.count_nonzero()]) > 8
    (file,) = (tmp_path / "run").rglob("metrics.csv")
    assert "train/kl" in file.read_text().splitlines()[0]


@of_lora
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_the_big_generator_at_its_size_on_the_meta_device(world: Path, tmp_path: Path, monkeypatch) -> None:
    """The sizes published for Z-Image; what the recipe's comments say of them, worked by hand."""
    import diffusers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    from zr.models.generators import FullGuidance, ZImageGenerator

    text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936, "head_dim": 128}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    levels = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    levels |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    levels |= {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159}

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))

    def published(source, dtype, **_):
        assert source == "Tongyi-MAI/Z-Image"
        assert dtype == torch.bfloat16
        with torch.device("meta"):
            parts = diffusers.AutoencoderKL(**levels), Qwen3Model(Qwen3Config(**text)), diffusers.ZImageTransformer2DModel()
        vae, encoder, transformer = (part.to(dtype) for part in parts)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
        return diffusers.ZImagePipeline(scheduler, vae, encoder, words, transformer)

    monkeypatch.setattr(diffusers.ZImagePipeline, "load_config", lambda *_, **__: {"_class_name": "ZImagePipeline"})
    monkeypatch.setattr(diffusers.ZImagePipeline, "from_pretrained", published)
    scorers = [f"--model.{place}.scorer.source={world / 'start'}" for place in ("rewards.student", "held_out")]
    files = ["--config", str(packaged("zr:text_to_image")), "--run", "nowhere", "--trainer.accelerator=cpu"]
    made = TrainingCLI("fit", [*files, *scorers]).model
    generator = made.generator
    assert type(generator) is ZImageGenerator
    assert type(generator.guidance) is FullGuidance
    assert (generator.steps, generator.side, generator.guidance.scale, made.micro_batch) == (28, 512, 5.0, 1)
    trained = [p for p in generator.parameters() if p.requires_grad]
    frozen = [p for p in generator.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == pytest.approx(6.15e9, rel=1e-3)
    width, inner = 3840, 10240
    assert sum(p.numel() for p in trained) == 32 * 34 * (4 * 2 * width + 3 * (width + inner)) == 79_380_480
    assert {(p.dtype, p.device.type) for p in trained} == {(torch.float32, "meta")}
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    sizes = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in generator.pipeline.components.items()
        if name in ("vae", "text_encoder")
    }
    assert sizes == {"vae": pytest.approx(84e6, rel=0.01), "text_encoder": pytest.approx(4.02e9, rel=1e-3)}
    assert generator.transformer.gradient_checkpointing
    assert generator.pipeline.vae.decoder.gradient_checkpointing
    assert generator.state_dict().keys() == {name for name, p in generator.named_parameters() if p.requires_grad}


def test_the_held_out_scorer_of_a_large_generator_is_a_recipe_too(tmp_path: Path) -> None:
    """The command that zr:text_to_image names, with a small CLIP in the place of the released one."""
    from zr.models import OrdinalHead, compose, tiny_clip

    rubric = zr.Rubric.load("zr:direct")
    compose(tiny_clip(rubric, shapes.vocabulary), OrdinalHead).save_pretrained(tmp_path / "small")
    for split in ("train", "validation"):
        write_shards(shapes.records(split, 2, candidates=2), tmp_path / "data", rubric.scale, split=split)
    text = packaged("zr:text_to_image").read_text()
    (found,) = re.findall(r"#   zr (fit --config zr:clip .*\n(?:#       .*\n)*)", text)
    places = {
        "zr-data": str(tmp_path / "data"),
        "zr-runs/held_out": str(tmp_path / "run"),
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": str(tmp_path / "small" / "backbone"),
    }
    words = [places.get(word, word) for word in re.sub(r"\\\n#", " ", found).split()]
    assert set(places.values()) <= set(words)
    run([*words, "--trainer.max_steps=1", "--trainer.accelerator=cpu", *QUIET])
    assert zr.load(tmp_path / "run").rubric.scale_id == rubric.scale_id


def test_shell_overrides_reach_what_a_recipe_interpolates(world: Path, tmp_path: Path) -> None:
    places = ["--folder", str(world / "data"), "--start", str(world / "start"), "--run", str(tmp_path)]
    cli = TrainingCLI("fit", ["--config", str(packaged("zr:supervised")), *places, "--model.terms.votes.weight=0.25"])
    assert str(cli.datamodule.folder) == str(world / "data")
    assert cli.model.terms["votes"].weight == 0.25
    assert cli.trainer.default_root_dir == str(tmp_path)


MIX = """
model:
  init_args:
    terms:
      votes: {class_path: zr.stages.Term, init_args: {loss: {class_path: zr.losses.VotesRankedProbabilityLoss}, weight: 0}}
      regression: {class_path: zr.stages.Term, init_args: {loss: {class_path: zr.losses.SquaredExpectationLoss}}}
      gap: {class_path: zr.stages.Term, init_args: {loss: {class_path: zr.losses.GapLoss}, weight: 0.5}}
      order: {class_path: zr.stages.Term, init_args: {loss: {class_path: zr.losses.BradleyTerryLoss}, weight: 0.1}}
data:
  init_args:
    pairs: {class_path: zr.data.AllPairs}
trainer:
  max_epochs: 1
  callbacks:
    - class_path: zr.stages.KeepBestModel
    - class_path: zr.stages.WriteDistributions
      init_args: {path: "${run}/distributions.jsonl"}
"""


def test_a_mix_of_losses_is_a_second_file_and_every_command_runs(world: Path, tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text(MIX)
    places = ["--folder", str(world / "data"), "--start", str(world / "start"), "--run", str(tmp_path / "run")]
    for command in ("fit", "validate", "test", "predict"):
        run([command, "--config", "zr:supervised", "--config", str(mix), *places, *QUIET])
    logs = [file.read_text().splitlines()[0] for file in sorted((tmp_path / "run").rglob("metrics.csv"))]
    for name in ("train/regression", "train/gap", "train/order", "val/hpa", "test/hpa", "test/srcc/realism"):
        assert any(name in line.split(",") for line in logs), (name, logs)
    assert not any("train/votes" in line for line in logs)  # a weight of 0 is not computed
    lines = [json.loads(line) for line in (tmp_path / "run" / "distributions.jsonl").read_text().splitlines()]
    assert len(lines) == 6  # three prompts, two images each
    assert all(sum(probs) == pytest.approx(1.0, abs=1e-5) for line in lines for probs in line["probs"].values())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # each run of a folder logs under a version of its own
def test_last_is_the_newest_checkpoint_of_the_run_and_predict_writes(world: Path, tmp_path: Path) -> None:
    places = ["--folder", str(world / "data"), "--start", str(world / "start"), "--run", str(tmp_path)]
    recipe = ["--config", "zr:supervised", *places, *QUIET]
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to go on from"):
        run(["fit", *recipe, "--ckpt_path", "last"])
    run(["fit", *recipe, "--trainer.max_steps=1"])
    run(["fit", *recipe, "--trainer.max_steps=2", "--ckpt_path", "last"])
    steps = sorted(torch.load(file, weights_only=True)["global_step"] for file in tmp_path.rglob("*.ckpt"))
    losses = [file.read_text().count("\n") for file in sorted(tmp_path.rglob("metrics.csv"))]
    assert steps == [1, 2]
    assert losses[1] <= losses[0]  # the second run took one step, not two
    run(["predict", *recipe, "--ckpt_path", "last"])
    assert len((tmp_path / "distributions.jsonl").read_text().splitlines()) == 6


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_a_trainer_that_the_machine_cannot_give_is_a_plain_error(world: Path, tmp_path: Path) -> None:
    places = ["--folder", str(world / "data"), "--start", str(world / "start"), "--run", str(tmp_path)]
    with pytest.raises(ValueError, match="gpu"):
        run(["fit", "--config", "zr:supervised", *places, "--trainer.accelerator=gpu"])


class Payload:
    def __reduce__(self):
        return (open, ("touched", "w"))


def test_a_checkpoint_with_a_payload_is_refused(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": Payload()}, "evil.ckpt")
    places = ["--folder", str(world / "data"), "--start", str(world / "start"), "--run", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"evil\.ckpt holds more than tensors and plain values"):
        run(["validate", "--config", "zr:supervised", *places, "--ckpt_path", "evil.ckpt"])
    assert not Path("touched").exists()


def test_wheel_carries_recipes_and_template_and_works_outside_the_checkout(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(root)]
    made = subprocess.run(build, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    for name in ("configs/supervised.yaml", "configs/rubrics/direct.yaml", "report/page.html", "py.typed"):
        assert f"zr/{name}" in names
    code = (
        "import zr, zr.commands.configs as c; assert zr.__file__.startswith(SITE); "
        "print(c.packaged('zr:supervised'), zr.Rubric.load('zr:reasoning').dimensions)"
    ).replace("SITE", repr(str(tmp_path / "site")))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "alignment" in done.stdout
