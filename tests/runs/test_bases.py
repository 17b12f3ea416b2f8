"""What runs start from: base and reward models that are made on the way, once, and found again."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

import tasks
import train
from conftest import SHAPE, TASK, run
from harness import report
from rm import RMConfig
from runs_helpers import SFT_, checkpoint, interrupted, metrics, same, shorter, summary, weights
from sft import PretrainConfig
from tiny import coin


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """A folder of its own; base models are made in 4 steps, reward models in 3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda folder: "no picture")
    for Config, steps in ((PretrainConfig, 4), (RMConfig, 3)):
        monkeypatch.setattr(Config, "__init__",
                            shorter(Config.__init__, max_steps=steps, batch_size=4))


def made():
    """{folder: when its checkpoint was written}"""
    return {name: os.stat(f"out/{name}/ckpt.pt").st_mtime_ns for name in os.listdir("out")}


def test_the_base_is_made_once(capsys):
    """The first run makes out/chain-pretrain-0, every later one finds it; another --base_seed,
    shape or task gets its own."""
    tail = ("--max_steps", 2, "--eval_problems", 4)
    run("--algo", "sft", *tail)
    assert "pre-training one first" in capsys.readouterr().out
    base = made()["chain-pretrain-0"]
    run("--algo", "grpo", "--batch_size", 2, "--num_generations", 2, "--seed", 3, *tail)
    out = capsys.readouterr().out
    assert "made earlier" in out and "pre-training one first" not in out
    assert ["eval/pass@16" in summary(f"out/{name}")[when]   # noise is judged by one answer each
            for name in ("chain-pretrain-0", "chain-sft-0") for when in ("before", "after")] == [
        False, True, True, True]
    assert "eval/accuracy" in summary("out/chain-pretrain-0")["before"]
    assert made()["chain-pretrain-0"] == base
    assert sorted(os.listdir("out")) == ["chain-grpo-3", "chain-pretrain-0", "chain-sft-0"]
    assert summary("out/chain-grpo-3")["pretrain_seconds"] > 0
    run("--algo", "sft", *tail, "--base_seed", 1, "--out_dir", "other-seed")
    run("--algo", "sft", *tail, *SHAPE, "--out_dir", "other-shape")
    run("--algo", "sft", *tail, *TASK, "--out_dir", "other-task")
    bases = [name for name in os.listdir("out") if "pretrain" in name]
    assert "chain-pretrain-1" in bases and len(bases) == 4
    assert not same(weights("out/chain-pretrain-0"), weights("out/chain-pretrain-1"))
    assert checkpoint("other-shape")["model_config"]["n_embd"] == 16
    assert made()["chain-pretrain-0"] == base


def test_a_base_of_other_settings_is_named(capsys):
    """As an earlier version with other defaults may have left one: it is used as it is."""
    sft = ("--algo", "sft", "--max_steps", 2, "--eval_problems", 4)
    run(*sft)
    base, path = made()["chain-pretrain-0"], Path("out/chain-pretrain-0/config.json")
    for other, ending in (({}, " s)\n"), ({"learning_rate": 0.006, "warmup_steps": 50},
                          " s with learning_rate 0.006, warmup_steps 50: delete the folder to have "
                          "it made anew)\n")):
        path.write_text(json.dumps(json.loads(path.read_text()) | other))
        capsys.readouterr()
        run(*sft)
        line = capsys.readouterr().out.split("made earlier in ")[1].splitlines(True)[0]
        assert line.endswith(ending) and made()["chain-pretrain-0"] == base


def test_pretrain_twice(capsys):
    """--algo pretrain makes the very base that other algorithms look for, and the second time says
    that it exists."""
    run("--algo", "pretrain", *TASK, *SHAPE)
    before = made()
    capsys.readouterr()
    assert run("--algo", "pretrain", *TASK, *SHAPE) == 0
    assert f"out/{list(before)[0]} is finished: 4 steps" in capsys.readouterr().out
    run("--algo", "sft", *TASK, *SHAPE, "--max_steps", 1, "--out_dir", "sft")
    assert made() == before and len(before) == 1


def test_an_interrupted_base_is_continued(monkeypatch, capsys):
    """Ctrl-C while the base is being made: the same command goes on with it, and the result is the
    same base."""
    command = ("--algo", "sft", *TASK, *SHAPE, "--max_steps", 1, "--out_dir", "sft")
    os.mkdir("a")
    os.mkdir("b")
    monkeypatch.chdir("a")
    assert run(*command) == 0
    monkeypatch.chdir("../b")
    with interrupted(monkeypatch, 1):
        assert run(*command) == 130
    assert "at step 1 of 4" in capsys.readouterr().out and not os.path.exists("sft")
    assert run(*command) == 0
    name = os.listdir("out")[0]
    assert same(weights(f"out/{name}"), weights(f"../a/out/{name}"))
    assert same(weights("sft"), weights("../a/sft"))


def test_a_run_that_has_not_begun_is_not_resumed(tiny_base, monkeypatch, capsys):
    """Ctrl-C while the reward model is made on the way: the command to give is this one, without
    --resume, and it works."""
    monkeypatch.setattr(tasks.Chain, "reward", staticmethod(coin))   # so that there are pairs
    command = ("--algo", "grpo", "--reward", "model,brevity", "--init_from", tiny_base, *TASK,
               "--max_steps", 1, "--batch_size", 2, "--num_generations", 2, "--out_dir", "run")
    with interrupted(monkeypatch, 1):
        assert run(*command) == 130
    said = re.search(r"go on with: python train.py (.*)", capsys.readouterr().out).group(1)
    assert "--resume" not in said and not os.path.exists("run")
    assert train.main(shlex.split(said)) == 0 and os.path.exists("run/summary.json")


def test_a_base_out_of_time_is_not_taken_for_a_whole_one():
    """A base model that --max_minutes cut short is finished by the run that needs it."""
    run("--algo", "pretrain", *TASK, *SHAPE, "--max_minutes", 1e-6)
    [base] = os.listdir("out")
    assert checkpoint(f"out/{base}")["step"] == 1
    run("--algo", "sft", *TASK, *SHAPE, "--max_steps", 1, "--out_dir", "sft")
    assert os.listdir("out") == [base] and checkpoint(f"out/{base}")["step"] == 4


def test_the_base_counts_in_a_resumed_run_too(monkeypatch):
    """pretrain_seconds is what the base took, also when the run that made it was stopped."""
    flags = (*SFT_, "--max_steps", 3, "--eval_problems", 2, "--out_dir", "run")
    run("--algo", "pretrain", "--eval_problems", 2)
    with interrupted(monkeypatch, 1):
        assert run(*flags) == 130
    assert run(*flags, "--resume") == 0
    assert summary("run")["pretrain_seconds"] == summary("out/chain-pretrain-0")["seconds"] > 0
    assert [line["pretrain_seconds"] for line in metrics("run")] == 2 * [
        summary("run")["pretrain_seconds"]]


def test_init_from_folder_or_file(tiny_base):
    """--init_from takes a run's folder and the file in it alike."""
    for start, out in ((tiny_base, "folder"), (tiny_base / "ckpt.pt", "file")):
        run(*SFT_, *TASK, "--init_from", start, "--max_steps", 2, "--out_dir", out)
    assert same(weights("folder"), weights("file"))


def test_an_earlier_run_is_kept(tiny_base, capsys):
    """A second run into a folder renames the first one's, and a third the second's; nothing is
    overwritten."""
    for seed in range(3):
        run(*SFT_, *TASK, "--init_from", tiny_base, "--max_steps", 1, "--seed", seed,
            "--out_dir", "run")
    assert "run held an earlier run, which is now run.2" in capsys.readouterr().out
    assert [summary(name)["seed"] for name in ("run.1", "run.2", "run")] == [0, 1, 2]
