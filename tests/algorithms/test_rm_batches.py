"""
What the RM class does around its loss: what is trained, which answers are sampled and paired, which
settings are refused; and how a reward model judges an answer that does not fit.
"""

import pytest
import torch

import data
import tasks
from harness.errors import InputError
from harness.log import Log
from rm import RM, Judge, RMConfig
from tiny import (PAIRS, PROBLEMS, Letters, coin, file_task, make, move, same_weights, texts,
                  tiny_model)


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def make_rm(**settings):
    """A reward model on problems, judged by the coin, in groups of 4; the sampler is no copy."""
    algo = make(RM, coin, **{"num_generations": 4, **settings})
    move(algo.sampler, 0.2, seed=8)
    return algo


def test_a_reward_model_is_trained_beside_the_sampler():
    """What is trained is a copy of the model with one number for a head, 0 at first; a frozen copy
    of the start model samples. Both are saved."""
    algo, start = make(RM), tiny_model().state_dict()
    assert set(dict(algo.named_children())) == {"model", "sampler"} and algo.rows_together == 2
    assert algo.model.config.scalar_head and (algo.model.lm_head.weight == 0).all()
    assert same_weights(start, algo.sampler.state_dict())
    assert not any(p.requires_grad for p in algo.sampler.parameters())
    assert all(p.requires_grad for p in algo.model.parameters())
    trunk = {k: v for k, v in algo.model.state_dict().items() if k != "lm_head.weight"}
    assert same_weights(trunk, {k: v for k, v in start.items() if k != "lm_head.weight"})
    assert {name.split(".")[0] for name in algo.state_dict()} == {"model", "sampler"}


def test_the_reward_model_draws_as_many_problems_as_its_flag_says():
    """From the training split, drawn by base_seed: a reward model is shared by runs of any seed."""
    task = tasks.Chain(2, 3)
    algo = make(RM, task=task, num_prompts=9, base_seed=4)
    assert algo.config.seed == 4 and algo.examples() == task.problems("train", 9, 4)
    other = make(RM, task=task, num_prompts=9, base_seed=5)
    assert algo.examples() != other.examples()


@pytest.mark.parametrize("temperature, num_generations", [(1.0, 4), (0.6, 4), (1.0, 6)])
def test_the_sampler_writes_the_answers(temperature, num_generations):
    """num_generations answers to each prompt, at that temperature, with the random numbers of the
    step's generator."""
    algo = make_rm(temperature=temperature, num_generations=num_generations)
    log = Log()
    batch = algo.sample(PROBLEMS, generator(), 1, log)
    written = data.rollout(algo.sampler, algo, PROBLEMS, generator(), None)
    assert texts(batch) == texts(written)
    assert len(batch["rewards"]) == 4 * num_generations
    right = sum(coin(*zip(*texts(batch))))
    assert log.line()["reward"] == pytest.approx(right / (4 * num_generations))
    [minibatch] = algo.minibatches(batch, log)
    assert set(texts(minibatch)) <= set(texts(batch))
    assert len(minibatch["prompt_index"]) >= 4


def test_pairs_are_drawn_by_the_generator_of_the_step(monkeypatch):
    """Whatever the state of the global generator: the step's generator alone decides. Another seed,
    another choice among the same answers."""
    algo, found = make_rm(), []
    answers = data.rollout(algo.sampler, algo, PROBLEMS, generator(), None)
    monkeypatch.setattr(data, "rollout", lambda *args: dict(answers))
    for seed in (3, 3, 4, 5, 6):
        torch.manual_seed(len(found))
        batch = algo.sample(PROBLEMS, generator(seed), 1, Log())
        found.append(texts(algo.minibatches(batch, Log())[0]))
    assert found[0] == found[1] and len(set(map(str, found))) > 2


def test_a_reward_model_reads_preferences_or_makes_them():
    """A file with chosen and rejected brings the pairs; one of problems, and the built-in task, are
    answered and judged."""
    pairs = make(RM, task=file_task(PAIRS))
    assert pairs.from_file and not hasattr(pairs, "rewards")
    batch = pairs.sample(PAIRS[:1], None, 0, Log())
    assert texts(batch) == [("7+5=", "2"), ("7+5=", "3")]
    [minibatch] = pairs.minibatches(batch, Log())
    assert texts(minibatch) == texts(batch)
    sums = file_task([{"prompt": "1+1=", "answer": "2"}])
    for algo in (make(RM, task=sums), make(RM)):
        assert not algo.from_file and list(algo.rewards.functions) == ["verifier"]


def test_columns_that_a_file_must_have():
    """Preferences, or what the reward needs to make some."""
    assert RMConfig().columns() == [("prompt", "chosen", "rejected"), ("prompt", "answer")]


def test_rewards_and_their_weights_reach_the_class():
    """--reward and --reward_weights."""
    algo = make(RM, reward="brevity,verifier", reward_weights="0.5,2")
    assert list(algo.rewards.functions) == ["brevity", "verifier"]
    assert algo.rewards.weights == [0.5, 2]


@pytest.mark.parametrize("settings, reason", [
    (dict(reward="model"), "--reward model: a reward model cannot be its own judge"),
    (dict(reward="verifier,model"), "--reward model: a reward model cannot be its own judge"),
    (dict(num_generations=1), "--num_generations 1: a pair needs at least 2 answers"),
    (dict(num_prompts=0), "--num_prompts 0: a number of at least 1"),
    (dict(center_rewards_coefficient=-0.1), "--center_rewards_coefficient -0.1: a number of"),
    (dict(temperature=0.0), "--temperature 0.0: a number above 0"),
])
def test_impossible_settings_of_a_reward_model_are_refused(settings, reason):
    """In one line that names the flag."""
    with pytest.raises(InputError, match=reason):
        RMConfig(**settings)


def test_settings_of_a_reward_model_at_the_edge_are_accepted():
    """Two answers, one prompt, no centring."""
    RMConfig(num_generations=2, num_prompts=1, center_rewards_coefficient=0.0, temperature=0.01)


def test_the_judge_cuts_what_does_not_fit():
    """block_size 32 and a prompt of 1 + 4 tokens leave room for 27: of an answer of 45 the reward
    is that of its first 27 tokens; one of 26 and its <end> is read whole."""
    torch.manual_seed(0)
    model = tiny_model().with_scalar_head()
    move(model, 0.3)
    judge, encode = Judge(model, Letters()), Letters().encode
    prompt = [16, *encode("7+5=")]
    long, fitting = "123456789" * 5, "12345678" * 3 + "98"
    for text, read in ((long, encode(long[:27])), (fitting, [*encode(fitting), 16])):
        ids = prompt + read
        assert len(ids) == 32
        with torch.no_grad():
            alone = model(torch.tensor([ids]))[0, -1, 0].item()
        assert judge(["7+5="], [text]) == [pytest.approx(alone, abs=1e-5)]
