"""Traces against stock ``generate`` and the plain forward on each whole sequence."""

from dataclasses import fields, replace
from functools import partial

import peft
import pytest
import torch
from plain import FAMILIES, build, chat, forward
from scipy.stats import chisquare

from zr.data import shapes
from zr.models import Policy, PrefixSampler, ReasoningReward, SamplingRule, Written, branches
from zr.models.policy import draw

PROMPTS = ["red ring", "blue square, green triangle; yellow ring", "ring"]
NAMES = ["realism", "alignment", "realism"]
CONTROL = [
    "[PAD]",
    "[UNK]",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CONTROL += ["<think>"]
FEW = tuple(range(16, 53))  # words left out, so that random weights end some traces and not others


ASKED = {name: name for name in shapes.DIMENSIONS} | {
    "realism": "realism colour, shape",
    "aesthetics": "realism missing ; right",
}


def uneven():
    """The world's reasoning wording with instructions of one, four, four and one tokens."""
    rubric = shapes.rubric(reasoning=True)
    return replace(rubric, wording=replace(rubric.wording, instructions=ASKED))


@pytest.fixture(scope="module")
def policy(backbone):
    return Policy(backbone.reworded(uneven()))


@pytest.fixture
def floats(pictures):
    return [p / 255 for p in pictures]


def never(policy):
    return policy.backbone.processor.tokenizer.convert_tokens_to_ids(CONTROL)


def end(policy):
    return policy.backbone.processor.tokenizer.convert_tokens_to_ids("</think>")


def sampled(policy, floats, seed=0, group_size=3, suppressed=FEW, **rule):
    torch.manual_seed(seed)
    prefix = policy.backbone.encode(floats, PROMPTS)
    return policy.sample(
        prefix=prefix, dimensions=NAMES, group_size=group_size, rule=SamplingRule(suppressed=suppressed, **rule)
    )


def traces(rollouts):
    rows = zip(rollouts.tokens.tolist(), rollouts.mask.tolist(), strict=True)
    return [[t for t, m in zip(tokens, mask, strict=True) if m] for tokens, mask in rows]


def test_shape_of_rollouts(policy, floats):
    rollouts = sampled(policy, floats, length=20)
    assert rollouts.row.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert rollouts.dimension.tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert len(rollouts) == 9
    assert rollouts.logits.shape == (9, 9)
    lengths = rollouts.mask.sum(-1)
    assert lengths.max() == rollouts.tokens.shape[1] <= 20
    assert len(lengths.unique()) > 2  # of unequal lengths, or the tests below show little
    for trace, forced in zip(traces(rollouts), rollouts.forced.tolist(), strict=True):
        assert not set(trace) & set(never(policy))
        assert end(policy) not in trace[:-1]
        assert forced == (trace[-1] != end(policy))
        assert not forced or len(trace) == 20


def test_forced_end_at_the_length(policy, floats):
    rollouts = sampled(policy, floats, length=2, group_size=40)
    assert 0 < rollouts.forced.sum() < 120
    for trace, forced in zip(traces(rollouts), rollouts.forced.tolist(), strict=True):
        assert (len(trace) == 2 and end(policy) not in trace) if forced else trace[-1] == end(policy)


@torch.no_grad()
def test_scores_by_the_whole_sequence_alone(policy, floats):
    """Mixed dimensions, lengths, images, some closed by force: each rollout as if nothing else existed."""
    rollouts = sampled(policy, floats, length=12)
    assert 0 < rollouts.forced.sum() < 9
    tokenizer = policy.backbone.processor.tokenizer
    labels, marker = tokenizer.convert_tokens_to_ids(list("ABCDEFGHI")), tokenizer.convert_tokens_to_ids(["score"])
    for m, trace in enumerate(traces(rollouts)):
        row = rollouts.row[m]
        closed = trace if trace[-1] == end(policy) else [*trace, end(policy)]
        text = chat(PROMPTS[row], ASKED[NAMES[row]], thinking=True)
        logits = forward(policy.backbone, text, [floats[row]], [*closed, *marker])[2][-1]
        torch.testing.assert_close(rollouts.logits[m], logits[labels], atol=1e-5, rtol=0)


def test_greedy_is_stock_generate(policy, floats):
    rollouts = sampled(policy, floats, group_size=1, temperature=0.0, length=15)
    backbone = policy.backbone
    for m, trace in enumerate(traces(rollouts)):
        pil = (floats[m] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        text = chat(PROMPTS[m], ASKED[NAMES[m]], thinking=True)
        inputs = backbone.processor(text=[text], images=[pil], return_tensors="pt")
        found = backbone.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=15,
            eos_token_id=end(policy),
            pad_token_id=0,
            suppress_tokens=[*never(policy), *FEW],
        )
        assert found[0, inputs["input_ids"].shape[1] :].tolist() == trace
    assert max(map(len, traces(rollouts))) > 1


def test_suppressed_tokens(policy, floats):
    first = {trace[0] for trace in traces(sampled(policy, floats, length=1, group_size=30))}
    banned = tuple(sorted(first))[:3]
    again = {trace[0] for trace in traces(sampled(policy, floats, length=1, group_size=30, suppressed=FEW + banned))}
    assert not again & {*banned, *FEW}
    assert again & first


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies(policy, temperature):
    text = chat("red ring", ASKED["realism"], images=0, thinking=True)
    with torch.no_grad():
        logits = forward(policy.backbone, text, [])[2][-1].double()
    logits[never(policy)] = -torch.inf
    probs = (logits / temperature).softmax(-1)
    torch.manual_seed(1)
    count = 1500 if policy.backbone.model.config.model_type == "qwen3_vl" else 700
    prefix = policy.backbone.encode(None, ["red ring"])
    rule = SamplingRule(temperature=temperature, length=1)
    tokens = policy.sample(prefix=prefix, dimensions=["realism"], group_size=count, rule=rule).tokens[:, 0]
    seen = torch.bincount(tokens, minlength=len(probs)).double()
    assert not seen[probs == 0].any()
    order = probs.argsort()  # the rarest tokens together, so that each class is expected often enough
    rare = order[(probs[order] * count).cumsum(0) <= 5]
    group = torch.arange(len(probs)).index_fill(0, rare, int(rare[0]))
    sums = [torch.zeros(len(probs)).double().index_add(0, group, x) for x in (seen, probs * count)]
    observed, expected = (x[group.unique()] for x in sums)
    kept = expected > 0
    observed, expected = observed[kept], expected[kept]
    assert chisquare(observed, expected).pvalue > 1e-3
    flat = torch.full_like(expected, count / len(expected))
    assert chisquare(observed, flat).pvalue < 1e-3  # the test can fail


def test_seed_decides(policy, floats):
    first, again, other = (sampled(policy, floats, seed=seed, length=8) for seed in (4, 4, 5))
    assert traces(first) == traces(again) != traces(other)
    assert torch.equal(first.logits, again.logits)


def test_texts_hold_no_control_tokens(policy, floats):
    rollouts = sampled(policy, floats, length=12)
    words = {i: w for w, i in policy.backbone.processor.tokenizer.get_vocab().items()}
    for text, trace in zip(policy.texts(rollouts), traces(rollouts), strict=True):
        assert text.split() == [words[t] for t in trace if t != end(policy)]


def test_nothing_to_differentiate(policy, floats):
    assert not sampled(policy, floats, length=3).logits.requires_grad


def test_mixture_of_traces(policy, floats):
    rule = SamplingRule(length=6)
    names = ["plausibility", "alignment"]
    scorer = ReasoningReward(policy, traces=4, seed=7, rule=rule)
    scores = scorer(images=floats, prompts=PROMPTS, dimensions=names)
    assert scores.batch_shape == (3, 2)
    assert not scores.mean.requires_grad
    prefix = policy.backbone.encode([x for x in floats for _ in names], [p for p in PROMPTS for _ in names])
    seeds = [scorer._seed(p, name, k) for p in PROMPTS for name in names for k in range(4)]
    assert len(set(seeds)) == len(set(PROMPTS)) * 2 * 4
    rollouts = policy.sample(prefix=prefix, dimensions=names * 3, group_size=4, rule=rule, seeds=seeds)
    for i in range(3):
        for d in range(2):
            start = (2 * i + d) * 4
            mean = sum(rollouts.logits[m].softmax(-1) for m in range(start, start + 4)) / 4
            torch.testing.assert_close(scores.probs[i, d], mean, atol=1e-5, rtol=0)


def test_reasoning_reward_leaves_the_random_state_alone(policy, floats):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    scorer = ReasoningReward(policy, rule=SamplingRule(length=3))
    first = scorer(images=floats, prompts=PROMPTS)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first.logits, scorer(images=floats, prompts=PROMPTS).logits)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_reasoning_is_the_same_alone_and_in_a_batch(policy, floats, temperature):
    scorer = ReasoningReward(policy, traces=2, rule=SamplingRule(temperature=temperature, length=6))
    together = scorer(images=floats, prompts=PROMPTS)
    for i in range(3):
        alone = scorer(images=floats[i : i + 1], prompts=PROMPTS[i : i + 1], dimensions=["aesthetics"])
        torch.testing.assert_close(alone.logits[0, 0], together.logits[i, 2], atol=1e-5, rtol=0)


def plainly(policy, floats, rollouts, temperature):
    """Per rollout: log-probs and entropy of its tokens, log of q. Whole sequences, one at a time, by hand."""
    tokenizer = policy.backbone.processor.tokenizer
    labels, marker = tokenizer.convert_tokens_to_ids(list("ABCDEFGHI")), tokenizer.convert_tokens_to_ids(["score"])
    found = []
    for row, trace in zip(rollouts.row.tolist(), traces(rollouts), strict=True):
        closed = trace if trace[-1] == end(policy) else [*trace, end(policy)]
        text = chat(PROMPTS[row], ASKED[NAMES[row]], thinking=True)
        logits = forward(policy.backbone, text, [floats[row]], [*closed, *marker])[2]
        start = len(logits) - len(closed) - len(marker)
        kept = [i for i in range(logits.shape[-1]) if i not in {*never(policy), *FEW}]
        logs = (logits[start - 1 : start - 1 + len(trace), kept] / temperature).log_softmax(-1)
        picked = torch.stack([logs[t, kept.index(token)] for t, token in enumerate(trace)])
        found.append((picked, -(logs.exp() * logs).sum(-1), logits[-1, labels].log_softmax(-1)))
    return found


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_evaluate_is_the_whole_sequence_alone_and_what_was_sampled(policy, floats, temperature):
    """Mixed dimensions, lengths, images, some closed by force; at unchanged weights the ratio is 1."""
    rule = SamplingRule(temperature=temperature, length=12, suppressed=FEW)
    rollouts = sampled(policy, floats, length=12, temperature=temperature)
    assert 0 < rollouts.forced.sum() < 9
    found = policy.evaluate(prefix=policy.backbone.encode(floats, PROMPTS), rollouts=rollouts, rule=rule)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(rollouts.log_probs, found.log_probs, **close)
    assert found.log_probs.shape == found.entropy.shape == rollouts.mask.shape
    assert found.scores.batch_shape == (9,)
    for m, (log_probs, entropy, q) in enumerate(plainly(policy, floats, rollouts, temperature)):
        torch.testing.assert_close(found.log_probs[m, rollouts.mask[m]], log_probs, **close)
        torch.testing.assert_close(found.entropy[m, rollouts.mask[m]], entropy, **close)
        torch.testing.assert_close(found.scores.logits[m], q, **close)
    assert not found.log_probs[~rollouts.mask].any()
    assert not found.entropy[~rollouts.mask].any()
    assert (found.log_probs[rollouts.mask] < -0.1).any()


@pytest.mark.parametrize("kind", ["full", "adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_whatever_the_split(family, kind, pictures):
    """Of model and pixels: whole sequences alone, one pass, and micro-batches into a cut prefix or into cut questions."""
    policy = Policy(build(family, uneven()).eval())
    model = policy.backbone.model
    if kind == "adapter":
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "in_proj_qkv", "gate_proj"], init_lora_weights=False)
        model.add_adapter(config)
    floats = [(p / 255).requires_grad_() for p in pictures]
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rule = SamplingRule(temperature=0.8, length=7, suppressed=FEW)
    rollouts = sampled(policy, floats, seed=2, group_size=2, length=7, temperature=0.8)
    assert 0 < rollouts.forced.sum() < 6
    generator = torch.Generator().manual_seed(0)
    of_tokens, of_bins = (torch.randn(6, n, generator=generator) for n in (rollouts.mask.shape[1], 9))

    def gradients(run):
        model.zero_grad()
        for picture in floats:
            picture.grad = None
        run()
        grads = {name: p.grad for name, p in learning.items() if p.grad is not None}
        return {name: grad.clone() for name, grad in (*grads.items(), *((str(i), f.grad) for i, f in enumerate(floats)))}

    def alone():
        for m, (log_probs, _, q) in enumerate(plainly(policy, floats, rollouts, 0.8)):
            (log_probs @ of_tokens[m, : len(log_probs)] + q @ of_bins[m]).backward()

    def loss(prefix, index):
        found = policy.evaluate(prefix=prefix, rollouts=rollouts.select(index), rule=rule)
        return (found.log_probs * of_tokens[index]).sum() + (found.scores.logits * of_bins[index]).sum()

    def split(prefix, size):
        prefix = prefix.cut()
        for start in range(0, 6, size):
            loss(prefix, torch.arange(start, min(start + size, 6))).backward()
        prefix.replay_loss().backward()

    def images():
        return policy.backbone.encode(floats, PROMPTS)

    plain = gradients(alone)
    norm = torch.stack([g.norm() for g in plain.values()]).norm()
    # cotangents of shared states are added up before they go through linear attention, which magnifies how the sum was rounded
    for shared, alone_floor in ((images, 1e-7), (lambda: policy.ask(images(), rollouts), 1e-6)):
        whole = gradients(lambda shared=shared: loss(shared(), slice(None)).backward())
        assert plain.keys() == whole.keys()
        assert len(plain) > (8 if kind == "adapter" else 30)
        for name, grad in whole.items():
            assert (grad - plain[name]).norm() <= 1e-4 * plain[name].norm() + 1e-6 * norm, name
        for size in (1, 2, 4, 6):
            parts = gradients(lambda shared=shared, size=size: split(shared(), size))
            apart = torch.stack([(parts[name] - whole[name]).norm() for name in whole])
            assert apart.norm() <= 1e-5 * norm, size  # the update as a whole
            for name, distance in zip(whole, apart, strict=True):
                floor = alone_floor if size == 1 else 1e-7
                assert distance <= 1e-5 * whole[name].norm() + floor * norm, (size, name)


def test_select(policy, floats):
    rollouts = sampled(policy, floats, length=6)
    for part in (rollouts.select(torch.tensor([4, 1])), rollouts.select(slice(3, 5))):
        assert len(part) == 2
        assert part.tokens.shape[1] == rollouts.tokens.shape[1]
    for field in fields(rollouts):
        picked, all_of_it = (getattr(r, field.name) for r in (rollouts.select(torch.tensor([4, 1])), rollouts))
        assert torch.equal(picked, torch.stack([all_of_it[4], all_of_it[1]]))


def test_off_scale_mass(policy, floats):
    rollouts, rule = sampled(policy, floats, length=4), SamplingRule(length=4, suppressed=FEW)
    prefix = policy.backbone.encode(floats, PROMPTS)
    found = Policy(policy.backbone, off_scale=True).evaluate(prefix=prefix, rollouts=rollouts, rule=rule)
    tokenizer = policy.backbone.processor.tokenizer
    labels, marker = tokenizer.convert_tokens_to_ids(list("ABCDEFGHI")), tokenizer.convert_tokens_to_ids(["score"])
    trace = traces(rollouts)[4]
    closed = trace if trace[-1] == end(policy) else [*trace, end(policy)]
    text = chat(PROMPTS[1], ASKED[NAMES[1]], thinking=True)
    probs = forward(policy.backbone, text, [floats[1]], [*closed, *marker])[2][-1].softmax(-1)
    torch.testing.assert_close(found.scores.off_scale[4], 1 - probs[labels].sum(), atol=1e-5, rtol=0)


def test_ids_without_text_are_never_sampled(pictures):
    """Real vocabularies are padded: the last rows of the output layer stand for nothing."""
    policy = Policy(build("qwen3_vl", uneven()).eval())
    model, size = policy.backbone.model, len(policy.backbone.processor.tokenizer)
    model.resize_token_embeddings(size + 200, mean_resizing=False)
    grown = Policy(policy.backbone)
    prefix = grown.backbone.encode([p / 255 for p in pictures], PROMPTS)
    rollouts = grown.sample(prefix=prefix, dimensions=NAMES, group_size=20, rule=SamplingRule(length=10))
    tokens = rollouts.tokens[rollouts.mask]
    assert len(tokens) > 300
    assert tokens.max() < size
    assert not set(tokens.tolist()) & set(never(grown))
    found = grown.evaluate(prefix=prefix, rollouts=rollouts, rule=SamplingRule(length=10))
    torch.testing.assert_close(found.log_probs, rollouts.log_probs, atol=1e-5, rtol=0)


@pytest.fixture
def passes(policy, monkeypatch):
    """Rows and longest suffix of each forward pass after the prefix, in order."""
    seen, through = [], type(policy.backbone)._through

    def counted(backbone, ids, *states):
        seen.append(tuple(ids.shape))
        return through(backbone, ids, *states)

    monkeypatch.setattr(type(policy.backbone), "_through", counted)
    return seen


def test_a_group_shares_its_opening_and_all_step_together(policy, floats, passes):
    """12 rollouts, three questions, two lengths of them: rows of each step, which shrink as traces end; one pass closes all."""
    torch.manual_seed(0)
    names = ["alignment", "plausibility", "realism"]
    rule = SamplingRule(length=5, suppressed=FEW)
    rollouts = policy.sample(prefix=policy.backbone.encode(floats, PROMPTS), dimensions=names, group_size=4, rule=rule)
    lengths = rollouts.mask.sum(-1)
    assert 0 < rollouts.forced.sum() < 12
    short, long = (len(policy.backbone.prompts.suffix_ids(name)) for name in ("alignment", "realism"))
    alive = [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]
    assert alive[-1] < alive[0]
    assert passes == [(2, short), (1, long), *((n, 1) for n in alive), (12, 3)]  # a token, the end, the marker


def test_a_group_shares_its_opening_in_evaluation(policy, floats, passes):
    """Three questions, two lengths of them: all but what the shorter one ends with is read once for each."""
    names, rule = ["alignment", "plausibility", "realism"], SamplingRule(length=4, suppressed=FEW)
    prefix = policy.backbone.encode(floats, PROMPTS)
    rollouts = policy.sample(prefix=prefix, dimensions=names, group_size=4, rule=rule)
    short, long = (len(policy.backbone.prompts.suffix_ids(name)) for name in ("alignment", "realism"))
    closed = rollouts.mask.sum(-1) + rollouts.forced + 1
    longest = int((closed + torch.tensor([short] * 8 + [long] * 4) - short + 1).max())
    passes.clear()
    with torch.no_grad():
        for call in (lambda: policy.evaluate(prefix, rollouts, rule), lambda: policy.score(prefix, rollouts)):
            call()
            assert passes == [(3, short - 1), (12, longest)]
            passes.clear()
        policy.score(prefix, rollouts.select(slice(8, 9)))  # alone it is cut at the same place
    assert passes == [(1, short - 1), (1, int(closed[8]) + long - short + 1)]
    passes.clear()
    policy.evaluate(prefix, rollouts, rule)  # with a gradient each rollout has its own, whatever micro-batch it is in
    assert passes == [(12, longest + short - 1)]
    passes.clear()
    questions = policy.ask(prefix, rollouts)  # unless they are asked once for all micro-batches
    for part in (slice(0, 6), slice(6, 12)):
        policy.evaluate(questions, rollouts.select(part), rule)
    assert passes[0] == (3, short - 1)
    assert [rows for rows, _ in passes[1:]] == [6, 6]
    with pytest.raises(ValueError, match="nobody asked row 2 for realism: ask all questions"):
        policy.score(policy.ask(prefix, rollouts.select(slice(0, 8))), rollouts)
    with pytest.raises(ValueError, match="rollouts of row 2 for a prefix of 2 rows"):
        policy.ask(prefix.fork(torch.arange(2)), rollouts)


@torch.no_grad()
def test_states_of_the_sampler_are_those_of_a_replay(policy, floats):
    """Mixed dimensions, some closed by force: what the sampler read at the score, against whole suffixes from the prefix."""

    class Forgetful(PrefixSampler):
        def __call__(self, *args):
            return replace(super().__call__(*args), at_score=None)

    prefix, seeds = policy.backbone.encode(floats, PROMPTS), list(range(9))
    rule = SamplingRule(length=9, suppressed=FEW)
    given = {"prefix": prefix, "dimensions": NAMES, "group_size": 3, "rule": rule, "seeds": seeds}
    rollouts, replayed = (Policy(policy.backbone, sampler).sample(**given) for sampler in (None, Forgetful()))
    assert 0 < rollouts.forced.sum() < 9
    assert traces(rollouts) == traces(replayed)
    assert rollouts.mask.sum(-1).diff().min() < 0  # ended in another order than they stand in
    torch.testing.assert_close(rollouts.logits, replayed.logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_sampling_leaves_the_prefix_as_it_was(policy, floats, monkeypatch):
    """Bit for bit; and what is sampled does not hang on how much room there is for it."""
    prefix, rule = policy.backbone.encode(floats, PROMPTS), SamplingRule(length=9, suppressed=FEW)
    states = [tensor for layer in prefix.layers for tensor in layer] + [prefix.mask, prefix.position]
    before, found = [tensor.clone() for tensor in states], []
    for room in (128, 1):
        monkeypatch.setattr(branches, "ROOM", room)
        found.append(policy.sample(prefix=prefix, dimensions=NAMES, group_size=3, rule=rule, seeds=list(range(9))))
        assert all(map(torch.equal, states, before))
    assert 0 < found[0].forced.sum() < 9
    assert traces(found[0]) == traces(found[1])
    torch.testing.assert_close(found[0].logits, found[1].logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_whole_sequences_answer_as_states_do(policy, floats):
    """A backbone without a usable cache, through the same doors."""
    prefix, rule = policy.backbone.encode(floats, PROMPTS), SamplingRule(length=5, suppressed=FEW)
    found = []
    for kind in (prefix, policy.backbone._read(floats, PROMPTS)):
        rollouts = policy.sample(prefix=kind, dimensions=NAMES, group_size=2, rule=rule, seeds=list(range(6)))
        found.append((rollouts, policy.evaluate(prefix=kind, rollouts=rollouts, rule=rule)))
    (states, evaluated), (whole, again) = found
    assert 0 < states.forced.sum() < 6
    assert traces(states) == traces(whole)
    torch.testing.assert_close(states.logits, whole.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(evaluated.log_probs, again.log_probs, atol=1e-5, rtol=0)


class Scripted:
    """Writes what it was told, as a server would."""

    def __init__(self, written):
        self.written, self.calls = written, []

    def __call__(self, backbone, prefix, row, openings, rule, forbidden, seeds):
        self.calls.append((row, openings, rule, forbidden.tolist(), seeds))
        return Written(self.written, [[-1.0] * len(trace) for trace in self.written])


@torch.no_grad()
def test_another_sampler(policy, floats):
    words = policy.backbone.prompts.user_ids("missing right nothing")
    sampler = Scripted([[*words, end(policy)], words[:2], [end(policy)]])
    scripted = Policy(policy.backbone, sampler=sampler)
    rule, prefix = SamplingRule(length=4, suppressed=(20,)), policy.backbone.encode(floats, PROMPTS)
    rollouts = scripted.sample(prefix=prefix, dimensions=NAMES, group_size=1, rule=rule, seeds=[5, 6, 7])
    row, openings, seen, forbidden, seeds = sampler.calls[0]
    assert (row, seen, seeds) == ([0, 1, 2], rule, [5, 6, 7])
    assert [policy.backbone.prompts.suffix_ids(name) for name in NAMES] == openings
    assert forbidden == sorted({*never(policy), 20})
    assert traces(rollouts) == sampler.written
    assert rollouts.forced.tolist() == [False, True, False]
    assert rollouts.log_probs.tolist() == [[-1.0] * 4, [-1.0] * 2 + [0.0] * 2, [-1.0] + [0.0] * 3]
    monkey = replace(rollouts, log_probs=None)  # whatever the sampler says
    found = policy.evaluate(prefix=prefix, rollouts=monkey, rule=SamplingRule(length=4, suppressed=FEW[-1:]))
    torch.testing.assert_close(found.scores.logits, rollouts.logits.log_softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [5, 128, 129, 1000])
def test_draw_by_a_running_sum(size):
    """Against a loop in float64, with tokens of no probability at both ends and in between."""
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(40, size, generator=generator)
    logits[:, [0, size // 2, size - 1]] = torch.where(torch.arange(40)[:, None] % 2 == 0, -torch.inf, 0.0)
    luck = torch.rand(40, dtype=torch.float64, generator=generator)
    luck[:4] = torch.tensor([0.0, 0.0, 1 - 2**-53, 1 - 2**-53])
    tokens, log_probs = draw(logits, 0.7, luck)
    for m in range(40):
        probs = (logits[m].double() / 0.7).softmax(-1)
        running, expected = 0.0, int(probs.nonzero().max())
        for token, p in enumerate(probs.tolist()):
            running += p
            if running > float(luck[m]):
                expected = token
                break
        assert tokens[m] == expected
        assert probs[tokens[m]] > 0
        torch.testing.assert_close(log_probs[m], probs[tokens[m]].log(), atol=1e-5, rtol=0)


def test_draw_of_rare_tokens_among_many():
    """Half of the mass on 150 000 tokens of 3e-6 each: no rounding eats them, and no row depends on its neighbours."""
    logits = torch.zeros(3, 150_001)
    logits[:, 0] = torch.tensor(150_000.0).log()
    luck = torch.tensor([0.49, 0.75, 0.9], dtype=torch.float64)
    tokens, _ = draw(logits, 1.0, luck)
    assert (tokens - torch.tensor([0, 75_000, 120_000])).abs().max() <= 1
    assert tokens.tolist() == [int(draw(logits[:1], 1.0, luck[m : m + 1])[0]) for m in range(3)]


def test_nan_in_the_logits(pictures):
    policy = Policy(build("qwen3_vl", uneven()).eval())
    prefix = policy.backbone.encode([p / 255 for p in pictures], PROMPTS)
    with torch.no_grad():
        for value in (torch.nan, torch.inf):
            prefix.layers[0][1][2] = value
            for temperature in (0.0, 1.0):
                with pytest.raises(
                    ValueError, match=r"2 of 6 traces have NaN or infinite logits \(first: row 2 of the prefix, t"
                ):
                    policy.sample(
                        prefix=prefix.fork(torch.tensor([0, 1, 2])),
                        dimensions=["alignment", "alignment", "realism"],
                        group_size=2,
                        rule=SamplingRule(temperature=temperature, length=3),
                    )


@pytest.mark.parametrize("way", ["sample", "evaluate", "score"])
def test_a_trace_that_does_not_fit_is_refused(policy, floats, way):
    """The last length that fits is that at which the longest row, written whole, fills the context."""
    prompts = policy.backbone.prompts
    texts = [chat(p, ASKED[name], thinking=True) for p, name in zip(PROMPTS, NAMES, strict=True)]
    images = [image.shape[1] * image.shape[2] // 256 for image in floats]  # tokens, of which the chat has one
    before = [len(policy.backbone.processor.tokenizer(text).input_ids) + n - 1 for text, n in zip(texts, images, strict=True)]
    longest = before.index(max(before))
    room = 7
    closing = 1 + 1 + 1  # the end, the marker, the label
    rollouts = sampled(policy, floats, length=room + 1, group_size=8)
    assert (rollouts.mask[rollouts.row == longest].sum(-1) == room + 1).any()
    prefix = policy.backbone.encode(floats, PROMPTS)
    whole, prompts.length = prompts.length, max(before) + room + closing
    try:
        if way == "sample":
            policy.sample(prefix, NAMES, 2, SamplingRule(length=room))
            with pytest.raises(
                ValueError,
                match=rf"^row {longest}: .* question have {max(before)} tokens, with a trace of 8, end and marker "
                rf"{prompts.length + 1}; the model reads {prompts.length}: sample by a rule of length 7 or less",
            ):
                policy.sample(prefix, NAMES, 2, SamplingRule(length=room + 1))
        else:
            read = partial(policy.evaluate, rule=SamplingRule(suppressed=FEW)) if way == "evaluate" else policy.score
            short = (rollouts.mask.sum(-1) <= room).nonzero().flatten()
            fitting = read(prefix=prefix, rollouts=rollouts.select(short))
            assert len(fitting.log_probs if way == "evaluate" else fitting.mean) == len(short) > 0
            with pytest.raises(ValueError, match=rf"^row {longest}: .* trace of 8.* length 7 or less"):
                read(prefix=prefix, rollouts=rollouts)
    finally:
        prompts.length = whole


def test_errors_of_evaluate(policy, floats):
    rollouts, prefix = sampled(policy, floats, length=3), policy.backbone.encode(floats, PROMPTS)
    with pytest.raises(ValueError, match="greedy traces have no log-probs to learn from"):
        policy.evaluate(prefix=prefix, rollouts=rollouts, rule=SamplingRule(temperature=0.0))
    with pytest.raises(ValueError, match="rollouts of row 2 for a prefix of 2 rows: give the prefix they came from"):
        policy.evaluate(prefix=prefix.fork(torch.tensor([0, 1])), rollouts=rollouts, rule=SamplingRule())
    token = int(rollouts.tokens[2, 0])
    first = rollouts.tokens.masked_fill(~rollouts.mask, -1).eq(token).any(-1).nonzero()[0].item()
    with pytest.raises(ValueError, match=f"rollout {first} holds the token {token}, which the rule suppresses"):
        policy.evaluate(prefix=prefix, rollouts=rollouts, rule=SamplingRule(suppressed=(token,)))
    for call in (policy.sample, policy.evaluate):
        rule = SamplingRule(suppressed=(5, -1, 10**6))
        given = {"dimensions": NAMES, "group_size": 1} if call == policy.sample else {"rollouts": rollouts}
        with pytest.raises(ValueError, match=r"suppressed ids must be in \[0, 61\), got \[-1, 1000000\]"):
            call(prefix=prefix, rule=rule, **given)


def test_errors(policy, floats):
    prefix = policy.backbone.encode(floats, PROMPTS)
    rule = SamplingRule(length=2)
    with pytest.raises(ValueError, match="2 dimensions for 3 rows, group size 1"):
        policy.sample(prefix=prefix, dimensions=NAMES[:2], group_size=1, rule=rule)
    with pytest.raises(ValueError, match="3 dimensions for 3 rows, group size 0"):
        policy.sample(prefix=prefix, dimensions=NAMES, group_size=0, rule=rule)
    with pytest.raises(ValueError, match=r"different names among .*'alignment'.*, got \['beauty'\]"):
        policy.sample(prefix=prefix, dimensions=["beauty"] * 3, group_size=1, rule=rule)
    for wrong in ({"temperature": -1.0}, {"length": 0}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match="a sampling rule needs temperature >= 0 and length >= 1"):
            SamplingRule(**wrong)
    with pytest.raises(ValueError, match="traces must be at least 1, got 0"):
        ReasoningReward(policy, traces=0)


def test_a_rubric_of_another_scale_cannot_reason(backbone):
    with pytest.raises(ValueError, match="another wording must keep the scale"):
        backbone.reworded(shapes.rubric(["realism"], reasoning=True))
