"""
Wrong flags: a person reads one line that names the culprit, before anything is trained or written.
As a command that is `error: ...` on stderr and exit code 2; in this process it is an InputError.
"""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import train
from conftest import ROOT, TASK, run, script
from conftest import train as shell
from harness import errors, evaluate, prepare
from runs_helpers import complaint

FAST = (*TASK, "--max_steps", 2, "--batch_size", 4)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(monkeypatch):
    """refused(flags) -> the complaint about a command line, before anything is trained or
    written."""
    def train_nothing(*args, **kwargs):
        pytest.fail("the command was accepted")

    def refused(flags):
        said = complaint(run, *flags.split())
        assert os.listdir(".") == []
        return said
    monkeypatch.setattr(train, "train", train_nothing)
    monkeypatch.setattr(evaluate, "evaluate", train_nothing)
    return refused


# -- as a command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name, words, expected", [
    ("train", "--learning_rat 1", "--learning_rate"),
    ("train", "--algo grppo", "grpo"),
    ("sample", "nowhere", "nowhere"),
    ("compare", "sft grop", "grpo"),
    ("train", "--algo sft --resume", "out/chain-sft-0/ckpt.pt"),
    ("train", "--algo sft --data nowhere.jsonl --init_from BASE", "nowhere.jsonl"),
    ("train", "--out_dir taken --init_from BASE --eval_problems 4", "taken"),
    ("train", "--init_from garbage", "garbage"),
    ("sample", "garbage 1+1=", "garbage"),
])
def test_one_line_and_exit_code_2(tiny_base, name, words, expected):
    """A bad command: exit code 2 and exactly one line on stderr, which starts with `error: ` and
    names what is wrong."""
    open("taken", "w").close()
    with open("garbage", "wb") as file:
        file.write(b"\x80\x02J1")   # half a number: torch.load raises a struct.error
    done = script(name, *words.replace("BASE", str(tiny_base)).split(), cwd=".")
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr) and expected in done.stderr, done.stderr
    assert sorted(os.listdir(".")) == ["garbage", "taken"]


@pytest.mark.parametrize("raised, code, said", [
    (errors.InputError("too many words"), 2, "error: too many words\n"),
    (OSError(28, "No space left on device", "out/x"), 2,
     "error: out/x: No space left on device\n"),
    (OSError(28, "No space left on device"), 2, "error: output: No space left on device\n"),
    (KeyboardInterrupt(), 130, "\nstopped\n")])
def test_how_a_command_ends(capsys, raised, code, said):
    """A mistake and a full disk: 2. Ctrl-C: 130. Each with one line and no traceback."""
    def main():
        raise raised
    assert errors.one_line(main) == code and capsys.readouterr().err == said


def test_an_error_of_the_program_is_not_hidden():
    """What is no mistake of the user keeps its traceback; what ends well keeps its code."""
    with pytest.raises(ZeroDivisionError):
        errors.one_line(lambda: 1 // 0)
    assert errors.one_line(lambda: 0) == 0 and errors.one_line(lambda: 130) == 130


def test_a_second_ctrl_c_ends_at_once(tiny_base):
    """The first lets the step end, the second does not: exit code 130, one line, no traceback."""
    program = (f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import train\n"
               "def update(*args):\n"
               "    signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)\n"
               "    os._exit(7)\n"
               "train.update = update\n"
               "train.start()\n")
    with open("program.py", "w") as file:
        file.write(program)
    words = [sys.executable, "program.py", "--algo", "sft", *FAST, "--init_from", tiny_base]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 130 and done.stderr == "\nstopped\n"
    assert "stopping after this step" in done.stdout
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", [
    ("--learning_rat 1", "--learning_rat is unknown: did you mean --learning_rate?"),
    ("--num-generation=4", "--num_generation=4 is unknown: did you mean --num_generations?"),
    ("--algo sft --num_generation 4", "--num_generation is unknown"),
    ("--xyzzy", "--xyzzy is unknown; --help"),
    ("word", "word is unknown"),
    ("--algo grop", "--algo grop is unknown: did you mean grpo?"),
    ("--algo zzz", "--algo zzz is unknown; there are pretrain, sft, dft, rft, dpo, rm, ppo, grpo"),
    ("--algo", "--algo"),
    ("--max_steps", "--max_steps"),
    ("--max_steps ten", "--max_steps: invalid int value: 'ten'"),
    ("--max_steps 1.5", "--max_steps"),
    ("--learning_rate fast", "--learning_rate"),
    ("--mask_truncated_completions maybe", "neither true nor false"),
    ("--advantage best", "--advantage: invalid choice: 'best'"),
    ("--task chess", "--task"),
    ("--algo sft --style loud", "--style: invalid choice: 'loud'"),
    ("--style bare", "--style is unknown"),
    ("--lr_scheduler_type stairs", "--lr_scheduler_type"),
    ("--dtype float16", "--dtype"),
    ("--loss_type ppo", "--loss_type"),
    ("--tokenizer word", "--tokenizer word is unknown: use byte or gpt2, or"),
    ("--inspect some", "--inspect: invalid choice: 'some'"),
])
def test_unknown_or_malformed(refused, flags, expected):
    """What is not a flag, not a number or not a choice is named, and the nearest right name
    suggested."""
    assert expected in refused(flags)


COUNTS = ("max_steps", "batch_size", "logging_steps", "eval_steps", "save_steps", "eval_problems",
          "num_generations", "num_iterations", "num_minibatches", "num_prompts", "n_embd", "n_head",
          "n_layer", "block_size")


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_at_least_one(refused, name, value):
    """A count of 0 or less is refused by its name."""
    assert name in refused(f"--{name} {value}")


FLOATS = ("learning_rate", "weight_decay", "adam_beta2", "max_grad_norm", "max_minutes",
          "temperature", "beta", "epsilon", "epsilon_high", "entropy_coef", "advantage_eps",
          "rope_theta", "norm_eps")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_finite(refused, name, value):
    """No flag takes nan or infinity."""
    assert name in refused(f"--{name}={value}")


@pytest.mark.parametrize("flags, expected", [
    ("--learning_rate 0", "learning_rate"),
    ("--learning_rate -1e-3", "learning_rate"),
    ("--temperature 0", "temperature"),
    ("--temperature -1", "temperature"),
    ("--algo sft --num_demonstrations 0", "num_demonstrations"),
    ("--algo pretrain --num_documents -1", "num_documents"),
    ("--adam_beta2 1", "adam_beta2"),
    ("--adam_beta2 -0.1", "adam_beta2"),
    ("--weight_decay -1", "weight_decay"),
    ("--warmup_steps -1", "warmup_steps"),
    ("--max_minutes -1", "max_minutes"),
    ("--max_grad_norm -1", "max_grad_norm"),
    ("--micro_batch_size -1", "micro_batch_size"),
    ("--max_new_tokens -1", "max_new_tokens"),
    ("--epsilon -0.2", "epsilon"),
    ("--beta -1", "beta"),
    ("--advantage_eps -1", "advantage_eps"),
    ("--std_correction 16", "std_correction"),
    ("--seed -1", "seed"),
    ("--seed 99999999999999999999", "seed"),
    ("--base_seed -1", "base_seed"),
    ("--base_seed 99999999999999999999", "base_seed"),
    ("--algo pretrain --worked_share 1.1", "worked_share 1.1: a number of at most 1 is needed"),
    ("--worked_share -0.1", "worked_share -0.1: a number of at least 0 is needed"),
    ("--algo sft --wrong_share 2", "wrong_share 2.0: a number of at most 1 is needed"),
    ("--algo dft --wrong_share -1", "wrong_share -1.0: a number of at least 0 is needed"),
    ("--reward flipped --flip_probability 1.5", "flip_probability 1.5: a number of at most 1"),
    ("--algo rft --flip_probability -0.5", "flip_probability -0.5: a number of at least 0"),
    ("--algo pretrain --n_hidden -1", "n_hidden"),
    ("--algo pretrain --head_dim -2", "head"),
    ("--algo pretrain --rope_theta 0", "rope_theta"),
    ("--algo pretrain --norm_eps -1", "norm_eps"),
])
def test_numbers_out_of_range(refused, flags, expected):
    """A number that makes no sense is refused by its name, before a base model is made."""
    assert expected in refused(flags)


@pytest.mark.parametrize("flags, expected", [
    ("--num_generations 1", "--num_generations 1 leaves a group nothing to compare with"),
    ("--num_generations 1 --advantage rloo --scale_rewards none", "--num_generations 1"),
    ("--num_generations 1 --advantage reinforce", "--scale_rewards none"),
    ("--algo pretrain --n_embd 30 --n_head 4", "n_embd (30) must be divisible by n_head (4)"),
    ("--algo pretrain --n_embd 12 --n_head 4", "must be even"),
    ("--algo pretrain --n_head 4 --n_kv_head 3", "n_head (4) must be divisible by n_kv_head (3)"),
    ("--algo pretrain --seed 1", "--base_seed"),
    ("--algo pretrain --pretraining long", "--max_steps 2000 --learning_rate 0.006"),
    ("--algo rm --seed 1 --base_seed 2", "--base_seed"),
    ("--algo pretrain --init_from somewhere", "init_from"),
    ("--eval_data held_out.jsonl", "--eval_data needs --data"),
    ("--min_terms 1", "min_terms"),
    ("--min_terms 4 --max_terms 3", "min_terms 4 and max_terms 3"),
    ("--algo sft --task countdown --style bare", "--style and --wrong_share are for --task chain"),
    ("--algo dft --task facts --style totals", "--style and --wrong_share are for --task chain"),
    ("--algo sft --task facts --wrong_share 0.1", "--style and --wrong_share are for --task chain"),
    ("--algo sft --style swapped --min_terms 2", "may be held out: give --min_terms 3"),
    ("--algo dft --style mixed --min_terms 2", "--style mixed solves other problems of two terms"),
    ("--task countdown --worked_share 0.1", "are for --task chain and facts"),
    ("--algo pretrain --task countdown --other_skills", "are for --task chain and facts"),
    ("--algo pretrain --task facts", "the base model of chain: give --task chain"),
    ("--device tpu", "--device tpu"),
    ("--device cpu:x", "--device cpu:x"),
])
def test_impossible_combinations(refused, flags, expected):
    """Flags that contradict each other are refused with what to do instead."""
    assert expected in refused(flags)


def test_no_gpu(refused, monkeypatch):
    """--device cuda on a machine without one says so, and what works."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused("--device cuda") == "--device cuda: not available here; use --device cpu"


@pytest.mark.parametrize("flags, expected", [
    ("--reward correctness", "--reward correctness is unknown for chain: use one or more of "
                             "verifier, model, majority, brevity, flipped, leaky, random, format"),
    ("--reward verifier,", "--reward"),
    ("--reward verifier,format --reward_weights 1", "--reward_weights has 1 numbers, --reward 2 "
                                                    "names"),
    ("--reward_weights 1,2", "--reward_weights has 2 numbers, --reward 1 names"),
    ("--reward_weights much", "--reward_weights much"),
    ("--reward_weights nan", "--reward_weights nan"),
])
def test_rewards(refused, tiny_base, flags, expected):
    """Rewards that do not exist, and weights that are not as many numbers."""
    words = " ".join(map(str, FAST))
    assert expected in refused(f"--init_from {tiny_base} {words} {flags}")


# -- folders --------------------------------------------------------------------------------------


def test_a_folder_that_may_not_be_written(refused, monkeypatch):
    """The nearest folder that exists is tried, with a file that leaves nothing behind."""
    tried = []

    def denied(dir):
        tried.append(dir)
        raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(prepare.tempfile, "TemporaryFile", denied)
        for path in ("/usr/nowhere/below", "here", "../there"):
            said = refused(f"--out_dir {path}")
            assert said == f"cannot write {path}: Permission denied; choose another --out_dir"
    assert tried == ["/usr", ".", ".."]
    for path in (".", "deep/down/there"):
        prepare.check_folder(path)
    assert os.listdir(".") == []


@pytest.mark.parametrize("out_dir", ["taken", "taken/below"], ids=["a file", "below a file"])
@pytest.mark.parametrize("algo", ["sft", "pretrain"])
def test_out_dir_that_cannot_be_written(tiny_base, algo, out_dir):
    """Where a file is in the way, nothing is trained and the folder is named."""
    open("taken", "w").close()
    start = () if algo == "pretrain" else ("--init_from", tiny_base)
    said = complaint(run, "--algo", algo, *start, *FAST, "--out_dir", out_dir)
    assert said.startswith(f"cannot write {out_dir}: Not a directory")
    assert os.listdir(".") == ["taken"]


def test_the_program_speaks_where_it_stands():
    """An error is on stderr alone, so that what is piped on stays clean."""
    done = shell("--algo", "grop", cwd=".")
    assert done.stdout == "" and done.stderr.startswith("error: ")
