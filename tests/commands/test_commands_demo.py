"""`zr demo` goes on where it stopped; its parts are tested where they live."""

from pathlib import Path

import pytest

from zr.commands import demo as module
from zr.data import shapes
from zr.models import ScoreTokenHead, compose, tiny_qwen3_vl


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A small world whose trainings only save a model; the commands that the demo gave."""
    given: list[list[str]] = []

    def run(args: list[str]) -> None:
        given.append(args)
        folder = Path(args[args.index("--run") + 1])
        logs = folder / "logs" / "version_0"
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "metrics.csv").write_text("step,train/loss,val/hpa,val/plcc\n1,2.0,,\n2,,0.5,0.1\n")
        compose(tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary), ScoreTokenHead).save_pretrained(folder / "model")
        if len(given) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("zr.commands.training.run", run)
    monkeypatch.setattr(module, "PROMPTS", dict.fromkeys(module.PROMPTS, 3))
    monkeypatch.setattr(module, "TRACE", 2)
    monkeypatch.setattr(module, "_quiet", lambda: None)
    return given


def test_an_interrupted_training_is_not_taken_for_a_complete_one(tmp_path: Path, trained: list[list[str]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        module.demo(tmp_path)
    assert (tmp_path / "supervised" / "model").is_dir()  # the best model so far
    assert not (tmp_path / "results.json").exists()
    module.demo(tmp_path)
    assert [args[2] for args in trained] == ["zr:look", "zr:base", "zr:supervised", "zr:supervised"]
    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.name != "settings.json" and file.is_file()}
    assert {tmp_path / name for name in ("results.json", "report.html", "distributions.safetensors")} <= set(made)
    module.demo(tmp_path)  # all is done
    assert len(trained) == 4
    assert made == {file: file.stat().st_mtime_ns for file in made}
    with pytest.raises(ValueError, match="other settings"):
        module.demo(tmp_path, seed=1)
