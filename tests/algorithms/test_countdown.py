"""The countdown task: what is rewarded, how many problems there are, what chance earns."""

import inspect
import itertools
import random
import re
import zlib
from collections import Counter
from fractions import Fraction

import pytest

from tasks import Countdown
from tiny import split_by_hand


# -- countdown ------------------------------------------------------------------------------------


@pytest.mark.parametrize("completion, reward", [
    # 0 is not among the numbers
    ("3*7+5", 1), ("5+7*3", 1), ("5+3*7", 1), ("(7*3)+5", 1), ("5-(0-3)*7", 0),
    ("3*7+6", 0), ("3*7+3+2", 0), ("3*7*5", 0), ("7*3", 0), ("26", 0), ("3*7+5=26", 0),
    ("3*7+5 ", 0), ("37-5", 0), ("3*7+5+5-5", 0), ("", 0), ("3*7+", 0), ("hello", 0),
])
def test_countdown_reward(completion, reward):
    """1 for every expression that uses 3, 5 and 7 once each and makes 26; 0 for other numbers,
    reuse or left-overs."""
    columns = dict(numbers=[[3, 5, 7]], target=[26])
    assert Countdown.reward(["3,5,7>26="], [completion], **columns) == [reward]


def test_countdown_fractions_on_the_way_are_exact():
    """8/3*3 makes 8 exactly, which floating point need not."""
    assert Countdown.reward([""], ["8/3*3"], [[3, 3, 8]], [8]) == [1.0]


def test_countdown_problems_are_solved_by_their_solutions():
    """Each problem brings a solution that its own reward accepts, and its prompt says the numbers
    and the target."""
    task = Countdown()
    for p in task.problems("train", 200, seed=0):
        assert task.reward([p["prompt"]], [p["solution"]], [p["numbers"]], [p["target"]]) == [1.0]
        a, b, c = p["numbers"]
        assert p["prompt"] == f"{a},{b},{c}>{p['target']}="
        assert len(p["solution"]) + 1 <= task.max_new_tokens


def test_countdown_targets():
    """Out of distribution are targets above 40, in the corpus too; training and test stay at or
    below 40."""
    task = Countdown()
    assert all(40 < p["target"] <= 99 for p in task.problems("ood", 200, 0))
    for split in ("train", "test"):
        assert all(1 <= p["target"] <= 40 for p in task.problems(split, 200, 0))
    above = sum(int(d.split(">")[1].split("=")[0]) > 40 for d in task.corpus(500, 0))
    assert 0.18 < above / 500 < 0.32                                  # about a quarter


# -- countdown: how many problems there are, what random expressions earn -------------------------


def calculate(a, symbol, b):
    if symbol == "/":
        return Fraction(a) / b
    return a + b if symbol == "+" else a - b if symbol == "-" else a * b


def expressions(numbers):
    """The 96 expressions of three numbers with their values. No parser: products come first."""
    for a, b, c in itertools.permutations(numbers):
        for x, y in itertools.product("+-*/", repeat=2):
            if x in "+-" and y in "*/":
                yield f"{a}{x}{b}{y}{c}", calculate(a, x, calculate(b, y, c))
            else:
                yield f"{a}{x}{b}{y}{c}", calculate(calculate(a, x, b), y, c)


@pytest.fixture(scope="module")
def countdown_problems():
    """Every problem of countdown: {split: {prompt: share of the 96 expressions that are right}}."""
    found = {"train": {}, "test": {}, "ood-train": {}, "ood": {}}
    for numbers in itertools.combinations_with_replacement(range(1, 26), 3):
        ways = Counter(v for _, v in expressions(numbers))
        for target, n in ways.items():
            if target.denominator == 1 and 1 <= target <= 99:
                prompt = "{},{},{}>".format(*numbers) + f"{target}="
                is_held_out = zlib.crc32(prompt.encode()) % 10 == 0
                found[split_by_hand(is_held_out, target > 40)][prompt] = Fraction(n, 96)
    return found


def test_how_many_problems_countdown_has(countdown_problems):
    """13,957 training and 1,596 test problems, 4,752 and 537 out of distribution. By default RL
    draws 4,000 of the first, and 256 of the second and of the last judge a run: all distinct. The
    docstring says so."""
    counts = {"train": 13957, "test": 1596, "ood-train": 4752, "ood": 537}
    assert {split: len(found) for split, found in countdown_problems.items()} == counts
    sizes = {"train": 4000, "test": 256, "ood-train": 500, "ood": 256}
    for split, size in sizes.items():
        drawn = [p["prompt"] for p in Countdown().problems(split, size, 0)]
        assert len(drawn) == len(set(drawn)) == size
        assert set(drawn) <= set(countdown_problems[split])
    said = re.findall(r"\d[\d,]*\b", inspect.getdoc(Countdown))
    assert {"25", "13,957", "1,596", "4,752", "537", "4,000", "256"} <= set(said)


def test_more_problems_than_there_are():
    """Of a countdown with the numbers 1, 2 and 3 no more are drawn than it has; the search ends."""
    task = Countdown()
    task.largest = 3
    few = task.problems("test", 100, 0)
    assert 1 <= len(few) == len({p["prompt"] for p in few}) < 20
    assert task.chance(1) == task.chance(1, size=len(few)) > 0


@pytest.mark.parametrize("k, expected", [(1, .0617), (4, .2145), (16, .5666)])
def test_chance_of_countdown_is_exact(countdown_problems, k, expected):
    """The mean of 1 - (1 - p)^k over the 256 test problems that judge a run, every p counted."""
    prompts = [p["prompt"] for p in Countdown().problems("test", 256, 0)]
    shares = [countdown_problems["test"][prompt] for prompt in prompts]
    exact = float(sum(1 - (1 - p) ** k for p in shares) / 256)
    assert exact == pytest.approx(expected, abs=5e-5)
    assert Countdown().chance(k) == pytest.approx(exact, abs=1e-12)
    assert f"{exact:.3f}".lstrip("0") in inspect.getdoc(Countdown.chance)


def test_chance_of_one_problem_by_hand():
    """`3,17,21>35=` is met by 21+17-3, 17+21-3, 21-3+17 and 17-3+21 alone: four of 96, one in
    24."""
    assert Countdown().problems("test", 1, 0)[0]["prompt"] == "3,17,21>35="
    right = {text for text, v in expressions([3, 17, 21]) if v == 35}
    assert right == {"21+17-3", "17+21-3", "21-3+17", "17-3+21"}
    assert Countdown().chance(1, size=1) == pytest.approx(1 / 24)
    assert Countdown().chance(2, size=1) == pytest.approx(1 - (23 / 24) ** 2)


def test_random_expressions_are_equally_likely():
    """20,000 draws: each of the 96 expressions of 3, 5 and 7 as often as the others, to within five
    standard deviations; of two equal numbers both are used."""
    rng = random.Random(0)
    counts = Counter(Countdown.random_expression(rng, [3, 5, 7]) for _ in range(20000))
    assert set(counts) == {text for text, _ in expressions([3, 5, 7])}
    assert all(abs(n - 20000 / 96) < 5 * (20000 / 96) ** 0.5 for n in counts.values())
    for _ in range(20):
        text = Countdown.random_expression(rng, [4, 4, 9])
        assert sorted(re.findall(r"\d", text)) == ["4", "4", "9"]
