"""Coupling of score and trace, against plain forwards of whole sequences, one at a time."""

from dataclasses import replace

import pytest
import torch
from plain import FAMILIES, build, chat, forward, unannotated

from zr.commands.comparing.coupling import coupled
from zr.data import Batch, shapes
from zr.models import Policy, PrefixSampler, ReasoningReward, SamplingRule

ASKED = {name: name for name in shapes.DIMENSIONS} | {"realism": "realism colour, shape"}
RULE = SamplingRule(temperature=0.8, length=6, suppressed=tuple(range(16, 53)))  # random weights end some traces and not others
PROMPTS = ["red ring", "red ring", "blue square, green triangle; yellow ring", "red ring"]
OF = [0, 0, 1, 0]  # the prompt of each image; the third stands alone
BINS = torch.arange(2, 11, dtype=torch.float64) / 2


class Watched(PrefixSampler):
    """Keeps the traces that it writes."""

    def __call__(self, *args, **kwargs):
        written = super().__call__(*args, **kwargs)
        self.traces = written.traces
        return written


def batch(of: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = [torch.randint(0, 256, (3, 32, 48), generator=generator, dtype=torch.uint8) for _ in of]
    return unannotated(images, PROMPTS[: len(of)], of)


def model(family: str = "qwen3_vl") -> ReasoningReward:
    rubric = shapes.rubric(reasoning=True)
    made = build(family, replace(rubric, wording=replace(rubric.wording, instructions=ASKED)))
    return ReasoningReward(Policy(made, sampler=Watched()), seed=5, rule=RULE).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_by_whole_sequences_one_at_a_time(family: str) -> None:
    judge, given = model(family), batch(OF)
    found = coupled(judge, [given])
    backbone, traces = judge.policy.backbone, judge.policy.sampler.traces  # image by image, dimension by dimension, two of each
    tokenizer = backbone.processor.tokenizer
    labels, (end, marker) = (tokenizer.convert_tokens_to_ids(words) for words in (list("ABCDEFGHI"), ["</think>", "score"]))
    trace = {(i, d, k): traces[8 * i + 2 * d + k] for i in range(4) for d in range(4) for k in range(2)}
    assert len({tuple(t) for t in trace.values()}) > 8

    def answer(image: int, d: int, written: list[int]) -> torch.Tensor:
        text = chat(PROMPTS[image], ASKED[shapes.DIMENSIONS[d]], thinking=True)
        extra = [*(t for t in written if t != end), end, marker]
        with torch.no_grad():
            logits = forward(backbone, text, [given.images[image] / 255], extra)[2]
        return logits[-1, labels].double().softmax(-1)

    moves: dict[str, list[float]] = {}
    following = {0: 1, 1: 3, 3: 0}  # of the images of the first prompt, in a ring
    for image, other in following.items():
        for d in range(4):
            own = answer(image, d, trace[image, d, 0])
            for name, written in (("removed", []), ("other", trace[other, d, 1]), ("floor", trace[image, d, 1])):
                varied = answer(image, d, written)
                moves.setdefault(f"{name}_kl", []).append(float((own * (own / varied).log()).sum()))
                moves.setdefault(f"{name}_gap", []).append(float(((own - varied) * BINS).sum().abs()))
    assert found.pop("images") == 3
    assert found == pytest.approx({name: sum(values) / 12 for name, values in moves.items()}, rel=1e-3, abs=1e-6)


def test_the_same_again_and_pooled_over_batches() -> None:
    judge = model()
    once = coupled(judge, [batch(OF[:2]), batch(OF)])
    assert coupled(judge, [batch(OF[:2]), batch(OF)]) == once
    assert once["images"] == 5


def test_images_alone_with_their_prompt_tell_nothing() -> None:
    assert coupled(model(), [batch([0, 1, 2])]) is None
