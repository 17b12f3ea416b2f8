"""
Imitation: dft.py, and what sft.py makes of a policy's own samples.

The mathematics is checked on the world of test_identities.py (15 sequences, 7 prefixes, a table of logits, float64), where
every expectation is a finite sum: the DFT and SFT classes get all 15 sequences as one batch, weighted by probabilities,
and autograd differentiates a closed form beside it. The bookkeeping (what is trained, padding, micro-batches, rounds)
is checked on the tiny model of test_grpo.py.
"""

import copy
import math
import zlib

import pytest
import torch

import data
import grpo
import sft
import train
from dft import DFT, DFTConfig, anchor_loss, gem_loss, imitation_weights, psft_loss
from model import InputError
from sft import SFT, SFTConfig
from test_grpo import float64  # noqa: F401  (a fixture)
from test_grpo import (DEMONSTRATIONS, PROBLEMS, Letters, check_invariance, coin, loss_and_gradient, make_sft, move,
                       read, same, same_results, tiny_model, training_args)
from test_identities import (GRAD_J, LENGTHS, LOGITS, MASK, PI, PREFIXES, REWARD, SEQUENCES, STATE, TOKEN, close, expected,
                         gradient, sequence_logprobs, table, token_logprobs)

LOSS_TYPES = ["dft", "dft_sequence", "power", "chord", "iw_sft", "psft", "asft", "gem"]
EVERY = torch.eye(15, dtype=torch.float64)           # row i: all the weight on sequence i


# -- the classes in the enumerable world ------------------------------------------------------------------------------


def tabular(logits):
    """A model whose logits are read from a table: what takes the place of a prompt is the three states of a
    sequence."""
    model = torch.nn.Module()
    model.completion_logits = lambda prompt_ids, prompt_mask, ids, mask, index: logits[prompt_ids[index]]
    model.dtype = logits.dtype
    return model


def whole_world():
    """All 15 sequences as a batch."""
    return {"prompt_ids": STATE, "prompt_mask": torch.ones_like(MASK), "completion_ids": TOKEN, "completion_mask": MASK,
            "prompt_index": torch.arange(15)}


def dft_loss(loss_type, probabilities, logits=LOGITS, other=None, **flags):
    """sum_y probabilities(y) x the loss that the DFT class gives y's tokens. other: the table of pi_ref or of
    pi_old."""
    model, other = tabular(logits), tabular(logits if other is None else other)
    algo = DFT(DFTConfig(loss_type, **flags), model, other, None, None)
    algo.old_model = other
    [batch] = algo.minibatches(whole_world())
    loss, _ = algo.loss({**batch, "weights": MASK * probabilities.detach()[:, None]})
    return loss


def dft_gradient(loss_type, probabilities, logits=LOGITS, other=None, **flags):
    return gradient(dft_loss(loss_type, probabilities, logits, other, **flags), logits)


def sft_gradient(probabilities, logits=LOGITS):
    return gradient(expected(sft.token_loss(token_logprobs(logits)), probabilities), logits)


def conditionals(probabilities):
    """The log of the distribution of the next token after each prefix, (7, 3), in a distribution over sequences."""
    mass = torch.zeros(7, 3, dtype=torch.float64)
    mass.index_put_((STATE[MASK], TOKEN[MASK]), probabilities.detach()[:, None].expand(15, 3)[MASK], accumulate=True)
    mass = mass + 1e-300                             # logits are finite, also after what is never written
    return (mass / mass.sum(1, keepdim=True)).log().requires_grad_()


def visits(probabilities):
    """How often each prefix is written, (7, 1)."""
    mass = torch.zeros(7, dtype=torch.float64)
    return mass.index_add(0, STATE[MASK], probabilities.detach()[:, None].expand(15, 3)[MASK])[:, None]


Q = sequence_logprobs(table(1)).exp().detach()       # (15,), the data
DATA = table(1).detach().softmax(-1)                 # (7, 3), the same as conditionals


def test_the_world_of_the_classes_is_the_world_of_the_functions():
    """The SFT loss of a table is that of the 15 sequences, and conditionals take a distribution apart."""
    assert close(dft_gradient("power", Q, alpha=0), sft_gradient(Q))
    assert close(conditionals(Q).exp(), DATA) and close(visits(Q)[0], 1) and close(visits(Q).sum(), (Q * LENGTHS).sum())


# -- worked examples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, weight", [
    (dict(loss_type="dft"), 0.25), (dict(loss_type="asft"), 0.25), (dict(loss_type="power"), 0.5),
    (dict(loss_type="power", alpha=2.0), 0.0625), (dict(loss_type="power", alpha=0.0), 1.0),
    (dict(loss_type="chord"), 0.1875)])
def test_weights_worked_example(flags, weight):
    """A token of probability .25 (docstring of imitation_weights), by hand: p, p, p^alpha (.5 by default), p (1 -
    p)."""
    logprobs = torch.tensor([[0.25]], dtype=torch.float64).log()
    assert close(imitation_weights(logprobs, torch.tensor([[True]]), **flags), [[weight]])


def test_dft_against_sft_worked_example():
    """p = .25: the loss of DFT is .347 where SFT's is 1.386, its gradient on the token's logit -.25 x .75 where SFT's
    is -.75 (docstring of imitation_weights)."""
    z = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64).log().requires_grad_()
    logprobs = z.log_softmax(-1)[..., 0]
    plain = sft.token_loss(logprobs)
    weighted = imitation_weights(logprobs, torch.tensor([[True]])) * plain
    assert plain.item() == pytest.approx(1.386, abs=5e-4) and weighted.item() == pytest.approx(0.347, abs=5e-4)
    assert close(gradient(plain.sum(), z), [[[-0.75, 0.75]]])
    assert close(gradient(weighted.sum(), z), [[[-0.25 * 0.75, 0.25 * 0.75]]])


def test_weights_of_whole_answers_worked_example():
    """Probabilities [.5, .4] and [.1, padding]: dft_sequence weighs .2 and .1. With a start model at [.25, .2] and [.2]
    the importance weights are 4 and 1/2; clipped at 3; at exponent 1/2, 2 and .707 (2507.12856)."""
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[0.5, 0.4], [0.1, 0.7]], dtype=torch.float64).log()
    ref = torch.tensor([[0.25, 0.2], [0.2, 0.01]], dtype=torch.float64).log()
    assert close(imitation_weights(logprobs, mask, "dft_sequence"), [[0.2, 0.2], [0.1, 0.1]])
    assert close(imitation_weights(logprobs, mask, "iw_sft", ref_logprobs=ref), [[4, 4], [0.5, 0.5]])
    assert close(imitation_weights(logprobs, mask, "iw_sft", ref_logprobs=ref, iw_max=3.0), [[3, 3], [0.5, 0.5]])
    root = imitation_weights(logprobs, mask, "iw_sft", ref_logprobs=ref, iw_temperature=0.5)
    assert close(root, [[2, 2], [0.5 ** 0.5] * 2])
    assert (imitation_weights(ref + 10, mask, "iw_sft", ref_logprobs=ref) == 16).all()          # the default clip


@pytest.mark.parametrize("ratio, loss, slope", [(1.1, -1.1, -1.1), (1.5, -1.28, 0), (0.5, -0.5, -0.5),
                                                (1.27, -1.27, -1.27)])
def test_psft_worked_example(ratio, loss, slope):
    """Loss, and derivative in log pi, of a token whose probability has changed by `ratio` (docstring of psft_loss)."""
    logprobs = torch.tensor([[math.log(ratio) - 1.5]], dtype=torch.float64, requires_grad=True)
    losses = psft_loss(logprobs, torch.full((1, 1), -1.5, dtype=torch.float64))
    assert close(losses, [[loss]]) and close(gradient(losses.sum(), logprobs), [[slope]])


def test_anchor_and_gem_worked_example():
    """pi = [.25, .75]. KL([.5, .5] || pi) = .5 log 2 + .5 log 2/3 = .144, where KL(pi || [.5, .5])
    is .131. GEM at temperature .5 has q = [.1, .9], so that the loss of token 0 is .9 log 3; at .7,
    the default, q(0) is 1 / (1 + 3^(1/.7))."""
    z = torch.tensor([[[0.25, 0.75]]], dtype=torch.float64).log()
    assert close(anchor_loss(z, torch.full((1, 1, 2), 0.5, dtype=torch.float64).log()), [[0.5 * math.log(4 / 3)]])
    assert close(gem_loss(z, z[..., 0], 0.5), [[0.9 * math.log(3)]])
    assert close(gem_loss(z, z[..., 0]), [[(1 - 1 / (1 + 3 ** (1 / 0.7))) * math.log(3)]])


def test_row_weights_worked_example():
    """Answers of 1 and 3 tokens: 1/4 each without row weights; with 0 and 1, 0 and 1/3; with 3 and 1, 3/6 and 1/6
    (docstring of sft.token_weights). Where nobody has a weight it is 0, not 0/0; small weights add up to 1 all the
    same."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    for rows, weights in ((None, [0.25, 0.25]), ([0.0, 1.0], [0, 1 / 3]), ([3.0, 1.0], [1 / 2, 1 / 6]),
                          ([0.0, 0.0], [0, 0]), ([3e-6, 1e-6], [1 / 2, 1 / 6])):
        found = sft.token_weights(mask, None if rows is None else torch.tensor(rows))
        assert close(found, [[weights[0], 0, 0], [weights[1]] * 3], 1e-6)


def test_kept_worked_example():
    """threshold: those that reach it, a rounding error below included; best: one per group, the first, whatever it is
    worth (docstring of sft.kept)."""
    rewards = torch.tensor([[1.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0], [-0.5, -0.2, -0.9, 0.7 - 1e-7]])
    assert sft.kept(rewards).tolist() == [[1, 0, 0, 1], [0] * 4, [0] * 4]
    assert sft.kept(rewards, threshold=0.5).tolist() == [[1, 0, 1, 1], [0] * 4, [0, 0, 0, 1]]
    assert sft.kept(rewards, threshold=0.7)[2].tolist() == [0, 0, 0, 1]
    assert sft.kept(rewards, "best").tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]


def test_awr_weights_worked_example():
    """[1, 0, 0, 0] at beta .3: advantages 3/4 and -1/4 give e^2.5 = 12.18 and e^(-.83) = .43; at beta .1 the first
    would be e^7.5 and is cut off at 20 (AWR, 1910.00177, section 5). Equals weigh 1, and groups do not see each
    other."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    assert close(sft.awr_weights(rewards, 0.3), [[12.1824940, 0.4345982, 0.4345982, 0.4345982], [1] * 4], 1e-6)
    assert close(sft.awr_weights(rewards, 0.1), [[20, *[math.exp(-2.5)] * 3], [1] * 4])
    assert close(sft.awr_weights(rewards, 0.1, largest=5.0), [[5, *[math.exp(-2.5)] * 3], [1] * 4])


# -- DFT: what its gradient is ----------------------------------------------------------------------------------------


def test_dft_gradient_is_that_of_the_probabilities():
    """Token by token, sg(p) x grad(-log p) = -grad p: DFT on y* ascends the sum of its p_t (2508.05629, eq. 9 and
    13)."""
    p = token_logprobs(LOGITS).exp()
    for i in range(15):
        assert close(dft_gradient("dft", EVERY[i]), -gradient((p * MASK)[i].sum(), LOGITS))


def test_dft_sequence_gradient_is_a_policy_gradient_with_a_plain_reward():
    """With the whole answer's probability for weight, DFT on y* ascends pi(y*): the on-policy policy gradient with
    reward 1[y = y*], the 1/pi of SFT gone (2508.05629, eq. 8 and 13)."""
    lp = token_logprobs(LOGITS)
    for i in range(15):
        losses, _, _ = grpo.policy_loss(lp, lp.detach(), EVERY[i], MASK)
        found = dft_gradient("dft_sequence", EVERY[i])
        assert close(found, -gradient(PI[i], LOGITS)) and close(found, gradient(expected(losses, PI), LOGITS))


@pytest.mark.parametrize("loss_type", ["dft", "dft_sequence", "power", "chord", "iw_sft", "asft"])
def test_weights_are_detached(loss_type):
    """Without the stop-gradient, -p log p would have the slope -p (1 + log p) in log p, which pushes every token below
    p = 1/e further down. With it the slope is minus the weight, and every demonstrated token is pulled up."""
    p = torch.tensor([[0.02, 0.3, 0.4, 0.9]], dtype=torch.float64)
    logprobs, mask = p.log().requires_grad_(), torch.ones(1, 4, dtype=torch.bool)
    wrong = gradient(-(logprobs.exp() * logprobs).sum(), logprobs)
    assert (wrong[0] > 0).tolist() == [True, True, False, False]                     # 1/e = .368
    weight = imitation_weights(logprobs, mask, loss_type, ref_logprobs=(p / 2).log())
    assert not weight.requires_grad and (weight > 0).all()
    assert close(gradient((weight * sft.token_loss(logprobs)).sum(), logprobs), -weight)


@pytest.mark.parametrize("loss_type", ["dft", "dft_sequence", "power", "chord", "asft"])
def test_the_class_pulls_up_even_what_is_unlikely(loss_type):
    """The same through the class: in a table where a demonstrated token has p < 1/e, a step down the loss raises it."""
    for i, y in enumerate(SEQUENCES):
        found = dft_gradient(loss_type, EVERY[i], anchor_coef=0.0)
        assert all(found[PREFIXES.index(y[:t]), token] < 0 for t, token in enumerate(y))
    assert (token_logprobs(LOGITS).exp()[MASK] < 1 / math.e).any()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 2.0])
def test_the_power_family(alpha):
    """Weight p^alpha: the gradient is that of (1 - p^alpha) / alpha; one end is SFT, the other DFT bit for bit; and on
    the token's own logit it is -p^alpha (1 - p) (2510.00526)."""
    lp = token_logprobs(LOGITS)
    found = dft_gradient("power", Q, alpha=alpha)
    if alpha > 0:
        assert close(found, gradient(expected((1 - lp.exp() ** alpha) / alpha, Q), LOGITS))
    assert alpha != 0 or close(found, sft_gradient(Q))
    assert alpha != 1 or torch.equal(found, dft_gradient("dft", Q))
    for i, y in enumerate(SEQUENCES):
        one, p = dft_gradient("power", EVERY[i], alpha=alpha), LOGITS.softmax(-1)
        for t, token in enumerate(y):
            state = PREFIXES.index(y[:t])
            assert close(one[state, token], -p[state, token] ** alpha * (1 - p[state, token]))


def test_chord_learns_neither_the_known_nor_the_hopeless():
    """Weight p (1 - p): the gradient is that of -(p - p^2 / 2); it vanishes at both ends, at most 1/4 in between, for p
    and 1 - p alike (CHORD's phi, 2508.11408)."""
    p = token_logprobs(LOGITS).exp()
    assert close(dft_gradient("chord", Q), -gradient(expected(p - p ** 2 / 2, Q), LOGITS))
    p = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64)[None]
    weight = imitation_weights(p.log(), torch.ones_like(p).bool(), "chord")
    assert close(weight, weight.flip(1)) and weight.argmax() == 50 and close(weight.max(), 0.25) and weight.min() < 1e-5


# -- importance weights, clip, anchor, GEM ----------------------------------------------------------------------------


def test_iw_sft_starts_as_sft_and_is_an_exact_policy_gradient_later():
    """At pi = pi_ref every weight is 1: SFT. Elsewhere, on answers that pi_ref wrote and a reward weighs, it is the
    exact policy gradient of pi: E_ref[R pi/pi_ref grad log pi] = grad E_pi[R] (2507.12856, whose bound is tight at q =
    pi)."""
    ref = table(3)
    written = sequence_logprobs(ref).exp()
    assert close(dft_gradient("iw_sft", Q), sft_gradient(Q))
    assert close(dft_gradient("iw_sft", Q, other=ref, iw_temperature=0.0), sft_gradient(Q))
    assert close(dft_gradient("iw_sft", written * REWARD, other=ref, iw_max=1e9), -GRAD_J)
    # The clip takes from those weights alone that exceed it.
    weights = (PI / written).detach()
    assert 0 < (weights > 0.8).sum() < 15
    assert close(dft_gradient("iw_sft", Q, other=ref, iw_max=0.8), sft_gradient(Q * weights.clamp(max=0.8)))


def test_psft_starts_as_sft_and_stops_above_the_clip():
    """At pi = pi_old the ratio's gradient is SFT's. Later a token whose ratio is above 1 + epsilon_high has none, and
    any other has ratio x SFT's: the clip below, whatever epsilon, never acts (2508.17784, eq. 6)."""
    assert close(dft_gradient("psft", Q), sft_gradient(Q)) and close(dft_loss("psft", Q), -(Q * LENGTHS).sum())
    old = table(3).detach()
    lp = token_logprobs(LOGITS)
    ratio = (lp - token_logprobs(old)).exp()
    for epsilon_high in (0.28, 0.0, 0.5):
        alive = (ratio <= 1 + epsilon_high).detach() & MASK
        assert (ratio[alive] < 0.8).any() and 0 < alive.sum() < MASK.sum()
        closed = -gradient(expected(ratio * alive, Q), LOGITS)
        for epsilon in (0.2, 0.0, 0.9):
            found = dft_gradient("psft", Q, other=old, epsilon=epsilon, epsilon_high=epsilon_high)
            assert close(found, closed)


def test_asft_adds_the_anchor_and_nothing_else():
    """The anchor is KL(pi_ref || pi), whose gradient on the logits is pi - pi_ref: the class adds anchor_coef times
    that, as often as a prefix is visited, to DFT; at 0 it is DFT bit for bit (2509.23753)."""
    ref = table(3).detach()
    kl = anchor_loss(LOGITS.log_softmax(-1), ref.log_softmax(-1))                                # (7,)
    assert (kl > 0).all() and close(anchor_loss(ref.log_softmax(-1), ref.log_softmax(-1)), 0)
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
    """The gradient on the logits is softmax(z / b) - onehot(y), SFT's at b = 1; with that, data^b, normalised, is where
    it vanishes: flatter than the data, the tail kept (2408.16673)."""
    for y in range(3):
        found = gradient(gem_loss(LOGITS, LOGITS.log_softmax(-1)[:, y], b).sum(), LOGITS)
        assert close(found, (LOGITS / b).softmax(-1) - torch.eye(3)[y])
    if b == 1:
        assert close(dft_gradient("gem", Q, gem_temperature=b), sft_gradient(Q))
    powered = (DATA ** b / (DATA ** b).sum(1, keepdim=True)).log().requires_grad_()
    assert close(dft_gradient("gem", Q, powered, gem_temperature=b), 0)
    data_itself = DATA.log().requires_grad_()
    assert close(dft_gradient("gem", Q, data_itself, gem_temperature=b), 0, 1e-3) == (b == 1)


# -- fixed points -----------------------------------------------------------------------------------------------------


def test_sft_rests_at_the_data_and_dft_drifts_to_the_mode():
    """At pi = data the gradient of SFT is 0 and that of token DFT -(q q - q |q|^2) at every prefix: what is likelier
    than |q|^2, the probability that two draws agree, grows at the cost of the rest."""
    at_data = DATA.log().requires_grad_()
    assert close(sft_gradient(Q, at_data), 0) and close(dft_gradient("power", Q, at_data, alpha=0), 0)
    agree = (DATA ** 2).sum(1, keepdim=True)
    drift = dft_gradient("dft", Q, at_data)
    assert close(drift, -visits(Q) * (DATA ** 2 - DATA * agree))
    rows = torch.arange(7)
    assert (drift[rows, DATA.argmax(1)] < 0).all() and (drift[rows, DATA.argmin(1)] > 0).all()


@pytest.mark.parametrize("loss_type, first, answer", [("dft", 0, (0, 0, 0)), ("dft_sequence", 2, (2,))])
def test_token_dft_goes_to_the_likeliest_token_and_sequence_dft_to_the_likeliest_answer(loss_type, first, answer):
    """Data whose first token is 0 half of the time, each time with another continuation, and END, the whole answer,
    four times in ten. Token by token the mode is 0; among answers it is END. The two DFTs disagree at the first
    token."""
    conditional = torch.tensor([[0.5, 0.1, 0.4]] + [[0.4, 0.3, 0.3]] * 6, dtype=torch.float64)
    q = sequence_logprobs(conditional.log()).exp()
    assert conditional[0].argmax() == 0 and SEQUENCES[q.argmax()] == (2,)
    logits = conditional.log().requires_grad_()                                       # start at the data
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        dft_loss(loss_type, q, logits).backward()
        optimizer.step()
    pi = sequence_logprobs(logits).exp()
    assert logits.softmax(-1)[0, first] > 0.95 and SEQUENCES[pi.argmax()] == answer and pi.max() > 0.9


# -- imitating what was right -----------------------------------------------------------------------------------------


RIGHT = (REWARD > 0).double()                        # (15,), which answers a verifier would accept
RATE = (PI * RIGHT).sum()                            # the acceptance rate, E[R]


def sft_self_loss(row_weights, logits=LOGITS):
    """The loss that the SFT class gives all 15 sequences as samples of a policy, with these row weights (15,)."""
    algo = SFT(SFTConfig(), tabular(logits), None, None, None)
    [minibatch] = algo.minibatches({**whole_world(), "row_weights": row_weights.detach()})
    return algo.loss(minibatch)[0]


def test_rejection_sampling_is_reinforce_without_its_negative_half():
    """Imitating one's own accepted answers has in expectation the gradient of -E[R], R in {0, 1}; per accepted answer,
    that of -log E[R], the log of the success rate, which weighs hard prompts by 1 / rate (RFT 2308.01825)."""
    accepted = sft.kept(REWARD[None].gt(0).double())[0]
    assert torch.equal(accepted.double(), RIGHT) and 0 < RIGHT.sum() < 15
    found = gradient(expected(sft.token_loss(token_logprobs(LOGITS)), PI * accepted), LOGITS)
    assert close(found, -gradient(RATE, LOGITS)) and close(found / RATE.detach(), -gradient(RATE.log(), LOGITS))
    # The class averages over accepted tokens: the same direction, divided by their expected number.
    tokens = (PI.detach() * accepted * LENGTHS).sum()
    assert close(gradient(sft_self_loss(PI * accepted), LOGITS), -gradient(RATE, LOGITS) / tokens)


@pytest.mark.parametrize("r", [RIGHT, REWARD.exp()], ids=["right or wrong", "graded"])
def test_a_full_round_of_imitation_never_lowers_the_reward(r):
    """Trained to the end on answers of pi weighed by r >= 0, SFT rests at q = pi r / E[r], where E_q[r] = E[r^2] /
    E[r], never below E[r]: the M-step of expert iteration and ReST-EM (2312.06585). For right or wrong that is 1."""
    q = (PI * r / (PI * r).sum()).detach()
    fixed = conditionals(q)
    assert close(sequence_logprobs(fixed).exp(), q)                                  # the table can express it
    assert close(gradient(sft_self_loss(PI * r, fixed), fixed), 0)
    assert gradient(sft_self_loss(PI * r), LOGITS).abs().max() > 0.01                # it does not rest where it starts
    reached = (sequence_logprobs(fixed).exp() * r).sum()
    assert close(reached, (PI * r ** 2).sum() / (PI * r).sum()) and reached > (PI * r).sum() + 0.01


def test_awr_rests_at_the_regularised_optimum():
    """With every answer weighed by exp(A / beta), imitation rests at pi exp(R / beta) / Z, whatever baseline A has: the
    optimum of E[R] - beta KL(. || pi) (AWR, 1910.00177, eq. 9). A cut-off that acts moves it."""
    beta = 0.7
    optimum = (PI * (REWARD / beta).exp()).detach()
    fixed = conditionals(optimum / optimum.sum())
    weights = sft.awr_weights(REWARD[None], beta, largest=1e9)[0]
    assert close(gradient(sft_self_loss(PI * weights, fixed), fixed), 0)
    capped = sft.awr_weights(REWARD[None], beta, largest=2.0)[0]
    assert capped.max() == 2 and not close(gradient(sft_self_loss(PI * capped, fixed), fixed), 0, 1e-4)


# -- the DFT class on a model -----------------------------------------------------------------------------------------


FLAGS = {"power": dict(alpha=0.3), "iw_sft": dict(iw_temperature=0.7, iw_max=1.2), "psft": dict(epsilon_high=0.1),
         "asft": dict(anchor_coef=0.4), "gem": dict(gem_temperature=0.6)}


@pytest.fixture(scope="module")
def learnt():
    """Weights that know three of the five demonstrations and not the others: probabilities from .001 to .9."""
    algo = make_sft()
    optimizer = algo.model.configure_optimizer(1e-2, 0.0)
    [minibatch] = algo.minibatches(algo.collect(DEMONSTRATIONS[:3], None)[0])
    for _ in range(25):
        train.update(training_args(), algo, optimizer, minibatch, {})
    return algo.model.state_dict()


def make_dft(weights, loss_type, **flags):
    """DFT from those weights; the reference model is a little way off."""
    model, ref_model = tiny_model(), tiny_model()
    model.load_state_dict(weights)
    ref_model.load_state_dict(weights)
    move(ref_model, 0.02, seed=6)
    config = DFTConfig(loss_type, **{**FLAGS.get(loss_type, {}), **flags})
    return DFT(config, model, ref_model, Letters(), data.Chain(2, 3))


def off_policy(weights, loss_type, micro_batch_size=0):
    """A minibatch after a move of the model: importance weights and ratios are not 1."""
    algo = make_dft(weights, loss_type)
    algo.micro_batch_size = micro_batch_size
    batch, metrics = algo.collect(DEMONSTRATIONS, None)
    assert metrics == {}
    if loss_type == "psft":
        [minibatch] = algo.minibatches(batch)                                         # pi_old: before the move
        move(algo.model, 0.02)
    else:
        move(algo.model, 0.02)
        [minibatch] = algo.minibatches(batch)
    return algo, minibatch


def potential(algo, batch):
    """A function whose gradient is what each loss type claims, with nothing in it detached."""
    config, mask = algo.config, batch["completion_mask"]
    logits = read(algo.model, batch)
    lp = logits.log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    p, answer = lp.exp(), (lp * mask).sum(1)
    if config.loss_type == "dft_sequence":
        return -answer.exp().sum() / mask.sum()
    if config.loss_type == "iw_sft":
        moved = config.iw_temperature * (answer - (batch["ref_logprobs"] * mask).sum(1))
        capped = moved > math.log(config.iw_max)
        assert 0 < capped.sum() < len(capped)                                         # both sides are at work
        values = torch.where(capped, -config.iw_max * answer, -moved.exp() / config.iw_temperature)
        return values.sum() / mask.sum()
    if config.loss_type == "power":
        values = -p ** config.alpha / config.alpha
    elif config.loss_type == "chord":
        values = p ** 2 / 2 - p
    elif config.loss_type == "gem":                                                   # whose q is softmax(z / b)
        b = config.gem_temperature
        values = b * (logits / b).logsumexp(-1) - logits.gather(-1, batch["completion_ids"][..., None])[..., 0]
    elif config.loss_type == "psft":
        ratio = (lp - batch["old_logprobs"]).exp()
        assert 0 < (ratio > 1 + config.epsilon_high)[mask].sum() < mask.sum() and (ratio[mask] < 1).any()
        values = -ratio.clamp(max=1 + config.epsilon_high)
    else:
        values = -p
    if config.loss_type == "asft":
        kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=z) for z in
                                                 (read(algo.ref_model, batch), logits)))
        values = values + config.anchor_coef * kl
    return values[mask].mean()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.usefixtures("float64")
def test_gradients_by_finite_differences(learnt, loss_type):
    """The gradient of the class, down to the weights of the model, is the slope of the function that each loss type
    claims to descend: -sum p, -pi(y), (1 - p^alpha) / alpha, ..., averaged over the tokens of the batch."""
    algo, minibatch = off_policy(learnt, loss_type)
    _, found, _ = loss_and_gradient(algo, minibatch)
    parameters, h = list(algo.model.parameters()), 1e-6
    here = torch.nn.utils.parameters_to_vector(parameters).detach()
    directions = torch.randn(3, len(here), generator=torch.Generator().manual_seed(0))
    for direction in (found, *directions):
        direction = direction / direction.norm()
        sides = []
        with torch.no_grad():
            for step in (h, -h):
                torch.nn.utils.vector_to_parameters(here + step * direction, parameters)
                sides.append(potential(algo, minibatch))
        assert float(found @ direction) == pytest.approx(float(sides[0] - sides[1]) / (2 * h), abs=1e-7)
    assert found.norm() > 1e-3


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.usefixtures("float64")
def test_dft_is_invariant_to_micro_batches_padding_and_order(learnt, loss_type):
    """Loss, gradient and metrics are those of the batch, however it is split and padded (misleading values on padding
    included); pi_old and pi_ref are the same when scored in micro-batches."""
    algo, minibatch = off_policy(learnt, loss_type)
    whole = check_invariance(algo, minibatch)
    algo, minibatch = off_policy(learnt, loss_type, micro_batch_size=2)
    assert same_results(loss_and_gradient(algo, minibatch, 2), whole)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dft_trains_end_and_nothing_after_or_before(learnt, loss_type):
    """Each of the N tokens of the completions weighs 1/N, <end> included, padding nothing; the gradient reaches just
    their logits, and the prompt's tokens are no targets at all."""
    algo = make_dft(learnt, loss_type)
    [minibatch] = algo.minibatches(algo.collect(DEMONSTRATIONS, None)[0])
    lengths = [len(e["completion"]) + 1 for e in DEMONSTRATIONS]
    real = torch.tensor([[t < n for t in range(max(lengths))] for n in lengths])
    assert same(minibatch["weights"], real / sum(lengths), 1e-7)
    original, seen = algo.model.completion_logits, []

    def completion_logits(*args):
        seen.append(original(*args))
        seen[-1].retain_grad()
        return seen[-1]

    algo.model.completion_logits = completion_logits
    loss_and_gradient(algo, minibatch)
    assert torch.equal(seen[0].grad.abs().sum(-1) > 0, real)
    ends = minibatch["completion_ids"][torch.arange(5), torch.tensor(lengths) - 1]
    assert (ends == algo.tokenizer.eos_id).all()


def answer_logprobs(model, tokenizer, example):
    """The log-probabilities of all tokens where the example's completion is written, (T, V), and its tokens,
    unpadded."""
    prompt = [tokenizer.eos_id] + tokenizer.encode(example["prompt"])
    completion = tokenizer.encode(example["completion"]) + [tokenizer.eos_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:-1]
    return logits.log_softmax(-1), completion


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.usefixtures("float64")
def test_loss_and_metrics_against_a_direct_computation(learnt, loss_type):
    """Token by token, from one unpadded pass per example: the loss is the mean of weight x nll (psft: of the clipped
    ratio; asft: and the KL; gem: of its own), and beside it the plain nll, the mean weight, the share of weights below
    .01."""
    algo, minibatch = off_policy(learnt, loss_type)
    config, old_model = algo.config, tiny_model()
    old_model.load_state_dict(learnt)
    losses, nlls, weights, kls, right = [], [], [], [], 0
    for example in DEMONSTRATIONS:
        rows, tokens = answer_logprobs(algo.model, algo.tokenizer, example)
        refs, _ = answer_logprobs(algo.ref_model, algo.tokenizer, example)
        olds, _ = answer_logprobs(old_model, algo.tokenizer, example)
        lps = [row[token].item() for row, token in zip(rows, tokens)]
        iw = math.exp(config.iw_temperature * (sum(lps) - sum(ref[token].item() for ref, token in zip(refs, tokens))))
        for row, ref, old, token, lp in zip(rows, refs, olds, tokens, lps):
            p, ratio = math.exp(lp), math.exp(lp - old[token].item())
            weight = {"dft": p, "asft": p, "dft_sequence": math.exp(sum(lps)), "power": p ** config.alpha,
                      "chord": p * (1 - p), "iw_sft": min(iw, config.iw_max),
                      "psft": ratio * (ratio < 1 + config.epsilon_high), "gem": 1}[loss_type]
            loss, kl = -weight * lp, (ref.exp() * (ref - row)).sum().item()
            if loss_type == "psft":
                loss = -min(ratio, 1 + config.epsilon_high)
            if loss_type == "asft":
                loss += config.anchor_coef * kl
            if loss_type == "gem":
                q = (row / config.gem_temperature).softmax(-1)
                loss = (q * row).sum().item() - lp
            losses, nlls, weights, kls = losses + [loss], nlls + [-lp], weights + [weight], kls + [kl]
            right += int(row.argmax()) == token
    loss, _, metrics = loss_and_gradient(algo, minibatch)
    n = len(losses)
    assert float(loss) == pytest.approx(sum(losses) / n, abs=1e-9)
    assert metrics["nll"] == pytest.approx((sum(nlls), n)) and metrics["mean_token_accuracy"] == (right, n)
    assert metrics["mean_weight"] == pytest.approx((sum(weights), n))
    unweighed = sum(weight < 0.01 for weight in weights)
    assert metrics["frac_weight_near_zero"] == (unweighed, n)
    assert ("kl" in metrics) == (loss_type == "asft")
    if loss_type == "asft":
        assert metrics["kl"] == pytest.approx((sum(kls), n)) and sum(kls) > 0.01
    if loss_type in ("dft", "asft", "chord", "psft"):
        assert 0 < unweighed < n


def test_asft_without_its_anchor_is_dft(learnt):
    """anchor_coef 0: loss and gradient are DFT's bit for bit. With an anchor that equals the model, its KL is 0 and so
    is its pull; and the reference is never trained."""
    plain, anchored = make_dft(learnt, "dft"), make_dft(learnt, "asft", anchor_coef=0.0)
    batch, _ = plain.collect(DEMONSTRATIONS, None)
    a, b = (loss_and_gradient(algo, algo.minibatches(batch)[0]) for algo in (plain, anchored))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and b[2]["kl"][0] > 0
    held = make_dft(learnt, "asft", anchor_coef=5.0)
    far = loss_and_gradient(held, held.minibatches(batch)[0])
    held.ref_model = copy.deepcopy(held.model)
    near = loss_and_gradient(held, held.minibatches(batch)[0])
    assert near[2]["kl"][0] == pytest.approx(0, abs=1e-5) and same(near[1], a[1], 1e-5) and not same(far[1], a[1], 1e-2)
    assert all(p.grad is None for p in held.ref_model.parameters())


@pytest.mark.parametrize("sync_steps", [1, 3])
@pytest.mark.parametrize("micro_batch_size", [0, 2])
def test_psft_renews_its_old_policy_every_sync_steps(learnt, sync_steps, micro_batch_size):
    """pi_old is the policy of steps 0, sync_steps, 2 sync_steps, ... and stays what it was in between. Just renewed,
    every ratio is exactly 1, for it is scored by the very forward pass that trains."""
    algo = make_dft(learnt, "psft", sync_steps=sync_steps)
    algo.micro_batch_size = micro_batch_size
    assert algo.frozen["old_model"] is algo.old_model and not any(p.requires_grad for p in algo.old_model.parameters())
    for step in range(7):
        move(algo.model, 0.02, seed=step)
        before = copy.deepcopy(algo.old_model.state_dict())
        [minibatch] = algo.minibatches(algo.collect(DEMONSTRATIONS, None, step)[0])
        due = algo.model.state_dict() if step % sync_steps == 0 else before
        assert all(torch.equal(due[name], tensor) for name, tensor in algo.old_model.state_dict().items())
        _, _, metrics = loss_and_gradient(algo, minibatch, micro_batch_size)
        weight, n = metrics["mean_weight"]
        assert (weight == n) == (step % sync_steps == 0)
    assert "old_model" not in make_dft(learnt, "dft").frozen


# -- learning from itself ---------------------------------------------------------------------------------------------


def graded(prompts, completions, **columns):
    """A reward of 0, 1/4, 1/2, 3/4 or 1 that looks random and depends on prompt and answer."""
    return [zlib.crc32((p + c).encode()) % 5 / 4 for p, c in zip(prompts, completions)]


def make_self(Algorithm, reward_function=coin, max_steps=6, **flags):
    """SFT or DFT that learns from groups of 4 of its own answers, judged by the given reward."""
    config = Algorithm.Config(source="self", num_generations=4, **flags)
    algo = Algorithm(config, tiny_model(), tiny_model(), Letters(), data.Chain(2, 3))
    algo.rewards.functions = {"test": reward_function}
    algo.max_steps, algo.optimizer = max_steps, algo.model.configure_optimizer(1e-2, 0.0)
    return algo


def collect(algo, step=0, seed=2):
    return algo.collect(PROBLEMS, torch.Generator().manual_seed(seed), step)


def sampled(model, algo, seed=2, temperature=1.0):
    """What a model writes with the same lots as collect above: the texts of 16 rows, each with its prompt."""
    batch, _ = data.rollout(model, algo.tokenizer, algo.task, algo.rewards, PROBLEMS, 4, temperature,
                            torch.Generator().manual_seed(seed))
    return pairs(batch, algo.tokenizer)


def pairs(batch, tokenizer):
    """The (prompt, answer) of every row of a batch, decoded."""
    prompts = [tokenizer.decode(ids[mask][1:].tolist()) for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"])]
    return [(prompts[i], tokenizer.decode(ids[mask].tolist())) for i, ids, mask in
            zip(batch["prompt_index"], batch["completion_ids"], batch["completion_mask"])]


def values(rows, reward_function=coin):
    return [reward_function([p], [c])[0] for p, c in rows]


def equal_weights(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def unchanged(before, model):
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("Algorithm", [SFT, DFT])
def test_only_rewarded_rows_are_trained(Algorithm):
    """The minibatch is exactly the answers whose reward reaches the threshold, each with its own prompt, in order; they
    share the whole weight; all of them count in the logged reward (RFT 2308.01825; DFT 2508.05629, section 4.3)."""
    algo = make_self(Algorithm)
    everything = sampled(algo.model, algo)
    batch, metrics = collect(algo)
    [minibatch] = algo.minibatches(batch)
    good = [row for row, value in zip(everything, values(everything)) if value == 1]
    assert pairs(minibatch, algo.tokenizer) == good and 4 < len(good) < 16
    assert metrics["kept"] == (len(good), 16) and metrics["reward"] == (sum(values(everything)), 16)
    n = minibatch["completion_mask"].sum()
    assert same(minibatch["weights"], minibatch["completion_mask"] / n, 1e-7)


@pytest.mark.parametrize("Algorithm", [SFT, DFT])
@pytest.mark.parametrize("threshold, at_least", [(0.5, 0.5), (0.6, 0.75), (1.0, 1.0), (-1.0, 0.0)])
def test_the_threshold_is_the_configured_one(Algorithm, threshold, at_least):
    """Rewards of 0, 1/4, ..., 1: what reaches the threshold is kept, the threshold itself included, and what misses it
    by a rounding error, as weighted sums of rewards do, is no worse."""
    def rounded(prompts, completions, **columns):
        return [value - 1e-7 for value in graded(prompts, completions)]
    algo = make_self(Algorithm, rounded, threshold=threshold)
    everything = sampled(algo.model, algo)
    [minibatch] = algo.minibatches(collect(algo)[0])
    good = [row for row, value in zip(everything, values(everything, graded)) if value >= at_least]
    assert pairs(minibatch, algo.tokenizer) == good and 0 < len(good)


@pytest.mark.parametrize("Algorithm, flags", [(SFT, dict()), (DFT, dict()), (DFT, dict(loss_type="psft")),
                                              (DFT, dict(loss_type="iw_sft"))])
def test_where_nothing_is_right_nothing_is_learnt(Algorithm, flags):
    """No answer reaches the threshold: there is no minibatch, and the update leaves the weights as they are."""
    algo = make_self(Algorithm, lambda p, c, **columns: [0.0] * len(p), **flags)
    batch, metrics = collect(algo)
    parts = algo.minibatches(batch)
    before = copy.deepcopy(algo.model.state_dict())
    assert parts == [None] and metrics["kept"] == (0, 16)
    assert train.update(training_args(), algo, algo.optimizer, parts[0], {}) == 0 and unchanged(before, algo.model)


@pytest.mark.parametrize("Algorithm", [SFT, DFT])
@pytest.mark.parametrize("rounds, starts", [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (6, [0, 1, 2, 3, 4, 5])])
def test_the_sampler_is_the_policy_at_the_start_of_the_round(Algorithm, rounds, starts):
    """It becomes the current policy when a round starts, stays that while the policy moves on, and is what writes the
    answers: one round is RFT, a round every step RAFT (2304.06767)."""
    algo = make_self(Algorithm, rounds=rounds)
    assert algo.frozen["sampler"] is algo.sampler and not any(p.requires_grad for p in algo.sampler.parameters())
    for step in range(6):
        move(algo.model, 0.1, seed=step)
        before = copy.deepcopy(algo.sampler.state_dict())
        batch, _ = collect(algo, step)
        assert equal_weights(algo.sampler, algo.model) == (step in starts)
        assert unchanged(before, algo.sampler) == (step not in starts)
        written = sampled(algo.sampler, algo)
        assert pairs(algo.minibatches(batch)[0], algo.tokenizer) == [r for r in written if values([r]) == [1]]
    if len(starts) < 6:
        assert sampled(algo.model, algo) != written


@pytest.mark.parametrize("Algorithm", [SFT, DFT])
def test_sampling_has_the_configured_temperature(Algorithm):
    """At temperature .5 the answers are those of a rollout at .5, and not those at 1."""
    algo = make_self(Algorithm, lambda p, c, **columns: [1.0] * len(p), temperature=0.5)
    found = pairs(algo.minibatches(collect(algo)[0])[0], algo.tokenizer)
    assert found == sampled(algo.model, algo, temperature=0.5) != sampled(algo.model, algo)


@pytest.mark.parametrize("restart", [True, False])
def test_restart_trains_the_start_model_anew_in_every_round(restart):
    """STaR and ReST-EM: when a round starts, what was trained becomes the sampler, the policy is the start model again,
    and the optimizer has no memory; in between, and without restart, both go on (2203.14465; 2312.06585)."""
    algo = make_self(SFT, rounds=3, restart=restart)
    start = copy.deepcopy(algo.ref_model.state_dict())
    for step in range(6):
        trained, remembered = copy.deepcopy(algo.model.state_dict()), len(algo.optimizer.state)
        batch, _ = collect(algo, step)
        starts_anew = restart and step in (2, 4)
        assert unchanged(start if starts_anew else trained, algo.model)
        assert len(algo.optimizer.state) == (0 if starts_anew else remembered) and (remembered > 0) == (step > 0)
        if step in (0, 2, 4):
            assert unchanged(trained, algo.sampler)
        train.update(training_args(), algo, algo.optimizer, algo.minibatches(batch)[0], {})
        assert not unchanged(start, algo.model)
    assert unchanged(start, algo.ref_model)


@pytest.mark.parametrize("flags, bars", [
    (dict(rounds=3, threshold_start=0.2), [0.25, 0.25, 0.75, 0.75, 1, 1]),           # .2, .6 and 1
    (dict(rounds=2, threshold_start=0.0, threshold=0.5), [0, 0, 0, 0.5, 0.5, 0.5]),
    (dict(rounds=3, threshold=0.75), [0.75] * 6),
    (dict(rounds=1, threshold_start=0.5), [0.5] * 6),
])
def test_the_bar_rises_from_round_to_round(flags, bars):
    """Linearly, from threshold_start in the first round to threshold in the last, and not within a round (ReST,
    2308.08998, section 3); without a start it is the same throughout. Rewards are multiples of 1/4."""
    algo = make_self(SFT, graded, reward="brevity", **flags)
    for step, bar in enumerate(bars):
        batch, _ = collect(algo, step, seed=step)
        written = sampled(algo.sampler, algo, seed=step)
        assert batch["row_weights"].tolist() == [value >= bar for value in values(written, graded)]
        assert 0 < batch["row_weights"].sum() < 16 or bar == 0


def test_best_keeps_one_answer_of_every_group():
    """--keep best: the first of the best of each group of 4, right or not (RAFT, 2304.06767)."""
    algo = make_self(SFT, graded, keep="best")
    groups = [values(sampled(algo.model, algo)[i:i + 4], graded) for i in range(0, 16, 4)]
    batch, metrics = collect(algo)
    assert batch["row_weights"].view(4, 4).tolist() == [[float(i == g.index(max(g))) for i in range(4)] for g in groups]
    assert metrics["kept"] == (4, 16) and len(algo.minibatches(batch)[0]["row_weights"]) == 4


def test_awr_drops_nobody():
    """--weighting awr: the rows weigh exp(advantage in their own group / awr_beta), and each of their tokens as much,
    over the sum (AWR, 1910.00177); the minibatch has all 16."""
    algo = make_self(SFT, graded, weighting="awr", awr_beta=0.5)
    rewards = torch.tensor(values(sampled(algo.model, algo), graded)).view(4, 4)
    batch, metrics = collect(algo)
    by_hand = ((rewards - rewards.mean(1, keepdim=True)) / 0.5).exp().flatten()
    assert same(batch["row_weights"], by_hand, 1e-5) and len(by_hand.unique()) > 4 and metrics["kept"] == (16, 16)
    [minibatch] = algo.minibatches(batch)
    tokens = by_hand[:, None] * batch["completion_mask"]
    assert same(minibatch["weights"], tokens / tokens.sum(), 1e-6)


@pytest.mark.parametrize("flags", [dict(), dict(keep="best"), dict(weighting="awr")])
@pytest.mark.usefixtures("float64")
def test_self_training_is_invariant_to_micro_batches_padding_and_order(flags):
    """The loss is the weighted mean of the nll, whichever rows were left out and however the rest is split."""
    algo = make_self(SFT, graded, **flags)
    batch, _ = collect(algo)
    [minibatch] = algo.minibatches(batch)
    loss, grad, _ = check_invariance(algo, minibatch)
    everything = {**batch, "weights": sft.token_weights(batch["completion_mask"], batch["row_weights"])}
    whole = loss_and_gradient(algo, everything)
    assert same(loss, whole[0]) and same(grad, whole[1])
    lps = read(algo.model, batch).log_softmax(-1).gather(-1, batch["completion_ids"][..., None])[..., 0]
    weights = batch["row_weights"][:, None] * batch["completion_mask"]
    assert same(loss, -(weights * lps).sum() / weights.sum())


@pytest.mark.parametrize("Algorithm", [SFT, DFT])
def test_what_each_source_trains_on(Algorithm):
    """demos: demonstrations, which need a completion or a text; self: problems, which need an answer. Only --source
    self has a sampler and a reward."""
    task = data.Chain(2, 3)
    for source, columns in (("demos", [("prompt", "completion"), ("text",)]), ("self", [("prompt", "answer")])):
        config = Algorithm.Config(source=source, num_demonstrations=5, num_prompts=7)
        algo = Algorithm(config, tiny_model(), tiny_model(), Letters(), task)
        examples = data.demonstrations(task, 5, 3) if source == "demos" else data.problems(task, "train", 7, 3)
        assert algo.examples(seed=3) == examples and Algorithm.columns(config) == columns
        assert hasattr(algo, "sampler") == ("sampler" in algo.frozen) == (source == "self")
        assert list(algo.networks) == ["model"] and algo.frozen["ref_model"] is algo.ref_model


# -- wrong settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Config, flags, message", [
    *[(Config, {name: 0}, f"--{name} 0: at least 1") for Config in (SFTConfig, DFTConfig)
      for name in ("num_demonstrations", "num_generations", "num_prompts", "rounds")],
    (DFTConfig, dict(sync_steps=0), "--sync_steps 0: at least 1"),
    *[(DFTConfig, {name: -0.1}, f"--{name} -0.1: a number of at least 0")
      for name in ("alpha", "epsilon", "epsilon_high", "anchor_coef", "iw_temperature")],
    *[(DFTConfig, {name: 0.0}, f"--{name} 0.0: a number above 0")
      for name in ("temperature", "gem_temperature", "iw_max")],
    (SFTConfig, dict(num_documents=-1), "--num_documents -1"),
    (SFTConfig, dict(temperature=0.0), "above 0"),
    (SFTConfig, dict(awr_beta=0.0), "above 0"),
    (SFTConfig, dict(source="self", completion_only=False), "--completion_only false"),
    (SFTConfig, dict(source="self", threshold_start=0.2), "graded reward"),
    (SFTConfig, dict(source="self", threshold_start=0.0, reward="format"), "graded reward"),
    (SFTConfig, dict(source="self", threshold_start=0.0, reward="brevity", keep="best"), "--keep threshold"),
    (SFTConfig, dict(source="self", threshold_start=0.0, reward="brevity", weighting="awr"), "--keep threshold"),
])
def test_wrong_settings_are_refused(Config, flags, message):
    """Each is an InputError that says what is wrong, before anything is sampled."""
    with pytest.raises(InputError, match=message):
        Config(**flags)


def test_settings_at_the_edge_are_accepted():
    """0 where 0 means something, 1 where 1 is the least, a rising bar under a graded reward."""
    DFTConfig(alpha=0.0, epsilon=0.0, epsilon_high=0.0, anchor_coef=0.0, iw_temperature=0.0, sync_steps=1, rounds=1)
    SFTConfig(source="self", threshold_start=0.0, reward="verifier,brevity", rounds=1, num_generations=1)
    SFTConfig(source="self", threshold_start=-1.0, reward="model")
@pytest.mark.parametrize("Algorithm", [SFT, DFT])
@pytest.mark.parametrize("rounds", [4, 5, 7, 10, 25])
def test_there_are_as_many_rounds_as_asked_for(Algorithm, rounds):
    """Whether or not rounds divides max_steps: the sampler is renewed `rounds` times (at most once a step), at intervals
    that differ by at most a step."""
    algo, starts = make_self(Algorithm, max_steps=10, rounds=rounds), []
    for step in range(10):
        move(algo.model, 0.01, seed=step)
        collect(algo, step)
        starts += [step] if equal_weights(algo.sampler, algo.model) else []
    gaps = [b - a for a, b in zip(starts, starts[1:] + [10])]
    assert len(starts) == min(rounds, 10) and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("rounds", [4, 7, 25])
def test_the_bar_reaches_its_full_height(rounds):
    """In the last step the answers are held to `threshold`, whether or not rounds divides max_steps."""
    algo = make_self(SFT, graded, reward="brevity", max_steps=10, rounds=rounds, threshold_start=0.0)
    batch, _ = collect(algo, 9)
    assert batch["row_weights"].tolist() == [value == 1 for value in values(sampled(algo.sampler, algo), graded)]


@pytest.mark.parametrize("Algorithm", [SFT, DFT])
def test_a_majority_needs_no_answers_in_the_file(Algorithm):
    """Only the verifier asks for an `answer` column; a majority vote asks for prompts alone."""
    assert Algorithm.columns(Algorithm.Config(source="self")) == [("prompt", "answer")]
    assert Algorithm.columns(Algorithm.Config(source="self", reward="majority,brevity")) == [("prompt",)]
