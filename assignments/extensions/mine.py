"""
Three published one-liners that this project does not implement. Each docstring has the formula, its
source and a few cells to check by hand; the code is yours. torch is imported; helpers go inside the
functions.
"""

import torch  # noqa: F401


def entropy_weights(all_logprobs, completion_mask):
    """The weight of each token in a supervised loss: how unsure the model is, from 0 to 1.

        weight = H(pi(. | prefix)) / log V,   H(p) = - sum_v p(v) log p(v)   on real tokens, else 0

    all_logprobs (B, T, V) with V >= 2, completion_mask (B, T), bool or numbers -> (B, T), detached,
    in the precision of all_logprobs.

    The demonstrated token does not enter. DFT's weight is small where the model disbelieves it,
    this one is small where the model is sure, of whatever. A logit may be -inf: a probability of 0
    adds nothing. On padding stand any numbers. (EAFT, 2601.02151, eq. 2 and 3; there the entropy of
    the 20 likeliest tokens, divided by log 20)

    Worked example, V = 4: probabilities .25 .25 .25 .25 give 1, .5 .5 0 0 give .5, 1 0 0 0 give 0.
    """
    raise NotImplementedError("mine.entropy_weights: yours to write")


def divergence_loss(logprobs, old_logprobs, advantages, completion_mask, delta=0.2):
    """PPO's loss with a mask by the difference of probabilities in place of a clip of their ratio.

        loss = - M r A,   r = pi / pi_old
        M = 0   where |pi - pi_old| > delta and the token has moved the way A wants it: A > 0 with
                r > 1, or A < 0 with r < 1
        M = 1   elsewhere

    logprobs, old_logprobs, completion_mask (B, T), advantages (B,) -> losses (B, T), and whether
    the mask dropped the token, (B, T), bool, False on padding. M has no gradient; r has one. What
    the loss is on padding does not matter, but it has to be finite there for finite log-probs.

    pi and pi_old are the probabilities of the sampled token. Their difference is the total
    variation between two distributions that know only this token and the rest. (DPPO, 2602.04879,
    eq. 11 to 13)

    Worked example, delta .2, A = +1: from .001 to .01 the ratio is 10, and the loss is -10 with a
    gradient; from .5 to .8 it is 0 without one; from .8 to .5 it is -.625 with one.
    """
    raise NotImplementedError("mine.divergence_loss: yours to write")


def overlong_rewards(completion_mask, max_length, cache):
    """What is added to an answer's reward so that it ends in time: n tokens, the most L, the last C
    of them dearer and dearer.

        0                   n <= L - C
        (L - C - n) / C     L - C < n <= L
        -1                  L < n

    completion_mask (B, T), bool or numbers; max_length L and cache C are integers, 0 < C <= L ->
    (B,), in the default precision. T may be larger or smaller than L; a row may have no token.
    (DAPO, 2503.14476, eq. 13)

    Worked example, L = 10, C = 4: 3 and 6 tokens give 0, 7 give -.25, 10 give -1, 12 give -1.
    """
    raise NotImplementedError("mine.overlong_rewards: yours to write")
