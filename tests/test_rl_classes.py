"""
What the classes of grpo.py and ppo.py do with a batch: how it is cut into updates and in which
order they come, by which constants it is averaged, which settings are refused, and how precise it
all is. Each test names a cause and its effect; none depends on how well something is learnt.
"""

import statistics

import pytest
import torch

import data
import grpo
import ppo
import train
from grpo import GRPO, GRPOConfig
from model import InputError
from ppo import PPO
from test_grpo import PROBLEMS, coin, collect, make_grpo, move, same
from test_ppo import letters, make_ppo, rows


def answers(part):
    """The (prompt ids, completion ids) of a part's rows."""
    return [(tuple(prompt), tuple(completion)) for prompt, completion, _ in rows(part)]


# -- precision ------------------------------------------------------------------------------------


def first_loss(make, double, **flags):
    """The algorithm, the first minibatch of a batch and its loss after the weights have moved."""
    algo = make(**flags)
    for network in {**algo.networks, **algo.frozen}.values():
        network.double() if double else network.float()
    minibatch = list(algo.minibatches(collect(algo)[0]))[0]
    move(algo.model)
    loss, _ = algo.loss(minibatch)
    loss.backward()
    return algo, minibatch, loss.detach()


@pytest.mark.parametrize("make, flags", [
    (make_grpo, dict(num_iterations=2, beta=0.3, entropy_coef=0.1)),
    (make_grpo, dict(num_iterations=2, beta=0.3, loss_type="grpo",
                     importance_sampling_level="sequence")),
    (make_ppo, dict()),
    (make_ppo, dict(truncation="bootstrap", whiten_advantages=False))])
def test_a_double_model_is_trained_in_float64(make, flags):
    """model.double(): every number of the minibatch, the loss and its gradient are float64, and
    agree with those of the same samples in float32 to its precision and not to the last bit; the
    weights add up to 1 as closely as float64 can."""
    _, single, loss32 = first_loss(make, False, **flags)
    algo, double, loss64 = first_loss(make, True, **flags)
    assert torch.equal(single["completion_ids"], double["completion_ids"])
    floats = {name for name, tensor in single.items() if tensor.is_floating_point()}
    assert {"advantages", "weights", "old_logprobs"} <= floats
    for name in floats:
        assert single[name].dtype == torch.float32 and double[name].dtype == torch.float64, name
        mask = single["completion_mask"] if single[name].dim() == 2 else ...
        assert same(single[name].double()[mask], double[name][mask], 1e-4), name
    assert loss32.dtype == torch.float32 and loss64.dtype == torch.float64
    assert loss64.item() == pytest.approx(loss32.item(), rel=1e-4) and loss64 != loss32
    assert all(p.grad.dtype == torch.float64 for p in algo.model.parameters())
    assert abs(double["weights"].sum() - 1) < 1e-14


def test_rewards_enter_float64_before_anything_is_computed_from_them():
    """In a double model's batch the advantages of GRPO, and the returns of PPO, which are scores
    less a penalty here, are exact to 1e-14."""
    algo = make_grpo()
    algo.model.double()
    batch, _ = collect(algo)
    texts = [algo.tokenizer.decode(ids) for ids in batch["completion_ids"].tolist()]
    for i, problem in enumerate(PROBLEMS):
        rewards = coin([problem["prompt"]] * 4, texts[4 * i:4 * i + 4])
        for advantage, reward in zip(batch["advantages"][4 * i:4 * i + 4].tolist(), rewards):
            by_hand = (reward - sum(rewards) / 4) / (statistics.stdev(rewards) + 1e-4)
            assert abs(advantage - by_hand) < 1e-14
    algo = make_ppo(wise=False, kl_coef=0.0, lam=1.0, missing_eos_penalty=0.7)
    for network in (algo.model, algo.critic, algo.ref_model):
        network.double()
    batch, cut = collect(algo)[0], 0
    for b, (_, completion, truncated) in enumerate(rows(batch)):
        score = letters(None, [algo.tokenizer.decode(completion)])[0]
        last = batch["returns"][b, len(completion) - 1]
        assert abs(last - (score - 0.7 * truncated)) < 1e-14
        cut += truncated
    assert 0 < cut < 16


def test_weights_are_as_precise_as_the_mask():
    """Bools give float32; a mask of numbers keeps its precision: in float64 1/3 has 16 digits."""
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]]).bool()
    for weights, expected in ((ppo.token_weights, 1 / 3),
                              (lambda m: grpo.token_weights(m, "dapo"), 1 / 3),
                              (lambda m: grpo.token_weights(m, "grpo"), 1 / 6),
                              (lambda m: grpo.token_weights(m, "dr_grpo", 5), 1 / 10)):
        assert weights(mask).dtype == weights(mask.float()).dtype == torch.float32
        assert weights(mask.double()).dtype == torch.float64
        assert abs(float(weights(mask.double())[0, 0]) - expected) < 1e-16
