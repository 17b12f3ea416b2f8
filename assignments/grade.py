"""
Many folders graded: each by a judge in a process of its own (judge.py), a table, and for each a
results.json as Gradescope reads it.
"""

import json
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from assignments import check, make
from harness.errors import InputError

LONGEST = 900   # seconds for one folder; the judge itself gives up much sooner


def ask(assignment, folder, salt, seconds):
    """{test: None or why it fails} of one folder. A judge that ends without an answer says so of
    every test."""
    asked = {"number": assignment.number, "folder": str(folder.resolve()), "salt": salt,
             "seconds": seconds}
    try:
        done = subprocess.run([sys.executable, "-m", "assignments.judge"], cwd=make.ROOT,
                              input=json.dumps(asked), capture_output=True, text=True,
                              timeout=LONGEST)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        words = "grading took too long"
    except ValueError:
        words = "grading failed: " + (done.stderr.strip().splitlines() or ["no answer"])[-1]
    return {test.rsplit("/", 1)[-1]: words for test in assignment.tests()}


def results(assignment, why):
    """As Gradescope reads it: https://gradescope-autograders.readthedocs.io/en/latest/specs/"""
    tests = []
    for requirement, hidden in [*((r, False) for r in assignment.requirements),
                                *((r, True) for r in assignment.hidden)]:
        path, name = requirement.test.split("::")
        reason = why[requirement.test.rsplit("/", 1)[-1]]
        folder = make.HERE / "hidden" if hidden else make.ROOT / assignment.tests_in
        proves = check.proves(folder / path, name)
        tests.append({"name": f"{requirement.body}: {proves}", "max_score": requirement.points,
                      "score": 0 if reason else requirement.points, "output": reason or "",
                      "visibility": "after_published" if hidden else "visible"})
    return {"score": sum(test["score"] for test in tests), "tests": tests}


def bodies(found):
    """What the tests are about: the words before the colon."""
    return list(dict.fromkeys(test["name"].split(":")[0] for test in found["tests"]))


def line(name, found):
    """A student's points, in all and body by body."""
    parts = []
    for body in bodies(found):
        chosen = [t for t in found["tests"] if t["name"].split(":")[0] == body]
        parts.append(f"{sum(t['score'] for t in chosen)}/{sum(t['max_score'] for t in chosen)}")
    return [name, str(found["score"]), *parts]


def names_of(folders):
    """The names of folders. Raises InputError where one is none, or has another's name."""
    names = [folder.resolve().name for folder in folders]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder")
        if names.count(folder.resolve().name) > 1:
            raise InputError(f"two folders are named {folder.resolve().name}: rename one")
    return names


def grade(assignment, folders, out, salt="", seconds=20, jobs=1):
    """Grade folders and print a table. -> {name: results}"""
    return report(lambda folder: results(assignment, ask(assignment, folder, salt, seconds)),
                  folders, out, jobs)


def report(judged, folders, out, jobs):
    """judged(folder) -> results, of all folders; a table, and results.json of each."""
    names = names_of(folders)
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(names, pool.map(judged, folders)))
    show(found, out)
    return found


def show(found, out):
    """Print a table of {name: results} and write each student's results.json."""
    first = next(iter(found.values()))
    rows = [["folder", "points", *bodies(first)], *(line(*pair) for pair in found.items())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]),
                         *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]))
    for name, one in found.items():
        path = pathlib.Path(out) / name / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(one, indent=1) + "\n")
    print(f"Why: {out}/<folder>/results.json")
