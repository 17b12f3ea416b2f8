"""
The rule of experiments/length.py on figures made up for each outcome, and what it measures.
"""

import re
from types import SimpleNamespace

import common
import length
import pytest
import tasks
import torch
from experiment_helpers import around, first_seed, scattered
from harness import evaluate


def of_length(**wrong):
    """Figures of the base and the arms: wrong answers of 10 tokens, right ones of 8. Those of the
    equal rates have wrong answers of 30, which the rule does not read."""
    found = {arm: wrong.get(arm, 30 if " at " in arm else 10) for arm in ("base", *length.ARMS)}
    return {arm: {"wrong": around(value, 0.1), "right": around(8, 0.1)}
            for arm, value in found.items()}


@pytest.mark.parametrize("wrong, expected", [
    ({"grpo": 15}, common.HOLDS),
    ({"grpo": 15, "base": 15}, "holds with a condition: wrong answers are longer than with the "
                               "others, but do not grow"),
    ({"grpo": 15, "base": 20}, "holds with a condition: wrong answers are longer than with the "
                               "others, but do not grow"),
    ({"grpo": 15, "dapo": 15}, "holds with a condition: beside dr_grpo alone"),
    ({"grpo": 15, "dr_grpo": 17}, "holds with a condition: beside dapo alone"),
    ({}, common.FAILS),
    ({"grpo": 10.8}, common.FAILS),                       # longer by less than a token
    ({"grpo": 15, "dapo": 15, "dr_grpo": 15}, common.FAILS),   # all grow alike
    ({"grpo": 5}, common.FAILS),                          # the others' are longer
    ({"grpo": scattered(15, 2), "base": around(8, 0.1)}, common.UNCLEAR),
    ({"grpo": 15, "base": scattered(12, 2)}, common.UNCLEAR),
    ({"grpo": 15, "dapo": scattered(12, 2)}, common.UNCLEAR),
    ({"grpo": 15, "dapo": 15, "base": 15}, common.UNCLEAR)])
def test_the_rule_of_length(wrong, expected):
    assert length.verdict(of_length(**wrong))[0] == expected


def test_one_seed_concludes_nothing():
    assert length.verdict(first_seed(of_length(grpo=15)))[0] == common.UNCLEAR


def test_an_arm_of_an_equal_rate_is_compared_with_its_own():
    figures = of_length(base=9, grpo=15, **{"grpo at 5e-4": 12, "dapo at 5e-4": 7,
                                            "grpo at 1e-3": 20, "dapo at 1e-3": 18})
    _, effects = length.verdict(figures)
    assert effects["wrong answers, grpo - dapo at 5e-4"]["mean"] == pytest.approx(5)
    assert effects["wrong answers, grpo - dapo at 1e-3"]["mean"] == pytest.approx(2)
    assert effects["wrong answers, grpo - base at 5e-4"]["mean"] == pytest.approx(3)
    assert effects["wrong answers, grpo - dr_grpo"]["mean"] == pytest.approx(5)


def test_the_effects_of_length_have_their_sign():
    """By hand: 15 tokens with grpo are 3 more than with dr_grpo, 1 less than with dapo."""
    figures = of_length(base=9, grpo=15, dr_grpo=12, dapo=16)
    figures["grpo"]["right"] = around(7, 0.1)
    _, effects = length.verdict(figures)
    for name, value in (("wrong answers, grpo - base", 6), ("wrong answers, grpo - dr_grpo", 3),
                        ("wrong answers, grpo - dapo", -1), ("wrong answers, dapo - base", 7),
                        ("wrong answers, dr_grpo - base", 3), ("right answers, grpo - dapo", -1),
                        ("right answers, grpo - base", -1)):
        assert effects[name]["mean"] == pytest.approx(value), name


def test_what_is_measured(monkeypatch):
    """By hand: two problems of five or six terms, two answers each. Wrong are those of 4, 8 and 60
    tokens, right is that of 6; one in four is as long as can be."""
    asked = []

    def answers(model, tokenizer, task, problems, config, n):
        asked.extend(p["prompt"] for p in problems)
        return [], torch.tensor([[0., 1.], [0., 0.]]), torch.tensor([[4, 6], [8, 60]]), None
    monkeypatch.setattr(evaluate, "answers", answers)
    task, config = SimpleNamespace(max_new_tokens=60), SimpleNamespace(eval_problems=40)
    found = length.measure(None, None, task, config)
    assert found == {"wrong": 24, "right": 6, "hard": 0.25, "at limit": 0.25}
    assert {len(re.findall(r"\d", prompt)) for prompt in asked} == {5, 6} and len(asked) == 40
    assert all(tasks.is_test(prompt) for prompt in asked)


def test_a_mean_of_none_is_0():
    assert length.mean_length(torch.tensor([3, 5]), torch.tensor([False, False])) == 0
    assert length.mean_length(torch.tensor([3, 5, 6]), torch.tensor([True, False, True])) == 4.5
