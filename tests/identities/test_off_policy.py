"""
Samples of another policy: which ratios of grpo.py give the on-policy gradient, and which do not.
"""

import pytest
import torch

import grpo
from world import (GRAD_J, LENGTH, LENGTHS, LOGITS, MASK, PI, REWARD, close, expected, gradient,
                   sequence_logprobs, table, token_logprobs)

OLD = table(1)                                            # another policy, which sampled
PI_OLD = sequence_logprobs(OLD).exp().detach()


def off_policy_gradient(losses):
    """The gradient that samples of OLD give in expectation."""
    return gradient((losses * MASK * PI_OLD[:, None]).sum(), LOGITS)


def whole_answer_ratio():
    """pi(y) / pi_old(y), detached, (15,)."""
    return (sequence_logprobs(LOGITS).detach() - sequence_logprobs(OLD).detach()).exp()


def test_the_product_of_ratios_is_an_exact_importance_weight():
    """E_old[pi(y)/pi_old(y) A grad log pi] = grad E_pi[A]: CISPO's weights, with no clip and A
    times what its own token ratio lacks of the whole answer's, give the on-policy gradient exactly
    (Precup et al. 2000)."""
    lp, old = token_logprobs(LOGITS), token_logprobs(OLD).detach()
    rest = whole_answer_ratio()[:, None] / (lp.detach() - old).exp()   # the other tokens', (15, 3)
    flags = dict(epsilon_high=1e9, loss_type="cispo")
    losses = torch.stack([grpo.policy_loss(lp, old, REWARD * rest[:, t], MASK, **flags)[0][:, t]
                          for t in range(LENGTH)], dim=1)
    assert close(off_policy_gradient(losses), -GRAD_J)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_token_and_gspo_ratios_are_biased_off_policy(level):
    """Ratios of single tokens, and GSPO's geometric mean, leave out that the rest of the answer was
    sampled by another policy: off-policy the expected gradient is not that of J. Here it is off by
    more than a tenth of its length, and at pi_old = pi by nothing (2507.18071, section 4.1; the
    survey does not say so)."""
    lp, log_pi = token_logprobs(LOGITS), sequence_logprobs(LOGITS)
    scale = torch.ones(15, dtype=torch.float64) if level == "token" else 1 / LENGTHS
    flags = dict(epsilon=1.0, epsilon_high=1e9, importance_sampling_level=level)
    losses, _, _ = grpo.policy_loss(lp, token_logprobs(OLD).detach(), REWARD, MASK, **flags)
    exact = gradient((PI_OLD * whole_answer_ratio() * REWARD * scale * log_pi).sum(), LOGITS)
    error = (off_policy_gradient(losses * scale[:, None]) + exact).norm() / exact.norm()
    assert error > 0.1
    losses, _, _ = grpo.policy_loss(lp, lp.detach(), REWARD, MASK, **flags)
    on_policy = gradient((PI.detach() * REWARD * scale * log_pi).sum(), LOGITS)
    assert close(gradient(expected(losses * scale[:, None], PI), LOGITS), -on_policy)
