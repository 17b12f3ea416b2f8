"""
For the tests of experiments: a made-up experiment, and two fixtures that stand in for its runs.
(tests/conftest.py makes the fixtures known.)
"""

import contextlib
import io
import json
import os
import random
from types import SimpleNamespace

import common
import compare
import pytest
import train
from conftest import ROOT, TASK
from harness import report

# The experiments whose arms are runs.
NAMES = [path.stem for path in sorted((ROOT / "experiments").glob("*.py"))
         if "common.start(" in path.read_text()]
TINY = (*TASK, "--max_steps", "2", "--batch_size", "4", "--logging_steps", "1", "--eval_steps", "2")
ARMS = {"SFT": "sft:learning_rate=1e-4|1e-3|1e-2", "DFT": "dft:learning_rate=1e-3|1e-2",
        "plain": "dft:alpha=0.3"}
RESULT = "experiments/results/made_up.json"


def around(mean, width=0.01):
    """Five seeds about a mean, +-width; a list of figures stays as it is."""
    if isinstance(mean, list):
        return mean
    return [mean + width * shift for shift in (-1, -0.5, 0, 0.5, 1)]


def scattered(mean, width=0.1):
    """Five seeds that do not agree, and not in the order of `around`."""
    return [mean + width * shift for shift in (3, -3, 1, -2, 1)]


def first_seed(figures):
    """What one seed gives."""
    return {arm: {name: values[:1] for name, values in found.items()}
            for arm, found in figures.items()}


def experiment(tiny_base, **changes):
    """A module like that of a script, whose rule is the difference of two arms."""
    def verdict(figures):
        gap = common.difference(figures["SFT"]["accuracy"], figures["DFT"]["accuracy"])
        return common.HOLDS, {"SFT - DFT": gap}

    def draw(plt, figures):
        figure, axis = plt.subplots(figsize=(2, 2))
        common.draw_means(axis, [0, 1], [figures[arm]["KL"] for arm in ("SFT", "DFT")], "a", "C0")
        return figure
    settings = dict(__doc__="Claim", __file__="experiments/made_up.py", ARMS=ARMS,
                    FLAGS=[*map(str, TINY), "--init_from", str(tiny_base)],
                    QUICK_ARMS=ARMS, QUICK_FLAGS=["--max_steps", "1"], SWEEP_SEEDS=2,
                    verdict=verdict, draw=draw)
    return SimpleNamespace(**{**settings, **changes})


def accuracy(folder):
    """A made-up accuracy for each run. Learning rates matter: 1e-3 is the best for SFT on the
    sweep's seeds, 1e-2 on the others."""
    name = os.path.basename(folder)
    seed = int(name.split("-")[-1])
    value = random.Random(name).random() / 10
    best = "1e-3" if seed >= common.SWEEP_SEED else "1e-2"
    return value + (0.5 if best in name else 0.0)


@pytest.fixture
def made_up(monkeypatch):
    """Runs that take no time and answer as `accuracy` says. -> the folders, in order"""
    folders = []

    def run_one(stage, stopped):
        folder = stage.config.out_dir
        folders.append(folder)
        after = {"eval/accuracy": accuracy(folder), "eval/kl": 2.0}
        return {"algo": stage.config.algo, "task": "chain", "seed": stage.config.seed, "steps": 2,
                "updates": 2, "sampled_tokens": 7, "trained_tokens": 40, "seconds": 1.5,
                "train_seconds": 1.0, "eval_seconds": 0.5, "peak_memory_mb": None,
                "before": {"eval/accuracy": 0.1}, "after": after}
    monkeypatch.setattr(compare, "run_one", run_one)
    return folders


@pytest.fixture
def in_process(monkeypatch):
    """The runs of a comparison happen in this process. -> their commands"""
    commands = []

    def start(command, stdout, stderr, text):
        commands.append(command[2:])
        with contextlib.redirect_stdout(io.StringIO()):
            return SimpleNamespace(returncode=train.main(command[2:]), stderr="")
    monkeypatch.setattr(compare.subprocess, "run", start)
    monkeypatch.setattr(report, "plot", lambda folder: "")   # the runs' own pictures take long
    return commands


def read(path=RESULT):
    with open(path) as file:
        return json.load(file)
