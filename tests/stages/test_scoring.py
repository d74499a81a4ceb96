"""Measures of an evaluation against the functions of zr.metrics on everything at once; the schedule by hand."""

import json
import math
from dataclasses import replace
from itertools import combinations

import lightning as L
import numpy as np
import pytest
import torch

from zr.data import AllPairs, Batch, ChosenPairs, RandomPairs, collate, shapes
from zr.metrics import (
    Choices,
    Coverage,
    ExpectedCalibrationError,
    RankedProbabilityScore,
    VotesNegativeLogLikelihood,
    evaluate,
    hpa,
    plcc,
    srcc,
)
from zr.scores import ScoreDistribution
from zr.stages import ScoreMetrics, Supervised, WriteDistributions

SCALE = shapes.rubric().scale


@pytest.fixture(scope="module")
def batches():
    """Three batches; one dimension unknown in the first, one everywhere."""
    records = list(shapes.records("test", count=6, candidates=4))
    batches = [collate(records[i : i + 2], SCALE) for i in (0, 2, 4)]
    for batch in batches:
        forget(batch, slice(None), 2)
    forget(batches[0], slice(None), 1)
    forget(batches[1], slice(0, 3), 0)
    return batches


def forget(batch, rows, dimension):
    batch.scores[rows, dimension] = math.nan
    batch.known[rows, dimension] = False
    batch.votes[rows, dimension] = 0


def predictions(batches):
    generator = torch.Generator().manual_seed(0)
    return [
        ScoreDistribution(torch.randn(len(batch.prompts), 4, 9, generator=generator).requires_grad_(), SCALE.bins)
        for batch in batches
    ]


def test_measures_of_the_union(batches):
    metrics = ScoreMetrics(shapes.rubric())
    given = predictions(batches)
    for prediction, batch in zip(given, batches, strict=True):
        metrics.update(prediction, batch)
    found = metrics.compute()
    union = Batch.join(batches)
    whole = ScoreDistribution(torch.cat([p.logits for p in given]), SCALE.bins).detach()
    by_name = {}
    for d in (0, 1, 3):
        known = union.known[:, d]
        mu, score = whole.mean[known, d].double().numpy(), union.scores[known, d].double().numpy()
        prompt = union.prompt_index[known].numpy()  # numbered by join, not by name
        expected = {
            "hpa": hpa(mu, score, prompt),
            "margin_hpa": hpa(mu, score, prompt, margin=0.5),
            "plcc": plcc(mu, score),
            "srcc": srcc(mu, score),
        }
        for name, metric in (
            ("nll", VotesNegativeLogLikelihood()),
            ("rps", RankedProbabilityScore()),
            ("ece", ExpectedCalibrationError()),
            ("coverage_50", Coverage(0.5)),
            ("coverage_80", Coverage(0.8)),
            ("coverage_90", Coverage(0.9)),
        ):
            metric.update(whole[known, d], union.votes[known, d])
            expected[name] = metric.compute()
        for name, value in expected.items():
            assert math.isclose(found[f"{name}/{SCALE.dimensions[d]}"].item(), float(value), rel_tol=1e-6), name
            by_name.setdefault(name, []).append(float(value))
    for name, values in by_name.items():
        assert math.isclose(found[name].item(), sum(values) / 3, rel_tol=1e-6)
    assert len(found) == 10 * 4  # the dimension that nobody scored is left out
    metrics.reset()
    metrics.update(given[2], batches[2])
    assert metrics.compute()["hpa"] != found["hpa"]


def test_order_and_split_of_batches_do_not_matter(batches):
    given = predictions(batches)
    joined, apart = ScoreMetrics(shapes.rubric()), ScoreMetrics(shapes.rubric())
    joined.update(ScoreDistribution(torch.cat([p.logits for p in given]), SCALE.bins), Batch.join(batches))
    for prediction, batch in reversed(list(zip(given, batches, strict=True))):
        apart.update(prediction, batch)
    expected, found = joined.compute(), apart.compute()
    assert set(expected) == set(found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def compared(policy, forgotten=(0, 1, 2, 3), count=4):
    """Batches with choices in three dimensions, some against the scores; the scores of some dimensions forgotten."""
    batches = []
    for i, record in enumerate(shapes.records("test", count=count, candidates=4)):
        names = [candidate.id for candidate in record.candidates]
        pairs = [(0, 1, 0.8), (2, 1, 0.0), (3, 0, 0.5), (2, 3, 0.25)][: i + 1]
        choices = [(names[a], names[b], share) for a, b, share in pairs]
        given = dict.fromkeys(SCALE.dimensions[:3], choices)
        batch = collate([replace(record, preferences=given)], SCALE, pairs=policy, seed=3)
        for d in forgotten:
            forget(batch, slice(None), d)
        batches.append(batch)
    return batches


def test_hpa_of_choices_alone():
    batches = compared(ChosenPairs())
    given, metrics = predictions(batches), ScoreMetrics(shapes.rubric())
    right = {name: [] for name in SCALE.dimensions}
    for prediction, batch in zip(given, batches, strict=True):
        metrics.update(prediction, batch)
        for (i, j), d, share in zip(batch.pairs.tolist(), batch.pair_dimension, batch.preference.tolist(), strict=True):
            if share != 0.5:
                gap = (prediction.mean[i, d] - prediction.mean[j, d]).item()
                right[SCALE.dimensions[d]].append(gap * (share - 0.5) > 0)
    found = metrics.compute()
    expected = {f"hpa/{name}": sum(each) / len(each) for name, each in right.items() if each}
    assert [len(each) for each in right.values()] == [1 + 2 + 2 + 3] * 3 + [0]
    assert {name: value.item() for name, value in found.items() if "/" in name} == pytest.approx(expected)
    assert found["hpa"].item() == pytest.approx(sum(expected.values()) / 3)
    assert set(found) == {"hpa", *expected}  # nothing else is defined without scores


@pytest.mark.parametrize("policy", [ChosenPairs(), AllPairs(), RandomPairs(100)])
def test_choices_come_before_scores_and_tables_agree(policy):
    batches = compared(policy, forgotten=(1,))
    given, metrics = predictions(batches), ScoreMetrics(shapes.rubric())
    for prediction, batch in zip(given, batches, strict=True):
        metrics.update(prediction, batch)
    found, union = metrics.compute(), Batch.join(batches)
    mu = torch.cat([prediction.mean for prediction in given]).detach()
    choices = {}
    for d, name in enumerate(SCALE.dimensions):
        said = {
            frozenset(pair): (pair, share)
            for pair, at, share, chosen in zip(
                union.pairs.tolist(), union.pair_dimension, union.preference.tolist(), union.chosen, strict=True
            )
            if at == d and chosen
        }
        right, total = 0, 0
        for i, j in combinations(range(len(mu)), 2):
            (a, b), share = said.get(frozenset((i, j)), ((i, j), None))
            gap = union.scores[a, d] - union.scores[b, d] if share is None else torch.tensor(share - 0.5)
            if union.prompt_index[i] == union.prompt_index[j] and not gap.isnan() and gap != 0:
                total += 1
                right += ((mu[a, d] - mu[b, d]) * gap > 0).item()
        assert found[f"hpa/{name}"].item() == pytest.approx(right / total), name
        columns = [*zip(*(pair for pair, _ in said.values()), strict=True)] or [(), ()]
        shares = [share for _, share in said.values()]
        choices[name] = Choices(np.array(columns[0], int), np.array(columns[1], int), np.array(shares))
    table = evaluate(
        mu.double(), union.scores.double(), union.known, union.prompt_index, SCALE.dimensions, choices=choices, samples=5
    )
    for name, row in table["dimensions"].items():
        for measure in ("hpa", "margin_hpa", "plcc", "srcc"):
            if f"{measure}/{name}" in found:
                assert row[measure]["estimate"] == pytest.approx(found[f"{measure}/{name}"].item(), rel=1e-6)
    assert table["overall"]["hpa"]["estimate"] == pytest.approx(found["hpa"].item(), rel=1e-6)


def test_without_any_pair_hpa_is_nan():
    metrics = ScoreMetrics(shapes.rubric())
    (batch,) = compared(None, count=1)
    metrics.update(predictions([batch])[0], batch)
    found = metrics.compute()
    assert set(found) == {"hpa"}
    assert found["hpa"].isnan()


def test_off_scale_mass_where_the_head_computes_it(batches):
    metrics = ScoreMetrics(shapes.rubric())
    masses = [torch.rand(len(batch.prompts), 4, generator=torch.Generator().manual_seed(7)) for batch in batches]
    for prediction, batch, mass in zip(predictions(batches), batches, masses, strict=True):
        metrics.update(ScoreDistribution(prediction.logits.detach(), SCALE.bins, off_scale=mass), batch)
    found, whole = metrics.compute(), torch.cat(masses)
    assert len(found) == 10 * 4 + 2 + 3  # every image has it, also where nobody scored
    for d, name in enumerate(SCALE.dimensions):
        assert found[f"off_scale/{name}"].item() == pytest.approx(whole[:, d].mean().item())
    assert found["off_scale"].item() == pytest.approx(whole.mean().item())


def test_distance_to_stored_labels(batches):
    """KL in loops and HPA against the labels' means, where there are labels: not in the first batch, nor in one dimension."""
    metrics, rubric, given = ScoreMetrics(shapes.rubric()), shapes.rubric(), predictions(batches)
    generator = torch.Generator().manual_seed(1)
    kl, mu, wanted, records = [[] for _ in range(4)], [[] for _ in range(4)], [[] for _ in range(4)], [[] for _ in range(4)]
    for number, (prediction, batch) in enumerate(zip(given, batches, strict=True)):
        teacher = torch.randn(len(batch.prompts), 4, 9, generator=generator).softmax(-1)
        teacher[:, 3] = 0
        teacher[2, 1] = 0
        metrics.update(prediction, replace(batch, teacher=teacher if number else None))
        for n in range(len(batch.prompts) if number else 0):
            for d in range(4):
                t, q = teacher[n, d].tolist(), prediction.probs[n, d].tolist()
                if sum(t):
                    kl[d].append(sum(x * math.log(x / y) for x, y in zip(t, q, strict=True)))
                    mu[d].append(float(prediction.mean[n, d].detach()))
                    wanted[d].append(sum(x * b for x, b in zip(t, SCALE.bins, strict=True)))
                    records[d].append(batch.keys[n].split(".")[0])
    found = metrics.compute()
    means = [sum(values) / len(values) for values in kl if values]
    shares = [float(hpa(np.array(mu[d]), np.array(wanted[d]), np.array(records[d]))) for d in range(3)]
    for d, name in enumerate(rubric.dimensions[:3]):
        assert float(found[f"teacher_kl/{name}"]) == pytest.approx(means[d], rel=1e-4)
        assert float(found[f"teacher_hpa/{name}"]) == pytest.approx(shares[d], abs=1e-6)
    assert f"teacher_kl/{rubric.dimensions[3]}" not in found
    assert float(found["teacher_kl"]) == pytest.approx(sum(means) / 3, rel=1e-4)
    assert float(found["teacher_hpa"]) == pytest.approx(sum(shares) / 3, abs=1e-6)


def test_nothing_is_kept_with_a_graph(batches):
    metrics = ScoreMetrics(shapes.rubric())
    metrics.update(predictions(batches)[0], batches[0])
    assert not any(t.requires_grad for name in ("mu", "logits") for t in getattr(metrics, name))


class Rates(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("warmup", "decay", "expected"),
    [
        (0.5, 0.5, [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
        (0.0, 0.0, [1] * 6),
        (0.0, 1.0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ],
)
def test_schedule(parts, data, trainer, warmup, decay, expected):
    rates = Rates()
    stage = Supervised(**parts(), optimizer=lambda p: torch.optim.SGD(p, lr=0.01), warmup=warmup, decay=decay)
    trainer(rates, limit_val_batches=0, enable_checkpointing=False).fit(stage, data())
    torch.testing.assert_close(torch.tensor(rates.seen), 0.01 * torch.tensor(expected))


@pytest.mark.parametrize(("warmup", "decay"), [(-0.1, 0.5), (0.6, 0.6), (0.0, 1.1), (math.nan, 0.5)])
def test_shares_that_are_refused(parts, warmup, decay):
    with pytest.raises(ValueError, match="warmup and decay are shares of all steps whose sum is at most 1"):
        Supervised(**parts(), warmup=warmup, decay=decay)


def test_a_frozen_part_gets_no_optimiser_state(parts, data, trainer):
    given = parts()
    given["model"].backbone.requires_grad_(False)
    stage = Supervised(**given)
    before = {name: p.clone() for name, p in stage.named_parameters()}
    fitted = trainer(max_epochs=1, limit_val_batches=0, enable_checkpointing=False)
    fitted.fit(stage, data())
    assert sum(len(group["params"]) for group in fitted.optimizers[0].param_groups) == 2  # weight and bias of the head
    moved = {name for name, p in stage.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"model.head.weight", "model.head.bias"}


def test_validation_test_and_prediction(parts, data, trainer, tmp_path):
    stage = Supervised(**parts())
    path = tmp_path / "found" / "lines.jsonl"
    runner = trainer(WriteDistributions(path))
    (validated,) = runner.validate(stage, data(), verbose=False)
    (tested,) = runner.test(stage, data(), verbose=False)
    runner.predict(stage, data(), return_predictions=False)
    metrics = ScoreMetrics(shapes.rubric())
    lines = {}
    for batch in data().test_dataloader():
        with torch.no_grad():
            prediction = stage(batch)
        metrics.update(prediction, batch)
        lines |= dict(zip(batch.keys, prediction.probs.tolist(), strict=True))
    for name, value in metrics.compute().items():
        assert math.isclose(tested[f"test/{name}"], value.item(), rel_tol=1e-5), name
    assert set(validated) == {name.replace("test/", "val/") for name in tested}
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["key"] for line in written] == list(lines)
    for line in written:
        assert list(line["probs"]) == list(shapes.DIMENSIONS)
        torch.testing.assert_close(torch.tensor(list(line["probs"].values())), torch.tensor(lines[line["key"]]))
