"""The chain task: worked by hand, rewarded, and split so that no test problem is solved in what is
trained on."""

import itertools
import re
import zlib

import pytest

from harness.errors import InputError
from tasks import Chain, is_test
from tiny import split_by_hand


def after_equals(document):
    """What follows the first `=` of a document: the answer part of `7+5=2`."""
    return document.split("=", 1)[1]


def prompt_of(document):
    return document.split("=", 1)[0] + "="


# -- chain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, answer, steps", [
    ("7+5*3=", "6", "7+5=2;2*3=6"),
    ("1-2*3=", "7", "1-2=9;9*3=7"),              # -1 is 9 modulo 10
    ("0-9=", "1", "0-9=1"),
    ("7+5>3=", "3", "7+5=2;2>3=3"),
    ("9>0-9-9=", "1", "9>0=9;9-9=0;0-9=1"),
    ("8*7*6+4*1=", "0", "8*7=6;6*6=6;6+4=0;0*1=0"),
])
def test_chains_worked_by_hand(prompt, answer, steps):
    """From left to right, every result modulo 10."""
    assert Chain.solve(prompt) == {"answer": answer, "steps": steps}


@pytest.mark.parametrize("completion, reward", [
    ("6", 1), ("7+5=2;2*3=6", 1), ("7+5=3;2*3=6", 1),  # the last number alone counts, not the steps
    ("5", 0), ("7+5=2;2*3=7", 0), ("6;7", 0),
    ("", 0), ("6 ", 0), ("6x", 0), ("16", 0), ("6=", 0), ("6;", 0), ("7+5=2;2*3=6;", 0),
    ("6\n", 0), ("six", 0), (";=;=", 0),
])
def test_chain_reward(completion, reward):
    """1 where the last `;` or `=` is followed by the answer and by nothing else."""
    assert Chain.reward(["7+5*3="], [completion], answer=["6"]) == [reward]


def test_rewards_are_given_row_by_row():
    """Each completion is judged by the answer of its own row, and other columns are no trouble."""
    rewards = Chain.reward(["a", "b", "c"], ["1", "2", "1"], answer=["1", "1", "2"], steps=[""] * 3)
    assert rewards == [1.0, 0.0, 0.0]


def test_chain_corpus_is_a_textbook_and_then_everyday_text():
    """The first five twelfths are all worked, the rest about 30 %, every answer is right, one in
    fourteen has `>`. Of a long corpus the last 51,200 are everyday text."""
    task, corpus = Chain(), Chain().corpus(2400, seed=0)
    worked = [task.is_worked(prompt_of(d), after_equals(d)) for d in corpus]
    assert all(worked[:1000]) and 0.25 < sum(worked[1000:]) / 1400 < 0.35
    assert 0.05 < sum(">" in d for d in corpus) / 2400 < 0.09
    for d in corpus:
        right = Chain.solve(prompt_of(d))["answer"]
        assert task.reward([prompt_of(d)], [after_equals(d)], [right]) == [1.0]
    worked = [task.is_worked(prompt_of(d), after_equals(d)) for d in task.corpus(128_000, seed=0)]
    assert all(worked[:76_800]) and 0.25 < sum(worked[76_800:]) / 51_200 < 0.35


def test_chain_lengths():
    """Problems have min_terms to max_terms digits, and the longest worked answer with its <end>
    fits max_new_tokens."""
    task = Chain(2, 4)
    problems = task.problems("train", 300, seed=0)
    assert {len(p["prompt"]) for p in problems} == {4, 6, 8}
    assert max(len(p["steps"]) for p in problems) + 1 <= task.max_new_tokens
    for wrong in ((1, 3), (4, 3)):
        with pytest.raises(InputError, match="2 <= min_terms <= max_terms"):
            Chain(*wrong)


# -- chain: no test problem is solved in what is trained on ---------------------------------------


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
                for p in task.problems(split, 2000, 0)}
    if task.min_terms == 2:
        short = [p for p in all_chains(2) if zlib.crc32(p.encode()) % 10 == 0]
        assert len(short) == 37 + 11
        held_out |= {p + Chain.solve(p)["answer"] for p in short}
    texts = task.corpus(20000, 0)
    texts += [e["prompt"] + e["completion"] for e in task.demonstrations(2000, 0)]
    for split in ("train", "ood-train"):
        texts += [p["prompt"] + p["steps"] for p in task.problems(split, 2000, 0)]
    solved = solved_in(texts)
    assert len(solved) > 300 and not solved & held_out


@pytest.mark.parametrize("prompt, problem", [
    ("3*0+8=", "0+8="), ("2-2+8=", "0+8="), ("4-2>0=", "2>0="), ("2>0+1=", "2>0=")])
def test_a_step_that_is_a_test_problem_counts_as_that_problem(prompt, problem):
    """2-2+8 has the step 0+8, a test problem: where there are problems of two terms it is held out
    as well, and where there are none it is not."""
    assert is_test(problem) and not is_test(prompt)
    assert problem + Chain.solve(problem)["answer"] in Chain.solve(prompt)["steps"].split(";")
    assert Chain(2, 3).is_held_out(prompt) and not Chain(3, 4).is_held_out(prompt)


def test_digits_that_are_no_step_do_not_count():
    """4-0+8 is worked out as 4-0=4;4+8=2 and so does not solve the test problem 0+8."""
    assert is_test("0+8=") and not Chain(2, 3).is_held_out("4-0+8=")


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
    drawn = {p["prompt"] for p in Chain(2, 3).problems(split, 4000, 0)}
    assert drawn <= expected
    short = {p for p in expected if len(p) == 4}
    assert len(drawn) > 500 and len(short & drawn) >= 0.9 * len(short) > 9


def test_chance_of_chain_counts_tuples_of_guesses():
    """Of all tuples of k digits so many hold the answer, whichever digit that is."""
    for k in (1, 2, 3):
        hits = sum("7" in guesses for guesses in itertools.product("0123456789", repeat=k))
        assert Chain().chance(k) == pytest.approx(hits / 10 ** k)
