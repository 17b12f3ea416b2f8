"""
A world small enough to write down, in float64: what the identities are computed in.

Vocabulary {0, 1, END}; a sequence ends at END or after three tokens: 15 sequences, 7 prefixes. The
policy is a (7, 3) table of logits. Every expectation is then a finite sum, so the tests compare
exact numbers and nothing is sampled: the project's own functions get all 15 sequences as one batch,
weighted by their probabilities, and autograd differentiates the closed form.
"""

import itertools
from types import SimpleNamespace

import torch

import grpo
from model import GPT

END, LENGTH = 2, 3


def sequences(prefix=()):
    if prefix and (prefix[-1] == END or len(prefix) == LENGTH):
        return [prefix]
    return [s for token in range(3) for s in sequences(prefix + (token,))]


SEQUENCES = sequences()                                   # 15 tuples of 1 to 3 tokens
PREFIXES = sorted({s[:t] for s in SEQUENCES for t in range(len(s))},
                  key=lambda p: (len(p), p))              # 7 tuples
MASK = torch.tensor([[t < len(s) for t in range(LENGTH)] for s in SEQUENCES])     # (15, 3)
# On padding stand the log-probabilities of some other token, as a model's would: meaningless, but
# not zero.
STATE = torch.tensor([[PREFIXES.index(s[:t]) if t < len(s) else 0 for t in range(LENGTH)]
                      for s in SEQUENCES])                                        # (15, 3)
TOKEN = torch.tensor([[s[t] if t < len(s) else 1 for t in range(LENGTH)]
                      for s in SEQUENCES])                                        # (15, 3)
LENGTHS = MASK.sum(1).double()                                                    # (15,)


def table(seed):
    """The logits of a policy, (7, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 3, generator=generator, dtype=torch.float64).requires_grad_()


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


def groups_of(K):
    """All 15^K groups of K sequences, (15^K, K)."""
    return torch.tensor(list(itertools.product(range(15), repeat=K)))


def group_gradient(advantages, groups, logits):
    """The exact expectation of the gradient of a group's mean loss, where the policy samples the
    groups (N, K) and their answers have these advantages (N, K)."""
    rows, lp = groups.flatten(), token_logprobs(logits)                           # (N K,), (15, 3)
    losses, _, _ = grpo.policy_loss(lp[rows], lp[rows].detach(), advantages.flatten(), MASK[rows])
    pi = sequence_logprobs(logits).exp().detach()[groups].prod(1)                 # (N,)
    weights = pi.repeat_interleave(groups.shape[1]) / groups.shape[1]             # (N K,)
    return gradient((losses * MASK[rows] * weights[:, None]).sum(), logits)


LOGITS = table(0)
PI = sequence_logprobs(LOGITS).exp()                      # (15,), with gradient
REWARD = torch.randn(15, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
GRAD_J = gradient((PI * REWARD).sum(), LOGITS)            # of J = E[reward], in closed form


# -- the same world as a batch, for the classes ---------------------------------------------------


def tabular(logits):
    """A model whose logits are read from a table: what takes the place of a prompt is the three
    states of a sequence. An algorithm can be built on it; the table is not among its weights."""
    model = torch.nn.Module()
    model.config = SimpleNamespace(vocab_size=3)
    model.completion_hidden = lambda states, mask, ids, completion_mask, index: \
        logits[states[index]][:, :ids.shape[1]]
    model.head = lambda hidden: hidden
    model.completion_scores = GPT.completion_scores.__get__(model)
    model.device, model.dtype = torch.device("cpu"), logits.dtype
    model.configure_optimizer = lambda config, *others: None
    return model


def whole_world():
    """All 15 sequences as a batch."""
    return {"prompt_ids": STATE, "prompt_mask": torch.ones_like(MASK), "completion_ids": TOKEN,
            "completion_mask": MASK, "prompt_index": torch.arange(15)}


# -- a distribution over the sequences, taken apart into its steps --------------------------------


def visits(probabilities):
    """How often each prefix is written, (7, 1)."""
    mass = torch.zeros(7, dtype=torch.float64)
    mass = mass.index_add(0, STATE[MASK], probabilities.detach()[:, None].expand(15, 3)[MASK])
    return mass[:, None]


def conditionals(probabilities):
    """The log of the distribution of the next token after each prefix, (7, 3)."""
    mass = torch.zeros(7, 3, dtype=torch.float64)
    mass.index_put_((STATE[MASK], TOKEN[MASK]),
                    probabilities.detach()[:, None].expand(15, 3)[MASK], accumulate=True)
    mass = mass + 1e-300                             # logits are finite, also after what never is
    return (mass / mass.sum(1, keepdim=True)).log().requires_grad_()
