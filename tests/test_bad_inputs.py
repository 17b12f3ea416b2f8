"""
Whatever is wrong with flags, files or folders, a person reads one line that names the culprit: `error: ...` on stderr,
exit code 2, no traceback. In this process that is an InputError of one line; main() turns it into the rest.
"""

import ast
import json
import os
import re

import pytest
import torch

import train
from conftest import ROOT, SHAPE, TASK, run
from conftest import train as shell
from model import InputError

SOURCES = sorted(ROOT.glob("*.py"))
FAST = (*TASK, "--max_steps", 2, "--batch_size", 4)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def complaint(*flags):
    """The one line that a command ends with."""
    with pytest.raises(InputError) as error:
        run(*flags)
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 1000, text
    return text


@pytest.fixture
def refused(monkeypatch):
    """refused(flags) -> the complaint about a command line, which must come before anything is trained or written"""
    def train_nothing(*args):
        pytest.fail("the command was accepted")

    def refused(flags):
        said = complaint(*flags.split())
        assert os.listdir(".") == []
        return said
    monkeypatch.setattr(train, "train", train_nothing)
    monkeypatch.setattr(train.report, "evaluate", train_nothing)
    return refused


# -- as a command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", [
    ("--learning_rat 1", "--learning_rate"),
    ("--algo grppo", "grpo"),
    ("--init_from nowhere --eval_only", "nowhere"),
    ("--algo sft --resume", "out/chain-sft-0/ckpt.pt"),
    ("--algo sft --data nowhere.jsonl --init_from BASE", "nowhere.jsonl"),
    ("--out_dir taken --init_from BASE --eval_problems 4", "taken"),
    ("--init_from garbage", "garbage"),
])
def test_one_line_and_exit_code_2(tiny_base, flags, expected):
    """A bad command: exit code 2, exactly one line on stderr, which starts with `error: ` and names what is wrong."""
    open("taken", "w").close()
    with open("garbage", "wb") as file:
        file.write(b"\x80\x02J1")                          # half a number: torch.load raises a struct.error
    done = shell(*flags.replace("BASE", str(tiny_base)).split(), cwd=".")
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr) and expected in done.stderr, done.stderr


# -- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", [
    ("--learning_rat 1", "--learning_rat is unknown: did you mean --learning_rate?"),
    ("--num-generation=4", "--num_generation=4 is unknown: did you mean --num_generations?"),
    ("--algo sft --num_generation 4", "--num_generation is unknown"),
    ("--xyzzy", "--xyzzy is unknown; --help"),
    ("word", "word is unknown"),
    ("--algo grop", "--algo grop is unknown: did you mean grpo?"),
    ("--algo zzz", "--algo zzz is unknown; there are pretrain, sft, dft, dpo, rm, ppo, grpo"),
    ("--algo", "--algo"),
    ("--max_steps", "--max_steps"),
    ("--max_steps ten", "--max_steps: invalid int value: 'ten'"),
    ("--max_steps 1.5", "--max_steps"),
    ("--learning_rate fast", "--learning_rate"),
    ("--mask_truncated_completions maybe", "neither true nor false"),
    ("--advantage best", "--advantage: invalid choice: 'best'"),
    ("--task chess", "--task"),
    ("--lr_scheduler_type stairs", "--lr_scheduler_type"),
    ("--dtype float16", "--dtype"),
    ("--loss_type ppo", "--loss_type"),
    ("--tokenizer word", "--tokenizer word is unknown"),
    ("--sample", "--sample"),
])
def test_unknown_or_malformed(refused, flags, expected):
    """What is not a flag, not a number or not a choice is named, and the nearest right name suggested."""
    assert expected in refused(flags)


COUNTS = ("max_steps", "batch_size", "logging_steps", "eval_steps", "save_steps", "eval_problems", "num_generations",
          "num_iterations", "num_minibatches", "num_prompts", "n_embd", "n_head", "n_layer", "block_size")


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_at_least_one(refused, name, value):
    """A count of 0 or less is refused by its name."""
    assert name in refused(f"--{name} {value}")


FLOATS = ("learning_rate", "weight_decay", "adam_beta2", "max_grad_norm", "max_minutes", "temperature", "beta",
          "epsilon", "epsilon_high", "entropy_coef", "advantage_eps", "top_p", "rope_theta", "norm_eps")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_finite(refused, name, value):
    """No flag takes nan or infinity."""
    assert name in refused(f"--{name} {value}" if value[0] != "-" else f"--{name}={value}")


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
    ("--eval_only --top_k -1", "top_k"),
    ("--eval_only --top_p 0", "top_p"),
    ("--eval_only --top_p 1.5", "top_p"),
    ("--epsilon -0.2", "epsilon"),
    ("--beta -1", "beta"),
    ("--advantage_eps -1", "advantage_eps"),
    ("--std_correction 16", "std_correction"),
    ("--seed 99999999999999999999", "seed"),
    ("--base_seed 99999999999999999999", "base_seed"),
    ("--algo pretrain --n_hidden -1", "n_hidden"),
    ("--algo pretrain --head_dim -2", "head"),
    ("--algo pretrain --rope_theta 0", "rope_theta"),
    ("--algo pretrain --norm_eps -1", "norm_eps"),
])
def test_numbers_out_of_range(refused, flags, expected):
    """A number that makes no sense is refused by its name, before a base model is made."""
    assert expected in refused(flags)


@pytest.mark.parametrize("flags, expected", [
    ("--top_k 5", "--top_k and --top_p are for --sample and --eval_only"),
    ("--algo sft --top_p 0.9", "--top_k and --top_p are for --sample and --eval_only"),
    ("--num_generations 1", "--num_generations 1 leaves a group nothing to compare with"),
    ("--num_generations 1 --advantage rloo --scale_rewards none", "--num_generations 1"),
    ("--num_generations 1 --advantage reinforce", "--scale_rewards none"),
    ("--algo pretrain --n_embd 30 --n_head 4", "n_embd (30) must be divisible by n_head (4)"),
    ("--algo pretrain --n_embd 12 --n_head 4", "must be even"),
    ("--algo pretrain --n_head 4 --n_kv_head 3", "n_head (4) must be divisible by n_kv_head (3)"),
    ("--algo pretrain --seed 1", "--base_seed"),
    ("--algo pretrain --init_from somewhere", "init_from"),
    ("--eval_data held_out.jsonl", "--eval_data needs --data"),
    ("--min_terms 1", "min_terms"),
    ("--min_terms 4 --max_terms 3", "min_terms 4 and max_terms 3"),
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
    ("--reward correctness", "--reward correctness is unknown for chain: use one or more of verifier, majority, brevity, format"),
    ("--reward verifier,", "--reward"),
    ("--reward verifier,format --reward_weights 1", "--reward_weights has 1 numbers, --reward 2 names"),
    ("--reward_weights 1,2", "--reward_weights has 2 numbers, --reward 1 names"),
    ("--reward_weights much", "--reward_weights much"),
    ("--reward_weights nan", "--reward_weights nan"),
])
def test_rewards(tiny_base, flags, expected):
    """Rewards that do not exist, and weights that are not as many numbers."""
    assert expected in complaint("--init_from", tiny_base, *FAST, *flags.split())


# -- on a machine where no base model has been made yet ------------------------------------------


def lines(count=9, **columns):
    """The text of a .jsonl file: `count` objects, in whose columns {} is the number of the line."""
    def filled(n):
        return {c: v.format(n) if isinstance(v, str) else v for c, v in columns.items()}
    return "".join(json.dumps(filled(n)) + "\n" for n in range(count))


FILES = {"sums": lines(prompt="{}+1=", completion="2"), "texts": lines(text="1+{}"),
         "numbers": lines(prompt="{}+1=", completion=2), "prompts": lines(prompt="{}+1="),
         "answers": lines(prompt="{}+1=", completion="2", answer="2"),
         "pairs": lines(prompt="{}+1=", chosen="2", rejected="3"),
         "broken": lines(1, text="a") + "{"}


@pytest.mark.parametrize("flags, expected", [
    ("--algo sft --data nowhere", "nowhere: No such file or directory"),
    ("--algo sft --data broken", "broken, line 2: not JSON"),
    ("--data sums", "sums, line 1: no column 'answer'"),
    ("--algo ppo --data sums", "sums, line 1: no column 'answer'"),
    ("--algo dpo --data sums", "sums, line 1: no column 'chosen'"),
    ("--algo rm --data sums", "sums, line 1: no column 'chosen'"),
    ("--algo dft --source self --data sums", "sums, line 1: no column 'answer'"),
    ("--algo sft --data sums --eval_data broken", "broken, line 2: not JSON"),
    ("--algo sft --data sums --block_size 5", "sums, line 1: 7 tokens do not fit --block_size 5"),
    ("--algo dft --data answers --eval_data answers --block_size 36", "answers, line 1: 37 tokens"),
    ("--inspect all --algo sft --data sums", "sums, line 1: no column 'answer'"),
    ("--eval_only --data numbers --eval_data numbers", "numbers, line 1: column 'completion' is"),
    ("--eval_only --data sums --eval_data sums --block_size 6", "sums, line 1: 7 tokens do not"),
    ("--eval_only --data texts --eval_data texts --block_size 4", "texts, line 1: 5 tokens do not"),
    ("--eval_only --data pairs --eval_data pairs --block_size 6", "pairs, line 1: 7 tokens do not"),
    ("--out_dir sums", "cannot write sums: Not a directory"),
    ("--algo rm --out_dir sums/below/that", "cannot write sums/below/that: Not a directory"),
    ("--init_from nowhere", "nowhere: there is no checkpoint there"),
    ("--reward correctness", "--reward correctness is unknown for chain"),
    ("--algo dpo --reward format --task countdown", "--reward format is unknown for countdown"),
    ("--algo rm --reward correctness", "--reward correctness is unknown for chain"),
    ("--algo sft --source self --reward_weights 1,2", "--reward_weights has 2 numbers, --reward 1"),
    ("--reward model,correctness", "--reward correctness is unknown for chain"),
    ("--algo dpo --num_generations 1", "--num_generations 1: a pair needs at least 2 answers"),
    ("--reward model --reward_model nowhere", "nowhere: there is no checkpoint there"),
    ("--reward model --data prompts", "prompts, line 1: no column 'chosen'"),   # its own need
    ("--n_embd 30", "n_embd (30) must be divisible by n_head (4)"),
    ("--max_terms 100", "a prompt of 201 tokens and 598 for its answer do not fit block_size 128"),
    ("--sample " + "1" * 200, "a prompt of 201 tokens and 22 for its answer do not fit"),
    ("--task countdown --block_size 21", "a prompt of 10 tokens and 12 for its answer do not fit"),
    ("--algo sft --block_size 26 --max_new_tokens 5", "a prompt of 9 tokens and 18 for its answer"),
    ("--algo sft,grpo:max_new_tokens=120", "a prompt of 9 tokens and 120 for its answer do not"),
    ("--algo rm --inspect", "--inspect shows what a policy is taught; --algo rm has none"),
    ("--algo pretrain --inspect", "--inspect shows what a policy is taught; --algo pretrain has"),
])
def test_what_can_be_known_is_said_before_anything_is_trained(monkeypatch, flags, expected):
    """Flags and files are checked first: no minute of pre-training, no folder, just one line."""
    for name, text in FILES.items():
        with open(name, "w") as file:
            file.write(text)
    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("something was trained"))
    assert complaint(*flags.split()).startswith(expected)
    assert sorted(os.listdir(".")) == sorted(FILES)


def test_what_just_fits_is_not_refused(monkeypatch):
    """The same limits, one token further: what fits exactly is trained."""
    for name, text in FILES.items():
        with open(name, "w") as file:
            file.write(text)
    monkeypatch.setattr(train, "ensure", lambda *args: None)      # the base is what would come next
    for flags in ("--algo sft --data sums --eval_data sums --block_size 7", "--max_terms 14",
                  "--eval_only --data texts --eval_data texts --block_size 5",
                  "--algo dpo --data pairs --eval_data pairs --block_size 7",
                  "--algo dft --data answers --eval_data answers --block_size 37",
                  "--eval_only --data sums --eval_data sums --block_size 7",
                  "--eval_only --data pairs --eval_data pairs --block_size 7",
                  "--sample " + "1" * 105, "--task countdown --block_size 22",
                  "--algo sft --block_size 27 --max_new_tokens 5",
                  "--block_size 14 --max_new_tokens 5"):
        assert run(*flags.split()) == 130, flags


def test_a_folder_that_may_not_be_written(refused, monkeypatch):
    """The nearest folder that exists is tried, with a file that leaves nothing behind."""
    tried = []

    def denied(dir):
        tried.append(dir)
        raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(train.tempfile, "TemporaryFile", denied)
        for path in ("/usr/nowhere/below", "here", "../there"):
            said = refused(f"--out_dir {path}")
            assert said == f"cannot write {path}: Permission denied; choose another --out_dir"
    assert tried == ["/usr", ".", ".."]
    for path in (".", "deep/down/there"):
        train.check_folder(path)
    assert os.listdir(".") == []


# -- checkpoints ------------------------------------------------------------------------------------------------------


def edited(tiny_base, change):
    content = torch.load(tiny_base / "ckpt.pt", weights_only=True)
    content = change(content) or content
    torch.save(content, "bad.pt")


def nan(c):
    c["model"]["norm.weight"][0] = float("nan")


FOREIGN = {
    "a list": (lambda c: [1, 2, 3], "not a checkpoint of this project"),
    "a plain state dict": (lambda c: c["model"], "no 'model' and 'model_config'"),
    "a whole module": (lambda c: torch.nn.Linear(2, 2), "not a checkpoint of this project"),
    "weights without a shape": (lambda c: c.pop("model_config") and None, "no 'model' and 'model_config'"),
    "another shape": (lambda c: c["model_config"].update(n_embd=32), "do not fit its own shape"),
    "a layer too many": (lambda c: c["model_config"].update(n_layer=2), "do not fit its own shape"),
    "an unknown setting": (lambda c: c["model_config"].update(n_experts=8), "do not fit its own shape"),
    "a shape of words": (lambda c: c.update(model_config={"n_embd": "wide"}), "do not fit its own shape"),
    "a shape that is a list": (lambda c: c.update(model_config=[1, 2]), "do not fit its own shape"),
    "weights that are a list": (lambda c: c.update(model=[1, 2]), "do not fit its own shape"),
    "weights that are words": (lambda c: c["model"].update({"norm.weight": "heavy"}), "do not fit its own shape"),
    "weights that are not numbers": (nan, "finite"),
    "another tokenizer": (lambda c: c.update(tokenizer="gpt2"), "was trained with --tokenizer gpt2"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_checkpoints(tiny_base, case):
    """A PyTorch file that is not one of ours, or does not hold what it says, is refused for every use."""
    change, expected = FOREIGN[case]
    edited(tiny_base, change)
    for use in (("--eval_only",), ("--sample", "1+1="), ("--algo", "sft")):
        assert expected in complaint("--init_from", "bad.pt", *FAST, *use)


@pytest.mark.parametrize("content", [
    b"", b"}", b"PK", b"PK\x03\x04" + bytes(100), b"Lorem ipsum dolor sit amet\n" * 50, bytes(range(256)) * 9,
    b"\x80\x02", b"\x80\x02J1", bytes(4096), b"{\"model\": 1}"], ids=lambda content: f"{content[:8]} ({len(content)})")
def test_files_that_are_no_checkpoints(content):
    """Empty, text or binary files are refused by name."""
    with open("bad.pt", "wb") as file:
        file.write(content)
    said = complaint("--init_from", "bad.pt", "--eval_only")
    assert "bad.pt: not a checkpoint of this project, or a truncated one" in said


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy format"])
def test_truncated_checkpoints(tiny_base, zipped):
    """A checkpoint cut off anywhere is refused."""
    torch.save(torch.load(tiny_base / "ckpt.pt", weights_only=True), "whole.pt", _use_new_zipfile_serialization=zipped)
    with open("whole.pt", "rb") as file:
        whole = file.read()
    for length in [*range(1, 60), *range(60, len(whole), len(whole) // 60), len(whole) - 1]:
        with open("bad.pt", "wb") as file:
            file.write(whole[:length])
        with pytest.raises(InputError, match="bad.pt: not a checkpoint of this project, or a truncated one"):
            train.read_checkpoint("bad.pt")


def test_checkpoints_that_are_not_there(tmp_path):
    """A path that leads nowhere, a folder without a ckpt.pt, and a ckpt.pt that is a folder."""
    os.makedirs("empty")
    os.makedirs("strange/ckpt.pt")
    assert complaint("--init_from", "nowhere") == "nowhere: there is no checkpoint there"
    assert complaint("--init_from", "empty") == f"{os.path.join('empty', 'ckpt.pt')}: there is no checkpoint there"
    assert "strange" in complaint("--init_from", "strange")
    assert sorted(os.listdir(".")) == ["empty", "strange"]


def test_a_shape_that_is_not_the_checkpoints(tiny_base):
    """A shape flag that contradicts the checkpoint is refused; one that agrees is welcome."""
    said = complaint("--init_from", tiny_base, "--n_embd", 32, "--n_head", 2)
    assert "has n_embd 16, not 32: leave the flag out" in said
    assert run("--init_from", tiny_base, *FAST, *SHAPE, "--eval_only") == 0


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tiny_base):
    """The flags of an SFT run of 9 steps that stopped after the first, in the folder `run`."""
    flags = ("--algo", "sft", "--init_from", tiny_base, *TASK, "--max_steps", 9, "--batch_size", 4, "--out_dir", "run")
    assert run(*flags, "--max_minutes", 1e-6) == 0
    return flags


def test_resume_with_nothing_there(stopped):
    """--resume where no run was says so, makes nothing, and does not fall back on starting anew."""
    for algo in ("sft", "grpo", "pretrain"):
        said = complaint("--algo", algo, *FAST, *SHAPE, "--resume", "--out_dir", "nowhere")
        assert said == f"{os.path.join('nowhere', 'ckpt.pt')}: there is no checkpoint there"
    assert not os.path.exists("nowhere")


@pytest.mark.parametrize("change, named", [
    (("--learning_rate", 0.5), "--learning_rate 0.001"), (("--batch_size", 5), "--batch_size 4"),
    (("--seed", 1), "--seed 0"), (("--max_terms", 3), "--max_terms 2"),
    (("--num_demonstrations", 7), "--num_demonstrations 400"),
    (("--max_steps", 10), "--max_steps 9"), (("--algo", "grpo"), "--algo sft"), (("--n_embd", 32), "--n_embd")])
def test_resume_with_other_settings(stopped, change, named):
    """A run is resumed with the settings it was begun with; the one that differs is named, and nothing is touched."""
    before = os.stat("run/ckpt.pt").st_mtime_ns
    assert named in complaint(*stopped, *change, "--resume")
    assert os.stat("run/ckpt.pt").st_mtime_ns == before


def test_resume_a_bare_model(stopped):
    """A checkpoint with a model and no optimizer cannot be resumed, and the complaint says what it is good for."""
    content = torch.load("run/ckpt.pt", weights_only=True)
    torch.save({name: content[name] for name in ("model", "model_config")}, "run/ckpt.pt")
    assert "use --init_from run" in complaint(*stopped, "--resume")


@pytest.mark.parametrize("lost", ["step", "settings", "networks", "random_states"])
def test_resume_with_something_missing(stopped, lost):
    """A checkpoint that lacks anything that resuming needs is refused."""
    content = torch.load("run/ckpt.pt", weights_only=True)
    del content[lost]
    torch.save(content, "run/ckpt.pt")
    assert "cannot be resumed" in complaint(*stopped, "--resume")


# -- folders and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dir", ["taken", "taken/below"], ids=["a file", "below a file"])
@pytest.mark.parametrize("algo", ["sft", "pretrain"])
def test_out_dir_that_cannot_be_written(tiny_base, algo, out_dir):
    """Where a file is in the way, nothing is trained and the folder is named."""
    open("taken", "w").close()
    start = () if algo == "pretrain" else ("--init_from", tiny_base)
    assert "cannot write" in complaint("--algo", algo, *start, *FAST, "--out_dir", out_dir)
    assert os.listdir(".") == ["taken"]


GOOD = '{"prompt": "1+1=", "completion": "2", "answer": "2"}\n'


@pytest.mark.parametrize("algo, content, expected", [
    ("grpo", b"", "bad.jsonl: the file is empty"),
    ("grpo", b"\n \n", "bad.jsonl: the file is empty"),
    ("sft", b"\xff\xfe\x00\x01", "bad.jsonl: not a text file (byte 0 is not UTF-8)"),
    ("sft", bytes(range(256)), "bad.jsonl: not a text file (byte 128"),
    ("sft", GOOD + "\nprompt: 1+1", "bad.jsonl, line 3: not JSON"),
    ("sft", GOOD + GOOD[:20], "bad.jsonl, line 2: not JSON"),
    ("sft", GOOD + "[" * 100000, "bad.jsonl, line 2: not JSON"),
    ("sft", GOOD + "[1, 2]", "bad.jsonl, line 2: a JSON object is needed, this is a list"),
    ("sft", GOOD + "null", "bad.jsonl, line 2: a JSON object is needed"),
    ("sft", '{"prompt": "1+1="}', "bad.jsonl, line 1: no column 'completion'"),
    ("sft", '{"text": "a"}\n{"prompt": "b", "completion": "c"}', "bad.jsonl, line 2: no column 'text'"),
    ("pretrain", '{"prompt": "1+1=", "answer": "2"}', "bad.jsonl, line 1: no column 'completion'"),
    ("grpo", GOOD + '{"prompt": "1+2="}', "bad.jsonl, line 2: no column 'answer'"),
    ("grpo", "{}", "bad.jsonl, line 1: no column 'prompt'"),
    ("grpo", '{"prompt": "1+1=", "answer": 2}', "bad.jsonl, line 1: column 'answer' is not text"),
    ("grpo", '{"prompt": 1, "answer": "2"}', "bad.jsonl, line 1: column 'prompt' is not text"),
    ("pretrain", '{"text": ["a", "b"]}', "bad.jsonl, line 1: column 'text' is not text"),
    ("sft", GOOD + '{"prompt": "1", "completion": "' + "2" * 130 + '"}', "bad.jsonl, line 2: 133 tokens do not fit"),
    ("grpo", GOOD + '{"prompt": "' + "1" * 100 + '", "answer": "2"}', "bad.jsonl, line 2: 133 tokens do not fit"),
    ("pretrain", json.dumps({"text": "1" * 127}), "bad.jsonl, line 1: 129 tokens do not fit"),
], ids=lambda value: str(value)[:40])
def test_data_files(tiny_base, algo, content, expected):
    """A .jsonl file that cannot be used is refused by file, line and reason, whether to train on or to judge by."""
    for name, text in (("bad.jsonl", content), ("good.jsonl", GOOD)):
        with open(name, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
    start = ("--algo", algo, *FAST) + (() if algo == "pretrain" else ("--init_from", tiny_base))
    assert expected in complaint(*start, "--data", "bad.jsonl", "--eval_data", "good.jsonl")
    assert sorted(os.listdir(".")) == ["bad.jsonl", "good.jsonl"]
    if algo != "pretrain" and "'text'" not in expected:    # which columns pre-training reads is told by the first line
        assert expected in complaint(*start, "--data", "good.jsonl", "--eval_data", "bad.jsonl")


def test_data_that_is_not_there(tiny_base):
    """A path that leads nowhere, and a folder."""
    os.mkdir("folder")
    assert complaint("--init_from", tiny_base, "--data", "nowhere.jsonl") == "nowhere.jsonl: No such file or directory"
    assert complaint("--init_from", tiny_base, "--data", "folder") == "folder: Is a directory"


def test_nothing_left_to_train_on(tiny_base):
    """A file whose every line is held out says so, and what to give."""
    prompt = next(text for text in map(str, range(100)) if train.data.is_test(text))
    with open("one.jsonl", "w") as file:
        file.write(json.dumps({"prompt": prompt, "answer": "1"}))
    assert "one.jsonl: no line is left to train on" in complaint("--init_from", tiny_base, "--data", "one.jsonl")


def test_context_too_short(tiny_base):
    """A prompt or a completion longer than the context: the complaint says how long each is and what to do."""
    assert "a prompt of 201 tokens" in complaint("--init_from", tiny_base, "--sample", "1" * 200)
    assert "block_size 128" in complaint("--algo", "pretrain", *SHAPE, "--max_terms", 100)
    said = complaint("--init_from", tiny_base, *FAST, "--max_new_tokens", 1000)
    assert "a prompt of 5 tokens and 1000 for its answer do not fit block_size 128" in said


# -- what the sources never do ----------------------------------------------------------------------------------------


def calls(path):
    """Every call in a source file as (line, name of the function as written, names of the keywords)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_executed(path):
    """No source file evaluates text as a program: what a model writes is parsed, and a checkpoint is only weights."""
    for line, name, keywords in calls(path):
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "pickle.load"), (path.name, line)
        assert not name.startswith("subprocess.") or (path.name, name) == ("train.py", "subprocess.run"), (path.name, line)
        assert keywords.get("shell") is None, (path.name, line)      # a comparison runs train.py itself, from a list
        assert name != "torch.load" or keywords.get("weights_only") == "True", (path.name, line)


def test_a_checkpoint_cannot_run_code():
    """A pickle that would write a file when loaded is refused, and the file is not written."""
    class Evil:
        def __reduce__(self):
            return open, ("written", "w")
    torch.save({"model": Evil(), "model_config": {}}, "bad.pt")
    assert "bad.pt: not a checkpoint of this project" in complaint("--init_from", "bad.pt", "--eval_only")
    assert not os.path.exists("written")
