"""What GRPO and PPO compute in a float64 model is float64 throughout."""

import statistics

import pytest
import torch

import grpo
import ppo
from harness.log import Log
from tiny import (PROBLEMS, coin, letters, make_grpo, make_ppo, minibatches, move, rows, same,
                  sample)


def first_loss(make, double, **settings):
    """The algorithm, the first minibatch of a batch and its loss after the weights have moved."""
    algo = make(**settings)
    if double:
        algo.double()
    minibatch = minibatches(algo)[0]
    move(algo.model)
    loss = algo.loss(minibatch, Log())
    loss.backward()
    return algo, minibatch, loss.detach()


@pytest.mark.parametrize("make, settings", [
    (make_grpo, dict(num_iterations=2, beta=0.3, entropy_coef=0.1)),
    (make_grpo, dict(num_iterations=2, beta=0.3, loss_type="grpo",
                     importance_sampling_level="sequence")),
    (make_ppo, dict()),
    (make_ppo, dict(bootstrap_truncated_completions=True, whiten_advantages=False))])
def test_a_double_model_is_trained_in_float64(make, settings):
    """algo.double(): every number of the minibatch that is computed, the loss and its gradient are
    float64, and agree with those of the same samples in float32 to its precision and not to the
    last bit; the weights add up to 1 as closely as float64 can."""
    _, single, loss32 = first_loss(make, False, **settings)
    algo, double, loss64 = first_loss(make, True, **settings)
    assert torch.equal(single["completion_ids"], double["completion_ids"])
    floats = {name for name, tensor in single.items()
              if tensor.is_floating_point() and not name.startswith("rewards")}
    assert {"advantages", "weights", "old_logprobs"} <= floats
    for name in floats:
        assert single[name].dtype == torch.float32 and double[name].dtype == torch.float64, name
        mask = single["completion_mask"] if single[name].dim() == 2 else ...
        assert same(single[name].double()[mask], double[name][mask], 1e-4), name
    assert torch.equal(single["rewards"], double["rewards"])    # as the reward functions gave them
    assert loss32.dtype == torch.float32 and loss64.dtype == torch.float64
    assert loss64.item() == pytest.approx(loss32.item(), rel=1e-4) and loss64 != loss32
    assert all(p.grad.dtype == torch.float64 for p in algo.model.parameters())
    assert abs(double["weights"].sum() - 1) < 1e-14


def test_rewards_enter_float64_before_anything_is_computed_from_them():
    """In a double model's batch the advantages of GRPO, and the returns of PPO, which are scores
    less a penalty here, are exact to 1e-14."""
    algo = make_grpo(beta=0.1).double()                         # beta: no row is left out
    [part] = minibatches(algo)
    texts = [algo.tokenizer.decode(ids) for ids in part["completion_ids"].tolist()]
    for i, problem in enumerate(PROBLEMS):
        rewards = coin([problem["prompt"]] * 4, texts[4 * i:4 * i + 4])
        for advantage, reward in zip(part["advantages"][4 * i:4 * i + 4].tolist(), rewards):
            by_hand = (reward - sum(rewards) / 4) / (statistics.stdev(rewards) + 1e-4)
            assert abs(advantage - by_hand) < 1e-14
    algo = make_ppo(wise=False, kl_coef=0.0, lam=1.0, missing_eos_penalty=0.7).double()
    part, cut = minibatches(algo)[0], 0
    for b, (_, completion, truncated) in enumerate(rows(part)):
        score = letters(None, [algo.tokenizer.decode(completion)])[0]
        last = part["returns"][b, len(completion) - 1]
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


@pytest.mark.parametrize("masked", [False, True])
def test_the_logged_kl_is_per_answer_that_is_trained(masked):
    """objective/kl: log pi(y)/pi_ref(y) summed over each answer and averaged over those with a
    token in the loss; with mask_truncated_completions those that were cut off are not counted."""
    algo, log = make_ppo(mask_truncated_completions=masked), Log()
    batch = sample(algo)
    list(algo.minibatches({**batch}, log))
    kls, cut = [], 0
    for prompt, completion, truncated in rows(batch):
        cut += truncated
        if not (truncated and masked):
            tokens, T = torch.tensor([prompt + completion]), len(completion)
            logp, logq = (model(tokens)[0, len(prompt) - 1:-1].log_softmax(-1)[range(T), completion]
                          for model in (algo.model, algo.ref_model))
            kls.append(float((logp - logq).detach().sum()))
    assert len(kls) == (16 - cut if masked else 16) and 0 < cut < 16
    assert log.line()["objective/kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-5)
