"""Two runs at a time: a folder that another process writes is refused, untouched, until it ends."""

import os
import subprocess
import sys

import pytest

from conftest import TASK, run
from runs_helpers import SFT_, complaint

HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_run():
    """other_run(folder) -> a process that holds the folder, as a run does."""
    started = []

    def other_run(folder):
        os.makedirs(folder, exist_ok=True)
        started.append(subprocess.Popen([sys.executable, "-c", HOLD, folder], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]
    yield other_run
    for process in started:
        process.kill()
        process.communicate()


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["anew", "go on"])
def test_a_folder_is_one_runs_at_a_time(tiny_base, tmp_path, other_run, resume):
    """While another process has the folder of a run, nothing in it changes and it is not moved
    aside; a process that is killed has it no longer."""
    words = (*SFT_, *TASK, "--init_from", tiny_base, "--max_steps", 3, "--out_dir",
             tmp_path / "run")
    assert run(*words, "--max_minutes", 1e-9) == 0   # one step
    before, process = contents(tmp_path / "run"), other_run(str(tmp_path / "run"))
    said = complaint(run, *words, *resume)
    assert said == f"another run is writing {tmp_path / 'run'}: wait until it has ended"
    assert contents(tmp_path / "run") == before and os.listdir(tmp_path) == ["run"]
    process.kill()
    process.wait()
    assert run(*words, *resume) == 0
    assert sorted(os.listdir(tmp_path)) == (["run"] if resume else ["run", "run.1"])
    if not resume:
        assert contents(tmp_path / "run.1") == before


def test_two_runs_do_not_make_one_base_model(tmp_path, monkeypatch, other_run):
    """Two terminals in a fresh clone: the second algorithm is told whom it has to wait for."""
    monkeypatch.chdir(tmp_path)
    other_run("out/chain-pretrain-0")
    said = complaint(run, "--algo", "sft", "--max_steps", 1)
    assert said == "another run is writing out/chain-pretrain-0: wait until it has ended"
    assert os.listdir("out") == ["chain-pretrain-0"] and not os.listdir("out/chain-pretrain-0")
