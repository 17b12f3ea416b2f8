"""The architecture is Llama's, written out; and the numbers of a model add up."""

import math
from dataclasses import make_dataclass

import pytest
import torch

from harness.errors import InputError
from harness.flags import Settings, check_bounds, flag
from llama import CLOSE, EOS, PAD, PATHS, PROMPTS, SHAPES, batch, make_model, pad
from model import GPT, GPTConfig
from written_out import reference_llama


# -- the architecture -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_is_llama_written_out(shape):
    """The model equals a plain transcription of the Llama block, with Qwen's biases and norms where
    asked for."""
    model, tokens = make_model(**shape), [6, 1, 5, 0, 2, 2, 7]
    logits = model(torch.tensor([tokens]))[0].detach()
    torch.testing.assert_close(logits, reference_llama(model, tokens), **CLOSE)


def test_grouped_queries_equal_full_attention_with_repeated_keys_and_values():
    """Two key/value heads shared by four query heads are four heads whose keys and values come in
    equal pairs."""
    grouped, full = make_model(n_kv_head=2, qkv_bias=True), make_model(n_kv_head=4, qkv_bias=True)
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            heads = weights[name].unflatten(0, (2, 8))                # (2 heads, head size 8, ...)
            weights[name] = heads[[0, 0, 1, 1]].flatten(0, 1)
    full.load_state_dict(weights)
    ids, mask = pad(PROMPTS, "left")
    torch.testing.assert_close(full(ids, mask)[mask], grouped(ids, mask)[mask], **CLOSE)


def test_tied_embeddings_are_one_matrix():
    """Tied, the head is the embedding itself and counts once; untied, they are two matrices."""
    tied, untied = make_model(), make_model(tie_embeddings=False)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == 8 * 32


def test_optional_parameters_exist_where_asked_for():
    """qkv_bias adds three biases a layer, qk_norm two norms a layer; both go when they are turned
    off."""
    for bias in (True, False):
        for norm in (True, False):
            names = [n for n, _ in make_model(qkv_bias=bias, qk_norm=norm).named_parameters()]
            assert sum(n.endswith("_proj.bias") for n in names) == 6 * bias
            assert sum("q_norm" in n or "k_norm" in n for n in names) == 4 * norm


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 256])
def test_matrices_start_with_standard_deviation_one_over_root_width(width):
    """Every matrix starts at 1/sqrt(n_embd), within a tenth; norms at 1, biases at 0."""
    model = GPT(GPTConfig(vocab_size=64, n_embd=width, n_layer=1, qkv_bias=True))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(width ** -0.5, rel=0.1), name
            assert abs(p.mean().item()) < 0.1 * width ** -0.5, name
        else:
            assert p.eq(0 if name.endswith("bias") else 1).all(), name


def test_counting_by_hand():
    """Parameters and floating-point operations of a model small enough to count on paper."""
    shape = dict(vocab_size=8, n_embd=16, n_head=2, n_hidden=32, n_layer=1)
    # embedding, attention, MLP, norms, q and k norms
    by_hand = 8 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16 + 2 * 8
    assert GPT(GPTConfig(**shape)).num_parameters() == by_hand == 2752
    assert GPT(GPTConfig(**shape, n_kv_head=1)).num_parameters() == by_hand - 2 * 8 * 16
    for tied in (True, False):  # 6 N + 12 layers x heads x head size x T
        model = GPT(GPTConfig(**shape, tie_embeddings=tied))
        assert model.flops_per_token(10) == 6 * 2752 + 12 * 1 * 2 * 8 * 10


def test_weight_decay_shrinks_matrices_only():
    """With gradients of zero, a step of the optimizer shrinks every matrix by 1 - lr x decay and
    moves nothing else."""
    model = make_model(qkv_bias=True)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = model.configure_optimizer(Settings(learning_rate=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p.detach(), old * 0.95 if p.dim() == 2 else old)


@pytest.mark.parametrize("wrong, message", [
    (dict(n_embd=65), "n_embd .65. must be divisible by n_head .4."),
    (dict(n_embd=12), "even"),                                        # heads of 3
    (dict(head_dim=7), "even"),
    (dict(n_kv_head=3), "n_head .4. must be divisible by n_kv_head .3."),
    (dict(n_kv_head=8), "n_kv_head .8."),
    (dict(n_head=0), "--n_head 0: a number of at least 1"),
    (dict(n_layer=0), "--n_layer 0: a number of at least 1"),
    (dict(n_embd=0), "--n_embd 0: a number of at least 1"),
    (dict(block_size=0), "--block_size 0: a number of at least 1"),
    (dict(vocab_size=-1), "vocab_size is -1"),
    (dict(n_kv_head=-2), "--n_kv_head -2: a number of at least 0"),
])
def test_impossible_shapes_are_refused(wrong, message):
    """A shape that cannot be built is an InputError that names the field and its value."""
    with pytest.raises(InputError, match=message):
        GPTConfig(**wrong)


def test_zero_means_the_usual_shape():
    """0 stands for all heads, n_embd / n_head, and 8/3 of the width in multiples of 32."""
    config = GPTConfig(n_embd=64, n_head=4)
    assert (config.n_kv_head, config.head_dim, config.n_hidden) == (4, 16, 192)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # PyTorch's, about RMSNorm being slower so
def test_bfloat16_scores_stay_close():
    """Under bfloat16 autocast logits are float32 and log-probabilities within 0.1 of float32's, in
    every path."""
    model, rows = make_model(), batch()
    mask = rows[-1]
    expected = model.completion_logits(*rows).log_softmax(-1)[mask]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(rows[0]).dtype == torch.float32
        for prompts, index in PATHS.values():
            logits = model.completion_logits(*batch(prompts=prompts), index)
            assert logits.dtype == torch.float32
            difference = (logits.log_softmax(-1)[mask] - expected).abs().max()
            assert 1e-6 < difference < 0.1  # above 0: autocast did something
        s = model.generate(*rows[:2], 8, EOS, PAD, generator=torch.Generator().manual_seed(0))
    logits = model.completion_logits(*rows[:2], s.completion_ids, s.completion_mask)
    rescored = logits.log_softmax(-1).gather(-1, s.completion_ids[..., None]).squeeze(-1)
    assert s.logprobs.dtype == torch.float32
    assert (rescored - s.logprobs)[s.completion_mask].abs().max() < 0.1


def test_the_default_model_is_the_one_of_the_readme():
    """123,392 parameters, contexts of 128 tokens, theta 100, eps 1e-6, norms on q and k."""
    model = GPT(GPTConfig())
    assert model.num_parameters() == 123392 and model.cos.shape == (128, 8)
    config = model.config
    assert (config.rope_theta, config.norm_eps) == (100, 1e-6)
    assert (config.n_layer, config.n_head, config.n_embd) == (2, 4, 64)
    assert config.qk_norm and config.tie_embeddings and not config.qkv_bias


@pytest.mark.parametrize("bounds, fits, not_fits", [
    (dict(at_least=1), (1, 2), (0, -1)), (dict(at_least=0), (0, 0.5), (-1, -0.1)),
    (dict(above=0), (0.1, 1), (0, -1)), (dict(below=1), (0.9, -1), (1, 2)),
    (dict(at_most=1), (1, 0.5), (1.1, 2)), (dict(at_least=0, below=1), (0, 0.9), (-0.1, 1))])
def test_check_bounds_refuses_what_is_out_of_bounds(bounds, fits, not_fits):
    """The bounds are exact, the second of two settings is looked at as well, and nan fails."""
    Two = make_dataclass("Two", [(name, float, flag(fits[0], "", **bounds)) for name in "ab"])
    for value in fits:
        check_bounds(Two(b=value))
    for value in (*not_fits, math.nan):
        with pytest.raises(InputError, match=f"--b {value}: .*needed"):
            check_bounds(Two(b=value))


# -- the optimizer --------------------------------------------------------------------------------


def test_the_optimizer_gets_its_settings():
    """Learning rate and the second beta are AdamW's in both groups, the decay is that of the
    matrices; the parameters of another network are trained beside the model's own, each once."""
    model, other = make_model(qkv_bias=True), make_model().with_scalar_head()
    config = Settings(learning_rate=0.3, weight_decay=0.2, adam_beta2=0.8)
    optimizer = model.configure_optimizer(config, other)
    for group, weight_decay in zip(optimizer.param_groups, (0.2, 0.0)):
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.9, 0.8), 1e-8)
        assert group["weight_decay"] == weight_decay
    matrices, rest = (group["params"] for group in optimizer.param_groups)
    assert all(p.dim() == 2 for p in matrices) and all(p.dim() == 1 for p in rest)
    everything = [*model.parameters(), *other.parameters()]
    assert len(matrices) + len(rest) == len(everything)
    assert {id(p) for p in matrices + rest} == {id(p) for p in everything}


@pytest.mark.parametrize("gradient", [2.0, 1e-8])                     # far above eps; equal to it
@pytest.mark.parametrize("b2", [0.95, 0.75])
def test_the_first_step_of_the_optimizer_worked_by_hand(b2, gradient):
    """After one step from a gradient g the bias-corrected moments are g and g^2: a norm's weight
    moves by lr g / (|g| + eps), whatever the betas; after a second step, from a gradient of 0, the
    moments are g b1 (1 - b1) / (1 - b1^2) and g^2 b2 (1 - b2) / (1 - b2^2)."""
    model, b1, eps = make_model(), 0.9, 1e-8
    optimizer = model.configure_optimizer(Settings(learning_rate=0.1, adam_beta2=b2))
    weight = model.norm.weight
    start = weight.detach().clone()
    weight.grad = torch.full_like(weight, gradient)
    optimizer.step()
    one = gradient / (gradient + eps)
    torch.testing.assert_close(weight.detach(), start - 0.1 * one)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    first = gradient * b1 * (1 - b1) / (1 - b1 ** 2)
    second = gradient * math.sqrt(b2 * (1 - b2) / (1 - b2 ** 2))
    torch.testing.assert_close(weight.detach(), start - 0.1 * (one + first / (second + eps)))
