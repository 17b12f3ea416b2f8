"""
Imitation and the policy gradient: what the losses of sft.py and grpo.py do in expectation, on the
world of 15 sequences (world.py).
"""

import pytest
import torch

import grpo
import sft
from world import (GRAD_J, LOGITS, MASK, PI, PREFIXES, REWARD, SEQUENCES, close, expected,
                   gradient, sequence_logprobs, table, token_logprobs)

LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "cispo"]
LEVELS = ["token", "sequence"]


def test_the_world_is_complete():
    """15 sequences, 7 prefixes, and the probabilities add up to 1: all exact sums rest on it."""
    assert len(SEQUENCES) == 15 and len(PREFIXES) == 7
    assert close(PI.sum(), 1.0)


# -- supervised fine-tuning -----------------------------------------------------------------------


def test_sft_gradient_is_a_policy_gradient():
    """SFT on y* is an on-policy policy gradient with the reward 1[y = y*] / pi(y) (survey
    2603.13985, section 4.1; 2508.05629, eq. 5-6)."""
    lp = token_logprobs(LOGITS)
    for i in range(15):
        imitation = gradient((sft.token_losses(lp) * MASK)[i].sum(), LOGITS)
        reward = (torch.arange(15) == i) / PI.detach()
        losses, _, _ = grpo.policy_loss(lp, lp.detach(), reward, MASK)
        assert close(imitation, gradient(expected(losses, PI), LOGITS))


def test_gradient_of_cross_entropy_is_softmax_minus_onehot():
    """d(-log softmax(z)_y)/dz = softmax(z) - onehot(y)."""
    z = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    for y in range(3):
        found = gradient(sft.token_losses(z.log_softmax(-1)[y]), z)
        assert close(found, z.softmax(-1) - torch.eye(3)[y])


def test_sft_loss_is_kl_from_the_data_plus_their_entropy():
    """E_data[-log pi] = H(data) + KL(data || pi): imitation minimises the forward KL."""
    q = sequence_logprobs(table(1)).exp().detach()
    loss = expected(sft.token_losses(token_logprobs(LOGITS)), q)
    kl = (q * (q / PI).log()).sum()
    assert close(loss - -(q * q.log()).sum(), kl)
    assert close(gradient(loss, LOGITS), gradient(kl, LOGITS))


def test_sft_token_mean_worked_example():
    """The example at the head of sft.py, completions of 1 and 3 tokens: the token mean is 3, the
    mean of the two means 4. With -2 for -6 both are 2."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    weights = sft.token_weights(mask)
    assert weights.tolist() == [[0.25, 0, 0], [0.25, 0.25, 0.25]]
    for first, mean in ((-2.0, 2.0), (-6.0, 3.0)):
        logprobs = torch.tensor([[first, -99, -99], [-1.0, -1.0, -4.0]])
        assert (sft.token_losses(logprobs) * weights).sum() == mean
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert sft.token_weights(nothing).tolist() == [[0] * 3] * 2    # and not 0/0


# -- the policy gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_at_the_sampling_policy_is_the_policy_gradient(loss_type):
    """Where pi = pi_old, descending the surrogate ascends J = E[r] exactly, for there
    d ratio = d log pi (PPO, 1707.06347, eq. 6)."""
    lp = token_logprobs(LOGITS)
    losses, ratio, clipped = grpo.policy_loss(lp, lp.detach(), REWARD, MASK, loss_type=loss_type)
    assert close(ratio, 1) and not clipped.any()
    assert close(gradient(expected(losses, PI), LOGITS), -GRAD_J)


def test_a_constant_baseline_changes_nothing_in_expectation():
    """E[grad log pi] = 0, so a constant reward has no gradient and may be subtracted from any other
    (Williams 1992)."""
    lp = token_logprobs(LOGITS)
    found = []
    for advantages in (torch.ones_like(REWARD), REWARD, REWARD - 5):
        losses, _, _ = grpo.policy_loss(lp, lp.detach(), advantages, MASK)
        found.append(gradient(expected(losses, PI), LOGITS))
    assert close(found[0], 0)
    assert close(found[1], found[2]) and found[1].abs().max() > 0.01


def test_entropy_falls_by_the_covariance_of_log_probability_and_advantage():
    """One natural-gradient step, dz = eta A, at a single state changes the entropy by
    -eta Cov(log pi, A) to first order (2505.22617; survey, section 3.2): a policy gradient that
    favours what is likely already makes the entropy collapse."""
    z = LOGITS[0].detach().requires_grad_()
    advantage = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    lp, eta = z.log_softmax(-1), 1e-6                         # three answers of one token each
    losses, _, _ = grpo.policy_loss(lp[:, None], lp[:, None].detach(), advantage,
                                    torch.ones(3, 1).bool())
    pi = lp.exp().detach()
    natural = -gradient((losses[:, 0] * pi).sum(), z) / pi    # the Fisher matrix undone

    def entropy(logits):
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    slope = (entropy(z + eta * natural) - entropy(z - eta * natural)) / (2 * eta)
    covariance = (pi * lp * advantage).sum() - (pi * lp).sum() * (pi * advantage).sum()
    assert slope.item() == pytest.approx(-covariance.item(), abs=1e-8) and abs(covariance) > 0.01


# -- finite differences ---------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_gradients_by_finite_differences(loss_type, level):
    """Autograd equals (f(x + h) - f(x - h)) / 2h, away from the corners of the clip. CISPO's weight
    is meant to have no derivative, so it is checked where it is constant: above the clip."""
    old = token_logprobs(table(3)).detach()
    if loss_type == "cispo":
        shift = 0.3 + 0.1 * torch.arange(3)
    else:
        shift = torch.tensor([-0.1, 0.4, -0.5])               # inside, above, below [.8, 1.2]
    lp = (old + shift).requires_grad_()
    flags = dict(loss_type=loss_type, importance_sampling_level=level)
    assert torch.autograd.gradcheck(
        lambda x: grpo.policy_loss(x, old, REWARD, MASK, **flags)[0], lp)


def test_other_gradients_by_finite_differences():
    """The same for the SFT loss, from the logits on, and for k3, with and without the ratio."""
    ref, old = token_logprobs(table(3)).detach(), token_logprobs(table(4)).detach()
    check = torch.autograd.gradcheck
    assert check(lambda z: sft.token_losses(token_logprobs(z)), LOGITS)
    assert check(lambda z: grpo.k3(token_logprobs(z), ref), LOGITS)
    assert check(lambda z: grpo.k3(token_logprobs(z), ref, old), LOGITS)
