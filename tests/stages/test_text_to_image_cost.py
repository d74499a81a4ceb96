"""What a step of the third stage computes and keeps, counted: memory by steps, operations against those of sampling."""

import pytest
import torch
from affine import Affine, Linear, learn
from torch.utils.flop_counter import FlopCounterMode

from zr.data import PromptBatch, shapes
from zr.models import Minimum, RewardModel, ScoreTokenHead, tiny_qwen3_vl
from zr.models.generators import FlowGenerator, FlowSize
from zr.stages import LastSteps, ReFL, Reward, TextToImage

QUIET = {"warmup": 0.0, "decay": 0.0, "velocity_distance": 0.0}


def kept(steps, path):
    """Number and bytes of what autograd keeps during an update."""
    found = []

    def pack(tensor):
        found.append(tensor.numel() * tensor.element_size())
        return tensor

    stage = TextToImage(Affine(steps), {"one": Reward(Linear(), Minimum())}, path, **(QUIET | {"velocity_distance": 1.0}))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        learn(stage)
    return len(found), sum(found)


def test_refl_keeps_what_one_last_step_keeps_however_many_there_are():
    assert len({kept(steps, path) for steps in (4, 8, 32) for path in (ReFL(2, 2), ReFL(4, 4), LastSteps(1))}) == 1


@pytest.fixture(scope="module")
def world():
    """The built-in world's sizes."""
    torch.manual_seed(0)
    backbone = tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary).eval()
    model = RewardModel(backbone, ScoreTokenHead(backbone), backbone.rubric)
    generator = FlowGenerator(shapes.vocabulary(), FlowSize(patch=16, width=256, heads=8))
    return generator, model, PromptBatch(["p", "q"], list(shapes.prompts("train")[:2]))


def operations(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def step(world, path, dimensions=None):
    generator, model, batch = world
    stage = TextToImage(generator, {"one": Reward(model, Minimum(), dimensions=dimensions)}, path, **QUIET)
    return operations(lambda: learn(stage, batch))


def test_four_dimensions_cost_less_than_1_7_times_one(world):
    one, four = (step(world, LastSteps(1), dimensions) for dimensions in (["realism"], None))
    assert 1.01 < four / one < 1.7


@pytest.mark.parametrize("path", [ReFL(4, 4), ReFL(10, 10), LastSteps(1)], ids=["early", "late", "last"])
def test_one_step_with_gradient_costs_less_than_1_3_times_sampling_and_one_reward(world, path):
    generator, model, batch = world

    @torch.no_grad()
    def plain():
        model(images=generator.sample(batch.prompts), prompts=batch.prompts)

    assert step(world, path) < 1.3 * operations(plain)
