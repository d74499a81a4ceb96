"""Models saved and loaded: in a fresh process, by plain transformers, from folders that somebody tampered with."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from plain import FAMILIES, build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import zr
from zr.data import shapes
from zr.models import Head, LinearHead, RewardModel, ScoreTokenHead, compose, load, reward
from zr.rubric import Rubric

PROMPTS = ["red ring", "blue square, green triangle; <think> ring", "ring"]


class Hidden(Head):
    """A head of a user: a constructor of its own, and a layer whose name the language model's output layer has too."""

    def __init__(self, backbone, width=4):
        super().__init__()
        self.width = width
        self.output = torch.nn.Sequential(
            torch.nn.Linear(backbone.hidden_size, width), torch.nn.Tanh(), torch.nn.Linear(width, 9)
        )
        self.register_buffer("offset", torch.randn(9))

    def forward(self, features, dimension_index):
        return self.output(features.float()) + self.offset

    def config(self):
        return {"width": self.width}


class Shifted(ScoreTokenHead):
    """A head of a user that has the backbone's own output layer in it."""

    def __init__(self, backbone, off_scale=False):
        super().__init__(backbone, off_scale)
        self.shift = torch.nn.Parameter(torch.randn(9))

    def forward(self, features, dimension_index):
        return super().forward(features, dimension_index) + self.shift


@torch.no_grad()
def scores(model, images):
    return model.eval()(images=images, prompts=PROMPTS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model of each family and kind of head; all weights moved away from every seed."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(11)
    models = {}
    for family in FAMILIES:
        for head in (ScoreTokenHead, LinearHead):
            model = compose(build(family, seed=5), head)
            for parameter in model.parameters():
                parameter.data.mul_(1.3)
            models[f"{family}-{head.__name__}"] = model
            model.save_pretrained(folder / f"{family}-{head.__name__}")
    return folder, models


IN_A_FRESH_PROCESS = """
import sys, torch, zr
from pathlib import Path
pictures, prompts = torch.load(sys.argv[2], weights_only=True)
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = zr.load(folder)
    assert not model.training
    with torch.no_grad():
        found[folder.name] = model(images=pictures, prompts=prompts).logits
torch.save(found, sys.argv[3])
"""


def test_fresh_process(saved, pictures, tmp_path):
    folder, models = saved
    torch.save((pictures, PROMPTS), tmp_path / "inputs.pt")
    arguments = [str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "found.pt")]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert set(found) == set(models)
    for name, model in models.items():
        torch.testing.assert_close(found[name], scores(model, pictures).logits, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_reads_the_backbone(saved, family):
    folder, models = saved
    source = folder / f"{family}-LinearHead" / "backbone"
    model = AutoModelForImageTextToText.from_pretrained(source)
    ours = models[f"{family}-LinearHead"].backbone
    expected = ours.model.state_dict()
    assert type(model) is type(ours.model)
    assert set(model.state_dict()) == set(expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    processor = AutoProcessor.from_pretrained(source)
    assert processor.image_processor.patch_size == 8
    assert processor.chat_template == ours.processor.chat_template


def test_what_lies_in_the_folder(saved):
    folder, models = saved
    for name, model in models.items():
        files = {str(p.relative_to(folder / name)) for p in (folder / name).rglob("*") if p.is_file()}
        assert {"reward.json", "rubric.yaml", "README.md", "backbone/model.safetensors", "backbone/config.json"} <= files
        assert ("head.safetensors" in files) == ("LinearHead" in name)
        assert {p.rsplit(".", 1)[1] for p in files} <= {"json", "yaml", "md", "safetensors", "jinja"}
        assert Rubric.load(folder / name / "rubric.yaml") == model.rubric
    assert sorted(p.name for p in folder.iterdir()) == sorted(models)  # nothing is left beside them


def test_the_head_s_arguments_come_back(backbone, tmp_path, pictures):
    model = RewardModel(backbone, ScoreTokenHead(backbone, off_scale=True), backbone.rubric)
    model.save_pretrained(tmp_path / "model")
    expected, found = scores(model, pictures), scores(zr.load(tmp_path / "model"), pictures)
    assert torch.equal(found.off_scale, expected.off_scale)
    assert torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("head", [Hidden, Shifted])
def test_a_head_of_the_user(backbone, tmp_path, pictures, head):
    torch.manual_seed(0)
    own = head(backbone, width=7) if head is Hidden else head(backbone, off_scale=True)
    model = RewardModel(backbone, own, backbone.rubric)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=rf"uses .*test_reward:{head.__name__}, a class outside zr.*load\(\.\.\., head={head.__name__}\)"
    ):
        load(tmp_path / "model")
    torch.manual_seed(1)  # other initial weights
    found = load(tmp_path / "model", head=head)
    assert found.head.config() == own.config()
    assert torch.equal(scores(found, pictures).logits, scores(model, pictures).logits)


def test_a_head_that_does_not_fit(backbone, tmp_path):
    RewardModel(backbone, LinearHead(backbone), backbone.rubric).save_pretrained(tmp_path / "linear")
    compose(backbone, ScoreTokenHead).save_pretrained(tmp_path / "tokens")
    about = json.loads((tmp_path / "tokens" / "reward.json").read_text())
    (tmp_path / "tokens" / "reward.json").write_text(json.dumps(about | {"head_config": {}}))
    with pytest.raises(
        ValueError, match=r"head\.safetensors does not fit ScoreTokenHead: it needs {}, there is {'bias': \(4, 9\)"
    ):
        load(tmp_path / "linear", head=ScoreTokenHead)
    with pytest.raises(ValueError, match=r"does not fit LinearHead: it needs {'weight': \(4, 9, 32\).*}, there is {}"):
        load(tmp_path / "tokens", head=LinearHead)
    (tmp_path / "linear" / "head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"does not fit LinearHead: it needs .* there is {}"):
        load(tmp_path / "linear")


def test_wording_is_the_backbones(thinker, tmp_path, pictures):
    """Another wording is refused, and the one that was asked comes back from the disk."""
    with pytest.raises(ValueError, match="asks in another wording"):
        RewardModel(thinker, ScoreTokenHead(thinker), shapes.rubric())
    model = compose(thinker, ScoreTokenHead)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(scores(zr.load(tmp_path / "model"), pictures).logits, scores(model, pictures).logits)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("name", ["head.pt", "backbone/pytorch_model.bin", "backbone/extra.pkl"])
def test_pickles_are_refused(backbone, tmp_path, name):
    compose(backbone, LinearHead).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Payload(str(tmp_path / "executed"))))
    with pytest.raises(ValueError, match=rf"{name.split('/')[-1]}, which could run code when loaded"):
        load(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


def test_a_pickle_in_the_place_of_safetensors(backbone, tmp_path):
    compose(backbone, LinearHead).save_pretrained(tmp_path / "model")
    for name in ("head.safetensors", "backbone/model.safetensors"):
        (tmp_path / "model" / name).write_bytes(pickle.dumps(Payload(str(tmp_path / "executed"))))
        with pytest.raises(ValueError, match="holds a damaged safetensors file"):
            load(tmp_path / "model")
        assert not (tmp_path / "executed").exists()


def test_weights_that_are_missing_are_not_drawn_at_random(backbone, tmp_path):
    compose(backbone, LinearHead).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "backbone" / "model.safetensors"
    weights = load_file(path)
    gone = next(name for name in weights if "mlp" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights .{gone}"):
        load(tmp_path / "model")


def test_remote_code_is_never_run(backbone, tmp_path):
    compose(backbone, ScoreTokenHead).save_pretrained(tmp_path / "model")
    source = tmp_path / "model" / "backbone"
    (source / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\nclass M: pass\n")
    for name, field in (("config.json", "AutoModelForImageTextToText"), ("processor_config.json", "AutoProcessor")):
        data = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(data | {"auto_map": {"AutoConfig": "evil.M", field: "evil.M"}}))
    load(tmp_path / "model")
    data = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data | {"model_type": "unheard_of"}))
    with pytest.raises(ValueError, match=r"unheard_of|trust_remote_code"):
        load(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"has format 2; this zr .* reads format 1"),
        ({"format": None}, r"has format None"),
        ({"head": "os:system"}, r"uses os:system, a class outside zr"),
        ({"backbone": "os.path:join"}, r"uses os\.path:join, a class outside zr"),
        ({"head": "zr.models.reward:import_module"}, r"uses zr\.models\.reward:import_module, which is no part of a model"),
        ({"head": "zr.models.heads:Newer"}, r"uses zr\.models\.heads:Newer, which this zr .* does not have"),
        ({"scale_id": "0" * 12}, r"rubric\.yaml has scale .*, the model learned scale 000000000000"),
    ],
)
def test_folders_that_are_refused(saved, tmp_path, changes, message):
    folder, _ = saved
    about = json.loads((folder / "qwen3_vl-LinearHead" / "reward.json").read_text())
    copy = tmp_path / "model"
    copy.mkdir()
    (copy / "reward.json").write_text(json.dumps(about | changes))
    for name in ("rubric.yaml", "backbone", "head.safetensors"):
        (copy / name).symlink_to(folder / "qwen3_vl-LinearHead" / name)
    with pytest.raises(ValueError, match=message):
        load(copy)


def test_where_a_model_is_looked_for(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(FileNotFoundError, match=r"holds no model: neither reward\.json nor model/reward\.json"):
        load(tmp_path)
    (tmp_path / "model").symlink_to(folder / "qwen3_vl-LinearHead")
    assert isinstance(load(tmp_path), RewardModel)


@pytest.mark.parametrize("where", ["_card", "rename"])
def test_an_interrupted_save_leaves_the_old_model(backbone, tmp_path, pictures, monkeypatch, where):
    old = compose(backbone, LinearHead)
    old.save_pretrained(tmp_path / "model")
    expected = scores(old, pictures)
    new = compose(backbone, LinearHead)
    rename = type(tmp_path).rename

    def stop(*arguments):
        if where == "_card" or arguments[0].name == "new":
            raise KeyboardInterrupt
        return rename(*arguments)

    monkeypatch.setattr(*((RewardModel, "_card", stop) if where == "_card" else (type(tmp_path), "rename", stop)))
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path / "model")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert torch.equal(scores(load(tmp_path / "model"), pictures).logits, expected.logits)
    new.save_pretrained(tmp_path / "model")
    assert torch.equal(scores(load(tmp_path / "model"), pictures).logits, scores(new, pictures).logits)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_other_things_is_not_replaced(backbone, tmp_path, monkeypatch):
    model = compose(backbone, ScoreTokenHead)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    monkeypatch.chdir(tmp_path / "thesis")
    for folder in (tmp_path / "thesis", ".", "chapter.tex"):
        with pytest.raises(FileExistsError, match="holds no zr model: it would be lost"):
            model.save_pretrained(folder)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years"
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    model.save_pretrained(tmp_path / "not" / "yet" / "there")
    assert isinstance(load(tmp_path / "empty"), RewardModel)


def test_answers(saved, pictures):
    _, models = saved
    for model in models.values():
        every = scores(model, pictures)
        assert every.batch_shape == (3, 4)
        assert every.bins.tolist() == [1 + k / 2 for k in range(9)]
        for names in (["aesthetics"], ["plausibility", "alignment"]):
            with torch.no_grad():
                some = model(images=pictures, prompts=PROMPTS, dimensions=names)
            columns = [shapes.DIMENSIONS.index(name) for name in names]
            torch.testing.assert_close(some.probs, every.probs[:, columns], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dimensions": ["beauty"]}, r"different names among \['alignment', .*\], got \['beauty'\]"),
        ({"dimensions": "realism"}, "must be a list of different names"),
        ({"dimensions": []}, "must be a list of different names"),
        ({"dimensions": ["realism", "realism"]}, "must be a list of different names"),
        ({"prompts": PROMPTS[:2]}, "3 images for 2 prompts"),
        ({"prompts": "red"}, "prompts must be a list of at least one text, got 'red'"),
        ({"images": torch.full((3, 3, 48, 48), 2.0)}, r"image 0: float pixels must lie in \[0, 1\], got 2 to 2"),
    ],
)
def test_questions_that_are_refused(saved, pictures, changes, message):
    model = saved[1]["qwen3_vl-ScoreTokenHead"]
    with pytest.raises(ValueError, match=message):
        model(**({"images": pictures, "prompts": PROMPTS} | changes))


def test_broken_weights_do_not_score(pictures):
    model = compose(build("qwen3_vl"), ScoreTokenHead)
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"score distributions have NaN or infinite logits"):
        scores(model, pictures)


def test_the_same_model_asked_to_reason(backbone):
    model = compose(backbone, ScoreTokenHead)
    scorer = reward.reasoning(model, shapes.rubric(reasoning=True), traces=2, rule=zr.models.SamplingRule(length=3))
    assert scorer.policy.backbone.model is backbone.model
    assert scorer(images=None, prompts=["red"]).batch_shape == (1, 4)
