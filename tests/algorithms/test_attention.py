"""Reading a prompt and its completion: every path and every padding gives the same logits, and no
token sees what it should not."""

import pytest
import torch

from harness.errors import InputError
from llama import (CLOSE, COMPLETIONS, EOS, PAD, PATHS, PROMPTS, SHAPES, batch, make_model,
                   one_by_one, pad)
from model import GPT, GPTConfig


# -- the three ways to score a completion ---------------------------------------------------------


@pytest.mark.parametrize("skip_padding", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_gives_the_same_logits_and_gradients(shape, skip_padding):
    """Side by side, looking back at a shared prompt, or one by one without padding: the same values
    and gradients."""
    model, weight = make_model(**shape), torch.randn(3, 5, 8)
    model.skip_padding = skip_padding
    shared = [PROMPTS[0], PROMPTS[2]], [0, 0, 1]  # two prompts; two completions for the first
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
            logits = model.completion_logits(prompt_ids, prompt_mask, completion_ids,
                                             completion_mask, torch.tensor(shared[1]))
            rows = [row[m] for row, m in zip(logits, completion_mask)]
        loss = sum((row.log_softmax(-1) * w[:len(row)]).sum() for row, w in zip(rows, weight))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((torch.cat(rows).detach(), gradients))
    (values, gradients), others = results[0], results[1:]
    for other_values, other_gradients in others:
        torch.testing.assert_close(other_values, values, **CLOSE)
        for gradient, expected in zip(other_gradients, gradients):
            torch.testing.assert_close(gradient, expected, **CLOSE)


@pytest.mark.parametrize("skip_padding", [True, False])
@pytest.mark.parametrize("path", PATHS)
# 4 is an ordinary token of the prompts
@pytest.mark.parametrize("pad_id, extra", [(PAD, 4), (EOS, 0), (4, 3)])
def test_padding_changes_nothing(pad_id, extra, path, skip_padding):
    """Neither the width of the padding nor its id, which may be that of a real token, reaches a
    logit."""
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
    alone = torch.cat([model(torch.tensor([p]))[0] for p in PROMPTS])
    torch.testing.assert_close(a, alone, **CLOSE)


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
    logits = model.completion_logits(*batch(), torch.tensor(index))
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


# -- no leaks -------------------------------------------------------------------------------------


def test_a_token_changes_what_follows_it_and_nothing_before():
    """Changing token 4 leaves logits 0 to 3 as they were and changes logits 4 and later."""
    model, ids = make_model(), torch.tensor([[6, 1, 2, 3, 4, 5, 0]])
    changed = ids.clone()
    changed[0, 4] = 1
    moved = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert moved[:4].max() < 1e-6 and moved[4:].min() > 1e-3


@pytest.mark.parametrize("row, column", [(0, 5), (1, 6), (2, 3)])
def test_gradients_reach_only_the_real_tokens_up_to_here(row, column):
    """The logits at one place send gradients to its row's real tokens up to it, and exactly none to
    any other cell."""
    model, (ids, mask) = make_model(), pad(PROMPTS, "left")
    model.skip_padding = False  # so that every cell has an embedding
    embeddings = []
    model.embed_tokens.register_forward_hook(lambda *args: embeddings.append(args[-1]))
    logits = model(ids, mask)
    gradient, = torch.autograd.grad(logits[row, column].square().sum(), embeddings[0])
    reached = gradient.view(*ids.shape, -1).abs().sum(-1) > 0
    expected = mask.clone()
    expected[[r for r in range(3) if r != row]] = False
    expected[:, column + 1:] = False
    assert reached.tolist() == expected.tolist()


def test_no_query_is_left_with_nothing_to_look_at(monkeypatch):
    """Even a query on padding sees itself: the softmax of an empty row is 0/0, whose nan some
    kernels would spread."""
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


def test_what_fits_is_read_in_a_grid_that_does_not():
    """A long prompt with a short answer beside a short prompt with a long one: their grid is wider
    than block_size, but each row fits, and is read as it would be alone. A row that does not fit is
    refused."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8))
    prompts, answers = [[1, 2, 3, 4, 5, 6], [7]], [[8, 9], [1, 2, 3, 4, 5, 6, 7]]
    prompt_ids = torch.tensor([p if len(p) == 6 else [0] * 5 + p for p in prompts])
    prompt_mask = torch.tensor([[True] * 6, [False] * 5 + [True]])
    ids = torch.tensor([a + [0] * (7 - len(a)) for a in answers])
    mask = torch.tensor([[True] * 2 + [False] * 5, [True] * 7])
    together = model.completion_logits(prompt_ids, prompt_mask, ids, mask)
    for b in range(2):
        alone = model(torch.tensor([prompts[b] + answers[b][:-1]]))[0, len(prompts[b]) - 1:]
        assert torch.allclose(together[b, :len(answers[b])], alone, atol=1e-5)
    with pytest.raises(InputError, match="longer than block_size 8"):
        model.completion_logits(prompt_ids, prompt_mask, ids, torch.ones_like(mask))


def test_gradients_do_not_depend_on_which_thread_comes_first():
    """Two thousand completions of eight prompts, on two threads: each prompt's gradient is a sum
    over its completions, added in the same order every time (that of t[index] is not,
    pytorch/pytorch#51366). So a run can be repeated, and resumed, bit for bit."""
    model, generator = make_model(n_embd=64), torch.Generator().manual_seed(4)
    B, threads = 2048, torch.get_num_threads()
    prompts = torch.randint(8, (8, 5), generator=generator)
    completions = torch.randint(8, (B, 2), generator=generator)
    inputs = (prompts, torch.ones(8, 5).bool(), completions, torch.ones(B, 2).bool(),
              torch.randint(8, (B,), generator=generator))
    weights, found = torch.randn(B, 2, 8, generator=generator), []
    torch.set_num_threads(2)
    try:
        for _ in range(8):
            loss = (model.completion_logits(*inputs) * weights).sum()
            found.append(torch.autograd.grad(loss, list(model.parameters())))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again))
