"""The packaged recipes: listed, and written out to be changed."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["configs", "packaged"]

PREFIX = "zr:"


def packaged(name: str) -> Path:
    """The file of a packaged recipe.

    Args:
        name: ``zr:NAME``.

    Raises:
        FileNotFoundError: no such recipe; the message lists those there are.
    """
    path = _folder() / f"{name.removeprefix(PREFIX)}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"there is no packaged recipe {name}; there are {', '.join(_names())}")
    return path


def configs(name: str | None = None, folder: Path | None = None) -> None:
    """List the packaged recipes, or show one, or write it to a folder.

    Args:
        name: ``zr:NAME``; without it all are listed.
        folder: where to write the recipe; without it the recipe is printed.
    """
    if name is None:
        for known in _names():
            heading = packaged(known).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"{known:24}{heading}")
        return
    source = packaged(name)
    text = source.read_text(encoding="utf-8")
    if folder is None:
        print(text, end="")
        return
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    if target.exists():
        raise FileExistsError(f"{target} exists: it is not overwritten; move it or choose another folder")
    target.write_text(text, encoding="utf-8")
    print(target)


def _folder() -> Path:
    return Path(str(resources.files("zr.configs")))


def _names() -> list[str]:
    return sorted(f"{PREFIX}{path.stem}" for path in _folder().glob("*.yaml"))
