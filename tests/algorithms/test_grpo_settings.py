"""Which settings GRPO takes, which it refuses, and where they arrive."""

import math

import pytest
import torch

import grpo
import train
from grpo import GRPO, GRPOConfig, group_advantages, policy_loss
from harness import flags
from harness.errors import InputError
from harness.log import Log
from model import GPTConfig
from ppo import PPO, PPOConfig
from tasks import is_test
from tiny import (PROBLEMS, coin, make_grpo, make_ppo, minibatches, move, same, sample)


def parse(*words):
    return flags.parse(list(map(str, words)), train.ALGORITHMS, GPTConfig)


def parser():
    return flags.make_parser("grpo", train.ALGORITHMS, GPTConfig)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    (dict(reward="verifier,brevity", reward_weights="1"), "1 numbers"),
    (dict(reward_weights="1,2"), "2 numbers"),
    (dict(reward_weights="one"), "numbers separated by commas"),
    (dict(reward="verifier,charm"), "charm is unknown"),
    (dict(num_generations=1), "nothing to compare"),
    (dict(num_generations=1, advantage="rloo", scale_rewards="none"), "nothing to compare"),
    (dict(num_generations=1, advantage="reinforce"), "nothing to compare"),
    (dict(num_generations=0), "at least 1"),
    (dict(num_iterations=0), "at least 1"),
    (dict(num_minibatches=0), "at least 1"),
    (dict(temperature=0.0), "above 0"),
])
def test_wrong_settings_are_refused(settings, message):
    """Each is an InputError that says what is wrong, before anything is sampled."""
    with pytest.raises(InputError, match=message):
        make_grpo(**settings)


def test_more_parts_than_there_are_rows_are_refused():
    """As many parts as groups (as answers, for PPO) will do; with one more the sentence names both
    numbers, in code and on the command line."""
    for name, Config, most, message in (
            ("grpo", GRPOConfig, 5, "a batch of --batch_size 5 groups"),
            ("ppo", PPOConfig, 15, "the 15 answers of a batch")):
        settings = dict(batch_size=5, num_generations=3)
        words = [w for key, value in settings.items() for w in (f"--{key}", value)]
        for make in (lambda n, C=Config, s=settings: C(**s, num_minibatches=n),
                     lambda n, a=name, w=words: parse("--algo", a, *w, "--num_minibatches", n)):
            assert make(most).num_minibatches == most
            with pytest.raises(InputError, match=f"--num_minibatches {most + 1}: {message}"):
                make(most + 1)


def test_remax_takes_no_majority():
    """The one greedy answer is always the majority of itself: a baseline of 1 whatever it says."""
    for reward in ("majority", "verifier,majority", "majority,brevity"):
        with pytest.raises(InputError, match="--advantage remax .* its own --reward majority: use"):
            GRPOConfig(advantage="remax", scale_rewards="none", reward=reward)
        assert GRPOConfig(advantage="rloo", reward=reward).reward == reward
    assert GRPOConfig(advantage="remax", scale_rewards="none").advantage == "remax"


def test_one_answer_is_enough_without_a_group():
    """--num_generations 1 is fine where nothing is compared with the group."""
    for advantage in ("reinforce", "remax"):
        config = GRPOConfig(num_generations=1, advantage=advantage, scale_rewards="none")
        assert config.num_generations == 1


# -- the choices of a flag ------------------------------------------------------------------------

LP = torch.full((1, 2), -1.0)
MASK = torch.ones(1, 2, dtype=torch.bool)
FUNCTIONS = {
    "advantage": lambda name: group_advantages(LP, name, greedy_rewards=LP[:, 0]),
    "scale_rewards": lambda name: group_advantages(LP, scale_rewards=name),
    "loss_type": lambda name: policy_loss(LP, LP, LP[:, 0], MASK, loss_type=name),
    "importance_sampling_level":
        lambda name: policy_loss(LP, LP, LP[:, 0], MASK, importance_sampling_level=name),
    "loss_type of the weights": lambda name: grpo.token_weights(MASK, name, 2)}


@pytest.mark.parametrize("what, name, choices", [
    ("advantage", "mean", "group, rloo, remax, reinforce"),
    ("scale_rewards", "std", "group, batch, mean, none"),
    ("loss_type", "sapo", "grpo, dr_grpo, dapo, cispo"),
    ("importance_sampling_level", "seq", "token, sequence"),
    ("loss_type of the weights", "bnpo", "grpo, dr_grpo, dapo, cispo")])
def test_functions_take_the_choices_of_their_flag_and_no_other(what, name, choices):
    """A name that is none of them raises a ValueError that lists them, and does not act as another;
    the list is the one that the command line has, and each of its names is taken."""
    flag = what.split()[0]
    with pytest.raises(ValueError, match=f"^{flag} '{name}': choose from {choices}$"):
        FUNCTIONS[what](name)
    [action] = [a for a in parser()._actions if a.dest == flag]
    assert ", ".join(action.choices) == choices
    assert all(FUNCTIONS[what](choice) is not None for choice in action.choices)


# -- where settings arrive ------------------------------------------------------------------------


def test_epsilon_high_and_the_bias_correction_on_the_command_line():
    """--epsilon_high is a number, 0 included, or left out (the help says none); below 0 it is
    refused. --use_bias_correction_kl may stand alone."""
    assert parse().epsilon_high is None and parse().use_bias_correction_kl is False
    assert parse("--epsilon_high", "0.28").epsilon_high == 0.28
    assert parse("--epsilon_high", "0").epsilon_high == 0
    assert parse("--use_bias_correction_kl").use_bias_correction_kl is True
    with pytest.raises(InputError, match="--epsilon_high -0.1: a number of at least 0 is needed"):
        parse("--epsilon_high=-0.1")
    text = " ".join(parser().format_help().split())
    assert "none: as epsilon (0.2 to 0.4; cispo: 4) [none]" in text


def test_epsilon_high_follows_epsilon():
    """Left out, it is the same as epsilon, for the flag and for the function; 0 is a number like
    any other: then no ratio above 1 has a gradient."""
    assert GRPOConfig(epsilon=0.1).epsilon_high is None
    algo = make_grpo(num_iterations=2, beta=0.3, entropy_coef=0.2)
    minibatch, found = minibatches(algo)[0], {}
    for epsilon_high in (None, 0.1, 0.3, 0.0):
        algo = make_grpo(epsilon=0.1, epsilon_high=epsilon_high)
        move(algo.model)
        found[epsilon_high] = algo.loss(minibatch, Log()).item()
    assert found[None] == found[0.1] and len(set(found.values())) == 3
    logprobs, old = torch.tensor([[0.5, -0.5]]), torch.zeros(1, 2)          # ratios 1.65 and .61
    for epsilon_high, gain in ((None, 1.1), (0.1, 1.1), (0.3, 1.3), (0.0, 1.0)):
        losses, _, clipped = policy_loss(logprobs, old, torch.ones(1), old == 0, 0.1, epsilon_high)
        assert same(losses, [[-gain, -math.exp(-0.5)]], 1e-6)
        assert clipped.tolist() == [[True, False]]


@pytest.mark.parametrize("settings", [
    dict(), dict(advantage="rloo"), dict(scale_rewards="batch"), dict(scale_rewards="none"),
    dict(std_correction=0), dict(advantage="reinforce", scale_rewards="none"),
    dict(advantage_eps=0.5)])
def test_settings_reach_the_advantages(settings):
    """A minibatch's advantages are group_advantages of its rewards with the configured baseline and
    scale."""
    algo = make_grpo(**settings, beta=0.1)                      # beta: no row is left out
    batch = sample(algo)
    [part] = algo.minibatches({**batch}, Log())
    texts = [algo.tokenizer.decode(ids) for ids in batch["completion_ids"].tolist()]
    rewards = torch.tensor(coin([p["prompt"] for p in PROBLEMS for _ in range(4)], texts))
    expected = group_advantages(rewards.view(4, 4), **settings)
    assert same(part["advantages"].view(4, 4), expected, 1e-6)


def test_what_a_file_must_have():
    """A line of --data needs an answer where the verifier judges, alone or beside others."""
    for algorithm in (GRPO, PPO):
        for reward, columns in (("verifier", ("prompt", "answer")), ("brevity", ("prompt",)),
                                ("brevity,verifier", ("prompt", "answer")),
                                ("format,brevity", ("prompt",))):
            assert algorithm.Config(reward=reward).columns() == [columns]


@pytest.mark.parametrize("make", [make_grpo, make_ppo])
def test_examples_are_training_problems(make):
    """num_prompts problems of the training split, others with another seed; none is one that the
    model is judged by."""
    algo = make(num_prompts=300, seed=3)
    found = algo.examples()
    assert len(found) == 300 and found == algo.task.problems("train", 300, 3)
    assert found != make(num_prompts=300, seed=4).examples()
    assert not any(is_test(e["prompt"]) or ">" in e["prompt"] for e in found)


# -- advantages without a group's mean ------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["reinforce", "remax"])
def test_equal_rewards_have_no_deviation_to_be_divided_by(advantage):
    """Without the group's mean, rewards that are all alike are still something: .1 (7 times, whose
    float32 deviation is not quite 0) stays .1, less the greedy answer's reward, and is not 1,000,
    divided by eps; one reward alone has no deviation at all. If one differs, all are divided."""
    settings = dict(advantage=advantage, greedy_rewards=torch.tensor([0.02]))
    baseline = 0.02 if advantage == "remax" else 0.0
    for scale_rewards, sizes in (("batch", (7, 1)), ("group", (7,))):
        for rewards in (torch.full((1, size), 0.1) for size in sizes):
            found = group_advantages(rewards, scale_rewards=scale_rewards, **settings)
            assert same(found, torch.full_like(rewards, 0.1 - baseline), 1e-6)
        rewards = torch.tensor([[0.1] * 6 + [0.8]])                     # deviation .7 / sqrt 7
        found = group_advantages(rewards, scale_rewards=scale_rewards, **settings)
        assert same(found, (rewards - baseline) / (0.7 / 7 ** 0.5 + 1e-4), 1e-6)


def test_one_flat_group_is_not_divided_by_its_own_deviation():
    """At group scale only the flat group stays: [1, 1] and [1, 0] -> [1, 1] and [1, 0] / .7071."""
    rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    found = group_advantages(rewards, "reinforce", "group", advantage_eps=0)
    assert same(found, [[1, 1], [2 ** 0.5, 0]], 1e-6)


@pytest.mark.parametrize("advantage", ["reinforce", "remax"])
def test_rewards_without_a_group_mean_have_no_group_scale(advantage):
    """They are refused at the default scale, which is the group's, and taken at the other two."""
    with pytest.raises(InputError, match=f"--advantage {advantage} needs --scale_rewards none or"):
        GRPOConfig(advantage=advantage)
    for scale_rewards in ("none", "batch"):
        assert GRPOConfig(advantage=advantage, scale_rewards=scale_rewards).advantage == advantage


def test_a_group_of_one_has_no_deviation_to_log():
    """One answer a prompt: every group is flat and reward_std, which would be nan, is not
    logged."""
    def logged(num_generations):
        log = Log()
        minibatches(make_grpo(num_generations=num_generations, advantage="reinforce",
                              scale_rewards="batch"), log=log)
        return log.means
    assert logged(1)["frac_reward_zero_std"] == (4, 4) and "reward_std" not in logged(1)
    assert "reward_std" in logged(2)
