"""
--inspect shows what a step would do to each token: the last column is -dL/d(logit of the token), by
autograd through the algorithm's own loss. Here it is compared with what the equations say.
"""

import re

import pytest
import torch

import tasks
from conftest import TASK, run
from harness import tokens
from harness.errors import InputError
from tiny import (DEMONSTRATIONS, PROBLEMS, SEED, make, make_grpo, make_ppo, make_sft, minibatches,
                  read, sample)
from train import ALGORITHMS


def test_sft_weighs_a_token_by_one_minus_its_probability():
    """-d(-log softmax(z)_y / N)/dz_y = (1 - p) / N on each of the batch's N completion tokens, 0 on
    padding."""
    algo = make_sft()
    [minibatch] = minibatches(algo, DEMONSTRATIONS)
    weight, logprobs = tokens.gradient_weights(algo, minibatch)
    mask = minibatch["completion_mask"]
    assert torch.allclose(weight, (1 - logprobs.exp()) / mask.sum() * mask, atol=1e-7)
    assert (weight > 0).sum() == mask.sum()
    assert not algo.model.lm_head._forward_hooks                # nothing is left behind
    assert all(p.grad is None or not p.grad.any() for p in algo.model.parameters())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_grpo_weighs_it_by_the_advantage_as_well(temperature):
    """At ratio 1: A (1 - p) / N, negative in answers that were worse than their siblings. The
    logits are divided by the temperature, and so is the derivative."""
    algo = make_grpo(temperature=temperature)
    [minibatch] = minibatches(algo)
    weight, logprobs = tokens.gradient_weights(algo, minibatch)
    expected = minibatch["advantages"][:, None] * (1 - logprobs.exp()) * minibatch["weights"]
    assert torch.allclose(weight, expected / temperature, atol=1e-6)
    assert (weight < 0).any() and (weight > 0).any()
    assert torch.allclose(logprobs, algo.logprobs(algo.model, minibatch)[0], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("make", [make_grpo, make_ppo], ids=["grpo", "ppo"])
def test_it_scores_as_the_loss_does(make, temperature):
    """GRPO and PPO score at the sampling temperature: log-probabilities are those of logits /
    temperature, the weight is A (1 - p) / (N temperature), and the first ratio, where nothing has
    moved yet, is 1 in every row that is shown."""
    algo = make(temperature=temperature, **({"num_iterations": 2} if make is make_grpo else {}))
    algo.config.batch_size, algo.examples = len(PROBLEMS), lambda: PROBLEMS
    minibatch = minibatches(algo)[0]
    weight, logprobs = tokens.gradient_weights(algo, minibatch)
    mask, A = minibatch["completion_mask"], minibatch["advantages"]
    every = (read(algo.model, minibatch) / temperature).log_softmax(-1)                # (B, T, V)
    expected = every.gather(-1, minibatch["completion_ids"][..., None])[..., 0]        # (B, T)
    assert torch.allclose(logprobs, expected, atol=1e-6) and not logprobs.requires_grad
    A = A if A.dim() == 2 else A[:, None]
    closed_form = A * (1 - expected.exp()) * minibatch["weights"] / temperature
    assert torch.allclose(weight, closed_form, atol=1e-6)
    algo.config.shuffle = False
    text = tokens.inspect_one(algo, torch.Generator().manual_seed(SEED), rows=99)
    rows = [line.split() for line in text.splitlines() if " yes " in line]
    assert len(rows) == mask.sum() and {row[-3] for row in rows} == {"1.000"}
    assert [float(row[-5]) for row in rows] == pytest.approx(expected[mask].tolist(), abs=6e-4)


def test_a_flat_batch_has_nothing_to_show():
    """Where no answer differs in reward there is no gradient, and the message says so."""
    algo = make_grpo(lambda prompts, completions, **columns: [1.0] * len(prompts))
    with pytest.raises(InputError, match="judged alike"):
        tokens.first_minibatch(algo, sample(algo))


OWN = ("--reward", "verifier,brevity", "--batch_size", 4, "--num_generations", 4)


@pytest.mark.parametrize("flags", [
    ("sft",), ("dft", "--loss_type", "asft"), ("dft", "--loss_type", "psft"),
    ("rft", *OWN, "--threshold", -1), ("dpo", *OWN), ("ppo", *OWN),
    ("ppo", *OWN, "--temperature", 0.7),
    ("grpo", *OWN, "--num_iterations", 2, "--temperature", 0.7), ("distill", *OWN)])
def test_every_algorithm_can_be_inspected(tiny_base, tiny_teacher, tmp_path, monkeypatch, capsys,
                                          flags):
    """Aligned lines: prompt tokens without numbers, completion tokens with all; nothing is written
    to disk."""
    monkeypatch.chdir(tmp_path)
    flags += ("--teacher", tiny_teacher) if flags[0] == "distill" else ()
    assert run("--algo", *flags, "--inspect", "--init_from", tiny_base, *TASK) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if re.search(r"[+-]0\.\d{6}$", line)]
    rows = [line.split() for line in lines]
    assert len(rows) >= 4 and all(row[-6] == "yes" for row in rows)
    assert all(float(row[-3]) == 1 for row in rows)             # the ratio
    assert re.search(r"^=\s+no$", out, re.M) and list(tmp_path.iterdir()) == []
    has_advantage = flags[0] in ("ppo", "grpo")
    assert all((row[-2] != "-") == has_advantage for row in rows)
    assert len({len(line) for line in lines}) == 1


def test_all_side_by_side(monkeypatch):
    """The same right and wrong answer under five algorithms: imitation ignores the wrong one, DPO
    and GRPO push it down, and DFT's weight is SFT's times p."""
    monkeypatch.setattr(tasks.Chain, "reward", staticmethod(
        lambda prompts, completions, answer: [float(len(c) % 2) for c in completions]))
    sampled = {"dpo", "ppo", "grpo"}
    algos = {name: make(ALGORITHMS[name], **(dict(num_generations=8) if name in sampled else {}))
             for name in tokens.SIDE_BY_SIDE}
    text = tokens.table(tokens.side_by_side(algos, PROBLEMS, torch.Generator().manual_seed(0)))
    right, wrong = text.split("\n\n")[1:]
    assert right.splitlines()[0].endswith("chosen") and wrong.splitlines()[0].endswith("rejected")
    assert right.splitlines()[0].split()[0] == wrong.splitlines()[0].split()[0]   # one prompt
    assert right.splitlines()[1].split()[2:] == ["sft", "dft", "dpo", "ppo", "grpo"]
    for line in right.splitlines()[2:]:
        p, sft, dft, dpo, _, grpo = map(float, line.split()[-6:])
        assert sft > 0 and dpo > 0 and grpo > 0 and dft == pytest.approx(p * sft, abs=2e-3)
    for line in wrong.splitlines()[2:]:
        _, sft, dft, dpo, _, grpo = map(float, line.split()[-6:])
        assert sft == dft == 0 and dpo < 0 and grpo < 0


def test_what_cannot_be_inspected(tiny_base):
    """A base model and a reward model have no policy that is taught."""
    with pytest.raises(InputError, match="--algo rm has none"):
        run("--algo", "rm", "--inspect", "--init_from", tiny_base, *TASK)
    with pytest.raises(InputError, match="--algo pretrain has none"):
        run("--algo", "pretrain", "--inspect", *TASK)
    with pytest.raises(InputError, match="--inspect"):
        run("--algo", "sft", "--inspect", "some", "--init_from", tiny_base)


def test_inspecting_all_says_when_no_answer_is_right():
    """Where no answer is right there is no pair to show, and the message says so."""
    algos = {"dpo": make(ALGORITHMS["dpo"], lambda prompts, completions, **_: [0.0] * len(prompts))}
    with pytest.raises(InputError, match="no answer of this batch is right; try another --seed"):
        tokens.side_by_side(algos, PROBLEMS, torch.Generator().manual_seed(0))
