"""
Answers that go on from a part of a demonstration: how they are put together, that they are the
policy's own after it, and which hints the hybrids give.
"""

import pytest
import torch

import data
from data import after_hints, concatenate, take_rows
from harness.log import Log
from tiny import PROBLEMS, Letters, coin, read, same, sample, texts
from tiny_hybrid import make_hybrid

ENCODE, END, PAD = Letters().encode, Letters.eos_id, Letters.pad_id
HINTED = [{**problem, "hint_ids": ENCODE(hint)}
          for problem, hint in zip(PROBLEMS, ("7+", "", "9*9=1"))]


# -- batches ---------------------------------------------------------------------------------------


def test_after_hints_worked_example():
    """[5] and [6, 7], then [1, 2] and [3, pad] (docstring of after_hints)."""
    answers = {"completion_ids": torch.tensor([[1, 2], [3, 9]]),
               "completion_mask": torch.tensor([[True, True], [True, False]]),
               "truncated": torch.tensor([False, False])}
    found = after_hints([[5], [6, 7]], answers, 3, 9)
    assert found["completion_ids"].tolist() == [[5, 1, 2], [6, 7, 3]]
    assert found["completion_mask"].all() and not found["truncated"].any()
    assert found["demonstrated"].tolist() == [[True, False, False], [True, True, False]]
    cut = after_hints([[5], [6, 7]], answers, 2, 9)     # both lose a token, and so are truncated
    assert cut["completion_ids"].tolist() == [[5, 1], [6, 7]] and cut["truncated"].all()
    room = after_hints([[5], [6, 7]], answers, 9, 9)
    assert room["completion_ids"].tolist() == [[5, 1, 2, 9], [6, 7, 3, 9]]
    assert room["completion_mask"].sum(-1).tolist() == [3, 3]


def test_after_no_hints():
    """Empty hints leave everything as it was, and nothing is demonstrated."""
    answers = {"completion_ids": torch.tensor([[1, 2], [3, 9]]),
               "completion_mask": torch.tensor([[True, True], [True, False]]),
               "truncated": torch.tensor([True, False])}
    found = after_hints([[], []], answers, 2, 9)
    assert all(torch.equal(found[name], answers[name]) for name in answers)
    assert not found["demonstrated"].any()


def test_a_concatenation_gives_back_its_parts():
    """The rows of two batches of other widths, prompts padded on the left and answers on the
    right: taken apart again they are the batches that they were."""
    first = data.collate([{"prompt": "7+5=", "completion": "2"},
                          {"prompt": "1-2*3=", "completion": "1-2=9;9*3=7"}], Letters())
    second = data.collate([{"prompt": "0+1=", "completion": "0+1=1"}], Letters())
    first |= {"rewards": torch.tensor([0.0, 1.0]), "here": torch.zeros(2)}
    second |= {"rewards": torch.tensor([0.5])}
    both = concatenate(first, second, PAD)
    assert "here" not in both and both["prompt_index"].tolist() == [0, 1, 2]
    assert both["prompt_ids"][2].tolist() == [PAD, PAD, END, *ENCODE("0+1=")]
    assert both["completion_ids"][2].tolist() == [*ENCODE("0+1=1"), END] + [PAD] * 6
    for rows, part in ((slice(0, 2), first), (slice(2, 3), second)):
        taken = take_rows(both, torch.arange(3)[rows])
        assert taken.keys() | {"here"} == part.keys() | {"here"}
        assert all(torch.equal(taken[name], part[name]) for name in taken)
    swapped = concatenate(second, first, PAD)                # the narrower one first
    assert torch.equal(take_rows(swapped, torch.arange(1, 3))["completion_ids"],
                       first["completion_ids"])
    assert texts(swapped) == texts(second) + texts(first)


# -- rollouts after hints --------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_follows_a_hint_is_the_policys_own(temperature):
    """The same draws as the sampler's after prompt and hint, cut at max_new_tokens; scored as the
    answer is trained, from the prompt on, they have the log-probabilities of the sampler. The
    hint's are at temperature 1, as a demonstrator's."""
    algo, log = make_hybrid(temperature=temperature), Log()
    longest = algo.task.max_new_tokens
    batch = data.rollout(algo.model, algo, HINTED, torch.Generator().manual_seed(0), log)
    prompts = data.collate([{"prompt": e["prompt"], "hint_ids": e["hint_ids"]} for e in HINTED],
                           Letters())
    samples = algo.model.generate(prompts["prompt_ids"], prompts["prompt_mask"], longest, END, PAD,
                                  4, temperature, generator=torch.Generator().manual_seed(0))
    logprobs, _ = algo.logprobs(algo.model, batch)
    ids = batch["completion_ids"][..., None]
    plain = read(algo.model, batch).log_softmax(-1).gather(-1, ids)[..., 0]
    for b in range(12):
        hint = HINTED[b // 4]["hint_ids"]
        n, written = len(hint), int(samples.completion_mask[b].sum())
        kept = min(written, longest - n)
        drawn = samples.completion_ids[b, :kept].tolist()
        found = batch["completion_ids"][b][batch["completion_mask"][b]].tolist()
        assert found == hint + drawn and batch["demonstrated"][b].sum() == n
        assert batch["demonstrated"][b, :n].all()
        assert same(logprobs[b, n:n + kept], samples.logprobs[b, :kept], 1e-4)
        assert same(logprobs[b, :n], plain[b, :n], 1e-6)
        assert batch["truncated"][b] == (END not in found)
    assert batch["completion_mask"].shape[1] <= longest and 0 < batch["truncated"].sum() < 12
    assert log.totals["sampled_tokens"] == samples.completion_mask.sum()   # no token of a hint
    rewards = coin(*zip(*texts(batch)))                      # the reward is that of the whole text
    assert batch["rewards"].tolist() == rewards


def test_a_rollout_without_hints_is_as_it_was():
    """Examples whose hints are all empty are sampled as if they had none."""
    algo = make_hybrid()
    empty = [{**problem, "hint_ids": []} for problem in PROBLEMS]
    with_hints, without = (data.rollout(algo.model, algo, examples,
                                        torch.Generator().manual_seed(0), None)
                           for examples in (empty, PROBLEMS))
    assert not with_hints.pop("demonstrated").any() and with_hints.keys() == without.keys()
    assert all(torch.equal(with_hints[name], without[name]) for name in without)


# -- which hints -----------------------------------------------------------------------------------


def lengths_of_hints(algo, step, seed=0):
    return sample(algo, step=step, seed=seed)["demonstrated"].sum(-1).view(4, 4)


def test_uft_gives_every_answer_of_a_group_one_hint():
    """A part of the demonstration's text, never its <end>, of the same length for the group; at
    first nearly all of it, in the end nothing; prompts without a demonstration have none."""
    algo = make_hybrid(hint="all", hint_share=1.0, max_steps=8)
    batch, found = sample(algo), lengths_of_hints(algo, 0)
    which = data.batch_indices(10, algo.config, 0, 2)
    for i, example in enumerate(algo.demonstrations[j] for j in which):
        assert found[i].tolist() == [len(example["completion"])] * 4     # a share of 1: the whole
        for prompt, answer in texts(batch)[4 * i:4 * i + 4]:
            assert prompt == example["prompt"] and answer.startswith(example["completion"])
    assert not found[2:].any() and not lengths_of_hints(algo, 4).any()   # half of the run
    middle = [lengths_of_hints(algo, 2, seed) for seed in range(8)]
    assert all((lengths == lengths[:, :1]).all() for lengths in middle)
    assert len({int(lengths[0, 0]) for lengths in middle}) > 2           # binomial


def test_prefix_rft_gives_one_answer_of_a_group_a_hint():
    """The first of each demonstrated group, of a share between that of the schedule and
    hint_share; the others begin at the prompt, and all are answers to one prompt."""
    algo = make_hybrid(hint="one", imitation="prefix", hint_share=0.8, hint_end=0.4, max_steps=8)
    for step, low in ((0, 0.8), (2, 0.6), (4, 0.4), (7, 0.4)):
        which = data.batch_indices(10, algo.config, step, 2)
        drawn = {tuple(lengths_of_hints(algo, step, seed)[:2, 0].tolist()) for seed in range(8)}
        assert len(drawn) == 1 if step == 0 else len(drawn) > 2
        for seed in range(4):
            found = lengths_of_hints(algo, step, seed)
            assert not found[2:].any() and not found[:, 1:].any()
            for i, j in enumerate(which):
                n = len(algo.demonstrations[j]["completion"])
                assert round(low * n) <= found[i, 0] <= round(0.8 * n)
    batch = sample(algo)
    assert batch["prompt_index"].tolist() == [b // 4 for b in range(16)]
    assert len(batch["prompt_ids"]) == 4
    assert [p for p, _ in texts(batch)][8:] == [e["prompt"] for e in PROBLEMS[2:] for _ in range(4)]


def test_a_hint_leaves_room_for_a_token():
    """Demonstrations of 11 tokens where 6 are allowed: a hint has at most 5."""
    algo = make_hybrid(hint="all", hint_share=1.0)
    algo.task.max_new_tokens = 6
    algo.demonstrations = [{"prompt": "1-2*3=", "completion": "1-2=9;9*3=7", "answer": "7"}] * 10
    batch = sample(algo)
    assert batch["demonstrated"].sum(-1).tolist() == [5] * 8 + [0] * 8
    assert batch["completion_mask"].sum(-1)[:8].tolist() == [6] * 8


# -- BREAD -----------------------------------------------------------------------------------------


class Script:
    """In place of data.rollout: the second answer of a group is right where its hint is long
    enough, and nothing is right without one where the prompt has a need."""

    def __init__(self, needs):
        self.needs, self.asked = needs, []

    def __call__(self, model, algo, examples, generator, log, num_generations=None):
        self.asked.append([(e["prompt"], len(e.get("hint_ids", []))) for e in examples])
        rows = []
        for e in examples:
            hint = e.get("hint_ids", [])
            for i in range(4):
                right = i == 1 and len(hint) >= self.needs.get(e["prompt"], 0)
                rows.append({"prompt": e["prompt"], "completion": "", "ids": [*hint, i, END],
                             "hint": len(hint), "reward": float(right)})
        batch = data.collate([{"prompt": e["prompt"]} for e in examples], Letters())
        width = max(len(row["ids"]) for row in rows)
        column = torch.arange(width)
        return {**batch, "prompt_index": torch.arange(len(examples)).repeat_interleave(4),
                "completion_ids": torch.tensor([r["ids"] + [PAD] * (width - len(r["ids"]))
                                                for r in rows]),
                "completion_mask": torch.stack([column < len(r["ids"]) for r in rows]),
                "demonstrated": torch.stack([column < r["hint"] for r in rows]),
                "rewards": torch.tensor([r["reward"] for r in rows])}


LONG = {"prompt": "1-2*3=", "completion": "1-2=9;9*3=7", "answer": "7"}     # 11 tokens
SHORT = {"prompt": "4+4=", "completion": "4+4=8", "answer": "8"}            # 5 tokens
EASY = {"prompt": "9*9=", "completion": "9*9=1", "answer": "1"}


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("need", [1, 3, 6, 9, 11])
def test_bread_finds_the_shortest_hint_that_helps(monkeypatch, need, rounds):
    """2506.17211: of the lengths L k / 2^rounds the shortest with which an answer is right; where
    none is, the group stays as it was. Each round samples the failed demonstrated groups anew and
    no other; rows stay in the order of the groups."""
    algo = make_hybrid(hint="rescue", imitation="none", demonstrated=3, batch_size=4,
                       rescue_rounds=rounds, shuffle=False, num_demonstrations=3)
    algo.demonstrations = [LONG, EASY, SHORT]
    script = Script({LONG["prompt"]: need, SHORT["prompt"]: 2, PROBLEMS[3]["prompt"]: 1})
    monkeypatch.setattr(data, "rollout", script)
    batch = algo.sample(PROBLEMS, None, 0, Log())

    def shortest(length, need):
        tried = [round(k / 2 ** rounds * length) for k in range(1, 2 ** rounds)]
        return min((n for n in tried if n >= need), default=0)
    expected = [shortest(11, need), 0, shortest(5, 2), 0]
    assert batch["demonstrated"].sum(-1).view(4, 4).tolist() == [[n] * 4 for n in expected]
    prompts = [LONG["prompt"], EASY["prompt"], SHORT["prompt"], PROBLEMS[3]["prompt"]]
    assert [p for p, _ in texts(batch)] == [p for p in prompts for _ in range(4)]
    first, *again = script.asked
    assert [p for p, _ in first] == prompts and len(again) == rounds
    assert all([p for p, _ in asked] == [LONG["prompt"], SHORT["prompt"]] for asked in again)
    right = batch["rewards"].view(4, 4).max(1).values.tolist()
    assert right == [float(expected[0] > 0), 1, float(expected[2] > 0), 0]
    last = batch["completion_ids"][batch["completion_mask"] & ~batch["demonstrated"]].view(16, 2)
    assert last[:, 0].tolist() == [0, 1, 2, 3] * 4                       # whole groups, in order


def test_bread_samples_no_more_where_nothing_failed(monkeypatch):
    """One rollout, as it is."""
    algo = make_hybrid(hint="rescue", imitation="none")
    monkeypatch.setattr(data, "rollout", script := Script({}))
    batch = algo.sample(PROBLEMS, None, 0, Log())
    assert len(script.asked) == 1 and not batch["demonstrated"].any()


def test_bread_counts_what_it_samples():
    """The tokens of every round are counted; hints are not; the batch is one that can be
    trained on."""
    log = Log()
    algo = make_hybrid(lambda p, c, **_: [0.0] * len(p), hint="rescue", imitation="none")
    batch = sample(algo, log=log)
    assert not batch["demonstrated"].any()                               # nothing ever helped
    assert log.totals["sampled_tokens"] > 1.5 * batch["completion_mask"].sum()
    [part] = algo.minibatches(batch, Log())
    assert algo.loss(part, Log()) == 0
