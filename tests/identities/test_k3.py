"""
k3 of grpo.py, an estimate of the KL: its value, and whose gradient it has as a loss, on samples of
the policy and of another.
"""

import math

import pytest
import torch

import grpo
from world import (LOGITS, PI, close, expected, gradient, sequence_logprobs, table, token_logprobs,
                   visits)


def test_k3_is_a_nonnegative_unbiased_estimate():
    """On samples of pi, k3 of the sequences' log-probabilities averages to KL(pi || ref) exactly;
    each value is >= 0, and 0 where the two agree (joschu.net/blog/kl-approx.html)."""
    log_pi, log_ref = sequence_logprobs(LOGITS).detach(), sequence_logprobs(table(2)).detach()
    values = grpo.k3(log_pi, log_ref)
    assert (values > 0).all() and close(grpo.k3(log_pi, log_pi), 0)
    assert close((PI * values).sum(), (PI * (log_pi - log_ref)).sum())
    found = grpo.k3(torch.tensor(-2.0), torch.tensor(-1.0)).item()
    assert found == pytest.approx(math.e - 2)                        # e^1 - 1 - 1


def test_estimators_of_the_kl_as_losses_of_whole_answers():
    """On log-ratios of whole answers, differentiated on the policy's samples: k1 has no expected
    gradient at all, k2 has that of KL(pi || ref), and k3 that of KL(ref || pi), the other way
    round; k3 times the ratio, which is 1, has that of KL(pi || ref) again
    (joschu.net/blog/kl-approx.html has them as values; the survey does not say so)."""
    log_pi, log_ref = sequence_logprobs(LOGITS), sequence_logprobs(table(2)).detach()
    reverse = gradient((PI * (log_pi - log_ref)).sum(), LOGITS)
    forward = gradient((log_ref.exp() * (log_ref - log_pi)).sum(), LOGITS)
    k1 = gradient((PI.detach() * (log_pi - log_ref)).sum(), LOGITS)
    k2 = gradient((PI.detach() * (log_pi - log_ref) ** 2 / 2).sum(), LOGITS)
    k3 = gradient((PI.detach() * grpo.k3(log_pi, log_ref)).sum(), LOGITS)
    assert close(k1, 0) and close(k2, reverse) and close(k3, forward)
    assert not close(forward, reverse, 0.01)
    corrected = grpo.k3(log_pi, log_ref, log_pi.detach())
    assert close(gradient((PI.detach() * corrected).sum(), LOGITS), reverse)
    assert torch.equal(corrected, grpo.k3(log_pi, log_ref))


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    """Differentiated on the policy's samples, summed per token, k3 gives
    sum_s d(s) grad KL(ref(.|s) || pi(.|s)) with the visits d(s) held fixed: the forward KL, not the
    reverse one that its value estimates (docstring of grpo.k3)."""
    ref = table(2).detach()
    estimate = grpo.k3(token_logprobs(LOGITS), token_logprobs(ref))
    found = gradient(expected(estimate, PI), LOGITS)
    logp, logq = LOGITS.log_softmax(-1), ref.log_softmax(-1)
    forward = (visits(PI) * logq.exp() * (logq - logp)).sum()
    reverse = (visits(PI) * logp.exp() * (logp - logq)).sum()
    assert close(found, gradient(forward, LOGITS))
    assert not close(found, gradient(reverse, LOGITS), 1e-3)


@pytest.mark.parametrize("sampler", [LOGITS, table(1)], ids=["on-policy", "off-policy"])
def test_k3_times_the_ratio_has_the_gradient_of_the_kl(sampler):
    """On samples of pi_old, whichever that is, ratio x k3, summed per token, is on average
    sum_s d_old(s) KL(pi(.|s) || ref(.|s)), with the visits d_old(s) of pi_old held fixed: in value
    and in gradient (2512.02556, eq. 7). k3 alone has neither off-policy, and on-policy the value of
    KL(pi || ref) with the gradient of KL(ref || pi)."""
    lp, ref, old = token_logprobs(LOGITS), table(2).detach(), token_logprobs(sampler).detach()
    samples = sequence_logprobs(sampler).exp().detach()              # (15,), their probabilities
    logp, logq = LOGITS.log_softmax(-1), ref.log_softmax(-1)
    kl = (visits(samples) * logp.exp() * (logp - logq)).sum()
    forward = (visits(samples) * logq.exp() * (logq - logp)).sum()
    corrected = expected(grpo.k3(lp, token_logprobs(ref), old), samples)
    alone = expected(grpo.k3(lp, token_logprobs(ref)), samples)
    assert close(corrected, kl) and close(gradient(corrected, LOGITS), gradient(kl, LOGITS))
    assert not close(gradient(alone, LOGITS), gradient(kl, LOGITS), 0.01)
    on_policy = sampler is LOGITS
    assert close(alone, kl) == on_policy
    assert close(gradient(alone, LOGITS), gradient(forward, LOGITS)) == on_policy
