"""
The survey's identities, first part: the mathematics of sft.py and grpo.py on a world small enough to write down, in
float64. test_imitation.py (dft.py, self-training), test_dpo.py and test_ppo.py go on in the same world.

Vocabulary {0, 1, END}; a sequence ends at END or after three tokens: 15 sequences, 7 prefixes. The policy is a (7, 3)
table of logits. Every expectation is then a finite sum, so the tests compare exact numbers and nothing is sampled: the
project's own functions get all 15 sequences as one batch, weighted by their probabilities, and autograd differentiates
the closed form.
"""

import itertools
import math

import pytest
import torch

import grpo
import report
import sft

END, LENGTH = 2, 3
LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "cispo"]
LEVELS = ["token", "sequence"]


def sequences(prefix=()):
    if prefix and (prefix[-1] == END or len(prefix) == LENGTH):
        return [prefix]
    return [s for token in range(3) for s in sequences(prefix + (token,))]


SEQUENCES = sequences()                                                           # 15 tuples of 1 to 3 tokens
PREFIXES = sorted({s[:t] for s in SEQUENCES for t in range(len(s))}, key=lambda p: (len(p), p))   # 7 tuples
MASK = torch.tensor([[t < len(s) for t in range(LENGTH)] for s in SEQUENCES])     # (15, 3)
# On padding stand the log-probabilities of some other token, as a model's would: meaningless, but not zero.
STATE = torch.tensor([[PREFIXES.index(s[:t]) if t < len(s) else 0 for t in range(LENGTH)] for s in SEQUENCES])
TOKEN = torch.tensor([[s[t] if t < len(s) else 1 for t in range(LENGTH)] for s in SEQUENCES])
LENGTHS = MASK.sum(1).double()                                                    # (15,)


def table(seed):
    """The logits of a policy, (7, 3)."""
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def token_logprobs(logits):
    """(7, 3) -> (15, 3), as completion_logits, log_softmax and gather would give them."""
    return logits.log_softmax(-1)[STATE, TOKEN]


def sequence_logprobs(logits):
    """log pi(y) of the 15 sequences."""
    return (token_logprobs(logits) * MASK).sum(1)


def gradient(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def expected(losses, probabilities):
    """E_pi[sum of the losses of y's tokens]: the aggregation whose weights are pi(y), detached."""
    return (losses * MASK * probabilities.detach()[:, None]).sum()


def close(a, b, tolerance=1e-9):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return torch.allclose(a, b, rtol=0, atol=tolerance)


LOGITS = table(0)
PI = sequence_logprobs(LOGITS).exp()                                              # (15,), with gradient
REWARD = torch.randn(15, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
GRAD_J = gradient((PI * REWARD).sum(), LOGITS)                                    # of J = E[reward], in closed form


def test_the_world_is_complete():
    """15 sequences, 7 prefixes, and the probabilities add up to 1: what all the exact sums below rest on."""
    assert len(SEQUENCES) == 15 and len(PREFIXES) == 7
    assert close(PI.sum(), 1.0)


# -- supervised fine-tuning -------------------------------------------------------------------------------------------


def test_sft_gradient_is_a_policy_gradient():
    """SFT on y* = on-policy policy gradient with reward 1[y = y*] / pi(y) (survey 2603.13985, section 4.1; 2508.05629,
    eq. 5-6)."""
    lp = token_logprobs(LOGITS)
    for i in range(15):
        imitation = gradient((sft.token_loss(lp) * MASK)[i].sum(), LOGITS)
        reward = (torch.arange(15) == i) / PI.detach()
        losses, _, _ = grpo.policy_loss(lp, lp.detach(), reward, MASK)
        assert close(imitation, gradient(expected(losses, PI), LOGITS))


def test_gradient_of_cross_entropy_is_softmax_minus_onehot():
    """d(-log softmax(z)_y)/dz = softmax(z) - onehot(y)."""
    z = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    for y in range(3):
        found = gradient(sft.token_loss(z.log_softmax(-1)[y]), z)
        assert close(found, z.softmax(-1) - torch.eye(3)[y])


def test_sft_loss_is_kl_from_the_data_plus_their_entropy():
    """E_data[-log pi] = H(data) + KL(data || pi): imitation minimises the forward KL."""
    q = sequence_logprobs(table(1)).exp().detach()
    loss = expected(sft.token_loss(token_logprobs(LOGITS)), q)
    kl = (q * (q / PI).log()).sum()
    assert close(loss - -(q * q.log()).sum(), kl)
    assert close(gradient(loss, LOGITS), gradient(kl, LOGITS))


def test_sft_token_mean_worked_example():
    """The example at the top of sft.py: completions of 1 and 3 tokens; the token mean is 3, the mean of means 4."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    weights = sft.token_weights(mask)
    assert weights.tolist() == [[0.25, 0, 0], [0.25, 0.25, 0.25]]
    for first, mean in ((-2.0, 2.0), (-6.0, 3.0)):
        logprobs = torch.tensor([[first, -99, -99], [-1.0, -1.0, -4.0]])
        assert (sft.token_loss(logprobs) * weights).sum() == mean
    assert sft.token_weights(torch.zeros(2, 3, dtype=torch.bool)).tolist() == [[0] * 3] * 2    # and not 0/0


# -- the policy gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_at_the_sampling_policy_is_the_policy_gradient(loss_type):
    """Where pi = pi_old, descending the surrogate ascends J = E[r] exactly, for d ratio = d log pi there (PPO,
    1707.06347, eq. 6)."""
    lp = token_logprobs(LOGITS)
    losses, ratio, clipped = grpo.policy_loss(lp, lp.detach(), REWARD, MASK, loss_type=loss_type)
    assert close(ratio, 1) and not clipped.any()
    assert close(gradient(expected(losses, PI), LOGITS), -GRAD_J)


def test_a_constant_baseline_changes_nothing_in_expectation():
    """E[grad log pi] = 0, so a constant reward has no gradient and may be subtracted from any other (Williams 1992)."""
    lp = token_logprobs(LOGITS)
    found = []
    for advantages in (torch.ones_like(REWARD), REWARD, REWARD - 5):
        losses, _, _ = grpo.policy_loss(lp, lp.detach(), advantages, MASK)
        found.append(gradient(expected(losses, PI), LOGITS))
    assert close(found[0], 0)
    assert close(found[1], found[2]) and found[1].abs().max() > 0.01


def expected_group_gradient(rewards, K, **flags):
    """The exact expectation, over all 15^K groups of K samples, of the gradient that the group's advantages give."""
    groups = torch.tensor(list(itertools.product(range(15), repeat=K)))               # (15^K, K)
    advantages = grpo.group_advantages(rewards[groups], **flags)                      # (15^K, K)
    rows = groups.flatten()
    lp = token_logprobs(LOGITS)[rows]                                                 # (15^K K, 3)
    losses, _, _ = grpo.policy_loss(lp, lp.detach(), advantages.flatten(), MASK[rows])
    weights = PI.detach()[groups].prod(1).repeat_interleave(K) / K
    return gradient((losses * MASK[rows] * weights[:, None]).sum(), LOGITS)


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("advantage", ["rloo", "group", "reinforce"])
def test_group_baselines_in_expectation(advantage, K):
    """The mean of the others is an unbiased baseline (RLOO, 2402.14740, eq. 8). The mean of the whole group contains
    the sample itself and shrinks the gradient by (K - 1)/K (Dr. GRPO, 2503.20783, appendix A)."""
    factor = (K - 1) / K if advantage == "group" else 1
    found = expected_group_gradient(REWARD, K, advantage=advantage, scale_rewards="none")
    assert close(found, -factor * GRAD_J)


@pytest.mark.parametrize("K", [2, 3])
def test_dividing_by_the_group_std_reweights_prompts(K):
    """For 0/1 rewards GRPO's expected gradient is E[std] / (p (1 - p)) grad p: prompts near p = 0 or 1 count for more,
    the difficulty bias of 2503.20783, section 3.1. At K = 2 the factor is exactly 1. (Population deviation.)"""
    binary = (REWARD > 0).double()
    p = (PI * binary).sum()
    std = sum(math.comb(K, k) * p ** k * (1 - p) ** (K - k) * math.sqrt(k / K * (1 - k / K)) for k in range(K + 1))
    factor = (std / (p * (1 - p))).detach()
    # advantage_eps: too small to matter, but not 0, because a group of equal rewards has a deviation of 0
    found = expected_group_gradient(binary, K, std_correction=0, advantage_eps=1e-300)
    assert close(found, -factor * gradient(p, LOGITS))
    assert (abs(factor - 1) < 1e-9) == (K == 2)


# -- advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, advantages", [
    (dict(advantage_eps=0), [1.5, -0.5, -0.5, -0.5]),                                           # sample deviation 1/2
    (dict(advantage_eps=0, std_correction=0), [3 ** 0.5, -3 ** -0.5, -3 ** -0.5, -3 ** -0.5]),  # population: sqrt(3)/4
    (dict(advantage_eps=0.5), [0.75, -0.25, -0.25, -0.25]),
    (dict(scale_rewards="none"), [0.75, -0.25, -0.25, -0.25]),
    (dict(advantage="rloo", scale_rewards="none"), [1, -1 / 3, -1 / 3, -1 / 3]),
    (dict(advantage="reinforce", scale_rewards="none"), [1, 0, 0, 0]),                          # no baseline
    (dict(advantage="remax", scale_rewards="none", greedy_rewards=torch.ones(1)), [0, -1, -1, -1]),
])
def test_advantages_worked_example(flags, advantages):
    """One group with rewards [1, 0, 0, 0], worked by hand (docstring of group_advantages; ReMax: 2310.10505, eq. 4)."""
    assert close(grpo.group_advantages(torch.tensor([[1.0, 0, 0, 0]]), **flags), [advantages], 1e-6)


def test_groups_do_not_see_each_other_but_a_batch_deviation_does():
    """[[1, 0], [4, 4]]: `group` divides by the deviation of each group, `batch` by that of all four, sqrt(17/4).
    The greedy answer of ReMax is each prompt's own."""
    rewards = torch.tensor([[1.0, 0.0], [4.0, 4.0]])
    s = 2 ** 0.5 / 2
    assert close(grpo.group_advantages(rewards, advantage_eps=1e-12), [[s, -s], [0, 0]], 1e-6)
    b = 0.5 / (17 / 4) ** 0.5
    assert close(grpo.group_advantages(rewards, scale_rewards="batch", advantage_eps=0), [[b, -b], [0, 0]], 1e-6)
    b = 0.5 / (51 / 16) ** 0.5                                   # of the population
    flags = dict(scale_rewards="batch", advantage_eps=0, std_correction=0)
    assert close(grpo.group_advantages(rewards, **flags), [[b, -b], [0, 0]], 1e-6)
    b = 0.5 / ((17 / 4) ** 0.5 + 0.5)
    assert close(grpo.group_advantages(rewards, scale_rewards="batch", advantage_eps=0.5), [[b, -b], [0, 0]], 1e-6)
    found = grpo.group_advantages(rewards, "remax", "none", greedy_rewards=torch.tensor([1.0, 3.0]))
    assert found.tolist() == [[0, -1], [1, 1]]


@pytest.mark.parametrize("advantage", ["group", "rloo"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_a_group_of_equal_rewards_gets_exactly_zero(scale_rewards, advantage):
    """Seven rewards of 0.1 have, in float32, a mean that is not 0.1; divided by a deviation as tiny, the residue would
    be a full-sized advantage. The zero must be exact, whatever advantage_eps and however many the rewards."""
    flags = dict(advantage=advantage, scale_rewards=scale_rewards)
    equal = [torch.full((1, G), 0.1) for G in range(3, 34)]
    assert any(((r != r.mean(1)) & (r.std(1) != 0)).all() for r in equal)            # the residue is really there
    for advantage_eps in (1e-4, 1e-12, 0):
        for rewards in equal:
            assert (grpo.group_advantages(rewards, **flags, advantage_eps=advantage_eps) == 0).all()
        rewards = torch.tensor([[0.1] * 7, [0.1] * 6 + [1.0]])                       # only the first group is flat
        mixed = grpo.group_advantages(rewards, **flags, advantage_eps=advantage_eps)
        assert (mixed[0] == 0).all() and (mixed[1] != 0).all()


# -- ratios and clips -------------------------------------------------------------------------------------------------


def one_token(ratio, advantage, **flags):
    """Loss, d loss / d log pi and the clip flag of a single token whose ratio to the old policy is `ratio`."""
    logprobs = torch.tensor([[math.log(ratio) - 1.5]], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.full((1, 1), -1.5, dtype=torch.float64), torch.tensor([float(advantage)])
    losses, _, clipped = grpo.policy_loss(logprobs, old, advantages, torch.ones(1, 1).bool(), **flags)
    return losses.item(), gradient(losses.sum(), logprobs).item(), clipped.item()


@pytest.mark.parametrize("ratio, advantage, loss, dead", [
    (1.5, +1, -1.2, True),     # a good token, already likelier: enough has been done
    (1.1, +2, -2.2, False),
    (0.5, +1, -0.5, False),    # a good token grown unlikely: full gradient back
    (0.5, -1, +0.8, True),     # a bad token, already unlikelier: enough
    (0.9, -2, +1.8, False),
    (1.5, -1, +1.5, False),    # a bad token grown likelier: the clip never shields a mistake
])
def test_ppo_clip_worked_values_and_dead_zones(ratio, advantage, loss, dead):
    """max(-A r, -A clip(r, .8, 1.2)): gradient 0 in two corners, -A r elsewhere, and the flag says which (PPO,
    1707.06347, eq. 7)."""
    found, slope, clipped = one_token(ratio, advantage, epsilon=0.2, epsilon_high=0.2)
    assert found == pytest.approx(loss)
    assert slope == pytest.approx(0 if dead else -advantage * ratio)
    assert clipped == dead


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_at_the_edge_of_the_band_and_without_advantage_nothing_is_cut_off(loss_type):
    """A ratio of exactly 1 in a band of no width keeps its whole gradient, and is not counted as
    clipped; nor is a ratio beyond the band whose token has no gradient to lose."""
    for advantage in (1, -1):
        _, slope, clipped = one_token(1.0, advantage, epsilon=0.0, loss_type=loss_type)
        assert slope == -advantage and not clipped
    if loss_type == "grpo":
        assert [one_token(ratio, 0)[1:] for ratio in (0.5, 1.5)] == [(0, False)] * 2


def test_the_clip_is_pessimistic():
    """The clipped loss is never below the unclipped one, -ratio A, and equals it inside the band (PPO, section 3)."""
    lp, old = token_logprobs(LOGITS), token_logprobs(table(1))
    losses, ratio, clipped = grpo.policy_loss(lp, old, REWARD, MASK)
    unclipped = -ratio * REWARD[:, None]
    inside = (ratio > 0.8) & (ratio < 1.2)
    assert close(ratio, (lp - old).exp())
    assert (losses >= unclipped).all() and (losses > unclipped).any()
    assert inside.any() and close(losses[inside], unclipped[inside]) and not clipped[inside].any()
    assert (clipped == ((losses != unclipped) & MASK)).all()                         # padding is never counted


def test_the_upper_clip_has_its_own_epsilon():
    """epsilon .2, epsilon_high .28: the band is [.8, 1.28] (clip-higher of DAPO, 2503.14476, section 3.1)."""
    flags = dict(epsilon=0.2, epsilon_high=0.28)
    assert one_token(1.25, +1, **flags) == pytest.approx((-1.25, -1.25, False))
    assert one_token(1.50, +1, **flags) == pytest.approx((-1.28, 0, True))
    assert one_token(0.75, -1, **flags) == pytest.approx((+0.80, 0, True))


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    """-sg(min(r, 1 + epsilon_high)) A log pi (2506.13585, eq. 4): a gradient where PPO has none; small ratios stay."""
    assert one_token(2.0, +1) == pytest.approx((-1.2, 0, True))
    loss, slope, clipped = one_token(2.0, +1, loss_type="cispo")
    assert loss == pytest.approx(-1.2 * (math.log(2) - 1.5)) and slope == pytest.approx(-1.2) and clipped
    loss, slope, clipped = one_token(0.5, -1, loss_type="cispo")
    assert loss == pytest.approx(0.5 * (math.log(0.5) - 1.5)) and slope == pytest.approx(0.5) and not clipped
    assert one_token(2.0, +1, loss_type="cispo", epsilon_high=4)[1:] == pytest.approx((-2, False))


def test_gspo_ratio_is_the_geometric_mean():
    """(prod r_t)^(1/|y|) over the real tokens, the same for each of them (GSPO, 2507.18071, eq. 7); then PPO's clip."""
    old = torch.full((2, 3), -2.0, dtype=torch.float64)
    new = old + torch.tensor([[0.1, 0.3, 9.0], [0.1, 0.2, 0.6]], dtype=torch.float64)    # the 9 is padding
    mask = torch.tensor([[True, True, False], [True, True, True]])
    losses, ratio, clipped = grpo.policy_loss(new, old, torch.tensor([-1.0, 2.0]), mask,
                                              importance_sampling_level="sequence")
    assert close(ratio, [[math.exp(0.2)] * 3, [math.exp(0.3)] * 3])
    assert close(losses, [[math.exp(0.2)] * 3, [-2.4] * 3])
    assert clipped.tolist() == [[False] * 3, [True] * 3]                                 # e^.3 = 1.35 is above 1.2


def test_gspo_of_an_answer_that_is_left_out_is_finite():
    """A row without a token in the loss (a masked truncated answer) has ratio 1 and no 0/0."""
    lp = torch.full((1, 3), -2.0, dtype=torch.float64)
    losses, ratio, clipped = grpo.policy_loss(lp, lp - 1, torch.ones(1), torch.zeros(1, 3).bool(), importance_sampling_level="sequence")
    assert close(ratio, 1) and losses.isfinite().all() and not clipped.any()


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_gspo_gradient_at_the_sampling_policy(loss_type):
    """Where pi = pi_old the sequence ratio's gradient is the mean over tokens of grad log pi: with the token-mean
    aggregation, sum pi A 1/|y| grad log pi (2507.18071, section 4.2)."""
    lp = token_logprobs(LOGITS)
    losses, _, _ = grpo.policy_loss(lp, lp.detach(), REWARD, MASK, loss_type=loss_type,
                                    importance_sampling_level="sequence")
    found = gradient(expected(losses / LENGTHS[:, None], PI), LOGITS)
    closed = gradient((PI.detach() * REWARD / LENGTHS * sequence_logprobs(LOGITS)).sum(), LOGITS)
    assert close(found, -closed)


# -- k3 ---------------------------------------------------------------------------------------------------------------


def test_k3_is_a_nonnegative_unbiased_estimate():
    """On samples of pi, k3 of the sequences' log-probabilities averages to KL(pi || ref) exactly; each value is >= 0,
    and 0 where the two agree (joschu.net/blog/kl-approx.html)."""
    log_pi, log_ref = sequence_logprobs(LOGITS).detach(), sequence_logprobs(table(2)).detach()
    values = grpo.k3(log_pi, log_ref)
    assert (values > 0).all() and close(grpo.k3(log_pi, log_pi), 0)
    assert close((PI * values).sum(), (PI * (log_pi - log_ref)).sum())
    assert grpo.k3(torch.tensor(-2.0), torch.tensor(-1.0)).item() == pytest.approx(math.e - 2)     # e^1 - 1 - 1


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
    assert close(k1, 0) and close(k2, reverse) and close(k3, forward) and not close(forward, reverse, 0.01)
    corrected = grpo.k3(log_pi, log_ref, log_pi.detach())
    assert close(gradient((PI.detach() * corrected).sum(), LOGITS), reverse)
    assert torch.equal(corrected, grpo.k3(log_pi, log_ref))


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl():
    """Differentiated on the policy's samples, summed per token, k3 gives sum_s d(s) grad KL(ref(.|s) || pi(.|s)) with
    the visits d(s) held fixed: the forward KL, not the reverse one that its value estimates (docstring of grpo.k3)."""
    ref = table(2).detach()
    found = gradient(expected(grpo.k3(token_logprobs(LOGITS), token_logprobs(ref)), PI), LOGITS)
    visits = torch.zeros(7, dtype=torch.float64).index_add(0, STATE[MASK], PI.detach()[:, None].expand(15, 3)[MASK])
    logp, logq = LOGITS.log_softmax(-1), ref.log_softmax(-1)
    forward = (visits * (logq.exp() * (logq - logp)).sum(-1)).sum()
    reverse = (visits * (logp.exp() * (logp - logq)).sum(-1)).sum()
    assert close(found, gradient(forward, LOGITS))
    assert not close(found, gradient(reverse, LOGITS), 1e-3)


# -- aggregation ------------------------------------------------------------------------------------------------------


def test_token_weights_worked_example():
    """Answers of 1, 3 and 0 tokens (an answer may be masked out), room for 5: the three aggregations by hand
    (2402.03300, eq. 3; 2503.14476, eq. 8; 2503.20783, section 3.2). Padding weighs 0, and an empty batch is not 0/0."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    hand = {"grpo": [[1 / 3, 0, 0], [1 / 9] * 3, [0] * 3], "dr_grpo": [[1 / 15, 0, 0], [1 / 15] * 3, [0] * 3],
            "dapo": [[1 / 4, 0, 0], [1 / 4] * 3, [0] * 3], "cispo": [[1 / 4, 0, 0], [1 / 4] * 3, [0] * 3]}
    for loss_type, weights in hand.items():
        assert close(grpo.token_weights(mask, loss_type, 5), weights, 1e-7), loss_type
        assert (grpo.token_weights(mask & False, loss_type, 5) == 0).all(), loss_type
        alone = 1 / 5 if loss_type == "dr_grpo" else 1
        assert close(grpo.token_weights(mask[:1], loss_type, 5), [[alone, 0, 0]], 1e-7), loss_type


def test_only_the_length_normaliser_turns_the_gradient():
    """Dividing each answer by its own length changes the direction of the expected gradient; a constant, or one number
    for the batch, changes its size alone: the length bias of 2503.20783, section 3.1."""
    lp = token_logprobs(LOGITS)
    losses, _, _ = grpo.policy_loss(lp, lp.detach(), REWARD, MASK)
    cosine = {}
    for loss_type in ("grpo", "dr_grpo", "dapo"):
        weights = grpo.token_weights(MASK, loss_type, max_completion_length=5).double()
        found = gradient(expected(losses * weights, PI), LOGITS)
        cosine[loss_type] = -torch.cosine_similarity(found.flatten(), GRAD_J.flatten(), dim=0).item()
    assert cosine["dr_grpo"] == pytest.approx(1, abs=1e-9) and cosine["dapo"] == pytest.approx(1, abs=1e-9)
    assert 0.5 < cosine["grpo"] < 0.999


# -- finite differences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_gradients_by_finite_differences(loss_type, level):
    """Autograd equals (f(x + h) - f(x - h)) / 2h, away from the corners of the clip. CISPO's weight is meant to have no
    derivative, so it is checked where it is constant: above the clip."""
    old = token_logprobs(table(3)).detach()
    if loss_type == "cispo":
        shift = 0.3 + 0.1 * torch.arange(3)
    else:
        shift = torch.tensor([-0.1, 0.4, -0.5])                                      # inside, above, below [.8, 1.2]
    lp = (old + shift).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo.policy_loss(x, old, REWARD, MASK, loss_type=loss_type,
                                                               importance_sampling_level=level)[0], lp)


def test_other_gradients_by_finite_differences():
    """The same for the SFT loss, from the logits on, and for k3, with and without the ratio."""
    ref, old = token_logprobs(table(3)).detach(), token_logprobs(table(4)).detach()
    assert torch.autograd.gradcheck(lambda z: sft.token_loss(token_logprobs(z)), LOGITS)
    assert torch.autograd.gradcheck(lambda z: grpo.k3(token_logprobs(z), ref), LOGITS)
    assert torch.autograd.gradcheck(lambda z: grpo.k3(token_logprobs(z), ref, old), LOGITS)


# -- off-policy ratios ------------------------------------------------------------------------------------------------


OLD = table(1)                                                                    # another policy, which sampled
PI_OLD = sequence_logprobs(OLD).exp().detach()


def off_policy_gradient(losses):
    """The gradient that samples of OLD give in expectation."""
    return gradient((losses * MASK * PI_OLD[:, None]).sum(), LOGITS)


def whole_answer_ratio():
    """pi(y) / pi_old(y), detached, (15,)."""
    return (sequence_logprobs(LOGITS).detach() - sequence_logprobs(OLD).detach()).exp()


def test_the_product_of_ratios_is_an_exact_importance_weight():
    """E_old[pi(y)/pi_old(y) A grad log pi] = grad E_pi[A]: CISPO's weights, with no clip and A times what its own token
    ratio lacks of the whole answer's, give the on-policy gradient exactly (Precup et al. 2000)."""
    lp, old = token_logprobs(LOGITS), token_logprobs(OLD).detach()
    rest = whole_answer_ratio()[:, None] / (lp.detach() - old).exp()              # the other tokens' ratios, (15, 3)
    losses = torch.stack([grpo.policy_loss(lp, old, REWARD * rest[:, t], MASK, epsilon_high=1e9, loss_type="cispo")[0][:, t]
                          for t in range(LENGTH)], dim=1)
    assert close(off_policy_gradient(losses), -GRAD_J)


@pytest.mark.parametrize("level", LEVELS)
def test_token_and_gspo_ratios_are_biased_off_policy(level):
    """Ratios of single tokens, and GSPO's geometric mean, leave out that the rest of the answer was sampled by another
    policy: off-policy the expected gradient is not that of J. Here it is off by more than a tenth of its length, and at
    pi_old = pi by nothing (2507.18071, section 4.1; the survey does not say so)."""
    lp = token_logprobs(LOGITS)
    scale = torch.ones(15, 1, dtype=torch.float64) if level == "token" else 1 / LENGTHS[:, None]
    flags = dict(epsilon=1.0, epsilon_high=1e9, importance_sampling_level=level)
    losses, _, _ = grpo.policy_loss(lp, token_logprobs(OLD).detach(), REWARD, MASK, **flags)
    exact = gradient((PI_OLD * whole_answer_ratio() * REWARD * (scale[:, 0] * sequence_logprobs(LOGITS))).sum(), LOGITS)
    error = (off_policy_gradient(losses * scale) + exact).norm() / exact.norm()
    assert error > 0.1
    losses, _, _ = grpo.policy_loss(lp, lp.detach(), REWARD, MASK, **flags)
    on_policy = gradient((PI.detach() * REWARD * (scale[:, 0] * sequence_logprobs(LOGITS))).sum(), LOGITS)
    assert close(gradient(expected(losses * scale, PI), LOGITS), -on_policy)


@pytest.mark.parametrize("sampler", [LOGITS, OLD], ids=["on-policy", "off-policy"])
def test_k3_times_the_ratio_has_the_gradient_of_the_kl(sampler):
    """On samples of pi_old, whichever that is, ratio x k3, summed per token, is on average
    sum_s d_old(s) KL(pi(.|s) || ref(.|s)), with the visits d_old(s) of pi_old held fixed: in value
    and in gradient (2512.02556, eq. 7). k3 alone has neither off-policy, and on-policy the value of
    KL(pi || ref) with the gradient of KL(ref || pi)."""
    lp, ref, old = token_logprobs(LOGITS), table(2).detach(), token_logprobs(sampler).detach()
    samples = sequence_logprobs(sampler).exp().detach()             # (15,), their probabilities
    visits = torch.zeros(7, dtype=torch.float64)
    visits = visits.index_add(0, STATE[MASK], samples[:, None].expand(15, 3)[MASK])
    logp, logq = LOGITS.log_softmax(-1), ref.log_softmax(-1)
    kl = (visits * (logp.exp() * (logp - logq)).sum(-1)).sum()
    forward = (visits * (logq.exp() * (logq - logp)).sum(-1)).sum()
    corrected = expected(grpo.k3(lp, token_logprobs(ref), old), samples)
    alone = expected(grpo.k3(lp, token_logprobs(ref)), samples)
    assert close(corrected, kl) and close(gradient(corrected, LOGITS), gradient(kl, LOGITS))
    assert not close(gradient(alone, LOGITS), gradient(kl, LOGITS), 0.01)
    on_policy = sampler is LOGITS
    assert close(alone, kl) == on_policy
    assert close(gradient(alone, LOGITS), gradient(forward, LOGITS)) == on_policy


# -- self-training and judging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3])
def test_best_of_n(n):
    """The best of n samples has the law F(r)^n - F(r-)^n, and its KL to the policy is at most log n - (n - 1)/n
    (2401.01879, theorem 1): enumerated over all 15^n groups, chosen by sft.kept."""
    groups = torch.tensor(list(itertools.product(range(15), repeat=n)))           # (15^n, n)
    chosen = (groups * sft.kept(REWARD[groups], keep="best").long()).sum(1)       # (15^n,)
    law = torch.zeros(15, dtype=torch.float64).index_add(0, chosen, PI.detach()[groups].prod(1))
    order = REWARD.argsort()
    cdf = PI.detach()[order].cumsum(0)
    assert close(law[order], cdf ** n - (cdf - PI.detach()[order]) ** n)
    kl = (law * (law / PI.detach()).log()).sum()
    assert 0.1 < kl <= math.log(n) - (n - 1) / n


def test_pass_at_k_is_unbiased():
    """E over c ~ Binomial(n, p) of 1 - C(n-c, k)/C(n, k) is 1 - (1 - p)^k exactly (2107.03374, eq. 1)."""
    n, p = 6, 0.3
    for k in range(1, n + 1):
        mean = sum(math.comb(n, c) * p ** c * (1 - p) ** (n - c) * report.pass_at_k(torch.tensor([[1.0] * c + [0.0] * (n - c)]), k)
                   for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


# -- entropy ----------------------------------------------------------------------------------------------------------


def test_entropy_falls_by_the_covariance_of_log_probability_and_advantage():
    """One natural-gradient step, dz = eta A, at a single state changes the entropy by -eta Cov(log pi, A) to first order
    (2505.22617, survey section 3.2): a policy gradient that favours what is likely already is what makes it collapse."""
    z, advantage = LOGITS[0].detach().requires_grad_(), torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    lp, eta = z.log_softmax(-1), 1e-6                                              # three answers of one token each
    losses, _, _ = grpo.policy_loss(lp[:, None], lp[:, None].detach(), advantage, torch.ones(3, 1).bool())
    natural = -gradient((losses[:, 0] * lp.exp().detach()).sum(), z) / lp.exp().detach()   # the Fisher matrix undone

    def entropy(logits):
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    slope = (entropy(z + eta * natural) - entropy(z - eta * natural)) / (2 * eta)
    pi = lp.exp()
    covariance = (pi * lp * advantage).sum() - (pi * lp).sum() * (pi * advantage).sum()
    assert slope.item() == pytest.approx(-covariance.item(), abs=1e-8) and abs(covariance) > 0.01
