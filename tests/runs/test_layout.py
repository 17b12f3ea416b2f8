"""
The layout that the documents promise: a loop that fits on a slide, algorithm files that read alone
and differ in what is science, lines of at most 100 columns.
"""

import ast
import inspect

import pytest

import train
from conftest import ROOT

FILES = sorted(path for pattern in ("*.py", "harness/*.py", "experiments/*.py",
                                    "assignments/**/*.py", "tests/**/*.py", ".ci/*.py")
               for path in ROOT.glob(pattern))
ALGORITHM_FILES = ("sft", "dft", "rft", "dpo", "rm", "ppo", "grpo", "hybrid", "distill")
DUTIES = ["__init__", "examples", "sample", "minibatches", "loss"]


def changed(a, b):
    """Added and removed lines together between two lists of lines: what is in no longest common
    subsequence."""
    longest = [0] * (len(b) + 1)
    for x in a:
        before = longest[:]
        for j, y in enumerate(b):
            longest[j + 1] = before[j] + 1 if x == y else max(longest[j], before[j + 1])
    return len(a) + len(b) - 2 * longest[-1]


def lines_of_class(Algorithm):
    return inspect.getsource(Algorithm).splitlines()


def lines_of_code(name):
    """The lines of a file without docstrings, comments and blank lines."""
    source = (ROOT / f"{name}.py").read_text()
    prose = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [(i, line.split("  #")[0].rstrip()) for i, line in enumerate(source.splitlines(), 1)]
    return [line for i, line in lines
            if i not in prose and line and not line.lstrip().startswith("#")]


def test_changed_lines_worked_example():
    """Of a b c d and a x c, b and d are removed and x is added: 3."""
    assert changed(list("abcd"), list("axc")) == 3
    assert changed(list("abc"), list("abc")) == 0 and changed([], list("ab")) == 2


def test_the_loop_fits_on_a_slide():
    """train() and update() together have at most 45 lines of at most 100 columns."""
    lines = [line for f in (train.train, train.update)
             for line in inspect.getsource(f).splitlines()]
    assert 20 < len(lines) <= 45 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("a, b, classes, files", [("sft", "dft", 60, 140),
                                                  ("ppo", "grpo", 120, 300)])
def test_a_diff_shows_science(a, b, classes, files):
    """How many lines differ, added and removed together: between the two classes as they stand, and
    between the lines of code of the two files."""
    found = changed(*(lines_of_class(train.ALGORITHMS[name]) for name in (a, b)))
    assert found <= classes, f"classes: {found}"
    found = changed(lines_of_code(a), lines_of_code(b))
    assert found <= files, f"files: {found}"


@pytest.mark.parametrize("name", ALGORITHM_FILES)
def test_an_algorithm_file_reads_alone(name):
    """It opens with the three questions, imports no sibling, and its class has the contract's
    methods in the contract's order."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    for question in ("Who sampled the text?", "What weight has each token?",
                     "What anchors the policy?"):
        assert question in ast.get_docstring(tree)
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not imported & set(ALGORITHM_FILES)
    methods = list(vars(train.ALGORITHMS[name]))
    assert [m for m in methods if m in DUTIES] == DUTIES
    assert {"Config", "legend"} <= set(methods)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_line_is_wider_than_100_columns(path):
    """In the project's files and in its tests; counted in bytes, for some letters are wide."""
    wide = [i for i, line in enumerate(path.read_bytes().splitlines(), 1) if len(line) > 100]
    assert not wide, f"lines {wide}"


def test_no_test_file_is_longer_than_400_lines():
    """So that each has one subject."""
    lengths = {path.name: len(path.read_text().splitlines()) for path in FILES
               if "tests" in path.relative_to(ROOT).parts}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
