import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from zr.metrics import Coupling, coupling_distances
from zr.scores import ScoreDistribution

BINS = (1.0, 2.0, 2.5, 5.0)
NAMES = ("own", "removed", "other", "again")


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: ScoreDistribution(2 * torch.randn(*shape, 4, generator=generator), BINS) for name in NAMES}


def rows(four, part):
    return {name: q[part] for name, q in four.items()}


@pytest.mark.parametrize("shape", [(30,), (30, 2)])
def test_image_by_image(shape):
    four = draw(*shape)
    metric = Coupling()
    metric.update(**rows(four, slice(0, 7)))
    metric.update(**rows(four, slice(7, None)))
    value = metric.compute()
    assert list(value) == ["removed_kl", "removed_gap", "other_kl", "other_gap", "floor_kl", "floor_gap"]
    own = four["own"].logits.reshape(-1, 4)
    for name, given in (("removed", "removed"), ("other", "other"), ("floor", "again")):
        varied = four[given].logits.reshape(-1, 4)
        kls, gaps = [], []
        for a, b in zip(own, varied, strict=True):
            kls.append(kl_divergence(Categorical(logits=a), Categorical(logits=b)).item())
            means = [sum(p * s for p, s in zip(x.exp().tolist(), BINS, strict=True)) for x in (a, b)]
            gaps.append(abs(means[0] - means[1]))
        assert value[f"{name}_kl"].item() == pytest.approx(sum(kls) / len(kls), rel=1e-4)
        assert value[f"{name}_gap"].item() == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)


def test_a_score_without_coupling_moves_as_far_as_the_noise():
    q = draw(2000)["own"]
    noise = [ScoreDistribution(q.logits + 0.1 * torch.randn(q.logits.shape), BINS) for _ in range(3)]
    metric = Coupling()
    metric.update(q, *noise)
    value = metric.compute()
    for kind in ("kl", "gap"):
        assert value[f"removed_{kind}"].item() == pytest.approx(value[f"floor_{kind}"].item(), rel=0.15)
    metric.reset()
    metric.update(q, q[torch.randperm(2000)], *noise[:2])
    assert metric.compute()["removed_gap"] > 5 * metric.compute()["floor_gap"]


def test_ends():
    four = draw(5)
    same = Coupling()
    same.update(*(four["own"] for _ in NAMES))
    assert all(v.item() == pytest.approx(0.0, abs=1e-6) for v in same.compute().values())
    empty = Coupling()
    empty.update(*draw(0).values())
    assert all(v.isnan() for v in empty.compute().values())
    sure, other = (ScoreDistribution(torch.tensor(p).log(), (1.0, 5.0)) for p in ([0.5, 0.5], [1.0, 0.0]))
    kl, gap = coupling_distances(sure, other)
    assert kl.item() == math.inf  # the other excludes what the first allows
    assert gap.item() == 2.0
    half = Coupling()
    half.update(**{name: ScoreDistribution(q.logits.bfloat16(), BINS) for name, q in four.items()})
    assert all(v.isfinite() for v in half.compute().values())


def test_arguments():
    four = draw(5)
    with pytest.raises(ValueError, match=r"one batch shape, got own \(5,\), removed \(4,\), other \(5,\), again \(5,\)"):
        Coupling().update(**{**four, "removed": four["removed"][:4]})
    with pytest.raises(ValueError, match="one scale"):
        Coupling().update(**{**four, "other": ScoreDistribution(torch.zeros(5, 4), (1.0, 2.0, 3.0, 4.0))})
