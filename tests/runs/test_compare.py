"""
compare.py: each algorithm from the same base, over the same seeds, reused where it exists, in one
table. What is refused is in test_compare_refusals.py.
"""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import compare
import train
from conftest import ROOT, SHAPE, TASK, run, script
from harness import report
from harness.errors import InputError
from runs_helpers import interrupted, same, weights, write_jsonl
from sft import Pretrain, PretrainConfig

TINY = (*TASK, "--max_steps", 2, "--batch_size", 4, "--logging_steps", 1, "--eval_steps", 1)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def in_process(monkeypatch):
    """The runs of a comparison happen in this process, which spares the start of Python. -> their
    commands"""
    commands = []

    def start(command, stdout, stderr, text):
        assert command[:2] == [sys.executable, str(ROOT / "train.py")]
        commands.append(command[2:])
        with contextlib.redirect_stdout(io.StringIO()):
            return SimpleNamespace(returncode=train.main(command[2:]), stderr="")
    monkeypatch.setattr(compare.subprocess, "run", start)
    return commands


class Quick(PretrainConfig):
    """Base models are made in 2 steps."""
    def __init__(self, **settings):
        super().__init__(**{"max_steps": 2, "batch_size": 4, **settings})


@pytest.fixture
def quick_base(monkeypatch):
    monkeypatch.setattr(Pretrain, "Config", Quick)


def run_compare(*words):
    return compare.main([str(word) for word in words])


def made():
    """When each run's summary was written."""
    names = [name for name in os.listdir("out") if "compare" not in name and "pretrain" not in name]
    return {name: os.stat(f"out/{name}/summary.json").st_mtime_ns for name in names}


def config(name):
    with open(f"out/{name}/config.json") as file:
        return json.load(file)


# -- what is run ----------------------------------------------------------------------------------


def test_a_comparison_in_a_terminal(tiny_base):
    """As a person types it: each run is a process of its own, whose output is not shown; one line
    for each, then the table."""
    done = script("compare", "sft", "dft", *TINY, "--init_from", tiny_base, cwd=".")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    with open("out/chain-compare/compare.json") as file:
        assert report.comparison(json.load(file)) in done.stdout
    assert re.findall(r"(\w+), seed 0: held-out accuracy", done.stdout) == ["sft", "dft"]
    assert "loss" not in done.stdout


def test_a_comparison(tiny_base, in_process, capsys):
    """Two variants, two seeds: four runs, one table, compare.json; a second time nothing is run, a
    broken run goes on, and other settings make new runs and leave the old ones be."""
    variants = ("sft", "dft:loss-type=power:alpha=0.5")
    flags = (*TINY, "--num_demonstrations", 10, "--init_from", tiny_base)
    command = (*variants, "--seeds", 2, *flags)
    assert run_compare(*command) == 0
    first, out = made(), capsys.readouterr().out
    names = ("sft", "dft-loss-type-power-alpha-0.5")
    assert sorted(first) == sorted(f"chain-{name}-{seed}" for name in names for seed in (0, 1))
    asked = config("chain-dft-loss-type-power-alpha-0.5-1")
    assert (asked["seed"], asked["loss_type"], asked["alpha"]) == (1, "power", 0.5)
    assert asked["init_from"] == str(tiny_base)
    with open("out/chain-compare/compare.json") as file:
        results = json.load(file)
    planned = [(variant, seed) for variant in variants for seed in (0, 1)]
    assert [(r["variant"], r["seed"]) for r in results] == planned
    assert all(r["updates"] == 2 and r["trained_tokens"] > 0 for r in results)
    assert all("eval/accuracy" in r["after"] for r in results)
    table = report.comparison(results)
    assert table in out
    rows = table.removesuffix(report.COSTS).splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["base", *variants]

    os.remove("out/chain-sft-1/summary.json")
    assert run_compare(*command) == 0
    second = made()
    assert [name for name in first if second[name] != first[name]] == ["chain-sft-1"]
    assert table.splitlines()[0] in capsys.readouterr().out and len(second) == 4
    assert len(in_process) == 5 and in_process[4] == [*in_process[1], "--resume"]

    assert run_compare("sft", "--seeds", 1, *flags, "--learning_rate", 0.1) == 0
    assert set(made()) == {*second, "chain-sft-0.1"}   # the first one is kept under this name


def test_what_a_variant_says_wins_over_what_all_say(tiny_base, in_process):
    """`dft:alpha=0.9` runs with .9 whatever --alpha says, and ends with the weights of such a run
    by itself; a variant that says nothing gets the common .1."""
    flags = (*TINY, "--init_from", tiny_base, "--loss-type", "power", "--alpha", 0.1)
    assert run_compare("dft:alpha=0.9", "dft", *flags) == 0
    first = made()
    assert run_compare("dft", "dft:alpha=0.9", *flags) == 0 and made() == first
    alphas = {name: config(name)["alpha"] for name in first}
    assert alphas == {"chain-dft-0": 0.1, "chain-dft-alpha-0.9-0": 0.9}
    assert run("--algo", "dft", *flags[:-1], 0.9, "--out_dir", "alone") == 0
    assert same(weights("alone"), weights("out/chain-dft-alpha-0.9-0"))
    assert not same(weights("alone"), weights("out/chain-dft-0"))


@pytest.mark.parametrize("flags, seeds", [
    ("--seed 3", [3]), ("--seeds 2", [0, 1]), ("--seed=2 --seeds=3", [2, 3, 4])])
def test_seeds(tiny_base, in_process, flags, seeds):
    """--seed is the first seed, --seeds how many: every variant runs with each of them."""
    assert run_compare("sft", "dft", *flags.split(), *TINY, "--init_from", tiny_base) == 0
    names = [f"chain-{name}-{seed}" for name in ("sft", "dft") for seed in seeds]
    assert sorted(made()) == sorted(names)
    assert all(config(name)["seed"] == int(name.split("-")[-1]) for name in names)


def test_the_plan():
    """Variant by variant and seed by seed; the words of each run, in which a variant's own flags
    come behind the common ones; a folder for each."""
    arms = compare.plan(["sft", "dpo:sync-steps=inf"], ["--max_steps", "3"], 4, 2)
    assert all(arm.word == arm.variant and arm.seed == arm.stages[0].config.seed for arm in arms)
    runs = [(arm.variant, stage.config, stage.command) for arm in arms for stage in arm.stages]
    assert [(variant, c.algo, c.seed, c.max_steps) for variant, c, _ in runs] == [
        ("sft", "sft", 4, 3), ("sft", "sft", 5, 3), ("dpo:sync-steps=inf", "dpo", 4, 3),
        ("dpo:sync-steps=inf", "dpo", 5, 3)]
    assert runs[3][1].sync_steps == "inf" and runs[3][2] == [
        "--algo", "dpo", "--max_steps", "3", "--sync_steps=inf", "--seed", "5",
        "--out_dir", "out/chain-dpo-sync-steps-inf-5"]
    assert [c.out_dir for _, c, _ in runs] == [
        "out/chain-sft-4", "out/chain-sft-5", "out/chain-dpo-sync-steps-inf-4",
        "out/chain-dpo-sync-steps-inf-5"]
    for _, c, command in runs:   # the command line says what the plan says
        again = train.flags.parse(command, train.ALGORITHMS, train.GPTConfig)
        assert vars(again) == vars(c)


def test_the_folders_of_another_task_or_file():
    """They are named for it."""
    [countdown] = compare.plan(["sft"], ["--task", "countdown"], 0, 1)
    [a_file] = compare.plan(["sft:data=my/sums.jsonl"], [], 0, 1)
    [countdown], [a_file] = ([s.config for s in arm.stages] for arm in (countdown, a_file))
    assert countdown.out_dir == "out/countdown-sft-0"
    assert a_file.out_dir == "out/sums-sft-data-my-sums.jsonl-0"


def test_without_a_word_the_main_five_and_a_hybrid_are_compared(monkeypatch):
    """`python compare.py --seeds 2` is sft dft dpo ppo grpo hybrid, twice."""
    class Planned(Exception):
        pass

    def plan(*asked):
        raise Planned(*asked)
    monkeypatch.setattr(compare, "plan", plan)
    with pytest.raises(Planned) as planned:
        run_compare("--seeds", 2, "--max-steps=3")
    words = ["sft", "dft", "dpo", "ppo", "grpo", "hybrid"]
    assert planned.value.args == (words, ["--max_steps=3"], 0, 2)


SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "completion": str(a + b)}
        for a in range(6) for b in range(6)]


@pytest.mark.parametrize("words, columns, judged_by", [
    ("sft dft", ("prompt", "completion"), "nll"),
    ("sft grpo", ("prompt", "answer", "completion"), "accuracy")])
def test_a_file_to_compare_by(tiny_base, in_process, capsys, words, columns, judged_by):
    """With held-out completions runs are compared by their likelihood, with answers by accuracy."""
    write_jsonl([{c: row[c] for c in columns} for row in SUMS], "sums.jsonl")
    assert run_compare(*words.split(), "--data", "sums.jsonl", "--max_new_tokens", 4, "--max_steps",
                       1, "--batch_size", 2, "--init_from", tiny_base) == 0
    assert re.findall(r"held-out (\w+) \d", capsys.readouterr().out) == [judged_by] * 2
    assert len(made()) == 2 and os.path.exists("out/sums-compare/compare.json")


# -- the base, and what goes wrong on the way -----------------------------------------------------


def test_the_base_is_made_first(quick_base, monkeypatch, in_process, capsys):
    """Without --init_from the comparison makes the base that its runs then share; what fails in a
    run is said in one line."""
    command = ("sft", "dft", *TINY, *SHAPE)
    with monkeypatch.context() as patch:
        for stderr, said in (("a warning\nerror: no luck\n", "no luck"), ("", "no message")):
            failed = SimpleNamespace(returncode=2, stderr=stderr)
            patch.setattr(compare.subprocess, "run", lambda *args, end=failed, **kwargs: end)
            with pytest.raises(InputError, match=f"^sft, seed 0: {said}$"):
                run_compare(*command)
        assert capsys.readouterr().out.count("Base model") == 1 and len(os.listdir("out")) == 1
    assert run_compare(*command) == 0 and "Base model" not in capsys.readouterr().out
    assert sorted(made()) == ["chain-dft-0", "chain-sft-0"] and len(os.listdir("out")) == 4
    assert all(config(name)["init_from"] is None for name in made())


def test_a_variant_with_a_base_of_its_own(quick_base, in_process, capsys):
    """Both bases are made before the first run, each once."""
    assert run_compare("sft", "dft", "sft:n_embd=8", *TINY, *SHAPE) == 0
    out = capsys.readouterr().out
    assert out.count("Base model: ") == 2
    assert out.rindex("Base model: ") < out.index("sft, seed 0")
    widths = {name: config(name)["model_config"]["n_embd"] for name in made()}
    assert widths == {"chain-sft-0": 16, "chain-dft-0": 16, "chain-sft-n_embd-8-0": 8}


def test_a_reward_model_is_made_once_for_all(quick_base, tiny_base, in_process, capsys):
    """What two variants and two seeds need is trained before the first run."""
    flags = ("--reward", "model", "--seeds", 2, *TINY, *SHAPE, "--num_generations", 4)
    assert run_compare("grpo", "ppo", *flags) == 0
    out = capsys.readouterr().out
    assert out.count("Reward model: ") == 1 and out.count("Base model: ") >= 1
    assert out.index("Reward model: ") < out.index("grpo, seed 0")
    assert len(in_process) == 4


def test_ctrl_c_and_going_on(tiny_base, monkeypatch, in_process, capsys):
    """Ctrl-C stops the run at hand, which saves; the printed command goes on with it and repeats
    nothing."""
    before, updates = signal.getsignal(signal.SIGINT), []
    with interrupted(monkeypatch, 3):   # in step 1 of the second run
        assert run_compare("sft", "dft", "--seed", 1, *TINY, "--init_from", tiny_base) == 130
    said = re.search(r"stopped; go on with: python compare.py (.*)", capsys.readouterr().out)
    assert len(in_process) == 2 and signal.getsignal(signal.SIGINT) is before
    assert os.path.exists("out/chain-dft-1/ckpt.pt")
    assert not os.path.exists("out/chain-dft-1/summary.json")
    update = train.update
    monkeypatch.setattr(train, "update", lambda *args: updates.append(update(*args)))
    assert compare.main(shlex.split(said.group(1))) == 0
    assert in_process[2:] == [[*in_process[1], "--resume"]] and len(updates) == 1
    assert sorted(made()) == ["chain-dft-1", "chain-sft-1"]


def test_ctrl_c_while_the_base_is_made(monkeypatch, in_process, capsys):
    """Then nothing is compared, and the printed command is the comparison's own."""
    def interrupted_update(*args):
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(train, "update", interrupted_update)
    assert run_compare("sft", "dft", *TINY, *SHAPE, "--out_dir", "there/") == 130
    out = capsys.readouterr().out
    assert "go on with: python compare.py sft dft" in out and "--resume" not in out
    assert in_process == []


def test_judged_by_other_problems_a_run_is_made_again(tiny_base, in_process):
    """--eval_problems changes no weights but every figure of the table: a finished run is reused at
    the same number only."""
    command = ("sft", "dft", *TINY, "--init_from", tiny_base, "--out_dir", "there/")
    assert run_compare(*command) == run_compare(*command) == 0 and len(in_process) == 2
    assert run_compare(*command, "--eval_problems", 8) == 0 and len(in_process) == 4
    assert "--resume" not in in_process[3] and os.path.exists("there/compare.json")


def test_a_folder_that_holds_no_run_is_not_reused(tiny_base):
    """A broken checkpoint, or one of other settings, is no run to go on with."""
    os.makedirs("out/chain-sft-0")
    [arm] = compare.plan(["sft"], ["--init_from", str(tiny_base)], 0, 1)
    [asked] = [stage.config for stage in arm.stages]
    assert not compare.reusable(asked)
    torch.save({"model": {}, "model_config": {}}, "out/chain-sft-0/ckpt.pt")
    assert not compare.reusable(asked)


# -- the table ------------------------------------------------------------------------------------


def test_the_table_by_hand():
    """Mean and, behind +-, half the range over seeds; the base from the first run; a column that no
    run has is left out."""
    def result(variant, accuracy, tokens):
        return {"variant": variant, "before": {"eval/accuracy": 0.25},
                "after": {"eval/accuracy": accuracy}, "updates": 60, "sampled_tokens": tokens,
                "train_seconds": 8.2, "peak_memory_mb": None}
    table = report.comparison([result("sft", 0.9, 0), result("grpo", 0.5, 1000),
                               result("grpo", 0.7, 3000)])
    assert [row.split() for row in table.removesuffix(report.COSTS).splitlines()] == [
        ["accuracy", "updates", "sampled", "train", "s"], ["base", "0.250", "-", "-", "-"],
        ["sft", "0.900", "60", "0", "8.2"],
        ["grpo", "0.600", "+-0.100", "60", "2,000", "8.2"]]
