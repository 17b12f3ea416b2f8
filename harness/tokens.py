"""
Token by token (--inspect): what one step of an algorithm would do to each token of its batch.

The weight of a token is -dL/d(logit of that token), by autograd through the algorithm's own loss.
Plain SFT gives (1 - p) / N; a negative number pushes the token down.
"""

import copy
import dataclasses
import math
import sys

import torch

import data
from harness import page
from harness.errors import InputError
from harness.log import Log

SIDE_BY_SIDE = ("sft", "dft", "dpo", "ppo", "grpo")   # rft is sft on the right answers
WEIGHT = "weight of each token's gradient, -dL/d(logit of the token), in thousandths"


def gradient_weights(algo, minibatch):
    """-dL/d(logit of each token) (B, T), and the token's log-probability as the loss sees it."""
    seen = []

    def keep(module, inputs, logits):
        logits.retain_grad()
        seen.append(logits)
    hook = algo.model.lm_head.register_forward_hook(keep)
    try:
        algo.loss(minibatch, Log()).backward()
    finally:
        hook.remove()
        algo.zero_grad()
    # The trained logits, which may have come in chunks (model.completion_scores); what the backward
    # pass has read again has no gradient of its own.
    seen = [logits for logits in seen if logits.grad is not None]
    gradient = torch.cat([logits.grad for logits in seen], dim=1)              # (B, T, V)
    ids = minibatch["completion_ids"].unsqueeze(-1)                            # (B, T, 1)
    # With advantages or a teacher, answers are scored at the temperature of their sampling, but for
    # the tokens that a demonstrator wrote.
    logits = torch.cat([logits.detach() for logits in seen], dim=1).float()    # (B, T, V)
    if "advantages" in minibatch or hasattr(algo, "teacher"):
        demonstrated = minibatch.get("demonstrated", torch.tensor([[False]]))[..., None]
        logits = torch.where(demonstrated.to(logits.device), logits,
                             logits / algo.config.temperature)
    logprobs = logits.log_softmax(-1)                                          # (B, T, V)
    return -gradient.gather(-1, ids).squeeze(-1), logprobs.gather(-1, ids).squeeze(-1)


def first_minibatch(algo, batch):
    """The first minibatch of a step that has a gradient."""
    for minibatch in algo.minibatches(batch, Log()):
        # Without an advantage an answer teaches nothing; a demonstration may: it has a weight.
        teaches = minibatch.get("weights" if "demonstrated" in minibatch else "advantages")
        if teaches is None or teaches.any():
            return minibatch
    raise InputError("no token of this batch has a gradient (all answers were judged alike); try "
                     "another --seed")


def token_text(tokenizer, token):
    if token in getattr(tokenizer, "names", ()):   # <|im_start|> of a published model
        return tokenizer.names[token]
    return "<end>" if token == tokenizer.eos_id else repr(tokenizer.decode([token]))[1:-1]


def colour(text, value):
    """Green for what is pushed up, red for what is pushed down; only on a terminal."""
    if not sys.stdout.isatty() or abs(value) < 5e-6:
        return text
    return f"\033[{32 if value > 0 else 31}m{text}\033[0m"


def inspect(algo, algorithms):
    """--inspect one or all, as text; --html writes a page as well. Raises InputError for an
    algorithm that teaches no policy."""
    config = algo.config
    if config.algo in ("pretrain", "rm"):
        raise InputError(f"--inspect shows what a policy is taught; --algo {config.algo} has none")
    config.micro_batch_size = 0
    generator = torch.Generator(config.device).manual_seed(config.seed)
    if config.inspect == "one":
        return inspect_one(algo, generator)
    shared = [f.name for f in dataclasses.fields(config) if f.name in ("device", "dtype", "seed")]
    settings = {name: getattr(config, name) for name in shared}
    algos = {name: algorithms[name](algorithms[name].Config(**settings), copy.deepcopy(algo.model),
                                    algo.tokenizer, algo.task) for name in SIDE_BY_SIDE}
    answers = side_by_side(algos, algos["dpo"].examples()[:8], generator)
    if config.html is None:
        return table(answers)
    about = {name: one.Config.__doc__.split(": ")[1] for name, one in algos.items()}
    page.write(config.html, page.document(answers, about))
    return f"{table(answers)}\n\npage: {config.html}"


def inspect_one(algo, generator, rows=4):
    """The first rows of one batch, token by token, as aligned text."""
    config, tokenizer, examples = algo.config, algo.tokenizer, algo.examples()
    chosen = [examples[i] for i in data.batch_indices(len(examples), config, 0)]
    with torch.no_grad():
        batch = algo.sample(chosen, generator, 0, Log())
    minibatch = first_minibatch(algo, batch)
    weight, logprobs = gradient_weights(algo, minibatch)
    lines = ["trained: whether the loss sees the token   ratio: pi/pi_old   weight: -dL/d(logit of "
             "the token), by autograd"]
    demonstrated = minibatch.get("demonstrated", torch.zeros_like(minibatch["completion_mask"]))
    if "demonstrated" in minibatch:
        lines.append("demo: a demonstrator wrote the token")
    demos = demonstrated.any(-1).nonzero().flatten().tolist()
    own = (~demonstrated.any(-1)).nonzero().flatten().tolist()
    n = min(len(demos), max(rows // 2, rows - len(own)))   # half of the rows of either kind
    for b in own[:rows - n] + demos[:n]:
        p = minibatch["prompt_index"][b]
        prompt = minibatch["prompt_ids"][p][minibatch["prompt_mask"][p]].tolist()[1:]
        lines += ["", f"{'token':<8}{'trained':>8}{'logprob':>10}{'prob':>8}{'ratio':>8}"
                      f"{'advantage':>11}{'weight':>12}"]
        lines += [f"{token_text(tokenizer, t):<8}{'no':>8}" for t in prompt]
        for t in minibatch["completion_mask"][b].nonzero().flatten().tolist():
            lp, w = logprobs[b, t].item(), weight[b, t].item()
            old = minibatch["old_logprobs"][b, t].item() if "old_logprobs" in minibatch else lp
            shown = "-"
            if "advantages" in minibatch:   # one an answer (GRPO), or one a token (PPO)
                advantage = minibatch["advantages"][b]
                shown = f"{(advantage[t] if advantage.dim() else advantage).item():+.3f}"
            token = token_text(tokenizer, minibatch["completion_ids"][b, t].item())
            trained = "demo" if demonstrated[b, t] else "yes"
            lines.append(f"{token:<8}{trained:>8}{lp:>10.3f}{math.exp(lp):>8.3f}"
                         f"{math.exp(lp - old):>8.3f}{shown:>11}" + colour(f"{w:>+12.6f}", w))
    return "\n".join(lines)


def side_by_side(algos, examples, generator):
    """The same sampled answers under every algorithm: DPO's first pair.

    algos {name: algorithm}. All of them get the same batch; for SFT and DFT its right answers are
    the demonstrations. -> a list of answers, {"prompt", "label": chosen or rejected, "tokens":
    [(text, probability, {name: weight in thousandths})]}. Raises InputError where none is right.
    """
    with torch.no_grad():
        batch = algos["dpo"].sample(examples, generator, 0, Log())
    rows = (batch["rewards"] > 0.5).nonzero().squeeze(-1)
    if not len(rows):
        raise InputError("no answer of this batch is right; try another --seed")
    right = data.take_rows(batch, rows)
    found = {}                             # {algorithm: {(prompt, answer): weight of each token}}
    for name, algo in algos.items():
        minibatch = first_minibatch(algo, right if name in ("sft", "dft") else batch)
        weight, logprobs = gradient_weights(algo, minibatch)
        prompts = [tuple(ids[mask].tolist())
                   for ids, mask in zip(minibatch["prompt_ids"], minibatch["prompt_mask"])]
        rows = [(prompts[p], tuple(ids[mask].tolist())) for p, ids, mask in zip(
            minibatch["prompt_index"], minibatch["completion_ids"], minibatch["completion_mask"])]
        found[name] = {row: weight[b].tolist() for b, row in enumerate(rows)}
        if name == "dpo":
            pair = list(zip(rows, ("chosen", "rejected"), logprobs.exp().tolist()))
    answers, tokenizer = [], algos["dpo"].tokenizer
    for row, label, p in pair:
        prompt, answer = row
        weights = [{name: 1000 * weight[row][t] if row in weight else 0.0
                    for name, weight in found.items()} for t in range(len(answer))]
        answers.append({
            "prompt": "".join(token_text(tokenizer, t) for t in prompt[1:]), "label": label,
            "tokens": [(token_text(tokenizer, token), p[t], weights[t])
                       for t, token in enumerate(answer)]})
    return answers


def table(answers):
    """What side_by_side found, as text: a token a line, an algorithm a column."""
    lines = [f"{WEIGHT}; the same answers under every algorithm"]
    for answer in answers:
        names = answer["tokens"][0][2]
        lines += ["", f"{answer['prompt']}  {answer['label']}",
                  f"{'token':<8}{'prob':>8}" + "".join(f"{name:>10}" for name in names)]
        lines += [f"{token:<8}{p:>8.3f}" + "".join(colour(f"{w:>+10.3f}", w) for w in row.values())
                  for token, p, row in answer["tokens"]]
    return "\n".join(lines)
