"""Runs in other worlds: facts from the base of chain, foreign demonstrations, skills that are
watched, rewards that are wrong. What is left in the folder says what happened."""

import os

import pytest
import torch

import compare
import data
import tasks
import train
from conftest import SHAPE, TASK, run
from harness import arms, checkpoint as checkpoints
from harness import evaluate, flags, prepare, report
from model import GPTConfig
from rm import RMConfig
from runs_helpers import (DEMOS, OWN, checkpoint, metrics, same, same_networks, same_numbers,
                          shorter, summary, weights, write_jsonl)
from sft import PretrainConfig
from table_policy import config_of
from tiny import coin

TAIL = ("--max_steps", 2, "--batch_size", 4, "--eval_problems", 8)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """A folder of its own; base models are made in 4 steps, reward models in 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda folder: "no picture")
    for Config, steps in ((PretrainConfig, 4), (RMConfig, 2)):
        monkeypatch.setattr(Config, "__init__",
                            shorter(Config.__init__, max_steps=steps, batch_size=4))


def folders():
    return sorted(os.listdir("out"))


# -- facts ----------------------------------------------------------------------------------------


def test_facts_start_from_the_base_of_chain(capsys):
    """out/chain-pretrain-0 is made once, whichever task comes first; the run has a folder of its
    own name, is judged by 50 facts and by chain, and has nothing out of distribution."""
    run("--algo", "sft", "--task", "facts", *TAIL, "--eval_problems", 64)
    assert folders() == ["chain-pretrain-0", "facts-sft-0"]
    base = os.stat("out/chain-pretrain-0/ckpt.pt").st_mtime_ns
    assert same(checkpoint("out/chain-pretrain-0")["model"],
                {name.removeprefix("ref_model."): value
                 for name, value in checkpoint("out/facts-sft-0")["algorithm"].items()
                 if name.startswith("ref_model.")})
    capsys.readouterr()
    run("--algo", "grpo", *TAIL, "--num_generations", 2)
    assert "Base model: out/chain-pretrain-0 (made earlier" in capsys.readouterr().out
    assert folders() == ["chain-grpo-0", "chain-pretrain-0", "facts-sft-0"]
    assert os.stat("out/chain-pretrain-0/ckpt.pt").st_mtime_ns == base
    found = summary("out/facts-sft-0")["after"]
    assert "eval/kept/chain" in found and "eval/ood_accuracy" not in found
    assert not {"eval/worked", "eval/kept/facts", "eval/kept/reversing"} & set(found)
    assert 50 * found["eval/greedy_accuracy"] == round(50 * found["eval/greedy_accuracy"])
    before = summary("out/facts-sft-0")["before"]["eval/kept/chain"]
    assert 0 <= before < 1


def test_a_file_is_no_fact():
    """--algo pretrain --task facts is refused (test_bad_flags.py); on a file --task says nothing,
    and the base that a run on a file starts from is that of chain."""
    write_jsonl([{"text": f"text {i}"} for i in range(20)], "texts.jsonl")
    for algo, first in (("pretrain", []), ("sft", ["out/chain-pretrain-0"])):
        words = f"--algo {algo} --data texts.jsonl --task facts"
        config = flags.parse(words.split(), train.ALGORITHMS, GPTConfig)
        assert [c.out_dir for c in prepare.check(config, train.ALGORITHMS)] == first


def test_a_reward_model_of_facts(monkeypatch):
    """It is one of facts, from the same base."""
    monkeypatch.setattr(tasks.Chain, "reward", staticmethod(coin))   # so that there are pairs
    run("--algo", "grpo", "--task", "facts", "--reward", "model", "--num_generations", 2, *TAIL)
    assert folders() == ["chain-pretrain-0", "facts-grpo-0", "facts-rm-0"]
    assert checkpoint("out/facts-rm-0")["settings"]["task"] == "facts"


def test_what_is_left_of_chain_is_what_chain_is_judged_by(tiny_base, monkeypatch):
    """With as many samples eval/kept/chain of facts is eval/accuracy of chain, and so with the
    other skills, to the last digit: the same problems, the same draw."""
    monkeypatch.setattr(tasks.Chain, "reward", staticmethod(coin))   # the model knows nothing
    model = checkpoints.build_model(checkpoints.read(tiny_base))
    chain, facts = (evaluate.judge_answers(
        model, None, data.Tokenizer("byte"), Task(2, 2, 6, other_skills=True), config_of(), False)
        for Task in (tasks.Chain, tasks.Facts))
    assert 0 < facts["eval/kept/chain"] == chain["eval/accuracy"] < 1
    assert facts["eval/kept/reversing"] == chain["eval/kept/reversing"]
    assert facts["eval/kept/facts"] == chain["eval/kept/facts"]


def test_facts_can_be_compared(capsys):
    """compare.py plans them, finds nothing amiss, and its table has a column for what is left."""
    words = ["--task", "facts", "--eval_problems", "8"]
    configs = [arm.stages[0].config for arm in compare.plan(["sft", "grpo"], words, 0, 2)]
    assert [config.out_dir for config in configs][::2] == ["out/facts-sft-0", "out/facts-grpo-0"]
    for config in configs:
        assert arms.check_held_out(config) is None
        [base] = prepare.check(config, train.ALGORITHMS)
        assert base.out_dir == "out/chain-pretrain-0" and base.task == "chain"
    assert compare.reusable(configs[0]) is False
    run("--algo", "sft", "--task", "facts", *TAIL)
    assert "kept: chain" in capsys.readouterr().out
    table = report.comparison([{"variant": "sft", **summary("out/facts-sft-0")}])
    assert "  chain  " in table.splitlines()[0] and "ood" not in table.splitlines()[0]


# -- worlds ---------------------------------------------------------------------------------------


def shared(words):
    config = flags.parse(words.split(), train.ALGORITHMS, GPTConfig)
    return prepare.shared_config(config, "pretrain", train.ALGORITHMS)


@pytest.mark.parametrize("words", ["--worked_share 0.1", "--other_skills",
                                   "--worked_share 0.005 --other_skills"])
def test_a_world_has_a_base_of_its_own(words):
    """Beside the usual one, the same for chain and facts, and the one that --algo pretrain makes
    when it is asked for with the same flags."""
    usual, found = shared("--algo grpo"), shared(f"--algo grpo {words}")
    assert usual.out_dir == "out/chain-pretrain-0" != found.out_dir
    assert shared(f"--algo sft --task facts {words}").out_dir == found.out_dir
    asked = flags.parse(f"--algo pretrain {words}".split(), train.ALGORITHMS, GPTConfig)
    assert prepare.default_folder(asked) == found.out_dir
    assert prepare.identity(asked) == prepare.identity(found)
    for more in ("--style bare", "--wrong_share 0.5"):     # of demonstrations, not of the base
        assert shared(f"--algo sft {words} {more}").out_dir == found.out_dir


def test_a_base_of_a_world_is_trained_on_its_corpus():
    """What pre-training reads and how it is watched."""
    run("--algo", "pretrain", "--other_skills", "--worked_share", 0.005, *SHAPE, "--eval_problems",
        8)
    [name] = folders()
    assert {"eval/kept/reversing", "eval/kept/facts"} <= set(summary(f"out/{name}")["after"])
    config = flags.parse("--algo pretrain --other_skills --worked_share 0.005".split(),
                         train.ALGORITHMS, GPTConfig)
    algo, _, _ = prepare.build(config, train.ALGORITHMS)
    corpus = tasks.Chain(other_skills=True, worked_share=0.005).corpus(config.num_documents, 0)
    assert [e["completion"] for e in algo.examples()] == corpus


@pytest.mark.parametrize("algo", ["sft", "dft"])
def test_flags_reach_the_demonstrations(tiny_base, algo):
    """--style, --wrong_share, --num_demonstrations and --seed, whichever algorithm imitates."""
    words = (f"--algo {algo} --init_from {tiny_base} --style totals --wrong_share 0.6 "
             "--num_demonstrations 30 --seed 4")
    config = flags.parse(words.split(), train.ALGORITHMS, GPTConfig)
    built, _, _ = prepare.build(config, train.ALGORITHMS)
    assert built.examples() == tasks.Chain().demonstrations(30, 4, "totals", 0.6)


def test_flags_reach_the_rewards(tiny_base):
    """--flip_probability of every algorithm that is rewarded."""
    for algo in ("grpo", "ppo", "dpo", "rft", "rm"):
        words = f"--algo {algo} --init_from {tiny_base} --reward flipped --flip_probability 0.4"
        config = flags.parse(words.split(), train.ALGORITHMS, GPTConfig)
        built, _, _ = prepare.build(config, train.ALGORITHMS)
        assert built.task.flip_probability == 0.4 and built.rewards.task is built.task


def test_the_default_world_given_in_full_is_the_same_run(tiny_base):
    """Flags that say the defaults change no weight."""
    common = ("--algo", "sft", *DEMOS, *TASK, "--init_from", tiny_base, "--max_steps", 3)
    run(*common, "--out_dir", "plain")
    run(*common, "--worked_share", 0.3, "--style", "own", "--wrong_share", 0, "--out_dir", "given")
    assert same(weights("plain"), weights("given"))


# -- wrong rewards --------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["grpo", "dpo", "ppo", "rft"])
def test_the_truth_is_in_the_log(tiny_base, monkeypatch, algo):
    """Whatever is trained on, metrics.jsonl has true_reward, which is what the verifier says."""
    monkeypatch.setattr(tasks.Chain, "reward", staticmethod(coin))
    own = (*OWN, "--keep", "best") if algo == "rft" else OWN
    run("--algo", algo, *own, *TASK, "--init_from", tiny_base, "--max_steps", 2, "--logging_steps",
        1, "--reward", "random,flipped,leaky", "--flip_probability", 1, "--out_dir", "run")
    for line in metrics("run")[1:]:
        assert {f"rewards/{name}/mean" for name in ("random", "flipped", "leaky")} <= set(line)
        assert line["rewards/flipped/mean"] == pytest.approx(1 - line["true_reward"], abs=1e-6)
        assert 0 < line["rewards/random/mean"] < 1


@pytest.mark.parametrize("name", ["random", "flipped"])
def test_wrong_rewards_are_those_of_the_seed(tiny_base, monkeypatch, name):
    """A run is the same when the global random state is another, and another with another seed."""
    common = ("--algo", "grpo", *OWN, *TASK, "--init_from", tiny_base, "--max_steps", 3,
              "--logging_steps", 1, "--reward", name)
    for out, state, seed in (("a", 1, 0), ("b", 2, 0), ("c", 1, 5)):
        torch.manual_seed(state)
        run(*common, "--seed", seed, "--out_dir", out)
    assert same_networks("a", "b") and same_numbers(metrics("a"), metrics("b"))
    assert not same(weights("a"), weights("c"))
