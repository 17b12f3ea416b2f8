"""Hidden variants of assignment 1: other numbers, other shapes, plain loops beside them."""

import pytest
import torch
from draws import SHAPES, logprobs, mask, rng

import data
import sft
from conftest import float64  # noqa: F401
from tiny import Letters, make_sft, read, same
from world import close, gradient


@pytest.mark.parametrize("B, T", SHAPES)
def test_losses_elsewhere(B, T):
    """Minus the log-probability, with its gradient, of any shape and type."""
    lp = logprobs("losses", B, T)
    found = sft.token_losses(lp)
    assert close(found, [[-x for x in row] for row in lp.tolist()])
    assert close(gradient((found * found.detach()).sum(), lp), lp)
    assert sft.token_losses(lp.detach().float()).dtype == torch.float32


@pytest.mark.parametrize("B, T", SHAPES)
def test_weights_elsewhere(B, T):
    """1/N on each of the batch's tokens, in the precision of the mask; nothing is 0/0."""
    real, lengths = mask("weights", B, T)
    by_hand = [[1 / sum(lengths) if t < n else 0 for t in range(T)] for n in lengths]
    assert close(sft.token_weights(real.double()), by_hand, 1e-15)
    assert close(sft.token_weights(real), by_hand, 1e-7)
    assert (sft.token_weights(real & False) == 0).all()


@pytest.mark.parametrize("count", [1, 4])
def test_batches_elsewhere(count):
    """Random texts, padding id among their letters: every row is read back through its mask."""
    class Tokens:
        eos_id, pad_id, encode_prompt = 5, 0, data.Tokenizer.encode_prompt

        def encode(self, text):
            return [ord(c) - 97 for c in text]
    draw = rng(f"batches {count}")
    def text(most):
        return "".join(draw.choice("abcd") for _ in range(draw.randint(0, most)))
    examples = [{"prompt": text(6), "completion": text(9), "hint_ids": [2] * draw.randint(0, 2)}
                for _ in range(count)]
    batch = data.collate(examples, Tokens())
    width = {"prompt": 0, "completion": 0}
    for i, e in enumerate(examples):
        prompt = [5] + Tokens().encode(e["prompt"]) + e["hint_ids"]
        completion = Tokens().encode(e["completion"]) + [5]
        for name, ids in (("prompt", prompt), ("completion", completion)):
            row, real = batch[f"{name}_ids"][i], batch[f"{name}_mask"][i]
            assert row[real].tolist() == ids and (row[~real] == 0).all()
            width[name] = max(width[name], len(ids))
            where = real.nonzero().flatten().tolist()
            first = 0 if name == "completion" else len(row) - len(ids)
            assert where == list(range(first, first + len(ids)))
    assert all(batch[f"{name}_ids"].shape == (count, n) for name, n in width.items())
    assert batch["prompt_index"].tolist() == list(range(count))
    alone = data.collate([{"prompt": e["prompt"]} for e in examples], Tokens())
    assert set(alone) == {"prompt_ids", "prompt_mask"}


@pytest.mark.usefixtures("float64")
def test_logprobs_elsewhere():
    """Of other texts, token by token, with the whole distribution and its gradient."""
    algo, draw = make_sft(), rng("logprobs")
    def text(least, most):
        return "".join(draw.choice("0123456789+-") for _ in range(draw.randint(least, most)))
    examples = [{"prompt": text(1, 5), "completion": text(0, 6)} for _ in range(3)]
    tokenizer, rows = Letters(), []
    for e in examples:
        prompt = [16] + tokenizer.encode(e["prompt"])
        rows.append((prompt, tokenizer.encode(e["completion"]) + [16]))
    T, Tp = max(len(c) for _, c in rows), max(len(p) for p, _ in rows)
    batch = {"prompt_ids": torch.tensor([[17] * (Tp - len(p)) + p for p, _ in rows]),
             "prompt_mask": torch.tensor([[t >= Tp - len(p) for t in range(Tp)] for p, _ in rows]),
             "completion_ids": torch.tensor([c + [17] * (T - len(c)) for _, c in rows]),
             "completion_mask": torch.tensor([[t < len(c) for t in range(T)] for _, c in rows]),
             "prompt_index": torch.arange(3)}
    found, everything = sft.token_logprobs(read(algo.model, batch), batch["completion_ids"])
    by_hand = read(algo.model, batch).log_softmax(-1)
    assert same(everything, by_hand) and found.shape == (3, T)
    for i, (_, completion) in enumerate(rows):
        for t, token in enumerate(completion):
            assert same(found[i, t], by_hand[i, t, token])
    weights = list(algo.model.parameters())
    real = batch["completion_mask"]
    ours = torch.autograd.grad((found * real).sum(), weights, allow_unused=True)
    theirs = torch.autograd.grad(sum(by_hand[i, t, c[t]] for i, (_, c) in enumerate(rows)
                                     for t in range(len(c))), weights, allow_unused=True)
    assert all(same(a, b) for a, b in zip(ours, theirs) if b is not None)
