"""
Assignment 8, a report: the figures of the two examples follow from their runs, what checks reports
finds what is missing or wrong, and the copy holds all that is needed.
"""

import json
import math
import re
import shlex
import subprocess
import sys

import common
import pytest

import compare
from assignments import make, report, table
from assignments.__main__ import main
from conftest import ROOT
from harness.errors import InputError

REPORTS = ROOT / "assignments/reports"
GRPO, SFT = "grpo:num_prompts=16:learning_rate=3e-4", "sft:num_demonstrations=16:learning_rate="


def runs(name, file="compare.json"):
    """{arm: its figures} of an example."""
    found = {}
    for run in json.loads((REPORTS / name / file).read_text()):
        found.setdefault(run["variant"], []).append(run)
    return {arm: common.figures_of(own) for arm, own in found.items()}


def text_of(name):
    return (REPORTS / name / "report.md").read_text()


def failing(path):
    return {what: why for what, why in report.check_report(path) if why}


# -- the examples ---------------------------------------------------------------------------------


def test_the_first_example_is_in_order():
    """All parts are there, and every row of its tables follows from its runs."""
    assert failing(REPORTS / "a/report.md") == {}
    assert len(report.rows(text_of("a"))) == 15


def test_the_verdict_of_the_first_example_is_its_rules():
    """Above .05 it would hold, below .05 not; the interval has .05 inside. The differences and the
    seeds of each sign are those of the runs."""
    accuracy = {arm: figures["accuracy"] for arm, figures in runs("a").items()}
    effect = common.difference(accuracy[GRPO], accuracy[SFT + "1e-3"])
    assert common.compared(effect, 0.05) == "unclear"
    verdict = report.sections(text_of("a"))["Verdict"]
    assert verdict.startswith("Cannot be told at this scale: the interval, -.102 to .072,")
    each = [x - y for x, y in zip(accuracy[GRPO], accuracy[SFT + "1e-3"])]
    shown = ", ".join(f"{x:+.3f}".replace("0.", ".") for x in each)
    assert f"Seed by seed the difference is {shown}." in " ".join(text_of("a").split())
    assert [x < 0 for x in each] == [True] * 3 + [False] * 2
    sweep = {arm: sum(f["accuracy"]) / 2 for arm, f in runs("a", "sweep.json").items()}
    assert max(sweep, key=sweep.get) == SFT + "1e-3"
    assert max((arm for arm in sweep if arm[0] == "g"), key=sweep.get) == GRPO
    assert f"{sweep[SFT + '1e-3'] - sweep[GRPO]:.3f}" == "0.072"
    assert f"{-effect['mean']:.3f}" == "0.015"
    spread = (effect["high"] - effect["mean"]) * math.sqrt(5) / common.T[3]
    assert round(spread, 2) == 0.07 and round(common.T[8] * spread / math.sqrt(10), 2) == 0.05
    before = runs("a")[GRPO]["before"]
    assert {f"{x:.3f}" for x in before} == {"0.480"}
    trained = [sum(runs("a")[arm]["trained"]) for arm in (GRPO, SFT + "1e-3")]
    assert round(trained[0] / trained[1]) == 6


def test_the_second_example_misleads_with_real_figures():
    """One seed; its interval is over answers, and that is what check.py says; its overall score is
    a mean of means."""
    assert [what.split("` ")[-1] for what in failing(REPORTS / "b/report.md")] == [
        "accuracy", "a difference of two arms with its interval, over three seeds or more"]
    found = runs("b")
    p, q = (found[arm]["accuracy"][0] for arm in (GRPO, SFT + "3e-3"))
    half = 1.96 * math.sqrt((p * (1 - p) + q * (1 - q)) / 4096)
    assert f"| {p - q:.3f} | {p - q - half:.3f} to {p - q + half:.3f} |".replace("0.", ".") in (
        text_of("b"))
    overall = [sum(found[arm][name][0] for name in ("accuracy", "greedy", "pass@16", "ood")) / 4
               for arm in (GRPO, SFT + "3e-3")]
    said = ("The overall score, the mean of the four, is {:.3f} for GRPO and {:.3f} for SFT: a "
            "lead of {:.3f}.").format(*overall, overall[0] - overall[1]).replace("0.", ".")
    assert said in " ".join(text_of("b").split())


def planned(command):
    """The arms of a command of compare.py."""
    words = shlex.split(command)
    first = next(i for i, word in enumerate(words) if word.startswith("--"))
    flags, own = words[first:], {"--seeds": "1", "--seed": "0", "--out_dir": ""}
    for flag in own:
        if flag in flags:
            at = flags.index(flag)
            own[flag] = flags[at + 1]
            del flags[at:at + 2]
    return compare.plan(words[:first], flags, int(own["--seed"]), int(own["--seeds"]))


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_commands_of_an_example_make_its_runs(name):
    """The arms, the values, the seeds and the settings that its JSON files have."""
    commands = re.findall(r"^python compare\.py (.*)$", text_of(name), re.M)
    files = ["sweep.json", "compare.json"][-len(commands):]
    for command, file in zip(commands, files):
        made = json.loads((REPORTS / name / file).read_text())
        assert [(arm.variant, arm.seed, arm.stages[0].config.out_dir,
                 arm.stages[0].config.max_steps) for arm in planned(command)] == [
            (run["variant"], run["seed"], run["folder"], run["steps"]) for run in made]


def test_the_notes_quote_figures_of_the_examples():
    """Every figure like .581 of the instructor's notes is one of the runs', or of the interval's
    formula."""
    notes = (ROOT / "assignments/instructor/8.md").read_text()
    known = {f"{sum(f['accuracy']) / len(f['accuracy']):.3f}" for name, file in (
        ("a", "sweep.json"), ("a", "compare.json"), ("b", "compare.json"))
        for f in runs(name, file).values()}
    accuracy = {arm: figures["accuracy"] for arm, figures in runs("a").items()}
    known |= {f"{abs(x - y):.3f}" for x, y in zip(accuracy[GRPO], accuracy[SFT + "1e-3"])}
    widths = [common.T[n - 2] / math.sqrt(n) for n in (3, 5, 10)]
    known |= {f"{w:.2f}" for w in widths} | {f"{0.07 * widths[1]:.3f}", "0.05", "0.07", "0.1"}
    quoted = re.findall(r"(?<![\w.])(\d*\.\d+)\b", notes)
    assert len(quoted) > 12 and {"0" * (q[0] == ".") + q for q in quoted} <= known
    assert f"{runs('b')[GRPO]['sampled'][0]:,}" in notes


def test_the_commands_of_the_handout_are_taken():
    """A sweep and the figures, on other seeds."""
    text = (ROOT / "assignments/handouts/8.md").read_text()
    sweep, figures = map(planned, re.findall(r"^python compare\.py (.*)$", text, re.M))
    assert not {arm.seed for arm in sweep} & {arm.seed for arm in figures}
    assert {arm.variant for arm in figures} <= {arm.variant for arm in sweep}
    for name in ("handouts/8.md", "instructor/8.md", "reports/template.md"):
        lines = (ROOT / f"assignments/{name}").read_text().splitlines()
        assert max(map(len, lines)) <= 100


# -- what checks a report -------------------------------------------------------------------------


def test_rows_and_figures():
    """A row belongs to the file named last before it; figures agree as they are rounded."""
    text = ("From `sweep.json`:\n\n| `a:x=1\\|2` | b |\n|---|---|\n| words | c |\n\n"
            "Then `compare.json`.\n| `d` - `e` | f |\n<!-- | `g` | h | -->\n")
    assert report.rows(text) == [("sweep.json", ["`a:x=1|2`", "b"]),
                                 ("compare.json", ["`d` - `e`", "f"])]
    assert report.agrees(".814", 0.8144) and not report.agrees(".814", 0.8146)
    assert report.agrees("-.02", -0.0151) and report.agrees("186,296", 186296.2)
    assert not report.agrees("about .8", 0.8)


def test_a_difference_is_paired():
    """Over the same seeds, in whatever order the runs stand; of two arms, with a minus, that are
    there; and runs that are none say so."""
    made = json.loads((REPORTS / "a/compare.json").read_text())
    words = [f"`{GRPO}`", f"`{SFT}1e-3`"]
    effect = report.effect(" - ".join(words), "accuracy", made[::-1])
    assert effect == report.effect(" minus ".join(words), "accuracy", made)
    assert effect["n"] == 5 and f"{effect['mean']:.3f}" == "-0.015"
    for cell, figure, some, why in ((" - ".join(words), "accuracy", made[1:], "have other seeds"),
                                    (" + ".join(words), "accuracy", made, "with a minus between"),
                                    (words[0], "kept", made, "there is no figure 'kept'")):
        with pytest.raises(ValueError, match=why):
            report.effect(cell, figure, some)
    row = [words[0], "accuracy", "5", ".799", "-"]
    assert report.row_is_wrong(row, made) is None
    assert report.row_is_wrong(row, {"arms": 1}) == "the file is none of compare.py's"
    assert "five cells" in report.row_is_wrong(row[:3], made)


@pytest.mark.parametrize("old, new, why", [
    ("| 5 | .814 | .758 to .870 |", "| 5 | .824 | .758 to .870 |", "mean .824 in the report, 0.81"),
    ("| 5 | .814 | .758 to .870 |", "| 3 | .814 | .758 to .870 |", "3 seeds in the report, 5 in"),
    ("| -.102 to .072 |", "| -.102 to .062 |", "interval -.102 to .062 in the report"),
    ("` | ood |", "` | generalisation |", "there is no figure 'generalisation'"),
    ("`compare.json`", "`runs.json`", "there is no runs.json"),
    ("learning_rate=3e-4` | sampled", "learning_rate=3e-5` | sampled", "there is no run of grpo"),
    ("## What failed", "## Whatever", "missing or empty"),
    ("Cannot be told at this scale: the", "Promising: the", "begin with one of"),
    ("- does not hold here: the whole interval lies below .05\n- cannot be told at this scale: any "
     "other case\n", "", "for the other outcomes"),
    ("python compare.py", "python my.py", "with its arms is needed")])
def test_what_is_wrong_with_a_report_is_found(old, new, why, tmp_path):
    """A figure that is not the runs', a part that is missing, a rule that nothing can break."""
    for file in ("compare.json", "sweep.json"):
        (tmp_path / file).write_text((REPORTS / "a" / file).read_text())
    assert old in text_of("a")
    (tmp_path / "report.md").write_text(text_of("a").replace(old, new))
    assert any(why in reason for reason in failing(tmp_path / "report.md").values())


def test_the_template_has_all_parts_and_nothing_in_them():
    """Each heading is there; none counts before something stands under it."""
    text = (REPORTS / "template.md").read_text()
    assert list(report.sections(text)) == list(report.PARTS)
    assert len(failing(REPORTS / "template.md")) >= 12
    assert "commands that repeat the runs" in failing(REPORTS / "template.md")


def test_the_rubric_adds_up():
    """To 100 points."""
    text = (REPORTS / "rubric.md").read_text()
    points = [int(p) for p in re.findall(r"^\| (\d+) \|", text, re.M)]
    assert sum(points) == 100 and len(points) == 7


# -- the copy -------------------------------------------------------------------------------------


def test_the_copy_is_whole(tmp_path):
    """Nothing is cut; template, rubric, examples and check.py are there; check.py runs in it; and
    nothing tells which example is which."""
    make.make(table.assignment(8), tmp_path / "copy")
    files = make.copy_of(table.assignment(8))
    assert {path: files[path] for path in make.read()} == make.read()
    assert {"report.md", "RUBRIC.md", "README.md", "PROJECT.md", "experiments/common.py",
            "examples/a/compare.json", "examples/b/report.md"} <= set(files)
    assert not [path for path in files if "instructor" in path or "hidden" in path]
    notes = (ROOT / "assignments/instructor/8.md").read_text().splitlines()
    everything = "\n".join(files.values())
    assert not [line for line in notes if len(line) > 60 and line in everything]
    done = subprocess.run([sys.executable, "check.py", "examples/a/report.md"], text=True,
                          cwd=tmp_path / "copy", capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.endswith("29 of 29. The points are given by hand: RUBRIC.md.\n")
    for path in ("README.md", "PROJECT.md", "RESULTS.md", "SURVEY.md", "RUBRIC.md"):
        links = [link for link in re.findall(r"\]\(([^)]+)\)", files[path])
                 if not link.startswith("http")]
        assert [link for link in links if link not in files] == [], path


def test_grading_it_says_that_people_do():
    """In one line."""
    with pytest.raises(InputError, match="8 is graded by hand, with the rubric in") as error:
        main(["grade", "8", "."])
    assert "\n" not in str(error.value)
