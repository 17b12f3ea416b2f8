"""
The losses of dft.py on the world of 15 sequences: the class gets all sequences as one batch,
weighted by probabilities, and autograd differentiates a closed form beside it.
"""

import math

import pytest
import torch

import grpo
import sft
from dft import DFT, DFTConfig, anchor_loss, gem_loss, imitation_weights, psft_loss
from harness.log import Log
from world import (GRAD_J, LENGTHS, LOGITS, MASK, PI, PREFIXES, REWARD, SEQUENCES, close,
                   conditionals, expected, gradient, sequence_logprobs, table, tabular,
                   token_logprobs, visits, whole_world)

EVERY = torch.eye(15, dtype=torch.float64)           # row i: all the weight on sequence i
Q = sequence_logprobs(table(1)).exp().detach()       # (15,), the data
DATA = table(1).detach().softmax(-1)                 # (7, 3), the same as conditionals


def dft_loss(loss_type, probabilities, logits=LOGITS, other=None, **settings):
    """sum_y probabilities(y) x the loss that the DFT class gives y's tokens. other: the table of
    pi_ref and of pi_old."""
    config = DFTConfig(loss_type=loss_type, device="cpu", dtype="float32", **settings)
    algo = DFT(config, tabular(logits), None, None)
    if other is not None:
        algo.ref_model = algo.old_model = tabular(other)
    [batch] = algo.minibatches(whole_world(), Log())
    return algo.loss({**batch, "weights": MASK * probabilities.detach()[:, None]}, Log())


def dft_gradient(loss_type, probabilities, logits=LOGITS, other=None, **settings):
    return gradient(dft_loss(loss_type, probabilities, logits, other, **settings), logits)


def sft_gradient(probabilities, logits=LOGITS):
    return gradient(expected(sft.token_losses(token_logprobs(logits)), probabilities), logits)


def test_the_world_of_the_classes_is_the_world_of_the_functions():
    """The loss of the class is that of the 15 sequences, and conditionals take a distribution
    apart."""
    assert close(dft_gradient("power", Q, alpha=0.0), sft_gradient(Q))
    assert close(conditionals(Q).exp(), DATA)
    assert close(visits(Q)[0], 1) and close(visits(Q).sum(), (Q * LENGTHS).sum())


# -- what the gradient of DFT is ------------------------------------------------------------------


def test_dft_gradient_is_that_of_the_probabilities():
    """Token by token, sg(p) x grad(-log p) = -grad p: DFT on y* ascends the sum of its p_t
    (2508.05629, eq. 9 and 13)."""
    p = token_logprobs(LOGITS).exp()
    for i in range(15):
        assert close(dft_gradient("dft", EVERY[i]), -gradient((p * MASK)[i].sum(), LOGITS))


def test_dft_sequence_gradient_is_a_policy_gradient_with_a_plain_reward():
    """With the whole answer's probability for weight, DFT on y* ascends pi(y*): the on-policy
    policy gradient with reward 1[y = y*], the 1/pi of SFT gone (2508.05629, eq. 8 and 13)."""
    lp = token_logprobs(LOGITS)
    for i in range(15):
        losses, _, _ = grpo.policy_loss(lp, lp.detach(), EVERY[i], MASK)
        found = dft_gradient("dft_sequence", EVERY[i])
        assert close(found, -gradient(PI[i], LOGITS))
        assert close(found, gradient(expected(losses, PI), LOGITS))


@pytest.mark.parametrize("loss_type", ["dft", "dft_sequence", "power", "chord", "iw_sft", "asft"])
def test_weights_are_detached(loss_type):
    """Without the stop-gradient, -p log p would have the slope -p (1 + log p) in log p, which
    pushes every token below p = 1/e further down. With it the slope is minus the weight, and every
    demonstrated token is pulled up."""
    p = torch.tensor([[0.02, 0.3, 0.4, 0.9]], dtype=torch.float64)
    logprobs, mask = p.log().requires_grad_(), torch.ones(1, 4, dtype=torch.bool)
    wrong = gradient(-(logprobs.exp() * logprobs).sum(), logprobs)
    assert (wrong[0] > 0).tolist() == [True, True, False, False]     # 1/e = .368
    weight = imitation_weights(logprobs, mask, loss_type, ref_logprobs=(p / 2).log())
    assert not weight.requires_grad and (weight > 0).all()
    found = gradient((weight * sft.token_losses(logprobs)).sum(), logprobs)
    assert close(found, -weight)


@pytest.mark.parametrize("loss_type", ["dft", "dft_sequence", "power", "chord", "asft"])
def test_the_class_pulls_up_even_what_is_unlikely(loss_type):
    """The same through the class: in a table where a demonstrated token has p < 1/e, a step down
    the loss raises it."""
    for i, y in enumerate(SEQUENCES):
        found = dft_gradient(loss_type, EVERY[i], anchor_coef=0.0)
        assert all(found[PREFIXES.index(y[:t]), token] < 0 for t, token in enumerate(y))
    assert (token_logprobs(LOGITS).exp()[MASK] < 1 / math.e).any()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_the_power_family(alpha):
    """Weight p^alpha: the gradient is that of (1 - p^alpha) / alpha; one end is SFT, the other DFT
    bit for bit; and on the token's own logit it is -p^alpha (1 - p) (2510.00526)."""
    lp = token_logprobs(LOGITS)
    found = dft_gradient("power", Q, alpha=alpha)
    if alpha > 0:
        assert close(found, gradient(expected((1 - lp.exp() ** alpha) / alpha, Q), LOGITS))
    assert alpha != 0 or close(found, sft_gradient(Q))
    assert alpha != 1 or torch.equal(found, dft_gradient("dft", Q))
    for i, y in enumerate(SEQUENCES):
        one, p = dft_gradient("power", EVERY[i], alpha=alpha), LOGITS.softmax(-1)
        for t, token in enumerate(y):
            at = PREFIXES.index(y[:t]), token
            assert close(one[at], -p[at] ** alpha * (1 - p[at]))


def test_chord_learns_neither_the_known_nor_the_hopeless():
    """Weight p (1 - p): the gradient is that of -(p - p^2 / 2); it vanishes at both ends, is at
    most 1/4 in between, and the same for p and 1 - p (CHORD's phi, 2508.11408)."""
    p = token_logprobs(LOGITS).exp()
    assert close(dft_gradient("chord", Q), -gradient(expected(p - p ** 2 / 2, Q), LOGITS))
    p = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64)[None]
    weight = imitation_weights(p.log(), torch.ones_like(p).bool(), "chord")
    assert close(weight, weight.flip(1)) and weight.argmax() == 50
    assert close(weight.max(), 0.25) and weight.min() < 1e-5


# -- importance weights, clip, anchor, GEM --------------------------------------------------------


def test_iw_sft_starts_as_sft_and_is_an_exact_policy_gradient_later():
    """At pi = pi_ref every weight is 1: SFT. Elsewhere, on answers that pi_ref wrote and a reward
    weighs, it is the exact policy gradient of pi: E_ref[R pi/pi_ref grad log pi] = grad E_pi[R]
    (2507.12856, whose bound is tight at q = pi)."""
    ref = table(3)
    written = sequence_logprobs(ref).exp()
    assert close(dft_gradient("iw_sft", Q), sft_gradient(Q))
    assert close(dft_gradient("iw_sft", Q, other=ref, iw_temperature=0.0), sft_gradient(Q))
    assert close(dft_gradient("iw_sft", written * REWARD, other=ref, iw_max=1e9), -GRAD_J)
    # The clip takes from those weights alone that exceed it.
    weights = (PI / written).detach()
    assert 0 < (weights > 0.8).sum() < 15
    clipped = sft_gradient(Q * weights.clamp(max=0.8))
    assert close(dft_gradient("iw_sft", Q, other=ref, iw_max=0.8), clipped)


def test_psft_starts_as_sft_and_stops_above_the_clip():
    """At pi = pi_old the ratio's gradient is SFT's. Later a token whose ratio is above
    1 + epsilon_high has none, and any other, one that has fallen included, has ratio x SFT's
    (2508.17784, eq. 6)."""
    assert close(dft_gradient("psft", Q), sft_gradient(Q))
    assert close(dft_loss("psft", Q), -(Q * LENGTHS).sum())
    old = table(3).detach()
    lp = token_logprobs(LOGITS)
    ratio = (lp - token_logprobs(old)).exp()
    for epsilon_high in (0.28, 0.0, 0.5):
        alive = (ratio <= 1 + epsilon_high).detach() & MASK
        assert (ratio[alive] < 0.8).any() and 0 < alive.sum() < MASK.sum()
        closed = -gradient(expected(ratio * alive, Q), LOGITS)
        assert close(dft_gradient("psft", Q, other=old, epsilon_high=epsilon_high), closed)


def test_asft_adds_the_anchor_and_nothing_else():
    """The anchor is KL(pi_ref || pi), whose gradient on the logits is pi - pi_ref: the class adds
    anchor_coef times that, as often as a prefix is visited, to DFT; at 0 it is DFT bit for bit
    (2509.23753)."""
    ref = table(3).detach()
    logp, logq = LOGITS.log_softmax(-1), ref.log_softmax(-1)
    kl = anchor_loss(logp, logq)                                     # (7,)
    assert (kl > 0).all() and close(anchor_loss(logq, logq), 0)
    towards = LOGITS.softmax(-1) - ref.softmax(-1)
    assert close(gradient(kl.sum(), LOGITS), towards)
    plain = dft_gradient("dft", Q)
    for anchor_coef in (0.05, 3.0):
        found = dft_gradient("asft", Q, other=ref, anchor_coef=anchor_coef)
        assert close(found - plain, anchor_coef * visits(Q) * towards)
    assert torch.equal(dft_gradient("asft", Q, other=ref, anchor_coef=0.0), plain)
    assert torch.equal(dft_loss("asft", Q, other=ref, anchor_coef=0.0), dft_loss("dft", Q))


@pytest.mark.parametrize("b", [0.5, 0.7, 1.0])
def test_gem_gradient_and_fixed_point(b):
    """The gradient on the logits is softmax(z / b) - onehot(y), SFT's at b = 1; with that, data^b,
    normalised, is where it vanishes: flatter than the data, the tail kept (2408.16673)."""
    all_logprobs = LOGITS.log_softmax(-1)
    for y in range(3):
        found = gradient(gem_loss(all_logprobs, all_logprobs[:, y], b).sum(), LOGITS)
        assert close(found, (LOGITS / b).softmax(-1) - torch.eye(3)[y])
    if b == 1:
        assert close(dft_gradient("gem", Q, gem_temperature=b), sft_gradient(Q))
    powered = (DATA ** b / (DATA ** b).sum(1, keepdim=True)).log().requires_grad_()
    assert close(dft_gradient("gem", Q, powered, gem_temperature=b), 0)
    data_itself = DATA.log().requires_grad_()
    assert close(dft_gradient("gem", Q, data_itself, gem_temperature=b), 0, 1e-3) == (b == 1)


# -- fixed points ---------------------------------------------------------------------------------


def test_sft_rests_at_the_data_and_dft_drifts_to_the_mode():
    """At pi = data the gradient of SFT is 0 and that of token DFT -(q q - q |q|^2) at every prefix:
    what is likelier than |q|^2, the probability that two draws agree, grows at the cost of the
    rest."""
    at_data = DATA.log().requires_grad_()
    assert close(sft_gradient(Q, at_data), 0)
    assert close(dft_gradient("power", Q, at_data, alpha=0.0), 0)
    agree = (DATA ** 2).sum(1, keepdim=True)
    drift = dft_gradient("dft", Q, at_data)
    assert close(drift, -visits(Q) * (DATA ** 2 - DATA * agree))
    rows = torch.arange(7)
    assert (drift[rows, DATA.argmax(1)] < 0).all() and (drift[rows, DATA.argmin(1)] > 0).all()


@pytest.mark.parametrize("loss_type, first, answer", [("dft", 0, (0, 0, 0)),
                                                      ("dft_sequence", 2, (2,))])
def test_token_dft_goes_to_the_likeliest_token_and_sequence_dft_to_the_likeliest_answer(
        loss_type, first, answer):
    """Data whose first token is 0 half of the time, each time with another continuation, and END,
    the whole answer, four times in ten. Token by token the mode is 0; among answers it is END. The
    two DFTs disagree at the first token."""
    conditional = torch.tensor([[0.5, 0.1, 0.4]] + [[0.4, 0.3, 0.3]] * 6, dtype=torch.float64)
    q = sequence_logprobs(conditional.log()).exp()
    assert conditional[0].argmax() == 0 and SEQUENCES[q.argmax()] == (2,)
    logits = conditional.log().requires_grad_()                      # start at the data
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        dft_loss(loss_type, q, logits).backward()
        optimizer.step()
    pi = sequence_logprobs(logits).exp()
    assert logits.softmax(-1)[0, first] > 0.95
    assert SEQUENCES[pi.argmax()] == answer and pi.max() > 0.9


# -- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, weight", [
    (dict(loss_type="dft"), 0.25), (dict(loss_type="asft"), 0.25), (dict(loss_type="power"), 0.5),
    (dict(loss_type="power", alpha=2.0), 0.0625), (dict(loss_type="power", alpha=0.0), 1.0),
    (dict(loss_type="chord"), 0.1875)])
def test_weights_worked_example(flags, weight):
    """A token of probability .25 (docstring of imitation_weights): p, p, p^alpha (.5 by default),
    p (1 - p)."""
    logprobs = torch.tensor([[0.25]], dtype=torch.float64).log()
    assert close(imitation_weights(logprobs, torch.tensor([[True]]), **flags), [[weight]])


def test_dft_against_sft_worked_example():
    """p = .25: the loss of DFT is .347 where SFT's is 1.386, its gradient on the token's logit
    -.25 x .75 where SFT's is -.75 (docstring of imitation_weights)."""
    z = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64).log().requires_grad_()
    logprobs = z.log_softmax(-1)[..., 0]
    plain = sft.token_losses(logprobs)
    weighted = imitation_weights(logprobs, torch.tensor([[True]])) * plain
    assert plain.item() == pytest.approx(1.386, abs=5e-4)
    assert weighted.item() == pytest.approx(0.347, abs=5e-4)
    assert close(gradient(plain.sum(), z), [[[-0.75, 0.75]]])
    assert close(gradient(weighted.sum(), z), [[[-0.25 * 0.75, 0.25 * 0.75]]])


def test_weights_of_whole_answers_worked_example():
    """Probabilities [.5, .4] and [.1, padding]: dft_sequence weighs .2 and .1. With a start model
    at [.25, .2] and [.2] the importance weights are 4 and 1/2; clipped at 3; at exponent 1/2, 2 and
    .707 (2507.12856)."""
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[0.5, 0.4], [0.1, 0.7]], dtype=torch.float64).log()
    ref = torch.tensor([[0.25, 0.2], [0.2, 0.01]], dtype=torch.float64).log()
    assert close(imitation_weights(logprobs, mask, "dft_sequence"), [[0.2, 0.2], [0.1, 0.1]])
    for flags, weights in ((dict(), (4, 0.5)), (dict(iw_max=3.0), (3, 0.5)),
                           (dict(iw_temperature=0.5), (2, 0.5 ** 0.5))):
        found = imitation_weights(logprobs, mask, "iw_sft", ref_logprobs=ref, **flags)
        assert close(found, [[w, w] for w in weights])
    far = imitation_weights(ref + 10, mask, "iw_sft", ref_logprobs=ref)
    assert (far == 16).all()                                         # the default clip


@pytest.mark.parametrize("ratio, loss, slope", [(1.1, -1.1, -1.1), (1.5, -1.28, 0),
                                                (0.5, -0.5, -0.5), (1.27, -1.27, -1.27)])
def test_psft_worked_example(ratio, loss, slope):
    """Loss, and derivative in log pi, of a token whose probability has changed by `ratio`
    (docstring of psft_loss)."""
    logprobs = torch.tensor([[math.log(ratio) - 1.5]], dtype=torch.float64, requires_grad=True)
    losses = psft_loss(logprobs, torch.full((1, 1), -1.5, dtype=torch.float64))
    assert close(losses, [[loss]]) and close(gradient(losses.sum(), logprobs), [[slope]])


def test_anchor_and_gem_worked_example():
    """pi = [.25, .75]. KL([.5, .5] || pi) = .5 log 2 + .5 log 2/3 = .144, where KL(pi || [.5, .5])
    is .131. GEM at temperature .5 has q = [.1, .9], so that the loss of token 0 is .9 log 3; at .7,
    the default, q(0) is 1 / (1 + 3^(1/.7))."""
    z = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64).log()
    half = torch.full((1, 1, 2), 0.5, dtype=torch.float64).log()
    assert close(anchor_loss(z, half), [[0.5 * math.log(4 / 3)]])
    assert close(gem_loss(z, z[..., 0], 0.5), [[0.9 * math.log(3)]])
    assert close(gem_loss(z, z[..., 0]), [[(1 - 1 / (1 + 3 ** (1 / 0.7))) * math.log(3)]])


@pytest.mark.parametrize("loss_type", ["psft", "gem", "DFT", "sft", ""])
def test_imitation_weights_name_their_choices(loss_type):
    """psft and gem, which have losses of their own, are no silent iw_sft, nor is a misspelling."""
    lp, mask = torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match=f"'{loss_type}': choose from dft, dft_sequence, power, "):
        imitation_weights(lp, mask, loss_type, ref_logprobs=lp)
