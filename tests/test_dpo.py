"""
dpo.py in three parts: the mathematics, on the world of 15 sequences that test_identities.py enumerates; the class, on a
real but tiny model; whole runs, in which the sampler lags behind the policy by as much as --sync_steps says.

In the first part nothing is sampled: the project's own losses get all 15 x 15 pairs as one batch, each weighted by its
probability, and the results are compared with what the papers derive, in float64 to 1e-9.
"""

import copy
import decimal
import itertools
import json
import math
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import grpo
import report
import train
from conftest import TASK, run
from dpo import (DPO, REFERENCE_FREE, DPOConfig, implicit_rewards, kto_loss, log1mexp,
                 preference_loss, rso_accept)
from model import InputError
from test_grpo import PROBLEMS, Letters, coin, float64, move, padded, tiny_model  # noqa: F401  (float64: a fixture)
from test_identities import (LENGTHS, LOGITS, MASK, PI, REWARD, SEQUENCES, close, gradient, sequence_logprobs, table,
                         token_logprobs)

PAIR_LOSSES = ["sigmoid", "robust", "hinge", "ipo", "cpo", "simpo", "orpo"]
BETA = 0.7
REF = sequence_logprobs(table(2)).detach()                                        # log pi_ref of the 15 sequences
MU = sequence_logprobs(table(4)).exp().detach()                                   # who drew the answers: anybody
FIRST, SECOND = torch.cartesian_prod(torch.arange(15), torch.arange(15)).T        # the 225 pairs, (225,) each
BRADLEY_TERRY = (REWARD[:, None] - REWARD).sigmoid()                              # (15, 15) chance that i beats j
# Preferences that no reward explains: rock, paper, scissors and the like.
CYCLIC = torch.randn(15, 15, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
CYCLIC = (CYCLIC - CYCLIC.T).sigmoid()


def pair_losses(logps, ref=REF, **flags):
    """The project's loss of every pair with i chosen and j rejected, from log pi of the 15 sequences: (225,)"""
    return preference_loss(logps[FIRST], logps[SECOND], ref[FIRST], ref[SECOND], LENGTHS[FIRST], LENGTHS[SECOND],
                           **flags)


def population_loss(logps, preferred=BRADLEY_TERRY, mu=MU, ref=REF, **flags):
    """Its expectation where both answers come from mu and i beats j with probability preferred[i, j]. Of two draws
    either may win, hence the 2: the weights add up to 1."""
    weights = 2 * mu[FIRST] * mu[SECOND] * preferred[FIRST, SECOND]
    return (pair_losses(logps, ref, **flags) * weights).sum()


def tilted(ref, reward, beta):
    """log pi* = log of pi_ref exp(reward / beta) / Z."""
    return (ref + reward / beta).log_softmax(0)


def policy_with(logps):
    """Logits (7, 3) of the policy that gives the 15 sequences these log-probabilities, by the chain rule."""
    mass = {}
    for sequence, p in zip(SEQUENCES, logps.exp().tolist()):
        for t in range(1, len(sequence) + 1):
            mass[sequence[:t]] = mass.get(sequence[:t], 0) + p
    prefixes = sorted({s[:t] for s in SEQUENCES for t in range(len(s))}, key=lambda p: (len(p), p))
    logits = [[math.log(mass[prefix + (token,)]) for token in range(3)] for prefix in prefixes]
    return torch.tensor(logits, dtype=torch.float64, requires_grad=True)


def minimise(loss, start=REF):
    """log pi (15,) of the policy at which loss(log pi) is least, found by Newton's method from the reference on."""
    logits = start.clone()
    value = lambda z: loss(z.log_softmax(0))                                              # noqa: E731
    for _ in range(12):
        logits.requires_grad_()
        slope, curvature = gradient(value(logits), logits), torch.autograd.functional.hessian(value, logits)
        logits = logits.detach() - torch.linalg.pinv(curvature, rtol=1e-10) @ slope       # a constant has no curvature
    return logits.log_softmax(0)


def scores():
    """grad log pi(y) of the 15 sequences, (15, 7, 3): what every closed form below is made of."""
    logps = sequence_logprobs(LOGITS)
    return torch.stack([gradient(lp, LOGITS) for lp in logps])


# -- DPO and the optimum under a KL -----------------------------------------------------------------------------------


def test_dpo_gradient_vanishes_at_the_tilted_reference():
    """Under Bradley-Terry labels the population DPO loss is stationary at pi* = pi_ref exp(r / beta) / Z, whoever drew
    the pairs, and nowhere near by (DPO, 2305.18290, eq. 4-7)."""
    best = policy_with(tilted(REF, REWARD, BETA))
    assert close(sequence_logprobs(best), tilted(REF, REWARD, BETA))                      # the helper is right
    for mu in (MU, torch.full((15,), 1 / 15, dtype=torch.float64)):
        assert close(gradient(population_loss(sequence_logprobs(best), mu=mu, beta=BETA), best), 0)
        other = policy_with(tilted(REF, REWARD, 1.1 * BETA))
        assert gradient(population_loss(sequence_logprobs(other), mu=mu, beta=BETA), other).abs().max() > 1e-4


def test_what_dpo_learns_is_the_reward_up_to_a_constant():
    """Descending the loss ends where beta log pi / pi_ref = r - beta log Z (2305.18290, eq. 5)."""
    learned = minimise(lambda logps: population_loss(logps, beta=BETA))
    log_z = (REF + REWARD / BETA).logsumexp(0)
    assert close(BETA * (learned - REF), REWARD - BETA * log_z, 1e-8)


def test_what_dpo_learns_maximises_reward_minus_kl():
    """E[r] - beta KL(pi || ref) = beta log Z - beta KL(pi || pi*) for every pi: it is highest at pi*, by the KL to it.
    pi* is the minimiser of the project's loss, both KLs are averages of the project's k3 (2305.18290, eq. 3-4)."""
    learned = minimise(lambda logps: population_loss(logps, beta=BETA))
    log_z = (REF + REWARD / BETA).logsumexp(0)
    for seed in range(3):
        logps = sequence_logprobs(table(seed)).detach()
        kl_ref, kl_best = ((logps.exp() * grpo.k3(logps, other)).sum() for other in (REF, learned))
        objective = (logps.exp() * REWARD).sum() - BETA * kl_ref
        assert kl_best > 0.01 and close(objective, BETA * log_z - BETA * kl_best, 1e-8)


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_dpo_loss_is_log_2_at_the_reference(beta):
    """At pi = pi_ref every margin is 0 and every pair costs log 2, whatever beta (docstring of preference_loss)."""
    assert close(pair_losses(REF, beta=beta), math.log(2))
    assert close(population_loss(REF, CYCLIC, beta=beta), math.log(2))


def test_dpo_ignores_what_depends_on_the_prompt_alone():
    """r + f(x) gives the same labels; log pi_ref + f(x), and log pi + f(x), give the same margins, so Z never needs to
    be known (2305.18290, section 5.1). (CPO, SimPO and ORPO have no reference to begin with.)"""
    logps = sequence_logprobs(LOGITS)
    same_labels = (REWARD[:, None] + 5 - (REWARD + 5)).sigmoid()
    assert close(population_loss(logps, beta=BETA), population_loss(logps, same_labels, beta=BETA))
    for loss_type in ("sigmoid", "robust", "hinge", "ipo"):
        losses = pair_losses(logps, loss_type=loss_type, beta=BETA)
        assert close(losses, pair_losses(logps, REF + 3, loss_type=loss_type, beta=BETA))
        assert close(losses, pair_losses(logps - 2, loss_type=loss_type, beta=BETA))


def test_dpo_gradient_closed_form():
    """grad L = -beta sigma(-beta m) [grad log pi(chosen) - grad log pi(rejected)], pair by pair: pairs in the wrong
    order weigh most (2305.18290, section 4)."""
    logps, score = sequence_logprobs(LOGITS), scores()
    losses, margin = pair_losses(logps, beta=BETA), ((logps - REF)[FIRST] - (logps - REF)[SECOND]).detach()
    closed = -BETA * (-BETA * margin).sigmoid()[:, None, None] * (score[FIRST] - score[SECOND])
    for n in range(0, 225, 7):
        assert close(gradient(losses[n], LOGITS), closed[n])


@pytest.mark.parametrize("preferred", [BRADLEY_TERRY, CYCLIC], ids=["bradley-terry", "cyclic"])
def test_the_first_online_step_of_dpo_is_a_policy_gradient(preferred):
    """Both answers drawn from pi = pi_ref: grad L = -beta grad J with reward 2 winrate - 1, the chance of beating
    another answer of one's own. E[-beta/2 (2p - 1) (s - s')] has two equal halves, so the factor is beta."""
    policy = PI.detach()
    winrate = preferred @ policy
    logps = sequence_logprobs(LOGITS)
    found = gradient(population_loss(logps, preferred, policy, logps.detach(), beta=BETA), LOGITS)
    policy_gradient = gradient((PI * (2 * winrate - 1)).sum(), LOGITS)
    assert close(found, -BETA * policy_gradient) and policy_gradient.abs().max() > 1e-3


def test_grpo_with_two_samples_is_the_first_step_of_dpo():
    """Group for group: with rewards 1 and 0 the two advantages are +1 and -1 (population deviation), and GRPO's
    gradient -(s_w - s_l) / 2 is DPO's at pi = pi_ref, -beta (s_w - s_l) / 2, but for beta. Groups without contrast
    give neither an advantage nor a pair. (K = 2 is also where dividing by the deviation is unbiased.)"""
    rewards = (REWARD > 0).double()[torch.stack([FIRST, SECOND], 1)]                      # (225, 2)
    groups = torch.stack([FIRST, SECOND], 1).flatten()                                    # (450,) rows, group by group
    advantages = grpo.group_advantages(rewards, std_correction=0, advantage_eps=1e-300)
    lp = token_logprobs(LOGITS)[groups]
    losses, _, _ = grpo.policy_loss(lp, lp.detach(), advantages.flatten(), MASK[groups])
    by_group = (losses * MASK[groups]).sum(1).view(225, 2).mean(1)  # sum over tokens, mean over two
    rows, skipped = data.choose_pairs(rewards, torch.rand(225, 2, generator=torch.Generator().manual_seed(0)))
    winner, loser = groups[rows[0::2]], groups[rows[1::2]]
    logps = sequence_logprobs(LOGITS)
    h = logps.detach()
    dpo = preference_loss(logps[winner], logps[loser], h[winner], h[loser], LENGTHS[winner], LENGTHS[loser], beta=BETA)
    split = [n for n in range(225) if rewards[n, 0] != rewards[n, 1]]
    assert len(split) == len(dpo) == 225 - skipped and 50 < skipped < 200
    for n, m in list(zip(split, range(len(split))))[::5]:
        assert close(BETA * gradient(by_group[n], LOGITS), gradient(dpo[m], LOGITS))
    assert close(BETA * gradient(by_group.sum(), LOGITS), gradient(dpo.sum(), LOGITS))


def test_resetting_the_reference_k_times_is_dividing_beta_by_k():
    """Iterative DPO, three rounds at beta, each from where the last one ended, comes to where one round at beta / 3
    does: pi_ref exp(3 r / beta) / Z. What --sync_ref is up to: the anchor drags."""
    moving = REF
    for _ in range(3):
        moving = minimise(lambda logps, ref=moving: population_loss(logps, ref=ref, beta=2.0), moving)
    once = minimise(lambda logps: population_loss(logps, beta=2.0 / 3))
    assert close(moving, once, 1e-7) and close(once, tilted(REF, REWARD, 2.0 / 3), 1e-7)
    assert not close(once, tilted(REF, REWARD, 2.0), 0.1)


# -- the kin ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preferred", [BRADLEY_TERRY, CYCLIC], ids=["bradley-terry", "cyclic"])
def test_ipo_optimum(preferred):
    """IPO is stationary at log pi / pi_ref = P(y beats mu) / beta + c, whether or not a reward explains the
    preferences: the optimum of winrate minus beta KL (2310.12036, eq. 17, theorem 2)."""
    winrate = preferred @ MU
    best = policy_with(tilted(REF, winrate, BETA))
    loss = population_loss(sequence_logprobs(best), preferred, loss_type="ipo", beta=BETA)
    assert close(gradient(loss, best), 0)
    other = policy_with(tilted(REF, winrate, BETA / 2))
    loss = population_loss(sequence_logprobs(other), preferred, loss_type="ipo", beta=BETA)
    assert gradient(loss, other).abs().max() > 1e-3


def test_hinge_is_silent_past_the_margin():
    """beta m >= 1: loss and gradient exactly 0. Below, the gradient is that of -beta m, however wrong the pair
    (2309.06657, eq. 11)."""
    logps, score = sequence_logprobs(LOGITS), scores()
    losses = pair_losses(logps, loss_type="hinge", beta=BETA)
    margin = ((logps - REF)[FIRST] - (logps - REF)[SECOND]).detach()
    past = BETA * margin >= 1
    assert 10 < past.sum() < 200 and (losses[past] == 0).all() and (losses[~past] > 0).all()
    assert (gradient(losses[past].sum(), LOGITS) == 0).all()
    closed = (-BETA * (score[FIRST] - score[SECOND]))[~past].sum(0)
    assert close(gradient(losses[~past].sum(), LOGITS), closed)


@pytest.mark.parametrize("flipped", [0.1, 0.3])
def test_robust_loss_is_unbiased_under_flipped_labels(flipped):
    """With a share of the labels flipped at random the expected robust loss is the DPO loss of the true labels, and so
    is its gradient (2403.00409, eq. 12). cDPO's is not: it is DPO trained on those flipped labels."""
    logps = sequence_logprobs(LOGITS)
    noisy = (1 - flipped) * BRADLEY_TERRY + flipped * BRADLEY_TERRY.T
    true = population_loss(logps, beta=BETA)
    robust = population_loss(logps, noisy, loss_type="robust", label_smoothing=flipped, beta=BETA)
    assert close(robust, true) and close(gradient(robust, LOGITS), gradient(true, LOGITS))
    smoothed = population_loss(logps, loss_type="sigmoid", label_smoothing=flipped, beta=BETA)
    assert close(smoothed, population_loss(logps, noisy, beta=BETA)) and not close(smoothed, true, 1e-3)


def test_cdpo_stops_at_a_finite_margin():
    """A pair is settled where sigma(beta m) = 1 - e; the plain loss would push for ever (ericmitchell.ai/cdpo.pdf)."""
    zero = torch.zeros(1, dtype=torch.float64)
    for margin, sign in ((math.log(9) / BETA, 0), (2.0 / BETA, -1), (3.0 / BETA, 1)):    # sigma(log 9) = .9
        m = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
        slope = gradient(preference_loss(m, zero, zero, zero, zero, zero, beta=BETA, label_smoothing=0.1).sum(), m)
        assert close(slope, 0) if sign == 0 else slope.sign() == sign


def test_kto_gradient_closed_form():
    """-+ lambda beta sigma(a) sigma(-a) grad log pi with a = beta h - z0: largest for answers of about average reward,
    none through z0 (2402.01306, eq. 7-8)."""
    logps, score = sequence_logprobs(LOGITS), scores()
    label, z0 = torch.arange(15) % 2 == 0, torch.tensor(0.3, dtype=torch.float64)
    losses = kto_loss(logps, REF, label, z0, BETA, 1.5, 0.5)
    a = (BETA * (logps - REF) - z0).detach()
    weight = torch.where(label, -1.5, 0.5).double() * BETA * a.sigmoid() * (-a).sigmoid()
    for n in range(15):
        assert close(gradient(losses[n], LOGITS), weight[n] * score[n])


def test_simpo_is_dpo_with_a_uniform_reference_where_lengths_agree():
    """Every answer of 3 tokens has the same probability under a uniform policy, 3^-3: SimPO at beta, without its
    margin, is then DPO at beta / 3 (2405.14734, section 2.2). Between answers of different length it is not."""
    uniform = -LENGTHS * math.log(3)
    logps = sequence_logprobs(LOGITS)
    simpo = pair_losses(logps, loss_type="simpo", beta=BETA, simpo_gamma=0.0)
    dpo = pair_losses(logps, uniform, beta=BETA / 3)
    equal = (LENGTHS[FIRST] == 3) & (LENGTHS[SECOND] == 3)
    assert equal.sum() == 144 and close(simpo[equal], dpo[equal])
    assert (simpo - dpo)[LENGTHS[FIRST] != LENGTHS[SECOND]].abs().min() > 1e-3


def test_simpo_compares_means_and_dpo_sums():
    """Two answers of the same probability per token: SimPO sees no difference, only its margin gamma; the sum of the
    longer one is lower. IPO has both kinds (2405.14734, section 2.2)."""
    args = [torch.tensor([x], dtype=torch.float64) for x in (-6.0, -2.0, 0.0, 0.0, 3.0, 1.0)]
    softplus = lambda x: math.log1p(math.exp(x))                                          # noqa: E731
    assert close(preference_loss(*args, loss_type="simpo", beta=2.0, simpo_gamma=0.5), [softplus(0.5)])
    assert close(preference_loss(*args, loss_type="simpo", beta=2.0, simpo_gamma=1.5), [softplus(1.5)])
    assert close(preference_loss(*args, loss_type="sigmoid", beta=0.5), [softplus(2.0)])
    assert close(preference_loss(*args, loss_type="ipo", beta=0.5, ipo_average=False), [(-4 - 1) ** 2])
    assert close(preference_loss(*args, loss_type="ipo", beta=0.5, ipo_average=True), [(0 - 1) ** 2])


def test_orpo_gradient_closed_form():
    """With g the mean over an answer's tokens of grad log pi and p its geometric mean probability:
    -g_w - beta sigma(-z) [g_w / (1 - p_w) - g_l / (1 - p_l)], z the log odds ratio (2403.07691, section 4.3)."""
    logps = sequence_logprobs(LOGITS)
    g = scores() / LENGTHS[:, None, None]
    losses = pair_losses(logps, loss_type="orpo", beta=BETA)
    p = (logps / LENGTHS).exp().detach()
    odds = p / (1 - p)
    wrong = 1 / (1 + odds[FIRST] / odds[SECOND])                                          # sigma(-z)
    pull = g / (1 - p)[:, None, None]
    closed = -g[FIRST] - BETA * wrong[:, None, None] * (pull[FIRST] - pull[SECOND])
    for n in range(0, 225, 7):
        assert close(gradient(losses[n], LOGITS), closed[n])


def test_cpo_is_dpo_without_a_reference_and_with_imitation():
    """DPO whose reference is flat, plus the chosen answer's nll per token (2401.08417, eq. 5-6), as a gradient too."""
    logps, flat = sequence_logprobs(LOGITS), torch.zeros(15, dtype=torch.float64)
    cpo = pair_losses(logps, loss_type="cpo", beta=BETA)
    assert close(cpo, pair_losses(logps, flat, beta=BETA) - (logps / LENGTHS)[FIRST])
    imitation = -(scores() / LENGTHS[:, None, None])[FIRST].sum(0)
    closed = imitation + gradient(pair_losses(logps, flat, beta=BETA).sum(), LOGITS)
    assert close(gradient(cpo.sum(), LOGITS), closed)


@pytest.mark.parametrize("loss_type", REFERENCE_FREE)
def test_reference_free_losses_never_read_the_reference(loss_type):
    """cpo, simpo and orpo are the same beside any reference."""
    logps = sequence_logprobs(LOGITS)
    assert torch.equal(pair_losses(logps, REF, loss_type=loss_type), pair_losses(logps, MU, loss_type=loss_type))


@pytest.mark.parametrize("flags", [dict(loss_type=loss_type) for loss_type in PAIR_LOSSES] + [
    dict(loss_type="sigmoid", label_smoothing=0.2), dict(loss_type="robust", label_smoothing=0.2),
    dict(loss_type="ipo", ipo_average=True)], ids=lambda flags: "-".join(map(str, flags.values())))
def test_gradients_by_finite_differences(flags):
    """Autograd equals (f(x + h) - f(x - h)) / 2h for every loss, through the log-probabilities of all 15 sequences."""
    logps = sequence_logprobs(LOGITS).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pair_losses(x, beta=BETA, **flags), logps)


# -- worked examples --------------------------------------------------------------------------------------------------


def test_preference_loss_worked_example():
    """The docstring's: beta .1, log pi -4 and -9, log pi_ref -5 and -8: m = 2; sigmoid .598, hinge .8, ipo 9."""
    args = [torch.tensor([x], dtype=torch.float64) for x in (-4.0, -9.0, -5.0, -8.0, 2.0, 3.0)]
    for loss_type, loss in (("sigmoid", 0.598), ("hinge", 0.8), ("ipo", 9.0)):
        assert preference_loss(*args, loss_type=loss_type).item() == pytest.approx(loss, abs=5e-4)
    args[0], args[1] = args[2], args[3]
    for beta in (0.1, 3.0):
        assert preference_loss(*args, beta=beta).item() == pytest.approx(math.log(2))


LOG = math.log


@pytest.mark.parametrize("flags, logps, ref_logps, lengths, loss", [
    (dict(loss_type="sigmoid", beta=1.0), (LOG(3), 0), (0, 0), (1, 1), LOG(4 / 3)),       # sigma(log 3) = 3/4
    (dict(loss_type="sigmoid", beta=0.5), (0, 0), (0, LOG(1 / 9)), (9, 2), LOG(4)),       # m = -log 9; lengths are idle
    (dict(loss_type="sigmoid", beta=1.0, label_smoothing=0.25), (LOG(3), 0), (0, 0), (1, 1),
     0.75 * LOG(4 / 3) + 0.25 * LOG(4)),
    (dict(loss_type="sigmoid", beta=1.0, label_smoothing=0.1), (0, LOG(3)), (0, 0), (1, 1),
     0.9 * LOG(4) + 0.1 * LOG(4 / 3)),
    (dict(loss_type="robust", beta=1.0), (LOG(3), 0), (0, 0), (1, 1), LOG(4 / 3)),        # no flips: DPO
    (dict(loss_type="robust", beta=1.0, label_smoothing=0.25), (LOG(3), 0), (0, 0), (1, 1),
     1.5 * LOG(4 / 3) - 0.5 * LOG(4)),
    (dict(loss_type="robust", beta=1.0, label_smoothing=0.4), (0, LOG(3)), (0, 0), (1, 1), 3 * LOG(4) - 2 * LOG(4 / 3)),
    (dict(loss_type="hinge", beta=0.5), (-1, -1), (-2, -1), (1, 1), 0.5),                 # m = 1
    (dict(loss_type="hinge", beta=0.5), (-3, -1), (-1, -1), (1, 1), 2.0),                 # m = -2
    (dict(loss_type="hinge", beta=0.5), (-1, -9), (-1, -1), (1, 1), 0.0),                 # m = 8: done
    (dict(loss_type="ipo", beta=0.5), (-1, -4), (-2, -3), (1, 1), 1.0),                   # m = 2, target 1
    (dict(loss_type="ipo", beta=0.25), (-4, -1), (-3, -2), (5, 1), 16.0),                 # m = -2, target 2
    (dict(loss_type="ipo", beta=0.5, ipo_average=True), (-1, -4), (-3, -1), (4, 1), 6.25),     # 2/4 + 3/1 = 3.5
    (dict(loss_type="ipo", beta=0.5, ipo_average=True), (-1, -1), (-3, -3), (2, 4), 0.25),     # 2/2 - 2/4 = .5
    (dict(loss_type="cpo", beta=1.0), (-1, -1 - LOG(3)), (-7, 7), (2, 1), LOG(4 / 3) + 0.5),
    (dict(loss_type="cpo", beta=2.0), (-6, -6), (-7, 7), (3, 1), LOG(2) + 2),
    (dict(loss_type="simpo", beta=2.0, simpo_gamma=0.0), (-2, -2 - LOG(3)), (-7, 7), (2, 2), LOG(4 / 3)),
    (dict(loss_type="simpo", beta=2.0, simpo_gamma=2.0), (-2, -6), (-7, 7), (2, 3), LOG(2)),   # 2 (-1 + 2) - 2 = 0
    (dict(loss_type="simpo", beta=1.0, simpo_gamma=LOG(3)), (-8, -2), (-7, 7), (4, 1), LOG(4)),     # equal means
    (dict(loss_type="orpo", beta=0.5), (-LOG(2), -LOG(4)), (-7, 7), (1, 1), LOG(2) + 0.5 * LOG(4 / 3)),    # odds 1, 1/3
    (dict(loss_type="orpo", beta=1.0), (-2 * LOG(4), -3 * LOG(2)), (-7, 7), (2, 3), LOG(4) + LOG(4)),      # odds 1/3, 1
    (dict(loss_type="orpo", beta=1.0), (-3 * LOG(2), -LOG(2)), (-7, 7), (3, 1), LOG(2) + LOG(2)),          # equal odds
])
def test_preference_losses_worked_by_hand(flags, logps, ref_logps, lengths, loss):
    """At least two values for each loss_type, chosen so that every sigmoid is 1/4, 1/2 or 3/4. Reference-free losses
    are given an absurd reference."""
    args = [torch.tensor([float(x)], dtype=torch.float64) for x in (*logps, *ref_logps, *lengths)]
    assert close(preference_loss(*args, **flags), [loss])


def test_preference_loss_treats_each_pair_by_itself():
    """Three pairs in one call are three calls."""
    generator = torch.Generator().manual_seed(0)
    columns = [-torch.rand(3, generator=generator, dtype=torch.float64) * 5 for _ in range(4)]
    columns += [torch.tensor(x, dtype=torch.float64) for x in ([1, 2, 3], [3, 1, 2])]
    for loss_type in PAIR_LOSSES:
        together = preference_loss(*columns, loss_type=loss_type)
        alone = [preference_loss(*(c[n:n + 1] for c in columns), loss_type=loss_type).item() for n in range(3)]
        assert together.shape == (3,) and close(together, alone)


@pytest.mark.parametrize("function, arguments", [(preference_loss, 6), (implicit_rewards, 3)])
@pytest.mark.parametrize("loss_type", ["nll", "Sigmoid", ""])
def test_an_unknown_loss_type_names_the_choices(function, arguments, loss_type):
    """Not a silent default, and no bare word: the error says which losses there are."""
    choices = "sigmoid, robust, hinge, ipo, (kto, )?cpo, simpo, orpo"
    with pytest.raises(ValueError, match=f"^loss_type '{loss_type}' is none of {choices}$"):
        function(*[torch.ones(2)] * arguments, loss_type=loss_type)


# Chosen: log pi -6, log pi_ref -8, 4 tokens. Rejected: log pi -3, log pi_ref -4, 1 token. beta .1.
# Summed log-ratios 2 and 1, means 1/2 and 1: sums and means disagree on which is better. log pi: -6
# and -3, per token -1.5 and -3: they disagree again.
@pytest.mark.parametrize("flags, chosen, rejected", [
    *[(dict(loss_type=name), 0.2, 0.1) for name in ("sigmoid", "robust", "hinge", "ipo", "kto")],
    (dict(loss_type="ipo", ipo_average=True), 0.05, 0.1),
    (dict(loss_type="sigmoid", ipo_average=True), 0.2, 0.1),   # a flag of ipo alone
    (dict(loss_type="cpo"), -0.6, -0.3),
    (dict(loss_type="simpo"), -0.15, -0.3),
    (dict(loss_type="orpo"), -0.15, -0.3),
])
def test_implicit_rewards_worked_by_hand(flags, chosen, rejected):
    """What each loss compares: beta times the log-ratio, for averaged ipo per token; for losses
    without a reference beta log pi, for simpo and orpo per token. beta is a factor."""
    args = [torch.tensor(x, dtype=torch.float64) for x in ([-6.0, -3.0], [-8.0, -4.0], [4.0, 1.0])]
    assert close(implicit_rewards(*args, **flags), [chosen, rejected])
    assert close(implicit_rewards(*args, **flags, beta=0.2), [2 * chosen, 2 * rejected])


WITH_AVERAGES = [dict(loss_type=loss_type) for loss_type in PAIR_LOSSES]
WITH_AVERAGES += [dict(loss_type="ipo", ipo_average=True)]
NAMED = dict(ids=lambda flags: "-".join(map(str, flags.values())))


@pytest.mark.parametrize("flags", WITH_AVERAGES, **NAMED)
def test_the_loss_is_a_function_of_the_margin_of_its_rewards(flags):
    """Of all 225 pairs: the loss (of cpo and orpo the part that compares) is a function of the
    difference of the implicit rewards: the logged margin is the optimised one. (orpo: in sign.)"""
    logps = sequence_logprobs(LOGITS).detach()
    rewards = implicit_rewards(logps, REF, LENGTHS, **flags, beta=BETA)
    margin = rewards[FIRST] - rewards[SECOND]
    losses = pair_losses(logps, **flags, beta=BETA)
    if flags["loss_type"] in ("cpo", "orpo"):
        losses = losses + (logps / LENGTHS)[FIRST]   # without the chosen answer's nll
    closed = {"sigmoid": lambda m: -m.sigmoid().log(), "robust": lambda m: -m.sigmoid().log(),
              "cpo": lambda m: -m.sigmoid().log(), "simpo": lambda m: -(m - 0.5).sigmoid().log(),
              "hinge": lambda m: (1 - m).clamp(min=0),
              "ipo": lambda m: (m / BETA - 1 / (2 * BETA)) ** 2}
    if flags["loss_type"] == "orpo":   # a tie costs beta log 2
        assert torch.equal(losses < BETA * math.log(2) - 1e-9, margin > 1e-9)
        assert (margin > 1e-9).sum() > 50
    else:
        assert close(losses, closed[flags["loss_type"]](margin))


@pytest.mark.parametrize("beta_h, z0, weights, good, bad", [
    (0, 0, (1, 1), 0.5, 0.5),                              # the docstring's
    (LOG(3), 0, (1, 1), 0.25, 0.75),
    (-LOG(3), 0, (1, 1), 0.75, 0.25),
    (LOG(3), LOG(3), (1, 1), 0.5, 0.5),                    # better than pi_ref, no better than the average answer
    (0, LOG(3), (2, 4), 1.5, 1.0),
])
def test_kto_loss_worked_by_hand(beta_h, z0, weights, good, bad):
    """1 - sigma(beta h - z0) of a good answer, 1 - sigma(z0 - beta h) of a bad one, each with its weight
    (2402.01306, eq. 7-8)."""
    ref_logps = torch.tensor([-5.0, -2.0], dtype=torch.float64)
    losses = kto_loss(ref_logps + beta_h / 0.5, ref_logps, torch.tensor([True, False]), torch.tensor(z0), 0.5, *weights)
    assert close(losses, [good, bad], 1e-7)


def test_log1mexp_against_fifty_digits():
    """log(1 - e^x) at x from -1e-6 to -40, against decimal arithmetic of 50 digits; naive float64 loses half of
    them."""
    decimal.getcontext().prec = 50
    xs = [-1e-6, -1e-5, -1e-3, -0.1, -0.5, -LOG(2), -1.0, -3.0, -10.0, -40.0]
    exact = [float((1 - decimal.Decimal(x).exp()).ln()) for x in xs]
    found = log1mexp(torch.tensor(xs, dtype=torch.float64))
    assert close(found, exact, 1e-14) and close(found[5], -LOG(2), 1e-14)
    assert abs(math.log(1 - math.exp(-1e-6)) - exact[0]) > 1e-12


def test_orpo_is_finite_where_the_answer_is_certain():
    """p = 1 has infinite odds; neither loss nor gradient may be nan or infinite there."""
    for dtype in (torch.float32, torch.float64):
        logps = torch.tensor([0.0, -1e-9, -1e-6, -1.0], dtype=dtype, requires_grad=True)
        one, zero = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
        for chosen, rejected in ((logps, logps.flip(0)), (logps, logps)):
            loss = preference_loss(chosen, rejected, zero, zero, one, one, loss_type="orpo").sum()
            assert loss.isfinite() and gradient(loss, logps).isfinite().all()


# -- which answers make a pair ----------------------------------------------------------------------------------------


def test_choose_pairs_worked_example():
    """The docstring's: rewards [1, 0, 1, 0] give each of (0, 1), (0, 3), (2, 1), (2, 3) equally often, over all
    orders of the lots; [1, 1, 1, 1] give none."""
    lots = torch.tensor(list(itertools.permutations([0.0, 0.2, 0.4, 0.9])))               # (24, 4): all orders
    rows, skipped = data.choose_pairs(torch.tensor([[1.0, 0, 1, 0]]).expand(24, 4), lots)
    pairs = [(c % 4, r % 4) for c, r in rows.view(-1, 2).tolist()]
    assert skipped == 0 and {p: pairs.count(p) for p in pairs} == {(0, 1): 6, (0, 3): 6, (2, 1): 6, (2, 3): 6}
    rows, skipped = data.choose_pairs(torch.ones(24, 4), lots)
    assert len(rows) == 0 and skipped == 24


@pytest.mark.parametrize("pair_selection", ["random", "best_worst"])
def test_choose_pairs_exhaustively(pair_selection):
    """All rewards in {0, .5, 1}^3, all sets of accepted answers, all orders of the lots: chosen is a best accepted
    answer, rejected a worse one (best_worst: a worst one), each allowed pair equally often; the rest is counted as
    skipped."""
    cases = list(itertools.product(itertools.product([0.0, 0.5, 1.0], repeat=3),
                                   itertools.product([False, True], repeat=3)))
    orders = list(itertools.permutations([0.0, 0.3, 0.6]))
    rewards, accepted, lots = (torch.tensor(x) for x in zip(*((r, a, o) for r, a in cases for o in orders)))
    rows, skipped = data.choose_pairs(rewards, lots, pair_selection, accepted)
    chosen, rejected = rows[0::2].tolist(), rows[1::2].tolist()
    assert [c // 3 for c in chosen] == [r // 3 for r in rejected] == sorted(c // 3 for c in chosen)  # of one group each
    found = {n: [] for n in range(len(cases))}
    for c, r in zip(chosen, rejected):
        found[c // 3 // len(orders)].append((c % 3, r % 3))
    flat = 0
    for n, (reward, kept) in enumerate(cases):
        alive = [i for i in range(3) if kept[i]]
        top, bottom = (pick((reward[i] for i in alive), default=0) for pick in (max, min))
        pairs = [(i, j) for i in alive for j in alive if reward[j] < reward[i] == top
                 and (pair_selection == "random" or reward[j] == bottom)]
        flat += not pairs
        assert sorted(found[n]) == sorted(pairs * (len(orders) // max(len(pairs), 1))), (reward, kept)
    assert skipped == flat * len(orders) > 0
    everything = torch.ones_like(accepted)
    assert torch.equal(data.choose_pairs(rewards, lots, pair_selection)[0],
                       data.choose_pairs(rewards, lots, pair_selection, everything)[0])


def test_choose_pairs_draws_uniformly():
    """40,000 groups with rewards [1, 1, 0, .5, 0]: the six pairs of right and wrong come a sixth of the time each,
    chosen and rejected independently; of the extremes four pairs, a quarter of the time each."""
    n = 40_000
    lots = torch.rand(n, 5, generator=torch.Generator().manual_seed(0))
    rewards = torch.tensor([[1, 1, 0, 0.5, 0]]).expand(n, 5)
    for pair_selection, losers in (("random", (2, 3, 4)), ("best_worst", (2, 4))):
        rows, _ = data.choose_pairs(rewards, lots, pair_selection)
        counts = torch.bincount(rows[0::2] % 5 * 5 + rows[1::2] % 5, minlength=25).view(5, 5) / n
        expected = torch.zeros(5, 5)
        for i, j in itertools.product((0, 1), losers):
            expected[i, j] = 1 / (2 * len(losers))
        assert (counts - expected).abs().max() < 0.01, pair_selection                     # five standard deviations


def test_rso_accepts_with_the_probability_of_the_tilted_policy():
    """exp((r - max of the group) / beta): a grid of lots counts it exactly. The best is always kept, a constant added
    to a group's rewards changes nothing, each group has its own maximum (2309.06657, section 3.2)."""
    lots = ((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)[:, None].expand(-1, 3)
    for rewards, rso_beta in (([1.0, 0.5, 0.0], 0.5), ([5.0, 4.5, 4.0], 0.5), ([1.0, 0.5, 0.0], 2.0),
                              ([-3.0, 1.0, 1.0], 1.0)):
        group = torch.tensor([rewards], dtype=torch.float64).expand(10_000, 3)
        share = rso_accept(group, lots, rso_beta).double().mean(0)
        assert close(share, [math.exp((r - max(rewards)) / rso_beta) for r in rewards], 1e-4)
    two_groups = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    assert rso_accept(two_groups, torch.full((2, 2), 0.3), 1.0).all()                     # e^-1 = .37 in either
    assert rso_accept(two_groups, torch.full((2, 2), 0.4), 1.0).tolist() == [[True, False]] * 2


def test_rso_pairs_come_in_the_ratio_of_the_tilted_policy():
    """Of a group with one best answer and 40 each at .5 and 0, equally likely under pi, those at .5 are rejected
    exp(.5 / beta) times as often: pi* is sampled without being known. Without rejection it is one to one."""
    n, rso_beta = 3000, 0.5
    rewards = torch.tensor([[1.0] + [0.5] * 40 + [0.0] * 40]).expand(n, 81)
    lots, again = torch.rand(2, n, 81, generator=torch.Generator().manual_seed(0))
    ratios = []
    for accepted in (rso_accept(rewards, again, rso_beta), None):
        rows, skipped = data.choose_pairs(rewards, lots, accepted=accepted)
        assert skipped == 0 and (rows[0::2] % 81 == 0).all()
        rejected = rows[1::2] % 81
        ratios.append(float((rejected <= 40).sum() / (rejected > 40).sum()))
    assert ratios[0] == pytest.approx(math.exp(0.5 / rso_beta), rel=0.1) and ratios[1] == pytest.approx(1, rel=0.1)


# -- the majority as a reward -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("completions, rewards", [
    (["6", "6", "4"], [1, 1, 0]),                          # the docstring's
    (["4", "6", "6"], [0, 1, 1]),
    (["4", "6"], [1, 0]),                                  # a tie: the first
    (["4", "6", "6", "4", "5"], [1, 0, 0, 1, 0]),
    (["5", "7+5=2;2*3=6", "2*3=6"], [0, 1, 1]),            # the final answer counts, not the way to it
    (["6"], [1]),
])
def test_majority_worked_by_hand(completions, rewards):
    """1 for the commonest final answer to the prompt, of equally common ones the first (2504.16084)."""
    assert data.majority(data.Chain(), ["7+5*3="] * len(completions), completions) == rewards


def test_each_prompt_has_its_own_majority():
    """Votes are counted prompt by prompt, also where the answers to several prompts are mixed; the verifier has no say,
    but is logged as true_reward."""
    prompts = ["1+1=", "2+2=", "1+1=", "2+2=", "1+1=", "2+2="]
    completions = ["3", "3", "3", "4", "2", "4"]
    assert data.majority(data.Chain(), prompts, completions) == [1, 0, 1, 1, 0, 1]
    examples = [{"prompt": p, "answer": str(data.Chain.solve(p)["answer"])} for p in prompts]
    total, each = data.Rewards(data.Chain(), "majority")(examples, completions)
    assert total.tolist() == each["majority"].tolist() == [1, 0, 1, 1, 0, 1]
    assert each["true_reward"].tolist() == [0, 0, 0, 1, 1, 1]


def test_majority_compares_values_where_the_task_does():
    """In a file's answers `1,000` and `so 1000.0` are one number; in countdown `3*7+5` and `26` one value."""
    files = SimpleNamespace(final_answer=data.JsonLines.final_answer)
    assert data.majority(files, ["q"] * 3, ["7", "1,000", "so 1000.0"]) == [0, 1, 1]
    assert data.majority(data.Countdown(), ["q"] * 3, ["3+7", "3*7+5", "5+7*3"]) == [0, 1, 1]


# -- the class: what it collects --------------------------------------------------------------------------------------

PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in (
    ("7+5=", "2", "3"), ("1-2*3=", "1-2=9;9*3=7", "7"), ("9*9=", "8", "8"), ("4+4-1=", "7", "4+4=9;9-1=8"),
    ("0+1=", "", "1"))]
SINGLES = [{"prompt": p, "completion": c, "label": label} for p, c, label in (
    ("7+5=", "2", True), ("1-2*3=", "1-2=9;9*3=7", True), ("9*9=", "8", False), ("4+4-1=", "4+4=9", False),
    ("0+1=", "1", True))]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # a picture takes longer than a run


DRAW = 14   # a seed with which the first group is flat and the other three are not, in float32 and in float64


def write_jsonl(rows, name="data.jsonl"):
    with open(name, "w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return name


def make_dpo(rows=None, **flags):
    """DPO on problems with groups of 4 and the reward `coin`, or on a file with the given rows. The reference is
    another model than the policy, so that nothing cancels by chance."""
    config = DPOConfig(**{"num_generations": 4, **flags})
    if rows is None:
        algo = DPO(config, tiny_model(), tiny_model(seed=1), Letters(), data.Chain(2, 3))
        algo.rewards.functions = {"coin": coin}
        return algo
    path = write_jsonl(rows)
    return DPO(config, tiny_model(), tiny_model(seed=1), Letters(), data.JsonLines(path, path))


def collect(algo, examples=PROBLEMS):
    return algo.collect(examples, torch.Generator().manual_seed(DRAW))


def minibatch_of(algo, examples=PROBLEMS):
    [minibatch] = algo.minibatches(collect(algo, examples)[0])
    return minibatch


def loss_and_gradient(algo, batch, micro_batch_size=0):
    """Summed over micro-batches as train.update does: the loss, one long gradient, the metrics."""
    algo.model.zero_grad()
    total, metrics = 0.0, {}
    for micro in data.split(batch, micro_batch_size, algo.rows_together):
        loss, micro_metrics = algo.loss(micro)
        loss.backward()
        total = total + loss.detach()
        train.add(metrics, micro_metrics)
    return total, torch.cat([p.grad.flatten() for p in algo.model.parameters()]), metrics


def same_results(a, b):
    return close(a[0], b[0]) and close(a[1], b[1]) and a[2].keys() == b[2].keys() \
        and all(a[2][name] == pytest.approx(b[2][name], abs=1e-9) for name in a[2])


def texts_of(algo, batch):
    """[(prompt, completion)] of a batch's rows, decoded through the masks."""
    prompts = [algo.tokenizer.decode(row[mask][1:].tolist())
               for row, mask in zip(batch["prompt_ids"], batch["prompt_mask"])]
    completions = [algo.tokenizer.decode(row[mask].tolist())
                   for row, mask in zip(batch["completion_ids"], batch["completion_mask"])]
    return [(prompts[i], c) for i, c in zip(batch["prompt_index"].tolist(), completions)]


def direct_logps(algo, model, batch):
    """Log-probability of each answer from one unpadded forward pass of its own, <end> included; and its length."""
    found, lengths = [], []
    for b, i in enumerate(batch["prompt_index"].tolist()):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i]]
        completion = batch["completion_ids"][b][batch["completion_mask"][b]]
        logprobs = model(torch.cat([prompt, completion])[None])[0].log_softmax(-1)[len(prompt) - 1:-1]
        found.append(logprobs.gather(-1, completion[:, None]).sum().item())
        lengths.append(len(completion))
    return torch.tensor(found, dtype=torch.float64), torch.tensor(lengths, dtype=torch.float64)


@pytest.mark.parametrize("pair_selection", ["random", "best_worst"])
def test_pairs_of_the_policys_own_answers(pair_selection):
    """Rows come chosen, rejected, chosen, ... of one prompt each, the chosen one rewarded more, both as sampled; the
    first problem, always right, has no contrast and is counted as skipped (2506.21495, section 2)."""
    algo = make_dpo(pair_selection=pair_selection)
    batch, metrics = collect(algo)
    rows = texts_of(algo, batch)
    assert metrics["skipped_pairs"] == (1, 4) and len(rows) == 6 and "7+5=" not in dict(rows)
    assert batch["label"].tolist() == [True, False] * 3
    assert [coin([p], [c])[0] for p, c in rows] == [1, 0] * 3 == batch["rewards"].tolist()
    assert [p for p, _ in rows[0::2]] == [p for p, _ in rows[1::2]] == [e["prompt"] for e in PROBLEMS[1:]]
    prompts = data.collate([{"prompt": e["prompt"]} for e in PROBLEMS], algo.tokenizer)
    samples = algo.model.generate(prompts["prompt_ids"], prompts["prompt_mask"], algo.task.max_new_tokens, 16, 17, 4,
                                  generator=torch.Generator().manual_seed(DRAW))
    sampled = {(PROBLEMS[b // 4]["prompt"], algo.tokenizer.decode(ids))
               for b, ids in enumerate(samples.completion_ids.tolist())}
    assert set(rows) <= sampled and metrics["sampled_tokens"] == samples.completion_mask.sum()


def test_the_lots_differ_from_step_to_step():
    """Another generator, another draw of the answers and of the pair."""
    algo = make_dpo()
    drawn = [texts_of(algo, algo.collect(PROBLEMS, torch.Generator().manual_seed(seed))[0]) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_settings_reach_the_sampling():
    """A temperature near 0 makes the answers of a group alike, so that no pair is left; --num_generations is how many
    there are; rso with a small beta accepts right answers alone, as its help says, and leaves no pair either."""
    assert collect(make_dpo(temperature=1e-4))[1]["skipped_pairs"] == (4, 4)
    assert collect(make_dpo(num_generations=6))[1]["reward"][1] == 24
    assert collect(make_dpo(pair_sampling="rso", rso_beta=1e-3))[1]["skipped_pairs"] == (4, 4)
    assert collect(make_dpo(pair_sampling="rso", rso_beta=1e3))[1]["skipped_pairs"] == (1, 4)


def test_groups_without_contrast_are_skipped():
    """Where no group has a contrast there is no batch, one update of nothing, and the weights stay as they are."""
    algo = make_dpo()
    batch, metrics = collect(algo, PROBLEMS[:1] * 3)  # the problem that is always right
    assert batch is None and metrics["skipped_pairs"] == (3, 3) and algo.minibatches(batch) == [None]
    before, totals = copy.deepcopy(algo.model.state_dict()), {}
    args = SimpleNamespace(device="cpu", dtype="float32", micro_batch_size=0, max_grad_norm=1.0)
    assert train.update(args, algo, algo.model.configure_optimizer(1e-2, 0.0), None, totals) == 0
    assert totals["loss"] == (0, 1) and all(torch.equal(before[k], v) for k, v in algo.model.state_dict().items())


def test_preference_pairs_of_a_file():
    """Rows chosen, rejected, ... as the file has them, each with its <end>; a pair of equal answers, which would cost
    log 2 for ever and teach nothing, is counted and skipped (rlhf-book issue 503)."""
    algo = make_dpo(PAIRS)
    batch, metrics = data.preference_pairs(PAIRS, algo.tokenizer)
    different = [e for e in PAIRS if e["prompt"] != "9*9="]
    assert texts_of(algo, batch) == [(e["prompt"], e[name]) for e in different for name in ("chosen", "rejected")]
    assert metrics["skipped_pairs"] == (1, 5)
    ends = batch["completion_ids"][torch.arange(8), batch["completion_mask"].sum(-1) - 1]
    assert (ends == algo.tokenizer.eos_id).all()
    assert data.preference_pairs(PAIRS[2:3] * 2, algo.tokenizer) == (None, {"skipped_pairs": (2, 2)})
    collected, metrics = collect(algo, PAIRS)
    assert metrics == {"skipped_pairs": (1, 5)} and collected["label"].tolist() == [True, False] * 4
    assert texts_of(algo, collected) == texts_of(algo, batch)
    batch, metrics = collect(algo, PAIRS[2:3])
    assert algo.minibatches(batch) == [None] and metrics["skipped_pairs"] == (1, 1)


def test_single_answers_of_a_file():
    """For kto the file's answers come one by one with their labels; nothing is sampled and nothing skipped."""
    algo = make_dpo(SINGLES, loss_type="kto")
    batch, metrics = collect(algo, SINGLES)
    assert texts_of(algo, batch) == [(e["prompt"], e["completion"]) for e in SINGLES] and metrics == {}
    assert batch["label"].tolist() == [e["label"] for e in SINGLES] and algo.rows_together == 1


# -- the class: what it computes --------------------------------------------------------------------------------------


def test_logps_sum_the_tokens_of_the_answer_and_its_end(float64):  # noqa: F811
    """Against one unpadded forward pass for each answer: a sum over completion tokens, <end> included, prompt and
    padding excluded; the lengths count the same tokens. (Means for sums: eric-mitchell/direct-preference-optimization
    issue 40.)"""
    algo = make_dpo(PAIRS)
    for minibatch in (minibatch_of(algo, PAIRS), minibatch_of(make_dpo())):
        logps, lengths = algo.logps(algo.model, minibatch)
        direct, direct_lengths = direct_logps(algo, algo.model, minibatch)
        assert close(logps, direct) and close(lengths, direct_lengths) and len(set(lengths.tolist())) > 2
    batch = minibatch_of(algo, PAIRS)
    assert algo.logps(algo.model, batch)[1].tolist() == [len(c) + 1 for _, c in texts_of(algo, batch)]


ALL_LOSSES = [dict(loss_type=loss_type) for loss_type in PAIR_LOSSES + ["kto"]] + [
    dict(loss_type="sigmoid", label_smoothing=0.2), dict(loss_type="robust", label_smoothing=0.2),
    dict(loss_type="ipo", ipo_average=True), dict(loss_type="sigmoid", rpo_alpha=1.0),
    dict(loss_type="hinge", beta=0.2), dict(loss_type="simpo", rpo_alpha=0.5, beta=2.0),
    dict(loss_type="kto", desirable_weight=2.0, undesirable_weight=0.5)]
each_loss = pytest.mark.parametrize("flags", ALL_LOSSES, ids=lambda flags: "-".join(map(str, flags.values())))


@each_loss
def test_the_loss_is_that_of_the_papers(float64, flags):  # noqa: F811
    """Through the class: the mean over pairs (kto: over answers) of the pure function with the configured settings, at
    log-probabilities from unpadded passes of policy and reference; rpo_alpha adds the chosen answers' mean nll."""
    algo = make_dpo(**flags)
    minibatch = minibatch_of(algo)
    logps, lengths = direct_logps(algo, algo.model, minibatch)
    ref, _ = direct_logps(algo, algo.ref_model, minibatch)
    config = {name: value for name, value in flags.items() if name != "rpo_alpha"}
    if flags["loss_type"] == "kto":
        del config["loss_type"]
        expected = kto_loss(logps, ref, torch.tensor([True, False] * 3), minibatch["z0"][0], **config).mean()
    else:
        pair = lambda x: (x[0::2], x[1::2])                                               # noqa: E731
        losses = preference_loss(*pair(logps), *pair(ref), *pair(lengths), **config)
        expected = (losses - flags.get("rpo_alpha", 0) * (logps / lengths)[0::2]).mean()
    loss, grad, _ = loss_and_gradient(algo, minibatch)
    assert close(loss, expected) and grad.abs().max() > 1e-4


@each_loss
def test_model_gradients_by_finite_differences(float64, flags):  # noqa: F811
    """Of the class's loss in the weights of the transformer: along random directions, and for single weights."""
    algo = make_dpo(**flags)
    minibatch = minibatch_of(algo)
    _, grad, _ = loss_and_gradient(algo, minibatch)
    start = torch.nn.utils.parameters_to_vector(algo.model.parameters()).detach()
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(len(start), generator=generator) for _ in range(2)]
    directions += [torch.nn.functional.one_hot(grad.abs().argmax(), len(start)).to(start.dtype)]
    h = 1e-6
    for direction in directions:
        values = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(start + sign * h * direction, algo.model.parameters())
            with torch.no_grad():
                values.append(algo.loss(minibatch)[0].item())
        slope = (values[0] - values[1]) / (2 * h)
        assert slope == pytest.approx(float(grad @ direction), rel=1e-5, abs=1e-7) and abs(slope) > 1e-6


@each_loss
def test_micro_batches_and_padding_change_nothing(float64, flags):  # noqa: F811
    """Loss, gradient and metrics are those of the batch for micro-batches of any size, even and odd, and with wider
    padding; the reference (and z0) scored in micro-batches is the same. The policy is not the reference, and has
    moved."""
    algo = make_dpo(**flags)
    batch, _ = collect(algo)
    move(algo.model)
    [minibatch] = algo.minibatches(batch)
    whole = loss_and_gradient(algo, minibatch)
    for size in (1, 2, 3, 4, 5):
        algo.micro_batch_size = size
        [again] = algo.minibatches(batch)
        assert same_results(loss_and_gradient(algo, again, size), whole), f"micro-batches of {size}"
    weights = {"weights": minibatch["weights"]}  # one a row here, not one a token
    wider = {**padded({name: value for name, value in minibatch.items() if name not in weights}), **weights}
    assert same_results(loss_and_gradient(algo, wider), whole), "wider padding"


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_pairs_are_never_parted(loss_type):
    """Micro-batches of 1, 2 and 3 rows all hold one pair, of 4 and 5 two: chosen and rejected of the same prompt."""
    algo = make_dpo(loss_type=loss_type)
    minibatch = minibatch_of(algo)
    for size, rows in ((1, [2, 2, 2]), (2, [2, 2, 2]), (3, [2, 2, 2]), (4, [4, 2]), (5, [4, 2]), (6, [6]), (99, [6])):
        parts = data.split(minibatch, size, algo.rows_together)
        assert [len(part["label"]) for part in parts] == rows
        for part in parts:
            pairs = texts_of(algo, part)
            assert part["label"].tolist() == [True, False] * (len(pairs) // 2)
            assert [p for p, _ in pairs[0::2]] == [p for p, _ in pairs[1::2]]
        assert sum(float(part["weights"][0::2].sum()) for part in parts) == pytest.approx(1)


def test_kto_takes_z0_from_the_whole_batch(float64):  # noqa: F811
    """z0 = max(0, beta mean of log pi / pi_ref over answers to other rows' prompts), one number for the batch, whatever
    the micro-batches, without a gradient (2402.01306, section 4.1). Below 0 it is 0."""
    algo = make_dpo(SINGLES, loss_type="kto", beta=0.3)
    batch, _ = collect(algo, SINGLES)
    n, found = len(SINGLES), []
    others = {**batch, "prompt_index": torch.tensor([(b - 2) % n for b in range(n)])}
    kl = (direct_logps(algo, algo.model, others)[0] - direct_logps(algo, algo.ref_model, others)[0]).mean()
    for size in (0, 1, 2, 3):
        algo.micro_batch_size = size
        [minibatch] = algo.minibatches(batch)
        found.append(minibatch["z0"])
        assert minibatch["z0"].shape == (n,) and not minibatch["z0"].requires_grad
    z0 = max(0.0, 0.3 * float(kl))
    swapped = make_dpo(SINGLES, loss_type="kto", beta=0.3)
    swapped.model, swapped.ref_model = swapped.ref_model, swapped.model                  # the other sign
    other = swapped.minibatches(batch)[0]["z0"]
    assert all(close(z, z0) for z in found) and close(other, max(0.0, -0.3 * float(kl)))
    assert sorted([z0 > 0.01, float(other[0]) > 0.01]) == [False, True]


def test_kto_of_the_policys_own_answers_reads_other_prompts():
    """With chosen and rejected in turn, two rows before is always another prompt; with a single pair there is none."""
    algo = make_dpo(loss_type="kto")
    seen, rescore = [], algo.rescore
    algo.rescore = lambda model, batch: seen.append(batch["prompt_index"]) or rescore(model, batch)
    minibatch = minibatch_of(algo)
    assert torch.equal(seen[0], minibatch["prompt_index"]) and len(seen) == 3
    assert (seen[1] != minibatch["prompt_index"]).all() and torch.equal(seen[1], seen[2])
    one = data.take_rows(minibatch, torch.tensor([0, 1]))
    assert algo.minibatches(one)[0]["z0"].shape == (2,)


@each_loss
def test_the_reference_has_no_gradient(flags):
    """Reference log-probabilities are numbers: training leaves the reference, the sampler and their gradients alone,
    and reference-free losses do not even read it."""
    algo = make_dpo(**flags)
    frozen = {name: copy.deepcopy(network.state_dict()) for name, network in algo.frozen.items()}
    minibatch = minibatch_of(algo)
    assert not any(value.requires_grad for value in minibatch.values())
    args = SimpleNamespace(device="cpu", dtype="float32", micro_batch_size=0, max_grad_norm=1.0)
    before = copy.deepcopy(algo.model.state_dict())
    train.update(args, algo, algo.model.configure_optimizer(1e-2, 0.0), minibatch, {})
    assert any(not torch.equal(before[name], value) for name, value in algo.model.state_dict().items())
    for name, network in algo.frozen.items():
        assert all(p.grad is None for p in network.parameters())
        assert all(torch.equal(frozen[name][k], v) for k, v in network.state_dict().items())
    assert set(algo.frozen) == {"ref_model", "sampler"} and set(algo.networks) == {"model"}
    assert not any(p.requires_grad for p in algo.sampler.parameters())
    assert (minibatch["ref_logps"] == 0).all() == (flags["loss_type"] in REFERENCE_FREE)


@pytest.mark.parametrize("flags", [*WITH_AVERAGES, dict(loss_type="kto")], **NAMED)
def test_metrics_are_what_their_names_say(float64, flags):  # noqa: F811
    """rewards/* are what the loss compares, for most beta log pi / pi_ref of the answers, logps/*
    their log pi, margins the difference within a pair, accuracies the share of pairs in the right
    order: all from unpadded passes, as sums and counts."""
    algo = make_dpo(beta=0.3, **flags)
    minibatch = minibatch_of(algo)
    _, _, metrics = loss_and_gradient(algo, minibatch)
    logps, lengths = direct_logps(algo, algo.model, minibatch)
    ref, loss_type = direct_logps(algo, algo.ref_model, minibatch)[0], flags["loss_type"]
    rewards = 0.3 * (logps if loss_type in ("cpo", "simpo", "orpo") else logps - ref)
    if loss_type in ("simpo", "orpo") or "ipo_average" in flags:
        rewards = rewards / lengths
    expected = {"rewards/chosen": rewards[0::2], "rewards/rejected": rewards[1::2], "logps/chosen": logps[0::2],
                "logps/rejected": logps[1::2]}
    if loss_type != "kto":
        margins = rewards[0::2] - rewards[1::2]
        expected |= {"rewards/margins": margins, "rewards/accuracies": (margins > 0).double()}
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert metrics[name] == pytest.approx((float(values.sum()), 3), abs=1e-9), name


def test_metrics_of_single_answers_go_by_their_labels(float64):  # noqa: F811
    """Three good answers and two bad ones: means over three and over two, wherever they stand."""
    algo = make_dpo(SINGLES, loss_type="kto", beta=0.3)
    minibatch = minibatch_of(algo, SINGLES)
    logps, good = direct_logps(algo, algo.model, minibatch)[0], torch.tensor([e["label"] for e in SINGLES])
    for size in (0, 2):
        metrics = loss_and_gradient(algo, minibatch, size)[2]
        assert metrics["logps/chosen"] == pytest.approx((float(logps[good].sum()), 3))
        assert metrics["logps/rejected"] == pytest.approx((float(logps[~good].sum()), 2))


def test_an_untrained_policy_costs_log_2():
    """Where policy and reference are one model, the class's loss is log 2 and every reward 0 (kto: 1/2)."""
    for loss_type, start in (("sigmoid", math.log(2)), ("kto", 0.5), ("hinge", 1.0), ("ipo", 25.0)):
        algo = make_dpo(loss_type=loss_type)
        algo.ref_model.load_state_dict(algo.model.state_dict())
        loss, _, metrics = loss_and_gradient(algo, minibatch_of(algo))
        assert float(loss) == pytest.approx(start, abs=1e-4)
        assert metrics["rewards/chosen"] == pytest.approx((0, 3), abs=1e-5)


def test_a_step_widens_the_margin(float64):  # noqa: F811
    """A small step down any of the losses moves chosen above rejected (kto: good up and bad down) in that batch."""
    for loss_type in PAIR_LOSSES + ["kto"]:
        algo = make_dpo(loss_type=loss_type)
        minibatch = minibatch_of(algo)
        before = algo.logps(algo.model, minibatch)[0].detach()
        loss, grad, _ = loss_and_gradient(algo, minibatch)
        start = torch.nn.utils.parameters_to_vector(algo.model.parameters()).detach()
        torch.nn.utils.vector_to_parameters(start - 1e-4 * grad / grad.norm(), algo.model.parameters())
        gain = algo.logps(algo.model, minibatch)[0].detach() - before
        assert gain[0::2].sum() > gain[1::2].sum() and algo.loss(minibatch)[0] < loss, loss_type


# -- settings that make no sense --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, reason", [
    (dict(sync_steps="0"), "--sync_steps 0: a whole number of updates, or inf"),
    (dict(sync_steps="-1"), "--sync_steps -1: "), (dict(sync_steps="1.5"), "--sync_steps 1.5: "),
    (dict(sync_steps="often"), "--sync_steps often: "), (dict(sync_steps=""), "--sync_steps : "),
    (dict(num_generations=0), "--num_generations 0: at least 1"), (dict(num_prompts=0), "--num_prompts 0: at least 1"),
    (dict(beta=0.0), "--beta 0.0: a number above 0"), (dict(beta=-1.0), "--beta -1.0: a number above 0"),
    (dict(temperature=0.0), "--temperature 0.0: "), (dict(rso_beta=0.0), "--rso_beta 0.0: "),
    (dict(simpo_gamma=-0.1), "--simpo_gamma -0.1: a number of at least 0"),
    (dict(rpo_alpha=-1.0), "--rpo_alpha -1.0: "),
    (dict(desirable_weight=-1.0), "--desirable_weight -1.0: "),
    (dict(undesirable_weight=-1.0), "--undesirable_weight -1.0: "),
    (dict(label_smoothing=0.5), "--label_smoothing 0.5: from 0 to below .5"),
    (dict(label_smoothing=-0.1), "--label_smoothing -0.1: "),
    (dict(label_smoothing=0.1, loss_type="hinge"), "--label_smoothing is for --loss_type sigmoid and robust"),
    (dict(rpo_alpha=1.0, loss_type="kto"), "--rpo_alpha is for pairs; --loss_type kto has none"),
    (dict(rpo_alpha=1.0, loss_type="cpo"), "--loss_type cpo has the chosen answer's nll already"),
    (dict(rpo_alpha=1.0, loss_type="orpo"), "--loss_type orpo has the chosen answer's nll already"),
])
def test_impossible_settings_are_refused(flags, reason):
    """One line that names the flag, its value and what would do."""
    with pytest.raises(InputError) as error:
        DPOConfig(**flags)
    assert str(error.value).startswith("--") and reason in str(error.value) and "\n" not in str(error.value)


def test_settings_on_the_edge_are_accepted():
    """What is just inside the range passes, and --sync_steps becomes a number."""
    assert DPOConfig(sync_steps="inf").sync_steps == math.inf and DPOConfig(sync_steps="12").sync_steps == 12
    DPOConfig(label_smoothing=0.49), DPOConfig(label_smoothing=0.49, loss_type="robust"), DPOConfig(simpo_gamma=0.0)
    DPOConfig(rpo_alpha=1.0, loss_type="simpo"), DPOConfig(desirable_weight=0.0, loss_type="kto")


def test_a_pair_needs_two_answers():
    """--num_generations 1 is refused where answers are sampled and idle where a file has the pairs."""
    with pytest.raises(InputError, match="--num_generations 1: a pair needs at least 2 answers"):
        make_dpo(num_generations=1)
    assert len(collect(make_dpo(PAIRS, num_generations=1), PAIRS)[0]["label"]) == 8


# -- whole runs: online, offline and between --------------------------------------------------------------------------

STEPS = 6
DPO_ = ("--algo", "dpo", "--batch_size", 4, "--num_generations", 4, "--reward", "verifier,brevity", "--pair_selection",
        "best_worst", *TASK, "--max_steps", STEPS, "--logging_steps", 1, "--eval_steps", 6, "--save_steps", 100,
        "--warmup_steps", 0, "--learning_rate", 3e-3)


def weights(folder):
    return torch.load(os.path.join(folder, "ckpt.pt"), weights_only=True)["model"]


def same(a, b):
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics_of(folder):
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """runs("2", ...) -> a finished run with --sync_steps 2 and further flags, made once: its folder, the prompts of
    every step, and the weights of policy, sampler and reference with which every step began."""
    made = {}

    def runs(sync_steps, *more, plain=False):
        key = (sync_steps, *more, plain)
        if key in made:
            return made[key]
        folder, steps = tmp_path_factory.mktemp("semi-online") / "run", []
        init, collect = DPO.__init__, DPO.collect

        def plain_init(self, *args):
            init(self, *args)
            self.sampler = self.model  # no copy that could lag behind

        def spy(self, examples, generator, step):
            policy = copy.deepcopy(self.model.state_dict())
            collected = collect(self, examples, generator, step)
            steps.append(SimpleNamespace(prompts=[e["prompt"] for e in examples], policy=policy,
                                         sampler=copy.deepcopy(self.sampler.state_dict()),
                                         reference=copy.deepcopy(self.ref_model.state_dict())))
            return collected
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DPO, "collect", spy)
            if plain:
                patch.setattr(DPO, "__init__", plain_init)
            assert run(*DPO_, "--sync_steps", sync_steps, *more, "--init_from", tiny_base, "--out_dir", folder) == 0
        made[key] = SimpleNamespace(folder=folder, steps=steps, weights=weights(folder), metrics=metrics_of(folder))
        return made[key]
    return runs


def test_there_is_something_to_learn_from(runs, tiny_base):
    """Most groups have a contrast and the weights move: else the comparisons below would hold by default."""
    found = runs("1")
    assert sum(line["skipped_pairs"] for line in found.metrics[1:]) < 0.5 * STEPS
    before = weights(tiny_base)
    assert all((before[k] - v).abs().max() > 1e-3 for k, v in found.weights.items() if v.dim() == 2)


def test_sync_steps_1_is_plain_online_training(runs):
    """Renewing the sampler before every batch is, bit for bit, sampling from the policy itself (2506.21495, s = 1)."""
    assert same(runs("1").weights, runs("1", plain=True).weights)
    assert runs("1").metrics[-1]["reward"] == runs("1", plain=True).metrics[-1]["reward"]


def test_sync_steps_beyond_the_run_are_offline_training(runs):
    """inf, as many as there are steps, and more: bit for bit the same, for no renewal falls into the run."""
    offline = runs("inf").weights
    assert same(offline, runs(str(STEPS)).weights) and same(offline, runs("100").weights)
    assert not same(offline, runs(str(STEPS - 1)).weights)                                # one renewal, one step


def test_every_setting_of_sync_steps_is_another_run(runs):
    """1, 2, 4 and inf end with four different models."""
    found = [runs(s).weights for s in ("1", "2", "4", "inf")]
    assert not any(same(a, b) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("sync_steps", ["1", "2", "4", "inf"])
def test_the_sampler_is_the_policy_of_the_last_renewal(runs, sync_steps):
    """At step t the sampler holds the policy as it was at step s floor(t / s), and the reference is still the base."""
    steps = runs(sync_steps).steps
    s = STEPS if sync_steps == "inf" else int(sync_steps)
    assert len(steps) == STEPS and not same(steps[1].policy, steps[0].policy)
    for t, step in enumerate(steps):
        assert same(step.sampler, steps[t // s * s].policy), t
        assert same(step.reference, steps[0].policy), t


def test_every_setting_meets_the_same_prompts(runs):
    """The prompts of a step do not depend on the sampler's age, nor does the number of answers: s alone differs."""
    prompts = [[step.prompts for step in runs(s).steps] for s in ("1", "2", "4", "inf")]
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3] and len(set(map(tuple, prompts[0]))) == STEPS
    assert same(runs("1").steps[1].policy, runs("inf").steps[1].policy)                   # the first step is common


def test_sync_ref_moves_the_reference_with_the_sampler(runs, tiny_base):
    """The loss's reference is the policy of the last renewal, so that at --sync_steps 1 every loss is log 2. The KL
    that is reported stays that to the base, and the base stays in the checkpoint under its own name."""
    found = runs("2", "--sync_ref")
    for t, step in enumerate(found.steps):
        assert same(step.reference, step.sampler) and same(step.reference, found.steps[t // 2 * 2].policy)
    assert not same(found.weights, runs("2").weights)
    at_reference = [[abs(line["loss"] - math.log(2)) < 1e-5 for line in runs(*flags).metrics[1:]]
                    for flags in (("1", "--sync_ref"), ("2", "--sync_ref"), ("1",))]
    assert at_reference == [[True] * 6, [True, False] * 3, [True] + [False] * 5]
    networks = torch.load(found.folder / "ckpt.pt", weights_only=True)["networks"]
    assert same(networks["ref_model"], weights(tiny_base)) and same(networks["moving_ref_model"], found.steps[4].policy)
    args, _, _ = train.parse_args([str(flag) for flag in DPO_])
    train.pick_device(args)
    model, base = (train.build_model(args, train.read_checkpoint(folder)) for folder in (found.folder, tiny_base))
    moving = copy.deepcopy(base)
    moving.load_state_dict(networks["moving_ref_model"])
    kls = [report.evaluate(args, model, ref, data.Tokenizer("byte"), data.Chain(2, 2), True)["eval/kl"]
           for ref in (base, moving)]
    assert found.metrics[-1]["eval/kl"] == pytest.approx(kls[0]) and kls[0] > 2 * kls[1] > 0


@pytest.mark.parametrize("more", [(), ("--sync_ref",)], ids=["", "sync_ref"])
def test_resuming_between_two_renewals(runs, tiny_base, monkeypatch, more):
    """Stopped after step 3 of a run whose sampler is renewed after 4: the checkpoint holds the old sampler (and the
    moved reference), and the resumed run ends bit for bit as the uninterrupted one."""
    uninterrupted, update, calls = runs("4", *more), train.update, []

    def interrupted_update(*args):
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return update(*args)
    command = (*DPO_, "--sync_steps", 4, *more, "--init_from", tiny_base, "--out_dir", "run")
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", interrupted_update)
        assert run(*command) == 130
    saved = torch.load("run/ckpt.pt", weights_only=True)
    assert saved["step"] == 3 and same(saved["networks"]["sampler"], uninterrupted.steps[0].policy)
    assert not same(saved["networks"]["sampler"], saved["model"])
    assert run(*command, "--resume") == 0
    assert same(weights("run"), uninterrupted.weights)
    clock = {"seconds", "eval_seconds", "tokens_per_second/train", "tokens_per_second/sample"}
    assert [{k: v for k, v in line.items() if k not in clock} for line in metrics_of("run")] == \
        [{k: v for k, v in line.items() if k not in clock} for line in uninterrupted.metrics]


def test_a_run_without_any_pair_ends_well(tiny_base):
    """The base gets nothing right, so the verifier alone leaves no pair: every step is counted as skipped, the weights
    are those of the base, and the run ends with a summary all the same."""
    assert run(*DPO_, "--reward", "verifier", "--init_from", tiny_base, "--out_dir", "run") == 0
    assert [line["skipped_pairs"] for line in metrics_of("run")[1:]] == [1] * STEPS
    assert same(weights("run"), weights(tiny_base)) and os.path.exists("run/summary.json")


@pytest.mark.parametrize("flags", ALL_LOSSES[:8] + [dict(pair_sampling="rso", rso_beta=0.1), dict(reward="majority")],
                         ids=lambda flags: "-".join(map(str, flags.values())))
def test_every_loss_trains(tiny_base, flags):
    """Two steps of each loss from the command line, in micro-batches of 3 rows: finite numbers, moved weights."""
    more = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert run(*DPO_, "--max_steps", 2, "--num_generations", 16, "--micro_batch_size", 3, *more,
               "--init_from", tiny_base, "--out_dir", "run") == 0
    lines = metrics_of("run")
    assert all(math.isfinite(line["loss"]) for line in lines[1:])
    if flags != dict(reward="majority"):  # nothing but noise has no majority
        assert not same(weights("run"), weights(tiny_base))


# -- whole runs: preferences from a file ------------------------------------------------------------------------------

FILE = ("--algo", "dpo", "--batch_size", 4, "--max_steps", 3, "--logging_steps", 1, "--eval_steps", 3,
        "--warmup_steps", 0, "--max_new_tokens", 4, "--data", "data.jsonl", "--out_dir", "run")
SUMS = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(6) for b in range(6)]
JUDGED = [{"prompt": e["prompt"], "completion": e[name], "label": name == "chosen"}
          for e, name in zip(SUMS, ("chosen", "rejected") * 18)]


@pytest.mark.parametrize("flags, rows", [
    ((), SUMS), (("--loss_type", "kto"), SUMS), (("--loss_type", "kto"), JUDGED), (("--loss_type", "orpo"), SUMS),
    (("--micro_batch_size", 3), SUMS), (("--sync_ref", "--sync_steps", 2), SUMS),
    ((), SUMS + [dict(SUMS[0], chosen="1")] * 3),
], ids=["sigmoid", "kto of pairs", "kto", "orpo", "micro-batches", "sync_ref", "equal answers"])
def test_a_file_of_preferences_trains(tiny_base, flags, rows):
    """prompt, chosen and rejected; for kto prompt, completion and label as well: nothing is sampled, the weights move,
    and the held-out lines are judged by their likelihood."""
    write_jsonl(rows)
    assert run(*FILE, *flags, "--init_from", tiny_base) == 0
    lines = metrics_of("run")
    assert lines[-1]["sampled_tokens"] == 0 and lines[-1]["trained_tokens"] > 0
    assert "eval/loss" in lines[0] and "eval/loss" in lines[-1]
    assert not same(weights("run"), weights(tiny_base))
    assert set(torch.load("run/ckpt.pt", weights_only=True)["networks"]) == \
        {"model", "ref_model"} | ({"moving_ref_model"} if "--sync_ref" in flags else set())


def test_a_file_of_problems_is_answered_by_the_policy(tiny_base):
    """prompt and answer: the policy samples, the file's answer judges; brevity makes the contrast."""
    write_jsonl([{"prompt": e["prompt"], "answer": e["chosen"]} for e in SUMS])
    assert run(*FILE, "--reward", "verifier,brevity", "--num_generations", 8, "--init_from", tiny_base) == 0
    assert metrics_of("run")[-1]["sampled_tokens"] > 0 and not same(weights("run"), weights(tiny_base))


def test_preferences_of_a_file_are_learned(tiny_base):
    """60 steps on 30 odd sums: every margin, about 0 at first, is positive in the end, and the loss is far below log
    2."""
    write_jsonl(SUMS)
    assert run(*FILE, "--max_steps", 60, "--batch_size", 16, "--learning_rate", 1e-2, "--init_from", tiny_base) == 0
    lines = metrics_of("run")
    assert lines[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines[-1]["loss"] < 0.5 and lines[-1]["rewards/accuracies"] > 0.9 and lines[-1]["rewards/margins"] > 0.5


@pytest.mark.parametrize("flags, good, bad, reason", [
    ((), SUMS[0], {"prompt": "1+1=", "chosen": "2"}, "no column 'rejected'"),
    ((), SUMS[0], {"chosen": "2", "rejected": "3"}, "no column 'prompt'"),
    ((), SUMS[0], {"prompt": "1+1=", "chosen": 2, "rejected": "3"}, "column 'chosen' is not text"),
    ((), SUMS[0], {"prompt": "1+1=", "chosen": "2", "rejected": None}, "column 'rejected' is not text"),
    ((), JUDGED[0], JUDGED[1], "no column 'chosen'"),                                     # labels are for kto
    (("--loss_type", "kto"), JUDGED[0], {"prompt": "1+1=", "completion": "2"}, "no column 'label'"),
    (("--loss_type", "kto"), JUDGED[0], {"prompt": "1+1=", "completion": 2, "label": True},
     "column 'completion' is not text"),
])
def test_a_bad_line_is_named(tiny_base, flags, good, bad, reason):
    """A line without a column, or with something else than text in it: file, line and reason, before anything
    trains."""
    write_jsonl([good] * 3 + [bad])
    line = 1 if bad is JUDGED[1] else 4
    with pytest.raises(InputError) as error:
        run(*FILE, *flags, "--eval_data", "data.jsonl", "--init_from", tiny_base)
    assert str(error.value).startswith(f"data.jsonl, line {line}: {reason}") and not os.path.exists("run")


# -- what people's files and rewards are like -------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_preference_that_does_not_fit_the_context_is_named(tiny_base, column):
    """200 characters in a model of 128 positions: file, line and reason before the first step, as with a completion."""
    write_jsonl(SUMS[:3] + [{**SUMS[3], column: "9" * 200}])
    with pytest.raises(InputError, match="data.jsonl, line 4: 20. tokens do not fit --block_size 128"):
        run(*FILE, "--eval_data", "data.jsonl", "--init_from", tiny_base)


@pytest.mark.parametrize("label", ["false", "bad", None, 7, [False]])
def test_a_label_that_is_no_truth_value_is_named(tiny_base, label):
    """The text "false" would be taken for true: labels are true or false (or 1 or 0), else file, line and reason."""
    write_jsonl([*JUDGED[:3], {**JUDGED[3], "label": label}])
    with pytest.raises(InputError, match="data.jsonl, line 4: column 'label' is neither true nor false"):
        run(*FILE, "--loss_type", "kto", "--eval_data", "data.jsonl", "--init_from", tiny_base)


def test_kto_with_lines_that_fit_alone_but_not_with_another_prompt():
    """A long prompt with a short answer and a short prompt with a long one fit in 32 positions; that z0 reads the
    answers after each other's prompts must not stop the run."""
    rows = [{"prompt": "1" * n, "completion": "2" * (29 - n), "label": n > 9} for n in (20, 19, 3, 4)]
    algo = make_dpo(rows, loss_type="kto")
    assert minibatch_of(algo, rows)["z0"].isfinite().all()


@pytest.mark.parametrize("flags, columns", [((), ("prompt", "chosen", "rejected")),
                                            (("--reward", "brevity"), ("prompt", "answer")),
                                            (("--loss_type", "kto"), ("prompt", "chosen", "rejected"))])
def test_a_column_called_label_is_no_hindrance(tiny_base, flags, columns):
    """Lines with the columns that the loss needs and a `label` besides (of a data set's own) train as without it."""
    rows = [{**row, "answer": row["chosen"], "label": 1} for row in SUMS]
    write_jsonl([{name: row[name] for name in (*columns, "label")} for row in rows])
    assert run(*FILE, *flags, "--init_from", tiny_base) == 0


def test_the_majority_reward_needs_no_answer(tiny_base):
    """A file of bare prompts is enough where no reward looks at an answer, as with grpo."""
    assert ("prompt",) in DPO.columns(DPOConfig(reward="majority")) and ("prompt",) not in DPO.columns(DPOConfig())
    write_jsonl([{"prompt": row["prompt"]} for row in SUMS])
    assert run(*FILE, "--reward", "majority,brevity", "--num_generations", 4, "--init_from", tiny_base) == 0


def test_no_answer_is_never_the_majority():
    """Answers from which nothing can be read do not vote and earn nothing, however many they are."""
    assert data.majority(data.Countdown(), ["q"] * 3, ["3*", "(", "3+7"]) == [0, 0, 1]
    assert data.majority(data.Countdown(), ["q"] * 2, ["3*", "("]) == [0, 0]
