"""What the command line offers beside training: one module a command, plain functions that jsonargparse exposes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from jsonargparse import auto_cli

__all__ = ["run"]

# Module -> its function, or its functions by subcommand. Named here and imported when used: `zr configs` needs no torch.
FUNCTIONS: dict[str, str | tuple[str, ...]] = {
    "configs": "configs",
    "demo": "demo",
    "score": "score",
    "shards": ("write",),
}


def run(args: Sequence[str]) -> None:
    """Run ``zr COMMAND [options]`` for a command of this package."""
    name, *rest = args
    module, functions = import_module(f"zr.commands.{name}"), FUNCTIONS[name]
    if isinstance(functions, str):
        auto_cli(getattr(module, functions), args=rest, prog=f"zr {name}")
    else:
        auto_cli({f: getattr(module, f) for f in functions}, args=rest, prog=f"zr {name}")
