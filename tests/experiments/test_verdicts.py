"""
The rules of the experiments, on figures made up for each outcome; the pictures; and that the arms
are such as compare.py takes.
"""

import importlib
from unittest.mock import MagicMock

import common
import facts
import noise
import pytest
import train
from experiment_helpers import NAMES, around, scattered
from harness import arms as harness_arms

EXPERIMENTS = [importlib.import_module(name) for name in NAMES]


def of_facts(**accuracy):
    values = {"SFT": 0.98, "DFT": 0.6, "GRPO": 0.2, **accuracy}
    return {arm: {"accuracy": around(value)} for arm, value in values.items()}


@pytest.mark.parametrize("accuracy, expected", [
    ({}, common.HOLDS),
    ({"DFT": 0.97}, "holds with a condition: for GRPO alone"),
    ({"GRPO": 0.99}, "holds with a condition: for DFT alone"),
    ({"DFT": 0.97, "GRPO": 0.98}, common.FAILS),
    ({"DFT": 0.94, "GRPO": 0.94}, common.FAILS),        # behind, but by less than the margin
    ({"DFT": scattered(0.8)}, common.UNCLEAR),
    ({"DFT": 0.97, "GRPO": scattered(0.8)}, common.UNCLEAR),
    ({"SFT": 0.45, "DFT": 0.1}, common.UNCLEAR),        # nobody learned it
    ({"SFT": [0.98], "DFT": [0.5], "GRPO": [0.2]}, common.UNCLEAR)])   # one seed
def test_the_rule_of_facts(accuracy, expected):
    found, effects = facts.verdict(of_facts(**accuracy))
    assert found == expected and set(effects) == {"SFT - DFT", "SFT - GRPO"}


def test_the_effects_of_facts_have_their_sign():
    """SFT - DFT is .38 where SFT has .98 and DFT .6."""
    _, effects = facts.verdict(of_facts())
    assert effects["SFT - DFT"]["mean"] == pytest.approx(0.38)
    assert effects["SFT - GRPO"]["mean"] == pytest.approx(0.78)


def of_noise(sft, dft):
    """Figures of every arm: those of SFT and DFT as given, one value a share; others .9."""
    found = {arm: {"accuracy": around(0.9)} for arm in noise.ARMS}
    for arm, values in (("SFT", sft), ("DFT", dft)):
        for share, value in zip(noise.SHARES, values):
            found[f"{arm}, {share}"] = {"accuracy": around(value)}
    return found


@pytest.mark.parametrize("sft, dft, expected", [
    ((0.99, 0.88, 0.7, 0.5), (0.99, 0.99, 0.99, 0.98), common.HOLDS),
    # SFT hardly suffers from few mistakes; DFT gives way to many.
    ((0.99, 0.97, 0.7, 0.5), (0.99, 0.99, 0.99, 0.98),
     "holds with a condition: at a share of 0.3 and 0.6"),
    ((0.99, 0.88, 0.7, 0.3), (0.99, 0.99, 0.99, 0.6),
     "holds with a condition: at a share of 0.1 and 0.3"),
    ((0.99, 0.88, 0.7, scattered(0.7)), (0.99, 0.99, 0.99, 0.98),
     "holds with a condition: at a share of 0.1 and 0.3"),
    ((0.99, 0.98, 0.98, 0.97), (0.99, 0.99, 0.99, 0.98), common.FAILS),   # SFT is as robust
    ((0.99, 0.8, 0.6, 0.4), (0.99, 0.88, 0.7, 0.5), common.FAILS),        # DFT falls as well
    ((0.99, 0.98, 0.98, scattered(0.8)), (0.99, 0.99, 0.99, 0.98), common.UNCLEAR),
    (([0.99], [0.8], [0.7], [0.5]), ([0.99], [0.99], [0.99], [0.99]), common.UNCLEAR)])
def test_the_rule_of_noise(sft, dft, expected):
    figures = of_noise(sft, dft)
    if isinstance(sft[0], list):   # one seed
        figures = {arm: {"accuracy": found["accuracy"][:1]} for arm, found in figures.items()}
    assert noise.verdict(figures)[0] == expected


def test_the_effects_of_noise_have_their_sign():
    """At .3 DFT is .29 above SFT; SFT has fallen by .29, DFT by .0."""
    _, effects = noise.verdict(of_noise((0.99, 0.88, 0.7, 0.5), (0.99, 0.99, 0.99, 0.98)))
    assert effects["DFT - SFT at 0.3"]["mean"] == pytest.approx(0.29)
    assert effects["fall of DFT at 0.3"]["mean"] == pytest.approx(0)
    assert effects["fall of SFT at 0.3"]["mean"] == pytest.approx(0.29)
    assert effects["fall of DFT at 0.6"]["mean"] == pytest.approx(0.01)


def test_there_are_experiments():
    """Else the tests below would test nothing."""
    assert {"facts", "noise"} <= set(NAMES)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.__name__)
def test_the_arms_are_planned(experiment, tmp_path, monkeypatch):
    """Every arm in full and with --quick, with every value; a quick arm is one of the arms."""
    monkeypatch.chdir(tmp_path)
    first = "".join(getattr(experiment, "FIRST", []))
    for words, more in ((experiment.ARMS, []), (experiment.QUICK_ARMS, experiment.QUICK_FLAGS)):
        variants = {variant for word in words.values() for variant in harness_arms.values(word)}
        planned = common.plan(sorted(variants), [*experiment.FLAGS, *more], [0, 1], 2)
        assert {arm.variant for arm in planned} == variants
        harness_arms.check([arm for arm in planned if not arm.stages[0].config.init_from
                            and "reward_model=out" not in arm.variant], train.ALGORITHMS)
        assert "reward_model=out" not in str(words) or "--algo rm" in first
    assert set(experiment.QUICK_ARMS) <= set(experiment.ARMS)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.__name__)
def test_a_docstring_says_what_a_reader_needs(experiment):
    """Claim, source, the smallest faithful version, what would falsify it, the rule and the time;
    the rule names all four verdicts."""
    for word in ("Claim", "Source", "Here", "Falsified", "Rule", "Time"):
        assert f"\n{word} " in experiment.__doc__
    for words in (common.HOLDS, "with a condition", common.FAILS, "cannot be told"):
        assert words in experiment.__doc__


class Figures(dict):
    """Two seeds about a value, whatever the measure; of none that is asked for by `in`."""

    def __init__(self, value):
        self.value = value

    def __missing__(self, measure):
        return [self.value, self.value + 0.1]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.__name__)
@pytest.mark.parametrize("quick", [False, True])
def test_the_picture(experiment, quick):
    """It shows the means of all arms, or of those in SHOWN: of made-up figures, each its own. (On a
    stand-in for pyplot that records what it is told to draw.)"""
    plt = MagicMock()

    def subplots(rows, columns, **options):
        axes = [[MagicMock() for _ in range(columns)] for _ in range(rows)]
        plt.axes = sum(axes, [])
        return MagicMock(), axes[0] if rows == 1 else axes
    plt.subplots = subplots
    words = experiment.QUICK_ARMS if quick else experiment.ARMS
    names = ["base", *words]
    shown = [arm for arm in getattr(experiment, "SHOWN", words) if arm in names]
    figures = {arm: Figures(0.01 * i) for i, arm in enumerate(names)}
    experiment.draw(plt, figures)
    calls = [call for axis in plt.axes for call in (*axis.plot.mock_calls,
                                                    *axis.errorbar.mock_calls)]
    drawn = {round(float(y), 3) for call in calls for y in call.args[1]}
    assert {round(0.01 * names.index(arm) + 0.05, 3) for arm in shown} <= drawn
