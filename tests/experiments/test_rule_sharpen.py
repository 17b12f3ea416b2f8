"""The rule of experiments/sharpen.py on figures made up for each outcome, and what it measures."""

import common
import pytest
import sharpen
import tasks
import torch
from experiment_helpers import around, first_seed, scattered
from harness import evaluate

BASE = (0.4, 0.99)   # pass@1 and pass@64


def of_sharpen(**arms):
    """Figures of every arm as (pass@1, pass@64): those given, a GRPO that sharpens, and others
    that are between."""
    values = {"base": BASE, "GRPO": (0.52, 0.85), **arms}
    figures = {}
    for arm in ("base", *sharpen.ARMS):
        first, last = map(around, values.get(arm, (0.5, 0.94)))
        figures[arm] = {"p@1": first, "p@64": last}
    return figures


@pytest.mark.parametrize("arms, expected", [
    ({}, common.HOLDS),
    ({"RFT": (0.3, 0.5)}, common.HOLDS),                    # no remedy, and this is none either:
    ({"positive": (0.3, 0.5)}, common.HOLDS),
    ({"negative": (0.5, 0.6)}, "holds with a condition: breadth is kept by MaxRL, KL, entropy "
                               "alone"),
    ({"MaxRL": (0.5, 0.89)}, "holds with a condition: breadth is kept by KL, entropy, negative "
                             "alone"),                      # broader, but by too little
    ({"MaxRL": (0.44, 0.98)}, "holds with a condition: breadth is kept by KL, entropy, negative "
                              "alone"),                     # broad, because it learned little
    ({"KL": (0.5, scattered(0.9))}, "holds with a condition: breadth is kept by MaxRL, entropy, "
                                    "negative alone"),
    (dict.fromkeys(sharpen.REMEDIES, (0.5, 0.86)), "holds with a condition: no remedy keeps "
                                                   "breadth"),
    ({"GRPO": (0.52, 0.99)}, common.FAILS),
    ({"GRPO": (0.52, 0.96)}, common.FAILS),                 # narrower, but by too little
    ({"GRPO": (0.42, 0.85)}, common.UNCLEAR),               # learned too little
    ({"GRPO": (0.3, 0.85)}, common.UNCLEAR),
    ({"GRPO": (0.42, 0.99)}, common.UNCLEAR),
    ({"GRPO": (scattered(0.6), 0.85)}, common.UNCLEAR),
    ({"GRPO": (0.52, scattered(0.9))}, common.UNCLEAR)])
def test_the_rule_of_sharpen(arms, expected):
    assert sharpen.verdict(of_sharpen(**arms))[0] == expected


def test_one_seed_says_nothing_about_sharpening():
    assert sharpen.verdict(first_seed(of_sharpen()))[0] == common.UNCLEAR


def test_the_effects_of_sharpen_have_their_sign():
    """GRPO goes from .4 to .52 and from .99 to .85; MaxRL to .5 and .94."""
    _, effects = sharpen.verdict(of_sharpen(RFT=(0.45, 0.9), positive=(0.47, 0.8)))
    for name, value in (("GRPO - base at k = 1", 0.12), ("GRPO - base at k = 64", -0.14),
                        ("MaxRL - base at k = 1", 0.1), ("MaxRL - GRPO at k = 64", 0.09),
                        ("RFT - base at k = 1", 0.05), ("RFT - GRPO at k = 64", 0.05),
                        ("positive - base at k = 1", 0.07),
                        ("positive - GRPO at k = 64", -0.05)):
        assert effects[name]["mean"] == pytest.approx(value)
    arms = [arm for arm in sharpen.ARMS if arm != "GRPO"]
    assert set(effects) == {"GRPO - base at k = 1", "GRPO - base at k = 64",
                            *(f"{arm} - base at k = 1" for arm in arms),
                            *(f"{arm} - GRPO at k = 64" for arm in arms)}


def test_what_is_measured(monkeypatch):
    """Two problems, one of 64 answers right for the first and none for the second: pass@1 is
    1/128, pass@32 a quarter and pass@64 a half. 256 problems are asked, 64 answers to each,
    whatever the run is judged by."""
    asked, rewards = [], torch.zeros(2, 64)
    rewards[0, 17] = 1

    def answers(model, tokenizer, task, problems, config, num_generations):
        asked.append((problems, num_generations))
        return None, rewards, None, None
    monkeypatch.setattr(evaluate, "answers", answers)
    task = tasks.Countdown()
    found = sharpen.measure(None, None, task, None)
    assert set(found) == {f"p@{k}" for k in (1, 2, 4, 8, 16, 32, 64)}
    assert found["p@1"] == pytest.approx(1 / 128) and found["p@2"] == pytest.approx(1 / 64)
    assert found["p@32"] == pytest.approx(1 / 4) and found["p@64"] == pytest.approx(1 / 2)
    assert asked == [(task.problems("test", 256, 0), 64)]
