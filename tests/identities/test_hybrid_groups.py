"""
What hybrid.py settles for a whole batch: advantages with a demonstration in the group, NFT, gates,
hints' lengths, averages. By hand, and against GRPO in closed form.
"""

import itertools
import math

import pytest
import torch

import grpo
from hybrid import (decay, gate_rows, group_advantages, joint_advantages, nft_loss, policy_loss,
                    token_weights, top_share)
from world import LOGITS, MASK, PI, close, gradient, table, token_logprobs

# -- advantages -----------------------------------------------------------------------------------


def test_group_advantages_are_grpos():
    """On all 0/1 groups of four and on a group of other rewards, the defaults of grpo.py."""
    groups = torch.tensor([*itertools.product([0.0, 1.0], repeat=4), (0.3, -2.0, 5.0, 0.1)])
    assert torch.equal(group_advantages(groups), grpo.group_advantages(groups))


@pytest.mark.parametrize("K", [2, 4, 8])
def test_a_right_demonstration_in_a_group_that_failed(K):
    """K wrong answers and a right demonstration: -1 / sqrt(K + 1) for each and K / sqrt(K + 1) for
    the demonstration, with the sample's deviation, 1 / sqrt(K + 1) (2504.14945). Without it all are
    0. (With the population's, -1 / sqrt K and sqrt K.)"""
    wrong, shown = torch.zeros(1, K, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    together = group_advantages(torch.cat([wrong, shown[:, None]], 1), eps=0)
    assert close(together, [[-1 / math.sqrt(K + 1)] * K + [K / math.sqrt(K + 1)]])
    found = joint_advantages(wrong, shown)
    assert close(found, together[0], 1e-3 * K) and close(found.sum(), 0)
    assert not joint_advantages(wrong, shown, join=False).any()
    assert not joint_advantages(1 - wrong, shown).any()         # all right: nothing to learn
    assert joint_advantages(1 - wrong, 0 * shown)[-1] < 0       # a wrong one is pushed down


def test_the_worked_example_of_luffy():
    """[0, 0, 0, 0, 1]: -.447 and 1.79 (docstring of group_advantages)."""
    found = group_advantages(torch.tensor([[0.0, 0, 0, 0, 1]]))
    assert close(found, [[-0.447] * 4 + [1.79]], 2e-3)


def test_joint_advantages_keep_the_order_of_rows():
    """Two groups of three, a demonstration for the first: own answers group by group, then the
    demonstration; the second group is as without it."""
    groups = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    found = joint_advantages(groups, torch.tensor([1.0]))
    first = group_advantages(torch.tensor([[1.0, 0, 0, 1]]))[0]
    second = group_advantages(groups[1:])[0]
    assert torch.equal(found, torch.cat([first[:3], second, first[3:]]))
    alone = joint_advantages(groups, torch.tensor([1.0]), join=False)
    assert torch.equal(alone[:6], group_advantages(groups).flatten()) and alone[6] == 0
    assert torch.equal(joint_advantages(groups, torch.zeros(0)), alone[:6])   # no demonstration


def test_policy_loss_is_grpos():
    """PPO's clipped loss and ratio (1707.06347, eq. 7), with one and with two epsilons."""
    lp, old = token_logprobs(LOGITS), token_logprobs(table(1))
    A = torch.randn(15, generator=torch.Generator().manual_seed(3)).double()
    for flags in ((), (0.1,), (0.1, 0.4)):
        found, reference = policy_loss(lp, old, A[:, None], *flags), grpo.policy_loss(
            lp, old, A, MASK, *(flags or (0.2,)))
        assert torch.equal(found[0], reference[0]) and torch.equal(found[1], reference[1])


# -- NFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 3, 4, 8])
def test_nft_on_policy_is_grpo(K):
    """At pi = pi_old the gradient of every right and wrong answer is GRPO's, with the population's
    deviation, in groups of every composition (2505.18116): +sqrt((1 - s) / s), -sqrt(s / (1 - s)).
    Its weight is the square root of (1 - s) / s; with (1 - s) alone it is that of Dr. GRPO."""
    for k in range(1, K):
        rewards = torch.tensor([[1.0] * k + [0.0] * (K - k)], dtype=torch.float64)
        A = grpo.group_advantages(rewards, std_correction=0, advantage_eps=0)[0]
        lp = torch.randn(K, 3, generator=torch.Generator().manual_seed(k)).double()
        lp.requires_grad_()
        success = torch.full((K, 1), k / K, dtype=torch.float64)
        losses = nft_loss(lp, lp.detach(), rewards.T > 0.5, success)
        assert close(gradient(losses.sum(), lp), -A[:, None].expand(K, 3)) and close(losses, 0)
        s = k / K
        plain = gradient((losses * (1 - s) / math.sqrt((1 - s) / s)).sum(), lp)
        assert close(plain, -(rewards.T - s).expand(K, 3))
        assert close(A[rewards[0] > 0], math.sqrt((1 - s) / s))


def test_nft_worked_example():
    """One right of four: gradients of -1.73 if right and +.577 if wrong (docstring of nft_loss)."""
    lp = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    losses = nft_loss(lp, lp.detach(), torch.tensor([[True], [False]]), torch.full((2, 1), 0.25))
    assert close(losses, 0) and close(gradient(losses.sum(), lp), [[-1.73], [0.577]], 3e-3)


def test_nft_imitates_what_is_left_of_the_old_policy():
    """Off the old policy: with pi_right and pi_wrong the parts of a mixture pi_old, a policy pi =
    R pi_old that stands for pi_right leaves pi_wrong = (pi_old - s pi) / (1 - s), and the loss of a
    wrong token is - log(pi_wrong / pi_old), times the group's weight; the slope by finite
    differences."""
    s, old = 0.3, 0.2
    weight = math.sqrt((1 - s) / s)

    def wrong(pi):
        logprobs = torch.tensor([[pi]], dtype=torch.float64).log().requires_grad_()
        loss = nft_loss(logprobs, torch.tensor([[old]], dtype=torch.float64).log(),
                        torch.tensor([[False]]), torch.tensor([[s]], dtype=torch.float64))
        return loss.item(), gradient(loss.sum(), logprobs).item()
    for pi in (0.05, 0.2, 0.4, 0.55):
        left = (old - s * pi) / (1 - s)
        assert wrong(pi)[0] == pytest.approx(-weight * math.log(left / old))
        h = 1e-6
        slope = (wrong(pi * math.exp(h))[0] - wrong(pi * math.exp(-h))[0]) / (2 * h)
        assert wrong(pi)[1] == pytest.approx(slope, rel=1e-6) and slope > 0
    # Where less than .1 of pi_old is left, or less than nothing (R = 3.25 and 4), the value stays
    # and the token is pushed down all the same: d/dlog pi of (1 - s R) / (1 - s) over the .1.
    for pi in (0.65, 0.8):
        assert wrong(pi)[0] == pytest.approx(-weight * math.log(0.1))
        assert wrong(pi)[1] == pytest.approx(weight * s * pi / old / (1 - s) / 0.1)


def test_nft_of_a_right_token_is_the_weighted_likelihood():
    """Off the old policy as on it: - sqrt((1 - s) / s) log(pi / pi_old)."""
    lp, old = token_logprobs(LOGITS), token_logprobs(table(1)).detach()
    losses = nft_loss(lp, old, torch.ones(15, 1).bool(), torch.full((15, 1), 0.2).double())
    found = gradient((losses * MASK * PI.detach()[:, None]).sum(), LOGITS)
    closed = gradient((-2 * lp * MASK * PI.detach()[:, None]).sum(), LOGITS)
    assert close(found, closed)


def test_nft_of_a_flat_group_is_finite():
    """A share of 0 or 1 is held off the ends, so that no weight is infinite."""
    for success in (0.0, 1.0):
        lp = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
        losses = nft_loss(lp, lp.detach(), torch.tensor([[True], [False]]),
                          torch.full((2, 1), success).double())
        assert losses.isfinite().all() and gradient(losses.sum(), lp).isfinite().all()


# -- gates, shares, hints -------------------------------------------------------------------------


def test_gate_rows_worked_example():
    """Three groups of two, the first two demonstrated, the first failed."""
    found = gate_rows(torch.tensor([True, False]), 3, 2)
    assert found.int().tolist() == [0, 0, 1, 1, 1, 1, 1, 0]
    assert gate_rows(torch.zeros(0).bool(), 2, 2).all()


def test_every_prompt_is_trained_in_one_way():
    """On every outcome of three demonstrated groups of two, each prompt counts with its own answers
    or with its demonstration, never with both or neither."""
    for failed in itertools.product([True, False], repeat=3):
        rows = gate_rows(torch.tensor(failed), 3, 2)
        own, shown = rows[:6].view(3, 2), rows[6:]
        assert (own[:, 0] == own[:, 1]).all() and (own[:, 0] != shown).all()


def test_decay_worked_example():
    """From .9 to .1 in 4 steps, half a cosine (docstring of decay); and from .1 up to .9."""
    found = [decay(step, 0.9, 0.1, 4) for step in range(6)]
    assert found == pytest.approx([0.9, 0.783, 0.5, 0.217, 0.1, 0.1], abs=5e-4)
    assert [decay(step, 0.1, 0.9, 4) + f for step, f in enumerate(found)] == pytest.approx([1] * 6)
    assert decay(0, 0.5, 0.5, 1) == decay(9, 0.5, 0.5, 1) == 0.5


def test_top_share_worked_example():
    """[.1, .7, .3, .9] under [1, 1, 1, 0] at .5 (docstring of top_share); a share never leaves
    nothing, 1 leaves all, and a row without a hint has none."""
    values = torch.tensor([[0.1, 0.7, 0.3, 0.9]] * 2)
    mask = torch.tensor([[True, True, True, False], [False] * 4])
    for share, kept in ((0.5, [0, 1, 1, 0]), (0.01, [0, 1, 0, 0]), (1.0, [1, 1, 1, 0])):
        assert top_share(values, mask, share).int().tolist() == [kept, [0, 0, 0, 0]]


def test_top_share_keeps_as_many_as_it_says():
    """The ceiling of share times the number, also where that is a whole number: 5, 10, ... tokens
    at .2 give 1, 2, ...; equal values are not all kept."""
    for n in range(1, 101):
        found = top_share(torch.zeros(1, 120), torch.arange(120)[None] < n, 0.2)
        assert found.sum() == -(-n // 5), n
        assert not found[:, n:].any()


def test_token_weights_worked_example():
    """Shares .9 and .1, three own tokens and two demonstrated ones: .3 and .05 each (docstring of
    token_weights). Where there is none of a kind, its share is lost."""
    own = torch.tensor([[1, 1, 0], [1, 0, 0]])
    demonstrated = torch.tensor([[0, 0, 0], [0, 1, 1]])
    found = token_weights(own, demonstrated, 0.9, 0.1)
    assert close(found, [[0.3, 0.3, 0], [0.3, 0.05, 0.05]], 1e-7)
    assert close(token_weights(own, 0 * own), own / 3, 1e-7)
    assert token_weights(own, demonstrated).sum() == pytest.approx(2)
    assert not token_weights(0 * own, 0 * own).any()
