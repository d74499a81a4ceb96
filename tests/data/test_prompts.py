"""Prompts alone: read from every source, dealt to ranks, gone on with in the middle of an epoch."""

import io
import json
from itertools import islice
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import zr
from zr.data import Candidate, PromptBatch, PromptData, Record, read_prompts, write_shards
from zr.data.prompts import PromptLoader

RUBRIC = zr.Rubric.load("zr:direct")


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_text_file(tmp_path):
    file = write(tmp_path, "a.txt", "red ring, blue square\r\nein grünes\u2028Dreieck\n<|im_end|> a line")
    wanted = ["red ring, blue square", "ein grünes\u2028Dreieck", "<|im_end|> a line"]
    assert read_prompts(file) == PromptBatch(["1", "2", "3"], wanted)


def test_a_file_of_json_lines(tmp_path):
    rows = [{"prompt": "night", "key": "n"}, {"prompt": "day", "note": 1}]
    file = write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(str(file)) == PromptBatch(["n", "2"], ["night", "day"])


def test_shards(tmp_path):
    Image.new("RGB", (4, 4)).save(image := io.BytesIO(), "PNG")
    records = [Record(f"p{i}", f"prompt {i}", (Candidate("a", image.getvalue()),)) for i in range(5)]
    write_shards(records, tmp_path, RUBRIC.scale, split="train", per_shard=2)
    assert read_prompts(tmp_path / "train") == PromptBatch([f"p{i}" for i in range(5)], [f"prompt {i}" for i in range(5)])
    with pytest.raises(FileNotFoundError, match="no shards for split 'dev'"):
        read_prompts(tmp_path / "dev")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "", "a.txt holds no prompt"),
        ("a.txt", "x\n\ny\n", "line 2 holds no prompt: write one there, or remove the line"),
        ("a.txt", b"x\xff\n", r"a.txt is no UTF-8 text \(invalid start byte at byte 1\)"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": " "}\n', "line 2 holds no prompt"),
        ("a.jsonl", '{"text": "x"}\n', 'line 1: {"prompt": TEXT} is needed'),
        ("a.jsonl", '{"prompt": "x", "key": 3}\n', 'line 1: {"prompt": TEXT} is needed, and "key" a text'),
        ("a.jsonl", '["x"]\n', "line 1: .* is needed"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "line 1: .* is needed"),
        ("a.jsonl", '{"prompt": \n', "line 1 is no JSON"),
        ("a.jsonl", '{"prompt": "x", "prompt": "y"}\n', "line 1 is no JSON: the name 'prompt' stands twice"),
        ("a.jsonl", '{"prompt": "x", "key": "a"}\n{"prompt": "y", "key": "a"}\n', "the key 'a' is repeated"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, text, said):
    file = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=said):
        read_prompts(file)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none.txt")


def loader(count=7, batch_size=2, seed=0, epoch=lambda asked: 0, processed=lambda: None, rank=0, ranks=1):
    keys = [str(i) for i in range(count)]
    return PromptLoader(PromptBatch(keys, [f"prompt {k}" for k in keys]), batch_size, seed, epoch, processed, rank, ranks)


@pytest.mark.parametrize(("count", "ranks", "size"), [(7, 1, 2), (7, 2, 2), (7, 3, 1), (12, 4, 3), (5, 5, 2)])
def test_ranks_share_an_epoch(count, ranks, size):
    each = [list(loader(count, size, epoch=lambda asked: 3, rank=r, ranks=ranks)) for r in range(ranks)]
    assert len({tuple(map(len, batches)) for batches in each}) == 1
    assert all(len(batches) == len(loader(count, size, ranks=ranks)) for batches in each)
    given = [key for batches in each for batch in batches for key in batch.keys]
    assert set(given) == {str(i) for i in range(count)}
    assert len(given) == -(-count // ranks) * ranks
    assert all(p == f"prompt {k}" for batches in each for b in batches for k, p in zip(b.keys, b.prompts, strict=True))


def test_epochs_differ_and_seeds_do():
    orders = [
        [key for batch in loader(20, seed=seed, epoch=lambda asked, e=epoch: e) for key in batch.keys]
        for seed in range(2)
        for epoch in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 6
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_evaluation_gives_each_once_in_order():
    shares = [[key for b in loader(7, seed=None, rank=r, ranks=3) for key in b.keys] for r in range(3)]
    assert shares == [["0", "3", "6"], ["1", "4"], ["2", "5"]]


def test_a_state_goes_on_after_what_was_given():
    epochs = iter(range(10))
    first = loader(epoch=lambda asked: next(epochs))
    whole = [[b.keys for b in first] for _ in range(3)]
    stopped = loader(epoch=lambda asked: 1)
    begun = [b.keys for b in islice(stopped, 2)]
    state = json.loads(json.dumps(stopped.state_dict()))
    again = loader(epoch=lambda asked: asked)
    again.load_state_dict(state)
    assert begun + [b.keys for b in again] == whole[1]
    ended = loader(epoch=lambda asked: asked)
    ended.load_state_dict(again.state_dict())
    assert [b.keys for b in ended] == whole[2]


def test_the_batch_that_is_being_worked_on_comes_again():
    one = loader(processed=lambda: 1, epoch=lambda asked: 0)
    seen = [b.keys for b in islice(one, 2)]
    again = loader(epoch=lambda asked: asked)
    again.load_state_dict(one.state_dict())
    assert next(iter(again)).keys == seen[1]


def test_another_order_is_not_gone_on_with():
    one = loader()
    next(iter(one))
    for name, other in {"batch_size": loader(batch_size=3), "seed": loader(seed=1), "prompts": loader(8)}.items():
        with pytest.raises(ValueError, match=f"in the middle of an epoch with {name}="):
            other.load_state_dict(one.state_dict())


class Seen(L.LightningModule):
    """Remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys = []

    def on_train_start(self):
        self.trainer.fit_loop._load_combined_loader_states()

    def training_step(self, batch, index):
        self.keys.append((self.current_epoch, batch.keys))
        return self.weight * len(batch.prompts)

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, root, ckpt_path=None, **options):
    keep = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    model = Seen()
    trainer = L.Trainer(**quiet, callbacks=[keep], max_epochs=2, default_root_dir=root, **options)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return model.keys


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path):
    file = write(tmp_path, "a.txt", "".join(f"prompt {i}\n" for i in range(7)))
    whole = fit(PromptData(file, file, batch_size=2), tmp_path)
    assert [epoch for epoch, _ in whole] == [0] * 4 + [1] * 4
    for step in (1, 3, 4, 6):
        rest = fit(PromptData(file, file, batch_size=2), tmp_path, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert rest == whole[step:]


def test_the_data_module(tmp_path):
    file = write(tmp_path, "a.txt", "".join(f"prompt {i}\n" for i in range(7)))
    data = PromptData(file, file, batch_size=4, limit=5)
    assert [batch.keys for batch in data.val_dataloader()] == [["1", "2", "3", "4"], ["5"]]
    training = data.train_dataloader()
    epochs = [[batch.keys for batch in training] for _ in range(2)]
    assert [len(b) for b in epochs[0]] == [4, 3]
    assert epochs[0] != epochs[1]
    assert PromptData(file).val_dataloader() == []
    data.trainer = SimpleNamespace(global_rank=0, world_size=9, current_epoch=0)
    with pytest.raises(ValueError, match=r"a.txt gives 7 prompts for 9 processes: add some, or use fewer devices"):
        data.setup("fit")
    for name in ("batch_size", "limit"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            PromptData(file, **{name: 0})
