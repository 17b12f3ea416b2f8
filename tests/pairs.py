"""
The pairs of the world of 15 sequences: the project's own losses get all 15 x 15 of them as one
batch, each weighted by its probability. Nothing is sampled.
"""

import math

import torch

from dpo import preference_loss
from world import (LENGTHS, LOGITS, PREFIXES, REWARD, SEQUENCES, gradient, sequence_logprobs,
                   table)

PAIR_LOSSES = ["sigmoid", "robust", "hinge", "ipo", "cpo", "simpo", "orpo"]
BETA = 0.7
REF = sequence_logprobs(table(2)).detach()          # log pi_ref of the 15 sequences
MU = sequence_logprobs(table(4)).exp().detach()     # the policy that drew the answers: any will do
FIRST, SECOND = torch.cartesian_prod(torch.arange(15), torch.arange(15)).T   # (225,) each
BRADLEY_TERRY = (REWARD[:, None] - REWARD).sigmoid()   # (15, 15) chance that i beats j
# Preferences that no reward explains: rock, paper, scissors.
CYCLIC = torch.randn(15, 15, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
CYCLIC = (CYCLIC - CYCLIC.T).sigmoid()


def pair_losses(logps, ref=REF, **settings):
    """The project's loss of every pair with i chosen and j rejected, from log pi of the 15
    sequences: (225,)"""
    return preference_loss(logps[FIRST], logps[SECOND], ref[FIRST], ref[SECOND], LENGTHS[FIRST],
                           LENGTHS[SECOND], **settings)


def population_loss(logps, preferred=BRADLEY_TERRY, mu=MU, ref=REF, **settings):
    """Its expectation where both answers come from mu and i beats j with probability
    preferred[i, j]. Of two draws either may win, hence the 2: the weights add up to 1."""
    weights = 2 * mu[FIRST] * mu[SECOND] * preferred[FIRST, SECOND]
    return (pair_losses(logps, ref, **settings) * weights).sum()


def tilted(ref, reward, beta):
    """log pi* = log of pi_ref exp(reward / beta) / Z."""
    return (ref + reward / beta).log_softmax(0)


def policy_with(logps):
    """Logits (7, 3) of the policy that gives the 15 sequences these log-probabilities, by the chain
    rule."""
    mass = {}
    for sequence, p in zip(SEQUENCES, logps.exp().tolist()):
        for t in range(1, len(sequence) + 1):
            mass[sequence[:t]] = mass.get(sequence[:t], 0) + p
    logits = [[math.log(mass[prefix + (token,)]) for token in range(3)] for prefix in PREFIXES]
    return torch.tensor(logits, dtype=torch.float64, requires_grad=True)


def newton(loss, x, steps=12):
    """The minimiser of a convex loss, by Newton's method from x on. Along the constants, where it
    may be flat, x stays as it is."""
    for _ in range(steps):
        curvature = torch.autograd.functional.hessian(loss, x)
        slope = torch.autograd.functional.jacobian(loss, x)
        x = x - torch.linalg.pinv(curvature, rtol=1e-10) @ slope
    return x


def minimise(loss, start=REF):
    """log pi (15,) of the policy at which loss(log pi) is least."""
    return newton(lambda logits: loss(logits.log_softmax(0)), start.clone()).log_softmax(0)


def scores():
    """grad log pi(y) of the 15 sequences, (15, 7, 3): what the closed forms are made of."""
    return torch.stack([gradient(lp, LOGITS) for lp in sequence_logprobs(LOGITS)])
