"""The gates that every change passes: lint, format, strict types, the direction of imports, clean text."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
        ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
    ],
    ids=["lint", "format", "types", "imports"],
)
def test_gate(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_tracked_file_names_a_machine_or_an_index() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: there are no tracked files to look at")
    places = "|".join(re.escape(f"{place}/") for place in (ROOT, Path.home()))
    forbidden = re.compile(rf"index[-]url|find[-]links|{places}")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".ipynb", ".html"}:
            found = forbidden.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name}: {found and found.group()}"
