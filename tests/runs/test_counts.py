"""What is counted and logged: updates, tokens, and lines that are the means of their intervals."""

from types import SimpleNamespace

import pytest
import torch

import data
import tasks
from conftest import TASK, run
from harness import report
from harness.log import Log
from runs_helpers import GRPO_, SFT_, checkpoint, metrics, summary
from sft import SFT


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda folder: "no picture")


def test_updates_are_steps_of_the_optimizer(tiny_base, monkeypatch):
    """Where no answer differs in reward there is no gradient, and Adam coasts: a step of the
    optimizer all the same, made with one row. `updates` counts these steps."""
    steps, step = [], torch.optim.AdamW.step

    def spy(self, *args):
        steps.append(self)
        return step(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    flags = ("--algo", "grpo", "--batch_size", 2, "--num_generations", 2, *TASK, "--max_steps", 3,
             "--num_iterations", 2, "--init_from", tiny_base, "--logging_steps", 1)
    run(*flags, "--reward", "format", "--out_dir", "flat")   # no answer shows its steps: all flat
    lines = metrics("flat")
    assert [line["frac_reward_zero_std"] for line in lines[1:]] == [1, 1, 1]
    assert [line["grad_norm"] for line in lines[1:]] == [0, 0, 0]
    trained = [line["trained_tokens"] for line in lines]
    longest = tasks.Chain(2, 2).max_new_tokens
    assert all(0 < b - a <= 2 * longest for a, b in zip(trained, trained[1:]))
    assert [line["updates"] for line in lines] == [0, 2, 4, 6] and len(steps) == 6
    saved = checkpoint("flat")["optimizer"]["state"]
    assert {int(state["step"]) for state in saved.values()} == {6}
    run(*flags, "--reward", "brevity", "--out_dir", "run")
    assert summary("run")["updates"] == summary("flat")["updates"] == 6 and len(steps) == 12


def test_tokens_are_counted_by_hand(tiny_base, monkeypatch):
    """trained_tokens is the number of completion tokens, <end>s included, that a loss has seen;
    sampled_tokens those that were drawn for training, not those of the evaluations."""
    start = (*TASK, "--init_from", tiny_base, "--logging_steps", 2)
    run(*SFT_, *start, "--max_steps", 5, "--out_dir", "sft")
    shown = tasks.Chain(2, 2).demonstrations(10, 0)
    order = SimpleNamespace(batch_size=4, seed=0, shuffle=True)
    taken = [shown[i] for step in range(5) for i in data.batch_indices(10, order, step)]
    lengths = [len(e["completion"]) + 1 for e in taken]
    assert summary("sft")["trained_tokens"] == sum(lengths)
    assert [line["trained_tokens"] for line in metrics("sft")] == [
        0, sum(lengths[:8]), sum(lengths[:16]), sum(lengths)]
    assert summary("sft")["sampled_tokens"] == 0

    drawn, rollout = [], data.rollout

    def spy(*args, **kwargs):
        batch = rollout(*args, **kwargs)
        drawn.append(int(batch["completion_mask"].sum()))
        return batch
    monkeypatch.setattr(data, "rollout", spy)
    run(*GRPO_, *start, "--max_steps", 3, "--beta", 0.1, "--out_dir", "grpo")
    assert len(drawn) == 3 and summary("grpo")["sampled_tokens"] == sum(drawn)
    assert [line["sampled_tokens"] for line in metrics("grpo")] == [0, sum(drawn[:2]), sum(drawn)]
    assert summary("grpo")["trained_tokens"] == sum(drawn)   # with a KL every row has a gradient


def test_a_line_is_the_mean_of_its_interval(tiny_base, monkeypatch):
    """With a line every 2 of 5 steps: nll and loss are the tokens' and the updates' means over just
    the steps since the last line, the last line included."""
    losses, loss = [], SFT.loss

    def spy(self, batch, log):
        own = Log()
        value = loss(self, batch, own)
        losses.append((float(value.detach()), *own.means["nll"]))
        return loss(self, batch, log)
    monkeypatch.setattr(SFT, "loss", spy)
    run(*SFT_, *TASK, "--init_from", tiny_base, "--max_steps", 5, "--logging_steps", 2,
        "--eval_steps", 4, "--out_dir", "run")
    parts, lines = [losses[0:2], losses[2:4], losses[4:5]], metrics("run")[1:]
    assert [line["loss"] for line in lines] == [
        sum(p[0] for p in part) / len(part) for part in parts]
    assert [line["nll"] for line in lines] == [
        sum(p[1] for p in part) / sum(p[2] for p in part) for part in parts]
    assert ["eval/accuracy" in line for line in metrics("run")] == [True, False, True, True]
    assert ["eval/pass@16" in line for line in metrics("run")] == [True, False, False, True]


def test_the_largest_ratio_of_an_interval_is_a_maximum(tiny_base):
    """A line's max_ratio is that of its worst step."""
    flags = (*GRPO_, *TASK, "--init_from", tiny_base, "--max_steps", 4, "--num_iterations", 2,
             "--learning_rate", 0.01, "--warmup_steps", 0)
    run(*flags, "--logging_steps", 1, "--out_dir", "each")
    run(*flags, "--logging_steps", 4, "--out_dir", "all")
    each = [line["max_ratio"] for line in metrics("each")[1:]]
    assert metrics("all")[-1]["max_ratio"] == max(each) > 1 and len(set(each)) == 4


def test_the_log_by_hand():
    """Means are those of all values since the last line, maxima the largest; totals go on."""
    log, tensor = Log(), torch.tensor
    log.share("nll", tensor(3.0), 2)
    log.share("nll", tensor(5.0), tensor(6))
    log.mean("length", tensor([1.0, 2.0, 9.0]), tensor([True, True, False]))
    log.mean("length", tensor([6.0]))
    log.mean("wrong", tensor([True, False]))
    for value in (tensor(1.5), 1.25, 2.0):
        log.max("max_ratio", value)
    log.sum("n", 4)
    log.sum("n", 3)
    assert log.means["nll"] == (8.0, 8.0) and log.totals == {"n": 7}
    assert all(isinstance(x, float) for x in log.means["nll"])
    assert log.line() == {"nll": 1, "length": 3, "wrong": 0.5, "max_ratio": 2}
    log.max("max_ratio", -1.0)
    log.share("nll", 0.0, 0)   # nothing was seen: 0, no division
    log.sum("n", 1)
    assert log.line() == {"nll": 0, "max_ratio": -1} and log.totals == {"n": 8}


def test_speeds_by_hand():
    """Tokens of the interval by the seconds spent on them; none where no token was."""
    log = Log()
    log.totals = dict(sampled_tokens=0, trained_tokens=0, sampling_seconds=0, updating_seconds=0)
    for tokens, seconds in ((10, 2), (30, 3)):
        log.sum("sampled_tokens", tokens)
        log.sum("sampling_seconds", seconds)
        assert log.line() == {"tokens_per_second/sample": tokens / seconds}
    assert log.line() == {}


def test_the_clock_adds_what_was_spent_inside(monkeypatch):
    """From 10 to 13 and from 20 to 21: four seconds in all, beside what was there."""
    times, log = iter([10.0, 13.0, 20.0, 21.0]), Log()
    monkeypatch.setattr("harness.log.time", SimpleNamespace(time=lambda: next(times)))
    log.totals["eval_seconds"] = 0.5
    for _ in range(2):
        with log.clock("eval_seconds"):
            pass
    assert log.totals == {"eval_seconds": 4.5}
