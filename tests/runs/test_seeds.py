"""
The same command gives the same numbers: a run depends on its flags alone, and a seed decides all
that is random in it.
"""

import random

import pytest
import torch

import tasks
import train
from conftest import TASK, run
from grpo import GRPO
from harness import evaluate, report
from runs_helpers import (CASES, UPDATES, close, metrics, same_networks, same_numbers, weights)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda folder: "no picture")   # it outlasts a run


@pytest.mark.parametrize("case", CASES)
def test_same_seed_same_run(eight_steps, uninterrupted, case):
    """After any use of the global generators a run ends with the same networks and the same log."""
    whole = uninterrupted(case)
    torch.manual_seed(99)
    random.seed(99)
    assert run(*eight_steps(case), "--out_dir", "run") == 0
    assert same_networks("run", whole)
    assert same_numbers(metrics("run"), metrics(whole))


@pytest.mark.parametrize("case", CASES)
def test_another_seed_another_run(eight_steps, uninterrupted, case):
    """--seed (of a base or reward model: --base_seed) changes the run."""
    flag = "--base_seed" if case in ("pretrain", "rm") else "--seed"
    assert run(*eight_steps(case, flag, 1), "--out_dir", "run") == 0
    assert not close(weights("run"), weights(uninterrupted(case)), atol=1e-4)


def test_every_step_has_its_own_problems_and_its_own_draw(eight_steps, monkeypatch):
    """16 problems in batches of 4: each once in 4 steps, then in a new order; no step draws with
    another's seed."""
    steps, sample = [], GRPO.sample

    def spy(self, examples, generator, step, log):
        steps.append(([e["prompt"] for e in examples], generator.initial_seed()))
        return sample(self, examples, generator, step, log)
    monkeypatch.setattr(GRPO, "sample", spy)
    for seed in range(2):
        run(*eight_steps("grpo"), "--num_prompts", 16, "--seed", seed, "--out_dir", f"run{seed}")
    first, second = (sum((prompts for prompts, _ in part), []) for part in (steps[:4], steps[4:8]))
    problems = [problem["prompt"] for problem in tasks.Chain(2, 2).problems("train", 16, 0)]
    assert sorted(first) == sorted(second) == sorted(problems) and first != second
    assert len({drawn for _, drawn in steps}) == 16


@pytest.mark.parametrize("algo", train.ALGORITHMS)
def test_the_seed_decides_which_examples_a_step_sees(tiny_base, tiny_teacher, monkeypatch, algo):
    """Two runs with one seed see the same examples in the same steps; another seed sees others,
    even where the set of examples is the same. A corpus is read in order."""
    Algorithm, seen = train.ALGORITHMS[algo], {}
    examples = [{"prompt": f"{a}{o}{b}=", "completion": "1", "answer": "1", "chosen": "1",
                 "rejected": "2"} for a in range(4) for o in "+-" for b in range(2)]
    sample = Algorithm.sample

    def spy(self, batch, generator, step, log):
        seen.setdefault(key, []).append(tuple(examples.index(e) for e in batch))
        return sample(self, batch, generator, step, log)
    monkeypatch.setattr(Algorithm, "examples", lambda self: examples)
    monkeypatch.setattr(Algorithm, "sample", spy)
    monkeypatch.setattr(evaluate, "evaluate", lambda algo, full: {})
    start = ("--n_embd", 4, "--n_head", 1, "--n_layer", 1) if algo == "pretrain" else (
        "--init_from", tiny_base)
    start += ("--teacher", tiny_teacher) if algo == "distill" else ()
    flag = "--base_seed" if algo in ("pretrain", "rm") else "--seed"
    for key, seed in (("first", 0), ("again", 0), ("other", 1)):
        run("--algo", algo, *start, *TASK, "--batch_size", 4, "--max_steps", 6, flag, seed,
            "--save_steps", 100, "--out_dir", key)
    assert seen["first"] == seen["again"] and len(seen["first"]) == 6
    first = sum(seen["first"], ())
    assert sorted(first[:16]) == list(range(16))   # each once an epoch
    if algo == "pretrain":
        assert first == sum(seen["other"], ()) == (*range(16), *range(8))
    else:
        assert seen["first"][0] != seen["other"][0] and list(first[:16]) != list(range(16))
        assert first[16:] != first[:8]             # another order in each epoch


# -- what a run does to the weights ---------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("pretrain", "rm")])
def test_training_moves_the_weights(uninterrupted, tiny_base, case):
    """Eight steps change every matrix by more than rounding could; otherwise the comparisons of
    weights would prove nothing."""
    before, after = weights(tiny_base), weights(uninterrupted(case))
    assert all((before[name] - after[name]).abs().max() > 1e-3
               for name in before if before[name].dim() == 2)


@pytest.mark.parametrize("case", [case for case in CASES if case != "pretrain"])
def test_micro_batches_change_no_result(eight_steps, tiny_base, monkeypatch, case):
    """A batch in micro-batches of 3 rows (of 2 where pairs stay together) trains to the same
    weights up to rounding."""
    flags = eight_steps(case, "--max_steps", 4, "--warmup_steps", 0)
    Algorithm, rows = train.ALGORITHMS[CASES[case][1]], []
    loss = Algorithm.loss
    run(*flags, "--out_dir", "whole")

    def spy(self, micro, log):
        rows.append(len(micro["completion_ids"]))
        return loss(self, micro, log)
    monkeypatch.setattr(Algorithm, "loss", spy)
    run(*flags, "--micro_batch_size", 3, "--out_dir", "split")
    assert set(rows) <= ({2} if CASES[case][1] in ("dpo", "rm") else {1, 2, 3})
    assert len(rows) > 4 * UPDATES.get(case, 1)
    assert close(weights("whole"), weights("split"), atol=1e-4)
    assert case == "rm" or not close(weights("whole"), weights(tiny_base), atol=1e-3)
