"""
A file of one's own as a task: one JSON object a line, with the field's columns. Every line is
checked before anything is trained.
"""

import json
import re

from harness.columns import NUMBER, last_number, marked_number, understood
from harness.errors import InputError
from tasks import Task, is_test

WHERE = "<where>"    # a column that no file has: where a row was read, `my.jsonl, line 3`


class JsonLines(Task):
    """A file of one JSON object a line, with our columns or as others publish them (see columns.py;
    `understood` says how they were read): `text`; or `prompt` and, as the algorithm asks,
    `completion`, `chosen` and `rejected`, `label`, `answer`. Further columns reach the reward
    function by name. Where `eval_path` is not given, one line in ten is held out by the hash of its
    prompt."""

    def __init__(self, path, eval_path=None, max_new_tokens=0, judge=None, flip_probability=0.2):
        super().__init__(max_new_tokens or 32, judge, flip_probability)
        self.name, self.path = file_name(path), path
        rows, self.understood = read_rows(path)
        held_out = [is_test(str(row.get("prompt", row.get("text")))) for row in rows]
        self.train = [row for row, test in zip(rows, held_out) if eval_path or not test]
        self.test = read_rows(eval_path)[0] if eval_path else \
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
        """1.0 where the completion's last number equals the answer's last number. Of an answer with
        GSM8K's mark, `#### 72`, the number after the completion's own mark. -> list of floats"""
        said = [marked_number(c) if "####" in str(a) else last_number(c)
                for c, a in zip(completions, answer)]
        return [float(number is not None and number == last_number(str(a)))
                for number, a in zip(said, answer)]

    @staticmethod
    def final_answer(completion):
        return marked_number(completion) if "####" in completion else last_number(completion)

    @staticmethod
    def final_part(completion):
        """From the last number on; without one the whole."""
        found = [match.start() for match in NUMBER.finditer(completion)]
        return completion[found[-1]:] if found else completion

    def chance(self, k):
        return None                                        # unknown for a user's file


def file_name(path):
    """The name of a file's runs: `my/gsm8k train.jsonl` -> `gsm8k-train`."""
    return re.sub(r"\W+", "-", re.split(r"[/\\]", str(path))[-1]
                  .removesuffix(".jsonl").removesuffix(".json")) or "data"


def read_rows(path):
    """The lines of a file with our columns, and how they were understood; "": as they are."""
    pairs = [understood(row, row[WHERE]) for row in read_jsonl(path)]
    return [row for row, _ in pairs], "; or ".join(dict.fromkeys(how for _, how in pairs if how))


def parsed(text, where):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:   # not JSON, or a number of 5,000 digits
        reason = getattr(error, "msg", "nested too deeply, or a number too long")
        raise InputError(f"{where}: not JSON ({reason})") from None


def read_jsonl(path):
    """The objects of a .jsonl file, or of the list in a .json file, each with its place under the
    name WHERE. Raises InputError naming file, line and reason."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    one_list, rows = str(path).endswith(".json") and text.lstrip().startswith("["), []
    where = f"{path}, {'item' if one_list else 'line'} "
    found = parsed(text, path) if one_list else text.split("\n")
    for number, row in enumerate(found, start=1):
        if not one_list and not row.strip():
            continue
        row = row if one_list else parsed(row, f"{where}{number}")
        if not isinstance(row, dict):
            raise InputError(f"{where}{number}: a JSON object is needed, this is a "
                             f"{type(row).__name__}")
        rows.append({**row, WHERE: f"{where}{number}"})
    if not rows:
        raise InputError(f"{path}: the file is empty; it needs one JSON object a line")
    return rows
