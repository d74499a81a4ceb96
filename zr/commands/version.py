"""What a bug report needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from zr.version import __version__

__all__ = ["describe"]

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "lightning",
    "torchmetrics",
    "webdataset",
    "jsonargparse",
    "peft",
    "diffusers",
)


def describe() -> str:
    """Versions of zr, of Python and of what zr stands on, and the accelerator."""
    import torch

    lines = [f"zr {__version__}", f"python {platform.python_version()} on {platform.platform()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return "\n".join([*lines, f"device {device}"])
