"""What `zr agreement` finds out: how far a student is from its teacher, where they disagree most, and what each costs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zr.commands.inspecting import thumbnail
from zr.commands.measuring import HeldOut
from zr.data import Batch
from zr.metrics import MARGIN, bootstrap_interval, compare, coupling_distances, evaluate
from zr.models import ReasoningReward, RewardModel, Sampler, Written
from zr.report import Card, Estimate, Judgement, Page, Section, Table, dimension_table, scatter, scorer_table
from zr.report.tables import UNDEFINED
from zr.rubric import Rubric
from zr.scores import ScoreDistribution

__all__ = ["Comparison", "Contestant", "page", "run"]

ROLES = ("teacher", "student")


class Counter:
    """A sampler that counts what it writes.

    Args:
        sampler: that writes.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.tokens = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Written:
        """See :class:`~zr.models.Sampler`; each trace counts with its tokens and the one that answers."""
        written = self.sampler(*args, **kwargs)
        self.tokens += sum(len(trace) + 1 for trace in written.traces)
        return written


@dataclass
class Contestant:
    """One of the two: a model, or the labels that one has stored.

    Args:
        name: as the user gave it.
        rubric: of its scores.
        model: that scores; None for stored labels.
        seconds: that each batch took, from decoded images to distributions.
        images: in each batch.
        tokens: written in all, the answers included; of a direct model one for each score.
    """

    name: str
    rubric: Rubric
    model: RewardModel | None
    seconds: list[float] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    tokens: int = 0

    def __post_init__(self) -> None:
        self._counter = None
        if isinstance(self.model, ReasoningReward):
            self._counter = self.model.policy.sampler = Counter(self.model.policy.sampler)

    @property
    def per_image(self) -> list[float]:
        """Seconds for an image, batch by batch."""
        return [seconds / images for seconds, images in zip(self.seconds, self.images, strict=True)]

    def answer(self, batch: Batch, dimensions: Sequence[str], timed: bool = True) -> ScoreDistribution:
        """Distributions of a batch, ``(N, D)``, on the CPU.

        Args:
            batch: with the stored labels, where those answer.
            dimensions: D names.
            timed: keep what it cost.

        Raises:
            ValueError: an image without a stored label.
        """
        if self.model is None:
            return self._stored(batch, dimensions)
        begin, written = _now(), self._counter.tokens if self._counter else 0
        q: ScoreDistribution = self.model(images=batch.images, prompts=batch.prompts, dimensions=dimensions)
        if timed:
            self.seconds.append(_now() - begin)
            self.images.append(len(batch.images))
            self.tokens += self._counter.tokens - written if self._counter else q.mean.numel()
        return q.to("cpu")

    def _stored(self, batch: Batch, dimensions: Sequence[str]) -> ScoreDistribution:
        if batch.teacher is None:
            raise ValueError(f"the batches hold no labels by {self.name}: read them with that labeller")
        probs = batch.teacher[:, self.rubric.index(dimensions)]
        missing = (probs.sum(-1) == 0).nonzero().tolist()
        if missing:
            image, d = missing[0]
            raise ValueError(
                f"{batch.keys[image]} has no distribution by {self.name} in {dimensions[d]}: label it, or choose --dimensions "
                "that are labelled"
            )
        return ScoreDistribution(probs.log(), self.rubric.bins)


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Args:
        held_out: the annotation of the N images; the images themselves are not kept.
        dimensions: D names that were compared.
        teacher: the first.
        student: the second.
        distributions: of each role, batch shape ``(N, D)``.
        cards: where they disagree most, the worst first.
    """

    held_out: HeldOut
    dimensions: tuple[str, ...]
    teacher: Contestant
    student: Contestant
    distributions: Mapping[str, ScoreDistribution]
    cards: Sequence[Card]

    def agreement(self) -> dict[str, Any]:
        """The student against the teacher, by :func:`zr.metrics.evaluate`: ``hpa`` is the share of the same-prompt pairs which
        the student orders as the teacher does, of those that the teacher tells apart. Beside it ``kl``, the mean
        KL(teacher || student) in nats.
        """
        teacher, student = (self.distributions[role] for role in ROLES)
        mu = student.mean.double().numpy()
        found = evaluate(mu, teacher.mean.double().numpy(), np.ones_like(mu), self.held_out.records, self.dimensions)
        kl = coupling_distances(teacher, student)[0].double().numpy()
        for name, part in [*zip(self.dimensions, kl.T, strict=True), (None, kl.mean(1))]:
            line = found["overall"] if name is None else found["dimensions"][name]
            line["kl"] = bootstrap_interval(_mean, part, part, self.held_out.records).to_dict()
        return found

    def annotated(self) -> dict[str, Any] | None:
        """Both against the annotators, and the student less the teacher; None where nobody scored or compared anything."""
        columns = [self.held_out.dimensions.index(name) for name in self.dimensions]
        scores = self.held_out.scores[:, columns].double().numpy()
        choices = {name: chosen for name, chosen in self.held_out.choices.items() if name in self.dimensions}
        if np.isnan(scores).all() and not any(len(chosen.share) for chosen in choices.values()):
            return None
        mu = {role: q.mean.double().numpy() for role, q in self.distributions.items()}
        items = (scores, ~np.isnan(scores), self.held_out.records, self.dimensions)
        found = {role: evaluate(mu[role], *items, choices=choices) for role in ROLES}
        return found | {"student - teacher": compare(mu["student"], mu["teacher"], *items, choices=choices)}

    def cost(self) -> dict[str, dict[str, float | int]]:
        """Of each model: seconds for an image (all of them, and the batches' least, median and most), output tokens for a
        score, parameters; and how many times the student's time the teacher takes.
        """
        found: dict[str, dict[str, float | int]] = {}
        for role, who in zip(ROLES, (self.teacher, self.student), strict=True):
            if who.model is not None:
                each, count = who.per_image, sum(who.images)
                found[role] = {
                    "images": count,
                    "seconds_per_image": sum(who.seconds) / count,
                    "least": min(each),
                    "median": median(each),
                    "most": max(each),
                    "output_tokens_per_score": who.tokens / (count * len(self.dimensions)),
                    "parameters": sum(p.numel() for p in who.model.parameters()),
                }
        if len(found) == len(ROLES):
            ratios = [a / b for a, b in zip(self.teacher.per_image, self.student.per_image, strict=True)]
            whole = sum(self.teacher.seconds) / sum(self.student.seconds)
            found["teacher / student"] = {"seconds_per_image": whole, "least": min(ratios), "most": max(ratios)}
        return found


@torch.inference_mode()
def run(
    teacher: Contestant, student: Contestant, batches: Iterable[Batch], dimensions: Sequence[str], pictures: int
) -> Comparison:
    """Let two score the same batches, in turn: which of them goes first changes from batch to batch.

    Each answers the first image once before, untimed, so that no time holds the first call's preparations.

    Args:
        teacher: the first.
        student: the second.
        batches: annotated images.
        dimensions: D names.
        pictures: how many images to keep of those on which they disagree most.

    Raises:
        ValueError: two scales, an unknown dimension, no image, an image without a stored label.
    """
    if teacher.rubric.scale_id != student.rubric.scale_id:
        scales = (
            f"{who.name} on {', '.join(who.rubric.dimensions)} in {len(who.rubric.bins)} bins" for who in (teacher, student)
        )
        raise ValueError(f"the two answer on different scales, {' and '.join(scales)}: compare models of one rubric")
    rubric, pair = student.rubric, list(zip(ROLES, (teacher, student), strict=True))
    kept: list[Batch] = []
    logits: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    worst: list[tuple[float, Card]] = []
    for number, batch in enumerate(batches):
        if number == 0:
            for _, who in pair:
                who.answer(_first(batch), dimensions, timed=False)
        found = {role: who.answer(batch, dimensions) for role, who in (pair[::-1] if number % 2 else pair)}
        for role, q in found.items():
            logits[role].append(q.logits)
        worst = _worst(worst, batch, found, rubric, dimensions, pictures)
        kept.append(replace(batch, images=[]))
    if not kept:
        raise ValueError("there is no image to compare the two on")
    return Comparison(
        HeldOut(kept, rubric.dimensions, rubric.bins),
        tuple(dimensions),
        teacher,
        student,
        {role: ScoreDistribution(torch.cat(parts), rubric.bins) for role, parts in logits.items()},
        [card for _, card in worst],
    )


def page(found: Comparison, numbers: Mapping[str, Any], facts: Sequence[tuple[str, str]]) -> Page:
    """The findings, tables, a figure and the picture sheet.

    Args:
        found: by :func:`run`.
        numbers: its agreement, annotated and cost, by name.
        facts: of how it was made.
    """
    teacher, student = (found.distributions[role].mean for role in ROLES)
    sections = [
        Section(
            "Agreement",
            tables=[_agreement(numbers["agreement"])],
            figures=[
                scatter(student, teacher, np.ones_like(teacher), found.dimensions, found.held_out.bins, ("student", "teacher"))
            ],
        )
    ]
    if (annotated := numbers["annotated"]) is not None:
        tables = {role: annotated[role] for role in ROLES}
        difference = dimension_table(annotated["student - teacher"], "Student minus teacher", difference=True)
        sections.append(Section("Against the annotators", tables=[scorer_table(tables), difference]))
    if numbers["cost"]:
        sections.append(Section("Cost", tables=[_cost(numbers["cost"])]))
    if found.cards:
        text = "One image each, in the dimension in which its two expected scores are farthest apart; the farthest first."
        sections.append(Section("Where they disagree most", text, cards=found.cards))
    return Page(f"{found.student.name} against {found.teacher.name}", _findings(numbers), sections, facts)


def _findings(numbers: Mapping[str, Any]) -> list[str]:
    overall, lines = numbers["agreement"]["overall"], []
    lines.append(
        f"Of {overall['pairs']:,} image pairs that the teacher tells apart, the student orders "
        f"{_shown(overall['pooled_hpa'])} alike; mean KL(teacher || student) {_shown(overall['kl'])} nats, mean PLCC "
        f"{_shown(overall['plcc'])}."
    )
    if numbers["annotated"] is not None:
        mean = {role: numbers["annotated"][role]["overall"]["hpa"] for role in ROLES}
        gap = Estimate.of(numbers["annotated"]["student - teacher"]["overall"]["hpa"], signed=True)
        lines.append(
            f"Mean HPA against the annotators: teacher {_shown(mean['teacher'])}, student {_shown(mean['student'])}, "
            f"difference {gap}."
        )
    if "teacher / student" in numbers["cost"]:
        cost = numbers["cost"]
        lines.append(
            f"An image takes the teacher {_time(cost['teacher']['seconds_per_image'])} and "
            f"{cost['teacher']['output_tokens_per_score']:.1f} output tokens for each score, the student "
            f"{_time(cost['student']['seconds_per_image'])} and {cost['student']['output_tokens_per_score']:.1f}: the teacher "
            f"takes {cost['teacher / student']['seconds_per_image']:.1f} times as long."
        )
    return lines


def _agreement(found: Mapping[str, Any]) -> Table:
    lines = list(found["dimensions"].items())
    if len(lines) > 1:
        lines.append(("mean", found["overall"]))
    rows = [
        (
            name,
            *(Estimate.of(line[key]) for key in ("hpa", "margin_hpa", "plcc", "srcc", "kl")),
            f"{line['pairs']:,}",
        )
        for name, line in lines
    ]
    columns = ("dimension", "alike", "alike, margin", "PLCC", "SRCC", "KL", "pairs")
    level = found["overall"]["kl"]["level"]
    note = (
        "Alike: share of the pairs of one prompt that the student orders as the teacher does, of those that the teacher tells "
        f"apart, or tells apart by more than {MARGIN:g} (margin); a tie is not alike. KL(teacher || student) in nats. In "
        f"brackets: {level:.0%} intervals over resampled prompts."
    )
    return Table("The student against the teacher", columns, rows, note)


def _cost(found: Mapping[str, Mapping[str, float | int]]) -> Table:
    rows = []
    for name, line in found.items():
        models = "parameters" in line
        text = _time if models else "{:.2f}".format
        rows.append(
            (
                name,
                text(line["seconds_per_image"]),
                f"{text(line['least'])} to {text(line['most'])}",
                f"{line['output_tokens_per_score']:.1f}" if models else UNDEFINED,
                f"{line['parameters'] / 1e6:,.1f} M" if models else UNDEFINED,
            )
        )
    columns = ("", "time", "over batches", "tokens", "parameters")
    images = next(iter(found.values()))["images"]
    note = (
        f"Time for an image, from its pixels to distributions in all dimensions; the same {images:,} images in one run, batch "
        "by batch in turn. Output tokens for a score: those of its traces, and one that answers for each trace; a direct model "
        "answers in one."
    )
    return Table("", columns, rows, note)


def _worst(
    worst: list[tuple[float, Card]],
    batch: Batch,
    found: Mapping[str, ScoreDistribution],
    rubric: Rubric,
    dimensions: Sequence[str],
    count: int,
) -> list[tuple[float, Card]]:
    """The images on which expected scores are farthest apart, so far."""
    kl, gaps = coupling_distances(*(found[role] for role in ROLES))
    gap, place = gaps.max(-1)
    columns = rubric.index(dimensions)
    for i in gap.argsort(descending=True)[:count].tolist():
        d = int(place[i])
        if len(worst) == count and gap[i] <= worst[-1][0]:
            break
        judgements = [
            Judgement(
                f"{dimensions[d]}, {role}", found[role][i, d], batch.votes[i, columns[d]], float(batch.scores[i, columns[d]])
            )
            for role in ROLES
        ]
        note = f"{dimensions[d]}: {float(gap[i]):.2f} apart, KL {float(kl[i, d]):.3f} nats"
        card = Card(batch.prompts[i], judgements, thumbnail(batch.images[i]), batch.keys[i], note)
        worst = sorted([*worst, (float(gap[i]), card)], key=lambda entry: -entry[0])[:count]
    return worst


def _first(batch: Batch) -> Batch:
    """Its first image, as far as a scorer looks."""
    teacher = None if batch.teacher is None else batch.teacher[:1]
    return replace(batch, images=batch.images[:1], prompts=batch.prompts[:1], keys=batch.keys[:1], teacher=teacher)


def _mean(values: Any, same: Any, prompt: Any, weight: Any) -> Any:
    return (weight @ values) / weight.sum(-1)


def _shown(interval: Mapping[str, Any]) -> str:
    return str(Estimate.of(interval))


def _time(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
