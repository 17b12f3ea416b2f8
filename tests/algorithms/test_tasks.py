"""What holds for every task: splits that never meet, seeds, demonstrations, chance."""

import zlib

import pytest

from tasks import Chain, Countdown, is_test


def prompt_of(document):
    return document.split("=", 1)[0] + "="


# -- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("task", [Chain(), Chain(2, 3), Countdown()],
                         ids=["chain", "chain 2-3", "countdown"])
def test_no_held_out_problem_is_ever_trained_on(task, seed):
    """No prompt of the test or ood split is in the corpus, the demonstrations or the training
    problems, at any seed."""
    held_out = {p["prompt"] for split in ("test", "ood") for p in task.problems(split, 250, seed)}
    is_held_out = getattr(task, "is_held_out", is_test)
    assert all(is_held_out(prompt) for prompt in held_out)
    seen = {"corpus": {prompt_of(d) for d in task.corpus(2000, seed)},
            "demonstrations": {e["prompt"] for e in task.demonstrations(250, seed)},
            "train": {p["prompt"] for p in task.problems("train", 250, seed)}}
    for name, prompts in seen.items():
        assert len(prompts) > 50, name
        assert not prompts & held_out, name
        assert not any(is_held_out(prompt) or is_test(prompt) for prompt in prompts), name


def test_one_problem_in_ten_is_held_out():
    """The hash puts about a tenth of the problems into the test split: these ones, in every process
    and release."""
    prompts = [f"{i}+{j}=" for i in range(50) for j in range(50)]
    assert 0.08 < sum(map(is_test, prompts)) / 2500 < 0.12
    pinned = "0+0= 0+8= 1+7= 2+1= 2+3= 2+7= 3+0= 3+8= 4+1= 4+3= 4+7= 5+2= 7+3= 7+7= 7+9= 9+8="
    sums = [f"{a}+{b}=" for a in range(10) for b in range(10)]
    assert list(filter(is_test, sums)) == pinned.split()


@pytest.mark.parametrize("seed", range(3))
def test_the_larger_of_two_digits_is_asked_for_out_of_distribution_only(seed):
    """Every ood chain has a `>`; no test, training or demonstration prompt has one."""
    task = Chain()
    assert all(">" in p["prompt"] for p in task.problems("ood", 200, seed))
    for examples in (task.problems("test", 200, seed), task.problems("train", 200, seed),
                     task.demonstrations(200, seed)):
        assert not any(">" in e["prompt"] for e in examples)


@pytest.mark.parametrize("task", [Chain(), Countdown()], ids=["chain", "countdown"])
def test_the_seed_decides_what_is_trained_on_and_not_what_is_tested(task):
    """Corpus, demonstrations and training problems depend on the seed and on nothing else; test and
    ood on nothing."""
    for split in ("test", "ood"):
        assert task.problems(split, 50, 0) == task.problems(split, 50, 7)
    for make in (lambda seed: task.corpus(50, seed), lambda seed: task.demonstrations(50, seed),
                 lambda seed: task.problems("train", 50, seed)):
        assert make(0) == make(0) != make(1)
    # more is the same and more
    assert task.demonstrations(50, 0)[:20] == task.demonstrations(20, 0)


@pytest.mark.parametrize("task", [Chain(), Chain(2, 2), Countdown()],
                         ids=["chain", "chain of one step", "countdown"])
def test_demonstrations_are_right(task):
    """Every demonstration earns the full reward; those of the chain task show their steps."""
    for e in task.demonstrations(200, seed=0):
        columns = {name: [e[name]] for name in task.columns}
        assert task.reward([e["prompt"]], [e["completion"]], **columns) == [1.0]
        assert not task.shows_steps or task.is_worked(e["prompt"], e["completion"])


def test_documents_are_the_corpus_with_an_empty_prompt():
    """For pre-training the prompt is empty, so that every token of the text is trained."""
    corpus = Chain().corpus(20, 3)
    assert Chain().documents(20, 3) == [{"prompt": "", "completion": text} for text in corpus]


@pytest.mark.parametrize("task, corpus, first", [
    (Chain(), 278479759, {"train": "6*4*0= 4+7*6= 1-5-9=", "test": "4*5+9= 0*0*6= 5-3-7*0=",
                          "ood": "2-4>4= 7>4*5= 2+2>6*1=",
                          "ood-train": "7>5*4= 1+0>5+0= 8>1+6="}),
    (Countdown(), 4121064134, {"train": "1,4,6>10= 2,8,10>16= 3,4,25>24=",
                               "test": "3,17,21>35= 22,23,24>21= 5,10,21>19=",
                               "ood": "4,11,20>55= 5,9,13>56= 5,10,23>46=",
                               "ood-train": "10,14,23>47= 14,18,20>52= 11,19,21>51="}),
], ids=["chain", "countdown"])
def test_the_default_tasks_draw_what_they_always_drew(task, corpus, first):
    """Documents and problems are pinned, so that the figures of two versions can be compared."""
    assert zlib.crc32("\n".join(task.corpus(2000, 0)).encode()) == corpus
    for split, prompts in first.items():
        assert [p["prompt"] for p in task.problems(split, 3, 0)] == prompts.split()


def test_chance():
    """Guessing digits: .10, .344, .815 at k = 1, 4, 16. Random expressions do better with more
    tries, short of 1."""
    assert [Chain().chance(k) for k in (1, 4, 16)] == pytest.approx([.1, .344, .815], abs=5e-4)
    one, four, sixteen = (Countdown().chance(k) for k in (1, 4, 16))
    assert 0.04 < one < four < sixteen < 0.9 and four < 4 * one
    assert one == Countdown().chance(1)                               # the same at every call
