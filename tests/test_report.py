"""
What a run prints and draws: lines, tables and pictures compared, character by character or number
by number, with what the same figures give by hand. Pictures are checked on a stand-in for pyplot
that records what it is told to draw, so that these tests need no matplotlib.
"""

import json
import os
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import data
import report
from test_evaluation import DRAWS, Policy, Task, Tokens, args_of


# -- lines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (59.9, "0:59"), (60, "1:00"), (75, "1:15"), (3725, "62:05")])
def test_duration(seconds, text):
    """Minutes and whole seconds, the seconds in two digits."""
    assert report.duration(seconds) == text


def test_the_console_keeps_its_columns(capsys):
    """A heading once, from the first line, in the order of COLUMNS; a number that is missing later
    leaves a gap, one that is new is not shown; every cell is as wide as its heading and at least
    6."""
    console = report.Console()
    console.print({"loss": 0.25, "step": 5, "reward": 0.5, "mystery": 1, "policy/approxkl": 0.0004,
                   "clip_ratio": 0.1239}, 75)
    console.print({"step": 10, "loss": -1.5, "eval/kl": 3.0, "tokens_per_second/train": 54321.6,
                   "clip_ratio": 0.0}, 0)
    assert capsys.readouterr().out.splitlines() == [
        "  step  reward    loss   moved  clipped    left",
        "     5   0.500  +0.250   0.000    0.124    1:15",
        "    10          -1.500            0.000    0:00"]


def test_every_column_has_its_digits(capsys):
    """1234.5678 as each column writes it; losses and rewards of answers with a sign."""
    titles = {name: title for name, title, _ in report.COLUMNS}
    report.Console().print({**dict.fromkeys(titles, 1234.5678), "step": 7}, 61)
    heading, cells = capsys.readouterr().out.splitlines()
    assert heading == "  ".join(f"{title:>{max(len(title), 6)}}" for title in titles.values())
    found = dict(zip(titles.values(), cells.split()))
    assert {found.pop("step"), found.pop("left")} == {"7", "1:01"}
    assert {text: " ".join(t for t in found if found[t] == text) for text in found.values()} == {
        "1234.568": "reward true nll accuracy value loss moved heldout pairs heldout heldout nll "
                    "entropy clipped",
        "+1234.568": "loss", "+1234.57": "chosen rejected",
        "1234.57": "weight unweighed kept margin skipped worked KL grad ratio flat",
        "1234.6": "length", "1,235": "sample/s train/s"}


def test_columns_stand_under_their_metric():
    """What each heading shows."""
    shown = {title: name for name, title, _ in report.COLUMNS}
    assert shown == {
        "step": "step", "reward": "reward", "true": "true_reward", "loss": "loss", "nll": "nll",
        "weight": "mean_weight", "unweighed": "frac_weight_near_zero", "kept": "kept",
        "chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins",
        "skipped": "skipped_pairs", "accuracy": "accuracy", "value loss": "loss/value",
        "moved": "policy/approxkl", "heldout pairs": "eval/pair_accuracy",
        "heldout": "eval/accuracy", "heldout nll": "eval/loss", "worked": "eval/worked",
        "length": "completions/mean_length",
        "KL": "eval/kl", "entropy": "entropy", "grad": "grad_norm", "ratio": "max_ratio",
        "clipped": "clip_ratio", "flat": "frac_reward_zero_std", "left": "left",
        "sample/s": "tokens_per_second/sample", "train/s": "tokens_per_second/train"}


def test_opening():
    """Algorithm, task, size, machine, steps, folder; the legend of held-out figures, but not for a
    reward model, which is judged otherwise; and the algorithm's own."""
    algo = SimpleNamespace(model=SimpleNamespace(num_parameters=lambda: 1234567), legend="its own")
    args = args_of(algo="sft", max_steps=20, batch_size=8, out_dir="out/x")
    first = "\nsft on table: 1,234,567 parameters, cpu, float32, 20 steps of 8, into out/x\n"
    assert report.opening(args, algo, Task()) == first + report.LEGEND + "\nits own"
    algo.evaluate = None
    assert report.opening(args, algo, Task()) == first + "its own"


@pytest.mark.parametrize("after, text", [
    ({}, ""),
    ({"eval/accuracy": 0.4736}, ": held-out accuracy 0.474"),
    ({"eval/accuracy": 0.5, "eval/worked": 0.304, "eval/accuracy_when_worked": 0.956},
     ": held-out accuracy 0.500; worked steps in 30% of its answers, right 96% of the time"),
    ({"eval/pair_accuracy": 0.8154, "eval/pairs": 130},
     ": right about 81.5% of 130 held-out pairs")])
def test_shared_line(after, text):
    """What is said of a base model, or a reward model, that has just been made."""
    line = report.shared_line("Base model", {"after": after, "seconds": 62.4}, "out/b")
    assert line == f"Base model: out/b, made in 1:02{text}"


def test_sample_and_print(capsys):
    """--sample: the greedy answer, then four sampled ones, with the run's seed and flags; dots
    where it was cut off."""
    policy = Policy("pi", {"rrr": ["101", "0", "", "1"]})
    args = args_of(sample="rrr", seed=5, top_k=2, top_p=0.5)
    report.sample_and_print(args, policy, Tokens(), Task())
    assert capsys.readouterr().out.splitlines() == [
        "greedy   rrr1", "sampled  rrr101 ...", "sampled  rrr0", "sampled  rrr", "sampled  rrr1"]
    asked = [call[:6] for call in policy.calls]
    assert asked == [(["rrr"], 1, 0, 2, 0.5, 5), (["rrr"], 4, 1.0, 2, 0.5, 5)]


# -- tables ----------------------------------------------------------------------------------------


def test_pass_at_k_by_hand():
    """Of 4 answers 2 are right: one drawn is right with 1/2, of two at least one with 5/6, of three
    always; a mean over problems. A reward of at most .5 is not right."""
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    found = [report.pass_at_k(rewards, k) for k in (1, 2, 3, 4)]
    assert found == pytest.approx([1 / 4, 5 / 12, 1 / 2, 1 / 2])


def test_table():
    """A row for each figure that any column has, three digits, `-` where a column lacks it; chance
    beside pass@k alone."""
    before = {"eval/accuracy": 0.25, "eval/pass@4": 0.5, "eval/kl": 0.0}
    after = {"eval/accuracy": 0.98765, "eval/pass@16": 1.0, "eval/mystery": 1,
             "eval/ood_accuracy": 0.5, "eval/worked": 0.75}
    text = report.table([("before", before), ("after", after)], data.Chain())
    assert text.splitlines() == ["held-out problems        before    after   chance",
                                 "accuracy, sampled         0.250    0.988    0.100",
                                 "pass@4                    0.500        -    0.344",
                                 "pass@16                       -    1.000    0.815",
                                 "out of distribution           -    0.500    0.100",
                                 "worked steps                  -    0.750         ",
                                 "KL to the start           0.000        -         "]


def test_table_names_every_figure():
    """Every eval/... figure has its own row."""
    titles = {"accuracy": "accuracy, sampled", "greedy_accuracy": "accuracy, greedy",
              "pass@4": "pass@4", "pass@16": "pass@16", "ood_accuracy": "out of distribution",
              "pair_accuracy": "pairs ranked right", "worked": "worked steps",
              "accuracy_when_worked": "right when worked", "mean_length": "completion length",
              "loss": "held-out nll", "kl": "KL to the start"}
    values = {f"eval/{name}": i / 100 for i, name in enumerate(titles)}
    rows = report.table([("now", values)], SimpleNamespace(chance=lambda k: None)).splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == list(titles.values())
    assert [float(row.split()[-1]) for row in rows] == pytest.approx(list(values.values()))


def test_table_of_nothing():
    """Where nothing was held out the table says so."""
    assert report.table([("now", {})], data.Chain()) == "nothing held out to judge by"


SUMMARY = {"before": {"eval/accuracy": 0.5}, "after": {"eval/accuracy": 1.0}, "steps": 20,
           "seconds": 75, "eval_seconds": 9, "pretrain_seconds": 130, "sampled_tokens": 12345,
           "trained_tokens": 678}
COSTS = "20 steps in 1:15, 0:09 of it evaluation{}; 12,345 tokens sampled, 678 trained on"
RATIO = "       python train.py --algo grpo --num_iterations 2{}      # see the ratio move"


def finish(capsys, monkeypatch, summary=SUMMARY, ref=True, world=None, **flags):
    """-> the lines that the end of a run prints. The trained model gets qq right and p wrong, the
    start model the other way round."""
    monkeypatch.setattr(report, "plot", lambda out_dir: f"picture of {out_dir}")
    after = Policy("pi", {**DRAWS, "p": ["000"], "qq": ["10"], "rrr": ["0"]})
    algo = SimpleNamespace(task=world or Task(), networks={"model": after}, tokenizer=Tokens(),
                           frozen={"ref_model": Policy("ref")} if ref else {})
    algo.task.chance = lambda k: None
    defaults = {"algo": "grpo", "task": "chain", "data": None, "out_dir": "out/x"}
    report.finish(args_of(**{**defaults, **flags}), summary, algo)
    return capsys.readouterr().out.splitlines()


def test_finish(capsys, monkeypatch):
    """Table, the first three held-out problems answered before and after and judged, costs, files,
    what to try next."""
    assert finish(capsys, monkeypatch) == [
        "",
        "held-out problems        before    after   chance",
        "accuracy, sampled         0.500    1.000         ",
        "",
        "problem (sampled answers)  before       after",
        "p                          1        ok  000  x",
        "qq                         0        x   10  ok",
        "rrr                        101      x   0  ok",
        "",
        COSTS.format(", after 2:10 of pre-training"),
        "files: out/x/ckpt.pt, metrics.jsonl, summary.json, picture of out/x",
        'next:  python train.py --init_from out/x --sample "p"',
        "       python train.py --algo sft", RATIO.format("")]


@pytest.mark.parametrize("flags, lines", [
    (dict(algo="pretrain"), ["next:  python train.py --algo grpo --init_from out/x"]),
    (dict(algo="rm"),
     ["next:  python train.py --algo ppo --reward model --reward_model out/x"]),
    (dict(algo="sft"), ['next:  python train.py --init_from out/x --sample "p"',
                        "       python train.py --algo grpo", RATIO.format("")]),
    (dict(task="countdown"),
     ['next:  python train.py --init_from out/x --task countdown --sample "p"',
      "       python train.py --algo sft --task countdown", RATIO.format(" --task countdown")]),
    (dict(data="my.jsonl", task="countdown"),
     ['next:  python train.py --init_from out/x --data my.jsonl --sample "p"',
      "       python train.py --algo sft --data my.jsonl", RATIO.format(" --data my.jsonl")]),
])
def test_what_to_try_next(capsys, monkeypatch, flags, lines):
    """Commands that fit what was run: its algorithm, task and data."""
    assert finish(capsys, monkeypatch, **flags)[-len(lines):] == lines


def test_finish_without_figures(capsys, monkeypatch, tmp_path):
    """A base model has no `before`; a file's held-out nll is no accuracy, so that no answers are
    shown; a base that was there already took no time; a file may hold texts, and may hold out
    nothing at all."""
    made = {**SUMMARY, "pretrain_seconds": 0.0}
    lines = finish(capsys, monkeypatch, made, ref=False, algo="pretrain")
    assert lines[:2] == ["", COSTS.format("")]
    judged = {**made, "before": {"eval/loss": 2.0}, "after": {"eval/loss": 1.0}}
    lines = finish(capsys, monkeypatch, judged)
    assert lines[2:5] == ["held-out nll              2.000    1.000         ", "", COSTS.format("")]
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    task = data.JsonLines(tmp_path / "texts.jsonl", tmp_path / "texts.jsonl")
    nothing = {**made, "before": {}, "after": {}}
    for task.test in (task.test, []):
        lines = finish(capsys, monkeypatch, nothing, world=task, algo="sft")
        assert lines[1] == COSTS.format("")
        assert lines[3] == 'next:  python train.py --init_from out/x --sample "text"'


# -- a comparison ----------------------------------------------------------------------------------


def result(variant="sft", seed=0, before=None, after=None, **costs):
    return {"variant": variant, "seed": seed, "before": before or {}, "after": after or {},
            "steps": 7, "seconds": 8.6, **costs}


@pytest.mark.parametrize("after, said", [
    ({"eval/accuracy": 0.98765, "eval/loss": 1.0}, "held-out accuracy 0.988"),
    ({"eval/loss": 1.23456}, "held-out nll 1.235"), ({}, "nothing held out to judge by")])
def test_result_line(after, said):
    """One line for each run of a comparison: accuracy, else nll, else that there is nothing."""
    line = report.result_line(result("dft:alpha=.5", 2, after=after))
    assert line == f"dft:alpha=.5, seed 2: {said}, 7 steps in 9 s"


def test_comparison_of_every_measure():
    """Each column shows its own figure: for the base that of the first run before it began, for a
    variant the mean over its seeds and, behind +-, half of largest minus smallest; what a run cost
    is a mean alone. In words: what MB contains."""
    judged = ["accuracy", "greedy_accuracy", "pass@16", "ood_accuracy", "loss", "kl", "mean_length"]
    costs = ["updates", "sampled_tokens", "trained_tokens", "train_seconds", "eval_seconds",
             "peak_memory_mb"]

    def run(variant, seed, shift):
        figures = {f"eval/{name}": i + shift for i, name in enumerate(judged)}
        return result(variant, seed, {k: v + 1 for k, v in figures.items()}, figures,
                      **{name: 1000 * i + 10 * shift for i, name in enumerate(costs)})
    table = report.comparison([run("b", 0, 0.0), run("a", 0, 0.2), run("b", 1, 0.4),
                               run("b", 2, 0.2), run("a", 1, 0.6)])
    rows = table.splitlines()[:4]
    assert [re.split(" {2,}", row.strip()) for row in rows] == [
        ["accuracy", "greedy", "pass@16", "ood", "nll", "KL", "length", "updates", "sampled",
         "trained", "train s", "eval s", "MB"],
        ["base", "1.000", "2.000", "3.000", "4.000", "5.000", "6.00", "7.0", *"------"],
        ["b", *(f"{i}.200 +-0.200" for i in range(5)), "5.20 +-0.20", "6.2 +-0.2",
         "2", "1,002", "2,002", "3002.0", "4002.0", "5002"],
        ["a", *(f"{i}.400 +-0.200" for i in range(5)), "5.40 +-0.20", "6.4 +-0.2",
         "4", "1,004", "2,004", "3004.0", "4004.0", "5004"]]
    assert len(set(map(len, rows))) == 1                                            # aligned:
    assert rows[2].startswith("b     0.200 +-0.200  1.200") and rows[2].endswith("  4002.0  5002")
    assert table.endswith("\n" + report.COSTS) and "with Python, torch and evaluation" in table


def test_comparison_of_what_was_not_judged():
    """Runs without a held-out figure: their costs alone, and a base that has none."""
    table = report.comparison([result(updates=5, peak_memory_mb=None), result(seed=1, updates=7)])
    rows = table.removesuffix(report.COSTS).splitlines()
    assert [row.split() for row in rows] == [["updates"], ["base", "-"], ["sft", "6"]]


@pytest.mark.parametrize("platform, used, cuda, expected", [
    ("linux", 2048, None, 2.0), ("darwin", 3 * 2**20, None, 3.0),
    ("linux", 2048, 5 * 2**20, 5.0), ("linux", 2048, 0, 2.0)])
def test_peak_memory(monkeypatch, platform, used, cuda, expected):
    """In MB: of the process, which Linux counts in KB and macOS in bytes; of the tensors on a GPU,
    if one was used."""
    resource = ModuleType("resource")
    resource.RUSAGE_SELF, resource.getrusage = 0, lambda who: SimpleNamespace(ru_maxrss=used)
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: cuda)
    assert report.peak_memory_mb() == expected
    monkeypatch.setitem(sys.modules, "resource", None)              # Windows
    assert report.peak_memory_mb() == (expected if cuda else None)


# -- pictures --------------------------------------------------------------------------------------


class Recorder:
    """Takes any call and keeps it: (name, arguments, options)."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, args, options))

    def told(self, name):
        return [(*args, options) for called, args, options in self.calls if called == name]


class Pyplot(Recorder):
    """A stand-in for matplotlib.pyplot: .axes are what was drawn on, .figure the sheet."""

    def subplots(self, rows, columns, squeeze=True, **options):
        assert rows == 1
        self.figure, self.axes = Recorder(), [Recorder() for _ in range(columns)]
        self.options = options
        return self.figure, self.axes if squeeze else [self.axes]


@pytest.fixture
def pyplot(monkeypatch):
    stand_in = Pyplot()
    monkeypatch.setattr(report, "pyplot", lambda: stand_in)
    return stand_in


def write_metrics(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_read_metrics(tmp_path):
    """The objects of the file in order; what a crash cut short, and all after it, is left out; no
    file, no lines."""
    path = tmp_path / "metrics.jsonl"
    assert report.read_metrics(path) == []
    path.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert report.read_metrics(path) == [{"step": 0}, {"step": 1}]


def test_pyplot_draws_to_files(monkeypatch):
    """Without matplotlib None; with it pyplot, told before anything else to draw to files (Agg),
    not to a screen."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.pyplot() is None
    matplotlib, used = ModuleType("matplotlib"), []
    matplotlib.use, matplotlib.pyplot = used.append, ModuleType("matplotlib.pyplot")
    monkeypatch.setitem(sys.modules, "matplotlib", matplotlib)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", matplotlib.pyplot)
    assert report.pyplot() is matplotlib.pyplot and used == ["Agg"]


def test_a_curve_shows_the_numbers_of_the_log(tmp_path, pyplot):
    """Each series that has at least two points, against its own steps, in its panel, under its
    name; accuracies from 0 to 1, the rest from 0; training reward dashed."""
    folder = write_metrics(
        tmp_path / "run", {"step": 0, "eval/accuracy": 0.1, "eval/kl": 0.0, "eval/loss": 3.0},
        {"step": 5, "reward": 0.2, "nll": 2.0, "entropy": 0.5, "eval/ood_accuracy": 0.3},
        {"step": 10, "reward": 0.4, "nll": 1.0, "entropy": 0.25, "eval/accuracy": 0.6,
         "eval/kl": 1.5, "completions/mean_length": 7})
    assert report.plot(folder) == "curve.png"
    drawn = [[(*points, options["label"], options["linestyle"])
              for *points, options in axis.told("plot")] for axis in pyplot.axes]
    assert drawn == [
        [((0, 10), (0.1, 0.6), "held-out, sampled", "-"),
         ((5, 10), (0.2, 0.4), "training reward", "--")],
        [((5, 10), (2.0, 1.0), "training nll", "-")],
        [((0, 10), (0.0, 1.5), "KL to the start", "-"), ((5, 10), (0.5, 0.25), "entropy", "-")]]
    labels = [(axis.told("set_ylabel"), axis.told("set_ylim")) for axis in pyplot.axes]
    assert labels == [([("accuracy", {})], [(0, 1, {})]), ([("loss", {})], [(0, None, {})]),
                      ([("nats", {})], [(0, None, {})])]
    for axis in pyplot.axes:
        assert axis.told("set_xlabel") == [("updates", {})]
        assert axis.told("legend") and axis.told("grid")
    assert pyplot.options["figsize"] == (pytest.approx(3 * 4.2), 3.4)
    assert pyplot.figure.told("tight_layout") and pyplot.told("close") == [(pyplot.figure, {})]
    assert pyplot.figure.told("savefig") == [(os.path.join(folder, "curve.png"), {"dpi": 120})]


def test_the_other_series_of_a_curve(tmp_path, pyplot):
    """Out of distribution, worked steps, held-out nll and length have their places too."""
    names = ("eval/ood_accuracy", "eval/worked", "eval/loss", "completions/mean_length")
    lines = [{"step": s, **{name: s + i for i, name in enumerate(names)}} for s in (0, 1)]
    report.plot(write_metrics(tmp_path / "run", *lines))
    drawn = [[(ys, options["label"]) for _, ys, options in axis.told("plot")]
             for axis in pyplot.axes]
    assert drawn == [[((0, 1), "out of distribution"), ((1, 2), "answers with worked steps")],
                     [((2, 3), "held-out nll")], [((3, 4), "completion length")]]


def test_no_curve(tmp_path, pyplot, monkeypatch):
    """Metrics too few for a line, or no matplotlib: nothing is drawn, and the reader is told."""
    folder = write_metrics(tmp_path / "run", {"step": 0, "eval/accuracy": 0.1}, {"step": 1})
    assert report.plot(folder) == "metrics too few for a picture" and not pyplot.calls
    monkeypatch.setattr(report, "pyplot", lambda: None)
    for said in (report.plot(folder), report.plot_comparison(folder, [result()])):
        assert said == "and for a picture of the curves: pip install matplotlib"


def compared(folder, variant, seed, *points, measure="eval/accuracy"):
    """A run of a comparison with evaluations at (updates, sampled tokens, accuracy), and lines
    without one between."""
    folder = folder / f"{variant}-{seed}"
    lines = []
    for updates, sampled, value in points:
        lines += [{"updates": updates, "sampled_tokens": sampled, measure: value}, {"updates": 1}]
    write_metrics(folder, *lines)
    return {**result(variant, seed, after={measure: points[-1][2]}), "folder": folder}


def test_a_comparison_shows_mean_and_range(tmp_path, pyplot):
    """Against updates and against sampled tokens: each variant's mean over seeds as a line,
    smallest to largest as a band, both in its own colour; what samples nothing is a dotted level in
    the second panel, at its last mean."""
    results = [compared(tmp_path, "sft", 0, (0, 0, 0.2), (10, 0, 0.8)),
               compared(tmp_path, "grpo", 0, (0, 0, 0.2), (4, 100, 0.4), (8, 200, 0.6)),
               compared(tmp_path, "sft", 1, (0, 0, 0.4), (10, 0, 0.9)),
               compared(tmp_path, "grpo", 1, (0, 0, 0.2), (6, 300, 0.8), (8, 200, 0.7))]
    assert report.plot_comparison(tmp_path, results) == "compare.png"
    by_updates, by_tokens = pyplot.axes

    def drawn(axis):
        lines = [(x, y, options["label"], options["color"]) for x, y, options in axis.told("plot")]
        bands = [(*band, options["color"]) for *band, options in axis.told("fill_between")]
        return lines, bands
    near = pytest.approx
    sft = ([0, 10], near([0.3, 0.85]), "sft", "C0"), ([0, 10], [0.2, 0.8], [0.4, 0.9], "C0")
    grpo = (near([0.2, 0.6, 0.65]), "grpo", "C1"), ([0.2, 0.4, 0.6], [0.2, 0.8, 0.7], "C1")
    x = [0, 5, 8], [0, 200, 200]                                  # means over the two seeds
    assert drawn(by_updates) == ([sft[0], (x[0], *grpo[0])], [sft[1], (x[0], *grpo[1])])
    assert drawn(by_tokens) == ([(x[1], *grpo[0])], [(x[1], *grpo[1])])
    [(level, options)] = by_tokens.told("axhline")
    assert level == near(0.85) and (options["color"], options["linestyle"]) == ("C0", ":")
    assert not by_updates.told("axhline") and len(by_updates.told("legend")) == 1
    assert [axis.told("set_xlabel")[0][0] for axis in pyplot.axes] == ["updates", "sampled tokens"]
    assert by_updates.told("set_ylabel") == [("held-out accuracy", {})]
    assert by_tokens.told("set_title")[0][0] == "dotted: samples nothing"
    assert pyplot.options["sharey"] is True and all(axis.told("grid") for axis in pyplot.axes)
    assert pyplot.figure.told("tight_layout") and pyplot.told("close") == [(pyplot.figure, {})]
    assert pyplot.figure.told("savefig") == [(os.path.join(tmp_path, "compare.png"), {"dpi": 120})]


def test_a_comparison_by_another_measure(tmp_path, pyplot):
    """Runs on a file without answers are drawn by their held-out nll; a variant without a log is
    left out; runs that nothing was held out for give no picture."""
    results = [compared(tmp_path, "sft", 0, (0, 0, 3.0), (10, 0, 1.0), measure="eval/loss"),
               {**result("dft", 0, after={"eval/loss": 1.0}), "folder": tmp_path / "nowhere"}]
    assert report.plot_comparison(tmp_path, results) == "compare.png"
    [(x, y, options)] = pyplot.axes[0].told("plot")
    assert (x, y, options["label"]) == ([0, 10], [3.0, 1.0], "sft")
    assert pyplot.axes[0].told("set_ylabel") == [("held-out nll", {})]
    pyplot.axes = None
    said = report.plot_comparison(tmp_path, [result()])
    assert said == "no picture: nothing held out to judge by" and pyplot.axes is None
