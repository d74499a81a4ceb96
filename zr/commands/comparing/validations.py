"""What a run logged of its validations."""

from __future__ import annotations

import csv
from pathlib import Path

__all__ = ["validations"]


def validations(run: Path) -> dict[str, list[list[float]]]:
    """By name of a measure of validation, such as ``hpa``: after how many steps it had which value.

    Args:
        run: folder of ``zr fit``, with the tables of Lightning's CSV logger, whose steps are numbered from 0.
    """
    found: dict[str, list[list[float]]] = {}
    for file in sorted(run.glob("logs/version_*/metrics.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if name.startswith("val/") and value:
                        found.setdefault(name.removeprefix("val/"), []).append([int(row["step"]) + 1, float(value)])
    return found
