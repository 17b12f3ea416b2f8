"""
A policy that is a table: every prompt has 16 answers written down and every prefix its logits, so
that each eval/... figure is a number worked out by hand or a finite sum. The policy keeps a record
of what it was asked.

Vocabulary 0, 1, <end>, <pad>; an answer has up to three tokens. It is right where it is the one in
ANSWERS, and counts as worked where it is at least as long as the prompt.
"""

import math
import random
from collections import namedtuple
from types import SimpleNamespace

import torch

import data
import tasks
from model import GPT, GPTConfig, Samples

PROMPTS = {"train": ["a", "bb"], "test": ["p", "qq", "rrr", "ssss", "never asked"],
           "ood": ["x", "xx", "y", "yy"], "skill": ["u", "v", "w"], "other": ["uu"]}
ANSWERS = {"p": "1", "qq": "10", "rrr": "0", "ssss": "11", "x": "1", "xx": "0", "y": "0", "yy": "1",
           "a": "1", "bb": "1", "u": "0", "v": "1", "w": "1", "uu": "01"}
GREEDY = {"p": "1", "qq": "10", "rrr": "1", "ssss": "", "a": "1", "bb": "1"}
DRAWS = {"p": ["1"] * 8 + ["0"] * 4 + [""] * 4,       # 8 of 16 right, 12 worked; 28 tokens
         "qq": ["0", "10"] + ["01"] * 7 + ["1"] * 7,  # 1 right, 8 worked; 40 tokens, <end> too
         "rrr": ["101"] + ["0"] * 2 + ["1"] * 13,     # 2 right, 1 other worked, cut off; 33 tokens
         "ssss": ["1"] * 16,                          # none right, none worked; 32 tokens
         "x": ["1", "0", "1", "1"] + ["0"] * 12, "xx": ["1"] * 16,
         "y": ["1", "1", "0", "1"] + ["0"] * 12, "yy": ["1", "0", "0", "1"] + ["1"] * 12,
         "a": ["1"] * 16, "bb": ["1"] * 16,
         "u": ["0", "1", "0", "0"] + ["1"] * 12, "v": ["1"] * 16, "w": ["0"] * 3 + ["1"] * 13,
         "uu": ["1", "01", "01", "1"] + ["01"] * 12}
Call = namedtuple("Call", "prompts n temperature top_k top_p seed grad bfloat16")


def config_of(**settings):
    return SimpleNamespace(**{"device": "cpu", "dtype": "float32", "eval_problems": 4, "seed": 0,
                              "micro_batch_size": 0, **settings})


class Tokens:
    """0, 1, <end> and <pad>, and behind them the letters of prompts."""
    eos_id, pad_id, vocab_size, encode_prompt = 2, 3, 4, data.Tokenizer.encode_prompt

    def encode(self, text):
        return [int(c) if c in "01" else ord(c) for c in text]

    def decode(self, ids):
        ids = ids[:ids.index(2)] if 2 in ids else ids
        return "".join("01"[i] for i in ids)


class Task(tasks.Task):
    """The problems of PROMPTS, in that order; what is right and what is worked depends on the
    prompt."""
    columns, shows_steps = ("answer",), True

    def __init__(self, name="table"):
        super().__init__(max_new_tokens=3)
        self.name = name

    def problem(self, rng, split):
        rng.asked = getattr(rng, "asked", -1) + 1
        prompt = PROMPTS[split][rng.asked % len(PROMPTS[split])]
        return {"prompt": prompt, "answer": ANSWERS[prompt]}

    @staticmethod
    def reward(prompts, completions, answer):
        assert answer == [ANSWERS[p] for p in prompts]
        return [float(c == a) for c, a in zip(completions, answer)]

    @staticmethod
    def is_worked(prompt, completion):
        return len(completion) >= len(prompt)

    def chance(self, k):
        return None


class Wide(Task):
    """As many problems as are wanted, all alike."""

    def problem(self, rng, split):
        return {"prompt": "p", "answer": "1"}


class Policy:
    """A table of logits for every prompt and prefix, drawn once and for all by their names, and the
    answers of DRAWS."""
    device, dtype = torch.device("cpu"), torch.float32
    config = GPTConfig()
    completion_scores = GPT.completion_scores

    def __init__(self, name, draws=DRAWS):
        self.name, self.draws, self.calls, self.rows = name, draws, [], []

    def requires_grad_(self, wanted):
        return self

    def logits(self, prompt, prefix):
        rng = random.Random(f"{self.name} {prompt} {prefix}")
        return [rng.gauss(0, 1) for _ in range(4)]

    def logprobs(self, prompt, prefix):
        """In plain arithmetic, for the figures that are expected."""
        z = self.logits(prompt, prefix)
        return [x - math.log(sum(map(math.exp, z))) for x in z]

    def nll(self, prompt, text):
        """Of a text and its <end>, summed."""
        tokens = Tokens().encode(text) + [2]
        return -sum(self.logprobs(prompt, text[:t])[token] for t, token in enumerate(tokens))

    def head(self, hidden):
        return hidden

    def completion_hidden(self, prompt_ids, prompt_mask, completion_ids, completion_mask,
                          prompt_index):
        assert not torch.is_grad_enabled()
        self.rows.append(len(completion_ids))
        prompts = ["".join(map(chr, ids[mask][1:])) for ids, mask in zip(prompt_ids, prompt_mask)]
        table = []
        for p, ids, real in zip(prompt_index, completion_ids, completion_mask):
            prefixes = ["".join(map(str, ids[:t].tolist())) if real[t] else f"padding {t}"
                        for t in range(len(ids))]
            table.append([self.logits(prompts[p], prefix) for prefix in prefixes])
        return torch.tensor(table)

    def generate(self, prompt_ids, prompt_mask, max_new_tokens, eos_id, pad_id, num_generations=1,
                 temperature=1.0, top_k=0, top_p=1.0, generator=None):
        prompts = ["".join(map(chr, ids[mask][1:])) for ids, mask in zip(prompt_ids, prompt_mask)]
        self.calls.append(Call(
            prompts, num_generations, temperature, top_k, top_p, generator.initial_seed(),
            torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        drawn = [[GREEDY[p]] if temperature == 0 else self.draws[p][:num_generations]
                 for p in prompts]
        ids = [(Tokens().encode(text) + [eos_id])[:max_new_tokens] for ts in drawn for text in ts]
        T = max(map(len, ids))
        return Samples(torch.tensor([row + [pad_id] * (T - len(row)) for row in ids]),
                       torch.tensor([[t < len(row) for t in range(T)] for row in ids]),
                       torch.tensor([eos_id not in row for row in ids]), None)


def kl_of_first_answers(pi, ref):
    """KL(pi || ref) summed over the tokens of each test problem's first answer, then averaged over
    the problems."""
    total = 0.0
    for prompt in PROMPTS["test"][:4]:
        tokens = (Tokens().encode(DRAWS[prompt][0]) + [2])[:3]
        for t in range(len(tokens)):
            logp, logq = (m.logprobs(prompt, "".join(map(str, tokens[:t]))) for m in (pi, ref))
            total += sum(math.exp(a) * (a - b) for a, b in zip(logp, logq))
    return total / 4
