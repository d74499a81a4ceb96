import itertools
import math
import statistics
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Categorical, kl_divergence

from zr.losses import (
    K1,
    K2,
    K3,
    AbsoluteExpectationLoss,
    BatchAdvantage,
    CentredAdvantage,
    ClippedPolicyGradient,
    ExactGradientLoss,
    GapLoss,
    GroupAdvantage,
    K3ValueK2Gradient,
    LeaveOneOutAdvantage,
    PolicyGradient,
    RawAdvantage,
    ScoreReward,
    ScoreTarget,
    batch_advantage,
    clipped_policy_gradient_loss,
    exact_gradient_loss,
    group_advantage,
    k1,
    k2,
    k3,
    k3_value_k2_gradient,
    leave_one_out_advantage,
    on_policy_distillation_loss,
    pairwise_reward,
    pathwise_loss,
    pointwise_reward,
    policy_gradient_loss,
    score_function_weight,
    score_reward,
)
from zr.scores import ScoreDistribution

BINS = (1.0, 1.25, 2.0, 3.5, 10.0)
nan = float("nan")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


P, G, T = 4, 3, 6
LOGITS = draw(P, 2, G, len(BINS))
Q = ScoreDistribution(LOGITS, BINS)
SCORE = torch.tensor([[2.0, 3.5], [10.0, 1.0], [3.5, 3.5], [1.25, 7.0]], dtype=torch.float64)
NEW, OLD, REFERENCE = (-draw(P, 2, G, T, seed=s).abs() for s in (1, 2, 3))
ADVANTAGE = draw(P, 2, G, seed=4)
MASK = torch.arange(T) < torch.randint(1, T + 1, (P, 2, G, 1), generator=torch.Generator().manual_seed(5))
ADVANTAGES = [GroupAdvantage, BatchAdvantage, CentredAdvantage, LeaveOneOutAdvantage, RawAdvantage]
LOSSES = [PolicyGradient, ClippedPolicyGradient]
ESTIMATORS = {K1: k1, K2: k2, K3: k3, K3ValueK2Gradient: k3_value_k2_gradient}
named = {"ids": lambda part: part.__name__}


# Rewards


def test_rewards_are_equations_7_10_13():
    pt, pw = pointwise_reward(Q, SCORE), pairwise_reward(Q, SCORE)
    both = score_reward(Q, SCORE, 0.3, 2.0)
    torch.testing.assert_close(both, ScoreReward(0.3, 2.0)(Q, SCORE))
    mu = [[[sum(p * s for p, s in zip(row, BINS, strict=True)) for row in side] for side in pair] for pair in Q.probs.tolist()]
    for pair, j, i in itertools.product(range(P), range(2), range(G)):
        s, other = SCORE[pair].tolist(), 1 - j
        own = 1 - abs(mu[pair][j][i] - s[j]) / 9
        gaps = [abs((mu[pair][j][i] - mu[pair][other][k]) - (s[j] - s[other])) for k in range(G)]
        assert pt[pair, j, i].item() == pytest.approx(own)
        assert pw[pair, j, i].item() == pytest.approx(1 - sum(gaps) / G / 9)
        assert both[pair, j, i].item() == pytest.approx(0.3 * own + 2 * (1 - sum(gaps) / G / 9))


def test_rewards_fit_the_losses():
    target = ScoreTarget.from_scores(SCORE)
    torch.testing.assert_close(1 - pairwise_reward(Q, SCORE).mean((-2, -1)), GapLoss()(Q, target))
    flat = ScoreTarget.from_scores(SCORE[..., None].expand(P, 2, G))
    torch.testing.assert_close(1 - pointwise_reward(Q, SCORE), AbsoluteExpectationLoss()(Q, flat))
    torch.testing.assert_close(pathwise_loss(Q, SCORE, 0.3, 2.0), 2.3 - score_reward(Q, SCORE, 0.3, 2.0).mean((-2, -1)))


def test_rewards_by_hand():
    sure = ScoreDistribution(torch.eye(3).log()[torch.tensor([[2, 1], [0, 1]])], (1.0, 3.0, 5.0))  # means 5, 3 and 1, 3
    score = torch.tensor([5.0, 2.0])
    assert pointwise_reward(sure, score).tolist() == [[1.0, 0.5], [0.75, 0.75]]
    assert pairwise_reward(sure, score).tolist() == [[0.75, 0.5], [0.75, 0.5]]  # gaps 4, 2 and 2, 0 against 3
    far = ScoreDistribution(torch.eye(2).log()[torch.tensor([[0], [1]])], (1.0, 5.0))
    assert pairwise_reward(far, torch.tensor([5.0, 1.0])).tolist() == [[-1.0], [-1.0]]  # the least there is
    assert score_reward(far, torch.tensor([1.0, 5.0]), 0.5, 1.0).tolist() == [[1.5], [1.5]]  # the most


def test_rewards_follow_their_rollouts():
    order = torch.tensor([2, 0, 1])
    swapped = score_reward(ScoreDistribution(LOGITS.flip(1), BINS), SCORE.flip(1))
    torch.testing.assert_close(swapped, score_reward(Q, SCORE).flip(1))
    torch.testing.assert_close(score_reward(Q[:, :, order], SCORE), score_reward(Q, SCORE)[:, :, order])
    shuffled = ScoreDistribution(torch.stack([LOGITS[:, 0, order], LOGITS[:, 1]], 1), BINS)
    torch.testing.assert_close(score_reward(shuffled, SCORE)[:, 1], score_reward(Q, SCORE)[:, 1])
    torch.testing.assert_close(pairwise_reward(Q, SCORE + 1), pairwise_reward(Q, SCORE))


def test_reward_errors():
    for function in (pairwise_reward, score_reward):
        with pytest.raises(ValueError, match=r"batch shape \(..., 2, G\).* got \(4,\)"):
            function(Q[:, 0, 0], SCORE)
        with pytest.raises(ValueError, match=r"target.score must have the shape \(4, 2\), got \(4,\)"):
            function(Q, SCORE[:, 0])
    with pytest.raises(ValueError, match=r"score must have the shape \(4, 2\), got \(4, 1\)"):
        pointwise_reward(Q, SCORE[:, :1])
    with pytest.raises(ValueError, match=r"batch shape \(..., G\), G outputs for each item, got \(\)"):
        pointwise_reward(Q[0, 0, 0], torch.tensor(1.0))
    for weights in ((0.0, 0.0), (-1.0, 1.0), (1.0, nan)):
        with pytest.raises(ValueError, match="weights of a reward must be at least 0 and not both 0"):
            ScoreReward(*weights)
        with pytest.raises(ValueError, match="weights of a reward"):
            pathwise_loss(Q, SCORE, *weights)


# Advantages


def naive_advantage(part, rewards, kept, everything):
    counted = [r for r, k in zip(rewards, kept, strict=True) if k]
    mean = statistics.mean(counted) if counted else 0.0
    result = []
    for i, (r, k) in enumerate(zip(rewards, kept, strict=True)):
        others = [x for n, (x, y) in enumerate(zip(rewards, kept, strict=True)) if y and n != i]
        if not k:
            result.append(0.0)
        elif part is RawAdvantage:
            result.append(r)
        elif len(counted) < 2:
            result.append(0.0)
        elif part is GroupAdvantage:
            result.append((r - mean) / (statistics.stdev(counted) + 1e-3))
        elif part is BatchAdvantage:
            result.append((r - mean) / (statistics.stdev(everything) + 1e-3))
        elif part is CentredAdvantage:
            result.append(r - mean)
        else:
            result.append(r - statistics.mean(others))
    return result


@pytest.mark.parametrize("part", ADVANTAGES, **named)
@pytest.mark.parametrize("masked", [False, True])
def test_advantages_against_a_loop(part, masked):
    reward = draw(5, 2, 4)
    kept = torch.ones(5, 2, 4, dtype=torch.bool)
    if masked:
        kept[0, 0, 1] = kept[1, 1, 0] = kept[1, 1, 3] = False
        kept[2, 0] = False
        kept[3, 1] = torch.tensor([False, True, False, False])
        reward[~kept] = nan
    value = part()(reward, kept if masked else None)
    everything = reward[kept].tolist()
    for a, b in itertools.product(range(5), range(2)):
        expected = naive_advantage(part, reward[a, b].tolist(), kept[a, b].tolist(), everything)
        assert value[a, b].tolist() == pytest.approx(expected)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(part()(reward[..., order], kept[..., order]), value[..., order])


def test_advantages_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(group_advantage(reward, floor=1e-9), torch.tensor([[1.5, -0.5, -0.5, -0.5]]))  # std 1/2
    torch.testing.assert_close(leave_one_out_advantage(reward), torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]))
    torch.testing.assert_close(leave_one_out_advantage(reward) * 3 / 4, CentredAdvantage()(reward))
    assert batch_advantage(reward[:, :2], torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("part", ADVANTAGES[:-1], **named)
def test_a_group_without_spread_has_no_advantage(part):
    value = part()(torch.tensor([[0.1] * 7, [0.7] * 7], dtype=torch.float32))
    assert (value == 0).all()  # exactly: the mean of seven 0.1 is not 0.1


def test_the_floor_keeps_noise_small():
    noise = 0.8 + 1e-6 * draw(100, 8)
    assert group_advantage(noise).abs().max() < 5e-3
    assert group_advantage(noise, floor=1e-12).abs().max() > 1


@pytest.mark.parametrize("part", ADVANTAGES, **named)
def test_advantages_are_constants_in_wide_precision(part):
    reward = draw(3, 4).bfloat16().requires_grad_()
    value = part()(reward)
    assert value.dtype == torch.float32
    assert not value.requires_grad
    assert value.isfinite().all()
    assert part()(reward[:0]).shape == (0, 4)
    assert not part()(reward, torch.zeros(3, 4, dtype=torch.bool)).any()


@pytest.mark.parametrize("part", ADVANTAGES, **named)
def test_advantage_errors(part):
    with pytest.raises(ValueError, match=r"reward must be \(..., G\), G >= 2, got \(3, 1\)"):
        part()(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"kept must have the shape \(3, 2\), got \(2,\)"):
        part()(torch.zeros(3, 2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"kept must be a bool tensor, got torch.float32"):
        part()(torch.zeros(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"1 rewards are not finite \(first at index \[1, 0\]\)"):
        part()(torch.tensor([[0.0, 1.0], [nan, 1.0]]))
    if part in (GroupAdvantage, BatchAdvantage):
        with pytest.raises(ValueError, match="floor must be positive, got 0"):
            part(floor=0.0)
        assert repr(part()) == f"{part.__name__}(floor=0.001)"


# Policy gradients


def token_sum(values):
    """Sums over the sampled tokens of each rollout, in a loop."""
    total = torch.zeros(values.shape[:-1], dtype=values.dtype)
    for index in itertools.product(*map(range, total.shape)):
        total[index] = sum(values[index][t] for t in range(T) if MASK[index][t])
    return total


def test_policy_gradient_is_equation_4():
    value = policy_gradient_loss(NEW, ADVANTAGE, MASK)
    torch.testing.assert_close(value, -ADVANTAGE * token_sum(NEW))
    torch.testing.assert_close(PolicyGradient(length=50)(NEW, OLD, ADVANTAGE, MASK), value / 50)
    lengths = MASK.sum(-1)
    torch.testing.assert_close(policy_gradient_loss(NEW, ADVANTAGE, MASK, lengths), value / lengths)


def naive_clip(low, high):
    value = torch.zeros(P, 2, G, T, dtype=torch.float64)
    for index in itertools.product(range(P), range(2), range(G), range(T)):
        ratio, a = math.exp(NEW[index] - OLD[index]), ADVANTAGE[index[:-1]].item()
        value[index] = -min(ratio * a, max(1 - low, min(1 + high, ratio)) * a)
    return value


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.5), (1.0, 1e3)])
def test_clipping_against_a_loop(low, high):
    value = clipped_policy_gradient_loss(NEW, OLD, ADVANTAGE, MASK, low=low, high=high)
    torch.testing.assert_close(value, token_sum(naive_clip(low, high)))
    torch.testing.assert_close(ClippedPolicyGradient(7.0, low, high)(NEW, OLD, ADVANTAGE, MASK), value / 7)


def test_clipping_by_hand():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().unsqueeze(-1).requires_grad_()
    advantage = torch.tensor([2.0, -2.0, 2.0, -2.0])
    value = clipped_policy_gradient_loss(ratio, torch.zeros(4, 1), advantage, torch.ones(4, 1, dtype=torch.bool))
    torch.testing.assert_close(value, torch.tensor([-2.4, 3.0, -1.0, 1.6]))
    value.sum().backward()
    # Only what would go further away stops counting: the first and the last.
    torch.testing.assert_close(ratio.grad.flatten(), torch.tensor([0.0, 3.0, -1.0, 0.0]))


@pytest.mark.parametrize("length", [1.0, 64.0])
def test_at_equal_weights_clipping_has_no_influence_on_the_gradient(length):
    gradients = []
    for part in LOSSES:
        log_probs = NEW.clone().requires_grad_()
        part(length)(log_probs, log_probs, ADVANTAGE, MASK).mean().backward()
        gradients.append(log_probs.grad)
    torch.testing.assert_close(*gradients)
    expected = torch.where(MASK, -ADVANTAGE[..., None] / length / (P * 2 * G), 0.0)
    torch.testing.assert_close(gradients[0], expected)


@pytest.mark.parametrize("part", LOSSES, **named)
def test_the_split_into_micro_batches_has_no_influence(part):
    whole = part()(NEW, OLD, ADVANTAGE, MASK)
    flat = [x.flatten(0, 2) for x in (NEW, OLD, ADVANTAGE, MASK)]
    parts = [part()(*(x[i : i + 5] for x in flat)) for i in range(0, P * 2 * G, 5)]
    torch.testing.assert_close(torch.cat(parts), whole.flatten())
    # Padding neither.
    padded = [torch.nn.functional.pad(x, (0, 3), value=fill) for x, fill in ((NEW, nan), (OLD, nan), (MASK, False))]
    torch.testing.assert_close(part()(padded[0], padded[1], ADVANTAGE, padded[2]), whole)


FUNCTIONS = {
    "plain": lambda x: policy_gradient_loss(x, ADVANTAGE, MASK, 3.0),
    "clipped": lambda x: clipped_policy_gradient_loss(x, OLD, ADVANTAGE, MASK, 3.0),
    "distillation": lambda x: on_policy_distillation_loss(x, OLD, REFERENCE, MASK),
    "k1": lambda x: K1()(x, REFERENCE, MASK),
    "k2": lambda x: K2()(x, REFERENCE, MASK),
    "k3": lambda x: K3()(x, REFERENCE, MASK),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradients(function):
    assert gradcheck(function, NEW.clone().requires_grad_())


@pytest.mark.parametrize("function", [*FUNCTIONS.values(), lambda x: K3ValueK2Gradient()(x, REFERENCE, MASK)])
def test_what_is_not_sampled_is_selected_out(function):
    log_probs = torch.where(MASK, NEW, nan).requires_grad_()
    value = function(log_probs)
    torch.testing.assert_close(value, function(NEW))
    value.sum().backward()
    assert (log_probs.grad[~MASK] == 0).all()
    assert log_probs.grad.isfinite().all()


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, torch.bfloat16), (1e6, torch.float32)], ids=["bfloat16", "extreme"])
@pytest.mark.parametrize("part", [*LOSSES, *ESTIMATORS, on_policy_distillation_loss], **named)
def test_values_and_gradients_are_finite(part, scale, dtype):
    new, old = (scale * NEW).to(dtype).requires_grad_(), (scale * OLD).to(dtype)
    if part in LOSSES:
        value = part()(new, old, ADVANTAGE.to(dtype), MASK)
    elif part in ESTIMATORS:
        value = part()(new, old, MASK)
    else:
        value = part(new, old, (scale * REFERENCE).to(dtype), MASK)
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    value.sum().backward()
    assert new.grad.isfinite().all()


def test_policy_loss_errors():
    cut = MASK[..., :2]
    for part in LOSSES:
        with pytest.raises(ValueError, match=r"log_probs must have the shape \(4, 2, 3, 2\), got \(4, 2, 3, 6\)"):
            part()(NEW, OLD, ADVANTAGE, cut)
        with pytest.raises(ValueError, match=r"advantage must have the shape \(4, 2, 3\), got \(4, 2, 3, 6\)"):
            part()(NEW, OLD, NEW, MASK)
        with pytest.raises(ValueError, match=r"mask must be a bool tensor, got torch.float64"):
            part()(NEW, OLD, ADVANTAGE, MASK.double())
        for length in (0.0, -1.0, nan):
            with pytest.raises(ValueError, match="length, the constant L"):
                part(length)
    with pytest.raises(ValueError, match=r"mask must be \(..., T\), T tokens of each rollout, got \(\)"):
        policy_gradient_loss(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(True))
    with pytest.raises(ValueError, match=r"length must have the shape \(4, 2, 3\), got \(\)"):
        policy_gradient_loss(NEW, ADVANTAGE, MASK, torch.tensor(3.0))
    with pytest.raises(ValueError, match="length must be positive: leave out rollouts without a sampled token"):
        policy_gradient_loss(NEW, ADVANTAGE, MASK, torch.zeros(P, 2, G))
    with pytest.raises(ValueError, match=r"old_log_probs must have the shape \(4, 2, 3, 6\), got \(4, 2, 3, 5\)"):
        clipped_policy_gradient_loss(NEW, OLD[..., :5], ADVANTAGE, MASK)
    with pytest.raises(ValueError, match=r"teacher_log_probs must have the shape"):
        on_policy_distillation_loss(NEW, OLD, REFERENCE[0], MASK)
    for bounds in ((-0.1, 0.2), (1.1, 0.2), (0.2, -0.1)):
        with pytest.raises(ValueError, match=r"clipping needs low in \[0, 1\] and high >= 0"):
            ClippedPolicyGradient(1.0, *bounds)
    assert repr(ClippedPolicyGradient(8)) == "ClippedPolicyGradient(length=8, low=0.2, high=0.2)"
    assert repr(PolicyGradient()) == "PolicyGradient(length=1)"


# The same numbers in TRL


def trl_by_hand(loss_type, beta, longest):
    """TRL's formula for its "grpo" and "dr_grpo" losses, a token at a time."""
    rollouts = list(itertools.product(range(P), range(2), range(G)))
    total = 0.0
    for index in rollouts:
        tokens = [t for t in range(T) if MASK[index][t]]
        for t in tokens:
            ratio, a = math.exp(NEW[index][t] - OLD[index][t]), ADVANTAGE[index].item()
            back = (REFERENCE[index][t] - NEW[index][t]).item()
            each = -min(ratio * a, max(0.8, min(1.2, ratio)) * a) + beta * (math.exp(back) - back - 1)
            total += each / (len(tokens) if loss_type == "grpo" else longest) / len(rollouts)
    return total


def trl_itself(loss_type, beta, longest):
    """What TRL's trainer computes, with all but the loss left out."""
    trainer = pytest.importorskip("trl", reason="TRL is a benchmark extra").GRPOTrainer
    new, old, reference, mask = (x.flatten(0, 2) for x in (NEW, OLD, REFERENCE, MASK))
    stub = MagicMock(
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        model=SimpleNamespace(training=False),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (new, torch.zeros_like(new), None),
        loss_type=loss_type,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.2,
        max_completion_length=longest,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
    )
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": ADVANTAGE.flatten(),
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
    }
    return trainer._compute_loss(stub, None, inputs).item()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("oracle", [trl_by_hand, trl_itself], **named)
def test_trl(loss_type, beta, oracle):
    longest = 40
    length = MASK.sum(-1) if loss_type == "grpo" else longest
    policy = clipped_policy_gradient_loss(NEW, OLD, ADVANTAGE, MASK, length)
    distance = K3(length=1.0)(NEW, REFERENCE, MASK) / length
    assert (policy + beta * distance).mean().item() == pytest.approx(oracle(loss_type, beta, longest), abs=1e-6)


# By enumeration: the exact gradient, estimators of the KL, distillation


class Traces:
    """A model with three traces per side, "a", "ba" and "bb", a score distribution after each, and all that G = 2 can draw."""

    bins = (1.0, 2.0, 4.0, 5.0)
    score = torch.tensor([3.7, 2.2], dtype=torch.float64)
    mask = torch.tensor([[True, False], [True, True], [True, True]])

    def __init__(self):
        self.first, self.second, self.answers = (
            draw(*s, seed=n).requires_grad_() for n, s in enumerate([(2, 2), (2, 2), (2, 3, 4)])
        )
        drawn = torch.tensor(list(itertools.product(range(3), repeat=4))).reshape(-1, 2, 2)
        side = torch.arange(2)[:, None].expand(2, 2)
        a, b = self.first.log_softmax(-1), self.second.log_softmax(-1)
        trace = torch.stack(
            [torch.stack([a[:, 0], torch.full_like(a[:, 0], nan)], -1), *(torch.stack([a[:, 1], b[:, i]], -1) for i in (0, 1))],
            1,
        )
        self.log_probs, self.sampled = trace[side, drawn], self.mask[drawn]  # (81, 2, 2, T)
        self.prediction = ScoreDistribution(self.answers[side, drawn], self.bins)
        self.probability = torch.where(self.sampled, self.log_probs, 0.0).sum((-3, -2, -1)).exp()
        self.batch_score = self.score.expand(81, 2)

    def expected_reward(self, pointwise, pairwise):
        """J, by the definition."""
        reward = score_reward(self.prediction, self.batch_score, pointwise, pairwise)
        return (self.probability * reward.mean((-2, -1))).sum()

    def expected(self, values):
        """The mean over what is drawn, with gradient in the values alone."""
        return (self.probability.detach() * values).sum()

    def gradient(self, scalar, answers=True):
        leaves = [self.first, self.second, *([self.answers] if answers else [])]
        parts = torch.autograd.grad(scalar, leaves, retain_graph=True, materialize_grads=True)
        return torch.cat([p.flatten() for p in parts])

    def printed(self, part, pointwise, pairwise):
        """Expected gradient of (4), with a choice of advantages."""
        advantage = part(score_reward(self.prediction, self.batch_score, pointwise, pairwise))
        loss = policy_gradient_loss(self.log_probs, advantage, self.sampled).mean((-2, -1))
        return self.gradient(self.expected(loss), answers=False)


@pytest.fixture(scope="module")
def traces():
    return Traces()


WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.7, 1.9)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_exact_variant_is_the_gradient_of_the_expected_reward(traces, weights):
    assert traces.probability.sum().item() == pytest.approx(1.0)
    values = ExactGradientLoss(*weights)(traces.prediction, traces.batch_score, traces.log_probs, traces.sampled)
    assert values.shape == (81,)
    ours = traces.gradient(traces.expected(values))
    exact = traces.gradient(traces.expected_reward(*weights))
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(ours, -exact, rtol=1e-10, atol=1e-12)


def test_its_parts_are_those_of_the_library(traces):
    q, score = traces.prediction, traces.batch_score
    advantage = LeaveOneOutAdvantage()(ScoreReward(0.7, 2 * 1.9)(q, score))
    torch.testing.assert_close(advantage, score_function_weight(q, score, 0.7, 1.9))
    policy = PolicyGradient()(traces.log_probs, traces.log_probs, advantage, traces.sampled).mean((-2, -1))
    each = AbsoluteExpectationLoss()(q, ScoreTarget.from_scores(score[..., None].expand(81, 2, 2))).mean((-2, -1))
    direct = 0.7 * each + 1.9 * GapLoss()(q, ScoreTarget.from_scores(score))
    whole = exact_gradient_loss(q, score, traces.log_probs, traces.sampled, 0.7, 1.9)
    torch.testing.assert_close(policy + direct, whole)
    # L_pw is exactly the pathwise half of r_pw.
    (half,) = torch.autograd.grad(traces.expected_reward(0.0, 1.0), traces.answers, retain_graph=True)
    gap = traces.expected(GapLoss()(q, ScoreTarget.from_scores(score)))
    torch.testing.assert_close(torch.autograd.grad(gap, traces.answers, retain_graph=True)[0], -half)


def test_the_printed_form_differs_as_the_method_says(traces):
    pointwise, pairwise = (traces.gradient(traces.expected_reward(*w), answers=False) for w in WEIGHTS[:2])
    groups = 2
    # The group mean scales by (G - 1) / G; the pairwise part has half its weight.
    centred = traces.printed(CentredAdvantage(), 0.7, 1.9)
    torch.testing.assert_close(centred, -(groups - 1) / groups * (0.7 * pointwise + 1.9 * pairwise / 2))
    torch.testing.assert_close(traces.printed(LeaveOneOutAdvantage(), 1.0, 0.0), -pointwise)
    torch.testing.assert_close(traces.printed(LeaveOneOutAdvantage(), 0.0, 1.0), -pairwise / 2)
    torch.testing.assert_close(traces.printed(RawAdvantage(), 0.7, 1.9), -(0.7 * pointwise + 1.9 * pairwise / 2))
    # 1 / std turns it.
    scaled = traces.printed(GroupAdvantage(), 1.0, 0.0)
    cosine = torch.cosine_similarity(scaled, -pointwise, dim=0).item()
    assert 0 < cosine < 0.999


def test_exact_gradient_shapes():
    value = exact_gradient_loss(Q, SCORE, NEW, MASK)
    assert value.shape == (P,)
    torch.testing.assert_close(exact_gradient_loss(Q[2], SCORE[2], NEW[2], MASK[2]), value[2])
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(exact_gradient_loss(Q[:, :, order], SCORE, NEW[:, :, order], MASK[:, :, order]), value)
    swapped = exact_gradient_loss(ScoreDistribution(LOGITS.flip(1), BINS), SCORE.flip(1), NEW.flip(1), MASK.flip(1))
    torch.testing.assert_close(swapped, value)
    assert not score_function_weight(ScoreDistribution(LOGITS.clone().requires_grad_(), BINS), SCORE).requires_grad
    with pytest.raises(ValueError, match=r"reward must be \(..., G\), G >= 2"):
        score_function_weight(Q[:, :, :1], SCORE)
    with pytest.raises(ValueError, match=r"advantage must have the shape \(4, 2\), got \(4, 2, 3\)"):
        exact_gradient_loss(Q, SCORE, NEW[:, :, 0], MASK[:, :, 0])
    assert repr(ExactGradientLoss(0.5)) == "ExactGradientLoss(pointwise=0.5, pairwise=1)"


def categorical(seed):
    logits = draw(5, seed=seed).requires_grad_()
    return logits, Categorical(logits=logits)


def gradient_of(scalar, leaf):
    return torch.autograd.grad(scalar, leaf, retain_graph=True, materialize_grads=True)[0]


@pytest.mark.parametrize("part", ESTIMATORS, **named)
def test_the_divergence_that_an_estimator_descends(part):
    logits, policy = categorical(0)
    reference = Categorical(logits=draw(5, seed=1))
    each = part()(policy.logits[:, None], reference.logits[:, None], torch.ones(5, 1, dtype=torch.bool))  # all tokens, T = 1
    ours = gradient_of((policy.probs.detach() * each).sum(), logits)
    toward, back = kl_divergence(policy, reference), kl_divergence(reference, policy)
    expected = {
        K1: torch.zeros(5, dtype=torch.float64),
        K2: gradient_of(toward, logits),
        K3: gradient_of(back, logits),
        K3ValueK2Gradient: gradient_of(toward, logits),
    }[part]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert (gradient_of(toward, logits) - gradient_of(back, logits)).abs().max() > 0.05  # they can be told apart
    if part is not K2:  # K2's value is biased
        assert (policy.probs * each).sum().item() == pytest.approx(toward.item())


@pytest.mark.parametrize("part", [K2, K3], **named)
def test_in_a_sequence_each_position_counts_with_its_prefix_fixed(part, traces):
    # Side 0's traces "a", "ba", "bb": the first token is drawn always, the second after "b".
    first, second = Categorical(logits=traces.first[0]), Categorical(logits=traces.second[0])
    other = [Categorical(logits=draw(2, seed=s)) for s in (7, 8)]
    log_probs = torch.stack([first.logits[[0, 1, 1]], torch.stack([first.logits[0], *second.logits])], -1)
    reference = torch.stack([other[0].logits[[0, 1, 1]], torch.stack([first.logits[0] + nan, *other[1].logits])], -1)
    probability = torch.where(traces.mask, log_probs, 0.0).sum(-1).exp().detach()
    ours = (probability * part()(log_probs, reference, traces.mask)).sum()
    sides = [(first, other[0]), (second, other[1])]
    each = [kl_divergence(*(pair if part is K2 else pair[::-1])) for pair in sides]
    expected = each[0] + first.probs[1].detach() * each[1]
    torch.testing.assert_close(traces.gradient(ours), traces.gradient(expected))


@pytest.mark.parametrize("part", ESTIMATORS, **named)
def test_estimators_against_a_loop(part):
    formula = {
        K1: lambda d: d,
        K2: lambda d: d * d / 2,
        K3: lambda d: math.exp(-d) - 1 + d,
        K3ValueK2Gradient: lambda d: math.exp(-d) - 1 + d,
    }[part]
    each = torch.tensor([formula(d) for d in (NEW - REFERENCE).flatten().tolist()], dtype=torch.float64)
    torch.testing.assert_close(part(length=4.0)(NEW, REFERENCE, MASK), token_sum(each.reshape(NEW.shape)) / 4)
    torch.testing.assert_close(ESTIMATORS[part](NEW, REFERENCE), each.reshape(NEW.shape))
    same = NEW.clone().requires_grad_()
    value = part()(same, NEW, MASK)
    assert (value == 0).all()
    if part is not K1:  # the minimum
        value.sum().backward()
        assert (same.grad == 0).all()


def test_estimator_errors():
    for part, function in ESTIMATORS.items():
        with pytest.raises(ValueError, match=r"reference_log_probs must have the shape \(4, 2, 3, 6\), got \(2, 3, 6\)"):
            part()(NEW, REFERENCE[0], MASK)
        with pytest.raises(ValueError, match=r"reference_log_probs must have the shape"):
            function(NEW, REFERENCE[0])
        with pytest.raises(ValueError, match="length, the constant L"):
            part(0.0)
        assert repr(part()) == f"{part.__name__}(length=1)"


def test_on_policy_distillation_is_equations_18_and_19():
    value = on_policy_distillation_loss(NEW, OLD, REFERENCE, MASK)
    torch.testing.assert_close(value, -token_sum((REFERENCE - OLD) * NEW) / MASK.sum(-1))
    empty = on_policy_distillation_loss(NEW, OLD, REFERENCE, torch.zeros_like(MASK))
    assert (empty == 0).all()
    leaves = [x.clone().requires_grad_() for x in (OLD, REFERENCE)]
    new = NEW.clone().requires_grad_()
    on_policy_distillation_loss(new, *leaves, MASK).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)  # the advantages are constants


def test_on_policy_distillation_descends_the_divergence_from_the_teacher():
    logits, student = categorical(0)
    teacher = Categorical(logits=draw(5, seed=1))
    new, given = student.logits[:, None], teacher.logits[:, None]
    each = on_policy_distillation_loss(new, new, given, torch.ones(5, 1, dtype=torch.bool))
    ours = gradient_of((student.probs.detach() * each).sum(), logits)
    torch.testing.assert_close(ours, gradient_of(kl_divergence(student, teacher), logits))
