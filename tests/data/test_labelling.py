"""What a labeller is given: every image once, no batch across two shards, every shard by one process."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_labels import SCALE, label, picture, pictures

from zr.data import Candidate, Index, LabelData, LabelledFolder, Record, read_shards, write_shards
from zr.data.labels import labelled
from zr.data.record import decode


@pytest.fixture
def source(tmp_path):
    """Tars of three records (the last of two) with one to four images each."""
    return write_shards(pictures(11), tmp_path / "in", SCALE, per_shard=3)


def data_of(source, out, rank=None, ranks=1, batch_size=4, names=None, **changes):
    given = {"labeller": "t", "dimensions": ["realism"], "settings": {}} | changes
    data = LabelData(LabelledFolder(out, source, SCALE, **given), batch_size=batch_size)
    if rank is not None:
        broadcast = (lambda found: found) if names is None else (lambda found: names)
        strategy = SimpleNamespace(broadcast=broadcast)
        data.trainer = SimpleNamespace(strategy=strategy, global_rank=rank, world_size=ranks, is_global_zero=rank == 0)
    return data


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_every_image_once_in_batches_of_one_shard(source, tmp_path, size):
    batches = list(data_of(source, tmp_path / "out", batch_size=size).predict_dataloader())
    expected = {shard.path.name: [] for shard in source.splits["train"]}
    for i, record in enumerate(read_shards(source.folder)):
        expected[f"train-{i // 3:06d}.tar"] += [(record, candidate) for candidate in record.candidates]
    for name, images in expected.items():
        own = [batch for batch in batches if batch.shard.path.name == name]
        assert [len(batch.keys) for batch in own] == [size] * (len(images) // size) + [len(images) % size] * (
            len(images) % size > 0
        )
        assert [key for batch in own for key in batch.keys] == [f"{r.key}.{c.id}" for r, c in images]
        assert [prompt for batch in own for prompt in batch.prompts] == [r.prompt for r, _ in images]
        pixels = [image for batch in own for image in batch.images]
        assert all(torch.equal(p, decode(c, r.key)) for p, (r, c) in zip(pixels, images, strict=True))
        assert [batch.last for batch in own] == [False] * (len(own) - 1) + [True]
        assert [r.key for batch in own for r in batch.ended] == list(dict.fromkeys(r.key for r, _ in images))
        for batch in own:
            assert all(f"{r.key}.{r.candidates[-1].id}" in batch.keys for r in batch.ended)
    order = [batch.shard.path.name for batch in batches]
    assert order == sorted(order)


def test_batches_move(source, tmp_path):
    batch = next(iter(data_of(source, tmp_path / "out").predict_dataloader()))
    moved = batch.to("meta")
    assert {image.device.type for image in moved.images} == {"meta"}
    assert (moved.keys, moved.ended, moved.last) == (batch.keys, batch.ended, batch.last)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_processes_share_the_shards_that_are_left(source, tmp_path, ranks):
    out = tmp_path / "out"
    target = data_of(source, out).target
    with target.begin():
        target.write(target.todo()[1], list(read_shards(source.folder))[3:6])
    left = ["train-000000.tar", "train-000002.tar", "train-000003.tar"]
    shares = [data_of(source, out, rank, ranks).predict_dataloader().shards for rank in range(ranks)]
    assert [[shard.path.name for shard in share] for share in shares] == [left[rank::ranks] for rank in range(ranks)]


def test_the_first_process_says_what_is_left(source, tmp_path):
    """Another one may look later, when a shard is finished that the first one dealt out."""
    names = ["train-000001.tar", "train-000002.tar"]
    shares = [data_of(source, tmp_path / "out", rank, 2, names=names).predict_dataloader().shards for rank in range(2)]
    assert [shard.path.name for share in shares for shard in share] == names


def test_other_processes_hold_the_folder_too(source, tmp_path):
    first, second = (data_of(source, tmp_path / "out", rank, 2) for rank in range(2))
    with first.target.begin():
        first.setup("predict")
        second.setup("predict")
    with pytest.raises(ValueError, match="is being labelled"), first.target.begin():
        pass
    second.teardown("predict")
    with first.target.begin():
        pass


def test_what_the_labeller_has_labelled_is_not_labelled_again(source, tmp_path):
    records = [labelled(r, "t", {"realism": {"a": label()}}) for r in read_shards(source.folder)]
    again = write_shards(records, tmp_path / "again", SCALE)
    with pytest.raises(ValueError, match=r"train-000000.tar: record 'p00', candidate 'a' has a distribution by 't' for r"):
        list(data_of(again, tmp_path / "out").predict_dataloader())
    assert list(data_of(again, tmp_path / "out", labeller="u").predict_dataloader())
    assert list(data_of(again, tmp_path / "out", dimensions=["aesthetics"]).predict_dataloader())


def test_a_damaged_image_is_named_with_its_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("zr.data.shards.decode", lambda candidate, key: None)  # a writer that does not look
    records = [Record(f"p{i}", "x", (Candidate("a", picture(i)[: -20 if i == 3 else None]),)) for i in range(5)]
    source = write_shards(records, tmp_path / "in", SCALE, per_shard=2)
    with pytest.raises(ValueError, match=r"in/train-000001\.tar: record 'p3', candidate 'a': image cannot be .*: replace"):
        list(data_of(source, tmp_path / "out").predict_dataloader())


def test_a_shard_of_other_records_than_the_index_says(source, tmp_path):
    path = tmp_path / "in" / "train-000001.tar"
    path.write_bytes((tmp_path / "in" / "train-000003.tar").read_bytes())
    with pytest.raises(ValueError, match=r"train-000001\.tar has 2 records, the index says 3: write the split again"):
        list(data_of(Index.load(tmp_path / "in"), tmp_path / "out").predict_dataloader())


def test_batch_size(source, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        data_of(source, tmp_path / "out", batch_size=0)


def test_what_is_not_an_image_file_is_refused_before_it_is_labelled(tmp_path, monkeypatch):
    monkeypatch.setattr("zr.data.shards.decode", lambda candidate, key: None)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.gif")
    record = Record("p0", "x", (Candidate("a", b"\x89PNG\r\n\x1a\n" + (tmp_path / "x.gif").read_bytes()),))
    source = write_shards([record], tmp_path / "in", SCALE)
    with pytest.raises(ValueError, match=r"train-000000\.tar: record 'p0', candidate 'a': image"):
        list(data_of(source, tmp_path / "out").predict_dataloader())
