"""
GRPO on a tiny model: every answer has its own prompt, reward and advantage, and the loss is the
equation at the head of grpo.py.
"""

import statistics

import pytest
import torch

import data
from grpo import group_advantages, k3, policy_loss, token_weights
from harness.log import Log
from tiny import (PROBLEMS, SEED, coin, loss_and_gradient, make_grpo, minibatches, move, read, same,
                  sample)

LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "cispo"]
LEVELS = ["token", "sequence"]


def texts(algo, batch):
    """The answers of a batch, decoded row by row through their masks."""
    return [algo.tokenizer.decode(ids[mask].tolist())
            for ids, mask in zip(batch["completion_ids"], batch["completion_mask"])]


def advantages_of(batch, **settings):
    """The advantages (B,) of a batch of groups of 4, by the pure function."""
    return group_advantages(batch["rewards"].view(-1, 4), **settings).flatten()


# -- sampling and rewards -------------------------------------------------------------------------


def test_every_row_has_its_own_prompt_reward_and_advantage():
    """Row b answers problem b // G: reward and advantage are recomputed from the decoded row, group
    by group; so are the figures of the log."""
    algo, log, G = make_grpo(beta=0.1), Log(), 4                # beta: no row is left out
    batch = sample(algo, log=log)
    [part] = algo.minibatches({**batch}, log)
    rewards, tokenizer = [], algo.tokenizer
    for b, text in enumerate(texts(algo, batch)):
        problem, row = PROBLEMS[b // G]["prompt"], batch["prompt_index"][b]
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row]]
        assert tokenizer.decode(prompt[1:].tolist()) == problem
        rewards += coin([problem], [text])
    groups = [rewards[i:i + G] for i in range(0, 16, G)]
    by_hand = [(r - statistics.mean(g)) / (statistics.stdev(g) + 1e-4) for g in groups for r in g]
    assert batch["rewards"].tolist() == rewards and same(part["advantages"], by_hand, 1e-5)
    assert len({tuple(g) for g in groups}) >= 3                 # the groups do differ
    flat = sum(len(set(g)) == 1 for g in groups)
    lengths, ended = batch["completion_mask"].sum(-1), (batch["completion_ids"] == 16).any(-1)
    line = log.line()
    assert line["reward"] == line["rewards/coin/mean"] == sum(rewards) / 16
    assert line["frac_reward_zero_std"] == flat / 4 and flat >= 1
    assert line["reward_std"] == pytest.approx(statistics.mean(map(statistics.stdev, groups)))
    assert line["completions/mean_length"] == lengths.sum() / 16
    assert log.totals["sampled_tokens"] == lengths.sum()
    assert torch.equal(batch["truncated"], ~ended) and 0 < ended.sum() < 16
    assert line["completions/clipped_ratio"] == 1 - ended.sum() / 16


def test_the_verifier_gets_the_answer_of_the_row():
    """The task's own reward: 1 where the text ends in the answer of that row's problem."""
    algo = make_grpo(None)                                      # 7+5=2, 1-2*3=7, 9*9=1, 4+4-1=7
    examples = [p for p in PROBLEMS for _ in range(2)]
    total, each = algo.rewards(examples, list("23751277"))
    assert total.tolist() == each["verifier"].tolist() == [1, 0, 1, 0, 1, 0, 1, 1]


def test_rewards_are_weighted_and_logged_by_name():
    """The total is the weighted sum of the reward functions; each is logged under its own name,
    unweighted."""
    algo, log = make_grpo(None, reward="format,brevity,verifier", reward_weights="2,0.5,-1",
                          scale_rewards="none", beta=0.1), Log()
    batch = sample(algo, log=log)
    [part] = algo.minibatches({**batch}, log)
    found = texts(algo, batch)
    answers = [PROBLEMS[b // 4]["answer"] for b in range(16)]
    format_ = [float("=" in text) for text in found]
    brevity = [-len(text) / algo.task.max_new_tokens for text in found]
    verifier = algo.task.reward(None, found, answers)
    totals = [2 * f + 0.5 * b - v for f, b, v in zip(format_, brevity, verifier)]
    line = log.line()
    for name, values in (("rewards/format/mean", format_), ("rewards/brevity/mean", brevity),
                         ("rewards/verifier/mean", verifier), ("reward", totals)):
        assert line[name] == pytest.approx(sum(values) / 16, abs=1e-6), name
    means = [statistics.mean(totals[i:i + 4]) for i in range(0, 16, 4)]
    centred = [total - means[b // 4] for b, total in enumerate(totals)]
    assert same(part["advantages"], centred, 1e-5) and sum(format_) > 0


def test_remax_compares_with_the_greedy_answer():
    """A = R - R(greedy answer to the same prompt) (2310.10505, eq. 4); the greedy tokens count as
    sampled, and the means of the log are of the sampled answers alone."""
    def evenness(prompts, completions, **columns):
        return [float(len(p) * len(c)) for p, c in zip(prompts, completions)]
    algo, log = make_grpo(evenness, advantage="remax", scale_rewards="none", beta=0.1), Log()
    batch = sample(algo, log=log)
    [part] = algo.minibatches({**batch}, log)
    tokens, answers = int(batch["completion_mask"].sum()), texts(algo, batch)
    for i, problem in enumerate(PROBLEMS):
        b = data.collate([{"prompt": problem["prompt"]}], algo.tokenizer)
        greedy = algo.model.generate(b["prompt_ids"], b["prompt_mask"], algo.task.max_new_tokens,
                                     16, 17, temperature=0)
        tokens += int(greedy.completion_mask.sum())
        greedy_length = len(algo.tokenizer.decode(greedy.completion_ids[0].tolist()))
        for row in range(4 * i, 4 * i + 4):
            difference = len(answers[row]) - greedy_length
            assert part["advantages"][row] == len(problem["prompt"]) * difference
    assert log.totals["sampled_tokens"] == tokens
    rewards = [len(PROBLEMS[b // 4]["prompt"]) * len(text) for b, text in enumerate(answers)]
    assert log.line()["reward"] == sum(rewards) / 16


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_training_scores_what_sampling_drew(temperature):
    """The log-probabilities that the sampler recorded are those of the training forward pass,
    temperature included."""
    algo = make_grpo(temperature=temperature)
    batch = sample(algo)
    samples = algo.model.generate(batch["prompt_ids"], batch["prompt_mask"],
                                  algo.task.max_new_tokens, 16, 17, 4, temperature,
                                  generator=torch.Generator().manual_seed(SEED))
    assert torch.equal(samples.completion_ids, batch["completion_ids"])   # the same draw again
    logprobs, _ = algo.logprobs(algo.model, batch)
    assert same(logprobs * batch["completion_mask"], samples.logprobs, 1e-4)
    ids = batch["completion_ids"][..., None]
    by_hand = (read(algo.model, batch) / temperature).log_softmax(-1).gather(-1, ids)[..., 0]
    assert same(logprobs, by_hand, 1e-5)


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_first_loss_is_minus_the_averaged_advantage(float64, loss_type):
    """At ratio 1 each token's loss is -A (cispo: -A log pi), so the loss is a sum of lengths and
    advantages that can be written down; "why is my loss 0?" (docstring of grpo.py)."""
    def length(prompts, completions, **columns):
        return [len(c) - 3.0 for c in completions]
    algo = make_grpo(length, loss_type=loss_type, advantage="reinforce", scale_rewards="none")
    batch = sample(algo)
    [minibatch] = algo.minibatches({**batch}, Log())
    A, lengths = batch["rewards"].double(), batch["completion_mask"].sum(-1).double()
    logprobs = algo.logprobs(algo.model, batch)[0].detach()
    logprobs = (logprobs * batch["completion_mask"]).sum(-1)
    by_hand = {"grpo": -A.mean(), "dr_grpo": -(A * lengths).sum() / (16 * algo.task.max_new_tokens),
               "dapo": -(A * lengths).sum() / lengths.sum(),
               "cispo": -(A * logprobs).sum() / lengths.sum()}
    assert A.unique().numel() > 3
    assert same(loss_and_gradient(algo, minibatch)[0], by_hand[loss_type])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rows_without_advantage_are_left_out_and_nothing_changes(float64, loss_type, level):
    """A row whose advantage is 0 has no gradient: the minibatch lacks it, loss and gradient are the
    whole batch's."""
    algo = make_grpo(loss_type=loss_type, importance_sampling_level=level, num_iterations=2)
    batch = sample(algo)
    minibatch = algo.minibatches({**batch}, Log())[0]
    A, mask = advantages_of(batch), batch["completion_mask"]
    kept = int((A != 0).sum())
    assert len(minibatch["advantages"]) == kept and 0 < kept <= 12
    everything = {**batch, "advantages": A, "old_logprobs": algo.score(algo.model, batch),
                  "weights": token_weights(mask.double(), loss_type, algo.task.max_new_tokens)}
    move(algo.model)
    a, b = loss_and_gradient(algo, minibatch), loss_and_gradient(algo, everything)
    assert same(a[0], b[0]) and same(a[1], b[1]) and a[1].abs().max() > 1e-3


@pytest.mark.parametrize("flags", [dict(beta=0.1), dict(entropy_coef=0.1)])
def test_nothing_is_left_out_where_every_row_has_a_gradient(flags):
    """KL and entropy act on rows without advantage too."""
    [minibatch] = minibatches(make_grpo(**flags))
    assert len(minibatch["advantages"]) == 16 and (minibatch["advantages"] == 0).any()


def test_truncated_answers_can_be_left_out():
    """mask_truncated_completions: answers that ran out of tokens lose loss and weight, and the rest
    share the whole weight (DAPO, 2503.14476, section 3.4). Their rewards still count in the
    group."""
    batch = sample(make_grpo())
    truncated, lengths = batch["truncated"], batch["completion_mask"].sum(-1)
    assert 0 < truncated.sum() < 16
    assert torch.equal(truncated, ~(batch["completion_ids"] == 16).any(-1))
    [every] = minibatches(make_grpo(mask_truncated_completions=True, beta=0.1))
    assert torch.equal(every["advantages"], advantages_of(batch))
    assert torch.equal(every["completion_mask"].sum(-1), lengths * ~truncated)
    [minibatch] = minibatches(make_grpo(mask_truncated_completions=True))
    useful = ~truncated & (every["advantages"] != 0)
    assert len(minibatch["advantages"]) == useful.sum()
    by_hand = lengths[useful] / lengths[~truncated].sum()       # dapo: every token the same
    assert same(minibatch["weights"].sum(-1), by_hand, 1e-6)


def test_dr_grpo_divides_by_the_length_allowed_and_not_by_the_longest_answer():
    """In a batch whose longest answer is shorter than max_new_tokens, every token weighs
    1 / (B max_new_tokens) (2503.20783, section 3), whatever else is in the batch."""
    algo = make_grpo(loss_type="dr_grpo", mask_truncated_completions=True, beta=0.1)
    [part] = minibatches(algo)
    B, width = part["completion_mask"].shape
    assert 1 < width < algo.task.max_new_tokens == 16 and B == 16
    assert (part["weights"] == part["completion_mask"] / (16 * 16)).all() and part["weights"].any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_settings_reach_the_loss(float64, loss_type, level):
    """Off the sampling policy, the class's loss is policy_loss with the configured clip, ratio and
    aggregation."""
    algo = make_grpo(loss_type=loss_type, importance_sampling_level=level, epsilon=0.1,
                     epsilon_high=0.4, num_iterations=2)
    minibatch = minibatches(algo)[0]
    move(algo.model)
    logprobs, mask = algo.logprobs(algo.model, minibatch)[0], minibatch["completion_mask"]
    losses, ratio, clipped = policy_loss(logprobs, minibatch["old_logprobs"],
                                         minibatch["advantages"], mask, 0.1, 0.4, loss_type, level)
    loss, _, line = loss_and_gradient(algo, minibatch)
    assert same(loss, (losses * minibatch["weights"]).sum())
    assert line["max_ratio"] == pytest.approx(ratio[mask].max().item()) != 1
    assert clipped.any()
    assert line["clip_ratio"] == pytest.approx((clipped.sum() / mask.sum()).item())


# -- the KL and the entropy -----------------------------------------------------------------------


def test_kl_at_the_reference_is_zero_and_has_no_gradient(float64):
    """k3 and its derivative vanish where policy and reference agree; elsewhere the logged KL is the
    token mean of k3, and beta scales it into the loss. The reference is never trained."""
    algo = make_grpo(beta=0.5)
    batch = sample(algo)
    [minibatch] = algo.minibatches({**batch}, Log())            # the reference differs
    reference, mask = algo.score(algo.ref_model, minibatch), minibatch["completion_mask"]
    logprobs = algo.logprobs(algo.model, minibatch)[0].detach()
    loss, grad, line = loss_and_gradient(algo, minibatch)
    kl = k3(logprobs, reference)[mask]
    assert line["kl"] == pytest.approx(kl.mean().item()) and kl.mean() > 0.01
    without = loss_and_gradient(make_grpo(beta=0.0), minibatch)   # the same model and samples
    assert same(loss, without[0] + 0.5 * kl.mean()) and not same(grad, without[1], 1e-3)
    assert all(p.grad is None and not p.requires_grad for p in algo.ref_model.parameters())

    algo.ref_model.load_state_dict(algo.model.state_dict())
    [minibatch] = algo.minibatches({**batch}, Log())
    loss, grad, line = loss_and_gradient(algo, minibatch)
    assert line["kl"] == 0 and same(loss, without[0]) and same(grad, without[1])


@pytest.mark.parametrize("level", LEVELS)
def test_the_bias_correction_reaches_the_loss(level):
    """--use_bias_correction_kl: off the sampling policy, beta times k3 times each token's own
    ratio, in the loss and in the log, also where the policy's ratio is that of the whole answer."""
    flags = dict(num_iterations=2, beta=0.3, importance_sampling_level=level)
    algo, without = make_grpo(use_bias_correction_kl=True, **flags), make_grpo(**flags)
    minibatch = minibatches(algo)[0]
    for one in (algo, without):
        move(one.model)
    logprobs, mask = algo.logprobs(algo.model, minibatch)[0].detach(), minibatch["completion_mask"]
    log_ratio = minibatch["ref_logprobs"] - logprobs
    kl = log_ratio.exp() - 1 - log_ratio
    corrected = (logprobs - minibatch["old_logprobs"]).exp() * kl
    (loss, _, line), (plain_loss, _, plain_line) = (loss_and_gradient(one, minibatch)
                                                    for one in (algo, without))
    difference = 0.3 * ((corrected - kl) * minibatch["weights"]).sum()
    assert same(loss - plain_loss, difference, 1e-5) and difference.abs() > 0.01
    assert line["kl"] == pytest.approx(corrected[mask].mean().item(), abs=1e-6)
    assert plain_line["kl"] == pytest.approx(kl[mask].mean().item(), abs=1e-6)


def test_on_policy_the_bias_correction_changes_the_gradient_alone():
    """Where every batch is used once the ratio is 1: the same loss, another gradient."""
    found = []
    for corrected in (False, True):
        algo = make_grpo(beta=0.3, use_bias_correction_kl=corrected)
        [minibatch] = minibatches(algo)
        found.append(loss_and_gradient(algo, minibatch))
    assert found[0][0] == found[1][0] and not same(found[0][1], found[1][1], 1e-3)


def test_entropy_is_logged_and_its_bonus_raises_it(float64):
    """The metric is -sum p log p over the vocabulary, token by token, at the sampling temperature.
    With no advantage, a step down the loss is a step up in entropy."""
    algo = make_grpo(lambda p, c, **_: [1.0] * len(p), entropy_coef=0.1, temperature=0.7)
    move(algo.model, 0.3)                                       # away from uniform
    [minibatch] = minibatches(algo)
    loss, grad, line = loss_and_gradient(algo, minibatch)
    logits = read(algo.model, minibatch)[minibatch["completion_mask"]] / 0.7
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert line["entropy"] == pytest.approx(entropy.item())
    assert same(loss, -0.1 * entropy)
    with torch.no_grad():
        for p in algo.model.parameters():
            p -= 0.1 * p.grad
    assert loss_and_gradient(algo, minibatch)[2]["entropy"] > line["entropy"] + 1e-5
