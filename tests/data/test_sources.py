"""The public data sets: small files of the published form give the right records; nothing bad and no position gets through."""

import gc
import io
import json
import random
import tracemalloc
from collections import Counter
from functools import partial
from itertools import combinations

import numpy as np
import published
import pytest
import torch
from published import compared, rated

import zr
from zr.data import AllPairs, ChosenPairs, HPDv3, ImageRewardDB, KonIQ, ScoreData, aggregate, read_shards, write_shards
from zr.data.record import NAME
from zr.data.sources import reading
from zr.losses import BradleyTerryLoss, SoftLabelCrossEntropy
from zr.models import OrdinalHead, compose, tiny_clip
from zr.stages import Supervised, Term
from zr.stages.terms import objective


def scores(record, dimension="quality", candidate="image"):
    return sorted(a.score for a in record.scores[dimension][candidate].values())


def scale(source):
    return zr.Rubric.load(source.rubric).scale


def train(folder, rubric, loss, steps, pairs=None, words=("a photo",)):
    """A tiny CLIP on shards, through the real loader; the losses."""
    torch.manual_seed(0)
    model = compose(tiny_clip(rubric, lambda: words, image_size=24), OrdinalHead)
    stage = Supervised(model, {"likeness": Term(loss)}, partial(torch.optim.AdamW, lr=3e-3))
    optimizer = stage.optimizer(stage.parameters())
    loader = ScoreData(folder, rubric, batch_size=8, pairs=pairs).train_dataloader()
    losses = []
    while len(losses) < steps:
        for batch in loader:
            value, _ = objective(dict(stage.terms.items()), stage(batch), batch)
            losses.append(value.item())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return model.eval(), losses


@pytest.mark.parametrize("source", [KonIQ, ImageRewardDB, HPDv3])
def test_rubrics(source):
    rubric = zr.Rubric.load(source.rubric)
    expected = {
        KonIQ: (("quality",), (1, 2, 3, 4, 5)),
        ImageRewardDB: (("alignment", "fidelity", "overall"), (1, 2, 3, 4, 5, 6, 7)),
        HPDv3: (("preference",), (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)),
    }
    assert (rubric.scale.dimensions, rubric.scale.bins) == expected[source]
    assert rubric.wording.labels == tuple("ABCDEFGHI"[: len(rubric.scale.bins)])
    assert set(rubric.wording.instructions) == set(rubric.scale.dimensions)


# KonIQ-10k


def test_koniq_votes_are_those_behind_the_published_shares(tmp_path):
    source = KonIQ(published.koniq(tmp_path))
    records = {record.key: record for split in ("train", "validation", "test") for record in source.records(split)}
    counts = {key: Counter(scores(record)) for key, record in records.items()}
    assert counts["10004473376"] == {3: 25, 4: 73, 5: 7}  # 25 / 105 = .238095, 73 / 105 = .695238, 7 / 105 = .066667
    assert counts["10007903636"] == {1: 1, 3: 20, 4: 73, 5: 2}
    for line in published.KONIQ.splitlines()[1:]:
        name, *_, total, _, deviation, _ = line.split(",")
        votes = scores(records[name.removesuffix(".jpg")])
        assert len(votes) == int(total)
        assert np.std(votes, ddof=1) == pytest.approx(float(deviation), abs=1e-9)  # the authors' own column SD
    assert len(source.records("train")) == 4
    assert [record.key for record in source.records("test")] == ["10007357496"]
    assert [record.key for record in source.records("validation")] == ["10043785683"]
    for record in records.values():
        assert record.prompt == "a photo"
        assert record.candidates[0].image == (tmp_path / "512x384" / f"{record.key}.jpg").read_bytes()
        record.validate(scale(KonIQ))


def test_koniq_counts_are_read_like_shares(tmp_path):
    head = "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,MOS_zscore,set\n"
    rows = ["a.jpg,0,0,25,73,7,105,3.8286,0.5273,77.38,training", "b.jpg,0,0,0,1,0,1,4.0,0.0,70.0,training"]
    source = KonIQ(published.koniq(tmp_path, head + "\n".join(rows)), prompt="an image")
    first, second = source.records("train")
    assert Counter(scores(first)) == {3: 25, 4: 73, 5: 7}
    assert scores(second) == [4]
    assert first.prompt == "an image"


def test_koniq_names_of_annotators_say_nothing(tmp_path):
    rows = "".join(f"i{n}.jpg,0.25,0.25,0.0,0.25,0.25,8,50,1.7,training\n" for n in range(40))
    source = KonIQ(published.koniq(tmp_path, published.KONIQ.splitlines()[0] + "\n" + rows))
    given = [record.scores["quality"]["image"] for record in source.records("train")]
    for name in given[0]:
        assert {by[name].score for by in given} == {1.0, 2.0, 4.0, 5.0}  # the first name is not always the lowest vote
    assert given == [record.scores["quality"]["image"] for record in source.records("train")]


def test_koniq_trimming_hardly_moves_the_mean(tmp_path):
    for record in KonIQ(published.koniq(tmp_path)).records("train"):
        votes = scores(record)
        assert abs(aggregate(votes, (1, 2, 3, 4, 5)).score - np.mean(votes)) < 0.04


def test_koniq_prefers_the_larger_images(tmp_path):
    published.koniq(tmp_path)
    published.koniq(tmp_path, size="koniq10k_1024x768/1024x768")
    record = next(iter(KonIQ(tmp_path).records("train")))
    assert KonIQ(tmp_path).records("train").skipped == []
    assert record.candidates[0].image == (tmp_path / "koniq10k_1024x768/1024x768/10004473376.jpg").read_bytes()


def test_koniq_trains_on_its_votes(tmp_path):
    write_shards(KonIQ(published.koniq(tmp_path)).records("train"), tmp_path / "out", scale(KonIQ), per_shard=2)
    rubric = zr.Rubric.load("zr:koniq")
    batch = next(iter(ScoreData(tmp_path / "out", rubric, batch_size=4).train_dataloader()))
    assert sorted(batch.votes.sum(-1).flatten().tolist()) == [96, 100, 105, 109]
    losses = train(tmp_path / "out", rubric, SoftLabelCrossEntropy(), 12)[1]
    assert losses[-1] < losses[0]


# ImageRewardDB

RANKED = [
    rated("000864-0061", "d4", 1, 6, alignment=7, fidelity=5),
    rated("000864-0061", "a1", 2, 6),  # rated like d4, ranked below it
    rated("000864-0061", "c3", 3, 4),
    rated("000864-0061", "b2", 3, 2),  # ranked like c3, rated below it
    rated("001324/93 b", "e5", 1, 3, prompt="a forest", part=2),
    rated("001324/93 b", "f6", 2, 5, prompt="a forest", part=2),  # rated above e5, ranked below it
]


@pytest.mark.parametrize("parquet", [False, True])
def test_imagereward_ratings_and_ranking(tmp_path, parquet):
    published.imagereward(tmp_path, RANKED, parquet)
    first, second = ImageRewardDB(tmp_path).records("train")
    assert (first.key, first.prompt) == ("000864-0061", "a holy woman, 8 k ")
    assert NAME.fullmatch(second.key)
    assert [c.id for c in first.candidates] == ["a1", "b2", "c3", "d4"]  # not in the order of the ranks
    for row in RANKED:
        record = first if row["prompt_id"] == first.key else second
        name = row["image_path"].split("/")[-1].removesuffix(".webp")
        image = next(c.image for c in record.candidates if c.id == name)
        assert image == (tmp_path / row["image_path"]).read_bytes()
        for dimension, key in (
            ("alignment", "image_text_alignment_rating"),
            ("fidelity", "fidelity_rating"),
            ("overall", "overall_rating"),
        ):
            assert scores(record, dimension, name) == [row[key]]
    shares = {("a1", "b2"): 1, ("a1", "c3"): 1, ("a1", "d4"): 0, ("b2", "c3"): 0.5, ("b2", "d4"): 0, ("c3", "d4"): 0}
    assert first.preferences == {"overall": [(a, b, share) for (a, b), share in shares.items()]}
    assert second.preferences == {"overall": [("e5", "f6", 1.0)]}


@pytest.mark.parametrize("policy", [ChosenPairs(), AllPairs()])
def test_imagereward_pairs_are_those_that_the_authors_publish(tmp_path, policy):
    """Their loader pairs all images of unequal rank, the one of the lower rank is the better."""
    rng = random.Random(0)
    rows = [
        rated(f"p{p}", f"x{p}-{i}", rng.randint(1, 4), rng.randint(1, 7), prompt=f"prompt {p}")
        for p in range(5)
        for i in rng.sample(range(100), 6)
    ]
    expected = set()
    for one, other in combinations(rows, 2):
        if one["prompt_id"] == other["prompt_id"] and one["rank"] != other["rank"]:
            better, worse = sorted((one, other), key=lambda row: row["rank"])
            expected.add(tuple(f"{r['prompt_id']}.{r['image_path'].split('/')[-1][:-5]}" for r in (better, worse)))
    write_shards(ImageRewardDB(published.imagereward(tmp_path, rows)).records("train"), tmp_path / "out", scale(ImageRewardDB))
    rubric = zr.Rubric.load("zr:imagereward")
    (batch,) = ScoreData(tmp_path / "out", rubric, batch_size=5, pairs=policy).train_dataloader()
    found, ties = set(), 0
    overall = rubric.scale.dimensions.index("overall")
    for (a, b), dimension, share in zip(batch.pairs.tolist(), batch.pair_dimension, batch.preference.tolist(), strict=True):
        if dimension == overall:
            assert share in (0.0, 0.5, 1.0)
            ties += share == 0.5
            if share != 0.5:
                found.add((batch.keys[a], batch.keys[b]) if share else (batch.keys[b], batch.keys[a]))
    assert found == expected
    assert ties == 5 * 15 - len(expected) > 0


def test_imagereward_reads_what_was_downloaded(tmp_path):
    published.imagereward(tmp_path, RANKED, parquet=True)
    published.imagereward(tmp_path, RANKED[4:])  # the JSON file of the second part alone
    assert [record.prompt for record in ImageRewardDB(tmp_path).records("train")] == ["a forest"]
    published.imagereward(tmp_path, [rated("v", "g7", 1, 1, split="validation")])
    assert [record.key for record in ImageRewardDB(tmp_path).records("validation")] == ["v"]


def test_imagereward_trains(tmp_path):
    write_shards(
        ImageRewardDB(published.imagereward(tmp_path, RANKED)).records("train"), tmp_path / "out", scale(ImageRewardDB)
    )
    losses = train(
        tmp_path / "out", zr.Rubric.load("zr:imagereward"), SoftLabelCrossEntropy(), 10, words=("a holy woman, 8 k forest",)
    )[1]
    assert losses[-1] < losses[0]


# HPDv3


def winners(home, record, rows):
    """What a record says about published rows, by the images' bytes: (path1, path2) -> share that prefers path1."""
    images = {c.id: c.image for c in record.candidates}
    said = {(images[a], images[b]): share for a, b, share in record.preferences["preference"]}
    said |= {(b, a): 1 - share for (a, b), share in said.items()}
    pairs = [(row["path1"], row["path2"]) for row in rows]
    found = {pair: said.get(tuple((home / path).read_bytes() for path in pair)) for pair in pairs}
    assert len(said) == 2 * len(record.preferences["preference"])
    return {pair: share for pair, share in found.items() if share is not None}


def test_hpdv3_one_record_for_a_prompt_one_candidate_for_an_image(tmp_path):
    rows = [
        compared("a fox", "images/hqi/1.jpg", "images/mj/1.jpg", (12, 7)),
        compared("two owls", "images/x.jpg", "images/y.jpg", (3, 9)),  # the order of the counts is not relied upon
        compared("a fox", "images/mj/1.jpg", "images/0 0.jpg", (5, 5)),
    ]
    first, second = HPDv3(published.hpdv3(tmp_path, rows)).records("train")
    assert (first.prompt, second.prompt) == ("a fox", "two owls")
    assert [c.id.split("-")[0] for c in first.candidates] == ["00", "1", "1"]  # not in the order of the rows
    shares = {(rows[0]["path1"], rows[0]["path2"]): 12 / 19, (rows[2]["path1"], rows[2]["path2"]): 0.5}
    assert winners(tmp_path, first, rows) == pytest.approx(shares)
    assert winners(tmp_path, second, rows) == {("images/x.jpg", "images/y.jpg"): 0.75}
    for record in (first, second):
        record.validate(scale(HPDv3))
        assert record.scores == {}


def test_hpdv3_rows_without_votes_need_a_share(tmp_path):
    bare = compared("a fox", "images/b.jpg", "images/a.jpg", None, None)
    older = {name: value for name, value in bare.items() if name not in ("choice_dist", "confidence")} | {"prompt": "an owl"}
    published.hpdv3(tmp_path, [bare, older], split="test")
    with pytest.raises(ValueError, match=r"test\.json, row 1: column choice_dist.*share_without_votes"):
        HPDv3(tmp_path).records("test")
    for share in (1.0, 0.75):
        for record in HPDv3(tmp_path, share_without_votes=share).records("test"):
            assert winners(tmp_path, record, [bare]) == {("images/b.jpg", "images/a.jpg"): share}
    for share in (0.5, 1.1, float("nan"), 0.0):
        with pytest.raises(ValueError, match=r"share_without_votes must be above 0\.5"):
            HPDv3(tmp_path, share_without_votes=share)


@pytest.fixture(scope="module")
def bright(tmp_path_factory):
    """HPDv3 in which people prefer the brighter image: 160 prompts for training, 40 for testing."""
    home = tmp_path_factory.mktemp("hpdv3")
    rng = random.Random(1)
    for split, count in (("train", 160), ("test", 40)):
        rows, light = [], {}
        for n in range(count):
            one, other = (f"images/{rng.getrandbits(64):016x}.png" for _ in range(2))
            light |= {one: rng.randint(140, 240), other: rng.randint(10, 110)}
            rows.append(compared("a photo " * rng.randint(1, 4) + str(n), one, other, (12, 7)))
        published.hpdv3(home, rows, split, light)
        write_shards(HPDv3(home).records(split), home / "out", scale(HPDv3), split=split, per_shard=16)
    return home


def test_hpdv3_says_nothing_by_position(bright):
    """In every published row the first image is preferred; a judge that says so must be right by chance only."""
    rows = json.loads((bright / "train.json").read_text())
    brightness = lambda c: np.asarray(published.Image.open(io.BytesIO(c.image))).mean()  # noqa: E731
    assert all(
        np.asarray(published.Image.open(bright / row["path1"])).mean()
        > np.asarray(published.Image.open(bright / row["path2"])).mean()
        for row in rows
    )
    records = list(HPDv3(bright).records("train"))
    within = 4 * 0.5 / len(records) ** 0.5  # four standard errors of a fair coin
    first_candidate = [brightness(r.candidates[0]) > brightness(r.candidates[1]) for r in records]
    first_of_the_pair = [r.preferences["preference"][0][2] > 0.5 for r in records]
    assert abs(np.mean(first_candidate) - 0.5) < within
    assert abs(np.mean(first_of_the_pair) - 0.5) < within
    for epoch in range(2):
        loader = ScoreData(bright / "out", zr.Rubric.load("zr:hpdv3"), pairs=AllPairs(), seed=epoch).train_dataloader()
        shares, lights = [], []
        for batch in loader:
            shares.append(batch.preference)
            lights += [batch.images[a].float().mean() > batch.images[b].float().mean() for a, b in batch.pairs.tolist()]
        share = torch.cat(shares)
        assert len(share) == len(rows)
        assert abs((share > 0.5).float().mean().item() - 0.5) < within  # accuracy of the judge "the first"
        assert torch.equal(share > 0.5, torch.tensor(lights))
        torch.testing.assert_close(torch.maximum(share, 1 - share), torch.full_like(share, 12 / 19))


def test_hpdv3_choices_alone_teach_a_clip(bright):
    rubric = zr.Rubric.load("zr:hpdv3")
    words = ("a photo", *map(str, range(160)))
    model, losses = train(bright / "out", rubric, BradleyTerryLoss(), 40, AllPairs(), words)
    assert np.mean(losses[-10:]) < np.mean(losses[:5])
    right = []
    for batch in ScoreData(bright / "out", rubric, batch_size=20).test_dataloader():
        with torch.no_grad():
            mean = model(batch.images, batch.prompts).mean[:, 0]
        gap = mean[batch.pairs[:, 0]] - mean[batch.pairs[:, 1]]
        right += ((gap > 0) == (batch.preference > 0.5)).tolist()
    assert len(right) == 40
    assert np.mean(right) > 0.9


def test_keys_and_ids_are_safe_unique_and_the_same_again(tmp_path):
    names = ["images/é é.jpg", "images/a/1.jpg", "images/b/1.jpg", f"images/{'long' * 40}.jpg", "images/-.jpg"]
    rows = [compared(f"prompt {name}", name, "images/other.jpg") for name in names]
    published.hpdv3(tmp_path, rows)
    source = HPDv3(tmp_path)
    records = list(source.records("train"))
    assert len({record.key for record in records}) == len(records) == 5
    ids = {c.id for record in records for c in record.candidates}
    assert len(ids) == 6
    assert all(NAME.fullmatch(name) for name in ids | {record.key for record in records})
    assert list(source.records("train")) == records


# Bad rows


def koniq_row(**changes):
    row = (
        dict(zip(published.KONIQ.splitlines()[0].split(","), published.KONIQ.splitlines()[3].split(","), strict=True)) | changes
    )
    return ",".join(row.values()) + "\n"


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


KONIQ_BAD = {
    "nan": (koniq_row(image_name="bad.jpg", c3="nan"), "columns c1 to c5 are no votes of c_total = 96"),
    "text": (koniq_row(image_name="bad.jpg", c3="many"), "column c3 must be a number, got 'many'"),
    "sum": (koniq_row(image_name="bad.jpg", c3="0.3"), "columns c1 to c5 are no votes"),
    "negative": (koniq_row(image_name="bad.jpg", c1="-0.0104166666667", c3="0.229166666667"), "columns c1 to c5 are no votes"),
    "nobody": (koniq_row(image_name="bad.jpg", c_total="0"), "column c_total must be a whole number of at least 1, got '0'"),
    "set": (koniq_row(image_name="bad.jpg", set="training2"), "column set must be one of training, validation, test"),
    "name": (koniq_row(image_name=""), "column image_name must be text"),
    "short": ("bad.jpg,0.5,0.5\n", "column set"),
    "twice": (koniq_row(image_name="10004473376.jpg"), "image 10004473376.jpg has a row already"),
    "outside": (koniq_row(image_name="../bad.jpg"), r"leads out of .*512x384: it was not read"),
}


@pytest.mark.parametrize("case", KONIQ_BAD)
def test_bad_rows_of_koniq(tmp_path, case):
    line, message = KONIQ_BAD[case]
    published.koniq(tmp_path)
    table = tmp_path / "koniq10k_distributions_sets.csv"
    table.write_text(published.KONIQ + line)
    with pytest.raises(ValueError, match=rf"distributions_sets\.csv, line 8: .*{message}.*on_error: skip"):
        list(KonIQ(tmp_path).records("train"))
    records = KonIQ(tmp_path).records("train", on_error="skip")
    assert len(list(records)) == 4
    assert len(records.skipped) == 1
    assert "10004473376" in [record.key for record in records]
    assert len(records.skipped) == 1  # of the last pass, not of both


IMAGEREWARD_BAD = {
    "column": (without(rated("q", "bad", 1, 3), "fidelity_rating"), "column fidelity_rating is missing .*overall_rating"),
    "nan": (rated("q", "bad", 1, float("nan")), "column overall_rating must be a whole number from 1 to 7, got nan"),
    "null": (rated("q", "bad", 1, None), "column overall_rating must be a whole number from 1 to 7, got None"),
    "high": (rated("q", "bad", 1, 8), "column overall_rating must be a whole number from 1 to 7, got 8"),
    "half": (rated("q", "bad", 1, 4.5), "column overall_rating must be a whole number"),
    "bool": (rated("q", "bad", True, 4), "column rank must be a whole number of at least 1, got True"),
    "rank": (rated("q", "bad", 0, 4), "column rank must be a whole number of at least 1, got 0"),
    "prompt": (rated("q", "bad", 1, 4, prompt=" "), "column prompt must be text that is not empty"),
    "other prompt": (rated("000864-0061", "bad", 1, 4, prompt="a cat"), "column prompt is not that of earlier rows"),
    "twice": (rated("000864-0061", "a1", 1, 4), "column image_path: .*a1.webp has a row already"),
    "no row": (7, "must be an object with columns, got int"),
    "outside": (rated("q", "../../../../bad", 1, 4), "leads out of"),
}


@pytest.mark.parametrize("case", IMAGEREWARD_BAD)
def test_bad_rows_of_imagereward(tmp_path, case):
    row, message = IMAGEREWARD_BAD[case]
    published.imagereward(tmp_path, RANKED)
    part = tmp_path / "images/train/train_1/train_1.json"
    part.write_text(json.dumps([*RANKED[:4], row]))
    with pytest.raises(ValueError, match=rf"train_1\.json, row 5: .*{message}.*on_error: skip"):
        list(ImageRewardDB(tmp_path).records("train"))
    records = ImageRewardDB(tmp_path).records("train", on_error="skip")
    assert [len(record.candidates) for record in records] == [4, 2]
    assert len(records.skipped) == 1
    assert "train_1.json, row 5: " in records.skipped[0]


HPDV3_BAD = {
    "zero": (compared("p", "images/a.jpg", "images/b.jpg", (0, 0)), r"two counts of votes, not both 0, got \[0, 0\]"),
    "three": (compared("p", "images/a.jpg", "images/b.jpg", (1, 2, 3)), "must be two counts of votes"),
    "negative": (compared("p", "images/a.jpg", "images/b.jpg", (3, -1)), "must be two counts of votes"),
    "nan": (compared("p", "images/a.jpg", "images/b.jpg", (float("nan"), 1)), "must be two counts of votes"),
    "text": (compared("p", "images/a.jpg", "images/b.jpg", choice_dist="[8, 1]"), "must be two counts of votes"),
    "null": (compared("p", "images/a.jpg", "images/b.jpg", None), "column choice_dist is missing or null"),
    "column": (without(compared("p", "images/a.jpg", "images/b.jpg"), "path2"), "column path2 is missing"),
    "same": (compared("p", "images/a.jpg", "images/a.jpg"), "path1 and path2 are the same image"),
    "prompt": (compared("", "images/a.jpg", "images/b.jpg"), "column prompt must be text"),
    "surrogate": (compared("\ud800", "images/a.jpg", "images/b.jpg"), "column prompt holds half a character"),
    "twice": (compared("a fox", "images/a.jpg", "images/b.jpg"), "compared already in row 1"),
    "turned": (compared("a fox", "images/b.jpg", "images/a.jpg"), "compared already in row 1"),
    "no row": ([1], "must be an object with columns, got list"),
    "outside": (compared("p", "/etc/hostname", "images/b.jpg"), "'/etc/hostname' leads out of"),
}


@pytest.mark.parametrize("case", HPDV3_BAD)
def test_bad_rows_of_hpdv3(tmp_path, case):
    row, message = HPDV3_BAD[case]
    good = compared("a fox", "images/a.jpg", "images/b.jpg")
    published.hpdv3(tmp_path, [good])
    (tmp_path / "train.json").write_text(json.dumps([good, row]))
    with pytest.raises(ValueError, match=rf"train\.json, row 2: .*{message}.*on_error: skip"):
        list(HPDv3(tmp_path).records("train"))
    records = HPDv3(tmp_path).records("train", on_error="skip")
    (record,) = records
    assert len(record.candidates) == 2
    assert [entry.split(": ")[0].rsplit("/")[-1] for entry in records.skipped] == ["train.json, row 2"]


@pytest.mark.parametrize("damage", ["gone", "empty", "text", "cut"])
def test_bad_images_are_left_out_with_their_rows(tmp_path, damage):
    """ImageRewardDB is published with some empty files; the other images of their prompts stay."""

    def spoil(path):
        data = path.read_bytes()
        path.unlink()
        if damage != "gone":
            path.write_bytes({"empty": b"", "text": b"<html>not found</html>", "cut": data[: len(data) // 2]}[damage])

    error = FileNotFoundError if damage == "gone" else ValueError
    published.imagereward(tmp_path / "i", RANKED)
    spoil(tmp_path / "i/images/train/train_1/a1.webp")
    spoil(tmp_path / "i/images/train/train_2/e5.webp")
    spoil(tmp_path / "i/images/train/train_2/f6.webp")
    records = ImageRewardDB(tmp_path / "i").records("train", on_error="skip")
    (record,) = records
    assert [c.id for c in record.candidates] == ["b2", "c3", "d4"]
    assert set(record.scores["fidelity"]) == {"b2", "c3", "d4"}
    assert all("a1" not in choice for choice in record.preferences["overall"])
    assert len(records.skipped) == 3
    assert "train_1.json, row 2" in records.skipped[0]
    record.validate(scale(ImageRewardDB))
    with pytest.raises(error, match=r"a1"):
        write_shards(ImageRewardDB(tmp_path / "i").records("train"), tmp_path / "out", scale(ImageRewardDB))

    rows = [compared("a fox", "images/a.jpg", f"images/{name}.jpg") for name in "bc"] + [
        compared("p", "images/c.jpg", "images/d.jpg")
    ]
    published.hpdv3(tmp_path / "h", rows)
    spoil(tmp_path / "h/images/c.jpg")
    records = HPDv3(tmp_path / "h").records("train", on_error="skip")
    (record,) = records
    assert len(record.candidates) == 2
    assert len(record.preferences["preference"]) == 1
    assert [entry.split(": ")[0][-5:] for entry in records.skipped] == ["row 2", "row 3"]
    record.validate(scale(HPDv3))

    published.koniq(tmp_path / "k")
    spoil(tmp_path / "k/512x384/10004473376.jpg")
    records = KonIQ(tmp_path / "k").records("train", on_error="skip")
    assert [record.key for record in records] == ["10007903636", "10009096245", "10058760545"]
    assert "line 2" in records.skipped[0]


def test_missing_parts_of_a_download(tmp_path):
    for source in (KonIQ(tmp_path), ImageRewardDB(tmp_path), HPDv3(tmp_path)):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            source.records("test")
        with pytest.raises(ValueError, match=r"has no split 'dev': it has train, (validation, )?test"):
            source.records("dev")
    published.koniq(tmp_path)
    with pytest.raises(ValueError, match="on_error must be one of stop, skip, got 'ignore'"):
        KonIQ(tmp_path).records("train", on_error="ignore")
    table = tmp_path / "koniq10k_distributions_sets.csv"
    table.write_text("\n".join(line.rsplit(",", 1)[0] for line in published.KONIQ.splitlines()))
    with pytest.raises(ValueError, match=r"has no column set: take the authors'.*no split is made up"):
        KonIQ(tmp_path).records("train")
    table.unlink()
    (tmp_path / "koniq10k_scores_and_distributions.csv").write_text("image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,MOS_zscore\n")
    with pytest.raises(FileNotFoundError, match=r"koniq10k_distributions_sets\.csv: it holds the votes and the split"):
        KonIQ(tmp_path).records("train")
    (tmp_path / "metadata-test.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no Parquet file"):
        ImageRewardDB(tmp_path).records("test")


def test_images_are_read_when_their_record_comes(tmp_path):
    records = KonIQ(published.koniq(tmp_path)).records("train")
    for path in (tmp_path / "512x384").iterdir():
        path.unlink()
    assert len(records) == 4
    with pytest.raises(FileNotFoundError, match=r"line 2: there is no image .*10004473376\.jpg"):
        next(iter(records))


def test_an_interrupted_import_goes_on(tmp_path):
    source = KonIQ(published.koniq(tmp_path))

    def interrupted():
        for number, record in enumerate(source.records("train")):
            if number == 3:
                raise KeyboardInterrupt
            yield record

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path / "cut", scale(KonIQ), per_shard=2)
    write_shards(source.records("train"), tmp_path / "cut", scale(KonIQ), per_shard=2)
    write_shards(source.records("train"), tmp_path / "whole", scale(KonIQ), per_shard=2)
    assert list(read_shards(tmp_path / "cut")) == list(source.records("train"))
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


# JSON lists


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("indent", [None, 4])
def test_json_lists_are_read_like_json_load(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    path = tmp_path / "list.json"
    for rows in ([], [{}], [{"a": [1, {"b": 'x, ]} \\ " é 汉 😀'}], "c": None}, {"d": -1.5e-3}] * 3, [[], [[1]], "]"]):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=chunk == 7), encoding="utf-8")
        assert list(reading.json_list(path)) == list(enumerate(json.loads(path.read_text(encoding="utf-8")), start=1))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "after row 0"),
        (b'{"a": 1}', "after row 0 .*no JSON list"),
        (b'[{"a": 1}, {"a": ', "after row 1"),
        (b'[{"a": 1}, {"a": 2}', "after row 2"),
        (b'[{"a": 1}, nothing]', "after row 1"),
        (b'[{"a": 1}, {"a": "\xff"}]', "after row"),
    ],
)
def test_damaged_json_lists(tmp_path, data, words):
    (tmp_path / "list.json").write_bytes(data)
    with pytest.raises(ValueError, match=rf"list\.json is damaged {words}.*download it again"):
        list(reading.json_list(tmp_path / "list.json"))


def test_json_lists_are_never_in_memory_as_a_whole(tmp_path):
    path = tmp_path / "list.json"
    row = json.dumps(compared("word " * 1000, "images/a.jpg", "images/b.jpg"))
    path.write_text("[" + ",\n".join([row] * 3_000) + "]")
    assert path.stat().st_size > 15e6
    gc.collect()
    tracemalloc.start()
    count = sum(1 for _ in reading.json_list(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3_000
    assert peak < 8e6


def test_a_damaged_row_does_not_read_the_rest_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 1 << 12)
    monkeypatch.setattr(reading, "CHUNK", 1 << 10)
    path = tmp_path / "list.json"
    path.write_text('[{"a": nothing}, ' + '{"a": 1}, ' * 10_000 + "{}]")
    with pytest.raises(ValueError, match="after row 0"):
        next(reading.json_list(path))
