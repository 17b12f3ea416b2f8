"""
The properties of three one-liners whose code stands nowhere in the project: values beside plain
loops over scalars, limits, invariances, and gradients from finite differences, all at the salt.
"""

import math

import pytest
import torch
from draws import SHAPES, mask, normal, rng

import mine
from world import close, gradient

NEAR = 1e-6   # whoever takes log V in float32 is right as well

# -- what is expected, of one token or one answer -------------------------------------------------


def weight(probabilities):
    """Of a token whose distribution is this list."""
    entropy = sum(-p * math.log(p) for p in probabilities if p > 0)
    return entropy / math.log(len(probabilities))


def is_dropped(p, old, A, delta):
    """Whether a token of probability p, formerly old, has lost its gradient."""
    away = A * (p - old) > 0
    return away and abs(p - old) > delta


def loss(p, old, A, delta):
    """Of that token."""
    return 0.0 if is_dropped(p, old, A, delta) else -A * p / old


def reward(n, L, C):
    """Of an answer with n tokens."""
    return -min(max(n - (L - C), 0), C) / C


# -- entropy_weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("B, T", SHAPES)
@pytest.mark.parametrize("V", [2, 7])
def test_entropy_weights_elsewhere(B, T, V):
    """Each real token's entropy over log V."""
    z, (real, _) = 2 * normal(f"z {V}", B, T, V), mask("mask", B, T)
    found = mine.entropy_weights(z.log_softmax(-1), real)
    hand = [[weight(z[b, t].softmax(-1).tolist()) if real[b, t] else 0 for t in range(T)]
            for b in range(B)]
    assert found.shape == (B, T) and close(found, hand, NEAR)


def test_entropy_weights_have_ends():
    """1 for equal chances whatever the vocabulary, 0 for certainty, log k / log V for k equal
    chances of V; tokens that cannot come add nothing and make no nan."""
    real = torch.ones(1, 1)
    for V in (2, 3, rng("V").randint(4, 60)):
        for k in sorted({1, rng(f"k {V}").randint(1, V), V}):
            p = torch.zeros(V, dtype=torch.float64)
            p[torch.randperm(V, generator=torch.Generator().manual_seed(k))[:k]] = 1 / k
            found = mine.entropy_weights(p.log()[None, None], real)
            assert close(found, [[math.log(k) / math.log(V)]], NEAR), (k, V)


def test_entropy_weights_of_two_choices_at_once():
    """The entropies of independent choices add up, each in its own unit; no order of the vocabulary
    matters, and a twin of every token keeps the entropy's excess."""
    p, q = (normal(name, 1, 1, V).softmax(-1) for name, V in (("p", 3), ("q", 5)))
    real, alone = torch.ones(1, 1), {}
    for name, x in (("p", p), ("q", q), ("both", (p[..., :, None] * q[..., None, :]).flatten(2)),
                    ("back", p.flip(-1)), ("twins", torch.cat([p, p], -1) / 2)):
        alone[name] = mine.entropy_weights(x.log(), real).item()
    assert close(alone["both"] * math.log(15),
                 alone["p"] * math.log(3) + alone["q"] * math.log(5), NEAR)
    assert close(alone["back"], alone["p"], NEAR)
    assert close(alone["twins"] * math.log(6), alone["p"] * math.log(3) + math.log(2),
                 NEAR)


@pytest.mark.parametrize("B, T", SHAPES)
def test_entropy_weights_are_constants(B, T):
    """Without a gradient: the loss that they weigh has weight times that of the log-probability, as
    finite differences with held weights say."""
    z, (real, _) = normal("z", B, T, 4).requires_grad_(), mask("mask", B, T)
    everything = z.log_softmax(-1)
    found = mine.entropy_weights(everything, real)
    assert not found.requires_grad
    slopes, h = gradient(-(found * everything[..., 0]).sum(), z), 1e-6
    for v in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[v] = h
        up, down = ((z.detach() + sign * step).log_softmax(-1)[..., 0] for sign in (1, -1))
        assert close(slopes[..., v], -found * (up - down) / (2 * h), 1e-7)


def test_entropy_weights_keep_precision_and_ignore_padding():
    """What stands on padding changes nothing; a mask may be numbers; float32 stays float32."""
    z, (real, _) = normal("z", 4, 5, 3), mask("mask", 4, 5)
    other = torch.where(real[..., None], z, 9 * normal("other", 4, 5, 3))
    found = mine.entropy_weights(z.log_softmax(-1), real)
    for given in (real, real.double(), real.long()):
        again = mine.entropy_weights(other.log_softmax(-1), given)
        assert close(again, found) and again.dtype == torch.float64
        assert close(again * ~real, torch.zeros(4, 5))
    single = mine.entropy_weights(z.float().log_softmax(-1), real)
    assert single.dtype == torch.float32 and close(single, found, 1e-5)


# -- divergence_loss ------------------------------------------------------------------------------


def moves(B, T, name=""):
    """pi_old between .02 and .98, pi elsewhere, as log-probabilities; advantages of both signs and
    delta, none of them within 1e-3 of where the mask turns."""
    draw = rng(f"moves {name} {B} {T}")
    delta, A = draw.uniform(0.05, 0.3), [draw.choice([-1, 1]) * draw.uniform(0.2, 2)
                                         for _ in range(B)]
    p, old = ([[0.0] * T for _ in range(B)] for _ in range(2))
    for b in range(B):
        for t in range(T):
            near = True
            while near:
                p[b][t], old[b][t] = draw.uniform(0.02, 0.98), draw.uniform(0.02, 0.98)
                moved = abs(p[b][t] - old[b][t])
                near = moved < 1e-3 or abs(moved - delta) < 1e-3
    logprobs, old = (torch.tensor(x, dtype=torch.float64).log() for x in (p, old))
    return logprobs.requires_grad_(), old, torch.tensor(A, dtype=torch.float64), delta


def by_hand(of, logprobs, old, A, delta):
    """of(p, old, A, delta) of every token, (B, T)."""
    rows = zip(logprobs.exp().tolist(), old.exp().tolist(), A.tolist())
    return torch.tensor([[of(p, q, a, delta) for p, q in zip(ps, qs)] for ps, qs, a in rows],
                        dtype=torch.float64)


MOVES = [*SHAPES, (5, 5), (20, 20)]   # squares: an advantage belongs to its row


@pytest.mark.parametrize("B, T", MOVES)
def test_divergence_losses_elsewhere(B, T):
    """-r A, or 0 where the token is dropped."""
    logprobs, old, A, delta = moves(B, T)
    losses, _ = mine.divergence_loss(logprobs, old, A, torch.ones(B, T).bool(), delta)
    assert losses.shape == (B, T)
    hand = by_hand(loss, logprobs.detach(), old, A, delta)
    assert close(losses, hand, 1e-7)


@pytest.mark.parametrize("B, T", MOVES)
def test_divergence_gradients_elsewhere(B, T):
    """Each token's slope is that of its own loss by finite differences, and 0 where it is dropped;
    delta has no part in it otherwise."""
    logprobs, old, A, delta = moves(B, T)
    losses, _ = mine.divergence_loss(logprobs, old, A, torch.ones(B, T).bool(), delta)
    h = 1e-6
    up, down = (by_hand(loss, logprobs.detach() + sign * h, old, A, delta)
                for sign in (1, -1))
    found = gradient(losses.sum(), logprobs)
    assert close(found, (up - down) / (2 * h), 1e-5)
    gone = by_hand(is_dropped, logprobs.detach(), old, A, delta).bool()
    assert close(found[gone], 0 * found[gone], 0)
    assert close((found / losses.detach())[~gone], torch.ones(int((~gone).sum())), 1e-6)


def test_divergence_is_no_ratio():
    """Where probabilities are small any ratio passes; where they are large a ratio near 1 does not:
    both signs, a delta that is drawn."""
    delta = rng("delta").uniform(0.1, 0.3)
    small = rng("small").uniform(0.01, 0.09) * delta
    pairs = [(10 * small, small, 1), (small, 10 * small, -1),        # ratios 10 and .1
             (0.95, 0.94 - delta, 1), (0.94 - delta, 0.95, -1)]      # ratios nearer to 1
    p, old, A = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs))
    logprobs = p.log()[:, None].requires_grad_()
    losses, dropped = mine.divergence_loss(logprobs, old.log()[:, None], A,
                                           torch.ones(4, 1).bool(), delta)
    assert dropped.flatten().tolist() == [False, False, True, True]
    assert close(losses.flatten(), [-10, 0.1, 0, 0], 1e-7)
    assert close(gradient(losses.sum(), logprobs).flatten(), [-10, 0.1, 0, 0], 1e-7)


def test_divergence_lets_tokens_come_back():
    """A token that has moved against its advantage keeps its gradient, however far; at pi_old
    nothing is dropped, and the gradient is that of the policy gradient."""
    delta, far = rng("delta").uniform(0.05, 0.2), rng("far").uniform(0.8, 0.98)
    p, old = torch.tensor([[0.01, 0.3], [far, 0.3]]), torch.tensor([[far, 0.3], [0.01, 0.3]])
    A = torch.tensor([1.0, -1.0]).double() * rng("A").uniform(0.5, 2)
    logprobs = p.double().log().requires_grad_()
    losses, dropped = mine.divergence_loss(logprobs, old.double().log(), A,
                                           torch.ones(2, 2).bool(), delta)
    assert not dropped.any()
    slopes = gradient(losses.sum(), logprobs)
    assert close(slopes, -A[:, None] * p.double() / old.double(), 1e-6)
    assert close(slopes[:, 1], -A)


@pytest.mark.parametrize("B, T", [(4, 6), (20, 20)])
def test_divergence_tells_what_it_dropped(B, T):
    """The flag, token by token, as bool; never on padding, and an advantage of 0 drops nothing."""
    logprobs, old, A, delta = moves(B, T, "flags")
    real, _ = mask("mask", B, T)
    A[0] = 0
    losses, dropped = mine.divergence_loss(logprobs, old, A, real, delta)
    hand = by_hand(is_dropped, logprobs.detach(), old, A, delta).bool() & real
    assert dropped.dtype == torch.bool and torch.equal(dropped, hand)
    assert (hand.any() or B < 20) and losses.isfinite().all()


# -- overlong_rewards -----------------------------------------------------------------------------


def lengths_mask(lengths, T):
    return torch.tensor([[t < n for t in range(T)] for n in lengths]).reshape(len(lengths), T)


def test_overlong_rewards_elsewhere():
    """Every length from none to beyond the longest, for limits that are drawn."""
    for i in range(4):
        draw = rng(f"limits {i}")
        L = draw.randint(5, 20)
        C = draw.randint(2, L)
        lengths = list(range(L + 6))
        draw.shuffle(lengths)
        found = mine.overlong_rewards(lengths_mask(lengths, L + 5), L, C)
        assert close(found, [reward(n, L, C) for n in lengths], 1e-6), (L, C)


def test_overlong_rewards_have_ends():
    """Nothing for an empty answer and at L - C, the first share one token later, all but one share
    just below L, and never below -1; with C = L even the first token costs, with C = 1 the last
    alone."""
    L = rng("L").randint(8, 16)
    for C in (1, rng("C").randint(2, L - 1), L):
        lengths = [0, L - C, L - C + 1, L - 1, L, L + 1, L + 40]
        found = mine.overlong_rewards(lengths_mask(lengths, L + 40), L, C).tolist()
        assert found == pytest.approx([0, 0, -1 / C, 1 / C - 1, -1, -1, -1], abs=1e-6), (L, C)


def test_overlong_rewards_count_real_tokens():
    """Those of the mask, not the width of the batch; a mask may be numbers; a row may be empty."""
    L, C = 6, 4
    lengths = [0, *(rng(f"n {i}").randint(1, 8) for i in range(6))]
    narrow = lengths_mask(lengths, 8)
    for given in (narrow, narrow.float(), narrow.long(), lengths_mask(lengths, 30)):
        found = mine.overlong_rewards(given, L, C)
        assert found.shape == (7,) and found.dtype == torch.get_default_dtype()
        assert close(found, [reward(n, L, C) for n in lengths], 1e-6)
    assert close(mine.overlong_rewards(lengths_mask([2, 3], 3), L, C), [0, -0.25], 1e-6)
