"""
How a batch of GRPO and PPO is cut into updates, in which order they come, and what one update does:
neither micro-batches nor padding nor the order of rows change it.
"""

import copy
import json

import pytest
import torch

import data
import tasks
import train
from grpo import GRPO
from harness import flags
from harness.log import Log
from harness.run import Run
from model import GPTConfig
from tiny import (DEMONSTRATIONS, PROBLEMS, Letters, a_run, loss_and_gradient, make_grpo, make_ppo,
                  make_sft, minibatches, move, padded, rows, same_results, sample, tiny_model)

LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "cispo"]
LEVELS = ["token", "sequence"]
SIX = PROBLEMS + [{"prompt": p, **tasks.Chain.solve(p)} for p in ("2*2=", "8-3+1=")]


def answers(part):
    """The (prompt ids, completion ids) of a part's rows."""
    return [(tuple(prompt), tuple(completion)) for prompt, completion, _ in rows(part)]


# -- how a batch is cut ---------------------------------------------------------------------------


@pytest.mark.parametrize("parts, sizes", [(1, [6]), (2, [3, 3]), (4, [2, 2, 1, 1]),
                                          (5, [2, 1, 1, 1, 1]), (6, [1] * 6)])
def test_grpo_makes_as_many_updates_as_asked(parts, sizes):
    """Six groups of 4 in so many parts, none larger than another by more than a group, each row
    once and in order. (torch.chunk makes three parts of six where five are asked for.)"""
    algo = make_grpo(num_minibatches=parts, beta=0.1)           # beta: no row is left out
    batch = sample(algo, SIX)
    found = algo.minibatches({**batch}, Log())
    assert [len(part["advantages"]) for part in found] == [4 * size for size in sizes]
    assert [row for part in found for row in answers(part)] == answers(batch)


@pytest.mark.parametrize("parts, sizes", [(1, [16]), (3, [6, 5, 5]), (5, [4, 3, 3, 3, 3]),
                                          (11, [2] * 5 + [1] * 6), (16, [1] * 16)])
def test_ppo_makes_as_many_updates_as_asked(parts, sizes):
    """The same for PPO, whose parts are of single answers: 16 of them."""
    algo = make_ppo(num_minibatches=parts, num_iterations=1)
    batch = sample(algo)
    found = list(algo.minibatches({**batch}, Log()))
    assert [len(part["advantages"]) for part in found] == sizes
    assert [row for part in found for row in answers(part)] == answers(batch)


@pytest.mark.parametrize("make, settings", [
    (make_grpo, dict(num_iterations=3, num_minibatches=2, beta=0.1)),
    (make_ppo, dict(num_iterations=3, num_minibatches=2, target_kl=0.0))])
def test_updates_come_pass_by_pass(make, settings):
    """Three passes over two parts: part 1, part 2, part 1, part 2, part 1, part 2. No part is
    repeated before the next has had its turn, and no pass is made of one part alone."""
    algo = make(**settings)
    batch = sample(algo)
    order = [answers(part) for part in algo.minibatches({**batch}, Log())]
    assert order[0] + order[1] == answers(batch) and order[0] != order[1]
    assert order == order[:2] * 3


def test_minibatches_keep_groups_together():
    """num_minibatches 2 of 4 groups: the first takes prompts 0 and 1, the second 2 and 3, each row
    once; the weights of each add up to 1 by themselves, since each is an update of its own. The
    advantages are those of the batch that is not cut."""
    algo = make_grpo(num_minibatches=2, beta=0.1)               # beta: no row is left out
    batch = sample(algo)
    parts = algo.minibatches({**batch}, Log())
    assert [len(part["advantages"]) for part in parts] == [8, 8]
    [whole] = minibatches(make_grpo(beta=0.1))
    assert torch.equal(torch.cat([part["advantages"] for part in parts]), whole["advantages"])
    for part, prompts in zip(parts, (slice(0, 2), slice(2, 4))):
        real, expected = ([row[mask].tolist() for row, mask in zip(ids, masks)] for ids, masks in (
            (part["prompt_ids"], part["prompt_mask"]),
            (batch["prompt_ids"][prompts], batch["prompt_mask"][prompts])))
        assert real == expected and part["prompt_index"].tolist() == [0] * 4 + [1] * 4
        assert float(part["weights"].sum()) == pytest.approx(1)


# -- neither micro-batches, nor padding, nor order change a result --------------------------------


def off_policy_minibatch(**settings):
    """A GRPO minibatch in which every term of the loss is at work: ratios are not 1 and some tokens
    are clipped, there is a KL to a different model and an entropy bonus."""
    algo = make_grpo(num_iterations=2, beta=0.3, entropy_coef=0.2, **settings)
    minibatch = minibatches(algo)[0]
    move(algo.model)
    return algo, minibatch


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_grpo_is_invariant_to_micro_batches_padding_and_order(float64, loss_type, level):
    """Loss, gradient and metrics are those of the batch, for every aggregation and both kinds of
    ratio, with clip, KL and entropy bonus at work. (Means of micro-batch means, or micro-batches
    that get lost, have spoilt published baselines: 2604.23747.)"""
    algo, minibatch = off_policy_minibatch(loss_type=loss_type, importance_sampling_level=level)
    whole = loss_and_gradient(algo, minibatch)
    assert whole[1].abs().max() > 1e-3
    for size in (1, 2, 3, 5):
        assert same_results(loss_and_gradient(algo, minibatch, size), whole), size
    assert same_results(loss_and_gradient(algo, padded(minibatch)), whole), "wider padding"
    order = torch.randperm(len(minibatch["prompt_index"]))
    shuffled = data.take_rows(minibatch, order)
    assert same_results(loss_and_gradient(algo, shuffled), whole), "another order"
    assert 0 < whole[2]["clip_ratio"] < 1 and whole[2]["kl"] > 0


def test_update_adds_up_micro_batches(float64):
    """train.update in micro-batches of 3 reports loss and gradient norm of the whole batch, and
    counts one update and its tokens."""
    algo, minibatch = off_policy_minibatch()
    loss, grad, line = loss_and_gradient(algo, minibatch)
    algo.config.micro_batch_size, run = 3, a_run()
    train.update(algo, minibatch, run)
    found = run.log.line()
    assert found["loss"] == pytest.approx(float(loss), abs=1e-10)
    assert found["grad_norm"] == pytest.approx(float(grad.norm()), abs=1e-10)
    assert found["kl"] == pytest.approx(line["kl"], abs=1e-10)
    tokens = int(minibatch["completion_mask"].sum())
    assert run.log.totals == {"updates": 1, "trained_tokens": tokens}


# -- several updates on one batch -----------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [0, 3])
@pytest.mark.parametrize("settings", [dict(num_iterations=2), dict(num_minibatches=2),
                                      dict(num_iterations=3, beta=0.1)])
def test_the_first_ratio_is_exactly_one(settings, micro_batch_size):
    """pi_old is scored before anything moves, by the very forward pass that trains: the first ratio
    is 1 bit for bit; after an update it is not; and pi_old stays the same in later passes
    (DeepSeekMath 2402.03300, algorithm 1)."""
    algo = make_grpo(**settings, micro_batch_size=micro_batch_size, learning_rate=1e-2)
    before, ratios, old = [p.detach().clone() for p in algo.model.parameters()], [], []
    for minibatch in minibatches(algo):
        old.append(minibatch["old_logprobs"].clone())
        if not ratios:
            for micro in data.split(minibatch, micro_batch_size):
                logprobs = algo.logprobs(algo.model, micro)[0].detach()
                mask = micro["completion_mask"]
                assert torch.equal(logprobs[mask], micro["old_logprobs"][mask])
        run = a_run()
        train.update(algo, minibatch, run)
        ratios.append(run.log.line()["max_ratio"])
    assert ratios[0] == 1.0 and all(ratio > 1.0 for ratio in ratios[1:])
    parts = algo.config.num_minibatches
    assert len(ratios) == parts * algo.config.num_iterations
    assert all(torch.equal(a, b) for a, b in zip(old, old[parts:]))
    assert any(not torch.equal(a, b) for a, b in zip(before, algo.model.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_ratio_is_exactly_one_in_the_loop(tmp_path, dtype):
    """The same through train.train, which must score pi_old in the precision that it trains in. At
    a learning rate too small to change a weight, the ratio of the second pass is 1 as well, so the
    largest ratio of the step is 1."""
    settings = dict(dtype=dtype, device="cpu", num_iterations=2, num_generations=4, batch_size=4,
                    max_steps=1, logging_steps=1, eval_problems=4, learning_rate=1e-30,
                    reward="brevity", out_dir=tmp_path)
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    config = flags.parse(["--algo", "grpo", *words], train.ALGORITHMS, GPTConfig)
    algo = GRPO(config, tiny_model(), Letters(), tasks.Chain(2, 3))
    with Run(algo, "") as run:
        train.train(algo, run)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["max_ratio"] == 1.0 and line["grad_norm"] > 0 and line["updates"] == 2


def test_a_batch_used_once_needs_no_second_scoring(float64):
    """With one update per batch the ratio is 1 by construction, and the gradient is that of a
    rescored batch."""
    algo = make_grpo()
    [minibatch] = minibatches(algo)
    once = loss_and_gradient(algo, minibatch)
    assert "old_logprobs" not in minibatch and once[2]["max_ratio"] == 1
    old_logprobs = algo.score(algo.model, minibatch)
    rescored = loss_and_gradient(algo, {**minibatch, "old_logprobs": old_logprobs})
    assert same_results(once, rescored) and once[1].abs().max() > 1e-3


# -- batches without a gradient -------------------------------------------------------------------


def flat(prompts, completions, **columns):
    return [0.1] * len(prompts)


@pytest.mark.parametrize("settings", [dict(), dict(num_iterations=2)])
def test_a_batch_without_any_advantage_changes_nothing(settings):
    """All groups flat: the minibatch is one row whose gradient is 0, and a first update leaves the
    weights as they are."""
    algo, log = make_grpo(flat, **settings, learning_rate=1e-2), Log()
    parts = minibatches(algo, log=log)
    assert log.line()["frac_reward_zero_std"] == 1
    assert len(parts) == algo.config.num_iterations
    before, run = copy.deepcopy(algo.model.state_dict()), a_run()
    for part in parts:
        assert part["advantages"].tolist() == [0]
        train.update(algo, part, run)
    line = run.log.line()
    assert line["loss"] == line["grad_norm"] == 0 and line["max_ratio"] == 1
    assert all(torch.equal(before[name], p) for name, p in algo.model.state_dict().items())


def test_an_update_without_a_gradient_still_moves_by_momentum():
    """It is a step of Adam like any other: after a real update the weights go on as they went."""
    algo = make_grpo(learning_rate=1e-2)
    train.update(algo, minibatches(algo)[0], a_run())
    before = algo.model.lm_head.weight.detach().clone()
    algo.rewards.functions = {"flat": flat}
    train.update(algo, minibatches(algo)[0], a_run())
    assert not torch.equal(before, algo.model.lm_head.weight)


def test_a_batch_of_truncated_answers_alone_changes_nothing():
    """With mask_truncated_completions no answer may be left: the update has no gradient, and no
    nan."""
    algo, run = make_grpo(mask_truncated_completions=True, max_steps=1), a_run()
    batch = sample(algo)
    batch["truncated"] = torch.ones_like(batch["truncated"])
    before = copy.deepcopy(algo.model.state_dict())
    for part in algo.minibatches(batch, Log()):
        train.update(algo, part, run)
    line = run.log.line()
    assert line["loss"] == line["grad_norm"] == 0 and run.log.totals["trained_tokens"] == 0
    assert all(torch.equal(before[name], p) for name, p in algo.model.state_dict().items())


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3, 1e6])
def test_a_gradient_is_shortened_to_max_grad_norm_and_at_0_never(max_grad_norm):
    """What the optimizer gets has at most that norm; at 0, and where it is short enough already, it
    is the gradient of the loss. What is logged is the norm before."""
    algo = make_sft(max_grad_norm=max_grad_norm)
    [minibatch] = algo.minibatches(sample(algo, DEMONSTRATIONS), Log())
    whole = loss_and_gradient(algo, minibatch)[1].norm()
    run = a_run()
    train.update(algo, minibatch, run)
    given = torch.cat([p.grad.flatten() for p in algo.model.parameters()]).norm()
    assert float(given) == pytest.approx(1e-3 if max_grad_norm == 1e-3 else float(whole), rel=1e-3)
    assert run.log.line()["grad_norm"] == pytest.approx(float(whole), rel=1e-5) and whole > 0.01
