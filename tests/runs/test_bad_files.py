"""
Wrong .jsonl files, and texts that do not fit: file, line and reason in one line, before anything is
trained. What needs no model is said even where no base model has been made yet.
"""

import ast
import dataclasses
import json
import os

import pytest
import torch

import compare
import data
import sample
import tasks
import train
from conftest import ROOT, SHAPE, TASK, run
from harness.errors import InputError
from model import GPT, GPTConfig
from runs_helpers import complaint

FAST = (*TASK, "--max_steps", 2, "--batch_size", 4)
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")])


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_sample(*words):
    return sample.main([str(word) for word in words])


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


@pytest.fixture
def files():
    for name, text in FILES.items():
        with open(name, "w") as file:
            file.write(text)


class Reached(Exception):
    """All checks have been passed: the base model comes next."""


def model_of(block_size):
    """The file of a model with this context, and nothing else in it."""
    shape = GPTConfig(block_size=block_size, n_layer=1, n_head=1, n_embd=2)
    torch.save({"model": GPT(shape).state_dict(), "model_config": dataclasses.asdict(shape)},
               "model.pt")
    return "model.pt"


# -- on a machine where no base model has been made yet -------------------------------------------


@pytest.mark.parametrize("flags, expected", [
    ("--algo sft --data nowhere", "nowhere: No such file or directory"),
    ("--algo sft --data broken", "broken, line 2: not JSON"),
    ("--data sums", "sums, line 1: no column 'answer'"),
    ("--data sums --reward leaky", "sums, line 1: no column 'answer'"),
    ("--data sums --reward brevity,flipped", "sums, line 1: no column 'answer'"),
    ("--algo sft --data sums --style bare", "--style and --wrong_share are for --task chain"),
    ("--algo dft --data sums --wrong_share 0.5", "--style and --wrong_share are for --task chain"),
    ("--data sums --reward format", "--reward format is unknown for sums: use one or more of"),
    ("--algo ppo --data sums", "sums, line 1: no column 'answer'"),
    ("--algo dpo --data sums", "sums, line 1: no column 'chosen'"),
    ("--algo rm --data sums", "sums, line 1: no column 'chosen'"),
    ("--algo rft --data sums", "sums, line 1: no column 'answer'"),
    ("--algo sft --data sums --eval_data broken", "broken, line 2: not JSON"),
    ("--algo sft --data sums --block_size 5", "sums, line 1: 7 tokens do not fit --block_size 5"),
    ("--algo dft --data answers --eval_data answers --block_size 36",
     "answers, line 1: 37 tokens"),
    ("--inspect all --algo sft --data sums", "sums, line 1: no column 'answer'"),
    ("--algo sft --data sums --eval_data numbers",
     "numbers, line 1: column 'completion' is not text"),
    ("--out_dir sums", "cannot write sums: Not a directory"),
    ("--algo rm --out_dir sums/below/that", "cannot write sums/below/that: Not a directory"),
    ("--init_from nowhere", "nowhere: there is no checkpoint there"),
    ("--reward correctness", "--reward correctness is unknown for chain"),
    ("--algo dpo --reward format --task countdown", "--reward format is unknown for countdown"),
    ("--algo rm --reward correctness", "--reward correctness is unknown for chain"),
    ("--algo rft --reward_weights 1,2", "--reward_weights has 2 numbers, --reward 1"),
    ("--reward model,correctness", "--reward correctness is unknown for chain"),
    ("--algo dpo --num_generations 1", "--num_generations 1: a pair needs at least 2 answers"),
    ("--algo rm --num_generations 1", "--num_generations 1: a pair needs at least 2 answers"),
    ("--algo rm --reward model", "--reward model: a reward model cannot be its own judge"),
    ("--reward model --reward_model nowhere", "nowhere: there is no checkpoint there"),
    # The reward model that would have to be made first has needs of its own.
    ("--reward model --data prompts", "prompts, line 1: no column 'chosen'"),
    ("--n_embd 30", "n_embd (30) must be divisible by n_head (4)"),
    ("--max_terms 100", "a prompt of 201 tokens and 694 for its answer do not fit block_size 128"),
    ("--task countdown --block_size 24", "a prompt of 13 tokens and 12 for its answer do not fit"),
    # What evaluation asks beside what is taught: chains, and numbers to be reversed.
    ("--task facts --block_size 30", "a prompt of 9 tokens and 22 for its answer do not fit"),
    ("--min_terms 2 --max_terms 2 --other_skills --block_size 16",
     "a prompt of 7 tokens and 10 for its answer do not fit"),
    ("--algo sft --style letters --block_size 28 --max_new_tokens 5",
     "a prompt of 9 tokens and 21 for its answer"),
    ("--algo sft --block_size 26 --max_new_tokens 5", "a prompt of 9 tokens and 18 for its answer"),
    ("--max_new_tokens 120", "a prompt of 9 tokens and 120 for its answer do not"),
    ("--algo rm --inspect", "--inspect shows what a policy is taught; --algo rm has none"),
    ("--algo pretrain --inspect", "--inspect shows what a policy is taught; --algo pretrain has"),
])
def test_what_can_be_known_is_said_before_anything_is_trained(files, monkeypatch, flags, expected):
    """Flags and files are checked first: no minute of pre-training, no folder, just one line."""
    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("something was trained"))
    assert complaint(run, *flags.split()).startswith(expected)
    assert sorted(os.listdir(".")) == sorted(FILES)


def test_what_just_fits_is_not_refused(files, monkeypatch):
    """The same limits, one token further: what fits exactly is trained."""
    def reached(*args):
        raise Reached
    monkeypatch.setattr(train.report, "needed_line", reached)   # the base is what comes next
    for flags in ("--algo sft --data sums --eval_data sums --block_size 7", "--max_terms 14",
                  "--algo sft --data texts --eval_data texts --block_size 5",
                  "--algo dpo --data pairs --eval_data pairs --block_size 7",
                  "--algo dft --data answers --eval_data answers --block_size 37",
                  "--task countdown --block_size 25", "--task facts --block_size 31",
                  "--min_terms 2 --max_terms 2 --other_skills --block_size 17",
                  "--algo sft --style letters --block_size 30 --max_new_tokens 5",
                  "--algo sft --block_size 27 --max_new_tokens 5",
                  "--block_size 14 --max_new_tokens 5"):
        with pytest.raises(Reached):
            run(*flags.split())


@pytest.mark.parametrize("name, size", [("sums", 7), ("texts", 5), ("pairs", 7), ("answers", 37)])
def test_what_a_model_is_judged_by_must_fit(files, capsys, name, size):
    """sample.py: a file's lines in a context that is a token too short, and in one that is just
    long enough."""
    words = "--data", name, "--eval_data", name
    said = complaint(run_sample, model_of(size - 1), *words)
    assert said.startswith(f"{name}, line 1: {size} tokens do not fit --block_size {size - 1}")
    assert run_sample(model_of(size), *words) == 0
    assert "held-out problems" in capsys.readouterr().out


def test_what_a_model_is_judged_by_must_be_text(files):
    """sample.py reads the completions of held-out lines."""
    said = complaint(run_sample, model_of(64), "--data", "numbers", "--eval_data", "numbers")
    assert said == "numbers, line 1: column 'completion' is not text"


def test_a_prompt_that_is_too_long(capsys):
    """sample.py: 105 digits, the <end> before them and 22 tokens for the answer are just 128."""
    said = complaint(run_sample, model_of(128), "1" * 106)
    assert said.startswith("a prompt of 107 tokens and ") and "22" in said
    assert "do not fit block_size 128" in said
    assert run_sample(model_of(128), "1" * 105) == 0 and "1" * 105 in capsys.readouterr().out


def test_a_variant_of_a_comparison_that_is_too_long(monkeypatch):
    """compare.py checks every variant before the base is made."""
    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("something was trained"))
    said = complaint(compare.main, ["sft", "grpo:max_new_tokens=120"])
    assert said.startswith("a prompt of 9 tokens and 120 for its answer do not")
    assert os.listdir(".") == []


def test_context_too_short(tiny_base):
    """Problems or answers longer than the context, that of a new base or of a checkpoint: the
    complaint says how long each is and what to do."""
    said = complaint(run, "--algo", "pretrain", *SHAPE, "--max_terms", 100)
    assert "block_size 128: lower --max_new_tokens or raise --block_size" in said
    said = complaint(run, "--init_from", tiny_base, *FAST, "--max_new_tokens", 1000)
    assert "a prompt of 5 tokens and 1000 for its answer do not fit block_size 128" in said


# -- lines of a file ------------------------------------------------------------------------------

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
    ("sft", '{"text": "a"}\n{"prompt": "b", "completion": "c"}',
     "bad.jsonl, line 2: no column 'text'"),
    ("pretrain", '{"prompt": "1+1=", "answer": "2"}', "bad.jsonl, line 1: no column 'completion'"),
    ("grpo", GOOD + '{"prompt": "1+2="}', "bad.jsonl, line 2: no column 'answer'"),
    ("grpo", "{}", "bad.jsonl, line 1: no column 'prompt'"),
    ("grpo", '{"prompt": "1+1=", "answer": 2}', "bad.jsonl, line 1: column 'answer' is not text"),
    ("rft", '{"prompt": "1+1=", "answer": 2}', "bad.jsonl, line 1: column 'answer' is not text"),
    ("grpo", '{"prompt": 1, "answer": "2"}', "bad.jsonl, line 1: column 'prompt' is not text"),
    ("pretrain", '{"text": ["a", "b"]}', "bad.jsonl, line 1: column 'text' is not text"),
    ("sft", GOOD + '{"prompt": "1", "completion": "' + "2" * 130 + '"}',
     "bad.jsonl, line 2: 133 tokens do not fit"),
    ("grpo", GOOD + '{"prompt": "' + "1" * 100 + '", "answer": "2"}',
     "bad.jsonl, line 2: 133 tokens do not fit"),
    ("pretrain", json.dumps({"text": "1" * 127}), "bad.jsonl, line 1: 129 tokens do not fit"),
], ids=lambda value: str(value)[:40])
def test_data_files(tiny_base, algo, content, expected):
    """A .jsonl file that cannot be used is refused by file, line and reason, whether to train on or
    to judge by."""
    for name, text in (("bad.jsonl", content), ("good.jsonl", GOOD)):
        with open(name, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
    start = ("--algo", algo, *FAST)
    start += () if algo == "pretrain" else ("--init_from", tiny_base)
    assert expected in complaint(run, *start, "--data", "bad.jsonl", "--eval_data", "good.jsonl")
    assert sorted(os.listdir(".")) == ["bad.jsonl", "good.jsonl"]
    # Which columns pre-training reads is told by the first line of --data.
    if algo != "pretrain" and "'text'" not in expected:
        said = complaint(run, *start, "--data", "good.jsonl", "--eval_data", "bad.jsonl")
        assert expected in said


def test_data_that_is_not_there(tiny_base):
    """A path that leads nowhere, and a folder."""
    os.mkdir("folder")
    start = "--init_from", tiny_base, "--data"
    said = complaint(run, *start, "nowhere.jsonl")
    assert said == "nowhere.jsonl: No such file or directory"
    assert complaint(run, *start, "folder") == "folder: Is a directory"


def test_nothing_left_to_train_on(tiny_base):
    """A file whose every line is held out says so, and what to give."""
    prompt = next(text for text in map(str, range(100)) if tasks.is_test(text))
    with open("one.jsonl", "w") as file:
        file.write(json.dumps({"prompt": prompt, "answer": "1"}))
    said = complaint(run, "--init_from", tiny_base, "--data", "one.jsonl")
    assert "one.jsonl: no line is left to train on" in said


def test_a_tokenizer_that_cannot_be_downloaded(monkeypatch):
    """--tokenizer gpt2 without a connection says so, and what works."""
    def offline(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(data.tiktoken, "get_encoding", offline)
    said = complaint(run, "--tokenizer", "gpt2")
    assert "could not be downloaded (ConnectionError)" in said and "--tokenizer byte" in said
    assert os.listdir(".") == []


# -- what the sources never do --------------------------------------------------------------------


def calls(path):
    """Every call in a source file: line, name of the function as written, {keyword: value}."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            yield node.lineno, ast.unparse(node.func), keywords


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_executed(path):
    """No source file evaluates text as a program: what a model writes is parsed, and a checkpoint
    is only weights. A comparison runs train.py itself, from a list of words."""
    for line, name, keywords in calls(path):
        place = path.name, line
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "pickle.load"), \
            place
        runs = (path.name, name) == ("compare.py", "subprocess.run")
        assert not name.startswith("subprocess.") or runs, place
        assert keywords.get("shell") is None, place
        assert name != "torch.load" or keywords.get("weights_only") == "True", place


def test_the_sources_are_all_looked_at():
    """The files with a call that matters are among them."""
    called = {(path.name, name) for path in SOURCES for _, name, _ in calls(path)}
    assert {("checkpoint.py", "torch.load"), ("compare.py", "subprocess.run")} <= called
    assert issubclass(InputError, ValueError)
