"""Output layers under peft against the full logits of the wrapped model's own forward pass; adapters saved and merged."""

import json

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from plain import build
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

import zr
from zr.models import LinearHead, ScoreTokenHead, VLMBackbone, adapters, compose
from zr.models.adapters import merge_adapters, rows_of_output

IDS = [7, 3, 20]
# peft on tied embeddings and several adapters, which is what is tested here
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]
PROMPTS = ["red ring", "blue square, green triangle", "ring"]
KINDS = {
    "inside": {"target_modules": ["q_proj", "down_proj"]},
    "output": {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 3},
    "rank": {"target_modules": ["lm_head"], "use_rslora": True, "r": 3},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(kind, family="qwen3_vl", seed=1):
    """A backbone with an adapter whose weights are far from doing nothing."""
    backbone = build(family)
    torch.manual_seed(seed)
    backbone.model.add_adapter(LoraConfig(**({"r": 4, "init_lora_weights": False, "lora_dropout": 0.5} | KINDS[kind])))
    for name, parameter in backbone.model.named_parameters():
        if parameter.requires_grad and "lora" not in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    backbone.eval()
    return backbone


def full(backbone):
    """Hidden states and full logits of the model's own forward pass."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    out = backbone.model(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids), output_hidden_states=True)
    return out.hidden_states[-1], out.logits


@torch.no_grad()
def check_rows(backbone):
    hidden, logits = full(backbone)
    torch.testing.assert_close(rows_of_output(backbone.output, IDS, hidden), logits[..., IDS], atol=2e-6, rtol=0)
    return logits


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="this transformers tells only what the adapter's file lacks"
)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_the_base_that_are_missing(kind, tmp_path):
    """The adapter's own file is whole, and must not hide it."""
    backbone = adapted(kind)
    backbone.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    gone = next(name for name in weights if "gate_proj" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights .{gone}"):
        VLMBackbone.from_pretrained(tmp_path, backbone.rubric)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_adapted_output_layer(kind):
    plain = full(build("qwen3_vl"))[1]
    backbone = adapted(kind)
    changed = check_rows(backbone)
    assert (changed - plain).abs().max() > 0.1
    if kind != "whole":  # transformers 5.23 switches LoRA off, not modules_to_save
        backbone.model.disable_adapters()
        torch.testing.assert_close(check_rows(backbone), plain)
        backbone.model.enable_adapters()
    torch.testing.assert_close(check_rows(backbone), changed)


def test_two_active_adapters_and_merged_ones():
    backbone = adapted("output")
    one = check_rows(backbone)
    torch.manual_seed(5)
    backbone.model.add_adapter(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), "second")
    backbone.model.set_adapter(["default", "second"])
    backbone.eval()
    assert (check_rows(backbone) - one).abs().max() > 0.05
    backbone.output.merge(adapter_names=["default"])
    check_rows(backbone)
    backbone.output.enable_adapters(False)
    check_rows(backbone)


def test_gradients_and_dropout_of_the_adapter():
    backbone = adapted("output")
    layer, hidden = backbone.output, torch.randn(2, 32, requires_grad=True)
    parameters = [hidden, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    ours = torch.autograd.grad(rows_of_output(layer, IDS, hidden).square().sum(), parameters)
    plain = torch.autograd.grad(layer(hidden)[:, IDS].square().sum(), parameters)
    for found, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    layer.train()
    torch.manual_seed(2)
    first = rows_of_output(layer, IDS, hidden)
    torch.manual_seed(2)
    torch.testing.assert_close(first, layer(hidden)[:, IDS], atol=2e-6, rtol=0)


def test_half_precision_with_a_bias():
    """In float32 throughout: nearer to float64 than the layer's own bfloat16 outputs are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40))
    model[0].weight.data.mul_(20)
    from peft import inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, lora_bias=True), model)
    model.bfloat16().eval()
    torch.nn.init.normal_(model[0].lora_B["default"].bias)
    features = torch.randn(5, 16).bfloat16()
    found = rows_of_output(model[0], IDS, features)
    exact = model.double()(features.double())[:, IDS]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=0)
    assert (model.bfloat16()(features)[:, IDS].double() - exact).abs().max() > 1e-2


class Packed(nn.Linear):
    """What quantised layers look like: a linear layer whose weight is packed bytes."""

    def __init__(self):
        super().__init__(8, 30, bias=False)
        self.weight = nn.Parameter(torch.zeros(120, 1, dtype=torch.uint8), requires_grad=False)


class PackedInHalf(nn.Linear):
    """The same, stored as if it were numbers."""

    def __init__(self):
        super().__init__(8, 30, bias=False)
        self.weight = nn.Parameter(torch.zeros(60, 1, dtype=torch.bfloat16), requires_grad=False)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Packed, r"of type Packed cannot be read: keep the output layer out of the quantisation"),
        (PackedInHalf, r"packs its weights as \(60, 1\)"),
        (lambda: nn.Linear(8, 30, device="meta"), "the output layer is offloaded"),
        (lambda: nn.Embedding(30, 8), "of type Embedding cannot be read"),
    ],
)
def test_layers_that_cannot_be_read(layer, message):
    with pytest.raises(ValueError, match=message):
        rows_of_output(layer(), IDS, torch.zeros(1, 8))


def test_another_kind_of_adapter_is_not_taken_for_plain_lora():
    backbone = build("qwen3_vl")
    backbone.model.add_adapter(LoraConfig(target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ValueError, match=r"adapter 'default' of the output layer is a DoraLinearVariant: only plain LoRA"):
        rows_of_output(backbone.output, IDS, torch.zeros(1, 32))


@torch.no_grad()
def test_an_adapter_added_after_the_head(pictures):
    """The head built before reads the same layer as one that is built now."""
    backbone = build("qwen3_vl").eval()
    model = compose(backbone, ScoreTokenHead).eval()
    before = model(images=pictures, prompts=PROMPTS).mean
    torch.manual_seed(1)
    backbone.model.add_adapter(LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    after = model.eval()(images=pictures, prompts=PROMPTS).mean
    assert (after - before).abs().max() > 0.01
    assert torch.equal(after, compose(backbone, ScoreTokenHead).eval()(images=pictures, prompts=PROMPTS).mean)


@torch.no_grad()
@pytest.mark.parametrize("head", [ScoreTokenHead, LinearHead])
@pytest.mark.parametrize(("kind", "family"), [("inside", "qwen3_5"), ("output", "qwen3_vl"), ("whole", "qwen3_vl")])
def test_saved_and_loaded_with_its_adapter(tmp_path, pictures, kind, family, head):
    model = compose(adapted(kind, family), head).eval()
    expected = model(images=pictures, prompts=PROMPTS).logits
    assert (
        compose(build(family), ScoreTokenHead).eval()(images=pictures, prompts=PROMPTS).logits - expected
    ).abs().max() > 0.01
    base = {name: t for name, t in build(family).model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(model(images=pictures, prompts=PROMPTS).logits, expected)  # saving left it as it was
    written = load_file(tmp_path / "model" / "backbone" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in base.items())
    config = json.loads((tmp_path / "model" / "backbone" / "adapter_config.json").read_text())
    assert not config["base_model_name_or_path"]
    try:
        loaded = zr.load(tmp_path / "model")
    except ValueError as error:
        if "lm_head" not in str(error):
            raise
        pytest.skip("this transformers does not find an output layer's adapter in a file")  # 5.17
    assert torch.equal(loaded(images=pictures, prompts=PROMPTS).logits, expected)
    trained = {name for name, p in loaded.backbone.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.backbone.model.named_parameters() if p.requires_grad}
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model" / "backbone")
    state = model.backbone.model.state_dict()
    assert set(plain.state_dict()) == set(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    loaded.save_pretrained(tmp_path / "model")
    assert torch.equal(zr.load(tmp_path / "model")(images=pictures, prompts=PROMPTS).logits, expected)
    merged = zr.load(tmp_path / "model", merge_adapters=True)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "modules_to_save" in name]
    torch.testing.assert_close(merged(images=pictures, prompts=PROMPTS).logits, expected, atol=2e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    again = zr.load(tmp_path / "merged")
    assert torch.equal(again(images=pictures, prompts=PROMPTS).logits, merged(images=pictures, prompts=PROMPTS).logits)


@torch.no_grad()
@pytest.mark.parametrize("place", ["beside", "apart"])
@pytest.mark.parametrize("kind", ["inside", "whole"])
def test_an_adapter_keeps_the_precision_of_its_file(tmp_path, pictures, kind, place):
    """On a base of bfloat16: trained in float32, saved beside its base or alone, loaded to the last bit; or saved in half."""
    backbone = build("qwen3_vl")
    backbone.save_pretrained(tmp_path / "base")
    settings = {"dtype": torch.bfloat16, "rubric": backbone.rubric}
    lora = LoraConfig(r=4, init_lora_weights=False, **KINDS[kind])
    made = VLMBackbone.from_pretrained(tmp_path / "base", lora=lora, **settings)
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.01 * torch.randn_like(parameter))  # a step of training
    made.save_pretrained(tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "alone").mkdir(exist_ok=True)
        (tmp_path / "alone" / name).write_bytes((tmp_path / "both" / name).read_bytes())
    alone = {"source": tmp_path / "base", "adapter": tmp_path / "alone"}
    where = {"source": tmp_path / "both"} if place == "beside" else alone
    try:
        again = VLMBackbone.from_pretrained(**where, **settings)
    except ValueError as error:
        if "lm_head" not in str(error):
            raise
        pytest.skip("this transformers does not find an output layer's adapter in a file")  # 5.17
    state, found = made.model.state_dict(), again.model.state_dict()
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {name: (t.dtype, t.shape) for name, t in state.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    trained = {name for name, p in again.model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert {found[name].dtype for name in trained} == {torch.float32}
    assert any((found[name] != found[name].bfloat16()).any() for name in trained)
    answers = [compose(b.eval(), ScoreTokenHead).eval()(images=pictures, prompts=PROMPTS).logits for b in (made, again)]
    assert torch.equal(*answers)
    for folder in ("both", "alone"):
        path = tmp_path / folder / "adapter_model.safetensors"
        save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    half = VLMBackbone.from_pretrained(**where, **settings)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_merged_into_the_weights(tmp_path, kind):
    backbone = adapted(kind)
    expected = full(backbone)[1]
    tied = backbone.model.get_input_embeddings()
    merge_adapters(backbone.model)
    torch.testing.assert_close(full(backbone)[1], expected, atol=5e-6, rtol=0)
    assert type(backbone.output) is nn.Linear
    shared = backbone.output.weight is backbone.model.get_input_embeddings().weight
    assert shared == (kind == "inside")  # an adapter of one of two tied layers changes one of them
    if kind in ("output", "rank", "whole"):
        assert tied.weight is backbone.model.get_input_embeddings().weight
    backbone.save_pretrained(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(
        plain(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits, expected, atol=5e-6, rtol=0
    )
    merge_adapters(backbone.model)  # nothing to do


def test_adapters_that_cannot_be_saved(tmp_path):
    backbone = adapted("inside")
    backbone.model.add_adapter(LoraConfig(target_modules=["q_proj"]), "second")
    backbone.model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"adapters \['default', 'second'\], active .*: one that is active and not merged"):
        adapters.save_model(backbone.model, tmp_path / "two")
    backbone.model.set_adapter("second")
    backbone.model.disable_adapters()
    with pytest.raises(ValueError, match="one that is active and not merged can be saved"):
        adapters.save_model(backbone.model, tmp_path / "off")
    with pytest.raises(ValueError, match="the adapters are switched off"):
        merge_adapters(backbone.model)
