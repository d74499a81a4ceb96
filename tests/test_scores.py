import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch.autograd import gradcheck
from torch.distributions import Categorical

from zr.scores import ScoreDistribution, bin_index, kl_divergence

UNEVEN = (1.0, 1.25, 2.0, 3.5, 10.0)
SHAPES = [(), (3,), (2, 4)]
quick = settings(max_examples=60, deadline=None, derandomize=True)


def draw(*shape, bins=UNEVEN, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ScoreDistribution(2 * torch.randn(*shape, len(bins), generator=generator, dtype=dtype), bins)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_categorical(shape):
    q = draw(*shape)
    oracle = Categorical(logits=q.logits)
    torch.testing.assert_close(q.probs, oracle.probs)
    torch.testing.assert_close(q.entropy(), oracle.entropy())
    for i, s in enumerate(UNEVEN):
        torch.testing.assert_close(q.log_prob(s), oracle.log_prob(torch.tensor(i)).expand(shape))
    other = draw(*shape, seed=1)
    torch.testing.assert_close(
        kl_divergence(q, other), torch.distributions.kl_divergence(oracle, Categorical(logits=other.logits))
    )
    assert q.batch_shape == shape
    assert q.event_shape == ()


def test_agrees_with_scipy_for_uneven_bins():
    q = draw(6)
    grid = (0.0, 1.0, 1.1, 1.25, 3.4999, 3.5, 9.9, 10.0, 11.0)
    for row in range(6):
        oracle = stats.rv_discrete(values=(UNEVEN, q.probs[row].numpy()))
        one = q[row]
        assert one.mean.item() == pytest.approx(oracle.mean())
        assert one.variance.item() == pytest.approx(oracle.var())
        assert one.stddev.item() == pytest.approx(oracle.std())
        assert one.entropy().item() == pytest.approx(oracle.entropy())
        assert one.cdf(torch.tensor(grid, dtype=torch.float64)).tolist() == pytest.approx(oracle.cdf(grid), abs=1e-12)
        levels = [0.01, 0.2, 0.5, 0.77, 0.99]
        assert one.quantile(torch.tensor(levels, dtype=torch.float64)).tolist() == oracle.ppf(levels).tolist()


def test_an_empty_batch():
    q = draw(0)
    for value in (q.mean, q.variance, q.entropy(), q.log_prob(2.0), q.cdf(2.0), q.quantile(0.5), kl_divergence(q, q)):
        assert value.shape == (0,)


def test_hand_worked_numbers():
    q = ScoreDistribution(torch.tensor([0.25, 0.5, 0.25]).log(), bins=(1.0, 2.0, 5.0))
    assert q.mean.item() == pytest.approx(2.5)
    assert q.variance.item() == pytest.approx(0.25 * 2.25 + 0.5 * 0.25 + 0.25 * 6.25)
    assert q.mode.item() == 2.0
    assert q.cdf(1.999).item() == pytest.approx(0.25)
    assert q.cdf(2.0).item() == pytest.approx(0.75)
    assert [q.quantile(x).item() for x in (0.0, 0.25, 0.26, 0.75, 0.76, 1.0)] == [1.0, 1.0, 2.0, 2.0, 5.0, 5.0]
    assert ScoreDistribution(torch.zeros(3), bins=(1.0, 2.0, 5.0)).mode.item() == 1.0  # the lower one of a tie


def test_log_prob_takes_scores_not_indices():
    q = ScoreDistribution(torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), bins=(0.0, 1.0, 2.0, 3.0))
    shifted = ScoreDistribution(q.logits, bins=(1.0, 2.0, 3.0, 4.0))
    assert shifted.log_prob(3.0).exp().item() == pytest.approx(0.3)
    assert q.log_prob(3.0).exp().item() == pytest.approx(0.4)


def test_broadcasting():
    q = draw(2, 1, bins=(1.0, 3.0, 5.0))
    values = torch.tensor([1.0, 3.0, 5.0])
    torch.testing.assert_close(q.log_prob(values), q.logits.squeeze(1))
    torch.testing.assert_close(q.cdf(values), q.probs.squeeze(1).cumsum(-1))
    assert q.quantile(torch.tensor([0.0, 0.5, 1.0])).shape == (2, 3)


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (2.2, r"score 2.2 is no bin: its neighbours are 2 and 3.5 \(bins: 1, 1.25, 2, 3.5, 10\)"),
        (0.0, r"score 0 is no bin: its neighbours are 1 "),
        (11.0, r"score 11 is no bin: its neighbours are 10 "),
        (float("nan"), r"a score is NaN: unknown scores must be left out"),
    ],
)
def test_a_score_that_is_no_bin(score, text):
    with pytest.raises(ValueError, match=text):
        draw(2).log_prob(torch.tensor([1.0, score]))


def test_bin_index_forgives_rounding_only():
    bins = torch.tensor([1.0, 4 / 3, 5 / 3])
    assert bin_index(torch.tensor([1.0, 1.3333334, 1.6666666]), bins).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no bin"):
        bin_index(torch.tensor([1.334]), bins)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"got logits \(2, 4\) and bins \(3,\)"):
        ScoreDistribution(torch.zeros(2, 4), (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"logits \(\)"):
        ScoreDistribution(torch.tensor(0.0), (1.0, 2.0))
    for bins in ((1.0, 1.0), (2.0, 1.0), (1.0, float("nan")), (1.0,)):
        with pytest.raises(ValueError, match="strictly ascending"):
            ScoreDistribution(torch.zeros(len(bins)), bins)
    with pytest.raises(ValueError, match=r"1 of 2 score distributions have NaN .*first at flat index 1"):
        ScoreDistribution(torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]), (1.0, 2.0))
    for row in ([torch.inf, 0.0], [-torch.inf, -torch.inf]):
        with pytest.raises(ValueError, match="NaN or infinite logits"):
            ScoreDistribution(torch.tensor(row), (1.0, 2.0))
    with pytest.raises(ValueError, match=r"off_scale must have the batch shape \(2,\), got \(3,\)"):
        ScoreDistribution(torch.zeros(2, 2), (1.0, 2.0), off_scale=torch.zeros(3))
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], got 1.5"):
        draw().quantile(1.5)
    with pytest.raises(ValueError, match=r"batch dimension in \[-1, 1\), got 1"):
        draw(3).mixture(1)


def test_off_scale():
    with pytest.raises(ValueError, match="Build the head with off_scale=True"):
        _ = draw(2).off_scale
    q = ScoreDistribution(torch.zeros(2, 3, 2), (1.0, 2.0), off_scale=torch.arange(6.0).reshape(2, 3) / 10)
    assert q[1].off_scale.tolist() == pytest.approx([0.3, 0.4, 0.5])
    assert q[..., 0].off_scale.tolist() == pytest.approx([0.0, 0.3])
    assert q.mixture(0).off_scale.tolist() == pytest.approx([0.15, 0.25, 0.35])
    assert q[:, :1].expand((2, 4)).off_scale.shape == (2, 4)
    assert q.detach().to(torch.float64).off_scale.dtype == torch.float64


def test_indexing_is_of_the_batch():
    q = draw(2, 4)
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    for index in (0, (1, 2), (..., 3), (slice(None), -1), None, (None, 0), [1, 0], mask, torch.tensor([1, 1])):
        torch.testing.assert_close(q[index].mean, q.mean[index])
        assert q[index].batch_shape == q.mean[index].shape
    with pytest.raises(IndexError):
        q[0, 0, 0]


def test_expand_enumerate_support_repr_pickle():
    q = draw(3, bins=(1.0, 2.5, 5.0))
    torch.testing.assert_close(q.expand((2, 3)).mean, q.mean.expand(2, 3))
    assert q.enumerate_support().tolist() == [[1.0] * 3, [2.5] * 3, [5.0] * 3]
    assert q.enumerate_support(expand=False).tolist() == [[1.0], [2.5], [5.0]]
    torch.testing.assert_close((q.log_prob(q.enumerate_support()).exp() * q.enumerate_support()).sum(0), q.mean)
    assert repr(q) == "ScoreDistribution(batch_shape=(3,), bins=(1, 2.5, 5))"
    torch.testing.assert_close(pickle.loads(pickle.dumps(q)).mean, q.mean)  # noqa: S301 (written on this line)
    assert q.support.check(torch.tensor([1.0, 4.0, 6.0])).tolist() == [True, True, False]


def test_samples_are_scores_with_the_right_frequencies():
    torch.manual_seed(0)
    q = draw(2).detach()
    scores = q.sample((4000,))
    assert scores.shape == (4000, 2)
    assert not scores.requires_grad
    for row in range(2):
        seen = np.array([(scores[:, row] == s).sum().item() for s in UNEVEN])
        assert seen.sum() == 4000
        assert stats.chisquare(seen, q.probs[row].numpy() * 4000).pvalue > 0.001
    assert draw(2, 3).sample().shape == (2, 3)
    assert draw(0).sample().shape == (0,)


def test_mixture_is_the_mean_of_the_probabilities():
    q = draw(3, 4)
    torch.testing.assert_close(q.mixture(0).probs, q.probs.mean(0))
    torch.testing.assert_close(q.mixture(-1).probs, q.probs.mean(1))
    # The mutual information between component and score: the spread that the mixture hides.
    spread = kl_divergence(q, q.mixture(0).expand((3, 4))).mean(0)
    torch.testing.assert_close(spread, q.mixture(0).entropy() - q.entropy().mean(0))


def test_kl():
    with pytest.raises(ValueError, match=r"KL needs one scale: bins \[1.0, 2.0\] against \[1.0, 3.0\]"):
        kl_divergence(ScoreDistribution(torch.zeros(2), (1.0, 2.0)), ScoreDistribution(torch.zeros(2), (1.0, 3.0)))
    certain = ScoreDistribution(torch.tensor([0.0, -torch.inf]), (1.0, 2.0))
    even = ScoreDistribution(torch.zeros(2), (1.0, 2.0))
    assert kl_divergence(certain, even).item() == pytest.approx(np.log(2))
    assert kl_divergence(even, certain).item() == np.inf
    assert kl_divergence(certain, certain).item() == 0.0
    almost = ScoreDistribution(torch.tensor([0.0, -1e4]), (1.0, 2.0))
    assert kl_divergence(almost, certain).item() == 0.0  # underflow, not NaN


def test_half_precision_is_widened():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    bins = [1 + i / 3 for i in range(9)]
    q = ScoreDistribution(logits, bins)
    assert q.logits.dtype == q.bins.dtype == q.mean.dtype == torch.float32
    torch.testing.assert_close(q.mean, ScoreDistribution(logits.float(), bins).mean)
    assert q.to(torch.float16).mean.dtype == torch.float32
    torch.testing.assert_close(q.to(torch.float64).bins.float(), q.bins)


FEATURES = {
    "mean": lambda q: q.mean,
    "variance": lambda q: q.variance,
    "stddev": lambda q: q.stddev,
    "entropy": lambda q: q.entropy(),
    "log_prob": lambda q: q.log_prob(2.0),
    "cdf": lambda q: q.cdf(2.0),
    "mixture": lambda q: q.mixture(0).variance,
    "kl": lambda q: kl_divergence(q, ScoreDistribution(torch.zeros(5, dtype=torch.float64), UNEVEN)),
}


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_gradients(feature):
    logits = draw(2).logits.clone().requires_grad_()
    assert gradcheck(lambda x: feature(ScoreDistribution(x, UNEVEN)), logits)


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("extreme", [1e4, -1e4, -torch.inf])
def test_extreme_logits_stay_finite(feature, extreme):
    logits = torch.tensor([[0.0, 1.0, 2.0, extreme, 0.5], [0.5, -1.0, 0.0, extreme, 0.0]], requires_grad=True)
    value = feature(ScoreDistribution(logits, UNEVEN))
    assert value.isfinite().all()
    value.sum().backward()
    assert logits.grad.isfinite().all()


def test_certain_distribution_has_a_finite_gradient_of_its_stddev():
    logits = torch.tensor([0.0, -torch.inf], requires_grad=True)
    q = ScoreDistribution(logits, (1.0, 2.0))
    q.stddev.backward()
    assert q.stddev.item() == pytest.approx(0.0, abs=1e-18)
    assert logits.grad.isfinite().all()


def test_detach():
    logits = torch.zeros(2, 3, requires_grad=True)
    q = ScoreDistribution(logits, (1.0, 2.0, 3.0))
    assert q.mean.requires_grad
    assert not q.detach().mean.requires_grad


rows = st.lists(st.tuples(st.floats(-30, 30), st.floats(0.01, 5)), min_size=2, max_size=12)


@quick
@given(rows, st.floats(-100, 100), st.floats(0, 1))
def test_properties(row, shift, level):
    logits = torch.tensor([a for a, _ in row], dtype=torch.float64)
    bins = torch.tensor([b for _, b in row], dtype=torch.float64).cumsum(0)
    q = ScoreDistribution(logits, bins)
    scale = bins[-1] - bins[0]
    assert bins[0] - 1e-9 <= q.mean <= bins[-1] + 1e-9
    assert -1e-12 <= q.variance <= scale**2 / 4 + 1e-9  # Popoviciu
    assert 0 <= q.entropy() <= np.log(len(row)) + 1e-9
    assert q.cdf(bins[-1]) == pytest.approx(1.0)
    assert (q.cdf(bins).diff() >= -1e-12).all()
    assert q.cdf(q.quantile(level)) >= level - 2e-6
    torch.testing.assert_close(ScoreDistribution(logits + shift, bins).probs, q.probs)
    torch.testing.assert_close(ScoreDistribution(logits, 2 * bins + 1).mean, 2 * q.mean + 1)


def test_tempered_is_a_power_of_the_probabilities():
    q = draw(3, 2)
    t = torch.tensor([0.5, 3.0], dtype=torch.float64)
    powers = q.probs ** (1 / t[:, None])
    torch.testing.assert_close(q.tempered(t).probs, powers / powers.sum(-1, keepdim=True))
    torch.testing.assert_close(q[0, 0].tempered(t).probs[1], (q.probs[0, 0] ** (1 / 3)) / (q.probs[0, 0] ** (1 / 3)).sum())
    held = ScoreDistribution(q.logits, q.bins, off_scale=torch.rand(3, 2, dtype=torch.float64))
    for moved in (held.tempered(2.0), held.tilted(3.0)):
        assert torch.equal(moved.off_scale, held.off_scale)


def test_tilted_is_the_nearest_distribution_with_the_mean():
    """Oracle: a constrained minimisation of the divergence over all distributions."""
    for seed, mean in enumerate((1.3, 2.0, 6.5)):
        q = draw(seed=seed)
        p0 = q.probs.numpy()
        found = optimize.minimize(
            lambda p, p0=p0: float((p * np.log(np.clip(p, 1e-12, None) / p0)).sum()),
            np.full(5, 0.2),
            bounds=[(1e-12, 1)] * 5,
            constraints=[
                {"type": "eq", "fun": lambda p: p.sum() - 1},
                {"type": "eq", "fun": lambda p, mean=mean: p @ np.array(UNEVEN) - mean},
            ],
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(q.tilted(mean).probs.numpy(), found.x, atol=1e-5)


@quick
@given(st.integers(0, 1000), st.floats(1.001, 9.999), st.sampled_from([torch.float32, torch.float64]), st.floats(0.1, 20.0))
def test_tilted_has_the_mean_and_keeps_ratios_of_ratios(seed, mean, dtype, sharpness):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(5, generator=generator, dtype=dtype)
    q = ScoreDistribution(logits, UNEVEN)
    p = q.tilted(mean)
    assert p.logits.dtype == dtype
    assert p.mean.item() == pytest.approx(mean, abs=1e-4 if dtype == torch.float32 else 1e-9)
    moved = (p.logits - q.logits).double().numpy()
    slopes = np.diff(moved) / np.diff(UNEVEN)
    assert slopes == pytest.approx(slopes[0], rel=1e-3, abs=1e-3)


def test_tilted_gradients():
    logits = draw(2, 3).logits.clone().requires_grad_()
    mean = torch.tensor([1.5, 3.0, 6.0], dtype=torch.float64, requires_grad=True)

    def answer(x, m):
        p = ScoreDistribution(x, UNEVEN).tilted(m)
        return p.mean, p.probs, p.entropy()

    assert gradcheck(answer, (logits, mean))
    assert gradcheck(
        lambda x: answer(x, 2.0 + 0.5 * ScoreDistribution(x, UNEVEN).mean), (logits,)
    )  # the mean's own gradient too


def test_tilted_to_where_no_tilt_leads():
    some = torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0]).log().requires_grad_()
    for mean, nearest in ((10.0, 2.0), (1.0, 1.25), (1.5, 1.5)):
        p = ScoreDistribution(some, UNEVEN).tilted(mean)
        assert p.mean.item() == pytest.approx(nearest, abs=1e-4)
        (gradient,) = torch.autograd.grad(p.mean + p.log_prob(1.25), some)
        assert bool(gradient.isfinite().all())
    certain = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]).log().requires_grad_()
    (gradient,) = torch.autograd.grad(ScoreDistribution(certain, UNEVEN).tilted(3.0).mean, certain)
    assert bool((gradient == 0).all())
    for ends in (1.0, 10.0):
        assert draw().tilted(ends).mean.item() == pytest.approx(ends, abs=1e-6)
    for bad in (0.5, 10.1, float("nan")):
        with pytest.raises(ValueError, match=f"a mean of {bad:g} lies outside the bins, 1 to 10"):
            draw(2).tilted(torch.tensor([2.0, bad]))


@pytest.mark.parametrize("shape", SHAPES)
def test_tilted_shapes(shape):
    assert draw(*shape).tilted(2.0).batch_shape == shape
    assert draw().tilted(torch.full(shape, 2.0)).batch_shape == shape
    assert draw(0).tilted(2.0).mean.shape == (0,)
