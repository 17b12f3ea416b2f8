"""The learning rate: its course by hand, where it starts over, and that the optimizer gets it."""

import math

import pytest
import torch

import train
from conftest import TASK, run
from harness import report
from harness.flags import Settings
from rft import RFT, RFTConfig
from runs_helpers import OWN, SFT_, close, weights
from sft import PretrainConfig


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda folder: "no picture")


def rates(max_steps, kind="linear", warmup_steps=1, Config=Settings, **own):
    config = Config(learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=warmup_steps,
                    max_steps=max_steps, **own)
    return [round(train.learning_rate(config, step), 6) for step in range(max_steps)]


def test_learning_rate_by_hand():
    """Peak 1, 2 steps of warm-up, 6 steps: 1/2, 1, then from 1 towards .1 by a quarter of the way a
    step."""
    assert rates(6, "constant", 2) == [0.5, 1, 1, 1, 1, 1]
    assert rates(6, "linear", 2) == [0.5, 1, 1, 0.775, 0.55, 0.325]
    half = 1 - 0.9 * 0.5 * (1 - math.sqrt(0.5))
    assert rates(6, "cosine", 2) == pytest.approx([0.5, 1, 1, half, 0.55, 1.1 - half], abs=1e-6)
    assert rates(2, "linear", 0) == [1, 0.55]
    assert rates(2, "linear", 4) == [0.25, 0.5]


def test_with_restart_the_schedule_starts_over_with_each_round():
    """Seven steps in two rounds of four and three: each warms up over its first two steps and falls
    towards a tenth by its own end. Without --restart one fall spans all seven."""
    again = dict(warmup_steps=2, Config=RFTConfig, rounds=2, restart=True)
    assert rates(7, **again) == [0.5, 1, 1, 0.55, 0.5, 1, 1]
    assert rates(7, "constant", **again) == [0.5, 1, 1, 1, 0.5, 1, 1]
    assert rates(7, "cosine", **again) == [0.5, 1, 1, 0.55, 0.5, 1, 1]
    once = [0.5, 1, 1, 0.82, 0.64, 0.46, 0.28]
    assert rates(7, **again | dict(restart=False)) == once
    assert rates(7, warmup_steps=2) == once                          # there are no rounds
    assert rates(7, **again | dict(rounds=1)) == once
    assert rates(3, **again | dict(rounds=9)) == [0.5, 0.5, 0.5]     # no more rounds than steps
    assert rates(6, **again | dict(warmup_steps=0)) == [1, 0.7, 0.4] * 2


def test_only_rounds_change_the_course():
    """Every other algorithm's schedule is the run's."""
    for name, Algorithm in train.ALGORITHMS.items():
        config = Algorithm.Config(max_steps=7)
        assert {config.schedule(step) for step in range(7)} == {(0, 7)}, name
    assert PretrainConfig().schedule(3) == (0, 1080)


@pytest.mark.parametrize("max_steps, rounds",
                         [(10, 5), (10, 3), (7, 4), (5, 5), (11, 2), (4, 9)])
def test_the_schedule_starts_over_when_the_weights_do(tiny_base, monkeypatch, max_steps, rounds):
    """In a run: the rate is back at the peak in just the steps before which the policy became the
    start model again."""
    restarts, rate, algos = [], [], []
    init, learning_rate = RFT.__init__, train.learning_rate
    load = torch.nn.Module.load_state_dict

    def init_spy(self, *args):
        algos.append(self)
        init(self, *args)

    def load_spy(self, state, *args, **kwargs):
        if algos and rate and self is algos[-1].model:
            restarts.append(len(rate) - 1)
        return load(self, state, *args, **kwargs)

    def rate_spy(config, step):
        if len(rate) == step:
            rate.append(learning_rate(config, step))
        return learning_rate(config, step)
    monkeypatch.setattr(RFT, "__init__", init_spy)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", load_spy)
    monkeypatch.setattr(train, "learning_rate", rate_spy)
    run("--algo", "rft", "--rounds", rounds, "--restart", *OWN, *TASK, "--init_from", tiny_base,
        "--max_steps", max_steps, "--warmup_steps", 0, "--out_dir", "run", "--keep", "best",
        "--eval_problems", 2)
    assert [step for step in range(max_steps) if rate[step] == 1e-3] == [0, *restarts]
    assert len(restarts) == min(rounds, max_steps) - 1


def test_the_rate_is_in_the_optimizer(tiny_base, monkeypatch):
    """Every group of parameters is stepped with the rate of its step, of the first step too."""
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *args):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run(*SFT_, *TASK, "--init_from", tiny_base, "--max_steps", 4, "--warmup_steps", 2,
        "--learning_rate", 0.01, "--out_dir", "run")
    assert seen == [pytest.approx([rate] * 2) for rate in (0.005, 0.01, 0.01, 0.0055)]


def test_a_tiny_rate_leaves_the_weights(tiny_base):
    """With a rate of 1e-9 the weights do not move: there is no rate but the schedule's."""
    run(*SFT_, *TASK, "--init_from", tiny_base, "--max_steps", 4, "--warmup_steps", 2,
        "--learning_rate", 1e-9, "--weight_decay", 0, "--logging_steps", 1, "--out_dir", "run")
    assert close(weights("run"), weights(tiny_base), atol=1e-7)
