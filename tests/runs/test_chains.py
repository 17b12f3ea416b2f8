"""
compare.py with chains of algorithms, `sft>grpo`, and several runs at a time: every stage is a run
that starts from the one before it, what a chain cost is added up, and its KL is that to the base.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import compare
import data
import tasks
import train
from conftest import ROOT, SHAPE, TASK, run
from harness import checkpoint, report
from harness.errors import InputError
from runs_helpers import complaint, interrupted, metrics, same, summary, weights, write_jsonl
from sft import Pretrain, PretrainConfig

TINY = (*TASK, "--max_steps", 2, "--batch_size", 4, "--logging_steps", 1, "--eval_steps", 1)
SFT, CHAIN = "out/chain-sft-0", "out/chain-sft+dft-0"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick_base(monkeypatch):
    """Base models are made in 2 steps."""
    class Quick(PretrainConfig):
        def __init__(self, **settings):
            super().__init__(**{"max_steps": 2, "batch_size": 4, **settings})
    monkeypatch.setattr(Pretrain, "Config", Quick)


def run_compare(*words):
    return compare.main([str(word) for word in words])


def rows():
    with open("out/chain-compare/compare.json") as file:
        return json.load(file)


def folders(commands):
    """Which runs were started, by the ends of their folders."""
    return [command[command.index("--out_dir") + 1].removeprefix("out/chain-")
            for command in commands]


# -- the plan -------------------------------------------------------------------------------------


def test_the_plan_of_a_chain():
    """Each stage is an ordinary run in the folder of the chain up to there, from the folder before;
    the common --init_from is the start of the first; flags of its own reach its stage alone."""
    [arm] = compare.plan(["sft:max-steps=3>grpo>dpo:beta=0.5"], ["--init_from", "base"], 7, 1)
    assert arm.word == arm.variant == "sft:max-steps=3>grpo>dpo:beta=0.5" and arm.seed == 7
    assert [stage.name for stage in arm.stages] == [
        "sft:max-steps=3", "sft:max-steps=3>grpo", "sft:max-steps=3>grpo>dpo:beta=0.5"]
    first = "out/chain-sft-max-steps-3"
    made = [f"{first}-7", f"{first}+grpo-7", f"{first}+grpo+dpo-beta-0.5-7"]
    configs = [stage.config for stage in arm.stages]
    assert [(c.algo, c.seed, c.init_from, c.out_dir) for c in configs] == [
        ("sft", 7, "base", made[0]), ("grpo", 7, made[0], made[1]), ("dpo", 7, made[1], made[2])]
    assert (configs[0].max_steps, configs[1].max_steps, configs[2].beta) == (3, 60, 0.5)
    for stage in arm.stages:   # the command line says what the plan says
        again = train.flags.parse(stage.command, train.ALGORITHMS, train.GPTConfig)
        assert vars(again) == vars(stage.config)


def test_a_learned_reward_is_that_of_the_base():
    """The reward model of a later stage is the one that a plain arm has, made before all runs, and
    not one that starts from the stage before; one that is given is taken."""
    plain, chain = compare.plan(["grpo:reward=model", "sft>grpo:reward=model"], [], 0, 1)
    needed = compare.check([plain, chain], train.ALGORITHMS)
    models = {config.out_dir for config in needed if config.algo == "rm"}
    stage = chain.stages[1]
    assert models == {stage.config.reward_model} and stage.command[-1] in models
    assert stage.command[-2] == "--reward_model"
    [given] = compare.plan(["sft>grpo:reward=model:reward_model=mine"], [], 0, 1)
    assert given.stages[1].config.reward_model == "mine"
    assert compare.plan(["sft>grpo"], [], 0, 1)[0].stages[1].config.reward_model is None


def test_a_chain_with_a_shape_of_its_own():
    """The first stage's shape is that of all, and its base is the only one that is made."""
    arms = compare.plan(["sft:n_embd=16>grpo:reward=brevity"], [], 0, 1)
    bases = compare.check(arms, train.ALGORITHMS)
    assert {(base.algo, *base.shape.items()) for base in bases} == {("pretrain", ("n_embd", 16))}
    assert "--n_embd=16" not in arms[0].stages[1].command


def test_a_chain_with_a_start_of_its_own(tiny_base):
    """Then no base is made for the later stages either."""
    word = f"sft:init_from={tiny_base}>grpo"
    arms = compare.plan([word], [str(flag) for flag in TASK], 0, 1)
    assert compare.check(arms, train.ALGORITHMS) == []


@pytest.mark.parametrize("words, expected", [
    ("sft>", "'sft>': an algorithm is missing"),
    (">grpo", "'>grpo': an algorithm is missing"),
    ("sft>>grpo", "an algorithm is missing"),
    ("sft>:beta=1", "an algorithm is missing"),
    ("sft>grop", "did you mean grpo?"),
    ("sft>pretrain", "pretrain makes what the others start from"),
    ("rm>grpo", "rm makes what the others start from"),
    ("sft>grpo:init_from=x", "a later stage starts from what the one before it made"),
    ("sft>grpo:init-from=x", "leave out its init_from"),
    ("sft>grpo:seed=1", "gives all variants the same seeds"),
    ("sft:out_dir=x>grpo", "chooses folders"),
    ("sft>grpo sft>grpo", "sft>grpo and sft>grpo are, or look like, the same"),
    ("sft sft>grpo sft", "sft and sft are, or look like, the same"),
    ("dpo:beta=1e-1>grpo dpo:beta=1e+1", "dpo:beta=1e-1 and dpo:beta=1e+1 are, or look like"),
    ("sft>grpo:epsilom=1", "did you mean --epsilon?"),
    ("sft>grpo:num_generations=1", "--num_generations 1"),
    ("sft>grpo:max_new_tokens=120", "do not fit"),
    ("sft>grpo:reward=model:reward_model=nowhere", "nowhere: there is no checkpoint"),
    ("sft>grpo:n_embd=32", "sft>grpo:n_embd=32: all stages have the same task, tokenizer"),
    ("sft>grpo:tokenizer=gpt2", "all stages have the same task, tokenizer"),
    ("sft:base_seed=1>grpo", "all stages have the same task, tokenizer, base_seed, pretraining"),
    ("sft>grpo:pretraining=long", "all stages have the same task, tokenizer, base_seed, "),
    ("sft>grpo:min_terms=2", "all stages have the same task"),
    ("sft>grpo:eval_problems=8", "judged by different problems"),
    ("sft>grpo:max_new_tokens=30", "judged by different problems"),
    ("sft:init_from=nowhere>grpo", "nowhere: there is no checkpoint"),
    ("sft>grpo:beta=1|1", "are, or look like, the same"),
    ("sft>grpo:beta=1|one", "--beta"),
    ("sft|dft>grpo", "sft|dft is unknown"),
])
def test_what_cannot_be_a_chain(monkeypatch, words, expected):
    """One line, and nothing has been run, not even the base."""
    def fail(*args, **kwargs):
        pytest.fail("something was run")
    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(compare.subprocess, "run", fail)
    assert expected in complaint(compare.main, words.split())
    assert os.listdir(".") == []


def test_stages_that_read_other_files():
    """Demonstrations from one file and problems from another make a chain if both stages are judged
    by the same lines."""
    lines = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "completion": str(a + b)}
             for a in range(6) for b in range(6)]
    for name in ("demos", "problems", "held_out"):
        write_jsonl(lines, f"{name}.jsonl")
    words = ["sft:data=demos.jsonl>grpo:data=problems.jsonl"]
    arms = compare.plan(words, ["--eval_data", "held_out.jsonl"], 0, 1)
    assert compare.check(arms, train.ALGORITHMS)
    write_jsonl(lines[1:], "problems.jsonl")
    assert "judged by different" in complaint(compare.main, words)


# -- the runs -------------------------------------------------------------------------------------


def test_a_chain(tiny_base, in_process, capsys):
    """The first stage is that of the plain arm, made once; the second is train.py --init_from of
    it; a second time nothing is run. What the stages cost is added up."""
    command = ("sft", "dft", "sft>dft", *TINY, "--init_from", tiny_base)
    assert run_compare(*command) == 0 and "sft>dft, seed 0: held-out" in capsys.readouterr().out
    assert folders(in_process) == ["sft-0", "dft-0", "sft+dft-0"]
    assert run("--algo", "dft", *TINY, "--init_from", SFT, "--out_dir", "alone") == 0
    assert same(weights("alone"), weights(CHAIN))
    assert not same(weights(CHAIN), weights("out/chain-dft-0"))
    _, _, row = rows()
    first, last = summary(SFT), summary(CHAIN)
    assert set(row) == {*last, "variant", "folder", "stages"}
    assert (row["variant"], row["folder"], row["stages"]) == ("sft>dft", CHAIN, [SFT, CHAIN])
    assert row["updates"] == row["steps"] == 4
    assert row["trained_tokens"] == first["trained_tokens"] + last["trained_tokens"] > 0
    assert row["before"] == first["before"] != last["before"]
    assert run_compare(*command) == 0 and len(in_process) == 3
    assert "sft>dft" in report.comparison(rows())


def test_a_chain_without_a_base(quick_base, in_process, capsys):
    """The base is made once, and is what the chain's KL is measured to."""
    assert run_compare("sft>grpo:num_generations=2", *TINY, *SHAPE) == 0
    assert capsys.readouterr().out.count("Base model: ") == 1
    [row] = rows()
    assert row["sampled_tokens"] == summary(row["folder"])["sampled_tokens"] > 0
    assert row["after"]["eval/kl"] > 0


NOTHING = "learning_rate=1e-12"   # a stage that moves no weight by more than that


@pytest.mark.parametrize("word, moves", [
    (f"sft:learning_rate=0.1>dft:{NOTHING}", 0), (f"sft:{NOTHING}>dft:learning_rate=0.1", 1),
    (f"sft:{NOTHING}>dft:learning_rate=0.1>sft:{NOTHING}", 1)])
def test_the_kl_of_a_chain_is_that_to_the_base(tiny_base, in_process, word, moves):
    """Where a single stage moves the model, that stage's own KL is the chain's, to what ever the
    last stage started from; where the last one stands still, its own would be zero."""
    assert run_compare(word, *TINY, "--init_from", tiny_base) == 0
    [row] = rows()
    kls = [summary(folder)["after"]["eval/kl"] for folder in row["stages"]]
    assert all((kl > 1e-3) == (i == moves) for i, kl in enumerate(kls))
    assert row["after"]["eval/kl"] == pytest.approx(kls[moves], rel=1e-4)
    last = summary(row["folder"])["after"]
    assert {**row["after"], "eval/kl": 0} == {**last, "eval/kl": 0}


def test_the_kl_where_both_stages_move(tiny_base, in_process):
    """From the definition: sum over an answer's tokens and the vocabulary of p log p/q, p the last
    model, q the base."""
    flags = (*TINY, "--learning_rate", 0.05, "--init_from", tiny_base)
    assert run_compare("sft>dft", *flags) == 0
    model, base = (checkpoint.build_model(checkpoint.read(path)) for path in (CHAIN, tiny_base))
    tokenizer, problems, kls = data.Tokenizer("byte"), tasks.Chain(2, 2).problems("test", 16, 0), []
    batch = data.collate([{"prompt": p["prompt"]} for p in problems], tokenizer, "cpu")
    drawn = model.generate(batch["prompt_ids"], batch["prompt_mask"], 10, tokenizer.eos_id,
                           tokenizer.pad_id, 16, generator=torch.Generator().manual_seed(1))
    for prompt, ids, n in zip(batch["prompt_ids"], drawn.completion_ids[::16],
                              drawn.completion_mask.sum(-1)[::16]):
        text = torch.cat([prompt, ids[:n]])[None]                       # prompts of one length
        logp, logq = (m(text)[0, len(prompt) - 1:-1].log_softmax(-1) for m in (model, base))
        kls.append((logp.exp() * (logp - logq)).sum().item())
    [row] = rows()
    assert row["after"]["eval/kl"] == pytest.approx(sum(kls) / 16, rel=1e-4)
    assert row["after"]["eval/kl"] > 1.01 * summary(CHAIN)["after"]["eval/kl"]


def test_adding_up_by_hand():
    """Counts and seconds are sums, memory the largest that is known, `before` the first one's."""
    def stage(algo, n, memory, **more):
        return {"algo": algo, "task": "chain", "seed": 5, "steps": n, "updates": 2 * n,
                "sampled_tokens": 10 * n, "trained_tokens": 100 * n, "seconds": 0.5 * n,
                "peak_memory_mb": memory, "before": {"from": algo}, "after": {"to": algo}, **more}
    made = compare.added_up([stage("sft", 1, 300.0), stage("dft", 2, 500.0, extra=7),
                             stage("grpo", 4, None)])
    assert made == {"algo": "sft>dft>grpo", "task": "chain", "seed": 5, "steps": 7, "updates": 14,
                    "sampled_tokens": 70, "trained_tokens": 700, "seconds": 3.5, "extra": 7,
                    "peak_memory_mb": 500.0, "before": {"from": "sft"}, "after": {"to": "grpo"}}
    nothing = [stage("sft", 1, None), stage("dft", 2, None)]
    assert compare.added_up(nothing)["peak_memory_mb"] is None


def test_what_follows_a_new_stage_is_new(tiny_base, in_process):
    """Where a first stage is made anew, so is the second, also if that was not done the same day;
    a first stage that lacks no more than its summary is the same as before."""
    command = ("sft>dft", *TINY, "--init_from", tiny_base)
    assert run_compare(*command) == 0
    os.remove(f"{SFT}/summary.json")
    assert run_compare(*command) == 0 and folders(in_process[2:]) == ["sft-0"]
    shutil.rmtree(SFT)
    assert run_compare("sft", *command[1:]) == 0 and folders(in_process[3:]) == ["sft-0"]
    assert run_compare(*command) == 0 and folders(in_process[4:]) == ["sft+dft-0"]
    assert "--resume" not in in_process[4] and os.path.exists(f"{CHAIN}.1")
    assert run_compare(*command) == 0 and len(in_process) == 5
    os.utime(tiny_base / "ckpt.pt")   # another base under the same name
    assert run_compare(*command) == 0 and folders(in_process[5:]) == ["sft-0", "sft+dft-0"]


@pytest.mark.parametrize("call, broken", [(1, "sft-0"), (3, "sft+dft-0")])
def test_ctrl_c_in_a_chain(tiny_base, monkeypatch, in_process, capsys, call, broken):
    """Ctrl-C in the first stage or in the second: that stage saves, the printed command goes on
    with it and ends where an uninterrupted chain ends."""
    command = ("sft>dft", *TINY, "--init_from", tiny_base)
    with interrupted(monkeypatch, call):
        assert run_compare(*command) == 130
    said = re.search(r"stopped; go on with: python compare.py (.*)", capsys.readouterr().out)
    assert folders(in_process)[-1] == broken and not os.path.exists("out/chain-compare")
    begun = len(in_process)
    assert compare.main(shlex.split(said.group(1))) == 0
    assert in_process[begun] == [*in_process[begun - 1], "--resume"]
    assert rows()[0]["updates"] == 4
    ended = weights(CHAIN)
    shutil.rmtree("out")
    assert run_compare(*command) == 0 and same(weights(CHAIN), ended)


# -- several at a time ----------------------------------------------------------------------------


@pytest.fixture
def slow_runs(monkeypatch):
    """Runs that take a tenth of a second and leave a summary. .most: how many were at work at once;
    .started: their folders; .end: folder -> exit code, None for 0"""
    runs = SimpleNamespace(started=[], now=0, most=0, end=lambda folder: 0)
    lock = threading.Lock()

    def start(command, stdout, stderr, text):
        folder = command[command.index("--out_dir") + 1]
        with lock:
            runs.started.append(folder)
            runs.now += 1
            runs.most = max(runs.most, runs.now)
        time.sleep(0.1)
        with lock:
            runs.now -= 1
        os.makedirs(folder, exist_ok=True)
        after = {"eval/accuracy": 0.5}
        with open(f"{folder}/summary.json", "w") as file:
            json.dump({"algo": "x", "seed": int(folder[-1]), "steps": 1, "seconds": 1.0,
                       "peak_memory_mb": None, "before": after, "after": after}, file)
        return SimpleNamespace(returncode=runs.end(folder), stderr="error: no luck")
    monkeypatch.setattr(compare.subprocess, "run", start)
    monkeypatch.setattr(report, "plot_comparison", lambda *args: "no picture")
    return runs


@pytest.mark.parametrize("jobs", [1, 3])
def test_jobs(tiny_base, slow_runs, jobs):
    """So many runs at a time and no more; a stage that two arms share is made once, and before what
    starts from it; the rows are in the order of the command line."""
    words = ("sft>grpo", "dft", "sft", "sft>dpo")
    assert run_compare(*words, *TASK, "--seeds", 2, "--jobs", jobs, "--init_from", tiny_base) == 0
    assert slow_runs.most == jobs
    names = [folder.removeprefix("out/chain-") for folder in slow_runs.started]
    assert set(names[:4]) == {"sft-0", "sft-1", "dft-0", "dft-1"}
    assert sorted(names[4:]) == ["sft+dpo-0", "sft+dpo-1", "sft+grpo-0", "sft+grpo-1"]
    assert [(row["variant"], row["seed"]) for row in rows()] == [
        (word, seed) for word in words for seed in (0, 1)]


@pytest.mark.parametrize("end", [
    lambda folder: 130, lambda folder: -signal.SIGINT,          # as it starts, Python dies of it
    lambda folder: os.kill(os.getpid(), signal.SIGINT) or 0])   # at the end of a run
def test_ctrl_c_with_several_at_work(tiny_base, slow_runs, capsys, end):
    """Those at work end, saved, and no other is begun."""
    slow_runs.end = end
    assert run_compare("sft", "dft", *TASK, "--seeds", 4, "--jobs", 2,
                       "--init_from", tiny_base) == 130
    assert 2 <= len(slow_runs.started) <= 4
    assert "stopped; go on with: python compare.py sft dft" in capsys.readouterr().out


def test_the_runs_share_the_cores(tiny_base, slow_runs, monkeypatch):
    """Eight cores are four for each of two, unless the user says otherwise."""
    command = ("sft", *TASK, "--init_from", tiny_base, "--jobs", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert run_compare(*command) == 0 and os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert run_compare(*command) == 0 and os.environ["OMP_NUM_THREADS"] == "4"


def test_a_failure_with_several_at_work(tiny_base, slow_runs):
    """It is one line, and what waits is not begun."""
    slow_runs.end = lambda folder: 2
    with pytest.raises(InputError, match="^sft, seed 0: no luck$"):
        run_compare("sft", "dft", *TASK, "--seeds", 4, "--jobs", 2, "--init_from", tiny_base)
    assert len(slow_runs.started) <= 4


def test_two_jobs_in_a_terminal(tiny_base):
    """Real processes, two at a time, and Ctrl-C to all of them, as a terminal sends it: both save;
    the printed command goes on."""
    words = ["sft:max_steps=100000>dft", "dft:max_steps=100000", *TINY[:-2], "--eval_steps", 10**6,
             "--jobs", 2, "--init_from", tiny_base]
    process = subprocess.Popen([sys.executable, ROOT / "compare.py", *map(str, words)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    names = ("sft-max_steps-100000-0", "dft-max_steps-100000-0")
    while not all(len(metrics_of(name)) > 2 for name in names) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert all(os.path.exists(f"out/chain-{name}/ckpt.pt") for name in names)
    assert "stopped; go on with: python compare.py 'sft:max_steps=100000>dft'" in out


def metrics_of(name):
    folder = f"out/chain-{name}"
    return metrics(folder) if os.path.exists(f"{folder}/metrics.jsonl") else []
