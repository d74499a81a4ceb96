"""Next-token targets against cross-entropy by hand on the plain logits of each whole sequence."""

import pytest
import torch
from plain import FAMILIES, build, chat, forward

from zr.data import collate, shapes
from zr.models import ScoreTokenHead, compose
from zr.stages import Language, ReasonThenScore, ScoreOnly, ScoreThenReason

THINKING = shapes.rubric(reasoning=True)
FORMS = {
    "score": (ScoreOnly(),),
    "reason": (ReasonThenScore(THINKING),),
    "rationale": (ScoreThenReason(),),
    "all": (ScoreOnly(), ReasonThenScore(THINKING), ScoreThenReason()),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return compose(build(request.param), ScoreTokenHead)


@pytest.fixture(scope="module")
def batch():
    """Two records of lessons; one score and one text taken away, one score between two bins."""
    batch = collate(list(shapes.records("base", count=2, candidates=2)), shapes.rubric().scale)
    batch.scores[0, 1], batch.known[0, 1] = torch.nan, False
    batch.scores[1, 2] = 2.6
    del batch.texts[2]["aesthetics"]
    return batch


def stage(model, *answers, **options):
    language = Language(model, {str(i): answer for i, answer in enumerate(answers)}, **options)
    language.log = lambda *_, **__: None
    return language


def by_hand(model, batch, answers, dimensions=shapes.DIMENSIONS):
    """Sum and number of token losses, sequence by sequence; the tokens to learn are spelled out here."""
    backbone, losses = model.backbone, []
    ids = backbone.processor.tokenizer.convert_tokens_to_ids
    for n, name in [(n, name) for n in range(4) for name in dimensions]:
        score, text = batch.scores[n, shapes.DIMENSIONS.index(name)].item(), batch.texts[n].get(name)
        if score != score:
            continue
        label = "ABCDEFGHI"[round(2 * (score - 1))]
        words = None if text is None else text.replace(",", " , ").split()
        for answer in answers:
            direct = chat(batch.prompts[n], name)
            match answer:
                case ScoreOnly():
                    question, tokens, learned = direct, ["score", label], [False, True]
                case ReasonThenScore() if words:
                    question = chat(batch.prompts[n], name, thinking=True)
                    tokens = [*words, "</think>", "score", label]
                    learned = [True] * (len(words) + 1) + [False, True]
                case ScoreThenReason() if words:
                    question, tokens = direct, ["score", label, *words, "</think>"]
                    learned = [False] + [True] * (len(words) + 2)
                case _:
                    continue
            logits = forward(backbone, question, [batch.images[n] / 255], ids(tokens))[2]
            start = len(logits) - len(tokens)
            for k, (token, counts) in enumerate(zip(tokens, learned, strict=True)):
                if counts:
                    losses.append(-logits[start + k - 1].log_softmax(-1)[ids(token)])
    return sum(losses), len(losses)


@pytest.mark.parametrize("form", FORMS)
def test_loss_by_hand(model, batch, form):
    with torch.no_grad():
        total, count = by_hand(model, batch, FORMS[form])
        assert count > 10
        loss = stage(model, *FORMS[form]).training_step(batch)
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)


def test_gradient_by_hand(model, batch):
    named = dict(model.backbone.model.named_parameters())
    total, count = by_hand(model, batch, FORMS["all"])
    expected = torch.autograd.grad(total / count, list(named.values()), allow_unused=True)
    found = torch.autograd.grad(stage(model, *FORMS["all"]).training_step(batch), list(named.values()), allow_unused=True)
    for name, ours, plain in zip(named, found, expected, strict=True):
        if plain is None:
            assert ours is None, name
        else:
            assert (ours - plain).norm() <= 1e-4 * plain.norm() + 1e-6, name


def test_some_dimensions(model, batch):
    with torch.no_grad():
        total, count = by_hand(model, batch, FORMS["all"], ["plausibility", "alignment"])
        loss = stage(model, *FORMS["all"], dimensions=["plausibility", "alignment"]).training_step(batch)
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_lowers_it(batch, family):
    language = stage(compose(build(family), ScoreTokenHead), *FORMS["all"])
    optimizer = torch.optim.SGD(language.parameters(), lr=0.05)
    before = language.training_step(batch)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = language.training_step(batch)
    assert after < before - 0.01


def test_errors(model, batch):
    with pytest.raises(ValueError, match="answers is empty"):
        Language(model, {})
    with pytest.raises(ValueError, match=r"different names among .* got \['beauty'\]"):
        Language(model, {"score": ScoreOnly()}, dimensions=["beauty"])
    with pytest.raises(ValueError, match="another wording must keep the scale"):
        Language(model, {"reason": ReasonThenScore(shapes.rubric(["realism"], reasoning=True))})
    empty = collate(list(shapes.records("unlabelled", count=1, candidates=2)), shapes.rubric().scale)
    with pytest.raises(ValueError, match=r"a batch \(unlabelled-00000\.c0, \.\.\.\) has nothing to learn"):
        stage(model, ScoreOnly()).training_step(empty)
