"""PPO's pure functions in numbers worked by hand: both clips, whitening, token weights."""

import math

import pytest
import torch

import ppo
from world import close, gradient


@pytest.mark.parametrize("ratio, advantage, loss, dead", [
    (1.5, +1, -1.2, True),     # a good token, already likelier: enough has been done
    (1.1, +2, -2.2, False),
    (0.5, +1, -0.5, False),    # a good token that became unlikely: full gradient back
    (0.5, -1, +0.8, True),     # a bad token, already less likely: enough
    (0.9, -2, +1.8, False),
    (1.5, -1, +1.5, False),    # a bad token that became likelier: the clip never protects a mistake
])
def test_policy_clip_worked_values_and_dead_zones(ratio, advantage, loss, dead):
    """max(-A r, -A clip(r, .8, 1.2)): gradient 0 in two corners, which are reported as clipped, -A
    r elsewhere (1707.06347, eq. 7)."""
    logprobs = torch.tensor([[math.log(ratio) - 1.5]], dtype=torch.float64, requires_grad=True)
    old = torch.full((1, 1), -1.5, dtype=torch.float64)
    losses, found, clipped = ppo.policy_loss(logprobs, old, torch.tensor([[float(advantage)]]), 0.2)
    assert close(losses, [[loss]]) and close(found, [[ratio]]) and clipped.tolist() == [[dead]]
    assert close(gradient(losses.sum(), logprobs), [[0 if dead else -advantage * ratio]])


@pytest.mark.parametrize("value, band, loss, slope", [
    # Old value 0, return 1, from here on.
    (0.1, 0.2, 0.405, -0.9),   # inside the band: half the squared error
    (0.5, 0.2, 0.32, 0),       # it has moved far enough for one batch
    (1.2, 0.2, 0.32, 0),       # past the return, but less wrong than .2: no gradient either
    (3.0, 0.2, 2.0, 2.0),      # past it, and more wrong than .2: back
    (-0.5, 0.2, 1.125, -1.5),  # moved the wrong way: the whole gradient back
    (0.5, 0.0, 0.125, -0.5),   # no band
])
def test_value_clip_worked_values_and_dead_zones(value, band, loss, slope):
    """max of the two squared errors, halved: like the policy's clip, it takes away a gradient and
    never a mistake."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    losses = ppo.value_loss(values, torch.zeros(1, 1), torch.ones(1, 1), band)
    assert close(losses, [[loss]], 1e-7)
    assert close(gradient(losses.sum(), values), [[slope]], 1e-7)


def test_whiten():
    """Mean 0 and variance 1 over the real tokens alone; neither a shift nor a scale of x changes
    the result."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([3, 5, 1, 4])[:, None]
    white = ppo.whiten(1000 * x, mask)   # 1000: beside such a variance the 1e-8 is nothing
    assert close(white[mask].mean(), 0) and close(white[mask].var(correction=0), 1)
    assert (white[~mask] == 0).all() and close(ppo.whiten(3000 * x + 7, mask), white)
    assert close(white[mask], (x[mask] - x[mask].mean()) / x[mask].std(correction=0))
    assert (ppo.whiten(torch.ones(2, 2), torch.ones(2, 2).bool()) == 0).all()   # and not 0/0


def test_whiten_by_the_tokens_of_a_larger_batch():
    """A part is whitened with mean and variance of the tokens that it is given: those of the whole.
    Worked example: tokens 0 and 2 have mean 1 and deviation 1, so 3 becomes 2."""
    x, mask = torch.tensor([[3.0, 9.0]]), torch.tensor([[True, False]])
    assert close(ppo.whiten(x, mask, torch.tensor([0.0, 2.0])), [[2, 0]], 1e-6)


def test_token_weights():
    """Answers of 1, 3 and 0 tokens: a quarter each, nothing on padding; an empty batch is not
    0/0."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    assert ppo.token_weights(mask).tolist() == [[0.25, 0, 0], [0.25] * 3, [0] * 3]
    assert (ppo.token_weights(mask & False) == 0).all()
