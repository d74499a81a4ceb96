import pytest

from zr.models.folders import written_whole


def write(folder, text, fail=False):
    with written_whole(folder, "about") as new:
        (new / "about").write_text(text)
        if fail:
            raise OSError("disk full")


def test_a_folder_appears_whole_and_replaces_what_was_saved_before(tmp_path):
    write(tmp_path / "deep" / "model", "one")
    (tmp_path / "deep" / "model" / "left over").touch()
    write(tmp_path / "deep" / "model", "two")
    assert [(f.name, f.read_text()) for f in (tmp_path / "deep" / "model").iterdir()] == [("about", "two")]
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["model"]


def test_what_was_there_stays_when_writing_fails(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "model", "one", fail=True)
    assert not list(tmp_path.iterdir())
    write(tmp_path / "model", "one")
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "model", "two", fail=True)
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "about").read_text() == "one"


def test_something_else_is_not_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "one")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("words")
    (tmp_path / "file").write_text("words")
    for name in ("thesis", "file"):
        with pytest.raises(FileExistsError, match=f"{name} is there and holds no zr model"):
            write(tmp_path / name, "one")
    assert (tmp_path / "thesis" / "chapter").read_text() == (tmp_path / "file").read_text() == "words"
