"""
How silent are the bugs of the gallery? Each is planted alone, its file's algorithm is run by the
default command for 60 steps, and the figures are compared with those of the right code at the same
seed.

    python -m assignments.silence        about twenty minutes of one core; Ctrl-C, and it goes on

One seed is enough here: on one thread a run is the same bit for bit, so whatever differs is the
bug's doing. (How large the difference is on another seed it does not say.) For the same reason a
bug in lines that the right code's run never reaches needs no run: it changes no figure. The figures
go to assignments/silence.json, and the table to the handout. What is finished is kept in
out/silence.
"""

import ast
import hashlib
import json
import math
import os
import pathlib
import re
import sys

from assignments import bugs, make, trial
from harness.errors import one_line

OUT = pathlib.Path("out/silence")
BASE = pathlib.Path("out/chain-pretrain-0")
FLAGS = ("--max_steps", "60", "--eval_steps", "60", "--eval_problems", "128", "--init_from",
         str(BASE))
TEACHER = OUT / "teacher"   # for distillation: what the right code makes of GRPO
# The default commands that run a file: one that is no algorithm's own is run by GRPO; the model and
# what makes batches are run by three of them, of which the loudest counts.
COMMANDS = dict.fromkeys(("model.py", "data.py"), ("sft", "dpo", "grpo"))
CLASSES = ("ruins the run", "dents it", "shows in the third digit", "changes no figure")
FIRST = ("reward", "loss", "grad_norm")
CLOCK = ("seconds", "tokens_per_second")   # parts of the names of what is no figure


def commands(file):
    """The algorithms whose default commands are run for a bug in this file."""
    own = file.removesuffix(".py")
    algorithms = ("sft", "dft", "rft", "dpo", "rm", "ppo", "grpo", "hybrid", "distill")
    return (own,) if own in algorithms else COMMANDS.get(file, ("grpo",))


# -- the rule -------------------------------------------------------------------------------------


def accuracy(line):
    """Held-out accuracy, or that of a reward model about pairs."""
    return line.get("eval/accuracy", line.get("eval/pair_accuracy"))


def silence(right, wrong):
    """Which of CLASSES a bug is in, from the lines of metrics.jsonl without it and with it; None
    for a run that ended in an error.

    ruins the run: it ends in an error, or gains less than half of what the right code gains in
    held-out accuracy from the first line to the last. dents it: its accuracy at the end is lower by
    at least .03. shows in the third digit: some figure differs by more than .0005, or by more than
    .0005 of itself where it is above 1; or there are others. The clock is no figure.

    Worked example: from .48 the right code reaches .98. With .70 at the end a bug ruins the run,
    with .94 it dents it; with .98 and a loss of .301 in place of .300 it shows in the third digit.
    """
    if wrong is None:
        return CLASSES[0]
    start, end, found = accuracy(right[0]), accuracy(right[-1]), accuracy(wrong[-1])
    if not found - start >= (end - start) / 2:   # nan as well
        return CLASSES[0]
    if end - found >= 0.03 - 1e-9:
        return CLASSES[1]
    same = len(right) == len(wrong) and all(map(alike, right, wrong))
    return CLASSES[3] if same else CLASSES[2]


def alike(a, b):
    """Whether two lines say the same in three digits, the clock apart."""
    a, b = ({name: value for name, value in line.items()
             if not any(word in name for word in CLOCK)} for line in (a, b))
    return a.keys() == b.keys() and all(
        a[name] == b[name] or abs(a[name] - b[name]) <= 0.0005 * max(1, abs(a[name]))
        for name in a)


# -- the runs -------------------------------------------------------------------------------------


class Reached:
    """A trace function: the lines of some files that are run."""

    def __init__(self, files):
        self.lines = {path: set() for path in files}

    def __call__(self, frame, event, argument):
        return self.line if frame.f_code.co_filename in self.lines else None

    def line(self, frame, event, argument):
        self.lines[frame.f_code.co_filename].add(frame.f_lineno)
        return self.line


def reaches(bug, text, lines):
    """Whether a run of the right text has come to a statement that the bug changes."""
    first = text[:text.index(bug.right)].count("\n") + 1
    for number in range(first, first + len(bug.right.rstrip("\n").split("\n"))):
        around = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)
                  and node.lineno <= number <= node.end_lineno]
        smallest = min(around, key=lambda node: node.end_lineno - node.lineno)
        if any(smallest.lineno <= line <= smallest.end_lineno for line in lines):
            return True
    return False


def run(files, words, folder):
    """Train by these files in a process of its own. -> the lines of metrics.jsonl (None if it ended
    in an error), {file: the lines of code that were run}; Ctrl-C comes through."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        code, reached = 1, Reached(files)
        try:
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.modules["matplotlib"] = None   # no pictures
            trial.load(files)
            sys.settrace(reached if files == make.read() else None)
            import train
            code = train.main([*map(str, words), "--out_dir", str(folder)])
            (folder / "reached.json").write_text(json.dumps(
                {path: sorted(lines) for path, lines in reached.lines.items()}))
        finally:
            os._exit(code)
    try:
        _, status = os.waitpid(child, 0)
    except KeyboardInterrupt:
        os.waitpid(child, 0)
        raise
    if status:
        return None, {}
    text = (folder / "metrics.jsonl").read_text()
    return ([json.loads(line) for line in text.splitlines()],
            json.loads((folder / "reached.json").read_text()))


def kept(name, files, words):
    """The same, or what an earlier call with the same files has left."""
    stamp = hashlib.sha256(json.dumps([files, words]).encode()).hexdigest()
    path = OUT / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.get("stamp") != stamp:
        lines, reached = run(files, words, OUT / "run")
        found = {"stamp": stamp, "lines": lines, "reached": reached}
        path.write_text(json.dumps(found))
        for left in (OUT / "run").iterdir():
            left.unlink()
    return found["lines"], found["reached"]


def command(algorithm):
    """The words of its default command."""
    teacher = ("--teacher", str(TEACHER)) if algorithm == "distill" else ()
    return ["--algo", algorithm, *FLAGS, *teacher]


def curve(right, wrong):
    """{figure: [its values without the bug, with it]}: accuracy and four others, for those who look
    for a bug by its curve: of those that differ FIRST, then the ones that differ most."""
    def off(name):
        if any((name in a) != (name in b) for a, b in zip(right, wrong)):
            return math.inf
        pairs = [(a[name], b[name]) for a, b in zip(right, wrong) if name in a]
        return max(abs(a - b) / max(1, abs(a)) if math.isfinite(b) else math.inf for a, b in pairs)
    names = {name for line in (*right, *wrong) for name in line if name != "step"
             and not any(word in name for word in CLOCK)}
    differ = [name for name in names - {"eval/accuracy"} if off(name) > 0.0005]
    shown = ["eval/accuracy", *sorted(
        differ, key=lambda name: (name not in FIRST, -off(name), name))[:4]]
    return {name: [[round(line[name], 4) if name in line and math.isfinite(line[name]) else None
                    for line in lines] for lines in (right, wrong)] for name in shown}


def measure():
    """Every bug of the gallery. -> what goes to silence.json"""
    import torch
    from tqdm import tqdm
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    if not (BASE / "summary.json").exists():
        run(make.read(), ["--algo", "pretrain"], BASE)
    if not (TEACHER / "summary.json").exists():
        run(make.read(), ["--algo", "grpo", "--init_from", str(BASE)], TEACHER)
    found = []
    for bug in tqdm(bugs.gallery(), unit="bug"):
        outcomes = []
        for algorithm in commands(bug.file):
            right, lines = kept(f"right-{algorithm}", make.read(), command(algorithm))
            reached = reaches(bug, make.read()[bug.file], lines[bug.file])
            wrong = right
            if reached:
                wrong, _ = kept(f"{bugs.name(bug)}-{algorithm}", bugs.plant([bug]),
                                command(algorithm))
            outcomes.append((CLASSES.index(silence(right, wrong)), not reached, algorithm, right,
                             wrong))
        loudest, idle, algorithm, right, wrong = min(outcomes, key=lambda outcome: outcome[:2])
        found.append({"bug": bugs.name(bug), "file": bug.file, "consequence": bug.consequence,
                      "command": algorithm, "class": CLASSES[loudest], "reached": not idle})
        if wrong is not None:
            found[-1]["accuracy"] = round(accuracy(wrong[-1]), 4)
            found[-1]["right"] = round(accuracy(right[-1]), 4)
        if loudest < 3 and wrong is not None:
            found[-1]["steps"] = [line["step"] for line in right]
            found[-1]["curve"] = curve(right, wrong)
    return {"flags": FLAGS[:6], "bugs": found}


# -- the table ------------------------------------------------------------------------------------


def table(measured):
    """For the handout: how many of each class by command, then every bug. Which file it is in the
    table does not say: at the third level that is to be found."""
    rows = measured["bugs"]
    algorithms = list(dict.fromkeys(row["command"] for row in rows))
    lines = ["| run by | " + " | ".join(CLASSES) + " |", "|---" * 5 + "|"]
    for algorithm in [*algorithms, None]:
        mine = [row["class"] for row in rows if algorithm in (None, row["command"])]
        lines.append(f"| {algorithm or 'all'} | " + " | ".join(
            str(mine.count(each)) for each in CLASSES) + " |")
    for each in CLASSES:
        chosen = sorted(row["consequence"] for row in rows if row["class"] == each)
        idle = sum(row["class"] == each and not row["reached"] for row in rows)
        more = f", {idle} of them in lines that the command never reaches" if idle else ""
        lines += ["", f"**{each[0].upper()}{each[1:]}** ({len(chosen)}{more}):", ""]
        lines += [line for words in chosen for line in bugs.wrapped(words)]
    return "\n".join(lines) + "\n"


def main():
    measured = measure()
    rows = ",\n".join(json.dumps(row) for row in measured["bugs"])   # a bug a line
    (make.HERE / "silence.json").write_text(
        f'{{"flags": {json.dumps(measured["flags"])}, "bugs": [\n{rows}\n]}}\n')
    path = make.HERE / "handouts/7.md"
    if path.exists():
        path.write_text(with_table(path.read_text(), measured))
    print(table(measured).split("\n\n")[0])
    return 0


def with_table(text, measured):
    """The handout with the table in its place."""
    return re.sub(r"(<!-- silence.json -->\n).*(<!-- end -->)",
                  lambda m: m[1] + table(measured) + m[2], text, flags=re.S)


if __name__ == "__main__":
    sys.exit(one_line(main))
