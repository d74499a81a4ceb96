"""Calibrations against grids, loops and scipy's own solvers; what a model keeps of them."""

import json
import math

import numpy as np
import pytest
import torch
from plain import build
from scipy import optimize

from zr.data import shapes
from zr.models import Isotonic, LinearHead, Policy, ReasoningReward, SamplingRule, ScaleStatistics, Temperature, compose, load
from zr.models.calibration import Calibration
from zr.models.loading import scale_statistics
from zr.models.reward import RewardModel, keep_calibration
from zr.rubric import Rubric
from zr.scores import ScoreDistribution

RUBRIC = shapes.rubric()
BINS = torch.tensor(RUBRIC.bins, dtype=torch.float64)
NAMES = RUBRIC.dimensions


def world(count=60, power=1.0, seed=0):
    """Distributions, and five votes of each image and dimension drawn from them; the model then answers ``power`` times as
    sure as it should."""
    generator = torch.Generator().manual_seed(seed)
    centre = 1 + 4 * torch.rand(count, 4, 1, generator=generator, dtype=torch.float64)
    true = ScoreDistribution(-((BINS - centre) ** 2), RUBRIC.bins)
    drawn = torch.multinomial(true.probs.reshape(-1, 9), 5, replacement=True, generator=generator)
    votes = torch.nn.functional.one_hot(drawn, 9).sum(1).reshape(count, 4, 9).float()
    return ScoreDistribution(power * true.logits.float(), RUBRIC.bins), votes


def likelihood(logits, votes, temperature):
    """Mean -log p of the votes, one by one."""
    total, count = 0.0, 0
    for row, given in zip(logits.tolist(), votes.tolist(), strict=True):
        scaled = np.array(row) / temperature
        log_p = scaled - np.logaddexp.reduce(scaled)
        for k, times in enumerate(given):
            total -= times * log_p[k]
            count += times
    return total / count


@pytest.mark.parametrize("power", [0.5, 3.0])
def test_temperature_is_the_best_of_a_grid(power):
    q, votes = world(power=power)
    votes[::3] = 0  # nobody saw these
    fitted = Temperature.fit(q, votes, RUBRIC)
    assert fitted.scale_id == RUBRIC.scale_id
    assert fitted.dimensions == NAMES
    grid = np.exp(np.linspace(math.log(0.1), math.log(10), 151))
    for d in range(4):
        values = [likelihood(q.logits[:, d], votes[:, d], t) for t in grid]
        assert fitted.temperature[d] == pytest.approx(grid[int(np.argmin(values))], rel=0.02)
        assert likelihood(q.logits[:, d], votes[:, d], fitted.temperature[d]) <= min(values) + 1e-9
        assert fitted.temperature[d] == pytest.approx(power, rel=0.35)  # what the world was made with


def test_temperature_by_hand():
    """Odds of 1 to e**4 become 1 to 3, the votes' own, at 4 / log 3."""
    two = _two_bins()
    q = ScoreDistribution(torch.tensor([[[0.0, 4.0]]] * 2), two.bins)
    votes = torch.tensor([[[1.0, 1.0]], [[0.0, 2.0]]])
    assert Temperature.fit(q, votes, two).temperature[0] == pytest.approx(4 / math.log(3), rel=1e-5)


def _two_bins():
    wording = {"system": "judge", "instructions": {"realism": "real?"}, "labels": ["no", "yes"]}
    return Rubric.from_dict({"scale": {"bins": [0, 1], "anchors": {"realism": {}}}, "wording": wording})


def test_temperature_ends_at_a_bound_where_votes_hold_nothing():
    two = _two_bins()
    q = ScoreDistribution(torch.tensor([[[0.0, 4.0]]]), two.bins)
    against = Temperature.fit(q, torch.tensor([[[1.0, 0.0]]]), two)
    assert against.temperature[0] == pytest.approx(20.0, rel=0.01)
    assert against.numbers() == {"realism": "temperature 20.000 (at its bound)"}
    never_off = Temperature.fit(q, torch.tensor([[[0.0, 1.0]]]), two)
    assert never_off.temperature[0] < 0.15  # below, a likelihood of one in every bit


def test_a_temperature_scales_logits_and_gradients():
    logits = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    calibration = Temperature(RUBRIC.scale_id, NAMES, (0.5, 1.0, 2.0, 4.0))
    names = ["plausibility", "realism"]
    mass = torch.rand(3, 2)
    found = calibration(ScoreDistribution(logits, BINS, off_scale=mass), names)
    divisor = torch.tensor([4.0, 1.0]).reshape(1, 2, 1)
    torch.testing.assert_close(found.probs, (logits / divisor).softmax(-1))
    torch.testing.assert_close(found.off_scale, mass.double())
    (gradient,) = torch.autograd.grad(found.mean.sum(), logits)
    p = (logits / divisor).softmax(-1)
    expected = p * (BINS - (p * BINS).sum(-1, keepdim=True)) / divisor  # of a mean of softmax(x / T)
    torch.testing.assert_close(gradient, expected)


def regression(x, y, w):
    """The least-squares ascending values, by a quadratic programme."""
    order = np.argsort(x)
    y, w = y[order], w[order]
    ascending = [{"type": "ineq", "fun": lambda v: np.diff(v)}]
    return x[order], optimize.minimize(
        lambda v: (w * (v - y) ** 2).sum(), np.sort(y), constraints=ascending, method="SLSQP", options={"ftol": 1e-14}
    ).x


def test_isotonic_knots_are_the_centres_of_the_regression():
    q, votes = world(count=25, power=2.0)
    votes[::4] *= 3  # weights
    fitted = Isotonic.fit(q, votes, RUBRIC)
    for d in range(4):
        x = (q.probs[:, d].double() * BINS).sum(-1).numpy()
        w = votes[:, d].sum(-1).double().numpy()
        y = (votes[:, d].double() * BINS).sum(-1).numpy() / w
        xs, level = regression(x, y, w)
        weights = w[np.argsort(x)]
        pieces = np.split(np.arange(25), np.flatnonzero(np.diff(level) > 1e-4) + 1)
        expected = [
            ((xs[p] * weights[p]).sum() / weights[p].sum(), float(np.clip(level[p].mean(), 1.004, 4.996))) for p in pieces
        ]
        assert fitted.knots[d][0] == (1.0, 1.0)
        assert fitted.knots[d][-1] == (5.0, 5.0)
        (low, first), (high, last) = (xs[0], expected[0][1]), (xs[-1], expected[-1][1])
        if len(pieces[0]) > 1:  # all but flat down to the lowest score that was seen
            expected.insert(0, (low, first - 0.001 * (first - 1)))
        if len(pieces[-1]) > 1:
            expected.append((high, last + 0.001 * (5 - last)))
        np.testing.assert_allclose(fitted.knots[d][1:-1], expected, atol=2e-4)


def test_isotonic_moves_the_mean_along_the_line_and_keeps_every_order():
    q, votes = world(count=200)
    harsh = q.tilted(1 + 3 * (q.mean - 1) / 4 + 0.1)  # a model that gives too little
    fitted = Isotonic.fit(harsh, votes, RUBRIC)
    found = fitted(harsh)
    for d in range(4):
        x, y = zip(*fitted.knots[d], strict=True)
        np.testing.assert_allclose(found.mean[:, d], np.interp(harsh.mean[:, d], x, y), atol=2e-5)
        order = harsh.mean[:, d].argsort()
        assert bool((found.mean[:, d][order].diff() >= 0).all())
        apart = harsh.mean[:, d][order].diff() > 1e-4
        assert bool((found.mean[:, d][order].diff()[apart] > 0).all())
    bias = [(one.mean - (votes * BINS).sum(-1) / 5).mean().item() for one in (harsh, found)]
    assert abs(bias[1]) < 0.03 < abs(bias[0])
    some = fitted(harsh[:, [2]], ["aesthetics"])
    torch.testing.assert_close(some.probs, found.probs[:, [2]])


def test_isotonic_gradient_by_differences():
    q, votes = world(count=30)
    fitted = Isotonic.fit(q, votes, RUBRIC)
    logits = 0.5 * torch.randn(1, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()

    def answer(x):
        found = fitted(ScoreDistribution(x, BINS))
        return found.mean, found.probs[..., :3], found.entropy()

    assert torch.autograd.gradcheck(answer, (logits,), eps=1e-6, atol=1e-5)
    mean = ScoreDistribution(logits, BINS).mean
    (slope,) = torch.autograd.grad(fitted(ScoreDistribution(logits, BINS)).mean[0, 1], logits)
    (own,) = torch.autograd.grad(mean[0, 1], logits)
    x, y = zip(*fitted.knots[1], strict=True)
    piece = np.searchsorted(x, mean[0, 1].item()) - 1
    torch.testing.assert_close(slope, own * (y[piece + 1] - y[piece]) / (x[piece + 1] - x[piece]))


def test_all_votes_on_an_end_of_the_scale_leave_room_for_a_tilt():
    q, votes = world(count=10)
    votes = torch.zeros_like(votes)
    votes[..., -1] = 5
    fitted = Isotonic.fit(q, votes, RUBRIC)
    found = fitted(q)
    assert bool(found.probs.isfinite().all())
    assert bool((found.mean > 4.99).all())
    assert all(len(line) == 5 and line[2][1] == pytest.approx(4.996) for line in fitted.knots)
    sure = ScoreDistribution(torch.full((1, 4, 9), -torch.inf).index_fill(-1, torch.tensor([3]), 0.0), RUBRIC.bins)
    torch.testing.assert_close(fitted(sure).probs, sure.probs)  # a tilt cannot move what is certain


def test_dimensions_that_are_not_asked_for_stay():
    q, votes = world(power=2.0)
    votes[:, 1] = 0
    for kind in (Temperature, Isotonic):
        with pytest.raises(ValueError, match="none of 60 images has votes in realism: leave it out"):
            kind.fit(q, votes, RUBRIC)
        fitted = kind.fit(q, votes, RUBRIC, ["alignment", "plausibility"])
        found = fitted(q)
        torch.testing.assert_close(found.probs[:, 1:3], q.probs[:, 1:3], atol=2e-5, rtol=0)
        assert float((found.probs - q.probs)[:, [0, 3]].abs().max()) > 0.05
        with pytest.raises(ValueError, match="must be a list of different names"):
            kind.fit(q, votes, RUBRIC, ["beauty"])


@pytest.mark.parametrize("kind", [Temperature, Isotonic])
def test_what_cannot_be_fitted(kind):
    q, votes = world(count=6)
    with pytest.raises(
        ValueError, match=r"votes \(N, D, K\) with D = 4 and K = 9 of the rubric, got \(6, 4, 9\) and \(6, 4, 8\)"
    ):
        kind.fit(q, votes[..., :8], RUBRIC)
    with pytest.raises(ValueError, match=r"the distributions have bins .*the rubric has"):
        kind.fit(ScoreDistribution(q.logits, range(9)), votes, RUBRIC)
    fitted = kind.fit(q, votes, RUBRIC)
    with pytest.raises(ValueError, match=r"scores of batch shape \(6, 4\) for dimensions \('realism',\)"):
        fitted(q, ["realism"])
    with pytest.raises(ValueError, match=r"dimensions \('beauty',\); the calibration is of"):
        fitted(q[:, [0]], ["beauty"])
    with pytest.raises(
        ValueError, match=r"the calibration was fitted for scale .*the model answers on scale .* \(realism\): fit one"
    ):
        fitted.check(RUBRIC.select(["realism"]))


def test_votes_on_what_the_model_holds_impossible():
    q, votes = world(count=6)
    logits = q.logits.clone()
    logits[0, 2] = torch.tensor([0.0] + [-torch.inf] * 8)
    votes[0, 2] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 2.0])
    with pytest.raises(ValueError, match="2 votes in aesthetics are on scores of probability zero"):
        Temperature.fit(ScoreDistribution(logits, RUBRIC.bins), votes, RUBRIC)


@pytest.mark.parametrize("kind", [Temperature, Isotonic])
def test_saved_and_loaded(kind, tmp_path):
    q, votes = world()
    fitted = kind.fit(q, votes, RUBRIC)
    path = tmp_path / "calibration.json"
    fitted.save(path)
    assert Calibration.load(path) == fitted
    data = json.loads(path.read_text())
    name = "temperature" if kind is Temperature else "knots"
    for broken in (
        "{",
        "[]",
        json.dumps({**data, name: data[name][:1]}),
        json.dumps({**data, name: [0.0, -1.0, 1.0, 1.0]}),
        json.dumps({**data, "more": 1}),
        json.dumps({k: v for k, v in data.items() if k != "scale_id"}),
        json.dumps({**data, name: [[[1, 1], [1, 5]]] * 4}),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"calibration\.json holds no calibration"):
            Calibration.load(path)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return compose(build("qwen3_vl"), LinearHead).eval()


@pytest.fixture
def asked():
    generator = torch.Generator().manual_seed(3)
    return {"images": torch.rand(3, 3, 48, 48, generator=generator), "prompts": ["red ring", "blue square", "red ring"]}


SHARP = Temperature(RUBRIC.scale_id, NAMES, (0.5, 2.0, 0.25, 1.0))


def test_a_model_answers_through_its_calibration(model, asked):
    with torch.no_grad():
        own = model(**asked)
        for budget in (None, 150):
            calibrated = RewardModel(model.backbone, model.head, model.rubric, calibration=SHARP, budget=budget)
            found = calibrated(**asked)
            expected = (own.logits / torch.tensor(SHARP.temperature)[:, None]).softmax(-1)
            torch.testing.assert_close(found.probs, expected, atol=1e-5, rtol=0)
            some = calibrated(**asked, dimensions=["aesthetics", "realism"])
            torch.testing.assert_close(some.probs, expected[:, [2, 1]], atol=1e-5, rtol=0)
    pixels = asked["images"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        RewardModel(model.backbone, model.head, model.rubric, calibration=SHARP)(pixels, asked["prompts"]).mean.sum(), pixels
    )
    assert float(gradient.abs().max()) > 0


def test_what_a_model_keeps(model, asked, tmp_path):
    scale, moved = (ScaleStatistics(NAMES, (mean,) * 4, (1.0,) * 4) for mean in (3.0, 2.0))
    plain = RewardModel(model.backbone, model.head, model.rubric, scale).eval()
    plain.save_pretrained(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"m holds no calibration\.json: fit one \(zr calibrate"):
        load(tmp_path / "m", calibrated=True)
    keep_calibration(SHARP, tmp_path / "m")
    with torch.no_grad():
        own = load(tmp_path / "m")
        assert own.calibration is None
        assert own.statistics == scale
        assert torch.equal(own(**asked).logits, plain(**asked).logits)
        found = load(tmp_path / "m", calibrated=True)
        assert found.calibration == SHARP
        assert found.statistics is None  # those that are there are of other scores
        torch.testing.assert_close(found(**asked).probs, SHARP(plain(**asked)).probs)
        found.statistics = moved
        found.save_pretrained(tmp_path / "n")
        again = load(tmp_path / "n", calibrated=True)
        assert (again.calibration, again.statistics) == (SHARP, moved)
        assert torch.equal(again(**asked).logits, found(**asked).logits)
    assert scale_statistics(tmp_path / "n", calibrated=True) == moved
    with pytest.raises(FileNotFoundError, match=r"n holds no statistics\.json"):
        scale_statistics(tmp_path / "n")
    for name in ("m", "n"):
        assert "| realism | temperature 2.000 |" in (tmp_path / name / "README.md").read_text()
    load(tmp_path / "n").save_pretrained(tmp_path / "n")  # other weights would need another calibration
    assert not (tmp_path / "n" / "calibration.json").exists()
    assert "Calibration" not in (tmp_path / "n" / "README.md").read_text()


def test_keeping_a_calibration_touches_nothing_else(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    card = tmp_path / "m" / "README.md"
    text = card.read_text() + "\n## Mine\n\nAsk me.\n"
    card.write_text(text)
    before = {p: p.read_bytes() for p in (tmp_path / "m").rglob("*") if p.is_file()}
    keep_calibration(SHARP, tmp_path / "m")
    first = card.read_text()
    keep_calibration(Temperature(RUBRIC.scale_id, NAMES, (3.0,) * 4), tmp_path / "m")
    second = card.read_text()
    assert first.startswith(text.rstrip())
    assert second.startswith(text.rstrip())
    assert second.count("## Calibration") == 1
    assert "temperature 3.000" in second
    assert "temperature 2.000" not in second
    after = {p: p.read_bytes() for p in (tmp_path / "m").rglob("*") if p.is_file()}
    assert set(after) - set(before) == {tmp_path / "m" / "calibration.json"}
    assert all(after[p] == content for p, content in before.items() if p != card)


def test_of_another_scale_or_wording(model, tmp_path):
    other = Temperature(RUBRIC.select(["realism"]).scale_id, ("realism",), (2.0,))
    with pytest.raises(ValueError, match=r"fitted for scale .* \(realism\), the model answers on scale"):
        model.calibration = other
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="fitted for scale"):
        keep_calibration(other, tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"holds no reward\.json"):
        keep_calibration(SHARP, tmp_path)
    other.save(tmp_path / "m" / "calibration.json")
    assert load(tmp_path / "m").calibration is None
    with pytest.raises(ValueError, match="fitted for scale"):
        load(tmp_path / "m", calibrated=True)
    SHARP.save(tmp_path / "m" / "calibration.json")
    with pytest.raises(ValueError, match="is of answers to the saved wording: leave out rubric, or calibrated"):
        load(tmp_path / "m", calibrated=True, rubric=shapes.rubric(reasoning=True))


@torch.no_grad()
def test_a_reasoning_model_keeps_its_own(asked, tmp_path):
    policy = Policy(build("qwen3_vl", shapes.rubric(reasoning=True)))
    teacher = ReasoningReward(policy, traces=2, rule=SamplingRule(length=3))
    own = teacher(**asked)
    teacher.calibration = SHARP
    torch.testing.assert_close(teacher(**asked).probs, SHARP(own).probs)  # over the mixture of both traces
    teacher.save_pretrained(tmp_path / "t")
    assert load(tmp_path / "t", calibrated=True).calibration == SHARP
