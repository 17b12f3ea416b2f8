"""The model: sampling, scoring and plain reading agree; nothing leaks; the block is Llama's; the numbers add up.

The models are tiny and untrained, with a vocabulary of 8 tokens of which EOS is one, so that completions end at
different times. Tolerances: float32 in another order of operations differs by about 1e-6; 1e-4 is allowed.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig, InputError, check, sample

EOS, PAD = 6, 7
PROMPTS = [[6, 1, 2, 3], [6, 5], [6, 4, 4, 0, 2, 1, 3]]
COMPLETIONS = [[3, 6], [1, 2, 0, 5, 6], [4, 4, 1]]     # the last one ran out of tokens before EOS
# Where there are as many prompts as completions, the two are read side by side; with a fourth
# prompt, which has no answer, the prompts are read first and the completions look back at them.
PATHS = {"side by side": (PROMPTS, None), "with an index": (PROMPTS, torch.arange(3)),
         "looking back": (PROMPTS + [[6, 2, 2, 5]], torch.arange(3))}
CLOSE = dict(rtol=0, atol=1e-4)
SHAPES = [dict(), dict(n_kv_head=2, qkv_bias=True, qk_norm=False, tie_embeddings=False), dict(n_kv_head=1, head_dim=6)]


def make_model(eos_bias=0.0, **changes):
    """A small model whose every parameter is random, norms and biases too. eos_bias is added to the logit of EOS."""
    torch.manual_seed(0)
    shape = dict(vocab_size=8, block_size=32, n_layer=2, n_head=4, n_embd=32, n_hidden=48)
    model = GPT(GPTConfig(**{**shape, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    if eos_bias:
        bias = eos_bias * (torch.arange(model.config.vocab_size) == EOS)
        model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    return model


def pad(rows, side, pad_id=PAD, extra=0):
    """Lists of tokens -> ids and mask, padded on the `left` or the `right` to the longest and `extra` columns more."""
    width = max(map(len, rows)) + extra
    blank = [width - len(row) for row in rows]
    if side == "left":
        ids, mask = zip(*(([pad_id] * n + row, [False] * n + [True] * len(row)) for n, row in zip(blank, rows)))
    else:
        ids, mask = zip(*((row + [pad_id] * n, [True] * len(row) + [False] * n) for n, row in zip(blank, rows)))
    return torch.tensor(ids), torch.tensor(mask)


def batch(pad_id=PAD, extra=0, prompts=PROMPTS, completions=COMPLETIONS):
    return (*pad(prompts, "left", pad_id, extra), *pad(completions, "right", pad_id, extra))


def one_by_one(model, prompts=PROMPTS, completions=COMPLETIONS):
    """The reference for every batched path: read prompt + completion alone, unpadded. -> list of logits (len, V)"""
    return [model(torch.tensor([p + c]))[0, len(p) - 1:-1] for p, c in zip(prompts, completions)]


# -- sampling against scoring -----------------------------------------------------------------------------------------


def truncate(probabilities, top_k, top_p):
    """The distribution that top_k and then top_p leave of one row, one token after the other, likeliest first."""
    kept, left = [], [0.0] * len(probabilities)
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[:top_k or None]
    mass = sum(probabilities[i] for i in order)
    for i in order:
        if kept and sum(probabilities[j] for j in kept) / mass >= top_p:
            break
        kept.append(i)
    for i in kept:
        left[i] = probabilities[i] / sum(probabilities[j] for j in kept)
    return left


@pytest.mark.parametrize("temperature, top_k, top_p",
                         [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 3, 1.0), (0.8, 0, 0.7), (1.2, 4, 0.8)])
def test_sampled_logprobs_are_those_of_the_full_forward(temperature, top_k, top_p):
    """At every position of every row, the sampler's log-probability is the one that re-scoring finds, to 1e-4."""
    model, G = make_model(n_kv_head=2, qkv_bias=True), 8
    ids, mask = pad(PROMPTS, "left")
    s = model.generate(ids, mask, 16, EOS, PAD, G, temperature, top_k, top_p, torch.Generator().manual_seed(1))
    assert len(set(s.completion_mask.sum(-1).tolist())) >= 4          # rows do end at different times
    owner = torch.arange(len(PROMPTS) * G) // G
    logits = model.completion_logits(ids, mask, s.completion_ids, s.completion_mask, owner)
    for b, t in s.completion_mask.nonzero().tolist():
        left = truncate((logits[b, t] / temperature).softmax(-1).tolist(), top_k, top_p)
        assert left[s.completion_ids[b, t]] > 0
        assert math.log(left[s.completion_ids[b, t]]) == pytest.approx(s.logprobs[b, t].item(), abs=1e-4)


def test_greedy_is_the_argmax_of_a_full_forward_at_every_step():
    """Temperature 0 writes what one gets by re-reading everything for each token and taking the likeliest."""
    model, limit = make_model(eos_bias=1.0), 10
    s = model.generate(*pad(PROMPTS, "left"), limit, EOS, PAD, temperature=0)
    lengths = set()
    for b, prompt in enumerate(PROMPTS):
        written = []
        while len(written) < limit and EOS not in written:
            written.append(int(model(torch.tensor([prompt + written]))[0, -1].argmax()))
        assert s.completion_ids[b, s.completion_mask[b]].tolist() == written
        lengths.add(len(written))
    assert len(lengths) > 1                                           # the prompts are answered differently
    assert s.logprobs.eq(0).all()                                     # a certain choice has probability 1


@pytest.mark.parametrize("eos_bias", [2.0, 0.0, -100.0])
def test_eos_is_kept_and_ends_the_row(eos_bias):
    """A row is real tokens up to its EOS or to max_new_tokens, then padding; `truncated` tells the two apart."""
    limit = 12
    generator = torch.Generator().manual_seed(0)
    s = make_model(eos_bias).generate(*pad(PROMPTS, "left"), limit, EOS, PAD, 6, generator=generator)
    ends = []
    for ids, mask, truncated, logprobs in zip(*(field.tolist() for field in s)):
        n = ids.index(EOS) + 1 if EOS in ids else limit
        assert mask == [True] * n + [False] * (len(ids) - n)
        assert ids[n:] == [PAD] * (len(ids) - n) and logprobs[n:] == [0.0] * (len(ids) - n)
        assert all(lp < 0 for lp in logprobs[:n])
        assert truncated == (EOS not in ids)
        ends.append(n)
    assert len(ends) == 18 and s.completion_ids.shape[1] == max(ends)     # as wide as the longest and no wider
    assert s.truncated.float().mean() == {2.0: 0, 0.0: pytest.approx(0.3, abs=0.25), -100.0: 1}[eos_bias]


def test_eos_as_the_last_allowed_token_is_not_truncation():
    """An answer whose EOS is the very last token that fits is complete."""
    s = make_model(eos_bias=100.0).generate(*pad(PROMPTS, "left"), 1, EOS, PAD)
    assert s.completion_ids.tolist() == [[EOS]] * 3 and not s.truncated.any()


def test_row_b_answers_prompt_b_over_num_generations():
    """The rows of a prompt stand together, in the order of the prompts."""
    model = make_model(eos_bias=-100.0)
    alone = [model.generate(torch.tensor([p]), torch.ones(1, len(p), dtype=torch.bool), 8, EOS, PAD, temperature=0)
             .completion_ids[0].tolist() for p in PROMPTS]
    together = model.generate(*pad(PROMPTS, "left"), 8, EOS, PAD, 3, temperature=0).completion_ids.tolist()
    assert alone[0] != alone[1] != alone[2] != alone[0]
    assert together == [alone[b // 3] for b in range(9)]


def test_the_generator_decides_the_samples():
    """The same seed draws the same completions, another seed draws others."""
    model, prompts = make_model(), pad(PROMPTS, "left")
    a, b, c = (model.generate(*prompts, 8, EOS, PAD, 4, generator=torch.Generator().manual_seed(seed))
               .completion_ids.tolist() for seed in (1, 1, 2))
    assert a == b != c


def test_too_long_for_the_context_is_an_input_error():
    """A prompt and its completion may fill block_size exactly; one token more is refused, sampling or scoring."""
    model = make_model(block_size=10, eos_bias=-100.0)
    ids, mask = pad([[6, 1, 2, 3]], "left")
    s = model.generate(ids, mask, 6, EOS, PAD)
    assert s.completion_ids.shape == (1, 6)
    assert model.completion_logits(ids, mask, *s[:2]).shape == (1, 6, 8)
    with pytest.raises(InputError, match="block_size 10"):
        model.generate(ids, mask, 7, EOS, PAD)
    with pytest.raises(InputError, match="block_size 10"):
        model.completion_logits(ids, mask, *pad([[1] * 7], "right"))


# -- sample -----------------------------------------------------------------------------------------------------------


def draw(probabilities, n=20000, **kwargs):
    """n draws from one row of probabilities: their frequencies, and the log-probability that came with each token."""
    logits = torch.tensor(probabilities).log().expand(n, -1)
    token, logprob = sample(logits, generator=torch.Generator().manual_seed(0), **kwargs)
    return torch.bincount(token, minlength=len(probabilities)) / n, dict(zip(token.tolist(), logprob.tolist()))


@pytest.mark.parametrize("probabilities, kwargs, expected", [
    ([.5, .3, .15, .05], dict(), [.5, .3, .15, .05]),
    ([.64, .16, .16, .04], dict(temperature=2.0), [8 / 18, 4 / 18, 4 / 18, 2 / 18]),       # square roots, normalised
    ([.5, .3, .2], dict(top_k=2), [.625, .375, 0]),
    ([.2, .5, .3], dict(top_k=1), [0, 1, 0]),
    ([.2, .3, .5], dict(top_k=9), [.2, .3, .5]),                      # more than there are: all of them
    ([.2, .3, .5], dict(top_p=.6), [0, .375, .625]),                  # .5 alone does not reach .6
    ([.2, .3, .5], dict(top_p=.4), [0, 0, 1]),
    ([.2, .3, .5], dict(top_p=0.0), [0, 0, 1]),                       # the likeliest always stays
    ([.1, .2, .3, .4], dict(top_k=3, top_p=.75), [0, 0, 3 / 7, 4 / 7]),   # of 4/9, 3/9, 2/9 two already reach .75
])
def test_draws_follow_the_distribution(probabilities, kwargs, expected):
    """20,000 draws come as often as they should, to 0.02, and bring the logarithm of just that probability."""
    frequency, logprob = draw(probabilities, **kwargs)
    assert frequency.tolist() == pytest.approx(expected, abs=0.02)
    assert set(logprob) == {i for i, p in enumerate(expected) if p > 0}   # what has probability 0 never comes
    for i, lp in logprob.items():
        assert lp == pytest.approx(math.log(expected[i]), abs=1e-5)


def test_each_row_is_cut_by_its_own_order():
    """top_k and top_p look at every row by itself."""
    logits = torch.tensor([[.7, .2, .1], [.1, .2, .7], [.2, .7, .1]]).log().repeat(300, 1)
    for kwargs in (dict(top_k=1), dict(top_p=.5), dict(temperature=0)):
        assert sample(logits, **kwargs)[0].view(300, 3).unique(dim=0).tolist() == [[0, 2, 1]]


@pytest.mark.parametrize("u, expected", [(0.0, 1), (1 - 2 ** -24, 3)])       # the ends of torch.rand's range
def test_no_uniform_draw_picks_an_impossible_token(monkeypatch, u, expected):
    """Even at the ends of the uniform range a token of probability 0 is not drawn, nor one beyond the vocabulary."""
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, u))
    token, logprob = sample(torch.tensor([[0, .3, .3, .4, 0, 0]]).log())
    assert token.item() == expected and logprob.item() > -2
    assert sample(torch.zeros(1, 50000))[0].item() < 50000


# -- the three ways to score a completion -----------------------------------------------------------------------------


@pytest.mark.parametrize("skip_padding", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_gives_the_same_logits_and_gradients(shape, skip_padding):
    """Side by side, looking back at a shared prompt, or one by one without padding: the same values and gradients."""
    model, weight = make_model(**shape), torch.randn(3, 5, 8)
    model.skip_padding = skip_padding
    shared = [PROMPTS[0], PROMPTS[2]], [0, 0, 1]              # two prompts; two completions for the first
    prompts = [shared[0][i] for i in shared[1]]
    completion_ids, completion_mask = pad(COMPLETIONS, "right")
    results = []
    for path in ("one by one", "side by side", "shared prompt"):
        if path == "one by one":
            rows = one_by_one(model, prompts)
        elif path == "side by side":
            logits = model.completion_logits(*pad(prompts, "left"), completion_ids, completion_mask)
            rows = [row[m] for row, m in zip(logits, completion_mask)]
        else:
            prompt_ids, prompt_mask = pad(shared[0], "left")
            logits = model.completion_logits(prompt_ids, prompt_mask, completion_ids, completion_mask,
                                             torch.tensor(shared[1]))
            rows = [row[m] for row, m in zip(logits, completion_mask)]
        loss = sum((row.log_softmax(-1) * w[:len(row)]).sum() for row, w in zip(rows, weight))
        results.append((torch.cat(rows).detach(), torch.autograd.grad(loss, list(model.parameters()))))
    (values, gradients), others = results[0], results[1:]
    for other_values, other_gradients in others:
        torch.testing.assert_close(other_values, values, **CLOSE)
        for gradient, expected in zip(other_gradients, gradients):
            torch.testing.assert_close(gradient, expected, **CLOSE)


@pytest.mark.parametrize("skip_padding", [True, False])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pad_id, extra", [(PAD, 4), (EOS, 0), (4, 3)])   # 4 is an ordinary token of the prompts
def test_padding_changes_nothing(pad_id, extra, path, skip_padding):
    """Neither the width of the padding nor its id, which may be that of a real token, reaches a logit."""
    model = make_model()
    model.skip_padding = skip_padding
    prompts, prompt_index = PATHS[path]
    logits = model.completion_logits(*batch(pad_id, extra, prompts), prompt_index)
    for row, expected in zip(logits, one_by_one(model)):
        torch.testing.assert_close(row[:len(expected)], expected, **CLOSE)


def test_prompts_may_be_padded_on_either_side():
    """A row reads the same whether its padding stands on the left or on the right."""
    model = make_model()
    (left, left_mask), (right, right_mask) = pad(PROMPTS, "left"), pad(PROMPTS, "right")
    a, b = model(left, left_mask)[left_mask], model(right, right_mask)[right_mask]
    torch.testing.assert_close(a, b, **CLOSE)
    torch.testing.assert_close(a, torch.cat([model(torch.tensor([p]))[0] for p in PROMPTS]), **CLOSE)


def test_the_order_of_the_batch_changes_nothing():
    """Shuffling the rows shuffles the logits and no more."""
    model, order = make_model(), torch.tensor([2, 0, 1])
    for prompts, index in PATHS.values():
        rows = batch(prompts=prompts)
        expected = model.completion_logits(*rows, index)[order]
        moved = [r[[2, 0, 1, 3][:len(r)]] for r in rows]              # a fourth prompt stays fourth
        torch.testing.assert_close(model.completion_logits(*moved, index), expected, **CLOSE)


def test_prompt_index_pairs_completions_with_prompts_in_any_order():
    """prompt_index may name prompts out of order and leave some out."""
    model, index = make_model(), [2, 0, 2]
    logits = model.completion_logits(*pad(PROMPTS, "left"), *pad(COMPLETIONS, "right"), torch.tensor(index))
    for row, expected in zip(logits, one_by_one(model, [PROMPTS[i] for i in index])):
        torch.testing.assert_close(row[:len(expected)], expected, **CLOSE)


def test_a_single_completion_token_is_predicted_at_the_end_of_the_prompt():
    """The shift by one: token 0 is predicted from the prompt's last column, in both paths."""
    model = make_model()
    expected = torch.stack([model(torch.tensor([p]))[0, -1] for p in PROMPTS])
    for prompts, index in PATHS.values():
        completions = pad([[EOS], [1], [2]], "right")
        logits = model.completion_logits(*pad(prompts, "left"), *completions, index)
        torch.testing.assert_close(logits[:, 0], expected, **CLOSE)


def test_forward_positions_is_a_slice_of_all_logits():
    """Asking for some columns gives those columns of the whole."""
    model, (ids, mask) = make_model(), pad(PROMPTS, "left")
    for columns in (slice(-1, None), slice(2, 5), slice(None)):
        torch.testing.assert_close(model(ids, mask, positions=columns), model(ids, mask)[:, columns], **CLOSE)


# -- no leaks ---------------------------------------------------------------------------------------------------------


def test_a_token_changes_what_follows_it_and_nothing_before():
    """Changing token 4 leaves logits 0 to 3 as they were and changes logits 4 and later."""
    model, ids = make_model(), torch.tensor([[6, 1, 2, 3, 4, 5, 0]])
    changed = ids.clone()
    changed[0, 4] = 1
    moved = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert moved[:4].max() < 1e-6 and moved[4:].min() > 1e-3


@pytest.mark.parametrize("row, column", [(0, 5), (1, 6), (2, 3)])
def test_gradients_reach_only_the_real_tokens_up_to_here(row, column):
    """The logits at one place send gradients to its row's real tokens up to it, and exactly none to any other cell."""
    model, (ids, mask) = make_model(), pad(PROMPTS, "left")
    model.skip_padding = False                                        # so that every cell has an embedding
    embeddings = []
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: embeddings.append(output))
    logits = model(ids, mask)
    gradient, = torch.autograd.grad(logits[row, column].square().sum(), embeddings[0])
    reached = gradient.view(*ids.shape, -1).abs().sum(-1) > 0
    expected = mask.clone()
    expected[[r for r in range(3) if r != row]] = False
    expected[:, column + 1:] = False
    assert reached.tolist() == expected.tolist()


def test_no_query_is_left_with_nothing_to_look_at(monkeypatch):
    """Even a query on padding sees itself: the softmax of an empty row is 0/0, whose nan some kernels would spread."""
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask, **kwargs):
        masks.append(attn_mask)
        return attention(q, k, v, attn_mask=attn_mask, **kwargs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = make_model()
    for prompts, index in PATHS.values():
        model.completion_logits(*batch(prompts=prompts), index)
    model.generate(*pad(PROMPTS, "left"), 4, EOS, PAD)
    assert len(masks) > 4 and all(mask.any(-1).all() for mask in masks)


# -- the architecture -------------------------------------------------------------------------------------------------


def reference_llama(model, tokens):
    """Llama, written out: loops over heads and positions, one softmax at a time. tokens (T,) -> logits (T, V)"""
    w, c = model.state_dict(), model.config
    group, hd = c.n_head // c.n_kv_head, c.head_dim

    def norm(x, weight):
        return x / (x.pow(2).mean() + c.norm_eps).sqrt() * weight

    def turn(x, position):                                            # rotate-half: i is paired with i + hd/2
        out = x.clone()
        for i in range(hd // 2):
            angle = position * c.rope_theta ** (-2 * i / hd)
            out[i] = x[i] * math.cos(angle) - x[i + hd // 2] * math.sin(angle)
            out[i + hd // 2] = x[i + hd // 2] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    def project(x, layer, name, heads, position=None):                # one (hd,) vector a head
        name = f"{layer}.self_attn.{name}"
        out = (w[f"{name}_proj.weight"] @ x + w.get(f"{name}_proj.bias", 0)).view(heads, hd)
        if position is None:
            return out
        if c.qk_norm:
            out = [norm(head, w[f"{name}_norm.weight"]) for head in out]
        return [turn(head, position) for head in out]

    xs = [w["embed_tokens.weight"][t] for t in tokens]
    for layer in (f"layers.{i}" for i in range(c.n_layer)):
        inputs = [norm(x, w[f"{layer}.input_layernorm.weight"]) for x in xs]
        queries = [project(x, layer, "q", c.n_head, t) for t, x in enumerate(inputs)]
        keys = [project(x, layer, "k", c.n_kv_head, t) for t, x in enumerate(inputs)]
        values = [project(x, layer, "v", c.n_kv_head) for x in inputs]
        for t in range(len(xs)):
            heads = []
            for h in range(c.n_head):
                scores = torch.stack([queries[t][h] @ keys[s][h // group] for s in range(t + 1)]) / math.sqrt(hd)
                heads.append(sum(p * values[s][h // group] for s, p in enumerate(scores.softmax(0))))
            xs[t] = xs[t] + w[f"{layer}.self_attn.o_proj.weight"] @ torch.cat(heads)
            x = norm(xs[t], w[f"{layer}.post_attention_layernorm.weight"])
            gate, up = w[f"{layer}.mlp.gate_proj.weight"] @ x, w[f"{layer}.mlp.up_proj.weight"] @ x
            xs[t] = xs[t] + w[f"{layer}.mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
    return torch.stack([w["lm_head.weight"] @ norm(x, w["norm.weight"]) for x in xs])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_is_llama_written_out(shape):
    """The model equals a plain transcription of the Llama block, with Qwen's biases and norms where asked for."""
    model, tokens = make_model(**shape), [6, 1, 5, 0, 2, 2, 7]
    torch.testing.assert_close(model(torch.tensor([tokens]))[0].detach(), reference_llama(model, tokens), **CLOSE)


def test_grouped_queries_equal_full_attention_with_repeated_keys_and_values():
    """Two key/value heads shared by four query heads are four heads whose keys and values come in equal pairs."""
    grouped, full = make_model(n_kv_head=2, qkv_bias=True), make_model(n_kv_head=4, qkv_bias=True)
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            heads = weights[name].unflatten(0, (2, 8))                # (2 heads, head size 8, ...)
            weights[name] = heads[[0, 0, 1, 1]].flatten(0, 1)
    full.load_state_dict(weights)
    ids, mask = pad(PROMPTS, "left")
    torch.testing.assert_close(full(ids, mask)[mask], grouped(ids, mask)[mask], **CLOSE)


def test_only_distances_matter():
    """Adding a constant to every position changes no logit (to 1e-4); doubling the distances does."""
    model, ids, positions = make_model(), torch.tensor([PROMPTS[2]]), torch.arange(7)[None]
    torch.testing.assert_close(model(ids, position_ids=positions + 20), model(ids, position_ids=positions), **CLOSE)
    assert (model(ids, position_ids=positions * 2) - model(ids)).abs().max() > 0.01


def test_tied_embeddings_are_one_matrix():
    """Tied, the head is the embedding itself and counts once; untied, they are two matrices."""
    tied, untied = make_model(), make_model(tie_embeddings=False)
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == 8 * 32


def test_optional_parameters_exist_where_asked_for():
    """qkv_bias adds three biases a layer, qk_norm two norms a layer; both go when they are turned off."""
    for bias in (True, False):
        for norm in (True, False):
            names = [n for n, _ in make_model(qkv_bias=bias, qk_norm=norm).named_parameters()]
            assert sum(n.endswith("_proj.bias") for n in names) == 6 * bias
            assert sum("q_norm" in n or "k_norm" in n for n in names) == 4 * norm


# -- numbers ----------------------------------------------------------------------------------------------------------


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
    by_hand = 8 * 16 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16 + 2 * 8     # embedding, attention, MLP, norms, q and k norms
    assert GPT(GPTConfig(**shape)).num_parameters() == by_hand == 2752
    assert GPT(GPTConfig(**shape, n_kv_head=1)).num_parameters() == by_hand - 2 * 8 * 16
    for tied in (True, False):                                        # 6 N + 12 layers x heads x head size x T
        assert GPT(GPTConfig(**shape, tie_embeddings=tied)).flops_per_token(10) == 6 * 2752 + 12 * 1 * 2 * 8 * 10


def test_weight_decay_shrinks_matrices_only():
    """With gradients of zero, a step of the optimizer shrinks every matrix by 1 - lr x decay and moves nothing else."""
    model = make_model(qkv_bias=True)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = model.configure_optimizer(learning_rate=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p.detach(), old * 0.95 if p.dim() == 2 else old)


def test_the_optimizer_gets_its_settings():
    """Learning rate, betas and eps are AdamW's in both groups, the decay is that of the matrices;
    the parameters of another network are trained beside the model's own, each once."""
    model, other = make_model(qkv_bias=True), make_model().with_scalar_head()
    optimizer = model.configure_optimizer(0.3, 0.2, betas=(0.7, 0.8), eps=1e-3, others=(other,))
    for group, weight_decay in zip(optimizer.param_groups, (0.2, 0.0)):
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.7, 0.8), 1e-3)
        assert group["weight_decay"] == weight_decay
    matrices, rest = (group["params"] for group in optimizer.param_groups)
    assert all(p.dim() == 2 for p in matrices) and all(p.dim() == 1 for p in rest)
    everything = [*model.parameters(), *other.parameters()]
    assert len(matrices) + len(rest) == len(everything)
    assert {id(p) for p in matrices + rest} == {id(p) for p in everything}


def test_the_first_step_of_the_optimizer_worked_by_hand():
    """After one step from a gradient g the bias-corrected moments are g and g^2: a norm's weight
    moves by lr g / (|g| + eps), whatever the betas; after a second step, from a gradient of 0, the
    moments are g b1 (1 - b1) / (1 - b1^2) and g^2 b2 (1 - b2) / (1 - b2^2)."""
    for betas in ((0.9, 0.95), (0.5, 0.75)):
        model = make_model()
        optimizer = model.configure_optimizer(0.1, 0.0, betas=betas, eps=1.0)
        weight, (b1, b2) = model.norm.weight, betas
        start = weight.detach().clone()
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), start - 0.1 * 2 / (2 + 1))
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        first = 2 * b1 * (1 - b1) / (1 - b1 ** 2)
        second = 2 * math.sqrt(b2 * (1 - b2) / (1 - b2 ** 2))
        torch.testing.assert_close(weight.detach(), start - 0.1 * (2 / 3 + first / (second + 1)))


def test_a_scalar_head_is_a_copy_that_says_0():
    """A critic reads like its model, has one number a position, at first 0, and weights of its own;
    a critic made from a critic is a copy that can be trained."""
    model, (ids, mask) = make_model(), pad(PROMPTS, "left")
    model.skip_padding = False
    critic = model.with_scalar_head()
    assert critic(ids, mask).shape == (*ids.shape, 1) and critic(ids, mask).eq(0).all()
    hidden, expected = (network.hidden_states(ids, mask)[0] for network in (critic, model))
    torch.testing.assert_close(hidden, expected)
    assert not critic.skip_padding and not model.config.scalar_head and critic.config.scalar_head
    with torch.no_grad():
        critic.lm_head.weight.fill_(1.0), critic.norm.weight.add_(1.0)
    assert not torch.equal(critic.norm.weight, model.norm.weight)
    again = critic.requires_grad_(False).with_scalar_head()
    assert torch.equal(again(ids, mask), critic(ids, mask)) and again is not critic
    assert all(p.requires_grad for p in again.parameters())


def test_the_default_model_is_the_one_of_the_readme():
    """123,392 parameters, contexts of 128 tokens, theta 100, eps 1e-6, norms on q and k."""
    model = GPT(GPTConfig())
    assert model.num_parameters() == 123392 and model.cos.shape == (128, 8)
    config = model.config
    assert (config.rope_theta, config.norm_eps) == (100, 1e-6)
    assert (config.n_layer, config.n_head, config.n_embd) == (2, 4, 64)
    assert config.qk_norm and config.tie_embeddings and not config.qkv_bias


@pytest.mark.parametrize("names, fits, not_fits", [
    ("at_least_1", (1, 2), (0, -1)), ("at_least_0", (0, 0.5), (-1, -0.1)),
    ("above_0", (0.1, 1), (0, -1))])
def test_check_refuses_what_is_too_small(names, fits, not_fits):
    """The bounds are exact, the second of two names is looked at as well, and nan fails."""
    for value in fits:
        check(SimpleNamespace(a=1, b=value), **{names: "a b"})
    for value in (*not_fits, math.nan):
        with pytest.raises(InputError, match=f"--b {value}: .*needed"):
            check(SimpleNamespace(a=1, b=value), **{names: "a b"})


@pytest.mark.parametrize("wrong, message", [
    (dict(head_dim=-2), "head_dim and n_hidden must be at least 0"),
    (dict(n_hidden=-1), "head_dim and n_hidden must be at least 0"),
    (dict(rope_theta=0.0), "rope_theta and norm_eps above 0"), (dict(norm_eps=0.0), "above 0"),
    (dict(n_embd=65), "n_embd .65. must be divisible by n_head .4."),
    (dict(n_embd=12), "even"),                                        # heads of 3
    (dict(head_dim=7), "even"),
    (dict(n_kv_head=3), "n_head .4. must be divisible by n_kv_head .3."),
    (dict(n_kv_head=8), "n_kv_head .8."),
    (dict(n_head=0), "n_head is 0"), (dict(n_layer=0), "n_layer is 0"), (dict(n_embd=0), "n_embd is 0"),
    (dict(block_size=0), "block_size is 0"), (dict(vocab_size=-1), "vocab_size is -1"),
    (dict(n_kv_head=-2), "n_kv_head is -2"),
])
def test_impossible_shapes_are_refused(wrong, message):
    """A shape that cannot be built is an InputError that names the field and its value."""
    with pytest.raises(InputError, match=message):
        GPTConfig(**wrong)


def test_zero_means_the_usual_shape():
    """0 stands for all heads, n_embd / n_head, and 8/3 of the width in multiples of 32."""
    config = GPTConfig(n_embd=64, n_head=4)
    assert (config.n_kv_head, config.head_dim, config.n_hidden) == (4, 16, 192)
    assert GPTConfig(n_embd=96, n_head=2).n_hidden == 256             # 8/3 of 96 is 256 exactly
    assert GPTConfig(n_embd=100, n_head=2).n_hidden == 288            # 266.7, rounded up
    assert GPTConfig(n_embd=65, head_dim=8).head_dim == 8             # 65 need not be divisible


@pytest.mark.filterwarnings("ignore:Mismatch dtype")                  # PyTorch's, about RMSNorm being slower so
def test_bfloat16_scores_stay_close():
    """Under bfloat16 autocast logits are float32 and log-probabilities within 0.1 of float32's, in every path."""
    model, rows = make_model(), batch()
    mask = rows[-1]
    expected = model.completion_logits(*rows).log_softmax(-1)[mask]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(rows[0]).dtype == torch.float32
        for prompts, index in PATHS.values():
            logits = model.completion_logits(*batch(prompts=prompts), index)
            assert logits.dtype == torch.float32
            difference = (logits.log_softmax(-1)[mask] - expected).abs().max()
            assert 1e-6 < difference < 0.1                            # above 0: autocast did something
        s = model.generate(*rows[:2], 8, EOS, PAD, generator=torch.Generator().manual_seed(0))
    logprobs = model.completion_logits(*rows[:2], s.completion_ids, s.completion_mask).log_softmax(-1)
    rescored = logprobs.gather(-1, s.completion_ids[..., None]).squeeze(-1)
    assert s.logprobs.dtype == torch.float32
    assert (rescored - s.logprobs)[s.completion_mask].abs().max() < 0.1
