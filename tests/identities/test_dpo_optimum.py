"""
DPO and the optimum under a KL: what the population loss is minimised by, compared with what the
paper derives (2305.18290), in float64 to 1e-9.
"""

import math

import pytest
import torch

import data
import grpo
from dpo import preference_loss
from pairs import (BETA, BRADLEY_TERRY, CYCLIC, FIRST, MU, REF, SECOND, minimise, pair_losses,
                   policy_with, population_loss, scores, tilted)
from world import (LENGTHS, LOGITS, MASK, PI, REWARD, close, gradient, sequence_logprobs, table,
                   token_logprobs)


def test_dpo_gradient_vanishes_at_the_tilted_reference():
    """Under Bradley-Terry labels the population DPO loss is stationary at pi* = pi_ref exp(r /
    beta) / Z, whatever policy drew the pairs, and not near it (DPO, 2305.18290, eq. 4-7)."""
    best = policy_with(tilted(REF, REWARD, BETA))
    assert close(sequence_logprobs(best), tilted(REF, REWARD, BETA))   # the helper is right
    for mu in (MU, torch.full((15,), 1 / 15, dtype=torch.float64)):
        loss = population_loss(sequence_logprobs(best), mu=mu, beta=BETA)
        assert close(gradient(loss, best), 0)
        other = policy_with(tilted(REF, REWARD, 1.1 * BETA))
        loss = population_loss(sequence_logprobs(other), mu=mu, beta=BETA)
        assert gradient(loss, other).abs().max() > 1e-4


def test_what_dpo_learns_is_the_reward_up_to_a_constant():
    """Descending the loss ends where beta log pi / pi_ref = r - beta log Z (2305.18290, eq. 5)."""
    learned = minimise(lambda logps: population_loss(logps, beta=BETA))
    log_z = (REF + REWARD / BETA).logsumexp(0)
    assert close(BETA * (learned - REF), REWARD - BETA * log_z, 1e-8)


def test_what_dpo_learns_maximises_reward_minus_kl():
    """E[r] - beta KL(pi || ref) = beta log Z - beta KL(pi || pi*) for every pi: it is highest at
    pi*, by the KL to it. pi* is the minimiser of the project's loss, both KLs are averages of the
    project's k3 (2305.18290, eq. 3-4)."""
    learned = minimise(lambda logps: population_loss(logps, beta=BETA))
    log_z = (REF + REWARD / BETA).logsumexp(0)
    for seed in range(3):
        logps = sequence_logprobs(table(seed)).detach()
        kl_ref, kl_best = ((logps.exp() * grpo.k3(logps, other)).sum() for other in (REF, learned))
        objective = (logps.exp() * REWARD).sum() - BETA * kl_ref
        assert kl_best > 0.01 and close(objective, BETA * log_z - BETA * kl_best, 1e-8)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_dpo_loss_is_log_2_at_the_reference(beta):
    """At pi = pi_ref every margin is 0 and every pair costs log 2, whatever beta (docstring of
    preference_loss)."""
    assert close(pair_losses(REF, beta=beta), math.log(2))
    assert close(population_loss(REF, CYCLIC, beta=beta), math.log(2))


def test_dpo_ignores_what_depends_on_the_prompt_alone():
    """r + f(x) gives the same labels; log pi_ref + f(x), and log pi + f(x), give the same margins,
    so Z never needs to be known (2305.18290, section 5.1). (CPO, SimPO and ORPO have no reference
    to begin with.)"""
    logps = sequence_logprobs(LOGITS)
    same_labels = (REWARD[:, None] + 5 - (REWARD + 5)).sigmoid()
    assert close(population_loss(logps, beta=BETA), population_loss(logps, same_labels, beta=BETA))
    for loss_type in ("sigmoid", "robust", "hinge", "ipo"):
        losses = pair_losses(logps, loss_type=loss_type, beta=BETA)
        assert close(losses, pair_losses(logps, REF + 3, loss_type=loss_type, beta=BETA))
        assert close(losses, pair_losses(logps - 2, loss_type=loss_type, beta=BETA))


def test_dpo_gradient_closed_form():
    """grad L = -beta sigma(-beta m) [grad log pi(chosen) - grad log pi(rejected)], pair by pair:
    pairs in the wrong order weigh most (2305.18290, section 4)."""
    logps, score = sequence_logprobs(LOGITS), scores()
    losses = pair_losses(logps, beta=BETA)
    margin = ((logps - REF)[FIRST] - (logps - REF)[SECOND]).detach()
    weight = (-BETA * margin).sigmoid()[:, None, None]
    closed = -BETA * weight * (score[FIRST] - score[SECOND])
    for n in range(0, 225, 7):
        assert close(gradient(losses[n], LOGITS), closed[n])


@pytest.mark.parametrize("preferred", [BRADLEY_TERRY, CYCLIC], ids=["bradley-terry", "cyclic"])
def test_the_first_online_step_of_dpo_is_a_policy_gradient(preferred):
    """Both answers drawn from pi = pi_ref: grad L = -beta grad J with reward 2 winrate - 1, where
    winrate is the chance of beating another answer of the same policy. E[-beta/2 (2p - 1) (s - s')]
    has two equal halves, so the factor is beta."""
    policy = PI.detach()
    winrate = preferred @ policy
    logps = sequence_logprobs(LOGITS)
    loss = population_loss(logps, preferred, policy, logps.detach(), beta=BETA)
    policy_gradient = gradient((PI * (2 * winrate - 1)).sum(), LOGITS)
    assert close(gradient(loss, LOGITS), -BETA * policy_gradient)
    assert policy_gradient.abs().max() > 1e-3


def test_grpo_with_two_samples_is_the_first_step_of_dpo():
    """Group for group: with rewards 1 and 0 the two advantages are +1 and -1 (population
    deviation), and GRPO's gradient -(s_w - s_l) / 2 is DPO's at pi = pi_ref, -beta (s_w - s_l) / 2,
    but for beta. Groups without contrast give neither an advantage nor a pair. (K = 2 is also where
    dividing by the deviation is unbiased.)"""
    rewards = (REWARD > 0).double()[torch.stack([FIRST, SECOND], 1)]      # (225, 2)
    groups = torch.stack([FIRST, SECOND], 1).flatten()                    # (450,) group by group
    advantages = grpo.group_advantages(rewards, std_correction=0, advantage_eps=1e-300)
    lp = token_logprobs(LOGITS)[groups]
    losses, _, _ = grpo.policy_loss(lp, lp.detach(), advantages.flatten(), MASK[groups])
    by_group = (losses * MASK[groups]).sum(1).view(225, 2).mean(1)   # sum over tokens, mean over 2
    uniforms = torch.rand(225, 2, generator=torch.Generator().manual_seed(0))
    pairs = data.choose_pairs(rewards, uniforms)
    winner, loser = groups[pairs[0::2]], groups[pairs[1::2]]
    logps = sequence_logprobs(LOGITS)
    h = logps.detach()
    dpo = preference_loss(logps[winner], logps[loser], h[winner], h[loser], LENGTHS[winner],
                          LENGTHS[loser], beta=BETA)
    split = [n for n in range(225) if rewards[n, 0] != rewards[n, 1]]
    assert [n for n in (pairs[0::2] // 2).tolist()] == split and 25 < len(split) < 175
    for m, n in list(enumerate(split))[::5]:
        assert close(BETA * gradient(by_group[n], LOGITS), gradient(dpo[m], LOGITS))
    assert close(BETA * gradient(by_group.sum(), LOGITS), gradient(dpo.sum(), LOGITS))


def test_resetting_the_reference_k_times_is_dividing_beta_by_k():
    """Iterative DPO, three rounds at beta, each from where the last one ended, comes to where one
    round at beta / 3 does: pi_ref exp(3 r / beta) / Z. This is what --sync_ref does: the anchor
    moves along."""
    moving = REF
    for _ in range(3):
        moving = minimise(lambda logps, ref=moving: population_loss(logps, ref=ref, beta=2.0),
                          moving)
    once = minimise(lambda logps: population_loss(logps, beta=2.0 / 3))
    assert close(moving, once, 1e-7) and close(once, tilted(REF, REWARD, 2.0 / 3), 1e-7)
    assert not close(once, tilted(REF, REWARD, 2.0), 0.1)
