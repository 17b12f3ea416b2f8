"""A student's copy: what is cut and what is not, that nothing gives the answers away, that it runs,
and what a student sees."""

import ast
import builtins
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from assignments import check, make, table
from assignments.__main__ import main
from conftest import ROOT
from gallery import BUGS as OTHERS
from gallery_losses import BUGS as LOSSES
from harness.errors import InputError

ASSIGNMENTS = pytest.mark.parametrize("assignment", table.ASSIGNMENTS,
                                      ids=[str(a.number) for a in table.ASSIGNMENTS])


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """{number: the folder of a student's copy}"""
    folder = tmp_path_factory.mktemp("copies")
    for assignment in table.ASSIGNMENTS:
        make.make(assignment, folder / str(assignment.number))
    return {a.number: folder / str(a.number) for a in table.ASSIGNMENTS}


def python(folder, *words):
    """-> CompletedProcess of a script in a folder"""
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True,
                          text=True, timeout=300)


# -- cutting --------------------------------------------------------------------------------------

SOURCE = '''"""A file."""

x = 1   # a comment


def plain(a,  b = 2):   # layout that nobody would choose
    """Adds.

    Worked example: 1 and 2 give 3.
    """
    # a hint
    c = a + b
    return c   # the sum
# outside


class Model:
    size: int = 3

    @staticmethod
    def long(a: dict = {"a": [1, 2]},
             b=(3, 4)) -> int:
        total = 0

        return total
    def last(self): "One line."; return 1
'''


def test_a_body_is_cut_and_nothing_else():
    """Signature, docstring, decorators, layout and comments outside stay byte for byte; comments
    and blank lines of the body go."""
    found = check.cut(SOURCE, {"plain": "m.plain: yours to write", "Model.long": "m: so"})
    body = '    # a hint\n    c = a + b\n    return c   # the sum\n'
    other = '        total = 0\n\n        return total\n'
    assert SOURCE.count(body) == SOURCE.count(other) == 1
    assert found == SOURCE.replace(
        body, '    raise NotImplementedError("m.plain: yours to write")\n').replace(
        other, '        raise NotImplementedError("m: so")\n')
    with pytest.raises(ValueError, match="no function Model.gone"):
        check.cut(SOURCE, {"Model.gone": ""})


def test_what_is_outside_is_known_without_its_layout():
    """Comments, layout and the bodies themselves may change; anything else is noticed."""
    number = check.outside(SOURCE, ["plain"])
    for old, new, same in (("x = 1   # a comment", "x = 1", True), ("c = a + b", "c = b + a", True),
                           ("x = 1", "x = 2", False), ("b = 2", "b = 3", False),
                           ("size: int = 3", "size: int = 3\n    import os", False)):
        assert SOURCE.count(old) == 1
        assert (check.outside(SOURCE.replace(old, new), ["plain"]) == number) == same


@ASSIGNMENTS
def test_signatures_and_docstrings_stay(assignment):
    """Of every file but for the bodies that are named: the same syntax trees, and the named
    functions do nothing but raise."""
    files = make.code(assignment)
    for name in assignment.bodies + assignment.also:
        file, function = name.split(".", 1)
        ours, theirs = (check.find(text, function)
                        for text in ((ROOT / f"{file}.py").read_text(), files[f"{file}.py"]))
        assert ast.get_docstring(ours) == ast.get_docstring(theirs)
        assert ast.dump(ours.args) == ast.dump(theirs.args)
        [statement] = check.body_of(theirs)
        assert isinstance(statement, ast.Raise) and name in ast.unparse(statement)
        assert "yours to write" in ast.unparse(statement)
        ours.body = theirs.body = []
    for file, text in files.items():
        functions = [name.split(".", 1)[1] for name in assignment.bodies + assignment.also
                     if name.split(".")[0] == file[:-3]]
        original = (ROOT / file).read_text()
        assert check.outside(original, functions) == check.outside(text, functions)
        assert functions or text == original


# -- what would give an answer away ---------------------------------------------------------------


def plain(line):
    """Without its comment and the blanks around it."""
    return re.sub(r"\s+#.*", "", line).strip()


def lines_of(name):
    """The lines of a body that say something."""
    file, function = name.split(".", 1)
    text = (ROOT / f"{file}.py").read_text()
    first, last = check.body_lines(text, check.find(text, function))
    lines = map(plain, text.splitlines()[first - 1:last])
    return [line for line in lines if len(line) >= 12 and line[0] != "#"]


@ASSIGNMENTS
def test_no_line_of_an_answer_is_in_the_copy(assignment):
    """Whatever stood in a body is found in no file of the copy, but for what the assignment calls
    known."""
    there = {}
    for path, text in make.copy_of(assignment).items():
        for line in text.splitlines():
            there.setdefault(plain(line), path)
    answers = [line for name in assignment.bodies for line in lines_of(name)]
    found = {line: there[line] for line in answers if line in there}
    assert len(answers) > 12 and set(found) == set(assignment.known), found


@ASSIGNMENTS
def test_nothing_that_tells_is_copied(assignment):
    """No gallery, no results, no hidden test, no notes for instructors; of tests the required ones
    alone; and no line of the gallery that stands in a body."""
    files = make.copy_of(assignment)
    assert not [path for path in files if re.search(
        r"gallery|mutants|hidden|instructor|results|experiments|RESULTS|SURVEY|test_bugs", path)]
    tests = {f"{path.removeprefix('tests/')}::{node.name}" for path, text in files.items()
             if "/test_" in path for node in ast.parse(text).body
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    assert tests == {r.test for r in assignment.requirements}
    everything = "\n".join(files.values())
    answers = {line for name in assignment.bodies for line in lines_of(name)}
    rights = {bug.right.strip().splitlines()[0].strip() for bug in OTHERS + LOSSES}
    for line in answers & rights - set(assignment.known):
        assert line not in everything


def test_what_is_written_out_in_loops_stays_here():
    """Llama in loops, and top_k and top_p in loops, stand beside tests of the copy of 2."""
    files = make.copy_of(table.assignment(2))
    assert "tests/llama.py" in files and "tests/algorithms/test_sampling.py" in files
    for name in ("reference_llama", "truncate(", "left_of("):
        assert not [path for path, text in files.items() if name in text]


@ASSIGNMENTS
def test_nothing_that_is_needed_is_left_out(assignment):
    """Every module that a copied test file imports is copied or no part of the project, and every
    name that it uses is there."""
    files = make.tests(assignment)
    folders = ("", "harness/", "experiments/", "assignments/", "tests/**/")   # no environment's
    ours = {path.stem for folder in folders for path in ROOT.glob(f"{folder}*.py")}
    there = {path.split("/")[-1][:-3] for path in (*files, *make.code(assignment))}
    for path, text in files.items():
        nodes = list(ast.walk(ast.parse(text)))
        modules = {name.split(".")[0] for name, _ in make.imports(text)}
        assert modules & ours <= there | {"harness"}, path
        known = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        known |= {n.arg for n in nodes if isinstance(n, ast.arg)} | set(dir(builtins))
        known |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        known |= {(a.asname or a.name).split(".")[0] for n in nodes
                  if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert used - known <= {"__file__"}, path


@ASSIGNMENTS
def test_points_and_names(assignment):
    """The visible requirements are worth 80 points and the hidden ones 20; every test is there and
    says what it proves; every body has at least one."""
    assert sum(r.points for r in assignment.requirements) == 80
    assert sum(r.points for r in assignment.hidden) == 20
    for path in assignment.tests():
        file, name = path.split("::")
        assert check.proves(ROOT / file, name).endswith((".", ":"))
    for body in assignment.bodies:
        assert body.split(".")[-1] in {r.body for r in assignment.requirements}
        assert body.split(".")[-1] in {r.body for r in assignment.hidden}


# -- the copy -------------------------------------------------------------------------------------


def test_two_copies_are_equal(copies, tmp_path):
    """The same files and the same commit, one, with nothing left over."""
    make.make(table.assignment(6), tmp_path / "again")

    def git(folder, *words):
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout
    for words in (["rev-parse", "HEAD"], ["rev-list", "--count", "HEAD"], ["ls-files"]):
        one, two = (git(folder, *words) for folder in (copies[6], tmp_path / "again"))
        assert one == two != ""
    assert git(copies[6], "rev-list", "--count", "HEAD").strip() == "1"
    assert git(copies[6], "status", "--porcelain") == ""


def test_what_a_student_sees_first(copies):
    """A line of points for every requirement, what it proves, and that the body is missing; exit
    code 1."""
    done = python(copies[6], "check.py")
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "Assignment 6: GRPO" and lines[-2] == (
        "0 of 80 points; 0 of 18 requirements hold.")
    assert lines[2:4] == [
        "--  1    0/6  group_advantages  One group with rewards [1, 0, 0, 0], worked by hand.",
        "              > grpo.group_advantages: yours to write"]
    assert lines.count("              > grpo.policy_loss: yours to write") >= 5
    assert max(map(len, lines)) <= 100 and "Traceback" not in done.stdout


def test_a_run_that_reaches_a_missing_body_names_it(copies):
    """In one line, with exit code 2."""
    for number, body in ((1, "data.collate"), (2, "model.GPT.generate")):
        done = python(copies[number], "train.py", "--algo", "sft", "--max_steps", 1)
        assert done.returncode == 2 and done.stderr == f"error: {body}: yours to write\n"


def test_a_mistake_is_named_with_numbers(copies, tmp_path):
    """The rest of the answers, one of them wrong: the failure says what was found and what was
    expected, on which example; helpers outside the bodies are noted."""
    text = (ROOT / "grpo.py").read_text()
    right = "estimate = log_ratio.exp() - 1 - log_ratio\n"
    assert text.count(right) == 1
    (copies[6] / "grpo.py").write_text(text.replace(right, "estimate = -log_ratio\n") + "x = 1\n")
    done = python(copies[6], "check.py")
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and "70 of 80 points; 15 of 18 requirements hold." in lines
    assert sum(line.startswith("--") for line in lines) == 3
    assert re.search(r"> at \[0, 0\] found 0, expected -0.003234; 21 of 21 are off", done.stdout)
    assert lines[-1].startswith("Note: grpo.py is changed outside the bodies")
    (copies[6] / "grpo.py").write_text(text)
    done = python(copies[6], "check.py", 17)
    assert done.returncode == 0 and "4 of 4 points; 1 of 1 requirements hold." in done.stdout
    (copies[6] / "grpo.py").write_text("def f(:\n")
    done = python(copies[6], "check.py")
    assert done.returncode == 2 and done.stderr == "error: grpo.py, line 1: invalid syntax\n"


def test_reasons_are_short():
    """Numbers whole where they are few, else where they first differ."""
    assert check.difference([[0.25]], [[0.5]]) == "found [[0.25]], expected [[0.5]]"
    assert check.difference([[0] * 5] * 2, [[0] * 5, [0, 0, 1.5, 0, 0]]) == (
        "at [1, 2] found 0, expected 1.5; 1 of 10 are off")
    assert check.difference([1, 2], [1, 2, 3]) == "found shape (), expected ()"
    assert check.difference("text", [1]) == "found shape (), expected ()"
    assert check.first_sentence("The clip (PPO, 1707.06347, eq. 7) cuts. And so on.") == (
        "The clip cuts.")


def test_a_comparison_of_torch_is_told_with_its_numbers(tmp_path):
    """torch.testing.assert_close raises in torch's own file: what is told is the test's line, and
    where the two are furthest apart; afterwards it is torch's again."""
    path, compare = tmp_path / "test_it.py", torch.testing.assert_close
    path.write_text("import torch\n\n\ndef test_it():\n    found = torch.zeros(9)\n"
                    "    found[2], found[7] = 1e-5, 2\n"
                    "    torch.testing.assert_close(found, torch.zeros(9), rtol=0, atol=1e-4)\n")
    assert check.run([f"{path}::test_it"]) == {
        "test_it.py::test_it": "at [7] found 2, expected 0; 1 of 9 are off"}
    assert torch.testing.assert_close is compare


def test_a_failure_that_cannot_be_told_is_a_failure():
    """Whatever a body returned, the report of one test never stops the others."""
    watch = check.Watch()
    watch.pytest_runtest_makereport(
        SimpleNamespace(path=ROOT / "test_x.py", originalname="test_y"),
        SimpleNamespace(excinfo="no such thing", when="call"))
    assert watch.why == {"test_x.py::test_y": "what was found cannot be shown (AttributeError)"}


def test_the_workflow_has_a_step_for_each_requirement():
    """With its points; GitHub adds them up."""
    assignment = table.assignment(6)
    text = make.workflow(assignment)
    assert re.findall(r"max-score: (\d+)", text) == [str(r.points) for r in assignment.requirements]
    assert "command: python check.py 18\n" in text and "R18_RESULTS: \"${{steps.r18." in text
    assert text.rstrip().endswith(",r18")


# -- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("words, message", [
    (["make", "10", "--out", "x"],
     "there is no assignment 10: choose from 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
    (["make", "6"], "the following arguments are required: --out"),
    (["make", "6", "--out", "."], "is there already: choose another folder"),
    (["grade", "6", "nowhere"], "nowhere is no folder"),
    (["grade", "6", ".", ".", "--out", "x"], "two folders are named"),
    (["grade", "6", ".", "--jobs", "0"], "--jobs and --seconds: numbers above 0"),
    (["mark"], "invalid choice"), ([], "required")])
def test_mistakes_of_the_user(words, message, tmp_path, monkeypatch):
    """Each ends in one line that says what is wrong."""
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        main(words)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_program_ends_in_one_line(tmp_path):
    """With exit code 2; made as it says, with what it names."""
    done = python(ROOT, "-m", "assignments", "make", 10, "--out", tmp_path / "x")
    assert done.returncode == 2 and done.stderr.startswith("error: there is no assignment 10")
    assert main(["make", "3", "--out", str(tmp_path / "3")]) == 0
    assert json.loads((tmp_path / "3/assignment.json").read_text())["number"] == 3
    assert (tmp_path / "3/README.md").read_text() == (
        ROOT / "assignments/handouts/3.md").read_text()
