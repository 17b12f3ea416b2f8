"""
Generalised advantage estimation: ppo.gae runs back from the last token; here it is compared with
the sum over the future that it stands for, with both of its ends, and with numbers worked by hand.
"""

import pytest
import torch
from torch.nn.functional import pad

import ppo
from world import close

LENGTHS = (3, 5, 1, 4)   # of the rows below; the second and the fourth are cut off
GAMMAS_AND_LAMS = [(1, 1), (1, 0.95), (1, 0), (0.9, 0.8), (0.5, 1), (0.9, 0), (0, 0.5)]


def ragged():
    """Rewards, values (4, 5), mask and last_values of four rows of different length, padding full
    of other numbers."""
    generator = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    last_values = torch.tensor([0.0, 0.7, 0.0, -1.3], dtype=torch.float64)
    return rewards, values, torch.arange(5) < torch.tensor(LENGTHS)[:, None], last_values


def matrix_gae(rewards, values, mask, last_values, gamma, lam):
    """A_t = sum over s >= t of (gamma lam)^(s-t) delta_s as one product: all deltas, of all rows,
    times the (T, T) matrix of discounts."""
    T, mask = rewards.shape[1], mask.double()
    next_mask = pad(mask, (0, 1))[:, 1:]   # 0 at the last real token
    next_values = pad(values, (0, 1))[:, 1:] * next_mask + last_values[:, None] * (mask - next_mask)
    deltas = (rewards + gamma * next_values - values) * mask                    # (B, T)
    distance = torch.arange(T)[:, None] - torch.arange(T)                       # (T, T), s - t
    discounts = float(gamma * lam) ** distance.clamp(min=0).double() * (distance >= 0)
    advantages = (deltas @ discounts) * mask
    return advantages, (advantages + values) * mask


@pytest.mark.parametrize("gamma, lam", GAMMAS_AND_LAMS)
def test_gae_is_the_discounted_sum_of_the_deltas(gamma, lam):
    """The loop equals the product with the matrix of (gamma lam)^(s-t), s >= t (1506.02438, eq.
    16): on ragged rows, and on 50 rows of 40 tokens at every length from 0 on."""
    for found, by_matrix in zip(ppo.gae(*ragged(), gamma, lam), matrix_gae(*ragged(), gamma, lam)):
        assert close(found, by_matrix)
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 50, 40, generator=generator, dtype=torch.float64)
    lengths = torch.arange(50).clamp(max=40)
    args = rewards, values, torch.arange(40) < lengths[:, None], rewards[:, 0] - values[:, 1]
    for found, by_matrix in zip(ppo.gae(*args, gamma, lam), matrix_gae(*args, gamma, lam)):
        assert close(found, by_matrix) and found.abs().max() > 1


@pytest.mark.parametrize("gamma, lam", GAMMAS_AND_LAMS)
def test_gae_is_the_recursion(gamma, lam):
    """A_t = delta_t + gamma lam A_t+1, from the last token back, a row at a time (1506.02438, eq.
    16); returns are A + V; 0 on padding."""
    rewards, values, mask, last_values = ragged()
    advantages, returns = ppo.gae(rewards, values, mask, last_values, gamma, lam)
    for row, n in enumerate(LENGTHS):
        later, after = 0.0, last_values[row]
        for t in reversed(range(n)):
            later = rewards[row, t] + gamma * after - values[row, t] + gamma * lam * later
            after = values[row, t]
            assert close(advantages[row, t], later)
            assert close(returns[row, t], later + values[row, t])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_at_both_ends(gamma):
    """lam 1: the discounted return, with what follows a cut, less V; lam 0: the TD error
    (1506.02438, eq. 17-18)."""
    rewards, values, mask, last_values = ragged()
    outcome, returns = ppo.gae(rewards, values, mask, last_values, gamma, 1.0)
    critic, _ = ppo.gae(rewards, values, mask, last_values, gamma, 0.0)
    for row, n in enumerate(LENGTHS):
        V = [*values[row, :n], last_values[row]]
        for t in range(n):
            total = sum(gamma ** (s - t) * rewards[row, s] for s in range(t, n))
            total = total + gamma ** (n - t) * V[n]
            assert close(returns[row, t], total) and close(outcome[row, t], total - V[t])
            assert close(critic[row, t], rewards[row, t] + gamma * V[t + 1] - V[t])


@pytest.mark.parametrize("rewards, last_value, lam, advantages, returns", [
    ([0.0, 1.0], 0.0, 1.0, [0.6, 0.3], [1, 1]),          # the docstring's
    ([0.0, 0.0], 0.9, 1.0, [0.5, 0.2], [0.9, 0.9]),      # cut off, with V .9 to follow
    ([0.0, 1.0], 0.0, 0.5, [0.45, 0.3], [0.85, 1]),      # deltas [.3, .3] at gamma lam 1/2
])
def test_gae_worked_examples(rewards, last_value, lam, advantages, returns):
    """Two tokens, V [.4, .7], by hand."""
    found = ppo.gae(torch.tensor([rewards]), torch.tensor([[0.4, 0.7]]), torch.ones(1, 2).bool(),
                    torch.tensor([last_value]), 1.0, lam)
    assert close(found[0], [advantages], 1e-6) and close(found[1], [returns], 1e-6)


def test_padding_never_matters_to_credit():
    """Whatever stands on padding, and however much of it there is, rewards, advantages, returns and
    whitened advantages of the real tokens stay bit for bit the same (padding has leaked into each
    of them in published code)."""
    rewards, values, mask, last_values = ragged()
    scores = torch.arange(4).double()

    def credit(junk, width):
        wide_mask = pad(mask, (0, width))
        wider = [pad(x, (0, width)).masked_fill(~wide_mask, junk)
                 for x in (rewards, values, -rewards)]
        with_score = ppo.token_rewards(scores, wider[0], wider[2], wide_mask, 0.1)
        advantages, returns = ppo.gae(wider[0], wider[1], wide_mask, last_values, 0.9, 0.8)
        found = (with_score, advantages, returns, ppo.whiten(wider[2], wide_mask))
        assert all((x[~wide_mask] == 0).all() for x in found)
        return torch.stack([x[wide_mask] for x in found])
    plain = credit(0.0, 0)
    for junk in (1e30, -1e30):
        assert torch.equal(credit(junk, 0), plain)
        assert close(credit(junk, 3), plain, 1e-12)   # another width may add up in another order


def test_nothing_is_discounted_unless_asked_for():
    """The docstring's worked example with gamma left out: advantages .6 and .3, returns 1 and 1."""
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.4, 0.7]])
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 2), torch.zeros(1), lam=1.0)
    assert torch.allclose(advantages, torch.tensor([[0.6, 0.3]]))
    assert torch.allclose(returns, torch.ones(1, 2))
