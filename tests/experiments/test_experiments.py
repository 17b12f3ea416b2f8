"""
How an experiment is run: the sweep and its choice, the figures, the results file, interruption and
flags. Most tests put made-up summaries in the place of runs; some train for two steps.
"""

import importlib
import json
import os
import platform
import re
import sys

import common
import pytest
import torch
from conftest import ROOT, TASK, script
from experiment_helpers import ARMS, NAMES, RESULT, accuracy, experiment, read
from harness import report
from runs_helpers import complaint, interrupted


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# -- figures --------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_runs(tiny_base, made_up, capsys):
    """Sweep on seeds 100 and 101, the best mean there stands for the arm although another value is
    better on the seeds that are shown; then seeds 0, 1 and 2. Per-seed figures, effect and interval
    are worked out here from what each run answered."""
    assert common.main(experiment(tiny_base), ["--seeds", "3"]) == 0
    sft, dft = "out/chain-sft-learning_rate-1e-3", "out/chain-dft-learning_rate-1e-3"
    assert made_up == [
        *[f"out/chain-{name}-{rate}-{seed}" for name, rates in
          (("sft-learning_rate", ("1e-4", "1e-3", "1e-2")), ("dft-learning_rate", ("1e-3", "1e-2")))
          for rate in rates for seed in (100, 101)],
        *[f"{name}-{seed}" for name in (sft, dft, "out/chain-dft-alpha-0.3")
          for seed in (0, 1, 2)]]
    found = read()
    arms = found["arms"]
    assert {arm: a["variant"] for arm, a in arms.items()} == {
        "SFT": "sft:learning_rate=1e-3", "DFT": "dft:learning_rate=1e-3", "plain": "dft:alpha=0.3"}
    a, b = ([accuracy(f"{name}-{seed}") for seed in (0, 1, 2)] for name in (sft, dft))
    assert (arms["SFT"]["figures"]["accuracy"], arms["DFT"]["figures"]["accuracy"]) == (a, b)
    assert arms["SFT"]["seeds"] == [0, 1, 2]
    assert arms["SFT"]["sweep"] == {
        f"sft:learning_rate={rate}": [accuracy(f"out/chain-sft-learning_rate-{rate}-{seed}")
                                      for seed in (100, 101)] for rate in ("1e-4", "1e-3", "1e-2")}
    assert arms["plain"]["sweep"] == {}
    gaps = [x - y for x, y in zip(a, b)]
    mean = sum(gaps) / 3
    half = 4.303 * (sum((g - mean) ** 2 for g in gaps) / 2 / 3) ** 0.5
    effect = found["effects"]["SFT - DFT"]
    assert (effect["mean"], effect["low"], effect["high"], effect["n"]) == pytest.approx(
        (mean, mean - half, mean + half, 3))
    out = capsys.readouterr().out
    assert f"SFT - DFT: {mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})" in out
    [row] = [line.split() for line in out.splitlines() if line.startswith("SFT  ")]
    assert row[1:3] == [f"{sum(a) / 3:.3f}", f"+-{(max(a) - min(a)) / 2:.3f}"]


def test_what_stands_in_the_results(tiny_base, made_up):
    """Settings, versions, costs of every seed, verdict; a measure that runs lack is left out."""
    assert common.main(experiment(tiny_base), ["--seeds", "2"]) == 0
    found = read()
    assert (found["experiment"], found["verdict"]) == ("made_up", common.HOLDS)
    assert found["versions"] == {"python": platform.python_version(), "torch": torch.__version__}
    settings = found["settings"]
    assert settings["command"] == "python experiments/made_up.py --seeds 2"
    assert (settings["arms"], settings["seeds"], settings["sweep_seeds"]) == (ARMS, 2, 2)
    assert settings["flags"][:2] == list(TASK[:1]) + ["2"]
    figures = found["arms"]["SFT"]["figures"]
    assert set(figures) == {"accuracy", "KL", "updates", "sampled", "trained", "train s", "eval s",
                            "before", "seconds"}
    assert (figures["updates"], figures["sampled"], figures["trained"], figures["seconds"]) == (
        [2, 2], [7, 7], [40, 40], [1.5, 1.5])
    assert figures["before"] == [0.1, 0.1] and found["base"] == {"accuracy": [0.1, 0.1]}


def test_lists_of_numbers_stand_on_one_line():
    """And everything else is read back as it was."""
    found = {"a": [1, -2.5, 1e-7], "b": ["x", "y"], "c": {"d": None, "e": []}, "f": "[ 1, 2 ]"}
    text = common.lines_of(found)
    assert json.loads(text) == found and ' "a": [1, -2.5, 1e-07],\n' in text


def test_quick_concludes_nothing(tiny_base, made_up):
    """One seed, the middle value of each sweep, its own flags; elsewhere than the real results."""
    assert common.main(experiment(tiny_base), ["--quick"]) == 0
    assert made_up == ["out/chain-sft-learning_rate-1e-3-0", "out/chain-dft-learning_rate-1e-2-0",
                       "out/chain-dft-alpha-0.3-0"]
    found = read("out/quick/made_up.json")
    assert found["verdict"] == common.UNCLEAR and not os.path.exists(RESULT)
    assert found["settings"]["flags"][-2:] == ["--max_steps", "1"]
    assert found["effects"]["SFT - DFT"]["low"] is None


def test_figures_of_what_is_no_run(tiny_base, made_up, capsys):
    """`extra` is asked once the arms are made. Its figures stand apart in the file, and beside the
    arms' in the rule and the table. None of it, after Ctrl-C, ends the experiment."""
    def extra(asked, made):
        assert asked.seeds == 2 and made["SFT"]["variant"] == "sft:learning_rate=1e-3"
        return {"replay": {"accuracy": [0.25, 0.75]}}

    def verdict(figures):
        return common.FAILS, {"replay": common.interval(figures["replay"]["accuracy"])}
    this = experiment(tiny_base, extra=extra, verdict=verdict)
    assert common.main(this, ["--seeds", "2"]) == 0
    found = read()
    assert found["extra"] == {"replay": {"accuracy": [0.25, 0.75]}} and set(found["arms"]) == set(
        ARMS)
    assert found["effects"]["replay"]["mean"] == 0.5
    out = capsys.readouterr().out
    assert ["replay", "0.500", "+-0.250"] in [line.split()[:3] for line in out.splitlines()]
    os.remove(RESULT)
    this.extra = lambda asked, made: None
    assert common.main(this, ["--seeds", "2"]) == 130 and not os.path.exists(RESULT)
    assert "stopped; go on with" in capsys.readouterr().out


def test_without_matplotlib(tiny_base, made_up, monkeypatch, capsys):
    """The results are written all the same."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert common.main(experiment(tiny_base), ["--quick"]) == 0
    assert report.NO_PICTURE in capsys.readouterr().out
    assert os.listdir("out/quick") == ["made_up.json"]


# -- real runs ------------------------------------------------------------------------------------


def without_clock(found):
    for arm in found["arms"].values():
        for name in ("seconds", "train s", "eval s", "MB"):
            del arm["figures"][name]
    return found


def test_an_interrupted_experiment_goes_on(tiny_base, in_process, monkeypatch, capsys, tmp_path):
    """Ctrl-C in the second run: 130 and the command. Then the finished run is reused, the
    interrupted one is resumed, and the results are those of an experiment in one go. The figures
    are those in the runs' own summaries."""
    arms = {"SFT": "sft:learning_rate=1e-2|1e-1", "DFT": "dft"}
    this = experiment(tiny_base, ARMS=arms, SWEEP_SEEDS=1)
    with interrupted(monkeypatch, 3):   # two updates a run
        assert common.main(this, ["--seeds", "2"]) == 130
    assert "stopped; go on with: python experiments/made_up.py --seeds 2" in capsys.readouterr().out
    assert len(in_process) == 2 and not os.path.exists(RESULT)
    assert common.main(this, ["--seeds", "2"]) == 0
    assert in_process[2] == [*in_process[1], "--resume"] and len(in_process) == 3 + 4
    resumed = read()
    summaries = {}
    for arm, found in resumed["arms"].items():
        for i, seed in enumerate(found["seeds"]):
            name = found["variant"].replace(":", "-").replace("=", "-")
            summary = read(f"out/chain-{name}-{seed}/summary.json")
            summaries[arm, seed] = summary
            figures = {measure: values[i] for measure, values in found["figures"].items()}
            assert figures["KL"] == summary["after"]["eval/kl"] > 0
            assert figures["length"] == summary["after"]["eval/mean_length"]
            assert (figures["updates"], figures["trained"]) == (2, summary["trained_tokens"])
            assert figures["seconds"] == summary["seconds"]
    assert len({s["after"]["eval/kl"] for s in summaries.values()}) == 4
    assert os.path.exists("experiments/results/made_up.png") == (report.pyplot() is not None)

    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    assert common.main(this, ["--seeds", "2"]) == 0
    assert without_clock(read()) == without_clock(resumed)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_with_tiny_settings(name, tiny_base, in_process, monkeypatch):
    """Its rule and picture take what the runs give: all arms in one step each, from a base that
    knows nothing."""
    module = importlib.import_module(name)
    flags = ["--max_steps", "1", "--batch_size", "2", "--eval_problems", "4", *map(str, TASK[:4]),
             "--init_from", str(tiny_base)]
    if name == "facts":
        flags += ["--max_new_tokens", "4"]
    if name == "style":   # which swapped demonstrations need
        flags += ["--min_terms", "3", "--max_terms", "3"]
    sampled = r"\b(grpo|rft|dpo|ppo|hybrid)(?=[:>]|$)"
    words = {arm: re.sub(sampled, r"\1:num_generations=2:num_prompts=10",
                         re.sub(r":(max_steps|init_from)=[^:>]+", "", word))
             for arm, word in module.QUICK_ARMS.items()}
    # The tiny base is there, and never right: a coin says which answers are better.
    first = [command.replace("--algo rm", "--algo rm --reward random --num_generations 4")
             for command in getattr(module, "FIRST", []) if "pretrain" not in command]
    monkeypatch.setattr(module, "FIRST", first, raising=False)
    monkeypatch.setattr(module, "QUICK_ARMS", words)
    monkeypatch.setattr(module, "QUICK_FLAGS", flags)
    assert common.main(module, ["--quick"]) == 0
    found = read(f"out/quick/{name}.json")
    assert len(in_process) >= len(words) and found["verdict"] == common.UNCLEAR
    assert all(len(arm["figures"]["accuracy"]) == 1 for arm in found["arms"].values())


# -- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, needle", [
    ("--seeds 0", "--seeds 0: 1 to 100"), ("--seeds 101", "--seeds 101"), ("--jobs 0", "--jobs 0"),
    ("--seeds two", "invalid int"), ("--bogus 1", "--bogus"), ("sft", "sft")])
def test_a_wrong_flag_is_one_line(tiny_base, made_up, flags, needle):
    """And nothing is run."""
    assert needle in complaint(common.main, experiment(tiny_base), flags.split())
    assert made_up == []


def test_a_wrong_arm_is_told_before_the_first_run(tiny_base, made_up):
    """Also where only one value of a sweep is wrong."""
    this = experiment(tiny_base, ARMS={"SFT": "sft", "DFT": "dft:learning_rate=1e-3|-1"})
    assert "learning_rate" in complaint(common.main, this, [])
    assert made_up == []


@pytest.mark.parametrize("name", NAMES)
def test_in_a_terminal(name):
    """As a person types it, from another folder: help, and one line for a mistake."""
    done = script(f"experiments/{name}", "--help", cwd=".")
    assert done.returncode == 0 and "does not hold here" in done.stdout
    done = script(f"experiments/{name}", "--seeds", "none", cwd=".")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1 and (ROOT / "experiments" / f"{name}.py").exists()
