"""How silent bugs are: the rule on made-up figures, and what was measured with it."""

import math

import pytest

from assignments import bugs, make, silence
from conftest import ROOT

RUINS, DENTS, SHOWS, NOTHING = silence.CLASSES


def lines(end, loss=0.3, start=0.48, **more):
    """A run of two lines."""
    return [{"step": 0, "seconds": 0.1, "eval/accuracy": start},
            {"step": 20, "seconds": 0.2, "loss": loss, "eval/accuracy": end, **more}]


RIGHT = lines(0.98)


@pytest.mark.parametrize("wrong, expected", [
    (None, RUINS), (lines(0.10), RUINS), (lines(0.72), RUINS), (lines(math.nan), RUINS),
    (lines(0.74), DENTS), (lines(0.95), DENTS), (lines(0.951), SHOWS), (lines(1.0), SHOWS),
    (lines(0.98, loss=0.301), SHOWS), (lines(0.98, loss=0.3004), NOTHING),
    (lines(0.98, other=1.0), SHOWS), (lines(0.98)[:1] + lines(0.98), SHOWS),
    (lines(0.98, loss=math.nan), SHOWS), (lines(0.98), NOTHING)])
def test_the_rule(wrong, expected):
    """From .48 the right code reaches .98."""
    assert silence.silence(RIGHT, wrong) == expected


def test_the_clock_is_no_figure_and_large_numbers_have_three_digits():
    """100.04 is 100.0; 100.06 is not."""
    slow = [{**line, "seconds": 9.0, "tokens_per_second/train": 1.0} for line in RIGHT]
    assert silence.silence(RIGHT, slow) == NOTHING
    big = lines(0.98, size=100.0)
    assert silence.silence(big, lines(0.98, size=100.04)) == NOTHING
    assert silence.silence(big, lines(0.98, size=100.06)) == SHOWS


def test_reward_models_are_judged_by_pairs():
    """They have no held-out accuracy of answers."""
    right, wrong = ([{"step": 0, "eval/pair_accuracy": 0.5},
                     {"step": 20, "eval/pair_accuracy": end}] for end in (0.9, 0.1))
    assert silence.silence(right, wrong) == RUINS


def test_a_bug_in_lines_that_are_not_reached():
    """A statement is reached if one of its lines is; of two that are changed one is enough."""
    text = "if a:\n    x = f(1,\n          2)\ny = 1\n"

    def reaches(right, lines):
        return silence.reaches(bugs.gallery()[0]._replace(right=right), text, lines)
    assert reaches("          2)", {2}) and not reaches("          2)", {1, 4})
    assert reaches("2)\ny = 1\n", {4}) and not reaches("y = 1", {1, 2, 3})
    assert reaches("if a:", {1})


def test_the_curve_shows_what_differs_most():
    """Accuracy first, then up to four figures, the clock aside; what is none is left blank."""
    found = silence.curve(lines(0.98, a=1.0), lines(0.5, loss=math.nan, a=1.0))
    assert list(found) == ["eval/accuracy", "loss"]
    assert found["loss"] == [[None, 0.3], [None, None]]
    assert found["eval/accuracy"] == [[0.48, 0.98], [0.48, 0.5]]


def test_what_was_measured_is_of_this_gallery():
    """Nine in ten of the measured bugs are in the gallery as they were, and of those in the gallery
    nine in ten are measured; each class that the rule knows is consistent with its figures."""
    known = {bugs.name(bug) for bug in bugs.gallery()}
    measured = bugs.measured()
    assert len(known & set(measured)) >= 0.9 * max(len(known), len(measured))
    for row in measured.values():
        assert row["class"] in silence.CLASSES and row["command"] in silence.commands(row["file"])
        if row["class"] == DENTS:
            assert row["right"] - row["accuracy"] >= 0.03 - 1e-4
        assert ("curve" in row) == (row["class"] != NOTHING and "accuracy" in row)
        assert row["reached"] or row["class"] == NOTHING


def test_the_handout_has_the_table_that_was_measured():
    """Word by word; and no row says in which file its bug is."""
    import json
    path = ROOT / "assignments/handouts/7.md"
    measured = json.loads((make.HERE / "silence.json").read_text())
    assert silence.with_table(path.read_text(), measured) == path.read_text()
    assert "<!-- silence.json -->" in path.read_text()
    assert list(measured["flags"]) == list(silence.FLAGS[:6])
    assert f"with {silence.FLAGS[1]} steps" in " ".join(path.read_text().split())
