"""
experiments/sampler.py: the rule and its effects on made-up figures, the picture, and the tandem: a
replay in order is the online run bit for bit, another order is not.
"""

import os
from types import SimpleNamespace
from unittest.mock import MagicMock

import common
import pytest
import sampler
import torch
import train
from conftest import TASK
from experiment_helpers import around, first_seed, scattered
from harness import arms as harness_arms

ARMS = {"online": 0.98, "every 10": 0.96, "offline": 0.85, "online, moving": 0.97,
        "every 10, moving": 0.95}
REPLAYS = {"IPO, online": 0.97, "IPO, in order": 0.97, "IPO, shuffled": 0.90, "IPO, offline": 0.88,
           "best of 16, online": 0.98, "best of 16, in order": 0.98, "best of 16, shuffled": 0.96,
           "best of 16, offline": 0.74}


def figures(away=0.0, **accuracy):
    """Five seeds an arm; `online_moving` stands for "online, moving". away: of what is replayed in
    order, in the last seed."""
    given = {name.replace("_", " ").replace(" moving", ", moving"): value
             for name, value in accuracy.items()}
    assert set(given) <= set(ARMS)
    found = {}
    for arm, value in {**ARMS, **REPLAYS, **given}.items():
        value = around(value)
        found[arm] = {"accuracy": value, "ood": [v / 2 for v in value], "KL": value,
                      "parameters": [0.0] * 4 + [away]}
    return {"base": {"accuracy": around(0.48)}, **found}


@pytest.mark.parametrize("accuracy, expected", [
    ({}, common.HOLDS),
    ({"every_10": 0.99}, common.HOLDS),                               # better than online
    ({"every_10": 0.90}, "holds with a condition: with a moving reference alone"),
    ({"every_10_moving": 0.90}, "holds with a condition: with a fixed reference alone"),
    ({"every_10": scattered(0.9)}, "holds with a condition: with a moving reference alone"),
    ({"offline": 0.95}, common.FAILS),                                # behind, but by .03 alone
    ({"offline": 0.95, "every_10": 0.8}, common.FAILS),
    ({"every_10": 0.90, "every_10_moving": 0.90}, common.FAILS),
    ({"offline": scattered(0.9)}, common.UNCLEAR),
    ({"every_10": scattered(0.9), "every_10_moving": scattered(0.9)}, common.UNCLEAR),
    ({"every_10": 0.9, "every_10_moving": scattered(0.9)}, common.UNCLEAR),
    # online with a moving reference is what its own arm is compared with
    ({"online_moving": 0.90, "every_10_moving": 0.89}, common.HOLDS),
    ({"away": 1e-7}, common.UNCLEAR)])
def test_the_rule(accuracy, expected):
    assert sampler.verdict(figures(**accuracy))[0] == expected


def test_one_seed_concludes_nothing():
    assert sampler.verdict(first_seed(figures()))[0] == common.UNCLEAR


def test_the_effects_have_their_sign():
    """By hand from the figures above: online .98 is .13 above offline .85, and so on."""
    _, effects = sampler.verdict(figures())
    expected = {"online - offline": 0.13, "online - every 10": 0.02,
                "online - every 10, reference moving": 0.02,
                "online: reference moving - fixed": -0.01, "online - offline, ood": 0.065,
                "IPO: online - in order": 0.0, "IPO: online - shuffled": 0.07,
                "IPO: shuffled - offline": 0.02, "best of 16: online - in order": 0.0,
                "best of 16: online - shuffled": 0.02, "best of 16: shuffled - offline": 0.22}
    assert {name: effect["mean"] for name, effect in effects.items()} == pytest.approx(expected)


def test_the_picture_shows_the_tandem():
    """A mark for each learner of each loss, at its mean."""
    plt, axes = MagicMock(), [MagicMock() for _ in range(3)]
    plt.subplots = lambda rows, columns, **options: (MagicMock(), axes)
    sampler.draw(plt, figures())
    drawn = [call.args[1][0] for call in axes[2].errorbar.mock_calls]
    assert drawn == pytest.approx(list(REPLAYS.values()))


# -- the tandem -----------------------------------------------------------------------------------

LOSSES = {**sampler.TANDEM, "DPO": ("dpo", "dpo:sync_steps=inf")}
FLAGS = [*map(str, TASK[:2]), "--max_terms", "3", "--eval_problems", "16", "--max_steps", "6",
         "--batch_size", "8", "--num_generations", "4", "--learning_rate", "3e-3",
         "--eval_steps", "6"]


def folder(loss):
    return loss.replace(" ", "_")


@pytest.fixture(scope="module")
def four(small_base, tmp_path_factory):
    """The four learners of every loss in six steps, from a base that is often right.
    -> {loss: (summaries, batches of online, folder)}"""
    flags = [*FLAGS, "--init_from", str(small_base)]
    found, here = {}, os.getcwd()
    os.chdir(tmp_path_factory.mktemp("tandem"))
    try:
        for loss, words in LOSSES.items():
            sampler.TANDEM[loss] = words
            summaries = sampler.tandem(loss, flags, 3)
            kept = f"out/tandem/{folder(loss)}-online-3/batches.pt"
            batches = torch.load(kept, weights_only=True)
            found[loss] = summaries, batches, os.getcwd()
    finally:
        os.chdir(here)
        sampler.TANDEM.pop("DPO", None)
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_in_order_is_online_bit_for_bit(four, loss):
    """Also what is measured of it; but it samples nothing. Shuffled and offline are others, and
    every learner has moved."""
    made, batches, _ = four[loss]
    assert list(made) == list(sampler.WAYS) and len(batches) == 6
    away = {way: summary["measured"]["parameters"] for way, summary in made.items()}
    assert away["online"] == away["in order"] == 0
    assert min(away["shuffled"], away["offline"]) > 1e-4
    assert made["in order"]["after"] == made["online"]["after"]
    for name in ("updates", "trained_tokens"):
        assert made["in order"][name] == made["online"][name] == made["shuffled"][name] > 0
    assert made["in order"]["sampled_tokens"] == made["shuffled"]["sampled_tokens"] == 0
    assert made["online"]["sampled_tokens"] > 0 < made["offline"]["sampled_tokens"]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_online_run_is_that_of_train_py(four, loss, small_base, tmp_path, monkeypatch):
    """Recording changes nothing: the same command through train.py ends at the same parameters."""
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--init_from", str(small_base)]
    [stage] = harness_arms.stages(LOSSES[loss][0], flags, 3, train.ALGORITHMS)
    assert train.main(stage.command) == 0
    recorded = SimpleNamespace(out_dir=f"{four[loss][2]}/out/tandem/{folder(loss)}-online-3")
    assert sampler.furthest(stage.config, recorded) == 0


def test_shuffled_has_each_batch_once():
    """In an order of the seed's own, the list itself left as it is."""
    batches = [{"step": i} for i in range(60)]
    first, again, other = (sampler.shuffled(batches, seed) for seed in (0, 0, 1))
    assert first == again != other and first != batches
    assert sorted(b["step"] for b in first) == list(range(60)) == [b["step"] for b in batches]


def test_a_finished_tandem_is_reused(four, monkeypatch):
    """Nothing is trained again."""
    monkeypatch.chdir(four["best of 16"][2])
    monkeypatch.setattr(train, "train", lambda algo, run: pytest.fail("trained again"))
    [config] = [stage.config for stage in harness_arms.stages(
        "rft:keep=best", ["--max_steps", "6"], 3, train.ALGORITHMS)]
    config.out_dir = "out/tandem/best_of_16-offline-3"
    monkeypatch.setattr(sampler.compare, "reusable", lambda config: True)
    found = sampler.learn(config, sampler.recording, [])
    assert found == {k: v for k, v in four["best of 16"][0]["offline"].items() if k != "measured"}


def test_ctrl_c_ends_the_tandem(monkeypatch):
    """None, as of a run that was interrupted; and before the next seed begins."""
    asked, calls = SimpleNamespace(seeds=2, quick=False), []
    monkeypatch.setattr(sampler, "tandem", lambda *args: calls.append(args))
    assert sampler.extra(asked, {}) is None and len(calls) == 1


def test_the_figures_of_the_tandem(monkeypatch):
    """One a seed, named for the loss and the way; seed s starts from base s % 2."""
    bases = []

    def tandem(loss, flags, seed):
        bases.append((loss, flags[-1], seed))
        after = {"eval/accuracy": 0.1 * seed + (loss == "best of 16")}
        return {way: {"seconds": 1, "before": {}, "after": after,
                      "measured": {"parameters": float(i)}} for i, way in enumerate(sampler.WAYS)}
    monkeypatch.setattr(sampler, "tandem", tandem)
    found = sampler.extra(SimpleNamespace(seeds=3, quick=False), {})
    assert bases == [(loss, base, seed) for loss in ("IPO", "best of 16")
                     for base, seed in (("0", 0), ("1", 1), ("0", 2))]
    assert list(found) == [f"{loss}, {way}" for loss in ("IPO", "best of 16")
                           for way in sampler.WAYS]
    assert found["best of 16, shuffled"]["accuracy"] == pytest.approx([1.0, 1.1, 1.2])
    assert found["best of 16, shuffled"]["parameters"] == [2.0, 2.0, 2.0]
