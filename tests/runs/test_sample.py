"""
sample.py: ask a model, or judge it. Task and tokenizer are those of the run; flags come first.
"""

import inspect
import os
import re

import pytest
import torch

import sample
from conftest import SHAPE, TASK, run, script
from harness import checkpoint as checkpoints
from harness import evaluate, report
from model import GPT
from runs_helpers import checkpoint, complaint, summary, write_jsonl


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tiny_base, tmp_path_factory):
    """trained("chain", "countdown", "facts" or "file") -> the folder of a finished SFT run, made
    once. That on a file has learned its sums by heart."""
    folders, place = {}, tmp_path_factory.mktemp("trained")
    sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)}
            for a in range(6) for b in range(6)]
    write_jsonl(sums, place / "sums.jsonl")
    flags = {"chain": TASK, "countdown": ("--task", "countdown", "--eval_problems", 16),
             "facts": ("--task", "facts", *TASK),
             "file": ("--data", place / "sums.jsonl", "--eval_data", place / "sums.jsonl",
                      "--max_new_tokens", 5, "--eval_problems", 36, "--learning_rate", 1e-2)}

    def trained(name):
        if name not in folders:
            steps = 100 if name == "file" else 2
            assert run("--algo", "sft", *flags[name], "--max_steps", steps, "--batch_size", 8,
                       "--eval_steps", 100, "--logging_steps", 100, "--init_from", tiny_base,
                       "--out_dir", place / name) == 0
            folders[name] = place / name
        return folders[name]
    return trained


@pytest.fixture
def ask(capsys):
    """ask(words) -> the lines that sample.py prints"""
    def ask(*words):
        capsys.readouterr()
        assert sample.main([str(word) for word in words]) == 0
        return capsys.readouterr().out.split("\n")[:-1]
    return ask


def refused(*words):
    return complaint(sample.main, [str(word) for word in words])


def completions(lines, prompt="7+5="):
    """What is behind the prompt in each line."""
    return [line.split(prompt, 1)[1] for line in lines]


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of GPT.generate, by name."""
    found, generate = [], GPT.generate

    def spy(*args, **kwargs):
        call = inspect.signature(generate).bind(*args, **kwargs)
        call.apply_defaults()
        found.append(call.arguments)
        return generate(*args, **kwargs)
    monkeypatch.setattr(GPT, "generate", spy)
    return found


# -- asking ---------------------------------------------------------------------------------------


def test_it_answers(tiny_base, ask):
    """The greedy answer and four sampled ones; a seed repeats them, another one changes the sampled
    ones alone. Nothing is written."""
    words = tiny_base, "7+5=", "--max_new_tokens", 6
    lines = ask(*words)
    ways = [line.split("  7+5=")[0].strip() for line in lines]
    assert ways == ["greedy", "sampled", "sampled", "sampled", "sampled"]
    assert len(set(completions(lines))) > 1
    again, other = ask(*words), ask(*words, "--seed", 1)
    assert again == lines and other[0] == lines[0] and other[1:] != lines[1:]
    assert os.listdir(".") == []


def test_the_greedy_answer_is_the_likeliest_token_each_time(trained, ask):
    """Against a model that reads the whole text anew for every token. It has learned 3+4=7."""
    model = checkpoints.build_model(checkpoints.read(trained("file")))
    ids = [256, *b"3+4="]
    while len(ids) == 5 or ids[-1] != 256:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    written = bytes(ids[5:-1]).decode()
    assert ask(trained("file"), "3+4=")[0] == f"greedy   3+4={written}" and written == "7"


def test_an_answer_that_runs_out_of_tokens_is_marked(trained, ask):
    """Three dots stand behind what has no end."""
    assert completions(ask(trained("file"), "1+1=", "--max_new_tokens", 1), "1+1=")[0] == "2 ..."
    assert completions(ask(trained("file"), "1+1=", "--max_new_tokens", 2), "1+1=")[0] == "2"


def test_the_number_of_answers(tiny_base, ask):
    """--num_generations sampled answers beside the greedy one."""
    for n in (1, 7):
        assert len(ask(tiny_base, "7+5=", "--num_generations", n, "--max_new_tokens", 2)) == n + 1


@pytest.mark.parametrize("flags", [("--top_k", 1), ("--top_p", 1e-6), ("--temperature", 1e-4)])
def test_the_narrowest_sampling_is_greedy(tiny_base, ask, flags):
    """With one token to choose from all five answers are one."""
    lines = ask(tiny_base, "7+5=", "--max_new_tokens", 6, *flags)
    assert len(lines) == 5 and len(set(completions(lines))) == 1


def test_how_answers_are_sampled(tiny_base, ask, calls):
    """temperature, top_k and top_p are for the sampled answers; the greedy one has temperature 0.
    By default the distribution is left as it is."""
    ask(tiny_base, "7+5=", "--temperature", 0.7, "--top_k", 5, "--top_p", 0.9)
    ask(tiny_base, "7+5=")
    how = [(c["temperature"], c["top_k"], c["top_p"], c["num_generations"]) for c in calls]
    assert how == [(0, 0, 1.0, 1), (0.7, 5, 0.9, 4), (0, 0, 1.0, 1), (1.0, 0, 1.0, 4)]


# -- judging --------------------------------------------------------------------------------------


def test_it_judges_as_the_run_did(trained, ask):
    """The numbers of the run's summary, to the digit, on the same problems; nothing is written."""
    for name, n, titles in (("chain", 16, ("worked steps", "completion length")),
                            ("file", 36, ("accuracy, sampled", "pass@4", "completion length"))):
        after = summary(trained(name))["after"]
        lines = ask(trained(name), "--eval_problems", n)
        for title, measure, _ in report.ROWS:
            if title in titles:
                assert any(re.match(rf"{title} +{after[measure]:.3f}", line) for line in lines)
    assert os.listdir(".") == [] and after["eval/accuracy"] > 0.3


def test_how_the_judged_answers_are_sampled(tiny_base, ask, calls):
    """The same three flags shape every sampled answer; the greedy ones stay greedy."""
    ask(tiny_base, *TASK, "--temperature", 0.7, "--top_k", 5, "--top_p", 0.9)
    how = {(c["temperature"], c["top_k"], c["top_p"]) for c in calls}
    assert how == {(0.7, 5, 0.9), (0, 0, 1.0)}
    assert [c["num_generations"] for c in calls] == [16, 1, 4]   # test, greedy, ood


def test_narrow_sampling_changes_what_is_judged(trained, ask):
    """Under --top_k 1 the sampled answers are the greedy ones: every row says the same."""
    lines = ask(trained("file"), "--top_k", 1, "--eval_problems", 36)
    found = {line[:22].strip(): line[22:].split()[0] for line in lines[1:]}
    same = {found[row] for row in ("accuracy, sampled", "accuracy, greedy", "pass@4", "pass@16")}
    assert len(same) == 1 and same != {"0.000"}
    free = ask(trained("file"), "--temperature", 3, "--eval_problems", 36)
    assert free[1] != lines[1] and free[2] == lines[2]


def test_a_file_without_answers(tiny_base, ask):
    """Held-out completions are judged by their likelihood."""
    write_jsonl([{"prompt": f"{n}+1=", "completion": "2"} for n in range(9)], "sums.jsonl")
    lines = ask(tiny_base, "--data", "sums.jsonl", "--eval_data", "sums.jsonl")
    assert [line.split("  ")[0] for line in lines] == ["held-out problems", "held-out nll"]


# -- whose task -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, prompt", [
    ("chain", r"\d[-+*]\d="), ("countdown", r"(\d+,){2}\d+>\d+="), ("facts", r"k[5-9]\d="),
    ("file", r"[0-5]\+[0-5]=")])
def test_the_task_is_that_of_the_run(trained, monkeypatch, ask, name, prompt):
    """Without a flag the problems are those with which the run was judged: of two terms,
    countdown, new facts, the file's."""
    seen, judge = [], evaluate.judge_answers

    def spy(model, ref_model, tokenizer, task, *args, **kwargs):
        seen.append(task)
        return judge(model, ref_model, tokenizer, task, *args, **kwargs)
    monkeypatch.setattr(evaluate, "judge_answers", spy)
    ask(trained(name), "--eval_problems", 8)
    problems = seen[0].problems("test", 8, 0)
    assert len(problems) == 8 and all(re.fullmatch(prompt, p["prompt"]) for p in problems)
    assert seen[0].max_new_tokens == {"chain": 10, "countdown": 12, "facts": 10, "file": 5}[name]


@pytest.mark.parametrize("flags, expected", [
    ((), dict(task="chain", min_terms=2, max_terms=2, data=None, tokenizer="byte")),
    (("--max_terms", 3), dict(min_terms=2, max_terms=3)),
    (("--task", "countdown"), dict(task="countdown")),
    (("--data", "other.jsonl"), dict(data="other.jsonl", task="chain")),
    (("--max-new-tokens=7",), dict(max_new_tokens=7)),
    (("--tokenizer", "gpt2"), dict(tokenizer="gpt2"))])
def test_flags_come_before_the_run(trained, flags, expected):
    """What is given on the command line counts, and the rest is the run's."""
    found, prompt, config = sample.parse([str(trained("chain")), *map(str, flags)])
    assert prompt is None and found["settings"]["algo"] == "sft"
    assert {name: getattr(config, name) for name in expected} == expected


def test_how_a_run_was_trained_does_not_matter(trained):
    """Only task and tokenizer are taken over: not the number of problems, nor the seed."""
    content = checkpoint(trained("chain"))
    content["settings"] |= {"seed": 5, "temperature": 0.5, "eval_problems": 16,
                            "num_generations": 2}
    torch.save(content, "other.pt")
    _, _, config = sample.parse(["other.pt"])
    assert (config.seed, config.temperature, config.eval_problems) == (0, 1.0, 256)
    assert config.num_generations == 4


def test_the_tokenizer_of_the_checkpoint(trained):
    """It is the one with which the model was trained, whatever the settings say."""
    torch.save({**checkpoint(trained("chain")), "tokenizer": "gpt2"}, "words.pt")
    assert sample.parse(["words.pt"])[2].tokenizer == "gpt2"


def test_a_bare_model(tiny_base, ask):
    """A file with weights and shape alone is asked and judged with the default task."""
    content = checkpoint(tiny_base)
    torch.save({name: content[name] for name in ("model", "model_config")}, "bare.pt")
    answers = [line for line in ask("bare.pt", "7+5=") if "  7+5=" in line]   # some break lines
    assert [line.split()[0] for line in answers] == ["greedy"] + 4 * ["sampled"]
    assert ask("bare.pt", "--eval_problems", 4)[0].startswith("held-out problems")


# -- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm") / "rm"
    assert run("--algo", "rm", *TASK, "--max_steps", 1, "--batch_size", 4, "--init_from",
               tiny_base, "--reward", "brevity", "--out_dir", folder) == 0
    return folder


@pytest.mark.parametrize("prompt", [(), ("7+5=",)], ids=["judged", "asked"])
def test_a_reward_model_cannot_write(reward_model, prompt):
    assert refused(reward_model, *prompt) == "this is a reward model, which cannot write"


@pytest.mark.parametrize("words, expected", [
    ("", "the following arguments are required: folder"),
    ("nowhere", "nowhere: there is no checkpoint there"),
    ("nowhere 7+5=", "nowhere: there is no checkpoint there"),
    (". 7+5=", "./ckpt.pt: there is no checkpoint there"),
    ("BASE 7+5= 3+4=", "unrecognized arguments: 3+4="),
    ("BASE --learning_rate 1", "unrecognized arguments: --learning_rate 1"),
    ("BASE --n_embd 16", "unrecognized arguments: --n_embd 16"),
    ("BASE --top_k -1", "--top_k -1"), ("BASE --top_k 1.5", "--top_k"),
    ("BASE --top_p 0", "--top_p 0.0"), ("BASE --top_p 1.5", "--top_p 1.5"),
    ("BASE --top_p nan", "--top_p nan"), ("BASE --temperature 0", "--temperature 0.0"),
    ("BASE --temperature=-1", "--temperature -1"), ("BASE --temperature inf", "--temperature inf"),
    ("BASE --num_generations 0", "--num_generations 0"),
    ("BASE --eval_problems 0", "--eval_problems 0"), ("BASE --seed -1", "--seed -1"),
    ("BASE 7+5= --seed 99999999999999999999", "--seed 99999999999999999999"),
    ("BASE --max_new_tokens -1", "--max_new_tokens -1"),
    ("BASE --max_new_tokens 1000", "1000 for its answer do not fit block_size 128"),
    ("BASE --task chess", "--task: invalid choice"), ("BASE --device tpu", "--device tpu"),
    ("BASE --data nowhere.jsonl", "nowhere.jsonl: No such file"),
    ("BASE --eval_data nowhere.jsonl", "--eval_data needs --data"),
    ("BASE --min_terms 4 --max_terms 3", "min_terms 4 and max_terms 3")])
def test_what_is_refused(tiny_base, words, expected):
    """One line, whatever is wrong."""
    assert expected in refused(*words.replace("BASE", str(tiny_base)).split())
    assert os.listdir(".") == []


def test_as_a_command(tiny_base):
    """As a person types it, with dashes: answers on stdout, nothing on stderr, exit code 0."""
    done = script("sample", tiny_base, "7+5=", "--max-new-tokens", 3, "--top-k=1", cwd=".")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("7+5=") == 5
    done = script("sample", "--help", cwd=".")
    assert done.returncode == 0 and "FOLDER [PROMPT]" in done.stdout and "--top_p" in done.stdout


def test_the_shape_is_the_checkpoints(tiny_base, ask, calls):
    """A model brings its own shape, folder or file."""
    lines = ask(tiny_base, "7+5=")
    assert ask(tiny_base / "ckpt.pt", "7+5=") == lines
    assert calls[0]["self"].config.n_embd == SHAPE[1]
