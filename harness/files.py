"""
A file of one's own as a task: one JSON object a line, with the field's columns. Every line is
checked before anything is trained.
"""

import json
import re
from fractions import Fraction

from harness.errors import InputError
from tasks import Task, is_test

WHERE = "<where>"    # a column that no file has: where a row was read, `my.jsonl, line 3`
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text):
    """The last number written in a text, or None: `so 1,234.50 in all.` -> Fraction(2469, 2)."""
    found = NUMBER.findall(text)
    short = found and len(found[-1]) < 1000
    return Fraction(found[-1].replace(",", "")) if short else None


class JsonLines(Task):
    """A file of one JSON object a line: `text`; or `prompt` and, as the algorithm asks,
    `completion`, `chosen` and `rejected`, `label`, `answer`. Further columns reach the reward
    function by name. Where `eval_path` is not given, one line in ten is held out by the hash of its
    prompt."""

    def __init__(self, path, eval_path=None, max_new_tokens=0, judge=None, flip_probability=0.2):
        super().__init__(max_new_tokens or 32, judge, flip_probability)
        self.name, self.path = file_name(path), path
        rows = read_jsonl(path)
        held_out = [is_test(str(row.get("prompt", row.get("text")))) for row in rows]
        self.train = [row for row, test in zip(rows, held_out) if eval_path or not test]
        self.test = read_jsonl(eval_path) if eval_path else \
            [row for row, test in zip(rows, held_out) if test]
        if not self.train:
            raise InputError(f"{path}: no line is left to train on once one in ten is held out; "
                             "give --eval_data as well")
        common = set.intersection(*(set(row) for row in rows + self.test))
        self.columns = tuple(sorted(common - {"prompt", "completion", "text", WHERE}))
        self.verifies = "answer" in self.columns

    def problems(self, split, size, seed):
        rows = {"train": self.train, "test": self.test, "ood": []}[split]
        return rows if split == "train" else rows[:size]

    def demonstrations(self, size, seed, style="own", wrong_share=0.0):
        return [row if "completion" in row else {"prompt": "", "completion": row["text"]}
                for row in self.train]

    def documents(self, size, seed):
        texts = [row["text"] if "text" in row else row["prompt"] + row["completion"]
                 for row in self.train]
        return [{"prompt": "", "completion": text} for text in texts]

    def holds(self, *columns):
        return set(columns) <= set(self.train[0])

    def require(self, columns, tokenizer, block_size, room=None, rows=None):
        """Check the lines (None: all) for what is to be read of them.

        Raises InputError, naming file, line and reason, for the first line that lacks one of the
        columns or whose tokens, with the two <end>s around them and `room` for an answer that is to
        be sampled (None: none is), exceed block_size.
        """
        for row in self.train + self.test if rows is None else rows:
            where = row[WHERE]
            missing = [c for c in columns if c not in row]
            if missing:
                has = ", ".join(sorted(set(row) - {WHERE})) or "none"
                raise InputError(f"{where}: no column {missing[0]!r}, which this algorithm needs "
                                 f"(the line has {has})")
            wrong = [c for c in columns if c != "label" and not isinstance(row[c], str)]
            if wrong:
                raise InputError(f"{where}: column {wrong[0]!r} is not text")
            if "label" in columns and row["label"] not in (True, False):
                raise InputError(f"{where}: column 'label' is neither true nor false")
            prompt = len(tokenizer.encode_prompt(row["prompt"] if "prompt" in columns else ""))
            longest = max((len(tokenizer.encode(row[c])) for c in columns
                           if c not in ("prompt", "label", "answer")), default=0)
            used = prompt + longest + (1 if room is None else room)
            if used > block_size:
                of_them = "" if room is None else f" ({room} of them for --max_new_tokens)"
                raise InputError(f"{where}: {used} tokens do not fit --block_size {block_size}"
                                 f"{of_them}")

    @staticmethod
    def reward(prompts, completions, /, answer, **columns):
        """1.0 where the completion's last number equals the answer's last number, as in GSM8K.
        -> list of floats"""
        return [float(last_number(c) is not None and last_number(c) == last_number(str(a)))
                for c, a in zip(completions, answer)]

    @staticmethod
    def final_answer(completion):
        return last_number(completion)

    @staticmethod
    def final_part(completion):
        """From the last number on; without one the whole."""
        found = [match.start() for match in NUMBER.finditer(completion)]
        return completion[found[-1]:] if found else completion

    def chance(self, k):
        return None                                        # unknown for a user's file


def file_name(path):
    """The name of a file's runs: `my/gsm8k train.jsonl` -> `gsm8k-train`."""
    return re.sub(r"\W+", "-", re.split(r"[/\\]", str(path))[-1].removesuffix(".jsonl")) or "data"


def read_jsonl(path):
    """The objects of a .jsonl file, each with its place under the name WHERE. Raises InputError
    naming file, line and reason."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:   # not JSON, or a number of 5,000 digits
            reason = getattr(error, "msg", "nested too deeply, or a number too long")
            raise InputError(f"{path}, line {number}: not JSON ({reason})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: a JSON object is needed, this is a "
                             f"{type(row).__name__}")
        rows.append({**row, WHERE: f"{path}, line {number}"})
    if not rows:
        raise InputError(f"{path}: the file is empty; it needs one JSON object a line")
    return rows
