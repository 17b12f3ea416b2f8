"""
Advantages of grpo.py: what baselines and the division by a deviation do in expectation over all
groups, and by hand; the best of n samples; pass@k.
"""

import math

import pytest
import torch

import grpo
import rft
from harness import evaluate
from world import GRAD_J, LOGITS, PI, REWARD, close, gradient, group_gradient, groups_of

# -- in expectation -------------------------------------------------------------------------------


def expected_group_gradient(rewards, K, **flags):
    """The exact expectation, over all 15^K groups of K samples, of the gradient that the group's
    advantages give."""
    groups = groups_of(K)                                                       # (15^K, K)
    return group_gradient(grpo.group_advantages(rewards[groups], **flags), groups, LOGITS)


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("advantage", ["rloo", "group", "reinforce"])
def test_group_baselines_in_expectation(advantage, K):
    """The mean of the others is an unbiased baseline (RLOO, 2402.14740, eq. 8). The mean of the
    whole group contains the sample itself and shrinks the gradient by (K - 1)/K (Dr. GRPO,
    2503.20783, appendix A)."""
    factor = (K - 1) / K if advantage == "group" else 1
    found = expected_group_gradient(REWARD, K, advantage=advantage, scale_rewards="none")
    assert close(found, -factor * GRAD_J)


@pytest.mark.parametrize("K", [2, 3])
def test_dividing_by_the_group_std_reweights_prompts(K):
    """For 0/1 rewards GRPO's expected gradient is E[std] / (p (1 - p)) grad p: prompts near p = 0
    or 1 count for more, the difficulty bias of 2503.20783, section 3.1. At K = 2 the factor is
    exactly 1. (Population deviation.)"""
    binary = (REWARD > 0).double()
    p = (PI * binary).sum()
    std = sum(math.comb(K, k) * p ** k * (1 - p) ** (K - k) * math.sqrt(k / K * (1 - k / K))
              for k in range(K + 1))
    factor = (std / (p * (1 - p))).detach()
    # advantage_eps: too small to matter, but not 0: a group of equal rewards has a deviation of 0
    found = expected_group_gradient(binary, K, std_correction=0, advantage_eps=1e-300)
    assert close(found, -factor * gradient(p, LOGITS))
    assert (abs(factor - 1) < 1e-9) == (K == 2)


# -- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, advantages", [
    (dict(advantage_eps=0), [1.5, -0.5, -0.5, -0.5]),                # sample deviation 1/2
    (dict(advantage_eps=0, std_correction=0),                        # population: sqrt(3)/4
     [3 ** 0.5, -3 ** -0.5, -3 ** -0.5, -3 ** -0.5]),
    (dict(advantage_eps=0.5), [0.75, -0.25, -0.25, -0.25]),
    (dict(scale_rewards="none"), [0.75, -0.25, -0.25, -0.25]),
    (dict(advantage="rloo", scale_rewards="none"), [1, -1 / 3, -1 / 3, -1 / 3]),
    (dict(advantage="reinforce", scale_rewards="none"), [1, 0, 0, 0]),   # no baseline
    (dict(advantage="remax", scale_rewards="none", greedy_rewards=torch.ones(1)),
     [0, -1, -1, -1]),
])
def test_advantages_worked_example(flags, advantages):
    """One group with rewards [1, 0, 0, 0], worked by hand (docstring of group_advantages; ReMax:
    2310.10505, eq. 4)."""
    rewards = torch.tensor([[1.0, 0, 0, 0]])
    assert close(grpo.group_advantages(rewards, **flags), [advantages], 1e-6)


def test_groups_do_not_see_each_other_but_a_batch_deviation_does():
    """[[1, 0], [4, 4]]: `group` divides by the deviation of each group, `batch` by that of all
    four, sqrt(17/4). The greedy answer of ReMax is each prompt's own."""
    rewards = torch.tensor([[1.0, 0.0], [4.0, 4.0]])

    def check(advantage, **flags):
        found = grpo.group_advantages(rewards, **flags)
        assert close(found, [[advantage, -advantage], [0, 0]], 1e-6)
    check(2 ** 0.5 / 2, advantage_eps=1e-12)
    check(0.5 / (17 / 4) ** 0.5, scale_rewards="batch", advantage_eps=0)
    check(0.5 / (51 / 16) ** 0.5, scale_rewards="batch", advantage_eps=0,
          std_correction=0)                                          # of the population
    check(0.5 / ((17 / 4) ** 0.5 + 0.5), scale_rewards="batch", advantage_eps=0.5)
    greedy = torch.tensor([1.0, 3.0])
    found = grpo.group_advantages(rewards, "remax", "none", greedy_rewards=greedy)
    assert found.tolist() == [[0, -1], [1, 1]]


@pytest.mark.parametrize("advantage", ["group", "rloo"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_a_group_of_equal_rewards_gets_exactly_zero(scale_rewards, advantage):
    """Seven rewards of 0.1 have, in float32, a mean that is not 0.1; divided by a deviation as
    tiny, the residue would be a full-sized advantage. The zero must be exact, whatever
    advantage_eps and however many the rewards."""
    flags = dict(advantage=advantage, scale_rewards=scale_rewards)
    equal = [torch.full((1, G), 0.1) for G in range(3, 34)]
    residues = [((r != r.mean(1)) & (r.std(1) != 0)).all() for r in equal]
    assert any(residues)                                             # it is really there
    for advantage_eps in (1e-4, 1e-12, 0):
        for rewards in equal:
            found = grpo.group_advantages(rewards, **flags, advantage_eps=advantage_eps)
            assert (found == 0).all()
        rewards = torch.tensor([[0.1] * 7, [0.1] * 6 + [1.0]])       # only the first group is flat
        mixed = grpo.group_advantages(rewards, **flags, advantage_eps=advantage_eps)
        assert (mixed[0] == 0).all() and (mixed[1] != 0).all()


# -- the best of n, and one right answer in k -----------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
def test_best_of_n(n):
    """The best of n samples has the law F(r)^n - F(r-)^n, and its KL to the policy is at most
    log n - (n - 1)/n (2401.01879, theorem 1): enumerated over all 15^n groups, chosen by
    rft.kept."""
    groups = groups_of(n)                                                       # (15^n, n)
    chosen = (groups * rft.kept(REWARD[groups], keep="best").long()).sum(1)     # (15^n,)
    weights = PI.detach()[groups].prod(1)
    law = torch.zeros(15, dtype=torch.float64).index_add(0, chosen, weights)
    order = REWARD.argsort()
    cdf = PI.detach()[order].cumsum(0)
    assert close(law[order], cdf ** n - (cdf - PI.detach()[order]) ** n)
    kl = (law * (law / PI.detach()).log()).sum()
    assert 0.1 < kl <= math.log(n) - (n - 1) / n


def test_pass_at_k_is_unbiased():
    """E over c ~ Binomial(n, p) of 1 - C(n-c, k)/C(n, k) is 1 - (1 - p)^k exactly (2107.03374,
    eq. 1)."""
    n, p = 6, 0.3
    for k in range(1, n + 1):
        mean = 0.0
        for c in range(n + 1):
            rewards = torch.tensor([[1.0] * c + [0.0] * (n - c)])
            chance = math.comb(n, c) * p ** c * (1 - p) ** (n - c)
            mean += chance * evaluate.pass_at_k(rewards, k)
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-9)
