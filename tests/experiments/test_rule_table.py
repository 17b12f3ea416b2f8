"""
experiments/table.py: its rule and effects on made-up figures, its picture, and what its arms are.
"""

from unittest.mock import MagicMock

import common
import pytest
import table
import train
from experiment_helpers import around, first_seed, scattered
from harness import arms as harness_arms

ACCURACY = {"DPO": 0.40, "RFT": 0.47, "PPO": 0.45, "GRPO": 0.48, "DFT": 0.52, "AWR": 0.46,
            "SFT on texts": 0.55, "DFT on texts": 0.35, "SFT>GRPO": 0.58}


def figures(**accuracy):
    """Five seeds an arm, all seeds alike in what differs between arms."""
    found = {}
    for arm, value in {**ACCURACY, **accuracy}.items():
        value = around(value)
        found[arm] = {"accuracy": value, "pass@16": [1 - v for v in value],
                      "ood": [v / 2 for v in value]}
    base = {"accuracy": around(0.41), "pass@16": around(0.97)}
    return {"base": base, **found}


@pytest.mark.parametrize("accuracy, expected", [
    ({}, common.HOLDS),
    ({"GRPO": 0.51}, "holds with a condition: DFT beats DPO, RFT, PPO alone"),   # by .01: too close
    ({"GRPO": 0.60}, "holds with a condition: DFT beats DPO, RFT, PPO alone"),
    ({"GRPO": scattered(0.45)}, "holds with a condition: DFT beats DPO, RFT, PPO alone"),
    ({"DFT": 0.46}, "holds with a condition: DFT beats DPO alone"),
    ({"DFT": 0.47, "DPO": scattered(0.47), "PPO": 0.46}, common.UNCLEAR),
    ({"DFT": 0.39}, common.FAILS),
    ({"DFT": 0.495, "RFT": 0.48, "PPO": 0.48, "DPO": 0.48}, common.FAILS),   # ahead by .015
    ({"DFT": 0.39, "DPO": scattered(0.5)}, common.UNCLEAR),
    (dict.fromkeys(table.MORE, 0.9), common.HOLDS),          # no part of the rule
    ({"DFT": scattered(0.52)}, common.UNCLEAR)])
def test_the_rule(accuracy, expected):
    assert table.verdict(figures(**accuracy))[0] == expected


def test_one_seed_concludes_nothing():
    assert table.verdict(first_seed(figures()))[0] == common.UNCLEAR


def test_the_effects_have_their_sign():
    """By hand from ACCURACY; pass@16 there is 1 minus it, ood half of it."""
    _, effects = table.verdict(figures())
    expected = {"DFT - DPO": 0.12, "DFT - RFT": 0.05, "DFT - PPO": 0.07, "DFT - GRPO": 0.04,
                "RFT - DPO": 0.07, "PPO - RFT": -0.02, "GRPO - PPO": 0.03,
                "DFT - RFT, pass@16": -0.05, "DFT - GRPO, pass@16": -0.04,
                "DFT - GRPO, ood": 0.02, "DFT - AWR": 0.06,
                "DFT on texts - SFT on texts": -0.2, "DFT - DFT on texts": 0.17,
                "SFT>GRPO - GRPO": 0.1}
    assert {name: effect["mean"] for name, effect in effects.items()} == pytest.approx(expected)


def test_budgets_and_who_sampled():
    """Every arm makes 60 updates; those called offline never renew their sampler. Demonstrations
    are as many as the prompts of 60 batches."""
    configs = {}
    for arm, word in table.ARMS.items():
        for variant in harness_arms.values(word):
            updates = 0
            for stage in harness_arms.stages(variant, table.FLAGS, 0, train.ALGORITHMS):
                configs[arm] = config = stage.config
                passes = (config.num_iterations * config.num_minibatches if config.algo == "ppo"
                          else 1)
                updates += config.max_steps * passes
                assert config.eval_steps == config.max_steps and config.task == "countdown"
            assert updates == 60
    assert configs["DPO"].sync_steps == "inf"
    assert configs["RFT"].rounds == configs["DFT"].rounds == 1
    assert configs["DFT"].weighting == "dft" and configs["RFT"].weighting == "none"
    assert configs["AWR"].rounds == 1 and configs["AWR"].weighting == "awr"
    for arm in ("SFT on texts", "DFT on texts"):
        assert configs[arm].num_demonstrations == 60 * configs[arm].batch_size == 1920
    assert {configs[arm].batch_size * configs[arm].num_generations for arm in table.ORDER} == {512}


def test_the_picture():
    """Both panels have a mark for each arm, at its mean and in the order of the docstring, and a
    line for the base."""
    plt, axes = MagicMock(), [MagicMock(), MagicMock()]
    plt.subplots = lambda rows, columns, **options: (MagicMock(), axes)
    table.draw(plt, figures())
    for axis, means in zip(axes, (ACCURACY.values(), [1 - v for v in ACCURACY.values()])):
        assert [call.args[1][0] for call in axis.errorbar.mock_calls] == pytest.approx(list(means))
    assert [axis.axhline.call_args.args[0] for axis in axes] == pytest.approx([0.41, 0.97])
