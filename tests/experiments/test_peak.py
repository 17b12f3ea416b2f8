"""
experiments/peak.py: the bandit by hand, the arms' gradients against closed forms, who sampled, the
verdict's rule on made-up figures, and the files that it writes.
"""

import math
import sys

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import peak  # noqa: E402
from peak import Arm, World  # noqa: E402

INF = math.inf
SMALL = World(peaks=(20, 70), steps=12, groups=2, num_generations=4, record=4)


def softmax(logits):
    exps = [math.exp(x) for x in logits]
    return [x / sum(exps) for x in exps]


# -- the bandit -----------------------------------------------------------------------------------


def test_reference_by_hand():
    """Laplace at 20 with scale 8: a step away costs a factor exp(-1/8) on either side; the masses,
    added up by geometric series, put .0001 on action 70."""
    p = peak.reference(World()).softmax(0)
    q = math.exp(-1 / 8)
    total = 1 + q * (1 - q ** 20) / (1 - q) + q * (1 - q ** 79) / (1 - q)   # 20 below, 79 above
    assert p.argmax() == 20 and p.dtype == torch.float64
    for action, distance in ((20, 0), (21, 1), (19, 1), (70, 50), (0, 20), (99, 79)):
        assert p[action].item() == pytest.approx(q ** distance / total)
    assert p[70].item() == pytest.approx(1.3e-4, rel=0.1)


def test_bumps_by_hand():
    """1 at the peak, exp(-1) ten actions away, exp(-25) fifty away."""
    bump = peak.bump(World(), 70)
    assert bump.shape == (100,) and bump[70] == 1
    for action in (60, 80):
        assert bump[action].item() == pytest.approx(math.exp(-1))
    assert bump[20].item() == pytest.approx(math.exp(-25))


def test_expected_reward_of_the_reference():
    """A plain sum over the 100 actions: .64 where the peak is aligned, .003 where it is far; for
    answers of several tokens the same."""
    weights = [math.exp(-abs(a - 20) / 8) for a in range(100)]
    for at, about in ((20, 0.642), (70, 0.0033)):
        exact = sum(w * math.exp(-((a - at) / 10) ** 2) for a, w in enumerate(weights))
        exact /= sum(weights)
        for tokens in (1, 3):
            logits = peak.reference(World()).expand(1, tokens, -1)
            found = peak.expected_reward(logits, peak.bump(World(), at)[None]).item()
            assert found == pytest.approx(exact) and found == pytest.approx(about, rel=0.02)


def test_sample_worked_example():
    """Probabilities .2, .3, .5; the draws .1, .2, .6 and one that is all but 1. A policy of which
    one action has all the mass gives that action alone."""
    logits = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log().view(1, 1, 3)
    draws = torch.tensor([[[0.1, 0.21, 0.6, 1 - 1e-16]]], dtype=torch.float64)
    assert peak.sample(logits, draws).tolist() == [[[0, 1, 2, 2]]]
    sure = torch.tensor([-1e9, 0.0, -1e9], dtype=torch.float64).view(1, 1, 3)
    assert peak.sample(sure, torch.tensor([[[0.0, 0.5]]]).double()).tolist() == [[[1, 1]]]
    even = torch.zeros(1, 1, 2, dtype=torch.float64)   # a draw on the border is the next action's
    assert peak.sample(even, torch.tensor([[[0.0, 0.5]]]).double()).tolist() == [[[0, 1]]]


def test_samples_have_the_policys_frequencies():
    """Over an even grid of draws each action comes up in proportion to its probability."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64).view(1, 1, 3)
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = peak.sample(logits, grid.view(1, 1, -1)).flatten().bincount(minlength=3) / 10_000
    assert counts.tolist() == pytest.approx(softmax([0.3, -1.0, 0.8]), abs=2e-4)


# -- gradients of one update ----------------------------------------------------------------------

LOGITS = [0.5, -0.2, 0.1]
REWARDS = [0.0, 0.3, 1.0]


def gradients(loss, groups, ref=LOGITS, beta=0.1):
    """The gradient of each table, all at LOGITS, given its one group of actions: (N, 3)."""
    N, actions = len(groups), torch.tensor(groups)                              # (N, B)
    table = torch.tensor([LOGITS] * N, dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([ref] * N, dtype=torch.float64)
    logprobs = table.log_softmax(-1).gather(1, actions)[..., None]              # (N, B, 1)
    ref_logprobs = ref.log_softmax(-1).gather(1, actions)[..., None]
    rewards = torch.tensor(REWARDS, dtype=torch.float64)[actions]
    peak.arm_loss(loss, logprobs, ref_logprobs, rewards, torch.zeros_like(rewards) + 0.5,
                  actions.shape[1], beta).backward()
    return table.grad


def onehot(action):
    return torch.eye(3, dtype=torch.float64)[action]


def test_pg_is_the_policy_gradient_times_k_minus_1_over_k():
    """Over all 9 groups of K = 2 answers, by their probability: the mean gradient is -(K - 1) / K
    times that of the expected reward, pi_a (R_a - J), for the group's mean contains the answer."""
    pi = softmax(LOGITS)
    groups = [(a, b) for a in range(3) for b in range(3)]
    weights = torch.tensor([pi[a] * pi[b] for a, b in groups], dtype=torch.float64)
    found = (weights[:, None] * gradients("pg", groups)).sum(0)
    J = sum(p * r for p, r in zip(pi, REWARDS))
    exact = [-(1 / 2) * p * (r - J) for p, r in zip(pi, REWARDS)]
    assert found.tolist() == pytest.approx(exact, abs=1e-12)


def test_pg_positive_is_the_better_half_alone():
    """Of the group (0, 2), rewards 0 and 1, advantages -1/2 and 1/2: pg is half of each, over two
    answers; the positive half lacks action 0's."""
    pi = torch.tensor(softmax(LOGITS), dtype=torch.float64)
    up, down = onehot(2) - pi, onehot(0) - pi                # gradients of log pi
    assert torch.allclose(gradients("pg", [(0, 2)])[0], -(up - down) / 4)
    assert torch.allclose(gradients("pg positive", [(0, 2)])[0], -up / 4)


def test_rft_imitates_the_best():
    """softmax - onehot of the best of the group, for each table by itself."""
    pi = torch.tensor(softmax(LOGITS), dtype=torch.float64)
    found = gradients("rft", [(0, 1, 0), (1, 2, 0)])
    assert torch.allclose(found, torch.stack([pi - onehot(1), pi - onehot(2)]))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_and_ipo_at_the_reference(beta):
    """At pi = pi_ref the margin is 0: -beta / 2 (chosen - rejected) for dpo, -1 / beta times the
    same for ipo. A group without a contrast gives nothing."""
    direction = torch.stack([onehot(2) - onehot(0), 0 * onehot(0)])
    groups = [(2, 0), (1, 1)]
    assert torch.allclose(gradients("dpo", groups, beta=beta), -beta / 2 * direction)
    assert torch.allclose(gradients("ipo", groups, beta=beta), -1 / beta * direction)


def test_dpo_away_from_the_reference():
    """-beta sigma(-beta m) (chosen - rejected), m the margin: the reference is used."""
    ref, beta = [0.0, 1.0, -2.0], 0.3
    margin = (LOGITS[2] - ref[2]) - (LOGITS[0] - ref[0])
    weight = beta / (1 + math.exp(beta * margin))
    found = gradients("dpo", [(2, 0)], ref, beta)[0]
    assert torch.allclose(found, -weight * (onehot(2) - onehot(0)))


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="choose from"):
        gradients("ppo", [(0, 1)])


# -- who sampled ----------------------------------------------------------------------------------


def sampled_from(monkeypatch, arm, world=SMALL):
    """The logits that each update's actions were sampled from."""
    seen, sample = [], peak.sample

    def spy(logits, uniforms):
        seen.append(logits.clone())
        return sample(logits, uniforms)
    monkeypatch.setattr(peak, "sample", spy)
    peak.train(arm, 0.3, 0.1, world, range(2))
    return seen


@pytest.mark.parametrize("loss", ["rft", "dpo", "ipo"])
def test_offline_samples_from_the_reference_alone(monkeypatch, loss):
    """Every update's, though the policy moves; online they move along from the second on."""
    ref = peak.reference(SMALL)
    offline = sampled_from(monkeypatch, Arm(loss, INF))
    assert len(offline) == SMALL.steps and all(bool((z == ref).all()) for z in offline)
    online = sampled_from(monkeypatch, Arm(loss, 1))
    assert (online[0] == ref).all()
    assert all(not torch.equal(a, b) for a, b in zip(online, online[1:]))


def test_semi_online_renews_every_s_updates(monkeypatch):
    """With s = 5 in 12 updates: at 0, 5 and 10."""
    seen = sampled_from(monkeypatch, Arm("rft", 5))
    moved = [i for i in range(1, 12) if not torch.equal(seen[i], seen[i - 1])]
    assert moved == [5, 10]


def test_sync_1_is_online_bit_for_bit(monkeypatch):
    """An arm with s = 1 is the same, bit for bit, as one that samples from the live policy, which
    is put in the sampler's place; with s = 2 it is not."""
    renewed = peak.train(Arm("dpo", 1), 0.3, 0.1, SMALL, range(2)).rewards
    lagging = peak.train(Arm("dpo", 2), 0.3, 0.1, SMALL, range(2)).rewards
    live, adam, sample = [], torch.optim.Adam, peak.sample
    monkeypatch.setattr(torch.optim, "Adam",
                        lambda params, **kw: live.extend(params) or adam(live, **kw))
    monkeypatch.setattr(peak, "sample", lambda _, draws: sample(live[0].detach(), draws))
    online = peak.train(Arm("dpo", INF), 0.3, 0.1, SMALL, range(2)).rewards
    assert torch.equal(renewed, online) and not torch.equal(renewed, lagging)


@pytest.mark.parametrize("arm", peak.ARMS, ids=lambda arm: arm.name)
def test_seeds_and_peaks_are_independent(arm):
    """A run of 3 seeds and 2 peaks contains the run of one seed at one peak, bit for bit: no table
    feels another, and a seed's random numbers are its own."""
    three = peak.train(arm, 0.3, 0.1, SMALL, [7, 0, 3]).rewards
    alone = peak.train(arm, 0.3, 0.1, SMALL._replace(peaks=(70,)), [3]).rewards
    assert torch.equal(three[1, 2], alone[0, 0])
    assert not torch.equal(three[1, 0], three[1, 2])


def test_all_arms_start_at_the_reference():
    """The first measurement is before the first update."""
    for arm in (Arm("rft", INF), Arm("pg")):
        run = peak.train(arm, 0.3, 0.1, SMALL, [0])
        assert run.updates == [0, 4, 8, 12] and run.rewards.shape == (2, 1, 4)
        assert run.rewards[:, 0, 0].tolist() == pytest.approx([0.642, 0.0033], rel=0.02)
