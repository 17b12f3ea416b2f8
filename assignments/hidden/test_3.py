"""Hidden variants of assignment 3: other numbers, other shapes, plain loops beside them."""

import math

import pytest
import torch
from draws import SHAPES, logprobs, mask, normal, rng

from dft import anchor_loss, gem_loss, imitation_weights, psft_loss
from world import close, gradient


@pytest.mark.parametrize("B, T", SHAPES)
def test_weights_elsewhere(B, T):
    """Each loss type's weight, token by token, without a gradient and whatever is on padding."""
    lp, ref = logprobs("lp", B, T), logprobs("ref", B, T).detach()
    real, lengths = mask("mask", B, T)
    alpha, temperature = rng("alpha").uniform(0.1, 2), rng("temperature").uniform(0.2, 1)
    largest = rng("largest").uniform(0.5, 3)

    def total(of, b):
        return sum(of[b][t] for t in range(lengths[b]))
    P, R = lp.tolist(), ref.tolist()
    by_hand = {
        "dft": lambda b, t: math.exp(P[b][t]), "asft": lambda b, t: math.exp(P[b][t]),
        "dft_sequence": lambda b, t: math.exp(total(P, b)),
        "power": lambda b, t: math.exp(P[b][t]) ** alpha,
        "chord": lambda b, t: math.exp(P[b][t]) * (1 - math.exp(P[b][t])),
        "prift": lambda b, t: math.exp(R[b][t]),
        "iw_sft": lambda b, t: min(math.exp(temperature * (total(P, b) - total(R, b))), largest)}
    for loss_type, weight in by_hand.items():
        found = imitation_weights(lp, real, loss_type, alpha, ref, temperature, largest)
        assert found.shape == (B, T) and not found.requires_grad, loss_type
        hand = [[weight(b, t) if t < lengths[b] else 0 for t in range(T)] for b in range(B)]
        assert close(found * real, hand, 1e-12), loss_type
    assert imitation_weights(lp.detach().float(), real).dtype == torch.float32


@pytest.mark.parametrize("B, T", SHAPES)
def test_psft_elsewhere(B, T):
    """-min(ratio, 1 + epsilon_high), with a gradient where the ratio is smaller."""
    old, moved = logprobs("old", B, T).detach(), 0.5 * normal("moved", B, T)
    lp, top = (old + moved).requires_grad_(), rng("top").uniform(0.05, 0.5)
    ratio = moved.exp()
    found = psft_loss(lp, old, top)
    assert close(found, [[-min(r, 1 + top) for r in row] for row in ratio.tolist()], 1e-12)
    assert close(gradient(found.sum(), lp), -ratio * (ratio < 1 + top))


@pytest.mark.parametrize("B, T", SHAPES)
def test_anchor_elsewhere(B, T):
    """KL(pi_ref || pi) summed over the vocabulary, and its gradient pi - pi_ref on the logits."""
    z, ref = normal("z", B, T, 4).requires_grad_(), normal("ref", B, T, 4)
    found = anchor_loss(z.log_softmax(-1), ref.log_softmax(-1))
    p, q = z.softmax(-1).tolist(), ref.softmax(-1).tolist()
    assert close(found, [[sum(b * math.log(b / a) for a, b in zip(p[i][t], q[i][t]))
                          for t in range(T)] for i in range(B)])
    assert close(gradient(found.sum(), z), z.softmax(-1) - ref.softmax(-1))


@pytest.mark.parametrize("B, T", SHAPES)
def test_gem_elsewhere(B, T):
    """sum_v q(v) (log pi(v) - log pi(y)), q sharper than pi and held fixed."""
    z, temperature = normal("z", B, T, 5).requires_grad_(), rng("temperature").uniform(0.4, 1)
    ids = torch.tensor([[rng(f"{i} {t}").randrange(5) for t in range(T)] for i in range(B)])
    everything = z.log_softmax(-1)
    lp = everything.gather(-1, ids[..., None])[..., 0]
    found = gem_loss(everything, lp, temperature)
    q = (z.detach() / temperature).softmax(-1)
    hand = [[sum(q[i, t, v].item() * (everything[i, t, v] - lp[i, t]).item() for v in range(5))
             for t in range(T)] for i in range(B)]
    assert close(found, hand)
    assert close(gradient(found.sum(), z), q - torch.nn.functional.one_hot(ids, 5))
