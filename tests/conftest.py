"""Shared by all tests: the path to the project's files, the `slow` marker, two threads, one small base model."""

import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: full-size runs; not part of the default run, .ci/run runs them as well")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        deselected = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=deselected)


def train(*flags, cwd, timeout=300, **kwargs):
    """Run `python train.py <flags>` in the folder cwd, as a person would. -> CompletedProcess with stdout and stderr"""
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, flags)], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, **kwargs)


SMALL = ("--min_terms", 2, "--max_terms", 3, "--eval_problems", 64)   # a setting of the chain task that learns in seconds


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """The folder of a small base model, made once per session: chains of 2 or 3 terms."""
    cwd = tmp_path_factory.mktemp("base")
    done = train("--algo", "pretrain", *SMALL, "--max_steps", 500, "--out_dir", "base", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "base"
