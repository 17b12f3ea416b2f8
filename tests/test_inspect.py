"""
--inspect shows what a step would do to each token: the last column is -dL/d(logit of the token), by autograd through the
algorithm's own loss. Here it is compared with what the equations say.
"""

import re

import pytest
import torch

import data
import report
from conftest import TASK, run
from model import InputError
from test_grpo import PROBLEMS, Letters, collect, make_grpo, tiny_model
from test_grpo import DEMONSTRATIONS, make_sft


def test_sft_weighs_a_token_by_one_minus_its_probability():
    """-d(-log softmax(z)_y / N)/dz_y = (1 - p) / N on each of the batch's N completion tokens, 0 on padding."""
    algo = make_sft()
    [minibatch] = algo.minibatches(algo.collect(DEMONSTRATIONS, None)[0])
    weight, logprobs = report.gradient_weights(algo, minibatch)
    mask = minibatch["completion_mask"]
    assert torch.allclose(weight, (1 - logprobs.exp()) / mask.sum() * mask, atol=1e-7) and (weight > 0).sum() == mask.sum()
    assert algo.model.completion_logits.__func__ is type(algo.model).completion_logits   # nothing is left behind
    assert all(p.grad is None or not p.grad.any() for p in algo.model.parameters())


def test_grpo_weighs_it_by_the_advantage_as_well():
    """At ratio 1: A (1 - p) / N, negative in answers that were worse than their siblings."""
    algo = make_grpo()
    minibatch = algo.minibatches(collect(algo)[0])[0]
    weight, logprobs = report.gradient_weights(algo, minibatch)
    expected = minibatch["advantages"][:, None] * (1 - logprobs.exp()) * minibatch["weights"]
    assert torch.allclose(weight, expected, atol=1e-6) and (weight < 0).any() and (weight > 0).any()


def test_a_flat_batch_has_nothing_to_show():
    """Where no answer differs in reward there is no gradient, and the message says so."""
    algo = make_grpo(lambda prompts, completions, **columns: [1.0] * len(prompts))
    with pytest.raises(InputError, match="judged alike"):
        report.first_minibatch(algo, PROBLEMS, torch.Generator().manual_seed(0))


OWN = ("--reward", "verifier,brevity", "--batch_size", 4, "--num_generations", 4)


@pytest.mark.parametrize("flags", [("sft",), ("dft", "--loss_type", "asft"), ("dft", "--loss_type", "psft"),
                                   ("dpo", *OWN), ("ppo", *OWN), ("grpo", *OWN, "--num_iterations", 2)])
def test_every_algorithm_can_be_inspected(tiny_base, tmp_path, monkeypatch, capsys, flags):
    """Aligned lines: prompt tokens without numbers, completion tokens with all; nothing is written to disk."""
    monkeypatch.chdir(tmp_path)
    assert run("--algo", *flags, "--inspect", "--init_from", tiny_base, *TASK) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.search(r"[+-]0\.\d{6}$", line)]
    assert len(rows) >= 4 and all(row[-6] == "yes" for row in rows) and all(float(row[-3]) == 1 for row in rows)   # ratio 1
    assert re.search(r"^=\s+no$", out, re.M) and list(tmp_path.iterdir()) == []
    has_advantage = flags[0] in ("ppo", "grpo")
    assert all((row[-2] != "-") == has_advantage for row in rows)
    width = {len(line) for line in out.splitlines() if re.search(r"[+-]0\.\d{6}$", line)}
    assert len(width) == 1


def test_all_side_by_side(monkeypatch):
    """The same right and wrong answer under five algorithms: imitation ignores the wrong one, DPO and GRPO push it down,
    and DFT's weight is SFT's times p."""
    from train import ALGORITHMS
    monkeypatch.setattr(data.Chain, "reward", staticmethod(lambda prompts, completions, answer: [
        float(len(c) % 2) for c in completions]))
    model, task = tiny_model(), data.Chain(2, 3)
    own = {"sft": dict(source="self"), "dft": dict(source="self")}
    algos = {name: ALGORITHMS[name](ALGORITHMS[name].Config(num_generations=8, **own.get(name, {})), model, tiny_model(), Letters(), task)
             for name in ("sft", "dft", "dpo", "ppo", "grpo")}
    args = type("Args", (), {"max_steps": 10, "seed": 0})
    text = report.inspect_all(args, algos, PROBLEMS, torch.Generator().manual_seed(0))
    right, wrong = text.split("\n\n")[1:]
    assert right.splitlines()[0].endswith("chosen") and wrong.splitlines()[0].endswith("rejected")
    assert right.splitlines()[0].split()[0] == wrong.splitlines()[0].split()[0]      # one prompt
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
    with pytest.raises(InputError, match="--inspect"):
        run("--algo", "sft", "--inspect", "some", "--init_from", tiny_base)
