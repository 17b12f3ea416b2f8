"""
experiments/peak.py: the rule on made-up figures, and the files that it writes.
"""

import json
import sys

import pytest
import torch
from tqdm import tqdm

from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import peak  # noqa: E402
from harness.errors import InputError  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "peak.json"


def gap(mean, half=0.01):
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 20}


def made_up(**changes):
    """Gaps with which everything holds, but for the changes."""
    found = {f"{f} {where}": gap(mean) for f in peak.FAMILIES
             for where, mean in (("far", 0.5), ("aligned", 0.02))}
    found |= {"imitation": gap(0.02), "speed": gap(0.1)}
    return found | {name.replace("_", " "): value for name, value in changes.items()}


def test_difference_is_paired_by_seed():
    """.9 - .5 and .8 - .6: the mean .3 with the differences' own deviation, .141."""
    arms = {name: {"peak 70, final": {"per_seed": v}} for name, v in (("a", [0.9, 0.8]),
                                                                      ("b", [0.5, 0.6]))}
    found = peak.gap(arms, "a", "b", 70)
    assert found["mean"] == pytest.approx(0.3)
    assert found["high"] == pytest.approx(0.3 + 12.706 * 0.1)


def test_holds():
    assert peak.verdict(made_up()) == "holds here"


@pytest.mark.parametrize("changes, words", [
    ({"ipo_far": gap(0.0)}, "for rft, dpo; ipo gains little where the peak is far"),
    ({"ipo_far": gap(0.1)}, "for rft, dpo; ipo gains unclearly where the peak is far"),
    ({"rft_aligned": gap(0.3)}, "for dpo, ipo; rft gains much where they are aligned"),
    ({"rft_aligned": gap(0.1)}, "for dpo, ipo; rft gains unclearly where they are aligned"),
    ({"imitation": gap(0.2)}, "imitation is behind where they are aligned"),
    ({"imitation": gap(0.1)}, "imitation is unclear where they are aligned"),
    ({"speed": gap(-0.2)}, "dpo, ipo; a negative gradient does not speed learning"),
    ({"speed": gap(0.02)}, "whether a negative gradient speeds learning is unclear"),
])
def test_holds_with_a_condition(changes, words):
    """What failed or is unclear is named, and nothing else."""
    found = peak.verdict(made_up(**changes))
    assert found.startswith("holds with a condition: online sampling matters") and words in found
    assert found.count(";") == 1


def test_does_not_hold():
    """Where the peak is far nothing is gained; or as much is gained where they are aligned; even if
    the other parts hold."""
    nothing = {f"{f}_far": gap(0.0) for f in peak.FAMILIES}
    everywhere = {f"{f}_aligned": gap(0.5) for f in peak.FAMILIES}
    mixed = {"rft_far": gap(0.0), "dpo_far": gap(-0.3), "ipo_aligned": gap(0.4)}
    for changes in (nothing, everywhere, mixed):
        assert peak.verdict(made_up(**changes)) == "does not hold here"


def test_cannot_be_told():
    """No family shows it and one that decides is unclear; or there is one seed."""
    changes = {"rft_far": gap(0.0), "dpo_far": gap(0.0), "ipo_far": gap(0.1)}
    assert peak.verdict(made_up(**changes)) == "cannot be told at this scale"
    one = {name: peak.interval([of["mean"]]) for name, of in made_up().items()}
    assert peak.verdict(one) == "cannot be told at this scale"


def test_the_best_setting_of_a_sweep():
    """By the mean over seeds of the measure asked for, at the peak asked for: one setting ends
    higher, another is sooner, a third is best at the other peak."""
    def run(*curves):   # one per peak, one seed
        return peak.Run([0, 1, 2], torch.tensor(curves, dtype=torch.float64)[:, None])
    sweep = {"ends": run([0, 0, 0.9], [0, 0, 0]), "soon": run([0, 0.8, 0.8], [0, 0, 0]),
             "other": run([0, 0, 0], [0, 0, 0.1])}
    assert peak.best_setting(sweep, "final", 0) == "ends"
    assert peak.best_setting(sweep, "mean", 0) == "soon"
    assert peak.best_setting(sweep, "final", 1) == "other"


def test_what_is_reported_is_the_chosen_settings_run(monkeypatch):
    """At each peak: the figures of the reported seeds are those of training with the chosen
    setting, and the sweep's those of its own seeds."""
    world = peak.World(peaks=(20, 50, 70), steps=6, groups=2, num_generations=4, record=3)
    monkeypatch.setattr(peak, "ARMS", [peak.Arm("dpo", 1), peak.Arm("pg")])
    found = peak.play(world, range(3), [1000, 1001], tqdm(disable=True))
    chosen = set()
    for arm in peak.ARMS:
        for m, at in enumerate(world.peaks):
            kept = found[arm.name][f"peak {at}, final"]
            setting = kept["learning_rate"], kept["beta"]
            chosen.add((arm, setting))
            run = peak.train(arm, *setting, world, range(3))
            assert kept["per_seed"] == pytest.approx(run.final[m].tolist(), abs=1e-6)
            swept = peak.train(arm, *setting, world, [1000, 1001]).final[m].mean().item()
            assert kept["sweep"]["{:g} {:g}".format(*setting)] == pytest.approx(swept, abs=1e-4)
            assert len(kept["sweep"]) == (10 if arm.loss == "dpo" else 5)
        timed, run = found[arm.name]["peak 70, mean"], peak.train(
            arm, found[arm.name]["peak 70, mean"]["learning_rate"],
            found[arm.name]["peak 70, mean"]["beta"], world, range(3))
        assert timed["per_seed"] == pytest.approx(run.mean[2].tolist(), abs=1e-6)
    assert len(chosen) > len(peak.ARMS)   # the peaks do differ in what is best


# -- files ----------------------------------------------------------------------------------------


def check(results):
    """The figures of a results file fit together."""
    seeds = len(results["settings"]["seeds"])
    assert results["verdict"] == results["worlds"]["bandit"]["verdict"]
    assert not {*results["settings"]["seeds"]} & {*results["settings"]["sweep_seeds"]}
    for result in results["worlds"].values():
        assert result["verdict"] == peak.verdict(result["gaps"])
        assert result["gaps"] == peak.gaps(result["arms"])
        assert set(result["arms"]) == {arm.name for arm in peak.ARMS}
        for figures in result["arms"].values():
            for what, kept in figures.items():
                assert len(kept["per_seed"]) == seeds
                setting = f"{kept['learning_rate']:g} {kept['beta']:g}"
                assert kept["sweep"][setting] == max(kept["sweep"].values())
                if "quartiles" in kept:   # the curve ends where the figures do
                    assert what.endswith("final")
                    middle = torch.tensor(kept["per_seed"], dtype=torch.float64).quantile(0.5)
                    assert kept["quartiles"][1][-1] == pytest.approx(middle.item(), abs=1e-4)
                    assert len(kept["updates"]) == len(kept["quartiles"][0])


def test_a_tiny_run_end_to_end(tmp_path, capsys):
    """JSON, picture (with matplotlib) and table; the same figures when it is read back."""
    world = peak.World(peaks=(20, 70), steps=6, groups=2, num_generations=4, record=3)
    results = peak.experiment({"bandit": world}, range(2), [1000], quick=True)
    peak.save(tmp_path, results)
    read = json.loads((tmp_path / "peak.json").read_text())
    assert read == json.loads(json.dumps(results))
    check(read)
    assert read["settings"]["seeds"] == [0, 1] and set(read["versions"]) == {"python", "torch"}
    assert read["worlds"]["bandit"]["sampled_tokens"] == 6 * 2 * 4
    text = peak.summary("bandit", results["worlds"]["bandit"])
    assert text.endswith(read["verdict"]) and "pg positive" in text
    if peak.report.pyplot() is not None:
        assert (tmp_path / "peak.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--seeds", "1001"]])
def test_seeds_out_of_range(flags):
    """Seeds of the sweep are never reported."""
    with pytest.raises(InputError, match="1 to 1000"):
        peak.main(flags)


def test_the_results_that_are_shipped():
    """Figures, gaps and verdict of experiments/results/peak.json fit together; 100 seeds."""
    results = json.loads(RESULTS.read_text())
    check(results)
    assert results["settings"]["seeds"] == list(range(100))
    assert (results["settings"]["large"], results["settings"]["faster"]) == (0.1, 0.02)
    assert RESULTS.with_suffix(".png").read_bytes()[1:4] == b"PNG"
