import numpy as np
import pytest
from rich.console import Console

from zr.metrics import compare, evaluate
from zr.report import Estimate, Table, dimension_table, scorer_table

RNG = np.random.default_rng(0)
SCORE = RNG.integers(2, 11, (40, 2)) / 2
NOISY = SCORE + RNG.normal(0, 1, SCORE.shape)
PROMPT = np.arange(40) // 4
KNOWN = np.ones_like(SCORE, dtype=bool)
NAMES = ("alignment", "realism")


def table(mu):
    return evaluate(mu, SCORE, KNOWN, PROMPT, NAMES, samples=50)


def test_every_number_of_the_table_is_that_of_the_input():
    source = table(NOISY)
    shown = dimension_table(source)
    assert [row[0] for row in shown.rows] == [*NAMES, "mean"]
    for row, line in zip(shown.rows, [*source["dimensions"].values(), source["overall"]], strict=True):
        for cell, key in zip(row[1:5], ("hpa", "margin_hpa", "plcc", "srcc"), strict=True):
            assert abs(float(cell.value) - line[key]["estimate"]) <= 5e-4
            low, high = (float(part) for part in cell.interval.strip("[]").split(","))
            assert abs(low - line[key]["low"]) <= 5e-3
            assert abs(high - line[key]["high"]) <= 5e-3
        assert row[5] == str(line["pairs"])


def test_one_dimension_has_no_mean():
    source = evaluate(NOISY[:, :1], SCORE[:, :1], KNOWN[:, :1], PROMPT, NAMES[:1], samples=20)
    assert [row[0] for row in dimension_table(source).rows] == ["alignment"]


def test_a_difference_shows_its_sign_in_every_number():
    source = compare(SCORE, NOISY, SCORE, KNOWN, PROMPT, NAMES, samples=50)
    cells = [cell for row in dimension_table(source, difference=True).rows for cell in row[1:5]]
    numbers = [number for cell in cells for number in [cell.value, *cell.interval.strip("[]").split(", ")]]
    assert all(number[0] in "+-" for number in numbers)


def test_what_is_not_defined_is_a_dash():
    source = evaluate(np.ones_like(SCORE), SCORE, KNOWN, PROMPT, NAMES, samples=20)  # a constant has no correlation
    assert {str(row[3]) for row in dimension_table(source).rows} == {"–"}
    assert str(Estimate.of({"estimate": 0.5, "low": None, "high": None})) == "0.500"


def test_scorers_side_by_side():
    shown = scorer_table({"noisy": table(NOISY), "right": table(SCORE)})
    assert shown.columns == ("scorer", *NAMES, "mean")
    assert str(shown.rows[1][1]) == "1.000 [1.00, 1.00]"
    assert "95%" in shown.note


def test_scorers_of_other_dimensions_are_refused():
    other = evaluate(NOISY[:, :1], SCORE[:, :1], KNOWN[:, :1], PROMPT, NAMES[:1], samples=20)
    with pytest.raises(ValueError, match="same dimensions"):
        scorer_table({"a": table(NOISY), "b": other})
    with pytest.raises(ValueError, match="same dimensions"):
        scorer_table({})


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 columns, a row has 1"):
        Table("", ("a", "b"), [("x",)])


HOSTILE = "<img src=x onerror=1> | `code` [link](javascript:1)\n[bold red]not markup[/] \x1b[31m \u202e"


def test_markdown_escapes_names():
    line = Table("", ("scorer", "HPA"), [(HOSTILE, Estimate("0.500"))]).markdown().splitlines()
    assert len(line) == 3
    assert line[2] == (
        r"| &lt;img src=x onerror=1&gt; \| \`code\` \[link\](javascript:1) \[bold red\]not markup\[/\] "
        r"\\u{1b}\[31m \\u{202e} | 0.500 |"
    )


def test_the_terminal_shows_names_as_they_are():
    console = Console(width=300, record=True, file=None, force_terminal=False, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        console.print(Table("", ("scorer", "HPA"), [(HOSTILE, Estimate("0.500", "[0.40, 0.60]"))]).terminal())
    assert "[bold red]not markup[/] \\u{1b}[31m \\u{202e}" in capture.get()
    assert "0.500 [0.40, 0.60]" in capture.get()
    assert "\x1b[31m" not in capture.get()
