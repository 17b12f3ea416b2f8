"""
PPO's advantages and the policy gradient, with the KL to the reference in the reward: exact
expectations over the world of 15 sequences, compared with the gradient of E[r] - kl_coef KL.
"""

import pytest
import torch

import ppo
from world import (GRAD_J, LOGITS, MASK, PI, PREFIXES, REWARD, SEQUENCES, STATE, close, expected,
                   gradient, sequence_logprobs, table, token_logprobs)

REF = table(2).detach()
KL_COEF = 0.3
NOTHING = torch.zeros(15, dtype=torch.float64)   # what comes after each sequence: they all ended


def kl_rewards(kl_coef=KL_COEF):
    """The project's token rewards of the 15 sequences, (15, 3)."""
    return ppo.token_rewards(REWARD, token_logprobs(LOGITS).detach(), token_logprobs(REF), MASK,
                             kl_coef)


def ppo_gradient(rewards, values, lam):
    """The exact expectation of the gradient of PPO's loss at pi = pi_old, with GAE's advantages."""
    advantages, _ = ppo.gae(rewards, values, MASK, NOTHING, 1.0, lam)
    lp = token_logprobs(LOGITS)
    losses, ratio, clipped = ppo.policy_loss(lp, lp.detach(), advantages)
    assert close(ratio, 1) and not clipped.any()
    return gradient(expected(losses, PI), LOGITS)


def objective_gradient(kl_coef=KL_COEF):
    """grad of E[r] - kl_coef KL(pi || ref), in closed form."""
    kl = (PI * (sequence_logprobs(LOGITS) - sequence_logprobs(REF))).sum()
    return gradient((PI * REWARD).sum() - kl_coef * kl, LOGITS)


def exact_values(kl_coef=KL_COEF):
    """V of the 7 prefixes, (7,), from the last back to the first: the expectation over the next
    token of its reward and what follows."""
    logp, logq = LOGITS.detach().log_softmax(-1), REF.log_softmax(-1)
    V = torch.zeros(7, dtype=torch.float64)
    for state, prefix in reversed(list(enumerate(PREFIXES))):
        for token in range(3):
            y = prefix + (token,)
            later = REWARD[SEQUENCES.index(y)] if y in SEQUENCES else V[PREFIXES.index(y)]
            reward = -kl_coef * (logp - logq)[state, token]
            V[state] += logp[state, token].exp() * (reward + later)
    return V


def test_token_rewards_telescope():
    """Summed over an answer: score - kl_coef log pi(y)/pi_ref(y) (2203.02155, eq. 2). Nothing is on
    padding."""
    rewards = kl_rewards()
    log_ratio = (sequence_logprobs(LOGITS) - sequence_logprobs(REF)).detach()
    assert close(rewards.sum(1), REWARD - KL_COEF * log_ratio) and log_ratio.abs().min() > 0.01
    assert (rewards[~MASK] == 0).all()


def test_token_rewards_worked_example():
    """The docstring's: log-ratios [.5, -.5, 1], the third on padding, score 1 -> [-.05, 1.05, 0];
    an empty answer has no last token to put a score on."""
    ref = torch.full((1, 3), -2.0, dtype=torch.float64)
    logprobs, mask = ref + torch.tensor([0.5, -0.5, 1.0]), torch.tensor([[True, True, False]])
    score = torch.tensor([1.0])
    assert close(ppo.token_rewards(score, logprobs, ref, mask, 0.1), [[-0.05, 1.05, 0]])
    assert (ppo.token_rewards(score, logprobs, ref, mask & False, 0.1) == 0).all()


def test_kl_in_the_reward_has_the_gradient_of_the_kl():
    """With reward-to-go (GAE, lam 1, V 0), E[grad] = grad(E[r] - kl_coef KL(pi || ref)), exactly;
    as a loss the sampled log-ratio would have had none (docstring of ppo.py)."""
    found = ppo_gradient(kl_rewards(), torch.zeros(15, 3), 1.0)
    assert close(found, -objective_gradient()) and not close(found, -GRAD_J, 0.01)
    assert close(ppo_gradient(kl_rewards(0.0), torch.zeros(15, 3), 1.0), -GRAD_J)
    log_ratio = token_logprobs(LOGITS) - token_logprobs(REF)
    assert close(gradient(expected(log_ratio, PI), LOGITS), 0)


@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_with_the_exact_critic_the_gradient_is_unbiased_for_every_lam(lam, kl_coef):
    """Whatever lam, where V is exact, E[grad] is the gradient of the objective (1506.02438, section
    3): the critic's error is the only bias."""
    values = exact_values(kl_coef)[STATE]
    found = ppo_gradient(kl_rewards(kl_coef), values, lam)
    assert close(found, -objective_gradient(kl_coef))


def test_with_a_wrong_critic_only_lam_1_is_unbiased():
    """At lam 1 any V is a mere baseline; below, its errors enter the gradient, the more the smaller
    lam."""
    noise = torch.randn(7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wrong = (exact_values() + noise)[STATE]
    errors = [(ppo_gradient(kl_rewards(), wrong, lam) + objective_gradient()).norm()
              for lam in (1, 0.95, 0.5, 0)]
    assert errors[0] < 1e-9 and errors[1] > 0.005 and errors[2] > 0.05
    assert errors == sorted(errors)


def test_the_exact_critic_expects_no_advantage():
    """E[A_t | s_t] = 0 in each of the 7 states, for every lam: only what was not expected is
    learned from. The value loss's gradient vanishes in expectation at the exact V."""
    V = exact_values().requires_grad_()
    for lam in (0.0, 0.5, 1.0):
        values = V.detach()[STATE]
        advantages, returns = ppo.gae(kl_rewards(), values, MASK, NOTHING, 1.0, lam)
        weighed = (advantages * PI.detach()[:, None])[MASK]
        by_state = torch.zeros(7, dtype=torch.float64).index_add(0, STATE[MASK], weighed)
        assert close(by_state, 0) and weighed.abs().max() > 1e-3
        losses = ppo.value_loss(V[STATE], values, returns)
        assert close(gradient(expected(losses, PI), V), 0)


def test_the_policy_clip_is_pessimistic():
    """The clipped loss is never below the unclipped one, and equals it inside the band (1707.06347,
    section 3)."""
    advantages = kl_rewards()
    lp, old = token_logprobs(LOGITS), token_logprobs(table(1))
    losses, ratio, clipped = ppo.policy_loss(lp, old, advantages, 0.2)
    inside = (ratio > 0.8) & (ratio < 1.2)
    plain = -ratio * advantages
    assert (losses >= plain).all() and torch.equal(losses > plain, clipped) and clipped.any()
    assert inside.any() and close(losses[inside], plain[inside])


def test_gradients_by_finite_differences():
    """Autograd equals (f(x + h) - f(x - h)) / 2h for both losses, inside the clips and beyond
    them."""
    old = token_logprobs(table(3)).detach()
    moved = (old + torch.tensor([-0.1, 0.4, -0.5])).requires_grad_()   # inside, above, below
    A = kl_rewards()
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, old, A, 0.2)[0], moved)
    assert torch.autograd.gradcheck(lambda x: ppo.value_loss(x, old, A, 0.2), moved)
