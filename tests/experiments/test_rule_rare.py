"""
The rule of experiments/rare.py on made-up figures, the sign of each of its effects, and its own
measure.
"""

import json
from types import SimpleNamespace

import common
import pytest
import rare
import tasks
from experiment_helpers import around, scattered
from harness import evaluate

START, ALONE, FEW, BOTH = 0.44, 0.49, 0.45, 0.98


def figures(seeds=5, **accuracy):
    """Figures of all arms, five seeds each; the chain wins. Keyword `tokens` stands for the long
    GRPO arm, `chain` for SFT>GRPO, `order` for GRPO>SFT."""
    means = {"base": START, "GRPO": ALONE, "SFT": FEW, "tokens": 0.5, "chain": BOTH, "order": 0.47,
             "plain sum": 0.96, "CHORD-mu": 0.9, "HPT": 0.8, "UFT": 0.7, "LUFFY": 0.5, **accuracy}
    names = {"tokens": rare.LONGER, "chain": "SFT>GRPO", "order": "GRPO>SFT"}
    found = {}
    for arm, mean in means.items():
        values = around(mean)[:seeds]
        found[names.get(arm, arm)] = {"accuracy": values, "ood": [v / 2 for v in values]}
    return found


@pytest.mark.parametrize("accuracy, expected", [
    ({}, common.HOLDS),
    ({"tokens": 0.97}, "holds with a condition: with as many updates; with as many sampled tokens "
                       "GRPO gets there"),
    ({"tokens": 0.8}, "holds with a condition: with as many updates; with as many sampled tokens "
                      "GRPO gets there"),                     # behind, but by less than the margin
    ({"tokens": scattered(0.75)}, "holds with a condition: with as many updates; with as many "
                                  "sampled tokens GRPO is unclear"),
    ({"GRPO": 0.56}, common.FAILS),                           # .12 above its start
    ({"GRPO": 0.53}, common.HOLDS),                           # .09 is small
    ({"SFT": 0.85}, common.FAILS),                            # demonstrations alone nearly do
    ({"chain": 0.6}, common.FAILS),
    ({"chain": 0.6, "GRPO": scattered(0.5)}, common.FAILS),   # c is false, whatever the others are
    ({"SFT": scattered(0.7)}, common.UNCLEAR),
    ({"GRPO": scattered(0.5)}, common.UNCLEAR),
    ({"base": scattered(0.44)}, common.UNCLEAR),
    ({"tokens": 0.97, "SFT": scattered(0.7)}, common.UNCLEAR),
    ({"plain sum": 0.99, "order": 0.99}, common.HOLDS),       # no part of the rule
    (dict.fromkeys(rare.HYBRIDS, 0.1), common.HOLDS)])
def test_the_rule(accuracy, expected):
    assert rare.verdict(figures(**accuracy))[0] == expected


def test_one_seed_concludes_nothing():
    assert rare.verdict(figures(seeds=1))[0] == common.UNCLEAR


def test_without_the_long_run_nothing_is_concluded():
    """--quick leaves it out; its effects are fewer."""
    found = {arm: f for arm, f in figures().items() if arm in ("base", *rare.QUICK_ARMS)}
    verdict, effects = rare.verdict(found)
    assert verdict == common.UNCLEAR and "SFT>GRPO - SFT" in effects
    assert not any(rare.LONGER in name for name in effects)


def test_the_effects_have_their_sign():
    """By hand from the figures above: what comes first is meant to be larger."""
    _, effects = rare.verdict(figures())
    for name, mean in {"GRPO - base": 0.05, "SFT>GRPO - GRPO": 0.49, "SFT>GRPO - SFT": 0.53,
                       "SFT>GRPO - GRPO, as many tokens": 0.48, "plain sum - SFT>GRPO": -0.02,
                       "plain sum - SFT>GRPO, ood": -0.01, "CHORD-mu - SFT>GRPO": -0.08,
                       "CHORD-mu - SFT>GRPO, ood": -0.04, "HPT - SFT>GRPO": -0.18,
                       "HPT - SFT>GRPO, ood": -0.09, "UFT - SFT>GRPO": -0.28,
                       "UFT - SFT>GRPO, ood": -0.14, "LUFFY - SFT>GRPO": -0.48,
                       "LUFFY - SFT>GRPO, ood": -0.24,
                       "SFT>GRPO - GRPO>SFT": 0.51}.items():
        assert effects.pop(name)["mean"] == pytest.approx(mean), name
    assert not effects


def test_the_share_of_worked_answers(monkeypatch, tmp_path):
    """Three of eight answers, four to each of two problems, show steps; what was before the run
    stands in its summary."""
    texts = ["6", "7+5=2;2*3=6", "6", "1", "7+5=2", "2=2", "", "6"]
    monkeypatch.setattr(evaluate, "answers", lambda *args: (texts, None, None, None))
    before = {"eval/worked": 0.01, "eval/accuracy_when_worked": 0.2}
    (tmp_path / "summary.json").write_text(json.dumps({"before": before, "after": {}}))
    config = SimpleNamespace(eval_problems=2, out_dir=str(tmp_path))
    assert rare.measure(None, None, tasks.Chain(), config) == {
        "worked": 3 / 8, "worked before": 0.01, "right if worked, before": 0.2}
