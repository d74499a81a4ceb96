"""Generators: text to image, with gradients through the steps that are asked for.

The names below are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zr._lazy import lazy

if TYPE_CHECKING:
    from zr.models.generators.base import Generator as Generator
    from zr.models.generators.best_of import Best as Best
    from zr.models.generators.best_of import BestOf as BestOf
    from zr.models.generators.diffusion import DiffusionGenerator as DiffusionGenerator
    from zr.models.generators.diffusion import StableDiffusion3Generator as StableDiffusion3Generator
    from zr.models.generators.diffusion import ZImageGenerator as ZImageGenerator
    from zr.models.generators.flow import FlowGenerator as FlowGenerator
    from zr.models.generators.flow import FlowSize as FlowSize
    from zr.models.generators.flow import FlowTransformer as FlowTransformer
    from zr.models.generators.flow import tiny_flow as tiny_flow
    from zr.models.generators.guidance import DetachedGuidance as DetachedGuidance
    from zr.models.generators.guidance import FullGuidance as FullGuidance
    from zr.models.generators.guidance import Guidance as Guidance

_HOME = {
    "Best": "best_of",
    "BestOf": "best_of",
    "DetachedGuidance": "guidance",
    "DiffusionGenerator": "diffusion",
    "FlowGenerator": "flow",
    "FlowSize": "flow",
    "FlowTransformer": "flow",
    "FullGuidance": "guidance",
    "Generator": "base",
    "Guidance": "guidance",
    "StableDiffusion3Generator": "diffusion",
    "ZImageGenerator": "diffusion",
    "tiny_flow": "flow",
}

__all__ = sorted(_HOME)

__getattr__, __dir__ = lazy(__name__, _HOME)
