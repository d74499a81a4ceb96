"""Weights dealt to a group of one process, in which FSDP2 frees and gathers them all the same, against whole ones.

Two processes are in tests/stages/test_sharded.py.
"""

import pytest
import torch
from families import build as build_family
from plain import FAMILIES, build
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from zr.models import LinearHead, compose, load
from zr.models.sharding import (
    Company,
    anyone,
    as_share,
    gathered,
    holder,
    inside,
    plain_class,
    sharded,
    through,
    whole,
)


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def pictures():
    return [torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def learn(backbone, cut):
    """Gradients of suffixes that share the states of a question, as a policy asks; and of the output layer's logits."""
    prefix = backbone.encode(pictures(), ["red ring", "blue square, green triangle"])
    prefix = prefix.cut() if cut else prefix
    _, states = backbone.advance(prefix, [[5, 6], [7, 8]])
    hidden = backbone.extend(states.fork(torch.tensor([0, 0, 1])), [[9], [10, 11], [12]])
    logits = backbone.logits(hidden[:, 0])
    (logits.square().mean() + hidden[1].sum()).backward()
    if cut:
        prefix.replay_loss().backward()
    return {name: whole(p.grad) for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_through_the_states_of_layers(mesh, family, checkpointing, cut):
    plain, backbone = build(family), build(family)
    if checkpointing:
        for model in (plain.model, backbone.model):
            way = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            getattr(model, f"{way}_checkpointing_enable")({"use_reentrant": False})
    backbone.shard(mesh)
    expected, found = learn(plain.train(), cut), learn(backbone.train(), cut)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_what_is_dealt(mesh):
    backbone = build("qwen3_vl")
    model = backbone.model
    assert not sharded(model)
    backbone.shard(mesh)
    assert sharded(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert holder(backbone.output) is model  # its weights are the embedding's
    assert plain_class(model).__name__ == "Qwen3VLForConditionalGeneration"
    dealt = {plain_class(m).__name__ for m in model.modules() if plain_class(m) is not type(m)}
    assert dealt == {"Qwen3VLForConditionalGeneration", "Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"}


def test_a_family_whose_passes_depend_on_its_images(mesh):
    with pytest.raises(ValueError, match="idefics3 runs whole sequences, whose number of passes depends on the images"):
        build_family("idefics3").shard(mesh)


def test_saved_whole(mesh, tmp_path):
    model = compose(build("qwen3_vl"), LinearHead)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.backbone.shard(mesh)
    fully_shard(model.head, mesh=mesh)
    with gathered(model, keep=False):
        assert all(isinstance(p, DTensor) for p in model.parameters())
    with gathered(model, keep=True):
        assert model.backbone.output.weight is model.backbone.model.get_input_embeddings().weight
        model.save_pretrained(tmp_path / "saved")
    assert all(isinstance(p, DTensor) for p in model.parameters())
    for name, p in load(tmp_path / "saved").named_parameters():
        assert torch.equal(p, before[name]), name


def test_shares_of_whole_tensors(mesh):
    layer = nn.Linear(3, 4)
    given = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(as_share(given, layer.weight), given)
    fully_shard(layer, mesh=mesh)
    dealt = as_share(given, layer.weight)
    assert isinstance(dealt, DTensor)
    assert dealt.placements == layer.weight.placements
    assert as_share(dealt, layer.weight) is dealt or torch.equal(whole(as_share(dealt, layer.weight)), given)
    assert torch.equal(whole(dealt), given)


def test_without_sharding_nothing_happens():
    layer, states = nn.Linear(3, 4), torch.randn(2, 3)
    calls = []
    company = Company(layer, lambda: calls.append("idle"))
    company.step()
    company.wait()
    assert not calls
    assert (anyone(layer, True), anyone(layer, False)) == (True, False)
    assert inside(layer, lambda x: x @ layer.weight.T, states).equal(states @ layer.weight.T)
    assert through(layer, states).equal(layer(states))
    assert "forward" not in vars(layer)
    with gathered(layer, keep=True):
        assert type(layer.weight) is nn.Parameter
