"""
What an experiment may have besides arms: several base models, a seed in its words, measures of its
own, and another way to choose among values.
"""

import itertools

import common
import pytest
from conftest import TASK
from experiment_helpers import ARMS, accuracy, experiment, read
from harness import checkpoint


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_seeds_take_turns_with_the_bases():
    """Seed 0 starts from base 0, 1 from 1, 2 from 0 again; arms stand word by word, value by value,
    seed by seed. A seed in a word is that of the run, and the arm keeps one name."""
    words = ["sft:learning_rate=1e-3|1e-2", "dft:init_from={seed}"]
    planned = common.plan(words, list(map(str, TASK)), [0, 1, 2], 2)
    found = [(arm.variant, arm.seed, arm.stages[0].config.base_seed) for arm in planned]
    assert found == [(variant, seed, seed % 2) for variant, seed in itertools.product(
        ["sft:learning_rate=1e-3", "sft:learning_rate=1e-2", "dft:init_from={seed}"], [0, 1, 2])]
    assert [arm.stages[0].config.init_from for arm in planned[-3:]] == ["0", "1", "2"]
    assert {arm.word for arm in planned[-3:]} == {"dft:init_from={seed}"}
    assert len({arm.stages[0].config.out_dir for arm in planned}) == 9


def test_every_seed_has_the_start_of_its_base(tiny_base, made_up, monkeypatch):
    """Both parts of an experiment with two bases, and the number of bases in the results."""
    plans = []

    def plan(words, common_flags, seeds, bases):
        plans.append((list(seeds), bases))
        return original(words, common_flags, seeds, bases)
    original = common.plan
    monkeypatch.setattr(common, "plan", plan)
    assert common.main(experiment(tiny_base, BASES=2), ["--seeds", "3"]) == 0
    assert plans == [([0, 1, 2, 100, 101], 2), ([100, 101], 2), ([0, 1, 2], 2)]
    assert read()["settings"]["bases"] == 2


def test_more_seeds_where_five_do_not_tell(tiny_base, made_up):
    """SEEDS is the default of --seeds; --quick has one all the same."""
    assert common.main(experiment(tiny_base, SEEDS=7), []) == 0
    assert read()["arms"]["SFT"]["seeds"] == list(range(7))
    assert common.main(experiment(tiny_base, SEEDS=7), ["--quick"]) == 0
    assert read("out/quick/made_up.json")["arms"]["SFT"]["seeds"] == [0]


def test_a_measure_of_its_own(tiny_base, in_process):
    """It judges each finished run, and the start once: here by the size of the weights, which is
    read from the checkpoints once more. The rule gets both."""
    seen, given = [], []

    def measure(model, tokenizer, task, config):
        seen.append(config.out_dir)
        return {"size": sum(p.norm().item() for p in model.parameters()),
                "symbols": tokenizer.vocab_size}

    def verdict(figures):
        given.append(figures)
        return common.HOLDS, {"gap": common.difference(figures["SFT"]["size"],
                                                       figures["base"]["size"])}
    this = experiment(tiny_base, ARMS={"SFT": "sft:learning_rate=1e-1"}, verdict=verdict,
                      draw=lambda plt, figures: plt.figure(), measure=measure)
    assert common.main(this, ["--seeds", "2"]) == 0
    found = read()
    sizes, before = found["arms"]["SFT"]["figures"]["size"], found["base"]["size"]
    ends = [f"out/chain-sft-learning_rate-1e-1-{seed}" for seed in (0, 1)]
    weights = [checkpoint.build_model(checkpoint.read(path)).parameters()
               for path in (*ends, str(tiny_base))]
    expected = [sum(p.norm().item() for p in each) for each in weights]
    assert len(seen) == 3 and len(set(expected)) == 3
    assert sizes == expected[:2] and before == [expected[2]] * 2
    assert given[0]["SFT"]["size"] == sizes and given[0]["base"]["symbols"] == [258, 258]
    this.START, this.verdict = False, lambda figures: (common.HOLDS, {})   # the runs alone
    assert common.main(this, ["--seeds", "2"]) == 0 and len(seen) == 3 + 2
    assert "size" not in read()["base"] and read()["arms"]["SFT"]["figures"]["size"] == sizes


def test_another_choice(tiny_base, made_up):
    """`choose` sees the runs of every value, and its word counts: here the lowest accuracy."""
    def choose(variants):
        means = {variant: sum(run["after"]["eval/accuracy"] for run in runs)
                 for variant, runs in variants.items()}
        return min(means, key=means.get)
    assert common.main(experiment(tiny_base, choose=choose), ["--seeds", "2"]) == 0
    for arm in ("SFT", "DFT"):
        found = read()["arms"][arm]
        means = {variant: sum(values) for variant, values in found["sweep"].items()}
        assert found["variant"] == min(means, key=means.get) != max(means, key=means.get)


def test_another_judge(tiny_base, made_up):
    """What `judge` says of each run of the sweep stands in the results, and its highest mean is
    chosen: here the value of the lowest accuracy."""
    assert common.main(experiment(tiny_base, judge=lambda run: -accuracy(run["folder"])),
                       ["--seeds", "2"]) == 0
    for arm in ("SFT", "DFT"):
        found = read()["arms"][arm]
        assert found["sweep"] == {
            variant: [-accuracy(f"out/chain-{variant}-{seed}".replace(":", "-").replace("=", "-"))
                      for seed in (100, 101)] for variant in found["sweep"]}
        means = {variant: sum(values) for variant, values in found["sweep"].items()}
        assert len(means) > 1 and found["variant"] == max(means, key=means.get)


def test_an_arm_may_choose_what_another_is(tiny_base, made_up):
    """A fixed arm and a swept one that chose the same value share their runs and their figures."""
    arms = {"SFT": ARMS["SFT"], "DFT": "dft", "SFT at 1e-3": "sft:learning_rate=1e-3"}
    assert common.main(experiment(tiny_base, ARMS=arms), ["--seeds", "2"]) == 0
    found = read()["arms"]
    assert found["SFT"]["variant"] == "sft:learning_rate=1e-3"
    assert found["SFT"]["figures"] == found["SFT at 1e-3"]["figures"]
    assert found["SFT"]["figures"]["accuracy"] == [
        accuracy(f"out/chain-sft-learning_rate-1e-3-{seed}") for seed in (0, 1)]
    assert len(made_up) == 3 * 2 + 2 * 2


def test_a_measure_that_a_run_lacks(tiny_base):
    """Figures are those that all runs of an arm have; the costs are no figures of a start."""
    run = {"after": {"eval/accuracy": 0.5, "eval/kl": 1.0}, "updates": 3, "seconds": 1.0,
           "before": {"eval/accuracy": 0.2, "eval/pass@16": 0.9}}
    other = {**run, "after": {"eval/accuracy": 0.7}}
    assert common.figures_of([run, other]) == {"accuracy": [0.5, 0.7], "updates": [3, 3],
                                               "before": [0.2, 0.2], "seconds": [1.0, 1.0]}
    assert common.figures_of([run, other], "before", "start") == {"accuracy": [0.2, 0.2],
                                                                  "pass@16": [0.9, 0.9]}
