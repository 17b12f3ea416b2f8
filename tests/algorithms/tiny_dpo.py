"""DPO on the tiny model: on sampled answers judged by `coin`, or on a file's preferences."""

import pytest
import torch

import tiny
from dpo import DPO

PAIR_LOSSES = ["sigmoid", "robust", "hinge", "ipo", "cpo", "simpo", "orpo"]
DRAW = 14   # a seed with which the first group is flat and the other three are not, in both dtypes
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in (
    ("7+5=", "2", "3"), ("1-2*3=", "1-2=9;9*3=7", "7"), ("9*9=", "8", "8"),
    ("4+4-1=", "7", "4+4=9;9-1=8"), ("0+1=", "", "1"))]
SINGLES = [{"prompt": p, "completion": c, "label": label} for p, c, label in (
    ("7+5=", "2", True), ("1-2*3=", "1-2=9;9*3=7", True), ("9*9=", "8", False),
    ("4+4-1=", "4+4=9", False), ("0+1=", "1", True))]

ALL_LOSSES = [dict(loss_type=loss_type) for loss_type in PAIR_LOSSES + ["kto"]] + [
    dict(loss_type="sigmoid", label_smoothing=0.2), dict(loss_type="robust", label_smoothing=0.2),
    dict(loss_type="ipo", ipo_average=True), dict(loss_type="sigmoid", rpo_alpha=1.0),
    dict(loss_type="hinge", beta=0.2), dict(loss_type="simpo", rpo_alpha=0.5, beta=2.0),
    dict(loss_type="kto", desirable_weight=2.0, undesirable_weight=0.5)]


def named(settings):
    return "-".join(map(str, settings.values()))


each_loss = pytest.mark.parametrize("settings", ALL_LOSSES, ids=named)


def make_dpo(lines=None, **settings):
    """DPO on problems with groups of 4 and the reward `coin`, or on a file of these lines. The
    reference is another model than the policy, so that nothing cancels by chance."""
    settings = {"num_generations": 4, **settings}
    if lines is None:
        return tiny.make(DPO, tiny.coin, **settings)
    return tiny.make(DPO, task=tiny.file_task(lines), **settings)


def sample(algo, examples=tiny.PROBLEMS, log=None):
    return tiny.sample(algo, examples, seed=DRAW, log=log)


def minibatch_of(algo, examples=tiny.PROBLEMS, log=None):
    """The one update of a step."""
    [minibatch] = tiny.minibatches(algo, examples, seed=DRAW, log=log)
    return minibatch


def direct_logps(model, batch):
    """Log-probability of each answer from one unpadded forward pass of its own, <end> included; and
    its length in tokens."""
    found, lengths = [], []
    for b, i in enumerate(batch["prompt_index"].tolist()):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i]].tolist()
        completion = batch["completion_ids"][b][batch["completion_mask"][b]].tolist()
        logprobs = tiny.read_alone(model, prompt, completion)[:-1].log_softmax(-1)
        found.append(sum(logprobs[t, token].item() for t, token in enumerate(completion)))
        lengths.append(len(completion))
    return torch.tensor(found, dtype=torch.float64), torch.tensor(lengths, dtype=torch.float64)
