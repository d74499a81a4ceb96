import json
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats

from zr.metrics import HPA, bootstrap_difference, bootstrap_interval, compare, evaluate, hpa, plcc, srcc

NAMES = ("alignment", "realism", "aesthetics")


def draw(prompts=20, candidates=4, seed=0, noise=1.0):
    generator = np.random.default_rng(seed)
    score = generator.integers(2, 11, (prompts * candidates, 3)) / 2
    mu = score + noise * generator.normal(size=score.shape)
    known = generator.random(score.shape) < 0.8
    return mu, np.where(known, score, np.nan), known, [f"p{i // candidates}" for i in range(len(score))]


def test_estimates_against_scipy_and_loops():
    mu, score, known, prompt = draw()
    table = evaluate(mu, score, known, prompt, NAMES, samples=20)
    pooled = np.zeros((2, 2))
    for d, name in enumerate(NAMES):
        row, take = table["dimensions"][name], known[:, d]
        assert row["plcc"]["estimate"] == pytest.approx(stats.pearsonr(mu[take, d], score[take, d]).statistic)
        assert row["srcc"]["estimate"] == pytest.approx(stats.spearmanr(mu[take, d], score[take, d]).statistic)
        counts = np.zeros((2, 2))
        for a, b in combinations(np.flatnonzero(take), 2):
            gap = score[a, d] - score[b, d]
            if prompt[a] == prompt[b]:
                for m, margin in enumerate((0.0, 0.5)):
                    counts[m] += np.array([gap * (mu[a, d] - mu[b, d]) > 0, 1]) * (abs(gap) > margin)
        assert row["hpa"]["estimate"] == pytest.approx(counts[0, 0] / counts[0, 1])
        assert row["margin_hpa"]["estimate"] == pytest.approx(counts[1, 0] / counts[1, 1])
        assert (row["images"], row["pairs"], row["margin_pairs"]) == (take.sum(), counts[0, 1], counts[1, 1])
        pooled += counts
    overall = table["overall"]
    for key in ("hpa", "margin_hpa", "plcc", "srcc"):
        mean = np.mean([table["dimensions"][name][key]["estimate"] for name in NAMES])
        assert overall[key]["estimate"] == pytest.approx(mean)
    assert overall["pooled_hpa"]["estimate"] == pytest.approx(pooled[0, 0] / pooled[0, 1])
    assert overall["pooled_margin_hpa"]["estimate"] == pytest.approx(pooled[1, 0] / pooled[1, 1])
    assert (overall["pairs"], overall["margin_pairs"]) == tuple(pooled[:, 1])
    assert (overall["images"], overall["prompts"]) == (known.any(1).sum(), 20)


def test_intervals_are_those_of_the_bootstrap():
    mu, score, known, prompt = draw()
    known[:] = True  # so that both draw from the same prompts
    score = np.nan_to_num(score, nan=3.0)
    other = draw(seed=5)[0]
    table = evaluate(mu, score, known, prompt, NAMES, samples=80, level=0.8, seed=4)
    difference = compare(mu, other, score, known, prompt, NAMES, samples=80, level=0.8, seed=4)
    options = {"samples": 80, "level": 0.8, "seed": 4}
    for d, name in enumerate(NAMES):
        for key, statistic in (("hpa", hpa), ("plcc", plcc), ("srcc", srcc)):
            expected = bootstrap_interval(statistic, mu[:, d], score[:, d], prompt, **options).to_dict()
            assert table["dimensions"][name][key] == pytest.approx(expected)
            expected = bootstrap_difference(statistic, mu[:, d], other[:, d], score[:, d], prompt, **options).to_dict()
            assert difference["dimensions"][name][key] == pytest.approx(expected)

    def macro(x, y, group, weight):
        return np.mean([srcc(mu[:, d], score[:, d], group, weight) for d in range(3)], axis=0)

    assert table["overall"]["srcc"] == pytest.approx(
        bootstrap_interval(macro, mu[:, 0], score[:, 0], prompt, **options).to_dict()
    )


def test_agrees_with_the_metric_of_the_stages():
    mu, score, known, prompt = draw()
    table = evaluate(mu, score, known, prompt, NAMES, samples=5)
    index = torch.tensor(np.unique(prompt, return_inverse=True)[1])
    for d, name in enumerate(NAMES):
        metric = HPA()
        metric.update(torch.tensor(mu[:, d]), torch.tensor(score[:, d]), index, torch.tensor(known[:, d]))
        assert metric.compute().item() == pytest.approx(table["dimensions"][name]["hpa"]["estimate"])


def test_compare_with_itself_and_with_a_worse_scorer():
    mu, score, known, prompt = draw(prompts=60)
    same = compare(mu, mu, score, known, prompt, NAMES, samples=20)
    assert same["overall"]["hpa"]["low"] == same["overall"]["hpa"]["high"] == 0.0
    noise = np.random.default_rng(8).normal(size=mu.shape)
    better = compare(mu, noise, score, known, prompt, NAMES, samples=200)
    swapped = compare(noise, mu, score, known, prompt, NAMES, samples=200)
    for key in ("hpa", "margin_hpa", "plcc", "srcc", "pooled_hpa"):
        assert better["overall"][key]["low"] > 0
        assert swapped["overall"][key]["high"] == pytest.approx(-better["overall"][key]["low"])


def test_undefined_numbers_are_none_and_json_is_strict():
    mu, score, known, prompt = draw()
    known[:, 1] = False
    mu[:, 2] = 3.1
    table = evaluate(mu, score, known, prompt, NAMES, samples=10)
    assert table["dimensions"]["realism"]["hpa"]["estimate"] is None
    assert table["dimensions"]["realism"]["images"] == table["dimensions"]["realism"]["pairs"] == 0
    assert table["dimensions"]["aesthetics"]["plcc"]["estimate"] is None
    assert table["dimensions"]["aesthetics"]["hpa"]["estimate"] == 0.0  # ties are wrong
    assert table["overall"]["plcc"]["estimate"] is None
    assert table["overall"]["pooled_hpa"]["estimate"] is not None
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_tensors_and_one_dimension():
    mu, score, known, prompt = draw()
    table = evaluate(*(torch.tensor(a[:, :1]) for a in (mu, score, known)), prompt, ["only"], samples=10)
    assert table["overall"]["hpa"] == table["dimensions"]["only"]["hpa"] == table["overall"]["pooled_hpa"]


def test_wrong_arguments():
    mu, score, known, prompt = draw()
    with pytest.raises(ValueError, match=r"mu must be \(N, D\) = \(80, 3\) .*, got \(80, 2\)"):
        evaluate(mu[:, :2], score, known, prompt, NAMES)
    with pytest.raises(ValueError, match=r"known must be \(N, D\) = \(79, 3\) .*, got \(80, 3\)"):
        evaluate(mu, score, known, prompt[:-1], NAMES)
    known[:] = False
    known[7, 1] = True
    mu[7, 1] = np.nan
    score[7, 1] = 3.0
    with pytest.raises(ValueError, match="second is nan at item 7, realism: 1 known items have no finite number"):
        compare(score, mu, score, known, prompt, NAMES)
