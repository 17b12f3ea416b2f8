"""
--inspect shows what a step would do to each token: the last column is -dL/d(logit of the token), by autograd through the
algorithm's own loss. Here it is compared with what the equations say.
"""

import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import data
import report
from conftest import TASK, run
from model import InputError
from test_grpo import DEMONSTRATIONS, PROBLEMS, SEED, Letters, collect, make_grpo, make_sft
from test_grpo import read, tiny_model
from test_ppo import make_ppo


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


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("make", [make_grpo, make_ppo], ids=["grpo", "ppo"])
def test_it_scores_as_the_loss_does(make, temperature):
    """GRPO and PPO score at the sampling temperature: log-probabilities are those of logits /
    temperature, the weight is A (1 - p) / (N temperature), and the first ratio, where nothing has
    moved yet, is 1 in every row that is shown."""
    algo = make(temperature=temperature, **({"num_iterations": 2} if make is make_grpo else {}))
    batch, _ = algo.collect(PROBLEMS, torch.Generator().manual_seed(SEED))
    minibatch = next(iter(algo.minibatches(batch)))
    weight, logprobs = report.gradient_weights(algo, minibatch)
    mask, A = minibatch["completion_mask"], minibatch["advantages"]
    every = (read(algo.model, minibatch) / temperature).log_softmax(-1)                # (B, T, V)
    expected = every.gather(-1, minibatch["completion_ids"][..., None])[..., 0]        # (B, T)
    assert torch.allclose(logprobs, expected, atol=1e-6) and not logprobs.requires_grad
    A = A if A.dim() == 2 else A[:, None]
    closed_form = A * (1 - expected.exp()) * minibatch["weights"] / temperature
    assert torch.allclose(weight, closed_form, atol=1e-6)
    args = SimpleNamespace(max_steps=1)
    text = report.inspect(args, algo, PROBLEMS, torch.Generator().manual_seed(SEED), rows=99)
    rows = [line.split() for line in text.splitlines() if " yes " in line]
    assert len(rows) == mask.sum() and {row[-3] for row in rows} == {"1.000"}
    assert [float(row[-5]) for row in rows] == pytest.approx(expected[mask].tolist(), abs=6e-4)


def test_a_flat_batch_has_nothing_to_show():
    """Where no answer differs in reward there is no gradient, and the message says so."""
    algo = make_grpo(lambda prompts, completions, **columns: [1.0] * len(prompts))
    with pytest.raises(InputError, match="judged alike"):
        report.first_minibatch(algo, PROBLEMS, torch.Generator().manual_seed(0))


class Toy(torch.nn.Module):
    """A network whose logits are its parameters, and an algorithm whose loss pulls at every token
    of an answer with a given force."""

    def __init__(self, batch, logits, force):
        super().__init__()
        self.logits, self.force = torch.nn.Parameter(torch.tensor(logits)), torch.tensor(force)
        self.batch, self.tokenizer = batch, Letters()
        self.networks = {"model": self, "critic": torch.nn.Linear(1, 1)}

    def completion_logits(self, prompt_ids):
        return 1.0 * self.logits

    def collect(self, examples, generator, step):
        assert (examples, generator, step) == ("examples", "generator", 0)
        assert (self.micro_batch_size, self.max_steps) == (0, 9)
        return self.batch, {}

    def minibatches(self, batch):
        return [None, batch]

    def loss(self, batch):
        logits = self.completion_logits(batch["prompt_ids"])
        pull = (self.force * logits.gather(-1, batch["completion_ids"][..., None])[..., 0]).sum()
        self.completion_logits(batch["prompt_ids"])   # a second reading changes nothing
        return -pull + self.networks["critic"].weight.sum(), {}


def toy(force=((0.25, -0.5), (1e-6, 0.125)), **more):
    """Two answers to `1=`, `7<end>` and `+`, of 18 letters: 7 has probability 1/2, the others
    1/18."""
    logits = torch.zeros(2, 2, 18)
    logits[0, 0, 7] = math.log(17)
    batch = {"prompt_ids": torch.tensor([[17, 16, 1, 14]]),
             "prompt_mask": torch.tensor([[False, True, True, True]]),
             "completion_ids": torch.tensor([[7, 16], [10, 17]]),
             "completion_mask": torch.tensor([[True, True], [True, False]]),
             "prompt_index": torch.tensor([0, 0]), **more}
    return Toy(batch, logits.tolist(), force)


def shown(algo, **options):
    args = SimpleNamespace(max_steps=9)
    return report.inspect(args, algo, "examples", "generator", **options).splitlines()


HEADING = ("trained: whether the loss sees the token   ratio: pi/pi_old   "
           "weight: -dL/d(logit of the token), by autograd")
COLUMNS = "token    trained   logprob    prob   ratio  advantage      weight"
PROMPT = ["1             no", "=             no"]


def test_what_is_shown_character_by_character():
    """A block for each row: the prompt's tokens without its padding and its <end>, then those of
    the answer with their log-probability, probability, ratio, advantage and weight; never padding.
    Nothing is left in the gradients."""
    algo = toy()
    assert shown(algo) == [
        HEADING, "", COLUMNS, *PROMPT,
        "7            yes    -0.693   0.500   1.000          -   +0.250000",
        "<end>        yes    -2.890   0.056   1.000          -   -0.500000",
        "", COLUMNS, *PROMPT,
        "+            yes    -2.890   0.056   1.000          -   +0.000001"]
    parameters = [p for network in algo.networks.values() for p in network.parameters()]
    assert all(p.grad is None or not p.grad.any() for p in parameters)
    assert shown(algo, rows=1) == shown(algo)[:7] and "completion_logits" not in vars(algo)


@pytest.mark.parametrize("advantages, cells", [
    ([2.0, -1.5], ["+2.000", "+2.000", "-1.500"]),
    ([[0.5, -0.25], [1.0, 9.0]], ["+0.500", "-0.250", "+1.000"])])
def test_ratio_and_advantage(advantages, cells):
    """The ratio to the probability that the token was sampled with (1/2 to 1/4 is 2), and the
    advantage of its answer, or in PPO its own."""
    old = torch.tensor([[1 / 4, 1 / 9], [1 / 18, 1.0]]).log()
    algo = toy(advantages=torch.tensor(advantages), old_logprobs=old)
    rows = [line.split() for line in shown(algo) if " yes " in line]
    assert [row[-3] for row in rows] == ["2.000", "0.500", "1.000"]
    assert [row[-2] for row in rows] == cells


def test_four_rows_unless_told_otherwise():
    """--inspect shows the first four rows of a batch."""
    algo = toy()
    for name in ("completion_ids", "completion_mask", "prompt_index"):
        algo.batch[name] = algo.batch[name].repeat_interleave(3, 0)
    algo.logits = torch.nn.Parameter(algo.logits.detach().repeat_interleave(3, 0))
    algo.force = algo.force.repeat_interleave(3, 0)
    assert shown(algo).count(COLUMNS) == 4


def test_colours_on_a_terminal_alone(monkeypatch):
    """Green is pushed up, red is pushed down, what does not move is plain; a file is plain."""
    plain = shown(toy())
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    up, down, still = (line for line in shown(toy()) if " yes " in line)
    assert up.endswith("-\033[32m   +0.250000\033[0m") and still in plain
    assert down.endswith("-\033[31m   -0.500000\033[0m")
    assert report.colour("x", 4e-6) == "x" != report.colour("x", -6e-6)


def test_the_network_is_itself_again_after_an_error():
    """A loss that raises leaves no trace in the network: neither the recorder nor a gradient."""
    algo = toy()
    algo.loss = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        report.gradient_weights(algo, algo.batch)
    assert "completion_logits" not in vars(algo)


def test_token_text():
    """<end> by name, a line break as two characters, so that every token keeps to its line."""
    tokenizer = data.Tokenizer("byte")
    assert [report.token_text(tokenizer, t) for t in (256, 10, 55)] == ["<end>", "\\n", "7"]


OWN = ("--reward", "verifier,brevity", "--batch_size", 4, "--num_generations", 4)


@pytest.mark.parametrize("flags", [("sft",), ("dft", "--loss_type", "asft"), ("dft", "--loss_type", "psft"),
                                   ("dpo", *OWN), ("ppo", *OWN),
                                   ("ppo", *OWN, "--temperature", 0.7),
                                   ("grpo", *OWN, "--num_iterations", 2, "--temperature", 0.7)])
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
