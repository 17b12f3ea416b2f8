"""
Several processes, one run (harness/ranks.py): two of them make the updates of one, for every
algorithm; they end together; and a run goes on with another number of them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import two_ranks
from conftest import ROOT, TASK, run, train
from harness import ranks
from harness.log import Log

LOOP = ("--batch_size", 5, "--logging_steps", 1)


def start(words, rank, port, **more):
    """One rank of two, in a process of its own."""
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen([sys.executable, *map(str, words)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def start_two(*words, **more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(words, rank, port, **more) for rank in (0, 1)]


def finish(processes):
    """[(exit code, stdout, stderr)]"""
    return [(p.returncode, *said) for p, said in
            [(p, p.communicate(timeout=120)) for p in processes]]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "found.pt"
    for code, _, stderr in finish(start_two(ROOT / "tests/two_ranks.py", path)):
        assert code == 0, stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", two_ranks.VARIANTS)
def test_two_ranks_make_the_updates_of_one(name, by_two, float64):
    """From the same batch, in as many updates: gradients, weights and figures agree to 1e-10,
    whatever normalises the loss, and also where a rank has no row."""
    two = by_two[name]
    one = two_ranks.steps(name, two["batch"])
    assert len(one["gradients"]) == len(two["gradients"]) > 0
    assert max(g.abs().max() for g in one["gradients"]) > 1e-3
    for a, b in zip([*one["gradients"], one["weights"]], [*two["gradients"], two["weights"]]):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)
    for figure, value in one["log"].items():
        if not figure.startswith("tokens_per_second"):
            assert two["log"][figure] == pytest.approx(value, abs=1e-10), figure


def test_what_is_not_sampled_is_what_one_process_takes(by_two, float64):
    """Demonstrations, pairs and documents: the very batch; and what was sampled is counted once."""
    for name in ("pretrain", "sft", "sft of one", "dft asft", "dpo of one pair"):
        one, two = two_ranks.steps(name), by_two[name]
        assert one["batch"].keys() == two["batch"].keys() and one["totals"] == two["totals"]
        assert all(torch.equal(one["batch"][key], two["batch"][key]) for key in one["batch"])
    batch, totals = by_two["grpo grpo"]["batch"], by_two["grpo grpo"]["totals"]
    assert totals["sampled_tokens"] == batch["completion_mask"].sum() > 0
    assert len(batch["rewards"]) == 20 and totals["updates"] == 4


def test_ranks_draw_random_numbers_of_their_own(monkeypatch):
    """Two ranks do not sample alike; what both draw together goes on alike."""
    monkeypatch.setattr(ranks, "SIZE", 2)
    own, together = [], []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "RANK", rank)
        generator = torch.Generator().manual_seed(3)
        own.append(torch.rand(4, generator=ranks.own_generator(generator)))
        together.append(torch.rand(4, generator=generator))
    assert torch.equal(*together) and not torch.isclose(*own).any()
    monkeypatch.setattr(ranks, "SIZE", 1)
    assert ranks.own_generator(generator) is generator


@pytest.mark.parametrize("n, size, together, lengths", [
    (5, 2, 1, [3, 2]), (6, 2, 2, [4, 2]), (2, 3, 1, [1, 1, 0]), (2, 2, 2, [2, 0]),
    (0, 2, 1, [0, 0]), (7, 1, 1, [7])])
def test_shares(n, size, together, lengths, monkeypatch):
    """Every row belongs to one rank, the shares are nearly equal, and pairs stay together."""
    found = []
    monkeypatch.setattr(ranks, "SIZE", size)
    for rank in range(size):
        monkeypatch.setattr(ranks, "RANK", rank)
        found.append(list(range(n))[ranks.share(n, together)])
    assert sum(found, []) == list(range(n)) and sorted(map(len, found)) == sorted(lengths)
    assert all(len(rows) % together == 0 for rows in found)


def test_figures_of_all_ranks_are_those_of_one(monkeypatch):
    """A mean over 1 and 3 tokens is that of 4 tokens: 3, and not 4. Only rank 0 keeps it."""
    one, other = Log(), Log()
    one.mean("loss", [6.0])
    other.mean("loss", [1.0, 1.0, 4.0])
    other.max("ratio", 2.0)
    said = [(log.means, log.maxima) for log in (one, other)]
    monkeypatch.setattr(ranks, "everyone", lambda value: said)
    monkeypatch.setattr(ranks, "RANK", 1)
    assert other.line() == {}
    monkeypatch.setattr(ranks, "RANK", 0)
    assert one.line() == {"loss": 3.0, "ratio": 2.0}


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def run_two(tiny_base, tmp_path):
    """run_two(*flags) -> two ranks of train.py, started."""
    def run_two(*flags):
        return start_two(ROOT / "train.py", "--init_from", tiny_base, *TASK, *LOOP, *flags,
                         cwd=tmp_path)
    return run_two


def lines(folder):
    with open(folder / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def test_a_run_of_two(run_two, tiny_base, tmp_path):
    """SFT by two ranks has the figures of one process, to the last bits, and rank 1 is silent. A
    run that two have stopped goes on with one, and the other way round."""
    flags = ("--algo", "sft", "--max_steps", 4)
    all_flags = (*flags, "--init_from", tiny_base, *TASK, *LOOP)

    def with_one(*more):
        assert train(*all_flags, *more, cwd=tmp_path).returncode == 0

    def with_two(*more):
        (code, said, wrong), (other_code, *nothing) = finish(run_two(*flags, *more))
        assert (code, other_code, nothing) == (0, 0, ["", ""]) and "files: " in said, wrong
    with_one("--out_dir", "one")
    with_two("--out_dir", "two")
    step, at_once = ("--out_dir", "turns"), ("--max_minutes", 1e-9)   # which ends after a step
    with_two(*step, *at_once)
    with_one(*step, *at_once, "--resume")
    with_two(*step, "--resume")
    one, two, turns = (lines(tmp_path / name) for name in ("one", "two", "turns"))
    assert [line["step"] for line in turns] == [0, 1, 2, 3, 4]
    for found in (two, turns):
        for a, b in zip(one, found, strict=True):
            for name in ("loss", "nll", "grad_norm", "eval/kl", "trained_tokens"):
                if name in a:
                    assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name
    assert (tmp_path / "two/config.json").read_text() == \
        (tmp_path / "one/config.json").read_text().replace('"one"', '"two"')


def saved(folder):
    """Wait for the folder's first checkpoint."""
    for _ in range(600):
        if (folder / "ckpt.pt").exists():
            return
        time.sleep(0.1)
    raise AssertionError("no checkpoint")


def test_a_rank_that_dies_ends_the_run_in_one_line(run_two, tmp_path):
    """The other rank says what to do, without a traceback; the last checkpoint stays."""
    both = run_two("--algo", "grpo", "--max_steps", 10000, "--save_steps", 1, "--out_dir", "run")
    saved(tmp_path / "run")
    both[1].kill()
    (code, _, wrong), (killed, *_) = finish(both)
    assert killed == -signal.SIGKILL and code == 2 and wrong.count("\n") == 1, wrong
    assert wrong.startswith("error: one of the 2 ranks has ended") and "--resume" in wrong
    assert torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"] > 0


def test_ctrl_c_ends_all_ranks_at_the_same_step(run_two, tmp_path):
    """Also where it reaches one of them alone: exit code 130, saved, and the command to go on."""
    both = run_two("--algo", "grpo", "--max_steps", 10000, "--save_steps", 1, "--out_dir", "run")
    saved(tmp_path / "run")
    both[1].send_signal(signal.SIGINT)
    (code, said, wrong), (other_code, *nothing) = finish(both)
    assert (code, other_code, wrong, nothing) == (130, 130, "", ["", ""])
    assert "go on with: python train.py" in said
    steps = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["step"]
    assert f"at step {steps} of 10000" in said


def test_ctrl_c_during_the_exchange_is_not_lost(tiny_base, tmp_path, monkeypatch, capsys):
    """A signal that comes while the ranks ask each other ends the run after the next step."""
    either, steps = ranks.either, []

    def interrupted_either(*flags):
        steps.append(None)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return either(*flags)
    monkeypatch.setattr(ranks, "either", interrupted_either)
    monkeypatch.chdir(tmp_path)
    assert run("--algo", "sft", "--init_from", tiny_base, *TASK, *LOOP, "--max_steps", 50,
               "--out_dir", "run") == 130
    assert "at step 3 of 50" in capsys.readouterr().out


def test_a_mistake_in_the_flags_is_said_first_by_rank_0(run_two):
    """The other rank waits, so that torchrun can end it before it says the same."""
    both, started = run_two("--algo", "sft", "--foo", 1), time.time()
    both[0].wait(timeout=60)
    seconds = time.time() - started
    (code, _, wrong), (other_code, _, other_wrong) = finish(both)
    assert code == other_code == 2 and wrong == other_wrong and "--foo is unknown" in wrong
    assert time.time() - started > seconds + 1
