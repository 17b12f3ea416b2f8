"""
Data as it is published: lines with other columns than ours, and how they are understood.

    GSM8K         question, answer (`... #### 72`)        prompt, completion, answer `#### 72`
    instructions  instruction, input, output              prompt, completion
    chats         messages: a list of role and content    prompt (its turns), completion
    preferences   chosen, rejected: texts or messages     prompt, chosen, rejected

What a line has beside these columns stays as it is.
"""

import re
from fractions import Fraction

from harness.errors import InputError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
MARKED = re.compile(rf"####\s*\$?({NUMBER.pattern})")    # GSM8K's mark of the final answer


class Conversation(str):
    """A prompt of several turns. It reads as their texts; `turns` are pairs of role and text, which
    a published model's tokenizer writes as its template has them."""

    def __new__(cls, turns):
        self = super().__new__(cls, "\n".join(text for _, text in turns))
        self.turns = tuple(turns)
        return self


def prompt_of(turns):
    """One turn of a user's is a prompt like any other."""
    return turns[0][1] if [role for role, _ in turns] == ["user"] else Conversation(turns)


def turns_of(messages, where):
    """[{"role": "user", "content": "7+5="}, ...] -> [("user", "7+5="), ...]. Raises InputError for
    what is no list of such objects."""
    pairs = [(m.get("role"), m.get("content")) if isinstance(m, dict) else (None, None)
             for m in messages]
    for role, text in pairs:
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            raise InputError(f"{where}: a message needs a role (system, user or assistant) and a "
                             f"content that is text; this one has {role!r} and "
                             f"{type(text).__name__}")
    if not pairs:
        raise InputError(f"{where}: there is no message in the list")
    return pairs


def understood(row, where):
    """A line's columns as ours, and how it was understood; "": it has ours. Raises InputError for
    messages that are none.

    Worked example: {"question": "7+5?", "answer": "7+5 is 12. #### 12"} -> {"prompt": "7+5?",
    "completion": "7+5 is 12. #### 12", "answer": "#### 12", "question": "7+5?"}
    """
    row, has = dict(row), set(row)
    if "messages" in has and isinstance(row["messages"], list):
        turns = turns_of(row.pop("messages"), where)
        if turns[-1][0] == "assistant" and len(turns) > 1:
            row["completion"] = turns.pop()[1]
        return {**row, "prompt": prompt_of(turns)}, \
            "messages: the assistant's last as completion, those before it as prompt"
    if {"question", "answer"} <= has and "prompt" not in has and isinstance(row["answer"], str):
        row = {**row, "prompt": row["question"], "completion": row["answer"]}
        marked = MARKED.findall(row["answer"])
        if not marked:
            return row, "question as prompt, answer as completion and as what is right"
        return {**row, "answer": f"#### {marked[-1]}"}, \
            "question as prompt, answer as completion; right is the number after ####"
    if {"instruction", "output"} <= has and "prompt" not in has:
        more = f"\n\n{row['input']}" if row.get("input") else ""
        row = {**row, "prompt": f"{row['instruction']}{more}", "completion": row["output"]}
        return row, "instruction and input as prompt, output as completion"
    before = None
    for name in ("completion", "chosen", "rejected"):
        if isinstance(row.get(name), list):
            *before, (_, row[name]) = turns_of(row[name], where)
    if isinstance(row.get("prompt"), list):
        row["prompt"] = prompt_of(turns_of(row["prompt"], where))
    elif before is not None and (before or "prompt" not in has):
        if not before:
            raise InputError(f"{where}: there is no prompt: the lists hold the answers alone")
        row["prompt"] = prompt_of(before)
    elif before is None:
        return row, ""
    return row, "the last message of each list as the answer, those before it as prompt"


# -- final answers --------------------------------------------------------------------------------


def number(text):
    return Fraction(text.replace(",", "")) if len(text) < 1000 else None


def last_number(text):
    """The last number written in a text, or None: `so 1,234.50 in all.` -> Fraction(2469, 2)."""
    found = NUMBER.findall(text)
    return number(found[-1]) if found else None


def marked_number(text):
    """The number after the last #### in a text, or None: `7+5=12 #### 12.` -> Fraction(12, 1)."""
    found = MARKED.findall(text)
    return number(found[-1]) if found else None
