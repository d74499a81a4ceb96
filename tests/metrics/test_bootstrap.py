import json
import math
import time

import numpy as np
import pytest
from scipy import stats

from zr.metrics import Interval, bootstrap_difference, bootstrap_interval, hpa, plcc, srcc


def draw(prompts=30, candidates=4, seed=0, noise=1.0):
    generator = np.random.default_rng(seed)
    score = generator.integers(2, 11, prompts * candidates) / 2
    mu = score + noise * generator.normal(size=score.shape)
    return mu, score, np.repeat(np.arange(prompts), candidates)


def naive(statistic, mu, score, prompt, samples, seed):
    """Prompts drawn one after the other, their items copied, a prompt drawn twice being two prompts."""
    names = np.unique(prompt)
    times = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    values = []
    for row in times:
        items, ids = [], []
        for name, count in zip(names, row, strict=True):
            for _ in range(count):
                items += np.flatnonzero(prompt == name).tolist()
                ids += [len(ids)] * (prompt == name).sum()
        values.append(float(statistic(mu[items], score[items], np.array(ids))))
    return np.array(values)


@pytest.mark.parametrize("statistic", [hpa, plcc, srcc])
def test_naive_loop(statistic):
    mu, score, prompt = draw()
    values = naive(statistic, mu, score, prompt, samples=60, seed=3)
    interval = bootstrap_interval(statistic, mu, score, prompt, samples=60, level=0.9, seed=3)
    assert interval.estimate == pytest.approx(float(statistic(mu, score, prompt)))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])))
    assert interval.standard_error == pytest.approx(values.std())
    assert (interval.level, interval.samples) == (0.9, 60)


def test_paired_difference_is_taken_on_the_same_prompts():
    first, score, prompt = draw()
    second = score + 2 * np.random.default_rng(9).normal(size=score.shape)
    values = [naive(srcc, mu, score, prompt, samples=60, seed=3) for mu in (first, second)]
    interval = bootstrap_difference(srcc, first, second, score, prompt, samples=60, seed=3)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values[0] - values[1], [0.025, 0.975])))
    same = bootstrap_difference(srcc, first, first, score, prompt, samples=60)
    assert (same.estimate, same.low, same.high, same.standard_error) == (0.0, 0.0, 0.0, 0.0)


def mean_of_scores(mu, score, prompt, weight):
    return weight @ score / weight.sum(-1)


def test_standard_error_of_a_mean():
    generator = np.random.default_rng(0)
    score = generator.normal(size=400)
    interval = bootstrap_interval(mean_of_scores, score, score, np.arange(400), samples=2000)
    assert interval.standard_error == pytest.approx(stats.sem(score), rel=0.06)
    theory = stats.norm.interval(0.95, score.mean(), stats.sem(score))
    assert (interval.low, interval.high) == pytest.approx(theory, abs=0.01)


def test_the_unit_is_the_prompt():
    # Four copies of each image say no more than one.
    score = np.random.default_rng(0).normal(size=100)
    one = bootstrap_interval(mean_of_scores, score, score, np.arange(100))
    four = bootstrap_interval(mean_of_scores, np.repeat(score, 4), np.repeat(score, 4), np.repeat(np.arange(100), 4))
    assert four.low == pytest.approx(one.low)
    assert four.high == pytest.approx(one.high)


def test_seed_order_and_blocks(monkeypatch):
    mu, score, prompt = draw()
    interval = bootstrap_interval(srcc, mu, score, prompt, samples=50, seed=1)
    assert bootstrap_interval(srcc, mu, score, prompt, samples=50, seed=1) == interval
    assert bootstrap_interval(srcc, mu, score, prompt, samples=50, seed=2) != interval
    order = np.random.default_rng(0).permutation(len(mu))
    shuffled = bootstrap_interval(srcc, mu[order], score[order], prompt[order], samples=50, seed=1)
    assert (shuffled.low, shuffled.high) == pytest.approx((interval.low, interval.high))
    named = bootstrap_interval(srcc, mu, score, [f"prompt {p:02}" for p in prompt], samples=50, seed=1)
    assert named == interval
    monkeypatch.setattr("zr.metrics.bootstrap.BLOCK", 7 * len(mu))
    assert bootstrap_interval(srcc, mu, score, prompt, samples=50, seed=1).low == pytest.approx(interval.low)


def test_undefined_values():
    score = np.array([1.0, 2.0, 3.0, 3.0])
    interval = bootstrap_interval(plcc, [1.0, 2.0, 5.0, 5.0], score, [0, 0, 1, 1], samples=200)
    assert 100 < interval.samples < 200  # the second prompt alone has no variance
    assert math.isfinite(interval.low)
    nothing = bootstrap_interval(plcc, np.ones(4), score, [0, 0, 1, 1], samples=20)
    assert math.isnan(nothing.estimate)
    assert nothing.samples == 0
    assert nothing.to_dict() == {
        "estimate": None,
        "low": None,
        "high": None,
        "standard_error": None,
        "level": 0.95,
        "samples": 0,
    }
    json.dumps(nothing.to_dict(), allow_nan=False)


def test_wrong_arguments():
    for wrong in ({"samples": 0}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(ValueError, match=r"a bootstrap needs items, samples >= 1 and 0 < level < 1"):
            bootstrap_interval(hpa, [1.0, 2.0], [1.0, 2.0], [0, 0], **wrong)
    with pytest.raises(ValueError, match="got 0 items"):
        bootstrap_interval(hpa, [], [], [])


def test_text():
    assert str(Interval(0.5, 0.25, 0.75, 0.125, 0.95, 100)) == "0.5000 [0.2500, 0.7500]"


def test_a_thousand_resamples_of_a_thousand_items_take_seconds():
    mu, score, prompt = draw(prompts=250)
    start = time.perf_counter()
    for statistic in (hpa, plcc, srcc):
        bootstrap_interval(statistic, mu, score, prompt)
    assert time.perf_counter() - start < 10
