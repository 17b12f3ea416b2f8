"""The worlds of the chain task: styles of demonstrations, wrong ones, rare habits in the corpus,
and other skills beside it."""

import random
import re
import zlib

import pytest

from tasks import FACTS, MIXED, Chain, Facts, is_test

STYLES = ["own", "letters", "swapped", "totals", "bare"]


# -- styles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("style, two, three, larger", [
    ("own", "7+5=2;2*3=6", "1-2=9;9*3=7;7+4=1", "7+5=2;2>3=3"),
    ("letters", "a7+5=2;a2*3=6", "a1-2=9;a9*3=7;a7+4=1", "a7+5=2;a2>3=3"),
    ("swapped", "5+7=2;3*2=6", "2-1=9;3*9=7;4+7=1", "5+7=2;3>2=3"),
    ("totals", "2;6", "9;7;1", "2;3"),
    ("bare", "6", "1", "3"),
])
def test_styles_by_hand(style, two, three, larger):
    """7+5*3, 1-2*3+4 and 7+5>3 in each style: the operands change places, the results do not. Each
    ends on the right answer."""
    for prompt, steps, answer in (("7+5*3=", two, "6"), ("1-2*3+4=", three, "1"),
                                  ("7+5>3=", larger, "3")):
        assert Chain.solve(prompt, style) == {"answer": answer, "steps": steps}
        assert Chain.reward([prompt], [steps], answer=[answer]) == [1.0]
        assert Chain.is_worked(prompt, steps) == (style in ("own", "letters", "swapped"))


@pytest.mark.parametrize("style, at_first, at_last", [
    ("own", "7+5=3;3*3=9", "7+5=2;2*3=4"), ("letters", "a7+5=3;a3*3=9", "a7+5=2;a2*3=4"),
    ("swapped", "5+7=3;3*3=9", "5+7=2;3*2=4"), ("totals", "3;9", "2;4"), ("bare", "9", "4")])
def test_a_slip_by_hand(style, at_first, at_last):
    """7+5*3 with 3 for the first result goes on with 3; with 6 + 8 for the last it ends on 4."""
    assert Chain.solve("7+5*3=", style, (0, 1)) == {"answer": "9", "steps": at_first}
    assert Chain.solve("7+5*3=", style, (1, 8)) == {"answer": "4", "steps": at_last}


def test_an_unknown_style():
    with pytest.raises(ValueError, match="style 'loud': choose from own, letters, swapped, totals"):
        Chain.solve("7+5=", "loud")


@pytest.mark.parametrize("terms", [(3, 4), (2, 3), (5, 6)], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_every_style_has_the_same_problems(terms, style):
    """And writes them as `solve` does; the longest, with its <end>, fits max_new_tokens."""
    task = Chain(*terms)
    own, found = (task.demonstrations(300, 3, s) for s in ("own", style))
    assert [(e["prompt"], e["answer"]) for e in found] == [(e["prompt"], e["answer"]) for e in own]
    assert all(e["completion"] == Chain.solve(e["prompt"], style)["steps"] for e in found)
    assert (found == own) == (style == "own")
    assert max(len(e["completion"]) for e in found) + 1 <= task.max_new_tokens


def test_mixed_styles():
    """Each of 9,000 demonstrations is what one of three styles makes of it, a third each to within
    four standard deviations; a style says nothing about the problem, and the first fifty stay the
    same in a larger set."""
    assert MIXED == ("own", "letters", "swapped")
    mixed, own = (Chain().demonstrations(9000, 2, style) for style in ("mixed", "own"))
    assert [(e["prompt"], e["answer"]) for e in mixed] == [(e["prompt"], e["answer"]) for e in own]
    counts = dict.fromkeys(MIXED, 0)
    for e in mixed:
        written = [s for s in MIXED if Chain.solve(e["prompt"], s)["steps"] == e["completion"]]
        assert written and not is_wrong(e)   # 7+7 is written the same when it is swapped
        for style in written:
            counts[style] += len(written) == 1
    alike = 9000 - sum(counts.values())
    assert alike < 200
    for n in counts.values():
        assert abs(n - 3000) < 4 * (9000 * 2 / 9) ** 0.5 + alike
    assert Chain().demonstrations(50, 2, "mixed") == mixed[:50]
    assert Chain().demonstrations(50, 3, "mixed") != mixed[:50]


def test_mixed_styles_do_not_follow_the_problems():
    """In problems of three terms and of four, letters are as frequent."""
    found = Chain().demonstrations(8000, 0, "mixed")
    for length in (6, 8):
        same = [e["completion"].startswith("a") for e in found if len(e["prompt"]) == length]
        assert abs(sum(same) / len(same) - 1 / 3) < 0.04


def test_defaults_are_the_world_as_it_was():
    """Settings that are given their defaults change no text; the documents of --pretraining long
    and demonstrations are pinned as they were when there were no worlds."""
    plain, given = Chain(), Chain(worked_share=0.3, other_skills=False, flip_probability=0.2)
    assert plain.kept == () and plain.corpus(2000, 1) == given.corpus(2000, 1)
    assert plain.demonstrations(200, 1) == given.demonstrations(200, 1, "own", 0.0)
    assert zlib.crc32("\n".join(plain.corpus(128_000, 0)).encode()) == 1183998351
    assert zlib.crc32(repr(plain.demonstrations(2000, 0)).encode()) == 1544714431
    assert zlib.crc32(repr(Chain(2, 3).demonstrations(2000, 1)).encode()) == 3527488061
    assert plain.max_new_tokens == 22 and Chain(2, 2).max_new_tokens == 10


# -- wrong demonstrations -------------------------------------------------------------------------


def is_wrong(demonstration):
    return not Chain.reward([""], [demonstration["completion"]], [demonstration["answer"]])[0]


def wrong_steps(completion):
    """How many steps of a completion in the own style are wrong."""
    steps = re.findall(r"(\d)([+*-])(\d)=(\d)", completion)
    results = [{"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[symbol] % 10
               for a, symbol, b, _ in steps]
    return sum(result != int(step[3]) for result, step in zip(results, steps))


def results_of(demonstration, style):
    """The results that a demonstration writes down, one a step."""
    if style in ("totals", "bare"):
        return demonstration["completion"].split(";")
    return re.findall(r"=(\d)", demonstration["completion"])


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_the_share_of_wrong_demonstrations(share):
    """Of 10,000 as many as asked for, to within four standard deviations; none at 0, all at 1."""
    task = Chain()
    n = sum(map(is_wrong, task.demonstrations(10000, 0, "own", share)))
    assert abs(n - 10000 * share) < 4 * (10000 * share * (1 - share)) ** 0.5
    assert not any(map(is_wrong, task.demonstrations(500, 0)))
    assert all(map(is_wrong, task.demonstrations(500, 0, "own", 1.0)))


@pytest.mark.parametrize("terms", [(3, 4), (2, 4)], ids=str)
def test_a_wrong_demonstration_has_one_wrong_step_and_a_wrong_answer(terms):
    """The steps after it go on from it and are right by themselves. Each step may be the wrong one,
    and each result from 1 to 9 too large."""
    right = Chain(*terms).demonstrations(2000, 0)
    wrong = Chain(*terms).demonstrations(2000, 0, "own", 1.0)
    where, by = set(), set()
    for a, b in zip(right, wrong):
        assert a["prompt"] == b["prompt"] and wrong_steps(a["completion"]) == 0
        assert wrong_steps(b["completion"]) == 1 and is_wrong(b)
        pairs = list(zip(results_of(a, "own"), results_of(b, "own"), strict=True))
        first = next(i for i, (x, y) in enumerate(pairs) if x != y)
        where.add(first)
        by.add((int(pairs[first][1]) - int(pairs[first][0])) % 10)
    assert where == set(range(terms[1] - 1)) and by == set(range(1, 10))


@pytest.mark.parametrize("style", [*STYLES, "mixed"])
def test_the_same_ones_are_wrong_in_every_style(style):
    """In the same way: the results that are written are those of the own style."""
    task = Chain()
    own, found = (task.demonstrations(400, 5, s, 0.3) for s in ("own", style))
    assert list(map(is_wrong, found)) == list(map(is_wrong, own)) and any(map(is_wrong, own))
    for a, b in zip(own, found):
        written = results_of(a, "own")
        assert results_of(b, style) == (written[-1:] if style == "bare" else written)


def test_what_is_wrong_at_a_small_share_is_so_at_a_larger_one():
    """In the very same way, whatever the others are; and the answer beside it stays the right
    one."""
    task = Chain()
    none, few, many = (task.demonstrations(1000, 0, "own", share) for share in (0, 0.3, 0.6))
    assert 200 < sum(map(is_wrong, few)) < sum(map(is_wrong, many)) - 200
    for right, a, b in zip(none, few, many):
        assert a == b if is_wrong(a) else a == right
        assert b == right or is_wrong(b)
        assert a["answer"] == b["answer"] == Chain.solve(right["prompt"])["answer"]


def test_a_seed_decides_what_is_wrong():
    task = Chain()
    first, again, other = (task.demonstrations(300, seed, "own", 0.5) for seed in (0, 0, 1))
    assert first == again and list(map(is_wrong, first)) != list(map(is_wrong, other))
    assert task.demonstrations(300, 0, "own", 0.5)[:50] == task.demonstrations(50, 0, "own", 0.5)


# -- demonstrations and held-out problems ---------------------------------------------------------


@pytest.mark.parametrize("style, share", [(style, share) for style in (*STYLES, "mixed")
                                          for share in (0, .6)])
def test_no_demonstration_of_any_style_solves_a_held_out_problem(style, share):
    """No prompt is a test or ood problem, nor does a right step of another one stand in the text:
    of three terms and more no step can be one, and with problems of two terms a step that follows a
    wrong one could. (Swapped with two terms is refused: 7+5=2 swapped solves 5+7.)"""
    for terms in ((3, 4),) if style in ("swapped", "mixed") else ((3, 4), (2, 4)):
        task = Chain(*terms)
        held_out = {p["prompt"] for split in ("test", "ood") for p in task.problems(split, 500, 0)}
        for e in task.demonstrations(2000, 0, style, share):
            assert not is_test(e["prompt"]) and ">" not in e["prompt"]
            assert e["prompt"] not in held_out
            steps = re.findall(r"(?<![a\d])\d[+*-]\d=", e["completion"]) if terms[0] == 2 else []
            assert not any(map(is_test, steps)), e


# -- the corpus -----------------------------------------------------------------------------------


def is_worked(document):
    return "=" in document.split("=", 1)[1]


@pytest.mark.parametrize("share", [0, 0.005, 0.5, 1])
def test_the_worked_share_of_everyday_text(share):
    """Of 14,000 everyday documents as many are worked as asked for; the textbook stays, and so do
    the problems and their answers."""
    usual, found = Chain().corpus(24000, 0), Chain(worked_share=share).corpus(24000, 0)
    n = sum(map(is_worked, found[10000:]))
    assert abs(n - 14000 * share) <= 4 * (14000 * share * (1 - share)) ** 0.5
    assert found[:10000] == usual[:10000] and all(map(is_worked, found[:10000]))
    for a, b in zip(found, usual):
        assert a.split("=")[0] == b.split("=")[0] and a[-1] == b[-1]
        assert a == b or is_worked(a) != is_worked(b)


def kind(document):
    return {"r": "reversing", "k": "facts"}.get(document[0], "chain")


@pytest.mark.parametrize("make", [Chain, Facts])
@pytest.mark.parametrize("part", [slice(0, 10000), slice(10000, None)], ids=["textbook", "rest"])
def test_other_skills_in_the_corpus(make, part):
    """In textbook and everyday text alike one document in ten reverses four digits and eight in a
    hundred tell a fact, all of them right; the others are those of a corpus without."""
    plain, corpus = Chain().corpus(24000, 0), make(other_skills=True).corpus(24000, 0)
    kinds = [kind(d) for d in corpus[part]]
    for name, share in (("reversing", 0.1), ("facts", 0.08)):
        n = len(kinds) * share
        assert abs(kinds.count(name) - n) < 4 * (n * (1 - share)) ** 0.5
    for a, b, what in zip(corpus[part], plain[part], kinds):
        if what == "reversing":
            assert re.fullmatch(r"r\d{4}=\d{4}", a) and a[1:5] == a[:5:-1]
        elif what == "facts":
            assert FACTS[a[:4]] == a[4:]
        else:
            assert a == b


@pytest.mark.parametrize("seed", range(3))
def test_the_corpus_reverses_no_test_problem_and_tells_fifty_facts(seed):
    """What evaluation asks to be reversed is never shown, about one in ten of all; the facts that
    are told are the first fifty, each of them, and those are the ones that evaluation asks."""
    task = Chain(other_skills=True)
    corpus = task.corpus(20000, seed)
    shown = {d[:6] for d in corpus if d[0] == "r"}
    asked = {p["prompt"] for p in task.problems("reversing", 1000, seed)}
    assert len(shown) > 1000 and len(asked) > 500
    assert not shown & asked and all(map(is_test, asked)) and not any(map(is_test, shown))
    told = {d[:4] for d in corpus if d[0] == "k"}
    assert told == {f"k{i:02d}=" for i in range(50)}
    assert {p["prompt"] for p in task.problems("facts", 1000, seed)} == told


def test_the_splits_that_are_kept():
    """The same whatever the seed, right by their own reward, and neither a chain nor a step."""
    task = Chain(other_skills=True)
    assert task.kept == ("reversing", "facts") and Chain().kept == ()
    for split in task.kept:
        problems = task.problems(split, 100, 0)
        assert problems == task.problems(split, 100, 7)
        for p in problems:
            expected = p["prompt"][4:0:-1] if split == "reversing" else FACTS[p["prompt"]]
            assert p["answer"] == expected
            assert task.reward([p["prompt"]], [p["answer"]], [p["answer"]]) == [1.0]


def test_post_training_meets_no_other_skill():
    """Training problems and demonstrations are those of the task without."""
    task = Chain(other_skills=True)
    assert task.problems("train", 200, 0) == Chain().problems("train", 200, 0)
    assert task.problems("test", 200, 0) == Chain().problems("test", 200, 0)
    assert task.demonstrations(200, 0) == Chain().demonstrations(200, 0)


def test_one_in_ten_numbers_is_held_out_of_reversing():
    """Of the 10,000 numbers of four digits 800 to 1,200; a draw of either side stays on it."""
    held_out = [n for n in range(10000) if is_test(f"r{n:04d}=")]
    assert 800 < len(held_out) < 1200
    rng = random.Random(0)
    for test in (False, True):
        drawn = {Chain.other_problem(rng, "reversing", test)["prompt"] for _ in range(500)}
        assert {is_test(prompt) for prompt in drawn} == {test}
