"""
How grpo.py averages the losses of tokens, and what that does to the direction of the gradient; and
the weights of one token, or of none, in every algorithm.
"""

import pytest
import torch

import dft
import grpo
import ppo
import rft
import sft
from world import GRAD_J, LOGITS, MASK, PI, REWARD, close, expected, gradient, token_logprobs


def test_token_weights_worked_example():
    """Answers of 1, 3 and 0 tokens (an answer may be masked out), room for 5: the three
    aggregations by hand (2402.03300, eq. 3; 2503.14476, eq. 8; 2503.20783, section 3.2). Padding
    weighs 0, and an empty batch is not 0/0."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    hand = {"grpo": [[1 / 3, 0, 0], [1 / 9] * 3, [0] * 3],
            "dr_grpo": [[1 / 15, 0, 0], [1 / 15] * 3, [0] * 3],
            "dapo": [[1 / 4, 0, 0], [1 / 4] * 3, [0] * 3],
            "cispo": [[1 / 4, 0, 0], [1 / 4] * 3, [0] * 3]}
    for loss_type, weights in hand.items():
        assert close(grpo.token_weights(mask, loss_type, 5), weights, 1e-7), loss_type
        assert (grpo.token_weights(mask & False, loss_type, 5) == 0).all(), loss_type


def test_only_the_length_normaliser_turns_the_gradient():
    """Dividing each answer by its own length changes the direction of the expected gradient; a
    constant, or one number for the batch, changes its size alone: the length bias of 2503.20783,
    section 3.1."""
    lp = token_logprobs(LOGITS)
    losses, _, _ = grpo.policy_loss(lp, lp.detach(), REWARD, MASK)
    cosine = {}
    for loss_type in ("grpo", "dr_grpo", "dapo"):
        weights = grpo.token_weights(MASK, loss_type, max_completion_length=5).double()
        found = gradient(expected(losses * weights, PI), LOGITS)
        similar = torch.cosine_similarity(found.flatten(), GRAD_J.flatten(), dim=0)
        cosine[loss_type] = -similar.item()
    assert cosine["dr_grpo"] == pytest.approx(1, abs=1e-9)
    assert cosine["dapo"] == pytest.approx(1, abs=1e-9)
    assert 0.5 < cosine["grpo"] < 0.999


@pytest.mark.parametrize("token_weights", [
    sft.token_weights, dft.token_weights, ppo.token_weights, grpo.token_weights,
    lambda mask: rft.token_weights(mask, torch.ones(1))], ids=["sft", "dft", "ppo", "grpo", "rft"])
def test_token_weights_of_one_token_and_of_none(token_weights):
    """One token has the whole weight; where there is none, every weight is 0 and not 0/0."""
    assert token_weights(torch.tensor([[True, False]])).tolist() == [[1, 0]]
    assert token_weights(torch.tensor([[False, False]])).tolist() == [[0, 0]]
