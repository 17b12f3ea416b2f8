"""
What the classes of grpo.py and ppo.py do with a batch: how it is cut into updates and in which
order they come, by which constants it is averaged, which settings are refused, and how precise it
all is. Each test names a cause and its effect; none depends on how well something is learnt.
"""

import statistics

import pytest
import torch

import data
import grpo
import ppo
import train
from grpo import GRPO, GRPOConfig
from model import InputError
from ppo import PPO
from test_grpo import PROBLEMS, coin, collect, make_grpo, move, same
from test_ppo import letters, make_ppo, rows

SIX = PROBLEMS + [{"prompt": p, **data.Chain.solve(p)} for p in ("2*2=", "8-3+1=")]


def answers(part):
    """The (prompt ids, completion ids) of a part's rows."""
    return [(tuple(prompt), tuple(completion)) for prompt, completion, _ in rows(part)]


# -- how a batch is cut ---------------------------------------------------------------------------


@pytest.mark.parametrize("parts, sizes", [(1, [6]), (2, [3, 3]), (4, [2, 2, 1, 1]),
                                          (5, [2, 1, 1, 1, 1]), (6, [1] * 6)])
def test_grpo_makes_as_many_updates_as_asked(parts, sizes):
    """Six groups of 4 in so many parts, none larger than another by more than a group, each row
    once and in order. (torch.chunk makes three parts of six where five are asked for.)"""
    algo = make_grpo(num_minibatches=parts, beta=0.1)                   # beta: no row is left out
    batch, _ = collect(algo, SIX)
    minibatches = algo.minibatches(batch)
    assert [len(part["advantages"]) for part in minibatches] == [4 * size for size in sizes]
    assert [row for part in minibatches for row in answers(part)] == answers(batch)


@pytest.mark.parametrize("parts, sizes", [(1, [16]), (3, [6, 5, 5]), (5, [4, 3, 3, 3, 3]),
                                          (11, [2] * 5 + [1] * 6)])
def test_ppo_makes_as_many_updates_as_asked(parts, sizes):
    """The same for PPO, whose parts are of single answers: 16 of them."""
    algo = make_ppo(num_mini_batches=parts, num_ppo_epochs=1)
    batch, _ = collect(algo)
    minibatches = list(algo.minibatches(batch))
    assert [len(part["advantages"]) for part in minibatches] == sizes
    assert [row for part in minibatches for row in answers(part)] == answers(batch)


def test_more_parts_than_there_are_rows_are_refused():
    """As many parts as groups (as answers, for PPO) will do; with one more the sentence names both
    numbers, when the flags are read as when a batch is cut, and no part is ever empty."""
    whole_pass = make_ppo(num_mini_batches=16, num_ppo_epochs=1)
    for algo, most, name in ((make_grpo(num_minibatches=4), 4, "num_minibatches"),
                             (whole_pass, 16, "num_mini_batches")):
        batch, _ = collect(algo)
        assert len(list(algo.minibatches(batch))) == most
        setattr(algo.config, name, most + 1)
        sentence = f"--{name} {most + 1}: the {most} (groups|answers) of a batch .*--batch_size"
        with pytest.raises(InputError, match=sentence):
            list(algo.minibatches(batch))
    for algo, name, most in (("grpo", "num_minibatches", 5), ("ppo", "num_mini_batches", 15)):
        flags = ["--algo", algo, "--batch_size", "5", "--num_generations", "3", f"--{name}"]
        assert getattr(train.parse_args([*flags, str(most)])[1], name) == most
        with pytest.raises(InputError, match=f"--{name} {most + 1}: the {most} "):
            train.parse_args([*flags, str(most + 1)])


@pytest.mark.parametrize("make, flags", [
    (make_grpo, dict(num_iterations=3, num_minibatches=2, beta=0.1)),
    (make_ppo, dict(num_ppo_epochs=3, num_mini_batches=2, target_kl=0.0))])
def test_updates_come_pass_by_pass(make, flags):
    """Three passes over two parts: part 1, part 2, part 1, part 2, part 1, part 2. No part is
    repeated before the next has had its turn, and no pass is made of one part alone."""
    algo = make(**flags)
    batch, _ = collect(algo)
    order = [answers(part) for part in algo.minibatches(batch)]
    assert order[0] + order[1] == answers(batch) and order[0] != order[1]
    assert order == order[:2] * 3


# -- by what it is averaged -----------------------------------------------------------------------


def test_dr_grpo_divides_by_the_length_allowed_and_not_by_the_longest_answer():
    """In a batch whose longest answer is shorter than max_new_tokens, every token weighs
    1 / (B max_new_tokens) (2503.20783, section 3), whatever else is in the batch."""
    algo = make_grpo(loss_type="dr_grpo", mask_truncated_completions=True, beta=0.1)
    [part] = algo.minibatches(collect(algo)[0])
    B, width = part["completion_mask"].shape
    assert 1 < width < algo.task.max_new_tokens == 16 and B == 16
    assert (part["weights"] == part["completion_mask"] / (16 * 16)).all() and part["weights"].any()


@pytest.mark.parametrize("truncation", ["terminal", "mask"])
def test_the_logged_kl_is_per_answer_that_is_trained(truncation):
    """objective/kl: log pi(y)/pi_ref(y) summed over each answer and averaged over those with a
    token in the loss; with truncation mask those that were cut off are in neither sum."""
    algo = make_ppo(truncation=truncation)
    batch, metrics = collect(algo)
    kls, cut = [], 0
    for prompt, completion, truncated in rows(batch):
        cut += truncated
        if not (truncated and truncation == "mask"):
            tokens, T = torch.tensor([prompt + completion]), len(completion)
            logp, logq = (model(tokens)[0, len(prompt) - 1:-1].log_softmax(-1)[range(T), completion]
                          for model in (algo.model, algo.ref_model))
            kls.append(float((logp - logq).detach().sum()))
    total, count = metrics["objective/kl"]
    assert count == len(kls) == (16 if truncation == "terminal" else 16 - cut) and 0 < cut < 16
    assert float(total) == pytest.approx(sum(kls), abs=1e-4)


def test_ppo_counts_as_clipped_what_lost_its_gradient():
    """At pi_old, in a band of no width, every ratio is exactly 1 and none is clipped; far from it,
    tokens without an advantage, which have no gradient to lose, are not counted either."""
    algo = make_ppo(cliprange=0.0)
    minibatch = next(algo.minibatches(collect(algo)[0]))
    assert algo.loss(minibatch)[1]["clip_ratio"][0] == 0
    move(algo.model)
    assert algo.loss(minibatch)[1]["clip_ratio"][0] > 10
    without = {**minibatch, "advantages": 0 * minibatch["advantages"]}
    assert algo.loss(without)[1]["clip_ratio"][0] == 0


# -- the KL times the ratio -----------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_bias_correction_reaches_the_loss(level):
    """--use_bias_correction_kl: off the sampling policy, beta times k3 times each token's own
    ratio, in the loss and in the log, also where the policy's ratio is that of the whole answer."""
    flags = dict(num_iterations=2, beta=0.3, importance_sampling_level=level)
    algo, without = make_grpo(use_bias_correction_kl=True, **flags), make_grpo(**flags)
    minibatch = algo.minibatches(collect(algo)[0])[0]
    for one in (algo, without):
        move(one.model)
    logprobs, mask = algo.logprobs(algo.model, minibatch)[0].detach(), minibatch["completion_mask"]
    log_ratio = minibatch["ref_logprobs"] - logprobs
    kl = log_ratio.exp() - 1 - log_ratio
    corrected = (logprobs - minibatch["old_logprobs"]).exp() * kl
    (loss, metrics), (plain_loss, plain_metrics) = (one.loss(minibatch) for one in (algo, without))
    difference = 0.3 * ((corrected - kl) * minibatch["weights"]).sum()
    assert same(loss - plain_loss, difference, 1e-5) and difference.abs() > 0.01
    assert same(metrics["kl"][0], corrected[mask].sum(), 1e-4)
    assert same(plain_metrics["kl"][0], kl[mask].sum(), 1e-4)


def test_on_policy_the_bias_correction_changes_the_gradient_alone():
    """Where every batch is used once the ratio is 1: the same loss, another gradient."""
    losses, gradients = [], []
    for corrected in (False, True):
        algo = make_grpo(beta=0.3, use_bias_correction_kl=corrected)
        [minibatch] = algo.minibatches(collect(algo)[0])
        loss, _ = algo.loss(minibatch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in algo.model.parameters()]))
    assert losses[0] == losses[1] and not same(gradients[0], gradients[1], 1e-3)


# -- advantages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["reinforce", "remax"])
def test_equal_rewards_have_no_deviation_to_be_divided_by(advantage):
    """Without the group's mean, rewards that are all alike are still something: .1 (7 times, whose
    float32 deviation is not quite 0) stays .1, less the greedy answer's reward, and is not 1,000,
    divided by eps; one reward alone has no deviation at all. If one differs, all are divided."""
    flags = dict(advantage=advantage, greedy_rewards=torch.tensor([0.02]))
    baseline = 0.02 if advantage == "remax" else 0.0
    for scale_rewards, sizes in (("batch", (7, 1)), ("group", (7,))):
        for rewards in (torch.full((1, size), 0.1) for size in sizes):
            found = grpo.group_advantages(rewards, scale_rewards=scale_rewards, **flags)
            assert same(found, torch.full_like(rewards, 0.1 - baseline), 1e-6)
        rewards = torch.tensor([[0.1] * 6 + [0.8]])                     # deviation .7 / sqrt 7
        found = grpo.group_advantages(rewards, scale_rewards=scale_rewards, **flags)
        assert same(found, (rewards - baseline) / (0.7 / 7 ** 0.5 + 1e-4), 1e-6)


def test_one_flat_group_is_not_divided_by_its_own_deviation():
    """At group scale only the flat group stays: [1, 1] and [1, 0] -> [1, 1] and [1, 0] / .7071."""
    rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    found = grpo.group_advantages(rewards, "reinforce", "group", advantage_eps=0)
    assert same(found, [[1, 1], [2 ** 0.5, 0]], 1e-6)


@pytest.mark.parametrize("advantage", ["reinforce", "remax"])
def test_rewards_without_a_group_mean_have_no_group_scale(advantage):
    """They are refused at the default scale, which is the group's, and taken at the other two."""
    with pytest.raises(InputError, match=f"--advantage {advantage} needs --scale_rewards none or"):
        GRPOConfig(advantage=advantage)
    for scale_rewards in ("none", "batch"):
        assert GRPOConfig(advantage=advantage, scale_rewards=scale_rewards).advantage == advantage


def test_a_group_of_one_has_no_deviation_to_log():
    """One answer a prompt: every group is flat, and reward_std, which would be nan, is absent."""
    flags = dict(advantage="reinforce", scale_rewards="batch")
    _, metrics = collect(make_grpo(num_generations=1, **flags))
    assert metrics["frac_reward_zero_std"] == (4, 4) and "reward_std" not in metrics
    assert "reward_std" in collect(make_grpo(num_generations=2, **flags))[1]


def test_remax_takes_no_majority():
    """The one greedy answer is always the majority of itself: a baseline of 1 whatever it says."""
    for reward in ("majority", "verifier,majority", "majority,brevity"):
        with pytest.raises(InputError, match="--advantage remax .* its own --reward majority: use"):
            GRPOConfig(advantage="remax", scale_rewards="none", reward=reward)
        assert GRPOConfig(advantage="rloo", reward=reward).reward == reward
    assert GRPOConfig(advantage="remax", scale_rewards="none").advantage == "remax"


# -- choices --------------------------------------------------------------------------------------

LP = torch.full((1, 2), -1.0)
MASK = torch.ones(1, 2, dtype=torch.bool)
FUNCTIONS = {
    "advantage": lambda name: grpo.group_advantages(LP, name, greedy_rewards=LP[:, 0]),
    "scale_rewards": lambda name: grpo.group_advantages(LP, scale_rewards=name),
    "loss_type": lambda name: grpo.policy_loss(LP, LP, LP[:, 0], MASK, loss_type=name),
    "importance_sampling_level":
        lambda name: grpo.policy_loss(LP, LP, LP[:, 0], MASK, importance_sampling_level=name),
    "loss_type of the weights": lambda name: grpo.token_weights(MASK, name, 2)}


@pytest.mark.parametrize("what, name, choices", [
    ("advantage", "mean", "group, rloo, remax, reinforce"),
    ("scale_rewards", "std", "group, batch, none"),
    ("loss_type", "sapo", "grpo, dr_grpo, dapo, cispo"),
    ("importance_sampling_level", "seq", "token, sequence"),
    ("loss_type of the weights", "bnpo", "grpo, dr_grpo, dapo, cispo")])
def test_functions_take_the_choices_of_their_flag_and_no_other(what, name, choices):
    """A name that is none of them raises a ValueError that lists them, and does not act as another;
    the list is the one that the command line has, and each of its names is taken."""
    flag = what.split()[0]
    with pytest.raises(ValueError, match=f"^{flag} '{name}' is unknown: use one of {choices}$"):
        FUNCTIONS[what](name)
    [action] = [a for a in train.make_parser("grpo")._actions if a.dest == flag]
    assert ", ".join(action.choices) == choices
    assert all(FUNCTIONS[what](choice) is not None for choice in action.choices)


# -- flags ----------------------------------------------------------------------------------------


def test_epsilon_high_and_the_bias_correction_on_the_command_line():
    """--epsilon_high is a number, 0 included, or left out (the help says none); below 0 it is
    refused. --use_bias_correction_kl may stand alone."""
    def config(*flags):
        return train.parse_args(["--algo", "grpo", *flags])[1]
    assert config().epsilon_high is None and config().use_bias_correction_kl is False
    assert config("--epsilon_high", "0.28").epsilon_high == 0.28
    assert config("--epsilon_high", "0").epsilon_high == 0
    assert config("--use_bias_correction_kl").use_bias_correction_kl is True
    with pytest.raises(InputError, match="--epsilon_high -0.1: a number of at least 0"):
        config("--epsilon_high=-0.1")
    assert "none: epsilon [none]" in " ".join(train.make_parser("grpo").format_help().split())


def test_what_a_file_must_have():
    """A line of --data needs an answer where the verifier judges, alone or beside others."""
    for algorithm in (GRPO, PPO):
        for reward, columns in (("verifier", ("prompt", "answer")), ("brevity", ("prompt",)),
                                ("brevity,verifier", ("prompt", "answer")),
                                ("format,brevity", ("prompt",))):
            assert algorithm.columns(algorithm.Config(reward=reward)) == [columns]


@pytest.mark.parametrize("make", [make_grpo, make_ppo])
def test_examples_are_training_problems(make):
    """num_prompts problems of the training split, others with another seed; none is one that the
    model is judged by."""
    algo = make(num_prompts=300)
    found = algo.examples(3)
    assert len(found) == 300 and found == data.problems(algo.task, "train", 300, 3)
    assert found != algo.examples(4)
    assert not any(data.is_test(e["prompt"]) or ">" in e["prompt"] for e in found)


def test_the_legend_explains_a_ratio_that_stays_1():
    """Only where each batch is used once is the ratio always 1, and only then is it said."""
    for flags, said in ((dict(), True), (dict(num_iterations=2), False),
                        (dict(num_minibatches=2), False),
                        (dict(num_iterations=2, num_minibatches=2), False)):
        assert ("The ratio is exactly 1" in make_grpo(**flags).legend) == said


# -- precision ------------------------------------------------------------------------------------


def first_loss(make, double, **flags):
    """The algorithm, the first minibatch of a batch and its loss after the weights have moved."""
    algo = make(**flags)
    for network in {**algo.networks, **algo.frozen}.values():
        network.double() if double else network.float()
    minibatch = list(algo.minibatches(collect(algo)[0]))[0]
    move(algo.model)
    loss, _ = algo.loss(minibatch)
    loss.backward()
    return algo, minibatch, loss.detach()


@pytest.mark.parametrize("make, flags", [
    (make_grpo, dict(num_iterations=2, beta=0.3, entropy_coef=0.1)),
    (make_grpo, dict(num_iterations=2, beta=0.3, loss_type="grpo",
                     importance_sampling_level="sequence")),
    (make_ppo, dict()),
    (make_ppo, dict(truncation="bootstrap", whiten_advantages=False))])
def test_a_double_model_is_trained_in_float64(make, flags):
    """model.double(): every number of the minibatch, the loss and its gradient are float64, and
    agree with those of the same samples in float32 to its precision and not to the last bit; the
    weights add up to 1 as closely as float64 can."""
    _, single, loss32 = first_loss(make, False, **flags)
    algo, double, loss64 = first_loss(make, True, **flags)
    assert torch.equal(single["completion_ids"], double["completion_ids"])
    floats = {name for name, tensor in single.items() if tensor.is_floating_point()}
    assert {"advantages", "weights", "old_logprobs"} <= floats
    for name in floats:
        assert single[name].dtype == torch.float32 and double[name].dtype == torch.float64, name
        mask = single["completion_mask"] if single[name].dim() == 2 else ...
        assert same(single[name].double()[mask], double[name][mask], 1e-4), name
    assert loss32.dtype == torch.float32 and loss64.dtype == torch.float64
    assert loss64.item() == pytest.approx(loss32.item(), rel=1e-4) and loss64 != loss32
    assert all(p.grad.dtype == torch.float64 for p in algo.model.parameters())
    assert abs(double["weights"].sum() - 1) < 1e-14


def test_rewards_enter_float64_before_anything_is_computed_from_them():
    """In a double model's batch the advantages of GRPO's six groups of 4, and the returns of PPO,
    which are scores less a penalty here, are exact to 1e-14."""
    algo = make_grpo()
    algo.model.double()
    batch, _ = collect(algo, SIX)
    texts = [algo.tokenizer.decode(ids) for ids in batch["completion_ids"].tolist()]
    for i, problem in enumerate(SIX):
        rewards = coin([problem["prompt"]] * 4, texts[4 * i:4 * i + 4])
        for advantage, reward in zip(batch["advantages"][4 * i:4 * i + 4].tolist(), rewards):
            by_hand = (reward - sum(rewards) / 4) / (statistics.stdev(rewards) + 1e-4)
            assert abs(advantage - by_hand) < 1e-14
    algo = make_ppo(wise=False, kl_coef=0.0, lam=1.0, missing_eos_penalty=0.7)
    for network in (algo.model, algo.critic, algo.ref_model):
        network.double()
    batch, cut = collect(algo)[0], 0
    for b, (_, completion, truncated) in enumerate(rows(batch)):
        score = letters(None, [algo.tokenizer.decode(completion)])[0]
        last = batch["returns"][b, len(completion) - 1]
        assert abs(last - (score - 0.7 * truncated)) < 1e-14
        cut += truncated
    assert 0 < cut < 16


def test_weights_are_as_precise_as_the_mask():
    """Bools give float32; a mask of numbers keeps its precision: in float64 1/3 has 16 digits."""
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]]).bool()
    for weights, expected in ((ppo.token_weights, 1 / 3),
                              (lambda m: grpo.token_weights(m, "dapo"), 1 / 3),
                              (lambda m: grpo.token_weights(m, "grpo"), 1 / 6),
                              (lambda m: grpo.token_weights(m, "dr_grpo", 5), 1 / 10)):
        assert weights(mask).dtype == weights(mask.float()).dtype == torch.float32
        assert weights(mask.double()).dtype == torch.float64
        assert abs(float(weights(mask.double())[0, 0]) - expected) < 1e-16
