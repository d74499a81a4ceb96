"""Traces against stock ``generate`` and the plain forward on each whole sequence."""

import pytest
import torch
from plain import chat, forward
from scipy.stats import chisquare

from zr.data import shapes
from zr.models import Policy, ReasoningReward, SamplingRule

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


@pytest.fixture(scope="module")
def policy(thinker):
    return Policy(thinker)


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
        text = chat(PROMPTS[row], NAMES[row], thinking=True)
        logits = forward(policy.backbone, text, [floats[row]], [*closed, *marker])[2][-1]
        torch.testing.assert_close(rollouts.logits[m], logits[labels], atol=1e-5, rtol=0)


def test_greedy_is_stock_generate(policy, floats):
    rollouts = sampled(policy, floats, group_size=1, temperature=0.0, length=15)
    backbone = policy.backbone
    for m, trace in enumerate(traces(rollouts)):
        pil = (floats[m] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        text = chat(PROMPTS[m], NAMES[m], thinking=True)
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
    text = chat("red ring", "realism", images=0, thinking=True)
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
