"""What the README shows runs as it stands, with tiny models and small downloads where it names released ones."""

import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from plain import build
from published import compared, hpdv3, imagereward, koniq, picture, rated

import zr
from zr.cli import COMMANDS, TRAINING, main
from zr.commands.configs import _names
from zr.data import Index, ScoreData, shapes, write_shards
from zr.data.record import read_image
from zr.losses import ScoreTarget
from zr.models import RewardModel, SamplingRule, ScoreTokenHead, compose, reasoning, tiny_qwen3_vl
from zr.scores import ScoreDistribution

few_batches = pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")  # as in other tiny runs
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = [block for kind, block in re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL) if kind == "python"]
ADDED = README.partition("\n## Add a part\n")[2].partition("\n## ")[0]
SHELL = "".join(block for kind, block in re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL) if kind == "bash")
LINES = [shlex.split(line, comments=True)[1:] for line in SHELL.replace("\\\n", " ").splitlines() if line.startswith("zr ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the README names: models, images, annotations, downloads."""
    home = tmp_path_factory.mktemp("readme")
    direct = build("qwen3_5", zr.Rubric.load("zr:direct"))
    direct.save_pretrained(home / "Qwen" / "Qwen3.5-9B")
    model = RewardModel(direct, ScoreTokenHead(direct), direct.rubric)
    for name in ("my-reward", "zr-demo/base"):
        model.save_pretrained(home / name)
    for number in range(3):
        picture(home / "images" / f"{number}.png", seed=number, size=(64, 64))
    asked = [{"image": f"images/{number}.png", "prompt": f"cube {number % 2}"} for number in range(3)]
    (home / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    candidates = [{"id": str(number), "image": f"images/{number}.png"} for number in range(3)]
    scores = {str(number): {"anna": 2.0 + number, "bob": 2.5 + number} for number in range(3)}
    given = {"prompt": "a cube", "candidates": candidates, "scores": dict.fromkeys(direct.rubric.dimensions, scores)}
    for name in ("annotations.jsonl", "held-out.jsonl"):
        (home / name).write_text("".join(json.dumps({"key": f"p{i}"} | given) + "\n" for i in range(2)))
    write_shards(shapes.records("test", count=2, candidates=2), home / "data", shapes.rubric().scale, "test")
    koniq(home / "downloads" / "koniq")
    imagereward(home / "downloads" / "imagereward", [rated("001-1", f"001-{rank}", rank, 4) for rank in (1, 2)])
    hpdv3(home / "downloads" / "hpdv3", [compared(f"cube {i}", f"images/{i}a.png", f"images/{i}b.png") for i in range(3)])
    return home


@pytest.fixture
def home(place, tmp_path, monkeypatch):
    """A copy of it as the working folder."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def block(words: str) -> str:
    """The one block of Python that has these words."""
    (found,) = [text for text in PYTHON if words in text]
    return found


def execute(words: str, names: dict[str, object]) -> dict[str, object]:
    exec(compile(block(words), f"README.md, the block with {words!r}", "exec"), names)
    return names


def commands(*words: str) -> list[list[str]]:
    """Those that begin with these words."""
    found = [line for line in LINES if tuple(line[: len(words)]) == words]
    assert found
    return found


def run(*words: str) -> None:
    for line in commands(*words):
        assert main(line) == 0, shlex.join(line)


def test_use(home) -> None:
    names: dict[str, object] = {}
    execute("scores.quantile", names)
    assert names["scores"].mean.shape == (3, 4)
    execute("SoftMinimum", names)
    assert names["images"].grad.abs().amax((1, 2, 3)).gt(0).all()
    model, images = names["model"], names["images"].detach()
    execute("as_reward", names)
    with torch.no_grad():
        mu = model(images=images, prompts=["a red cube"] * 2).mean
        each = torch.cat([model(images=[names["Image"].open(f)], prompts=["a red cube"]).mean for f in names["files"]])
    standard = (mu - each.mean(0)) / each.std(0)
    expected = (2 * standard[:, 0] + standard[:, 1]).tolist()
    assert names["values"] == pytest.approx(expected, rel=1e-3)
    rewards, info = names["ddpo_reward"](images, ["a red cube"] * 2, [{}, {}])
    assert rewards.tolist() == pytest.approx(expected, rel=1e-3)
    assert info == {}


def test_blocks_are_short() -> None:
    assert PYTHON
    for text in PYTHON:
        most = 20 if text in ADDED or text == PYTHON[0] else 10  # a part is a class, the first shows all; the others are calls
        assert len([line for line in text.splitlines() if line]) < most, text


def test_score_and_prompt(home, capsys) -> None:
    run("score")
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["key"].split("/")[:2] for line in printed] == [["data", "test"]] * 4
    assert len((home / "scores.csv").read_text().splitlines()) == 1 + 3
    best = pq.read_table(home / "best.parquet").to_pylist()
    assert sorted(row["prompt"] for row in best) == ["cube 0", "cube 1"]
    run("prompt")
    assert "Judge" in capsys.readouterr().out


@few_batches
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0:UserWarning")  # which logger Lightning takes, without tensorboard
def test_data(home, capsys) -> None:
    run("shards")
    said = capsys.readouterr().out
    assert "annotators would be refused" in said
    assert (home / "data.html").is_file()
    counts = {name: sum(s.records for s in Index.load(home / name).splits["train"]) for name in ("data", "data/chosen")}
    assert counts == {"data": 2, "data/chosen": 3}
    names: dict[str, object] = {"zr": zr}
    before = {name: value.clone() for name, value in zr.load("Qwen/Qwen3.5-9B", rubric="zr:hpdv3").state_dict().items()}
    execute("BradleyTerryLoss", names)
    after = names["model"].state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_lora(home) -> None:
    names = execute("LoraConfig", {"zr": zr})
    trained = [name for name, parameter in names["model"].named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    assert isinstance(zr.load("my-reward"), RewardModel)


def test_the_first_block_composes_uses_and_saves_a_model(home) -> None:
    assert "tiny_qwen3_vl" in PYTHON[0]
    names = execute("tiny_qwen3_vl", {})
    scores, images = names["scores"], names["images"]
    assert scores.mean.shape == (2, 4)
    torch.testing.assert_close(names["reward"], (scores.mean - 0.5 * scores.stddev).mean(-1))
    assert images.grad.abs().amax((1, 2, 3)).gt(0).all()
    again = zr.load("my-reward")(images=images.detach(), prompts=["red ring", "blue square"])
    torch.testing.assert_close(again.probs, scores.probs)


@pytest.fixture
def mine(home, monkeypatch):
    """The section's parts as the module ``mine``, its YAML file, and shards of the built-in world."""
    parts = [text for text in PYTHON if text in ADDED and "class " in text]
    (home / "mine.py").write_text("import torch\nimport zr\n" + "".join(parts))
    (recipe,) = re.findall(r"```yaml\n(.*?)```", ADDED, re.DOTALL)
    (home / "mine.yaml").write_text(recipe)
    for split in ("train", "validation"):
        write_shards(shapes.records(split, count=2, candidates=3), home / "zr-demo" / "data", shapes.rubric().scale, split)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return importlib.import_module("mine")


def test_add_a_loss(mine) -> None:
    q = ScoreDistribution(torch.tensor([[0.5, 0.5], [0.0, 1.0]]).log(), (1.0, 2.0))  # means 1.5 and 2
    value = mine.HuberLoss()(q, ScoreTarget.from_scores(torch.tensor([1.75, 4.0])))
    assert value.tolist() == pytest.approx([0.5 * 0.25**2, 0.5 * (2.0 - 0.25)])


def test_add_a_head_and_a_backbone(mine) -> None:
    model = compose(mine.PatchBackbone(shapes.rubric()), mine.DeepHead)
    images = torch.rand(2, 3, 48, 48, requires_grad=True)
    scores = model(images=images, prompts=["red ring", "blue square"])
    scores[:, 1].mean.sum().backward()
    assert images.grad.abs().amax((1, 2, 3)).gt(0).all()
    backbone, part = model.backbone, model.head.parts[2]
    with torch.no_grad():
        alone = model(images=images[1:], prompts=["blue square"], dimensions=["aesthetics"])
        by_hand = part(backbone.net(images[1:])).log_softmax(-1)
    torch.testing.assert_close(alone.logits[:, 0], by_hand)
    torch.testing.assert_close(scores.logits[1:, 2], by_hand)
    model.budget = 1  # one sample in a pass
    torch.testing.assert_close(model(images=images, prompts=["red ring", "blue square"]).logits, scores.logits)


@few_batches
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0:UserWarning")
def test_added_parts_are_used_from_the_command_line(mine, home) -> None:
    for line in [line for line in commands("fit", "--config", "zr:clip") if "mine" in " ".join(line)]:
        short = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.log_every_n_steps=1"]
        assert main([*line, *short]) == 0, shlex.join(line)
    about = json.loads((home / "runs" / "mine" / "model" / "reward.json").read_text())
    assert (about["backbone"], about["head"], about["head_config"]) == ("mine:PatchBackbone", "mine:DeepHead", {"width": 32})
    (log,) = (home / "runs" / "mine").rglob("metrics.csv")
    assert {"train/huber", "train/votes"} <= set(log.read_text().splitlines()[0].split(","))
    with pytest.raises(ValueError, match="a class outside zr"):
        zr.load("runs/mine")
    assert zr.load("runs/huber").rubric == shapes.rubric()


def test_add_a_data_source(home) -> None:
    rows = [(i // 2, f"images/{i}.png", rater, 2 + i + 0.5 * (rater == "bob")) for i in range(3) for rater in ("ann", "bob")]
    lines = [f"cube {prompt},{image},{rater},{score}" for prompt, image, rater, score in rows]
    (home / "ratings.csv").write_text("prompt,image,rater,realism\n" + "\n".join(lines) + "\n")
    execute("def ratings", {"zr": zr, "Path": Path})
    data = ScoreData("data/rated", zr.Rubric.load("zr:direct"), validation=None, test="train")
    (batch,) = data.test_dataloader()
    assert batch.prompts == ["cube 0", "cube 0", "cube 1"]
    realism = zr.Rubric.load("zr:direct").dimensions.index("realism")
    assert batch.scores[:, realism].tolist() == [2.25, 3.25, 4.25]
    assert torch.equal(batch.images[2], read_image((home / "images" / "2.png").read_bytes(), "here"))


@pytest.mark.slow
@few_batches
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # a resumed run logs into a new version's folder
@pytest.mark.filterwarnings("ignore:`loftq_config` specified:UserWarning")  # jsonargparse spells out peft's own defaults
def test_train(home) -> None:
    run("shards", "write")
    run("configs")
    lines = [line for line in commands("fit") if "zr:supervised" in line]
    for steps, line in enumerate(lines, start=1):  # each cut short; the one that resumes goes further than the first
        assert main([*line, f"--trainer.max_steps={steps}"]) == 0, shlex.join(line)
    run("validate")
    assert zr.load("runs/lora").rubric == zr.Rubric.load("zr:direct")


@few_batches
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0:UserWarning")
def test_student(home, capsys) -> None:
    model = compose(tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary), ScoreTokenHead)
    shutil.rmtree("zr-demo/base")
    model.save_pretrained("zr-demo/base")
    teacher = reasoning(zr.load("zr-demo/base"), shapes.rubric(reasoning=True), rule=SamplingRule(length=6))
    teacher.save_pretrained("zr-demo/teacher")
    for split in ("train", "validation", "test"):
        write_shards(shapes.records(split, count=3, candidates=2), "zr-demo/data", shapes.rubric().scale, split)
    run("label")
    for line in commands("fit"):
        if "zr:student_small" in line:
            assert main([*line, "--trainer.max_steps=1", "--trainer.val_check_interval=1"]) == 0, shlex.join(line)
    run("agreement")
    assert (home / "agreement.html").is_file()
    run("calibrate")
    assert zr.load("zr-demo/student", calibrated=True).calibration is not None
    assert "NLL" in capsys.readouterr().out


@few_batches
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0:UserWarning")
def test_generator(home, capsys) -> None:
    model = compose(tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary), ScoreTokenHead)
    for name in ("student", "supervised"):
        model.save_pretrained(f"zr-demo/{name}")
    for split in ("train", "curated", "validation", "test"):
        write_shards(shapes.records(split, count=2, candidates=1), "zr-demo/data", shapes.rubric().scale, split)
    for recipe in ("zr:generator", "zr:text_to_image_small"):
        (line,) = commands("fit", "--config", recipe)
        short = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=null"]
        assert main([*line, *short]) == 0, shlex.join(line)
    (new,) = commands("draw", "zr-demo/text_to_image")
    (best,) = commands("draw", "zr-demo/generator")
    old = [*best[: best.index("--output")], "--output", "old"]
    for line in (new, old, best):
        assert main(line) == 0, shlex.join(line)
    run("gsb")
    assert (home / "compared" / "pairs.html").is_file()
    assert "GSB" in capsys.readouterr().out


def test_commands_named_in_the_readme_exist() -> None:
    assert {line[0] for line in LINES} <= {*COMMANDS, *TRAINING, "--version"}
    assert set(re.findall(r"--config (zr:\w+)", README)) <= set(_names())
