"""What tests of whole runs read in a run's folder, and how they stop a run."""

import contextlib
import json
import os
import signal

import pytest
import torch

import train
from conftest import SHAPE
from harness.errors import InputError


def checkpoint(folder):
    return torch.load(os.path.join(folder, "ckpt.pt"), weights_only=True)


def weights(folder):
    """The state dict of the policy (or of the reward model)."""
    return checkpoint(folder)["model"]


def network(folder, name):
    """The state dict of any network of the run: model, ref_model, sampler, critic."""
    return {key.removeprefix(f"{name}."): value
            for key, value in checkpoint(folder)["algorithm"].items()
            if key.startswith(f"{name}.")}


def networks(folder):
    """The names of all networks in the checkpoint."""
    return {key.split(".")[0] for key in checkpoint(folder)["algorithm"]}


def metrics(folder):
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def summary(folder):
    with open(os.path.join(folder, "summary.json")) as file:
        return json.load(file)


def same(a, b):
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


CLOCK = {"seconds", "sampling_seconds", "updating_seconds", "eval_seconds", "pretrain_seconds",
         "tokens_per_second/train", "tokens_per_second/sample"}


def same_numbers(a, b):
    """Whether two lists of metrics say the same, the clock apart."""
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in a] == \
        [{k: v for k, v in line.items() if k not in CLOCK} for line in b]


@contextlib.contextmanager
def interrupted(monkeypatch, call):
    """Ctrl-C at the start of update number `call`."""
    update, calls = train.update, []

    def interrupted_update(*args):
        calls.append(None)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return update(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "update", interrupted_update)
        yield


def write_jsonl(rows, path="data.jsonl"):
    with open(path, "w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def complaint(program, *words):
    """The one line that a program's main() ends with where the command is wrong."""
    with pytest.raises(InputError) as error:
        program(*words)
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 1000, text
    return text


# -- runs of 8 steps: conftest.py's eight_steps(case) and uninterrupted(case) ----------------------

LOOP = ("--max_steps", 8, "--save_steps", 3, "--logging_steps", 1, "--eval_steps", 4,
        "--warmup_steps", 2)
# A model that was trained for three steps gets no answer right. So brevity is a second reward:
# without it no reward would differ, no gradient would flow, and comparing weights would be idle.
OWN = ("--batch_size", 4, "--num_generations", 4, "--reward", "verifier,brevity")
DEMOS = ("--batch_size", 4, "--num_demonstrations", 10)   # so that epochs straddle batches
SFT_, GRPO_ = ("--algo", "sft", *DEMOS), ("--algo", "grpo", *OWN)
HYBRID_ = ("--algo", "hybrid", *OWN, "--num_demonstrations", 10)   # two of four prompts have one
CASES = {"pretrain": ("--algo", "pretrain", "--batch_size", 4, *SHAPE),
         "sft": SFT_, "grpo": GRPO_,
         "grpo, two passes and KL": (*GRPO_, "--num_iterations", 2, "--beta", 0.05),
         "rft": ("--algo", "rft", *OWN, "--keep", "best", "--rounds", 3),
         "dft, psft": ("--algo", "dft", *DEMOS, "--loss_type", "psft", "--sync_steps", 3),
         "dpo, semi-online": ("--algo", "dpo", *OWN, "--pair_selection", "best_worst",
                              "--sync_steps", 3, "--sync_ref"),
         "dpo, self-rewarding": ("--algo", "dpo", "--batch_size", 4, "--num_generations", 4,
                                 "--reward", "confidence", "--sync_steps", 3, "--sync_ref"),
         "ppo": ("--algo", "ppo", *OWN, "--num_minibatches", 2, "--target_kl", 1e9),
         "distill": ("--algo", "distill", *OWN), "rm": ("--algo", "rm", *OWN),
         # What is random in rewards belongs to the step as well.
         "grpo, random": (*GRPO_, "--reward", "random,brevity"),
         "dpo, flipped": ("--algo", "dpo", *OWN, "--reward", "flipped,random"),
         "hybrid, a buffer": (*HYBRID_, "--reward", "verifier", "--gate", "buffer",
                              "--buffer_size", 5),
         "hybrid, hints": (*HYBRID_, "--hint", "one", "--imitation", "prefix",
                           "--num_iterations", 2)}
# Updates per step, where it is not 1; steps 3 and 6 of the hybrid with a buffer make one more.
UPDATES = {"grpo, two passes and KL": 2, "ppo": 4, "hybrid, a buffer": 1.25, "hybrid, hints": 2}


def same_networks(a, b):
    """Whether all networks of two runs, trained and kept, are equal bit for bit."""
    return same(checkpoint(a)["algorithm"], checkpoint(b)["algorithm"])


def close(a, b, atol):
    """Whether two state dicts are equal up to atol."""
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=atol)
                                        for name in a)


def shorter(init, **defaults):
    """The __init__ of a Config with other defaults: base models that are made in a few steps."""
    def short_init(self, **settings):
        init(self, **{**defaults, **settings})
    return short_init
