"""
PPO and the reward model: the identities behind them on the enumerable world of test_identities.py, the two classes on a
tiny model, and whole runs.

What PPO gets wrong in practice is bookkeeping: a score on padding, returns taken after whitening, a truncated answer
treated as finished, a first ratio that is only almost 1. So the classes are compared with a loop over single answers,
each read alone and without any padding.
"""

import contextlib
import copy
import json
import math
import os
import random
import re
import shlex
import signal

import pytest
import torch
from torch.nn.functional import pad

import data
import ppo
import rm
import train
from conftest import TASK, run
from model import GPT, GPTConfig, InputError
from ppo import PPO, PPOConfig
from rm import RM, RMConfig
from test_grpo import PROBLEMS, SEED, Letters, coin, move, same, tiny_model, training_args
from test_grpo import float64  # noqa: F401  (a fixture)
from test_identities import (GRAD_J, LOGITS, MASK, PI, PREFIXES, REWARD, SEQUENCES, STATE, close, expected, gradient,
                         sequence_logprobs, table, token_logprobs)
from test_train import checkpoint, metrics, same_numbers, summary, weights
from test_train import same as same_weights

REF = table(2).detach()
KL_COEF = 0.3
NOTHING = torch.zeros(15, dtype=torch.float64)             # what comes after each of the 15 sequences: they all ended


# -- the world of 15 sequences: KL in the reward ----------------------------------------------------------------------


def kl_rewards(kl_coef=KL_COEF):
    """The project's token rewards of the 15 sequences, (15, 3)."""
    return ppo.token_rewards(REWARD, token_logprobs(LOGITS).detach(), token_logprobs(REF), MASK, kl_coef)


def ppo_gradient(rewards, values, lam):
    """The exact expectation of the gradient of PPO's loss at pi = pi_old, with GAE's advantages."""
    advantages, _ = ppo.gae(rewards, values, MASK, NOTHING, 1.0, lam)
    lp = token_logprobs(LOGITS)
    losses, ratio = ppo.policy_loss(lp, lp.detach(), advantages)
    assert close(ratio, 1)
    return gradient(expected(losses, PI), LOGITS)


def objective_gradient(kl_coef=KL_COEF):
    """grad of E[r] - kl_coef KL(pi || ref), in closed form."""
    kl = (PI * (sequence_logprobs(LOGITS) - sequence_logprobs(REF))).sum()
    return gradient((PI * REWARD).sum() - kl_coef * kl, LOGITS)


def exact_values(kl_coef=KL_COEF):
    """V of the 7 prefixes, (7,), from the last back to the first: E over the next token of its reward and what
    follows."""
    logp, logq, V = LOGITS.detach().log_softmax(-1), REF.log_softmax(-1), torch.zeros(7, dtype=torch.float64)
    for state, prefix in reversed(list(enumerate(PREFIXES))):
        for token in range(3):
            y = prefix + (token,)
            later = REWARD[SEQUENCES.index(y)] if y in SEQUENCES else V[PREFIXES.index(y)]
            reward = -kl_coef * (logp - logq)[state, token]
            V[state] += logp[state, token].exp() * (reward + later)
    return V


def test_token_rewards_telescope():
    """Summed over an answer: score - kl_coef log pi(y)/pi_ref(y) (2203.02155, eq. 2). Nothing is on padding."""
    rewards = kl_rewards()
    log_ratio = (sequence_logprobs(LOGITS) - sequence_logprobs(REF)).detach()
    assert close(rewards.sum(1), REWARD - KL_COEF * log_ratio) and log_ratio.abs().min() > 0.01
    assert (rewards[~MASK] == 0).all()


def test_kl_in_the_reward_has_the_gradient_of_the_kl():
    """With reward-to-go (GAE, lam 1, V 0), E[grad] = grad(E[r] - kl_coef KL(pi || ref)), exactly; as a loss the sampled
    log-ratio would have had none (docstring of ppo.py)."""
    found = ppo_gradient(kl_rewards(), torch.zeros(15, 3), 1.0)
    assert close(found, -objective_gradient()) and not close(found, -GRAD_J, 0.01)
    assert close(ppo_gradient(kl_rewards(0.0), torch.zeros(15, 3), 1.0), -GRAD_J)
    assert close(gradient(expected(token_logprobs(LOGITS) - token_logprobs(REF), PI), LOGITS), 0)


def test_token_rewards_worked_example():
    """The docstring's: log-ratios [.5, -.5, 1], the third on padding, score 1 -> [-.05, 1.05, 0]; an empty answer has
    no last token to put a score on."""
    ref = torch.full((1, 3), -2.0, dtype=torch.float64)
    logprobs, mask = ref + torch.tensor([0.5, -0.5, 1.0]), torch.tensor([[True, True, False]])
    assert close(ppo.token_rewards(torch.tensor([1.0]), logprobs, ref, mask, 0.1), [[-0.05, 1.05, 0]])
    assert (ppo.token_rewards(torch.tensor([1.0]), logprobs, ref, mask & False, 0.1) == 0).all()


# -- generalised advantage estimation ---------------------------------------------------------------------------------

LENGTHS = (3, 5, 1, 4)                                     # of the rows below; the second and the fourth are cut off


def ragged():
    """Rewards, values (4, 5), mask and last_values of four rows of different length, padding full of other numbers."""
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    last_values = torch.tensor([0.0, 0.7, 0.0, -1.3], dtype=torch.float64)
    return rewards, values, torch.arange(5) < torch.tensor(LENGTHS)[:, None], last_values


@pytest.mark.parametrize("gamma, lam", [(1, 1), (1, 0.95), (1, 0), (0.9, 0.8), (0.5, 1), (0.9, 0), (0, 0.5)])
def test_gae_is_the_recursion(gamma, lam):
    """A_t = delta_t + gamma lam A_t+1, from the last token back (1506.02438, eq. 16); returns are A + V; 0 on
    padding."""
    rewards, values, mask, last_values = ragged()
    advantages, returns = ppo.gae(rewards, values, mask, last_values, gamma, lam)
    for row, n in enumerate(LENGTHS):
        later, after = 0.0, last_values[row]
        for t in reversed(range(n)):
            later = rewards[row, t] + gamma * after - values[row, t] + gamma * lam * later
            after = values[row, t]
            assert close(advantages[row, t], later) and close(returns[row, t], later + values[row, t])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_at_both_ends(gamma):
    """lam 1: the discounted return, with what follows a cut, less V; lam 0: the TD error (1506.02438, eq. 17-18)."""
    rewards, values, mask, last_values = ragged()
    outcome, returns = ppo.gae(rewards, values, mask, last_values, gamma, 1.0)
    critic, _ = ppo.gae(rewards, values, mask, last_values, gamma, 0.0)
    for row, n in enumerate(LENGTHS):
        V = [*values[row, :n], last_values[row]]
        for t in range(n):
            total = sum(gamma ** (s - t) * rewards[row, s] for s in range(t, n)) + gamma ** (n - t) * V[n]
            assert close(returns[row, t], total) and close(outcome[row, t], total - V[t])
            assert close(critic[row, t], rewards[row, t] + gamma * V[t + 1] - V[t])


def test_gae_worked_examples():
    """The docstring's, rewards [0, 1], V [.4, .7]; cut off instead, with V .9 to follow and no reward; and at gamma
    lam 1/2 the deltas [.3, .3] give [.45, .3]."""
    def found(rewards, last, lam=1.0):
        values, mask = torch.tensor([[0.4, 0.7]]), torch.ones(1, 2).bool()
        return ppo.gae(torch.tensor([rewards]), values, mask, torch.tensor([last]), 1.0, lam)
    for (advantages, returns), by_hand in ((found([0.0, 1.0], 0.0), ([0.6, 0.3], [1, 1])),
                                           (found([0.0, 0.0], 0.9), ([0.5, 0.2], [0.9, 0.9])),
                                           (found([0.0, 1.0], 0.0, 0.5), ([0.45, 0.3], [0.85, 1]))):
        assert close(advantages, [by_hand[0]], 1e-6) and close(returns, [by_hand[1]], 1e-6)


def test_padding_never_matters_to_credit():
    """Whatever stands on padding, and however much of it there is, rewards, advantages, returns and whitened advantages
    of the real tokens stay bit for bit the same (padding has leaked into each of them in published code)."""
    rewards, values, mask, last_values = ragged()
    scores = torch.arange(4).double()

    def credit(junk, width):
        wide_mask = pad(mask, (0, width))
        wider = [pad(x, (0, width)).masked_fill(~wide_mask, junk) for x in (rewards, values, -rewards)]
        with_score = ppo.token_rewards(scores, wider[0], wider[2], wide_mask, 0.1)
        advantages, returns = ppo.gae(wider[0], wider[1], wide_mask, last_values, 0.9, 0.8)
        found = (with_score, advantages, returns, ppo.whiten(wider[2], wide_mask))
        assert all((x[~wide_mask] == 0).all() for x in found)
        return torch.stack([x[wide_mask] for x in found])
    plain = credit(0.0, 0)
    for junk in (1e30, -1e30):
        assert torch.equal(credit(junk, 0), plain)
        assert close(credit(junk, 3), plain, 1e-12)        # another width may add up in another order


@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_with_the_exact_critic_the_gradient_is_unbiased_for_every_lam(lam, kl_coef):
    """Whatever lam, where V is exact, E[grad] is the gradient of the objective (1506.02438, section 3): the critic's
    error is the only bias."""
    values = exact_values(kl_coef)[STATE]
    assert close(ppo_gradient(kl_rewards(kl_coef), values, lam), -objective_gradient(kl_coef))


def test_with_a_wrong_critic_only_lam_1_is_unbiased():
    """At lam 1 any V is a mere baseline; below, its errors enter the gradient, the more the smaller lam."""
    wrong = exact_values() + torch.randn(7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    errors = [(ppo_gradient(kl_rewards(), wrong[STATE], lam) + objective_gradient()).norm()
              for lam in (1, 0.95, 0.5, 0)]
    assert errors[0] < 1e-9 and errors[1] > 0.005 and errors[2] > 0.05
    assert errors == sorted(errors)


def test_the_exact_critic_expects_no_advantage():
    """E[A_t | s_t] = 0 in each of the 7 states, for every lam: what is learnt from is surprise alone; and the value
    loss's gradient vanishes in expectation at the exact V."""
    V = exact_values().requires_grad_()
    for lam in (0.0, 0.5, 1.0):
        advantages, returns = ppo.gae(kl_rewards(), V.detach()[STATE], MASK, NOTHING, 1.0, lam)
        weighed = (advantages * PI.detach()[:, None])[MASK]
        assert close(torch.zeros(7, dtype=torch.float64).index_add(0, STATE[MASK], weighed), 0)
        assert weighed.abs().max() > 1e-3
        losses = ppo.value_loss(V[STATE], V.detach()[STATE], returns)
        assert close(gradient(expected(losses, PI), V), 0)


# -- whitening, clips -------------------------------------------------------------------------------------------------


def test_whiten():
    """Mean 0 and variance 1 over the real tokens alone; neither a shift nor a scale of x changes the result."""
    _, x, mask, _ = ragged()
    white = ppo.whiten(1000 * x, mask)                     # 1000: beside such a variance the 1e-8 is nothing
    assert close(white[mask].mean(), 0) and close(white[mask].var(correction=0), 1)
    assert (white[~mask] == 0).all() and close(ppo.whiten(3000 * x + 7, mask), white)
    assert close(white[mask], (x[mask] - x[mask].mean()) / x[mask].std(correction=0))
    assert (ppo.whiten(torch.ones(2, 2), torch.ones(2, 2).bool()) == 0).all()               # and not 0/0


@pytest.mark.parametrize("ratio, advantage, loss, dead", [
    (1.5, +1, -1.2, True),     # a good token, already likelier: enough has been done
    (1.1, +2, -2.2, False),
    (0.5, +1, -0.5, False),    # a good token grown unlikely: full gradient back
    (0.5, -1, +0.8, True),     # a bad token, already unlikelier: enough
    (0.9, -2, +1.8, False),
    (1.5, -1, +1.5, False),    # a bad token grown likelier: the clip never shields a mistake
])
def test_policy_clip_worked_values_and_dead_zones(ratio, advantage, loss, dead):
    """max(-A r, -A clip(r, .8, 1.2)): gradient 0 in two corners, -A r elsewhere (1707.06347, eq. 7)."""
    logprobs = torch.tensor([[math.log(ratio) - 1.5]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.full((1, 1), -1.5, dtype=torch.float64), torch.tensor([[float(advantage)]])
    losses, found = ppo.policy_loss(logprobs, old, advantages, 0.2)
    assert close(losses, [[loss]]) and close(found, [[ratio]])
    assert close(gradient(losses.sum(), logprobs), [[0 if dead else -advantage * ratio]])


def test_the_policy_clip_is_pessimistic():
    """The clipped loss is never below the unclipped one, and equals it inside the band (1707.06347, section 3)."""
    advantages = kl_rewards()
    losses, ratio = ppo.policy_loss(token_logprobs(LOGITS), token_logprobs(table(1)), advantages, 0.2)
    inside = (ratio > 0.8) & (ratio < 1.2)
    assert (losses >= -ratio * advantages).all() and (losses > -ratio * advantages).any()
    assert inside.any() and close(losses[inside], (-ratio * advantages)[inside])


@pytest.mark.parametrize("value, band, loss, slope", [
    (0.1, 0.2, 0.405, -0.9),   # old value 0, return 1, from here on: inside the band, half the squared error
    (0.5, 0.2, 0.32, 0),       # it has moved far enough for one batch
    (1.2, 0.2, 0.32, 0),       # though past the return, less wrong than .2 would be: no gradient either
    (3.0, 0.2, 2.0, 2.0),      # past it, and more wrong than .2: back
    (-0.5, 0.2, 1.125, -1.5),  # moved the wrong way: the whole gradient back
    (0.5, 0.0, 0.125, -0.5),   # no band
])
def test_value_clip_worked_values_and_dead_zones(value, band, loss, slope):
    """max of the two squared errors, halved: like the policy's clip, it takes away a gradient and never a mistake."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    losses = ppo.value_loss(values, torch.zeros(1, 1), torch.ones(1, 1), band)
    assert close(losses, [[loss]], 1e-7) and close(gradient(losses.sum(), values), [[slope]], 1e-7)


def test_gradients_by_finite_differences():
    """Autograd equals (f(x + h) - f(x - h)) / 2h for both losses and rm.py's, inside the clips and beyond them."""
    old = token_logprobs(table(3)).detach()
    moved = (old + torch.tensor([-0.1, 0.4, -0.5])).requires_grad_()                 # inside, above, below [.8, 1.2]
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, old, kl_rewards(), 0.2)[0], moved)
    assert torch.autograd.gradcheck(lambda x: ppo.value_loss(x, old, kl_rewards(), 0.2), moved)
    r = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: rm.reward_loss(r[:2], r[2:], 0.1), r)


def test_token_weights():
    """Answers of 1, 3 and 0 tokens: a quarter each, nothing on padding; an empty batch is not 0/0."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    assert ppo.token_weights(mask).tolist() == [[0.25, 0, 0], [0.25] * 3, [0] * 3]
    assert (ppo.token_weights(mask & False) == 0).all()
    assert ppo.token_weights(mask[:1]).tolist() == [[1, 0, 0]]


# -- collecting -------------------------------------------------------------------------------------------------------


def letters(prompts, completions, **columns):
    """A reward that can be seen from an answer: how many letters it has, and a half."""
    return [len(c) + 0.5 for c in completions]


def make_ppo(reward_function=letters, wise=True, **flags):
    """PPO with 4 answers per prompt and the given reward. wise: a critic that says something; it starts at 0."""
    config = PPOConfig(**{"num_generations": 4, **flags})
    algo = PPO(config, tiny_model(), tiny_model(seed=1), Letters(), data.Chain(2, 3))
    if reward_function is not None:
        algo.rewards.functions = {"letters": reward_function}
    if wise:
        move(algo.critic, seed=7)
    return algo


def collect(algo, problems=PROBLEMS):
    return algo.collect(problems, torch.Generator().manual_seed(SEED))


def rows(batch):
    """(prompt ids, completion ids, truncated) of every row, without padding."""
    for b, i in enumerate(batch["prompt_index"].tolist()):
        ids = batch["completion_ids"][b].tolist()
        ended = Letters.eos_id in ids
        yield (batch["prompt_ids"][i][batch["prompt_mask"][i]].tolist(),
               ids[:ids.index(Letters.eos_id) + 1] if ended else ids, not ended)


def read_alone(model, prompt, completion):
    """What the model says of one answer, read by itself and unpadded: before each token and after the last, (n + 1,
    V)."""
    return model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:].detach()


def score_of(completion):
    return letters(None, [Letters().decode(completion)])[0]


def test_the_score_sits_on_the_last_real_token(float64):
    """No KL, no critic, gamma 1/2: token t of an answer of n is worth score / 2^(n - 1 - t), and padding nothing. (On
    padding it would arrive late or not at all: TRL issues 1893, 3750.)"""
    algo = make_ppo(wise=False, kl_coef=0.0, gamma=0.5, lam=1.0, whiten_advantages=False)
    batch, _ = collect(algo)
    lengths = set()
    for b, (_, completion, _) in enumerate(rows(batch)):
        n, score = len(completion), score_of(completion)
        by_hand = [score / 2 ** (n - 1 - t) for t in range(n)]
        assert same(batch["returns"][b, :n], by_hand) and same(batch["advantages"][b, :n], by_hand)
        assert (batch["returns"][b, n:] == 0).all() and (batch["advantages"][b, n:] == 0).all()
        assert batch["completion_mask"][b].tolist() == [t < n for t in range(batch["completion_ids"].shape[1])]
        lengths.add(n)
    assert len(batch["returns"]) == 16 and len(lengths) > 3


@pytest.mark.parametrize("flags", [
    dict(), dict(missing_eos_penalty=0.7), dict(truncation="bootstrap"), dict(truncation="mask"),
    dict(truncation="bootstrap", lam=0.0, gamma=0.8), dict(temperature=0.7, missing_eos_penalty=0.7)], ids=str)
@pytest.mark.parametrize("micro_batch_size", [0, 3])
def test_credit_is_that_of_each_answer_read_alone(float64, flags, micro_batch_size):
    """Values, log-probabilities, rewards, advantages and returns, one answer at a time and token by token: a cut-off
    answer is scored less a penalty (terminal), or goes on at the critic's V (bootstrap), or is left out (mask)."""
    algo = make_ppo(**{"kl_coef": 0.1, "num_mini_batches": 3, "whiten_advantages": False, **flags})
    algo.micro_batch_size, config, cut, kls = micro_batch_size, algo.config, 0, 0.0
    batch, metrics = collect(algo)
    for b, (prompt, completion, truncated) in enumerate(rows(batch)):
        cut += truncated
        if truncated and config.truncation == "mask":
            assert not batch["completion_mask"][b].any()
            continue
        n, V = len(completion), read_alone(algo.critic, prompt, completion)[:, 0]
        logp, logq = ((read_alone(m, prompt, completion) / config.temperature).log_softmax(-1)[range(n), completion]
                      for m in (algo.model, algo.ref_model))
        rewards = -0.1 * (logp - logq)
        kls += float((logp - logq).sum())
        if not (truncated and config.truncation == "bootstrap"):
            rewards[-1] += score_of(completion) - config.missing_eos_penalty * truncated
        later, after, advantages = 0.0, V[n] if config.truncation == "bootstrap" and truncated else 0.0, [0.0] * n
        for t in reversed(range(n)):
            later = rewards[t] + config.gamma * after - V[t] + config.gamma * config.lam * later
            after, advantages[t] = V[t], float(later)
        assert batch["completion_mask"][b].sum() == n and V.abs().mean() > 0.01
        for name, value in (("old_values", V[:n]), ("old_logprobs", logp), ("advantages", advantages),
                            ("returns", torch.tensor(advantages) + V[:n])):
            assert same(batch[name][b, :n], value), name
    assert 3 < cut < 13                                                                   # of 16: both kinds are there
    assert float(metrics["objective/kl"][0]) == pytest.approx(kls) and abs(kls) > 0.1


def test_masked_answers_have_no_part_in_the_update(float64):
    """mask: loss and gradient are those of the finished answers alone, whose advantages alone are whitened."""
    algo = make_ppo(truncation="mask")
    batch, _ = collect(algo)
    kept = batch["completion_mask"].any(-1).nonzero().squeeze(-1)
    mask = batch["completion_mask"]
    white = batch["advantages"][mask]
    assert 3 < len(kept) < 13 and same(white.mean(), 0.0) and same(white.var(correction=0), 1.0, 1e-6)
    without = data.take_rows(batch, kept)
    move(algo.model)
    move(algo.critic)
    a, b = (loss_and_gradients(algo, next(algo.minibatches(part))) for part in (batch, without))
    assert same_results(a, b)
    [nothing] = [next(algo.minibatches({**batch, "completion_mask": mask & False}))]
    loss, gradients, _ = loss_and_gradients(algo, nothing)
    assert loss == 0 and all((g == 0).all() for g in gradients.values())


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
def test_whitening_comes_last_and_covers_the_whole_batch(float64, truncation):
    """Returns are those without whitening (after it they would lose their meaning); advantages have mean 0 and
    variance 1 over the batch's tokens, before it is split, so that the parts keep what sets them apart."""
    flags = dict(truncation=truncation, num_mini_batches=2)
    batch, _ = collect(make_ppo(**flags))
    plain, _ = collect(make_ppo(**flags, whiten_advantages=False))
    mask = batch["completion_mask"]
    assert torch.equal(batch["returns"], plain["returns"]) and torch.equal(batch["old_values"], plain["old_values"])
    assert same((plain["advantages"] + plain["old_values"])[mask], batch["returns"][mask])
    white = batch["advantages"][mask]
    assert same(batch["advantages"], ppo.whiten(plain["advantages"], mask))
    assert plain["advantages"][mask].mean().abs() > 0.01
    assert same(white.mean(), 0.0) and same(white.var(correction=0), 1.0, 1e-6)
    algo = make_ppo(**flags, num_ppo_epochs=1)
    means = [part["advantages"][part["completion_mask"]].mean() for part in algo.minibatches(batch)]
    assert len(means) == 2 and all(abs(mean) > 1e-3 for mean in means)


def test_the_order_of_the_batch_is_random_and_its_parts_are_parts():
    """Rows are shuffled, so that a part is a random part; together the parts of a pass are the batch, each row once,
    with weights that add up to 1 in every part, each being an update of its own."""
    algo = make_ppo(num_mini_batches=3, num_ppo_epochs=1)
    batch, _ = collect(algo)
    assert batch["prompt_index"].tolist() != sorted(batch["prompt_index"].tolist())
    assert torch.bincount(batch["prompt_index"]).tolist() == [4] * 4
    parts = list(algo.minibatches(batch))
    assert [len(part["completion_ids"]) for part in parts] == [6, 5, 5]
    assert [row for part in parts for row in rows(part)] == [row for row in rows(batch)]
    for part in parts:
        assert float(part["weights"].sum()) == pytest.approx(1)
        assert (part["weights"][~part["completion_mask"]] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_scores_what_sampling_drew(temperature):
    """pi_old is the sampler's own log-probability, temperature included, and row for row after the shuffle."""
    algo, generator = make_ppo(temperature=temperature), torch.Generator().manual_seed(SEED)
    prompts = data.collate([{"prompt": p["prompt"]} for p in PROBLEMS], algo.tokenizer)
    samples = algo.model.generate(prompts["prompt_ids"], prompts["prompt_mask"], algo.task.max_new_tokens, 16, 17, 4,
                                  temperature, generator=generator)
    order = torch.randperm(16, generator=generator)        # the draws that collect makes, in its order
    batch, _ = collect(algo)
    assert torch.equal(batch["completion_ids"], samples.completion_ids[order])
    assert same((batch["old_logprobs"] * batch["completion_mask"]), samples.logprobs[order], 1e-4)


# -- several updates on one batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [0, 3])
@pytest.mark.parametrize("num_mini_batches", [1, 2, 3])
@pytest.mark.parametrize("truncation", ["terminal", "bootstrap", "mask"])
def test_every_first_ratio_of_ppo_is_exactly_one(truncation, num_mini_batches, micro_batch_size):
    """Before anything moves, the forward passes of training repeat those that scored pi_old and V, bit for bit, in
    every part of the batch; after an update they do not."""
    algo = make_ppo(truncation=truncation, num_mini_batches=num_mini_batches, target_kl=0.0)
    algo.micro_batch_size = micro_batch_size
    batch, _ = collect(algo)
    parts = list(algo.minibatches(batch))[:num_mini_batches]
    for part in parts:
        for micro in data.split(part, micro_batch_size):
            mask = micro["completion_mask"]
            assert torch.equal(algo.logprobs(algo.model, micro)[0][mask], micro["old_logprobs"][mask])
            assert torch.equal(algo.values(micro)[:, :-1][mask], micro["old_values"][mask])
    optimizer, passes = algo.model.configure_optimizer(1e-2, 0.0, others=[algo.critic]), []
    for part in algo.minibatches(batch):
        totals = {}
        train.update(training_args(micro_batch_size=micro_batch_size), algo, optimizer, part, totals)
        passes.append(totals["max_ratio"])
    assert passes[0] == 1.0 and all(ratio > 1 for ratio in passes[1:])
    assert len(passes) == 2 * num_mini_batches


@pytest.mark.filterwarnings("ignore:Mismatch dtype")                   # PyTorch's, about RMSNorm being slower so
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_scores_in_the_precision_that_it_trains_in(tmp_path, dtype):
    """The same through the loop, whose autocast both must be in: at a learning rate too small to move a weight, the
    largest ratio of two passes is 1."""
    flags = dict(algo="ppo", dtype=dtype, device="cpu", num_generations=4, batch_size=4, max_steps=1, eval_problems=4,
                 num_mini_batches=2, learning_rate=1e-30, reward="brevity", out_dir=tmp_path)
    args, config, _ = train.parse_args([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
    model, task = tiny_model(), data.Chain(2, 3)
    train.train(args, PPO(config, model, copy.deepcopy(model), Letters(), task), task, "")
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["max_ratio"] == 1.0 and line["grad_norm"] > 0
    assert line["policy/approxkl"] == 0                         # read in the precision of pi_old


def passes_made(learning_rate=3e-3, micro_batch_size=0, **flags):
    """Train on one batch. -> the number of updates, {updates made before: what was measured then},
    {updates made before: what an independent reading says} at every start of a pass and at the end,
    and what went to the log."""
    algo = make_ppo(**flags)
    algo.micro_batch_size = micro_batch_size
    batch, metrics = collect(algo)
    measured, read, updates, moved = {}, {}, 0, algo.moved

    def recorded(parts):
        measured[updates] = moved(parts)
        return measured[updates]
    algo.moved = recorded
    optimizer = algo.model.configure_optimizer(learning_rate, 0.0, others=[algo.critic])
    for part in algo.minibatches(batch):
        if updates % algo.config.num_mini_batches == 0:
            read[updates] = distance(algo, batch)
        train.update(training_args(micro_batch_size=micro_batch_size), algo, optimizer, part, {})
        updates += 1
    return updates, measured, read, metrics.get("policy/approxkl")


def distance(algo, batch):
    """1/2 (log pi/pi_old)^2, averaged over all tokens of the batch, each answer read alone."""
    squares = []
    for b, (prompt, completion, _) in enumerate(rows(batch)):
        if batch["completion_mask"][b].any():
            T = len(completion)
            logits = read_alone(algo.model, prompt, completion)[:T] / algo.config.temperature
            logprobs = logits.log_softmax(-1)[range(T), completion]
            squares += ((logprobs - batch["old_logprobs"][b, :T]) ** 2 / 2).tolist()
    return sum(squares) / len(squares)


@pytest.mark.parametrize("flags", [dict(), dict(num_mini_batches=3, micro_batch_size=3),
                                   dict(truncation="mask"), dict(temperature=0.7)], ids=str)
def test_what_has_moved_is_measured_before_every_pass_after_the_first(float64, flags):
    """The figure is half the mean squared log-ratio over all completion tokens of the batch (the k2
    estimate of joschu.net/blog/kl-approx.html), as reading every answer alone finds it; the log has
    the last one."""
    updates, measured, read, logged = passes_made(target_kl=1e9, num_ppo_epochs=4, **flags)
    parts = flags.get("num_mini_batches", 1)
    assert updates == 4 * parts and list(measured) == [parts, 2 * parts, 3 * parts]
    assert read[0] < 1e-12                                      # before the first pass: pi_old
    for step, (total, tokens) in measured.items():
        assert total / tokens == pytest.approx(read[step], rel=1e-6) and read[step] > 1e-6, step
    assert len({total for total, _ in measured.values()}) == 3 and logged == measured[3 * parts]


def test_target_kl_ends_the_passes():
    """At the default of two passes, a tiny target_kl leaves one and 0 both; of four passes none is
    made that would start beyond target_kl, and one that has begun is finished. (Measured during a
    pass, the first figure is 0 by construction and every stop comes a pass late.)"""
    assert passes_made(target_kl=1e-9)[0] == 1 and passes_made(target_kl=0.0)[0] == 2
    _, measured, _, _ = passes_made(target_kl=1e9, num_ppo_epochs=4)
    moved = [total / tokens for total, tokens in measured.values()]
    assert sorted(moved) == moved                               # further with every pass
    for made, figure in enumerate(moved, start=1):
        assert passes_made(target_kl=0.99 * figure, num_ppo_epochs=4)[0] == made
        assert passes_made(target_kl=1.01 * figure, num_ppo_epochs=4)[0] == made + 1
    flags = dict(target_kl=1e-9, num_ppo_epochs=4)
    assert passes_made(num_mini_batches=2, **flags)[0] == 2     # both halves of the first pass
    assert passes_made(learning_rate=0.0, **flags)[0] == 4      # nothing moved, nothing stops


def test_without_target_kl_nothing_is_measured():
    """target_kl 0, or a single pass: no further reading, and no figure in the log or the legend."""
    for flags in (dict(target_kl=0.0), dict(num_ppo_epochs=1)):
        _, measured, _, logged = passes_made(**flags)
        assert measured == {} and logged is None and "moved" not in make_ppo(**flags).legend
    assert "moved" in make_ppo().legend


def test_measuring_changes_nothing_but_the_log(tmp_path):
    """A target_kl that is never reached and none at all train the same weights, bit for bit: the
    reading draws no random numbers. One that is always reached leaves one update a batch, and the
    log says at which figure it stopped."""
    ends, lines = {}, {}
    for target_kl in (0, 1e9, 1e-9):
        folder = tmp_path / str(target_kl)
        flags = dict(algo="ppo", device="cpu", num_generations=4, batch_size=4, max_steps=2,
                     eval_problems=4, reward="brevity", logging_steps=1, target_kl=target_kl,
                     out_dir=folder)
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        args, config, _ = train.parse_args(words)
        model, task = tiny_model(), data.Chain(2, 3)
        algo = PPO(config, model, copy.deepcopy(model), Letters(), task)
        train.train(args, algo, task, "")
        ends[target_kl], lines[target_kl] = model.state_dict(), metrics(folder)[1:]
    never, always = lines[1e9], lines[1e-9]
    assert same_weights(ends[0], ends[1e9]) and not same_weights(ends[0], ends[1e-9])
    assert [line["updates"] for line in never] == [2, 4]
    assert [line["updates"] for line in always] == [1, 2]
    assert all("policy/approxkl" not in line for line in lines[0])
    assert all(line["policy/approxkl"] > 1e-9 for line in never + always)
    assert never[0]["policy/approxkl"] == always[0]["policy/approxkl"]   # after the same one update


# -- the loss ---------------------------------------------------------------------------------------------------------


def loss_and_gradients(algo, batch, micro_batch_size=0):
    """Summed over micro-batches as train.update does: the loss, {network: one long gradient}, the metrics."""
    for network in algo.networks.values():
        network.zero_grad(set_to_none=False)
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
    total, totals = 0.0, {}
    for micro in data.split(batch, micro_batch_size, algo.rows_together):
        loss, micro_metrics = algo.loss(micro)
        loss.backward()
        total = total + loss.detach()
        train.add(totals, micro_metrics)
    gradients = {name: torch.cat([p.grad.flatten() for p in n.parameters()]) for name, n in algo.networks.items()}
    return total, gradients, totals


def same_results(a, b):
    return same(a[0], b[0]) and a[1].keys() == b[1].keys() and all(same(a[1][name], b[1][name]) for name in a[1]) \
        and a[2].keys() == b[2].keys() and all(a[2][name] == pytest.approx(b[2][name], abs=1e-9) for name in a[2])


def widened(batch, left=3, right=2):
    """The batch with more padding, left of the prompts and right of the completions, full of misleading values."""
    values = {"prompt_ids": 5, "prompt_mask": False, "completion_ids": 5, "completion_mask": False, "weights": 0,
              "old_logprobs": -50, "old_values": 1e6, "advantages": 1e6, "returns": -1e6}
    return {**batch, **{name: pad(batch[name], (left, 0) if name.startswith("prompt") else (0, right), value=value)
                        for name, value in values.items() if name in batch and batch[name].dim() == 2}}


def off_policy(**flags):
    """A minibatch whose ratios are not 1 and whose values have moved, some of both beyond their clips."""
    algo = make_ppo(**flags)
    minibatch = next(algo.minibatches(collect(algo)[0]))
    move(algo.model)
    move(algo.critic)
    return algo, minibatch


@pytest.mark.parametrize("truncation", ["terminal", "mask"])
def test_ppo_is_invariant_to_micro_batches_padding_and_order(float64, truncation):
    """Loss, gradients of policy and critic, and metrics are those of the batch, however it is cut, padded or
    ordered."""
    algo, minibatch = off_policy(truncation=truncation)
    whole = loss_and_gradients(algo, minibatch)
    assert all(g.abs().max() > 1e-3 for g in whole[1].values())
    assert 0 < whole[2]["clip_ratio"][0] < whole[2]["clip_ratio"][1]
    for size in (1, 2, 3, 5):
        assert same_results(loss_and_gradients(algo, minibatch, size), whole), f"micro-batches of {size}"
    assert same_results(loss_and_gradients(algo, widened(minibatch)), whole), "wider padding"
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert same_results(loss_and_gradients(algo, data.take_rows(minibatch, order)), whole), "another order"


def test_ppo_settings_reach_the_loss(float64):
    """Off the sampling policy, the loss is policy_loss + vf_coef value_loss with the configured clips, a mean over
    tokens, at the sampling temperature; the metrics are what their names say."""
    algo, minibatch = off_policy(cliprange=0.1, cliprange_value=0.05, vf_coef=0.7, temperature=0.7)
    loss, _, found = loss_and_gradients(algo, minibatch)
    n, by_hand, ratios, moved = int(minibatch["completion_mask"].sum()), {}, [], []
    for b, (prompt, completion, _) in enumerate(rows(minibatch)):
        T = len(completion)
        logp = (read_alone(algo.model, prompt, completion)[:T] / 0.7).log_softmax(-1)
        V, old = read_alone(algo.critic, prompt, completion)[:T, 0], minibatch["old_logprobs"][b, :T]
        losses, ratio = ppo.policy_loss(logp[range(T), completion], old, minibatch["advantages"][b, :T], 0.1)
        value_losses = ppo.value_loss(V, minibatch["old_values"][b, :T], minibatch["returns"][b, :T], 0.05)
        row = {"loss/policy": losses, "loss/value": value_losses, "values": V,
               "clip_ratio": ((ratio - 1) * minibatch["advantages"][b, :T].sign() > 0.1).double(), "entropy": -(logp.exp() * logp).sum(-1)}
        by_hand = {name: by_hand.get(name, 0) + float(value.sum()) for name, value in row.items()}
        ratios.append(float(ratio.max()))
        moved.append(float((V - minibatch["old_values"][b, :T]).abs().min()))
    assert found.pop("max_ratio") == pytest.approx(max(ratios))
    assert min(moved) < 0.05 < max(moved)                                                 # some values are clipped
    assert {name: value[0] for name, value in found.items()} == pytest.approx(by_hand)
    assert all(value[1] == n for value in found.values())
    assert same(loss, (by_hand["loss/policy"] + 0.7 * by_hand["loss/value"]) / n)


@pytest.mark.parametrize("name", ["model", "critic"])
def test_the_ppo_gradient_by_finite_differences(float64, name):
    """The derivative of the whole loss along random directions, through the network, in policy and in critic."""
    algo, minibatch = off_policy()
    network, (_, gradients, _) = algo.networks[name], loss_and_gradients(algo, minibatch)
    start, h, generator = torch.nn.utils.parameters_to_vector(network.parameters()).detach(), 1e-6, torch.Generator()
    for seed in range(3):
        direction = torch.randn(len(start), generator=generator.manual_seed(seed))
        ends = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(start + sign * h * direction, network.parameters())
            ends.append(algo.loss(minibatch)[0].item())
        slope = float(gradients[name] @ direction)
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, abs=1e-7) and abs(slope) > 1e-4


def test_policy_and_critic_do_not_touch(float64):
    """Two networks: the policy's gradient is the same whatever the value loss, the critic's whatever the advantages;
    with a weight of 0 or advantages of 0 there is none at all."""
    def gradients(vf_coef=0.5, **changed):
        algo, minibatch = off_policy(vf_coef=vf_coef)
        return loss_and_gradients(algo, {**minibatch, **changed})[1]
    advantages = off_policy()[1]["advantages"]
    both, no_values, no_advantages = gradients(), gradients(vf_coef=0.0), gradients(advantages=0 * advantages)
    assert torch.equal(both["model"], no_values["model"]) and (no_values["critic"] == 0).all()
    assert torch.equal(both["critic"], no_advantages["critic"]) and (no_advantages["model"] == 0).all()
    assert both["model"].abs().max() > 1e-3 and both["critic"].abs().max() > 1e-3


def test_one_update_moves_policy_and_critic_and_not_the_reference():
    """train.update drives both networks with one optimizer; what is frozen stays."""
    algo = make_ppo()
    networks = {**algo.networks, **algo.frozen}
    before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    part = next(algo.minibatches(collect(algo)[0]))
    train.update(training_args(), algo, algo.model.configure_optimizer(1e-2, 0.0, others=[algo.critic]), part, {})
    moved = {name: not same_weights(before[name], network.state_dict()) for name, network in networks.items()}
    assert moved == {"model": True, "critic": True, "ref_model": False}


# -- scalar heads -----------------------------------------------------------------------------------------------------


def some_batch():
    """Answers to PROBLEMS as collate makes them: 4 prompts, an answer each, of different length."""
    answers = ("2", "1-2=9;9*3=7", "9*9=1", "")
    return data.collate([{"prompt": p["prompt"], "completion": c} for p, c in zip(PROBLEMS, answers)], Letters())


def read(model, batch, **flags):
    return model.completion_logits(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"],
                                   batch["completion_mask"], batch["prompt_index"], **flags)


def values_of(model, batch):
    return read(model, batch, read_last=True).squeeze(-1).detach()


@pytest.mark.parametrize("tied", [True, False])
def test_with_scalar_head(tied):
    """The trunk is copied, bit for bit and for good; the head says 0 everywhere; the original is left as it was."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=18, block_size=32, n_layer=2, n_head=2, n_embd=16, tie_embeddings=tied))
    model.skip_padding = False
    before = copy.deepcopy(model.state_dict())
    critic = model.requires_grad_(False).with_scalar_head()                               # of a frozen one, too
    assert {name for name, tensor in critic.state_dict().items()
            if name == "lm_head.weight" or not torch.equal(tensor, before[name])} == {"lm_head.weight"}
    assert critic.config == GPTConfig(**{**vars(model.config), "scalar_head": True}) and not critic.skip_padding
    batch = some_batch()
    assert read(critic, batch).shape == (4, 12, 1) and (values_of(critic, batch) == 0).all()
    move(critic)
    assert same_weights(before, model.state_dict()) and all(p.requires_grad for p in critic.parameters())
    again = critic.with_scalar_head()                                                     # of a reward model: all of it
    assert torch.equal(values_of(again, batch), values_of(critic, batch)) and values_of(critic, batch).abs().min() > 0
    move(again)
    assert not torch.equal(values_of(again, batch), values_of(critic, batch))


def test_the_critic_starts_from_the_base_or_from_the_reward_model():
    """Without a reward model V is 0 at first, from the base's trunk; with one, V after the last token is its reward.
    The critic is trained, and the reward model, which goes on judging, is not."""
    assert (values_of(make_ppo(wise=False).critic, some_batch()) == 0).all()
    task = data.Chain(2, 3)
    task.reward_model = tiny_model(seed=3).with_scalar_head()
    move(task.reward_model)
    task.reward_model.requires_grad_(False)                                               # as train.run hands it over
    algo = PPO(PPOConfig(num_generations=4), tiny_model(), tiny_model(seed=1), Letters(), task)
    algo.rewards.functions = {"letters": letters}
    batch, before = some_batch(), copy.deepcopy(task.reward_model.state_dict())
    V, lengths = values_of(algo.critic, batch), batch["completion_mask"].sum(-1)
    V = V[range(4), lengths]
    assert same(V, rm.answer_rewards(task.reward_model, batch), 1e-5) and V.abs().min() > 0.01
    part = next(algo.minibatches(collect(algo)[0]))
    train.update(training_args(), algo, algo.model.configure_optimizer(1e-2, 0.0, others=[algo.critic]), part, {})
    assert same_weights(before, task.reward_model.state_dict())
    assert not same_weights(before, algo.critic.state_dict())


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("layout", ["a prompt each", "shared prompts", "a prompt each, out of order"])
def test_read_last(float64, layout, scalar):
    """One column more, seen after the last completion token; the others stay; each is the plain forward pass of prompt
    and answer, unpadded, whether prompts are shared or not."""
    model, batch = tiny_model(), some_batch()
    if scalar:
        model = model.with_scalar_head()
    move(model, 0.3)
    if layout != "a prompt each":
        batch["prompt_index"] = torch.tensor([2, 0, 3, 1] if "order" in layout else [1, 0, 0, 1])
    if layout == "shared prompts":
        batch["prompt_ids"], batch["prompt_mask"] = batch["prompt_ids"][:2], batch["prompt_mask"][:2]
    longer, T = read(model, batch, read_last=True), batch["completion_ids"].shape[1]
    assert longer.shape[1] == T + 1 and same(longer[:, :T], read(model, batch))
    for b, i in enumerate(batch["prompt_index"].tolist()):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i]].tolist()
        completion = batch["completion_ids"][b][batch["completion_mask"][b]].tolist()
        assert same(longer[b, :len(completion) + 1].detach(), read_alone(model, prompt, completion))
    assert len(set(batch["completion_mask"].sum(-1).tolist())) == 4


# -- the reward model -------------------------------------------------------------------------------------------------


def make_rm(**flags):
    """A reward model whose head says something, and pairs judged by the coin."""
    config = RMConfig(**{"num_generations": 4, **flags})
    algo = RM(config, tiny_model(), tiny_model(seed=1), Letters(), data.Chain(2, 3))
    algo.rewards.functions = {"coin": coin}
    move(algo.model, 0.3)
    return algo


def test_reward_loss_worked_examples():
    """Rewards 1 and 0: -log sigma(1) = .313; equal ones: log 2; the centring adds c (r + r')^2 and sees no
    difference."""
    a, b = torch.tensor([1.0, 0.0, 0.5]).double(), torch.tensor([0.0, 0.0, -0.5]).double()
    plain = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(-1))]
    assert close(rm.reward_loss(a, b), plain) and plain[0] == pytest.approx(0.313, abs=5e-4)
    assert close(rm.reward_loss(a, b, 0.1), [plain[0] + 0.1, plain[1], plain[2]])
    assert close(rm.reward_loss(a + 7, b + 7), plain) and rm.reward_loss(b, a)[0] > 1         # only differences count


def newton(loss, n, steps=12):
    """The minimiser of a convex loss of n rewards; along the constants, where it may be flat, the rewards stay at 0."""
    x = torch.zeros(n, dtype=torch.float64)
    for _ in range(steps):
        hessian = torch.autograd.functional.hessian(loss, x)
        x = x - torch.linalg.pinv(hessian, rtol=1e-12) @ torch.autograd.functional.jacobian(loss, x)
    return x


def test_the_reward_model_recovers_the_rewards_behind_the_labels():
    """Fitted to infinitely many Bradley-Terry labels, P(i beats j) = sigma(r_i - r_j), on all pairs, a table of
    rewards is r up to a constant (2203.02155, eq. 1); centring makes that constant the one of mean 0."""
    r = torch.tensor([0.0, 1.5, -0.7, 2.2, 0.4, -1.9], dtype=torch.float64)
    i, j = torch.tensor([(i, j) for i in range(6) for j in range(6) if i != j]).T
    labels = (r[i] - r[j]).sigmoid()

    def loss(x, coefficient=0.0):
        return (labels * rm.reward_loss(x[i], x[j], coefficient)).sum()
    found = newton(loss, 6)
    assert close(found - found.mean(), r - r.mean())
    centred = newton(lambda x: loss(x, 1e-6), 6)
    assert close(centred, r - r.mean(), 1e-4) and abs(found.mean()) < 1e-9


def test_answers_are_read_at_their_last_real_token(float64):
    """Whatever the width, the side and the content of the padding (also where it is <end> itself) and whatever the
    order, an answer's reward is the head after its last token, read alone (transformers issue 35352)."""
    algo, batch = make_rm(), some_batch()
    alone = [float(read_alone(algo.model, p, c)[-1]) for p, c, _ in rows(batch)]
    assert len(set(alone)) == 4 and same(rm.answer_rewards(algo.model, batch), alone)
    assert same(rm.answer_rewards(algo.model, widened(batch, 4, 3)), alone)
    for pad_id in (Letters.eos_id, 3):
        other = {**batch, "completion_ids": batch["completion_ids"].masked_fill(~batch["completion_mask"], pad_id),
                 "prompt_ids": batch["prompt_ids"].masked_fill(~batch["prompt_mask"], pad_id)}
        assert same(rm.answer_rewards(algo.model, other), alone)
    order = torch.tensor([2, 0, 3, 1])
    assert same(rm.answer_rewards(algo.model, data.take_rows(batch, order)), [alone[k] for k in order])
    on_the_right = {name: batch[name].clone() for name in ("prompt_ids", "prompt_mask")}
    for ids, mask, old, real in zip(*on_the_right.values(), batch["prompt_ids"], batch["prompt_mask"]):
        ids[:], mask[:] = torch.cat([old[real], old[~real]]), torch.cat([real[real], real[~real]])
    assert not on_the_right["prompt_mask"][:, -1].all()
    assert same(rm.answer_rewards(algo.model, {**batch, **on_the_right}), alone)


def test_the_scorer_is_the_reward_model():
    """Handed to a task as a reward function, it says what answer_rewards says, as floats, a row of its own each."""
    algo, batch = make_rm(), some_batch()
    prompts = [p["prompt"] for p in PROBLEMS]
    texts = [algo.tokenizer.decode(ids) for ids in batch["completion_ids"].tolist()]
    judge = rm.scorer(algo.model, algo.tokenizer)
    found = judge(prompts, texts, answer=["2", "7", "1", "7"])
    assert found == rm.answer_rewards(algo.model, batch).tolist() and all(type(r) is float for r in found)
    assert [judge([p], [c])[0] for p, c in zip(prompts, texts)] == pytest.approx(found, abs=1e-5)


def test_the_scorer_judges_whatever_was_written():
    """Broken UTF-8 grows when it is decoded, one byte into three, and may then not fit the model: it is still
    judged."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16)).with_scalar_head()
    tokenizer = data.Tokenizer()
    text = tokenizer.decode([0xff] * 20)                                                  # 20 tokens fit, 60 do not
    assert all(map(math.isfinite, rm.scorer(model, tokenizer)(["7+5=", "7+5="], [text, "2"])))


def test_pairs_are_chosen_then_rejected():
    """Rows chosen, rejected, chosen, ...: two answers to one prompt of which the first has the higher true reward;
    groups without contrast are skipped and counted."""
    algo = make_rm()
    batch, metrics = collect(algo)
    pairs = [(p, algo.tokenizer.decode(c)) for p, c, _ in rows(batch)]
    true = coin([algo.tokenizer.decode(p[1:]) for p, _ in pairs], [c for _, c in pairs])
    assert len(pairs) >= 4 and true[0::2] == [1.0] * (len(pairs) // 2) and true[1::2] == [0.0] * (len(pairs) // 2)
    assert all(a == b for (a, _), (b, _) in zip(pairs[0::2], pairs[1::2]))
    skipped, groups = metrics["skipped_pairs"]
    assert groups == 4 and skipped == 4 - len(pairs) // 2 and skipped >= 1                # the first group is flat
    algo = make_rm()
    algo.rewards.functions = {"flat": lambda prompts, completions, **columns: [1.0] * len(prompts)}
    nothing, metrics = collect(algo)
    assert nothing is None and metrics["skipped_pairs"] == (4, 4) and algo.minibatches(None) == [None]


def test_pairs_of_a_file(tmp_path):
    """A file's preferences are taken as they are, chosen before rejected, pairs of equal answers left out."""
    lines = [{"prompt": "7+5=", "chosen": "2", "rejected": "3"}, {"prompt": "1+1=", "chosen": "2", "rejected": "2"},
             {"prompt": "9*9=", "chosen": "1", "rejected": "9*9=8"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = data.JsonLines(tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl")
    algo = RM(RMConfig(), tiny_model(), tiny_model(seed=1), Letters(), task)
    batch, metrics = algo.collect(algo.examples(0), None)
    texts = [(Letters().decode(p[1:]), Letters().decode(c)) for p, c, _ in rows(batch)]
    assert texts == [("7+5=", "2"), ("7+5=", "3"), ("9*9=", "1"), ("9*9=", "9*9=8")]
    assert metrics["skipped_pairs"] == (1, 3)


def test_rm_loss_and_metrics(float64):
    """The loss is the mean over pairs of reward_loss with the configured centring, the metrics are sums over pairs; the
    sampler, which is no reward model, is not trained."""
    algo = make_rm(center_rewards_coefficient=0.2)
    [minibatch] = algo.minibatches(collect(algo)[0])
    r = [float(read_alone(algo.model, p, c)[-1]) for p, c, _ in rows(minibatch)]
    pairs = list(zip(r[0::2], r[1::2]))
    by_hand = [math.log(1 + math.exp(b - a)) + 0.2 * (a + b) ** 2 for a, b in pairs]
    loss, gradients, found = loss_and_gradients(algo, minibatch)
    assert same(loss, sum(by_hand) / len(pairs)) and gradients["model"].abs().max() > 1e-3
    assert found == {"accuracy": pytest.approx((sum(a > b for a, b in pairs), len(pairs))),
                     "margin": pytest.approx((sum(a - b for a, b in pairs), len(pairs))),
                     "mean_reward": pytest.approx((sum(r), len(r)))}
    assert all(p.grad is None for p in algo.sampler.parameters())


def test_the_rm_is_invariant_to_micro_batches_and_padding(float64):
    """However the pairs are cut, never through the middle of one, or padded: the same loss, gradient and metrics."""
    algo = make_rm()
    [minibatch] = algo.minibatches(collect(algo, PROBLEMS * 2)[0])
    whole = loss_and_gradients(algo, minibatch)
    assert len(minibatch["completion_ids"]) >= 8
    for size in (1, 2, 3, 4, 5):
        assert all(len(part["completion_ids"]) % 2 == 0 for part in data.split(minibatch, size, algo.rows_together))
        assert same_results(loss_and_gradients(algo, minibatch, size), whole), f"micro-batches of {size}"
    assert same_results(loss_and_gradients(algo, widened(minibatch)), whole), "wider padding"


def test_the_rm_gradient_by_finite_differences(float64):
    """The derivative of the whole loss along random directions, through the network."""
    algo = make_rm()
    [minibatch] = algo.minibatches(collect(algo)[0])
    _, gradients, _ = loss_and_gradients(algo, minibatch)
    start, h = torch.nn.utils.parameters_to_vector(algo.model.parameters()).detach(), 1e-6
    for seed in range(3):
        direction, ends = torch.randn(len(start), generator=torch.Generator().manual_seed(seed)), []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(start + sign * h * direction, algo.model.parameters())
            ends.append(algo.loss(minibatch)[0].item())
        slope = float(gradients["model"] @ direction)
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, abs=1e-7) and abs(slope) > 1e-3


def test_rm_evaluation_is_deterministic():
    """The same held-out pairs every time, whatever the state of the global generators; a head turned upside down ranks
    right what was ranked wrong; where there is no pair, there is no number."""
    algo, args = make_rm(), training_args(eval_problems=16, seed=0)
    first = algo.evaluate(args)
    torch.manual_seed(99)
    random.seed(99)
    assert algo.evaluate(args) == first and 0 < first["eval/pair_accuracy"] < 1 and first["eval/pairs"] > 8
    with torch.no_grad():
        algo.model.lm_head.weight *= -1
    assert algo.evaluate(args)["eval/pair_accuracy"] == pytest.approx(1 - first["eval/pair_accuracy"])
    algo = make_rm()
    algo.rewards.functions = {"flat": lambda prompts, completions, **columns: [1.0] * len(prompts)}
    assert algo.evaluate(args) == {}


def test_the_rm_learns_its_pairs():
    """30 updates on one batch of pairs bring the loss from log 2, a coin, to where every pair is ranked right."""
    algo = make_rm()
    algo.model = algo.networks["model"] = tiny_model().with_scalar_head()
    [minibatch] = algo.minibatches(collect(algo, PROBLEMS * 2)[0])
    assert float(algo.loss(minibatch)[0].detach()) == pytest.approx(math.log(2))
    optimizer = algo.model.configure_optimizer(1e-2, 0.0)
    for _ in range(30):
        train.update(training_args(), algo, optimizer, minibatch, {})
    loss, found = algo.loss(minibatch)
    assert loss < 0.1 and found["accuracy"][0] == found["accuracy"][1]


# -- rewards ----------------------------------------------------------------------------------------------------------

TEXTS = ["2", "1-2=9;9*3=7", "9*9=3", ""]                  # right, right and worked, worked and wrong, nothing


def test_rewards_add_up_by_weight():
    """The total is the weighted sum, every part is handed on unweighted under its name; the weights are 1 by
    default."""
    task = data.Chain(2, 3)
    total, each = data.Rewards(task, "verifier,format,brevity", "1,0.5,-2")(PROBLEMS, TEXTS)
    parts = {"verifier": [1, 1, 0, 0], "format": [0, 1, 1, 0],
             "brevity": [-len(t) / task.max_new_tokens for t in TEXTS]}
    assert each.keys() == parts.keys() and all(close(each[name], parts[name], 1e-6) for name in parts)
    assert close(total, [v + 0.5 * f - 2 * b for v, f, b in zip(*parts.values())], 1e-6)
    total, _ = data.Rewards(task, "format,verifier")(PROBLEMS, TEXTS)
    assert total.tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize("names, shown", [("verifier", False), ("brevity,verifier", False), ("brevity", True),
                                          ("format", True), ("model", True), ("model,verifier", False)])
def test_true_reward_is_shown_where_the_verifier_is_not_trained_on(names, shown):
    """What the verifier says is logged whatever is trained on, and enters the total only where it was asked for
    (2210.10760: where reward and true reward part, over-optimisation has begun)."""
    task = data.Chain(2, 3)
    task.learned_reward = lambda prompts, completions, **columns: [0.25] * len(prompts)
    total, each = data.Rewards(task, names)(PROBLEMS, TEXTS)
    assert set(each) == set(names.split(",")) | ({"true_reward"} if shown else set())
    assert each["true_reward" if shown else "verifier"].tolist() == [1, 1, 0, 0]
    assert close(total, sum(each[name] for name in names.split(",")), 1e-6)


def test_no_true_reward_without_answers(tmp_path):
    """A file of bare prompts has nothing to verify: no true_reward; with answers there is one."""
    for columns, shown in (({}, set()), ({"answer": "2"}, {"true_reward"})):
        (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": "7+5=", **columns}) + "\n")
        task = data.JsonLines(tmp_path / "lines.jsonl", tmp_path / "lines.jsonl", 8)
        _, each = data.Rewards(task, "brevity")(task.train, ["2"])
        assert set(each) == {"brevity"} | shown


def test_a_learned_reward_beside_brevity():
    """A reward model is a reward function like any other: weighed, logged as rewards/model/mean, and watched by the
    verifier; without one, `model` is refused."""
    task, tokenizer = data.Chain(2, 3), Letters()
    reward_model = tiny_model(seed=3).with_scalar_head()
    move(reward_model, 0.3)
    task.learned_reward = rm.scorer(reward_model, tokenizer)
    rewards, generator = data.Rewards(task, "model,brevity", "2,0.5"), torch.Generator().manual_seed(SEED)
    batch, metrics = data.rollout(tiny_model(), tokenizer, task, rewards, PROBLEMS, 4, 1.0, generator)
    prompts, texts = zip(*((tokenizer.decode(p[1:]), tokenizer.decode(c)) for p, c, _ in rows(batch)))
    learned, short = task.learned_reward(prompts, texts), data.brevity(prompts, texts, task.max_new_tokens)
    assert len(set(learned)) > 8 and same(batch["rewards"], [2 * a + 0.5 * b for a, b in zip(learned, short)], 1e-5)
    answers = [data.Chain.solve(p)["answer"] for p in prompts]
    for name, values in (("rewards/model/mean", learned), ("rewards/brevity/mean", short), ("reward", batch["rewards"]),
                         ("true_reward", data.Chain.reward(prompts, texts, answers))):
        assert float(metrics[name][0]) == pytest.approx(float(sum(values)), abs=1e-4) and metrics[name][1] == 16, name
    assert sum("reward" in name for name in metrics) == 4
    with pytest.raises(InputError, match="--reward model is unknown"):
        data.Rewards(data.Chain(2, 3), "model")


def test_a_rollout_is_a_batch():
    """Rows in groups, problem by problem; each ends at its <end> or was cut off; the metrics are their sums."""
    task, generator = data.Chain(2, 3), torch.Generator().manual_seed(SEED)
    rewards = data.Rewards(task, "brevity")
    batch, metrics = data.rollout(tiny_model(), Letters(), task, rewards, PROBLEMS, 3, 1.0, generator)
    assert batch["prompt_index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    found = list(rows(batch))
    assert [Letters().decode(p[1:]) for p, _, _ in found] == [p["prompt"] for p in PROBLEMS for _ in range(3)]
    assert [truncated for _, _, truncated in found] == batch["truncated"].tolist() and 0 < batch["truncated"].sum() < 12
    lengths = [len(c) for _, c, _ in found]
    assert batch["completion_mask"].sum(-1).tolist() == lengths and metrics["sampled_tokens"] == sum(lengths)
    assert metrics["completions/mean_length"] == (sum(lengths), 12)
    assert metrics["completions/clipped_ratio"] == (batch["truncated"].sum(), 12)
    one, _ = data.rollout(tiny_model(), Letters(), task, rewards, PROBLEMS, temperature=0)
    two, _ = data.rollout(tiny_model(), Letters(), task, rewards, PROBLEMS, 2, temperature=0)
    assert torch.equal(two["completion_ids"][0::2], one["completion_ids"])
    assert torch.equal(two["completion_ids"][1::2], one["completion_ids"])


# -- whole runs -------------------------------------------------------------------------------------------------------

LOOP = ("--max_steps", 5, "--save_steps", 2, "--logging_steps", 1, "--eval_steps", 5, "--warmup_steps", 1)
RM_ = ("--algo", "rm", "--batch_size", 4, "--num_generations", 4)
PPO_ = ("--algo", "ppo", "--batch_size", 4, "--num_generations", 2, "--num_mini_batches", 2,
        "--target_kl", 1e9)


@pytest.fixture
def runs(tiny_base, tmp_path, monkeypatch):
    """A folder of its own, a verifier with whom a model that knows nothing is right half of the time, reward models
    made in 3 steps. -> runs(algo, *more flags), a run of 5 steps from the tiny base, with its exit code"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.Chain, "reward", staticmethod(coin))
    monkeypatch.setitem(RM.defaults, "max_steps", 3)
    monkeypatch.setitem(RM.defaults, "batch_size", 4)
    return lambda algo, *more: run(*algo, *TASK, *LOOP, "--init_from", tiny_base, *more)


def all_the_same(a, b):
    """Whether all networks of two runs, trained and kept, are the same bit for bit, and so are their logs."""
    a_networks, b_networks = checkpoint(a)["networks"], checkpoint(b)["networks"]
    return a_networks.keys() == b_networks.keys() and same_numbers(metrics(a), metrics(b)) \
        and all(same_weights(a_networks[name], b_networks[name]) for name in a_networks)


@contextlib.contextmanager
def interrupted(monkeypatch, call):
    """Ctrl-C at the start of update number `call`."""
    update, calls = train.update, []

    def interrupted_update(*args):
        calls.append(None)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return update(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", interrupted_update)
        yield


@pytest.mark.parametrize("flags, call, step", [
    (PPO_, 6, 2),                                           # in the middle of a step's four updates, which are all made
    ((*PPO_, "--missing_eos_penalty", 0.5, "--micro_batch_size", 3), 14, 4),
    (RM_, 3, 3),
], ids=["ppo", "ppo, micro-batches", "rm"])
def test_resumed_runs_equal_uninterrupted_ones(runs, monkeypatch, flags, call, step):
    """Ctrl-C in the middle, then --resume: policy, critic and reference (reward model and sampler), and the log, are
    those of a run that was not interrupted, bit for bit."""
    assert runs(flags, "--out_dir", "whole") == 0
    with interrupted(monkeypatch, call):
        assert runs(flags, "--out_dir", "parted") == 130
    half, whole = checkpoint("parted"), checkpoint("whole")
    assert half["step"] == step
    for name in {"model", "critic"} & set(whole["networks"]):               # what is trained has yet to move
        assert not same_weights(half["networks"][name], whole["networks"][name])
    assert runs(flags, "--out_dir", "parted", "--resume") == 0
    assert all_the_same("parted", "whole") and summary("parted")["after"] == summary("whole")["after"]


def test_ppo_run(runs, tiny_base):
    """--algo ppo trains policy and critic, keeps the reference, and logs what its legend speaks of."""
    assert runs(PPO_, "--out_dir", "run") == 0
    saved, base = checkpoint("run"), weights(tiny_base)
    assert saved["networks"].keys() == {"model", "critic", "ref_model"}
    assert same_weights(saved["model"], saved["networks"]["model"]) and not saved["model_config"]["scalar_head"]
    assert same_weights(saved["networks"]["ref_model"], base) and not same_weights(saved["model"], base)
    critic = saved["networks"]["critic"]
    assert critic["lm_head.weight"].shape == (1, 16) and all(not torch.equal(critic[name], base[name]) for name in base)
    lines = metrics("run")
    assert [line["step"] for line in lines] == list(range(6)) and "eval/pass@16" in summary("run")["after"]
    shown = {"reward", "rewards/verifier/mean", "loss/value", "loss/policy", "policy/approxkl", "objective/kl",
             "entropy", "clip_ratio", "max_ratio", "values", "completions/clipped_ratio", "grad_norm"}
    assert all(shown <= set(line) and "true_reward" not in line for line in lines[1:])
    assert lines[1]["objective/kl"] == 0 and all(line["max_ratio"] > 1 for line in lines[1:])
    assert lines[1]["values"] == pytest.approx(0, abs=0.1) and lines[-1]["objective/kl"] != 0


def test_rm_run(runs, tiny_base, capsys):
    """--algo rm leaves a reward model, its sampler untouched, judged before and after by held-out pairs; and it
    proposes no command in which the reward model would have to write."""
    assert runs(RM_, "--out_dir", "run") == 0
    saved, base = checkpoint("run"), weights(tiny_base)
    assert saved["model_config"]["scalar_head"] and saved["networks"].keys() == {"model", "sampler"}
    assert same_weights(saved["networks"]["sampler"], base) and saved["model"]["lm_head.weight"].abs().min() > 0
    end = summary("run")
    assert end["before"]["eval/pair_accuracy"] == 0 < end["after"]["eval/pair_accuracy"] <= 1   # 0: all are worth 0
    assert end["before"]["eval/pairs"] == end["after"]["eval/pairs"] > 3
    line = metrics("run")[1]
    assert line["loss"] == pytest.approx(math.log(2)) and {"accuracy", "margin", "skipped_pairs"} <= set(line)
    out = capsys.readouterr().out
    assert re.search(r"right about \d+\.\d% of \d+ held-out pairs", out)
    assert "--init_from run" not in out


def test_an_rm_run_without_any_contrast(runs, monkeypatch):
    """Where no answer is better than another there is no pair and nothing to learn: the run ends well all the same."""
    monkeypatch.setattr(data.Chain, "reward", staticmethod(lambda prompts, *args, **columns: [0.0] * len(prompts)))
    assert runs(RM_, "--out_dir", "run") == 0
    assert summary("run")["after"] == {} and metrics("run")[-1]["skipped_pairs"] == 1
    assert (weights("run")["lm_head.weight"] == 0).all()


def test_the_reward_model_is_made_on_the_way_once(runs, capsys):
    """--reward model trains a reward model first, in a folder of its own; the next run, of whatever algorithm, takes
    it as it is. The verifier's opinion is logged beside it, and is not what is trained on."""
    grpo = ("--algo", "grpo", "--batch_size", 4, "--num_generations", 4)
    assert runs(grpo, "--reward", "model", "--out_dir", "grpo") == 0
    [folder] = [f"out/{name}" for name in os.listdir("out")]
    assert "chain-rm-0" in folder and summary(folder)["steps"] == 3
    assert "training one first (once)" in capsys.readouterr().out
    made = os.stat(f"{folder}/ckpt.pt").st_mtime_ns
    assert runs(PPO_, "--reward", "model,brevity", "--reward_weights", "1,0.1", "--out_dir", "ppo") == 0
    out = capsys.readouterr().out
    assert "training one first" not in out and f"Reward model: {folder} (made earlier" in out
    assert os.listdir("out") == [os.path.basename(folder)] and os.stat(f"{folder}/ckpt.pt").st_mtime_ns == made
    for name in ("grpo", "ppo"):
        line = metrics(name)[-1]
        assert line["rewards/model/mean"] != 0 and 0 <= line["true_reward"] <= 1 and "rewards/verifier/mean" not in line
    line = metrics("ppo")[1]
    assert line["reward"] == pytest.approx(line["rewards/model/mean"] + 0.1 * line["rewards/brevity/mean"], abs=1e-6)
    critic, judge = checkpoint("ppo")["networks"]["critic"], weights(folder)
    assert not same_weights(critic, judge)                  # it started there and was trained
    assert all((critic[name] - judge[name]).abs().max() < 0.1 for name in judge)
    assert runs(grpo, "--reward", "model", "--reward_model", folder, "--out_dir", "named") == 0
    assert same_weights(weights("named"), weights("grpo"))  # named or found: the same judge


def test_a_resumed_run_finds_its_reward_model_again(runs, monkeypatch, capsys):
    """--resume of a run with a learned reward takes the same reward model, and ends as if it had not been
    interrupted."""
    flags = (*PPO_, "--reward", "model")
    assert runs(flags, "--out_dir", "whole") == 0
    with interrupted(monkeypatch, 9):
        assert runs(flags, "--out_dir", "parted") == 130
    said = re.search(r"go on with: python train.py (.*)", capsys.readouterr().out).group(1)
    assert train.run(shlex.split(said)) == 0 and all_the_same("parted", "whole")


def test_a_reward_model_and_a_policy_are_not_mistaken_for_each_other(runs, tiny_base):
    """--init_from a reward model and --reward_model a policy are refused in one line that says what to do instead."""
    assert runs(RM_, "--out_dir", "judge") == 0
    for flags, message in (
            ((*PPO_, "--init_from", "judge"), "judge is a reward model, which cannot write; give it as --reward_model"),
            (("--init_from", "judge", "--sample", "7+5="), "judge is a reward model"),
            ((*PPO_, "--init_from", tiny_base, "--reward", "model", "--reward_model", tiny_base),
             "is no reward model for this tokenizer: make one with --algo rm")):
        with pytest.raises(InputError, match=message) as error:
            run(*flags, *TASK)
        assert "\n" not in str(error.value)
    assert not os.path.exists("out")


# -- wrong settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    *[({name: 0}, f"--{name} 0: at least 1") for name in
      ("num_generations", "num_ppo_epochs", "num_mini_batches", "num_prompts")],
    *[({name: -0.1}, f"--{name} -0.1: a number of at least 0") for name in
      ("kl_coef", "cliprange", "cliprange_value", "vf_coef", "target_kl", "missing_eos_penalty")],
    (dict(gamma=1.01), "--gamma 1.01: a number from 0 to 1"), (dict(lam=-0.1), "--lam -0.1: a number from 0 to 1"),
    (dict(truncation="mask", missing_eos_penalty=0.5), "only --truncation terminal"),
    (dict(truncation="bootstrap", missing_eos_penalty=0.5), "only --truncation terminal"),
    (dict(reward="majority"), "compares the answers of a group"), (dict(reward="verifier,majority"), "of a group"),
    (dict(temperature=0.0), "above 0"),
])
def test_wrong_ppo_settings_are_refused(flags, message):
    """Each is an InputError that says what is wrong; the settings at the edge are taken."""
    with pytest.raises(InputError, match=message):
        PPOConfig(**flags)
    PPOConfig(num_generations=1, kl_coef=0, cliprange=0, cliprange_value=0, target_kl=0, gamma=0, lam=1)


@pytest.mark.parametrize("flags, message", [
    (dict(num_generations=1), "at least 2"), (dict(num_prompts=0), "at least 1"), (dict(temperature=0.0), "above 0"),
    (dict(center_rewards_coefficient=-1.0), "at least 0"), (dict(reward="model"), "its own judge"),
    (dict(reward="brevity,model"), "its own judge")])
def test_wrong_rm_settings_are_refused(flags, message):
    """Each is an InputError that says what is wrong; the settings at the edge are taken."""
    with pytest.raises(InputError, match=message):
        RMConfig(**flags)
    RMConfig(num_generations=2, num_prompts=1, center_rewards_coefficient=0)
