"""
Several updates on one batch: parts and passes, the first ratio of exactly 1, and target_kl, which
ends the passes once the policy has moved too far.
"""

import json

import pytest
import torch

import data
import ppo
import tiny
import train
from harness.log import Log
from harness.run import Run
from ppo import PPO
from tiny import PROBLEMS, SEED, move, read_alone, rows, same, sample, update
from tiny_ppo import TRUNCATION, first_pass, make_ppo


def test_the_order_of_the_batch_is_random_and_its_parts_are_parts():
    """Rows are shuffled, so that a part is a random part; together the parts of a pass are the
    batch, each row once, with weights that add up to 1 in every part, each being an update of its
    own."""
    algo = make_ppo(num_minibatches=3, num_iterations=1)
    batch = sample(algo)
    assert batch["prompt_index"].tolist() != sorted(batch["prompt_index"].tolist())
    assert torch.bincount(batch["prompt_index"]).tolist() == [4] * 4
    parts = list(algo.minibatches(batch, Log()))
    assert [len(part["completion_ids"]) for part in parts] == [6, 5, 5]
    assert [row for part in parts for row in rows(part)] == list(rows(batch))
    for part in parts:
        assert float(part["weights"].sum()) == pytest.approx(1)
        assert (part["weights"][~part["completion_mask"]] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_scores_what_sampling_drew(temperature):
    """pi_old is the sampler's own log-probability, temperature included, and row for row after the
    shuffle."""
    algo, generator = make_ppo(temperature=temperature), torch.Generator().manual_seed(SEED)
    prompts = data.collate([{"prompt": p["prompt"]} for p in PROBLEMS], algo.tokenizer)
    samples = algo.model.generate(prompts["prompt_ids"], prompts["prompt_mask"],
                                  algo.task.max_new_tokens, 16, 17, 4, temperature,
                                  generator=generator)
    order = torch.randperm(16, generator=generator)   # the draws that sample makes, in its order
    [part] = first_pass(algo)
    assert torch.equal(part["completion_ids"], samples.completion_ids[order])
    logprobs = part["old_logprobs"] * part["completion_mask"]
    assert same(logprobs, samples.logprobs[order], 1e-4)


@pytest.mark.parametrize("micro_batch_size", [0, 3])
@pytest.mark.parametrize("num_minibatches", [1, 2, 3])
@pytest.mark.parametrize("truncation", TRUNCATION)
def test_every_first_ratio_of_ppo_is_exactly_one(truncation, num_minibatches, micro_batch_size):
    """Before anything moves, the forward passes of training repeat those that scored pi_old and V,
    bit for bit, in every part of the batch; after an update they do not."""
    algo = make_ppo(**TRUNCATION[truncation], num_minibatches=num_minibatches, target_kl=0.0,
                    micro_batch_size=micro_batch_size, learning_rate=1e-2)
    parts = list(algo.minibatches(sample(algo), Log()))
    assert len(parts) == 2 * num_minibatches
    for part in parts[:num_minibatches]:
        for micro in data.split(part, micro_batch_size):
            mask = micro["completion_mask"]
            logprobs = algo.logprobs(algo.model, micro)[0]
            assert torch.equal(logprobs[mask], micro["old_logprobs"][mask])
            assert torch.equal(algo.values(micro)[:, :-1][mask], micro["old_values"][mask])
    ratios = [update(algo, part)["max_ratio"] for part in parts]
    assert ratios[0] == 1.0 and all(ratio > 1 for ratio in ratios[1:])


def run_of(folder, **settings):
    """A run of the loop with PPO on the tiny model. -> its lines"""
    algo = tiny.make(PPO, ref_seed=None, num_generations=4, batch_size=4, eval_problems=4,
                     reward="brevity", logging_steps=1, out_dir=str(folder), **settings)
    with Run(algo, "") as run:
        train.train(algo, run)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return algo, [json.loads(line) for line in lines[1:]]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")   # PyTorch's, about RMSNorm being slower so
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_scores_in_the_precision_that_it_trains_in(tmp_path, dtype):
    """The same through the loop, whose autocast both must be in: at a learning rate too small to
    move a weight, the largest ratio of two passes is 1."""
    _, [line] = run_of(tmp_path, dtype=dtype, max_steps=1, num_minibatches=2, learning_rate=1e-30)
    assert line["max_ratio"] == 1.0 and line["grad_norm"] > 0
    assert line["policy/approxkl"] == 0   # read in the precision of pi_old


def passes_made(learning_rate=3e-3, **settings):
    """Train on one batch. -> the number of updates; {updates made before: what was measured then};
    {updates made before: what an independent reading says} at every start of a pass; the line of
    the log."""
    algo, log = make_ppo(learning_rate=learning_rate, **settings), Log()
    measured, read, updates, mean = {}, {}, 0, log.mean

    def recorded(name, values, mask=None):
        if name == "policy/approxkl":
            measured[updates] = float(values.mean())
        mean(name, values, mask)
    log.mean = recorded
    parts = []
    for part in algo.minibatches(sample(algo), log):
        parts.append(part)
        if updates % algo.config.num_minibatches == 0 and updates > 0:
            read[updates] = distance(algo, parts[:algo.config.num_minibatches])
        update(algo, part)
        updates += 1
    return updates, measured, read, log.line()


def distance(algo, parts):
    """1/2 (log pi/pi_old)^2, averaged over all tokens of the batch, each answer read alone."""
    squares = []
    for part in parts:
        for b, (prompt, completion, _) in enumerate(rows(part)):
            if part["completion_mask"][b].any():
                T = len(completion)
                logits = read_alone(algo.model, prompt, completion)[:T] / algo.config.temperature
                logprobs = logits.log_softmax(-1)[range(T), completion]
                squares += ((logprobs - part["old_logprobs"][b, :T]) ** 2 / 2).tolist()
    return sum(squares) / len(squares)


@pytest.mark.parametrize("settings", [dict(), dict(num_minibatches=3, micro_batch_size=3),
                                      TRUNCATION["mask"], dict(temperature=0.7)], ids=str)
def test_what_has_moved_is_measured_before_every_pass_after_the_first(float64, settings):
    """The figure is half the mean squared log-ratio over all completion tokens of the batch (the k2
    estimate of joschu.net/blog/kl-approx.html), as reading every answer alone finds it; the log has
    the mean of the three readings."""
    updates, measured, read, line = passes_made(target_kl=1e9, num_iterations=4, **settings)
    parts = settings.get("num_minibatches", 1)
    assert updates == 4 * parts and list(measured) == list(read) == [parts, 2 * parts, 3 * parts]
    for step, figure in measured.items():
        assert figure == pytest.approx(read[step], rel=1e-6) and figure > 1e-6, step
    assert len(set(measured.values())) == 3
    assert line["policy/approxkl"] == pytest.approx(sum(measured.values()) / 3)


def test_before_the_first_pass_nothing_has_moved(float64):
    """An answer read alone has the log-probabilities of pi_old: the reading starts at 0."""
    algo = make_ppo(num_minibatches=2)
    parts = first_pass(algo)
    assert distance(algo, parts) < 1e-12
    move(algo.model)
    assert distance(algo, parts) > 1e-6


def test_target_kl_ends_the_passes():
    """At the default of two passes, a tiny target_kl leaves one and 0 both; of four passes none is
    made that would start beyond target_kl, and one that has begun is finished. (Measured during a
    pass, the first figure is 0 by construction and every stop comes a pass late.)"""
    assert passes_made(target_kl=1e-9)[0] == 1 and passes_made(target_kl=0.0)[0] == 2
    _, measured, _, _ = passes_made(target_kl=1e9, num_iterations=4)
    moved = list(measured.values())
    assert len(moved) == 3 and sorted(moved) == moved   # further with every pass
    for made, figure in enumerate(moved, start=1):
        assert passes_made(target_kl=0.99 * figure, num_iterations=4)[0] == made
        assert passes_made(target_kl=1.01 * figure, num_iterations=4)[0] == made + 1
    settings = dict(target_kl=1e-9, num_iterations=4)
    assert passes_made(num_minibatches=2, **settings)[0] == 2        # both halves of the first pass
    assert passes_made(learning_rate=1e-30, **settings)[0] == 4      # nothing moved, nothing stops


def test_without_target_kl_nothing_is_measured():
    """target_kl 0, or a single pass: no further reading, and no figure in the log."""
    for settings in (dict(target_kl=0.0), dict(num_iterations=1)):
        _, measured, _, line = passes_made(**settings)
        assert measured == {} and "policy/approxkl" not in line
    assert "moved" in ppo.PPO.legend


def test_measuring_changes_nothing_but_the_log(tmp_path):
    """A target_kl that is never reached and none at all train the same weights, bit for bit: the
    reading draws no random numbers. One that is always reached leaves one update a batch, and the
    log says at which figure it stopped."""
    ends, lines = {}, {}
    for target_kl in (0.0, 1e9, 1e-9):
        algo, lines[target_kl] = run_of(tmp_path / str(target_kl), max_steps=2,
                                        target_kl=target_kl)
        ends[target_kl] = algo.model.state_dict()
    never, always = lines[1e9], lines[1e-9]
    assert tiny.same_weights(ends[0.0], ends[1e9]) and not tiny.same_weights(ends[0.0], ends[1e-9])
    assert [line["updates"] for line in never] == [2, 4]
    assert [line["updates"] for line in always] == [1, 2]
    assert all("policy/approxkl" not in line for line in lines[0.0])
    assert all(line["policy/approxkl"] > 1e-9 for line in never + always)
    # After the same one update:
    assert never[0]["policy/approxkl"] == always[0]["policy/approxkl"]
