"""
Imitating one's own answers: what rft.py descends in expectation, where it rests, and its pure
functions by hand.
"""

import math

import pytest
import torch

import rft
import sft
from harness.log import Log
from rft import RFT, RFTConfig
from tasks import Chain
from world import (LENGTHS, LOGITS, MASK, PI, REWARD, close, conditionals, expected, gradient,
                   sequence_logprobs, tabular, token_logprobs, whole_world)

RIGHT = (REWARD > 0).double()                        # (15,), which answers a verifier would accept
RATE = (PI * RIGHT).sum()                            # the acceptance rate, E[R]


def rft_loss(row_weights, logits=LOGITS, weighting="none"):
    """The loss that the RFT class gives all 15 sequences as samples of a policy, with these row
    weights (15,)."""
    algo = RFT(RFTConfig(weighting=weighting), tabular(logits), None, Chain(2, 3))
    weights = rft.token_weights(MASK, row_weights.detach())
    return algo.loss({**whole_world(), "weights": weights}, Log())


def test_rejection_sampling_is_reinforce_without_its_negative_half():
    """Imitating one's own accepted answers has in expectation the gradient of -E[R], R in {0, 1};
    per accepted answer, that of -log E[R], the log of the success rate, which weighs hard prompts
    by 1 / rate (RFT 2308.01825)."""
    accepted = rft.kept(REWARD[None].gt(0).double())[0]
    assert torch.equal(accepted.double(), RIGHT) and 0 < RIGHT.sum() < 15
    losses = rft.token_losses(token_logprobs(LOGITS))
    assert torch.equal(losses, sft.token_losses(token_logprobs(LOGITS)))
    found = gradient(expected(losses, PI * accepted), LOGITS)
    assert close(found, -gradient(RATE, LOGITS))
    assert close(found / RATE.detach(), -gradient(RATE.log(), LOGITS))
    # The class averages over accepted tokens: the same direction, divided by their expected number.
    tokens = (PI.detach() * accepted * LENGTHS).sum()
    found = gradient(rft_loss(PI * accepted), LOGITS)
    assert close(found, -gradient(RATE, LOGITS) / tokens)


def test_dft_on_accepted_answers_ascends_their_probabilities():
    """--weighting dft: the gradient of -E_pi[sum_t p_t] over accepted answers, the samples held
    fixed, per accepted token: each token weighs its own probability, detached (2508.05629, section
    4.3)."""
    accepted = PI.detach() * RIGHT
    closed = -gradient(expected(token_logprobs(LOGITS).exp(), accepted), LOGITS)
    found = gradient(rft_loss(accepted, weighting="dft"), LOGITS)
    assert close(found, closed / (accepted * LENGTHS).sum())


@pytest.mark.parametrize("r", [RIGHT, REWARD.exp()], ids=["right or wrong", "graded"])
def test_a_full_round_of_imitation_never_lowers_the_reward(r):
    """Trained to the end on answers of pi weighed by r >= 0, imitation rests at q = pi r / E[r],
    where E_q[r] = E[r^2] / E[r], never below E[r]: the M-step of expert iteration and ReST-EM
    (2312.06585). For right or wrong that is 1."""
    q = (PI * r / (PI * r).sum()).detach()
    fixed = conditionals(q)
    assert close(sequence_logprobs(fixed).exp(), q)                  # the table can express it
    assert close(gradient(rft_loss(PI * r, fixed), fixed), 0)
    start = gradient(rft_loss(PI * r), LOGITS)
    assert start.abs().max() > 0.01                                  # it does not rest there
    reached = (sequence_logprobs(fixed).exp() * r).sum()
    assert close(reached, (PI * r ** 2).sum() / (PI * r).sum())
    assert reached > (PI * r).sum() + 0.01


def test_awr_rests_at_the_regularised_optimum():
    """With every answer weighed by exp(A / beta), imitation rests at pi exp(R / beta) / Z, whatever
    baseline A has: the optimum of E[R] - beta KL(. || pi) (AWR, 1910.00177, eq. 9). A cut-off that
    acts moves it."""
    beta = 0.7
    optimum = (PI * (REWARD / beta).exp()).detach()
    fixed = conditionals(optimum / optimum.sum())
    weights = rft.awr_weights(REWARD[None], beta, largest=1e9)[0]
    assert close(gradient(rft_loss(PI * weights, fixed), fixed), 0)
    capped = rft.awr_weights(REWARD[None], beta, largest=2.0)[0]
    assert capped.max() == 2
    assert not close(gradient(rft_loss(PI * capped, fixed), fixed), 0, 1e-4)


# -- by hand --------------------------------------------------------------------------------------


def test_row_weights_worked_example():
    """Answers of 1 and 3 tokens: with equal row weights 1/4 each, as in SFT; with 0 and 1, 0 and
    1/3; with 3 and 1, 3/6 and 1/6 (docstring of rft.token_weights). Where no row has a weight it is
    0, not 0/0; small weights add up to 1 all the same."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    assert close(rft.token_weights(mask, torch.ones(2)), sft.token_weights(mask), 1e-7)
    for rows, weights in (([1.0, 1.0], [0.25, 0.25]), ([0.0, 1.0], [0, 1 / 3]),
                          ([3.0, 1.0], [1 / 2, 1 / 6]), ([0.0, 0.0], [0, 0]),
                          ([3e-6, 1e-6], [1 / 2, 1 / 6])):
        found = rft.token_weights(mask, torch.tensor(rows))
        assert close(found, [[weights[0], 0, 0], [weights[1]] * 3], 1e-6)


def test_kept_worked_example():
    """threshold: those that reach it, a rounding error below included; best: one per group, the
    first, whatever it is worth (docstring of rft.kept). A threshold for each answer: each meets its
    own."""
    rewards = torch.tensor([[1.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0],
                            [-0.5, -0.2, -0.9, 0.7 - 1e-7]])
    assert rft.kept(rewards).tolist() == [[1, 0, 0, 1], [0] * 4, [0] * 4]
    assert rft.kept(rewards, threshold=0.5).tolist() == [[1, 0, 1, 1], [0] * 4, [0, 0, 0, 1]]
    assert rft.kept(rewards, threshold=0.7)[2].tolist() == [0, 0, 0, 1]
    assert rft.kept(rewards, "best").tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    bars = torch.tensor([[1.0, 0.5, 0.5, 2.0]])
    assert rft.kept(rewards[:1], threshold=bars).tolist() == [[1, 0, 1, 0]]


def test_awr_weights_worked_example():
    """[1, 0, 0, 0] at beta .3: advantages 3/4 and -1/4 give e^2.5 = 12.18 and e^(-.83) = .43; at
    beta .1 the first would be e^7.5 and is cut off at 20 (AWR, 1910.00177, section 5). Equals weigh
    1, and groups do not see each other."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    rest = [math.exp(-2.5)] * 3
    first, others = 12.1824940, [0.4345982] * 3
    assert close(rft.awr_weights(rewards, 0.3), [[first, *others], [1] * 4], 1e-6)
    assert close(rft.awr_weights(rewards, 0.1), [[20, *rest], [1] * 4])
    assert close(rft.awr_weights(rewards, 0.1, largest=5.0), [[5, *rest], [1] * 4])


def test_rounds_worked_example():
    """3 rounds in 8 steps, the example of round_of; 4 in 10 begin at 0, 3, 5 and 8. With --restart
    the learning rate runs its course anew in each, and else once."""
    assert [rft.round_of(step, 3, 8) for step in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [rft.round_of(step, 4, 10) for step in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    config = RFTConfig(rounds=4, max_steps=10, restart=True)
    assert [config.schedule(step) for step in range(10)] == [
        (0, 3), (0, 3), (0, 3), (3, 5), (3, 5), (5, 8), (5, 8), (5, 8), (8, 10), (8, 10)]
    config = RFTConfig(rounds=4, max_steps=10)
    assert {config.schedule(step) for step in range(10)} == {(0, 10)}


def test_rounds_share_the_steps():
    """Every step belongs to one round, rounds follow each other without a gap and differ in length
    by at most a step; there are as many as asked for, but at most one a step. The schedule has the
    same rounds."""
    for max_steps in range(1, 14):
        for rounds in range(1, 16):
            n = min(rounds, max_steps)
            number = [rft.round_of(step, n, max_steps) for step in range(max_steps)]
            assert number == sorted(number) and sorted(set(number)) == list(range(n))
            lengths = [number.count(k) for k in range(n)]
            assert max(lengths) - min(lengths) <= 1
            config = RFTConfig(rounds=rounds, max_steps=max_steps, restart=True)
            for step, k in enumerate(number):
                first = number.index(k)
                assert config.schedule(step) == (first, first + lengths[k])


def test_kept_names_its_choices():
    """--keep worst is not --keep threshold."""
    with pytest.raises(ValueError, match="^keep 'worst': choose threshold or best$"):
        rft.kept(torch.zeros(1, 2), "worst")


def test_what_is_kept_has_the_precision_of_the_rewards():
    """0 and 1 in float64 where the rewards are, under both rules."""
    for dtype in (torch.float32, torch.float64):
        rewards = torch.tensor([[1.0, 0.0]], dtype=dtype)
        assert rft.kept(rewards).dtype == rft.kept(rewards, "best").dtype == dtype
