"""Numbers in every bit: rotary angles, norms, and what is float32, float64 or bfloat16."""

import math

import pytest
import torch

from llama import (COMPLETIONS, EOS, PAD, PATHS, PROMPTS, SHAPES, batch, make_model, one_by_one,
                   pad)
from model import GPT, GPTConfig, sample
from written_out import reference_llama

THETAS = [3.0, 100.0, 10000.0, 1e6]


# -- rotary angles and norms ----------------------------------------------------------------------


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 64])
def test_rotary_angles_follow_theta(theta, head_dim):
    """At position t pair i is turned by t / theta^(2i/hd): the first pair by one radian a token,
    whatever theta, the others ever more slowly."""
    model = GPT(GPTConfig(rope_theta=theta, head_dim=head_dim, n_layer=1, n_embd=8, block_size=50))
    assert model.cos.shape == model.sin.shape == (50, head_dim // 2)
    for t in (0, 1, 7, 49):
        for i in range(head_dim // 2):
            angle = t / theta ** (2 * i / head_dim)
            assert model.cos[t, i].item() == pytest.approx(math.cos(angle), abs=1e-5)
            assert model.sin[t, i].item() == pytest.approx(math.sin(angle), abs=1e-5)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("head_dim", [6, 22, 64, 128])
def test_rotary_angles_are_those_of_transformers_in_every_bit(theta, head_dim):
    """The lines of transformers 5.23, LlamaRotaryEmbedding, give the same table, bit for bit. In
    float32, theta ** -x and 1 / theta ** x differ in the last bit, which far positions multiply."""
    dim, seq_len = head_dim, 200
    inv_freq = 1.0 / (
        theta ** (torch.arange(0, dim, 2, dtype=torch.int64).to(dtype=torch.float) / dim)
    )
    inv_freq_expanded = inv_freq[None, :, None].float()
    position_ids_expanded = torch.arange(seq_len)[None, None, :].float()
    freqs = (inv_freq_expanded.float() @ position_ids_expanded.float()).transpose(1, 2)[0]
    model = GPT(GPTConfig(rope_theta=theta, head_dim=dim, n_layer=1, n_embd=8, block_size=seq_len))
    assert torch.equal(model.cos, freqs.cos()) and torch.equal(model.sin, freqs.sin())


def test_every_norm_adds_norm_eps():
    """With eps = 3 a vector of ones is divided by sqrt(1 + 3): every norm, those of q and k too,
    makes it .5 (its weight is 1), and there are no others."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, norm_eps=3.0))
    norms = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.RMSNorm)}
    assert len(norms) == 2 * 4 + 1
    for name, norm in norms.items():
        size = 4 if name.endswith(("q_norm", "k_norm")) else 8
        assert norm(torch.ones(3, size)).tolist() == [[0.5] * size] * 3, name


@pytest.mark.parametrize("shape", SHAPES)
def test_theta_and_eps_have_their_effect_on_the_logits(shape):
    """At theta 3 and eps .5, far from the defaults, the model equals its transcription, and a model
    of the same weights and the default theta and eps does not."""
    model, tokens = make_model(rope_theta=3.0, norm_eps=0.5, **shape), [6, 1, 5, 0, 2, 2, 7]
    logits = model(torch.tensor([tokens]))[0].detach()
    torch.testing.assert_close(logits, reference_llama(model, tokens), rtol=0, atol=1e-4)
    for other in (dict(rope_theta=3.0), dict(norm_eps=0.5)):
        assert (make_model(**other, **shape)(torch.tensor([tokens]))[0] - logits).abs().max() > 0.01


# -- bfloat16 -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_queries_and_keys_are_normed_and_turned_in_float32(monkeypatch, name, qk_norm):
    """Under bfloat16 autocast attention gets the projection, normed and turned exactly (here in
    float64) and rounded to bfloat16 once: rounded in between as well, many numbers would differ."""
    model, T, seen = make_model(qk_norm=qk_norm, n_layer=1), 7, {}
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        seen.update(q=q, k=k)
        return attention(q, k, v, **kwargs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    layer = model.layers[0].self_attn
    projection = getattr(layer, f"{name}_proj")
    projection.register_forward_hook(lambda module, inputs, output: seen.update(projected=output))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.tensor([PROMPTS[2]]))
    assert seen[name].dtype == seen["projected"].dtype == torch.bfloat16
    x = seen["projected"].double().view(T, 4, 8)
    if qk_norm:
        weight = getattr(layer, f"{name}_norm").weight.detach().double()
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    angle = torch.arange(T)[:, None] * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)    # (T, hd/2)
    turn = torch.polar(torch.ones(()).double(), angle)[:, None]                     # (T, 1, hd/2)
    turned = torch.complex(x[..., :4], x[..., 4:]) * turn                           # (T, nh, hd/2)
    expected = torch.cat([turned.real, turned.imag], dim=-1).transpose(0, 1)        # (nh, T, hd)
    assert torch.equal(seen[name][0], expected.to(torch.bfloat16))


# -- float64 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_float64_model_is_float64_throughout(shape):
    """model.double() equals its transcription to 1e-12, in every path: nothing on the way is
    rounded to float32. (The table of angles is made in float32 and is made anew here.)"""
    model = make_model(**shape).double()
    hd = model.config.head_dim
    angles = torch.arange(32)[:, None] * 100.0 ** (-torch.arange(0, hd, 2).double() / hd)
    model.cos.copy_(angles.cos()), model.sin.copy_(angles.sin())
    expected = [reference_llama(model, p + c)[len(p) - 1:-1] for p, c in zip(PROMPTS, COMPLETIONS)]
    paths = [model.completion_logits(*batch(prompts=prompts), index)
             for prompts, index in PATHS.values()]
    for logits in (one_by_one(model), *paths):
        for row, right in zip(logits, expected):
            assert row.dtype == torch.float64
            torch.testing.assert_close(row[:len(right)].detach(), right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_float64_model_samples_and_judges_in_float64(temperature):
    """Its samples bring float64 log-probabilities, those of re-scoring to 1e-12 (0 where greedy);
    a critic made from it is float64, and one made from a float32 model is float32."""
    model = make_model().double()
    ids, mask = pad(PROMPTS, "left")
    s = model.generate(ids, mask, 6, EOS, PAD, temperature=temperature,
                       generator=torch.Generator().manual_seed(0))
    logits = model.completion_logits(ids, mask, s.completion_ids, s.completion_mask)
    scored = logits.log_softmax(-1).gather(-1, s.completion_ids[..., None]).squeeze(-1)
    expected = scored * s.completion_mask * temperature
    assert s.logprobs.dtype == torch.float64
    torch.testing.assert_close(s.logprobs, expected.detach(), rtol=0, atol=1e-12)
    assert {p.dtype for p in model.with_scalar_head().parameters()} == {torch.float64}
    assert {p.dtype for p in make_model().with_scalar_head().parameters()} == {torch.float32}
    assert sample(torch.zeros(1, 4), temperature=temperature)[1].dtype == torch.float32
