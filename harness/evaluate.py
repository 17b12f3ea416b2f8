"""
Evaluation: what a model does on held-out problems, as {"eval/...": number}.

The problems are the same for every run and at every evaluation, and so are the random numbers that
sample the answers: two evaluations of the same weights give the same figures.
"""

import functools
import math

import torch

import data
from harness.log import Log
from rm import answer_rewards

SAMPLED, SCORED = 1024, 256   # answers at a time: memory does not follow --eval_problems


def at_once(model, task):
    """How many answers to sample together: SAMPLED, or fewer where their keys and values would be
    more than 2^28 numbers (half a gigabyte in bfloat16), as with published models."""
    config = model.config
    length = min(config.block_size, 256 + task.max_new_tokens)
    numbers = 2 * config.n_layer * config.n_kv_head * config.head_dim * length   # of one answer
    return min(SAMPLED, max(2**28 // numbers, 1))


def in_parts(batch, model, config):
    """A batch in parts that can be scored: of micro_batch_size rows, or SCORED, or fewer where
    their logits would be more than 2^28 numbers."""
    logits = model.config.vocab_size * batch["completion_ids"].shape[1]         # of one row
    return data.split(batch, config.micro_batch_size or min(SCORED, max(2**28 // logits, 1)))


@functools.lru_cache(maxsize=8)
def held_out(task, split, size):
    """The problems of a split to judge by, drawn once."""
    return task.problems(split, size, seed=0)


def evaluate(algo, full):
    """Judge what an algorithm trains. `full` adds greedy decoding and pass@k."""
    if algo.model.config.scalar_head:
        return judge_pairs(algo)
    return judge_answers(algo.model, algo.ref_model, algo.tokenizer, algo.task, algo.config, full)


@torch.no_grad()
def judge_answers(model, ref_model, tokenizer, task, config, full, **sampling):
    """Judge a policy by its own answers, sampled once (16 times if full) for every problem.

    eval/kl is KL(policy || ref_model) of the policy's answers: the whole distribution at every
    step, summed per answer, averaged over the problems; left out where ref_model is None. sampling:
    temperature, top_k, top_p of the sampled answers.
    """
    problems, ood = (held_out(task, split, config.eval_problems) for split in ("test", "ood"))
    if not problems:
        return {}
    with data.autocast(config):
        if not task.verifies:
            return held_out_loss(model, tokenizer, problems, config)
        n = 16 if full else 1
        texts, rewards, lengths, kl = answers(model, tokenizer, task, problems, config, n,
                                              ref_model=ref_model, **sampling)
        result = {"eval/accuracy": rewards.mean().item()}
        if full:
            _, greedy, _, _ = answers(model, tokenizer, task, problems, config, temperature=0)
            result["eval/greedy_accuracy"] = greedy.mean().item()
            result |= {f"eval/pass@{k}": pass_at_k(rewards, k) for k in (1, 4, 16)}
        if task.shows_steps:
            worked = torch.tensor([task.is_worked(problems[i // n]["prompt"], text)
                                   for i, text in enumerate(texts)])           # (P n,)
            result["eval/worked"] = worked.float().mean().item()
            right = rewards.flatten()[worked].sum().item()
            result["eval/accuracy_when_worked"] = right / max(int(worked.sum()), 1)
        result["eval/mean_length"] = lengths.float().mean().item()
        if ref_model is not None:
            result["eval/kl"] = max(0.0, kl.mean().item())   # rounding may fall below 0
        if ood:
            _, rewards, _, _ = answers(model, tokenizer, task, ood, config, 4 if full else 1,
                                       **sampling)
            result["eval/ood_accuracy"] = rewards.mean().item()
        for skill in task.kept:   # what post-training does not teach: is it still there?
            untaught = held_out(task, skill, config.eval_problems)
            _, rewards, _, _ = answers(model, tokenizer, task, untaught, config, 4 if full else 1,
                                       **sampling)
            result[f"eval/kept/{skill}"] = rewards.mean().item()
    return result


@torch.no_grad()
def answers(model, tokenizer, task, problems, config, num_generations=1, temperature=1.0, top_k=0,
            top_p=1.0, ref_model=None):
    """Sample answers to the problems, the same ones every time.

    Returns texts, rewards (P, n), lengths in tokens (P, n), and the KL to ref_model along the first
    answer to each problem (P,), or None.
    """
    generator = torch.Generator(config.device).manual_seed(1)
    n, size = num_generations, max(at_once(model, task) // num_generations, 1)
    texts, rewards, lengths, kls = [], [], [], []
    for part in (problems[i:i + size] for i in range(0, len(problems), size)):
        batch = data.collate([{"prompt": p["prompt"]} for p in part], tokenizer, config.device)
        samples = model.generate(batch["prompt_ids"], batch["prompt_mask"], task.max_new_tokens,
                                 tokenizer.eos_id, tokenizer.pad_id, n, temperature, top_k, top_p,
                                 generator)
        written = [tokenizer.decode(ids) for ids in samples.completion_ids.tolist()]
        repeated = [p for p in part for _ in range(n)]
        columns = {name: [p[name] for p in repeated] for name in task.columns}
        rewards += task.reward([p["prompt"] for p in repeated], written, **columns)
        texts += written
        lengths.append(samples.completion_mask.sum(-1))                        # (part * n,)
        if ref_model is not None:
            first = {**batch, "completion_ids": samples.completion_ids[::n],
                     "completion_mask": samples.completion_mask[::n],
                     "prompt_index": torch.arange(len(part), device=config.device)}
            kls += [answer_kl(model, ref_model, micro)
                    for micro in in_parts(first, model, config)]
    shape = (len(problems), n)
    return (texts, torch.tensor(rewards).view(shape), torch.cat(lengths).view(shape),
            torch.cat(kls) if kls else None)


def answer_kl(model, ref_model, batch):
    """KL(model || ref_model) along each answer of a batch (B,)."""
    def f(logits, ids, ref_hidden):                                            # a few columns
        logp, logq = (z.log_softmax(-1) for z in (logits, ref_model.head(ref_hidden)))
        return (logp.exp() * (logp - logq)).sum(-1)                            # (B, t)

    ref_hidden = ref_model.completion_hidden(*data.inputs(batch))              # (B, T, C)
    kl = model.completion_scores(f, *data.inputs(batch), more=[ref_hidden])    # (B, T)
    return (kl * batch["completion_mask"]).sum(-1)


def held_out_loss(model, tokenizer, rows, config):
    """{"eval/loss": mean negative log-likelihood per token of what a file's held-out lines want
    written: completion, chosen or text}. Answers that are labelled bad are left out; {} where there
    is nothing, as with prompts alone."""
    written = [row.get("completion", row.get("chosen", row.get("text"))) for row in rows]
    examples = [{"prompt": row.get("prompt", ""), "completion": text}
                for row, text in zip(rows, written) if row.get("label") not in (False, 0)]
    if not examples or None in written:
        return {}
    total = count = 0
    whole = data.collate(examples, tokenizer, config.device)
    for batch in in_parts(whole, model, config):
        logprobs = model.completion_scores(
            lambda logits, ids: logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1),
            *data.inputs(batch))                                               # (B, T)
        total -= (logprobs * batch["completion_mask"]).sum().item()
        count += batch["completion_mask"].sum().item()
    return {"eval/loss": total / count}


@torch.no_grad()
def judge_pairs(algo):
    """Judge a reward model: the share of pairs of held-out answers that it ranks right, drawn as in
    training, the same pairs every time."""
    config, log, right = algo.config, Log(), []
    problems = held_out(algo.task, "test", config.eval_problems)
    generator = torch.Generator(config.device).manual_seed(1)
    with data.autocast(config):
        size = max(SAMPLED // config.num_generations, 1)
        for part in (problems[i:i + size] for i in range(0, len(problems), size)):
            batch = algo.sample(part, generator, 0, log)
            for pairs in algo.minibatches(batch, log):   # one batch of pairs, or none
                rewards = answer_rewards(algo.model, pairs)                    # (B,)
                right += (rewards[0::2] > rewards[1::2]).tolist()
    if not right:
        return {}
    return {"eval/pair_accuracy": sum(right) / len(right), "eval/pairs": len(right)}


def pass_at_k(rewards, k):
    """Chance that at least one of k answers is right, estimated without bias from the n >= k
    answers at hand: 1 - C(n - c, k) / C(n, k) with c right ones (Chen et al. 2021, 2107.03374, eq.
    1). rewards (P, n) of 0 and 1.

    Worked example: n = 2, one right: pass@1 = .5, pass@2 = 1.
    """
    n = rewards.shape[1]
    right = [int(c) for c in (rewards > 0.5).sum(1)]
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in right) / len(right)
