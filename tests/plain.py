"""An oracle: models as small as they come, and the plain way to run them.

Chats written by hand, one sequence at a time, no padding, no cache, no engine of ours.
"""

import torch
from torch import Tensor

from zr.data import Batch, shapes
from zr.models import VLMBackbone, tiny_qwen3_5, tiny_qwen3_vl
from zr.rubric import Rubric

FAMILIES = {
    "qwen3_vl": (tiny_qwen3_vl, {"layers": 2}),  # full attention
    "qwen3_5": (tiny_qwen3_5, {"layers": 4}),  # three gated-delta layers to one
}
PAD = "<|image_pad|>"


def build(family: str, rubric: Rubric | None = None, seed: int = 0) -> VLMBackbone:
    """A family as small as it comes, under the world's direct wording unless ``rubric`` says otherwise."""
    make, sizes = FAMILIES[family]
    rubric = rubric or shapes.rubric()
    return make(rubric, shapes.vocabulary, hidden_size=32, vision_size=16, vision_layers=2, seed=seed, **sizes)


def unannotated(images: list[Tensor], prompts: list[str], prompt_index: list[int] | None = None) -> Batch:
    """A batch of N images without a score; the prompts of all are different unless ``prompt_index`` says otherwise."""
    count = len(prompts)
    return Batch(
        images=images,
        prompts=prompts,
        keys=[f"p{i}.a" for i in range(count)],
        prompt_index=torch.tensor(prompt_index or range(count)),
        scores=torch.full((count, 4), torch.nan),
        known=torch.zeros(count, 4, dtype=torch.bool),
        votes=torch.zeros(count, 4, 9),
        teacher=None,
        texts=None,
        pairs=torch.zeros(0, 2, dtype=torch.int64),
        pair_dimension=torch.zeros(0, dtype=torch.int64),
        preference=None,
        chosen=torch.zeros(0, dtype=torch.bool),
    )


def chat(prompt: str, instruction: str, images: int = 1, thinking: bool = False) -> str:
    """What the tiny families read, up to the assistant's turn."""
    pictures = f"<|vision_start|>{PAD}<|vision_end|>" * images
    return (
        "<|im_start|>system\njudge<|im_end|>\n"
        f"<|im_start|>user\n{pictures}{prompt}\n{instruction}<|im_end|>\n"
        f"<|im_start|>assistant\n<think>{'' if thinking else '</think>'}"
    )


def patches(image: Tensor, patch: int = 8, merge: int = 2) -> Tensor:
    """``(P, 3 * patch * patch)`` of one ``(3, H, W)`` image in [0, 1]: windows of merge x merge patches, row by row."""
    rows = []
    for top in range(0, image.shape[1], patch * merge):
        for left in range(0, image.shape[2], patch * merge):
            for i in range(merge):
                for j in range(merge):
                    y, x = top + i * patch, left + j * patch
                    rows.append(((image[:, y : y + patch, x : x + patch] - 0.5) / 0.5).flatten())
    return torch.stack(rows)


def forward(backbone, text: str, images: list[Tensor], extra=()) -> tuple[Tensor, Tensor, Tensor]:
    """Ids ``(L,)``, last hidden states ``(L, H)`` and logits ``(L, V)`` of one chat with the ids ``extra`` after it."""
    for image in images:
        text = text.replace(PAD, "<|seen|>" * (image.shape[1] * image.shape[2] // 256), 1)
    ids = backbone.processor.tokenizer(text.replace("<|seen|>", PAD)).input_ids
    inputs = {"input_ids": torch.tensor([[*ids, *extra]])}
    if images:
        inputs["pixel_values"] = torch.cat([patches(image) for image in images])
        inputs["image_grid_thw"] = torch.tensor([[1, image.shape[1] // 8, image.shape[2] // 8] for image in images])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == backbone.model.config.image_token_id).long()
    out = backbone.model(**inputs, use_cache=False, output_hidden_states=True)
    return inputs["input_ids"][0], out.hidden_states[-1][0], out.logits[0]
