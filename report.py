"""
What a run finds out about its model and shows to people: evaluation, the console line, the before/after table, problems
answered before and after, the picture. train.py stays the loop and its flags.
"""

import functools
import json
import math
import os
import sys
from typing import NamedTuple, Optional

import torch

import data
from model import InputError

# Console columns: the metric's name in metrics.jsonl, its heading, its format. A column shows if the run has the metric.
COLUMNS = [
    ("step", "step", "{:d}"), ("reward", "reward", "{:.3f}"), ("true_reward", "true", "{:.3f}"), ("loss", "loss", "{:+.3f}"),
    ("nll", "nll", "{:.3f}"), ("mean_weight", "weight", "{:.2f}"), ("frac_weight_near_zero", "unweighed", "{:.2f}"),
    ("kept", "kept", "{:.2f}"), ("rewards/chosen", "chosen", "{:+.2f}"), ("rewards/rejected", "rejected", "{:+.2f}"),
    ("rewards/margins", "margin", "{:.2f}"), ("skipped_pairs", "skipped", "{:.2f}"), ("accuracy", "accuracy", "{:.3f}"),
    ("loss/value", "value loss", "{:.3f}"), ("policy/approxkl", "moved", "{:.3f}"), ("eval/pair_accuracy", "heldout pairs", "{:.3f}"),
    ("eval/accuracy", "heldout", "{:.3f}"), ("eval/loss", "heldout nll", "{:.3f}"), ("eval/worked", "worked", "{:.2f}"),
    ("completions/mean_length", "length", "{:.1f}"), ("eval/kl", "KL", "{:.2f}"), ("entropy", "entropy", "{:.3f}"),
    ("grad_norm", "grad", "{:.2f}"), ("max_ratio", "ratio", "{:.2f}"), ("clip_ratio", "clipped", "{:.3f}"),
    ("frac_reward_zero_std", "flat", "{:.2f}"), ("tokens_per_second/sample", "sample/s", "{:,.0f}"),
    ("tokens_per_second/train", "train/s", "{:,.0f}"), ("left", "left", "{}"),
]
LEGEND = """\
heldout: accuracy on held-out problems (sampled)   worked: share of answers with worked steps   length: tokens per answer
KL: from the starting model, per answer   sample/s, train/s: tokens per second"""   # each algorithm adds its own columns


def duration(seconds):
    """75 -> `1:15`"""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Console:
    """One aligned line per logging interval, under a heading that is printed once."""
    columns = None

    def print(self, line, seconds_left):
        line = {**line, "left": duration(seconds_left)}
        if self.columns is None:
            self.columns = [c for c in COLUMNS if c[0] in line]
            print("  ".join(f"{title:>{max(len(title), 6)}}" for _, title, _ in self.columns))
        cells = [(form.format(line[name]) if name in line else "", title) for name, title, form in self.columns]
        print("  ".join(f"{cell:>{max(len(title), 6)}}" for cell, title in cells), flush=True)


def opening(args, algo, task):
    """What is about to happen, in a few lines, with the answers to the questions that the numbers will raise."""
    return (f"\n{args.algo} on {task.name}: {algo.model.num_parameters():,} parameters, {args.device}, {args.dtype}, "
            f"{args.max_steps} steps of {args.batch_size}, into {args.out_dir}\n"
            + ("" if hasattr(algo, "evaluate") else LEGEND + "\n") + algo.legend)   # a reward model is judged otherwise


def shared_line(kind, summary, out_dir):
    """One line on a base model or a reward model that has just been made."""
    a = summary["after"]
    line = f"{kind}: {out_dir}, made in {duration(summary['seconds'])}"
    if "eval/pair_accuracy" in a:
        line += f": right about {a['eval/pair_accuracy']:.1%} of {a['eval/pairs']} held-out pairs"
    if "eval/accuracy" in a:
        line += f": held-out accuracy {a['eval/accuracy']:.3f}"
    if "eval/worked" in a:
        line += f"; worked steps in {a['eval/worked']:.0%} of its answers, right {a['eval/accuracy_when_worked']:.0%} of the time"
    return line


# -- evaluation -------------------------------------------------------------------------------------------------------


SAMPLED, SCORED = 1024, 128   # answers at a time, so that memory does not follow --eval_problems
NOTHING = "nothing held out to judge by"


class Answers(NamedTuple):
    """n answers to each of P problems, in the order of the problems."""
    texts: list                      # P * n of them
    rewards: torch.Tensor            # (P, n)
    lengths: torch.Tensor            # (P, n) in tokens, <end> included
    kl: Optional[torch.Tensor]       # (P,) to a reference, along the first answer; None without one


@functools.lru_cache(maxsize=4)
def held_out(task, split, size):
    """The problems of a split to judge by, drawn once: no seed and no evaluation changes them."""
    return data.problems(task, split, size, seed=0)


@torch.no_grad()
def answers(args, model, tokenizer, task, problems, num_generations=1, temperature=1.0,
            ref_model=None):
    """Sample answers to the problems and judge them -> Answers; the same draw every time."""
    generator = torch.Generator(args.device).manual_seed(1)
    n, size = num_generations, max(SAMPLED // num_generations, 1)
    texts, rewards, lengths, kl = [], [], [], []
    for part in (problems[i:i + size] for i in range(0, len(problems), size)):
        batch = data.collate([{"prompt": p["prompt"]} for p in part], tokenizer, args.device)
        samples = model.generate(
            batch["prompt_ids"], batch["prompt_mask"], task.max_new_tokens, tokenizer.eos_id,
            tokenizer.pad_id, n, temperature, args.top_k, args.top_p, generator)
        written = [tokenizer.decode(ids) for ids in samples.completion_ids.tolist()]
        repeated = [p for p in part for _ in range(n)]
        columns = {name: [p[name] for p in repeated] for name in task.columns}
        texts += written
        rewards += task.reward([p["prompt"] for p in repeated], written, **columns)
        lengths += samples.completion_mask.sum(-1).tolist()
        if ref_model is not None:
            first = {**batch, "completion_ids": samples.completion_ids[::n],
                     "completion_mask": samples.completion_mask[::n],
                     "prompt_index": torch.arange(len(part), device=args.device)}
            for micro in data.split(first, args.micro_batch_size or SCORED):
                kl.append(answer_kl(model, ref_model, micro))
    shape = (len(problems), n)
    return Answers(texts, torch.tensor(rewards).view(shape), torch.tensor(lengths).view(shape),
                   torch.cat(kl) if kl else None)


def answer_kl(model, ref_model, b):
    """KL(model || ref_model) along each answer of batch b (B,): of the whole distribution at every
    step, summed over the answer's tokens."""
    logp, logq = (m.completion_logits(b["prompt_ids"], b["prompt_mask"], b["completion_ids"],
                                      b["completion_mask"], b["prompt_index"]).log_softmax(-1)
                  for m in (model, ref_model))                                       # (B, T, V)
    return ((logp.exp() * (logp - logq)).sum(-1) * b["completion_mask"]).sum(-1)


@torch.no_grad()
def evaluate(args, model, ref_model, tokenizer, task, full):
    """Judge a model on held-out problems -> {"eval/...": number}. `full` adds greedy decoding and pass@k.

    eval/kl is KL(policy || ref) of the policy's own answers: the whole distribution at every step, summed per answer.
    """
    problems, ood = (held_out(task, split, args.eval_problems) for split in ("test", "ood"))
    if not problems:
        return {}
    with data.autocast(args):
        if isinstance(task, data.JsonLines) and "answer" not in task.columns:
            return held_out_loss(args, model, tokenizer, problems)
        n = 16 if full else 1
        found = answers(args, model, tokenizer, task, problems, n, ref_model=ref_model)
        result = {"eval/accuracy": found.rewards.mean().item()}
        if full:
            greedy = answers(args, model, tokenizer, task, problems, temperature=0)
            result["eval/greedy_accuracy"] = greedy.rewards.mean().item()
            for k in (1, 4, 16):
                result[f"eval/pass@{k}"] = pass_at_k(found.rewards, k)
        if task.is_worked:
            worked = [task.is_worked(problems[i // n]["prompt"], text)
                      for i, text in enumerate(found.texts)]
            right = [r for r, w in zip(found.rewards.flatten().tolist(), worked) if w]
            result["eval/worked"] = sum(worked) / len(worked)
            result["eval/accuracy_when_worked"] = sum(right) / max(len(right), 1)
        result["eval/mean_length"] = found.lengths.float().mean().item()
        if ref_model is not None:
            result["eval/kl"] = max(0.0, found.kl.mean().item())     # rounding may fall below 0
        if ood:
            other = answers(args, model, tokenizer, task, ood, 4 if full else 1)
            result["eval/ood_accuracy"] = other.rewards.mean().item()
    return result


def held_out_loss(args, model, tokenizer, rows):
    """A file's held-out lines -> {"eval/loss": mean negative log-likelihood per token, in nats} of
    completion, chosen or text; what is labelled bad is left out. {} where the lines are prompts
    alone."""
    written = [row.get("completion", row.get("chosen", row.get("text"))) for row in rows]
    examples = [{"prompt": row.get("prompt", ""), "completion": text}
                for row, text in zip(rows, written) if row.get("label") not in (False, 0)]
    if not examples or None in written:
        return {}
    total = count = 0
    batch = data.collate(examples, tokenizer, args.device)
    for b in data.split(batch, args.micro_batch_size or SCORED):
        ids, mask = b["completion_ids"], b["completion_mask"]                         # (B, T)
        logits = model.completion_logits(b["prompt_ids"], b["prompt_mask"], ids, mask,
                                         b["prompt_index"])
        logprobs = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)   # (B, T)
        total -= (logprobs * mask).sum().item()
        count += mask.sum().item()
    return {"eval/loss": total / count}


def sample_and_print(args, model, tokenizer, task):
    """--sample: the greedy answer, then four sampled ones."""
    batch = data.collate([{"prompt": args.sample}], tokenizer, args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    for temperature, n in ((0, 1), (1.0, 4)):
        samples = model.generate(batch["prompt_ids"], batch["prompt_mask"], task.max_new_tokens, tokenizer.eos_id,
                                 tokenizer.pad_id, n, temperature, args.top_k, args.top_p, generator)
        for ids, truncated in zip(samples.completion_ids.tolist(), samples.truncated.tolist()):
            print(f"{'greedy ' if temperature == 0 else 'sampled'}  {args.sample}{tokenizer.decode(ids)}{' ...' if truncated else ''}")


# -- token by token ---------------------------------------------------------------------------------------------------


def gradient_weights(algo, minibatch):
    """What an algorithm does to each token: -dL/d(logit of that token) (B, T), by autograd through its own loss, and the
    token's log-probability (B, T) as that loss scores it: in GRPO and PPO at the temperature of
    sampling. Plain SFT gives (1 - p) / N; a negative number pushes the token down."""
    model, seen = algo.networks["model"], []
    forward = model.completion_logits

    def record(*inputs, **options):
        seen.append(forward(*inputs, **options))
        seen[-1].retain_grad()
        return seen[-1]
    model.completion_logits = record
    try:
        algo.loss(minibatch)[0].backward()
    finally:
        del model.completion_logits   # the method of the class is visible again
    for network in algo.networks.values():
        network.zero_grad()
    ids = minibatch["completion_ids"].unsqueeze(-1)
    logprobs = seen[0].detach().log_softmax(-1).gather(-1, ids).squeeze(-1)
    if hasattr(algo, "logprobs"):   # the loss scores tokens in a way of its own
        logprobs = algo.logprobs(model, minibatch)[0].detach()
    return -seen[0].grad.gather(-1, ids).squeeze(-1), logprobs


def first_minibatch(algo, examples, generator):
    """The first minibatch of a step that has a gradient at all."""
    batch, _ = algo.collect(examples, generator, 0)
    minibatch = next((m for m in algo.minibatches(batch) if m is not None), None)
    if minibatch is None:
        raise InputError("no token of this batch has a gradient (all answers were judged alike); try another --seed")
    return minibatch


def token_text(tokenizer, token):
    return "<end>" if token == tokenizer.eos_id else repr(tokenizer.decode([token]))[1:-1]


def colour(text, value):
    """Green for what is pushed up, red for what is pushed down, if anybody sees colours."""
    if not sys.stdout.isatty() or abs(value) < 5e-6:
        return text
    return f"\033[{32 if value > 0 else 31}m{text}\033[0m"


def inspect(args, algo, examples, generator, rows=4):
    """--inspect: the first rows of one batch, token by token, as aligned text."""
    algo.micro_batch_size, algo.max_steps, tokenizer = 0, args.max_steps, algo.tokenizer
    minibatch = first_minibatch(algo, examples, generator)
    weight, logprobs = gradient_weights(algo, minibatch)
    lines = ["trained: whether the loss sees the token   ratio: pi/pi_old   weight: -dL/d(logit of the token), by autograd"]
    for b in range(min(rows, len(weight))):
        p = minibatch["prompt_index"][b]
        prompt = minibatch["prompt_ids"][p][minibatch["prompt_mask"][p]].tolist()[1:]
        lines += ["", f"{'token':<8}{'trained':>8}{'logprob':>10}{'prob':>8}{'ratio':>8}{'advantage':>11}{'weight':>12}"]
        lines += [f"{token_text(tokenizer, t):<8}{'no':>8}" for t in prompt]
        for t in minibatch["completion_mask"][b].nonzero().flatten().tolist():
            lp, w = logprobs[b, t].item(), weight[b, t].item()
            old = minibatch["old_logprobs"][b, t].item() if "old_logprobs" in minibatch else lp
            advantage = minibatch["advantages"][b] if "advantages" in minibatch else None
            shown = "-" if advantage is None else f"{(advantage[t] if advantage.dim() else advantage).item():+.3f}"
            token = token_text(tokenizer, minibatch["completion_ids"][b, t].item())
            lines.append(f"{token:<8}{'yes':>8}{lp:>10.3f}{math.exp(lp):>8.3f}{math.exp(lp - old):>8.3f}{shown:>11}"
                         + colour(f"{w:>+12.6f}", w))
    return "\n".join(lines)


def inspect_all(args, algos, examples, generator):
    """--inspect all: the same answers under every algorithm, side by side. algos {name: algorithm}; the first thing that each
    does with the generator is to sample, so that one seed gives all of them the same answers to the same prompts. Of the
    first group with a right and a wrong answer one of each is shown: DPO's first pair."""
    found = {}                                                    # {algorithm: {(prompt, answer): weight of each token}}
    for name, algo in algos.items():
        algo.micro_batch_size, algo.max_steps = 0, args.max_steps
        minibatch = first_minibatch(algo, examples, generator.manual_seed(args.seed))
        weight, logprobs = gradient_weights(algo, minibatch)
        rows = [(tuple(minibatch["prompt_ids"][p][minibatch["prompt_mask"][p]].tolist()), tuple(ids[mask].tolist()))
                for p, ids, mask in zip(minibatch["prompt_index"], minibatch["completion_ids"], minibatch["completion_mask"])]
        found[name] = {row: weight[b].tolist() for b, row in enumerate(rows)}
        if name == "dpo":
            shown = [(row, label, logprobs[b].exp().tolist()) for b, (row, label) in enumerate(zip(rows, ("chosen", "rejected")))]
    lines = ["weight of each token's gradient, -dL/d(logit of the token), in thousandths; the same answers under every algorithm"]
    for (prompt, answer), label, p in shown:
        lines += ["", "".join(token_text(algo.tokenizer, t) for t in prompt[1:]) + f"  {label}",
                  f"{'token':<8}{'prob':>8}" + "".join(f"{name:>10}" for name in found)]
        for t, token in enumerate(answer):
            cells = [1000 * weights[prompt, answer][t] if (prompt, answer) in weights else 0.0 for weights in found.values()]
            lines.append(f"{token_text(algo.tokenizer, token):<8}{p[t]:>8.3f}" + "".join(colour(f"{c:>+10.3f}", c) for c in cells))
    return "\n".join(lines)


# -- tables -----------------------------------------------------------------------------------------------------------


def pass_at_k(rewards, k):
    """Chance that at least one of k answers is right, estimated without bias from the n >= k answers at hand:
    1 - C(n - c, k) / C(n, k) with c right ones (Chen et al. 2021, 2107.03374, eq. 1). rewards (problems, n) of 0 and 1.

    Worked example: n = 2, one right: pass@1 = .5, pass@2 = 1.
    """
    n = rewards.shape[1]
    right = [int(c) for c in (rewards > 0.5).sum(1)]
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in right) / len(right)


ROWS = [("accuracy, sampled", "eval/accuracy", 1), ("accuracy, greedy", "eval/greedy_accuracy", None),
        ("pass@4", "eval/pass@4", 4), ("pass@16", "eval/pass@16", 16), ("out of distribution", "eval/ood_accuracy", 1),
        ("pairs ranked right", "eval/pair_accuracy", None), ("worked steps", "eval/worked", None), ("right when worked", "eval/accuracy_when_worked", None),
        ("completion length", "eval/mean_length", None), ("held-out nll", "eval/loss", None), ("KL to the start", "eval/kl", None)]


def table(columns, task):
    """A table with a row a measure: columns is [(heading, {"eval/...": value})]; chance stands beside pass@k."""
    lines = [f"{'held-out problems':<22}" + "".join(f"{title:>9}" for title, _ in columns) + f"{'chance':>9}"]
    for title, name, k in ROWS:
        if any(name in values for _, values in columns):
            chance = task.chance(k) if k else None
            cells = [f"{values[name]:.3f}" if name in values else "-" for _, values in columns]
            lines.append(f"{title:<22}" + "".join(f"{c:>9}" for c in cells) + f"{'' if chance is None else f'{chance:.3f}':>9}")
    return "\n".join(lines) if len(lines) > 1 else NOTHING


def finish(args, summary, algo):
    """The end of a run: table, three problems answered before and after, files, what to try next."""
    task, model, ref_model = algo.task, algo.networks["model"], algo.frozen.get("ref_model")
    problems = data.problems(task, "test", 3, args.seed)
    if ref_model is not None and summary["after"]:
        print("\n" + table([("before", summary["before"]), ("after", summary["after"])], task))
    if ref_model is not None and "eval/accuracy" in summary["after"]:
        was, now = (answers(args, m, algo.tokenizer, task, problems) for m in (ref_model, model))
        was_right, now_right = (["ok" if r > 0.5 else "x" for r in a.rewards.flatten()]
                                for a in (was, now))
        width = max(map(len, ["before", *was.texts])) + 3
        print(f"\n{'problem (sampled answers)':<27}{'before':<{width}}    after")
        for problem, *cells in zip(problems, was.texts, was_right, now.texts, now_right):
            print(f"{problem['prompt']:<27}{cells[0]:<{width}}{cells[1]:<4}{cells[2]}  {cells[3]}")
    made = f", after {duration(summary['pretrain_seconds'])} of pre-training" if summary["pretrain_seconds"] else ""
    judging = f", {duration(summary['eval_seconds'])} of it evaluation"
    print(f"\n{summary['steps']} steps in {duration(summary['seconds'])}{judging}{made}; "
          f"{summary['sampled_tokens']:,} tokens sampled, {summary['trained_tokens']:,} trained on")
    print(f"files: {args.out_dir}/ckpt.pt, metrics.jsonl, summary.json, {plot(args.out_dir)}")
    if args.algo == "pretrain":
        print(f"next:  python train.py --algo grpo --init_from {args.out_dir}")
    elif args.algo == "rm":
        print(f"next:  python train.py --algo ppo --reward model --reward_model {args.out_dir}")
    else:
        flags = f" --data {args.data}" if args.data else f" --task {args.task}" if args.task != "chain" else ""
        other = "sft" if args.algo == "grpo" else "grpo"
        print(f"next:  python train.py --init_from {args.out_dir}{flags} --sample \"{problems[0].get('prompt', 'text') if problems else 'text'}\"\n"
              f"       python train.py --algo {other}{flags}\n"
              f"       python train.py --algo grpo --num_iterations 2{flags}      # see the ratio move")


# Of a comparison: heading, where the number is in a run's summary, format.
MEASURES = [("accuracy", ("after", "eval/accuracy"), "{:.3f}"), ("greedy", ("after", "eval/greedy_accuracy"), "{:.3f}"),
            ("pass@16", ("after", "eval/pass@16"), "{:.3f}"), ("ood", ("after", "eval/ood_accuracy"), "{:.3f}"),
            ("nll", ("after", "eval/loss"), "{:.3f}"), ("KL", ("after", "eval/kl"), "{:.2f}"),
            ("length", ("after", "eval/mean_length"), "{:.1f}"),
            ("updates", ("updates",), "{:.0f}"), ("sampled", ("sampled_tokens",), "{:,.0f}"),
            ("trained", ("trained_tokens",), "{:,.0f}"),
            ("train s", ("train_seconds",), "{:.1f}"), ("eval s", ("eval_seconds",), "{:.1f}"),
            ("MB", ("peak_memory_mb",), "{:.0f}")]
COSTS = ("train s, eval s: seconds of training and of evaluation\n"
         "MB: peak memory of the process, with Python, torch and evaluation "
         "(on a GPU: of the tensors there)")
JUDGED = (("eval/accuracy", "held-out accuracy"), ("eval/loss", "held-out nll"))   # a run has one


def result_line(result):
    after = result["after"]
    found = next((f"{title} {after[name]:.3f}" for name, title in JUDGED if name in after), NOTHING)
    return f"{result['variant']}, seed {result['seed']}: {found}, {result['steps']} steps in {result['seconds']:.0f} s"


def comparison(results):
    """The table of a comparison: a row a variant, each cell the mean over seeds and, behind +-, half of largest minus
    smallest; the base first. Token counts, seconds and memory are those of the run, without the
    base."""
    def value(result, keys):
        for key in keys:
            result = result.get(key) if result is not None else None
        return result

    def cell(runs, keys, form):
        values = [v for v in (value(run, keys) for run in runs) if v is not None]
        if not values:
            return "-"
        text = form.format(sum(values) / len(values))
        judged = keys[0] == "after"   # what a run cost needs no spread
        return text + f" +-{form.format((max(values) - min(values)) / 2)}" if judged and len(values) > 1 else text
    base = [{"after": results[0]["before"]}]
    rows = [["", *(title for title, _, _ in MEASURES)], ["base", *(cell(base, keys, form) for _, keys, form in MEASURES)]]
    for variant in dict.fromkeys(r["variant"] for r in results):
        runs = [r for r in results if r["variant"] == variant]
        rows.append([variant, *(cell(runs, keys, form) for _, keys, form in MEASURES)])
    shown = [i for i in range(len(rows[0])) if i == 0 or any(row[i] != "-" for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in shown}
    lines = ["  ".join(f"{row[i]:{'>' if i else '<'}{widths[i]}}" for i in shown) for row in rows]
    return "\n".join([*lines, COSTS])


def peak_memory_mb():
    """The most memory that this process, all of it, ever held; if it used a GPU, tensors there."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource   # absent on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# -- picture ----------------------------------------------------------------------------------------------------------


NO_PICTURE = "and for a picture of the curves: pip install matplotlib"


def read_metrics(path):
    """The objects of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    if os.path.exists(path):
        with open(path) as file:
            for text in file:
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    break
    return lines


def pyplot():
    """matplotlib's pyplot, or None where it is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    return plt


def plot(out_dir):
    """Draw curve.png from metrics.jsonl. Returns what to tell the reader about it."""
    plt = pyplot()
    if plt is None:
        return NO_PICTURE
    lines = read_metrics(os.path.join(out_dir, "metrics.jsonl"))
    panels = [("accuracy", [("eval/accuracy", "held-out, sampled"), ("eval/ood_accuracy", "out of distribution"), ("reward", "training reward"),
                            ("eval/worked", "answers with worked steps")]),
              ("loss", [("nll", "training nll"), ("eval/loss", "held-out nll")]), ("nats", [("eval/kl", "KL to the start"), ("entropy", "entropy")]),
              ("tokens", [("completions/mean_length", "completion length")])]
    panels = [(label, [s for s in series if sum(s[0] in line for line in lines) > 1]) for label, series in panels]
    panels = [p for p in panels if p[1]]
    if not panels:
        return "metrics too few for a picture"
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axis, (label, series) in zip(axes[0], panels):
        for name, title in series:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points), label=title, linestyle="--" if name == "reward" else "-")
        axis.set_xlabel("updates")
        axis.set_ylabel(label)
        axis.set_ylim(*((0, 1) if label == "accuracy" else (0, None)))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(os.path.join(out_dir, "curve.png"), dpi=120)
    plt.close(figure)
    return "curve.png"


def plot_comparison(folder, results):
    """Draw compare.png: held-out accuracy (else nll) against updates and against sampled tokens,
    mean and range over seeds."""
    plt = pyplot()
    if plt is None:
        return NO_PICTURE
    judged = [(name, title) for name, title in JUDGED if name in results[0]["after"]]
    if not judged:
        return f"no picture: {NOTHING}"
    measure, title = judged[0]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, name, label in zip(axes, ("updates", "sampled_tokens"), ("updates", "sampled tokens")):
        for i, variant in enumerate(dict.fromkeys(r["variant"] for r in results)):
            logs = [read_metrics(os.path.join(r["folder"], "metrics.jsonl"))
                    for r in results if r["variant"] == variant]
            runs = [[line for line in lines if measure in line] for lines in logs]
            points = list(zip(*runs))                      # [evaluation][seed]
            x = [sum(line[name] for line in lines) / len(lines) for lines in points]
            y = [[line[measure] for line in lines] for lines in points]
            if not points:
                continue
            if name == "sampled_tokens" and x[-1] == 0:    # imitation samples nothing: its end is a level to compare with
                axis.axhline(sum(y[-1]) / len(y[-1]), color=f"C{i}", linestyle=":", linewidth=1)
                continue
            axis.plot(x, [sum(v) / len(v) for v in y], color=f"C{i}", label=variant)
            axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=f"C{i}", alpha=0.2, linewidth=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(title)
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].set_title("dotted: samples nothing", fontsize=8)
    figure.tight_layout()
    figure.savefig(os.path.join(folder, "compare.png"), dpi=120)
    plt.close(figure)
    return "compare.png"
