"""Rewards and how they add up: verifier, format, brevity, a learned reward beside the true one, and
the majority of a group."""

import pytest
import torch

import data
import rm
import tasks
import tiny
from grpo import GRPO
from harness.errors import InputError
from harness.log import Log
from tiny import PROBLEMS, SEED, Letters, make, move, rows, same, texts, tiny_model
from world import close

# Right, right and worked, worked and wrong, nothing.
TEXTS = ["2", "1-2=9;9*3=7", "9*9=3", ""]


def test_rewards_add_up_by_weight():
    """The total is the weighted sum, every part is handed on unweighted under its name; the weights
    are 1 by default."""
    task = tasks.Chain(2, 3)
    total, each = tasks.Rewards(task, "verifier,format,brevity", "1,0.5,-2")(PROBLEMS, TEXTS)
    parts = {"verifier": [1, 1, 0, 0], "format": [0, 1, 1, 0],
             "brevity": [-len(t) / task.max_new_tokens for t in TEXTS]}
    assert each.keys() == parts.keys()
    assert all(close(each[name], parts[name], 1e-6) for name in parts)
    assert close(total, [v + 0.5 * f - 2 * b for v, f, b in zip(*parts.values())], 1e-6)
    total, _ = tasks.Rewards(task, "format,verifier")(PROBLEMS, TEXTS)
    assert total.tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize("names, shown", [
    ("verifier", False), ("brevity,verifier", False), ("brevity", True), ("format", True),
    ("model", True), ("model,verifier", False)])
def test_true_reward_is_shown_where_the_verifier_is_not_trained_on(names, shown):
    """What the verifier says is logged whatever is trained on, and enters the total only where it
    was asked for (2210.10760: where reward and true reward part, over-optimisation has begun)."""
    task = tasks.Chain(2, 3, judge=lambda prompts, completions, **columns: [0.25] * len(prompts))
    total, each = tasks.Rewards(task, names)(PROBLEMS, TEXTS)
    assert set(each) == set(names.split(",")) | ({"true_reward"} if shown else set())
    assert each["true_reward" if shown else "verifier"].tolist() == [1, 1, 0, 0]
    assert close(total, sum(each[name] for name in names.split(",")), 1e-6)


def test_no_true_reward_without_answers():
    """A file of bare prompts has nothing to verify: no true_reward; with answers there is one."""
    for columns, shown in (({}, set()), ({"answer": "2"}, {"true_reward"})):
        task = tiny.file_task([{"prompt": "7+5=", **columns}], 8)
        _, each = tasks.Rewards(task, "brevity")(task.train, ["2"])
        assert set(each) == {"brevity"} | shown


def test_a_learned_reward_beside_brevity():
    """A reward model is a reward function like any other: weighed, logged as rewards/model/mean,
    and watched by the verifier; a name that is none is refused."""
    reward_model = tiny_model(seed=3).with_scalar_head()
    move(reward_model, 0.3)
    judge = rm.Judge(reward_model, Letters())
    task, log = tasks.Chain(2, 3, judge=judge), Log()
    algo = make(GRPO, task=task, num_generations=4, reward="model,brevity",
                reward_weights="2,0.5")
    batch = tiny.sample(algo, log=log)
    prompts, answers = zip(*texts(batch))
    learned, short = judge(prompts, answers), tasks.brevity(prompts, answers, task.max_new_tokens)
    assert len(set(learned)) > 8 and len(learned) == 16
    assert same(batch["rewards"], [2 * a + 0.5 * b for a, b in zip(learned, short)], 1e-5)
    true = tasks.Chain.reward(prompts, answers, [tasks.Chain.solve(p)["answer"] for p in prompts])
    line = {name: value for name, value in log.line().items() if "reward" in name}
    values = {"rewards/model/mean": learned, "rewards/brevity/mean": short,
              "reward": batch["rewards"].tolist(), "true_reward": true}
    assert line == pytest.approx({name: sum(x) / 16 for name, x in values.items()}, abs=1e-5)
    with pytest.raises(InputError, match="--reward mode is unknown for chain: .* model, majority"):
        tasks.Rewards(task, "mode")


def test_a_rollout_is_a_batch():
    """Rows in groups, problem by problem; each ends at its <end> or was cut off; the metrics are
    their means."""
    algo, log = make(GRPO, num_generations=3, reward="brevity"), Log()

    def rollout(*sizes, temperature=None):
        return data.rollout(algo.model, algo, PROBLEMS, torch.Generator().manual_seed(SEED), log,
                            *sizes, temperature=temperature)
    batch = rollout()
    assert batch["prompt_index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    found = list(rows(batch))
    assert [Letters().decode(p[1:]) for p, _, _ in found] == [p["prompt"] for p in PROBLEMS
                                                               for _ in range(3)]
    assert [truncated for _, _, truncated in found] == batch["truncated"].tolist()
    cut = int(batch["truncated"].sum())
    lengths = [len(c) for _, c, _ in found]
    assert 0 < cut < 12 and batch["completion_mask"].sum(-1).tolist() == lengths
    assert log.totals == {"sampled_tokens": sum(lengths)}
    line = log.line()
    assert line["completions/mean_length"] == pytest.approx(sum(lengths) / 12)
    assert line["completions/clipped_ratio"] == pytest.approx(cut / 12)
    one, two = rollout(1, temperature=0), rollout(2, temperature=0)
    for i in range(2):
        assert torch.equal(two["completion_ids"][i::2], one["completion_ids"])


# -- the majority as a reward ---------------------------------------------------------------------


@pytest.mark.parametrize("completions, rewards", [
    (["6", "6", "4"], [1, 1, 0]),                          # the docstring's
    (["4", "6", "6"], [0, 1, 1]),
    (["4", "6"], [1, 0]),                                  # a tie: the first
    (["4", "6", "6", "4", "5"], [1, 0, 0, 1, 0]),
    (["5", "7+5=2;2*3=6", "2*3=6"], [0, 1, 1]),            # the final answer counts
    (["6"], [1]),
])
def test_majority_worked_by_hand(completions, rewards):
    """1 for the commonest final answer to the prompt, of equally common ones the first
    (2504.16084)."""
    prompts = ["7+5*3="] * len(completions)
    assert tasks.majority(tasks.Chain(), prompts, completions) == rewards


def test_each_prompt_has_its_own_majority():
    """Votes are counted prompt by prompt, also where the answers to several prompts are mixed; the
    verifier has no say, but is logged as true_reward."""
    prompts = ["1+1=", "2+2=", "1+1=", "2+2=", "1+1=", "2+2="]
    completions = ["3", "3", "3", "4", "2", "4"]
    assert tasks.majority(tasks.Chain(), prompts, completions) == [1, 0, 1, 1, 0, 1]
    examples = [{"prompt": p, "answer": str(tasks.Chain.solve(p)["answer"])} for p in prompts]
    total, each = tasks.Rewards(tasks.Chain(), "majority")(examples, completions)
    assert total.tolist() == each["majority"].tolist() == [1, 0, 1, 1, 0, 1]
    assert each["true_reward"].tolist() == [0, 0, 0, 1, 1, 1]


def test_majority_compares_values_where_the_task_does():
    """In a file's answers `1,000` and `so 1000.0` are one number; in countdown `3*7+5` and `26` one
    value."""
    of_a_file = tiny.file_task([{"prompt": "q"}])
    assert tasks.majority(of_a_file, ["q"] * 3, ["7", "1,000", "so 1000.0"]) == [0, 1, 1]
    assert tasks.majority(tasks.Countdown(), ["q"] * 3, ["3+7", "3*7+5", "5+7*3"]) == [0, 1, 1]


def test_no_answer_is_never_the_majority():
    """Answers from which nothing can be read do not vote and earn nothing, however many they
    are."""
    assert tasks.majority(tasks.Countdown(), ["q"] * 3, ["3*", "(", "3+7"]) == [0, 0, 1]
    assert tasks.majority(tasks.Countdown(), ["q"] * 2, ["3*", "("]) == [0, 0]
