"""Data as it is published: GSM8K, instructions, chats and preferences."""

import json

import pytest

import data
from conftest import run
from harness.columns import Conversation, last_number, marked_number, understood
from harness.errors import InputError
from harness.files import JsonLines
from runs_helpers import metrics, write_jsonl

USER, OTHER = {"role": "user", "content": "7+5?"}, {"role": "user", "content": "And 2*3?"}
SYSTEM, SIX = {"role": "system", "content": "Count."}, {"role": "assistant", "content": "6"}
TWELVE = {"role": "assistant", "content": "12"}
GSM = {"question": "Ann has 7 and buys 5.", "answer": "7+5 = <<7+5=12>>12\nSo 12.\n#### 1,012"}


def ours(row):
    """The columns that a line turns into, without what it had."""
    found, how = understood(row, "x.jsonl, line 3")
    return {name: value for name, value in found.items() if row.get(name) != value}, how


@pytest.mark.parametrize("row, expected, how", [
    (GSM, {"prompt": GSM["question"], "completion": GSM["answer"], "answer": "#### 1,012"},
     "right is the number after ####"),
    ({"question": "7+5?", "answer": "12"}, {"prompt": "7+5?", "completion": "12"}, "question as"),
    ({"instruction": "Add.", "input": "7 5", "output": "12"},
     {"prompt": "Add.\n\n7 5", "completion": "12"}, "instruction and input as prompt"),
    ({"instruction": "Add 7 and 5.", "input": "", "output": "12"},
     {"prompt": "Add 7 and 5.", "completion": "12"}, "instruction and input as prompt"),
    ({"messages": [USER, TWELVE]}, {"prompt": "7+5?", "completion": "12"}, "messages: "),
    ({"messages": [USER, TWELVE], "prompt": "7+5?", "prompt_id": "a"}, {"completion": "12"},
     "messages: "),   # as some sets have both
    ({"messages": [USER]}, {"prompt": "7+5?"}, "messages: "),
    ({"messages": [SYSTEM, USER, TWELVE, OTHER, SIX]},
     {"prompt": "Count.\n7+5?\n12\nAnd 2*3?", "completion": "6"}, "messages: "),
    ({"prompt": "7+5?", "chosen": [USER, TWELVE], "rejected": [USER, SIX]},
     {"chosen": "12", "rejected": "6"}, "last message of each list"),
    ({"chosen": [USER, TWELVE], "rejected": [USER, SIX]},
     {"prompt": "7+5?", "chosen": "12", "rejected": "6"}, "last message of each list"),
    ({"prompt": [SYSTEM, USER], "chosen": [TWELVE], "rejected": [SIX]},
     {"prompt": "Count.\n7+5?", "chosen": "12", "rejected": "6"}, "last message of each list"),
    ({"prompt": [USER], "completion": [TWELVE]}, {"prompt": "7+5?", "completion": "12"},
     "last message of each list"),
    ({"prompt": "7+5?", "chosen": "12", "rejected": "6"}, {}, ""),
    ({"prompt": "7+5=", "answer": "12", "question": "x", "output": "z"}, {}, ""),
    ({"text": "7+5=12"}, {}, ""),
])
def test_lines_as_they_are_published(row, expected, how):
    """The usual columns become ours; what has ours already stays as it is, whatever stands
    beside."""
    found, said = ours(row)
    assert found == expected
    assert how in said if how else said == ""


def test_turns_are_kept():
    """A prompt of several turns reads as text and remembers who said what; so do those of lists."""
    row, _ = understood({"messages": [SYSTEM, USER, TWELVE, OTHER, SIX]}, "")
    assert row["prompt"].turns == (("system", "Count."), ("user", "7+5?"), ("assistant", "12"),
                                   ("user", "And 2*3?"))
    row, _ = understood({"chosen": [SYSTEM, USER, TWELVE], "rejected": [SYSTEM, USER, SIX]}, "")
    assert row["prompt"].turns == (("system", "Count."), ("user", "7+5?"))
    assert type(understood({"messages": [USER, SIX]}, "")[0]["prompt"]) is str
    tokenizer = data.Tokenizer("byte")   # ours has no turns
    assert tokenizer.encode_prompt(Conversation([("user", "a"), ("user", "b")])) == [256, *b"a\nb"]


@pytest.mark.parametrize("row, named", [
    ({"messages": [{"role": "user"}]}, "content that is text; this one has 'user' and NoneType"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
    ({"messages": ["7+5?"]}, "this one has None"),
    ({"messages": []}, "no message in the list"),
    ({"chosen": [TWELVE], "rejected": [SIX]}, "there is no prompt"),
    ({"prompt": [USER], "chosen": [{"role": "assistant", "content": None}], "rejected": [SIX]},
     "NoneType"),
])
def test_messages_that_are_none_are_named(row, named):
    """With file and line."""
    with pytest.raises(InputError, match="x.jsonl, line 3: .*" + named):
        understood(row, "x.jsonl, line 3")


# -- GSM8K's reward -------------------------------------------------------------------------------


@pytest.mark.parametrize("completion, right", [
    ("7+5 = 12, and a thousand.\n#### 1012", 1), ("#### 1,012", 1), ("####1012.00 dollars", 1),
    ("#### $1,012", 1), ("#### 5 no: #### 1012", 1), ("so 1012", 0), ("#### 12", 0), ("", 0),
    ("#### about 1012", 0), ("1012 ####", 0), ("#### 1012 #### 7", 0), ("#### -1012", 0),
])
def test_the_number_after_the_mark_is_what_counts(completion, right):
    """The number after the last ####, exactly; one that stands elsewhere is no answer."""
    columns = {"answer": ["#### 1,012"]}
    assert JsonLines.reward(["q"], [completion], **columns) == [right]


def test_answers_without_a_mark_are_judged_as_before():
    """By the last number of the completion; a mark in it does not matter."""
    assert JsonLines.reward(["q"] * 2, ["#### 5 or 6", "it is 6"], answer=["6", "#### 6"]) == [1, 0]
    assert marked_number("#### 5 or 6") == 5 and last_number("#### 5 or 6") == 6
    assert JsonLines.final_answer("#### 5 or 6") == 5 and JsonLines.final_answer("5 or 6") == 6
    assert marked_number("#### " + "9" * 2000) is None


# -- files ----------------------------------------------------------------------------------------


def test_a_list_in_a_json_file(tmp_path):
    """As instructions are often published; a line that is none is named by its place."""
    path = tmp_path / "alpaca.json"
    rows = [{"instruction": f"Add {i} and 5.", "input": "", "output": str(i + 5)}
            for i in range(30)]
    path.write_text(json.dumps(rows, indent=1))
    task = JsonLines(str(path))
    assert task.name == "alpaca" and len(task.train) + len(task.test) == 30
    assert task.demonstrations(30, 0)[0]["completion"] == "5"
    path.write_text(json.dumps([*rows, 7]))
    with pytest.raises(InputError, match="alpaca.json, item 31: a JSON object is needed"):
        JsonLines(str(path))
    path.write_text("[1,")
    with pytest.raises(InputError, match="alpaca.json: not JSON"):
        JsonLines(str(path))


@pytest.mark.parametrize("algo, flags", [("sft", ()), ("grpo", ("--num_generations", 4)),
                                         ("hybrid", ("--num_generations", 4))])
def test_gsm8k_trains(tiny_base, tmp_path, monkeypatch, capsys, algo, flags):
    """Its two columns are a demonstration, a problem, or both; how they were understood is said."""
    monkeypatch.chdir(tmp_path)
    write_jsonl([{"question": f"{a}+5?", "answer": f"{a}+5\n#### {a + 5}"} for a in range(30)],
                "gsm8k.jsonl")
    assert run("--algo", algo, "--data", "gsm8k.jsonl", "--eval_data", "gsm8k.jsonl",
               "--batch_size", 2, "--max_steps", 1, "--eval_problems", 2, "--max_new_tokens", 12,
               *flags, "--init_from", tiny_base, "--out_dir", "run") == 0
    assert "gsm8k.jsonl: question as prompt, answer as completion; right is the number after ####" \
        in capsys.readouterr().out
    assert "eval/accuracy" in metrics("run")[-1]
