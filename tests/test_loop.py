"""
The loop by itself: the schedule, what is logged and saved, what a resumed run takes up, and in what
order the data come. Compared with numbers worked out here, or with a run that was not stopped.
"""

import json
import math
import os
import random
import re
import signal
from types import SimpleNamespace

import numpy
import pytest
import torch

import data
import train
from conftest import TASK, run
from sft import SFT

OWN = ("--batch_size", 4, "--num_generations", 4, "--reward", "verifier,brevity")
DEMOS = ("--batch_size", 4, "--num_demonstrations", 10)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.report, "pyplot", lambda: None)      # pictures take time


def checkpoint(folder):
    return torch.load(os.path.join(folder, "ckpt.pt"), weights_only=True)


def metrics(folder):
    """The lines of metrics.jsonl without what the clock says."""
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in file]


def summary(folder):
    with open(os.path.join(folder, "summary.json")) as file:
        return json.load(file)


# -- the schedule ----------------------------------------------------------------------------------


def rates(max_steps, lr_scheduler_type="linear", warmup_steps=1, **own):
    args = SimpleNamespace(learning_rate=1.0, lr_scheduler_type=lr_scheduler_type,
                           warmup_steps=warmup_steps, max_steps=max_steps, **own)
    return [round(train.learning_rate(args, step), 6) for step in range(max_steps)]


def test_with_restart_the_schedule_starts_over_with_each_round():
    """Seven steps in two rounds of four and three: each warms up over its first two steps and falls
    towards a tenth by its own end. Without --restart one fall spans all seven."""
    again = dict(warmup_steps=2, source="self", rounds=2, restart=True)
    assert rates(7, **again) == [0.5, 1, 1, 0.55, 0.5, 1, 1]
    assert rates(7, "constant", **again) == [0.5, 1, 1, 1, 0.5, 1, 1]
    assert rates(7, "cosine", **again) == [0.5, 1, 1, 0.55, 0.5, 1, 1]
    once = [0.5, 1, 1, 0.82, 0.64, 0.46, 0.28]
    assert rates(7, **again | dict(restart=False)) == once
    assert rates(7, **again | dict(source="demos")) == once     # then there are no rounds
    assert rates(7, **again | dict(rounds=1)) == once
    assert rates(3, **again | dict(rounds=9)) == [0.5, 0.5, 0.5]    # no more rounds than steps
    assert rates(6, warmup_steps=0, source="self", rounds=2, restart=True) == [1, 0.7, 0.4] * 2


@pytest.mark.parametrize("max_steps, rounds", [(10, 5), (10, 3), (7, 4), (5, 5), (11, 2), (4, 9)])
def test_the_schedule_starts_over_when_the_weights_do(tiny_base, monkeypatch, max_steps, rounds):
    """In a run: the rate is back at the peak in just the steps before which the policy became the
    start model again."""
    restarts, rate = [], []
    load, learning_rate = train.GPT.load_state_dict, train.learning_rate
    algos = []
    monkeypatch.setattr(SFT, "__init__", spy_on(SFT.__init__, lambda self, *_: algos.append(self)))

    def load_spy(self, state, *args, **kwargs):
        if algos and self is algos[-1].model:
            restarts.append(len(rate) - 1)
        return load(self, state, *args, **kwargs)

    def rate_spy(args, step):
        if len(rate) == step:
            rate.append(learning_rate(args, step))
        return learning_rate(args, step)
    monkeypatch.setattr(train.GPT, "load_state_dict", load_spy)
    monkeypatch.setattr(train, "learning_rate", rate_spy)
    run("--algo", "sft", "--source", "self", "--rounds", rounds, "--restart", *OWN, *TASK,
        "--init_from", tiny_base, "--max_steps", max_steps, "--warmup_steps", 0, "--out_dir", "run",
        "--keep", "best", "--eval_problems", 2)
    assert [step for step in range(max_steps) if rate[step] == 1e-3] == [0, *restarts]
    assert len(restarts) == min(rounds, max_steps) - 1


def spy_on(method, see):
    def spy(*args, **kwargs):
        see(*args)
        return method(*args, **kwargs)
    return spy


def test_the_rate_is_in_the_optimizer(tiny_base, monkeypatch):
    """Every group of parameters is stepped with the rate of its step, of the first step too."""
    seen = []
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_on(
        torch.optim.AdamW.step, lambda self: seen.append([g["lr"] for g in self.param_groups])))
    run("--algo", "sft", *DEMOS, *TASK, "--init_from", tiny_base, "--max_steps", 4,
        "--warmup_steps", 2, "--learning_rate", 0.01, "--out_dir", "run")
    assert seen == [pytest.approx([rate] * 2) for rate in (0.005, 0.01, 0.01, 0.0055)]


# -- stopped in the middle of an interval ----------------------------------------------------------

CASES = {"sft": ("--algo", "sft", *DEMOS), "grpo": ("--algo", "grpo", *OWN, "--num_iterations", 2),
         "rm": ("--algo", "rm", *OWN)}


@pytest.fixture(scope="module")
def uninterrupted(tiny_base, tmp_path_factory):
    """uninterrupted(case) -> the flags of a run of 10 steps with a line every 4, and its folder"""
    made = {}

    def uninterrupted(case):
        flags = (*CASES[case], *TASK, "--init_from", tiny_base, "--max_steps", 10,
                 "--logging_steps", 4, "--eval_steps", 8, "--save_steps", 3, "--eval_problems", 4)
        if case not in made:
            made[case] = tmp_path_factory.mktemp("whole") / "run"
            assert run(*flags, "--out_dir", made[case]) == 0
        return flags, made[case]
    return uninterrupted


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stop", [2, 5, 7])
def test_a_stop_in_mid_interval_changes_no_line(uninterrupted, monkeypatch, case, stop):
    """Ctrl-C after 2, 5 or 7 steps, with a line due after 4, 8 and 10: the resumed run's
    metrics.jsonl is the uninterrupted one's line for line, times apart: no sum is lost."""
    flags, whole = uninterrupted(case)
    stop_after(stop, monkeypatch, *flags, "--out_dir", "run")
    assert checkpoint("run")["step"] == stop
    assert run(*flags, "--out_dir", "run", "--resume") == 0
    assert metrics("run") == metrics(whole)
    assert [line["step"] for line in metrics("run")] == [0, 4, 8, 10]
    left, right = ({k: v for k, v in summary(folder).items() if not re.search("second|peak", k)}
                   for folder in ("run", whole))
    assert left == right and len(left) >= 9


def stop_after(step, monkeypatch, *flags):
    """Run until Ctrl-C comes in the middle of the given step, which is finished."""
    collect, calls = train.data.batch_indices, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return collect(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train.data, "batch_indices", interrupted)
        assert run(*flags) == 130


@pytest.mark.parametrize("case", CASES)
def test_a_crash_in_mid_interval_changes_no_line(uninterrupted, monkeypatch, case):
    """The same after a crash in step 8, from the checkpoint of step 6: the line of step 4 stays,
    and steps 5 and 6 count in that of step 8."""
    flags, whole = uninterrupted(case)
    update, calls = train.update, []

    def crashing(*args):
        calls.append(None)
        if len(calls) > 7 * (2 if case == "grpo" else 1):
            raise RuntimeError
        return update(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", crashing)
        with pytest.raises(RuntimeError):
            run(*flags, "--out_dir", "run")
    assert checkpoint("run")["step"] == 6
    assert run(*flags, "--out_dir", "run", "--resume") == 0
    assert metrics("run") == metrics(whole)


def test_tokens_per_second_count_the_whole_interval(tiny_base, monkeypatch):
    """A clock that gains a second at every look: the resumed run logs the speeds of the whole one,
    because the tokens and seconds before the stop count in the line after it."""
    flags = ("--algo", "grpo", *OWN, *TASK, "--init_from", tiny_base, "--max_steps", 4,
             "--logging_steps", 4, "--eval_problems", 4)
    now = [0.0]

    def tick():
        now[0] += 1
        return now[0]
    monkeypatch.setattr(train.time, "time", tick)
    assert run(*flags, "--out_dir", "whole") == 0
    stop_after(2, monkeypatch, *flags, "--out_dir", "run")
    assert run(*flags, "--out_dir", "run", "--resume") == 0

    def speeds(folder):
        with open(os.path.join(folder, "metrics.jsonl")) as file:
            line = [json.loads(line) for line in file][-1]
        return line["tokens_per_second/sample"], line["tokens_per_second/train"], line
    whole, resumed = speeds("whole"), speeds("run")
    assert whole[:2] == resumed[:2]
    assert whole[0] == whole[2]["sampled_tokens"] / 4 and whole[1] == whole[2]["trained_tokens"] / 4


def test_the_base_counts_in_a_resumed_run_too(monkeypatch):
    """pretrain_seconds is what the base took, also when the run that made it was stopped."""
    monkeypatch.setitem(train.PRETRAIN, "max_steps", 2)
    monkeypatch.setitem(train.PRETRAIN, "batch_size", 4)
    flags = ("--algo", "sft", *DEMOS, "--max_steps", 3, "--eval_problems", 2, "--out_dir", "run")
    run("--algo", "pretrain", "--eval_problems", 2)
    stop_after(1, monkeypatch, *flags)
    assert run(*flags, "--resume") == 0
    assert summary("run")["pretrain_seconds"] == summary("out/chain-pretrain-0")["seconds"] > 0


def test_ctrl_c_twice_stops_at_once(tiny_base, monkeypatch, capsys):
    """The second Ctrl-C does not wait for the step to end, and the handler of before is back."""
    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the step went on")
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--algo", "sft", *DEMOS, *TASK, "--init_from", tiny_base, "--out_dir", "run")
    assert signal.getsignal(signal.SIGINT) is before and not os.path.exists("run/ckpt.pt")
    assert "stopping after this step" in capsys.readouterr().out


def test_random_states_by_round_trip():
    """Python's, numpy's and torch's generators draw again what they drew after they were saved."""
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item(), random.gauss(0, 1)
    draw()
    states = train.random_states()
    drawn = draw()
    assert draw() != drawn
    train.set_random_states(states)
    assert draw() == drawn


# -- one update ------------------------------------------------------------------------------------


class Line:
    """An algorithm of one weight w, at first 1, whose loss is the sum of its rows times w."""
    rows_together = 1

    def __init__(self):
        self.w = torch.nn.Parameter(torch.ones(1))
        self.unused = torch.nn.Parameter(torch.ones(1))
        self.networks = {"model": torch.nn.ParameterList([self.w, self.unused])}

    def loss(self, batch):
        rows = batch["completion_ids"].float().sum()
        return rows * self.w.sum(), {"rows": (rows, 1)}


def batch(*rows):
    n = len(rows)
    return {"prompt_ids": torch.zeros(n, 1, dtype=torch.long), "prompt_index": torch.arange(n),
            "prompt_mask": torch.ones(n, 1, dtype=torch.bool),
            "completion_ids": torch.tensor(rows)[:, None],
            "completion_mask": torch.ones(n, 1, dtype=torch.bool)}


@pytest.mark.parametrize("max_grad_norm, moved", [(0, 6.0), (2.0, 2.0), (6.0, 6.0), (9.0, 6.0)])
@pytest.mark.parametrize("micro_batch_size", [0, 1, 2])
def test_an_update_by_hand(max_grad_norm, moved, micro_batch_size):
    """Rows 1, 2 and 3: loss 6 and gradient 6, in parts or whole. With a rate of 1 the weight falls
    by the gradient's length, or by max_grad_norm where that is shorter; 0 shortens nothing."""
    algo, totals = Line(), {}
    args = SimpleNamespace(device="cpu", dtype="float32", micro_batch_size=micro_batch_size,
                           max_grad_norm=max_grad_norm)
    optimizer = torch.optim.SGD([algo.w, algo.unused], lr=1.0)
    assert train.update(args, algo, optimizer, batch(1, 2, 3), totals) == 3
    assert algo.w.item() == pytest.approx(1 - moved, abs=1e-4) and algo.unused.item() == 1
    parts = {0: 1, 1: 3, 2: 2}[micro_batch_size]
    assert totals == {"rows": (6.0, float(parts)), "loss": (6.0, 1.0), "grad_norm": (6.0, 1.0)}
    assert train.update(args, algo, optimizer, None, totals) == 0       # nothing is left of before
    assert algo.w.item() == pytest.approx(1 - moved, abs=1e-4)
    assert totals["grad_norm"] == (6.0, 2.0)


@pytest.mark.parametrize("row", [math.inf, math.nan])
def test_an_update_that_is_not_finite_moves_nothing(row):
    """It raises before the optimizer steps, and nothing of it is logged as loss."""
    algo, totals = Line(), {}
    args = SimpleNamespace(device="cpu", dtype="float32", micro_batch_size=0, max_grad_norm=1.0)
    with pytest.raises(FloatingPointError):
        train.update(args, algo, torch.optim.SGD([algo.w], lr=1.0), batch(row), totals)
    assert algo.w.item() == 1 and "loss" not in totals


# -- what is counted -------------------------------------------------------------------------------


def test_updates_are_steps_of_the_optimizer(tiny_base, monkeypatch):
    """Where no answer differs in reward there is no gradient, and Adam coasts: a step of the
    optimizer all the same. `updates` counts these steps."""
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_on(torch.optim.AdamW.step, steps.append))
    flags = ("--algo", "grpo", "--batch_size", 2, "--num_generations", 2, *TASK, "--max_steps", 3,
             "--num_iterations", 2, "--init_from", tiny_base, "--logging_steps", 1)
    run(*flags, "--reward", "format", "--out_dir", "flat")     # no answer shows its steps: all flat
    assert [line["frac_reward_zero_std"] for line in metrics("flat")[1:]] == [1, 1, 1]
    assert [line["trained_tokens"] for line in metrics("flat")] == [0, 0, 0, 0]
    assert [line["updates"] for line in metrics("flat")] == [0, 2, 4, 6] and len(steps) == 6
    saved = checkpoint("flat")["optimizer"]["state"]
    assert {int(state["step"]) for state in saved.values()} == {6}
    run(*flags, "--reward", "brevity", "--out_dir", "run")
    assert summary("run")["updates"] == summary("flat")["updates"] == 6 and len(steps) == 12


def test_tokens_are_counted_by_hand(tiny_base, monkeypatch):
    """trained_tokens is the number of completion tokens, <end>s included, that a loss has seen;
    sampled_tokens those that were drawn for training, not those of the evaluations."""
    start = (*TASK, "--init_from", tiny_base, "--logging_steps", 2)
    run("--algo", "sft", *DEMOS, *start, "--max_steps", 5, "--out_dir", "sft")
    shown = data.demonstrations(data.Chain(2, 2), 10, seed=0)
    taken = [shown[i] for step in range(5) for i in data.batch_indices(10, 4, step, seed=0)]
    lengths = [len(e["completion"]) + 1 for e in taken]
    assert summary("sft")["trained_tokens"] == sum(lengths)
    assert [line["trained_tokens"] for line in metrics("sft")] == [
        0, sum(lengths[:8]), sum(lengths[:16]), sum(lengths)]
    assert summary("sft")["sampled_tokens"] == 0

    drawn, rollout = [], data.rollout

    def spy(*args, **kwargs):
        batch, numbers = rollout(*args, **kwargs)
        drawn.append(int(batch["completion_mask"].sum()))
        return batch, numbers
    monkeypatch.setattr(data, "rollout", spy)
    run("--algo", "grpo", *OWN, *start, "--max_steps", 3, "--beta", 0.1, "--out_dir", "grpo")
    assert len(drawn) == 3 and summary("grpo")["sampled_tokens"] == sum(drawn)
    assert [line["sampled_tokens"] for line in metrics("grpo")] == [0, sum(drawn[:2]), sum(drawn)]
    assert summary("grpo")["trained_tokens"] == sum(drawn)     # with a KL every row has a gradient


def test_a_line_is_the_mean_of_its_interval(tiny_base, monkeypatch):
    """With a line every 2 of 5 steps: nll and loss are the tokens' and the updates' means over just
    the steps since the last line, the last line included."""
    losses, loss = [], SFT.loss

    def spy(self, batch):
        value, numbers = loss(self, batch)
        losses.append((float(value.detach()), *(float(n) for n in numbers["nll"])))
        return value, numbers
    monkeypatch.setattr(SFT, "loss", spy)
    run("--algo", "sft", *DEMOS, *TASK, "--init_from", tiny_base, "--max_steps", 5,
        "--logging_steps", 2, "--eval_steps", 4, "--out_dir", "run")
    parts, lines = [losses[0:2], losses[2:4], losses[4:5]], metrics("run")[1:]
    assert [line["loss"] for line in lines] == [
        sum(p[0] for p in part) / len(part) for part in parts]
    assert [line["nll"] for line in lines] == [
        sum(p[1] for p in part) / sum(p[2] for p in part) for part in parts]
    assert ["eval/accuracy" in line for line in metrics("run")] == [True, False, True, True]
    assert ["eval/pass@16" in line for line in metrics("run")] == [True, False, False, True]
    assert [line["learning_rate"] for line in lines] == pytest.approx([2e-4, 4e-4, 5e-4])


def test_the_largest_ratio_of_an_interval_is_a_maximum(tiny_base):
    """Names that begin with max are not averaged: a line's max_ratio is that of its worst step."""
    flags = ("--algo", "grpo", *OWN, *TASK, "--init_from", tiny_base, "--max_steps", 4,
             "--num_iterations", 2, "--learning_rate", 0.01, "--warmup_steps", 0)
    run(*flags, "--logging_steps", 1, "--out_dir", "each")
    run(*flags, "--logging_steps", 4, "--out_dir", "all")
    each = [line["max_ratio"] for line in metrics("each")[1:]]
    assert metrics("all")[-1]["max_ratio"] == max(each) > 1 and len(set(each)) == 4


def test_sums_by_hand():
    """add: pairs are summed apart, numbers added up; of names with max the largest is kept."""
    totals, tensor = {}, torch.tensor
    for numbers in ({"nll": (tensor(3.0), 2), "max_ratio": tensor(1.5), "n": tensor(4)},
                    {"nll": (tensor(5.0), tensor(6)), "max_ratio": 1.25, "n": 3},
                    {"max_ratio": 2.0, "loss": (1, 1)}):
        train.add(totals, numbers)
    assert totals == {"nll": (8.0, 8.0), "max_ratio": 2.0, "n": 7, "loss": (1.0, 1.0)}
    assert all(isinstance(x, float) for x in totals["nll"]) and isinstance(totals["n"], int)


# -- the order of the data -------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["pretrain", "sft", "sft self", "dft", "dpo", "rm", "ppo", "grpo"])
def test_the_seed_decides_which_examples_a_step_sees(tiny_base, monkeypatch, algo):
    """Two runs with one seed see the same examples in the same steps; another seed sees others,
    even where the set of examples is the same. A corpus is read in order."""
    name, seen = algo.split()[0], {}
    cls = train.ALGORITHMS[name]
    examples = [{"prompt": f"{a}{o}{b}=", "completion": "1", "answer": "1", "chosen": "1",
                 "rejected": "2"} for a in range(4) for o in "+-" for b in range(2)]
    monkeypatch.setattr(cls, "examples", lambda self, seed: examples)
    collect = cls.collect

    def spy(self, batch, generator, step=0):
        seen.setdefault(key, []).append(tuple(examples.index(e) for e in batch))
        return collect(self, batch, generator, step)
    monkeypatch.setattr(cls, "collect", spy)
    monkeypatch.setattr(cls, "evaluate", lambda self, args: {}, raising=False)
    more = ("--source", "self") if algo == "sft self" else ()
    start = ("--n_embd", 4, "--n_head", 1, "--n_layer", 1) if name == "pretrain" else (
        "--init_from", tiny_base)
    for key, seed in (("first", 0), ("again", 0), ("other", 1)):
        flag = "--base_seed" if name in ("pretrain", "rm") else "--seed"
        run("--algo", name, *more, *start, *TASK, "--batch_size", 4, "--max_steps", 6, flag, seed,
            "--save_steps", 100, "--out_dir", key)
    assert seen["first"] == seen["again"] and len(seen["first"]) == 6
    first = sum(seen["first"], ())
    assert sorted(first[:16]) == list(range(16))               # each once an epoch
    if name == "pretrain":
        assert first == seen["other"][0] + sum(seen["other"][1:], ()) == (*range(16), *range(8))
    else:
        assert seen["first"][0] != seen["other"][0] and list(first[:16]) != list(range(16))
        assert first[16:] != first[:8]                         # another order in each epoch
