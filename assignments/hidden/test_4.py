"""Hidden variants of assignment 4: other numbers, other shapes, plain loops beside them."""

import math

import pytest
import torch
from draws import logprobs, mask, normal, rng

import tiny
from conftest import float64  # noqa: F401
from data import choose_pairs
from dpo import DPO, implicit_rewards, kto_loss, preference_loss
from tiny import read, same
from world import close, gradient


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def pairs(N):
    """Four log-probabilities and two lengths of N pairs."""
    draw = rng(f"lengths {N}")
    lengths = [torch.tensor([draw.randint(1, 9) for _ in range(N)]).double() for _ in range(2)]
    return [logprobs(f"{name} {N}", N) for name in "abcd"], lengths


@pytest.mark.parametrize("N", [1, 6])
def test_losses_elsewhere(N):
    """Each loss type at other settings, pair by pair; the gradients of chosen and rejected are
    those of finite differences."""
    logps, lengths = pairs(N)
    draw = rng("settings")
    beta, smooth, gamma = draw.uniform(0.1, 2), draw.uniform(0.1, 0.4), draw.uniform(0, 1)

    def by_hand(kind, c, r, ref_c, ref_r, n, m):
        h = (c - ref_c) - (r - ref_r)
        mean = c / n - r / m
        odds = (c / n - math.log(1 - math.exp(c / n))) - (r / m - math.log(1 - math.exp(r / m)))
        up, down = log_sigmoid(beta * h), log_sigmoid(-beta * h)
        return {"sigmoid": -(1 - smooth) * up - smooth * down,
                "robust": (-(1 - smooth) * up + smooth * down) / (1 - 2 * smooth),
                "hinge": max(0, 1 - beta * h), "ipo": (h - 1 / (2 * beta)) ** 2,
                "ipo mean": ((c - ref_c) / n - (r - ref_r) / m - 1 / (2 * beta)) ** 2,
                "cpo": -log_sigmoid(beta * (c - r)) - c / n,
                "simpo": -log_sigmoid(beta * mean - gamma),
                "orpo": -c / n - beta * log_sigmoid(odds)}[kind]
    for kind in ("sigmoid", "robust", "hinge", "ipo", "ipo mean", "cpo", "simpo", "orpo"):
        losses = preference_loss(*logps, *lengths, kind.split()[0], beta, smooth, gamma,
                                 kind == "ipo mean")
        rows = list(zip(*(x.tolist() for x in (*logps, *lengths))))
        assert close(losses, [by_hand(kind, *row) for row in rows], 1e-9), kind
        for i in (0, 1):
            found, step = gradient(losses.sum(), logps[i]), 1e-6
            ends = [[by_hand(kind, *row[:i], row[i] + s, *row[i + 1:]) for row in rows]
                    for s in (step, -step)]
            slopes = [(a - b) / (2 * step) for a, b in zip(*ends)]
            assert close(found, slopes, 1e-5), (kind, i)


@pytest.mark.parametrize("N", [1, 6])
def test_implicit_rewards_elsewhere(N):
    """beta times the log-ratio; without a reference beta log pi; per token where the loss is."""
    (logps, ref, _, _), (lengths, _) = pairs(N)
    beta = rng("beta").uniform(0.1, 2)
    rows = list(zip(logps.tolist(), ref.tolist(), lengths.tolist()))
    for kind, value in (("sigmoid", lambda p, q, n: p - q), ("kto", lambda p, q, n: p - q),
                        ("hinge", lambda p, q, n: p - q), ("cpo", lambda p, q, n: p),
                        ("simpo", lambda p, q, n: p / n), ("orpo", lambda p, q, n: p / n)):
        found = implicit_rewards(logps, ref, lengths, kind, beta)
        assert close(found, [beta * value(*row) for row in rows]), kind
    found = implicit_rewards(logps, ref, lengths, "ipo", beta, True)
    assert close(found, [beta * (p - q) / n for p, q, n in rows])


@pytest.mark.parametrize("N", [1, 6])
def test_kto_elsewhere(N):
    """1 - sigma(beta h - z0) of good answers, 1 - sigma(z0 - beta h) of bad ones, weighted."""
    (logps, ref, _, _), _ = pairs(N)
    draw = rng("kto")
    label = torch.tensor([draw.random() < 0.5 for _ in range(N)])
    beta, z0, good, bad = (draw.uniform(0.2, 2) for _ in range(4))
    losses = kto_loss(logps, ref, label, torch.tensor(z0).double(), beta, good, bad)
    z0 = torch.tensor(z0).double().item()
    hand = [(good if y else bad) * (1 - math.exp(log_sigmoid((1 if y else -1)
                                                             * (beta * (p - q) - z0))))
            for p, q, y in zip(logps.tolist(), ref.tolist(), label.tolist())]
    assert close(losses, hand)
    assert (gradient(losses.sum(), logps) < 0).tolist() == label.tolist()


@pytest.mark.usefixtures("float64")
def test_logps_elsewhere():
    """A sum over real tokens of other answers, with its gradient, whatever is on padding."""
    algo, (real, lengths) = tiny.make(DPO), mask("logps", 4, 5)
    ids = normal("ids", 4, 5).abs().mul(5).long() % 16
    batch = {"prompt_ids": torch.tensor([[16, 3, 4]] * 4), "prompt_index": torch.arange(4),
             "prompt_mask": torch.ones(4, 3).bool(), "completion_ids": ids,
             "completion_mask": real}
    found = algo.logps(algo.model, batch)
    everything = read(algo.model, batch).log_softmax(-1)
    hand = [sum(everything[b, t, ids[b, t]] for t in range(lengths[b])) for b in range(4)]
    assert same(found, torch.stack(hand))
    weights = list(algo.model.parameters())
    for ours, theirs in zip(torch.autograd.grad(found.sum(), weights, allow_unused=True),
                            torch.autograd.grad(sum(hand), weights, allow_unused=True)):
        assert theirs is None or same(ours, theirs)


@pytest.mark.parametrize("P, G", [(1, 2), (5, 4)])
@pytest.mark.parametrize("pair_selection", ["random", "best_worst"])
def test_pairs_elsewhere(P, G, pair_selection):
    """Of each group the candidate with the largest random number, if there is a contrast among
    those that are accepted."""
    draw = rng(f"pairs {P}")
    rewards = [[float(draw.randint(0, 2)) for _ in range(G)] for _ in range(P)]
    uniforms = [[draw.random() for _ in range(G)] for _ in range(P)]
    accepted = [[draw.random() < 0.8 for _ in range(G)] for _ in range(P)]
    rows = []
    for i in range(P):
        may = [j for j in range(G) if accepted[i][j]]
        values = [rewards[i][j] for j in may]
        if len(set(values)) > 1:
            good = [j for j in may if rewards[i][j] == max(values)]
            bad = [j for j in may if (rewards[i][j] == min(values)
                                      if pair_selection == "best_worst" else j not in good)]
            rows += [i * G + max(some, key=lambda j: uniforms[i][j]) for some in (good, bad)]
    found = choose_pairs(torch.tensor(rewards), torch.tensor(uniforms, dtype=torch.float64),
                         pair_selection, torch.tensor(accepted))
    assert found.tolist() == rows
