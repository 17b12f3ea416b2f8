"""Text as tensors: the order of the data, padding, rows that are taken out of a batch."""

import random

import pytest
import torch

import data
from data import Tokenizer
from harness.flags import Settings

TOKENIZER = Tokenizer("byte")
EOS, PAD = 256, 257


# -- the order of the data ------------------------------------------------------------------------


@pytest.mark.parametrize("size, batch_size", [(12, 4), (10, 4), (5, 5), (3, 8), (1, 4)])
def test_every_example_comes_once_an_epoch(size, batch_size):
    """Laid end to end, the batches are one permutation of the examples after the other, whatever
    the sizes."""
    config, steps = Settings(batch_size=batch_size), range(2 * size)
    order = [i for step in steps for i in data.batch_indices(size, config, step)]
    assert len(order) == 2 * size * batch_size
    for start in range(0, len(order), size):
        assert sorted(order[start:start + size]) == list(range(size))


def test_the_order_is_a_function_of_step_and_seed():
    """Asked again, even out of turn and with other random numbers drawn between, a step takes the
    same examples."""
    config = Settings(batch_size=8, seed=3)
    steps = [data.batch_indices(40, config, step) for step in range(10)]
    random.seed(5)
    assert [data.batch_indices(40, config, step) for step in reversed(range(10))] == steps[::-1]
    assert steps[:5] != steps[5:]                                     # another epoch, another order
    config.seed = 4
    assert steps != [data.batch_indices(40, config, step) for step in range(10)]


def test_without_shuffling_the_order_is_kept():
    """shuffle=False reads from front to back and begins again."""
    config = Settings(batch_size=3, shuffle=False)
    found = [data.batch_indices(5, config, step) for step in range(3)]
    assert found == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


def test_a_step_does_not_walk_over_all_examples(monkeypatch):
    """Reading in order takes the same time of any corpus, and an epoch is shuffled once: 2.4 ms a
    step were a tenth of pre-training."""
    config = Settings(batch_size=3, shuffle=False)
    assert data.batch_indices(10**12, config, 10**9) == [3 * 10**9 + i for i in range(3)]
    config, made, Random = Settings(batch_size=4, seed=987), [], random.Random
    monkeypatch.setattr(random, "Random", lambda seed: made.append(seed) or Random(seed))
    for step in range(20):   # four epochs
        data.batch_indices(20, config, step)
    assert made == [f"order 987 {epoch}" for epoch in range(4)]


# -- batches --------------------------------------------------------------------------------------

# Four completions of unequal length to three prompts of unequal length. Row 3 answers the first
# prompt, like row 1.
PROMPTS, COMPLETIONS = ["7+5=", "12345678=", "a="], ["long answer", "2", "xyz", "22"]
OWNER = [1, 0, 2, 0]


def make_batch():
    examples = [{"prompt": PROMPTS[i], "completion": c} for i, c in zip(OWNER, COMPLETIONS)]
    batch = data.collate(examples, TOKENIZER)
    prompts = data.collate([{"prompt": p} for p in PROMPTS], TOKENIZER)
    weights = batch["completion_mask"] * torch.arange(1.0, 5.0)[:, None]
    return {**batch, **prompts, "prompt_index": torch.tensor(OWNER), "weights": weights,
            "advantages": torch.arange(4.0), "prompt_greedy_rewards": torch.arange(3.0)}


def check_rows(batch, rows):
    """Each row still has its own prompt, completion and numbers, and no column is padding
    throughout."""
    assert len(batch["prompt_index"]) == len(rows)
    for i, row in enumerate(rows):
        p = batch["prompt_index"][i]
        prompt, completion = batch["prompt_ids"][p], batch["completion_ids"][i]
        mask = batch["completion_mask"][i]
        n = len(COMPLETIONS[row]) + 1                                 # with its <end>
        expected = [EOS] + list(PROMPTS[OWNER[row]].encode())
        assert prompt[batch["prompt_mask"][p]].tolist() == expected
        assert completion[mask].tolist() == list(COMPLETIONS[row].encode()) + [EOS]
        assert TOKENIZER.decode(completion.tolist()) == COMPLETIONS[row]
        assert batch["advantages"][i] == row and batch["prompt_greedy_rewards"][p] == OWNER[row]
        assert batch["weights"][i].tolist() == [row + 1] * n + [0] * (len(completion) - n)
    # just the prompts that are answered
    assert len(batch["prompt_ids"]) == len({OWNER[row] for row in rows})
    assert batch["prompt_mask"].any(0).all() and batch["completion_mask"].any(0).all()


def test_the_worked_example_of_the_docstring():
    """collate gives what the top of data.py shows, number by number."""
    batch = data.collate([{"prompt": "7+5=", "completion": "2"},
                          {"prompt": "1-2*3=", "completion": "7"}], TOKENIZER)
    assert {name: tensor.int().tolist() for name, tensor in batch.items()} == {
        "prompt_ids": [[257, 257, 256, 55, 43, 53, 61], [256, 49, 45, 50, 42, 51, 61]],
        "prompt_mask": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
        "completion_ids": [[50, 256], [55, 256]], "completion_mask": [[1, 1], [1, 1]],
        "prompt_index": [0, 1]}
    assert batch["prompt_mask"].dtype == batch["completion_mask"].dtype == torch.bool
    printed = "".join(data.__doc__.split())  # the numbers above are those in the file
    for shown in ("[[257,257,256,55,43,53,61],", "[256,49,45,50,42,51,61]]", "[[50,256],[55,256]]"):
        assert shown in printed


def test_collate_pads_prompts_on_the_left_and_completions_on_the_right():
    """Rows of unequal length meet where the prompt ends and the completion begins."""
    batch = data.collate([{"prompt": "", "completion": "abc"}, {"prompt": "xy", "completion": ""}],
                         TOKENIZER)
    assert batch["prompt_ids"].tolist() == [[PAD, PAD, EOS], [EOS, 120, 121]]
    assert batch["prompt_mask"].int().tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch["completion_ids"].tolist() == [[97, 98, 99, EOS], [EOS, PAD, PAD, PAD]]
    assert batch["completion_mask"].int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert set(data.collate([{"prompt": "a"}], TOKENIZER)) == {"prompt_ids", "prompt_mask"}


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3], [1, 3], [2, 1], [3, 0, 1], [2]])
def test_take_rows_keeps_rows_whole(rows):
    """Taken rows keep their own prompts, completions, weights and advantages, in the order asked
    for."""
    batch = make_batch()
    check_rows(data.take_rows(batch, torch.tensor(rows)), rows)
    check_rows(batch, [0, 1, 2, 3])  # and the batch itself is left as it was


def test_take_rows_of_rows_that_are_left_out_of_the_loss():
    """A row whose completion is masked altogether keeps one column, so that there is something to
    compute."""
    batch = make_batch()
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    assert data.take_rows(batch, torch.tensor([1]))["completion_ids"].shape == (1, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 0])
def test_split_covers_every_row_once(size):
    """Micro-batches of at most `size` rows, in order, nothing lost and nothing twice; 0 is the
    whole batch."""
    parts, start = data.split(make_batch(), size), 0
    for part in parts:
        rows = len(part["prompt_index"])
        check_rows(part, list(range(start, start + rows)))
        start += rows
        assert rows <= (size or 4)
    assert start == 4 and len(parts) == {1: 4, 2: 2, 3: 2}.get(size, 1)


@pytest.mark.parametrize("size, sizes", [(0, [4]), (1, [2, 2]), (2, [2, 2]), (3, [2, 2]), (4, [4])])
def test_split_keeps_pairs_together(size, sizes):
    """rows_together 2: chosen and rejected are never separated; a micro-batch holds at least one
    pair and, beyond that, no more rows than asked for."""
    parts, start = data.split(make_batch(), size, rows_together=2), 0
    assert [len(part["prompt_index"]) for part in parts] == sizes
    for part, rows in zip(parts, sizes):
        check_rows(part, list(range(start, start + rows)))
        start += rows


def test_no_rows_make_an_empty_batch():
    """Where nothing is left, every field is there and has no row."""
    none = data.take_rows(make_batch(), torch.arange(0))
    assert none.keys() == make_batch().keys() and {len(rows) for rows in none.values()} == {0}


def test_a_real_token_may_equal_the_pad_id():
    """The mask knows where padding is and never asks what is written there: a tokenizer whose
    padding is the letter a."""
    class Letters:
        eos_id, pad_id, encode_prompt = 26, 0, Tokenizer.encode_prompt

        def encode(self, text):
            return [ord(c) - 97 for c in text]
    examples = [{"prompt": "a", "completion": "aba"}, {"prompt": "bb", "completion": "a"}]
    batch = data.collate(examples, Letters())
    assert batch["completion_mask"].sum(-1).tolist() == [4, 2]
    assert batch["prompt_mask"].sum(-1).tolist() == [2, 3]


def test_take_rows_cuts_what_is_as_wide_as_the_completions():
    """A tensor as wide as the completions loses the same columns, one of another width none."""
    batch = make_batch()
    width = batch["completion_ids"].shape[1]
    batch["other"] = torch.arange(4.0 * (width + 1)).view(4, width + 1)
    taken = data.take_rows(batch, torch.tensor([1]))                  # `2` and its <end>
    assert torch.equal(taken["other"], batch["other"][1:2])
    assert taken["completion_ids"].shape == taken["weights"].shape == (1, 2)
