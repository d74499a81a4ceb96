"""What the command line offers beside training: one module a command, plain functions that jsonargparse exposes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from jsonargparse import ArgumentParser, auto_cli

__all__ = ["run"]

# Module -> its functions by subcommand, or its function. Named here, imported when used: `zr configs` needs no torch.
SUBCOMMANDS: dict[str, tuple[str, ...]] = {"shards": ("write", "inspect")}
POSITIONAL: dict[str, dict[str, tuple[str, type]]] = {
    "score": {"images": ("+", Path)},
    "configs": {"name": ("?", str)},
    "demo": {},
}


def run(args: Sequence[str]) -> None:
    """Run ``zr COMMAND [options]`` for a command of this package."""
    name, *rest = args
    module = import_module(f"zr.commands.{name}")
    if name in SUBCOMMANDS:
        auto_cli({f: getattr(module, f) for f in SUBCOMMANDS[name]}, args=rest, prog=f"zr {name}")
        return
    function = getattr(module, name)
    parser = ArgumentParser(prog=f"zr {name}", description=function.__doc__.splitlines()[0])
    for argument, (count, kind) in POSITIONAL[name].items():
        parser.add_argument(argument, nargs=count, type=kind)
    parser.add_function_arguments(function, skip=set(POSITIONAL[name]))
    function(**parser.parse_args(rest).as_dict())
