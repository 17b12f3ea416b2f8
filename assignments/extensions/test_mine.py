"""The cells of the docstrings. These are the tests that you see; the others are drawn."""

import math

import pytest
import torch

import mine


def logs(*rows):
    """Log-probabilities of probabilities, (1, T, V)."""
    return torch.tensor([rows], dtype=torch.float64).log()


def test_entropy_weights_worked_example():
    """Half of the choices is half of the entropy of four; certainty weighs nothing."""
    found = mine.entropy_weights(logs([0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]),
                                 torch.tensor([[True, True, True]]))
    assert found.tolist()[0] == pytest.approx([1, 0.5, 0], abs=1e-9)
    assert found.shape == (1, 3)


def test_divergence_loss_worked_example():
    """A large ratio of small numbers passes; from .5 to .8 the token has gained enough."""
    old = torch.tensor([[0.001, 0.5, 0.8]], dtype=torch.float64).log()
    logprobs = torch.tensor([[0.01, 0.8, 0.5]], dtype=torch.float64).log().requires_grad_()
    losses, dropped = mine.divergence_loss(logprobs, old, torch.tensor([1.0]).double(),
                                           torch.ones(1, 3).bool(), 0.2)
    assert losses.tolist()[0] == pytest.approx([-10, 0, -0.625], abs=1e-9)
    assert dropped.tolist() == [[False, True, False]]
    [slopes] = torch.autograd.grad(losses.sum(), logprobs)
    assert slopes.tolist()[0] == pytest.approx([-10, 0, -0.625], abs=1e-9)


def test_overlong_rewards_worked_example():
    """Nothing up to six of ten tokens, a quarter for each of the last four, never more than 1."""
    lengths = (3, 6, 7, 10, 12)
    mask = torch.tensor([[t < n for t in range(12)] for n in lengths])
    found = mine.overlong_rewards(mask, 10, 4)
    assert found.tolist() == pytest.approx([0, 0, -0.25, -1, -1], abs=1e-6)
    assert math.isfinite(found.sum()) and found.shape == (5,)
