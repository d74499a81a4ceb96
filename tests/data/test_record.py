"""Records: what is accepted, what is refused and how the message says it."""

import io
import json
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from zr.data import Annotation, Candidate, LabelledDistribution, Reasoning, Record
from zr.data.record import decode, image_size, image_type, read_image
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


def test_select_keeps_what_was_said_of_some_dimensions():
    whole = record()
    assert whole.select(["realism"]) == record(preferences={})
    assert whole.select(["aesthetics"]) == record(scores={}, distributions={}, texts={})
    assert whole.select(["aesthetics", "realism", "alignment"]) == whole
    with pytest.raises(ValueError, match=r"give a list, \['realism'\]"):
        whole.select("realism")


def reasoned(off_scale=None, **changes):
    how = Reasoning(**({"traces": 2, "forced": 1, "tokens": 9, "spread": 0.1} | changes))
    label = LabelledDistribution((0.5, 0.5, 0.0), (), SCALE.scale_id, off_scale, how)
    return {"realism": {"a": {"t": label}}}


def test_what_traces_said_survives_json_and_is_left_out_where_nobody_told():
    how = {"probs": ((0.5, 0.5, 0.0), (1.0, 0.0, 0.0)), "ids": ((3, 4), ())}
    for given in (record(distributions=reasoned(0.25)), record(distributions=reasoned(**how))):
        given.validate(SCALE)
        data = json.loads(json.dumps(given.to_dict()))
        assert Record.from_dict(data, {c.id: c.image for c in given.candidates}) == given
    assert data["distributions"]["realism"]["a"]["t"] == {
        "probs": [0.5, 0.5, 0.0],
        "traces": [],
        "scale_id": SCALE.scale_id,
        "reasoning": {
            "traces": 2,
            "forced": 1,
            "tokens": 9,
            "spread": 0.1,
            "probs": [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]],
            "ids": [[3, 4], []],
        },
    }
    bare = record().to_dict()["distributions"]["realism"]["a"]["t"]
    assert set(bare) == {"probs", "traces", "scale_id"}


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
    "outside": ({"distributions": reasoned(off_scale=1.5)}, ["'p-1'", "'a'", "off_scale must be a probability, got 1.5"]),
    "forced": ({"distributions": reasoned(forced=3)}, ["'p-1'", "2 traces, 3 of them forced"]),
    "no trace": ({"distributions": reasoned(traces=0, forced=0)}, ["'p-1'", "reasoning: 0 traces"]),
    "spread": ({"distributions": reasoned(spread=0.8)}, ["'p-1'", "must be in [0, log 2], got 0.8", "label again"]),
    "nan spread": ({"distributions": reasoned(spread=float("nan"))}, ["'p-1'", "got nan"]),
    "ids": ({"distributions": reasoned(ids=((1,),))}, ["'p-1'", "2 traces, ids are given for 1"]),
    "a trace's sum": (
        {"distributions": reasoned(probs=((0.5, 0.5, 0.0), (0.5, 0.0, 0.0)))},
        ["'p-1'", "reasoning.probs[1]", "sum to one", "0.5"],
    ),
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
    "a half token": (
        {
            "distributions": {
                "realism": {
                    "a": {
                        "t": {
                            "probs": [1, 0, 0],
                            "scale_id": "x",
                            "reasoning": {"traces": 1.5, "forced": 0, "tokens": 2, "spread": 0},
                        }
                    }
                }
            }
        },
        ["'p-1'", "distributions.realism.a.t.reasoning.traces", "whole number", "1.5"],
    ),
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


def saved(image, kind="PNG", **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def scene(mode="RGB", size=(31, 23)):
    pixels = np.random.default_rng(1).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


KINDS = {
    "alpha": saved(scene("RGBA")),
    "grey alpha": saved(scene("RGBA").convert("LA")),
    "webp alpha": saved(scene("RGBA"), "WEBP"),
    "palette": saved(scene("P")),
    "palette, one colour transparent": saved(scene("P"), transparency=3),
    "palette, many transparent": saved(scene("P"), transparency=bytes(range(256))),
    "grey, one transparent": saved(scene("L"), transparency=30),
    "one bit": saved(scene("1")),
    "two bits": saved(scene().quantize(3), bits=2),
    "cmyk as Adobe inverts it": saved(scene("CMYK"), "JPEG"),
    "cmyk plain": saved(scene("CMYK"), "JPEG").replace(b"Adobe", b"Other"),
    "progressive": saved(scene(), "JPEG", progressive=True),
    "webp lossless": saved(scene(), "WEBP", lossless=True),
    "animated png": saved(scene(), save_all=True, append_images=[scene().rotate(180)]),
    "one pixel": saved(scene(size=(1, 1))),
    "one pixel jpeg": saved(scene(size=(1, 1)), "JPEG"),
    "line": saved(scene(size=(5000, 1))),
    "line jpeg": saved(scene(size=(1, 5000)), "JPEG"),
    "line webp": saved(scene(size=(5000, 1)), "WEBP"),
}


@pytest.mark.parametrize("case", KINDS)
def test_every_kind_of_image_is_what_pillow_makes_of_it(case):
    with Image.open(io.BytesIO(KINDS[case])) as image:
        image.load()
        image.info.pop("transparency", None)
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(Candidate("a", KINDS[case]), "k").numpy(), expected)
    assert image_size(KINDS[case]) == expected.shape[:0:-1]


def test_threads_that_read_leave_each_other_and_the_warnings_alone():
    """As `zr score` reads: Pillow's warnings are errors for a PNG, and for nothing that is decoded beside it."""
    files = [picture(kind, (64, 64), seed) for seed in range(150) for kind in ("PNG", "JPEG")]
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda data: read_image(data, "x"), files, chunksize=1))
    assert warnings.filters == before
    assert all(pixels.shape == (3, 64, 64) for pixels in found)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_a_viewer_shows_them(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(scene(), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(Candidate("a", data), "k").numpy(), expected)


def header(kind, width, height):
    """The beginning of a small file that claims a size."""
    data = bytearray(saved(scene(), kind, lossless=True) if kind == "WEBP" else saved(scene(), kind))
    if kind == "PNG":
        data[16:33] = (ihdr := struct.pack(">II", width, height) + bytes(data[24:29])) + struct.pack(
            ">I", zlib.crc32(b"IHDR" + ihdr)
        )
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    else:
        data[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


def turned_webp(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(scene(), "WEBP", exif=exif)


SIXTEEN = np.random.default_rng(0).integers(0, 65536, (4, 4), dtype=np.uint16)
REFUSED = {
    "png bomb": (header("PNG", 30000, 30000), "30000 x 30000 pixels, more than 67108864 are not decoded"),
    "jpeg bomb": (header("JPEG", 65000, 65000), "65000 x 65000 pixels"),
    "webp bomb": (header("WEBP", 16383, 16384), "16383 x 16384 pixels"),
    "16 bits": (saved(Image.fromarray(SIXTEEN)), "16 bits a channel: save it with 8 bits"),
    "animated webp": (saved(scene(), "WEBP", save_all=True, append_images=[scene().rotate(90)]), "Animated webp"),
    "turned webp": (turned_webp(6), "a WebP that its EXIF data turn"),
    "damaged png": (KINDS["palette"][:-60] + b"x" + KINDS["palette"][-59:], "chunk b'IDAT' is damaged"),
    "cut png": (KINDS["palette"][:-30], "cannot be decoded"),
    "empty png": (b"\x89PNG\r\n\x1a\n", "it ends within a chunk"),
    "empty jpeg": (b"\xff\xd8\xff", "cannot be decoded"),
    "empty webp": (b"RIFF\0\0\0\0WEBP", "cannot be decoded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_images_are_refused_in_one_line(case):
    data, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as error:
        decode(Candidate("a", data), "k")
    assert str(error.value).startswith("record 'k', candidate 'a': image ")
    assert str(error.value).isprintable()


def test_a_webp_that_is_not_turned_is_read():
    assert decode(Candidate("a", turned_webp(1)), "k").shape == (3, 23, 31)


def test_images_may_be_left_for_later():
    bad = record(candidates=(Candidate("a", picture()), Candidate("b_2", b"broken")))
    bad.validate(SCALE, images=False)
    with pytest.raises(ValueError, match="'b_2'"):
        bad.validate(SCALE)


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        record().key = "other"
    assert replace(record(), key="other").key == "other"
