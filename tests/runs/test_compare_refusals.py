"""
What compare.py refuses: a mistake anywhere in the list is one line before the first run, and before
the base is made.
"""

import os

import pytest

import compare
import tasks
import train
from runs_helpers import complaint, write_jsonl


@pytest.fixture(autouse=True)
def nothing_is_run(tmp_path, monkeypatch):
    """In a folder of its own."""
    def fail(*args, **kwargs):
        pytest.fail("something was run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(compare.subprocess, "run", fail)


@pytest.mark.parametrize("words, expected", [
    ("sft grop", "did you mean grpo?"),
    ("grop --seeds=2", "did you mean grpo?"),
    ("sft dpo:sync_step=1", "did you mean --sync_steps?"),
    ("sft grpo --epsilon .1", "--epsilon is unknown"),   # to sft: it is grpo:epsilon=.1
    ("dpo:sync_steps=never sft", "--sync_steps never"),
    ("sft pretrain", "pretrain makes what the others start from"),
    ("sft rm --seed 1", "rm makes what the others start from"),
    ("sft,dft", "python compare.py sft dft"),
    ("--algo sft,dft", "python compare.py sft dft"),
    ("--algo sft", "leave out --algo"),
    ("sft grpo --algo sft", "leave out --algo"),
    ("sft dft --seeds 0", "--seeds 0: at least 1"),
    ("sft dft --seeds -1", "--seeds -1: at least 1"),
    ("sft dft --seeds two", "--seeds"),
    ("sft dft --jobs 0", "--jobs 0: at least 1"),
    ("sft dft --seed -1", "--seed -1"),
    ("sft --seeds 2 dft", "dft is unknown"),
    ("sft dft --xyzzy", "--xyzzy is unknown"),
    ("sft dft --resume", "goes on by itself"),
    ("sft dft:resume=true", "goes on by itself"),
    ("sft dft --inspect", "goes on by itself"),
    ("sft dft:seed=1", "goes on by itself"),
    ("sft dft:algo=sft", "goes on by itself"),
    ("sft dft:algo=dft", "goes on by itself"),
    ("sft dft:out-dir=there", "goes on by itself"),
    ("sft dft:eval-only", "python sample.py FOLDER"),
    ("sft dft:sample=x", "python sample.py FOLDER"),
    ("sft dft:seeds=2", "python compare.py"),
    ("sft dft sft", "sft and sft are, or look like, the same"),
    ("dpo:beta=1e-1 dpo:beta=1e+1", "dpo:beta=1e-1 and dpo:beta=1e+1 are, or look like"),
    ("sft dft --init_from nowhere", "nowhere"),
    ("sft grpo:init_from=nowhere", "nowhere"),
    ("sft grpo:reward=correctness", "--reward correctness is unknown"),
    ("sft dpo:num_generations=1", "--num_generations 1: a pair needs"),
    ("sft dft --data nowhere.jsonl", "nowhere.jsonl: No such file"),
    ("sft dft --out_dir taken", "cannot write taken"),
    ("grpo ppo:reward=model:reward_model=nowhere", "nowhere: there is no checkpoint"),
    ("sft dft --device tpu", "--device tpu"),
])
def test_what_cannot_be_compared(words, expected):
    """One line, and nothing has been run, not even the base."""
    open("taken", "w").close()
    assert expected in complaint(compare.main, words.split())
    assert os.listdir(".") == ["taken"]


def test_a_folder_in_the_way_of_a_run():
    """The folder of any variant is tried, not only that of the table."""
    os.makedirs("out")
    open("out/chain-dft-1", "w").close()
    said = complaint(compare.main, ["sft", "dft", "--seeds", "2"])
    assert said.startswith("cannot write out/chain-dft-1: Not a directory")


SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "completion": str(a + b)}
        for a in range(6) for b in range(6)]


def write_lines(rows, columns):
    write_jsonl([{c: row[c] for c in columns} for row in rows], "sums.jsonl")


@pytest.mark.parametrize("words, columns, held_out", [
    ("sft dft", ("prompt", "completion"), False), ("grpo ppo", ("prompt", "answer"), False),
    ("grpo:reward=brevity ppo:reward=brevity", ("prompt",), True)])
def test_nothing_to_compare_by(words, columns, held_out):
    """A file of which no line is held out, or whose held-out lines are bare prompts, is refused
    before the first run."""
    write_lines([row for row in SUMS if held_out or not tasks.is_test(row["prompt"])], columns)
    said = complaint(compare.main, [*words.split(), "--data", "sums.jsonl"])
    assert said.startswith("sums.jsonl: no held-out lines with an answer, a completion")
    assert os.listdir(".") == ["sums.jsonl"]


def test_one_bare_prompt_among_the_held_out_lines():
    """One held-out line that nothing can judge is enough to refuse."""
    write_lines(SUMS, ("prompt", "completion"))
    write_jsonl([{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+2="}], "held.jsonl")
    said = complaint(compare.main,
                     "sft dft --data sums.jsonl --eval_data held.jsonl".split())
    assert said.startswith("held.jsonl, line 2: no column 'completion'")
    assert sorted(os.listdir(".")) == ["held.jsonl", "sums.jsonl"]
