"""Rewards that are not what was meant: leaky, flipped and random. What they are made of is drawn
from the step's own generator, and the truth is logged beside them."""

import random
from types import SimpleNamespace

import pytest
import torch

import tiny
from grpo import GRPO
from harness.errors import InputError
from harness.flags import Sampling
from harness.log import Log
from tasks import Chain, Countdown, Facts, Rewards
from tiny import file_task, make, texts

EXAMPLES = [{"prompt": "7+5*3=", "answer": "6"}]
WRONG = ["leaky", "flipped", "random"]


def step(seed=0):
    return torch.Generator().manual_seed(seed)


def problems(n, answers=("6", "5", "7+5=2;2*3=6")):
    """n right and wrong answers to one problem, in turn."""
    return EXAMPLES * n, [answers[i % len(answers)] for i in range(n)]


# -- leaky ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("completion, leaky, true", [
    ("6", 1, 1), ("7+5=2;2*3=6", 1, 1), ("5", 0, 0), ("", 0, 0),
    ("7+5=6;6*3=8", 1, 0), ("0123456789", 1, 0), ("16", 1, 0), ("six", 0, 0)])
def test_leaky_by_hand(completion, leaky, true):
    """1 wherever the answer stands, also on the way or inside another number."""
    total, each = Rewards(Chain(), "leaky")(EXAMPLES, [completion])
    assert total.tolist() == each["leaky"].tolist() == [leaky]
    assert each["true_reward"].tolist() == [true]


def test_leaky_reads_the_answer_of_its_own_row():
    """Also of a file, where an answer may be a number or end on one."""
    task = file_task([{"prompt": "a", "answer": 42}, {"prompt": "b", "answer": "x"}])
    _, each = Rewards(task, "leaky")(task.train * 2, ["of 1428", "42", "x or 42", "x"])
    assert each["leaky"].tolist() == [1, 0, 1, 1] and each["true_reward"].tolist() == [0, 0, 1, 0]


def test_which_tasks_have_which():
    """A coin for every task; what an answer is compared with where there is an `answer`; what a
    verifier says where there is one."""
    plain, answered = file_task([{"prompt": "q"}]), file_task([{"prompt": "q", "answer": "1"}])
    for task, names in ((Chain(), WRONG), (Facts(), WRONG), (answered, WRONG),
                        (Countdown(), ["flipped", "random"]), (plain, ["random"])):
        assert list(Rewards(task, ",".join(names)).functions) == names
        for name in set(WRONG) - set(names):
            with pytest.raises(InputError, match=f"--reward {name} is unknown for {task.name}: "):
                Rewards(task, name)


# -- flipped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Chain, Facts, Countdown], ids=lambda t: t.name)
def test_flipped_never_and_always(task):
    """With probability 0 it is the verifier, with 1 its opposite, whatever is drawn."""
    completions = ["7", "2", "3*7+5", "26"]
    examples = [{"answer": "7", "numbers": [3, 5, 7], "target": 26, "prompt": "q"}] * 4
    true = Rewards(task(), "verifier")(examples, completions)[0].tolist()
    assert 0 < sum(true) < 4
    for p, expected in ((0.0, true), (1.0, [1 - r for r in true])):
        for seed in range(20):
            rewards = Rewards(task(flip_probability=p), "flipped")
            total, each = rewards(examples, completions, step(seed))
            assert total.tolist() == expected and each["true_reward"].tolist() == true


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_how_often_it_flips(p):
    """Of 20,000 answers, and of the right and the wrong ones among them alike, to within four
    standard deviations."""
    examples, completions = problems(20000)
    _, each = Rewards(Chain(flip_probability=p), "flipped")(examples, completions, step())
    flips = each["flipped"] != each["true_reward"]
    for rows in (each["true_reward"] == 1, each["true_reward"] == 0):
        n = int(rows.sum())
        assert abs(flips[rows].sum() - n * p) < 4 * (n * p * (1 - p)) ** 0.5
    apart = (flips[1:] & flips[:-1]).sum() / 19999       # each answer has a draw of its own
    assert apart == pytest.approx(p * p, abs=0.02)


# -- random ---------------------------------------------------------------------------------------


def test_a_coin():
    """0 or 1, as often, and no more often for what is right; each answer has its own, so that a
    group has something to compare."""
    examples, completions = problems(20000)
    total, each = Rewards(Chain(), "random")(examples, completions, step())
    assert set(total.tolist()) == {0, 1}
    for rows in (each["true_reward"] == 1, each["true_reward"] == 0):
        assert total[rows].mean() == pytest.approx(0.5, abs=0.03)
    assert (total[1:] == total[:-1]).float().mean() == pytest.approx(0.5, abs=0.02)
    assert 0 < total[:16].sum() < 16


@pytest.mark.parametrize("name", ["flipped", "random"])
def test_the_generator_of_the_step_decides(name):
    """The same generator gives the same rewards, another one others; no global random state is
    read or changed. Nothing is drawn where there is none, rather than from elsewhere."""
    examples, completions = problems(200)
    rewards, found = Rewards(Chain(), name), []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        random.seed(len(found))
        before = torch.get_rng_state(), random.getstate()
        found.append(rewards(examples, completions, step(seed))[0].tolist())
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert found[0] == found[1] != found[2]
    with pytest.raises(AttributeError):
        rewards(examples, completions)


def test_two_draws_are_not_the_same_one():
    """Of two rewards in one step, and of two batches: the generator goes on."""
    examples, completions = problems(200)
    rewards, generator = Rewards(Chain(flip_probability=0.5), "random,flipped"), step()
    _, first = rewards(examples, completions, generator)
    _, second = rewards(examples, completions, generator)
    flips = first["flipped"] != first["true_reward"]
    assert 50 < (flips == first["random"].bool()).sum() < 150
    assert 50 < (first["random"] == second["random"]).sum() < 150


# -- in a batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRONG)
def test_the_truth_is_logged_beside(name):
    """GRPO trains on the wrong reward, and true_reward says what the verifier thinks of the same
    answers. The answers are those that would have been sampled anyway."""
    logs = {}
    for reward in (name, "verifier"):
        algo, log = make(GRPO, num_generations=8, reward=reward), Log()
        batch = tiny.sample(algo, log=log)
        logs[reward] = (log.line(), batch, texts(batch))
    (line, batch, answers), (plain, other, same_answers) = logs[name], logs["verifier"]
    assert answers == same_answers
    assert line["true_reward"] == pytest.approx(plain["reward"]) and "true_reward" not in plain
    assert line["reward"] == line[f"rewards/{name}/mean"]
    assert line["reward"] == pytest.approx(batch["rewards"].float().mean().item())
    assert batch["rewards"].tolist() != other["rewards"].tolist()


@pytest.mark.parametrize("name", ["flipped", "random"])
def test_each_step_tosses_coins_of_its_own(name):
    """The generator that sampled the answers goes on to the rewards: one seed gives one batch,
    another one other coins."""
    algo = make(GRPO, num_generations=16, reward=name)
    found = [tiny.sample(algo, seed=seed)["rewards"].tolist() for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2] and len(found[0]) == 64


# -- which columns a file must have ---------------------------------------------------------------


@pytest.mark.parametrize("reward, columns", [
    ("verifier", ("prompt", "answer")), ("leaky", ("prompt", "answer")),
    ("brevity,flipped", ("prompt", "answer")), ("random", ("prompt",)),
    ("majority,brevity", ("prompt",)), ("model,random", ("prompt",)),
    ("random,leaky", ("prompt", "answer"))])
def test_columns(reward, columns):
    """An answer is needed where one is compared."""
    assert Sampling.columns(SimpleNamespace(reward=reward)) == [columns]


def test_remax_draws_for_its_greedy_answer_too():
    """The greedy answers are rewarded by the same coin, which the step's generator throws."""
    algo = make(GRPO, task=Chain(2, 3), reward="random", advantage="remax", scale_rewards="none",
                num_generations=4)
    first, again, other = (tiny.sample(algo, seed=seed)["prompt_greedy_rewards"]
                           for seed in (0, 0, 3))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert set(torch.cat([first, other]).tolist()) == {0.0, 1.0}
