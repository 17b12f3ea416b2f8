"""The built-in tasks: no test problem is solved in what is trained on, how many problems there are,
what chance earns."""

import inspect
import itertools
import random
import re
import zlib
from collections import Counter
from fractions import Fraction

import pytest

import data
from data import Chain, Countdown


def split_by_hand(is_held_out, is_ood):
    """The name of the split, in a table of its own."""
    return {(False, False): "train", (True, False): "test",
            (False, True): "ood-train", (True, True): "ood"}[is_held_out, is_ood]


# -- chain: no test problem is solved in what is trained on ----------------------------------------


def all_chains(terms, symbols="+-*>"):
    """Every chain of so many terms."""
    for digits in itertools.product("0123456789", repeat=terms):
        for between in itertools.product(symbols, repeat=terms - 1):
            yield digits[0] + "".join(s + d for s, d in zip(between, digits[1:])) + "="


def solved_in(texts):
    """The problems that texts solve, with their answers: each document as a whole and each step."""
    solved = set()
    for text in texts:
        prompt, answer = text.split("=", 1)
        solved.add(f"{prompt}={re.split('[;=]', answer)[-1]}")
        solved.update(step for step in answer.split(";") if "=" in step)
    return solved


@pytest.mark.parametrize("terms", [(2, 2), (2, 3), (2, 4), (3, 4)], ids=str)
def test_no_test_problem_is_solved_in_what_is_trained_on(terms):
    """No test or ood problem stands with its answer in 20,000 documents, the demonstrations or the
    training problems, as a whole or as a step. Of two terms all test problems are looked for, 37
    and 11 with `>`; of more terms 2,000 drawn ones of each split."""
    task = Chain(*terms)
    held_out = {p["prompt"] + p["answer"] for split in ("test", "ood")
                for p in data.problems(task, split, 2000, 0)}
    if task.min_terms == 2:
        short = [p for p in all_chains(2) if zlib.crc32(p.encode()) % 10 == 0]
        assert len(short) == 37 + 11
        held_out |= {p + Chain.solve(p)["answer"] for p in short}
    texts = task.corpus(20000, 0)
    texts += [e["prompt"] + e["completion"] for e in data.demonstrations(task, 2000, 0)]
    for split in ("train", "ood-train"):
        texts += [p["prompt"] + p["steps"] for p in data.problems(task, split, 2000, 0)]
    solved = solved_in(texts)
    assert len(solved) > 300 and not solved & held_out


@pytest.mark.parametrize("prompt, problem", [
    ("3*0+8=", "0+8="), ("2-2+8=", "0+8="), ("4-2>0=", "2>0="), ("2>0+1=", "2>0=")])
def test_a_step_that_is_a_test_problem_counts_as_that_problem(prompt, problem):
    """2-2+8 has the step 0+8, a test problem: where there are problems of two terms it is held out
    as well, and where there are none it is not."""
    assert data.is_test(problem) and not data.is_test(prompt)
    assert problem + Chain.solve(problem)["answer"] in Chain.solve(prompt)["steps"].split(";")
    assert Chain(2, 3).is_held_out(prompt) and not Chain(3, 4).is_held_out(prompt)


def test_digits_that_are_no_step_do_not_count():
    """4-0+8 is worked out as 4-0=4;4+8=2 and so does not solve the test problem 0+8."""
    assert data.is_test("0+8=") and not Chain(2, 3).is_held_out("4-0+8=")


@pytest.mark.parametrize("split", ["train", "test", "ood-train", "ood"])
def test_the_splits_are_those_of_an_enumeration(split):
    """All chains of two and three terms are sorted into the splits one by one: what is drawn lies
    in its own split, and nearly all chains of two terms are drawn."""
    expected = set()
    for prompt in itertools.chain(all_chains(2), all_chains(3)):
        problems = [prompt] + [step[:4] for step in Chain.solve(prompt)["steps"].split(";")]
        is_held_out = any(zlib.crc32(p.encode()) % 10 == 0 for p in problems)
        if split_by_hand(is_held_out, ">" in prompt) == split:
            expected.add(prompt)
    drawn = {p["prompt"] for p in data.problems(Chain(2, 3), split, 4000, 0)}
    assert drawn <= expected
    short = {p for p in expected if len(p) == 4}
    assert len(drawn) > 500 and len(short & drawn) >= 0.9 * len(short) > 9


@pytest.mark.parametrize("task, corpus, first", [
    (Chain(), 3151104650, {"train": "6*4*0= 4+7*6= 1-5-9=", "test": "4*5+9= 0*0*6= 5-3-7*0=",
                           "ood": "2-4>4= 7>4*5= 2+2>6*1=",
                           "ood-train": "7>5*4= 1+0>5+0= 8>1+6="}),
    (Countdown(), 1587384430, {"train": "2,5,7>14= 1,3,5>16= 2,4,7>10=",
                               "test": "1,5,8>12= 3,7,8>17= 2,3,3>2=",
                               "ood": "6,8,9>57= 2,7,9>61= 1,5,9>45=",
                               "ood-train": "5,6,9>51= 8,8,9>73= 5,6,9>49="}),
], ids=["chain", "countdown"])
def test_the_default_tasks_draw_what_they_always_drew(task, corpus, first):
    """Documents and problems are pinned, so that the figures of two versions can be compared."""
    assert zlib.crc32("\n".join(task.corpus(2000, 0)).encode()) == corpus
    for split, prompts in first.items():
        assert [p["prompt"] for p in data.problems(task, split, 3, 0)] == prompts.split()


# -- countdown: how many problems there are, what random expressions earn --------------------------


def calculate(a, symbol, b):
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[symbol]


def expressions(numbers):
    """The 96 expressions of three numbers with their values. No parser: products come first."""
    for a, b, c in itertools.permutations(map(Fraction, numbers)):
        for x, y in itertools.product("+-*/", repeat=2):
            if x in "+-" and y in "*/":
                yield f"{a}{x}{b}{y}{c}", calculate(a, x, calculate(b, y, c))
            else:
                yield f"{a}{x}{b}{y}{c}", calculate(calculate(a, x, b), y, c)


@pytest.fixture(scope="module")
def countdown_problems():
    """Every problem of countdown: {split: {prompt: share of the 96 expressions that are right}}."""
    found = {"train": {}, "test": {}, "ood-train": {}, "ood": {}}
    for numbers in itertools.combinations_with_replacement(range(1, 10), 3):
        for target, ways in Counter(v for _, v in expressions(numbers)).items():
            if target.denominator == 1 and 1 <= target <= 99:
                prompt = "{},{},{}>".format(*numbers) + f"{target}="
                is_held_out = zlib.crc32(prompt.encode()) % 10 == 0
                found[split_by_hand(is_held_out, target > 40)][prompt] = Fraction(ways, 96)
    return found


def test_how_many_problems_countdown_has(countdown_problems):
    """1,215 training and 114 test problems, 206 and 20 out of distribution. By default RL draws
    1,070 of the first and a run is judged by 87 of the second. The docstring says so."""
    counts = {"train": 1215, "test": 114, "ood-train": 206, "ood": 20}
    assert {split: len(found) for split, found in countdown_problems.items()} == counts
    sizes = {"train": 4000, "test": 256, "ood-train": 500, "ood": 100}
    drawn = {split: {p["prompt"] for p in data.problems(Countdown(), split, size, 0)}
             for split, size in sizes.items()}
    assert len(drawn["train"]) == 1070 and len(drawn["test"]) == 87
    assert all(prompts <= set(countdown_problems[split]) for split, prompts in drawn.items())
    said = re.findall(r"\d[\d,]*\b", inspect.getdoc(Countdown))
    assert {"1,215", "114", "206", "20", "4,000", "1,070", "256", "87"} <= set(said)


@pytest.mark.parametrize("k, expected", [(1, .0724), (4, .2483), (16, .6211)])
def test_chance_of_countdown_is_exact(countdown_problems, k, expected):
    """The mean of 1 - (1 - p)^k over the 256 test problems that judge a run, every p counted."""
    prompts = [p["prompt"] for p in data.problems(Countdown(), "test", 256, 0)]
    shares = [countdown_problems["test"][prompt] for prompt in prompts]
    exact = float(sum(1 - (1 - p) ** k for p in shares) / 256)
    assert exact == pytest.approx(expected, abs=5e-5)
    assert Countdown().chance(k) == pytest.approx(exact, abs=1e-12)


def test_chance_of_one_problem_by_hand():
    """`1,5,8>12=` is met by 5+8-1, 8+5-1, 5-1+8 and 8-1+5 alone: four of 96, one in 24."""
    assert data.problems(Countdown(), "test", 1, 0)[0]["prompt"] == "1,5,8>12="
    right = {text for text, v in expressions([1, 5, 8]) if v == 12}
    assert right == {"5+8-1", "8+5-1", "5-1+8", "8-1+5"}
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


def test_chance_of_chain_counts_tuples_of_guesses():
    """Of all tuples of k digits so many hold the answer, whichever digit that is."""
    for k in (1, 2, 3):
        hits = sum("7" in guesses for guesses in itertools.product("0123456789", repeat=k))
        assert Chain().chance(k) == pytest.approx(hits / 10 ** k)
