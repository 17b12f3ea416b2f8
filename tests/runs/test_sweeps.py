"""
compare.py with several values for a flag, `grpo:beta=0|1`: a run for each, of which the table shows
the best and hides none. The numbers are written by hand.
"""

import json
import os

import compare
from conftest import TASK
from harness import report
from runs_helpers import summary
from test_chains import own_folder  # noqa: F401 (a fixture)
from test_pictures import compared, pyplot, write_metrics  # noqa: F401


def result(variant, seed, value, sweep=None, measure="eval/accuracy", **costs):
    """As much of a row of compare.json as the table needs."""
    row = {"variant": variant, "seed": seed, "before": {measure: 0.25}, "after": {measure: value},
           "updates": 60, **costs}
    return {**row, "sweep": sweep} if sweep else row


def table(results):
    """The cells of the table, and the lines below it."""
    text = report.comparison(results)
    head, below = text.split(report.COSTS)
    return [row.split() for row in head.splitlines()], below.strip("\n").splitlines()


BETA = "grpo:beta=0|1|2"
RUNS = [result("grpo:beta=0", 0, 0.5, BETA), result("grpo:beta=0", 1, 0.75, BETA),
        result("grpo:beta=1", 0, 0.875, BETA), result("grpo:beta=1", 1, 0.5, BETA),
        result("grpo:beta=2", 0, 0.9, BETA), result("grpo:beta=2", 1, 0.25, BETA)]


def test_the_values_of_a_word():
    """Every combination, in the order of the word: the last flag changes fastest."""
    assert compare.values("grpo") == ["grpo"]
    assert compare.values("sft:data=a=b>grpo:beta=1") == ["sft:data=a=b>grpo:beta=1"]
    assert compare.values("sft:a=1|2:b=x>grpo:c=3|4|5") == [
        "sft:a=1:b=x>grpo:c=3", "sft:a=1:b=x>grpo:c=4", "sft:a=1:b=x>grpo:c=5",
        "sft:a=2:b=x>grpo:c=3", "sft:a=2:b=x>grpo:c=4", "sft:a=2:b=x>grpo:c=5"]


def test_the_plan_of_a_sweep():
    """One run a value and seed; the common first stage of a chain is shared, and so is that of the
    plain arm."""
    word = "sft>grpo:beta=0|0.5"
    arms = compare.plan(["sft", word], [], 3, 2)
    assert [(arm.word, arm.variant, arm.seed) for arm in arms] == [
        ("sft", "sft", 3), ("sft", "sft", 4), (word, "sft>grpo:beta=0", 3),
        (word, "sft>grpo:beta=0", 4), (word, "sft>grpo:beta=0.5", 3),
        (word, "sft>grpo:beta=0.5", 4)]
    assert [arm.stages[-1].config.beta for arm in arms[2:]] == [0, 0, 0.5, 0.5]
    made = {stage.config.out_dir for arm in arms for stage in arm.stages}
    assert len(made) == 2 + 4


def test_the_best_mean_over_seeds_stands_in_the_table():
    """Means .625, .6875 and .575: the second value's row, although the third had the best single
    run; the line below has all three."""
    rows, below = table([result("sft", 0, 0.6), *RUNS])
    assert [row[0] for row in rows[1:]] == ["base", "sft", "grpo:beta=1"]
    assert rows[3][1:3] == ["0.688", "+-0.188"]
    assert below == [f"{BETA}: held-out accuracy beta=0 0.625, beta=1 0.688, beta=2 0.575"]


def test_the_lowest_nll_is_best():
    """Where nothing has an answer; several flags of several stages are all named."""
    word = "sft:alpha=1|2:data=x>dft:beta=3|4"
    runs = [result(f"sft:alpha={a}:data=x>dft:beta={b}", 0, value, word, "eval/loss")
            for a, b, value in ((1, 3, 2.0), (1, 4, 1.5), (2, 3, 1.25), (2, 4, 1.75))]
    rows, below = table(runs)
    assert [row[0] for row in rows[1:]] == ["base", "sft:alpha=2:data=x>dft:beta=3"]
    assert rows[2][1] == "1.250"
    assert below == [f"{word}: held-out nll alpha=1 beta=3 2.000, alpha=1 beta=4 1.500, "
                     "alpha=2 beta=3 1.250, alpha=2 beta=4 1.750"]


def test_equals_and_what_was_not_judged():
    """Of equal values the first stands in the table; so it does where nothing was held out, which
    the line below says."""
    tie = [result(f"grpo:beta={b}", 0, 0.5, "grpo:beta=7|8") for b in (7, 8)]
    assert table(tie)[0][2][0] == "grpo:beta=7"
    for row in tie:
        row["after"] = {}
    rows, below = table(tie)
    assert rows[2][0] == "grpo:beta=7"
    assert below == ["grpo:beta=7|8: nothing held out to judge by"]


def test_two_swept_arms_are_chosen_apart():
    """Each arm has its row and its line; an arm with one value has no line."""
    other = [result(f"dft:alpha={a}", 0, a, "dft:alpha=0.1|0.2") for a in (0.1, 0.2)]
    rows, below = table([*RUNS, result("sft", 0, 0.9), *other])
    assert [row[0] for row in rows[1:]] == ["base", "grpo:beta=1", "sft", "dft:alpha=0.2"]
    assert [line.split(": ")[0] for line in below] == [BETA, "dft:alpha=0.1|0.2"]


def test_a_picture_shows_the_chosen_values(tmp_path, pyplot):  # noqa: F811
    """One curve for a swept arm, that of its row in the table."""
    runs = [{**compared(tmp_path, f"grpo:beta={b}", 0, (0, 0, 0.25), (5, 50, end)),
             "sweep": "grpo:beta=0|1"} for b, end in ((0, 0.5), (1, 0.75))]
    report.plot_comparison(tmp_path, runs)
    for axis in pyplot.axes:
        [(_, y, options)] = axis.told("plot")
        assert y == [0.25, 0.75] and options["label"] == "grpo:beta=1"


def test_the_curve_of_a_chain(tmp_path, pyplot):  # noqa: F811
    """Its stages one after the other: updates and tokens go on from where the last stage ended; the
    start of a stage, which is the end of the one before, is not drawn twice."""
    def stage(name, *points):
        write_metrics(tmp_path / name, *(
            {"updates": u, "sampled_tokens": n, **({"eval/accuracy": y} if y else {})}
            for u, n, y in points))
        return str(tmp_path / name)
    folders = [stage("a", (0, 0, 0.125), (10, 0, 0.25)),
               stage("b", (0, 0, 0.25), (1, 50, None), (4, 100, 0.5), (8, 200, 0.625)),
               stage("c", (0, 0, 0.625), (3, 7, 0.75))]
    row = {**result("sft>grpo>dpo", 0, 0.75), "folder": folders[-1], "stages": folders}
    plain = {**result("grpo", 0, 0.625), "folder": folders[1]}
    assert report.plot_comparison(tmp_path, [row, plain]) == "compare.png"
    drawn = [[(x, y) for x, y, _ in axis.told("plot")] for axis in pyplot.axes]
    curve = [0.125, 0.25, 0.5, 0.625, 0.75]
    assert drawn == [[([0, 10, 14, 18, 21], curve), ([0, 4, 8], [0.25, 0.5, 0.625])],
                     [([0, 0, 100, 200, 207], curve), ([0, 100, 200], [0.25, 0.5, 0.625])]]


def test_a_sweep_is_run(tiny_base, in_process, capsys):  # noqa: F811
    """From the command line to compare.json, which holds every run."""
    word = "sft:learning_rate=1e-9|0.1>dft"
    assert compare.main([word, *map(str, TASK), "--max_steps", "2", "--batch_size", "4",
                         "--init_from", str(tiny_base)]) == 0
    assert len(in_process) == 4
    with open("out/chain-compare/compare.json") as file:
        rows = json.load(file)
    assert [row["variant"] for row in rows] == ["sft:learning_rate=1e-9>dft",
                                                "sft:learning_rate=0.1>dft"]
    assert {row["sweep"] for row in rows} == {word}
    assert all(os.path.isdir(folder) and summary(folder) for r in rows for folder in r["stages"])
    assert report.comparison(rows) in capsys.readouterr().out
