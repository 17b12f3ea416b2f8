"""
MaxRL's normaliser, --scale_rewards mean, on all groups of K sequences: which objective it climbs;
and positive or negative advantages alone.
"""

import pytest
import torch

import rft
from grpo import GRPOConfig, batch_advantages, group_advantages
from world import (LENGTHS, LOGITS, MASK, PI, REWARD, close, gradient, group_gradient, groups_of,
                   token_logprobs)

RIGHT = (REWARD > 0).double()                        # (15,), rewards 0 and 1
P = (PI * RIGHT).sum()                               # the chance of a right answer
GRAD_P = gradient(P, LOGITS)


def grad_pass_at(k):
    """The gradient of pass@k = 1 - (1 - p)^k, by autograd."""
    return gradient(1 - (1 - P) ** k, LOGITS)


def mean_advantages(rewards, **flags):
    return group_advantages(rewards, scale_rewards="mean", **flags)


def signed(rewards, advantage_sign, **settings):
    """The advantages of one sign alone, of groups (P, G), as the class asks for them."""
    config = GRPOConfig(num_generations=rewards.shape[1], advantage_sign=advantage_sign, **settings)
    return batch_advantages({"rewards": rewards.flatten()}, config, ["coin"], [1.0],
                            rewards.dtype).view_as(rewards)


# -- what is climbed ------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 2, 3])
def test_dividing_by_the_mean_climbs_a_harmonic_sum_of_pass_at_k(K):
    """Without a baseline the expected gradient is sum_{k <= K} 1/k grad pass@k, the expansion of
    log p cut off after K terms (2602.02710; derived here: E[r grad log pi / mean] is grad log p
    times the chance of any success). One answer gives the policy gradient."""
    groups = groups_of(K)
    found = group_gradient(mean_advantages(RIGHT[groups], advantage="reinforce"), groups, LOGITS)
    assert close(found, -sum(grad_pass_at(k) / k for k in range(1, K + 1)))
    assert close(found, -GRAD_P) == (K == 1)


@pytest.mark.parametrize("K", [2, 3])
def test_with_the_mean_for_baseline_the_sum_is_a_term_shorter(K):
    """(r - mean) / mean leaves groups without a success at 0, where the baseline would have had a
    part: sum_{k < K}. Two answers give the policy gradient. RLOO's baseline is K / (K - 1) times as
    large."""
    groups = groups_of(K)
    found = group_gradient(mean_advantages(RIGHT[groups]), groups, LOGITS)
    assert close(found, -sum(grad_pass_at(k) / k for k in range(1, K)))
    assert close(found, -GRAD_P) == (K == 2)
    rloo = group_gradient(mean_advantages(RIGHT[groups], advantage="rloo"), groups, LOGITS)
    assert close(rloo, K / (K - 1) * found)


def test_the_harmonic_sum_is_that_of_log_p():
    """sum_{k <= K} 1/k grad pass@k = (1 - (1 - p)^K) / p grad p, and with K it goes to grad log p:
    imitation of the right answers."""
    log_p = gradient(P.log(), LOGITS)
    for K in (1, 2, 8, 400):
        total = sum(grad_pass_at(k) / k for k in range(1, K + 1))
        assert close(total, (1 - (1 - P) ** K) / P * GRAD_P)
        assert close(total, log_p, 1e-6) == (K == 400)


def test_a_group_imitates_its_right_answers_equally():
    """Without a baseline a group's gradient is the mean of its right answers', which is what RFT
    does with the answers that it keeps, up to the length: each of k right answers of K weighs
    K / k."""
    groups = groups_of(3)
    advantages, right = mean_advantages(RIGHT[groups], advantage="reinforce"), RIGHT[groups]
    shares = advantages / 3                                                       # (3375, 3)
    some = right.sum(1) > 0
    assert close(shares[some].sum(1), 1) and (shares[~some] == 0).all()
    assert close(shares[some], right[some] / right[some].sum(1, keepdim=True))
    # Answers of one length, so that RFT's weight a token is its weight an answer.
    rows = (LENGTHS == 3).nonzero().squeeze(1)[:4]
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    kept = rft.token_weights(MASK[rows], rft.kept(rewards).flatten())
    lp = token_logprobs(LOGITS)[rows]
    share = mean_advantages(rewards, advantage="reinforce").flatten() / 4
    assert close(gradient((kept * lp).sum() * 3, LOGITS),
                 gradient((share[:, None] * lp).sum(), LOGITS))


# -- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewards, advantages", [
    ([1, 0, 0, 0], [3, -1, -1, -1]),                 # docstring of group_advantages
    ([1, 1, 1, 0], [1 / 3, 1 / 3, 1 / 3, -1]),
    ([0, 0, 0, 0], [0, 0, 0, 0]), ([1, 1, 1, 1], [0, 0, 0, 0]),
    ([-1, 0, 0, 0], [0, 0, 0, 0]),                   # a negative mean: not [3, -1, -1, -1]
    ([2, -2, 0, 0], [0, 0, 0, 0])])                  # a mean of 0, and not all of them
def test_dividing_by_the_mean_worked_example(rewards, advantages):
    """A mean of 0 or below leaves its group at 0, and other groups as they are."""
    found = mean_advantages(torch.tensor([rewards, [1.0, 0, 0, 0]]))
    assert close(found, [advantages, [3, -1, -1, -1]], 1e-6)


def test_a_small_mean_is_no_danger():
    """Of rewards that are never negative the largest is at most K times the mean: no advantage is
    above K - 1, none below -1, however small the rewards."""
    rewards = torch.rand(1000, 5, generator=torch.Generator().manual_seed(0)) ** 9 * 1e-30
    found = mean_advantages(rewards)
    assert found.isfinite().all() and found.max() <= 4.001 and found.min() >= -1.001
    assert found.max() > 2


# -- one sign alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 3])
def test_the_two_signs_add_up_and_point_the_same_way(K):
    """Positive and negative advantages alone have gradients that add up to that of both
    (2506.01347). In expectation they are parallel, since E[grad log pi] = 0: with rewards 0 and 1
    the positive half is (K - 1)/K (1 - p) grad p, the negative one (K - 1)/K p grad p. What tells
    them apart is the finite sample, and which prompts they dwell on: hard ones and easy ones."""
    groups, found = groups_of(K), {}
    for name in ("both", "positive", "negative"):
        advantages = signed(RIGHT[groups], name, scale_rewards="none")
        found[name] = group_gradient(advantages, groups, LOGITS)
        assert (advantages >= 0).all() == (name == "positive")
        assert (advantages <= 0).all() == (name == "negative")
    assert close(found["positive"] + found["negative"], found["both"])
    assert close(found["positive"], -(K - 1) / K * (1 - P) * GRAD_P)
    assert close(found["negative"], -(K - 1) / K * P * GRAD_P)


def test_positive_advantages_without_a_baseline_are_rejection_sampling():
    """With rewards of +1 and -1 and no baseline, as in 2506.01347, the positive ones are RFT's kept
    answers, each with weight 1."""
    rewards = 2 * RIGHT[groups_of(2)] - 1
    flags = dict(advantage="reinforce", scale_rewards="none", reward="model")   # may be below 0
    assert torch.equal(signed(rewards, "positive", **flags), rft.kept(rewards))
    assert torch.equal(signed(rewards, "negative", **flags), rft.kept(rewards) - 1)


def test_the_sign_is_taken_after_everything_else():
    """[1, 0, 0, 0] at group scale: positive [1.5, 0, 0, 0], negative [0, -.5, -.5, -.5]: not the
    deviation of what is left."""
    rewards = torch.tensor([[1.0, 0, 0, 0]])
    settings = dict(advantage_eps=0)
    assert close(signed(rewards, "positive", **settings), [[1.5, 0, 0, 0]], 1e-6)
    assert close(signed(rewards, "negative", **settings), [[0, -0.5, -0.5, -0.5]], 1e-6)
