"""The model with one number for a head (a critic, a reward model), and the column that it reads
after the last token."""

import copy

import pytest
import torch

import data
from llama import PROMPTS, make_model, pad
from model import GPT, GPTConfig
from tiny import (PROBLEMS, Letters, move, read_alone, same, same_weights, tiny_model)


def some_batch():
    """Answers to PROBLEMS as collate makes them: 4 prompts, an answer each, of different length."""
    answers = ("2", "1-2=9;9*3=7", "9*9=1", "")
    return data.collate([{"prompt": p["prompt"], "completion": c}
                         for p, c in zip(PROBLEMS, answers)], Letters())


def read(model, batch, **options):
    return model.completion_logits(*data.inputs(batch), **options)


def values_of(model, batch):
    return read(model, batch, read_last=True).squeeze(-1).detach()


@pytest.mark.parametrize("tied", [True, False])
def test_with_scalar_head(tied):
    """The trunk is copied, bit for bit, and shares nothing with the original, which is left as it
    was; the head says 0 everywhere."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=18, block_size=32, n_layer=2, n_head=2, n_embd=16,
                          tie_embeddings=tied))
    model.skip_padding = False
    before = copy.deepcopy(model.state_dict())
    critic = model.requires_grad_(False).with_scalar_head()   # of a frozen one, too
    differ = {name for name, tensor in critic.state_dict().items()
              if name == "lm_head.weight" or not torch.equal(tensor, before[name])}
    assert differ == {"lm_head.weight"} and not critic.skip_padding
    assert critic.config == GPTConfig(**{**vars(model.config), "scalar_head": True})
    batch = some_batch()
    assert read(critic, batch).shape == (4, 12, 1) and (values_of(critic, batch) == 0).all()
    move(critic)
    assert same_weights(before, model.state_dict())
    assert all(p.requires_grad for p in critic.parameters())
    again = critic.with_scalar_head()   # of a reward model: all of it
    assert torch.equal(values_of(again, batch), values_of(critic, batch))
    assert values_of(critic, batch).abs().min() > 0
    move(again)
    assert not torch.equal(values_of(again, batch), values_of(critic, batch))


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("layout", ["a prompt each", "shared prompts",
                                    "a prompt each, out of order"])
def test_read_last(float64, layout, scalar):
    """One column more, seen after the last completion token; the others stay; each is the plain
    forward pass of prompt and answer, unpadded, whether prompts are shared or not."""
    model, batch = tiny_model(), some_batch()
    if scalar:
        model = model.with_scalar_head()
    move(model, 0.3)
    if layout != "a prompt each":
        order = [2, 0, 3, 1] if "order" in layout else [1, 0, 0, 1]
        batch["prompt_index"] = torch.tensor(order)
    if layout == "shared prompts":
        for name in ("prompt_ids", "prompt_mask"):
            batch[name] = batch[name][:2]
    longer, T = read(model, batch, read_last=True), batch["completion_ids"].shape[1]
    assert longer.shape[1] == T + 1 and same(longer[:, :T], read(model, batch))
    for b, i in enumerate(batch["prompt_index"].tolist()):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i]].tolist()
        completion = batch["completion_ids"][b][batch["completion_mask"][b]].tolist()
        alone = read_alone(model, prompt, completion)
        assert same(longer[b, :len(completion) + 1].detach(), alone)
    assert len(set(batch["completion_mask"].sum(-1).tolist())) == 4


def test_a_scalar_head_is_a_copy_that_says_0():
    """A critic reads like its model, has one number a position, at first 0, and weights of its own;
    a critic made from a critic is a copy that can be trained."""
    model, (ids, mask) = make_model(), pad(PROMPTS, "left")
    model.skip_padding = False
    critic = model.with_scalar_head()
    assert critic(ids, mask).shape == (*ids.shape, 1) and critic(ids, mask).eq(0).all()
    hidden, expected = (network.hidden_states(ids, mask)[0] for network in (critic, model))
    torch.testing.assert_close(hidden, expected)
    assert not critic.skip_padding and not model.config.scalar_head and critic.config.scalar_head
    with torch.no_grad():
        critic.lm_head.weight.fill_(1.0), critic.norm.weight.add_(1.0)
    assert not torch.equal(critic.norm.weight, model.norm.weight)
    again = critic.requires_grad_(False).with_scalar_head()
    assert torch.equal(again(ids, mask), critic(ids, mask)) and again is not critic
    assert all(p.requires_grad for p in again.parameters())
