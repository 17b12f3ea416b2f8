"""Shared by all tests: the path to the project's files, one thread, float64, two base models, and
how to start a run."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

# The models are so small that a second thread only costs; and on one thread sums are the same bit
# for bit.
os.environ["OMP_NUM_THREADS"] = "1"
import torch  # noqa: E402  (reads the variable)

# Where the tests run in the background, a shell lets them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "experiments"))
torch.set_num_threads(1)

pytest_plugins = ["experiment_helpers"]   # its fixtures


def script(name, *words, cwd, timeout=300, **kwargs):
    """Run `python <name>.py <words>` in the folder cwd, as a person would. -> CompletedProcess with
    stdout and stderr"""
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          **kwargs)


def train(*flags, cwd, **kwargs):
    """Run `python train.py <flags>` in the folder cwd."""
    return script("train", *flags, cwd=cwd, **kwargs)


def run(*flags):
    """The same in this process and the current folder, which saves the start of Python. -> exit
    code, or InputError"""
    import train as module
    return module.main([str(flag) for flag in flags])


# A setting of the task that learns in seconds; the easiest one, for runs of a few steps; and the
# smallest model worth running.
SMALL = ("--min_terms", 3, "--max_terms", 3, "--eval_problems", 64)
TASK = ("--min_terms", 2, "--max_terms", 2, "--eval_problems", 16)
SHAPE = ("--n_embd", 16, "--n_layer", 1, "--n_head", 2)


@pytest.fixture
def float64(monkeypatch):
    """Everything in double precision, also where the sources ask for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """The folder of a small base model, made once per session: chains of 3 terms."""
    cwd = tmp_path_factory.mktemp("base")
    done = train("--algo", "pretrain", *SMALL, "--max_steps", 700, "--eval_steps", 700,
                 "--out_dir", "base", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "base"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """The folder of a model that has been trained for 3 steps and knows nothing, made once per
    session in a second."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    assert run("--algo", "pretrain", *TASK, *SHAPE, "--max_steps", 3, "--batch_size", 8,
               "--out_dir", folder) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """The folder of another such model, for distillation."""
    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    assert run("--algo", "pretrain", *TASK, *SHAPE, "--max_steps", 3, "--batch_size", 8,
               "--base_seed", 1, "--out_dir", folder) == 0
    return folder


@pytest.fixture(scope="session")
def eight_steps(tiny_base, tiny_teacher):
    """eight_steps(case) -> the flags of a run of 8 steps that saves at steps 3, 6 and 8."""
    from runs_helpers import CASES, LOOP

    def eight_steps(case, *more):
        start = () if case == "pretrain" else ("--init_from", tiny_base)
        start += ("--teacher", tiny_teacher) if case == "distill" else ()
        return (*CASES[case], *start, *TASK, *LOOP, *more)
    return eight_steps


@pytest.fixture(scope="session")
def uninterrupted(eight_steps, tmp_path_factory):
    """uninterrupted(case) -> the folder of that run, made once per session, with its picture."""
    from harness import report
    plot, made = report.plot, {}

    def uninterrupted(case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp("uninterrupted") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(report, "plot", plot)
                assert run(*eight_steps(case), "--out_dir", made[case]) == 0
        return made[case]
    return uninterrupted
