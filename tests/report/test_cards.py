import base64
import io

import pytest
import torch
from PIL import Image

from zr.report import Card, Judgement, cards
from zr.scores import ScoreDistribution

Q = ScoreDistribution(torch.tensor([0.1, 0.2, 0.7]).log(), bins=(1.0, 2.0, 5.0))


def test_numbers_are_those_of_the_input():
    judgement = Judgement("realism", Q, votes=torch.tensor([1, 0, 3]), score=4.0)
    assert float(judgement.mean) == pytest.approx(0.1 + 0.4 + 3.5)
    assert float(judgement.sd) == pytest.approx((0.1 * 9 + 0.2 * 4 + 0.7 * 1) ** 0.5, abs=0.005)
    assert judgement.annotated == "4.00"
    assert [bar.label for bar in judgement.bars] == ["1", "2", "5"]
    assert [bar.share for bar in judgement.bars] == pytest.approx([0.1, 0.2, 0.7])
    assert [bar.voted for bar in judgement.bars] == pytest.approx([0.25, 0.0, 0.75])


def test_bars_fit_their_chart_and_keep_their_proportions():
    bars = Judgement("realism", Q, votes=torch.tensor([1, 0, 3])).bars
    assert max(max(bar.height, bar.voted_height) for bar in bars) == pytest.approx(100)
    assert bars[2].height / bars[0].height == pytest.approx(7)
    flat = Judgement("realism", ScoreDistribution(torch.zeros(10), bins=range(10))).bars
    assert {round(bar.height, 3) for bar in flat} == {20.0}  # a tenth, of a chart that ends at one half


def test_places_lie_on_the_bins_also_uneven_ones():
    def place(score):
        return Judgement("realism", Q, score=score).annotated_place

    assert [place(score) for score in (1.0, 2.0, 5.0)] == pytest.approx([100 / 6, 50, 500 / 6])
    assert place(3.5) == pytest.approx((50 + 500 / 6) / 2)
    low, high, mean = Judgement("realism", Q).spread
    assert 100 / 6 <= low < mean < high <= 500 / 6  # within the scale, though mean + sd is beyond it


@pytest.mark.parametrize(("bins", "labels"), [(3, 3), (10, 10), (11, 6), (26, 9)])
def test_labels_are_thinned_where_they_would_overlap(bins, labels):
    q = ScoreDistribution(torch.zeros(bins), bins=[float(b) for b in range(bins)])
    assert sum(bar.label != "" for bar in Judgement("realism", q).bars) == labels


def test_without_annotation():
    for votes, score in ((None, None), (torch.zeros(3), float("nan"))):
        judgement = Judgement("realism", Q, votes=votes, score=score)
        assert judgement.annotated == ""
        assert judgement.annotated_place is None
        assert {bar.voted for bar in judgement.bars} == {None}
        assert "nnotators" not in judgement.description


def test_the_picture_comes_back_from_the_data_uri():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    card = Card("a", [], image=image)
    data = base64.b64decode(card.data_uri.removeprefix("data:image/png;base64,"))
    decoded = torch.frombuffer(bytearray(Image.open(io.BytesIO(data)).tobytes()), dtype=torch.uint8).reshape(20, 30, 3)
    assert torch.equal(decoded.permute(2, 0, 1), image)
    assert card.crisp
    large = Card("a", [], image=torch.zeros(3, 2000, 1000, dtype=torch.uint8))
    data = base64.b64decode(large.data_uri.removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (256, 512)
    assert not large.crisp


def test_cards_take_their_own_row():
    logits = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    q = ScoreDistribution(logits, Q.bins)
    votes, scores = torch.arange(12).reshape(2, 2, 3), torch.tensor([[1.0, 2.0], [torch.nan, 4.0]])
    made = cards(q, ["p", "q"], ["alignment", "realism"], votes=votes, scores=scores, titles=["a", "b"])
    assert [(card.prompt, card.title) for card in made] == [("p", "a"), ("q", "b")]
    for n, card in enumerate(made):
        for d, judgement in enumerate(card.judgements):
            assert float(judgement.mean) == pytest.approx(q.mean[n, d].item(), abs=0.005)
            assert judgement.votes.tolist() == votes[n, d].tolist()
    assert [judgement.annotated for card in made for judgement in card.judgements] == ["1.00", "2.00", "", "4.00"]


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="index it first"):
        Judgement("realism", Q.expand((2,)))
    for votes in (torch.ones(4), torch.tensor([1, -1, 3])):
        with pytest.raises(ValueError, match="one per bin"):
            Judgement("realism", Q, votes=votes)
    for image in (torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            Card("a", [], image=image)
    q = Q.expand((2, 1))
    for wrong in ({"votes": torch.zeros(2, 3)}, {"scores": torch.zeros(2)}, {"images": []}, {"titles": ["a"]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            cards(q, ["a", "b"], ["realism"], **wrong)
    with pytest.raises(ValueError, match="prediction must be"):
        cards(q, ["a"], ["realism"])
