"""
Small models, tasks and batches that the tests of the classes share. The same sum in two orders is
compared in float64, to 1e-10.
"""

import copy
import json
import tempfile
import zlib
from types import SimpleNamespace

import pytest
import torch

import data
import tasks
from grpo import GRPO
from harness import files
from harness.log import Log
from model import GPT, GPTConfig
from ppo import PPO
from sft import SFT

SEED = 2   # of the samples: the first group is flat, the other three are not
PROBLEMS = [{"prompt": p, "answer": tasks.Chain.solve(p)["answer"]}
            for p in ("7+5=", "1-2*3=", "9*9=", "4+4-1=")]
DEMONSTRATIONS = [{"prompt": p, "completion": c} for p, c in (
    ("7+5=", "2"), ("1-2*3=", "1-2=9;9*3=7"), ("9*9=", "9*9=1"), ("4+4-1=", "7"),
    ("0+1=", "0+1=1"))]
DOCUMENTS = [{"prompt": "", "completion": e["prompt"] + e["completion"]} for e in DEMONSTRATIONS]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in (
    ("7+5=", "2", "3"), ("1-2*3=", "1-2=9;9*3=7", "7"), ("4+4-1=", "7", "4+4=9;9-1=8"))]


class Letters:
    """A tokenizer of 18 tokens, so that an untrained model ends about half of its answers."""
    letters, eos_id, pad_id, vocab_size = "0123456789+-*>=;", 16, 17, 18
    encode_prompt = data.Tokenizer.encode_prompt

    def encode(self, text):
        return [self.letters.index(c) for c in text]

    def decode(self, ids):
        ids = list(ids)
        ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
        return "".join(self.letters[i] for i in ids if i < 16)


def coin(prompts, completions, **columns):
    """A reward of 0 or 1 that looks random and depends on prompt and answer; the first problem is
    always right."""
    return [float(p == "7+5=" or zlib.crc32((p + c).encode()) % 2)
            for p, c in zip(prompts, completions)]


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=18, block_size=32, n_layer=2, n_head=2, n_embd=16, n_hidden=16))


def make(Algorithm, reward_function=None, task=None, ref_seed=1, **settings):
    """An algorithm on the tiny model, with another tiny model for a reference (ref_seed None: its
    own start). reward_function: in place of the rewards that the settings name."""
    config = Algorithm.Config(**{"device": "cpu", "dtype": "float32", **settings})
    algo = Algorithm(config, tiny_model(), Letters(), task or tasks.Chain(2, 3))
    if ref_seed is not None and hasattr(algo, "ref_model"):
        algo.ref_model.load_state_dict(tiny_model(ref_seed).state_dict())
    if reward_function is not None:
        algo.rewards.functions = {"coin": reward_function}
        algo.rewards.weights = [1.0]
    return algo


def make_sft(**settings):
    return make(SFT, **settings)


def make_grpo(reward_function=coin, **settings):
    """GRPO with groups of 4 and the given reward; None: the rewards that the settings name."""
    return make(GRPO, reward_function, **{"num_generations": 4, **settings})


def sample(algo, problems=PROBLEMS, step=0, seed=SEED, log=None):
    """What algo.sample gives for these problems."""
    generator = torch.Generator().manual_seed(seed)
    return algo.sample(problems, generator, step, Log() if log is None else log)


def minibatches(algo, problems=PROBLEMS, step=0, seed=SEED, log=None):
    """The updates of a step, as a list."""
    log = Log() if log is None else log
    return list(algo.minibatches(sample(algo, problems, step, seed, log), log))


def move(model, size=0.1, seed=5):
    """Change the weights as an update would, but at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=generator)


def loss_and_gradient(algo, minibatch, micro_batch_size=0):
    """Summed over micro-batches as train.update does: the loss, one long gradient of the trained
    parameters, the means and maxima that were logged."""
    algo.zero_grad()
    total, log = 0.0, Log()
    for micro in data.split(minibatch, micro_batch_size, algo.rows_together):
        loss = algo.loss(micro, log)
        loss.backward()
        total = total + loss.detach()
    trained = [p for p in algo.parameters() if p.requires_grad]
    return total, torch.cat([p.grad.flatten() for p in trained]), log.line()


def same(a, b, tolerance=1e-10):
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=tolerance)


def same_results(a, b):
    return same(a[0], b[0]) and same(a[1], b[1]) and a[2].keys() == b[2].keys() \
        and all(a[2][name] == pytest.approx(b[2][name], abs=1e-9) for name in a[2])


def padded(batch, left=3, right=2):
    """The batch with more padding, left of the prompts and right of the completions, full of
    misleading values."""
    values = {"prompt_ids": 5, "prompt_mask": False, "completion_ids": 5, "completion_mask": False,
              "demonstrated": False, "weights": 0, "old_logprobs": -50, "ref_logprobs": -50,
              "old_values": 1e6, "advantages": 1e6, "returns": -1e6, "restrained": True}
    widened = {name: torch.nn.functional.pad(
        batch[name], (left, 0) if name.startswith("prompt") else (0, right), value=value)
        for name, value in values.items() if name in batch and batch[name].dim() == 2}
    return {**batch, **widened}


def read(model, batch):
    """The model's logits for a batch."""
    return model.completion_logits(*data.inputs(batch))


# -- PPO ------------------------------------------------------------------------------------------


def letters(prompts, completions, **columns):
    """A reward that can be seen from an answer: how many letters it has, and a half."""
    return [len(c) + 0.5 for c in completions]


def make_ppo(reward_function=letters, wise=True, **settings):
    """PPO with 4 answers to a prompt and the given reward. wise: a critic that says something; at
    first its values are all 0."""
    algo = make(PPO, reward_function, **{"num_generations": 4, **settings})
    if wise:
        move(algo.critic, seed=7)
    return algo


def rows(batch):
    """(prompt ids, completion ids, whether it was truncated) of every row, without padding."""
    for b, i in enumerate(batch["prompt_index"].tolist()):
        ids = batch["completion_ids"][b].tolist()
        ended = Letters.eos_id in ids
        yield (batch["prompt_ids"][i][batch["prompt_mask"][i]].tolist(),
               ids[:ids.index(Letters.eos_id) + 1] if ended else ids, not ended)


# -- updates --------------------------------------------------------------------------------------


def a_run():
    """As much of a run as train.update asks for."""
    return SimpleNamespace(log=Log(), check_finite=lambda *values: None)


# -- tasks ----------------------------------------------------------------------------------------


def split_by_hand(is_held_out, is_ood):
    """The name of the split, in a table of its own."""
    return {(False, False): "train", (True, False): "test",
            (False, True): "ood-train", (True, True): "ood"}[is_held_out, is_ood]


def texts(batch):
    """[(prompt, completion)] of a batch's rows, decoded through the masks."""
    decode = Letters().decode
    prompts = [decode(row[mask][1:].tolist())
               for row, mask in zip(batch["prompt_ids"], batch["prompt_mask"])]
    completions = [decode(row[mask].tolist())
                   for row, mask in zip(batch["completion_ids"], batch["completion_mask"])]
    return [(prompts[i], c) for i, c in zip(batch["prompt_index"].tolist(), completions)]


def read_alone(model, prompt, completion):
    """What the model says of one answer, read by itself and unpadded: before each token and after
    the last, (n + 1, V)."""
    return model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:].detach()


def update(algo, minibatch, *more):
    """The updates as the loop makes them. -> what was logged"""
    import train
    run = a_run()
    for part in (minibatch, *more):
        train.update(algo, part, run)
    return run.log.line()


def weights_of(network):
    """A copy of a network's state dict."""
    return copy.deepcopy(network.state_dict())


def same_weights(a, b):
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def slope(algo, network, minibatch, direction, h=1e-6):
    """The derivative of the loss along a direction of a network's weights, by finite
    differences."""
    start, ends = torch.nn.utils.parameters_to_vector(network.parameters()).detach(), []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(start + sign * h * direction, network.parameters())
        with torch.no_grad():
            ends.append(algo.loss(minibatch, Log()).item())
    torch.nn.utils.vector_to_parameters(start, network.parameters())
    return (ends[0] - ends[1]) / (2 * h)


def file_task(rows, max_new_tokens=0):
    """The task of a file with these lines, which are both trained on and held out."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/data.jsonl"
        with open(path, "w") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        return files.JsonLines(path, path, max_new_tokens)


def check_invariance(algo, minibatch):
    """Loss, gradient and what is logged are those of the batch, however it is split, padded and
    ordered. -> loss_and_gradient of the whole"""
    whole = loss_and_gradient(algo, minibatch)
    assert whole[1].abs().max() > 1e-3
    for size in (1, 2, 3, 5):
        assert same_results(loss_and_gradient(algo, minibatch, size), whole), f"parts of {size}"
    assert same_results(loss_and_gradient(algo, padded(minibatch)), whole), "wider padding"
    rows = torch.randperm(len(minibatch["prompt_index"]))
    shuffled = data.take_rows(minibatch, rows)
    assert same_results(loss_and_gradient(algo, shuffled), whole), "another order"
    return whole
