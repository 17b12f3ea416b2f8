"""
PriFT (2606.09396): DFT with the weights of the start model, on the world of 15 sequences.
"""

import pytest
import torch

import sft
from dft import DFT, DFTConfig, imitation_weights
from harness.log import Log
from world import (LOGITS, MASK, close, expected, gradient, sequence_logprobs, table, tabular,
                   token_logprobs, visits, whole_world)

Q = sequence_logprobs(table(1)).exp().detach()       # (15,), the data
DATA = table(1).detach().softmax(-1)                 # (7, 3), the same as conditionals
START = table(3).detach()                            # (7, 3), logits of the start model
BELIEF = START.softmax(-1)
SHARED = DATA * BELIEF / (DATA * BELIEF).sum(1, keepdim=True)        # what both believe


def loss_of(loss_type, logits, start=START):
    """sum_y Q(y) x the loss that the class gives y's tokens, where it started from `start`."""
    algo = DFT(DFTConfig(loss_type=loss_type, device="cpu", dtype="float32"), tabular(logits), None,
               None)
    algo.ref_model = tabular(start)
    [batch] = algo.minibatches(whole_world(), Log())
    return algo.loss({**batch, "weights": MASK * Q[:, None]}, Log())


def gradient_of(loss_type, logits, start=START):
    return gradient(loss_of(loss_type, logits, start), logits)


def descend(loss_type, steps=200):
    """The policy (7, 3) that Adam reaches from the start model."""
    logits = START.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(loss_type, logits).backward()
        optimizer.step()
    return logits.softmax(-1)


def test_prift_starts_as_dft():
    """Where the policy is the start model the weights are the same: gradient and loss too."""
    start = START.clone().requires_grad_()
    assert torch.equal(gradient_of("prift", start), gradient_of("dft", start))
    assert torch.equal(loss_of("prift", start), loss_of("dft", start))
    assert not close(gradient_of("prift", LOGITS), gradient_of("dft", LOGITS), 0.01)


def test_prift_is_sft_on_reweighted_data():
    """At any policy the gradient is that of weighted imitation with weights that stand still: on
    the logits of a prefix, as often as the data visit it, sum(data pi_ref) pi - data pi_ref."""
    lp = token_logprobs(LOGITS)
    weights = token_logprobs(START).exp()
    found = gradient_of("prift", LOGITS)
    assert close(found, gradient(expected(weights * sft.token_losses(lp), Q), LOGITS))
    mass = (DATA * BELIEF).sum(1, keepdim=True)
    assert close(found, visits(Q) * (mass * LOGITS.softmax(-1) - DATA * BELIEF))


def test_prift_rests_where_data_and_belief_agree():
    """Its gradient vanishes at pi proportional to pi_ref x data, token by token; there DFT's does
    not, nor SFT's, which rests at the data."""
    rest = SHARED.log().requires_grad_()
    assert close(gradient_of("prift", rest), 0)
    assert not close(gradient_of("dft", rest), 0, 0.01)
    assert not close(gradient_of("prift", DATA.log().requires_grad_()), 0, 0.01)
    assert close(gradient_of("prift", DATA.log().requires_grad_(), torch.zeros(7, 3)), 0)


@pytest.mark.parametrize("loss_type", ["prift", "dft"])
def test_dft_takes_one_token_and_prift_keeps_the_others(loss_type):
    """From the same start: DFT, whose weights grow with what it has learned, ends on one token at
    the first prefix; PriFT ends at the product of belief and data, with all three."""
    found = descend(loss_type)
    if loss_type == "prift":
        assert close(found[0], SHARED[0], 0.01) and SHARED[0].min() > 0.02
    else:
        assert found[0].max() > 0.95


def test_the_weight_is_the_start_models_probability():
    """pi_ref .25, whatever the policy: .25, and no gradient through it."""
    logprobs = torch.tensor([[0.9, 0.01]], dtype=torch.float64).log().requires_grad_()
    ref = torch.tensor([[0.25, 0.5]], dtype=torch.float64).log()
    weight = imitation_weights(logprobs, torch.ones(1, 2).bool(), "prift", ref_logprobs=ref)
    assert close(weight, [[0.25, 0.5]]) and not weight.requires_grad
