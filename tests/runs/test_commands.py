"""
The ways to give a command: train.py --algo, the algorithm's own file, and what older pages say,
which is answered by what to type today.
"""

import os
import re
import shlex
import signal

import pytest

import compare
import sample
import train
from conftest import ROOT, TASK, run, script
from harness import prepare
from model import GPTConfig
from runs_helpers import complaint, interrupted, summary

SIBLINGS = {"sft": "--completion_only maybe", "dft": "--iw_max 0", "rft": "--awr_beta 0",
            "dpo": "--simpo_gamma -1", "rm": "--center_rewards_coefficient -1",
            "ppo": "--vf_coef -1", "grpo": "--advantage_eps -1", "hybrid": "--shaping 0",
            "distill": "--divergence up"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# -- the algorithms' own files --------------------------------------------------------------------


@pytest.mark.parametrize("name", SIBLINGS)
def test_an_algorithm_file_is_a_command(name):
    """`python grpo.py ...` is `python train.py --algo grpo ...`: it knows a flag that no other
    algorithm has, and refuses what is out of bounds in one line."""
    flag, value = SIBLINGS[name].split()
    assert sum(flag[2:] in vars(A.Config)["__annotations__"]
               for key, A in train.ALGORITHMS.items() if key != "pretrain") == 1
    done = script(name, flag, value, cwd=".")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"error: [^\n]*{flag}[^\n]*\n", done.stderr)
    assert "unknown" not in done.stderr and os.listdir(".") == []


@pytest.mark.parametrize("name", SIBLINGS)
def test_an_algorithm_file_gives_the_same_run(name, monkeypatch):
    """The same settings, and the same words to go on with."""
    runs = []
    monkeypatch.setattr(train, "run", lambda *args: runs.append(args))
    words = ["--max-steps", "7", "--out_dir", "a b"]
    train.main(words, name)
    train.main(["--algo", name, *words])
    assert runs[0] == runs[1] and runs[0][0].algo == name and runs[0][0].max_steps == 7
    again = f"python train.py --algo {name} --max_steps 7 --out_dir 'a b'"
    assert runs[0][1:] == (again, again + " --resume")


def test_an_algorithm_file_trains(tiny_base):
    """A whole run, from the file itself, and a second that goes on with the other spelling."""
    words = *TASK, "--max_steps", 2, "--batch_size", 4, "--init_from", tiny_base
    done = script("sft", *words, cwd=".")
    assert done.returncode == 0, done.stderr
    assert summary("out/chain-sft-0")["algo"] == "sft"
    assert run("--algo", "sft", *words, "--resume") == 0
    assert summary("out/chain-sft-0")["steps"] == 2


def test_every_algorithm_has_its_file():
    """Base models apart, which sft.py makes."""
    assert set(SIBLINGS) == set(train.ALGORITHMS) - {"pretrain"}
    assert all((ROOT / f"{name}.py").exists() for name in SIBLINGS)


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_help(name, capsys):
    """--help of an algorithm's file shows its own flags and no other's."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"], name)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--n_embd" in out
    assert ("--epsilon_high" in out) == (name == "grpo")
    assert ("--completion_only" in out) == (name == "sft")


# -- old spellings --------------------------------------------------------------------------------


@pytest.mark.parametrize("words, today", [
    ("--algo sft,dft", "python compare.py sft dft"),
    ("--algo=sft,dpo:sync_steps=inf,grpo --max_steps 3",
     "python compare.py sft dpo:sync_steps=inf grpo"),
    ("--algo dpo:beta=1", "python compare.py dpo:beta=1"),
    ("--seed 1 --algo=sft,dft", "python compare.py sft dft"),
    ("--reward=brevity --algo=grpo,ppo", "python compare.py grpo ppo"),
    ("--algo sft,dft --seeds 3", "python compare.py sft dft"),
    ("--seeds=3", "python compare.py sft grpo --seeds 3"),
    ("--algo grpo --seeds 1", "python compare.py sft grpo --seeds 3"),
    ("--init_from out/x --sample 7+5=", "python sample.py FOLDER \"7+5*3=\""),
    ("--sample=3,5,7>26= --task countdown", "python sample.py FOLDER"),
    ("--sample 1,2>3= --algo=grpo", "python sample.py FOLDER"),
    ("--sample", "python sample.py FOLDER"),
    ("--init_from out/x --eval_only", "python sample.py FOLDER"),
    ("--eval-only", "python sample.py FOLDER"),
    ("--eval_only --top_k 5", "python sample.py FOLDER"),
    ("--top_k 5", "python sample.py FOLDER"), ("--algo sft --top-p=0.9", "python sample.py FOLDER"),
    ("--algo sft --source self", "python train.py --algo rft"),
    ("--algo dft --source=self", "python train.py --algo rft"),
    ("--algo ppo --num_ppo_epochs 2", "--num_iterations"),
    ("--algo ppo --num-mini-batches=2", "--num_minibatches"),
    ("--algo ppo --cliprange 0.2", "--epsilon"),
    ("--algo ppo --cliprange_value 0.2", "--epsilon_value"),
    ("--algo ppo --truncation mask", "--mask_truncated_completions"),
    ("--algo ppo --truncation bootstrap", "--bootstrap_truncated_completions")])
def test_an_old_spelling_names_the_new_one(words, today, monkeypatch):
    """One line, which says what to type."""
    monkeypatch.setattr(train, "run", lambda *args: pytest.fail("something was run"))
    said = complaint(run, *words.split())
    assert "moved" in said and today in said


def test_what_to_type_today_is_accepted(monkeypatch):
    """Each answer is a command, or a flag of the algorithm that had the old one."""
    for old, today in train.flags.MOVED.items():
        program, *words = shlex.split(today)
        if program != "python":
            flags = train.flags.declarations(train.ALGORITHMS["ppo"].Config)
            assert today.split()[0].removeprefix("--") in flags, old
        elif words[0] == "train.py":
            train.flags.parse(words[1:], train.ALGORITHMS, GPTConfig)
        elif words[0] == "compare.py":
            assert compare.plan(["sft", "grpo"], [], 0, 3) and words[1:3] == ["sft", "grpo"]
        else:
            monkeypatch.setattr(sample.checkpoint, "read", lambda path: {})
            assert words[0] == "sample.py" and sample.parse(words[1:])


def test_none_of_them_is_a_flag_of_today():
    """A flag that moved is not also still there."""
    for Algorithm in train.ALGORITHMS.values():
        known = {f"--{name}" for name in train.flags.declarations(Algorithm.Config)}
        assert not known & set(train.flags.MOVED)


@pytest.mark.parametrize("words", [
    "--reward=verifier,brevity --algo grpo", "--seed=3", "--out_dir=a:b", "--out-dir a,b:c",
    "--data=a,b:c.jsonl --algo sft", "--algo=dft --loss-type=power --alpha=1"])
def test_commas_and_colons_elsewhere_are_no_comparison(words):
    """Only --algo ever made a list of variants."""
    said = complaint(run, *words.split(), "--init_from", "nowhere")
    assert "moved" not in said and ("nowhere" in said or "a,b:c.jsonl" in said)


# -- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["run/", "./run", "run//", "other/../run"])
def test_a_folder_is_the_same_however_it_is_written(tiny_base, monkeypatch, capsys, given):
    """`run/` is `run`: the earlier run beside it is run.1, and not run/.1; files are named without
    a double slash; the printed command goes on in the same folder."""
    words = ("--algo", "sft", *TASK, "--max_steps", 2, "--batch_size", 4, "--init_from", tiny_base)
    assert run(*words, "--out_dir", "run") == 0
    with interrupted(monkeypatch, 1):
        assert run(*words, "--out_dir", given) == 130
    assert sorted(os.listdir(".")) == ["run", "run.1"]
    out = capsys.readouterr().out
    assert f"saved {os.path.join('run', 'ckpt.pt')} at step 1 of 2" in out
    said = re.search(r"go on with: python train.py (.*)", out).group(1)
    assert train.main(shlex.split(said)) == 0
    assert sorted(os.listdir(".")) == ["run", "run.1"] and summary("run")["steps"] == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_default_folder():
    """out/<task>-<algo>-<seed>; a file gives its name in place of the task."""
    def folder(words):
        return prepare.default_folder(train.flags.parse(words.split(), train.ALGORITHMS, GPTConfig))
    assert folder("--seed 3") == "out/chain-grpo-3"
    assert folder("--algo rft --task countdown") == "out/countdown-rft-0"
    assert folder("--algo sft --data my/sums.jsonl") == "out/sums-sft-0"


def test_a_new_flag_renames_no_base_model(monkeypatch):
    """The suffix of a base model's folder is made of what is not at its default, so one that was
    made before a flag was there is found again."""
    def folder(*words):
        config = train.flags.parse(["--algo", "pretrain", *words], train.ALGORITHMS, GPTConfig)
        return prepare.default_folder(config)
    asked = [(), ("--worked_share", "0.06"), ("--n_embd", "32"), ("--worked_share", "0.05")]
    before, identity = [folder(*words) for words in asked], prepare.identity
    assert len(set(before)) == 4 and before[0] == "out/chain-pretrain-0"
    monkeypatch.setattr(prepare, "identity", lambda config: {**identity(config), "new": 0.5})
    assert [folder(*words) for words in asked] == before
