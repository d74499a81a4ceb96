"""What the process of a cell leaves behind, written by hand: for tests of what is made of it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BINS = (1.0, 2.0, 3.0, 4.0, 5.0)
NAMES = ("alignment", "realism")
INTERVAL = {"estimate": 0.5, "low": 0.4, "high": 0.6, "level": 0.95}


def at(scores: list[list[float]], elsewhere: float = 1e-6) -> Tensor:
    """``(N, D, 5)`` distributions with the expected scores ``(N, D)``: on the two bins beside each, with a trace on all."""
    mu = torch.tensor(scores, dtype=torch.float64)
    low = mu.floor().clamp(1, 4)
    probs = torch.zeros(*mu.shape, 5, dtype=torch.float64)
    probs.scatter_(-1, (low - 1).long()[..., None], (1 - (mu - low))[..., None])
    probs.scatter_add_(-1, low.long()[..., None], (mu - low)[..., None])
    return (1 - elsewhere) * probs + elsewhere / 5


def line(value: float) -> dict:
    """A row of an evaluation with one number for all measures."""
    measures = ("hpa", "margin_hpa", "plcc", "srcc", "pooled_hpa", "pooled_margin_hpa")
    return {measure: {**INTERVAL, "estimate": value} for measure in measures} | {"images": 4, "pairs": 4, "margin_pairs": 2}


def store(folder: Path, keys: list[str], probs: Tensor, scores: list[list[float]], votes: Tensor, **about) -> None:
    """A measured cell's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"probs": probs.float(), "scores": torch.tensor(scores), "votes": votes.float()}
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, folder / "distributions.safetensors")
    table = {"dimensions": dict.fromkeys(NAMES, line(0.5)), "overall": line(0.5)}
    measured = {
        "dimensions": NAMES,
        "bins": BINS,
        "keys": keys,
        "choices": {},
        "table": table,
        "ece": 0.1,
        "nll": 1.0,
        "rps": 0.2,
    }
    measured |= {"off_scale": None, "coupling": None, "tokens": 1.0, "parameters": 100, "ms": 2.0}
    (folder / "measured.json").write_text(json.dumps(measured | about))
    (folder / "done.json").write_text(json.dumps({"digest": "", "seconds": 3.0, "product": "run"}))
