"""
A model in float64 is trained in float64: no algorithm rounds to float32 on the way.
"""

import copy
import math

import pytest
import torch

import data
import tasks
from dft import DFT
from dpo import DPO
from harness.log import Log
from rft import RFT
from rm import RM
from sft import SFT
from tiny import DEMONSTRATIONS, PAIRS, Letters, move, texts, tiny_model

DFT_LOSSES = ["dft", "dft_sequence", "power", "chord", "prift", "iw_sft", "psft", "asft", "gem"]
PAIR_LOSSES = ["sigmoid", "robust", "hinge", "ipo", "cpo", "simpo", "orpo"]


def demonstration_batch():
    return data.collate(DEMONSTRATIONS, Letters())


def rewarded_batch():
    """Demonstrations as if they were a group of sampled answers; three reach the bar."""
    rewards = torch.tensor([0.25, 0.0, 0.75, 0.5, 1.0])
    return {**demonstration_batch(), "rewards": rewards, "bar": torch.full_like(rewards, 0.5)}


def pair_batch():
    return data.collate_pairs(PAIRS, Letters(), Log())


COMPUTED = [(SFT, {}, demonstration_batch),
            *[(RFT, dict(weighting=name), rewarded_batch) for name in ("none", "awr", "dft")],
            *[(DFT, dict(loss_type=name), demonstration_batch) for name in DFT_LOSSES],
            *[(DPO, dict(loss_type=name), pair_batch) for name in PAIR_LOSSES + ["kto"]],
            (DPO, dict(loss_type="ipo", ipo_average=True, rpo_alpha=0.3), pair_batch)]


@pytest.mark.parametrize("Algorithm, settings, make_batch", COMPUTED)
def test_a_double_model_computes_in_float64(monkeypatch, Algorithm, settings, make_batch):
    """Loss and gradient of a model.double() are those of the same weights where every tensor is
    float64, to 14 digits: a single step in float32 would leave 7. The loss says so in its dtype."""
    models = [tiny_model(seed).double() for seed in (0, 1)]
    group = dict(num_generations=5) if Algorithm is RFT else {}
    config = Algorithm.Config(device="cpu", dtype="float32", **group, **settings)

    def loss_and_gradient():
        model, other = copy.deepcopy(models)
        algo = Algorithm(config, model, Letters(), tasks.Chain(2, 3))
        algo.ref_model.load_state_dict(other.state_dict())
        if settings.get("loss_type") == "psft":
            algo.old_model.load_state_dict(other.state_dict())
        algo.from_file = True            # of DPO: the pairs are there
        [minibatch] = algo.minibatches(make_batch(), Log())
        loss = algo.loss(minibatch, Log())
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])
    loss, gradient = loss_and_gradient()
    assert loss.dtype == gradient.dtype == torch.float64
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        exact, exact_gradient = loss_and_gradient()
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-13) and loss != 0
    assert (gradient - exact_gradient).abs().max() < 1e-13 < gradient.abs().max()


@pytest.mark.parametrize("weighting", ["none", "awr", "dft"])
def test_rft_weighs_rewards_in_float64(weighting):
    """By hand, from rewards that come in float32: the weights of a float64 model are right to 15
    digits."""
    config = RFT.Config(device="cpu", dtype="float32", num_generations=5, weighting=weighting)
    algo = RFT(config, tiny_model().double(), Letters(), tasks.Chain(2, 3))
    [minibatch] = algo.minibatches(rewarded_batch(), Log())
    rows = [(0.25, 0), (0.0, 0), (0.75, 1), (0.5, 1), (1.0, 1)]      # mean .5; reaches the bar
    if weighting == "awr":
        rows = [(r, math.exp((r - 0.5) / 0.3)) for r, _ in rows]
    lengths = [len(e["completion"]) + 1 for e in DEMONSTRATIONS]
    total = sum(w * n for (_, w), n in zip(rows, lengths))
    by_hand = torch.tensor([w / total for _, w in rows if w], dtype=torch.float64)
    found = minibatch["weights"]
    assert found.dtype == torch.float64
    assert torch.allclose(found[:, 0], by_hand, rtol=1e-14, atol=0)


def test_a_double_reward_model_computes_in_float64():
    """By hand from answers read alone: the loss is float64 and right to 14 digits."""
    config = RM.Config(device="cpu", dtype="float32")
    algo = RM(config, tiny_model().double(), Letters(), tasks.Chain(2, 3))
    algo.from_file = True                # the pairs are there
    move(algo.model, 0.3)
    [minibatch] = algo.minibatches(pair_batch(), Log())
    loss = algo.loss(minibatch, Log())
    rewards = []
    for p, c in texts(minibatch):
        ids = torch.tensor([[16, *Letters().encode(p + c), 16]])
        rewards.append(algo.model(ids)[0, -1, 0].item())
    pairs = list(zip(rewards[0::2], rewards[1::2]))
    by_hand = [math.log1p(math.exp(b - a)) + 0.01 * (a + b) ** 2 for a, b in pairs]
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(sum(by_hand) / 3, rel=1e-13)
