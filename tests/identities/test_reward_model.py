"""The Bradley-Terry loss of the reward model, and the rewards that it recovers from labels."""

import math

import pytest
import torch

import rm
from pairs import newton
from world import close


def test_reward_loss_worked_examples():
    """Rewards 1 and 0: -log sigma(1) = .313; equal ones: log 2; the centring adds c (r + r')^2 and
    sees no difference."""
    a, b = torch.tensor([1.0, 0.0, 0.5]).double(), torch.tensor([0.0, 0.0, -0.5]).double()
    plain = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(-1))]
    assert close(rm.reward_loss(a, b), plain) and plain[0] == pytest.approx(0.313, abs=5e-4)
    assert close(rm.reward_loss(a, b, 0.1), [plain[0] + 0.1, plain[1], plain[2]])
    assert close(rm.reward_loss(a + 7, b + 7), plain)   # only differences count
    assert rm.reward_loss(b, a)[0] > 1


def test_the_reward_model_recovers_the_rewards_behind_the_labels():
    """Fitted to infinitely many Bradley-Terry labels, P(i beats j) = sigma(r_i - r_j), on all
    pairs, a table of rewards is r up to a constant (2203.02155, eq. 1); centring makes that
    constant the one of mean 0."""
    r = torch.tensor([0.0, 1.5, -0.7, 2.2, 0.4, -1.9], dtype=torch.float64)
    i, j = torch.tensor([(i, j) for i in range(6) for j in range(6) if i != j]).T
    labels = (r[i] - r[j]).sigmoid()

    def loss(x, coefficient=0.0):
        return (labels * rm.reward_loss(x[i], x[j], coefficient)).sum()
    zeros = torch.zeros(6, dtype=torch.float64)
    found = newton(loss, zeros)
    assert close(found, r - r.mean())   # along the constants it stays where it began, at mean 0
    shifted = newton(loss, zeros + 3)
    assert close(shifted, r - r.mean() + 3)   # the loss does not say where 0 is
    centred = newton(lambda x: loss(x, 1e-6), zeros + 3)
    assert close(centred, r - r.mean(), 1e-4)


def test_reward_loss_gradient_by_finite_differences():
    """Autograd equals (f(x + h) - f(x - h)) / 2h, centring included."""
    r = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: rm.reward_loss(r[:2], r[2:], 0.1), r)


def test_centring_is_the_square_of_the_sum():
    """Rewards 2 and 1 at coefficient .1: .1 x 3^2 on top of -log sigma(1); the same for -1 and
    -2."""
    two, one = torch.tensor([2.0, -1.0]).double(), torch.tensor([1.0, -2.0]).double()
    extra = rm.reward_loss(two, one, 0.1) - rm.reward_loss(two, one)
    assert extra.tolist() == pytest.approx([0.9, 0.9])
