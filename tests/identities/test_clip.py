"""
Ratios and clips of grpo.py: PPO's, the higher clip of DAPO, CISPO, and GSPO's ratio of an answer.
"""

import math

import pytest
import torch

import grpo
from world import (LENGTHS, LOGITS, MASK, PI, REWARD, close, expected, gradient, sequence_logprobs,
                   table, token_logprobs)


def one_token(ratio, advantage, **flags):
    """Loss, d loss / d log pi and the clip flag of a single token whose ratio to the old policy is
    `ratio`."""
    logprobs = torch.tensor([[math.log(ratio) - 1.5]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.full((1, 1), -1.5, dtype=torch.float64), torch.tensor([1.0 * advantage])
    losses, _, clipped = grpo.policy_loss(logprobs, old, advantages, torch.ones(1, 1).bool(),
                                          **flags)
    return losses.item(), gradient(losses.sum(), logprobs).item(), clipped.item()


@pytest.mark.parametrize("ratio, advantage, loss, dead", [
    (1.5, +1, -1.2, True),     # a good token, already likelier: enough has been done
    (1.1, +2, -2.2, False),
    (0.5, +1, -0.5, False),    # a good token grown unlikely: full gradient back
    (0.5, -1, +0.8, True),     # a bad token, already unlikelier: enough
    (0.9, -2, +1.8, False),
    (1.5, -1, +1.5, False),    # a bad token grown likelier: the clip never protects a mistake
])
def test_ppo_clip_worked_values_and_dead_zones(ratio, advantage, loss, dead):
    """max(-A r, -A clip(r, .8, 1.2)): gradient 0 in two corners, -A r elsewhere, and the flag says
    which (PPO, 1707.06347, eq. 7)."""
    found, slope, clipped = one_token(ratio, advantage, epsilon=0.2, epsilon_high=0.2)
    assert found == pytest.approx(loss)
    assert slope == pytest.approx(0 if dead else -advantage * ratio)
    assert clipped == dead


def test_the_clip_is_pessimistic():
    """The clipped loss is never below the unclipped one, -ratio A, and equals it inside the band
    (PPO, section 3)."""
    lp, old = token_logprobs(LOGITS), token_logprobs(table(1))
    losses, ratio, clipped = grpo.policy_loss(lp, old, REWARD, MASK)
    unclipped = -ratio * REWARD[:, None]
    inside = (ratio > 0.8) & (ratio < 1.2)
    assert close(ratio, (lp - old).exp())
    assert (losses >= unclipped).all() and (losses > unclipped).any()
    assert inside.any() and close(losses[inside], unclipped[inside])
    assert not clipped[inside].any()
    assert (clipped == ((losses != unclipped) & MASK)).all()         # padding is never counted


def test_the_upper_clip_has_its_own_epsilon():
    """epsilon .2, epsilon_high .28: the band is [.8, 1.28] (clip-higher of DAPO, 2503.14476,
    section 3.1)."""
    flags = dict(epsilon=0.2, epsilon_high=0.28)
    assert one_token(1.25, +1, **flags) == pytest.approx((-1.25, -1.25, False))
    assert one_token(1.50, +1, **flags) == pytest.approx((-1.28, 0, True))
    assert one_token(0.75, -1, **flags) == pytest.approx((+0.80, 0, True))


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    """-sg(min(r, 1 + epsilon_high)) A log pi (2506.13585, eq. 4): a gradient where PPO has none;
    small ratios stay."""
    assert one_token(2.0, +1) == pytest.approx((-1.2, 0, True))
    loss, slope, clipped = one_token(2.0, +1, loss_type="cispo")
    assert loss == pytest.approx(-1.2 * (math.log(2) - 1.5))
    assert slope == pytest.approx(-1.2) and clipped
    loss, slope, clipped = one_token(0.5, -1, loss_type="cispo")
    assert loss == pytest.approx(0.5 * (math.log(0.5) - 1.5))
    assert slope == pytest.approx(0.5) and not clipped
    found = one_token(2.0, +1, loss_type="cispo", epsilon_high=4)
    assert found[1:] == pytest.approx((-2, False))


def test_gspo_ratio_is_the_geometric_mean():
    """(prod r_t)^(1/|y|) over the real tokens, the same for each of them (GSPO, 2507.18071, eq. 7);
    then PPO's clip."""
    old = torch.full((2, 3), -2.0, dtype=torch.float64)
    moved = torch.tensor([[0.1, 0.3, 9.0], [0.1, 0.2, 0.6]], dtype=torch.float64)   # 9: padding
    mask = torch.tensor([[True, True, False], [True, True, True]])
    losses, ratio, clipped = grpo.policy_loss(old + moved, old, torch.tensor([-1.0, 2.0]), mask,
                                              importance_sampling_level="sequence")
    assert close(ratio, [[math.exp(0.2)] * 3, [math.exp(0.3)] * 3])
    assert close(losses, [[math.exp(0.2)] * 3, [-2.4] * 3])
    assert clipped.tolist() == [[False] * 3, [True] * 3]             # e^.3 = 1.35 is above 1.2


def test_gspo_of_an_answer_that_is_left_out_is_finite():
    """A row without a token in the loss (a masked truncated answer) has ratio 1 and no 0/0."""
    lp = torch.full((1, 3), -2.0, dtype=torch.float64)
    losses, ratio, clipped = grpo.policy_loss(lp, lp - 1, torch.ones(1), torch.zeros(1, 3).bool(),
                                              importance_sampling_level="sequence")
    assert close(ratio, 1) and losses.isfinite().all() and not clipped.any()


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_gspo_gradient_at_the_sampling_policy(loss_type):
    """Where pi = pi_old the sequence ratio's gradient is the mean over tokens of grad log pi: with
    the token-mean aggregation, sum pi A 1/|y| grad log pi (2507.18071, section 4.2)."""
    lp = token_logprobs(LOGITS)
    losses, _, _ = grpo.policy_loss(lp, lp.detach(), REWARD, MASK, loss_type=loss_type,
                                    importance_sampling_level="sequence")
    found = gradient(expected(losses / LENGTHS[:, None], PI), LOGITS)
    closed = gradient((PI.detach() * REWARD / LENGTHS * sequence_logprobs(LOGITS)).sum(), LOGITS)
    assert close(found, -closed)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_at_the_edge_of_the_band_and_without_advantage_nothing_is_cut_off(loss_type):
    """A ratio of exactly 1 in a band of no width keeps its whole gradient, and is not counted as
    clipped; nor is a ratio beyond the band whose token has no gradient to lose."""
    for advantage in (1, -1):
        _, slope, clipped = one_token(1.0, advantage, epsilon=0.0, loss_type=loss_type)
        assert slope == -advantage and not clipped
    if loss_type == "grpo":
        assert [one_token(ratio, 0)[1:] for ratio in (0.5, 1.5)] == [(0, False)] * 2
