"""
One command compares algorithms: each from the same base, over the same seeds, reused where it exists, in one table.
"""

import json
import os

import pytest

import report
from conftest import SHAPE, TASK, run
from model import InputError

TINY = (*TASK, "--max_steps", 2, "--batch_size", 4, "--logging_steps", 1, "--eval_steps", 1)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made():
    """When each run's summary was written."""
    return {name: os.stat(f"out/{name}/summary.json").st_mtime_ns for name in os.listdir("out") if "compare" not in name}


def test_a_comparison(tiny_base, capsys):
    """Two variants, two seeds: four runs, one table, compare.json; a second time nothing is run, a broken run goes on, and
    other settings make new runs and leave the old ones be."""
    command = ("--algo", "sft,dft:loss-type=power:alpha=0.5", "--seeds", 2, *TINY, "--num_demonstrations", 10, "--init_from", tiny_base)
    assert run(*command) == 0
    first, out = made(), capsys.readouterr().out
    assert sorted(first) == sorted(f"chain-{name}-{seed}" for name in ("sft", "dft-loss-type-power-alpha-0.5") for seed in (0, 1))
    with open("out/chain-dft-loss-type-power-alpha-0.5-1/config.json") as file:
        config = json.load(file)
    assert (config["seed"], config["loss_type"], config["alpha"], config["init_from"]) == (1, "power", 0.5, str(tiny_base))
    with open("out/chain-compare/compare.json") as file:
        results = json.load(file)
    assert [(r["variant"], r["seed"]) for r in results] == [(v, s) for v in command[1].split(",") for s in (0, 1)]
    assert all(r["updates"] == 2 and r["trained_tokens"] > 0 and "eval/accuracy" in r["after"] for r in results)
    table = report.comparison(results)
    assert table in out and [row.split()[0] for row in table.splitlines()[1:]] == ["base", *command[1].split(",")]

    os.remove("out/chain-sft-1/summary.json")
    assert run(*command) == 0
    second = made()
    assert [name for name in first if second[name] != first[name]] == ["chain-sft-1"]
    assert table.splitlines()[0] in capsys.readouterr().out and len(second) == 4

    assert run("--algo", "sft", "--seeds", 1, *command[4:], "--learning_rate", 0.1) == 0
    assert set(made()) == {*second, "chain-sft-0.1"}                    # the first chain-sft-0 is kept under this name


def test_the_table_by_hand():
    """Mean and, behind +-, half the range over seeds; the base from the first run; a column nobody has is left out."""
    def result(variant, accuracy, tokens):
        return {"variant": variant, "before": {"eval/accuracy": 0.25}, "after": {"eval/accuracy": accuracy}, "updates": 60,
                "sampled_tokens": tokens, "seconds": 8.2, "peak_memory_mb": None}
    table = report.comparison([result("sft", 0.9, 0), result("grpo", 0.5, 1000), result("grpo", 0.7, 3000)])
    assert [row.split() for row in table.splitlines()] == [
        ["accuracy", "updates", "sampled", "seconds"], ["base", "0.250", "-", "-", "-"], ["sft", "0.900", "60", "0", "8"],
        ["grpo", "0.600", "+-0.100", "60", "2,000", "8"]]


@pytest.mark.parametrize("flags, expected", [
    ("--algo sft,grop", "did you mean grpo?"),
    ("--algo sft,dpo:sync_step=1", "did you mean --sync_steps?"),
    ("--algo sft,grpo --epsilon .1", "--epsilon is unknown"),           # sft has no such flag: grpo:epsilon=.1
    ("--algo dpo:sync_steps=never,sft", "--sync_steps never"),
    ("--algo sft,pretrain", "--algo pretrain makes what the others start from"),
    ("--algo sft, --seeds 1", "--algo  is unknown"),
    ("--algo sft,dft --seeds 0", "--seeds 0: at least 1"),
    ("--algo sft,dft --seeds two", "--seeds"),
    ("--algo=sft,grop", "did you mean grpo?"),
    ("--seeds=2 --algo=grop", "did you mean grpo?"),
    ("--algo sft,dft --seed 3", "leave out --seed"),
    ("--algo sft,dft --resume", "goes on by itself"),
    ("--algo sft,dft:sample=x", "goes on by itself"),
    ("--algo sft,dft --init_from nowhere", "nowhere"),
])
def test_what_cannot_be_compared(flags, expected):
    """A mistake in any part of the list is one line, and nothing has been run."""
    with pytest.raises(InputError) as error:
        run(*flags.split())
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists("out")


def test_the_base_is_made_first(monkeypatch, capsys):
    """Without --init_from the comparison makes the base that its runs then share; what fails in a run is said in one line."""
    import train
    monkeypatch.setitem(train.PRETRAIN, "max_steps", 2)
    monkeypatch.setitem(train.PRETRAIN, "batch_size", 4)
    monkeypatch.setattr(train.subprocess, "run", lambda *args, **kwargs: type("Done", (), {"returncode": 2, "stderr": "error: no luck\n"}))
    with pytest.raises(InputError, match="sft, seed 0: error: no luck"):
        run("--algo", "sft,dft", *TINY, *SHAPE)
    assert "No base model" in capsys.readouterr().out and len(os.listdir("out")) == 1
    monkeypatch.setattr(train.subprocess, "run", lambda *args, **kwargs: type("Done", (), {"returncode": 130, "stderr": ""}))
    assert run("--algo", "sft,dft", *TINY, *SHAPE) == 130
    assert "go on with: python train.py --algo sft,dft" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--device=cuda:7"], ["--sample=1,2>3=", "--algo", "grpo"], ["--out_dir", "a,b:c"]])
def test_commas_and_colons_elsewhere_are_no_comparison(words, monkeypatch):
    """Only the value of --algo, however it is written, and --seeds make a comparison."""
    import train
    monkeypatch.setattr(train, "compare", lambda argv: pytest.fail("taken for a comparison"))
    with pytest.raises(InputError):
        run(*words, "--init_from", "nowhere")
    monkeypatch.setattr(train, "compare", lambda argv: 77)
    assert run("--algo=sft,dft") == run("--algo", "dpo:beta=1") == run("--seeds=1") == run("--seeds", 2) == 77
