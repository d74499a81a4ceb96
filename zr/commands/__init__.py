"""What the command line offers beside training: one module a command, plain functions that jsonargparse exposes."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser, DefaultHelpFormatter

__all__ = ["run"]

# Arguments that take several values on the shell, or stand without a name, are named here; the rest follows from the functions.
# Module -> its functions by subcommand, or its function. Named here, imported when used: `zr configs` needs no torch.
SUBCOMMANDS: dict[str, tuple[str, ...]] = {"shards": ("write", "import_", "inspect")}
SEVERAL: dict[str, dict[str, tuple[str | None, type]]] = {
    "score": {"images": ("+", Path), "--dimensions": ("+", str)},
    "label": {"model": (None, str), "shards": (None, str), "out": (None, Path), "--dimensions": ("+", str)},
    "calibrate": {"model": (None, Path), "shards": (None, str), "--dimensions": ("+", str)},
    "agreement": {"teacher": (None, str), "student": (None, str), "shards": (None, str), "--dimensions": ("+", str)},
    "draw": {"generator": (None, Path), "--dimensions": ("+", str)},
    "gsb": {"new": (None, Path), "old": (None, Path), "--answers": ("+", Path), "--dimensions": ("+", str)},
    "compare": {"plan": (None, str), "--only": ("+", str), "--again": ("+", str)},
    "configs": {"name": ("?", str)},
    "prompt": {"text": (None, str)},
    "demo": {},
}


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of a description as they are: some show a format."""


def run(args: Sequence[str]) -> None:
    """Run ``zr COMMAND [options]`` for a command of this package."""
    name, *rest = args
    module = import_module(f"zr.commands.{name}")
    if name in SUBCOMMANDS:
        parser = ArgumentParser(
            prog=f"zr {name}", description=module.__doc__, formatter_class=_Help
        )  # subcommands take it over
        subcommands = parser.add_subcommands(dest="action")
        functions = {action.rstrip("_"): getattr(module, action) for action in SUBCOMMANDS[name]}  # import is no name in Python
        for action, function in functions.items():
            one = _parser(function, f"zr {name} {action}")
            one.add_function_arguments(function, as_positional=True)
            subcommands.add_subcommand(action, one, help=one.description.splitlines()[0])
        found = parser.parse_args(rest)
        functions[found.action](**found[found.action].as_dict())
        return
    function = getattr(module, name)
    parser = _parser(function, f"zr {name}")
    helps = {entry.arg_name: entry.description for entry in docstring_parser.parse_from_object(function).params}
    for argument, (count, kind) in SEVERAL[name].items():
        parser.add_argument(argument, nargs=count, type=kind, help=helps[argument.lstrip("-")])
    parser.add_function_arguments(function, skip={argument.lstrip("-") for argument in SEVERAL[name]})
    function(**parser.parse_args(rest).as_dict())


def _parser(function: Callable[..., None], prog: str) -> Any:
    """A parser whose help shows the docstring, up to the arguments."""
    description = (inspect.getdoc(function) or "").split("\n\nArgs:")[0]
    return ArgumentParser(prog=prog, description=description, formatter_class=_Help)
