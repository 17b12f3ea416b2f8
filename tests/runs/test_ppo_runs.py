"""Whole runs of PPO and of the reward model: what they leave, how they resume, and how a reward
model is made on the way."""

import math
import os
import re
import shlex
import sys

import pytest

import sample
import tasks
import train
from conftest import TASK, run
from harness.errors import InputError
from rm import RMConfig
from runs_helpers import (checkpoint, interrupted, metrics, network, networks, same, same_numbers,
                          shorter, summary, weights)
from tiny import coin

LOOP = ("--max_steps", 5, "--save_steps", 2, "--logging_steps", 1, "--eval_steps", 5,
        "--warmup_steps", 1)
RM_ = ("--algo", "rm", "--batch_size", 4, "--num_generations", 4)
PPO_ = ("--algo", "ppo", "--batch_size", 4, "--num_generations", 2, "--num_minibatches", 2,
        "--target_kl", 1e9)
GRPO_ = ("--algo", "grpo", "--batch_size", 4, "--num_generations", 4)


@pytest.fixture
def runs(tiny_base, tmp_path, monkeypatch):
    """A folder of its own, a verifier that calls half of what an untrained model writes right,
    reward models made in 3 steps. -> runs(algo, *more flags), a run of 5 steps from the tiny base,
    with its exit code"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)   # a picture takes longer than a run
    monkeypatch.setattr(tasks.Chain, "reward", staticmethod(coin))
    monkeypatch.setattr(RMConfig, "__init__", shorter(RMConfig.__init__, max_steps=3, batch_size=4))
    return lambda algo, *more: run(*algo, *TASK, *LOOP, "--init_from", tiny_base, *more)


def all_the_same(a, b):
    """Whether all networks of two runs, trained and kept, are the same bit for bit, and so are
    their logs."""
    return same(checkpoint(a)["algorithm"], checkpoint(b)["algorithm"]) \
        and same_numbers(metrics(a), metrics(b))


@pytest.mark.parametrize("flags, call, step", [
    (PPO_, 6, 2),   # in the middle of a step's four updates, which are all made
    ((*PPO_, "--missing_eos_penalty", 0.5, "--micro_batch_size", 3), 14, 4),
    (RM_, 3, 3),
], ids=["ppo", "ppo, micro-batches", "rm"])
def test_resumed_runs_equal_uninterrupted_ones(runs, monkeypatch, flags, call, step):
    """Ctrl-C in the middle, then --resume: policy, critic and reference (reward model and sampler),
    and the log, are those of a run that was not interrupted, bit for bit."""
    assert runs(flags, "--out_dir", "whole") == 0
    with interrupted(monkeypatch, call):
        assert runs(flags, "--out_dir", "parted") == 130
    assert checkpoint("parted")["step"] == step
    for name in {"model", "critic"} & networks("whole"):   # what is trained has yet to move
        assert not same(network("parted", name), network("whole", name))
    assert runs(flags, "--out_dir", "parted", "--resume") == 0
    assert all_the_same("parted", "whole")
    assert summary("parted")["after"] == summary("whole")["after"]


def test_ppo_run(runs, tiny_base):
    """--algo ppo trains policy and critic, keeps the reference, and logs what its legend speaks
    of."""
    assert runs(PPO_, "--out_dir", "run") == 0
    saved, base, critic = checkpoint("run"), weights(tiny_base), network("run", "critic")
    assert networks("run") == {"model", "critic", "ref_model"}
    assert same(saved["model"], network("run", "model"))
    assert not saved["model_config"]["scalar_head"]
    assert same(network("run", "ref_model"), base) and not same(saved["model"], base)
    assert critic["lm_head.weight"].shape == (1, 16)
    assert all(critic[name].shape != base[name].shape or not (critic[name] == base[name]).all()
               for name in base)
    lines = metrics("run")
    assert [line["step"] for line in lines] == list(range(6))
    assert "eval/pass@16" in summary("run")["after"]
    shown = {"reward", "rewards/verifier/mean", "loss/value", "loss/policy", "policy/approxkl",
             "objective/kl", "entropy", "clip_ratio", "max_ratio", "values",
             "completions/clipped_ratio", "grad_norm"}
    assert all(shown <= set(line) and "true_reward" not in line for line in lines[1:])
    assert lines[1]["objective/kl"] == 0 and all(line["max_ratio"] > 1 for line in lines[1:])
    assert lines[1]["values"] == pytest.approx(0, abs=0.1) and lines[-1]["objective/kl"] != 0


def test_rm_run(runs, tiny_base, capsys):
    """--algo rm leaves a reward model, its sampler untouched, judged before and after by held-out
    pairs; and it proposes no command in which the reward model would have to write."""
    assert runs(RM_, "--out_dir", "run") == 0
    saved, base = checkpoint("run"), weights(tiny_base)
    assert saved["model_config"]["scalar_head"] and networks("run") == {"model", "sampler"}
    assert same(network("run", "sampler"), base)
    assert saved["model"]["lm_head.weight"].abs().min() > 0
    before, after = summary("run")["before"], summary("run")["after"]
    assert before["eval/pair_accuracy"] == 0   # all answers are worth 0
    assert 0 < after["eval/pair_accuracy"] <= 1
    assert before["eval/pairs"] == after["eval/pairs"] > 3
    line = metrics("run")[1]
    assert line["loss"] == pytest.approx(math.log(2))
    assert {"accuracy", "margin", "skipped_pairs"} <= set(line)
    out = capsys.readouterr().out
    assert re.search(r"right about \d+\.\d% of \d+ held-out pairs", out)
    assert "--init_from run" not in out and "sample.py run" not in out


def test_an_rm_run_without_any_contrast(runs, monkeypatch):
    """Where no answer is better than another there is no pair and nothing to learn: the run ends
    well, without an update."""
    monkeypatch.setattr(tasks.Chain, "reward",
                        staticmethod(lambda prompts, *args, **columns: [0.0] * len(prompts)))
    assert runs(RM_, "--out_dir", "run") == 0
    assert summary("run")["after"] == {} and summary("run")["updates"] == 0
    assert metrics("run")[-1]["skipped_pairs"] == 1
    assert (weights("run")["lm_head.weight"] == 0).all()


def test_the_reward_model_is_made_on_the_way_once(runs, capsys):
    """--reward model trains a reward model first, in a folder of its own; the next run, of whatever
    algorithm, takes it as it is. The verifier's opinion is logged beside it, and is not what is
    trained on."""
    assert runs(GRPO_, "--reward", "model", "--out_dir", "grpo") == 0
    [folder] = [f"out/{name}" for name in os.listdir("out")]
    assert "chain-rm-0" in folder and summary(folder)["steps"] == 3
    assert "training one first (once)" in capsys.readouterr().out
    made = os.stat(f"{folder}/ckpt.pt").st_mtime_ns
    assert runs(PPO_, "--reward", "model,brevity", "--reward_weights", "1,0.1",
                "--out_dir", "ppo") == 0
    out = capsys.readouterr().out
    assert "training one first" not in out and f"Reward model: {folder} (made earlier" in out
    assert os.listdir("out") == [os.path.basename(folder)]
    assert os.stat(f"{folder}/ckpt.pt").st_mtime_ns == made
    for name in ("grpo", "ppo"):
        line = metrics(name)[-1]
        assert line["rewards/model/mean"] != 0 and 0 <= line["true_reward"] <= 1
        assert "rewards/verifier/mean" not in line
    line = metrics("ppo")[1]
    expected = line["rewards/model/mean"] + 0.1 * line["rewards/brevity/mean"]
    assert line["reward"] == pytest.approx(expected, abs=1e-6)
    critic, judge = network("ppo", "critic"), weights(folder)
    assert not same(critic, judge)   # it started there and was trained
    assert all((critic[name] - judge[name]).abs().max() < 0.1 for name in judge)
    assert runs(GRPO_, "--reward", "model", "--reward_model", folder, "--out_dir", "named") == 0
    assert same(weights("named"), weights("grpo"))   # named or found: the same judge


def test_a_resumed_run_finds_its_reward_model_again(runs, monkeypatch, capsys):
    """--resume of a run with a learned reward takes the same reward model, and ends as if it had
    not been interrupted."""
    flags = (*PPO_, "--reward", "model")
    assert runs(flags, "--out_dir", "whole") == 0
    with interrupted(monkeypatch, 9):
        assert runs(flags, "--out_dir", "parted") == 130
    said = re.search(r"go on with: python train.py (.*)", capsys.readouterr().out).group(1)
    assert train.main(shlex.split(said)) == 0 and all_the_same("parted", "whole")


def test_a_reward_model_and_a_policy_are_not_mistaken_for_each_other(runs, tiny_base):
    """--init_from a reward model and --reward_model a policy are refused in one line that says what
    to do instead; and a reward model is not asked to write."""
    assert runs(RM_, "--out_dir", "judge") == 0
    for start, message in (
            (lambda: run(*PPO_, "--init_from", "judge", *TASK),
             "judge is a reward model, which cannot write; give it as --reward_model"),
            (lambda: sample.main(["judge", "7+5="]), "is a reward model"),
            (lambda: run(*PPO_, "--init_from", tiny_base, "--reward", "model", "--reward_model",
                         tiny_base, *TASK),
             "is no reward model for this tokenizer: make one with --algo rm")):
        with pytest.raises(InputError, match=message) as error:
            start()
        assert "\n" not in str(error.value)
    assert not os.path.exists("out")
