"""`zr shards write`: both source formats give the same records, and each mistake one clear error."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import zr
from zr.commands.shards import write
from zr.data import Annotation, read_shards

ROW = {
    "key": "p0",
    "prompt": "two red cubes",
    "candidates": [{"id": "a", "image": "images/a.png"}, {"id": "b", "image": "images/b.webp"}],
    "scores": {"realism": {"a": {"anna": 4.0, "bob": {"score": 4.5, "refined": True}}}},
    "preferences": {"aesthetics": [["a", "b", 0.75]]},
    "texts": {"realism": {"b": "no shadow"}},
}
BARE = {"key": "p1", "prompt": "night", "candidates": [{"id": "a", "image": "images/a.png"}]}


@pytest.fixture
def home(tmp_path):
    (tmp_path / "images").mkdir()
    for name, kind in (("a.png", "PNG"), ("b.webp", "WEBP")):
        pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name, kind)
    return tmp_path


def jsonl(home, *rows):
    path = home / "source.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return path


def parquet(home, *rows, embed=True):
    """The same rows as a Parquet file: images as bytes, annotation as JSON text."""
    table = []
    for row in rows:
        candidates = [
            {"id": c["id"], "image": (home / c["image"]).read_bytes() if embed else c["image"]} for c in row["candidates"]
        ]
        parts = {name: json.dumps(row[name]) if name in row else None for name in ("scores", "preferences", "texts")}
        table.append({"key": row["key"], "prompt": row["prompt"], "candidates": candidates, **parts})
    pq.write_table(pa.Table.from_pylist(table), home / "source.parquet")
    return home / "source.parquet"


def test_jsonl(home):
    write(jsonl(home, ROW, BARE), home / "out", per_shard=1)
    first, second = read_shards(home / "out")
    assert (first.key, first.prompt, second.key) == ("p0", "two red cubes", "p1")
    assert [c.image for c in first.candidates] == [(home / "images" / n).read_bytes() for n in ("a.png", "b.webp")]
    assert first.scores == {"realism": {"a": {"anna": Annotation(4.0), "bob": Annotation(4.5, refined=True)}}}
    assert first.preferences == {"aesthetics": [("a", "b", 0.75)]}
    assert first.texts == {"realism": {"b": "no shadow"}}
    assert second.scores == {}
    assert len(list((home / "out").glob("train-*.tar"))) == 2


@pytest.mark.parametrize("embed", [True, False])
def test_parquet_gives_the_same_bytes(home, embed):
    write(jsonl(home, ROW, BARE), home / "one", split="test")
    write(parquet(home, ROW, BARE, embed=embed), home / "two", split="test")
    for name in ("test-000000.tar", "index.json"):
        assert (home / "one" / name).read_bytes() == (home / "two" / name).read_bytes()


def test_the_docstring_shows_the_format_that_is_read(home):
    text = write.__doc__.split("::", 1)[1].split("``key``")[0]
    text = text.replace(
        '[0, 0, ...], "traces": ["..."], "scale_id": "..."', '[0,0,0,0,0,0,0,0,1], "traces": ["x"], "scale_id": "ID"'
    )
    row = json.loads(text.replace("ID", zr.Rubric.load("zr:direct").scale_id))
    for candidate, name in zip(row["candidates"], ("a.png", "b.webp"), strict=True):
        candidate["image"] = f"images/{name}"
    write(jsonl(home, row), home / "out")
    (record,) = read_shards(home / "out")
    assert record.distributions["realism"]["a"]["teacher"].probs[-1] == 1.0


def changed(**parts):
    return {**ROW, **parts}


BAD = {
    "field": ([BARE, {"key": "p", "candidates": []}], ["line 2", "'p'", "missing field prompt"]),
    "no object": (["3"], ["line 1", "must be a mapping"]),
    "not json": ([ROW, "{"], ["line 2", "is not JSON"]),
    "dimension": ([changed(scores={"charm": {}})], ["'p0'", "'charm'", "alignment, realism, aesthetics, plausibility"]),
    "scale": ([changed(scores={"realism": {"a": {"n": 7}}})], ["'p0'", "'a'", "scores.realism.n", "off the scale 1 to 5"]),
    "bin": ([changed(scores={"realism": {"a": {"n": 4.2}}})], ["'p0'", "4 and 4.5"]),
    "nan": ([json.dumps(changed(scores={"realism": {"a": {"n": float("nan")}}}))], ["'p0'", "'a'", "NaN"]),
    "empty": ([changed(candidates=[])], ["'p0'", "candidates is empty"]),
    "no image": ([changed(candidates=[{"id": "a"}])], ["line 1", "'p0'", "'a'", "image is missing"]),
    "number": ([changed(candidates=[{"id": "a", "image": 3}])], ["'p0'", "'a'", "path or bytes"]),
    "key twice": ([BARE, BARE], ["'p1'", "repeated"]),
    "id twice": ([changed(candidates=BARE["candidates"] * 2)], ["'p0'", "'a' is repeated"]),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_error(home, case):
    rows, words = BAD[case]
    with pytest.raises(ValueError, match=r"\w") as error:
        write(jsonl(home, *rows), home / "out")
    for word in words:
        assert word in str(error.value)
    assert not (home / "out" / "index.json").exists()


def test_files(home):
    with pytest.raises(FileNotFoundError, match=r"line 1: record 'p0', candidate 'a'.*c\.png.*relative"):
        write(jsonl(home, changed(candidates=[{"id": "a", "image": "c.png"}])), home / "out")
    (home / "images" / "a.png").write_bytes((home / "images" / "a.png").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"'p0', candidate 'a'.*truncated"):
        write(jsonl(home, ROW), home / "out")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        write(home / "nothing.jsonl", home / "out")
    (home / "source.csv").write_text("")
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet"):
        write(home / "source.csv", home / "out")
    (home / "source.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="no Parquet file"):
        write(home / "source.parquet", home / "out")
    with pytest.raises(FileNotFoundError, match="zr:nothing"):
        write(jsonl(home, ROW), home / "out", rubric="zr:nothing")


def test_parquet_errors(home):
    path = parquet(home, ROW)
    table = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist([{**table[0], "scores": "{"}]), path)
    with pytest.raises(ValueError, match="row 1, column scores is not JSON"):
        write(path, home / "out")
    pq.write_table(pa.Table.from_pylist([{**table[0], "scores": 3}]), path)
    with pytest.raises(ValueError, match="row 1: column scores must hold JSON text"):
        write(path, home / "out")


def test_help_does_not_import_the_stack():
    heavy = ("torch", "lightning", "pyarrow", "webdataset")
    code = f"import sys, zr.commands.shards; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
