"""Numbers that are no longer numbers: a run stops, says where, and leaves a checkpoint that is
finite."""

import math
import os
import re

import pytest

from conftest import TASK, run, train
from harness import report
from harness.errors import InputError
from runs_helpers import GRPO_, SFT_, checkpoint, weights
from sft import SFT


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda folder: "no picture")


def test_nan_loss_stops_the_run(eight_steps, monkeypatch):
    """A loss that is not a number at step 5 stops the run, names the step and step 3's checkpoint,
    which is intact."""
    loss, calls = SFT.loss, []

    def broken_loss(self, batch, log):
        calls.append(None)
        return loss(self, batch, log) * (math.nan if len(calls) == 5 else 1)
    monkeypatch.setattr(SFT, "loss", broken_loss)
    with pytest.raises(InputError, match=r"not finite at step 5; the last good checkpoint is "
                                         r"run/ckpt.pt \(step 3\)"):
        run(*eight_steps("sft"), "--out_dir", "run")
    assert checkpoint("run")["step"] == 3
    assert all(w.isfinite().all() for w in weights("run").values())


@pytest.mark.parametrize("flags", [SFT_, GRPO_, (*GRPO_, "--num_iterations", 2)],
                         ids=["sft", "grpo", "grpo, two passes"])
@pytest.mark.parametrize("rate", [1e6, 1e19, 3e38])
def test_a_diverging_run_is_stopped(tiny_base, flags, rate):
    """An absurd learning rate ends in an InputError that names a checkpoint, and the checkpoint
    that is left is finite."""
    with pytest.raises(InputError,
                       match="not finite at step .* checkpoint is .* lower --learning_rate"):
        run(*flags, *TASK, "--init_from", tiny_base, "--max_steps", 8, "--warmup_steps", 0,
            "--learning_rate", rate, "--save_steps", 1, "--logging_steps", 1, "--eval_steps", 1,
            "--out_dir", "run")
    left = weights("run" if os.path.exists("run/ckpt.pt") else tiny_base)
    assert all(w.isfinite().all() for w in left.values())


def test_a_diverging_run_exits_with_2(tiny_base):
    """The same as a command: exit code 2 and one line on stderr."""
    absurd = ("--warmup_steps", 0, "--learning_rate", 1e30)
    done = train(*SFT_, *TASK, *absurd, "--init_from", tiny_base, "--out_dir", "run", cwd=".")
    assert done.returncode == 2 and re.fullmatch(r"error: .* not finite .*\n", done.stderr), \
        done.stderr
