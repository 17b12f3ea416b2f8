"""Shared by all tests: the path to the project's files, the `slow` marker, one thread, two base models."""

import os
import pathlib
import subprocess
import sys

import pytest

# The tests' models are so small that a second thread only costs; and sums are bit-for-bit the same on one thread.
os.environ["OMP_NUM_THREADS"] = "1"
import torch  # noqa: E402  (reads the variable)

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: full-size runs; not part of the default run, .ci/run runs them as well")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        deselected = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=deselected)


def train(*flags, cwd, timeout=300, **kwargs):
    """Run `python train.py <flags>` in the folder cwd, as a person would. -> CompletedProcess with stdout and stderr"""
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, **kwargs)


def run(*flags):
    """The same in this process and the current folder, which saves the start of Python. -> exit code, or InputError"""
    import train as module
    return module.run([str(flag) for flag in flags])


SMALL = ("--min_terms", 3, "--max_terms", 3, "--eval_problems", 64)   # a setting of the task that learns in seconds
TASK = ("--min_terms", 2, "--max_terms", 2, "--eval_problems", 16)    # the easiest one, for runs of a few steps
SHAPE = ("--n_embd", 16, "--n_layer", 1, "--n_head", 2)               # the smallest model worth running


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """The folder of a small base model, made once per session: chains of 3 terms."""
    cwd = tmp_path_factory.mktemp("base")
    done = train("--algo", "pretrain", *SMALL, "--max_steps", 700, "--eval_steps", 700, "--out_dir", "base", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "base"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """The folder of a model that has been trained for 3 steps and knows nothing, made once per session in a second."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    assert run("--algo", "pretrain", *TASK, *SHAPE, "--max_steps", 3, "--batch_size", 8, "--out_dir", folder) == 0
    return folder
