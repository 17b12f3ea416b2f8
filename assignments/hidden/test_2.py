"""Hidden variants of assignment 2: other numbers, other shapes, plain loops beside them."""

import math
import statistics

import pytest
import torch
from draws import normal, rng

from conftest import float64  # noqa: F401
from harness.errors import InputError
from model import GPT, GPTConfig, causal_mask, rotate, sample
from tiny import same
from world import close
from written_out import reference_llama


@pytest.mark.parametrize("N, heads, hd", [(1, 1, 2), (5, 3, 8)])
def test_rotations_elsewhere(N, heads, hd):
    """Pairs as complex numbers, each times its own e^(i angle)."""
    x, angles = normal("x", N, heads, hd), normal("angles", N, 1, hd // 2)
    z = torch.complex(x[..., :hd // 2], x[..., hd // 2:])
    z = z * torch.polar(torch.ones_like(angles), angles)
    assert close(rotate(x, angles.cos(), angles.sin()), torch.cat([z.real, z.imag], -1))
    found = rotate(x.float(), angles.cos().float(), angles.sin().float())
    assert found.dtype == torch.float32 and found.shape == x.shape


@pytest.mark.parametrize("B, S", [(1, 1), (2, 4), (5, 7)])
def test_masks_elsewhere(B, S):
    """Cell by cell, with padding anywhere, for any number of queries."""
    draw = rng(f"mask {S}")
    real = [[draw.random() < 0.6 for _ in range(S)] for _ in range(B)]
    for T in range(1, S + 1):
        found = causal_mask(torch.tensor(real), T)
        assert found.shape == (B, 1, T, S) and found.dtype == torch.bool
        by_hand = [[[[j == i or (j < i and row[j]) for j in range(S)] for i in range(S - T, S)]]
                   for row in real]
        assert found.tolist() == by_hand


def make_model(**shape):
    """A model whose every parameter is random, norms and biases too."""
    torch.manual_seed(rng("model").randrange(1000))
    model = GPT(GPTConfig(vocab_size=9, block_size=24, n_layer=2, n_hidden=8, **shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [
    dict(n_embd=8, n_head=4, n_kv_head=2, qkv_bias=True), dict(n_embd=8, n_head=2, qk_norm=False)])
def test_attention_elsewhere(shape):
    """Llama written out in loops, in double precision: whole, split at any place with earlier keys
    and values given in either way, and its gradient."""
    model, draw = make_model(**shape), rng("attention")
    c, tokens = model.config, [draw.randrange(9) for _ in range(6)]
    ids, cut = torch.tensor([tokens]), draw.randint(1, 5)
    expected = reference_llama(model, tokens).detach()
    assert same(model(ids)[0], expected)
    start, kvs = model.hidden_states(ids[:, :cut])
    rest, _ = model.hidden_states(ids[:, cut:], torch.ones(1, 6).bool(), past=kvs)
    joined = model.lm_head(torch.cat([start, rest], 1))[0]
    assert same(joined, expected)
    weights, direction = list(model.parameters()), normal("direction", 6, 9)
    ours, theirs = (torch.autograd.grad((logits * direction).sum(), weights)
                    for logits in (joined, model(ids)[0]))
    assert all(same(a, b) for a, b in zip(ours, theirs))
    weight = model.layers[0].self_attn.k_proj.weight
    slopes = []
    for h in (1e-6, -1e-6):   # the gradient of one parameter, by differences of what is written out
        with torch.no_grad():
            weight[1, 2] += h
            slopes.append((reference_llama(model, tokens) * direction).sum().item())
            weight[1, 2] -= h
    found = theirs[[id(w) for w in weights].index(id(weight))][1, 2].item()
    assert found == pytest.approx((slopes[0] - slopes[1]) / 2e-6, abs=1e-5)
    with torch.no_grad():
        buffer = torch.zeros(c.n_layer, 2, 1, c.n_kv_head, 8, c.head_dim)
        states = [model.hidden_states(ids[:, t:t + 1], torch.ones(1, t + 1).bool(), None, buffer,
                                      t)[0] for t in range(6)]
        assert same(model.lm_head(torch.cat(states, 1))[0], expected)
        assert buffer[..., 6:, :].eq(0).all()


def left_of(probabilities, top_k, top_p):
    """What top_k and then top_p leave of one row, likeliest first."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[:top_k or None]
    mass, kept = sum(probabilities[i] for i in order), []
    while order and (not kept or sum(probabilities[i] for i in kept) < top_p * mass):
        kept.append(order.pop(0))
    return {i: probabilities[i] / sum(probabilities[j] for j in kept) for i in kept}


@pytest.mark.parametrize("settings", [
    dict(), dict(temperature=0.6), dict(top_k=3), dict(top_p=0.85),
    dict(temperature=1.4, top_k=5, top_p=0.7)])
def test_draws_elsewhere(settings):
    """Ten rows at a time, each with its own distribution: which tokens come, how often, and the
    log-probability of each."""
    draw, N = rng(f"draws {settings}"), 4000
    logits = normal("logits", 10, 7, dtype=torch.float32)
    generator = torch.Generator().manual_seed(draw.randrange(1000))
    token, logprob = sample(logits.repeat(N, 1), generator=generator, **settings)
    for i in range(10):
        p = (logits[i] / settings.get("temperature", 1)).softmax(-1).tolist()
        expected = left_of(p, settings.get("top_k", 0), settings.get("top_p", 1))
        tokens = token[i::10].tolist()
        assert set(tokens) <= set(expected)
        for j, chance in expected.items():
            deviation = math.sqrt(chance * (1 - chance) / N)
            assert tokens.count(j) / N == pytest.approx(chance, abs=6 * deviation + 1e-9)
        assert close(logprob[i::10], [math.log(expected[j]) for j in tokens], 1e-4)


def test_samples_elsewhere():
    """Of other prompts: what scoring says of each token, where rows end, and that a sampler with a
    sharper distribution writes likelier texts."""
    model, draw = make_model(n_embd=12, n_head=3), rng("samples")
    P, G, Tp, limit = 3, 10, 5, draw.randint(8, 12)
    lengths = [draw.randint(1, Tp) for _ in range(P)]
    ids = torch.tensor([[7] * (Tp - n) + [draw.randrange(7) for _ in range(n)] for n in lengths])
    mask = torch.tensor([[t >= Tp - n for t in range(Tp)] for n in lengths])
    eos, means = draw.randrange(7), []
    owner = torch.arange(P * G) // G
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.5, 4, 0.9)):
        generator = torch.Generator().manual_seed(draw.randrange(1000))
        s = model.generate(ids, mask, limit, eos, 8, G, temperature, top_k, top_p, generator)
        logits = model.completion_logits(ids, mask, s.completion_ids, s.completion_mask, owner)
        for b, row in enumerate(s.completion_ids.tolist()):
            n = row.index(eos) + 1 if eos in row else limit
            assert s.completion_mask[b].tolist() == [t < n for t in range(len(row))]
            assert bool(s.truncated[b]) == (eos not in row) and row[n:] == [8] * (len(row) - n)
            for t in range(n):
                chances = (logits[b, t] / temperature).softmax(-1).tolist()
                expected = math.log(left_of(chances, top_k, top_p)[row[t]])
                assert s.logprobs[b, t].item() == pytest.approx(expected, abs=1e-4)
            assert s.logprobs[b, n:].eq(0).all()
        means.append(statistics.mean(s.logprobs[s.completion_mask].tolist()))
    assert means[0] < means[1] < 0
    with pytest.raises(InputError):
        model.generate(ids, mask, 20, eos, 8)
