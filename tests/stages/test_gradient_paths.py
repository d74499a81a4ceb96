"""Which steps carry gradient: counted against what each paper says."""

from collections import Counter

import pytest
import torch

from zr.stages import LastSteps, RandomTruncation, ReFL


def draws(path, count=3000, steps=10):
    generator = torch.Generator().manual_seed(0)
    return Counter(path.draw(steps, generator) for _ in range(count))


def test_refl_draws_one_step_of_a_range_each_as_likely():
    found = draws(ReFL(3, 7))
    assert set(found) == {(1, stop) for stop in (3, 4, 5, 6, 7)}
    assert all(abs(n - 600) < 5 * (3000 * 0.2 * 0.8) ** 0.5 for n in found.values())


def test_draft_takes_the_last_steps():
    assert draws(LastSteps(4), 5) == {(4, 10): 5}


def test_align_prop_draws_how_many_of_the_last_steps():
    found = draws(RandomTruncation(4))
    assert set(found) == {(k, 10) for k in (1, 2, 3, 4)}
    assert all(abs(n - 750) < 5 * (3000 * 0.25 * 0.75) ** 0.5 for n in found.values())


def test_the_same_source_gives_the_same_steps():
    for path in (ReFL(1, 10), RandomTruncation(10)):
        drawn = [[path.draw(10, torch.Generator().manual_seed(i)) for i in range(20)] for _ in range(2)]
        assert drawn[0] == drawn[1]
        assert len(set(drawn[0])) > 5


@pytest.mark.parametrize("path", [ReFL(2, 6), LastSteps(6), RandomTruncation(6)])
def test_more_steps_than_there_are(path):
    path.check(6)
    with pytest.raises(ValueError, match=r"wants 6 steps, the generator has 5: give at most 5"):
        path.check(5)


@pytest.mark.parametrize(
    "make", [lambda: ReFL(0, 3), lambda: ReFL(4, 3), lambda: LastSteps(0), lambda: RandomTruncation(0)], ids=range(4)
)
def test_no_step(make):
    with pytest.raises(ValueError, match=r"no step.*: give"):
        make()
