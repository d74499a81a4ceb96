"""The third stage's gradients: finite differences of each part and of whole chains, and the stock forward pass of a student."""

import copy
from itertools import pairwise

import pytest
import torch
from affine import BATCH, RUBRIC, SIZE, Affine, Linear, Recorded, learn, source
from plain import FAMILIES, build, chat, forward

from zr.models import RewardModel, RiskAverse, ScoreTokenHead
from zr.models.generators import FlowGenerator, FlowSize
from zr.stages import LastSteps, ReFL, Reward, TextToImage
from zr.stages.starting_generator import StartingGenerator

BINS = torch.tensor(RUBRIC.bins, dtype=torch.float64)
WORDS = ("red", "ring", "blue", "a", "green", "triangle")
STEPS = 3


def flow(side, seed=0):
    """With no weight at 0, where some begin, and pale pictures."""
    torch.manual_seed(seed)
    size = FlowSize(image=side, patch=side // 2, width=8, layers=1, heads=2, words=3)
    generator = moved(FlowGenerator(WORDS, size, STEPS).double())
    with torch.no_grad():
        generator.transformer.output.weight.mul_(0.4)
    return generator


def moved(generator, scale=0.1):
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(scale * torch.randn_like(p))
    return generator


def noise(side):
    """What the stage draws for its first batch."""
    return torch.cat([torch.randn(1, 3, side, side, generator=source(7, 0, key, 0)) for key in BATCH.keys]).double()


def plain(generator, latents, gradient_steps=STEPS, stop=STEPS, start=None):
    """Euler steps written out: pictures, and the mean squared distance ``(B,)`` of velocities from those of ``start``."""
    words, far = generator.condition(BATCH.prompts), []
    for step in range(stop):
        if step == stop - gradient_steps:
            latents = latents.detach()
        time = torch.full((len(latents),), step / STEPS, dtype=latents.dtype)
        velocity = generator.transformer(latents, time, words)
        if start is not None:
            apart = velocity - start.transformer(latents, time, words)
            far.append(torch.stack([row.square().sum() / row.numel() for row in apart]))
        latents = latents + velocity * (1 - step / STEPS if step + 1 == stop else 1 / STEPS)
    images = (latents + 1) / 2
    assert 0 < images.min() < images.max() < 1, "a pixel that is cut off has another slope than its gradient"
    return images, sum(far) / len(far) if far else 0


def learned(stage):
    """The gradient of the stage's first update, which changes nothing."""
    return learn(stage).optimizers[0].seen[0]


def stage_of(generator, scorer, path, velocity_distance=0.0):
    still = {"optimizer": lambda p: Recorded(p, lr=0.0), "warmup": 0.0, "decay": 0.0, "gradient_clip": None}
    rewards = {"one": Reward(scorer, RiskAverse(0.5))}
    return TextToImage(generator, rewards, path, velocity_distance=velocity_distance, seed=7, **still)


def risk_averse(logits):
    """mu - sigma / 2 of logits ``(B, D, K)``, its mean over dimensions and images."""
    q = logits.double().softmax(-1)
    mu = (q * BINS).sum(-1)
    return (mu - 0.5 * ((q * BINS**2).sum(-1) - mu**2).sqrt()).mean()


def slopes(value, parameters, h=1e-2, count=8, length=0.1):
    """In random directions: each direction, and Richardson's extrapolation of central differences of h, h / 2 and h / 4."""
    drawn, before = torch.Generator().manual_seed(9), [p.detach().clone() for p in parameters]
    for _ in range(count):
        direction = [length * torch.randn(p.shape, generator=drawn, dtype=p.dtype) for p in parameters]

        @torch.no_grad()
        def along(distance, direction=direction):
            for p, b, d in zip(parameters, before, direction, strict=True):
                p.copy_(b + distance * d)
            return float(value())

        differences = [(along(t) - along(-t)) / (2 * t) for t in (h, h / 2, h / 4)]
        fourth = [(4 * b - a) / 3 for a, b in pairwise(differences)]
        along(0)
        yield direction, (16 * fourth[1] - fourth[0]) / 15


def check(gradient, found, tolerance):
    """Against finite differences, relative to the largest of these."""
    directions, wanted = zip(*found, strict=True)
    products = [float(sum((g * d).sum() for g, d in zip(gradient, one, strict=True))) for one in directions]
    size = max(map(abs, wanted))
    assert size > 1e-3
    assert products == pytest.approx(wanted, rel=0, abs=tolerance * size)


def test_gradcheck_of_the_distance_to_the_start():
    generator = Affine()
    start = StartingGenerator(generator)
    moved(generator)
    conditions, parameters = generator.condition(["a", "bcd"]), list(generator.parameters())
    latents = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64, requires_grad=True)

    def distance(latents, *parameters):
        names = [name for name, _ in generator.named_parameters()]
        flat = latents.flatten(1)
        weight = dict(zip(names, parameters, strict=True))
        velocity = torch.nn.functional.linear(flat, weight["mix.weight"], weight["mix.bias"]).tanh()
        velocity = velocity + 3 * torch.nn.functional.linear(conditions, weight["word.weight"], weight["word.bias"])
        return start.distance(latents, velocity.reshape(latents.shape), 2, conditions)

    assert float(distance(latents, *parameters).min().detach()) > 1e-4
    assert torch.autograd.gradcheck(distance, (latents, *parameters), fast_mode=True)


@pytest.mark.parametrize("ceiling", [None, 2.4])
def test_gradcheck_of_a_reward_s_loss(ceiling):
    reward = Reward(Linear(), RiskAverse(0.5), weight=0.7, ceiling=ceiling)
    images = torch.rand(3, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def loss(images):
        return reward.loss(reward.aggregation(reward.scorer(images, BATCH.prompts)))

    assert ceiling is None or 0 == loss(images).min() < loss(images).max()
    assert torch.autograd.gradcheck(loss, images)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_whole_chain_in_double_precision_is_that_of_finite_differences(weight):
    generator, scorer = flow(SIZE), Linear()
    stage = stage_of(generator, scorer, LastSteps(STEPS), velocity_distance=weight)
    start = copy.deepcopy(generator)
    moved(generator, 0.05)
    gradient = learned(stage)

    def value():
        images, far = plain(generator, noise(SIZE), start=start)
        length = torch.tensor([len(prompt) / 10 for prompt in BATCH.prompts], dtype=torch.float64)
        logits = (scorer.weight * images.flatten(1)[:, None, None]).sum(-1) * length[:, None, None]
        return -risk_averse(logits) + weight * far.mean()

    check(gradient, slopes(value, list(generator.parameters())), 1e-6)


def student(family):
    """A real vision-language model that answers at one position."""
    backbone = build(family).eval()
    return RewardModel(backbone, ScoreTokenHead(backbone), RUBRIC)


def test_directional_derivatives_through_a_student():
    """Norms are in float32 whatever the weights: hence the large step. A random tiny Qwen3.5 is too crooked for such a one."""
    model, generator = student("qwen3_vl").double(), flow(32)
    gradient = learned(stage_of(generator, model, LastSteps(STEPS)))

    def value():
        scores = model(images=plain(generator, noise(32))[0], prompts=BATCH.prompts)
        return -risk_averse(scores.logits)

    check(gradient, slopes(value, list(generator.parameters())), 1e-4)


@pytest.mark.parametrize("path", [LastSteps(2), ReFL(2, 2)], ids=["draft", "refl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_is_that_of_plain_autograd_through_the_stock_forward_pass(family, path):
    model, generator = student(family), flow(32)
    found = torch.cat([g.flatten() for g in learned(stage_of(generator, model, path))])
    images, _ = plain(generator, noise(32), *path.draw(STEPS, torch.Generator()))
    labels = list(model.backbone.prompts.label_ids)
    logits = [
        forward(model.backbone, chat(prompt, name) + " score", [image])[2][-1, labels]
        for prompt, image in zip(BATCH.prompts, images.float(), strict=True)
        for name in RUBRIC.dimensions
    ]
    wanted = torch.autograd.grad(-risk_averse(torch.stack(logits).view(3, 4, 9)), list(generator.parameters()))
    wanted = torch.cat([g.flatten() for g in wanted])
    assert wanted.norm() > 1e-2
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
