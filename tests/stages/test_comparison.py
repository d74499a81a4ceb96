"""The yes token: losses by hand on plain forwards of both images, measures by loops over pairs."""

import math
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from plain import build, chat, forward
from torch.nn.functional import binary_cross_entropy

import zr
from zr.data import AllPairs, Batch, ChosenPairs, ScoreData, collate, shapes
from zr.losses import InterpolatedCrossEntropy
from zr.models import ScoreTokenHead, comparing, compose
from zr.stages import Comparison, ComparisonMetrics

NAMES = shapes.DIMENSIONS
WORDING = {"system": "judge", "instructions": {n: n for n in NAMES}, "labels": ["A", "I"], "marker": " score"}
RUBRIC = zr.Rubric.from_dict({"scale": {"bins": [0, 1], "anchors": {name: {} for name in NAMES}}, "wording": WORDING})


def stage(seed=0, rubric=RUBRIC, **options):
    made = Comparison(
        comparing(compose(build("qwen3_vl", seed=seed), ScoreTokenHead), rubric), InterpolatedCrossEntropy(), **options
    )
    made.log = lambda name, value, **_: made.__dict__.setdefault("logged", {}).update({name: value})
    return made


def record(key, choices=(), candidates=3, unknown=()):
    """A record of the world; choices in alignment, scores of some candidates taken away there."""
    (made,) = shapes.records("test", 1, candidates=candidates, seed=len(key))
    alignment = {name: given for name, given in made.scores["alignment"].items() if name not in unknown}
    return replace(made, key=key, scores={**made.scores, "alignment": alignment}, preferences={"alignment": tuple(choices)})


@pytest.fixture(scope="module")
def records():
    """Two prompts of three images; of the second, an image without score and choices that overrule scores, one a tie."""
    return [record("a"), record("bb", [("c0", "c1", 0.75), ("c2", "c1", 0.5)], unknown=("c1",))]


@pytest.fixture(scope="module")
def batch(records):
    return collate(records, shapes.rubric().scale, pairs=AllPairs())


def yes(made, batch, first, second, name):
    """P(yes) by the plain forward of one sequence."""
    backbone = made.model.backbone
    tokens = backbone.processor.tokenizer.convert_tokens_to_ids(["A", "I"])
    text = chat(batch.prompts[first], name, images=2) + " score"
    logits = forward(backbone, text, [batch.images[i] / 255 for i in (first, second)])[2]
    return logits[-1, tokens].softmax(-1)[1]


@torch.no_grad()
def test_loss_by_hand(batch, monkeypatch):
    """Whichever of the two orders of a pair is shown, each pair counts once, in its own dimension."""
    made, shown = stage(), []
    answer = made.model.forward
    monkeypatch.setattr(made.model, "forward", lambda images, prompts: shown.extend(images) or answer(images, prompts))
    loss = made.training_step(batch)
    position = {id(image): n for n, image in enumerate(batch.images)}
    orders = {frozenset(pair): pair for pair in ((position[id(a)], position[id(b)]) for a, b in shown)}
    assert len(shown) == len(orders) == 6  # of each prompt three pairs, one question for all dimensions
    assert {pair in batch.pairs.tolist() for pair in map(list, orders.values())} == {True}
    losses = []
    for pair, d, share in zip(batch.pairs.tolist(), batch.pair_dimension.tolist(), batch.preference, strict=True):
        first, second = orders[frozenset(pair)]
        target = share if [first, second] == pair else 1 - share
        losses.append(binary_cross_entropy(yes(made, batch, first, second, NAMES[d]), target))
    assert {0.25, 0.75} & set(batch.preference.tolist())
    assert 0.5 in batch.preference.tolist()
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.logged["train/loss"], loss)


def test_some_of_the_pairs(batch):
    """A batch cut to some pairs: the mean over these, in whatever order each names its images."""
    made = stage()
    parts = [made.training_step(batch.select([p])).item() for p in range(len(batch.pairs))]
    twice = made.training_step(batch.select([2, 2, 1])).item()
    assert twice == pytest.approx((2 * parts[2] + parts[1]) / 3, abs=1e-5)
    assert parts[2] != pytest.approx(parts[1], abs=1e-3)


@torch.no_grad()
def test_the_loss_of_a_process(batch):
    """One with a pair beside one with three: the mean of what they descend is the loss of all four pairs."""
    made = stage()
    parts = [batch.select([0]), batch.select([1, 5, 12])]
    whole = made.training_step(batch.select([0, 1, 5, 12]))
    made.mean_over_processes = lambda values: torch.stack([values[0], torch.tensor(2.0)])
    torch.testing.assert_close(sum(made.training_step(part) for part in parts) / 2, whole, atol=1e-6, rtol=1e-6)


def expected(batch, answers, shown):
    """HPA, margin HPA and consistency per dimension, in a loop; None where nothing counts."""
    found = {}
    for d, name in enumerate(NAMES):
        chosen = {}
        for k, pair in enumerate(batch.pairs.tolist()):
            if batch.chosen[k] and batch.pair_dimension[k] == d:
                chosen[tuple(pair)] = batch.preference[k].item()
        right, steady = {0.0: [], 0.5: []}, []
        for r, (a, b) in enumerate(shown.tolist()):
            first = (answers[0, r, d].item() + answers[1, r, d].item()) / 2
            steady.append((answers[0, r, d].item() > 0.5) == (answers[1, r, d].item() > 0.5))
            gap = batch.scores[a, d].item() - batch.scores[b, d].item()
            for margin, counted in right.items():
                share = chosen.get((a, b), 1 - chosen[b, a] if (b, a) in chosen else None)
                if margin == 0 and share is not None:
                    if share != 0.5:
                        counted.append((first - 0.5) * (share - 0.5) > 1e-7)
                elif abs(gap) > margin + 1e-6:
                    counted.append((first - 0.5) * gap > 1e-7)
        for key, values in (("hpa", right[0.0]), ("margin_hpa", right[0.5]), ("consistency", steady)):
            if values:
                found[f"{key}/{name}"] = sum(values) / len(values)
    for key in ("hpa", "margin_hpa", "consistency"):
        each = [value for name, value in found.items() if name.startswith(f"{key}/")]
        found[key] = sum(each) / len(each)
    return found


def all_pairs(batch):
    index = batch.prompt_index.tolist()
    return torch.tensor([(a, b) for a, b in combinations(range(len(index)), 2) if index[a] == index[b]])


@pytest.mark.parametrize("seed", range(4))
def test_measures_in_a_loop(records, seed):
    """Random answers, some of them ties; with one batch, and with one for each record."""
    evaluation = collate(records, shapes.rubric().scale, pairs=ChosenPairs())
    shown = all_pairs(evaluation)
    answers = torch.rand(2, len(shown), 4, generator=torch.Generator().manual_seed(seed))
    answers[:, ::4] = 0.5
    answers[:, 1] = torch.tensor([0.3, 0.7])[:, None]  # the orders contradict each other: a tie, which is wrong
    metrics = ComparisonMetrics(RUBRIC)
    metrics.update(answers, shown, evaluation)
    wanted = expected(evaluation, answers, shown)
    assert {name: pytest.approx(value.item()) for name, value in metrics.compute().items()} == wanted
    assert len({round(value, 4) for value in wanted.values()}) > 4
    metrics.reset()
    for number, one in enumerate(records):
        mine = evaluation.prompt_index[shown[:, 0]] == number
        alone = collate([one], shapes.rubric().scale, pairs=ChosenPairs())
        metrics.update(answers[:, mine], shown[mine] - 3 * number, alone)
    assert {name: pytest.approx(value.item()) for name, value in metrics.compute().items()} == wanted


def test_measures_of_nothing():
    metrics = ComparisonMetrics(RUBRIC)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        found = metrics.compute()
    assert list(found) == ["hpa"]
    assert math.isnan(found["hpa"])


@torch.no_grad()
def test_validation_asks_in_both_orders(batch, records):
    made = stage().eval()
    evaluation = collate(records, shapes.rubric().scale, pairs=ChosenPairs())
    made.validation_step(evaluation)
    shown = all_pairs(evaluation)
    told = [[yes(made, batch, a, b, name).item() for name in NAMES] for a, b in shown.tolist()]
    turned = [[1 - yes(made, batch, b, a, name).item() for name in NAMES] for a, b in shown.tolist()]
    wanted = expected(evaluation, torch.tensor([told, turned]), shown)
    assert {name: pytest.approx(value.item()) for name, value in made.measures.compute().items()} == wanted
    made.test_step(evaluation)
    assert {name: pytest.approx(value.item()) for name, value in made.measures.compute().items()} == wanted


@torch.no_grad()
def test_an_image_scores_its_mean_preference(batch):
    made = stage().eval()
    found = made(batch)
    for n in range(6):
        for d, name in enumerate(NAMES):
            others = [m for m in range(6) if m != n and (m < 3) == (n < 3)]
            wins = [(yes(made, batch, n, m, name) + 1 - yes(made, batch, m, n, name)) / 2 for m in others]
            assert found.mean[n, d].item() == pytest.approx(sum(wins).item() / len(wins), abs=1e-5)
    assert found.batch_shape == (6, 4)
    torch.testing.assert_close(found.mean.reshape(2, 3, 4).sum(1), torch.full((2, 4), 1.5))  # half of all pairs are won


def test_what_cannot_be_compared(batch):
    made = stage()
    bare = collate([record("a")], shapes.rubric().scale)
    with pytest.raises(ValueError, match=r"a batch \(a.c0, ...\) has no pair to compare: give the data module a pair policy"):
        made.training_step(bare)
    alone = collate([record("a"), record("bb", candidates=1)], shapes.rubric().scale)
    with pytest.raises(ValueError, match=r"bb.c0 is the only image of its prompt: .* leave it out"):
        made(alone)
    made.validation_step(collate([record("bb", candidates=1)], shapes.rubric().scale, pairs=ChosenPairs()))
    assert math.isnan(made.measures.compute()["hpa"])


def test_data_of_other_dimensions(folder, trainer):
    made = Comparison(
        comparing(compose(build("qwen3_vl"), ScoreTokenHead), RUBRIC.select(["realism", "alignment"])),
        InterpolatedCrossEntropy(),
    )
    data = ScoreData(folder, shapes.rubric(), pairs=AllPairs(), pairs_per_batch=8)
    with pytest.raises(ValueError, match=r"the model compares in \('realism', 'alignment'\): give the model a rubric of the"):
        trainer().fit(made, data)


def greys(pairs, seed):
    """Pairs of evenly grey pictures; the brighter one is the better."""
    level = torch.rand(2 * pairs, generator=torch.Generator().manual_seed(seed))
    score, count, better = level[:, None], 2 * pairs, (level[::2] > level[1::2]).float()
    return Batch(
        images=[torch.full((3, 32, 32), int(255 * one), dtype=torch.uint8) for one in level],
        prompts=["ring"] * count,
        keys=[f"r{i // 2}.c{i % 2}" for i in range(count)],
        prompt_index=torch.arange(count) // 2,
        scores=score,
        known=score >= 0,
        votes=torch.zeros(count, 1, 2),
        teacher=None,
        texts=None,
        pairs=torch.arange(count).reshape(-1, 2),
        pair_dimension=torch.zeros(pairs, dtype=torch.int64),
        preference=better,
        chosen=torch.zeros(pairs, dtype=torch.bool),
    )


def test_it_learns_which_picture_is_brighter():
    made, few = stage(rubric=RUBRIC.select(["realism"])), greys(6, seed=0)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    losses = []
    for _ in range(16):
        losses.append(made.training_step(few))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_and_its_checkpoint(folder, trainer, batch, tmp_path):
    parts = {"loss": InterpolatedCrossEntropy(), "optimizer": partial(torch.optim.AdamW, lr=3e-3)}
    made = Comparison(comparing(compose(build("qwen3_vl"), ScoreTokenHead), RUBRIC), **parts)
    before = {name: p.clone() for name, p in made.named_parameters()}
    fitted = trainer(max_epochs=1)
    fitted.fit(made, ScoreData(folder, shapes.rubric(), batch_size=3, pairs=AllPairs(), pairs_per_batch=12))
    assert any((p != before[name]).any() for name, p in made.named_parameters())
    assert {"val/hpa", "val/margin_hpa", "val/consistency", "val/hpa/realism"} <= set(fitted.callback_metrics)
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    model = comparing(compose(build("qwen3_vl", seed=9), ScoreTokenHead), RUBRIC)
    again = Comparison.load_from_checkpoint(path, weights_only=True, model=model, **parts)
    with torch.no_grad():
        assert torch.equal(again.eval()(batch).mean, made.eval()(batch).mean)
