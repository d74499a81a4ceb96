import json
import math

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from zr.models.generators import DetachedGuidance, FlowGenerator, FlowSize, FlowTransformer, FullGuidance, tiny_flow

WORDS = ("red", "blue", "ring", ",")
SIZE = FlowSize(image=12, patch=4, width=16, layers=2, heads=2, words=5)
PROMPTS = ["red ring, blue ring", "blue"]


def made(steps=4, guidance=None, dtype=torch.float64, seed=0, scale=0.3):
    """With no weight at its initial value: some of these are 0."""
    torch.manual_seed(seed)
    generator = FlowGenerator(WORDS, SIZE, steps, guidance).to(dtype)
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(scale * torch.randn_like(p))
    return generator


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_norm(x):
    return (x - x.mean()) / math.sqrt(float((x - x.mean()).square().mean()) + 1e-5)


def naive_velocity(transformer, latents, time, words):
    """One picture, patch by patch and head by head."""
    p, width, heads = SIZE.patch, SIZE.width, SIZE.heads
    corners = [(i, j) for i in range(0, SIZE.image, p) for j in range(0, SIZE.image, p)]
    hidden = [
        transformer.patches(latents[:, i : i + p, j : j + p].reshape(-1)) + transformer.places[k]
        for k, (i, j) in enumerate(corners)
    ]
    told = [naive_norm(transformer.words.weight[w] + transformer.order[k]) for k, w in enumerate(words)]
    rates = [1000 ** (k / (width // 2 - 1)) for k in range(width // 2)]
    waves = torch.tensor([f(time * r) for f in (math.cos, math.sin) for r in rates], dtype=torch.float64)
    shared = transformer.modulation(torch.nn.functional.silu(transformer.time(waves))).reshape(6, width)
    for block in transformer.blocks:
        shift, scale, gate, shift2, scale2, gate2 = shared + block.table[:, 0]
        seen = [block.attention_in(naive_norm(h) * (1 + scale) + shift) for h in hidden]
        query = [s[:width] for s in seen]
        key = [s[width : 2 * width] for s in seen] + [block.told_in(t)[:width] for t in told]
        value = [s[2 * width :] for s in seen] + [block.told_in(t)[width:] for t in told]
        for k, q in enumerate(query):
            found = []
            for h in range(heads):
                part = slice(h * width // heads, (h + 1) * width // heads)
                weight = torch.stack([q[part] @ one[part] / math.sqrt(width / heads) for one in key]).softmax(0)
                found.append(sum(w * one[part] for w, one in zip(weight, value, strict=True)))
            hidden[k] = hidden[k] + gate * block.attention_out(torch.cat(found))
            inner = block.up(naive_norm(hidden[k]) * (1 + scale2) + shift2)
            hidden[k] = hidden[k] + gate2 * block.down(torch.nn.functional.gelu(inner, approximate="tanh"))
    clean = torch.empty_like(latents)
    for h, (i, j) in zip(hidden, corners, strict=True):
        clean[:, i : i + p, j : j + p] = transformer.output(naive_norm(h)).reshape(3, p, p)
    return (clean - latents) / max(1 - time, 0.05)


@pytest.mark.parametrize("time", [0.0, 0.4, 0.98])
def test_transformer_against_a_loop_over_patches_and_heads(time):
    generator = made()
    latents, words = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=source()), generator.condition(PROMPTS)
    with torch.no_grad():
        found = generator.transformer(latents, torch.full((2,), time, dtype=torch.float64), words)
        for i in range(2):
            expected = naive_velocity(generator.transformer, latents[i], time, words[i].tolist())
            torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-9)


def naive_sample(generator, prompts, latents, steps, gradient_steps, stop):
    """Euler steps, written out; all but the last ``gradient_steps`` detached."""
    words = generator.condition(prompts)
    for step in range(stop):
        if step == stop - gradient_steps:
            latents = latents.detach()
        time = torch.full((len(prompts),), step / steps, dtype=latents.dtype)
        with_prompt = generator.transformer(latents, time, words)
        if generator.guidance is not None:
            without = generator.transformer(latents, time, torch.zeros_like(words))
            with_prompt = without + generator.guidance.scale * (with_prompt - without)
        left = 1 - step / steps if step + 1 == stop else 1 / steps
        latents = latents + left * with_prompt
    return latents / 2 + 0.5


@pytest.mark.parametrize(("gradient_steps", "stop"), [(1, 4), (3, 4), (4, 4), (1, 2), (2, 3)])
@pytest.mark.parametrize("guidance", [None, FullGuidance(2.0)], ids=["plain", "guided"])
def test_gradient_through_the_last_steps_is_that_of_a_plain_loop(gradient_steps, stop, guidance):
    generator = made(guidance=guidance, scale=0.1)
    weight = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=source(5))
    names, parameters = zip(*generator.named_parameters(), strict=True)
    images = generator.sample(PROMPTS, source(), gradient_steps=gradient_steps, stop=stop)
    found = torch.autograd.grad((images * weight).sum(), parameters)
    noise = torch.randn(2, 3, 12, 12, generator=source()).double()
    plain = naive_sample(generator, PROMPTS, noise, 4, gradient_steps, stop)
    expected = torch.autograd.grad((plain * weight).sum(), parameters)
    torch.testing.assert_close(images, plain.clamp(0, 1), rtol=1e-12, atol=1e-12)
    assert bool(((plain < 0) | (plain > 1)).any()), "a pixel that is cut off must keep its gradient"
    for name, one, other in zip(names, found, expected, strict=True):
        assert float(other.abs().max()) > 0, name
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_detached_guidance_samples_the_same_with_another_gradient():
    images, gradients = [], []
    for guidance in (FullGuidance(2.0), DetachedGuidance(2.0)):
        generator = made(guidance=guidance, scale=0.1)
        images.append(generator.sample(PROMPTS, source(), gradient_steps=1))
        gradients.append(torch.autograd.grad(images[-1].sum(), generator.transformer.output.bias)[0])
    torch.testing.assert_close(*images, rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], 2.0 * gradients[0], rtol=1e-10, atol=1e-12)  # the bias acts alike in both passes


def test_gradcheck_of_the_transformer():
    size = FlowSize(image=4, patch=2, width=4, layers=1, heads=1, words=2)
    torch.manual_seed(0)
    transformer = FlowTransformer(3, size).double()
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    names = [
        name for name, _ in transformer.named_parameters() if "blocks" in name or name in ("places", "order", "patches.bias")
    ]
    parameters = [p for name, p in transformer.named_parameters() if name in names]
    latents = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=source(), requires_grad=True)
    time, words = torch.tensor([0.3], dtype=torch.float64), torch.tensor([[2, 0]])

    def call(latents, *parameters):
        return torch.func.functional_call(transformer, dict(zip(names, parameters, strict=True)), (latents, time, words))

    assert torch.autograd.gradcheck(call, (latents, *parameters), fast_mode=True)


@pytest.mark.parametrize("stop", [3, 2], ids=["finished", "predicted"])
@pytest.mark.parametrize("guidance", [None, FullGuidance(2.0)], ids=["plain", "guided"])
def test_gradcheck_of_a_whole_sample(guidance, stop):
    """Through all steps that are run, so that the gradient is the derivative."""
    torch.manual_seed(0)
    size = FlowSize(image=4, patch=2, width=4, layers=1, heads=1, words=2)
    generator = FlowGenerator(WORDS, size, 3, guidance).double()
    parameters = list(generator.parameters())
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn_like(p))

    def call(*_):
        return generator.sample(["red ring", "blue"], source(), gradient_steps=stop, stop=stop)

    assert 0 < call().min() < call().max() < 1, "a pixel that is cut off has another slope than its gradient"
    assert torch.autograd.gradcheck(call, parameters, fast_mode=True)


def held(generator, gradient_steps):
    """Bytes that the graph of a sample keeps."""
    kept = {}
    parameters = {p.data_ptr() for p in generator.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        images = generator.sample(PROMPTS, source(), gradient_steps=gradient_steps)
    assert images.requires_grad == (gradient_steps > 0)
    return sum(kept.values())


def test_memory_goes_by_the_steps_with_gradient_and_not_by_the_others():
    few, many = (held(made(steps=steps), 2) for steps in (3, 12))
    assert few == pytest.approx(many, rel=0.02)
    assert held(made(steps=12), 6) > 2.5 * many
    assert held(made(), 0) == 0


def test_an_image_does_not_depend_on_the_batch():
    generator = made(dtype=torch.float32)
    together = generator.sample(PROMPTS, [source(1), source(2)])
    for i, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(generator.sample([prompt], source(i + 1))[0], together[i], rtol=0, atol=1e-5)
    other = generator.sample(["red ring, blue ring", "red"], [source(1), source(2)])
    assert float((other - together).abs().flatten(1).amax(1)[1]) > 1e-3, "the prompt must matter"


def test_words_and_what_is_said_about_others():
    generator = made()
    assert generator.condition(["red ring, blue", ""]).tolist() == [[1, 3, 4, 2, 0], [0, 0, 0, 0, 0]]
    for prompts, message in (
        (["red", "a red ring"], r"prompt 1: 'a' is none of the generator's 4 words \(red, blue, ring, ,, ...\)"),
        (["red ring, blue ring, red"], "prompt 0 has 7 words, the generator reads 5: shorten it"),
        ("red", "prompts is one text: give a list of prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.sample(prompts)


def test_pictures_become_latents_and_back():
    generator = made(dtype=torch.float32)
    pictures = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8, generator=source())
    latents = generator.encode(list(pictures))
    torch.testing.assert_close(latents, pictures / 127.5 - 1, rtol=0, atol=1e-6)
    torch.testing.assert_close(generator.decode(latents), pictures / 255, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="image 1 is 8 x 12, the generator makes 12 x 12: resize it"):
        generator.encode([pictures[0], pictures[1, :, :, :8]])


@pytest.mark.parametrize(
    "sizes", [{"patch": 5}, {"width": 6, "heads": 2}, {"layers": 0}, {"words": -1}], ids=["patch", "width", "layers", "words"]
)
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="patch must divide image, 2 \\* heads must divide width"):
        FlowSize(**sizes)


def test_tiny_flow_is_drawn_from_its_seed_alone():
    state = torch.get_rng_state()
    one, other, third = (tiny_flow(lambda: WORDS, SIZE, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert not torch.equal(one.transformer.places, third.transformer.places)


def test_saved_and_loaded_it_makes_the_same_pictures(tmp_path):
    generator = made(steps=3, dtype=torch.float32)
    generator.save_pretrained(tmp_path / "run" / "generator")
    assert sorted(f.name for f in (tmp_path / "run" / "generator").iterdir()) == ["generator.json", "transformer.safetensors"]
    for source_folder in (tmp_path / "run", tmp_path / "run" / "generator"):
        loaded = FlowGenerator.from_pretrained(source_folder)
        assert torch.equal(loaded.sample(PROMPTS, source()), generator.sample(PROMPTS, source()))
    guided = FlowGenerator.from_pretrained(tmp_path / "run", steps=7, guidance=FullGuidance(2.0))
    assert (guided.steps, repr(guided.guidance)) == (7, "FullGuidance(scale=2)")


def test_lora_starts_at_the_generator_trains_alone_and_is_saved_beside_it_or_merged(tmp_path):
    plain = made(dtype=torch.float32, scale=0.1)
    plain.save_pretrained(tmp_path / "plain")
    adapted = FlowGenerator.from_pretrained(tmp_path / "plain", lora=LoraConfig(r=2, target_modules="all-linear"))
    before = plain.sample(PROMPTS, source())
    torch.testing.assert_close(adapted.sample(PROMPTS, source()), before, rtol=0, atol=1e-6)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    linear = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    assert len(trained) == 2 * len(linear) == 2 * (5 + 5 * SIZE.layers)
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        adapted.sample(PROMPTS, source(), gradient_steps=1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = adapted.sample(PROMPTS, source())
    assert float((after - before).abs().max()) > 1e-2
    adapted.save_pretrained(tmp_path / "adapted")
    weights = load_file(tmp_path / "adapted" / "transformer.safetensors")
    assert weights.keys() == plain.transformer.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.transformer.state_dict().items())
    again = FlowGenerator.from_pretrained(tmp_path / "adapted")
    assert torch.equal(again.sample(PROMPTS, source()), after)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    merged = FlowGenerator.from_pretrained(tmp_path / "adapted", merge_adapters=True)
    torch.testing.assert_close(merged.sample(PROMPTS, source()), after, rtol=0, atol=1e-4)
    assert merged.transformer.state_dict().keys() == plain.transformer.state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())
    with pytest.raises(ValueError, match="holds an adapter, and lora makes a new one: give merge_adapters=True"):
        FlowGenerator.from_pretrained(tmp_path / "adapted", lora=LoraConfig(target_modules="all-linear"))


def changed(folder, **about):
    file = folder / "generator.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | about))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "transformer.safetensors").write_bytes(b"no tensors"),
            "holds damaged weights, or some that do not fit",
        ),
        (lambda f: (f / "transformer.safetensors").unlink(), "holds damaged weights, or some that do not fit"),
        (lambda f: changed(f, vocabulary=["red"]), r"do not fit \(Error\(s\) in loading state_dict for FlowTransformer"),
        (lambda f: changed(f, format=2), "has format 2; this zr .* reads format 1"),
        (lambda f: (f / "generator.json").write_text("{"), "generator.json is not JSON"),
        (lambda f: (f / "generator.json").write_text("{}"), "must be an object with format, size, steps, vocabulary"),
    ],
)
def test_damaged_folders(tmp_path, damage, message):
    made(dtype=torch.float32).save_pretrained(tmp_path / "generator")
    damage(tmp_path / "generator")
    with pytest.raises(ValueError, match=message):
        FlowGenerator.from_pretrained(tmp_path)


def test_no_generator_there_or_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no generator: neither generator.json nor generator/generator.json"):
        FlowGenerator.from_pretrained(tmp_path)
    (tmp_path / "notes").touch()
    with pytest.raises(FileExistsError, match="holds no zr model"):
        made().save_pretrained(tmp_path)
