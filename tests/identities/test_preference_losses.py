"""
DPO's relatives: their optima, their gradients in closed form, and what each of them is a special
case of, on all pairs of the world of 15 sequences.
"""

import math

import pytest
import torch

from dpo import REFERENCE_FREE, preference_loss
from pairs import (BETA, BRADLEY_TERRY, CYCLIC, FIRST, MU, PAIR_LOSSES, REF, SECOND, pair_losses,
                   policy_with, population_loss, scores, tilted)
from world import LENGTHS, LOGITS, close, gradient, sequence_logprobs


@pytest.mark.parametrize("preferred", [BRADLEY_TERRY, CYCLIC], ids=["bradley-terry", "cyclic"])
def test_ipo_optimum(preferred):
    """IPO is stationary at log pi / pi_ref = P(y beats mu) / beta + c, whether or not a reward
    explains the preferences: the optimum of winrate minus beta KL (2310.12036, eq. 17, theorem
    2)."""
    winrate = preferred @ MU
    best = policy_with(tilted(REF, winrate, BETA))
    loss = population_loss(sequence_logprobs(best), preferred, loss_type="ipo", beta=BETA)
    assert close(gradient(loss, best), 0)
    other = policy_with(tilted(REF, winrate, BETA / 2))
    loss = population_loss(sequence_logprobs(other), preferred, loss_type="ipo", beta=BETA)
    assert gradient(loss, other).abs().max() > 1e-3


def test_hinge_is_silent_past_the_margin():
    """beta m >= 1: loss and gradient exactly 0. Below, the gradient is that of -beta m, however
    wrong the pair (2309.06657, eq. 11)."""
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
    """With a share of the labels flipped at random the expected robust loss is the DPO loss of the
    true labels, and so is its gradient (2403.00409, eq. 12). cDPO's is not: it is DPO trained on
    those flipped labels."""
    logps = sequence_logprobs(LOGITS)
    noisy = (1 - flipped) * BRADLEY_TERRY + flipped * BRADLEY_TERRY.T
    true = population_loss(logps, beta=BETA)
    robust = population_loss(logps, noisy, loss_type="robust", label_smoothing=flipped, beta=BETA)
    assert close(robust, true) and close(gradient(robust, LOGITS), gradient(true, LOGITS))
    smoothed = population_loss(logps, loss_type="sigmoid", label_smoothing=flipped, beta=BETA)
    assert close(smoothed, population_loss(logps, noisy, beta=BETA))
    assert not close(smoothed, true, 1e-3)


def test_cdpo_stops_at_a_finite_margin():
    """A pair is settled where sigma(beta m) = 1 - e; the plain loss would push forever
    (ericmitchell.ai/cdpo.pdf)."""
    zero = torch.zeros(1, dtype=torch.float64)
    for beta_m, sign in ((math.log(9), 0), (2.0, -1), (3.0, 1)):   # sigma(log 9) = .9
        m = torch.tensor([beta_m / BETA], dtype=torch.float64, requires_grad=True)
        loss = preference_loss(m, zero, zero, zero, zero, zero, beta=BETA, label_smoothing=0.1)
        slope = gradient(loss.sum(), m)
        assert close(slope, 0) if sign == 0 else slope.sign() == sign


def test_simpo_is_dpo_with_a_uniform_reference_where_lengths_agree():
    """Every answer of 3 tokens has the same probability under a uniform policy, 3^-3: SimPO at
    beta, without its margin, is then DPO at beta / 3 (2405.14734, section 2.2). Between answers of
    different length it is not."""
    uniform = -LENGTHS * math.log(3)
    logps = sequence_logprobs(LOGITS)
    simpo = pair_losses(logps, loss_type="simpo", beta=BETA, simpo_gamma=0.0)
    dpo = pair_losses(logps, uniform, beta=BETA / 3)
    equal = (LENGTHS[FIRST] == 3) & (LENGTHS[SECOND] == 3)
    assert equal.sum() == 144 and close(simpo[equal], dpo[equal])
    assert (simpo - dpo)[LENGTHS[FIRST] != LENGTHS[SECOND]].abs().min() > 1e-3


def test_simpo_compares_means_and_dpo_sums():
    """Two answers of the same probability per token: SimPO sees no difference, only its margin
    gamma; the sum of the longer one is lower. IPO has both kinds (2405.14734, section 2.2)."""
    args = [torch.tensor([x], dtype=torch.float64) for x in (-6.0, -2.0, 0.0, 0.0, 3.0, 1.0)]
    for settings, loss in (
            (dict(loss_type="simpo", beta=2.0, simpo_gamma=0.5), math.log1p(math.exp(0.5))),
            (dict(loss_type="simpo", beta=2.0, simpo_gamma=1.5), math.log1p(math.exp(1.5))),
            (dict(loss_type="sigmoid", beta=0.5), math.log1p(math.exp(2.0))),
            (dict(loss_type="ipo", beta=0.5, ipo_average=False), (-4 - 1) ** 2),
            (dict(loss_type="ipo", beta=0.5, ipo_average=True), (0 - 1) ** 2)):
        assert close(preference_loss(*args, **settings), [loss]), settings


def test_orpo_gradient_closed_form():
    """With g the mean over an answer's tokens of grad log pi and p its geometric mean probability:
    -g_w - beta sigma(-z) [g_w / (1 - p_w) - g_l / (1 - p_l)], z the log odds ratio (2403.07691,
    section 4.3)."""
    logps = sequence_logprobs(LOGITS)
    g = scores() / LENGTHS[:, None, None]
    losses = pair_losses(logps, loss_type="orpo", beta=BETA)
    p = (logps / LENGTHS).exp().detach()
    odds = p / (1 - p)
    wrong = 1 / (1 + odds[FIRST] / odds[SECOND])   # sigma(-z)
    pull = g / (1 - p)[:, None, None]
    closed = -g[FIRST] - BETA * wrong[:, None, None] * (pull[FIRST] - pull[SECOND])
    for n in range(0, 225, 7):
        assert close(gradient(losses[n], LOGITS), closed[n])


def test_cpo_is_dpo_without_a_reference_and_with_imitation():
    """DPO whose reference is flat, plus the chosen answer's nll per token (2401.08417, eq. 5-6), as
    a gradient too."""
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
    beside = [pair_losses(logps, ref, loss_type=loss_type) for ref in (REF, MU)]
    assert torch.equal(*beside)


@pytest.mark.parametrize("settings", [dict(loss_type=loss_type) for loss_type in PAIR_LOSSES] + [
    dict(loss_type="sigmoid", label_smoothing=0.2), dict(loss_type="robust", label_smoothing=0.2),
    dict(loss_type="ipo", ipo_average=True)], ids=lambda x: "-".join(map(str, x.values())))
def test_gradients_by_finite_differences(settings):
    """Autograd equals (f(x + h) - f(x - h)) / 2h for every loss, through the log-probabilities of
    all 15 sequences."""
    logps = sequence_logprobs(LOGITS).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pair_losses(x, beta=BETA, **settings), logps)


def test_orpo_is_finite_where_the_answer_is_certain():
    """p = 1 has infinite odds; neither loss nor gradient may be nan or infinite there."""
    for dtype in (torch.float32, torch.float64):
        logps = torch.tensor([0.0, -1e-9, -1e-6, -1.0], dtype=dtype, requires_grad=True)
        one, zero = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
        for rejected in (logps.flip(0), logps):
            loss = preference_loss(logps, rejected, zero, zero, one, one, loss_type="orpo").sum()
            assert loss.isfinite() and gradient(loss, logps).isfinite().all()
