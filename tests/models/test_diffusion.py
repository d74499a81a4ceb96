"""Tiny random models of diffusers' own classes: our loop against the stock pipelines, and against plain autograd."""

import json

import diffusers
import peft
import pytest
import torch
from affine import BATCH, RUBRIC, Given, runner
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from zr.models import Minimum
from zr.models.generators import DetachedGuidance, FullGuidance, StableDiffusion3Generator, ZImageGenerator
from zr.scores import ScoreDistribution
from zr.stages import LastSteps, ReFL, Reward, TextToImage

WORDS = ["user", "assistant", "red", "ring", "blue", "a", "green", "triangle"]
PROMPTS = ["red ring", "a green triangle a blue ring"]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v", "to_out.0"]}
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"


def tokenizer(length, template=None):
    ids = {word: i for i, word in enumerate(["[pad]", "[unk]", "[start]", "[end]", *WORDS])}
    core = Tokenizer(WordLevel(ids, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is None:
        core.post_processor = TemplateProcessing("[start] $A [end]", special_tokens=[("[start]", 2), ("[end]", 3)])
    special = {"pad_token": "[pad]", "unk_token": "[unk]", "bos_token": "[start]", "eos_token": "[end]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=length, chat_template=template, **special)


def autoencoder():
    block = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 2, "layers_per_block": 1}
    scale = {"scaling_factor": 0.36, "shift_factor": 0.11, "use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.AutoencoderKL(**block, **sizes, **scale)


def shaken(pipeline):
    """With no weight at 0, where some begin, and a text that matters."""
    with torch.no_grad():
        for p in pipeline.transformer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def z_image(seed=0, **scheduler):
    torch.manual_seed(seed)
    text = Qwen3Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8,
    )  # fmt: skip
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6],
        axes_lens=[128, 8, 16],
    )  # fmt: skip
    return shaken(
        diffusers.ZImagePipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 6.0} | scheduler)),
            autoencoder(),
            Qwen3Model(text),
            tokenizer(512, TEMPLATE),
            transformer,
        )
    )


def stable_diffusion(seed=0, t5=True, **scheduler):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 10}
    clip = [
        CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, projection_dim=8, hidden_act=act, **sizes, **ends))
        for act in ("quick_gelu", "gelu")
    ]
    third = T5EncoderModel(T5Config(vocab_size=16, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)) if t5 else None
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=12,
        qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return shaken(
        diffusers.StableDiffusion3Pipeline(
            transformer,
            diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | scheduler)),
            autoencoder(),
            clip[0],
            tokenizer(10),
            clip[1],
            tokenizer(10),
            third,
            tokenizer(256) if t5 else None,
        )
    )


KINDS = {"z_image": (z_image, ZImageGenerator), "stable_diffusion": (stable_diffusion, StableDiffusion3Generator)}
both = pytest.mark.parametrize("kind", KINDS)


def made(kind, steps=4, side=16, **options):
    build, kept = KINDS[kind]
    return kept(build(), steps, side, **options)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def guided(kind, scale):
    """The pipeline's ``guidance_scale`` for ours; what turns guidance off where there is none."""
    if scale is None:
        return {"z_image": 0.0, "stable_diffusion": 1.0}[kind]
    return scale - 1 if kind == "z_image" else scale


SCHEDULES = {"shifted": {}, "dynamic": {"use_dynamic_shifting": True, "shift": 1.0}}


@both
@pytest.mark.parametrize("scale", [None, 3.5])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_pictures_are_those_of_the_stock_pipeline(kind, scale, schedule):
    build, kept = KINDS[kind]
    pipeline = build(**schedule)
    generator = kept(pipeline, 5, 24, None if scale is None else FullGuidance(scale))
    found = generator.sample(PROMPTS, source())
    wanted = pipeline(
        prompt=list(PROMPTS),
        height=24,
        width=24,
        num_inference_steps=5,
        guidance_scale=guided(kind, scale),
        latents=torch.randn(2, 4, 12, 12, generator=source()),
        output_type="pt",
    ).images
    assert found.shape == (2, 3, 24, 24)
    assert float(wanted.std()) > 0.05
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    other = generator.sample(["blue", PROMPTS[1]], source())
    assert float((other - found)[0].abs().max()) > 1e-3, "the prompt must matter"


def test_without_t5_and_with_a_text_that_clip_cuts_off():
    pipeline = stable_diffusion(t5=False)
    generator = StableDiffusion3Generator(pipeline, 3, 16, FullGuidance(2.0))
    given = {"height": 16, "width": 16, "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    latents = torch.randn(1, 4, 8, 8, generator=source())
    wanted = pipeline(prompt=["red ring"], latents=latents, **given).images
    torch.testing.assert_close(generator.sample(["red ring"], source()), wanted, atol=1e-4, rtol=0)
    long = "red ring " * 5
    with pytest.raises(ValueError, match="prompt 1 has 12 tokens, the text encoder reads 10: shorten it"):
        generator.sample(["red", long])
    assert made("stable_diffusion").sample([long], source()).isfinite().all()


def naive(generator, prompts, latents, gradient_steps, stop):
    """The pipeline's loop over its stock modules, written out; all but the last ``gradient_steps`` detached."""
    pipeline, steps = generator.pipeline, generator.steps
    z = isinstance(generator, ZImageGenerator)
    with torch.no_grad():
        encoded = pipeline.encode_prompt(list(prompts), **({} if z else {"prompt_2": None, "prompt_3": None}))
    scheduler = pipeline.scheduler
    if z:
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)

    def noise_prediction(x, t, number):
        if z:
            rows = [
                pipeline.transformer([one[:, None]], ((1000 - t) / 1000)[None], [encoded[number][i]]).sample[0][:, 0]
                for i, one in enumerate(x)
            ]
            return -torch.stack(rows)
        return pipeline.transformer(
            hidden_states=x,
            timestep=t.expand(len(x)),
            encoder_hidden_states=encoded[number],
            pooled_projections=encoded[2 + number],
        ).sample

    for step in range(stop):
        if step == stop - gradient_steps:
            latents = latents.detach()
        t, sigma = scheduler.timesteps[step], scheduler.sigmas[step]
        pulled = noise_prediction(latents, t, 0)
        if generator.guidance is not None:
            without = noise_prediction(latents, t, 1)
            if isinstance(generator.guidance, DetachedGuidance):
                without = without.detach()
            pulled = without + generator.guidance.scale * (pulled - without)
        after = 0 if step + 1 == stop < steps else scheduler.sigmas[step + 1]
        latents = latents + (after - sigma) * pulled
    vae = pipeline.vae
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample / 2 + 0.5


PATHS = [(1, 4, None), (3, 4, None), (2, 3, FullGuidance(2.0)), (4, 4, FullGuidance(2.0)), (2, 4, DetachedGuidance(2.0))]


@both
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("gradient_steps", "stop", "guidance"), PATHS)
def test_the_gradient_is_that_of_a_plain_loop_over_the_stock_modules(kind, gradient_steps, stop, guidance, checkpointing):
    generator = made(kind, guidance=guidance, checkpointing=checkpointing)
    names, parameters = zip(*generator.transformer.named_parameters(), strict=True)
    weight = torch.randn(2, 3, 16, 16, generator=source(5))
    images = generator.sample(PROMPTS, source(), gradient_steps=gradient_steps, stop=stop)
    found = torch.autograd.grad((images * weight).sum(), parameters, allow_unused=True)
    generator.transformer.disable_gradient_checkpointing()
    generator.pipeline.vae.disable_gradient_checkpointing()
    plain = naive(generator, PROMPTS, torch.randn(2, 4, 8, 8, generator=source()), gradient_steps, stop)
    expected = torch.autograd.grad((plain * weight).sum(), parameters, allow_unused=True)
    torch.testing.assert_close(images, plain.clamp(0, 1), atol=1e-4, rtol=0)
    reached = 0
    for name, one, other in zip(names, found, expected, strict=True):
        assert (one is None) == (other is None), name
        if other is not None:
            reached += bool(other.abs().max() > 0)
            torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()) + 1e-6, rtol=1e-3, msg=name)
    assert reached > 0.9 * len(names)


@both
def test_the_gradient_through_all_steps_is_that_of_finite_differences(kind):
    """In eight directions, by Richardson from h = 1e-2: the stock modules compute some parts in float32 all the same."""
    generator = made(kind, steps=2, guidance=FullGuidance(2.0)).to(torch.float64)
    with torch.no_grad():
        generator.pipeline.vae.decoder.conv_out.weight.mul_(0.1)
    parameters = [p for p in generator.parameters() if p.requires_grad]
    weight = torch.randn(2, 3, 16, 16, generator=source(5), dtype=torch.float64) / 16

    def value(gradient_steps=0):
        images = generator.sample(PROMPTS, source(), gradient_steps=gradient_steps)
        assert 0 < images.min() < images.max() < 1, "a pixel that is cut off has another slope than its gradient"
        return (images * weight).sum()

    gradient = torch.autograd.grad(value(2), parameters, allow_unused=True)
    before, drawn, products, slopes = [p.detach().clone() for p in parameters], source(9), [], []
    for _ in range(8):
        direction = [0.1 * torch.randn(p.shape, generator=drawn, dtype=p.dtype) for p in parameters]
        differences = []
        for h in (1e-2, 5e-3, 2.5e-3):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    for p, b, d in zip(parameters, before, direction, strict=True):
                        p.copy_(b + sign * h * d)
                ends.append(float(value()))
            differences.append((ends[0] - ends[1]) / (2 * h))
        fourth = [(4 * differences[i + 1] - differences[i]) / 3 for i in (0, 1)]
        slopes.append((16 * fourth[1] - fourth[0]) / 15)
        products.append(float(sum((g * d).sum() for g, d in zip(gradient, direction, strict=True) if g is not None)))
    size = max(map(abs, slopes))
    assert size > 1e-3
    assert products == pytest.approx(slopes, rel=0, abs=1e-4 * size)


def kept_bytes(generator):
    """Of what the graph of one step with gradient keeps, weights apart."""
    weights, kept = {p.data_ptr() for p in generator.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        images = generator.sample(PROMPTS, source(), gradient_steps=1)
    assert images.requires_grad
    return sum(kept.values())


@both
def test_checkpointing_keeps_less_and_memory_does_not_go_by_the_number_of_steps(kind):
    few, many = (kept_bytes(made(kind, steps=steps)) for steps in (2, 6))
    assert few == pytest.approx(many, rel=0.02)
    assert kept_bytes(made(kind, steps=2, checkpointing=True)) < 0.4 * few
    assert not made(kind).sample(PROMPTS, source()).requires_grad


@both
def test_an_image_does_not_depend_on_the_batch(kind):
    generator = made(kind)
    together = generator.sample(PROMPTS, [source(1), source(2)])
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(generator.sample([prompt], [source(i + 1)])[0], together[i], atol=1e-4, rtol=0)


@both
def test_what_is_frozen_stays_so_and_out_of_the_state(kind):
    generator = made(kind)
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    assert trained == {f"transformer.{name}" for name, _ in generator.pipeline.transformer.named_parameters()}
    assert generator.state_dict().keys() == trained
    generator.train()
    parts = {name: part for name, part in generator.pipeline.components.items() if isinstance(part, nn.Module)}
    assert parts.keys() >= {"vae", "text_encoder", "transformer"}
    assert {part.training for part in parts.pop("transformer").modules()} == {True}
    for part in parts.values():
        assert not any(p.requires_grad for p in part.parameters())
        assert not any(module.training for module in part.modules())
    other = KINDS[kind][1](KINDS[kind][0](seed=1), 4, 16)
    other.load_state_dict(generator.state_dict())
    assert all(torch.equal(p, generator.get_parameter(f"transformer.{n}")) for n, p in other.transformer.named_parameters())
    state = generator.state_dict()
    state.pop(sorted(trained)[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)
    generator.to(torch.float64)
    assert {p.dtype for part in parts.values() for p in part.parameters()} == {torch.float64}


class Redness(nn.Module):
    """Scores by how much more red than blue there is."""

    rubric = RUBRIC

    def forward(self, images, prompts, dimensions=None):
        level = 5 * (images[:, 0] - images[:, 2]).mean((1, 2))
        bins = torch.tensor(self.rubric.bins)
        logits = level[:, None, None] * bins * torch.ones(len(self.rubric.index(dimensions)), 1)
        return ScoreDistribution(logits, self.rubric.bins)


def stage_of(generator, lr=3e-3, optimizer=torch.optim.AdamW, path=None, **options):
    given = {"warmup": 0.0, "decay": 0.0, "velocity_distance": 0.01, "seed": 7, "optimizer": lambda p: optimizer(p, lr=lr)}
    rewards = {"red": Reward(Redness(), Minimum())}
    return TextToImage(generator, rewards, path or LastSteps(2), **(given | options))


def fit(stage, steps, **resume):
    trainer = runner(max_steps=steps, max_epochs=-1, limit_val_batches=0)
    trainer.fit(stage, train_dataloaders=Given(BATCH, BATCH), val_dataloaders=Given(BATCH), **resume)
    return trainer


def reward(stage):
    (logged,) = runner().validate(stage, dataloaders=Given(BATCH), verbose=False)
    return logged["val/red"]


def adapted(kind, folder, **options):
    """A generator with fresh adapters, and the folder of its base."""
    build, kept = KINDS[kind]
    if not (folder / "base").exists():
        build().save_pretrained(folder / "base")
    given = {"lora": peft.LoraConfig(**LORA), "steps": 4, "side": 16} | options
    generator = kept.from_pretrained(folder / "base", **given)
    generator.pipeline.set_progress_bar_config(disable=True)
    return generator


@both
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_ten_steps_raise_a_reward(kind, lora, tmp_path):
    guidance = FullGuidance(2.0) if lora else None
    generator = adapted(kind, tmp_path, guidance=guidance) if lora else made(kind, guidance=guidance, checkpointing=True)
    parts = [part for part in generator.pipeline.components.values() if isinstance(part, nn.Module)]
    frozen = [(p, p.clone()) for part in parts for p in part.parameters() if not p.requires_grad]
    assert len(frozen) > 50
    stage = stage_of(generator, lr=3e-2 if lora else 3e-3, path=ReFL(2, 4) if lora else LastSteps(2))
    before = reward(stage)
    fit(stage, 10)
    assert reward(stage) > before + 0.05
    assert all(torch.equal(p, before) for p, before in frozen)


@both
def test_a_resumed_run_equals_the_whole_one(kind, tmp_path):
    whole, first, second = (stage_of(adapted(kind, tmp_path), lr=1e-2) for _ in range(3))
    torch.manual_seed(0)
    weights = [p for p in whole.generator.parameters() if p.requires_grad]
    for stage in (first, second):
        stage.generator.load_state_dict(whole.generator.state_dict())
        stage.start.load_state_dict(whole.start.state_dict())
    before = [p.clone() for p in weights]
    fit(whole, 4)
    fit(first, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, 4, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    found = [p for p in second.generator.parameters() if p.requires_grad]
    for one, other, start in zip(found, weights, before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
        assert not torch.equal(other, start)
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"generator", "start", "batches"}
    assert all("lora_" in name for name in state if name.startswith("generator"))


@both
def test_adapters_are_saved_as_diffusers_reads_them_and_go_on(kind, tmp_path):
    build, kept = KINDS[kind]
    generator = adapted(kind, tmp_path)
    plain = kept(generator.pipeline_class.from_pretrained(tmp_path / "base"), 4, 16).sample(PROMPTS, source())
    torch.testing.assert_close(generator.sample(PROMPTS, source()), plain, atol=1e-6, rtol=0)
    with torch.no_grad():
        for name, p in generator.named_parameters():
            if p.requires_grad:
                assert "lora_" in name
                p.add_(0.3 * torch.randn_like(p))
    changed = generator.sample(PROMPTS, source())
    assert float((changed - plain).abs().max()) > 1e-2
    generator.save_pretrained(tmp_path / "run" / "generator")
    assert sorted(f.name for f in (tmp_path / "run" / "generator").iterdir()) == [
        "generator.json",
        "pytorch_lora_weights.safetensors",
    ]

    stock = generator.pipeline_class.from_pretrained(tmp_path / "base")
    stock.load_lora_weights(tmp_path / "run" / "generator")
    stock.set_progress_bar_config(disable=True)
    given = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": guided(kind, None), "output_type": "pt"}
    wanted = stock(prompt=list(PROMPTS), latents=torch.randn(2, 4, 8, 8, generator=source()), **given).images
    torch.testing.assert_close(changed, wanted, atol=1e-4, rtol=0)

    again = kept.from_pretrained(tmp_path / "run")
    assert (again.steps, again.side) == (4, 16)
    torch.testing.assert_close(again.sample(PROMPTS, source()), changed, atol=1e-6, rtol=0)
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    merged = kept.from_pretrained(tmp_path / "run", merge_adapters=True)
    torch.testing.assert_close(merged.sample(PROMPTS, source()), changed, atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = generator.pipeline_class.from_pretrained(tmp_path / "merged")
    names = dict(build().transformer.named_parameters()).keys()
    assert dict(reloaded.transformer.named_parameters()).keys() == names
    torch.testing.assert_close(
        kept.from_pretrained(tmp_path / "merged").sample(PROMPTS, source()), merged.sample(PROMPTS, source()), atol=1e-6, rtol=0
    )
    with pytest.raises(ValueError, match="holds an adapter, and lora makes a new one: give merge_adapters=True"):
        kept.from_pretrained(tmp_path / "run", lora=peft.LoraConfig(**LORA))


@both
def test_adapters_are_in_float32_beside_weights_in_bfloat16(kind, tmp_path):
    generator = adapted(kind, tmp_path, dtype="bfloat16", checkpointing=True)
    kinds = {p.requires_grad: set() for p in generator.parameters()}
    for p in generator.transformer.parameters():
        kinds[p.requires_grad].add(p.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    with torch.no_grad():
        for p in generator.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    images = generator.sample(PROMPTS, source(), gradient_steps=1)
    images.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in generator.parameters() if p.requires_grad)
    generator.save_pretrained(tmp_path / "saved")
    assert {t.dtype for t in load_file(tmp_path / "saved" / "pytorch_lora_weights.safetensors").values()} == {torch.float32}
    again = type(generator).from_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert torch.equal(again.sample(PROMPTS, source()), images)


@both
def test_sides_that_do_not_fit(kind):
    most = {"z_image": 32, "stable_diffusion": 48}[kind]
    for side in (0, 18, most + 4):
        said = f"side={side}: autoencoder and patches make a token of 4 pixels a side.*give a multiple of 4, at most {most}"
        with pytest.raises(ValueError, match=said):
            made(kind, side=side)


@both
def test_what_is_refused(kind):
    build, kept = KINDS[kind]
    with pytest.raises(ValueError, match=r"guidance=FullGuidance\(scale=2\) was given, but guidance was distilled"):
        made(kind, guidance=FullGuidance(2.0), distilled=True)
    with pytest.raises(ValueError, match=r"takes a .*Pipeline, got a .*Pipeline"):
        kept(next(one for one, _ in KINDS.values() if one is not build)(), 4, 16)
    with pytest.raises(ValueError, match="steps are those of FlowMatchEulerDiscreteScheduler, deterministic"):
        kept(build(stochastic_sampling=True), 4, 16)
    generator = made(kind)
    for prompts, said in (
        ("red", "prompts is one text: give a list of prompts"),
        (["red", "blue [end]"], r"prompt 1 holds '\[end\]', which the text encoder would obey: take it out"),
        (["red " * 600], "prompt 0 has 60. tokens, the text encoder reads (512|256): shorten it"),
    ):
        with pytest.raises(ValueError, match=said):
            generator.sample(prompts)
    generator.transformer.add_adapter(peft.LoraConfig(**LORA))
    with pytest.raises(ValueError, match="the adapter's base has no name"):
        generator.save_pretrained("nowhere")


@both
def test_folders_that_hold_something_else(kind, tmp_path):
    _, kept = KINDS[kind]
    generator = adapted(kind, tmp_path)
    other = next(one for _, one in KINDS.values() if one is not kept)
    with pytest.raises(ValueError, match=rf"base is a {kept.pipeline_class.__name__}; {other.__name__} loads a "):
        other.from_pretrained(tmp_path / "base")
    with pytest.raises(OSError, match=r"model_index\.json"):
        kept.from_pretrained(tmp_path)
    (tmp_path / "base").rename(tmp_path / "SD3-Turbo")
    with pytest.raises(ValueError, match="guidance was distilled into these weights"):
        kept.from_pretrained(tmp_path / "SD3-Turbo", guidance=FullGuidance(2.0))
    said = kept.from_pretrained(tmp_path / "SD3-Turbo", guidance=FullGuidance(2.0), distilled=False, side=16)
    assert not said.distilled
    (tmp_path / "SD3-Turbo").rename(tmp_path / "base")

    for damage, message in (
        (lambda f: (f / "generator.json").write_text("{"), "generator.json is not JSON"),
        (lambda f: (f / "generator.json").write_text("{}"), "holds another kind of generator"),
        (lambda f: (f / "generator.json").write_text(json.dumps({"class": kept.__name__, "format": 2})), "has format 2; this"),
        (lambda f: (f / "pytorch_lora_weights.safetensors").write_bytes(b"no"), "weights.safetensors is damaged, or does not"),
    ):
        generator.save_pretrained(tmp_path / "saved")
        damage(tmp_path / "saved")
        with pytest.raises(ValueError, match=message):
            kept.from_pretrained(tmp_path / "saved")
        generator.save_pretrained(tmp_path / "again")
        for file in (tmp_path / "again").iterdir():
            file.rename(tmp_path / "saved" / file.name)


@both
def test_code_in_a_folder_is_not_run_and_nothing_is_unpickled(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build, kept = KINDS[kind]
    build().save_pretrained("base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "transformer" / "payload.py").write_text("open('touched', 'w')\nclass Payload: pass\n")
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | {"transformer": ["payload", "Payload"]}))
    with pytest.raises((ValueError, ImportError, OSError)):
        kept.from_pretrained("base")
    assert not (tmp_path / "touched").exists()
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    (weights,) = (tmp_path / "base" / "transformer").glob("*.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        kept.from_pretrained("base")
