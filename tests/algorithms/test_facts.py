"""The task facts: fifty arbitrary facts that no corpus tells, and what is left of chain."""

import pytest

import tasks
from tasks import FACTS, Chain, Countdown, Facts


def test_a_hundred_facts():
    """Two digits for each of a hundred keys, the same in every process; not one for one, so that
    none can be found by exclusion. The examples of the documents are facts."""
    assert list(FACTS) == [f"k{i:02d}=" for i in range(100)]
    assert all(len(v) == 2 and v.isdigit() for v in FACTS.values())
    assert len(set(FACTS.values())) == 60
    assert FACTS["k37="] == "51" and FACTS["k73="] == "87"
    assert "k73=        facts that no text has told: `87`" in tasks.__doc__
    assert "`k37=51`" in Chain.__doc__


def test_all_fifty_are_taught_and_judged():
    """Training goes through the last fifty in turn; a run is judged by each of them once; there is
    no other kind of them; no seed changes anything."""
    task, new = Facts(), list(FACTS.items())[50:]
    train = task.problems("train", 120, 0)
    assert [(p["prompt"], p["answer"]) for p in train] == (new * 3)[:120]
    test = task.problems("test", 256, 0)
    assert [(p["prompt"], p["answer"]) for p in test] == new
    assert task.problems("test", 20, 0) == test[:20] and task.problems("ood", 100, 0) == []
    assert task.problems("train", 120, 1) == train
    assert task.demonstrations(120, 3) == [{**p, "completion": p["answer"]} for p in train]


@pytest.mark.parametrize("completion, reward", [
    ("87", 1), ("", 0), ("8", 0), ("7", 0), ("087", 0), ("87 ", 0), ("78", 0), ("87;", 0)])
def test_reward_of_a_fact(completion, reward):
    """Both digits and nothing else."""
    assert Facts.reward(["k73="], [completion], answer=[FACTS["k73="]]) == [reward]


def test_every_demonstration_is_right():
    for e in Facts().demonstrations(50, 0):
        assert Facts.reward([e["prompt"]], [e["completion"]], [e["answer"]]) == [1.0]


@pytest.mark.parametrize("other_skills", [False, True])
def test_no_corpus_tells_what_is_taught(other_skills):
    """The corpus is that of chain, and no document names one of the last fifty."""
    settings = dict(worked_share=0.1, other_skills=other_skills)
    corpus = Facts(3, 4, **settings).corpus(20000, 0)
    assert corpus == Chain(3, 4, **settings).corpus(20000, 0)
    taught = {p["prompt"] for p in Facts().problems("train", 50, 0)}
    assert len(taught) == 50 and not taught & {d[:4] for d in corpus}
    old = {p["prompt"] for p in Facts(**settings).problems("facts", 500, 0)}
    assert len(old) == 50 and not taught & old


def test_what_is_kept():
    """Chain, by the very problems that judge chain; with other skills those as well."""
    for terms in ((3, 4), (2, 3)):
        task, chain = Facts(*terms, other_skills=True), Chain(*terms, other_skills=True)
        assert Facts(*terms).kept == ("chain",) and task.kept == ("reversing", "facts", "chain")
        assert task.problems("chain", 200, 5) == chain.problems("test", 200, 0)
        for split in ("reversing", "facts"):
            assert task.problems(split, 200, 5) == chain.problems(split, 200, 0)


def test_chance_and_steps():
    """Of a hundred pairs of digits one is right; a fact is not worked out in steps, so there is no
    reward `format`."""
    assert [Facts().chance(k) for k in (1, 4, 16)] == pytest.approx([.01, .0394, .1485], abs=5e-5)
    assert not Facts().shows_steps and Facts().columns == ("answer",)
    with pytest.raises(tasks.InputError, match="--reward format is unknown for facts: use .*leaky"):
        tasks.Rewards(Facts(), "format")


def test_settings_reach_every_task():
    """The longest answer, the judge and how often `flipped` errs, in the same order."""
    for task in (Chain(3, 4, 9, "judge", 0.4), Facts(3, 4, 9, "judge", 0.4),
                 Countdown(9, "judge", 0.4)):
        assert (task.max_new_tokens, task.judge, task.flip_probability) == (9, "judge", 0.4)
    assert Facts(3, 4).max_new_tokens == Chain(3, 4).max_new_tokens == 22
