"""Whole runs of DPO on a file: preferences, single answers with labels, problems; and what is
refused, with file, line and reason."""

import math
import os
import sys

import pytest

from conftest import run
from dpo import DPOConfig
from harness.errors import InputError
from runs_helpers import metrics, network, networks, same, weights, write_jsonl

FILE = ("--algo", "dpo", "--batch_size", 4, "--max_steps", 3, "--logging_steps", 1, "--eval_steps",
        3, "--warmup_steps", 0, "--max_new_tokens", 4, "--data", "data.jsonl", "--out_dir", "run")
SUMS = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)}
        for a in range(6) for b in range(6)]
JUDGED = [{"prompt": e["prompt"], "completion": e[name], "label": name == "chosen"}
          for e, name in zip(SUMS, ("chosen", "rejected") * 18)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)   # a picture takes longer than a run


@pytest.mark.parametrize("flags, rows", [
    ((), SUMS), (("--loss_type", "kto"), SUMS), (("--loss_type", "kto"), JUDGED),
    (("--loss_type", "orpo"), SUMS), (("--micro_batch_size", 3), SUMS),
    (("--sync_ref", "--sync_steps", 2), SUMS), ((), SUMS + [dict(SUMS[0], chosen="1")] * 3),
], ids=["sigmoid", "kto of pairs", "kto", "orpo", "micro-batches", "sync_ref", "equal answers"])
def test_a_file_of_preferences_trains(tiny_base, flags, rows):
    """prompt, chosen and rejected; for kto prompt, completion and label as well: nothing is
    sampled, the weights move, and the held-out lines are judged by their likelihood."""
    write_jsonl(rows)
    assert run(*FILE, *flags, "--init_from", tiny_base) == 0
    lines = metrics("run")
    assert lines[-1]["sampled_tokens"] == 0 and lines[-1]["trained_tokens"] > 0
    assert "eval/loss" in lines[0] and "eval/loss" in lines[-1]
    assert not same(weights("run"), weights(tiny_base))
    moving = {"moving_ref_model"} if "--sync_ref" in flags else set()
    assert networks("run") == {"model", "ref_model"} | moving
    assert same(network("run", "ref_model"), weights(tiny_base))
    assert not any(same(network("run", name), weights(tiny_base)) for name in moving)


def test_a_file_of_problems_is_answered_by_the_policy(tiny_base):
    """prompt and answer: the policy samples, the file's answer judges; brevity makes the
    contrast."""
    write_jsonl([{"prompt": e["prompt"], "answer": e["chosen"]} for e in SUMS])
    assert run(*FILE, "--reward", "verifier,brevity", "--num_generations", 8,
               "--init_from", tiny_base) == 0
    assert metrics("run")[-1]["sampled_tokens"] > 0
    assert not same(weights("run"), weights(tiny_base))


def test_preferences_of_a_file_are_learned(tiny_base):
    """60 steps on 30 odd sums: every margin, about 0 at first, is positive in the end, and the loss
    is far below log 2."""
    write_jsonl(SUMS)
    assert run(*FILE, "--max_steps", 60, "--batch_size", 16, "--learning_rate", 1e-2,
               "--init_from", tiny_base) == 0
    lines = metrics("run")
    assert lines[1]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines[-1]["loss"] < 0.5 and lines[-1]["rewards/accuracies"] > 0.9
    assert lines[-1]["rewards/margins"] > 0.5


KTO = ("--loss_type", "kto")


@pytest.mark.parametrize("flags, good, bad, reason", [
    ((), SUMS[0], {"prompt": "1+1=", "chosen": "2"}, "no column 'rejected'"),
    ((), SUMS[0], {"chosen": "2", "rejected": "3"}, "no column 'prompt'"),
    ((), SUMS[0], {"prompt": "1+1=", "chosen": 2, "rejected": "3"}, "column 'chosen' is not text"),
    ((), SUMS[0], {"prompt": "1+1=", "chosen": "2", "rejected": None},
     "column 'rejected' is not text"),
    ((), JUDGED[0], JUDGED[1], "no column 'chosen'"),   # labels are for kto
    (KTO, JUDGED[0], {"prompt": "1+1=", "completion": "2"}, "no column 'label'"),
    (KTO, JUDGED[0], {"prompt": "1+1=", "completion": 2, "label": True},
     "column 'completion' is not text"),
])
def test_a_bad_line_is_named(tiny_base, flags, good, bad, reason):
    """A line without a column, or with something else than text in it: file, line and reason,
    before anything trains."""
    write_jsonl([good] * 3 + [bad])
    line = 1 if bad is JUDGED[1] else 4
    with pytest.raises(InputError) as error:
        run(*FILE, *flags, "--eval_data", "data.jsonl", "--init_from", tiny_base)
    assert str(error.value).startswith(f"data.jsonl, line {line}: {reason}")
    assert not os.path.exists("run")


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_a_preference_that_does_not_fit_the_context_is_named(tiny_base, column):
    """200 characters in a model of 128 positions: file, line and reason before the first step, as
    with a completion."""
    write_jsonl(SUMS[:3] + [{**SUMS[3], column: "9" * 200}])
    message = "data.jsonl, line 4: 20. tokens do not fit --block_size 128"
    with pytest.raises(InputError, match=message):
        run(*FILE, "--eval_data", "data.jsonl", "--init_from", tiny_base)


@pytest.mark.parametrize("label", ["false", "bad", None, 7, [False]])
def test_a_label_that_is_no_truth_value_is_named(tiny_base, label):
    """The text "false" would be taken for true: labels are true or false (or 1 or 0), or file, line
    and reason are named."""
    write_jsonl([*JUDGED[:3], {**JUDGED[3], "label": label}])
    message = "data.jsonl, line 4: column 'label' is neither true nor false"
    with pytest.raises(InputError, match=message):
        run(*FILE, *KTO, "--eval_data", "data.jsonl", "--init_from", tiny_base)


@pytest.mark.parametrize("flags, columns", [
    ((), ("prompt", "chosen", "rejected")), (("--reward", "brevity"), ("prompt", "answer")),
    (KTO, ("prompt", "chosen", "rejected"))])
def test_a_column_called_label_is_no_obstacle(tiny_base, flags, columns):
    """Lines with the columns that the loss needs and a `label` besides (of a data set's own) train
    as without it."""
    ends = []
    for extra in ((), ("label",)):
        rows = [{**row, "answer": row["chosen"], "label": 1} for row in SUMS]
        write_jsonl([{name: row[name] for name in (*columns, *extra)} for row in rows])
        assert run(*FILE, *flags, "--init_from", tiny_base) == 0
        ends.append(weights("run"))
    assert same(*ends)


def test_the_majority_reward_needs_no_answer(tiny_base):
    """A file of bare prompts is enough where no reward looks at an answer, as with grpo."""
    assert ("prompt",) in DPOConfig(reward="majority").columns()
    assert ("prompt",) not in DPOConfig().columns()
    write_jsonl([{"prompt": row["prompt"]} for row in SUMS])
    assert run(*FILE, "--reward", "majority,brevity", "--num_generations", 4,
               "--init_from", tiny_base) == 0
