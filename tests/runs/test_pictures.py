"""
What is drawn of a run and of a comparison, number by number, on a stand-in for pyplot that records
what it is told to draw, so that these tests need no matplotlib.
"""

import json
import os
import sys
from types import ModuleType

import pytest

from harness import report


def result(variant="sft", seed=0, after=None):
    """As much of a run's summary as a picture needs."""
    return {"variant": variant, "seed": seed, "before": {}, "after": after or {}, "steps": 7,
            "seconds": 8.6}


class Recorder:
    """Takes any call and keeps it: (name, arguments, options)."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, args, options))

    def get_legend_handles_labels(self):
        labels = [options["label"] for *_, options in self.told("plot")]
        return labels, labels

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
    not to a screen. Where pyplot is there already, in a notebook, its screen is left to it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.pyplot() is None
    matplotlib, used = ModuleType("matplotlib"), []
    matplotlib.pyplot = ModuleType("matplotlib.pyplot")

    def use(name):
        used.append(name)
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", matplotlib.pyplot)
    matplotlib.use = use
    monkeypatch.setitem(sys.modules, "matplotlib", matplotlib)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    for _ in range(2):
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
    assert not by_updates.told("axhline")
    [(_, labels, options)] = pyplot.figure.told("legend")          # below the curves
    assert labels == ["sft", "grpo"] and options["bbox_to_anchor"] == (0.5, 0)
    assert [axis.told("set_xlabel")[0][0] for axis in pyplot.axes] == ["updates", "sampled tokens"]
    assert by_updates.told("set_ylabel") == [("held-out accuracy", {})]
    assert by_tokens.told("set_title")[0][0] == "dotted: samples nothing"
    assert pyplot.options["sharey"] is True and all(axis.told("grid") for axis in pyplot.axes)
    assert pyplot.figure.told("tight_layout") and pyplot.told("close") == [(pyplot.figure, {})]
    assert pyplot.figure.told("savefig") == [(os.path.join(tmp_path, "compare.png"),
                                              {"dpi": 120, "bbox_inches": "tight"})]


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
