"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_block_runs(block: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["images"].grad.abs().sum() > 0
    assert (names["same"](images=names["images"], prompts=[names["prompt"]] * 2).mean == names["scores"].mean).all()


def test_commands_named_in_the_readme_exist() -> None:
    from zr.cli import COMMANDS, TRAINING
    from zr.commands.configs import _names

    assert set(re.findall(r"^zr (\w+)", README, re.MULTILINE)) <= set(COMMANDS | TRAINING)
    assert set(re.findall(r"--config (zr:\w+)", README)) <= set(_names())
