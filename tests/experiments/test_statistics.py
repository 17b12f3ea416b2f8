"""
The statistics of the experiments, on numbers worked out by hand and on simulated runs whose true
effect is known.
"""

import math
import random

import common
import pytest


def near(*values):
    return pytest.approx(values, abs=1e-3)


def test_an_interval_by_hand():
    """1, 2, 3: mean 2, s = 1, t(2) = 4.303. 2, 4, 4, 4, 6: mean 4, s = sqrt(2), t(4) = 2.776."""
    found = common.interval([1.0, 2.0, 3.0])
    assert (found["mean"], found["n"]) == (2, 3)
    assert (found["low"], found["high"]) == near(2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3))
    found = common.interval([2, 4, 4, 4, 6])
    assert (found["mean"], found["low"], found["high"]) == near(4, 2.244, 5.756)
    assert common.interval([0.5, 0.5])["low"] == common.interval([0.5, 0.5])["high"] == 0.5


def test_one_number_has_no_interval_and_none_has_nothing():
    assert common.interval([0.7]) == {"mean": 0.7, "low": None, "high": None, "n": 1}
    with pytest.raises(ValueError, match="at least one"):
        common.interval([])


def test_a_difference_is_taken_seed_by_seed():
    """.4 and .2: mean .3, s = .1414, so .3 +- 12.706 x .1. Where all seeds agree on the difference
    the interval has no width, however much the seeds themselves differ."""
    found = common.difference([0.9, 0.8], [0.5, 0.6])
    assert (found["mean"], found["low"], found["high"]) == near(0.3, -0.9706, 1.5706)
    found = common.difference([0.1, 0.5, 0.9], [0.0, 0.4, 0.8])
    assert (found["mean"], found["low"], found["high"]) == near(0.1, 0.1, 0.1)
    with pytest.raises(ValueError, match="3 and 2 figures"):
        common.difference([1, 2, 3], [1, 2])


def density(t, df):
    """Student's density."""
    size = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    return size * (1 + t * t / df) ** (-(df + 1) / 2)


@pytest.mark.parametrize("df", range(1, len(common.T) + 1))
def test_the_table_of_t(df):
    """Between 0 and t lies .475 of the distribution, by Simpson's rule."""
    n = 2000
    step = common.T[df - 1] / n
    inner = sum((4 if i % 2 else 2) * density(i * step, df) for i in range(1, n))
    area = step / 3 * (density(0, df) + inner + density(n * step, df))
    assert area == pytest.approx(0.475, abs=4e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 12, 40])
def test_coverage(n):
    """Of 4000 simulated comparisons of n seeds, 95 % have an interval with the true difference in
    it. What a seed gives to both arms, ten times their own noise, cancels."""
    rng, hits, trials = random.Random(n), 0, 4000
    for _ in range(trials):
        shared = [rng.gauss(0.5, 0.3) for _ in range(n)]
        a = [s + 0.1 + rng.gauss(0, 0.03) for s in shared]
        b = [s + rng.gauss(0, 0.03) for s in shared]
        found = common.difference(a, b)
        hits += found["low"] <= 0.1 <= found["high"]
    assert hits / trials == pytest.approx(0.95, abs=0.012)   # 3.5 standard errors


@pytest.mark.parametrize("low, high, where", [
    (0.06, 0.1, "above"), (-0.2, 0.04, "below"), (0.01, 0.09, "unclear"), (0.05, 0.1, "unclear"),
    (-0.1, 0.05, "unclear"), (None, None, "unclear")])
def test_compared_with_a_margin(low, high, where):
    """Above or below only with the whole interval; an end on the margin is unclear."""
    assert common.compared({"mean": 0.05, "low": low, "high": high, "n": 5}, 0.05) == where


def test_a_false_alarm_is_rare():
    """Where the true effect is exactly the margin, it is called above in 2.5 % of 4000 comparisons
    of five seeds, and below in as many."""
    rng, calls = random.Random(0), []
    for _ in range(4000):
        effect = common.interval([rng.gauss(0.05, 0.02) for _ in range(5)])
        calls.append(common.compared(effect, 0.05))
    for where in ("above", "below"):
        assert calls.count(where) / len(calls) == pytest.approx(0.025, abs=0.009)
