"""
The policy: a small decoder-only transformer, from scratch, in one file.

The block is the one that the Llama, Qwen2 and Qwen3 families share: pre-norm RMSNorm (Zhang &
Sennrich 2019, 1910.07467), rotary positions (Su et al. 2021, 2104.09864), SwiGLU (Shazeer 2020,
2002.05202), grouped-query attention (Ainslie et al. 2023, 2305.13245), an optional bias on q, k, v
(Qwen2) and an optional norm on q and k (Qwen3). The parameters carry those families' names, so that
their weights fit by renaming tensors alone. The file reads in the spirit of nanoGPT
(github.com/karpathy/nanoGPT): config, attention, MLP, block, model, top to bottom.

Every algorithm asks the model for two things:

    generate(prompts)                          sample completions, each with its log-probabilities
    completion_scores(f, prompts, completions) f of the logits that predict each completion token

Both read a prompt once, however many completions belong to it.

Shapes: P prompts, B completions, T tokens, C = n_embd, V = vocab_size, nh heads, nkv key/value
heads, hd head size.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from harness.errors import InputError
from harness.flags import check_bounds, flag

# How many logits there are at a time: in float32 a quarter of a GB, and log_softmax, entropy and
# their gradients take about three times as much beside them. Smaller chunks save little, and adding
# up the head's gradient, (V, C) for each chunk, takes more and more time.
CHUNK = 2 ** 26


@dataclass
class GPTConfig:
    """the model (of a new base; other models bring their own shape)"""
    vocab_size: int = 258
    block_size: int = flag(128, "longest sequence, prompt and completion together, in tokens",
                           at_least=1)
    n_layer: int = flag(2, "transformer blocks (2 to 24)", at_least=1)
    n_head: int = flag(4, "attention heads (2 to 16)", at_least=1)
    n_kv_head: int = flag(0, "heads of keys and values; 0: n_head, fewer: grouped-query attention",
                          at_least=0)
    n_embd: int = flag(64, "width of the residual stream (64 to 1024)", at_least=1)
    head_dim: int = flag(0, "size of a head; 0: n_embd / n_head", at_least=0)
    n_hidden: int = flag(0, "width of the MLP; 0: 8/3 of n_embd, rounded up to a multiple of 32",
                         at_least=0)
    rope_theta: float = flag(100.0, "base of the rotary wavelengths; 10000 suits contexts of "
                                    "thousands", above=0)
    norm_eps: float = flag(1e-6, "added to the mean square in RMSNorm", above=0)
    qkv_bias: bool = flag(False, "bias on q, k and v, as in Qwen2")
    qk_norm: bool = flag(True, "RMSNorm on q and k, as in Qwen3")
    tie_embeddings: bool = flag(True, "input embedding and output head are one matrix")
    scalar_head: bool = False     # one number a position, not logits: a critic or a reward model
    rope_scaling: dict | None = None   # of Llama 3.1 and later: see rotary_angles

    def __post_init__(self):
        check_bounds(self)
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.vocab_size < 1:
            raise InputError(f"vocab_size is {self.vocab_size}; it must be at least 1")
        if not self.head_dim and self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim % 2:
            raise InputError(f"the head size (n_embd / n_head = {self.head_dim}) must be even: "
                             "rotary positions turn pairs")
        if self.n_head % self.n_kv_head:
            raise InputError(f"n_head ({self.n_head}) must be divisible by n_kv_head "
                             f"({self.n_kv_head})")
        self.n_hidden = self.n_hidden or 32 * math.ceil(8 * self.n_embd / 3 / 32)


class Samples(NamedTuple):
    """What `generate` returns; row b belongs to prompt b // num_generations."""
    completion_ids: torch.Tensor     # (B, T) sampled tokens, EOS included, then padding
    completion_mask: torch.Tensor    # (B, T) True on sampled tokens, EOS included; False on padding
    truncated: torch.Tensor          # (B,)   True where max_new_tokens ran out before EOS
    logprobs: torch.Tensor           # (B, T) under what the token was drawn from; 0 on padding


def at_least_float32(x):
    """What comes out of a bfloat16 product goes on in float32; a float64 model stays in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x, cos, sin):
    """Rotary positions in the rotate-half convention of Llama: dimension i is paired with i + hd/2,
    and the pair is turned as a point of the plane, from the first axis towards the second.

    x (N, heads, hd); cos and sin (N, 1, hd/2), of the angle of each pair. A query and a key that
    are turned like this have a dot product that depends on the distance between them alone, so
    padding may sit on either side. Worked example: a quarter turn (cos 0, sin 1) of both pairs
    makes [-3, -4, 1, 2] of [1, 2, 3, 4].
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def causal_mask(attention_mask, T):
    """Where a query may look, (B, 1, T, S): the T queries are the last of the S columns, and
    attention_mask (B, S) is True on real tokens.

    A query sees the real tokens up to itself. It always sees itself, even on padding: a row of the
    softmax with nothing to look at would be 0/0, and the nan would spread.

    Worked example: <pad> 7 + has the mask [0, 1, 1], and with T 3 the rows [1, 0, 0], [0, 1, 0],
    [0, 1, 1]; with T 1 the last of them alone.
    """
    S = attention_mask.shape[-1]
    key = torch.arange(S, device=attention_mask.device)                         # (S,)
    query = key[S - T:, None]                                                   # (T, 1)
    causal, itself = key <= query, key == query                                 # (T, S)
    return causal & attention_mask.bool()[:, None, None, :] | itself            # (B, 1, T, S)


def rotary_angles(config):
    """Cosine and sine of each position's angles, twice (block_size, hd/2).

    rope_scaling: Llama 3.1 went on to longer texts with slower angles. What turns more than
    high_freq_factor times within the original context stays; what turns less than low_freq_factor
    times becomes slower by `factor`; between the two it is a mixture.
    """
    # theta^(-2i/hd) by the operations that transformers uses: the angles agree in every bit.
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim   # (hd/2,)
    frequencies = 1.0 / config.rope_theta ** exponents                          # (hd/2,)
    if config.rope_scaling:
        scaling = config.rope_scaling
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi / frequencies)
        kept = ((turns - low) / (high - low)).clamp(0, 1)                       # (hd/2,)
        frequencies = (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
    angles = torch.outer(torch.arange(config.block_size).float(), frequencies)
    return angles.cos(), angles.sin()


class Padding(NamedTuple):
    """Where the N real tokens sit in the (B, T) grid. Attention needs the grid. All other layers
    treat each token alone, so they work on the (N, C) list of real tokens:

        grid   [<pad>  7   +  ]      list   [7  +  1  -  2]      real   [1  2  3  4  5]
               [  1    -   2  ]
    """
    B: int
    T: int
    real: torch.Tensor | None        # (N,) cells of the flattened grid; None: all, N = B * T

    def take(self, grid):            # (B, T, ...) -> (N, ...)
        flat = grid.reshape(self.B * self.T, *grid.shape[2:])
        if self.real is None:
            return flat
        return flat.index_select(0, self.real)   # flat[real], with a faster backward pass

    def spread(self, tokens):        # (N, ...) -> (B, T, ...), zeros on padding
        if self.real is not None:
            flat = tokens.new_zeros(self.B * self.T, *tokens.shape[1:])
            tokens = flat.index_copy(0, self.real, tokens)
        return tokens.view(self.B, self.T, *tokens.shape[1:])


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, hd = config, config.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_head * hd, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * hd, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * hd, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * hd, config.n_embd, bias=False)
        self.q_norm = nn.RMSNorm(hd, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(hd, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, padding, cos, sin, mask, past=None, filled=None):
        """x (N, C) -> output (N, C) and the keys and values (B, nkv, S, hd) of all that was read.

        Queries and keys pass their norm and are then turned (cos, sin: see rotate), in float32
        where x is bfloat16. mask (B or 1, 1, T, S) is True where a query may look. Query heads h g
        to h g + g - 1, g = nh / nkv, share key/value head h.

        `past` holds earlier keys and values, a pair of (B, nkv, earlier, hd), in one of two ways.
        For training (filled None) it is extended by a concatenation, through which gradients reach
        the prompt. For sampling it is a buffer as long as the whole sequence, of which `filled`
        columns are in use, written in place.
        """
        N, T, hd = len(x), padding.T, self.config.head_dim
        q, k = at_least_float32(self.q_proj(x)), at_least_float32(self.k_proj(x))
        q = rotate(self.q_norm(q.view(N, -1, hd)), cos, sin)                    # (N, nh, hd)
        k = rotate(self.k_norm(k.view(N, -1, hd)), cos, sin)                    # (N, nkv, hd)
        v = self.v_proj(x).view(N, -1, hd)                                      # (N, nkv, hd)
        q, k = q.to(v.dtype), k.to(v.dtype)
        q, k, v = (padding.spread(t).transpose(1, 2) for t in (q, k, v))        # (B, heads, T, hd)
        if past is not None and filled is None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        elif past is not None:
            past[0][:, :, filled:filled + T], past[1][:, :, filled:filled + T] = k, v
            k, v = past[0][:, :, :filled + T], past[1][:, :, :filled + T]
        grouped = self.config.n_kv_head != self.config.n_head
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.o_proj(padding.take(y.transpose(1, 2)).reshape(N, -1)), (k, v)


class MLP(nn.Module):
    """SwiGLU: a linear layer whose every unit is gated by another, passed through SiLU."""
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = CausalSelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, padding, cos, sin, mask, past=None, filled=None):
        y, kv = self.self_attn(self.input_layernorm(x), padding, cos, sin, mask, past, filled)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.skip_padding = True     # on a CPU; a GPU prefers shapes that do not change
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        outputs = 1 if config.scalar_head else config.vocab_size
        self.lm_head = nn.Linear(config.n_embd, outputs, bias=False)
        if config.tie_embeddings and not config.scalar_head:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rotary_angles(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # Every matrix starts with standard deviation 1 / sqrt(width), so that activations keep
        # their scale at any width. GPT-2's fixed .02 is about that at width 2,000; at width 64 it
        # is six times too small and hardly trains.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=config.n_embd ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    # -- reading ----------------------------------------------------------------------------------

    def hidden_states(self, input_ids, attention_mask=None, position_ids=None, past=None,
                      filled=None):
        """The residual stream after the last norm, (B, T, C), and each layer's (keys, values).

        input_ids (B, T). attention_mask (B, S) is True on real tokens, over the S columns of past
        and input together; None: all are real. position_ids (B, T) counts real tokens from 0; None:
        derived from the mask, which is right for padding on either side. past, filled: see
        CausalSelfAttention.forward.
        """
        B, T = input_ids.shape
        S = T + (0 if past is None else past[0][0].shape[2] if filled is None else filled)
        if attention_mask is None:
            attention_mask = torch.ones(1, S, dtype=torch.bool, device=input_ids.device)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, S - T:]   # (B or 1, T)
        mask = causal_mask(attention_mask, T)                                   # (B or 1, 1, T, S)
        is_real, real = attention_mask[:, S - T:], None                         # (B or 1, T)
        if self.skip_padding and T > 1 and input_ids.device.type == "cpu":
            if is_real.float().mean() < 0.9:                                    # else it costs more
                real = is_real.flatten().nonzero().squeeze(-1)                  # (N,)
        padding = Padding(B, T, real)
        position_ids = padding.take(position_ids.expand(B, T))                  # (N,)
        cos, sin = self.cos[position_ids][:, None], self.sin[position_ids][:, None]   # (N, 1, hd/2)
        x = self.embed_tokens(padding.take(input_ids))                          # (N, C)
        kvs = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, padding, cos, sin, mask, None if past is None else past[i], filled)
            kvs.append(kv)
        return padding.spread(self.norm(x)), kvs                                # (B, T, C)

    def head(self, hidden):
        """Logits (..., V) of hidden states (..., C), float32 (of a float64 model float64)."""
        return at_least_float32(self.lm_head(hidden))

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        """Logits (B, T, V) of the token after each."""
        x, _ = self.hidden_states(input_ids, attention_mask, position_ids)
        return self.head(x)

    def completion_hidden(self, prompt_ids, prompt_mask, completion_ids, completion_mask,
                          prompt_index=None, read_last=False):
        """Hidden states (B, T, C): [b, t] is what token t of completion b is predicted from. What
        the result holds where completion_mask is False means nothing.

        prompt_ids, prompt_mask (P, Tp), padded on the left; completion_ids, completion_mask (B, T),
        padded on the right. prompt_index (B,) names the prompt that each completion answers; None:
        completion b answers prompt b. Raises InputError where the two exceed block_size.

        The shift by one lives here and nowhere else. Token 0 is predicted at the prompt's last
        column, token t at the completion's column t - 1. The last completion token predicts nothing
        and is not read. (With read_last it is, and the result has T + 1 columns, the last of them
        seen after the whole completion: what critics and reward models use.)

            columns read      <end> 7 + 5 =  |  1  2
            completion                          1  2  <end>       row t predicts token t
            predicted from                 '='  1  2
        """
        Tp, T, block_size = prompt_ids.shape[1], completion_ids.shape[1], self.config.block_size
        read = T if read_last else T - 1              # completion tokens that are read
        if prompt_index is None:
            prompt_index = torch.arange(len(completion_ids), device=completion_ids.device)
        if Tp + T > block_size:   # the grid is too wide; what counts is the longest row in it
            lengths = prompt_mask.sum(-1)[prompt_index] + completion_mask.sum(-1)   # (B,)
            if lengths.max() > block_size:
                raise InputError("a prompt and its completion are longer than block_size "
                                 f"{block_size}")
        if len(prompt_ids) == len(completion_ids):   # one completion a prompt: side by side
            prompt_ids, prompt_mask = prompt_ids[prompt_index], prompt_mask[prompt_index]
            input_ids = torch.cat([prompt_ids, completion_ids[:, :read]], dim=1)
            attention_mask = torch.cat([prompt_mask, completion_mask[:, :read]], dim=1)
            hidden, _ = self.hidden_states(input_ids, attention_mask)
            return hidden[:, Tp - 1:]                                           # (B, T, C)
        # Several completions a prompt: read each prompt once, and let its completions look back at
        # its keys and values. F.embedding(index, t) is t[index], with a backward pass that is fast
        # and always adds in the same order: that of t[index] depends on which thread comes first.
        prompt_hidden, prompt_kvs = self.hidden_states(prompt_ids, prompt_mask)
        hidden = F.embedding(prompt_index, prompt_hidden[:, -1]).unsqueeze(1)   # (B, 1, C)
        if read > 0:
            past = [tuple(F.embedding(prompt_index, t.flatten(1)).unflatten(1, t.shape[1:])
                          for t in kv) for kv in prompt_kvs]                    # (B, nkv, Tp, hd)
            prompt_mask = prompt_mask[prompt_index]                             # (B, Tp)
            attention_mask = torch.cat([prompt_mask, completion_mask[:, :read]], dim=1)
            completion_hidden, _ = self.hidden_states(completion_ids[:, :read], attention_mask,
                                                      past=past)
            hidden = torch.cat([hidden, completion_hidden], dim=1)              # (B, T, C)
        return hidden

    def completion_logits(self, *completions, read_last=False):
        """Logits (B, T, V): [b, t] is the distribution from which token t of completion b was to be
        drawn. The arguments are those of completion_hidden. Of a critic or a reward model: one
        number for each token, (B, T, 1), or with read_last (B, T + 1, 1)."""
        return self.head(self.completion_hidden(*completions, read_last=read_last))

    def completion_scores(self, f, prompt_ids, prompt_mask, completion_ids, completion_mask,
                          prompt_index=None, more=()):
        """f of the logits that predict each completion token: a tensor (B, T), or several, without
        the logits of all tokens (B, T, V) at a time.

        f(logits (B, t, V), ids (B, t), *more) -> (B, t), or a tuple of such. It gets t columns of
        the completions at a time, and what it returns is joined. more: tensors (B, T, ...), of
        which f gets the same columns. The other arguments are those of completion_hidden.

        At V = 150,000 the logits of 4,096 tokens take 2.4 GB, their log-probabilities as much, and
        so do the gradients of both. So no chunk has more than CHUNK logits, and none are kept for
        the backward pass: it computes them again, chunk by chunk (Chen et al. 2016, 1604.06174).
        That is a second pass through the head. Whatever fits in one chunk is read once and kept.
        """
        hidden = self.completion_hidden(prompt_ids, prompt_mask, completion_ids, completion_mask,
                                        prompt_index)                           # (B, T, C)
        B, T, _ = hidden.shape
        width = max(1, CHUNK // max(1, B * self.config.vocab_size))             # columns of a chunk

        def chunk(hidden, *columns):
            return f(self.head(hidden), *columns)
        if T <= width:
            return chunk(hidden, completion_ids, *more)
        found = []
        for columns in zip(*(x.split(width, dim=1) for x in (hidden, completion_ids, *more))):
            if torch.is_grad_enabled():
                found.append(checkpoint(chunk, *columns, use_reentrant=False,
                                        preserve_rng_state=False))   # nothing here is random
            else:
                found.append(chunk(*columns))
        if torch.is_tensor(found[0]):
            return torch.cat(found, dim=1)                                      # (B, T)
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found))

    # -- writing ----------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompt_ids, prompt_mask, max_new_tokens, eos_id, pad_id, num_generations=1,
                 temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """Sample num_generations completions of every prompt; returns Samples with
        B = P * num_generations rows.

        prompt_ids, prompt_mask (P, Tp), padded on the left. temperature 0 takes the likeliest
        token; top_k 0 and top_p 1 leave the distribution whole. A completion ends with eos_id,
        which it keeps, or after max_new_tokens (truncated). The result is as wide as the longest
        completion. Raises InputError, which names block_size and its value, when prompt and
        completion together may exceed it.
        """
        P, Tp = prompt_ids.shape
        B, device = P * num_generations, prompt_ids.device
        if Tp + max_new_tokens > self.config.block_size:
            raise InputError(
                f"a prompt of {Tp} tokens and max_new_tokens {max_new_tokens} do not fit "
                f"block_size {self.config.block_size}: shorten the prompt or raise --block_size")
        completion_ids = torch.full((B, max_new_tokens), pad_id, device=device)
        length = torch.full((B,), max_new_tokens, device=device)
        truncated = torch.ones(B, dtype=torch.bool, device=device)

        # Read every prompt once. Then lay its keys and values out for each of its samples, with
        # room for what follows.
        hidden, prompt_kvs = self.hidden_states(prompt_ids, prompt_mask)
        kv = torch.stack([torch.stack(pair) for pair in prompt_kvs])            # (L, 2, P, ...)
        kv = kv.repeat_interleave(num_generations, dim=2)                       # (L, 2, B, ...)
        cache = kv.new_empty(*kv.shape[:4], Tp + max_new_tokens, kv.shape[5])
        cache[:, :, :, :, :Tp] = kv                     # (L, 2, B, nkv, Tp + max_new_tokens, hd)
        attention_mask = F.pad(prompt_mask.bool(), (0, max_new_tokens), value=True)
        attention_mask = attention_mask.repeat_interleave(num_generations, 0)
        next_position = prompt_mask.sum(-1, keepdim=True)                       # (P, 1)
        next_position = next_position.repeat_interleave(num_generations, 0)     # (B, 1)
        logits = self.head(hidden[:, -1])                                       # (P, V)
        logits = logits.repeat_interleave(num_generations, 0)                   # (B, V)
        logprobs = logits.new_zeros(B, max_new_tokens)

        # One token at a time, for the b rows that are still being written.
        rows = torch.arange(B, device=device)           # which completion each of them is
        running = torch.ones_like(rows, dtype=torch.bool)
        for t in range(max_new_tokens):
            token, logprob = sample(logits, temperature, top_k, top_p, generator)   # (b,), (b,)
            completion_ids[rows[running], t] = token[running]
            logprobs[rows[running], t] = logprob[running]
            ended = running & (token == eos_id)
            length[rows[ended]], truncated[rows[ended]] = t + 1, False
            running = running & ~ended
            still = int(running.sum())
            if still == 0 or t + 1 == max_new_tokens:
                break
            if still <= 0.8 * len(rows):   # finished rows leave; some at a time, for moving is work
                rows, token, next_position = rows[running], token[running], next_position[running]
                attention_mask, cache = attention_mask[running], cache[:, :, running]
                running = running[running]
            hidden, _ = self.hidden_states(token[:, None], attention_mask[:, :Tp + t + 1],
                                           next_position, cache, Tp + t)
            logits = self.head(hidden[:, -1])                                   # (b, V)
            next_position = next_position + 1
        T = int(length.max())
        completion_mask = torch.arange(T, device=device) < length[:, None]
        return Samples(completion_ids[:, :T], completion_mask, truncated, logprobs[:, :T])

    def with_scalar_head(self):
        """A copy with a head of one number a position, at first 0 everywhere: a critic or a reward
        model."""
        if self.config.scalar_head:
            return copy.deepcopy(self).requires_grad_(True)
        model = GPT(replace(self.config, scalar_head=True)).to(self.device, self.dtype)
        head = torch.zeros(1, self.config.n_embd)
        model.load_state_dict({**self.state_dict(), "lm_head.weight": head})
        model.skip_padding = self.skip_padding
        return model

    # -- accounting -------------------------------------------------------------------------------

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.embed_tokens.weight.dtype

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())   # a tied matrix counts once

    def flops_per_token(self, T):
        """Floating-point operations to train on one token of a sequence of T: 6 N + 12 n_layer nh
        hd T, forward and backward (PaLM, 2204.02311, appendix B). The embedding look-up is free, so
        an untied one is left out of N."""
        config, N = self.config, self.num_parameters()
        if not config.tie_embeddings:
            N -= self.embed_tokens.weight.numel()
        return 6 * N + 12 * config.n_layer * config.n_head * config.head_dim * T

    def configure_optimizer(self, config, *others):
        """AdamW for this network, and others beside it, that decays matrices and leaves norms and
        biases alone. config: learning_rate, weight_decay, adam_beta2."""
        parameters = [p for network in (self, *others) for p in network.parameters()]
        groups = [{"params": [p for p in parameters if p.dim() >= 2],
                   "weight_decay": config.weight_decay},
                  {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.adam_beta2),
                                 eps=1e-8, fused=True)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One draw from each row of logits (B, V): tokens (B,) and their log-probabilities (B,) under
    what was drawn from.

    The logits are divided by the temperature; at 0 the likeliest token comes, with probability 1.
    top_k leaves the k likeliest tokens (0: all). Then top_p leaves, of what is left, the smallest
    set of the likeliest whose mass reaches top_p, and at least one. Random numbers come from the
    generator alone.

    Worked example: logits log [.5, .3, .2], top_k 2 leaves [.625, .375, 0]; token 1 comes with
    log .375, not log .3. top_p .6 leaves the same two, for .5 alone does not reach it.
    """
    if temperature == 0:   # a certain choice has probability 1
        token = logits.argmax(-1)
        return token, torch.zeros_like(logits[:, 0])
    logprobs = torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    if 0 < top_k < logits.shape[-1]:
        kth = logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = torch.log_softmax(logprobs.masked_fill(logprobs < kth, -math.inf), dim=-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()   # mass of the likelier tokens
        drop = (before >= top_p).scatter(-1, order, before >= top_p)
        drop.scatter_(-1, order[:, :1], False)
        logprobs = torch.log_softmax(logprobs.masked_fill(drop, -math.inf), dim=-1)
    # Inverse transform: the first token whose cumulative probability exceeds a uniform draw. It is
    # the distribution of torch.multinomial at a twentieth of the cost on a CPU.
    cumulative = logprobs.exp().cumsum(-1)                                      # (B, V)
    u = torch.rand(len(logits), 1, generator=generator, device=logits.device)   # (B, 1)
    u = u * (1 - 2 ** -23)                                  # so that it never rounds up to 1
    token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)  # (B, 1)
    token = token.clamp(max=logits.shape[-1] - 1)           # only logits of nan get here
    return token.squeeze(-1), logprobs.gather(-1, token).squeeze(-1)
