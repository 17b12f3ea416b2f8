"""Hidden variants of assignment 5: other numbers, other shapes, plain loops beside them."""

import math
import statistics

import pytest
import torch
from draws import SHAPES, logprobs, mask, normal, rng

import ppo
import rm
from conftest import float64  # noqa: F401
from model import GPT, GPTConfig
from tiny import same
from world import close, gradient


@pytest.mark.parametrize("N", [1, 7])
def test_reward_loss_elsewhere(N):
    """-log sigma(difference), and the coefficient times the squared sum."""
    a, b = (normal(f"{name} {N}", N).requires_grad_() for name in "ab")
    coefficient = rng("centre").uniform(0, 1)
    found = rm.reward_loss(a, b, coefficient)
    rows = list(zip(a.tolist(), b.tolist()))
    assert close(found, [math.log1p(math.exp(y - x)) + coefficient * (x + y) ** 2
                         for x, y in rows])
    assert close(gradient(found.sum(), a), [-1 / (1 + math.exp(x - y)) + 2 * coefficient * (x + y)
                                            for x, y in rows])


@pytest.mark.usefixtures("float64")
def test_answer_rewards_elsewhere():
    """The head after each answer's last token, of another model and other lengths."""
    torch.manual_seed(rng("model").randrange(1000))
    model = GPT(GPTConfig(vocab_size=18, block_size=16, n_layer=1, n_head=2, n_embd=8, n_hidden=8,
                          scalar_head=True))
    real, lengths = mask("answers", 5, 6)
    ids = normal("ids", 5, 6).abs().mul(5).long() % 18
    batch = {"prompt_ids": torch.tensor([[16, 3]] * 5), "prompt_mask": torch.ones(5, 2).bool(),
             "completion_ids": ids, "completion_mask": real, "prompt_index": torch.arange(5)}
    found = rm.answer_rewards(model, batch)
    alone = [model(torch.tensor([[16, 3, *ids[b, :n].tolist()]]))[0, -1, 0]
             for b, n in enumerate(lengths)]
    assert same(found, torch.stack(alone))


@pytest.mark.parametrize("B, T", SHAPES)
def test_token_rewards_elsewhere(B, T):
    """The KL's price on every real token, the score on the last of them, nothing on padding and
    nothing where there is no token."""
    lp, ref, scores = logprobs("lp", B, T).detach(), logprobs("ref", B, T).detach(), normal("s", B)
    (real, lengths), price = mask("mask", B, T), rng("price").uniform(0.01, 1)
    if B > 2:
        real[0], lengths[0] = False, 0
    found = ppo.token_rewards(scores, lp, ref, real, price)
    assert close(found, [[0 if t >= lengths[b] else -price * (lp[b, t] - ref[b, t]).item()
                          + (scores[b].item() if t == lengths[b] - 1 else 0) for t in range(T)]
                         for b in range(B)])


@pytest.mark.parametrize("B, T", SHAPES)
def test_gae_elsewhere(B, T):
    """The sum over the future of discounted errors, row by row; returns are advantages and
    values."""
    rewards, values, last = normal("r", B, T), normal("v", B, T), normal("l", B)
    (real, lengths), gamma, lam = mask("mask", B, T), rng("g").uniform(0.5, 1), rng("l").random()
    advantages, returns = ppo.gae(rewards, values, real, last, gamma, lam)
    hand = [[0.0] * T for _ in range(B)]
    for b, n in enumerate(lengths):
        ahead = [*values[b, :n].tolist(), last[b].item()]
        for t in range(n):
            for s in range(t, n):
                error = rewards[b, s].item() + gamma * ahead[s + 1] - ahead[s]
                hand[b][t] += (gamma * lam) ** (s - t) * error
    assert close(advantages, hand)
    assert close(returns, (torch.tensor(hand, dtype=torch.float64) + values) * real)


@pytest.mark.parametrize("B, T", SHAPES)
def test_policy_loss_elsewhere(B, T):
    """max(-A r, -A clip r), its gradient, and which tokens have lost theirs."""
    old, moved, A = logprobs("old", B, T).detach(), 0.4 * normal("m", B, T), normal("A", B, T)
    lp, e = (old + moved).requires_grad_(), rng("e").uniform(0.1, 0.4)
    losses, ratio, clipped = ppo.policy_loss(lp, old, A, e)
    r = moved.exp()
    dead = ((r > 1 + e) & (A > 0)) | ((r < 1 - e) & (A < 0))
    assert close(ratio, r) and torch.equal(clipped, dead)
    assert close(losses, [[max(-a * x, -a * min(max(x, 1 - e), 1 + e)) for a, x in zip(*rows)]
                          for rows in zip(A.tolist(), r.tolist())])
    assert close(gradient(losses.sum(), lp), -A * r * ~dead)


@pytest.mark.parametrize("B, T", SHAPES)
def test_value_loss_elsewhere(B, T):
    """Half the larger of two squared errors; without a band the plain one."""
    values, old, returns = (normal(name, B, T) for name in ("values", "old", "returns"))
    e = rng("e").uniform(0.1, 0.4)
    rows = [list(zip(*row)) for row in zip(values.tolist(), old.tolist(), returns.tolist())]
    assert close(ppo.value_loss(values, old, returns, e), [
        [0.5 * max((v - R) ** 2, (o + min(max(v - o, -e), e) - R) ** 2) for v, o, R in row]
        for row in rows])
    assert close(ppo.value_loss(values, old, returns, 0.0), 0.5 * (values - returns) ** 2)


def test_whiten_elsewhere():
    """Mean and population deviation of the real tokens, or of those that are given."""
    x, (real, lengths) = normal("x", 4, 6), mask("mask", 4, 6)
    for given in (None, normal("others", 20)):
        tokens = [x[b, t].item() for b in range(4) for t in range(lengths[b])]
        tokens = tokens if given is None else given.tolist()
        mean, deviation = statistics.mean(tokens), math.sqrt(statistics.pvariance(tokens) + 1e-8)
        assert close(ppo.whiten(x, real, given), (x - mean) / deviation * real)
