"""Valid records drawn by Hypothesis: they pass, survive JSON and shards, and the order of their parts says nothing."""

import io
import json
import math
from dataclasses import replace
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zr.data import Annotation, Candidate, LabelledDistribution, Reasoning, Record, read_shards, write_shards
from zr.data.record import parse_json
from zr.rubric import Scale

SCALE = Scale(bins=tuple(1 + i / 2 for i in range(9)), anchors={"realism": {}, "aesthetics": {}})
Image.new("L", (1, 1)).save(file := io.BytesIO(), "PNG")
IMAGE = file.getvalue()
quick = settings(max_examples=80, deadline=None, derandomize=True)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
prompts = texts.filter(str.strip)


@st.composite
def annotations(draw):
    score = draw(st.sampled_from(SCALE.bins))
    if not draw(st.booleans()):
        return Annotation(score)
    coarse = draw(st.none() | st.sampled_from([c for c in (1.0, 2.0, 3.0, 4.0, 5.0) if abs(c - score) <= 0.5]))
    return Annotation(score, refined=True, coarse=coarse)


@st.composite
def probabilities(draw):
    weights = draw(st.lists(st.integers(0, 1000), min_size=9, max_size=9).filter(any))
    return tuple(weight / sum(weights) for weight in weights)


@st.composite
def distributions(draw):
    off_scale = draw(st.none() | st.floats(0, 1))
    if draw(st.booleans()):
        return LabelledDistribution(draw(probabilities()), tuple(draw(st.lists(texts, max_size=2))), SCALE.scale_id, off_scale)
    count = draw(st.integers(1, 3))

    def none_or_all(each):
        return tuple(draw(st.just([]) | st.lists(each, min_size=count, max_size=count)))

    reasoning = Reasoning(
        traces=count,
        forced=draw(st.integers(0, count)),
        tokens=draw(st.integers(0, 10**6)),
        spread=draw(st.floats(0, math.log(count))),
        probs=none_or_all(probabilities()),
        ids=none_or_all(st.lists(st.integers(0, 250_000), max_size=3).map(tuple)),
    )
    return LabelledDistribution(draw(probabilities()), none_or_all(texts), SCALE.scale_id, off_scale, reasoning)


def by_dimension(parts):
    return st.dictionaries(st.sampled_from(SCALE.dimensions), parts, max_size=2)


@st.composite
def records(draw):
    ids = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    pairs = st.lists(st.sampled_from(list(combinations(ids, 2))), unique=True) if len(ids) > 1 else st.just([])
    shares = st.floats(0, 1)
    each = st.sampled_from(ids)
    return Record(
        key=draw(names),
        prompt=draw(prompts),
        candidates=tuple(Candidate(name, IMAGE) for name in ids),
        scores=draw(by_dimension(st.dictionaries(each, st.dictionaries(texts, annotations(), max_size=3)))),
        preferences={d: [(a, b, draw(shares)) for a, b in chosen] for d, chosen in draw(by_dimension(pairs)).items()},
        distributions=draw(by_dimension(st.dictionaries(each, st.dictionaries(texts, distributions(), max_size=2)))),
        texts=draw(by_dimension(st.dictionaries(each, texts))),
    )


def turned(data):
    """The same plain data, each mapping in the reverse order."""
    if isinstance(data, dict):
        return {name: turned(value) for name, value in reversed(data.items())}
    return [turned(value) for value in data] if isinstance(data, list) else data


@quick
@given(records())
def test_valid_records_pass_and_survive_json_in_any_order(record):
    record.validate(SCALE)
    images = {candidate.id: candidate.image for candidate in record.candidates}
    text = json.dumps(record.to_dict(), allow_nan=False)
    assert Record.from_dict(parse_json(text), images) == record
    other = json.dumps(turned(record.to_dict()), ensure_ascii=False)
    assert Record.from_dict(parse_json(other.encode()), dict(reversed(images.items()))) == record


@settings(quick, max_examples=25)
@given(st.lists(records(), min_size=1, max_size=4, unique_by=lambda record: record.key), st.integers(1, 3))
def test_valid_records_survive_shards_in_any_order(tmp_path_factory, given_records, per_shard):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(given_records, folder / "a", SCALE, per_shard=per_shard)
    assert list(read_shards(folder / "a", scale=SCALE)) == given_records
    images = [{c.id: c.image for c in record.candidates} for record in given_records]
    other = [Record.from_dict(turned(r.to_dict()), i) for r, i in zip(given_records, images, strict=True)]
    write_shards(other, folder / "b", SCALE, per_shard=per_shard)
    for path in (folder / "a").iterdir():
        assert path.read_bytes() == (folder / "b" / path.name).read_bytes()


@quick
@given(records(), st.sampled_from(["scores", "distributions", "texts", "preferences"]), st.data())
def test_a_wrong_part_is_refused_and_named(record, part, data):
    candidate = record.candidates[0].id
    wrong = {
        "scores": {candidate: {"ann": Annotation(data.draw(st.floats().filter(lambda s: s not in SCALE.bins)))}},
        "distributions": {
            candidate: {"t": LabelledDistribution((data.draw(st.floats(1.1, 1e9)),) + (0.0,) * 8, (), SCALE.scale_id)}
        },
        "texts": {"nobody-here-" + candidate[:50]: "x"},
        "preferences": [(candidate, candidate, 0.5)],
    }
    bad = replace(record, **{part: {"realism": wrong[part]}})
    try:
        bad.validate(SCALE)
    except ValueError as error:
        message = str(error)
    else:
        assert part == "scores"  # within the rounding of float32 a score is its bin
        score = bad.scores["realism"][candidate]["ann"].score
        message = f"{record.key} scores.realism" if min(abs(score - b) for b in SCALE.bins) <= 1e-4 else ""
    assert record.key in message
    assert f"{part}.realism" in message
