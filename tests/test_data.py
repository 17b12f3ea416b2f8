"""The text: tokenizer, problems worked by hand, rewards, splits that never meet, files that are wrong, batches."""

import ast
import json
import random
import re
from fractions import Fraction

import pytest
import tiktoken
import torch

import data
import rm
from data import Chain, Countdown, JsonLines, Tokenizer, last_number, value
from model import GPT, GPTConfig, InputError

TOKENIZER = Tokenizer("byte")
EOS, PAD = 256, 257


def after_equals(document):
    """What follows the first `=` of a document: the answer part of `7+5=2`."""
    return document.split("=", 1)[1]


def prompt_of(document):
    return document.split("=", 1)[0] + "="


# -- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "7+5=2", "naïve Ω 漢字", "👩‍👩‍👧 🙂", "a\nb\r\n\tc\0", "<end>", "x<end><pad>y",
                                  "\ufeff\u2028"])
def test_bytes_round_trip_any_text(text):
    """A token a byte, all below 256: whatever a text says, `<end>` included, it never makes a special token."""
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_decoding_stops_at_the_first_end():
    """What stands after <end> is not read, padding is left out, and broken UTF-8 becomes U+FFFD."""
    assert TOKENIZER.decode([55, EOS, 56, EOS]) == "7"
    assert TOKENIZER.decode([PAD, 55, PAD, 56]) == "78"
    assert TOKENIZER.decode([EOS]) == TOKENIZER.decode([]) == ""
    assert TOKENIZER.decode([55, 0xF0, 0x9F, EOS]) == "7\ufffd"


def test_the_byte_tokenizer_says_how_large_it_is():
    """256 bytes and two special tokens, which tiktoken knows under the same numbers."""
    assert (TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.vocab_size) == (256, 257, 258)
    assert TOKENIZER.encoding.decode([256, 257]) == "<end><pad>"
    assert TOKENIZER.encoding.n_vocab == 258


def test_gpt2_that_cannot_be_downloaded_is_an_input_error(monkeypatch):
    """Offline, --tokenizer gpt2 says what to do instead of failing inside a library."""
    def offline(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(InputError, match="gpt2.*could not be downloaded.*--tokenizer byte"):
        Tokenizer("gpt2")


def test_gpt2_ids_are_tiktokens(monkeypatch):
    """gpt2 keeps tiktoken's own <end>; padding is a token beside its 50,257, and the table has room for it."""
    class Fake:
        eot_token, n_vocab = 50256, 50257

        def decode(self, ids, errors):
            return " ".join(map(str, ids))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: Fake())
    tokenizer = Tokenizer("gpt2")
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (50256, 50257, 64 * 786)
    assert tokenizer.decode([1, tokenizer.pad_id, 50300, 2, 50256, 3]) == "1 2"   # without what tiktoken does not know


def test_unknown_tokenizer():
    """Any other name is an InputError that lists the right ones."""
    with pytest.raises(InputError, match="gpt3 is unknown: use byte or gpt2"):
        Tokenizer("gpt3")


# -- chain ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, answer, steps", [
    ("7+5*3=", "6", "7+5=2;2*3=6"),
    ("1-2*3=", "7", "1-2=9;9*3=7"),              # -1 is 9 modulo 10
    ("0-9=", "1", "0-9=1"),
    ("7+5>3=", "3", "7+5=2;2>3=3"),
    ("9>0-9-9=", "1", "9>0=9;9-9=0;0-9=1"),
    ("8*7*6+4*1=", "0", "8*7=6;6*6=6;6+4=0;0*1=0"),
])
def test_chains_worked_by_hand(prompt, answer, steps):
    """From left to right, every result modulo 10."""
    assert Chain.solve(prompt) == {"answer": answer, "steps": steps}


@pytest.mark.parametrize("completion, reward", [
    ("6", 1), ("7+5=2;2*3=6", 1), ("7+5=3;2*3=6", 1),     # the last number alone counts, not the steps
    ("5", 0), ("7+5=2;2*3=7", 0), ("6;7", 0),
    ("", 0), ("6 ", 0), ("6x", 0), ("16", 0), ("6=", 0), ("6;", 0), ("7+5=2;2*3=6;", 0), ("6\n", 0), ("six", 0),
    (";=;=", 0),
])
def test_chain_reward(completion, reward):
    """1 where the last `;` or `=` is followed by the answer and by nothing else."""
    assert Chain.reward(["7+5*3="], [completion], answer=["6"]) == [reward]


def test_rewards_are_given_row_by_row():
    """Each completion is judged by the answer of its own row, and other columns are no trouble."""
    assert Chain.reward(["a", "b", "c"], ["1", "2", "1"], answer=["1", "1", "2"], steps=["", "", ""]) == [1.0, 0.0, 0.0]


def test_chain_corpus_is_a_textbook_and_then_everyday_text():
    """The first three fifths are all worked, the rest about 30 %, every answer is right, one in fourteen has `>`."""
    task, corpus = Chain(), Chain().corpus(2000, seed=0)
    worked = [task.is_worked(prompt_of(d), after_equals(d)) for d in corpus]
    assert all(worked[:1200]) and 0.25 < sum(worked[1200:]) / 800 < 0.35
    assert 0.05 < sum(">" in d for d in corpus) / 2000 < 0.09
    for d in corpus:
        assert task.reward([prompt_of(d)], [after_equals(d)], [Chain.solve(prompt_of(d))["answer"]]) == [1.0]


def test_chain_lengths():
    """Problems have min_terms to max_terms digits, and the longest worked answer with its <end> fits max_new_tokens."""
    task = Chain(2, 4)
    problems = data.problems(task, "train", 300, seed=0)
    assert {len(p["prompt"]) for p in problems} == {4, 6, 8}
    assert max(len(p["steps"]) for p in problems) + 1 <= task.max_new_tokens
    for wrong in ((1, 3), (4, 3)):
        with pytest.raises(InputError, match="2 <= min_terms <= max_terms"):
            Chain(*wrong)


# -- countdown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("completion, reward", [
    ("3*7+5", 1), ("5+7*3", 1), ("5+3*7", 1), ("(7*3)+5", 1), ("5-(0-3)*7", 0),    # 0 is not among the numbers
    ("3*7+6", 0), ("3*7+3+2", 0), ("3*7*5", 0), ("7*3", 0), ("26", 0), ("3*7+5=26", 0), ("3*7+5 ", 0), ("37-5", 0),
    ("3*7+5+5-5", 0), ("", 0), ("3*7+", 0), ("hello", 0),
])
def test_countdown_reward(completion, reward):
    """1 for every expression that uses 3, 5 and 7 once each and makes 26; 0 for other numbers, reuse or left-overs."""
    assert Countdown.reward(["3,5,7>26="], [completion], numbers=[[3, 5, 7]], target=[26]) == [reward]


def test_countdown_fractions_on_the_way_are_exact():
    """8/3*3 makes 8 exactly, which floating point need not."""
    assert Countdown.reward([""], ["8/3*3"], [[3, 3, 8]], [8]) == [1.0]


def test_countdown_problems_are_solved_by_their_solutions():
    """Each problem brings a solution that its own reward accepts, and its prompt says the numbers and the target."""
    task = Countdown()
    for p in data.problems(task, "train", 200, seed=0):
        assert task.reward([p["prompt"]], [p["solution"]], [p["numbers"]], [p["target"]]) == [1.0]
        a, b, c = p["numbers"]
        assert p["prompt"] == f"{a},{b},{c}>{p['target']}=" and len(p["solution"]) + 1 <= task.max_new_tokens


def test_countdown_targets():
    """Out of distribution are targets above 40, in the corpus too; training and test stay at or below 40."""
    task = Countdown()
    assert all(40 < p["target"] <= 99 for p in data.problems(task, "ood", 200, 0))
    for split in ("train", "test"):
        assert all(1 <= p["target"] <= 40 for p in data.problems(task, split, 200, 0))
    above = sum(int(d.split(">")[1].split("=")[0]) > 40 for d in task.corpus(500, 0))
    assert 0.18 < above / 500 < 0.32                                  # about a quarter


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("task", [Chain(), Chain(2, 3), Countdown()], ids=["chain", "chain 2-3", "countdown"])
def test_no_held_out_problem_is_ever_trained_on(task, seed):
    """No prompt of the test or ood split is in the corpus, the demonstrations or the training problems, at any seed."""
    held_out = {p["prompt"] for split in ("test", "ood") for p in data.problems(task, split, 250, seed)}
    is_held_out = getattr(task, "is_held_out", data.is_test)
    assert all(is_held_out(prompt) for prompt in held_out)
    seen = {"corpus": {prompt_of(d) for d in task.corpus(2000, seed)},
            "demonstrations": {e["prompt"] for e in data.demonstrations(task, 250, seed)},
            "train": {p["prompt"] for p in data.problems(task, "train", 250, seed)}}
    for name, prompts in seen.items():
        assert len(prompts) > 50, name
        assert not prompts & held_out, name
        assert not any(is_held_out(prompt) or data.is_test(prompt) for prompt in prompts), name


def test_one_problem_in_ten_is_held_out():
    """The hash puts about a tenth of the problems into the test split: these ones, in every process and release."""
    prompts = [f"{i}+{j}=" for i in range(50) for j in range(50)]
    assert 0.08 < sum(map(data.is_test, prompts)) / 2500 < 0.12
    pinned = "0+0= 0+8= 1+7= 2+1= 2+3= 2+7= 3+0= 3+8= 4+1= 4+3= 4+7= 5+2= 7+3= 7+7= 7+9= 9+8="
    assert [f"{a}+{b}=" for a in range(10) for b in range(10) if data.is_test(f"{a}+{b}=")] == pinned.split()


@pytest.mark.parametrize("seed", range(3))
def test_the_larger_of_two_digits_is_asked_for_out_of_distribution_only(seed):
    """Every ood chain has a `>`; no test, training or demonstration prompt has one."""
    task = Chain()
    assert all(">" in p["prompt"] for p in data.problems(task, "ood", 200, seed))
    for examples in (data.problems(task, "test", 200, seed), data.problems(task, "train", 200, seed),
                     data.demonstrations(task, 200, seed)):
        assert not any(">" in e["prompt"] for e in examples)


@pytest.mark.parametrize("task", [Chain(), Countdown()], ids=["chain", "countdown"])
def test_the_seed_decides_what_is_trained_on_and_not_what_is_tested(task):
    """Corpus, demonstrations and training problems depend on the seed and on nothing else; test and ood on nothing."""
    for split in ("test", "ood"):
        assert data.problems(task, split, 50, 0) == data.problems(task, split, 50, 7)
    for make in (lambda seed: task.corpus(50, seed), lambda seed: data.demonstrations(task, 50, seed),
                 lambda seed: data.problems(task, "train", 50, seed)):
        assert make(0) == make(0) != make(1)
    assert data.demonstrations(task, 50, 0)[:20] == data.demonstrations(task, 20, 0)     # more is the same and more


@pytest.mark.parametrize("task", [Chain(), Chain(2, 2), Countdown()], ids=["chain", "chain of one step", "countdown"])
def test_demonstrations_are_right(task):
    """Every demonstration earns the full reward; those of the chain task show their steps."""
    for e in data.demonstrations(task, 200, seed=0):
        assert task.reward([e["prompt"]], [e["completion"]], **{name: [e[name]] for name in task.columns}) == [1.0]
        assert task.is_worked is None or task.is_worked(e["prompt"], e["completion"])


def test_documents_are_the_corpus_with_an_empty_prompt():
    """For pre-training the prompt is empty, so that every token of the text is trained."""
    corpus = Chain().corpus(20, 3)
    assert data.documents(Chain(), 20, 3) == [{"prompt": "", "completion": text} for text in corpus]


# -- reading numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression, expected", [
    ("3*7+5", 26), ("5+3*7", 26), ("(5+3)*7", 56), ("2*(3+(4-1))", 12), ("9-3-2", 4), ("8/4/2", 1), ("8/(4/2)", 4),
    ("7/2", Fraction(7, 2)), ("1/3+1/3+1/3", 1), ("2-5", -3), ("42", 42), ("((7))", 7), ("1/3*3-1", 0),
    ("(" * 45 + "7" + ")" * 45, 7), ("1+" * 49 + "11", 60),                       # 100 characters
])
def test_value_of_expressions(expression, expected):
    """Products before sums, from left to right, parentheses first, division exact."""
    assert value(expression) == expected


@pytest.mark.parametrize("expression", [
    "", "3*(7", "3*7)", "(3(", "()", "3+", "*3", "-3", "3 + 4", "3+4\n", "2(3)", "(2)3", "1.5", "1e9", "9**9", "7//2",
    "7%2", "1/0", "1/(2-2)", "2-+2", "three", "3+4end", "__import__('os')", "٣+٤", "²", "７",
    "(" * 100 + "1" + ")" * 100, "1+" * 50 + "1",
    "9" * 101, "(" * 5000,
])
def test_value_of_anything_else_is_none(expression):
    """Malformed, dividing by zero, over 100 characters long, code or foreign digits: None, never an exception."""
    assert value(expression) is None


def test_nothing_is_handed_to_eval():
    """What a model writes is never run as a program."""
    source = open(data.__file__, encoding="utf-8").read()
    assert "eval(" not in source and "exec(" not in source


@pytest.mark.parametrize("text, expected", [
    ("so 1,234.50 in all.", Fraction(2469, 2)), ("#### 42", 42), ("It is 42.", 42), ("from 3 to -7", -7),
    ("-0.5", Fraction(-1, 2)), ("1,000,000 or so", 10 ** 6), ("5, then 6, then", 6), ("cost: $12", 12),
    ("10% of 50", 50), ("none", None), ("", None), ("-", None),
    ("9" * 999, 10 ** 999 - 1), ("9" * 1000, None), ("5, then " + "9" * 1000, None),
    ("9" * 1000 + " or 5", 5),
])
def test_last_number(text, expected):
    """The last number of a text, with its sign, thousands and decimals, and without the full stop
    after it; one of a thousand characters is none."""
    assert last_number(text) == expected


def test_reward_of_files_compares_last_numbers():
    """As in GSM8K: `#### 42` is met by any text that ends on the number 42, however it is written."""
    completions = ["The answer is 42.", "42.0", "41", "no idea", "", "42 or 43"]
    assert JsonLines.reward([""] * 6, completions, ["#### 42"] * 6) == [1, 1, 0, 0, 0, 0]
    assert JsonLines.reward([""], ["nothing"], ["nothing"]) == [0.0]       # no number is no right answer
    assert JsonLines.reward([""] * 2, ["42", "41"], [42, 42.0]) == [1.0, 0.0]    # numbers, not text


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jsonl(tmp_path):
    """Write rows (dicts, or lines as they are) into a file and return its path."""
    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
        return str(path)
    return write


def questions(n, **columns):
    return [{"prompt": f"question {i}", **columns} for i in range(n)]


def test_files_are_read_as_utf8(jsonl, monkeypatch):
    """Whatever the machine's own encoding is: it is named when the file is opened."""
    encodings, built_in = [], open

    def spy(*args, **kwargs):
        encodings.append(kwargs.get("encoding"))
        return built_in(*args, **kwargs)
    path = jsonl({"prompt": "a"})
    monkeypatch.setattr("builtins.open", spy)
    data.read_jsonl(path)
    assert encodings == ["utf-8"]


def test_read_jsonl_counts_lines_as_an_editor_does(jsonl):
    """Blank lines are skipped but counted, Windows line ends do no harm, each row knows its file and line."""
    path = jsonl({"prompt": "a"}, "", '{"prompt": "b\u2028c"}\r')
    assert data.read_jsonl(path) == [{"prompt": "a", data.WHERE: f"{path}, line 1"},
                                     {"prompt": "b\u2028c", data.WHERE: f"{path}, line 3"}]


@pytest.mark.parametrize("line, reason", [
    ("{oops}", "line 3: not JSON"), ("[1, 2]", "line 3: a JSON object is needed, this is a list"),
    ("null", "line 3: a JSON object is needed"), ("[" * 100000, "line 3: not JSON .nested too deeply"),
])
def test_a_bad_line_is_named(jsonl, line, reason):
    """A line that is no JSON object: file, line and reason."""
    with pytest.raises(InputError, match=f"data.jsonl, {reason}"):
        data.read_jsonl(jsonl({"prompt": "a"}, "", line))


def test_a_bad_file_is_named(tmp_path):
    """Missing, empty, binary, or a folder: the file and the reason."""
    for name, content, reason in [("empty", b"", "empty"), ("blank", b"\n \n", "empty"),
                                  ("binary", b"\x80\x81\xff", "byte 0 is not UTF-8")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: .*{reason}"):
            data.read_jsonl(tmp_path / name)
    with pytest.raises(InputError, match="nowhere.jsonl: No such file"):
        data.read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="directory"):
        data.read_jsonl(tmp_path)


def test_one_line_in_ten_is_held_out(jsonl):
    """The split goes by the hash of the prompt: disjoint, complete, and lines of one prompt stay on one side."""
    task = JsonLines(jsonl(*questions(200, answer="1"), *questions(200, answer="2")))
    train, test = ({row["prompt"] for row in rows} for rows in (task.train, task.test))
    assert not train & test and len(train | test) == 200 and 10 < len(test) < 35
    assert len(task.train) == 2 * len(train) and len(task.test) == 2 * len(test)
    assert all(data.is_test(prompt) for prompt in test)


def test_eval_data_keeps_every_line_for_training(jsonl):
    """With --eval_data nothing is held out of --data, and the test split is that file."""
    task = JsonLines(jsonl(*questions(50)), jsonl({"prompt": "other"}, name="eval.jsonl"))
    assert len(task.train) == 50 and [row["prompt"] for row in task.test] == ["other"]


def test_a_file_of_held_out_lines_alone_is_refused(jsonl):
    """A file whose every line falls into the test split leaves nothing to train on."""
    held_out = next(f"question {i}" for i in range(1000) if data.is_test(f"question {i}"))
    with pytest.raises(InputError, match="data.jsonl: no line is left to train on.*--eval_data"):
        JsonLines(jsonl({"prompt": held_out}))


def test_columns_that_every_line_has_reach_the_reward(jsonl):
    """Further columns go to the reward function by name if all lines have them."""
    task = JsonLines(jsonl({"prompt": "a", "answer": "1", "unit": "m", "completion": "1"},
                           {"prompt": "b", "answer": "2", "unit": "s", "note": "x", "completion": "2"}),
                     jsonl({"prompt": "c", "answer": "3", "unit": "g", "completion": "3"}, name="eval.jsonl"))
    assert task.columns == ("answer", "unit")


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


@pytest.mark.parametrize("label, fits", [
    (True, True), (False, True), (None, False), ("yes", False), (2, False)])
def test_a_label_is_true_or_false(jsonl, label, fits):
    """KTO's label is the one column that is not text; anything but true and false is named by file
    and line. It takes no room: <end> a b <end> are four tokens."""
    task = JsonLines(jsonl({"prompt": "a", "completion": "b", "label": label}),
                     jsonl({"prompt": "a", "completion": "b", "label": True}, name="eval.jsonl"))
    limits = dict(tokenizer=TOKENIZER, block_size=4)
    if fits:
        task.require("prompt", "completion", "label", **limits)
    else:
        with pytest.raises(InputError, match="data.jsonl, line 1: column 'label' is neither"):
            task.require("prompt", "completion", "label", **limits)


@pytest.mark.parametrize("row, columns, reason", [
    ({"prompt": "a"}, ("prompt", "answer"), "no column 'answer'.*the line has prompt"),
    ({"prompt": "a", "answer": 3}, ("prompt", "answer"), "column 'answer' is not text"),
    ({"prompt": "a", "completion": None}, ("prompt", "completion"), "column 'completion' is not text"),
    ({"completion": "a"}, ("text",), "no column 'text'"),
])
def test_a_line_without_what_the_algorithm_needs_is_named(jsonl, row, columns, reason):
    """A missing column, or one that is not text: file, line and reason; in the evaluation file as well."""
    good, bad = jsonl({name: "x" for name in columns}), jsonl({name: "x" for name in columns}, row, name="bad.jsonl")
    for files in ((bad, good), (good, bad)):
        with pytest.raises(InputError, match=f"bad.jsonl, line 2: {reason}"):
            JsonLines(*files).require(*columns)
    JsonLines(good, good).require(*columns)                           # and a good file is no trouble


def test_a_line_that_does_not_fit_the_context_is_named(jsonl):
    """Prompt, completion (or room for one) and the two <end>s may fill block_size exactly, and not more."""
    path = jsonl({"prompt": "four", "completion": "seven", "answer": "1"})
    task, limits = JsonLines(path, path), dict(tokenizer=TOKENIZER)
    task.require("prompt", "completion", block_size=11, **limits)     # <end> four seven <end>
    with pytest.raises(InputError, match="data.jsonl, line 1: 11 tokens do not fit --block_size 10$"):
        task.require("prompt", "completion", block_size=10, **limits)
    task.require("prompt", "answer", room=6, block_size=11, **limits)     # <end> four and 6 sampled tokens
    with pytest.raises(InputError, match="line 1: 11 tokens do not fit --block_size 10 .6 of them for"):
        task.require("prompt", "answer", room=6, block_size=10, **limits)


@pytest.mark.parametrize("row, tokens", [
    ({"text": "seven"}, 7),                                           # <end> seven <end>
    ({"prompt": "four", "chosen": "three", "rejected": "1"}, 11),     # the longer answer counts
    ({"prompt": "four", "chosen": "1", "rejected": "three"}, 11),
])
def test_texts_and_pairs_fill_the_context(jsonl, row, tokens):
    """A text, and a prompt with the longer of its two answers, may fill block_size exactly."""
    path = jsonl(row)
    task = JsonLines(path, path)
    task.require(*row, tokenizer=TOKENIZER, block_size=tokens)
    with pytest.raises(InputError, match=f"{tokens} tokens do not fit --block_size {tokens - 1}$"):
        task.require(*row, tokenizer=TOKENIZER, block_size=tokens - 1)


def test_examples_of_a_file(jsonl):
    """Lines of text, and lines of prompt and completion, as documents and as demonstrations; no ood split."""
    other = jsonl({"text": "x"}, name="eval.jsonl")
    texts = JsonLines(jsonl({"text": "one"}, {"text": "two"}), other)
    pairs = JsonLines(jsonl({"prompt": "a", "completion": "b"}), other)
    assert data.documents(texts, 0, 0) == [{"prompt": "", "completion": "one"}, {"prompt": "", "completion": "two"}]
    assert data.documents(pairs, 0, 0) == [{"prompt": "", "completion": "ab"}]
    assert data.demonstrations(texts, 0, 0) == data.documents(texts, 0, 0)
    assert [(e["prompt"], e["completion"]) for e in data.demonstrations(pairs, 0, 0)] == [("a", "b")]
    many = JsonLines(jsonl(*questions(30)), jsonl(*questions(5), name="eval.jsonl"))
    assert [len(data.problems(many, split, 3, 0)) for split in ("train", "test", "ood")] == [30, 3, 0]


def test_name_of_a_file():
    """Runs are named after the file, in characters that any file system takes."""
    names = ["my/gsm8k train.jsonl", "a\\b.c.jsonl", "plain", ".jsonl"]
    assert [JsonLines.name_of(name) for name in names] == ["gsm8k-train", "b-c", "plain", "data"]


def test_a_file_is_a_task(jsonl):
    """It has the name of its file, room for answers of 32 tokens unless told otherwise, and no
    chance to compare with."""
    path = jsonl({"prompt": "a"}, name="my file.jsonl")
    task = JsonLines(path, path)
    assert (task.name, task.path, task.max_new_tokens) == ("my-file", path, 32)
    assert JsonLines(path, path, 7).max_new_tokens == 7 and task.chance(1) is None


# -- the order of the data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, batch_size", [(12, 4), (10, 4), (5, 5), (3, 8), (1, 4)])
def test_every_example_comes_once_an_epoch(size, batch_size):
    """Laid end to end, the batches are one permutation of the examples after the other, whatever the sizes."""
    order = [i for step in range(2 * size) for i in data.batch_indices(size, batch_size, step, seed=0)]
    assert len(order) == 2 * size * batch_size
    for start in range(0, len(order), size):
        assert sorted(order[start:start + size]) == list(range(size))


def test_the_order_is_a_function_of_step_and_seed():
    """Asked again, even out of turn and with other random numbers drawn between, a step takes the same examples."""
    steps = [data.batch_indices(40, 8, step, seed=3) for step in range(10)]
    random.seed(5)
    assert [data.batch_indices(40, 8, step, seed=3) for step in reversed(range(10))] == steps[::-1]
    assert steps[:5] != steps[5:]                                     # another epoch, another order
    assert steps != [data.batch_indices(40, 8, step, seed=4) for step in range(10)]


def test_without_shuffling_the_order_is_kept():
    """shuffle=False reads from front to back and begins again."""
    assert [data.batch_indices(5, 3, step, 0, shuffle=False) for step in range(3)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_reward_functions():
    """`verifier` is the task's own, `format` pays for shown steps, `brevity` takes the share of the length used."""
    task = Chain()
    functions = data.reward_functions(task, "brevity,verifier,format")
    assert list(functions) == ["brevity", "verifier", "format"]
    prompts, texts = ["7+5*3="] * 3, ["6", "7+5=2;2*3=7", ""]
    results = {name: f(prompts, texts, answer=["6"] * 3) for name, f in functions.items()}
    assert results["verifier"] == [1, 0, 0] and results["format"] == [0, 1, 0]
    assert task.max_new_tokens == 22 and results["brevity"] == [-1 / 22, -11 / 22, 0]


def parameter_names():
    """Every name of a parameter in the files that call and define rewards."""
    names = {"prompts", "completions", "p", "c", "max_new_tokens", "task", "columns", "self"}
    for module in (data, rm):
        for node in ast.walk(ast.parse(open(module.__file__, encoding="utf-8").read())):
            if isinstance(node, ast.arguments):
                names |= {a.arg for a in node.posonlyargs + node.args + node.kwonlyargs}
    return names - {"answer", "prompt", "completion", "text"}


def test_a_column_may_have_any_name(jsonl):
    """Columns named like parameters of reward functions, `prompts` or `p`, change no reward."""
    names = parameter_names()
    assert {"prompts", "p", "numbers", "target", "names"} <= names
    rows, texts = questions(3, answer="6"), ["6", "6", "7"]
    learned = rm.scorer(GPT(GPTConfig(n_layer=1, n_embd=32)).with_scalar_head(), TOKENIZER)
    totals = []
    for columns in ({}, {name: "x" for name in names}):
        path = jsonl(*({**row, **columns} for row in rows))
        task = JsonLines(path, path, max_new_tokens=10)
        assert set(task.columns) == {"answer", *columns}
        task.learned_reward = learned
        rewards = data.Rewards(task, "verifier,majority,brevity,model")
        totals.append({name: each.tolist() for name, each in rewards(task.train, texts)[1].items()})
    assert totals[0] == totals[1] and totals[0]["verifier"] == [1, 1, 0]
    assert totals[0]["brevity"] == pytest.approx([-.1] * 3) and totals[0]["majority"] == [1, 1, 1]
    extra = {name: ["x"] * 3 for name in names - {"numbers", "target"}}
    for task, own in ((Chain(), {"answer": ["6"] * 3}),
                      (Countdown(), {"numbers": [[1, 2, 3]] * 3, "target": [6] * 3})):
        shown = "format," if task.is_worked else ""
        for name, f in data.reward_functions(task, shown + "verifier,majority,brevity").items():
            assert f(["q"] * 3, texts, **own, **extra) == f(["q"] * 3, texts, **own), name


@pytest.mark.parametrize("task, names", [
    (Chain(), "verifier,nonsense"), (Chain(), ""), (Countdown(), "format"), (Chain(), "model")])
def test_unknown_reward(task, names):
    """A reward that the task does not have is an InputError that lists those it has."""
    with pytest.raises(InputError, match=f"{names.split(',')[-1]} is unknown for {task.name}: use .*verifier, .*brevity"):
        data.reward_functions(task, names)


def test_chance():
    """Guessing digits: .10, .344, .815 at k = 1, 4, 16. Random expressions do better with more tries, short of 1."""
    assert [Chain().chance(k) for k in (1, 4, 16)] == pytest.approx([.1, .344, .815], abs=5e-4)
    one, four, sixteen = (Countdown().chance(k) for k in (1, 4, 16))
    assert 0.04 < one < four < sixteen < 0.9 and four < 4 * one
    assert one == Countdown().chance(1)                               # the same at every call


# -- batches ----------------------------------------------------------------------------------------------------------

# Four completions of unequal length to three prompts of unequal length. Row 3 answers the first prompt, like row 1.
PROMPTS, COMPLETIONS, OWNER = ["7+5=", "12345678=", "a="], ["long answer", "2", "xyz", "22"], [1, 0, 2, 0]


def make_batch():
    batch = data.collate([{"prompt": PROMPTS[i], "completion": c} for i, c in zip(OWNER, COMPLETIONS)], TOKENIZER)
    prompts = data.collate([{"prompt": p} for p in PROMPTS], TOKENIZER)
    weights = batch["completion_mask"] * torch.arange(1.0, 5.0)[:, None]
    return {**batch, **prompts, "prompt_index": torch.tensor(OWNER), "advantages": torch.arange(4.0),
            "weights": weights}


def check_rows(batch, rows):
    """Each row still has its own prompt, completion and numbers, and no column is padding throughout."""
    assert len(batch["prompt_index"]) == len(rows)
    for i, row in enumerate(rows):
        p = batch["prompt_index"][i]
        prompt, completion = batch["prompt_ids"][p], batch["completion_ids"][i]
        n = len(COMPLETIONS[row]) + 1                                 # with its <end>
        assert prompt[batch["prompt_mask"][p]].tolist() == [EOS] + list(PROMPTS[OWNER[row]].encode())
        assert completion[batch["completion_mask"][i]].tolist() == list(COMPLETIONS[row].encode()) + [EOS]
        assert TOKENIZER.decode(completion.tolist()) == COMPLETIONS[row]
        assert batch["advantages"][i] == row
        assert batch["weights"][i].tolist() == [row + 1] * n + [0] * (len(completion) - n)
    assert len(batch["prompt_ids"]) == len({OWNER[row] for row in rows})      # just the prompts that are answered
    assert batch["prompt_mask"].any(0).all() and batch["completion_mask"].any(0).all()


def test_the_worked_example_of_the_docstring():
    """collate gives what the top of data.py shows, number by number."""
    batch = data.collate([{"prompt": "7+5=", "completion": "2"}, {"prompt": "1-2*3=", "completion": "7"}], TOKENIZER)
    assert {name: tensor.int().tolist() for name, tensor in batch.items()} == {
        "prompt_ids": [[257, 257, 256, 55, 43, 53, 61], [256, 49, 45, 50, 42, 51, 61]],
        "prompt_mask": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
        "completion_ids": [[50, 256], [55, 256]], "completion_mask": [[1, 1], [1, 1]], "prompt_index": [0, 1]}
    assert batch["prompt_mask"].dtype == batch["completion_mask"].dtype == torch.bool
    printed = "".join(data.__doc__.split())                           # the numbers above are those in the file
    for shown in ("[[257,257,256,55,43,53,61],", "[256,49,45,50,42,51,61]]", "[[50,256],[55,256]]"):
        assert shown in printed


def test_collate_pads_prompts_on_the_left_and_completions_on_the_right():
    """Rows of unequal length meet where the prompt ends and the completion begins."""
    batch = data.collate([{"prompt": "", "completion": "abc"}, {"prompt": "xy", "completion": ""}], TOKENIZER)
    assert batch["prompt_ids"].tolist() == [[PAD, PAD, EOS], [EOS, 120, 121]]
    assert batch["prompt_mask"].int().tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch["completion_ids"].tolist() == [[97, 98, 99, EOS], [EOS, PAD, PAD, PAD]]
    assert batch["completion_mask"].int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert set(data.collate([{"prompt": "a"}], TOKENIZER)) == {"prompt_ids", "prompt_mask"}


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3], [1, 3], [2, 1], [3, 0, 1], [2]])
def test_take_rows_keeps_rows_whole(rows):
    """Taken rows keep their own prompts, completions, weights and advantages, in the order asked for."""
    batch = make_batch()
    check_rows(data.take_rows(batch, torch.tensor(rows)), rows)
    check_rows(batch, [0, 1, 2, 3])                                   # and the batch itself is left as it was


def test_take_rows_of_rows_that_are_left_out_of_the_loss():
    """A row whose completion is masked altogether keeps one column, so that there is something to compute."""
    batch = make_batch()
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    assert data.take_rows(batch, torch.tensor([1]))["completion_ids"].shape == (1, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 0])
def test_split_covers_every_row_once(size):
    """Micro-batches of at most `size` rows, in order, nothing lost and nothing twice; 0 is the whole batch."""
    parts, start = data.split(make_batch(), size), 0
    for part in parts:
        rows = len(part["prompt_index"])
        check_rows(part, list(range(start, start + rows)))
        start += rows
        assert rows <= (size or 4)
    assert start == 4 and len(parts) == {1: 4, 2: 2, 3: 2}.get(size, 1)


@pytest.mark.parametrize("size, sizes", [
    (0, [4]), (1, [2, 2]), (2, [2, 2]), (3, [2, 2]), (4, [4]), (9, [4])])
def test_split_keeps_pairs_together(size, sizes):
    """The two rows of a pair are never parted, even where a micro-batch of one row is asked for."""
    parts = data.split(make_batch(), size, rows_together=2)
    assert [len(part["prompt_index"]) for part in parts] == sizes


def test_take_rows_cuts_what_is_as_wide_as_the_completions():
    """A tensor as wide as the completions loses the same columns, one of another width none."""
    batch = make_batch()
    width = batch["completion_ids"].shape[1]
    batch["other"] = torch.arange(4.0 * (width + 1)).view(4, width + 1)
    taken = data.take_rows(batch, torch.tensor([1]))                  # `2` and its <end>
    assert torch.equal(taken["other"], batch["other"][1:2])
    assert taken["completion_ids"].shape == taken["weights"].shape == (1, 2)


# -- lines of a file that must not crash a run ------------------------------------------------------------------------


@pytest.mark.parametrize("row, column", [({"prompt": 5, "answer": "1"}, "prompt"), ({"text": None}, "text")])
def test_a_prompt_that_is_not_text_is_named(jsonl, row, column):
    """A prompt or text that is a number or null is reported by file and line, like any other column."""
    good = {name: "x" for name in row}
    with pytest.raises(InputError, match=f"data.jsonl, line 2: column '{column}' is not text"):
        JsonLines(jsonl(good, row), jsonl(good, name="eval.jsonl")).require(*row)


def test_lines_that_fit_alone_fit_in_one_batch(jsonl):
    """A long prompt with a short completion and the reverse pass `require`, so a batch of the two must be scorable."""
    path = jsonl({"prompt": "a" * 20, "completion": "b"}, {"prompt": "c", "completion": "d" * 20})
    task = JsonLines(path, path)
    task.require("prompt", "completion", tokenizer=TOKENIZER, block_size=24)
    batch = data.collate(data.demonstrations(task, 0, 0), TOKENIZER)
    model = GPT(GPTConfig(block_size=24, n_layer=1, n_embd=32))
    for index in (None, batch["prompt_index"]):
        logits = model.completion_logits(*list(batch.values())[:4], index)
        assert logits.shape == (2, 21, 258) and logits.isfinite().all()


def test_a_number_of_too_many_digits_is_named(jsonl):
    """A line with an integer longer than Python reads is reported by file and line."""
    with pytest.raises(InputError, match="data.jsonl, line 1: not JSON"):
        data.read_jsonl(jsonl('{"answer": ' + "1" * 5000 + "}"))


def test_endless_digits_earn_nothing():
    """A completion that repeats one digit forever is a wrong answer, not the end of the run."""
    digits = "9" * 5000
    assert Countdown.reward([""], [digits], [[3, 5, 7]], [26]) == [0.0]
    assert JsonLines.reward([""], [digits], ["42"]) == [0.0]


def test_half_a_surrogate_pair_in_a_prompt(jsonl):
    """A prompt with a lone surrogate, which JSON can spell, is read like any other."""
    path = jsonl({"prompt": "a"}, '{"prompt": "\\ud83d"}')
    task = JsonLines(path, jsonl({"prompt": "b"}, name="eval.jsonl"))
    assert [row["prompt"] for row in task.train] == ["a", "\ud83d"]


def test_an_empty_text_is_a_document(jsonl):
    """{"text": ""} is an empty document, of which only <end> is trained."""
    task = JsonLines(jsonl({"text": ""}, {"text": "a"}), jsonl({"text": "b"}, name="eval.jsonl"))
    assert [e["completion"] for e in data.documents(task, 0, 0)] == ["", "a"]


def test_a_real_token_may_equal_the_pad_id():
    """The mask knows where padding is and never asks what is written there: a tokenizer whose padding is the letter a."""
    class Letters:
        eos_id, pad_id = 26, 0

        def encode(self, text):
            return [ord(c) - 97 for c in text]
    batch = data.collate([{"prompt": "a", "completion": "aba"}, {"prompt": "bb", "completion": "a"}], Letters())
    assert batch["completion_mask"].sum(-1).tolist() == [4, 2] and batch["prompt_mask"].sum(-1).tolist() == [2, 3]


def test_columns_called_line_and_file_are_the_users(jsonl):
    """They reach the reward as they are, and a complaint still knows where the row stands."""
    path = jsonl(*[{"prompt": f"p{i}", "answer": "1", "line": "x", "file": "y"} for i in range(30)])
    task = JsonLines(path)
    assert {"line", "file", "answer"} <= set(task.columns) and task.train[0]["line"] == "x"
    with pytest.raises(InputError, match=f"{re.escape(str(path))}, line \\d+: no column 'chosen'"):
        task.require("chosen")
