"""Handouts and instructors' notes say what is so: commands, functions, points, tests, and what the
wrong solutions earn."""

import re
import shlex

import pytest
from test_grading import WRONG

import compare
import train
from assignments import check, make, table
from conftest import ROOT
from harness import flags
from model import GPTConfig

NUMBERS = [a.number for a in table.ASSIGNMENTS]
HEADINGS = ["What you will be able to do", "Read first", "Write", "Derive, on paper",
            "Run, and answer", "Hand in"]


def text_of(folder, number):
    return (ROOT / f"assignments/{folder}/{number}.md").read_text()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_handout_has_its_parts(number):
    """Goals, what to read, what to write, derivations, runs, and the time that it takes."""
    text = text_of("handouts", number)
    assert text.startswith(f"# Assignment {number}: ") and "The time is" in " ".join(text.split())
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    for section in re.findall(r"section (\d(?:\.\d)?)", text.split("## Write")[0])[:1]:
        assert f"| {section}" in (ROOT / "SURVEY.md").read_text()
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("number", NUMBERS)
def test_the_points_of_a_handout_are_those_of_the_table(number):
    """A row for each body: visible and hidden points."""
    assignment, found = table.assignment(number), {}
    for cells in re.findall(r"^\| (.*`) \| (\d+) \| (\d+) \|$", text_of("handouts", number), re.M):
        found[re.findall(r"`([^`]+)`", cells[0])[-1].split(".")[-1]] = int(cells[1]), int(cells[2])
    bodies = {name.split(".")[-1] for name in assignment.bodies}
    assert found == {body: tuple(sum(r.points for r in rows if r.body == body)
                                 for rows in (assignment.requirements, assignment.hidden))
                     for body in bodies}


COMMANDS = [(number, command.replace(" S", " 7")) for number in NUMBERS
            for command in re.findall(r"`(python (?:train|compare)\.py [^`]*)`",
                                      text_of("handouts", number))]


@pytest.mark.parametrize("number, command", COMMANDS)
def test_commands_are_taken(number, command):
    """What a handout tells people to type is accepted; and of what it runs nothing is left out."""
    _, script, *words = shlex.split(command)
    if script == "train.py":
        flags.parse(words, train.ALGORITHMS, GPTConfig)
    else:
        arms = words[:words.index("--seeds")]
        first = next((i for i, word in enumerate(arms) if word.startswith("--")), len(arms))
        assert compare.plan(arms[:first], arms[first:], 0, 1)
    algorithms = set(re.findall(r"\b(pretrain|sft|dft|grpo|ppo|dpo|hybrid|rft|distill)\b", command))
    left_out = {name.split(".")[0] for name in table.assignment(number).also}
    assert algorithms and not algorithms & left_out


@pytest.mark.parametrize("number", NUMBERS)
def test_notes_name_tests_that_exist_and_scores_that_are_given(number):
    """Every test is one of the project's, and every mistake has the points of the wrong solution
    in test_grading.py."""
    text = text_of("instructor", number)
    tests = set(re.findall(r"`(test_\w+)`", text))
    known = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    assert tests and all(f"def {test}(" in known for test in tests)
    scores = [int(score) for score in re.findall(r"^\|.*\| (\d+) \|", text, re.M)]
    assert scores == [wrong.score for wrong in WRONG[number]]


def test_the_notes_are_not_copied():
    """Nor is anything else of the folder but the handout and check.py."""
    for assignment in table.ASSIGNMENTS:
        everything = "\n".join(make.copy_of(assignment).values())
        notes = text_of("instructor", assignment.number).splitlines()
        assert not [line for line in notes if len(line) > 60 and line in everything]
        assert check.first_sentence(make.__doc__) not in everything


def test_the_list_of_assignments():
    """assignments/README.md has a row for each: its title, its points, and the handout's time."""
    hours = dict(enumerate("one two three four five six seven eight".split(), 1))
    rows = re.findall(r"^\| \[(\d)\]\(handouts/(\d)\.md\) \| ([^|]+) \| [^|]+ \| (.*) "
                      r"\| (\d) hours? \|$", (ROOT / "assignments/README.md").read_text(), re.M)
    assert [row[0] for row in rows] == [row[1] for row in rows] == sorted(
        path.stem for path in ROOT.glob("assignments/handouts/*.md"))
    for number, _, title, points, time in rows:
        assignment, handout = table.assignment(number), text_of("handouts", number)
        assert handout.startswith(f"# Assignment {number}: {title}\n")
        assert f"time is about {hours[int(time)]} hours" in " ".join(handout.split())
        if assignment.bodies:
            visible, hidden = (sum(r.points for r in requirements) for requirements in
                               (assignment.requirements, assignment.hidden))
            assert points == f"{visible} visible, {hidden} hidden"
