"""
Clip-Cov and KL-Cov (2505.22617; survey 2603.13985, section 3.2): which tokens make the entropy
fall, what leaving them out does, and what their KL to the policy that sampled is.
"""

import itertools

import pytest
import torch

from grpo import GRPOConfig, k3, policy_loss, restrain, restrained_tokens, token_covariances
from world import (LOGITS, MASK, close, expected, gradient, sequence_logprobs, table,
                   token_logprobs, visits)

# One state with three tokens of probability .5, .3, .2, sampled just so often: ten answers of one
# token, whose advantages add up to 0.
Z = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
DRAWN = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
A = torch.tensor([2.0, 1.0, -1.5, 0.5, -1.0, 1.5, -0.5, -1.0, 0.7, -1.7], dtype=torch.float64)
ONE = torch.ones(10, 1, dtype=torch.bool)


def config_of(covariance, **settings):
    return GRPOConfig(covariance=covariance, num_iterations=2, **settings)


def drawn_logprobs(logits=Z):
    return logits.log_softmax(-1)[DRAWN][:, None]                                 # (10, 1)


def choose(logprobs, advantages, mask, covariance, uniforms=None, **settings):
    batch = {"advantages": advantages, "completion_mask": mask, "uniforms": uniforms}
    return restrained_tokens(logprobs, batch, config_of(covariance, **settings))


def entropy_slope(restrained, h=1e-6):
    """The derivative of the entropy along the natural gradient (the Fisher matrix undone) of the
    ten answers' mean loss, the restrained ones left out."""
    lp = drawn_logprobs()
    losses, _, _ = policy_loss(lp, lp.detach(), A, ONE)
    losses = restrain(losses, lp, lp.detach(), restrained, config_of("clip"))
    step = -gradient(losses.mean(), Z) / Z.softmax(-1)

    def entropy(z):
        return -(z.softmax(-1) * z.log_softmax(-1)).sum()
    return ((entropy(Z + h * step) - entropy(Z - h * step)) / (2 * h)).item()


# -- the entropy ----------------------------------------------------------------------------------


def test_the_mean_of_the_covariances_is_the_fall_of_the_entropy():
    """dH = -eta mean_t cov_t to first order, and what an answer that is left out would have added
    is its own covariance over N: token by token, not only in the mean."""
    covariances = token_covariances(drawn_logprobs().detach(), A, ONE)[:, 0]
    assert close(A.mean(), 0) and (covariances > 0).any() and (covariances < 0).any()
    whole = entropy_slope(~ONE)
    assert close(whole, -covariances.mean(), 1e-8)
    for i in range(10):
        without = torch.arange(10)[:, None] == i
        assert close(entropy_slope(without) - whole, covariances[i] / 10, 1e-8)


def test_the_tokens_with_the_largest_covariance_lower_the_entropy_most():
    """Of all 45 pairs of answers, leaving out the two that are chosen keeps the entropy highest."""
    chosen = choose(drawn_logprobs().detach(), A, ONE, "kl", cov_share=0.2)
    assert chosen.sum() == 2
    slopes = {pair: entropy_slope(torch.isin(torch.arange(10), torch.tensor(pair))[:, None])
              for pair in itertools.combinations(range(10), 2)}
    best = max(slopes, key=slopes.get)
    assert set(best) == set(chosen[:, 0].nonzero().flatten().tolist())
    assert slopes[best] > entropy_slope(~ONE) + 0.05


# -- which tokens ---------------------------------------------------------------------------------


def test_covariances_worked_example():
    """The example of token_covariances: .8 and .2, praised and blamed, and the other way round. A
    third column is padding: whatever stands there, it is 0 and in no mean."""
    lp = torch.tensor([[0.8, 0.01], [0.2, 0.99]], dtype=torch.float64).log()
    mask = torch.tensor([[True, False], [True, False]])
    for advantages, size in (([1.0, -1.0], 0.6931), ([-1.0, 1.0], -0.6931), ([5.0, 5.0], 0.0)):
        found = token_covariances(lp, torch.tensor(advantages).double(), mask)
        assert close(found, [[size, 0], [size, 0]], 1e-4)


# Covariances of seven tokens: log-probabilities around their mean, -1, times an advantage of 1; the
# second row is its mirror image, so that the mean of the advantages is 0.
DEVIATIONS = torch.tensor([[-3.0, -2.0, 1.0, 4.0, 0.0], [3.0, 2.0, -1.0, -4.0, 0.0]])
SEVEN = torch.tensor([[True] * 4 + [False]] * 2)
SIGNS = torch.tensor([1.0, -1.0])


def test_kl_takes_the_largest_and_none_below_zero():
    """Covariances -3 -2 1 4, twice. A quarter of the 8 tokens are the two 4s; the 4s are equal, so
    that an eighth, one token, are both of them; all are four at most, since the others are below
    0."""
    def found(share):
        return choose(DEVIATIONS - 1, SIGNS, SEVEN, "kl", cov_share=share).int().tolist()
    assert found(0.25) == found(0.125) == [[0, 0, 0, 1, 0]] * 2
    assert found(0.5) == found(1.0) == [[0, 0, 1, 1, 0]] * 2
    assert found(1e-9) == [[0, 0, 0, 1, 0]] * 2                       # at least one


def test_clip_draws_within_the_band():
    """Between 0.5 and 4.5 lie 1 and 4, twice. Of these the largest random numbers are taken; those
    of other tokens and of padding, larger still, do not matter. Between 1.5 and 3.5 lies none."""
    uniforms = torch.tensor([[0.9, 0.9, 0.1, 0.4, 0.99], [0.9, 0.9, 0.8, 0.3, 0.99]])

    def found(share, low=0.5, high=4.5):
        return choose(DEVIATIONS - 1, SIGNS, SEVEN, "clip", uniforms, cov_share=share, cov_low=low,
                      cov_high=high).int().tolist()
    assert found(0.01) == [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert found(0.25) == [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert found(1.0) == [[0, 0, 1, 1, 0]] * 2
    assert found(1.0, high=3.9) == [[0, 0, 1, 0, 0]] * 2
    assert found(1.0, 1.5, 3.5) == [[0] * 5] * 2


def test_every_token_of_the_band_is_drawn_equally_often():
    """One of the four candidates in 4,000 draws: each about a quarter of the time."""
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(2, 5)
    for _ in range(4000):
        uniforms = torch.rand(2, 5, generator=generator)
        counts += choose(DEVIATIONS - 1, SIGNS, SEVEN, "clip", uniforms, cov_share=0.01,
                         cov_low=0.5)
    assert counts.sum() == 4000 and counts[SEVEN & (DEVIATIONS * SIGNS[:, None] < 0)].sum() == 0
    assert (counts[counts > 0] - 1000).abs().max() < 120              # four standard deviations


@pytest.mark.parametrize("covariance", ["clip", "kl"])
def test_padding_changes_nothing(covariance):
    """On the world of 15 sequences, whose padding holds other tokens' log-probabilities: with three
    more columns of nonsense the same tokens are chosen, and none of the padding."""
    lp, uniforms = token_logprobs(LOGITS).detach(), torch.rand(15, 3)
    advantages = sequence_logprobs(table(5)).detach()
    settings = dict(cov_share=0.2, cov_low=0.1)
    whole = choose(lp, advantages, MASK, covariance, uniforms, **settings)

    def widen(x, value):
        return torch.nn.functional.pad(x, (0, 3), value=value)
    wide = choose(widen(lp, -90.0), advantages, widen(MASK, False), covariance,
                  widen(uniforms, 2.0), **settings)
    assert torch.equal(wide, widen(whole, False)) and 3 <= whole.sum() < MASK.sum() / 2
    assert not (whole & ~MASK).any()


@pytest.mark.parametrize("covariance", ["clip", "kl"])
def test_where_nothing_varies_nothing_is_chosen(covariance):
    """Equal advantages, an empty mask: no token, and no error."""
    lp, uniforms = token_logprobs(LOGITS).detach(), torch.rand(15, 3)
    for advantages, mask in ((torch.ones(15), MASK), (torch.arange(15.0), torch.zeros_like(MASK))):
        assert not choose(lp, advantages, mask, covariance, uniforms, cov_share=1.0).any()


# -- what becomes of them -------------------------------------------------------------------------


def test_the_penalty_is_the_kl_to_the_policy_that_sampled():
    """On answers of pi_old it has, in expectation, the value and the gradient of KL(pi_old || pi),
    state by state; at pi = pi_old both are 0, so that a batch's first update knows nothing of
    it."""
    old, config = table(4).detach(), config_of("kl", cov_kl_coef=0.7)
    written = sequence_logprobs(old).exp()
    for logits, same in ((LOGITS, False), (old.clone().requires_grad_(), True)):
        lp, old_lp = token_logprobs(logits), token_logprobs(old)
        found = expected(restrain(torch.zeros_like(lp), lp, old_lp, MASK, config), written)
        kl = (old.softmax(-1) * (old.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
        exact = 0.7 * (visits(written)[:, 0] * kl).sum()
        assert close(found, exact) and close(gradient(found, logits), gradient(exact, logits))
        assert close(found, 0) == same and close(gradient(found, logits), 0) == same


def test_only_the_chosen_tokens_are_restrained():
    """clip: their loss is 0 and has no gradient. kl: theirs alone has the penalty. The others'
    losses are what they were, bit for bit."""
    lp, old = token_logprobs(LOGITS), token_logprobs(table(4)).detach()
    losses, _, _ = policy_loss(lp, old, torch.arange(15.0).double(), MASK)
    chosen = MASK & (torch.arange(45).view(15, 3) % 4 == 0)
    clip = restrain(losses, lp, old, chosen, config_of("clip"))
    kl = restrain(losses, lp, old, chosen, config_of("kl", cov_kl_coef=2.0))
    for found in (clip, kl):
        assert torch.equal(found[~chosen], losses[~chosen])
    assert (clip[chosen] == 0).all()
    assert close(kl[chosen], (losses + 2 * k3(old, lp))[chosen])
    direct = gradient(losses[MASK & ~chosen].sum(), LOGITS)
    assert close(gradient(clip[MASK].sum(), LOGITS), direct)
