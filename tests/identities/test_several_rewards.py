"""
Several rewards at once: their sum normalised, or each normalised by itself and then added (GDPO,
2601.05242).
"""

import pytest
import torch

from grpo import GRPOConfig, batch_advantages, group_advantages
from world import LOGITS, PI, close, gradient, group_gradient, groups_of


def advantages(aggregation, rewards, weights=None, **settings):
    """The advantages (P, G) of several rewards (P, G), as the class asks for them: `rewards` is
    their weighted sum, and each stands beside it under its name."""
    weights = weights or [1.0] * len(rewards)
    config = GRPOConfig(num_generations=rewards[0].shape[1], reward="verifier,format",
                        multi_objective_aggregation=aggregation, **settings)
    names = [f"r{i}" for i in range(len(rewards))]
    batch = {f"rewards/{name}": r.flatten() for name, r in zip(names, rewards)}
    batch["rewards"] = sum(w * r for w, r in zip(weights, rewards)).flatten()
    return batch_advantages(batch, config, names, weights, rewards[0].dtype).view_as(rewards[0])


def summed(rewards, *more, **settings):
    return advantages("sum_then_normalize", rewards, *more, **settings)


def each(rewards, *more, **settings):
    return advantages("normalize_then_sum", rewards, *more, **settings)


# -- by hand --------------------------------------------------------------------------------------


def test_two_patterns_that_the_sum_cannot_tell_apart():
    """The example of batch_advantages and of 2601.05242: an answer that is better by one reward,
    and one that is better by two. The sum says [.71, -.71] of both; each by itself .71 and 1.41,
    then divided by the deviation of the batch, sqrt(5/3)."""
    rewards = [torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[0.0, 0], [1, 0]])]
    a = 0.5 ** 0.5
    assert close(summed(rewards, advantage_eps=0), [[a, -a], [a, -a]], 1e-6)
    size = (5 / 3) ** 0.5
    expected = [[a / size, -a / size], [2 * a / size, -2 * a / size]]
    found = each(rewards, advantage_eps=0)
    assert close(found, expected, 1e-6)
    assert close(found, [[0.55, -0.55], [1.10, -1.10]], 5e-3)
    assert close(found.std(), 1)


def test_weights_count_after_the_division():
    """A reward ten times as large in its numbers, [10, 0], and one that contradicts it, [0, 1]: the
    sum sees the first alone. Each by itself they cancel, and with weights 1 and 2 the second
    wins."""
    rewards = [torch.tensor([[10.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, 0]])]
    assert summed(rewards)[0, 0] > 0.7
    assert close(each(rewards, advantage_eps=0)[0], 0, 1e-6) and each(rewards)[1, 0] > 0
    assert each(rewards, [1.0, 2.0])[0, 0] < -0.5 and summed(rewards, [1.0, 2.0])[0, 0] > 0.5


def test_the_scale_of_a_reward_is_forgotten():
    """Each by itself, a reward may be multiplied and shifted and nothing changes; the sum
    changes."""
    generator = torch.Generator().manual_seed(0)
    one, two = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64)
    settings = dict(advantage_eps=0)
    assert close(each([one, two], **settings), each([30 * one - 7, two], **settings))
    assert not close(summed([one, two], **settings), summed([30 * one - 7, two], **settings), 0.1)


def test_one_reward_differs_by_the_batch_deviation_alone():
    """Where the second reward is the same for all, what is left is GRPO divided by one number."""
    one = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = group_advantages(one, advantage_eps=0)
    assert close(each([one, torch.ones_like(one)], advantage_eps=0), plain / plain.std())


@pytest.mark.parametrize("advantage_eps", [0, 1e-4])
def test_groups_that_are_equal_in_every_reward_get_exactly_zero(advantage_eps):
    """Seven rewards of 0.1 leave a rounding error in float32; so does the mean of the batch. The
    zero is exact all the same, also where no group of the batch differs."""
    equal, mixed = torch.full((1, 7), 0.1), torch.tensor([[0.1] * 6 + [1.0]])
    settings = dict(advantage_eps=advantage_eps)
    found = each([torch.cat([equal, mixed]), torch.cat([equal, mixed.flip(1)])], **settings)
    assert (found[0] == 0).all() and found[1, 0] > 0.5
    assert (each([equal, 3 * equal], **settings) == 0).all()


def test_equal_sums_of_rewards_that_differ_still_teach():
    """Rewards [1, 0] and [0, 2] with weights 2 and 1 add up to 2 for both answers: their sum is
    flat. Each by itself they do not cancel, since their weights differ."""
    rewards = [torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 2]])]
    assert (summed(rewards, [2.0, 1.0]) == 0).all()
    assert close(each(rewards, [2.0, 1.0]), [[0.5 ** 0.5, -0.5 ** 0.5]], 1e-3)


# -- in expectation -------------------------------------------------------------------------------


def test_each_by_itself_climbs_the_weighted_sum_where_the_normalised_sum_does_not():
    """Two rewards of 0 and 1, all 225 groups of two answers. A pair's deviation is its difference,
    so that normalised by itself a reward has the gradient of its own mean (factor 1, population
    deviation), and the sum that of w1 E[r1] + w2 E[r2], up to the batch's deviation. Of the total
    only the sign of a difference is left: the weights no longer say how much a reward counts."""
    generator = torch.Generator().manual_seed(5)
    r1, r2 = torch.randint(0, 2, (2, 15), generator=generator).double()
    assert not torch.equal(r1, r2)
    groups, weights = groups_of(2), [1.0, 0.3]
    pair = [r1[groups], r2[groups]]
    settings = dict(std_correction=0, advantage_eps=1e-300)
    goal = gradient((PI * (r1 + 0.3 * r2)).sum(), LOGITS)
    alone = sum(w * group_advantages(r, **settings) for w, r in zip(weights, pair))
    found = group_gradient(each(pair, weights, **settings), groups, LOGITS)
    assert close(found, -goal / alone.std(correction=0))
    other = group_gradient(summed(pair, weights, **settings), groups, LOGITS)
    cosine = torch.cosine_similarity(other.flatten(), -goal.flatten(), dim=0)
    assert 0.5 < cosine < 0.95
