"""
What judges a run on a file, and a reward model: the nll of held-out lines and the share of pairs
that are ranked right, each worked out by hand on tables (table_policy.py).
"""

import json
from types import SimpleNamespace

import pytest
import torch

import rm
from harness import files
from harness.evaluate import evaluate
from table_policy import (ANSWERS, PROMPTS, Call, Policy, Task, Tokens, config_of,
                          kl_of_first_answers)


def judge(full, task, **settings):
    """-> what evaluate returns, and the policy that was judged"""
    pi = Policy("pi")
    algo = SimpleNamespace(model=pi, ref_model=Policy("ref"), tokenizer=Tokens(), task=task,
                           config=config_of(**settings))
    return evaluate(algo, full), pi


# -- a policy on a file's held-out lines ----------------------------------------------------------


def file_task(folder, held_out, train=({"prompt": "t", "completion": "0"},)):
    """A task of two .jsonl files. Columns are those that all lines have, so the training lines get
    the same ones."""
    for name, rows in (("train", [{**held_out[0], **row} for row in train]), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files.JsonLines(folder / "train.jsonl", folder / "test.jsonl", 3)


@pytest.mark.parametrize("micro_batch_size", [0, 1, 2])
@pytest.mark.parametrize("rows, trained", [
    ([{"prompt": "p", "completion": "0101"}, {"prompt": "qq", "completion": ""},
      {"prompt": "rrr", "completion": "1"}],
     [("p", "0101"), ("qq", ""), ("rrr", "1")]),
    ([{"prompt": "p", "chosen": "10", "rejected": "0"},
      {"prompt": "qq", "chosen": "0", "rejected": "111"}],
     [("p", "10"), ("qq", "0")]),
    ([{"text": "0110"}, {"text": "1"}], [("", "0110"), ("", "1")]),
    ([{"prompt": "p", "completion": "01", "label": True},
      {"prompt": "p", "completion": "1110", "label": False},
      {"prompt": "qq", "completion": "0", "label": 1},
      {"prompt": "qq", "completion": "11", "label": 0}],
     [("p", "01"), ("qq", "0")]),
], ids=["completions", "preferences", "texts", "labels"])
def test_held_out_loss_by_hand(tmp_path, rows, trained, micro_batch_size):
    """A mean over all tokens of all lines, ends included, in nats: of what is to be written, at its
    own prompt; not of rejected answers, nor of those that are labelled bad."""
    found, pi = judge(True, file_task(tmp_path, rows), micro_batch_size=micro_batch_size)
    nll = sum(Policy("pi").nll(*t) for t in trained) / sum(len(text) + 1 for _, text in trained)
    assert found == {"eval/loss": pytest.approx(nll, abs=1e-6)}
    assert pi.calls == [] and max(pi.rows) == min(micro_batch_size or 256, len(trained))


def test_lines_are_scored_in_parts(tmp_path):
    """256 lines at a time without --micro_batch_size, so that memory does not follow the size of
    the file."""
    task = file_task(tmp_path, [{"text": "0"}] * 258)
    _, pi = judge(True, task, eval_problems=300)
    assert pi.rows == [256, 2]


@pytest.mark.parametrize("rows", [
    [{"prompt": "p"}], [{"prompt": "p", "completion": "1", "label": False}]],
    ids=["bare prompts", "bad answers alone"])
def test_nothing_to_judge_by(tmp_path, rows):
    """No figure, and no error, where the held-out lines do not say what is good; nor where there
    are none."""
    task = file_task(tmp_path, rows)
    assert judge(True, task)[0] == {}
    task.test = []
    assert judge(True, task, eval_problems=5)[0] == {}


def test_a_file_with_answers_is_judged_by_them(tmp_path):
    """Lines with an answer: accuracy and KL as for a task, by the last number, over the first
    eval_problems lines; there is no ood split, and nothing is worked out."""
    rows = [{"prompt": p, "answer": ANSWERS.get(p, "1")} for p in PROMPTS["test"]]
    found, pi = judge(False, file_task(tmp_path, rows, [{"prompt": "t"}]))
    kl = kl_of_first_answers(Policy("pi"), Policy("ref"))
    expected = {"eval/accuracy": 1 / 4, "eval/mean_length": 9 / 4, "eval/kl": kl}
    assert found == pytest.approx(expected, abs=1e-6)
    assert [call.prompts for call in pi.calls] == [PROMPTS["test"][:4]]
    task = file_task(tmp_path, rows, [{"prompt": "t"}])
    full, pi = judge(True, task)
    assert full["eval/greedy_accuracy"] == 2 / 4 and len(pi.calls) == 2
    task.test = []
    assert judge(True, task, eval_problems=5)[0] == {}


# -- a reward model -------------------------------------------------------------------------------


class RewardTable:
    """A reward model that is a table: 1 for each 1 in an answer, 3 for each where the prompt has an
    even number of letters, less the answer's length; in the column after the last real token, where
    alone it is to be read."""
    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(scalar_head=True)

    def __init__(self):
        self.rows = []

    def configure_optimizer(self, config):
        return None

    def completion_logits(self, prompt_ids, prompt_mask, completion_ids, completion_mask,
                          prompt_index, read_last):
        assert read_last and not torch.is_grad_enabled()
        self.rows.append(len(completion_ids))
        B, T = completion_ids.shape
        table = torch.full((B, T + 1, 1), 100.0)
        for b, (p, ids, mask) in enumerate(zip(prompt_index, completion_ids, completion_mask)):
            value = 3.0 if prompt_mask[p].sum() % 2 else 1.0       # its first token is <end>
            table[b, mask.sum()] = value * (ids[mask] == 1).sum() - mask.sum()
        return table


def make_rm(draws, task, **settings):
    """RM with the table for a model, and a sampler that gives each prompt the draws, 8 of them."""
    policy = Policy("sampler", draws)
    policy.with_scalar_head = RewardTable
    config = rm.RMConfig(device="cpu", **{"dtype": "float32", "eval_problems": 4, **settings})
    return rm.RM(config, policy, Tokens(), task)


@pytest.mark.parametrize("wrong, accuracy", [("0", 1 / 3), ("011", 0.0)],
                         ids=["no tie", "a tie"])
def test_pair_accuracy_by_hand(wrong, accuracy):
    """One right answer in each group and wrong ones all alike, so that the pair is known. p: 1
    against 0, r is -1 and -2, ranked right (or 1 against 011, both -1: a tie is no success); qq: 10
    against 11, 0 and 3, wrong; rrr: 0 against 1, -2 and -1, wrong; ssss has no pair. The test
    problems are asked, with the same random numbers each time that the model is judged."""
    draws = {"p": [wrong] * 7 + ["1"], "qq": ["10"] + ["11"] * 7, "rrr": ["1"] * 7 + ["0"],
             "ssss": ["0"] * 8}
    algo = make_rm(draws, Task())
    expected = {"eval/pair_accuracy": pytest.approx(accuracy), "eval/pairs": 3}
    assert evaluate(algo, full=True) == expected and evaluate(algo, full=False) == expected
    assert algo.sampler.calls == [Call(PROMPTS["test"][:4], 8, 1.0, 0, 1.0, 1, False, False)] * 2
    assert algo.model.rows == [6, 6]


def test_pairs_are_made_in_parts():
    """128 problems of 8 answers at a time; each is asked once, and bfloat16 is what --dtype
    says."""
    task = Task()
    task.problem = lambda rng, split: next(numbered)
    numbered = iter([{"prompt": "p", "answer": "1"}] * 256 + [{"prompt": "x", "answer": "1"}] * 4)
    algo = make_rm({"p": ["0"] * 7 + ["1"], "x": ["0"] * 7 + ["1"]}, task, eval_problems=260,
                   dtype="bfloat16")
    assert evaluate(algo, full=True) == {"eval/pair_accuracy": 1.0, "eval/pairs": 260}
    asked = [(call.prompts, call.bfloat16) for call in algo.sampler.calls]
    assert asked == [(["p"] * 128, True), (["p"] * 128, True), (["x"] * 4, True)]


def test_pairs_of_a_file(tmp_path):
    """A file's held-out preferences: p, 1 above 0 is ranked right; qq, 10 above 11 is not; equal
    answers are no pair."""
    rows = [{"prompt": p, "chosen": a, "rejected": b}
            for p, a, b in (("p", "1", "0"), ("qq", "10", "11"), ("rrr", "1", "1"))]
    algo = make_rm({}, file_task(tmp_path, rows))
    assert evaluate(algo, full=True) == {"eval/pair_accuracy": 0.5, "eval/pairs": 2}
    assert not hasattr(algo, "sampler")
    algo = make_rm({}, file_task(tmp_path, rows[2:]))
    assert evaluate(algo, full=True) == {}
    algo = make_rm({}, file_task(tmp_path, rows))
    algo.task.test = []
    assert evaluate(algo, full=True) == {}
