"""
No flag is dead. Each flag of each algorithm, as the parser lists them, is changed from its default,
with the company that it needs to act, and the run must then come out different: in its weights, or
where the table below says so in what is logged, saved or said. Flags that must not change a run
stand in the table with the reason, and it is checked that they do not. A new flag without an entry
fails.

The runs are as short as can be: three steps of a model of 16 dimensions whose base was trained for
two, judged by two problems. Their verifier is a checksum, which tells any two answers apart.
"""

import contextlib
import hashlib
import io
import json
import os
import zlib

import pytest
import tiktoken
import torch

import data
import train
from model import InputError

RUN = ("--n_embd=16 --n_layer=1 --n_head=2 --min_terms=2 --max_terms=2 --max_new_tokens=6 "
       "--batch_size=4 --max_steps=3 --warmup_steps=1 --logging_steps=1 --eval_steps=3 "
       "--eval_problems=2 --device=cpu")
SAMPLES = " --num_generations=4 --num_prompts=40"       # of the algorithms that sample answers
SELF = "--source=self --num_generations=4 --num_prompts=40"

# What becomes different; where nothing else is said, the weights.
LINES, SAID, SAVES, REFUSED, COMPILED = "lines", "said", "saves", "refused", "compiled"


class Same(str):
    """Why a flag must change nothing."""


BASE = "--init_from={folder}/other-base"     # where a flag must change more than the base

# {flag: [changed value, what else has to be given, what becomes different]}; None: each of its
# choices; several values: each of them; {folder}: one of this test's own.
SHARED = {
    "init_from": ["{folder}/other-base"],
    "base_seed": ["1"],
    "reward_model": ["{folder}/other-rm", "--reward=model"],
    "resume": ["true", "", REFUSED],                    # where there is nothing to go on with
    "eval_only": ["true", "", SAID],
    "sample": ["1+1=", "", SAID],
    "inspect": [None, "", SAID],
    "task": [None, BASE],
    "min_terms": ["3", BASE + " --max_terms=3"],
    "max_terms": ["3", BASE],
    "data": ["{folder}/sums.jsonl"],
    "eval_data": ["{folder}/sums.jsonl", "--data={folder}/sums.jsonl"],
    "max_new_tokens": ["5"],
    "tokenizer": ["gpt2"],
    "top_k": ["1", "--sample=1+1=", SAID],
    "top_p": ["0.1", "--sample=1+1=", SAID],
    "seed": ["1"],
    "max_steps": ["4"],
    "max_minutes": ["1e-9"],
    "batch_size": ["3"],
    "micro_batch_size": ["2", "", Same("a batch in parts gives the same weights up to rounding")],
    "logging_steps": ["2", "", LINES],
    "eval_steps": ["1", "", LINES],
    "save_steps": ["1", "", SAVES],
    "eval_problems": ["3", "", LINES],
    "learning_rate": ["1e-2"],
    "lr_scheduler_type": [None, "--max_steps=4"],
    "warmup_steps": ["2"],
    "weight_decay": ["0.5"],
    "adam_beta2": ["0.5"],
    "max_grad_norm": ["0.01"],
    "device": ["cuda:77", "", REFUSED],                 # there is no such thing anywhere
    "dtype": ["bfloat16", BASE],
    "compile": ["true", "", COMPILED],
    "block_size": ["10", "", REFUSED],                  # too short; longer ones only make room
    "n_layer": ["2"], "n_head": ["1"], "n_kv_head": ["1"], "n_embd": ["8"], "head_dim": ["4"],
    "n_hidden": ["16"], "rope_theta": ["10"], "norm_eps": ["0.01"],
    "qkv_bias": ["true"], "qk_norm": ["false"], "tie_embeddings": ["false"],
}
SAMPLING = {"num_generations": ["3"], "num_prompts": ["41"], "temperature": ["0.5"],
            "reward": ["brevity"], "reward_weights": ["-1"]}
IMITATION = {
    **{name: [value, SELF + " --keep=best"] for name, [value] in SAMPLING.items()},
    "num_demonstrations": ["5"], "source": ["self"], "threshold": ["2", SELF]}
OWN = {
    "pretrain": {"num_documents": ["5"]},
    "sft": {
        **IMITATION,
        "completion_only": ["false", "--num_documents=9"],
        "num_documents": ["5", "--completion_only=false --num_documents=9"],
        "rounds": ["3", SELF + " --keep=best"],
        "restart": ["true", SELF + " --keep=best --rounds=3"],
        "keep": [None, SELF],
        "threshold_start": ["-1", SELF + " --reward=verifier,brevity --rounds=3"],
        "weighting": [None, SELF],
        "awr_beta": ["1", SELF + " --weighting=awr"]},
    "dft": {
        **{name: [value, *(context.replace(" --keep=best", "") for context in more)]
           for name, (value, *more) in IMITATION.items()},
        "loss_type": [None],
        "alpha": ["2", "--loss_type=power"],
        "iw_temperature": ["0.5", "--loss_type=iw_sft --learning_rate=0.1"],
        "iw_max": ["1", "--loss_type=iw_sft --learning_rate=0.1"],
        "epsilon": ["0", "--loss_type=psft --learning_rate=0.1", Same(
            "imitation has the advantage 1, and the clip below never acts where that is positive")],
        "epsilon_high": ["0", "--loss_type=psft --learning_rate=0.1"],
        "sync_steps": ["1", "--loss_type=psft --learning_rate=0.1"],
        "anchor_coef": ["5", "--loss_type=asft"],
        "gem_temperature": ["1", "--loss_type=gem"],
        "rounds": ["3", SELF + " --learning_rate=0.1"]},
    "dpo": {
        **SAMPLING,
        "loss_type": ["hinge ipo kto cpo simpo orpo"],
        "loss_type robust": ["robust", "--label_smoothing=0.2"],      # else it is sigmoid
        "beta": ["1"],
        "label_smoothing": ["0.2"],
        "simpo_gamma": ["1", "--loss_type=simpo"],
        "ipo_average": ["true", "--loss_type=ipo"],
        "desirable_weight": ["2", "--loss_type=kto"],
        "undesirable_weight": ["2", "--loss_type=kto"],
        "rpo_alpha": ["1"],
        "sync_steps": ["inf", "--learning_rate=0.1"],
        "sync_ref": ["true"],
        "pair_selection": [None],
        "pair_sampling": [None],
        "rso_beta": ["5", "--pair_sampling=rso"]},
    "rm": {**SAMPLING, "center_rewards_coefficient": ["1"]},
    "ppo": {
        **SAMPLING,
        "kl_coef": ["1", "--learning_rate=0.1"],
        "gamma": ["0.5"],
        "lam": ["0.5"],
        "cliprange": ["0.01", "--learning_rate=0.1"],
        "cliprange_value": ["0.01", "--learning_rate=0.1"],
        "vf_coef": ["2"],
        "num_ppo_epochs": ["3"],
        "num_mini_batches": ["2"],
        "target_kl": ["1e-9", "--num_ppo_epochs=4"],
        "whiten_advantages": ["false"],
        "truncation": [None, "--max_new_tokens=40"],      # so that some answers end
        "missing_eos_penalty": ["1", "--whiten_advantages=false"]},
    "grpo": {
        **SAMPLING,
        "advantage": [None, "--scale_rewards=none"],
        "scale_rewards": [None],
        "std_correction": ["0"],
        "advantage_eps": ["1"],
        "loss_type": [None, "--num_iterations=3 --learning_rate=0.1"],
        "importance_sampling_level": [None, "--num_iterations=2 --learning_rate=0.1"],
        "epsilon": ["0.01", "--num_iterations=2 --learning_rate=0.1 --epsilon_high=0.2"],
        "epsilon_high": ["0.01", "--num_iterations=2 --learning_rate=0.1"],
        "num_iterations": ["2"],
        "num_minibatches": ["2"],
        "beta": ["1", "--learning_rate=0.1"],
        "entropy_coef": ["1"],
        "mask_truncated_completions": ["true"]},
}
# Where an algorithm differs from the others in a shared flag.
CORPUS = Same("a corpus is read, and nothing of a policy's own")
EXCEPTIONS = {
    ("pretrain", "init_from"): ["{folder}/other-base", "", REFUSED],    # it starts from noise
    ("pretrain", "seed"): ["1", "", REFUSED],                           # it is --base_seed
    ("rm", "seed"): ["1", "", REFUSED],
    ("pretrain", "task"): [None],
    ("pretrain", "min_terms"): ["3", "--max_terms=3"],
    ("pretrain", "max_terms"): ["3"],
    ("pretrain", "dtype"): ["bfloat16"],
    ("pretrain", "inspect"): ["one", "", REFUSED],                      # there is no policy
    ("rm", "inspect"): ["one", "", REFUSED],
    ("pretrain", "reward_model"): ["{folder}/other-rm", "", CORPUS],
    ("rm", "reward_model"): ["{folder}/other-rm", "", Same("it is trained to be one")],
    ("sft", "reward_model"): ["{folder}/other-rm", SELF + " --keep=best --reward=model"],
    ("dft", "reward_model"): ["{folder}/other-rm", SELF + " --threshold=-9 --reward=model", LINES],
    ("pretrain", "max_new_tokens"): ["5", "", LINES],                   # of the evaluation alone
    ("sft", "max_new_tokens"): ["5", "", LINES],
    ("dft", "max_new_tokens"): ["5", "", LINES],
}
ELSEWHERE = {
    "help": "test_train.py::test_help",
    "algo": "every test",
    "seeds": "test_compare.py::test_seeds",
    "out_dir": "every test: it is where the runs are looked for",
}
FLAGS = [(algo, name[2:]) for algo in train.ALGORITHMS
         for name in train.make_parser(algo)._option_string_actions if name.startswith("--")]


def checksum(prompts, completions, **columns):
    """0, 1 or 2, as good as at random, the same for the same answer."""
    return [float(zlib.crc32(f"{p}{c}".encode()) % 3) for p, c in zip(prompts, completions)]


class Seen:
    """What became of a run: its weights, its log, what was said and how often it saved."""
    networks = lines = said = saves = compiled = refused = None


@pytest.fixture(scope="module")
def observe(tmp_path_factory):
    """observe(algo, flags) -> Seen, each run once; the folder's name stands for {folder}."""
    folder, seen, spied = tmp_path_factory.mktemp("flags"), {}, {"saves": 0, "compiled": 0}
    ranks = {bytes([i]) if i < 256 else f"<{i}>".encode(): i for i in range(50256)}
    encoding = tiktoken.Encoding("gpt2", pat_str=r"(?s:.)", mergeable_ranks=ranks,   # no download
                                 special_tokens={"<|endoftext|>": 50256})

    def counted(name, function):
        def spy(*args, **kwargs):
            spied[name] += 1
            return function(*args, **kwargs)
        return spy

    def observe(algo, flags=""):
        flags = flags.format(folder=folder)
        if (algo, flags) not in seen:
            seen[algo, flags] = seen_now = Seen()
            spied.update(saves=0, compiled=0)
            samples = SAMPLES if algo in ("dpo", "rm", "ppo", "grpo") else ""
            out = f"run-{len(seen)}"
            words = f"--algo={algo} {RUN}{samples} --out_dir={out} {flags}".split()
            try:
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    assert train.run(words) == 0
            except InputError as error:
                seen_now.refused = str(error)
            seen_now.said = said.getvalue()
            seen_now.saves, seen_now.compiled = spied["saves"], spied["compiled"]
            if os.path.exists(f"{out}/ckpt.pt"):
                seen_now.networks = torch.load(f"{out}/ckpt.pt", weights_only=True)["networks"]
                with open(f"{out}/metrics.jsonl") as file:
                    seen_now.lines = [without_clock(json.loads(line)) for line in file]
        return seen[algo, flags]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train.report, "pyplot", lambda: None)
        for settings in (train.PRETRAIN, train.rm.RM.defaults):
            for name, value in dict(max_steps=2, batch_size=4, warmup_steps=0).items():
                patch.setitem(settings, name, value)
        patch.setattr(data.Chain, "reward", staticmethod(checksum))
        patch.setattr(data.Countdown, "reward", staticmethod(checksum))
        patch.setattr(data.Countdown, "chance", lambda self, k: None)      # slow, and only printed
        patch.setattr(data.JsonLines, "reward", staticmethod(checksum))
        patch.setattr(tiktoken, "get_encoding", lambda name: encoding)
        patch.setattr(torch, "save", counted("saves", torch.save))
        patch.setattr(torch, "compile", counted("compiled", lambda function, dynamic: function))
        rows = [{"prompt": f"{a}+{b}=", "completion": "1;2", "answer": "2", "chosen": "1;2",
                 "rejected": "3"} for a in range(5) for b in range(5)]
        with open("sums.jsonl", "w") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        for algo in ("pretrain", "rm"):
            out = "other-base" if algo == "pretrain" else "other-rm"
            observe(algo, f"--base_seed=5 --out_dir={out}")
        yield observe


def without_clock(line):
    return {k: v for k, v in line.items() if "second" not in k}


def digest(networks):
    """One number for all the weights of a run."""
    code = hashlib.sha256()
    for name, weights in networks.items():
        for key, tensor in weights.items():
            code.update(f"{name} {key} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return code.hexdigest()


def entry(algo, flag):
    """-> (changed value, what else is given, what becomes different)"""
    found = EXCEPTIONS.get((algo, flag)) or OWN[algo].get(flag) or SHARED.get(flag)
    assert found, f"--{flag} of {algo} has no entry here: what must it change, and what not?"
    return (*found, *("", "weights")[len(found) - 1:])


@pytest.mark.parametrize("algo, flag", [pair for pair in FLAGS if pair[1] not in ELSEWHERE] + [
    ("dpo", "loss_type robust")], ids=lambda value: value)
def test_a_flag_changes_what_it_is_for(observe, algo, flag):
    """Changed from its default it changes the run in the way that its entry names, every choice of
    it in a way of its own; a flag that must change nothing changes nothing."""
    value, company, effect = entry(algo, flag)
    flag = flag.split()[0]
    action = train.make_parser(algo)._option_string_actions[f"--{flag}"]
    values = value.split() if value else action.choices
    seen = [observe(algo, company)] + [observe(algo, f"{company} --{flag}={v}") for v in values]
    if effect == REFUSED:
        assert seen[0].refused is None and seen[1].refused
        return
    assert [s.refused for s in seen] == [None] * len(seen)
    if isinstance(effect, Same):
        before, after = seen
        assert flat(after.lines) == pytest.approx(flat(before.lines), rel=1e-3, abs=1e-4)
        for name, weights in before.networks.items():
            other = after.networks[name]
            assert all(torch.allclose(weights[k], other[k], atol=1e-4) for k in weights)
    elif effect == "weights":
        if value is None:       # one of the choices is the default, or the one in the company
            seen = seen[1:]
        assert len({digest(s.networks) for s in seen}) == len(seen)
    else:
        assert len({repr(getattr(s, effect)) for s in seen}) == len(seen)
        if effect == SAID:      # and nothing is trained
            assert all(s.networks is None for s in seen[1:])
        else:                   # watching a run does not change it
            assert len({digest(s.networks) for s in seen}) == 1


def flat(lines):
    return {f"{line['step']} {k}": v for line in lines for k, v in line.items()}


def test_the_table_lists_nothing_else():
    """Every entry is of a flag that exists, and every algorithm's own flags are its own."""
    names = {flag for _, flag in FLAGS}
    assert set(SHARED) | set(ELSEWHERE) <= names
    for algo, own in OWN.items():
        assert {(algo, flag.split()[0]) for flag in own} <= set(FLAGS)
        assert not set(own) & set(SHARED)
    assert set(EXCEPTIONS) <= set(FLAGS) and set(OWN) == set(train.ALGORITHMS)


def test_the_algorithms_differ(observe):
    """--algo itself: no two algorithms make the same of the same base."""
    made = {digest(observe(algo).networks) for algo in train.ALGORITHMS}
    assert len(made) == len(train.ALGORITHMS)
