"""The reward model, on a tiny model: its pairs, its loss, where it reads, the judge it becomes."""

import math
import random

import pytest
import torch

import data
import rm
import tiny
from harness.errors import InputError
from harness.evaluate import judge_pairs
from harness.log import Log
from model import GPT, GPTConfig
from rm import RM, RMConfig
from test_scalar_head import some_batch
from tiny import (PROBLEMS, Letters, coin, loss_and_gradient, minibatches, move, padded, read_alone,
                  rows, same, same_results, slope, texts, tiny_model, update)


def make_rm(**settings):
    """A reward model whose head says something, and pairs judged by the coin."""
    algo = tiny.make(RM, coin, **{"num_generations": 4, **settings})
    algo.sampler.load_state_dict(tiny_model(seed=1).state_dict())
    move(algo.model, 0.3)
    return algo


def flat(prompts, completions, **columns):
    return [1.0] * len(prompts)


def test_answers_are_read_at_their_last_real_token(float64):
    """Whatever the width, the side and the content of the padding (also where it is <end> itself)
    and whatever the order, an answer's reward is the head after its last token, read alone
    (transformers issue 35352)."""
    model, batch = make_rm().model, some_batch()
    alone = [float(read_alone(model, p, c)[-1]) for p, c, _ in rows(batch)]
    assert len(set(alone)) == 4 and same(rm.answer_rewards(model, batch), alone)
    assert same(rm.answer_rewards(model, padded(batch, 4, 3)), alone)
    for pad_id in (Letters.eos_id, 3):
        other = {**batch, **{f"{part}_ids": batch[f"{part}_ids"].masked_fill(
            ~batch[f"{part}_mask"], pad_id) for part in ("prompt", "completion")}}
        assert same(rm.answer_rewards(model, other), alone)
    order = torch.tensor([2, 0, 3, 1])
    assert same(rm.answer_rewards(model, data.take_rows(batch, order)), [alone[k] for k in order])
    on_the_right = {name: batch[name].clone() for name in ("prompt_ids", "prompt_mask")}
    for ids, mask, old, real in zip(*on_the_right.values(), batch["prompt_ids"],
                                    batch["prompt_mask"]):
        ids[:], mask[:] = torch.cat([old[real], old[~real]]), torch.cat([real[real], real[~real]])
    assert not on_the_right["prompt_mask"][:, -1].all()
    assert same(rm.answer_rewards(model, {**batch, **on_the_right}), alone)


def test_the_judge_is_the_reward_model():
    """Handed to a task as a reward function, it says what answer_rewards says, as floats, a row of
    its own each."""
    algo, batch = make_rm(), some_batch()
    prompts = [p["prompt"] for p in PROBLEMS]
    answers = [algo.tokenizer.decode(ids) for ids in batch["completion_ids"].tolist()]
    judge = rm.Judge(algo.model, algo.tokenizer)
    found = judge(prompts, answers, answer=["2", "7", "1", "7"])
    assert found == rm.answer_rewards(algo.model, batch).tolist()
    assert all(type(r) is float for r in found)
    alone = [judge([p], [c])[0] for p, c in zip(prompts, answers)]
    assert alone == pytest.approx(found, abs=1e-5)


def test_the_judge_takes_columns_of_any_name():
    """A file's columns may be called prompts, completions or self: they reach the judge by name and
    stand in nothing's way."""
    judge, columns = rm.Judge(make_rm().model, Letters()), ("prompts", "completions", "self")
    plain = judge(["7+5="], ["2"])
    assert judge(["7+5="], ["2"], **{name: ["x"] for name in columns}) == plain


def test_the_judge_reads_whatever_was_written():
    """Broken UTF-8 grows when it is decoded, one byte into three, and may then not fit the model:
    it is still judged."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=16)).with_scalar_head()
    tokenizer = data.Tokenizer()
    text = tokenizer.decode([0xff] * 20)   # 20 tokens fit, 60 do not
    assert all(map(math.isfinite, rm.Judge(model, tokenizer)(["7+5=", "7+5="], [text, "2"])))


def test_pairs_are_chosen_then_rejected():
    """Rows chosen, rejected, chosen, ...: two answers to one prompt of which the first has the
    higher true reward; groups without contrast are skipped and counted."""
    algo, log = make_rm(), Log()
    [minibatch] = minibatches(algo, log=log)
    pairs = texts(minibatch)
    true, n = coin(*zip(*pairs)), len(pairs) // 2
    assert 2 <= n <= 3 and true == [1.0, 0.0] * n   # the first group is flat
    assert [p for p, _ in pairs[0::2]] == [p for p, _ in pairs[1::2]]
    assert log.line()["skipped_pairs"] == (4 - n) / 4
    algo.rewards.functions = {"flat": flat}
    assert minibatches(algo, log=log) == [] and log.line()["skipped_pairs"] == 1


def test_pairs_of_a_file():
    """A file's preferences are taken as they are, chosen before rejected, pairs of equal answers
    left out."""
    task = tiny.file_task([{"prompt": "7+5=", "chosen": "2", "rejected": "3"},
                           {"prompt": "1+1=", "chosen": "2", "rejected": "2"},
                           {"prompt": "9*9=", "chosen": "1", "rejected": "9*9=8"}])
    algo, log = tiny.make(RM, task=task), Log()
    [minibatch] = minibatches(algo, algo.examples(), log=log)
    assert texts(minibatch) == [("7+5=", "2"), ("7+5=", "3"), ("9*9=", "1"), ("9*9=", "9*9=8")]
    assert log.line() == {"skipped_pairs": 1 / 3}


def test_rm_loss_and_metrics(float64):
    """The loss is the mean over pairs of reward_loss with the configured centring, the metrics are
    means over pairs; the sampler, which is no reward model, is not trained."""
    algo = make_rm(center_rewards_coefficient=0.2)
    [minibatch] = minibatches(algo)
    r = [float(read_alone(algo.model, p, c)[-1]) for p, c, _ in rows(minibatch)]
    pairs = list(zip(r[0::2], r[1::2]))
    n = len(pairs)
    by_hand = [math.log(1 + math.exp(b - a)) + 0.2 * (a + b) ** 2 for a, b in pairs]
    loss, gradient, found = loss_and_gradient(algo, minibatch)
    assert same(loss, sum(by_hand) / n) and gradient.abs().max() > 1e-3 and n > 1
    assert found == pytest.approx({"accuracy": sum(a > b for a, b in pairs) / n,
                                   "margin": sum(a - b for a, b in pairs) / n,
                                   "mean_reward": sum(r) / len(r)})
    assert all(p.grad is None for p in algo.sampler.parameters())


def test_the_rm_is_invariant_to_micro_batches_and_padding(float64):
    """However the pairs are cut, never through the middle of one, or padded: the same loss,
    gradient and metrics."""
    algo = make_rm()
    [minibatch] = minibatches(algo, PROBLEMS * 2)
    whole = loss_and_gradient(algo, minibatch)
    assert len(minibatch["completion_ids"]) >= 8
    for size in (1, 2, 3, 4, 5):
        parts = data.split(minibatch, size, algo.rows_together)
        assert all(len(part["completion_ids"]) % 2 == 0 for part in parts)
        found = loss_and_gradient(algo, minibatch, size)
        assert same_results(found, whole), f"micro-batches of {size}"
    assert same_results(loss_and_gradient(algo, padded(minibatch)), whole), "wider padding"


def test_the_rm_gradient_by_finite_differences(float64):
    """The derivative of the whole loss along random directions, through the network."""
    algo = make_rm()
    [minibatch] = minibatches(algo)
    _, gradient, _ = loss_and_gradient(algo, minibatch)
    for seed in range(3):
        direction = torch.randn(len(gradient), generator=torch.Generator().manual_seed(seed))
        expected = float(gradient @ direction)
        found = slope(algo, algo.model, minibatch, direction)
        assert found == pytest.approx(expected, abs=1e-7) and abs(expected) > 1e-3


def test_rm_evaluation_is_deterministic():
    """The same held-out pairs every time, whatever the state of the global generators; a head
    turned upside down ranks right what was ranked wrong; where there is no pair, there is no
    number."""
    algo = make_rm(eval_problems=16)
    first = judge_pairs(algo)
    torch.manual_seed(99)
    random.seed(99)
    assert judge_pairs(algo) == first
    assert 0 < first["eval/pair_accuracy"] < 1 and first["eval/pairs"] > 8
    with torch.no_grad():
        algo.model.lm_head.weight *= -1
    accuracy = judge_pairs(algo)["eval/pair_accuracy"]
    assert accuracy == pytest.approx(1 - first["eval/pair_accuracy"])
    algo.rewards.functions = {"flat": flat}
    assert judge_pairs(algo) == {}


def test_the_rm_learns_its_pairs():
    """30 updates on one batch of pairs bring the loss from log 2, a coin, to where every pair is
    ranked right."""
    algo = tiny.make(RM, coin, num_generations=4, learning_rate=1e-2, weight_decay=0.0)
    [minibatch] = minibatches(algo, PROBLEMS * 2)
    assert float(algo.loss(minibatch, Log()).detach()) == pytest.approx(math.log(2))
    update(algo, *[minibatch] * 30)
    log = Log()
    assert algo.loss(minibatch, log) < 0.1 and log.line()["accuracy"] == 1


@pytest.mark.parametrize("settings, message", [
    (dict(num_generations=1), "at least 2"), (dict(num_prompts=0), "--num_prompts 0: "),
    (dict(temperature=0.0), "above 0"),
    (dict(center_rewards_coefficient=-1.0), "--center_rewards_coefficient -1.0: "),
    (dict(reward="model"), "its own judge"), (dict(reward="brevity,model"), "its own judge")])
def test_wrong_rm_settings_are_refused(settings, message):
    """Each is an InputError that says what is wrong; the settings at the edge are taken."""
    with pytest.raises(InputError, match=message):
        RMConfig(**settings)
    RMConfig(num_generations=2, num_prompts=1, center_rewards_coefficient=0)
