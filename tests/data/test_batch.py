"""Batches against hand-worked arrays; pairs against a naive loop; moving by Lightning."""

import io
import random
from itertools import combinations

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image

from zr.data import AllPairs, Annotation, Batch, Candidate, ChosenPairs, LabelledDistribution, RandomPairs, Record, collate
from zr.rubric import Scale

SCALE = Scale(bins=(1.0, 2.0, 3.0, 4.0), anchors={"realism": {}, "aesthetics": {}})
CANDIDATES = "abcde"


def picture(seed, size=(7, 5)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue(), pixels


def make(key, count=2, **parts):
    return Record(
        key, f"prompt of {key}", tuple(Candidate(c, picture(i)[0]) for i, c in enumerate(CANDIDATES[:count])), **parts
    )


def scores(**by_candidate):
    return {c: {f"annotator{i}": Annotation(float(s)) for i, s in enumerate(given)} for c, given in by_candidate.items()}


FIRST = make("p0", 3, scores={"realism": scores(a=(1, 3, 4), b=(2,)), "aesthetics": scores(c=(4, 4, 4, 1))})
SECOND = make("p1", 2, scores={"aesthetics": scores(a=(1,), b=(2, 4))}, texts={"aesthetics": {"b": "fine"}})


def test_tensors_by_hand():
    batch = collate([FIRST, SECOND], SCALE)
    nan = torch.nan
    expected = torch.tensor([[3, nan], [2, nan], [nan, 4], [nan, 1], [nan, 3]])
    torch.testing.assert_close(batch.scores, expected, equal_nan=True)
    assert torch.equal(batch.known, ~expected.isnan())
    votes = torch.zeros(5, 2, 4)
    votes[0, 0] = torch.tensor([1.0, 0, 1, 1])
    votes[1, 0, 1] = 1
    votes[2, 1] = torch.tensor([1.0, 0, 0, 3])
    votes[3, 1, 0] = 1
    votes[4, 1] = torch.tensor([0, 1.0, 0, 1])
    assert torch.equal(batch.votes, votes)
    assert batch.keys == ["p0.a", "p0.b", "p0.c", "p1.a", "p1.b"]
    assert batch.prompts == ["prompt of p0"] * 3 + ["prompt of p1"] * 2
    assert batch.prompt_index.tolist() == [0, 0, 0, 1, 1]
    assert batch.texts == [{}, {}, {}, {}, {"aesthetics": "fine"}]
    assert batch.teacher is None
    assert (batch.pairs.shape, batch.pair_dimension.shape, batch.preference) == ((0, 2), (0,), None)
    assert collate([FIRST], SCALE).texts is None


def test_images_are_the_pixels_of_the_file():
    for image, i in zip(collate([FIRST, SECOND], SCALE).images, (0, 1, 2, 0, 1), strict=True):
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(image.numpy(), picture(i)[1].transpose(2, 0, 1))


def test_sizes_may_differ():
    record = Record("p", "x", (Candidate("a", picture(0)[0]), Candidate("b", picture(1, (4, 9))[0])))
    assert [tuple(image.shape) for image in collate([record], SCALE).images] == [(3, 5, 7), (3, 9, 4)]


def test_unlabelled():
    batch = collate([make("p0")], SCALE, pairs=AllPairs())
    assert not batch.known.any()
    assert batch.scores.isnan().all()
    assert (batch.pairs.shape, batch.preference.shape) == ((0, 2), (0,))


def test_teacher():
    def labelled(*probs):
        return {"t": LabelledDistribution(probs, (), SCALE.scale_id), "other": LabelledDistribution((1, 0, 0, 0), (), "")}

    record = make("p0", 2, distributions={"aesthetics": {"b": labelled(0.1, 0.2, 0.3, 0.4)}})
    teacher = collate([record], SCALE, labeller="t").teacher
    torch.testing.assert_close(teacher[1, 1], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert teacher.sum() == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"'p0'.*'nobody'.*other, t"):
        collate([record], SCALE, labeller="nobody")
    annotated = make("p1", 2, scores={"aesthetics": scores(a=(1,))})
    assert not collate([annotated], SCALE, labeller="t").teacher.any()
    chosen = make("p2", 2, preferences={"aesthetics": [("a", "b", 1.0)]})
    assert not collate([chosen], SCALE, labeller="t").teacher.any()
    with pytest.raises(ValueError, match=r"'p3'.*'t' \(labellers: none\): label the split first"):
        collate([make("p3")], SCALE, labeller="t")


def naive_pairs(batch, record_scores, minimum_gap, ties):
    found = set()
    for d in range(2):
        for i, j in combinations(range(len(batch.keys)), 2):
            same = batch.keys[i].split(".")[0] == batch.keys[j].split(".")[0]
            if same and batch.known[i, d] and batch.known[j, d]:
                gap = abs(record_scores[i, d] - record_scores[j, d]).item()
                if gap >= minimum_gap and (ties or gap > 0):
                    found.add((frozenset((i, j)), d))
    return found


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("minimum_gap", [0.0, 1.0, 1.5])
def test_all_pairs_against_a_naive_loop(minimum_gap, ties):
    rng = np.random.default_rng(0)
    records = []
    for p in range(6):
        given = {
            dimension: scores(**{c: rng.choice(SCALE.bins, rng.integers(1, 4)) for c in CANDIDATES[:4] if rng.random() < 0.8})
            for dimension in SCALE.dimensions
        }
        records.append(make(f"p{p}", 4, scores=given))
    batch = collate(records, SCALE, pairs=AllPairs(minimum_gap, ties), seed=3)
    got = [(frozenset(pair), d) for pair, d in zip(batch.pairs.tolist(), batch.pair_dimension.tolist(), strict=True)]
    assert len(got) == len(set(got))
    assert set(got) == naive_pairs(batch, batch.scores, minimum_gap, ties)
    left, right = (batch.scores[batch.pairs[:, side], batch.pair_dimension] for side in (0, 1))
    assert torch.equal(batch.preference, (torch.sign(left - right) + 1) / 2)


def test_choices_overrule_scores_and_stand_alone():
    record = make(
        "p0",
        3,
        scores={"realism": scores(a=(4,), b=(1,))},
        preferences={"realism": [("b", "a", 0.9), ("a", "c", 0.25)], "aesthetics": [("b", "c", 0.5)]},
    )
    batch = collate([record], SCALE, pairs=AllPairs(ties=False))
    by_pair = {}
    for (i, j), share in zip(batch.pairs.tolist(), batch.preference.tolist(), strict=True):
        by_pair[min(i, j), max(i, j)] = round(share if i < j else 1 - share, 6)
    assert by_pair == {(0, 1): 0.1, (0, 2): 0.25}
    assert len(collate([record], SCALE, pairs=AllPairs()).pairs) == 3


def test_order_within_pairs_is_seeded_and_has_no_side():
    records = [make(f"p{i}", 2, scores={"realism": scores(a=(4,), b=(1,))}) for i in range(200)]
    batch = collate(records, SCALE, pairs=AllPairs(), seed=1)
    again, other, later = (collate(records, SCALE, pairs=AllPairs(), seed=s, epoch=e) for s, e in ((1, 0), (2, 0), (1, 1)))
    assert torch.equal(batch.pairs, again.pairs)
    assert not torch.equal(batch.pairs, other.pairs)
    assert not torch.equal(batch.pairs, later.pairs)
    assert abs(batch.preference.mean().item() - 0.5) < 0.15  # 4 standard errors: the better one stands on either side
    alone = collate([records[7]], SCALE, pairs=AllPairs(), seed=1)  # the company does not matter
    assert torch.equal(alone.pairs + 14, batch.pairs[7:8])


def test_a_policy_is_any_callable():
    def first_two(scores, preferences, generator):
        assert isinstance(generator, random.Random)
        return [(*list(scores)[:2], 1.0)] if len(scores) > 1 else []

    batch = collate([FIRST, SECOND], SCALE, pairs=first_two)
    assert sorted(map(sorted, batch.pairs.tolist())) == [[0, 1], [3, 4]]


def test_join_equals_collate_of_all():
    together, joined = collate([FIRST, SECOND], SCALE), Batch.join([collate([FIRST], SCALE), collate([SECOND], SCALE)])
    assert (together.keys, together.texts) == (joined.keys, joined.texts)
    assert torch.equal(together.prompt_index, joined.prompt_index)
    with pytest.raises(ValueError, match="at least one"):
        collate([], SCALE)


def test_lightning_moves_it():
    batch = collate([FIRST, SECOND], SCALE, pairs=AllPairs())
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch)
    tensors = [moved.prompt_index, moved.scores, moved.known, moved.votes, moved.pairs, moved.pair_dimension, moved.preference]
    assert {tensor.device.type for tensor in (*tensors, *moved.images)} == {"meta"}
    assert moved.keys == batch.keys
    assert moved.teacher is None
    assert batch.scores.device.type == "cpu"


def test_a_truncated_image_names_record_and_candidate():
    record = Record("p9", "x", (Candidate("a", picture(0)[0]), Candidate("b", picture(1, (64, 64))[0][:900])))
    with pytest.raises(ValueError, match=r"'p9', candidate 'b'.*truncated"):
        collate([record], SCALE)


def test_negative_gap():
    with pytest.raises(ValueError, match="minimum_gap"):
        AllPairs(minimum_gap=-1.0)


SCORES = {0: 4.0, 1: 1.0, 2: 2.5, 3: 2.5, 4: 4.0}
CHOICES = [(1, 0, 0.8), (2, 4, 0.5)]


@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("among", [None, AllPairs(minimum_gap=1.5), AllPairs(ties=True)])
def test_random_pairs_are_some_of_all(count, among):
    every = (among or AllPairs())(SCORES, CHOICES, random.Random(0))
    found = RandomPairs(count, among)(SCORES, CHOICES, random.Random(5))
    assert len(found) == len(set(found)) == min(count, len(every))
    assert set(found) <= set(every)
    assert found == RandomPairs(count, among)(SCORES, CHOICES, random.Random(5))
    assert RandomPairs(count, among)({}, [], random.Random(5)) == []


def test_random_pairs_draw_every_pair_alike():
    every = AllPairs()(SCORES, CHOICES, random.Random(0))
    drawn = [pair for seed in range(3000) for pair in RandomPairs(2)(SCORES, CHOICES, random.Random(seed))]
    for pair in every:  # five standard errors
        assert abs(drawn.count(pair) / len(drawn) - 1 / len(every)) < 5 * (1 / len(every) / len(drawn)) ** 0.5


def test_random_pairs_change_with_the_epoch_and_count_per_prompt_and_dimension():
    given = {"realism": scores(a=(4,), b=(1,), c=(2,), d=(3,)), "aesthetics": scores(a=(1,), b=(2,))}
    records = [make(f"p{i}", 4, scores=given) for i in range(10)]
    first, again, later = (collate(records, SCALE, pairs=RandomPairs(2), epoch=e) for e in (0, 0, 1))
    assert torch.equal(first.pairs, again.pairs)
    assert not torch.equal(first.pairs, later.pairs)
    assert first.pair_dimension.bincount().tolist() == [20, 10]  # aesthetics has one pair
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        RandomPairs(0)


@pytest.mark.parametrize("policy", [AllPairs(), AllPairs(ties=False), RandomPairs(3, AllPairs(ties=False))])
def test_the_preferred_image_stands_on_either_side(policy):
    """Files put it first (HPDv3 does): a judge that always says "the first" must be right half of the time."""
    by_score = [make(f"s{i}", 5, scores={"realism": scores(a=(4,), b=(3,), c=(2,), d=(1,), e=(1,))}) for i in range(150)]
    choices = [("a", "b", 1.0), ("a", "c", 0.9), ("b", "c", 0.7), ("d", "e", 0.6)]
    by_choice = [make(f"c{i}", 5, preferences={"realism": choices}) for i in range(300)]
    for records in (by_score, by_choice):
        share = collate(records, SCALE, pairs=policy).preference
        decided = share[share != 0.5]
        assert len(decided) >= 450
        assert abs((decided > 0.5).double().mean().item() - 0.5) < 4 * 0.5 / len(decided) ** 0.5


def test_ties_in_or_out():
    given = {0: 3.0, 1: 3.0, 2: 1.0}
    choices = [(0, 2, 0.5)]
    assert AllPairs(ties=False)(given, choices, random.Random(0)) == [(1, 2, 1.0)]
    assert AllPairs()(given, choices, random.Random(0)) == [(0, 1, 0.5), (1, 2, 1.0), (0, 2, 0.5)]
    assert AllPairs(minimum_gap=1.0)(given, choices, random.Random(0)) == [(1, 2, 1.0), (0, 2, 0.5)]  # a tie has no gap
    assert AllPairs(minimum_gap=3.0)(given, choices, random.Random(0)) == choices
    assert len(RandomPairs(9, AllPairs(ties=True))(given, choices, random.Random(0))) == 3


def test_pairs_of_choices_alone():
    given = {"realism": scores(a=(4,), b=(1,), c=(1,))}
    preferences = {"realism": [("b", "a", 0.9), ("a", "d", 0.5)]}
    batch = collate([make("p0", 4, scores=given, preferences=preferences)], SCALE, pairs=ChosenPairs())
    assert sorted(map(sorted, batch.pairs.tolist())) == [[0, 1], [0, 3]]
    assert batch.chosen.all()
    both = Batch.join([batch, collate([make("p1", 4, scores=given, preferences=preferences)], SCALE, pairs=AllPairs())])
    found = {frozenset(pair): chosen for pair, chosen in zip(both.pairs.tolist(), both.chosen.tolist(), strict=True)}
    assert {tuple(sorted(pair)) for pair, chosen in found.items() if chosen} == {(0, 1), (0, 3), (4, 5), (4, 7)}
    assert {tuple(sorted(pair)) for pair, chosen in found.items() if not chosen} == {(4, 6), (5, 6)}


def test_select_keeps_what_the_pairs_compare():
    batch = collate([FIRST, SECOND], SCALE, pairs=AllPairs(), labeller=None)
    both = [batch.pairs[i].tolist() for i in range(len(batch.pairs))]
    wanted = [len(both) - 1, 0, len(both) - 1]  # of the second prompt, of the first, and the same again
    part = batch.select(wanted)
    names = {batch.keys[image] for pair in wanted for image in both[pair]}
    assert part.keys == [key for key in batch.keys if key in names]
    assert [[part.keys[i] for i in pair] for pair in part.pairs.tolist()] == [[batch.keys[i] for i in both[p]] for p in wanted]
    for name in ("preference", "pair_dimension", "chosen"):
        assert getattr(part, name).tolist() == [getattr(batch, name)[p].item() for p in wanted]
    for here, key in enumerate(part.keys):
        there = batch.keys.index(key)
        assert torch.equal(part.images[here], batch.images[there])
        assert (part.prompts[here], part.texts[here]) == (batch.prompts[there], batch.texts[there])
        assert torch.equal(part.votes[here], batch.votes[there])
        assert torch.equal(part.scores[here].nan_to_num(), batch.scores[there].nan_to_num())
        assert torch.equal(part.known[here], batch.known[there])
    assert batch.select([wanted[0]]).prompt_index.tolist() == [0, 0]  # numbered anew, so that join fits
    with pytest.raises(ValueError, match="at least one pair"):
        batch.select([])
