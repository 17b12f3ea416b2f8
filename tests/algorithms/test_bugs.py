"""
The gallery of bugs (gallery.py, gallery_losses.py): every mistake is put back in memory, and the
test that is named beside it is run against it and has to fail. A line that is no longer in the
source fails as well, so that the gallery stays up to date.

    python -m pytest tests/algorithms/test_bugs.py -v
"""

import pytest

from conftest import ROOT
from gallery import BUGS as OTHERS
from gallery_losses import BUGS as LOSSES
from mutants import fresh_modules

BUGS = [*OTHERS, *LOSSES]

# Half of the time would go into the garbage collection of the plugin that is left out.
OPTIONS = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]


def outcome(file, text, *tests):
    """Run tests in this process against fresh modules, one of them from the text. -> pytest's exit
    code"""
    with fresh_modules({file: text}):
        return pytest.main([*OPTIONS, *(f"{ROOT}/tests/{test}" for test in tests)])


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
