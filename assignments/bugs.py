"""
Assignment 7: five bugs of the gallery, planted in a copy of the project. Which five, a hash of the
student's name and a secret decides. For each a student hands in a test that notices it, and mends
the file.

    python -m assignments make 7 --student NAME --salt SECRET --out FOLDER [--level 2] [--key]
    python -m assignments grade 7 FOLDER... --salt SECRET [--level 2]
"""

import ast
import functools
import hashlib
import hmac
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

from assignments import grade, make, trial, wire
from harness.errors import InputError

NUMBER, TITLE = 7, "Five bugs, planted"
HELPERS = ("tests/world.py", "tests/tiny.py")   # that tests may use
# For each level how many of the five may show in the figures of the default command, and how many
# may change none; of the former at most two ruin the run.
LEVELS = {1: (5, 0), 2: (2, 3), 3: (0, 5)}
POINTS = 10            # for a test, and for a mended file
TOTAL_SECONDS = 300    # for all tests of one folder

# -- which bugs -----------------------------------------------------------------------------------


@functools.cache
def gallery():
    """The rows of the gallery whose right line is in its file, once."""
    sys.path.append(str(make.ROOT / "tests"))
    import gallery as others
    import gallery_losses as losses
    files = make.read()
    return [bug for bug in (*others.BUGS, *losses.BUGS)
            if files.get(bug.file, "").count(bug.right) == 1]


def name(bug):
    """A row, by a number that belongs to its lines."""
    return hashlib.sha256("\n".join((bug.file, bug.right, bug.wrong)).encode()).hexdigest()[:10]


@functools.cache
def measured():
    """{name of a bug: how silent it is}, see silence.py"""
    rows = json.loads((make.HERE / "silence.json").read_text())["bugs"]
    return {row["bug"]: row for row in rows}


def draw(student, salt, level):
    """The five bugs of a student, each in another file: the first that fit the level in an order
    that the student's name and the salt decide."""
    if not salt or not student.strip():
        raise InputError("--student NAME and --salt SECRET: they decide which bugs are planted")
    known = {name(bug): bug for bug in gallery() if name(bug) in measured()}
    chosen, left = [], dict(zip(("loud", "silent"), LEVELS[level]), ruins=2)

    def place(key):
        words = f"{student.strip()}\n{level}\n{key}"
        return hmac.new(salt.encode(), words.encode(), "sha256").digest()
    for key in sorted(known, key=place):
        kind = measured()[key]["class"]
        takes = ["silent"] if kind == "changes no figure" else ["loud"]
        takes += ["ruins"] if kind == "ruins the run" else []
        if len(chosen) < 5 and known[key].file not in {bug.file for bug in chosen} and all(
                left[what] for what in takes):
            chosen.append(known[key])
            left |= {what: left[what] - 1 for what in takes}
    return chosen


def plant(bugs):
    """The project's files with these bugs, {path: text}."""
    files = dict(make.read())
    for bug in bugs:
        files[bug.file] = files[bug.file].replace(bug.right, bug.wrong)
    return files


# -- a student's copy -----------------------------------------------------------------------------

STUB = '''"""
Bug {number}. Functions named test_..., without arguments: together they fail where the bug is, and
pass where it is not. BUGS.md says what is known of it.
"""
'''
CONFTEST = '''"""So that pytest finds the project and the helpers in tests/."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
'''


def wrapped(words):
    return textwrap.wrap(f"- {words}", 99, subsequent_indent="  ")


def curves(row):
    """A table of the figures of the file's default command, without the bug and with it."""
    from assignments import silence
    command = " ".join(["python train.py --algo", row["command"], *silence.FLAGS[:6]])
    if "curve" not in row:
        return f"`{command}` ends in an error, or in numbers that are none.\n"
    lines = ["| step | " + " | ".join(f"{figure}, right | with the bug" for figure in row["curve"])
             + " |", "|---" * (1 + 2 * len(row["curve"])) + "|"]
    for i, step in enumerate(row["steps"]):
        cells = [values[i] if i < len(values) else None
                 for pair in row["curve"].values() for values in pair]
        lines.append(f"| {step} | " + " | ".join(
            "" if cell is None else f"{cell:.3f}" for cell in cells) + " |")
    return f"`{command}`, with this bug alone:\n\n" + "\n".join(lines) + "\n"


def told(bugs, level):
    """BUGS.md: of each bug what the level tells."""
    lines = [f"# Your five bugs, level {level}", ""]
    for i, bug in enumerate(bugs, 1):
        if level == 1:
            what = curves(measured()[name(bug)]).rstrip()
        else:
            where = f"In `{bug.file}`: " if level == 2 else ""
            what = f"{where}{bug.consequence}."
            what = textwrap.fill(what[0].upper() + what[1:], 99)
        lines += [f"## Bug {i}", "", what, ""]
    return "\n".join(lines)


def copy_of(bugs, level):
    """Every file of a student's copy, {path: text}: the project's own, but for five lines."""
    files = plant(bugs)
    for path in (*HELPERS, "requirements.txt", "pyproject.toml", "LICENSE", ".gitignore"):
        files[path] = (make.ROOT / path).read_text()
    files["check.py"] = (make.HERE / "trial.py").read_text()
    files["bugs/conftest.py"] = CONFTEST
    files |= {f"bugs/bug_{i}.py": STUB.format(number=i) for i in range(1, 6)}
    files["BUGS.md"] = told(bugs, level)
    files["README.md"] = (make.HERE / f"handouts/{NUMBER}.md").read_text()
    files["PROJECT.md"] = make.project(files)
    return files


def key(student, bugs):
    """For the instructor: what is planted."""
    lines = [f"{student}: what is planted"]
    for i, bug in enumerate(bugs, 1):
        row, text = measured()[name(bug)], make.read()[bug.file]
        line = text[:text.index(bug.right)].count("\n") + 1
        lines += ["", f"bug {i}: {bug.file}, line {line} of the project's file; {row['class']} "
                  f"({row['command']})", f"  {bug.consequence}",
                  *(f"  + {line}" for line in bug.right.rstrip("\n").split("\n")),
                  *(f"  - {line}" for line in bug.wrong.rstrip("\n").split("\n")),
                  f"  noticed by tests/{bug.killer}", f"  seen in {bug.source}"]
    return "\n".join(lines)


# -- tests over files with bugs and without -------------------------------------------------------


class Idle(ast.NodeTransformer):
    """Adds to every function a statement that does nothing, other ones each time: what does not
    look at behaviour, but at bytes, sees another file every time."""

    def __init__(self, chance):
        self.chance = chance

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        statement = f"idle_{self.chance.getrandbits(40)} = {self.chance.getrandbits(40)}"
        at = ast.get_docstring(node) is not None
        node.body[at:at] = ast.parse(statement).body
        return node


def faces(bugs, bug, chance):
    """The files over which a test of one bug is run, in a random order, each with what is expected:
    with all bugs, with this one alone, without any. Of the bug's file there are neither comments
    nor layout, and no two are the same."""
    found = [(plant(bugs), "failed"), *[(plant([bug]), "failed")] * 2, *[(plant([]), "passed")] * 3]
    chance.shuffle(found)
    helpers = {path: (make.ROOT / path).read_text() for path in HELPERS}
    for files, expected in found:
        text = ast.unparse(Idle(chance).visit(ast.parse(files[bug.file])))
        yield {**files, **helpers, bug.file: text}, expected


class Bench:
    """The process in which tests are run (bench.py), started when needed."""

    def __init__(self):
        self.process, self.end = None, time.monotonic() + TOTAL_SECONDS

    def ask(self, message, seconds):
        """-> {"verdict", "why"}"""
        if time.monotonic() > self.end:
            return {"verdict": "neither", "why": f"all took more than {TOTAL_SECONDS} seconds"}
        try:
            if self.process is None:
                self.start()
            wire.send(self.socket, {**message, "seconds": seconds}, seconds=seconds)
            return wire.receive(self.socket, seconds + 60)[0]
        except (wire.Broken, TimeoutError):
            self.stop()
            return {"verdict": "neither", "why": "its process ended"}

    def start(self):
        self.socket, theirs = socket.socketpair()
        kept = {word: os.environ[word] for word in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH",
                                                    "VIRTUAL_ENV") if word in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, str(make.HERE / "bench.py"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**kept, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
        theirs.close()
        wire.receive(self.socket, 120)

    def stop(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.socket.close()
            self.process = None


def read(folder, path):
    """A student's file. Raises ValueError for what is none."""
    from assignments import judge
    try:
        return judge.read(folder, path)
    except OSError as error:
        raise ValueError(str(error)) from None


def test_fails_as_it_should(bench, bugs, bug, text, seconds, chance):
    """None, or why a student's test earns nothing."""
    modules = {path.removesuffix(".py").split("/")[0] for path in make.read()} | {"world", "tiny"}
    why = trial.complaint(text, modules)
    if why:
        return why
    for files, expected in faces(bugs, bug, chance):
        found = bench.ask({"files": files, "test": text, "seed": chance.getrandbits(30)}, seconds)
        if found["verdict"] == "neither":
            return found["why"]
        if found["verdict"] != expected:
            return ("it passes where the bug is" if expected == "failed" else
                    f"it fails where no bug is: {found['why']}")
    return None


def is_mended(bench, bug, theirs, seconds):
    """None, or why a student's file earns nothing: the project's own line does without a test."""
    right, planted = make.read()[bug.file], plant([bug])[bug.file]
    why = trial.refusal(planted, theirs, make.read().values())
    if why:
        return why
    if ast.dump(ast.parse(theirs)) == ast.dump(ast.parse(right)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        files = {**plant([]), bug.file: ast.unparse(ast.parse(theirs))}
        found = bench.ask({"files": files, "killer": bug.killer, "root": str(make.ROOT),
                           "folder": folder}, 4 * seconds)
    return {"passed": None, "failed": "the withheld test of this bug does not pass"}.get(
        found["verdict"], found["why"])


def judge_folder(folder, bugs, salt, seconds):
    """-> results of one folder, as grade.results gives them"""
    bench, tests = Bench(), []

    def reason(path, judged):
        try:
            return judged(read(folder, path))
        except (ValueError, RecursionError, MemoryError) as error:
            return f"{path}: {error}"
    try:
        for i, bug in enumerate(bugs, 1):
            chance = random.Random(f"{salt} {i}")
            whys = [reason(f"bugs/bug_{i}.py", lambda text, bug=bug, chance=chance:
                           test_fails_as_it_should(bench, bugs, bug, text, seconds, chance)),
                    reason(bug.file, lambda text, bug=bug: is_mended(bench, bug, text, seconds))]
            for what, why in zip(("the test fails where it is, and passes where it is not",
                                  f"at most {trial.CHANGED} lines mend it"), whys):
                tests.append({"name": f"bug {i}: {what}", "max_score": POINTS,
                              "score": 0 if why else POINTS, "output": why or "",
                              "visibility": "visible"})
    finally:
        bench.stop()
    return {"score": sum(test["score"] for test in tests), "tests": tests}


# -- the commands ---------------------------------------------------------------------------------


def make_command(asked):
    """make 7: one student's copy, or those of a list, or what is planted in them."""
    students = [asked.student or ""]
    if asked.students:
        students = [word.strip() for word in asked.students.read_text().splitlines()
                    if word.strip()]
    for student in students:
        bugs = draw(student, asked.salt, asked.level)
        folder = asked.out / student if asked.students else asked.out
        if asked.key:
            print(key(student, bugs) + "\n")
            continue
        if folder.resolve().parent != asked.out.resolve() and asked.students:
            raise InputError(f"{student!r} is no name of a folder")
        make.hand_out(copy_of(bugs, asked.level), folder, f"Assignment {NUMBER}: {TITLE}")
        print(f"Assignment {NUMBER}, {TITLE}: {folder}; there, BUGS.md")
    return 0


def grade_command(asked):
    """grade 7: the student is the folder's name, if no other is given."""
    if asked.student and len(asked.folders) > 1:
        raise InputError("--student is for one folder: of several the names are the students'")

    def judged(folder):
        student = asked.student or folder.resolve().name
        return judge_folder(pathlib.Path(folder), draw(student, asked.salt, asked.level),
                            asked.salt, asked.seconds)
    draw("anybody", asked.salt, asked.level)   # is there a salt?
    grade.report(judged, asked.folders, asked.out, asked.jobs)
    return 0
