"""The dispatcher behind ``zr``: training by LightningCLI, everything else by plain functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

TRAINING = {
    "fit": "train a stage",
    "validate": "measure a stage on the validation split",
    "test": "measure a stage on the test split",
    "predict": "write a stage's distributions for a split",
}
COMMANDS = {
    "demo": "the whole way on the built-in world: base, teacher, labels, student, an improved generator, report",
    "score": "score images with a saved or a plain vision-language model",
    "label": "a model's distributions into copies of shards, for a student to learn from",
    "agreement": "a student beside its teacher on the same images: agreement, where they disagree most, cost",
    "compare": "run a plan of experiments, and set their results side by side",
    "calibrate": "fit a model's distributions to annotators' votes, and show what that changes",
    "draw": "pictures of a generator for the prompts of a split, the best of several where asked for",
    "gsb": "two generators' pictures side by side: Good-Same-Bad by a judge, or blindly by people",
    "prompt": "show the exact text that a model reads for a prompt",
    "shards": "annotated images and public data sets into shards, and a look at what shards hold",
    "configs": "list the packaged recipes, or write one out",
}
TRACEBACK = "ZR_TRACEBACK"  # set to anything, it shows where an error came from
USAGE = (
    "usage: zr COMMAND [options]\n\n{}\n\n`zr COMMAND --help` tells the options, `zr --version` what a bug report needs; "
    "{}=1 in the environment shows tracebacks."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; errors that a user can mend are one line, not a traceback."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE.format("\n".join(f"  {name:11}{what}" for name, what in (TRAINING | COMMANDS).items()), TRACEBACK))
        return 0
    if args[0] == "--version":
        from zr.commands.version import describe

        print(describe())
        return 0
    if args[0] not in TRAINING | COMMANDS:
        print(f"zr: there is no command {args[0]!r}; there are {', '.join(TRAINING | COMMANDS)}", file=sys.stderr)
        return 2
    try:
        if args[0] in TRAINING:
            from zr.commands.training import run as train

            train(args)
        else:
            from zr.commands import run

            run(args)
    except KeyboardInterrupt:
        print("zr: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"zr {args[0]}: {_harmless(str(error))}", file=sys.stderr)
        return 1
    return 0


def _harmless(text: str) -> str:
    """An error may quote a user's text, which must not steer the terminal: controls are written out."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{{{ord(c):x}}}" for c in text)


if __name__ == "__main__":
    sys.exit(main())
