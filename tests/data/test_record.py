"""Records: what is accepted, what is refused and how the message says it."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from zr.data import Annotation, Candidate, LabelledDistribution, Record
from zr.data.record import decode, image_type
from zr.rubric import Scale

SCALE = Scale(bins=(1.0, 2.0, 3.5), anchors={"realism": {}, "aesthetics": {}})


def picture(kind="PNG", size=(7, 5), seed=0, mode="RGB", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def record(**changes):
    given = {
        "key": "p-1",
        "prompt": "two red cubes",
        "candidates": (Candidate("a", picture()), Candidate("b_2", picture("JPEG"))),
        "scores": {"realism": {"a": {"anna": Annotation(2.0), "bob": Annotation(3.5, refined=True)}}},
        "preferences": {"aesthetics": [("a", "b_2", 0.75)]},
        "distributions": {"realism": {"a": {"t": LabelledDistribution((0.2, 0.3, 0.5), ("why",), SCALE.scale_id)}}},
        "texts": {"realism": {"b_2": "no shadow"}},
    }
    return Record(**{**given, **changes})


def test_valid_records_pass_with_all_annotation_and_with_none():
    record().validate(SCALE)
    record(scores={}, preferences={}, distributions={}, texts={}).validate(SCALE)


def test_json_round_trip_and_its_form():
    data = record().to_dict()
    assert data["candidates"] == [{"id": "a"}, {"id": "b_2"}]
    assert data["scores"] == {"realism": {"a": {"anna": 2.0, "bob": {"score": 3.5, "refined": True}}}}
    assert data["preferences"] == {"aesthetics": [["a", "b_2", 0.75]]}
    assert Record.from_dict(data, {c.id: c.image for c in record().candidates}) == record()
    assert set(record(scores={}, preferences={}, distributions={}, texts={}).to_dict()) == {"key", "prompt", "candidates"}


def test_both_rounds_are_kept():
    given = {"anna": Annotation(3.5, refined=True, coarse=4.0), "bob": Annotation(4.0, refined=True, coarse=4.0)}
    both = record(scores={"realism": {"a": given}}, distributions={})
    both.validate(replace(SCALE, bins=(1.0, 2.0, 3.5, 4.0)))
    assert both.to_dict()["scores"]["realism"]["a"]["anna"] == {"score": 3.5, "refined": True, "coarse": 4.0}
    assert Record.from_dict(both.to_dict(), {c.id: c.image for c in both.candidates}) == both


def one_score(annotation):
    return {"scores": {"realism": {"a": {"anna": annotation}}}}


def one_distribution(*probs, scale_id=SCALE.scale_id):
    return {"realism": {"a": {"t": LabelledDistribution(probs, (), scale_id)}}}


BAD = {
    "far": (
        one_score(Annotation(3.5, True, 2.0)),
        ["'a'", "scores.realism.anna", "1.5 from its coarse score 2", "0.5 at most"],
    ),
    "half": (one_score(Annotation(2.0, True, 2.5)), ["scores.realism.anna", "coarse score 2.5 is no integer"]),
    "off": (one_score(Annotation(3.5, True, 4.0)), ["scores.realism.anna", "off the scale 1 to 3.5"]),
    "one round": (one_score(Annotation(2.0, False, 2.0)), ["scores.realism.anna", "beside a refined one only"]),
    "key": ({"key": "p.1"}, ["'p.1'", "safe file name"]),
    "key with folder": ({"key": "../p"}, ["'../p'", "safe file name"]),
    "prompt": ({"prompt": "  "}, ["'p-1'", "prompt is empty"]),
    "no candidates": ({"candidates": ()}, ["'p-1'", "candidates is empty", "at least one image"]),
    "repeated": ({"candidates": (Candidate("a", picture()),) * 2}, ["'p-1'", "'a' is repeated"]),
    "id": ({"candidates": (Candidate("_a", picture()),)}, ["'_a'", "safe file name"]),
    "unknown dimension": ({"scores": {"charm": {}}}, ["'p-1'", "scores", "'charm'", "realism, aesthetics", "correct"]),
    "unknown candidate": ({"texts": {"realism": {"c": "x"}}}, ["'p-1'", "texts.realism", "'c'", "a, b_2"]),
    "off scale": (
        {"scores": {"realism": {"a": {"anna": Annotation(9.0)}}}},
        ["'p-1'", "'a'", "scores.realism.anna", "off the scale 1 to 3.5"],
    ),
    "no bin": ({"scores": {"realism": {"a": {"anna": Annotation(2.5)}}}}, ["'p-1'", "'a'", "2 and 3.5", "correct it"]),
    "nan": ({"scores": {"realism": {"a": {"anna": Annotation(float("nan"))}}}}, ["'p-1'", "'a'", "NaN", "leave"]),
    "infinite": ({"scores": {"realism": {"a": {"anna": Annotation(float("inf"))}}}}, ["'p-1'", "off the scale"]),
    "share": ({"preferences": {"realism": [("a", "b_2", 1.5)]}}, ["'p-1'", "preferences.realism", "[0, 1]", "1.5"]),
    "share nan": ({"preferences": {"realism": [("a", "b_2", float("nan"))]}}, ["'p-1'", "[0, 1]", "nan"]),
    "itself": ({"preferences": {"realism": [("a", "a", 1.0)]}}, ["'p-1'", "itself"]),
    "twice": ({"preferences": {"realism": [("a", "b_2", 1.0), ("b_2", "a", 1.0)]}}, ["'p-1'", "twice"]),
    "choice of nobody": ({"preferences": {"realism": [("a", "c", 1.0)]}}, ["'p-1'", "unknown candidate 'c'"]),
    "other scale": (
        {"distributions": one_distribution(0.5, 0.5, 0.0, scale_id="abc")},
        ["'p-1'", "'a'", "'abc'", SCALE.scale_id],
    ),
    "probabilities": ({"distributions": one_distribution(0.5, 0.5)}, ["'p-1'", "2 probabilities for 3 bins"]),
    "sum": ({"distributions": one_distribution(0.5, 0.5, 0.5)}, ["'p-1'", "sum to one", "1.5"]),
    "negative": ({"distributions": one_distribution(1.5, -0.5, 0.0)}, ["'p-1'", "non-negative"]),
    "nan probability": ({"distributions": one_distribution(float("nan"), 0.5, 0.5)}, ["'p-1'", "sum to one"]),
    "truncated": (
        {"candidates": (Candidate("a", picture("JPEG", (64, 64))[:-400]),)},
        ["'p-1'", "'a'", "truncated", "replace"],
    ),
    "no image": ({"candidates": (Candidate("a", b"GIF89a..."),)}, ["'p-1'", "'a'", "PNG, JPEG or WebP"]),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_error_names_record_field_and_remedy(case):
    changes, words = BAD[case]
    bare = {} if "candidates" not in changes else {"scores": {}, "preferences": {}, "distributions": {}, "texts": {}}
    with pytest.raises(ValueError, match=r"\w") as error:
        record(**{**bare, **changes}).validate(SCALE)
    for word in words:
        assert word in str(error.value)


BAD_JSON = {
    "missing": ({"prompt": ...}, ["'p-1'", "missing field prompt"]),
    "unknown": ({"score": {}}, ["'p-1'", "unknown field score"]),
    "text for a number": ({"scores": {"realism": {"a": {"anna": "4"}}}}, ["'p-1'", "scores.realism.a.anna", "number", "'4'"]),
    "null": ({"scores": {"realism": {"a": {"anna": None}}}}, ["'p-1'", "scores.realism.a.anna", "number"]),
    "boolean": ({"scores": {"realism": {"a": {"anna": True}}}}, ["'p-1'", "number"]),
    "shape": ({"scores": {"realism": [4.0]}}, ["'p-1'", "scores.realism must be a mapping, got list"]),
    "choice": ({"preferences": {"realism": [["a", "b_2"]]}}, ["'p-1'", "preferences.realism[0]", "[a, b, share"]),
    "candidates": ({"candidates": "a"}, ["'p-1'", "candidates must be a list"]),
    "image": ({"candidates": [{"id": "z"}]}, ["'p-1'", "'z'", "image is missing"]),
    "text": ({"texts": {"realism": {"a": 3}}}, ["'p-1'", "texts.realism.a must be str"]),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_form(case):
    changes, words = BAD_JSON[case]
    data = {name: value for name, value in {**record().to_dict(), **changes}.items() if value is not ...}
    with pytest.raises(ValueError, match=r"\w") as error:
        Record.from_dict(data, {"a": b"", "b_2": b""})
    for word in words:
        assert word in str(error.value)


def test_not_a_mapping():
    with pytest.raises(ValueError, match="must be a mapping"):
        Record.from_dict([1], {})


@pytest.mark.parametrize(("kind", "name"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_equal_those_of_pillow(kind, name, mode):
    data = picture(kind, mode=mode)
    assert image_type(data) == name
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(Candidate("a", data), "k").numpy(), expected)


def test_sixteen_bits_are_refused_not_rounded():
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(file, "PNG")
    with pytest.raises(ValueError, match="8 bits"):
        decode(Candidate("a", file.getvalue()), "k")


def test_images_may_be_left_for_later():
    bad = record(candidates=(Candidate("a", picture()), Candidate("b_2", b"broken")))
    bad.validate(SCALE, images=False)
    with pytest.raises(ValueError, match="'b_2'"):
        bad.validate(SCALE)


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        record().key = "other"
    assert replace(record(), key="other").key == "other"
