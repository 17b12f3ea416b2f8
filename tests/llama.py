"""
The small models on which model.py is tested.

The models are untrained, with a vocabulary of 8 tokens of which EOS is one, so that completions end
at different times. Tolerances: float32 in another order of operations differs by about 1e-6; 1e-4
is allowed.
"""

import torch

from model import GPT, GPTConfig

EOS, PAD = 6, 7
PROMPTS = [[6, 1, 2, 3], [6, 5], [6, 4, 4, 0, 2, 1, 3]]
COMPLETIONS = [[3, 6], [1, 2, 0, 5, 6], [4, 4, 1]]     # the last one ran out of tokens before EOS
# Where there are as many prompts as completions, the two are read side by side; with a fourth
# prompt, which has no answer, the prompts are read first and the completions look back at them.
PATHS = {"side by side": (PROMPTS, None), "with an index": (PROMPTS, torch.arange(3)),
         "looking back": (PROMPTS + [[6, 2, 2, 5]], torch.arange(3))}
CLOSE = dict(rtol=0, atol=1e-4)
SHAPES = [dict(), dict(n_kv_head=2, qkv_bias=True, qk_norm=False, tie_embeddings=False),
          dict(n_kv_head=1, head_dim=6)]


def make_model(eos_bias=0.0, **changes):
    """A small model whose every parameter is random, norms and biases too. eos_bias is added to the
    logit of EOS."""
    torch.manual_seed(0)
    shape = dict(vocab_size=8, block_size=32, n_layer=2, n_head=4, n_embd=32, n_hidden=48)
    model = GPT(GPTConfig(**{**shape, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    if eos_bias:
        bias = eos_bias * (torch.arange(model.config.vocab_size) == EOS)
        model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def pad(rows, side, pad_id=PAD, extra=0):
    """Lists of tokens -> ids and mask, padded on the `left` or the `right` to the longest and
    `extra` columns more."""
    width = max(map(len, rows)) + extra
    blank = [width - len(row) for row in rows]
    if side == "left":
        ids = [[pad_id] * n + row for n, row in zip(blank, rows)]
        mask = [[False] * n + [True] * len(row) for n, row in zip(blank, rows)]
    else:
        ids = [row + [pad_id] * n for n, row in zip(blank, rows)]
        mask = [[True] * len(row) + [False] * n for n, row in zip(blank, rows)]
    return torch.tensor(ids), torch.tensor(mask)


def batch(pad_id=PAD, extra=0, prompts=PROMPTS, completions=COMPLETIONS):
    return (*pad(prompts, "left", pad_id, extra), *pad(completions, "right", pad_id, extra))


def one_by_one(model, prompts=PROMPTS, completions=COMPLETIONS):
    """The reference for every batched path: read prompt + completion alone, unpadded. -> list of
    logits (len, V)"""
    return [model(torch.tensor([p + c]))[0, len(p) - 1:-1] for p, c in zip(prompts, completions)]
