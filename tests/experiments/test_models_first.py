"""
What an experiment makes before its arms run (FIRST), here reward models, and the measures of its
own that such arms have; end to end, in two steps each.
"""

import os

import common
import pytest
from conftest import TASK
from experiment_helpers import experiment, read
from runs_helpers import metrics, same, summary, weights

TINY = [*map(str, TASK), "--max_steps", "1", "--batch_size", "4", "--num_generations", "4",
        "--eval_steps", "1"]
# (The tiny base is never right: a coin says which answer is better.)
FIRST = ["--algo rm --max_steps 2 --reward random --out_dir out/rm-small-{seed}"]
ARM = "grpo:reward=model:reward_model=out/rm-small-{seed}"


def measure(model, tokenizer, task, config):
    """Made-up figures, which tell the start from what was made of it."""
    return {"proxy": float(os.path.getsize(config.reward_model + "/summary.json") > 0),
            "proxy at 1": 2.0}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def finished(tiny_base, in_process):
    this = experiment(tiny_base, ARMS={"RM": ARM, "RM, .1": f"{ARM}:beta=0.1"}, FIRST=FIRST,
                      FLAGS=["--init_from", str(tiny_base), *TINY], BASES=2, SWEEP_SEEDS=0,
                      verdict=lambda figures: (common.UNCLEAR, {}), measure=measure,
                      draw=lambda plt, figures: plt.figure())
    assert common.main(this, ["--seeds", "3"]) == 0
    return this, in_process


def test_each_seed_has_a_reward_model_of_its_own(finished):
    """Also seeds 0 and 2, which share a base; with the steps that FIRST says, not FLAGS."""
    folders = [f"out/rm-small-{seed}" for seed in range(3)]
    assert [summary(folder)["steps"] for folder in folders] == [2, 2, 2]
    a, b, c = map(weights, folders)
    assert not same(a, b) and not same(a, c) and not same(b, c)


def test_an_arm_is_trained_with_the_model_of_its_seed(finished):
    """Each command names it; the log has the model's reward beside the true one."""
    _, commands = finished
    for command in commands:
        assert f"--reward_model=out/rm-small-{command[command.index('--seed') + 1]}" in command
    [folder] = {c[c.index("--out_dir") + 1] for c in commands
                if "--beta=0.1" in c and c[c.index("--seed") + 1] == "1"}
    line = metrics(folder)[-1]
    assert {"reward", "true_reward"} <= set(line) and line["reward"] != line["true_reward"]


def test_own_measures_stand_in_the_figures(finished, capsys):
    """One value a seed, also of the start; the table leaves out a single moment (`... at 1`)."""
    found = read()
    for figures in (found["base"], *(arm["figures"] for arm in found["arms"].values())):
        assert (figures["proxy"], figures["proxy at 1"]) == ([1.0] * 3, [2.0] * 3)
    figures = {arm: a["figures"] for arm, a in found["arms"].items()}
    heads = common.table(figures).splitlines()[0]
    assert " proxy " in heads and " at 1" not in heads and "pass@16" in heads


def test_what_is_made_is_made_once(finished):
    """A second experiment finds its reward models, and all its runs."""
    this, commands = finished
    n = len(commands)
    made = os.path.getmtime("out/rm-small-0/ckpt.pt")
    assert common.main(this, ["--seeds", "3"]) == 0
    assert len(commands) == n and os.path.getmtime("out/rm-small-0/ckpt.pt") == made
