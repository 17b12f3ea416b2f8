"""
The lines of --inspect, character by character, on a network whose logits are its parameters and a
loss that pulls at every token with a given force.
"""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

import data
from harness import tokens
from tiny import Letters


class Logits(torch.nn.Module):
    """A network whose logits, whatever it reads, are its parameters."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.lm_head = torch.nn.Parameter(logits), torch.nn.Identity()

    def completion_logits(self):
        return self.lm_head(1.0 * self.logits)


class Pull(torch.nn.Module):
    """An algorithm whose loss pulls at every token of a given batch with a given force, and at a
    critic."""

    def __init__(self, batch, logits, force):
        super().__init__()
        self.model, self.critic = Logits(logits), torch.nn.Linear(1, 1)
        self.batch, self.force, self.tokenizer = batch, torch.tensor(force), Letters()
        self.config = SimpleNamespace(batch_size=2, seed=0, shuffle=False, temperature=1.0)

    def examples(self):
        return ["first", "second", "third"]

    def sample(self, examples, generator, step, log):
        assert (examples, generator, step) == (["first", "second"], "generator", 0)
        assert not torch.is_grad_enabled()
        return self.batch

    def minibatches(self, batch, log):
        return [batch]

    def loss(self, batch, log):
        logits = self.model.completion_logits()
        pull = (self.force * logits.gather(-1, batch["completion_ids"][..., None])[..., 0]).sum()
        self.model.completion_logits()   # a second reading changes nothing
        return -pull + self.critic.weight.sum()


def pull(force=((0.25, -0.5), (1e-6, 0.125)), **more):
    """Two answers to `1=`, `7<end>` and `+`, of 18 letters: 7 has probability 1/2, the others
    1/18."""
    logits = torch.zeros(2, 2, 18)
    logits[0, 0, 7] = math.log(17)
    batch = {"prompt_ids": torch.tensor([[17, 16, 1, 14]]),
             "prompt_mask": torch.tensor([[False, True, True, True]]),
             "completion_ids": torch.tensor([[7, 16], [10, 17]]),
             "completion_mask": torch.tensor([[True, True], [True, False]]),
             "prompt_index": torch.tensor([0, 0]), **more}
    return Pull(batch, logits, force)


def shown(algo, **options):
    return tokens.inspect_one(algo, "generator", **options).splitlines()


HEADING = ("trained: whether the loss sees the token   ratio: pi/pi_old   "
           "weight: -dL/d(logit of the token), by autograd")
COLUMNS = "token    trained   logprob    prob   ratio  advantage      weight"
PROMPT = ["1             no", "=             no"]


def test_what_is_shown_character_by_character():
    """A block for each row: the prompt's tokens without its padding and its <end>, then those of
    the answer with their log-probability, probability, ratio, advantage and weight; never padding.
    Nothing is left in the gradients of any network."""
    algo = pull()
    assert shown(algo) == [
        HEADING, "", COLUMNS, *PROMPT,
        "7            yes    -0.693   0.500   1.000          -   +0.250000",
        "<end>        yes    -2.890   0.056   1.000          -   -0.500000",
        "", COLUMNS, *PROMPT,
        "+            yes    -2.890   0.056   1.000          -   +0.000001"]
    assert all(p.grad is None or not p.grad.any() for p in algo.parameters())
    assert shown(algo, rows=1) == shown(algo)[:7] and not algo.model.lm_head._forward_hooks


@pytest.mark.parametrize("advantages, cells", [
    ([2.0, -1.5], ["+2.000", "+2.000", "-1.500"]),
    ([[0.5, -0.25], [1.0, 9.0]], ["+0.500", "-0.250", "+1.000"])])
def test_ratio_and_advantage(advantages, cells):
    """The ratio to the probability that the token was sampled with (1/2 to 1/4 is 2), and the
    advantage of its answer, or in PPO its own."""
    old = torch.tensor([[1 / 4, 1 / 9], [1 / 18, 1.0]]).log()
    algo = pull(advantages=torch.tensor(advantages), old_logprobs=old)
    rows = [line.split() for line in shown(algo) if " yes " in line]
    assert [row[-3] for row in rows] == ["2.000", "0.500", "1.000"]
    assert [row[-2] for row in rows] == cells


def test_a_demonstrators_tokens_are_called_demo():
    """The 7 of the first answer was a hint: `demo`, and its probability is that at temperature 1,
    1/2, whatever the policy samples at; rows without a hint come first."""
    algo = pull(advantages=torch.tensor([1.0, -1.0]), weights=torch.ones(2, 2),
                demonstrated=torch.tensor([[True, False], [False, False]]))
    algo.config.temperature = 2.0
    found = shown(algo)
    assert found[:2] == [HEADING, "demo: a demonstrator wrote the token"]
    rows = [line.split() for line in found if " yes " in line or " demo " in line]
    assert [row[:2] for row in rows] == [["+", "yes"], ["7", "demo"], ["<end>", "yes"]]
    assert rows[1][3] == "0.500"


def test_the_first_minibatch_with_a_gradient_is_shown():
    """Where the advantages of a minibatch are all 0, the next one is taken."""
    algo = pull(advantages=torch.tensor([1.0, -1.0]))
    flat = {**algo.batch, "advantages": torch.zeros(2)}
    algo.minibatches = lambda batch, log: [flat, batch]
    assert tokens.first_minibatch(algo, algo.batch) is algo.batch


def test_four_rows_unless_told_otherwise():
    """--inspect shows the first four rows of a batch."""
    algo = pull()
    for name in ("completion_ids", "completion_mask", "prompt_index"):
        algo.batch[name] = algo.batch[name].repeat_interleave(3, 0)
    algo.model = Logits(algo.model.logits.detach().repeat_interleave(3, 0))
    algo.force = algo.force.repeat_interleave(3, 0)
    assert shown(algo).count(COLUMNS) == 4


def test_colours_on_a_terminal_alone(monkeypatch):
    """Green is pushed up, red is pushed down, what does not move is plain; a file is plain."""
    plain = shown(pull())
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    up, down, still = (line for line in shown(pull()) if " yes " in line)
    assert up.endswith("-\033[32m   +0.250000\033[0m") and still in plain
    assert down.endswith("-\033[31m   -0.500000\033[0m")
    assert tokens.colour("x", 4e-6) == "x" != tokens.colour("x", -6e-6)


def test_the_network_is_itself_again_after_an_error():
    """A loss that raises leaves no trace in the network: neither the hook nor a gradient."""
    algo = pull()
    algo.loss = lambda batch, log: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tokens.gradient_weights(algo, algo.batch)
    assert not algo.model.lm_head._forward_hooks
    assert all(p.grad is None or not p.grad.any() for p in algo.parameters())


def test_token_text():
    """<end> by name, a line break as two characters, so that every token keeps to its line."""
    tokenizer = data.Tokenizer("byte")
    assert [tokens.token_text(tokenizer, t) for t in (256, 10, 55)] == ["<end>", "\\n", "7"]
