"""Rewards: what an answer earns, how numbers are read from it, and which columns a reward takes."""

import ast
import json
from fractions import Fraction

import pytest

import data
import rm
import tasks
from data import Tokenizer
from harness.errors import InputError
from harness.files import JsonLines, last_number
from model import GPT, GPTConfig
from tasks import Chain, Countdown, Rewards, value


# -- reading numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("expression, expected", [
    ("3*7+5", 26), ("5+3*7", 26), ("(5+3)*7", 56), ("2*(3+(4-1))", 12), ("9-3-2", 4), ("8/4/2", 1),
    ("8/(4/2)", 4), ("7/2", Fraction(7, 2)), ("1/3+1/3+1/3", 1), ("2-5", -3), ("42", 42),
    ("((7))", 7), ("1/3*3-1", 0),
    ("(" * 45 + "7" + ")" * 45, 7),
])
def test_value_of_expressions(expression, expected):
    """Products before sums, from left to right, parentheses first, division exact."""
    assert value(expression) == expected


@pytest.mark.parametrize("expression", [
    "", "3*(7", "3*7)", "(3(", "()", "3+", "*3", "-3", "3 + 4", "3+4\n", "2(3)", "(2)3", "1.5",
    "1e9", "9**9", "7//2", "7%2", "1/0", "1/(2-2)", "2-+2", "three", "3+4end",
    "__import__('os')", "٣+٤", "²", "７",
    "(" * 100 + "1" + ")" * 100, "1+" * 50 + "1", "9" * 101, "(" * 5000,
])
def test_value_of_anything_else_is_none(expression):
    """Malformed, dividing by zero, over 100 characters long, code or foreign digits: None, never an
    exception."""
    assert value(expression) is None


def test_nothing_is_handed_to_eval():
    """What a model writes is never run as a program."""
    for module in (data, tasks):
        source = open(module.__file__, encoding="utf-8").read()
        assert "eval(" not in source and "exec(" not in source


@pytest.mark.parametrize("text, expected", [
    ("so 1,234.50 in all.", Fraction(2469, 2)), ("#### 42", 42), ("It is 42.", 42),
    ("from 3 to -7", -7), ("-0.5", Fraction(-1, 2)), ("1,000,000 or so", 10 ** 6),
    ("5, then 6, then", 6), ("cost: $12", 12),
    ("10% of 50", 50), ("none", None), ("", None), ("-", None),
])
def test_last_number(text, expected):
    """The last number of a text, with its sign, thousands and decimals, and without the full stop
    after it."""
    assert last_number(text) == expected


def test_reward_of_files_compares_last_numbers():
    """The answer 42 is met by any text that ends on the number 42, however it is written. (GSM8K's
    `#### 42` asks for the mark: test_columns.py.)"""
    completions = ["The answer is 42.", "42.0", "41", "no idea", "", "42 or 43"]
    assert JsonLines.reward([""] * 6, completions, ["so 42"] * 6) == [1, 1, 0, 0, 0, 0]
    assert JsonLines.reward([""], ["nothing"], ["nothing"]) == [0.0]  # no number is no right answer


def test_endless_digits_earn_nothing():
    """A completion that repeats one digit forever is a wrong answer, not the end of the run."""
    digits = "9" * 5000
    assert Countdown.reward([""], [digits], [[3, 5, 7]], [26]) == [0.0]
    assert JsonLines.reward([""], [digits], ["42"]) == [0.0]


# -- rewards --------------------------------------------------------------------------------------


def test_reward_functions():
    """`verifier` is the task's own, `format` pays for shown steps, `brevity` takes the share of the
    length used."""
    task = Chain()
    functions = Rewards(task, "brevity,verifier,format").functions
    assert list(functions) == ["brevity", "verifier", "format"]
    prompts, texts = ["7+5*3="] * 3, ["6", "7+5=2;2*3=7", ""]
    results = {name: f(prompts, texts, answer=["6"] * 3) for name, f in functions.items()}
    assert results["verifier"] == [1, 0, 0] and results["format"] == [0, 1, 0]
    assert task.max_new_tokens == 22 and results["brevity"] == [-1 / 22, -11 / 22, 0]


def parameter_names():
    """Every name of a parameter in the files that call and define rewards."""
    names = {"prompts", "completions", "p", "c", "max_new_tokens", "task", "columns", "self"}
    for module in (data, rm, tasks):
        for node in ast.walk(ast.parse(open(module.__file__, encoding="utf-8").read())):
            if isinstance(node, ast.arguments):
                names |= {a.arg for a in node.posonlyargs + node.args + node.kwonlyargs}
    return names - {"answer", "prompt", "completion", "text"}


def test_a_column_may_have_any_name(tmp_path):
    """Columns called like the parameters of the reward functions, `prompts` or `p`, change no
    reward."""
    names = parameter_names()
    assert {"prompts", "p", "numbers", "target", "names"} <= names
    rows = [{"prompt": f"question {i}", "answer": "6"} for i in range(3)]
    texts = ["6", "6", "7"]
    judge = rm.Judge(GPT(GPTConfig(n_layer=1, n_embd=32)).with_scalar_head(), Tokenizer())
    totals = []
    for columns in ({}, {name: "x" for name in names}):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps({**row, **columns}) + "\n" for row in rows))
        task = JsonLines(path, path, max_new_tokens=10, judge=judge)
        assert set(task.columns) == {"answer", *columns}
        rewards = Rewards(task, "verifier,majority,brevity,model")
        totals.append({name: each.tolist() for name, each in rewards(task.train, texts)[1].items()})
    assert totals[0] == totals[1] and totals[0]["verifier"] == [1, 1, 0]
    assert totals[0]["brevity"] == pytest.approx([-.1] * 3) and totals[0]["majority"] == [1, 1, 1]
    extra = {name: ["x"] * 3 for name in names - {"numbers", "target"}}
    for task, own in ((Chain(), {"answer": ["6"] * 3}),
                      (Countdown(), {"numbers": [[1, 2, 3]] * 3, "target": [6] * 3})):
        shown = "format," if task.shows_steps else ""
        for name, f in Rewards(task, shown + "verifier,majority,brevity").functions.items():
            assert f(["q"] * 3, texts, **own, **extra) == f(["q"] * 3, texts, **own), name


@pytest.mark.parametrize("task, names", [
    (Chain(), "verifier,verifier"), (Countdown(), "brevity,verifier,brevity")])
def test_a_reward_is_named_once(task, names):
    """Twice the same name would count once, and its weights would be one too many."""
    with pytest.raises(InputError, match=f"--reward {names} names a reward twice"):
        Rewards(task, names)


@pytest.mark.parametrize("task, names", [
    (Chain(), "verifier,nonsense"), (Chain(), ""), (Countdown(), "format")])
def test_unknown_reward(task, names):
    """A reward that the task does not have is an InputError that lists those it has."""
    unknown = f"{names.split(',')[-1]} is unknown for {task.name}: use .*verifier, .*brevity"
    with pytest.raises(InputError, match=unknown):
        Rewards(task, names)
