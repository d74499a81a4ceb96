"""`zr draw`: its pictures against single ones made by hand, and what an interruption leaves."""

import json

import numpy as np
import pytest
import torch
from affine import source
from PIL import Image

import zr.commands.draw as command
from zr.cli import main
from zr.data import shapes, write_shards
from zr.models.generators import FlowGenerator, FlowSize, FullGuidance

SIZE = FlowSize(image=48, patch=16, width=16, layers=1, heads=2)
KEYS = ["a", "b-1", "../../C", "a" * 300, "\N{GREEK SMALL LETTER ALPHA}\x1b"]
PROMPTS = dict(zip(KEYS, shapes.prompts("test"), strict=False))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Generators `one` and `two`, prompts `asked.jsonl`, a generator as a YAML file."""
    folder = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        generator = FlowGenerator(shapes.vocabulary(), SIZE, steps=3)
        with torch.no_grad():
            for p in generator.parameters():
                p.add_(0.3 * torch.randn_like(p))
        generator.save_pretrained(folder / name)
    lines = [json.dumps({"key": key, "prompt": prompt}) + "\n" for key, prompt in PROMPTS.items()]
    (folder / "asked.jsonl").write_text("".join(lines))
    guidance = "{class_path: zr.models.generators.FullGuidance, init_args: {scale: 2.0}}"
    (folder / "one.yaml").write_text(
        "class_path: zr.models.generators.FlowGenerator.from_pretrained\n"
        f"init_args: {{source: {folder / 'one'}, steps: 2, guidance: {guidance}}}\n"
    )
    return folder


def drawn(home, out, *more, generator="one", prompts="asked.jsonl"):
    places = [home / generator, "--prompts", home / prompts, "--output", out]
    return main(["draw", *map(str, (*places, "--batch_size", 4, "--device", "cpu", *more))])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def alone(generator, line, guidance=None, steps=None):
    """The picture of a line, made by itself."""
    made = FlowGenerator.from_pretrained(generator, steps=steps, guidance=guidance)
    return made.sample([line["prompt"]], source(line["seed"], line["key"], line["number"]))[0].detach()


def difference(folder, line, image):
    """Between a file and a picture in [0, 1], in steps of 8 bits."""
    found = np.asarray(Image.open(folder / line["file"]), np.float64)
    return np.abs(found - 255 * image.permute(1, 2, 0).numpy()).max()


def test_every_picture_is_the_one_of_its_prompt_number_and_seed(home, tmp_path):
    assert drawn(home, tmp_path / "out", "--images", 2, "--seed", 3) == 0
    lines = lines_of(tmp_path / "out")
    assert [(line["key"], line["number"]) for line in lines] == [(key, number) for key in KEYS for number in range(2)]
    assert all(line["prompt"] == PROMPTS[line["key"]] and line["seed"] == 3 for line in lines)
    assert len({line["file"] for line in lines}) == 10
    assert {path.parent for path in (tmp_path / "out").rglob("*.png")} == {tmp_path / "out" / "images"}
    for line in lines:
        assert difference(tmp_path / "out", line, alone(home / "one", line)) <= 0.51
    apart = [difference(tmp_path / "out", line, alone(home / "one", line | {"number": 1 - line["number"]})) for line in lines]
    assert min(apart) > 5


@pytest.mark.parametrize("after", [0, 3, 4, 6])
def test_a_resumed_folder_is_that_of_an_uninterrupted_run(home, tmp_path, monkeypatch, after):
    assert drawn(home, tmp_path / "whole", "--images", 2) == 0
    made = []

    def stop(image, png=command._png):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(image)
        return png(image)

    with monkeypatch.context() as patch:
        patch.setattr(command, "_png", stop)
        assert drawn(home, tmp_path / "cut", "--images", 2) == 130
    whole = (tmp_path / "whole" / "prompts.jsonl").read_bytes()
    begun = (tmp_path / "cut" / "prompts.jsonl").read_bytes()
    assert whole.startswith(begun)
    assert begun.count(b"\n") == after // 4 * 4
    (tmp_path / "cut" / "prompts.jsonl").write_bytes(whole[: len(begun) + 250])  # a kill may leave a line half written
    assert drawn(home, tmp_path / "cut", "--images", 2) == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_folder_that_is_done_stays(home, tmp_path, monkeypatch):
    assert drawn(home, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    monkeypatch.setattr(command, "_png", None)
    assert drawn(home, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == before


def test_another_setting_is_refused(home, tmp_path, capsys):
    assert drawn(home, tmp_path / "out", "--count", 2) == 0
    before = contents(tmp_path / "out")
    for more, said in (
        (["--seed", 1], "was begun with seed 0, now it is 1"),
        (["--images", 2], "pictures 2, now it is 4"),
        (["--steps", 2], "steps None, now it is 2"),
        (["--guidance", 2], "guidance None, now it is 2.0"),
        (["--best_of", 2, "--reward", "shapes"], "best_of None, now it is 2"),
    ):
        assert drawn(home, tmp_path / "out", "--count", 2, *more) == 1
        assert said in capsys.readouterr().err
    assert drawn(home, tmp_path / "out", "--count", 2, generator="two") == 1
    assert "was begun with generator" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert drawn(home, tmp_path / "full") == 1
    assert "full holds something else" in capsys.readouterr().err


def test_the_best_of_three_beside_the_plain_picture(home, tmp_path):
    aggregation = "{class_path: zr.models.Minimum}"
    options = ["--best_of", 3, "--reward", "shapes", "--aggregation", aggregation, "--dimensions", "realism", "aesthetics"]
    assert drawn(home, tmp_path / "best", *options) == 0
    assert drawn(home, tmp_path / "plain") == 0
    plain = {line["key"]: (tmp_path / "plain" / line["file"]).read_bytes() for line in lines_of(tmp_path / "plain")}
    lines = lines_of(tmp_path / "best")
    for line in lines:
        assert line["kept"] == max(range(3), key=line["rewards"].__getitem__)
        same = (tmp_path / "best" / line["file"]).read_bytes() == plain[line["key"]]
        assert same == (line["kept"] == 0)
        scores = shapes.judge([alone(home / "one", line)], [line["prompt"]], ["realism", "aesthetics"]).mean[0]
        assert line["rewards"][0] == pytest.approx(min(scores.tolist()), abs=1e-4)
    assert len({line["kept"] for line in lines}) > 1


def test_guidance_and_steps_by_options_and_by_a_yaml_file(home, tmp_path):
    assert drawn(home, tmp_path / "options", "--steps", 2, "--guidance", 2) == 0
    assert drawn(home, tmp_path / "yaml", generator="one.yaml") == 0
    files = [{name: data for name, data in contents(tmp_path / way).items() if "png" in name} for way in ("options", "yaml")]
    assert files[0] == files[1]
    for line in lines_of(tmp_path / "yaml"):
        assert difference(tmp_path / "yaml", line, alone(home / "one", line, FullGuidance(2.0), 2)) <= 0.51


def test_prompts_of_shards(home, tmp_path):
    records = list(shapes.records("validation", count=3, candidates=2))
    write_shards(records, tmp_path / "data", shapes.rubric().scale, split="validation")
    assert drawn(home, tmp_path / "out", "--count", 2, prompts=tmp_path / "data") == 0
    assert [(line["key"], line["prompt"]) for line in lines_of(tmp_path / "out")] == [(r.key, r.prompt) for r in records[:2]]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--best_of", 2], "--best_of and --reward go together"),
        (["--dimensions", "realism"], "--aggregation and --dimensions say what --best_of chooses by"),
        (["--images", 0], "--images must be at least 1, got 0"),
        (["--count", 9], "asked.jsonl has 5 prompts, --count 9 were asked for"),
        (["--best_of", 2, "--reward", "shapes", "--aggregation", "zr.Rubric"], "--aggregation describes no Aggregation"),
        (["--best_of", 2, "--reward", "nowhere"], "nowhere holds no model"),
    ],
)
def test_what_is_refused(home, tmp_path, capsys, more, said):
    assert drawn(home, tmp_path / "out", *more) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_generators_that_are_refused(home, tmp_path, capsys):
    (tmp_path / "wrong.yaml").write_text("class_path: zr.models.generators.FlowGenerator\ninit_args: {stepps: 2}\n")
    for generator, more, said in (
        (tmp_path / "nowhere", [], "nowhere holds no generator"),
        (tmp_path / "wrong.yaml", [], "wrong.yaml describes no Generator"),
        (home / "one.yaml", ["--steps", 2], "write them into the init_args of"),
    ):
        assert drawn(home, tmp_path / "out", *more, generator=generator) == 1
        assert said in capsys.readouterr().err
