"""
The gallery of bugs (gallery.py, gallery_losses.py): every mistake is put back in memory, and the
test that is named beside it is run against it and has to fail. A line that is no longer in the
source fails as well, so that the gallery stays up to date.

    python -m pytest tests/algorithms/test_bugs.py -v
"""

import contextlib
import importlib.abc
import importlib.util
import io
import sys

import pytest

from conftest import ROOT
from gallery import BUGS as OTHERS
from gallery_losses import BUGS as LOSSES

BUGS = [*OTHERS, *LOSSES]

# The project's modules and the tests', by the names under which they are imported.
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts)
           for pattern in ("*.py", "harness/*.py") for path in ROOT.glob(pattern)}
MODULES |= {"harness", *(path.stem for path in ROOT.glob("tests/**/*.py"))}

# Half of the time would go into the garbage collection of the plugin that is left out.
OPTIONS = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]


class Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one of the project's modules from a changed text."""

    def __init__(self, file, text):
        self.path, self.text = ROOT / file, text
        self.name = file.removesuffix(".py").replace("/", ".")

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self.text, str(self.path), "exec"), module.__dict__)


def outcome(file, text, *tests):
    """Run tests in this process against fresh modules, one of them from the text. -> pytest's exit
    code"""
    modules = {name: sys.modules.pop(name) for name in MODULES & set(sys.modules)}
    mutant, path = Mutant(file, text), sys.path[:]
    sys.meta_path.insert(0, mutant)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return pytest.main([*OPTIONS, *(f"{ROOT}/tests/{test}" for test in tests)])
    finally:
        sys.meta_path.remove(mutant)
        for name in MODULES & set(sys.modules):
            del sys.modules[name]
        sys.modules.update(modules)
        sys.path[:] = path


@pytest.mark.parametrize("bug", BUGS, ids=[f"{bug.file}: {bug.consequence}" for bug in BUGS])
def test_bug(bug):
    """The line is in the source, once; with the wrong line in its place the named test fails (exit
    code 1: it does not end in an error)."""
    source = (ROOT / bug.file).read_text()
    assert source.count(bug.right) == 1, f"{bug.file} no longer has this line once: {bug.right!r}"
    mutated = source.replace(bug.right, bug.wrong)
    assert outcome(bug.file, mutated, bug.killer) == 1, f"{bug.killer} does not notice"


def test_named_tests_pass_on_correct_code():
    """The same tests pass, run in the same way, where nothing is wrong: it is the bug that makes
    them fail."""
    source = (ROOT / "model.py").read_text()
    assert outcome("model.py", source, *sorted({bug.killer for bug in BUGS})) == 0


def test_every_file_of_an_algorithm_is_in_the_gallery():
    """Model, data, rewards, loop, evaluation and every algorithm have at least one row, and there
    are at least thirty."""
    assert {bug.file for bug in BUGS} >= {
        "model.py", "data.py", "tasks.py", "train.py", "harness/checkpoint.py",
        "harness/evaluate.py", "sft.py", "dft.py", "rft.py", "dpo.py", "rm.py", "ppo.py",
        "grpo.py", "distill.py", "hybrid.py"}
    assert len(BUGS) >= 30
