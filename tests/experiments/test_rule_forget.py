"""
The rule of experiments/forget.py on figures made up for each outcome, and its choice of a rate.
"""

import common
import forget
import pytest
from experiment_helpers import around, first_seed, scattered


def of_forget(accuracy=0.98, **kept):
    """Figures of every arm: .98 on chain, .6 kept of each skill, a KL of 1; kept: of an arm, by its
    name without blanks and signs (SFT1e3 is SFT at 1e-3)."""
    figures = {}
    for arm in forget.ARMS:
        value = kept.get(arm.replace(" at ", "").replace("-", ""), 0.6)
        value = around(value)
        figures[arm] = {"accuracy": around(accuracy), "reversing": value, "facts": value,
                        "KL": around(1)}
    return figures


@pytest.mark.parametrize("kept, expected", [
    ({"GRPO": 0.9, "GRPO1e3": 0.9}, common.HOLDS),
    ({"GRPO": 0.9}, common.HOLDS),                          # whatever the equal rate says
    ({"GRPO": 0.9, "GRPO1e3": scattered(0.6)}, common.HOLDS),
    ({"GRPO1e3": 0.9}, "holds with a condition: at an equal learning rate alone"),
    ({"GRPO": 0.62, "GRPO1e3": 0.9}, "holds with a condition: at an equal learning rate alone"),
    ({}, common.FAILS),
    ({"GRPO": 0.62, "GRPO1e3": 0.63}, common.FAILS),        # ahead by less than the margin
    ({"SFT": 0.9, "SFT1e3": 0.9}, common.FAILS),            # SFT keeps more
    ({"GRPO1e3": scattered(0.6)}, common.UNCLEAR),
    ({"GRPO": scattered(0.6), "GRPO1e3": 0.9}, common.UNCLEAR),
    ({"GRPO": 0.9, "accuracy": 0.94}, common.UNCLEAR)])     # nobody learned chain
def test_the_rule_of_forget(kept, expected):
    assert forget.verdict(of_forget(**kept))[0] == expected


@pytest.mark.parametrize("arm", ["SFT", "GRPO"])
def test_both_must_have_learned_chain(arm):
    figures = of_forget(GRPO=0.9)
    figures[arm]["accuracy"] = around(0.9)
    assert forget.verdict(figures)[0] == common.UNCLEAR


def test_the_effects_of_forget_have_their_sign():
    """Kept at 1e-3: GRPO .9, SFT .6, negatives .8, positives .6; at their own rates SFT .7."""
    figures = of_forget(GRPO1e3=0.9, negatives1e3=0.8, SFT=0.7, RFT=0.75, positives=0.5)
    figures["GRPO at 1e-3"]["KL"] = around(3)
    _, effects = forget.verdict(figures)
    for name, value in (("kept, GRPO - SFT, at 1e-3", 0.3), ("kept, GRPO - SFT, own rates", -0.1),
                        ("kept, PPO - SFT, at 1e-3", 0), ("kept, DPO - SFT, own rates", -0.1),
                        ("kept, RFT - SFT, own rates", 0.05),
                        ("kept, positives - SFT, own rates", -0.2),
                        ("kept, negatives - positives, at 1e-3", 0.2),
                        ("KL, GRPO - SFT, at 1e-3", 2), ("accuracy, GRPO - SFT, at 1e-3", 0)):
        assert effects[name]["mean"] == pytest.approx(value), name


def test_each_base_has_its_effect():
    """Even seeds start from base 0, odd ones from base 1. Kept by GRPO at 1e-3: .5 and .9, by SFT
    .6: -.1 and +.3."""
    figures = of_forget()
    n = len(figures["GRPO at 1e-3"]["facts"])
    figures["GRPO at 1e-3"]["facts"] = figures["GRPO at 1e-3"]["reversing"] = [
        (0.5, 0.9)[seed % 2] for seed in range(n)]
    _, effects = forget.verdict(figures)
    for base, value in enumerate((-0.1, 0.3)):
        effect = effects[f"kept, GRPO - SFT, at 1e-3, base {base}"]
        assert effect["mean"] == pytest.approx(value), base
        assert effect["n"] == len(range(base, n, 2))


def test_one_seed_concludes_nothing():
    assert forget.verdict(first_seed(of_forget(GRPO=0.9, GRPO1e3=0.9)))[0] == common.UNCLEAR


def test_kept_is_the_mean_of_both_skills():
    assert forget.kept({"reversing": [0.2, 1.0], "facts": [0.6, 0.0]}) == pytest.approx([0.4, 0.5])


def runs(*figures):
    """Runs of a sweep: (accuracy, reversing, facts) each."""
    return [{"after": {"eval/accuracy": a, "eval/kept/reversing": r, "eval/kept/facts": f}}
            for a, r, f in figures]


def test_the_rate_that_keeps_most_among_the_able():
    """By hand: .96 is too low, whatever it keeps; of the others the second keeps .8 and the third
    .3. Over two seeds the means count: .98 and .97 kept .5 against .9."""
    sweep = {"a": runs((0.96, 0.9, 0.9)), "b": runs((0.98, 0.7, 0.9)), "c": runs((0.99, 0.5, 0.1))}
    assert forget.choose(sweep) == "b"
    sweep = {"a": runs((0.98, 0.9, 0.9), (0.94, 1, 1)), "b": runs((0.98, 0.3, 0.3), (0.98, 0, 0)),
             "c": runs((0.97, 0.5, 0.2), (0.98, 0.4, 0.4))}
    assert forget.choose(sweep) == "c"


def test_the_most_accurate_where_no_rate_is_able():
    sweep = {"a": runs((0.80, 0.9, 0.9)), "b": runs((0.96, 0.2, 0.2)), "c": runs((0.95, 0.5, 0.1))}
    assert forget.choose(sweep) == "b"
