"""
Whole runs of distillation: the teacher of a run is found again when it is resumed, is compared and
inspected like any other, and a wrong one is refused before anything is trained.
"""

import os
import shutil

import pytest

import compare
import sample
import train
from conftest import TASK, run
from harness import report
from model import GPTConfig
from runs_helpers import (complaint, interrupted, metrics, network, networks, same, same_networks,
                          same_numbers, weights, write_jsonl)

FAST = (*TASK, "--max_steps", 2, "--batch_size", 4, "--num_generations", 4)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda folder: "no picture")


def test_the_teacher_of_a_run_is_kept(eight_steps, uninterrupted, tiny_teacher, monkeypatch):
    """The checkpoint holds the teacher's weights; resumed without --teacher the run finds it by the
    path that it began with, and ends as if it had not been stopped."""
    whole = uninterrupted("distill")
    assert networks(whole) == {"model", "ref_model", "teacher"}
    assert same(network(whole, "teacher"), weights(tiny_teacher))
    flags = eight_steps("distill", "--out_dir", "run")
    with interrupted(monkeypatch, 5):
        assert run(*flags) == 130
    at = flags.index("--teacher")
    assert run(*flags[:at], *flags[at + 2:], "--resume") == 0
    assert same_networks("run", whole) and same_numbers(metrics("run"), metrics(whole))


def test_another_teacher_is_another_run(eight_steps, tiny_base, tiny_teacher, monkeypatch):
    """A run does not go on with another teacher, nor without the file of its own."""
    shutil.copytree(tiny_teacher, "teacher")
    flags = eight_steps("distill", "--teacher", "teacher", "--out_dir", "run")
    with interrupted(monkeypatch, 5):
        assert run(*flags) == 130
    said = complaint(run, *flags, "--teacher", tiny_base, "--resume")
    assert "run/ckpt.pt was made with --teacher teacher" in said
    shutil.rmtree("teacher")
    assert complaint(run, *flags, "--resume") == "teacher: there is no checkpoint there"


@pytest.mark.parametrize("teacher, said", [
    ((), "--algo distill needs a --teacher"),
    (("--teacher", "nowhere"), "nowhere: there is no checkpoint there"),
    (("--teacher", "rm"), "--teacher rm is a reward model, which cannot write")])
def test_a_wrong_teacher_is_refused_before_a_base_is_made(tiny_base, teacher, said):
    """Nothing is trained, and nothing is left behind."""
    assert run("--algo", "rm", "--init_from", tiny_base, *FAST, "--out_dir", "rm") == 0
    assert said in complaint(run, "--algo", "distill", *teacher, *FAST)
    assert os.listdir(".") == ["rm"]


def test_bfloat16_and_micro_batches(tiny_base, tiny_teacher):
    """A run in another precision and in parts ends well, and its model can be asked."""
    assert run("--algo", "distill", *FAST, "--init_from", tiny_base, "--teacher", tiny_teacher,
               "--dtype", "bfloat16", "--micro_batch_size", 3, "--out_dir", "run") == 0
    assert not same(weights("run"), weights(tiny_base))
    assert sample.main(["run", "1+1="]) == 0


def test_a_file_of_prompts(tiny_base, tiny_teacher):
    """Prompts alone are enough: nothing is said of rewards, and there is nothing to judge by."""
    write_jsonl([{"prompt": f"{a}+{b}="} for a in range(5) for b in range(5)])
    assert run("--algo", "distill", *FAST, "--init_from", tiny_base, "--teacher", tiny_teacher,
               "--data", "data.jsonl", "--logging_steps", 1, "--out_dir", "run") == 0
    assert {"teacher_kl", "entropy", "completions/mean_length"} <= set(metrics("run")[1])
    assert not {"reward", "true_reward", "eval/accuracy"} & set(metrics("run")[1])
    assert not same(weights("run"), weights(tiny_base))


def test_a_variant_of_a_comparison_names_its_teacher():
    """compare.py takes distill:teacher=FOLDER."""
    [arm] = compare.plan(["distill:teacher=out/chain-grpo-0"], [], 0, 1)
    [(_, config, command, _)] = arm.stages
    assert config.teacher == "out/chain-grpo-0" and "--teacher=out/chain-grpo-0" in command
    assert config.out_dir == "out/chain-distill-teacher-out-chain-grpo-0-0"
    again = train.flags.parse(command, train.ALGORITHMS, GPTConfig)
    assert again.teacher == config.teacher
