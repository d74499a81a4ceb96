import math
import warnings

import numpy as np
import pytest
import torch
import torchmetrics
from scipy import stats

from zr.metrics import plcc, srcc


def draw(count=40, seed=0):
    generator = np.random.default_rng(seed)
    score = generator.integers(2, 11, count) / 2
    return np.round(score + generator.normal(size=count), 1), score  # with ties


@pytest.mark.parametrize(("ours", "oracle"), [(plcc, stats.pearsonr), (srcc, stats.spearmanr)])
def test_scipy(ours, oracle):
    for seed in range(5):
        mu, score = draw(seed=seed)
        assert float(ours(mu, score)) == pytest.approx(oracle(mu, score).statistic)
        assert float(ours(-mu, score)) == pytest.approx(-oracle(mu, score).statistic)
        assert float(ours(1e6 + mu, score)) == pytest.approx(oracle(mu, score).statistic)


@pytest.mark.parametrize(("ours", "oracle"), [(plcc, stats.pearsonr), (srcc, stats.spearmanr)])
def test_weights_are_repeated_items(ours, oracle):
    mu, score = draw()
    weight = np.random.default_rng(1).integers(0, 4, (3, 40))
    expected = [oracle(np.repeat(mu, row), np.repeat(score, row)).statistic for row in weight]
    assert ours(mu, score, None, weight).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("ours", [plcc, srcc])
def test_undefined_is_nan(ours):
    for mu, score in (([], []), ([1.0], [2.0]), ([0.1] * 7, [1, 2, 3, 4, 5, 6, 7]), ([1, 2, 3], [0.7] * 3)):
        assert math.isnan(ours(mu, score))
    weight = np.array([[0, 3, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 5, 0]])
    values = ours([1.0, 0.3, 2.0, 0.3], [1, 2, 3, 4], None, weight)
    assert np.isnan(values).tolist() == [True, False, True, True]
    assert float(ours([1.0, 2.0], [3.0, 5.0])) == pytest.approx(1.0)


def test_what_torchmetrics_gives_the_stages():
    """The classes that stages use while training: their values, and what they say of constants."""
    mu, score = (torch.tensor(values, dtype=torch.float32) for values in draw())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all targets")
        pearson, spearman = torchmetrics.PearsonCorrCoef(), torchmetrics.SpearmanCorrCoef()
    for part in (slice(0, 7), slice(7, 8), slice(8, 40)):  # a batch of one item too
        pearson.update(mu[part], score[part])
        spearman.update(mu[part], score[part])
    assert pearson.compute().item() == pytest.approx(stats.pearsonr(mu, score).statistic, abs=1e-5)
    assert spearman.compute().item() == pytest.approx(stats.spearmanr(mu, score).statistic, abs=1e-5)
    pearson.reset()
    spearman.reset()
    pearson.update(torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
    spearman.update(torch.ones(3), torch.tensor([1.0, 2.0, 3.0]))
    with pytest.warns(UserWarning, match="variance of predictions or target is close to zero"):
        assert pearson.compute().isnan()
    assert spearman.compute() == 0.0
