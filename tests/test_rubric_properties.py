"""Rubrics drawn by Hypothesis: identity is names and bins, YAML and pickle give an equal one, what is wrong is refused."""

import pickle

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zr.rubric import Rubric, Scale, letters

quick = settings(max_examples=60, deadline=None, derandomize=True)

names = st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,12}", fullmatch=True), min_size=1, max_size=4, unique=True)
bins = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9, unique=True).map(sorted)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
labels = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4)


@st.composite
def plain_rubrics(draw):
    """The plain data of a valid rubric, as a YAML file holds it."""
    dimensions, scores = draw(names), draw(bins)
    anchors = st.dictionaries(st.sampled_from(scores), text, max_size=3)
    wording = {"system": draw(text), "instructions": {name: draw(text) for name in dimensions}}
    if draw(st.booleans()):
        wording["labels"] = draw(st.lists(labels, min_size=len(scores), max_size=len(scores), unique=True))
    wording |= draw(
        st.fixed_dictionaries({}, optional={"end": text, "marker": text, "template": st.dictionaries(text, st.booleans())})
    )
    return {"scale": {"bins": scores, "anchors": {name: draw(anchors) for name in dimensions}}, "wording": wording}


@quick
@example(
    data={"scale": {"bins": [0.0, 1.0], "anchors": {"_": {0.0: "\x85"}}}, "wording": {"system": "", "instructions": {"_": ""}}}
)
@given(data=plain_rubrics())
def test_plain_data_yaml_and_pickle_round_trip(tmp_path_factory, data):
    rubric = Rubric.from_dict(data)
    assert rubric.dimensions == tuple(data["scale"]["anchors"])
    assert rubric.bins == tuple(data["scale"]["bins"])
    assert rubric.wording.labels == tuple(data["wording"].get("labels", letters(len(rubric.bins))))
    file = tmp_path_factory.mktemp("rubric") / "rubric.yaml"
    rubric.save(file)
    for again in (Rubric.load(file), Rubric.from_dict(rubric.to_dict()), pickle.loads(pickle.dumps(rubric))):  # noqa: S301
        assert again == rubric
        assert again.to_dict() == rubric.to_dict()
        assert again.scale_id == rubric.scale_id


@quick
@given(plain_rubrics(), plain_rubrics())
def test_identity_is_names_in_order_and_bins(one, two):
    first, second = Rubric.from_dict(one), Rubric.from_dict(two)
    same = (first.dimensions, first.bins) == (second.dimensions, second.bins)
    assert (first.scale_id == second.scale_id) == same
    bare = Scale(first.bins, {name: {} for name in first.dimensions})
    assert bare.scale_id == first.scale_id
    turned = Scale(first.bins, {name: {} for name in reversed(first.dimensions)})
    assert (turned.scale_id == first.scale_id) == (len(first.dimensions) == 1)
    assert Scale((*first.bins, first.bins[-1] + 1.0), bare.anchors).scale_id != first.scale_id


def broken(data, way):
    """A rubric's plain data with one fault, and what the message must name."""
    scale, wording = data["scale"], data["wording"]
    name = next(iter(scale["anchors"]))
    match way:
        case "descending":
            scale["bins"].reverse()
            return "scale.bins"
        case "repeated":
            scale["bins"].append(scale["bins"][-1])
            return "scale.bins"
        case "infinite":
            scale["bins"][-1] = float("inf")
            return "scale.bins"
        case "outside":
            scale["anchors"][name] = {scale["bins"][-1] + 1.0: "x"}
            return f"scale.anchors.{name}"
        case "label":
            wording["labels"] = [str(i) for i in range(len(scale["bins"]) - 1)]
            return "wording.labels"
        case "same labels":
            wording["labels"] = ["A"] * len(scale["bins"])
            return "wording.labels"
        case "instruction":
            del wording["instructions"][name]
            return "wording.instructions"
        case "unknown":
            scale["unit"] = "stars"
            return "scale"
    wording["system"] = 3
    return "wording.system"


@quick
@given(
    plain_rubrics(),
    st.sampled_from(
        ["descending", "repeated", "infinite", "outside", "label", "same labels", "instruction", "unknown", "system"]
    ),
)
def test_one_fault_is_refused_and_named(data, way):
    words = broken(data, way)
    with pytest.raises(ValueError, match=words):
        Rubric.from_dict(data)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@settings(quick, max_examples=100)
@given(plain_rubrics(), json_like, st.data())
def test_any_value_anywhere_is_accepted_or_a_value_error(tmp_path_factory, data, value, choice):
    top = choice.draw(st.sampled_from(["scale", "wording"]))
    inner = choice.draw(st.sampled_from([None, *data[top]]))
    if inner is None:
        data[top] = value
    else:
        data[top][inner] = value
    file = tmp_path_factory.mktemp("rubric") / "rubric.yaml"
    file.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    try:
        rubric = Rubric.load(file)
    except ValueError as error:
        assert str(error).startswith(f"{file} is not a rubric: ")  # noqa: PT017 (either is right)
    else:
        assert Rubric.from_dict(rubric.to_dict()) == rubric
