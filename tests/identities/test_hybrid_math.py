"""
The hybrids on the world of 15 sequences: what a demonstrator's token weighs, and the ends at which
a hybrid is exactly GRPO or exactly SFT. The classes get the same rows; autograd does the rest.
"""

import itertools

import pytest
import torch

import dft
from grpo import GRPO, group_advantages
from harness.log import Log
from hybrid import Hybrid, imitation_loss, srft_loss
from sft import SFT
from tasks import Chain
from world import (GRAD_J, LENGTHS, LOGITS, MASK, PI, REWARD, SEQUENCES, STATE, TOKEN, close,
                   gradient, sequence_logprobs, table, tabular, token_logprobs)

BETA = sequence_logprobs(table(1)).exp().detach()         # (15,), the demonstrator
OWN = [0, 3, 7, 12, 14, 2, 5, 9, 1, 4, 8, 13]             # three groups of four answers
DEMOS = [6, 10, 11]                                       # and a demonstration for each
MIXED = [1.0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0]            # no group is flat


def make(**settings):
    settings = {"num_generations": 4, "demonstrated": 3, "device": "cpu", "dtype": "float32",
                **settings}
    return Hybrid(Hybrid.Config(**settings), tabular(LOGITS), None, Chain(2, 3))


def rows_of(rows):
    """These sequences as rows of a batch, each with a prompt of its own."""
    rows = torch.tensor(rows)
    return {"prompt_ids": STATE[rows], "prompt_mask": torch.ones_like(MASK[rows]),
            "completion_ids": TOKEN[rows], "completion_mask": MASK[rows],
            "prompt_index": torch.arange(len(rows))}


def batch_of(rewards, own=OWN, demos=DEMOS, demo_rewards=1.0, mu=0.5, hints=None):
    """What Hybrid.sample gives: own answers in groups, then demonstrations. hints: how many tokens
    of each own answer a demonstrator wrote."""
    rows, is_demo = [*own, *demos], torch.arange(len(own) + len(demos)) >= len(own)
    hints = torch.tensor(hints or [0] * len(own))[:, None] > torch.arange(3)
    demonstrated = torch.cat([hints, torch.ones(len(demos), 3).bool()]) & MASK[rows]
    rewards = torch.tensor([*rewards, *[demo_rewards] * len(demos)])
    return {**rows_of(rows), "rewards": rewards, "demonstrated": demonstrated,
            "shown": torch.where(is_demo, torch.arange(len(rows)) - len(own), -1),
            "mu": torch.full_like(rewards, mu)}


def of_minibatch(algo, batch):
    [part] = algo.minibatches(batch, Log())
    return gradient(algo.loss(part, Log()), LOGITS)


def of_grpo(rewards, own=OWN, **settings):
    """GRPO's gradient on the same own answers, by its class and with its defaults."""
    config = GRPO.Config(num_generations=4, device="cpu", dtype="float32", **settings)
    batch = {**rows_of(own), "rewards": torch.tensor(rewards)}
    return of_minibatch(GRPO(config, tabular(LOGITS), None, Chain(2, 3)), batch)


def of_sft(rows=DEMOS, phi=False):
    """SFT's gradient on the same demonstrations, by its class; phi: that of DFT's chord."""
    algo = SFT(SFT.Config(device="cpu", dtype="float32"), tabular(LOGITS), None, None)
    if phi:
        config = dft.DFT.Config(loss_type="chord", device="cpu", dtype="float32")
        algo = dft.DFT(config, tabular(LOGITS), None, None)
    return of_minibatch(algo, rows_of(rows))


# -- what a demonstrator's token weighs -----------------------------------------------------------


def weight_of(imitation, p, advantage=1.0, entropy=0.0, shaping=0.1):
    """-dL/d(log pi) of tokens with these probabilities."""
    p = torch.as_tensor(p, dtype=torch.float64)
    logprobs = p.log()[None].requires_grad_()
    losses = imitation_loss(logprobs, torch.full_like(logprobs, entropy),
                            torch.full((1, 1), advantage).double(), imitation, shaping)
    return -gradient(losses.sum(), logprobs)[0]


P = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


@pytest.mark.parametrize("imitation, table", [
    ("sft", [1, 1, 1]), ("chord", [0.010, 0.250, 0.010]), ("luffy", [0.083, 0.139, 0.083])])
def test_the_table_of_weights(imitation, table):
    """The figures of imitation_loss's docstring, at p = .01, .5 and .99."""
    assert close(weight_of(imitation, [0.01, 0.5, 0.99]), table, 5e-4)


def test_the_weights_in_closed_form():
    """SFT 1; CHORD p (1 - p), which is dft.py's (2508.11408); LUFFY A g p / (p + g)^2, largest at p
    = g, where it is A / 4 (2504.14945); SRFT .5 exp(-H) + A p (2506.19767)."""
    assert close(weight_of("sft", P, advantage=-3.0), 1)
    assert close(weight_of("chord", P, advantage=-3.0), P * (1 - P))
    assert close(weight_of("chord", P), dft.imitation_weights(P.log(), None, "chord"))
    for shaping, advantage in ((0.1, 1.0), (0.3, -1.5)):
        found = weight_of("luffy", P, advantage, shaping=shaping)
        assert close(found, advantage * shaping * P / (P + shaping) ** 2)
        assert P[found.abs().argmax()] == pytest.approx(shaping)
        assert found.abs().max() == pytest.approx(abs(advantage) / 4)
    for entropy, advantage in ((0.0, 1.0), (1.2, -1.5)):
        found = weight_of("srft", P, advantage, entropy)
        assert close(found, 0.5 * torch.tensor(-entropy).exp() + advantage * P, 1e-7)


def test_entropies_are_weights_and_no_aim():
    """SRFT's two factors of the entropy are detached: its own gradient is nowhere in the loss."""
    lp, A = torch.full((1, 1), -1.0), torch.zeros(1, 1)
    for loss in (lambda H: imitation_loss(lp, H, A, "srft"),
                 lambda H: srft_loss(lp, H, torch.tensor([[True]]))):
        H = torch.ones(1, 1, requires_grad=True)
        assert not loss(H).requires_grad and loss(H) > 0


def test_an_unknown_imitation_is_named():
    with pytest.raises(ValueError, match="imitation 'chrod': choose from none, sft, chord, luffy"):
        weight_of("chrod", 0.5)


def test_luffy_without_shaping_is_dft():
    """With A = 1 and a large g the weight times g is p: the plain importance ratio with pi_old = 1,
    which is DFT's weight."""
    found = 1e8 * weight_of("luffy", P, shaping=1e8)
    assert close(found, dft.imitation_weights(P.log(), None, "dft"), 1e-7)


# -- gates ----------------------------------------------------------------------------------------


def test_a_closed_gate_leaves_exactly_grpo():
    """HPT (2509.04419): every group has a right answer, so no demonstration counts."""
    found = of_minibatch(make(gate="failed"), batch_of(MIXED))
    assert torch.equal(found, of_grpo(MIXED)) and found.abs().max() > 0.01


@pytest.mark.parametrize("imitation", ["sft", "chord"])
def test_an_open_gate_leaves_exactly_sft(imitation):
    """Every group failed and every prompt has a demonstration: their imitation, whole."""
    found = of_minibatch(make(gate="failed", imitation=imitation), batch_of([0.0] * 12))
    assert close(found, of_sft(phi=imitation == "chord"), 1e-12) and found.abs().max() > 0.01


def test_between_the_gates_each_prompt_has_its_own_loss():
    """The middle group failed: the others' GRPO and the middle demonstration's likelihood, in the
    averages over all own and over all demonstrated tokens."""
    rewards = [1.0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]
    shown = LENGTHS[DEMOS[1]] / LENGTHS[DEMOS].sum()
    found = of_minibatch(make(gate="failed"), batch_of(rewards))
    assert close(found, of_grpo(rewards) + shown * of_sft(DEMOS[1:2]), 1e-12)
    # A demonstration for the first group alone: the middle one, flat, teaches nothing.
    found = of_minibatch(make(gate="failed", demonstrated=1), batch_of(rewards, demos=DEMOS[:1]))
    assert torch.equal(found, of_grpo(rewards))


@pytest.mark.parametrize("K", [2, 3, 4])
def test_hpt_at_a_threshold_of_0_is_superrl(K):
    """On every vector of 0/1 rewards the demonstration counts just where max R = 0 (SuperRL,
    2506.01096), and the own answers just where it does not. A threshold of 1/2 lets it count where
    at most half are right."""
    for rewards in itertools.product([0.0, 1.0], repeat=K):
        for threshold in (0.0, 0.5):
            algo = make(gate="failed", gate_threshold=threshold, demonstrated=1, num_generations=K)
            [part] = algo.minibatches(batch_of(rewards, range(K), DEMOS[:1]), Log())
            counts, is_demo = (part["weights"] > 0).any(-1), part["demonstrated"].any(-1)
            is_open = sum(rewards) <= threshold * K if threshold else max(rewards) == 0
            assert (counts & is_demo).any() == is_open
            assert (counts & ~is_demo).any() == (not is_open and len(set(rewards)) == 2)


def test_waiting_demonstrations_wait():
    """ReLIFT (2506.07527): demonstrations of failed groups are noted and not yet trained on."""
    algo = make(gate="buffer", num_demonstrations=30)
    rewards = [1.0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0]
    assert torch.equal(of_minibatch(algo, batch_of(rewards)), of_grpo(rewards))
    assert algo.waiting.nonzero().flatten().tolist() == [1]


# -- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("imitation", ["sft", "chord"])
def test_chord_lies_between_grpo_and_imitation(imitation):
    """mu 0 is exactly GRPO, mu 1 the imitation, mu .25 a quarter of the way (2508.11408: (1 - mu)
    L_GRPO + mu L_SFT)."""
    algo = make(imitation=imitation)
    grpo, imitated = of_grpo(MIXED), of_sft(phi=imitation == "chord")
    assert torch.equal(of_minibatch(algo, batch_of(MIXED, mu=0.0)), grpo)
    assert close(of_minibatch(algo, batch_of(MIXED, mu=1.0)), imitated, 1e-15)
    found = of_minibatch(algo, batch_of(MIXED, mu=0.25))
    assert close(found, 0.75 * grpo + 0.25 * imitated, 1e-12)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0])
def test_the_population_gradient_of_the_sum(mu):
    """All 15 sequences as answers, weighted by pi(y), and all 15 as demonstrations, weighted by the
    demonstrator's beta(y): (1 - mu) grad E_pi[r] + mu E_beta[grad log pi], the ascent on reward and
    on - KL(beta || pi) of 2509.04419."""
    batch = batch_of(REWARD.tolist(), range(15), range(15))
    weights = MASK * torch.cat([(1 - mu) * PI.detach(), mu * BETA])[:, None].view(2, 15, 1)
    zeros = torch.zeros(15, dtype=torch.float64)
    batch |= {"weights": weights.view(30, 3), "advantages": torch.cat([REWARD, zeros]),
              "success": torch.cat([zeros, zeros])}
    found = -gradient(make().loss(batch, Log()), LOGITS)
    kl = (BETA * (BETA.log() - sequence_logprobs(LOGITS))).sum()
    assert close(found, (1 - mu) * GRAD_J - mu * gradient(kl, LOGITS))


def test_no_imitation_is_grpo():
    """--imitation none: demonstrated prompts are prompts like any others."""
    found = of_minibatch(make(imitation="none"), batch_of(MIXED, demos=[]))
    assert torch.equal(found, of_grpo(MIXED))


# -- demonstrations in the group ------------------------------------------------------------------


def test_luffy_is_grpo_with_a_member_more():
    """Own tokens have the advantages of a group of five, in which the demonstration is; so have the
    demonstration's. The average is over all tokens, of whoever wrote them (2504.14945)."""
    rewards = torch.tensor(MIXED, dtype=torch.float64).view(3, 4)
    A = group_advantages(torch.cat([rewards, torch.ones(3, 1).double()], 1))     # (3, 5)
    A = torch.cat([A[:, :4].flatten(), A[:, 4]])[:, None]                        # (15, 1)
    rows = OWN + DEMOS
    logprobs, mask = token_logprobs(LOGITS)[rows], MASK[rows]
    p = logprobs.exp()
    shaped = torch.where(torch.arange(15)[:, None] < 12, logprobs, p / (p + 0.1))
    closed = -(A * shaped * mask).sum() / mask.sum()
    found = of_minibatch(make(imitation="luffy"), batch_of(MIXED))
    assert close(found, gradient(closed, LOGITS))


def test_srft_own_answers_are_nll_of_right_minus_nll_of_wrong():
    """REINFORCE with rewards of +1 and -1 is the likelihood of right answers minus that of wrong
    ones; SRFT's weight on the right ones is .1 exp(H) (2506.19767)."""
    lp, right = token_logprobs(LOGITS), REWARD > 0
    all_logprobs = LOGITS.log_softmax(-1)[STATE]
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)                       # (15, 3)
    sign = torch.where(right, 1.0, -1.0).double()
    plain = srft_loss(lp, torch.full_like(lp, 10.0).log(), right[:, None])       # .1 exp(H) = 1
    found = gradient((plain * MASK * PI.detach()[:, None]).sum(), LOGITS)
    assert close(found, -gradient((PI * sign).sum(), LOGITS))
    weighted = srft_loss(lp, entropy, right[:, None])
    by_hand = torch.where(right[:, None], -0.1 * entropy.detach().exp() * lp, lp)
    assert close(gradient((weighted * MASK).sum(), LOGITS),
                 gradient((by_hand * MASK).sum(), LOGITS))


def test_srft_whole():
    """Both halves in the class: own tokens by right and wrong, flat groups too; demonstrations by
    .5 exp(-H) and by their advantage, which is 0 in the last group."""
    rewards = [1.0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    rows = OWN + DEMOS
    lp, mask = token_logprobs(LOGITS)[rows], MASK[rows]
    all_logprobs = LOGITS.log_softmax(-1)[STATE[rows]].detach()
    H = -(all_logprobs.exp() * all_logprobs).sum(-1)                             # (15, 3)
    A = [2 / 5 / (0.3 ** 0.5 + 1e-4), 4 / 5 / (0.2 ** 0.5 + 1e-4), 0]   # 3, 1 and 5 of 5 right
    A = torch.tensor([0.0] * 12 + A, dtype=torch.float64)[:, None]
    right = torch.tensor(rewards + [1.0] * 3)[:, None] > 0.5
    own = torch.where(right, -0.1 * H.exp() * lp, lp)
    demo = -0.5 * (-H).exp() * lp - A * lp.exp()
    closed = (torch.where(torch.arange(15)[:, None] < 12, own, demo) * mask).sum() / mask.sum()
    found = of_minibatch(make(imitation="srft", own_loss="srft"), batch_of(rewards))
    assert close(found, gradient(closed, LOGITS))


# -- hints ----------------------------------------------------------------------------------------

LONG = [i for i, s in enumerate(SEQUENCES) if len(s) == 3][:12]     # twelve answers of three tokens


def test_uft_without_hints_is_grpo():
    """2505.16984: hints of no token add nothing."""
    found = of_minibatch(make(hint="all", mu=0.1), batch_of(MIXED, demos=[], mu=0.1))
    assert torch.equal(found, of_grpo(MIXED))


def test_uft_with_whole_hints_is_mu_times_sft():
    """Where a demonstrator wrote all, what is left is mu times the likelihood of what was
    written."""
    batch = batch_of(MIXED, demos=[], mu=0.1, hints=[3] * 12)
    assert close(of_minibatch(make(hint="all"), batch), 0.1 * of_sft(OWN))


@pytest.mark.parametrize("hint", ["all", "rescue"])
def test_uft_weighs_hints_by_mu_and_tails_as_grpo(hint):
    """Hints of 0 to 2 tokens: GRPO's average over the tokens that were sampled, plus mu times that
    of SFT over the hints' tokens."""
    lengths = [0, 1, 2, 0] * 3
    A = group_advantages(torch.tensor(MIXED, dtype=torch.float64).view(3, 4)).flatten()[:, None]
    lp = token_logprobs(LOGITS)[LONG]
    hints = torch.tensor(lengths)[:, None] > torch.arange(3)
    closed = -(A * lp)[~hints].mean() - 0.1 * lp[hints].mean()
    batch = batch_of(MIXED, LONG, [], mu=0.1, hints=lengths)
    assert close(of_minibatch(make(hint=hint), batch), gradient(closed, LOGITS), 1e-8)
    found = of_minibatch(make(hint=hint, imitation="none"), batch)     # BREAD: hints are prompts
    assert close(found, gradient(-(A * lp)[~hints].mean(), LOGITS))


@pytest.mark.parametrize("share, kept", [(0.3, 1), (0.5, 1), (0.6, 2), (1.0, 2)])
def test_prefix_rft_trains_the_uncertain_tokens_of_hints(share, kept):
    """2507.01679: of a hint's two tokens those of the largest entropy, with their answer's
    advantage and PPO's loss; of what was sampled every token; one average over all."""
    lengths = [2, 0, 0, 0] * 3
    A = group_advantages(torch.tensor(MIXED, dtype=torch.float64).view(3, 4)).flatten()[:, None]
    lp, H = token_logprobs(LOGITS)[LONG], torch.distributions.Categorical(
        logits=LOGITS[STATE[LONG]]).entropy()
    hints = torch.tensor(lengths)[:, None] > torch.arange(3)
    trained = ~hints | (hints & (H >= H[:, :2].max(1, keepdim=True).values if kept == 1 else hints))
    closed = -(A * lp * trained).sum() / 36
    algo = make(hint="one", imitation="prefix", top_entropy=share)
    batch = batch_of(MIXED, LONG, [], hints=lengths)
    assert close(of_minibatch(algo, batch), gradient(closed, LOGITS))
    [part] = algo.minibatches(batch, Log())
    used = (part["weights"] > 0) & part["demonstrated"]
    assert used.sum(-1).tolist() == [kept, 0, 0, 0] * 3
