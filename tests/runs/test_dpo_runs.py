"""
Whole runs of DPO on the policy's own answers: online, offline and between. The sampler lags behind
the policy by as much as --sync_steps says.
"""

import copy
import itertools
import math
import os
import sys
from types import SimpleNamespace

import pytest

import tasks
from conftest import TASK, run
from data import Tokenizer
from dpo import DPO
from harness import checkpoint as checkpoints
from harness.evaluate import judge_answers
from runs_helpers import (checkpoint, interrupted, metrics, network, networks, same, same_numbers,
                          weights)

STEPS = 6
DPO_ = ("--algo", "dpo", "--batch_size", 4, "--num_generations", 4, "--reward", "verifier,brevity",
        "--pair_selection", "best_worst", *TASK, "--max_steps", STEPS, "--logging_steps", 1,
        "--eval_steps", 6, "--save_steps", 100, "--warmup_steps", 0, "--learning_rate", 3e-3)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)   # a picture takes longer than a run


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """runs("2", ...) -> a finished run with --sync_steps 2 and further flags, made once: its
    folder, the prompts of every step, and the weights of policy, sampler and anchor with which
    every step began."""
    made = {}

    def runs(sync_steps, *more, plain=False):
        key = (sync_steps, *more, plain)
        if key in made:
            return made[key]
        folder, steps = tmp_path_factory.mktemp("semi-online") / "run", []
        init, sample = DPO.__init__, DPO.sample

        def plain_init(self, *args):
            init(self, *args)
            self.sampler = self.model   # no copy that could lag behind

        def spy(self, examples, generator, step, log):
            policy = copy.deepcopy(self.model.state_dict())
            batch = sample(self, examples, generator, step, log)
            steps.append(SimpleNamespace(
                prompts=[e["prompt"] for e in examples], policy=policy,
                sampler=copy.deepcopy(self.sampler.state_dict()),
                anchor=copy.deepcopy(self.anchor.state_dict())))
            return batch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DPO, "sample", spy)
            if plain:
                patch.setattr(DPO, "__init__", plain_init)
            assert run(*DPO_, "--sync_steps", sync_steps, *more, "--init_from", tiny_base,
                       "--out_dir", folder) == 0
        made[key] = SimpleNamespace(folder=folder, steps=steps, weights=weights(folder),
                                    metrics=metrics(folder))
        return made[key]
    return runs


def test_there_is_something_to_learn_from(runs, tiny_base):
    """Most groups have a contrast and the weights move: otherwise the comparisons below would hold
    by default."""
    found = runs("1")
    assert sum(line["skipped_pairs"] for line in found.metrics[1:]) < 0.5 * STEPS
    before = weights(tiny_base)
    assert all((before[k] - v).abs().max() > 1e-3
               for k, v in found.weights.items() if v.dim() == 2)


def test_sync_steps_1_is_plain_online_training(runs):
    """Renewing the sampler before every batch is, bit for bit, sampling from the policy itself
    (2506.21495, s = 1)."""
    found, plain = runs("1"), runs("1", plain=True)
    assert same(found.weights, plain.weights)
    assert found.metrics[-1]["reward"] == plain.metrics[-1]["reward"]


def test_sync_steps_beyond_the_run_are_offline_training(runs):
    """inf, as many as there are steps, and more: bit for bit the same, for no renewal falls into
    the run."""
    offline = runs("inf").weights
    assert same(offline, runs(str(STEPS)).weights) and same(offline, runs("100").weights)
    assert not same(offline, runs(str(STEPS - 1)).weights)   # one renewal, one step


def test_every_setting_of_sync_steps_is_another_run(runs):
    """1, 2, 4 and inf end with four different models."""
    found = [runs(s).weights for s in ("1", "2", "4", "inf")]
    assert not any(same(a, b) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("sync_steps", ["1", "2", "4", "inf"])
def test_the_sampler_is_the_policy_of_the_last_renewal(runs, sync_steps):
    """At step t the sampler holds the policy as it was at step s floor(t / s), and the reference is
    still the base."""
    steps = runs(sync_steps).steps
    s = STEPS if sync_steps == "inf" else int(sync_steps)
    assert len(steps) == STEPS and not same(steps[1].policy, steps[0].policy)
    for t, step in enumerate(steps):
        assert same(step.sampler, steps[t // s * s].policy), t
        assert same(step.anchor, steps[0].policy), t


def test_every_setting_meets_the_same_prompts(runs):
    """The prompts of a step do not depend on the sampler's age, nor does the number of answers: s
    alone differs."""
    prompts = [[step.prompts for step in runs(s).steps] for s in ("1", "2", "4", "inf")]
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3]
    assert len(set(map(tuple, prompts[0]))) == STEPS
    assert same(runs("1").steps[1].policy, runs("inf").steps[1].policy)   # the first step is common


def test_sync_ref_moves_the_reference_with_the_sampler(runs, tiny_base):
    """The loss's reference is the policy of the last renewal, so that at --sync_steps 1 every loss
    is log 2. The KL that is reported stays that to the base, and the base stays in the checkpoint
    under its own name."""
    found = runs("2", "--sync_ref")
    for t, step in enumerate(found.steps):
        assert same(step.anchor, step.sampler)
        assert same(step.anchor, found.steps[t // 2 * 2].policy)
    assert not same(found.weights, runs("2").weights)
    at_reference = [[abs(line["loss"] - math.log(2)) < 1e-5 for line in runs(*flags).metrics[1:]]
                    for flags in (("1", "--sync_ref"), ("2", "--sync_ref"), ("1",))]
    assert at_reference == [[True] * 6, [True, False] * 3, [True] + [False] * 5]
    anchor = network(found.folder, "moving_ref_model")
    assert same(network(found.folder, "ref_model"), weights(tiny_base))
    assert same(anchor, found.steps[4].policy)
    model, base = (checkpoints.build_model(checkpoints.read(folder))
                   for folder in (found.folder, tiny_base))
    moving = copy.deepcopy(base)
    moving.load_state_dict(anchor)
    config = SimpleNamespace(**checkpoint(found.folder)["settings"])
    kls = [judge_answers(model, ref, Tokenizer("byte"), tasks.Chain(2, 2), config, True)["eval/kl"]
           for ref in (base, moving)]
    assert found.metrics[-1]["eval/kl"] == pytest.approx(kls[0]) and kls[0] > 2 * kls[1] > 0


@pytest.mark.parametrize("more", [(), ("--sync_ref",)], ids=["", "sync_ref"])
def test_resuming_between_two_renewals(runs, tiny_base, monkeypatch, more):
    """Stopped after step 3 of a run whose sampler is renewed after 4: the checkpoint holds the old
    sampler (and the moved reference), and the resumed run ends bit for bit as the uninterrupted
    one."""
    uninterrupted = runs("4", *more)
    command = (*DPO_, "--sync_steps", 4, *more, "--init_from", tiny_base, "--out_dir", "run")
    with interrupted(monkeypatch, 3):
        assert run(*command) == 130
    sampler = network("run", "sampler")
    assert checkpoint("run")["step"] == 3 and same(sampler, uninterrupted.steps[0].policy)
    assert not same(sampler, weights("run"))
    assert run(*command, "--resume") == 0
    assert same(weights("run"), uninterrupted.weights)
    assert same_numbers(metrics("run"), uninterrupted.metrics)


def test_a_run_without_any_pair_ends_well(tiny_base):
    """The base gets nothing right, so the verifier alone leaves no pair: every step is counted as
    skipped, no update is made, the weights are those of the base, and the run ends with a summary
    as usual."""
    assert run(*DPO_, "--reward", "verifier", "--init_from", tiny_base, "--out_dir", "run") == 0
    lines = metrics("run")
    assert [line["skipped_pairs"] for line in lines[1:]] == [1] * STEPS
    assert lines[-1]["updates"] == 0 and same(weights("run"), weights(tiny_base))
    assert os.path.exists("run/summary.json")


@pytest.mark.parametrize("flags", [
    *[dict(loss_type=name) for name in ("sigmoid", "robust", "hinge", "ipo", "cpo", "simpo", "orpo",
                                        "kto")],
    dict(pair_sampling="rso", rso_beta=0.1), dict(reward="majority")],
    ids=lambda flags: "-".join(map(str, flags.values())))
def test_every_loss_trains(tiny_base, flags):
    """Two steps of each loss from the command line, in micro-batches of 3 rows: finite numbers,
    moved weights."""
    more = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert run(*DPO_, "--max_steps", 2, "--num_generations", 16, "--micro_batch_size", 3, *more,
               "--init_from", tiny_base, "--out_dir", "run") == 0
    lines = metrics("run")[1:]
    assert len(lines) == 2
    if flags == dict(reward="majority"):   # noise has no majority: there may be no pair
        assert all(math.isfinite(line.get("loss", line["reward"])) for line in lines)
    else:
        assert all(math.isfinite(line["loss"]) for line in lines)
        assert not same(weights("run"), weights(tiny_base))
    assert networks("run") == {"model", "ref_model", "sampler"}
