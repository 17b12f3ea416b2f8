"""What a run leaves in its folder and shows on the console, from built-in tasks and from a file of
one's own."""

import importlib.util
import json
import os
import re
import shlex
import sys

import pytest
import torch

import sample
import train
from conftest import TASK, run
from harness import flags as harness_flags
from runs_helpers import (CASES, GRPO_, SFT_, UPDATES, checkpoint, metrics, same, summary, weights,
                          write_jsonl)

LOGGED = {"pretrain": {"nll"}, "sft": {"nll"},
          "dft": {"nll", "mean_weight", "frac_weight_near_zero"}, "rft": {"nll", "reward", "kept"},
          "dpo": {"reward", "rewards/chosen", "rewards/rejected", "rewards/margins",
                  "rewards/accuracies", "skipped_pairs"},
          "ppo": {"reward", "loss/value", "loss/policy", "objective/kl", "policy/approxkl",
                  "max_ratio"},
          "rm": {"reward", "accuracy", "margin"},
          "distill": {"reward", "rewards/brevity/mean", "teacher_kl", "entropy"},
          "grpo": {"reward", "rewards/brevity/mean", "frac_reward_zero_std",
                   "completions/mean_length"},
          "hybrid": {"reward", "nll", "mu", "frac_reward_zero_std"}}
TOTALS = {"updates", "sampled_tokens", "trained_tokens", "seconds", "sampling_seconds",
          "updating_seconds", "eval_seconds", "pretrain_seconds"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_picture(monkeypatch):
    """A picture takes longer than a run."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)   # `import matplotlib`: ImportError


@pytest.mark.parametrize("case", CASES)
def test_files(uninterrupted, case):
    """config.json, metrics.jsonl, ckpt.pt, summary.json and curve.png hold what is promised."""
    folder, algo = uninterrupted(case), CASES[case][1]
    picture = importlib.util.find_spec("matplotlib") is not None
    assert set(os.listdir(folder)) == {"ckpt.pt", "config.json", "metrics.jsonl", "summary.json"} \
        | ({"curve.png"} if picture else set())
    config, end = json.loads((folder / "config.json").read_text()), summary(folder)
    assert config["max_steps"] == 8 and config["algo"] == algo
    assert set(harness_flags.declarations(train.ALGORITHMS[algo].Config)) < set(config)
    assert config["model_config"]["n_embd"] == 16
    assert set(end) == TOTALS | {"algo", "task", "seed", "steps", "train_seconds",
                                 "peak_memory_mb", "before", "after"}
    assert (end["algo"], end["task"], end["seed"], end["steps"]) == (algo, "chain", 0, 8)
    assert end["trained_tokens"] > 0 and end["peak_memory_mb"] > 10
    assert end["train_seconds"] > 0 < end["eval_seconds"]
    assert end["seconds"] == pytest.approx(end["train_seconds"] + end["eval_seconds"])
    assert 0 < end["sampling_seconds"] + end["updating_seconds"] <= end["train_seconds"]
    lines = metrics(folder)
    assert end["updates"] == 8 * UPDATES.get(case, 1)
    assert (end["sampled_tokens"] > 0) == ("reward" in lines[1])
    assert all({"step"} | TOTALS <= set(line) for line in lines)
    assert LOGGED[algo] | {"loss", "grad_norm"} <= set(lines[1])
    assert ("kl" in lines[1]) == ("KL" in case)
    judged = "eval/accuracy"
    if case == "rm":
        judged = "eval/pair_accuracy"
    else:
        for when in ("before", "after"):
            assert {"eval/accuracy", "eval/ood_accuracy"} <= set(end[when])
            full = {"eval/greedy_accuracy", "eval/pass@16"} & set(end[when])
            assert len(full) == (0 if (case, when) == ("pretrain", "before") else 2)
        assert ("eval/kl" in lines[-1]) == (case != "pretrain")
    assert [line["step"] for line in lines if judged in line] == [0, 4, 8]
    assert lines[-1]["trained_tokens"] == end["trained_tokens"]
    assert not picture or (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    saved = checkpoint(folder)
    assert set(saved["model_config"]) == set(config["model_config"])
    assert "embed_tokens.weight" in saved["model"]


def test_without_matplotlib(tiny_base, no_picture, capsys):
    """Without matplotlib a run ends well, with no curve.png and one line that says how to get
    it."""
    assert run(*SFT_, *TASK, "--init_from", tiny_base, "--max_steps", 1, "--out_dir", "run") == 0
    assert capsys.readouterr().out.count("pip install matplotlib") == 1
    assert not os.path.exists("run/curve.png")


def test_console_shows_table_and_next_steps(tiny_base, no_picture, capsys):
    """A run ends with the before/after table, answered problems, the files and commands that can be
    pasted."""
    run(*GRPO_, *TASK, "--init_from", tiny_base, "--max_steps", 1, "--out_dir", "run")
    out, end = capsys.readouterr().out, summary("run")
    assert re.search(r"accuracy, sampled +\d\.\d{3} +\d\.\d{3} +0\.100", out)
    assert "summary.json" in out and f"{end['sampled_tokens']:,} tokens sampled" in out
    assert "problem (sampled answers)" in out
    command = shlex.split(re.search(r"next:  python sample.py (.*)", out).group(1))
    assert sample.main(command) == 0
    assert "accuracy, greedy" in capsys.readouterr().out
    assert sample.main([*command, "7+5="]) == 0
    assert capsys.readouterr().out.count("sampled") == 4


def test_judging_a_checkpoint(uninterrupted, capsys):
    """sample.py FOLDER prints the numbers that the run's summary holds, and makes no folder."""
    folder = uninterrupted("sft")
    capsys.readouterr()
    assert sample.main([str(folder), "--eval_problems", "16"]) == 0
    out, after = capsys.readouterr().out, summary(folder)["after"]
    for title, name in (("worked steps", "eval/worked"), ("completion length", "eval/mean_length"),
                        ("pass@16", "eval/pass@16"), ("out of distribution", "eval/ood_accuracy")):
        assert re.search(rf"{title} +{after[name]:.3f}", out)
    assert os.listdir(".") == []


def test_asking_a_model(tiny_base, capsys):
    """sample.py FOLDER PROMPT prints the greedy answer and four sampled ones; a seed repeats them;
    --top_k 1 makes all five one."""
    def asked(*more):
        assert sample.main([str(tiny_base), "7+5=", *more]) == 0
        return capsys.readouterr().out.split("\n")[:-1]
    lines = asked("--max_new_tokens", "6")
    assert [line.split("  7+5=")[0].strip() for line in lines] == ["greedy"] + ["sampled"] * 4
    assert asked("--max_new_tokens", "6") == lines
    assert asked("--max_new_tokens", "6", "--seed", "1") != lines
    certain = asked("--max_new_tokens", "6", "--top_k", "1")
    assert len({line.split("7+5=")[1] for line in certain}) == 1
    assert len({line.split("7+5=")[1] for line in lines}) > 1


@pytest.mark.parametrize("algo, own", [
    ("pretrain", r"--num_documents int\s+[^[]*\[0\]"),
    ("sft", r"--num_demonstrations int\s+[^[]*\[400\]"),
    ("grpo", r"--num_generations int\s+[^[]*\[16\]")])
def test_help(capsys, algo, own):
    """--help exits with 0, with the algorithm's own flags and the shared ones, their defaults, and
    no other's."""
    with pytest.raises(SystemExit) as stop:
        run("--algo", algo, "--help")
    out, Config = capsys.readouterr().out, train.ALGORITHMS[algo].Config
    assert stop.value.code == 0 and re.search(own, out) and "--n_embd" in out
    for name in ("learning_rate", "max_steps", "batch_size", "warmup_steps", "weight_decay",
                 "logging_steps", "eval_steps", "save_steps"):
        assert re.search(rf"--{name} [^[]*\[{getattr(Config, name)}\]", out), name
    assert ("--epsilon_high" in out) == (algo == "grpo")
    assert ("--completion_only" in out) == (algo == "sft")
    assert ("--num_documents" in out) == (algo == "pretrain")


def test_max_minutes(tiny_base, no_picture):
    """A run that is out of time stops after the step at hand and still evaluates, saves and writes
    its summary."""
    limits = ("--max_steps", 20, "--max_minutes", 1e-6)
    assert run(*GRPO_, *TASK, *limits, "--init_from", tiny_base, "--out_dir", "run") == 0
    end = summary("run")
    assert end["steps"] == 1 == checkpoint("run")["step"] and "eval/pass@16" in end["after"]


@pytest.mark.parametrize("flags", [SFT_, (*GRPO_, "--num_iterations", 2)], ids=["sft", "grpo"])
def test_bfloat16_on_cpu(tiny_base, no_picture, flags):
    """--dtype bfloat16 trains for two steps on a CPU: matrix products in bfloat16, weights kept in
    float32."""
    assert run(*flags, *TASK, "--init_from", tiny_base, "--max_steps", 2, "--dtype", "bfloat16",
               "--out_dir", "run") == 0
    after = weights("run")
    assert {w.dtype for w in after.values()} == {torch.float32}
    assert all(w.isfinite().all() for w in after.values())
    assert not same(after, weights(tiny_base))


# -- one's own data -------------------------------------------------------------------------------

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b),
         "text": f"{a} plus {b}"} for a in range(6) for b in range(6)]


@pytest.mark.parametrize("algo, columns", [
    ("sft", ("prompt", "completion")), ("sft", ("prompt", "completion", "answer")),
    ("sft", ("text",)), ("grpo", ("prompt", "answer")), ("pretrain", ("text",)),
    ("pretrain", ("prompt", "completion"))])
@pytest.mark.parametrize("held_out", ["one in ten", "a file"])
def test_jsonl(tiny_base, no_picture, algo, columns, held_out):
    """A .jsonl file with the columns that an algorithm needs is trained on and judged by its own
    held-out lines."""
    write_jsonl([{c: row[c] for c in columns} for row in ROWS], "sums.jsonl")
    with open("sums.jsonl") as file:
        text = file.read()
    with open("sums.jsonl", "w") as file:
        file.write(text.replace("\n", "\n\n"))   # empty lines are welcome
    flags = (*CASES[algo], "--data", "sums.jsonl", "--max_new_tokens", 4)
    flags += ("--eval_data", "sums.jsonl") if held_out == "a file" else ()
    start = () if algo == "pretrain" else ("--init_from", tiny_base)
    assert run(*flags, *start, "--max_steps", 2, "--eval_steps", 1, "--logging_steps", 1) == 0
    [name] = [name for name in os.listdir("out") if name.startswith(f"sums-{algo}-0")]
    end = summary(f"out/{name}")
    assert end["task"] == "sums" and end["trained_tokens"] > 0
    judged = "eval/accuracy" if "answer" in columns else "eval/loss"
    assert judged in end["before"] and judged in end["after"]
