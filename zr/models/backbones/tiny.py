"""Models small enough to train on a laptop: the real classes of transformers and open_clip, random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from zr.models.backbones.clip import CLIPBackbone, build_clip
from zr.models.backbones.vlm import VLMBackbone
from zr.rubric import Rubric

__all__ = ["tiny_clip", "tiny_qwen3_5", "tiny_qwen3_vl"]

PATCH, MERGE = 8, 2

_CONTROL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_THINK = ("<think>", "</think>")  # added, and not flagged special: as in the families' real tokenizers

_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
<think>{%- if not enable_thinking -%}</think>{%- endif -%}{%- endif -%}"""


def tiny_qwen3_vl(
    rubric: Rubric,
    vocabulary: Callable[[], Sequence[str]],
    hidden_size: int = 96,
    layers: int = 3,
    vision_size: int = 64,
    vision_layers: int = 2,
    seed: int = 0,
) -> VLMBackbone:
    """A Qwen3-VL (full attention) of about half a million parameters, for images whose sides are multiples of 16.

    Args:
        rubric: scale and wording; its words are added to the vocabulary.
        vocabulary: gives the words of the tokenizer, such as :func:`zr.data.shapes.vocabulary`.
        hidden_size: width of the language model, a multiple of 32.
        layers: its depth.
        vision_size: width of the vision tower, a multiple of 4.
        vision_layers: its depth.
        seed: of the initial weights.

    Returns:
        A backbone with random weights.

    Example:
        >>> from zr.data import shapes
        >>> backbone = tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary)
        >>> backbone.features(torch.rand(2, 3, 48, 48), [shapes.prompts("train")[0]] * 2, ["realism"]).shape
        torch.Size([2, 1, 96])
    """
    return _tiny(
        (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
        word_tokenizer(rubric, vocabulary()),
        rubric,
        text={"hidden_size": hidden_size, "num_hidden_layers": layers, "num_key_value_heads": 4},
        vision={"hidden_size": vision_size, "depth": vision_layers, "deepstack_visual_indexes": [0]},
        seed=seed,
    )


def tiny_qwen3_5(
    rubric: Rubric,
    vocabulary: Callable[[], Sequence[str]],
    hidden_size: int = 96,
    layers: int = 4,
    vision_size: int = 64,
    vision_layers: int = 2,
    seed: int = 0,
) -> VLMBackbone:
    """A Qwen3.5 (three gated-delta layers to one of full attention), as small; see :func:`tiny_qwen3_vl`.

    Args:
        rubric: scale and wording; its words are added to the vocabulary.
        vocabulary: gives the words of the tokenizer.
        hidden_size: width of the language model, a multiple of 32.
        layers: its depth, a multiple of 4.
        vision_size: width of the vision tower, a multiple of 4.
        vision_layers: its depth.
        seed: of the initial weights.
    """
    head = hidden_size // 4
    linear = {
        "linear_key_head_dim": head,
        "linear_value_head_dim": head,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    return _tiny(
        (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
        word_tokenizer(rubric, vocabulary()),
        rubric,
        text={"hidden_size": hidden_size, "num_hidden_layers": layers, "num_key_value_heads": 2, **linear},
        vision={"hidden_size": vision_size, "depth": vision_layers},
        seed=seed,
    )


def tiny_clip(
    rubric: Rubric,
    vocabulary: Callable[[], Sequence[str]],
    image_size: int = 48,
    embedding: int = 64,
    width: int = 64,
    layers: int = 2,
    context: int = 32,
    truncate: bool = False,
    seed: int = 0,
) -> CLIPBackbone:
    """A CLIP of about a quarter of a million parameters, with a word for a token.

    Args:
        rubric: the scale.
        vocabulary: gives the words of the tokenizer, such as :func:`zr.data.shapes.vocabulary`.
        image_size: side of the pictures that it reads, a multiple of 8; others are resized.
        embedding: width of the embeddings; the features are three times as wide.
        width: of both towers, a multiple of 16.
        layers: depth of both towers.
        context: number of tokens that the text tower reads, two of them its own.
        truncate: cut longer prompts, with a warning.
        seed: of the initial weights.

    Returns:
        A backbone with random weights.

    Example:
        >>> from zr.data import shapes
        >>> backbone = tiny_clip(shapes.rubric(), shapes.vocabulary)
        >>> backbone.features(torch.rand(2, 3, 48, 48), [shapes.prompts("train")[0]] * 2, ["realism"]).shape
        torch.Size([2, 1, 192])
    """
    tokenizer = _clip_tokenizer(vocabulary(), context)
    heads = {"width": width, "layers": layers, "mlp_ratio": 2.0}
    config: dict[str, Any] = {
        "model_cfg": {
            "embed_dim": embedding,
            "vision_cfg": {"image_size": image_size, "patch_size": PATCH, "head_width": 16, **heads},
            "text_cfg": {
                "context_length": context,
                "vocab_size": len(tokenizer.tokenizer),
                "heads": width // 16,
                "hf_tokenizer_name": "in this folder",
                **heads,
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPBackbone(build_clip(config["model_cfg"]), tokenizer, config, rubric, truncate)


def _clip_tokenizer(vocabulary: Sequence[str], length: int) -> HFTokenizer:
    """A word-level tokenizer; the end has the highest id, by which CLIP's text tower finds it."""
    split = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in vocabulary for word, _ in split.pre_tokenize_str(text))
    ids = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *words, "[START]", "[END]"))}
    core = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = split
    ends = [(token, ids[token]) for token in ("[START]", "[END]")]
    core.post_processor = TemplateProcessing(single="[START] $A [END]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[START]", "eos_token": "[END]"}
    with TemporaryDirectory() as folder:  # open_clip reads tokenizers from folders only
        PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
        return HFTokenizer(folder, context_length=length, trust_remote_code=False)


INITIAL = 0.08
"""Standard deviation of the initial weights: about 1 / sqrt(width). The families' .02 is made for widths of thousands and
learns several times more slowly here."""


def word_tokenizer(rubric: Rubric, vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the vocabulary and the rubric's own words; an unknown word becomes ``[UNK]``."""
    words: dict[str, None] = dict.fromkeys(("[PAD]", "[UNK]", "system", "user", "assistant"))
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    texts = [rubric.system_text(), rubric.wording.marker, *rubric.wording.instructions.values(), *rubric.wording.labels]
    for text in (*texts, *vocabulary):
        words |= dict.fromkeys(word for word, _ in split.pre_tokenize_str(text))
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = split
    core.add_special_tokens(list(_CONTROL))
    core.add_tokens(list(_THINK))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="<|im_end|>",
        chat_template=_TEMPLATE,
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )


def _tiny(
    family: tuple[Any, Any],
    tokenizer: PreTrainedTokenizerFast,
    rubric: Rubric,
    text: dict[str, Any],
    vision: dict[str, Any],
    seed: int,
) -> VLMBackbone:
    """A model of a family (its config and model classes) with what both families share filled in."""
    width = text["hidden_size"]
    half, side = width // 8, width // 32
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "mrope_section": [half - 2 * side, side, side],
        "mrope_interleaved": True,
    }
    control = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    config_class, model_class = family
    config = config_class(
        text_config={
            "vocab_size": len(tokenizer),
            "intermediate_size": 2 * width,
            "num_attention_heads": 4,
            "head_dim": width // 4,
            "max_position_embeddings": 1024,
            "initializer_range": INITIAL,
            "rope_parameters": rope,
            **text,
        },
        vision_config={
            "intermediate_size": 2 * vision["hidden_size"],
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
            "out_hidden_size": width,
            "num_position_embeddings": 36,
            "initializer_range": INITIAL,
            **vision,
        },
        tie_word_embeddings=True,
        **{name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in control.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VLMBackbone(model_class(config), _processor(tokenizer), rubric)


def _processor(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLProcessor:
    sides = {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 512**2}
    images = Qwen2VLImageProcessor(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=1, size=sides, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    video = Qwen3VLVideoProcessor(patch_size=PATCH, merge_size=MERGE, temporal_patch_size=1)
    return Qwen3VLProcessor(images, tokenizer, video, chat_template=_TEMPLATE)
