"""A generator and a scorer in float64, small enough to write down, and the same chain as a plain loop."""

from hashlib import blake2b

import lightning as L
import torch
from torch import nn

from zr.data import PromptBatch, shapes
from zr.models.generators.base import Generator
from zr.scores import ScoreDistribution

SIZE = 4
PIXELS = 3 * SIZE * SIZE
RUBRIC = shapes.rubric()
BATCH = PromptBatch(["p", "q", "r"], ["red ring", "blue", "a green triangle"])


class Affine(Generator):
    """Velocity: an affine map of the latents that knows prompt and step; picture: a sigmoid of the latents."""

    def __init__(self, steps=5, seed=0, wrap=lambda function, latents: function(latents)):
        super().__init__(steps)
        torch.manual_seed(seed)
        self.mix = nn.Linear(PIXELS, PIXELS, dtype=torch.float64)
        self.word = nn.Linear(1, PIXELS, dtype=torch.float64)
        self.wrap = wrap

    def condition(self, prompts):
        return self.word.weight.new_tensor([[len(prompt) / 10] for prompt in prompts])

    def noise(self, count, generator):
        return torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)

    def velocity(self, latents, step, conditions):
        def run(given):
            return (self.mix(given.flatten(1)).tanh() + self.word(conditions) * (step + 1)).reshape(latents.shape)

        return self.wrap(run, latents)

    def advance(self, latents, velocity, step):
        return latents + velocity / self.steps

    def clean(self, latents, velocity, step):
        return latents + (1 - step / self.steps) * velocity

    def decode(self, latents):
        return latents.sigmoid()


class Linear(nn.Module):
    """Logits: a linear map of the pixels, times the length of the prompt."""

    def __init__(self, seed=0, scale=1.0):
        super().__init__()
        self.rubric = RUBRIC
        generator = torch.Generator().manual_seed(seed)
        weight = scale * torch.randn(4, 9, PIXELS, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, images, prompts, dimensions=None):
        length = images.new_tensor([len(prompt) / 10 for prompt in prompts])[:, None, None]
        logits = torch.einsum("dkp,bp->bdk", self.weight.to(images.dtype)[self.rubric.index(dimensions)], images.flatten(1))
        return ScoreDistribution(logits * length, self.rubric.bins)


def source(seed, *what):
    """What a seed stands for."""
    text = repr((seed, *what))
    return torch.Generator().manual_seed(int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big"))


def naive(generator, prompt, noise, gradient_steps, stop, start=None):
    """One picture by a plain loop, and the mean squared distance of the velocities with gradient from those of ``start``."""
    condition, x, far = torch.tensor([[len(prompt) / 10]], dtype=torch.float64), noise, []
    for step in range(stop):
        if step < stop - gradient_steps:
            x = x.detach()
        flat = x.reshape(1, -1)
        v = generator.mix(flat).tanh() + generator.word(condition) * (step + 1)
        if start is not None and step >= stop - gradient_steps:
            w = start.mix(flat).tanh() + start.word(condition) * (step + 1)
            far.append(((v - w) ** 2).sum() / PIXELS)
        v = v.reshape(x.shape)
        if step < stop - gradient_steps:
            v = v.detach()
        last = step + 1 == stop < generator.steps
        x = x + v * ((1 - step / generator.steps) if last else 1 / generator.steps)
    return 1 / (1 + torch.exp(-x)), sum(far) / len(far) if far else 0


class Given:
    """A loader of these batches."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


class Recorded(torch.optim.SGD):
    """Plain SGD that remembers the gradients of its steps."""

    def step(self, closure=None):
        (group,) = self.param_groups
        self.seen = [*getattr(self, "seen", []), [p.grad.clone() for p in group["params"]]]
        return super().step(closure)


def runner(**options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    return L.Trainer(**(quiet | settings | options))


def learn(stage, *batches, validation=(), **options):
    trainer = runner(**({} if validation else {"limit_val_batches": 0}), **options)
    trainer.fit(stage, train_dataloaders=Given(*(batches or [BATCH])), val_dataloaders=Given(*(validation or [BATCH])))
    return trainer
