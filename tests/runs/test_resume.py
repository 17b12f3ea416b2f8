"""
A run that is stopped in any way and resumed equals one that was not, bit for bit.

Most runs happen in this process and last a tenth of a second; what has to be killed is a process of
its own.
"""

import errno
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from conftest import ROOT, TASK, run
from harness import report
from harness.errors import InputError
from runs_helpers import (CASES, CLOCK, DEMOS, GRPO_, OWN, SFT_, UPDATES, checkpoint, interrupted,
                          metrics, same_networks, same_numbers, summary)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda folder: "no picture")   # it outlasts a run


KILLED = """
import os, signal, sys
import torch, train
from harness import checkpoint
module = {"train": train, "torch": torch, "checkpoint": checkpoint}[sys.argv[1]]
name, n = sys.argv[2], int(sys.argv[3])
function, calls = getattr(module, name), []
def dies(*args, **kwargs):
    calls.append(None)
    if len(calls) < n:
        return function(*args, **kwargs)
    if name == "save":
        open(args[1], "wb").write(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)
setattr(module, name, dies)
train.main(sys.argv[4:])
"""


@pytest.mark.parametrize("case, module, function, call, saved", [
    ("pretrain", "train", "update", 5, 3),
    ("sft", "train", "update", 5, 3),
    ("grpo", "train", "update", 6, 3),
    ("grpo, two passes and KL", "train", "update", 10, 3),   # between the two passes of step 5
    ("dpo, semi-online", "train", "update", 5, 3),           # sampler and anchor are of step 3
    ("rft", "train", "update", 6, 3),
    ("ppo", "train", "update", 18, 3),                       # actor, critic and their optimizer
    ("sft", "torch", "save", 2, 3),                          # while step 6 is being saved
    ("sft", "checkpoint", "write_text", 3, 8),               # saved, and no summary yet
    ("pretrain", "checkpoint", "write_text", 3, 8),
])
def test_resume_after_sigkill(eight_steps, uninterrupted, case, module, function, call, saved):
    """Killed at the n-th call of a function and resumed, a run ends with the same networks, bit for
    bit, and the same log."""
    flags, whole = (*eight_steps(case), "--out_dir", "run"), uninterrupted(case)
    command = [sys.executable, "-c", KILLED, module, function, call, *flags]
    killed = subprocess.run(list(map(str, command)), env={**os.environ, "PYTHONPATH": str(ROOT)},
                            capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint("run")["step"] == saved and not os.path.exists("run/summary.json")
    assert run(*flags, "--resume") == 0
    assert same_networks("run", whole)
    assert [line["step"] for line in metrics("run")] == list(range(9))
    for clock in ("seconds", "sampling_seconds", "updating_seconds", "eval_seconds"):
        found = [line[clock] for line in metrics("run")]
        assert found == sorted(found)   # it went on from where it stopped
    assert same_numbers(metrics("run"), metrics(whole))
    assert summary("run")["after"] == summary(whole)["after"]


@pytest.mark.parametrize("case", CASES)
def test_resume_after_ctrl_c(eight_steps, uninterrupted, monkeypatch, capsys, case):
    """Ctrl-C finishes the step, saves, says how to go on and exits with 130; going on ends with the
    same networks."""
    whole = uninterrupted(case)
    with interrupted(monkeypatch, 5):
        assert run(*eight_steps(case), "--out_dir", "run") == 130
    step = math.ceil(5 / UPDATES.get(case, 1))
    assert checkpoint("run")["step"] == step
    assert [line["step"] for line in metrics("run")] == list(range(step + 1))
    said = re.search(r"go on with: python train.py (.*)", capsys.readouterr().out).group(1)
    assert train.main(shlex.split(said)) == 0   # as it is pasted into a shell
    assert same_networks("run", whole)
    assert same_numbers(metrics("run"), metrics(whole))


def test_ctrl_c_in_a_terminal(tiny_base):
    """A real SIGINT to a real process some time after the first checkpoint: exit code 130, a
    readable checkpoint."""
    command = [sys.executable, ROOT / "train.py", *SFT_, *TASK, "--init_from", tiny_base,
               "--max_steps", 10**6, "--save_steps", 5, "--logging_steps", 1000, "--out_dir", "run"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not os.path.exists("run/ckpt.pt") and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    said = r"saved run/ckpt.pt at step (\d+) of 1000000; go on with: python .* --resume"
    assert checkpoint("run")["step"] == int(re.search(said, out).group(1)) >= 5


@pytest.mark.parametrize("case", ["sft", "pretrain"])
def test_printed_commands_can_be_pasted(tiny_base, monkeypatch, capsys, case):
    """A folder whose name has a space is quoted in the command that goes on."""
    monkeypatch.setattr(train, "update", lambda *args: signal.raise_signal(signal.SIGINT))
    start = () if case == "pretrain" else ("--init_from", tiny_base)
    command = list(map(str, (*CASES[case], *start, *TASK, "--out_dir", "my run")))
    assert train.main(command) == 130
    said = shlex.split(re.search(r"go on with: (.*)", capsys.readouterr().out).group(1))
    assert said == ["python", "train.py", *command, "--resume"]


def test_ctrl_c_in_the_last_step(eight_steps, uninterrupted, monkeypatch):
    """Ctrl-C in the last step changes nothing: the run is finished and its summary whole."""
    with interrupted(monkeypatch, 8):
        assert run(*eight_steps("sft"), "--out_dir", "run") == 0
    assert summary("run")["after"] == summary(uninterrupted("sft"))["after"]


def test_a_second_ctrl_c_stops_at_once(eight_steps, monkeypatch):
    """Within the step: the last checkpoint stays, and nothing is saved."""
    update, calls = train.update, []

    def interrupted_twice(*args):
        calls.append(None)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return update(*args)
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "update", interrupted_twice)
    with pytest.raises(KeyboardInterrupt):
        run(*eight_steps("sft"), "--out_dir", "run")
    assert len(calls) == 5 and checkpoint("run")["step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_resume_a_finished_run(uninterrupted, eight_steps, capsys):
    """--resume on a finished run says so and touches nothing."""
    folder = uninterrupted("sft")
    before = (folder / "ckpt.pt").stat().st_mtime_ns
    capsys.readouterr()
    assert run(*eight_steps("sft"), "--out_dir", folder, "--resume") == 0
    assert f"{folder} is finished: 8 steps" in capsys.readouterr().out
    assert (folder / "ckpt.pt").stat().st_mtime_ns == before


def test_resume_may_change_what_is_only_watched(eight_steps, uninterrupted):
    """How often a run logs, evaluates and saves may change at the resumption, and does not change
    the weights."""
    flags = (*eight_steps("grpo"), "--out_dir", "run")
    run(*flags, "--max_minutes", 1e-6)
    assert checkpoint("run")["step"] == 1
    assert run(*flags, "--logging_steps", 2, "--eval_steps", 2, "--save_steps", 5,
               "--eval_problems", 4, "--resume") == 0
    assert [line["step"] for line in metrics("run")] == [0, 1, 2, 4, 6, 8]
    assert same_networks("run", uninterrupted("grpo"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("write failed")])
def test_full_disk_keeps_the_earlier_checkpoint(eight_steps, monkeypatch, error):
    """A disk that fills up while step 6 is saved: a readable error, step 3's file intact, no .tmp;
    --resume works."""
    save, calls = torch.save, []

    def full(content, path):
        calls.append(None)
        if len(calls) < 2:
            return save(content, path)
        with open(path, "wb") as file:
            file.write(b"half a file")
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(InputError, match="cannot write run/ckpt.pt.*earlier file is untouched"):
            run(*eight_steps("sft"), "--out_dir", "run")
    assert checkpoint("run")["step"] == 3
    assert not [name for name in os.listdir("run") if name.endswith(".tmp")]
    assert run(*eight_steps("sft"), "--out_dir", "run", "--resume") == 0


# -- stopped between two lines of the log ---------------------------------------------------------

SPARSE = {"sft": SFT_, "grpo": (*GRPO_, "--num_iterations", 2), "rm": ("--algo", "rm", *OWN)}


@pytest.fixture(scope="module")
def sparse(tiny_base, tmp_path_factory):
    """sparse(case) -> the flags of a run of 10 steps with a line every 4, and its folder"""
    made = {}

    def sparse(case):
        flags = (*SPARSE[case], *TASK, "--init_from", tiny_base, "--max_steps", 10,
                 "--logging_steps", 4, "--eval_steps", 8, "--save_steps", 3, "--eval_problems", 4)
        if case not in made:
            made[case] = tmp_path_factory.mktemp("whole") / "run"
            assert run(*flags, "--out_dir", made[case]) == 0
        return flags, made[case]
    return sparse


def stop_after(step, monkeypatch, *flags):
    """Run until Ctrl-C comes in the middle of the given step, which is finished."""
    batch_indices, calls = train.data.batch_indices, []

    def interrupting(*args):
        calls.append(None)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return batch_indices(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train.data, "batch_indices", interrupting)
        assert run(*flags) == 130


@pytest.mark.parametrize("case", SPARSE)
@pytest.mark.parametrize("stop", [2, 5, 7])
def test_a_stop_in_mid_interval_changes_no_line(sparse, monkeypatch, case, stop):
    """Ctrl-C after 2, 5 or 7 steps, with a line due after 4, 8 and 10: the resumed run's
    metrics.jsonl is the uninterrupted one's line for line, times apart: no sum is lost."""
    flags, whole = sparse(case)
    stop_after(stop, monkeypatch, *flags, "--out_dir", "run")
    assert checkpoint("run")["step"] == stop
    assert run(*flags, "--out_dir", "run", "--resume") == 0
    assert same_numbers(metrics("run"), metrics(whole))
    assert [line["step"] for line in metrics("run")] == [0, 4, 8, 10]
    times = CLOCK | {"train_seconds", "peak_memory_mb"}
    left, right = ({k: v for k, v in summary(folder).items() if k not in times}
                   for folder in ("run", whole))
    assert left == right and len(left) >= 9


@pytest.mark.parametrize("case", SPARSE)
def test_a_crash_in_mid_interval_changes_no_line(sparse, monkeypatch, case):
    """The same after a crash in step 8, from the checkpoint of step 6: the line of step 4 stays,
    and steps 5 and 6 count in that of step 8."""
    flags, whole = sparse(case)
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
    assert same_numbers(metrics("run"), metrics(whole))


def test_tokens_per_second_count_the_whole_interval(tiny_base, monkeypatch):
    """A clock that gains a second at every look: the resumed run logs the speeds of the whole one,
    because the tokens and seconds before the stop count in the line after it."""
    flags = (*GRPO_, *TASK, "--init_from", tiny_base, "--max_steps", 4, "--logging_steps", 4,
             "--eval_problems", 4)
    now = [0.0]

    def tick():
        now[0] += 1
        return now[0]
    monkeypatch.setattr(time, "time", tick)
    assert run(*flags, "--out_dir", "whole") == 0
    stop_after(2, monkeypatch, *flags, "--out_dir", "run")
    assert run(*flags, "--out_dir", "run", "--resume") == 0
    whole, resumed = metrics("whole")[-1], metrics("run")[-1]
    for speed, tokens in (("sample", "sampled_tokens"), ("train", "trained_tokens")):
        name = f"tokens_per_second/{speed}"
        assert resumed[name] == whole[name] == whole[tokens] / 4
    assert whole["sampling_seconds"] == whole["updating_seconds"] == 4


def test_a_crash_leaves_no_line_that_comes_again(eight_steps, uninterrupted, monkeypatch):
    """A line of metrics.jsonl that was written after the last checkpoint, whole or cut short, is
    left out when the run goes on."""
    with interrupted(monkeypatch, 4):
        run(*eight_steps("sft"), "--out_dir", "run")
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "nll": 99}\n{"step": 6, "nl')
    assert run(*eight_steps("sft"), "--out_dir", "run", "--resume") == 0
    assert same_numbers(metrics("run"), metrics(uninterrupted("sft")))


def test_more_than_one_stop(eight_steps, uninterrupted, monkeypatch):
    """Stopped after steps 2, 4 and 5: still the uninterrupted run."""
    flags = (*eight_steps("grpo, two passes and KL"), "--out_dir", "run")
    stop_after(2, monkeypatch, *flags)
    stop_after(2, monkeypatch, *flags, "--resume")
    stop_after(1, monkeypatch, *flags, "--resume")
    assert checkpoint("run")["step"] == 5
    assert run(*flags, "--resume") == 0
    assert same_networks("run", uninterrupted("grpo, two passes and KL"))
    assert same_numbers(metrics("run"), metrics(uninterrupted("grpo, two passes and KL")))


def test_demonstrations_straddle_batches(eight_steps):
    """What the cases above rely on: 10 demonstrations are no multiple of the batch, so a resumed
    run has to find its place within an epoch."""
    assert DEMOS[1] == 4 and DEMOS[3] % 4 and 8 * DEMOS[1] > 3 * DEMOS[3]
