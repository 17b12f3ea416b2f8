"""
One command compares algorithms: each from the same base, over the same seeds, reused where it exists, in one table.
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

import report
import train
from conftest import ROOT, SHAPE, TASK, run
from conftest import train as shell
from model import InputError

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
            return SimpleNamespace(returncode=train.run(command[2:]), stderr="")
    monkeypatch.setattr(train.subprocess, "run", start)
    return commands


@pytest.fixture
def quick_base(monkeypatch):
    """Base models are made in 2 steps."""
    monkeypatch.setitem(train.PRETRAIN, "max_steps", 2)
    monkeypatch.setitem(train.PRETRAIN, "batch_size", 4)


@pytest.fixture
def nothing_is_run(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("something was run")
    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(train.subprocess, "run", fail)


def made():
    """When each run's summary was written."""
    names = [name for name in os.listdir("out") if "compare" not in name and "pretrain" not in name]
    return {name: os.stat(f"out/{name}/summary.json").st_mtime_ns for name in names}


def config(name):
    with open(f"out/{name}/config.json") as file:
        return json.load(file)


def weights(folder):
    return torch.load(os.path.join(folder, "ckpt.pt"), weights_only=True)["model"]


# -- what is run ----------------------------------------------------------------------------------


def test_a_comparison_in_a_terminal(tiny_base):
    """As a person types it: each run is a process of its own, whose output is not shown; one line
    for each, then the table."""
    done = shell("--algo", "sft,dft", *TINY, "--init_from", tiny_base, cwd=".")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    with open("out/chain-compare/compare.json") as file:
        assert report.comparison(json.load(file)) in done.stdout
    assert re.findall(r"(\w+), seed 0: held-out accuracy", done.stdout) == ["sft", "dft"]
    assert "loss" not in done.stdout


def test_a_comparison(tiny_base, in_process, capsys):
    """Two variants, two seeds: four runs, one table, compare.json; a second time nothing is run, a
    broken run goes on, and other settings make new runs and leave the old ones be."""
    command = ("--algo", "sft,dft:loss-type=power:alpha=0.5", "--seeds", 2, *TINY,
               "--num_demonstrations", 10, "--init_from", tiny_base)
    assert run(*command) == 0
    first, out = made(), capsys.readouterr().out
    names = ("sft", "dft-loss-type-power-alpha-0.5")
    assert sorted(first) == sorted(f"chain-{name}-{seed}" for name in names for seed in (0, 1))
    asked = config("chain-dft-loss-type-power-alpha-0.5-1")
    assert (asked["seed"], asked["loss_type"], asked["alpha"]) == (1, "power", 0.5)
    assert asked["init_from"] == str(tiny_base)
    with open("out/chain-compare/compare.json") as file:
        results = json.load(file)
    variants = command[1].split(",")
    planned = [(variant, seed) for variant in variants for seed in (0, 1)]
    assert [(r["variant"], r["seed"]) for r in results] == planned
    assert all(r["updates"] == 2 and r["trained_tokens"] > 0 for r in results)
    assert all("eval/accuracy" in r["after"] for r in results)
    table = report.comparison(results)
    assert table in out
    rows = table.removesuffix(report.COSTS).splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["base", *variants]

    os.remove("out/chain-sft-1/summary.json")
    assert run(*command) == 0
    second = made()
    assert [name for name in first if second[name] != first[name]] == ["chain-sft-1"]
    assert table.splitlines()[0] in capsys.readouterr().out and len(second) == 4

    assert run("--algo", "sft", "--seeds", 1, *command[4:], "--learning_rate", 0.1) == 0
    assert set(made()) == {*second, "chain-sft-0.1"}       # the first one is kept under this name


def test_what_a_variant_says_counts_more_than_what_all_say(tiny_base, in_process):
    """`dft:alpha=0.9` runs with .9 whatever --alpha says, before or behind --algo, and ends with
    the weights of such a run by itself; a variant that says nothing gets the common .1."""
    flags = (*TINY, "--init_from", tiny_base, "--loss-type", "power", "--alpha", 0.1)
    assert run("--algo=dft:alpha=0.9,dft", *flags) == 0
    first = made()
    assert run(*flags, "--algo", "dft:alpha=0.9,dft") == 0 and made() == first
    alphas = {name: config(name)["alpha"] for name in first}
    assert alphas == {"chain-dft-0": 0.1, "chain-dft-alpha-0.9-0": 0.9}
    alone = ("--algo", "dft", *flags[:-1], 0.9, "--out_dir", "alone")
    assert run(*alone) == 0
    for folder, same in (("out/chain-dft-alpha-0.9-0", True), ("out/chain-dft-0", False)):
        left, right = weights("alone"), weights(folder)
        assert all(torch.equal(left[name], right[name]) for name in left) == same


@pytest.mark.parametrize("flags, seeds", [
    ("--seed 3 --algo=sft,dft", [3]), ("--seeds 2 --algo sft,dft", [0, 1]),
    ("--algo sft,dft --seed=2 --seeds=3", [2, 3, 4])])
def test_seeds(tiny_base, in_process, flags, seeds):
    """--seed is the first seed, --seeds how many: every variant runs with each of them."""
    assert run(*flags.split(), *TINY, "--init_from", tiny_base) == 0
    names = [f"chain-{name}-{seed}" for name in ("sft", "dft") for seed in seeds]
    assert sorted(made()) == sorted(names)
    assert all(config(name)["seed"] == int(name.split("-")[-1]) for name in names)


@pytest.mark.parametrize("flags", [
    "--reward=verifier,brevity --algo grpo", "--sample=3,5,7>26= --task countdown", "--seed=3",
    "--sample 1,2>3= --algo=grpo", "--out_dir=a:b", "--out-dir a,b:c", "--device=cuda:7",
    "--data=a,b:c.jsonl --algo sft", "--algo=dft --loss-type=power --alpha=1"])
def test_commas_and_colons_elsewhere_are_no_comparison(flags, monkeypatch):
    """Whatever holds a comma or a colon, only --algo makes a list of variants."""
    monkeypatch.setattr(train, "compare", lambda argv: pytest.fail("taken for a comparison"))
    with pytest.raises(InputError):
        run(*flags.split(), "--init_from", "nowhere")


@pytest.mark.parametrize("flags", [
    "--algo=sft,dft", "--algo sft,dft", "--algo dpo:beta=1", "--seeds=3", "--seeds 1 --algo grpo",
    "--seed 1 --algo=sft,dft", "--reward=brevity --algo=grpo,ppo"])
def test_a_list_of_variants_or_a_number_of_seeds_is_a_comparison(flags, monkeypatch):
    """However it is written, with a blank or with =, and wherever it stands."""
    monkeypatch.setattr(train, "compare", lambda argv: argv)
    assert run(*flags.split()) == flags.split()


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", [
    ("--algo sft,grop", "did you mean grpo?"),
    ("--algo sft,dpo:sync_step=1", "did you mean --sync_steps?"),
    ("--algo sft,grpo --epsilon .1", "--epsilon is unknown"),    # to sft: it is grpo:epsilon=.1
    ("--algo dpo:sync_steps=never,sft", "--sync_steps never"),
    ("--algo sft,pretrain", "--algo pretrain makes what the others start from"),
    ("--algo sft,rm --seed 1", "--algo rm makes what the others start from"),
    ("--algo sft, --seeds 1", "--algo  is unknown"),
    ("--algo sft,dft --seeds 0", "--seeds 0: at least 1"),
    ("--algo sft,dft --seeds two", "--seeds"),
    ("--algo sft,dft --seed -1", "--seed -1"),
    ("--algo=sft,grop", "did you mean grpo?"),
    ("--seeds=2 --algo=grop", "did you mean grpo?"),
    ("--algo sft,dft --resume", "goes on by itself"),
    ("--algo sft,dft:resume=true", "goes on by itself"),
    ("--algo sft,dft:eval-only", "goes on by itself"),
    ("--algo sft,dft:sample=x", "goes on by itself"),
    ("--algo sft,dft --inspect", "goes on by itself"),
    ("--algo sft,dft:seed=1", "goes on by itself"),
    ("--algo sft,dft:seeds=2", "goes on by itself"),
    ("--algo sft,dft:algo=sft", "goes on by itself"),
    ("--algo sft,dft:out-dir=there", "goes on by itself"),
    ("--algo sft,dft,sft", "sft and sft are, or look like, the same"),
    ("--algo dpo:beta=1e-1,dpo:beta=1e+1", "dpo:beta=1e-1 and dpo:beta=1e+1 are, or look like"),
    ("--algo sft,dft --init_from nowhere", "nowhere"),
    ("--algo sft,grpo:init_from=nowhere", "nowhere"),
    ("--algo sft,grpo:reward=correctness", "--reward correctness is unknown"),
    ("--algo sft,dpo:num_generations=1", "--num_generations 1: a pair needs"),
    ("--algo sft,dft --data nowhere.jsonl", "nowhere.jsonl: No such file"),
    ("--algo sft,dft --out_dir taken", "cannot write taken"),
    ("--algo grpo,ppo:reward=model:reward_model=nowhere", "nowhere: there is no checkpoint"),
    ("--algo sft,dft --device tpu", "--device tpu"),
])
def test_what_cannot_be_compared(nothing_is_run, flags, expected):
    """A mistake anywhere in the list is one line, and nothing has been run, not even the base."""
    open("taken", "w").close()
    with pytest.raises(InputError) as error:
        run(*flags.split())
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(".") == ["taken"]


SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "completion": str(a + b)}
        for a in range(6) for b in range(6)]


def write_lines(rows, columns):
    with open("sums.jsonl", "w") as file:
        file.write("".join(json.dumps({c: row[c] for c in columns}) + "\n" for row in rows))


@pytest.mark.parametrize("algo, columns, held_out", [
    ("sft,dft", ("prompt", "completion"), False), ("grpo,ppo", ("prompt", "answer"), False),
    ("grpo:reward=brevity,ppo:reward=brevity", ("prompt",), True)])
def test_nothing_to_compare_by(nothing_is_run, algo, columns, held_out):
    """A file of which no line is held out, or whose held-out lines are bare prompts, is refused
    before the first run."""
    rows = [row for row in SUMS if held_out or not train.data.is_test(row["prompt"])]
    write_lines(rows, columns)
    with pytest.raises(InputError, match="sums.jsonl: no held-out lines with an answer, a compl"):
        run("--algo", algo, "--data", "sums.jsonl")
    assert os.listdir(".") == ["sums.jsonl"]


def test_one_bare_prompt_among_the_held_out_lines(nothing_is_run):
    """One held-out line that nothing can judge is enough to refuse."""
    write_lines(SUMS, ("prompt",))
    with open("held.jsonl", "w") as file:
        file.write('{"prompt": "1+2="}\n{"prompt": "1+1=", "completion": "2"}\n')
    with pytest.raises(InputError, match="no held-out lines with an answer, a completion or a text"):
        run("--algo", "grpo,ppo", "--reward", "brevity", "--data", "sums.jsonl", "--eval_data",
            "held.jsonl")


@pytest.mark.parametrize("algo, columns, judged_by", [
    ("sft,dft", ("prompt", "completion"), "nll"),
    ("sft,grpo", ("prompt", "answer", "completion"), "accuracy")])
def test_a_file_to_compare_by(tiny_base, in_process, capsys, algo, columns, judged_by):
    """With held-out completions runs are compared by their likelihood, with answers by accuracy."""
    write_lines(SUMS, columns)
    assert run("--algo", algo, "--data", "sums.jsonl", "--max_new_tokens", 4, "--max_steps", 1,
               "--batch_size", 2, "--init_from", tiny_base) == 0
    assert re.findall(r"held-out (\w+) \d", capsys.readouterr().out) == [judged_by] * 2
    assert len(made()) == 2 and os.path.exists("out/sums-compare/compare.json")


# -- the base, and what goes wrong on the way -----------------------------------------------------


def test_the_base_is_made_first(quick_base, monkeypatch, in_process, capsys):
    """Without --init_from the comparison makes the base that its runs then share; what fails in a
    run is said in one line."""
    command = ("--algo", "sft,dft", *TINY, *SHAPE)
    with monkeypatch.context() as patch:
        for stderr, said in (("a warning\nerror: no luck\n", "error: no luck"), ("", "no message")):
            failed = SimpleNamespace(returncode=2, stderr=stderr)
            patch.setattr(train.subprocess, "run", lambda *args, **kwargs: failed)
            with pytest.raises(InputError, match=f"^sft, seed 0: {said}$"):
                run(*command)
        assert "No base model" in capsys.readouterr().out and len(os.listdir("out")) == 1
    assert run(*command) == 0 and capsys.readouterr().out.count("Base model") == 1
    assert sorted(made()) == ["chain-dft-0", "chain-sft-0"] and len(os.listdir("out")) == 4
    assert all(config(name)["init_from"] is None for name in made())


def test_a_variant_with_a_base_of_its_own(quick_base, in_process, capsys):
    """Both bases are made before the first run, each once."""
    assert run("--algo", "sft,dft,sft:n_embd=8", *TINY, *SHAPE) == 0
    out = capsys.readouterr().out
    assert out.count("No base model") == 2
    assert out.rindex("No base model") < out.index("sft, seed 0")
    widths = {name: config(name)["model_config"]["n_embd"] for name in made()}
    assert widths == {"chain-sft-0": 16, "chain-dft-0": 16, "chain-sft-n_embd-8-0": 8}


def test_ctrl_c_and_going_on(tiny_base, monkeypatch, in_process, capsys):
    """Ctrl-C stops the run at hand, which saves; the printed command goes on with it and repeats
    nothing."""
    update, calls = train.update, []

    def interrupted_update(*args):
        calls.append(None)
        if len(calls) == 3:                                # in step 1 of the second run
            signal.raise_signal(signal.SIGINT)
        return update(*args)
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "update", interrupted_update)
    assert run("--algo", "sft,dft", "--seed", 1, *TINY, "--init_from", tiny_base) == 130
    said = re.search(r"stopped; go on with: python train.py (.*)", capsys.readouterr().out).group(1)
    assert len(in_process) == 2 and signal.getsignal(signal.SIGINT) is before
    assert os.path.exists("out/chain-dft-1/ckpt.pt")
    assert not os.path.exists("out/chain-dft-1/summary.json")
    assert train.run(shlex.split(said)) == 0
    assert in_process[2:] == [[*in_process[1], "--resume"]] and len(calls) == 4
    assert sorted(made()) == ["chain-dft-1", "chain-sft-1"]


def test_ctrl_c_while_the_base_is_made(monkeypatch, in_process, capsys):
    """Then nothing is compared, and the printed command is the comparison's own."""
    def interrupted_update(*args):
        signal.raise_signal(signal.SIGINT)
        return 0
    monkeypatch.setattr(train, "update", interrupted_update)
    assert run("--algo", "sft,dft", *TINY, *SHAPE, "--out_dir", "there/") == 130
    assert "go on with: python train.py --algo sft,dft" in capsys.readouterr().out
    assert in_process == []


def test_judged_by_other_problems_a_run_is_made_again(tiny_base, in_process):
    """--eval_problems changes no weights but every figure of the table: a finished run is reused at
    the same number only."""
    command = ("--algo", "sft,dft", *TINY, "--init_from", tiny_base, "--out_dir", "there/")
    assert run(*command) == run(*command) == 0 and len(in_process) == 2
    assert run(*command, "--eval_problems", 8) == 0 and len(in_process) == 4
    assert "--resume" not in in_process[3] and os.path.exists("there/compare.json")


# -- the table ------------------------------------------------------------------------------------


def test_the_table_by_hand():
    """Mean and, behind +-, half the range over seeds; the base from the first run; a column nobody has is left out."""
    def result(variant, accuracy, tokens):
        return {"variant": variant, "before": {"eval/accuracy": 0.25}, "after": {"eval/accuracy": accuracy}, "updates": 60,
                "sampled_tokens": tokens, "train_seconds": 8.2, "peak_memory_mb": None}
    table = report.comparison([result("sft", 0.9, 0), result("grpo", 0.5, 1000), result("grpo", 0.7, 3000)])
    assert [row.split() for row in table.removesuffix(report.COSTS).splitlines()] == [
        ["accuracy", "updates", "sampled", "train", "s"], ["base", "0.250", "-", "-", "-"],
        ["sft", "0.900", "60", "0", "8.2"],
        ["grpo", "0.600", "+-0.100", "60", "2,000", "8.2"]]
