"""
The text as tensors: tokenizer, batches, answers of a policy's own. Nothing here knows an algorithm,
and nothing is downloaded.

One example, worked through (byte tokenizer; <end> is 256, <pad> is 257):

    example          {"prompt": "7+5=", "completion": "2"}, {"prompt": "1-2*3=", "completion": "7"}
    prompt_ids       [[257, 257, 256, 55, 43, 53, 61],    every prompt starts with <end>, the mark
                      [256, 49, 45, 50, 42, 51, 61]]      between documents; padding on the left
    prompt_mask      [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
    completion_ids   [[50, 256], [55, 256]]               every completion ends with <end>
    completion_mask  [[1, 1], [1, 1]]                     what is trained: the answer and its <end>

Prompt and completion are encoded apart, so the boundary between them is always one between tokens.
"""

import functools
import math
import random

import tiktoken
import torch
import torch.nn.functional as F

from harness import ranks
from harness.errors import InputError

# -- tokenizer ------------------------------------------------------------------------------------


class Tokenizer:
    """A tiktoken.Encoding with two special tokens: <end> before and after every document, <pad> for
    padding."""

    def __init__(self, name="byte"):
        """`byte`: one token a byte, built here, any UTF-8 text. `gpt2`: tiktoken's own, downloaded
        on first use. Raises InputError when gpt2 cannot be downloaded or the name is neither."""
        if name == "byte":
            self.encoding = tiktoken.Encoding(
                "byte", pat_str=r"(?s:.)", mergeable_ranks={bytes([b]): b for b in range(256)},
                special_tokens={"<end>": 256, "<pad>": 257})
            self.eos_id, self.pad_id, self.vocab_size = 256, 257, 258
        elif name == "gpt2":
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as error:   # requests' own errors, none of which tiktoken documents
                raise InputError("the gpt2 tokenizer is not on this machine and could not be "
                                 f"downloaded ({type(error).__name__}): go online once, or use "
                                 "--tokenizer byte") from None
            self.eos_id = self.encoding.eot_token
            # Padding beside the 50,257 tokens; a round number of rows.
            self.pad_id, self.vocab_size = 50257, 50304
        else:
            raise InputError(f"--tokenizer {name} is unknown: use byte or gpt2, or a folder with a "
                             "tokenizer.json")

    def encode(self, text):
        """Token ids of the text alone; "<end>" written in a text is six ordinary characters, never
        the token."""
        return self.encoding.encode_ordinary(text)

    def encode_prompt(self, prompt):
        """Token ids of a prompt, up to where its answer begins: here <end> and the text."""
        return [self.eos_id] + self.encode(prompt)

    def decode(self, ids):
        """Text of the ids up to the first <end>, special tokens left out; broken UTF-8 becomes
        U+FFFD."""
        ids = list(ids)
        ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
        known = [i for i in ids if i < self.encoding.n_vocab and i != self.pad_id]
        return self.encoding.decode(known, errors="replace")


# -- batches: dicts of tensors --------------------------------------------------------------------


def batch_indices(size, config, step, batch_size=None):
    """Which examples step number `step` (from 0) takes: every example once an epoch, in an order
    drawn anew each epoch (a pre-training corpus is read in order). batch_size None: the config's.

    A pure function of its arguments: a run that resumes at a step needs no other record of its
    position in the data.
    """
    batch_size = batch_size or config.batch_size
    positions = range(step * batch_size, (step + 1) * batch_size)
    if not config.shuffle:
        return [position % size for position in positions]
    return [shuffled(size, config.seed, position // size)[position % size]
            for position in positions]


@functools.lru_cache(maxsize=4)
def shuffled(size, seed, epoch):
    """The order of an epoch, drawn once for all of its steps."""
    order = list(range(size))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


def collate(examples, tokenizer, device="cpu"):
    """Examples -> {prompt_ids, prompt_mask (P, Tp)} and, where they have completions,
    {completion_ids, completion_mask (B, T), prompt_index (B,)} with B = P. The docstring of this
    file works one through. Where an example has hint_ids, its prompt ends with them."""
    prompts = [tokenizer.encode_prompt(e["prompt"]) + e.get("hint_ids", [])
               for e in examples]
    width = max(map(len, prompts))
    batch = {"prompt_ids": [[tokenizer.pad_id] * (width - len(p)) + p for p in prompts],
             "prompt_mask": [[False] * (width - len(p)) + [True] * len(p) for p in prompts]}
    if "completion" in examples[0]:
        completions = [tokenizer.encode(e["completion"]) + [tokenizer.eos_id] for e in examples]
        width = max(map(len, completions))
        batch["completion_ids"] = [c + [tokenizer.pad_id] * (width - len(c)) for c in completions]
        batch["completion_mask"] = [[True] * len(c) + [False] * (width - len(c))
                                    for c in completions]
        batch["prompt_index"] = list(range(len(examples)))
    return {name: torch.tensor(rows, device=device) for name, rows in batch.items()}


def collate_pairs(examples, tokenizer, log, device="cpu"):
    """A file's preferences as a batch in rows chosen, rejected, chosen, ..., with label (B,) True
    on the chosen ones. Pairs of equal answers are counted and skipped."""
    pairs = [e for e in examples if e["chosen"] != e["rejected"]]
    log.share("skipped_pairs", len(examples) - len(pairs), len(examples))
    rows = [{"prompt": e["prompt"], "completion": e[name]} for e in pairs or examples
            for name in ("chosen", "rejected")]
    batch = collate(rows, tokenizer, device)
    batch["label"] = torch.arange(len(rows), device=device) % 2 == 0
    return batch if pairs else take_rows(batch, torch.arange(0, device=device))


def inputs(batch):
    """What model.completion_hidden takes, in its order."""
    return [batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids",
                                     "completion_mask", "prompt_index")]


def take_rows(batch, rows):
    """The given rows (indices of completions) of a batch, with just the prompts that they answer,
    and no column that would be padding throughout.

    What is named prompt_... (but prompt_index) has a row a prompt; all else a row a completion.
    """
    used, prompt_index = batch["prompt_index"][rows].unique(return_inverse=True)
    taken = {name: tensor[used if name.startswith("prompt_") else rows]
             for name, tensor in batch.items() if name != "prompt_index"}
    if len(rows):
        first = int(taken["prompt_mask"].int().argmax(-1).min())   # leftmost real prompt column
        longest = max(int(taken["completion_mask"].sum(-1).max()), 1)
        width = batch["completion_mask"].shape[1]
        for name, tensor in taken.items():
            if name in ("prompt_ids", "prompt_mask"):
                taken[name] = tensor[:, first:]
            elif tensor.dim() == 2 and tensor.shape[1] == width and not name.startswith("prompt_"):
                taken[name] = tensor[:, :longest]
    return {**taken, "prompt_index": prompt_index}


def concatenate(first, second, pad_id):
    """The rows of two batches in one, those of the first before those of the second; what only one
    of them has is left out."""
    joined = {}
    for name in (name for name in first if name in second):
        a, b = first[name], second[name]
        if name == "prompt_index":
            b = b + len(first["prompt_ids"])
        if a.dim() == 2:
            width, fill = max(a.shape[1], b.shape[1]), pad_id if name.endswith("_ids") else 0
            a, b = (F.pad(x, (width - x.shape[1], 0) if name.startswith("prompt_")
                          else (0, width - x.shape[1]), value=fill) for x in (a, b))
        joined[name] = torch.cat([a, b])
    return joined


def split(batch, size, rows_together=1):
    """The batch in micro-batches of at most `size` rows; 0: the batch as it is. rows_together: how
    many rows that follow each other may not be separated (2 for preference pairs)."""
    rows = torch.arange(len(batch["prompt_index"]), device=batch["prompt_index"].device)
    size = size and max(size // rows_together, 1) * rows_together
    if not 0 < size < len(rows):
        return [batch]
    return [take_rows(batch, part) for part in rows.split(size)]


def own_micro_batches(batch, config, rows_together=1):
    """The micro-batches of this rank's share of the batch, which is the whole where there is one
    rank (harness/ranks.py). No micro-batch where its share has no row."""
    rows = torch.arange(len(batch["prompt_index"]), device=batch["prompt_index"].device)
    if ranks.SIZE > 1:
        rows = rows[ranks.share(len(rows), rows_together)]
        batch = take_rows(batch, rows)
    return split(batch, config.micro_batch_size, rows_together) if len(rows) else []


def autocast(config):
    """The context in which forward passes run: matrix products in config.dtype; log-probabilities
    and losses stay float32."""
    return torch.autocast(config.device.split(":")[0], dtype=torch.bfloat16,
                          enabled=config.dtype == "bfloat16")


@torch.no_grad()
def in_micro_batches(f, batch, config, rows_together=1):
    """f(micro-batch), (b,) or (b, T), of all rows: (B,) or (B, T). Without gradient, in the very
    micro-batches and the precision in which the batch is trained, so that not a bit differs. Each
    rank scores what it trains, and all gather the scores."""
    width, found = batch["completion_ids"].shape[1], []
    with autocast(config):
        for micro in own_micro_batches(batch, config, rows_together):
            x, missing = f(micro), width - micro["completion_ids"].shape[1]
            found.append(F.pad(x, (0, missing)) if x.dim() == 2 else x)
    scores = torch.cat(found) if found else torch.zeros(0, device=batch["prompt_index"].device)
    return ranks.gather({"scores": scores}, {})["scores"]


# -- answers of a policy's own --------------------------------------------------------------------


def rollout(model, algo, examples, generator, log, num_generations=None, temperature=None):
    """Sample answers to every example's prompt and reward them: num_generations each (None: as the
    algorithm's config says). Where there are several ranks, each answers its share of the prompts.

    Returns a batch as collate makes it, its B rows in groups, example by example, with more fields,
    all (B,): rewards, the total; rewards/<name>, each reward by itself; truncated, True where an
    answer ran out of tokens. Where examples have hint_ids, their answers begin with them, and
    demonstrated (B, T) is True there.
    """
    config, tokenizer = algo.config, algo.tokenizer
    G = config.num_generations if num_generations is None else num_generations
    temperature = config.temperature if temperature is None else temperature
    prompts = collate([{"prompt": e["prompt"]} for e in examples], tokenizer, model.device)
    share = ranks.share(len(examples))
    mine = examples[share] or examples[:1]   # more ranks than prompts: some write in vain
    hints, longest = [e.get("hint_ids", []) for e in mine], algo.task.max_new_tokens
    read = collate([{"prompt": e["prompt"], "hint_ids": h} for e, h in zip(mine, hints)],
                   tokenizer, model.device)
    samples = model.generate(read["prompt_ids"], read["prompt_mask"],
                             longest - min(map(len, hints)), tokenizer.eos_id, tokenizer.pad_id, G,
                             temperature, generator=ranks.own_generator(generator))
    answers = {"completion_ids": samples.completion_ids,
               "completion_mask": samples.completion_mask, "truncated": samples.truncated}
    if any("hint_ids" in e for e in examples):
        answers = after_hints(hints, answers, longest, tokenizer.pad_id)
    answers["sampled"] = samples.completion_mask.sum(-1)                         # (b,) how many
    answers = ranks.gather({name: rows[:G * len(examples[share])]
                            for name, rows in answers.items()},
                           {"completion_ids": tokenizer.pad_id})
    sampled = answers.pop("sampled")                                             # (B,)
    texts = [tokenizer.decode(ids) for ids in answers["completion_ids"].tolist()]
    total, each = algo.rewards([e for e in examples for _ in range(G)], texts, generator)
    if log is not None:
        lengths = answers["completion_mask"].sum(-1)                             # (B,)
        if each:   # distillation needs no reward
            log.mean("reward", total)
        log.mean("completions/mean_length", lengths)
        log.mean("completions/clipped_ratio", answers["truncated"])
        log.sum("sampled_tokens", int(sampled.sum()))
        for name, reward in each.items():
            log.mean(name if name == "true_reward" else f"rewards/{name}/mean", reward)
    prompt_index = torch.arange(len(examples), device=model.device).repeat_interleave(G)
    return {**prompts, **answers, "prompt_index": prompt_index,
            "rewards": total.to(model.device),
            **{f"rewards/{name}": reward.to(model.device) for name, reward in each.items()}}


def after_hints(hints, answers, longest, pad_id):
    """Answers that went on from hints, with the hints put before them, cut to `longest` tokens.
    hints: token ids, one list a prompt; answers: completion_ids, completion_mask (B, T), truncated
    (B,) -> the same with demonstrated (B, T), True on the hints.

    Worked example: after the hints [5] and [6, 7] come [1, 2] and [3, pad]: [5, 1, 2] and
    [6, 7, 3].
    """
    ids, mask = answers["completion_ids"], answers["completion_mask"]           # (B, T)
    (B, T), device, width = ids.shape, ids.device, max(map(len, hints))
    repeats = B // len(hints)
    before = torch.tensor([h + [pad_id] * (width - len(h)) for h in hints], device=device)
    before = before.long().view(len(hints), width).repeat_interleave(repeats, 0)   # (B, width)
    length = torch.tensor([len(h) for h in hints], device=device)
    length = length.repeat_interleave(repeats)[:, None]                         # (B, 1)
    # Column j is the hint's while j < length, then the answer's; what is beyond both is padding.
    column = torch.arange(width + T, device=device).expand(B, -1)
    source = torch.where(column < length, column, column - length + width)
    beyond, source = source >= width + T, source.clamp(max=width + T - 1)
    ids = torch.cat([before, ids], 1).gather(1, source).masked_fill(beyond, pad_id)
    mask = torch.cat([torch.ones_like(before, dtype=torch.bool), mask], 1).gather(1, source)
    mask = mask & ~beyond
    return {"completion_ids": ids[:, :longest], "completion_mask": mask[:, :longest],
            "truncated": answers["truncated"] | mask[:, longest:].any(1),
            "demonstrated": (column < length)[:, :longest]}


def choose_pairs(rewards, uniforms, pair_selection="random", accepted=None):
    """One preference pair of each group. rewards, uniforms (P, G) -> rows (2 N,) chosen, rejected,
    chosen, ...; a group without a contrast has no pair.

    random: any of the best-rewarded against any that is worth less (right against wrong).
    best_worst: the extremes. `uniforms` are random numbers that pick among the candidates;
    `accepted` (P, G) restricts the choice. Raises ValueError for another pair_selection.

    Worked example: rewards [1, 0, 1, 0] give random one of the rows (0, 1), (0, 3), (2, 1), (2, 3);
    [1, 1, 1, 1] give none.
    """
    if pair_selection not in ("random", "best_worst"):
        raise ValueError(f"pair_selection {pair_selection!r}: choose from random, best_worst")
    accepted = torch.ones_like(rewards, dtype=torch.bool) if accepted is None else accepted
    best = rewards.masked_fill(~accepted, -math.inf).max(1, keepdim=True).values
    worst = rewards.masked_fill(~accepted, math.inf).min(1, keepdim=True).values
    losers = (rewards == worst) if pair_selection == "best_worst" else (rewards < best)
    chosen = uniforms.masked_fill(~(accepted & (rewards == best)), -1).argmax(1)   # (P,)
    rejected = uniforms.masked_fill(~(accepted & losers), -1).argmax(1)
    contrast = (best > worst).squeeze(1)                                           # (P,)
    P, G = rewards.shape
    first = torch.arange(0, P * G, G, device=rewards.device)                       # (P,) rows
    return torch.stack([first + chosen, first + rejected], dim=1)[contrast].flatten()
