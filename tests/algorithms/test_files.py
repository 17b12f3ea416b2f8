"""Files of one's own: what is read of them, what is held out, and every line that is wrong is
named."""

import json
import re

import pytest

import data
from data import Tokenizer
from harness.errors import InputError
from harness.files import WHERE, JsonLines, file_name, read_jsonl
from model import GPT, GPTConfig
from tasks import Chain, is_test

TOKENIZER = Tokenizer("byte")


@pytest.fixture
def jsonl(tmp_path):
    """Write rows (dicts, or lines as they are) into a file and return its path."""
    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)
    return write


def questions(n, **columns):
    return [{"prompt": f"question {i}", **columns} for i in range(n)]


# -- reading a file -------------------------------------------------------------------------------


def test_read_jsonl_counts_lines_as_an_editor_does(jsonl):
    """Blank lines are skipped but counted, Windows line ends do no harm, each row knows its file
    and line."""
    path = jsonl({"prompt": "a"}, "", '{"prompt": "b\u2028c"}\r')
    assert read_jsonl(path) == [{"prompt": "a", WHERE: f"{path}, line 1"},
                                {"prompt": "b\u2028c", WHERE: f"{path}, line 3"}]


@pytest.mark.parametrize("line, reason", [
    ("{oops}", "line 3: not JSON"), ("[1, 2]", "line 3: a JSON object is needed, this is a list"),
    ("null", "line 3: a JSON object is needed"),
    ("[" * 100000, "line 3: not JSON .nested too deeply"),
])
def test_a_bad_line_is_named(jsonl, line, reason):
    """A line that is no JSON object: file, line and reason."""
    with pytest.raises(InputError, match=f"data.jsonl, {reason}"):
        read_jsonl(jsonl({"prompt": "a"}, "", line))


def test_a_bad_file_is_named(tmp_path):
    """Missing, empty, binary, or a folder: the file and the reason."""
    for name, content, reason in [("empty", b"", "empty"), ("blank", b"\n \n", "empty"),
                                  ("binary", b"\x80\x81\xff", "byte 0 is not UTF-8")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: .*{reason}"):
            read_jsonl(tmp_path / name)
    with pytest.raises(InputError, match="nowhere.jsonl: No such file"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="directory"):
        read_jsonl(tmp_path)


def test_one_line_in_ten_is_held_out(jsonl):
    """The split goes by the hash of the prompt: disjoint, complete, and lines of one prompt stay on
    one side."""
    task = JsonLines(jsonl(*questions(200, answer="1"), *questions(200, answer="2")))
    train, test = ({row["prompt"] for row in rows} for rows in (task.train, task.test))
    assert not train & test and len(train | test) == 200 and 10 < len(test) < 35
    assert len(task.train) == 2 * len(train) and len(task.test) == 2 * len(test)
    assert all(is_test(prompt) for prompt in test)


def test_eval_data_keeps_every_line_for_training(jsonl):
    """With --eval_data nothing is held out of --data, and the test split is that file."""
    task = JsonLines(jsonl(*questions(50)), jsonl({"prompt": "other"}, name="eval.jsonl"))
    assert len(task.train) == 50 and [row["prompt"] for row in task.test] == ["other"]


def test_a_file_of_held_out_lines_alone_is_refused(jsonl):
    """A file whose every line falls into the test split leaves nothing to train on."""
    held_out = next(f"question {i}" for i in range(1000) if is_test(f"question {i}"))
    with pytest.raises(InputError, match="data.jsonl: no line is left to train on.*--eval_data"):
        JsonLines(jsonl({"prompt": held_out}))


def test_columns_that_every_line_has_reach_the_reward(jsonl):
    """Further columns go to the reward function by name if all lines have them."""
    lines = [{"prompt": "a", "answer": "1", "unit": "m", "completion": "1"},
             {"prompt": "b", "answer": "2", "unit": "s", "note": "x", "completion": "2"}]
    held_out = {"prompt": "c", "answer": "3", "unit": "g", "completion": "3"}
    task = JsonLines(jsonl(*lines), jsonl(held_out, name="eval.jsonl"))
    assert task.columns == ("answer", "unit")


@pytest.mark.parametrize("row, columns, reason", [
    ({"prompt": "a"}, ("prompt", "answer"), "no column 'answer'.*the line has prompt"),
    ({"prompt": "a", "answer": 3}, ("prompt", "answer"), "column 'answer' is not text"),
    ({"prompt": "a", "completion": None}, ("prompt", "completion"),
     "column 'completion' is not text"),
    ({"completion": "a"}, ("text",), "no column 'text'"),
])
def test_a_line_without_what_the_algorithm_needs_is_named(jsonl, row, columns, reason):
    """A missing column, or one that is not text: file, line and reason; in the evaluation file as
    well."""
    line = {name: "x" for name in columns}
    good, bad = jsonl(line), jsonl(line, row, name="bad.jsonl")
    for files in ((bad, good), (good, bad)):
        with pytest.raises(InputError, match=f"bad.jsonl, line 2: {reason}"):
            JsonLines(*files).require(columns, TOKENIZER, 128)
    JsonLines(good, good).require(columns, TOKENIZER, 128)      # and a good file is no trouble


def test_a_line_that_does_not_fit_the_context_is_named(jsonl):
    """Prompt, completion (or room for one) and the two <end>s may fill block_size exactly, and not
    more."""
    path = jsonl({"prompt": "four", "completion": "seven", "answer": "1"})
    task, shown, asked = JsonLines(path, path), ("prompt", "completion"), ("prompt", "answer")
    task.require(shown, TOKENIZER, 11)                          # <end> four seven <end>
    sentence = "data.jsonl, line 1: 11 tokens do not fit --block_size 10"
    with pytest.raises(InputError, match=sentence + "$"):
        task.require(shown, TOKENIZER, 10)
    task.require(asked, TOKENIZER, 11, room=6)                  # <end> four and 6 sampled tokens
    with pytest.raises(InputError, match=sentence + " .6 of them for --max_new_tokens"):
        task.require(asked, TOKENIZER, 10, room=6)
    path = jsonl({"prompt": "four", "chosen": "seven", "rejected": "six"})
    task, pair = JsonLines(path, path), ("prompt", "chosen", "rejected")
    task.require(pair, TOKENIZER, 11)                           # each answer is read by itself
    with pytest.raises(InputError, match=sentence + "$"):
        task.require(pair, TOKENIZER, 10)


def test_some_lines_can_be_checked_apart(jsonl):
    """With `rows` those lines alone are checked: what evaluation reads of the held-out ones."""
    task = JsonLines(jsonl({"prompt": "a", "answer": "1"}), jsonl({"prompt": "b"}, name="b.jsonl"))
    task.require(("prompt", "answer"), TOKENIZER, 128, rows=task.train)
    task.require(("prompt",), TOKENIZER, 128, rows=task.test)
    with pytest.raises(InputError, match="b.jsonl, line 1: no column 'answer'"):
        task.require(("prompt", "answer"), TOKENIZER, 128, rows=task.test)


def test_a_label_is_true_or_false(jsonl):
    """A label in words or as a number other than 0 and 1 is named by file and line."""
    for label in (True, False, 1, 0):
        path = jsonl({"prompt": "a", "completion": "b", "label": label})
        JsonLines(path, path).require(("prompt", "completion", "label"), TOKENIZER, 128)
    for label in ("yes", 2, None):
        path = jsonl({"prompt": "a", "completion": "b", "label": label})
        with pytest.raises(InputError, match="line 1: column 'label' is neither true nor false"):
            JsonLines(path, path).require(("prompt", "completion", "label"), TOKENIZER, 128)


def test_what_the_lines_of_a_file_hold(jsonl):
    """`holds` asks for all the columns of the first training line; `verifies` is for answers that
    every line has, and a built-in task holds no preferences."""
    pairs = {"prompt": "a", "chosen": "b", "rejected": "c"}
    task = JsonLines(jsonl(pairs), jsonl(pairs, name="eval.jsonl"))
    assert task.holds("chosen", "rejected") and task.holds() and not task.verifies
    assert not task.holds("chosen", "label")
    answers = {"prompt": "a", "answer": "b"}
    assert JsonLines(jsonl(answers), jsonl(answers, name="eval.jsonl")).verifies
    assert not JsonLines(jsonl(answers), jsonl(pairs, name="eval.jsonl")).verifies
    assert Chain().verifies and not Chain().holds("chosen", "rejected")


def test_examples_of_a_file(jsonl):
    """Lines of text, and lines of prompt and completion, as documents and as demonstrations; no ood
    split."""
    other = jsonl({"text": "x"}, name="eval.jsonl")
    texts = JsonLines(jsonl({"text": "one"}, {"text": "two"}), other)
    pairs = JsonLines(jsonl({"prompt": "a", "completion": "b"}), other)
    one_and_two = [{"prompt": "", "completion": text} for text in ("one", "two")]
    assert texts.documents(0, 0) == texts.demonstrations(0, 0) == one_and_two
    assert pairs.documents(0, 0) == [{"prompt": "", "completion": "ab"}]
    shown = pairs.demonstrations(0, 0)
    assert [(e["prompt"], e["completion"]) for e in shown] == [("a", "b")]
    many = JsonLines(jsonl(*questions(30)), jsonl(*questions(5), name="eval.jsonl"))
    sizes = [len(many.problems(split, 3, 0)) for split in ("train", "test", "ood")]
    assert sizes == [30, 3, 0]


def test_name_of_a_file():
    """Runs are named after the file, in characters that any file system takes."""
    names = ["my/gsm8k train.jsonl", "a\\b.c.jsonl", "plain", ".jsonl"]
    assert [file_name(name) for name in names] == ["gsm8k-train", "b-c", "plain", "data"]


# -- lines of a file that must not crash a run ----------------------------------------------------


@pytest.mark.parametrize("row, column", [
    ({"prompt": 5, "answer": "1"}, "prompt"), ({"text": None}, "text")])
def test_a_prompt_that_is_not_text_is_named(jsonl, row, column):
    """A prompt or text that is a number or null is reported by file and line, like any other
    column."""
    good = {name: "x" for name in row}
    with pytest.raises(InputError, match=f"data.jsonl, line 2: column '{column}' is not text"):
        task = JsonLines(jsonl(good, row), jsonl(good, name="eval.jsonl"))
        task.require(tuple(row), TOKENIZER, 128)


def test_a_number_of_too_many_digits_is_named(jsonl):
    """A line with an integer longer than Python reads is reported by file and line."""
    with pytest.raises(InputError, match="data.jsonl, line 1: not JSON"):
        read_jsonl(jsonl('{"answer": ' + "1" * 5000 + "}"))


def test_half_a_surrogate_pair_in_a_prompt(jsonl):
    """A prompt with a lone surrogate, which JSON can spell, is read like any other."""
    path = jsonl({"prompt": "a"}, '{"prompt": "\\ud83d"}')
    task = JsonLines(path, jsonl({"prompt": "b"}, name="eval.jsonl"))
    assert [row["prompt"] for row in task.train] == ["a", "\ud83d"]


def test_an_empty_text_is_a_document(jsonl):
    """{"text": ""} is an empty document, of which only <end> is trained."""
    task = JsonLines(jsonl({"text": ""}, {"text": "a"}), jsonl({"text": "b"}, name="eval.jsonl"))
    assert [e["completion"] for e in task.documents(0, 0)] == ["", "a"]


def test_columns_called_line_and_file_are_the_users(jsonl):
    """They reach the reward as they are, and a complaint still knows where the row stands."""
    path = jsonl(*[{"prompt": f"p{i}", "answer": "1", "line": "x", "file": "y"} for i in range(30)])
    task = JsonLines(path)
    assert {"line", "file", "answer"} <= set(task.columns) and task.train[0]["line"] == "x"
    with pytest.raises(InputError, match=f"{re.escape(str(path))}, line \\d+: no column 'chosen'"):
        task.require(("chosen",), TOKENIZER, 128)


def test_lines_that_fit_alone_fit_in_one_batch(jsonl):
    """A long prompt with a short completion and the reverse pass `require`, so a batch of the two
    must be scorable."""
    path = jsonl({"prompt": "a" * 20, "completion": "b"}, {"prompt": "c", "completion": "d" * 20})
    task = JsonLines(path, path)
    task.require(("prompt", "completion"), TOKENIZER, 24)
    batch = data.collate(task.demonstrations(0, 0), TOKENIZER)
    model = GPT(GPTConfig(block_size=24, n_layer=1, n_embd=32))
    for index in (None, batch["prompt_index"]):
        logits = model.completion_logits(*list(batch.values())[:4], index)
        assert logits.shape == (2, 21, 258) and logits.isfinite().all()


# -- what is read, and what it makes --------------------------------------------------------------


def test_files_are_read_as_utf8(jsonl, monkeypatch):
    """Whatever the machine's own encoding is: it is named when the file is opened."""
    encodings, built_in = [], open

    def spy(*args, **kwargs):
        encodings.append(kwargs.get("encoding"))
        return built_in(*args, **kwargs)
    path = jsonl({"prompt": "a"})
    monkeypatch.setattr("builtins.open", spy)
    read_jsonl(path)
    assert encodings == ["utf-8"]


def test_a_column_must_be_in_both_files(jsonl):
    """A column that one line of either file lacks cannot reach the reward; the order is the
    alphabet's, so that it is the same in every process."""
    letters = dict.fromkeys("hgfedcba", "x")
    path = jsonl({"prompt": "a", **letters, "unit": "m"}, {"prompt": "b", **letters, "unit": "s"})
    other = jsonl({"prompt": "c", **letters, "unit": "g", "note": "x"},
                  {"prompt": "d", **letters, "note": "y"}, name="eval.jsonl")
    assert JsonLines(path, other).columns == tuple("abcdefgh")
    assert JsonLines(other, path).columns == tuple("abcdefgh")
    assert JsonLines(path, path).columns == (*"abcdefgh", "unit")


@pytest.mark.parametrize("row, tokens", [
    ({"text": "seven"}, 7),                                           # <end> seven <end>
    ({"prompt": "four", "chosen": "three", "rejected": "1"}, 11),     # the longer answer counts
    ({"prompt": "four", "chosen": "1", "rejected": "three"}, 11),
])
def test_texts_and_pairs_fill_the_context(jsonl, row, tokens):
    """A text, and a prompt with the longer of its two answers, may fill block_size exactly."""
    path = jsonl(row)
    task = JsonLines(path, path)
    task.require(tuple(row), TOKENIZER, tokens)
    with pytest.raises(InputError, match=f"{tokens} tokens do not fit --block_size {tokens - 1}$"):
        task.require(tuple(row), TOKENIZER, tokens - 1)


def test_a_file_is_a_task(jsonl):
    """It has the name of its file, room for answers of 32 tokens unless told otherwise, and no
    chance to compare with."""
    path = jsonl({"prompt": "a"}, name="my file.jsonl")
    task = JsonLines(path, path)
    assert (task.name, task.path, task.max_new_tokens) == ("my-file", path, 32)
    assert JsonLines(path, path, 7).max_new_tokens == 7 and task.chance(1) is None
