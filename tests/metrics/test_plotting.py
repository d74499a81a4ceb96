import matplotlib
import pytest
import torch

from zr.metrics import (
    GSB,
    HPA,
    Coupling,
    Coverage,
    ExpectedCalibrationError,
    OffScaleMass,
    RankedProbabilityScore,
    VotesNegativeLogLikelihood,
)
from zr.scores import ScoreDistribution

Q = ScoreDistribution(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), range(1, 5), off_scale=torch.rand(20))
VOTES = torch.randint(0, 3, (20, 4), generator=torch.Generator().manual_seed(1))
GIVEN = {
    HPA: (Q, torch.arange(20.0), torch.zeros(20)),
    GSB: (Q, Q.mean.flip(0)),
    OffScaleMass: (Q,),
    Coupling: (Q, Q[torch.arange(20).flip(0)], Q, Q),
    **dict.fromkeys((Coverage, ExpectedCalibrationError, RankedProbabilityScore, VotesNegativeLogLikelihood), (Q, VOTES)),
}


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.mark.parametrize("kind", GIVEN)
def test_plot_shows_the_value_now_given_and_over_time(kind, pictures):
    metric = kind()
    now = metric(*GIVEN[kind])
    figure, axes = metric.plot()
    assert figure is axes.figure
    shown = [line.get_ydata() for line in axes.get_lines()]
    values = list(now.values()) if isinstance(now, dict) else [now]
    assert [float(y[0]) for y in shown] == pytest.approx([v.item() for v in values])
    _, mine = pictures.subplots()
    assert metric.plot(now, ax=mine) == (None, mine)
    _, axes = metric.plot([now, now, now])
    assert len(axes.get_lines()[0].get_ydata()) == 3


def test_reliability_diagram(pictures):
    metric = ExpectedCalibrationError(4)
    metric.update(Q, VOTES)
    curve = metric.curve()
    figure, axes = curve.plot()
    assert figure is axes.figure
    points = axes.collections[0].get_offsets().tolist()
    assert points == [pytest.approx(p) for p in zip(curve.confidence.tolist(), curve.share.tolist(), strict=True)]
    _, mine = pictures.subplots()
    assert curve.plot(mine) == (None, mine)
