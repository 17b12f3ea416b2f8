"""Hidden variants of assignment 6: other numbers, other shapes, plain loops beside them."""

import math
import statistics

import pytest
import torch
from draws import SHAPES, logprobs, mask, normal, rng

import grpo
from world import close, gradient


@pytest.mark.parametrize("P, G", [(1, 2), (3, 5), (6, 3)])
def test_advantages_elsewhere(P, G):
    """Each baseline with each divisor, group by group; a flat group among them stays at 0."""
    draw = rng("rewards")
    rewards = [[float(draw.randint(0, 4)) for _ in range(G)] for _ in range(P)]
    rewards[0] = [0.1 * (i + 1) for i in range(G)]
    if P > 1:
        rewards[1] = [0.3] * G
    R, greedy = torch.tensor(rewards, dtype=torch.float64), [draw.random() for _ in range(P)]
    eps, flat = draw.uniform(0.01, 0.5), [len(set(row)) == 1 for row in rewards]

    def baseline(advantage, i, j):
        others = sum(rewards[i]) - rewards[i][j]
        return {"group": statistics.mean(rewards[i]), "rloo": others / (G - 1),
                "remax": greedy[i], "reinforce": 0}[advantage]

    def divisor(scale, correction, i):
        def deviation(values):
            return statistics.stdev(values) if correction else statistics.pstdev(values)
        return {"none": 1, "group": deviation(rewards[i]) + eps,
                "batch": deviation(sum(rewards, [])) + eps,
                "mean": statistics.mean(rewards[i])}[scale]
    for advantage, scale, correction in (
            ("group", "group", 1), ("group", "group", 0), ("group", "none", 1),
            ("group", "batch", 1), ("group", "batch", 0), ("group", "mean", 1),
            ("rloo", "none", 1), ("rloo", "group", 1), ("rloo", "batch", 1), ("remax", "none", 1),
            ("remax", "batch", 1), ("reinforce", "none", 1), ("reinforce", "mean", 1)):
        found = grpo.group_advantages(R, advantage, scale, correction, eps,
                                      torch.tensor(greedy, dtype=torch.float64))
        hand = [[0 if flat[i] and advantage in ("group", "rloo") else
                 (rewards[i][j] - baseline(advantage, i, j)) / divisor(scale, correction, i)
                 for j in range(G)] for i in range(P)]
        assert close(found, hand, 1e-9), (advantage, scale)
    with pytest.raises(ValueError):
        grpo.group_advantages(R, "mean")


@pytest.mark.parametrize("B, T", SHAPES)
def test_weights_elsewhere(B, T):
    """The three aggregations, in the precision of the mask; dr_grpo's constant is what it says."""
    real, lengths = mask("weights", B, T)
    longest = T + rng("longest").randint(1, 9)
    hand = {"grpo": lambda n: 1 / (B * n), "dapo": lambda n: 1 / sum(lengths),
            "cispo": lambda n: 1 / sum(lengths), "dr_grpo": lambda n: 1 / (B * longest)}
    for loss_type, weight in hand.items():
        found = grpo.token_weights(real.double(), loss_type, longest)
        by_hand = [[weight(n) if t < n else 0 for t in range(T)] for n in lengths]
        assert found.dtype == torch.float64 and close(found, by_hand, 1e-15), loss_type
    with pytest.raises(ValueError):
        grpo.token_weights(real, "mean")


@pytest.mark.parametrize("B, T", SHAPES)
def test_policy_loss_elsewhere(B, T):
    """PPO's clip and CISPO's, on ratios of tokens and of answers: loss, gradient, flag and ratio,
    token by token."""
    old, moved = logprobs("old", B, T).detach(), 0.4 * normal("moved", B, T)
    A, (real, lengths) = normal("A", B), mask("mask", B, T)
    low, high = rng("low").uniform(0.1, 0.3), rng("high").uniform(0.1, 0.5)
    for loss_type in ("grpo", "dapo", "cispo"):
        for level in ("token", "sequence"):
            lp = (old + moved).requires_grad_()
            losses, ratio, clipped = grpo.policy_loss(lp, old, A, real, low, high, loss_type, level)
            found = gradient((losses * real).sum(), lp)
            slopes = [[0.0] * T for _ in range(B)]
            for b in range(B):
                n, a = lengths[b], A[b].item()
                mean = sum(moved[b, :n].tolist()) / n
                for t in range(n):
                    r = math.exp(mean if level == "sequence" else moved[b, t].item())
                    if loss_type == "cispo":
                        loss, dead = -min(r, 1 + high) * a * lp[b, t].item(), r > 1 + high
                        slopes[b][t] += -min(r, 1 + high) * a
                    else:
                        loss = max(-a * r, -a * min(max(r, 1 - low), 1 + high))
                        dead = (r > 1 + high and a > 0) or (r < 1 - low and a < 0)
                        for s in range(n) if level == "sequence" else [t]:
                            slopes[b][s] -= 0 if dead else a * r / (n if level == "sequence" else 1)
                    assert close(losses[b, t], loss) and close(ratio[b, t], r)
                    assert bool(clipped[b, t]) == dead
            assert close(found, slopes), (loss_type, level)
            assert not clipped[~real].any()
    with pytest.raises(ValueError):
        grpo.policy_loss(old, old, A, real, loss_type="mean")


@pytest.mark.parametrize("B, T", SHAPES)
def test_k3_elsewhere(B, T):
    """pi_ref/pi - 1 - log pi_ref/pi and its gradient, alone and times the ratio."""
    lp, ref, old = (logprobs(name, B, T) for name in ("lp", "ref", "old"))
    away, ratio = ref.detach() - lp.detach(), (lp - old).detach().exp()
    value = away.exp() - 1 - away
    found = grpo.k3(lp, ref.detach())
    assert close(found, value) and close(gradient(found.sum(), lp), 1 - away.exp())
    found = grpo.k3(lp, ref.detach(), old.detach())
    assert close(found, ratio * value)
    assert close(gradient(found.sum(), lp), ratio * (value + 1 - away.exp()))
