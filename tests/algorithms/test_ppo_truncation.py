"""
What each token is worth to PPO: values, rewards, advantages and returns, compared with a loop over
single answers, each read alone and without padding; and the three ways to treat an answer that ran
out of tokens.
"""

import pytest
import torch

from harness.log import Log
from tiny import (Letters, letters, loss_and_gradient, move, read_alone, rows, same, same_results,
                  sample)
from tiny_ppo import TRUNCATION, first_pass, make_ppo


def score_of(completion):
    return letters(None, [Letters().decode(completion)])[0]


def test_the_score_is_on_the_last_real_token(float64):
    """No KL, no critic, gamma 1/2: token t of an answer of n is worth score / 2^(n - 1 - t), and
    padding nothing. (On padding it would arrive late or not at all: TRL issues 1893, 3750.)"""
    algo = make_ppo(zero_critic=True, kl_coef=0.0, gamma=0.5, lam=1.0, whiten_advantages=False)
    [part] = first_pass(algo)
    lengths = set()
    for b, (_, completion, _) in enumerate(rows(part)):
        n, score = len(completion), score_of(completion)
        by_hand = [score / 2 ** (n - 1 - t) for t in range(n)]
        for name in ("returns", "advantages"):
            assert same(part[name][b, :n], by_hand) and (part[name][b, n:] == 0).all()
        real = [t < n for t in range(part["completion_ids"].shape[1])]
        assert part["completion_mask"][b].tolist() == real
        lengths.add(n)
    assert len(part["returns"]) == 16 and len(lengths) > 3


@pytest.mark.parametrize("settings", [
    dict(), dict(missing_eos_penalty=0.7), TRUNCATION["bootstrap"], TRUNCATION["mask"],
    dict(**TRUNCATION["bootstrap"], lam=0.0, gamma=0.8),
    dict(temperature=0.7, missing_eos_penalty=0.7)], ids=str)
@pytest.mark.parametrize("micro_batch_size", [0, 3])
def test_credit_is_that_of_each_answer_read_alone(float64, settings, micro_batch_size):
    """Values, log-probabilities, rewards, advantages and returns, one answer at a time and token by
    token: a truncated answer is scored less a penalty, or goes on at the critic's V (bootstrap), or
    is left out (mask)."""
    algo, log = make_ppo(**{"kl_coef": 0.1, "num_minibatches": 3, "whiten_advantages": False,
                            "micro_batch_size": micro_batch_size, **settings}), Log()
    config, cut, kls = algo.config, 0, []
    for part in first_pass(algo, log=log):
        for b, (prompt, completion, _) in enumerate(rows(part)):
            truncated = bool(part["truncated"][b])
            cut += truncated
            if truncated and config.mask_truncated_completions:
                assert not part["completion_mask"][b].any()
                continue
            goes_on = truncated and config.bootstrap_truncated_completions
            n, V = len(completion), read_alone(algo.critic, prompt, completion)[:, 0]
            logp, logq = (
                (read_alone(m, prompt, completion)[:n] / config.temperature).log_softmax(-1)
                [range(n), completion] for m in (algo.model, algo.ref_model))
            rewards = -0.1 * (logp - logq)
            kls.append(float((logp - logq).sum()))
            if not goes_on:
                rewards[-1] += score_of(completion) - config.missing_eos_penalty * truncated
            later, after, advantages = 0.0, V[n] if goes_on else 0.0, [0.0] * n
            for t in reversed(range(n)):
                delta = rewards[t] + config.gamma * after - V[t]
                later = delta + config.gamma * config.lam * later
                after, advantages[t] = V[t], float(later)
            assert part["completion_mask"][b].sum() == n and V.abs().mean() > 0.01
            returns = torch.tensor(advantages) + V[:n]
            for name, value in (("old_values", V[:n]), ("old_logprobs", logp),
                                ("advantages", advantages), ("returns", returns)):
                assert same(part[name][b, :n], value), name
    assert 3 < cut < 13   # of 16: both kinds are there
    kl = log.line()["objective/kl"]   # a mean over the answers that are trained on
    assert kl == pytest.approx(sum(kls) / len(kls)) and abs(kl) > 0.01


def test_masked_answers_have_no_part_in_the_update(float64):
    """mask: loss and gradient are those of the finished answers alone, whose advantages alone are
    whitened; where all are truncated both are 0."""
    algo = make_ppo(**TRUNCATION["mask"])
    batch = sample(algo)
    kept = (~batch["truncated"]).nonzero().squeeze(-1)
    [part], [without] = first_pass(algo, batch), first_pass(algo, take(batch, kept))
    white = part["advantages"][part["completion_mask"]]
    assert 3 < len(kept) < 13
    assert same(white.mean(), 0.0) and same(white.var(correction=0), 1.0, 1e-6)
    move(algo.model)
    move(algo.critic)
    assert same_results(loss_and_gradient(algo, part), loss_and_gradient(algo, without))
    all_cut = {**batch, "truncated": torch.ones_like(batch["truncated"])}
    [nothing] = first_pass(algo, all_cut)
    loss, gradient, _ = loss_and_gradient(algo, nothing)
    assert loss == 0 and (gradient == 0).all()


def test_the_batch_stays_as_it_was_sampled():
    """Making minibatches of a batch leaves the batch alone: --inspect gives one batch to every
    algorithm."""
    algo = make_ppo(**TRUNCATION["mask"])
    batch = sample(algo)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    assert len(list(algo.minibatches(batch, Log()))) == 2 and batch.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in batch.items())


def take(batch, kept):
    """The kept rows, the padding untouched."""
    per_row = {name: batch[name][kept] for name in batch if not name.startswith("prompt_")}
    return {**batch, **per_row, "prompt_index": batch["prompt_index"][kept]}


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
def test_whitening_comes_last_and_covers_the_whole_batch(float64, truncation):
    """Returns are those without whitening (after it they would lose their meaning); advantages have
    mean 0 and variance 1 over the tokens of the whole batch, not of each part, so that the parts
    keep what distinguishes them."""
    settings = dict(**TRUNCATION[truncation], num_minibatches=2)
    parts = first_pass(make_ppo(**settings))
    plain = first_pass(make_ppo(**settings, whiten_advantages=False))
    tokens = {}
    for name, found in (("white", parts), ("plain", plain)):
        masks = [part["completion_mask"] for part in found]
        for column in ("advantages", "returns", "old_values"):
            tokens[name, column] = torch.cat([p[column][m] for p, m in zip(found, masks)])
    for column in ("returns", "old_values"):
        assert torch.equal(tokens["white", column], tokens["plain", column])
    x, white = tokens["plain", "advantages"], tokens["white", "advantages"]
    assert same(x + tokens["plain", "old_values"], tokens["white", "returns"])
    assert same(white, (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt()) and abs(x.mean()) > .01
    assert same(white.mean(), 0.0) and same(white.var(correction=0), 1.0, 1e-6)
    means = [part["advantages"][part["completion_mask"]].mean() for part in parts]
    assert len(means) == 2 and all(abs(mean) > 1e-3 for mean in means)
    assert all((p["advantages"][~p["completion_mask"]] == 0).all() for p in parts)
