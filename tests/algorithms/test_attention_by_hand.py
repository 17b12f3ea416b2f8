"""Rotary positions, the causal mask and attention itself on numbers that can be written down; and
the buffer of keys and values that sampling writes into."""

import math

import pytest
import torch

from llama import CLOSE, PROMPTS, SHAPES, make_model, pad
from model import CausalSelfAttention, GPTConfig, Padding, causal_mask, rotate
from world import close


# -- rotary positions -----------------------------------------------------------------------------


def test_a_quarter_turn_worked_by_hand():
    """The first half of the dimensions is paired with the second: the worked example, and an eighth
    of a turn of the second pair alone."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    zero, one = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    assert close(rotate(x, zero, one), [[[-3, -4, 1, 2]]])
    assert close(rotate(x, one, zero), x)
    half = math.sqrt(0.5)
    found = rotate(x, torch.tensor([[[1, half]]]), torch.tensor([[[0, half]]]))
    assert close(found, [[[1, -2 * half, 3, 6 * half]]], 1e-6)


def test_a_turn_keeps_lengths_and_depends_on_distance():
    """Every head of every token is turned by its own token's angle: lengths stay, and query and key
    at positions 3 and 1 have the dot product of those at 12 and 10."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6, dtype=torch.float64)   # 4 tokens, 2 heads
    x[2:] = x[:2]
    positions, speeds = (torch.tensor(numbers, dtype=torch.float64)
                         for numbers in ([3, 1, 12, 10], [1, 0.3, 0.1]))
    angles = torch.outer(positions, speeds)[:, None]                               # (4, 1, 3)
    found = rotate(x, angles.cos(), angles.sin())
    assert close(found.norm(dim=-1), x.norm(dim=-1))
    here, there = (found[i] @ found[i + 1].T for i in (0, 2))
    assert close(here, there) and not close(here, x[0] @ x[1].T)


def test_only_distances_matter():
    """Adding a constant to every position changes no logit (to 1e-4); doubling the distances
    does."""
    model, ids, positions = make_model(), torch.tensor([PROMPTS[2]]), torch.arange(7)[None]
    here, further = (model(ids, position_ids=positions + by) for by in (0, 20))
    torch.testing.assert_close(further, here, **CLOSE)
    assert (model(ids, position_ids=positions * 2) - model(ids)).abs().max() > 0.01


# -- the mask -------------------------------------------------------------------------------------


def rows(mask):
    """A mask as a list of a list of rows like "011" for each sequence."""
    return [["".join(str(int(x)) for x in row) for row in one[0]] for one in mask]


def test_the_mask_worked_by_hand():
    """Three tokens with the padding on the left, on the right, and with none."""
    mask = causal_mask(torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 1]]).bool(), 3)
    assert mask.dtype == torch.bool and mask.shape == (3, 1, 3, 3)
    assert rows(mask) == [["100", "010", "011"], ["100", "110", "111"], ["100", "110", "111"]]


def test_the_mask_of_the_last_columns():
    """With keys of earlier tokens the queries are the last columns: the same rows as of the whole,
    and of a single new token one."""
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1]])
    assert rows(causal_mask(real, 2)) == [["00110", "00111"], ["11010", "11001"]]
    assert rows(causal_mask(real.bool(), 1)) == [["00111"], ["11001"]]
    for T in range(1, 6):
        assert torch.equal(causal_mask(real, T), causal_mask(real, 5)[:, :, 5 - T:])


def test_every_query_sees_itself_even_on_padding():
    """No row is empty, be everything padding: the softmax of nothing is 0/0."""
    mask = causal_mask(torch.tensor([[False] * 4, [False, True, False, False]]), 4)
    assert mask.any(-1).all()
    assert rows(mask) == [["1000", "0100", "0010", "0001"], ["1000", "0100", "0110", "0101"]]


# -- attention ------------------------------------------------------------------------------------


def attention(n_head=1, n_kv_head=1, hd=4):
    """Without norms and with identities for matrices, so that queries, keys and values are x."""
    module = CausalSelfAttention(GPTConfig(n_embd=n_head * hd, n_head=n_head, n_kv_head=n_kv_head,
                                           qk_norm=False))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.eye(*p.shape))
    return module


def here(N, hd=4):
    """cos and sin of angles 0."""
    return torch.ones(N, 1, hd // 2), torch.zeros(N, 1, hd // 2)


def test_attention_worked_by_hand():
    """Two tokens at right angles, of length 2, heads of size 4: the second looks at itself with e^2
    / (1 + e^2), for its dot product with itself is 4 and 4 / sqrt(4) = 2."""
    x = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0]])
    mask = torch.tensor([[[[True, False], [True, True]]]])
    y, (k, v) = attention()(x, Padding(1, 2, None), *here(2), mask)
    own = math.exp(2) / (1 + math.exp(2))
    assert close(y, [[2, 0, 0, 0], [2 * (1 - own), 2 * own, 0, 0]], 1e-6)
    assert close(k, x[None, None]) and close(v, x[None, None])


def test_query_heads_share_the_keys_of_their_group():
    """Four query heads over two of keys and values: heads 0 and 1 look through the first, 2 and 3
    through the second. A query of zeros looks at all it may see alike, so the mean of the values
    comes out, each head's in its place."""
    module = attention(4, 2, 2)
    with torch.no_grad():
        module.q_proj.weight.zero_()
    x = torch.tensor([[1.0, 2, 3, 4, 0, 0, 0, 0], [5, 6, 7, 8, 0, 0, 0, 0]])   # (2, C)
    mask = torch.tensor([[[[True, False], [True, True]]]])
    y, (k, v) = module(x, Padding(1, 2, None), *here(2, 2), mask)
    assert k.shape == v.shape == (1, 2, 2, 2)
    assert close(y, [[1, 2, 1, 2, 3, 4, 3, 4], [3, 4, 3, 4, 5, 6, 5, 6]], 1e-6)


@pytest.mark.parametrize("parts", [(7,), (4, 3), (3, 1, 1, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_buffer_is_filled_as_the_whole_is_read(shape, parts):
    """Reading in parts into a buffer gives what reading at once gives, and the buffer then holds
    the keys and values of all that was read; what lies behind stays as it was."""
    model, (ids, mask) = make_model(**shape), pad(PROMPTS, "left")
    c = model.config
    cache = torch.full((c.n_layer, 2, len(ids), c.n_kv_head, 9, c.head_dim), 5.0)
    with torch.no_grad():
        expected, kvs = model.hidden_states(ids, mask)
        states, filled = [], 0
        for n in parts:
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, filled:filled + n]
            state, _ = model.hidden_states(ids[:, filled:filled + n], mask[:, :filled + n],
                                           position_ids, cache, filled)
            states.append(state)
            filled += n
    torch.testing.assert_close(torch.cat(states, 1)[mask], expected[mask], **CLOSE)
    for layer, pair in zip(cache, kvs):
        for buffer, whole in zip(layer, pair):
            found, whole = (t.transpose(1, 2)[mask] for t in (buffer[:, :, :7], whole))
            torch.testing.assert_close(found, whole, **CLOSE)
    assert cache[..., 7:, :].eq(5).all()
