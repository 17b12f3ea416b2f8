"""Assignment 7: which bugs a student gets, what stands in the copy, and what does not."""

import ast
import re
import subprocess
import sys

import pytest

import train
from assignments import bugs, make, trial
from assignments.__main__ import main
from conftest import ROOT
from harness import flags
from harness.errors import InputError
from model import GPTConfig

LEVELS = pytest.mark.parametrize("level", bugs.LEVELS)
SALT = "a secret of nobody"


def draw(student, level):
    return bugs.draw(student, SALT, level)


@LEVELS
def test_the_draw_depends_on_student_and_salt_alone(level):
    """Twice the same five; thirty students have hardly two sets in common; another salt, other
    bugs."""
    found = [tuple(map(bugs.name, draw(f"student {i}", level))) for i in range(30)]
    assert found == [tuple(map(bugs.name, draw(f"student {i}", level))) for i in range(30)]
    assert len(set(found)) >= 28
    others = [tuple(map(bugs.name, bugs.draw(f"student {i}", "x", level))) for i in range(30)]
    assert sum(a == b for a, b in zip(found, others)) <= 1


@LEVELS
def test_five_bugs_in_five_files_that_fit_the_level(level):
    """So none lies on another's lines. How many may show in figures, the level says; at most two
    ruin the run."""
    loud, silent = bugs.LEVELS[level]
    for i in range(40):
        found = draw(f"student {i}", level)
        kinds = [bugs.measured()[bugs.name(bug)]["class"] for bug in found]
        assert len(found) == len({bug.file for bug in found}) == 5
        assert kinds.count("changes no figure") == silent == 5 - loud
        assert kinds.count("ruins the run") <= 2


def test_every_bug_is_met():
    """Among the bugs of three hundred draws are nine in ten of those that were measured."""
    known = {bugs.name(bug) for bug in bugs.gallery()} & set(bugs.measured())
    met = {bugs.name(bug) for i in range(100) for level in bugs.LEVELS
           for bug in draw(f"student {i}", level)}
    assert met <= known and len(met) >= 0.9 * len(known)


@LEVELS
def test_the_copy_is_the_project_but_for_five_lines(level):
    """Every file of the project is there, and equal but for the lines of the five bugs; the helpers
    of the tests are the project's."""
    found = draw("ada", level)
    files = bugs.copy_of(found, level)
    for path, text in make.read().items():
        bug = next((bug for bug in found if bug.file == path), None)
        if bug is None:
            assert files[path] == text
            continue
        above, below = text.split(bug.right)
        assert files[path] != text and files[path].startswith(above)
        assert files[path].endswith(below) and bug.wrong in files[path]
        ast.parse(files[path])
    for path in bugs.HELPERS:
        assert files[path] == (ROOT / path).read_text()


@LEVELS
def test_nothing_tells_which_bugs(level):
    """No gallery, no test of the project, no results and no notes are in the copy; nor the salt,
    nor a name of a test that notices; and what the level does not tell is not told."""
    found = draw("ada", level)
    files = bugs.copy_of(found, level)
    assert not [path for path in files if re.search(
        r"gallery|mutants|hidden|instructor|silence|experiments|RESULTS|SURVEY|test_", path)]
    everything = "\n".join(files.values())
    assert SALT not in everything
    for bug in found:
        assert bug.killer.split("::")[1].split("[")[0] not in everything
    told = " ".join(files["BUGS.md"].split())
    assert all((bug.consequence[1:] in told) == (level > 1) for bug in found)
    assert all((f"`{bug.file}`" in told) == (level == 2) for bug in found)
    assert told.count("## Bug") == 5
    [table] = re.findall(r"<!-- silence.json -->.*<!-- end -->", files["README.md"], re.S)
    assert found[0].consequence in " ".join(table.split()) and ".py" not in table


def test_a_copy_has_one_commit_and_is_the_same_twice(tmp_path):
    """A diff shows nothing but what the student changes."""
    words = ["make", "7", "--student", "ada", "--salt", SALT]
    for name in ("one", "two"):
        assert main([*words, "--out", str(tmp_path / name)]) == 0

    def git(name, *words):
        return subprocess.run(["git", *words], cwd=tmp_path / name, capture_output=True,
                              text=True).stdout
    assert git("one", "rev-parse", "HEAD") == git("two", "rev-parse", "HEAD") != ""
    assert git("one", "rev-list", "--count", "HEAD").strip() == "1"
    assert git("one", "status", "--porcelain") == ""
    done = subprocess.run([sys.executable, "train.py", "--algo", "grpo", "--help"],
                          cwd=tmp_path / "one", capture_output=True, text=True)
    assert done.returncode == 0 and "--num_generations" in done.stdout


def test_a_list_of_students(tmp_path, capsys):
    """Each a folder; --key prints what is planted and writes nothing."""
    (tmp_path / "names.txt").write_text("ada\nalan turing\n\n")
    words = ["make", "bugs", "--students", str(tmp_path / "names.txt"), "--salt", SALT]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ada", "alan turing"]
    capsys.readouterr()
    assert main(["make", "7", "--student", "ada", "--salt", SALT, "--key"]) == 0
    said = capsys.readouterr().out
    for bug in draw("ada", 2):
        assert bug.right.split("\n")[0] in said and bug.killer in said


@pytest.mark.parametrize("words, message", [
    (["make", "7", "--student", "ada", "--out", "x"], "--student NAME and --salt SECRET"),
    (["make", "7", "--salt", "s", "--out", "x"], "--student NAME and --salt SECRET"),
    (["make", "7", "--student", "ada", "--salt", "s"], "the following arguments are required"),
    (["make", "7", "--student", "ada", "--salt", "s", "--out", "x", "--level", "4"],
     "invalid choice"),
    (["grade", "7", ".", "--out", "x"], "--student NAME and --salt SECRET"),
    (["grade", "7", ".", "..", "--salt", "s", "--student", "ada", "--out", "x"],
     "--student is for one folder"),
    (["grade", "7", "nowhere", "--salt", "s", "--out", "x"], "nowhere is no folder")])
def test_mistakes_of_the_user(words, message, tmp_path, monkeypatch):
    """Each ends in one line."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        main(words)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_name_that_leaves_the_folder(tmp_path):
    """../x is the name of no student's folder."""
    (tmp_path / "names.txt").write_text("../x\n")
    with pytest.raises(InputError, match="no name of a folder"):
        main(["make", "7", "--students", str(tmp_path / "names.txt"), "--salt", SALT, "--out",
              str(tmp_path / "out")])


def test_the_right_lines_are_taken_as_changes():
    """Of every bug: one to five lines, with no name that is refused."""
    project = list(make.read().values())
    for bug in bugs.gallery()[::6]:
        planted, right = bugs.plant([bug])[bug.file], make.read()[bug.file]
        assert trial.refusal(planted, right, project) is None, bug
        assert trial.refusal(planted, planted, project) == "nothing is changed"


# -- the handout ----------------------------------------------------------------------------------

HANDOUT = (ROOT / "assignments/handouts/7.md").read_text()


def test_the_handout_has_its_parts():
    """Goals, what to read, what to write, derivations, runs, and the time that it takes; levels and
    points are those of the grader."""
    headings = re.findall(r"^## (.*)$", HANDOUT, re.M)
    assert headings == ["What you will be able to do", "Read first", "How silent bugs are",
                        "Levels", "Write", "Derive, on paper", "Run, and answer", "Hand in"]
    assert "The time is about" in " ".join(HANDOUT.split()) and "section 3," in HANDOUT
    assert max(map(len, HANDOUT.splitlines())) <= 100
    levels = re.findall(r"^\| (\d) \| .* \| (\d) \|$", HANDOUT, re.M)
    assert levels == [(str(level), str(loud)) for level, (loud, _) in bugs.LEVELS.items()]
    assert re.findall(r"\| (\d+) \|$", HANDOUT.split("## Write")[1], re.M) == [str(bugs.POINTS)] * 2
    assert sum(bugs.POINTS * 2 for _ in range(5)) == 100


def test_the_example_of_the_handout_passes_on_the_project():
    """It is a test as it is asked for; and it notices none of the bugs' lines."""
    [example] = re.findall(r"```python\n(.*?)```", HANDOUT, re.S)
    assert trial.complaint(example, {"train"}) is None
    space = {}
    exec(example, space)
    space["test_the_rate_rises_to_its_peak_in_equal_steps"]()
    assert not any("learning_rate(" in bug.right for bug in bugs.gallery())


def test_commands_of_the_handout_are_taken():
    """And level 1 names one that is."""
    found = re.findall(r"`python train\.py ([^`]*)`", HANDOUT.replace(" S`", " 7`"))
    found += re.findall(r"`python train\.py ([^`]*)`", bugs.told(draw("ada", 1), 1))
    assert len(found) >= 4
    for words in found:
        words = words.split() + (["--teacher", "x"] if "distill" in words else [])
        flags.parse(words, train.ALGORITHMS, GPTConfig)


def test_the_notes_name_what_the_grader_says():
    """Their messages are the grader's, and they are not copied."""
    notes = (ROOT / "assignments/instructor/7.md").read_text()
    source = "".join((ROOT / f"assignments/{name}.py").read_text() for name in ("bugs", "trial"))
    for words in ("it passes where the bug is", "it fails where no bug is",
                  "lines are changed, and", "nothing is changed",
                  "the withheld test of this bug does not pass"[:17]):
        assert words in notes and words in source
    everything = "\n".join(bugs.copy_of(draw("ada", 2), 2).values())
    assert not [line for line in notes.splitlines() if len(line) > 60 and line in everything]
